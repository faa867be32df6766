"""Text to ids: WordPiece (BERT, MPNet), byte-pair encoding (CLIP, RoBERTa, SigLIP 2) and Unigram
(XLM-R, SigLIP), from the files that checkpoints come with.

    tokenizer = load_tokenizer("bert-base-uncased")            # directory or file
    batch = tokenizer(["what colour is it?"], pairs=["red"])   # int64 tensors (B, T)

A directory may hold tokenizer.json, vocab.txt, vocab.json + merges.txt or
bpe_simple_vocab_16e6.txt.gz (looked for in this order, as transformers does); tokenizer_config.json
and special_tokens_map.json beside them set lower-casing, lengths, special tokens and padding.
"""

import gzip
import re
import zlib
from pathlib import Path

from reference_models.errors import ModelError
from reference_models.text.base import Added, Tokenizer
from reference_models.text.bpe import MERGES, START, WORD_END, BytePairs, ClipTokenizer
from reference_models.text.pipeline import CLEAN, PipelineTokenizer, flat, frames, named_token
from reference_models.text.textfiles import decode_utf8, read_json, read_text
from reference_models.text.unigram import Unigram
from reference_models.text.wordpiece import SPECIAL_KEYS, SPECIALS, UNK, WordPieceTokenizer, build_wordpiece_vocab

__all__ = ["ClipTokenizer", "Tokenizer", "WordPieceTokenizer", "build_wordpiece_vocab", "load_tokenizer"]

MODELS = ("sentencepiece.bpe.model", "spiece.model")
NAMES = ("tokenizer.json", "vocab.txt", "vocab.json", "bpe_simple_vocab_16e6.txt.gz", *MODELS)
# transformers' classes whose algorithm is one of those here
CLASSES = r"((Bert|DistilBert|Electra|MobileBert|MPNet|CLIP|Roberta|PreTrained)Tokenizer(Fast)?|TokenizersBackend)?"
CLIP_WORDS = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
# parts of tokenizer.json as they must be: their types
BERT_PARTS = {"pre_tokenizer": ["BertPreTokenizer"]}
CLIP_PARTS = {"normalizer": ["NFC", "Replace", "Lowercase"], "pre_tokenizer": ["Split", "ByteLevel"]}
OPEN_END = 1_000_000  # transformers writes 1e30 for "no limit"


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file or directory; ModelError names the file and the wrong line or key."""
    try:
        return _load(Path(path))
    except ModelError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a value that the files of a tokenizer do not have there ({error!s:.200})") from None


def _load(path: Path) -> Tokenizer:
    if path.is_dir():
        found = next((path / name for name in NAMES if (path / name).is_file()), None)
        if found is None:
            raise ModelError(f"{path}: no tokenizer here; looked for {', '.join(NAMES)}")
        path = found
    if not path.is_file():
        raise ModelError(f"{path}: no such tokenizer file or directory")
    if path.suffix == ".model":
        raise ModelError(
            f"{path}: needs a tokenizer.json beside it; transformers' AutoTokenizer.from_pretrained(FOLDER) writes "
            "one by save_pretrained(FOLDER), for SigLIP its T5Tokenizer.from_pretrained(FOLDER, extra_ids=0)"
        )
    settings = path.with_name("tokenizer_config.json")
    config: dict = {}
    for name in ("special_tokens_map.json", settings.name):
        config |= _beside(path, name) if name != path.name else {}
    _check_class(path, config, settings)
    if (_open_clip_texts(path).get("tokenizer_kwargs") or {}).get("strip_sep_token"):
        file = path.with_name("open_clip_config.json")
        raise ModelError(f"{file}, key strip_sep_token: texts without an end token (CLIPA) are not supported")
    if path.suffix == ".gz":
        return ClipTokenizer(_read_gz(path), where=str(path), **_clip_options(config, settings))
    if path.name == "merges.txt":
        path = path.with_name("vocab.json")
    if path.suffix == ".json":
        data = read_json(path, unique=True)
        if "model" in data and not isinstance(data["model"], int):
            return _from_tokenizer_json(data, path, config, settings)
        file = path.with_name("merges.txt")
        if not file.is_file():
            raise ModelError(f"{file}: missing; {path.name} needs its merge list beside it")
        merges = _parse_merges(read_text(file).rstrip("\r\n").split("\n"), file)
        if "<s>" in data and START not in data:
            return _roberta(data, merges, path, config, settings)
        return ClipTokenizer(merges, data, where=str(path), **_clip_options(config, settings))
    vocab = _read_vocab(path)
    options = _wordpiece_options(vocab, config, settings)
    if "<mask>" in vocab:  # MPNet's, which takes the space before it
        options["added"] = {"<mask>": Added(vocab.index("<mask>"), lstrip=True)} | options["added"]
    return WordPieceTokenizer(vocab, where=str(path), **options)


def _beside(path: Path, name: str) -> dict:
    """The JSON file `name` beside a vocabulary; {} where there is none."""
    file = path.with_name(name)
    return read_json(file) if file.is_file() else {}


def _check_class(path: Path, config: dict, settings: Path) -> None:
    """ModelError where the files beside a vocabulary name a tokenizer that cuts words in another
    way; tokenizer.json says itself how it does."""
    for file, data in ((settings, config), (path.with_name("config.json"), _beside(path, "config.json"))):
        name = data.get("tokenizer_class") or ""
        known = path.suffix == ".json" and path.name != "vocab.json" and "Japanese" not in str(name)
        if not known and not re.fullmatch(CLASSES, str(name)):
            raise ModelError(f"{file}, key tokenizer_class: {name} cuts texts in another way than BERT's or CLIP's")
        for key, usual in (("word_tokenizer_type", "basic"), ("subword_tokenizer_type", "wordpiece")):
            if data.get(key, usual) != usual:
                raise ModelError(f"{file}, key {key}: {data[key]!r} is not supported, only {usual!r}")


def _read_vocab(path: Path) -> list[str]:
    lines = [line.removesuffix("\r") for line in read_text(path).removesuffix("\n").split("\n")]
    if "" in lines:
        raise ModelError(f"{path}, line {lines.index('') + 1}: empty; a vocabulary has one token on every line")
    return lines


def _parse_merges(lines: list[str], path: Path) -> list[tuple[str, str]]:
    # CLIP's first line is `"bpe_simple_vocab...#version: 0.2`
    start = 1 if lines and "#version" in lines[0] else 0
    return _pairs([line.removesuffix("\r").split(" ") for line in lines[start:]], f"{path}, line", start + 1)


def _pairs(pairs: list, where: str, first: int = 1) -> list[tuple[str, str]]:
    for i, pair in enumerate(pairs, first):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(piece, str) and piece for piece in pair):
            raise ModelError(f"{where} {i}: a merge is two pieces with one space between, not {pair!r:.80}")
    return list(map(tuple, pairs))


def _read_gz(path: Path) -> list[tuple[str, str]]:
    try:
        with gzip.open(path) as file:
            data = file.read(1 << 26)  # the real one is 3 MB; a bomb stops here
    except (OSError, EOFError, zlib.error) as error:
        raise ModelError(f"{path}: not a complete gzip file ({error})") from None
    lines = decode_utf8(data, path).split("\n")
    return _parse_merges([line for line in lines[: MERGES + 1] if line], path)


def _from_tokenizer_json(data: dict, path: Path, config: dict, settings: Path) -> Tokenizer:
    model, where = data["model"], str(path)
    vocab = model.get("vocab") if isinstance(model, dict) else None
    usual = "Unigram" if isinstance(vocab, list) else "BPE" if "merges" in model else "WordPiece"
    kind, added = model.get("type") or usual, _added(data.get("added_tokens") or [], path)
    if kind not in ("WordPiece", "BPE", "Unigram"):
        raise ModelError(f"{path}, key model.type: {kind!r:.80} is not supported, only WordPiece, BPE and Unigram")
    if not isinstance(vocab, list if kind == "Unigram" else dict):
        wanted = "a list of [piece, score]" if kind == "Unigram" else "an object of token: id"
        raise ModelError(f"{path}, key model.vocab: expected {wanted}")
    if kind == "WordPiece":
        _check_parts(data, BERT_PARTS, path)
        options = _wordpiece_options(vocab, config, settings) | _normalizer_options(data.get("normalizer"), path)
        if model.get("continuing_subword_prefix", "##") != "##":
            raise ModelError(f"{path}, key model.continuing_subword_prefix: only '##' is known")
        options |= {"added": added, "max_word": int(model.get("max_input_chars_per_word", 100))}
        options["special"][1] = model.get("unk_token", UNK)
        return _framed(WordPieceTokenizer(vocab, where=where, **options), data, path)
    files = {"tokenizer.json": path.read_bytes()}
    if kind == "Unigram":
        unigram = Unigram(vocab, model.get("unk_id"), where, bool(model.get("byte_fallback")))
        return _pipeline(data, unigram, path, config, settings, added, files)
    if not isinstance(model.get("merges"), list):
        raise ModelError(f"{path}, key model.merges: expected a list of pairs")
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    merges = _pairs(pairs, f"{path}, key model.merges, entry")
    if model.get("end_of_word_suffix") != WORD_END:
        return _pipeline(data, BytePairs(model, merges, where), path, config, settings, added, files)
    _check_parts(data, CLIP_PARTS, path)
    options = _clip_options(config, settings) | {"added": added}
    return _framed(ClipTokenizer(merges, vocab, where=where, **options), data, path)


def _check_parts(data: dict, wanted: dict[str, list[str]], path: Path) -> None:
    """ModelError where tokenizer.json prepares texts in another way than the tokenizer that its
    model is read as. A part that is left out is taken to be the usual one."""
    for key in (key for key in wanted if key in data):
        found = []
        for part in flat(data[key], key, str(path)):
            pattern = part.get("pattern")
            regex = str(pattern.get("Regex", "")) if isinstance(pattern, dict) else ""
            usual = {"Split": regex.endswith(CLIP_WORDS), "Replace": regex == r"\s+"}.get(part["type"], True)
            found.append(part["type"] if usual else f"{part['type']} at {regex}")
        if found != wanted[key]:
            raise ModelError(f"{path}, key {key}: {found} is not supported, only {wanted[key]}")


def _framed(tokenizer: Tokenizer, data: dict, path: Path) -> Tokenizer:
    """The tokenizer, if tokenizer.json frames a text, or a pair, and numbers it in the same way."""
    part = data.get("post_processor")
    if "post_processor" in data:
        single, pair = frames(part, str(path))
        types = [piece.get("type_id") for entry in part.get("pair", ()) for piece in entry.values()]
        numbered = not tokenizer.has_types or types in ([], [0, 0, 0, 1, 1])
        if single != tokenizer.single or tokenizer.pair not in (None, pair) or not numbered:
            raise ModelError(f"{path}, key post_processor: {part!r:.300} is not supported for {tokenizer.kind}")
    return tokenizer


def _normalizer_options(normalizer: object, path: Path) -> dict:
    if not isinstance(normalizer, dict) or normalizer.get("type") != "BertNormalizer":
        raise ModelError(f"{path}, key normalizer.type: WordPiece is read with BertNormalizer only")
    return {
        "lowercase": normalizer.get("lowercase", True),
        "strip_accents": normalizer.get("strip_accents"),
        "split_cjk": normalizer.get("handle_chinese_chars", True),
    }


def _roberta(vocab: dict, merges: list, path: Path, config: dict, settings: Path) -> Tokenizer:
    """vocab.json and merges.txt of RoBERTa, in the words of tokenizer.json."""
    usual = {"cls": "<s>", "sep": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>"}
    names = {name: named_token(config, f"{name}_token") or token for name, token in usual.items()}
    added = {token: Added(vocab[token], name == "mask") for name, token in names.items() if token in vocab}
    for token in (cls := names["cls"], sep := names["sep"]):
        if token not in vocab:
            raise ModelError(f"{path}: the special token {token!r:.80} is missing; is this a RoBERTa vocabulary?")
    data = {
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": config.get("add_prefix_space", False)},
        "post_processor": {"type": "RobertaProcessing", "cls": [cls, vocab[cls]], "sep": [sep, vocab[sep]]},
    }
    added |= _added(config.get("added_tokens_decoder") or {}, settings)
    files = {"vocab.json": path.read_bytes(), "merges.txt": path.with_name("merges.txt").read_bytes()}
    config = {"tokenizer_class": "RobertaTokenizer"} | config
    return _pipeline(data, BytePairs({"vocab": vocab}, merges, str(path)), path, config, settings, added, files)


def _pipeline(data, model, path: Path, config: dict, settings: Path, added: dict, files: dict) -> Tokenizer:
    """A pipeline with what the files beside it say: cleaning, padding, length."""
    siglip = _beside(path, "config.json").get("model_type") in ("siglip", "siglip2")
    siglip |= str(config.get("tokenizer_class")).startswith("Siglip")
    lowered = any(part["type"] == "Lowercase" for part in flat(data.get("normalizer"), "normalizer", str(path)))
    texts = _open_clip_texts(path)  # open_clip cleans the texts for a tokenizer of the hub
    usual = "whitespace" if texts.get("hf_tokenizer_name") else None
    clean = config.get("clean") or (texts.get("tokenizer_kwargs") or {}).get("clean", usual)
    if siglip and not lowered and clean is None:
        clean = "siglip2" if model.kind == "bpe" else "siglip"
        # the files of SigLIP 2 name Gemma's class, which does not lower
        config |= {"tokenizer_class": "Siglip2Tokenizer"} if model.kind == "bpe" else {}
    if clean is not None and (not isinstance(clean, str) or clean not in CLEAN):
        raise ModelError(f"{settings}, key clean: {clean!r:.80} is none of {', '.join(CLEAN)}")
    config |= {"clean": clean} if clean else {}
    pad = named_token(config, "pad_token") or ("</s>" if siglip and model.kind == "unigram" else "<pad>")
    length = _length(config, settings, 64 if siglip else 512)
    return PipelineTokenizer(data, model, pad, length, str(path), added, CLEAN.get(clean), config, files)


def _open_clip_texts(path: Path) -> dict:
    """open_clip's text_cfg; {} where its file is not beside the vocabulary."""
    data = _beside(path, "open_clip_config.json")
    for key in ("model_cfg", "text_cfg"):
        data = data[key] if isinstance(data.get(key), dict) else {}
    return data


def _added(entries: list | dict, path: Path) -> dict[str, Added]:
    """Added tokens from tokenizer.json (a list) or tokenizer_config.json (id -> entry)."""
    if isinstance(entries, dict):
        entries = [{"id": key, **entry} for key, entry in entries.items() if isinstance(entry, dict)]
    flags = Added._fields[1:]
    try:
        alone = [entry["content"] for entry in entries if entry.get("single_word")]
        found = {entry["content"]: [bool(entry.get(flag, flag == "special")) for flag in flags] for entry in entries}
        added = {entry["content"]: Added(int(entry["id"]), *found[entry["content"]]) for entry in entries}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ModelError(f"{path}: an added token needs `content` and a whole-number `id`") from None
    if alone:
        raise ModelError(f"{path}, added token {alone[0]!r:.80}: single_word is not supported")
    return added


def _length(config: dict, settings: Path, default: int) -> int:
    length = config.get("model_max_length", default)
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 2:
        raise ModelError(f"{settings}, key model_max_length: expected a number of tokens, not {length!r}")
    length = default if length > OPEN_END else int(length)
    sentences = settings.with_name("sentence_bert_config.json")
    told = _beside(settings, sentences.name)
    if told.get("do_lower_case") and not config.get("do_lower_case"):
        raise ModelError(f"{sentences}, key do_lower_case: true, but {settings.name} does not say so")
    longest = told.get("max_seq_length") or length
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 2:
        raise ModelError(f"{sentences}, key max_seq_length: expected a number of tokens, not {longest!r}")
    return min(length, longest)


def _wordpiece_options(vocab: list | dict, config: dict, settings: Path) -> dict:
    mpnet = "<s>" in vocab and "</s>" in vocab
    usual = ("<pad>", UNK, "<s>", "</s>") if mpnet else SPECIALS
    return {
        "special": [named_token(config, name) or token for name, token in zip(SPECIAL_KEYS, usual, strict=True)],
        "separators": 1 + mpnet,
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
