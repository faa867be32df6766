"""DINOv2, the picture towers of CLIP and SigLIP, MAE, MSN, distilled DeiT and timm's variants: the same numbers as
transformers and timm, adapters both ways, and what is not known is refused by name.
"""

import json

import pytest
import torch

from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.timm_vit import read_timm
from reference_models.load import _make, family_module
from tests.reference_models.timm_names import main as count_timm
from tests.support.parity import (
    TARGETS,
    assert_adapter_travels,
    assert_checkpointing_is_exact,
    assert_every_adapter_learns,
    assert_key_biases,
    assert_parity,
    assert_round_trip,
    assert_same_lora_gradients,
    assert_swaps_are_noticed,
    distance,
    fill,
    logits_of,
    pictures,
    write_transformers,
    write_weights,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "patch_size": 8}
HF5 = ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def hf(name: str, kind: str = "", size: int = 32, classes: int = 5, **options):
    """A small filled model of transformers, such as hf("Dinov2", "ForImageClassification")."""
    import transformers

    if name in ("CLIP", "Siglip") and kind == "ForImageClassification":
        text = {key: SIZES[key] for key in SIZES if key != "patch_size"}
        towers = {"vision_config": {**SIZES, "image_size": size, **options}, "text_config": {**text, "vocab_size": 50}}
        config = getattr(transformers, f"{name}Config")(**towers, num_labels=classes)
    else:
        kind = kind or ("VisionModel" if name in ("CLIP", "Siglip") else "Model")
        vision = "Vision" if kind.startswith("Vision") else ""
        sizes = {**SIZES, "image_size": size, "num_labels": classes, **options}
        config = getattr(transformers, f"{name}{vision}Config")(**sizes)
    return fill(getattr(transformers, f"{name}{kind}")(config))


CLASSIFIERS = {
    "dinov2": ("Dinov2", {"mlp_ratio": 2}),
    "dinov2-swiglu": ("Dinov2", {"use_swiglu_ffn": True, "hidden_act": "silu"}),
    "dinov2-registers": ("Dinov2WithRegisters", {"num_register_tokens": 3}),
    "clip": ("CLIP", {}),
    "siglip": ("Siglip", {}),
    "msn": ("ViTMSN", {}),
}


def classifier(name: str, **options):
    kind, own = CLASSIFIERS[name]
    return hf(kind, "ForImageClassification", **own, **options)


def timm_vit(architecture: str, size: int = 32, **options):
    import timm

    arguments = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, **options}
    return fill(timm.create_model(architecture, num_classes=5, **arguments)), {
        "architecture": architecture,
        "model_args": arguments,
    }


def pooled(model, x):
    return model.pooled(x)


def vector(model, x):
    return model(x).pooler_output


# ---- the same numbers


@pytest.mark.parametrize("size", [32, 56])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers_equal_transformers(name, size, tmp_path):
    oracle, x = classifier(name, size=size), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path / "in")).eval()
    assert_parity(model, oracle, x)
    assert_key_biases(model, oracle)
    assert_round_trip(model, "transformers", tmp_path / "out")
    back = type(oracle).from_pretrained(tmp_path / "out").eval()
    assert_parity(model, back, x)


@pytest.mark.parametrize("size", [32, 56])
@pytest.mark.parametrize("name", ["Dinov2", "Dinov2WithRegisters", "CLIP", "Siglip"])
def test_towers_without_a_head_equal_transformers(name, size, tmp_path):
    oracle, x = hf(name, size=size), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path / "in")).eval()
    assert_parity(model, oracle, x, ask=pooled, ask_theirs=vector)
    tokens = (lambda m, x: m.forward_features(x)) if name != "CLIP" else (lambda m, x: m.forward_features(x)[:, 0])
    theirs = (lambda m, x: m(x).last_hidden_state) if name != "CLIP" else vector
    assert_parity(model, oracle, x, ask=tokens, ask_theirs=theirs)
    back = type(oracle).from_pretrained(save_pretrained(model, tmp_path / "out", "transformers")).eval()
    assert_parity(model, back, x, ask=pooled, ask_theirs=vector)


def test_clip_with_projection_is_read_without_it(tmp_path):
    oracle, x = hf("CLIP", "VisionModelWithProjection", projection_dim=16), pictures(32)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x, ask=pooled, ask_theirs=lambda m, x: m.vision_model(x).pooler_output)


@pytest.mark.parametrize("size", [32, 56])
@pytest.mark.parametrize("kind", ["ForPreTraining", "Model"])
def test_mae_without_mask_equals_transformers(kind, size, tmp_path):
    oracle = hf("ViTMAE", kind, size=size, mask_ratio=0.0, decoder_num_attention_heads=4)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    order = torch.arange((size // 8) ** 2)[None].expand(2, -1).double()
    encoder = getattr(oracle, "vit", oracle)
    ask = {"ask": lambda m, x: m.forward_features(x), "ask_theirs": lambda m, x: m(x, noise=order).last_hidden_state}
    assert_parity(model, encoder, pictures(size), **ask)


@pytest.mark.parametrize("size", [32, 56])
def test_both_heads_of_deit_are_averaged_and_one_new_head_replaces_them(size, tmp_path):
    oracle, x = hf("DeiT", "ForImageClassificationWithTeacher", size=size), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval()
    assert_parity(model, oracle, x)
    theirs, config = timm_vit("deit_tiny_distilled_patch16_224", size, mlp_ratio=1.5)
    ours = load_pretrained(write_weights(theirs, tmp_path / "timm", config)).eval()
    assert_parity(ours, theirs, x)
    assert_round_trip(ours, "timm", tmp_path / "out")
    assert_round_trip(model, "transformers", tmp_path / "again")
    new = load_pretrained(tmp_path / "timm", num_classes=7)
    assert new.head.weight.shape == (7, 32) and new(x).shape == (2, 7)
    with torch.no_grad():
        new.head.weight.fill_(1.0)
    assert torch.allclose(new.head(new.pooled(x)), new(x))


TIMM = {
    "vit_base_patch14_dinov2": {},
    "vit_base_patch14_reg4_dinov2": {},
    "vit_giant_patch14_dinov2": {},
    "deit3_small_patch16_224": {},
    "vit_medium_patch16_gap_256": {},
    "vit_little_patch16_reg4_gap_256": {},
    "vit_base_patch16_clip_quickgelu_224": {},
    "vit_base_patch16_siglip_512": {},
    "vit_so150m_patch16_reg4_map_256": {},
    "vit_tiny_patch16_224": {"class_token": False, "global_pool": "avg", "act_layer": "silu", "reg_tokens": 2},
}


@pytest.mark.parametrize("size", [32, 56])
@pytest.mark.parametrize("name", TIMM)
def test_variants_equal_timm(name, size, tmp_path):
    oracle, config = timm_vit(name, size, **TIMM[name])
    model = load_pretrained(write_weights(oracle, tmp_path / "in", config)).eval()
    assert_parity(model, oracle, pictures(size))
    data = json.loads((save_pretrained(model, tmp_path / "out", "timm") / "config.json").read_text())
    import timm

    back = timm.create_model(data["architecture"], num_classes=5, **data["model_args"]).eval()
    from safetensors.torch import load_file

    back.load_state_dict(load_file(tmp_path / "out" / "model.safetensors"))
    assert_parity(model, back, pictures(size))


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_names_of_timm_stand_for_its_sizes(every):
    import timm

    found = 0
    for name in timm.list_models(["vit_*", "deit*", "eva_large*"])[::every]:
        if (config := read_timm({"architecture": name})) is None:
            continue
        with torch.device("meta"):
            oracle = timm.create_model(name)
            theirs = oracle.state_dict()
            table = family_module(config.family).key_table(config, "timm")
            from reference_models.files.names import to_ours

            tensors, unknown = to_ours(theirs, table)
            fitted = family_module(config.family).fit_config(config, {k: tuple(t.shape) for k, t in tensors.items()})
            own = _make(fitted).state_dict()
        assert not unknown and {k: t.shape for k, t in own.items()} == {k: t.shape for k, t in tensors.items()}, name
        block = oracle.blocks[0]
        assert (block.attn.num_heads, block.norm1.eps) == (config.heads, config.eps), name
        assert oracle.patch_embed.img_size[0] == config.image_size == fitted.image_size, name
        act = {"gelu": "GELU", "quick_gelu": "QuickGELU", "gelu_tanh": "GELUTanh"}[config.act]
        assert getattr(config, "swiglu", False) or type(block.mlp.act).__name__ == act, name
        found += 1
    assert found > 120 // every


@pytest.mark.slow
def test_every_architecture_of_timm_loads_right_or_is_refused():
    counts = count_timm()
    assert counts["right"] >= 165 and not counts["differs"] and not counts["traceback"], counts


# ---- the key tables


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_exchange_of_two_keys_is_noticed(name, tmp_path):
    model = load_pretrained(write_transformers(classifier(name), tmp_path)).eval()
    for layout in ("transformers4", "transformers5", "timm")[: 3 if name in ("clip", "siglip") else 2]:
        assert_swaps_are_noticed(model, layout, pictures(32), limit=60)


def test_every_exchange_is_noticed_in_timms_variants(tmp_path):
    for name in ("vit_base_patch14_reg4_dinov2", "vit_so150m_patch16_reg4_map_256"):
        oracle, config = timm_vit(name)
        model = load_pretrained(write_weights(oracle, tmp_path / name, config)).eval()
        assert_swaps_are_noticed(model, "timm", pictures(32), limit=100)


# ---- LoRA


@pytest.mark.parametrize("name", ["dinov2", "dinov2-registers", "clip"])
def test_lora_gradients_equal_peft(name, tmp_path):
    oracle = classifier(name)
    model = load_pretrained(write_transformers(oracle, tmp_path))
    theirs = CLIP if name == "clip" else HF5
    assert_same_lora_gradients(model, oracle, "transformers5", pictures(32), dict(zip(TARGETS, theirs, strict=True)))


@pytest.mark.parametrize("name", ["dinov2", "dinov2-swiglu", "dinov2-registers", "clip", "siglip"])
def test_adapters_travel_to_transformers_and_back(name, tmp_path):
    oracle = classifier(name)
    model = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval()
    assert_adapter_travels(model, oracle, "transformers5", pictures(32), tmp_path)


@pytest.mark.parametrize("name", ["vit_base_patch14_reg4_dinov2", "vit_base_patch16_siglip_512"])
def test_adapters_travel_to_timm_and_back(name, tmp_path):
    oracle, config = timm_vit(name)
    model = load_pretrained(write_weights(oracle, tmp_path / "timm", config)).eval()
    assert_adapter_travels(model, oracle, "timm", pictures(32), tmp_path)


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_every_adapter_learns_and_checkpointing_is_exact(name, tmp_path):
    folder = write_transformers(classifier(name), tmp_path)
    assert_every_adapter_learns(load_pretrained(folder), pictures(32))
    assert_checkpointing_is_exact(load_pretrained(folder), pictures(32))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_full_training_leaves_no_parameter_without_gradient(name, tmp_path):
    model = load_pretrained(write_transformers(classifier(name), tmp_path), num_classes=3)
    model(pictures(32)).square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


# ---- sizes, attention, heads


def test_positions_are_interpolated_and_maps_have_all_tokens(tmp_path):
    folder = write_transformers(classifier("dinov2-registers"), tmp_path)
    model = load_pretrained(folder, image_size=48).eval()
    maps = model.attention_maps(pictures(48))
    assert len(maps) == 2 and maps[0].shape == (2, 4, 40, 40)  # 1 class token, 3 registers, 36 patches
    assert torch.allclose(maps[0].sum(-1), torch.ones(2, 4, 40))
    same = load_pretrained(folder).eval()
    assert distance(model.pos_embed[:, :1], same.pos_embed[:, :1]) == 0


@pytest.mark.parametrize("name", ["Dinov2", "CLIP", "Siglip"])
def test_a_tower_gets_the_head_of_transformers_and_loses_it_again(name, tmp_path):
    folder = write_transformers(hf(name), tmp_path / "hf")
    model, x = load_pretrained(folder, num_classes=4).eval(), pictures(32)
    import transformers

    oracle = getattr(transformers, f"{name}ForImageClassification").from_pretrained(
        save_pretrained(model, tmp_path / "out", "transformers")
    )
    assert_parity(model, oracle.eval(), x)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)


def test_parameter_counts_are_those_of_the_library():
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        for name, size in (("dinov2-small", (384, 6)), ("dinov2-base", (768, 12))):
            sizes = {"hidden_size": size[0], "num_attention_heads": size[1], "image_size": 518, "patch_size": 14}
            theirs = sum(p.numel() for p in Dinov2Model(Dinov2Config(**sizes)).parameters())
            ours = sum(p.numel() for p in create_model(name, 0).parameters())
            assert ours == theirs - size[0]  # the mask token


# ---- what is not known is refused by name


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"act_layer": "hard_swish"}, "hard_swish"),
        ({"global_pool": "avgmax"}, "avgmax"),
        ({"qk_norm": True}, "qk_norm"),
        ({"in_chans": 1}, "in_chans"),
        ({"norm_layer": "rmsnorm"}, "norm_layer"),
    ],
)
def test_an_unknown_argument_of_timm_is_named(changes, named, tmp_path):
    oracle, config = timm_vit("vit_tiny_patch16_224")
    config["model_args"] |= changes
    with pytest.raises(ModelError, match=named):
        load_pretrained(write_weights(oracle, tmp_path, config))


@pytest.mark.parametrize(
    ("settings", "instead"),
    [
        ({"model_type": "dinov3_vit"}, "DINOv2"),
        ({"model_type": "sam"}, "DINOv2"),
        ({"model_type": "convnextv2"}, "Swin"),
        ({"model_type": "resnet"}, "mobilenet-v2"),
        ({"architecture": "eva02_base_patch14_224"}, "CLIP"),
        ({"architecture": "vit_relpos_base_patch16_224"}, "BEiT"),
        ({"architecture": "swinv2_cr_tiny_224"}, "swinv2_base"),
    ],
)
def test_a_refusal_names_what_to_take_instead(settings, instead, tmp_path):
    folder = write_weights(timm_vit("vit_tiny_patch16_224")[0], tmp_path, settings)
    with pytest.raises(ModelError, match=f"take .*{instead}") as error:
        load_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("act", ["gelu_python", "gelu_fast", "silu"])
def test_activations_equal_transformers(act, tmp_path):
    oracle = hf("ViT", "ForImageClassification", hidden_act=act)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert distance(logits_of(model.double(), x := pictures(32).double()), logits_of(oracle.double(), x)) < 1e-9


# ---- the towers of a whole CLIP


def hf_clip(size: int):
    import transformers

    text = {key: SIZES[key] for key in SIZES if key != "patch_size"}
    towers = {"vision_config": {**SIZES, "image_size": size}, "text_config": {**text, "vocab_size": 50}}
    towers["text_config"] |= {"eos_token_id": 49}
    return fill(transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=16)))


@pytest.mark.parametrize("size", [32, 56])
def test_a_whole_clip_asked_for_classes_is_its_picture_tower_with_a_head(size, tmp_path):
    from transformers import CLIPForImageClassification

    clip, x = hf_clip(size), pictures(size)
    model = load_pretrained(write_transformers(clip, tmp_path / "in"), num_classes=4).eval()
    oracle = CLIPForImageClassification.from_pretrained(tmp_path / "in", num_labels=4).eval()
    oracle.classifier.load_state_dict(model.head.state_dict())
    assert_parity(model, oracle, x)
    whole = load_pretrained(tmp_path / "in")
    for layout in ("open_clip", "minilora"):
        save_pretrained(whole, tmp_path / layout, layout)
        tower = load_pretrained(tmp_path / layout, num_classes=0).eval()
        assert_parity(tower, clip, x, ask=pooled, ask_theirs=lambda m, x: m.vision_model(x).pooler_output)


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_the_text_tower_alone_equals_transformers(kind, tmp_path):
    import transformers

    text = {key: SIZES[key] for key in SIZES if key != "patch_size"}
    config = transformers.CLIPTextConfig(**text, vocab_size=50, eos_token_id=49, projection_dim=16)
    oracle = fill(getattr(transformers, kind)(config))
    model = load_pretrained(write_transformers(oracle, tmp_path / "in")).eval()
    ids = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = 49
    tower = getattr(oracle, "text_model", oracle)
    ask = {"ask": pooled, "ask_theirs": lambda m, ids: m(ids).pooler_output}
    assert_parity(model, tower, ids, **ask)
    for layout in ("transformers", "minilora"):
        assert_round_trip(model, layout, tmp_path / layout)
    back = transformers.CLIPTextModel.from_pretrained(tmp_path / "transformers").eval()
    assert_parity(model, back, ids, **ask)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPTextModel"])
def test_adapters_of_a_tower_alone_travel_to_transformers_5_and_back(kind, tmp_path):
    import copy

    import transformers
    from peft import LoraConfig, PeftModel, get_peft_model

    from minilora import LoRAConfig, export_adapter, inject_lora, load_adapter
    from minilora.inject import lora_state_dict

    text = {key: SIZES[key] for key in SIZES if key != "patch_size"} | {"vocab_size": 50, "eos_token_id": 49}
    oracle = (
        hf("CLIP")
        if kind == "CLIPVisionModel"
        else fill(transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)))
    )
    folder = write_transformers(oracle, tmp_path / "base")
    ids = torch.cat(
        [torch.randint(1, 48, (3, 8), generator=torch.Generator().manual_seed(0)), torch.full((3, 1), 49)], 1
    )
    x = pictures(32) if kind == "CLIPVisionModel" else ids
    ask = {"ask": pooled, "ask_theirs": vector}
    plain = load_pretrained(folder).eval()
    # peft's to ours
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "out_proj", "fc2"], init_lora_weights=False)
    theirs = get_peft_model(copy.deepcopy(oracle), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_adapter(copy.deepcopy(plain), tmp_path / "theirs").eval()
    assert distance(pooled(ours, x), pooled(plain, x)) > 0.01
    assert_parity(ours, theirs, x, **ask)
    # ours to peft's, and back with the same bits
    model = copy.deepcopy(plain)
    inject_lora(model, LoRAConfig(r=2, target_modules=("q_proj", "v_proj", "fc1")))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    export_adapter(model, tmp_path / "ours", "transformers")
    assert_parity(model.eval(), PeftModel.from_pretrained(copy.deepcopy(oracle), tmp_path / "ours").eval(), x, **ask)
    again = load_adapter(copy.deepcopy(plain), tmp_path / "ours")
    assert all(torch.equal(t, lora_state_dict(model)[name]) for name, t in lora_state_dict(again).items())


# ---- wrappers and files that nearly fit


@pytest.mark.parametrize(
    "wrapper",
    ["module.", "model.module.", "student.backbone.", "module.model.backbone.", "0.auto_model.", "_orig_mod."],
)
def test_wrappers_are_stripped_in_any_mix(wrapper, tmp_path):
    oracle, config = timm_vit("vit_tiny_patch16_224")
    state = {wrapper + key: tensor for key, tensor in oracle.state_dict().items()}
    write_weights(oracle, tmp_path, config)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "model.safetensors")
    assert_parity(load_pretrained(tmp_path).eval(), oracle, pictures(32))


@pytest.mark.parametrize("wrapper", ["", "model.model."])
def test_a_file_of_which_all_but_one_key_fit_says_so(wrapper, tmp_path):
    oracle = hf("ViT", "ForImageClassification")
    from safetensors.torch import save_file

    write_transformers(oracle, tmp_path)
    from safetensors.torch import load_file

    state = {wrapper + key: tensor for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file({**state, "criterion.weight": torch.ones(5)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{len(state)} of {len(state) + 1} keys are .* vit.*criterion\.weight"):
        load_pretrained(tmp_path)
