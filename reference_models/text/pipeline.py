"""Tokenizers given as a pipeline, in the words of tokenizer.json: RoBERTa's, XLM-R's, SigLIP's.

    text -> normalizer -> pre_tokenizer -> model -> post_processor -> ids
            Unicode, case  words           BPE or   <s> ... </s>
                                           Unigram
Any part that is not known here is refused by name. (The tokenizers library; RoBERTa: Radford et al.
2019, "Language Models are Unsupervised Multitask Learners", section 2.2; XLM-R and SigLIP:
sentencepiece, Kudo and Richardson 2018.)
"""

import base64
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence

from reference_models.errors import ModelError
from reference_models.text.base import BLANKS, LOWER, WHITE_SPACE, Added, Tokenizer, unescaped
from reference_models.text.bpe import BYTE_LETTERS, SHADOW, BytePairs
from reference_models.text.unigram import Charsmap, Unigram

# GPT-2's cut, on SHADOW: endings, words, numbers, other signs, each with the space before it; of
# white space before a word the last one is left to the word
WORDS = re.compile(
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\t-\r a-zA-Z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+"
)
LETTERS = dict(enumerate(BYTE_LETTERS))
# a class of characters, white space or a space, perhaps repeated: what Replace may look for
SIMPLE = re.compile(r"(\[(?:\\[^\w\s]|[^\\\[\]^&-])+\]|\\s| )(\+|\{\d{1,3},\})?")
PUNCTUATION = str.maketrans("", "", string.punctuation)
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
Frame = tuple[Sequence[int], ...]


def _plain(text: str) -> str:
    return " ".join(unescaped(text).split())


# What is done to a text before its tokenizer's own normalizer. SigLIP's models read lowered texts,
# as Siglip2Tokenizer and SiglipTokenizer make them; the other three are open_clip's (whose repair
# of mis-decoded text is left out).
CLEAN: dict[str, Callable[[str], str]] = {
    "siglip2": lambda text: text.translate(LOWER),
    "siglip": lambda text: " ".join(text.lower().translate(PUNCTUATION).split()),
    "canonicalize": lambda text: " ".join(_plain(text).replace("_", " ").translate(PUNCTUATION).lower().split()),
    "lower": lambda text: _plain(text).lower(),
    "whitespace": _plain,
}


# A normalizer is a function of a text; a pre-tokenizer one of a text and of whether it comes first.
def _replace(part: dict) -> Callable:
    content, pattern = part["content"], part["pattern"]
    literal = pattern.get("String") or ""
    "".replace(literal, content)  # a TypeError now rather than with the first text
    if literal:
        return lambda text: text.replace(literal, content)
    simple = SIMPLE.fullmatch(pattern["Regex"])
    if simple is None:
        raise ValueError(f"the expression {pattern['Regex']!r} is more than a class of characters")
    known = re.compile((f"[{WHITE_SPACE}]" if simple[1] == r"\s" else simple[1]) + (simple[2] or ""))
    return lambda text: known.sub(lambda _: content, text)


def _strip(part: dict) -> Callable:
    left, right = (BLANKS if part[side] else "" for side in ("strip_left", "strip_right"))
    return lambda text: text.lstrip(left).rstrip(right)


def _charsmap(part: dict) -> Callable:
    return Charsmap(base64.b64decode(part["precompiled_charsmap"], validate=True), part["where"]).by_cluster


NORMALIZERS = {"Precompiled": _charsmap, "Replace": _replace, "Strip": _strip}
NORMALIZERS["Lowercase"] = lambda part: CLEAN["siglip2"]


def _byte_level(part: dict) -> Callable:
    prefix, cut = part["add_prefix_space"], part.get("use_regex", True)

    def words(text: str, first: bool) -> Iterable[str]:
        text = f" {text}" if prefix and not text.startswith(" ") else text
        spans = [match.span() for match in WORDS.finditer(text.translate(SHADOW))] if cut else [(0, None)]
        return (text[a:b].encode("utf-8", "replace").decode("latin-1").translate(LETTERS) for a, b in spans)

    return words


def _metaspace(part: dict) -> Callable:
    mark, scheme = part["replacement"], part.get("prepend_scheme")
    scheme = scheme or ("always" if part.get("add_prefix_space", True) else "never")
    if len(mark) != 1 or scheme not in ("always", "first", "never"):
        raise ValueError(f"replacement {mark!r} with prepend_scheme {scheme!r}")
    words = re.compile(f"{re.escape(mark)}[^{re.escape(mark)}]*|[^{re.escape(mark)}]+")

    def marked(text: str, first: bool) -> Iterable[str]:
        text = text.replace(" ", mark)
        wanted = scheme == "always" or (scheme == "first" and first)
        text = mark + text if wanted and not text.startswith(mark) else text
        return words.findall(text) if part.get("split", True) else [text]

    return marked


def _split(part: dict) -> Callable:
    mark = part["pattern"]["String"]
    if len(mark) != 1 or part["behavior"] != "MergedWithPrevious" or part.get("invert"):
        raise ValueError("known only at one character that stays with the text before it")
    pieces = re.compile(f"[^{re.escape(mark)}]*{re.escape(mark)}|[^{re.escape(mark)}]+")
    return lambda text, first: pieces.findall(text)


PRE_TOKENIZERS = {"ByteLevel": _byte_level, "Metaspace": _metaspace, "Split": _split}
PRE_TOKENIZERS["WhitespaceSplit"] = lambda part: lambda text, first: re.split(f"[{WHITE_SPACE}]+", text)


def flat(part: object, key: str, where: str) -> list[dict]:
    """A part of tokenizer.json as a list of parts: none, itself, or those of its sequence."""
    if part is None:
        return []
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise ModelError(f"{where}, key {key}: expected an object with a `type`, not {part!r:.80}")
    if part["type"] != "Sequence":
        return [part]
    inner = part.get({"pre_tokenizer": "pretokenizers"}.get(key, f"{key}s"))
    if not isinstance(inner, list):
        raise ModelError(f"{where}, key {key}: a Sequence without its list")
    return [one for entry in inner for one in flat(entry, key, where)]


def steps(part: object, key: str, known: Mapping[str, Callable], where: str) -> list[Callable]:
    """The functions of a part's parts; ModelError naming one that is not known or not whole."""
    made = []
    for one in flat(part, key, where):
        if one["type"] not in known:
            raise ModelError(f"{where}, key {key}: {one['type']} is not supported, only {', '.join(known)}")
        try:
            made.append(known[one["type"]](one | {"where": f"{where}, key {key}"}))
        except MALFORMED as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ModelError(f"{where}, key {key}, {one['type']}: {reason}") from None
    return made


def frames(part: object, where: str) -> tuple[Frame, Frame]:
    """(single, pair) of a post_processor: the ids before, between and after a text, or two."""
    parts = [one for one in flat(part, "post_processor", where) if one["type"] != "ByteLevel"]
    if not parts:
        return ((), ()), ((), (), ())
    try:
        (one,) = parts
        if one["type"] in ("BertProcessing", "RobertaProcessing"):
            cls, sep = (one["cls"][1],), (one["sep"][1],)
            return (cls, sep), (cls, sep if one["type"] == "BertProcessing" else sep * 2, sep)
        single, pair = [[]], [[]]
        for runs, template in ((single, one["single"]), (pair, one["pair"])):
            for ((kind, piece),) in (entry.items() for entry in template):
                if kind != "Sequence":
                    runs[-1] += one["special_tokens"][piece["id"]]["ids"]
                elif piece["id"] == "AB"[len(runs) - 1]:
                    runs.append([])
        if (len(single), len(pair), one["type"]) != (2, 3, "TemplateProcessing"):
            raise ValueError
    except MALFORMED:
        raise ModelError(f"{where}, key post_processor: {part!r:.300} does not frame texts A and B") from None
    return tuple(map(tuple, single)), tuple(map(tuple, pair))


class PipelineTokenizer(Tokenizer):
    """The tokenizer of a tokenizer.json, `data`, or of other files put in its words. clean: what is
    done to a text first. config: of tokenizer_config.json. files: what `save` writes beside it, as
    it was read. Raises ModelError naming file and key of what is not known."""

    special = ()

    def __init__(
        self, data: dict, model: BytePairs | Unigram, pad: str, max_length: int, where: str, added: Mapping[str, Added],
        clean: Callable[[str], str] | None, config: dict, files: dict[str, bytes],
    ):  # fmt: skip
        self.kind, self.model, self.config, self.files = model.kind, model, config, files
        self._steps = steps(data.get("normalizer"), "normalizer", NORMALIZERS, where)
        self._cuts = steps(data.get("pre_tokenizer"), "pre_tokenizer", PRE_TOKENIZERS, where)
        if clean:  # around the special tokens, which it would take apart
            self._steps.insert(0, clean)
            added = {token: entry._replace(normalized=False) for token, entry in added.items()}
        super().__init__(model.vocab, added, max_length, where)
        self.single, self.pair = frames(data.get("post_processor"), where)
        for i in (i for frame in (self.single, self.pair) for run in frame for i in run):
            if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < self.vocab_size:
                raise ModelError(f"{where}, key post_processor: {i!r:.80} is no id of {self.vocab_size} tokens")
        if pad not in self.vocab:
            raise ModelError(f"{where}: no token {pad!r:.80} for padding; name `pad_token` in tokenizer_config.json")
        bos, eos = (self.vocab.get(named_token(self.config, name)) for name in ("bos_token", "eos_token"))
        self.bos_id = self.single[0][0] if self.single[0] else bos
        self.eos_id = self.single[1][-1] if self.single[1] else eos
        self.pad_id = self.vocab[pad]

    def _normalize(self, text: str) -> str:
        for step in self._steps:
            text = step(text)
        return text

    def _chunks(self, text: str, first: bool = False) -> Iterable[str]:
        pieces = [text]
        for cut in self._cuts:
            pieces = [one for i, piece in enumerate(pieces) for one in cut(piece, first and i == 0) if one]
        return filter(None, pieces)

    def _chunk(self, chunk: str) -> Iterable[int]:
        return self.model.ids(chunk)

    def _saved(self) -> tuple[dict[str, bytes], dict]:
        return self.files, self.config


def named_token(config: Mapping, name: str) -> str | None:
    """A token that tokenizer_config.json names, as text or as an object with its `content`."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None
