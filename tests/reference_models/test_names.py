"""Key tables in both directions, and the renaming of adapters between transformers 4 and 5."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minilora.commands.rename_adapter import main
from reference_models import ModelError, load
from reference_models.files.names import Entry, fused, linear, rename, strip_wrappers, to_ours, to_theirs
from reference_models.files.rename_adapter import FAMILIES, LAYOUTS, convert, rules_for

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16)
SWIN = dict(image_size=16, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4)
MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, patch_size=8)),
    "vit-alone": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, patch_size=8)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL, patch_size=8)),
    "beit": lambda: transformers.BeitForImageClassification(transformers.BeitConfig(**SMALL, patch_size=8)),
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN)),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**SMALL, patch_size=8)),
    "dinov2-registers": lambda: transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(**SMALL, patch_size=8)
    ),
}
OLD = {  # transformers 5's last names -> transformers 4's, from the format notes
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def adapter(name: str, folder, **options):
    """An adapter with random B, as peft saves it, and the model and logits that it belongs to."""
    torch.manual_seed(0)
    base = MODELS[name]().eval()
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "fc1"], **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**options, init_lora_weights=False)).eval()
    model.save_pretrained(folder)
    return state, answer(model)


def answer(model) -> torch.Tensor:
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        out = model(x)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def tensors(folder) -> dict:
    return load_file(folder / "adapter_model.safetensors")


OPTIONS = {
    "plain": {},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "o_proj", "fc2"]},
    "saved": {"modules_to_save": ["classifier", "layernorm_after"], "bias": "lora_only"},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.*.v_proj": 7}, "use_rslora": True},
    "regex": {"target_modules": r".*\.(q_proj|fc1)"},
    "layers": {"layers_to_transform": [0], "layers_pattern": ["layers", "blocks"]},
}
CASES = [("vit", name) for name in OPTIONS] + [(name, "plain") for name in MODELS if name != "vit"]
CASES += [("swin", "patterns"), ("swin", "saved"), ("dinov2", "dora")]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_adapters_go_to_transformers_4_and_back_with_the_same_bits_and_logits(name, kind, tmp_path):
    state, logits = adapter(name, tmp_path / "five", **OPTIONS[kind])
    assert convert(tmp_path / "five", tmp_path / "four", "transformers4") > 0
    four, five = tensors(tmp_path / "four"), tensors(tmp_path / "five")
    text = " ".join(four)
    # the MLP of DINOv2 was never called otherwise
    assert not any(f".{new}." in text for new in OLD if not (new.startswith("mlp.") and name.startswith("dinov2")))
    assert any(f".{old}." in text for old in OLD.values())
    assert convert(tmp_path / "four", tmp_path / "back", "transformers5") > 0
    back = tensors(tmp_path / "back")
    assert list(back) == list(five) and all(torch.equal(back[key], five[key]) for key in five)
    base = MODELS[name]()
    base.load_state_dict(state)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "back").eval()
    assert torch.equal(answer(again), logits)


def test_names_of_transformers_4_are_those_of_its_checkpoints(tmp_path):
    adapter("vit", tmp_path / "five", target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"])
    convert(tmp_path / "five", tmp_path / "four", "transformers4")
    layer = "base_model.model.vit.encoder.layer.1."
    names = {key.removeprefix(layer).removesuffix(".lora_A.weight") for key in tensors(tmp_path / "four")}
    expected = {f"attention.attention.{part}" for part in ("query", "key", "value")}
    expected |= {"attention.output.dense", "intermediate.dense", "output.dense"}
    assert {name for name in names if "." in name and not name.startswith("base_model")} == expected | {
        f"{name}.lora_B.weight" for name in expected
    }


def test_an_adapter_with_the_right_names_is_copied_and_bert_and_clip_do_not_change(tmp_path):
    adapter("vit", tmp_path / "five")
    assert convert(tmp_path / "five", tmp_path / "same", "transformers5") == 0
    assert all(torch.equal(t, tensors(tmp_path / "five")[key]) for key, t in tensors(tmp_path / "same").items())
    for family in ("bert", "clip"):
        for rule in rules_for(family, "transformers4", "transformers5"):
            assert rule.source.fullmatch(rule.target.replace("{}", "3")), rule


def write(folder, names, config=None):
    folder.mkdir()
    save_file({name: torch.ones(2, 2) for name in names}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, **(config or {})}))
    return folder


def test_an_adapter_on_the_head_of_siglips_text_tower_is_known(tmp_path):
    names = [f"base_model.model.text_model.head.lora_{matrix}.weight" for matrix in "AB"]
    assert convert(write(tmp_path / "a", names), tmp_path / "b", "transformers5") == 0
    assert set(tensors(tmp_path / "b")) == set(names)


def test_the_family_is_asked_for_where_the_names_fit_several(tmp_path):
    names = ["base_model.model.encoder.layer.0.output.dense.lora_A.weight"]
    folder = write(tmp_path / "a", names)
    with pytest.raises(ModelError, match="--family"):
        convert(folder, tmp_path / "out", "transformers5")
    convert(folder, tmp_path / "vit", "transformers5", family="vit")
    assert list(tensors(tmp_path / "vit")) == ["base_model.model.layers.0.mlp.fc2.lora_A.weight"]
    convert(folder, tmp_path / "bert", "transformers5", family="bert")
    assert list(tensors(tmp_path / "bert")) == names
    hinted = write(tmp_path / "b", names, {"auto_mapping": {"base_model_class": "ViTModel"}})
    convert(hinted, tmp_path / "hinted", "transformers5")
    assert list(tensors(tmp_path / "hinted")) == list(tensors(tmp_path / "vit"))


TOWERS = {
    "CLIPVisionModel": ("CLIPVisionConfig", {"patch_size": 8}, "vision_model"),
    "SiglipVisionModel": ("SiglipVisionConfig", {"patch_size": 8}, "vision_model"),
    "CLIPTextModel": ("CLIPTextConfig", {"vocab_size": 40, "eos_token_id": 39}, "text_model"),
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", {"patch_size": 8}, None),  # which keeps its level
    "CLIPTextModelWithProjection": ("CLIPTextConfig", {"vocab_size": 40, "eos_token_id": 39}, None),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_towers_of_clip_alone_have_a_level_more_in_transformers_4(kind, tmp_path):
    config, options, level = TOWERS[kind]
    sizes = {key: SMALL[key] for key in SMALL if key != "image_size" or "Vision" in kind}
    base = getattr(transformers, kind)(getattr(transformers, config)(**sizes, **options))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "five")
    count = convert(tmp_path / "five", tmp_path / "four", "transformers4")
    four, five = tensors(tmp_path / "four"), tensors(tmp_path / "five")
    lead = "base_model.model."
    if level is None:
        assert count == 0 and list(four) == list(five)
        return
    assert {name.replace(f"{lead}{level}.", lead) for name in four} == set(five) != set(four)
    assert convert(tmp_path / "four", tmp_path / "back", "transformers5") == len(five) == count
    back = tensors(tmp_path / "back")
    assert list(back) == list(five) and all(torch.equal(back[name], five[name]) for name in five)
    again = getattr(transformers, kind)(base.config)
    peft.PeftModel.from_pretrained(again, tmp_path / "back")  # with a warning where a name is not known
    # without the class that PEFT notes both towers' names would do
    settings = json.loads((tmp_path / "four" / "adapter_config.json").read_text()) | {"auto_mapping": None}
    (tmp_path / "four" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="names fit .* and clip_.*--family"):
        convert(tmp_path / "four", tmp_path / "out", "transformers5")
    whole = "siglip" if kind.startswith("Siglip") else "clip"
    convert(tmp_path / "four", tmp_path / "clip", "transformers5", family=whole)
    assert list(tensors(tmp_path / "clip")) == list(four)


def test_bad_adapters_are_named(tmp_path):
    with pytest.raises(ModelError, match="evaluate.py --export-adapter"):
        convert(tmp_path, tmp_path / "out", "timm")
    with pytest.raises(ModelError, match="adapter_config.json"):
        convert(tmp_path, tmp_path / "out", "transformers5")
    with pytest.raises(ModelError, match=r"h\.0\.attn.*no model of transformers"):
        folder = write(tmp_path / "gpt", ["base_model.model.h.0.attn.c_attn.lora_A.weight"])
        convert(folder, tmp_path / "out", "transformers5")
    with pytest.raises(ModelError, match="layers.0.q: not an adapter"):
        convert(write(tmp_path / "no", ["layers.0.q"]), tmp_path / "out", "transformers5")
    assert not (tmp_path / "out").exists()


def test_the_command_renames_prints_one_line_and_exits_2_on_mistakes(tmp_path, capsys):
    adapter("vit", tmp_path / "five")
    command = [sys.executable, "-m", "minilora.commands.rename_adapter"]
    command += [tmp_path / "five", tmp_path / "four", "--layout", "transformers4"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0 and done.stderr == ""
    assert "12 tensors renamed" in done.stdout
    with pytest.raises(SystemExit) as exit_:
        main([str(tmp_path / "none"), str(tmp_path / "x"), "--layout", "transformers4"])
    assert exit_.value.code == 2 and "error: " in capsys.readouterr().err


def test_every_family_that_has_both_transformers_layouts_is_converted():
    models = {"vit_variants": {"dinov2", "dinov2_with_registers", "siglip", "clip_vision"}}
    same = {"dual", "bert_variants"}  # their names are the same in both
    both = {name for name in load.FAMILIES if set(LAYOUTS) <= set(load.family_module(name).layouts)} - same
    assert set(FAMILIES) == set().union(*(models.get(name, {name}) for name in both))


def test_forms_are_each_others_inverse():
    table = [
        *linear("a", "x"),
        rename("kernel", "k", "kernel"),
        rename("matrix", "m", "transpose"),
        rename("positions", "p", "batch"),
        rename("token", "t", "vector"),
        *fused(("q", "k", "v"), "qkv.weight", "qkv.bias"),
        Entry(("bq.bias", "bv.bias"), "z", "cat_without_k"),
    ]
    shapes = {"a.weight": (2, 3), "a.bias": (2,), "kernel": (4, 12), "matrix": (2, 5), "positions": (1, 3, 4)}
    shapes |= {"token": (1, 1, 4), "bq.bias": (4,), "bv.bias": (4,)}
    shapes |= {f"{name}.weight": (4, 4) for name in "qkv"} | {f"{name}.bias": (4,) for name in "qkv"}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    theirs = to_theirs(state, table)
    assert theirs["k"].shape == (4, 3, 2, 2) and theirs["m"].shape == (5, 2) and theirs["p"].shape == (3, 4)
    assert theirs["qkv.weight"].shape == (12, 4) and theirs["z"][4:8].abs().sum() == 0
    ours, unknown = to_ours({**theirs, "odd": torch.ones(1)}, table)
    assert unknown == ["odd"] and all(torch.equal(ours[name], state[name]) for name in state)
    with pytest.raises(ModelError, match="qkv.weight: 11 rows"):
        to_ours({"qkv.weight": torch.ones(11, 4)}, table)
    with pytest.raises(ModelError, match="no place for extra"):
        to_theirs({**state, "extra": torch.ones(1)}, table)


def test_wrappers_and_old_norm_names_are_stripped():
    state = {"module._orig_mod.encoder.LayerNorm.gamma": 1, "module._orig_mod.encoder.LayerNorm.beta": 2}
    assert strip_wrappers(state) == {"encoder.LayerNorm.weight": 1, "encoder.LayerNorm.bias": 2}
