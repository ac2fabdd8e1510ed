"""Exceptions of all operators and what their messages are made of. The table of exceptions is docs/errors.md.

One rule: ValueError for values and shapes, TypeError for types and dtypes, IndexError for indices out of range,
NotImplementedError for a case without an implementation. Where a function takes the place of torch's, and torch raises
another type for the same mistake, the exception is of both types.
"""

from __future__ import annotations

import re

from torch import Tensor


class ValueRuntimeError(ValueError, RuntimeError):
    """A value or a shape that does not fit, where torch raises RuntimeError."""


class ValueAssertionError(ValueError, AssertionError):
    """A value or a shape that does not fit, where torch raises AssertionError."""


class TypeRuntimeError(TypeError, RuntimeError):
    """A type or a dtype that does not fit, where torch raises RuntimeError."""


class TypeAssertionError(TypeError, AssertionError):
    """A type or a dtype that does not fit, where torch raises AssertionError."""


class IndexRuntimeError(IndexError, RuntimeError):
    """An index out of range, where torch raises RuntimeError."""


_DTYPE = re.compile(r"must be (bool|u?int\d+|b?float\d+)\b")


def of_op(who: str, error: Exception) -> Exception:
    """The error of an op as the public function `who` raises it: under its name, of the type that the rule gives."""
    op, _, rest = str(error).partition(": ")
    if type(error) is not RuntimeError or " must " not in rest or not op.isidentifier():
        return error
    if " must hold indices" in rest:
        return IndexRuntimeError(f"{who}: {rest}")
    if _DTYPE.search(rest):
        return TypeRuntimeError(f"{who}: {rest}")
    return ValueRuntimeError(f"{who}: {rest}")


def describe(value: object) -> str:
    """A value as error messages show it."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__
