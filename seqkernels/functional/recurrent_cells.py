"""Functional forms of recurrent cells: one step of a layer.

A step with B = 1 computes for a microsecond, so that its time is dominated by the overhead of the call. In eager mode,
cells without options have separate ops, `<kind>_cell`, `<kind>_cell_forward` and `<kind>_cell_backward`, and arguments
are only checked in Python if an op raises. While tracing, under transforms and forward-mode AD, and with options, a
step is a layer with T = 1, which has the same bits.

Dimensions: B sequences, D input, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from .. import backend as backends
from ..reference import recurrent as reference
from . import recurrent as F
from ._autograd import NAMESPACE, autocast, autocast_dtype, follow_tf32, needs_definition, op, register_fake, unchanged
from ._checks import TypeRuntimeError, ValueRuntimeError, describe, of_op
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function_variadic,
    refuse_nested,
)
from ._recurrent_extras import Extras, extras_of
from ._recurrent_kinds import KINDS, PLAIN_CELLS, Kind
from ._recurrent_ops import Call, layer
from ._recurrent_options import Options
from ._values import special

States = tuple[Tensor | None, ...]
Weights = Sequence[Tensor | None]  # w_ih, w_hh, b_ih, b_hh


@dataclass(frozen=True, eq=False)
class Cell:
    """A cell without options: its kind, its op, and the op recorded by autograd."""

    kind: Kind
    infer: Callable[..., Any]
    record: Callable[..., Any]


# ---- public functions

_DOC = """{title}: one step.

    Dimensions: B sequences, D input, H hidden.

    Args:
        input: [B, D] or [D]; float32, float64, bfloat16 or float16 (half types compute in float32); gradient: yes.
        hx: {hx}, with the leading dimension and dtype of input; zeros if None. Gradient: yes.
        w_ih: [{rows}, D]. w_hh: [{rows}, H]. {gates}Gradient: yes.
        b_ih, b_hh: [{rows}], both or neither. Gradient: yes.
        backend: "cpu", "cuda" or "triton"; None selects one.
    Returns:
        {returns}, with the leading dimension and dtype of input.
    Raises:
        As torch.{name}. ValueError: invalid shape. TypeError: invalid dtype or type.
        NotImplementedError: no implementation supports the inputs; the message lists the reasons.
    Equivalent to: torch.{name}; also a layer with T = 1, with the same bits.
    Deterministic: yes. The bits of a sequence are independent of its batch and of the number of threads.
    Source: {source}
    """


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh) and dispatches(input, w_ih):
        return _overridden(lstm_cell, input, hx, w_ih, w_hh, b_ih, b_hh, backend)
    states0 = (None, None) if hx is None else states_of("lstm_cell", LSTM.kind, hx)
    result: tuple[Tensor, Tensor] = step("lstm_cell", LSTM, input, states0, (w_ih, w_hh, b_ih, b_hh), backend)
    return result


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh) and dispatches(input, w_ih):
        return _overridden(gru_cell, input, hx, w_ih, w_hh, b_ih, b_hh, backend)
    result: Tensor = step("gru_cell", GRU, input, (hx,), (w_ih, w_hh, b_ih, b_hh), backend)
    return result


def rnn_tanh_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh) and dispatches(input, w_ih):
        return _overridden(rnn_tanh_cell, input, hx, w_ih, w_hh, b_ih, b_hh, backend)
    result: Tensor = step("rnn_tanh_cell", RNN_TANH, input, (hx,), (w_ih, w_hh, b_ih, b_hh), backend)
    return result


def rnn_relu_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    if has_torch_function_variadic(input, w_ih, w_hh, b_ih, b_hh) and dispatches(input, w_ih):
        return _overridden(rnn_relu_cell, input, hx, w_ih, w_hh, b_ih, b_hh, backend)
    result: Tensor = step("rnn_relu_cell", RNN_RELU, input, (hx,), (w_ih, w_hh, b_ih, b_hh), backend)
    return result


def _overridden(
    function: Callable[..., Any], input: Any, hx: Any, w_ih: Any, w_hh: Any, b_ih: Any, b_hh: Any, backend: str | None
) -> Any:
    """Dispatches a public function to the __torch_function__ of its arguments."""
    arguments = input, hx, w_ih, w_hh, b_ih, b_hh
    return handle_torch_function(function, (input, w_ih, w_hh, b_ih, b_hh), *arguments, backend=backend)


def states_of(caller: str, kind: Kind, hx: Any) -> tuple[Tensor, ...]:
    """hx of a kind with several states as a tuple; `check` checks its tensors."""
    if type(hx) is tuple and len(hx) == len(kind.states):
        return hx
    if not (isinstance(hx, (tuple, list)) and len(hx) == len(kind.states)):
        raise TypeRuntimeError(f"{caller}: hx must be {_wanted(kind)}, got {describe(hx)}")
    return tuple(hx)


def _wanted(kind: Kind) -> str:
    names = ", ".join(kind.initial_states)
    if len(kind.states) == 1:
        return f"a tensor {names}"
    return f"a {'pair' if len(kind.states) == 2 else f'tuple of {len(kind.states)}'} of tensors ({names})"


# ---- one step


def step(caller: str, cell: Cell, input: Tensor, states0: States, weights: Weights, backend: str | None = None) -> Any:
    """New state of a cell without options, or a tuple of states."""
    if backend is not None:
        if not isinstance(input, Tensor):
            raise TypeError(f"{caller}: input must be a tensor, got {type(input).__name__}")
        F.chosen(caller, cell.kind, input, 1, False, backend)
    if backend == "triton" or special():
        return as_layer(caller, cell.kind, input, states0, weights, weights[2] is not None, backend=backend)
    try:
        if input.is_cuda:
            if not backends.cuda_runs_on(input.device):
                return as_layer(caller, cell.kind, input, states0, weights, weights[2] is not None)
            follow_tf32(input, torch.backends.cudnn.rnn)
        if _any_autocast() and torch.is_autocast_enabled(input.device.type):
            input, states0, weights = _autocast(input, states0, weights)
        if _recording():
            for t in (*weights, input, *states0):
                if t is not None and t.requires_grad:
                    return cell.record(input, *states0, *weights)
        return cell.infer(input, *states0, *weights)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        check(caller, cell.kind, input, states0, weights, weights[2] is not None)
        if _without_units(weights):
            return as_layer(caller, cell.kind, input, states0, weights, weights[2] is not None)
        raise of_op(caller, error) from None


# Bound once, because each attribute lookup takes time.
_recording, _any_autocast = torch.is_grad_enabled, torch._C._is_any_autocast_enabled


def as_layer(
    caller: str,
    kind: Kind,
    input: Tensor,
    states0: States,
    weights: Weights,
    bias: bool,
    options: Options = F.PLAIN,
    training: bool = False,
    backend: str | None = None,
) -> Any:
    """`step` with the ops of a layer, with or without options."""
    kind = check(caller, kind, input, states0, weights, bias, options, backend)
    if autocast_dtype(input.device) is not None:
        input, states0, weights = _autocast(input, states0, weights)
    x, before = _lift(input, input.dim()), [_lift(s, input.dim()) for s in states0]
    given, extras = [w for w in weights if w is not None], None
    if not (options.plain and bias):
        x, extras = extras_of(kind, options, training, x, given, bias, projected=False)
    try:
        if _without_units(weights):  # cells of torch support a hidden size of 0, layers do not
            fixed = None, None, False
            states = reference.layer(kind.name, x, before, given, *fixed, **(extras or Extras(bias))._asdict())[1:]
            states = states[: len(kind.states)]
        else:
            states = layer(kind, x, before, given, None, None, False, extras)[1:]
    except RuntimeError as error:
        raise of_op(caller, error) from None
    return _lower(states[0], input.dim()) if len(states) == 1 else tuple(_lower(s, input.dim()) for s in states)


def _without_units(weights: Weights) -> bool:
    """Whether the hidden size is 0."""
    return weights[1] is not None and weights[1].shape == (0, 0)


def _autocast(input: Tensor, states0: States, weights: Weights) -> tuple[Tensor, States, Weights]:
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(t: Tensor | None) -> Any:
        return None if t is None else autocast(t, dtype)

    return cast(input), tuple(map(cast, states0)), tuple(map(cast, weights))


def _lift(t: Any, dimensions: int) -> Any:
    """Converts [B, ..] or [..] to [1, B, ..], the form of a layer."""
    return None if t is None else t.unsqueeze(0) if dimensions == 2 else t.view(1, 1, -1)


def _lower(t: Any, dimensions: int) -> Any:
    return None if t is None else t.squeeze(0) if dimensions == 2 else t.view(-1)


def check(
    caller: str,
    kind: Kind,
    input: Tensor,
    states0: States,
    weights: Weights,
    bias: bool,
    options: Options = F.PLAIN,
    backend: str | None = None,
) -> Kind:
    """Checks the arguments of the public functions and modules, with the error texts of torch.

    Returns:
        The kind with the ops of the implementation that runs.
    """
    if not isinstance(input, Tensor):
        raise TypeError(f"{caller}: input must be a tensor, got {describe(input)}")
    refuse_nested(caller, "use the values() of one step", input=input)
    kind = F.chosen(caller, kind, input, options.num_heads, False, backend)
    if input.dim() not in (1, 2):
        raise ValueError(f"{caller}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    given = [s for s in states0 if s is not None]
    for i, state in enumerate(given):
        if not isinstance(state, Tensor):
            raise TypeError(f"{caller}: hx must be {_wanted(kind)}, got {describe(state)}")
        if state.dim() not in (1, 2):
            which = f"hx[{i}]" if len(states0) > 1 else "hidden"
            raise ValueError(f"{caller}: Expected {which} to be 1D or 2D, got {state.dim()}D instead")
    present = [w for w in weights if w is not None]
    for w in present:
        if not isinstance(w, Tensor):
            raise TypeError(f"{caller}: weights must be tensors, got {describe(w)}")
    table = kind.weights(bias, False, options.peephole, options.num_heads > 1)
    if len(table) != len(present) or any(w is None for w in weights[:2]):
        raise ValueError(f"{caller}: weights must be w_ih, w_hh[, b_ih, b_hh], got None for some of them")
    w_ih, w_hh = present[:2]
    if w_ih.dim() == 2 and input.shape[-1] != w_ih.shape[1]:
        raise RuntimeError(f"input has inconsistent input_size: got {input.shape[-1]} expected {w_ih.shape[1]}")
    H = w_hh.shape[0] // len(kind.gates) if w_hh.dim() == 2 else 0
    for i, state in enumerate(given):
        if state.dim() != input.dim():
            form = "batched 2-D" if input.dim() == 2 else "unbatched 1-D"
            raise RuntimeError(f"For {form} input, hx should also be {input.dim()}-D but got {state.dim()}-D tensor")
        if input.dim() == 2 and state.shape[0] != input.shape[0]:
            raise RuntimeError(f"Input batch size {input.shape[0]} doesn't match hidden{i} batch size {state.shape[0]}")
        if H and state.shape[-1] != H:
            raise RuntimeError(f"hidden{i} has inconsistent hidden_size: got {state.shape[-1]}, expected {H}")
    before = tuple(_lift(s, input.dim()) for s in given)
    F.check(caller, kind, options, table, _lift(input, input.dim()), present, before, None, None, 1, 1, empty=True)
    return kind


# ---- ops of cells without options, and their gradients


def _cell(name: str) -> Cell:
    kind = KINDS[name]
    infer, forward, backward = (op(f"{name}_cell{end}") for end in ("", "_forward", "_backward"))
    _register_fakes(kind)
    return Cell(kind, infer, _recorded(kind, forward, backward))


def _recorded(kind: Kind, forward_op: Callable[..., Any], backward_op: Callable[..., Any]) -> Callable[..., Any]:
    states, weights_from = len(kind.states), 1 + len(kind.states)
    one_bias = kind.one_bias_gradient

    class Step(torch.autograd.Function):
        """A recorded step in eager mode."""

        @staticmethod
        def forward(ctx: Any, *inputs: Tensor | None) -> Any:
            ctx.set_materialize_grads(False)
            if states == 1:
                h, saved = forward_op(*inputs)
                ctx.save_for_backward(*inputs, unchanged(h), saved)
                return h
            outputs = forward_op(*inputs)
            ctx.save_for_backward(*inputs, *map(unchanged, outputs[:states]), *outputs[states:])
            return outputs[:states]

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            needs, tensors = ctx.needs_input_grad, ctx.saved_tensors
            if needs_definition(grads):
                return _by_definition(kind, tensors[: weights_from + 4], grads, needs)
            if tensors[0].is_cuda:
                follow_tf32(tensors[0], torch.backends.cudnn.rnn)
            found = backward_op(*grads, *tensors, needs[0], True in needs[1:weights_from], True in needs[weights_from:])
            if one_bias:  # each bias has a gradient of its own, which may be changed in place
                return *found, found[-1].clone() if needs[-2] and needs[-1] else found[-1]
            return found

    # Step.apply without its search for torch.func wrappers, which doubles the time of the call.
    apply: Callable[..., Any] = super(torch.autograd.Function, Step).apply
    return apply


def _by_definition(
    kind: Kind, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of the inputs."""
    x, states, weights = inputs[0], len(kind.states), inputs[1 + len(kind.states) :]
    assert x is not None
    n = x.dim()
    given = [w for w in weights if w is not None]
    states0, extras = [_lift(s, n) for s in inputs[1 : 1 + states]], Extras(bias=weights[2] is not None)
    call = Call(_lift(x, n), states0, given, None, None, False, extras, recompute=False)
    upstream = None, *(_lift(g, n) for g in grads), *[None] * (states - 1)
    found = call.backward_by_definition(kind, upstream, needs[: 1 + states + len(given)])
    of_weights = found[1 + states :]
    return *(_lower(g, n) for g in found[: 1 + states]), *of_weights, *[None] * (len(weights) - len(given))


def _register_fakes(kind: Kind) -> None:
    """Fake implementations for eager mode. torch.compile traces the ops of layers, which have all rules."""
    name, states = f"{NAMESPACE}::{kind.name}_cell", len(kind.states)

    def infer(x: Tensor, *rest: Tensor | None) -> Any:
        w_hh = rest[states + 1]
        assert w_hh is not None
        for t in rest:
            if t is not None and t.device != x.device:
                raise ValueRuntimeError(
                    f"{kind.name}_cell: all tensors must be on one device, got {x.device}, {t.device}"
                )
        outputs = tuple(x.new_empty(*x.shape[:-1], w_hh.shape[1]) for _ in range(states))
        return outputs if states > 1 else outputs[0]

    def forward(x: Tensor, *rest: Tensor | None) -> Any:
        w_hh = rest[states + 1]
        assert w_hh is not None
        width = _C.recurrent_saved(kind.name, w_hh.shape[1], False)
        outputs = infer(x, *rest)
        saved = x.new_empty(x.shape[0] if x.dim() == 2 else 1, width)
        return *(outputs if states > 1 else (outputs,)), saved

    def backward(*args: Any) -> Any:
        x, *states0 = args[states : 1 + 2 * states]
        weights, (need_dx, need_states, need_dw) = args[1 + 2 * states : 5 + 2 * states], args[-3:]
        weights = weights[:3] if kind.one_bias_gradient else weights
        wanted = (need_dx and x, *(need_states and s for s in states0), *(need_dw and w for w in weights))
        return tuple(x.new_empty(t.shape) if isinstance(t, Tensor) else None for t in wanted)

    register_fake(name, infer)
    register_fake(name + "_forward", forward)
    register_fake(name + "_backward", backward)


LSTM, GRU, RNN_TANH, RNN_RELU = map(_cell, PLAIN_CELLS)

lstm_cell.__doc__ = _DOC.format(
    title="Long short-term memory",
    name="lstm_cell",
    torch="LSTMCell",
    rows="4H",
    gates="Gates are i, f, g, o. ",
    hx="(h, c), each [B, H] or [H]",
    returns="the new (h, c)",
    source='Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber and Cummins, 2000.',
)
for _function, _title, _torch, _rows, _gates, _source in (
    (gru_cell, "Gated recurrent unit", "GRUCell", "3H", "Gates are r, z, n. ", "Cho et al., arXiv 1406.1078."),
    (rnn_tanh_cell, "Elman network, tanh", "RNNCell", "H", "", 'Elman, "Finding Structure in Time", 1990.'),
    (rnn_relu_cell, "Elman network, relu", "RNNCell", "H", "", "Le, Jaitly and Hinton, arXiv 1504.00941."),
):
    _function.__doc__ = _DOC.format(
        title=_title,
        name=_function.__name__,
        torch=_torch,
        rows=_rows,
        gates=_gates,
        hx="h, [B, H] or [H]",
        returns="the new h",
        source=_source,
    )
