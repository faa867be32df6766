"""RoBERTa's, XLM-R's, SigLIP's, Gemma's and MPNet's tokenizers against the tokenizers library and transformers.

No published vocabulary of these lies here: the trainers make small ones, in the published pipelines.
"""

import base64
import copy
import json
from pathlib import Path

import pytest

from reference_models.errors import ModelError
from reference_models.text.pipeline import CLEAN
from reference_models.text.tokenizers import load_tokenizer
from reference_models.text.unigram import Charsmap, Unigram
from tests.reference_models.test_tokenizers import Counted, unicode8
from tests.support.vocabularies import MADE, TEXTS, gemma, roberta, sentencepiece_model, siglip, strings, xlm_roberta

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (ours, theirs, folder with the tokenizer.json)."""

    def make(kind):
        if kind not in known:
            theirs, folder = MADE[kind](), tmp_path_factory.mktemp("tokenizer")
            theirs.save(str(folder / "tokenizer.json"))
            known[kind] = load_tokenizer(folder), theirs, folder
        return known[kind]

    known = {}
    return make


def different(ours, theirs, texts) -> list[str]:
    """Texts whose ids are not the library's, or transformers'."""
    ids = theirs if callable(theirs) else theirs.encode
    wanted = [ids(text) for text in texts]
    wanted = [one["input_ids"] if callable(theirs) else one.ids for one in wanted]
    return [ascii(text) for text, one in zip(texts, wanted, strict=True) if ours.encode(text) != one]


@pytest.mark.parametrize("kind", MADE)
class TestAgainstTokenizers:
    def test_600_strings_of_many_scripts_are_equal(self, kind, made):
        ours, theirs, _ = made(kind)
        texts = strings(600)
        assert len(set(texts)) > 550
        assert different(ours, theirs, texts) == []
        first = theirs.encode("a").ids
        assert (ours.eos_id, ours.vocab_size) == (first[-1], theirs.get_vocab_size())
        assert ours.bos_id in (first[0], None) and ours.tokens[ours.pad_id] in ("<pad>", "</s>")

    def test_pairs_are_equal(self, kind, made):
        ours, theirs, _ = made(kind)
        texts = strings(200, seed=1)
        for first, second in zip(texts, texts[1:], strict=False):
            assert ours._frame(ours.text_ids(first), ours.text_ids(second)) == theirs.encode(first, second).ids

    def test_saved_files_give_the_same_ids(self, kind, made, tmp_path):
        ours, theirs, _ = made(kind)
        ours.save(tmp_path)
        again = load_tokenizer(tmp_path)
        wanted = (ours.kind, ours.vocab, ours.pad_id, ours.eos_id, ours.max_length)
        assert (again.kind, again.vocab, again.pad_id, again.eos_id, again.max_length) == wanted
        # a vocab.txt cannot say that a token is looked for after cleaning, but tokenizer_config.json does
        assert different(again, theirs, strings(100, seed=2)) == []

    @pytest.mark.slow
    def test_20000_strings_are_equal(self, kind, made):
        assert different(*made(kind)[:2], strings(20_000, seed=3)) == []

    @pytest.mark.slow
    def test_every_code_point_of_unicode_8_is_equal(self, kind, made):
        texts = [f"A{chr(code)}B {chr(code)} ﬁ{chr(code)}²{chr(code)}!" for code in unicode8()]
        assert different(*made(kind)[:2], texts) == []

    def test_no_code_point_crashes(self, kind, made):
        ours = made(kind)[0]
        for start in range(0, 0x110000, 4096):
            ids = ours.encode("".join(map(chr, range(start, start + 4096, 31))) + " \ud800 x")
            assert all(0 <= i < ours.vocab_size for i in ids)


# ---- folders as transformers writes them


def test_a_roberta_of_vocab_json_and_merges_txt_is_transformers(tmp_path):
    model = json.loads(roberta().to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    texts = [text for text in strings(300) if "<mask>" not in text]
    for prefix in (False, True):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
        theirs = transformers.RobertaTokenizer.from_pretrained(tmp_path)
        ours = load_tokenizer(tmp_path)
        assert different(ours, theirs, texts) == []
        assert (ours.bos_id, ours.pad_id, ours.eos_id, ours.max_length) == (0, 1, 2, 512)
        theirs.save_pretrained(tmp_path / "whole")
        assert different(load_tokenizer(tmp_path / "whole"), theirs, strings(300)) == []
        ours.save(tmp_path / "ours")
        assert sorted(file.name for file in (tmp_path / "ours").iterdir())[0] == "merges.txt"
        assert different(load_tokenizer(tmp_path / "ours"), theirs, texts) == []
    # as the published tokenizer.json has it, and as RoBERTa was trained: the space belongs to <mask>
    assert ours.text_ids("a <mask>") == [*ours.text_ids("a"), ours.vocab["<mask>"]]


def test_an_mpnet_of_vocab_txt_has_its_own_special_tokens(tmp_path, made):
    ours = made("mpnet")[0]
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token in ours.tokens))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "MPNetTokenizer"}')
    theirs, again = transformers.MPNetTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert different(again, theirs, [text for text in strings(300) if "<S>" not in text]) == []
    assert (again.bos_id, again.pad_id, again.eos_id) == (0, 1, 2)
    batch = again(["a b", "a"], ["b", "b"])
    assert set(batch) == {"input_ids", "attention_mask"}
    a, b = again.vocab["a"], again.vocab["b"]
    assert batch["input_ids"].tolist() == [[0, a, b, 2, 2, b, 2], [0, a, 2, 2, b, 2, 1]]


def test_siglip_2_lowers_texts_although_its_files_name_gemmas_class(tmp_path):
    model = json.loads(gemma().to_str())["model"]
    pairs = [tuple(pair) for pair in model["merges"]]
    ends = {"add_bos_token": False, "add_eos_token": True}
    lowering = transformers.Siglip2Tokenizer(vocab=model["vocab"], merges=pairs, **ends)
    lowering.save_pretrained(tmp_path / "siglip2")
    assert different(load_tokenizer(tmp_path / "siglip2"), lowering, strings(300)) == []
    transformers.GemmaTokenizer(vocab=model["vocab"], merges=pairs, **ends).save_pretrained(tmp_path / "published")
    assert different(load_tokenizer(tmp_path / "published"), lowering, ["Ab"]) == ["'Ab'"]
    (tmp_path / "published" / "config.json").write_text('{"model_type": "siglip"}')
    ours = load_tokenizer(tmp_path / "published")
    assert different(ours, lowering, strings(300)) == []
    assert (ours.pad_id, ours.eos_id, ours.max_length) == (0, 1, 64)
    ours.save(tmp_path / "run")
    assert different(load_tokenizer(tmp_path / "run"), lowering, strings(300)) == []
    assert different(ours, transformers.AutoTokenizer.from_pretrained(tmp_path / "run"), strings(300)) == []


def test_siglip_lowers_texts_and_drops_punctuation(tmp_path, made):
    (tmp_path / "spiece.model").write_bytes(sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1))
    theirs = transformers.SiglipTokenizer(str(tmp_path / "spiece.model"))
    theirs.save_pretrained(tmp_path / "folder")
    with pytest.raises(ModelError, match=r"spiece.model: needs a tokenizer.json .*T5Tokenizer"):
        load_tokenizer(tmp_path / "folder")
    siglip().save(str(tmp_path / "folder" / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "folder")
    assert (ours.pad_id, ours.eos_id, ours.max_length) == (1, 1, 64)
    # sentencepiece normalizes by longest match, the tokenizers library by cluster: the same here
    texts = [TEXTS[i] for i in (0, 1, 2, 3, 5, 6, 7, 8, 16, 17, 18)] + ["A_b, c!", "", "?!", "Two  Words\n", "ΑΣ Σ"]
    assert different(ours, theirs, texts) == []
    ours.save(tmp_path / "run")
    assert different(load_tokenizer(tmp_path / "run"), theirs, texts) == []


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace", "lower"])
def test_texts_are_cleaned_as_open_clip_does(clean, made, tmp_path):
    tokenizer = pytest.importorskip("open_clip").tokenizer
    for kind, pad in (("xlm-roberta", "<pad>"), ("roberta", "<pad>")):
        folder = tmp_path / kind
        made(kind)[0].save(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"tokenizer_class": "TokenizersBackend", "pad_token": pad}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": {"clean": clean} if clean != "whitespace" else {}}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"text_cfg": text}}))
        theirs = tokenizer.HFTokenizer(str(folder), context_length=40, clean=clean)
        ours, texts = load_tokenizer(folder), ["A  Dog_house, isn't it?", "Salt &amp;amp; pepper\n", *TEXTS[1:3]]
        assert ours(texts, padding=40)["input_ids"].tolist() == theirs(texts).tolist()


@pytest.mark.parametrize("clean", CLEAN)
def test_an_entity_of_thousands_of_digits_is_text(clean):
    assert "1" * 6000 in CLEAN[clean](f"A dog &#{'1' * 6000};")


# ---- what is refused


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelError) as caught:
        load_tokenizer(folder)
    for word in (str(folder), *words):
        assert word in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("key", "part", "word"),
    [
        ("normalizer", {"type": "StripAccents"}, "StripAccents is not supported"),
        ("normalizer", {"type": "Sequence", "normalizers": [{"type": "Nmt"}]}, "Nmt"),
        ("normalizer", {"type": "Sequence"}, "without its list"),
        ("normalizer", {"type": "Replace", "content": ""}, "'pattern' is missing"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "(a|b)+"}, "content": ""}, "(a|b)+"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "!"}, "Precompiled"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "AAEAAAAA"}, "damaged"),
        ("normalizer", ["NFC"], "`type`"),
        ("pre_tokenizer", {"type": "Digits"}, "Digits is not supported"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated"}, "'String' is missing"),
        ("pre_tokenizer", {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}, "stays with the text"),
        ("pre_tokenizer", {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "last"}, "'last'"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "'add_prefix_space' is missing"),
        ("post_processor", {"type": "TemplateProcessing", "single": [], "pair": []}, "does not frame"),
        ("post_processor", {"type": "RobertaProcessing", "cls": ["<s>", 0], "sep": ["</s>", 9999]}, "9999"),
        ("post_processor", {"type": "RobertaProcessing", "cls": ["<s>", 0]}, "does not frame"),
        ("model", {"type": "WordLevel", "vocab": {}}, "WordLevel"),
        ("model", {"type": "Unigram", "vocab": {}}, "model.vocab"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0]]}, "model.unk_id"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 1}, "model.unk_id"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0], ["a", 0.0]], "unk_id": 0}, "entry 2"),
        ("model", {"type": "Unigram", "vocab": [["a", 0.0], ["b", None]], "unk_id": 0}, "entry 2"),
        ("model", {"type": "Unigram", "vocab": [["a", float("nan")]], "unk_id": 0}, "entry 1"),
        ("model", {"type": "Unigram", "vocab": [["a", 10**400]], "unk_id": 0}, "entry 1"),
        ("added_tokens", [{"id": 0, "content": "<s>", "single_word": True}], "single_word"),
        ("added_tokens", [{"id": 9999, "content": "<x>"}], "ids must be"),
        ("added_tokens", ["<s>"], "added token"),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": " "}, "content": 1}, "Replace"),
        ("normalizer", {"type": "Replace", "pattern": {"String": [1]}, "content": ""}, "Replace"),
        ("model", {"type": ["BPE"], "vocab": {}}, "model.type"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": 5}, "model.merges"),
    ],
)
def test_a_part_that_is_not_known_or_not_whole_is_refused_by_name(key, part, word, made, tmp_path):
    data = json.loads((made("xlm-roberta")[2] / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(data | {key: part}))
    refused(tmp_path, word, "" if key == "added_tokens" else key)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("dropout", 0.1, "model.dropout"), ("ignore_merges", True, "model.ignore_merges"),
        ("continuing_subword_prefix", "##", "continuing_subword_prefix"), ("unk_token", "<none>", "'<none>'"),
        ("merges", [["a", "zzz"]], "'zzz'"), ("merges", ["a b c"], "entry 1"), ("merges", [["▁", "t"]] * 2, "twice"),
        ("vocab", {"a": 0, "b": 0}, "already taken"), ("vocab", ["a"], "model.vocab"),
    ],
)  # fmt: skip
def test_a_bpe_that_is_not_known_or_damaged_is_refused(key, value, word, made, tmp_path):
    data = json.loads((made("gemma")[2] / "tokenizer.json").read_text())
    data["model"][key] = value
    if key == "vocab":
        data["model"] |= {"merges": [], "unk_token": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    refused(tmp_path, word)


def test_a_padding_token_that_is_nowhere_is_asked_for(made, tmp_path):
    made("roberta")[0].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<none>"}')
    refused(tmp_path, "'<none>'", "pad_token")
    for settings in ('{"clean": "soap"}', '{"clean": ["soap"]}'):
        (tmp_path / "tokenizer_config.json").write_text(settings)
        refused(tmp_path, "key clean", "soap")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": NaN}')
    refused(tmp_path, "model_max_length")
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": 5, "tokenizer_class": []}')
    assert load_tokenizer(tmp_path).kind == "bpe"  # a tokenizer.json says itself which tokens are added
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": {"content": "</s>"}}')
    assert load_tokenizer(tmp_path).pad_id == 2


def test_a_charsmap_that_points_outside_itself_is_named_when_it_is_met(tmp_path, made):
    data = json.loads((made("xlm-roberta")[2] / "tokenizer.json").read_text())
    whole = base64.b64decode(data["normalizer"]["precompiled_charsmap"])
    cut = (64).to_bytes(4, "little") + whole[4:68] + b"a\0"
    data["normalizer"]["precompiled_charsmap"] = base64.b64encode(cut).decode()
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match=r"tokenizer.json, key normalizer: the charsmap is damaged"):
        load_tokenizer(tmp_path).encode("abc é")


# ---- work


@pytest.mark.parametrize("letters", ["abc", " ", "\u0301", "e\u0301", "<", "▁", "\u4e99", " \t"])
@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "gemma", "siglip"])
def test_a_text_of_10000_letters_is_equal_and_costs_a_few_looks_per_letter(kind, letters, made):
    ours, theirs, _ = made(kind)
    text = (letters * 10_000)[:10_000] + "<mask>"
    assert different(ours, theirs, [text]) == []
    counted = copy.copy(ours)
    counted._cache, counted.model = {}, copy.copy(ours.model)
    name = "scores" if kind in ("xlm-roberta", "siglip") else "ranks"
    looked = Counted(getattr(ours.model, name))
    setattr(counted.model, name, looked)
    assert counted.encode(text) == ours.encode(text)
    longest = max(map(len, ours.vocab)) if name == "scores" else 4
    assert looked.asked <= longest * len(text.encode())


def test_the_best_cut_is_the_best_of_all():
    """By hand: of the cuts of "abc" the most probable one, although the greedy one is another."""
    pieces = [["<unk>", 0.0], ["a", -3.0], ["ab", -1.0], ["bc", -1.5], ["c", -3.0]]
    model = Unigram(pieces, 0, "here")
    assert model.cut("abc") == ["ab", "c"] and model.ids("abc") == [2, 4]  # -4, against a + bc: -4.5
    pieces[3][1] = -0.5
    assert Unigram(pieces, 0, "here").cut("abc") == ["a", "bc"]  # -3.5
    assert model.cut("xyabz") == ["xy", "ab", "z"] and model.ids("xyabz") == [0, 2, 0]
    codes = [[f"<0x{byte:02X}>", -9.0] for byte in range(256)]
    assert Unigram(pieces + codes, 0, "here", byte_fallback=True).ids("aé") == [1, 5 + 0xC3, 5 + 0xA9]


def test_a_charsmap_gives_every_entry_that_begins_a_text_the_shortest_first():
    data = json.loads(xlm_roberta().to_str())["normalizer"]["precompiled_charsmap"]
    charsmap = Charsmap(base64.b64decode(data), "here")
    assert list(charsmap.matches("ｶﾞ".encode())) == [(3, "カ"), (6, "ガ")]
    assert charsmap.by_cluster("ﬁ\u0301 Å ½") == "fi Å 1⁄2"  # the accent is lost, as there
