"""config.json comes from strangers: every value must be one that a model can have."""

from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path

from reference_models.errors import ModelError
from reference_models.layers import ACTIVATIONS

LARGEST = 2**22  # of any size; no vocabulary or layer in use comes near
DEEPEST = 1000  # layers
MAY_BE_NONE = ("layer_scale",)  # BEiT without it
MAY_BE_ZERO = ("num_classes", "eos_token_id", "type_vocab", "pretrained_windows")
MAY_BE_ZERO += ("registers", "prefix_positions", "distilled_classes", "pad_id", "relative_buckets")


@contextmanager
def readable(file: Path | str):
    """Inside, what Python says of values that do not fit becomes a ModelError with the file."""
    try:
        yield
    except ModelError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{file}: its values cannot be read ({type(error).__name__}: {reason})") from error


def check_config(config, file: Path | str) -> None:
    """ModelError naming the first field of a family's configuration that no model can have."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            check_config(value, file)
        elif not _possible(field.name, value, field.default):
            raise ModelError(f"{file}: {field.name} is {str(value)[:60]!r}, which no {config.family} model can have")
    for name in ("act", "vision_act", "text_act"):
        if (act := getattr(config, name, None)) is not None and act not in ACTIVATIONS:
            raise ModelError(f"{file}: the activation {act!r} is not one of {', '.join(ACTIVATIONS)}")


def _possible(name: str, value, default) -> bool:
    """Whether a value is of its default's kind; a size may be one for each side or stage."""
    if default is None or name in MAY_BE_NONE:  # fusion too has numbers that may be left out
        return value is None or is_number(value)
    if isinstance(default, (bool, str)):
        return isinstance(value, type(default))
    if isinstance(default, float):
        return is_number(value)
    sizes = value if isinstance(value, tuple) else (value,)
    several = isinstance(default, tuple) or name in ("image_size", "window")
    if not sizes or (isinstance(value, tuple) and not several) or len(sizes) > 16:
        return False
    limit = DEEPEST if "depth" in name else LARGEST
    low = 0 if name in MAY_BE_ZERO else 1
    return all(isinstance(n, int) and not isinstance(n, bool) and low <= n <= limit for n in sizes)


def is_number(value, limit: float = 1e9) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < limit
