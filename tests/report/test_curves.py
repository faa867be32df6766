"""Learning curves: reading metrics.jsonl, the figure of several runs, and life without matplotlib."""

import builtins
import json
import re

import pytest
import torch
from PIL import Image

from minilora.report.curves import curve, curves_figure, read_metrics
from minilora.report.plots import plain
from minilora.report.spectrum import spectrum, spectrum_figure
from minilora.report.svg import curves_html, ticks


def records(n=4):
    return [
        {"epoch": e, "lr": 1e-3 / e, "train_loss": 2 / e, "val_loss": 3 / e, "accuracy": 1 - 1 / e} for e in range(1, n)
    ]


@pytest.fixture
def no_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(map(json.dumps, records())) + '\n{"epoch": 4, "lr"')
    assert len(read_metrics(path)) == 3 and read_metrics(tmp_path / "none.jsonl") == []


def test_values_that_are_not_finite_or_missing_leave_a_gap():
    points = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": float("nan")}, {"epoch": 3}, {"epoch": 4, "loss": 1}]
    assert curve(points, "loss") == ([1.0, 4.0], [2.0, 1.0])


def test_several_runs_are_drawn_into_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    assert curves_figure({"lora": records(), "full": records(6)}, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 2.5 * picture.height and len(picture.convert("RGB").getcolors(1 << 20)) > 50


def test_without_matplotlib_one_line_is_printed_and_nothing_else_happens(tmp_path, capsys, no_matplotlib):
    assert curves_figure({"lora": records()}, tmp_path / "curves.png") is False
    assert spectrum_figure({"lora": []}, tmp_path / "spectrum.png") is False
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("matplotlib is missing" in line for line in lines) and not list(tmp_path.iterdir())
    assert curves_html({"lora": records()}).count("<svg") == 3  # the page draws its own


@pytest.mark.parametrize("name", [r"run$\foo$", "_hidden", "a\n\x1b[2J\udcff", "$", r"\$x_{1}$", "日本"])
def test_a_name_is_never_a_formula_and_never_left_out(name, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    from matplotlib import cbook

    assert curves_figure({name: records(), "b": records(3)}, tmp_path / "curves.png", {name: 2})
    layers = spectrum([(name, torch.randn(8, 8), torch.randn(8, 2) @ torch.randn(2, 8))])
    assert spectrum_figure({name: layers}, tmp_path / "spectrum.png")
    label = pyplot.subplots()[1].plot([1], [1], label=plain(name))[0].axes.legend().get_texts()
    assert len(label) == 1 and not cbook.is_math_text(label[0].get_text())
    pyplot.close("all")


def test_accuracy_is_drawn_in_percent_and_a_ring_marks_the_best_epoch(tmp_path):
    page = curves_html({"a": records(6), "b": records(5)}, {"a": 3})
    assert "accuracy %</figcaption>" in page and ">80</text>" in page and ">0.8</text>" not in page
    rings = re.findall(r'<circle class="ring c(\d)"', page)
    assert rings == ["0", "0"] and "best epoch" in page  # in loss and accuracy, of run a alone
    assert "best epoch" not in curves_html({"a": records(6)})


def test_ticks_are_round_numbers_within_the_range():
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.3, 7.3) == [0, 2, 4, 6] and ticks(1e-4, 5e-4)[0] == pytest.approx(1e-4)


def test_a_constant_curve_and_a_single_epoch_can_be_drawn():
    assert "NaN" not in curves_html({"one": [{"epoch": 1, "lr": 0.0, "accuracy": 0.5}]})
    assert curves_html({"empty": []}) == ""
