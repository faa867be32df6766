"""Swin and Swin V2: the same numbers as transformers, timm and torchvision, their files, exact sizes, LoRA
everywhere.
"""

import json

import pytest
import torch

from minilora import count_parameters
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.files.swin import config_for, resize_window_table
from reference_models.swin import from_windows, to_windows
from tests.support.parity import (
    TARGETS,
    adapted,
    assert_adapter_travels,
    assert_checkpointing_is_exact,
    assert_every_adapter_learns,
    assert_key_biases,
    assert_keys_of,
    assert_parity,
    assert_round_trip,
    assert_same_lora_gradients,
    assert_swaps_are_noticed,
    chance,
    fill,
    logits_of,
    pictures,
    write_transformers,
    write_weights,
)

SMALL = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 2.0, "patch_size": 2, "num_labels": 5}


def hf_swin(version=1, size=32, window=4, **options):
    import transformers

    prefix = "Swin" if version == 1 else "Swinv2"
    config = getattr(transformers, f"{prefix}Config")
    cls = getattr(transformers, f"{prefix}ForImageClassification")
    return fill(cls(config(**{**SMALL, "image_size": size, "window_size": window, **options})))


TIMM_ARGUMENTS = {
    "img_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
TIMM_NAMES = {1: "swin_tiny_patch4_window7_224", 2: "swinv2_tiny_window8_256"}


def timm_swin(version=1, **options):
    import timm

    oracle = timm.create_model(TIMM_NAMES[version], num_classes=5, **{**TIMM_ARGUMENTS, **options})
    config = {"architecture": TIMM_NAMES[version], "model_args": {**TIMM_ARGUMENTS, **options}}
    return fill(oracle), config


def torchvision_swin(version=1, window=4):
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    parts = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2} if version == 2 else {}
    sizes = {"patch_size": [2, 2], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "mlp_ratio": 2.0}
    return fill(SwinTransformer(**sizes, window_size=[window, window], num_classes=5, **parts))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "size, window", [(32, 4), (32, 8), (37, 4), (44, 5), ((26, 40), 4)]
)  # with shift, without in the last stage, and grids that are no multiple of patch, window or 2
def test_logits_equal_transformers(version, size, window, tmp_path):
    oracle, x = hf_swin(version, size, window), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)
    if version == 1:
        assert_key_biases(model, oracle)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("seed", range(6))
def test_random_configurations_equal_transformers(version, seed, tmp_path):
    choose = chance(seed)
    stages, heads, window = choose([1, 2, 3]), choose([1, 2]), choose([2, 3, 4])
    options = {"embed_dim": heads * choose([4, 8]), "num_heads": [heads * 2**i for i in range(stages)]}
    options |= {"depths": [choose([1, 2, 3]) for _ in range(stages)], "patch_size": choose([2, 4])}
    options |= {
        "mlp_ratio": choose([1.5, 4.0]),
        "qkv_bias": choose([True, False]),
        "hidden_act": choose(["gelu", "relu"]),
    }
    if version == 2:
        options |= {"pretrained_window_sizes": [choose([0, 3, 6]) for _ in range(stages)]}
    size = options["patch_size"] * window * 2 ** (stages - 1) + choose([0, 1, 5, 14])  # no grid below the window
    oracle, x = hf_swin(version, size, window, **options), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("options", [{}, {"window_size": 8}, {"img_size": 24, "window_size": 3}, {"window_size": 16}])
def test_logits_equal_timm(version, options, tmp_path):
    oracle, config = timm_swin(version, **options)
    x = pictures(config["model_args"]["img_size"])
    model = load_pretrained(write_weights(oracle, tmp_path, config)).eval()
    assert_parity(model, oracle, x)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [32, 44])
def test_logits_equal_torchvision(version, size, tmp_path):
    oracle, x = torchvision_swin(version), pictures(size)
    write_weights(oracle, tmp_path)
    names = {1: "swin-nano-patch2-window4-32", 2: "swinv2-nano-patch2-window4-32"}
    model = load_pretrained(names[version], tmp_path, dim=16, mlp_ratio=2.0).eval()
    assert_parity(model, oracle, x)


@pytest.mark.parametrize(("size", "windows", "stages"), [
    ("tiny", (7, 7, 14, 7), (2, 2, 6, 2)),
    ("small", (14, 14, 14, 7), (2, 2, 18, 2)),
    ("base", (7, 7, 14, 7), (2, 2, 30, 2)),
])  # fmt: skip
def test_s3_has_its_own_window_in_each_stage(size, windows, stages, tmp_path):
    import timm

    config = create_model(f"swin-s3-{size}-224", depths=(1, 1, 1, 1)).config
    assert (config.window, config_for(f"swin-s3-{size}-224").depths) == (windows, stages)
    small = {"embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 6)}
    oracle = fill(timm.create_model(f"swin_s3_{size}_224", num_classes=5, **small))
    settings = {"architecture": f"swin_s3_{size}_224", "model_args": small}
    model = load_pretrained(write_weights(oracle, tmp_path / "timm", settings)).eval()
    assert model.config.window == windows
    assert_parity(model, oracle, pictures(224))
    assert_round_trip(model, "timm", tmp_path / "again")
    with pytest.raises(ModelError, match="one window for all stages"):
        save_pretrained(model, tmp_path / "hf", "transformers")


def test_pretrained_windows_change_the_position_bias_as_in_transformers_and_timm(tmp_path):
    oracle = hf_swin(2, pretrained_window_sizes=[3, 2])
    model, x = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval(), pictures(32)
    assert model.config.pretrained_windows == (3, 2)
    assert_parity(model, oracle, x)
    oracle, config = timm_swin(2, pretrained_window_sizes=[3, 2])
    model = load_pretrained(write_weights(oracle, tmp_path / "timm", config)).eval()
    assert_parity(model, oracle, x)


def test_absolute_positions_equal_transformers(tmp_path):
    oracle, x = hf_swin(1, use_absolute_embeddings=True), pictures(32)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)


def small(version, tmp_path, **options):
    """Our model with the weights of a small transformers Swin."""
    return load_pretrained(write_transformers(hf_swin(version, **options), tmp_path / "source")).eval()


LAYOUTS = ["minilora", "transformers", "timm"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", [1, 2])
def test_round_trips_are_bit_equal(version, layout, tmp_path):
    assert_round_trip(small(version, tmp_path), layout, tmp_path / "out")


@pytest.mark.parametrize("layout", ["torchvision", "original"])
@pytest.mark.parametrize("version", [1, 2])
def test_round_trips_of_layouts_without_a_configuration_are_bit_equal(version, layout, tmp_path):
    name = f"swin{'v2' if version == 2 else ''}-nano-patch4-window6-48"
    model = fill(create_model(name, 5))
    back = load_pretrained(name, save_pretrained(model, tmp_path, layout) / "model.safetensors")
    own, read = model.state_dict(), back.state_dict()
    assert list(own) == list(read) and all(torch.equal(own[key], read[key]) for key in own)


@pytest.mark.parametrize("version", [1, 2])
def test_transformers_timm_and_torchvision_load_what_we_save(version, tmp_path):
    import timm
    import transformers
    from safetensors.torch import load_file

    model, x = small(version, tmp_path), pictures(32)
    cls = getattr(transformers, f"Swin{'v2' if version == 2 else ''}ForImageClassification")
    theirs = cls.from_pretrained(save_pretrained(model, tmp_path / "hf", "transformers")).eval()
    assert_parity(theirs, model, x)
    folder = save_pretrained(model, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_parity(theirs, model, x)
    folder = save_pretrained(model, tmp_path / "torchvision", "torchvision")
    theirs = torchvision_swin(version)
    missing, unexpected = theirs.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not unexpected and all("relative_" in key for key in missing)  # its buffers
    assert_parity(theirs, model, x)


@pytest.mark.parametrize("layout", ["transformers4", "transformers5", "timm", "torchvision", "original"])
@pytest.mark.parametrize("version", [1, 2])
def test_every_exchange_of_two_keys_is_noticed(version, layout, tmp_path):
    assert_swaps_are_noticed(small(version, tmp_path), layout, pictures(32), limit=60)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers4", "transformers5", "timm", "torchvision", "original"])
@pytest.mark.parametrize("version", [1, 2])
def test_every_exchange_of_any_two_keys_is_noticed(version, layout, tmp_path):
    assert_swaps_are_noticed(small(version, tmp_path), layout, pictures(32), limit=None)


PEFT_NAMES = {
    1: ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"),
    2: ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
}


@pytest.mark.parametrize("version", [1, 2])
def test_lora_gradients_equal_peft(version, tmp_path):
    oracle = hf_swin(version)
    model = load_pretrained(write_transformers(oracle, tmp_path))
    targets = dict(zip(TARGETS, PEFT_NAMES[version], strict=True))
    assert_same_lora_gradients(model, oracle, "transformers5", pictures(32), targets)


@pytest.mark.parametrize("version", [1, 2])
def test_adapters_travel_to_transformers_and_back(version, tmp_path):
    oracle = hf_swin(version)
    model = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval()
    assert_adapter_travels(model, oracle, "transformers5", pictures(32), tmp_path)


def test_adapters_travel_to_timm_and_back(tmp_path):
    oracle, config = timm_swin()
    model = load_pretrained(write_weights(oracle, tmp_path / "timm", config)).eval()
    assert_adapter_travels(model, oracle, "timm", pictures(32), tmp_path)


@pytest.mark.parametrize("version", [1, 2])
def test_every_adapter_gets_a_gradient(version, tmp_path):
    assert_every_adapter_learns(small(version, tmp_path), pictures(32), (*TARGETS, "reduction"))


@pytest.mark.parametrize(
    "name, classes, key",
    [
        ("swin-base-patch4-window7-224", 200, "swin_base_224_200"),
        ("swin-base-patch4-window7-224", 1000, "swin_base_1000"),
        ("swin-large-patch4-window12-384", 200, "swin_large_384_200"),
        ("swinv2-base-patch4-window12-192", 200, "swinv2_base_192_200"),
        ("swinv2-base-patch4-window12-192", 1000, "swinv2_base_1000"),
        ("swinv2-large-patch4-window24-384", 200, "swinv2_large_384_200"),
        ("swinv2-large-patch4-window12to24-192to384", 200, "swinv2_large_384_200"),
    ],
)
def test_parameter_counts_equal_those_of_the_report(name, classes, key, shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        assert count_parameters(create_model(name, classes)).total == counts[key]


def test_torchvision_counts_the_key_biases_that_it_does_not_use(shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    keys = sum(dim * depth for dim, depth in zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True))
    assert counts["tv_swin_v2_b_1000"] - counts["swinv2_base_1000"] == keys


@pytest.mark.parametrize(
    "name, listing",
    [
        ("swin-base-patch4-window7-224", "hf_swin_base_patch4_window7_224__SwinForImageClassification"),
        ("swin-base-patch4-window7-224", "timm_swin_base_patch4_window7_224"),
        ("swin-base-patch4-window7-224", "torchvision_swin_b"),
        ("swinv2-base-patch4-window12-192", "hf_swinv2_base_patch4_window12_192__Swinv2ForImageClassification"),
        ("swinv2-base-patch4-window8-256", "torchvision_swin_v2_b"),
    ],
)
def test_key_tables_name_exactly_the_keys_of_the_real_files(name, listing, shared):
    assert_keys_of(name, listing, shared)


def test_names_carry_windows_and_those_of_pretraining():
    def config(name):
        with torch.device("meta"):
            return create_model(name).config

    tuned = config("swinv2-large-patch4-window12to24-192to384")
    assert (tuned.window, tuned.image_size, tuned.pretrained_windows) == (24, 384, (12, 12, 12, 6))
    assert config("swinv2-large-patch4-window24-384").pretrained_windows == (12, 12, 12, 6)
    assert config("swinv2-base-patch4-window12-192").pretrained_windows == (0, 0, 0, 0)
    assert [tuned.window_of(stage) for stage in range(4)] == [24, 24, 24, 12]


def test_files_with_buffers_and_of_the_original_repository_load(tmp_path):
    oracle, config = timm_swin()
    write_weights(oracle, tmp_path, config)
    expected, x = load_pretrained(tmp_path).eval(), pictures(32)
    from safetensors.torch import load_file, save_file

    state = load_file(tmp_path / "model.safetensors")
    old = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc", "head"): state[key]
        for key in state
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(16, 16, 16)
    save_file(old, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(load_pretrained(tmp_path).eval(), x), logits_of(expected, x))


def test_bias_tables_are_interpolated_to_the_window_of_the_name(tmp_path):
    model = fill(create_model("swin-nano-patch4-window6-48", 5))
    save_pretrained(model, tmp_path)
    larger = load_pretrained("swin-nano-patch4-window3-48", tmp_path).eval()
    assert larger.config.window == 3 and larger.blocks[0].attn.relative_position_bias_table.shape == (25, 2)
    table = torch.randn(49, 3)
    assert resize_window_table(table, 4, 4).allclose(table, atol=1e-6)
    assert resize_window_table(torch.ones(49, 3), 4, 7).allclose(torch.ones(169, 3))
    assert larger(pictures(48)).shape == (2, 5)


def test_windows_and_back_is_the_identity():
    x = torch.randn(2, 8, 12, 5)
    windows = to_windows(x, 4)
    assert windows.shape == (2 * 2 * 3, 16, 5)
    assert torch.equal(windows[1].view(4, 4, 5), x[0, :4, 4:8])
    assert torch.equal(from_windows(windows, 4, 8, 12), x)


@pytest.mark.parametrize("version", [1, 2])
def test_attention_maps_are_those_of_the_windows(version, tmp_path):
    maps = small(version, tmp_path).attention_maps(pictures(32))
    assert [tuple(m.shape) for m in maps] == [(32, 2, 16, 16)] * 2 + [(8, 4, 16, 16)] * 2
    assert all((m.sum(-1) - 1).abs().max() < 1e-5 for m in maps)


@pytest.mark.parametrize("version", [1, 2])
def test_gradient_checkpointing_changes_nothing(version, tmp_path):
    assert_checkpointing_is_exact(adapted(small(version, tmp_path)), pictures(32))


@pytest.mark.parametrize("version", [1, 2])
def test_pooled_is_the_mean_of_the_features_and_a_head_can_be_replaced(version, tmp_path):
    model, x = small(version, tmp_path), pictures(32)
    assert model.num_features == 32 and model.forward_features(x).shape == (2, 64, 32)
    assert model.forward_features(x).mean(1).allclose(model.pooled(x))
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.config.num_classes == 3


def test_wrong_families_wrong_shapes_and_windows_without_a_place_are_named(tmp_path):
    folder = save_pretrained(small(1, tmp_path), tmp_path / "out")
    with pytest.raises(ModelError, match="family swin, but swinv2-nano"):
        load_pretrained("swinv2-nano-patch4-window6-48", folder)
    with pytest.raises(ModelError, match="model.safetensors .*wrong shape.*patch_norm.weight is"):
        load_pretrained(tmp_path / "source", dim=32)
    with pytest.raises(ModelError, match="one window for all stages"):
        save_pretrained(create_model("swin-nano-patch4-window6-48", window=(6, 3)), tmp_path, "transformers")
