"""Ops of the Triton kernels: torch.ops.seqkernels_triton, with the schemas of torch.ops.seqkernels.

A separate namespace allows both CUDA and Triton kernels for one device. The first call of an op imports Triton, so that
`import seqkernels` works without it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _autograd
from ._autograd import op

NAMESPACE = f"{_autograd.NAMESPACE}_triton"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(name: str, module: str, function: str, *first: Any) -> None:
    """Defines seqkernels_triton::name, implemented by seqkernels.triton.<module>.<function>(*first, *arguments).

    CPU tensors require TRITON_INTERPRET=1.
    """
    LIBRARY.define(str(op(name)._schema).removeprefix(f"{_autograd.NAMESPACE}::"))  # type: ignore[attr-defined]
    implementation: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal implementation
        if implementation is None:
            implementation = getattr(importlib.import_module(f"...triton.{module}", __name__), function)
        device = next(t.device for t in args if isinstance(t, Tensor))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return implementation(*first, *args)

    for key in ("CUDA", "CPU"):
        LIBRARY.impl(name, call, key)
