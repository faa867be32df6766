"""R3's recipe end to end, one epoch with LoRA and dropout .05: train.py's own parts beside peft +
transformers + torchvision; and the recipe as it stands beside its full twin.

    python -m tests.benchmarks.recipe_epoch --save           # the real photos: tests/conftest.py says where
    python -m tests.benchmarks.recipe_epoch --twin --save    # train.py --recipe, LoRA on six layers beside full

Both read the same 1,200 JPEG files, resize to 224, augment by random resized crop and flip, and train batches
of 32 with AdamW; wall time from the first file to the last step, whole epochs alternating. The twins are whole
runs of train.py with DeiT-tiny's weights, one epoch, and the seconds and the accuracy that they report.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from minilora import LoRAConfig, inject_lora
from minilora.speed.gemm import speed_up
from reference_models import load_pretrained
from tests.benchmarks.common import parser, prepare, ratio, report, told
from tests.benchmarks.real_photos import peer, weights
from tests.conftest import shared_folder

BATCH, ROOT = 32, Path(__file__).parents[2]


def ours() -> float:
    """Seconds of one epoch with minilora's data set, loader and model."""
    from minilora.data.pictures.loader import PictureDataset, epoch_order, make_loader
    from minilora.data.sets import load_classification

    model = load_pretrained("vit-tiny-patch16-224", weights(), num_classes=10)
    speed_up(inject_lora(model, LoRAConfig(8, 16, 0.05, modules_to_save=("head",))))
    start = time.perf_counter()
    split = load_classification(shared_folder() / "imagewoof224", "folder").train
    data = PictureDataset(split, model.preprocess, "basic", seed=0)
    batches = [[(0, i) for i in batch] for batch in epoch_order(len(data), BATCH, 0, 0)]
    run(model, ((batch["image"], batch["label"]) for batch in make_loader(data, batches)))
    return time.perf_counter() - start


def peers() -> float:
    """The same with torchvision's ImageFolder and transforms, transformers and peft."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    plain = load_pretrained("vit-tiny-patch16-224", weights(), num_classes=10)
    settings = plain.preprocess
    model = peer(plain)
    start = time.perf_counter()
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(224, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(settings["mean"], settings["std"]),
        ]
    )
    data = ImageFolder(shared_folder() / "imagewoof224" / "train", transform)
    run(model, torch.utils.data.DataLoader(data, BATCH, shuffle=True))
    return time.perf_counter() - start


def twin(recipe: str, threads: int) -> tuple[float, float]:
    """(seconds, accuracy %) of one epoch of a recipe, by its run's summary."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--recipe", recipe, "--weights", str(weights()), "--epochs", "1", "--output", f"{folder}/run"]
        words += ["--data-dir", str(shared_folder() / "imagewoof224"), "--threads", str(threads)]
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        line = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return line["seconds"], 100 * line["accuracy"]


def measure_twins(arguments, header: str) -> None:
    recipes = {"LoRA, six layers and norms": "imagewoof-vit-tiny", "full": "imagewoof-vit-tiny-full"}
    found = {name: [] for name in recipes}
    for index in range(arguments.rounds):
        for name, recipe in list(recipes.items())[:: 1 if index % 2 else -1]:
            found[name].append(twin(recipe, arguments.threads))
    seconds = {name: [one[0] for one in runs] for name, runs in found.items()}
    row = {name: f"{sorted(values)[len(values) // 2]:.0f} s" for name, values in seconds.items()}
    row |= {f"{name}, accuracy %": f"{runs[0][1]:.2f}" for name, runs in found.items()}
    row["full / LoRA"] = told(ratio(seconds["full"], seconds["LoRA, six layers and norms"]))
    report("recipe_twins", header, [row], arguments.save, seconds)


def run(model, batches) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-4)
    model.train()
    for images, labels in batches:
        output = model(images)
        loss = F.cross_entropy(getattr(output, "logits", output), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.set_defaults(rounds=3)
    flags.add_argument("--twin", action="store_true", help="the recipe beside its full twin, by train.py")
    arguments = flags.parse_args()
    header = prepare(arguments)
    if arguments.twin:
        return measure_twins(arguments, header)
    seconds = {"ours": [], "peers": []}
    for index in range(arguments.rounds):
        for name, epoch in (("ours", ours), ("peers", peers))[:: 1 if index % 2 else -1]:
            seconds[name].append(epoch())
    row = {name: f"{sorted(values)[len(values) // 2]:.0f} s" for name, values in seconds.items()}
    row["peers / ours"] = told(ratio(seconds["peers"], seconds["ours"]))
    report("recipe_epoch", header, [row], arguments.save, seconds)


if __name__ == "__main__":
    main()
