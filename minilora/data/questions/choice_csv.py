"""Multiple choice from csv tables with the columns of the SCPC 2025 competition.

    ID,img_path,Question,A,B,C,D,answer          a letter as answer; test.csv has no such column
    TRAIN_000,./train_input_images/TRAIN_000.jpg,"What, if anything, is on the table?",...,B

A folder with train.csv, val.csv, test.csv, or one table, which a `split` column may divide. The
columns A, B, C ... are the choices, 2 to 26 of them; a column `type` gives the type of the
question. Paths are relative to the table.
"""

from pathlib import Path

from minilora.data.pictures.folder import Sample, Split
from minilora.data.pictures.parts import PARTS, part_named
from minilora.data.pictures.tables import contained, find_column, find_tables, located, read_rows
from minilora.data.questions.choices import LETTERS, ChoiceSplit, ChoiceSplits, Question, check_choices
from minilora.errors import UserError

TYPES = ("type", "question_type")


def read_choice_tables(path: Path) -> ChoiceSplits:
    """The questions of the table `path`, or of the tables in the folder `path`.

    Rows without an answer column are a test set (answer -1); a table alone that has one is for
    training. Raises UserError with file and line for whatever is wrong.
    """
    tables = {part: table for part, table in find_tables(path).items() if table.stem.lower() != "sample_submission"}
    if not tables:
        raise UserError(f"{path}: no csv table and no dataset_v7w_telling.json in this folder")
    parts: dict[str, ChoiceSplit] = {}
    for name, table in tables.items():
        questions, own_parts, pictures = read_choices(table)
        if name == "all" and questions[0].answer < 0:
            name = "test"
        elif name in ("train", "val") and questions[0].answer < 0:
            raise UserError(f"{table}: no answer column; without answers there is nothing to learn (test.csv?)")
        for part in dict.fromkeys(own_parts) if name == "all" else [name]:
            rows = (q for q, own in zip(questions, own_parts, strict=True) if name != "all" or own == part)
            parts[part] = ChoiceSplit(rows, pictures)
    return ChoiceSplits(*(parts.get(part) for part in PARTS), "scpc")


def read_choices(table: Path) -> tuple[list[Question], list[str], Split]:
    """(questions in the table's order, the part of each, their pictures) of one csv."""
    header, rows = read_rows(table)
    lower = {name.lower(): name for name in header}
    image, answer = find_column(header, "picture", table, but="id"), lower.get("answer")
    letters = _letters(header, table)
    for name, column in (("ID", lower.get("id")), ("Question", lower.get("question"))):
        if column is None:
            raise UserError(f"{table}: the column {name} is missing; the header has {', '.join(header)}")
    if not rows:
        raise UserError(f"{table}: no rows below the header")
    kind = next((lower[name] for name in TYPES if name in lower), None)
    pictures: dict[str, int] = {}
    lines: dict[str, int] = {}
    questions, parts = [], []
    for line, row in rows:
        where = f"{table}, line {line}"
        key, text = row[lower["id"]], row[lower["question"]]
        if key in lines or not key:
            raise UserError(f"{where}: ID {key!r} " + (f"is already on line {lines[key]}" if key else "is empty"))
        lines[key] = line
        choices = tuple(row[letter] for letter in letters)
        check_choices(choices, where)
        number = pictures.setdefault(contained(row[image], where, table.parent), len(pictures))
        place = _place(row[answer], letters, where) if answer else -1
        questions.append(Question(key, number, text, choices, place, row[kind] if kind else ""))
        parts.append(part_named(row[lower["split"]], where) if "split" in lower else "train")
    return questions, parts, Split(map(Sample, located(pictures, table.parent).values()), table.parent)


def _letters(header: list[str], table: Path) -> str:
    """The choice columns, A to the last one."""
    found = [name for name in header if len(name) == 1 and name in LETTERS]
    letters = LETTERS[: len(found)]
    if sorted(found) != list(letters):
        gap = next(letter for letter in LETTERS if letter not in found)
        raise UserError(f"{table}: there is a column {max(found)} but no column {gap}; choices are A, B, C ...")
    if len(found) < 2 or "AA" in header:
        count = "more than 26 choice columns" if "AA" in header else f"{len(found)} choice column"
        raise UserError(f"{table}: {count}; a question needs 2 to {len(LETTERS)}, named A, B, C ...")
    return letters


def _place(answer: str, letters: str, where: str) -> int:
    place = letters.find(answer.upper()) if len(answer) == 1 else -1
    if place < 0:
        raise UserError(f"{where}: the answer {answer!r} is none of the letters {letters[0]} to {letters[-1]}")
    return place
