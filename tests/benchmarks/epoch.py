"""VQA epochs: one picture per question, grouped by picture, and with cached features; shards beside picture files.

    python -m tests.benchmarks.epoch                        ViT-tiny/16-224 + BERT-tiny sizes, random weights
    python -m tests.benchmarks.epoch --vision vit-base-patch16-224 --text bert-base --pictures 6

The data have VQA v2's shape: 5.3 questions per picture, about 8 tokens each, every text different. All variants take
turns in one process; medians over the rounds, and ratios to the first.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minilora.data.generated.sentences import Sentences
from minilora.data.pictures.loader import in_order
from minilora.data.questions.vqa2 import read_vqa2
from minilora.data.questions.vqa_batches import Texts, VQADataset, vqa_loader
from minilora.data.shards.questions import read_shards, write_shards
from minilora.settings.flags import Config
from minilora.tasks import build_task
from minilora.tasks.vqa.task import VQA
from reference_models.load import bundled_weights
from tests.support.vqa_data import write_json

PER_PICTURE = 5.3


def make_data(root: Path, pictures: int, size: int = 320) -> Path:
    """train and val in VQA v2's shape, with noisy JPEG pictures."""
    sentences, number = Sentences(1), 0
    for part, count in (("train", pictures), ("val", 2)):
        (root / part).mkdir(parents=True)
        questions, annotations = [], []
        for i in range(count):
            coarse = np.random.default_rng(i).integers(0, 255, (16, 16, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize((size, size)).save(root / part / f"{i:012d}.jpg")
            for _ in range(round(PER_PICTURE * (i + 1)) - round(PER_PICTURE * i)):
                text = f"{sentences[number]} {number}"
                questions.append({"question_id": number, "image_id": i, "question": text})
                annotations.append({"question_id": number, "multiple_choice_answer": f"answer {number % 10}"})
                number += 1
        write_json(root / f"{part}_questions.json", "questions", questions)
        write_json(root / f"{part}_annotations.json", "annotations", annotations)
    return root


def one_each(batch: dict) -> dict:
    """The batch as it is without sharing: a picture and a text for every question."""
    rows = torch.arange(len(batch["index"]))
    return batch | {
        "image": batch["image"][batch["image_index"]],
        "image_index": rows,
        **{key: batch[key][batch["text_index"]] for key in ("input_ids", "attention_mask")},
        "text_index": rows,
    }


def epoch(task: VQA, change: Callable[[dict], dict] = lambda batch: batch) -> float:
    """Seconds of one epoch of training."""
    trained = [p for p in task.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-4)
    task.model.train()
    start = time.perf_counter()
    for batch in task.train_loader(0, task.train_batches(0)):
        optimizer.zero_grad(set_to_none=True)
        task.loss(task.model, change(batch))[0].backward()
        optimizer.step()
    return time.perf_counter() - start


def compare(variants: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median seconds of each variant; every round runs all of them in turn, the first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds + 1):
        for name, run in variants.items():
            times[name].append(run())
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def show(title: str, seconds: dict[str, float]) -> None:
    first = next(iter(seconds.values()))
    print(title)
    for name, value in seconds.items():
        print(f"  {name:<34} {value:8.3f} s   {value / first:5.3f}")


def reading(folder: Path, task: VQA, shards: Path) -> dict[str, Callable[[], float]]:
    """Reading all training pictures, from files and from shards, nothing kept in memory."""
    preprocess = task.preprocess

    def tokens(part):
        texts = Texts(part.questions, task.tokenizer, task.limit)
        return [texts.ids[row] for row in texts.row]

    parts = read_vqa2(folder)
    write_shards(shards, parts, preprocess, tokens, {"max_length": task.limit}, log=lambda line: None)
    sources = {"picture files": parts["train"], "shards": read_shards(shards)[0]["train"]}

    def read(part) -> float:
        texts = Texts(part.questions, task.tokenizer, task.limit)
        data = VQADataset(part, texts, np.zeros(len(part.questions), np.int64), preprocess)
        data.pictures.room = 0
        start = time.perf_counter()
        for _ in vqa_loader(data, in_order(len(data), 32), None):
            pass
        return time.perf_counter() - start

    return {name: lambda part=part: read(part) for name, part in sources.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vision", default="vit-tiny-patch16-224")
    parser.add_argument("--text", default="bert-tiny")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_data(Path(temporary) / "data", options.pictures)
        common = {
            "task": "vqa",
            "fusion": "product",
            "data_dir": str(folder),
            "model": {"vision": options.vision, "text": options.text},
            "weights": "none",
            "tokenizer": str(bundled_weights("bert-nano")),
            "batch_size": options.batch_size,
            "device": "cpu",
        }
        lora = {grouped: build_task(Config(**common, group_by_image=grouped)) for grouped in (False, True)}
        linear = {
            cached: build_task(Config(**common, mode="linear", cache_features=cached)) for cached in (False, True)
        }
        questions = len(lora[True].data["train"])
        print(
            f"{options.vision} + {options.text}, {questions} questions on {options.pictures} pictures, batch "
            f"{options.batch_size}, {options.threads} threads, torch {torch.__version__}, {platform.machine()}"
        )
        variants = {
            "LoRA, one picture per question": lambda: epoch(lora[False], one_each),
            "LoRA, --group-by-image": lambda: epoch(lora[True]),
            "linear, one picture per question": lambda: epoch(linear[False], one_each),
            "linear, --cache-features, 2nd epoch": lambda: epoch(linear[True]),
        }
        show("an epoch of training", compare(variants, options.rounds))
        show("reading an epoch", compare(reading(folder, lora[True], Path(temporary) / "shards"), options.rounds))


if __name__ == "__main__":
    main()
