"""DeiT-tiny and MiniLM made one CLIP, on real four-way questions (Visual7W): what the pictures add, what LoRA adds.

    python -m tests.benchmarks.visual7w_table --shared ../shared/data --save      # 3 rows, 3 seeds

The part that is quoted is laid out as test/ and scored once a run; the epoch is chosen on 10 % of the training
pictures. Rows: "question only" trains like lora on grey pictures; "projections" trains the two projections and the
scale on cached features; "lora" trains LoRA in both towers beside them. Differences are paired by question, the mean
over seeds first: "above" is said only of more than two standard errors. Finished runs are kept in
results/visual7w_table.runs.json and not made again.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from minilora.inject import count_parameters
from minilora.settings.parse import parse_args
from minilora.tasks import build_task
from minilora.tasks.precision import choose_amp, settle_precision
from minilora.training.device import autocast
from minilora.training.trainer import Trainer
from tests.benchmarks.common import RESULTS, parser, prepare
from train import train_options

ROWS = {"question only": "lora", "projections": "linear", "lora": "lora"}
PAIRS = (("lora", "question only"), ("lora", "projections"), ("projections", "question only"))
GREY = Image.new("RGB", (224, 224), (124, 116, 104))


def write_set(source: Path, root: Path) -> Path:
    """The set with its smaller part as test; val is held out of the training pictures."""
    content = json.loads((source / "dataset_v7w_telling.json").read_text(encoding="utf-8"))
    for record in content["images"]:
        record["split"] = {"val": "test"}.get(record["split"], record["split"])
    shutil.copytree(source / "images", root / "images")
    (root / "dataset_v7w_telling.json").write_text(json.dumps(content), encoding="utf-8")
    return root


def run(row: str, seed: int, data: Path, arguments) -> dict:
    """{"right": one 0 or 1 for each test question, "seconds": of training, "trainable", "epoch"}."""
    mode, weights = ROWS[row], arguments.shared / "weights"
    words = ["--task", "choice", "--mode", mode, "--seed", str(seed), "--data-dir", str(data), "--device", "cpu"]
    words += ["--model", "vision=vit-tiny-patch16-224", f"text={weights / 'minilm-l6'}", "--text-pooling", "mean"]
    words += ["--weights", f"vision={weights / 'deit_tiny_patch16_224.fp16.safetensors'}"]
    words += ["--image-size", str(arguments.image_size), "--max-length", "32", "--prompt", "{question} {choice}"]
    words += ["--workers", "0", "--smoothing", "0.1"]
    words += ["--epochs", str(arguments.epochs), "--lr", "1e-3", "--lora-r", "8"]
    if mode == "linear":
        words = [*words[:-6], "--epochs", "20", "--lr", "1e-3", "--cache-features"]
    config, _ = parse_args(words)
    device = __import__("torch").device("cpu")
    settle_precision(config, device)
    task = build_task(config)
    if row == "question only":
        for part in task.data.values():
            part.split.pictures.load = lambda i: GREY
    options = train_options(config, choose_amp(config, device), None)
    options.log_interval = 20
    with tempfile.TemporaryDirectory() as folder:
        result = Trainer(task, options, Path(folder), "cpu").fit()
    with autocast(device, task.amp):
        found = task.predictions(task.model.eval(), "test")
    right = (found.probabilities.argmax(1) == found.labels).astype(int).tolist()
    trainable = count_parameters(task.model).trainable
    facts = {"seconds": result["seconds"], "trainable": trainable, "epoch": result["best"]["epoch"]}
    return {"right": right, **facts, "precision": task.amp, "image_size": arguments.image_size}


def table(done: dict[str, dict]) -> str:
    """Mean and spread over seeds, then the paired differences."""
    right = {row: [np.array(v["right"]) for k, v in done.items() if k.startswith(f"{row}/")] for row in ROWS}
    lines = ["| row | trainable | accuracy % (seeds) | seconds of training |", "|---|---:|---:|---:|"]
    for row, runs in right.items():
        if not runs:
            continue
        each = [100 * one.mean() for one in runs]
        spread = f" ± {np.std(each, ddof=1):.2f}" if len(each) > 1 else ""
        facts = [v for k, v in done.items() if k.startswith(f"{row}/")]
        seconds = np.median([v["seconds"] for v in facts])  # one busy hour should not count
        lines.append(
            f"| {row} | {facts[0]['trainable']:,} | {np.mean(each):.2f}{spread} ({len(each)}) | {seconds:.0f} |"
        )
    lines += ["", "| difference | points | standard error | |", "|---|---:|---:|---|"]
    for first, second in PAIRS:
        if right[first] and right[second]:
            gain = np.mean(right[first], axis=0) - np.mean(right[second], axis=0)  # of each question
            mean, error = 100 * gain.mean(), 100 * gain.std(ddof=1) / len(gain) ** 0.5
            verdict = "above" if mean > 2 * error else "below" if mean < -2 * error else "not shown"
            lines.append(f"| {first} - {second} | {mean:+.2f} | {error:.2f} | {verdict} |")
    return "\n".join(lines)


def main() -> None:
    flags = parser(__doc__.partition("\n")[0])
    flags.add_argument("--shared", type=Path, required=True, help="the folder with visual7w and weights")
    flags.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    flags.add_argument("--epochs", type=int, default=4)
    flags.add_argument("--image-size", type=int, default=224)
    arguments = flags.parse_args()
    header = prepare(arguments)
    file = RESULTS / "visual7w_table.runs.json"
    done = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_set(arguments.shared.resolve() / "visual7w", Path(folder) / "visual7w")
        for key in [(row, seed) for seed in arguments.seeds for row in arguments.rows]:
            name = "{}/{}".format(*key)
            if name not in done:
                done[name] = run(*key, data, arguments)
                file.write_text(json.dumps(done))
                print(name, f"{100 * np.mean(done[name]['right']):.2f} %", f"{done[name]['seconds']:.0f} s", flush=True)
    text = f"# Visual7W, DeiT-tiny and MiniLM\n\n{header}\n\n{table(done)}\n"
    print(text)
    if arguments.save:
        (RESULTS / "visual7w_table.md").write_text(text)


if __name__ == "__main__":
    main()
