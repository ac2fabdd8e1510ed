"""Arguments of the ops for options of recurrent layers, and the random masks of training.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P size of h (the projection size, or H).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._autograd import NAMESPACE, op, register_fake
from ._recurrent_kinds import Kind
from ._recurrent_options import Options


class Extras(NamedTuple):
    """The last arguments of the ops, omitted by layers with biases, without projection and without options."""

    bias: bool = True
    projected: bool = False
    peephole: bool = False
    heads: int = 1
    reset: Tensor | None = None  # bool [T, B] or [N]: True zeroes the states before the step
    zoneout_h: Tensor | None = None  # uint8 [.., directions * H]: 1 keeps the previous value of h
    zoneout_c: Tensor | None = None
    candidate: Tensor | None = None  # uint8 [.., directions * H]: 0 drops the candidate
    variational: Tensor | None = None  # [directions, B, P] factors of h in the recurrent projection
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
    """Draws the masks of a layer. Returns its input, masked by variational dropout, and the `Extras` of its op.

    packed: result of `sequences_of` for packed input, required for variational dropout only.
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
    extras = Extras._make((bias, projected, options.peephole, heads, reset, *masks, variational, scalars))
    return x, extras if extras.any_option or heads > 1 or not bias or projected else None


def _mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """Random uint8 mask on the device of `like`: 1 with probability p, otherwise 0."""
    return (torch.rand(shape, device=like.device) < p).to(torch.uint8)


def batch_of(x: Tensor, batch_sizes: Tensor | None) -> int:
    """B of a time-major or packed input. Use one call only: torch.compile treats two results as different sizes."""
    if batch_sizes is None or not batch_sizes.shape[0]:
        return x.shape[1] if batch_sizes is None else 0
    if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
        size: int = _sequences(batch_sizes).shape[0]  # at item(), the graph would break without fullgraph=True
        return size
    B: Any = batch_sizes[0].item()  # int() is not traceable
    return B


def new_size() -> Any:
    """A size that is unknown while tracing, for fake implementations.

    The method of torch.library raises in torch.compile without fullgraph=True, and each layer would break the graph.
    """
    context = torch.library.get_ctx()
    if context._shape_env is None:
        return context.new_dynamic_size()
    from torch._library.fake_impl import allocate_size

    return allocate_size(context._shape_env)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("packed_sequences(Tensor batch_sizes) -> Tensor")  # [B], without values


def _packed_sequences(batch_sizes: Tensor) -> Tensor:
    if batch_sizes is None or batch_sizes.dim() != 1 or batch_sizes.numel() == 0 or batch_sizes.is_floating_point():
        raise ValueError(f"packed_sequences: batch_sizes must be int64 [T] with T > 0, got {batch_sizes}")
    return batch_sizes.new_empty(int(batch_sizes[0]), dtype=torch.uint8)


_library.impl("packed_sequences", _packed_sequences, "CompositeExplicitAutograd")
register_fake(
    f"{NAMESPACE}::packed_sequences", lambda batch_sizes: batch_sizes.new_empty(new_size(), dtype=torch.uint8)
)
_sequences = op("packed_sequences")


def sequences_of(x: Tensor, hx: Sequence[Tensor] | None, batch_sizes: Tensor) -> tuple[int, Tensor]:
    """B of a packed input, and [N] the index of the sequence of each row."""
    N, first = x.shape[0], batch_sizes.cumsum(0) - batch_sizes  # [T] first row of each step
    if x.is_cuda and not torch.compiler.is_compiling():
        of_row = positions_in_steps(first, batch_sizes, N, x.device)
    else:
        of_row = torch.arange(N) - first.repeat_interleave(batch_sizes, output_size=N)
        of_row = of_row.to(x.device)
    return batch_of(x, batch_sizes) if hx is None else hx[0].shape[1], of_row


def positions_in_steps(first: Tensor, batch_sizes: Tensor, N: int, device: torch.device) -> Tensor:
    """[N] position of each row in its step, on the device.

    The first rows of the steps are passed as kernel arguments, some hundred steps per launch. A copy from the host
    would synchronize, and a CUDA graph cannot capture it.
    """
    rows = torch.arange(N, device=device)
    if N:
        torch._foreach_sub_(rows.split(batch_sizes.tolist()), first.tolist())
    return rows
