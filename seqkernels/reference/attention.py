"""Reference definition of scaled dot-product attention in plain torch, with all scores stored.

The functions are differentiable to any order. Half types are computed in float32 and rounded once, at the end. Masked
keys do not affect a query, even if they are NaN.

Dimensions: B batch, Hq query heads, Hk key heads (query head h reads key head h // (Hq / Hk)), Tq queries, Tk keys,
D and Dv columns; Nq and Nk: rows of all packed sequences.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NONE, UPPER_LEFT, LOWER_RIGHT = range(3)  # values of `causal`
_WORD = 0xFFFFFFFF


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    q_lengths: Tensor | None = None,
    k_lengths: Tensor | None = None,
    cu_q: Tensor | None = None,
    cu_k: Tensor | None = None,
    max_q: int = 0,
    max_k: int = 0,
    scale: float = 1.0,
    causal: int = NONE,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v, and the logarithm of the softmax denominator.

    Args:
        q: [B, Hq, Tq, D]. k: [B, Hk, Tk, D]. v: [B, Hk, Tk, Dv].
        attn_mask: bool (True: attend) or float (added to the scores) [B | 1, Hq | 1, Tq | 1, Tk | 1]; None for packed
            sequences.
        alibi_slopes: float32 [Hq] or [B, Hq]; adds -slope * |i + offset - j| to the scores.
        q_lengths, k_lengths: [B] number of valid rows.
        cu_q, cu_k: [S + 1], start of each packed sequence in the rows of q [1, Hq, Nq, D] and k [1, Hk, Nk, D]; max_q,
            max_k: upper bounds of the lengths.
        causal: 0: no causality; 1: j <= i; 2: j <= i + offset, with offset = keys - queries of the sequence. The offset
            is 0 for 0 and 1.
        window_left, window_right: i + offset - window_left <= j <= i + offset + window_right; negative: unbounded.
        softcap: replaces scores by softcap * tanh(score / softcap) before masks are added; 0: disabled.
        dropout_p, seed: weights are dropped as in `dropout_keep`.
    Returns:
        out: [B, Hq, Tq, Dv], dtype of q; 0 for a query that attends to no key.
        lse: [B, Hq, Tq], float32 or wider, before dropout; -inf for a query that attends to no key.
    """
    if cu_q is not None:
        assert cu_k is not None
        if attn_mask is not None or q_lengths is not None or k_lengths is not None:
            raise ValueError("attention: q_lengths, k_lengths and attn_mask must be absent where rows are packed")
        N = q.shape[2]
        q, k, v = _padded(q, cu_q, max_q), _padded(k, cu_k, max_k), _padded(v, cu_k, max_k)
        q_lengths, k_lengths = cu_q.diff(), cu_k.diff()
    scores, seen = _scores(
        q, k, attn_mask, alibi_slopes, q_lengths, k_lengths, scale, causal, window_left, window_right, softcap
    )
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), 0.0)
    top = top.masked_fill(top == -math.inf, 0)
    # Queries without keys use a denominator of 1; a division by 0 has a NaN derivative.
    exps = torch.exp(scores - top)
    total = exps.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    weights = exps / total
    lse = (total.log() + top).masked_fill(empty, -math.inf).squeeze(-1)
    if dropout_p > 0:
        assert seed is not None
        weights = weights * _keep(weights, dropout_p, seed)
    wide = _by_head(v, q.shape[1]).to(weights.dtype)
    out = (weights @ wide.where(torch.isfinite(wide), 0) + _far(weights, seen, wide)).to(q.dtype)
    if cu_q is not None:
        return _packed(out, cu_q, N), _packed(lse.unsqueeze(-1), cu_q, N).squeeze(-1)
    return out, lse


def attention_weights(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: None,
    cu_k: None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """Weights [B, Hq, Tq, Tk] after dropout, dtype of q, computed from the lse of `attention`."""
    scores, _ = _scores(
        q, k, attn_mask, alibi_slopes, q_lengths, k_lengths, scale, causal, window_left, window_right, softcap
    )
    lse = lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)
    # If all scores of a query are huge, as with a mask of finfo.min, lse = score + log(count) rounds to the score. The
    # weights of such a query are then computed by a softmax, and lse only contributes its gradient.
    huge = (lse.abs() > (2.0**40 if lse.dtype == torch.float64 else 4096.0)) & torch.isfinite(lse)
    weights = torch.exp((scores - lse).masked_fill(huge, 0))
    if scores.shape[-1]:
        scores = scores.masked_fill(~huge, 0)
        exps = torch.exp(scores - scores.detach().amax(-1, keepdim=True))
        weights = weights.where(~huge, exps / exps.detach().sum(-1, keepdim=True) * torch.exp(lse.detach() - lse))
    if dropout_p > 0:
        assert seed is not None
        weights = weights * _keep(weights, dropout_p, seed)
    return weights.to(q.dtype)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 rows of x [.., D] and their scales [..] float32, as a KeyValueCache of int8 stores them.

    The scale is the largest absolute number of the row divided by 127, and a number is divided by the scale and rounded
    to nearest, ties to even. A row of zeros has scale 0. A row with an infinity or NaN has that scale and zeros, whose
    product with the scale is NaN.
    """
    x = x.float()
    scale = x.abs().amax(-1) / 127
    divisor = scale.masked_fill((scale == 0) | ~torch.isfinite(scale), math.inf).unsqueeze(-1)
    rows = torch.round(torch.nan_to_num(x, 0.0, 0.0, 0.0) / divisor)
    return rows.clamp(-127, 127).to(torch.int8), scale


def dequantize_rows(rows: Tensor, scale: Tensor) -> Tensor:
    """float32 [.., D] of int8 rows [.., D] and their scales [..]."""
    return rows.float() * scale.unsqueeze(-1)


def visible(
    Tq: int,
    Tk: int,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    causal: int,
    window_left: int,
    window_right: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """[B | 1, 1, Tq, Tk] whether lengths, causality and window let query i attend to key j, and i + offset - j."""
    i, j = torch.arange(Tq, device=device).view(1, 1, -1, 1), torch.arange(Tk, device=device).view(1, 1, 1, -1)
    of_q = torch.full((1, 1, 1, 1), Tq, device=device) if q_lengths is None else q_lengths.long().view(-1, 1, 1, 1)
    of_k = torch.full((1, 1, 1, 1), Tk, device=device) if k_lengths is None else k_lengths.long().view(-1, 1, 1, 1)
    far = i - j + (of_k - of_q if causal == LOWER_RIGHT else torch.zeros_like(of_q))
    seen = (i < of_q) & (j < of_k)
    if causal != NONE:
        seen = seen & (far >= 0)
    if window_left >= 0:
        seen = seen & (far <= window_left)
    if window_right >= 0:
        seen = seen & (far >= -window_right)
    return seen, far


def dropout_keep(B: int, H: int, Tq: int, Tk: int, p: float, seed: Tensor) -> Tensor:
    """[B, H, Tq, Tk] whether dropout keeps a weight: whether its random word is at least p * 2^32.

    The word of weight (b, h, i, j) is word j % 4 of Philox 4x32 with 7 rounds, counter (j // 4, i, b * H + h, 0) and
    key (seed mod 2^32, seed / 2^32).

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """

    def product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:  # high and low word of a 32-bit product
        low, high = x & 0xFFFF, x >> 16
        return (factor * high + (factor * low >> 16)) >> 16 & _WORD, (factor * x) & _WORD

    device = seed.device
    seed = seed.reshape(())
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    c0 = torch.arange((Tk + 3) // 4, device=device)
    c1 = torch.arange(Tq, device=device).view(-1, 1)
    c2 = torch.arange(B * H, device=device).view(-1, 1, 1)
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    for _ in range(7):
        high0, low0 = product(0xD2511F53, c0)
        high1, low1 = product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    words = torch.stack((c0, c1, c2, c3), -1).flatten(-2)[..., :Tk]
    return (words >= round(p * 2**32)).view(B, H, Tq, Tk)


def _keep(weights: Tensor, p: float, seed: Tensor) -> Tensor:
    """Factors of the weights under dropout: 0 or 1 / (1 - p)."""
    B, H, Tq, Tk = weights.shape
    keep = dropout_keep(B, H, Tq, Tk, p, seed)
    return keep.to(weights.dtype) * (1 / (1 - p) if p < 1 else 0.0)


def _scores(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """Scores [B, Hq, Tq, Tk], -inf for masked keys, and whether a query attends to a key."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k = q.to(dtype), _by_head(k, q.shape[1]).to(dtype)
    finite_q, finite_k = torch.isfinite(wide_q), torch.isfinite(wide_k)
    scores = wide_q.where(finite_q, 0) @ wide_k.where(finite_k, 0).transpose(-1, -2) * scale
    # Infinities and NaN affect the scores, but not the gradients of finite rows.
    finite = finite_q.all(-1).unsqueeze(-1) & finite_k.all(-1).unsqueeze(-2)
    scores = scores.where(finite, wide_q.detach() @ wide_k.detach().transpose(-1, -2) * scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    seen, far = visible(q.shape[2], k.shape[2], q_lengths, k_lengths, causal, window_left, window_right, q.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.reshape(-1, q.shape[1], 1, 1).to(dtype) * far.abs()
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            seen = seen & attn_mask
        else:
            scores = scores + attn_mask.to(dtype)
            seen = seen & (attn_mask != -math.inf)
    scores = scores.masked_fill(~seen, -math.inf)
    return scores, seen & (scores != -math.inf)


def _far(weights: Tensor, seen: Tensor, v: Tensor) -> Tensor:
    """Contribution of infinite and NaN values to the output: 0, an infinity or NaN, as in weights @ v."""
    weights, v = weights.detach(), v.detach()

    def any_product(rows: Tensor, values: Tensor) -> Tensor:
        return rows.to(v.dtype) @ values.to(v.dtype) > 0

    some, zero = seen & (weights != 0), torch.zeros((), dtype=v.dtype, device=v.device)
    far = torch.where(any_product(some, v == math.inf), math.inf, zero) - torch.where(
        any_product(some, v == -math.inf), math.inf, zero
    )
    is_nan = any_product(some, v.isnan()) | any_product(seen & (weights == 0), ~torch.isfinite(v))
    return far.masked_fill(is_nan, math.nan)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Repeats the heads of [B, Hk, ..] to [B, Hq, ..]."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _padded(x: Tensor, cu: Tensor, longest: int) -> Tensor:
    """Packed [1, H, N, D] to padded [S, H, longest, D]; padding holds rows of other sequences."""
    S, N = cu.shape[0] - 1, x.shape[2]
    if N == 0:
        return torch.nn.functional.pad(x, (0, 0, 0, longest)).expand(S, -1, -1, -1)
    at = cu[:-1].long().unsqueeze(1) + torch.arange(longest, device=x.device)
    return x[0][:, at.clamp(max=N - 1).reshape(-1)].unflatten(1, (S, longest)).transpose(0, 1)


def _packed(x: Tensor, cu: Tensor, N: int) -> Tensor:
    """Padded [S, H, longest, D] to packed [1, H, N, D]."""
    row = torch.arange(N, device=x.device)
    of = torch.searchsorted(cu.long(), row, right=True) - 1
    return x.transpose(0, 1)[:, of, row - cu.long()[of]].unsqueeze(0)
