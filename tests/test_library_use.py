"""minilora on models that are not ours: train two steps, save, load into a fresh copy, merge.

Each test is an example that can be copied: the four calls are the whole interface.
"""

import copy

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from minilora import LoRAConfig, count_parameters, inject_lora, load_adapter, merge_lora, save_adapter
from tests.support.helpers import adapted, logits_of, same_bits, snapshot, train_steps


def torchvision_vit():
    """torchvision keeps attention in nn.MultiheadAttention, whose weights are read directly: adapt the MLPs."""
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 16, 32, num_classes=3)
    nn.init.normal_(model.heads.head.weight, std=0.1)  # torchvision starts with zeros: no gradient could pass
    return model, LoRAConfig(target_modules=("mlp.0", "mlp.3"), modules_to_save=("heads",)), 4


def timm_vit():
    """timm's fused qkv is one linear layer like any other."""
    sizes = {"img_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 3}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    return model, LoRAConfig(target_modules=("qkv", "fc1"), modules_to_save=("head",), use_rslora=True), 4


def transformers_bert():
    """query and value are the names in transformers' BERT."""
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16, num_labels=3)
    model = transformers.BertForSequenceClassification(config)
    return (model, LoRAConfig(target_modules=("query", "value"), modules_to_save=("classifier",), use_dora=True), 4)


def logits(output) -> torch.Tensor:
    """The logits in what a model of any of the three libraries returns."""
    return getattr(output, "logits", output)


def example_input(model: nn.Module) -> torch.Tensor:
    return torch.randint(0, 40, (3, 9)) if "Bert" in type(model).__name__ else torch.randn(3, 3, 32, 32)


@pytest.mark.parametrize("build", [torchvision_vit, timm_vit, transformers_bert], ids=lambda build: build.__name__)
def test_two_steps_move_the_trained_tensors_alone_and_survive_saving_loading_and_merging(build, tmp_path):
    base, config, layers = build()
    x = example_input(base)

    model = inject_lora(copy.deepcopy(base), config)
    count = count_parameters(model)
    assert 0 < count.trainable < 0.3 * count.total and len(adapted(model)) == layers

    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    before = snapshot(model)
    losses = train_steps(model.train(), lambda model: logits(model(x)), steps=2)
    assert losses[1] != losses[0]
    after = snapshot(model)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert set(moved) == {name for name, p in model.named_parameters() if p.requires_grad}

    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(base), tmp_path).eval()
    assert same_bits(snapshot(loaded), after)
    wanted = logits_of(model.eval(), x)
    assert torch.equal(logits_of(loaded, x), wanted)

    plain = merge_lora(loaded)
    assert plain.state_dict().keys() == base.state_dict().keys() and not adapted(plain)
    assert torch.allclose(logits_of(plain, x), wanted, atol=1e-5)
