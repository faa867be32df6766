"""Regular expressions from somebody else's file, matched in bounded time.

re tries one way after the other: `(a+)+!` on thirty letters takes it hours. Here each part of a
pattern is asked once for each place of the text where a match of it can end, which gives the same
answers. A place in the text is a number, the set of places is what a part returns.
"""

import re
from functools import lru_cache

LONGEST, DEEPEST, STEPS = 2000, 50, 20_000


class BadPattern(ValueError):
    """A pattern that is broken, too large, or has what is not known here."""


def is_plain(pattern: str) -> bool:
    """True without repetitions, groups and choices, where re has one way alone."""
    return not re.search(r"[*+?{|(]", pattern)


def fullmatch(pattern: str, text: str, start: int = 0) -> bool:
    """Whether re.compile(pattern).fullmatch(text, start) finds something; BadPattern where that
    would be too much work."""
    if is_plain(pattern):
        return bool(re.compile(pattern).fullmatch(text, start))
    return len(text) in _Search(text).ends(parse(pattern), start)


@lru_cache(512)
def parse(pattern: str) -> tuple:
    """The pattern as a tree; BadPattern names what is wrong with it."""
    if len(pattern) > LONGEST:
        raise BadPattern(f"longer than {LONGEST} characters")
    try:
        re.compile(pattern)  # its messages for what is broken are the usual ones
        tree, place = _parse(pattern, 0, 0)
    except (re.error, RecursionError, OverflowError, IndexError) as error:
        raise BadPattern(str(error)) from None
    if place < len(pattern):
        raise BadPattern(f"{pattern[place:][:20]!r} is not understood")
    return tree


OPENINGS = {"(?:": "group", "(?=": "ahead", "(?!": "not ahead", "(?<=": "behind", "(?<!": "not behind"}
ITEM = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]|\\(?:[dDwWsSbBnrtfv]|\W)|[^\\()|*+?{\[]|\{(?!\d*,?\d*\})")
COUNT = re.compile(r"(?:([*+?])|\{(\d*)(,?)(\d*)\})\??(?![*+?])")


def _parse(pattern: str, place: int, depth: int) -> tuple[tuple, int]:
    """(tree, place behind it) of the alternatives from `place` to the next closing parenthesis."""
    if depth > DEEPEST:
        raise BadPattern(f"nested more than {DEEPEST} deep")
    choices: list[list] = [[]]
    while place < len(pattern) and pattern[place] != ")":
        if pattern[place] == "|":
            choices.append([])
            place += 1
            continue
        if pattern[place] == "(":
            opening = next((o for o in OPENINGS if pattern.startswith(o, place)), "(")
            if opening == "(" and pattern.startswith("(?", place):
                raise BadPattern(f"{pattern[place:][:5]!r} is not supported")
            inner, end = _parse(pattern, place + len(opening), depth + 1)
            item, place = (OPENINGS.get(opening, "group"), inner), end + 1
        elif match := ITEM.match(pattern, place):
            place = match.end()
            item = (match[0],) if match[0] in ("^", "$", r"\b", r"\B") else ("one", re.compile(match[0]))
        else:
            raise BadPattern(f"{pattern[place:][:20]!r} is not supported")
        if count := COUNT.match(pattern, place):
            sign, low, comma, high = count.groups()
            least = {"*": 0, "?": 0, "+": 1}[sign] if sign else int(low or 0)
            most = {"?": 1}.get(sign) if sign else int(high) if high else None if comma else least
            item, place = ("repeat", item, least, most), count.end()
        choices[-1].append(item)
    return ("choice", choices), place


class _Search:
    """The matching of one text."""

    def __init__(self, text: str):
        self.text, self.known, self.steps = text, {}, 0

    def ends(self, node: tuple, place: int) -> set[int]:
        """Where a match of `node` that begins at `place` can end."""
        key = (id(node), place)
        if key not in self.known:
            self.steps += 1
            if self.steps > STEPS:
                raise BadPattern("too much work to match")
            self.known[key] = self._ends(node, place)
        return self.known[key]

    def after(self, node: tuple, places: set[int]) -> set[int]:
        return {end for place in places for end in self.ends(node, place)}

    def _ends(self, node: tuple, place: int) -> set[int]:
        kind, *rest = node
        if kind == "one":
            return {place + 1} if place < len(self.text) and rest[0].fullmatch(self.text[place]) else set()
        if kind == "group":
            return self.ends(rest[0], place)
        if kind == "choice":
            found = set()
            for items in rest[0]:
                places = {place}
                for item in items:
                    places = self.after(item, places)
                found |= places
            return found
        if kind == "repeat":
            return self._repeated(*rest, place)
        if kind.endswith("ahead"):
            holds = bool(self.ends(rest[0], place))
        elif kind.endswith("behind"):
            holds = any(place in self.ends(rest[0], start) for start in range(place + 1))
        else:  # ^ $ \b \B
            holds = bool(re.compile(kind).match(self.text, place))
        return {place} if holds != kind.startswith("not") else set()

    def _repeated(self, item: tuple, least: int, most: int | None, place: int) -> set[int]:
        places, found = {place}, ({place} if least == 0 else set())
        longest = least + len(self.text) + 1
        for times in range(1, min(longest if most is None else most, longest) + 1):
            places = self.after(item, places)
            if times >= least:
                if places <= found:
                    break
                found |= places
        return found
