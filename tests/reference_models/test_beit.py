"""BEiT: the same numbers as transformers and timm, their files, exact sizes, LoRA everywhere."""

import copy
import json

import pytest
import torch

from minilora import LoRAConfig, count_parameters, inject_lora
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.beit import resize_bias_table
from tests.support.parity import (
    TARGETS,
    adapted,
    assert_adapter_travels,
    assert_checkpointing_is_exact,
    assert_every_adapter_learns,
    assert_keys_of,
    assert_parity,
    assert_round_trip,
    assert_same_lora_gradients,
    assert_swaps_are_noticed,
    attention_of,
    chance,
    fill,
    pictures,
    write_transformers,
    write_weights,
)

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
KINDS = {
    "own bias": {"use_relative_position_bias": True},
    "shared bias": {"use_shared_relative_position_bias": True},
    "both biases and positions": {
        "use_relative_position_bias": True,
        "use_shared_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
    },
    "class token": {"use_relative_position_bias": True, "use_mean_pooling": False},
    "no layer scale": {"use_relative_position_bias": True, "layer_scale_init_value": 0.0},
}


def hf_beit(size=32, classes=5, **options):
    from transformers import BeitConfig, BeitForImageClassification

    options = {**SMALL, "image_size": size, "patch_size": 8, "num_labels": classes, **options}
    return fill(BeitForImageClassification(BeitConfig(**options)))


def timm_beit(size=32, classes=5, **options):
    from timm.models.beit import Beit

    sizes = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    return fill(Beit(**{**sizes, "num_classes": classes, "use_rel_pos_bias": True, "init_values": 0.1, **options}))


TIMM_CONFIG = {
    "architecture": "beit_base_patch16_224",
    "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 59])  # 59: three pixels over at the edge
def test_logits_equal_transformers(kind, size, tmp_path):
    oracle, x = hf_beit(size, **KINDS[kind]), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)


@pytest.mark.parametrize("seed", range(8))
def test_random_configurations_equal_transformers(seed, tmp_path):
    choose = chance(seed)
    heads, size = choose([1, 2, 3, 6]), choose([16, 31, 40, 64])
    options = {"hidden_size": heads * choose([4, 8, 12]), "num_attention_heads": heads}
    options |= {"num_hidden_layers": choose([1, 2, 3]), "intermediate_size": choose([20, 64])}
    options |= {"patch_size": choose([4, 8]), "num_labels": choose([3, 7]), "hidden_act": choose(["gelu", "relu"])}
    kinds = ("relative_position_bias", "shared_relative_position_bias", "mean_pooling")
    options |= {f"use_{kind}": choose([True, False]) for kind in kinds}
    options |= {"layer_scale_init_value": choose([0.0, 0.1]), "layer_norm_eps": choose([1e-12, 1e-5])}
    oracle, x = hf_beit(size, **options), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)


@pytest.mark.parametrize("size", [32, 56, (24, 40)])  # transformers misreads the tables of an oblong grid
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_logits_equal_timm(size, pool, tmp_path):
    oracle, x = timm_beit(size, global_pool=pool), pictures(size)
    config = {**TIMM_CONFIG, "model_args": {**TIMM_CONFIG["model_args"], "img_size": size}}
    model = load_pretrained(write_weights(oracle, tmp_path, config)).eval()
    assert_parity(model, oracle, x)


def small(kind="own bias", tmp_path=None, size=32):
    """Our model with the weights of a small transformers BEiT."""
    return load_pretrained(write_transformers(hf_beit(size, **KINDS[kind]), tmp_path / "source")).eval()


@pytest.mark.parametrize("layout", ["minilora", "transformers", "timm"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trips_are_bit_equal(kind, layout, tmp_path):
    assert_round_trip(small(kind, tmp_path), layout, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_and_timm_load_what_we_save(kind, tmp_path):
    import timm
    from transformers import BeitForImageClassification

    model, x = small(kind, tmp_path), pictures(32)
    model.labels = ["a", "b", "c", "d", "e"]
    theirs = BeitForImageClassification.from_pretrained(save_pretrained(model, tmp_path / "hf", "transformers"))
    assert theirs.config.id2label[4] == "e"
    assert_parity(theirs.eval(), model, x)
    folder = save_pretrained(model, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = model.config.eps  # timm has no field for it
    assert_parity(theirs, model, x)


@pytest.mark.parametrize("layout", ["transformers4", "transformers5", "timm"])
@pytest.mark.parametrize("kind", ["own bias", "shared bias", "class token"])
def test_every_exchange_of_two_keys_is_noticed(kind, layout, tmp_path):
    assert_swaps_are_noticed(small(kind, tmp_path), layout, pictures(32), limit=60)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers4", "transformers5", "timm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_exchange_of_any_two_keys_is_noticed(kind, layout, tmp_path):
    assert_swaps_are_noticed(small(kind, tmp_path), layout, pictures(32), limit=None)


def test_lora_gradients_equal_peft(tmp_path):
    oracle = hf_beit(32, **KINDS["own bias"])
    model = load_pretrained(write_transformers(oracle, tmp_path))
    targets = dict(zip(TARGETS, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), strict=True))
    assert_same_lora_gradients(model, oracle, "transformers5", pictures(32), targets)


def test_adapters_travel_to_transformers_and_back(tmp_path):
    oracle = hf_beit(32, **KINDS["own bias"])
    model = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval()
    assert_adapter_travels(model, oracle, "transformers5", pictures(32), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_adapter_gets_a_gradient(kind, tmp_path):
    assert_every_adapter_learns(small(kind, tmp_path), pictures(32))


@pytest.mark.parametrize("kind", ["own bias", "shared bias"])
@pytest.mark.parametrize("size", [24, 48])
def test_another_size_equals_transformers_own_interpolation(kind, size, tmp_path):
    oracle, x = hf_beit(32, **KINDS[kind]), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path), image_size=size).eval()
    assert model.config.image_size == size and model.preprocess["image_size"] == size
    assert_parity(model, oracle, x, float32_inside=True)  # our table is interpolated when it is read


def test_resized_tables_keep_the_class_tokens_rows_and_constants():
    table = torch.randn(7 * 7 + 3, 2)
    assert torch.equal(resize_bias_table(table, (4, 4), (4, 4)), table)
    larger = resize_bias_table(table, (4, 4), (6, 5))
    assert larger.shape == (11 * 9 + 3, 2) and torch.equal(larger[-3:], table[-3:])
    assert resize_bias_table(torch.ones(52, 2), (4, 4), (6, 5)).allclose(torch.ones(102, 2))


def test_the_files_size_is_found_in_its_tables(tmp_path):
    oracle = timm_beit(40)
    write_weights(oracle, tmp_path)
    model = load_pretrained("beit-nano-patch8-48", tmp_path, image_size=40, dim=32, depth=2, heads=4, hidden=48)
    assert_parity(model.eval(), oracle, pictures(40))


@pytest.mark.parametrize(
    "name, classes, key",
    [("beit-large-patch16-384", 200, "beit_large_384_200"), ("beit-large-patch16-384", 1000, "beit_large_384_1000")],
)
def test_parameter_counts_equal_those_of_the_report(name, classes, key, shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        model = create_model(name, classes)
        assert count_parameters(model).total == counts[key]
        assert count_parameters(model.blocks[0]).total == counts["beit_large_layer"]
        if classes == 200:
            config = LoRAConfig(r=16, target_modules=("q_proj", "k_proj"), modules_to_save=("head",))
            inject_lora(model, config)
            assert count_parameters(model) == (counts["beit_lora_trainable"], counts["beit_with_lora_single_head"])
            assert counts["beit_lora_r16_qv"] + counts["beit_head_200"] == counts["beit_lora_trainable"]


def test_beit_base_has_86_530_984_parameters():
    with torch.device("meta"):
        assert count_parameters(create_model("beit-base-patch16-224")).total == 86_530_984


@pytest.mark.parametrize(
    "name, listing",
    [
        ("beit-base-patch16-224", "hf_beit_base_patch16_224__BeitForImageClassification"),
        ("beit-large-patch16-384", "hf_beit_large_patch16_384__BeitForImageClassification"),
        ("beit-large-patch16-384", "timm_beit_large_patch16_384"),
    ],
)
def test_key_tables_name_exactly_the_keys_of_the_real_files(name, listing, shared):
    assert_keys_of(name, listing, shared)


def test_class_token_in_the_last_block_alone_is_exact(tmp_path):
    model, x = small("class token", tmp_path), pictures(32)
    whole = copy.deepcopy(model)
    whole.pooled_last_block = False
    assert_parity(model, whole, x)
    assert_parity(model, model, x, ask=lambda m, x: m.pooled(x), ask_theirs=lambda m, x: m.forward_features(x)[:, 0])


def test_attention_maps_equal_transformers(tmp_path):
    oracle, x = hf_beit(32, **KINDS["own bias"], attn_implementation="eager"), pictures(32)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert [tuple(one.shape) for one in model.attention_maps(x)] == [(2, 4, 17, 17)] * 2
    # transformers' written-out softmax is in float32
    assert_parity(model, oracle, x, ask=attention_of, float32_inside=True)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    assert_checkpointing_is_exact(adapted(small("shared bias", tmp_path)), pictures(32))


def test_a_new_head_is_noted_and_without_one_the_pooled_features_come_out(tmp_path):
    small("own bias", tmp_path)
    model = load_pretrained(tmp_path / "source", num_classes=3)
    assert "5 classes" in model.notes[0] and model.head.weight.shape == (3, 32)
    model.reset_classifier(0)
    assert torch.equal(model(pictures(32)), model.pooled(pictures(32)))


def test_wrong_families_and_wrong_sizes_are_named(tmp_path):
    small("own bias", tmp_path)
    with pytest.raises(ModelError, match="checkpoint of the family beit, but vit-tiny"):
        load_pretrained("vit-tiny-patch16-224", tmp_path / "source")
    with pytest.raises(ModelError, match="model.safetensors .*wrong shape.*fc1.weight is"):
        load_pretrained(tmp_path / "source", hidden=64)
    with pytest.raises(ValueError, match="takes pictures of 32 x 32 pixels, got 40 x 40"):
        load_pretrained(tmp_path / "source")(pictures(40))
