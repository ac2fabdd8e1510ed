"""Recurrent layers: parity with the definition, derivatives, reproducible bits, and all forms of input."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import gc
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import seqkernels
from seqkernels import functional, reference
from seqkernels.nn import LSTM
from support.cases import (
    CASES,
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
    run,
    run_module,
    weight_names,
)
from support.recurrent import OP_CASES, SEQUENCE, as_batch, as_packed, compiled, kind, negated, spread

ops = torch.ops.seqkernels
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
cases = pytest.mark.parametrize("case", CASES, ids=str)
ragged_cases = pytest.mark.parametrize("case", RAGGED, ids=str)
tiny_cases = pytest.mark.parametrize("case", TINY, ids=str)


def cases_like(text: str) -> list[Case]:
    return [c for c in CASES if text in str(c)]


# ---- parity


@functools.cache
def definition(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Results of the reference in float64, for inputs rounded to dtype."""
    return defined(make_inputs(case, dtype))


@dtypes
@cases
def test_parity(case: Case, dtype: torch.dtype, isa: str) -> None:
    assert_near(run(functional.lstm, make_inputs(case, dtype)), definition(case, dtype), dtype)


@pytest.mark.parametrize("case", [CASES[0], *cases_like("L2-bi")], ids=str)
def test_parity_in_raw_memory(case: Case, raw_memory: None, isa: str) -> None:
    dirt = [torch.full((case.B, case.T, 4 * case.H), 1e30) for _ in range(8)]
    del dirt
    assert_near(run(functional.lstm, make_inputs(case, torch.float32)), definition(case, torch.float32), torch.float32)


@pytest.mark.parametrize("case", [c for c in CASES if c.B and c.T and 0 not in (c.lengths or (1,))], ids=str)
def test_definition_matches_torch(case: Case) -> None:
    """The reference in float64 against torch.nn.LSTM; batches with lengths are packed for torch."""
    torch.set_num_threads(1)
    inputs = make_inputs(case, torch.float64, padding=0.0)
    want = defined(inputs)
    module = module_of(torch.nn.LSTM, inputs)
    x = inputs.x.detach().requires_grad_()
    hx = tuple(t.detach().requires_grad_() for t in inputs.hx) if inputs.hx else ()
    dy = inputs.dy
    if case.packed:
        y, (h_n, c_n) = module(PackedSequence(x, inputs.batch_sizes), hx or None)
        y = y.data
    elif case.lengths is not None:
        packed = pack_padded_sequence(x, inputs.lengths, batch_first=case.batch_first, enforce_sorted=False)
        y, (h_n, c_n) = module(packed, hx or None)
        y, _ = pad_packed_sequence(y, batch_first=case.batch_first, total_length=case.T)
    else:
        y, (h_n, c_n) = module(x, hx or None)
    grads = torch.autograd.grad([y, h_n, c_n], [x, *hx, *module.parameters()], [dy, inputs.dh_n, inputs.dc_n])
    names = ["dx", *(["dh0", "dc0"] if hx else []), *weight_names(case)]
    got = {"y": y.detach(), "h_n": h_n.detach(), "c_n": c_n.detach()} | dict(zip(names, grads, strict=True))
    assert_near(got, want, torch.float64)


@pytest.mark.parametrize("upstream", [("dy",), ("dh_n",), ("dc_n",), ("dy", "dc_n")], ids="+".join)
@pytest.mark.parametrize("case", [CASES[0], *cases_like("P5")], ids=str)
def test_gradient_of_each_output(case: Case, upstream: tuple[str, ...]) -> None:
    inputs = make_inputs(case, torch.float64)
    assert_near(run(functional.lstm, inputs, upstream), defined(inputs, upstream), torch.float64)


@pytest.mark.parametrize("wanted", ["dx", "dh0", "dc0", "dw_ih_l0", "dw_hh_l0", "db_hh_l0", "dw_hr_l0_reverse"])
def test_gradients_are_independent_of_requires_grad_of_other_inputs(wanted: str) -> None:
    case = Case(B=6, T=9, D=8, H=24, P=5, bidirectional=True, lengths=(9, 4, 0, 7, 7, 2), why="all options")
    inputs = make_inputs(case, torch.float32)
    everything = run(functional.lstm, inputs)
    names = ["dx", "dh0", "dc0", *weight_names(case)]
    for name, tensor in zip(names, inputs.differentiable(), strict=True):
        tensor.requires_grad_(name == wanted)
    y, (h_n, c_n) = functional.lstm(inputs.x, inputs.hx, inputs.weights, **inputs.keywords())
    torch.autograd.backward([y, h_n, c_n], [inputs.dy, inputs.dh_n, inputs.dc_n])
    for name, tensor in zip(names, inputs.differentiable(), strict=True):
        if name == wanted:
            assert_same_bits({name: tensor.grad}, everything, [name])
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=lambda d: str(d).removeprefix("torch."))
def test_error_does_not_exceed_the_error_of_torch(dtype: torch.dtype) -> None:
    """RMS error against float64 relative to the norm of each tensor, for each output and gradient.

    Combined over all sizes and seeds, because the error of a single tensor varies by several percent.
    """
    ours: dict[str, float] = collections.defaultdict(float)
    theirs: dict[str, float] = collections.defaultdict(float)
    for case, seed in itertools.product(REALISTIC, range(3)):
        inputs = make_inputs(case, dtype, seed=seed)
        want = defined(inputs)
        with one_thread():
            torchs = run_module(module_of(torch.nn.LSTM, inputs), inputs)
        for total, got in ((ours, run(functional.lstm, inputs)), (theirs, torchs)):
            for name, w in want.items():
                total[kind(name)] += ((got[name].double() - w).square().sum() / w.square().mean()).item()
    ratios = {name: round((ours[name] / theirs[name]) ** 0.5, 3) for name in ours}
    assert max(ratios.values()) <= ERROR_RATIO[dtype], f"ratio of the RMS error to that of torch: {ratios}"


# ---- derivatives


def of_tensors(inputs: Inputs):
    """lstm as a function of its differentiable tensors, and these tensors."""
    hx = inputs.hx is not None

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        state, weights = (rest[:2], rest[2:]) if hx else (None, rest)
        y, (h_n, c_n) = functional.lstm(x, state, list(weights), **inputs.keywords())
        return y, h_n, c_n

    return function, [t.detach().requires_grad_() for t in inputs.differentiable()]


@tiny_cases
def test_gradcheck(case: Case, isa: str) -> None:
    function, tensors = of_tensors(make_inputs(case, torch.float64, padding=0.0))
    assert torch.autograd.gradcheck(function, tensors, atol=1e-6)


@pytest.mark.sample(5)
@tiny_cases
def test_gradgradcheck(case: Case) -> None:
    function, tensors = of_tensors(make_inputs(case, torch.float64, padding=0.0))
    assert torch.autograd.gradgradcheck(function, tensors, atol=1e-5, fast_mode=case.L > 1)


@pytest.mark.parametrize("case", [CASES[0], *cases_like("P5")], ids=str)
def test_gradient_penalty_matches_the_definition(case: Case) -> None:
    """The gradient of the norm of the first gradient, which depends on all saved activations."""

    def penalty(lstm) -> list[Tensor]:
        inputs = make_inputs(case, torch.float64, padding=0.0).map(lambda t: t.detach().requires_grad_())
        y, (h_n, c_n) = lstm(inputs.x, inputs.hx, inputs.weights, **inputs.keywords())
        wanted = inputs.differentiable()
        first = torch.autograd.grad([y, h_n, c_n], wanted, [inputs.dy, inputs.dh_n, inputs.dc_n], create_graph=True)
        loss = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(loss, [*wanted, inputs.dy, inputs.dh_n, inputs.dc_n]))

    got, want = penalty(functional.lstm), penalty(reference.lstm)
    assert_near(dict(enumerate(got)), dict(enumerate(want)), torch.float64)


def test_backward_twice_with_retain_graph() -> None:
    inputs = make_inputs(CASES[0], torch.float32)
    x = inputs.x.requires_grad_()
    y, _ = functional.lstm(x, inputs.hx, inputs.weights, **inputs.keywords())
    (first,) = torch.autograd.grad(y, x, inputs.dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, inputs.dy)
    assert torch.equal(first, second)


def test_weight_modified_in_place_before_backward_raises() -> None:
    inputs = make_inputs(CASES[0], torch.float32).map(lambda t: t.detach().requires_grad_())
    y, _ = functional.lstm(inputs.x, inputs.hx, inputs.weights, **inputs.keywords())
    with torch.no_grad():
        inputs.weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_input_features() -> None:
    """D = 0: only the recurrent projection."""
    inputs = make_inputs(Case(B=3, T=4, D=0, H=5, why="no features"), torch.float64)
    assert_near(run(functional.lstm, inputs), defined(inputs), torch.float64)


# ---- the ops and torch.compile


def op_arguments(case: Case, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple:
    """(x, h0, c0, weights, batch_sizes, lengths, bidirectional, bias, projected) of one layer."""
    assert case.L == 1 and not case.batch_first
    inputs = make_inputs(case, dtype)
    if grad:
        inputs = inputs.map(lambda t: t.detach().requires_grad_())
    h0, c0 = inputs.hx or (None, None)
    of_weights = case.bidirectional, case.bias, case.P > 0
    return inputs.x, h0, c0, inputs.weights, inputs.batch_sizes, inputs.lengths, *of_weights


def backward_arguments(case: Case, dtype: torch.dtype = torch.float32) -> list:
    """Arguments of `lstm_backward`, from a forward pass."""
    inputs = make_inputs(case, dtype)
    forward = op_arguments(case, dtype)
    y, _, _, gates, cells = ops.lstm_forward(*forward)
    upstream = [inputs.dy, inputs.dh_n, inputs.dc_n]
    return [*upstream, *forward[:7], y, gates, cells, True, True, *forward[7:]]


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_inference(case: Case) -> None:
    torch.library.opcheck(ops.lstm.default, op_arguments(case))


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_forward(case: Case) -> None:
    arguments = [
        a if not isinstance(a, Tensor) else a.nan_to_num().detach().requires_grad_(a.requires_grad)
        for a in op_arguments(case, grad=True)
    ]
    torch.library.opcheck(ops.lstm_forward.default, tuple(arguments))


@pytest.mark.sample(4)
@pytest.mark.parametrize("case", OP_CASES, ids=str)
def test_opcheck_backward(case: Case) -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.lstm_backward.default, tuple(backward_arguments(case)), test_utils=tests)


@pytest.mark.parametrize("absent", [(1,), (2,), (1, 2)], ids=["h0", "c0", "both"])
def test_default_state_is_zero(absent: tuple[int, ...]) -> None:
    """The ops accept None for h0, c0 or both."""
    case = OP_CASES[2]
    inputs, full = make_inputs(case, torch.float32), list(op_arguments(case))
    some = [None if i in absent else a for i, a in enumerate(full)]
    full = [torch.zeros_like(a) if i in absent else a for i, a in enumerate(full)]
    want, got = ops.lstm_forward(*full), ops.lstm_forward(*some)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ops.lstm(*some), want, strict=False))
    upstream = inputs.dy, inputs.dh_n, inputs.dc_n
    dx, dh0, dc0, dw = ops.lstm_backward(*upstream, *full[:7], want[0], *want[3:], True, True, *full[7:])
    ex, eh0, ec0, ew = ops.lstm_backward(*upstream, *some[:7], got[0], *got[3:], True, True, *some[7:])
    assert all(torch.equal(a, b) for a, b in zip((ex, *ew), (dx, *dw), strict=True))
    assert torch.equal(eh0, dh0) if 1 not in absent else not eh0.numel()
    assert torch.equal(ec0, dc0) if 2 not in absent else not ec0.numel()


@pytest.mark.parametrize("want_x, want_w", [(True, True), (True, False), (False, True), (False, False)])
def test_backward_computes_requested_gradients(want_x: bool, want_w: bool) -> None:
    arguments = backward_arguments(OP_CASES[2])
    dx, dh0, dc0, dw = ops.lstm_backward(*arguments)
    some = ops.lstm_backward(*arguments[:-4], want_x, want_w, *arguments[-2:])
    assert_same_bits({"dh0": some[1], "dc0": some[2]}, {"dh0": dh0, "dc0": dc0})
    if want_x:
        assert torch.equal(some[0], dx)
    if want_w:
        assert all(torch.equal(a, b) for a, b in zip(some[3], dw, strict=True))


def test_inference_and_training_ops_agree_and_inference_saves_nothing() -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **kwargs or {})

    inputs = make_inputs(CASES[0], torch.float32)
    module, arguments = module_of(LSTM, inputs), (inputs.x, inputs.hx)
    with Recorder() as recorder, torch.no_grad():
        recorder.names = []
        module(*arguments)
    assert "seqkernels.lstm.default" in recorder.names and "seqkernels.lstm_forward.default" not in recorder.names
    with Recorder() as recorder:
        recorder.names = []
        module(*arguments)
    assert "seqkernels.lstm_forward.default" in recorder.names


@pytest.mark.sample(3)
@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
@pytest.mark.parametrize(
    "case",
    [
        Case(B=3, T=4, D=5, H=6, L=2, bidirectional=True, why="dense"),
        Case(B=3, T=4, D=5, H=6, L=2, P=2, state=False, batch_first=True, why="dense, batch first, projection"),
        Case(B=3, T=4, D=5, H=6, L=2, bidirectional=True, lengths=(2, 0, 4), why="lengths"),
        Case(B=3, T=4, D=5, H=6, L=2, bidirectional=True, lengths=(4, 2, 1), packed=True, why="packed"),
        Case(B=3, T=4, D=5, H=6, state=False, lengths=(4, 2, 1), packed=True, why="packed, no state"),
    ],
    ids=str,
)
def test_compile_without_a_graph_break(case: Case, train: bool) -> None:
    inputs = make_inputs(case, torch.float32)
    module = module_of(LSTM, inputs)
    keywords = {} if inputs.lengths is None else {"lengths": inputs.lengths}

    def whole(m):
        if train:
            return run_module(m, inputs, **keywords)
        with torch.no_grad():
            x = inputs.x if inputs.batch_sizes is None else PackedSequence(inputs.x, inputs.batch_sizes)
            y, (h_n, c_n) = m(x, inputs.hx, **keywords)
        return {"y": y.data if isinstance(y, PackedSequence) else y, "h_n": h_n, "c_n": c_n}

    assert_same_bits(whole(compiled(module)), whole(module))


def test_compile_with_inductor() -> None:
    """The default backend requires a C++ compiler at run time."""
    import shutil

    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("no C++ compiler: neither c++ nor g++ is on the path")
    inputs = make_inputs(CASES[0], torch.float32)
    module = module_of(LSTM, inputs)
    got = run_module(compiled(module, "inductor"), inputs)
    assert_near(got, run_module(module, inputs), torch.float32)


def test_compile_with_dynamic_lengths() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    module = LSTM(5, 6)
    f = compiled(lambda x, lengths: module(x, lengths=lengths)[0], counter)
    for B, T in [(3, 4), (4, 7), (5, 9), (6, 12), (2, 30)]:
        x, lengths = torch.randn(T, B, 5), torch.randint(0, T + 1, (B,))
        assert torch.equal(f(x, lengths), module(x, lengths=lengths)[0])
    assert counter.frame_count <= 2


# ---- equal bits


def canonical(case: Case, dtype: torch.dtype) -> Inputs:
    """A batch with lengths and states, time first, which the tests convert to other forms."""
    assert case.lengths is not None and not case.packed and not case.batch_first
    return make_inputs(case, dtype)


@dtypes
@ragged_cases
def test_packed_padded_and_single_sequences_have_the_same_bits(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs = canonical(case, dtype)
    padded = run(functional.lstm, inputs)
    assert_same_bits(as_packed(inputs), padded, SEQUENCE)
    for b in range(min(case.B, 12)):
        n = int(inputs.lengths[b])
        alone = as_batch(inputs, [b], n, lengths=False)
        for name in ("y", "dx"):
            assert torch.equal(padded[name][n:, b], torch.zeros_like(padded[name][n:, b])), name
        here = {s: padded[s][:n, b : b + 1] if s in ("y", "dx") else padded[s][:, b : b + 1] for s in SEQUENCE}
        assert_same_bits(alone, here, SEQUENCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@ragged_cases
def test_bits_of_a_sequence_are_independent_of_its_batch(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Another order, a part of the batch, and more padding give the same bits."""
    inputs = canonical(case, dtype)
    whole = run(functional.lstm, inputs)
    T = case.T
    shuffled = torch.randperm(case.B, generator=torch.Generator().manual_seed(1)).tolist()
    for chosen, longer in [(shuffled, T), (shuffled[: case.B // 2 + 1], T), (list(range(case.B)), T + 5)]:
        part = as_batch(inputs, chosen, longer, lengths=True)
        for name in ("y", "dx"):
            assert not part[name][T:].any(), name
            part[name] = part[name][:T]
        assert_same_bits(part, {s: whole[s][:, chosen] for s in SEQUENCE}, SEQUENCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("B", [2, 3, 7, 33])
def test_dense_batch_has_the_bits_of_its_rows(B: int, dtype: torch.dtype, isa: str) -> None:
    case = Case(B=B, T=4, D=19, H=70, bidirectional=True, why="dense")
    inputs = make_inputs(case, dtype)
    inputs.lengths = torch.full((B,), case.T)
    whole = run(functional.lstm, inputs)
    for b in range(B):
        alone = as_batch(inputs, [b], case.T, lengths=False)
        assert_same_bits(alone, {s: whole[s][:, b : b + 1] for s in SEQUENCE}, SEQUENCE)


THREADED = [c for c in CASES if c.B * c.T and (c.B * c.T * c.H * (c.D + c.H) > 100_000 or "all options" in c.why)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_bits_are_independent_of_the_number_of_threads(case: Case, dtype: torch.dtype, isa: str) -> None:
    """Includes weight gradients."""
    inputs = make_inputs(case, dtype)
    results = []
    for n in (1, 2, 3, 5):
        torch.set_num_threads(n)
        results.append(run(functional.lstm, inputs))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@dtypes
@pytest.mark.parametrize("case", THREADED, ids=str)
def test_repeated_runs_have_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    """Includes weight gradients, for different contents of new memory."""
    inputs = make_inputs(case, dtype)
    first = run(functional.lstm, inputs)
    for i in range(3):
        moved = inputs.map(lambda t, i=i: torch.cat([t.new_zeros(i + 1), t.flatten()])[i + 1 :].view(t.shape))
        assert_same_bits(run(functional.lstm, moved), first)


@dtypes
@pytest.mark.parametrize(
    "case",
    [
        Case(B=1, T=11, D=7, H=19, why="one stream"),
        Case(B=5, T=11, D=7, H=40, L=2, P=6, why="stacked with projection"),
        Case(B=2, T=11, D=20, H=200, bias=False, why="over two threads"),
    ],
    ids=str,
)
def test_several_calls_have_the_bits_of_one(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype)
    module = module_of(LSTM, inputs)
    with torch.no_grad():
        y, (h_n, c_n) = module(inputs.x, inputs.hx)
        chunks, hx = [], inputs.hx
        for chunk in inputs.x.split([1, 1, 3, 1, 5]):
            out, hx = module(chunk, hx)
            chunks.append(out)
    assert_same_bits({"y": torch.cat(chunks), "h_n": hx[0], "c_n": hx[1]}, {"y": y, "h_n": h_n, "c_n": c_n})


@dtypes
@cases
def test_inference_matches_training(case: Case, dtype: torch.dtype, isa: str) -> None:
    inputs = make_inputs(case, dtype)
    training = run(functional.lstm, inputs)
    with torch.no_grad():
        y, (h_n, c_n) = functional.lstm(inputs.x, inputs.hx, inputs.weights, **inputs.keywords())
    assert_same_bits({"y": y, "h_n": h_n, "c_n": c_n}, training, ("y", "h_n", "c_n"))


def test_concurrent_calls() -> None:
    every = [make_inputs(c, torch.float32, seed=s) for c in THREADED[:4] for s in range(3)]
    want = [run(functional.lstm, inputs) for inputs in every]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(functools.partial(run, functional.lstm), every * 3), want * 3, strict=True):
            assert_same_bits(got, expected)


# ---- padding, zero lengths and empty input


@dtypes
def test_padding_is_not_read(dtype: torch.dtype, isa: str) -> None:
    case = Case(B=5, T=8, D=5, H=17, L=2, bidirectional=True, lengths=(3, 0, 1, 8, 5), why="NaN in the padding")
    nan, zero = (run(functional.lstm, make_inputs(case, dtype, padding=p)) for p in (float("nan"), 0.0))
    assert_same_bits(nan, zero)
    for b, n in enumerate(case.lengths):
        assert not nan["y"][n:, b].any() and not nan["dx"][n:, b].any()


def test_upstream_gradient_of_padding_is_not_read() -> None:
    case = Case(B=4, T=6, D=5, H=7, bidirectional=True, lengths=(3, 0, 6, 1), why="NaN upstream of the padding")
    inputs = make_inputs(case, torch.float32)
    want = run(functional.lstm, inputs)
    inputs.dy[torch.arange(case.T).unsqueeze(1) >= inputs.lengths] = float("nan")
    assert_same_bits(run(functional.lstm, inputs), want)


def test_zero_length_returns_the_initial_state() -> None:
    case = Case(B=3, T=4, D=5, H=6, P=2, bidirectional=True, lengths=(0, 4, 0), why="zero lengths")
    inputs = make_inputs(case, torch.float32)
    got, empty = run(functional.lstm, inputs), [0, 2]
    assert torch.equal(got["h_n"][:, empty], inputs.hx[0][:, empty])
    assert torch.equal(got["c_n"][:, empty], inputs.hx[1][:, empty])
    assert torch.equal(got["dh0"][:, empty], inputs.dh_n[:, empty])
    assert torch.equal(got["dc0"][:, empty], inputs.dc_n[:, empty])
    assert not got["y"][:, empty].any() and not got["dx"][:, empty].any()


@pytest.mark.parametrize("form", ["dense", "lengths"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_no_steps_return_the_initial_state(form: str, bidirectional: bool) -> None:
    module = LSTM(3, 5, num_layers=2, bidirectional=bidirectional)
    h0, c0 = torch.randn(2, module.num_layers * (1 + bidirectional), 4, 5).requires_grad_().unbind()
    keywords = {"lengths": torch.zeros(4, dtype=torch.int64)} if form == "lengths" else {}
    y, (h_n, c_n) = module(torch.randn(0, 4, 3), (h0, c0), **keywords)
    assert y.shape == (0, 4, 5 * (1 + bidirectional))
    assert torch.equal(h_n, h0) and torch.equal(c_n, c0)
    (h_n.sum() + c_n.sum()).backward()
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("batch_first", [False, True])
def test_empty_batch_gives_zero_weight_gradients(batch_first: bool) -> None:
    module = LSTM(3, 5, batch_first=batch_first)
    x = torch.randn((0, 4, 3) if batch_first else (4, 0, 3), requires_grad=True)
    y, (h_n, c_n) = module(x)
    assert y.shape == ((0, 4, 5) if batch_first else (4, 0, 5)) and h_n.shape == c_n.shape == (1, 0, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(not p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("kind", ["list", "tuple", "int32", "int16", "uint8", "strided"])
def test_integer_types_of_lengths(kind: str) -> None:
    case = Case(B=4, T=6, D=5, H=7, lengths=(3, 0, 6, 1), why="lengths")
    inputs = make_inputs(case, torch.float32)
    module, want = module_of(LSTM, inputs), run(functional.lstm, inputs)
    if kind in ("list", "tuple"):
        lengths = {"list": list, "tuple": tuple}[kind](case.lengths)
    elif kind == "strided":
        lengths = torch.stack([inputs.lengths, inputs.lengths + 99], 1)[:, 0]
    else:
        lengths = inputs.lengths.to(getattr(torch, kind))
    y, (h_n, c_n) = module(inputs.x, inputs.hx, lengths=lengths)
    assert_same_bits({"y": y, "h_n": h_n, "c_n": c_n}, want, ("y", "h_n", "c_n"))


def test_module_matches_functional() -> None:
    for case in CASES:
        inputs = make_inputs(case, torch.float32)
        keywords = {} if inputs.lengths is None else {"lengths": inputs.lengths}
        got = run_module(module_of(LSTM, inputs), inputs, **keywords)
        assert_same_bits(got, run(functional.lstm, inputs))


# ---- memory


def turned(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def expanded(t: Tensor) -> Tensor:
    """The first entry of the first dimension, expanded with stride 0."""
    return t[:1].expand_as(t)


@pytest.mark.parametrize("layout", [spread, turned, expanded, negated], ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", [*CASES[:1], *cases_like("P5"), *cases_like("bf-lengths")], ids=str)
def test_strides(case: Case, layout, isa: str) -> None:
    def lay_out(t: Tensor) -> Tensor:
        return layout(t)

    def contiguous(t: Tensor) -> Tensor:
        return layout(t).clone(memory_format=torch.contiguous_format)

    inputs = make_inputs(case, torch.float32)
    if inputs.lengths is not None and layout is expanded:
        inputs.x = inputs.x.nan_to_num()
    assert_same_bits(run(functional.lstm, inputs.map(lay_out)), run(functional.lstm, inputs.map(contiguous)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_inputs_between_sentinels(dtype: torch.dtype, offset: int, isa: str) -> None:
    """Inputs with an unaligned start, surrounded by sentinels, which remain unchanged."""
    case = Case(B=5, T=8, D=5, H=17, P=6, bidirectional=True, lengths=(3, 8, 0, 8, 5), why="guarded")
    inputs = make_inputs(case, dtype)
    want = run(functional.lstm, inputs)
    kept: list[tuple[Tensor, Tensor]] = []

    def guarded(t: Tensor) -> Tensor:
        whole = torch.full((offset + t.numel() + 64,), 777.0, dtype=dtype)
        view = whole[offset : offset + t.numel()].view(t.shape)
        view.copy_(t)
        kept.append((whole, whole.clone()))
        return view

    inside = inputs.map(guarded)
    assert_same_bits(run(functional.lstm, inside), want)
    assert all(torch.equal(now, before) or now.isnan().any() for now, before in kept)
    assert all((now.nan_to_num(-1) == before.nan_to_num(-1)).all() for now, before in kept)


@cases
def test_inputs_are_not_modified(case: Case) -> None:
    inputs = make_inputs(case, torch.float32)
    every = [t for t in (*inputs.differentiable(), inputs.batch_sizes, inputs.lengths) if t is not None]
    upstream = [inputs.dy, inputs.dh_n, inputs.dc_n]
    before = [(t.clone(), t._version) for t in every + upstream]
    run(functional.lstm, inputs)
    for t, (copy, version) in zip(every + upstream, before, strict=True):
        assert t._version == version
        assert (
            torch.equal(t.nan_to_num(777.0), copy.nan_to_num(777.0)) if t.is_floating_point() else torch.equal(t, copy)
        )


def test_outputs_do_not_alias_inputs_or_each_other() -> None:
    for case in (CASES[0], Case(B=3, T=0, D=3, H=5, why="h_n is h0"), Case(B=2, T=3, D=2, H=3, lengths=(0, 0), why="")):
        inputs = make_inputs(case, torch.float32)
        y, (h_n, c_n) = functional.lstm(inputs.x, inputs.hx, inputs.weights, **inputs.keywords())
        every = [t.untyped_storage().data_ptr() for t in (y, h_n, c_n, *inputs.differentiable()) if t.numel()]
        assert len(set(every)) == len(every)


def test_no_memory_leaks() -> None:
    """The same tensors are alive before and after a training step."""
    inputs = make_inputs(Case(B=9, T=20, D=24, H=96, L=2, bidirectional=True, why="leaks"), torch.float32)

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    run(functional.lstm, inputs)
    before = alive()
    for _ in range(3):
        run(functional.lstm, inputs)
    assert alive() <= before


# ---- explain


def test_explain_names_kernel_and_instruction_set(isa: str) -> None:
    answer = seqkernels.explain("lstm", T=20, B=9, D=24, H=96)
    assert answer["isa"] == isa
    assert answer["kernel"]
