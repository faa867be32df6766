"""In which precision a run computes: what --amp auto and an open --base-dtype mean here.

config.toml names the precision that was chosen, so that a run is resumed and evaluated as it was
trained. "auto" in a run's config.toml is of version 0.1, where it was float32 on a CPU.
"""

from pathlib import Path

import torch

from minilora.settings.flags import Config
from minilora.settings.parse import read_toml
from reference_models import processor


def settle_precision(config: Config, device: torch.device) -> None:
    """Give --amp auto and --base-dtype their values before the model is built: those of the run
    that lies in --output, else what is fast on this machine.

    Frozen weights are stored as they are multiplied, since autocast would round them in every step.
    Not for DoRA, which also needs the exact length of each of W's rows.
    """
    file = Path(config.output or "") / "config.toml"
    there = read_toml(file) if config.output and file.is_file() else {}
    if config.amp == "auto":
        config.amp = there.get("amp") or config.base_dtype or fast_precision(device)
    if config.base_dtype is None:
        frozen = config.mode != "full" and not config.use_dora
        config.base_dtype = there.get("base_dtype") or (choose_amp(config, device) if frozen else "fp32")


def choose_amp(config: Config, device: torch.device) -> str:
    """fp32, bf16 or fp16 for the arithmetic; an auto that is not settled is version 0.1's."""
    if config.amp != "auto":
        return config.amp
    if config.base_dtype not in (None, "fp32"):
        # frozen weights in half precision need the same autocast
        return config.base_dtype
    return "fp32" if device.type == "cpu" else fast_precision(device)


def fast_precision(device: torch.device) -> str:
    """bf16 where the device has instructions for it, on a CPU those of AMX or AVX-512; measured in
    tests/benchmarks/README.md. An older GPU emulates bf16, slower than it computes fp16."""
    if device.type == "cpu":
        return "bf16" if processor.has("amx_bf16") or processor.has("avx512_bf16") else "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
