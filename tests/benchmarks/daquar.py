"""DAQUAR, whole: LoRA on a 28 M model beside the published rows of models of 99 to 212 M, all of them trained.

    python -m tests.benchmarks.daquar                          # every row, about two hours on two cores
    python -m tests.benchmarks.daquar lora --seeds 0 1 2       # one row
    python -m tests.benchmarks.daquar --search                 # settings on val alone, nothing of test
    python -m tests.benchmarks.daquar --search --set easy_vqa  # the same heads on easy_vqa, pictures of 96 pixels
    python -m tests.benchmarks.daquar --reports                # MobileNetV2 teacher, student and pruning, ten answers

The protocol: the 2,494 questions that are quoted become `test`, which chooses nothing; a tenth of the training
pictures, with their questions, becomes `val`, the same for every seed and row, and chooses every setting and the epoch.
Most pictures of `test` have other questions in the training part, as in the split that the published rows have.
Every run is one train.py command, which is printed; a run that is there already is not made again.
"""

import argparse
import json
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from minilora.data.vqa_sets import load_vqa, question_only_guess
from minilora.report.vqa_metric import score_vqa
from minilora.settings.flags_evaluate import EvalConfig
from minilora.tasks import load_run
from tests.benchmarks.common import RESULTS, cpu_name, markdown
from tests.conftest import shared_folder

ROOT = Path(__file__).parents[2]
SOURCE = "github.com/tezansahu/VQA-With-Multimodal-Transformers, README, 5 epochs, all weights"
PUBLISHED = {  # text encoder, parameters: accuracy % with ViT, DeiT, BEiT
    "BERT, 197 M": (23.5, 24.6, 25.4),
    "RoBERTa, 212 M": (24.6, 24.2, 26.1),
    "ALBERT, 99 M": (21.5, 8.5, 16.2),
}
TEXT = "--target-modules text.q_proj text.v_proj text.fc1 text.fc2 --lora-r 8 --lora-alpha 16"
BOTH = "--target-modules text.q_proj text.v_proj text.fc1 text.fc2 vision.q_proj vision.v_proj"
HALF = "--lora-r text=8 vision=4 --lora-alpha text=16 vision=8"  # half the rank for pictures: below 1.5 M
ROWS = {  # flags, seeds, whether the towers start from weights
    "linear": ("--mode linear --cache-features --lr 1e-3 --epochs 10", (0, 1, 2), True),
    # the text's vector from a pooler that was never trained for it
    "linear-pooler": ("--mode linear --cache-features --text-pooling pooler --lr 1e-3 --epochs 10", (0,), True),
    "lora": (f"--cache-features {TEXT} --lr 1e-3 --epochs 8", (0, 1, 2), True),
    "lora-both": (f"--group-by-image {BOTH} --lora-r 8 --lr 1e-3 --epochs 8", (0, 1, 2), True),
    "lora-both-4": (f"--group-by-image {BOTH} {HALF} --lr 1e-3 --epochs 8", (0, 1, 2), True),
    "full": ("--mode full --group-by-image --lr 1e-4 --head-lr 1e-3 --epochs 5", (0,), True),
    "scratch": ("--mode full --group-by-image --lr 3e-4 --epochs 5 --amp bf16", (0,), False),
}
# what each change gives, one at a time from version 0.1's head to today's, then the rates of the text tower and
# of the head, and batches of one picture's questions; val alone
SEARCH = {
    "product, pooler": "--fusion product --text-pooling pooler --lr 5e-3",
    "concat, pooler": "--fusion concat --text-pooling pooler --lr 3e-3",
    "concat-product, pooler": "--fusion concat-product --text-pooling pooler --lr 1e-3",
    "product, mean": "--fusion product --text-pooling mean --lr 5e-3",
    "concat, mean": "--fusion concat --text-pooling mean --lr 3e-3",
    "concat-product, mean": "--fusion concat-product --text-pooling mean --lr 1e-3",
    "concat-product, mean, smoothing": "--fusion concat-product --text-pooling mean --lr 1e-3 --smoothing 0.1",
    "concat-product, mean, decay": "--fusion concat-product --text-pooling mean --lr 1e-3 --weight-decay 0.1",
    "lora": f"{TEXT} --lr 1e-3",
    "lora, head 3 times as fast": f"{TEXT} --lr 1e-3 --head-lr 3e-3",
    "lora, text tower 3 times as fast": f"{TEXT} --lr 3e-3 --head-lr 1e-3",
    "lora, text tower 3 times as slow": f"{TEXT} --lr 3e-4 --head-lr 1e-3",
    "lora, grouped": f"{TEXT} --lr 1e-3 --group-by-image",
}
REPORT = "--num-answers 10 --max-length 100 --batch-size 64 --opt adam --lr 1e-3 --sched constant --warmup-ratio 0 "
REPORT += "--weight-decay 0 --epochs 10 --fusion product"


def lay_out(source: Path, folder: Path, share: float = 0.1) -> Path:
    """train, val (held out by picture) and test (the quoted questions) in one folder."""
    if (folder / "test_annotations.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    files = {(p, k): json.loads((source / f"{p}_{k}.json").read_text())[k]
             for p in ("train", "val") for k in ("questions", "annotations")}  # fmt: skip
    pictures = sorted({row["image_id"] for row in files["train", "questions"]})
    held = set(np.random.default_rng(0).permutation(pictures)[: round(share * len(pictures))].tolist())
    in_val = {row["question_id"] for row in files["train", "questions"] if row["image_id"] in held}
    for part, pictures_of in (("train", "train"), ("val", "train"), ("test", "val")):
        shutil.copytree(source / pictures_of, folder / part, dirs_exist_ok=True)
        for kind in ("questions", "annotations"):
            rows = files[pictures_of, kind]
            if part != "test":
                rows = [row for row in rows if (row["question_id"] in in_val) == (part == "val")]
            (folder / f"{part}_{kind}.json").write_text(json.dumps({kind: rows}))
    return folder


def only_frequent(data: Path, folder: Path, answers: int) -> Path:
    """The questions of every part whose answer is among the training part's most frequent ones, as in report R5."""
    kept: list[str] = []
    for part in ("train", "val", "test"):
        shutil.copytree(data / part, folder / part, dirs_exist_ok=True)
        names = {kind: f"{part}_{kind}.json" for kind in ("questions", "annotations")}
        read = {kind: json.loads((data / name).read_text())[kind] for kind, name in names.items()}
        said = {row["question_id"]: row["answers"][0]["answer"] for row in read["annotations"]}
        kept = kept or [answer for answer, _ in Counter(said.values()).most_common(answers)]
        for kind, rows in read.items():
            rows = [row for row in rows if said[row["question_id"]] in kept]
            (folder / names[kind]).write_text(json.dumps({kind: rows}))
    return folder


def towers(pretrained: bool = True) -> list[str]:
    weights = shared_folder() / "weights"
    deit, minilm = weights / "deit_tiny_patch16_224.fp16.safetensors", weights / "minilm-l6"
    words = ["--model", "vision=vit-tiny-patch16-224", f"text={minilm}", "--text-pooling", "mean"]
    words += ["--tokenizer", str(minilm), "--batch-size", "64", "--amp", "fp32"]
    return words + ["--weights", *([f"vision={deit}", f"text={minilm}"] if pretrained else ["none"])]


def train(words: list[str], data: Path, run: Path) -> Path:
    """One run; its seconds with everything (encoding, validation, report) stand in seconds.json."""
    if not (run / "seconds.json").is_file():
        command = ["train.py", "--task", "vqa", *words, "--data-dir", str(data), "--output", str(run)]
        print("python", shlex.join(command), flush=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (run / "seconds.json").write_text(json.dumps(time.perf_counter() - started))
    return run


def tested(run: Path) -> dict[str, float]:
    """The one score on test, in percent: accuracy, weighted F1, and with every picture grey."""
    kept = run / "test.json"
    if not kept.is_file():
        found = load_run(run).evaluate(EvalConfig(device="cpu", split="test"))
        grey = next(score for name, score in found.vqa["question_only"].items() if "grey" in name)
        scores = {"accuracy": 100 * found.scores["accuracy"], "F1": 100 * found.scores["f1"], "grey": grey}
        kept.write_text(json.dumps(scores))
    return json.loads(kept.read_text())


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def row(name: str, runs: list[Path]) -> dict:
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    scores = [tested(run) for run in runs]
    seconds = [json.loads((run / "seconds.json").read_text()) for run in runs]
    return {
        "mode": name,
        "trained": f"{summaries[0]['parameters']['trainable']:,}",
        "seeds": len(runs),
        "val %": spread([100 * one["best"]["accuracy"] for one in summaries]),
        **{f"test {key} %".replace(" accuracy", ""): spread([one[key] for one in scores]) for key in scores[0]},
        "seconds": f"{statistics.mean(seconds):.0f}",
        "peak MiB": f"{max(one['peak_memory_mb'] for one in summaries):.0f}",
    }


def question_only(data: Path) -> dict:
    splits = load_vqa(data)
    scores = []
    for part in (splits.val, splits.test):
        guess = question_only_guess(splits.train.questions, part.questions)
        scores.append(score_vqa(guess, [question.annotation() for question in part.questions])["overall"])
    empty = dict.fromkeys(("test F1 %", "test grey %", "seconds", "peak MiB"), "")
    shown = {"mode": "question only: most frequent answer", "trained": "0", "seeds": ""}
    return shown | {"val %": f"{scores[0]:.2f}", "test %": f"{scores[1]:.2f}"} | empty


def table(options, data: Path) -> None:
    rows = [question_only(data)]
    for name in options.rows or ROWS:
        flags, seeds, pretrained = ROWS[name]
        words = [*towers(pretrained), *shlex.split(flags)]
        runs = [
            train([*words, "--seed", str(seed)], data, options.output / f"{name}-{seed}")
            for seed in options.seeds or seeds
        ]
        rows.append(row(name, runs))
    published = [
        {
            "text encoder, parameters": name,
            **{f"with {kind} %": x for kind, x in zip(("ViT", "DeiT", "BEiT"), accuracy, strict=True)},
        }
        for name, accuracy in PUBLISHED.items()
    ]
    text = f"DeiT-tiny + MiniLM-L6, 28 M; {cpu_name()}. WUPS is not computed.\n\n{markdown(rows)}\n\n"
    text += f"Published on the same questions ({SOURCE}):\n\n{markdown(published)}\n"
    print(text)
    if options.save:
        (RESULTS / "daquar.md").write_text(text)
        (RESULTS / "daquar.json").write_text(json.dumps({"rows": rows, "published": PUBLISHED}, indent=1) + "\n")


def search(options, data: Path) -> None:
    """Settings of the linear mode, then of LoRA in the text tower, on val; test is not looked at."""
    rows, size = [], "" if options.set == "daquar" else "--image-size 96"
    for name, flags in SEARCH.items():
        linear = f"--mode linear --epochs 10 {flags}"
        lora = f"{flags} --epochs {8 if options.set == 'daquar' else 3}"
        words = [*towers(), *shlex.split(f"{lora if name.startswith('lora') else linear} --cache-features {size}")]
        run = train(words, data, options.output / f"search-{options.set}-{name.replace(', ', '-').replace(' ', '-')}")
        best = json.loads((run / "summary.json").read_text())["best"]
        rows.append({"head": name, "val %": f"{100 * best['accuracy']:.2f}", "epoch": best["epoch"]})
    print(markdown(rows))
    if options.save:
        (RESULTS / f"{options.set}_search.md").write_text(markdown(rows) + "\n")


def reports(options, data: Path) -> None:
    """R5 with real towers: teacher, student alone and taught, and the teacher pruned in both scopes."""
    data, weights = only_frequent(data, options.output / "ten-answers", 10), shared_folder() / "weights"
    minilm, teacher = weights / "minilm-l6", options.output / "teacher"
    words = ["--model", "vision=mobilenet-v2", f"text={minilm}", *shlex.split(REPORT), "--text-pooling", "mean"]
    words += ["--weights", f"vision={weights / 'mobilenet_v2_features.safetensors'}", f"text={minilm}"]
    train([*words, "--mode", "linear", "--cache-features"], data, teacher)
    student = ["--model", "student", "--mode", "full", "--tokenizer", str(minilm), *shlex.split(REPORT)]
    runs = {"teacher": teacher, "student": train(student, data, options.output / "student")}
    for name, more in {
        "student, T 15": (),
        "student, T 3, T^2": ("--distill-t2", "--distill-temperature", "3"),
    }.items():
        taught = [*student, "--teacher", str(teacher), *more]
        runs[name] = train(taught, data, options.output / name.replace(", ", "-").replace(" ", ""))
    text = markdown([row(name, [run]) for name, run in runs.items()]) + "\n"
    for scope in ("conv", "backbone"):
        words = f"--split test --prune 0.8 --prune-epochs 2 --prune-scope {scope}".split()
        command = [sys.executable, "evaluate.py", str(teacher), *words]
        text += "\n" + subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    print(text)
    if options.save:
        (RESULTS / "daquar_reports.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="rows of the table; without any, all")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of each row's own")
    parser.add_argument("--search", action="store_true", help="the head's settings on val")
    parser.add_argument("--set", default="daquar", choices=("daquar", "easy_vqa"), help="what --search learns from")
    parser.add_argument("--reports", action="store_true", help="MobileNetV2 teacher and student, ten answers")
    parser.add_argument("--output", type=Path, default=Path(tempfile.gettempdir()) / "minilora-daquar")
    parser.add_argument("--save", action="store_true", help="write the tables into tests/benchmarks/results")
    options = parser.parse_args()
    options.output = options.output.resolve()
    data = lay_out(shared_folder() / options.set, options.output / ("data" if options.set == "daquar" else options.set))
    (search if options.search else reports if options.reports else table)(options, data)


if __name__ == "__main__":
    main()
