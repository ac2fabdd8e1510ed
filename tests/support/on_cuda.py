"""The CUDA ops, for tests whose tensors are on the CPU: arguments are carried to a device, results back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# The kernels of the emulation run in every test run; those on a GPU where there is one.
PLACES = ("emulated", pytest.param("cuda", marks=pytest.mark.cuda))
ONLY_EMULATED = pytest.mark.parametrize("place", ["emulated"], indirect=True)


def sanitized(values: Iterable[Any], chosen: Callable[[Any], bool]) -> list[Any]:
    """For parametrize: those chosen are marked for compute-sanitizer."""
    return [pytest.param(value, marks=pytest.mark.sanitize) if chosen(value) else value for value in values]


def carried(t: Tensor) -> Tensor:
    """On the device as it lies in memory: with its strides, its offset and what is around it."""
    if t.is_cuda or t.numel() == 0:
        return t.detach().cuda()
    there = t.detach().new_empty(0, device="cuda")
    return there.set_(t.untyped_storage().cuda(), t.storage_offset(), t.shape, t.stride())


class OnCuda:
    """torch.ops.seqkernels on a device. What an op changes in place is changed on the CPU too."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch.ops.seqkernels, name).default

        def call(*args: Any, **options: Any) -> Any:
            pairs = []

            def there(t: Any) -> Any:
                if not isinstance(t, Tensor):
                    return t
                pairs.append((t, carried(t)))
                return pairs[-1][1]

            args, options = tree_map(there, (args, options))
            found = op(*args, **options)
            if name.endswith("_"):
                for here, there_ in pairs:
                    if not here.requires_grad:
                        here.copy_(there_)
            return tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, found)

        return call
