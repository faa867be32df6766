"""Tokenizers against the ones inside transformers, on real questions and on generated strings."""

import copy
import gzip
import json
import random
import time
import unicodedata
from pathlib import Path

import pytest
import torch

from reference_models.errors import ModelError
from reference_models.text.base import MOST_MARKS, longest_first, normalized
from reference_models.text.tokenizers import ClipTokenizer, WordPieceTokenizer, build_wordpiece_vocab, load_tokenizer

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SNIPPETS = """[SEP] [MASK] [CLS] [sep] <|endoftext|> <|startoftext|> <|ENDOFTEXT|> 's 'll 'RE !'s &amp; &lt; İ Σ ΑΣ ß ﬁ
 각 한 中文 ½ Ⅳ ٣ e\u0301\u0323 \u200d \ufeff \ufffd \u0085 \u001c \u2028 don't U.S.A. 3.14 $5 naïve""".split(" ")


@pytest.fixture(scope="module")
def vocab(shared):
    return shared / "vocab"


@pytest.fixture(scope="module")
def pairs_of_tokenizers(vocab):
    """{kind: (ours, theirs)} on the real vocabularies."""
    transformers = pytest.importorskip("transformers")
    bert = load_tokenizer(vocab / "bert-base-uncased-vocab.txt")
    clip = load_tokenizer(vocab / "bpe_simple_vocab_16e6.txt.gz")
    lines = (vocab / "bert-base-uncased-vocab.txt").read_text(encoding="utf-8").splitlines()
    theirs = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(lines)})
    return {
        "wordpiece": (bert, theirs),
        "clip": (clip, transformers.CLIPTokenizer(vocab=clip.vocab, merges=list(clip.ranks))),
    }


@pytest.fixture(scope="module")
def real_texts(shared) -> list[str]:
    """Every string value under a question or answer key of every annotation file, once."""
    texts = set()

    def collect(value, key=""):
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(inner, name)
        elif isinstance(value, list):
            for inner in value:
                collect(inner, key)
        elif isinstance(value, str) and key in TEXT_KEYS:
            texts.add(value)

    for folder in ("vqav2_small", "daquar_small", "easy_vqa", "visual7w_small"):
        for path in sorted((shared / folder).glob("*.json")):
            collect(json.loads(path.read_text(encoding="utf-8")))
    return sorted(texts)


TEXT_KEYS = {"question", "answer", "multiple_choice_answer", "multiple_choices", "answers"}


def unicode8() -> list[int]:
    """Code points that the reference's Unicode tables know."""
    points = []
    for line in Path(__file__).with_name("unicode8.txt").read_text().splitlines()[1:]:
        for span in line.split():
            first, _, last = span.partition("-")
            points += range(int(first, 16), int(last or first, 16) + 1)
    return points


def generated(count: int, seed: int) -> list[str]:
    rng, points = random.Random(seed), unicode8()
    low = [code for code in points if code < 0x3000]

    def piece() -> str:
        kind = rng.random()
        if kind < 0.4:
            return chr(rng.randrange(32, 127))
        if kind < 0.5:
            return rng.choice(SNIPPETS)
        return chr(rng.choice(points if kind < 0.75 else low))

    return ["".join(piece() for _ in range(rng.randrange(24))) for _ in range(count)]


def differences(tokenizers, texts) -> list[str]:
    ours, theirs = tokenizers
    expected = theirs(texts)["input_ids"]
    return [ascii(text) for text, ids in zip(texts, expected, strict=True) if ours.encode(text) != ids]


@pytest.mark.parametrize("kind", ["wordpiece", "clip"])
class TestAgainstTransformers:
    def test_every_real_question_and_answer_is_equal(self, kind, pairs_of_tokenizers, real_texts):
        assert len(real_texts) > 3000
        assert differences(pairs_of_tokenizers[kind], real_texts) == []

    def test_generated_strings_are_equal(self, kind, pairs_of_tokenizers):
        assert differences(pairs_of_tokenizers[kind], generated(4000, seed=1)) == []

    @pytest.mark.slow
    def test_100000_generated_strings_are_equal(self, kind, pairs_of_tokenizers):
        assert differences(pairs_of_tokenizers[kind], generated(100_000, seed=2)) == []

    @pytest.mark.slow
    def test_every_code_point_of_unicode_8_is_equal(self, kind, pairs_of_tokenizers):
        texts = [f"A{chr(code)}B {chr(code)} 7{chr(code)}!" for code in unicode8()]
        assert differences(pairs_of_tokenizers[kind], texts) == []

    def test_no_code_point_crashes(self, kind, pairs_of_tokenizers):
        ours = pairs_of_tokenizers[kind][0]
        for start in range(0, 0x110000, 64):
            ids = ours.encode("".join(map(chr, range(start, start + 64))) + " \ud800 x")
            assert all(0 <= i < ours.vocab_size for i in ids)

    def test_batches_are_equal_with_padding_and_truncation(self, kind, pairs_of_tokenizers, real_texts):
        ours, theirs = pairs_of_tokenizers[kind]
        texts = random.Random(3).sample(real_texts, 200) + ["", "a" * 200, "1 2 3 " * 60]
        for limit in (2, 3, 7, 16, 77):
            expected = theirs(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt")
            got = ours(texts, max_length=limit)
            compare(got, expected, theirs.pad_token_id)
            fixed = ours(texts, padding=limit)
            expected = theirs(texts, truncation=True, max_length=limit, padding="max_length", return_tensors="pt")
            compare(fixed, expected, theirs.pad_token_id)

    def test_saved_files_give_the_same_ids_here_and_in_transformers(self, kind, pairs_of_tokenizers, tmp_path):
        transformers = pytest.importorskip("transformers")
        ours = pairs_of_tokenizers[kind][0]
        ours.save(tmp_path)
        texts = generated(300, seed=4)
        again, name = load_tokenizer(tmp_path), {"wordpiece": "BertTokenizer", "clip": "CLIPTokenizer"}[kind]
        assert (again.kind, again.vocab, again.pad_id, again.max_length) == (
            *(kind, ours.vocab, ours.pad_id, ours.max_length),
        )
        assert [again.encode(text) for text in texts] == [ours.encode(text) for text in texts]
        assert differences((ours, getattr(transformers, name).from_pretrained(tmp_path)), texts) == []

    def test_tokenizer_json_of_transformers_is_read(self, kind, pairs_of_tokenizers, tmp_path):
        ours, theirs = pairs_of_tokenizers[kind]
        theirs.save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
        again = load_tokenizer(tmp_path)
        assert again.vocab == ours.vocab and again.max_length == ours.max_length
        assert differences((again, theirs), generated(300, seed=5)) == []

    def test_of_1000_questions_every_word_is_cut_once(self, kind, vocab, real_texts):
        name = {"wordpiece": "bert-base-uncased-vocab.txt", "clip": "bpe_simple_vocab_16e6.txt.gz"}[kind]
        tokenizer, cut = load_tokenizer(vocab / name), []  # nothing remembered yet
        cutting = tokenizer._chunk
        tokenizer._chunk = lambda chunk: (cut.append(chunk), cutting(chunk))[1]
        questions = [text for text in real_texts if text.endswith("?")][:1000]
        tokenizer(questions)
        assert len(questions) == 1000 and len(cut) == len(set(cut))
        assert 3 * len(cut) < sum(len(question.split()) for question in questions)


def compare(got: dict, expected: dict, their_pad: int) -> None:
    """Equal everywhere but for the id that fills the padding."""
    assert set(got) == set(expected)
    mask = expected["attention_mask"]
    for name in got:
        assert got[name].dtype == torch.int64
        assert torch.equal(got[name] * mask, expected[name] * mask), name
    assert torch.equal(got["attention_mask"], mask)
    assert bool((expected["input_ids"][mask == 0] == their_pad).all())
    assert bool((got["input_ids"][mask == 0] == 0).all())


def test_pairs_are_equal_with_longest_first_truncation(pairs_of_tokenizers, real_texts):
    ours, theirs = pairs_of_tokenizers["wordpiece"]
    rng = random.Random(6)
    first = rng.sample(real_texts, 150) + ["", "a b c d e f g h i j k", "x"]
    second = [" ".join(rng.sample(real_texts, rng.randrange(4))) for _ in first]
    for limit in (3, 4, 5, 8, 13, 20, 512):
        expected = theirs(first, second, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        compare(ours(first, second, max_length=limit), expected, 0)


def test_cased_and_accented_settings_are_equal(tmp_path, vocab):
    transformers = pytest.importorskip("transformers")
    lines = (vocab / "bert-base-uncased-vocab.txt").read_text(encoding="utf-8").splitlines()
    for cased, strip, cjk in [(True, None, True), (True, True, True), (False, False, False)]:
        ours = WordPieceTokenizer(lines, lowercase=not cased, strip_accents=strip, split_cjk=cjk)
        theirs = transformers.BertTokenizer(
            vocab={token: i for i, token in enumerate(lines)},
            do_lower_case=not cased,
            strip_accents=strip,
            tokenize_chinese_chars=cjk,
        )
        assert differences((ours, theirs), generated(500, seed=7)) == []
        ours.save(tmp_path)
        again = load_tokenizer(tmp_path)
        assert (again.lowercase, again.strip_accents, again.split_cjk) == (not cased, strip, cjk)


def test_open_clip_agrees_on_captions_with_html(vocab, real_texts):
    open_clip = pytest.importorskip("open_clip")
    ours = load_tokenizer(vocab / "bpe_simple_vocab_16e6.txt.gz")
    ours.clean_html = True
    texts = [text for text in real_texts if text.isascii()][:300]
    texts += [
        "salt &amp; pepper",
        "a &amp;lt;b&amp;gt; tag",
        "caf&eacute; &quot;x&quot;",
        "two\n lines\t",
        "word " * 90,
    ]
    assert torch.equal(ours(texts, padding=77)["input_ids"], open_clip.SimpleTokenizer()(texts))


def test_clip_keeps_the_end_token_and_counts_what_it_cut(vocab):
    tokenizer = load_tokenizer(vocab / "bpe_simple_vocab_16e6.txt.gz")
    assert tokenizer.vocab_size == 49_408 and tokenizer.eos_id == 49_407
    ids = tokenizer(["dog " * 100, "a dog", "cat " * 75])["input_ids"]
    assert ids.shape == (3, 77) and ids[0, -1] == tokenizer.eos_id and ids[2, -1] == tokenizer.eos_id
    assert tokenizer.truncated == 1
    assert tokenizer(["a dog"])["input_ids"].tolist() == [[49406, 320, 1929, 49407]]


def test_a_batch_is_padded_to_its_longest_row_and_misuse_is_named():
    tokenizer = WordPieceTokenizer([*SPECIALS, "a", "b"])
    batch = tokenizer(["a b", "a"], pairs=["b", "b"])
    assert batch["input_ids"].tolist() == [[2, 5, 6, 3, 6, 3], [2, 5, 3, 6, 3, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert tokenizer([])["input_ids"].shape == (0, 0)
    assert tokenizer(["a"], padding=8)["input_ids"].shape == (1, 8)
    with pytest.raises(ModelError, match="padding=False"):
        tokenizer(["a b", "a"], padding=False)
    with pytest.raises(ModelError, match="no room"):
        tokenizer(["a"], ["b"], max_length=2)
    with pytest.raises(ModelError, match=r"\[text\]"):
        tokenizer("a b")
    with pytest.raises(ModelError, match="2 texts but 1 pairs"):
        tokenizer(["a", "b"], ["a"])


def test_longest_first_never_exceeds_the_room():
    for first in range(9):
        for second in range(9):
            for room in range(18):
                a, b = longest_first(first, second, room)
                assert a + b == min(room, first + second) and a <= first and b <= second


def test_decode_gives_the_words_back(pairs_of_tokenizers):
    text = "what is the colour of the dog's unaffable collar ?"
    bert, clip = (pairs_of_tokenizers[kind][0] for kind in ("wordpiece", "clip"))
    assert bert.decode(bert.encode(text)) == text.replace("'", " ' ")
    assert clip.decode(clip.encode("Ein schöner Hund , 犬!")) == "ein schöner hund , 犬 !"


class Counted(dict):
    """A dictionary that counts how often it is asked."""

    asked = 0

    def get(self, *arguments):
        self.asked += 1
        return super().get(*arguments)


@pytest.mark.parametrize("kind", ["wordpiece", "clip"])
@pytest.mark.parametrize("letters", ["abcdefghij", "a", "!?", "éà"])
def test_a_word_of_20000_letters_is_equal_and_costs_a_few_looks_per_letter(kind, letters, pairs_of_tokenizers):
    word = "".join(random.Random(8).choices(letters, k=20_000))
    ours, theirs = pairs_of_tokenizers[kind]
    assert differences((ours, theirs), [word]) == []
    counted = copy.copy(ours)
    counted._cache, counted.vocab = {}, Counted(ours.vocab)
    counted.ranks = Counted(getattr(ours, "ranks", {}))
    assert counted.encode(word) == ours.encode(word)
    assert counted.vocab.asked + counted.ranks.asked <= 8 * len(word.encode())


def test_clip_pad_id_is_an_option(vocab, tmp_path):
    merges = [("a", "b</w>")]
    tokenizer = ClipTokenizer(merges, pad_id=514)
    assert tokenizer.eos_id == 514 and tokenizer.encode("ab") == [513, 512, 514]
    assert tokenizer(["ab", ""])["input_ids"].tolist() == [[513, 512, 514], [513, 514, 514]]
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).pad_id == 514


class TestTrainedVocabulary:
    def test_it_covers_english_and_stays_in_size(self, real_texts):
        vocab = build_wordpiece_vocab(real_texts, 1200)
        assert len(vocab) == len(set(vocab)) == 1200
        assert vocab[:5] == SPECIALS and all(chr(c) in vocab and f"##{chr(c)}" in vocab for c in range(33, 127))
        tokenizer = WordPieceTokenizer(vocab)
        for text in (*real_texts[:500], "Zyzzyva! quux_42 @ \\ ~"):
            if text.isascii():
                assert tokenizer.unk_id not in tokenizer.encode(text)
        assert "what" in vocab and "color" in vocab
        assert tokenizer.decode(tokenizer.encode("What color is it?")) == "what color is it ?"

    def test_it_joins_the_most_frequent_pair_first(self):
        vocab = build_wordpiece_vocab(["low low low lower lower newest"], 193 + 3)
        assert vocab[193:] == ["##ow", "low", "##er"]

    def test_it_is_the_same_every_time_and_may_stop_early(self):
        assert build_wordpiece_vocab(["ab ab cd"], 999)[193:] == build_wordpiece_vocab(["cd ab ab"], 999)[193:]
        assert build_wordpiece_vocab(["ab ab cd"], 999)[193:] == ["ab", "cd"]
        assert build_wordpiece_vocab(["aaaa aaaa"], 999)[193:] == ["##aa", "##aaa", "aaaa"]

    def test_it_refuses_a_size_below_the_characters(self):
        with pytest.raises(ModelError, match="at least 193"):
            build_wordpiece_vocab(["a"], 100)


class TestBadFiles:
    def write(self, tmp_path, name, content) -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def refused(self, path, *words):
        with pytest.raises(ModelError) as caught:
            load_tokenizer(path)
        for word in (path.name, *words):
            assert word in str(caught.value)

    def test_a_damaged_vocab_txt_names_its_line(self, tmp_path):
        lines = "\n".join(SPECIALS)
        self.refused(self.write(tmp_path, "vocab.txt", "[PAD]\n[UNK]\na\n"), "'[CLS]'", "missing")
        self.refused(self.write(tmp_path, "vocab.txt", f"{lines}\na\nb\na\n"), "line 8", "'a'", "line 6")
        self.refused(self.write(tmp_path, "vocab.txt", f"{lines}\na\n\nb\n"), "line 7", "empty")
        self.refused(self.write(tmp_path, "vocab.txt", lines.encode() + b"\na\n\xff\xfe\n"), "line 7", "UTF-8")
        assert load_tokenizer(self.write(tmp_path, "vocab.txt", f"{lines}\na\n".replace("\n", "\r\n"))).vocab["a"] == 5

    def test_where_there_is_no_tokenizer_the_error_says_what_was_looked_for(self, tmp_path):
        self.refused(tmp_path, "vocab.txt", "tokenizer.json")
        self.refused(tmp_path / "vocab.txt", "no such")

    def test_a_damaged_vocab_json_or_merges_txt_names_its_key_or_line(self, tmp_path):
        ClipTokenizer([("a", "b"), ("ab", "c</w>")]).save(tmp_path)
        vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
        good, good_merges = json.loads(vocab.read_text(encoding="utf-8")), merges.read_text()
        assert load_tokenizer(vocab).vocab == load_tokenizer(merges).vocab == good

        def broken(data, *words):
            vocab.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
            self.refused(vocab, *words)

        broken({k: v for k, v in good.items() if k != "<|endoftext|>"}, "'<|endoftext|>'", "missing")
        broken(good | {"a": 1.5}, "'a'", "whole number")
        broken(good | {"a": good["b"]}, "'b'", "taken")
        broken(good | {"new": 9999}, "none has id 516")
        broken('{"a": 1,\n "b"', "line 2", "JSON")
        broken('{"a": 1, "a": 2}', "'a'", "twice")
        broken("[1]", "object")
        vocab.write_text(json.dumps(good), encoding="utf-8")
        merges.write_text(good_merges + "x y z\n")
        with pytest.raises(ModelError, match="merges.txt, line 4"):
            load_tokenizer(vocab)
        merges.write_text(good_merges + "x y\n")
        self.refused(vocab, "'xy'", "merge 3")
        merges.write_text(good_merges + "a b\n")
        self.refused(vocab, "twice", "merge 3")
        merges.unlink()
        with pytest.raises(ModelError, match="merges.txt: missing"):
            load_tokenizer(vocab)

    def test_a_tokenizer_json_of_another_kind_names_the_key(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        for data, word in [
            ({"model": {"type": "WordLevel", "vocab": {}}}, "model.type"),
            ({"model": {"type": "Unigram", "vocab": {}}}, "model.vocab"),
            ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "padding"),
            ({"model": {"type": "WordPiece"}}, "model.vocab"),
            ({"model": {"type": "WordPiece", "vocab": {}}, "normalizer": {"type": "NFC"}}, "normalizer.type"),
            ({"model": {"type": "WordPiece", "vocab": {}}, "added_tokens": [{"id": 1}]}, "added token"),
        ]:
            path.write_text(json.dumps(data))
            self.refused(path, word)

    def test_a_damaged_gz_and_one_without_merges_are_refused(self, tmp_path):
        self.refused(self.write(tmp_path, "bpe.txt.gz", b"not gzip"), "gzip")
        whole = gzip.compress(b'"bpe#version: 0.2\na b\n' * 50)
        self.refused(self.write(tmp_path, "bpe.txt.gz", whole[:-20]), "gzip")
        self.refused(self.write(tmp_path, "bpe.txt.gz", gzip.compress(b"#version\na b c\n")), "line 2")

    def test_bad_settings_are_named_and_an_endless_limit_is_the_models_own(self, tmp_path):
        WordPieceTokenizer([*SPECIALS, "a"]).save(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        for key, value in [("model_max_length", "x"), ("added_tokens_decoder", {"5": {"content": "b"}})]:
            good = json.loads(path.read_text())
            path.write_text(json.dumps(good | {key: value}))
            with pytest.raises(ModelError, match="model_max_length|'b'"):
                load_tokenizer(tmp_path)
            path.write_text(json.dumps(good))
        path.write_text(json.dumps(good | {"model_max_length": 10**30}))
        assert load_tokenizer(tmp_path).max_length == 512


@pytest.mark.parametrize("kind", ["wordpiece", "clip"])
def test_enormous_texts_cost_linear_time(kind, vocab):
    """A word, a text without spaces, runs of accents, entities and numbers without end: what a hostile table holds."""
    name = {"wordpiece": "bert-base-uncased-vocab.txt", "clip": "bpe_simple_vocab_16e6.txt.gz"}[kind]
    tokenizer, n = load_tokenizer(vocab / name), 100_000
    tokenizer.clean_html = True
    texts = ["a" * n, "word " * n, "中" * n, "'s" * n, "[SEP]" * n, "&" * n, f"&#{'1' * n};", "<|endoftext|>" * n]
    texts += ["e" + "\u0301\u0323" * n, "\u0301" * n, "\u1100\u1161" * n]
    for text in texts:
        started = time.process_time()
        rows = tokenizer([text], max_length=20)["input_ids"]
        assert rows.shape == (1, 20) or rows.shape[1] < 20
        assert time.process_time() - started < 5, f"{text[:9]!r}: sorting its accents one by one takes 20 s"


def test_long_runs_of_marks_alone_are_cut_before_normalising():
    for form in ("NFC", "NFD"):
        for text in ("e" + "\u0301\u0323" * 32, "a\u0301b" * 900, "각" * 3000, "x" * 5000 + "é" * 5000):
            assert normalized(form, text) == unicodedata.normalize(form, text)
        long = "e" + "\u0323" * 500 + "x"
        assert normalized(form, long) == unicodedata.normalize(form, "e" + "\u0323" * MOST_MARKS + "x")
