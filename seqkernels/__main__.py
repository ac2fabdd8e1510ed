"""`python -m seqkernels`: the build, the machine, and a check of each operator against torch, for bug reports."""

from __future__ import annotations

import argparse
import copy
import functools
import platform
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import seqkernels

from ._tables import aligned

_LIMIT = 1e-4  # largest error, relative to the largest element; float32


def _results_and_gradients(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The outputs of a call, and the gradients of its floating-point inputs for the sum of the squared outputs."""
    given = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = [t for t in torch.utils._pytree.tree_leaves(function(*given)) if isinstance(t, Tensor)]
    loss = torch.stack([t.square().sum() for t in outputs]).sum()
    return [*outputs, *torch.autograd.grad(loss, [t for t in given if t.requires_grad])]


def _error(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference relative to the largest element; NaN if there is one."""
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs)]).max().item()


def _checks(device: str) -> dict[str, tuple[Callable[..., object], Callable[..., object], tuple[Tensor, ...]]]:
    """Name of an operator -> seqkernels' function, torch's, and the inputs of both."""
    x, q = torch.randn(7, 3, 8, device=device), torch.randn(2, 2, 9, 8, device=device)
    indices, table = torch.randint(20, (5, 4), device=device), torch.randn(20, 8, device=device)
    checks: dict[str, tuple[Callable[..., object], Callable[..., object], tuple[Tensor, ...]]] = {}
    for layer in (
        torch.nn.LSTM(8, 16, 2, bidirectional=True),
        torch.nn.GRU(8, 16),
        torch.nn.RNN(8, 16),
        torch.nn.MultiheadAttention(8, 2),
    ):
        theirs = layer.to(device)
        ours = copy.deepcopy(theirs)
        seqkernels.accelerate(ours)
        name = type(theirs).__name__
        checks[name] = ours, theirs, (x, x, x) if name == "MultiheadAttention" else (x,)
    ours_of, theirs_of = seqkernels.functional, torch.nn.functional
    checks["embedding_bag"] = ours_of.embedding_bag, theirs_of.embedding_bag, (indices, table)
    checks["scaled_dot_product_attention"] = (
        functools.partial(ours_of.scaled_dot_product_attention, is_causal=True),
        functools.partial(theirs_of.scaled_dot_product_attention, is_causal=True),
        (q, q, q),
    )
    return checks


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the report; returns 1 if an operator fails or its results differ from torch's."""
    argparse.ArgumentParser("python -m seqkernels", description=__doc__).parse_args(arguments)
    info = seqkernels.build_info()
    rows = [
        ("python", platform.python_version()),
        ("platform", platform.platform()),
        ("torch", torch.__version__),
        ("threads", str(torch.get_num_threads())),
        *((f"build: {name}", str(value)) for name, value in info.items()),
    ]
    devices = ["cpu"]
    if torch.cuda.is_available():
        rows.append(("GPU", torch.cuda.get_device_name()))
        devices.append("cuda")
    print("\n".join(aligned(rows)), end="\n\n")
    failed = False
    results = [("check", "device", "largest relative error", "")]
    for device in devices:
        torch.manual_seed(0)
        for name, (ours, theirs, inputs) in _checks(device).items():
            try:
                error = _error(_results_and_gradients(ours, inputs), _results_and_gradients(theirs, inputs))
                passed, shown = error <= _LIMIT, f"{error:.0e}"
            except (RuntimeError, NotImplementedError, ValueError) as problem:
                passed, shown = False, f"{type(problem).__name__}: {problem}"
            failed |= not passed
            results.append((name, device, shown, "passed" if passed else "FAILED"))
    print("\n".join(aligned(results)))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
