"""Reference definition of additive attention in plain torch, with all pairs of a query and a key stored.

The function is differentiable to any order. Half types are computed in float32 and rounded once, at the end. Hidden
keys and values do not affect a query, even if they are NaN.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted values, and the weights softmax_j(sum_h v_h tanh(query_ih + key_jh)).

    Args:
        query: [B, Tq, H]. key: [B, Tk, H]. value: [B, Tk, Dv]. v: [H].
        mask: bool [B | 1, Tq | 1, Tk], True for the keys that a query attends to.
        lengths: [B] number of keys of each sequence.
    Returns:
        out: [B, Tq, Dv], dtype of query; 0 for a query that attends to no key. weights: [B, Tq, Tk], float32 or wider.
    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        https://arxiv.org/abs/1409.0473
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    seen = visible(query, key, mask, lengths).unsqueeze(-1)  # [B, Tq, Tk, 1]
    pairs = torch.where(seen, query.to(wide).unsqueeze(2) + key.to(wide).unsqueeze(1), 0)
    scores = (torch.tanh(pairs) @ v.to(wide)).masked_fill(~seen.squeeze(-1), -math.inf)
    # Queries without keys use a denominator of 1; a division by 0 has a NaN derivative.
    top = scores.detach().amax(-1, keepdim=True) if key.shape[1] else scores.new_zeros(*scores.shape[:-1], 1)
    exps = torch.exp(scores - top.masked_fill(top == -math.inf, 0))
    total = exps.sum(-1, keepdim=True)
    weights = exps / total.masked_fill(total == 0, 1)
    values = torch.where(seen, value.to(wide).unsqueeze(1), 0)  # [B, Tq, Tk, Dv]
    return (weights.unsqueeze(-1) * values).sum(2).to(query.dtype), weights


def visible(query: Tensor, key: Tensor, mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """[B, Tq, Tk] whether a query attends to a key."""
    B, Tq, Tk = query.shape[0], query.shape[1], key.shape[1]
    seen = torch.ones(B, Tq, Tk, dtype=torch.bool, device=query.device)
    if mask is not None:
        seen = seen & mask
    if lengths is not None:
        seen = seen & (torch.arange(Tk, device=query.device) < lengths[:, None, None])
    return seen
