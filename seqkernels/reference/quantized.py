"""Reference definition of products with int8 weights in plain torch, exact in every bit.

Dimensions: B rows, K input columns, N output columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_SMALLEST = 2.0**-100


def quantize_rows(x: Tensor, largest: float = 0.0) -> tuple[Tensor, Tensor]:
    """int8 values and scales of the rows of a matrix: x is about values * scale.

    Symmetric, to nearest even; the scale is max |x| / 127 of the row, or largest / 127. A row with NaN or infinity gets
    the scale NaN; a row whose maximum is below 2^-100 is zero.

    Args:
        x: [B, K] float32.
        largest: static range of |x|; larger values saturate. 0: that of each row.
    Returns:
        [B, K] int8 in [-127, 127], and [B] float32.
    """
    most = x.abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0])
    finite = torch.isfinite(x).all(1)
    if largest > 0:
        most = torch.full_like(most, largest)
    used = finite & (most >= _SMALLEST)
    scale = torch.where(used, most / 127, 0.0).masked_fill(~finite, float("nan"))
    inverse = torch.where(used, 127 / most, 0.0)
    values = torch.where(used.unsqueeze(1), x, 0.0) * inverse.unsqueeze(1)
    return torch.round(values.clamp(-127, 127)).to(torch.int8), scale


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, largest: float = 0.0) -> Tensor:
    """x W^T + bias with both factors quantized by row and an exact integer sum.

    Args:
        x: [B, K] float32. weight: [N, K] float32. bias: [N] or None.
        largest: static range of |x|, see quantize_rows.
    Returns:
        [B, N] float32: sum * (scale of the row of x * scale of the row of weight) + bias, in this order of operations.
    """
    values, scale = quantize_rows(x, largest)
    weights, weight_scale = quantize_rows(weight)
    sums = (values.long() @ weights.long().T).to(torch.int32)
    y = sums.to(torch.float32) * (scale.unsqueeze(1) * weight_scale)
    return y if bias is None else y + bias


class _Products(TorchFunctionMode):
    def __init__(self, ranges: Sequence[float]) -> None:
        super().__init__()
        self.ranges = iter(ranges)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, weight, *bias = args
        y = int8_linear(x.flatten(0, -2), weight, bias[0] if bias else None, next(self.ranges, 0.0))
        return y.unflatten(0, x.shape[:-1])


@contextmanager
def int8_products(ranges: Sequence[float] = ()) -> Iterator[None]:
    """Within it, reference.recurrent computes its products by int8_linear.

    ranges: static ranges of the left factors of the products, in the order of the calls; then 0.
    """
    with _Products(ranges):
        yield
