"""The one door to questions about pictures: VQA v2 files, shards and scenes become VQASplits.

Here the parts are cut, by picture, so that none stands on both sides, and answers become classes.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from minilora.data.generated.scenes import WORLDS, ScenePictures, ShapesVQA
from minilora.data.pictures.folder import PARTS
from minilora.data.questions.vqa2 import Question, VQAPart, answer_key, has_questions, read_vqa2
from minilora.data.shards.files import is_shards
from minilora.data.shards.questions import read_shards
from minilora.errors import UserError

FORMATS = ("auto", "vqa2", "shapes", "shards")
SHAPES_PICTURES = {"train": 600, "val": 200}
DEMO = replace(WORLDS["vqa"], most=2)  # one or two shapes in a picture: learned within a minute


@dataclass
class Answers:
    """The classes: `labels` are the answers as given, `keys` what spellings of one answer share."""

    labels: list[str]
    keys: list[str]

    def __post_init__(self):
        self.number = {key: i for i, key in enumerate(self.keys)}

    def of(self, text: str) -> int:
        """The class of an answer, -1 for one that is not in the vocabulary."""
        return self.number.get(answer_key(text), -1)

    def classes(self, questions: Sequence[Question]) -> np.ndarray:
        """(N,) int64: the class of each question's most common answer."""
        return np.array([self.of(q.answer) if q.answer else -1 for q in questions], dtype=np.int64)


@dataclass
class VQASplits:
    """train / val / test (None where there is none); `stored`: how shards say they were made;
    `unlabelled`: more training questions, which only a teacher answers."""

    train: VQAPart | None
    val: VQAPart | None
    test: VQAPart | None
    notes: list[str] = field(default_factory=list)
    stored: dict | None = None
    unlabelled: VQAPart | None = None

    @property
    def parts(self) -> dict[str, VQAPart]:
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}


def load_vqa(
    data_dir: str | os.PathLike | None,
    fmt: str = "auto",
    val_split: float = 0.1,
    subset: float = 1.0,
    seed: int = 0,
    split_by: str = "image",
    bad_data: str = "error",
    require_train: bool = True,
) -> VQASplits:
    """The questions of `data_dir` (None: generated scenes) as VQASplits.

    subset: keep a share (at most 1) or a number (above 1) of the training pictures; drawn first.
    val_split: share held out where the set has no val part: of the pictures (split_by "image"), or
    of the questions ("question": one picture may then stand on both sides). 0 holds nothing out.
    Raises UserError naming folder, file, id or flag.
    """
    if fmt == "auto":
        fmt = "shapes" if data_dir is None else _guess(data_dir)
    if fmt not in FORMATS:
        raise UserError(f"--data-format {fmt} is not for --task vqa; choose from {', '.join(FORMATS)}")
    if (fmt == "shapes") != (data_dir is None):
        wrong = "leave --data-dir out" if data_dir is not None else "--data-dir is missing"
        raise UserError(f"--data-format {fmt}: {wrong}")
    stored = None
    if fmt == "shapes":
        parts = {part: scenes_part(part) for part in SHAPES_PICTURES}
    elif fmt == "vqa2":
        parts = read_vqa2(data_dir, bad_data)
    else:
        parts, stored = read_shards(data_dir)
    splits = VQASplits(parts.get("train", parts.get("all")), parts.get("val"), parts.get("test"), [], stored)
    splits.notes = [note for part in splits.parts.values() for note in part.notes]
    if splits.train is None and require_train:
        raise UserError(f"{data_dir}: no training questions (train_questions.json or its like)")
    if splits.train is not None:
        splits.train = take_subset(splits.train, subset, seed)
        if splits.val is None and val_split:
            splits.train, splits.val = hold_out(splits.train, val_split, seed, split_by)
    return splits


def _guess(data_dir: str | os.PathLike) -> str:
    if is_shards(data_dir):
        return "shards"
    if os.path.exists(data_dir) and not has_questions(data_dir):
        raise UserError(f"--data-dir {data_dir}: neither VQA v2 questions (*questions.json) nor shards are here")
    return "vqa2"


def scenes_part(part: str) -> VQAPart:
    """Generated scenes: a part of the demonstration."""
    scenes = ShapesVQA(DEMO, part, SHAPES_PICTURES[part])
    questions = [
        Question(number, picture, text, (answer,), answer, answer_type, question_type)
        for number, picture, text, answer, question_type, answer_type in (q.values() for q in scenes.questions)
    ]
    return VQAPart(questions, ScenePictures(scenes, f"{DEMO.name}/{part}/{{}}"))


def take_subset(part: VQAPart, subset: float, seed: int) -> VQAPart:
    """A share, or a number, of the pictures with all their questions."""
    shown = part.shown
    wanted = round(subset * len(shown)) if subset <= 1 else min(int(subset), len(shown))
    if wanted >= len(shown):
        return part
    drawn = np.random.default_rng([seed, 1]).permutation(len(shown))[: max(wanted, 1)]
    chosen = {shown[k] for k in drawn}
    return part.only(lambda i, q: q.picture in chosen)


def hold_out(part: VQAPart, val_split: float, seed: int, split_by: str = "image") -> tuple[VQAPart, VQAPart]:
    """(train, val): val_split of the pictures with their questions, or of the questions."""
    whole = part.shown if split_by == "image" else range(len(part.questions))
    if len(whole) < 2:
        raise UserError(f"one {split_by} alone cannot be split into train and val; give more data")
    held = min(max(1, round(val_split * len(whole))), len(whole) - 1)
    drawn = {whole[k] for k in np.random.default_rng([seed, 2]).permutation(len(whole))[:held]}

    def in_val(i: int, question: Question) -> bool:
        return (question.picture if split_by == "image" else i) in drawn

    return part.only(lambda i, q: not in_val(i, q)), part.only(in_val)


def choose_answers(questions: Sequence[Question], number: int) -> Answers:
    """The `number` most frequent answers in alphabetical order, spellings of one together."""
    counts: Counter = Counter()
    spellings: dict[str, Counter] = defaultdict(Counter)
    for question in questions:
        if question.answer:
            key = answer_key(question.answer)
            counts[key] += 1
            spellings[key][" ".join(question.answer.lower().split())] += 1
    if len(counts) < 2:
        raise UserError(f"the training questions have {len(counts)} different answers; a model needs two to choose")
    text = {key: min(forms, key=lambda form: (-forms[form], form)) for key, forms in spellings.items()}
    top = sorted(counts, key=lambda key: (-counts[key], text[key]))[:number]
    keys = sorted(top, key=lambda key: (text[key], key))
    return Answers([text[key] for key in keys], keys)


def question_only_guess(train: Sequence[Question], asked: Sequence[Question]) -> dict[int, str]:
    """{question_id: answer} without a look at any picture: the most frequent answer in training to
    the same words, or where they were never asked, of all; of equals the first."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for question in train:
        seen[question.text][question.answer] += 1
    usual = Counter(question.answer for question in train).most_common(1)[0][0]
    best = {text: counts.most_common(1)[0][0] for text, counts in seen.items()}
    return {question.question_id: best.get(question.text, usual) for question in asked}
