"""LoRA of ours and of peft on the same batches of real photos, beside a linear probe and full fine-tuning.

    python -m tests.benchmarks.real_photos --save                # DeiT-tiny, ImageWoof and CIFAR-10, 3 seeds
    python -m tests.benchmarks.real_photos --sets cifar10_jpg --modes linear lora --seeds 0

Batch 32, 3 epochs, AdamW, lr 1e-3 with a cosine schedule (full: 5e-5), r 8, alpha 16, dropout .05 on q and v.
The weights, the random head, the order of the batches and the loop are the same for all; only the model
differs. Finished runs are kept in results/real_photos.json and not run again.
"""

import json
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from minilora import LoRAConfig, inject_lora
from minilora.data.pictures.transforms import build_transform
from minilora.data.sets import load_classification
from minilora.speed.gemm import speed_up
from reference_models import load_pretrained, save_pretrained
from tests.benchmarks.common import RESULTS, parser, prepare, report
from tests.conftest import shared_folder

MODES = ("linear", "lora", "lora-bf16", "peft", "full")
LR = {"linear": 1e-3, "lora": 1e-3, "lora-bf16": 1e-3, "peft": 1e-3, "full": 5e-5}
EPOCHS, BATCH = 3, 32


def pictures(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """{"train" | "val": (pictures (N, 3, 224, 224) float16 normalised, labels (N,))}, resized to 224, no
    augmentation.
    """
    model = load_pretrained("vit-tiny-patch16-224", weights())
    splits = load_classification(shared_folder() / name, "folder")
    transform = build_transform(model.preprocess)
    parts = {}
    for part in ("train", "val"):
        split = getattr(splits, part)
        images = torch.stack([transform(split.load(i)).half() for i in range(len(split))])
        parts[part] = images, torch.tensor([sample.label for sample in split])
    return parts


def weights() -> Path:
    return shared_folder() / "weights" / "deit_tiny_patch16_224.fp16.safetensors"


def build(mode: str, seed: int, classes: int) -> nn.Module:
    """The model of one mode; the head comes from `seed` and is the same for every mode."""
    torch.manual_seed(seed)
    model = load_pretrained("vit-tiny-patch16-224", weights(), num_classes=classes)
    if mode == "full":
        return speed_up(model.requires_grad_(True))
    if mode == "linear":
        return inject_lora(model, LoRAConfig(target_modules=(), modules_to_save=("head",)))
    if mode.startswith("lora"):
        return speed_up(inject_lora(model, LoRAConfig(8, 16, 0.05, modules_to_save=("head",))))
    return peer(model)


def peer(model: nn.Module) -> nn.Module:
    """The same weights and head as a transformers model with peft's LoRA."""
    import transformers
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, layout="transformers")
        plain = transformers.ViTForImageClassification.from_pretrained(folder, attn_implementation="sdpa")
    config = LoraConfig(
        r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    return get_peft_model(plain, config)


def train(model: nn.Module, mode: str, seed: int, data: dict) -> tuple[float, float]:
    """(accuracy on the validation pictures after the last epoch, seconds of training)."""
    images, labels = data["train"]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR[mode], fused=True)
    total, step, start = EPOCHS * math.ceil(len(labels) / BATCH), 0, time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(labels), generator=generator).split(BATCH):
            for group in optimizer.param_groups:
                group["lr"] = LR[mode] * 0.5 * (1 + math.cos(math.pi * step / total))
            loss = F.cross_entropy(logits(model, images[rows].float(), mode), labels[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            step += 1
    seconds = time.perf_counter() - start
    return accuracy(model, *data["val"], mode), seconds


def train_head(model: nn.Module, seed: int, data: dict) -> tuple[float, float]:
    """The linear probe: the frozen encoder's features do not change, so each picture is encoded once."""
    start = time.perf_counter()
    model.eval()
    with torch.no_grad():
        features = {
            part: (torch.cat([model.pooled(rows.float()) for rows in images.split(50)]), labels)
            for part, (images, labels) in data.items()
        }
    score, _ = train(model.head, "linear", seed, features)
    return score, time.perf_counter() - start


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, mode: str) -> float:
    model.eval()
    predicted = torch.cat([logits(model, part.float(), mode).argmax(-1) for part in images.split(50)])
    return 100 * (predicted == labels).float().mean().item()


def logits(model: nn.Module, images: torch.Tensor, mode: str) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "lora-bf16"):
        output = model(images)
    return getattr(output, "logits", output).float()


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--sets", nargs="+", default=["imagewoof224", "cifar10_jpg"])
    flags.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    flags.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = flags.parse_args()
    header = prepare(arguments)
    path = RESULTS / "real_photos.runs.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    sets = {name: pictures(name) for name in arguments.sets}
    for seed in arguments.seeds:
        for name, data in sets.items():
            for mode in arguments.modes:
                key = f"{name} {mode} {seed}"
                if key not in done:
                    model = build(mode, seed, len(set(data["train"][1].tolist())))
                    done[key] = train_head(model, seed, data) if mode == "linear" else train(model, mode, seed, data)
                    print(key, done[key], flush=True)
                    if arguments.save:
                        RESULTS.mkdir(exist_ok=True)
                        path.write_text(json.dumps(done, indent=1) + "\n")
    report("real_photos", header, table(done), arguments.save)


def table(done: dict[str, tuple[float, float]]) -> list[dict]:
    """One row for each set and mode: mean and spread over the seeds."""
    rows = []
    for name, mode in dict.fromkeys(tuple(key.split()[:2]) for key in done):
        runs = [value for key, value in done.items() if key.split()[:2] == [name, mode]]
        scores = torch.tensor([score for score, _ in runs])
        spread = f" ± {scores.std().item():.1f}" if len(runs) > 1 else ""
        rows.append(
            {
                "set": name,
                "mode": mode,
                "seeds": len(runs),
                "accuracy %": f"{scores.mean().item():.1f}{spread}",
                "seconds": f"{sum(seconds for _, seconds in runs) / len(runs):.0f}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
