"""Tasks: what each mode trains, to the digit; the loss against its formula; broken pictures; precision."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from minilora.errors import UserError
from minilora.inject import count_parameters, lora_state_dict
from minilora.settings.flags import DEFAULT_LR, Config
from minilora.settings.parse import parse_args
from minilora.tasks import build_task
from minilora.tasks.labelled import Predictions
from minilora.tasks.method import lora_config, make_trainable
from minilora.tasks.precision import choose_amp
from minilora.tasks.weights import load_base
from minilora.training.device import choose_device, to_device
from tests.support.cli_data import QUICK, write_photos

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), test=1)


def task_of(photos, *words):
    return build_task(parse_args([*QUICK, "--data-dir", str(photos), *words])[0])


def trained(words: str) -> tuple[int, int]:
    """(trainable, total) of ViT-tiny with ten classes and these flags."""
    config, _ = parse_args(words.split())
    model, _ = load_base("vit-tiny-patch16-224", "none", 0, 10)
    return tuple(count_parameters(make_trainable(model, config, model.head_modules)))


def test_recipes_imagewoof_train_the_reports_counts_to_the_digit():
    """REPORTS R3: 5,526,346 in full; 177,418 with r=4 on all six layers + norms + head."""
    assert trained("--recipe imagewoof-vit-tiny-full") == (5_526_346, 5_526_346)
    assert trained("--recipe imagewoof-vit-tiny")[0] == 177_418
    assert trained("--lora-r 8")[0] == 75_658
    assert trained("--mode linear") == (1_930, 5_526_346)


def test_ranks_per_tower_become_patterns():
    config = dataclasses.replace(Config(), lora_r={"vision": 4, "text": 16}, task="vqa")
    made = lora_config(config, ("head",))
    assert made.layer_options("vision.blocks.0.attn.q_proj")["r"] == 4
    assert made.layer_options("text.blocks.0.attn.q_proj")["r"] == 16


def test_only_what_the_mode_says_moves(photos):
    for mode, parts in (("lora", (".lora_A.", ".lora_B.", "head.")), ("linear", ("head.",))):
        task = task_of(photos, "--mode", mode)
        names = lora_state_dict(task.model)
        assert names and all(any(part in name or name.startswith(part) for part in parts) for name in names)
    task = task_of(photos, "--mode", "full")
    assert len(lora_state_dict(task.model)) == len(list(task.model.parameters()))


def test_default_learning_rate_depends_on_the_mode(photos):
    for mode, lr in DEFAULT_LR.items():
        config, _ = parse_args(["--mode", mode, "--data-dir", str(photos), "--weights", "none"])
        assert build_task(config).config.lr == lr


def test_loss_is_label_smoothed_cross_entropy(photos):
    """- sum_k t_k log p_k with t = (1 - s) one-hot + s / K, meaned over the batch."""
    task = task_of(photos, "--smoothing", "0.1", "--batch-size", "6")
    batch = next(iter(task.train_loader(0, task.train_batches(0)[:1])))
    task.model.eval()
    loss, stats = task.loss(task.model, batch)
    logits = task.model(batch["image"])
    target = 0.9 * F.one_hot(batch["label"], 3) + 0.1 / 3
    torch.testing.assert_close(loss, -(target * logits.log_softmax(-1)).sum(-1).mean())
    assert stats["count"] == 6 and stats["correct"] == (logits.argmax(-1) == batch["label"]).sum()


def test_a_broken_picture_is_left_out_of_the_loss(photos, tmp_path):
    folder = write_photos(tmp_path / "photos")
    next((folder / "train/class_1").glob("*.png")).write_bytes(b"broken")
    task = task_of(folder, "--bad-data", "skip", "--batch-size", "12")
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    assert batch["valid"].sum() == 11
    task.model.eval()
    loss, stats = task.loss(task.model, batch)
    kept = batch["valid"]
    expected = F.cross_entropy(task.model(batch["image"][kept]), batch["label"][kept])
    torch.testing.assert_close(loss, expected)
    assert stats["count"] == 11


def test_a_batch_of_broken_pictures_alone_gives_a_finite_loss(photos):
    task = task_of(photos)
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    loss, stats = task.loss(task.model, batch | {"valid": torch.zeros_like(batch["valid"])})
    loss.backward()
    assert loss == 0 and stats["count"] == 0


def test_batches_depend_on_seed_and_epoch_alone(photos):
    one, two = task_of(photos), task_of(photos)
    assert one.train_batches(3) == two.train_batches(3) != one.train_batches(4)
    assert task_of(photos, "--seed", "1").train_batches(3) != one.train_batches(3)


def test_describe_names_the_files(photos):
    task = task_of(photos, "--batch-size", "12")
    batch = next(iter(task.train_loader(0, task.train_batches(0))))
    assert task.describe(batch).count(".png") == 8 and task.describe(batch).endswith("and 4 more")


def test_scores_leave_unlabelled_and_broken_rows_out():
    import numpy as np

    probabilities = np.array([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]], dtype=np.float32)
    found = Predictions(probabilities, np.array([0, -1, 0]), np.array([True, True, False]))
    assert found.scores() == {"loss": pytest.approx(-np.log(0.75)), "accuracy": 1.0}


def test_half_precision_base_keeps_what_is_trained_in_float32(photos):
    task = task_of(photos, "--base-dtype", "fp16", "--train-norms")
    assert {p.dtype for p in lora_state_dict(task.model).values()} == {torch.float32}
    assert task.model.blocks[0].mlp.fc1.weight.dtype == torch.float16
    assert task.amp == "fp16"


def test_precision_follows_device_and_base():
    assert choose_amp(Config(), CPU) == "fp32"
    assert choose_amp(Config(base_dtype="bf16"), CPU) == "bf16"
    assert choose_amp(Config(amp="fp16"), CPU) == "fp16"
    with pytest.raises(UserError, match="CUDA device"):
        choose_device(f"cuda:{torch.cuda.device_count() + 3}")


def test_gradient_checkpointing_gives_the_same_gradients(photos):
    gradients = []
    for words in ((), ("--grad-checkpointing",)):
        task = task_of(photos, *words)
        batch = next(iter(task.train_loader(0, task.train_batches(0))))
        task.loss(task.model.train(), to_device(batch, CPU))[0].backward()
        gradients.append({n: p.grad for n, p in task.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_checkpoints_head_stays_only_for_the_same_classes(photos, tmp_path):
    from reference_models import create_model, save_pretrained

    torch.manual_seed(5)
    model = create_model("vit-nano-patch8-48", num_classes=3)
    for labels, kept in ((["class_0", "class_1", "class_2"], True), (["a", "b", "c"], False)):
        model.labels = labels
        save_pretrained(model, tmp_path / labels[0])
        task = task_of(photos, "--weights", str(tmp_path / labels[0]))
        assert torch.equal(task.model.head.weight, model.head.weight) == kept
