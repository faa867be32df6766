"""Fetch and unpack the public data sets of the recipes.

    python -m minilora.commands.download imagewoof DIR      # 0.3 GB, class folders
    python -m minilora.commands.download vqa2 DIR           # 20 GB, questions and COCO pictures
    python -m minilora.commands.download visual7w DIR       # 1.8 GB, questions and pictures

An archive is downloaded into DIR, where a repeated command resumes it, compared with the size and
checksum that are known of it, refused if a member would land outside DIR, unpacked and removed.
What is complete is noted in DIR/.downloaded.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import stat
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from minilora.errors import RunError, UserError
from minilora.settings import exit_codes as cli
from reference_models import ModelError
from reference_models.files.download import download, shown

# environment variable: take every archive from this base address instead
MIRROR = "MINILORA_MIRROR"
NOTES = ".downloaded.json"
DEEPEST, LONGEST = 64, 4096  # folders in a member's name, and letters
GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Archive:
    """One file to fetch, and what is known of it before it is here."""

    url: str
    size: int | None = None  # bytes
    md5: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


@dataclass(frozen=True)
class DataSet:
    """The archives of a data set and what they become."""

    archives: tuple[Archive, ...]
    folder: str  # what --data-dir becomes, below DIR
    recipe: str
    pictures: int | None = None  # how many there must be in the end


VQA = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
COCO = "http://images.cocodataset.org/zips"
ARCHIVES = {
    "imagewoof": (Archive("https://s3.amazonaws.com/fast-ai-imageclas/imagewoof2-320.tgz"),),
    "vqa2": (
        Archive(f"{VQA}/v2_Questions_Train_mscoco.zip", 7_239_401),
        Archive(f"{VQA}/v2_Questions_Val_mscoco.zip", 3_494_929),
        Archive(f"{VQA}/v2_Annotations_Train_mscoco.zip", 21_708_861),
        Archive(f"{VQA}/v2_Annotations_Val_mscoco.zip", 10_518_930),
        Archive(f"{COCO}/train2014.zip", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
        Archive(f"{COCO}/val2014.zip", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
    ),
    "visual7w": (
        Archive("https://ai.stanford.edu/~yukez/papers/resources/dataset_v7w_telling.zip"),
        Archive("http://vision.stanford.edu/yukezhu/visual7w_images.zip"),
    ),
}
SETS = {
    "imagewoof": DataSet(ARCHIVES["imagewoof"], "imagewoof2-320", "imagewoof-vit-tiny", pictures=12_954),
    "vqa2": DataSet(ARCHIVES["vqa2"], "", "vqa-vit-bert"),
    "visual7w": DataSet(ARCHIVES["visual7w"], "", "choice-clip"),
}


def fetch(name: str, directory: str | os.PathLike, mirror: str | None = None) -> Path:
    """Download and unpack the data set `name` below `directory`; returns the folder for --data-dir.
    Raises UserError for an unknown name, RunError for what network, archive or disk do."""
    if name not in SETS:
        raise UserError(f"data set {name!r} is unknown; choose from {', '.join(SETS)}")
    wanted, root = SETS[name], Path(directory)
    mirror = mirror or os.environ.get(MIRROR)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{root}: cannot be made ({error.strerror})") from None
    notes = root / NOTES
    done = _read_notes(notes)
    for archive in wanted.archives:
        if archive.name in done:
            print(f"{archive.name}: already there")
            continue
        path = _download(archive, root, f"{mirror.rstrip('/')}/{archive.name}" if mirror else archive.url)
        count = unpack(path, root)
        path.unlink()
        done.append(archive.name)
        notes.write_text(json.dumps(done))
        print(f"{archive.name}: {count} files unpacked")
    folder, expected = root / wanted.folder, wanted.pictures
    if expected is not None:
        found = sum(name.upper().endswith(".JPEG") for _, _, names in os.walk(folder) for name in names)
        if found != expected:
            what = f"{found:,} pictures instead of {expected:,}"
            raise RunError(f"{folder}: {what}; delete the folder and repeat the command")
    return folder


def _read_notes(path: Path) -> list[str]:
    """Names of the archives that are unpacked; notes that cannot be read count as none."""
    try:
        names = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return []
    return names if isinstance(names, list) else []


def _download(archive: Archive, root: Path, url: str) -> Path:
    """The archive in `root`, complete and checked; half a download never has its final name."""
    path = root / archive.name
    if path.is_file():
        return path
    try:
        print(f"downloading {shown(url)}")
        download(url, path)
    except ModelError as error:
        raise RunError(f"{error}; repeat the command to try again") from None
    from torchvision.datasets.utils import calculate_md5  # here: --help need not wait for it

    size, wrong = path.stat().st_size, None
    if archive.size is not None and size != archive.size:
        wrong = f"got {size:,} bytes instead of {archive.size:,}"
    elif archive.md5 is not None and calculate_md5(str(path)) != archive.md5:
        wrong = f"the checksum differs from {archive.md5}"
    if wrong:
        path.unlink()
        raise RunError(f"{shown(url)}: {wrong}; repeat the command to try again")
    return path


def unpack(path: Path, root: Path) -> int:
    """Unpack a .zip or .tar(.gz) into `root`; returns the number of files.

    Every member is checked before the first is written: absolute paths, `..`, links and
    devices raise RunError. A damaged archive is removed, so that it is fetched anew.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = archive.infolist()
                for member in members:
                    kind = stat.S_IFMT(member.external_attr >> 16)
                    _check_member(path, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
                    if member.flag_bits & 1:
                        raise RunError(f"{path}: member {member.filename!r} is encrypted; nothing was unpacked")
                _check_space(path, root, sum(member.file_size for member in members))
                archive.extractall(root)
                return sum(not member.is_dir() for member in members)
        with open(path, "rb") as file, gzip.open(file) if file.peek(2)[:2] == GZIP else file as stream:
            with tarfile.open(fileobj=stream, mode="r:") as archive:
                members = archive.getmembers()
            while stream.read(1 << 20):  # to the end, where gzip's checksum is
                pass
        with tarfile.open(path) as archive:
            for member in members:
                _check_member(path, member.name, member.isfile() or member.isdir())
            _check_space(path, root, sum(member.size for member in members))
            archive.extractall(root, members=members, filter="data")
            return sum(member.isfile() for member in members)
    except RunError:
        raise
    # damaged archives find a new kind of error in zipfile, tarfile and the decompressors each time
    except Exception as error:
        if isinstance(error, gzip.BadGzipFile) or not isinstance(error, OSError):
            path.unlink()
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise RunError(f"{path}: cannot be unpacked ({reason}); repeat the command to try again") from None


def _check_member(path: Path, name: str, plain: bool) -> None:
    slashed = name.replace("\\", "/")
    parts = PurePosixPath(slashed).parts
    outside = slashed.startswith("/") or ".." in parts or PureWindowsPath(name).drive
    odd = not parts or len(parts) > DEEPEST or len(name) > LONGEST
    if outside or odd or not plain:
        reason = "has no usable name" if odd else "is a link or a device"
        reason = "would land outside the folder" if outside else reason
        raise RunError(f"{path}: member {name[:80]!r} {reason}; nothing was unpacked, do not use this archive")


def _check_space(path: Path, root: Path, size: int) -> None:
    free = shutil.disk_usage(root).free
    if size > free:
        raise RunError(f"{path}: needs {size / 1e9:.1f} GB unpacked, {root} has {free / 1e9:.1f} GB free")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minilora.commands.download", description="Fetch and unpack a public data set."
    )
    parser.add_argument("name", choices=sorted(SETS), help="the data set")
    parser.add_argument("directory", metavar="DIR", help="folder to unpack into; it is made if it is missing")
    parser.add_argument("--mirror", metavar="URL", help=f"base address of a mirror (default: ${MIRROR})")
    options = parser.parse_args(argv)

    def get(_: object) -> int:
        folder = fetch(options.name, options.directory, options.mirror)
        print(f"next: python train.py --recipe {SETS[options.name].recipe} --data-dir {folder}")
        return 0

    return cli.run(get, (UserError,))


if __name__ == "__main__":
    sys.exit(main())
