"""What was typed counts, whatever its value; a run that has ended says so, and can be trained longer."""

import json
import shutil

import pytest
from safetensors.torch import load_file

from minilora.errors import UserError
from minilora.settings.parse import given, parse_args, read_run_config
from minilora.signals import Interrupted
from minilora.tasks.runfiles import ended
from tests.support.tiny_tasks import evaluate, run_quickly, train, write_tasks
from tests.tasks.test_resume import stop_after


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))["classify"]


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A run of two epochs, five steps each, with flags that are not the defaults."""
    run = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--epochs", "2", "--seed", "3", "--augment", "basic", "--use-dora", "--lora-r", "4", "--max-steps", "9"]
    with pytest.MonkeyPatch.context() as patch:
        run_quickly([*words, *flags, "--sched", "constant", "--warmup-ratio", "0", "--output", run], patch)
    return run


def test_flags_are_given_by_being_typed_not_by_their_value():
    config, _ = parse_args(["--epochs", "8", "--no-soft-targets", "--batch-size", "32"])
    assert given(config) == {"epochs", "soft_targets", "batch_size"}
    config, _ = parse_args(["--recipe", "imagewoof-vit-tiny"])
    assert {"recipe", "model", "lora_r"} <= given(config) and "seed" not in given(config)


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--seed", "0"], "--seed 3 there, 0 here"),
        (["--batch-size", "32"], "--batch-size 3 there, 32 here"),
        (["--augment", "none"], "--augment basic there, none here"),
        (["--no-use-dora"], "--use-dora True there, False here"),
        (["--lora-r", "8", "--epochs", "9"], "--lora-r 4 there, 8 here"),
        (["--sched", "cosine"], "--sched constant there, cosine here"),
        (["--epochs", "1"], "--epochs 2 there, 1 here"),
        (["--max-steps", "5"], "--max-steps 9 there, 5 here"),
    ],
)
def test_a_given_flag_that_differs_from_the_runs_is_refused_by_name(finished, flags, named):
    with pytest.raises(UserError, match=named):
        train.main(["--resume", str(finished), *flags])


def test_default_values_that_do_not_fit_the_task_or_mode_are_refused_too(words):
    for flags, told in (
        (["--num-answers", "1000"], "--num-answers does not apply to --task classify"),
        (["--mode", "full", "--lora-r", "8"], "--lora-r has no effect with --mode full"),
        (["--distill-alpha", "0.9"], "--distill-alpha needs --teacher"),
    ):
        with pytest.raises(UserError, match=told):
            parse_args(flags)


def test_an_adapter_of_another_rank_is_refused_for_the_default_rank_too(words, finished, tmp_path):
    adapter = [*map(str, words), "--adapter", str(finished), "--output", str(tmp_path / "run")]
    for flags, told in ((["--lora-r", "8"], "--lora-r 8: the adapter .* has r 4"), (["--no-use-dora"], "--use-dora")):
        with pytest.raises(UserError, match=told):
            train.main([*adapter, *flags])


def test_a_finished_run_says_so_and_how_it_is_trained_longer(finished, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "adapter_model.safetensors").read_bytes()
    run_quickly(["--resume", run, "--seed", "3", "--epochs", "2"], monkeypatch)  # given and equal
    out = capsys.readouterr().out
    assert "this run has ended as planned, after epoch 2 of 2, step 9; --resume RUN with a larger --epochs" in out
    assert "epoch 3" not in out and (run / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("more", [["--epochs", "4", "--max-steps", "19"], ["--epochs", "8", "--max-steps", "0"]])
def test_a_run_trained_longer_is_the_run_that_was_long_from_the_start(words, more, tmp_path, monkeypatch, capsys):
    """With a constant rate the schedule does not depend on the length, so that all bits agree."""
    words = [*words, "--sched", "constant", "--warmup-ratio", "0", "--opt", "sgd", "--lr", "0.01"]
    run_quickly([*words, *more, "--output", tmp_path / "long"], monkeypatch)
    run_quickly([*words, "--epochs", "2", "--max-steps", "10", "--output", tmp_path / "run"], monkeypatch)
    capsys.readouterr()
    run_quickly(["--resume", tmp_path / "run", *more], monkeypatch)
    out = capsys.readouterr().out
    assert f"epoch 3 of {more[1]}, step 10 of" in out and "constant schedule, the next learning rate is 0.01" in out
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "long"))
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    rows = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("run", "long")]
    assert [[json.loads(row)["val_loss"] for row in one] for one in rows][0] == [
        json.loads(row)["val_loss"] for row in rows[1]
    ]
    config, _ = read_run_config(tmp_path / "run")
    assert (config.epochs, config.max_steps) == (int(more[1]), int(more[3]))


def test_a_run_ended_by_early_stop_says_so(words, tmp_path, monkeypatch, capsys):
    flags = ["--epochs", "9", "--early-stop", "1", "--lr", "1e-7", "--head-lr", "1e-7"]
    run_quickly([*words, *flags, "--output", tmp_path / "run"], monkeypatch)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 9
    run_quickly(["--resume", tmp_path / "run", "--epochs", "20"], monkeypatch)
    assert "this run has ended by --early-stop, after epoch" in capsys.readouterr().out


def test_evaluating_a_run_that_has_not_ended_says_so(words, finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(7, patch)
        with pytest.raises(Interrupted):
            run_quickly([*words, "--epochs", "3", "--output", run], patch)
    capsys.readouterr()
    assert evaluate.main([str(run)]) == 0
    told = f"{run}: has not ended, 1 of 3 epochs are done; continue it with: python train.py --resume {run}"
    assert told in capsys.readouterr().out
    # a finished one that is trained longer and interrupted has not ended either, and its old summary does not bar it
    longer = shutil.copytree(finished, tmp_path / "longer")
    with monkeypatch.context() as patch:
        stop_after(16, patch)
        with pytest.raises(Interrupted):
            run_quickly(["--resume", longer, "--epochs", "5", "--max-steps", "25"], patch)
    capsys.readouterr()
    assert evaluate.main([str(longer)]) == 0 and "has not ended, 3 of 5 epochs are done" in capsys.readouterr().out


def test_an_end_is_an_end_of_epochs_of_steps_or_of_patience():
    config, _ = parse_args(["--epochs", "4", "--max-steps", "30", "--early-stop", "2"])
    for summary, is_end in (
        ({}, False),
        ({"final": {"epoch": 3}, "best": {"epoch": 2}, "steps": 20}, False),
        ({"final": {"epoch": 4}, "best": {"epoch": 4}, "steps": 20}, True),
        ({"final": {"epoch": 2}, "best": {"epoch": 2}, "steps": 30}, True),
        ({"final": {"epoch": 3}, "best": {"epoch": 1}, "steps": 20}, True),
        ({"final": {"epoch": "damaged"}}, True),
        ({"weights_sha256": "of an old run"}, True),
    ):
        assert ended(config, summary) == is_end, summary
