"""The names that commands had in version 0.1: one line with the new one, and nothing of the house is imported."""

import subprocess
import sys

import pytest

from tests.support.cli_data import ROOT

MOVED = {
    "minilora.pretrain": "pretrain",
    "minilora.data.shards": "shards",
    "minilora.data.download": "download",
    "minilora.tasks.backbones": "backbones",
}


@pytest.mark.parametrize("old", MOVED)
def test_an_old_command_names_the_new_one_and_exits_with_2(old):
    """With -v Python lists what it imports: the packages above the name are there, and they import nothing."""
    done = subprocess.run([sys.executable, "-v", "-m", old, "x"], cwd=ROOT, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and done.stdout == ""
    assert said == [f"error: {old} is now: python -m minilora.commands.{MOVED[old]}"]
    loaded = {line.split("'")[1] for line in done.stderr.splitlines() if line.startswith("import 'minilora")}
    parents = {old.rsplit(".", n)[0] for n in range(old.count(".") + 1)}
    assert loaded - parents <= {"minilora.version"} and "import 'torch'" not in done.stderr
