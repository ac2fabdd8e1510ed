"""Embedding and EmbeddingBag in ONNX: Gather, then a reduction of each bag.

Bags of equal length [B, L] are reduced along their dimension. Bags with offsets are reduced by ScatterElements, into
one row per bag and a last row for the indices that do not count. ScatterND is not used, because ONNX Runtime computes
its reductions in several threads without synchronization and loses additions.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, F features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...functional._embedding_bag_ops import MODE_NAMES, NORM_NAMES
from ._graph import FLOAT, HALF, INT64, Graph, Value


@dataclass
class Bags:
    """Indices and options of a lookup."""

    indices: Value  # [N] with offsets, or [B, L]
    offsets: Value | None  # int64 [B], or [B + 1] with include_last_offset
    weights: Value | None  # shaped like indices, in the dtype of computation
    mode: str
    padding_idx: int
    include_last_offset: bool
    by_weight: bool  # divisor of a mean
    dtype: Any  # of computation


def embedding_bag(graph: Graph, arguments: dict[str, Any]) -> Value:
    """Output [B, D] of embedding_bag."""
    table = arguments["weight"]
    return _lookup(graph, table, _bags(graph, arguments, table.dtype))


def embedding_bag_forward(graph: Graph, arguments: dict[str, Any]) -> tuple[Value, Value]:
    return embedding_bag(graph, arguments), graph.constant(0, INT64)  # only the backward ops read arg


def embedding_bags(graph: Graph, arguments: dict[str, Any]) -> Value:
    """Output [B, sum of features * D] of several tables."""
    tables, features = arguments["weights"], arguments["features"]
    bags = _bags(graph, arguments, tables[0].dtype)
    offsets, outputs, feature = bags.offsets, [], 0
    one, F = graph.ints(1), graph.ints(sum(features))
    B = graph.Div(graph.Sub(graph.Shape(offsets), one), F)  # [1]
    for table, count in zip(tables, features):
        first = graph.Mul(B, graph.ints(feature))
        last = graph.Add(graph.Mul(B, graph.ints(feature + count)), one)
        bags.offsets, bags.include_last_offset = graph.Slice(offsets, first, last, graph.ints(0)), True
        found, D = _lookup(graph, table, bags), table.shape[1]  # [count * B, D]
        by_bag = graph.Transpose(graph.Reshape(found, graph.sizes(count, B, D)), perm=[1, 0, 2])
        outputs.append(graph.Reshape(by_bag, graph.ints(0, count * D)))
        feature += count
    return outputs[0] if len(outputs) == 1 else graph.Concat(*outputs, axis=1)


def embedding_bags_forward(graph: Graph, arguments: dict[str, Any]) -> tuple[Value, Value]:
    return embedding_bags(graph, arguments), graph.constant(0, INT64)


def _bags(graph: Graph, arguments: dict[str, Any], table_dtype: Any) -> Bags:
    dtype = FLOAT if table_dtype in HALF else table_dtype
    offsets, weights = arguments["offsets"], arguments["per_sample_weights"]
    if offsets is not None and offsets.dtype != INT64:
        offsets = graph.Cast(offsets, to=INT64)
    if weights is not None and weights.dtype != dtype:
        weights = graph.Cast(weights, to=dtype)
    by_weight = NORM_NAMES[arguments["mean_by"]] == "weight"
    return Bags(
        arguments["indices"], offsets, weights, MODE_NAMES[arguments["reduction"]], arguments["padding_idx"],
        bool(arguments["include_last_offset"]), by_weight, dtype,
    )  # fmt: skip


def _lookup(graph: Graph, table: Value, bags: Bags) -> Value:
    indices = bags.indices
    plain = bags.weights is None and bags.padding_idx < 0
    if bags.offsets is None and plain and indices.shape[1] == 1:  # of Embedding: bags of one index
        return graph.Gather(table, graph.Squeeze(indices, graph.ints(1)))
    rows = graph.wide(graph.Gather(table, indices), table.dtype)  # [N, D] or [B, L, D]
    if bags.weights is not None:
        rows = graph.Mul(rows, graph.Unsqueeze(bags.weights, graph.ints(-1)))
    counted = None  # whether an index is not padding
    if bags.padding_idx >= 0:
        counted = graph.Not(graph.Equal(indices, graph.constant(bags.padding_idx, indices.dtype)))
    reduce = _of_equal_lengths if bags.offsets is None else _with_offsets
    return graph.narrow(reduce(graph, rows, counted, bags, table.shape[1]), table.dtype)


def _of_equal_lengths(graph: Graph, rows: Value, counted: Value | None, bags: Bags, D: int) -> Value:
    """Reduces rows [B, L, D] along their second dimension."""
    dtype, along = bags.dtype, graph.ints(1)
    zero = graph.constant(0.0, dtype)
    if bags.mode in ("max", "min"):
        if counted is None:
            return _extreme(graph, rows, bags.mode)
        worst = graph.constant(-math.inf if bags.mode == "max" else math.inf, dtype)
        found = _extreme(graph, graph.Where(graph.Unsqueeze(counted, graph.ints(2)), rows, worst), bags.mode)
        some = graph.ReduceMax(graph.Cast(counted, to=INT64), along, keepdims=1)
        return graph.Where(graph.Greater(some, graph.constant(0, INT64)), found, zero)
    if counted is not None:
        rows = graph.Where(graph.Unsqueeze(counted, graph.ints(2)), rows, zero)
    total = graph.ReduceSum(rows, along, keepdims=0)
    if bags.mode == "sum":
        return total
    if counted is None:
        count = graph.full(1.0, dtype, graph.Shape(bags.indices))
    else:
        count = graph.Cast(counted, to=dtype)
    divisor = None
    if bags.by_weight and bags.weights is not None:
        weights = bags.weights if counted is None else graph.Where(counted, bags.weights, zero)
        divisor = graph.ReduceSum(weights, along, keepdims=1)
    return _mean(graph, total, graph.ReduceSum(count, along, keepdims=1), divisor, dtype)


def _extreme(graph: Graph, rows: Value, mode: str) -> Value:
    return getattr(graph, "ReduceMax" if mode == "max" else "ReduceMin")(rows, graph.ints(1), keepdims=0)


def _mean(graph: Graph, total: Value, count: Value, divisor: Value | None, dtype: Any) -> Value:
    """total [B, D] by count [B, 1], or by the divisor; zero where count is 0."""
    one = graph.constant(1.0, dtype)
    if divisor is None:
        return graph.Div(total, graph.Max(count, one))
    return graph.Div(total, graph.Where(graph.Greater(count, graph.constant(0.0, dtype)), divisor, one))


def _with_offsets(graph: Graph, rows: Value, counted: Value | None, bags: Bags, D: int) -> Value:
    """Reduces rows [N, D] of bags that begin at the offsets."""
    dtype, axis, one = bags.dtype, graph.ints(1), graph.ints(1)
    N, begins = graph.Shape(bags.indices), graph.Shape(bags.offsets)
    B = graph.Sub(begins, one) if bags.include_last_offset else begins  # [1]
    # The bag of a position is the last one that begins at or before it.
    starts = graph.ScatterElements(
        graph.full(0, INT64, graph.Add(N, one)), bags.offsets, graph.full(1, INT64, begins), axis=0, reduction="add"
    )
    bag = graph.Sub(graph.CumSum(graph.Slice(starts, graph.ints(0), N, graph.ints(0)), graph.constant(0, INT64)), one)
    bag = graph.Where(graph.Less(bag, graph.constant(0, INT64)), B, bag)
    if counted is not None:
        bag = graph.Where(counted, bag, B)
    size, bag = graph.Add(B, one), graph.Unsqueeze(bag, axis)  # [1], [N, 1]

    def reduced(values: Value, columns: int, reduction: str, start: float) -> Value:
        """[B, columns] of values [N, columns]."""
        into, at = graph.full(start, dtype, size, columns), graph.Expand(bag, graph.ints(1, columns))
        found = graph.ScatterElements(into, at, values, axis=0, reduction=reduction)
        return graph.Slice(found, graph.ints(0), B, graph.ints(0))

    if bags.mode == "sum":
        return reduced(rows, D, "add", 0.0)
    count = reduced(graph.full(1.0, dtype, N, 1), 1, "add", 0.0)
    if bags.mode == "mean":
        divisor = None
        if bags.by_weight and bags.weights is not None:
            divisor = reduced(graph.Unsqueeze(bags.weights, axis), 1, "add", 0.0)
        return _mean(graph, reduced(rows, D, "add", 0.0), count, divisor, dtype)
    found = reduced(rows, D, bags.mode, -math.inf if bags.mode == "max" else math.inf)
    zero = graph.constant(0.0, dtype)
    return graph.Where(graph.Greater(count, zero), found, zero)
