"""What a teacher gives where no labels are: 100 labelled items, the rest of the training part without labels.

    python -m tests.benchmarks.unlabelled cifar --save            # CIFAR-10 photos, a nano ViT from random weights
    python -m tests.benchmarks.unlabelled easy_vqa --save         # questions, the student of report R5 in small
    python -m tests.benchmarks.unlabelled cifar --search          # the settings, on val and a seed of its own

Everybody sees the same 100 labels, the teacher too: LoRA on pretrained encoders, trained on the labelled items
alone. The student starts from random weights: alone, with the teacher on the labelled items, and with the teacher on
all training items. A part of the training items, the same for every seed and row, is `val`: it chooses the settings
(with a seed that is not reported) and the epoch. `test` is the set's own validation part, scored once.
"""

import json
import shutil
import statistics
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks.common import parser, prepare, report
from tests.conftest import shared_folder
from tests.support.cli_data import program

CHOOSING_SEED = 100
LABELLED = 100
main_of_train = program("train").main


def weights() -> Path:
    return shared_folder() / "weights"


def photos(folder: Path) -> Path:
    """train/ (100 of each of ten classes), val/ (20) and test/ (50) of CIFAR-10's photos."""
    source = shared_folder() / "cifar10_jpg"
    for classes in () if folder.is_dir() else sorted((source / "train").iterdir()):
        files = sorted(classes.iterdir())
        held = set(np.random.default_rng(0).permutation(len(files))[:20].tolist())
        for i, file in enumerate(files):
            copy(file, folder / ("val" if i in held else "train") / classes.name)
        for file in sorted((source / "val" / classes.name).iterdir()):
            copy(file, folder / "test" / classes.name)
    return folder


def questions(folder: Path) -> Path:
    """easy-VQA: train (1,900 pictures), val (100 pictures of its training part), test (500 pictures)."""
    source = shared_folder() / "easy_vqa"
    if folder.is_dir():
        return folder
    rows = {(part, kind): json.loads((source / f"{part}_{kind}.json").read_text())[kind]
            for part in ("train", "val") for kind in ("questions", "annotations")}  # fmt: skip
    pictures = sorted({row["image_id"] for row in rows["train", "questions"]})
    held = set(np.random.default_rng(0).permutation(pictures)[:100].tolist())
    for part, origin in (("train", "train"), ("val", "train"), ("test", "val")):
        shutil.copytree(source / origin, folder / part)
        for kind in ("questions", "annotations"):
            mine = [row for row in rows[origin, kind] if part == "test" or (row["image_id"] in held) == (part == "val")]
            (folder / f"{part}_{kind}.json").write_text(json.dumps({kind: mine}))
    return folder


def some_questions(whole: Path, folder: Path, seed: int) -> Path:
    """`whole` with LABELLED training questions, drawn by the seed; val and test as they are."""
    if not folder.is_dir():
        shutil.copytree(whole, folder)
        asked = json.loads((whole / "train_questions.json").read_text())["questions"]
        drawn = {asked[i]["question_id"] for i in np.random.default_rng(seed).permutation(len(asked))[:LABELLED]}
        for kind in ("questions", "annotations"):
            rows = json.loads((whole / f"train_{kind}.json").read_text())[kind]
            kept = [row for row in rows if row["question_id"] in drawn]
            (folder / f"train_{kind}.json").write_text(json.dumps({kind: kept}))
    return folder


def copy(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, folder / file.name)


T2 = "--distill-t2 --distill-temperature"


class Cifar:
    """Photos: 10 of each class are labelled, the other 900 are not."""

    name = "cifar10_jpg"
    deit = "--model vit-tiny-patch16-224 --lr 2e-3 --epochs 1 --steps-per-shot 4"
    student = "--model vit-nano-patch8-48 --weights none --mode full --lr 1e-3"
    rows = {
        "student alone": "--epochs 40",
        "teacher on the labelled": f"--epochs 40 --distill-alpha 0.5 {T2} 4",
        "teacher on all": f"--epochs 12 --distill-alpha 0.5 {T2} 4",
        "the same, hard": "--epochs 12 --distill-alpha 0.5 --distill-hard",
    }
    search = {
        "student alone": ["--epochs 40", "--augment basic --epochs 40", "--augment basic --epochs 80"],
        "teacher on all": [f"--epochs 12 --distill-alpha 0.5 {T2} {t}" for t in (2, 4)],
    }

    def data(self, work: Path, seed: int) -> tuple[list, list]:
        """(flags of the labelled part, of the unlabelled one)."""
        folder = photos(work / self.name)
        return ["--data-dir", folder, "--shots", LABELLED // 10], ["--distill-unlabelled", folder]

    def teacher(self) -> list:
        return [*self.deit.split(), "--weights", weights() / "deit_tiny_patch16_224.fp16.safetensors"]


class EasyVQA:
    """Questions: 100 have answers, the other 18,000 do not."""

    name = "easy_vqa"
    pair = "--model vision=vit-tiny-patch16-224 text=bert-nano --image-size 112 --lr 2e-3 --augment basic --epochs 20"
    student = "--model student-nano --weights none --mode full --lr 1e-3"
    rows = {
        "student alone": "--augment basic --epochs 60",
        "teacher on the labelled": f"--augment basic --epochs 60 --distill-alpha 0.5 {T2} 4",
        "teacher on all": f"--group-by-image --batch-size 128 --epochs 6 --distill-alpha 0.5 {T2} 4",
        "the same, hard": "--group-by-image --batch-size 128 --epochs 6 --distill-alpha 0.5 --distill-hard",
    }
    search = {
        "student alone": ["--epochs 60", "--augment basic --epochs 60"],
        "teacher on all": [f"--group-by-image --batch-size 128 --epochs {n} --distill-alpha 0.5 {T2} {t}"
                           for n, t in ((6, 4), (6, 2), (12, 4))],
    }  # fmt: skip

    def data(self, work: Path, seed: int) -> tuple[list, list]:
        whole = questions(work / self.name)
        few = some_questions(whole, work / f"{self.name}-{seed}", seed)
        return ["--task", "vqa", "--data-dir", few], ["--distill-unlabelled", whole]

    def teacher(self) -> list:
        deit = weights() / "deit_tiny_patch16_224.fp16.safetensors"
        return [*self.pair.split(), "--weights", f"vision={deit}"]


def trained(work: Path, name: str, words: list) -> dict[str, float]:
    """{"val", "test"} accuracy in percent; a run that is there already is not repeated."""
    path = work / "runs" / name
    if not (path / "summary.json").exists():
        words = [*words, "--output", path, "--device", "cpu", "--log-interval", 100000]
        assert main_of_train([str(word) for word in words]) == 0
    summary = json.loads((path / "summary.json").read_text())
    return {"val": 100 * summary["best"]["accuracy"], "test": 100 * summary["test"]["accuracy"]}


def run(task: Cifar | EasyVQA, work: Path, kind: str, flags: str, seed: int) -> dict[str, float]:
    """One student, after its teacher."""
    labelled, unlabelled = task.data(work, seed)
    teacher = work / "runs" / f"{task.name}-teacher-{seed}"
    shared = [*labelled, "--seed", seed]
    found = trained(work, teacher.name, [*shared, *task.teacher()])
    if kind == "teacher":
        return found
    words = [*shared, *task.student.split(), *flags.split()]
    if kind != "student alone":
        words += ["--teacher", teacher]
    if kind not in ("student alone", "teacher on the labelled"):
        words += unlabelled
    return trained(
        work, "-".join([task.name, kind.replace(" ", "_"), *flags.replace("--", "").split(), str(seed)]), words
    )


def told(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def table(task: Cifar | EasyVQA, work: Path, seeds: list[int]) -> list[dict]:
    """A row for each kind: test accuracy over the seeds, and the gain over the student alone, seed by seed."""
    rows, alone = [], None
    for kind, flags in {"teacher": "", **task.rows}.items():
        scores = [run(task, work, kind, flags, seed)["test"] for seed in seeds]
        alone = scores if kind == "student alone" else alone
        gains = [a - b for a, b in zip(scores, alone, strict=True)] if alone else []
        each = ", ".join(f"{score:.1f}" for score in scores)
        rows.append({task.name: kind, "accuracy %": told(scores), "seeds": each, "gain": told(gains) if gains else ""})
    return rows


def search(task: Cifar | EasyVQA, work: Path) -> list[dict]:
    """Accuracy in validation of every setting, with the choosing seed."""
    score: Callable = lambda kind, flags: run(task, work, kind, flags, CHOOSING_SEED)["val"]  # noqa: E731
    return [{"kind": kind, "flags": flags, "val %": f"{score(kind, flags):.1f}"}
            for kind, all_flags in {"teacher": [""], **task.search}.items() for flags in all_flags]  # fmt: skip


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("set", choices=("cifar", "easy_vqa"))
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--search", action="store_true")
    flags.add_argument("--work", type=Path, default=Path("runs/unlabelled"))
    arguments: Namespace = flags.parse_args()
    header, task = prepare(arguments), Cifar() if arguments.set == "cifar" else EasyVQA()
    if arguments.search:
        report(f"unlabelled_search_{arguments.set}", header, search(task, arguments.work), arguments.save)
    else:
        report(f"unlabelled_{arguments.set}", header, table(task, arguments.work, arguments.seeds), arguments.save)


if __name__ == "__main__":
    main()
