"""Recurrent layers as functions: checks, and the way to the ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels import backend
from seqkernels.functional import _recurrent_options as families
from seqkernels.functional._recurrent_ops import Kind, Weight, layer
from seqkernels.functional._recurrent_options import (
    FUNCTIONAL,
    Family,
    Options,
    check_together,
    extras_of,
    options_of,
    sequences_of,
    wrapped,
)

States = tuple[Tensor, ...]
Lengths = Tensor | Sequence[int] | None
PLAIN = Options()


# ---- public functions

_DOC = """{title}: over whole sequences, dense, padded or packed; the cost is that of the real tokens.

    Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P {fed_back}, L layers.

    Args:
        input: [T, B, D], or [B, T, D] with batch_first, or [N, D] with batch_sizes; float32, float64, bfloat16 or
            float16 (half types compute in float32); gradient: yes.
        weights: for each layer and direction, in this order: weight_ih [{rows}, D], weight_hh [{rows}, P], then \
bias_ih and bias_hh [{rows}] unless there are no biases{more_weights}. {gates}Gradient: yes.
        hx: {hx}; zeros if absent. Gradient: yes.
        batch_sizes: [T] int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] integers in [0, T], in any order, on any device: the real steps of each row of a padded input. What
            lies beyond them is never read. Where lengths and input are on a CUDA device nobody looks at them: outside
            [0, T] they count as the nearest within. Those on the host are checked and copied there, without waiting for
            the device; a CUDA graph must be given them on the device.
        dropout: probability of zeroing an element of the output of each layer but the last, while training.
        reset: bool, [T, B] ([B, T] with batch_first) or [N] with batch_sizes: where it is True the states are zero
            before that step, so that a new sequence starts there; in the reverse direction it ends there. No gradient
            passes.
    Options:
        {options}
    Returns:
        output [T, B, directions * P] (or laid out like input), zero beyond each length;
        {states}, shaped like hx, at the last step of each sequence (hx where its length is zero);
        with return_all_states that option's third.
    Raises:
        ValueError: a shape, a length, a number of weights or an option does not fit, or two options exclude each other.
        TypeError: a dtype does not fit, hx or weights are not tensors, or an option is none of these.
        NotImplementedError: no backend takes these inputs; the message lists why.
    Equivalent to: {equivalent}seqkernels.reference.{name} defines it.
    Deterministic: yes, but for what dropouts and zoneout draw. The output, the states and the gradients of input and hx
        of a sequence are the same bits in any batch, padding and number of threads; all gradients are the same bits
        from run to run.
    Source: {source}
    """


def _function(family: Family, **about: str) -> Callable[..., Any]:
    def function(
        input: Tensor,
        weights: Sequence[Tensor],
        hx: Tensor | tuple[Tensor, ...] | None = None,
        *,
        batch_sizes: Tensor | None = None,
        lengths: Lengths = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
        reset: Tensor | None = None,
        **options: Any,
    ) -> Any:
        who = family.name
        backend.require(who, input)
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"{who}: dropout must lie in [0, 1], got {dropout}")
        for name in options:
            if name not in takes:
                raise TypeError(f"{who}() got an unexpected keyword argument {name!r}")
        chosen = options_of(who, family, options) if options else family.plain
        check_together(who, chosen)
        weights = list(weights)
        directions = 2 if bidirectional else 1
        kind, table = _kind_of(family, chosen, weights, hx, num_layers, directions)
        states0 = states_of(kind, hx)
        transposed = batch_first and batch_sizes is None and input.dim() == 3
        x = input.transpose(0, 1) if transposed else input
        _check(kind, chosen, table, x, weights, states0, batch_sizes, lengths, num_layers * directions, directions)
        if reset is not None:
            check_reset(who, reset, input)
            reset = reset.transpose(0, 1) if transposed else reset
        y, states, every = stack(
            *(kind, x, weights, states0, batch_sizes, lengths, num_layers, bidirectional),
            *(dropout if training else 0.0, chosen, training, reset),
        )
        if transposed:
            y, every = y.transpose(0, 1), tuple(tuple(s.transpose(0, 1) for s in of_layer) for of_layer in every)
        last = states if len(states) > 1 else states[0]
        return (y, last, every) if chosen.return_all_states else (y, last)

    takes = [name for name in family.takes if name in FUNCTIONAL]
    function.__name__ = function.__qualname__ = family.name
    function.__doc__ = wrapped(_DOC.format(name=family.name, options=family.about(takes), **about))
    return function


lstm = _function(
    families.LSTM,
    title="Long short-term memory",
    rows="4H",
    fed_back="the projection size or H",
    more_weights=", then weight_hr [P, H] if there is a projection, then those of the options",
    gates="Gates are i, f, g, o (i, g, o with coupled_gates). ",
    hx="h0 [L * directions, B, P] and c0 [L * directions, B, H]",
    states="(h_n, c_n)",
    equivalent="torch.nn.LSTM, where no option is on; ",
    source='Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber and Cummins, 2000.',
)
nested_lstm = _function(
    families.NESTED_LSTM,
    title="Nested LSTM, whose cell is the output of an inner LSTM",
    rows="4H",
    fed_back="= H",
    more_weights=", then weight_inner_ih and weight_inner_hh [4H, H], and with biases bias_inner_ih and bias_inner_hh "
    "[4H]",
    gates="Gates are i, f, g, o. ",
    hx="h0, c0 and s0, the inner cell, each [L * directions, B, H]",
    states="(h_n, c_n, s_n)",
    equivalent="",
    source='Moniz and Krueger, "Nested LSTMs", arXiv 1801.10308.',
)
gru = _function(
    families.GRU,
    title="Gated recurrent unit",
    rows="3H",
    fed_back="the projection size or H",
    more_weights=", then weight_hr [P, H] if there is a projection, then those of the options",
    gates="Gates are r, z, n. ",
    hx="h0 [L * directions, B, H]; with a projection (h0 [.., P], c0 [.., H])",
    states="h_n (with a projection (h_n, c_n))",
    equivalent="torch.nn.GRU, where no option is on; ",
    source="Cho et al., arXiv 1406.1078. The projection is that of Sak, Senior and Beaufays, arXiv 1402.1128: h = w_hr "
    "c is fed back, c carried.",
)
mgu = _function(
    families.MGU,
    title="Minimal gated unit",
    rows="2H",
    fed_back="= H",
    more_weights="",
    gates="Gates are f, n. ",
    hx="h0 [L * directions, B, H]",
    states="h_n",
    equivalent="",
    source='Zhou, Wu, Zhang and Zhou, "Minimal Gated Unit for Recurrent Neural Networks", arXiv 1603.09420.',
)
_RNN = dict(rows="H", fed_back="= H", more_weights="", gates="", hx="h0 [L * directions, B, H]", states="h_n")
_RNN["equivalent"] = "torch.nn.RNN, where no option is on; "
rnn_tanh = _function(
    families.RNN_TANH, title="Elman network, tanh", source='Elman, "Finding Structure in Time", 1990.', **_RNN
)
rnn_relu = _function(
    families.RNN_RELU, title="Elman network, relu", source="Le, Jaitly and Hinton, arXiv 1504.00941.", **_RNN
)


# ---- the way to the ops


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
    options: Options = PLAIN,
    training: bool = False,
    reset: Tensor | None = None,
) -> tuple[Tensor, States, tuple[States, ...]]:
    """The layers of a time-major or packed input, unchecked but for lengths: the output, the last states, and if they
    are asked for each layer's states at every step.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, *weights = (_autocast(t, dtype) for t in (x, *weights))
        hx = None if hx is None else [_autocast(s, dtype) for s in hx]
    if lengths is not None:
        lengths = _check_lengths(kind, lengths, x)
    each, directions = len(weights) // num_layers, 2 if bidirectional else 1
    if x.is_cuda:
        projected = (each // directions - options.peephole) % 2 == 1  # weight_hr: those beside it come in pairs
        backend.require_layer(kind.name, x, kind.name, options.num_heads, projected)
    plain = options.plain and reset is None
    none = (None,) * len(kind.states)
    if num_layers == 1 and plain:
        y, *states = layer(kind, x, none if hx is None else hx, weights, batch_sizes, lengths, bidirectional)
        return y, tuple(states), ()
    packed = None
    if batch_sizes is not None and training and options.variational_dropout:
        packed = sequences_of(x, hx, batch_sizes)
    last: list[Sequence[Tensor]] = []
    every: list[States] = []
    for i in range(num_layers):
        if i and dropout:
            x = F.dropout(x, dropout)
        states0 = none if hx is None else [s[i * directions : (i + 1) * directions] for s in hx]
        of_layer = weights[i * each : (i + 1) * each]
        extras = None
        if not plain:
            x, extras = extras_of(kind, options, training, x, of_layer, bidirectional, reset, packed)
        asked = options.memory_efficient, options.return_all_states
        x, *states = layer(kind, x, states0, of_layer, batch_sizes, lengths, bidirectional, extras, *asked)
        last.append(states[: len(kind.states)])
        every.append((x, *states[len(kind.states) :]))
    together = last[0] if num_layers == 1 else (torch.cat(of_state) for of_state in zip(*last))
    return x, tuple(together), tuple(every) if options.return_all_states else ()


def _autocast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t


# ---- checks


def states_of(kind: Kind, hx: Any) -> States | None:
    """hx as the user gave it, as a tuple of tensors."""
    if hx is None:
        return None
    if len(kind.states) == 1:
        if not isinstance(hx, Tensor):
            raise TypeError(f"{kind.name}: hx must be a tensor h0, got {describe(hx)}")
        return (hx,)
    given = isinstance(hx, (tuple, list)) and len(hx) == len(kind.states) and all(isinstance(s, Tensor) for s in hx)
    if not given:
        count = "pair" if len(kind.states) == 2 else "triple"
        names = ", ".join(f"{state}0" for state in kind.states)
        raise TypeError(f"{kind.name}: hx must be a {count} of tensors ({names}), got {describe(hx)}")
    return tuple(hx)


def _kind_of(
    family: Family, options: Options, weights: list[Tensor], hx: Any, num_layers: int, directions: int
) -> tuple[Kind, list[Weight]]:
    """The kind that the options and the number of weights make, and the weights of a layer and direction."""
    kinds = [(family.kind_of(options, projected), projected) for projected in family.projections]
    if isinstance(hx, Tensor):  # of a GRU: it is not projected
        kinds = [k for k in kinds if len(k[0].states) == 1] or kinds
    forms = [
        (kind, kind.weights(bias, projected, options.peephole, options.num_heads > 1))
        for kind, projected in kinds
        for bias in (False, True)
    ]
    for kind, table in forms:
        if num_layers > 0 and len(table) * num_layers * directions == len(weights):
            return kind, table
    least, most = ([w.name for w in table] for _, table in (forms[0], forms[-1]))
    more = [name for name in most if name not in least]
    raise ValueError(
        f"{family.name}: weights must hold {', '.join(least)} and, if there are such, {', '.join(more)} for each of "
        f"{num_layers} layers and {directions} directions, got {len(weights)} tensors"
    )


def _check(
    kind: Kind,
    options: Options,
    table: list[Weight],
    x: Tensor,
    weights: list[Tensor],
    hx: States | None,
    batch_sizes: Tensor | None,
    lengths: Lengths,
    states: int,
    directions: int,
) -> None:
    """Raises what the user should read; the ops check again what could read outside memory."""
    for w in weights:
        if not isinstance(w, Tensor):
            raise TypeError(f"{kind.name}: weights must be tensors, got {describe(w)}")
        check_like(kind.name, "weights", w, x)
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        wanted = "[N, D] with batch_sizes" if packed else "[T, B, D] (or [B, T, D] with batch_first)"
        raise ValueError(f"{kind.name}: input must have shape {wanted}, got {list(x.shape)}")
    P, H = _check_weights(kind, options, table, x.shape[-1], weights, directions)
    for state, given in zip(kind.states, hx or ()):
        name, width, letter = f"{state}0", *((P, "P") if state == "h" else (H, "H"))
        check_like(kind.name, name, given, x)
        B = x.shape[1] if not packed else given.shape[1] if given.dim() == 3 else 0  # packed: checked by the op
        if given.shape != (states, B, width):
            wanted = f"[L * directions, B, {letter}] = {[states, 'B' if packed else B, width]}"
            raise ValueError(f"{kind.name}: {name} must have shape {wanted}, got {list(given.shape)}")
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError(f"{kind.name}: lengths must be absent where batch_sizes is given, got {describe(lengths)}")
        if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise TypeError(f"{kind.name}: batch_sizes must be an int64 tensor on the CPU, got {describe(batch_sizes)}")


def check_like(who: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{who}: {name} must have the dtype of input, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueError(f"{who}: {name} must be on the device of input, {x.device}, got {t.device}")


def _check_weights(
    kind: Kind, options: Options, table: list[Weight], D: int, weights: list[Tensor], directions: int
) -> tuple[int, int]:
    """P and H, of which weight_hh tells."""
    w_hh, gates = weights[1], len(kind.gates)
    projected = "weight_hr" in (w.name for w in table)
    if w_hh.dim() != 2 or w_hh.shape[0] % gates or 0 in w_hh.shape:
        raise ValueError(f"{kind.name}: weight_hh must have shape {table[1]}, got {list(w_hh.shape)}")
    H = w_hh.shape[0] // gates
    P = w_hh.shape[1] if projected else H
    check_together(kind.name, options, H, proj_size=P if projected else 0)
    sizes = {"D": D, "H": H, "P": P, "H/heads": H // options.num_heads}
    shapes = [wanted.sizes(sizes) for wanted in table]
    for i, w in enumerate(weights):
        at = i % len(table)
        if i == len(table) * directions:
            shapes[0] = table[0].sizes(sizes | {"D": directions * P})
        if w.shape != shapes[at]:
            wanted = f"{table[at]} = {list(shapes[at])}"
            raise ValueError(f"{kind.name}: {table[at].name} must have shape {wanted}, got {list(w.shape)}")
    return P, H


def _check_lengths(kind: Kind, lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    T, B = x.shape[:2]
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{kind.name}: lengths must be integers, got {lengths!r}") from error
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) and lengths.numel():
        raise TypeError(f"{kind.name}: lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"{kind.name}: lengths must have shape [B] = [{B}], got {list(lengths.shape)}")
    if not x.is_cuda:
        lengths = lengths.cpu()
    elif lengths.is_cuda:  # nobody waits for the device: kernels take what lies outside [0, T] as the nearest within
        return lengths.to(x.device, torch.int64)
    lengths = lengths.to(torch.int64)
    traced = torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(lengths)
    if B and not traced:  # else the op looks at its values
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise ValueError(f"{kind.name}: lengths must lie in [0, T] = [0, {T}], got {low if low < 0 else high}")
    if not x.is_cuda:
        return lengths
    # Nobody waits for a copy from pinned memory either.
    return lengths.to(x.device) if traced else lengths.pin_memory().to(x.device, non_blocking=True)


def check_reset(who: str, reset: Any, input: Tensor) -> None:
    """As the user gave both."""
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        raise TypeError(f"{who}: reset must be a bool tensor, got {describe(reset)}")
    if reset.shape != input.shape[:-1]:
        wanted = f"{list(input.shape[:-1])}, that of input but for its last dimension"
        raise ValueError(f"{who}: reset must have shape {wanted}, got {list(reset.shape)}")
    if reset.device != input.device:
        raise ValueError(f"{who}: reset must be on the device of input, {input.device}, got {reset.device}")


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}, {value.dtype}, on {value.device}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of ({', '.join(type(v).__name__ for v in value)})"
    return type(value).__name__
