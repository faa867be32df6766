"""Whole training steps on a GPU of shapes alone (support/fake_cuda.py): nothing of the CPU meets what is on the device,
every gradient comes in its parameter's dtype, losses are in float32, and the host waits once per step.
"""

import copy
from pathlib import Path

import pytest
import torch

from minilora.commands.dryrun import describe_plan
from minilora.data.pictures.batch_augment import Finish, draw
from minilora.settings.flags import Config
from minilora.tasks.load import build_task, load_run
from minilora.tasks.method import make_trainable
from minilora.tasks.teacher import Teacher
from minilora.training.trainer import Trainer, TrainOptions
from reference_models import create_model
from tests.support.fake_cuda import CUDA, gpu, possible
from tests.support.families import SEES, small_model

pytestmark = pytest.mark.skipif(not possible(), reason="this torch asks for a driver even for shapes alone")
FIXTURES = Path(__file__).parents[1] / "fixtures"

METHODS = {
    "lora": {},
    "dropout": {"lora_dropout": 0.05, "base_dtype": "amp"},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.05, "base_dtype": "amp"},
    "all layers": {"target_modules": "all-linear", "train_bias": "all", "train_norms": True, "base_dtype": "amp"},
    "checkpointing": {"grad_checkpointing": True, "lora_dropout": 0.05},
    "full": {"mode": "full"},
}


def task_of(amp: str = "bf16", **flags):
    """A task on generated data whose batches are made already: a fake mode has no numbers to draw them from."""
    config = Config(batch_size=4, subset=40, amp=amp, **flags)
    task = build_task(config, CUDA)
    return with_batches(task, list(task.loader("train", task.train_batches(0)[:3], 0)))


def with_batches(task, batches: list[dict]):
    rows = [batch["index"].tolist() for batch in batches]
    task.train_batches = lambda epoch, times=1: rows
    task.train_loader = lambda epoch, numbers: (dict(batches[rows.index(some)]) for some in numbers)
    return task


def watched_steps(task, folder, amp: str = "bf16", steps: int = 2, **options):
    """What a Trainer does on the device in its second step; the first one makes what is made once."""
    options = TrainOptions(epochs=1, amp=amp, log_interval=100, **options)
    with gpu() as watch:
        trainer = Trainer(task, options, folder, CUDA)
        step, seen = trainer.train_step, []

        def train_step(*given):
            watch.waits.clear()
            stop = step(*given)
            seen.append(list(watch.waits))
            return stop

        trainer.train_step = train_step
        trainer.last_step = steps
        trainer.train_one_epoch()
        parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        assert parameters and all(p.grad is not None and p.grad.device == CUDA for p in parameters)
        assert len(trainer.optimizer.state) == len(parameters)
    assert not watch.half_losses
    return seen[-1], watch


@pytest.fixture(scope="module")
def shapes():
    return build_task(Config(batch_size=4, subset=40, smoothing=0.1), CUDA)


def family_step(shapes, family: str, amp: str, method: str, folder) -> list[str]:
    model = small_model(family)
    flags = {key: amp if value == "amp" else value for key, value in METHODS[method].items()}
    if family == "mobilenet" and method != "full":
        flags = {"mode": "linear"}
    config = Config(amp=amp, smoothing=0.1, **flags)
    if config.target_modules is None:
        config.target_modules = ("q_proj", "v_proj")
    make_trainable(model, config, model.head_modules)
    task = copy.copy(shapes)
    task.model, task.config = model, config
    side = model.config.image_size
    batches = [
        {
            "image": torch.zeros(2, 3, side, side),
            "label": torch.zeros(2, dtype=torch.int64),
            "index": torch.arange(2) + 2 * k,
            "valid": torch.ones(2, dtype=torch.bool),
        }
        for k in range(2)
    ]
    return watched_steps(with_batches(task, batches), folder, amp, steps=1)[0]


@pytest.mark.parametrize("amp, flags", [
    ("bf16", {"lora_dropout": 0.05}),
    ("fp16", {"use_dora": True}),
    ("bf16", {"task": "choice"}),
    ("bf16", {"task": "vqa", "num_answers": 20}),
    ("bf16", {"task": "vqa", "num_answers": 20, "soft_targets": True, "model": "student-nano", "mode": "full"}),
], ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value.values())))  # fmt: skip
def test_a_step_of_every_task_waits_for_the_device_once(amp, flags, tmp_path):
    waits, _ = watched_steps(task_of(amp, **flags), tmp_path, amp)
    assert waits == ["tolist"]


@pytest.mark.parametrize("family", SEES)
def test_a_lora_step_of_every_family_stays_on_the_device(shapes, family, tmp_path):
    assert family_step(shapes, family, "bf16", "dropout", tmp_path) == ["tolist"]


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", SEES)
def test_every_method_in_every_precision_stays_on_the_device(shapes, family, method, amp, tmp_path):
    if family == "mobilenet" and method == "checkpointing":
        pytest.skip("a convolutional network has no blocks to recompute")
    assert family_step(shapes, family, amp, method, tmp_path) == ["tolist"]


@pytest.mark.slow
@pytest.mark.parametrize("amp", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["choice", "vqa"])
def test_every_method_of_the_tasks_with_text_waits_once(task, method, amp, tmp_path):
    flags = {key: amp if value == "amp" else value for key, value in METHODS[method].items()}
    waits, _ = watched_steps(task_of(amp, task=task, num_answers=20, **flags), tmp_path, amp)
    assert waits == ["tolist"]


def test_the_teachers_answer_in_its_own_colours_and_size_waits_for_nothing(tmp_path):
    task = task_of(augment="basic")
    run = load_run(FIXTURES / "runs_0.1" / "classify")
    run.preprocess = run.preprocess | {"mean": [0.4] * 3, "image_size": 40}
    run.model = create_model("vit-nano-patch8-48", len(task.labels), image_size=40).eval()
    task.teacher = Teacher(task, run)
    with gpu():
        run.model.to(CUDA)
    run.device = run.predictor.device = CUDA
    waits, _ = watched_steps(task, tmp_path)
    assert waits == ["tolist"]


def test_a_batch_is_augmented_where_it_is_trained_on():
    preprocess = {"image_size": 48, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear"}
    wide = {"image": torch.zeros(3, 3, 56, 56, dtype=torch.uint8), "index": torch.arange(3)}
    drawn = [draw(seed, (60, 60), wide["image"][0], "basic") for seed in range(3)]
    wide |= {"box": torch.stack([item["box"] for item in drawn])}
    with gpu() as watch:
        finish = Finish(preprocess, "basic", CUDA)
        watch.waits.clear()
        image = finish.batch(wide | {"image": wide["image"].pin_memory()})["image"]
        assert (image.shape, image.dtype, image.device) == ((3, 3, 48, 48), torch.float32, CUDA)
    assert not watch.waits


@pytest.mark.parametrize("flags", [
    {"mode": "linear"},
    {"task": "vqa", "num_answers": 20, "target_modules": ("text.q_proj", "text.v_proj")},
    {"task": "choice", "mode": "linear"},
], ids=["classify", "vqa", "choice"])  # fmt: skip
def test_features_are_computed_on_the_device_before_anything_else_is(flags):
    task = build_task(Config(batch_size=4, subset=40, amp="bf16", cache_features=True, **flags), CUDA)
    with gpu():
        lines = describe_plan(task, TrainOptions(epochs=1, amp="bf16"), CUDA)  # what --dry-run does
    assert any(line.startswith("memory: ") for line in lines)
    assert {p.device for p in task.model.parameters()} == {CUDA}


@pytest.mark.parametrize(
    "flags", [{}, {"task": "vqa", "num_answers": 20}, {"task": "choice"}], ids=["classify", "vqa", "choice"]
)
def test_scores_are_computed_from_logits_on_the_device(flags):
    task = task_of(**flags)
    batches = list(task.loader("val", task.eval_batches("val")[:2]))
    task.eval_batches = lambda part: [batch["index"].tolist() for batch in batches]
    task.loader = lambda part, numbers, epoch=None: batches
    with gpu() as watch, torch.no_grad():
        assert 0 <= task.predictions(task.model.to(CUDA).eval(), "val")[0].min()
    assert not watch.half_losses
