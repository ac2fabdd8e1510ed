"""Exceptions of all operators and helpers for their messages. docs/errors.md has the table of exceptions.

ValueError is for values and shapes, TypeError for types and dtypes, IndexError for indices out of range, and
NotImplementedError for cases without an implementation. If torch raises another type for the same mistake in the
function that ours replaces, the exception has both types.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence

import torch
from torch import Tensor

Lengths = Tensor | Sequence[int]


class ValueRuntimeError(ValueError, RuntimeError):
    """Invalid value or shape, for which torch raises RuntimeError."""


class ValueAssertionError(ValueError, AssertionError):
    """Invalid value or shape, for which torch raises AssertionError."""


class TypeRuntimeError(TypeError, RuntimeError):
    """Invalid type or dtype, for which torch raises RuntimeError."""


class TypeAssertionError(TypeError, AssertionError):
    """Invalid type or dtype, for which torch raises AssertionError."""


class IndexRuntimeError(IndexError, RuntimeError):
    """Index out of range, for which torch raises RuntimeError."""


# Texts of torch.distributed.tensor for a mixture of DTensors and plain tensors, and for an op without a rule.
_NO_RULE = "got mixed torch.Tensor and DTensor", "does not have a sharding strategy registered"
_DTYPE = re.compile(r"must be (bool|u?int\d+|b?float\d+)\b")


def of_op(caller: str, error: Exception) -> Exception:
    """Converts an error raised by an op into the exception of the public function `caller`, with its name and type."""
    if any(text in str(error) for text in _NO_RULE):
        return NotImplementedError(
            f"{caller}: inputs and parameters must be plain tensors, got a DTensor, for which {caller} has no sharding "
            "rule; convert each DTensor with to_local() or full_tensor()"
        )
    op, _, rest = str(error).partition(": ")
    if type(error) is NotImplementedError and op == "embedding_bag":
        return NotImplementedError(f"{caller}: {rest}")
    if type(error) is not RuntimeError or " must " not in rest or not op.isidentifier():
        return error
    if " must hold indices" in rest:
        return IndexRuntimeError(f"{caller}: {rest}")
    if _DTYPE.search(rest):
        return TypeRuntimeError(f"{caller}: {rest}")
    return ValueRuntimeError(f"{caller}: {rest}")


def describe(value: object) -> str:
    """Description of a value for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


def lengths_tensor(
    caller: str, lengths: Lengths, B: int, device: torch.device, name: str = "lengths", batch: str = "B"
) -> Tensor:
    """The checked lengths of sequences as an int64 tensor on `device`."""
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.tensor([operator.index(n) for n in lengths], dtype=torch.int64, device=device)
        except TypeError:
            raise TypeError(f"{caller}: {name} must be a tensor or a sequence of int, got {lengths!r}") from None
    if lengths.dtype not in (torch.int64, torch.int32):
        raise TypeRuntimeError(f"{caller}: {name} must be int32 or int64, got {lengths.dtype}")
    if tuple(lengths.shape) != (B,):
        raise ValueRuntimeError(f"{caller}: {name} must have shape [{batch}] = [{B}], got {list(lengths.shape)}")
    return lengths.to(device, torch.int64)
