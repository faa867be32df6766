"""Few shots: K pictures of each class, the steps they get, the recipe of CLIP-LoRA, the table, mistakes."""

import collections
import math
import statistics

import pytest
import torch

from minilora.commands import shots
from minilora.data.pictures.loader import epoch_order
from minilora.errors import UserError
from minilora.inject import count_parameters, lora_layers
from minilora.settings.parse import parse_args, read_recipe
from minilora.tasks import build_task
from minilora.tasks.method import make_trainable, resolve
from minilora.tasks.runfiles import read_summary
from reference_models import create_model
from tests.commands.test_backbones import in_this_process
from tests.support.choice_data import write_clip
from tests.support.cli_data import write_photos

TINY = ["--weights", "none", "--batch-size", "4", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=6, val=2, test=2)


def task_of(photos, *words):
    return build_task(parse_args([*TINY, "--data-dir", str(photos), *words])[0])


# ---- which pictures, how many steps


def test_k_pictures_of_each_class_are_drawn_by_the_seed(photos):
    drawn = {}
    for seed in (0, 1):
        split = task_of(photos, "--shots", "3", "--seed", str(seed)).data["train"].split
        assert collections.Counter(sample.label for sample in split) == {0: 3, 1: 3, 2: 3}
        drawn[seed] = {sample.path for sample in split}
    assert drawn[0] != drawn[1]
    again = task_of(photos, "--shots", "3").data["train"].split
    assert {sample.path for sample in again} == drawn[0]
    assert len(task_of(photos, "--shots", "3").data["val"]) == 6  # only training pictures are few


@pytest.mark.parametrize(("k", "epochs"), [(1, 2), (2, 3), (6, 4)])
def test_steps_per_shot_gives_k_times_n_steps_in_about_equal_epochs(photos, k, epochs):
    task = task_of(photos, "--shots", str(k), "--steps-per-shot", "20", "--epochs", str(epochs))
    assert task.config.max_steps == 20 * k
    steps, once = len(task.train_batches(0)), math.ceil(3 * k / 4)
    assert 20 * k / epochs <= steps < 20 * k / epochs + once
    counts = collections.Counter(i % (3 * k) for batch in task.train_batches(0) for i in batch)
    assert set(counts.values()) == {steps // once} and len(counts) == 3 * k


def test_every_pass_has_an_order_and_crops_of_its_own(photos):
    task = task_of(photos, "--shots", "2", "--steps-per-shot", "4", "--epochs", "2", "--augment", "basic")
    batches = task.train_batches(0)
    assert len(batches) == 4 and batches[:2] == epoch_order(6, 4, 0, 0)
    passes = [sorted(i % 6 for b in batches[turn : turn + 2] for i in b) for turn in (0, 2)]
    assert passes == [list(range(6))] * 2
    images = {}
    for batch in task.train_loader(0, batches):
        for row, image in zip(batch["index"].tolist(), batch["image"], strict=True):
            images.setdefault(row, []).append(image)
    assert all(len(two) == 2 and not torch.equal(*two) for two in images.values())


def test_cached_features_are_repeated_too(photos):
    task = task_of(photos, "--shots", "2", "--steps-per-shot", "4", "--epochs", "2", "--mode", "linear")
    cached = task_of(
        photos, "--shots", "2", "--steps-per-shot", "4", "--epochs", "2", "--mode", "linear", "--cache-features"
    )
    for plain, kept in zip(*(t.train_loader(0, t.train_batches(0)) for t in (task, cached)), strict=True):
        assert torch.equal(plain["index"], kept["index"])
        logits = [t.predictor.logits(t.model.eval(), b) for t, b in ((task, plain), (cached, kept))]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


# ---- the recipe


def test_the_recipe_is_clip_loras_published_settings():
    """run_utils.py and lora.py of MaxZanella/CLIP-LoRA at 358f0d7."""
    wanted = {
        "lora_r": 2, "lora_alpha": 1, "use_rslora": True, "lora_dropout": 0.25, "lr": 2e-4, "batch_size": 32,
        "target_modules": ("q_proj", "k_proj", "v_proj"), "steps_per_shot": 500, "shots": 16, "opt": "adamw",
        "weight_decay": 1e-2, "sched": "cosine", "warmup_ratio": 0.0, "augment": "basic", "head": "names",
    }  # fmt: skip
    recipe = read_recipe("clip-lora")
    assert {key: recipe[key] for key in wanted} == wanted
    config, _ = parse_args(["--recipe", "clip-lora", "--shots", "4"])
    resolve(config, None)
    assert config.max_steps == 2000
    with torch.device("meta"):
        model = create_model(config.model)
        make_trainable(model, config, ())
    # r (in + out) of q, k, v in 12 blocks of 768 and 12 of 512
    assert count_parameters(model).trainable == 2 * 3 * 12 * (2 * 768 + 2 * 512) == 184_320
    assert {layer.scaling for _, layer in lora_layers(model)} == {1 / math.sqrt(2)}


# ---- the table


def test_the_table_has_mean_and_spread_over_seeds_and_zero_shot_beside_them(photos, tmp_path, monkeypatch, capsys):
    started = in_this_process(monkeypatch)
    clip, out = write_clip(tmp_path / "clip"), tmp_path / "out"
    words = ["--data-dir", str(photos), "--model", str(clip), "--shots", "1", "2", "--seeds", "0", "1"]
    words += ["--epochs", "1", "--workers", "0", "--device", "cpu", "--output", str(out)]
    assert shots.main(words) == 0
    shown = capsys.readouterr().out.splitlines()
    shown = shown[next(i for i, line in enumerate(shown) if line.startswith("head ")) :]
    runs = {k: [read_summary(out / f"names-{k}-{seed}") for seed in (0, 1)] for k in (1, 2)}
    assert shown[0].split() == ["head", "zero-shot", "1", "shot", "2", "shots"]
    for k in (1, 2):
        values = [run["test"]["accuracy"] for run in runs[k]]
        spread = f" ± {100 * statistics.stdev(values):.2f}" * (len(set(values)) > 1)
        assert f"{100 * statistics.fmean(values):.2f}{spread}" in shown[2]
    assert f"{100 * runs[1][0]['zero_shot']['test_accuracy']:.2f}" in shown[2]
    assert (out / "shots.png").stat().st_size > 1000
    assert (out / "table.md").read_text().startswith("| head | zero-shot | 1 shot | 2 shots |")
    assert shots.main(words) == 0 and len(started) == 4  # finished runs are not made again


def test_a_prompt_is_for_the_names_alone(photos, tmp_path):
    words = ["--data-dir", str(photos), "--model", "clip-nano", "--prompt", "a {}", "--output", str(tmp_path / "o")]
    plan, _ = shots.read_plan([*words, "--heads", "names", "linear", "--shots", "1"])
    assert {name: config.prompt for name, config in plan.items()} == {"names-1-0": "a {}", "linear-1-0": None}


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shots", "0"], "--shots must be a whole number at least 1"),
        (["--shots", "2", "--subset", "0.5"], "use one of the two"),
        (["--steps-per-shot", "10"], "it needs --shots K"),
        (["--shots", "2", "--steps-per-shot", "10", "--max-steps", "5"], "use one of the two"),
        (["--task", "choice", "--shots", "2"], "--shots does not apply to --task choice"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(words, told):
    with pytest.raises(UserError) as error:
        parse_args(words)
    assert told in str(error.value)


def test_classes_with_fewer_pictures_than_shots_are_named(photos):
    with pytest.raises(UserError, match="--shots 7: these classes have fewer training pictures: class_0 6, class_1 6"):
        task_of(photos, "--shots", "7")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--shots", "1", "two"], "--shots must be a whole number"),
        (["--shots", "1", "8"], "class_0 6"),
        (["--shots", "1", "1"], "two runs would be called linear-1-0"),
        (["--heads", "words"], "--head must be one of names, linear"),
        (["--seed", "3"], "use --seeds"),
        (["--task", "vqa"], "--task is not for a table of shots"),
    ],
)
def test_a_table_that_cannot_be_made_says_so_before_the_first_run(words, told, photos, tmp_path):
    with pytest.raises(UserError) as error:
        shots.read_plan(["--data-dir", str(photos), "--output", str(tmp_path / "out"), *TINY, *words])
    assert told in str(error.value)


def test_a_table_needs_a_folder(photos):
    with pytest.raises(UserError, match="--output is missing"):
        shots.read_plan(["--data-dir", str(photos)])
