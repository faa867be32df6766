"""A CLIP and its tokenizer, or one made of two encoders, and what choice and class names share.

logits = exp(logit_scale) * cos(picture, text) + logit_bias, which only SigLIP has
"""

import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.settings.values import TOWERS
from minilora.tasks.method import one_value
from minilora.tasks.run import Run
from minilora.tasks.towers import check_tokenizer, load_pair, moved_weights, open_tokenizer, tower_weights
from minilora.tasks.weights import RANDOM, find_weights, load_base, origin, picture_flags, restoring, tokenizer_beside
from reference_models.files.dual import join
from reference_models.load import config_for, config_of
from reference_models.text.tokenizers import Tokenizer, load_tokenizer

NO_CLIP = "--model {} is no CLIP; {} needs one, such as clip-nano or clip-vit-b-32"
NEEDS = {"choice": "--task choice", "classify": "--head names"}


def is_clip(config: Config) -> bool:
    """Whether --model compares pictures with texts; ModelError for a name that does not exist."""
    return isinstance(config.model, dict) or config_of(config.model).family in ("clip", "dual")


def load_clip(config: Config) -> tuple[nn.Module, dict, Tokenizer]:
    """(model, record of its weights, tokenizer) of a configuration; UserError for no CLIP."""
    if isinstance(config.model, str) and not os.path.isdir(config.model):
        pair = config_for(config.model)
        if pair.family == "dual" and pair.logit_bias is None:  # two models that the run joins
            config.model = {tower: getattr(pair, tower).name for tower in TOWERS}
    if isinstance(config.model, dict):
        model, record = load_dual(config, weights := tower_weights(config))
        tokenizer = open_tokenizer(config, weights)
        check_tokenizer(model, tokenizer)
        return model, record, tokenizer
    if config.text_pooling not in (None, "auto"):
        raise UserError(f"--text-pooling {config.text_pooling}: {config.model} has one vector of a text; leave it out")
    name, weights = one_value(config, "model"), one_value(config, "weights")
    find_weights(name, weights)  # what is missing first is reported first
    tokenizer = find_tokenizer(config)
    sizes = text_sizes(name, weights, tokenizer)
    model, record = load_base(name, weights, config.seed, None, config.image_size, picture_flags(config), **sizes)
    if not hasattr(model, "text_projection"):
        raise UserError(NO_CLIP.format(name, NEEDS[config.task]))
    check_tokenizer(model, tokenizer)
    return model, record, tokenizer


def load_dual(config: Config, weights: dict[str, str | None]) -> tuple[nn.Module, dict[str, dict]]:
    """(a CLIP of the two encoders, the record of their weights); the seed makes the projections."""
    vision, text, record = load_pair(config, weights)
    torch.manual_seed(config.seed)
    return join(vision, text), record


def trained_heads(model: nn.Module, config: Config) -> tuple[str, ...]:
    """Projections and scale are trained in linear mode, and where they are new."""
    return model.head_modules if config.mode == "linear" or isinstance(config.model, dict) else ()


def restore_clip(run: Run, weights: str | dict | None) -> tuple[nn.Module, dict]:
    """The base model of a run, and the record of its weights. `weights`: where they are now."""
    config, recorded = run.config, run.base.get("weights")
    if isinstance(config.model, dict):
        found = moved_weights(config, recorded, weights)
        with restoring(found.values()):
            return load_dual(config, found)
    source = weights or recorded or config.weights
    sizes = text_sizes(config.model, source, run.tokenizer)
    with restoring([source]):
        return load_base(config.model, source, config.seed, None, config.image_size, picture_flags(config), **sizes)


def find_tokenizer(config: Config) -> Tokenizer:
    """--tokenizer, else what lies beside the weights; UserError where there is none."""
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    name = one_value(config, "model")
    source = origin(name, one_value(config, "weights"))
    if (folder := tokenizer_beside(source)) is not None:
        return load_tokenizer(folder)
    # nobody should look for the tokenizer of a model that reads no texts
    if not os.path.isdir(name) and config_for(name).family not in ("clip", "dual"):
        raise UserError(NO_CLIP.format(name, NEEDS[config.task]))
    where = f"beside {source}" if source else f"bundled for {name}"
    other = ", or take --head linear" * (config.task == "classify")
    raise UserError(f"--tokenizer is missing, and there is none {where}: name its file or folder{other}")


def text_sizes(name: str, weights: str | None, tokenizer: Tokenizer) -> dict[str, int]:
    """For load_pretrained: a text tower is wanted, a random one for the tokenizer's ids."""
    if weights != RANDOM or not name.startswith("clip-"):
        return {"texts": True}
    return {"texts": True, "vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}


def full(x: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cosine_logits(model: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    """exp(logit_scale) * cosine + logit_bias of pictures (B, e) with texts (K, e), or (B, K, e) of
    their own: (B, K). At full precision: 100 times a cosine has no room in half of it."""
    with torch.autocast(image.device.type, enabled=False):
        image, text = F.normalize(full(image), dim=-1), F.normalize(full(text), dim=-1)
        cosine = torch.einsum("be,ke->bk" if text.ndim == 2 else "be,bke->bk", image, text)
        return model.logit_scale.exp() * cosine + (0 if model.logit_bias is None else model.logit_bias)
