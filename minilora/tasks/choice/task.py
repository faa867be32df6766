"""Multiple choice with CLIP: the picture is compared with one sentence for each choice.

v   = normalise(visual_projection(vision(picture)))               (B, e)
t_c = normalise(text_projection(text(sentence of choice c)))      (B, C, e)
logits_c = exp(logit_scale) * v . t_c                             (B, C)
loss = cross entropy with label smoothing over the choices of a question
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.atomic import write_json
from minilora.data.choice_sets import load_choices
from minilora.data.pictures.loader import make_loader
from minilora.data.questions.choice_batches import ChoiceDataset, choice_collate
from minilora.data.questions.choices import LETTERS, ChoiceSplit, ChoiceSplits
from minilora.errors import UserError
from minilora.settings.flags import Config
from minilora.tasks import base
from minilora.tasks.choice.text import Texts, check_tokenizer, find_tokenizer, text_sizes
from minilora.tasks.labelled import Labelled, Predictions
from minilora.tasks.teacher import teacher_names
from reference_models.text.tokenizers import Tokenizer

DEFAULT_MODEL = "clip-nano"
NANO_LR = 4e-3  # of LoRA on the nano model; larger models want the usual rates
# encode what a question's choices share once; None: where that is faster
share_prefix: bool | None = None


def build(config: Config, device: str | torch.device = "cpu") -> "Choice":
    """The task that `config` describes. The data are looked at first: a wrong folder
    is told at once."""
    if config.mode == "lora" and config.model in (None, DEFAULT_MODEL):
        config.lr = config.lr or NANO_LR
    base.resolve(config, DEFAULT_MODEL)
    splits = open_data(config)
    teacher_names(config, LETTERS[: len(splits.train[0].choices)])
    model, record, tokenizer = load_clip(config)
    base.make_trainable(model, config, model.head_modules if config.mode == "linear" else ())
    if config.compile:  # the loss calls the towers, never the whole
        model.vision.compile()
        model.text.compile()
    return Choice(config, model, record, tokenizer, splits, torch.device(device))


def open_data(config: Config, require_train: bool = True) -> ChoiceSplits:
    """The questions of --data-dir, or the generated ones."""
    check = config.bad_data == "error"
    sizes = config.val_split, config.subset, config.seed
    return load_choices(config.data_dir, config.data_format, *sizes, check, require_train)


def load_clip(config: Config) -> tuple[nn.Module, dict, Tokenizer]:
    """(model, record of its weights, tokenizer) of a configuration; UserError where it is no CLIP."""
    name, weights = base.one_value(config, "model"), base.one_value(config, "weights")
    base.find_weights(name, weights)  # what is missing first is told first
    tokenizer = find_tokenizer(config)
    sizes = text_sizes(name, weights, tokenizer)
    model, record = base.load_base(name, weights, config.seed, None, config.image_size, **sizes)
    if not hasattr(model, "text_projection"):
        raise UserError(f"--model {name} is no CLIP; --task choice needs one, such as clip-nano or clip-vit-b-32")
    check_tokenizer(model, tokenizer)
    return model, record, tokenizer


def logits_of(model: nn.Module, batch: dict) -> Tensor:
    """A batch of questions, or features that were computed before, -> logits (B, C), float32."""
    if "text_features" in batch:
        pooled, texts = batch["image_features"], batch["text_features"]
    else:
        pooled, texts = model.vision(batch["image"])[batch["picture"]], pooled_texts(model, batch)
    image, text = model.visual_projection(pooled), model.text_projection(texts)  # (B, e), (B, C, e)
    # 100 times a cosine has no room in half precision
    with torch.autocast(image.device.type, enabled=False):
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        return model.logit_scale.exp() * torch.einsum("be,bce->bc", image, text)


def pooled_texts(model: nn.Module, batch: dict) -> Tensor:
    """input_ids (B, C, T) -> the text tower's end tokens (B, C, d)."""
    ids = batch["input_ids"]
    if batch["share"] if share_prefix is None else share_prefix:
        return model.text.pooled_choices(ids)
    return model.text(ids.flatten(0, 1)).unflatten(0, ids.shape[:2])


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[dict], device: torch.device) -> Predictions:
    """The probabilities of the choices of every question in `loader`, in its order."""
    parts = []
    for batch in loader:
        inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        probabilities = logits_of(model, inputs).softmax(-1).cpu().numpy()
        parts.append((probabilities, batch["label"].numpy(), batch["valid"].numpy()))
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def accuracy_by_type(found: Predictions, split: ChoiceSplit) -> dict[str, float]:
    """{type of question: share of right answers} over the scored rows; {} where no
    question has a type."""
    rows: dict[str, list[bool]] = {}
    right = found.probabilities.argmax(1) == found.labels
    for i in np.flatnonzero(found.scored):
        rows.setdefault(split[i].kind, []).append(bool(right[i]))
    return {kind: sum(r) / len(r) for kind, r in sorted(rows.items())} if set(rows) - {""} else {}


class Choice(Labelled):
    """The task that the Trainer trains; base.Task says what each method is for."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        record: dict,
        tokenizer: Tokenizer,
        splits: ChoiceSplits,
        device: torch.device,
    ):
        self.config, self.model, self.base, self.splits, self.device = config, model, record, splits, device
        self.mode, self.preprocess, self.tokenizer = config.mode, model.preprocess, tokenizer
        self.workers = base.choose_workers(config, device) if config.data_dir else config.workers or 0
        self.amp = base.choose_amp(config, device)
        self.texts = Texts(tokenizer, config, model.config.context)
        parts = {"train": splits.train, "val": splits.val, "test": splits.test}
        self.data = {name: self.dataset(split, name) for name, split in parts.items() if split is not None}
        self.labels = list(LETTERS[: len(splits.train[0].choices)])
        self.features: dict[str, dict[str, Tensor]] = {}

    def dataset(self, split: ChoiceSplit, part: str) -> ChoiceDataset:
        augment = self.config.augment if part == "train" else "none"
        tokens = self.texts.of_split(split)
        return ChoiceDataset(split, tokens, self.preprocess, augment, self.config.seed, self.config.bad_data)

    def loader(self, part: str, batches: Sequence[Sequence]) -> Iterable[dict]:
        pin, collate = self.device.type == "cuda", choice_collate(self.tokenizer.pad_id)
        return make_loader(self.data[part], batches, self.workers, pin, collate)

    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        return logits_of(model, batch)

    def predict(self, model: nn.Module, loader: Iterable[dict]) -> Predictions:
        return predict(model, loader, self.device)

    def encoded(self, batch: dict) -> dict[str, Tensor]:
        ids = {"input_ids": batch["input_ids"].to(self.device), "share": batch["share"]}
        image = self.model.vision(batch["image"].to(self.device))[batch["picture"].to(self.device)]
        # (B, d), (B, C, d)
        return {"image_features": image, "text_features": pooled_texts(self.model, ids)}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.scores(self.predictions(model, "val"), "val")

    def test(self, model: nn.Module) -> dict[str, float] | None:
        if "test" not in self.data or all(question.answer < 0 for question in self.splits.test):
            return None
        with base.autocast(self.device, self.amp):
            return self.scores(self.predictions(model.eval(), "test"), "test")

    def scores(self, found: Predictions, part: str) -> dict[str, float]:
        by_type = accuracy_by_type(found, self.data[part].split)
        return found.scores() | {f"accuracy/{kind}": value for kind, value in by_type.items()}

    def describe(self, batch: dict) -> str:
        split = self.data["train"].split
        files = list(dict.fromkeys(split.path(i) for i in batch["index"].tolist()))
        return ", ".join(files[:8]) + f" and {len(files) - 8} more" * (len(files) > 8)

    def data_lines(self) -> list[str]:
        where = self.config.data_dir or "generated shapes"
        counts = ", ".join(f"{len(data)} {part}" for part, data in self.data.items())
        return [f"data: {where}: {counts} questions with {len(self.labels)} choices", *self.texts.note()]

    def write_files(self, run_dir: Path) -> None:
        write_json(run_dir / "labels.json", {"labels": self.labels, "keys": self.labels})
        write_json(run_dir / "preprocess.json", self.preprocess)
        self.tokenizer.save(run_dir)
        if self.mode == "full":
            base.write_model_config(self.model, self.labels, run_dir)
