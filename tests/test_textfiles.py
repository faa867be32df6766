"""Text from strangers: files within limits, names in which nothing acts, cells that are no formulas."""

import csv
import json
import os

import pytest

from minilora.data.pictures.tables import read_rows
from minilora.errors import UserError
from minilora.textfiles import csv_text, printable, read_bytes, read_json, read_text
from reference_models import ModelError
from reference_models.text.textfiles import read_json as read_model_json
from reference_models.text.textfiles import read_text as read_model_text

NAMES = {
    "plain": "plain",
    "two words, one comma": "two words, one comma",
    "a\nb\r\tc": r"a\nb\r\tc",
    "\x1b]0;owned\x07\x1b[2J": r"\x1b]0;owned\x07\x1b[2J",
    "\x9b31m": r"\x9b31m",
    "user\u202egpj.exe": r"user\u202egpj.exe",
    "\u2066a\u2069\u200fb\u2028c": r"\u2066a\u2069\u200fb\u2028c",
    "caf\udce9": r"caf\udce9",
    "zero\0\ufeff": r"zero\x00\ufeff",
    "日本 \u3000 é \u00a0 👩\u200d💻": "日本 \u3000 é \u00a0 👩\u200d💻",
}


@pytest.mark.parametrize("name", NAMES)
def test_what_acts_in_a_name_is_seen_and_what_is_letters_stays(name):
    assert printable(name) == NAMES[name]
    printable(name).encode()


@pytest.mark.parametrize("reader, error", [(read_bytes, UserError), (read_text, UserError), (read_json, UserError),
                                           (read_model_text, ModelError), (read_model_json, ModelError)])  # fmt: skip
def test_pipes_devices_folders_and_endless_files_are_refused_at_once(reader, error, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    with open(tmp_path / "long", "wb") as file:
        file.truncate(1 << 40)  # holes: no byte is on the disk
    for name in ("pipe", "device", "folder", "long", "none"):
        with pytest.raises(error, match=name):
            reader(tmp_path / name)


def test_a_mark_is_left_out_and_a_bad_byte_is_named_by_its_line(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa9"}')
    assert read_json(tmp_path / "x.json") == read_model_json(tmp_path / "x.json") == {"a": "é"}
    (tmp_path / "x.json").write_bytes(b'{"a":\n"\xe9"}')
    with pytest.raises(UserError, match="byte 0xe9 at 7, line 2"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ModelError, match="line 2"):
        read_model_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ['["\\ud800"]', '{"\\uDC00": 1}', '{"a": {"b": ["x\\udbff y"]}}'])
def test_half_a_character_is_refused_and_both_halves_are_one(tmp_path, text):
    (tmp_path / "x.json").write_text(f'{{"k": {text}}}')
    with pytest.raises(UserError, match="half a character"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ModelError, match="half a character"):
        read_model_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text('{"k": "\\ud83d\\ude00", "path": "C:\\\\ud800"}')
    assert read_json(tmp_path / "x.json") == {"k": "\U0001f600", "path": "C:\\ud800"}


FORMULAS = ['=HYPERLINK("http://x","y")', "=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "＝1+1", "'=x", "''=x"]


def test_no_cell_is_a_formula_and_every_cell_reads_back_the_same(tmp_path):
    cells = [*FORMULAS, "-5", "+3.5", "-1e-3", "a,b", 'say "x"', "two\nlines", "a\rb", "'quoted'", "plain", "é", "-"]
    rows = [["file", "label"], *([f"{i}.png", cell] for i, cell in enumerate(cells))]
    (tmp_path / "t.csv").write_bytes(csv_text(rows).encode())
    raw = [row[1] for row in csv.reader(csv_text(rows).splitlines()) if len(row) > 1]
    assert all(cell.startswith("'") for cell in raw if cell.endswith(tuple(FORMULAS)))
    assert [row["label"] for _, row in read_rows(tmp_path / "t.csv")[1]] == cells
    assert {"-5", "+3.5", "-1e-3"} < {*raw}  # numbers stay numbers


def test_without_the_guard_cells_are_what_a_server_takes():
    assert csv_text([["id", "answer"], [7, "=x"], [8, "-1"]], guard=False) == "id,answer\n7,=x\n8,-1\n"


def test_numbers_of_a_table_are_not_touched():
    assert csv_text([[-3, 0.25, "0.250000", None]]) == "-3,0.25,0.250000,None\n"


def test_the_limits_are_those_of_the_kind(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(["x" * 100]))
    assert read_json(tmp_path / "x.json", 200) == ["x" * 100]
    with pytest.raises(UserError, match="at most"):
        read_json(tmp_path / "x.json", 50)
