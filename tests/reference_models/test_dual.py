"""Dual encoders: the logits and gradients of VisionTextDualEncoderModel, SiglipModel and open_clip's models with other
towers, their files read and written, adapters for PEFT.
"""

from dataclasses import replace

import open_clip
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F

from minilora import LoRAConfig, export_adapter, inject_lora
from minilora.inject import lora_layers
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.load import config_for
from tests.reference_models.open_clip_names import main as count_open_clip
from tests.support.parity import BOUNDS, assert_parity, assert_round_trip, distance, fill, pictures
from tests.support.text_parity import key_biases_agree, surviving_mutants, write_checkpoint


def tiny(pooler: bool = False, **text):
    """dual-nano with two blocks in each tower, every tensor with values of its own."""
    config = config_for("dual-nano")
    towers = {"vision": replace(config.vision, pooler=pooler, depth=2), "text": replace(config.text, depth=2, **text)}
    return fill(create_model("dual-nano", **towers, embed_dim=32))


def texts():
    ids = torch.randint(5, 4000, (4, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def theirs_of(folder):
    model, report = transformers.VisionTextDualEncoderModel.from_pretrained(
        folder, dtype=torch.float64, output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("pooler", [False, True], ids=["class token, as Dinov2Model", "pooler, as ViTModel"])
def test_transformers_loads_what_is_written_and_gives_the_same_logits(pooler, tmp_path):
    model, x = tiny(pooler), pictures(48, 3).double()
    theirs = theirs_of(save_pretrained(model, tmp_path, "transformers"))
    kind = theirs.config.vision_config.model_type
    assert kind == ("vit" if pooler else "dinov2")
    ours, wanted = model.double()(x, **texts())[0], theirs(pixel_values=x, **texts()).logits_per_image
    assert distance(ours, wanted) < BOUNDS[torch.float64]


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("layout", ["transformers", "minilora"])
def test_what_was_written_is_read_back_bit_for_bit(layout, pooler, tmp_path):
    model = tiny(pooler)
    again = load_pretrained(save_pretrained(model, tmp_path, layout))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert torch.equal(model(pictures(48), **texts())[0], again(pictures(48), **texts())[0])


@pytest.mark.parametrize("pooler", [False, True])
def test_a_model_that_transformers_wrote_is_read(pooler, tmp_path):
    model = tiny(pooler)
    theirs = theirs_of(save_pretrained(model, tmp_path / "ours", "transformers")).float()
    theirs.save_pretrained(tmp_path / "theirs")
    again = load_pretrained(tmp_path / "theirs")
    assert distance(again(pictures(48), **texts())[0], model(pictures(48), **texts())[0]) < BOUNDS[torch.float32]


@pytest.mark.parametrize("pooler", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_adapter_loads_in_peft_with_the_same_logits_and_gradients(pooler, rslora, tmp_path):
    model = tiny(pooler)
    save_pretrained(model, tmp_path / "base", "transformers")
    options = {"modules_to_save": model.head_modules, "use_rslora": rslora, "init_lora_weights": False}
    inject_lora(model, LoRAConfig(3, 5.0, 0.0, ("q_proj", "v_proj", "fc1"), **options))
    with torch.no_grad():
        for parameter in (model.logit_scale, model.visual_projection.weight, model.text_projection.weight):
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = export_adapter(model, tmp_path / "adapter", "transformers5")
    theirs = peft.PeftModel.from_pretrained(theirs_of(tmp_path / "base"), folder, is_trainable=True).double()
    x = pictures(48).double()
    wanted = theirs(pixel_values=x, **texts()).logits_per_image
    ours = model.double()(x, **texts())[0]
    assert distance(ours, wanted) < BOUNDS[torch.float64]
    ours.sin().sum().backward()
    wanted.sin().sum().backward()
    names = {entry.ours[0]: entry.theirs for entry in model.key_table("transformers5")}
    parameters = dict(theirs.named_parameters())
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            grad = parameters[f"base_model.model.{names[name + '.weight'][:-7]}.{part}.default.weight"].grad
            assert distance(getattr(layer, part).weight.grad, grad) < BOUNDS[torch.float64], name


def test_a_text_tower_with_another_vector_is_no_model_of_transformers(tmp_path):
    with pytest.raises(ModelError, match="takes the pooler's vector of a text, this model the mean of the tokens"):
        save_pretrained(tiny(pooling="mean"), tmp_path, "transformers")
    model = tiny(pooling="mean")
    again = load_pretrained(save_pretrained(model, tmp_path, "minilora"))
    assert torch.equal(model(pictures(48), **texts())[0], again(pictures(48), **texts())[0])


def test_layer_scales_that_are_not_one_are_refused(tmp_path):
    save_pretrained(tiny(), tmp_path / "ours", "transformers")
    theirs = theirs_of(tmp_path / "ours")
    with torch.no_grad():
        theirs.vision_model.encoder.layer[1].layer_scale1.lambda1.mul_(2)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="layer.1.layer_scale1.lambda1 is not 1 everywhere"):
        load_pretrained(tmp_path / "theirs")


def test_a_tower_that_is_not_known_is_named(tmp_path):
    save_pretrained(tiny(), tmp_path, "transformers")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"model_type": "bert"', '"model_type": "electra"'))
    with pytest.raises(ModelError, match="a text tower 'electra' is not supported"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["roberta-base", "mpnet-base"])
def test_a_text_tower_of_another_family_goes_to_transformers_and_back(name, tmp_path):
    config = config_for("dual-nano")
    text = replace(config_for(name), dim=32, depth=2, heads=4, hidden=48, vocab_size=4000)
    model = fill(create_model("dual-nano", vision=replace(config.vision, depth=2), text=text, embed_dim=32))
    theirs = theirs_of(save_pretrained(model, tmp_path / "ours", "transformers"))
    x = pictures(48, 3).double()
    assert distance(model.double()(x, **texts())[0], theirs(pixel_values=x, **texts()).logits_per_image) < 1e-9
    theirs.float().save_pretrained(tmp_path / "theirs")
    again = load_pretrained(tmp_path / "theirs").double()
    assert distance(again(x, **texts())[0], model(x, **texts())[0]) < BOUNDS[torch.float64]


# ---- SigLIP

TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = [  # text, vision
    ({**TOWER, "vocab_size": 50, "max_position_embeddings": 9}, {**TOWER, "image_size": 32, "patch_size": 8}),
    (
        {**TOWER, "hidden_size": 24, "vocab_size": 61, "max_position_embeddings": 12, "projection_size": 48},
        {**TOWER, "hidden_size": 48, "image_size": 28, "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
    ),
]


def siglip(size: int = 0):
    """A small filled SiglipModel, its pictures and texts that fill its context."""
    text, vision = SIZES[size]
    theirs = fill(transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)))
    ids = torch.randint(0, 50, (4, text["max_position_embeddings"]), generator=torch.Generator().manual_seed(3))
    return theirs, pictures(vision["image_size"], 3), ids


def both_logits(model, images, ids):
    if isinstance(model, transformers.SiglipModel):
        found = model(input_ids=ids, pixel_values=images)
        return found.logits_per_image, found.logits_per_text, found.text_embeds, found.image_embeds
    embeds = (F.normalize(one, dim=-1) for one in (model.encode_text(ids), model.encode_image(images)))
    return *model(images, ids), *embeds


@pytest.mark.parametrize("size", [0, 1])
def test_siglip_equals_transformers_both_ways(size, tmp_path):
    theirs, images, ids = siglip(size)
    theirs.save_pretrained(tmp_path / "in")
    ours = load_pretrained(tmp_path / "in").eval()
    assert_parity(ours, theirs, images, ids, ask=both_logits)
    mask = (ids > 9).long()
    mask[:, 0] = 1
    ask = {"ask": lambda m, ids: m.encode_text(ids, mask), "ask_theirs": lambda m, ids: m.text_model(ids, mask)[1]}
    assert_parity(ours, theirs, ids, **ask)
    for layout in ("transformers", "minilora"):
        assert_round_trip(ours, layout, tmp_path / layout)
    back, report = transformers.SiglipModel.from_pretrained(tmp_path / "transformers", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_parity(ours, back.eval(), images, ids, ask=both_logits)
    tower = load_pretrained(tmp_path / "in", num_classes=0).eval()
    assert_parity(tower, theirs, images, ask=lambda m, x: m.pooled(x), ask_theirs=lambda m, x: m.vision_model(x)[1])


def test_every_swap_in_siglips_key_table_is_noticed(tmp_path):
    theirs, images, ids = siglip()
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()

    def run(model):
        return torch.cat([one.flatten() for one in both_logits(model, images, ids)])

    state = load_file(tmp_path / "model.safetensors")
    assert key_biases_agree(ours, state, "transformers4")
    with torch.no_grad():
        expected = run(ours)
    survivors = surviving_mutants(ours, state, ours.key_table("transformers4"), run, expected, count=300)
    assert [pair for pair in survivors if pair.count("k_proj.bias") < 2] == []


def test_siglips_lora_gradients_equal_pefts_and_its_adapter_travels(tmp_path):
    theirs, images, ids = siglip()
    theirs.save_pretrained(tmp_path / "base")
    model = load_pretrained(tmp_path / "base")
    inject_lora(model, LoRAConfig(3, 5.0, 0.0, ("q_proj", "v_proj", "fc1"), init_lora_weights=False))
    # the picture's pooling has one projection for q, k and v, which is no linear layer there
    blocks = [name for name, _ in lora_layers(model) if ".attn_pool." in name]
    assert blocks
    model = load_pretrained(tmp_path / "base")
    regular = r".*blocks\.\d+\..*(q_proj|v_proj|fc1)"
    inject_lora(model, LoRAConfig(3, 5.0, 0.0, regular, init_lora_weights=False))
    folder = export_adapter(model, tmp_path / "adapter", "transformers5")
    wrapped = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True).double()
    images, model = images.double(), model.double()
    wanted, ours = wrapped(pixel_values=images, input_ids=ids).logits_per_image, model(images, ids)[0]
    assert distance(ours, wanted) < BOUNDS[torch.float64]
    ours.sin().sum().backward()
    wanted.sin().sum().backward()
    names = {entry.ours[0]: entry.theirs for entry in model.key_table("transformers5")}
    parameters = dict(wrapped.named_parameters())
    for name, layer in lora_layers(model):
        for part in ("lora_A", "lora_B"):
            grad = parameters[f"base_model.model.{names[name + '.weight'][:-7]}.{part}.default.weight"].grad
            assert distance(getattr(layer, part).weight.grad, grad) < BOUNDS[torch.float64], name


def test_a_siglip_by_name_has_the_published_count():
    with torch.device("meta"):
        text, vision = {"vocab_size": 256000}, {}
        theirs = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        ours = create_model("siglip2-base-patch16-224")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_siglip_2_of_any_picture_size_is_refused_by_name(tmp_path):
    siglip()[0].save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"model_type": "siglip",', '"model_type": "siglip2",'))
    with pytest.raises(ModelError, match="NaFlex.*take a SigLIP 2 of one size"):
        load_pretrained(tmp_path)


# ---- open_clip


@pytest.mark.slow
def test_every_configuration_of_open_clip_loads_right_or_is_refused():
    counts = count_open_clip()
    assert counts["right"] >= 70 and not counts["differs"] and not counts["traceback"], counts


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision_cfg": {"qk_norm": True}}, "vision_cfg.qk_norm"),
        ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool"),
        ({"text_cfg": {"embed_cls": True}}, "CoCa"),
        ({"text_cfg": {"ls_init_value": 0.1}}, "text_cfg.ls_init_value"),
        ({"text_cfg": {"pool_type": "none"}}, "text_pool 'none'"),
        ({"nonscalar_logit_scale": True}, "model_cfg.nonscalar_logit_scale"),
        ({"text_cfg": {"norm_kwargs": {"elementwise_affine": False}}}, "norm_kwargs"),
        ({"text_cfg": {"hf_model_name": "google/mt5-base"}}, "mt5-base: .*xlm-roberta-base"),
        ({"vision_cfg": {"timm_model_name": "vitamin_base_224"}}, "vitamin_base_224: it has a convolutional stem"),
    ],
)
def test_an_option_of_open_clip_that_is_not_known_is_named(changes, named, tmp_path):
    towers = {"vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}}
    towers["text_cfg"] = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, **{name: table | changes.get(name, {}) for name, table in towers.items()}}
    config |= {key: value for key, value in changes.items() if key not in config}
    theirs = open_clip.model.CLIP(embed_dim=16, **towers)
    with pytest.raises(ModelError, match=named):
        load_pretrained(write_checkpoint(tmp_path, theirs.state_dict(), {"model_cfg": config}))


@pytest.mark.parametrize("pool", ["argmax", "eos", "first", "last"])
@pytest.mark.parametrize("causal", [True, False])
def test_open_clips_poolings_of_texts_with_an_end_token_of_2(pool, causal, tmp_path):
    text = {"context_length": 8, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2, "pool_type": pool, "eos_id": 2}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text | {"no_causal_mask": not causal}}
    theirs = fill(open_clip.model.CLIP(**config))
    ours = load_pretrained(write_checkpoint(tmp_path, theirs.state_dict(), {"model_cfg": config})).eval()
    ids = torch.tensor([[5, 9, 2, 0, 0, 0, 0, 0], [7, 19, 3, 4, 2, 0, 0, 0]])
    assert_parity(ours, theirs, ids, ask=lambda model, ids: model.encode_text(ids))
    again = assert_round_trip(ours, "open_clip", tmp_path / "out")
    assert_parity(again, theirs, ids, ask=lambda model, ids: model.encode_text(ids))
    assert bool(ours.config.fill) == (pool == "last" or not causal)
    if causal and pool == "eos":
        with pytest.raises(ModelError, match="transformers' CLIP pools texts in another way"):
            save_pretrained(ours, tmp_path / "no", "transformers")
