"""Which implementation runs for given inputs, and why the others do not."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, NoReturn

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
    """Reasons why the CUDA kernels cannot. Of recurrent layers unsupported_layer_on_cuda has more."""
    reasons = []
    if not _CUDA_BUILT:
        reasons.append("this build has none: they are built where torch has CUDA and nvcc is found")
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device}")
    else:
        reasons.extend(_too_old(device))
    if dtype not in CPU_DTYPES:
        reasons.append(f"dtype {dtype} is none of {', '.join(str(d) for d in CPU_DTYPES)}")
    return reasons


@functools.cache
def _too_old(device: torch.device) -> list[str]:
    """Of a CUDA device, which may be a fake's."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability(device)
    return [] if major >= 8 else [f"compute capability must be 8.0 or more, got {major}.{minor}"]


_CUDA_BUILT: bool = _C.build_info()["cuda"]
_BY_HAND = "never chosen: call seqkernels.triton"
_NOT_ON_CUDA = ("lstm_norm", "lstm_nested", "gru_norm", "gru_projected")


def unsupported_layer_on_cuda(kind: str, num_heads: int, projected: bool) -> list[str]:
    """Reasons why the CUDA kernels cannot take a recurrent layer, whatever its size: those of plan_recurrent_cuda in
    csrc/recurrent/recurrent_cuda.cu."""
    reasons = []
    if kind in _NOT_ON_CUDA:
        reasons.append(f"nobody wrote {kind} for CUDA")
    if num_heads != 1:
        reasons.append(f"heads must be 1, got {num_heads}")
    if projected and kind not in _NOT_ON_CUDA:
        reasons.append("a projection must be absent")
    return reasons


def require(op: str, input: Tensor, what: str = "an input") -> None:
    """Raises NotImplementedError with every backend's reasons where none can run op on this input, or what it is."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}")
    runs = _runs(input.device, input.dtype)
    if not runs or (input.is_cuda and not torch.compiler.is_compiling() and _too_old(input.device)):
        _refuse(op, what, input.device, input.dtype, input.shape)


def require_layer(op: str, input: Tensor, kind: str, num_heads: int, projected: bool) -> None:
    """The same for a recurrent layer on CUDA that require has let pass."""
    reasons = unsupported_layer_on_cuda(kind, num_heads, projected)
    if reasons:
        _refuse(op, "an input", input.device, input.dtype, input.shape, reasons)


def _runs(device: torch.device, dtype: torch.dtype) -> bool:
    return (device.type == "cpu" or (device.type == "cuda" and _CUDA_BUILT)) and dtype in CPU_DTYPES


def _refuse(
    op: str,
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    shape: Sequence[int] | None = None,
    layer: Sequence[str] = (),
) -> NoReturn:
    """layer: why the CUDA kernels do not take this layer."""
    of_shape = "" if shape is None else f" of shape {list(shape)}"
    cpu, cuda = unsupported_on_cpu(device, dtype), [*unsupported_on_cuda(device, dtype), *layer]
    raise NotImplementedError(
        f"{op}: no backend takes {what}{of_shape}, {dtype}, on {device}. "
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


def require_attention(op: str, device: torch.device, dtype: torch.dtype, shape: Sequence[int] | None = None) -> None:
    """Raises NotImplementedError with every backend's reasons where none can run on a query there of that dtype."""
    if device.type in ("cpu", "cuda", "meta") and dtype in CPU_DTYPES:
        return
    cpu, triton = (f(device, dtype) for f in (unsupported_on_cpu, unsupported_attention_on_triton))
    of_shape = "" if shape is None else f" of shape {list(shape)}"
    raise NotImplementedError(
        f"{op}: no backend takes a query{of_shape}, {dtype}, on {device}. "
        f"cpu: {'; '.join(cpu)}. triton: {'; '.join(triton)}. "
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
            lengths: [B] real steps of each sequence; all T if absent: of a CPU alone, as on CUDA lengths and packing
            do not matter. options: names of the layer's options that are on, such as "peephole", "zoneout_h", "reset"
            or "memory_efficient" (dropouts are on in training alone); those that make another op are said by op.
            On a CUDA device, what it has unless described: capability=(9, 0), multiprocessors=132 and
            shared_memory=232448, the bytes that a block may have. One that is described need not exist.
        E, D, N, B (embedding_bag): table rows, columns, indices, bags. mode="sum".
        B, Hq, Tq, Tk, D (attention): as in scaled_dot_product_attention. Hk=Hq, Dv=D, is_causal=False; masked: whether
            there is a mask or dropout; extras: what else is asked for, such as "lengths"; backend=None.
        dtype=torch.float32, device="cpu".
    Returns:
        kernel: cpu or cuda; of attention cpu, triton or torch. unsupported: why other backends do not run. Of the
        CPU's: isa; threads: those that run; of attention also tasks: what threads share, and block: queries and keys of
        one. For layers as row_groups (sets of sequences that never meet) x unit_groups (shares of the hidden units,
        which meet at a barrier once a step) x directions.
        For layers on CUDA forward and backward, each: tier: cluster or grid, which walk all steps in one launch, steps,
        one launch a step, or none; reasons: why those before it do not. grid, block and shared_bytes: how its kernel is
        launched; cluster: blocks of a cluster, or of one of the `teams` that share a direction of a grid; rows:
        sequences that they walk together; workspace: bytes.
    Raises:
        ValueError: no such op or option, or a device is described in part or is not there. TypeError: a size is absent.
        NotImplementedError: no backend takes such inputs, or this build has no CUDA kernels.
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
    options: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    capability: tuple[int, int] | None = None,
    multiprocessors: int | None = None,
    shared_memory: int | None = None,
) -> dict[str, Any]:
    from seqkernels.functional._recurrent_ops import allows_tf32
    from seqkernels.functional._recurrent_options import check_named  # which need this file

    check_named("explain", op, options)
    for least, of in ((0, {"T": T, "B": B, "D": D, "proj_size": proj_size}), (1, {"H": H, "num_heads": num_heads})):
        for name, size in of.items():
            if size < least:
                raise ValueError(f"explain: {name} must be at least {least}, got {size}")
    where = torch.device(device)
    if not _runs(where, dtype):
        _refuse(op, "a layer", where, dtype)
    described = capability, multiprocessors, shared_memory
    if where.type == "cpu":
        if described != (None, None, None):
            raise ValueError(f"explain: a description must be of a CUDA device, got one for {where}")
        tokens = T * B if lengths is None else sum(lengths)
        sizes = {"T": T, "B": B, "N": tokens, "D": D, "H": H, "P": proj_size or H, "directions": 1 + bidirectional}
        return _C.explain_recurrent(gates=gates, **sizes, heads=num_heads, float64=dtype == torch.float64)
    wanted: dict[str, Any] = dict(kind=op, dtype=str(dtype).removeprefix("torch."), T=T, B=B, D=D, H=H, P=proj_size)
    wanted.update(directions=1 + bidirectional, heads=num_heads, options=list(options))
    wanted["tf32"] = dtype == torch.float32 and allows_tf32(torch.backends.cudnn.rnn)
    if capability is not None and multiprocessors is not None and shared_memory is not None:
        major, minor = capability
        if min(major, multiprocessors, shared_memory) < 1:
            raise ValueError(
                "explain: capability, multiprocessors and shared_memory must be above 0, got "
                f"{capability}, {multiprocessors} and {shared_memory}"
            )
        wanted.update(major=major, minor=minor, multiprocessors=multiprocessors, shared_bytes=shared_memory)
        return _C.explain_recurrent_cuda(**wanted)
    if described != (None, None, None) or not torch.cuda.is_available():
        why = "together" if described != (None, None, None) else "where there is no CUDA device"
        raise ValueError(
            f"explain: capability, multiprocessors and shared_memory must be given {why}, got "
            f"{capability}, {multiprocessors} and {shared_memory}"
        )
    with torch.cuda.device(where):
        return _C.explain_recurrent_cuda(**wanted)


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
    where = torch.device(device)
    if not _runs(where, dtype):
        _refuse("embedding_bag", "a table", where, dtype)
    if where.type == "cuda":
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
    require_attention("attention", where, dtype)
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
