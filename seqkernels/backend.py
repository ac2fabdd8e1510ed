"""Which implementation runs for given inputs, and why the others do not."""

from __future__ import annotations

import importlib.util
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


def unsupported_on_cuda(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons why the CUDA kernels cannot. Which layers they take they say when they are called."""
    reasons = []
    if not _CUDA_BUILT:
        reasons.append("this build has none: they are built where torch has CUDA and nvcc is found")
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device}")
    if dtype not in CPU_DTYPES:
        reasons.append(f"dtype {dtype} is none of {', '.join(str(d) for d in CPU_DTYPES)}")
    return reasons


_CUDA_BUILT: bool = _C.build_info()["cuda"]
_BY_HAND = "never chosen: call seqkernels.triton"


def require(op: str, input: Tensor, what: str = "an input") -> None:
    """Raises NotImplementedError with every backend's reasons where none can run op on this input, or what it is."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}")
    kind = input.device.type
    if (kind == "cpu" or (kind == "cuda" and _CUDA_BUILT)) and input.dtype in CPU_DTYPES:
        return
    cpu, cuda = (f(input.device, input.dtype) for f in (unsupported_on_cpu, unsupported_on_cuda))
    raise NotImplementedError(
        f"{op}: no backend takes {what} of shape {list(input.shape)}, {input.dtype}, on {input.device}. "
        f"cpu: {'; '.join(cpu)}. cuda: {'; '.join(cuda)}. triton: {_BY_HAND}."
    )


def unsupported_attention_on_triton(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Reasons why the Triton kernels of attention cannot; an empty list: they can."""
    reasons = []
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device}")
    elif importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    if dtype not in CPU_DTYPES:
        reasons.append(f"dtype {dtype} is none of {', '.join(str(d) for d in CPU_DTYPES)}")
    return reasons


def unsupported_attention_by_torch(extras: Sequence[str]) -> list[str]:
    """Reasons why torch's own function cannot serve a call; extras: what the call asks for that it does not have."""
    return [f"it has no {', no '.join(extras)}"] if extras else []


def require_attention(op: str, query: Tensor) -> None:
    """Raises NotImplementedError with every backend's reasons where none can run on such a query."""
    kind = query.device.type
    if kind in ("cpu", "cuda", "meta") and query.dtype in CPU_DTYPES:
        return
    cpu, triton = unsupported_on_cpu(query.device, query.dtype), unsupported_attention_on_triton
    raise NotImplementedError(
        f"{op}: no backend takes a query of shape {list(query.shape)}, {query.dtype}, on {query.device}. "
        f"cpu: {'; '.join(cpu)}. triton: {'; '.join(triton(query.device, query.dtype))}. "
        "torch: asked for by name only, but for dense half types on CUDA."
    )


def choose_attention(
    op: str, backend: str | None, device: torch.device, dtype: torch.dtype, extras: Sequence[str], masked: bool
) -> str:
    """Which of cpu, triton and torch runs a call; meta: none does, there are shapes alone.

    backend: which one was asked for, or None.
    masked: whether the call has a mask, dropout or Dv other than D. On CUDA torch's own kernels (cuDNN, flash) run what
    is in half precision and has nothing of its own: no figure of ours says otherwise yet.
    """
    if backend is None:
        if device.type != "cuda":
            return "meta" if device.type == "meta" else "cpu"
        half = dtype in (torch.float16, torch.bfloat16)
        return "torch" if half and not masked and not extras else "triton"
    found = {
        "cpu": lambda: unsupported_on_cpu(device, dtype),
        "triton": lambda: unsupported_attention_on_triton(device, dtype),
        "torch": lambda: unsupported_attention_by_torch(extras),
    }
    if backend not in found:
        raise ValueError(f"{op}: backend must be None, {', '.join(found)}, got {backend!r}")
    reasons = found[backend]()
    if reasons:
        raise NotImplementedError(f"{op}: backend {backend} cannot run this call: {'; '.join(reasons)}")
    return backend


def explain(op: str, **sizes: Any) -> dict[str, Any]:
    """Which kernel serves an operator of a given shape, and how its work is cut among threads.

    Args:
        op: lstm, lstm_coupled, lstm_norm, lstm_nested, gru, gru_before, gru_norm, gru_projected, mgu, mgu_before,
            rnn_tanh or rnn_relu: one layer; a layer's options choose among those of its family. Or embedding_bag, or
            attention.
        T, B, D, H (layers): steps, sequences, input size, hidden size. proj_size=0, num_heads=1, bidirectional=False.
            lengths: [B] real steps of each sequence; all T if absent.
        E, D, N, B (embedding_bag): table rows, columns, indices, bags. mode="sum".
        B, Hq, Tq, Tk, D (attention): as in scaled_dot_product_attention. Hk=Hq, Dv=D, is_causal=False; masked: whether
            there is a mask or dropout; extras: what else is asked for, such as "lengths"; backend=None.
        dtype=torch.float32, device="cpu".
    Returns:
        kernel: cpu or cuda; of attention cpu, triton or torch. unsupported: why other backends do not run. Of the
        CPU's: isa; threads: those that run; of attention also tasks: what threads share, and block: queries and keys of
        one. For layers as row_groups (sets of sequences that never meet) x unit_groups (shares of the hidden units,
        which meet at a barrier once a step) x directions. For layers on CUDA: which kernels run forward and backward.
    Raises:
        ValueError: no such op. TypeError: a size is absent. NotImplementedError: no backend takes such inputs.
    """
    from seqkernels.functional._recurrent_ops import KINDS  # which needs this file

    if op == "attention":
        return {"op": op, **_explain_attention(**sizes)}
    if op == "embedding_bag":
        plan = _explain_embedding_bag(**sizes)
    elif op in KINDS:
        plan = _explain_recurrent(op, len(KINDS[op].gates), **sizes)
    else:
        raise ValueError(f"explain: op must be one of {', '.join(KINDS)}, embedding_bag, attention, got {op!r}")
    asked = torch.device(sizes.get("device", "cpu")), sizes.get("dtype", torch.float32)
    unsupported = {"cpu": unsupported_on_cpu(*asked), "cuda": unsupported_on_cuda(*asked), "triton": [_BY_HAND]}
    kernel = asked[0].type
    return {"op": op, "kernel": kernel, **plan, "unsupported": {k: v for k, v in unsupported.items() if k != kernel}}


def _explain_recurrent(
    op: str,
    gates: int,
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
    require(op, torch.empty(0, dtype=dtype, device=device))
    if torch.device(device).type == "cuda":
        wanted: dict[str, Any] = dict(kind=op, dtype=str(dtype).removeprefix("torch."), T=T, B=B, D=D, H=H)
        return _C.explain_recurrent_cuda(**wanted, directions=1 + bidirectional, major=0)
    tokens = T * B if lengths is None else sum(lengths)
    sizes = {"T": T, "B": B, "N": tokens, "D": D, "H": H, "P": proj_size or H, "directions": 1 + bidirectional}
    return _C.explain_recurrent(gates=gates, **sizes, heads=num_heads, float64=dtype == torch.float64)


def _explain_embedding_bag(
    *,
    E: int,
    D: int,
    N: int,
    B: int,
    mode: str = "sum",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Threads share the indices, and the bags as one index each, as threads_for in csrc/embedding_bag/bags.h says."""
    if mode not in ("sum", "mean", "max", "min"):
        raise ValueError(f"explain: mode must be one of sum, mean, max or min, got {mode!r}")
    require("embedding_bag", torch.empty(0, dtype=dtype, device=device), "a table")
    if torch.device(device).type == "cuda":
        return {}
    worth_a_thread = 64 << 10  # bytes of rows
    size = (N + B) * D * dtype.itemsize
    threads = 1 if size < 2 * worth_a_thread else min(torch.get_num_threads(), size // worth_a_thread)
    return {"isa": _C.build_info()["isa"], "threads": threads}


def _explain_attention(
    *,
    B: int,
    Hq: int,
    Tq: int,
    Tk: int,
    D: int,
    Hk: int | None = None,
    Dv: int | None = None,
    is_causal: bool = False,
    masked: bool = False,
    extras: Sequence[str] = (),
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """How work is cut among threads as csrc/attention/attention_cpu.cpp does it."""
    where = torch.device(device)
    require_attention("attention", torch.empty(0, dtype=dtype, device=device))
    kernel = choose_attention("attention", backend, where, dtype, extras, masked or Dv not in (None, D))
    reasons = {
        "cpu": unsupported_on_cpu(where, dtype),
        "triton": unsupported_attention_on_triton(where, dtype),
        "torch": unsupported_attention_by_torch(extras) or ["never chosen, but for dense half types on CUDA"],
    }
    plan: dict[str, Any] = {"kernel": kernel}
    if kernel == "cpu":
        rows, keys, chunk = 48, 64, 512  # kRows, kKeys and kChunkKeys in csrc/attention/tiles.h
        threads, groups = torch.get_num_threads(), B * (Hq if Hk is None else Hk)
        blocks = B * Hq * -(-Tq // rows)
        if threads == 1 or groups >= 2 * threads:
            tasks, what = groups, "groups of heads that share keys"
        elif Tq * (Hq // max(groups // max(B, 1), 1)) <= rows:
            tasks, what = groups * max(-(-Tk // chunk), 1), f"chunks of {chunk} keys"
        else:
            tasks, what = blocks, f"blocks of {rows} queries"
        plan.update(isa=_C.build_info()["isa"], block=(rows, keys), tasks=what, threads=max(min(threads, tasks), 1))
    elif kernel == "torch" and where.type == "cuda":
        plan["why"] = "dense and of a half type: torch's cuDNN or flash kernels; backend='triton' asks for ours"
    return {**plan, "unsupported": {name: why for name, why in reasons.items() if name != kernel}}
