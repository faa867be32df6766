"""Small sets of multiple-choice questions with pictures, and a tiny CLIP with its tokenizer, for the tests."""

import csv
import json
from pathlib import Path

import torch

from minilora.data.generated.shapes import ShapesSplit
from reference_models import create_model, save_pretrained
from reference_models.text.bpe import ClipTokenizer
from reference_models.text.tokenizers import WordPieceTokenizer, build_wordpiece_vocab

HEADER = ["ID", "img_path", "Question", "A", "B", "C", "D", "answer"]
TINY = dict(
    embed_dim=16, image_size=32, patch_size=16, context=40, vision_dim=32, vision_depth=1, vision_heads=2,
    vision_hidden=48, text_dim=32, text_depth=2, text_heads=2, text_hidden=48,
)  # fmt: skip
MERGES = [("t", "h"), ("th", "e</w>"), ("q", "u"), ("a", "n"), ("i", "s</w>")]


def write_pictures(folder: Path, n: int) -> list[str]:
    """n small pictures; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    split = ShapesSplit("target", "train", 0, range(n))
    for i in range(n):
        split.load(i).save(folder / f"p{i}.png")
    return [f"p{i}.png" for i in range(n)]


def write_table(path: Path, rows: list[list], header: list[str] = HEADER, bom: bool = True) -> Path:
    with open(path, "w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def scpc_rows(n: int, answers: bool = True, prefix: str = "TRAIN") -> list[list]:
    """n questions about n / 2 pictures below ./img."""
    choices = ["a cat", "a dog, or two", "a bird", "a fish"]
    return [
        [f"{prefix}_{i:03d}", f"./img/p{i // 2}.png", f"What, if anything, is at {i}?", *choices]
        + ["ABCD"[i % 4]] * answers
        for i in range(n)
    ]


def write_scpc(root: Path, train: int = 12, test: int = 6) -> Path:
    """train.csv and test.csv as SCPC 2025 has them."""
    write_pictures(root / "img", (max(train, test) + 1) // 2)
    write_table(root / "train.csv", scpc_rows(train))
    write_table(root / "test.csv", scpc_rows(test, answers=False, prefix="TEST"), HEADER[:-1])
    (root / "sample_submission.csv").write_text("ID,answer\nTEST_000,-\n")
    return root


def visual7w(images: int = 6, each: int = 2, splits: tuple = ("train", "train", "val"), **pair) -> dict:
    """The content of a Visual7W file; `pair` overrides keys of every question."""
    records = []
    for i in range(images):
        pairs = [
            {
                "image_id": i, "qa_id": 10 * i + k, "question": f"Who is at {i}?", "answer": f"Right {i}.",
                "multiple_choices": ["One.", "Two.", "Three."], "type": ("who", "where")[k % 2], **pair,
            }
            for k in range(each)
        ]  # fmt: skip
        part = splits[i % len(splits)]
        records.append({"image_id": i, "filename": f"p{i}.png", "split": part, "qa_pairs": pairs})
    return {"images": records}


def write_visual7w(root: Path, content: dict | None = None) -> Path:
    content = visual7w() if content is None else content
    write_pictures(root / "images", len(content["images"]))
    (root / "dataset_v7w_telling.json").write_text(json.dumps(content))
    return root


def wordpiece() -> WordPieceTokenizer:
    return WordPieceTokenizer(
        build_wordpiece_vocab(["question answer what who is at the right cat dog"], 230), max_length=40
    )


def tiny_clip(tokenizer, seed: int = 0, legacy_eos: bool = False, **overrides) -> torch.nn.Module:
    """A random CLIP for this tokenizer."""
    torch.manual_seed(seed)
    sizes = TINY | {"vocab_size": tokenizer.vocab_size, "eos_token_id": 2 if legacy_eos else tokenizer.eos_id}
    model = create_model("clip-nano", **sizes | overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write_clip(folder: Path, layout: str = "minilora", kind: str = "wordpiece", **options) -> Path:
    """A checkpoint with its tokenizer: kind "wordpiece", "vocab.json" (with merges.txt) or "tokenizer.json"."""
    tokenizer = wordpiece() if kind == "wordpiece" else ClipTokenizer(MERGES, max_length=40)
    save_pretrained(tiny_clip(tokenizer, **options), folder, layout)
    tokenizer.save(folder)
    if kind == "tokenizer.json":
        model = {"type": "BPE", "vocab": tokenizer.vocab, "merges": [list(pair) for pair in MERGES]}
        added = [{"id": one[0], "content": token} for token, one in tokenizer.added.items()]
        data = {"model": model | {"end_of_word_suffix": "</w>"}, "added_tokens": added}
        (folder / "tokenizer.json").write_text(json.dumps(data))
        for name in ("vocab.json", "merges.txt"):
            (folder / name).unlink()
    return folder
