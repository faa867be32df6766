"""The model card of a run: what it says is so, and what it says to type works to the letter."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from minilora.commands.card import command, model_card
from minilora.settings.flags import Config
from minilora.settings.parse import parse_args
from tests.support.cli_data import ROOT, program

SUMMARY = {
    "metric": "accuracy",
    "best": {"accuracy": 0.5, "epoch": 2},
    "test": None,
    "parameters": {"trainable": 10, "total": 100},
    "seconds": 1.0,
    "peak_memory_mb": 10.0,
    "device": "cpu",
    "versions": {},
}


def card(path, config, labels=("cat", "dog"), layouts=("transformers5",)):
    base = {"weights": "none", "sha256": "00"}
    return model_card(path, config, base, list(labels), SUMMARY, ["data: photos: 3 train pictures"], layouts)


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL)


@pytest.mark.parametrize(
    "typed",
    [
        ["--lora-r", "4", "--target-modules", "q_proj", "fc1", "--use-dora"],
        ["--task", "vqa", "--model", "vision=vit-nano-patch8-48", "text=bert-nano", "--lora-r", "vision=8", "text=4"],
        ["--task", "choice", "--prompt", "a 'photo' of $HOME {choice}; {question}", "--lr", "1e-5"],
    ],
)
def test_the_command_of_a_card_gives_the_same_configuration(typed):
    config, _ = parse_args(typed)
    assert parse_args(shlex.split(command(config))[2:])[0] == config


def test_a_card_says_what_was_kept_and_offers_peft_only_where_there_is_an_adapter(tmp_path):
    text = card(tmp_path, Config(model="vit-nano-patch8-48"))
    assert "validation 50.00 %, best epoch 2" in text and "10 of 100 parameters" in text
    assert "PeftModel" in text and "load_run" in text
    assert "PeftModel" not in card(tmp_path, Config(model="vit-nano-patch8-48", mode="linear"))
    towers = Config(task="vqa", model={"vision": "vit-nano-patch8-48", "text": "bert-nano"})
    assert "transformers" not in card(tmp_path, towers, layouts=()).partition("## Load it")[2]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classify", "choice"])
def test_a_card_followed_to_the_letter_gives_the_runs_logits_in_peft_and_transformers(task, tmp_path, monkeypatch):
    run_dir = tmp_path / "a run"
    flags = ["--max-steps", "4", "--subset", "40", "--amp", "fp32", "--base-dtype", "fp32", "--output", str(run_dir)]
    assert program("train").main(["--task", task, *flags]) == 0
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "import torch\n"
    for kind, text in blocks((run_dir / "README.md").read_text()):
        if kind == "sh" and "evaluate.py" in text:
            line = text.strip().replace("evaluate.py", str(ROOT / "evaluate.py"))
            words = [sys.executable, *shlex.split(line)[1:]]
            assert subprocess.run(words, cwd=tmp_path, env=env, capture_output=True).returncode == 0
        elif kind == "python" and "load_run" not in text:
            kept = "peft" if "PeftModel" in text else "merged"
            code += text + f"models = globals().get('models', {{}}) | {{'{kept}': model.eval()}}\n"
    code += f"from minilora.tasks import load_run\nrun = load_run({str(run_dir)!r})\ntorch.manual_seed(0)\n"
    code += "x = torch.randn(2, 3, 48, 48)\n"
    if task == "classify":
        code += "theirs = [models[k](pixel_values=x).logits for k in models]\nours = run.model(x)\n"
    else:
        code += (
            "theirs = [getattr(models[k].get_image_features(pixel_values=x), 'pooler_output', None) for k in models]\n"
        )
        code += "ours = run.model.encode_image(x)\n"
    code += "print([float((t - ours).abs().max() / ours.std()) for t in theirs])\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    differences = eval(done.stdout.strip().splitlines()[-1])
    assert len(differences) == 2 and max(differences) < 1e-4
