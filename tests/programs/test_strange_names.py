"""Names of files, folders and classes may be anything that a file system takes: a run is made, scored and shown with
them, and none of them acts on the terminal, in a table or on a page."""

import csv
import json
import os
import unicodedata

import pytest

from minilora.data.pictures.tables import read_rows
from minilora.errors import UserError
from minilora.tasks import load_run
from minilora.textfiles import csv_text
from tests.support.cli_data import QUICK, program, write_photos

train, evaluate = program("train"), program("evaluate")
CLASSES = [b"\x1b]0;owned\x07\x1b[2J", b"a\nresult: accuracy 100.00 %", b"caf\xe9 $\\foo$", b'=HYPERLINK("x")',
           "b\u202egpj | <script>".encode()]  # fmt: skip
PICTURES = [b"=cmd.png", b"\xff.png", b"\x1b[2J.png", b"a\nb.png", b"-x,y.png"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = write_photos(tmp_path_factory.mktemp("photos"), train=3, val=2, classes=len(CLASSES))
    for part in ("train", "val"):
        for number, name in enumerate(CLASSES):
            folder = os.fsencode(root / part / f"class_{number}")
            for old, new in zip(sorted(os.listdir(folder)), PICTURES[number:] + PICTURES[:number], strict=False):
                os.rename(folder + b"/" + old, folder + b"/" + new)
            os.rename(folder, os.fsencode(root / part) + b"/" + name)
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / os.fsdecode(b"run\xff $\\foo$\x1b[2J")
    assert train.main([*QUICK, "--data-dir", str(photos), "--output", str(path), "--max-steps", "2"]) == 0
    return path


def acts(text: str) -> set[str]:
    """Characters that are no letters, marks or line ends."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t"}


def test_training_evaluation_and_their_files_hold_no_character_that_acts(run, photos, tmp_path, capsys):
    files = ["--predictions", tmp_path / "p.csv", "--report", tmp_path / "r.html", "--spectrum", "--latency"]
    assert evaluate.main([str(word) for word in [run, *files]]) == 0
    picture = next(path for path in (photos / "val").rglob("*.png") if "\x1b" in path.name)
    assert evaluate.main([str(run), "--image", str(picture)]) == 0
    out = capsys.readouterr().out
    assert not acts(out) and out.count("accuracy 100.00 %") == out.count("result: accuracy 100.00 %")
    assert not [line for line in out.splitlines() if line.startswith("result:")]  # no forged line
    for file in (run / "train.log", run / "README.md", run / "report.html", tmp_path / "r.html"):
        assert not acts(file.read_text(encoding="utf-8")), file.name
    log = (run / "train.log").read_text(encoding="utf-8").splitlines()
    assert len([line for line in log if line.startswith("result:")]) == 1


def test_predictions_hold_no_formula_and_name_the_classes_as_they_are(run, tmp_path):
    assert evaluate.main([str(run), "--predictions", str(tmp_path / "p.csv")]) == 0
    labels = json.loads((run / "labels.json").read_text())["labels"]
    assert labels == sorted(name.replace(b"\xe9", b"%E9").decode() for name in CLASSES)
    with open(tmp_path / "p.csv", newline="", encoding="utf-8") as file:
        assert not [cell for row in csv.reader(file) for cell in row if cell.startswith(("=", "+", "-", "@"))]
    header, rows = read_rows(tmp_path / "p.csv")
    assert all({row[name] for name in header if name.startswith("label")} == {*labels} for _, row in rows)
    names = {row["file"].rpartition("/")[2] for _, row in rows}
    assert names <= {name.replace(b"\xff", b"%FF").decode() for name in PICTURES}


def test_a_table_finds_pictures_by_what_predictions_called_them(run, photos, tmp_path):
    """Predictions of one run are labels for the next, whatever the names."""
    assert evaluate.main([str(run), "--split", "train", "--predictions", str(tmp_path / "guessed.csv")]) == 0
    _, rows = read_rows(tmp_path / "guessed.csv")
    table = [["file", "label"], *([row["file"], "ab"[number % 2]] for number, (_, row) in enumerate(rows))]
    (photos / "guessed.csv").write_text(csv_text(table))
    try:
        words = [
            *QUICK,
            "--data-dir",
            str(photos / "guessed.csv"),
            "--output",
            str(tmp_path / "run"),
            "--max-steps",
            "1",
        ]
        assert train.main(words) == 0
    finally:
        (photos / "guessed.csv").unlink()


def test_a_run_tells_what_it_is_in_one_line(run):
    assert "\n" not in repr(load_run(run)) and "ClassifyRun(" in repr(load_run(run))


def test_a_data_folder_that_is_not_utf8_is_refused_before_training_and_can_be_evaluated(run, photos, tmp_path):
    odd = tmp_path / os.fsdecode(b"\xff")
    odd.symlink_to(photos, target_is_directory=True)
    with pytest.raises(UserError, match="config.toml cannot hold a name that is not UTF-8"):
        train.main([*QUICK, "--data-dir", str(odd), "--output", str(tmp_path / "run")])
    assert evaluate.main([str(run), "--data-dir", str(odd), "--predictions", str(tmp_path / "p.csv")]) == 0


def test_a_link_to_itself_among_the_pictures_is_one_broken_picture(run, photos, tmp_path):
    folder = tmp_path / "loose"
    folder.mkdir()
    (folder / "a.png").write_bytes(next((photos / "val").rglob("*.png")).read_bytes())
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(folder / "pipe.png")
    assert evaluate.main([str(run), "--data-dir", str(folder), "--predictions", str(tmp_path / "p.csv")]) == 0
    _, rows = read_rows(tmp_path / "p.csv")
    assert {row["file"]: bool(row["label"]) for _, row in rows} == {
        "a.png": True, "gone.png": False, "loop.png": False, "pipe.png": False}  # fmt: skip
    with pytest.raises(UserError, match="no such file|is not a file"):
        evaluate.main([str(run), "--data-dir", str(folder), "--bad-data", "error"])
