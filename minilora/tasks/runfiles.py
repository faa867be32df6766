"""The small files of a run, read as data from a stranger and checked before use: labels.json,
preprocess.json and summary.json."""

from pathlib import Path
from typing import Any

from torch import nn

from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks.weights import weights_sha256
from minilora.textfiles import read_json

RESIZES = ("squash", "shortest")
NUMBERS = ("best", "test", "zero_shot", "parameters")  # parts of summary.json that hold numbers


def read_labels(run_dir: Path) -> tuple[list[str], list[str]]:
    """(labels, keys) of labels.json: as many names of each, all different."""
    path = run_dir / "labels.json"
    data = read_json(path)
    lists = [data.get(name) for name in ("labels", "keys")] if isinstance(data, dict) else [None]
    for names in lists:
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f'{path}: expected {{"labels": [names], "keys": [names]}}; the file is damaged')
    labels, keys = lists
    if not len(labels) == len(keys) == len(set(keys)):
        raise UserError(f"{path}: {len(labels)} labels and {len(set(keys))} different keys; the file is damaged")
    return labels, keys


def read_preprocess(run_dir: Path, model: nn.Module) -> dict[str, Any]:
    """preprocess.json: what data/pictures/transforms.py reads, for pictures of the model's size."""
    path = run_dir / "preprocess.json"
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected an object, found {type(data).__name__}; the file is damaged")
    side = data.get("image_size")
    size = (model.preprocess or {}).get("image_size", side)
    fits = {
        "image_size": _whole(side) and side == size,
        "resize": data.get("resize", "squash") in RESIZES,
        "resize_to": data.get("resize_to") is None or (_whole(data["resize_to"]) and data["resize_to"] <= 8192),
        "crop": data.get("crop") in (None, "down", "even"),
        "interpolation": isinstance(data.get("interpolation", ""), str),
        "mean": _three(data.get("mean")),
        "std": _three(data.get("std")) and all(abs(number) > 1e-6 for number in data["std"]),
    }
    if wrong := [key for key, fit in fits.items() if not fit]:
        raise UserError(
            f"{path}: {wrong[0]} = {str(data.get(wrong[0]))[:60]!r} does not fit a model for pictures of {size}; "
            "the file is damaged"
        )
    return data


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, {} for a run that has not ended."""
    path = run_dir / "summary.json"
    if not path.is_file():
        return {}
    data = read_json(path)
    found = data if isinstance(data, dict) else {"best": data}
    wrong = [name for name in (*NUMBERS, "versions") if not isinstance(found.get(name) or {}, dict)]
    for name in () if wrong else NUMBERS:
        wrong += [f"{name}.{key}" for key, value in (found.get(name) or {}).items() if not _number(value)]
    wrong += [name for name in ("seconds", "peak_memory_mb") if not _number(found.get(name))]
    if wrong:
        raise UserError(f"{path}: {wrong[0]} is not what a run writes; the file is damaged, delete it to continue")
    return found


def ended(config: Config, summary: dict[str, Any]) -> bool:
    """Whether a run came to the end that its configuration sets: epochs, steps or --early-stop."""
    final, best = (part if isinstance(part := summary.get(key), dict) else {} for key in ("final", "best"))
    epoch = final.get("epoch") if _whole(final.get("epoch")) else config.epochs if summary else 0
    steps, waited = summary.get("steps"), epoch - (best.get("epoch") or 0)
    out_of_steps = _whole(steps) and 0 < config.max_steps <= steps
    return epoch >= config.epochs or out_of_steps or (epoch > 0 and 0 < config.early_stop <= waited)


def check_weight_file(file: Path, summary: dict[str, Any]) -> None:
    """UserError where the weights are not, bit for bit, those that the finished run wrote."""
    if summary.get("file_sha256") not in (None, weights_sha256(file)):
        raise UserError(
            f"{file} is not the file that this run wrote (sha256 differs: a damaged or exchanged file); "
            "delete summary.json beside it if the change is yours"
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _number(value: Any) -> bool:
    """A number that a table can show, or None for one that is not known."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15)


def _three(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and None not in value and all(map(_number, value))
