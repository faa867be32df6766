"""Pruning: exact zeros that stay, the schedule, scopes, and smaller models that say what the large ones said."""

import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from minilora.compress.measure import median_seconds, model_size
from minilora.compress.prune import Pruner, magnitude_mask, polynomial_sparsity, scope_tensors
from minilora.compress.structured import mlp_layers, remove_mlp_units, units_kept
from minilora.errors import RunError, UserError
from minilora.inject import LoRAConfig, inject_lora, merge_lora
from reference_models import create_model, load_pretrained, save_pretrained

NANO = "vit-nano-patch8-48"


def mobile():
    return create_model("mobilenet-v2-50", num_classes=4, image_size=32)


def zeros(weight) -> int:
    return int((weight == 0).sum())


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.999])
def test_the_mask_drops_exactly_the_smallest_magnitudes(sparsity):
    weight = torch.randn(7, 3, 3, 3)
    mask = magnitude_mask(weight, sparsity)
    assert int((~mask).sum()) == round(sparsity * weight.numel())
    if mask.any() and not mask.all():
        assert weight[mask].abs().min() > weight[~mask].abs().max()
    equal = magnitude_mask(torch.ones(5, 4), sparsity)
    assert int((~equal).sum()) == round(sparsity * 20)


def test_the_schedule_is_the_polynomial_of_its_docstring():
    values = [polynomial_sparsity(t, 10, 0.5, 0.8) for t in range(13)]
    assert values[0] == 0.5 and values[5] == pytest.approx(0.8 - 0.3 / 8) and values[10:] == [0.8] * 3
    assert values == sorted(values)
    assert polynomial_sparsity(0, 0, 0.5, 0.8) == 0.8


def test_scopes_are_what_they_say():
    model = mobile()
    names = {scope: set(scope_tensors(model, scope)) for scope in ("conv", "backbone", "all")}
    assert names["conv"] == {n for n, p in model.named_parameters() if p.dim() == 4} == names["backbone"]
    assert names["all"] == names["backbone"] | {"head.weight"}
    student = create_model("student-nano", num_classes=4)
    names = {scope: set(scope_tensors(student, scope)) for scope in ("conv", "backbone", "all")}
    assert names["conv"] == {"vision.conv1.weight", "vision.conv2.weight"}
    assert names["backbone"] == names["conv"] | {"vision.fc.weight"}
    assert names["all"] == names["backbone"] | {
        "text.word.weight", "text.lstm.weight_ih_l0", "text.lstm.weight_hh_l0", "fusion.fc.weight", "head.weight",
    }  # fmt: skip
    plain = create_model(NANO, num_classes=4)
    before = scope_tensors(plain, "backbone").keys()
    adapted = inject_lora(plain, LoRAConfig(modules_to_save=("head",), init_lora_weights=False))
    assert (
        scope_tensors(adapted, "backbone").keys() == before
    )  # names of the merged model, no lora_A and lora_B
    assert "blocks.0.attn.q_proj.weight" in before and "head.weight" not in before


def test_zeros_stay_through_training_with_momentum_and_the_schedule_ends_where_it_should():
    model, images, labels = mobile(), torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    pruner = Pruner(model, "conv", 0.8, start=0.5, steps=4)
    pruner.attach(optimizer)
    total = {name: weight.numel() for name, weight in scope_tensors(model, "conv").items()}
    assert pruner.check() == {name: round(0.5 * n) for name, n in total.items()}
    gone = {name: ~mask for name, mask in pruner.masks.items()}
    for step in range(1, 7):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        share = polynomial_sparsity(step, 4, 0.5, 0.8)
        assert pruner.check() == {name: round(share * n) for name, n in total.items()}
        for name, weight in scope_tensors(model, "conv").items():
            assert zeros(weight) == round(share * total[name])  # not one more, not one less
            assert not weight[gone[name]].any()  # what has gone does not come back
    pruner.finish()
    assert all(zeros(weight) == round(0.8 * total[name]) for name, weight in pruner.weights())


def test_a_schedule_that_was_cut_short_is_finished():
    model = mobile()
    pruner = Pruner(model, "all", 0.8, start=0.5, steps=100)
    pruner.step()
    pruner.finish()
    assert all(zeros(weight) == round(0.8 * weight.numel()) for _, weight in pruner.weights())


def test_merging_fills_zeros_and_the_masks_empty_them_again(tmp_path):
    model = create_model(NANO, num_classes=4)
    pruner = Pruner(model, "backbone", 0.6)
    wanted = pruner.check()
    inject_lora(model, LoRAConfig(target_modules=("q_proj", "fc1"), init_lora_weights=False))
    assert pruner.check() == wanted  # LoRA leaves the base weight alone
    merge_lora(model)
    with pytest.raises(RunError, match="blocks.0.attn.q_proj.weight: .* no longer zero"):
        pruner.check()
    pruner.apply()
    assert pruner.check() == wanted
    save_pretrained(model, tmp_path / "ours")
    save_pretrained(model, tmp_path / "timm", layout="timm")
    back = load_pretrained(tmp_path / "ours")
    for name, count in wanted.items():
        assert zeros(back.get_parameter(name)) == count
    exported = load_file(tmp_path / "timm/model.safetensors")
    assert zeros(exported["blocks.0.attn.qkv.weight"]) == sum(
        wanted[f"blocks.0.attn.{part}_proj.weight"] for part in "qkv"
    )


def test_the_zipped_file_shrinks_by_more_than_half_of_the_pruned_bytes(tmp_path):
    model, sizes, pruned = mobile(), [], 0
    for name in ("whole", "pruned"):
        if name == "pruned":
            pruned = 4 * sum(Pruner(model, "conv", 0.8).check().values())
        save_file(model.state_dict(), tmp_path / name)
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / name, name)
        sizes.append((model_size(model), (tmp_path / f"{name}.zip").stat().st_size))
    (whole, zip_whole), (small, zip_small) = sizes
    assert zip_whole - zip_small > pruned / 2 and whole.zipped - small.zipped > pruned / 2
    assert small.stored == whole.stored and small.parameters == whole.parameters
    assert abs(zip_small - small.zipped) < 1000  # the archive's own lines
    assert whole.nonzero - small.nonzero == pruned // 4


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan"), True, "0.5"])
def test_a_sparsity_outside_the_range_is_refused(sparsity):
    for prune in (
        lambda model: Pruner(model, "all", sparsity),
        lambda model: remove_mlp_units(model, sparsity),
    ):
        with pytest.raises(UserError, match="at least 0 and below 1"):
            prune(create_model(NANO, num_classes=4))


def test_a_scope_that_is_unknown_or_matches_nothing_is_refused():
    model = create_model(NANO, num_classes=4)
    with pytest.raises(UserError, match="'conv' matches nothing in VisionTransformer"):
        Pruner(model, "conv", 0.5)
    with pytest.raises(UserError, match="the choices are conv, backbone, all"):
        Pruner(model, "head", 0.5)
    with pytest.raises(UserError, match="has no MLP units"):
        remove_mlp_units(mobile(), 0.5)
    with pytest.raises(UserError, match="begins at 0.9 and ends at 0.8"):
        Pruner(model, "all", 0.8, start=0.9)


def test_removed_units_that_did_nothing_change_nothing():
    """Half of the units get zero columns: exactly they go, and the answers stay."""
    model = create_model(NANO, num_classes=4).eval()
    images, dead = torch.randn(3, 3, 48, 48), {}
    with torch.no_grad():
        for name, mlp in mlp_layers(model).items():
            nn.init.normal_(mlp.fc1.bias)
            dead[name] = torch.randperm(512)[:256]
            mlp.fc2.weight[:, dead[name]] = 0
        expected = model(images)
        rows = {name: mlp.fc1.weight.clone() for name, mlp in mlp_layers(model).items()}
        remove_mlp_units(model, 0.5, lambda: model(images))
        torch.testing.assert_close(model(images), expected)
    for name, mlp in mlp_layers(model).items():
        alive = [i for i in range(512) if i not in set(dead[name].tolist())]
        assert torch.equal(mlp.fc1.weight, rows[name][alive])


def test_units_that_never_change_become_a_bias():
    """A unit with a constant activation is removed without a trace: its mean moves into fc2's bias."""
    model = create_model(NANO, num_classes=4).eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        for mlp in mlp_layers(model).values():
            mlp.fc1.weight[100:200], mlp.fc1.bias[100:200] = 0, 2.0
        expected = model(images)
        remove_mlp_units(model, 100 / 512, lambda: model(images))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    assert mlp.fc1.out_features == 412


def test_a_smaller_vit_is_saved_loaded_and_adapted_as_any_other(tmp_path):
    model = create_model(NANO, num_classes=4)
    inject_lora(model, LoRAConfig(init_lora_weights=False))
    whole = model_size(merge_lora(create_model(NANO, num_classes=4)))
    small = remove_mlp_units(model, 0.5)  # LoRA is merged on the way
    assert small.config.hidden == 256
    assert whole.parameters - model_size(small).parameters == 4 * 256 * (2 * 128 + 1)
    images = torch.randn(2, 3, 48, 48)
    for layout in ("minilora", "transformers", "timm"):
        save_pretrained(small, tmp_path / layout, layout=layout)
        back = load_pretrained(tmp_path / layout).eval()
        assert back.config.hidden == 256
        torch.testing.assert_close(back(images), small.eval()(images))
    inject_lora(back, LoRAConfig(target_modules=("fc1", "fc2"), init_lora_weights=False))
    assert merge_lora(back)(images).shape == (2, 4)


def test_both_towers_of_a_pair_shrink_and_say_so(tmp_path):
    model = create_model("vqa-nano", num_classes=5)
    sizes = {name: mlp.fc1.out_features for name, mlp in mlp_layers(model).items()}
    fused = model.config.hidden
    remove_mlp_units(model, 0.25)
    assert {name: mlp.fc1.out_features for name, mlp in mlp_layers(model).items()} == {
        name: units_kept(hidden, 0.25) for name, hidden in sizes.items()
    }
    assert model.config.hidden == fused and model.config.vision == model.vision.config
    save_pretrained(model, tmp_path)
    ids = torch.randint(5, (2, 6))
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(
        load_pretrained(tmp_path).eval()(images, ids), model.eval()(images, ids), rtol=1e-5, atol=1e-6
    )


def test_medians_of_calls_that_take_turns():
    order = []
    times = median_seconds(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3, warmup=1
    )
    assert order == ["a", "b"] * 4 and set(times) == {"a", "b"} and min(times.values()) >= 0
