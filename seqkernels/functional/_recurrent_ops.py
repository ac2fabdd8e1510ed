"""Ops of recurrent layers: calls, fake implementations, autograd, torch.func.

Each kind has three ops: `<kind>` saves nothing for backward, `<kind>_forward` also returns the saved tensors, and
`<kind>_backward`. An op runs one layer, both directions.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P size of h (the projection size, or H).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _C
from .. import backend as backends
from ..reference import recurrent as reference
from . import _triton_ops
from ._autograd import (
    NAMESPACE,
    below_autograd,
    follow_tf32,
    jvp_by_definition,
    needs_definition,
    op,
    register_fake,
    unchanged,
    vjp_by_definition,
    vmap_rule,
)
from ._checks import ValueRuntimeError
from ._recurrent_extras import NO_EXTRAS, Extras, new_size
from ._recurrent_kinds import KINDS, Kind, size_of_state
from ._values import in_jit_trace, special

# ---- one layer


def layer(
    kind: Kind,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
    extras: Extras | None = None,
    recompute: bool = False,
    every: bool = False,
) -> tuple[Tensor, ...]:
    """y and the last states; with `every` also all states except h at all steps.

    Tensors are saved for backward only if autograd records the call. With `recompute`, the gates are not saved.
    """
    if x.is_cuda:
        follow_tf32(x, torch.backends.cudnn.rnn)
    if extras is None and not (recompute or every or special()):
        if _recording():
            for t in (*weights, x, *states0):
                if t is not None and t.requires_grad:
                    return _record(kind, bidirectional, batch_sizes, lengths, x, *states0, *weights)
        plain: tuple[Tensor, ...] = kind.infer(x, *states0, weights, batch_sizes, lengths, bidirectional)
        return plain
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    in_trace = in_jit_trace()  # which has one graph, with gradients enabled and without
    recorded = (torch.is_grad_enabled() or in_trace) and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or any(s is not None and s.requires_grad for s in states0)
    )
    if not (transformed or recorded or every):
        result: tuple[Tensor, ...] = kind.infer(
            x, *states0, weights, batch_sizes, lengths, bidirectional, *(extras or ())
        )
        return result
    recompute = recompute or not (recorded or transformed)  # without backward, save nothing
    call = Call(x, states0, weights, batch_sizes, lengths, bidirectional, extras, recompute)
    if transformed:
        outputs = _Transformed.apply(kind, *call.flat())
    elif recorded and not compiling and not in_trace:  # a trace cannot save an autograd.Function
        outputs = _Recorded.apply(kind, *call.flat())
    else:
        outputs = call.forward(kind)
    last = 1 + len(kind.states)
    return (*outputs[:last], *outputs[last + 1 :]) if every else tuple(outputs[:last])


class Call(NamedTuple):
    """Arguments of the ops of one layer."""

    x: Tensor  # [T, B, D], or [N, D] with batch_sizes
    states0: Sequence[Tensor | None]  # each [directions, B, P or H]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    bidirectional: bool
    extras: Extras | None
    recompute: bool

    def flat(self) -> tuple[Any, ...]:
        """Arguments of an autograd.Function: constants, then all tensors, of which the first FIXED have no gradient."""
        *flags, heads, reset, zoneout_h, zoneout_c, candidate, variational, numbers = self.extras or NO_EXTRAS
        masks = reset, zoneout_h, zoneout_c, candidate, variational
        scalars = (*flags, heads, numbers) if self.extras else None
        constants = self.bidirectional, scalars, self.recompute
        return constants, self.batch_sizes, self.lengths, *masks, *self.differentiable

    @staticmethod
    def nested(kind: Kind, constants: tuple[Any, ...], *tensors: Any) -> Call:
        """The inverse of `flat`."""
        bidirectional, scalars, recompute = constants
        batch_sizes, lengths, *masks = tensors[:FIXED]
        extras = Extras._make((*scalars[:-1], *masks, scalars[-1])) if scalars else None
        weights = FIXED + 1 + len(kind.states)
        states0 = tensors[FIXED + 1 : weights]
        return Call(
            tensors[FIXED], states0, list(tensors[weights:]), batch_sizes, lengths, bidirectional, extras, recompute
        )

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self.x, *self.states0, *self.weights

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.x, *self.states0, self.weights, self.batch_sizes, self.lengths, self.bidirectional

    def forward(self, kind: Kind) -> tuple[Tensor, ...]:
        """Returns (y, last states, saved, states except h at all steps)."""
        last = (*(self.extras or NO_EXTRAS), True) if self.recompute else self.extras or ()
        result: tuple[Tensor, ...] = kind.forward(*self.inputs, *last)
        return result

    def backward(
        self, kind: Kind, upstream: Sequence[Tensor | None], kept: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of `differentiable`. upstream: for y, the last states, the states except h at all steps."""
        if needs_definition(upstream):
            return self.backward_by_definition(kind, upstream, needs)
        follow_tf32(self.x, torch.backends.cudnn.rnn)
        states = len(kind.states)
        last: tuple[Any, ...] = self.extras or ()
        if any(g is not None for g in upstream[1 + states :]):
            last = *(self.extras or NO_EXTRAS), *upstream[1 + states :]
        need_weights = any(needs[1 + states :])
        dx, *dstates, dw = kind.backward(
            *upstream[: 1 + states], *self.inputs, *kept, bool(needs[0]), need_weights, *last
        )
        found = dx, *dstates, *(dw or [None] * len(self.weights))
        return [g if need else None for g, need in zip(found, needs)]

    def backward_by_definition(
        self, kind: Kind, upstream: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        return vjp_by_definition(self.definition(kind), self.differentiable, upstream, needs)

    def jvp_by_definition(self, kind: Kind, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        return jvp_by_definition(self.definition(kind), self.differentiable, tangents)

    def definition(self, kind: Kind) -> Callable[..., tuple[Tensor, ...]]:
        """The reference definition of the layer, as a function of `differentiable`."""
        states, extras = len(kind.states), (self.extras or NO_EXTRAS)._asdict()

        def outputs_of(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
            fixed = self.batch_sizes, self.lengths, self.bidirectional
            return reference.layer(kind.name, x, rest[:states], rest[states:], *fixed, **extras)

        return outputs_of


FIXED = 7  # number of non-differentiable tensors: batch_sizes, lengths and the tensors of Extras


# ---- autograd


def _keep(ctx: Any, kind: Kind, flat: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    ctx.kind, (ctx.constants, *tensors) = kind, flat
    saved = 1 + len(kind.states)
    ctx.save_for_backward(*tensors, outputs[0], *outputs[saved:])
    ctx.mark_non_differentiable(outputs[saved])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    kind, saved = ctx.kind, 1 + len(ctx.kind.states)
    tensors = ctx.saved_tensors  # the last ones are y, saved, the states except h at all steps
    call = Call.nested(kind, ctx.constants, *tensors[:-saved])
    return call.backward(kind, (*grads[:saved], *grads[saved + 1 :]), tensors[-saved:], needs)


class _Recorded(torch.autograd.Function):
    """A recorded layer in eager mode, with a third of the overhead of register_autograd."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, *flat: Any) -> tuple[Tensor, ...]:
        with below_autograd():
            outputs = Call.nested(kind, *flat).forward(kind)
        _keep(ctx, kind, flat, (unchanged(outputs[0]), *outputs[1:]))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        before = 2 + FIXED
        return *[None] * before, *_backward(ctx, grads, ctx.needs_input_grad[before:])


class _Plain(torch.autograd.Function):
    """`_Recorded` of a layer without options, with less overhead."""

    @staticmethod
    def forward(
        ctx: Any,
        kind: Kind,
        bidirectional: bool,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        x: Tensor,
        *rest: Tensor | None,
    ) -> tuple[Tensor, ...]:
        states = len(kind.states)
        with below_autograd():
            y, *others = kind.forward(x, *rest[:states], list(rest[states:]), batch_sizes, lengths, bidirectional)
        ctx.save_for_backward(batch_sizes, lengths, x, *rest, unchanged(y), *others[states:])
        ctx.kind, ctx.bidirectional = kind, bidirectional
        ctx.set_materialize_grads(False)
        return y, *others[:states]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        kind, needs, tensors = ctx.kind, ctx.needs_input_grad[4:], ctx.saved_tensors
        states = len(kind.states)
        batch_sizes, lengths, x, *rest = tensors[: -1 - states]
        states0, weights = rest[:states], rest[states:]
        if needs_definition(grads):
            call = Call(x, states0, weights, batch_sizes, lengths, ctx.bidirectional, None, False)
            upstream = *grads, *[None] * (states - 1)
            return None, None, None, None, *call.backward_by_definition(kind, upstream, needs)
        if x.is_cuda:
            follow_tf32(x, torch.backends.cudnn.rnn)
        dx, *dstates, dw = kind.backward(
            *grads, x, *states0, weights, batch_sizes, lengths, ctx.bidirectional, *tensors[-1 - states :],
            needs[0], True in needs[1 + states :],
        )  # fmt: skip
        found = dx, *dstates, *(dw or [None] * len(weights))
        if False in needs:
            found = (*(g if need else None for g, need in zip(found, needs)),)
        return None, None, None, None, *found


# _Plain.apply without its search for torch.func wrappers, which doubles the time of the call.
_record: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, _Plain).apply
_recording = torch.is_grad_enabled


class _Transformed(torch.autograd.Function):
    """A layer under torch.func transforms and forward-mode AD, which register_autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind: Kind, *flat: Any) -> tuple[Tensor, ...]:
        return Call.nested(kind, *flat).forward(kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        kind, *flat = inputs
        _keep(ctx, kind, flat, output)
        ctx.save_for_forward(*flat[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Recorded.backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        kind, saved = ctx.kind, 1 + len(ctx.kind.states)
        call = Call.nested(kind, ctx.constants, *ctx.saved_tensors)
        result = call.jvp_by_definition(kind, tangents[2 + FIXED :])
        return *result[:saved], None, *result[saved:]


# ---- fake implementations, autograd and vmap


def _register(kind: Kind, namespace: str) -> None:
    states = len(kind.states)
    name = f"{namespace}::{kind.name}"

    def fake_infer(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        weights, batch_sizes, _, bidirectional, *extras = args[states:]
        options = Extras(*extras)
        heads, variational = options.heads, options.variational
        if x.dim() != (3 if batch_sizes is None else 2) or len(weights) < 2 or any(w.dim() != 2 for w in weights[:2]):
            raise ValueError(f"{kind.name}: x or weights must have other dimensions, got {list(x.shape)}")
        given = [s for s in args[:states] if s is not None]
        for t in (*given, *([] if variational is None else [variational])):
            if t.dim() != 3:
                raise ValueError(f"{kind.name}: a state or its mask must have 3 dimensions, got {list(t.shape)}")
        for t in (*given, *weights):
            if t.device != x.device:
                raise ValueRuntimeError(
                    f"{kind.name}: x, states and weights must be on one device, got {x.device}, {t.device}"
                )
        B: Any
        if batch_sizes is None:
            B = x.shape[1]
        elif given or variational is not None:
            B = (*given, variational)[0].shape[1]
        elif type(batch_sizes) is Tensor and not batch_sizes.is_meta:  # of a packed input on meta
            B = int(batch_sizes[0]) if batch_sizes.shape[0] else 0
        else:
            B = new_size()  # batch_sizes[0], a value that is unknown while tracing
        directions, H, P = 2 if bidirectional else 1, _hidden(weights), weights[1].shape[1] * heads
        y = x.new_empty(*x.shape[:-1], directions * P)
        sizes = {"P": P, "H": H}
        return y, *(x.new_empty(directions, B, sizes[size_of_state(state)]) for state in kind.states)

    def fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        weights, _, _, bidirectional, *last = args[states:]
        extras, recompute = Extras(*last[: len(NO_EXTRAS)]), len(last) > len(NO_EXTRAS) and last[-1]
        outputs = fake_infer(x, *args[: states + 4], *extras)
        directions, H = 2 if bidirectional else 1, _hidden(weights)
        width = 0 if recompute else _C.recurrent_saved(kind.name, H, extras.any_option)
        rows = math.prod(x.shape[:-1])
        saved = x.new_empty(directions, rows, width)
        every = (x.new_empty(*x.shape[:-1], directions * H) for _ in kind.states[1:])
        return *outputs, saved, *every

    def _hidden(weights: Sequence[Tensor]) -> int:
        return weights[1].shape[0] // len(kind.gates)

    def fake_backward(*args: Any) -> tuple[Any, ...]:
        x, *states0, weights = args[1 + states : 3 + 2 * states]
        need_dx, need_dw = args[7 + 3 * states : 9 + 3 * states]

        def like(t: Tensor | None) -> Tensor:
            return x.new_empty(t.shape if t is not None else (0,))

        return like(x if need_dx else None), *map(like, states0), [like(w) for w in weights] if need_dw else []

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *rest = inputs
        weights, batch_sizes, lengths, bidirectional, *extras, recompute = rest[states:]
        call = Call(x, rest[:states], weights, batch_sizes, lengths, bidirectional, Extras(*extras), recompute)
        _keep(ctx, kind, call.flat(), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        need_x, *need_states, need_weights = ctx.needs_input_grad[: 2 + states]
        dx, *rest = _backward(ctx, grads, (need_x, *need_states, *need_weights))
        # torch expects one entry per argument, and a list for an argument that is a list.
        others: list[Any] = [[] if isinstance(need, list) else None for need in ctx.needs_input_grad[2 + states :]]
        return dx, *rest[:states], rest[states:], *others

    register_fake(name, fake_infer)
    register_fake(name + "_forward", fake_forward)
    register_fake(name + "_backward", fake_backward)
    torch.library.register_autograd(name + "_forward", backward, setup_context=setup_context)
    for suffix, op_ in (("", kind.infer), ("_forward", kind.forward), ("_backward", kind.backward)):
        torch.library.register_vmap(name + suffix, vmap_rule(op_))


for _each in KINDS.values():
    _register(_each, NAMESPACE)


# ---- Triton


def _in_triton(kind: Kind) -> Kind:
    """The kind with the ops of its Triton kernels."""
    for suffix, function in (("", "infer_op"), ("_forward", "forward_op"), ("_backward", "backward_op")):
        _triton_ops.define(kind.name + suffix, "recurrent.ops", function, kind.name)
    infer, forward, backward = (op(kind.name + end, _triton_ops.NAMESPACE) for end in ("", "_forward", "_backward"))
    return dataclasses.replace(kind, infer=infer, forward=forward, backward=backward)


TRITON_KINDS = {name: _in_triton(KINDS[name]) for name in backends.TRITON_KINDS}
for _each in TRITON_KINDS.values():
    _register(_each, _triton_ops.NAMESPACE)
