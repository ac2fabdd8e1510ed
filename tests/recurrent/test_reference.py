"""The definition of the recurrent layers against an independent numpy implementation, step by step.

Dimensions: B batch, T time, D input, H hidden, P size of h (the projection size, or H), G gates.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from seqkernels import reference
from seqkernels.reference import recurrent as definition
from support.cases import one_thread

B, T, D, H, P = 3, 5, 4, 6, 3
RESET_BEFORE = ("gru_before", "mgu")
Array = np.ndarray


@pytest.fixture(autouse=True)
def few_threads(threads: None) -> None:
    torch.set_num_threads(1)


# ---- numpy implementation of all kinds


def sigmoid(v: Array) -> Array:
    return 1 / (1 + np.exp(-v))


def normalised(v: Array, eps: float) -> Array:
    return (v - v.mean()) / np.sqrt(v.var() + eps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one step of one sequence."""

    heads: int = 1
    cell_clip: float = math.inf
    gate_clip: float = math.inf
    keep_h: Array | float = 0.0
    keep_c: Array | float = 0.0
    candidate: Array | float = 1.0  # mask / (1 - p)
    fed: Array | float = 1.0
    norm_eps: float = 1e-5

    def gate(self, v: Array) -> Array:
        return np.clip(v, -self.gate_clip, self.gate_clip)


def recurrent(w: dict[str, Array], h: Array, gate: int, heads: int) -> Array:
    """[H] recurrent projection of one gate; with heads, a unit depends on the h of its own head."""
    result = np.zeros(H)
    group = H // heads
    for unit in range(H):
        seen = h if heads == 1 else h[unit // group * group :][:group]
        result[unit] = w["w_hh"][gate * H + unit] @ seen + (w["b_hh"][gate * H + unit] if "b_hh" in w else 0)
    return result


def gates_of(kind: str, w: dict[str, Array], x: Array, h: Array, o: Options) -> tuple[list[Array], list[Array]]:
    """Input and recurrent projections of each gate; that of a gate that depends on another gate is a placeholder."""
    count = len(w["w_ih"]) // H
    if not kind.endswith("_norm"):
        of_x = w["w_ih"] @ x + w.get("b_ih", 0)
        return np.split(of_x, count), [recurrent(w, h, gate, o.heads) for gate in range(count)]
    ends = [4 * H] if kind == "lstm_norm" else [2 * H, 3 * H]
    shares = []
    for of, v in (("ih", w["w_ih"] @ x), ("hh", w["w_hh"] @ h)):
        v = np.concatenate([normalised(v[a:b], o.norm_eps) for a, b in zip([0, *ends], ends, strict=False)])
        shares.append(np.split(w[f"gain_{of}"] * v + w.get(f"b_{of}", 0), count))
    return shares[0], shares[1]


def step(kind: str, w: dict[str, Array], x: Array, states: list[Array], o: Options) -> list[Array]:
    """States after one step of one sequence."""
    h, fed = states[0], states[0] * o.fed
    of_x, of_h = gates_of(kind, w, x, fed, o)
    pre = [a + b for a, b in zip(of_x, of_h, strict=True)]
    if kind == "nested_lstm":
        i, f, g, out = sigmoid(pre[0]), sigmoid(pre[1]), np.tanh(pre[2]), sigmoid(pre[3])
        inner = w["inner_ih"] @ (i * g * o.candidate) + w.get("inner_b_ih", 0)
        inner = np.split(inner + w["inner_hh"] @ (f * states[1]) + w.get("inner_b_hh", 0), 4)
        s = sigmoid(inner[1]) * states[2] + sigmoid(inner[0]) * np.tanh(inner[2])
        c = sigmoid(inner[3]) * np.tanh(s)
        new = [out * np.tanh(c), c, s]
    elif kind.startswith("lstm"):
        p = np.split(w["w_ph"], len(w["w_ph"]) // H) if "w_ph" in w else [np.zeros(H)] * 3
        old = states[1]
        i = sigmoid(o.gate(pre[0] + p[0] * old))
        f = 1 - i if kind == "lstm_coupled" else sigmoid(o.gate(pre[1] + p[1] * old))
        g = np.tanh(o.gate(pre[-2])) * o.candidate
        c = np.clip(f * old + i * g, -o.cell_clip, o.cell_clip)
        out = sigmoid(o.gate(pre[-1] + p[-1] * c))
        new = [out * np.tanh(w["gain_c"] * normalised(c, o.norm_eps) + w["bias_c"] if kind == "lstm_norm" else c), c]
    elif kind.startswith("slstm"):
        i, log_f, z, out = pre[0], pre[1], np.tanh(pre[2]) * o.candidate, sigmoid(pre[3])
        if kind == "slstm":
            log_f = -np.log1p(np.exp(-log_f))
        _, c, n, m = states
        new_m = np.where(n == 0, i, np.maximum(log_f + m, i))
        f = np.exp(np.where(n == 0, np.minimum(log_f + m - new_m, 0), log_f + m - new_m))
        i = np.exp(i - new_m)
        c, n = f * c + i * z, f * n + i
        new = [out * c / n, c, n, new_m]
    elif kind == "dreamer_gru":
        r, n, u = np.split(normalised(np.concatenate(pre), o.norm_eps) * w["norm_weight"] + w["norm_bias"], 3)
        u = sigmoid(o.gate(u - 1))
        new = [u * np.tanh(o.gate(sigmoid(o.gate(r)) * n)) * o.candidate + (1 - u) * h]
    elif kind.startswith("rnn"):
        new = [np.tanh(o.gate(pre[0])) if kind == "rnn_tanh" else np.maximum(o.gate(pre[0]), 0)]
    else:
        previous = states[-1]  # c of a projected GRU
        gate = sigmoid(o.gate(pre[0]))  # r, or f
        last = len(pre) - 1
        product = recurrent(w, gate * fed, last, o.heads) if kind in RESET_BEFORE else gate * of_h[last]
        n = np.tanh(o.gate(of_x[last] + product)) * o.candidate
        update = gate if kind.startswith("mgu") else 1 - sigmoid(o.gate(pre[1]))
        value = update * n + (1 - update) * previous
        new = [value, value] if kind == "gru_projected" else [value]
    if "w_hr" in w:
        new[0] = w["w_hr"] @ new[0]
    keeps = (o.keep_h, o.keep_c, 0.0, 0.0)
    return [k * before + (1 - k) * after for k, before, after in zip(keeps, (h, *states[1:]), new, strict=False)]


# ---- layers


@dataclasses.dataclass
class Drawn:
    """A kind with a random combination of options, and inputs."""

    kind: str
    names: list[str]
    weights: list[Array]
    x: Array
    states0: list[Array]
    lengths: list[int]
    directions: int
    heads: int
    reset: Array | None
    masks: dict[str, Array]
    numbers: list[float]

    def numpy(self) -> list[Array]:
        """y, c and s of all steps, then the last states."""
        widths = [s.shape[-1] for s in self.states0]
        every = [np.zeros((T, B, self.directions * width)) for width in widths]
        last = [s.copy() for s in self.states0]
        for d in range(self.directions):
            w = dict(zip(self.names, self.weights[d * len(self.names) :], strict=False))
            for b, n in enumerate(self.lengths):
                states = [s[d, b] for s in self.states0]
                for t in range(n) if d == 0 else reversed(range(n)):
                    starts = t if d == 0 else t + 1
                    if self.reset is not None and starts < n and self.reset[starts, b]:
                        states = [np.zeros_like(s) for s in states]
                    states = step(self.kind, w, self.x[t, b], states, self.options(d, b, t))
                    for of_all, s, width in zip(every, states, widths, strict=True):
                        of_all[t, b, d * width :][:width] = s
                for of_last, s in zip(last, states, strict=True):
                    of_last[d, b] = s
        return [every[0], *last, *every[1:]]

    def options(self, d: int, b: int, t: int) -> Options:
        cell_clip, gate_clip, *rates, p, eps = self.numbers or [math.inf, math.inf, 0, 0, 0, 1e-5]

        def at(name: str, otherwise: float) -> Array | float:
            return self.masks[name][t, b, d * H :][:H].astype(float) if name in self.masks else otherwise

        return Options(
            heads=self.heads,
            cell_clip=cell_clip,
            gate_clip=gate_clip,
            keep_h=at("zoneout_h", rates[0]),
            keep_c=at("zoneout_c", rates[1]),
            candidate=at("candidate", 1 - p) / (1 - p),
            fed=self.masks["variational"][d, b] if "variational" in self.masks else 1.0,
            norm_eps=eps,
        )

    def torch(self, packed: bool = False) -> list[Array]:
        valid = np.arange(T)[:, None] < np.array(self.lengths)

        def rows(v: Array) -> Tensor:
            return torch.from_numpy(v[valid] if packed else v)

        masks = {n: torch.from_numpy(m) if n == "variational" else rows(m) for n, m in self.masks.items()}
        outputs = definition.layer(
            self.kind,
            rows(self.x),
            [torch.from_numpy(s) for s in self.states0],
            [torch.from_numpy(w) for w in self.weights],
            torch.from_numpy(valid.sum(1)) if packed else None,
            None if packed else torch.tensor(self.lengths),
            self.directions == 2,
            peephole="w_ph" in self.names,
            heads=self.heads,
            reset=None if self.reset is None else rows(self.reset),
            numbers=self.numbers,
            **masks,
        )
        results = [o.numpy() for o in outputs]
        if packed:
            padded = [i for i in range(len(results)) if not 1 <= i <= len(self.states0)]
            for i in padded:
                whole = np.zeros((T, B, results[i].shape[-1]))
                whole[valid] = results[i]
                results[i] = whole
        return results


def drawn(kind: str, seed: int) -> Drawn:
    rng = np.random.default_rng([seed, list(definition.KINDS).index(kind)])
    has = definition.KINDS[kind]
    lstm, normed, nested = kind.startswith("lstm"), bool(has.norms), kind == "nested_lstm"
    slstm = kind.startswith("slstm")

    def maybe(possible: bool = True) -> bool:
        return bool(rng.integers(2)) and possible

    bias, peephole = maybe(), maybe(kind in ("lstm", "lstm_coupled"))
    projected = kind == "gru_projected" or maybe(kind in ("lstm", "lstm_coupled"))
    heads = 1 if projected or normed or nested else int(rng.choice([1, 2, 3]))
    fed = P if projected else H
    G = has.gates
    shapes: dict[str, tuple[int, ...]] = {"w_ih": (G * H, D), "w_hh": (G * H, fed // heads)}
    shapes |= {"b_ih": (G * H,), "b_hh": (G * H,)} if bias else {}
    shapes |= {"w_hr": (P, H)} if projected else {}
    shapes |= {"w_ph": ((G - 1) * H,)} if peephole else {}
    of_cell = {"gain_c": (H,), "bias_c": (H,)} if lstm else {}
    shapes |= {"gain_ih": (G * H,), "gain_hh": (G * H,), **of_cell} if normed else {}
    shapes |= {"norm_weight": (G * H,), "norm_bias": (G * H,)} if kind == "dreamer_gru" else {}
    shapes |= {"inner_ih": (4 * H, H), "inner_hh": (4 * H, H)} if nested else {}
    shapes |= {"inner_b_ih": (4 * H,), "inner_b_hh": (4 * H,)} if nested and bias else {}
    directions = int(rng.integers(1, 3))
    lengths = [[5, 5, 3], [2, 0, 5], [5, 1, 4]][rng.integers(3)]
    masks = {}
    for name, possible in (
        ("zoneout_h", not projected),
        ("zoneout_c", lstm and not nested),
        ("candidate", not kind.startswith("rnn")),
    ):
        if maybe(possible):
            masks[name] = rng.integers(0, 2, (T, B, directions * H)).astype(np.uint8)
    if maybe():
        masks["variational"] = rng.integers(0, 2, (directions, B, fed)) * 2.0
    numbers = [
        0.5 if maybe(lstm and not nested) else math.inf,
        0.7 if maybe(not nested and not slstm) else math.inf,
        0.3 if maybe(not projected) else 0.0,
        0.2 if maybe(lstm and not nested) else 0.0,
        0.4 if maybe("candidate" in masks) else 0.0,
        0.01 if maybe(normed or kind == "dreamer_gru") else 1e-5,
    ]
    widths = (fed, H, H, H)[: has.states]
    states0 = [rng.normal(size=(directions, B, width)) for width in widths]
    if slstm:
        states0[2] = (
            np.abs(states0[2]) + 0.5
        )  # the normaliser must be positive; 0, as after a reset, is a discontinuity
    return Drawn(
        kind=kind,
        names=list(shapes),
        weights=[rng.normal(size=shape) for _ in range(directions) for shape in shapes.values()],
        x=rng.normal(size=(T, B, D)),
        states0=states0,
        lengths=lengths,
        directions=directions,
        heads=heads,
        reset=rng.random((T, B)) < 0.3 if maybe() else None,
        masks=masks,
        numbers=numbers if maybe() or any(numbers[2:5]) or numbers[5] != 1e-5 else [],
    )


kinds = pytest.mark.parametrize("kind", definition.KINDS)


@pytest.mark.parametrize("seed", range(25))
@kinds
def test_layer_matches_its_steps(kind: str, seed: int) -> None:
    """Random combinations of options and lengths; also packed if the lengths allow it."""
    case = drawn(kind, seed)
    want = case.numpy()
    for packed in (False, True)[: 1 + (case.lengths == [5, 5, 3])]:
        got = case.torch(packed)
        assert len(got) == len(want)
        for g, w in zip(got, want, strict=True):
            assert g.shape == w.shape
            np.testing.assert_allclose(g, w, rtol=0, atol=1e-12)


# ---- kinds expressed by other kinds


def uniform(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64) * 2 - 1


def assert_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g, w, rtol=0, atol=1e-13)


def test_heads_match_a_block_diagonal_matrix() -> None:
    x, w_ih, w_hh = uniform(T, B, D), uniform(3 * H, D), uniform(3 * H, H // 2)
    whole = torch.cat([torch.block_diag(*gate.chunk(2)) for gate in w_hh.chunk(3)])
    for kind in ("gru", "gru_before"):
        got = definition.layer(kind, x, (None,), [w_ih, w_hh], heads=2)
        assert_same(got, definition.layer(kind, x, (None,), [w_ih, whole]))


def test_coupled_gates_match_an_lstm_with_negated_forget_gate() -> None:
    """1 - sigmoid(v) = sigmoid(-v)."""
    x, weights = (
        uniform(T, B, D),
        [uniform(3 * H, D), uniform(3 * H, H), uniform(3 * H), uniform(3 * H), uniform(2 * H)],
    )
    turned = [torch.cat([w[:H], -w[:H], w[H:]]) for w in weights]
    got = definition.layer("lstm_coupled", x, (None, None), weights, peephole=True)
    assert_same(got, definition.layer("lstm", x, (None, None), turned, peephole=True))


@pytest.mark.parametrize(("mgu", "gru"), [("mgu_after", "gru"), ("mgu", "gru_before")])
def test_mgu_matches_a_gru_with_tied_gates(mgu: str, gru: str) -> None:
    """r = f, z = 1 - f."""
    x, weights = uniform(T, B, D), [uniform(2 * H, D), uniform(2 * H, H), uniform(2 * H), uniform(2 * H)]
    three = [torch.cat([w[:H], -w[:H], w[H:]]) for w in weights]
    got = definition.layer(mgu, x, (None,), weights)
    assert_same(got, definition.layer(gru, x, (None,), three))


def test_identity_projection() -> None:
    x, h0, weights = uniform(T, B, D), uniform(1, B, H), [uniform(3 * H, D), uniform(3 * H, H)]
    got = definition.layer("gru_projected", x, (h0, h0), [*weights, torch.eye(H, dtype=torch.float64)])
    y, h_n = definition.layer("gru", x, (h0,), weights)
    assert_same(got, (y, h_n, h_n, y))


# ---- derivatives


def of_tensors(case: Drawn) -> tuple[Callable, list[Tensor]]:
    """The layer as a function of its differentiable tensors, and these tensors."""
    n, m = len(case.states0), case.masks
    masks = {name: torch.from_numpy(mask) for name, mask in m.items()}
    reset = None if case.reset is None else torch.from_numpy(case.reset)

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return definition.layer(
            *(case.kind, x, rest[:n], rest[n:], None, torch.tensor(case.lengths), case.directions == 2),
            peephole="w_ph" in case.names,
            heads=case.heads,
            reset=reset,
            numbers=case.numbers,
            **masks,
        )

    return function, [torch.from_numpy(a) for a in (case.x, *case.states0, *case.weights)]


@kinds
def test_gradients_of_first_and_second_order(kind: str) -> None:
    function, tensors = of_tensors(drawn(kind, 4))
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(function, leaves, atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, atol=1e-6, fast_mode=True)


@kinds
def test_transforms(kind: str) -> None:
    """jvp is the transpose of vjp, forward over reverse works, and vmap matches a loop."""
    function, tensors = of_tensors(drawn(kind, 7))
    outputs, pull = torch.func.vjp(function, *tensors)
    tangents, upstream = tuple(uniform(*t.shape) for t in tensors), tuple(uniform(*o.shape) for o in outputs)
    _, pushed = torch.func.jvp(function, tuple(tensors), tangents)
    pulled = pull(upstream)
    forward = sum((a * b).sum() for a, b in zip(pushed, upstream, strict=True))
    backward = sum((a * b).sum() for a, b in zip(pulled, tangents, strict=True))
    torch.testing.assert_close(forward, backward)
    torch.func.jvp(lambda *a: torch.func.vjp(function, *a)[1](upstream), tuple(tensors), tangents)
    xs = uniform(2, *tensors[0].shape)
    for i, x in enumerate(xs):
        got = torch.vmap(lambda x: function(x, *tensors[1:]))(xs)
        assert_same(tuple(g[i] for g in got), function(x, *tensors[1:]))


def test_cost_is_linear_in_the_number_of_steps() -> None:
    """Forward and backward with all masks: 8 times the steps take at most 20 times as long, not 64 times."""

    def seconds(T: int) -> float:
        x, units = uniform(T, 2, 3).requires_grad_(), (T, 2, 4)
        masks = {name: torch.ones(units, dtype=torch.uint8) for name in ("zoneout_h", "zoneout_c", "candidate")}
        begun = time.process_time()
        y, *_ = definition.layer("lstm", x, (None, None), [uniform(16, 3), uniform(16, 4)], **masks)
        torch.autograd.grad(y.sum(), x)
        return time.process_time() - begun

    seconds(10)
    assert min(seconds(1200) for _ in range(2)) < 20 * min(seconds(150) for _ in range(3))


# ---- the public functions


def test_kinds_of_public_functions() -> None:
    """The options and, for projections, the number of weights determine the kind."""
    x = uniform(T, B, D)

    def same(name: str, kind: str, states: int, weights: list[Tensor], **options) -> None:
        options_of_layer = {"peephole": True} if options.get("peephole") else {}
        want = definition.layer(kind, x, (None,) * states, weights, **options_of_layer)
        y, last = getattr(reference, name)(x, None, weights, **options)
        last = last if isinstance(last, tuple) else (last,)
        assert len(last) == states
        assert_same((y, *last), want)

    def gates(G: int) -> list[Tensor]:
        return [uniform(G * H, D), uniform(G * H, H)]

    projection = [uniform(3 * H, D), uniform(3 * H, P), uniform(P, H)]
    inner = [uniform(4 * H, H), uniform(4 * H, H)]
    same("lstm", "lstm", 2, gates(4))
    same("lstm", "lstm", 2, [*gates(4), uniform(3 * H)], peephole=True)
    same("lstm", "lstm_coupled", 2, gates(3), coupled_gates=True)
    same("lstm", "lstm_norm", 2, [*gates(4), *(uniform(n * H) for n in (4, 4, 1, 1))], layer_norm=True)
    same("nested_lstm", "nested_lstm", 3, [*gates(4), *inner])
    same("slstm", "slstm", 4, gates(4))
    same("slstm", "slstm_exp", 4, gates(4), forget_gate="exp")
    same("gru", "gru", 1, gates(3))
    same("gru", "gru_before", 1, gates(3), reset_after=False)
    same("gru", "gru_norm", 1, [*gates(3), uniform(3 * H), uniform(3 * H)], layer_norm=True)
    same("gru", "gru_projected", 2, projection)
    normed = [*gates(3), uniform(3 * H), uniform(3 * H)]
    same("dreamer_gru", "dreamer_gru", 1, normed, norm_eps=1e-5)
    same("mgu", "mgu", 1, gates(2))
    same("mgu", "mgu_after", 1, gates(2), reset_after=True)
    same("rnn_tanh", "rnn_tanh", 1, gates(1))
    same("rnn_relu", "rnn_relu", 1, gates(1))


def test_stacked_layers_with_masks() -> None:
    """Masks are passed by layer, `input` multiplies the input of a layer, and batch_first is a transpose."""
    weights = [uniform(3 * H, D), uniform(3 * H, H), uniform(3 * H, H), uniform(3 * H, H)]
    x, reset = uniform(T, B, D), torch.rand(T, B) < 0.3
    masks = [
        {"input": torch.randint(0, 2, (B, width)) * 2.0, "candidate": torch.randint(0, 2, (T, B, H), dtype=torch.uint8)}
        for width in (D, H)
    ]
    common = dict(num_layers=2, masks=masks, return_all_states=True, recurrent_dropout=0.5, gate_clip=0.5)
    y, h_n, every = reference.gru(x.transpose(0, 1), None, weights, batch_first=True, reset=reset.t(), **common)
    numbers = (math.inf, 0.5, 0.0, 0.0, 0.5, 1e-5)
    of_input, last = x, []
    for i, mask in enumerate(masks):
        own = weights[2 * i : 2 * i + 2]
        with one_thread():
            of_input, h = definition.layer(
                *("gru", of_input * mask["input"], (None,), own),
                candidate=mask["candidate"],
                reset=reset,
                numbers=numbers,
            )
        last.append(h)
        assert_same(every[i], (of_input.transpose(0, 1),))
    assert_same((y, h_n), (of_input.transpose(0, 1), torch.cat(last)))


def test_invalid_number_of_weights() -> None:
    with pytest.raises(ValueError, match="reference: weights must be those of the kind, got 7 in a direction"):
        definition.layer("lstm", uniform(T, B, D), (None, None), [uniform(4 * H, D), *[uniform(4 * H, H)] * 6])
