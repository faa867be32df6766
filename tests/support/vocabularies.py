"""Small vocabularies made by the trainers of tokenizers and sentencepiece, in the pipelines that are published."""

import functools
import io
import json
import random
import re
import unicodedata

import pytest

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
pytest.importorskip("google.protobuf")
from sentencepiece import sentencepiece_model_pb2  # noqa: E402
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

TEXTS = [
    "The quick brown fox doesn't mind the lazy dog; we'll see, they've said: I'm 'here'.",
    "Der Mädchen größe Übung ß straße; L'élève a mangé où çà là-bas. Ñandú pingüino corazón São João.",
    "Привет, мир! Как дела? Ещё один день, съешь же ещё этих мягких французских булок.",
    "Καλημέρα κόσμε, τι κάνεις; ΑΣΦΑΛΗΣ Οδυσσεύς ΣΟΦΟΣ.",
    "مرحبا بالعالم كيف حالك اليوم؟ السَّلامُ عَلَيْكُمْ ١٢٣ ـــــ لا ﻻ ﺍﻟﻠﻪ ﻻ\u064b",
    "שלום עולם מה שלומך היום? שָׁלוֹם",
    "नमस्ते दुनिया आप कैसे हैं क्षत्रिय ज्ञान १२३",
    "สวัสดีชาวโลก สบายดีไหม น้ำ กำลัง",
    "你好，世界！今天天气怎么样？我喜欢吃苹果。 𠮷野家",
    "こんにちは世界。カタカナとﾊﾝｶｸとひらがな、ｶﾞｷﾞ",
    "안녕하세요 세계 오늘 날씨 어때요 각 \u1100\u1161\u11a8 \u1100\u1161 \uac00\u0301 \uffa1\uffc2",
    "family 👨‍👩‍👧‍👦 ok 👍🏽 flag 🇩🇪 ❤️ 😀😃 ©️ ™️ ℹ️ 1️⃣",
    "a\u0001b \u0000 tab\tnew\nline\r\ncr\rx \x7f \x85 \u200b zero \ufeff bom \u00ad soft \u2028 line \u2029 par",
    "e\u0301 n\u0303 o\u0308\u0323 \u0301start q\u0307\u0323 \u00a0\u0301 ﬁ\u0301 ½\u0301 ²\u0308 ™\u0301 \u0600a",
    "İstanbul ı ﬁ ﬂ ﬀ ﬃ ﬅ Ｆｕｌｌ　ｗｉｄｔｈ １２３ ＡＢＣ ẞß ǅǆ Ǆ ς σ Σ",
    "½ ⅔ Ⅳ ⅻ ² ³ ㎏ ㍿ № ℃ Å ﷺ … ‥ “quotes” ‘single’ — dash – en ‐ ・ 〜 ～ 𝓗𝓮𝓵𝓵𝓸 𝟘𝟙 ⓐⓑ ㈱",
    'def f(x, *args):\n        return {k: v**2 for k, v in x.items() if k != "__init__"}  # code',
    "ls -la | grep 'foo' > /dev/null 2>&1; print(f\"{x!r:>10}\") 3.14159 1,000,000 0x1F 1e-5 2024-01-02T03:04Z",
    "spaces   three    four          many                              end   ",
    "<s> </s> <pad> <mask> <unk> [CLS] [SEP] <bos> <eos> x<mask>y   <mask>   z <S> </S><s><s> \n\n <b>bold</b>",
    "▁ under▁score ▁▁ double _ low __dunder__ ▁start",
]
SPANS = [(0x20, 0x7F), (0xA0, 0x250), (0x300, 0x530), (0x590, 0x700), (0x900, 0x980), (0xE00, 0xE80), (0x1100, 0x1200)]
SPANS += [(0x2000, 0x2200), (0x3000, 0x3100), (0x4E00, 0x4F00), (0xAC00, 0xAD00), (0xFB00, 0xFE00), (0xFF00, 0xFFF0)]
SPANS += [(0x1F300, 0x1F650), (0, 0x20)]
CORPUS = [*TEXTS * 3, *["the dog is on the table and the cat is under it", "what colour is the car"] * 20]
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", AddedToken("<mask>", lstrip=True)]


def strings(count: int, seed: int = 0) -> list[str]:
    """TEXTS, edges, then words of theirs side by side, and letters of many blocks between them."""
    rng, found = random.Random(seed), [*TEXTS, "", " ", "  ", "a", "\n", "\u3000", " a", "a ", "\u3000a\u3000\u3000b"]
    words = sorted({word for text in TEXTS for word in re.split("( +)", text) if word})
    letters = [chr(code) for span in SPANS for code in range(*span)]
    # U+061D is punctuation since Unicode 14; the tokenizers library has older tables
    letters = [letter for letter in letters if unicodedata.category(letter) != "Cn" and letter != "\u061d"]
    while len(found) < count:
        some = rng.choices(words, k=rng.randrange(1, 9))
        if rng.random() < 0.5:
            found.append(rng.choice([" ", "", "  ", "\t", "\u00a0"]).join(some))
        else:
            found.append("".join(rng.choice([rng.choice(letters), rng.choice("aeiou "), word]) for word in some * 2))
    return found


def roberta(prefix: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, prefix)
    return made


@functools.cache
def sentencepiece_model(**options) -> bytes:
    """A Unigram model with the normalization of XLM-R and T5, as the bytes of its file."""
    file = io.BytesIO()
    options |= {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "character_coverage": 0.98}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in CORPUS if "\0" not in text), model_writer=file, vocab_size=500,
        hard_vocab_limit=False, num_threads=1, minloglevel=2, **options,
    )  # fmt: skip
    return file.getvalue()


def xlm_roberta(converted: bool = False, scheme: str = "always") -> Tokenizer:
    """The file of 2020, or (converted) as transformers 4 writes one from a sentencepiece model."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model())
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [*((piece.piece, piece.score) for piece in proto.pieces[3:]), ("<mask>", 0.0)]
    made = Tokenizer(models.Unigram(pieces, 3, False))
    nmt_nfkc = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    strip, single = normalizers.Strip(False, True), normalizers.Replace(Regex(" {2,}"), "▁")
    mark = pre_tokenizers.Metaspace("▁", scheme)
    made.normalizer = normalizers.Sequence([nmt_nfkc, strip, single]) if converted else nmt_nfkc
    words = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark])
    made.pre_tokenizer = mark if converted else words
    ends = [("<s>", 0), ("</s>", 2)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> </s> $B </s>", ends)
    made.add_special_tokens(SPECIALS)
    return made


def siglip() -> Tokenizer:
    """T5's pipeline, with the ids of SigLIP's special tokens."""
    raw = sentencepiece_model(pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    proto = sentencepiece_model_pb2.ModelProto.FromString(raw)
    made = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in proto.pieces], 2, False))
    made.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", "always")]
    made.pre_tokenizer = pre_tokenizers.Sequence(words)
    made.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    made.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return made


def gemma(lowered: bool = False) -> Tokenizer:
    codes = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    if lowered:
        made.normalizer = normalizers.Sequence([normalizers.Lowercase(), made.normalizer])
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    named = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *codes]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=named, limit_alphabet=150, show_progress=False)
    made.train_from_iterator((word for text in CORPUS for word in re.findall(" ?[^ ]+", text)), trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] not in codes]
    made = Tokenizer.from_str(json.dumps(data))
    made.post_processor = processors.TemplateProcessing("$A <eos>", "$A <eos> $B <eos>", [("<eos>", 1)])
    made.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "▁▁", "<b>")])
    return made


def mpnet(normalized: bool = False) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    named = ["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=600, special_tokens=named, show_progress=False)
    )
    data = json.loads(made.to_str())
    for token in data["added_tokens"]:
        token |= {"normalized": normalized, "lstrip": token["content"] == "<mask>"}
    made = Tokenizer.from_str(json.dumps(data))
    made.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    return made


MADE = {
    "roberta": roberta,
    "roberta, prefix space": lambda: roberta(prefix=True),
    "xlm-roberta": xlm_roberta,
    "xlm-roberta, converted": lambda: xlm_roberta(converted=True),
    "xlm-roberta, first": lambda: xlm_roberta(converted=True, scheme="first"),
    "xlm-roberta, never": lambda: xlm_roberta(converted=True, scheme="never"),
    "siglip": siglip,
    "gemma": gemma,
    "gemma, lowered": lambda: gemma(lowered=True),
    "mpnet": mpnet,
    "mpnet, normalized": lambda: mpnet(normalized=True),
}
