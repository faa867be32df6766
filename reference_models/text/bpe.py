"""CLIP's byte-pair encoding, and the parts of it that RoBERTa's and Gemma's use.

Radford et al. 2021, "Learning Transferable Visual Models" (simple_tokenizer.py of openai/CLIP);
Sennrich et al. 2016. A text is brought to NFC, its white space made single, its letters lowered; it
is cut into words, single digits, runs of other signs and English endings ('s 't 're 've 'm 'll 'd).
The UTF-8 bytes of a piece are written with 256 printable stand-ins, the last one marked "</w>", and
neighbours are joined in the order of the merge list:
    l o w e r</w> -> lo w e r</w> -> low e r</w> -> low er</w> -> lower</w>
"""

import heapq
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from reference_models.errors import ModelError
from reference_models.text.base import LOWER, WHITE_SPACE, Added, Table, Tokenizer, normalized, unescaped

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
# merges CLIP takes from its list of 262,144: the vocabulary is 49,408 with bytes and specials
MERGES = 49152 - 256 - 2

SPACES = re.compile(f"[{WHITE_SPACE}]+")
# The cut works on a shadow of the text in which every letter beyond ASCII is "z", every numeral
# "0", white space a tab, every other sign "!": none of them occurs in the endings or the special
# names, so spans in the shadow are spans in the text.
WORDS = re.compile(r"<\|(?:start|end)oftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-zA-Z]+|[0-9]|[^a-zA-Z0-9]+")
SPECIAL_NAME = re.compile(r"(<\|)((?:start|end)oftext)(\|>)")


def _shadow(char: str) -> str:
    if char < "\x80":
        return char
    return "\t" if SPACES.match(char) else {"L": "z", "N": "0"}.get(unicodedata.category(char)[0], "!")


SHADOW = Table(_shadow)


# The printable stand-in of each byte: itself where it prints in Latin-1, else the next from U+0100.
PRINTS, OTHERS = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}, itertools.count(0x100)
BYTE_LETTERS = [chr(byte if byte in PRINTS else next(OTHERS)) for byte in range(256)]


def clip_vocab(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """CLIP's order: byte letters, printing ones first; the same ending a word; merges; specials."""
    letters = sorted(BYTE_LETTERS)
    tokens = [*letters, *(letter + WORD_END for letter in letters), *map("".join, merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


class ClipTokenizer(Tokenizer):
    """CLIP's tokenizer: <|startoftext|> text <|endoftext|>, at most 77 tokens, the last kept.
    merges: pairs in order of priority. vocab: None = CLIP's own numbering. pad_id: 0 as in OpenAI's
    code and open_clip; transformers pads with <|endoftext|>. The text tower pools at the first
    <|endoftext|> and looks backward only, so both give the same features. clean_html=False is what
    transformers does; True first resolves entities ("&amp;amp;" -> "&"), as OpenAI's code and
    open_clip do (their repair of mis-decoded text by the ftfy package is left out)."""

    kind, separator = "clip", SPACES
    special = (START, END)

    def __init__(
        self,
        merges: Sequence[tuple[str, str]],
        vocab: Mapping[str, int] | None = None,
        pad_id: int = 0,
        clean_html: bool = False,
        max_length: int = 77,
        added: Mapping[str, int | Added] | None = None,
        where: str = "vocabulary",
    ):
        super().__init__(clip_vocab(merges) if vocab is None else vocab, added, max_length, where)
        self.ranks = merge_ranks(merges, self.vocab, where)
        if not 0 <= pad_id < self.vocab_size:
            raise ModelError(f"{where}: pad_id {pad_id} is outside 0..{self.vocab_size - 1}")
        self.pad_id, self.clean_html = pad_id, clean_html
        self.bos_id, self.eos_id = self.vocab[START], self.vocab[END]
        self.single = ((self.bos_id,), (self.eos_id,))

    def text_ids(self, text: str) -> list[int]:
        return super().text_ids(unescaped(text) if self.clean_html else text)

    def words(self, chunk: str) -> list[str]:
        """A chunk -> what the merges work on: it, 's of "It's", and 4, 2, ! of "42!"."""
        chunk = normalized("NFC", chunk).translate(LOWER)
        words: list[str] = []
        for match in WORDS.finditer(chunk.translate(SHADOW)):
            word = chunk[match.start() : match.end()]
            name = SPECIAL_NAME.fullmatch(word)
            words.extend(name.groups() if name else [word])
        return words

    def _pieces(self, word: str) -> list[int]:
        letters = [BYTE_LETTERS[byte] for byte in word.encode("utf-8", errors="replace")]
        letters[-1] += WORD_END
        return [self.vocab.get(piece, self.eos_id) for piece in join_pairs(letters, self.ranks)]

    def decode(self, ids: Iterable[int]) -> str:
        """The lowered text, words joined by spaces, special tokens left out."""
        tokens = (self.tokens[int(i)] for i in ids)
        text = "".join(token for token in tokens if token not in self.added)
        values = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
        words = [bytes(values[letter] for letter in word if letter in values) for word in text.split(WORD_END)]
        return b" ".join(words).decode("utf-8", errors="replace").strip()

    def _saved(self) -> tuple[dict[str, bytes], dict]:
        lines = ["#version: 0.2", *(" ".join(pair) for pair in self.ranks), ""]
        files = {"vocab.json": json.dumps(self.vocab, ensure_ascii=False).encode()}
        # pad_token is for transformers, which would take a "!" (id 0) of the text for padding
        names = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
        config = {"tokenizer_class": "CLIPTokenizer", **names, "pad_id": self.pad_id, "clean_html": self.clean_html}
        return files | {"merges.txt": "\n".join(lines).encode()}, config | self._added_config()


class BytePairs:
    """BPE of a tokenizer.json: text -> ids. What is not in the vocabulary becomes its bytes
    <0x00>..<0xFF>, or the unknown token (a run of it one with fuse_unk), or nothing."""

    kind = "bpe"

    def __init__(self, model: dict, merges: Iterable[tuple[str, str]], where: str):
        usual = {"dropout": 0, "continuing_subword_prefix": "", "end_of_word_suffix": "", "ignore_merges": False}
        for key, value in usual.items():
            if model.get(key) not in (None, value):
                raise ModelError(f"{where}, key model.{key}: {model[key]!r:.80} is not supported, only {value!r}")
        self.vocab, self.ranks = model["vocab"], merge_ranks(merges, model["vocab"], where)
        self.unknown, self.fuse = model.get("unk_token") or None, model.get("fuse_unk")
        self.fallback = model.get("byte_fallback")
        if self.unknown is not None and self.unknown not in self.vocab:
            raise ModelError(f"{where}, key model.unk_token: {self.unknown!r:.80} is not in the vocabulary")

    def ids(self, text: str) -> list[int]:
        pieces, waiting = [], []  # unknown tokens wait for the next letter that is known
        for letter in text:
            if letter in self.vocab:
                pieces += [*waiting, letter]
                waiting = []
                continue
            codes = [f"<0x{byte:02X}>" for byte in letter.encode("utf-8", "replace")] if self.fallback else [None]
            if all(code in self.vocab for code in codes):
                pieces += codes
            elif self.unknown is not None and not (waiting and self.fuse):
                pieces += waiting
                waiting = [self.unknown]
        return [self.vocab[piece] for piece in join_pairs(pieces + waiting, self.ranks)]


def merge_ranks(merges: Iterable[tuple[str, str]], vocab: Mapping[str, int], where: str) -> dict[tuple[str, str], int]:
    """Pair -> its place in the list; ModelError for an unknown token or a pair that comes twice."""
    ranks: dict[tuple[str, str], int] = {}
    for rank, pair in enumerate(merges):
        place, merge = f"{where}, merge {rank + 1}", " ".join(pair)
        for token in (*pair, "".join(pair)):
            if token not in vocab:
                raise ModelError(f"{place} {merge!r:.80}: {token!r:.80} is not in the vocabulary")
        if ranks.setdefault(tuple(pair), rank) != rank:
            raise ModelError(f"{place}: {merge!r} occurs twice")
    return ranks


def join_pairs(pieces: list[str], ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Join the neighbours of lowest rank, leftmost first, until no pair has one; uses `pieces` up.
    By a heap of (rank, place), not a search per join: n letters cost n log n, not n squared."""
    end = len(pieces)
    left, right = list(range(-1, end - 1)), list(range(1, end + 1))  # neighbours that still stand
    heap: list[tuple[int, int]] = []

    def offer(i: int) -> None:
        if i >= 0 and right[i] < end and (rank := ranks.get((pieces[i], pieces[right[i]]))) is not None:
            heapq.heappush(heap, (rank, i))

    for i in range(end - 1):
        offer(i)
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        if not pieces[i] or j >= end or ranks.get((pieces[i], pieces[j])) != rank:
            continue  # one of the two was joined with another in the meantime
        pieces[i], pieces[j], right[i] = pieces[i] + pieces[j], "", right[j]
        if right[i] < end:
            left[right[i]] = i
        offer(left[i])
        offer(i)
    return [piece for piece in pieces if piece]
