"""The one door to multiple choice: Visual7W files, csv tables and generated scenes come out as the
same `ChoiceSplits`.

    splits = load_choices("visual7w", "auto", val_split=0.15, seed=41)
    splits.train[0]   # Question(id=0, picture=0, question="Who ...?", choices=(..4..), answer=2)

A picture is shared by its questions, and a split by pictures never divides them.
"""

import os

import numpy as np

from minilora.data.generated.scenes import ScenePictures, ShapesChoice
from minilora.data.pictures.folder import refuse_missing
from minilora.data.pictures.parts import existing_path
from minilora.data.questions.choice_csv import read_choice_tables
from minilora.data.questions.choices import ChoiceSplit, ChoiceSplits, Question
from minilora.data.questions.visual7w import find_visual7w, read_visual7w
from minilora.data.shards.files import is_shards
from minilora.errors import UserError

FORMATS = ("auto", "visual7w", "scpc", "csv", "shapes")
# Pictures of the generated set, two questions each.
SHAPES = {"train": 700, "val": 400, "test": 400}


def load_choices(
    data_dir: str | os.PathLike | None,
    fmt: str = "auto",
    val_split: float = 0.1,
    subset: float = 1.0,
    seed: int = 0,
    check_files: bool = True,
    require_train: bool = True,
) -> ChoiceSplits:
    """The questions of `data_dir` as ChoiceSplits; no data_dir: generated scenes.

    val_split: share of the training pictures held out where the set has no validation part.
    subset: keep a share (at most 1) or a number (above 1) of the training pictures.
    seed: order of the choices where the file does not give one (Visual7W), and the split.
    check_files: refuse a set that names pictures which do not exist (False with --bad-data skip).
    Raises UserError naming file and place.
    """
    if fmt == "shards" or (fmt == "auto" and data_dir is not None and is_shards(data_dir)):
        raise UserError("--task choice trains from its files; shards are for --task classify and vqa")
    if fmt not in FORMATS:
        raise UserError(f"--data-format {fmt} is not for --task choice; choose from {', '.join(FORMATS)}")
    if fmt == "shapes" or (fmt == "auto" and data_dir is None):
        if data_dir is not None:
            raise UserError("--data-format shapes generates its pictures; leave --data-dir out")
        splits = ChoiceSplits(*(_drawn(part, pictures) for part, pictures in SHAPES.items()), "shapes")
    else:
        path = existing_path(data_dir)
        file = find_visual7w(path, required=fmt == "visual7w") if fmt in ("auto", "visual7w") else None
        splits = read_visual7w(file, seed) if file else read_choice_tables(path)
    for part in (splits.train, splits.val, splits.test) if check_files else ():
        if part is not None and not isinstance(part.pictures, ScenePictures):
            paths = map(part.path, range(len(part)))
            refuse_missing(paths, part.pictures.root, "add them, or leave them out with --bad-data skip")
    if splits.train is None:
        if require_train:
            raise UserError(f"{data_dir}: no questions to train on (only val or test)")
        return splits
    if splits.val is None:
        splits.whole = splits.train if splits.test is None else None
        splits.train, splits.val = _hold_out(splits.train, val_split, seed, data_dir, require_train)
    count = len({question.picture for question in splits.train})
    keep = min(max(1, round(subset * count if subset <= 1 else subset)), count)
    if keep < count:
        splits.train, _ = by_picture(splits.train, keep, seed)
    return splits


def _drawn(part: str, pictures: int) -> ChoiceSplit:
    """A part of the generated set, "what color is the star?" with four choices."""
    scenes = ShapesChoice("choice", part, pictures)
    questions = (
        Question(r["question_id"], r["image_id"], r["question"], tuple(r["choices"]), r["answer"], r["type"])
        for r in scenes.questions
    )
    return ChoiceSplit(questions, ScenePictures(scenes, f"shapes/choice/{part}/{{:06d}}.png"))


def by_picture(split: ChoiceSplit, keep: int, seed: int) -> tuple[ChoiceSplit, ChoiceSplit]:
    """(questions about `keep` pictures drawn by `seed`, the others), each in the split's order."""
    pictures = [question.picture for question in split]
    drawn = np.isin(pictures, np.random.default_rng(seed).permutation(np.unique(pictures))[:keep])
    return split.take(np.flatnonzero(drawn)), split.take(np.flatnonzero(~drawn))


def _hold_out(train: ChoiceSplit, val_split: float, seed: int, data_dir, required: bool):
    """(the rest, the held out part); of one picture (train, None), or UserError if `required`."""
    count = len({question.picture for question in train})
    if count < 2 and not required:
        return train, None
    if count < 2:
        raise UserError(f"{data_dir}: all questions are about one picture; none can be held out for validation")
    held, kept = by_picture(train, min(max(1, round(count * val_split)), count - 1), seed)
    return kept, held
