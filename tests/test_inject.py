"""Putting LoRA into a model: which layers it finds, what it leaves alone, what it refuses, and taking it out again."""

import copy
import re

import peft
import pytest
import timm
import torch
import torchvision
from torch import nn

from minilora import LoRAConfig, LoRALinear, count_parameters, disable_lora, inject_lora, merge_lora
from minilora.errors import UserError
from minilora.inject import cast_frozen, lora_layers, lora_state_dict
from reference_models import create_model
from tests.support.helpers import adapted, randomise_trained, same_bits, snapshot, tiny_vit, train_steps

ALL = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def named(*names: str) -> nn.Module:
    """A model whose linear layers have just these dotted names."""
    model = nn.Module()
    for name in names:
        *path, last = name.split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(last, nn.Linear(4, 4))
    return model


def targets(model: nn.Module, wanted, **options) -> list[str]:
    return adapted(inject_lora(model, LoRAConfig(r=2, target_modules=wanted, **options)))


# ---- which layers


def test_a_target_is_a_full_name_or_its_end_after_a_dot_never_a_part_of_a_word():
    names = ("q_proj", "a.q_proj", "a.xq_proj", "a.q_proj_x", "b.v")
    assert targets(named(*names), ("q_proj",)) == ["q_proj", "a.q_proj"]
    assert targets(named(*names), ("a.q_proj",)) == ["a.q_proj"]
    assert targets(named(*names), ("b.v", "q_proj_x")) == ["a.q_proj_x", "b.v"]


def test_a_dotted_target_takes_the_layers_below_its_first_part():
    names = ("vision.layers.0.q_proj", "vision.layers.1.q_proj", "text.layers.0.q_proj", "head")
    assert targets(named(*names), ("vision.q_proj",)) == [name for name in names if "vision" in name]


def test_one_string_is_a_regular_expression_for_the_whole_name():
    names = ("layers.0.q", "layers.1.q", "layers.1.k", "x.layers.0.q")
    assert targets(named(*names), r"layers\.\d\.(q|v)") == ["layers.0.q", "layers.1.q"]


def test_all_linear_takes_every_linear_layer_of_the_blocks_and_spares_the_head():
    found = targets(tiny_vit(), "all-linear")
    assert len(found) == 12 and {name.rpartition(".")[2] for name in found} == set(ALL)


def test_all_linear_spares_the_usual_heads_of_other_libraries():
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=3)
    assert targets(vit, "all-linear") == [
        f"blocks.0.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    ]
    assert targets(named("body.fc", "classifier"), "all-linear") == ["body.fc"]


@pytest.mark.parametrize("layers, wanted", [((1,), [1]), ([0, 2], [0, 2]), (2, [2])])
def test_layers_to_transform_chooses_by_the_last_number_in_the_name(layers, wanted):
    found = targets(tiny_vit(depth=3), ("q_proj",), layers_to_transform=layers)
    assert found == [f"blocks.{i}.attn.q_proj" for i in wanted]


def test_of_two_numbers_in_a_name_the_last_one_is_the_layer():
    names = ("stages.0.blocks.0.q", "stages.0.blocks.1.q", "stages.1.blocks.0.q")
    assert targets(named(*names), ("q",), layers_to_transform=(1,)) == ["stages.0.blocks.1.q"]


def test_rank_and_alpha_patterns_hold_for_the_names_that_they_match():
    model = tiny_vit()
    patterns = {"rank_pattern": {"q_proj": 3, r"blocks\.1\.attn\.v_proj": 5}, "alpha_pattern": {r"blocks.0.*": 1}}
    inject_lora(model, LoRAConfig(r=2, lora_alpha=4, **patterns))
    found = {name: (layer.r, layer.scaling) for name, layer in lora_layers(model)}
    assert found == {
        "blocks.0.attn.q_proj": (3, 1 / 3),
        "blocks.0.attn.v_proj": (2, 1 / 2),
        "blocks.1.attn.q_proj": (3, 4 / 3),
        "blocks.1.attn.v_proj": (5, 4 / 5),
    }


# ---- what is refused, and how it is said


@pytest.mark.parametrize(
    "wanted, message",
    [
        (("query",), "target 'query' matches no linear layer; this model has proj (1), q_proj (2), k_proj (2)"),
        (("q_proj", "v_prj"), "target 'v_prj' matches no linear layer"),
        (("q_proj,v_proj",), "target 'q_proj,v_proj' matches no linear layer; this model has proj (1), q_proj (2)"),
        (("norm1",), "target 'norm1' is a LayerNorm, not an nn.Linear; choose proj (1), q_proj (2)"),
        ("q_proj", "one string is a regular expression for the whole name; write a tuple of names"),
    ],
)
def test_a_target_that_matches_nothing_is_refused_with_the_choices_and_the_model_stays_as_it_was(wanted, message):
    model = tiny_vit()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(UserError, match=re.escape(message)):
        inject_lora(model, LoRAConfig(target_modules=wanted))
    assert before == {name: p.requires_grad for name, p in model.named_parameters()} and not adapted(model)


def test_layers_that_do_not_exist_are_refused():
    with pytest.raises(UserError, match=r"matches no linear layer in layers \[7\]"):
        targets(tiny_vit(), ("q_proj",), layers_to_transform=(7,))


def test_modules_to_save_that_do_not_exist_or_are_targets_too_are_refused():
    with pytest.raises(UserError, match="modules_to_save names 'clasifier'.*it has patch_embed, blocks, norm, head"):
        targets(tiny_vit(), ("q_proj",), modules_to_save=("clasifier",))
    with pytest.raises(UserError, match="'head' is both in target_modules and in modules_to_save"):
        targets(tiny_vit(), ("q_proj", "head"), modules_to_save=("head",))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "r must be a whole number of at least 1, got 2.5"),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\['q_proj'\] must be a whole number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0"),
        ({"bias": "some"}, "bias must be one of none, lora_only, all, got 'some'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be one of True, False, gaussian, got 'pissa'"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number, got nan"),
        ({"alpha_pattern": {"q": "a"}}, r"alpha_pattern\['q'\] must be a number, got 'a'"),
        ({"rank_pattern": [3]}, r"rank_pattern must be {regular expression: rank}, got \[3\]"),
        ({"target_modules": 3}, "target_modules must be names or one regular expression, got 3"),
        ({"target_modules": "q_(proj"}, r"target_modules must be names or one regular expression, got 'q_\(proj'"),
    ],
)
def test_impossible_settings_are_refused_naming_the_field(options, message):
    with pytest.raises(UserError, match=message):
        LoRAConfig(**options)


def test_one_name_for_modules_to_save_may_come_without_a_tuple():
    assert LoRAConfig(modules_to_save="head").modules_to_save == ("head",)


def test_injecting_twice_is_refused():
    model = inject_lora(tiny_vit(), LoRAConfig())
    with pytest.raises(UserError, match="already has LoRA layers; call merge_lora first"):
        inject_lora(model, LoRAConfig())


def test_multihead_attention_reads_its_weights_and_is_refused():
    vit = torchvision.models.VisionTransformer(32, 16, 1, 2, 16, 32, num_classes=3)
    with pytest.raises(UserError, match="nn.MultiheadAttention, which reads the weights of its projections"):
        inject_lora(vit, LoRAConfig(target_modules=("out_proj",)))
    assert type(vit.encoder.layers[0].self_attention.out_proj) is not LoRALinear


@pytest.mark.parametrize(
    "build, target",
    [
        (lambda: torchvision.models.SwinTransformer([4, 4], 8, [2], [2], [4, 4], num_classes=3), "qkv"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1, img_size=32, num_classes=3), "qkv"),
    ],
    ids=["torchvision Swin", "timm BEiT"],
)
def test_models_that_read_the_weight_of_a_target_fail_loudly_and_do_not_train_in_silence(build, target):
    model = inject_lora(build(), LoRAConfig(target_modules=(target,)))
    with pytest.raises(AttributeError, match="reads the weights of this layer instead of calling it"):
        model(torch.randn(1, 3, 32, 32))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_linear_layer_with_its_own_forward_is_refused():
    model = nn.Sequential(Doubled(4, 4))
    with pytest.raises(UserError, match="'0' is a Doubled, which computes something else than W x"):
        inject_lora(model, LoRAConfig(target_modules=("0",)))


def test_a_linear_layer_with_hooks_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, inputs, output: output)
    with pytest.raises(UserError, match="'0' has forward hooks"):
        inject_lora(model, LoRAConfig(target_modules=("0",)))


# ---- what is trained and what is left alone


@pytest.mark.parametrize("training", [True, False])
def test_train_or_eval_mode_device_and_dtype_are_kept(training):
    model = create_model("vit-tiny-patch16-224", 3, depth=1).to("meta", torch.bfloat16).train(training)
    inject_lora(model, LoRAConfig(lora_dropout=0.1, modules_to_save=("head",)))
    assert all(module.training is training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    "options, trained",
    [
        ({}, r"\.lora_"),
        ({"modules_to_save": ("head",)}, r"\.lora_|^head\."),
        ({"bias": "lora_only"}, r"\.lora_|base_layer\.bias"),
        ({"bias": "all"}, r"\.lora_|bias$"),
        ({"train_norms": True}, r"\.lora_|norm"),
    ],
    ids=["adapters", "head", "lora_only", "all", "norms"],
)
def test_after_training_steps_only_the_trained_tensors_moved_and_all_of_them_did(options, trained):
    model = inject_lora(tiny_vit(), LoRAConfig(r=2, init_lora_weights=False, **options)).train()
    before = snapshot(model)
    train_steps(model, lambda model: model(torch.randn(4, 3, 32, 32)), steps=3)
    moved = {name for name, tensor in snapshot(model).items() if not torch.equal(tensor, before[name])}
    assert moved == set(lora_state_dict(model)) == {name for name in before if re.search(trained, name)}


def test_every_adapter_of_every_target_gets_a_gradient():
    model = inject_lora(tiny_vit(), LoRAConfig(target_modules=ALL, modules_to_save=("head",), init_lora_weights=False))
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all((p.grad is not None and p.grad.any()) == p.requires_grad for p in model.parameters())


def test_cast_frozen_stores_frozen_weights_in_half_and_leaves_the_trained_in_float32():
    model = inject_lora(tiny_vit(), LoRAConfig(modules_to_save=("head",), train_norms=True, init_lora_weights=False))
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        assert torch.equal(cast_frozen(model, torch.bfloat16)(x), wanted)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["blocks.0.attn.q_proj.base_layer.weight"] == kinds["blocks.0.mlp.fc1.bias"] == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


# ---- merge and disable


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"bias": "all", "use_rslora": True}], ids=str)
def test_merge_gives_plain_linear_layers_with_the_same_output(options):
    model = randomise_trained(inject_lora(tiny_vit(), LoRAConfig(target_modules=ALL, **options)))
    x = torch.randn(2, 3, 32, 32)
    wanted = model(x)
    plain = merge_lora(model)
    assert plain is model and not adapted(plain) and not hasattr(plain, "lora_config")
    assert (
        type(plain.blocks[0].attn.q_proj) is nn.Linear and plain.state_dict().keys() == tiny_vit().state_dict().keys()
    )
    assert torch.allclose(plain(x), wanted, rtol=1e-4, atol=1e-4)


def test_merging_twice_or_without_lora_changes_nothing():
    model = merge_lora(randomise_trained(inject_lora(tiny_vit(), LoRAConfig())))
    before = snapshot(model)
    assert same_bits(snapshot(merge_lora(model)), before)
    assert inject_lora(model, LoRAConfig()) is model  # and a merged model can be adapted again


def test_disable_lora_gives_the_base_output_to_the_bit_and_then_lora_is_back():
    base = tiny_vit().requires_grad_(False)  # torch 2.6 rounds otherwise where a weight asks for a gradient
    x = torch.randn(2, 3, 32, 32)
    model = inject_lora(copy.deepcopy(base), LoRAConfig(target_modules=ALL, init_lora_weights=False))
    tuned = model(x)
    with disable_lora(model) as same, disable_lora(model):
        assert same is model and torch.equal(model(x), base(x))
    assert torch.equal(model(x), tuned) and not torch.equal(tuned, base(x))


def test_disable_lora_switches_back_on_when_the_block_raises():
    model = inject_lora(tiny_vit(), LoRAConfig(init_lora_weights=False))
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    assert all(layer.enabled for _, layer in lora_layers(model))


# ---- counts


def test_the_parameter_line_equals_that_of_peft(capsys):
    ours, theirs = tiny_vit(), tiny_vit()
    inject_lora(ours, LoRAConfig(r=3, target_modules=("q_proj", "fc1")))
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "fc1"])
    peft.get_peft_model(theirs, config).print_trainable_parameters()
    assert str(count_parameters(ours)) == capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    "options, trainable, total",
    [({"r": 4, "target_modules": ALL, "train_norms": True}, 177_418, 5_692_234), ({"r": 8}, 75_658, 5_600_074)],
    ids=["R3: r=4, all six layers, norms, head", "r=8, q and v, head"],
)
def test_counts_of_vit_tiny_with_ten_classes(options, trainable, total):
    with torch.device("meta"):
        model = create_model("vit-tiny-patch16-224", 10)
    assert count_parameters(model) == (5_526_346, 5_526_346)
    inject_lora(model, LoRAConfig(modules_to_save=("head",), **options))
    assert count_parameters(model) == (trainable, total)


def test_the_readme_line_is_printed_in_pefts_format():
    with torch.device("meta"):
        model = inject_lora(create_model("vit-tiny-patch16-224", 10), LoRAConfig(modules_to_save=("head",)))
    line = "trainable params: 75,658 || all params: 5,600,074 || trainable%: 1.3510"
    assert str(count_parameters(model)) == line


@pytest.mark.parametrize("targets", [("linear1", "linear2"), ("linear2",), "all-linear"])
@pytest.mark.parametrize("whole", [True, False])
def test_torch_s_encoder_layers_leave_the_fast_path_that_reads_weights(targets, whole):
    """In eval mode, with a padding mask and without; before and after merging; a lone layer and a whole encoder."""
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2) if whole else nn.Sequential(layer)
    model = inject_lora(model.double(), LoRAConfig(r=2, target_modules=targets, init_lora_weights=False))
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    masks = [{}, {"src_key_padding_mask": padding}] if whole else [{}]
    for mask in masks:
        trained = model.train()(x, **mask)
        with torch.no_grad():
            evaluated = model.eval()(x, **mask)
            with disable_lora(model):
                assert not torch.allclose(model(x, **mask), evaluated)
            merged = merge_lora(copy.deepcopy(model)).eval()(x, **mask)
        seen = ~padding if mask else torch.ones_like(padding)
        assert torch.allclose(trained[seen], evaluated[seen], rtol=0, atol=1e-12)
        assert torch.allclose(merged[seen], evaluated[seen], rtol=0, atol=1e-12)


def test_an_encoder_without_lora_inside_keeps_its_fast_path():
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), "head": nn.Linear(8, 2)})
    inject_lora(model, LoRAConfig(r=2, target_modules=("head",)))
    assert model["encoder"].activation_relu_or_gelu == 1
