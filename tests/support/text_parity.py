"""What the parity tests of BERT, CLIP and MobileNet share: random oracles, files made from them, comparisons."""

import itertools
import re
from collections import defaultdict

import torch
from safetensors.torch import save_file
from torch import nn

from reference_models.files.names import to_ours
from reference_models.load import family_module
from tests.support.parity import BOUNDS, distance


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and statistic of an oracle its own random values; norm scales near 1, variances positive."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, module in model.named_modules() if "Norm" in type(module).__name__}
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name in norms:
                tensor.copy_(1 + 0.2 * noise)
            elif name.endswith("running_var"):
                tensor.copy_(1 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif "logit_scale" in name:
                tensor.copy_(1.5 + 0.1 * noise)
            else:
                fan_in = tensor[0].numel() if tensor.dim() > 1 else 25
                tensor.copy_(noise * (fan_in**-0.5 if "embed" not in name else 0.5))
    return model.eval()


def write_checkpoint(directory, state: dict, config: dict | None = None, name: str = "model.safetensors"):
    """A folder like a downloaded one: config.json (if given) and the weights."""
    import json

    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.detach().clone().contiguous() for key, tensor in state.items()}, directory / name)
    if config is not None:
        file = "open_clip_config.json" if "model_cfg" in config else "config.json"
        (directory / file).write_text(json.dumps(config))
    return directory


def mutations(table, state: dict, count: int | None = None, seed: int = 0):
    """Key tables in which two entries of equal shape and form have changed places, one pair at a time."""
    alike = defaultdict(list)
    for i, entry in enumerate(table):
        if entry.theirs in state:
            alike[tuple(state[entry.theirs].shape), entry.form].append(i)
    pairs = [pair for rows in alike.values() for pair in itertools.combinations(rows, 2)]
    if count is not None and count < len(pairs):
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count]
        pairs = [pairs[i] for i in order]
    for i, j in pairs:
        mutant = list(table)
        mutant[i] = table[i]._replace(theirs=table[j].theirs)
        mutant[j] = table[j]._replace(theirs=table[i].theirs)
        yield f"{table[i].theirs} <-> {table[j].theirs}", mutant


def surviving_mutants(model: nn.Module, state: dict, table, run, expected: torch.Tensor, count=None) -> list[str]:
    """Swaps of the key table that the parity test would not notice. `run(model)` is compared with `expected`."""
    ignored = family_module(model.config.family).ignored
    survivors = []
    for what, mutant in mutations(table, state, count):
        tensors, unknown = to_ours(state, mutant)
        assert not unknown, (unknown, ignored)
        model.load_state_dict(tensors, strict=False)
        with torch.no_grad():
            if distance(run(model), expected) <= 1e-4:
                survivors.append(what)
    return survivors


def check_lora_gradients(model: nn.Module, theirs: nn.Module, names: dict, loss) -> None:
    """LoRA gradients of ours and of peft's, same weights and adapters, agree to 1e-9 of their largest in float64.

    names: {our layer: their layer}, of which those with LoRA count; loss(model) -> scalar.
    """
    from minilora import LoRALinear

    model.double(), theirs.double()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    names = {ours: name for ours, name in names.items() if ours in layers}
    assert layers and len(names) == len(layers)
    peft_layers = dict(theirs.named_modules())
    with torch.no_grad():
        for ours, name in names.items():
            for kind in ("lora_A", "lora_B"):
                weight = getattr(peft_layers[name], kind)["default"].weight
                weight.copy_(torch.randn_like(weight) * 0.1)
                getattr(layers[ours], kind).weight.copy_(weight)
    loss(model).backward()
    loss(theirs).backward()
    for ours, name in names.items():
        for kind in ("lora_A", "lora_B"):
            mine = getattr(layers[ours], kind).weight.grad
            other = getattr(peft_layers[name], kind)["default"].weight.grad
            assert mine.abs().max() > 0, f"{ours}.{kind} has no gradient"
            assert (mine - other).abs().max() <= BOUNDS[torch.float64] * other.abs().max(), f"{ours}.{kind}"


def key_biases_agree(model: nn.Module, state: dict, layout: str) -> bool:
    """The biases of the keys, the one thing that no output tells apart, are those of the same layers."""
    own = model.state_dict()
    names = [e for e in model.key_table(layout) if e.form == "same" and e.ours[0].endswith("k_proj.bias")]
    return all(
        torch.equal(own[e.ours[0]], state[e.theirs]) and re.findall(r"\d+", e.ours[0]) == re.findall(r"\d+", e.theirs)
        for e in names
    )


def adapted_pairs(model: nn.Module, layout: str, prefix: str = "") -> dict[str, str]:
    """{our linear layer: theirs} by the key table, for layers that are one tensor in both."""
    return {
        entry.ours[0].removesuffix(".weight"): prefix + entry.theirs.removesuffix(".weight")
        for entry in model.key_table(layout)
        if entry.form == "same" and entry.ours[0].endswith(".weight")
    }
