"""Helpers for the tests that compare our encoders with those of other libraries.

An oracle is a small model of transformers, timm, torchvision or open_clip. `fill` gives every tensor of it its own
random values, so that two tensors in each other's place change the result.

One rule for the bounds of all tests. Two ways to compute the same thing are compared in float64 wherever both can be
computed in it, and differ by at most 1e-9 of the deviation of the answer: rounding lies near 1e-14, a mistake in the
mathematics far above. In float32 the rounding belongs to the processor (how it orders the sums, whether it fuses
multiply and add), so there a bound follows from the number of operations or is at least five times the largest
difference seen on any processor: 1e-4 of the deviation for whole models, of which 1.2e-5 was seen (Swin, AVX-512).
"""

import copy
import itertools
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minilora import LoRAConfig, export_adapter, inject_lora, load_adapter
from minilora.inject import lora_layers, lora_state_dict
from reference_models import create_model, load_pretrained, save_pretrained
from reference_models.files.names import Entry, to_ours, to_theirs
from reference_models.load import family_module

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}  # by the rule above
TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Own random values in every parameter: norm scales near 1, temperatures near log 10, the rest around 0."""
    generator = torch.Generator().manual_seed(seed)
    norms = {f"{name}.weight" for name, module in model.named_modules() if "Norm" in type(module).__name__}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name in norms:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("logit_scale"):
                parameter.copy_(2.3 + 0.3 * noise)
            elif name.endswith("bias_table"):
                parameter.copy_(0.7 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 1.0))
    return model.eval()


def chance(seed: int):
    """choose(list) of a seeded random configuration."""
    generator = torch.Generator().manual_seed(seed)
    return lambda options: options[int(torch.randint(len(options), (1,), generator=generator))]


def pictures(size: int | tuple[int, int], batch: int = 2, seed: int = 1) -> Tensor:
    height, width = (size, size) if isinstance(size, int) else size
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference in units of the standard deviation of theirs."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.std()).item()


def logits_of(oracle: nn.Module, x: Tensor, **arguments) -> Tensor:
    """What a transformers, timm or torchvision classifier answers."""
    with torch.no_grad():
        result = oracle(x, **arguments)
    return getattr(result, "logits", result)


def attention_of(model: nn.Module, x: Tensor) -> list[Tensor]:
    """The attention maps of one of our models, or of transformers' with attn_implementation="eager"."""
    return model.attention_maps(x) if hasattr(model, "attention_maps") else model(x, output_attentions=True).attentions


def assert_parity(
    ours: nn.Module, theirs: nn.Module, *inputs: Tensor, ask=logits_of, ask_theirs=None, float32_inside: bool = False
) -> None:
    """Both models answer alike to the inputs, in float64 and in float32, by the rule at the top.

    `ask(model, *inputs)` gives one tensor or several; `ask_theirs` where the other library is asked in another way.
    float32_inside: one of them computes or stores a part in float32 whatever it is given; its bound then holds in both.
    """
    for dtype in BOUNDS:
        bound = BOUNDS[torch.float32 if float32_inside else dtype]
        x = [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]
        with torch.no_grad():
            found = ask(copy.deepcopy(ours).to(dtype), *x)
            wanted = (ask_theirs or ask)(copy.deepcopy(theirs).to(dtype), *x)
        pairs = [(found, wanted)] if isinstance(found, Tensor) else list(zip(found, wanted, strict=True))
        for i, (one, other) in enumerate(pairs):
            assert one.dtype == other.dtype == dtype
            assert distance(one, other) <= bound, f"answer {i}, {dtype}: {distance(one, other):.1e}"


def write_transformers(oracle: nn.Module, folder: Path) -> Path:
    """Their own files: config.json and model.safetensors with the names that transformers writes."""
    oracle.save_pretrained(folder)
    return folder


def write_weights(oracle: nn.Module, folder: Path, config: dict | None = None) -> Path:
    """A folder with the oracle's state dict and the config.json given."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: tensor.contiguous().clone() for key, tensor in oracle.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def assert_round_trip(model: nn.Module, layout: str, folder: Path) -> nn.Module:
    """Ours -> their names -> ours gives the same bits, through the files."""
    back = load_pretrained(save_pretrained(model, folder, layout))
    own, read = model.state_dict(), back.state_dict()
    assert list(own) == list(read)
    assert all(torch.equal(own[key], read[key]) for key in own)
    return back


def swappable_pairs(model: nn.Module, layout: str, limit: int | None, seed: int = 0) -> list[tuple[Entry, Entry]]:
    """Pairs of table entries whose tensors of ours have equal shapes, a seeded choice of `limit` of them."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    groups: dict[tuple, list[Entry]] = {}
    for entry in model.key_table(layout):
        if all(name in shapes for name in entry.ours):
            groups.setdefault((entry.form, *(shapes[name] for name in entry.ours)), []).append(entry)
    pairs = [pair for group in groups.values() for pair in itertools.combinations(group, 2)]
    # a key's bias moves all scores of a query alike, which softmax does not see: see assert_key_biases
    pairs = [pair for pair in pairs if not all(e.ours[0].endswith("k_proj.bias") for e in pair)]
    if limit is not None and len(pairs) > limit:
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
        pairs = [pairs[i] for i in order[:limit].tolist()]
    return pairs


def assert_swaps_are_noticed(
    model: nn.Module, layout: str, x: Tensor, limit: int | None = 200, tolerance: float = 1e-5
) -> int:
    """Mutation test of a key table: exchange the names of two entries, load again, and the logits must change by
    more than the tolerance of the parity tests. Returns the number of pairs tried.
    """
    family = family_module(model.config.family)
    theirs = to_theirs(model.state_dict(), family.key_table(model.config, layout))
    wrong, expected = copy.deepcopy(model), logits_of(model, x)
    pairs = swappable_pairs(model, layout, limit)
    assert pairs
    for one, other in pairs:
        with torch.no_grad():
            _copy(wrong, {**theirs, one.theirs: theirs[other.theirs], other.theirs: theirs[one.theirs]}, (one, other))
            changed = distance(logits_of(wrong, x), expected)
            _copy(wrong, theirs, (one, other))
        assert changed > tolerance, f"{one.theirs} and {other.theirs} can be exchanged unnoticed ({changed:.1e})"
    assert torch.equal(logits_of(wrong, x), expected)
    return len(pairs)


def _copy(model: nn.Module, theirs: dict[str, Tensor], entries) -> None:
    own = model.state_dict()
    tensors, unknown = to_ours({entry.theirs: theirs[entry.theirs] for entry in entries}, list(entries))
    assert not unknown
    for key, tensor in tensors.items():
        own[key].copy_(tensor)


def assert_key_biases(model: nn.Module, oracle: nn.Module) -> None:
    """The biases of the keys, the one thing that the logits cannot tell apart, lie in the layers where theirs lie."""
    own = [p for name, p in model.named_parameters() if name.endswith("k_proj.bias")]
    theirs = [p for name, p in oracle.named_parameters() if name.endswith(("k_proj.bias", "key.bias"))]
    assert own and all(torch.equal(one, other) for one, other in zip(own, theirs, strict=True))


def adapted(model: nn.Module, targets=TARGETS, r: int = 2) -> nn.Module:
    """The model with LoRA whose B is random, so that every adapter takes part."""
    config = LoRAConfig(
        r=r, lora_alpha=2 * r, target_modules=targets, modules_to_save=("head",), init_lora_weights=False
    )
    return inject_lora(model, config)


def assert_every_adapter_learns(model: nn.Module, x: Tensor, targets=TARGETS) -> None:
    """Every target name finds layers, and every A and B gets a non-zero gradient; every other trained tensor has
    one, no frozen tensor has.
    """
    adapted(model, targets)
    names = {name.rpartition(".")[2] for name, _ in lora_layers(model)}
    assert names == set(targets)
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)) % model.config.num_classes)
    loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        else:
            assert (parameter.grad is not None) == parameter.requires_grad, name


def assert_same_lora_gradients(model: nn.Module, oracle: nn.Module, layout: str, x: Tensor, targets) -> None:
    """LoRA on our model and peft's on theirs, with the same A and B: each gradient within 1e-9 of its size.

    targets: {name of ours: name of theirs}.
    """
    from peft import LoraConfig, get_peft_model

    adapted(model.double(), tuple(targets)).eval()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets.values()))
    peft, x = get_peft_model(oracle.double(), config).eval(), x.double()
    theirs = {e.ours[0].removesuffix(".weight"): e.theirs.removesuffix(".weight") for e in model.key_table(layout)}
    pairs = []
    for name, layer in lora_layers(model):
        other = peft.base_model.model.get_submodule(theirs[name])
        pairs += [(f"{name}.A", layer.lora_A.weight, other.lora_A["default"].weight)]
        pairs += [(f"{name}.B", layer.lora_B.weight, other.lora_B["default"].weight)]
    with torch.no_grad():
        for _, one, other in pairs:
            other.copy_(one)
    labels = torch.arange(len(x)) % model.config.num_classes
    nn.functional.cross_entropy(model(x), labels).backward()
    result = peft(x)
    nn.functional.cross_entropy(getattr(result, "logits", result), labels).backward()
    assert pairs
    for name, one, other in pairs:
        scale = other.grad.abs().max()
        assert scale > 0, name
        assert (one.grad - other.grad).abs().max() / scale <= BOUNDS[torch.float64], name


def assert_checkpointing_is_exact(model: nn.Module, x: Tensor) -> None:
    """Recomputing the blocks in backward gives the same loss and gradients."""
    grads = []
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        grads.append([loss, *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


def assert_keys_of(name: str, listing: str, shared: Path) -> None:
    """The key table of a full-size model has the keys and shapes of a listing in ../shared/data/keys, no more and no
    fewer but for buffers, which are computed here.
    """
    layout = {"hf": "transformers4"}.get(listing.split("_")[0], listing.split("_")[0])
    expected = {}
    for line in (shared / "keys" / f"{listing}.txt").read_text().splitlines():
        if line and not line.startswith("#") and "buffer" not in line:
            key, shape = line.split(maxsplit=1)
            expected[key] = tuple(json.loads(shape[shape.index("[") : shape.index("]") + 1]))
    with torch.device("meta"):
        model = create_model(name)
        state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
        written = to_theirs(state, family_module(model.config.family).key_table(model.config, layout))
    assert {key: tuple(tensor.shape) for key, tensor in written.items()} == expected


def assert_adapter_travels(model: nn.Module, oracle: nn.Module, layout: str, x: Tensor, folder: Path) -> None:
    """An adapter that we export works in peft on their model, comes back with the same bits, and so does peft's own."""
    from peft import PeftModel

    plain = copy.deepcopy(model)
    again = copy.deepcopy(model)
    adapted(model).eval()
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    export_adapter(model, folder / "ours", layout)
    peft = PeftModel.from_pretrained(oracle, str(folder / "ours")).eval()
    assert_parity(peft, model, x)
    load_adapter(plain, folder / "ours")
    trained = lora_state_dict(model)
    assert all(torch.equal(tensor, trained[key]) for key, tensor in lora_state_dict(plain).items())
    peft.save_pretrained(folder / "theirs", save_embedding_layers=False)  # else it asks the network
    load_adapter(again, folder / "theirs")
    assert_parity(again.eval(), model, x)
