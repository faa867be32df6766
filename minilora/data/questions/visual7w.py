"""Visual7W, telling questions: dataset_v7w_telling.json of github.com/yukezhu/visual7w-toolkit.

    {"images": [{"image_id": 1, "filename": "v7w_1.jpg", "split": "train|val|test", "qa_pairs": [
        {"qa_id": 7, "question": "Who is there?", "answer": "A boy.",
         "multiple_choices": [3 wrong ones], "type": "who"}]}]}

The right answer is not among `multiple_choices`: the candidates are it and those, shuffled by
(seed, qa_id). The toolkit scores the first candidate of its results file by case-insensitive
comparison with the answer.
"""

import random
from pathlib import Path
from typing import Any

from minilora.data.pictures.folder import Sample, Split
from minilora.data.pictures.loader import mix
from minilora.data.pictures.parts import PARTS, part_named
from minilora.data.pictures.tables import contained
from minilora.data.questions.choices import ChoiceSplit, ChoiceSplits, Question, check_choices
from minilora.errors import UserError
from minilora.textfiles import DATA, read_json

FILE = "dataset_v7w_telling.json"


def find_visual7w(path: Path, required: bool = False) -> Path | None:
    """The json file of the set, `path` or in it; where there is none None, or a UserError."""
    file = path / FILE if path.is_dir() else path
    if file.suffix.lower() == ".json" and file.is_file():
        return file
    if required or not (path.is_dir() or path.suffix.lower() in (".csv", ".tsv")):
        raise UserError(f"--data-dir {path}: expected a folder with {FILE} (or that file), or csv tables")
    return None


def read_visual7w(file: Path, seed: int = 0) -> ChoiceSplits:
    """The questions of a Visual7W file by its own splits; pictures below images/ or beside it.

    Raises UserError for a file of another kind, a missing key, a qa_id that stands twice, a picture
    outside the folder, or fewer than 2 and more than 26 choices.
    """
    data = read_json(file, DATA)
    images = data.get("images") if isinstance(data, dict) else None
    if not isinstance(images, list):
        raise UserError(f"{file}: no list `images`; is this {FILE}?")
    folder = "images/" if (file.parent / "images").is_dir() else ""
    pictures: list[Sample] = []
    rows: dict[str, list[Question]] = {}
    seen: set[int] = set()
    for number, image in enumerate(images):
        where = f"{file}: images[{number}]"
        name, part, pairs = (_get(image, key, where) for key in ("filename", "split", "qa_pairs"))
        part = part_named(str(part), where)
        pictures.append(Sample(folder + contained(str(name), where)))
        for pair in pairs if isinstance(pairs, list) else ():
            question = _question(pair, number, seed, where)
            if question.id in seen:
                raise UserError(f"{where}: qa_id {question.id} stands twice; every question needs its own")
            seen.add(question.id)
            rows.setdefault(part, []).append(question)
    if not rows:
        raise UserError(f"{file}: no questions in it")
    widths = {len(question.choices) for part in rows.values() for question in part}
    if len(widths) > 1:
        raise UserError(f"{file}: questions with {min(widths)} and with {max(widths)} choices; all need the same")
    shared = Split(pictures, file.parent)
    parts = {part: ChoiceSplit(questions, shared) for part, questions in rows.items()}
    return ChoiceSplits(*(parts.get(part) for part in PARTS), "visual7w")


def _get(record: Any, key: str, where: str) -> Any:
    if not isinstance(record, dict) or key not in record:
        raise UserError(f"{where}: the key {key!r} is missing")
    return record[key]


def _question(pair: Any, picture: int, seed: int, where: str) -> Question:
    """One entry of qa_pairs with its candidates shuffled."""
    number = _get(pair, "qa_id", where)
    where = f"{where}, qa_id {number}"
    text, answer, wrong = (_get(pair, key, where) for key in ("question", "answer", "multiple_choices"))
    texts = [text, answer, *wrong] if isinstance(wrong, list) else [None]
    if not isinstance(number, int) or not all(isinstance(one, str) for one in texts):
        raise UserError(
            f"{where}: expected a whole number as qa_id and texts as question, answer and multiple_choices "
            "(pointing questions, whose answers are boxes, are another file)"
        )
    check_choices(texts[1:], where)
    places = list(range(len(texts) - 1))
    random.Random(mix(seed, number)).shuffle(places)
    choices = tuple(texts[1 + place].strip() for place in places)
    return Question(number, picture, text.strip(), choices, places.index(0), str(pair.get("type", "")))


def results(split: ChoiceSplit, ranked: list[list[int]]) -> list[dict]:
    """The toolkit's results; `ranked`: the places of the choices, the most probable first."""
    return [
        {
            "qa_id": question.id,
            "question": question.question,
            "candidates": [{"answer": question.choices[place]} for place in places],
        }
        for question, places in zip(split, ranked, strict=True)
    ]
