"""--teacher RUN: the share of the loss that comes from a finished run's answers to
the same examples.

The teacher sees the student's very picture, crop and flip included: normalised as the teacher was
trained, and resized if its pictures have another size. --distill-unlabelled adds training rows of
which only the teacher speaks (data/unlabelled.py). Without augmentation an example's answer
never changes, so all of them are computed before the first step, in a fixed order (a resumed run
finds the same bits), and looked up afterwards.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from minilora.compress.distill import certain, distillation_loss
from minilora.data.pictures.loader import in_order
from minilora.errors import UserError
from minilora.inject import merge_lora
from minilora.settings.flags import Config
from minilora.settings.parse import read_run_config
from minilora.tasks.run import Run
from minilora.tasks.runfiles import read_labels
from minilora.tasks.towers import positions
from minilora.training.device import autocast, to_device

# the most that kept answers may take; of larger sets the teacher is asked in every epoch
CACHE_BYTES = 1 << 29


def teacher_names(config: Config, keys: Sequence[str]) -> dict[str, list[str]] | None:
    """{"labels", "keys"} of the teacher's classes or answers, which its student gets; None
    without --teacher.

    keys: what the student's own data would make its classes. UserError if the teacher is of
    another task, does not know one of them (but for a --subset of the teacher's data), or knows
    more than --num-answers.
    """
    if config.teacher is None:
        return None
    path = Path(config.teacher)
    taught, _ = read_run_config(path)
    if taught.task != config.task:
        raise UserError(f"--teacher {path} is a run of --task {taught.task}; this one is --task {config.task}")
    names = dict(zip(("labels", "keys"), read_labels(path), strict=True))
    kinds = "answers" if config.task == "vqa" else "classes"
    # a part of the teacher's data brings rarer answers to its top, and a student's answers were
    # its own teacher's
    same_data = config.data_dir == taught.data_dir
    excused = same_data and (config.subset != taught.subset or taught.teacher)
    if not excused and (unknown := [key for key in keys if key not in set(names["keys"])]):
        some = ", ".join(map(repr, unknown[:5])) + f" and {len(unknown) - 5} more" * (len(unknown) > 5)
        raise UserError(
            f"--teacher {path} was trained on other {kinds}: it does not know {some}; train it on these data first"
        )
    if config.task == "vqa" and config.num_answers < len(names["keys"]):
        raise UserError(
            f"--teacher {path} has {len(names['keys'])} answers, but --num-answers is {config.num_answers}; "
            "a student has the answers of its teacher"
        )
    return names


class Teacher:
    """A finished run in eval mode, its LoRA merged, nothing trained."""

    def __init__(self, task: Any, run: Run):
        config = task.config
        if config.cache_features:
            raise UserError("--teacher needs the pictures that --cache-features leaves out; use one of the two")
        self.task, self.config, self.run = task, config, run
        if config.soft_targets or run.config.soft_targets:
            raise UserError(
                "--teacher compares two distributions over the answers, --soft-targets learns each answer for itself; "
                "train teacher and student without it"
            )
        if run.config.multi_label:
            raise UserError(f"--teacher {run.path} gives several labels; the student's loss reckons with one class")
        merge_lora(run.model).eval().requires_grad_(False)
        self.check_text()
        self.kept: Tensor | None = None  # (N, K) once they are computed

    def check_text(self) -> None:
        """UserError where student and teacher read different token ids, or different prompts."""
        mine, theirs = self.task.tokenizer, getattr(self.run, "tokenizer", None)
        if mine is None or theirs is None:
            return
        if (mine.kind, mine.vocab) != (theirs.kind, theirs.vocab):
            raise UserError(
                f"--teacher {self.run.path} reads other tokens than this model ({theirs.kind}, {len(theirs.vocab)} "
                f"tokens; here {mine.kind}, {len(mine.vocab)}); give both one vocabulary: --tokenizer {self.run.path}"
            )
        if self.config.prompt != self.run.config.prompt:
            here, there = self.config.prompt, self.run.config.prompt
            said = f"was trained with --prompt {there!r}, not {here!r}; give the student the same"
            raise UserError(f"--teacher {self.run.path} {said}")

    def added(self, hard: Tensor, student: Tensor, batch: dict, counted: Tensor) -> Tensor:
        """The task's own loss () and the teacher's share; student (B, K) logits, counted (B,)
        rows of the loss.

        With --distill-unlabelled the other readable rows have no label, and the teacher's answer
        times T^2 is all their loss; the mean is over rows of both kinds.
        """
        config, answers = self.config, self.logits(batch)
        temperature = config.distill_temperature
        if config.distill_hard:
            temperature, answers = 1.0, certain(answers)
        mean = distillation_loss(hard, student, answers, counted, config.distill_alpha, temperature, config.distill_t2)
        if not config.distill_unlabelled:
            return mean
        others = batch["valid"] & ~counted
        alone = distillation_loss(hard, student, answers, others, 0.0, temperature, True)
        n, m = counted.sum(), others.sum()
        return (n * mean + m * alone) / (n + m).clamp(min=1)

    def logits(self, batch: dict) -> Tensor:
        """The teacher's answer to a batch of training examples, (B, K)."""
        if self.config.augment != "none" or self.config.dry_run:
            return self.answer(batch)
        if self.kept is None:
            self.kept = self.answer_all()
        return self.kept[batch["index"]] if len(self.kept) else self.answer(batch)

    @torch.no_grad()
    def answer(self, batch: dict) -> Tensor:
        """The teacher's logits for a batch of this task, (B, K)."""
        tower, tokens = getattr(self.run.model, "text", None), batch.get("input_ids", torch.empty(0)).shape[-1]
        longest = positions(getattr(tower, "config", None))
        if longest and tokens > longest:
            raise UserError(f"--teacher {self.run.path} reads at most {longest} tokens; use --max-length {longest}")
        return self.run.logits(batch | {"image": self.picture(batch["image"])})

    def picture(self, image: Tensor) -> Tensor:
        """The student's normalised pictures (N, 3, S, S) as the teacher wants them."""
        here, there = self.task.preprocess, self.run.preprocess
        if (here["mean"], here["std"]) != (there["mean"], there["std"]):
            mean, std, mean_there, std_there = self.colours
            image = (image * std + mean - mean_there) / std_there
        size = there["image_size"]
        if image.shape[-1] != size:
            image = F.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        return image

    @cached_property
    def colours(self) -> list[Tensor]:
        """Mean and deviation (3, 1, 1) of the student's normalisation, and of the teacher's: made
        once, as a GPU makes the host wait for each."""
        sides = self.task.preprocess, self.run.preprocess
        values = [torch.tensor(side[key]) for side in sides for key in ("mean", "std")]
        return [value[:, None, None].to(self.task.device) for value in values]

    def answer_all(self) -> Tensor:
        """(N, K) answers to every training example; (0,) where they would take too much memory."""
        task = self.task
        n, kept = len(task.data["train"]), torch.empty(0)
        for batch in task.train_loader(0, in_order(n, 2 * self.config.batch_size)):
            batch = to_device(batch, task.device)
            with autocast(task.device, task.amp):
                logits = self.answer(batch).float()
            if not len(kept):
                if 4 * n * logits.shape[1] > CACHE_BYTES:
                    return kept
                kept = torch.zeros(n, logits.shape[1], device=logits.device)
            kept[batch["index"]] = logits
        return kept
