"""Zero-shot classification with CLIP: a class is the sentence "a photo of a dog.", and the
nearest sentence wins.

p = softmax(exp(logit_scale) * cos(picture, sentence of each class))

Source: Radford et al. 2021, section 3.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.data.pictures.folder import Split
from minilora.data.pictures.loader import PictureDataset, in_order, make_loader
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks.clip import check_tokenizer, find_tokenizer
from minilora.training.device import autocast

TEMPLATE = "a photo of a {}."


def class_texts(classes: Sequence[str], template: str | None) -> list[str]:
    """One sentence per class; underscores of folder names become spaces, "a orange"
    becomes "an orange"."""
    template = template or TEMPLATE
    if template.count("{}") != 1:
        raise UserError(f"--prompt {template!r}: for class folders it must contain {{}} once, as in {TEMPLATE!r}")
    texts = []
    for name in classes:
        word = name.replace("_", " ").strip()
        article = " a {}" in f" {template}" and word[:1].lower() in "aeiou"
        texts.append((template.replace("a {}", "an {}") if article else template).replace("{}", word))
    return texts


@torch.no_grad()
def encode_classes(model: nn.Module, config: Config, classes: Sequence[str], device: torch.device) -> Tensor:
    """The classes' sentences as unit vectors (K, e)."""
    tokenizer = find_tokenizer(config)
    check_tokenizer(model, tokenizer)
    limit = min(tokenizer.max_length, model.config.context)
    ids = tokenizer(class_texts(classes, config.prompt), max_length=limit)["input_ids"].to(device)
    return F.normalize(model.encode_text(ids).float(), dim=-1)


@torch.no_grad()
def zero_shot_line(
    model: nn.Module, config: Config, split: Split, classes: Sequence[str], options: Any, device: torch.device
) -> str:
    """The accuracy of CLIP on a labelled split, in one line."""
    texts, right, count = encode_classes(model, config, classes, device), 0, 0
    dataset = PictureDataset(split, model.preprocess, bad_data=options.bad_data)
    for batch in make_loader(dataset, in_order(len(split), options.batch_size), options.workers):
        with autocast(device, options.amp):
            image = model.encode_image(batch["image"].to(device))  # (B, e)
        best = (F.normalize(image.float(), dim=-1) @ texts.T).argmax(-1).cpu()  # (B,)
        scored = batch["valid"] & (batch["label"] >= 0)
        right, count = right + int(((best == batch["label"]) & scored).sum()), count + int(scored.sum())
    if not count:
        raise UserError(f"{config.data_dir}: no picture with a label to score")
    template = config.prompt or TEMPLATE
    return (
        f"{config.model}, zero-shot with {template!r}, {count} pictures: top-1 {100 * right / count:.2f} % among "
        f"{len(classes)} classes (chance {100 / len(classes):.2f} %)"
    )
