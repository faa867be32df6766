"""What a run meets beside its own mistakes: another run, dead workers, no picture that can be read, nothing learned."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

from minilora.errors import RunError, UserError
from minilora.settings import exit_codes as cli
from minilora.tasks import lock
from minilora.training import checkpoint
from tests.programs.test_signals import started
from tests.support.cli_data import ROOT
from tests.support.process_lab import fork, join
from tests.support.tiny_tasks import bits, evaluate, run_quickly, train, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def waiting(words):
    """A run that stays in its first step until it is ended."""
    train.Trainer.accumulate = lambda *_: time.sleep(60)
    train.main([str(word) for word in words])


def test_a_second_run_in_a_directory_names_the_first_and_a_killed_one_is_taken_over(tasks, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*tasks["classify"], "--output", run]
    with pytest.MonkeyPatch.context() as patch:
        run_quickly([*words, "--max-steps", "2", "--save-every", "1"], patch)
    (run / "summary.json").unlink()
    child = fork(waiting, ["--resume", run, "--max-steps", "4"])
    until = time.monotonic() + 30
    while (run / "train.log").read_text().count("resumed from") < 1 and time.monotonic() < until:
        time.sleep(0.02)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != "train.log"}
    for second in (["--resume", run, "--max-steps", "4"], words + ["--max-steps", "4"]):
        with pytest.raises(UserError) as caught:
            train.main([str(word) for word in second])
        assert f"process {child[0]} on " in str(caught.value) or "another configuration" in str(caught.value)
        assert "space" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in before}
    capsys.readouterr()
    assert evaluate.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert re.search(rf"run: has not ended, 1 of 8 epochs are done; process {child[0]} on .* trains there now\n", said)
    assert "accuracy" in said and "--resume" not in said
    os.kill(child[0], signal.SIGKILL)
    join(child)
    with pytest.MonkeyPatch.context() as patch:
        run_quickly(["--resume", run, "--max-steps", "4"], patch)
    assert re.search(f"process {child[0]} on .* has left its lock behind; taken over", capsys.readouterr().out)
    assert not (run / lock.FILE).exists()
    assert bits(run)["step"] == "step-4"


@pytest.mark.slow
def test_two_real_programs_at_once(tasks, tmp_path):
    """Both begin in the same moment; one trains, the other says so and ends with 2."""
    words = [*tasks["classify"], "--epochs", "300", "--output", str(tmp_path / "run")]
    both = [
        subprocess.Popen([sys.executable, "train.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    until = time.monotonic() + 60
    while all(process.poll() is None for process in both) and time.monotonic() < until:
        time.sleep(0.1)
    codes = [process.poll() for process in both]
    assert sorted(codes, key=str) == [2, None]
    first, second = both if codes[0] is None else both[::-1]
    assert re.fullmatch(rf"error: .* process {first.pid} on .* trains there now; .*\n", second.stderr.read())
    first.terminate()
    assert first.wait(20) == 143


@pytest.mark.parametrize("place", ["training", "validation"])
def test_a_worker_that_is_killed_costs_nothing(tasks, tmp_path, monkeypatch, place):
    """One line, and the checkpoint of the last step; the run goes on to the bits of one that was not disturbed."""
    from minilora.data import workers

    words = [*tasks["classify"], "--epochs", "2", "--workers", "2"]
    with pytest.MonkeyPatch.context() as patch:
        run_quickly([*words, "--output", tmp_path / "whole"], patch)
    receive, received = workers._receive, []

    def killed(process, pipe):
        received.append(1)
        if len(received) == (4 if place == "training" else 6):
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            pipe.close()
        return receive(process, pipe)

    monkeypatch.setattr(workers, "_receive", killed)
    with pytest.raises(RunError) as caught:
        train.main([*words, "--output", str(tmp_path / "run")])
    at = 3 if place == "training" else 5
    assert re.match(
        rf"epoch 1, step {at + 1} \(last checkpoint .*step-{at}\): a process that reads pictures", str(caught.value)
    )
    assert "was ended (signal 9" in str(caught.value) and "--workers" in str(caught.value)
    monkeypatch.setattr(workers, "_receive", receive)
    run_quickly([*words, "--output", tmp_path / "run"], monkeypatch)
    assert bits(tmp_path / "run") == bits(tmp_path / "whole")


@pytest.mark.slow
def test_a_real_worker_that_is_killed_ends_a_real_program_with_1(tasks, tmp_path):
    words = [
        *tasks["classify"],
        "--epochs",
        "300",
        "--workers",
        "2",
        "--log-interval",
        "1",
        "--output",
        tmp_path / "run",
    ]
    process = started(words, "step 3/")
    while process.poll() is None:  # one that has made all its batches is not missed
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        for child in children[-1:]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
    said = process.stdout.read()
    assert process.wait(20) == 1 and "Traceback" not in said
    assert "was ended (signal 9" in said and checkpoint.latest_checkpoint(tmp_path / "run") is not None


def broken(source, target, parts):
    """The photos with every picture of `parts` cut short."""
    for path in source.rglob("*.png"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes()
        copy.write_bytes(content[:40] if copy.relative_to(target).parts[0] in parts else content)
    return target


def with_data(words, folder):
    words = list(words)
    words[words.index("--data-dir") + 1] = str(folder)
    return words


@pytest.mark.parametrize(("parts", "said"), [
    (("train", "val"), "epoch 1: none of 15 pictures counts: no picture can be read"),
    (("train",), "epoch 1: none of 15 pictures counts"),
    (("val",), "none of the 6 pictures for validation counts: no picture can be read"),
])  # fmt: skip
@pytest.mark.parametrize("more", [[], ["--mode", "linear", "--cache-features"]])
def test_where_no_picture_can_be_read_the_run_says_so(tasks, tmp_path, parts, said, more):
    words = tasks["classify"]
    photos = broken(tmp_path.__class__(words[words.index("--data-dir") + 1]), tmp_path / "photos", parts)
    words = [*with_data(words, photos), *more, "--bad-data", "skip", "--output", str(tmp_path / "run")]
    with pytest.raises(UserError, match=said) as caught:
        train.main(words)
    assert "--bad-data error names the first of them" in str(caught.value) and "--lr" not in str(caught.value)


def test_a_test_part_without_a_readable_picture_does_not_cost_the_run(tasks, tmp_path, monkeypatch, capsys):
    words = tasks["classify"]
    photos = broken(tmp_path.__class__(words[words.index("--data-dir") + 1]), tmp_path / "photos", ())
    for name in ("class_0", "class_1", "class_2"):
        (photos / "test" / name).mkdir(parents=True)
        (photos / "test" / name / "1.png").write_bytes(b"no picture")
    words = [*with_data(words, photos), "--epochs", "1", "--bad-data", "skip", "--output", tmp_path / "run"]
    run_quickly(words, monkeypatch)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("result: ")]
    assert "(val, 6 pictures)" in line and "test" not in line and "nan" not in line


@pytest.mark.parametrize("task", ["classify", "choice", "vqa"])
def test_a_run_that_learned_nothing_says_so_in_one_line(tasks, task, tmp_path, monkeypatch, capsys):
    """A rate far too large; no step to speak of; and not where something was learned. With so much smoothing no random
    head is below the loss of a guess by chance."""
    for name, flags in (("large", ["--lr", "100", "--epochs", "1"]), ("small", ["--lr", "1e-12", "--epochs", "1"])):
        words = [*tasks[task], *flags, "--smoothing", "0.9", "--nan-policy", "skip", "--output", tmp_path / name]
        run_quickly(words, monkeypatch)
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("nothing was learned: ")]
        assert len(lines) == 1 and f"--lr (it was {float(flags[1]):g})" in lines[0], name


def test_a_run_that_learned_something_says_nothing_of_the_kind(tmp_path, monkeypatch, capsys):
    run_quickly(["--subset", "300", "--epochs", "2", "--output", tmp_path / "run"], monkeypatch)
    assert "nothing was learned" not in capsys.readouterr().out


def test_commands_to_type_next_are_quoted(tasks, tmp_path, monkeypatch, capsys):
    run = tmp_path / "a run; of $mine"
    run_quickly([*tasks["classify"], "--max-steps", "1", "--output", run], monkeypatch)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  python evaluate.py")]
    assert len(lines) == 3 and all(shlex.split(line)[2] == str(run) for line in lines)


def test_a_message_that_quotes_megabytes_is_cut(capsys):
    def main(_):
        raise UserError("table.csv: no picture column; the header has " + "x, " * 1_000_000)

    assert cli.run(main, (UserError,)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: table.csv: no picture column") and len(said) < 5000
    assert said.endswith("... (3,000,045 letters)\n")


def test_thousands_of_classes_take_no_gigabytes(tmp_path):
    """What the report holds of 5,000 classes with 20,000 pictures: the pictures of the classes that it shows."""
    import tracemalloc

    import numpy as np

    from minilora.data.pictures.folder import Sample, Split
    from minilora.tasks.classify.run import class_samples

    loaded = []

    class Loading(Split):
        def load(self, i):
            loaded.append(i)
            return Image.new("RGB", (64, 64))

    split = Loading((Sample(f"{i}.png", i % 5000) for i in range(20_000)), tmp_path)
    tracemalloc.start()
    found = class_samples(split, [str(i) for i in range(5000)], np.ones(20_000, bool))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 5000 and len(loaded) == 30 * 4 and peak < 50 << 20
    assert json.dumps(list(found)[:2]) == '["0", "1"]'
