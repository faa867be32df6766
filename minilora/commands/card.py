"""README.md of a run directory, a model card: what was trained on what, how well, and how to load
it with minilora, PEFT and transformers. Everything in it can be typed as it stands.
"""

import json
import shlex
from dataclasses import fields
from pathlib import Path

from minilora.report.metrics import NAMES, shown
from minilora.settings.flags import Config
from minilora.settings.parse import NOT_SAVED
from minilora.settings.values import option
from minilora.textfiles import printable

CLASSES = {"classify": "AutoModelForImageClassification", "choice": "AutoModel"}  # of transformers
PREDICT = {
    "classify": 'run.predict(["picture.jpg"])',
    "vqa": 'run.predict(["picture.jpg"], question="what is in the picture?")',
    "choice": 'run.predict(["picture.jpg"], question="what is it?", choices=["a dog", "a cat"])',
}


def command(config: Config) -> str:
    """The train.py line that makes this run again: every flag that is not at its default."""
    words = ["python", "train.py"]
    for field in fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in {*NOT_SAVED, "recipe"}:
            continue
        values = [f"{tower}={one}" for tower, one in value.items()] if isinstance(value, dict) else value
        values = values if isinstance(values, (list, tuple)) else [values]
        words += [option(field.name)] + ([] if value is True else [str(one) for one in values])
    return shlex.join(words)


def loading(path: Path, config: Config, base: dict, layouts: tuple[str, ...], classes: int) -> str:
    """How to load the run: with minilora, merged in transformers, as an adapter with PEFT."""
    text = f"""## Load it

With minilora, from this folder alone and the base weights that `config.toml` names:

```python
from minilora.tasks import load_run

run = load_run({json.dumps(str(path))})
print({PREDICT[config.task]})
```
"""
    kind = "choice" if config.head == "names" else config.task  # both are a CLIP
    if "transformers5" not in layouts or kind not in CLASSES or isinstance(config.model, dict):
        return text
    model_class, folder = CLASSES[kind], printable(shlex.quote(str(path)))
    text += f"""
In transformers, merged to one model:

```sh
python evaluate.py {folder} --merge-to merged --layout transformers
```
```python
from transformers import {model_class}

model = {model_class}.from_pretrained("merged")
```
"""
    if config.mode != "lora":
        return text
    weights = {"none": '"none"', "bundled": "None"}.get(base["weights"], json.dumps(base["weights"]))
    sizes = f", num_classes={classes}" * (kind == "classify")
    text += f"""
With PEFT, as an adapter beside the base model in transformers' layout:

```sh
python evaluate.py {folder} --export-adapter adapter --layout transformers5
```
```python
from peft import PeftModel
from transformers import {model_class}

from reference_models import load_pretrained, save_pretrained

base = load_pretrained({json.dumps(config.model)}, {weights}{sizes})
save_pretrained(base, "base", layout="transformers")
model = PeftModel.from_pretrained({model_class}.from_pretrained("base"), "adapter")
```
"""
    return text


def model_card(
    path: Path, config: Config, base: dict, labels: list[str], summary: dict, lines: list[str], layouts: tuple[str, ...]
) -> str:
    """The card as Markdown. base: weights and sha256 of the base; lines: the run's data lines;
    layouts: those that the model can be written in."""
    lines = [printable(line).replace("|", "\\|") for line in lines]
    counts, best, test = summary["parameters"], summary["best"], summary.get("test") or {}
    metric = summary["metric"]
    scores = {"validation": best.get("val_loss" if metric == "loss" else metric), "test": test.get(metric)}
    scored = ", ".join(f"{part} {shown(metric, value)}" for part, value in scores.items() if value is not None)
    some = printable(", ".join(labels[:20])).replace("|", "\\|") + f" and {len(labels) - 20} more" * (len(labels) > 20)
    model, both = config.model_name, (base["weights"], base.get("sha256"))
    weights, sha256 = (" + ".join(map(str, one.values())) if isinstance(one, dict) else str(one) for one in both)
    return f"""# {printable(path.name)}

{config.mode} fine-tuning of {model} for {config.task}, made with minilora {summary["versions"].get("minilora", "")}.

| | |
|---|---|
| base | {model}, weights {printable(weights)}, sha256 {sha256[:16]}... |
| {" | ".join(lines[0].split(": ", 1)) if lines and ": " in lines[0] else "data | " + "; ".join(lines)} |
| {"answers" if config.task == "vqa" else "classes"} | {len(labels)}: {some} |
| trained | {counts["trainable"]:,} of {counts["total"]:,} parameters |
| {NAMES.get(metric, metric)} | {scored}, best epoch {best["epoch"]} of {config.epochs} |
| time, memory | {summary["seconds"]:.1f} s of training, peak {summary["peak_memory_mb"]:.0f} MiB, {summary["device"]} |

The weights kept are those of the best epoch by {NAMES.get(metric, metric)} on the validation data. Made by

```sh
{printable(command(config))}
```

{loading(path, config, base, layouts, len(labels))}"""
