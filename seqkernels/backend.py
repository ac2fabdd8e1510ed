"""Which implementation runs for given inputs, and why the others do not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkernels import _C

CPU_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def unsupported_on_cpu(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons why the C++ CPU kernels cannot take these inputs; an empty list: they can."""
    reasons = []
    if device.type != "cpu":
        reasons.append(f"the tensors are on {device}")
    if dtype not in CPU_DTYPES:
        reasons.append(f"dtype {dtype} is none of {', '.join(str(d) for d in CPU_DTYPES)}")
    return reasons


def require(op: str, input: Tensor) -> None:
    """Raises NotImplementedError with every backend's reasons where none can run op on this input."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}")
    if input.device.type == "cpu" and input.dtype in CPU_DTYPES:
        return
    reasons = unsupported_on_cpu(input.device, input.dtype)
    raise NotImplementedError(
        f"{op}: no backend takes an input of shape {list(input.shape)}, {input.dtype}, on {input.device}. "
        f"cpu: {'; '.join(reasons)}. cuda, triton: not written yet."
    )


def explain(
    op: str,
    *,
    T: int,
    B: int,
    D: int,
    H: int,
    proj_size: int = 0,
    num_heads: int = 1,
    bidirectional: bool = False,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Which kernel serves a layer of a given shape, and how its work is cut among threads.

    Args:
        op: lstm, lstm_coupled, lstm_norm, lstm_nested, gru, gru_before, gru_norm, gru_projected, mgu, mgu_before,
            rnn_tanh or rnn_relu; a layer's options choose among those of its family.
        T, B, D, H: steps, sequences, input size, hidden size.
        lengths: [B] real steps of each sequence; all T if absent.
    Returns:
        kernel, isa; threads: those that run, as row_groups (sets of sequences that never meet) x unit_groups (shares of
        the hidden units, which meet at a barrier once a step) x directions; unsupported: why other backends do not run.
    Raises:
        ValueError: no such op. NotImplementedError: no backend takes such inputs.
    """
    from seqkernels.functional._recurrent_ops import KINDS  # which needs this file

    if op not in KINDS:
        raise ValueError(f"explain: op must be one of {', '.join(KINDS)}, got {op!r}")
    require(op, torch.empty(0, dtype=dtype, device=device))
    tokens = T * B if lengths is None else sum(lengths)
    sizes = {"T": T, "B": B, "N": tokens, "D": D, "H": H, "P": proj_size or H, "directions": 1 + bidirectional}
    gates = len(KINDS[op].gates)
    plan = _C.explain_recurrent(gates=gates, **sizes, heads=num_heads, float64=dtype == torch.float64)
    return {
        "op": op,
        "kernel": "cpu",
        **plan,
        "unsupported": {"cuda": ["not written yet"], "triton": ["not written yet"]},
    }
