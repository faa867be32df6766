"""minilora/ticker.py: silent in a library, a line every few seconds in a program, a bar on a terminal."""

import io

import pytest

from minilora import ticker
from tests.support.cli_data import program, write_photos


@pytest.fixture
def fast(monkeypatch):
    """Lines after every item; pytest's stderr is no terminal."""
    monkeypatch.setattr(ticker, "visible", True)
    monkeypatch.setattr(ticker, "EVERY", 0.0)


def test_library_calls_are_silent_and_pass_every_item_on(capfd):
    assert list(ticker.through(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


def test_lines_say_how_far_a_loop_is_and_what_is_left(fast, capfd):
    assert list(ticker.through(range(3), "rows")) == [0, 1, 2]
    out, err = capfd.readouterr()
    assert out == "", "stdout belongs to the results"
    assert err.splitlines() == [f"rows: {n} of 3, left 0:00:00 after 0:00:00" for n in (1, 2)]
    list(ticker.through(iter(range(2)), "rows"))
    assert capfd.readouterr().err.splitlines() == [f"rows: {n} after 0:00:00" for n in (1, 2)]


def test_what_ends_soon_says_nothing(monkeypatch, capfd):
    monkeypatch.setattr(ticker, "visible", True)
    assert len(list(ticker.through(range(1000), "rows"))) == 1000
    assert capfd.readouterr().err == ""


def test_only_rank_0_speaks(fast, monkeypatch, capfd):
    monkeypatch.setenv("RANK", "1")
    assert list(ticker.through(range(3), "rows")) == [0, 1, 2]
    assert capfd.readouterr().err == ""


def test_a_terminal_gets_a_bar_and_no_lines(fast, monkeypatch):
    pytest.importorskip("tqdm")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    assert list(ticker.through(range(3), "encoding, batches")) == [0, 1, 2]
    seen = terminal.getvalue()
    assert "encoding, batches:" in seen and "0/3 [" in seen and "\n" not in seen


def test_every_long_part_of_a_run_says_how_far_it_is(fast, tmp_path, capfd):
    """Listing, encoding, validation, final evaluation and spectrum, by the programs themselves."""
    photos = str(write_photos(tmp_path / "photos", train=6, val=6, test=6))
    small = ["--model", "vit-nano-patch8-48", "--data-dir", photos, "--batch-size", "4", "--epochs", "1"]
    train, evaluate = program("train"), program("evaluate")
    assert train.main([*small, "--mode", "linear", "--cache-features", "--output", str(tmp_path / "run")]) == 0
    said = capfd.readouterr().err
    for part in ("listing", "encoding train, batches", "val, batches", "test, batches", "evaluation, batches"):
        assert part in said
    assert train.main([*small, "--output", str(tmp_path / "lora")]) == 0
    assert evaluate.main([str(tmp_path / "lora"), "--spectrum"]) == 0
    assert "spectrum, layers" in capfd.readouterr().err
