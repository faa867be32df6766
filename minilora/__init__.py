"""minilora: LoRA written out by hand, small enough to study in an hour, exact enough to trust.

    model = inject_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))

The names are looked up when they are first used, so that `python -m minilora.lora` imports each module once.
"""

import importlib

from minilora.version import __version__

_HOME = {
    "LoRALinear": "lora",
    "LoRAConfig": "inject",
    "inject_lora": "inject",
    "merge_lora": "inject",
    "disable_lora": "inject",
    "count_parameters": "inject",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "export_adapter": "adapter",
    "load_run": "tasks",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minilora' has no attribute {name!r}")
    return getattr(importlib.import_module(f"minilora.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
