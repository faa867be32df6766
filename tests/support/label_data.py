"""Generated scenes with all that is in them as labels, in each form in which tables say it."""

import csv
import json
from pathlib import Path

from minilora.data.generated.scenes import Scenes


def scene_labels(scenes: Scenes, i: int) -> list[str]:
    """The different shapes and colours of a scene, by name."""
    return sorted({name for thing in scenes.things(i) for name in (thing.shape, thing.colour)})


def write_scenes(root: Path, form: str = ";", train: int = 24, val: int = 12, test: int = 0, bare: int = 5) -> Path:
    """Pictures and one table with a split column; form: a separator, "columns", or "json". Every `bare`-th scene of
    a part is without a label (0: none is)."""
    root.mkdir(parents=True, exist_ok=True)
    rows = []
    for part, count in (("train", train), ("val", val), ("test", test)):
        scenes = Scenes("choice", part, count)
        for i in range(count):
            name = f"{part}_{i:04d}.png"
            scenes.image(i).save(root / name)
            rows.append((name, part, [] if bare and i % bare == bare - 1 else scene_labels(scenes, i)))
    if form == "json":
        path = root / "scenes.json"
        path.write_text(json.dumps([{"file": name, "split": part, "labels": labels} for name, part, labels in rows]))
        return path
    path = root / "scenes.csv"
    names = sorted({label for _, _, labels in rows for label in labels})
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "split", *(names if form == "columns" else ["labels"])])
        for name, part, labels in rows:
            cells = [int(label in labels) for label in names] if form == "columns" else [form.join(labels)]
            writer.writerow([name, part, *cells])
    return path
