"""Reference definition of recurrent layers in plain torch.

A kind has a cell, a function that computes the states of one step. All kinds share the time loop in `layer`. Masks are
arguments; only the dropout between layers is random.

Dimensions: B batch, T time, N packed rows, D input, H hidden, P size of h (the projection size, or H), G gates,
L layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]  # (h,), (h, c) or (h, c, s)
Weights = dict[str, Tensor]  # weights of one direction, by the names of `weight_names`; biases are optional


# ---- elements of cells


def product(h: Tensor, w: Tensor, heads: int = 1) -> Tensor:
    """h W^T. With heads, w [G * H, H / heads] is block-diagonal: a unit depends on the h of its own head."""
    if heads == 1:
        return F.linear(h, w)
    group = h.shape[1] // heads
    gates = w.shape[0] // h.shape[1]
    by_head = w.reshape(gates, heads, group, group)
    of_heads = [F.linear(h[:, k * group : (k + 1) * group], by_head[:, k].flatten(0, 1)) for k in range(heads)]
    return torch.stack([v.unflatten(1, (gates, group)) for v in of_heads], dim=2).flatten(1)


def norm(v: Tensor, eps: float = 1e-5) -> Tensor:
    """Ba, Kiros and Hinton, "Layer Normalization", arXiv 1607.06450."""
    mean = v.mean(-1, keepdim=True)
    return (v - mean) / torch.sqrt((v - mean).square().mean(-1, keepdim=True) + eps)


def clip(v: Tensor, limit: float) -> Tensor:
    """Clips v to [-limit, limit]; the gradient is zero at and beyond the limits."""
    return v if limit == math.inf else torch.where(v.abs() < limit, v, v.sign() * limit)


def zoneout(new: Tensor, old: Tensor, k: Tensor | float | None) -> Tensor:
    """(1 - k) new + k old. Source: Krueger et al., "Zoneout", arXiv 1606.01305."""
    return new if k is None else new + k * (old - new)


@dataclasses.dataclass(frozen=True)
class Step:
    """Inputs of a cell: B sequences at one step."""

    x: Tensor  # [B, G * H] input projection: x W_ih^T + b_ih, or its normalised form
    h: Tensor  # [B, P] input of the recurrent projection: h, multiplied by the variational mask if there is one
    states: States  # states before the step
    weights: Weights
    kind: Kind
    heads: int = 1
    gate_clip: float = math.inf
    cell_clip: float = math.inf
    keep: Tensor | None = None  # [B, H] mask of the candidate, divided by 1 - p
    norm_eps: float = 1e-5

    def recurrent(self, h: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Recurrent projection of the gates from `first` up to `last`; by default, of all gates."""
        H = self.weights["w_hh"].shape[0] // self.kind.gates
        rows = slice(first * H, None if last is None else last * H)
        v = product(h, self.weights["w_hh"][rows], self.heads)
        return self.kind.affine(v, self.weights, "hh", rows, self.norm_eps)

    def sigmoid(self, v: Tensor) -> Tensor:
        return torch.sigmoid(clip(v, self.gate_clip))

    def tanh(self, v: Tensor) -> Tensor:
        return torch.tanh(clip(v, self.gate_clip))

    def candidate(self, v: Tensor) -> Tensor:
        """tanh with recurrent dropout. Source: Semeniuta, Severyn and Barth, 2016, arXiv 1603.05118."""
        return self.tanh(v) if self.keep is None else self.tanh(v) * self.keep

    def peephole(self, v: Tensor, at: int, c: Tensor) -> Tensor:
        """Adds peephole `at` of w_ph to v. Source: Gers and Schmidhuber, "Recurrent nets that time and count", 2000."""
        w_ph, H = self.weights.get("w_ph"), c.shape[-1]
        return v if w_ph is None else v + w_ph[at * H : (at + 1) * H] * c


Cell = Callable[[Step], States]  # computes the new states; h before the projection


@dataclasses.dataclass(frozen=True)
class Kind:
    """A recurrent cell and the properties of its layers."""

    cell: Cell
    gates: int
    states: int = 1
    norms: tuple[int, ...] = ()  # number of gates of each normalisation
    own_weights: tuple[str, ...] = ()
    own_biases: tuple[str, ...] = ()

    def affine(self, v: Tensor, weights: Weights, of: str, rows: slice = slice(None), norm_eps: float = 1e-5) -> Tensor:
        """Normalises v [..., G * H], a product with w_ih or w_hh, and adds the bias. `of`: ih or hh."""
        if self.norms:
            H = v.shape[-1] // self.gates
            parts = v.split([gates * H for gates in self.norms], dim=-1)
            v = weights[f"gain_{of}"] * torch.cat([norm(part, norm_eps) for part in parts], dim=-1)
        bias = weights.get(f"b_{of}")
        return v if bias is None else v + bias[rows]


# ---- cells


def lstm_cell(s: Step) -> States:
    """Source: Hochreiter and Schmidhuber, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000."""
    i, f, g, o = (s.x + s.recurrent(s.h)).chunk(4, dim=-1)
    c = s.states[1]
    i, f = s.sigmoid(s.peephole(i, 0, c)), s.sigmoid(s.peephole(f, 1, c))
    c = clip(f * c + i * s.candidate(g), s.cell_clip)
    return s.sigmoid(s.peephole(o, 2, c)) * torch.tanh(c), c


def lstm_coupled_cell(s: Step) -> States:
    """The forget gate is 1 - i. Source: Greff et al., "LSTM: A Search Space Odyssey", arXiv 1503.04069 (CIFG)."""
    i, g, o = (s.x + s.recurrent(s.h)).chunk(3, dim=-1)
    c = s.states[1]
    i = s.sigmoid(s.peephole(i, 0, c))
    c = clip((1 - i) * c + i * s.candidate(g), s.cell_clip)
    return s.sigmoid(s.peephole(o, 1, c)) * torch.tanh(c), c


def lstm_norm_cell(s: Step) -> States:
    """The state c is not normalised. Source: Ba, Kiros and Hinton, arXiv 1607.06450, equations 20 to 22."""
    i, f, g, o = (s.x + s.recurrent(s.h)).chunk(4, dim=-1)
    c = clip(s.sigmoid(f) * s.states[1] + s.sigmoid(i) * s.candidate(g), s.cell_clip)
    return s.sigmoid(o) * torch.tanh(s.weights["gain_c"] * norm(c, s.norm_eps) + s.weights["bias_c"]), c


def nested_lstm_cell(s: Step) -> States:
    """c is the output of an inner LSTM with cell s. Source: Moniz and Krueger, 2017, arXiv 1801.10308."""
    i, f, g, o = (s.x + s.recurrent(s.h)).chunk(4, dim=-1)
    _, c, inner = s.states
    w = s.weights
    from_new = F.linear(s.sigmoid(i) * s.candidate(g), w["inner_ih"], w.get("inner_b_ih"))
    from_old = F.linear(s.sigmoid(f) * c, w["inner_hh"], w.get("inner_b_hh"))
    inner_i, inner_f, inner_g, inner_o = (from_new + from_old).chunk(4, dim=-1)
    inner = torch.sigmoid(inner_f) * inner + torch.sigmoid(inner_i) * torch.tanh(inner_g)
    c = torch.sigmoid(inner_o) * torch.tanh(inner)
    return s.sigmoid(o) * torch.tanh(c), c, inner


def slstm_cell(s: Step) -> States:
    """Scalar LSTM of xLSTM, with normaliser n and stabiliser m. Source: Beck et al., arXiv 2405.04517."""
    i, f, z, o = (s.x + s.recurrent(s.h)).chunk(4, dim=-1)
    return _slstm(s, i, F.logsigmoid(f), z, o)


def slstm_exp_cell(s: Step) -> States:
    """sLSTM with an exponential forget gate."""
    return _slstm(s, *(s.x + s.recurrent(s.h)).chunk(4, dim=-1))


def _slstm(s: Step, i: Tensor, log_f: Tensor, z: Tensor, o: Tensor) -> States:
    _, c, n, m = s.states
    decayed = log_f + m
    m = torch.where((n == 0) | (i >= decayed), i, decayed)
    f = torch.exp(torch.where(n == 0, (decayed - m).clamp(max=0), decayed - m))  # at most 1 for n = 0
    i = torch.exp(i - m)
    z = torch.tanh(z) if s.keep is None else torch.tanh(z) * s.keep
    c, n = f * c + i * z, f * n + i
    return torch.sigmoid(o) * (c / n), c, n, m


def gru_cell(s: Step) -> States:
    """Reset gate after the recurrent projection, as in torch.nn.GRU. Source: Cho et al., 2014."""
    x_r, x_z, x_n = s.x.chunk(3, dim=-1)
    h_r, h_z, h_n = s.recurrent(s.h).chunk(3, dim=-1)
    r, z = s.sigmoid(x_r + h_r), s.sigmoid(x_z + h_z)
    return ((1 - z) * s.candidate(x_n + r * h_n) + z * s.states[-1],)


def gru_before_cell(s: Step) -> States:
    """Reset gate before the recurrent projection. Source: Cho et al., 2014, arXiv 1406.1078."""
    x_r, x_z, x_n = s.x.chunk(3, dim=-1)
    h_r, h_z = s.recurrent(s.h, 0, 2).chunk(2, dim=-1)
    r, z = s.sigmoid(x_r + h_r), s.sigmoid(x_z + h_z)
    return ((1 - z) * s.candidate(x_n + s.recurrent(r * s.h, 2, 3)) + z * s.states[0],)


def gru_projected_cell(s: Step) -> States:
    """GRU with state c, whose recurrent projection is that of h = w_hr c; `layer` computes h."""
    (c,) = gru_cell(s)
    return c, c


def dreamer_gru_cell(s: Step) -> States:
    """GRU with one layer normalisation of the sum of both projections. Source: Hafner et al., arXiv 2010.02193; heads:
    arXiv 2301.04104."""
    v = norm(s.x + s.recurrent(s.h), s.norm_eps) * s.weights["norm_weight"] + s.weights["norm_bias"]
    r, n, u = v.chunk(3, dim=-1)
    n, u = s.candidate(s.sigmoid(r) * n), s.sigmoid(u - 1)
    return (u * n + (1 - u) * s.states[0],)


def mgu_after_cell(s: Step) -> States:
    """One gate, after the recurrent projection, as in torch.nn.GRU. Source: Zhou et al., 2016, arXiv 1603.09420."""
    x_f, x_n = s.x.chunk(2, dim=-1)
    h_f, h_n = s.recurrent(s.h).chunk(2, dim=-1)
    f = s.sigmoid(x_f + h_f)
    return ((1 - f) * s.states[0] + f * s.candidate(x_n + f * h_n),)


def mgu_cell(s: Step) -> States:
    """One gate, before the recurrent projection. Source: Zhou et al., 2016, arXiv 1603.09420."""
    x_f, x_n = s.x.chunk(2, dim=-1)
    f = s.sigmoid(x_f + s.recurrent(s.h, 0, 1))
    return ((1 - f) * s.states[0] + f * s.candidate(x_n + s.recurrent(f * s.h, 1, 2)),)


def rnn_tanh_cell(s: Step) -> States:
    """Source: Elman, "Finding Structure in Time", 1990."""
    return (s.tanh(s.x + s.recurrent(s.h)),)


def rnn_relu_cell(s: Step) -> States:
    """Source: Le, Jaitly and Hinton, 2015."""
    return (torch.relu(clip(s.x + s.recurrent(s.h), s.gate_clip)),)


_INNER = ("inner_ih", "inner_hh"), ("inner_b_ih", "inner_b_hh")
KINDS = {
    "lstm": Kind(lstm_cell, 4, 2),
    "lstm_coupled": Kind(lstm_coupled_cell, 3, 2),
    "lstm_norm": Kind(lstm_norm_cell, 4, 2, (4,), ("gain_ih", "gain_hh", "gain_c", "bias_c")),
    "nested_lstm": Kind(nested_lstm_cell, 4, 3, (), *_INNER),
    "slstm": Kind(slstm_cell, 4, 4),
    "slstm_exp": Kind(slstm_exp_cell, 4, 4),
    "gru": Kind(gru_cell, 3),
    "gru_before": Kind(gru_before_cell, 3),
    "gru_norm": Kind(gru_cell, 3, 1, (2, 1), ("gain_ih", "gain_hh")),
    "gru_projected": Kind(gru_projected_cell, 3, 2),
    "dreamer_gru": Kind(dreamer_gru_cell, 3, own_weights=("norm_weight", "norm_bias")),
    "mgu": Kind(mgu_cell, 2),
    "mgu_after": Kind(mgu_after_cell, 2),
    "rnn_tanh": Kind(rnn_tanh_cell, 1),
    "rnn_relu": Kind(rnn_relu_cell, 1),
}


# ---- one layer


def weight_names(kind: Kind, bias: bool, projected: bool, peephole: bool = False) -> list[str]:
    """Names of the weights of one direction, in order."""
    names = ["w_ih", "w_hh", *["b_ih", "b_hh"] * bias, *["w_hr"] * projected, *["w_ph"] * peephole]
    return [*names, *kind.own_weights, *kind.own_biases * bias]


def weight_names_of(kind: Kind, count: int, peephole: bool = False) -> list[str]:
    """Names of the `count` weights of one direction; biases and the projection are optional."""
    for bias in (False, True):
        for projected in (False, True):
            names = weight_names(kind, bias, projected, peephole)
            if len(names) == count:
                return names
    raise ValueError(f"reference: weights must be those of the kind, got {count} in a direction")


def valid_steps(T: int, B: int, batch_sizes: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[T, B] whether sequence b has step t. In row-major order, the True entries are the packed rows."""
    if batch_sizes is not None:
        return torch.arange(B, device=device) < batch_sizes.to(device).unsqueeze(1)
    if lengths is not None:
        return torch.arange(T, device=device).unsqueeze(1) < lengths.to(device)
    return torch.ones(T, B, dtype=torch.bool, device=device)


def layer(
    kind_name: str,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    bidirectional: bool = False,
    *,
    bias: bool | None = None,
    projected: bool | None = None,
    peephole: bool = False,
    heads: int = 1,
    reset: Tensor | None = None,
    zoneout_h: Tensor | None = None,
    zoneout_c: Tensor | None = None,
    candidate: Tensor | None = None,
    variational: Tensor | None = None,
    numbers: Sequence[float] = (),
) -> tuple[Tensor, ...]:
    """Runs one layer.

    Args:
        kind_name: one of KINDS.
        x: [T, B, D], or [N, D] with batch_sizes.
        states0: h0 [directions, B, P] and the other states of the kind, such as c0 [directions, B, H]; None for zeros.
        weights: for each direction w_ih [G * H, D], w_hh [G * H, P / heads], optionally b_ih and b_hh [G * H],
            optionally w_hr [P, H], with peephole w_ph (weight_ph) [3H], or [2H] for a coupled LSTM, then the weights
            of the kind.
        batch_sizes: [T] as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] number of valid steps of each sequence of a padded batch.
        bias, projected: whether there are biases and a projection; None derives both from the number of weights.
        reset: [T, B] or [N]; True starts a new sequence: no state passes from the preceding step, in both directions.
        zoneout_h, zoneout_c: [T, B, directions * H] or [N, ...]; 1 keeps the previous value of the state.
        candidate: the same shape; 0 zeroes the candidate (recurrent dropout).
        variational: [directions, B, P] factors of h in the recurrent projection, the same at all steps.
        numbers: empty, or cell_clip, gate_clip, the weights of the previous h and c without masks, the probability of 0
            in `candidate`, and the term added to the variance in normalisations.
    Returns:
        y [T, B, directions * P] (or [N, ...]), zero beyond each length; the last states, like states0; the other states
        of the kind, such as c, at all steps, in the layout of y.
    """
    kind = KINDS[kind_name]
    directions = 2 if bidirectional else 1
    each = len(weights) // directions
    if bias is None or projected is None:
        names = weight_names_of(kind, each, peephole)
    else:
        names = weight_names(kind, bias, projected, peephole)
    cell_clip, gate_clip, constant_h, constant_c, p, eps = numbers or (math.inf, math.inf, 0.0, 0.0, 0.0, 1e-5)
    if batch_sizes is not None:
        T, B = batch_sizes.numel(), int(batch_sizes[0]) if batch_sizes.numel() else 0
    else:
        T, B = x.shape[0], x.shape[1]
    valid = valid_steps(T, B, batch_sizes, lengths, x.device)

    def padded(v: Tensor) -> Tensor:
        """Converts to [T, B, ...] with zeros beyond each length."""
        if batch_sizes is not None:
            return v.new_zeros(T, B, *v.shape[1:]).index_put((valid,), v)
        return torch.where(valid.view(T, B, *[1] * (v.dim() - 2)), v, v.new_zeros(()))

    def each_step(mask: Tensor | None, d: int, default: float | None = None) -> Sequence[Any]:
        """Steps of a mask in one direction, or the default without a mask.

        Unbinds once, because indexing step by step makes backward quadratic in T.
        """
        if mask is None:
            return [default or None] * T
        return padded(mask.to(x.dtype)).chunk(directions, dim=-1)[d].unbind(0)

    x = padded(x)
    no_restart = torch.zeros(1, B, 1, dtype=torch.bool, device=x.device)
    restarts = None if reset is None else padded(reset).unsqueeze(-1)
    outputs: list[list[Tensor]] = []
    last: list[States] = []
    for d in range(directions):
        w = dict(zip(names, weights[d * each : (d + 1) * each], strict=True))
        P, H = w["w_hh"].shape[1] * heads, w["w_hh"].shape[0] // kind.gates
        widths = P, *[H] * (kind.states - 1)
        states = tuple(x.new_zeros(B, width) if s is None else s[d] for s, width in zip(states0, widths))
        from_x = kind.affine(F.linear(x, w["w_ih"]), w, "ih", norm_eps=eps)
        of_x = from_x.unbind(0)
        keep = each_step(None if candidate is None else candidate.to(x.dtype) / (1 - p), d)
        zones = [each_step(zoneout_h, d, constant_h), each_step(zoneout_c, d, constant_c)]
        zones += [[None] * T] * (kind.states - 2)
        if restarts is not None:  # in the reverse direction, a sequence ends before the first step of the next one
            before = restarts if d == 0 else torch.cat((restarts[1:], no_restart))[:T]
        steps: list[States] = [()] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            alive = valid[t].unsqueeze(-1)
            if restarts is not None:
                states = tuple(torch.where(before[t], s.new_zeros(()), s) for s in states)
            h = states[0] if variational is None else states[0] * variational[d]
            h, *others = kind.cell(Step(of_x[t], h, states, w, kind, heads, gate_clip, cell_clip, keep[t], eps))
            if "w_hr" in w:  # Sak, Senior and Beaufays, 2014, arXiv 1402.1128
                h = F.linear(h, w["w_hr"])
            new = tuple(zoneout(v, old, zone[t]) for v, old, zone in zip((h, *others), states, zones))
            steps[t] = tuple(torch.where(alive, v, v.new_zeros(())) for v in new)
            states = tuple(torch.where(alive, v, old) for v, old in zip(new, states))
        outputs.append([torch.stack(s) for s in zip(*steps)] if T else [from_x[..., :width] for width in widths])
        last.append(states)
    all_states = [torch.cat(of_state, dim=-1) for of_state in zip(*outputs)]
    if batch_sizes is not None:
        all_states = [s[valid] for s in all_states]
    return all_states[0], *(torch.stack(of_state) for of_state in zip(*last)), *all_states[1:]


# ---- stacked layers: the public functions


def stack(
    kind_name: str,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Sequence[Tensor] | None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    reset: Tensor | None = None,
    masks: Sequence[Mapping[str, Tensor]] | None = None,
    **options: Any,
) -> tuple[Tensor, States, tuple[States, ...]]:
    """Runs stacked layers. Returns the output, the last states, and the states of each layer at all steps.

    Args:
        input, reset: time-major unless batch_first.
        masks: for each layer, the masks of `layer` by name, always time-major, and `input`, factors of the input of
            the layer (Gal and Ghahramani, 2016, arXiv 1512.05287).
        options: options of `layer`.
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // num_layers
    transposed = batch_first and batch_sizes is None
    y = input.transpose(0, 1) if transposed else input
    if transposed and reset is not None:
        reset = reset.transpose(0, 1)
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
    count = KINDS[kind_name].states
    last: list[Sequence[Tensor]] = []
    every: list[States] = []
    for i in range(num_layers):
        at = slice(i * directions, (i + 1) * directions)
        states0 = [None] * count if hx is None else [s[at] for s in hx]
        if i:
            y = F.dropout(y, dropout, training)
        of_layer: dict[str, Any] = dict(masks[i]) if masks is not None else {}
        if "input" in of_layer:
            y = y * of_layer.pop("input")
        own = weights[i * each : (i + 1) * each]
        y, *states = layer(
            kind_name, y, states0, own, batch_sizes, lengths, bidirectional, reset=reset, **of_layer, **options
        )
        last.append(states[:count])
        every.append((y, *states[count:]))
    if transposed:
        y, every = y.transpose(0, 1), [tuple(s.transpose(0, 1) for s in states) for states in every]
    return y, tuple(torch.cat(of_state) for of_state in zip(*last)), tuple(every)


class Definition(Protocol):
    """Signature of the definitions of all layers. They raise TypeError for options that a layer does not have."""

    def __call__(
        self,
        input: Tensor,
        hx: Tensor | States | None,
        weights: Sequence[Tensor],
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
        reset: Tensor | None = None,
        masks: Sequence[Mapping[str, Tensor]] | None = None,
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        norm_eps: float = ...,
        reset_after: bool | None = None,
        forget_gate: str = "sigmoid",
        cell_clip: float | None = None,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        num_heads: int = 1,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]: ...


def _function(name: str, choose: Callable[..., str], supported: str, norm_eps: float = 1e-5) -> Definition:
    default_eps, own = norm_eps, supported.split()

    def function(
        input: Tensor,
        hx: Tensor | States | None,
        weights: Sequence[Tensor],
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
        reset: Tensor | None = None,
        masks: Sequence[Mapping[str, Tensor]] | None = None,
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        norm_eps: float = default_eps,
        reset_after: bool | None = None,
        forget_gate: str = "sigmoid",
        cell_clip: float | None = None,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        num_heads: int = 1,
        return_all_states: bool = False,
    ) -> tuple[Any, ...]:
        for option, value, default in (
            ("peephole", peephole, False),
            ("coupled_gates", coupled_gates, False),
            ("layer_norm", layer_norm, False),
            ("norm_eps", norm_eps, default_eps),
            ("reset_after", reset_after, None),
            ("forget_gate", forget_gate, "sigmoid"),
            ("cell_clip", cell_clip, None),
            ("gate_clip", gate_clip, None),
            ("zoneout_c", zoneout_c, 0.0),
            ("recurrent_dropout", recurrent_dropout, 0.0),
            ("num_heads", num_heads, 1),
        ):
            if value != default and option not in own:
                raise TypeError(f"{name}: {option} must be absent, which {name} does not have, got {value!r}")
        each = len(weights) // (num_layers * (2 if bidirectional else 1))
        kind_name = choose(
            coupled_gates=coupled_gates,
            layer_norm=layer_norm,
            reset_after=reset_after,
            forget_gate=forget_gate,
            each=each,
        )
        limits = (math.inf if limit is None else limit for limit in (cell_clip, gate_clip))
        y, states, every = stack(
            *(kind_name, input, weights, (hx,) if isinstance(hx, Tensor) else hx),
            batch_sizes=batch_sizes,
            lengths=lengths,
            num_layers=num_layers,
            bidirectional=bidirectional,
            batch_first=batch_first,
            dropout=dropout,
            training=training,
            reset=reset,
            masks=masks,
            peephole=peephole,
            heads=num_heads,
            numbers=(*limits, zoneout_h, zoneout_c, recurrent_dropout, norm_eps),
        )
        last = states if len(states) > 1 else states[0]
        return (y, last, every) if return_all_states else (y, last)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"""Definition of `seqkernels.functional.{name}`.

    Args: as there, with given masks: see `stack`. The rates of zoneout are the weights of the previous values without
        masks; the rate of recurrent dropout only applies with a mask.
    Returns:
        output, the last states (a tensor for a single state) and, with return_all_states, a tuple of the states at all
        steps for each layer.
    """
    return function


def _lstm(coupled_gates: bool, layer_norm: bool, **_: Any) -> str:
    return "lstm_coupled" if coupled_gates else "lstm_norm" if layer_norm else "lstm"


def _gru(layer_norm: bool, reset_after: bool | None, each: int, **_: Any) -> str:
    if each in (3, 5):
        return "gru_projected"
    return "gru_norm" if layer_norm else "gru_before" if reset_after is False else "gru"


_GATED = "gate_clip recurrent_dropout num_heads"
lstm = _function("lstm", _lstm, f"peephole coupled_gates layer_norm norm_eps cell_clip zoneout_c {_GATED}")
nested_lstm = _function("nested_lstm", lambda **_: "nested_lstm", "recurrent_dropout")
slstm = _function(
    "slstm",
    lambda forget_gate, **_: "slstm_exp" if forget_gate == "exp" else "slstm",
    "forget_gate recurrent_dropout num_heads",
)
gru = _function("gru", _gru, f"reset_after layer_norm norm_eps {_GATED}")
dreamer_gru = _function("dreamer_gru", lambda **_: "dreamer_gru", f"norm_eps {_GATED}", norm_eps=1e-3)
mgu = _function("mgu", lambda reset_after, **_: "mgu_after" if reset_after else "mgu", f"reset_after {_GATED}")
rnn_tanh = _function("rnn_tanh", lambda **_: "rnn_tanh", "gate_clip num_heads")
rnn_relu = _function("rnn_relu", lambda **_: "rnn_relu", "gate_clip num_heads")
