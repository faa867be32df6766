"""Open-ended questions about pictures: two towers, a fusion, one class per frequent answer.

logits = head(fusion(vision(picture), text(question)))     (P, 3, S, S), (U, T) -> (B, K)
loss   = - log softmax(logits)_answer                        the most common answer
         or sum_k BCE(logits_k, t_k), t = 0, .3, .6, .9, 1   --soft-targets: t_k is the accuracy that answer k would get

In a batch every picture and every text is encoded once, however many questions share it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.atomic import write_json
from minilora.data.questions.vqa2 import VQAPart
from minilora.data.questions.vqa_batches import (
    Texts,
    VQADataset,
    bucketed_batches,
    grouped_batches,
    shuffled_groups,
    vqa_loader,
)
from minilora.data.shards.questions import check_shards
from minilora.data.vqa_sets import Answers, VQASplits, choose_answers, load_vqa, question_only_guess
from minilora.report.vqa_metric import score_vqa
from minilora.settings.flags import Config
from minilora.tasks import base
from minilora.tasks.teacher import Teacher, teacher_names
from minilora.tasks.vqa.features import FeatureCache
from minilora.tasks.vqa.model import DEFAULT_MODEL, load_towers, open_tokenizer, text_limit, tower_weights
from minilora.tasks.vqa.targets import SoftTargets
from minilora.training import distributed
from reference_models.fusion import TwoTower
from reference_models.text.tokenizers import Tokenizer

TOP = 5  # answers that are kept for each question


def build(config: Config, device: str | torch.device = "cpu") -> "VQA":
    """The task that `config` describes. The data are looked at first: a wrong folder
    is told at once."""
    base.resolve(config, DEFAULT_MODEL)
    splits = open_data(config)
    answers = choose_answers(splits.train.questions, config.num_answers)
    if names := teacher_names(config, answers.keys):
        answers = Answers(names["labels"], names["keys"])
    weights = tower_weights(config)
    model, record = load_towers(config, len(answers.labels), weights)
    tokenizer = open_tokenizer(config, weights, splits.stored and config.data_dir)
    model.labels = answers.labels
    base.make_trainable(model, config, model.head_modules)
    return VQA(config, model, record, splits, answers, tokenizer, torch.device(device))


def open_data(config: Config, require_train: bool = True) -> VQASplits:
    """The questions of --data-dir, or generated ones."""
    return load_vqa(
        config.data_dir,
        config.data_format,
        config.val_split,
        config.subset,
        config.seed,
        config.split_by,
        config.bad_data,
        require_train,
    )


@dataclass
class Predictions:
    """Answers to N questions: classes and probabilities of the best TOP (N, TOP), loss (N,), nan
    without a class."""

    classes: np.ndarray
    probabilities: np.ndarray
    loss: np.ndarray

    def answers(self, part: VQAPart, labels: Sequence[str]) -> dict[int, str]:
        """{question_id: the most probable answer}."""
        ids = (question.question_id for question in part.questions)
        return {number: labels[k] for number, k in zip(ids, self.classes[:, 0], strict=True)}


def score(answers: dict[int, str], part: VQAPart) -> dict:
    """score_vqa of answers to all questions of a part."""
    return score_vqa(answers, [question.annotation() for question in part.questions])


def logits_of(model: nn.Module, batch: dict) -> Tensor:
    """(B, K) for the questions of a batch; features that were computed before take
    their inputs' place."""
    keys = ("input_ids", "attention_mask", "image_index", "text_index", "image_features", "text_features")
    return model(batch.get("image"), **{key: batch[key] for key in keys if key in batch})


def row_losses(logits: Tensor, batch: dict, smoothing: float = 0.0) -> Tensor:
    """(B,) loss of each question; 0 for one without a class."""
    if "target" in batch:
        return F.binary_cross_entropy_with_logits(logits, batch["target"], reduction="none").sum(-1)
    return F.cross_entropy(logits, batch["label"], ignore_index=-1, label_smoothing=smoothing, reduction="none")


def probabilities(logits: Tensor, soft: bool) -> Tensor:
    """Of the K answers; with soft targets each for itself."""
    return logits.float().sigmoid() if soft else logits.float().softmax(-1)


@torch.no_grad()
def predict(model: nn.Module, loader: Iterable[dict], device: torch.device, soft: bool) -> Predictions:
    """The model's answers to the questions of `loader`, in its order."""
    parts = []
    for batch in loader:
        batch = {key: value.to(device) for key, value in batch.items()}
        logits = logits_of(model, batch).float()
        best = probabilities(logits, soft).topk(min(TOP, logits.shape[-1]))
        known = (batch["label"] >= 0) | (torch.tensor("target" in batch, device=device))
        losses = row_losses(logits, batch).where(known, torch.nan)
        parts.append([x.cpu().numpy() for x in (best.indices, best.values, losses)])
    return Predictions(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class VQA:
    """The task that the Trainer trains; base.Task says what each method is for."""

    metric = "accuracy"
    teacher: Teacher | None = None

    def __init__(
        self,
        config: Config,
        model: TwoTower,
        record: dict,
        splits: VQASplits,
        answers: Answers,
        tokenizer: Tokenizer,
        device: torch.device,
    ):
        self.config, self.model, self.base, self.splits, self.device = config, model, record, splits, device
        self.answers, self.tokenizer, self.labels = answers, tokenizer, answers.labels
        self.mode, self.preprocess = config.mode, model.preprocess
        self.workers = base.choose_workers(config, device) if config.data_dir else config.workers or 0
        self.amp = base.choose_amp(config, device)
        self.limit = text_limit(model, tokenizer, config.max_length)
        if splits.stored:
            check_shards(splits.stored, self.preprocess, self.limit, config.data_dir)
        self.asked = len(splits.train.questions)
        self.soft = SoftTargets(answers) if config.soft_targets else None
        splits.train = splits.train.only(lambda i, question: self.learnable(question))
        self.data = {name: self.dataset(part, name) for name, part in splits.parts.items()}
        self.cache = FeatureCache(self) if config.cache_features else None

    def learnable(self, question) -> bool:
        """Whether a training question's answer (with soft targets: one of its answers) is a class."""
        return self.soft.any(question) if self.soft else self.answers.of(question.answer) >= 0

    def dataset(self, part: VQAPart, name: str) -> VQADataset:
        config = self.config
        texts = Texts(part.questions, self.tokenizer, self.limit)
        labels = self.answers.classes(part.questions)
        augment = config.augment if name == "train" else "none"
        return VQADataset(part, texts, labels, self.preprocess, augment, config.seed, config.bad_data)

    def train_batches(self, epoch: int, times: int = 1) -> list[list[int]]:
        data, seed, size = self.data["train"], self.config.seed, times * self.config.batch_size
        if self.config.group_by_image:
            return shuffled_groups(data.picture, size, seed, epoch)
        return bucketed_batches(data.texts.lengths, size, seed, epoch)

    def train_loader(self, epoch: int, batches: list[list[int]]) -> Iterable[dict]:
        return self.loader("train", batches, epoch)

    def loader(self, part: str, batches: list[list[int]], epoch: int | None = None) -> Iterable[dict]:
        """The collated batches, with cached features and soft targets where they are asked for."""
        data = self.data[part]
        if self.cache:
            rows = self.cache.batches(part, batches, epoch)
        else:
            rows = vqa_loader(data, batches, epoch, self.workers, self.device.type == "cuda")
        return self.soft.added(rows, data.part.questions) if self.soft else rows

    def loss(self, model: nn.Module, batch: dict) -> tuple[Tensor, dict[str, Tensor]]:
        logits = logits_of(model, batch)  # (B, K)
        counts = batch["valid"] & ((batch["label"] >= 0) | ("target" in batch))
        rows = row_losses(logits, batch, self.config.smoothing).where(counts, 0.0)
        count = counts.sum()
        correct = ((logits.argmax(-1) == batch["label"]) & counts).sum()
        mean = rows.sum() / count.clamp(min=1)
        if self.teacher:
            mean = self.teacher.added(mean, logits, batch, counts)
        return mean, {"correct": correct, "count": count}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return self.scores(model, "val")

    def test(self, model: nn.Module) -> dict[str, float] | None:
        if "test" not in self.data or not self.splits.test.answered:
            return None
        with base.autocast(self.device, self.amp):
            return self.scores(model.eval(), "test")

    def scores(self, model: nn.Module, part: str) -> dict[str, float]:
        """{"loss", "accuracy"}: accuracy by the official rules or exact match, over all
        questions of the part."""
        found = self.predictions(model, part)
        said = found.answers(self.data[part].part, self.labels)
        known = found.loss[~np.isnan(found.loss)]
        loss = float(known.mean()) if len(known) else float("nan")
        return {"loss": loss, "accuracy": score(said, self.data[part].part)["accuracy"]}

    def predictions(self, model: nn.Module, part: str) -> Predictions:
        """Every question of a part once; with several processes each does a share and
        all get the whole."""
        batches = grouped_batches(self.data[part].picture, 4 * self.config.batch_size)
        mine = batches[distributed.rank() :: distributed.world_size()]
        own = predict(model, self.loader(part, mine), self.device, self.soft is not None) if mine else None
        shares = distributed.gather_objects(own)
        order = [i for rank in range(len(shares)) for batch in batches[rank :: len(shares)] for i in batch]
        columns = zip(*((s.classes, s.probabilities, s.loss) for s in shares if s is not None), strict=True)
        back = np.argsort(order)
        return Predictions(*(np.concatenate(column)[back] for column in columns))

    def describe(self, batch: dict) -> str:
        part = self.data["train"].part
        rows = [part.questions[i] for i in batch["index"].tolist()]
        told = ", ".join(f"{part.pictures[q.picture].path} (question {q.question_id})" for q in rows[:6])
        return told + f" and {len(rows) - 6} more" * (len(rows) > 6)

    def data_lines(self) -> list[str]:
        where = self.config.data_dir or "generated scenes"
        counts = ", ".join(
            f"{name} {len(part.questions):,} questions on {len(part.shown):,} pictures"
            for name, part in self.splits.parts.items()
        )
        kept, wanted = len(self.splits.train.questions), self.config.num_answers
        clamped = f" (all there are; --num-answers {wanted})" * (len(self.labels) < wanted)
        share = f"{100 * kept / self.asked:.2f} % of the training questions kept"
        lines = [f"data: {where}: {counts}", f"answers: {len(self.labels):,} classes{clamped}, {share}"]
        lines += [f"data: {note}" for note in self.splits.notes]
        if cut := self.tokenizer.truncated:
            lines.append(f"data: {cut} texts were cut to {self.limit} tokens")
        for name in ("val", "test"):
            if name in self.data and self.data[name].part.answered:
                lines.append(self.unseen_line(name))
        return lines

    def unseen_line(self, name: str) -> str:
        """What no answer of the model can be, and what can be guessed without any picture."""
        part = self.data[name].part
        outside = int((self.data[name].labels < 0).sum())
        guess = score(question_only_guess(self.splits.train.questions, part.questions), part)
        return (
            f"{name}: {outside:,} of {len(part.questions):,} answers are out of the vocabulary and count as wrong; "
            f"guessed from the question alone: {guess['overall']:.2f} % {guess['metric']}"
        )

    def write_files(self, run_dir: Path) -> None:
        write_json(run_dir / "labels.json", {"labels": self.labels, "keys": self.answers.keys})
        write_json(run_dir / "preprocess.json", self.preprocess)
        self.tokenizer.save(run_dir)
        if self.mode == "full":
            base.write_model_config(self.model, self.labels, run_dir)
