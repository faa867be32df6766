"""The lessons run, and what they claim is so: a short form of each here, the whole ones with -m slow."""

import os
import re
import subprocess
import sys

import pytest

from minilora.lessons import cost, layer, loop, merge, rank
from tests.support.layout import ROOT


def test_layer_shows_six_facts_that_hold():
    numbers = [numbers for _, numbers in layer.facts()]
    assert len(numbers) == 6
    assert numbers[0].endswith("= 0") and "W.grad is None" in numbers[2]
    assert "|dL/dA| = 0" in numbers[1] and "|dL/dB| = 0," not in numbers[1]
    assert "|dL/dB| = 0," in numbers[3] and numbers[3].endswith("= 0")
    assert numbers[4].endswith("rank 2")


def test_loop_learns_saves_loads_and_merges(capsys):
    score = loop.main(pictures=240, epochs=2)
    printed = capsys.readouterr().out
    assert score > 30 and "the same logits True" in printed


def test_merge_keeps_W_and_loses_small_steps_in_half_precision():
    found = merge.facts()
    assert found["and W of the unmerged model has moved by"] == 0
    assert found["switched off, they are the base's, up to"] == 0
    assert found["merged, they are the adapter's, up to"] < 1e-4
    assert found["float16, a small update added at once: kept, %"] > 95
    assert found["float16, the same in 100 steps: kept, %"] < 70


def test_cost_counts_fewer_bytes_and_operations_for_lora(capsys):
    table = cost.main("vit-nano-patch8-48", batch=2, times=1)
    full, lora, linear = (table[mode] for mode in ("full", "lora", "linear"))
    assert lora["gradients"] < 0.05 * full["gradients"] and lora["activations"] < full["activations"]
    assert linear["backward"] < 0.01 * lora["backward"] < 0.01 * full["backward"]
    assert abs(full["backward"] / full["forward"] - 2) < 0.1  # two products backward for one forward


def test_rank_bounds_what_a_low_rank_update_can_reach(capsys):
    left, least = rank.full_rank_task(r=4, steps=400)
    assert least - 1e-6 <= left < least + 0.05
    rank.main(pictures=64, epochs=1, ranks=(1, 4), steps=10)
    printed = capsys.readouterr().out
    assert printed.count("LoRA on q, v") == 2 and "everything (full)" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["equation", "layer", "loop", "merge", "cost", "rank", "mistakes"])
def test_a_whole_lesson_prints_plain_text_within_100_columns(name):
    command = [sys.executable, "-m", f"minilora.lessons.{name}"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.isascii() and max(map(len, done.stdout.splitlines())) <= 100


def test_twelve_questions_quote_lines_that_are_there():
    folder = ROOT / "minilora" / "lessons"
    text = (folder / "WHY.md").read_text(encoding="utf-8")
    quotes = re.findall(r"\[[\w.]+\]\((\S+?\.py)\): `([^\n]+)`", text)
    assert len(quotes) == len(re.findall(r"^\d+\. \*\*", text, flags=re.MULTILINE)) == 12
    for file, line in quotes:
        assert line in (folder / file).read_text(encoding="utf-8"), f"{file}: {line}"
