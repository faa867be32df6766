"""hf: from the download to a trained adapter, with shards, preprocessing and tokenizers as their makers save them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora.tasks import load_run
from minilora.tasks.runfiles import read_preprocess
from reference_models import ModelError, load_pretrained
from reference_models.text.tokenizers import load_tokenizer
from tests.support.choice_data import write_clip, write_scpc
from tests.support.cli_data import program, write_photos
from tests.support.parity import assert_parity, fill, logits_of, pictures
from tests.support.vqa_data import write_vqa

STEPS = ["--max-steps", "2", "--batch-size", "4", "--lora-r", "2", "--lr", "0.01", "--device", "cpu"]
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]


def shard(folder: Path) -> None:
    """model.safetensors as two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names, weight_map = sorted(tensors), {}
    for number, keys in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: tensors[key] for key in keys}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def publish(hub, folder: Path) -> None:
    """The hub has these files, the weights in shards."""
    shard(folder)
    hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.large = {name for name in hub.files if name.endswith(".safetensors")}


@pytest.fixture
def vit(hub, tmp_path):
    """transformers' own ViT with random values, published; the oracle."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    oracle = fill(ViTForImageClassification(ViTConfig(**sizes, image_size=48, patch_size=8, num_labels=5)))
    oracle.save_pretrained(tmp_path / "vit")
    size = {"height": 48, "width": 48}
    ViTImageProcessor(size=size, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path / "vit")
    publish(hub, tmp_path / "vit")
    return oracle


def lora_norms(run) -> list[float]:
    return [tensor.norm().item() for key, tensor in run.model.state_dict().items() if "lora_B" in key]


def test_load_pretrained_takes_the_name_alone_and_equals_transformers(hub, vit):
    model, x = load_pretrained("hf:org/name"), pictures(48)
    assert_parity(model, vit, x)
    assert (model.preprocess["mean"], model.preprocess["std"]) == (MEAN, STD)
    assert len(hub.requests("model-00002-of-00002.safetensors")) == 1
    again = load_pretrained("vit-nano-patch8-48", "hf:org/name")
    assert torch.equal(logits_of(again, x), logits_of(model, x))


def test_train_takes_hf_weights_and_the_run_answers_offline(hub, vit, tmp_path, monkeypatch):
    photos, run_dir = write_photos(tmp_path / "photos"), tmp_path / "run"
    words = ["--model", "vit-nano-patch8-48", "--weights", "hf:org/name", "--data-dir", str(photos)]
    assert program("train").main([*words, *STEPS, "--output", str(run_dir)]) == 0
    hub.shutdown()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = load_run(run_dir)
    assert run.base["weights"] == "hf:org/name" and len(run.base["sha256"]) == 64
    assert read_preprocess(run_dir, run.model)["mean"] == MEAN
    assert len(lora_norms(run)) == 4 and min(lora_norms(run)) > 0
    picture = next((photos / "val").rglob("*.png"))
    assert run.predict([str(picture)])[0][0][0] in run.labels
    assert program("evaluate").main([str(run_dir), "--merge-to", str(tmp_path / "merged")]) == 0


def test_a_changed_checkpoint_is_noticed_by_the_run(hub, vit, tmp_path, monkeypatch):
    words = ["--model", "vit-nano-patch8-48", "--weights", "hf:org/name", "--output", str(tmp_path / "run")]
    assert program("train").main([*words, *STEPS, "--data-dir", str(write_photos(tmp_path / "photos"))]) == 0
    fill(vit, seed=1).save_pretrained(tmp_path / "other")
    publish(hub, tmp_path / "other")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another home"))
    with pytest.raises(ValueError, match="hf:org/name are not those of the training"):
        load_run(tmp_path / "run")


def test_bert_from_the_hub_brings_its_tokenizer_to_vqa(hub, tmp_path):
    from transformers import BertConfig, BertModel

    words = "[PAD] [UNK] [CLS] [SEP] [MASK] what s the color of it is red green blue how many things ' ?"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    oracle = fill(BertModel(BertConfig(vocab_size=len(words.split()), **sizes)))
    oracle.save_pretrained(tmp_path / "bert")
    (tmp_path / "bert/vocab.txt").write_text("\n".join(words.split()) + "\n")
    (tmp_path / "bert/tokenizer_config.json").write_text('{"do_lower_case": true, "model_max_length": 64}')
    publish(hub, tmp_path / "bert")
    models = ["--model", "vision=vit-nano-patch8-48", "text=bert-nano", "--weights", "vision=none", "text=hf:org/name"]
    data = ["--data-dir", str(write_vqa(tmp_path / "vqa")), "--output", str(tmp_path / "run")]
    assert program("train").main(["--task", "vqa", *models, *data, *STEPS]) == 0
    run = load_run(tmp_path / "run")
    assert load_tokenizer(tmp_path / "run").vocab_size == len(words.split())
    tokens = run.model.text.embeddings.word.weight
    assert torch.equal(tokens, oracle.embeddings.word_embeddings.weight)
    assert sum(norm > 0 for norm in lora_norms(run)) == len(lora_norms(run)) == 2 * (4 + 2)


@pytest.mark.parametrize("kind", ["vocab.json", "tokenizer.json"])
def test_clip_from_the_hub_brings_its_tokenizer_to_choices(kind, hub, tmp_path):
    publish(hub, write_clip(tmp_path / "clip", "transformers", kind))
    words = ["--task", "choice", "--model", "clip-nano", "--weights", "hf:org/name", "--target-modules", "q_proj"]
    data = ["--data-dir", str(write_scpc(tmp_path / "scpc")), "--output", str(tmp_path / "run")]
    assert program("train").main([*words, *data, *STEPS, "--image-size", "32"]) == 0
    run = load_run(tmp_path / "run")
    assert min(lora_norms(run)) > 0 and run.model.config.text_dim == 32


def test_a_missing_shard_and_a_name_that_is_no_model_are_errors_for_people(hub, vit):
    del hub.files["model-00002-of-00002.safetensors"]
    with pytest.raises(ModelError, match="model-00002-of-00002.safetensors"):
        load_pretrained("hf:org/name")
    hub.files = {}
    with pytest.raises(ModelError, match="hf:org/other.*no config.json"):
        load_pretrained("hf:org/other")
