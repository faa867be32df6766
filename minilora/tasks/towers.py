"""A picture tower and a text tower: which models, from which weights, and the tokenizer of the
text tower. A question answerer has them, and a CLIP that is made of two encoders."""

import os
from typing import Any

import torch
from torch import nn

from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.settings.values import TOWERS
from minilora.tasks.weights import RANDOM, load_base, named, origin, picture_flags, tokenizer_beside
from reference_models import ModelError
from reference_models.fusion import TwoTower
from reference_models.load import config_for, config_of
from reference_models.text.tokenizers import Tokenizer, load_tokenizer

STUDENTS_TEXT = "bert-nano"  # whose vocabulary a student reads where nothing is said
DEFAULT_MODEL = {"vision": "vit-nano-patch8-48", "text": "bert-nano"}


def tower_names(config: Config) -> tuple[dict[str, str], dict[str, Any]]:
    """({tower: model name}, settings of the picture tower), of two towers or of a pair's name."""
    if isinstance(config.model, dict):
        return DEFAULT_MODEL | config.model, {}
    pair = None if os.path.isdir(config.model) else config_for(config.model)
    if getattr(pair, "family", None) != "fusion":
        raise UserError(
            f"--model {config.model}: --task vqa needs two towers, such as vision=vit-base-patch16-224 text=bert-base"
        )
    pooler = {"pooler": True} if getattr(pair.vision, "pooler", False) else {}
    return {tower: getattr(pair, tower).name for tower in TOWERS}, pooler


def tower_weights(config: Config, given: str | dict | None = None) -> dict[str, str | None]:
    """{tower: weights} from --weights; `given` (where they are now) wins. One word for both may be
    none or bundled."""
    weights = given or config.weights
    if isinstance(weights, dict):
        return dict.fromkeys(TOWERS) | weights
    if named(weights):
        raise UserError(f"--weights {weights}: which tower is it for? Write vision={weights} or text={weights}")
    return dict.fromkeys(TOWERS, weights)


def moved_weights(config: Config, recorded: Any, given: str | dict | None) -> dict[str, str | None]:
    """{tower: weights} of a run from its record; `given` is where they are now."""
    if not isinstance(recorded or {}, dict):
        raise UserError(f"--task {config.task} has two towers, but config.toml names one weight file: {recorded}")
    moved = tower_weights(config, given) if given is not None else {}
    return tower_weights(config, (recorded or {}) | {tower: w for tower, w in moved.items() if w is not None})


def is_student(config: Config) -> bool:
    """Whether --model is the small student, one model and not a pair of towers."""
    named = isinstance(config.model, str) and not os.path.isdir(config.model)
    return named and getattr(config_for(config.model), "family", None) == "student"


def load_student(config: Config, answers: int) -> tuple[nn.Module, dict[str, dict]]:
    """A student with random weights; UserError for a fusion that it does not have."""
    if config.fusion not in (None, "product") or config.weights not in (None, RANDOM):
        raise UserError(f"--model {config.model} starts from random weights and joins its towers by --fusion product")
    if config.text_pooling not in (None, "auto", "pooler"):
        raise UserError(f"--text-pooling {config.text_pooling}: a student reads the last token; leave the flag out")
    config.fusion, config.text_pooling = "product", "pooler"
    model, record = load_base(config.model, RANDOM, config.seed, answers, config.image_size, picture_flags(config))
    return model, {key: dict.fromkeys(TOWERS, value) for key, value in record.items()}


def load_towers(config: Config, answers: int, weights: dict[str, str | None]) -> tuple[TwoTower, dict[str, dict]]:
    """(the model with a random head, {"weights": {tower: ...}, "sha256": {tower: ...}}); random
    parts come from the seed. What --fusion and --text-pooling left open `config` then says."""
    if is_student(config):
        return load_student(config, answers)
    vision, text, record = load_pair(config, weights)
    config.fusion = config.fusion or "concat-product"
    torch.manual_seed(config.seed)
    return TwoTower(vision, text, answers, fusion=config.fusion), record


def load_pair(config: Config, weights: dict[str, str | None]) -> tuple[nn.Module, nn.Module, dict[str, dict]]:
    """(picture tower, text tower, record of their weights); settles config.text_pooling."""
    names, settings = tower_names(config)
    names = {tower: folder_now(name, weights[tower]) for tower, name in names.items()}
    sizes = (None, config.image_size, picture_flags(config))
    loaded = {
        "vision": load_base(names["vision"], weights["vision"], config.seed, *sizes, **settings),
        "text": load_base(names["text"], weights["text"], config.seed, **text_settings(config, names["text"])),
    }
    record = {key: {tower: loaded[tower][1][key] for tower in TOWERS} for key in ("weights", "sha256")}
    vision, text = (tower_of(loaded[tower][0], tower) for tower in TOWERS)
    config.text_pooling = getattr(text.config, "pooling", "pooler")
    return vision, text, record


def folder_now(name: str, source: str | None) -> str:
    """A model's name; for a folder that is not here any more, where its weights are now."""
    if os.path.isdir(name) or not os.path.isdir(source or ""):
        return name
    try:
        return config_for(name) and name
    except ModelError:
        return source


def text_settings(config: Config, name: str) -> dict[str, Any]:
    """For load_pretrained: a text tower, with --text-pooling; UserError where it has one vector."""
    pooling = config.text_pooling
    if pooling not in (None, "auto") and hasattr(config_of(name), "pooling"):
        return {"texts": True, "pooling": pooling}
    if pooling not in (None, "auto", "pooler"):
        raise UserError(f"--text-pooling {pooling}: the texts of {name} have one vector; leave the flag out")
    return {"texts": True}


def tower_of(model: nn.Module, tower: str) -> nn.Module:
    """The model itself, or one tower of a CLIP."""
    part = getattr(model, tower, model)
    if tower == "vision" and not hasattr(part, "preprocess"):
        part.preprocess = model.preprocess
    return part


def open_tokenizer(config: Config, weights: dict[str, str | None], shards: str | None = None) -> Tokenizer:
    """The shards' tokenizer, --tokenizer, or that beside the text tower or teacher."""
    if shards:
        stored = load_tokenizer(shards)
        if config.tokenizer and load_tokenizer(config.tokenizer).vocab != stored.vocab:
            raise UserError(f"--tokenizer {config.tokenizer} is not that of the shards in {shards}; leave it out")
        return stored
    if config.tokenizer:
        return load_tokenizer(config.tokenizer)
    student = is_student(config)
    name = STUDENTS_TEXT if student else tower_names(config)[0]["text"]
    source = origin(name, named(weights["text"]) or (config.teacher if student else None))
    if (folder := tokenizer_beside(source)) is None:
        where = f"beside {source}" if source else f"for {name}"
        raise UserError(f"--tokenizer is missing: no vocabulary {where}; give vocab.txt or tokenizer.json")
    return load_tokenizer(folder)


def text_limit(config: Any, tokenizer: Tokenizer, wanted: int | None) -> int:
    """The longest text in tokens; UserError where a text tower of `config` cannot read so many."""
    longest = positions(config) or tokenizer.max_length
    if wanted and (wanted > longest or (tokenizer.fill and wanted < longest)):
        reads = f"{config.name} reads {'' if tokenizer.fill else 'at most '}{longest} tokens"
        raise UserError(f"--max-length {wanted}: {reads}; {'leave it out' if tokenizer.fill else 'use at most that'}")
    return wanted or (longest if tokenizer.fill else min(tokenizer.max_length, longest))


def positions(config: Any) -> int | None:
    """The longest text in tokens that the text tower of a configuration has positions for."""
    return getattr(config, "max_positions", None) or getattr(config, "context", None)


def check_tokenizer(model: nn.Module, tokenizer: Tokenizer) -> None:
    """UserError where model and tokenizer do not belong together: more ids than rows, another end
    token or padding. From here on the tokenizer fills texts up where the model wants that."""
    config = getattr(model.config, "text", model.config)
    tokenizer.fill, pooled_at = getattr(config, "fill", None), getattr(config, "pooled_at", "")
    end = tokenizer.vocab_size - 1 if pooled_at == "argmax" else getattr(config, "eos_token_id", None)
    wrong = None
    if tokenizer.vocab_size > config.vocab_size:
        wrong = f"has {tokenizer.vocab_size} tokens, {config.name} knows {config.vocab_size}"
    elif getattr(config, "counted", False) and tokenizer.pad_id != config.pad_id:
        wrong = f"pads with token {tokenizer.pad_id}, {config.name} takes {config.pad_id} for padding"
    elif pooled_at in ("argmax", "eos") and tokenizer.eos_id != end:  # where a text is read
        wanted = "its last token" if pooled_at == "argmax" else end
        wrong = f"ends texts with token {tokenizer.eos_id}, {config.name} looks for {wanted}"
    if wrong:
        raise UserError(f"--tokenizer {wrong}; it belongs to another model")


def frozen(tower: nn.Module) -> bool:
    """Whether nothing in a tower is trained."""
    return not any(parameter.requires_grad for parameter in tower.parameters())
