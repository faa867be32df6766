"""Inference: a merged model beside the dense one, and switching adapters beside loading a whole model again.

python -m tests.benchmarks.inference --save
"""

import copy
import tempfile
from pathlib import Path

import torch

from minilora.adapter import load_adapter, save_adapter
from minilora.inject import inject_lora, merge_lora
from minilora.lora_config import LoRAConfig
from reference_models import create_model, load_pretrained, save_pretrained
from tests.benchmarks.common import interleaved, parser, prepare, ratio, report, told


def main() -> None:
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--models", nargs="+", default=["vit-tiny-patch16-224", "vit-base-patch16-224"])
    flags.add_argument("--batch", type=int, default=8)
    arguments = flags.parse_args()
    header = prepare(arguments) + f"; batch {arguments.batch}, float32"
    rows = [measure(name, arguments) for name in arguments.models]
    report(f"inference_{arguments.device.split(':')[0]}", header, rows, arguments.save)


@torch.no_grad()
def measure(name: str, arguments) -> dict:
    torch.manual_seed(0)
    dense = create_model(name, num_classes=10).eval()
    config = LoRAConfig(modules_to_save=("head",), init_lora_weights=False)
    adapted = inject_lora(copy.deepcopy(dense), config)
    with tempfile.TemporaryDirectory() as folder:
        first, whole = Path(folder, "first"), Path(folder, "whole")
        save_adapter(adapted, first)
        merged = merge_lora(copy.deepcopy(adapted)).to(arguments.device)
        save_pretrained(dense, whole)
        models = {"dense": dense.to(arguments.device), "merged": merged, "lora": adapted.to(arguments.device)}
        images = torch.randn(arguments.batch, 3, 224, 224, device=arguments.device)
        runs = {key: lambda model=model: model(images) for key, model in models.items()}
        runs |= {"switch adapter": lambda: load_adapter(adapted, first), "load model": lambda: load_pretrained(whole)}
        seconds = interleaved(runs, arguments.rounds, arguments.device)
    return {
        "model": name,
        "dense ms": f"{1e3 * sorted(seconds['dense'])[arguments.rounds // 2]:.1f}",
        "merged / dense": told(ratio(seconds["merged"], seconds["dense"])),
        "unmerged / dense": told(ratio(seconds["lora"], seconds["dense"])),
        "switch adapter ms": f"{1e3 * sorted(seconds['switch adapter'])[arguments.rounds // 2]:.1f}",
        "load model ms": f"{1e3 * sorted(seconds['load model'])[arguments.rounds // 2]:.1f}",
    }


if __name__ == "__main__":
    main()
