"""From samples to batches: data set, seeded augmentation, order of an epoch, and workers.

Everything random is a function of (seed, epoch, index) alone. A picture is therefore augmented in
the same way by any worker, in any batch, before and after a resume, and loading takes nothing from
the random numbers of the model.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from minilora.data import workers as processes
from minilora.data.pictures.folder import Split
from minilora.data.pictures.images import BadImage
from minilora.data.pictures.transforms import Chain, Normalise, build_transform, to_tensor
from minilora.data.workers import in_workers

CACHE_BYTES = 256 * 2**20  # decoded pictures kept in memory, per process


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several integers: splitmix64's finaliser, folded over them."""
    mask, state = (1 << 64) - 1, 0
    for number in numbers:
        state = (state + (number & mask) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


@contextmanager
def seeded_cpu(seed: int | Tensor):
    """Inside, torch's CPU random numbers start from `seed`, or go on from a state of theirs;
    afterwards the old ones continue.

    torch.random.fork_rng does the same and costs more; torch.manual_seed would also reset the
    GPU's generators.
    """
    state = torch.get_rng_state()
    if isinstance(seed, Tensor):
        torch.set_rng_state(seed.clone())  # torch reads beside the row of a batch
    else:
        torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def epoch_order(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices 0 .. n-1 shuffled by (seed, epoch), in batches; the last may be shorter."""
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    order = torch.randperm(n, generator=generator).tolist()
    return [order[i : i + batch_size] for i in range(0, n, batch_size)]


def in_order(n: int, batch_size: int) -> list[list[int]]:
    """The indices 0 .. n-1 in batches, for evaluation."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]


class Pictures:
    """Decoded pictures of a split by index (BadImage: broken), kept in memory while there is room.

    Workers keep nothing: they end with the epoch, in which they see every picture once.
    """

    def __init__(self, split: Split, cache_bytes: int = CACHE_BYTES):
        self.split, self.room = split, cache_bytes
        self.kept: dict[int, Image.Image] = {}

    def __getitem__(self, i: int) -> Image.Image:
        if i in self.kept:
            return self.kept[i]
        image = self.split.load(i)
        size = 3 * image.width * image.height
        if size <= self.room and not processes.inside:
            self.kept[i], self.room = image, self.room - size
        return image


class PictureTensors(Dataset):
    """The pictures of a split as the model wants them, plain or augmented for an epoch.

    A broken picture raises BadImage (bad_data "error") or is zeros, the mean colour (bad_data
    "skip"). Pictures of shards were resized before they were stored.
    """

    def __init__(
        self, split: Sequence, preprocess: dict, augment: str = "none", seed: int = 0, bad_data: str = "error"
    ):
        self.split, self.pictures, self.seed, self.bad_data = split, Pictures(split), seed, bad_data
        self.size = preprocess["image_size"]
        stored = getattr(split, "prepared", False)
        self.plain = Chain((to_tensor, Normalise(preprocess))) if stored else build_transform(preprocess)
        self.augmented = self.plain if stored and augment == "none" else build_transform(preprocess, augment)

    def __len__(self) -> int:
        return len(self.split)

    def image(self, i: int, epoch: int | None) -> tuple[Tensor, bool]:
        """Picture i as (3, S, S) float32 normalised, and whether it is readable; epoch None: not
        augmented. Of P pictures number p P + i is picture i once more, augmented anew."""
        try:
            picture = self.pictures[i % len(self.pictures.split)]
        except BadImage:
            if self.bad_data == "error":
                raise
            return torch.zeros(3, self.size, self.size), False
        if epoch is None:
            return self.plain(picture), True
        with seeded_cpu(mix(self.seed, epoch, i)):
            return self.augmented(picture), True


class PictureDataset(PictureTensors):
    """Pictures with labels. `dataset[i]` is the plain item i, `dataset[(epoch, i)]` the augmented
    one of that epoch.

    An item: image (3, S, S) float32 normalised, label (a Sample's), index, valid: whether the
    picture is readable, so that rows never shift.
    """

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, i = key if isinstance(key, tuple) else (None, key)
        image, valid = self.image(i, epoch)
        return {"label": self.split[i].label, "index": i, "valid": valid, "image": image}


def collate(items: Sequence[dict]) -> dict:
    """Items -> batch: tensors are stacked, bools and ints become tensors, everything else a list.

    Classification: image (B, 3, S, S) float32, label (B,) int64 (several: (B, K) of 0 and 1), index
    (B,) int64, valid (B,) bool.
    """
    return {key: _column([item[key] for item in items]) for key in items[0]}


def _column(values: list) -> Tensor | list:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.stack(values)
    if isinstance(first, bool | int | float):
        return torch.tensor(values)
    if isinstance(first, bytes):
        return torch.tensor(list(map(list, values)), dtype=torch.int64)
    return values


def make_loader(
    dataset: Dataset,
    batches: Sequence[Sequence],
    workers: int = 0,
    collate_fn: Callable[[Sequence[dict]], dict] = collate,
) -> Iterator[dict]:
    """The collated `batches` (lists of keys of `dataset`) in order, made by `workers` processes (0:
    this one): the same bits for any number of them, and the same errors."""
    make, workers = partial(made, dataset, collate_fn), min(workers, len(batches))
    yield from in_workers(make, [list(batch) for batch in batches], workers) if workers else map(make, batches)


def made(dataset: Dataset, collate_fn: Callable[[Sequence[dict]], dict], batch: Sequence) -> dict:
    """One batch of `make_loader`."""
    return collate_fn([dataset[key] for key in batch])
