"""Jagged nested tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._values import tracing


def jagged_like(nested: Any, values: Tensor, jagged_dim: int = 1) -> Tensor:
    """A jagged tensor with new values and the structure of `nested`, including its minimum and maximum length.

    Without these lengths, torch would pad the result to a different size.
    """
    extremes = {} if tracing() else {"min_seqlen": nested._get_min_seqlen(), "max_seqlen": nested._get_max_seqlen()}
    return torch.nested.nested_tensor_from_jagged(
        values, nested.offsets(), nested.lengths(), jagged_dim=jagged_dim, **extremes
    )
