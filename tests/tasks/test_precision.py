"""Which precision --amp auto is, that a run keeps it, and that a run of version 0.1 goes on in float32."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import evaluate
import train
from minilora.settings.flags import Config
from minilora.settings.parse import read_run_config
from minilora.tasks.load import load_run
from minilora.tasks.precision import choose_amp, fast_precision, settle_precision
from reference_models import processor

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parents[1] / "fixtures" / "runs_0.1"
SMALL = ["--device", "cpu", "--subset", "48", "--epochs", "1", "--batch-size", "16", "--lora-r", "2"]


@pytest.fixture
def fast_bf16(monkeypatch):
    """A processor with bf16 instructions, whatever there is."""
    monkeypatch.setattr(processor, "instructions", lambda: frozenset({"avx512f", "avx512_bf16"}))
    return monkeypatch


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({"avx512f"}, "fp32"), ({"avx512f", "avx512_bf16"}, "bf16"), ({"amx_bf16"}, "bf16"), (set(), "fp32")],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, instructions, expected):
    monkeypatch.setattr(processor, "instructions", lambda: frozenset(instructions))
    assert fast_precision(CPU) == expected


def settled(**flags) -> tuple[str, str]:
    config = Config(**flags)
    settle_precision(config, CPU)
    return config.amp, config.base_dtype


def test_frozen_weights_follow_the_precision_where_there_are_some(fast_bf16):
    assert settled() == ("bf16", "bf16")
    assert settled(mode="linear") == ("bf16", "bf16")
    assert settled(mode="full") == ("bf16", "fp32")
    assert settled(use_dora=True) == ("bf16", "fp32")  # DoRA measures the rows of W
    assert settled(amp="fp32") == ("fp32", "fp32")
    assert settled(base_dtype="fp32") == ("fp32", "fp32")
    assert settled(amp="bf16", base_dtype="fp32") == ("bf16", "fp32")
    assert settled(base_dtype="fp16") == ("fp16", "fp16")


def test_a_run_keeps_its_precision_on_a_machine_that_would_choose_another(fast_bf16, tmp_path):
    (tmp_path / "config.toml").write_text('amp = "fp32"\nbase_dtype = "fp32"\n')
    assert settled(output=str(tmp_path)) == ("fp32", "fp32")
    fast_bf16.setattr(processor, "instructions", lambda: frozenset())
    (tmp_path / "config.toml").write_text('amp = "bf16"\nbase_dtype = "bf16"\n')
    assert settled(output=str(tmp_path)) == ("bf16", "bf16")


def test_a_run_is_scored_in_its_own_precision_to_the_digit(fast_bf16, tmp_path, capsys):
    run = tmp_path / "run"
    assert train.main([*SMALL, "--output", str(run)]) == 0
    assert "bf16 on cpu" in capsys.readouterr().out
    config, _ = read_run_config(run)
    summary = json.loads((run / "summary.json").read_text())
    assert (config.amp, config.base_dtype, summary["amp"]) == ("bf16", "bf16", "bf16")
    assert summary["threads"] == torch.get_num_threads()
    for words, precision in (([], "bf16"), (["--amp", "fp32"], "fp32")):
        assert evaluate.main([str(run), "--device", "cpu", *words]) == 0
        first, second, *_ = capsys.readouterr().out.splitlines()
        assert f", {precision})" in first
        wanted = f"accuracy {100 * summary['best']['accuracy']:.2f} %", f"log loss {summary['best']['val_loss']:.4f}"
        assert all(text in second for text in wanted) or precision == "fp32"
    loaded = load_run(run)
    assert loaded.amp == "bf16" and loaded.model.head.weight.dtype == torch.float32


def test_a_run_of_version_0_1_is_resumed_and_scored_in_float32(fast_bf16, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "classify-stopped", run)
    assert train.main(["--resume", str(run), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "resumed from" in printed and "fp32 on cpu" in printed and "bf16" not in printed
    assert read_run_config(run)[0].amp == "auto"
    for name in ("run", "classify"):
        folder = run if name == "run" else FIXTURES / name
        assert load_run(folder).amp == "fp32"


def test_an_unsettled_auto_is_float32_on_a_cpu(fast_bf16):
    assert choose_amp(Config(), CPU) == "fp32"
    assert choose_amp(Config(base_dtype="bf16"), CPU) == "bf16"
