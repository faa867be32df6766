"""1_Pooling/config.json of sentence encoders: which vector of a text they were trained for."""

from dataclasses import replace
from pathlib import Path

from reference_models.errors import ModelError
from reference_models.text.textfiles import read_json

FILE = "1_Pooling/config.json"
OURS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "mean": "mean", "cls": "cls", "max": "max"}


def read_pooling(folder: Path) -> str | None:
    """mean, cls or max, by Bert's names; None where the folder says nothing.

    Two ways to write it are read: `"pooling_mode_mean_tokens": true` among others that are false,
    and `"pooling_mode": "mean"`. Raises ModelError for another kind, and for several at once, which
    sentence-transformers joins to one longer vector.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    data, prefix = read_json(path), "pooling_mode_"
    named = data.get("pooling_mode", [key.removeprefix(prefix) for key, on in data.items() if on is True])
    named = [named] if isinstance(named, str) else [name for name in named if name != "include_prompt"]
    if len(named) != 1 or named[0] not in OURS:
        kind = " + ".join(map(str, named)) or "of no kind"
        raise ModelError(f"{path}: pooling {kind} is not supported; choose mean, cls or max (train.py: --text-pooling)")
    return OURS[named[0]]


def with_pooling(config, folder: Path):
    """The configuration of a text encoder with the pooling of its folder; any other as it is."""
    return replace(config, pooling=read_pooling(folder) or config.pooling) if hasattr(config, "pooling") else config
