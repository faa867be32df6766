"""Fine-tune an encoder: flags -> Config -> task -> Trainer -> run directory.

python train.py                                              LoRA on generated shapes, a minute on two cores
python train.py --data-dir photos --model vit-tiny-patch16-224 --weights deit_tiny.safetensors
python train.py --recipe imagewoof-vit-tiny --data-dir imagewoof2
python train.py --task vqa                                   questions about pictures
torchrun --nproc-per-node 2 train.py --data-dir photos       two processes
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from minilora import cli
from minilora.config import parse_args
from minilora.errors import UserError
from minilora.flags import Config
from minilora.inject import count_parameters
from minilora.rundir import continued, open_run_dir
from minilora.tasks import build_task
from minilora.tasks.base import choose_amp, choose_device
from minilora.tasks.dryrun import describe_plan
from minilora.tasks.listing import print_lists
from minilora.tasks.results import write_results
from minilora.training import distributed
from minilora.training.trainer import Trainer, TrainOptions
from reference_models import ModelError


def main(argv: Sequence[str] | None = None) -> int:
    config, args = parse_args(argv)
    if print_lists(args):
        return 0
    config, checkpoint = continued(config)
    device = distributed.start(choose_device(config.device))
    try:
        return train(config, checkpoint, device)
    finally:
        distributed.stop()


def train(config: Config, checkpoint: Path | None, device) -> int:
    """The whole of a run: model and data, training, the files that remain, and what to type next."""
    task = build_task(config, device)
    options = train_options(task.config, choose_amp(config, device), checkpoint)
    if config.dry_run:
        say(*describe_plan(task, options, device))
        return 0
    run_dir = Path(distributed.gather_objects(prepare(task) if distributed.is_main() else None)[0])
    trainer = Trainer(task, options, run_dir, device)
    say(*task.data_lines(), str(count_parameters(task.model)), method_line(config, options, device))
    result = trainer.fit()
    test = task.test(task.model)
    if distributed.is_main():
        write_results(task, run_dir, result, test, device)
        say(result_line(result, test, task.metric), *next_commands(run_dir, config))
    return 0


def prepare(task) -> str:
    """Opens the run directory and writes what is known before training."""
    run_dir = open_run_dir(task.config, task.base)
    task.write_files(run_dir)
    return str(run_dir)


def train_options(config: Config, amp: str, checkpoint: Path | None) -> TrainOptions:
    """The flags that the Trainer has too; and where to resume from."""
    names = {f.name for f in fields(TrainOptions)} & {f.name for f in fields(Config)}
    values = {name: getattr(config, name) for name in names}
    return TrainOptions(**values | {"amp": amp, "resume": str(checkpoint) if checkpoint else config.resume})


def method_line(config: Config, options: TrainOptions, device) -> str:
    line = f"mode {config.mode}: {config.opt} lr {config.lr:g} {config.sched}, batch {config.batch_size}"
    line += f" x {config.grad_accum_steps}" * (config.grad_accum_steps > 1)
    return f"{line}, {config.epochs} epochs, {options.amp} on {device}"


def result_line(result: dict, test: dict | None, metric: str) -> str:
    line = f"result: {metric} {result['best'][metric]:.4f} (epoch {result['best']['epoch']})"
    line += f", test {test[metric]:.4f}" if test else ""
    return f"{line}, {result['seconds']:.1f} s, peak {result['peak_memory_mb']:.0f} MiB"


def next_commands(run_dir: Path, config: Config) -> list[str]:
    image = "" if config.task == "classify" else ' --question "..."'
    return [
        f"run directory: {run_dir}",
        "next:",
        f"  python evaluate.py {run_dir} --report report.html",
        f"  python evaluate.py {run_dir} --image PICTURE{image}",
        f"  python evaluate.py {run_dir} --merge-to merged --layout transformers",
    ]


def say(*lines: str) -> None:
    """Prints, in one process of several."""
    if distributed.is_main():
        print(*lines, sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(cli.run(main, (UserError, ModelError)))
