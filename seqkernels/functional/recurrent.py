"""Recurrent layers as functions: checks, the ops' fakes, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels import _C, backend, reference  # noqa: F401  (_C registers the ops)

LSTMState = tuple[Tensor, Tensor]
LSTM_GATES = 4

_ops = torch.ops.seqkernels
_lstm, _lstm_forward = _ops.lstm.default, _ops.lstm_forward.default  # .default: half the cost of a call
_lstm_backward = _ops.lstm_backward.default


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: LSTMState | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, LSTMState]:
    """Long short-term memory over whole sequences, dense, padded or packed: the cost is that of the real tokens.

    Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P the projection size or H, L layers.

    Args:
        input: [T, B, D], or [B, T, D] with batch_first, or [N, D] with batch_sizes; float32, float64, bfloat16 or
            float16 (half types compute in float32); gradient: yes.
        weights: for each layer and direction, in torch.nn.LSTM's order: w_ih [4H, D], w_hh [4H, P], then b_ih [4H] and
            b_hh [4H] unless there are no biases, then w_hr [P, H] if there is a projection. Gates are i, f, g, o.
            Gradient: yes.
        hx: h0 [L * directions, B, P] and c0 [L * directions, B, H]; zeros if absent. Gradient: yes.
        batch_sizes: [T] int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] integers in [0, T], in any order, on any device: the real steps of each row of a padded input. What
            lies beyond them is never read.
        dropout: probability of zeroing an element of the output of each layer but the last, while training.
    Returns:
        output [T, B, directions * P] (or laid out like input), zero beyond each length; h_n and c_n, shaped like hx, at
        the last step of each sequence (at hx where its length is zero).
    Raises:
        ValueError: a shape, a length or a number of weights does not fit.
        TypeError: a dtype does not fit, or hx or weights are not sequences of tensors.
        NotImplementedError: no backend takes these inputs; the message lists why.
    Equivalent to: torch.nn.LSTM; seqkernels.reference.lstm defines it.
    Deterministic: yes. The output, the states and the gradients of input and hx of a sequence are the same bits in any
        batch, padding and number of threads; all gradients are the same bits from run to run.
    Source: Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber and Cummins, 2000.
    """
    backend.require("lstm", input)
    directions = 2 if bidirectional else 1
    weights = list(weights)
    each = _weights_per_layer(weights, num_layers, directions)
    autocast = torch.is_autocast_enabled(input.device.type)
    transposed = batch_first and batch_sizes is None and input.dim() == 3
    x = input.transpose(0, 1) if transposed else input
    _check(x, weights, hx, batch_sizes, lengths, num_layers, directions, each // directions, autocast)
    y, states = lstm_stack(
        x, weights, hx, batch_sizes, lengths, num_layers, bidirectional, dropout if training else 0.0
    )
    return (y.transpose(0, 1) if transposed else y), states


def lstm_stack(
    x: Tensor,
    weights: list[Tensor],
    hx: LSTMState | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    num_layers: int,
    bidirectional: bool,
    dropout: float,
) -> tuple[Tensor, LSTMState]:
    """The layers of a time-major or packed input, unchecked but for lengths."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *weights = (_autocast(t, dtype) for t in (x, *weights))
        hx = None if hx is None else (_autocast(hx[0], dtype), _autocast(hx[1], dtype))
    if lengths is not None:
        lengths = _check_lengths(lengths, x.shape[0], x.shape[1])
    if num_layers == 1:
        h0, c0 = hx or (None, None)
        y, h_n, c_n = lstm_layer(x, h0, c0, weights, batch_sizes, lengths, bidirectional)
        return y, (h_n, c_n)
    each, directions = len(weights) // num_layers, 2 if bidirectional else 1
    states = []
    for layer in range(num_layers):
        if layer and dropout:
            x = F.dropout(x, dropout)
        h0, c0 = (s[layer * directions : (layer + 1) * directions] for s in hx) if hx else (None, None)
        of_layer = weights[layer * each : (layer + 1) * each]
        x, h_n, c_n = lstm_layer(x, h0, c0, of_layer, batch_sizes, lengths, bidirectional)
        states.append((h_n, c_n))
    return x, (torch.cat([h for h, _ in states]), torch.cat([c for _, c in states]))


def lstm_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, unchecked: saves what backward needs only where a gradient can be asked for."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or (h0 is not None and h0.requires_grad)
        or (c0 is not None and c0.requires_grad)
    ):
        y, h_n, c_n, _, _ = _lstm_forward(x, h0, c0, weights, batch_sizes, lengths, bidirectional)
        return y, h_n, c_n
    result: tuple[Tensor, Tensor, Tensor] = _lstm(x, h0, c0, weights, batch_sizes, lengths, bidirectional)
    return result


# ---- checks ----


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


def _weights_per_layer(weights: list[Tensor], num_layers: int, directions: int) -> int:
    each = len(weights) // (num_layers * directions) if num_layers > 0 else 0
    if not 2 <= each <= 5 or each * num_layers * directions != len(weights):
        raise ValueError(
            f"lstm: weights must hold w_ih, w_hh[, b_ih, b_hh][, w_hr] for each of {num_layers} layers and "
            f"{directions} directions, got {len(weights)} tensors"
        )
    return each * directions


def _check(
    x: Tensor,
    weights: list[Tensor],
    hx: LSTMState | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    num_layers: int,
    directions: int,
    each: int,
    autocast: bool,
) -> None:
    """Raises what the user should read; the ops check again what could read outside memory."""
    for w in weights:
        if w.dtype != x.dtype and not autocast:
            raise TypeError(f"lstm: weights must have the dtype of input, {x.dtype}, got {w.dtype}")
        if w.device != x.device:
            raise ValueError(f"lstm: weights must be on the device of input, {x.device}, got {w.device}")
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        wanted = "[N, D] with batch_sizes" if packed else "[T, B, D] (or [B, T, D] with batch_first)"
        raise ValueError(f"lstm: input must have shape {wanted}, got {list(x.shape)}")
    _check_weights(x.shape[-1], weights, num_layers, directions, each)
    if hx is not None:
        _check_states(x, weights, hx, packed, num_layers * directions, autocast)
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError("lstm: lengths must be absent where batch_sizes is given, got both")
        if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise TypeError(f"lstm: batch_sizes must be an int64 tensor on the CPU, got {_describe(batch_sizes)}")


def _check_weights(D: int, weights: list[Tensor], num_layers: int, directions: int, each: int) -> None:
    w_hh = weights[1]
    projected = each in (3, 5)
    if w_hh.dim() != 2 or w_hh.shape[0] % LSTM_GATES or 0 in w_hh.shape:
        raise ValueError(f"lstm: weight_hh must have shape [4H, {'P' if projected else 'H'}], got {list(w_hh.shape)}")
    G, P = w_hh.shape
    H = G // LSTM_GATES
    if not projected:
        P = H
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if each >= 4 else []), *(["weight_hr"] * projected)]
    shapes = {"weight_ih": (G, D), "weight_hh": (G, P), "bias_ih": (G,), "bias_hh": (G,), "weight_hr": (P, H)}
    symbols = {"weight_ih": "[4H, D]", "weight_hh": f"[4H, {'P' if projected else 'H'}]", "weight_hr": "[P, H]"}
    for i, w in enumerate(weights):
        if i == each * directions:
            shapes["weight_ih"] = (G, directions * P)
        name = names[i % each]
        if w.shape != shapes[name]:
            raise ValueError(
                f"lstm: {name} must have shape {symbols.get(name, '[4H]')} = {list(shapes[name])}, got {list(w.shape)}"
            )


def _check_states(x: Tensor, weights: list[Tensor], hx: LSTMState, packed: bool, states: int, autocast: bool) -> None:
    if not isinstance(hx, (tuple, list)) or len(hx) != 2 or not all(isinstance(s, Tensor) for s in hx):
        raise TypeError(f"lstm: hx must be a pair of tensors (h0, c0), got {_describe(hx)}")
    G, P = weights[1].shape
    for name, state, width, letter in (("h0", hx[0], P, "P"), ("c0", hx[1], G // LSTM_GATES, "H")):
        if state.dtype != x.dtype and not autocast:
            raise TypeError(f"lstm: {name} must have the dtype of input, {x.dtype}, got {state.dtype}")
        if state.device != x.device:
            raise ValueError(f"lstm: {name} must be on the device of input, {x.device}, got {state.device}")
        B = x.shape[1] if not packed else state.shape[1] if state.dim() == 3 else 0  # packed: checked by the op
        if state.shape != (states, B, width):
            wanted = f"[L * directions, B, {letter}] = {[states, 'B' if packed else B, width]}"
            raise ValueError(f"lstm: {name} must have shape {wanted}, got {list(state.shape)}")


def _check_lengths(lengths: Tensor | Sequence[int], T: int, B: int) -> Tensor:
    if not isinstance(lengths, Tensor):
        lengths = torch.as_tensor(lengths)
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) and lengths.numel():
        raise TypeError(f"lstm: lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"lstm: lengths must have shape [B] = [{B}], got {list(lengths.shape)}")
    lengths = lengths.to("cpu", torch.int64)
    if B and not torch.compiler.is_compiling():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise ValueError(f"lstm: lengths must lie in [0, T] = [0, {T}], got {low if low < 0 else high}")
    return lengths


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


# ---- fakes ----


def _fake_lstm(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    G, P = weights[1].shape
    directions = 2 if bidirectional else 1
    B: Any
    if batch_sizes is None:
        B = x.shape[1]
    elif h0 is not None:
        B = h0.shape[1]
    elif c0 is not None:
        B = c0.shape[1]
    else:
        B = torch.library.get_ctx().new_dynamic_size()  # batch_sizes[0]: not known while tracing
    return (
        x.new_empty(*x.shape[:-1], directions * P),
        x.new_empty(directions, B, P),
        x.new_empty(directions, B, G // LSTM_GATES),
    )


@torch.library.register_fake("seqkernels::lstm")
def _(*args: Any) -> tuple[Tensor, ...]:
    return _fake_lstm(*args)


@torch.library.register_fake("seqkernels::lstm_forward")
def _(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    G = weights[1].shape[0]
    directions = 2 if bidirectional else 1
    rows = x.shape[0] if batch_sizes is not None else x.shape[0] * x.shape[1]
    outputs = _fake_lstm(x, h0, c0, weights, batch_sizes, lengths, bidirectional)
    return (*outputs, x.new_empty(directions, rows, G), x.new_empty(directions, rows, G // LSTM_GATES))


@torch.library.register_fake("seqkernels::lstm_backward")
def _(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    def like(t: Tensor | None) -> Tensor:
        return x.new_empty(t.shape if t is not None else (0,))

    return like(x if need_dx else None), like(h0), like(c0), [like(w) for w in weights] if need_dw else []


# ---- autograd ----


def _setup_lstm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, h0, c0, weights, batch_sizes, lengths, bidirectional = inputs
    y, _, _, gates, cells = output
    ctx.save_for_backward(x, h0, c0, batch_sizes, lengths, y, gates, cells, *weights)
    ctx.bidirectional = bidirectional
    ctx.mark_non_differentiable(gates, cells)
    ctx.set_materialize_grads(False)


def _backward_lstm(
    ctx: Any, dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, _gates: None, _cells: None
) -> tuple[Any, ...]:
    x, h0, c0, batch_sizes, lengths, y, gates, cells, *weights = ctx.saved_tensors
    need_x, need_h0, need_c0, need_weights = ctx.needs_input_grad[:4]
    need_dw = any(need_weights)
    if torch.is_grad_enabled():  # create_graph: the fused backward is first order, the definition is of any
        dx, dh0, dc0, dw = _backward_by_reference(
            (dy, dh_n, dc_n), x, h0, c0, weights, batch_sizes, lengths, ctx.bidirectional
        )
    else:
        dx, dh0, dc0, dw = _lstm_backward(
            *(dy, dh_n, dc_n, x, h0, c0, weights, batch_sizes, lengths, ctx.bidirectional, y, gates, cells),
            *(bool(need_x), need_dw),
        )
    return (
        dx if need_x else None,
        dh0 if need_h0 else None,
        dc0 if need_c0 else None,
        [g if need else None for g, need in zip(dw, need_weights)] if need_dw else [None] * len(weights),
        *(None, None, None),
    )


def _backward_by_reference(
    upstream: tuple[Tensor | None, ...],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
) -> tuple[Any, Any, Any, list[Any]]:
    # Aliases, so that an input that was computed from another does not lead its gradient into it.
    def alias(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.view_as(t)

    x, h0, c0, weights = x.view_as(x), alias(h0), alias(c0), [w.view_as(w) for w in weights]
    outputs = reference.lstm_layer(x, h0, c0, weights, batch_sizes, lengths, bidirectional)
    wanted = [t for t in (x, h0, c0, *weights) if t is not None and t.requires_grad]
    pairs = [(out, g) for out, g in zip(outputs, upstream) if g is not None and out.requires_grad]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if pairs:
        used, grads = zip(*pairs)
        gradients = torch.autograd.grad(used, wanted, grads, create_graph=True, allow_unused=True)
    of = {id(t): g for t, g in zip(wanted, gradients)}
    return of.get(id(x)), of.get(id(h0)), of.get(id(c0)), [of.get(id(w)) for w in weights]


torch.library.register_autograd("seqkernels::lstm_forward", _backward_lstm, setup_context=_setup_lstm)
