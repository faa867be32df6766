"""Attention over the picture: rollout by hand, patch grids, Swin windows, and the figure."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from minilora.report.attention import (
    attention_figure,
    attention_heats,
    attention_rollout,
    grid_of,
    layer_heats,
    overlay,
    patch_heat,
    window_heat,
)
from reference_models import create_model, save_pretrained
from reference_models.vit_variants import VariantConfig, VariantViT
from tests.support.families import small_model
from tests.support.parity import BOUNDS

PREPROCESS = {"image_size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}


class Looker(nn.Module):
    """A stand-in whose attention is a function of the picture: `maps(x)` gives the list."""

    def __init__(self, maps):
        super().__init__()
        self.maps, self.preprocess, self.w = maps, PREPROCESS, nn.Parameter(torch.zeros(1))

    def attention_maps(self, x):
        assert not self.training
        return self.maps(x)


def random_maps(heads, tokens, layers=3):
    return lambda x: [torch.randn(x.shape[0], heads, tokens, tokens).softmax(-1) for _ in range(layers)]


def test_rollout_of_two_layers_equals_the_hand_computed_one():
    first = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])  # (1, 1, 2, 2)
    second = torch.tensor([[[[0.0, 1.0], [1.0, 0.0]]]])
    # (I + A1) / 2 = [[1, 0], [1/4, 3/4]],  (I + A2) / 2 = [[1/2, 1/2], [1/2, 1/2]],  product of second and first:
    expected = torch.tensor([[[0.625, 0.375], [0.625, 0.375]]])
    assert torch.allclose(attention_rollout([first, second]), expected)
    assert not torch.allclose(attention_rollout([second, first]), expected)  # the order matters


def test_rollout_averages_heads_and_its_rows_sum_to_1():
    maps = random_maps(4, 10)(torch.zeros(2, 3, 8, 8))
    rollout = attention_rollout(maps)
    assert rollout.shape == (2, 10, 10) and torch.allclose(rollout.sum(-1), torch.ones(2, 10), atol=1e-6)
    assert torch.allclose(rollout, attention_rollout([m.mean(1, keepdim=True) for m in maps]), atol=1e-6)


@pytest.mark.parametrize(
    "tokens, expected", [(197, (1, 14)), (196, (0, 14)), (198, (2, 14)), (37, (1, 6)), (577, (1, 24))]
)
def test_prefix_tokens_and_grid_are_read_from_the_number_of_tokens(tokens, expected):
    assert grid_of(tokens) == expected


def test_the_class_token_is_read_where_there_is_one_and_all_queries_where_not():
    with_cls = torch.rand(2, 3, 5, 5)
    assert torch.equal(patch_heat(with_cls), with_cls[:, :, 0, 1:].reshape(2, 3, 2, 2))
    without = torch.rand(2, 3, 4, 4)
    assert torch.allclose(patch_heat(without), without.mean(2).reshape(2, 3, 2, 2))


def config_of(prefix: int, grid: tuple[int, int], token: bool) -> nn.Module:
    tower = nn.Module()
    tower.prefix, tower.cls_token, tower.config = prefix, torch.zeros(1) if token else None, SimpleNamespace(grid=grid)
    return tower


def test_a_tower_says_which_tokens_stand_before_the_patches():
    """25 tokens are 5 x 5 patches, or 4 x 4 after nine others, or 4 x 5 after five."""
    maps = torch.rand(2, 3, 25, 25)
    assert torch.equal(patch_heat(maps, config_of(9, (4, 4), True)), maps[:, :, 0, 9:].reshape(2, 3, 4, 4))
    assert torch.equal(patch_heat(maps, config_of(5, (4, 5), True)), maps[:, :, 0, 5:].reshape(2, 3, 4, 5))
    registers = patch_heat(maps, config_of(9, (4, 4), False))  # no class token: the mean of the patches
    assert torch.allclose(registers, maps[:, :, 9:, 9:].mean(2).reshape(2, 3, 4, 4))


# prefix tokens, and whether the first is the class token
VARIANTS = {
    "class token": ({}, 1, True),
    "registers": ({"registers": 4, "prefix_positions": 0}, 5, True),
    "registers alone": ({"registers": 3, "class_token": False, "prefix_positions": 0, "pool": "avg"}, 3, False),
    "distilled": ({"distilled": True, "prefix_positions": 2}, 2, True),
    "none": ({"class_token": False, "prefix_positions": 0, "pool": "norm map"}, 0, False),
}
FAMILIES = {name: ("vit_variants", options, *rest) for name, (options, *rest) in VARIANTS.items()}
FAMILIES |= {"vit": ("vit", {}, 2, True), "beit": ("beit", {}, 1, True), "clip": ("clip", {}, 1, True)}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_familys_heat_is_what_its_pooled_token_sees_of_the_patches(name):
    family, options, prefix, token = FAMILIES[name]
    if family == "vit_variants":
        sizes = {"image_size": 32, "patch_size": 8, "dim": 24, "heads": 3, "hidden": 48, "depth": 2}
        model = VariantViT(VariantConfig(num_classes=3, **sizes, **options)).eval()
    else:
        model = small_model(family).eval()
    tower = getattr(model, "vision", model)
    x = torch.randn(2, 3, model.config.image_size, model.config.image_size)
    maps, heats = tower.attention_maps(x), layer_heats(model, x)
    side = math.isqrt(maps[0].shape[-1] - prefix)
    for layer, heat in zip(maps, heats.values(), strict=False):
        row = layer[:, :, 0, prefix:] if token else layer[:, :, prefix:, prefix:].mean(-2)
        assert torch.equal(heat, row.unflatten(-1, (side, side)))
    rollout = attention_rollout(maps)
    row = rollout[:, 0, prefix:] if token else rollout[:, prefix:, prefix:].mean(-2)
    assert torch.equal(heats["rollout"][:, 0], row.unflatten(-1, (side, side)))


def test_windows_are_put_back_where_they_were_cut_out_and_the_shift_is_undone():
    plane = torch.arange(64.0).reshape(1, 1, 8, 8)
    shifted = plane.roll((-2, -2), (-2, -1))  # as Swin's shifted blocks see it, window 4
    windows = shifted.reshape(1, 1, 2, 4, 2, 4).permute(0, 2, 4, 1, 3, 5).reshape(4, 1, 1, 16)
    assert torch.equal(window_heat(windows.expand(4, 1, 16, 16), 1), plane)
    with pytest.raises(ValueError, match="square"):
        window_heat(torch.rand(3, 1, 16, 16), 1)


def test_windows_have_no_rollout_and_the_training_mode_comes_back():
    swin = Looker(lambda x: [torch.rand(x.shape[0] * 4, 2, 16, 16), torch.rand(x.shape[0], 2, 16, 16)]).train()
    last, rollout = attention_heats(swin, torch.zeros(3, 3, 16, 16))
    assert last.shape == (3, 2, 4, 4) and rollout is None and swin.training


def test_every_layer_has_its_heat_windows_only_the_last_and_a_convolution_none():
    maps = [torch.rand(3, 2, 17, 17).softmax(-1) for _ in range(4)]
    vit, images = Looker(lambda x: maps), torch.zeros(3, 3, 16, 16)
    heats = layer_heats(vit, images)
    assert list(heats) == ["layer 1", "layer 2", "layer 3", "layer 4", "rollout"]
    for layer, heat in zip(maps, heats.values(), strict=False):
        assert torch.equal(heat, layer[:, :, 0, 1:].unflatten(-1, (4, 4)))
    last, rollout = attention_heats(vit, images)
    assert torch.equal(last, heats["layer 4"]) and torch.equal(rollout, heats["rollout"][:, 0])
    swin = Looker(lambda x: [torch.rand(x.shape[0] * 4, 2, 16, 16), torch.rand(x.shape[0], 2, 16, 16)])
    assert {name: heat.shape for name, heat in layer_heats(swin, images).items()} == {"layer 2": (3, 2, 4, 4)}
    assert layer_heats(Looker(lambda x: []), images) == {}


def test_the_figure_has_a_column_per_model_and_layer_and_one_per_head_on_request():
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    models = {"base": Looker(random_maps(2, 17)), "LoRA": Looker(random_maps(2, 17))}
    plain = attention_figure(models, images, titles=["dog", "cat"], side=40)
    heads = attention_figure(models, images, per_head=True, side=40)
    assert heads.width > plain.width  # 4 columns more
    assert plain.height == pytest.approx(heads.height, abs=30)


def test_models_that_look_at_the_same_places_share_their_columns_and_answers_stand_below():
    images, maps = torch.rand(2, 3, 16, 16) * 2 - 1, random_maps(2, 17)(torch.zeros(2, 3, 16, 16))
    base, linear = Looker(lambda x: maps), Looker(lambda x: maps)
    shared = attention_figure({"base": base, "linear": linear}, images, side=40)
    alone = attention_figure({"base": base}, images, side=40)
    other = attention_figure({"base": base, "lora": Looker(random_maps(2, 17))}, images, side=40)
    assert shared.width == alone.width < other.width
    said = attention_figure({"base": base, "linear": linear}, images, side=40, said={"linear": ["cat 9 %", "dog"]})
    assert said.height == shared.height + 2 * 20


def test_a_two_tower_model_is_drawn_by_its_vision_tower():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision = Looker(random_maps(2, 17))

    assert attention_figure({"clip": Towers()}, torch.zeros(1, 3, 16, 16), side=32).width > 90


def test_the_brightest_patch_of_the_overlay_is_the_most_attended_one():
    heat = torch.zeros(4, 4)
    heat[1, 2] = 1
    shown = overlay(Image.new("RGB", (40, 40), (90, 90, 90)), heat.numpy()).convert("L")
    brightest = max(range(16), key=lambda i: shown.getpixel((i % 4 * 10 + 5, i // 4 * 10 + 5)))
    assert brightest == 1 * 4 + 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_maps_of_our_vit_are_those_of_transformers_on_the_same_weights(tmp_path, dtype):
    transformers = pytest.importorskip("transformers")
    model = create_model("vit-nano-patch8-48", num_classes=5).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_pretrained(model, tmp_path, layout="transformers")
    oracle = transformers.ViTForImageClassification.from_pretrained(tmp_path, attn_implementation="eager").to(dtype)
    x = torch.randn(2, 3, 48, 48, dtype=dtype)
    with torch.no_grad():
        theirs, ours = oracle.eval()(x, output_attentions=True).attentions, model.attention_maps(x)
    assert len(ours) == len(theirs) == 4
    # transformers' written-out softmax is in float32 whatever it is given
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.sum(-1), torch.ones_like(a.sum(-1)))
        assert (a - b).abs().max() <= BOUNDS[torch.float32] * b.std() and a.std() > 1e-3
    last, rollout = attention_heats(model, x)
    assert last.shape == (2, 4, 6, 6) and rollout.shape == (2, 6, 6)
