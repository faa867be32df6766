"""CLIP: the same numbers as transformers and open_clip from the same files, counts, gradients, bad files."""

import json

import open_clip
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F

from minilora import LoRAConfig, count_parameters, inject_lora
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.clip import FIELDS, config_for, config_from_json
from reference_models.files.names import to_ours
from reference_models.text_layers import pack_choices
from tests.support.parity import BOUNDS, assert_parity, distance
from tests.support.text_parity import (
    adapted_pairs,
    check_lora_gradients,
    key_biases_agree,
    randomize,
    surviving_mutants,
    write_checkpoint,
)

VOCABULARY, EOS = 61, 60
TEXT = dict(vocab_size=VOCABULARY, max_position_embeddings=12, num_attention_heads=2, pad_token_id=0, bos_token_id=1)
SMALL = dict(  # our settings of the first oracle below
    embed_dim=20, image_size=24, patch_size=8, vocab_size=VOCABULARY, context=12,
    vision_dim=32, vision_depth=2, vision_heads=4, vision_hidden=48,
    text_dim=24, text_depth=2, text_heads=2, text_hidden=40,
)  # fmt: skip


def hf_oracle(act="quick_gelu", eos=EOS, large=False):
    text = TEXT | dict(
        hidden_size=24, num_hidden_layers=2 + large, intermediate_size=40, hidden_act=act, eos_token_id=eos
    )
    vision = dict(
        hidden_size=32,
        num_hidden_layers=2 + large,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=42 if large else 24,
        patch_size=14 if large else 8,
        hidden_act=act,
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    return randomize(transformers.CLIPModel(config), seed=int(large))


def open_clip_oracle(quick_gelu: bool, eos: int | None = None):
    text = dict(context_length=12, vocab_size=VOCABULARY, width=24, heads=2, layers=2)
    if eos is not None:
        text |= dict(pool_type="eos", eos_id=eos)
    vision = dict(image_size=24, layers=2, width=32, head_width=8, patch_size=8)
    config = dict(embed_dim=20, vision_cfg=vision, text_cfg=text, quick_gelu=quick_gelu)
    return randomize(open_clip.model.CLIP(**config)), {"model_cfg": config}


def inputs(side=24, eos=EOS):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (3, 12), generator=generator)
    for row, end in enumerate((11, 6, 3)):
        ids[row, end:] = 0
        ids[row, end] = eos
    ids[1, 8] = eos  # a second end token in the padding: the first one counts
    images = torch.randn(2, 3, side, side, generator=generator)
    return images, ids


def logits_per_image(model, images, ids):
    """Of a CLIP model of any of the three libraries."""
    if isinstance(model, transformers.CLIPModel):
        return model(input_ids=ids, pixel_values=images).logits_per_image
    return (model.get_logits if hasattr(model, "get_logits") else model)(images, ids)[0]


def both(model, images, ids):
    return torch.cat([model.encode_image(images).flatten(), model.encode_text(ids).flatten()])


@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("eos", [2, EOS, 40])
@pytest.mark.parametrize("large", [False, True])
def test_equals_transformers_from_its_saved_directory(act, eos, large, tmp_path):
    theirs = hf_oracle(act, eos, large)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    images, ids = inputs(42 if large else 24, EOS if eos == 2 else eos)
    mask = (torch.arange(12) <= torch.tensor([11, 6, 3])[:, None]).long()
    for attention_mask in (None, mask):

        def our_answers(model, images, ids, mask=attention_mask):
            units = (F.normalize(one, dim=-1) for one in (model.encode_image(images), model.encode_text(ids, mask)))
            return *units, model.text.pooled(ids), model.vision.pooled(images), *model(images, ids, mask)

        def their_answers(model, images, ids, mask=attention_mask):
            found = model(input_ids=ids, pixel_values=images, attention_mask=mask)
            pooled = model.text_model(ids).pooler_output, model.vision_model(images).pooler_output
            return found.image_embeds, found.text_embeds, *pooled, found.logits_per_image, found.logits_per_text

        assert_parity(ours, theirs, images, ids, ask=our_answers, ask_theirs=their_answers)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("eos", [None, 40])
def test_equals_open_clip_from_its_files(quick_gelu, eos, tmp_path):
    theirs, config = open_clip_oracle(quick_gelu, eos)
    write_checkpoint(tmp_path, theirs.state_dict(), config, "open_clip_model.safetensors")
    ours = load_pretrained(tmp_path).eval()
    images, ids = inputs(eos=EOS if eos is None else eos)

    def answers(model, images, ids):
        return model.encode_image(images), model.encode_text(ids), logits_per_image(model, images, ids)

    assert_parity(ours, theirs, images, ids, ask=answers)


def test_transformers_and_open_clip_files_of_one_model_agree(tmp_path):
    theirs, config = open_clip_oracle(quick_gelu=True)
    write_checkpoint(tmp_path / "a", theirs.state_dict(), config)
    ours = load_pretrained(tmp_path / "a").eval()
    save_pretrained(ours, tmp_path / "b", "transformers")
    images, ids = inputs()
    other = transformers.CLIPModel.from_pretrained(tmp_path / "b").eval()
    assert_parity(other, theirs, images, ids, ask=logits_per_image)


@pytest.mark.parametrize("second", [False, True])
def test_partial_nested_configuration_takes_the_class_defaults(second, tmp_path):
    data = {
        "model_type": "clip",
        "text_config": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
        "vision_config": {"patch_size": 14, "hidden_act": "gelu"},
    }
    if second:  # files of 2022 say it twice, and not always the same
        data["text_config_dict"] = {"hidden_act": "gelu", "eos_token_id": 2}
        data["vision_config_dict"] = {"hidden_size": 1024, "num_attention_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(data))
    full = transformers.CLIPConfig.from_pretrained(tmp_path)
    config = config_from_json(data)
    for tower, oracle in (("vision", full.vision_config), ("text", full.text_config)):
        for ours, (theirs, *_) in FIELDS.items():
            assert getattr(config, f"{tower}_{ours}") == getattr(oracle, theirs), (tower, ours)
    assert (config.vocab_size, config.context) == (49408, 77)
    assert config.patch_size == full.vision_config.patch_size
    assert config.eos_token_id == full.text_config.eos_token_id


@pytest.mark.parametrize("layout", ["transformers4", "open_clip"])
def test_every_swap_in_the_key_table_breaks_parity(layout, tmp_path):
    images, ids = inputs()
    if layout == "open_clip":
        theirs, config = open_clip_oracle(False)
        write_checkpoint(tmp_path, theirs.state_dict(), config)
    else:
        theirs = hf_oracle()
        theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = both(ours, images, ids)
    state = load_file(tmp_path / "model.safetensors")
    assert key_biases_agree(ours, state, layout)
    survivors = surviving_mutants(ours, state, ours.key_table(layout), lambda m: both(m, images, ids), expected)
    # a bias on the keys adds the same to all scores of a query: softmax does not see it
    assert [pair for pair in survivors if pair.count("k_proj.bias") < 2] == []


def test_pooled_last_block_changes_neither_value_nor_gradient():
    model = randomize(create_model("clip-nano", **SMALL)).double()
    images, ids = inputs()
    images = images.double()
    results = []
    for switch in (True, False):
        model.vision.pooled_last_block = model.text.pooled_last_block = switch
        model.zero_grad()
        out = both(model, images, ids)
        out.sin().sum().backward()
        results.append((out, [p.grad for p in model.parameters() if p.grad is not None]))
    (one, grads_one), (full, grads_full) = results
    assert distance(one, full) <= BOUNDS[torch.float64]
    for a, b in zip(grads_one, grads_full, strict=True):
        assert (a - b).abs().max() <= BOUNDS[torch.float64] * max(b.abs().max(), 1.0)


def choices(lengths, shared, eos=EOS, T=12):
    """Texts (B, C, T): each question's choices begin with `shared` equal tokens; lengths (B, C) up to the end."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.zeros(len(lengths), len(lengths[0]), T, dtype=torch.long)
    for b, row in enumerate(lengths):
        prefix = torch.randint(3, 40, (shared[b],), generator=generator)
        for c, length in enumerate(row):
            ids[b, c, :length] = torch.randint(3, 40, (length,), generator=generator)
            ids[b, c, : min(shared[b], length)] = prefix[:length]
            ids[b, c, length] = eos
    return ids


@pytest.mark.parametrize("eos", [2, EOS])
def test_choices_that_share_their_beginning_are_encoded_as_if_alone_value_and_gradient(eos):
    model = randomize(create_model("clip-nano", **SMALL, eos_token_id=eos))
    config = LoRAConfig(r=2, target_modules=("q_proj", "v_proj", "out_proj"), init_lora_weights=False)
    inject_lora(model.double(), config)
    lengths = [[9, 6, 11, 7], [4, 4, 4, 4], [5, 3, 8, 2], [1, 1, 1, 1], [6, 6, 2, 11]]
    ids = choices(lengths, shared=[5, 4, 0, 1, 2])  # the second and the fourth question: all choices are equal
    results = []
    for packed in (True, False):
        model.zero_grad()
        alone = None if packed else model.encode_text(ids.flatten(0, 1)).view(5, 4, -1)
        out = model.text_projection(model.text.pooled_choices(ids)) if packed else alone
        out.sin().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if p.requires_grad and "text" in name]
        results.append((out, grads))
    (one, grads_one), (other, grads_other) = results
    assert one.shape == (5, 4, 20) and distance(one, other) <= BOUNDS[torch.float64]
    for a, b in zip(grads_one, grads_other, strict=True):
        assert a is not None and (a - b).abs().max() <= BOUNDS[torch.float64] * b.abs().max()


def test_packed_choices_hold_the_common_beginning_once():
    ids = choices([[9, 6, 11, 7]], shared=[5])
    packed = pack_choices(ids, torch.tensor([[9, 6, 11, 7]]))
    assert packed.ids.shape == (1, 5 + (10 - 5) + (7 - 5) + (12 - 5) + (8 - 5))
    assert packed.ids[0, packed.ends[0]].tolist() == [EOS] * 4
    assert packed.positions[0, packed.ends[0]].tolist() == [9, 6, 11, 7]
    assert packed.mask[0].sum(1)[packed.ends[0]].tolist() == [10, 7, 12, 8]


def test_lora_gradients_equal_pefts():
    theirs = hf_oracle("gelu")
    ours = create_model("clip-nano", **SMALL, eos_token_id=EOS)
    table, state = ours.key_table("transformers5"), theirs.state_dict()
    ours.load_state_dict(to_ours(state, table)[0])
    names = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    wrapped = get_peft_model(theirs, LoraConfig(r=3, lora_alpha=6, target_modules=list(names)))
    inject_lora(ours, LoRAConfig(r=3, lora_alpha=6, target_modules=names))
    images, ids = inputs()
    images = images.double()

    def loss(model):
        if model is ours:
            return model(images, ids)[0].sin().sum()
        return model(input_ids=ids, pixel_values=images).logits_per_image.sin().sum()

    check_lora_gradients(ours, wrapped, adapted_pairs(ours, "transformers5", "base_model.model."), loss)


@pytest.mark.parametrize("layout", ["minilora", "transformers", "open_clip"])
@pytest.mark.parametrize("eos", [2, EOS, 40])
def test_round_trip_is_bit_equal_and_loads_in_the_other_library(layout, eos, tmp_path):
    act = "quick_gelu" if eos == EOS else "gelu"
    model = create_model("clip-nano", **SMALL, eos_token_id=eos, vision_act=act, text_act=act)
    model = randomize(model)
    save_pretrained(model, tmp_path / "a", layout)
    again = load_pretrained(tmp_path / "a").eval()
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
    assert again.preprocess == model.preprocess
    images, ids = inputs(eos=EOS if eos == 2 else eos)
    with torch.no_grad():
        logits = model(images, ids)[0]
        assert torch.equal(again(images, ids)[0], logits)
        if layout == "transformers":
            theirs, report = transformers.CLIPModel.from_pretrained(tmp_path / "a", output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]
            assert_parity(theirs.eval(), model, images, ids, ask=logits_per_image)
        if layout == "open_clip":
            theirs = open_clip.create_model(f"local-dir:{tmp_path / 'a'}").eval()
            assert_parity(theirs, model, images, ids, ask=logits_per_image)
            side = theirs.visual.preprocess_cfg
            assert side["interpolation"] == "bicubic" and list(side["mean"]) == model.preprocess["mean"]


def test_another_picture_size_interpolates_the_positions(tmp_path):
    model = randomize(create_model("clip-nano", **SMALL))
    save_pretrained(model, tmp_path, "transformers")
    larger = load_pretrained(tmp_path, image_size=40)
    assert larger.encode_image(torch.randn(1, 3, 40, 40)).shape == (1, 20)
    assert torch.equal(larger.vision.pos_embed[:, 0], model.vision.pos_embed[:, 0])
    with pytest.raises(ValueError, match="40 x 40"):
        larger.encode_image(torch.randn(1, 3, 24, 24))


def test_parameter_counts_equal_the_listed_ones(shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        model = create_model("clip-vit-l-14")
        assert count_parameters(model).total == counts["clip_l14"]
        for part in ("vision", "text", "visual_projection", "text_projection"):
            assert count_parameters(getattr(model, part)).total == counts[f"clip_l14_{part}"]
        inject_lora(model, LoRAConfig(r=32, target_modules=("q_proj", "v_proj", "out_proj")))
        assert count_parameters(model) == (counts["clip_l14_lora_r32_qvo"], counts["clip_l14_with_lora"])
        for tower in ("vision", "text"):
            assert count_parameters(getattr(model, tower)).trainable == counts[f"clip_l14_lora_{tower}"]
        assert count_parameters(create_model("clip-vit-b-32")).total == counts["clip_b32"]


def test_key_tables_cover_the_listed_checkpoints(shared):
    for file, name, layout in (
        ("hf_clip_vit_l14_laion2B__CLIPModel", "clip-vit-l-14", "transformers4"),
        ("hf_clip_vit_base_patch32__CLIPModel", "clip-vit-b-32", "transformers5"),
        ("open_clip_ViT_B_32", "clip-vit-b-32", "open_clip"),
        ("open_clip_ViT_L_14", "clip-vit-l-14", "open_clip"),
    ):
        lines = (shared / "keys" / f"{file}.txt").read_text().splitlines()
        keys = {line.split("\t")[0] for line in lines if not line.startswith("#")}
        with torch.device("meta"):
            assert {entry.theirs for entry in create_model(name).key_table(layout)} == keys


def test_reads_the_listed_configurations(shared):
    for file, name in (
        ("hf_clip_vit_base_patch32__CLIPModel", "clip-vit-b-32-quickgelu"),
        ("hf_clip_vit_l14_laion2B__CLIPModel", "clip-vit-l-14"),
        ("open_clip_ViT_B_32", "clip-vit-b-32"),
        ("open_clip_ViT_B_32_quickgelu", "clip-vit-b-32-quickgelu"),
        ("open_clip_ViT_L_14", "clip-vit-l-14"),
    ):
        data = json.loads((shared / "keys" / f"{file}.config.json").read_text())
        found = vars(config_from_json(data if "model_type" in data else {"model_cfg": data}))
        wanted = vars(config_for(name)) | {"name": found["name"], "eos_token_id": found["eos_token_id"]}
        assert found == wanted, file


def test_clip_nano_is_small_enough_to_be_bundled():
    assert 2 * count_parameters(create_model("clip-nano")).total <= 4e6


def test_attention_maps_are_of_the_vision_tower_and_rows_sum_to_one():
    model = create_model("clip-nano", **SMALL)
    images, ids = inputs()
    maps = model.attention_maps(images) + model.text.attention_maps(ids)
    assert [tuple(one.shape) for one in maps] == [(2, 4, 10, 10)] * 2 + [(3, 2, 12, 12)] * 2
    assert all(torch.allclose(one.sum(-1), torch.ones(one.shape[:-1])) for one in maps)
    assert all(one.triu(1).abs().max() == 0 for one in maps[2:])


def test_bad_checkpoints_are_named_with_what_is_wrong_in_them(tmp_path):
    theirs = hf_oracle()
    good, config = theirs.state_dict(), theirs.config.to_dict()
    config = json.loads(json.dumps(config, default=str))
    text = config["text_config"]
    cases = {
        "vocabulary": (good, {**config, "text_config": {**text, "vocab_size": 80}}, "text.token_embed.weight is (61"),
        "extra": ({**good, "odd.weight": torch.zeros(2)}, config, "odd.weight"),
        "nan": ({**good, "text_projection.weight": torch.full((20, 24), torch.nan)}, config, "text_projection"),
        "activation": (good, {**config, "text_config": {**text, "hidden_act": "swoosh"}}, "swoosh"),
        "timm": (good, {"model_cfg": {"vision_cfg": {"timm_model_name": "x"}}}, "timm_model_name"),
    }
    for name, (state, settings, message) in cases.items():
        with pytest.raises(ModelError) as error:
            load_pretrained(write_checkpoint(tmp_path / name, state, settings))
        assert message in str(error.value), name
    with pytest.raises(ModelError, match="family clip"):
        load_pretrained("bert-nano", write_checkpoint(tmp_path / "family", good, config))
    (tmp_path / "family" / "config.json").unlink()
    with pytest.raises(ModelError, match="no key belongs to a bert model"):
        load_pretrained("bert-nano", tmp_path / "family" / "model.safetensors")
