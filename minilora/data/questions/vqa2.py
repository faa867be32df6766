"""Questions about pictures in the files of VQA v2: questions json, annotations json, and pictures
found by their id.

A folder may have one of three layouts, with the same json inside (Goyal et al. 2017, visualqa.org):

    official   v2_OpenEnded_mscoco_train2014_questions.json, v2_mscoco_train2014_annotations.json,
               train2014/COCO_train2014_%012d.jpg; the same for val2014 and test2015, also one
               folder deeper
    easy       train_questions.json, train_annotations.json, train/*; the same for val and test
    one pair   questions.json, annotations.json and a folder of pictures, split by --val-split

The picture of image_id 25 is the file whose name ends in the number 25, in a folder of the same
part. Ids repeat between parts, so everything is keyed by (part, id).
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern

from minilora import ticker
from minilora.data.pictures.folder import Sample, Split
from minilora.data.pictures.parts import existing_path, list_pictures, part_of
from minilora.errors import UserError
from minilora.textfiles import DATA, read_json

ID = re.compile(r"(\d+)$")
EXPANSIONS = (
    (re.compile(r"\bwon't\b"), "will not"),
    (re.compile(r"\bcan't\b"), "can not"),
    (re.compile(r"\bshan't\b"), "shall not"),
    (re.compile(r"\blet's\b"), "let us"),
    (re.compile(r"n't\b"), " not"),
    (re.compile(r"'re\b"), " are"),
    (re.compile(r"'ve\b"), " have"),
    (re.compile(r"'ll\b"), " will"),
    (re.compile(r"'d\b"), " would"),
    (re.compile(r"'m\b"), " am"),
    (re.compile(r"'s\b"), " is"),  # what's, it's, and of nouns too: guy's -> guy is
)
# punctuation that does not stand between digits
LOOSE_MARK = re.compile(r"(?<!\d)[^\w\s']|[^\w\s'](?!\d)|_")


@dataclass(frozen=True, slots=True)
class Question:
    """One question. picture: its number in the part; answers: as people typed them, one or ten."""

    question_id: int
    picture: int
    text: str
    answers: tuple[str, ...] = ()
    answer: str = ""  # the most common one, "" where nobody has answered
    answer_type: str | None = None
    question_type: str | None = None
    tokens: bytes | None = None  # from shards: its ids as int32

    def annotation(self) -> dict:
        """The question's entry in an annotations file, as far as scores need it."""
        keys = ("question_id", "answer_type", "question_type")
        return {key: getattr(self, key) for key in keys} | {"answers": [{"answer": a} for a in self.answers]}


@dataclass
class VQAPart:
    """train, val or test; `pictures.load(j)` opens picture j and `pictures[j].path` names it."""

    questions: list[Question]
    pictures: Sequence
    notes: tuple[str, ...] = ()

    @property
    def shown(self) -> list[int]:
        """The numbers of the pictures that have a question, each once, as the questions come."""
        return list(dict.fromkeys(question.picture for question in self.questions))

    @property
    def answered(self) -> bool:
        """Whether every question has answers; a test part has none."""
        return all(question.answers for question in self.questions)

    def only(self, keep: Callable[[int, Question], bool]) -> VQAPart:
        """The same pictures, and the questions for which keep(number, question) is true."""
        return VQAPart([q for i, q in enumerate(self.questions) if keep(i, q)], self.pictures, self.notes)

    def take(self, rows: Sequence[int]) -> VQAPart:
        """The same pictures, and the questions of these numbers."""
        return VQAPart([self.questions[i] for i in rows], self.pictures, self.notes)


def clean_question(text: str) -> str:
    """Lower case, single spaces, contractions written out.

    "What's the guy's  name?" -> "what is the guy is name?"
    """
    text = text.lower().replace("\u2019", "'")
    for pattern, full in EXPANSIONS:
        text = pattern.sub(full, text)
    return " ".join(text.split())


def answer_key(text: str) -> str:
    """What spellings of one answer share: no case, punctuation in numbers only; "T.V." -> "tv"."""
    text = " ".join(text.lower().split())
    bare = LOOSE_MARK.sub(lambda mark: "" if mark[0] == "." else " ", text)
    return " ".join(bare.split()) or text


def find_files(root: Path) -> dict[str, tuple[Path, Path | None]]:
    """{part: (questions file, annotations file or None)}; the part of a single pair is "all"."""
    names = [*root.glob("*.json"), *root.glob("*/*.json")]
    found: dict[str, dict[str, Path]] = {"questions": {}, "annotations": {}}
    for path in sorted(names):
        kind = next((kind for kind in found if path.stem.lower().endswith(kind)), None)
        if kind is None or path.name.startswith((".", "MultipleChoice")):
            continue
        named = part_of(path.stem.lower().removesuffix(kind)) or (
            part_of(path.parent.name) if path.parent != root else None
        )
        part = "test-dev" if "test-dev" in path.name.lower() else named[0] if named else "all"
        if part in found[kind]:
            raise UserError(f"{found[kind][part]} and {path} are both {kind} of {part}; move one of them away")
        found[kind][part] = path
    if not found["questions"]:
        raise UserError(f"{root}: no questions here; looked for *questions.json, as VQA v2 names its files")
    if "test" in found["questions"]:
        found["questions"].pop("test-dev", None)  # a part of test
    pairs = {part: (path, found["annotations"].get(part)) for part, path in found["questions"].items()}
    return {part.removesuffix("-dev"): files for part, files in pairs.items()}


def has_questions(path: str | os.PathLike) -> bool:
    """Whether a folder looks like VQA v2's."""
    root = Path(path)
    return root.is_dir() and any(path for depth in ("", "*/") for path in root.glob(depth + "*questions.json"))


def read_vqa2(data_dir: str | os.PathLike, bad_data: str = "error") -> dict[str, VQAPart]:
    """{part: VQAPart} of a folder in one of the three layouts.

    bad_data "error": a missing picture, an empty question, a question without annotation or an
    annotation without question raise UserError naming file and id. "skip": such questions are left
    out and counted in a note; those of a missing picture stay, and their picture will be grey.
    """
    root = existing_path(data_dir)
    if not root.is_dir():
        raise UserError(f"--data-dir {root}: is a file; VQA v2 needs the folder with questions and pictures")
    names, found = list_pictures(root), find_files(root)
    for part, (questions, answers) in found.items():
        if answers is None and part != "test":
            raise UserError(f"{questions}: its annotations are missing; put the *annotations.json beside it")
    return {part: read_part(root, part, *files, names=names, bad_data=bad_data) for part, files in found.items()}


def read_part(
    root: Path, part: str, questions: Path, annotations: Path | None, names: Sequence[str], bad_data: str
) -> VQAPart:
    """One part of its files; `names` are the pictures that lie below `root`."""
    asked = records(questions, "questions", {"question_id": int, "image_id": int, "question": str})
    known = {} if annotations is None else by_id(annotations)
    faults, kept = Faults(bad_data), []
    for record in ticker.through(asked, f"reading {questions}, questions"):
        number = record["question_id"]
        if not record["question"].strip():
            faults.add(f"{questions}: question {number} is empty", "empty questions")
        elif annotations is not None and number not in known:
            faults.add(f"{annotations}: question {number} has no annotation", "questions without annotation")
        else:
            kept.append(record)
    if annotations is not None and (extra := known.keys() - {record["question_id"] for record in asked}):
        example = f"{questions}: {len(extra)} annotations have no question, such as question_id {min(extra)}"
        faults.add(example, "annotations without question", len(extra))
    files = find_pictures(names, part)
    order = list(dict.fromkeys(record["image_id"] for record in kept))
    pictures = [Sample(picture_path(image, files, part, questions, faults)) for image in order]
    place = {image: j for j, image in enumerate(order)}
    made = [make_question(record, place[record["image_id"]], known) for record in kept]
    if not made:
        raise UserError(f"{questions}: no usable question in this file")
    return VQAPart(made, Split(pictures, root), faults.notes(part))


class Faults:
    """What is wrong with a data set: raised one by one, or counted."""

    def __init__(self, bad_data: str):
        self.bad_data, self.counts = bad_data, Counter()

    def add(self, message: str, what: str, count: int = 1) -> None:
        """Raises UserError with `message`, or counts it under `what`."""
        if self.bad_data == "error":
            raise UserError(f"{message}; correct the files, or use --bad-data skip")
        self.counts[what] += count

    def notes(self, part: str) -> tuple[str, ...]:
        return tuple(f"{part}: {count} {what}" for what, count in self.counts.items())


def make_question(record: dict, picture: int, known: dict[int, dict]) -> Question:
    """A question with what its annotation says."""
    said = known.get(record["question_id"], {})
    answers = tuple(map(intern, said.get("answers", ())))
    common = said.get("multiple_choice_answer") or (Counter(answers).most_common(1)[0][0] if answers else "")
    kinds = (said.get("answer_type"), said.get("question_type"))
    text = clean_question(record["question"])
    return Question(record["question_id"], picture, text, answers or (common,) * bool(common), common, *kinds)


def find_pictures(names: Sequence[str], part: str) -> dict[int, list[str]]:
    """{image id: files whose names end in it}, from the folders of `part` if there are any."""

    def ours(folder: str) -> bool:
        named = part_of(folder)
        return named[0] == part if named else folder.startswith(part)

    mine = [name for name in names if any(map(ours, name.split("/")[:-1]))]
    files: dict[int, list[str]] = {}
    for name in mine or names:
        if match := ID.search(os.path.splitext(os.path.basename(name))[0]):
            files.setdefault(int(match[1]), []).append(name)
    return files


def picture_path(image: int, files: dict[int, list[str]], part: str, questions: Path, faults: Faults) -> str:
    """The file of an image id. A missing one gets the name that it should have."""
    found = files.get(image, [])
    official = [name for name in found if os.path.basename(name).startswith("COCO_")]
    if len(found) > 1 and len(official) != 1:
        raise UserError(f"{questions}: image_id {image} may be {found[0]} or {found[1]}; keep one of them")
    if not found:
        message = f"{questions}: the picture of image_id {image} is missing (no file name ends in {image})"
        faults.add(message, "missing pictures, shown as grey")
        return f"{part}/{image:012d}.jpg"
    return (official or found)[0]


def by_id(path: Path) -> dict[int, dict]:
    """{question_id: annotation} of an annotations file, checked; `answers` are texts, one where it
    has only `answer`."""
    known = {}
    for record in records(path, "annotations", {"question_id": int}):
        number, only = record["question_id"], record.get("answer")
        answers = record.get("answers", [] if only is None else [only])
        listed = answers if isinstance(answers, list) else [None]
        texts = [one.get("answer") if isinstance(one, dict) else one for one in listed]
        common = record.get("multiple_choice_answer", "")
        if not all(isinstance(text, str) for text in (*texts, common)):
            raise UserError(f'{path}: question {number}: answers must be a list of {{"answer": "text"}}')
        if not any(texts) and not common:
            raise UserError(f"{path}: question {number} has no answers")
        known[number] = record | {"answers": texts}
    return known


def records(path: Path, key: str, fields: dict[str, type]) -> list[dict]:
    """The list under `key` of a VQA v2 file: all have `fields`, and no question_id comes twice."""
    data = read_json(path, DATA)
    rows = data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list):
        raise UserError(f'{path}: not a VQA v2 file: no list under "{key}"')
    seen: set[int] = set()
    for place, row in enumerate(rows):
        for field, kind in fields.items():
            value = row.get(field) if isinstance(row, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                wanted = "a whole number" if kind is int else "a text"
                raise UserError(f"{path}: {key}[{place}].{field} must be {wanted}, not {str(value)[:60]!r}")
        if row["question_id"] in seen:
            raise UserError(f"{path}: question_id {row['question_id']} occurs twice ({key}[{place}])")
        seen.add(row["question_id"])
    return rows
