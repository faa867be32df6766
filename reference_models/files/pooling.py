"""The files of sentence encoders: which vector of a text they were trained for.

modules.json lists the steps after the encoder, 1_Pooling/config.json says what the pooling is.
"""

from dataclasses import replace
from pathlib import Path

from reference_models.errors import ModelError
from reference_models.text.textfiles import read_json

MODULES, FILE = "modules.json", "1_Pooling/config.json"
OURS = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "mean": "mean", "cls": "cls", "max": "max"}
CHOOSE = "choose mean, cls or max (train.py: --text-pooling)"


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
        raise ModelError(f"{path}: pooling {kind} is not supported; {CHOOSE}")
    return OURS[named[0]]


def read_normalize(folder: Path, strict: bool = True) -> bool:
    """Whether modules.json divides the vector by its length. strict: ModelError for a step that is
    not known, such as Dense, another layer after the pooling."""
    path = Path(folder) / MODULES
    steps = read_json(path, kind=list) if path.is_file() else []
    kinds = [str(step.get("type")).rpartition(".")[2] for step in steps if isinstance(step, dict)]
    if strict and (unknown := {*kinds} - {"Transformer", "Pooling", "Normalize"}):
        raise ModelError(f"{path}: the step {min(unknown)} is not supported; {CHOOSE}, which leaves it out")
    return "Normalize" in kinds


def with_pooling(config, folder: Path, chosen: str | None = None):
    """The configuration of a text encoder with what its folder says, of the pooling where none is
    `chosen`; any other configuration as it is. A pooler's vector is never normalised."""
    if not hasattr(config, "pooling"):
        return config
    pooling = chosen or read_pooling(folder) or config.pooling
    normalize = pooling != "pooler" and (read_normalize(folder, not chosen) or config.normalize)
    return replace(config, pooling=pooling, normalize=normalize)
