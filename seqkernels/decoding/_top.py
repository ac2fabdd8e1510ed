"""The largest elements of a row, in an order that does not depend on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALLEST_CHUNK = 32  # maxima of fewer elements, or of a number that is not a power of two, are slow on a CPU
CHUNKED = 512  # from this number of elements on, most are excluded by the maxima of chunks


def top(scores: Tensor, offset: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest elements of offset[..., None] + scores of each sentence; of equal ones, those of lower index.

    Args:
        scores: [B, K, V] float32 or float64, at most 0 as log-probabilities are; NaN counts as -inf.
        offset: [B, K], of the same dtype, at most 0.
    Returns:
        values: [B, min(k, K * V)], in descending order. index: int64, k_i * V + v_i of each.
    """
    B, K, V = scores.shape
    k = min(k, K * V)
    if K * V <= CHUNKED:
        return _sorted((offset[:, :, None] + scores).view(B, K * V), k)
    # The k largest elements lie in the k chunks with the largest maxima: k other chunks have a larger element than any
    # chunk beyond, or an equal one of lower index. Maxima before the sum are those after it, as rounding is monotone.
    C = max(SMALLEST_CHUNK, 1 << round(math.log2(K * V / k) / 2))  # near the least number of candidates in both stages
    M = -(-V // C)
    maxima = scores[:, :, : V // C * C].unflatten(2, (V // C, C)).amax(-1)
    if V % C:
        maxima = torch.cat((maxima, scores[:, :, V // C * C :].amax(-1, keepdim=True)), -1)
    _, chunks = _sorted((offset[:, :, None] + maxima).view(B, K * M), min(k, K * M))
    chunks = chunks.sort(dim=1).values
    row = chunks // M
    index = (chunks * C - row * (M * C - V))[:, :, None] + torch.arange(C, device=scores.device)  # [B, chunks, C]
    beyond = None
    if V % C:
        beyond = index >= ((row + 1) * V)[:, :, None]
        index = index.clamp_max(K * V - 1)
    found = scores.reshape(B, K * V).gather(1, index.flatten(1)).view(index.shape)
    found = offset.gather(1, row)[:, :, None] + found
    if beyond is not None:
        found.masked_fill_(beyond, -math.inf)
    values, at = _sorted(found.flatten(1), k)
    return values, index.flatten(1).gather(1, at)


def _sorted(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [B, n], in the order of `top`, and their indices; torch.topk has no such order."""
    if scores.dtype != torch.float32:
        values, index = scores.nan_to_num(nan=-math.inf, neginf=-math.inf).sort(dim=1, descending=True, stable=True)
        return values[:, :k], index[:, :k]
    # One integer of magnitude and index, unequal to all others. The bits of floats without sign have their order, as
    # integers, and those of NaN come last.
    bits = scores.abs().view(torch.int32)
    keys = torch.add(torch.arange(scores.shape[1], device=scores.device), bits, alpha=1 << 32)
    index = keys.topk(k, dim=1, largest=False).values & 0xFFFFFFFF
    return scores.gather(1, index).nan_to_num(nan=-math.inf, neginf=-math.inf), index
