"""Damaged files of every kind: read, or refused in one line; no traceback, no hang, nothing written elsewhere.

A few hundred cases by default; `-m slow` takes 2,000 safetensors headers and 2,000 texts (json, toml, csv).
`python -m tests.support.fuzz_for 20 SEED` goes on for 20 minutes over every kind with cases of its own.
"""

import io
import json
import os
import random
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from minilora import LoRAConfig, inject_lora, load_adapter, save_adapter
from minilora.commands.results import run_row
from minilora.data.choice_sets import load_choices
from minilora.data.pictures.folder import read_folders
from minilora.data.pictures.images import open_image
from minilora.data.pictures.tables import read_rows, read_tables
from minilora.data.pictures.transforms import build_transform
from minilora.data.questions.choice_csv import read_choice_tables
from minilora.data.questions.visual7w import read_visual7w
from minilora.data.questions.vqa2 import read_vqa2
from minilora.data.shards.pictures import read_picture_shards, write_picture_shards
from minilora.report.curves import curve, read_metrics
from minilora.report.page import ReportData, Table, render_report
from minilora.report.tables import RunRow, comparison_table
from minilora.settings.parse import parse_args, read_run_config
from minilora.tasks import load_run
from minilora.textfiles import csv_text
from minilora.training import checkpoint
from minilora.training.trainer import Trainer, TrainOptions
from reference_models import create_model, load_pretrained, save_pretrained
from reference_models.files.safetensors import read_weights
from reference_models.text.bpe import clip_vocab
from reference_models.text.tokenizers import load_tokenizer
from tests.support.cli_data import program
from tests.support.fuzzing import (
    NAMES,
    Watch,
    strange_bytes,
    strange_header,
    strange_json,
    strange_metadata,
    strange_picture,
    strange_place,
)
from tests.support.toy_task import ToyTask

MERGES = ["i t</w>", "i s</w>", "w h", "wh a", "wha t</w>"]
CLIP_VOCAB = clip_vocab([tuple(merge.split(" ")) for merge in MERGES])
SIZES = {"image_size": 16, "dim": 8, "heads": 2, "hidden": 16, "depth": 1}
QUESTIONS = [{"question_id": 10 * i + j, "image_id": i, "question": f"What is {j}?"} for i in (1, 2) for j in (0, 1)]
ANSWERS = [{"question_id": q["question_id"], "multiple_choice_answer": "red", "answer_type": "other",
            "question_type": "what", "answers": [{"answer": "red", "answer_id": 1}, {"answer": "a dog"}]}
           for q in QUESTIONS]  # fmt: skip
PAIRS = [{"qa_id": i, "question": "Who?", "answer": "A boy.", "multiple_choices": ["a", "b", "c"], "type": "who"}
         for i in (1, 2)]  # fmt: skip
TABLE = 'file,label,split\na/1.png,cat,train\na/2.png,dog,train\n"a/1 2.png",cat,val\n'
CHOICES = 'ID,img_path,Question,A,B,C,answer\nT0,1.png,Who?,x,y,z,A\nT1,2.png,"What, then?",x,y,z,C\n'
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "is", "it", "##s", "?"]
TOKENIZER = {
    "model": {"type": "WordPiece", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "[UNK]"},
    "normalizer": {"type": "BertNormalizer", "lowercase": True, "handle_chinese_chars": True},
    "added_tokens": [{"id": 0, "content": "[PAD]", "special": True}],
}


def tiny(classes: int = 3):
    return create_model("vit-tiny-patch16-224", classes, **SIZES)


def adapted():
    config = LoRAConfig(r=2, target_modules=("q_proj", "v_proj"), modules_to_save=("head",))
    return inject_lora(tiny(), config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One undamaged example of everything that is read: {name: folder}."""
    root = tmp_path_factory.mktemp("whole")
    save_adapter(adapted(), root / "adapter")
    save_pretrained(tiny(), root / "model")
    save_pretrained(tiny(), root / "foreign", layout="transformers")
    photos = root / "photos"
    for part, name in (("train", "cat"), ("train", "dog"), ("val", "cat"), ("val", "dog")):
        (photos / part / name).mkdir(parents=True)
        Image.new("RGB", (20, 20), (9, 99, 200)).save(photos / part / name / "1.png")
    (photos / "classes.json").write_text(json.dumps({"cat": {"name": "a cat", "imagenet_index": 3}, "dog": "dog"}))
    words = ["--model", root / "model", "--data-dir", photos, "--max-steps", "1", "--output", root / "run"]
    assert program("train").main([str(word) for word in words]) == 0
    for name in ("curves.png", "attention.png", "report.html"):
        (root / "run" / name).unlink(missing_ok=True)
    shutil.rmtree(root / "run" / "checkpoints")
    Trainer(ToyTask(n=8), TrainOptions(epochs=1, log_interval=0), root / "state", "cpu").fit()
    write_picture_shards(root / "shards", read_folders(photos), tiny().preprocess, 20, {}, log=lambda line: None)
    for name, files in (
        ("table", {"all.csv": TABLE}),
        ("choices", {"all.csv": CHOICES}),
        ("vqa2", {"questions.json": json.dumps({"questions": QUESTIONS}),
                  "annotations.json": json.dumps({"annotations": ANSWERS})}),
        ("visual7w", {"dataset_v7w_telling.json": json.dumps(
            {"images": [{"image_id": 1, "filename": "1.png", "split": "train", "qa_pairs": PAIRS}]})}),
        ("tokenizer", {"tokenizer.json": json.dumps(TOKENIZER), "tokenizer_config.json": json.dumps(
            {"do_lower_case": True, "model_max_length": 12, "tokenizer_class": "BertTokenizer"})}),
        ("vocabulary", {"vocab.txt": "\n".join(WORDS)}),
        ("merges", {"vocab.json": json.dumps(CLIP_VOCAB), "merges.txt": "#version: 0.2\n" + "\n".join(MERGES)}),
    ):  # fmt: skip
        (root / name / "a").mkdir(parents=True)
        for file, text in files.items():
            (root / name / file).write_text(text)
        for place in ("1.png", "2.png", "a/1.png", "a/2.png", "a/1 2.png")[: 2 if name == "vqa2" else 5]:
            Image.new("RGB", (4, 4)).save(root / name / place)
    return root


def use_run(folder):
    """What evaluate.py does with a run, on one picture."""
    read_run_config(folder)
    run = load_run(folder)
    run.predict([Image.new("RGB", (20, 20))])
    comparison_table([run_row(run)])
    for key in ("accuracy", "lr"):
        curve(read_metrics(folder / "metrics.jsonl"), key)


def use_model(folder):
    model = load_pretrained(folder)
    build_transform(model.preprocess)(Image.new("RGB", (20, 20)))
    assert model.labels is None or all(isinstance(label, str) for label in model.labels)


def resume(folder):
    """Goes on from a checkpoint whose manifest agrees with its damaged files."""
    newest = checkpoint.checkpoint_dirs(folder)[0]
    if all((newest / name).is_file() for name in checkpoint.FILES):  # a device has no digest
        (newest / checkpoint.MANIFEST).write_bytes(checkpoint.manifest_bytes(newest))
    Trainer(ToyTask(n=8), TrainOptions(epochs=1, log_interval=0), folder, "cpu").fit()


def use_tokenizer(folder):
    load_tokenizer(folder)(["what is it?", ""], pairs=["it's", "x"], max_length=9)


def use_questions(folder):
    for bad_data in ("error", "skip"):
        for part in read_vqa2(folder, bad_data).values():
            part.pictures.load(0)


def use_picture(folder, rng):
    extension, content = strange_picture(rng, Image.new("RGB", (9, 7), (200, 10, 90)))
    (folder / f"x{extension}").write_bytes(content)
    image = open_image(folder / f"x{extension}")
    assert image.mode == "RGB"


def use_names(folder, rng):
    """Class folders and pictures of any names: the set, its table, its labels and its page."""
    classes = rng.sample(NAMES, 3)
    for part in (b"train", b"val"):
        for name in classes:
            place = os.path.join(os.fsencode(folder), part, name)
            os.makedirs(place)
            for picture in rng.sample(NAMES, 2):
                Image.new("RGB", (4, 4)).save(place + b"/" + picture + b".png")
    splits = read_folders(folder)
    json.dumps(splits.classes, ensure_ascii=False).encode()
    rows = [["file", "label"], *([path, splits.classes[label]] for path, label in splits.train)]
    (folder / "t.csv").write_bytes(csv_text(rows).encode())
    assert [row["label"] for _, row in read_rows(folder / "t.csv")[1]] == [row[1].strip() for row in rows[1:]]
    data = ReportData(splits.classes[0], samples={name: [splits.train.load(0)] for name in splits.classes})
    data.tables = [Table("files", *(rows[0], rows[1:]))]
    for text in (render_report(data), comparison_table([RunRow(name, "lora") for name in splits.classes])):
        assert not {c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}


HEADERS = {  # example: (file, reader)
    "adapter": ("adapter_model.safetensors", lambda folder: load_adapter(tiny(), folder)),
    "model": ("model.safetensors", use_model),
    "foreign": ("model.safetensors", use_model),
    "run": ("adapter_model.safetensors", use_run),
    "state": (f"{checkpoint.FOLDER}/step-2/state.safetensors", resume),
}
TEXTS = [
    ("adapter", "adapter_config.json", lambda folder: load_adapter(tiny(), folder)),
    ("adapter", "adapter_config.json", lambda folder: load_adapter(adapted(), folder)),
    ("model", "config.json", use_model),
    ("foreign", "config.json", use_model),
    ("foreign", "preprocessor_config.json", use_model),
    ("run", "labels.json", use_run),
    ("run", "preprocess.json", use_run),
    ("run", "summary.json", use_run),
    ("run", "metrics.jsonl", use_run),
    ("run", "config.toml", use_run),
    ("run", "config.toml", lambda folder: parse_args(["--config", str(folder)])),
    ("state", f"{checkpoint.FOLDER}/step-2/state.json", resume),
    ("table", "all.csv", read_tables),
    ("choices", "all.csv", read_choice_tables),
    ("choices", "all.csv", lambda folder: load_choices(folder, "csv", 0.5, 0)),
    ("photos", "classes.json", read_folders),
    ("vqa2", "questions.json", use_questions),
    ("vqa2", "annotations.json", use_questions),
    ("visual7w", "dataset_v7w_telling.json", lambda f: read_visual7w(f / "dataset_v7w_telling.json")),
    ("tokenizer", "tokenizer.json", use_tokenizer),
    ("tokenizer", "tokenizer_config.json", use_tokenizer),
    ("vocabulary", "vocab.txt", use_tokenizer),
    ("merges", "vocab.json", lambda folder: load_tokenizer(folder)(["what is it?", ""], max_length=9)),
    ("merges", "merges.txt", lambda folder: load_tokenizer(folder)(["what is it?", ""], max_length=9)),
    ("shards", "index.json", read_picture_shards),
]
EXAMPLES = sorted({row[0] for row in TEXTS} | {*HEADERS})


def damaged(rng, path):
    """The file's content, damaged in a way that its format deserves."""
    data = path.read_bytes()
    if path.suffix == ".safetensors":
        return strange_header(rng, data)
    return strange_json(rng, data) if path.suffix == ".json" else strange_bytes(rng, data)


def fuzz(whole, tmp_path, example, file, reader, seed, cases) -> Watch:
    """`cases` damaged versions of one file, each in a fresh copy of its folder."""
    watch = Watch(tmp_path)
    for number in range(cases):
        rng = random.Random(f"{seed}/{example}/{file}/{number}")
        folder = tmp_path / f"{number}" / example
        shutil.copytree(whole / example, folder)
        (folder / file).write_bytes(damaged(rng, folder / file))
        watch.tries(f"{example}/{file} case {number}", reader, folder)
        shutil.rmtree(folder.parent)
    assert set(tmp_path.iterdir()) == set()
    return watch


@pytest.mark.parametrize("example", EXAMPLES)
def test_undamaged_examples_are_read(whole, tmp_path, example):
    """Else every refusal below would be worth nothing."""
    headers = [(example, *HEADERS[example])] if example in HEADERS else []
    for name, _, reader in [*headers, *(row for row in TEXTS if row[0] == example)]:
        folder = shutil.copytree(whole / name, tmp_path / name, dirs_exist_ok=True)
        reader(folder)


@pytest.mark.parametrize("example", HEADERS)
@pytest.mark.parametrize("cases", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_safetensors_headers_are_read_or_refused_in_one_line(whole, tmp_path, example, cases):
    watch = fuzz(whole, tmp_path, example, *HEADERS[example], seed=1, cases=cases)
    assert not watch.found, watch.report()
    assert watch.refused > cases // 2


@pytest.mark.parametrize("number", range(len(TEXTS)), ids=[f"{e}-{f.rpartition('/')[2]}" for e, f, _ in TEXTS])
@pytest.mark.parametrize("cases", [12, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_texts_are_read_or_refused_in_one_line(whole, tmp_path, number, cases):
    watch = fuzz(whole, tmp_path, *TEXTS[number], seed=number, cases=cases)
    assert not watch.found, watch.report()
    assert watch.accepted + watch.refused == cases


@pytest.mark.parametrize("example", EXAMPLES)
@pytest.mark.parametrize("cases", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_odd_things_in_a_files_place_are_refused_at_once(whole, tmp_path, example, cases):
    """Pipes, folders, links to nowhere and to devices, terabytes: nothing is waited for."""
    readers = [(file, reader) for name, file, reader in TEXTS if name == example]
    readers += [HEADERS[example]] if example in HEADERS else []
    watch = Watch(tmp_path)
    for number in range(cases):
        rng = random.Random(f"{example}/{number}")
        folder = shutil.copytree(whole / example, tmp_path / f"{number}" / example)
        file, reader = readers[number % len(readers)]
        strange_place(rng, folder / file)
        watch.tries(f"{example}/{file} case {number}", reader, folder)
    assert not watch.found, watch.report()


@pytest.mark.parametrize("cases", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_pictures_are_read_or_refused_in_one_line(tmp_path, cases):
    watch = Watch(tmp_path)
    for number in range(cases):
        rng = random.Random(number)
        watch.tries(f"picture {number}", use_picture, tmp_path, rng)
    assert not watch.found, watch.report()
    assert watch.accepted and watch.refused


@pytest.mark.parametrize("cases", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_pixels_stay_what_they_are_whatever_stands_beside_them(tmp_path, cases):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    for number in range(cases):
        (tmp_path / "x.png").write_bytes(strange_metadata(random.Random(number), buffer.getvalue()))
        assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), pixels), number


@pytest.mark.parametrize("cases", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_folders_of_any_names_are_read_or_refused_and_printed_without_effect(tmp_path, cases):
    watch = Watch(tmp_path)
    for number in range(cases):
        watch.tries(f"names {number}", use_names, tmp_path / f"{number}", random.Random(number))
    assert not watch.found, watch.report()
    assert watch.accepted > cases // 3


def test_weights_of_every_kind_of_nonsense_are_refused_quickly(tmp_path):
    """Empty, a huge declared header, a web page, a zip, zeros, a folder of that name."""
    contents = [b"", b"\0" * 7, b"\xff" * 8, b"\xff" * 100, b"\0" * 1000, b"<html></html>", b"PK\3\4" + b"\0" * 64]
    contents += [(2**40).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"]
    watch = Watch(tmp_path)
    for name in ("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"):
        for number, content in enumerate(contents):
            (tmp_path / name).write_bytes(content)
            watch.tries(f"{name} {number}", read_weights, tmp_path / name)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        watch.tries(f"{name} is a folder", read_weights, tmp_path / name)
    assert not watch.found, watch.report()
    assert watch.accepted == 0
