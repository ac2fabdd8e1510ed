"""Functional forms of Embedding and EmbeddingBag: argument checks and calls of the ops.

A lookup of one row takes a fraction of a microsecond. Eager calls therefore call the op directly, and check their
arguments in Python only if the op raises.

Intended differences from torch.nn.functional:
- per_sample_weights in each mode, also float32 weights with a 16-bit table; mode min; weight_norm.
- Sparse gradients are coalesced and also support max and min. scale_grad_by_freq supports each mode, dense and sparse,
  and divides the gradient of a row by the count of that row.
- Indices beyond the last offset (include_last_offset) are ignored in each mode and get no gradient.
- max and min return NaN for a bag with a NaN. Among equal values, the first is selected and gets the whole gradient.
- Offsets must begin with 0, must not decrease and must not exceed the number of indices, in each mode.
- Gradients are summed in float32 or wider and rounded once. Gradients of any order, forward-mode gradients and
  torch.func transforms are supported.
- Indices and offsets may have different integer dtypes. A table may have any strides and is not copied.
- The deprecated argument order (weight, input) raises TypeError.

Exceptions: docs/errors.md.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, T tables, F features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from . import _embedding_bag_ops as O
from . import _embedding_bag_sharded as sharded
from ._checks import (
    IndexRuntimeError,
    TypeRuntimeError,
    ValueAssertionError,
    ValueRuntimeError,
    describe,
    of_op,
)
from ._embedding_bag_ops import (
    MODES,
    NO_PADDING,
    NORMS,
    BagArgs,
    Step,
    lookup,
    record,
    record_sums,
)
from ._nested import jagged_like
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function,
    has_torch_function_variadic,
    refuse_nested,
)
from ._values import PLAIN, moded, special

__all__ = ["embedding", "embedding_bag", "embedding_bag_bytes", "embedding_bags", "quantize_rows"]

# ---- public functions


def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    weight_norm: str = "count",
    backend: str | None = None,
) -> Tensor:
    """Looks up rows of a table and reduces them bag by bag.

    Args:
        input: [N] int32 or int64, each in [0, E), with offsets; or [B, L] for bags of L indices; or a jagged nested
            tensor of B bags. int8, int16 and uint8 indices and offsets are converted to int64.
        weight: [E, D] float32, float64, bfloat16 or float16, with any strides; gradient: yes.
        offsets: [B] int32 or int64, start of each bag: begins with 0, non-decreasing, at most N. [B + 1] with
            include_last_offset.
        max_norm: scales the rows looked up whose norm exceeds max_norm to this norm, in place.
        norm_type: p of the p-norm of max_norm.
        scale_grad_by_freq: divides the gradient of a row by its number of occurrences in the call.
        mode: sum, mean, max or min.
        sparse: returns the gradient of weight as a coalesced sparse tensor with the rows that occur.
        per_sample_weights: w, shaped like input, of weight's dtype, or float32 with a 16-bit weight. Row e_i is
            replaced by w_i e_i. Gradient: yes.
        include_last_offset: whether offsets includes the end of the last bag; indices beyond it are ignored. Ignored
            for a 2-D input.
        padding_idx: row excluded from each reduction and from the count of a mean; may be negative.
        weight_norm: divisor of a weighted mean: "count", the number of rows, or "weight", the sum of the weights.
        backend: "cpu", "cuda" or "triton"; None selects one, see seqkernels.explain.
    Returns:
        [B, D], dtype of weight, computed in float32 or wider and rounded once. Zeros for a bag without rows. max and
        min select the first of equal values, and NaN if the bag has one.
    Raises:
        ValueError: invalid shape, offset, mode or other value.
        TypeError: invalid dtype, or an argument that is not a tensor.
        IndexError: index out of range.
        NotImplementedError: no implementation supports the inputs; the message lists the reasons.
        If torch raises RuntimeError for the same mistake, the exception is also a RuntimeError.
    Equivalent to: torch.nn.functional.embedding_bag, except for the differences listed at the top of this module.
    Deterministic: yes; the same bits for any number of threads.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.embedding_bag.html
    """
    if has_torch_function_variadic(input, weight, offsets, per_sample_weights) and dispatches(input, weight):
        return handle_torch_function(
            embedding_bag, (input, weight, offsets, per_sample_weights), input, weight, offsets, max_norm, norm_type,
            scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset, padding_idx,
            weight_norm=weight_norm, backend=backend,
        )  # fmt: skip
    if backend is not None:
        _require("embedding_bag", weight, backend)
    if type(input) is Tensor and max_norm is None and not (special() or _prefers_triton(weight, backend)):
        last = include_last_offset and offsets is not None
        try:
            padding = NO_PADDING if padding_idx is None else row_of(padding_idx, weight)
            if _recording() and (
                weight.requires_grad or (per_sample_weights is not None and per_sample_weights.requires_grad)
            ):
                args = BagArgs(MODES[mode], padding, last, NORMS[weight_norm], scale_grad_by_freq, sparse, padding)
                if per_sample_weights is None and args.mode <= MODES["mean"]:
                    return record_sums(weight, input, offsets, args)
                return record(args, None, input, offsets, per_sample_weights, weight)
            result: Tensor = O.ops.embedding_bag(
                weight, input, offsets, per_sample_weights, MODES[mode], padding, last, NORMS[weight_norm]
            )
            return result
        except ERRORS as error:
            if not (_narrow(input) or _narrow(offsets)):
                tensors = input, weight, offsets, per_sample_weights
                check("embedding_bag", *tensors, mode, padding_idx, weight_norm, max_norm)
                raise of_op("embedding_bag", error) from None
    return bag(
        input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
        include_last_offset, padding_idx, weight_norm, backend=backend,
    )  # fmt: skip


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Looks up rows of a table.

    Args:
        input: [*] int32 or int64 of any shape, each in [0, E); or a jagged nested tensor.
        weight: [E, D] float32, float64, bfloat16 or float16, with any strides; gradient: yes. Tables of other dtypes
            (integers, bool, complex) are copied by torch, without gradient and max_norm.
        padding_idx: row without a gradient; may be negative.
        max_norm, norm_type, scale_grad_by_freq, sparse, backend: as in embedding_bag.
    Returns:
        [*, D], dtype of weight; jagged for a jagged input.
    Raises: as embedding_bag.
    Equivalent to: torch.nn.functional.embedding, except for the differences listed at the top of this module.
    Deterministic: yes; the same bits for any number of threads.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.embedding.html
    """
    if has_torch_function_variadic(input, weight) and dispatches(input, weight):
        return handle_torch_function(
            embedding, (input, weight), input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            backend=backend,
        )  # fmt: skip
    if backend is not None:
        _require("embedding", weight, backend)
    return rows(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, backend=backend)


def embedding_bags(
    input: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    features: Sequence[int] | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    *,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    weight_norm: str = "count",
    backend: str | None = None,
) -> Tensor:
    """embedding_bag of several tables in one call. A feature has one bag per sample.

    Args:
        input: [N] int32 or int64, indices of the bags of the first feature, followed by those of the second, and so on.
        weights: T tables [E_t, D_t] of one dtype, as in embedding_bag; gradient: yes.
        offsets: [F * B + 1], start of each bag and end of the last; indices beyond it are ignored.
        features: [T] number of consecutive features of each table, with sum F; one each if None.
        mode, per_sample_weights [N], scale_grad_by_freq, sparse, weight_norm, backend: as in embedding_bag.
    Returns:
        [B, sum of features_t * D_t], the concatenated outputs of the features.
    Raises: as embedding_bag.
    Equivalent to: torch.cat of an embedding_bag of each feature.
    Deterministic: yes; the same bits for any number of threads, and as with one call per table.
    """
    given = input, offsets, per_sample_weights, *(weights if isinstance(weights, (tuple, list)) else (weights,))
    if has_torch_function(given) and dispatches(*given):
        return handle_torch_function(
            embedding_bags, given, input, weights, offsets, features, mode, per_sample_weights,
            scale_grad_by_freq=scale_grad_by_freq, sparse=sparse, weight_norm=weight_norm, backend=backend,
        )  # fmt: skip
    if backend is not None:
        for table in weights:
            _require("embedding_bags", table, backend, SEVERAL)
    return bags(input, weights, offsets, features, mode, per_sample_weights, scale_grad_by_freq, sparse, weight_norm)


def quantize_rows(weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Quantizes a table row by row to 8 bits, for `embedding_bag_bytes`.

    Args:
        weight: [E, D] float32, float64, bfloat16 or float16; D at least 1.
    Returns:
        uint8 [E, D + 8]: the bytes of a row, followed by its float32 scale and bias; value = byte * scale + bias.
    Raises:
        ValueError, TypeError, NotImplementedError: as embedding_bag.
    Equivalent to: torch.ops.quantized.embedding_bag_byte_prepack, bit for bit in float32.
    Deterministic: yes.
    """
    caller = "quantize_rows"
    if has_torch_function_variadic(weight) and dispatches(weight):
        return handle_torch_function(quantize_rows, (weight,), weight, backend=backend)
    check_table(caller, weight)
    if backend is not None or _prefers_triton(weight, None):
        _require(caller, weight, backend, caller)
    if weight.shape[1] < 1:
        raise ValueError(f"{caller}: weight must have columns, got {list(weight.shape)}")
    try:
        result: Tensor = O.ops.embedding_bag_pack_bytes(weight.detach())
    except RuntimeError as error:
        raise of_op(caller, error) from None
    return result


def embedding_bag_bytes(
    input: Tensor,
    packed: Tensor,
    offsets: Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    weight_norm: str = "count",
    backend: str | None = None,
) -> Tensor:
    """embedding_bag of a table quantized to 8 bits; inference only.

    Args:
        packed: uint8 [E, D + 8] from `quantize_rows` or torch.ops.quantized.embedding_bag_byte_prepack.
        per_sample_weights: float32, shaped like input.
        Others: as in embedding_bag.
    Returns:
        float32 [B, D].
    Raises: as embedding_bag.
    Equivalent to: torch.ops.quantized.embedding_bag_byte_rowwise_offsets, extended to each mode.
    Deterministic: yes; the same bits for any number of threads.
    """
    if has_torch_function_variadic(input, packed, offsets, per_sample_weights) and dispatches(input, packed):
        return handle_torch_function(
            embedding_bag_bytes, (input, packed, offsets, per_sample_weights), input, packed, offsets, mode,
            per_sample_weights, include_last_offset, padding_idx, weight_norm=weight_norm, backend=backend,
        )  # fmt: skip
    if backend is not None or _prefers_triton(packed, None):
        _require("embedding_bag_bytes", packed, backend, "a table of bytes", dtype=torch.float32)
    if isinstance(input, Tensor) and input.is_nested:
        input, offsets, per_sample_weights = of_nested("embedding_bag_bytes", input, offsets, per_sample_weights)
        include_last_offset = True
    last = include_last_offset and offsets is not None
    input, offsets = _widened(input), _widened(offsets)
    try:
        padding = NO_PADDING if padding_idx is None else row_of(padding_idx, packed)
        if per_sample_weights is not None:
            per_sample_weights = per_sample_weights.detach()
        result: Tensor = O.ops.embedding_bag_bytes(
            packed, input, offsets, per_sample_weights, MODES[mode], padding, last, NORMS[weight_norm]
        )
        return result
    except ERRORS as error:
        check("embedding_bag_bytes", input, packed, offsets, per_sample_weights, mode, padding_idx, weight_norm)
        raise of_op("embedding_bag_bytes", error) from None


# ---- eager calls; functions of other modules are bound once, because each attribute lookup takes time

SEVERAL = "a lookup in several tables"  # an option that Triton does not support
ERRORS = (AttributeError, KeyError, RuntimeError, TypeError, ValueError)
_compiling, _recording = torch.compiler.is_compiling, torch.is_grad_enabled
_FULL = (torch.float32, torch.float64)


def plain_rows(
    input: Tensor, weight: Tensor, padding_idx: int | None, by_frequency: bool, sparse: bool
) -> Tensor | None:
    """embedding of dense tensors on the CPU in a plain eager call; None for other tensors and for invalid arguments.

    Rows are copies, so that torch.embedding has the same bits. Its autograd node, in C++, records a call in a fraction
    of the time of one in Python, and its dense gradient of a few rows takes about as long. Its sparse gradient of
    several rows is not coalesced, and its gradient of half types is not summed in float32.
    """
    try:
        if not (weight.is_cpu and input.is_cpu) or weight.layout is not _STRIDED or input.is_nested:
            return None
        padding, n = NO_PADDING, input.numel()
        if padding_idx is not None:
            usual = type(padding_idx) is int and 0 <= padding_idx < weight.size(0)
            padding = padding_idx if usual else row_of(padding_idx, weight)
        if not (_recording() and weight.requires_grad):
            return _copies(weight, input) if n < FEW_COPIES else O.rows_at(weight, input)
        if (
            (n <= 1 or not sparse)
            and n <= FEW_ROWS
            and n * weight.shape[1] <= O.FEW_ELEMENTS
            and weight.numel() <= SMALL_TABLE
            and not by_frequency
            and weight.dtype in _FULL
        ):
            return _copies(weight, input, padding, False, sparse)
        if weight.dtype not in backends.DTYPES:
            return None
        args = BagArgs(0, NO_PADDING, False, 0, by_frequency, sparse, padding, (), False, False, input.shape)
        return record_sums(weight, input, None, args)
    except (IndexError, *ERRORS):  # the general path raises the error
        return None


_copies, _STRIDED = torch.embedding, torch.strided
# Up to here, the overhead of a call takes as much time as the difference of the gradients. torch takes fresh pages from
# the system for the gradient of a larger table, which costs several times more than filling it.
FEW_ROWS = 4096
SMALL_TABLE = 4 << 20  # elements
FEW_COPIES = 256  # rows, which are copied without a look at their size


def _in_child() -> None:
    """In a forked child, ops of torch with more elements would wait for threads that only the parent has."""
    global SMALL_TABLE, FEW_COPIES
    O.FEW_ELEMENTS, SMALL_TABLE, FEW_COPIES = 1 << 15, 0, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def row_of(padding_idx: int, table: Tensor) -> int:
    """padding_idx as a non-negative row."""
    E = table.shape[0]
    if -E <= padding_idx < E and type(padding_idx) is not float:
        return padding_idx if padding_idx >= 0 else padding_idx + E
    raise ValueError(f"padding_idx {padding_idx}")


# ---- all other calls


def bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
    weight_norm: str,
    step: Step | None = None,
    backend: str | None = None,
) -> Tensor:
    """embedding_bag. step: the step of a fused optimiser, which replaces the gradient in backward."""
    caller = "embedding_bag"
    if isinstance(input, Tensor) and input.is_nested:
        input, offsets, per_sample_weights = of_nested(caller, input, offsets, per_sample_weights)
        include_last_offset = True
    input, offsets = _widened(input), _widened(offsets)
    check(caller, input, weight, offsets, per_sample_weights, mode, padding_idx, weight_norm, max_norm)
    padding = NO_PADDING if padding_idx is None else row_of(padding_idx, weight)
    last = include_last_offset and offsets is not None
    if sharded.is_sharded(input) or sharded.is_sharded(weight):
        return _sharded_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, last,
            padding_idx, weight_norm, step, backend,
        )  # fmt: skip
    args = BagArgs(MODES[mode], padding, last, NORMS[weight_norm], scale_grad_by_freq, sparse, padding)
    if _in_triton(caller, weight, backend, max_norm, step):
        args = args._replace(triton=True)
    try:
        if max_norm is not None:
            renorm(weight, input, max_norm, norm_type)
        return lookup((weight,), per_sample_weights, input, offsets, args, step)
    except RuntimeError as error:
        raise of_op(caller, error) from None


def _sharded_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    mode: str,
    sparse: bool,
    per_sample_weights: Tensor | None,
    last: bool,
    padding_idx: int | None,
    weight_norm: str,
    step: Step | None,
    backend: str | None,
) -> Tensor:
    """embedding_bag of DTensors."""
    caller = "embedding_bag"

    def lookup_here(input: Tensor, table: Tensor, offsets: Tensor | None, weights: Tensor | None) -> Tensor:
        return bag(
            input, table, offsets, None, 2.0, scale_grad_by_freq, mode, False, weights, last, padding_idx, weight_norm,
            step, backend,
        )  # fmt: skip

    def lookup_block(
        input: Tensor, table: Tensor, offsets: Tensor, weights: Tensor | None, mode: str
    ) -> tuple[Tensor, Tensor]:
        args = BagArgs(MODES[mode], NO_PADDING, True, by_frequency=scale_grad_by_freq, return_arg=True)
        if _in_triton(caller, table, backend, max_norm, step):
            args = args._replace(triton=True)
        return O.lookup_with_arg((table,), weights, input, offsets, args, step)

    return sharded.bag(
        caller, input, weight, offsets, per_sample_weights, mode, weight_norm, last, padding_idx,
        _renorm_of(max_norm, norm_type), scale_grad_by_freq, sparse, step, lookup_here, lookup_block,
    )  # fmt: skip


def _renorm_of(max_norm: float | None, norm_type: float) -> sharded.Renorm | None:
    return None if max_norm is None else lambda table, indices: renorm(table, indices, max_norm, norm_type)


def rows(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None,
    max_norm: float | None,
    norm_type: float,
    scale_grad_by_freq: bool,
    sparse: bool,
    step: Step | None = None,
    backend: str | None = None,
) -> Tensor:
    """embedding, computed as bags of one index."""
    caller = "embedding"
    usual = step is None and max_norm is None and backend is None
    if usual and type(input) is Tensor and type(weight) in PLAIN and not moded():
        found = plain_rows(input, weight, padding_idx, scale_grad_by_freq, sparse)
        if found is not None:
            return found
    if type(input) is not Tensor and sharded.is_sharded(input):
        check_rows(caller, input, weight, padding_idx, max_norm)

        def lookup_here(input: Tensor, table: Tensor, padding: int | None) -> Tensor:
            return rows(input, table, padding, None, 2.0, scale_grad_by_freq, False, step, backend)

        scale = _renorm_of(max_norm, norm_type)
        return sharded.rows(caller, input, weight, padding_idx, scale, scale_grad_by_freq, sparse, step, lookup_here)
    triton = _in_triton(caller, weight, backend, max_norm, step)
    try:
        if input.is_nested:
            if input.layout != torch.jagged:
                refuse_nested(caller, "use one of layout torch.jagged", input=input)
            values = input.values()
            found = rows(values, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, step, backend)
            return jagged_like(input, found)
        if max_norm is not None:
            check_rows(caller, input, weight, padding_idx, max_norm)
            renorm(weight, input, max_norm, norm_type)
        padding = NO_PADDING if padding_idx is None else row_of(padding_idx, weight)
        shape = input.shape
        each = input.unsqueeze(1) if len(shape) == 1 else input.reshape(-1, 1)
        if special():
            check_rows(caller, input, weight, padding_idx, max_norm)
            args = BagArgs(0, NO_PADDING, False, 0, scale_grad_by_freq, sparse, padding, triton=triton)
            found = lookup((weight,), None, each, None, args, step)
        elif _recording() and weight.requires_grad:
            leading = None if len(shape) == 1 else shape
            args = BagArgs(0, NO_PADDING, False, 0, scale_grad_by_freq, sparse, padding, (), False, triton, leading)
            return record(args, step, each, None, None, weight)
        else:
            ops = O.triton_ops if triton else O.ops
            found = ops.embedding_bag(weight, each, None, None, 0)
        return found if len(shape) == 1 else found.reshape(*shape, found.shape[1])
    except ERRORS as error:
        if isinstance(weight, Tensor) and weight.dtype not in backends.DTYPES and backend is None and step is None:
            return _copied_rows(caller, input, weight, padding_idx, max_norm)
        check_rows(caller, input, weight, padding_idx, max_norm)
        raise of_op(caller, error) from None


def _copied_rows(caller: str, input: Tensor, weight: Tensor, padding_idx: int | None, max_norm: float | None) -> Tensor:
    """embedding of a table of integers, bool, complex or 8-bit numbers: a copy by torch, without gradient."""
    if _recording() and weight.requires_grad:
        raise TypeRuntimeError(
            f"{caller}: weight must be float32, float64, bfloat16 or float16 if it requires a gradient, got "
            f"{weight.dtype}"
        )
    if max_norm is not None:
        raise TypeRuntimeError(
            f"{caller}: weight must be float32, float64, bfloat16 or float16 with max_norm, got {weight.dtype}"
        )
    check_integers(caller, "input", input)
    check_shape(caller, weight)
    check_devices(caller, weight, input=input)
    check_rest(caller, weight, padding_idx, max_norm)
    try:
        return torch.nn.functional.embedding(input, weight)
    except (IndexError, RuntimeError) as error:
        if not isinstance(error, IndexError) and "out of range" not in str(error):
            raise
        E = weight.shape[0]
        raise IndexRuntimeError(f"{caller}: input must hold indices in [0, E) = [0, {E})") from None


def bags(
    input: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    features: Sequence[int] | None,
    mode: str,
    per_sample_weights: Tensor | None,
    scale_grad_by_freq: bool,
    sparse: bool,
    weight_norm: str,
    step: Step | None = None,
) -> Tensor:
    """embedding_bags. step: as in `bag`."""
    counts = tuple(features) if features is not None else (1,) * len(weights)
    input, offsets = _widened(input), _widened(offsets)
    if weights and _prefers_triton(weights[0], None):
        _require("embedding_bags", weights[0], None, SEVERAL)
    try:
        args = BagArgs(
            MODES[mode], NO_PADDING, True, NORMS[weight_norm], scale_grad_by_freq, sparse, NO_PADDING, counts
        )
        if step is None and not recorded(weights, per_sample_weights) and not special():
            result: Tensor = O.ops.embedding_bags(list(weights), counts, input, offsets, per_sample_weights, *args[:4])
            return result
        if special():
            check_bags(input, weights, offsets, counts, mode, per_sample_weights, weight_norm)
        return lookup(weights, per_sample_weights, input, offsets, args, step)
    except ERRORS as error:
        check_bags(input, weights, offsets, counts, mode, per_sample_weights, weight_norm)
        raise of_op("embedding_bags", error) from None


def renorm(weight: Tensor, indices: Tensor, max_norm: float, norm_type: float) -> None:
    """Applies max_norm to the rows looked up, in place."""
    with torch.no_grad():
        O.ops.embedding_bag_renorm_(weight, indices, float(max_norm), float(norm_type))
    if not _compiling():
        torch.autograd.graph.increment_version(weight)


def of_nested(
    caller: str, input: Any, offsets: Tensor | None, weights: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Indices [N], offsets [B + 1] and weights [N] of a jagged input."""
    if input.layout != torch.jagged or input.dim() != 2:
        what = describe(input) if input.layout == torch.jagged else f"one of layout {input.layout}"
        raise ValueError(f"{caller}: input must be a jagged nested tensor of 2 dimensions, got {what}")
    if offsets is not None:
        raise ValueError(f"{caller}: offsets must be None where input is nested, got {describe(offsets)}")
    if weights is not None:
        if not (isinstance(weights, Tensor) and weights.is_nested and weights.layout == torch.jagged):
            raise ValueError(f"{caller}: per_sample_weights must be nested where input is, got {describe(weights)}")
        if weights.shape != input.shape:  # the shapes of jagged tensors are equal if they share their offsets
            raise ValueError(
                f"{caller}: per_sample_weights must have the shape of input, {input.shape}, got {weights.shape}"
            )
    if input.lengths() is not None:  # with holes
        input, weights = input.contiguous(), None if weights is None else weights.contiguous()
    return input.values(), input.offsets(), None if weights is None else weights.values()


# ---- argument checks of the public functions; the ops also check all that could access memory out of bounds


def _require(caller: str, table: Any, backend: str | None, *special: str, dtype: torch.dtype | None = None) -> str:
    """Name of the implementation that runs.

    Args:
        special: options in use that some implementations do not support.
        dtype: dtype of the output, if it differs from that of the table.
    """
    if not isinstance(table, Tensor):
        raise TypeError(f"{caller}: weight must be a tensor, got {describe(table)}")
    request = backends.Request(table.device, dtype or table.dtype, extras=special)
    return backends.choose(caller, backends.EMBEDDING_BAG, request, backend, "a table", table.shape)


def _prefers_triton(table: Any, backend: str | None) -> bool:
    """Whether `backend` is triton, or the table is on a CUDA device for which this build has no CUDA kernels."""
    if backend is not None:
        return backend == "triton"
    return isinstance(table, Tensor) and table.is_cuda and not backends.cuda_runs_on(table.device)


def _in_triton(caller: str, table: Any, backend: str | None, max_norm: float | None, step: Step | None) -> bool:
    """Whether the Triton kernels run a lookup. Raises if they are selected and do not support it."""
    if not _prefers_triton(table, backend):
        return False
    special = [*["max_norm"] * (max_norm is not None), *["fused_optimizer"] * (step is not None)]
    return _require(caller, table, backend, *special) == "triton"


def check(
    caller: str,
    input: Any,
    weight: Any,
    offsets: Any,
    weights: Any,
    mode: Any,
    padding_idx: Any,
    weight_norm: Any,
    max_norm: Any = None,
) -> None:
    """Checks the arguments of embedding_bag, embedding_bag_bytes and modules with the same arguments."""
    check_integers(caller, "input", input)
    if caller == "embedding_bag_bytes":
        if not isinstance(weight, Tensor) or weight.dtype != torch.uint8:
            raise TypeError(f"{caller}: packed must be a uint8 tensor, got {describe(weight)}")
        if weight.dim() != 2 or weight.shape[1] <= O.BYTES_PER_ROW:
            raise ValueError(f"{caller}: packed must have shape [E, D + 8], got {list(weight.shape)}")
    else:
        check_table(caller, weight)
    check_options(caller, mode, weight_norm)
    if input.dim() == 1:
        if offsets is None:
            raise ValueError(f"{caller}: offsets must be a 1-D tensor where input is 1-D, got None")
        check_integers(caller, "offsets", offsets)
        if offsets.dim() != 1:
            raise ValueError(f"{caller}: offsets must have 1 dimension, got shape {list(offsets.shape)}")
    elif input.dim() != 2:
        raise ValueError(f"{caller}: input must be [N] with offsets, or [B, L], got shape {list(input.shape)}")
    elif offsets is not None:
        raise ValueError(f"{caller}: offsets must be None where input is 2-D, got {describe(offsets)}")
    check_weights(caller, weights, input, weight.dtype)
    check_devices(caller, weight, input=input, offsets=offsets, per_sample_weights=weights)
    check_rest(caller, weight, padding_idx, max_norm)


def check_rows(caller: str, input: Any, weight: Any, padding_idx: Any, max_norm: Any) -> None:
    """Checks the arguments of embedding."""
    check_integers(caller, "input", input)
    check_table(caller, weight)
    check_devices(caller, weight, input=input)
    check_rest(caller, weight, padding_idx, max_norm)


def check_bags(
    input: Any,
    tables: Any,
    offsets: Any,
    features: Sequence[Any],
    mode: Any,
    weights: Any,
    weight_norm: Any,
) -> None:
    """Checks the arguments of embedding_bags."""
    caller = "embedding_bags"
    if len(tables) == 0:
        raise ValueError(f"{caller}: weights must hold at least one table, got none")
    for table in tables:
        check_table(caller, table, "weights")
        if table.dtype != tables[0].dtype:
            raise TypeError(f"{caller}: weights must have one dtype, got {tables[0].dtype} and {table.dtype}")
    check_options(caller, mode, weight_norm)
    if len(features) != len(tables) or not all(isinstance(n, int) and n > 0 for n in features):
        raise ValueError(
            f"{caller}: features must be a positive integer for each of {len(tables)} tables, got {list(features)}"
        )
    check_integers(caller, "input", input)
    check_integers(caller, "offsets", offsets)
    for name, t in (("input", input), ("offsets", offsets)):
        if t.dim() != 1:
            raise ValueError(f"{caller}: {name} must have 1 dimension, got shape {list(t.shape)}")
    F = sum(features)
    if offsets.shape[0] < 1 or (offsets.shape[0] - 1) % F:
        raise ValueError(f"{caller}: offsets must have F * B + 1 elements, F = {F}, got {offsets.shape[0]}")
    check_weights(caller, weights, input, tables[0].dtype)
    for table in tables:
        check_devices(caller, table, input=input, offsets=offsets, per_sample_weights=weights)


def check_integers(caller: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {describe(t)}")
    refuse_nested(caller, "use a jagged tensor of embedding_bag, or its values() and offsets()", **{name: t})
    if t.dtype not in (torch.int64, torch.int32):
        hint = "; weight must be the second argument" if name == "input" and t.is_floating_point() else ""
        raise TypeRuntimeError(f"{caller}: {name} must be int64 or int32, got {t.dtype}{hint}")


_NARROW = (torch.int16, torch.int8, torch.uint8)


def _narrow(t: Any) -> bool:
    """Whether a tensor has an integer dtype that torch's embedding_bag supports and the ops do not."""
    return isinstance(t, Tensor) and t.dtype in _NARROW


def _widened(t: Any) -> Any:
    return t.to(torch.int64) if _narrow(t) else t


def check_table(caller: str, table: Any, name: str = "weight") -> None:
    if not isinstance(table, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {describe(table)}")
    refuse_nested(caller, "use one table [E, D]", **{name: table})
    if table.layout != torch.strided:
        raise TypeError(f"{caller}: {name} must be dense, got layout {table.layout}")
    backends.require(caller, backends.EMBEDDING_BAG, table, "a table")
    check_shape(caller, table, name)


def check_shape(caller: str, table: Tensor, name: str = "weight") -> None:
    if table.dim() != 2:
        raise ValueRuntimeError(f"{caller}: {name} must have shape [E, D], got {list(table.shape)}")


def check_options(caller: str, mode: Any, weight_norm: Any) -> None:
    if not isinstance(mode, str) or mode not in MODES:
        raise ValueError(f"{caller}: mode must be one of sum, mean, max or min, got {mode!r}")
    if not isinstance(weight_norm, str) or weight_norm not in NORMS:
        raise ValueError(f"{caller}: weight_norm must be count or weight, got {weight_norm!r}")


def check_weights(caller: str, weights: Any, input: Tensor, dtype: torch.dtype) -> None:
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"{caller}: per_sample_weights must be a tensor, got {describe(weights)}")
    if weights.shape != input.shape:
        raise ValueError(
            f"{caller}: per_sample_weights must have the same shape as the input, {list(input.shape)}, "
            f"got {list(weights.shape)}"
        )
    if dtype == torch.uint8:
        dtype = torch.float32
    if weights.dtype not in (dtype, torch.promote_types(dtype, torch.float32)):
        also = " or float32" if dtype.itemsize == 2 else ""
        raise TypeRuntimeError(
            f"{caller}: per_sample_weights must be of the table's dtype, {dtype}{also}, got {weights.dtype}"
        )


def check_devices(caller: str, table: Tensor, **others: Tensor | None) -> None:
    for name, t in others.items():
        if t is not None and t.device != table.device:
            raise ValueError(f"{caller}: {name} must be on the table's device, {table.device}, got {t.device}")


def check_rest(caller: str, table: Tensor, padding_idx: Any, max_norm: Any) -> None:
    if padding_idx is not None:
        E = table.shape[0]
        if not isinstance(padding_idx, (int, torch.SymInt)) or isinstance(padding_idx, bool):
            raise TypeError(f"{caller}: padding_idx must be an integer, got {padding_idx!r}")
        if not -E <= padding_idx < E:
            error = ValueAssertionError if caller == "embedding" else ValueRuntimeError  # the types of torch
            raise error(f"{caller}: padding_idx must be within the table, [-E, E) = [-{E}, {E}), got {padding_idx}")
    if max_norm is not None and not max_norm >= 0:
        raise ValueError(f"{caller}: max_norm must be at least 0, got {max_norm}")


recorded = O.recorded
