"""Functional forms of recurrent layers: argument checks and calls of the ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend as backends
from . import _recurrent_kinds as families
from ._autograd import autocast, autocast_dtype
from ._checks import TypeRuntimeError, ValueRuntimeError, describe, of_op
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function,
    has_torch_function_variadic,
    refuse_nested,
)
from ._recurrent_extras import extras_of, sequences_of
from ._recurrent_kinds import Family, Kind, Weight, size_of_state
from ._recurrent_ops import TRITON_KINDS, layer
from ._recurrent_options import (
    OF_MODULES,
    Options,
    about,
    check_together,
    options_of,
    wrapped,
)
from ._values import may_read_values

States = tuple[Tensor, ...]
Lengths = Tensor | Sequence[int] | None
Output = tuple[Any, ...]  # output, last states[, states at all steps]
PLAIN = Options()


# ---- public functions

_DOC = """{title}, for dense, padded or packed sequences; padding is skipped.

    Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P {h_size}, L layers.

    Args:
        input: [T, B, D], or [B, T, D] with batch_first, or [N, D] with batch_sizes; float32, float64, bfloat16 or
            float16 (half types compute in float32); gradient: yes.
        hx: {hx}; zeros if None. Gradient: yes.
        weights: for each layer and direction, in this order: weight_ih [{rows}, D], weight_hh [{rows}, P], then \
optionally bias_ih and bias_hh [{rows}]{more_weights}. {gates}Gradient: yes.
        batch_sizes: [T] int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] integers in [0, T], in any order, on any device: number of valid steps of each sequence of a padded
            input. Padding is not read. If lengths and input are on a CUDA device, the values are clamped to [0, T]
            without a check. Lengths on the host are checked and copied to the device without synchronization; a CUDA
            graph requires lengths on the device.
        num_layers, bidirectional, batch_first: as in torch.nn.
        dropout: in training, probability of zeroing an element of the output of each layer except the last.
        training: whether dropout, zoneout and recurrent_dropout draw random masks.
        reset: bool, [T, B] ([B, T] with batch_first) or [N] with batch_sizes: True sets the states to zero before the
            step, where a new sequence starts. In the reverse direction, the sequence ends there. No gradient passes a
            reset.
        backend: "cpu", "cuda" or "triton"; None selects one, see seqkernels.explain.
    Options:
        {options}
    Returns:
        output: [T, B, directions * P], or in the layout of input; zero beyond each length.
        {states}: shaped like hx, at the last step of each sequence; hx for a length of zero.
        With return_all_states, the states at all steps.
    Raises:
        ValueError: invalid shape, length, number of weights or option, or options that exclude each other.
        TypeError: invalid dtype, or hx or weights that are not tensors.
        NotImplementedError: no implementation supports the inputs; the message lists the reasons.
    Equivalent to: {equivalent}seqkernels.reference.{name} defines it.
    Deterministic: yes, except for random masks. The output, the states and the gradients of input and hx of a sequence
        have the same bits for any batch, padding and number of threads; all gradients have the same bits in repeated
        runs.
    Source: {source}
    """


F_ = TypeVar("F_", bound=Callable[..., Any])


def _documented(family: Family, **text: str) -> Callable[[F_], F_]:
    """Decorator that sets the docstring of a function of the family."""
    supported = tuple(name for name in family.supported if name not in OF_MODULES)

    def document(function: F_) -> F_:
        function.__doc__ = wrapped(_DOC.format(name=family.name, options=about(family.plain, supported), **text))
        return function

    return document


@_documented(
    families.LSTM,
    title="Long short-term memory",
    rows="4H",
    h_size="the projection size or H",
    more_weights=", then weight_hr [P, H] if there is a projection, then those of the options",
    gates="Gates are i, f, g, o (i, g, o with coupled_gates). ",
    hx="h0 [L * directions, B, P] and c0 [L * directions, B, H]",
    states="(h_n, c_n)",
    equivalent="torch.nn.LSTM, without options; ",
    source='Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Gers, Schmidhuber and Cummins, 2000.',
)
def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    peephole: bool = False,
    coupled_gates: bool = False,
    layer_norm: bool = False,
    norm_eps: float = 1e-5,
    cell_clip: float | None = None,
    gate_clip: float | None = None,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        peephole=peephole,
        coupled_gates=coupled_gates,
        layer_norm=layer_norm,
        norm_eps=norm_eps,
        cell_clip=cell_clip,
        gate_clip=gate_clip,
        zoneout_h=zoneout_h,
        zoneout_c=zoneout_c,
        recurrent_dropout=recurrent_dropout,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.LSTM, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.NESTED_LSTM,
    title="Nested LSTM, whose cell is the output of an inner LSTM",
    rows="4H",
    h_size="= H",
    more_weights=", then weight_inner_ih and weight_inner_hh [4H, H], and with biases bias_inner_ih and bias_inner_hh "
    "[4H]",
    gates="Gates are i, f, g, o. ",
    hx="h0, c0 and s0 (the inner cell), each [L * directions, B, H]",
    states="(h_n, c_n, s_n)",
    equivalent="",
    source='Moniz and Krueger, "Nested LSTMs", arXiv 1801.10308.',
)
def nested_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    zoneout_h: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        zoneout_h=zoneout_h,
        recurrent_dropout=recurrent_dropout,
        variational_dropout=variational_dropout,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.NESTED_LSTM, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.SLSTM,
    title="sLSTM, the scalar LSTM of xLSTM, with exponential gates",
    rows="4H",
    h_size="= H",
    more_weights="",
    gates="Gates are i, f, z, o. ",
    hx="h0, c0, n0 (normaliser) and m0 (stabiliser), each [L * directions, B, H]",
    states="(h_n, c_n, n_n, m_n)",
    equivalent="",
    source="Beck et al., arXiv 2405.04517; as a recurrent layer: Poeppel, Beck and Hochreiter, arXiv 2412.07752.",
)
def slstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    forget_gate: str = "sigmoid",
    zoneout_h: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        forget_gate=forget_gate,
        zoneout_h=zoneout_h,
        recurrent_dropout=recurrent_dropout,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.SLSTM, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.GRU,
    title="Gated recurrent unit",
    rows="3H",
    h_size="the projection size or H",
    more_weights=", then weight_hr [P, H] if there is a projection, then those of the options",
    gates="Gates are r, z, n. ",
    hx="h0 [L * directions, B, H]; with a projection (h0 [.., P], c0 [.., H])",
    states="h_n (with a projection (h_n, c_n))",
    equivalent="torch.nn.GRU, without options; ",
    source="Cho et al., arXiv 1406.1078. Projection, h = w_hr c: Sak, Senior and Beaufays, arXiv 1402.1128.",
)
def gru(
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    reset_after: bool = True,
    layer_norm: bool = False,
    norm_eps: float = 1e-5,
    gate_clip: float | None = None,
    zoneout_h: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        reset_after=reset_after,
        layer_norm=layer_norm,
        norm_eps=norm_eps,
        gate_clip=gate_clip,
        zoneout_h=zoneout_h,
        recurrent_dropout=recurrent_dropout,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.GRU, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.DREAMER_GRU,
    title="GRU of Dreamer, with one layer normalisation of the sum of both projections",
    rows="3H",
    h_size="= H",
    more_weights=", then norm_weight and norm_bias [3H], which are required",
    gates="Gates are r, n, u. ",
    hx="h0 [L * directions, B, H]",
    states="h_n",
    equivalent="",
    source="Hafner et al., arXiv 2010.02193 (DreamerV2) and arXiv 2301.04104 (DreamerV3: num_heads).",
)
def dreamer_gru(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    norm_eps: float = 1e-3,
    gate_clip: float | None = None,
    zoneout_h: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        norm_eps=norm_eps,
        gate_clip=gate_clip,
        zoneout_h=zoneout_h,
        recurrent_dropout=recurrent_dropout,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.DREAMER_GRU, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.MGU,
    title="Minimal gated unit",
    rows="2H",
    h_size="= H",
    more_weights="",
    gates="Gates are f, n. ",
    hx="h0 [L * directions, B, H]",
    states="h_n",
    equivalent="",
    source='Zhou, Wu, Zhang and Zhou, "Minimal Gated Unit for Recurrent Neural Networks", arXiv 1603.09420.',
)
def mgu(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    reset_after: bool = False,
    gate_clip: float | None = None,
    zoneout_h: float = 0.0,
    recurrent_dropout: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        reset_after=reset_after,
        gate_clip=gate_clip,
        zoneout_h=zoneout_h,
        recurrent_dropout=recurrent_dropout,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.MGU, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.RNN_TANH,
    title="Elman network, tanh",
    source='Elman, "Finding Structure in Time", 1990.',
    rows="H",
    h_size="= H",
    more_weights="",
    gates="",
    hx="h0 [L * directions, B, H]",
    states="h_n",
    equivalent="torch.nn.RNN, without options; ",
)
def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    gate_clip: float | None = None,
    zoneout_h: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        gate_clip=gate_clip,
        zoneout_h=zoneout_h,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.RNN_TANH, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


@_documented(
    families.RNN_RELU,
    title="Elman network, relu",
    source="Le, Jaitly and Hinton, arXiv 1504.00941.",
    rows="H",
    h_size="= H",
    more_weights="",
    gates="",
    hx="h0 [L * directions, B, H]",
    states="h_n",
    equivalent="torch.nn.RNN, without options; ",
)
def rnn_relu(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    batch_sizes: Tensor | None = None,
    lengths: Lengths = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    backend: str | None = None,
    gate_clip: float | None = None,
    zoneout_h: float = 0.0,
    variational_dropout: float = 0.0,
    num_heads: int = 1,
    return_all_states: bool = False,
    memory_efficient: bool = False,
) -> Output:
    options = dict(
        gate_clip=gate_clip,
        zoneout_h=zoneout_h,
        variational_dropout=variational_dropout,
        num_heads=num_heads,
        return_all_states=return_all_states,
        memory_efficient=memory_efficient,
    )
    return _run(
        families.RNN_RELU, input, hx, weights, batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout,
        training, reset, backend, options,
    )  # fmt: skip


# ---- calls of the ops


def _run(
    family: Family,
    input: Tensor,
    hx: Any,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Lengths,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    reset: Tensor | None,
    backend: str | None,
    given: Mapping[str, Any],
) -> Output:
    caller = family.name
    overridden = has_torch_function_variadic(input, hx) or has_torch_function(_sequence(hx))
    if overridden or has_torch_function(_sequence(weights)):
        tensors = input, *_sequence(hx), *_sequence(weights)
        overridden = dispatches(*tensors)
    if overridden:
        public = globals()[caller]
        result: Output = handle_torch_function(
            public, tensors, input, hx, weights, batch_sizes=batch_sizes, lengths=lengths, num_layers=num_layers,
            bidirectional=bidirectional, batch_first=batch_first, dropout=dropout, training=training, reset=reset,
            backend=backend, **given,
        )  # fmt: skip
        return result
    refuse_nested(caller, "use lengths, or the values() and batch_sizes", input=input)
    if not isinstance(input, Tensor):
        raise TypeError(f"{caller}: input must be a tensor, got {type(input).__name__}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"{caller}: dropout must lie in [0, 1], got {dropout}")
    options = options_of(caller, family.plain, given)
    check_together(caller, options)
    if weights is None or isinstance(weights, Tensor):
        raise TypeError(f"{caller}: weights must be a sequence of tensors, got {describe(weights)}")
    weights = list(weights)
    directions = 2 if bidirectional else 1
    kind, bias, projected = _kind_of(family, options, weights, hx, num_layers, directions)
    table = _weights(kind, options, bias, projected)
    kind = chosen(caller, kind, input, options.num_heads, projected, backend)
    states0 = states_of(caller, kind, hx)
    transposed = batch_first and batch_sizes is None and input.dim() == 3
    x = input.transpose(0, 1) if transposed else input
    check(caller, kind, options, table, x, weights, states0, batch_sizes, lengths, num_layers * directions, directions)
    if reset is not None:
        check_reset(caller, reset, input)
        reset = reset.transpose(0, 1) if transposed else reset
    y, states, every = stack(
        caller, kind, x, weights, bias, projected, states0, batch_sizes, lengths, num_layers, bidirectional,
        dropout if training else 0.0, options, training, reset,
    )  # fmt: skip
    if transposed:
        y, every = y.transpose(0, 1), tuple(tuple(s.transpose(0, 1) for s in of_layer) for of_layer in every)
    last = states if len(states) > 1 else states[0]
    return (y, last, every) if options.return_all_states else (y, last)


def _sequence(values: Any) -> Any:
    return values if isinstance(values, (tuple, list)) else (values,)


def chosen(caller: str, kind: Kind, x: Tensor, num_heads: int, projected: bool, backend: str | None = None) -> Kind:
    """The kind with the ops of the implementation that runs a layer or a cell. Raises if none supports it."""
    if backend is None and (x.is_cpu or x.is_meta) and x.dtype in backends.DTYPES:
        return kind  # the first implementation, without the overhead of a request
    request = backends.Request(x.device, x.dtype, (kind, num_heads, projected))
    name = backends.choose(caller, backends.RECURRENT, request, backend, shape=x.shape)
    return TRITON_KINDS[kind.name] if name == "triton" else kind


def stack(
    caller: str,
    kind: Kind,
    x: Tensor,
    weights: list[Tensor],
    bias: bool,
    projected: bool,
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
    """Runs the layers for time-major or packed input. Checks only lengths.

    Returns:
        The output, the last states and, with return_all_states, the states of each layer at all steps.
    """
    dtype = autocast_dtype(x.device)
    if dtype is not None:
        x, *weights = (autocast(t, dtype) for t in (x, *weights))
        hx = None if hx is None else [autocast(s, dtype) for s in hx]
    if lengths is not None:
        lengths = _check_lengths(caller, lengths, x)
    each, directions = len(weights) // num_layers, 2 if bidirectional else 1
    plain = options.plain and reset is None and bias and not projected
    none = (None,) * len(kind.states)
    if num_layers == 1 and plain:
        try:
            y, *states = layer(kind, x, none if hx is None else hx, weights, batch_sizes, lengths, bidirectional)
        except RuntimeError as error:
            raise of_op(caller, error) from None
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
            x, extras = extras_of(kind, options, training, x, of_layer, bias, projected, bidirectional, reset, packed)
        extra_args = options.memory_efficient, options.return_all_states
        try:
            x, *states = layer(kind, x, states0, of_layer, batch_sizes, lengths, bidirectional, extras, *extra_args)
        except RuntimeError as error:
            raise of_op(caller, error) from None
        last.append(states[: len(kind.states)])
        every.append((x, *states[len(kind.states) :]))
    together = last[0] if num_layers == 1 else (torch.cat(of_state) for of_state in zip(*last))
    return x, tuple(together), tuple(every) if options.return_all_states else ()


# ---- checks


def states_of(caller: str, kind: Kind, hx: Any, name: str = "hx") -> States | None:
    """hx as a tuple of tensors. name: of the argument."""
    if hx is None:
        return None
    if len(kind.states) == 1:
        if not isinstance(hx, Tensor):
            raise TypeRuntimeError(f"{caller}: {name} must be a tensor h0, got {describe(hx)}")
        return (hx,)
    given = isinstance(hx, (tuple, list)) and len(hx) == len(kind.states) and all(isinstance(s, Tensor) for s in hx)
    if not given:
        count = {2: "pair", 3: "triple"}.get(len(kind.states), f"tuple of {len(kind.states)}")
        names = ", ".join(kind.initial_states)
        raise TypeRuntimeError(f"{caller}: {name} must be a {count} of tensors ({names}), got {describe(hx)}")
    return tuple(hx)


def _kind_of(
    family: Family, options: Options, weights: list[Tensor], hx: Any, num_layers: int, directions: int
) -> tuple[Kind, bool, bool]:
    """The kind selected by the options and the number of weights, whether there are biases, and whether there is a
    projection. Modules derive these from their arguments.
    """
    kinds = [(family.kind_of(options, projected), projected) for projected in family.projections]
    if isinstance(hx, Tensor):  # a GRU with one state has no projection
        kinds = [k for k in kinds if len(k[0].states) == 1] or kinds
    for kind, projected in kinds:
        for bias in (False, True):
            table = _weights(kind, options, bias, projected)
            if num_layers > 0 and len(table) * num_layers * directions == len(weights):
                return kind, bias, projected
    (kind, projected), (most_kind, most_projected) = kinds[0], kinds[-1]
    least = [w.name for w in _weights(kind, options, False, projected)]
    most = [w.name for w in _weights(most_kind, options, True, most_projected)]
    more = [name for name in most if name not in least]
    raise ValueError(
        f"{family.name}: weights must hold {', '.join(least)} and, optionally, {', '.join(more)} for each of "
        f"{num_layers} layers and {directions} directions, got {len(weights)} tensors"
    )


def _weights(kind: Kind, options: Options, bias: bool, projected: bool) -> list[Weight]:
    return kind.weights(bias, projected, options.peephole, options.num_heads > 1)


def check(
    caller: str,
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
    empty: bool = False,
) -> None:
    """Checks the arguments of the public functions. The ops also check all that could access memory out of bounds.

    empty: whether H may be 0.
    """
    for w in weights:
        if not isinstance(w, Tensor):
            raise TypeError(f"{caller}: weights must be tensors, got {describe(w)}")
        check_like(caller, "weights", w, x)
    packed = batch_sizes is not None
    if x.dim() != (2 if packed else 3):
        wanted = "[N, D] with batch_sizes" if packed else "[T, B, D] (or [B, T, D] with batch_first)"
        raise ValueError(f"{caller}: input must have shape {wanted}, got {list(x.shape)}")
    P, H = _check_weights(caller, kind, options, table, x.shape[-1], weights, directions, empty)
    for state, given in zip(kind.states, hx or ()):
        name, letter = f"{state}0", size_of_state(state)
        width = {"P": P, "H": H}[letter]
        check_like(caller, name, given, x)
        B = x.shape[1] if not packed else given.shape[1] if given.dim() == 3 else 0  # the op checks packed input
        if given.shape != (states, B, width):
            wanted = f"[L * directions, B, {letter}] = {[states, 'B' if packed else B, width]}"
            raise ValueError(f"{caller}: {name} must have shape {wanted}, got {list(given.shape)}")
    if batch_sizes is not None:
        if lengths is not None:
            raise ValueError(f"{caller}: lengths must be None with batch_sizes, got {describe(lengths)}")
        if not isinstance(batch_sizes, Tensor) or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise TypeError(f"{caller}: batch_sizes must be an int64 tensor on the CPU, got {describe(batch_sizes)}")


def check_like(caller: str, name: str, t: Tensor, x: Tensor) -> None:
    if t.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeRuntimeError(f"{caller}: {name} must have the dtype of input, {x.dtype}, got {t.dtype}")
    if t.device != x.device:
        raise ValueRuntimeError(f"{caller}: {name} must be on the device of input, {x.device}, got {t.device}")


def _check_weights(
    caller: str,
    kind: Kind,
    options: Options,
    table: list[Weight],
    D: int,
    weights: list[Tensor],
    directions: int,
    empty: bool,
) -> tuple[int, int]:
    """Checks the weights and returns P and H."""
    w_hh, gates = weights[1], len(kind.gates)
    projected = "weight_hr" in (w.name for w in table)
    if w_hh.dim() != 2 or w_hh.shape[0] % gates or (0 in w_hh.shape and not empty):
        raise ValueRuntimeError(f"{caller}: weight_hh must have shape {table[1]}, got {list(w_hh.shape)}")
    H = w_hh.shape[0] // gates
    P = w_hh.shape[1] if projected else H
    check_together(caller, options, H, proj_size=P if projected else 0)
    sizes = {"D": D, "H": H, "P": P, "H/heads": H // options.num_heads}
    shapes = [wanted.sizes(sizes) for wanted in table]
    for i, w in enumerate(weights):
        at = i % len(table)
        if i == len(table) * directions:
            shapes[0] = table[0].sizes(sizes | {"D": directions * P})
        if w.shape != shapes[at]:
            wanted = f"{table[at]} = {list(shapes[at])}"
            raise ValueRuntimeError(f"{caller}: {table[at].name} must have shape {wanted}, got {list(w.shape)}")
    return P, H


def _check_lengths(caller: str, lengths: Tensor | Sequence[int], x: Tensor) -> Tensor:
    T, B = x.shape[:2]
    if not isinstance(lengths, Tensor):
        try:
            lengths = torch.as_tensor(lengths, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{caller}: lengths must be integers, got {lengths!r}") from error
    if lengths.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8) and lengths.numel():
        raise TypeError(f"{caller}: lengths must be integers, got {lengths.dtype}")
    if lengths.shape != (B,):
        raise ValueError(f"{caller}: lengths must have shape [B] = [{B}], got {list(lengths.shape)}")
    if x.is_meta:
        return lengths.to(x.device, torch.int64)
    if not x.is_cuda:
        lengths = lengths.cpu()
    elif lengths.is_cuda:  # kernels clamp the values to [0, T]
        return lengths.to(x.device, torch.int64)
    lengths = lengths.to(torch.int64)
    traced = not may_read_values(lengths)
    if B and not traced:  # while tracing, the op checks the values
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise ValueError(f"{caller}: lengths must lie in [0, T] = [0, {T}], got {low if low < 0 else high}")
    if not x.is_cuda:
        return lengths
    # A copy from pinned memory does not synchronize.
    return lengths.to(x.device) if traced else lengths.pin_memory().to(x.device, non_blocking=True)


def check_reset(caller: str, reset: Any, input: Tensor) -> None:
    """Checks reset, with reset and input in the layout of the caller."""
    if not isinstance(reset, Tensor) or reset.dtype != torch.bool:
        raise TypeError(f"{caller}: reset must be a bool tensor, got {describe(reset)}")
    if reset.shape != input.shape[:-1]:
        wanted = f"{list(input.shape[:-1])}, that of input without its last dimension"
        raise ValueError(f"{caller}: reset must have shape {wanted}, got {list(reset.shape)}")
    if reset.device != input.device:
        raise ValueError(f"{caller}: reset must be on the device of input, {input.device}, got {reset.device}")
