"""No approximations: every speed switch, off and on, gives the same losses over 20 steps, in ViT, BERT and CLIP."""

import pytest
import torch

from minilora import speed
from minilora.speed import gemm
from minilora.tasks.choice import task as choice
from reference_models import layers
from tests.support.lora_steps import train

SWITCHES = {
    "speed": lambda patch, step: patch.setattr(speed, "enabled", False),
    "fused attention": lambda patch, step: patch.setattr(layers, "fused_attention", False),
    "pooled last block": lambda patch, step: step.set("pooled_last_block", False),
    "gradient checkpointing": lambda patch, step: step.set("grad_checkpointing", True),
    "oneDNN": lambda patch, step: patch.setattr(gemm, "onednn", gemm.available) or gemm.speed_up(step.model),
}
CASES = [(model, switch) for model in ("vit", "bert", "clip") for switch in SWITCHES]


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(gemm, "onednn", False)
    monkeypatch.setattr(gemm, "SMALLEST", 0)
    return monkeypatch


@pytest.mark.parametrize(("model", "switch"), CASES)
def test_no_switch_changes_the_losses_of_20_steps(plain, model, switch):
    expected = train(model)
    changed = train(model, lambda step: SWITCHES[switch](plain, step))
    torch.testing.assert_close(changed, expected, rtol=0, atol=1e-5)
    assert expected[-1] < expected[0]


def test_the_shared_beginning_of_a_clips_choices_changes_no_loss(plain):
    expected = train("clip")
    plain.setattr(choice, "share_prefix", True)
    torch.testing.assert_close(train("clip"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("left_out", ["speed", "oneDNN"])  # without speed there is no oneDNN
@pytest.mark.parametrize("model", ["vit", "bert", "clip"])
def test_all_switches_at_once_change_no_loss(plain, model, left_out):
    expected = train(model)

    def turn(step):
        for name, switch in SWITCHES.items():
            if name != left_out:
                switch(plain, step)

    torch.testing.assert_close(train(model, turn), expected, rtol=0, atol=1e-5)
