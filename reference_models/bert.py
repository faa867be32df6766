"""BERT: token, position and segment embeddings, then transformer blocks with the norm
after each addition.

Paper: Devlin et al. 2018, arXiv:1810.04805; the small sizes: Turc et al. 2019, arXiv:1908.08962.
Shapes: B sentences (or pairs), T tokens with [CLS] first, d width. Dropout is left out: a frozen or
adapted encoder is regularised by the adapters' own.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from reference_models.errors import ModelError
from reference_models.files.names import Entry, linear, rename
from reference_models.layers import (
    MLP,
    Attention,
    Pooler,
    collect_attention_maps,
    init_weights,
    padding_mask,
    run_blocks,
    take_rows,
)

#             vocabulary positions width depth heads hidden
SIZES = {
    "bert-nano": (4000, 128, 128, 3, 4, 512),
    "bert-tiny": (30522, 512, 128, 2, 2, 512),
    "bert-base": (30522, 512, 768, 12, 12, 3072),
}


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT. max_positions is the longest input; type_vocab the number of segments."""

    name: str = "bert-base"
    vocab_size: int = 30522
    max_positions: int = 512
    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    type_vocab: int = 2
    eps: float = 1e-12
    act: str = "gelu"
    pooler: bool = True
    family: str = "bert"


class PostNormBlock(nn.Module):
    """x = norm1(x + attn(x)); x = norm2(x + mlp(x)), (B, T, d) -> (B, T, d), or (B,
    1, d) with `rows`."""

    def __init__(self, dim: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden, act)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        x = self.norm1(take_rows(x, rows) + self.attn(x, mask, rows=rows))
        return self.norm2(x + self.mlp(x))


class Embeddings(nn.Module):
    """norm(word + position + token_type), ids (B, T) -> (B, T, d)."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.max_positions, config.dim)
        self.token_type = nn.Embedding(config.type_vocab, config.dim)
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        B, T = input_ids.shape
        if T > self.position.num_embeddings:
            raise ValueError(f"{T} tokens, but this model has positions for {self.position.num_embeddings}")
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        positions = torch.arange(T, device=input_ids.device)
        return self.norm(self.word(input_ids) + self.token_type(token_type_ids) + self.position(positions))


class Bert(nn.Module):
    """Token ids (B, T) -> (last_hidden_state (B, T, d), pooled (B, d), or None without pooler).

    attention_mask (B, T) is 1 for tokens and 0 for padding, None for no padding. `pooled`
    computes in the last block only what [CLS] needs; `pooled_last_block = False` computes all
    tokens to the end.
    """

    head_modules = ()
    layouts = ("transformers5", "transformers4")

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.num_features = config, config.dim
        self.embeddings = Embeddings(config)
        block = (config.dim, config.heads, config.hidden, config.act, config.eps)
        self.blocks = nn.ModuleList(PostNormBlock(*block) for _ in range(config.depth))
        self.pooler = Pooler(config.dim) if config.pooler else None
        self.grad_checkpointing, self.pooled_last_block = False, True
        self.apply(init_weights)

    def forward_features(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        last_rows: int | None = None,
    ) -> Tensor:
        """All tokens after the last block (B, T, d); with last_rows only that one, (B, 1, d)."""
        x = self.embeddings(input_ids, token_type_ids)  # (B, T, d)
        mask = padding_mask(attention_mask)  # (B, 1, 1, T)
        return run_blocks(self.blocks, x, mask, checkpointing=self.grad_checkpointing, last_rows=last_rows)

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """tanh(W [CLS] + b), or [CLS] itself without pooler: (B, d)."""
        rows = 0 if self.pooled_last_block else None
        token = self.forward_features(input_ids, attention_mask, token_type_ids, rows)[:, 0]
        return token if self.pooler is None else self.pooler(token)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """input_ids, attention_mask (1 token, 0 padding), token_type_ids: (B, T) -> hidden (B, T,
        d), pooled (B, d).

        Raises ValueError for more tokens than the model has positions.
        """
        x = self.forward_features(input_ids, attention_mask, token_type_ids)
        return x, None if self.pooler is None else self.pooler(x[:, 0])

    def attention_maps(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> list[Tensor]:
        """One (B, heads, T, T) tensor for each layer; every row sums to 1."""
        return collect_attention_maps(self, lambda: self.forward_features(input_ids, attention_mask, token_type_ids))

    def key_table(self, layout: str) -> list[Entry]:
        return key_table(self.config, layout)


# ---- what load.py asks of a family: names, key tables, sizes, configuration files

build = Bert
layouts = {"transformers4": ("", "bert."), "transformers5": ("", "bert.")}
# heads of the pre-training and fine-tuned models; a buffer
ignored = r"^cls\.|^classifier\.|position_ids$"
optional = r"^pooler"
layout_settings = {}
preprocess = {}

PARTS = {
    "attn.q_proj": "attention.self.query",
    "attn.k_proj": "attention.self.key",
    "attn.v_proj": "attention.self.value",
    "attn.out_proj": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "norm2": "output.LayerNorm",
}

FIELDS = {  # ours: (transformers' name in config.json, its default)
    "vocab_size": ("vocab_size", 30522),
    "max_positions": ("max_position_embeddings", 512),
    "dim": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "hidden": ("intermediate_size", 3072),
    "type_vocab": ("type_vocab_size", 2),
    "eps": ("layer_norm_eps", 1e-12),
    "act": ("hidden_act", "gelu"),
}


def names() -> list[str]:
    return list(SIZES)


def config_for(name: str) -> BertConfig | None:
    """bert-nano, bert-tiny or bert-base; None where the name is of another family."""
    if name not in SIZES:
        return None
    vocabulary, positions, dim, depth, heads, hidden = SIZES[name]
    return BertConfig(name, vocabulary, positions, dim, depth, heads, hidden)


def key_table(config: BertConfig, layout: str) -> list[Entry]:
    """Our names beside those of transformers' BertModel, versions 4 and 5 alike."""
    table = [
        rename(f"embeddings.{ours}.weight", f"embeddings.{ours}_embeddings.weight")
        for ours in ("word", "position", "token_type")
    ]
    table += linear("embeddings.norm", "embeddings.LayerNorm")
    table += linear("pooler.dense", "pooler.dense")
    for i in range(config.depth):
        for ours, theirs in PARTS.items():
            table += linear(f"blocks.{i}.{ours}", f"encoder.layer.{i}.{theirs}")
    return table


def fit_config(config: BertConfig, shapes: dict[str, tuple]) -> BertConfig:
    """A file without pooler (masked language models have none) makes a model without one."""
    return replace(config, pooler="pooler.dense.weight" in shapes)


def adapt(state: dict[str, Tensor], old: BertConfig, new: BertConfig) -> None:
    """Positions of text are not interpolated."""


def config_from_json(data: dict) -> BertConfig | None:
    """Read transformers' config.json; None where it is of another family."""
    if data.get("model_type") != "bert":
        return None
    if (kind := data.get("position_embedding_type", "absolute")) != "absolute":
        raise ModelError(f"config.json: position_embedding_type {kind!r} is not supported, only 'absolute'")
    values = {ours: data.get(theirs, default) for ours, (theirs, default) in FIELDS.items()}
    return BertConfig(name=f"bert-{values['dim']}-{values['depth']}", **values)


def config_to_json(config: BertConfig, layout: str) -> dict:
    """config.json as transformers reads it."""
    values = {theirs: getattr(config, ours) for ours, (theirs, _) in FIELDS.items()}
    fixed = {"architectures": ["BertModel"], "model_type": "bert", "pad_token_id": 0}
    return {**fixed, "position_embedding_type": "absolute", **values}
