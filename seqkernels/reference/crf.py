"""Reference definition of linear-chain conditional random fields in plain torch, one step at a time, in float64.

The functions are differentiable to any order. Transitions of -inf forbid a pair of tags. Excluded steps do not affect a
sequence, even if they are NaN.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._log_space import log_sum


def log_partition_and_score(
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None = None,
    end: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    tags: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log Z, the logarithm of the sum of e^score over all paths of a sequence, and the score of one path.

    Args:
        emissions: [B, T, K] score of a tag at a step.
        transitions: [B | 1, T | 1, K, K] score of a pair of tags, from and to; row t is for the step into t.
        start, end: [K] score of the first and the last tag.
        lengths: [B]; mask: [B, T], True for the steps of a sequence.
        tags: [B, T] int64, the path; unused at excluded steps.
    Returns:
        log_z: [B] float64; 0 for a sequence without steps, -inf if all paths are forbidden. score: [B] float64; zeros
        without tags.
    Source: Lafferty, McCallum and Pereira, "Conditional Random Fields", 2001.
    """
    B, T, K = emissions.shape
    visible = steps_of(emissions, lengths, mask)
    steps = torch.where(visible[:, :, None], emissions.double(), 0)
    pairs = transitions.double().expand(transitions.shape[0], T, K, K)
    first = steps.new_zeros(K) if start is None else start.double()
    last = steps.new_zeros(K) if end is None else end.double()
    alpha = steps.new_zeros(B, K)
    score = steps.new_zeros(B)
    begun = torch.zeros(B, dtype=torch.bool, device=emissions.device)
    before = torch.zeros(B, dtype=torch.int64, device=emissions.device)
    for t in range(T):
        here = visible[:, t]
        entered = torch.where(begun[:, None], log_sum(alpha[:, :, None] + pairs[:, t], 1), first)
        alpha = torch.where(here[:, None], entered + steps[:, t], alpha)
        if tags is not None:
            tag = torch.where(here, tags[:, t], 0)
            pair = pairs[:, t].expand(B, K, K)[torch.arange(B, device=tags.device), before, tag]
            step = torch.where(begun, pair, first[tag]) + steps[:, t].gather(1, tag[:, None])[:, 0]
            score = score + torch.where(here, step, 0)
            before = torch.where(here, tag, before)
        begun = begun | here
    log_z = torch.where(begun, log_sum(alpha + last, 1), 0)
    if tags is not None:
        score = score + torch.where(begun, last[before], 0)
    return log_z, score


def steps_of(emissions: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, T] whether a step belongs to its sequence."""
    B, T, _ = emissions.shape
    if mask is not None:
        return mask.bool()
    if lengths is None:
        return torch.ones(B, T, dtype=torch.bool, device=emissions.device)
    return torch.arange(T, device=emissions.device) < lengths[:, None]
