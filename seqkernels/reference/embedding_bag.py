"""EmbeddingBag, defined in plain torch: the reduction of bags, and the optimisers' steps on the rows that occur.

Everything is a function of tensors and may be differentiated any number of times. What is computed is computed in
float32 or wider, and rounded once, at the end.

Dimensions: E table rows, D columns, N indices, B bags, U rows that occur.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# ---- bags


class Bags(NamedTuple):
    """What is looked up, index by index. The bags that indices are in stand in ascending order."""

    rows: Tensor  # [N] of the table; 0 where an index does not count
    bag: Tensor  # [N]; B where an index does not count
    begin: Tensor  # [B] where each bag begins among the indices
    counted: Tensor  # [N] whether an index lies in a bag and is no padding
    weights: Tensor | None  # [N]

    @property
    def B(self) -> int:
        return self.begin.shape[0]

    def total(self, of_index: Tensor) -> Tensor:
        """[B, ..] sums over each bag of [N, ..]."""
        total = of_index.new_zeros(self.B + 1, *of_index.shape[1:])
        return total.index_add(0, self.bag, of_index)[: self.B]


def bags_of(
    input: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Bags:
    """From indices as users give them. offsets may begin above 0: what lies in front of them is in no bag."""
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
        bag = begins.cumsum(0)[:N] - 1  # the last that begins here or before
    counted = (bag >= 0) & (bag < B)
    if padding_idx is not None:
        counted = counted & (rows != padding_idx)
    rows, bag = torch.where(counted, rows, 0), torch.where(counted, bag, B)
    return Bags(rows.long(), bag.long(), begin.long(), counted, None if weights is None else weights.reshape(-1))


def reduce(table: Tensor, bags: Bags, mode: str, by_weight: bool = False, arg: Tensor | None = None) -> Tensor:
    """[B, D] of a table [E, D]. arg: who wins each column, if that is known."""
    if mode in ("max", "min") and bags.rows.shape[0]:
        return picked(table, bags, winners(table, bags, mode) if arg is None else arg)
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
def winners(table: Tensor, bags: Bags, mode: str) -> Tensor:
    """[B, D] int32: at which position of its bag the extreme is, the first one if several are, a NaN before any number;
    -1 if nothing counts.
    """
    N = bags.rows.shape[0]
    best = table.new_zeros(bags.B, table.shape[1])
    arg = torch.full_like(best, -1, dtype=torch.int32)
    position = torch.arange(N, device=table.device)[bags.counted]
    place = position - bags.begin[bags.bag[bags.counted]]  # in its bag
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


def picked(table: Tensor, bags: Bags, arg: Tensor) -> Tensor:
    """[B, D] of what won each column."""
    D = table.shape[1]
    at = bags.begin.unsqueeze(1) + arg.clamp(min=0)
    at = at.clamp(max=bags.rows.shape[0] - 1)  # of an empty bag behind the last index
    places = bags.rows[at] * D + torch.arange(D, device=at.device)
    values = table.reshape(-1).index_select(0, places.reshape(-1)).reshape(at.shape)
    if bags.weights is not None:
        values = values * bags.weights.index_select(0, at.reshape(-1)).reshape(at.shape)
    return torch.where(arg >= 0, values, 0)


# ---- gradients that are not derivatives


class _ScaledGradient(torch.autograd.Function):
    """A table [E, D] whose rows' gradients are multiplied by factors [E]; where a factor is 0 they are 0."""

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
    """The table, whose rows' gradients are divided by how often each occurs."""
    counts = table.new_zeros(table.shape[0]).index_add(0, bags.rows, bags.counted.to(table.dtype))
    return _ScaledGradient.apply(table, 1 / counts.clamp(min=1))


# ---- the operators


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
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
    """Rows of a table, reduced bag by bag.

    Args:
        input: [N] with offsets [B] ([B + 1] with include_last_offset), or [B, L] without; int32 or int64.
        weight: [E, D] floating point.
        mode: sum; mean; max; min. With weights w: the sum of w_i e_i; that divided by the number of rows
            (weight_norm="count") or by the sum of weights ("weight"); the extremes of w_i e_i.
        per_sample_weights: [N] or [B, L].
        padding_idx: rows that do not count.
        scale_grad_by_freq: the gradient of a row is divided by how often it occurs.
        arg: [B, D] who wins each column, if that is known.
    Returns:
        [B, D], dtype of weight; zeros where a bag is empty.
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
    """[B, D] int32: at which position of its bag the maximum or minimum is, -1 where a bag is empty. Positions of
    padding are counted.
    """
    dtype = compute_dtype(weight.dtype)
    weights = None if per_sample_weights is None else per_sample_weights.to(dtype)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    bags = bags_of(input, offsets, weights, include_last_offset and offsets is not None, padding_idx)
    return winners(weight.to(dtype), bags, mode)


def embedding(
    input: Tensor, weight: Tensor, padding_idx: int | None = None, scale_grad_by_freq: bool = False
) -> Tensor:
    """[*, D] rows of a table [E, D] for indices [*]. The row padding_idx is found as any other and has no gradient."""
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
    """Several tables, each with its features; a feature has one bag per sample.

    Args:
        input: [N]. offsets: [F * B + 1], feature after feature, those of one table together.
        weights: T tables [E_t, D_t]. features: [T] how many features each has; one each if absent.
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


# ---- steps of optimisers, on the rows that occur; rows [U] are unique and grad [U, D] are their gradients


def renorm(weight: Tensor, rows: Tensor, max_norm: float, norm_type: float = 2.0) -> Tensor:
    """The table whose rows, where their norm is above max_norm, are scaled to it, as torch scales them."""
    rows = rows.reshape(-1).unique()
    norms = weight[rows].to(compute_dtype(weight.dtype)).norm(norm_type, 1, keepdim=True)
    scaled = weight[rows] * torch.where(norms > max_norm, max_norm / (norms + 1e-7), 1)
    return weight.index_copy(0, rows, scaled.to(weight.dtype))


def _moved(table: Tensor, rows: Tensor, by: Tensor) -> Tensor:
    """The table, of which some rows are less by that."""
    return table.index_copy(0, rows, (table[rows].to(by.dtype) - by).to(table.dtype))


def sgd_step(table: Tensor, rows: Tensor, grad: Tensor, lr: float) -> Tensor:
    """As torch.optim.SGD without momentum."""
    return _moved(table, rows, lr * grad)


def adagrad_step(
    table: Tensor, sums: Tensor, rows: Tensor, grad: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """As torch.optim.Adagrad, whose lr is already decayed. Duchi, Hazan and Singer, 2011."""
    sums = sums.index_add(0, rows, grad.square())
    return _moved(table, rows, lr * grad / (sums[rows].sqrt() + eps)), sums


def rowwise_adagrad_step(
    table: Tensor, sums: Tensor, rows: Tensor, grad: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Adagrad with one sum per row, of the mean square of its gradient."""
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
    """As torch.optim.SparseAdam: moments decay where a row occurs. Kingma and Ba, arXiv 1412.6980."""
    first = exp_avg[rows] + (1 - beta1) * (grad - exp_avg[rows])
    second = exp_avg_sq[rows] + (1 - beta2) * (grad.square() - exp_avg_sq[rows])
    rate = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step)
    moved = _moved(table, rows, rate * first / (second.sqrt() + eps))
    return moved, exp_avg.index_copy(0, rows, first), exp_avg_sq.index_copy(0, rows, second)
