"""The spectrum of an update: known singular values, known directions, and LoRA layers in a model."""

import math

import pytest
import torch
from torch import nn

from minilora import inject
from minilora.report import spectrum as sp


def orthogonal(rows, columns):
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64))[0]


def test_known_singular_values_norm_and_effective_rank_are_recovered_to_1e_6():
    values = torch.tensor([3.0, 1.0, 0.25], dtype=torch.float64)
    delta = orthogonal(20, 3) * values @ orthogonal(12, 3).T
    weight = torch.randn(20, 12, dtype=torch.float64)
    layer = sp.layer_spectrum("q", weight, delta)
    assert layer.singular_values == pytest.approx(values.tolist(), abs=1e-6)
    assert layer.norm == pytest.approx(math.sqrt(10.0625), abs=1e-6)
    assert layer.relative_norm == pytest.approx(math.sqrt(10.0625) / float(weight.norm()), abs=1e-6)
    shares = [v / 4.25 for v in values.tolist()]
    assert layer.effective_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)), abs=1e-6)


def test_equal_singular_values_have_an_effective_rank_of_their_number():
    layer = sp.layer_spectrum("q", torch.randn(9, 9), orthogonal(9, 4) @ orthogonal(9, 4).T)
    assert layer.effective_rank == pytest.approx(4, abs=1e-6) and len(layer.singular_values) == 4


def test_an_update_along_the_leading_directions_overlaps_fully_and_one_across_not_at_all():
    u, v = orthogonal(16, 16), orthogonal(16, 16)
    weight = u * torch.linspace(16, 1, 16, dtype=torch.float64) @ v.T
    along = sp.layer_spectrum("q", weight, u[:, :2] @ v[:, :2].T)
    across = sp.layer_spectrum("q", weight, u[:, -2:] @ v[:, -2:].T)
    assert [along.row_overlap, along.column_overlap] == pytest.approx([1, 1], abs=1e-6)
    assert across.row_overlap == pytest.approx(0, abs=1e-6)
    assert along.amplification == pytest.approx(math.sqrt(2) / math.hypot(16, 15), abs=1e-6)
    assert along.random_overlap == (2 / 16, 2 / 16)


def test_an_update_of_nothing_has_rank_0_and_no_nan():
    layer = sp.layer_spectrum("q", torch.randn(4, 6), torch.zeros(4, 6))
    assert (layer.norm, layer.effective_rank, layer.k, layer.amplification) == (0, 0, 0, 0)
    assert "nan" not in sp.format_spectrum({"run": [layer]})


def test_lora_updates_are_those_of_the_layers_and_their_rank_is_r():
    model = nn.ModuleDict({"q_proj": nn.Linear(10, 14), "other": nn.Linear(10, 14)})
    config = inject.LoRAConfig(r=3, lora_alpha=6, target_modules=("q_proj",), init_lora_weights=False)
    inject.inject_lora(model, config)
    ((name, weight, delta),) = sp.lora_updates(model)
    layer = model["q_proj"]
    assert name == "q_proj" and torch.equal(weight, layer.base_layer.weight)
    assert torch.allclose(delta, 2 * layer.lora_B.weight @ layer.lora_A.weight)
    assert len(sp.spectrum([(name, weight, delta)])[0].singular_values) == 3


def test_full_updates_are_the_matrices_that_moved():
    before = {
        "a.weight": torch.ones(3, 4),
        "a.bias": torch.ones(3),
        "b.weight": torch.ones(2, 2),
        "n.weight": torch.ones(3),
    }
    after = {key: value.clone() for key, value in before.items()}
    after["a.weight"][0, 0] = 3.0
    after["a.bias"][0] = 3.0
    ((name, weight, delta),) = sp.full_updates(before, after)
    assert name == "a" and delta[0, 0] == 2 and delta.sum() == 2 and weight is before["a.weight"]


def test_the_table_has_a_line_per_layer_and_ends_with_how_to_read_it():
    layers = sp.spectrum([(f"blocks.{i}.q", torch.randn(8, 8), torch.randn(8, 8)) for i in range(3)])
    text = sp.format_spectrum({"lora": layers, "full": layers})
    assert text.count("blocks.1.q") == 2 and text.endswith(sp.HOW_TO_READ)
    table = sp.spectrum_table(layers)  # what a page shows
    assert [row[0] for row in table.rows] == [layer.name for layer in layers] and table.note == sp.HOW_TO_READ


def test_runs_that_changed_other_layers_are_drawn_by_name(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(sp, "save_figure", lambda pyplot, figure, path: drawn.append(figure) or pyplot.close(figure))
    layers = sp.spectrum([(name, torch.randn(8, 8), torch.randn(8, 8)) for name in ("q", "v", "head")])
    sp.spectrum_figure({"lora": layers[:2], "linear": layers[2:], "all": layers}, tmp_path / "s.png")
    lines = [list(line.get_xdata()) for line in drawn[0].axes[0].lines]
    assert lines == [[0, 1], [2], [0, 1, 2]]
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["q", "v", "head"]


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    layers = sp.spectrum([("q", torch.randn(8, 8), torch.randn(8, 2) @ torch.randn(2, 8))])
    assert sp.spectrum_figure({"lora": layers}, tmp_path / "s.png") and (tmp_path / "s.png").stat().st_size > 5000
