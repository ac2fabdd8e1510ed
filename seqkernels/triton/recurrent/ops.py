"""Implementations of the ops seqkernels_triton::<kind>, <kind>_forward and <kind>_backward."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...functional import _recurrent_ops
from ...functional._recurrent_extras import NO_EXTRAS, Extras
from ...functional._recurrent_kinds import Kind, kind_named
from ...reference import recurrent as definition
from .launch import (
    DTYPES,
    SUPPORTED,
    Layer,
    LayerArgs,
    backward,
    forward,
    interpreted,
)


def unsupported(kind: str, x: Tensor, extras: Extras = NO_EXTRAS) -> list[str]:
    """Reasons why these kernels do not support the inputs; empty if they do."""
    reasons = []
    if x.device.type != "cuda" and not interpreted():
        reasons.append(f"the tensors are on {x.device}")
    if x.dtype not in DTYPES:
        reasons.append(f"dtype {x.dtype} is none of {', '.join(str(d) for d in DTYPES)}")
    if kind not in SUPPORTED:
        reasons.append(f"{kind} is none of {', '.join(SUPPORTED)}")
    if extras.heads != 1:
        reasons.append(f"heads must be 1, got {extras.heads}")
    if extras.projected:
        reasons.append("a projection must be absent")
    return reasons


def _layer(kind: str, x: Tensor, *args: Any) -> Layer:
    states = definition.KINDS[kind].states
    weights, batch_sizes, lengths, bidirectional, *rest = args[states:]
    extras = Extras(*rest)
    if reasons := unsupported(kind, x, extras):
        raise NotImplementedError(f"{kind}: the Triton kernels do not run: {'; '.join(reasons)}")
    options = {name: value for name, value in extras._asdict().items() if name != "heads"}
    return Layer(kind, LayerArgs(x, args[:states], weights, batch_sizes, lengths, bidirectional, **options))


def infer_op(kind: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    y, last, *_ = forward(_layer(kind, x, *args), save=False)
    return y, *last


def forward_op(kind: str, x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    inputs = definition.KINDS[kind].states + 4 + len(NO_EXTRAS)  # number of arguments before `recompute`
    recompute = bool(args[inputs]) if len(args) > inputs else False
    y, last, saved, cells = forward(_layer(kind, x, *args[:inputs]), save=not recompute)
    return y, *last, saved, *cells


def backward_op(kind: str, dy: Tensor | None, *args: Any) -> tuple[Any, ...]:
    states = definition.KINDS[kind].states
    d_last, args = args[:states], args[states:]
    inputs, (y, saved, *rest) = args[: states + 5], args[states + 5 :]
    cells, (need_dx, need_dw, *rest) = rest[: states - 1], rest[states - 1 :]
    extras, upstream = rest[: len(NO_EXTRAS)], rest[len(NO_EXTRAS) :]
    layer = _layer(kind, *inputs, *extras)
    if layer.saved_width and not saved.shape[-1]:  # recompute
        saved = forward(layer, save=True)[2]
    dcells = upstream[0] if upstream else None
    dx, dstates, dw = backward(layer, dy, d_last, y, saved, cells, dcells, need_dx, need_dw)
    return dx, *dstates, dw


def _kind(name: str) -> Kind:
    infer, forward_, backward_ = (functools.partial(f, name) for f in (infer_op, forward_op, backward_op))
    return dataclasses.replace(kind_named(name), infer=infer, forward=forward_, backward=backward_)


# infer, forward and backward have the arguments of the ops seqkernels::<kind>, <kind>_forward and <kind>_backward.
# `saved` has the layout of the Triton kernels.
KINDS = {name: _kind(name) for name in SUPPORTED}


def layer(
    kind: str,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    bidirectional: bool = False,
    extras: Extras | None = None,
    recompute: bool = False,
    every: bool = False,
) -> tuple[Tensor, ...]:
    """Runs one layer, both directions, as `seqkernels.functional` does with the ops, without argument checks.

    Args:
        kind: lstm, lstm_coupled, gru, gru_before, mgu, mgu_after, rnn_tanh or rnn_relu.
        x: [T, B, D], or [N, D] with batch_sizes; float64, float32, float16 or bfloat16; gradient: yes.
        states0: h0 and, for an LSTM, c0 [directions, B, H]; None for zeros. Gradient: yes.
        weights: for each direction w_ih [G * H, D], w_hh [G * H, H], optionally b_ih and b_hh [G * H], and with a
            peephole w_ph [3H], or [2H] for a coupled LSTM. Gradient: yes.
        batch_sizes: [T] int64 on the CPU, for packed rows. lengths: [B] integers, for a padded batch.
        extras: masks and options of the ops; num_heads > 1 is not supported.
        recompute: recompute the gates in backward.
        every: also return c at every step.
    Returns:
        y like x, zero beyond each length; the last states; with `every`, c at every step in the layout of y.
    Raises:
        NotImplementedError: these kernels do not support the inputs; the message lists the reasons.
    Deterministic: yes. Second derivatives are those of the definition in seqkernels.reference. torch.func transforms
    are not supported.
    """
    if kind not in KINDS:
        raise NotImplementedError(f"{kind}: the Triton kernels do not run: " + unsupported(kind, x)[-1])
    return _recurrent_ops.layer(
        *(KINDS[kind], x, states0, list(weights), batch_sizes, lengths, bidirectional),
        *(extras, recompute, every),
    )
