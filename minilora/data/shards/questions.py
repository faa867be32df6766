"""Questions and pictures, prepared once: uint8 pictures of the model's size and token ids in
safetensors shards.

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

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from minilora.data.pictures.images import BadImage
from minilora.data.pictures.transforms import to_uint8
from minilora.data.questions.vqa2 import Question, VQAPart
from minilora.data.shards.files import (
    FORMATS,
    ShardPictures,
    check_geometry,
    checked_files,
    per_shard,
    read_arrays,
    to_records,
    write_files,
)
from minilora.errors import UserError

FORMAT = FORMATS["vqa"]
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
    """Write the parts as shards; returns the index. What an interrupted call with the same
    arguments wrote is kept.

    tokens: the ids (int32) of the questions of a part. made: how the set is made (limits,
    source), kept in the index. A picture that cannot be read raises BadImage, or is left out with
    its questions (bad_data "skip"). Raises UserError where `directory` holds shards that were
    made in another way.
    """
    each = per_shard(shard_mb, 3 * preprocess["image_size"] ** 2)
    plan = {"format": FORMAT, "preprocess": preprocess, "made": made | {"pictures_per_shard": each}}
    shards = [
        (f"{name}-{number:05d}.safetensors", name, partial(pack, part, *chunk, preprocess, tokens, bad_data))
        for name, part in parts.items()
        for number, chunk in enumerate(chunks(part, each))
    ]
    return write_files(Path(directory), plan, shards, log)


def chunks(part: VQAPart, each: int) -> Iterator[tuple[list[int], list[int]]]:
    """(picture numbers, question numbers) of each shard."""
    of_picture: dict[int, list[int]] = {}
    for i, question in enumerate(part.questions):
        of_picture.setdefault(question.picture, []).append(i)
    shown = list(of_picture)
    for start in range(0, len(shown), each):
        pictures = shown[start : start + each]
        yield pictures, [i for j in pictures for i in of_picture[j]]


def pack(
    part: VQAPart,
    pictures: Sequence[int],
    questions: Sequence[int],
    preprocess: dict,
    tokens: Callable[[VQAPart], list[np.ndarray]],
    bad_data: str,
) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    """The tensors of one shard, and how much is in it."""
    resize, stored = to_uint8(preprocess), {}
    for j in pictures:
        try:
            stored[j] = resize(part.pictures.load(j))
        except BadImage:
            if bad_data == "error":
                raise
    rows = [part.questions[i] for i in questions if part.questions[i].picture in stored]
    ids = tokens(VQAPart(rows, part.pictures))
    place = {j: k for k, j in enumerate(stored)}
    records = {
        "pictures": [part.pictures[j].path for j in stored],
        "questions": [[place[q.picture], *(getattr(q, field) for field in FIELDS)] for q in rows],
    }
    size = preprocess["image_size"]
    flat = np.concatenate([np.zeros(0, np.int32), *ids]).astype(np.int32)
    tensors = {
        "pixels": torch.stack(list(stored.values())) if stored else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        "tokens": torch.from_numpy(flat),
        "offsets": torch.from_numpy(np.cumsum([0, *map(len, ids)]).astype(np.int64)),
        "records": to_records(records),
    }
    return tensors, {"pictures": len(stored), "questions": len(rows)}


def read_shards(directory: str | os.PathLike) -> tuple[dict[str, VQAPart], dict]:
    """({part: VQAPart}, the index). Every shard is checked against its sha256; UserError
    names a damaged one."""
    folder = Path(directory)
    index, files = checked_files(folder, FORMAT)
    parts = {part: read_part(folder, names) for part, names in files.items()}
    for part in parts.values():
        part.pictures.index = index
    return parts, index


def read_part(folder: Path, names: Sequence[str]) -> VQAPart:
    """A part from its shards; the pixels stay in the files."""
    pictures, questions = ShardPictures(folder), []
    for name in names:
        arrays = read_arrays(folder / name, ("tokens", "offsets", "records"))
        start = len(pictures)
        pictures.add(name, arrays["records"]["pictures"])
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
