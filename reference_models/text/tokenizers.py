"""Text to ids: WordPiece (BERT) and CLIP's byte-pair encoding, from the files that
checkpoints come with.

    tokenizer = load_tokenizer("bert-base-uncased")            # directory or file
    batch = tokenizer(["what colour is it?"], pairs=["red"])   # int64 tensors (B, T)

A directory may hold tokenizer.json, vocab.txt, vocab.json + merges.txt or
bpe_simple_vocab_16e6.txt.gz (looked for in this order, as transformers does); tokenizer_config.json
beside them sets lower-casing, lengths and padding.
"""

import gzip
import re
import zlib
from pathlib import Path

from reference_models.errors import ModelError
from reference_models.text.base import Tokenizer
from reference_models.text.bpe import MERGES, WORD_END, ClipTokenizer
from reference_models.text.textfiles import decode_utf8, read_json, read_text
from reference_models.text.wordpiece import WordPieceTokenizer, build_wordpiece_vocab

__all__ = ["ClipTokenizer", "Tokenizer", "WordPieceTokenizer", "build_wordpiece_vocab", "load_tokenizer"]

NAMES = ("tokenizer.json", "vocab.txt", "vocab.json", "bpe_simple_vocab_16e6.txt.gz")
# transformers' classes whose algorithm is one of the two here
CLASSES = r"((Bert|DistilBert|Electra|MobileBert|CLIP|PreTrained)Tokenizer(Fast)?|TokenizersBackend)?"
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
# parts of tokenizer.json as they must be: types, and the special tokens around A text
BERT_PARTS = {"pre_tokenizer": ["BertPreTokenizer"], "post_processor": ["[CLS]", "A", "[SEP]"]}
CLIP_PARTS = {"normalizer": ["NFC", "Replace", "Lowercase"], "pre_tokenizer": ["Split", "ByteLevel"]}
CLIP_PARTS |= {"post_processor": ["<|startoftext|>", "A", "<|endoftext|>"]}
OPEN_END = 1_000_000  # transformers writes 1e30 for "no limit"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file or directory. Raises ModelError naming the file and the line or
    key that is wrong."""
    path = Path(path)
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise ModelError(f"{path}: no tokenizer here; looked for {', '.join(NAMES)}")
        path = found
    if not path.is_file():
        raise ModelError(f"{path}: no such tokenizer file or directory")
    settings = path.with_name("tokenizer_config.json")
    config = read_json(settings) if settings.is_file() and settings != path else {}
    _check_class(path, config, settings)
    if path.suffix == ".gz":
        return ClipTokenizer(_read_gz(path), where=str(path), **_clip_options(config, settings))
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    if path.suffix == ".json":
        data = read_json(path, unique=True)
        if "model" in data and not isinstance(data["model"], int):
            return _from_tokenizer_json(data, path, config, settings)
        merges = path.with_name("merges.txt")
        if not merges.is_file():
            raise ModelError(f"{merges}: missing; {path.name} needs its merge list beside it")
        return ClipTokenizer(_read_merges(merges), data, where=str(path), **_clip_options(config, settings))
    return WordPieceTokenizer(_read_vocab(path), where=str(path), **_wordpiece_options(config, settings))


def _check_class(path: Path, config: dict, settings: Path) -> None:
    """ModelError where the files beside a vocabulary name a tokenizer that cuts words in another
    way; tokenizer.json says itself how it does."""
    beside = path.with_name("config.json")
    files = {settings: config, beside: read_json(beside) if beside.is_file() else {}}
    for file, data in files.items():
        name = data.get("tokenizer_class") or ""
        known = path.suffix == ".json" and path.name != "vocab.json" and "Japanese" not in str(name)
        if not known and not re.fullmatch(CLASSES, str(name)):
            raise ModelError(f"{file}, key tokenizer_class: {name} cuts texts in another way than BERT's or CLIP's")
        for key, usual in (("word_tokenizer_type", "basic"), ("subword_tokenizer_type", "wordpiece")):
            if data.get(key, usual) != usual:
                raise ModelError(f"{file}, key {key}: {data[key]!r} is not supported, only {usual!r}")


def _read_vocab(path: Path) -> list[str]:
    lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    for number, line in enumerate(lines, 1):
        if not line:
            raise ModelError(f"{path}, line {number}: empty; a vocabulary has one token on every line")
    return lines


def _parse_merges(lines: list[str], path: Path) -> list[tuple[str, str]]:
    # CLIP's first line is `"bpe_simple_vocab...#version: 0.2`
    start = 1 if lines and "#version" in lines[0] else 0
    merges = []
    for number, line in enumerate(lines[start:], start + 1):
        pair = tuple(line.removesuffix("\r").split(" "))
        if len(pair) != 2 or not all(pair):
            raise ModelError(f"{path}, line {number}: a merge is two pieces with one space between, not {line[:80]!r}")
        merges.append(pair)
    return merges


def _read_merges(path: Path) -> list[tuple[str, str]]:
    return _parse_merges(read_text(path).rstrip("\r\n").split("\n"), path)


def _read_gz(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path) as file:
            data = file.read(1 << 26)  # the real one is 3 MB; a bomb stops here
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"{path}: not a complete gzip file ({error})") from None
    lines = decode_utf8(data, path).split("\n")
    return _parse_merges([line for line in lines[: MERGES + 1] if line], path)


def _from_tokenizer_json(data: dict, path: Path, config: dict, settings: Path) -> Tokenizer:
    model = data["model"]
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ModelError(f"{path}, key model.vocab: expected an object of token: id")
    added = _added(data.get("added_tokens") or [], path)
    kind = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if kind == "WordPiece":
        _check_parts(data, BERT_PARTS, path)
        options = _wordpiece_options(config, settings) | _normalizer_options(data.get("normalizer"), path)
        if model.get("continuing_subword_prefix", "##") != "##":
            raise ModelError(f"{path}, key model.continuing_subword_prefix: only '##' is known")
        options |= {"added": added, "max_word": model.get("max_input_chars_per_word", 100)}
        return WordPieceTokenizer(model["vocab"], where=str(path), **options)
    if kind == "BPE" and model.get("end_of_word_suffix") == WORD_END:
        _check_parts(data, CLIP_PARTS, path)
        lines = [m if isinstance(m, str) else " ".join(map(str, m)) for m in model.get("merges") or []]
        options = _clip_options(config, settings) | {"added": added}
        return ClipTokenizer(_parse_merges(lines, path), model["vocab"], where=str(path), **options)
    raise ModelError(f"{path}, key model.type: {kind!r} is neither WordPiece (BERT) nor CLIP's byte-pair encoding")


def _check_parts(data: dict, wanted: dict[str, list[str]], path: Path) -> None:
    """ModelError where tokenizer.json prepares or frames texts in another way than the tokenizer
    that its model is read as. A part that is left out is taken to be the usual one."""
    for key in (key for key in wanted if key in data):
        try:
            found = (_framed if key == "post_processor" else _types)(data[key])
        except (AttributeError, KeyError, TypeError, IndexError):
            found = None
        if found != wanted[key]:
            raise ModelError(f"{path}, key {key}: {found or data[key]!r} is not supported, only {wanted[key]}")


def _types(part: dict) -> list[str]:
    """The types of a part, or of those in a sequence; CLIP's patterns must be CLIP's."""
    parts = part.get("normalizers") or part.get("pretokenizers") if part["type"] == "Sequence" else [part]
    for one in parts:
        pattern = one.get("pattern", {}).get("Regex", "")
        if not {"Split": pattern.endswith(CLIP_WORDS), "Replace": pattern == r"\s+"}.get(one["type"], True):
            return [f"{one['type']} at {pattern}"]
    return [one["type"] for one in parts]


def _framed(part: dict) -> list[str]:
    """What stands around one text, "A"; for BERT's a pair must be framed and numbered as usual."""
    if part["type"] in ("BertProcessing", "RobertaProcessing"):
        return [part["cls"][0], "A", part["sep"][0]]
    single, pair = ([(e["id"], e["type_id"]) for piece in part[k] for e in piece.values()] for k in ("single", "pair"))
    first, last = single[0][0], single[-1][0]
    usual = first != "[CLS]" or pair == [(first, 0), ("A", 0), (last, 0), ("B", 1), (last, 1)]
    return [name for name, _ in (single if usual else pair)]


def _normalizer_options(normalizer: object, path: Path) -> dict:
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        raise ModelError(f"{path}, key normalizer.type: WordPiece is read with BertNormalizer only")
    return {
        "lowercase": normalizer.get("lowercase", True),
        "strip_accents": normalizer.get("strip_accents"),
        "split_cjk": normalizer.get("handle_chinese_chars", True),
    }


def _added(entries: list | dict, path: Path) -> dict[str, int]:
    """Added tokens from tokenizer.json (a list) or tokenizer_config.json (id -> entry)."""
    if isinstance(entries, dict):
        entries = [{"id": key, **entry} for key, entry in entries.items() if isinstance(entry, dict)]
    try:
        return {entry["content"]: int(entry["id"]) for entry in entries}
    except (KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: an added token needs `content` and a whole-number `id`") from None


def _length(config: dict, settings: Path, default: int) -> int:
    length = config.get("model_max_length", default)
    if isinstance(length, bool) or not isinstance(length, int | float) or length < 2:
        raise ModelError(f"{settings}, key model_max_length: expected a number of tokens, not {length!r}")
    return default if length > OPEN_END else int(length)


def _wordpiece_options(config: dict, settings: Path) -> dict:
    return {
        "lowercase": bool(config.get("do_lower_case", True)),
        "strip_accents": config.get("strip_accents"),
        "split_cjk": bool(config.get("tokenize_chinese_chars", True)),
        "max_length": _length(config, settings, 512),
        "added": _added(config.get("added_tokens_decoder") or {}, settings),
    }


def _clip_options(config: dict, settings: Path) -> dict:
    pad = config.get("pad_id", 0)
    if isinstance(pad, bool) or not isinstance(pad, int):
        raise ModelError(f"{settings}, key pad_id: expected a token id, not {pad!r}")
    return {
        "pad_id": pad,
        "clean_html": bool(config.get("clean_html", False)),
        "max_length": _length(config, settings, 77),
        "added": _added(config.get("added_tokens_decoder") or {}, settings),
    }
