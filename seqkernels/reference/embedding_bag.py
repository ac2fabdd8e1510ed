"""Reference definition of EmbeddingBag in plain torch: reductions of bags, and optimiser steps on the rows that occur.

The functions are differentiable to any order. They compute in float32 or wider and round once, at the end.

Dimensions: E table rows, D columns, N indices, B bags, U rows that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ---- bags


class Bags(NamedTuple):
    """The bags of a call, by index. `bag` is non-decreasing except for indices that do not count."""

    rows: Tensor  # [N] row of the table; 0 for an index that does not count
    bag: Tensor  # [N] bag; B for an index that does not count
    begin: Tensor  # [B] position of the first index of each bag
    counted: Tensor  # [N] whether an index counts: it belongs to a bag and is not padding
    weights: Tensor | None  # [N] per-sample weights

    @property
    def B(self) -> int:
        return self.begin.shape[0]

    def total(self, of_index: Tensor) -> Tensor:
        """Sums [N, ..] over each bag to [B, ..]."""
        total = of_index.new_zeros(self.B + 1, *of_index.shape[1:])
        return total.index_add(0, self.bag, of_index)[: self.B]


def bags_of(
    input: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Bags:
    """Bags of input and offsets as in embedding_bag. If offsets begin above 0, the indices before belong to no bag."""
    rows = input.reshape(-1)
    N = rows.shape[0]
    if offsets is None:
        B, L = input.shape
        begin = torch.arange(B, device=rows.device) * L
        bag = torch.arange(N, device=rows.device) // max(L, 1)
    else:
        B = offsets.shape[0] - int(include_last_offset)
        begin = offsets[:B]
        begins = rows.new_zeros(N + 1).index_add(0, offsets, rows.new_ones(offsets.shape))
        bag = begins.cumsum(0)[:N] - 1  # the last bag that begins at or before the position
    counted = (bag >= 0) & (bag < B)
    if padding_idx is not None:
        counted = counted & (rows != padding_idx)
    rows, bag = torch.where(counted, rows, 0), torch.where(counted, bag, B)
    return Bags(rows.long(), bag.long(), begin.long(), counted, None if weights is None else weights.reshape(-1))


def reduce(table: Tensor, bags: Bags, mode: str, by_weight: bool = False, arg: Tensor | None = None) -> Tensor:
    """Reduces rows of a table [E, D] to [B, D]. arg: position of the selected row for each column, or None."""
    if mode in ("max", "min") and bags.rows.shape[0]:
        return select(table, bags, extreme_positions(table, bags, mode) if arg is None else arg)
    found, weights = table.index_select(0, bags.rows), bags.weights
    if weights is not None:
        found = found * weights.unsqueeze(1)
    output = bags.total(torch.where(bags.counted.unsqueeze(1), found, 0))
    if mode == "mean":
        count = bags.total(bags.counted.to(output.dtype))
        divisor = count
        if by_weight and weights is not None:
            divisor = bags.total(torch.where(bags.counted, weights, 0))
        output = output / torch.where(count > 0, divisor, 1).unsqueeze(1)
    return output


@torch.no_grad()
def extreme_positions(table: Tensor, bags: Bags, mode: str) -> Tensor:
    """[B, D] int32 position of the extreme in its bag; -1 for a bag without rows.

    Selects the first NaN if the bag has one, otherwise the first of equal values.
    """
    N = bags.rows.shape[0]
    best = table.new_zeros(bags.B, table.shape[1])
    arg = torch.full_like(best, -1, dtype=torch.int32)
    position = torch.arange(N, device=table.device)[bags.counted]
    place = position - bags.begin[bags.bag[bags.counted]]  # position in the bag
    for k in range(int(place.max()) + 1 if len(place) else 0):
        at = (bags.begin + k).clamp(max=N - 1)
        here = bags.counted[at] & (bags.bag[at] == torch.arange(bags.B, device=at.device))
        value = table[bags.rows[at]]
        if bags.weights is not None:
            value = value * bags.weights[at].unsqueeze(1)
        beyond = value > best if mode == "max" else value < best
        better = here.unsqueeze(1) & ((arg < 0) | beyond | (value.isnan() & ~best.isnan()))
        best, arg = torch.where(better, value, best), torch.where(better, k, arg)
    return arg


def select(table: Tensor, bags: Bags, arg: Tensor) -> Tensor:
    """[B, D] values at the positions `arg` of the bags, weighted; 0 where arg is -1."""
    D = table.shape[1]
    at = bags.begin.unsqueeze(1) + arg.clamp(min=0)
    at = at.clamp(max=bags.rows.shape[0] - 1)  # an empty bag may begin at N
    places = bags.rows[at] * D + torch.arange(D, device=at.device)
    values = table.reshape(-1).index_select(0, places.reshape(-1)).reshape(at.shape)
    if bags.weights is not None:
        values = values * bags.weights.index_select(0, at.reshape(-1)).reshape(at.shape)
    return torch.where(arg >= 0, values, 0)


# ---- gradients that differ from the derivative


class _ScaledGradient(torch.autograd.Function):
    """Returns a table [E, D] and multiplies the gradients of its rows by factors [E]; a factor of 0 gives 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(table: Tensor, factors: Tensor) -> Tensor:
        return table.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        factors = ctx.saved_tensors[0].unsqueeze(1)
        return torch.where(factors == 0, 0, grad * factors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return tangent.clone()


def by_frequency(table: Tensor, bags: Bags) -> Tensor:
    """Returns the table and divides the gradients of its rows by their numbers of occurrences."""
    counts = table.new_zeros(table.shape[0]).index_add(0, bags.rows, bags.counted.to(table.dtype))
    return _ScaledGradient.apply(table, 1 / counts.clamp(min=1))


# ---- the operators


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of computation for a table of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    weight_norm: str = "count",
    scale_grad_by_freq: bool = False,
    arg: Tensor | None = None,
) -> Tensor:
    """Looks up rows of a table and reduces them bag by bag.

    Args:
        input: [N] with offsets [B] ([B + 1] with include_last_offset), or [B, L] without; int32 or int64.
        weight: [E, D] floating point.
        mode: sum, mean, max or min of w_i e_i.
        per_sample_weights: w, [N] or [B, L]; 1 if None.
        padding_idx: row excluded from each reduction.
        weight_norm: divisor of a weighted mean: "count", the number of rows, or "weight", the sum of the weights.
        scale_grad_by_freq: divides the gradient of a row by its number of occurrences.
        arg: [B, D] position of the selected row for each column, or None to compute it.
    Returns:
        [B, D], dtype of weight; zeros for a bag without rows.
    """
    dtype = compute_dtype(weight.dtype)
    weights = None if per_sample_weights is None else per_sample_weights.to(dtype)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    bags = bags_of(input, offsets, weights, include_last_offset and offsets is not None, padding_idx)
    table = weight.to(dtype)
    if scale_grad_by_freq:
        table = by_frequency(table, bags)
    return reduce(table, bags, mode, weight_norm == "weight", arg).to(weight.dtype)


def embedding_bag_winners(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    *,
    mode: str = "max",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """[B, D] int32 position in its bag of the maximum or minimum; -1 for a bag without rows.

    Positions include padding.
    """
    dtype = compute_dtype(weight.dtype)
    weights = None if per_sample_weights is None else per_sample_weights.to(dtype)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    bags = bags_of(input, offsets, weights, include_last_offset and offsets is not None, padding_idx)
    return extreme_positions(weight.to(dtype), bags, mode)


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> Tensor:
    """Looks up rows [*, D] of a table [E, D] by indices [*]. The row padding_idx has no gradient."""
    table = weight.to(compute_dtype(weight.dtype))
    if padding_idx is not None:
        padding_idx += weight.shape[0] if padding_idx < 0 else 0
        factors = (torch.arange(weight.shape[0], device=weight.device) != padding_idx).to(table.dtype)
        table = _ScaledGradient.apply(table, factors)
    if scale_grad_by_freq:
        table = by_frequency(table, bags_of(input.reshape(-1, 1), None, None))
    found = table.index_select(0, input.reshape(-1))
    return found.to(weight.dtype).reshape(*input.shape, weight.shape[1])


def embedding_bags(
    input: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    features: Sequence[int] | None = None,
    mode: str = "sum",
    per_sample_weights: Tensor | None = None,
    *,
    weight_norm: str = "count",
    scale_grad_by_freq: bool = False,
    arg: Tensor | None = None,
) -> Tensor:
    """embedding_bag of several tables with one or more features each. A feature has one bag per sample.

    Args:
        input: [N] indices, by feature. offsets: [F * B + 1], by feature; the features of a table are consecutive.
        weights: T tables [E_t, D_t]. features: [T] number of features of each table; one each if None.
        arg: [B, sum of features_t * D_t], as in embedding_bag.
    Returns:
        [B, sum of features_t * D_t].
    """
    features = [1] * len(weights) if features is None else features
    B = (offsets.shape[0] - 1) // sum(features)
    outputs, feature, column = [], 0, 0
    for table, count in zip(weights, features):
        D, dtype = table.shape[1], compute_dtype(table.dtype)
        w = None if per_sample_weights is None else per_sample_weights.to(dtype)
        bags = bags_of(input, offsets[feature * B : (feature + count) * B + 1], w, include_last_offset=True)
        of_table, wide = None, table.to(dtype)
        if arg is not None:
            of_table = arg[:, column : column + count * D].reshape(B, count, D).transpose(0, 1).reshape(-1, D)
        if scale_grad_by_freq:
            wide = by_frequency(wide, bags)
        output = reduce(wide, bags, mode, weight_norm == "weight", of_table).to(table.dtype)
        outputs.append(output.reshape(count, B, D).transpose(0, 1).reshape(B, count * D))
        feature, column = feature + count, column + count * D
    return torch.cat(outputs, 1)


# ---- optimiser steps on the rows that occur: rows [U], unique, and their gradients grad [U, D]


def renorm(weight: Tensor, rows: Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scales the given rows whose norm exceeds max_norm to that norm, as torch does, and returns the table."""
    rows = rows.reshape(-1).unique()
    norms = weight[rows].to(compute_dtype(weight.dtype)).norm(norm_type, 1, keepdim=True)
    scaled = weight[rows] * torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1)
    return weight.index_copy(0, rows, scaled.to(weight.dtype))


def _moved(table: Tensor, rows: Tensor, by: Tensor) -> Tensor:
    """Returns the table with `by` subtracted from the given rows."""
    return table.index_copy(0, rows, (table[rows].to(by.dtype) - by).to(table.dtype))


def sgd_step(table: Tensor, rows: Tensor, grad: Tensor, lr: float) -> Tensor:
    """Step of torch.optim.SGD without momentum."""
    return _moved(table, rows, lr * grad)


def adagrad_step(
    table: Tensor, sums: Tensor, rows: Tensor, grad: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Step of torch.optim.Adagrad, with the decayed lr. Duchi, Hazan and Singer, 2011."""
    sums = sums.index_add(0, rows, grad.square())
    return _moved(table, rows, lr * grad / (sums[rows].sqrt() + eps)), sums


def rowwise_adagrad_step(
    table: Tensor, sums: Tensor, rows: Tensor, grad: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Step of Adagrad with one sum per row, of the mean square of its gradient."""
    sums = sums.index_add(0, rows, grad.square().mean(1))
    return _moved(table, rows, lr * grad / (sums[rows].sqrt() + eps).unsqueeze(1)), sums


def adam_step(
    table: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    rows: Tensor,
    grad: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step of torch.optim.SparseAdam: only the moments of rows that occur decay. Kingma and Ba, arXiv 1412.6980."""
    first = exp_avg[rows] + (1 - beta1) * (grad - exp_avg[rows])
    second = exp_avg_sq[rows] + (1 - beta2) * (grad.square() - exp_avg_sq[rows])
    rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    moved = _moved(table, rows, rate * first / (second.sqrt() + eps))
    return moved, exp_avg.index_copy(0, rows, first), exp_avg_sq.index_copy(0, rows, second)
