"""Questions and pictures, prepared once: uint8 pictures of the model's size and token ids in safetensors shards.

    python -m minilora.data.shards vqa_v2 shards --model vision=vit-base-patch16-224 text=bert-base --weights ...
    python train.py --task vqa --data-dir shards ...                  nothing but the shards is read

    index.json                how they were made; of every shard its file, sha256, pictures and questions
    train-00000.safetensors   pixels (P, 3, S, S) uint8, tokens and offsets of the questions, and `records`: UTF-8 json
    vocab.txt ...             the tokenizer

A picture and its questions share a shard. Reading maps the files into memory, so that a shuffled epoch touches only
what it needs. With --augment none the batches are those of the source files, bit for bit; --augment basic and rand
crop the stored picture, which is the same only where the source pictures have the model's size already.
index.json is written anew after every shard: an interrupted run goes on where it was, and an incomplete set is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from minilora.atomic import write_json, write_safetensors
from minilora.data.folder import Sample
from minilora.data.images import BadImage
from minilora.data.transforms import to_uint8
from minilora.data.vqa2 import Question, VQAPart
from minilora.errors import UserError

INDEX, FORMAT = "index.json", "minilora-shards-1"
GEOMETRY = ("image_size", "resize", "resize_to", "interpolation")  # what stored pictures depend on
FIELDS = ("question_id", "text", "answers", "answer", "answer_type", "question_type")


def is_shards(path: str | os.PathLike) -> bool:
    """Whether a folder holds shards."""
    return (Path(path) / INDEX).is_file()


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
    """Write the parts as shards; returns the index. What an interrupted call with the same arguments wrote is kept.

    tokens: the ids (int32) of the questions of a part. made: how the set is made (limits, source), kept in the index.
    A picture that cannot be read raises BadImage, or is left out with its questions (bad_data "skip").
    Raises UserError where `directory` holds shards that were made in another way.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    each = max(1, int(shard_mb * 2**20) // (3 * preprocess["image_size"] ** 2))
    plan = {"format": FORMAT, "preprocess": preprocess, "made": made | {"pictures_per_shard": each}}
    index = started(folder, plan)
    for name, part in parts.items():
        for number, (pictures, questions) in enumerate(chunks(part, each)):
            file = f"{name}-{number:05d}.safetensors"
            old = index["shards"].get(file)
            if old and (folder / file).is_file() and file_sha256(folder / file) == old["sha256"]:
                continue
            tensors, counts = pack(part, pictures, questions, preprocess, tokens, bad_data)
            write_safetensors(folder / file, tensors)
            index["shards"][file] = {"part": name, **counts, "sha256": file_sha256(folder / file)}
            write_json(folder / INDEX, index)
            log(f"wrote {file}: {counts['pictures']} pictures, {counts['questions']} questions")
    index["complete"] = True
    write_json(folder / INDEX, index)
    return index


def started(folder: Path, plan: dict) -> dict:
    """The index to go on with: a fresh one, or that of an interrupted call with the same plan."""
    if not (folder / INDEX).is_file():
        return plan | {"complete": False, "shards": {}}
    index = read_index(folder)
    if differing := [key for key in plan if json.loads(json.dumps(plan[key])) != index.get(key)]:
        raise UserError(
            f"{folder} holds shards made in another way ({', '.join(differing)}); use an empty folder"
        )
    return index | {"complete": False}


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
        "pixels": torch.stack(list(stored.values()))
        if stored
        else torch.zeros(0, 3, size, size, dtype=torch.uint8),
        "tokens": torch.from_numpy(flat),
        "offsets": torch.from_numpy(np.cumsum([0, *map(len, ids)]).astype(np.int64)),
        "records": torch.frombuffer(bytearray(json.dumps(records).encode()), dtype=torch.uint8),
    }
    return tensors, {"pictures": len(stored), "questions": len(rows)}


def file_sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_index(folder: Path) -> dict:
    """index.json, checked."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        known = index["format"] == FORMAT and isinstance(index["shards"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / INDEX}: damaged ({error}); write the shards again") from None
    if not known:
        raise UserError(f"{folder / INDEX}: not an index of {FORMAT}")
    return index


def read_shards(directory: str | os.PathLike) -> tuple[dict[str, VQAPart], dict]:
    """({part: VQAPart}, the index). Every shard is checked against its sha256; UserError names a damaged one."""
    folder = Path(directory)
    index = read_index(folder)
    if not index.get("complete"):
        raise UserError(
            f"{folder}: the shards are incomplete; run the command that writes them again, it goes on"
        )
    files: dict[str, list[str]] = {}
    for file, entry in index["shards"].items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path}: this shard is missing; write the shards again, the others are kept")
        if file_sha256(path) != entry["sha256"]:
            raise UserError(
                f"{path}: this shard is damaged; delete it and write the shards again, the others are kept"
            )
        files.setdefault(entry["part"], []).append(file)
    return {part: read_part(folder, names) for part, names in files.items()}, index


def read_part(folder: Path, names: Sequence[str]) -> VQAPart:
    """A part from its shards; the pixels stay in the files."""
    pictures, questions = ShardPictures(folder), []
    for name in names:
        try:
            with safe_open(folder / name, framework="np") as file:
                arrays = {key: file.get_tensor(key) for key in ("tokens", "offsets", "records")}
            records = json.loads(arrays["records"].tobytes())
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{folder / name}: this shard cannot be read ({error})") from None
        start = len(pictures)
        pictures.add(name, records["pictures"])
        ends = arrays["offsets"].tolist()
        for k, (picture, number, text, answers, *rest) in enumerate(records["questions"]):
            ids = arrays["tokens"][ends[k] : ends[k + 1]].tobytes()
            questions.append(Question(number, start + picture, text, tuple(answers), *rest, tokens=ids))
    return VQAPart(questions, pictures)


class ShardPictures:
    """The pictures of several shards by number; `load(j)` copies one picture out of the mapped file."""

    prepared = True  # they have the model's size already

    def __init__(self, folder: Path):
        self.folder, self.paths, self.where = folder, [], []
        self.open: dict[str, object] = {}

    def add(self, name: str, paths: Sequence[str]) -> None:
        self.paths += paths
        self.where += [(name, k) for k in range(len(paths))]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, j: int) -> Sample:
        return Sample(self.paths[j], -1)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"open": {}}  # a worker process maps the files itself

    def load(self, j: int) -> Image.Image:
        name, k = self.where[j]
        if name not in self.open:
            self.open[name] = safe_open(self.folder / name, framework="np").get_slice("pixels")
        return Image.fromarray(np.ascontiguousarray(self.open[name][k].transpose(1, 2, 0)))


def check_shards(index: dict, preprocess: dict, limit: int, directory: str | os.PathLike) -> None:
    """UserError where the model wants other pictures or texts than the shards hold."""
    stored = index["preprocess"]
    for key in GEOMETRY:
        if stored.get(key) != preprocess.get(key):
            raise UserError(
                f"{directory}: the shards hold pictures with {key} {stored.get(key)}, but the model wants "
                f"{preprocess.get(key)}; write them for this model"
            )
    if index["made"].get("max_length") != limit:
        raise UserError(
            f"{directory}: the shards hold texts of at most {index['made'].get('max_length')} tokens, not {limit}; "
            "set --max-length to that, or write them again"
        )


if __name__ == "__main__":
    from minilora.cli import run
    from minilora.tasks.vqa_shards import main
    from reference_models import ModelError

    sys.exit(run(main, (UserError, ModelError)))
