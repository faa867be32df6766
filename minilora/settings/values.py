"""One value of one flag, read by its rule from a command line or from TOML, and checked."""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any

from minilora.errors import UserError
from minilora.settings.flags import Rule
from minilora.textfiles import encodable

TOWERS = ("vision", "text")
TEXTS = ("question", "choices", "classes", "prompt")  # which a tokenizer reads
VERBATIM = ("image", "choices", "classes", "prompt")  # files and texts may hold commas


def option(name: str) -> str:
    """lora_r -> --lora-r."""
    return "--" + name.replace("_", "-")


def close_match(word: Any, choices: Iterable[str]) -> str:
    """ "; did you mean X?" if `word` looks like one of the choices, else nothing."""
    names = {choice.lstrip("-").lower(): choice for choice in choices}
    wanted = str(word).lstrip("-").lower()
    begin = [name for name in names if len(wanted) > 1 and (wanted.startswith(name) or name.startswith(wanted))]
    match = difflib.get_close_matches(wanted, list(names), n=1) or begin
    return f"; did you mean {names[match[0]]}?" if match else ""


def convert(name: str, rule: Rule, value: Any, where: str = "") -> Any:
    """`value` as the flag's type; UserError names the flag (or `where`) and what it accepts."""
    label = where or option(name)
    for text in (value if isinstance(value, (list, tuple)) else [value]) if name in TEXTS else ():
        if isinstance(text, str) and text != encodable(text):
            raise UserError(f"{label} must be a text in UTF-8, got {text!r}")
    if rule.kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{label} must be true or false, got {value!r}")
        return value
    if name in VERBATIM:
        words = tuple(_words(label, value))
        if not words or not all(word.strip() for word in words):
            raise UserError(f"{label} needs a value, got an empty text (a variable that is not set?)")
        return words[0] if name == "prompt" and len(words) == 1 else words
    if rule.many and rule.kind is not str:
        return _several(label, rule, value)
    if rule.many:
        return _numbers(label, value) if name == "layers" else _names(label, value)
    if not rule.towers:
        return _single(label, rule, value)
    towers = _towers(label, value)
    if isinstance(towers, dict):
        return {tower: _single(f"{label} {tower}", rule, one) for tower, one in towers.items()}
    return _single(label, rule, towers)


def _towers(label: str, value: Any) -> Any:
    """One value, or {"vision": A, "text": B} from `vision=A text=B`."""
    if isinstance(value, dict):
        pairs = value
    else:
        words = value if isinstance(value, (list, tuple)) else [value]
        matches = [re.fullmatch(r"(\w+)=(.+)", str(word)) for word in words]
        if len(words) == 1 and not matches[0]:
            return words[0]
        if not all(matches):
            raise UserError(f"{label} takes one value, or vision=A text=B; got {' '.join(map(str, words))}")
        pairs = {match[1]: match[2] for match in matches}
    for tower in pairs:
        if tower not in TOWERS:
            raise UserError(f"{label}: there is no tower {tower!r}; the towers are {' and '.join(TOWERS)}")
    return pairs


def _words(label: str, value: Any) -> list[str]:
    words = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(word, (bool, dict, list, float)) for word in words):
        raise UserError(f"{label} takes names, got {value!r}")
    return [str(word) for word in words]


def _names(label: str, value: Any) -> tuple[str, ...] | str:
    """Names between spaces or commas; one word that is a regular expression stays as it is."""
    words = _words(label, value)
    if len(words) == 1 and (words[0] == "all-linear" or re.search(r"[\\*+?^$|()\[\]]", words[0])):
        return words[0]
    names = tuple(part for word in words for part in word.split(",") if part)
    if not names:
        raise UserError(f"{label} needs at least one name")
    return names


def _numbers(label: str, value: Any) -> tuple[int, ...]:
    """Block numbers from 3, 0,1 or 8-11."""
    numbers: list[int] = []
    for part in (part for word in _words(label, value) for part in word.split(",")):
        match = re.fullmatch(r"(\d{1,3})(?:-(\d{1,3}))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"{label} takes block numbers such as 0 1 2 or 8-11, got {part!r}")
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(numbers)


def _several(label: str, rule: Rule, value: Any) -> tuple[int | float, ...]:
    """Numbers between spaces or commas: whole ones, each once, or three for red, green, blue."""
    words = value if isinstance(value, (list, tuple)) else [value]
    words = [part for word in words for part in (word.split(",") if isinstance(word, str) else [word]) if part != ""]
    if rule.kind is float and len(words) != 3:
        raise UserError(f"{label} takes three numbers, for red, green and blue; got {len(words)}")
    numbers = tuple(_single(label, rule, word) for word in words)
    if rule.kind is int and not 0 < len(numbers) == len(set(numbers)):
        raise UserError(f"{label} takes different whole numbers, got {' '.join(map(str, words)) or 'none'}")
    return numbers


def _single(label: str, rule: Rule, value: Any) -> Any:
    """A text among the choices, or a number within the range."""
    if rule.kind is str:
        if not isinstance(value, str):
            raise UserError(f"{label} must be a text, got {value!r}")
        if not value.strip():
            raise UserError(f"{label} needs a value, got an empty text (a variable that is not set?)")
        if rule.choices and value not in rule.choices:
            listed = ", ".join(rule.choices)
            raise UserError(f"{label} must be one of {listed}; got {value!r}{close_match(value, rule.choices)}")
        return value
    limits = [
        ("at least", rule.low, lambda x, bound: x >= bound),
        ("above", rule.above, lambda x, bound: x > bound),
        ("at most", rule.high, lambda x, bound: x <= bound),
        ("below", rule.below, lambda x, bound: x < bound),
    ]
    limits = [(f"{words} {bound:.12g}", holds, bound) for words, bound, holds in limits if bound is not None]
    wanted = " and ".join(words for words, _, _ in limits)
    if rule.low is not None and rule.high is not None:
        wanted = f"from {rule.low:.12g} to {rule.high:.12g}"
    what = ("a whole number " if rule.kind is int else "a number ") + wanted
    number = _number(rule.kind, value)
    if number is None or not all(holds(number, bound) for _, holds, bound in limits):
        raise UserError(f"{label} must be {what.strip()}, got {value!r}")
    return number


def _number(kind: type, value: Any) -> int | float | None:
    """`value` as a finite int or float, else None; True is no number, 3.0 no whole number."""
    try:
        number = kind(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, (int, kind)):
            return None
        return kind(number) if math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None
