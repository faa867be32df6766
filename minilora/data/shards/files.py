"""What all shards share: safetensors files and their index, checked; writing that can be resumed.

    index.json                format, how the set was made; part, counts and sha256 of every shard
    train-00000.safetensors   tensors, and `records`: UTF-8 json

index.json is written anew after every shard: interrupted writing is resumed where it was, and an
incomplete set is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.atomic import file_sha256, write_json, write_safetensors
from minilora.data.pictures.folder import Sample
from minilora.errors import UserError
from minilora.textfiles import read_json

INDEX = "index.json"
FORMATS = {"vqa": "minilora-shards-1", "classify": "minilora-pictures-1"}  # of each task
# what stored pictures depend on
GEOMETRY = ("image_size", "resize", "resize_to", "crop", "interpolation")


def is_shards(path: str | os.PathLike) -> bool:
    """Whether a folder holds shards."""
    return (Path(path) / INDEX).is_file()


def per_shard(shard_mb: float, picture_bytes: int) -> int:
    """Pictures in a shard of about shard_mb MiB."""
    return max(1, int(shard_mb * 2**20) // picture_bytes)


def write_files(
    folder: Path,
    plan: dict,
    shards: Iterable[tuple[str, str, Callable[[], tuple[dict[str, Tensor], dict[str, int]]]]],
    log: Callable[[str], None],
) -> dict:
    """Write `shards`, each (file, part, function that makes its tensors and counts);
    returns the index.

    plan: what the index says of the whole set. Raises UserError where `folder` holds shards
    of another plan.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = started(folder, plan)
    for file, part, make in shards:
        old = index["shards"].get(file)
        if old and (folder / file).is_file() and file_sha256(folder / file) == old["sha256"]:
            continue
        tensors, counts = make()
        write_safetensors(folder / file, tensors)
        index["shards"][file] = {"part": part, **counts, "sha256": file_sha256(folder / file)}
        write_json(folder / INDEX, index)
        log(f"wrote {file}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    index["complete"] = True
    write_json(folder / INDEX, index)
    return index


def started(folder: Path, plan: dict) -> dict:
    """The index to continue: a fresh one, or that of an interrupted call with the same plan."""
    if not is_shards(folder):
        return plan | {"complete": False, "shards": {}}
    index = read_index(folder, plan["format"])
    if differing := [key for key in plan if json.loads(json.dumps(plan[key])) != index.get(key)]:
        raise UserError(f"{folder} holds shards made in another way ({', '.join(differing)}); use an empty folder")
    return index | {"complete": False}


def read_index(folder: Path, wanted: str) -> dict:
    """index.json, checked; UserError where it is damaged or of another format than `wanted`."""
    try:
        index = read_json(folder / INDEX)
        found, sound = index["format"], isinstance(index["shards"], dict)
    except (UserError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INDEX}: damaged ({error}); write the shards again") from None
    if found != wanted or not sound:
        belongs = next((f"; these shards are for --task {t}" for t, name in FORMATS.items() if name == found), "")
        raise UserError(f"{folder / INDEX}: not an index of {wanted}{belongs}")
    return index


def checked_files(folder: Path, wanted: str) -> tuple[dict, dict[str, list[str]]]:
    """(the index, {part: its files}) of a complete set whose sha256s are right; UserError
    names a damaged file."""
    index = read_index(folder, wanted)
    if not index.get("complete"):
        raise UserError(f"{folder}: the shards are incomplete; run the command that writes them again, it continues")
    files: dict[str, list[str]] = {}
    for file, entry in index["shards"].items():
        path = folder / file
        named = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("part", "sha256"))
        if not named or Path(file).name != file:
            raise UserError(f"{folder / INDEX}: damaged (the entry {file!r}); write the shards again")
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing; write the shards again, the others are kept")
        if file_sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: this shard is damaged; delete it and write the shards again, the others are kept")
        files.setdefault(entry["part"], []).append(file)
    return index, files


def to_records(value: object) -> Tensor:
    """A JSON value as a tensor of bytes."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def read_arrays(path: Path, names: Sequence[str]) -> dict:
    """The named small tensors of a shard as numpy arrays, `records` as the JSON value in it."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in names}
        return arrays | {"records": json.loads(arrays["records"].tobytes())}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: this shard cannot be read ({error})") from None


def check_geometry(stored: dict, preprocess: dict, directory: str | os.PathLike) -> None:
    """UserError where the model wants other pictures than the shards hold; both are
    `preprocess` dictionaries."""
    for key in GEOMETRY:
        if stored.get(key) != preprocess.get(key):
            raise UserError(
                f"{directory}: the shards hold pictures with {key} {stored.get(key)}, but the model wants "
                f"{preprocess.get(key)}; write them for this model"
            )


class ShardPictures:
    """The pictures of several shards by number; `load(j)` copies one picture out of
    the mapped file."""

    prepared = True  # they have the model's size already

    def __init__(self, folder: Path):
        self.folder, self.paths, self.where = folder, [], []
        self.open: dict[tuple[str, str], object] = {}

    def add(self, name: str, paths: Sequence[str]) -> None:
        self.paths += paths
        self.where += [(name, k) for k in range(len(paths))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, j: int) -> Sample:
        return Sample(self.paths[j], -1)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open": {}}  # a worker process maps the files itself

    def pixels(self, j: int, tensor: str = "pixels") -> np.ndarray:
        """(3, H, W) uint8, a copy."""
        name, k = self.where[j]
        if (name, tensor) not in self.open:
            self.open[name, tensor] = safe_open(self.folder / name, framework="np").get_slice(tensor)
        return self.open[name, tensor][k]

    def load(self, j: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels(j).transpose(1, 2, 0)))
