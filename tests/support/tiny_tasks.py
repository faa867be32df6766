"""Every task of train.py in a size that takes milliseconds per step: data, models and flags, for reliability tests."""

import json
from pathlib import Path

import torch

from minilora.atomic import write_json
from minilora.training import checkpoint
from minilora.training.state import tensors_sha256
from reference_models import create_model, save_pretrained
from tests.support.choice_data import wordpiece, write_clip, write_scpc
from tests.support.cli_data import program, write_photos
from tests.support.vqa_data import write_vqa

VISION = {"image_size": 16, "dim": 8, "heads": 2, "hidden": 16, "depth": 1}
TEXT = {"dim": 8, "heads": 2, "hidden": 16, "depth": 1, "max_positions": 40}
CLOCKS = ("seconds", "images_per_second", "peak_memory_mb")
train, evaluate = program("train"), program("evaluate")


def write_tasks(root: Path) -> dict[str, list[str]]:
    """Data and checkpoints of the three tasks below `root`; {task: the flags that use them}."""
    torch.manual_seed(0)  # a fixture of a module comes before the seed of a test
    save_pretrained(create_model("vit-tiny-patch16-224", 3, **VISION | {"patch_size": 8}), root / "vit")
    tokenizer = wordpiece()
    sizes = TEXT | {"vocab_size": tokenizer.vocab_size}
    tokenizer.save(save_pretrained(create_model("bert-base", **sizes), root / "bert"))
    write_clip(root / "clip")
    data = {
        "classify": write_photos(root / "photos", train=5, val=2, classes=3),
        "vqa": write_vqa(root / "vqa", train=5, val=2, size=20),
        "choice": write_scpc(root / "scpc", train=17),
    }
    models = {
        "classify": [root / "vit"],
        "vqa": [f"vision={root / 'vit'}", f"text={root / 'bert'}"],
        "choice": [root / "clip"],
    }
    common = ["--batch-size", "3", "--device", "cpu", "--log-interval", "1000"]
    return {
        task: ["--task", task, "--model", *map(str, models[task]), "--data-dir", str(data[task]), *common]
        for task in data
    }


def run_quickly(words, monkeypatch) -> None:
    """train.py's main() without the figures and the page, which cost more than the training."""

    def summary(task, run_dir, result, test, device):
        write_json(run_dir / "summary.json", {"weights_sha256": result["weights_sha256"]})

    monkeypatch.setattr(train.results, "write_results", summary)
    assert train.main([str(word) for word in words]) == 0


def bits(run: Path) -> dict:
    """All that may not depend on how often a run was interrupted. The best epoch's weights are those of the file."""
    newest = checkpoint.latest_checkpoint(run)
    tensors, values = checkpoint.load_checkpoint(newest)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = next(run.glob("*.safetensors")).read_bytes()
    del values["seconds"], values["history"], values["best"]
    return {
        "step": newest.name,
        "tensors": tensors_sha256({name: t for name, t in tensors.items() if not name.startswith("best.")}),
        "values": values,
        "rows": [{key: value for key, value in row.items() if key not in CLOCKS} for row in rows],
        "weights": weights,
        "summary": json.loads((run / "summary.json").read_text())["weights_sha256"],
    }
