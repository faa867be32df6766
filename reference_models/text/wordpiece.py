"""WordPiece as BERT uses it, and a small trainer for its vocabulary.

Devlin et al. 2018, "BERT" (tokenization.py of google-research/bert). A text is cleaned of control
characters, CJK ideographs are set apart, accents are stripped (NFD without its nonspacing marks),
letters lowered, punctuation set apart; each word is then cut greedily into the longest pieces of
the vocabulary, "##" marking a continuation:
    unaffable -> un ##aff ##able      a word that cannot be cut, or has over 100 characters -> [UNK]
"""

import heapq
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from reference_models.errors import ModelError
from reference_models.text.base import LOWER, Added, Tokenizer, normalized

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
SPECIAL_KEYS = ("pad_token", "unk_token", "cls_token", "sep_token")  # of tokenizer_config.json
UNK, MASK = "[UNK]", "[MASK]"
# Separators that survive the cleaning; the control characters among White_Space are deleted
# before they separate.
SEPARATOR = re.compile("[\t\n\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")
CJK = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f])"
)
# Where the general category differs: ASCII symbols are punctuation to BERT; the others were
# reclassified after Unicode 8, whose tables the tokenizers library uses.
CATEGORIES = dict.fromkeys("$+<=>^`|~\u166d\U000111c9", "Po") | {
    **{"\ufffd": "Cc", "\u1734": "Mn", "\ua9bd": "Mc", "\u1885": "Lo", "\u1886": "Lo"}
}


def category(char: str) -> str:
    """Unicode's general category as BERT's tokenizer sees it."""
    return CATEGORIES.get(char) or unicodedata.category(char)


class WordPieceTokenizer(Tokenizer):
    """BERT's tokenizer: [CLS] text [SEP], or [CLS] text [SEP] pair [SEP] with token types 0 and 1.
    vocab: tokens in the order of their ids, or token -> id. lowercase=False is for cased models;
    strip_accents=None follows lowercase. special: the model's names of [PAD], [UNK], [CLS], [SEP];
    separators: how many stand between a pair, 2 for MPNet, which has no token types either. Raises
    ModelError for a missing special token or a token that occurs twice."""

    kind, separator = "wordpiece", SEPARATOR
    optional = (MASK,)

    def __init__(
        self,
        vocab: Mapping[str, int] | Sequence[str],
        lowercase: bool = True,
        strip_accents: bool | None = None,
        split_cjk: bool = True,
        max_length: int = 512,
        max_word: int = 100,
        added: Mapping[str, int | Added] | None = None,
        where: str = "vocabulary",
        special: Sequence[str] = SPECIALS,
        separators: int = 1,
    ):
        self.lowercase, self.split_cjk, self.max_word = lowercase, split_cjk, max_word
        self.strip_accents, self.special = strip_accents, tuple(special)
        super().__init__(vocab, added, max_length, where)
        self.pad_id, self.unk_id, self.cls_id, self.eos_id = (self.vocab[t] for t in self.special)
        self.bos_id = self.cls_id
        self.single = ((self.cls_id,), (self.eos_id,))
        self.pair = ((self.cls_id,), (self.eos_id,) * separators, (self.eos_id,))
        self.has_types = separators == 1
        self.longest = max(map(len, self.vocab))

    def _normalize(self, text: str) -> str:
        # a word is cleaned when it is cut: before that only if tokens are looked for in clean text
        return self.clean(text) if any(added.normalized for added in self.added.values()) else text

    def words(self, chunk: str) -> list[str]:
        """A chunk without separators -> its words after cleaning: tokyo, ' and s of "Tōkyō's"."""
        spaced = "".join(f" {char} " if category(char)[0] == "P" else char for char in self.clean(chunk))
        return [word for word in SEPARATOR.split(spaced) if word]

    def clean(self, text: str) -> str:
        """No control characters, ideographs set apart, accents and case as the model has them."""
        text = SEPARATOR.sub(" ", text)
        if text.isascii():
            text = "".join(char for char in text if " " <= char < "\x7f")
            return text.lower() if self.lowercase else text
        # control, format, private-use and surrogate characters; unassigned code points (Cn) stay
        text = "".join(char for char in text if category(char) not in ("Cc", "Cf", "Co", "Cs"))
        if self.split_cjk:
            text = CJK.sub(r" \1 ", text)
        if self.lowercase if self.strip_accents is None else self.strip_accents:
            text = "".join(char for char in normalized("NFD", text) if category(char) != "Mn")
        return text.translate(LOWER) if self.lowercase else text

    def _pieces(self, word: str) -> list[int]:
        if len(word) > self.max_word:
            return [self.unk_id]
        ids, start, prefix = [], 0, ""
        while start < len(word):
            for end in range(min(len(word), start + self.longest), start, -1):
                found = self.vocab.get(prefix + word[start:end])
                if found is not None:
                    break
            else:
                return [self.unk_id]
            ids.append(found)
            start, prefix = end, "##"
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Words joined by spaces, without special tokens; case, accents and spacing are lost."""
        tokens = (self.tokens[int(i)] for i in ids)
        return " ".join(token for token in tokens if token not in self.added).replace(" ##", "")

    def _saved(self) -> tuple[dict[str, bytes], dict]:
        config = {
            "tokenizer_class": "BertTokenizer" if self.has_types else "MPNetTokenizer",
            **dict(zip(SPECIAL_KEYS, self.special, strict=True)),
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.split_cjk,
        }
        return {"vocab.txt": "".join(f"{token}\n" for token in self.tokens).encode()}, config | self._added_config()


def build_wordpiece_vocab(texts: Iterable[str], size: int) -> list[str]:
    """Learn at most `size` pieces from English texts: join the most frequent neighbouring pair, of
    equals the alphabetically first, again and again (Sennrich et al. 2016, in BERT's notation).

    The list starts with the special tokens and every printable ASCII character, alone and as
    "##c", so that no English word becomes [UNK]; words with other characters teach nothing. Raises
    ModelError when `size` is too small for the characters alone.
    """
    ascii_chars = [chr(code) for code in range(33, 127)]
    vocab = [*SPECIALS, MASK, *ascii_chars, *(f"##{char}" for char in ascii_chars)]
    if size < len(vocab):
        raise ModelError(f"a WordPiece vocabulary needs at least {len(vocab)} pieces, not {size}")
    splitter, counts = WordPieceTokenizer(vocab), Counter()
    for text in texts:
        for chunk in splitter._chunks(text):
            counts.update(word for word in splitter.words(chunk) if word.isascii())
    words = [([word[0], *(f"##{char}" for char in word[1:])], n) for word, n in sorted(counts.items())]
    pairs, places = Counter(), defaultdict(set)  # pair -> how often, pair -> words that had it once
    for i, (pieces, n) in enumerate(words):
        for pair in zip(pieces, pieces[1:], strict=False):
            pairs[pair] += n
            places[pair].add(i)
    heap = [(-n, pair) for pair, n in pairs.items()]
    heapq.heapify(heap)
    known = set(vocab)
    while heap and len(vocab) < size:
        n, best = heapq.heappop(heap)
        if -n != pairs[best] or n == 0:  # counted again since: the heap has the fresh entry too
            continue
        joined = best[0] + best[1].removeprefix("##")
        if joined not in known:  # "a ##bc" and "ab ##c" both give "abc"
            known.add(joined)
            vocab.append(joined)
        changed = set()
        for i in places.pop(best):
            changed |= _join(words[i], i, best, joined, pairs, places)
        for pair in changed - {best}:
            heapq.heappush(heap, (-pairs[pair], pair))
        del pairs[best]
    return vocab


def _join(word: tuple[list[str], int], i: int, best, joined: str, pairs: Counter, places: dict) -> set:
    """Join `best` in one word, in place, and move its counts; returns the old and the new pairs."""
    pieces, n = word
    old = list(zip(pieces, pieces[1:], strict=False))
    at = 0
    while at < len(pieces) - 1:
        if (pieces[at], pieces[at + 1]) == best:
            pieces[at : at + 2] = [joined]
        at += 1
    new = list(zip(pieces, pieces[1:], strict=False))
    for pair in old:
        pairs[pair] -= n
    for pair in new:
        pairs[pair] += n
        places[pair].add(i)
    return {*old, *new}
