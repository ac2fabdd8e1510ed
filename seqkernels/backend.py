"""Dispatch of an operator to one of its implementations.

An implementation is a name and a function `unsupported(request) -> list[str]` that returns the reasons why it cannot
run a call. A call is dispatched to the first implementation without reasons; `backend="name"` selects one, which runs
or raises. A new implementation is one entry in the table of its operator.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import torch
from torch import Tensor

from . import _C

if TYPE_CHECKING:
    from .functional._recurrent_kinds import Kind

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_CUDA_BUILT: bool = _C.build_info()["cuda"]


class Request(NamedTuple):
    """Properties of a call that determine its implementation."""

    device: torch.device
    dtype: torch.dtype
    layer: tuple[Kind, int, bool] | None = None  # recurrent layers: kind, number of heads, whether it has a projection
    extras: Sequence[str] = ()  # options in use that torch's attention, or bags in Triton, do not support
    masked: bool = False  # attention: whether the call has a mask, dropout or Dv != D
    named: bool = False  # whether `backend` names the implementation


Implementations = Mapping[str, Callable[[Request], list[str]]]  # name -> unsupported(), in order of preference


def choose(
    op: str,
    implementations: Implementations,
    request: Request,
    backend: str | None = None,
    what: str = "an input",
    shape: Sequence[int] | None = None,
) -> str:
    """Name of the implementation that runs the call.

    Args:
        op: public name of the operator, for error messages.
        backend: name of the implementation to use, or None for the first that supports the request.
        what, shape: the input that the request describes, for error messages.
    Raises:
        ValueError: `backend` is not the name of an implementation.
        NotImplementedError: the selected implementation, or with None each of them, does not support the request; the
            message lists the reasons.
    """
    if backend is None:
        for name, unsupported in implementations.items():
            if not unsupported(request):
                return name
        raise_unsupported(op, implementations, request, what, shape)
    if backend not in implementations:
        raise ValueError(f"{op}: backend must be None, {', '.join(implementations)}, got {backend!r}")
    reasons = implementations[backend](request._replace(named=True))
    if reasons:
        raise NotImplementedError(f"{op}: backend {backend} cannot run this call: {'; '.join(reasons)}")
    return backend


def unsupported(implementations: Implementations, request: Request) -> dict[str, list[str]]:
    """For each implementation, the reasons why it cannot run."""
    return {name: reasons_of(request) for name, reasons_of in implementations.items()}


def raise_unsupported(
    op: str, implementations: Implementations, request: Request, what: str, shape: Sequence[int] | None = None
) -> NoReturn:
    """Raises NotImplementedError with the reasons of each implementation."""
    of_shape = "" if shape is None else f" of shape {list(shape)}"
    reasons = (f"{name}: {'; '.join(why)}" for name, why in unsupported(implementations, request).items())
    raise NotImplementedError(
        f"{op}: no backend supports {what}{of_shape}, {request.dtype}, on {request.device}. {'. '.join(reasons)}."
    )


def require(op: str, implementations: Implementations, input: Tensor, what: str = "an input") -> None:
    """Raises if `input` is not a tensor or no implementation supports its device and dtype."""
    if not isinstance(input, Tensor):
        raise TypeError(f"{op}: input must be a tensor, got {type(input).__name__}")
    choose(op, implementations, Request(input.device, input.dtype), None, what, input.shape)


# ---- implementations


def _unsupported_dtype(dtype: torch.dtype) -> list[str]:
    return [] if dtype in DTYPES else [f"dtype {dtype} is none of {', '.join(str(d) for d in DTYPES)}"]


def on_cpu(request: Request) -> list[str]:
    """The C++ kernels, compiled for each instruction set."""
    device = request.device
    if device.type == "cpu" and request.dtype in DTYPES:
        return []
    return [*([] if device.type == "cpu" else [f"the tensors are on {device}"]), *_unsupported_dtype(request.dtype)]


def on_cuda(request: Request) -> list[str]:
    """The CUDA kernels."""
    reasons, device = [], request.device
    if not _CUDA_BUILT:
        reasons.append("this build has no CUDA kernels: building them requires a torch with CUDA, and nvcc")
    if device.type != "cuda":
        reasons.append(f"the tensors are on {device}")
    elif not torch.compiler.is_compiling():
        reasons.extend(_too_old(device) or _not_built_for(device))
    reasons.extend(_unsupported_dtype(request.dtype))
    if request.layer is not None:
        reasons.extend(unsupported_layer_on_cuda(*request.layer))
    return reasons


@functools.cache
def _too_old(device: torch.device) -> list[str]:
    """Reasons based on the compute capability; none for the CUDA device of a fake tensor on a machine without GPU."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability(device)
    return [] if major >= 8 else [f"compute capability must be 8.0 or more, got {major}.{minor}"]


@functools.cache
def _not_built_for(device: torch.device) -> list[str]:
    """Reasons based on the architectures of the build.

    Code for compute capability x.y runs on x.z with z >= y. A build for 10.0 also contains PTX, which runs on all later
    capabilities.
    """
    built: list[int] = _C.build_info().get("cuda_architectures", [])
    if not built or not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability(device)
    runs = any(b // 10 == major and b % 10 <= minor for b in built) or (100 in built and major > 10)
    names = ", ".join(f"{b // 10}.{b % 10}" for b in built)
    return [] if runs else [f"this build is for compute capability {names}, got {major}.{minor}"]


def cuda_runs_on(device: torch.device) -> bool:
    """Whether this build has CUDA kernels for `device`, a CUDA device."""
    return _CUDA_BUILT and not _too_old(device) and not _not_built_for(device)


def unsupported_layer_on_cuda(kind: Kind, num_heads: int, projected: bool) -> list[str]:
    """Reasons why the CUDA kernels cannot run a recurrent layer of any size, as in plan_recurrent_cuda in C++."""
    reasons = []
    if not kind.cuda:
        reasons.append(f"{kind.name} has no CUDA kernel")
    if num_heads != 1:
        reasons.append(f"heads must be 1, got {num_heads}")
    if projected and kind.cuda:
        reasons.append("a projection must be absent")
    return reasons


TRITON_KINDS = ("lstm", "lstm_coupled", "gru", "gru_before", "mgu", "mgu_after", "rnn_tanh", "rnn_relu")


def in_triton(request: Request) -> list[str]:
    """The Triton kernels of recurrent layers, bags and CRFs, for calls on CUDA that CUDA kernels do not support.

    With TRITON_INTERPRET=1 and backend="triton", Triton's interpreter runs them on CPU tensors.
    """
    reasons, device = [], request.device
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            reasons.append("triton is not installed")
        if not torch.compiler.is_compiling():
            reasons.extend(_too_old(device))
    elif device.type != "cpu" or not (request.named and _interpreted()):
        reasons.append(f"the tensors are on {device}")
    reasons.extend(_unsupported_dtype(request.dtype))
    reasons.extend(f"{extra} has no Triton kernel" for extra in request.extras)
    if request.layer is not None:
        kind, num_heads, projected = request.layer
        if kind.name not in TRITON_KINDS:
            reasons.append(f"{kind.name} has no Triton kernel")
        if num_heads != 1:
            reasons.append(f"heads must be 1, got {num_heads}")
        if projected and kind.name in TRITON_KINDS:
            reasons.append("a projection must be absent")
    return reasons


def _interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which TRITON_INTERPRET determines when they are imported."""
    launch = sys.modules.get(f"{__package__}.triton.recurrent.launch")
    return os.environ.get("TRITON_INTERPRET") == "1" if launch is None else launch.interpreted()


def attention_in_triton(request: Request) -> list[str]:
    """The Triton kernels of attention."""
    reasons = []
    if request.device.type != "cuda":
        reasons.append(f"the tensors are on {request.device}")
    elif importlib.util.find_spec("triton") is None:
        reasons.append("triton is not installed")
    return reasons + _unsupported_dtype(request.dtype)


def attention_by_torch(request: Request) -> list[str]:
    """torch's own function. By default it runs what its half-precision CUDA kernels (cuDNN, flash) support."""
    reasons = [f"it has no {', no '.join(request.extras)}"] if request.extras else []
    half = request.device.type == "cuda" and request.dtype in (torch.float16, torch.bfloat16)
    if not request.named and not reasons and (request.masked or not half):
        reasons.append("never chosen, but for dense half types on CUDA")
    return reasons


RECURRENT: Implementations = {"cpu": on_cpu, "cuda": on_cuda, "triton": in_triton}
EMBEDDING_BAG: Implementations = {"cpu": on_cpu, "cuda": on_cuda, "triton": in_triton}
ATTENTION: Implementations = {"cpu": on_cpu, "torch": attention_by_torch, "triton": attention_in_triton}
CRF: Implementations = {"cpu": on_cpu, "triton": in_triton}
ADDITIVE_ATTENTION: Implementations = {"cpu": on_cpu, "triton": in_triton}
CTC: Implementations = {"cpu": on_cpu}
