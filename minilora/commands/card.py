"""README.md of a run directory, a model card: what was trained on what, how well, and how to load
it with minilora, PEFT and transformers. Everything in it can be typed as it stands.

card.md beside this file is the card, with the names of what is filled in.
"""

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path

from minilora.report.metrics import NAMES, shown
from minilora.settings.flags import Config
from minilora.settings.parse import NOT_SAVED
from minilora.settings.values import option
from minilora.textfiles import printable

# everywhere; merged in transformers; an adapter of PEFT
CARD, MERGED, PEFT = re.split("<!-- .* -->\n", Path(__file__).with_suffix(".md").read_text(encoding="utf-8"))

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


def model_card(
    path: Path, config: Config, base: dict, labels: list[str], summary: dict, lines: list[str], layouts: tuple[str, ...]
) -> str:
    """The card as Markdown. base: weights and sha256 of the base; lines: the run's data lines;
    layouts: those that the model can be written in."""
    lines = [printable(line).replace("|", "\\|") for line in lines]
    metric, best, test = summary["metric"], summary["best"], summary.get("test") or {}
    scores = {"validation": best.get("val_loss" if metric == "loss" else metric), "test": test.get(metric)}
    scored = ", ".join(f"{part} {shown(metric, value)}" for part, value in scores.items() if value is not None)
    some = printable(", ".join(labels[:20])).replace("|", "\\|") + f" and {len(labels) - 20} more" * (len(labels) > 20)
    both = base["weights"], base.get("sha256")
    weights, sha256 = (" + ".join(map(str, one.values())) if isinstance(one, dict) else str(one) for one in both)
    kind = "choice" if config.head == "names" else config.task  # both are a CLIP
    text = CARD
    if "transformers5" in layouts and kind in CLASSES and isinstance(config.model, str):
        text += MERGED + PEFT * (config.mode == "lora")
    place = {"none": '"none"', "bundled": "None"}.get(weights, json.dumps(weights))
    return text.format(
        name=printable(path.name),
        config=config,
        summary=summary,
        version=summary["versions"].get("minilora", ""),
        weights=printable(weights),
        sha256=sha256[:16],
        data=" | ".join(lines[0].split(": ", 1)) if lines and ": " in lines[0] else "data | " + "; ".join(lines),
        kind="answers" if config.task == "vqa" else "classes",
        labels=f"{len(labels)}: {some}",
        metric=NAMES.get(metric, metric),
        scored=scored,
        command=printable(command(config)),
        path=json.dumps(str(path)),
        predict=PREDICT[config.task],
        folder=printable(shlex.quote(str(path))),
        model_class=CLASSES.get(kind),
        base=f"{json.dumps(config.model)}, {place}" + f", num_classes={len(labels)}" * (kind == "classify"),
    )
