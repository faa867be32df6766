"""Each of the ten mistakes is an edit of the code as it stands, and turns the test red that it names."""

import os
import shutil
import subprocess
import sys

import pytest

from minilora.lessons import mistakes
from minilora.lessons.mistakes import MISTAKES
from tests.support.layout import ROOT

NAMES = [mistake.name for mistake in MISTAKES]


def pytest_in(folder, address: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", address]
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def edited(folder, mistake=None):
    """A copy of the project, with one mistake in it."""
    for part in ("minilora", "reference_models", "tests"):
        skip = shutil.ignore_patterns("__pycache__", "weights", "results", "fixtures")
        shutil.copytree(ROOT / part, folder / part, ignore=skip)
    for file in ("setup.cfg", "pyproject.toml"):
        shutil.copy(ROOT / file, folder / file)
    if mistake:
        source = (folder / mistake.file).read_text(encoding="utf-8")
        (folder / mistake.file).write_text(source.replace(mistake.old, mistake.new), encoding="utf-8")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_the_edit_fits_the_code_in_one_place_and_names_a_test_that_exists(mistake):
    assert (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.old) == 1
    file, _, test = mistake.test.partition("::")
    assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8")


def test_ten_mistakes_are_printed_whole_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked without a terminal"))
    mistakes.main()
    printed = capsys.readouterr().out
    words = " ".join(printed.split())
    assert len(MISTAKES) == 10 and all(mistake.why in words and mistake.name in words for mistake in MISTAKES)
    assert max(map(len, printed.splitlines())) <= 100


def test_the_reader_on_a_terminal_is_asked_before_each_answer(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda prompt: asked.append(capsys.readouterr().out))
    for stream in ("stdin", "stdout"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True)
    mistakes.main()
    assert len(asked) == 10
    assert all(m.name in before and m.why[:40] not in before for m, before in zip(MISTAKES, asked, strict=True))


@pytest.mark.slow
def test_without_an_edit_the_named_tests_are_green(tmp_path):
    folder = edited(tmp_path)
    for mistake in MISTAKES:
        done = pytest_in(folder, mistake.test)
        assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=NAMES)
def test_the_named_test_turns_red(mistake, tmp_path):
    done = pytest_in(edited(tmp_path, mistake), mistake.test)
    assert done.returncode == 1 and "failed" in done.stdout, done.stdout[-2000:]
