"""Triton kernels for the tests: on a GPU if there is one, otherwise in Triton's interpreter on CPU tensors."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_hardware(test: Callable) -> Callable:
    """Marks a test `cuda` if it runs on a GPU."""
    return pytest.mark.cuda(test) if DEVICE == "cuda" else test


def load(name: str) -> ModuleType:
    """Imports seqkernels.triton.<name>.

    Triton reads TRITON_INTERPRET when kernels are defined. Triton must not be imported before without it, because
    the functions of Triton's library would then be compiled.
    """
    if DEVICE == "cuda":
        return importlib.import_module(f"seqkernels.triton.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        module = importlib.import_module(f"seqkernels.triton.{name}")
        importlib.import_module("triton.experimental.gluon")  # Triton imports it at the first call
    triton = importlib.import_module("triton")
    if isinstance(triton.language.sum, triton.JITFunction):
        raise RuntimeError("tests: triton was imported before the kernels, with TRITON_INTERPRET unset")
    _patch_interpreter(importlib.import_module("triton.runtime.interpreter"), triton.language)
    return module


def _patch_interpreter(interpreter: ModuleType, tl: ModuleType) -> None:
    """Fixes differences between the interpreter of Triton 3.6 and a GPU."""
    if getattr(interpreter, "_patched", False):
        return
    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def with_index(tensor, scope) -> None:
        """Loop bounds are arrays [1], which numpy 2.4 does not convert to int."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounding(data, source, target, mode):
        """Rounds casts to bfloat16, which the interpreter truncates."""
        if source == tl.float32 and target == tl.bfloat16:
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def sum_of(self, input):
        """Preserves -0 in sums of -0, for which numpy returns 0."""
        data = input.handle.data
        start = {"initial": data.dtype.type(-0.0)} if data.dtype.kind == "f" else {}
        return self.to_tensor(np.sum(data, axis=self.axis, keepdims=self.keep_dims, **start), input.dtype)

    def dot_of(self, a, b, d, precision, imprecise):
        """Converts bfloat16 operands to float32, because the interpreter multiplies their bits as integers."""
        a, b = (self.create_fp_ext(t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b))
        return dot(self, a, b, d, precision, imprecise)

    def call(self, *args, **kwargs):
        """Patches the language for a function called by a kernel once and not, at 0.5 ms, at every call."""
        if not interpreter._patched_core:
            interpreter._patch_lang(tl.sum.fn)  # triton.language.core, for good; launches patch triton.language
            interpreter._patched_core = True
        return self.rewrite()(*args, **kwargs)

    interpreter._patched_core = False
    interpreter.InterpretedFunction.__call__ = call
    interpreter._patch_lang_tensor = with_index
    interpreter.InterpreterBuilder.create_dot = dot_of
    interpreter._convert_float = rounding
    interpreter.ReduceOps.sum = sum_of
    interpreter._patched = True
