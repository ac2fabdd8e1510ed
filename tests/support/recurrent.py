"""Inputs of recurrent layers in other forms and memory layouts, compilation, and all gradients of a module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from seqkernels import functional
from support.cases import (
    Case,
    Inputs,
    batch_sizes_of,
    run,
    tuple_of,
)


def kind(name: str) -> str:
    """Name without layer and direction. Both bias gradients have one name, because torch's differ by rounding."""
    return "db" if name.startswith("db_") else name.partition("_l0")[0]


OP_CASES = [
    Case(B=3, T=4, D=5, H=6, why="dense"),
    Case(B=3, T=4, D=5, H=6, state=False, bias=False, why="no bias, no initial state"),
    Case(B=3, T=4, D=5, H=6, P=2, bidirectional=True, why="projection, both directions"),
    Case(B=3, T=4, D=5, H=6, lengths=(2, 4, 0), why="lengths"),
    Case(B=3, T=4, D=5, H=6, lengths=(4, 2, 1), packed=True, why="packed"),
    Case(B=3, T=4, D=5, H=6, lengths=(4, 2, 1), packed=True, state=False, bidirectional=True, why="packed, no state"),
]


def compiled(function, backend: str = "aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend)


def as_packed(inputs: Inputs, function=functional.lstm) -> dict[str, Tensor]:
    """Runs the batch as packed sequences, and restores the order and padding of the batch in the results."""
    case, lengths = inputs.case, inputs.lengths
    order = torch.argsort(lengths, descending=True, stable=True)
    batch_sizes = batch_sizes_of(lengths.tolist())
    valid = torch.arange(case.T).unsqueeze(1) < lengths[order]  # [T, B]

    def rows(t: Tensor) -> Tensor:
        return t[:, order][valid]

    packed = Inputs(
        case,
        rows(inputs.x),
        tuple(h[:, order] for h in inputs.hx),
        inputs.weights,
        batch_sizes,
        None,
        rows(inputs.dy),
        inputs.dh_n[:, order],
        inputs.dc_n[:, order],
    )
    result = run(function, packed)
    back = torch.argsort(order)
    for name in ("y", "dx"):
        padded = result[name].new_zeros(case.T, case.B, result[name].shape[-1])
        padded[valid] = result[name]
        result[name] = padded[:, back]
    for name in ("h_n", "c_n", "dh0", "dc0"):
        if name in result:
            result[name] = result[name][:, back]
    return result


def as_batch(
    inputs: Inputs, chosen: list[int], T: int, *, lengths: bool, function=functional.lstm
) -> dict[str, Tensor]:
    """Runs the chosen sequences as a batch, padded or truncated to T. Without lengths, all must have length T."""
    pad = max(0, T - inputs.case.T)

    def select(t: Tensor) -> Tensor:
        return torch.cat([t, t.new_full((pad, *t.shape[1:]), float("nan"))])[:T, chosen]

    sub = Inputs(
        inputs.case,
        select(inputs.x),
        tuple(h[:, chosen] for h in inputs.hx),
        inputs.weights,
        None,
        inputs.lengths[chosen] if lengths else None,
        select(inputs.dy).nan_to_num(),
        inputs.dh_n[:, chosen],
        inputs.dc_n[:, chosen],
    )
    return run(function, sub)


SEQUENCE = ("y", "h_n", "c_n", "dx", "dh0", "dc0")  # results by sequence


def spread(t: Tensor) -> Tensor:
    """The same values as a view with stride 2 in each dimension of a tensor filled with NaN."""
    whole = t.new_full([2 * n + 1 for n in t.shape], float("nan"))
    view = whole[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def negated(t: Tensor) -> Tensor:
    """The same values with the negative bit (lazy negation) set."""
    return torch._neg_view(-t)


def everything(module: torch.nn.Module, *arguments) -> dict[str, Tensor]:
    """Outputs, and the gradients of parameters and arguments under fixed upstream gradients."""
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    def rebuild(a):
        if isinstance(a, PackedSequence):
            return PackedSequence(leaf(a.data), a.batch_sizes, a.sorted_indices, a.unsorted_indices)
        return tuple(map(rebuild, a)) if isinstance(a, tuple) else leaf(a)

    y, states = module(*map(rebuild, arguments))
    y = y.data if isinstance(y, PackedSequence) else y
    g = torch.Generator().manual_seed(7)
    outputs = dict(zip(("y", "h_n", "c_n"), (y, *tuple_of(states)), strict=False))
    upstream = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t.dtype) for t in outputs.values()]
    names = [n for n, p in module.named_parameters() if p.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    grads = torch.autograd.grad(list(outputs.values()), leaves + parameters, upstream)
    result = {name: output.detach() for name, output in outputs.items()}
    return result | dict(zip([f"argument {i}" for i in range(len(leaves))] + names, grads, strict=True))


def directions_like(tensors: tuple[Tensor, ...], seed: int = 1) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(t.shape, generator=g, dtype=t.dtype) for t in tensors)


def weighted(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar that is a nonlinear function of all outputs."""
    return sum((o * (i + 1 + o) * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for i, o in enumerate(outputs))
