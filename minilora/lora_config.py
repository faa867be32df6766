"""What the fields of a LoRAConfig may hold, whether they come from code or from somebody's
adapter_config.json.
"""

import math
import re

from minilora.errors import UserError


def check_values(config) -> None:
    """UserError naming the first field with an impossible value; patterns obey the rule of
    what they replace."""
    for field, rule in RULES.items():
        _check(field, getattr(config, field), *rule)
    for field, replaced in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
        for key, value in getattr(config, field).items():
            _check(f"{field}[{key!r}]", value, *RULES[replaced])


def _check(name: str, value, holds, wanted: str) -> None:
    if not holds(value):
        raise UserError(f"LoRAConfig: {name} must be {wanted}, got {value!r}")


def is_rank(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value) -> bool:
    return is_number(value) and 0 <= value < 1


def are_names(value) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def is_pattern(value) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def are_targets(value) -> bool:
    return is_pattern(value) or are_names(value)


def are_patterns(value) -> bool:
    return isinstance(value, dict) and all(map(is_pattern, value))


RULES = {
    "r": (is_rank, "a whole number of at least 1"),
    "lora_alpha": (is_number, "a number"),
    "lora_dropout": (is_share, "at least 0 and below 1"),
    "target_modules": (are_targets, "names or one regular expression"),
    "modules_to_save": (are_names, "names"),
    "rank_pattern": (are_patterns, "{regular expression: rank}"),
    "alpha_pattern": (are_patterns, "{regular expression: alpha}"),
    "bias": (("none", "lora_only", "all").__contains__, "one of none, lora_only, all"),
    "init_lora_weights": ((True, False, "gaussian").__contains__, "one of True, False, gaussian"),
}
