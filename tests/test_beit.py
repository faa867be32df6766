"""BEiT: the same numbers as transformers and timm, their files, exact sizes, LoRA everywhere."""

import json

import pytest
import torch
from tests.parity import (
    TARGETS,
    adapted,
    assert_every_adapter_learns,
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

from minilora import count_parameters
from reference_models import ModelError, create_model, load_pretrained, save_pretrained
from reference_models.beit_files import resize_bias_table

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
    return fill(
        Beit(**{**sizes, "num_classes": classes, "use_rel_pos_bias": True, "init_values": 0.1, **options})
    )


TIMM_CONFIG = {
    "architecture": "beit_base_patch16_224",
    "model_args": {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 4,
        "mlp_ratio": 1.5,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [32, 59])  # 59: three pixels over at the edge
def test_logits_equal_transformers(kind, size, tmp_path):
    oracle, x = hf_beit(size, **KINDS[kind]), pictures(size)
    model = load_pretrained(write_transformers(oracle, tmp_path)).eval()
    assert distance(logits_of(model, x), logits_of(oracle, x)) <= 1e-5


@pytest.mark.parametrize("size", [32, 56, (24, 40)])  # transformers misreads the tables of an oblong grid
@pytest.mark.parametrize("pool", ["avg", "token"])
def test_logits_equal_timm(size, pool, tmp_path):
    oracle, x = timm_beit(size, global_pool=pool), pictures(size)
    config = {**TIMM_CONFIG, "model_args": {**TIMM_CONFIG["model_args"], "img_size": size}}
    model = load_pretrained(write_weights(oracle, tmp_path, config)).eval()
    assert distance(logits_of(model, x), logits_of(oracle, x)) <= 1e-5
