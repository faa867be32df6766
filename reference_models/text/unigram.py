"""Unigram: of all ways to cut a text into pieces of the vocabulary, the most probable one.

Kudo 2018, "Subword Regularization", section 3.2; sentencepiece. A piece has a score, its log
probability; best(j), the best score of the first j letters, is found from left to right (Viterbi):
    best(0) = 0        best(j) = max over pieces text[i:j] of best(i) + score(text[i:j])
A letter that is no piece is unknown and costs 10 more than the least probable piece. The charsmap
is how such models carry their own Unicode normalization (NFKC with changes).
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from reference_models.errors import ModelError
from reference_models.text.base import Table, numbered

UNKNOWN_COST, HUGE = 10.0, 1e9
# What joins the letter before it, and what does not, although its category says otherwise
# (Unicode's annex 29; only clusters of at most five bytes matter here).
MARKS = "\u0e33\u0eb3\u200c\u200d\uff9e\uff9f"
APART = re.compile(
    "[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f\u109a-\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d]"
)
CLUSTER = re.compile(r"\r\n|[mx]m+")


def _joins(char: str) -> str:
    group = "M" if char in MARKS else "x" if APART.match(char) else unicodedata.category(char)
    return char if char in "\r\n" else "m" if group[0] == "M" else "c" if group in ("Cc", "Cf", "Zl", "Zp") else "x"


JOINS = Table(_joins)


class Charsmap:
    """sentencepiece's `precompiled_charsmap`: replacements of byte strings, in a double-array trie.
    data: the trie's length in bytes, its units (all uint32, little-endian), then the replacements,
    each ended by a zero byte. The child of node n under byte b is unit n ^ b ^ offset, if its
    lowest byte is b (Yata's darts-clone). ValueError for damaged data, ModelError if seen later."""

    def __init__(self, data: bytes, where: str):
        size = int.from_bytes(data[:4], "little")
        if not 4 <= size <= len(data) - 4 or size % 4:
            raise ValueError(f"the charsmap is damaged (a trie of {size} bytes in {len(data)})")
        self.units, self.replacements = np.frombuffer(data, "<u4", size // 4, 4).tolist(), data[4 + size :]
        self.where, self.letters = where, Table(lambda char: self.first(char, char))

    def matches(self, text: bytes, at: int = 0) -> Iterator[tuple[int, str]]:
        """(end, replacement) of every entry that begins at `at`, the shortest first."""
        try:
            node = self.units[0] >> 10 << (self.units[0] >> 6 & 8)
            for end in range(at, len(text)):
                unit = self.units[node := node ^ text[end]]
                if not text[end] or unit & 0x800000FF != text[end]:
                    return
                node ^= unit >> 10 << (unit >> 6 & 8)
                if unit & 256:
                    start = self.units[node] & 0x7FFFFFFF
                    yield end + 1, self.replacements[start : self.replacements.index(b"\0", start)].decode()
        except (IndexError, ValueError):
            raise ModelError(f"{self.where}: the charsmap is damaged (it points outside itself)") from None

    def first(self, key: str, otherwise: str | None = None) -> str | None:
        return next((found for _, found in self.matches(key.encode("utf-8", "replace"))), otherwise)

    def by_cluster(self, text: str) -> str:
        """As the tokenizers library applies it: the shortest entry that a cluster of at most five
        bytes begins with replaces all of it, and any other letter is looked up alone."""
        parts, done = [], 0
        for match in CLUSTER.finditer(text.translate(JOINS)):
            start, end = match.span()
            if end - start < 6 and len(text[start:end].encode("utf-8", "replace")) < 6:
                if (whole := self.first(text[start:end])) is not None:
                    parts += text[done:start].translate(self.letters), whole
                    done = end
        return "".join(parts) + text[done:].translate(self.letters)


class Unigram:
    """Text -> ids of the most probable pieces; unknown letters side by side are one unknown, or
    with byte_fallback the bytes <0x00>..<0xFF>. pieces: [piece, score] in the order of the ids,
    ModelError for anything else. Work: a look per letter and length of a piece it begins."""

    kind = "unigram"

    def __init__(self, pieces: Sequence, unk_id: int, where: str, byte_fallback: bool = False):
        for i, entry in enumerate(pieces, 1):
            piece, score = entry if isinstance(entry, list | tuple) and len(entry) == 2 else (None, None)
            if not isinstance(piece, str) or not isinstance(score, int | float) or not abs(score) < HUGE:
                raise ModelError(f"{where}, key model.vocab, entry {i}: expected [piece, score], not {entry!r:.80}")
        if isinstance(unk_id, bool) or not isinstance(unk_id, int) or not 0 <= unk_id < len(pieces):
            raise ModelError(f"{where}, key model.unk_id: {unk_id!r:.80} is not the id of one of {len(pieces)} pieces")
        self.vocab = numbered([piece for piece, _ in pieces], f"{where}, key model.vocab", "entry")
        self.scores = {piece: float(score) for piece, score in pieces if piece}
        self.unk_id, self.unk_score = unk_id, min(self.scores.values(), default=0.0) - UNKNOWN_COST
        self.codes = [self.vocab.get(f"<0x{byte:02X}>") if byte_fallback else None for byte in range(256)]
        self.longest: dict[str, int] = {}  # first letter -> letters of the longest piece
        for piece in self.scores:
            self.longest[piece[0]] = max(len(piece), self.longest.get(piece[0], 0))

    def ids(self, text: str) -> list[int]:
        found: list[int] = []
        for piece in self.cut(text):
            if piece in self.scores:
                found.append(self.vocab[piece])
                continue
            codes = [self.codes[byte] for byte in piece.encode("utf-8", "replace")]
            found += [self.unk_id] if None in codes else codes
        return found

    def cut(self, text: str) -> list[str]:
        """The pieces of the best cut; a run of unknown letters is one."""
        end = len(text)
        best, start, unknown = [0.0] * (end + 1), [-1] * (end + 1), [False] * (end + 1)
        for i, letter in enumerate(text):
            here = best[i]
            for j in range(i + 1, min(end, i + self.longest.get(letter, 0)) + 1):
                score = self.scores.get(text[i:j])
                if score is not None and (start[j] < 0 or here + score > best[j]):
                    best[j], start[j], unknown[j] = here + score, i, self.vocab[text[i:j]] == self.unk_id
            if letter not in self.scores and (start[i + 1] < 0 or here + self.unk_score > best[i + 1]):
                best[i + 1], start[i + 1], unknown[i + 1] = here + self.unk_score, i, True
        pieces = []
        while end:
            begin = start[end]
            while unknown[end] and unknown[begin]:
                begin = start[begin]
            pieces.append(text[begin:end])
            end = begin
        return pieces[::-1]
