"""One small model of every family that sees pictures, with its LoRA; and the inputs of all families."""

import torch
from torch import Tensor, nn

from reference_models import create_model
from reference_models.load import FAMILIES, config_for, family_module

SMALL_SWIN = {"dim": 24, "depths": (2, 2), "heads": (3, 6)}
SIZES = {  # of families whose first model is too large to be tried in a second
    "vit": {"image_size": 32, "dim": 24, "heads": 3, "hidden": 48, "depth": 2, "distilled": True},
    "vit_variants": {"image_size": 28, "dim": 24, "heads": 3, "hidden": 48, "depth": 2},
    "beit": {"dim": 24, "heads": 3, "hidden": 48, "depth": 2},
    "swin": SMALL_SWIN,
    "swinv2": SMALL_SWIN,
    "bert": {"dim": 24, "heads": 3, "hidden": 48, "depth": 2},
    "bert_variants": {"dim": 24, "heads": 3, "hidden": 48, "depth": 2, "vocab_size": 1000},
    "clip": {"vision_depth": 2, "text_depth": 2, "vision_dim": 48, "text_dim": 48, "vision_heads": 3, "text_heads": 3},
    "mobilenet": {"image_size": 64},
}
READ = ("bert", "bert_variants", "clip", "clip_text", "dual", "fusion", "student")  # text, alone or beside pictures
SEES = [family for family in FAMILIES if family not in READ]


def small_model(family: str, **sizes) -> nn.Module:
    """The first model that a family names, in SIZES."""
    name = family_module(family).names[0]
    classes = {"num_classes": 7} if hasattr(config_for(name), "num_classes") else {}
    return create_model(name, **SIZES.get(family, {}) | classes | sizes)


def inputs_of(family: str, model: nn.Module) -> tuple[Tensor, ...]:
    """A batch of two for `model(*inputs)`."""
    side = getattr(model.config, "image_size", 0)
    pictures = () if family in ("bert", "bert_variants", "clip_text") else (torch.randn(2, 3, side, side),)
    ids = torch.randint(5, 900, (2, 10))
    mask = (torch.arange(10) < torch.tensor([[10], [6]])).long()
    return pictures + {"clip": (ids,)}.get(family, (ids, mask) if family in READ else ())
