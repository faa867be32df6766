"""What the tasks share: base weights, what is trained, precision; and what a task has to offer.

A base model becomes a trainable one in two steps: `load_base` (weights) and `make_trainable` (lora,
full or linear).
A Run is the way back: the same base weights and the files of the run directory.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from minilora.adapter import load_adapter
from minilora.atomic import write_json
from minilora.errors import UserError
from minilora.inject import LoRAConfig, cast_frozen, inject_lora, mark_only_lora_as_trainable, merge_lora
from minilora.settings.flags import DEFAULT_LR, DEFAULT_TARGETS, Config
from minilora.settings.values import option
from minilora.speed.gemm import speed_up
from reference_models import load_pretrained
from reference_models.load import bundled_weights, config_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BUNDLED, RANDOM = "bundled", "none"


class Task(Protocol):
    """What the Trainer and train.py ask of a task. Batches are dictionaries, mostly of tensors."""

    model: nn.Module  # ready to train
    mode: str  # lora, full or linear
    metric: str  # the key of evaluate()'s result that chooses the best epoch; larger is better
    config: Config  # with everything filled in that the user left open
    base: dict[str, Any]  # {"weights": ..., "sha256": ...}, for config.toml
    labels: list[str]  # classes or answers
    workers: int  # processes that read pictures
    # None, or with --teacher what `loss` asks for its share: teacher.added(loss,
    # logits, batch, counted)
    teacher: Any

    def train_batches(self, epoch: int, times: int = 1) -> list[list[int]]:
        """The whole epoch as batches of `times` * batch_size item numbers, a function of (seed,
        epoch, size) alone."""

    def train_loader(self, epoch: int, batches: list[list[int]]) -> Iterable[dict]:
        """The collated batches, in this order."""

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """(mean loss, {"correct": right answers, "count": answers})."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """{"loss": ..., metric: ...} on the validation data, with `model` in eval mode."""

    def test(self, model: nn.Module) -> dict[str, float] | None:
        """The same on the test data; None where there are none."""

    def describe(self, batch: dict) -> str:
        """The files in the batch, for messages."""

    def data_lines(self) -> list[str]:
        """How much data there is, one line per part, for the start of the run and for --dry-run."""

    def write_files(self, run_dir: Path) -> None:
        """labels.json, preprocess.json and whatever else `load` needs."""


def choose_device(wanted: str) -> torch.device:
    """--device as a torch.device; auto is the first GPU if there is one."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise UserError(
            f"--device {wanted}: this machine has {found or 'no'} CUDA device{'s' * (found > 1)}; try --device cpu"
        )
    return device


def choose_amp(config: Config, device: torch.device) -> str:
    """The precision of the arithmetic: fp32, bf16 or fp16. Half-precision frozen weights need
    the same autocast."""
    if config.amp == "auto" and config.base_dtype != "fp32":
        return config.base_dtype
    if config.amp == "auto":
        return "fp32" if device.type == "cpu" else "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return config.amp


def autocast(device: torch.device, amp: str) -> contextlib.AbstractContextManager:
    """The precision `amp` as a context."""
    return torch.autocast(device.type, dtype=DTYPES[amp], enabled=amp != "fp32")


def resolve(config: Config, default_model: Any) -> None:
    """Fill in what depends on other flags: the model, its targets, the learning
    rate, absolute paths."""
    config.model = config.model or default_model
    config.target_modules = config.target_modules or DEFAULT_TARGETS[config.task]
    config.lr = config.lr or DEFAULT_LR[config.mode]
    for name in ("data_dir", "adapter", "teacher", "tokenizer"):
        if getattr(config, name):
            setattr(config, name, os.path.abspath(getattr(config, name)))
    if isinstance(config.weights, dict):
        config.weights = {tower: _absolute(path) for tower, path in config.weights.items()}
    else:
        config.weights = _absolute(config.weights)


def _absolute(weights: str | None) -> str | None:
    known = weights is None or weights in (RANDOM, BUNDLED) or weights.startswith("hf:")
    return weights if known else os.path.abspath(weights)


def one_value(config: Config, name: str) -> Any:
    """A flag of a model with one tower; UserError for `vision=A text=B`."""
    value = getattr(config, name)
    if isinstance(value, dict):
        raise UserError(f"{option(name)} names towers, but --task {config.task} has one encoder; give one value")
    return value


def load_base(
    model: str,
    weights: str | None,
    seed: int,
    num_classes: int | None = None,
    image_size: int | None = None,
    **sizes: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """(model, {"weights": ..., "sha256": ...}); what is random in it comes from `seed`.

    The record lets a later session make the same base again, or notice that it cannot.
    """
    source = find_weights(model, weights)
    if num_classes is not None and not os.path.isdir(model) and not hasattr(config_for(model), "num_classes"):
        raise UserError(f"--model {model} tells no classes apart; it is for another --task")
    torch.manual_seed(seed)
    built = load_pretrained(model, source, num_classes=num_classes, image_size=image_size, **sizes)
    patch = getattr(built.config, "patch_size", None)
    if image_size and isinstance(patch, int) and image_size % patch:
        raise UserError(f"--image-size {image_size}: {model} cuts pictures into patches of {patch}; take a multiple")
    if source is None:
        return built, {"weights": RANDOM, "sha256": tensors_sha256(built, without=built.head_modules)}
    bundled = weights in (None, BUNDLED) and not os.path.isdir(model)
    return built, {"weights": BUNDLED if bundled else str(source), "sha256": weights_sha256(source)}


def find_weights(model: str, weights: str | None) -> str | Path | None:
    """Where the weights of `model` are, None for random ones; UserError where nobody said and
    none are bundled."""
    if weights == RANDOM:
        return None
    if weights not in (None, BUNDLED):
        return weights
    if os.path.isdir(model):
        return os.path.abspath(model)
    if (source := bundled_weights(model)) is None:
        config_for(model)  # a name that does not exist is the first thing to say
        raise UserError(
            f"--weights is missing, and {model} is not bundled: give a safetensors file, a folder, hf:org/name, or "
            "none for random weights"
        )
    return source


def weights_sha256(source: str | Path) -> str:
    """sha256 of a weight file, or of the sha256s of the weight files in a folder."""
    if str(source).startswith("hf:"):
        from reference_models.files.hub import resolve as download

        source = download(str(source))
    path = Path(source)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    digests = []
    for file in files:
        with open(file, "rb") as stream:
            digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tensors_sha256(model: nn.Module, without: tuple[str, ...]) -> str:
    """sha256 of the model's tensors, those of the modules `without` left out."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.partition(".")[0] not in without:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_base(found: dict[str, Any], recorded: dict[str, Any], run_dir: Path) -> None:
    """UserError if the base weights are not those that the run was trained on."""
    if recorded.get("sha256") not in (None, found["sha256"]):
        what = "random weights come out differently here" if found["weights"] == RANDOM else "their sha256 differs"
        raise UserError(
            f"{run_dir}: the base weights {found['weights']} are not those of the training ({what}); name the right "
            "ones with --weights"
        )


def lora_config(config: Config, heads: tuple[str, ...]) -> LoRAConfig:
    """The flags of the method as a LoRAConfig. Per-tower ranks become patterns; linear mode
    adapts no layer."""
    patterns = {}
    for name, pattern in (("lora_r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        value = getattr(config, name)
        if isinstance(value, dict):
            patterns[pattern] = {rf"{tower}\..*": one for tower, one in value.items()}
    if config.mode == "linear":
        return LoRAConfig(target_modules=(), modules_to_save=heads)
    return LoRAConfig(
        r=Config.lora_r if isinstance(config.lora_r, dict) else config.lora_r,
        lora_alpha=Config.lora_alpha if isinstance(config.lora_alpha, dict) else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.target_modules or DEFAULT_TARGETS[config.task],
        modules_to_save=heads,
        layers_to_transform=config.layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        bias=config.train_bias,
        train_norms=config.train_norms,
        **patterns,
    )


def make_trainable(model: nn.Module, config: Config, heads: tuple[str, ...]) -> nn.Module:
    """Make trainable what --mode says, after --adapter was put in; cast the frozen rest
    to --base-dtype."""
    if config.adapter:
        load_adapter(model, config.adapter)
    if config.mode == "lora" and config.adapter:
        _same_adapter(model.lora_config, config)
        missing = [head for head in heads if head not in model.lora_config.modules_to_save]
        model.lora_config.modules_to_save += tuple(missing)
        mark_only_lora_as_trainable(model, model.lora_config)
    elif config.mode == "full":
        merge_lora(model).requires_grad_(True)
    else:
        inject_lora(merge_lora(model), lora_config(config, heads))
    if config.base_dtype != "fp32":
        cast_frozen(model, DTYPES[config.base_dtype])
    if config.grad_checkpointing:
        set_grad_checkpointing(model)
    return speed_up(model)


def _same_adapter(found: LoRAConfig, config: Config) -> None:
    """A flag that contradicts the adapter which it should go on from is a mistake."""
    names = {"lora_r": "r", "lora_alpha": "lora_alpha", "target_modules": "target_modules", "use_dora": "use_dora"}
    for flag, key in names.items():
        wanted, value = getattr(config, flag), getattr(found, key)
        given = wanted != (DEFAULT_TARGETS[config.task] if flag == "target_modules" else getattr(Config, flag))
        if given and (set(wanted) != set(value) if isinstance(wanted, tuple) else wanted != value):
            raise UserError(
                f"{option(flag)} {wanted}: the adapter {config.adapter} has {key} {value}; leave the flag out"
            )


def set_grad_checkpointing(model: nn.Module) -> None:
    """Switch on recomputation in every part of the model that knows it."""
    parts = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    if not parts:
        raise UserError(f"--grad-checkpointing: {type(model).__name__} does not support it; leave it out")
    for module in parts:
        module.grad_checkpointing = True


def choose_workers(config: Config, device: torch.device) -> int:
    """--workers; without it none on a CPU, where the cores have enough to do, and 4 beside a GPU."""
    if config.workers is not None:
        return config.workers
    return 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run; UserError names a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def write_model_config(model: nn.Module, labels: list[str], run_dir: Path) -> None:
    """config.json beside the whole model's weights, so that the run directory is a
    checkpoint by itself."""
    write_json(run_dir / "config.json", {"minilora": asdict(model.config), "label_names": labels})
