"""Key tables: our parameter names beside those of transformers, timm, open_clip and torchvision.

A table is a list of `Entry(ours, theirs, form)`. Most entries rename one tensor. "cat" joins
several of ours (q, k, v) into one of theirs along dimension 0; the other forms reshape or
transpose. `to_ours` reads a downloaded file, `to_theirs` writes one that the other library loads.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from reference_models.errors import ModelError


class Entry(NamedTuple):
    """One row: our names (several only for "cat"), theirs, and how the values correspond."""

    ours: tuple[str, ...]
    theirs: str
    form: str = "same"


def _kernel(weight: Tensor) -> Tensor:
    # (d, 3 * p * p) -> (d, 3, p, p): a square kernel over RGB
    side = round((weight.shape[1] / 3) ** 0.5)
    return weight.reshape(weight.shape[0], 3, side, side)


# form: (ours -> theirs, theirs -> ours), for one tensor
FORMS = {
    "same": (lambda t: t, lambda t: t),
    # a bare matrix used as x @ P beside an nn.Linear's weight
    "transpose": (lambda t: t.T, lambda t: t.T),
    # the patch embedding: a convolution's kernel beside our Linear's weight
    "kernel": (_kernel, lambda t: t.flatten(1)),
    "batch": (lambda t: t.squeeze(0), lambda t: t.unsqueeze(0)),  # (T, d) beside our (1, T, d)
    "scalar": (lambda t: t.reshape(1), lambda t: t.reshape(())),  # (1,) beside our ()
    "vector": (lambda t: t.reshape(-1), lambda t: t.reshape(1, 1, -1)),  # (d,) beside our (1, 1, d)
    # what they multiply by where ours has nothing, shaped like the one of ours that is named
    "ones": (torch.ones_like, None),
    "cat": (None, None),  # these two join several of ours, see `_split` and `_join`
    "cat_without_k": (None, None),  # q, zeros, v: a key bias that is stored and not used
}


def rename(ours: str, theirs: str, form: str = "same") -> Entry:
    """An entry for one tensor of ours."""
    return Entry((ours,), theirs, form)


def linear(ours: str, theirs: str) -> list[Entry]:
    """Weight and bias of a Linear or a norm layer."""
    return [rename(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in ("weight", "bias")]


def fused(ours: Iterable[str], theirs_weight: str, theirs_bias: str | None = None) -> list[Entry]:
    """Several Linears of ours stored as one of theirs, such as timm's qkv."""
    ours = tuple(ours)
    entries = [Entry(tuple(f"{name}.weight" for name in ours), theirs_weight, "cat")]
    return entries + [Entry(tuple(f"{name}.bias" for name in ours), theirs_bias, "cat")] * bool(theirs_bias)


# ours: theirs, of one block with separate projections; "clip" is transformers', 4 and 5 alike
BLOCK = {
    "transformers4": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_proj": "attention.attention.query",
        "attn.k_proj": "attention.attention.key",
        "attn.v_proj": "attention.attention.value",
        "attn.out_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
    "transformers5": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.q_proj": "attention.q_proj",
        "attn.k_proj": "attention.k_proj",
        "attn.v_proj": "attention.v_proj",
        "attn.out_proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "timm": {
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.out_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "clip": {"norm1": "layer_norm1", "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    | {f"attn.{name}": f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")},
    "open_clip": {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
}
QKV = ("attn.q_proj", "attn.k_proj", "attn.v_proj")
# beside these, what a library stores as one: {its name up to "weight" or "bias": ours}
PACKED = {"timm": {"attn.qkv.": QKV}, "open_clip": {"attn.in_proj_": QKV}}

# outside the blocks, of ViT, DeiT, DINOv2 and BEiT in transformers
OUTSIDE = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "norm": "layernorm",
}
# our names of single parameters; the others are layers
PARAMETER = re.compile(r"(token|pos_embed|probe|table|scale|weight|bias|gamma_\d)$")


def rows(ours: str, theirs: str, parts: dict[str, str], packed: dict | None = None) -> list[Entry]:
    """Rows of parts {ours: theirs}, weight and bias of a layer or a single parameter, and of what
    is `packed` (see PACKED); `ours` and `theirs` stand before all names."""
    table = []
    for name, part in parts.items():
        if PARAMETER.search(name):
            table.append(rename(ours + name, theirs + part))
        else:
            table += patches(theirs + part) if name == "patch_embed.proj" else linear(ours + name, theirs + part)
    for part, names in (packed or {}).items():
        table += fused([ours + name for name in names], f"{theirs}{part}weight", f"{theirs}{part}bias")
    return table


def blocks(depth: int, theirs: str, parts: dict[str, str], packed: dict | None = None) -> list[Entry]:
    """The rows of all blocks, in their files `theirs` and a number."""
    return [row for i in range(depth) for row in rows(f"blocks.{i}.", f"{theirs}{i}.", parts, packed)]


def patches(theirs: str, bias: bool = True) -> list[Entry]:
    """Rows of the projection of patches, which in their files is a convolution."""
    kernel = rename("patch_embed.proj.weight", f"{theirs}.weight", "kernel")
    return [kernel, rename("patch_embed.proj.bias", f"{theirs}.bias")][: 1 + bias]


def under(ours: str, theirs: str, table: list[Entry], base: str = "") -> list[Entry]:
    """A tower's own table below `ours` and `theirs`, there without the prefix `base`."""
    return [
        Entry(tuple(ours + name for name in row.ours), theirs + row.theirs.removeprefix(base), row.form)
        for row in table
    ]


def to_ours(state: dict[str, Tensor], table: list[Entry]) -> tuple[dict[str, Tensor], list[str]]:
    """(tensors of `state` by our names, its keys that the table does not know)."""
    known = {entry.theirs: entry for entry in table}
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if key in known:
            entry = known[key]
            if entry.form == "ones" and not (tensor == 1).all():
                raise ModelError(f"{key} is not 1 everywhere, which this model has no place for")
            if entry.form != "ones":
                result.update(zip(entry.ours, _split(entry, tensor), strict=True))
    return result, [key for key in state if key not in known]


def _split(entry: Entry, tensor: Tensor) -> list[Tensor]:
    """Theirs -> the tensors of ours."""
    if not entry.form.startswith("cat"):
        return [FORMS[entry.form][1](tensor)]
    count = len(entry.ours) + (entry.form == "cat_without_k")
    if tensor.shape[0] % count:
        raise ModelError(f"{entry.theirs}: {tensor.shape[0]} rows cannot be split into {count} equal parts")
    parts = tensor.chunk(count)
    return [parts[0], parts[2]] if entry.form == "cat_without_k" else list(parts)


def _join(entry: Entry, parts: list[Tensor]) -> Tensor:
    """The tensors of ours -> theirs."""
    if entry.form == "cat_without_k":
        return torch.cat([parts[0], torch.zeros_like(parts[0]), parts[1]])
    return torch.cat(parts) if entry.form == "cat" else FORMS[entry.form][0](parts[0])


def to_theirs(state: dict[str, Tensor], table: list[Entry]) -> dict[str, Tensor]:
    """Translate `state` (our names) into theirs; rows that the model lacks are left out."""
    result, used = {}, set()
    for entry in table:
        parts = [state[name] for name in entry.ours if name in state]
        if len(parts) == len(entry.ours):
            used.update(entry.ours)
            result[entry.theirs] = _join(entry, parts).contiguous()
    if missed := [name for name in state if name not in used]:
        raise ModelError(f"this layout has no place for {', '.join(missed[:5])}; save with layout='minilora' instead")
    return result


def is_head(key: str) -> bool:
    """Whether it is another library's classifier, which stands outside the encoder's prefix."""
    return key.startswith(("classifier.", "head.", "heads.", "cls."))


def prefixed(state: dict, prefixes: tuple[str, ...]):
    """{key to look for: key of `state`}: as it is, and with each prefix that a family's tables use
    in place of another one or of none, on the keys that have that."""
    yield {key: key for key in state}
    for wanted in dict.fromkeys(prefixes):
        for prefix in dict.fromkeys((*prefixes, "")):
            names = {_renamed(key, prefix, wanted): key for key in state}
            if wanted != prefix and len(names) == len(state):
                yield names


def _renamed(key: str, prefix: str, wanted: str) -> str:
    stays = not key.startswith(prefix) or is_head(key) or (not prefix and key.startswith(wanted))
    return key if stays else wanted + key.removeprefix(prefix)


WRAPPERS = ("module.", "model.", "backbone.", "student.", "teacher.", "auto_model.", "0.")
# of torch.compile, and of BERT's first files
RENAMED = {"_orig_mod.": "", "LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def strip_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop what wrappers put before the names: DistributedDataParallel, torch.compile, a `model.`
    or `student.backbone.` around it, on most of the keys and in any order."""
    for old, new in RENAMED.items():
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    for wrapper in WRAPPERS:
        inner = {key.removeprefix(wrapper): tensor for key, tensor in state.items()}
        if 2 * sum(key.startswith(wrapper) for key in state) > len(state) == len(inner):
            return strip_wrappers(inner)
    return state


def file_layout(config, layouts: Iterable[str], layout: str) -> str:
    """The one of a family's layouts that is meant, or "minilora"; ModelError where it has none."""
    known = {layout: layout for layout in ("minilora", *layouts)}
    if "transformers4" in known:
        known |= dict.fromkeys(("transformers", "transformers5"), "transformers4")
    if layout not in known:
        raise ModelError(f"{config.name} cannot be written in the layout {layout!r}; it knows {', '.join(known)}")
    return known[layout]
