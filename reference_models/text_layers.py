"""Which token of a text may look at which: padding, what comes later, and several texts in a row.
Shapes: B texts (or questions), T tokens, C texts for each question, L tokens of a packed row."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from reference_models.layers import Attention, Block


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """(B, T), 0 for padding -> (B, 1, 1, T), True where a query may look; None stays None."""
    return None if attention_mask is None else attention_mask[:, None, None].bool()


def causal_mask(T: int, rows: Tensor | int | None, device) -> Tensor:
    """True where a query may look: itself and before, (T, T), or (B, 1, 1, T) for chosen rows."""
    positions = torch.arange(T, device=device)
    return positions <= (positions[:, None] if rows is None else torch.as_tensor(rows, device=device).view(-1, 1, 1, 1))


class CausalAttention(Attention):
    """A token looks at itself and at those before it, or at what a given mask says."""

    def forward(self, x: Tensor, mask: Tensor | None = None, rows: Tensor | int | None = None) -> Tensor:
        if mask is None and rows is not None:
            mask = causal_mask(x.shape[1], rows, x.device)
        return super().forward(x, mask, rows)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and self.fused(q, k, v):
            # all queries: the one case that torch's kernels know without a mask
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        if mask is None:
            mask = causal_mask(q.shape[-2], None, q.device)
        return super().attend(q, k, v, mask)


class CausalBlock(Block):
    """A pre-norm block whose tokens see only what stands before them."""

    attention = CausalAttention


class Packed(NamedTuple):
    """The texts of a question's choices as one row, their common beginning once: ids, positions
    (B, L); mask (B, L, L), True where a token may look; ends (B, C), where each text ends."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    ends: Tensor


def pack_choices(input_ids: Tensor, ends: Tensor, length: int | None = None) -> Packed:
    """Token ids (B, C, T) of C texts a question, which end at `ends` (B, C) -> a row a question.

    A token of a causal tower depends only on what stands before it, so the tokens of a common
    beginning are the same in all C texts. They stand once in the row, with the first text; each
    text sees them and itself. length: L, at least the tokens of the largest row; None reads it from
    the tensors, for which the host waits for a GPU.
    """
    B, C, T = input_ids.shape
    place = torch.arange(T, device=input_ids.device)
    same = (input_ids == input_ids[:, :1]).all(1)  # (B, T)
    common = same.long().cumprod(1).sum(1).minimum(ends.amin(1))  # (B,), the end tokens stay apart
    first = torch.arange(C, device=input_ids.device)[:, None] == 0
    kept = ((place <= ends[..., None]) & (first | (place >= common[:, None, None]))).flatten(1)
    length = int(kept.sum(1).max()) if length is None else length
    order = kept.long().argsort(dim=1, descending=True, stable=True)[:, :length]  # (B, L)
    choice, position = order // T, order % T
    before = position[:, None, :] <= position[:, :, None]  # (B, L, L): query, key
    seen = (choice[:, None, :] == choice[:, :, None]) | (position < common[:, None])[:, None, :]
    mask = before & seen & kept.gather(1, order)[:, None, :]
    slots = (kept.long().cumsum(1) - 1).view(B, C, T).gather(2, ends[..., None])[..., 0]  # (B, C)
    return Packed(input_ids.flatten(1).gather(1, order), position, mask, slots)
