"""Questions and pictures, prepared once: uint8 pictures and token ids in safetensors shards.

    python -m minilora.commands.shards vqa_v2 shards --task vqa --model vqa-vit-bert --weights ...
    python train.py --task vqa --data-dir shards ...              nothing but the shards is read

    index.json                how they were made; sha256, pictures and questions of every shard
    train-00000.safetensors   pixels (P, 3, S, S) uint8, tokens and offsets of the questions, and
                              `records`: UTF-8 json
    vocab.txt ...             the tokenizer

A picture and its questions share a shard. Reading maps the files into memory, so that a shuffled
epoch touches only what it needs. With --augment none the batches are those of the source files, bit
for bit; --augment basic and rand crop the stored picture, which is the same only where the source
pictures have the model's size already.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from minilora.data.pictures.folder import Sample
from minilora.data.pictures.images import BadImage
from minilora.data.pictures.transforms import Resize
from minilora.data.questions.vqa2 import Question, VQAPart
from minilora.data.shards.files import ShardSplit, check_geometry, checked_files, per_shard, read_arrays, write_files
from minilora.errors import UserError

FIELDS = ("question_id", "text", "answers", "answer", "answer_type", "question_type")


def write_shards(
    directory: str | os.PathLike,
    parts: dict[str, VQAPart],
    preprocess: dict,
    tokens: Callable[[VQAPart], list[np.ndarray]],
    made: dict,
    shard_mb: float = 256,
    bad_data: str = "error",
    log: Callable[[str], None] = print,
) -> dict:
    """Write the parts as shards, after an interrupted call the rest; returns the index.

    tokens: the ids (int32) of the questions of a part. made: how the set is made (limits, source),
    kept in the index. A picture that cannot be read raises BadImage, or is left out with its
    questions (bad_data "skip"). UserError where `directory` holds shards made in another way.
    """
    each = per_shard(shard_mb, 3 * preprocess["image_size"] ** 2)
    plan = {"preprocess": preprocess, "made": made | {"pictures_per_shard": each}}

    def packed(name: str, pictures: Sequence[int]) -> tuple[dict, dict, dict]:
        return pack(parts[name], pictures, preprocess, tokens, bad_data)

    return write_files(Path(directory), "vqa", plan, {name: part.shown for name, part in parts.items()}, packed, log)


def pack(
    part: VQAPart,
    pictures: Sequence[int],
    preprocess: dict,
    tokens: Callable[[VQAPart], list[np.ndarray]],
    bad_data: str,
) -> tuple[dict[str, torch.Tensor], dict[str, list], dict[str, int]]:
    """The tensors of one shard, its records, and how much is in it."""
    resize, stored = Resize(preprocess), {}
    for j in pictures:
        try:
            stored[j] = resize(part.pictures.load(j))
        except BadImage:
            if bad_data == "error":
                raise
    place, size = {j: k for k, j in enumerate(stored)}, preprocess["image_size"]
    # the questions of each picture together
    rows = sorted((q for q in part.questions if q.picture in place), key=lambda q: place[q.picture])
    ids = tokens(VQAPart(rows, part.pictures))
    records = {
        "pictures": [part.pictures[j].path for j in stored],
        "questions": [[place[q.picture], *(getattr(q, field) for field in FIELDS)] for q in rows],
    }
    flat = np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)
    tensors = {
        "pixels": torch.stack(list(stored.values())) if stored else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        "tokens": torch.from_numpy(flat),
        "offsets": torch.from_numpy(np.cumsum([0, *map(len, ids)]).astype(np.int64)),
    }
    return tensors, records, {"pictures": len(stored), "questions": len(rows)}


def read_shards(directory: str | os.PathLike) -> tuple[dict[str, VQAPart], dict]:
    """({part: VQAPart}, the index); UserError names a shard whose sha256 is not right."""
    folder = Path(directory)
    index, files = checked_files(folder, "vqa")
    return {part: read_part(folder, names, index) for part, names in files.items()}, index


def read_part(folder: Path, names: Sequence[str], index: dict) -> VQAPart:
    """A part from its shards; the pixels stay in the files."""
    pictures, questions = ShardSplit(folder, index), []
    for name in names:
        arrays = read_arrays(folder / name, ("tokens", "offsets", "records"))
        start = len(pictures)
        pictures.add(name, map(Sample, arrays["records"]["pictures"]))
        ends = arrays["offsets"].tolist()
        for k, (picture, number, text, answers, *rest) in enumerate(arrays["records"]["questions"]):
            ids = arrays["tokens"][ends[k] : ends[k + 1]].tobytes()
            questions.append(Question(number, start + picture, text, tuple(answers), *rest, tokens=ids))
    return VQAPart(questions, pictures)


def check_shards(index: dict, preprocess: dict, limit: int, directory: str | os.PathLike) -> None:
    """UserError where the model wants other pictures or texts than the shards hold."""
    check_geometry(index["preprocess"], preprocess, directory)
    if index["made"].get("max_length") != limit:
        raise UserError(
            f"{directory}: the shards hold texts of at most {index['made'].get('max_length')} tokens, not {limit}; "
            "set --max-length to that, or write them again"
        )
