"""What the tokenizers share: special tokens in a text, truncation, padding, counting, saving."""

import contextlib
import html
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from reference_models.errors import ModelError
from reference_models.text.textfiles import write_atomic

# Unicode's White_Space. Python's `\s` also takes U+001C..U+001F, which the reference
# tokenizers do not.
WHITE_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
BLANKS = WHITE_SPACE.replace("-", "".join(map(chr, range(0x2001, 0x200A))))
CACHE_LIMIT = 1 << 16  # chunks remembered; a few MB
CACHED_LENGTH = 64  # letters; a longer chunk will hardly come again
MOST_MARKS = 64  # accents and the like, one after another


def normalized(form: str, text: str) -> str:
    """unicodedata.normalize in linear time: it sorts a run of accents in n squared steps, so of one
    that is longer than in any writing the rest is left out."""
    if len(text) > MOST_MARKS and not text.isascii():
        text = _long_runs().sub(r"\1", text)
    return unicodedata.normalize(form, text)


def unescaped(text: str) -> str:
    """HTML's entities resolved twice, as OpenAI and open_clip do: captions are often escaped twice.
    A number of thousands of digits is no character: its text stays as it is."""
    with contextlib.suppress(ValueError):
        text = html.unescape(html.unescape(text))
    return text


@cache
def _long_runs() -> re.Pattern:
    marks = "".join(filter(unicodedata.combining, map(chr, range(0x300, 0x20000))))
    return re.compile(f"([{marks}]{{{MOST_MARKS}}})[{marks}]+")


class Added(NamedTuple):
    """A token found in the text itself: before the normalizing, or after it; with lstrip or rstrip
    the white space on that side belongs to it."""

    id: int
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


class Table(dict):
    """Code point -> what `str.translate` puts in its place, found when it is first met."""

    def __init__(self, find: Callable[[str], str]):
        self.find = find

    def __missing__(self, code: int) -> str:
        self[code] = self.find(chr(code))
        return self[code]


# letter by letter: str.lower of a word would write a final sigma differently
LOWER = Table(str.lower)


def numbered(vocab: Mapping[str, int] | Sequence[str], where: str, unit: str = "line") -> dict[str, int]:
    """Token -> id, checked: 0..n-1, each once; errors name the file, `where`, and a list's unit."""
    if not isinstance(vocab, Mapping):
        ids: dict[str, int] = {}
        for i, token in enumerate(vocab):
            if token in ids:
                raise ModelError(f"{where}, {unit} {i + 1}: token {token!r} is already on {unit} {ids[token] + 1}")
            ids[token] = i
        return ids
    seen: dict[int, str] = {}
    for token, i in vocab.items():
        if not isinstance(token, str) or isinstance(i, bool) or not isinstance(i, int):
            raise ModelError(f"{where}, key {token!r}: a token id must be a whole number, not {i!r}")
        if i in seen:
            raise ModelError(f"{where}, key {token!r}: id {i} is already taken by {seen[i]!r}")
        seen[i] = token
    missing = next((i for i in range(len(seen)) if i not in seen), None)
    if missing is not None:
        raise ModelError(f"{where}: {len(seen)} tokens, but none has id {missing}; ids must be 0..{len(seen) - 1}")
    return dict(vocab)


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of a pair after cutting the longer text first, both evenly once they are equal.

    >>> longest_first(4, 20, 16), longest_first(20, 30, 15)
    ((4, 12), (7, 8))
    """
    if first + second <= room:
        return first, second
    short = min(first, second, room // 2)
    return (room - short, short) if first > second else (short, room - short)


class Tokenizer(ABC):
    """Text -> ids. Subclasses say how a chunk is cut into `words` and a word into ids (`_pieces`),
    or do both in `_chunk`, and which ids frame a text: `single` = (before, after), `pair` =
    (before, between, after).

    `added` are tokens found in the text ("[SEP]", "<|endoftext|>" and the like), as the tokenizers
    library does: a text that contains one gets its id. `truncated` counts the texts that were cut
    since the tokenizer was made (or since it was set to 0).
    """

    kind: str
    pad_id: int
    single: tuple[Sequence[int], Sequence[int]]
    pair: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None
    special: tuple[str, ...]  # tokens every vocabulary of this kind must have
    optional: tuple[str, ...] = ()  # tokens that count as special where the vocabulary has them
    separator: re.Pattern  # what no word crosses
    has_types = False
    fill: int | None = None  # rows have this length, with padding that counts as text

    def __init__(self, vocab, added: Mapping[str, int | Added] | None, max_length: int, where: str):
        self.vocab = numbered(vocab, where)
        for token in self.special:
            if token not in self.vocab:
                raise ModelError(f"{where}: the special token {token!r} is missing; is this a {self.kind} vocabulary?")
        added = {token: Added(i) if isinstance(i, int) else i for token, i in (added or {}).items()}
        for token, (i, *_) in added.items():
            if self.vocab.setdefault(token, i) != i:
                raise ModelError(f"{where}, added token {token!r}: id {i}, but the vocabulary says {self.vocab[token]}")
        self.vocab = numbered(self.vocab, where)
        named = {token: Added(self.vocab[token]) for token in (*self.special, *self.optional) if token in self.vocab}
        self.added: dict[str, Added] = named | added
        self.tokens = sorted(self.vocab, key=self.vocab.__getitem__)
        self.vocab_size, self.max_length = len(self.vocab), max_length
        self.truncated = 0
        self._cache: dict[str, tuple[int, ...]] = {}
        self._raw = _finder({t: a for t, a in self.added.items() if not a.normalized})
        self._normal = _finder({self._normalize(t): a for t, a in self.added.items() if a.normalized})

    # ---- text -> ids
    def text_ids(self, text: str) -> list[int]:
        """Ids of one text without the framing special tokens."""
        ids: list[int] = []
        for number, part in enumerate(self._parts(text)):
            if isinstance(part, int):
                ids.append(part)
                continue
            for chunk in self._chunks(part, number == 0):
                known = self._cache.get(chunk)
                if known is None:
                    known = tuple(self._chunk(chunk))
                    if len(self._cache) >= CACHE_LIMIT:
                        self._cache.clear()
                    if len(chunk) <= CACHED_LENGTH:
                        self._cache[chunk] = known
                ids.extend(known)
        return ids

    def _parts(self, text: str) -> Iterator[int | str]:
        """The ids of added tokens, and the normalized text between them."""
        for part in _split(text, *self._raw):
            if isinstance(part, int):
                yield part
            else:
                yield from _split(self._normalize(part), *self._normal)

    def encode(self, text: str) -> list[int]:
        """Ids of one text with the framing special tokens, not cut."""
        return self._filled(self._frame(self.text_ids(text)))

    def _filled(self, row: list[int]) -> list[int]:
        return row + [self.pad_id] * ((self.fill or 0) - len(row))

    def _normalize(self, text: str) -> str:
        """A text in which the added tokens that are `normalized` are looked for."""
        return text

    def _chunks(self, text: str, first: bool = False) -> Iterable[str]:
        """A text cut so that chunks can be remembered. first: it begins the whole text."""
        return filter(None, self.separator.split(text))

    def _chunk(self, chunk: str) -> Iterable[int]:
        """Ids of one chunk."""
        return [i for word in self.words(chunk) for i in self._pieces(word)]

    def _frame(self, ids: list[int], pair: list[int] | None = None) -> list[int]:
        """A text's ids, or a pair's, between the special tokens."""
        if pair is None:
            return [*self.single[0], *ids, *self.single[1]]
        if self.pair is None:
            raise ModelError(f"{self.kind} reads single texts; join the two before tokenizing")
        before, between, after = self.pair
        return [*before, *ids, *between, *pair, *after]

    def __call__(
        self,
        texts: list[str],
        pairs: list[str] | None = None,
        max_length: int | None = None,
        padding: bool | int = True,
    ) -> dict[str, torch.Tensor]:
        """A batch, int64 (B, T): `input_ids`, `attention_mask`, for WordPiece `token_type_ids`.

        max_length: rows are cut to it (None = the model's own: 77 for CLIP, 512 for BERT), keeping
        the special tokens; of a pair the longer text is cut first. padding: True pads to the
        longest row; a number pads (and cuts) every row to that length; False demands rows of one
        length. Raises ModelError for other than lists of strings, or a limit without room."""
        for name, values in {"texts": texts, "pairs": [] if pairs is None else pairs}.items():
            if isinstance(values, str) or not all(isinstance(value, str) for value in values):
                raise ModelError(f"{name} must be a list of strings; a single text goes in brackets: [text]")
        if pairs is not None and len(pairs) != len(texts):
            raise ModelError(f"{len(texts)} texts but {len(pairs)} pairs: give one pair for every text")
        limit = self.max_length if max_length is None else max_length
        fixed = padding if isinstance(padding, int) and not isinstance(padding, bool) else None
        limit = limit if fixed is None else min(limit, fixed)
        rows = [self._row(text, pairs[i] if pairs is not None else None, limit) for i, text in enumerate(texts)]
        lengths = [len(ids) for ids, _ in rows]
        width = fixed or max(lengths, default=0)
        if padding is False and any(n != width for n in lengths):
            raise ModelError("padding=False, but the texts have different lengths; use padding=True")

        def padded(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
            rows = [row + [fill] * (width - len(row)) for row in rows]
            return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), width)

        ids, mask = [ids for ids, _ in rows], [[1] * n for n in lengths]
        batch = {"input_ids": padded(ids, self.pad_id), "attention_mask": padded(mask)}
        if self.has_types:
            batch["token_type_ids"] = padded([[0] * n + [1] * (len(ids) - n) for ids, n in rows])
        return batch

    def _row(self, text: str, pair: str | None, limit: int) -> tuple[list[int], int]:
        """One framed row, cut to `limit`, and how many of its tokens belong to the first text."""
        first, second = self.text_ids(text), None if pair is None else self.text_ids(pair)
        limit = min(limit, self.fill or limit)
        room = limit - len(self._frame([], None if pair is None else []))
        if room < 0:
            raise ModelError(f"max_length {limit} has no room for the special tokens alone ({limit - room})")
        keep = longest_first(len(first), len(second or ()), room)
        self.truncated += keep != (len(first), len(second or ()))
        first = first[: keep[0]]
        row = self._frame(first, None if second is None else second[: keep[1]])
        return self._filled(row), len(self._frame(first))

    # ---- files
    def save(self, directory: str | Path) -> None:
        """Write the vocabulary's files and tokenizer_config.json; transformers reads them too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        files, config = self._saved()
        text = json.dumps(config | {"model_max_length": self.max_length}, indent=2) + "\n"
        for name, content in (files | {"tokenizer_config.json": text.encode()}).items():
            write_atomic(directory / name, content)

    @abstractmethod
    def _saved(self) -> tuple[dict[str, bytes], dict]:
        """The vocabulary's files, and what tokenizer_config.json says."""

    def _added_config(self) -> dict:
        entries = [{"content": token, "single_word": False, **entry._asdict()} for token, entry in self.added.items()]
        return {"added_tokens_decoder": {str(entry.pop("id")): entry for entry in entries}}


def _finder(added: Mapping[str, Added]) -> tuple[re.Pattern, Mapping[str, Added]]:
    """What `_split` looks for: of the tokens that begin at one place the longest."""
    longest = sorted(filter(None, added), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest)) or "(?!)") + ")"), added


def _split(text: str, pattern: re.Pattern, added: Mapping[str, Added]) -> Iterator[int | str]:
    """A text cut at its added tokens, which become ids; nothing empty in between."""
    parts = pattern.split(text)  # text, token, text, ..., text
    for i in range(0, len(parts), 2):
        part = parts[i]
        after = added[parts[i + 1]] if i + 1 < len(parts) else None
        if i and added[parts[i - 1]].rstrip:
            part = part.lstrip(BLANKS)
        if after and after.lstrip:
            part = part.rstrip(BLANKS)
        if part:
            yield part
        if after:
            yield after.id
