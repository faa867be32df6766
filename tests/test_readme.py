"""README.md keeps its promises: its example prints what it says, its commands run, its line counts are right."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from reference_models.load import bundled_weights
from tests.support.cli_data import ROOT, program, write_photos

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "minilora" / "GUIDE.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README + GUIDE, flags=re.DOTALL)
COMMANDS = [line.partition("  #")[0].strip() for kind, text in BLOCKS if kind == "sh" for line in text.splitlines()]
SHARDS = "python -m minilora.commands.shards"
STARTS = ("python train.py", "python evaluate.py", SHARDS)
PAGES = {"README": README, "GUIDE": GUIDE}
DOWNLOADS = ("hf:", "--recipe", "minilm")  # what needs the network is only read by the parser
FEW_STEPS = ["--max-steps", "2", "--subset", "16", "--batch-size", "8"]


def test_the_two_commands_are_there():
    assert "pip install -e '.[plots]' && python train.py" in COMMANDS
    assert "pip install -e '.[test]' && pytest" in COMMANDS


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    pattern = re.search(r'sed -n "(.*?)" README.md', script)[1]
    found = subprocess.run(["sed", "-n", pattern, str(ROOT / "README.md")], capture_output=True, text=True).stdout
    assert found == "pip install -e '.[test]' && pytest\n"


def test_the_example_prints_its_first_line_to_the_letter_and_a_loss_that_falls_as_shown():
    (_, code), (_, printed) = BLOCKS[0], BLOCKS[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == ""
    found, shown = done.stdout.splitlines(), printed.splitlines()
    assert found[0] == shown[0] and len(found) == len(shown) == 4
    losses = [[float(line.split()[-1]) for line in lines[1:]] for lines in (found, shown)]
    assert losses[0] == sorted(losses[0], reverse=True) and losses[0] == pytest.approx(losses[1], abs=0.15)


def test_the_worked_example_is_the_lessons_output():
    done = subprocess.run([sys.executable, "-m", "minilora.lessons.equation"], cwd=ROOT, capture_output=True, text=True)
    shown = [line for line in BLOCKS[2][1].splitlines() if line != "..."]
    assert len(shown) >= 10 and set(shown) <= {line.rstrip() for line in done.stdout.splitlines()}


def test_it_is_short_and_has_two_levels():
    assert len(README.splitlines()) <= 150
    assert re.findall(r"^# (.*)", README, flags=re.MULTILINE)[:3] == ["minilora", "1. Understand LoRA", "2. Use it"]


def test_line_counts_of_the_reading_path_are_right():
    rows = re.findall(r"^\| \[(\S+\.py)\]\(\1\) \| (\d+) \|", README, flags=re.MULTILINE)
    assert len(rows) == 10
    for file, said in rows:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(said)) <= 0.15 * int(said), f"{file} has {lines} lines, README says about {said}"


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_command_in_the_readme_takes_the_flags_it_is_given():
    """Each program by its own flags, and what train.py is given by its parser, values included."""
    from minilora.commands.backbones import Sweep
    from minilora.commands.shards import ShardConfig
    from minilora.commands.shots import FewShots
    from minilora.settings.flags import Config
    from minilora.settings.flags_evaluate import EvalConfig
    from minilora.settings.parse import Parser, parse_args, train_parser

    tables = {"train.py": Config, "evaluate.py": EvalConfig, "minilora.commands.backbones": Sweep}
    tables |= {"minilora.commands.shards": ShardConfig, "minilora.commands.shots": FewShots}
    parsers = {name: Parser(table, name, "", "") for name, table in tables.items()} | {"train.py": train_parser()}
    known = {name: set(parser._option_string_actions) for name, parser in parsers.items()}
    known["minilora.commands.download"] = set()
    known["minilora.commands.demo"] = set()  # argparse of its own: the README gives it a run alone
    checked = 0
    for command in (command for command in COMMANDS if "python " in command or command.startswith("torchrun")):
        words = shlex.split(command)
        name = next((word for word in words if word in known), None)
        assert name, f"{command}: of which program?"
        words = words[words.index(name) + 1 :]
        assert {word for word in words if word.startswith("--")} <= known[name], command
        if name == "train.py" and "--help" not in words:
            parse_args(words)
        checked += 1
    assert checked >= 30


@pytest.fixture
def workplace(tmp_path_factory):
    """A folder as the README's reader has it: pictures and weights under the names that the commands use."""
    if bundled_weights("vit-nano-patch8-48") is None:
        pytest.fail("the bundled nano weights are missing: run python -m minilora.commands.pretrain vit-nano")
    place = tmp_path_factory.mktemp("reader")
    write_photos(place / "photos")
    write_photos(place / "more_photos")
    (place / "new_photos").mkdir()
    for i, picture in enumerate(sorted((place / "photos/val").rglob("*.png"))):
        (place / "new_photos" / f"{i}.png").write_bytes(picture.read_bytes())
    (place / "dog.jpg").write_bytes((place / "new_photos/0.png").read_bytes())
    return place


@pytest.mark.parametrize("page", ["README", pytest.param("GUIDE", marks=pytest.mark.slow)])
def test_the_commands_run_as_they_are_written(page, workplace, monkeypatch, tmp_path):
    """In their order, in one folder, with few steps; `vit-tiny` stands for itself with weights made on the spot."""
    from minilora.commands.shards import main as write_shards
    from reference_models import create_model, save_pretrained

    saved = save_pretrained(create_model("vit-tiny-patch16-224", num_classes=5), tmp_path / "tiny")
    (saved / "model.safetensors").rename(workplace / "deit_tiny.safetensors")
    monkeypatch.chdir(workplace)
    mains = {name: program(name).main for name in ("train", "evaluate")} | {"shards": write_shards}
    ran = 0
    shell = re.findall(r"```sh\n(.*?)```", PAGES[page], flags=re.DOTALL)
    typed = [line.partition("  #")[0].strip() for text in shell for line in text.splitlines()]
    for command in (line for line in typed if line.startswith(STARTS)):
        if any(word in command for word in DOWNLOADS):
            continue
        _, file, *words = shlex.split(command.replace(SHARDS, "python shards"))
        name = Path(file).stem
        if "--help" in words:
            continue
        extra = FEW_STEPS if name == "train" and not {"--resume", "--list-targets"} & set(words) else []
        extra = FEW_STEPS[:2] if "--shots" in words else extra
        assert mains[name]([*words, *extra]) == 0, command
        ran += 1
    assert ran >= {"README": 7, "GUIDE": 12}[page]
