"""Invalid input of recurrent layers: an error that names the argument, or a defined result; never a crash."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence

from seqkernels import backend, functional
from seqkernels.nn import GRU, LSTM, LSTMCell, NestedLSTM
from support.cases import Case, make_inputs, run
from support.recurrent_errors import CALLS, CONSTRUCTORS, form, packed_of, raised, zeros

ops = torch.ops.seqkernels

T, B, D, H = 4, 3, 5, 6
PACKED = Case(B=B, T=T, D=D, H=H, lengths=(4, 2, 1), packed=True, why="packed")
DENSE = Case(B=B, T=T, D=D, H=H, why="dense")
PROJECTED = Case(B=B, T=T, D=D, H=H, P=2, bidirectional=True, why="projection")


# ---- modules: the same exceptions as torch for common arguments


@pytest.mark.parametrize("arguments", CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructor_errors_match_torch(arguments: dict) -> None:
    theirs, ours = (raised(lambda cls=cls: cls(**arguments)) for cls in (torch.nn.LSTM, LSTM))
    assert ours[0] is theirs[0]
    assert re.sub(r"\b\w*\.?__init__", "__init__", ours[1]) == re.sub(r"\b\w*\.?__init__", "__init__", theirs[1])


def test_constructor_warnings_match_torch() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        LSTM(2, 3, dropout=0.5)


@pytest.mark.parametrize(("constructor", "call"), CALLS.values(), ids=CALLS)
def test_module_errors_match_torch(constructor: dict, call: Callable) -> None:
    theirs, ours = (raised(lambda cls=cls: cls(D, H, **constructor)(*call())) for cls in (torch.nn.LSTM, LSTM))
    assert ours == theirs


# ---- modules: other errors


DTYPE = (TypeError, RuntimeError)  # the op checks the dtype of the state

MODULE = {
    "hx a tensor": (lambda m: m(zeros(T, B, D), zeros(1, B, H)), (TypeError, ValueError), form("hx")),
    "hx of three": (lambda m: m(zeros(T, B, D), (zeros(1, B, H),) * 3), (TypeError, ValueError), form("hx")),
    "hx of one": (lambda m: m(zeros(T, B, D), (zeros(1, B, H),)), (TypeError, ValueError), form("hx")),
    "hx of lists": (lambda m: m(zeros(T, B, D), ([0.0], [0.0])), TypeError, form("hx")),
    "hx of None": (lambda m: m(zeros(T, B, D), (None, zeros(1, B, H))), TypeError, form("hx")),
    "h0 dtype": (lambda m: m(zeros(T, B, D), (zeros(1, B, H).double(), zeros(1, B, H))), DTYPE, form("h0")),
    "c0 dtype": (lambda m: m(zeros(T, B, D), (zeros(1, B, H), zeros(1, B, H).half())), DTYPE, form("c0")),
    "h0 device": (
        lambda m: m(zeros(T, B, D), (zeros(1, B, H, device="meta"), zeros(1, B, H))),
        (ValueError, RuntimeError),
        form("h0", got=".*(meta|another device).*"),
    ),
    "input a list": (lambda m: m([[0.0]]), TypeError, form("input")),
    "input None": (lambda m: m(None), TypeError, form("input")),
    "input device": (
        lambda m: m(zeros(T, B, D, device="meta")),
        (ValueError, TypeError, NotImplementedError),
        r"LSTM: .*(device|meta)",
    ),
    "packed input device": (
        lambda m: m(PackedSequence(zeros(7, D, device="meta"), torch.tensor([3, 2, 1, 1]))),
        (ValueError, TypeError, NotImplementedError),
        r"LSTM: .*(device|meta)",
    ),
    "packed state of another batch": (
        lambda m: m(packed_of(D), (zeros(1, B + 1, H), zeros(1, B + 1, H))),
        RuntimeError,
        r"Expected hidden\[0\] size \(1, 3, 6\), got \[1, 4, 6\]",
    ),
    "packed cell of another size": (
        lambda m: m(packed_of(D), (zeros(1, B, H), zeros(1, B, H + 1))),
        RuntimeError,
        r"Expected hidden\[1\] size \(1, 3, 6\), got \[1, 3, 7\]",
    ),
    "packed dtype": (
        lambda m: m(packed_of(D, dtype=torch.float64)),
        ValueError,
        r"RNN input dtype \(torch.float64\) does not match weight dtype \(torch.float32\)",
    ),
    "packed input size": (lambda m: m(packed_of(D + 1)), RuntimeError, r"input.size\(-1\) must be equal to input_size"),
    "lengths with a packed input": (
        lambda m: m(packed_of(D), lengths=torch.tensor([4, 2, 1])),
        ValueError,
        form("lengths"),
    ),
    "lengths, unbatched": (lambda m: m(zeros(T, D), lengths=torch.tensor([4])), ValueError, form("lengths")),
    "lengths negative": (
        lambda m: m(zeros(T, B, D), lengths=torch.tensor([4, -1, 2])),
        (ValueError, RuntimeError),
        form("lengths", got=".*-1.*"),
    ),
    "lengths above T": (
        lambda m: m(zeros(T, B, D), lengths=torch.tensor([4, 5, 2])),
        (ValueError, RuntimeError),
        form("lengths", got=".*5.*"),
    ),
    "lengths enormous": (
        lambda m: m(zeros(T, B, D), lengths=torch.tensor([4, 2**63 - 1, 2])),
        (ValueError, RuntimeError),
        form("lengths"),
    ),
    "lengths too few": (lambda m: m(zeros(T, B, D), lengths=torch.tensor([4, 2])), ValueError, form("lengths")),
    "lengths too many": (lambda m: m(zeros(T, B, D), lengths=[4, 2, 1, 1]), ValueError, form("lengths")),
    "lengths 2-D": (lambda m: m(zeros(T, B, D), lengths=torch.ones(B, 1).long()), ValueError, form("lengths")),
    "lengths 0-D": (lambda m: m(zeros(T, B, D), lengths=torch.tensor(3)), ValueError, form("lengths")),
    "lengths float": (lambda m: m(zeros(T, B, D), lengths=torch.tensor([4.0, 2, 1])), TypeError, form("lengths")),
    "lengths bool": (lambda m: m(zeros(T, B, D), lengths=torch.tensor([True] * B)), TypeError, form("lengths")),
    "lengths list of floats": (lambda m: m(zeros(T, B, D), lengths=[4.0, 2.0, 1.0]), TypeError, form("lengths")),
    "lengths list of strings": (lambda m: m(zeros(T, B, D), lengths=["4", "2", "1"]), TypeError, form("lengths")),
    "lengths an int": (lambda m: m(zeros(T, B, D), lengths=4), (TypeError, ValueError), form("lengths")),
    "lengths a string": (lambda m: m(zeros(T, B, D), lengths="4"), TypeError, form("lengths")),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "text"), MODULE.values(), ids=MODULE)
def test_module_errors(call: Callable, error, text: str) -> None:
    with pytest.raises(error, match=text):
        call(LSTM(D, H))


def test_lengths_with_batch_first() -> None:
    m = LSTM(D, H, batch_first=True)
    m(zeros(B, T, D), lengths=[4, 4, 4])
    with pytest.raises(ValueError, match=form("lengths")):
        m(zeros(B, T, D), lengths=[3, 3, 3, 3])
    with pytest.raises((ValueError, RuntimeError), match=form("lengths")):
        m(zeros(T, B, D), lengths=[4, 3, 3, 3])


PACKINGS = {
    "increasing": [1, 2, 4],
    "too few rows": [3, 2, 1],
    "too many rows": [3, 3, 2],
    "a zero": [4, 3, 0],
    "negative": [8, -1],
    "overflowing": [2**62, 2**62, 2**62, 2**62 + 7],
    "the lowest": [-(2**63), 7],
}


@pytest.mark.parametrize("batch_sizes", PACKINGS.values(), ids=PACKINGS)
def test_inconsistent_packed_sequence_raises(batch_sizes: list[int]) -> None:
    packed = PackedSequence(torch.zeros(7, D), torch.tensor(batch_sizes))
    with pytest.raises((ValueError, RuntimeError), match=form("batch_sizes")):
        LSTM(D, H)(packed)


# ---- functional form


def arguments(case: Case) -> dict:
    inputs = make_inputs(case, torch.float32)
    return dict(input=inputs.x, weights=inputs.weights, hx=inputs.hx, **inputs.keywords())


def weight(i: int, w: torch.Tensor) -> Callable[[dict], dict]:
    return lambda a: {"weights": [w if j == i else old for j, old in enumerate(a["weights"])]}


SIZES = (ValueError, RuntimeError)  # the op checks the values of batch_sizes

FUNCTIONAL = {
    "input a list": (DENSE, lambda a: {"input": [1.0]}, TypeError, form("input")),
    "input 2-D": (DENSE, lambda a: {"input": zeros(T, D)}, ValueError, form("input")),
    "input 4-D": (DENSE, lambda a: {"input": zeros(T, B, D, 1)}, ValueError, form("input")),
    "input 0-D": (DENSE, lambda a: {"input": torch.tensor(1.0)}, ValueError, form("input")),
    "input integer": (DENSE, lambda a: {"input": zeros(T, B, D).int()}, NotImplementedError, "no backend .*int32"),
    "input complex": (DENSE, lambda a: {"input": zeros(T, B, D) * 1j}, NotImplementedError, "no backend .*complex64"),
    "input size": (DENSE, lambda a: {"input": zeros(T, B, 6)}, ValueError, form("weight_ih", r".*\[24, 6\]")),
    "packed input 3-D": (PACKED, lambda a: {"input": zeros(T, B, D)}, ValueError, form("input")),
    "weights a tensor": (DENSE, lambda a: {"weights": zeros(5)}, (TypeError, ValueError), form("weight.*")),
    "weights of none": (DENSE, lambda a: {"weights": []}, ValueError, form("weights")),
    "weights of three lists": (DENSE, lambda a: {"weights": [[1.0]] * 4}, TypeError, form("weight.*")),
    "one weight": (DENSE, lambda a: {"weights": a["weights"][:1]}, ValueError, form("weights")),
    "six weights": (DENSE, lambda a: {"weights": a["weights"] + a["weights"][:2]}, ValueError, form("weights")),
    "weights of one layer for two": (DENSE, lambda a: {"num_layers": 3}, ValueError, form("weights")),
    "w_ih": (DENSE, weight(0, zeros(4 * H, D - 1)), ValueError, form("(weight|bias)_ih", r".*\[24, 5\]", r"\[24, 4\]")),
    "w_hh": (DENSE, weight(1, zeros(4 * H, H - 1)), ValueError, form("(weight|bias)_hh", got=r"\[24, 5\]")),
    "w_hh no gates": (DENSE, weight(1, zeros(4 * H + 1, H)), ValueError, form("weight_.h")),
    "w_hh 1-D": (DENSE, weight(1, zeros(4 * H)), ValueError, form("(weight|bias)_hh")),
    "w_hh empty": (DENSE, weight(1, zeros(0, 0)), ValueError, form("weight_.h")),
    "b_ih": (DENSE, weight(2, zeros(H)), ValueError, form("(weight|bias)_ih", r".*\[24\]", r"\[6\]")),
    "b_hh": (DENSE, weight(3, zeros(4 * H, 1)), ValueError, form("(weight|bias)_hh", r".*\[24\]", r"\[24, 1\]")),
    "w_hr": (PROJECTED, weight(4, zeros(2, H + 1)), ValueError, form("weight_hr", r".*\[2, 6\]", r"\[2, 7\]")),
    "w_hr of the other direction": (PROJECTED, weight(9, zeros(3, H)), ValueError, form("weight_hr")),
    "w_ih dtype": (DENSE, weight(0, zeros(4 * H, D).double()), TypeError, form("weight.*", got=".*float64")),
    "b_hh dtype": (DENSE, weight(3, zeros(4 * H).half()), TypeError, form("weight.*", got=".*float16")),
    "w_hh device": (DENSE, weight(1, zeros(4 * H, H, device="meta")), ValueError, form("weight.*", got="meta")),
    "hx a tensor": (DENSE, lambda a: {"hx": zeros(1, B, H)}, (TypeError, ValueError), form("hx")),
    "hx of one": (DENSE, lambda a: {"hx": (zeros(1, B, H),)}, (TypeError, ValueError), form("hx")),
    "h0 2-D": (DENSE, lambda a: {"hx": (zeros(B, H), zeros(1, B, H))}, ValueError, form("h0", got=r"\[3, 6\]")),
    "h0 size": (DENSE, lambda a: {"hx": (zeros(1, B, H + 1), zeros(1, B, H))}, ValueError, form("h0")),
    "c0 size": (DENSE, lambda a: {"hx": (zeros(1, B, H), zeros(1, B, H + 1))}, ValueError, form("c0")),
    "h0 layers": (DENSE, lambda a: {"hx": (zeros(2, B, H), zeros(1, B, H))}, ValueError, form("h0")),
    "c0 batch": (PACKED, lambda a: {"hx": (zeros(1, B, H), zeros(1, B + 1, H))}, SIZES, form("c0")),
    "h0 dtype": (DENSE, lambda a: {"hx": (zeros(1, B, H).double(), zeros(1, B, H))}, TypeError, form("h0")),
    "lengths too few": (DENSE, lambda a: {"lengths": torch.tensor([1, 2])}, ValueError, form("lengths")),
    "lengths negative": (DENSE, lambda a: {"lengths": [-1, 2, 3]}, (ValueError, RuntimeError), form("lengths")),
    "lengths above T": (DENSE, lambda a: {"lengths": [5, 2, 3]}, (ValueError, RuntimeError), form("lengths")),
    "lengths float": (DENSE, lambda a: {"lengths": zeros(B)}, TypeError, form("lengths")),
    "lengths and batch_sizes": (PACKED, lambda a: {"lengths": torch.tensor([4, 2, 1])}, ValueError, form("lengths")),
    "batch_sizes increasing": (PACKED, lambda a: {"batch_sizes": torch.tensor([1, 2, 4])}, SIZES, form("batch_sizes")),
    "batch_sizes sum": (PACKED, lambda a: {"batch_sizes": torch.tensor([3, 2, 1])}, SIZES, form("batch_sizes")),
    "batch_sizes zero": (PACKED, lambda a: {"batch_sizes": torch.tensor([4, 3, 0])}, SIZES, form("batch_sizes")),
    "batch_sizes 2-D": (PACKED, lambda a: {"batch_sizes": torch.tensor([[3, 2, 1, 1]])}, SIZES, form("batch_sizes")),
    "batch_sizes int32": (PACKED, lambda a: {"batch_sizes": a["batch_sizes"].int()}, TypeError, form("batch_sizes")),
    "batch_sizes float": (PACKED, lambda a: {"batch_sizes": a["batch_sizes"].float()}, TypeError, form("batch_sizes")),
    "batch_sizes a list": (PACKED, lambda a: {"batch_sizes": [3, 2, 1, 1]}, TypeError, form("batch_sizes")),
    "batch_sizes device": (PACKED, lambda a: {"batch_sizes": zeros(4).to("meta")}, TypeError, form("batch_sizes")),
    "num_layers 0": (DENSE, lambda a: {"num_layers": 0}, ValueError, form("(num_layers|weights)")),
    "num_layers negative": (DENSE, lambda a: {"num_layers": -1}, ValueError, form("(num_layers|weights)")),
}  # fmt: skip


@pytest.mark.parametrize(("case", "change", "error", "text"), FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_errors(case: Case, change: Callable[[dict], dict], error, text: str) -> None:
    good = arguments(case)
    functional.lstm(**good)
    with pytest.raises(error, match=text):
        functional.lstm(**good | change(good))


@pytest.mark.parametrize("dropout", [2.0, -0.5])
def test_functional_dropout_out_of_range_raises(dropout: float) -> None:
    inputs = make_inputs(Case(B=B, T=T, D=D, H=H, L=2, why="stacked"), torch.float32)
    with pytest.raises(ValueError, match="dropout"):
        functional.lstm(inputs.x, None, inputs.weights, num_layers=2, dropout=dropout, training=True)


@pytest.mark.parametrize("layout", ["sparse", "mkldnn"])
def test_input_that_is_not_strided_raises(layout: str) -> None:
    good = arguments(DENSE)
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    x = good["input"].to_sparse() if layout == "sparse" else good["input"].to_mkldnn()
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)):
        functional.lstm(**good | {"input": x})


def test_nan_does_not_affect_other_sequences() -> None:
    inputs = make_inputs(DENSE, torch.float32)
    clean = run(functional.lstm, inputs)
    inputs.x[1, 0] = float("nan")
    inputs.x[2, 1] = float("inf")
    got = run(functional.lstm, inputs)
    assert torch.equal(got["y"][:, 2], clean["y"][:, 2]) and torch.equal(got["dx"][:, 2], clean["dx"][:, 2])
    assert got["y"][1:, 0].isnan().all() and torch.equal(got["y"][0], clean["y"][0])


@pytest.mark.parametrize("size", [1e4, 1e30, torch.inf])
def test_extreme_gates_saturate_as_in_torch(size: float, isa: str) -> None:
    inputs = make_inputs(Case(B=2, T=3, D=4, H=19, state=False, why="saturation"), torch.float32)
    inputs.x = inputs.x.sign() * size
    inputs.weights[0] = inputs.weights[0].sign() * (inputs.weights[0].abs() + 0.1)
    inputs.x[:, :, 1:] = 0 if size == torch.inf else inputs.x[:, :, 1:]
    inputs.weights[0] = torch.cat([inputs.weights[0][:, :1].abs(), torch.zeros(76, 3)], 1)
    module = torch.nn.LSTM(4, 19)
    with torch.no_grad():
        for p, w in zip(module.parameters(), inputs.weights, strict=True):
            p.copy_(w)
        if size == torch.inf:  # inf * 0 is NaN in a matrix product
            inputs.x = inputs.x[:, :, :1]
            inputs.weights[0] = inputs.weights[0][:, :1]
            y, _ = functional.lstm(inputs.x, None, inputs.weights)
            assert y.isfinite().all()
            return
        y, _ = functional.lstm(inputs.x, None, inputs.weights)
        torch.testing.assert_close(y, module(inputs.x)[0])


# ---- torch.ops, without the checks of the public functions


def forward_arguments(case: Case) -> list:
    inputs = make_inputs(case, torch.float32)
    h0, c0 = inputs.hx
    of_weights = case.bidirectional, case.bias, case.P > 0
    return [inputs.x, h0, c0, inputs.weights, inputs.batch_sizes, inputs.lengths, *of_weights]


X, H0, C0, WEIGHTS, BATCH_SIZES, LENGTHS, BIDIRECTIONAL = range(7)


def replaced(i: int, w: torch.Tensor) -> Callable[[list], list]:
    return lambda weights: [w if j == i else old for j, old in enumerate(weights)]


FORWARD = {
    "x 1-D": (DENSE, X, lambda x: x[0, 0], form("x")),
    "x 2-D": (DENSE, X, lambda x: x[0], form("x")),
    "x 4-D": (DENSE, X, lambda x: x[None], form("x")),
    "x 3-D packed": (PACKED, X, lambda x: x[None], form("x")),
    "x features": (DENSE, X, lambda x: x[..., 1:], form(".+")),
    "x integer": (DENSE, X, lambda x: x.int(), form(".+")),
    "x complex": (DENSE, X, lambda x: x * 1j, form(".+")),
    "x double": (DENSE, X, lambda x: x.double(), form(".+")),
    "h0 batch": (DENSE, H0, lambda h: h[:, 1:], form("h0")),
    "h0 size": (DENSE, H0, lambda h: h[..., 1:], form("h0")),
    "h0 2-D": (DENSE, H0, lambda h: h[0], form("h0")),
    "h0 directions": (PROJECTED, H0, lambda h: h[:1], form("h0")),
    "h0 dtype": (DENSE, H0, lambda h: h.double(), form("h0")),
    "c0 batch": (PACKED, C0, lambda c: c[:, 1:], form("c0")),
    "c0 size": (PROJECTED, C0, lambda c: c[..., :2], form("c0")),
    "c0 dtype": (DENSE, C0, lambda c: c.half(), form("c0")),
    "weights none": (DENSE, WEIGHTS, lambda w: [], form("weights")),
    "weights one": (DENSE, WEIGHTS, lambda w: w[:1], form("weights")),
    "weights six": (DENSE, WEIGHTS, lambda w: w + w[:2], form("weights")),
    "weights odd, both directions": (PROJECTED, WEIGHTS, lambda w: w[:-1], form("weights")),
    "w_ih": (DENSE, WEIGHTS, replaced(0, zeros(24, 4)), form("(weight|bias)_ih", r".*\[24, 5\]", r"\[24, 4\]")),
    "w_ih rows": (DENSE, WEIGHTS, replaced(0, zeros(20, 5)), form(".*")),
    "w_ih 1-D": (DENSE, WEIGHTS, replaced(0, zeros(24)), form("(weight|bias)_ih")),
    "w_ih 0-D": (DENSE, WEIGHTS, replaced(0, torch.tensor(1.0)), form("(weight|bias)_ih")),
    "w_hh": (DENSE, WEIGHTS, replaced(1, zeros(24, 7)), form("(weight|bias)_hh")),
    "w_hh empty": (DENSE, WEIGHTS, replaced(1, zeros(0, 0)), form("weight_.h")),
    "w_hh 1-D": (DENSE, WEIGHTS, replaced(1, zeros(24)), form("(weight|bias)_hh")),
    "w_hh 0-D": (DENSE, WEIGHTS, replaced(1, torch.tensor(1.0)), form("(weight|bias)_hh")),
    "w_hh dtype": (DENSE, WEIGHTS, replaced(1, zeros(24, 6).double()), form("(weight|bias)_hh")),
    "b_ih": (DENSE, WEIGHTS, replaced(2, zeros(23)), form("(weight|bias)_ih")),
    "b_hh": (DENSE, WEIGHTS, replaced(3, zeros(6)), form("(weight|bias)_hh")),
    "b_hh dtype": (DENSE, WEIGHTS, replaced(3, zeros(24).long()), form("(weight|bias)_hh")),
    "w_hr": (PROJECTED, WEIGHTS, replaced(9, zeros(3, 6)), form("weight_hr")),
    "w_hr 1-D": (PROJECTED, WEIGHTS, replaced(4, zeros(6)), form("weight_hr")),
    "w_hh of another P in reverse": (PROJECTED, WEIGHTS, replaced(6, zeros(24, 3)), form(".*")),
    "batch_sizes increasing": (PACKED, BATCH_SIZES, lambda b: b.flip(0), form("batch_sizes")),
    "batch_sizes sum": (PACKED, BATCH_SIZES, lambda b: b[:-1], form("batch_sizes")),
    "batch_sizes zero": (PACKED, BATCH_SIZES, lambda b: torch.tensor([4, 3, 0]), form("batch_sizes")),
    "batch_sizes negative": (PACKED, BATCH_SIZES, lambda b: torch.tensor([8, -1]), form("batch_sizes")),
    "batch_sizes overflow": (PACKED, BATCH_SIZES, lambda b: torch.tensor([2**62] * 4), form("batch_sizes")),
    "batch_sizes of none": (PACKED, BATCH_SIZES, lambda b: b[:0], form("batch_sizes")),
    "batch_sizes int32": (PACKED, BATCH_SIZES, lambda b: b.int(), form("batch_sizes")),
    "batch_sizes float": (PACKED, BATCH_SIZES, lambda b: b.double(), form("batch_sizes")),
    "batch_sizes 2-D": (PACKED, BATCH_SIZES, lambda b: b[None], form("batch_sizes")),
    "batch_sizes 0-D": (PACKED, BATCH_SIZES, lambda b: torch.tensor(7), form("batch_sizes")),
    "lengths with batch_sizes": (PACKED, LENGTHS, lambda _: torch.tensor([4, 2, 1]), form("lengths")),
    "lengths too few": (DENSE, LENGTHS, lambda _: torch.tensor([4, 2]), form("lengths")),
    "lengths 2-D": (DENSE, LENGTHS, lambda _: torch.ones(3, 1).long(), form("lengths")),
    "lengths 0-D": (DENSE, LENGTHS, lambda _: torch.tensor(3), form("lengths")),
    "lengths negative": (DENSE, LENGTHS, lambda _: torch.tensor([4, -1, 2]), form("lengths", got=".*-1.*")),
    "lengths above T": (DENSE, LENGTHS, lambda _: torch.tensor([4, 1, 5]), form("lengths", got=".*5.*")),
    "lengths enormous": (DENSE, LENGTHS, lambda _: torch.tensor([4, 1, 2**63 - 1]), form("lengths")),
    "lengths float": (DENSE, LENGTHS, lambda _: torch.ones(3), form("lengths")),
}  # fmt: skip


@pytest.mark.parametrize("op", ["lstm", "lstm_forward"])
@pytest.mark.parametrize(("case", "argument", "change", "text"), FORWARD.values(), ids=FORWARD)
def test_forward_op_errors(op: str, case: Case, argument: int, change: Callable, text: str) -> None:
    call = getattr(ops, op)
    good = forward_arguments(case)
    call(*good)
    bad = list(good)
    bad[argument] = change(good[argument])
    with pytest.raises(RuntimeError, match=text):
        call(*bad)


BACKWARD = {
    "dy": (0, lambda t: t[1:], form("dy")),
    "dy dtype": (0, lambda t: t.double(), form("dy")),
    "dy 2-D": (0, lambda t: t[0], form("dy")),
    "dh_n": (1, lambda t: t[:, 1:], form("dh_n")),
    "dh_n dtype": (1, lambda t: t.half(), form("dh_n")),
    "dc_n": (2, lambda t: t[..., 1:], form("dc_n")),
    "dc_n 4-D": (2, lambda t: t[None], form("dc_n")),
    "x": (3, lambda t: t[:-1], form(".+")),
    "h0": (4, lambda t: t[:, 1:], form("h0")),
    "c0": (5, lambda t: t[..., 1:], form("c0")),
    "weights": (6, lambda w: w[:-1], form("weight.*")),
    "w_ih": (6, lambda w: [w[0][:, 1:], *w[1:]], form("(weight|bias)_ih")),
    "lengths": (8, lambda _: torch.tensor([9, 1, 1]), form("lengths")),
    "lengths negative": (8, lambda _: torch.tensor([4, 1, -1]), form("lengths")),
    "y": (10, lambda t: t[1:], form("y")),
    "y features": (10, lambda t: t[..., 1:], form("y")),
    "y dtype": (10, lambda t: t.double(), form("y")),
    "gates": (11, lambda t: t[..., 1:], form("saved")),
    "gates rows": (11, lambda t: t[:, 1:] if t.dim() > 2 else t[1:], form("saved")),
    "gates empty": (11, lambda t: t.new_empty(0), form("saved")),
    "gates dtype": (11, lambda t: t.double(), form("saved")),
    "cells": (12, lambda t: t[..., 1:], form("c_steps")),
    "cells empty": (12, lambda t: t.new_empty(0), form("c_steps")),
    "cells dtype": (12, lambda t: t.double(), form("c_steps")),
}


@pytest.mark.parametrize("case", [DENSE, PROJECTED, PACKED], ids=lambda c: c.why)
@pytest.mark.parametrize(("argument", "change", "text"), BACKWARD.values(), ids=BACKWARD)
def test_backward_op_errors(case: Case, argument: int, change: Callable, text: str) -> None:
    if case.packed and argument == 8:
        text = form("lengths")
    inputs = make_inputs(case, torch.float32)
    forward = forward_arguments(case)
    y, _, _, gates, cells = ops.lstm_forward(*forward)
    good = [inputs.dy, inputs.dh_n, inputs.dc_n, *forward[:7], y, gates, cells, True, True, *forward[7:]]
    ops.lstm_backward(*good)
    bad = list(good)
    bad[argument] = change(good[argument])
    with pytest.raises(RuntimeError, match=text):
        ops.lstm_backward(*bad)


def test_inconsistent_lengths_of_saved_activations_raise() -> None:
    """`lengths` that match all shapes, but not the saved activations, do not cause reads out of bounds."""
    inputs = make_inputs(DENSE, torch.float32)
    forward = forward_arguments(DENSE)
    forward[LENGTHS] = torch.tensor([2, 1, 3])
    y, _, _, gates, cells = ops.lstm_forward(*forward)
    forward[LENGTHS] = torch.tensor([4, 4, 4])
    try:
        given = [inputs.dy, inputs.dh_n, inputs.dc_n, *forward[:7], y, gates, cells, True, True, *forward[7:]]
        result = ops.lstm_backward(*given)
    except RuntimeError as error:
        assert re.search(form("(gates|cells)"), str(error))
    else:
        assert result[0].shape == inputs.x.shape


@pytest.mark.parametrize("argument", [X, H0, C0, WEIGHTS], ids=["x", "h0", "c0", "weights"])
@pytest.mark.parametrize("op", ["lstm", "lstm_forward"])
def test_ops_raise_for_tensors_on_two_devices(op: str, argument: int) -> None:
    bad = forward_arguments(DENSE)
    if argument == WEIGHTS:
        bad[WEIGHTS] = [*bad[WEIGHTS][:1], bad[WEIGHTS][1].to("meta"), *bad[WEIGHTS][2:]]
    else:
        bad[argument] = bad[argument].to("meta")
    with pytest.raises((RuntimeError, ValueError), match=r"device|meta"):
        getattr(ops, op)(*bad)


# ---- CUDA, with fake tensors


def on_cuda(module: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape, device="cuda")))
    return module


NOT_ON_CUDA = {
    "heads": (lambda: LSTM(D, H, num_heads=2), r"LSTM: .*heads must be 1, got 2"),
    "projection": (lambda: LSTM(D, H, proj_size=2), r"LSTM: .*a projection must be absent"),
    "projection and peephole": (
        lambda: LSTM(D, H, 2, proj_size=2, peephole=True),
        "LSTM: .*a projection must be absent",
    ),
    "projection without biases": (lambda: LSTM(D, H, proj_size=2, bias=False), "LSTM: .*a projection must be absent"),
    "layer norm": (lambda: LSTM(D, H, layer_norm=True), "LSTM: .*lstm_norm has no CUDA kernel"),
    "layer norm of a GRU": (lambda: GRU(D, H, layer_norm=True), "GRU: .*gru_norm has no CUDA kernel"),
    "GRU with a projection": (lambda: GRU(D, H, proj_size=2), "GRU: .*gru_projected has no CUDA kernel"),
    "nested": (lambda: NestedLSTM(D, H), "NestedLSTM: .*nested_lstm has no CUDA kernel"),
}


@pytest.mark.parametrize(("make", "text"), NOT_ON_CUDA.values(), ids=NOT_ON_CUDA)
def test_layers_without_cuda_kernels(make: Callable, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_CUDA_BUILT", True)
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(T, B, D, device="cuda")
        with pytest.raises(NotImplementedError, match=text) as info:
            on_cuda(make())(x)
        message = str(info.value)
        assert message.split(":", 1)[1].startswith(
            f" no backend supports an input of shape [{T}, {B}, {D}], torch.float32"
        )
        assert "cpu: the tensors are on cuda" in message


def test_cells_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_CUDA_BUILT", True)
    with FakeTensorMode(), torch.no_grad():
        for options, text in (
            (dict(layer_norm=True), "lstm_norm has no CUDA kernel"),
            (dict(num_heads=2), "heads must be 1"),
        ):
            with pytest.raises(NotImplementedError, match=f"LSTMCell: no backend supports an input.*{text}"):
                on_cuda(LSTMCell(D, H, **options))(torch.empty(B, D, device="cuda"))


def test_unsupported_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode(), torch.no_grad():
        x, layer = torch.empty(T, B, D, device="cuda:7"), on_cuda(LSTM(D, H))
        monkeypatch.setattr(backend, "_CUDA_BUILT", True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        with pytest.raises(
            NotImplementedError, match=r"no backend .* cuda: compute capability must be 8.0 or more, got 7.5"
        ):
            layer(x)
    backend._too_old.cache_clear()


def test_supported_layers_on_fake_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors check shapes only."""
    monkeypatch.setattr(backend, "_CUDA_BUILT", True)
    with FakeTensorMode(), torch.no_grad():
        for module in (LSTM(D, H, 2, bidirectional=True, peephole=True), LSTM(D, H, bias=False), GRU(D, H, 2)):
            assert on_cuda(module)(torch.empty(T, B, D, device="cuda"))[0].shape == (
                T,
                B,
                H * (2 if module.bidirectional else 1),
            )


@pytest.mark.parametrize("lengths", [[T + 1, 1, 1], torch.tensor([1, -1, 1]), torch.tensor([1, 1, 99]).int()], ids=str)
def test_lengths_on_the_host_are_checked(lengths, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the message of the CPU, before data is copied to a device."""
    monkeypatch.setattr(backend, "_CUDA_BUILT", True)
    with pytest.raises(ValueError, match="lengths") as of_cpu:
        LSTM(D, H)(zeros(T, B, D), lengths=lengths)
    with FakeTensorMode():
        x, layer = torch.empty(T, B, D, device="cuda"), on_cuda(LSTM(D, H))
    with pytest.raises(ValueError, match=re.escape(str(of_cpu.value))):
        layer(x, lengths=lengths)
