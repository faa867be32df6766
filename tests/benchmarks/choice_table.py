"""The bundled clip-nano on the generated questions: zero-shot, each mode, and what the words alone give away.

    python -m tests.benchmarks.choice_table --save                    # 3 seeds, about ten minutes on two cores
    python -m tests.benchmarks.choice_table --rows zero-shot lora --seeds 0
    python -m tests.benchmarks.choice_table --sharing                 # a shared prefix beside the plain way, in time

Every row is `python train.py --task choice --mode MODE --seed SEED` with the accuracy of its best epoch on the test
questions; "text only" trains like lora on the same questions about a grey picture. Finished runs are kept in
results/choice_table.runs.json and not made again.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import minilora.tasks.choice.task as choice
from minilora.inject import count_parameters
from minilora.settings.parse import parse_args
from minilora.tasks import build_task
from minilora.training.trainer import Trainer, TrainOptions
from tests.benchmarks.common import RESULTS, interleaved, parser, prepare, ratio, report, told
from train import train_options

ROWS = ("zero-shot", "text only", "linear", "lora", "full")


def build(row: str, seed: int, *words: str) -> choice.Choice:
    mode = row if row in ("linear", "lora", "full") else "lora"
    config, _ = parse_args(["--task", "choice", "--mode", mode, "--seed", str(seed), "--device", "cpu", *words])
    task = build_task(config)
    if row == "text only":
        grey = Image.new("RGB", (48, 48), (60, 60, 60))
        for data in task.data.values():
            data.split.pictures.load = lambda i: grey
    return task


def run(row: str, seed: int) -> dict:
    """{"accuracy": on the test questions in percent, "seconds": of training, "trainable": parameters}."""
    task = build(row, seed)
    if row == "zero-shot":
        return {"accuracy": 100 * task.test(task.model)["accuracy"], "seconds": 0.0, "trainable": 0}
    options: TrainOptions = train_options(task.config, "fp32", None)
    options.log_interval = 0
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(task, options, Path(folder), "cpu").fit()
    accuracy = 100 * task.test(task.model)["accuracy"]
    return {"accuracy": accuracy, "seconds": result["seconds"], "trainable": count_parameters(task.model).trainable}


def table(done: dict[str, dict]) -> list[dict]:
    """One line per row of the table: mean and spread over the seeds."""
    lines = []
    for row in (row for row in ROWS if any(key.startswith(f"{row}/") for key in done)):
        runs = [value for key, value in done.items() if key.startswith(f"{row}/")]
        scores = np.array([one["accuracy"] for one in runs])
        spread = f" ± {scores.std(ddof=1):.1f}" if len(runs) > 1 else ""
        seconds = np.mean([one["seconds"] for one in runs])
        lines.append(
            {
                "row": row,
                "trainable": f"{runs[0]['trainable']:,}",
                "accuracy %": f"{scores.mean():.1f}{spread}",
                "seconds": f"{seconds:.0f}" if seconds else "-",
                "seeds": len(runs),
            }
        )
    return lines


def sharing(rounds: int) -> list[dict]:
    """A training step with the common beginning of the choices encoded once, and with every sentence by itself."""
    task = build("lora", 0)
    batch = next(iter(task.train_loader(0, task.train_batches(0))))

    def step(shared: bool) -> None:
        choice.share_prefix = shared
        task.loss(task.model.train(), batch)[0].backward()

    times = interleaved({"plain": lambda: step(False), "shared": lambda: step(True)}, rounds)
    choice.share_prefix = None
    tokens = batch["input_ids"][0].numel()
    return [
        {
            "batch": f"32 x 4 sentences, {tokens // 4} tokens",
            "plain / shared": told(ratio(times["plain"], times["shared"])),
        }
    ]


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--sharing", action="store_true", help="only the time of the shared prefix")
    arguments = flags.parse_args()
    header = prepare(arguments)
    if arguments.sharing:
        report("choice_sharing", header, sharing(rounds=15), arguments.save)
        return
    path = RESULTS / "choice_table.runs.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    for seed in arguments.seeds:
        for row in arguments.rows:
            key = f"{row}/{seed}"
            if key not in done:
                start = time.perf_counter()
                done[key] = run(row, seed)
                print(key, done[key], f"{time.perf_counter() - start:.0f} s", flush=True)
                if arguments.save:
                    RESULTS.mkdir(exist_ok=True)
                    path.write_text(json.dumps(done, indent=1) + "\n")
    report("choice_table", header, table(done), arguments.save)


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    main()
