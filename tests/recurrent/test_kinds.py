"""Tests of LSTM for GRU and RNN (tanh, relu); torch.func and autocast for all kinds.

The kinds share the time loop, packed sequences, matrix products and threads with LSTM, so a subset of its cases is
sufficient.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import io
import itertools
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

import seqkernels
from seqkernels import functional, reference
from support.cases import (
    DTYPES,
    ERROR_RATIO,
    RAGGED,
    REALISTIC,
    TINY,
    Case,
    Inputs,
    assert_near,
    assert_same_bits,
    defined,
    make_inputs,
    module_of,
    one_thread,
    ragged,
    run,
    run_module,
    tuple_of,
)
from support.recurrent import (
    OP_CASES,
    as_batch,
    as_packed,
    compiled,
    directions_like,
    everything,
    negated,
    spread,
    weighted,
)
from support.recurrent import kind as kind_of_tensor
from support.recurrent_errors import CALLS, CONSTRUCTORS, form, packed_of, raised, zeros

ops = torch.ops.seqkernels


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    name: str
    gates: int
    function: Callable
    definition: Callable
    ours: type[torch.nn.Module]
    theirs: type[torch.nn.Module]
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def case(self, case: Case) -> Case:
        """The case for this kind, without projection."""
        return case if self.gates == 4 else dataclasses.replace(case, gates=self.gates, P=0)

    def inputs(self, case: Case, dtype: torch.dtype, **options) -> Inputs:
        return make_inputs(self.case(case), dtype, **options)

    def modules(self, inputs: Inputs) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The modules of seqkernels and torch with the weights of the inputs."""
        return module_of(self.ours, inputs, **self.options), module_of(self.theirs, inputs, **self.options)

    def pair(self, seed: int = 0, **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
        """The modules of seqkernels and torch with the same seed."""
        torch.manual_seed(seed)
        ours = self.ours(**arguments, **self.options)
        torch.manual_seed(seed)
        return ours, self.theirs(**arguments, **self.options)

    def op(self, suffix: str = ""):
        return getattr(ops, self.name + suffix).default


def _kind(name: str, gates: int, module: str, **options) -> Kind:
    modules = getattr(seqkernels.nn, module), getattr(torch.nn, module)
    return Kind(name, gates, getattr(functional, name), getattr(reference, name), *modules, options)


LSTM = _kind("lstm", 4, "LSTM")
GRU = _kind("gru", 3, "GRU")
TANH = _kind("rnn_tanh", 1, "RNN", nonlinearity="tanh")
RELU = _kind("rnn_relu", 1, "RNN", nonlinearity="relu")

kinds = pytest.mark.parametrize("kind", [GRU, TANH, RELU], ids=str)
all_kinds = pytest.mark.parametrize("kind", [LSTM, GRU, TANH, RELU], ids=str)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
HALF = (torch.bfloat16, torch.float16)

CHOSEN = [
    Case(B=3, T=7, D=5, H=17, why="a tail in each dimension"),
    Case(B=1, T=1, D=1, H=1, why="the smallest"),
    Case(B=0, T=4, D=3, H=5, why="an empty batch"),
    Case(B=3, T=0, D=3, H=5, why="no steps"),
    Case(B=2, T=0, D=3, H=5, L=2, bidirectional=True, lengths=(0, 0), why="no steps with lengths, stacked"),
    Case(B=16, T=4, D=16, H=64, why="full vectors; the panel of a kind with one gate has four"),
    Case(B=7, T=3, D=63, H=65, why="around 64; one row above a register tile"),
    Case(B=2, T=3, D=257, H=255, why="around 256: a K block and a tail"),
    Case(B=9, T=20, D=24, H=96, why="enough work for two threads, uneven rows"),
    Case(B=1, T=12, D=40, H=200, why="two threads on one sequence"),
    Case(B=3, T=6, D=5, H=9, L=2, bias=False, state=False, bidirectional=True, why="no bias, no state, both ways"),
    Case(B=4, T=6, D=5, H=12, batch_first=True, lengths=(2, 6, 0, 3), why="batch first with lengths"),
    Case(B=33, T=6, D=20, H=48, L=2, bidirectional=True, lengths=ragged(33, 6, zeros=True), why="many, with lengths"),
    Case(B=4, T=4, D=3, H=8, lengths=(4, 3, 2, 1), packed=True, why="the batch shrinks at every step"),
    Case(B=6, T=9, D=8, H=24, L=2, bidirectional=True, lengths=(9, 9, 7, 4, 1, 1), packed=True, why="all on, packed"),
]
cases = pytest.mark.parametrize("case", CHOSEN, ids=str)


# ---- parity


def away_from_zero(inputs: Inputs) -> Inputs:
    """Moves the units of a relu layer away from 0, where rounding of half types changes the derivative."""
    case, weights = inputs.case, list(inputs.weights)
    for i, w in enumerate(weights):
        if w.dim() == 2:
            weights[i] = w * (0.2 if i % 4 else 0.5 / max(1.0, (w.shape[1] / case.H) ** 0.5))
        else:
            weights[i] = torch.where(w > 0, 3.0, -3.0).to(w.dtype) if i % 4 == 2 else w * 0.1
    return dataclasses.replace(inputs, weights=weights)


def prepared(kind: Kind, case: Case, dtype: torch.dtype) -> Inputs:
    inputs = kind.inputs(case, dtype)
    return away_from_zero(inputs) if kind is RELU and dtype in HALF and case.bias else inputs


@functools.cache
def definition(kind: Kind, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    return defined(prepared(kind, case, dtype), definition=kind.definition)


@dtypes
@cases
@kinds
def test_parity(kind: Kind, case: Case, dtype: torch.dtype, isa: str) -> None:
    got, want = run(kind.function, prepared(kind, case, dtype)), definition(kind, case, dtype)
    if kind is RELU and dtype in HALF and not case.bias:  # away_from_zero requires a bias: compare outputs only
        got, want = ({n: r[n] for n in ("y", "h_n")} for r in (got, want))
    assert_near(got, want, dtype)


@dtypes
@pytest.mark.parametrize("case", [c for c in CHOSEN if c.B and c.T and c.form != "lengths"], ids=str)
@kinds
def test_parity_with_torch(kind: Kind, case: Case, dtype: torch.dtype) -> None:
    """Against the module of torch, which computes in float64 for half types, because it rounds more often."""
    inputs = prepared(kind, case, dtype)
    ours, theirs = kind.modules(inputs)
    wide = inputs.map(Tensor.double) if dtype in HALF else inputs
    got, want = run_module(ours, inputs), run_module(theirs.to(wide.x.dtype), wide)
    if kind is RELU and dtype in HALF and not case.bias:
        got, want = ({n: r[n] for n in ("y", "h_n")} for r in (got, want))
    assert_near(got, want, dtype)


@kinds
def test_lengths_match_packing_and_unpacking(kind: Kind) -> None:
    ours, theirs = kind.pair(input_size=5, hidden_size=7, num_layers=2, bidirectional=True, batch_first=True)
    x, lengths = torch.randn(4, 6, 5), torch.tensor([2, 6, 1, 4])
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        if module is ours:
            y, h_n = ours(leaf, lengths=lengths)
        else:
            y, h_n = theirs(pack_padded_sequence(leaf, lengths, batch_first=True, enforce_sorted=False))
            y = pad_packed_sequence(y, batch_first=True)[0]
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + h_n.square().sum()
        grads.append([y, h_n, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("upstream", ["dy", "dh_n"])
@kinds
def test_gradient_of_each_output(kind: Kind, upstream: str) -> None:
    inputs = kind.inputs(CHOSEN[-1], torch.float64)
    want = defined(inputs, (upstream,), kind.definition)
    assert_near(run(kind.function, inputs, (upstream,)), want, torch.float64)


@kinds
def test_gradients_are_independent_of_requires_grad_of_other_inputs(kind: Kind) -> None:
    """For the input, the state and each weight; the two matrix products of GRU have separate gradients."""
    inputs = kind.inputs(Case(B=6, T=9, D=8, H=24, lengths=(9, 4, 0, 7, 7, 2), why="lengths"), torch.float32)
    everything = run(kind.function, inputs)
    for name, wanted in zip(["dx", "dh0", *list(everything)[4:]], inputs.differentiable(), strict=True):
        wanted.requires_grad_()
        y, h_n = kind.function(inputs.x, inputs.state_argument(), inputs.weights, **inputs.keywords())
        (got,) = torch.autograd.grad([y, h_n], wanted, [inputs.dy, inputs.dh_n])
        wanted.requires_grad_(False)
        assert_same_bits({name: got}, everything, [name])


@kinds
@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=lambda d: str(d).removeprefix("torch."))
def test_error_does_not_exceed_the_error_of_torch(kind: Kind, dtype: torch.dtype) -> None:
    """RMS error against float64 relative to the norm of each tensor, over all sizes and seeds."""
    ours: dict[str, float] = collections.defaultdict(float)
    theirs: dict[str, float] = collections.defaultdict(float)
    sizes = [c for c in REALISTIC if not c.P]
    for case, seed in itertools.product(sizes, range(1 if dtype in HALF else 3)):
        inputs = kind.inputs(case, dtype, seed=seed)
        want = defined(inputs, definition=kind.definition)
        with one_thread():
            torchs = run_module(kind.modules(inputs)[1], inputs)
        for total, got in ((ours, run(kind.function, inputs)), (theirs, torchs)):
            for name, w in want.items():
                total[kind_of_tensor(name)] += ((got[name].double() - w).square().sum() / w.square().mean()).item()
    ratios = {name: round((ours[name] / theirs[name]) ** 0.5, 3) for name in ours}
    assert max(ratios.values()) <= ERROR_RATIO[dtype], f"ratio of the RMS error to that of torch: {ratios}"


# ---- derivatives


def of_tensors(kind: Kind, inputs: Inputs):
    """The function (y, *states) of the differentiable tensors, and these tensors."""
    n = len(inputs.hx or ())

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        hx = None if not n else rest[0] if n == 1 else rest[:n]
        y, states = kind.function(x, hx, list(rest[n:]), **inputs.keywords())
        return y, *tuple_of(states)

    return function, tuple(t.detach() for t in inputs.differentiable())


SMALL = [c for c in TINY if not c.P] + [
    Case(B=2, T=2, D=2, H=3, L=2, bidirectional=True, lengths=(2, 1), packed=True, why="all options, packed")
]
tiny_cases = pytest.mark.parametrize("case", SMALL, ids=str)


@tiny_cases
@kinds
def test_gradcheck(kind: Kind, case: Case, isa: str) -> None:
    function, tensors = of_tensors(kind, kind.inputs(case, torch.float64, padding=0.0))
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in tensors], atol=1e-6)


@tiny_cases
@kinds
def test_gradgradcheck(kind: Kind, case: Case) -> None:
    torch.set_num_threads(1)
    function, tensors = of_tensors(kind, kind.inputs(case, torch.float64, padding=0.0))
    tensors = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-5, fast_mode=case.L > 1)


@kinds
def test_weight_modified_in_place_before_backward_raises(kind: Kind) -> None:
    inputs = kind.inputs(CHOSEN[0], torch.float32).map(lambda t: t.detach().requires_grad_())
    y, _ = kind.function(inputs.x, inputs.state_argument(), inputs.weights)
    with torch.no_grad():
        inputs.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---- the ops and torch.compile

op_cases = pytest.mark.parametrize("case", OP_CASES, ids=str)


def op_arguments(kind: Kind, case: Case, grad: bool = False, padding: float = float("nan")) -> tuple:
    """(x, h0, weights, batch_sizes, lengths, bidirectional, bias) of one layer."""
    inputs = kind.inputs(case, torch.float32, padding=padding)
    if grad:
        inputs = inputs.map(lambda t: t.detach().requires_grad_())
    h0 = inputs.state_argument()
    return inputs.x, h0, inputs.weights, inputs.batch_sizes, inputs.lengths, case.bidirectional, case.bias


def backward_arguments(kind: Kind, case: Case) -> tuple:
    inputs, forward = kind.inputs(case, torch.float32), op_arguments(kind, case)
    y, _, saved = kind.op("_forward")(*forward)
    return inputs.dy, inputs.dh_n, *forward[:6], y, saved, True, True, *forward[6:]


@op_cases
@kinds
def test_opcheck(kind: Kind, case: Case) -> None:
    torch.library.opcheck(kind.op(), op_arguments(kind, case))
    torch.library.opcheck(kind.op("_forward"), op_arguments(kind, case, grad=True, padding=0.0))
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(kind.op("_backward"), backward_arguments(kind, case), test_utils=tests)


@kinds
def test_default_state_is_zero(kind: Kind) -> None:
    x, h0, *rest = op_arguments(kind, OP_CASES[2])
    for op in (kind.op(), kind.op("_forward")):
        for got, want in zip(op(x, None, *rest), op(x, torch.zeros_like(h0), *rest), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("want_x, want_w", [(True, False), (False, True), (False, False)])
@kinds
def test_backward_computes_requested_gradients(kind: Kind, want_x: bool, want_w: bool) -> None:
    arguments = backward_arguments(kind, OP_CASES[2])
    dx, dh0, dw = kind.op("_backward")(*arguments)
    some = kind.op("_backward")(*arguments[:-3], want_x, want_w, *arguments[-1:])
    assert torch.equal(some[1], dh0)
    assert not want_x or torch.equal(some[0], dx)
    assert not want_w or all(torch.equal(a, b) for a, b in zip(some[2], dw, strict=True))


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (GRU, Case(B=3, T=4, D=5, H=6, L=2, bidirectional=True, why="dense")),
        (TANH, Case(B=3, T=4, D=5, H=6, bidirectional=True, lengths=(4, 2, 1), packed=True, why="packed")),
        (RELU, Case(B=3, T=4, D=5, H=6, bidirectional=True, lengths=(2, 0, 4), why="lengths")),
    ],
    ids=str,
)
def test_compile_without_a_graph_break(kind: Kind, case: Case) -> None:
    inputs = kind.inputs(case, torch.float32)
    module, _ = kind.modules(inputs)
    keywords = {} if inputs.lengths is None else {"lengths": inputs.lengths}
    whole = compiled(module)
    assert_same_bits(run_module(whole, inputs, **keywords), run_module(module, inputs, **keywords))
    x = inputs.x if inputs.batch_sizes is None else PackedSequence(inputs.x, inputs.batch_sizes)
    with torch.no_grad():
        (y, h_n), (z, h) = (m(x, inputs.state_argument(), **keywords) for m in (whole, module))
    assert torch.equal(h_n, h)
    assert torch.equal(*(t.data if isinstance(t, PackedSequence) else t for t in (y, z)))


# ---- equal bits

SEQUENCE = ("y", "h_n", "dx", "dh0")  # results by sequence
RAGGED_CHOSEN = [RAGGED[i] for i in (0, 2, 5, 6)]


@dtypes
@pytest.mark.parametrize("case", RAGGED_CHOSEN, ids=str)
@kinds
def test_packed_padded_and_single_sequences_have_the_same_bits(
    kind: Kind, case: Case, dtype: torch.dtype, isa: str
) -> None:
    inputs = kind.inputs(case, dtype)
    padded = run(kind.function, inputs)
    assert_same_bits(as_packed(inputs, kind.function), padded, SEQUENCE)
    for b in range(min(case.B, 5)):
        n = int(inputs.lengths[b])
        alone = as_batch(inputs, [b], n, lengths=False, function=kind.function)
        here = {s: padded[s][:n, b : b + 1] if s in ("y", "dx") else padded[s][:, b : b + 1] for s in SEQUENCE}
        assert_same_bits(alone, here, SEQUENCE)
        assert not padded["y"][n:, b].any() and not padded["dx"][n:, b].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", [c for c in CHOSEN if "thread" in c.why or "many" in c.why], ids=str)
@kinds
def test_bits_are_independent_of_the_number_of_threads(kind: Kind, case: Case, dtype: torch.dtype, isa: str) -> None:
    """Includes weight gradients."""
    inputs, results = kind.inputs(case, dtype), []
    for n in (1, 2):
        torch.set_num_threads(n)
        results.append(run(kind.function, inputs))
    assert_same_bits(*results)


@dtypes
@kinds
def test_several_calls_have_the_bits_of_one(kind: Kind, dtype: torch.dtype, isa: str) -> None:
    for case in (
        Case(B=1, T=11, D=7, H=19, why="one stream"),
        Case(B=3, T=11, D=20, H=200, L=2, bias=False, why="stacked, over two threads"),
    ):
        inputs = kind.inputs(case, dtype)
        module, _ = kind.modules(inputs)
        with torch.no_grad():
            y, h_n = module(inputs.x, inputs.state_argument())
            chunks, hx = [], inputs.state_argument()
            for chunk in inputs.x.split([1, 1, 3, 1, 5]):
                out, hx = module(chunk, hx)
                chunks.append(out)
        assert_same_bits({"y": torch.cat(chunks), "h_n": hx}, {"y": y, "h_n": h_n})


@dtypes
@cases
@kinds
def test_inference_matches_training(kind: Kind, case: Case, dtype: torch.dtype) -> None:
    inputs = kind.inputs(case, dtype)
    training = run(kind.function, inputs)
    with torch.no_grad():
        y, h_n = kind.function(inputs.x, inputs.state_argument(), inputs.weights, **inputs.keywords())
    assert_same_bits({"y": y, "h_n": h_n}, training, ("y", "h_n"))


@pytest.mark.parametrize("layout", [spread, negated], ids=lambda f: f.__name__)
@kinds
def test_strides(kind: Kind, layout: Callable, isa: str) -> None:
    for case in (CHOSEN[0], CHOSEN[-1], CHOSEN[-4]):
        inputs = kind.inputs(case, torch.float32)
        tidy = inputs.map(lambda t: layout(t).clone(memory_format=torch.contiguous_format))
        assert_same_bits(run(kind.function, inputs.map(layout)), run(kind.function, tidy))


# ---- padding, zero lengths and empty input


@dtypes
@kinds
def test_padding_is_not_read(kind: Kind, dtype: torch.dtype, isa: str) -> None:
    case = Case(B=5, T=8, D=5, H=17, L=2, bidirectional=True, lengths=(3, 0, 1, 8, 5), why="NaN in the padding")
    nan, zero = (kind.inputs(case, dtype, padding=p) for p in (float("nan"), 0.0))
    nan.dy[torch.arange(case.T).unsqueeze(1) >= nan.lengths] = float("nan")
    assert_same_bits(run(kind.function, nan), run(kind.function, zero))


@kinds
def test_zero_length_returns_the_initial_state(kind: Kind) -> None:
    inputs = kind.inputs(Case(B=3, T=4, D=5, H=6, bidirectional=True, lengths=(0, 4, 0), why=""), torch.float32)
    got, empty = run(kind.function, inputs), [0, 2]
    assert torch.equal(got["h_n"][:, empty], inputs.hx[0][:, empty])
    assert torch.equal(got["dh0"][:, empty], inputs.dh_n[:, empty])
    assert not got["y"][:, empty].any() and not got["dx"][:, empty].any()


@kinds
def test_no_steps_and_no_batch(kind: Kind) -> None:
    module, _ = kind.pair(input_size=3, hidden_size=5, num_layers=2)
    h0 = torch.randn(2, 4, 5, requires_grad=True)
    y, h_n = module(torch.randn(0, 4, 3), h0)
    assert y.shape == (0, 4, 5) and torch.equal(h_n, h0)
    h_n.sum().backward()
    assert all(not p.grad.any() for p in module.parameters())
    x = torch.randn(4, 0, 3, requires_grad=True)
    y, h_n = module(x)
    assert y.shape == (4, 0, 5) and h_n.shape == (2, 0, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape


@kinds
def test_nan_propagates_in_its_sequence_only(kind: Kind, isa: str) -> None:
    inputs = kind.inputs(CHOSEN[0], torch.float32)
    clean = run(kind.function, inputs)
    inputs.x[1, 0] = float("nan")
    got = run(kind.function, inputs)
    assert torch.equal(got["y"][:, 1:], clean["y"][:, 1:]) and torch.equal(got["dx"][:, 1:], clean["dx"][:, 1:])
    assert got["y"][1:, 0].isnan().all() and torch.equal(got["y"][0], clean["y"][0])


# ---- modules

constructors = pytest.mark.parametrize(
    "arguments",
    [
        dict(input_size=5, hidden_size=7),
        dict(input_size=5, hidden_size=7, bias=False, batch_first=True),
        dict(input_size=5, hidden_size=7, num_layers=3, dropout=0.25, bidirectional=True),
    ],
    ids=lambda a: "-".join(map(str, a.values())),
)


@constructors
@kinds
def test_parameters_repr_and_attributes_match_torch(kind: Kind, arguments: dict) -> None:
    ours, theirs = kind.pair(**arguments)
    for (n, p), (m, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m and torch.equal(p, q) and p.dtype == q.dtype
    assert repr(ours) == repr(theirs)
    for name in (*torch.nn.RNNBase.__constants__, *(["nonlinearity"] if kind.options else [])):
        assert getattr(ours, name) == getattr(theirs, name)
    assert isinstance(ours, torch.nn.RNNBase) and not isinstance(ours, kind.theirs)
    for module in (ours, theirs):
        torch.manual_seed(3)
        module.reset_parameters()
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@constructors
@kinds
def test_state_dict_exchange_with_torch(kind: Kind, arguments: dict) -> None:
    ours, theirs = kind.pair(**arguments)[0].eval(), kind.pair(seed=1, **arguments)[1].eval()
    x = torch.randn(4, 3, 5)
    before = theirs(x)[0]
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x)[0], before)
    buffer = io.BytesIO()
    torch.save(kind.pair(seed=2, **arguments)[0].state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True))
    assert not torch.equal(theirs(x)[0], before)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


def test_positional_arguments() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for arguments in (
            (2, 5),
            (2, 5, 2, "relu"),
            (2, 5, 2, "relu", False, True, 0.5, True, 0, "cpu", torch.float64),
        ):
            ours, theirs = seqkernels.nn.RNN(*arguments), torch.nn.RNN(*arguments)
            assert repr(ours) == repr(theirs) and ours.mode == theirs.mode
            assert next(ours.parameters()).dtype == next(theirs.parameters()).dtype
        arguments = (2, 5, 2, False, True, 0.5, True, 0, "cpu", torch.float64)
        assert repr(seqkernels.nn.GRU(*arguments)) == repr(torch.nn.GRU(*arguments))


@kinds
def test_deepcopy_and_pickle(kind: Kind, tmp_path) -> None:
    module, _ = kind.pair(input_size=5, hidden_size=7, num_layers=2, bidirectional=True)
    x = torch.randn(6, 4, 5)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert torch.equal(other(x)[0], module(x)[0]) and repr(other) == repr(module)
        assert other.weight_hh_l0.data_ptr() != module.weight_hh_l0.data_ptr()


@pytest.mark.parametrize("input_form", ["batched", "batch first", "unbatched", "packed", "unsorted"])
@pytest.mark.parametrize("state", [True, False], ids=["state", "no state"])
@kinds
def test_results_match_torch_in_each_form(kind: Kind, input_form: str, state: bool) -> None:
    ours, theirs = kind.pair(
        input_size=5, hidden_size=7, num_layers=2, bidirectional=True, batch_first=input_form == "batch first"
    )
    if input_form in ("packed", "unsorted"):
        lengths = [6, 4, 2, 1] if input_form == "packed" else [2, 6, 1, 4]
        x = pack_sequence([torch.randn(n, 5) for n in lengths], enforce_sorted=input_form == "packed")
    else:
        x = torch.randn({"batched": (6, 4, 5), "batch first": (4, 6, 5), "unbatched": (6, 5)}[input_form])
    h0 = torch.randn((4, 7) if input_form == "unbatched" else (4, 4, 7))
    call = (x, h0) if state else (x,)
    assert_near(everything(ours, *call), everything(theirs, *call), torch.float32)


@pytest.mark.parametrize("input_form", ["dense", "packed"])
@kinds
def test_dropout_masks_match_torch(kind: Kind, input_form: str) -> None:
    ours, theirs = kind.pair(input_size=5, hidden_size=16, num_layers=3, dropout=0.4, bidirectional=True)
    x = torch.randn(6, 4, 5)
    x = pack_padded_sequence(x, torch.tensor([6, 5, 2, 1])) if input_form == "packed" else x
    results = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        results.append(everything(module, x))
    assert_near(*results, torch.float32)
    assert_near(everything(ours.eval(), x), everything(theirs.eval(), x), torch.float32)


@kinds
def test_training_matches_torch(kind: Kind) -> None:
    ours, theirs = kind.pair(input_size=5, hidden_size=16, num_layers=2, bidirectional=True)
    x, target = torch.randn(7, 4, 5), torch.randn(7, 4, 32)
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for _ in range(10):
            optimizer.zero_grad()
            (module(x)[0] - target).square().mean().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


# ---- errors

KIND_CONSTRUCTORS = {n: a for n, a in CONSTRUCTORS.items() if "proj" not in n} | {
    "proj_size": dict(input_size=2, hidden_size=3, proj_size=2),
    "proj_size 0": dict(input_size=2, hidden_size=3, proj_size=0),
}
NONLINEARITIES = {
    "unknown": ((2, 3), dict(nonlinearity="sigmoid")),
    "unknown, by position": ((2, 3, 1, "RELU"), {}),
    "none": ((2, 3), dict(nonlinearity=None)),
    "a bool by position": ((2, 3, 1, True), {}),
    "twice": ((2, 3, 1, "tanh"), dict(nonlinearity="relu")),
}


def plain(error: tuple[type[BaseException], str]) -> tuple[type[BaseException], str]:
    return error[0], re.sub(r"\b\w*\.?__init__", "__init__", error[1])


@pytest.mark.parametrize("arguments", KIND_CONSTRUCTORS.values(), ids=KIND_CONSTRUCTORS)
@kinds
def test_constructor_errors_match_torch(kind: Kind, arguments: dict) -> None:
    if kind is GRU and "proj_size" in arguments:  # GRU of seqkernels supports a projection
        kind.ours(**arguments)
        return
    if arguments.get("proj_size") == 0:  # torch rejects the keyword, but accepts 0 by position
        kind.ours(**arguments, **kind.options)
        return
    classes = kind.theirs, kind.ours
    theirs, ours = (plain(raised(lambda cls=cls: cls(**arguments, **kind.options))) for cls in classes)
    assert ours == theirs


@pytest.mark.parametrize(("positional", "keywords"), NONLINEARITIES.values(), ids=NONLINEARITIES)
def test_nonlinearity_errors_match_torch(positional: tuple, keywords: dict) -> None:
    theirs, ours = (plain(raised(lambda m=m: m.RNN(*positional, **keywords))) for m in (torch.nn, seqkernels.nn))
    if len(positional) > 3 and keywords:  # Python's error text, because the constructor has an explicit signature
        theirs = TypeError, "__init__() got multiple values for argument 'nonlinearity'"
    assert ours == theirs


KIND_CALLS = {n: c for n, c in CALLS.items() if not re.search("c0|cell|projected", n)}


@pytest.mark.parametrize(("constructor", "call"), KIND_CALLS.values(), ids=KIND_CALLS)
@kinds
def test_module_errors_match_torch(kind: Kind, constructor: dict, call: Callable) -> None:
    """The table of LSTM, with h0 as the state."""

    def refused(cls: type[torch.nn.Module]) -> tuple[type[BaseException], str]:
        x, *states = call()
        return raised(lambda: cls(5, 6, **constructor, **kind.options)(x, *(s[0] for s in states)))

    assert refused(kind.ours) == refused(kind.theirs)


B, T, D, H = 3, 4, 5, 6
MODULE = {
    "hx a pair": (lambda m: m(zeros(T, B, D), (zeros(1, B, H),) * 2), TypeError, form("hx", "be a tensor h0", op=".+")),
    "hx a list": (lambda m: m(zeros(T, B, D), [0.0]), TypeError, form("hx", op=".+")),
    "h0 dtype": (lambda m: m(zeros(T, B, D), zeros(1, B, H).double()), RuntimeError, form("h0", op=".+")),
    "h0 device": (lambda m: m(zeros(T, B, D), zeros(1, B, H).to("meta")), ValueError, form("h0", op=".+")),
    "input a list": (lambda m: m([[0.0]]), TypeError, form("input", op=".+")),
    "packed h0": (lambda m: m(packed_of(D), zeros(1, 4, H)), RuntimeError, r"Expected hidden size \(1, 3, 6\)"),
    "lengths with a packed input": (lambda m: m(packed_of(D), lengths=[4, 2, 1]), ValueError, form("lengths", op=".+")),
    "lengths negative": (lambda m: m(zeros(T, B, D), lengths=[4, -1, 2]), ValueError, form("lengths", op=".+")),
    "lengths above T": (lambda m: m(zeros(T, B, D), lengths=[4, 5, 2]), ValueError, form("lengths", op=".+")),
    "lengths float": (lambda m: m(zeros(T, B, D), lengths=zeros(B)), TypeError, form("lengths", op=".+")),
    "lengths, unbatched": (lambda m: m(zeros(T, D), lengths=[4]), ValueError, form("lengths", op=".+")),
}


@pytest.mark.parametrize(("call", "error", "text"), MODULE.values(), ids=MODULE)
@kinds
def test_module_errors(kind: Kind, call: Callable, error: type[Exception], text: str) -> None:
    module, _ = kind.pair(input_size=D, hidden_size=H)
    with pytest.raises(error, match=text):
        call(module)


@kinds
def test_functional_and_op_errors(kind: Kind) -> None:
    inputs, G = kind.inputs(Case(B=B, T=T, D=D, H=H, why="dense"), torch.float32), kind.gates * H
    x, h0, weights, *_ = op_arguments(kind, Case(B=B, T=T, D=D, H=H, why="dense"))
    changes = {
        "weights 3": (dict(weights=weights[:3]), form("weights", op=kind.name + r"\w*")),
        "weights 5": (dict(weights=[*weights, zeros(H, H)]), form("weights", op=kind.name + r"\w*")),
        "w_ih": (
            dict(weights=[zeros(G, D + 1), *weights[1:]]),
            form("(weight|bias)_ih", rf".*\[{G}, 5\]", rf"\[{G}, 6\]", kind.name + r"\w*"),
        ),
        "w_hh": (dict(weights=[weights[0], zeros(G, H + 1), *weights[2:]]), form("(weight|bias)_hh", op=".+")),
        "b_hh": (dict(weights=[*weights[:3], zeros(G + 1)]), form("(weight|bias)_hh", op=".+")),
        "h0 size": (dict(hx=zeros(1, B, H + 1)), form("h0", op=kind.name + r"\w*")),
        "h0 2-D": (dict(hx=zeros(B, H)), form("h0", op=kind.name + r"\w*")),
        "lengths too few": (dict(lengths=torch.tensor([1, 2])), form("lengths", op=kind.name + r"\w*")),
        "lengths above T": (dict(lengths=torch.tensor([1, 2, 9])), form("lengths", got=".*9.*", op=kind.name + r"\w*")),
    }
    if kind.gates == 3:
        change = dict(weights=[zeros(G + 1, D), zeros(G + 1, H), zeros(G + 1), zeros(G + 1)])
        changes["rows"] = (change, form("weight_.h", op=".+"))
    good = dict(input=x, weights=weights, hx=h0)
    kind.function(**good)
    for change, text in changes.values():
        with pytest.raises(ValueError, match=text):
            kind.function(**good | change)
        bad = {"weights": weights, "hx": h0, "lengths": None} | change
        for suffix in ("", "_forward"):
            with pytest.raises(RuntimeError, match=text):
                kind.op(suffix)(x, bad["hx"], bad["weights"], None, bad["lengths"], False)
    good = list(backward_arguments(kind, inputs.case))
    kind.op("_backward")(*good)
    saved = [] if kind is not GRU else [(9, good[9][..., 1:], "saved"), (9, good[9].double(), "saved")]
    for i, value, name in [(0, good[0][1:], "dy"), (1, good[1].double(), "dh_n"), (8, good[8][1:], "y"), *saved]:
        with pytest.raises(RuntimeError, match=form(name, op=kind.name + r"\w*")):
            kind.op("_backward")(*good[:i], value, *good[i + 1 :])


# ---- torch.func and forward-mode AD

FUNC_CASES = [
    Case(B=2, T=3, D=2, H=3, bidirectional=True, why="dense"),
    Case(B=3, T=3, D=2, H=2, lengths=(2, 0, 3), why="lengths"),
    Case(B=3, T=3, D=2, H=2, lengths=(3, 2, 1), packed=True, state=False, why="packed"),
]
func_cases = pytest.mark.parametrize("case", FUNC_CASES, ids=str)
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def loss_of(module: torch.nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    y, states = torch.func.functional_call(module, weights, (x,))
    return weighted((y, *tuple_of(states)))


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in module.named_parameters()}


@func_cases
@all_kinds
def test_func_grad_matches_autograd(kind: Kind, case: Case) -> None:
    inputs = kind.inputs(case, torch.float64, padding=0.0)
    function, tensors = of_tensors(kind, inputs)
    got = torch.func.grad(lambda *a: weighted(function(*a)), argnums=tuple(range(len(tensors))))(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    close(got, torch.autograd.grad(weighted(function(*leaves)), leaves))
    through_torch, _ = of_tensors(dataclasses.replace(kind, function=kind.definition), inputs)
    close(got, torch.autograd.grad(weighted(through_torch(*leaves)), leaves))


@all_kinds
def test_func_grad_of_a_module_matches_torch(kind: Kind) -> None:
    ours, theirs = kind.pair(input_size=5, hidden_size=7, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 4, 5, dtype=torch.float64)
    grads = [torch.func.grad(functools.partial(loss_of, m))(weights_of(m), x) for m in (ours, theirs)]
    close(*grads)


@all_kinds
def test_per_sample_gradients_match_a_loop(kind: Kind) -> None:
    module, theirs = kind.pair(input_size=3, hidden_size=4, num_layers=2, bidirectional=True, dtype=torch.float64)
    xs, weights = torch.randn(5, 6, 3, dtype=torch.float64), weights_of(module)
    got = torch.func.vmap(torch.func.grad(functools.partial(loss_of, module)), in_dims=(None, 0))(weights, xs)
    for i, x in enumerate(xs):
        y, states = theirs(x)
        want = torch.autograd.grad(weighted((y, *tuple_of(states))), list(theirs.parameters()))
        close(tuple(g[i] for g in got.values()), want)


@all_kinds
def test_vmap_matches_a_loop(kind: Kind) -> None:
    """vmap over x, another dimension, x and states, the weights of an ensemble, and nested."""
    module, _ = kind.pair(input_size=3, hidden_size=4)
    xs, outer = torch.randn(5, 6, 2, 3), torch.randn(2, 5, 6, 2, 3)

    def stacked(call: Callable, *columns) -> tuple[Tensor, ...]:
        rows = [torch.utils._pytree.tree_leaves(call(*row)) for row in zip(*columns, strict=True)]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True))

    def same(got, want: tuple[Tensor, ...]) -> None:
        for g, w in zip(torch.utils._pytree.tree_leaves(got), want, strict=True):
            assert torch.equal(g, w)

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            same(torch.vmap(module)(xs), stacked(module, xs))
            same(torch.vmap(module, in_dims=2)(xs.movedim(0, 2)), stacked(module, xs))
            states = torch.randn(5, 1, 2, 4)
            hx = states if kind.gates != 4 else (states, states.flip(0))
            rows = states if kind.gates != 4 else list(zip(*hx, strict=True))
            same(torch.vmap(module)(xs, hx), stacked(module, xs, rows))
            same(torch.vmap(torch.vmap(module))(outer), stacked(lambda x: stacked(module, x), outer))
            lengths = torch.tensor([4, 0])
            call = functools.partial(module, lengths=lengths)
            same(torch.vmap(call)(xs), stacked(call, xs))
    ensemble = [kind.pair(seed=s, input_size=3, hidden_size=4)[0] for s in range(3)]
    weights, _ = torch.func.stack_module_state(ensemble)
    got = torch.vmap(lambda w, x: torch.func.functional_call(module, w, (x,)), in_dims=(0, None))(weights, xs[0])
    same(got, stacked(lambda m: m(xs[0]), ensemble))


@func_cases
@all_kinds
def test_jvp_matches_finite_differences_and_jacrev(kind: Kind, case: Case) -> None:
    function, tensors = of_tensors(kind, kind.inputs(case, torch.float64, padding=0.0))
    tangents, step = directions_like(tensors), 1e-6
    outputs, got = torch.func.jvp(function, tensors, tangents)
    close(outputs, function(*tensors))
    ahead, behind = (function(*(t + s * d for t, d in zip(tensors, tangents, strict=True))) for s in (step, -step))
    for g, a, b in zip(got, ahead, behind, strict=True):
        torch.testing.assert_close(g, (a - b) / (2 * step), rtol=1e-6, atol=1e-7)
    jacobians = torch.func.jacrev(function, argnums=tuple(range(len(tensors))))(*tensors)
    for g, of_output in zip(got, jacobians, strict=True):
        close(g, sum((j * d).flatten(g.dim()).sum(-1) for j, d in zip(of_output, tangents, strict=True)))


@func_cases
@all_kinds
def test_forward_ad_matches_jvp(kind: Kind, case: Case) -> None:
    """torch.autograd.forward_ad, with tangents of all tensors and of each tensor."""
    function, tensors = of_tensors(kind, kind.inputs(case, torch.float64, padding=0.0))
    tangents, total = directions_like(tensors), None

    def duals(moving: set[int]) -> list[Tensor]:
        """Tangents of the outputs, None for outputs without tangent."""
        with forward_ad.dual_level():
            both = zip(tensors, tangents, strict=True)
            arguments = [forward_ad.make_dual(t, d) if i in moving else t for i, (t, d) in enumerate(both)]
            unpacked = [forward_ad.unpack_dual(o) for o in function(*arguments)]
            return [torch.zeros_like(p) if t is None else t for p, t in unpacked]

    for i in range(len(tensors)):
        one = duals({i})
        total = one if total is None else [a + b for a, b in zip(total, one, strict=True)]
    every = duals(set(range(len(tensors))))
    close(every, list(torch.func.jvp(function, tensors, tangents)[1]))
    close(every, total)


def of_x(module: torch.nn.Module) -> Callable:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        y, states = module(x)
        return y, *tuple_of(states)

    return function


@all_kinds
def test_jacrev_jacfwd_and_hessian_match_torch(kind: Kind) -> None:
    ours, theirs = kind.pair(input_size=2, hidden_size=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    want = torch.autograd.functional.jacobian(of_x(theirs), x)
    close(torch.func.jacrev(of_x(ours))(x), want)
    close(torch.func.jacfwd(of_x(ours))(x), want)
    for m in (ours, theirs):
        m.requires_grad_(False)
    close(torch.func.jacrev(of_x(ours))(x), want)
    weights = weights_of(ours)
    got = torch.func.hessian(lambda w: loss_of(ours, weights | {"weight_hh_l0": w}, x))(weights["weight_hh_l0"])
    want = torch.autograd.functional.hessian(
        lambda w: loss_of(theirs, weights | {"weight_hh_l0": w}, x), weights["weight_hh_l0"]
    )
    close(got, want)
    got = torch.func.hessian(lambda x: weighted(of_x(ours)(x)))(x)
    close(got, torch.autograd.functional.hessian(lambda x: weighted(of_x(theirs)(x)), x))


@func_cases
@all_kinds
def test_vjp_function_outlives_its_context(kind: Kind, case: Case) -> None:
    """Calls the function returned by vjp twice, and under vmap, which gives the Jacobian."""
    function, tensors = of_tensors(kind, kind.inputs(case, torch.float64, padding=0.0))
    outputs, pull = torch.func.vjp(function, *tensors)
    upstream = directions_like(outputs, seed=2)
    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(function(*leaves), leaves, upstream)
    close(pull(upstream), want)
    close(pull(upstream), want)
    with torch.no_grad():
        close(pull(upstream), want)
    n = outputs[0].numel()
    rows = torch.eye(n, dtype=torch.float64).view(n, *outputs[0].shape)
    others = tuple(torch.zeros(n, *o.shape, dtype=torch.float64) for o in outputs[1:])
    jacobians = torch.vmap(pull)((rows, *others))
    every = torch.func.jacrev(lambda *a: function(*a)[0], argnums=tuple(range(len(tensors))))(*tensors)
    close(jacobians, tuple(j.view(n, *t.shape) for j, t in zip(every, tensors, strict=True)))


@all_kinds
def test_grad_of_grad_and_jvp_of_grad(kind: Kind) -> None:
    """Hessian-vector products: reverse over reverse, forward over reverse, and torch."""
    ours, theirs = kind.pair(input_size=3, hidden_size=4, dtype=torch.float64)
    x, v = torch.randn(2, 5, 2, 3, dtype=torch.float64).unbind()

    def gradient(m: torch.nn.Module) -> Callable:
        return torch.func.grad(lambda x: weighted(of_x(m)(x)))

    reverse = torch.func.grad(lambda x: (gradient(ours)(x) * v).sum())(x)
    forward = torch.func.jvp(gradient(ours), (x,), (v,))[1]
    want = torch.autograd.functional.hvp(lambda x: weighted(of_x(theirs)(x)), x, v)[1]
    close(reverse, want)
    close(forward, want)


# ---- autocast


@pytest.mark.parametrize("input_form", ["dense", "lengths", "packed"])
@all_kinds
def test_autocast_computes_in_bfloat16(kind: Kind, input_form: str) -> None:
    module, _ = kind.pair(input_size=5, hidden_size=16, num_layers=2, bidirectional=True)
    x, h0 = torch.randn(7, 4, 5), torch.randn(4, 4, 16) * 0.5
    hx = (h0, h0.flip(0)) if kind.gates == 4 else h0
    keywords = {"lengths": torch.tensor([7, 3, 0, 2])} if input_form == "lengths" else {}
    argument = pack_padded_sequence(x, torch.tensor([7, 5, 5, 1])) if input_form == "packed" else x
    want, want_states = module(argument, hx, **keywords)
    with torch.autocast("cpu", torch.bfloat16):
        got, got_states = module(argument, hx, **keywords)
    if input_form == "packed":
        got, want = got.data, want.data
    for g, w in zip((got, *tuple_of(got_states)), (want, *tuple_of(want_states)), strict=True):
        assert g.dtype == torch.bfloat16 and w.dtype == torch.float32
        torch.testing.assert_close(g.float(), w, rtol=3e-2, atol=3e-2)
    parameters = list(module.parameters())
    grads, wants = (torch.autograd.grad(o.float().square().mean(), parameters) for o in (got, want))
    for g, w in zip(grads, wants, strict=True):
        assert g.dtype == torch.float32
        assert (
            kind is RELU or (g - w).abs().max() <= 0.1 * w.abs().max()
        )  # the derivative of relu is discontinuous at 0


# ---- explain


@kinds
def test_explain(kind: Kind, isa: str) -> None:
    answer = seqkernels.explain(kind.name, T=20, B=9, D=24, H=96, bidirectional=True, lengths=[20] * 9)
    assert answer["op"] == kind.name and answer["isa"] == isa and answer["kernel"] == "cpu"
    assert 1 <= answer["threads"] <= 2 * answer["row_groups"] * answer["unit_groups"]
    assert set(answer["unsupported"]) == {"cuda", "triton"}
    with pytest.raises(NotImplementedError, match=kind.name):
        seqkernels.explain(kind.name, T=20, B=9, D=24, H=96, dtype=torch.int64)


def test_explain_error_lists_the_ops() -> None:
    names = "lstm, .*, rnn_relu, .*rnn, embedding_bag, scaled_dot_product_attention, .*, crf_viterbi"
    with pytest.raises(ValueError, match=f"op must be one of {names}, got 'attention'"):
        seqkernels.explain("attention", T=1, B=1, D=1, H=1)


MODULES = {
    "lstm": "LSTM",
    "gru": "GRU",
    "dreamer_gru": "DreamerGRU",
    "mgu": "MGU",
    "nested_lstm": "NestedLSTM",
    "slstm": "SLSTM",
}


@pytest.mark.parametrize("name", [*MODULES, "rnn", "rnn_tanh", "rnn_relu"])
def test_explain_of_a_name_matches_the_default_module(name: str) -> None:
    options = {"nonlinearity": "relu"} if name == "rnn_relu" else {}
    module = getattr(seqkernels.nn, MODULES.get(name, "RNN"))(3, 4, **options)
    assert seqkernels.explain(name, T=2, B=2, D=3, H=4)["op"] == module._kind.name
