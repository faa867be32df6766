"""What later models changed in BERT: RoBERTa, XLM-RoBERTa, DistilBERT, MPNet are BERT with options.

    counted positions   token i that is no padding has row pad + i, counted from 1 (RoBERTa, MPNet)
    no token types      one text, or two with only [SEP] between (DistilBERT, MPNet)
    relative bias       scores + bias[bucket(key - query)], one table for all blocks (MPNet)

Papers: RoBERTa, Liu et al. 2019, arXiv:1907.11692; XLM-RoBERTa, Conneau et al. 2019,
arXiv:1911.02116; DistilBERT, Sanh et al. 2019, arXiv:1910.01108; MPNet, Song et al. 2020,
arXiv:2004.09297; the buckets: T5, Raffel et al. 2019, arXiv:1910.10683.
Shapes: B texts, T tokens, h heads, d width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference_models.bert import Bert, BertConfig, Embeddings
from reference_models.layers import init_weights
from reference_models.text_layers import padding_mask


@dataclass(frozen=True)
class BertVariantConfig(BertConfig):
    """A BERT's sizes and its options. kind is transformers' name of the model; pad_id the token
    that positions do not count, where they are `counted`; relative_buckets 0 means no bias."""

    name: str = "roberta-base"
    kind: str = "roberta"
    pad_id: int = 1
    counted: bool = True
    relative_buckets: int = 0
    family: str = "bert_variants"

    @property
    def first_position(self) -> int:
        """As in BertConfig, where positions are counted the row behind the padding's."""
        return self.pad_id + 1 if self.counted else 0


class VariantEmbeddings(Embeddings):
    """Token ids (B, T) -> (B, T, d); positions as they come, or counted."""

    def __init__(self, config: BertVariantConfig):
        super().__init__(config)
        self.counted, self.pad_id = config.counted, config.pad_id

    def positions(self, input_ids: Tensor) -> Tensor:
        if not self.counted:
            return super().positions(input_ids)
        tokens = (input_ids != self.pad_id).long()
        return tokens.cumsum(1) * tokens + self.pad_id


class RelativeBias(nn.Module):
    """table[bucket(key - query)], for T tokens (1, h, T, T). Half of the n buckets are for keys
    before the query: distances 0 to n/4 - 1 have one each, those up to 128 share the rest on a
    logarithmic scale, and what is farther away has the last."""

    def __init__(self, buckets: int, heads: int):
        super().__init__()
        self.table = nn.Embedding(buckets, heads)

    def forward(self, T: int) -> Tensor:
        place = torch.arange(T, device=self.table.weight.device)
        return self.table(self.bucket(place - place[:, None])).permute(2, 0, 1)[None]

    def bucket(self, offset: Tensor) -> Tensor:
        """Key minus query -> 0 .. n - 1, of any shape."""
        half = self.table.num_embeddings // 2
        own, distance = half // 2, offset.abs()
        # the order of operations in which the published weights learned: rounding decides edges
        far = torch.log(distance.clamp(min=1).float() / own) / math.log(128 / own) * (half - own)
        shared = (own + far.long()).clamp(max=half - 1)
        return torch.where(distance < own, distance, shared) + half * (offset > 0)


class BertVariant(Bert):
    """Token ids (B, T) -> (last_hidden_state (B, T, d), pooled (B, d)), as Bert."""

    embeddings_class = VariantEmbeddings

    def __init__(self, config: BertVariantConfig):
        super().__init__(config)
        buckets = config.relative_buckets
        self.relative_bias = RelativeBias(buckets, config.heads).apply(init_weights) if buckets else None

    def mask(self, x: Tensor, attention_mask: Tensor | None) -> Tensor | None:
        """The padding's mask (B, 1, 1, T); with a relative bias both as one, (B, h, T, T)."""
        seen = padding_mask(attention_mask)
        if self.relative_bias is None:
            return seen
        bias = self.relative_bias(x.shape[1])
        return bias if seen is None else bias.masked_fill(~seen, float("-inf"))
