"""Adapter files: what is written, that it comes back to the bit, and what is refused."""

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora import LoRAConfig, inject_lora, load_adapter, save_adapter
from minilora.errors import UserError
from minilora.inject import lora_state_dict
from tests.support.helpers import adapted, randomise_trained, same_bits, snapshot, tiny_vit

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

VARIANTS = {
    "q, v and head": {"modules_to_save": ("head",)},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True, "modules_to_save": ("head",)},
    "patterns": {"rank_pattern": {r"blocks\.0\.attn\.q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "one layer": {"layers_to_transform": (1,)},
    "regular expression": {"target_modules": r"blocks\.\d\.(attn\.out_proj|mlp\.fc1)"},
    "all-linear": {"target_modules": "all-linear"},
    "biases of the adapted": {"bias": "lora_only"},
    "all biases": {"bias": "all", "modules_to_save": ("head",)},
    "norms": {"train_norms": True, "modules_to_save": ("head",)},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


@pytest.fixture
def base() -> nn.Module:
    return tiny_vit()


def trained(base: nn.Module, **options) -> nn.Module:
    config = LoRAConfig(**{"r": 2, "lora_alpha": 6, **options})
    return randomise_trained(inject_lora(copy.deepcopy(base), config))


def test_the_names_in_the_file_are_exactly_these(base, tmp_path):
    save_adapter(trained(base, modules_to_save=("head",)), tmp_path)
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert shapes == {
        "base_model.model.blocks.0.attn.q_proj.lora_A.weight": (2, 24),
        "base_model.model.blocks.0.attn.q_proj.lora_B.weight": (24, 2),
        "base_model.model.blocks.0.attn.v_proj.lora_A.weight": (2, 24),
        "base_model.model.blocks.0.attn.v_proj.lora_B.weight": (24, 2),
        "base_model.model.blocks.1.attn.q_proj.lora_A.weight": (2, 24),
        "base_model.model.blocks.1.attn.q_proj.lora_B.weight": (24, 2),
        "base_model.model.blocks.1.attn.v_proj.lora_A.weight": (2, 24),
        "base_model.model.blocks.1.attn.v_proj.lora_B.weight": (24, 2),
        "base_model.model.head.weight": (10, 24),
        "base_model.model.head.bias": (10,),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_dora_lengths_and_biases_have_pefts_names(base, tmp_path):
    save_adapter(trained(base, use_dora=True, bias="lora_only", layers_to_transform=(0,)), tmp_path)
    names = {name.removeprefix("base_model.model.blocks.0.attn.") for name in load_file(tmp_path / WEIGHTS)}
    kinds = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias")
    assert names == {f"{layer}.{kind}" for layer in ("q_proj", "v_proj") for kind in kinds}


def test_the_configuration_says_rank_alpha_targets_and_head(base, tmp_path):
    save_adapter(trained(base, modules_to_save=("head",), lora_dropout=0.1), tmp_path)
    data = json.loads((tmp_path / CONFIG).read_text())
    wanted = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.1, "bias": "none"}
    wanted |= {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["head"], "use_dora": False}
    assert {key: data[key] for key in wanted} == wanted


@variants
def test_round_trip_into_a_plain_model_is_bit_equal_and_so_is_the_second_file(base, tmp_path, options):
    model = trained(base, **options)
    loaded = load_adapter(copy.deepcopy(base), save_adapter(model, tmp_path / "a"))
    assert same_bits(lora_state_dict(loaded), lora_state_dict(model)) and same_bits(snapshot(loaded), snapshot(model))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), model(x))
    save_adapter(loaded, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@variants
def test_round_trip_into_a_model_that_has_lora_is_bit_equal_and_stays_trainable(base, tmp_path, options):
    model = trained(base, **options)
    other = trained(base, **options)
    load_adapter(other, save_adapter(model, tmp_path))
    assert same_bits(lora_state_dict(other), lora_state_dict(model))


def test_a_linear_probe_is_saved_and_loaded_as_an_adapter_without_layers(base, tmp_path):
    model = copy.deepcopy(base).requires_grad_(False)
    model.head.requires_grad_(True)
    randomise_trained(model)
    save_adapter(model, tmp_path)
    assert set(load_file(tmp_path / WEIGHTS)) == {"base_model.model.head.weight", "base_model.model.head.bias"}
    assert same_bits(snapshot(load_adapter(copy.deepcopy(base), tmp_path)), snapshot(model))


def test_saving_does_not_disturb_the_model_and_replaces_an_older_adapter(base, tmp_path):
    model = trained(base)
    save_adapter(trained(base), tmp_path)
    before = snapshot(model)
    save_adapter(model, tmp_path)
    assert same_bits(snapshot(model), before)
    assert same_bits(lora_state_dict(load_adapter(base, tmp_path)), lora_state_dict(model))


# ---- what is refused


def change(directory, edit) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS)


def drop(tensors):
    del tensors["base_model.model.blocks.1.attn.v_proj.lora_B.weight"]


def drop_head(tensors):
    del tensors["base_model.model.head.weight"], tensors["base_model.model.head.bias"]


def add(tensors):
    tensors["base_model.model.blocks.1.attn.k_proj.lora_B.weight"] = torch.ones(24, 2)


def add_stranger(tensors):
    tensors["base_model.model.no.such.layer.lora_A.weight"] = torch.ones(2, 24)


def reshape(tensors):
    tensors["base_model.model.head.weight"] = torch.ones(7, 24)


def spoil(tensors):
    tensors["base_model.model.head.bias"][3] = float("nan")


@pytest.mark.parametrize("with_lora", [False, True], ids=["plain model", "model with LoRA"])
@pytest.mark.parametrize(
    "edit, message",
    [
        (drop, "missing 1: blocks.1.attn.v_proj.lora_B.weight"),
        (drop_head, "missing 2: head.weight, head.bias"),
        (add, "unexpected 1: blocks.1.attn.k_proj.lora_B.weight"),
        (add_stranger, "1 of its 11 tensors have no place here, such as no.such.layer.lora_A.weight"),
        (reshape, "wrong shape 1: head.weight (7, 24), model (10, 24)"),
        (spoil, "head.bias holds NaN or infinite values; the file is damaged"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_does_not_fit_is_refused_by_name_and_the_model_stays_untouched(
    base, tmp_path, edit, message, with_lora
):
    save_adapter(trained(base, modules_to_save=("head",)), tmp_path)
    change(tmp_path, edit)
    model = trained(base, modules_to_save=("head",)) if with_lora else base
    before, grads = snapshot(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=re.escape(message)):
        load_adapter(model, tmp_path)
    assert same_bits(snapshot(model), before) and grads == [p.requires_grad for p in model.parameters()]
    assert bool(adapted(model)) == with_lora


def test_an_adapter_of_another_rank_scaling_or_other_layers_is_refused(base, tmp_path):
    directory = save_adapter(trained(base), tmp_path)
    with pytest.raises(UserError, match=r"scaling of blocks.0.attn.q_proj is 3 in the file, 1.5 in the model"):
        load_adapter(trained(base, r=4), directory)
    with pytest.raises(UserError, match=r"wrong shape 8: .*q_proj.lora_A.weight \(2, 24\), model \(4, 24\)"):
        load_adapter(trained(base, r=4, lora_alpha=12), directory)
    with pytest.raises(UserError, match=r"missing 4: blocks.0.attn.k_proj.lora_A.weight.*unexpected 4"):
        load_adapter(trained(base, target_modules=("q_proj", "k_proj")), directory)


def test_an_adapter_of_another_model_is_refused(base, tmp_path):
    directory = save_adapter(trained(base), tmp_path)
    with pytest.raises(UserError, match="belongs to another model: 8 of its 8 tensors have no place here"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), directory)
    with pytest.raises(UserError, match=r"wrong shape 8: .*lora_A.weight \(2, 24\), model \(2, 48\)"):
        load_adapter(tiny_vit(dim=48), directory)
    with pytest.raises(UserError, match="have no place here"):
        load_adapter(tiny_vit(depth=1), directory)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_weights_file_is_refused(base, tmp_path, keep):
    data = (save_adapter(trained(base), tmp_path) / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[:keep])
    with pytest.raises(UserError, match="cannot be read .truncated or damaged.*"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("missing", [WEIGHTS, CONFIG])
def test_a_missing_file_is_named(base, tmp_path, missing):
    (save_adapter(trained(base), tmp_path) / missing).unlink()
    with pytest.raises(UserError, match=f"not an adapter directory: {missing} is missing"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, found 'IA3'"),
        ({"lora_bias": True}, "lora_bias = True is not plain LoRA, rsLoRA or DoRA"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' changed the base weights"),
        ({"r": 0}, "r must be a whole number of at least 1"),
    ],
    ids=str,
)
def test_a_configuration_that_means_other_mathematics_is_refused(base, tmp_path, settings, message):
    path = save_adapter(trained(base), tmp_path) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError, match=re.escape(message)):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": 8}', "[" * 100_000])
def test_a_broken_configuration_is_refused(base, tmp_path, text):
    (save_adapter(trained(base), tmp_path) / CONFIG).write_text(text)
    with pytest.raises(UserError, match="cannot be read|peft_type must be LORA"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": "8"},
        {"lora_alpha": "x"},
        {"rank_pattern": [1]},
        {"target_modules": 3},
        {"lora_dropout": "a"},
        {"bias": []},
    ],
    ids=str,
)
def test_a_configuration_with_values_of_the_wrong_kind_is_refused(base, tmp_path, settings):
    path = save_adapter(trained(base), tmp_path) / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(UserError):
        load_adapter(base, tmp_path)


def test_nan_is_refused_when_saving_and_nothing_is_written(base, tmp_path):
    model = trained(base)
    model.blocks[0].attn.q_proj.lora_A.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="q_proj.lora_A.weight holds NaN or infinite values; nothing was written"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_minimal_configuration_of_older_peft_is_enough(base, tmp_path):
    model = trained(base, lora_alpha=8)
    keys = ("peft_type", "r", "lora_alpha", "target_modules")
    path = save_adapter(model, tmp_path) / CONFIG
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key in keys}))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_adapter(base, tmp_path)(x), model(x))
