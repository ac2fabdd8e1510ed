"""Recurrent layers as functions: checks, the ops' fakes, autograd, torch.func.

Every kind of layer has three ops, of the same form: `<kind>` saves nothing, `<kind>_forward` also returns what backward
needs, `<kind>_backward`. They take one layer, both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from seqkernels import _C, backend  # noqa: F401  (_C registers the ops)
from seqkernels.reference import recurrent as reference

States = tuple[Tensor, ...]
Lengths = Tensor | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of layer: what the functions below have to know of its cell."""

    name: str
    gates: int
    state_names: tuple[str, ...]
    saved: int  # tensors that forward returns for backward
    cell: reference.Cell
    infer: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    @property
    def rows(self) -> str:
        return f"{self.gates}H" if self.gates > 1 else "H"


def _kind(name: str, gates: int, state_names: tuple[str, ...], saved: int, cell: reference.Cell) -> Kind:
    ops = torch.ops.seqkernels
    # .default: half the cost of a call
    of = (getattr(ops, name + suffix).default for suffix in ("", "_forward", "_backward"))
    return Kind(name, gates, state_names, saved, cell, *of)


LSTM = _kind("lstm", 4, ("h0", "c0"), 2, reference.lstm_cell)
GRU = _kind("gru", 3, ("h0",), 1, reference.gru_cell)
RNN_TANH = _kind("rnn_tanh", 1, ("h0",), 1, reference.rnn_tanh_cell)
RNN_RELU = _kind("rnn_relu", 1, ("h0",), 1, reference.rnn_relu_cell)
KINDS = {kind.name: kind for kind in (LSTM, GRU, RNN_TANH, RNN_RELU)}


# ---- public functions ----

_DOC = """{title}: over whole sequences, dense, padded or packed; the cost is that of the real tokens.

    Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P {fed_back}, L layers.

    Args:
        input: [T, B, D], or [B, T, D] with batch_first, or [N, D] with batch_sizes; float32, float64, bfloat16 or
            float16 (half types compute in float32); gradient: yes.
        weights: for each layer and direction, in torch.nn.{torch}'s order: w_ih [{rows}, D], w_hh [{rows}, P], then
            b_ih [{rows}] and b_hh [{rows}] unless there are no biases{projection}. {gate_order}Gradient: yes.
        hx: {hx}; zeros if absent. Gradient: yes.
        batch_sizes: [T] int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] integers in [0, T], in any order, on any device: the real steps of each row of a padded input. What
            lies beyond them is never read.
        dropout: probability of zeroing an element of the output of each layer but the last, while training.
    Returns:
        output [T, B, directions * P] (or laid out like input), zero beyond each length; and {states}, shaped like hx,
        at the last step of each sequence (hx where its length is zero).
    Raises:
        ValueError: a shape, a length or a number of weights does not fit.
        TypeError: a dtype does not fit, or hx or weights are not tensors.
        NotImplementedError: no backend takes these inputs; the message lists why.
    Equivalent to: torch.nn.{torch}; seqkernels.reference.{name} defines it.
    Deterministic: yes. The output, the states and the gradients of input and hx of a sequence are the same bits in any
        batch, padding and number of threads; all gradients are the same bits from run to run.
    Source: {source}
    """


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    states0 = states_of(LSTM, hx)
    output, states = _checked(
        LSTM, input, weights, states0, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout, training
    )
    return output, (states[0], states[1])


def _one_state_function(kind: Kind) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(
        input: Tensor,
        weights: Sequence[Tensor],
        hx: Tensor | None = None,
        *,
        batch_sizes: Tensor | None = None,
        lengths: Lengths = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        states0 = states_of(kind, hx)
        output, states = _checked(
            *(kind, input, weights, states0, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout),
            training,
        )
        return output, states[0]

    function.__name__ = function.__qualname__ = kind.name
    return function


gru = _one_state_function(GRU)
rnn_tanh = _one_state_function(RNN_TANH)
rnn_relu = _one_state_function(RNN_RELU)

lstm.__doc__ = _DOC.format(
    title="Long short-term memory",
    name="lstm",
    torch="LSTM",
    rows="4H",
    fed_back="the projection size or H",
    projection=", then w_hr [P, H] if there is a projection",
    gate_order="Gates are i, f, g, o. ",
    hx="h0 [L * directions, B, P] and c0 [L * directions, B, H]",
    states="(h_n, c_n)",
    source='Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber and Cummins, 2000.',
)
for _function, _title, _torch, _rows, _gates, _source in (
    (gru, "Gated recurrent unit", "GRU", "3H", "Gates are r, z, n. ", "Cho et al., 2014; reset after the product."),
    (rnn_tanh, "Elman network, tanh", "RNN", "H", "", 'Elman, "Finding Structure in Time", 1990.'),
    (rnn_relu, "Elman network, relu", "RNN", "H", "", "Le, Jaitly and Hinton, 2015."),
):
    _function.__doc__ = _DOC.format(
        title=_title,
        name=_function.__name__,
        torch=_torch,
        rows=_rows,
        fed_back="= H",
        projection="",
        gate_order=_gates,
        hx="h0 [L * directions, B, H]",
        states="h_n",
        source=_source,
    )


# ---- the way to the ops ----


def _checked(
    kind: Kind,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    lengths: Lengths,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, States]:
    backend.require(kind.name, input)
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{kind.name}: dropout must lie in [0, 1], got {dropout}")
    weights = list(weights)
    each = _weights_each(kind, weights, num_layers, 2 if bidirectional else 1)
    transposed = batch_first and batch_sizes is None and input.dim() == 3
    x = input.transpose(0, 1) if transposed else input
    _check(kind, x, weights, hx, batch_sizes, lengths, num_layers, 2 if bidirectional else 1, each)
    drop = dropout if training else 0.0
    y, states = stack(kind, x, weights, hx, batch_sizes, lengths, num_layers, bidirectional, drop)
    return (y.transpose(0, 1) if transposed else y), states


def stack(
    kind: Kind,
    x: Tensor,
    weights: list[Tensor],
    hx: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    lengths: Lengths,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
) -> tuple[Tensor, States]:
    """The layers of a time-major or packed input, unchecked but for lengths."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *weights = (_autocast(t, dtype) for t in (x, *weights))
        hx = None if hx is None else [_autocast(s, dtype) for s in hx]
    if lengths is not None:
        lengths = _check_lengths(kind, lengths, x.shape[0], x.shape[1])
    none = (None,) * len(kind.state_names)
    if num_layers == 1:
        y, *states = layer(kind, x, none if hx is None else hx, weights, batch_sizes, lengths, bidirectional)
        return y, tuple(states)
    each, directions = len(weights) // num_layers, 2 if bidirectional else 1
    last: list[list[Tensor]] = []
    for i in range(num_layers):
        if i and dropout:
            x = F.dropout(x, dropout)
        states0 = none if hx is None else [s[i * directions : (i + 1) * directions] for s in hx]
        of_layer = weights[i * each : (i + 1) * each]
        x, *states = layer(kind, x, states0, of_layer, batch_sizes, lengths, bidirectional)
        last.append(states)
    return x, tuple(torch.cat(of_state) for of_state in zip(*last))


def layer(
    kind: Kind,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    """One layer: saves what backward needs only where a gradient can be asked for."""
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        shape = (len(states0), bidirectional)
        outputs = _Layer.apply(kind, shape, batch_sizes, lengths, x, *states0, *weights)
        return tuple(outputs[: 1 + len(states0)])
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or any(s is not None and s.requires_grad for s in states0)
    ):
        outputs = kind.forward(x, *states0, weights, batch_sizes, lengths, bidirectional)
        return tuple(outputs[: 1 + len(states0)])
    result: tuple[Tensor, ...] = kind.infer(x, *states0, weights, batch_sizes, lengths, bidirectional)
    return result


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


# ---- checks ----


def states_of(kind: Kind, hx: Any) -> States | None:
    """hx as the user gave it, as a tuple of tensors."""
    if hx is None:
        return None
    if len(kind.state_names) == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{kind.name}: hx must be a tensor h0, got {_describe(hx)}")
        return (hx,)
    if not (isinstance(hx, (tuple, list)) and len(hx) == 2 and all(isinstance(s, Tensor) for s in hx)):
        raise TypeError(f"{kind.name}: hx must be a pair of tensors (h0, c0), got {_describe(hx)}")
    return tuple(hx)


def _weights_each(kind: Kind, weights: list[Tensor], num_layers: int, directions: int) -> int:
    """Weights per layer and direction."""
    layers = num_layers * directions
    each = len(weights) // layers if num_layers > 0 else 0
    allowed = (2, 3, 4, 5) if kind is LSTM else (2, 4)
    if each not in allowed or each * layers != len(weights):
        wanted = "w_ih, w_hh[, b_ih, b_hh]" + ("[, w_hr]" if kind is LSTM else "")
        raise ValueError(
            f"{kind.name}: weights must hold {wanted} for each of {num_layers} layers and {directions} directions, "
            f"got {len(weights)} tensors"
        )
    for w in weights:
        if not isinstance(w, Tensor):
            raise TypeError(f"{kind.name}: weights must be tensors, got {_describe(w)}")
    return each


def _check(
    kind: Kind,
    x: Tensor,
    weights: list[Tensor],
    hx: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    lengths: Lengths,
    num_layers: int,
    directions: int,
    each: int,
) -> None:
    """Raises what the user should read; the ops check again what could read outside memory."""
    for w in weights:
        _check_like(kind, "weights", w, x)
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        wanted = "[N, D] with batch_sizes" if packed else "[T, B, D] (or [B, T, D] with batch_first)"
        raise ValueError(f"{kind.name}: input must have shape {wanted}, got {list(x.shape)}")
    _check_weights(kind, x.shape[-1], weights, directions, each)
    if hx is not None:
        _check_states(kind, x, weights, hx, packed, num_layers * directions)
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError(
                f"{kind.name}: lengths must be absent where batch_sizes is given, got {_describe(lengths)}"
            )
        if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise TypeError(
                f"{kind.name}: batch_sizes must be an int64 tensor on the CPU, got {_describe(batch_sizes)}"
            )


def _check_like(kind: Kind, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{kind.name}: {name} must have the dtype of input, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{kind.name}: {name} must be on the device of input, {x.device}, got {t.device}")


def _check_weights(kind: Kind, D: int, weights: list[Tensor], directions: int, each: int) -> None:
    w_hh = weights[1]
    projected = each in (3, 5)
    if w_hh.dim() != 2 or w_hh.shape[0] % kind.gates or 0 in w_hh.shape:
        raise ValueError(
            f"{kind.name}: weight_hh must have shape [{kind.rows}, {'P' if projected else 'H'}], got {list(w_hh.shape)}"
        )
    G, P = w_hh.shape
    H = G // kind.gates
    if not projected:
        P = H
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if each >= 4 else []), *(["weight_hr"] * projected)]
    shapes = {"weight_ih": (G, D), "weight_hh": (G, P), "bias_ih": (G,), "bias_hh": (G,), "weight_hr": (P, H)}
    fed_back = f"[{kind.rows}, {'P' if projected else 'H'}]"
    symbols = {"weight_ih": f"[{kind.rows}, D]", "weight_hh": fed_back, "weight_hr": "[P, H]"}
    for i, w in enumerate(weights):
        if i == each * directions:
            shapes["weight_ih"] = (G, directions * P)
        name = names[i % each]
        if w.shape != shapes[name]:
            wanted = f"{symbols.get(name, f'[{kind.rows}]')} = {list(shapes[name])}"
            raise ValueError(f"{kind.name}: {name} must have shape {wanted}, got {list(w.shape)}")


def _check_states(
    kind: Kind, x: Tensor, weights: list[Tensor], hx: Sequence[Tensor], packed: bool, states: int
) -> None:
    G, P = weights[1].shape
    for name, state in zip(kind.state_names, hx):
        _check_like(kind, name, state, x)
        width, letter = (P, "P" if kind is LSTM else "H") if name == "h0" else (G // kind.gates, "H")
        B = x.shape[1] if not packed else state.shape[1] if state.dim() == 3 else 0  # packed: checked by the op
        if state.shape != (states, B, width):
            wanted = f"[L * directions, B, {letter}] = {[states, 'B' if packed else B, width]}"
            raise ValueError(f"{kind.name}: {name} must have shape {wanted}, got {list(state.shape)}")


def _check_lengths(kind: Kind, lengths: Tensor | Sequence[int], T: int, B: int) -> Tensor:
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{kind.name}: lengths must be integers, got {lengths!r}") from error
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) and lengths.numel():
        raise TypeError(f"{kind.name}: lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"{kind.name}: lengths must have shape [B] = [{B}], got {list(lengths.shape)}")
    lengths = lengths.to("cpu", torch.int64)
    if B and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise ValueError(f"{kind.name}: lengths must lie in [0, T] = [0, {T}], got {low if low < 0 else high}")
    return lengths


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__


# ---- fakes, autograd, vmap ----


def _gradients(
    kind: Kind,
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
    upstream: Sequence[Tensor | None],
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
    y: Tensor,
    saved: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Gradients of x, states and weights; None where not needed."""
    need_x, need_states, need_weights = needs
    if torch.is_grad_enabled():  # create_graph: the fused backward is first order, the definition is of any
        return _gradients_by_reference(kind, needs, upstream, x, states0, weights, batch_sizes, lengths, bidirectional)
    dx, *dstates, dw = kind.backward(
        *(*upstream, x, *states0, weights, batch_sizes, lengths, bidirectional, y, *saved),
        *(bool(need_x), any(need_weights)),
    )
    dw = dw or [None] * len(weights)
    return (
        dx if need_x else None,
        [g if need else None for g, need in zip(dstates, need_states)],
        [g if need else None for g, need in zip(dw, need_weights)],
    )


def _gradients_by_reference(
    kind: Kind,
    needs: tuple[bool, Sequence[bool], Sequence[bool]],
    upstream: Sequence[Tensor | None],
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """By torch.func.vjp, which takes each input for itself (one may come from another) and nests in any transform."""
    states = len(states0)
    inputs: list[Any] = [x, *states0, *weights]
    wanted = [i for i, needed in enumerate((needs[0], *needs[1], *needs[2])) if needed]
    given = [i for i, g in enumerate(upstream) if g is not None]

    def outputs_of(*primals: Tensor) -> tuple[Tensor, ...]:
        all_inputs = _replaced(inputs, wanted, primals)
        x, states0, weights = all_inputs[0], all_inputs[1 : 1 + states], all_inputs[1 + states :]
        outputs = reference.layer(kind.cell, states, x, states0, weights, batch_sizes, lengths, bidirectional)
        return tuple(outputs[i] for i in given)

    pull = torch.func.vjp(outputs_of, *(inputs[i] for i in wanted))[1]
    found = pull(tuple(upstream[i] for i in given)) if given else [None] * len(wanted)
    gradients = _replaced([None] * len(inputs), wanted, found)
    return gradients[0], gradients[1 : 1 + states], gradients[1 + states :]


def _replaced(values: list[Any], at: Sequence[int], by: Sequence[Any]) -> list[Any]:
    values = list(values)
    for i, value in zip(at, by):
        values[i] = value
    return values


class _Layer(torch.autograd.Function):
    """A layer under torch.func's transforms and forward-mode AD, which the ops' own autograd formula does not serve."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        kind: Kind,
        shape: tuple[int, bool],
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        x: Tensor,
        *rest: Tensor | None,
    ) -> Any:
        states, bidirectional = shape
        return kind.forward(x, *rest[:states], list(rest[states:]), batch_sizes, lengths, bidirectional)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.kind, ctx.shape, *tensors = inputs
        states = ctx.shape[0]
        ctx.save_for_backward(*tensors, output[0], *output[1 + states :])
        ctx.save_for_forward(*tensors)
        ctx.mark_non_differentiable(*output[1 + states :])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        kind, (states, bidirectional) = ctx.kind, ctx.shape
        batch_sizes, lengths, x, *rest = ctx.saved_tensors[: -1 - kind.saved]
        y, *saved = ctx.saved_tensors[-1 - kind.saved :]
        need_x, *need = ctx.needs_input_grad[4:]
        dx, dstates, dw = _gradients(
            kind,
            (need_x, need[:states], need[states:]),
            grads[: 1 + states],
            *(x, rest[:states], list(rest[states:]), batch_sizes, lengths, bidirectional, y, saved),
        )
        return None, None, None, None, dx, *dstates, *dw

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Through the definition: a vector-Jacobian product is linear in its vector, and its transpose is this."""
        kind, (states, bidirectional) = ctx.kind, ctx.shape
        batch_sizes, lengths, *inputs = ctx.saved_tensors
        moving = [i for i, tangent in enumerate(tangents[4:]) if tangent is not None]

        def outputs_of(*primals: Tensor) -> tuple[Tensor, ...]:
            all_inputs = _replaced(inputs, moving, primals)
            x, states0, weights = all_inputs[0], all_inputs[1 : 1 + states], all_inputs[1 + states :]
            return reference.layer(kind.cell, states, x, states0, weights, batch_sizes, lengths, bidirectional)

        outputs, pull = torch.func.vjp(outputs_of, *(inputs[i] for i in moving))[:2]
        _, push = torch.func.vjp(pull, tuple(torch.zeros_like(out) for out in outputs))[:2]
        (result,) = push(tuple(tangents[4 + i] for i in moving))
        return *result, *([None] * kind.saved)


def _register(kind: Kind) -> None:
    states = len(kind.state_names)
    name = f"seqkernels::{kind.name}"

    def fake(
        x: Tensor, states0: Sequence[Tensor | None], weights: list[Tensor], batch_sizes: Any, bidirectional: bool
    ) -> tuple[Tensor, ...]:
        if x.dim() != (3 if batch_sizes is None else 2) or len(weights) < 2 or any(w.dim() != 2 for w in weights[:2]):
            raise ValueError(f"{kind.name}: x or weights must have other dimensions, got {list(x.shape)}")
        G, P = weights[1].shape
        directions = 2 if bidirectional else 1
        given = [s for s in states0 if s is not None]
        for t in (*given, *weights):
            if t.device != x.device:
                raise ValueError(
                    f"{kind.name}: x, states and weights must be on one device, got {x.device}, {t.device}"
                )
        B: Any
        if batch_sizes is None:
            B = x.shape[1]
        elif given:
            B = given[0].shape[1]
        else:
            B = torch.library.get_ctx().new_dynamic_size()  # batch_sizes[0]: not known while tracing
        y = x.new_empty(*x.shape[:-1], directions * P)
        return y, *(x.new_empty(directions, B, width) for width in (P, G // kind.gates)[:states])

    def fake_infer(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        weights, batch_sizes, _, bidirectional = args[states:]
        return fake(x, args[:states], weights, batch_sizes, bidirectional)

    def fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        weights, batch_sizes = args[states : states + 2]
        outputs = fake_infer(x, *args)
        H = weights[1].shape[0] // kind.gates
        rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
        widths = {"lstm": (4 * H, H), "gru": (4 * H,)}.get(kind.name, (0,))
        directions = 2 if args[-1] else 1
        return *outputs, *(x.new_empty(directions, rows, width) for width in widths)

    def fake_backward(*args: Any) -> tuple[Any, ...]:
        x, *states0 = args[1 + states : 2 + 2 * states]
        weights, need_dx, need_dw = args[2 + 2 * states], *args[-2:]

        def like(t: Tensor | None) -> Tensor:
            return x.new_empty(t.shape if t is not None else (0,))

        return like(x if need_dx else None), *map(like, states0), [like(w) for w in weights] if need_dw else []

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *rest = inputs
        weights, batch_sizes, lengths, ctx.bidirectional = rest[states:]
        ctx.save_for_backward(batch_sizes, lengths, x, *rest[:states], output[0], *output[1 + states :], *weights)
        ctx.mark_non_differentiable(*output[1 + states :])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        batch_sizes, lengths, x, *rest = ctx.saved_tensors
        states0, y, saved = rest[:states], rest[states], rest[states + 1 : states + 1 + kind.saved]
        weights = rest[states + 1 + kind.saved :]
        need_x, *need_states, need_weights = ctx.needs_input_grad[: 2 + states]
        dx, dstates, dw = _gradients(
            kind,
            (need_x, need_states, need_weights),
            grads[: 1 + states],
            *(x, states0, weights, batch_sizes, lengths, ctx.bidirectional, y, saved),
        )
        return dx, *dstates, dw, None, None, None

    torch.library.register_fake(name)(fake_infer)
    torch.library.register_fake(name + "_forward")(fake_forward)
    torch.library.register_fake(name + "_backward")(fake_backward)
    torch.library.register_autograd(name + "_forward", backward, setup_context=setup_context)
    for suffix, op in (("", kind.infer), ("_forward", kind.forward), ("_backward", kind.backward)):
        torch.library.register_vmap(name + suffix, _vmap_rule(op))


def _vmap_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """One call per sample: each may have weights of its own, and a weight gradient of its own."""

    def one(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
            return [one(v, d, i) for v, d in zip(value, dims)]
        return value if dim is None else value.select(dim, i).contiguous()

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        results = [op(*(one(a, d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)]
        flat = [pytree.tree_flatten(result)[0] for result in results]
        spec = pytree.tree_flatten(results[0])[1]
        stacked = pytree.tree_unflatten([torch.stack(column) for column in zip(*flat)], spec)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule


for _each in KINDS.values():
    _register(_each)
