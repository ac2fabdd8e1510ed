"""The CUDA ops for tests with CPU tensors: copies arguments to a device, and results back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# The emulation runs in each test run, the GPU only if there is one.
PLACES = ("emulated", pytest.param("cuda", marks=pytest.mark.cuda))
ONLY_EMULATED = pytest.mark.parametrize("place", ["emulated"], indirect=True)


def sanitized(values: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """Values for parametrize; those for which chosen(value) is true get the mark `sanitize`, for compute-sanitizer."""
    return [pytest.param(value, marks=pytest.mark.sanitize) if chosen(value) else value for value in values]


def copied(t: Tensor) -> Tensor:
    """Copies a tensor to the device with its storage, strides and offset."""
    if t.is_cuda or t.numel() == 0:
        return t.detach().cuda()
    there = t.detach().new_empty(0, device="cuda")
    return there.set_(t.untyped_storage().cuda(), t.storage_offset(), t.shape, t.stride())


class OnCuda:
    """torch.ops.seqkernels on a device. In-place changes are copied back to the CPU tensors."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.seqkernels, name).default

        def call(*args: Any, **options: Any) -> Any:
            pairs = []

            def there(t: Any) -> Any:
                if not isinstance(t, Tensor):
                    return t
                pairs.append((t, copied(t)))
                return pairs[-1][1]

            args, options = tree_map(there, (args, options))
            found = op(*args, **options)
            if name.endswith("_"):
                for here, there_ in pairs:
                    if not here.requires_grad:
                        here.copy_(there_)
            return tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, found)

        return call
