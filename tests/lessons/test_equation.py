"""The worked example: what is worked by hand is what the code computes, in every digit."""

import subprocess
import sys

from minilora.lessons.equation import by_code, by_hand, working


def test_worked_example_by_hand_equals_the_code_digit_by_digit():
    hand, code = by_hand(), by_code()
    assert hand == code
    for name, _, entries in working(hand):  # the printed arithmetic itself gives the printed result
        assert [eval(entry) for entry in entries] == hand[name], name


def test_worked_example_prints_from_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "minilora.lessons.equation"], capture_output=True, text=True, check=True
    )
    assert "agree in every digit" in done.stdout and "DIFFER" not in done.stdout
    assert "0.5*2 + -1*1 + 1.5*1" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100 and not done.stderr
