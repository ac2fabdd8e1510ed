"""Cells: as replacements of torch's, against torch in float64, against the corresponding layers, and with options.

Dimensions: B batch, T time, D input, H hidden.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import prune

import seqkernels
from seqkernels import functional, reference
from seqkernels.functional import _recurrent_ops as layer_ops
from seqkernels.nn import recurrent as layers
from seqkernels.nn import recurrent_cells as cells
from support.cases import DTYPES, assert_near, assert_same_bits, tuple_of
from support.fuzzing import bounded, restrided, strides
from support.recurrent import compiled, spread

ops = torch.ops.seqkernels


@pytest.fixture(autouse=True)
def few_threads(threads: None) -> None:
    """The calls are too small for two threads; a separate test compares numbers of threads."""
    torch.set_num_threads(1)


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """A cell of seqkernels, the cell of torch and the corresponding layer."""

    name: str
    gates: int
    options: dict = dataclasses.field(default_factory=dict)
    states: int = 1

    def __str__(self) -> str:
        return "-".join([self.name, *(k if v is True else f"{k}={v}" for k, v in self.options.items())])

    def ours(self, *arguments, **keywords) -> torch.nn.Module:
        return getattr(cells, self.name)(*arguments, **self.options, **keywords)

    def theirs(self, *arguments, **keywords) -> torch.nn.Module:
        return getattr(torch.nn, self.name)(*arguments, **self.options, **keywords)

    def layer(self, *arguments, **keywords) -> torch.nn.Module:
        return getattr(layers, self.name.removesuffix("Cell"))(*arguments, **self.options, **keywords)

    def pair(self, *arguments, seed: int = 0, **keywords) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The cells of seqkernels and torch with the same seed."""
        torch.manual_seed(seed)
        ours = self.ours(*arguments, **keywords)
        torch.manual_seed(seed)
        return ours, self.theirs(*arguments, **keywords)

    def hx(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | tuple[Tensor, ...]:
        states = tuple(torch.randn(shape, dtype=dtype) for _ in range(self.states))
        return states if self.states > 1 else states[0]


LSTM = Cell("LSTMCell", 4, states=2)
GRU = Cell("GRUCell", 3)
TANH = Cell("RNNCell", 1)
RELU = Cell("RNNCell", 1, {"nonlinearity": "relu"})
PLAIN = [LSTM, GRU, TANH, RELU]
each = pytest.mark.parametrize("cell", PLAIN, ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

NAMES = ["lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"]
FUNCTIONS = dict(zip(PLAIN, NAMES, strict=True))


def lstm(**options) -> Cell:
    return Cell("LSTMCell", 4 - options.get("coupled_gates", False), options, states=2)


def gru(**options) -> Cell:
    return Cell("GRUCell", 3, options)


VARIANTS = [
    lstm(peephole=True),
    lstm(coupled_gates=True),
    lstm(layer_norm=True),
    lstm(forget_bias=1.5),
    lstm(cell_clip=0.3, gate_clip=0.8),
    lstm(zoneout_h=0.3, zoneout_c=0.4),
    lstm(recurrent_dropout=0.4),
    lstm(num_heads=2),
    lstm(peephole=True, coupled_gates=True, num_heads=3, gate_clip=1.0, zoneout_c=0.2, recurrent_dropout=0.1),
    gru(reset_after=False),
    gru(layer_norm=True),
    gru(gate_clip=0.5, zoneout_h=0.3),
    gru(recurrent_dropout=0.4, num_heads=2),
    gru(layer_norm=True, norm_eps=0.01),
    Cell("DreamerGRUCell", 3),
    Cell("DreamerGRUCell", 3, {"norm_eps": 1e-5}),
    Cell("DreamerGRUCell", 3, {"num_heads": 3, "gate_clip": 0.8, "zoneout_h": 0.3, "recurrent_dropout": 0.1}),
    Cell("RNNCell", 1, {"gate_clip": 0.5, "zoneout_h": 0.3}),
    Cell("RNNCell", 1, {"nonlinearity": "relu", "num_heads": 2}),
]
variants = pytest.mark.parametrize("cell", VARIANTS, ids=str)


def states_of(result: object) -> tuple[Tensor, ...]:
    return tuple_of(result)


def upstream_of(states: tuple[Tensor, ...]) -> list[Tensor]:
    g = torch.Generator().manual_seed(7)
    return [torch.randn(s.shape, generator=g, dtype=torch.float64).to(s.dtype) for s in states]


def rebuilt(hx, of: Callable[[Tensor], Tensor]):
    """Applies `of` to each tensor of hx."""
    return None if hx is None else tuple(map(of, hx)) if isinstance(hx, tuple) else of(hx)


def everything(module: torch.nn.Module, x: Tensor, hx=None) -> dict[str, Tensor]:
    """New states, and gradients of parameters and arguments for fixed upstream gradients."""
    leaves: list[Tensor] = []

    def leaf(t: Tensor) -> Tensor:
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    x, hx = leaf(x), rebuilt(hx, leaf)
    states = states_of(module(x) if hx is None else module(x, hx))
    upstream = upstream_of(states)
    named = {n.removeprefix("_orig_mod."): p for n, p in module.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(states, [*leaves, *named.values()], upstream)
    outputs = {name: s.detach() for name, s in zip("hc", states)}
    return outputs | dict(zip(["dx", "dh0", "dc0"][: len(leaves)] + list(named), grads, strict=True))


def assert_matches_torch(ours: torch.nn.Module, theirs: torch.nn.Module, x: Tensor, hx=None) -> None:
    """Asserts outputs and gradients close to those of torch in float64, for rounded inputs and weights."""
    dtype = x.dtype
    theirs = copy.deepcopy(theirs).double()
    theirs.load_state_dict(ours.state_dict())
    want = everything(theirs, x.double(), rebuilt(hx, Tensor.double))
    assert_near(everything(ours, x, hx), {n: t.to(dtype) for n, t in want.items()}, dtype)


# ---- parity with torch


@dtypes
@pytest.mark.parametrize("form", ["batched", "unbatched", "no state", "no bias", "unbatched, no state, no bias"])
@each
def test_matches_torch_in_float64(cell: Cell, form: str, dtype: torch.dtype) -> None:
    batch = () if "unbatched" in form else (3,)
    ours, theirs = cell.pair(5, 17, bias="no bias" not in form, dtype=dtype)
    x = torch.randn(*batch, 5, dtype=dtype)
    hx = None if "no state" in form else cell.hx(*batch, 17, dtype=dtype)
    assert_matches_torch(ours, theirs, x, hx)


@pytest.mark.parametrize("B, D, H", [(1, 1, 1), (1, 32, 32), (65, 3, 7), (7, 129, 65), (70, 16, 128), (2, 300, 40)])
@each
def test_matches_torch_for_all_sizes(cell: Cell, B: int, D: int, H: int) -> None:
    ours, theirs = cell.pair(D, H)
    assert_matches_torch(ours, theirs, torch.randn(B, D), cell.hx(B, H))


@each
def test_matches_torch_on_each_instruction_set(cell: Cell, isa: str) -> None:
    ours, theirs = cell.pair(19, 33)
    assert_matches_torch(ours, theirs, torch.randn(6, 19), cell.hx(6, 33))


@bounded
@given(
    cell=st.sampled_from(PLAIN), B=st.one_of(st.none(), st.integers(0, 9), st.sampled_from([17, 65])),
    D=st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 130])),
    H=st.sampled_from([4, 5, 8, 15, 16, 17, 33, 64, 65]),
    bias=st.booleans(), state=st.booleans(), dtype=st.sampled_from(DTYPES), threads=st.integers(1, 3),
    kinds=st.lists(strides, min_size=3, max_size=3), seed=st.integers(0, 99),
)  # fmt: skip
def test_random_inputs_match_torch(
    cell: Cell, B: int | None, D: int, H: int, bias: bool, state: bool, dtype: torch.dtype, threads: int,
    kinds: list[str], seed: int,
) -> None:  # fmt: skip
    ours, theirs = cell.pair(D, H, bias=bias, dtype=dtype, seed=seed)
    batch, turn = () if B is None else (B,), iter(kinds)
    x, hx = torch.randn(*batch, D, dtype=dtype), cell.hx(*batch, H, dtype=dtype)
    torch.set_num_threads(threads)
    x = restrided(x, next(turn))
    assert_matches_torch(ours, theirs, x, rebuilt(hx, lambda s: restrided(s, next(turn))) if state else None)


@each
def test_an_empty_batch(cell: Cell) -> None:
    ours, theirs = cell.pair(5, 7)
    x, hx = torch.randn(0, 5), cell.hx(0, 7)
    got, want = everything(ours, x, hx), everything(theirs, x, hx)
    assert all(torch.equal(got[n], want[n]) for n in want) and not got["weight_ih"].any()


@each
def test_no_features(cell: Cell) -> None:
    ours, theirs = cell.pair(1, 7)
    for module in (ours, theirs):
        module.weight_ih = torch.nn.Parameter(torch.empty(cell.gates * 7, 0))
    assert_matches_torch(ours, theirs, torch.empty(3, 0), cell.hx(3, 7))


@each
def test_strides(cell: Cell) -> None:
    ours, _ = cell.pair(5, 7)
    x, hx = torch.randn(4, 5), cell.hx(4, 7)
    want = everything(ours, x, hx)
    other = copy.deepcopy(ours)
    for name, p in ours.named_parameters():
        setattr(other, name, torch.nn.Parameter(spread(p.detach())))
    for change in (spread, lambda t: t.T.contiguous().T, lambda t: torch.cat([t, t], 1)[:, : t.shape[1]]):
        assert_same_bits(everything(ours, change(x), rebuilt(hx, change)), want)
        assert_same_bits(everything(other, change(x), rebuilt(hx, change)), want)
    x, hx = x[0], rebuilt(hx, lambda s: s[0])
    assert_same_bits(everything(ours, spread(x), rebuilt(hx, spread)), everything(ours, x, hx))


@each
def test_upstream_gradients_in_other_strides(cell: Cell) -> None:
    """The gradient of a sum is an expanded value."""
    ours, theirs = cell.pair(5, 7)
    x, hx = torch.randn(4, 5), cell.hx(4, 7)
    for module in (ours, theirs):
        states_of(module(x, hx))[0].sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_gradient_of_a_single_state() -> None:
    ours, theirs = LSTM.pair(5, 7)
    x = torch.randn(4, 5)
    hx = LSTM.hx(4, 7)
    for i in (0, 1):
        grads = [torch.autograd.grad(m(x, hx)[i].square().sum(), list(m.parameters())) for m in (ours, theirs)]
        torch.testing.assert_close(*grads)


@each
def test_new_memory_is_written_before_it_is_read(cell: Cell) -> None:
    """Fills the memory of the allocator with NaN, because the ops of cells bypass the fixture that fills tensors."""
    ours, _ = cell.pair(5, 7)
    x, hx = torch.randn(4, 5), cell.hx(4, 7)
    want = everything(ours, x, hx)
    for _ in range(5):
        for width in (5, 7, 7 * cell.gates, 7 * (cell.gates + 1)):
            dirty = [torch.full((rows, width), float("nan")) for rows in (1, 4, 7 * cell.gates) for _ in range(6)]
        del dirty
        assert_same_bits(everything(ours, x, hx), want)


@each
def test_bits_are_independent_of_threads(cell: Cell) -> None:
    ours, _ = cell.pair(128, 128)
    x, hx = torch.randn(64, 128), cell.hx(64, 128)
    want = everything(ours, x, hx)
    for n in (2, 3):
        torch.set_num_threads(n)
        assert_same_bits(everything(ours, x, hx), want)


# ---- one step of a layer


def layer_of(cell: Cell, module: torch.nn.Module, **keywords) -> torch.nn.Module:
    """The layer with the weights of the cell."""
    layer = cell.layer(module.input_size, module.hidden_size, bias=module.bias, **keywords)
    layer.load_state_dict({f"{name}_l0": p for name, p in module.state_dict().items()})
    return layer.train(module.training)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("cell", [*PLAIN, *(v for v in VARIANTS if "recurrent_dropout" not in v.options)], ids=str)
def test_loop_over_cells_has_the_bits_of_the_layer(cell: Cell, dtype: torch.dtype) -> None:
    module = cell.ours(5, 18, dtype=dtype).eval()
    layer = layer_of(cell, module, dtype=dtype)
    x, hx = torch.randn(6, 3, 5, dtype=dtype), cell.hx(3, 18, dtype=dtype)
    outputs, state = [], hx
    for step in x:
        state = module(step, state)
        outputs.append(states_of(state)[0])
    y, last = layer(x, rebuilt(hx, lambda s: s[None]))
    assert torch.equal(torch.stack(outputs), y)
    for a, b in zip(states_of(state), tuple_of(last), strict=True):
        assert torch.equal(a, b[0])


@pytest.mark.parametrize("cell", [*PLAIN, *VARIANTS], ids=str)
def test_training_step_matches_the_layer(cell: Cell) -> None:
    """Includes masks, which are equal for equal seeds, and all gradients."""
    module = cell.ours(5, 18)
    layer = layer_of(cell, module)
    x, hx = torch.randn(4, 5), cell.hx(4, 18)

    class OfLayer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, hx) -> tuple[Tensor, ...]:
            states = tuple_of(self.layer(x[None], rebuilt(hx, lambda s: s[None]))[1])
            return tuple(s[0] for s in states)

    results = []
    for m in (module, OfLayer()):
        torch.manual_seed(4)
        results.append(everything(m, x, hx))
    want = {name.removeprefix("layer.").removesuffix("_l0"): t for name, t in results[1].items()}
    assert_same_bits(results[0], want)


@variants
def test_options_against_the_definition(cell: Cell) -> None:
    """In eval mode, without random masks: outputs and gradients against plain torch in float64."""
    module = cell.ours(5, 18).eval()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    o = module.options
    heads = {"peephole": o.peephole, "heads": o.num_heads}
    limits = [float("inf") if limit is None else limit for limit in (o.cell_clip, o.gate_clip)]
    numbers = [*limits, o.zoneout_h, o.zoneout_c, 0.0, o.norm_eps]

    class Defined(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, p in module.named_parameters():
                setattr(self, name, torch.nn.Parameter(p.detach().double()))

        def forward(self, x: Tensor, hx) -> tuple[Tensor, ...]:
            states = [s[None] for s in states_of(hx)]
            weights = [getattr(self, w.name) for w in module._table()]
            outputs = reference.recurrent.layer(module._kind.name, x[None], states, weights, numbers=numbers, **heads)
            return tuple(s[0] for s in outputs[1 : 1 + len(states)])

    x, hx = torch.randn(4, 5), cell.hx(4, 18)
    want = everything(Defined(), x.double(), rebuilt(hx, Tensor.double))
    assert_near(everything(module, x, hx), {n: t.float() for n, t in want.items()}, torch.float32)
    alone = everything(module, x[1], rebuilt(hx, lambda s: s[1]))
    assert torch.equal(alone["h"], everything(module, x, hx)["h"][1])


def test_dropout_and_zoneout_draw_masks_in_training_only() -> None:
    x, hx = torch.randn(4, 5), LSTM.hx(4, 50)
    for options in (dict(recurrent_dropout=0.5), dict(zoneout_h=0.5), dict(zoneout_c=0.5)):
        module = cells.LSTMCell(5, 50, **options)
        assert not all(torch.equal(a, b) for a, b in zip(module(x, hx), module(x, hx), strict=True))
        module.eval()
        assert all(torch.equal(a, b) for a, b in zip(module(x, hx), module(x, hx), strict=True))
    module = cells.LSTMCell(5, 50, zoneout_h=0.3)
    stays = [torch.isclose(module(x, hx)[0], hx[0], rtol=1e-5).double().mean() for _ in range(50)]
    assert abs(torch.stack(stays).mean() - 0.3) < 4 * (0.3 * 0.7 / (50 * 200)) ** 0.5


def test_parameters_of_options_and_their_initialization() -> None:
    names = lambda module: {n: tuple(p.shape) for n, p in module.named_parameters()}  # noqa: E731
    plain = {"weight_ih": (32, 5), "weight_hh": (32, 8), "bias_ih": (32,), "bias_hh": (32,)}
    assert names(cells.LSTMCell(5, 8)) == plain
    assert names(cells.LSTMCell(5, 8, peephole=True)) == plain | {"weight_ph": (24,)}
    assert names(cells.LSTMCell(5, 8, num_heads=2)) == plain | {"weight_hh": (32, 4)}
    gains = {"gain_ih": (32,), "gain_hh": (32,), "gain_c": (8,), "bias_c": (8,)}
    module = cells.LSTMCell(5, 8, layer_norm=True)
    assert names(module) == plain | gains
    assert all(bool((getattr(module, n) == (0 if n == "bias_c" else 1)).all()) for n in gains)
    assert names(cells.LSTMCell(5, 8, coupled_gates=True, bias=False)) == {"weight_ih": (24, 5), "weight_hh": (24, 8)}
    assert names(cells.GRUCell(5, 8, layer_norm=True, bias=False)).keys() == {
        *("weight_ih", "weight_hh", "gain_ih", "gain_hh")
    }
    module = cells.LSTMCell(5, 8, forget_bias=2.0)
    assert (module.bias_ih[8:16] == 2).all() and not module.bias_hh[8:16].any() and module.bias_hh[:8].all()
    module.reset_parameters()
    assert (module.bias_ih[8:16] == 2).all()
    bound = 8**-0.5
    for module in (cells.LSTMCell(5, 8, peephole=True), cells.GRUCell(5, 8, num_heads=4)):
        assert all(p.abs().max() <= bound and p.abs().max() > 0 for p in module.parameters())


def test_repr_of_options() -> None:
    assert repr(cells.LSTMCell(5, 8, peephole=True, cell_clip=3.0)) == "LSTMCell(5, 8, peephole=True, cell_clip=3.0)"
    assert repr(cells.GRUCell(5, 8, bias=False, reset_after=False)) == "GRUCell(5, 8, bias=False, reset_after=False)"
    assert (
        repr(cells.RNNCell(5, 8, nonlinearity="relu", num_heads=2)) == "RNNCell(5, 8, nonlinearity=relu, num_heads=2)"
    )


# ---- gradients of any order

TINY = [dict(), dict(bias=False), dict(form="unbatched"), dict(form="no state")]


@pytest.mark.parametrize("tiny", TINY, ids=lambda t: "-".join(map(str, t.values())) or "all")
@pytest.mark.parametrize("cell", [*PLAIN[:3], lstm(peephole=True, gate_clip=1.5), gru(layer_norm=True)], ids=str)
def test_gradcheck(cell: Cell, tiny: dict) -> None:
    tiny = dict(tiny)
    form = tiny.pop("form", "batched")
    module = cell.ours(2, 3, dtype=torch.float64, **tiny)
    batch = () if form == "unbatched" else (2,)
    x = torch.randn(*batch, 2, dtype=torch.float64)
    states = () if form == "no state" else states_of(cell.hx(*batch, 3, dtype=torch.float64))
    tensors = [x, *states, *(p.detach() for p in module.parameters())]
    names, n = [name for name, _ in module.named_parameters()], len(states)

    def call(x: Tensor, *rest: Tensor):
        hx = rest[:n] if n > 1 else rest[0] if n else None
        return torch.func.functional_call(module, dict(zip(names, rest[n:], strict=True)), (x, hx))

    for t in tensors:
        t.requires_grad_()
    assert torch.autograd.gradcheck(call, tensors)
    assert torch.autograd.gradgradcheck(call, tensors)


@each
def test_gradient_penalty_through_a_loop(cell: Cell) -> None:
    """Second derivatives in a training loop, as for the critic of a GAN."""
    ours, theirs = cell.pair(5, 7, dtype=torch.float64)
    xs = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for module in (ours, theirs):
        state = None
        for x in xs:
            state = module(x, state)
        (dx,) = torch.autograd.grad(states_of(state)[0].sum(), xs, create_graph=True)
        (dx.norm() - 1).square().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@each
def test_third_derivative(cell: Cell) -> None:
    grads = []
    ours, theirs = cell.pair(1, 3, dtype=torch.float64)
    for module in (ours, theirs):
        x = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
        value = states_of(module(x))[0].sum()
        for _ in range(2):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        grads.append(torch.autograd.grad(value.sum(), x, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*grads)


@each
def test_gradients_of_frozen_parameters_and_inputs(cell: Cell) -> None:
    """Frozen parameters and inputs get no gradient; the other gradients are unchanged."""
    ours, _ = cell.pair(5, 7)
    x, hx = torch.randn(4, 5), cell.hx(4, 7)
    want = everything(ours, x, hx)
    x.requires_grad_()
    states = states_of(ours(x, hx))
    (dx,) = torch.autograd.grad(states, x, upstream_of(states))
    assert torch.equal(dx, want["dx"])
    for frozen in ("weight_ih", "weight_hh", "bias_hh"):
        ours.get_parameter(frozen).requires_grad_(False)
    got = everything(ours, x.detach(), hx)
    assert got.keys() == want.keys() - {"weight_ih", "weight_hh", "bias_hh"}
    assert_same_bits(got, {n: want[n] for n in got})
    ours.requires_grad_(False)
    assert not states_of(ours(x.detach(), hx))[0].requires_grad


# ---- modules

CONSTRUCTORS = [dict(), dict(bias=False), dict(dtype=torch.float64)]


@pytest.mark.parametrize("arguments", CONSTRUCTORS, ids=lambda a: "-".join(map(str, a.values())) or "plain")
@each
def test_parameters_attributes_and_repr_match_torch(cell: Cell, arguments: dict) -> None:
    ours, theirs = cell.pair(5, 7, **arguments)
    for (n, p), (m, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q) and p.dtype == q.dtype and p.requires_grad
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert type(ours).__constants__ == type(theirs).__constants__
    for name in type(theirs).__constants__:
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours, type(theirs))
    for module in (ours, theirs):
        torch.manual_seed(3)
        module.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_signature_matches_torch(name: str) -> None:
    """The arguments of torch in the same order, followed by keyword-only options."""
    ours, theirs = (inspect.signature(getattr(of, name).__init__) for of in (cells, torch.nn))
    positional = [p for p in ours.parameters.values() if p.kind is not inspect.Parameter.KEYWORD_ONLY]
    assert [p.name for p in positional] == list(theirs.parameters)
    assert [p.default for p in positional] == [p.default for p in theirs.parameters.values()]
    ours, theirs = (inspect.signature(getattr(of, name).forward) for of in (cells, torch.nn))
    assert list(ours.parameters) == list(theirs.parameters)


@each
def test_state_dict_exchange_with_torch(cell: Cell) -> None:
    ours, theirs = cell.pair(5, 7)[0], cell.pair(5, 7, seed=1)[1]
    x = torch.randn(4, 5)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    buffer = io.BytesIO()
    torch.save(cell.pair(5, 7, seed=2)[0].state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.weight_ih.data_ptr() == theirs.weight_ih.data_ptr()


@pytest.mark.parametrize("cell", [*PLAIN, *VARIANTS[:3]], ids=str)
def test_copies_of_a_cell(cell: Cell) -> None:
    module = cell.ours(5, 18)
    x = torch.randn(4, 5)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert_same_bits(everything(copied, x), everything(module, x))
        assert repr(copied) == repr(module)


@each
def test_dtypes_meta_inference_mode_and_hooks(cell: Cell) -> None:
    """Conversion of dtypes, the meta device, inference and eval mode, hooks and accumulation of gradients."""
    ours, theirs = cell.pair(5, 7)
    x, hx = torch.randn(4, 5), cell.hx(4, 7)
    want = everything(ours, x, hx)
    assert_same_bits(everything(ours.eval(), x, hx), want)
    with torch.inference_mode():
        inferred = states_of(ours(x, hx))
        assert inferred[0].is_inference()
        assert torch.equal(inferred[0], want["h"]) and torch.equal(states_of(ours(x, hx))[0], want["h"])
    with torch.no_grad():
        assert torch.equal(states_of(ours(x, hx))[0], want["h"])
    with torch.device("meta"):
        empty = cell.ours(5, 7)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    assert_same_bits(everything(empty, x, hx), want)
    seen = []
    handle = ours.register_forward_hook(lambda module, inputs, output: seen.append(states_of(output)[0].shape))
    for _ in range(2):  # gradients accumulate
        sum(s.square().sum() for s in states_of(ours(x, hx))).backward()
        sum(s.square().sum() for s in states_of(theirs(x, hx))).backward()
    handle.remove()
    assert seen == [(4, 7), (4, 7)]
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        assert states_of(ours.to(dtype)(x.to(dtype)))[0].dtype == dtype


@each
def test_training_matches_torch(cell: Cell) -> None:
    ours, theirs = cell.pair(5, 16)
    xs, target = torch.randn(6, 4, 5), torch.randn(4, 16)
    for module in (ours, theirs):
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
        for _ in range(10):
            optimizer.zero_grad()
            state = None
            for x in xs:
                state = module(x, state)
            (states_of(state)[0] - target).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-3)


@each
def test_weight_modified_before_backward_raises(cell: Cell) -> None:
    ours, _ = cell.pair(5, 7)
    h = states_of(ours(torch.randn(4, 5)))[0]
    with torch.no_grad():
        ours.weight_hh.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


@each
def test_computed_weights(cell: Cell) -> None:
    """weight_norm, pruning, a shared weight, a replaced weight."""
    ours, theirs = cell.pair(7, 7)
    x, hx = torch.randn(4, 7), cell.hx(4, 7)
    shared = torch.nn.Parameter(torch.randn(cell.gates * 7, 7))
    for module in (ours, theirs):
        module.weight_hh = module.weight_ih = shared
    assert_near(everything(ours, x, hx), everything(theirs, x, hx), torch.float32)
    ours, theirs = cell.pair(7, 7)
    for module in (ours, theirs):
        torch.nn.utils.parametrizations.weight_norm(module, "weight_hh")
        prune.l1_unstructured(module, "bias_ih", 0.5)
    assert_near(everything(ours, x, hx), everything(theirs, x, hx), torch.float32)


def module_info(cell: Cell):
    """Inputs and invalid inputs of a cell in torch's test suite."""
    pytest.importorskip("expecttest", reason="expecttest is not installed; torch.testing._internal requires it")
    pytest.importorskip("numpy", reason="numpy is not installed; torch.testing._internal requires it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal import common_modules
    (info,) = (i for i in common_modules.module_db if i.module_cls is getattr(torch.nn, cell.name))
    return info, common_modules


def samples(cell: Cell, dtype: torch.dtype, training: bool, requires_grad: bool = False) -> Iterator[tuple]:
    info, _ = module_info(cell)
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=training
    ):
        constructor = sample.constructor_input
        modules = []
        for of in (cells, torch.nn):
            torch.manual_seed(0)
            module = getattr(of, cell.name)(*constructor.args, **constructor.kwargs, dtype=dtype)
            modules.append(module.train(training))
        yield *modules, sample.forward_input, sample.reference_fn


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("cell", PLAIN[:3], ids=str)
def test_samples_of_torch(cell: Cell, training: bool) -> None:
    """test_forward, test_grad and test_gradgrad of torch's test_modules.py."""
    for dtype in (torch.float32, torch.float64):
        for ours, theirs, forward, definition in samples(cell, dtype, training):
            got = ours(*forward.args, **forward.kwargs)
            torch.testing.assert_close(got, definition(ours, *forward.args))
            torch.testing.assert_close(got, theirs(*forward.args, **forward.kwargs))
    for ours, _, forward, _ in samples(cell, torch.float64, training, requires_grad=True):
        x, hx = forward.args
        names, count = list(dict(ours.named_parameters())), len(states_of(hx))

        def call(x, *rest, ours=ours, names=names, n=count):
            hx = rest[:n] if n > 1 else rest[0]
            return torch.func.functional_call(ours, dict(zip(names, rest[n:], strict=True)), (x, hx))

        tensors = [x, *states_of(hx), *ours.parameters()]
        assert torch.autograd.gradcheck(call, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("cell", PLAIN[:3], ids=str)
def test_error_samples_of_torch(cell: Cell) -> None:
    """test_errors of torch's test_modules.py."""
    info, common = module_info(cell)
    count = 0
    for bad in info.module_error_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
    ):
        assert bad.error_on == common.ModuleErrorEnum.FORWARD_ERROR
        constructor, forward = bad.module_error_input.constructor_input, bad.module_error_input.forward_input
        module = getattr(cells, cell.name)(*constructor.args, **constructor.kwargs)
        with pytest.raises(bad.error_type, match=bad.error_regex):
            module(*forward.args, **forward.kwargs)
        count += 1
    assert count >= 4


# ---- invalid input

z = torch.zeros
WRONG = {
    "3-D input": (ValueError, "LSTMCell: Expected input to be 1D or 2D, got 3D instead", lambda m: m(z(2, 3, 5))),
    "0-D input": (ValueError, "LSTMCell: Expected input to be 1D or 2D, got 0D instead", lambda m: m(z(()))),
    "input_size": (RuntimeError, "input has inconsistent input_size: got 6 expected 5", lambda m: m(z(3, 6))),
    "unbatched input_size": (RuntimeError, "input has inconsistent input_size: got 6 expected 5", lambda m: m(z(6))),
    "3-D c": (
        *(ValueError, r"LSTMCell: Expected hx\[1\] to be 1D or 2D, got 3D instead"),
        lambda m: m(z(3, 5), (z(3, 7), z(1, 3, 7))),
    ),
    "batch of h": (
        *(RuntimeError, "Input batch size 3 doesn't match hidden0 batch size 4"),
        lambda m: m(z(3, 5), (z(4, 7), z(3, 7))),
    ),
    "batch of c": (
        *(RuntimeError, "Input batch size 3 doesn't match hidden1 batch size 4"),
        lambda m: m(z(3, 5), (z(3, 7), z(4, 7))),
    ),
    "width of c": (
        *(RuntimeError, "hidden1 has inconsistent hidden_size: got 8, expected 7"),
        lambda m: m(z(3, 5), (z(3, 7), z(3, 8))),
    ),
    "unbatched width": (
        *(RuntimeError, "hidden0 has inconsistent hidden_size: got 8, expected 7"),
        lambda m: m(z(5), (z(8), z(7))),
    ),
    "batched h": (
        *(RuntimeError, "For unbatched 1-D input, hx should also be 1-D but got 2-D tensor"),
        lambda m: m(z(5), (z(1, 7), z(1, 7))),
    ),
    "unbatched h": (
        *(RuntimeError, "For batched 2-D input, hx should also be 2-D but got 1-D tensor"),
        lambda m: m(z(3, 5), (z(7), z(7))),
    ),
    "one state": (
        *(TypeError, r"LSTMCell: hx must be a pair of tensors \(h0, c0\), got a tensor"),
        lambda m: m(z(3, 5), z(3, 7)),
    ),
    "three states": (TypeError, "LSTMCell: hx must be a pair of tensors", lambda m: m(z(3, 5), (z(3, 7),) * 3)),
    "numbers": (TypeError, "LSTMCell: hx must be a pair of tensors", lambda m: m(z(3, 5), (1, 2))),
    "list input": (TypeError, "LSTMCell: input must be a tensor, got a list", lambda m: m([1.0, 2.0])),
    "dtype": (
        *(TypeError, "weights must have the dtype of input, torch.float64, got torch.float32"),
        lambda m: m(z(3, 5, dtype=torch.float64)),
    ),
    "dtype of h": (
        *(TypeError, "h0 must have the dtype of input, torch.float32, got torch.float64"),
        lambda m: m(z(3, 5), (z(3, 7, dtype=torch.float64), z(3, 7))),
    ),
    "integers": (NotImplementedError, "LSTMCell: no backend supports", lambda m: m(z(3, 5, dtype=torch.int64))),
    "another device": (ValueError, "weights must be on the device of input, meta", lambda m: m(z(3, 5, device="meta"))),
    "h on another device": (
        *(ValueError, "h0 must be on the device of input, cpu, got meta"),
        lambda m: m(z(3, 5), (z(3, 7, device="meta"), z(3, 7))),
    ),
}


@pytest.mark.parametrize("options", [dict(), dict(peephole=True)], ids=["plain", "peephole"])
@pytest.mark.parametrize("name", WRONG)
def test_invalid_input(name: str, options: dict) -> None:
    error, message, call = WRONG[name]
    module = cells.LSTMCell(5, 7, **options)
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), pytest.raises(error, match=message):
            call(module)


@pytest.mark.parametrize("name", ["GRUCell", "RNNCell"])
def test_invalid_input_of_cells_with_one_state(name: str) -> None:
    module = getattr(cells, name)(5, 7)
    for error, message, call in (
        (ValueError, f"{name}: Expected input to be 1D or 2D, got 3D instead", lambda: module(z(2, 3, 5))),
        (ValueError, f"{name}: Expected hidden to be 1D or 2D, got 3D instead", lambda: module(z(3, 5), z(1, 3, 7))),
        (RuntimeError, "hidden0 has inconsistent hidden_size: got 8, expected 7", lambda: module(z(3, 5), z(3, 8))),
        (TypeError, f"{name}: hx must be a tensor h0, got a tuple", lambda: module(z(3, 5), (z(3, 7),))),
    ):
        with pytest.raises(error, match=message):
            call()


def test_invalid_nonlinearity() -> None:
    """Raises in forward, as in torch."""
    for of in (cells, torch.nn):
        module = of.RNNCell(5, 7, nonlinearity="sine")
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: sine"):
            module(z(3, 5))


def test_change_of_nonlinearity() -> None:
    ours, theirs = TANH.pair(5, 7)
    ours.nonlinearity = theirs.nonlinearity = "relu"
    x = torch.randn(3, 5)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "cell, error, message",
    [
        (
            lstm(variational_dropout=0.1),
            TypeError,
            r"LSTMCell.__init__\(\) got an unexpected keyword argument 'variational_",
        ),
        (lstm(memory_efficient=True), TypeError, "unexpected keyword argument 'memory_efficient'"),
        (lstm(reset_after=False), TypeError, "unexpected keyword argument 'reset_after'"),
        (gru(peephole=True), TypeError, r"GRUCell.__init__\(\) got an unexpected keyword argument 'peephole'"),
        (
            lstm(layer_norm=True, coupled_gates=True),
            ValueError,
            "LSTMCell: layer_norm excludes coupled_gates, got both",
        ),
        (lstm(forget_bias=1.0, bias=False), ValueError, "LSTMCell: forget_bias excludes bias=False, got both"),
        (lstm(num_heads=3), ValueError, "LSTMCell: num_heads must divide hidden_size, 7, got 3"),
        (lstm(zoneout_h=1.0), ValueError, r"LSTMCell: zoneout_h must lie in \[0, 1\), got 1.0"),
        (lstm(cell_clip=0.0), ValueError, "LSTMCell: cell_clip must be None or above 0, got 0.0"),
        (gru(layer_norm=1), TypeError, "GRUCell: layer_norm must be a bool, got int"),
    ],
    ids=str,
)
def test_invalid_options(cell: Cell, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cell.ours(5, 7)


# ---- functions and ops


@each
def test_functions_match_torch(cell: Cell) -> None:
    ours, theirs = getattr(functional, FUNCTIONS[cell]), getattr(torch, FUNCTIONS[cell])
    module, _ = cell.pair(5, 7)
    x, hx, weights = torch.randn(4, 5), cell.hx(4, 7), list(module.parameters())
    torch.testing.assert_close(ours(x, hx, *weights), theirs(x, hx, *weights))
    torch.testing.assert_close(ours(x, hx, *weights[:2]), theirs(x, hx, *weights[:2]))
    named = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights, strict=True))
    torch.testing.assert_close(ours(input=x, hx=hx, **named), theirs(input=x, hx=hx, **named))
    zero = rebuilt(hx, torch.zeros_like)
    assert torch.equal(states_of(ours(x, None, *weights))[0], states_of(ours(x, zero, *weights))[0])


@each
def test_invalid_weights(cell: Cell) -> None:
    function, G = getattr(functional, FUNCTIONS[cell]), cell.gates * 7
    x, w, b = z(4, 5), (z(G, 5), z(G, 7)), (z(G), z(G))
    rows = f"{cell.gates}H" if cell.gates > 1 else "H"
    for error, message, weights in (
        (ValueError, "weights must be w_ih, w_hh", (*w, z(G), None)),
        (ValueError, rf"weight_hh must have shape \[{rows}, H\] = \[{G}, 7\], got \[{G}, 6\]", (w[0], z(G, 6), *b)),
        (ValueError, rf"bias_hh must have shape \[{rows}\] = \[{G}\], got \[{G + 1}\]", (*w, z(G), z(G + 1))),
        (ValueError, rf"weight_ih must have shape \[{rows}, D\] = \[{G}, 5\], got \[{G + 1}, 5\]", (z(G + 1, 5), w[1])),
        (ValueError, "weight_hh must have shape", (w[0], z(G), *b)),
        (TypeError, "weights must be tensors, got a list", ([1.0], w[1], *b)),
        (TypeError, "weights must have the dtype of input", (w[0].double(), w[1], *b)),
    ):
        with pytest.raises(error, match=message):
            function(x, None, *weights)


@each
def test_ops(cell: Cell) -> None:
    name = FUNCTIONS[cell]
    infer, forward, backward = (
        getattr(torch.ops.seqkernels, name + end).default for end in ("", "_forward", "_backward")
    )
    for batch in ((3,), ()):
        module, _ = cell.pair(5, 7)
        weights = [p.detach() for p in module.parameters()]
        x, states0 = torch.randn(*batch, 5), states_of(cell.hx(*batch, 7))
        tests = ("test_schema", "test_faketensor")
        for w in (weights, [*weights[:2], None, None]):
            for s in (states0, [None] * cell.states):
                inputs = x, *s, *w
                torch.library.opcheck(infer, inputs, test_utils=tests)
                torch.library.opcheck(forward, inputs, test_utils=tests)
                kept = forward(*inputs)
                for needs in ((True, True, True), (False, False, True), (True, False, False)):
                    upstream = upstream_of(kept[: cell.states])
                    torch.library.opcheck(backward, (*upstream, *inputs, *kept, *needs), test_utils=tests)
                    dx, *rest = backward(*upstream, *inputs, *kept, *needs)
                    given = [
                        dx is not None,
                        any(g is not None for g in rest[: cell.states]),
                        rest[cell.states] is not None,
                    ]
                    assert given == [needs[0], needs[1] and s is states0, needs[2]]


@each
def test_ops_with_strided_arguments(cell: Cell) -> None:
    name = FUNCTIONS[cell]
    forward, backward = (getattr(ops, name + end) for end in ("_forward", "_backward"))
    inputs = torch.randn(3, 5), *states_of(cell.hx(3, 7)), *(p.detach() for p in cell.pair(5, 7)[0].parameters())
    kept = forward(*inputs)
    arguments = *upstream_of(kept[: cell.states]), *inputs, *kept
    found, wanted = (backward(*map(form, arguments), True, True, True) for form in (spread, torch.clone))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@each
def test_ops_check_shapes(cell: Cell) -> None:
    name, G = FUNCTIONS[cell], cell.gates * 7
    infer, forward, backward = (
        getattr(torch.ops.seqkernels, name + end).default for end in ("", "_forward", "_backward")
    )
    x, states0, weights = z(4, 5), [z(4, 7)] * cell.states, [z(G, 5), z(G, 7), z(G), z(G)]
    kept = forward(x, *states0, *weights)
    good = [x, *states0, *weights]
    first = 1 + cell.states
    for i, wrong, message in (
        (0, z(4, 6), "weight_ih must have shape"),
        (0, z(2, 4, 5), r"x must have shape \[B, D\] or \[D\], got \[2, 4, 5\]"),
        (0, z(4, 5, dtype=torch.int32), "x must be float32"),
        (1, z(3, 7), r"h0 must have shape \[4, 7\], got \[3, 7\]"),
        (1, z(28), r"h0 must have shape \[4, 7\], got \[28\]"),
        (1, z(4, 7, dtype=torch.float64), "h0 must have the dtype of x, got float64"),
        (first, z(G, 4), "weight_ih must have shape"),
        (first + 1, z(G, 8), "must have shape"),
        (first + 1, z(G), "weight_hh must have shape"),
        (first + 2, z(G - 1), "bias_ih must have shape"),
        (first + 3, None, "bias_ih and bias_hh must both be given, or neither"),
    ):
        arguments = [*good[:i], wrong, *good[i + 1 :]]
        for op in (infer, forward):
            with pytest.raises(RuntimeError, match=message):
                op(*arguments)
        with pytest.raises(RuntimeError, match=message):
            backward(*[z(4, 7)] * cell.states, *arguments, *kept, True, True, True)
    for i, (wrong, message) in enumerate(
        [(z(3, 7), "dh must have shape"), (z(4, 8), "dc must have shape")][: cell.states]
    ):
        upstream = [z(4, 7)] * cell.states
        upstream[i] = wrong
        with pytest.raises(RuntimeError, match=message):
            backward(*upstream, *good, *kept, True, True, True)
    for i in range(len(kept)):
        wrong = [*kept[:i], z(4, kept[i].shape[1] + 1), *kept[i + 1 :]]
        with pytest.raises(
            RuntimeError, match=f"{['h', 'c'][: cell.states][i] if i < cell.states else 'saved'} must have"
        ):
            backward(*[z(4, 7)] * cell.states, *good, *wrong, True, True, True)


# ---- compilation, torch.func, autocast


@pytest.mark.parametrize("cell", [*PLAIN[:3], lstm(peephole=True, num_heads=2), gru(layer_norm=True)], ids=str)
def test_compile_without_a_graph_break(cell: Cell) -> None:
    module = cell.ours(5, 18)
    x, hx = torch.randn(4, 5), cell.hx(4, 18)

    class Loop(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, hx):
            for _ in range(3):
                hx = self.module(x, hx)
            return hx

    loop = Loop()
    assert_near(everything(compiled(loop), x, hx), everything(loop, x, hx), torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(loop)(x[0], None), loop(x[0], None))


@each
def test_compile_with_dynamic_batch(cell: Cell) -> None:
    module = cell.ours(5, 7)
    call = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for B in (3, 4, 9):
            x, hx = torch.randn(B, 5), cell.hx(B, 7)
            torch.testing.assert_close(call(x, hx), module(x, hx))


@pytest.mark.parametrize("cell", [*PLAIN, lstm(layer_norm=True), gru(reset_after=False)], ids=str)
def test_vmap_and_per_sample_gradients(cell: Cell) -> None:
    module = cell.ours(5, 8, dtype=torch.float64)
    weights = {n: p.detach() for n, p in module.named_parameters()}
    xs = torch.randn(3, 2, 5, dtype=torch.float64)
    hx = cell.hx(2, 8, dtype=torch.float64)

    def call(weights, x: Tensor) -> tuple[Tensor, ...]:
        return states_of(torch.func.functional_call(module, weights, (x, hx)))

    def loss(weights, x: Tensor) -> Tensor:
        return sum(s.square().sum() for s in call(weights, x))

    want = [torch.stack(of) for of in zip(*(call(weights, x) for x in xs))]
    torch.testing.assert_close(list(torch.vmap(call, in_dims=(None, 0))(weights, xs)), want)
    ensemble = {n: torch.stack([p, -p]) for n, p in weights.items()}
    got = torch.vmap(call, in_dims=(0, None))(ensemble, xs[0])
    want = [call({n: p[i] for n, p in ensemble.items()}, xs[0]) for i in range(2)]
    torch.testing.assert_close(list(got), [torch.stack(of) for of in zip(*want)])
    got = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, xs)
    for i, x in enumerate(xs):
        parameters = {n: p.clone().requires_grad_() for n, p in weights.items()}
        want = torch.autograd.grad(loss(parameters, x), list(parameters.values()))
        torch.testing.assert_close([g[i] for g in got.values()], list(want))


@pytest.mark.parametrize("cell", [*PLAIN[:3], lstm(cell_clip=0.5, peephole=True)], ids=str)
def test_jvp_is_the_transpose_of_vjp(cell: Cell) -> None:
    module = cell.ours(5, 8, dtype=torch.float64)
    x, hx = torch.randn(2, 5, dtype=torch.float64), cell.hx(2, 8, dtype=torch.float64)
    primals = (x, *states_of(hx))

    def call(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        return states_of(module(x, states if len(states) > 1 else states[0]))

    tangents = tuple(torch.randn_like(p) for p in primals)
    outputs, pushed = torch.func.jvp(call, primals, tangents)
    want, pull = torch.func.vjp(call, *primals)
    upstream = tuple(torch.randn_like(out) for out in outputs)
    torch.testing.assert_close(outputs, want)
    left = sum((a * b).sum() for a, b in zip(pushed, upstream, strict=True))
    right = sum((a * b).sum() for a, b in zip(pull(upstream), tangents, strict=True))
    torch.testing.assert_close(left, right)
    with forward_ad.dual_level():
        dual = states_of(call(forward_ad.make_dual(x, tangents[0]), *primals[1:]))
        tangent = forward_ad.unpack_dual(dual[0]).tangent
    zero = tuple(map(torch.zeros_like, tangents[1:]))
    torch.testing.assert_close(tangent, torch.func.jvp(call, primals, (tangents[0], *zero))[1][0])


@pytest.mark.parametrize("cell", [*PLAIN, lstm(peephole=True)], ids=str)
def test_autocast_computes_in_bfloat16(cell: Cell) -> None:
    module = cell.ours(5, 8)
    x, hx = torch.randn(4, 5), cell.hx(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        states = states_of(module(x, hx))
        sum(s.float().sum() for s in states).backward()
    with torch.no_grad():
        want = copy.deepcopy(module).bfloat16()(x.bfloat16(), rebuilt(hx, Tensor.bfloat16))
    assert all(s.dtype == torch.bfloat16 for s in states)
    assert all(torch.equal(a, b) for a, b in zip(states, states_of(want), strict=True))
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    module.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert states_of(module(x.double()))[0].dtype == torch.float64


@each
def test_deepcopy_shares_kinds_and_options(cell: Cell) -> None:
    """Kinds and options remain the same objects, so that comparisons by `is` work."""
    copied = copy.deepcopy(cell.ours(5, 8))
    assert copied._kind is layer_ops.KINDS[FUNCTIONS[cell].removesuffix("_cell")]


def test_every_function_and_module_is_exported() -> None:
    for name in NAMES:
        assert getattr(seqkernels.functional, name).__doc__ and name in functional.__all__
        assert re.search(f"torch.{name}", getattr(functional, name).__doc__)
    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        assert getattr(seqkernels.nn, name) is getattr(cells, name) and name in seqkernels.nn.__all__
