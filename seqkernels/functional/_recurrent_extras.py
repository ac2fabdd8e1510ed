"""The ops' arguments for options of recurrent layers, and the masks that training draws.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P fed-back size (the projection size, or H).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels.functional._recurrent_kinds import Kind
from seqkernels.functional._recurrent_options import Options


class Extras(NamedTuple):
    """The ops' last arguments. A layer with biases and without a projection and options omits them."""

    bias: bool = True
    projected: bool = False
    peephole: bool = False
    heads: int = 1
    reset: Tensor | None = None  # bool [T, B] or [N]: the states are zero before such a step
    zoneout_h: Tensor | None = None  # uint8 [.., directions * H]: h keeps its old value where it is 1
    zoneout_c: Tensor | None = None
    candidate: Tensor | None = None  # uint8 [.., directions * H]: the candidate is dropped where it is 0
    variational: Tensor | None = None  # [directions, B, P] factors of h in the recurrent products
    numbers: Sequence[float] = []  # cell_clip, gate_clip, zoneout_h, zoneout_c, recurrent_dropout, norm_eps

    @property
    def any_option(self) -> bool:
        """Whether the kernels with options run."""
        masks = self.reset, self.zoneout_h, self.zoneout_c, self.candidate, self.variational
        return self.peephole or len(self.numbers) > 0 or any(mask is not None for mask in masks)


NO_EXTRAS = Extras()
_NEUTRAL_NUMBERS = [math.inf, math.inf, 0.0, 0.0, 0.0, Options().norm_eps]


def extras_of(
    kind: Kind,
    options: Options,
    training: bool,
    x: Tensor,
    weights: Sequence[Tensor],
    bias: bool,
    projected: bool,
    bidirectional: bool = False,
    reset: Tensor | None = None,
    packed: tuple[int, Tensor] | None = None,
) -> tuple[Tensor, Extras | None]:
    """One layer's input, which variational dropout masks, and what its op needs beyond a plain layer: here the masks
    are drawn. `packed` is what `sequences_of` says of a packed input, wanted for variational dropout alone.
    """
    directions, heads = 2 if bidirectional else 1, options.num_heads
    H, P = weights[1].shape[0] // len(kind.gates), weights[1].shape[1] * heads
    drop = options.recurrent_dropout if training else 0.0
    zones = options.zoneout_h, options.zoneout_c
    rates = (*zones, 1 - drop) if training else (0.0, 0.0, 1.0)
    masks = [_mask((*x.shape[:-1], directions * H), rate, x) if 0 < rate < 1 else None for rate in rates]
    variational = None
    if training and options.variational_dropout:
        keep, B = 1 - options.variational_dropout, x.shape[1] if packed is None else packed[0]
        of_input = _mask((B, x.shape[-1]), keep, x).to(x.dtype) / keep
        variational = _mask((directions, B, P), keep, x).to(x.dtype) / keep
        x = x * (of_input if packed is None else of_input.index_select(0, packed[1]))
    limits = (math.inf if limit is None else float(limit) for limit in (options.cell_clip, options.gate_clip))
    values = [*limits, *map(float, zones), float(drop), float(options.norm_eps)]
    scalars = values if values != _NEUTRAL_NUMBERS else []
    extras = Extras(bias, projected, options.peephole, heads, reset, *masks, variational, scalars)
    return x, extras if extras.any_option or heads > 1 or not bias or projected else None


def _mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """uint8 of the shape, on the device of like: each is 1 with probability p, else 0."""
    return (torch.rand(shape, device=like.device) < p).to(torch.uint8)


def batch_of(x: Tensor, batch_sizes: Tensor | None) -> int:
    """B of a time-major or packed input. Once a call: a compiler would not know that two are the same."""
    if batch_sizes is None or not batch_sizes.shape[0]:
        return x.shape[1] if batch_sizes is None else 0
    B: Any = batch_sizes[0].item()  # int() could not be traced
    return B


def sequences_of(x: Tensor, hx: Sequence[Tensor] | None, batch_sizes: Tensor) -> tuple[int, Tensor]:
    """B of a packed input, and [N] the sequence, by its place in the batch, that each row belongs to."""
    N, first = x.shape[0], batch_sizes.cumsum(0) - batch_sizes  # [T] the first row of each step
    if x.is_cuda and not torch.compiler.is_compiling():
        of_row = places_in_steps(first, batch_sizes, N, x.device)
    else:
        of_row = torch.arange(N) - first.repeat_interleave(batch_sizes, output_size=N)
        of_row = of_row.to(x.device)
    return batch_of(x, batch_sizes) if hx is None else hx[0].shape[1], of_row


def places_in_steps(first: Tensor, batch_sizes: Tensor, N: int, device: torch.device) -> Tensor:
    """[N] how far behind the first row of its step each row is, on the device. The numbers of the steps go there as
    arguments of kernels, of some hundred steps each, and not by a copy from the host, which would be waited for and has
    no place in a CUDA graph.
    """
    rows = torch.arange(N, device=device)
    if N:
        torch._foreach_sub_(rows.split(batch_sizes.tolist()), first.tolist())
    return rows
