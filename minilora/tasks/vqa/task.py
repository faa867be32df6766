"""Open-ended questions about pictures: two towers, a fusion, one class per frequent answer.

logits = head(fusion(vision(picture), text(question)))     (P, 3, S, S), (U, T) -> (B, K)
loss   = - log softmax(logits)_answer                        the most common answer
         or sum_k BCE(logits_k, t_k), t = 0, .3, .6, .9, 1   --soft-targets

t_k is the accuracy that answer k would get.
In a batch every picture and every text is encoded once, however many questions share it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minilora.data.questions import vqa_batches
from minilora.data.questions.vqa2 import Question, VQAPart
from minilora.data.shards.questions import check_shards
from minilora.data.unlabelled import add_unlabelled, joined
from minilora.data.vqa_sets import Answers, VQASplits, choose_answers, load_vqa, question_only_guess
from minilora.report.vqa_metric import ANSWERS, leave_one_out, score_vqa
from minilora.settings.flags import Config
from minilora.tasks import towers
from minilora.tasks.method import make_trainable, resolve
from minilora.tasks.predictor import Predictor
from minilora.tasks.task import Task
from minilora.tasks.teacher import teacher_names
from minilora.tasks.vqa.features import FeatureCache
from minilora.tasks.weights import load_base, picture_flags
from minilora.training.device import to_device
from reference_models.load import config_of
from reference_models.text.tokenizers import Tokenizer

TOP = 5  # answers that are kept for each question


def open_data(config: Config, require_train: bool = True) -> VQASplits:
    """The questions of --data-dir, or generated ones."""
    cut = config.val_split, config.subset, config.seed, config.split_by
    return load_vqa(config.data_dir, config.data_format, *cut, config.bad_data, require_train)


def prepare(config: Config) -> tuple[VQASplits, dict, Tokenizer, int, Callable]:
    """What shards hold: (splits, preprocess, tokenizer, longest text, part -> token ids)."""
    resolve(config, towers.DEFAULT_MODEL)
    splits = open_data(config)
    weights = towers.tower_weights(config)
    names, settings = towers.tower_names(config)
    sizes = (None, config.image_size, picture_flags(config))
    whole, _ = load_base(names["vision"], weights["vision"], config.seed, *sizes, **settings)
    tokenizer = towers.open_tokenizer(config, weights)
    text = config_of(names["text"])
    text = getattr(text, "text", text)
    tokenizer.fill = getattr(text, "fill", None)
    limit = towers.text_limit(text, tokenizer, config.max_length)

    def tokens(part):
        texts = vqa_batches.Texts(part.questions, tokenizer, limit)
        return [texts.ids[row] for row in texts.row]

    return splits, towers.tower_of(whole, "vision").preprocess, tokenizer, limit, tokens


class BestAnswers(NamedTuple):
    """Answers to N questions: classes and probabilities of the best TOP (N, TOP), loss (N,), nan
    where the true answer is no class."""

    classes: np.ndarray
    probabilities: np.ndarray
    loss: np.ndarray

    def answers(self, part: VQAPart, labels: Sequence[str]) -> dict[int, str]:
        """{question_id: the most probable answer}."""
        ids = (question.question_id for question in part.questions)
        return {number: labels[k] for number, k in zip(ids, self.classes[:, 0], strict=True)}

    def mean_loss(self) -> float:
        """The mean over the questions that have one; nan where none has."""
        known = self.loss[~np.isnan(self.loss)]
        return float(known.mean()) if len(known) else float("nan")


def score(answers: dict[int, str], part: VQAPart) -> dict:
    """score_vqa of answers to all questions of a part."""
    return score_vqa(answers, [question.annotation() for question in part.questions])


def row_losses(logits: Tensor, batch: dict, smoothing: float = 0.0) -> Tensor:
    """(B,) loss of each question; 0 for one without a class."""
    if "target" in batch:
        return F.binary_cross_entropy_with_logits(logits, batch["target"], reduction="none").sum(-1)
    return F.cross_entropy(logits, batch["label"], ignore_index=-1, label_smoothing=smoothing, reduction="none")


class SoftTargets:
    """--soft-targets: each of ten people's answers is learned as the accuracy that it would get;
    targets (B, K) of 0, .3, .6, .9, 1 for k equal answers, and 1 where a question has one."""

    def __init__(self, answers: Answers):
        self.answers = answers

    def any(self, question: Question) -> bool:
        """Whether one of the question's answers is a class."""
        return any(self.answers.of(answer) >= 0 for answer in set(question.answers))

    def of(self, question: Question) -> dict[int, float]:
        """{class: target} of one question; spellings of one answer count together."""
        counts = Counter(self.answers.of(answer) for answer in question.answers)
        if len(question.answers) < ANSWERS:
            return {self.answers.of(question.answer): 1.0} if question.answer else {}
        return {k: leave_one_out(n, len(question.answers)) for k, n in counts.items()}

    def added(self, batches: Iterable[dict], questions: Sequence[Question]) -> Iterator[dict]:
        """The batches with `target` (B, K) float32."""
        for batch in batches:
            yield batch | {"target": self.target([questions[i] for i in batch["index"].tolist()])}

    def target(self, questions: Sequence[Question]) -> Tensor:
        target = torch.zeros(len(questions), len(self.answers.labels))
        for row, question in enumerate(questions):
            for k, value in self.of(question).items():
                if k >= 0:
                    target[row, k] = value
        return target


class VQAPredictor(Predictor):
    """The best answers of K to each question; `soft`: each answer is right or wrong for itself."""

    kind = BestAnswers
    batches = 4

    def __init__(self, device: str | torch.device = "cpu", soft: bool = False):
        super().__init__(device)
        self.soft = soft

    def logits(self, model: nn.Module, batch: dict) -> Tensor:
        keys = ("input_ids", "attention_mask", "image_index", "text_index", "image_features", "text_features")
        return model(batch.get("image"), **{key: batch[key] for key in keys if key in batch})

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits.float().sigmoid() if self.soft else logits.float().softmax(-1)

    def loss(self, logits: Tensor, batch: dict, smoothing: float) -> tuple[Tensor, Tensor, Tensor]:
        counts = batch["valid"] & ((batch["label"] >= 0) | ("target" in batch))
        rows = row_losses(logits, batch, smoothing).where(counts, 0.0)
        return rows.sum(), ((logits.argmax(-1) == batch["label"]) & counts).sum(), counts

    def columns(self, logits: Tensor, batch: dict) -> tuple[np.ndarray, ...]:
        best = self.probabilities(logits).topk(min(TOP, logits.shape[-1]))
        batch = to_device({key: batch[key] for key in ("label", "target") if key in batch}, logits.device)
        known = (batch["label"] >= 0) | torch.tensor("target" in batch, device=logits.device)
        losses = row_losses(logits, batch).where(known, torch.nan)
        return tuple(x.cpu().numpy() for x in (best.indices, best.values, losses))


class VQA(Task):
    """Open-ended questions, see Task."""

    unit = "questions"

    def __init__(self, config: Config, device: str | torch.device = "cpu"):
        """The data come first: a wrong folder is reported at once."""
        resolve(config, towers.DEFAULT_MODEL)
        splits = open_data(config)
        add_unlabelled(splits, config.distill_unlabelled, config.bad_data)
        answers = choose_answers(splits.train.questions, config.num_answers)
        if names := teacher_names(config, answers.keys):
            answers = Answers(names["labels"], names["keys"])
        weights = towers.tower_weights(config)
        model, record = towers.load_towers(config, len(answers.labels), weights)
        tokenizer = towers.open_tokenizer(config, weights, splits.stored and config.data_dir)
        model.labels = answers.labels
        make_trainable(model, config, model.head_modules)
        super().__init__(config, model, record, splits, VQAPredictor(device, config.soft_targets))
        self.answers, self.tokenizer, self.labels, self.keys = answers, tokenizer, answers.labels, answers.keys
        towers.check_tokenizer(model, tokenizer)
        self.limit = towers.text_limit(model.text.config, tokenizer, config.max_length)
        if splits.stored:
            check_shards(splits.stored, self.preprocess, self.limit, config.data_dir)
        self.asked = len(splits.train.questions)
        self.soft = SoftTargets(answers) if config.soft_targets else None
        # with soft targets one of a question's answers is enough
        learnable = self.soft.any if self.soft else (lambda question: answers.of(question.answer) >= 0)
        splits.train = splits.train.only(lambda i, question: learnable(question))
        parts = splits.parts | {"train": joined(splits)}
        self.unlabelled = len(splits.unlabelled.questions) if splits.unlabelled else 0
        self.data = {name: self.dataset(part, name) for name, part in parts.items()}
        self.cache = FeatureCache(self) if config.cache_features else None

    def dataset(self, part: VQAPart, name: str) -> vqa_batches.VQADataset:
        config = self.config
        texts = vqa_batches.Texts(part.questions, self.tokenizer, self.limit)
        labels = self.answers.classes(part.questions)
        augment = config.augment if name == "train" else "none"
        return vqa_batches.VQADataset(part, texts, labels, self.preprocess, augment, config.seed, config.bad_data)

    def train_batches(self, epoch: int, times: int = 1) -> list[list[int]]:
        data, seed, size = self.data["train"], self.config.seed, times * self.config.batch_size
        rows = slice(-self.unlabelled, None)  # these are the last; without any all rows

        def cut(size: int) -> list[list[int]]:
            if self.config.group_by_image:
                return vqa_batches.shuffled_groups(data.picture[rows], size, seed, epoch)
            return vqa_batches.bucketed_batches(data.texts.lengths[rows], size, seed, epoch)

        return self.mixed(cut, size, epoch) if self.unlabelled else cut(size)

    def loader(self, part: str, batches: list[list[int]], epoch: int | None = None) -> Iterable[dict]:
        data = self.data[part]
        if self.cache:
            rows = self.cache.batches(part, batches, epoch)
        else:
            rows = vqa_batches.vqa_loader(data, batches, epoch, self.workers)
        return self.soft.added(rows, data.part.questions) if self.soft else rows

    def answered(self, part: str) -> bool:
        return self.data[part].part.answered

    def scores(self, found: BestAnswers, part: str) -> dict[str, float]:
        """{"loss", "accuracy"}: by the official rules or exact match, over all questions."""
        said = found.answers(self.data[part].part, self.labels)
        return {"loss": found.mean_loss(), "accuracy": score(said, self.data[part].part)["accuracy"]}

    def eval_batches(self, part: str) -> list[list[int]]:
        return vqa_batches.grouped_batches(self.data[part].picture, self.predictor.batches * self.config.batch_size)

    def file_of(self, row: int, part: str = "train") -> str:
        question, pictures = self.data[part].part.questions[row], self.data[part].part.pictures
        return f"{pictures[question.picture].path} (question {question.question_id})"

    def data_lines(self) -> list[str]:
        where, more = self.config.data_dir or "generated scenes", self.splits.unlabelled
        parts = self.splits.parts | ({"unlabelled": more} if more else {})
        counts = ", ".join(
            f"{name} {len(part.questions):,} questions on {len(part.shown):,} pictures" for name, part in parts.items()
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
            f"baseline guessed from the question alone, the most frequent in training: {guess['overall']:.2f} %"
        )


build = VQA
