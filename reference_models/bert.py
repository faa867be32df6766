"""BERT: token, position and segment embeddings, then blocks with the norm after each addition.

Paper: Devlin et al. 2018, arXiv:1810.04805; the small sizes: Turc et al. 2019, arXiv:1908.08962.
Shapes: B sentences (or pairs), T tokens with [CLS] first, d width. Dropout is left out: a frozen or
adapted encoder is regularised by the adapters' own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference_models.layers import MLP, Attention, Pooler, collect_attention_maps, init_weights, run_blocks, take_rows
from reference_models.text_layers import padding_mask

POOLINGS = ("pooler", "mean", "cls", "max")


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT. max_positions is the longest input; type_vocab the number of segments;
    pooling one of POOLINGS, see Bert.pool; normalize divides that vector by its length."""

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
    pooling: str = "pooler"
    normalize: bool = False
    family: str = "bert"
    first_position = 0  # the row of the first token; no setting


class PostNormBlock(nn.Module):
    """x = norm1(x + attn(x)); x = norm2(x + mlp(x)), (B, T, d) -> (B, T, d); see layers.Block."""

    def __init__(self, dim: int, heads: int, hidden: int, act: str, eps: float):
        super().__init__()
        self.attn = Attention(dim, heads)
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, hidden, act)
        self.norm2 = nn.LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        x = self.norm1(take_rows(x, rows) + self.attn(x, mask, rows))
        return self.norm2(x + self.mlp(x))


class Embeddings(nn.Module):
    """norm(word + position + token_type), (B, T) -> (B, T, d); type_vocab 0: no token types."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.dim)
        self.position = nn.Embedding(config.max_positions + config.first_position, config.dim)
        self.token_type = nn.Embedding(config.type_vocab, config.dim) if config.type_vocab else None
        self.norm, self.longest = nn.LayerNorm(config.dim, eps=config.eps), config.max_positions

    def positions(self, input_ids: Tensor) -> Tensor:
        """The row of each token, (T,) or (B, T)."""
        return torch.arange(input_ids.shape[1], device=input_ids.device)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
        T = input_ids.shape[1]
        if T > self.longest:
            raise ValueError(f"{T} tokens, but this model has positions for {self.longest}")
        x = self.word(input_ids)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids)
        return self.norm(x + self.position(self.positions(input_ids)))


class Bert(nn.Module):
    """Token ids (B, T) -> (last_hidden_state (B, T, d), pooled (B, d), or None without pooler).
    attention_mask (B, T): 1 for tokens, 0 for padding, None for no padding. `pooled` computes in
    the last block only what [CLS] needs, with `pooled_last_block = False` all tokens."""

    head_modules = ()
    embeddings_class = Embeddings

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config, self.num_features = config, config.dim
        self.embeddings = self.embeddings_class(config)
        block = (config.dim, config.heads, config.hidden, config.act, config.eps)
        self.blocks = nn.ModuleList(PostNormBlock(*block) for _ in range(config.depth))
        if config.pooling not in POOLINGS:
            raise ValueError(f"pooling {config.pooling!r} is not known; the choices are {', '.join(POOLINGS)}")
        # a pooler that is not read would never be trained
        self.pooler = Pooler(config.dim) if config.pooler and config.pooling == "pooler" else None
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
        mask = self.mask(x, attention_mask)
        return run_blocks(self.blocks, x, mask, checkpointing=self.grad_checkpointing, last_rows=last_rows)

    def mask(self, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """What attention is told of tokens x (B, T, d): (B, 1, 1, T) of the padding, or None."""
        return padding_mask(attention_mask)

    def pooled(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """The text's vector by config.pooling, (B, d)."""
        rows = 0 if self.pooled_last_block and self.config.pooling in ("pooler", "cls") else None
        return self.pool(self.forward_features(input_ids, attention_mask, token_type_ids, rows), attention_mask)

    def pool(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (B, T, d) -> (B, d). pooler: tanh(W [CLS] + b), or [CLS] itself without pooler;
        cls: [CLS]; mean, max: over the tokens that the mask keeps, as sentence encoders are trained
        (Reimers and Gurevych 2019, arXiv:1908.10084)."""
        if self.config.pooling in ("pooler", "cls"):
            vector = x[:, 0] if self.pooler is None else self.pooler(x[:, 0])
        else:
            kept = torch.ones_like(x[..., :1]) if attention_mask is None else attention_mask[..., None].to(x.dtype)
            mean = self.config.pooling == "mean"
            vector = (x * kept).sum(1) / kept.sum(1) if mean else x.masked_fill(kept == 0, float("-inf")).amax(1)
        return F.normalize(vector, dim=-1) if self.config.normalize else vector

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """All three (B, T) -> hidden (B, T, d), pooled (B, d); ValueError if T > max_positions."""
        x = self.forward_features(input_ids, attention_mask, token_type_ids)
        without = self.config.pooling == "pooler" and self.pooler is None
        return x, None if without else self.pool(x, attention_mask)

    def attention_maps(self, *inputs: Tensor | None, **named: Tensor | None) -> list[Tensor]:
        """Of inputs as in `forward` one (B, heads, T, T) for each layer; every row sums to 1."""
        return collect_attention_maps(self, lambda: self.forward_features(*inputs, **named))
