"""Pictures per second of the input, from files and from shards, with and without augmentation, beside the LoRA step.

    python -m tests.benchmarks.pipeline --save                   generated JPEG pictures of 320 pixels
    python -m tests.benchmarks.pipeline --data-dir photos        your own class folders
    python -m tests.benchmarks.pipeline --device cuda --batch 256 --amp bf16

All read whole epochs in a new order each time, and nothing stays decoded in memory; the batches end on the training
device. Where the input is faster than the step, workers (or the copy to a GPU) hide it; where it is slower, the step
waits. Starting workers is part of an epoch, so that few pictures show them slower than they are.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from minilora.data.shards.pictures import write_picture_shards
from minilora.settings.flags import Config
from minilora.tasks import build_task
from minilora.tasks.classify.task import Classify
from minilora.training.device import to_device
from tests.benchmarks.common import interleaved, parser, prepare, ratio, report, told
from tests.benchmarks.models import SPECS, Case

SIDE, CLASSES = 320, 4


def make_photos(root: Path, pictures: int) -> Path:
    """Class folders of noisy JPEG files: `pictures` in train, one of each class in val."""
    for part, count in (("train", pictures), ("val", CLASSES)):
        for i in range(count):
            folder = root / part / f"class_{i % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = np.random.default_rng(i).integers(0, 255, (40, 40, 3)).astype(np.uint8)
            Image.fromarray(coarse).resize((SIDE, SIDE)).save(folder / f"{i:06d}.jpg", quality=90)
    return root


def make_task(arguments, folder: Path, workers: int, augment: str) -> Classify:
    """train.py's own task, without a cache of decoded pictures."""
    flags = {"model": SPECS[arguments.model][0], "weights": "none", "batch_size": arguments.batch}
    config = Config(**flags, data_dir=str(folder), workers=workers, augment=augment, device=arguments.device)
    task = build_task(config, arguments.device)
    if hasattr(task.data["train"], "pictures"):
        task.data["train"].pictures.room = 0
    return task


def reader(task: Classify) -> Callable[[], int]:
    """A function that reads the next epoch to the end."""
    epochs = iter(range(10**6))

    def read() -> None:
        epoch = next(epochs)
        for batch in task.train_loader(epoch, task.train_batches(epoch)):
            to_device(batch, task.device)

    return read


def candidates(arguments, files: Path, shards: Path) -> tuple[dict, dict]:
    """({name: function}, {name: pictures that one call handles})."""
    tasks = {}
    for source, folder in (("files", files), ("shards", shards)):
        for augment in ("none", "basic"):
            for workers in arguments.workers:
                name = f"{source}, {augment}, {workers} workers"
                tasks[name] = make_task(arguments, folder, workers, augment)
    runs = {name: reader(task) for name, task in tasks.items()}
    counts = {name: len(task.data["train"]) for name, task in tasks.items()}
    case = Case(arguments.model, arguments.device, arguments.batch)
    runs["LoRA step"], counts["LoRA step"] = case.ours("lora", amp=arguments.amp), arguments.batch
    return runs, counts


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--model", default="vit-tiny", choices=("vit-tiny", "vit-base"))
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--pictures", type=int, default=512, help="how many are generated")
    flags.add_argument("--data-dir", default=None, help="class folders instead of generated pictures")
    flags.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    flags.add_argument("--amp", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the step")
    flags.set_defaults(rounds=5)
    arguments = flags.parse_args()
    header = prepare(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        files = Path(arguments.data_dir or make_photos(Path(temporary) / "photos", arguments.pictures))
        task, shards = make_task(arguments, files, 0, "none"), Path(temporary) / "shards"
        size = task.preprocess["image_size"]
        write_picture_shards(shards, task.splits, task.preprocess, round(size * 8 / 7), {}, log=lambda line: None)
        runs, counts = candidates(arguments, files, shards)
        seconds = interleaved(runs, arguments.rounds, arguments.device, warmup=1)
    each = {name: [value / counts[name] for value in values] for name, values in seconds.items()}
    rows = [
        {
            "what": name,
            "pictures/s": f"{1 / sorted(values)[len(values) // 2]:.0f}",
            "step / input, time of a picture": told(ratio(each["LoRA step"], values)),
        }
        for name, values in each.items()
    ]
    count = next(iter(counts.values()))
    header += f"; {arguments.model}, batch {arguments.batch}, {count} pictures, step in {arguments.amp}"
    report(f"pipeline_{arguments.device.split(':')[0]}", header, rows, arguments.save, seconds)


if __name__ == "__main__":
    main()
