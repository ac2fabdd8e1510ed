"""Prepared recurrent modules: bits of float32, int8 against an exact emulation, forms of input, streams, errors."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from conftest import ISAS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import seqkernels
import seqkernels.nn as sk
from seqkernels import _C, inference
from seqkernels.inference import _ops
from seqkernels.reference import quantized
from seqkernels.reference import recurrent as reference
from support.fuzzing import bounded, restrided, strides

WEIGHTS = tuple(_ops.PRECISIONS)
TOLERANCE = {"float32": 0.0, "bfloat16": 0.03, "float16": 4e-3, "int8": 0.1}


@dataclasses.dataclass(frozen=True)
class Layer:
    why: str
    make: Callable[..., nn.Module]  # (D, H, **options of all layers)
    options: dict = dataclasses.field(default_factory=dict)

    def __call__(self, D: int = 5, H: int = 20, **more) -> nn.Module:
        torch.manual_seed(0)
        module = self.make(D, H, **{**self.options, **more}).eval()
        for p in module.parameters():
            nn.init.uniform_(p, -0.6, 0.6)
        return module

    def __str__(self) -> str:
        return self.why


LAYERS = [
    Layer("lstm", sk.LSTM),
    Layer("torch lstm", nn.LSTM),
    Layer("lstm projected", sk.LSTM, dict(proj_size=7)),
    Layer("torch lstm projected", nn.LSTM, dict(proj_size=7)),
    Layer("lstm without bias", sk.LSTM, dict(bias=False)),
    Layer("lstm peephole", sk.LSTM, dict(peephole=True, cell_clip=0.5, gate_clip=1.5)),
    Layer("lstm coupled", sk.LSTM, dict(coupled_gates=True, zoneout_h=0.1, zoneout_c=0.2)),
    Layer("lstm norm", sk.LSTM, dict(layer_norm=True, norm_eps=1e-3)),
    Layer("lstm heads", sk.LSTM, dict(num_heads=4)),
    Layer("lstm initial state", sk.LSTM, dict(learn_initial_state=True)),
    Layer("nested lstm", sk.NestedLSTM),
    Layer("nested lstm without bias", sk.NestedLSTM, dict(bias=False)),
    Layer("gru", sk.GRU),
    Layer("torch gru", nn.GRU),
    Layer("gru without bias", nn.GRU, dict(bias=False)),
    Layer("gru before", sk.GRU, dict(reset_after=False)),
    Layer("gru before heads", sk.GRU, dict(reset_after=False, num_heads=2)),
    Layer("gru norm", sk.GRU, dict(layer_norm=True)),
    Layer("gru projected", sk.GRU, dict(proj_size=6)),
    Layer("dreamer gru", sk.DreamerGRU),
    Layer("dreamer gru heads", sk.DreamerGRU, dict(num_heads=4)),
    Layer("mgu", sk.MGU),
    Layer("mgu after", sk.MGU, dict(reset_after=True)),
    Layer("rnn", sk.RNN),
    Layer("torch rnn", nn.RNN),
    Layer("rnn relu", sk.RNN, dict(nonlinearity="relu")),
    Layer("torch rnn relu", nn.RNN, dict(nonlinearity="relu")),
    Layer("slstm", sk.SLSTM),
    Layer("slstm exp heads", sk.SLSTM, dict(forget_gate="exp", num_heads=2)),
]
CELLS = [
    Layer("lstm cell", sk.LSTMCell),
    Layer("torch lstm cell", nn.LSTMCell),
    Layer("lstm cell peephole", sk.LSTMCell, dict(peephole=True)),
    Layer("lstm cell norm", sk.LSTMCell, dict(layer_norm=True)),
    Layer("gru cell", sk.GRUCell),
    Layer("torch gru cell without bias", nn.GRUCell, dict(bias=False)),
    Layer("gru cell before", sk.GRUCell, dict(reset_after=False)),
    Layer("dreamer gru cell", sk.DreamerGRUCell),
    Layer("rnn cell", sk.RNNCell),
    Layer("torch rnn cell relu", nn.RNNCell, dict(nonlinearity="relu")),
]
each_layer = pytest.mark.parametrize("layer", LAYERS, ids=str)
each_cell = pytest.mark.parametrize("layer", CELLS, ids=str)
each_weights = pytest.mark.parametrize("weights", WEIGHTS)


def prepared(module: nn.Module, weights: str = "float32") -> nn.Module:
    made, report = inference.prepare(module, weights)
    assert not report.left
    return made


def ours(module: nn.Module) -> nn.Module:
    """The module of seqkernels with the weights of a module of torch."""
    if type(module).__module__.startswith("seqkernels"):
        return module
    name = type(module).__name__
    keys = ("bias",) if name.endswith("Cell") else ("bias", "num_layers", "bidirectional", "batch_first")
    keys += ("nonlinearity",) if name.startswith("RNN") else ("proj_size",) if name == "LSTM" else ()
    made = getattr(sk, name)(module.input_size, module.hidden_size, **{k: getattr(module, k) for k in keys}).eval()
    made.load_state_dict(module.state_dict())
    return made


def flat(result) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def assert_bits(got, want) -> None:
    got, want = flat(got), flat(want)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b), (a - b).abs().max()


def states_like(module: nn.Module, B: int, cell: bool = False):
    _, _, kind = inference._modules.family_and_options(module)
    H, P = module.hidden_size, getattr(module, "proj_size", 0) or module.hidden_size
    lead = () if cell else (module.num_layers * (1 + module.bidirectional),)
    states = tuple(torch.rand(*lead, B, P if s == "h" else H) - 0.4 for s in kind.states)
    if len(states) == 4:  # the normaliser of an sLSTM is positive
        states[2].add_(1)
    return states if len(states) > 1 else states[0]


# ---- float32 weights: the bits of seqkernels.nn


@each_layer
@pytest.mark.parametrize("D, H", [(5, 20), (1, 40), (9, 72)])
def test_float32_has_the_bits_of_the_layer(layer, D, H) -> None:
    module = layer(D, H)
    x, hx = torch.randn(6, 3, D), states_like(module, 3)
    with torch.no_grad():
        assert_bits(prepared(module)(x, hx), ours(module)(x, hx))
        assert_bits(prepared(module)(x), ours(module)(x))


@each_layer
@pytest.mark.parametrize("isa", ISAS)
def test_stacked_bidirectional_layers(layer, isa) -> None:
    if "projected" in str(layer) and "gru" in str(layer):
        H = 24
    else:
        H = 20
    module = layer(5, H, num_layers=3, bidirectional=True)
    x, lengths = torch.randn(7, 4, 5), torch.tensor([3, 7, 0, 5])
    before = _C.set_isa(isa)
    try:
        with torch.no_grad():
            assert_bits(prepared(module)(x, lengths=lengths), ours(module)(x, lengths=lengths))
            batch = pack_sequence([x[:n, b] for b, n in enumerate([3, 7, 1, 5])], enforce_sorted=False)
            assert_bits(prepared(module)(batch), ours(module)(batch))
            reset = torch.rand(7, 4) < 0.3
            if not getattr(module, "learn_initial_state", False):
                assert_bits(prepared(module)(x, reset=reset), ours(module)(x, reset=reset))
    finally:
        _C.set_isa(before)


@each_cell
def test_float32_has_the_bits_of_the_cell(layer) -> None:
    module = layer()
    x, hx = torch.randn(3, 5), states_like(module, 3, cell=True)
    with torch.no_grad():
        assert_bits(prepared(module)(x, hx), ours(module)(x, hx))
        assert_bits(prepared(module)(x), ours(module)(x))
        one = tuple(s[0] for s in hx) if isinstance(hx, tuple) else hx[0]
        assert_bits(prepared(module)(x[0], one), ours(module)(x[0], one))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_weights
def test_half_modules(dtype, weights) -> None:
    module = LAYERS[0]().to(dtype)
    x, hx = torch.randn(6, 3, 5, dtype=dtype), tuple(s.to(dtype) for s in states_like(module, 3))
    with torch.no_grad():
        got, want = prepared(module, weights)(x, hx), module.double()(x.double(), tuple(s.double() for s in hx))
    for a, b in zip(flat(got), flat(want)):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=TOLERANCE[weights] + 0.02, rtol=0)


# ---- packing


@each_weights
@pytest.mark.parametrize(
    "gates, first, heads, H, K", [(4, 4, 1, 20, 7), (3, 2, 2, 9, 5), (2, 1, 1, 33, 4), (1, 1, 1, 70, 6)]
)
def test_unpack_inverts_pack(weights, gates, first, heads, H, K) -> None:
    weight = torch.randn(gates * heads * H, K)
    how = _ops.Packing(gates, first, heads, WEIGHTS.index(weights))
    packed, scales = _ops.pack(weight, how)
    assert packed.dtype == _ops.PRECISIONS[weights]
    assert packed.shape == _ops._fake_pack(weight, *how)[0].shape
    got = _ops.unpack(packed, scales, *weight.shape, how)
    if weights == "int8":
        values, scale = quantized.quantize_rows(weight)
        assert_bits(scales, scale)
        assert_bits(got, values.float() * scale.unsqueeze(1))
    else:
        assert_bits(got, weight.to(_ops.PRECISIONS[weights]).float())


@pytest.mark.parametrize("weights", ["bfloat16", "float16"])
@each_layer
@pytest.mark.parametrize("isa", ISAS)
def test_rounded_weights_have_the_bits_of_a_layer_with_these_weights(layer, weights, isa) -> None:
    """Only the matrices are rounded."""
    module = layer(5, 24, num_layers=2, bidirectional=True)
    rounded = ours(copy.deepcopy(module))
    for name, p in rounded.named_parameters():
        if p.dim() == 2 and name.startswith("weight"):
            p.data = p.data.to(_ops.PRECISIONS[weights]).float()
    x, hx = torch.randn(6, 3, 5), states_like(module, 3)
    before = _C.set_isa(isa)
    try:
        with torch.no_grad():
            assert_bits(prepared(module, weights)(x, hx), rounded(x, hx))
    finally:
        _C.set_isa(before)


# ---- int8


def reference_step(module: nn.Module, x: Tensor, hx, ranges=()) -> tuple[Tensor, ...]:
    """One step of a layer of one direction with int8 products: states."""
    _, options, kind = inference._modules.family_and_options(module)
    states0 = [s.unsqueeze(0) if s.dim() == 2 else s for s in (hx if isinstance(hx, tuple) else (hx,))]
    projected = getattr(module, "proj_size", 0) > 0
    table = kind.weights(bool(module.bias), projected, options.peephole, options.num_heads > 1)
    suffix = "_l0" if hasattr(module, "num_layers") else ""
    weights = [getattr(module, w.name + suffix).detach() for w in table]
    inf = float("inf")
    numbers = [options.cell_clip or inf, options.gate_clip or inf, options.zoneout_h, options.zoneout_c, 0.0]
    with quantized.int8_products(ranges):
        outputs = reference.layer(
            kind.name, x, states0, weights, bias=bool(module.bias), projected=projected, peephole=options.peephole,
            heads=options.num_heads, numbers=[*numbers, options.norm_eps],
        )  # fmt: skip
    return outputs[1 : 1 + len(kind.states)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("K", [1, 3, 4, 31, 130, 600])
@pytest.mark.parametrize("B", [1, 2, 3, 7, 70])
def test_int8_products_are_exact(isa, K, B) -> None:
    """A ReLU layer without state returns its pre-activations: every bit is that of the emulation."""
    torch.manual_seed(B)
    module = nn.RNN(K, 45, nonlinearity="relu").eval()
    x = torch.randn(1, B, K) * torch.logspace(-3, 3, B).view(1, B, 1)
    x[0, 0] = 3.0  # saturates every value
    module.weight_ih_l0.data[0] = 2.0
    module.weight_ih_l0.data[1] = 0.0
    module.weight_ih_l0.data[2] = -2.0
    before = _C.set_isa(isa)
    try:
        with torch.no_grad():
            y, _ = prepared(module, "int8")(x, torch.zeros(1, B, 45))
            h0 = torch.rand(1, B, 45)
            y2, _ = prepared(module, "int8")(x, h0)
    finally:
        _C.set_isa(before)
    bias = (module.bias_ih_l0 + module.bias_hh_l0).detach()
    from_x = quantized.int8_linear(x[0], module.weight_ih_l0.detach())
    assert_bits(y[0], torch.relu(from_x + (bias + torch.zeros(B, 45))))
    from_h = quantized.int8_linear(h0[0], module.weight_hh_l0.detach())
    assert_bits(y2[0], torch.relu(from_x + (bias + from_h)))


@each_layer
@pytest.mark.parametrize("isa", ISAS)
def test_int8_step_is_that_of_the_emulation(layer, isa) -> None:
    module = layer(9, 24)
    x, hx = torch.randn(1, 3, 9), states_like(module, 3)
    before = _C.set_isa(isa)
    try:
        with torch.no_grad():
            got = flat(prepared(module, "int8")(x, hx)[1])
            want = reference_step(module, x, hx)
    finally:
        _C.set_isa(before)
    for a, b in zip(got, want):
        if "two-stage" not in str(layer):
            torch.testing.assert_close(a, b, atol=step_tolerance(layer), rtol=2e-6)


def step_tolerance(layer: Layer) -> float:
    """The second product of a step reads values that differ by rounding, which may move an int8 value by one."""
    second = ("nested", "before", "projected", "mgu")
    return 2e-2 if any(name in str(layer) for name in second) and "after" not in str(layer) else 5e-6


@each_cell
def test_int8_cell_is_that_of_the_emulation(layer) -> None:
    module = layer(9, 24)
    x, hx = torch.randn(3, 9), states_like(module, 3, cell=True)
    with torch.no_grad():
        got, want = flat(prepared(module, "int8")(x, hx)), reference_step(module, x.unsqueeze(0), hx)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b.squeeze(0), atol=step_tolerance(layer), rtol=2e-6)


@each_weights
@each_layer
def test_error_is_bounded(layer, weights) -> None:
    """Against float64, over several steps."""
    module = layer(9, 24, num_layers=2)
    for p in module.parameters():
        p.data.mul_(0.4)
    x = torch.randn(8, 3, 9)
    with torch.no_grad():
        got, want = prepared(module, weights)(x)[0], ours(module).double()(x.double())[0]
    assert (got - want).abs().max() <= max(TOLERANCE[weights], 1e-5)
    if weights != "float32":
        assert not torch.equal(got, want.float())


@each_weights
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[7], LAYERS[10], LAYERS[12], LAYERS[20]], ids=str)
def test_nan_and_infinity_stay_visible(layer, weights) -> None:
    """In the sequence where they occur, from that step on; other sequences keep their bits."""
    module = prepared(layer(6, 20), weights)
    x = torch.randn(5, 3, 6)
    with torch.no_grad():
        clean = module(x)[0]
        x[2, 1, 3] = float("nan")
        got = module(x)[0]
        assert torch.equal(got[:, [0, 2]], clean[:, [0, 2]]) and torch.equal(got[:2], clean[:2])
        assert got[2:, 1].isnan().all()
        if weights == "int8":
            x[2, 1, 3] = float("inf")
            assert module(x)[0][2:, 1].isnan().all()


def test_nan_in_a_weight_stays_visible() -> None:
    module = nn.RNN(4, 10).eval()
    module.weight_ih_l0.data[3, 1] = float("nan")
    with torch.no_grad():
        y, _ = prepared(module, "int8")(torch.randn(1, 2, 4))
    assert y[..., 3].isnan().all() and not y[..., :3].isnan().any()


def test_rows_of_zeros_and_of_tiny_values() -> None:
    module = nn.RNN(4, 10, nonlinearity="relu").eval()
    x = torch.stack([torch.zeros(4), torch.full((4,), 1e-35), torch.ones(4)]).unsqueeze(0)
    with torch.no_grad():
        y, _ = prepared(module, "int8")(x)
    bias = (module.bias_ih_l0 + module.bias_hh_l0).detach().relu()
    assert torch.equal(y[0, 0], bias) and torch.equal(y[0, 1], bias) and not torch.equal(y[0, 2], bias)


# ---- same bits for any batch, padding, number of threads, split of time


@each_weights
@each_layer
def test_bits_of_a_sequence_alone_and_in_a_batch(layer, weights) -> None:
    H = 96 if not layer.options.get("num_heads") else 32
    module = prepared(layer(6, H, num_layers=2), weights)
    lengths = [9, 4, 0, 7, 9, 1, 5]
    x = torch.randn(9, 7, 6)
    with torch.no_grad():
        whole, states = module(x, lengths=lengths)
        threads = torch.get_num_threads()
        try:
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                assert_bits(module(x, lengths=lengths), (whole, states))
        finally:
            torch.set_num_threads(threads)
        padded = torch.cat([x, torch.full((3, 7, 6), float("nan"))])
        assert_bits(module(padded, lengths=lengths)[0][:9], whole)
        for b, n in enumerate(lengths):
            alone, last = module(x[:n, b : b + 1])
            assert_bits(alone, whole[:n, b : b + 1])
            for one, of_all in zip(flat(last), flat(states)):
                assert torch.equal(one[:, 0], of_all[:, b])


@each_weights
@each_layer
def test_a_stream_has_the_bits_of_the_whole(layer, weights) -> None:
    module = prepared(layer(6, 24, num_layers=2), weights)
    x = torch.randn(9, 2, 6)
    with torch.no_grad():
        whole, last = module(x, states := states_like_prepared(module, 2))
        pieces = []
        given = states
        for piece in (x[:1], x[1:5], x[5:]):
            y, out = module(piece, given, out_state=given)
            assert out is given or all(a is b for a, b in zip(flat(out), flat(given)))
            pieces.append(y)
        assert_bits(torch.cat(pieces), whole)
        assert_bits(given, last)


def states_like_prepared(module, B: int):
    states = tuple(torch.rand(shape) for shape in module._shapes(B))
    if len(states) == 4:
        states[2].add_(1)
    return states if len(states) > 1 else states[0]


@each_cell
@each_weights
def test_a_cell_updates_its_state_in_place(layer, weights) -> None:
    module = layer(6, 24)
    fast = prepared(module, weights)
    x = torch.randn(3, 6)
    for shape in ((3,), ()):
        given = x if shape else x[0]
        hx = states_like(module, 3, cell=True)
        if not shape:
            hx = tuple(s[0].contiguous() for s in hx) if isinstance(hx, tuple) else hx[0].contiguous()
        with torch.no_grad():
            want = fast(given, hx)
            kept = tuple(s.clone() for s in flat(hx))
            out = tuple(torch.full_like(s, 9.0) for s in kept)
            out = out if len(out) > 1 else out[0]
            fast(given, hx, out_state=out)
            assert_bits(out, want)
            assert_bits(flat(hx), list(kept))
            fast(given, hx, out_state=hx)
            assert_bits(hx, want)
            zeros = fast(given)
            fast(given, out_state=out)
            assert_bits(out, zeros)


def test_out_state_of_packed_padded_and_half() -> None:
    module = prepared(LAYERS[0](6, 24))
    x = torch.randn(5, 3, 6)
    batch = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    with torch.no_grad():
        hx = states_like_prepared(module, 3)
        want = module(batch, hx)[1]
        out = tuple(torch.empty_like(s) for s in hx)
        assert module(batch, hx, out_state=out)[1][0] is out[0]
        assert_bits(out, want)
        strided = tuple(torch.empty(1, 3, 48)[..., ::2] for _ in range(2))
        module(x, out_state=strided)
        assert_bits([s.contiguous() for s in strided], list(module(x)[1]))
        half = prepared(LAYERS[0](6, 24).half())
        state = tuple(s.half() for s in hx)
        want = half(x.half(), state)[1]
        half(x.half(), state, out_state=state)
        assert_bits(state, want)


def test_out_state_that_shares_memory() -> None:
    fast = prepared(nn.LSTM(8, 8).eval())
    x, h, c = torch.randn(4, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    z = torch.zeros(1, 3, 8)
    with torch.no_grad():
        output, want = fast(x, (h, c))
        swapped = h.clone(), c.clone()
        assert_bits(fast(x, swapped, out_state=swapped[::-1])[0], output)
        assert_bits(list(swapped[::-1]), list(want))
        kept = c.clone()
        out = (kept, z.clone())
        assert_bits(fast(x, (h, kept), out_state=out), (output, want))
        both = torch.randn(1, 3, 8)
        want = fast(x, (both, both))
        assert_bits(fast(x, (both, both), out_state=(torch.empty_like(z), torch.empty_like(z))), want)
        copy_of_x, wide = x.clone(), torch.zeros(2, 3, 8)
        for out, text in (
            ((z, z), "c of out_state must not share memory with h of out_state"),
            ((copy_of_x[:1], z), "h of out_state must not share memory with input"),
            ((z, copy_of_x[3:]), "c of out_state must not share memory with input"),
            ((wide[0:1], wide.flatten()[12:36].view(1, 3, 8)), "c of out_state must not share memory with h"),
            ((torch.zeros(1, 1, 8).expand(1, 3, 8), z), "h of out_state must not be an expanded tensor"),
        ):
            with pytest.raises(ValueError, match=f"LSTM: {text}"):
                fast(copy_of_x, (h, c), out_state=out)
        with pytest.raises(TypeError, match="LSTM: out_state must be a pair of tensors"):
            fast(x, out_state=z)
        cell = prepared(nn.GRUCell(8, 8).eval())
        with pytest.raises(ValueError, match="GRUCell: h of out_state must not share memory with input"):
            cell(x[0], out_state=x[0])


# ---- forms of input


@each_weights
def test_forms_of_input(weights) -> None:
    module = LAYERS[0](5, 20, batch_first=True, bidirectional=True)
    fast = prepared(module, weights)
    x = torch.randn(3, 6, 5)
    with torch.no_grad():
        y, states = fast(x)
        time_major = copy.deepcopy(fast)
        time_major.batch_first = False
        assert_bits((y.transpose(0, 1), states), time_major(x.transpose(0, 1)))
        for b in range(3):
            one, last = fast(x[b])
            assert_bits(one, y[b])
            assert_bits(list(last), [s[:, b] for s in states])
        strided = torch.full((3, 6, 10), float("nan"))[..., ::2].copy_(x)
        assert_bits(fast(strided), (y, states))


@each_weights
@each_layer
def test_empty_batch_and_no_steps(layer, weights) -> None:
    module = prepared(layer(5, 24, num_layers=2), weights)
    with torch.no_grad():
        y, states = module(torch.randn(4, 0, 5))
        assert y.shape[:2] == (4, 0) and all(s.shape[1] == 0 for s in flat(states))
        given = states_like_prepared(module, 3)
        y, states = module(torch.randn(0, 3, 5), given)
        assert y.shape[:2] == (0, 3)
        assert_bits(states, given)


def test_input_of_width_zero() -> None:
    module = nn.RNN(1, 10).eval()
    module.weight_ih_l0 = nn.Parameter(torch.zeros(10, 0))
    module.input_size = 0
    with torch.no_grad():
        for weights in WEIGHTS:
            y, _ = prepared(module, weights)(torch.zeros(3, 2, 0))
            assert y.isfinite().all()


# ---- calibration


def test_calibrated_ranges_are_those_of_the_data() -> None:
    module = nn.LSTM(5, 16, num_layers=2, bidirectional=True).eval()
    fast = prepared(module, "int8")
    data = [torch.randn(6, 3, 5), torch.randn(4, 2, 5) * 3]
    with torch.no_grad():
        dynamic = fast(data[0])[0]
        assert inference.calibrate(fast, data) is fast
        assert fast.ranges.shape == (2, 3)
        torch.testing.assert_close(fast.ranges[0, 0], max(x.abs().max() for x in data))
        static = fast(data[0])[0]
        exact = module(data[0])[0]
    assert not torch.equal(static, dynamic)
    assert (static - exact).abs().max() < 0.05
    again = pickle.loads(pickle.dumps(fast))
    with torch.no_grad():
        assert_bits(again(data[0])[0], static)


def test_static_ranges_saturate_and_keep_nan_visible() -> None:
    module = nn.RNN(4, 12, nonlinearity="relu").eval()
    fast = prepared(module, "int8")
    inference.calibrate(fast, [torch.ones(1, 1, 4)])
    x = torch.tensor([[[5.0, -5.0, 0.5, 0.0], [1.0, -1.0, 0.5, 0.0]]])
    with torch.no_grad():
        y, _ = fast(x)
        assert_bits(y[0, 0], y[0, 1])
        want = quantized.int8_linear(x[0], module.weight_ih_l0.detach(), largest=1.0)
        assert_bits(y[0], torch.relu(want + (module.bias_ih_l0 + module.bias_hh_l0)))
        x[0, 0, 2] = float("nan")
        assert fast(x)[0][0, 0].isnan().all()


def test_a_failed_calibration_changes_nothing() -> None:
    fast = prepared(nn.Sequential(nn.LSTM(3, 8)).eval(), "int8")
    x = torch.randn(4, 2, 3)
    inference.calibrate(fast, [x])
    ranges = fast[0].ranges.clone()
    fresh = prepared(nn.Sequential(nn.LSTM(3, 8)).eval(), "int8")
    fresh.load_state_dict(fast.state_dict())
    assert_bits(fresh[0].ranges, ranges)
    infinite = x.clone()
    infinite[0, 0, 0] = float("inf")
    for data, error, text in (
        ([x * 0.01, torch.randn(4, 3, 9)], RuntimeError, "input_size = 3"),
        ([x, infinite], ValueError, "calibrate: data must be finite, got NaN or infinity in LSTM"),
        ([x * float("nan")], ValueError, "calibrate: data must be finite"),
        ([x[:0]], ValueError, "calibrate: data must reach every int8 layer, got no values for 0"),
        (x, TypeError, "calibrate: data must be an iterable of batches, such as a list, got Tensor"),
        (3, TypeError, "calibrate: data must be an iterable of batches, such as a list, got int"),
    ):
        with pytest.raises(error, match=text):
            inference.calibrate(fast, data)
        assert_bits(fast[0].ranges, ranges)
        with torch.no_grad():
            assert fast(x)[0].isfinite().all()


def test_calibrate_reports_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r'calibrate: model must have a layer prepared with weights="int8", got none'):
        inference.calibrate(prepared(nn.LSTM(3, 4).eval()), [torch.zeros(1, 1, 3)])
    with pytest.raises(ValueError, match="calibrate: data must have at least one batch, got none"):
        inference.calibrate(prepared(nn.LSTM(3, 4).eval(), "int8"), [])


# ---- modules


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.Sequential(nn.LSTM(6, 8, bidirectional=True, batch_first=True))
        self.step = nn.GRUCell(16, 8)
        self.again = self.step
        self.out = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.encoder(self.embed(tokens))
        h = self.step(y[:, 0])
        return self.out(self.again(y[:, 1], h))


def test_prepare_replaces_at_any_depth_and_reports() -> None:
    model = Tagger().eval()
    tokens = torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        want = model(tokens)
        fast, report = inference.prepare(model)
        assert isinstance(model.encoder[0], nn.LSTM) and isinstance(fast.encoder[0], inference.PreparedRecurrent)
        assert fast.step is fast.again and isinstance(fast.step, inference.PreparedCell)
        torch.testing.assert_close(fast(tokens), want)
    assert set(report.prepared) == {"encoder.0", "step"} and not report.left
    assert report.prepared["encoder.0"][:2] == ("torch.nn.LSTM", sum(p.nbytes for p in model.encoder.parameters()))
    small = inference.prepare(model, "int8")[1]
    assert small.bytes_after < report.bytes_after and "encoder.0" in str(small) and "bytes as int8" in str(small)
    same, _ = inference.prepare(model, inplace=True)
    assert same is model and isinstance(model.step, inference.PreparedCell)
    _, report = inference.prepare(model)
    assert report.left["step"][1] == "it is already prepared" and not report.prepared
    assert "left: step" in str(report) and str(report).startswith("No module was prepared.")


def parametrized(module: nn.Module) -> nn.Module:
    return nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")


def pruned(module: nn.Module) -> nn.Module:
    return nn.utils.prune.l1_unstructured(module, "weight_hh_l0", 0.5)


class Empty(nn.GRU):
    """Overrides nothing."""


class Stand(sk.LSTM, nn.LSTM):
    pass


@pytest.mark.parametrize("make", [Empty, Stand])
def test_subclasses_that_override_nothing_are_prepared(make) -> None:
    module = make(3, 12).eval()
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(prepared(module)(x), module(x))


class Sub(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: Sub(3, 4), "its class is not one of torch.nn or seqkernels.nn, and overrides something"),
        (lambda: parametrized(nn.LSTM(3, 4)), "a parametrization, weight norm or pruning computes its weights"),
        (lambda: pruned(nn.LSTM(3, 4)), "a parametrization, weight norm or pruning computes its weights"),
        (lambda: nn.LSTM(3, 4).double(), "its weights must be float32, bfloat16 or float16, got torch.float64"),
        (lambda: nn.LSTM(3, 4, device="meta"), "its weights must be on the CPU, got meta"),
        (lambda: sk.LSTM(3, 4, return_all_states=True), "return_all_states needs the states of all steps"),
    ],
)
def test_what_is_left(make, reason) -> None:
    module = make().eval()
    same, report = inference.prepare(nn.ModuleDict({"a": module}), "int8", inplace=True)
    assert type(same["a"]) is type(module)
    assert report.left["a"][1].startswith(reason)


@each_weights
def test_state_dict_pickle_deepcopy_and_torch_save(weights) -> None:
    module = nn.Sequential(nn.GRU(5, 12, num_layers=2)).eval()
    fast = prepared(module, weights)
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        want = fast[0](x)
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert_bits(again[0](x), want)
        file = io.BytesIO()
        torch.save(fast.state_dict(), file)
        file.seek(0)
        other = prepared(nn.Sequential(nn.GRU(5, 12, num_layers=2)).eval(), weights)
        assert not torch.equal(other[0](x)[0], want[0])
        other.load_state_dict(torch.load(file))
        assert_bits(other[0](x), want)
    names = set(fast.state_dict())
    assert "0.packed_ih_l0" in names and ("0.scale_ih_l0" in names) == (weights == "int8")
    assert all(not p.requires_grad for p in fast.state_dict().values()) and not list(fast.parameters())


@each_weights
def test_a_change_of_a_packed_weight_is_seen(weights) -> None:
    fast = prepared(nn.LSTM(5, 12).eval(), weights)
    x = torch.randn(4, 2, 5)
    with torch.no_grad():
        before = fast(x)[0]
        fast.packed_hh_l0.zero_()
        fast.bias_sum_l0.add_(0.1)
        assert not torch.equal(fast(x)[0], before)


@each_weights
def test_export_and_compile(weights) -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(5, 12, num_layers=2, bidirectional=True)
            self.cell = nn.GRUCell(24, 8)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            y, (h, _) = self.layer(x, lengths=lengths) if lengths is not None else self.layer(x)
            return self.cell(y[-1]) + h.sum()

    fast = prepared(Stream().eval(), weights)
    x, lengths = torch.randn(6, 3, 5), torch.tensor([6, 2, 4])
    with torch.no_grad():
        want = fast(x, lengths)
        dims = {"x": {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}, "lengths": {0: torch.export.Dim.AUTO}}
        exported = torch.export.export(fast, (x, lengths), dynamic_shapes=dims)
        assert_bits(exported.module()(x, lengths), want)
        longer = torch.randn(9, 2, 5)
        assert_bits(exported.module()(longer, torch.tensor([9, 1])), fast(longer, torch.tensor([9, 1])))
        torch._dynamo.reset()
        assert_bits(torch.compile(fast, fullgraph=True, backend="aot_eager")(x, lengths), want)


def test_compile_updates_a_state_in_place() -> None:
    fast = prepared(nn.LSTM(5, 12).eval(), "int8")

    def step(x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return fast(x, (h, c), out_state=(h, c))[0]

    x, states = torch.randn(2, 3, 5), [torch.rand(1, 3, 12) for _ in range(2)]
    kept = [s.clone() for s in states]
    with torch.no_grad():
        want = step(x, *states)
        torch._dynamo.reset()
        got = torch.compile(step, fullgraph=True, backend="aot_eager")(x, *kept)
    assert_bits(got, want)
    assert_bits(kept, states)


@pytest.mark.parametrize("kind", ["lstm", "gru", "nested_lstm"])
def test_opcheck(kind) -> None:
    module = {"lstm": nn.LSTM, "gru": nn.GRU, "nested_lstm": sk.NestedLSTM}[kind](5, 12, num_layers=2).eval()
    fast = prepared(module, "int8")
    op = getattr(torch.ops.seqkernels, f"{kind}_prepared")
    states = states_like_prepared(fast, 3)
    states = list(states) if isinstance(states, tuple) else [states]
    rest = [fast._all_weights(), *fast._shape, None, None, torch.tensor([4, 0, 2]), None]
    torch.library.opcheck(op, (torch.randn(4, 3, 5), *states, *rest))
    torch.library.opcheck(op, (torch.randn(4, 3, 5), *[None] * len(states), *rest))
    update = getattr(torch.ops.seqkernels, f"{kind}_prepared_")
    torch.library.opcheck(update, (torch.randn(4, 3, 5), states, *rest), test_utils=("test_schema", "test_faketensor"))


def test_hooks_are_kept() -> None:
    module = nn.LSTM(3, 4).eval()
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    with torch.no_grad():
        prepared(module)(torch.zeros(1, 1, 3))
    assert seen == ["PreparedRecurrent"]


def test_threads_call_the_same_module() -> None:
    module = prepared(nn.LSTM(8, 40, num_layers=2).eval(), "int8")
    inputs = [torch.randn(5 + i, 1 + i, 8) for i in range(8)]
    with torch.no_grad():
        want = [module(x) for x in inputs]
    failures = []

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not all(torch.equal(a, b) for a, b in zip(flat(module(inputs[i])), flat(want[i]))):
                    failures.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


# ---- errors


def test_errors_of_prepare() -> None:
    with pytest.raises(TypeError, match=r"prepare: model must be a torch.nn.Module, got int"):
        inference.prepare(3)
    with pytest.raises(
        ValueError, match="prepare: weights must be one of float32, bfloat16, float16, int8, got 'int4'"
    ):
        inference.prepare(nn.LSTM(3, 4).eval(), "int4")
    with pytest.raises(ValueError, match=r"prepare: model must be in eval mode; call model.eval\(\) first"):
        inference.prepare(nn.Sequential(nn.LSTM(3, 4)))


def test_errors_of_calls() -> None:
    fast = prepared(nn.LSTM(3, 4).eval())
    x = torch.zeros(2, 5, 3)
    with pytest.raises(
        RuntimeError, match="LSTM: a prepared module computes no gradients, but input or hx requires one"
    ):
        fast(x.clone().requires_grad_())
    with pytest.raises(TypeError, match=r"LSTM: input must be torch.float32, got torch.float64"):
        fast(x.double())
    with pytest.raises(TypeError, match=r"LSTM: h of hx must be torch.float32, got torch.float16"):
        fast(x, (torch.zeros(1, 5, 4).half(), torch.zeros(1, 5, 4).half()))
    with pytest.raises(RuntimeError, match=r"LSTM: c of hx must have shape \[1, 5, 4\], got \[1, 5, 3\]"):
        fast(x, (torch.zeros(1, 5, 4), torch.zeros(1, 5, 3)))
    with pytest.raises(RuntimeError, match=r"LSTM: h of out_state must have shape \[1, 5, 4\], got \[1, 1, 4\]"):
        fast(x, out_state=(torch.zeros(1, 1, 4), torch.zeros(1, 5, 4)))
    with pytest.raises(RuntimeError, match=r"LSTM: input.size\(-1\) must be input_size = 3, got shape \[2, 5, 4\]"):
        fast(torch.zeros(2, 5, 4))
    with pytest.raises(ValueError, match=r"LSTM: input must be \[T, B, D\] or \[T, D\], got \[1, 2, 5, 3\]"):
        fast(torch.zeros(1, 2, 5, 3))
    with pytest.raises(TypeError, match="LSTM: input must be a tensor or PackedSequence, got list"):
        fast([1])
    with pytest.raises(ValueError, match=r"LSTM: lengths must lie in \[0, T\] = \[0, 2\], got 3"):
        fast(x, lengths=[3, 1, 1, 1, 1])
    with pytest.raises(NotImplementedError, match="LSTM: prepared modules run on the CPU; input is on meta"):
        fast(x.to("meta"))
    with pytest.raises(TypeError, match="LSTM: the dtype of packed weights cannot be changed"):
        fast.to(torch.bfloat16)
    with torch.no_grad():
        assert fast(x)[0].dtype == torch.float32  # unchanged by the refused conversion
    with pytest.raises(RuntimeError, match="LSTM: a prepared module must be in eval mode, got training mode"):
        copy.deepcopy(fast).train()(x)


def test_errors_of_the_ops() -> None:
    ops = torch.ops.seqkernels
    fast = prepared(nn.LSTM(3, 4).eval(), "int8")
    weights, shape = fast._all_weights(), fast._shape
    x = torch.zeros(2, 5, 3)
    rest = [None, None, None, None]

    def call(x=x, states=(None, None), weights=weights, shape=shape, rest=rest):
        return ops.lstm_prepared(x, *states, weights, *shape, *rest)

    with pytest.raises(RuntimeError, match="lstm_prepared: x must be float32, got float64"):
        call(x.double())
    with pytest.raises(RuntimeError, match="lstm_prepared: weights must hold 5 tensors for each of 1 layers and 1 "):
        call(weights=weights[:-1])
    with pytest.raises(RuntimeError, match=r"lstm_prepared: weight_ih must have shape \[\d+\], got \[3\]"):
        call(weights=[weights[0][:3], *weights[1:]])
    with pytest.raises(RuntimeError, match="lstm_prepared: weight_ih must be int8, got float32"):
        call(weights=[weights[0].float(), *weights[1:]])
    with pytest.raises(RuntimeError, match=r"lstm_prepared: c0 must have shape \[1, 5, 4\], got \[1, 5, 3\]"):
        call(states=[torch.zeros(1, 5, 4), torch.zeros(1, 5, 3)])
    with pytest.raises(RuntimeError, match="lstm_prepared_: states must hold 2 tensors, got 1"):
        ops.lstm_prepared_(x, [torch.zeros(1, 5, 4)], weights, *shape, *rest)
    with pytest.raises(RuntimeError, match="lstm_prepared_: h must be contiguous to be updated in place"):
        ops.lstm_prepared_(x, [torch.zeros(1, 5, 8)[..., ::2], torch.zeros(1, 5, 4)], weights, *shape, *rest)
    with pytest.raises(RuntimeError, match="lstm_prepared: precision must be 0"):
        call(shape=shape._replace(precision=4))
    with pytest.raises(RuntimeError, match="lstm_prepared: hidden_size and num_layers must be positive"):
        call(shape=shape._replace(hidden_size=0))
    with pytest.raises(RuntimeError, match="lstm_prepared: heads must divide hidden_size"):
        call(shape=shape._replace(heads=3))
    with pytest.raises(RuntimeError, match=r"lstm_prepared: lengths must lie in \[0, T\] = \[0, 2\], got 3 at 0"):
        call(rest=[None, None, torch.tensor([3, 1, 1, 1, 1]), None])
    with pytest.raises(RuntimeError, match="batch_sizes must sum to the rows of x, 10, got 5"):
        call(x.flatten(0, 1), rest=[None, torch.tensor([5]), None, None])
    with pytest.raises(RuntimeError, match=r"recurrent_pack: weight must have 2 dimensions, got \[3\]"):
        ops.recurrent_pack(torch.zeros(3), 1, 1, 1, 0)
    with pytest.raises(RuntimeError, match=r"recurrent_pack: gates \* heads must divide the rows of weight, 3"):
        ops.recurrent_pack(torch.zeros(3, 2), 2, 1, 1, 0)
    with pytest.raises(RuntimeError, match="must have at most 131072 columns in int8, got 131073"):
        ops.recurrent_pack(torch.zeros(1, 131073), 1, 1, 1, 3)


def test_largest_sums_do_not_overflow() -> None:
    K = 131072
    module = nn.RNN(K, 8, nonlinearity="relu", bias=False).eval()
    module.weight_ih_l0.data.fill_(1.0)
    with torch.no_grad():
        y, _ = prepared(module, "int8")(torch.full((1, 1, K), 2.0))
    scale = torch.tensor(2.0) / 127 * (torch.tensor(1.0) / 127)
    assert torch.equal(y[0, 0], (torch.tensor(127 * 127 * K).float() * scale).expand(8))


def test_build_info_names_dot_products() -> None:
    assert isinstance(seqkernels.build_info()["vnni"], bool)


# ---- random inputs


@bounded
@given(
    layer=st.sampled_from(LAYERS), weights=st.sampled_from(WEIGHTS), B=st.integers(1, 5), T=st.integers(1, 6),
    D=st.integers(1, 40), units=st.integers(1, 6), layers=st.integers(1, 2), bidirectional=st.booleans(),
    batch_first=st.booleans(), state=st.booleans(), data=st.data(), isa=st.sampled_from(ISAS),
    threads=st.integers(1, 3),
)  # fmt: skip
def test_random_inputs_match_the_layer(
    layer, weights, B, T, D, units, layers, bidirectional, batch_first, state, data, isa, threads
) -> None:
    """float32: the bits of the layer. Others: within the documented error of float64; packed as padded, bit for bit."""
    H = 12 * units
    module = layer(D, H, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first)
    for p in module.parameters():
        p.data.mul_(0.4)
    lengths = sorted(data.draw(st.lists(st.integers(1, T), min_size=B - 1, max_size=B - 1)), reverse=True)
    lengths = [T, *lengths]
    x = restrided(torch.randn((B, T, D) if batch_first else (T, B, D)), data.draw(strides))
    hx = states_like(module, B) if state else None
    made, alike = prepared(module, weights), ours(module)
    before = _C.set_isa(isa)
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            got = made(x, hx, lengths=torch.tensor(lengths))
            packed = made(pack_padded_sequence(x, lengths, batch_first=batch_first), hx)
            want = alike(x, hx, lengths=torch.tensor(lengths))
    finally:
        _C.set_isa(before)
    assert_bits(packed[0], pack_padded_sequence(got[0], lengths, batch_first=batch_first))
    assert_bits(packed[1], got[1])
    if weights == "float32":
        assert_bits(got, want)
    else:
        wide = copy.deepcopy(alike).double()
        states = None if hx is None else tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()
        with torch.no_grad():
            exact = wide(x.double(), states, lengths=torch.tensor(lengths))
        assert (got[0] - exact[0]).abs().max() <= TOLERANCE[weights]
