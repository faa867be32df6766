"""Labelled pictures, decoded and resized once: uint8 in safetensors shards.

    python -m minilora.commands.shards photos shards --model vit-tiny-patch16-224 --weights ...
    python train.py --data-dir shards ...     nothing else is read; they name the classes too

    index.json                classes, how the set was made; sha256 and pictures of every shard
    train-00000.safetensors   pixels (P, 3, S, S) uint8, `records`;
                              of training pictures also wide (P, 3, L, L) uint8

`pixels` is what the model's own resizing makes of a picture: evaluation, and training with
--augment none, get the same bits as from the files. `wide` is the whole picture squashed to L x L,
from which --augment basic and rand cut their crops: the same boxes and flips as from the files,
scaled to L x L and rounded there, so that pixels differ by the second resizing (L = 8 / 7 S by
default; with L = 0 crops come from `pixels`).
"""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from minilora.data.pictures.folder import PARTS, Sample, Split, Splits
from minilora.data.pictures.images import BadImage
from minilora.data.pictures.loader import mix
from minilora.data.pictures.transforms import Resize, resampling, to_tensor
from minilora.data.shards.files import ShardSplit, checked_files, damaged, per_shard, read_arrays, write_files


def write_picture_shards(
    directory: str | os.PathLike,
    splits: Splits,
    preprocess: dict,
    wide: int,
    made: dict,
    shard_mb: float = 256,
    bad_data: str = "error",
    log: Callable[[str], None] = print,
) -> dict:
    """Write train, val and test as shards, after an interrupted call the rest; returns the index.

    wide: side L of the second copy of the training pictures, 0 for none. made: what else describes
    the set. A picture that cannot be read raises BadImage, or is left out (bad_data "skip"). Raises
    UserError where `directory` holds shards that were made in another way.
    """
    parts = {name: split for name in PARTS if (split := getattr(splits, name))}
    each = per_shard(shard_mb, 3 * (preprocess["image_size"] ** 2 + wide**2))
    plan = {"preprocess": preprocess, "made": made | {"pictures_per_shard": each, "wide": wide}}
    plan |= {"classes": splits.classes, "keys": splits.keys, "info": splits.info}
    plan["parts"] = {name: len(split) for name, split in parts.items()}

    def packed(name: str, rows: Sequence[int]) -> tuple[dict, list, dict]:
        return pack(parts[name], rows, preprocess, wide if name == "train" else 0, bad_data)

    rows = {name: range(len(split)) for name, split in parts.items()}
    return write_files(Path(directory), "classify", plan, rows, packed, log)


def pack(
    split: Split, rows: Iterable[int], preprocess: dict, wide: int, bad_data: str
) -> tuple[dict[str, Tensor], list[list], dict[str, int]]:
    """The tensors of one shard, what is recorded of each picture, and how much is in it."""
    size, resize, resample = preprocess["image_size"], Resize(preprocess), resampling(preprocess)
    pixels, wides, records = [], [], []
    for i in rows:
        try:
            picture = split.load(i)
        except BadImage:
            if bad_data == "error":
                raise
            continue
        pixels.append(resize(picture))
        if wide:
            wides.append(to_tensor(picture.resize((wide, wide), resample)))
        records.append([*split[i], picture.width, picture.height])
    tensors = {"pixels": stacked(pixels, size)} | ({"wide": stacked(wides, wide)} if wide else {})
    return tensors, records, {"pictures": len(pixels)}


def stacked(pictures: Sequence[Tensor], size: int) -> Tensor:
    """(P, 3, size, size) uint8, also of no picture."""
    return torch.stack(pictures) if pictures else torch.zeros(0, 3, size, size, dtype=torch.uint8)


def read_picture_shards(directory: str | os.PathLike) -> Splits:
    """What `write_picture_shards` wrote; UserError names a shard whose sha256 is not right."""
    folder = Path(directory)
    index, files = checked_files(folder, "classify")
    check_index(index, files, folder)
    parts = {part: read_part(folder, names, index) for part, names in files.items()}
    known = {sample.label for part in parts.values() for sample in part}
    if not known <= set(range(-1, len(index["classes"]))):
        raise damaged(folder, "fewer classes than labels")
    return Splits(*map(parts.get, PARTS), index["classes"], index["keys"], index["info"])


def check_index(index: dict, files: dict[str, list[str]], folder: Path) -> None:
    """UserError where somebody has changed what the index says of the set as a whole."""
    kinds = {"classes": list, "keys": list, "info": dict, "parts": dict, "preprocess": dict, "made": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(index.get(key), kind)]
    if not wrong:
        names = [*index["classes"], *index["keys"]]
        uneven = 2 * len(index["classes"]) != len(names) or not all(isinstance(name, str) for name in names)
        wrong += ["classes"] * uneven + ["parts"] * (set(index["parts"]) != set(files))
        wrong += ["preprocess"] * (not {"image_size", "mean", "std"} <= index["preprocess"].keys())
        wrong += ["made"] * (not isinstance(index["made"].get("wide"), int))
    if wrong:
        raise damaged(folder, ", ".join(wrong))


def read_part(folder: Path, names: Sequence[str], index: dict) -> ShardSplit:
    """A part from its shards; the pixels stay in the files."""
    split = ShardSplit(folder, index)
    for name in names:
        records = read_arrays(folder / name, ("records",))["records"]
        split.add(name, (Sample(*row[:2]) for row in records), (tuple(row[2:]) for row in records))
    return split


class ShardDataset(Dataset):
    """Pictures of shards as they are stored; batch_augment.Finish crops and normalises batches.

    `dataset[i]` is the plain item i: image (3, S, S) uint8, label, index, valid. With augmentation
    `dataset[(epoch, i)]` has an image (3, L, L) or (3, S, S) and what batch_augment.draw says.
    """

    def __init__(self, split: ShardSplit, augment: str = "none", seed: int = 0):
        self.split, self.augment, self.seed = split, augment, seed
        self.wide = bool(split.index["made"]["wide"])
        if augment != "none":
            from minilora.data.pictures.batch_augment import draw  # here: takes a second

            self.draw = draw

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, i = key if isinstance(key, tuple) else (None, key)
        item = {"label": self.split[i].label, "index": i, "valid": True}
        if epoch is None or self.augment == "none":
            return item | {"image": self.split.pixels(i)}
        image = self.split.pixels(i, "wide" if self.wide else "pixels")
        shape = self.split.size(i) if self.wide else (image.shape[-1], image.shape[-2])
        return item | {"image": image} | self.draw(mix(self.seed, epoch, i), shape, image, self.augment)
