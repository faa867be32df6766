"""Fine-tune an encoder: flags -> Config -> task -> Trainer -> run directory.

python train.py                                          LoRA on generated shapes, within a minute
python train.py --data-dir photos --model vit-tiny-patch16-224 --weights deit_tiny.safetensors
python train.py --recipe imagewoof-vit-tiny --data-dir imagewoof2
python train.py --resume runs/classify-lora-000          resume a run that was stopped
torchrun --nproc-per-node 2 train.py --data-dir photos   two processes
"""

# ruff: noqa: E402
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from minilora.settings import exit_codes as cli
from minilora.settings.parse import parse_args, train_parser
from minilora.speed.threads import set_threads, settle_waiting

settle_waiting()  # before torch is loaded
if __name__ == "__main__":
    cli.begin(train_parser().read)  # what follows takes seconds to import

import torch

from minilora.commands import results
from minilora.commands.dryrun import describe_plan
from minilora.commands.listing import print_lists
from minilora.commands.seeds import train_all
from minilora.errors import UserError
from minilora.inject import count_parameters
from minilora.settings.flags import Config
from minilora.signals import Interrupted
from minilora.tasks import lock
from minilora.tasks.load import build_task
from minilora.tasks.precision import choose_amp, settle_precision
from minilora.tasks.rundir import continued, open_run_dir
from minilora.tasks.runfiles import ended, read_summary
from minilora.tasks.task import Task
from minilora.textfiles import printable
from minilora.training import distributed
from minilora.training.board import check_available
from minilora.training.device import choose_device, set_deterministic
from minilora.training.trainer import Trainer, TrainOptions
from reference_models import ModelError


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(argv)
    if print_lists(args):
        return 0
    if config.seeds and not config.dry_run:
        return train_all(config)
    config, checkpoint = continued(config)
    set_threads(config.threads)
    set_deterministic(config.deterministic)
    device = distributed.start(choose_device(config.device))
    try:
        return train(config, checkpoint, device)
    finally:
        distributed.stop()


def train(config: Config, checkpoint: Path | None, device: torch.device) -> int:
    """A whole run: model and data, training, the files that remain, and what to type next."""
    settle_precision(config, device)
    if config.log_to == "tensorboard":
        check_available()
    task = build_task(config, device)
    options = train_options(config, choose_amp(config, device), checkpoint)
    if config.dry_run:
        print(*describe_plan(task, options, device), sep="\n")
        return 0
    try:
        # rank 0 opens the directory, and everybody learns its name
        opened = prepare(task, checkpoint) if distributed.is_main() else None
        run_dir = Path(distributed.gather_objects(opened)[0])
        return run(task, Trainer(task, options, run_dir, device))
    finally:
        lock.release()


def run(task: Task, trainer: Trainer) -> int:
    """What happens in the run directory."""
    config, options, device, run_dir = task.config, trainer.options, trainer.device, trainer.run_dir
    try:
        for line in (*task.data_lines(), *task.picture_lines(), str(count_parameters(task.model))):
            trainer.progress.log(line)
        trainer.progress.log(results.method_line(config, options, device))
        if zero_shot := task.zero_shot():
            trainer.progress.log(results.zero_shot_line(task, zero_shot))
        result = trainer.fit()
        if trainer.cut_short:
            trainer.progress.log(f"resume with: {results.resume_command(run_dir)}")
        test = task.test(task.model, result["best"])
        for line in filter(None, (results.result_line(task, result, test), results.unlearned_line(task, result))):
            trainer.progress.log(line)
        if distributed.is_main():
            results.write_results(task, run_dir, result | {"zero_shot": zero_shot}, test, device)
            print(*map(printable, results.next_commands(run_dir, config)), sep="\n")
    except Interrupted:
        trainer.progress.log(f"go on with: {results.resume_command(run_dir)}")
        raise
    return 0


def prepare(task: Task, checkpoint: Path | None) -> str:
    """Opens the run directory and writes what is known before training."""
    run_dir = open_run_dir(task.config, task.base, task.labels)
    try:
        over = ended(task.config, read_summary(run_dir)) and not task.config.longer
    except UserError:  # a damaged summary is written anew
        over = False
    if checkpoint or not over:
        (run_dir / "summary.json").unlink(missing_ok=True)  # it tells of an end that is none
    task.write_files(run_dir)
    return str(run_dir)


def train_options(config: Config, amp: str, checkpoint: Path | None) -> TrainOptions:
    """The flags that the Trainer has too, and where to resume from."""
    shared = {f.name for f in fields(TrainOptions)} & {f.name for f in fields(Config)}
    values = {name: getattr(config, name) for name in shared} | {"amp": amp}
    if checkpoint:
        values["resume"] = str(checkpoint)
    return TrainOptions(**values)


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
