"""The training loop. It knows nothing of images or text: a task brings the model, the
batches and the loss.

    Trainer(task, TrainOptions(epochs=3, lr=1e-3), "runs/classify-lora-000", "cuda").fit()

One optimizer step, for n items in its microbatches m = 1 .. M (over all processes):

    g = sum_m  len(m) / n * grad loss(m)        the gradient of one big batch, ragged ends included
    g = g * min(1, clip_grad / |g|)             |g| is finite, or the step is not taken
    w = optimizer(w, g, lr * factor(step))      float32 weights, whatever autocast computes in

Who computes which microbatch (distributed.py): a step has `turns` = grad_accum_steps * processes
microbatches; `share_steps` gives this process its own as a `Step`, each with its `weight` = len(m)
/ n * processes, because DistributedDataParallel averages the gradients over the processes. A lone
process with grad_accum_steps 1 has one microbatch of weight 1.

A run stopped after any step and resumed ends with the same bits, on a GPU with --deterministic:
the checkpoint holds all that changes, and random numbers are drawn from (seed, step, rank).
"""

import contextlib
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minilora.adapter import save_adapter
from minilora.atomic import write_safetensors
from minilora.errors import LostWorker, RunError, UserError
from minilora.signals import Interrupted, StopSignals
from minilora.training import checkpoint, distributed, optim, state
from minilora.training.device import Feed, autocast, compile_blocks
from minilora.training.faults import UNREADABLE, explain_nonfinite, least_items, readable_errors
from minilora.training.progress import Progress, resumed_line

# what a step adds up over its microbatches, then over the processes, in this order
LOSS, CORRECT, COUNTED, STOP, LATE = range(5)


@dataclass
class TrainOptions:
    """How to train; the flags of the same names. 0 or None switches a limit off."""

    epochs: int = 5
    max_steps: int | None = None
    grad_accum_steps: int = 1
    opt: str = "adamw"
    lr: float = 1e-3
    head_lr: float | None = None
    weight_decay: float = 0.01
    lora_plus: float | None = None  # times lr for lora_B
    sched: str = "cosine"
    warmup_ratio: float = 0.0
    clip_grad: float = 1.0
    amp: str = "fp32"
    compile: bool = False
    grad_checkpointing: bool = False  # a switch of the model's, set by the task
    early_stop: int = 0
    save_every: int = 0
    log_interval: int = 20
    log_to: str = "none"
    nan_policy: str = "stop"
    time_limit: float | None = None  # minutes
    seed: int = 0
    resume: str = "auto"  # "auto", "never", or a run or checkpoint directory
    keep_checkpoints: int = 2


class Trainer:
    """Trains task.model; minilora/tasks/task.py writes down what a task has to offer.

    Writes metrics.jsonl, train.log and checkpoints/ into `run_dir`, and the best epoch's weights:
    an adapter, or model.safetensors in mode "full".
    """

    def __init__(self, task: object, options: TrainOptions, run_dir: str | Path, device: str | torch.device):
        self.task, self.options = task, options
        self.run_dir, self.device = Path(run_dir), torch.device(device)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.model = task.model.to(self.device)
        if self.device.type == "cuda":
            self.model.to(memory_format=torch.channels_last)  # of convolutions, for cuDNN
        if options.compile:
            compile_blocks(self.model)
        rates = options.lr, options.head_lr, options.weight_decay, options.lora_plus or 1.0
        self.optimizer = optim.build_optimizer(self.model, options.opt, *rates)
        self.listing = getattr(task, "listing", dict)()  # what the data are, where the task says so
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # idle but for fp16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=options.amp == "fp16")
        self.loss = distributed.wrap(distributed.TaskLoss(task))
        unit = getattr(task, "unit", "items")
        self.progress = Progress(self.run_dir, self.device, options.log_interval, options.log_to, unit)
        self.signals = StopSignals.shared()
        self.between = True  # two steps: nothing is half done
        self.least, self.joins = least_items(self.model), False
        self.state = state.TrainState()
        self.best_tensors: dict[str, Tensor] = {}  # of epoch self.state.best, on the CPU
        self.saved: Path | None = None  # the newest checkpoint
        self.kept: tuple[int, int] | None = None  # step and epoch of what it holds
        self.deadline, self.late = math.inf, False  # --time-limit, and whether it is reached

        first = self.steps_of(0)
        if not first:
            raise UserError("the training set is empty: there is no batch to train on")
        self.batch_size = max(len(batch) for step in first for batch in step.batches)
        planned = options.epochs * len(first)
        self.last_step = options.max_steps or sys.maxsize
        # what the schedule and the time left reckon with
        self.total_steps = min(planned, self.last_step)

    def fit(self) -> dict:
        """Trains to the end, leaves the best epoch's weights in the model, returns how it went."""
        self.load_checkpoint()
        if self.joins:
            self.progress.log("a batch of one joins the batch before it: BatchNorm needs two for its statistics")
        self.deadline = time.monotonic() + 60 * (self.options.time_limit or math.inf)
        with self.signals, self.progress, readable_errors(self.device, self.batch_size, self.where):
            try:
                while self.unfinished():
                    # an epoch that the time limit cuts is scored only where there is no other score
                    if (whole := self.train_one_epoch()) or self.state.best is None:
                        self.end_epoch(whole)
            except (Interrupted, LostWorker) as stop:
                self.put_away(stop)
                raise
        if self.cut_short:
            minutes, step = self.options.time_limit, self.state.step
            self.progress.log(f"time limit of {minutes:g} minutes reached after step {step}; checkpoint {self.saved}")
        if self.state.best is None:
            raise RunError(
                f"no epoch gave a finite {self.task.metric} in validation: nothing to keep; try a smaller --lr"
            )
        state.load_model_tensors(self.model, self.best_tensors, "the best epoch")
        self.save_best()
        history = self.state.history
        return {
            "best": self.state.best,
            "final": history[-1],
            "history": history,
            "steps": self.state.step,
            "seconds": sum(row["seconds"] for row in history),
            "images_per_second": history[-1]["images_per_second"],
            "peak_memory_mb": max(row["peak_memory_mb"] for row in history),
            "weights_sha256": state.tensors_sha256(self.best_tensors),
        }

    def unfinished(self) -> bool:
        """An epoch waits for its score, or epochs, steps and patience (--early-stop
        epochs) are left."""
        now, o = self.state, self.options
        waited = now.epoch - (now.best["epoch"] if now.best else 0)
        left = now.epoch < o.epochs and now.step < self.last_step and not 0 < o.early_stop <= waited
        return not self.late and (now.position > 0 or left)

    @property
    def cut_short(self) -> bool:
        """Whether the time limit has left steps to a later session."""
        return self.late and self.state.step < self.total_steps

    def train_one_epoch(self) -> bool:
        """Optimizer steps from state.position to the end of the epoch, or to the last step of the
        run; False where the time limit has cut them short."""
        now, every = self.state, self.options.save_every
        steps = self.steps_of(now.epoch, now.position)[: self.last_step - now.step]
        # first the clock: features that are computed once count as well
        self.progress.start_epoch(now, self.options.epochs, len(steps))
        batches = [batch for step in steps for batch in step.batches]
        feed = Feed(self.task.train_loader(now.epoch, batches), self.device)
        self.model.train()
        whole, alone = True, distributed.world_size() == 1
        # several processes stop after the same step: `train_step` asks them all
        with contextlib.nullcontext() if alone else self.signals.held(ends=False):
            for number, step in enumerate(steps, start=1):
                feed.wait()
                with self.signals.held():
                    self.between = False
                    stop = self.train_step(step, feed)
                    now.step += 1
                    now.position += step.items
                    self.between = True
                    self.progress.step(now, self.total_steps)
                    whole = number == len(steps)
                    if stop or (not whole and (self.late or (every and now.step % every == 0))):
                        self.save_checkpoint()
                if stop:
                    distributed.barrier()  # torchrun stops all when the first one ends
                    raise Interrupted(int(self.signals.signum or signal.SIGTERM))
                if self.late:
                    break
        self.progress.end_epoch()
        return whole

    def steps_of(self, epoch: int, done: int = 0) -> list[distributed.Step]:
        """This process's share of an epoch without its first `done` items."""
        accumulate = self.options.grad_accum_steps
        batches = self.task.train_batches(epoch, distributed.turns(accumulate))
        whole = distributed.joined(batches, self.least)
        self.joins = self.joins or len(whole) < len(batches)
        left = distributed.joined(distributed.skip_items(whole, done), self.least)
        return distributed.share_steps(left, accumulate, self.least)

    def train_step(self, step: distributed.Step, feed: Feed) -> bool:
        """One optimizer step; returns whether a signal has asked some process to stop after it.

        One small tensor crosses from the device per step: loss, counts and gradient norm. That is
        the only time the host waits for a GPU, and it waits before optimizer.step(), so a NaN never
        reaches a weight.
        """
        now, o = self.state, self.options
        torch.manual_seed(state.step_seed(o.seed, now.step, distributed.rank()))  # for dropout
        now.lr = optim.set_learning_rate(self.optimizer, self.lr_factor())
        self.optimizer.zero_grad(set_to_none=True)
        sums, microbatches = self.accumulate(step, feed)
        self.scaler.unscale_(self.optimizer)
        norm = optim.gradient_norm(self.parameters)
        sums = torch.cat((distributed.all_sum(sums), norm.double()[None]))
        loss, correct, counted, stop, late, norm = sums.tolist()
        self.late = late > 0

        # fp16 ends at 65504: a gradient that the scaler made too large is left out and the scale
        # halved; at scale 1 there is nothing left to halve, and the gradient itself is at fault
        overflow = self.scaler.is_enabled() and not math.isfinite(norm) and self.scaler.get_scale() > 1
        if math.isfinite(loss) and (math.isfinite(norm) or overflow):
            optim.clip_gradients(self.parameters, norm, o.clip_grad)
            self.scaler.step(self.optimizer)  # after an overflow in fp16 it takes no step
            now.count(loss, correct, counted, step.items, overflow)
        else:
            self.refuse_step(explain_nonfinite(self.task, self.model, loss, microbatches))
        self.scaler.update()  # and halves the scale
        return stop > 0

    def accumulate(self, step: distributed.Step, feed: Feed) -> tuple[Tensor, list[tuple]]:
        """Adds up the gradients of a step's microbatches; returns its sums (5,), and each
        microbatch with its loss and counts, from which a loss that is not finite is explained."""
        sums = torch.zeros(5, dtype=torch.float64, device=self.device)
        seen = []
        for weight in step.weights:
            batch, copy = next(feed)
            with distributed.no_sync(self.loss, wait=len(seen) + 1 < len(step.weights)):
                with autocast(self.device, self.options.amp):
                    loss, stats = self.loss(copy)
                self.scaler.scale(loss * weight).backward()
            feed.ahead()
            seen.append((batch, loss.detach(), stats))
            if weight:
                sums[LOSS] += loss.detach() * (weight / distributed.world_size())
                sums[CORRECT] += stats["correct"]
                sums[COUNTED] += stats["count"]
        # `sums[STOP] = ...` would copy a number from the host, and wait
        sums[STOP].fill_(self.signals.signum is not None)
        sums[LATE].fill_(time.monotonic() >= self.deadline)
        return sums, seen

    def refuse_step(self, reason: str) -> None:
        """--nan-policy: stop ends the run; skip leaves the weights as they are and continues."""
        if self.options.nan_policy == "stop":
            raise RunError(f"{self.where()}: {reason}. Try a smaller --lr or --nan-policy skip")
        self.state.skipped += 1
        self.progress.log(f"skipped step {self.state.step + 1}: {reason}")

    def end_epoch(self, whole: bool) -> None:
        """Validates, keeps the best epoch's weights, writes the epoch's line and a checkpoint."""
        now = self.state
        if now.sums[3] and not now.sums[2]:
            raise UserError(f"epoch {now.epoch + 1}: none of {now.sums[3]:.0f} {self.progress.unit} {UNREADABLE}")
        distributed.broadcast_buffers(self.model)
        self.save_checkpoint()  # who is killed while it validates loses nothing of the epoch
        if asked := [signum for signum in distributed.gather_objects(self.signals.signum) if signum]:
            raise Interrupted(asked[0])
        self.model.eval()
        with torch.no_grad(), autocast(self.device, self.options.amp):
            scores = distributed.gather_objects(self.task.evaluate(self.model))[0]
        if not math.isfinite(scores["loss"]) and self.options.nan_policy == "stop":
            raise RunError(f"{self.where()}: the validation loss is {scores['loss']}; try a smaller --lr")
        with self.signals.held():
            row = self.progress.epoch_row(now, scores)
            now.history.append(row)
            now.epoch, now.position, now.seconds, now.sums = now.epoch + 1, 0, 0.0, [0.0] * 4
            if self.options.sched == "plateau":
                now.plateau.update(scores["loss"])
            if state.better(row, now.best, self.task.metric):
                now.best = row
                self.best_tensors = {n: state.portable(t) for n, t in state.model_tensors(self.model).items()}
                self.save_best()
            if whole:
                self.save_checkpoint()
            self.progress.write_metrics(now.history)

    def where(self) -> str:
        """For messages: the step under way and what is safe."""
        kept = f"last checkpoint {self.saved}" if self.saved else "no checkpoint yet"
        return f"epoch {self.state.epoch + 1}, step {self.state.step + 1} ({kept})"

    def lr_factor(self) -> float:
        """What every group's own rate is multiplied by in this step, between 0 and 1."""
        now, sched, total = self.state, self.options.sched, self.total_steps
        warmup = round(self.options.warmup_ratio * total)
        return now.plateau.factor * optim.schedule_factor(sched, now.step, total, warmup)

    def put_away(self, stop: Interrupted | LostWorker) -> None:
        """A run that is stopped keeps what it has learned, and says where."""
        if self.between and self.state.step:
            self.save_checkpoint()
        if isinstance(stop, LostWorker):
            raise RunError(f"{self.where()}: {stop}") from None
        self.progress.log(f"stopped by signal {stop.signum} after step {self.state.step}; checkpoint {self.saved}")

    def save_best(self) -> None:
        """The weights now in the model become the run's result: an adapter, or all of
        them in mode "full"."""
        state.refuse_nonfinite(state.model_tensors(self.model), "the result")
        if not distributed.is_main():
            return
        if self.task.mode == "full":
            tensors = {name: state.portable(t) for name, t in self.model.state_dict().items()}
            write_safetensors(self.run_dir / "model.safetensors", tensors)
        else:
            save_adapter(self.model, self.run_dir)

    def save_checkpoint(self) -> None:
        """All that changes while training; once per step, and once more with its score."""
        now, path = self.state, checkpoint.directory_of(self.run_dir, self.state.step)
        if self.kept == (now.step, now.epoch):
            return
        tensors, values = state.pack(now, self.model, self.optimizer, self.scaler, self.best_tensors)
        values["data"] = self.listing
        if distributed.is_main():
            checkpoint.save_checkpoint(self.run_dir, tensors, values, self.options.keep_checkpoints)
        self.saved, self.kept = path, (now.step, now.epoch)

    def load_checkpoint(self) -> None:
        """Resumes where options.resume says; in a fresh run directory there is nothing to do."""
        self.saved = checkpoint.choose(self.run_dir, self.options.resume, self.progress.log)
        if self.saved is None:
            return
        tensors, values = checkpoint.load_checkpoint(self.saved)
        parts = (self.model, self.optimizer, self.scaler)
        self.state, self.best_tensors = state.unpack(tensors, values, *parts, where=str(self.saved))
        if self.saved == checkpoint.directory_of(self.run_dir, self.state.step):
            self.kept = self.state.step, self.state.epoch
        self.progress.write_metrics(self.state.history)
        self.progress.log(resumed_line(self))
        if change := state.changed_data(values.get("data"), self.listing):
            self.progress.log(change)
