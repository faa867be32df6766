"""`hf:org/name[@revision]` -> a local folder with the checkpoint, downloaded once.

    folder = resolve("hf:google/vit-base-patch16-224-in21k")

Read from the environment, as huggingface_hub does: HF_ENDPOINT (a mirror), HF_TOKEN (private or
gated models), HF_HOME (the cache is $HF_HOME/minilora, else ~/.cache/huggingface/minilora),
HF_HUB_OFFLINE=1 (cache only). A folder is complete once its manifest says so; from then on it is
used without asking the server again. Delete the folder to fetch it anew, or name a revision.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

from reference_models.errors import ModelError
from reference_models.files.download import Declared, NotFound, download, shown
from reference_models.files.safetensors import NAMES, read_header
from reference_models.text.textfiles import read_json, write_atomic

LOG = logging.getLogger("reference_models")  # silent in a library; programs show it on stderr
PREFIX = "hf:"
MANIFEST = ".minilora.json"
SMALL = 256 << 20  # bytes: no configuration or vocabulary is longer
CONFIGS = ("config.json", "open_clip_config.json")  # one of them must exist
EXTRAS = (
    *("processor_config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt", "1_Pooling/config.json"),
    *("modules.json", "sentence_bert_config.json"),
)
OPEN_CLIP = tuple(name for name in NAMES if name.startswith("open_clip"))


def resolve(spec: str | Path, texts: bool = False) -> Path:
    """The local path of `spec`: itself, or for "hf:org/name[@revision]" the folder in the cache,
    filled if need be. With `texts` open_clip's weights are in it too where the others are timm's.

    Raises ModelError for a malformed name, a missing or refused model, a download that stays
    broken, bytes that are not the declared ones, an index that names files outside the folder, or
    HF_HUB_OFFLINE without a copy.
    """
    if not str(spec).startswith(PREFIX):
        return Path(spec)
    name, revision = _parse(str(spec))
    folder = cache_folder() / name.replace("/", "--") / revision.replace("/", "--")
    if _complete(folder, texts):
        return folder
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelError(f"{spec}: HF_HUB_OFFLINE is set and {folder} holds no complete copy; unset it to download")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"{folder}: the cache cannot be made ({error.strerror}); set HF_HOME elsewhere") from None
    with _locked(folder):
        if not _complete(folder, texts):  # another process may have been faster
            _Snapshot(name, revision, folder).fill(texts)
    return folder


def cache_folder() -> Path:
    """Where downloads are kept."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(home).expanduser() / "minilora"


def _parse(spec: str) -> tuple[str, str]:
    name, at, revision = spec.removeprefix(PREFIX).partition("@")
    revision = revision if at else "main"
    part = r"(?!\.+(?:/|$))[\w.-]+"  # no "." or ".."
    if not re.fullmatch(rf"{part}(/{part})?", name, re.ASCII):
        raise ModelError(f"{spec}: expected hf:organisation/name, as in hf:google/vit-base-patch16-224-in21k")
    if not re.fullmatch(rf"{part}(/{part})*", revision, re.ASCII):
        raise ModelError(f"{spec}: {revision!r} is not a revision (a branch, a tag or a commit)")
    return name, revision


def _manifest(folder: Path) -> dict:
    """The manifest, {} where there is none that can be read: the folder is then filled again."""
    try:
        return read_json(folder / MANIFEST)
    except ModelError:
        return {}


def _kept(folder: Path, name: str, size: object) -> bool:
    path = folder / name
    inside = Path(name).name == name or name in EXTRAS
    return inside and path.is_file() and path.stat().st_size == size


def _complete(folder: Path, texts: bool) -> bool:
    manifest = _manifest(folder)
    files = manifest.get("files")
    if not manifest.get("complete") or not isinstance(files, dict):
        return False
    return all(_kept(folder, name, size) for name, size in files.items()) and not (texts and _no_texts(folder, files))


def _no_texts(folder: Path, files: dict) -> bool:
    """Whether the weights are timm's, and those of open_clip beside them were left out."""
    both = {*CONFIGS} <= files.keys() and "architecture" in read_json(folder / CONFIGS[0])
    return both and not {*OPEN_CLIP} & files.keys()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process fills a folder at a time (the ranks of torchrun all ask at once)."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Snapshot:
    """The files of one revision on their way into a folder."""

    def __init__(self, name: str, revision: str, folder: Path):
        self.name, self.folder, self.pinned = name, folder, revision
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        if urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ModelError(f"HF_ENDPOINT={shown(self.endpoint)}: expected an http:// or https:// address")
        self.token = os.environ.get("HF_TOKEN", "").strip() or None
        self.earlier = _manifest(folder)
        self.commit: str | None = None
        self.files: dict[str, int] = {}

    def fill(self, texts: bool) -> None:
        found = [name for name in CONFIGS if self.optional(name)]
        if not found:
            raise ModelError(
                f"hf:{self.name}@{self.pinned}: no config.json at {shown(self.endpoint)}; is the name (and revision) "
                "right?"
            )
        for name in EXTRAS:
            self.optional(name)
        weights = next((name for name in NAMES if self.optional(name)), None)
        if weights is None:
            raise ModelError(f"hf:{self.name}: has no weights that can be read; looked for {', '.join(NAMES)}")
        if texts and _no_texts(self.folder, self.files):
            any(self.optional(name) for name in OPEN_CLIP)  # up to the first that exists
        if weights.endswith(".index.json"):
            for shard in shard_names(self.folder / weights):
                self.fetch(shard)
        self.write_manifest(complete=True)

    def optional(self, name: str) -> bool:
        """Fetch the file; False where the model has none of that name."""
        try:
            self.fetch(name)
        except NotFound:
            return False
        return True

    def fetch(self, name: str) -> None:
        known = self.earlier.get("files")
        if self.commit and self.commit == self.earlier.get("commit") and isinstance(known, dict):
            if name in known and _kept(self.folder, name, known[name]):
                self.files[name] = known[name]
                return
        url = f"{self.endpoint}/{self.name}/resolve/{quote(self.pinned, safe='')}/{name}"
        path, weights = self.folder / name, name.endswith((".safetensors", ".bin"))
        if weights:
            LOG.info("downloading %s", shown(url))
        path.parent.mkdir(exist_ok=True)
        declared = download(url, path, self.token, None if weights else SMALL)
        read = {"json": read_json, "safetensors": read_header}.get(name.rpartition(".")[2])
        # nobody has vouched for the bytes, and what is here stays
        if declared.digest is None and read:
            try:
                read(path)
            except ModelError as error:
                path.unlink()
                raise ModelError(f"{error}; {shown(url)} sent something else than the file") from None
        self.pin(declared)
        self.files[name] = path.stat().st_size
        self.write_manifest(complete=False)

    def pin(self, declared: Declared) -> None:
        """Ask for the commit of the first answer from here on, as a branch may move."""
        if self.commit is None and declared.commit and re.fullmatch(r"[0-9a-f]{40}", declared.commit):
            self.commit = self.pinned = declared.commit

    def write_manifest(self, complete: bool) -> None:
        data = {"name": self.name, "commit": self.commit, "complete": complete, "files": self.files}
        write_atomic(self.folder / MANIFEST, (json.dumps(data, indent=1) + "\n").encode())


def shard_names(index: Path) -> list[str]:
    """The files that an index names; each must be a plain weight file beside it."""
    weight_map = read_json(index, unique=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}, key weight_map: expected an object of tensor: file")
    ending = index.name.removesuffix(".index.json").rpartition(".")[2]  # safetensors or bin
    for key, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(rf"\w[\w.-]*\.{ending}", name, re.ASCII):
            raise ModelError(f"{index}, key {key}: {name!r} is not the plain name of a .{ending} file; refused")
    return sorted(set(weight_map.values()))
