"""Towers in folders of their own: timm's and open_clip's files side by side, transformers' CLIPTextModel under a
question answerer. Each is read as what the task needs, and runs end to end.
"""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import transformers

from minilora import load_run
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks import build_task
from reference_models import load_pretrained, save_pretrained
from reference_models.files.checkpoint import find_checkpoint
from reference_models.files.hub import cache_folder, resolve
from reference_models.load import config_of
from tests.support.choice_data import tiny_clip, wordpiece, write_clip, write_scpc
from tests.support.cli_data import program, write_photos
from tests.support.parity import assert_parity, distance, pictures
from tests.support.vqa_data import write_vqa

QUICK = ["--epochs", "1", "--batch-size", "8", "--device", "cpu", "--workers", "0"]
OPEN = ("open_clip_config.json", "open_clip_model.safetensors")
TIMM = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder as of timm/vit_base_patch16_clip_224.openai: the picture tower for timm, the CLIP for open_clip."""
    acts = {"vision_act": "quick_gelu", "text_act": "quick_gelu"}
    folder = write_clip(tmp_path_factory.mktemp("pair"), "open_clip", **acts)
    tower = load_pretrained(folder, num_classes=0)
    tower.config = replace(tower.config, head_pool="")
    tower.reset_classifier(16)  # timm's has a head in place of CLIP's projection
    save_pretrained(tower, folder, "timm")
    assert all((folder / name).is_file() for name in (*OPEN, *TIMM))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"), train=6, val=4)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_vqa(tmp_path_factory.mktemp("vqa"))


# ---- timm's and open_clip's files in one folder


def test_the_pair_is_read_that_is_asked_for(pair):
    tower, whole = load_pretrained(pair).eval(), load_pretrained(pair, texts=True).eval()
    assert (tower.config.family, whole.config.family) == ("vit_variants", "clip")
    assert config_of(pair).family == "vit_variants"
    assert_parity(tower, whole.vision, pictures(32), ask=lambda model, x: model.pooled(x))
    for file, family in ((OPEN[1], "clip"), (TIMM[1], "vit_variants")):  # by the file's name
        assert load_pretrained(pair / file).config.family == family
    assert load_pretrained("clip-nano", pair).config.family == "clip"  # by the model's name
    assert load_pretrained("clip-nano", pair, num_classes=3).config.family == "vit_variants"
    assert (whole.source, tower.source) == (pair / OPEN[1], pair / TIMM[1])


def test_transformers_files_beside_open_clips_are_read_as_before(tmp_path):
    clip = tiny_clip(wordpiece())
    for layout in ("transformers", "open_clip"):
        save_pretrained(clip, tmp_path, layout)
    for texts in (False, True):
        found = find_checkpoint(tmp_path, texts)
        assert found.settings.name == TIMM[0] and load_pretrained(tmp_path, texts=texts).config.family == "clip"
    (tmp_path / TIMM[1]).unlink()  # what is left is open_clip's
    assert find_checkpoint(tmp_path).settings.name == OPEN[0]
    assert load_pretrained(tmp_path).source == tmp_path


@pytest.mark.parametrize(
    ("task", "more", "families"),
    [
        ("classify", [], {"vit_variants"}),
        ("classify", ["--head", "names"], {"clip"}),
        ("choice", [], {"clip"}),
        ("vqa", [], {"vit_variants", "clip"}),
    ],
)
def test_every_task_trains_on_the_pair_and_opens_its_run_again(task, more, families, pair, photos, questions, tmp_path):
    data = {"classify": photos, "choice": write_scpc(tmp_path / "scpc"), "vqa": questions}[task]
    model = [f"vision={pair}", f"text={pair}"] if task == "vqa" else [str(pair)]
    words = [
        *QUICK,
        "--task",
        task,
        "--model",
        *model,
        "--data-dir",
        str(data),
        "--output",
        str(tmp_path / "run"),
        *more,
    ]
    assert program("train").main(words) == 0
    assert program("evaluate").main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    run = load_run(tmp_path / "run")
    parts = [run.model.vision, run.model.text] if task == "vqa" else [run.model]
    assert {part.config.family for part in parts} == families


def test_the_record_of_a_run_is_of_the_file_that_was_read(pair, photos, tmp_path):
    """Another file that comes into the folder later, as from the hub, makes no other weights."""
    folder = tmp_path / "pair"
    shutil.copytree(pair, folder)
    made = {"task": "classify", "model": str(folder), "data_dir": str(photos), "device": "cpu"}
    before = build_task(Config(**made)).base["sha256"]
    (folder / OPEN[1]).write_bytes(b"something else")
    assert build_task(Config(**made)).base["sha256"] == before


def test_the_hub_gives_open_clips_weights_where_texts_are_to_be_read(pair, hub, monkeypatch):
    hub.files = {path.name: path.read_bytes() for path in pair.iterdir() if path.is_file()}
    hub.large = {OPEN[1], TIMM[1]}
    folder = resolve("hf:org/name")
    assert (folder / TIMM[1]).is_file() and not (folder / OPEN[1]).exists()
    assert load_pretrained("clip-nano", "hf:org/name").config.family == "clip"  # a CLIP is wanted: fetched now
    assert len(hub.requests(TIMM[1])) == len(hub.requests(OPEN[1])) == 1
    hub.seen.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve("hf:org/name", texts=True) == resolve("hf:org/name") == cache_folder() / "org--name" / "main"
    assert load_pretrained(str(folder), num_classes=2).config.family == "vit_variants" and hub.seen == []


def test_the_targets_of_a_folder_are_listed_like_those_of_a_name(pair, tmp_path, capsys):
    save_pretrained(tiny_clip(wordpiece()), tmp_path, "transformers")
    assert program("train").main(["--list-targets", str(tmp_path)]) == 0
    told = capsys.readouterr().out.split()
    assert {"vision.q_proj", "text.q_proj", "vision.fc2"} <= {*told}
    assert program("train").main(["--list-targets", str(pair)]) == 0
    assert "q_proj" in capsys.readouterr().out.split()


# ---- CLIP's text tower alone, under a question answerer


def text_tower(kind: str, folder, tokenizer):
    """transformers' CLIPTextModel with or without its projection, and the tokenizer beside it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    sizes |= {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id, "max_position_embeddings": 24}
    model = getattr(transformers, kind)(transformers.CLIPTextConfig(**sizes, projection_dim=16)).eval()
    model.save_pretrained(folder)
    tokenizer.save(folder)
    return model


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_a_clip_text_tower_answers_questions(kind, questions, tmp_path):
    tokenizer = wordpiece()
    theirs = text_tower(kind, tmp_path / "text", tokenizer)
    model = ["vision=vit-nano-patch8-48", f"text={tmp_path / 'text'}"]
    words = [*QUICK, "--task", "vqa", "--model", *model, "--data-dir", str(questions), "--lr", "3e-3"]
    words += ["--weights", "vision=none", "--output", str(tmp_path / "run")]
    assert program("train").main(words) == 0
    assert program("evaluate").main([str(tmp_path / "run"), "--device", "cpu", "--split", "val"]) == 0
    run = load_run(tmp_path / "run")
    assert run.model.text.config.family == "clip_text" and run.limit == 24  # its positions, not the tokenizer's 40
    trained = [name for name, _ in run.model.named_parameters() if name.startswith("text.") and ".lora_B" in name]
    assert trained and any(run.model.get_parameter(name).abs().max() > 0 for name in trained)
    base = build_task(Config(task="vqa", model={"text": str(tmp_path / "text")}, data_dir=str(questions), device="cpu"))
    batch = next(iter(base.train_loader(0, base.train_batches(0))))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        wanted = getattr(theirs, "text_model", theirs)(input_ids=ids, attention_mask=mask).pooler_output
        assert distance(base.model.encode_text(ids, mask), wanted) < 1e-5


def test_a_tokenizer_that_is_not_the_text_towers_is_refused(questions, tmp_path):
    text_tower("CLIPTextModel", tmp_path, wordpiece())
    settings = json.loads((tmp_path / "config.json").read_text())
    made = {"task": "vqa", "model": {"text": str(tmp_path)}, "data_dir": str(questions), "device": "cpu"}
    (tmp_path / "config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    with pytest.raises(UserError, match="looks for 7; it belongs to another model"):
        build_task(Config(**made))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="--max-length 30: .* reads at most 24 tokens"):
        build_task(Config(**made, max_length=30))
