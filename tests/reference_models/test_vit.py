"""ViT and DeiT: the same numbers as transformers, timm and torchvision; every way in which their files come; bad
files; counts of the report.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minilora import LoRAConfig, count_parameters, inject_lora
from minilora.tasks.weights import load_base
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.layers import resize_positions
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
    attention_of,
    chance,
    distance,
    fill,
    logits_of,
    pictures,
    write_transformers,
    write_weights,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
OURS = {"dim": 32, "depth": 2, "heads": 4, "hidden": 48}


def hf_vit(size=32, kind="ViT", **options):
    import transformers

    config = getattr(transformers, f"{kind}Config")
    sizes = {**SIZES, "image_size": size, "patch_size": 8, "num_labels": 5, **options}
    return fill(getattr(transformers, f"{kind}ForImageClassification")(config(**sizes)))


def timm_vit(size=32, **options):
    import timm

    arguments = {"img_size": size, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    oracle = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments, **options)
    return fill(oracle), {"architecture": "vit_tiny_patch16_224", "model_args": {**arguments, **options}}


def torchvision_vit(size=32):
    from torchvision.models import VisionTransformer

    return fill(VisionTransformer(size, 8, 2, 4, 32, 48, num_classes=5))


def ours(size=32, seed=0):
    return fill(create_model(f"vit-nano-patch8-{size}", 5, **OURS), seed)


def small(tmp_path, size=32):
    """Our model with the weights of a small transformers ViT in tmp_path / "source"."""
    return load_pretrained(write_transformers(hf_vit(size), tmp_path / "source")).eval()


# ---- the same numbers


@pytest.mark.parametrize("size", [32, 56, (24, 40)])
@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}, {"hidden_act": "gelu_new"}])
def test_logits_equal_transformers(size, options, tmp_path):
    oracle, x = hf_vit(size, **options), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)
    if not options:
        assert_key_biases(model, oracle)


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
@pytest.mark.parametrize("seed", range(5))
def test_random_configurations_equal_transformers(kind, seed, tmp_path):
    choose = chance(seed)
    heads, size = choose([1, 2, 3, 6]), choose([16, 32, 40, 64])
    options = {"hidden_size": heads * choose([4, 8, 12]), "num_attention_heads": heads}
    options |= {"num_hidden_layers": choose([1, 2, 3]), "intermediate_size": choose([20, 64])}
    options |= {"patch_size": choose([4, 8]), "num_labels": choose([3, 7]), "qkv_bias": choose([True, False])}
    options |= {"layer_norm_eps": choose([1e-12, 1e-5]), "hidden_act": choose(["gelu", "relu", "quick_gelu"])}
    oracle, x = hf_vit(size, kind, **options), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert_parity(model, oracle, x)


@pytest.mark.parametrize("size", [32, 56, (24, 40)])
def test_logits_equal_timm(size, tmp_path):
    oracle, config = timm_vit(size)
    model = load_pretrained(write_weights(oracle, tmp_path, config)).eval()
    assert_parity(model, oracle, pictures(size))


@pytest.mark.parametrize("size", [32, 56])
def test_logits_equal_torchvision(size, tmp_path):
    oracle = torchvision_vit(size)
    model = load_pretrained(f"vit-nano-patch8-{size}", write_weights(oracle, tmp_path), **OURS).eval()
    assert_parity(model, oracle, pictures(size))


@pytest.mark.parametrize("size", [32, 56])
def test_distilled_deit_equals_transformers(size, tmp_path):
    oracle, x = hf_vit(size, "DeiT"), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval()
    assert model.config.distilled and model.forward_features(x).shape[1] == 2 + (size // 8) ** 2
    assert_parity(model, oracle, x)
    assert_round_trip(model, "transformers", tmp_path / "out")
    with pytest.raises(ModelError, match="second head"):
        save_pretrained(model, tmp_path / "timm", "timm")


@pytest.mark.parametrize("layout", ["transformers4", "transformers5", "timm", "torchvision"])
def test_every_exchange_of_two_keys_is_noticed(layout):
    assert_swaps_are_noticed(ours(), layout, pictures(32), limit=150)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["transformers4", "transformers5", "timm", "torchvision"])
def test_every_exchange_of_any_two_keys_is_noticed(layout):
    assert_swaps_are_noticed(ours(), layout, pictures(32), limit=None)


def test_lora_gradients_equal_peft(tmp_path):
    oracle = hf_vit()
    model = load_pretrained(write_transformers(oracle, tmp_path))
    targets = dict(zip(TARGETS, ("q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"), strict=True))
    assert_same_lora_gradients(model, oracle, "transformers5", pictures(32), targets)


def test_adapters_travel_to_transformers_and_timm_and_back(tmp_path):
    oracle = hf_vit()
    model = load_pretrained(write_transformers(oracle, tmp_path / "hf")).eval()
    assert_adapter_travels(model, oracle, "transformers5", pictures(32), tmp_path)
    oracle, config = timm_vit()
    model = load_pretrained(write_weights(oracle, tmp_path / "timm", config)).eval()
    assert_adapter_travels(model, oracle, "timm", pictures(32), tmp_path)


def test_every_adapter_gets_a_gradient():
    assert_every_adapter_learns(ours(), pictures(32))


def test_gradient_checkpointing_changes_nothing():
    assert_checkpointing_is_exact(adapted(ours()), pictures(32))


def test_attention_maps_equal_transformers(tmp_path):
    oracle = hf_vit(attn_implementation="eager")
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    # transformers' written-out softmax is in float32
    assert_parity(model, oracle, pictures(32), ask=attention_of, float32_inside=True)


# ---- files, out


@pytest.mark.parametrize("layout", ["minilora", "transformers", "timm"])
def test_round_trips_are_bit_equal(layout, tmp_path):
    assert_round_trip(small(tmp_path), layout, tmp_path / "out")


def test_round_trip_of_the_torchvision_layout_is_bit_equal(tmp_path):
    model = ours()
    save_pretrained(model, tmp_path, "torchvision")
    back = load_pretrained("vit-nano-patch8-32", tmp_path / "model.safetensors", **OURS)
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_transformers_timm_and_torchvision_load_what_we_save(tmp_path):
    import timm
    from transformers import ViTForImageClassification

    model, x = ours(), pictures(32)
    model.labels = ["a", "b", "c", "d", "e"]
    theirs = ViTForImageClassification.from_pretrained(save_pretrained(model, tmp_path / "hf", "transformers"))
    assert theirs.config.id2label[4] == "e" and theirs.config.layer_norm_eps == 1e-6
    assert_parity(theirs.eval(), model, x)
    folder = save_pretrained(model, tmp_path / "timm", "timm")
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert_parity(theirs, model, x)
    save_pretrained(model, tmp_path / "torchvision", "torchvision")
    theirs = torchvision_vit()
    theirs.load_state_dict(load_file(tmp_path / "torchvision" / "model.safetensors"))
    assert_parity(theirs, model, x)


def test_deit_tiny_keeps_its_predictions_through_timm_transformers_timm(shared, tmp_path):
    x = pictures(224, batch=2)
    source = shared / "weights" / "deit_tiny_patch16_224.fp16.safetensors"
    one = load_pretrained("vit-tiny-patch16-224", source).eval()
    assert one.preprocess["mean"] == [0.485, 0.456, 0.406]
    two = load_pretrained(save_pretrained(one, tmp_path / "hf", "transformers")).eval()
    three = load_pretrained(save_pretrained(two, tmp_path / "timm", "timm")).eval()
    assert torch.equal(logits_of(one, x), logits_of(two, x))
    assert torch.equal(logits_of(one, x), logits_of(three, x))
    assert two.preprocess == one.preprocess


# ---- files, in


def rewritten(tmp_path, change, name="model.safetensors"):
    """The small transformers checkpoint with its tensors changed by `change`; (folder, expected logits)."""
    expected, folder = logits_of(small(tmp_path), pictures(32)), tmp_path / "source"
    save_file(change(load_file(folder / "model.safetensors")), folder / name)
    return folder, expected


PREFIXES = {
    "none": "",
    "DDP": "module.vit.",
    "compiled": "_orig_mod.vit.",
    "both": "module._orig_mod.vit.",
    "DeiT's": "deit.",
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes_are_understood(kind, tmp_path):
    def change(state):
        new, head = PREFIXES[kind], PREFIXES[kind].replace("vit.", "").replace("deit.", "")
        return {new + k[4:] if k.startswith("vit.") else head + k: t for k, t in state.items()}

    folder, expected = rewritten(tmp_path, change)
    assert torch.equal(logits_of(load_pretrained(folder).eval(), pictures(32)), expected)


def test_an_encoder_without_prefix_and_head_loads_and_its_pooler_on_request(tmp_path):
    from transformers import ViTConfig, ViTModel

    oracle = fill(ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)))
    x = pictures(32)
    model = load_pretrained(write_transformers(oracle, tmp_path), num_classes=3)  # a new head, the pooler is dropped
    assert model.head.weight.shape == (3, 32) and model.pooler is None
    assert_parity(model, oracle, x, ask=lambda m, x: m.forward_features(x), ask_theirs=lambda m, x: m(x)[0])
    model = load_pretrained(tmp_path, num_classes=0, pooler=True)
    assert_parity(model, oracle, x, ask=lambda m, x: m.pooled(x), ask_theirs=lambda m, x: m(x)[1])
    deit = write_transformers(fill(transformers_deit_model()), tmp_path / "deit")
    assert load_pretrained(deit, num_classes=3).config.distilled


def transformers_deit_model():
    from transformers import DeiTConfig, DeiTModel

    return DeiTModel(DeiTConfig(**SIZES, image_size=32, patch_size=8))


def test_transformers_5_names_in_a_file_load_too(tmp_path):
    oracle = hf_vit()
    folder = write_transformers(oracle, tmp_path)
    expected = logits_of(load_pretrained(folder).eval(), pictures(32))
    write_weights(oracle, folder)  # the names of the modules
    assert "vit.layers.0.attention.q_proj.weight" in load_file(folder / "model.safetensors")
    assert torch.equal(logits_of(load_pretrained(folder).eval(), pictures(32)), expected)


def test_half_precision_storage_is_read_as_float32(tmp_path):
    folder, expected = rewritten(tmp_path, lambda state: {key: t.half() for key, t in state.items()})
    model = load_pretrained(folder).eval()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert distance(logits_of(model, pictures(32)), expected) < 0.05


def shard(folder):
    """Replace model.safetensors by two shards and their index."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keys, names = sorted(state), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    halves = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    for name, half in zip(names, halves, strict=True):
        save_file({key: state[key] for key in half}, folder / name)
    index = {"metadata": {}, "weight_map": {k: n for n, half in zip(names, halves, strict=True) for k in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / names[1]


def test_sharded_checkpoints_load_and_a_missing_shard_is_named(tmp_path):
    expected = logits_of(small(tmp_path), pictures(32))
    second = shard(tmp_path / "source")
    assert torch.equal(logits_of(load_pretrained(tmp_path / "source").eval(), pictures(32)), expected)
    second.unlink()
    with pytest.raises(ModelError, match="index.json: the shard model-00002-of-00002.safetensors is missing"):
        load_pretrained(tmp_path / "source")


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s, "epoch": 3}])
def test_pytorch_model_bin_loads_bare_and_wrapped(wrap, tmp_path):
    expected, folder = logits_of(small(tmp_path), pictures(32)), tmp_path / "source"
    torch.save(wrap(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert torch.equal(logits_of(load_pretrained(folder).eval(), pictures(32)), expected)


def test_a_pickle_with_more_than_tensors_is_refused(tmp_path):
    small(tmp_path)
    (tmp_path / "source" / "model.safetensors").unlink()
    torch.save({"weight": torch.zeros(1), "code": print}, tmp_path / "source" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pytorch_model.bin: refused, it holds more than tensors"):
        load_pretrained(tmp_path / "source")


@pytest.mark.parametrize("size", [24, 48])
def test_positions_are_interpolated_as_timm_does(size, tmp_path):
    from timm.layers import resample_abs_pos_embed

    model = small(tmp_path)
    larger = load_pretrained(tmp_path / "source", image_size=size)
    grid = [size // 8, size // 8]
    expected = resample_abs_pos_embed(model.pos_embed.detach(), grid, num_prefix_tokens=1)
    assert (larger.pos_embed - expected).abs().max() <= 1e-5
    assert larger.preprocess["image_size"] == size and larger(pictures(size)).shape == (2, 5)


def test_prefix_tokens_keep_their_positions_when_the_grid_changes():
    pos = torch.randn(1, 2 + 12, 8)
    new = resize_positions(pos, (6, 8), 2, (3, 4))
    assert new.shape == (1, 2 + 48, 8) and torch.equal(new[:, :2], pos[:, :2])


def test_another_number_of_classes_replaces_the_head_which_is_noted_and_printed_by_programs_only(tmp_path, capsys):
    model = small(tmp_path)
    capsys.readouterr()
    other = load_pretrained(tmp_path / "source", num_classes=3)
    head, pictures = other.notes
    assert head == "head: the checkpoint has 5 classes; a new one for 3 replaces it" and model.notes == [pictures]
    assert capsys.readouterr().out == ""
    load_base(str(tmp_path / "source"), None, seed=0, num_classes=3)
    assert capsys.readouterr().out.splitlines() == other.notes
    assert other.head.weight.shape == (3, 32) and torch.equal(other.norm.weight, model.norm.weight)
    assert load_pretrained(tmp_path / "source", num_classes=5).labels and other.labels is None


# ---- bad files: each message names the file and the key


def refused(source, *words, name=None):
    with pytest.raises(ModelError) as error:
        load_pretrained(name or source, source if name else None)
    assert all(word in str(error.value) for word in (*words, str(source))), error.value


def test_a_checkpoint_of_another_family_is_refused_and_both_are_named(tmp_path):
    from transformers import BertConfig, BertModel

    small(tmp_path)
    refused(tmp_path / "source", "vit", "beit-nano", name="beit-nano-patch8-48")
    bert = BertModel(BertConfig(**SIZES, vocab_size=99))
    refused(write_transformers(bert, tmp_path / "bert"), "bert", "vit-tiny", name="vit-tiny-patch16-224")
    refused(tmp_path / "bert" / "model.safetensors", "of the family bert", name="vit-tiny-patch16-224")
    file = (tmp_path / "bert" / "model.safetensors").rename(tmp_path / "lone.safetensors")
    refused(file, "keys have no place in vit-tiny", ": embeddings.", name="vit-tiny-patch16-224")


def test_a_family_or_activation_that_is_not_known_is_named(tmp_path):
    small(tmp_path)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    for field, value, words in (("hidden_act", "mish", "'mish'"), ("model_type", "gpt2", "gpt2: not one of")):
        (tmp_path / "source" / "config.json").write_text(json.dumps({**config, field: value}))
        refused(tmp_path / "source", "config.json", words)


def test_a_wrong_shape_is_named_by_our_name_and_by_that_of_the_file(tmp_path):
    small(tmp_path)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
    refused(
        tmp_path / "source",
        "wrong shape",
        "blocks.0.mlp.fc1.weight is (48, 32) in the file (vit.encoder.layer.0.intermediate.dense.weight), (64, 32) in",
    )


def test_extra_and_missing_keys_are_counted_and_named(tmp_path):
    folder, _ = rewritten(tmp_path, lambda state: {**state, "vit.surprise.weight": torch.zeros(2)})
    refused(folder, "1 keys have no place", "vit.surprise.weight", "model.safetensors")
    folder, _ = rewritten(tmp_path, lambda state: {k: t for k, t in state.items() if "layer.1" not in k})
    refused(
        folder, "missing 16", "blocks.1.norm1.weight (vit.encoder.layer.1.layernorm_before.weight)", "model.safetensors"
    )


def test_a_nan_names_its_tensor_and_the_file(tmp_path):
    def change(state):
        state["vit.layernorm.bias"][3] = float("nan")
        return state

    refused(rewritten(tmp_path, change)[0], "vit.layernorm.bias holds NaN", "model.safetensors")


def test_nan_in_a_shard_names_the_shard(tmp_path):
    hf_vit().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    state = load_file(shard)
    key = sorted(state)[0]
    state[key].view(-1)[0] = float("inf")
    save_file(state, shard)
    refused(tmp_path, f"{shard}: {key} holds NaN or infinite values")


def test_truncated_empty_and_missing_files_are_refused(tmp_path):
    small(tmp_path)
    file = tmp_path / "source" / "model.safetensors"
    data = file.read_bytes()
    for length in (len(data) - 1, len(data) // 2, 20, 0):
        file.write_bytes(data[:length])
        refused(tmp_path / "source", "model.safetensors: not a readable safetensors file")
    file.unlink()
    refused(tmp_path / "source", "no weights here")


def test_a_field_that_config_json_lacks_has_transformers_default(tmp_path):
    oracle, x = hf_vit(), pictures(32)
    folder = write_transformers(oracle, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    lean = {key: config[key] for key in ("model_type", *SIZES, "image_size", "patch_size", "id2label")}
    (folder / "config.json").write_text(json.dumps(lean))
    assert_parity(load_pretrained(folder).eval(), oracle, x)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(folder, "does not fit", "vit-768")


# ---- counts


@pytest.mark.parametrize(
    "name, classes, key",
    [
        ("vit-tiny-patch16-224", 10, "vit_tiny_10"),
        ("vit-tiny-patch16-224", 1000, "vit_tiny_1000"),
        ("vit-base-patch16-224", 1000, "vit_base_1000"),
        ("vit-base-patch16-224", 200, "vit_base_224_200"),
        ("vit-base-patch16-384", 200, "vit_base_384_200"),
        ("vit-base-patch16-224", 0, "vit_base_no_pooler"),
    ],
)
def test_parameter_counts_equal_the_listed_ones(name, classes, key, shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        assert count_parameters(create_model(name, classes)).total == counts[key]
        if not classes:
            assert count_parameters(create_model(name, 0, pooler=True)).total == counts["vit_base_with_pooler"]


def test_counts_equal_those_of_the_report_on_imagewoof(shared):
    counts = json.loads((shared / "param_counts.json").read_text())
    with torch.device("meta"):
        model = create_model("vit-tiny-patch16-224", 10)
        assert count_parameters(model.blocks[0]).total == counts["vit_tiny_block"]
        every = LoRAConfig(r=4, lora_alpha=4, target_modules=TARGETS, modules_to_save=("head",), train_norms=True)
        assert count_parameters(inject_lora(model, every)).trainable == counts["vit_tiny_lora_trainable"] == 177_418
        model = create_model("vit-tiny-patch16-224", 10)
        inject_lora(model, LoRAConfig(r=8, modules_to_save=("head",)))
        line = "trainable params: 75,658 || all params: 5,600,074 || trainable%: 1.3510"
        assert str(count_parameters(model)) == line


@pytest.mark.parametrize(
    "name, listing",
    [
        ("vit-base-patch16-224", "hf_vit_base_patch16_224__ViTForImageClassification"),
        ("vit-tiny-patch16-224", "hf_vit_tiny_patch16_224__ViTForImageClassification"),
        ("vit-base-patch16-224", "timm_vit_base_patch16_224"),
        ("vit-tiny-patch16-224", "timm_vit_tiny_patch16_224"),
        ("vit-base-patch16-224", "torchvision_vit_b_16"),
    ],
)
def test_key_tables_name_exactly_the_keys_of_the_real_files(name, listing, shared):
    assert_keys_of(name, listing, shared)
