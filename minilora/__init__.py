"""minilora: LoRA written out by hand, small enough to study in an hour, exact enough to trust.

    model = inject_lora(model, LoRAConfig(r=8, lora_alpha=16, target_modules=("q_proj", "v_proj")))

The house, from the inside out:

lora, fused      the layer, and the same sum in fewer passes with its gradients: read these first,
inject, adapter  then into a model and out again, and the files
dora             the variant with trained lengths
lora_config      what to adapt and how            targets   which layers a name means
lessons          small programs to learn from     speed     faster forms of the same sums
formats          adapter files of PEFT, others    settings  command line, recipes, TOML
data             pictures and questions           training  the loop
report           figures and pages                compress  distillation and pruning
tasks            where models and data meet; train.py and evaluate.py stand on it
commands         what one types besides train.py and evaluate.py
atomic, errors   files written whole, one line for each mistake

The names are looked up when they are first used: `import minilora` alone imports no torch.
"""

import importlib

from minilora.version import __version__

_HOME = {
    "LoRALinear": "lora",
    "DoRALinear": "dora",
    "LoRAConfig": "lora_config",
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
