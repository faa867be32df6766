"""Swin and Swin V2: the same numbers as transformers, timm and torchvision, their files, exact sizes, LoRA
everywhere.
"""

from functools import partial

import pytest

from reference_models import load_pretrained
from tests.parity import distance, fill, logits_of, pictures, write_transformers, write_weights

SMALL = {
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "mlp_ratio": 2.0,
    "patch_size": 2,
    "num_labels": 5,
}


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
    from torchvision.models.swin_transformer import (
        PatchMergingV2,
        SwinTransformer,
        SwinTransformerBlockV2,
    )

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
    assert distance(logits_of(model, x), logits_of(oracle, x)) <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"window_size": 8}, {"img_size": 24, "window_size": 3}, {"window_size": 16}]
)
def test_logits_equal_timm(version, options, tmp_path):
    oracle, config = timm_swin(version, **options)
    x = pictures(config["model_args"]["img_size"])
    model = load_pretrained(write_weights(oracle, tmp_path, config)).eval()
    assert distance(logits_of(model, x), logits_of(oracle, x)) <= 1e-5


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("size", [32, 44])
def test_logits_equal_torchvision(version, size, tmp_path):
    oracle, x = torchvision_swin(version), pictures(size)
    write_weights(oracle, tmp_path)
    names = {1: "swin-nano-patch2-window4-32", 2: "swinv2-nano-patch2-window4-32"}
    load = partial(load_pretrained, names[version], tmp_path, dim=16, mlp_ratio=2.0)
    model = load().eval()
    assert distance(logits_of(model, x), logits_of(oracle, x)) <= 1e-5
