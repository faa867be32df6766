"""Base weights: where they are, a model with them, and the record by which a run knows them."""

import contextlib
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.atomic import file_sha256
from minilora.errors import UserError
from minilora.settings.flags import PICTURE_FLAGS, Config
from minilora.textfiles import printable
from minilora.training.state import tensors_sha256
from reference_models import load_pretrained
from reference_models.files.checkpoint import find_checkpoint, local
from reference_models.load import bundled_weights, config_for

BUNDLED, RANDOM = "bundled", "none"


def load_base(
    model: str,
    weights: str | None,
    seed: int,
    num_classes: int | None = None,
    image_size: int | None = None,
    pictures: dict[str, Any] | None = None,
    new_head: bool = True,
    **sizes: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """(model, {"weights": ..., "sha256": ...}); what is random in it comes from `seed`.

    pictures: what the flags say of them, see `picture_flags`; new_head: whether to say that the
    checkpoint's head is replaced. The record lets a later session make the same base again, or
    notice that it cannot.
    """
    source = find_weights(model, weights)
    config = None if os.path.isdir(model) else config_for(model)
    if num_classes is not None and config and not hasattr(config, "num_classes") and config.family != "clip":
        pair = model if hasattr(config, "vision") else f"vision=NAME text={model}"
        raise UserError(f"--model {model} tells no classes apart; it is for questions: --task vqa --model {pair}")
    torch.manual_seed(seed)
    built = load_pretrained(model, source or RANDOM, num_classes, image_size, pictures, **sizes)
    for note in built.notes:
        if new_head or not note.startswith("head:"):
            print(printable(note))
    patch = getattr(built.config, "patch_size", None)
    if image_size and isinstance(patch, int) and image_size % patch:
        raise UserError(f"--image-size {image_size}: {model} cuts pictures into patches of {patch}; take a multiple")
    if source is None:
        names = [name for name in built.state_dict() if name.partition(".")[0] not in built.head_modules]
        return built, {"weights": RANDOM, "sha256": tensors_sha256(built.state_dict(), names)}
    bundled = weights in (None, BUNDLED) and not os.path.isdir(model)
    return built, {"weights": BUNDLED if bundled else str(source), "sha256": weights_sha256(built.source)}


def picture_flags(config: Config) -> dict[str, Any]:
    """What the flags say of pictures, for load_pretrained."""
    return {name: getattr(config, name) for name in PICTURE_FLAGS if getattr(config, name) is not None}


def named(weights: str | None) -> str | None:
    """`weights` that are a file, a folder or hf:org/name, else None."""
    return None if weights in (None, RANDOM, BUNDLED) else weights


def absolute(weights: str | None) -> str | None:
    """The same weights when the program runs in another folder."""
    return os.path.abspath(weights) if named(weights) and not weights.startswith("hf:") else weights


def find_weights(model: str, weights: str | None) -> str | Path | None:
    """Where a model's weights are, None for random ones; UserError where there are none."""
    if weights == RANDOM:
        return None
    if (source := origin(model, weights)) is None:
        config_for(model)  # a name that does not exist is the first thing to say
        raise UserError(
            f"--weights is missing, and {model} is not bundled: give a safetensors file, a folder, hf:org/name, or "
            "none for random weights"
        )
    return source


def origin(model: str, weights: str | None) -> str | Path | None:
    """The named weights, else those of a model's folder, or bundled ones; else None."""
    return named(weights) or (os.path.abspath(model) if os.path.isdir(model) else bundled_weights(model))


def weights_sha256(source: str | Path) -> str:
    """sha256 of a weight file, or of the sha256s of the weight files in a folder."""
    path = local(source)
    # a pipe would be waited for
    found = ([one for one in sorted(path.glob(f"*.{kind}")) if one.is_file()] for kind in ("safetensors", "bin"))
    files = [path] if path.is_file() else next(filter(None, found), [])
    digests = [file_sha256(file) for file in files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def tokenizer_beside(source: str | Path | None) -> Path | None:
    """The folder of a checkpoint if a tokenizer lies in it."""
    return None if source is None else find_checkpoint(source).tokenizer


def check_base(found: dict[str, Any], recorded: dict[str, Any], run_dir: Path) -> None:
    """UserError if the base weights are not those that the run was trained on."""
    if recorded.get("sha256") not in (None, found["sha256"]):
        what = "random weights come out differently here" if found["weights"] == RANDOM else "their sha256 differs"
        raise UserError(
            f"{run_dir}: the base weights {found['weights']} are not those of the training ({what}); name the right "
            "ones with --weights"
        )


@contextlib.contextmanager
def restoring(sources: Iterable[str | None]):
    """For making a base model again: quiet, and without taking random numbers from the program;
    UserError where one of its weight files is gone."""
    for source in sources:
        if named(source) and not source.startswith("hf:") and not os.path.exists(source):
            raise UserError(f"the base weights {source} are gone; say where they are now with --weights")
    with contextlib.redirect_stdout(io.StringIO()), torch.random.fork_rng(devices=[]):
        yield
