"""Launchers of the kernels of additive attention, with the arguments and results of the ops.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .backward import (
    additive_attention_rows_gradient_kernel,
    additive_attention_softmax_gradient_kernel,
    additive_attention_weight_gradient_kernel,
)
from .forward import (
    additive_attention_product_kernel,
    additive_attention_scores_kernel,
    additive_attention_softmax_kernel,
)


class Tile(NamedTuple):
    """Rows, others (keys or terms) and columns or hidden units of a program."""

    BM: int
    BN: int
    columns: int


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# A tile of pairs has 4096 elements, 32 per thread of 4 warps. Few queries leave room for more keys.
WARPS = 4
ROWS_OF_SOFTMAX = 256
PRODUCT = Tile(32, 32, 64)  # 16 elements of the sums per thread
SKIPPING = Tile(4, 16, 64)


def pair_tile(rows: int, float64: bool) -> Tile:
    """Tile of the kernels of pairs for this number of queries, or of rows in backward."""
    BM = min(triton.next_power_of_2(max(rows, 1)), 8)
    return Tile(BM, (64 if float64 else 128) // BM, 32)


def forward_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    key_exp: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Takes exponentials of the keys by tiles: key_exp is unused."""
    query, key, value, v = (t.contiguous() for t in (query, key, value, v))
    (B, Tq, H), Tk, Dv = query.shape, key.shape[1], value.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    out, weights = query.new_empty(B, Tq, Dv), query.new_empty(B, Tq, Tk, dtype=wide)
    if B == 0 or Tq == 0:
        return out, weights
    if Tk == 0:
        return out.zero_(), weights
    s_b = s_q = 0
    if mask is not None:
        mask = (mask if mask.stride(2) == 1 or Tk == 1 else mask.contiguous()).view(torch.uint8)
        s_b = mask.stride(0) if mask.shape[0] > 1 else 0
        s_q = mask.stride(1) if mask.shape[1] > 1 else 0
    tile = pair_tile(Tq, wide == torch.float64)
    additive_attention_scores_kernel[(B, triton.cdiv(Tq, tile.BM), triton.cdiv(Tk, tile.BN))](
        query, key, v, mask, lengths, weights, s_b, s_q, Tq, Tk, H, tile.BM, tile.BN, tile.columns, num_warps=WARPS
    )
    additive_attention_softmax_kernel[(B * Tq,)](weights, lengths, Tq, Tk, ROWS_OF_SOFTMAX, num_warps=WARPS)
    _product(weights, value, lengths, out, False, mask is not None)
    return out, weights


def _product(w: Tensor, x: Tensor, lengths: Tensor | None, out: Tensor, of_rows: bool, skip: bool) -> None:
    (B, R, T), D = w.shape, x.shape[2]
    if out.numel() == 0:
        return
    tile = SKIPPING if skip else PRODUCT
    additive_attention_product_kernel[(B, triton.cdiv(R, tile.BM), triton.cdiv(D, tile.columns))](
        w, x, lengths, out, *w.stride(), R, T, D, of_rows, skip, *tile, num_warps=WARPS
    )


def backward_op(
    dout: Tensor | None,
    dweights: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    key_exp: Tensor | None,
    weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value, v, weights = (t.contiguous() for t in (query, key, value, v, weights))
    dout, dweights = (None if t is None else t.contiguous() for t in (dout, dweights))
    (B, Tq, _), Tk, Dv = query.shape, key.shape[1], value.shape[2]
    dq, dk, dvalue = (torch.empty_like(t) for t in (query, key, value))
    if B == 0 or Tq == 0 or Tk == 0:
        return dq.zero_(), dk.zero_(), dvalue.zero_(), torch.zeros_like(v)
    g = torch.empty_like(weights)
    additive_attention_weight_gradient_kernel[(B, triton.cdiv(Tq, PRODUCT.BM), triton.cdiv(Tk, PRODUCT.BN))](
        dout, value, dweights, lengths, g, Tq, Tk, Dv, *PRODUCT, num_warps=WARPS
    )
    additive_attention_softmax_gradient_kernel[(B * Tq,)](weights, lengths, g, Tq, Tk, ROWS_OF_SOFTMAX, num_warps=WARPS)
    if dout is None:
        dvalue.zero_()
    else:
        _product(weights.transpose(1, 2), dout, lengths, dvalue, True, False)
    parts = _rows_gradient(query, key, v, lengths, g, dq, False)
    _rows_gradient(key, query, v, lengths, g.transpose(1, 2), dk, True)
    return dq, dk, dvalue, parts.sum((0, 1)).to(v.dtype)


def _rows_gradient(
    rows: Tensor, others: Tensor, v: Tensor, lengths: Tensor | None, g: Tensor, to: Tensor, of_rows: bool
) -> Any:
    """Gradient of rows, and parts [B, tiles, H] of that of v, if rows are queries."""
    B, n, H = rows.shape
    tile = pair_tile(n, g.dtype == torch.float64)
    tiles = triton.cdiv(n, tile.BM)
    parts = None if of_rows else g.new_empty(B, tiles, H)
    additive_attention_rows_gradient_kernel[(B, tiles, triton.cdiv(H, tile.columns))](
        rows, others, v, lengths, g, to, parts, g.stride(1), g.stride(2), n, others.shape[1], H, of_rows, *tile,
        num_warps=WARPS,
    )  # fmt: skip
    return parts
