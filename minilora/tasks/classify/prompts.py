"""Class names as sentences: a class is "a photo of a dog.", and the nearest sentence wins.

t_k    = normalise(mean_p normalise(text(sentence p of class k)))      (K, e)
logits = exp(logit_scale) * cos(picture, t_k)                          (B, K)

Source: Radford et al. 2021, arXiv:2103.00020, section 3.1; several prompts averaged: section 3.1.4.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.data.sets import spelled
from minilora.errors import UserError
from minilora.tasks.clip import cosine_logits, full
from minilora.tasks.labelled import LabelledPredictor
from minilora.tasks.towers import frozen
from reference_models.text.tokenizers import Tokenizer

TEMPLATE = "a photo of a {}."
CHUNK = 256  # sentences at once where no gradient is needed


def check_names(classes: Sequence[str], where: str) -> None:
    """UserError for a class without a name, or two that are one sentence."""
    seen: dict[str, str] = {}
    for name in classes:
        word = spelled(name)
        if not word:
            raise UserError(f"{where}: the class {name!r} has no name to make a sentence of; give it one")
        if word in seen:
            raise UserError(f"{where}: the classes {seen[word]!r} and {name!r} make the same sentence; rename one")
        seen[word] = name


def class_texts(classes: Sequence[str], template: str | None) -> list[str]:
    """One sentence per class; "_" becomes a space, and "a orange" becomes "an orange"."""
    template = template or TEMPLATE
    if template.count("{}") != 1:
        raise UserError(f"--prompt {template!r}: for class names it must contain {{}} once, as in {TEMPLATE!r}")
    texts = []
    for word in (name.replace("_", " ").strip() for name in classes):
        article = " a {}" in f" {template}" and word[:1].lower() in "aeiou"
        texts.append((template.replace("a {}", "an {}") if article else template).replace("{}", word))
    return texts


class NamesPredictor(LabelledPredictor):
    """One distribution over K classes, which are sentences; a model without a head for them.

    The sentences are encoded with every batch where the text tower is trained, once for all
    batches of `predict`, and once for good where the text tower is frozen.
    """

    def __init__(
        self,
        device: str | torch.device,
        model: nn.Module,
        tokenizer: Tokenizer,
        classes: Sequence[str],
        prompt: str | tuple[str, ...] | None = None,
    ):
        """prompt: templates with {}; UserError for names or templates that make no sentences."""
        super().__init__(device)
        check_names(classes, "class names")
        self.templates = prompt if isinstance(prompt, tuple) else (prompt or TEMPLATE,)
        self.shape = len(self.templates), len(classes)  # (P, K)
        texts = [text for template in self.templates for text in class_texts(classes, template)]
        read = tokenizer(texts, max_length=min(tokenizer.max_length, model.config.context))
        self.tokens = {key: read[key] for key in ("input_ids", "attention_mask")}  # (P K, T)
        self.kept: tuple[nn.Module, Tensor] | None = None  # (model, its text vectors)

    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        pooled = batch["features"] if "features" in batch else model.vision.pooled(batch["image"])
        return cosine_logits(model, model.visual_projection(pooled), self.classes(model, self.pooled(model)))

    def classes(self, model: nn.Module, pooled: Tensor) -> Tensor:
        """Text vectors (P K, d) -> the classes' unit vectors (K, e)."""
        units = F.normalize(full(model.text_projection(pooled)), dim=-1)
        return F.normalize(units.unflatten(0, self.shape).mean(0), dim=-1)

    def pooled(self, model: nn.Module) -> Tensor:
        """The text tower's vectors of all sentences, (P K, d)."""
        if self.kept and self.kept[0] is model:
            return self.kept[1]
        tokens = {key: ids.to(self.device) for key, ids in self.tokens.items()}
        if torch.is_grad_enabled() and not frozen(model.text):
            return model.pooled_text(**tokens)
        with torch.no_grad():
            pieces = zip(*(ids.split(CHUNK) for ids in tokens.values()), strict=True)
            vectors = torch.cat([model.pooled_text(*piece) for piece in pieces])
        if frozen(model.text):
            self.kept = model, vectors
        return vectors

    @contextmanager
    def keeping(self, model: nn.Module):
        """Inside, the sentences are encoded once: nothing is trained there."""
        with torch.no_grad():
            self.kept = model, self.pooled(model)
        try:
            yield
        finally:
            if not frozen(model.text):
                self.kept = None
