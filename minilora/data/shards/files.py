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
from copy import copy
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.atomic import file_sha256, write_json, write_safetensors
from minilora.data.pictures.folder import Sample, Split
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
    folder: Path, task: str, plan: dict, pictures: dict[str, Sequence[int]], pack: Callable, log: Callable[[str], None]
) -> dict:
    """Write the `pictures` of each part in shards; returns the index.

    pack(part, some of them): the tensors, `records` and counts of one shard. plan: what the index
    says of the whole set. UserError where `folder` holds shards of another.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index, each = started(folder, task, plan), plan["made"]["pictures_per_shard"]
    for part, start in [(name, k) for name in pictures for k in range(0, len(pictures[name]), each)]:
        file = f"{part}-{start // each:05d}.safetensors"
        old = index["shards"].get(file)
        if old and (folder / file).is_file() and file_sha256(folder / file) == old["sha256"]:
            continue
        tensors, records, counts = pack(part, pictures[part][start : start + each])
        data = torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8)
        write_safetensors(folder / file, tensors | {"records": data})
        index["shards"][file] = {"part": part, **counts, "sha256": file_sha256(folder / file)}
        write_json(folder / INDEX, index)
        log(f"wrote {file}: " + ", ".join(f"{n} {what}" for what, n in counts.items()))
    index["complete"] = True
    write_json(folder / INDEX, index)
    return index


def started(folder: Path, task: str, plan: dict) -> dict:
    """The index to continue: a fresh one, or that of an interrupted call with the same plan."""
    if not is_shards(folder):
        return {"format": FORMATS[task]} | plan | {"complete": False, "shards": {}}
    index = read_index(folder, task)
    if differing := [key for key in plan if json.loads(json.dumps(plan[key])) != index.get(key)]:
        raise UserError(f"{folder} holds shards made in another way ({', '.join(differing)}); use an empty folder")
    return index | {"complete": False}


def read_index(folder: Path, task: str) -> dict:
    """index.json, checked; UserError where it is damaged or of another task."""
    try:
        index = read_json(folder / INDEX)
        found, sound = index["format"], isinstance(index["shards"], dict)
    except (UserError, KeyError, TypeError) as error:
        raise damaged(folder, error) from None
    if found != FORMATS[task] or not sound:
        belongs = next((f"; these shards are for --task {t}" for t, name in FORMATS.items() if name == found), "")
        raise UserError(f"{folder / INDEX}: not an index of {FORMATS[task]}{belongs}")
    return index


def damaged(folder: Path, what: object) -> UserError:
    """The error of an index that somebody has changed."""
    return UserError(f"{folder / INDEX}: damaged ({what}); write the shards again")


def checked_files(folder: Path, task: str) -> tuple[dict, dict[str, list[str]]]:
    """(the index, {part: its files}) of a complete set; UserError where a sha256 is not right."""
    index = read_index(folder, task)
    if not index.get("complete"):
        raise UserError(f"{folder}: the shards are incomplete; run the command that writes them again, it continues")
    files: dict[str, list[str]] = {}
    for file, entry in index["shards"].items():
        path = folder / file
        named = isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("part", "sha256"))
        if not named or Path(file).name != file:
            raise damaged(folder, f"the entry {file!r}")
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing; write the shards again, the others are kept")
        if file_sha256(path) != entry["sha256"]:
            raise UserError(f"{path}: this shard is damaged; delete it and write the shards again, the others are kept")
        files.setdefault(entry["part"], []).append(file)
    return index, files


def read_arrays(path: Path, names: Sequence[str]) -> dict:
    """The named small tensors of a shard as numpy arrays, `records` as the JSON value in it."""
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in names}
        return arrays | {"records": json.loads(arrays["records"].tobytes())}
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path}: this shard cannot be read ({error})") from None


def check_geometry(stored: dict, preprocess: dict, directory: str | os.PathLike) -> None:
    """UserError where the model's `preprocess` makes other pictures than that of the shards."""
    for key in GEOMETRY:
        if stored.get(key) != preprocess.get(key):
            raise UserError(
                f"{directory}: the shards hold pictures with {key} {stored.get(key)}, but the model wants "
                f"{preprocess.get(key)}; write them for this model"
            )


class ShardSplit(Split):
    """A Split whose pictures lie in shards, in the model's size, mapped into memory."""

    prepared = True

    def __init__(self, folder: str | os.PathLike, index: dict):
        super().__init__((), folder)
        self.index, self.where, self.sizes = index, [], []
        self.open: dict[tuple[str, str], object] = {}

    def add(self, file: str, samples: Iterable[Sample], sizes: Iterable[tuple[int, int]] = ()) -> None:
        """The pictures of one more shard."""
        rows = list(samples)
        self.samples += rows
        self.where += [(file, k) for k in range(len(rows))]
        self.sizes += sizes

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open": {}}  # a worker process maps the files itself

    def pixels(self, i: int, tensor: str = "pixels") -> Tensor:
        """(3, H, W) uint8, a copy."""
        file, k = self.where[i]
        if (file, tensor) not in self.open:
            self.open[file, tensor] = safe_open(Path(self.root, file), framework="np").get_slice(tensor)
        return torch.from_numpy(self.open[file, tensor][k])

    def load(self, i: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.pixels(i).numpy().transpose(1, 2, 0)))

    def size(self, i: int) -> tuple[int, int]:
        """(width, height) of the picture before it was resized; only of labelled pictures."""
        return self.sizes[i]

    def take(self, indices: Iterable[int]) -> ShardSplit:
        rows, taken = list(indices), copy(self)
        taken.samples, taken.where = [self.samples[i] for i in rows], [self.where[i] for i in rows]
        taken.sizes = [self.sizes[i] for i in rows]
        return taken
