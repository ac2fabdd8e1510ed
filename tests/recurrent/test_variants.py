"""All kinds and options of the recurrent layers: the ops with given masks, and the modules, which draw masks.

Dimensions: B batch, T time, N packed rows, D input, H hidden, P size of h (the projection size, or H), G gates.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import seqkernels
from seqkernels import functional, reference
from seqkernels.functional import _recurrent_extras
from support.cases import DTYPES, assert_near, assert_same_bits, batch_sizes_of, one_thread, tuple_of
from support.recurrent import compiled, spread
from support.variants import (
    CASES,
    EMPTY,
    FULLEST,
    HALF,
    OF_SEQUENCE,
    RAGGED,
    TINY,
    VARIANTS,
    Call,
    Case,
    Variant,
    arguments,
    by_definition,
    by_op,
    expected,
    make_call,
    op,
    outputs_alone,
    packed,
    run,
    without_stabiliser,
)

ops = torch.ops.seqkernels


@pytest.fixture(autouse=True)
def few_threads(threads: None) -> None:
    """The calls are too small for two threads; a separate test compares numbers of threads."""
    torch.set_num_threads(1)


# ---- the table of variants


variants = pytest.mark.parametrize("variant", VARIANTS, ids=str)
fullest = pytest.mark.parametrize("variant", FULLEST.values(), ids=FULLEST)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
float_and_half = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


# ---- ops: one layer with given masks


cases = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.mark.parametrize(
    "case, dtype",
    [(case, dtype) for case in CASES for dtype in DTYPES if dtype not in HALF or case in CASES[::2]],
    ids=lambda p: str(p).removeprefix("torch."),
)
@variants
def test_parity(variant: Variant, case: Case, dtype: torch.dtype, isa: str) -> None:
    call = make_call(variant, case, dtype)
    got, want = run(call), expected(variant, case, dtype)
    if dtype in HALF and variant.kinked:
        got, want = outputs_alone(call, got), outputs_alone(call, want)
    if dtype in HALF:
        got, want = without_stabiliser(variant.states, got), without_stabiliser(variant.states, want)
    assert_near(got, want, dtype)


@pytest.mark.parametrize("case", EMPTY, ids=lambda case: case.why)
@fullest
def test_empty_inputs(variant: Variant, case: Case) -> None:
    """Outputs are empty, the last states and their gradients equal the initial ones, all other gradients are zero."""
    call = make_call(variant, case, torch.float32)
    got, want = run(call), expected(variant, case, torch.float32)
    assert_near(got, want, torch.float32)
    for s, state in zip(variant.states, call.states0):
        assert torch.equal(got[f"{s}_n"], state) and torch.equal(got[f"d{s}0"], call.upstream[f"{s}_n"])


@fullest
def test_gradient_of_each_output(variant: Variant) -> None:
    call = make_call(variant, CASES[0], torch.float64)
    for name in call.upstream:
        with one_thread():
            want = run(call, by_definition, [name])
        assert_near(run(call, upstream=[name]), want, torch.float64)


@pytest.mark.sample(10)
@pytest.mark.parametrize("dtype, most", [(torch.float32, 1.25), (torch.bfloat16, 1.0)], ids=["float32", "bfloat16"])
@fullest
def test_error_does_not_exceed_the_error_of_the_definition(variant: Variant, dtype: torch.dtype, most: float) -> None:
    """RMS error of outputs and gradients against float64, relative to that of the definition in the same dtype.

    The ratio is about 1 in float32, and less than 1 in half types, where the kernels round less often.
    """
    variant = Variant(variant.module, {k: o for k, o in variant.options.items() if "clip" not in k})
    case = Case(B=6, T=40, D=40, H=96, P=40, lengths=(40, 31, 31, 20, 7, 2), packed=True, why="a small model")
    ours, theirs = [0.0, 0.0], [0.0, 0.0]
    for seed in range(2):
        call = make_call(variant, case, dtype, seed)
        want = without_stabiliser(variant.states, run(call.map(Tensor.double), by_definition))
        for total, result in ((ours, run(call)), (theirs, run(call, by_definition))):
            got = without_stabiliser(variant.states, result)
            for name, w in want.items():
                error = (got[name].double() - w).square().sum() / w.square().mean().clamp(min=1e-300)
                total[name not in call.upstream] += error.item()
    ratios = [math.sqrt(a / b) for a, b in zip(ours, theirs, strict=True)]
    assert max(ratios) <= most, f"ratio of the RMS error to that of the definition: {ratios}"


@fullest
def test_gradients_are_independent_of_requires_grad_of_other_inputs(variant: Variant) -> None:
    call = make_call(variant, CASES[0], torch.float32)
    every = run(call)
    tensors, names = [call.x, *call.states0, *call.weights], [n for n in every if n.startswith("d")]
    for name, tensor in zip(names, tensors, strict=True):
        one = call.map(lambda t, chosen=tensor: t.detach().requires_grad_(t is chosen))
        outputs = by_op(one)
        (leaf,) = (t for t in (one.x, *one.states0, *one.weights) if t.requires_grad)
        (got,) = torch.autograd.grad(list(outputs.values()), leaf, list(call.upstream.values()))
        assert torch.equal(got, every[name]), name


@dtypes
@cases
@fullest
def test_inference_matches_training(variant: Variant, case: Case, dtype: torch.dtype, isa: str) -> None:
    """The op without saved tensors has the bits of the op with saved tensors."""
    call = make_call(variant, case, dtype)
    outputs = by_op(call)
    for want, got in zip(outputs.values(), op(call)(*arguments(call)), strict=False):
        assert torch.equal(got, want)


@dtypes
@pytest.mark.parametrize("case", CASES[::2], ids=str)
@fullest
def test_recomputed_gates_give_the_same_bits(variant: Variant, case: Case, dtype: torch.dtype, isa: str) -> None:
    call = make_call(variant, case, dtype)
    assert_same_bits(run(call, functools.partial(by_op, recompute=True)), run(call))


@cases
@variants
def test_recomputed_gates_of_every_variant(variant: Variant, case: Case) -> None:
    call = make_call(variant, case, torch.float32)
    assert_same_bits(run(call, functools.partial(by_op, recompute=True)), run(call))


@pytest.mark.parametrize("case", [CASES[0], CASES[3], RAGGED], ids=str)
@float_and_half
@fullest
def test_bits_are_independent_of_the_number_of_threads(variant: Variant, dtype: torch.dtype, case: Case) -> None:
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(run(make_call(variant, case, dtype)))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def sequence(call: Call, b: int, n: int) -> Call:
    """A call with the first n steps of sequence b."""
    return call.by_row(lambda t: t[:n, b : b + 1], lambda t: t[:, b : b + 1], lengths=None)


@float_and_half
@fullest
def test_packed_padded_and_single_sequences_have_the_same_bits(variant: Variant, dtype: torch.dtype, isa: str) -> None:
    case, call = RAGGED, make_call(variant, RAGGED, dtype)
    padded, rows = run(call), run(packed(call, case))
    order = torch.argsort(call.lengths, descending=True, stable=True)
    names = [n for n in OF_SEQUENCE if n in padded]
    for name in names:
        if name.endswith("_n") or (name.startswith("d") and name.endswith("0")):
            assert torch.equal(rows[name], padded[name][:, order]), name
        else:
            assert torch.equal(rows[name], padded[name][:, order][case.valid()[:, order]]), name
            assert not padded[name][~case.valid()].any(), name
    for b, n in enumerate(case.lengths):
        alone = run(sequence(call, b, n))
        here = {s: padded[s][:, b : b + 1] if s[-1] in "n0" else padded[s][:n, b : b + 1] for s in names}
        here |= {s: padded[s][:n, b : b + 1] for s in padded if s.endswith("_steps")}
        assert_same_bits(alone, here, names)


@float_and_half
@variants
def test_several_calls_have_the_bits_of_one(variant: Variant, dtype: torch.dtype, isa: str) -> None:
    """The last states of a chunk are the initial states of the next; masks are split like the input."""
    case = Case(B=3, T=9, D=9, H=66, P=35, bidirectional=False, why="a stream")
    call = make_call(variant, case, dtype)
    whole, chunks, states0 = by_op(call), [], call.states0
    for at in (slice(0, 1), slice(1, 2), slice(2, 5), slice(5, 9)):
        chunk = call.by_row(lambda t, at=at: t[at], lambda t: t)
        chunks.append(by_op(dataclasses.replace(chunk, states0=states0)))
        states0 = tuple(chunks[-1][f"{s}_n"] for s in variant.states)
    for name, want in whole.items():
        got = chunks[-1][name] if name.endswith("_n") else torch.cat([chunk[name] for chunk in chunks])
        assert torch.equal(got, want), name


@float_and_half
@variants
def test_reset_starts_a_new_sequence(variant: Variant, dtype: torch.dtype, isa: str) -> None:
    """Resets split a sequence into segments. Each segment alone has the same bits, in both directions."""
    case = Case(B=4, T=8, D=9, H=66, P=35, lengths=(8, 3, 8, 6), why="with resets")
    call = make_call(variant, case, dtype)
    reset = torch.zeros(8, 4, dtype=torch.bool)
    reset[[3, 6], 0], reset[1, 1], reset[0, 2] = True, True, True
    reset[7, 3] = True  # no effect in padding
    call = dataclasses.replace(call, masks=call.masks | {"reset": reset})
    whole = run(call)
    for b, starts in enumerate([(0, 3, 6, 8), (0, 1, 3), (0, 8), (0, 6)]):
        for start, end in itertools.pairwise(starts):
            part = call.by_row(lambda t, b=b, s=start, e=end: t[s:e, b : b + 1], lambda t, b=b: t[:, b : b + 1])
            first, last = start == 0 and b != 2, end == case.lengths[b]
            begin = torch.tensor([[first], [last]]).unsqueeze(-1)  # directions that begin with the given states
            final = torch.tensor([[last], [start == 0]]).unsqueeze(-1)  # directions that end with the last states
            part = dataclasses.replace(
                part,
                lengths=None,
                states0=tuple(torch.where(begin, s, 0.0) for s in part.states0),
                masks={n: m for n, m in part.masks.items() if n != "reset"},
                upstream={n: torch.where(final, g, 0.0) if n.endswith("_n") else g for n, g in part.upstream.items()},
            )
            alone = run(part)
            for name in (n for n in OF_SEQUENCE if n in whole):
                got = alone[name]
                if name in ("y", "dx") or name.endswith("_steps"):
                    assert torch.equal(got, whole[name][start:end, b : b + 1]), (name, b, start)
                    continue
                for d, there in enumerate((final if name.endswith("_n") else begin)[:, 0, 0]):
                    if there:
                        assert torch.equal(got[d], whole[name][d, b : b + 1]), (name, b, start, d)
    assert not any(whole[f"d{s}0"][0, 2].any() for s in variant.states)  # reset at its first step


def scattered(call: Call) -> Call:
    """The call with strided tensors and masks."""

    def strided(t: Tensor) -> Tensor:
        return spread(t) if t.is_floating_point() else torch.stack([t, 1 - t.to(torch.uint8)], -1).to(t.dtype)[..., 0]

    upstream = {n: spread(g) for n, g in call.upstream.items()}
    return dataclasses.replace(
        call.map(spread), masks={n: strided(m) for n, m in call.masks.items()}, upstream=upstream
    )


@cases
@fullest
def test_strides(variant: Variant, case: Case) -> None:
    call = make_call(variant, case, torch.float32)
    assert_same_bits(run(scattered(call)), run(call))


@fullest
def test_inputs_are_not_modified(variant: Variant) -> None:
    call = make_call(variant, RAGGED, torch.float32)
    tensors = [call.x, *call.states0, *call.weights, *call.masks.values(), *call.upstream.values()]
    before = [t.clone() for t in tensors]
    run(call)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(tensors, before, strict=True))


# ---- ops: derivatives and opcheck


def of_tensors(call: Call) -> tuple[Callable, list[Tensor]]:
    """The op as a function of its differentiable tensors, and these tensors."""
    call = call.map(lambda t: t.nan_to_num())
    n = len(call.states0)

    def function(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return tuple(by_op(dataclasses.replace(call, x=x, states0=rest[:n], weights=rest[n:])).values())

    return function, [t.clone().requires_grad_() for t in (call.x, *call.states0, *call.weights)]


@pytest.mark.parametrize("case", TINY, ids=str)
@fullest
def test_gradcheck(variant: Variant, case: Case, isa: str) -> None:
    function, tensors = of_tensors(make_call(variant, case, torch.float64))
    assert torch.autograd.gradcheck(function, tensors, atol=1e-6, fast_mode=True)


@pytest.mark.sample(16)
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if len(variant.options) < 3], ids=str)
def test_gradcheck_of_every_entry(variant: Variant) -> None:
    function, tensors = of_tensors(make_call(variant, TINY[0], torch.float64))
    assert torch.autograd.gradcheck(function, tensors, atol=1e-6)


def alternating(of: list[Case]):
    """Pairs each kind with one of the cases, because all kinds share the code for the forms of input."""
    pairs = [(variant, of[i % len(of)]) for i, variant in enumerate(FULLEST.values())]
    return pytest.mark.parametrize("variant, case", pairs, ids=list(FULLEST))


@pytest.mark.sample(8)
@alternating(TINY)
def test_gradgradcheck(variant: Variant, case: Case) -> None:
    function, tensors = of_tensors(make_call(variant, case, torch.float64))
    with one_thread():
        assert torch.autograd.gradgradcheck(function, tensors, atol=1e-6, fast_mode=True)


OP_CASES = [
    Case(B=3, T=3, D=5, H=6, P=2, why="dense"),
    Case(B=3, T=3, D=5, H=6, P=2, lengths=(3, 2, 1), packed=True, why="packed"),
]


@pytest.mark.sample(8)
@alternating(OP_CASES)
def test_opcheck(variant: Variant, case: Case) -> None:
    call = make_call(variant, case, torch.float32)
    torch.library.opcheck(op(call), arguments(call))
    leaves = call.map(lambda t: t.detach().requires_grad_(t is not call.masks.get("variational")))
    torch.library.opcheck(op(call, "_forward"), (*arguments(leaves), False))
    for recompute in (False, True):
        y, *rest = op(call, "_forward")(*arguments(call), recompute)
        n = len(variant.states)
        inputs = arguments(call)
        upstream = list(call.upstream.values())
        everything = (
            *(upstream[: 1 + n], inputs[: n + 5], (y, *rest[n:]), (True, True), inputs[n + 5 :], upstream[1 + n :]),
        )
        torch.library.opcheck(
            op(call, "_backward"), sum(map(tuple, everything), ()), test_utils=("test_schema", "test_faketensor")
        )


@fullest
def test_saved_width_matches_the_kind(variant: Variant) -> None:
    call = make_call(variant, CASES[0], torch.float32)
    saved = op(call, "_forward")(*arguments(call))[1 + len(variant.states)]
    assert saved.shape == (2, 21, seqkernels._C.recurrent_saved(variant.kind, 18, True))
    with pytest.raises(ValueError, match="recurrent_saved: kind"):
        seqkernels._C.recurrent_saved("nothing", 18, True)


def inf(*others: float) -> list[float]:
    """The numbers argument of an op without clips."""
    return [math.inf, math.inf, *others, 1e-5]


WRONG_CALLS = [
    ("gru", dict(peephole=True), "gru: peephole must be false for this cell"),
    ("gru", dict(projected=True), "gru: projected must be false for this cell, got true"),
    ("gru_projected", dict(projected=False), "gru_projected: projected must be true for this cell, got false"),
    ("lstm", dict(bias=False), "lstm: weights must hold weight_ih, weight_hh for each of 1 directions, got 4 tensors"),
    ("lstm", dict(projected=True), "lstm: weights must hold weight_ih, weight_hh, bias_ih, bias_hh, weight_hr for"),
    (
        "dreamer_gru",
        dict(bias=False),
        "dreamer_gru: weights must hold weight_ih, weight_hh, norm_weight, norm_bias for",
    ),
    ("lstm_norm", dict(heads=2), "lstm_norm: heads must be 1 for this cell, got 2"),
    ("gru", dict(heads=0), "gru: heads must be positive, got 0"),
    ("gru", dict(heads=4), "gru: heads must divide H = 6, got 4"),
    ("mgu_after", dict(heads=2), r"mgu_after: weight_hh must have shape \[2H, H / heads\] = \[12, 3\], got \[12, 6\]"),
    ("gru_projected", dict(heads=2), "gru_projected: heads must be 1 for this cell, got 2"),
    ("lstm", dict(reset=torch.zeros(3, 2)), "lstm: reset must be bool, got float32"),
    ("lstm", dict(reset=torch.zeros(2, 3).bool()), r"lstm: reset must have shape \[3, 2\], got \[2, 3\]"),
    ("gru", dict(zoneout_h=torch.zeros(3, 2, 6)), "gru: zoneout_h must be uint8, got float32"),
    ("gru", dict(zoneout_h=torch.zeros(3, 2, 7).byte()), r"gru: zoneout_h must have shape \[3, 2, 6\]"),
    ("lstm", dict(zoneout_c=torch.zeros(3, 1, 6).byte()), r"lstm: zoneout_c must have shape \[3, 2, 6\]"),
    ("mgu_after", dict(candidate=torch.zeros(6).byte()), r"mgu_after: candidate must have shape \[3, 2, 6\]"),
    ("rnn_tanh", dict(variational=torch.ones(1, 2, 5)), r"rnn_tanh: variational must have shape \[1, 2, 6\]"),
    ("rnn_tanh", dict(variational=torch.ones(1, 2, 6).double()), "rnn_tanh: variational must be float32, got float64"),
    ("lstm", dict(numbers=[1.0]), "lstm: numbers must be empty or hold .*, got 1 numbers"),
    ("lstm", dict(numbers=[0.0, 1.0, 0.0, 0.0, 0.0, 1e-5]), "lstm: cell_clip must be positive, got 0"),
    ("lstm", dict(numbers=[1.0, math.nan, 0.0, 0.0, 0.0, 1e-5]), "lstm: gate_clip must be positive, got -?nan"),
    ("gru", dict(numbers=inf(1.0, 0.0, 0.0)), r"gru: zoneout_h must lie in \[0, 1\), got 1"),
    ("lstm", dict(numbers=inf(0.0, -0.5, 0.0)), r"lstm: zoneout_c must lie in \[0, 1\), got -0.5"),
    ("mgu_after", dict(numbers=inf(0.0, 0.0, 2.0)), r"mgu_after: recurrent_dropout must lie in \[0, 1\), got 2"),
    ("gru", dict(numbers=inf(0.0, 0.1, 0.0)), "gru: cell_clip and zoneout_c must be absent for this cell"),
    ("gru", dict(numbers=[*inf(0.0, 0.0, 0.0)[:5], 1e-3]), "gru: norm_eps must be 1e-05 for this cell, got 0.001"),
    ("gru_norm", dict(numbers=[*inf(0.0, 0.0, 0.0)[:5], -1.0]), "gru_norm: norm_eps must be finite and at least 0"),
    ("dreamer_gru", dict(numbers=[*inf(0.0, 0.0, 0.0)[:5], math.nan]), "norm_eps must be finite and at least 0"),
    ("nested_lstm", dict(numbers=[math.inf, 1.0, 0.0, 0.0, 0.0, 1e-5]), "nested_lstm: gate_clip must be absent"),
    (
        "gru_projected",
        dict(numbers=inf(0.1, 0.0, 0.0)),
        "gru_projected: zoneout_h must be absent where there is a proj",
    ),
]


@pytest.mark.parametrize("kind, options, message", WRONG_CALLS, ids=lambda a: a if isinstance(a, str) else "")
def test_option_errors_of_ops(kind: str, options: dict, message: str) -> None:
    """Direct calls, without the checks of modules and functions."""
    plain = {variant.kind: variant for variant in reversed(VARIANTS)}[kind]
    case = Case(B=2, T=3, D=2, H=6, P=2, bidirectional=False, reset=False, why="plain")
    call = make_call(plain, case, torch.float32)
    y, *rest = op(call, "_forward")(*arguments(call))
    options = call.weight_flags() | options
    with pytest.raises(RuntimeError, match=message):
        op(call)(*arguments(call)[: 5 + len(call.states0)], **options)
    n = 1 + len(call.states0)
    inputs = (*call.upstream.values(),)[:n] + arguments(call)[: n + 4]
    with pytest.raises(RuntimeError, match=message.replace(f"{kind}:", f"{kind}_backward:")):
        op(call, "_backward")(*inputs, y, *rest[n - 1 :], True, True, **options)


# ---- modules in evaluation, without masks

D, H, P = 5, 18, 7
SHARED = {
    "LSTM": reference.lstm,
    "NestedLSTM": reference.nested_lstm,
    "SLSTM": reference.slstm,
    "GRU": reference.gru,
    "DreamerGRU": reference.dreamer_gru,
    "MGU": reference.mgu,
}
forms = pytest.mark.parametrize("form", ["dense", "batch_first", "unbatched", "lengths", "packed"])


def make(variant: Variant, *, L: int = 1, random_weights: bool = False, **arguments) -> torch.nn.Module:
    """The module; random_weights also replaces parameters that are initialized with ones or zeros."""
    options = variant.options | ({"proj_size": P} if variant.projected else {})
    torch.manual_seed(0)
    module = getattr(seqkernels.nn, variant.module)(D, H, num_layers=L, **options, **arguments)
    if random_weights:
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn_like(p) * 0.4)
    return module


def weights_of(module: torch.nn.Module, variant: Variant) -> list[Tensor]:
    """Weights in the order of the ops."""
    suffixes = ["", "_reverse"][: 1 + module.bidirectional]
    names = [f"{n}_l{i}{s}" for i in range(module.num_layers) for s in suffixes for n in variant.weights(D, H, P)]
    return [getattr(module, name) for name in names]


def defined(module: torch.nn.Module, variant: Variant, x: Tensor, hx, **keywords):
    """Results of the definition for the module in evaluation, including all states."""
    left_out = ("proj_size", "bias", "nonlinearity", "variational_dropout")
    options = {k: o for k, o in variant.options.items() if k not in left_out}
    if variant.module in ("GRU", "MGU"):
        options.setdefault("reset_after", variant.module == "GRU")
    function = SHARED.get(variant.module) or getattr(reference, variant.kind)
    weights = weights_of(module, variant)
    common = dict(num_layers=module.num_layers, bidirectional=module.bidirectional, return_all_states=True)
    return function(x, hx, weights, **common, **options, **keywords)


def states_for(variant: Variant, B: int, L: int, directions: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    widths = [P if variant.projected and s == "h" else H for s in variant.states]
    states = [torch.randn(L * directions, B, width, generator=g, dtype=dtype) for width in widths]
    return [t.abs() + 0.5 if s == "n" else t for s, t in zip(variant.states, states)]  # the normaliser must be positive


def as_argument(states: Sequence[Tensor]):
    return tuple(states) if len(states) > 1 else states[0]


def flat(result) -> list[Tensor]:
    """Output, last states and all states; packed results are padded."""
    leaves = torch.utils._pytree.tree_leaves(result, is_leaf=lambda r: isinstance(r, PackedSequence))
    return [pad_packed_sequence(r)[0] if isinstance(r, PackedSequence) else r for r in leaves]


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar that is a nonlinear function of all outputs."""
    return sum(((i + 1 + o) * o * torch.linspace(-1, 1, o.numel()).view_as(o)).sum() for i, o in enumerate(outputs))


@forms
@variants
def test_module_matches_its_definition(variant: Variant, form: str) -> None:
    """Two bidirectional layers with states, resets and all states, including gradients."""
    T, B, L = 5, 1 if form == "unbatched" else 4, 2
    batch_first = form == "batch_first"
    module = make(
        *(variant,), L=L, random_weights=True, bidirectional=True, batch_first=batch_first, return_all_states=True
    )
    module = module.double().eval()
    x, hx = torch.randn(T, B, D, dtype=torch.float64), states_for(variant, B, L, 2)
    reset, lengths = torch.rand(T, B) < 0.2, torch.tensor([2, 5, 1, 4])
    keywords = {"lengths": lengths} if form in ("lengths", "packed") else {}

    def ours(x: Tensor, *hx: Tensor) -> list[Tensor]:
        if form == "packed":
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
            reset_of_data = pack_padded_sequence(reset, lengths, enforce_sorted=False).data
            return flat(module(x, as_argument(hx), reset=reset_of_data))
        if form == "unbatched":
            result = flat(module(x[:, 0], as_argument([s[:, 0] for s in hx]), reset=reset[:, 0]))
            return [t.unsqueeze(1) for t in result]
        if form == "batch_first":
            y, states, every = module(x.transpose(0, 1), as_argument(hx), reset=reset.t())
            every = [[s.transpose(0, 1) for s in of_layer] for of_layer in every]
            return flat((y.transpose(0, 1), states, every))
        return flat(module(x, as_argument(hx), reset=reset, **keywords))

    def theirs(x: Tensor, *hx: Tensor) -> list[Tensor]:
        with one_thread():
            return flat(defined(module, variant, x, as_argument(hx), reset=reset, **keywords))

    results = []
    for function in (ours, theirs):
        leaves = [t.clone().requires_grad_() for t in (x, *hx)]
        outputs = function(*leaves)
        grads = torch.autograd.grad(weighted(outputs), [*leaves, *weights_of(module, variant)])
        results.append({str(i): t for i, t in enumerate((*(o.detach() for o in outputs), *grads))})
    assert_near(*results, torch.float64)
    assert len(results[0]) == 2 + (2 + L) * len(variant.states) + len(weights_of(module, variant))


@fullest
def test_functional_matches_module(variant: Variant) -> None:
    common = dict(bidirectional=True, batch_first=True, return_all_states=True)
    module = make(variant, L=2, random_weights=True, **common).eval()
    names = {"LSTM": "lstm", "NestedLSTM": "nested_lstm", "SLSTM": "slstm", "GRU": "gru", "MGU": "mgu"}
    names["DreamerGRU"] = "dreamer_gru"
    name = names.get(variant.module, variant.kind)
    options = {k: o for k, o in variant.options.items() if k not in ("proj_size", "bias", "nonlinearity")}
    x, hx = torch.randn(4, 5, D), as_argument(states_for(variant, 4, 2, 2, torch.float32))
    keywords = dict(lengths=torch.tensor([3, 0, 5, 1]), reset=torch.rand(4, 5) < 0.3)
    got = getattr(functional, name)(x, hx, weights_of(module, variant), num_layers=2, **common, **options, **keywords)
    assert all(torch.equal(g, w) for g, w in zip(flat(got), flat(module(x, hx, **keywords)), strict=True))


@fullest
def test_all_states_contain_the_output_and_the_last_states(variant: Variant) -> None:
    module = make(variant, L=2, return_all_states=True)
    x = torch.randn(4, 3, D)
    y, last, every = module(x)
    assert isinstance(every, tuple) and len(every) == 2 and all(len(s) == len(variant.states) for s in every)
    assert torch.equal(every[1][0], y)
    for of_state, n in zip(zip(*every), tuple_of(last)):
        assert torch.equal(torch.stack([s[-1] for s in of_state]), n)
    assert len(make(variant)(x)) == 2
    lengths = torch.tensor([4, 2, 1])
    for of_layer in module(pack_padded_sequence(x, lengths))[2]:
        assert all(isinstance(s, PackedSequence) and s.data.shape[0] == 7 for s in of_layer)


@fullest
def test_memory_efficient_gives_the_same_bits(variant: Variant) -> None:
    """In training, with the same masks."""
    x, results = torch.randn(6, 4, D), []
    for memory_efficient in (False, True):
        module = make(variant, L=2, bidirectional=True, return_all_states=True, memory_efficient=memory_efficient)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        outputs = flat(module(leaf))
        grads = torch.autograd.grad(weighted(outputs), [leaf, *module.parameters()])
        results.append([*outputs, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@fullest
def test_memory_efficient_saves_memory(variant: Variant) -> None:
    """Memory saved by autograd between forward and backward."""
    held = []
    for memory_efficient in (False, True):
        module, sizes = make(variant, memory_efficient=memory_efficient), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            module(torch.randn(6, 4, D))
        held.append(sum(sizes))
    saved = 24 * seqkernels._C.recurrent_saved(variant.kind, H, True)
    assert held[0] - held[1] == saved > 0


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "kind, form",
    [
        *itertools.product(["lstm"], ["dense", "lengths", "packed"]),
        *zip(
            ["lstm_norm", "nested_lstm", "gru_before", "gru_projected", "mgu_after"],
            itertools.cycle(["packed", "lengths"]),
        ),
    ],
)
def test_compile_without_a_graph_break(kind: str, form: str) -> None:
    variant = FULLEST[kind]
    module = make(variant, L=2, bidirectional=True, return_all_states=True).eval()
    x, lengths, reset = torch.randn(4, 3, D), torch.tensor([4, 2, 1]), torch.rand(4, 3) < 0.3
    of_rows = pack_padded_sequence(reset, lengths).data if form == "packed" else reset

    def whole(m: torch.nn.Module, x: Tensor) -> list[Tensor]:
        if form == "packed":
            y, states, every = m(PackedSequence(x, batch_sizes_of([4, 2, 1])), reset=of_rows)
            return [y.data, *tuple_of(states), *(s.data for of_layer in every for s in of_layer)]
        keywords = {"lengths": lengths} if form == "lengths" else {}
        y, states, every = m(x, reset=of_rows, **keywords)
        return [y, *tuple_of(states), *(s for of_layer in every for s in of_layer)]

    x = pack_padded_sequence(x, lengths).data if form == "packed" else x
    results = []
    for function in (whole, compiled(whole)):
        leaf = x.clone().requires_grad_()
        outputs = function(module, leaf)
        results.append([*outputs, *torch.autograd.grad(weighted(outputs), [leaf, *module.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


# ---- modules in training, with masks


def assert_drawn(mask: Tensor, rate: float) -> None:
    """Asserts independent draws: along each dimension, the rate of ones is within 5 standard deviations."""
    for dim, size in enumerate(mask.shape):
        others = [d for d in range(mask.dim()) if d != dim]
        n = mask.numel() / size
        error = (mask.double().mean(others) - rate).abs().max() / math.sqrt(rate * (1 - rate) / n)
        assert error < 5, f"along dimension {dim}, the rate of ones is {error:.1f} standard deviations off {rate}"


def probe(module: str, units: int = 40, inputs: int = 1, **options) -> torch.nn.Module:
    """A module with zero parameters, some of which the test then fills."""
    module = getattr(seqkernels.nn, module)(inputs, units, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    return module


def fill(module: torch.nn.Module, name: str, *values: float | Tensor) -> None:
    """Fills the part of each gate in the parameters of that name, in all layers and directions."""
    with torch.no_grad():
        for key, p in module.named_parameters():
            if key.startswith(name):
                for part, value in zip(p.chunk(len(values)), values, strict=True):
                    part.copy_(torch.as_tensor(value).expand_as(part))


LOW, HIGH = -200.0, 50.0  # their sigmoids are exactly 0 and 1


def by_direction(t: Tensor) -> Tensor:
    """[T, B, directions, H] with the steps of each direction in the order of computation."""
    forward, backward = t.unflatten(-1, (2, -1)).unbind(2)
    return torch.stack([forward, backward.flip(0)], 2)


@pytest.mark.parametrize("module", ["RNN", "GRU", "MGU"])
def test_zoneout_rate_of_h(module: str) -> None:
    """h differs at each step without zoneout, so equal values show units that zoneout keeps."""
    T, B, rate = 25, 30, 0.3
    layer = probe(module, bidirectional=True, zoneout_h=rate)
    fill(layer, "weight_ih", *{"RNN": [1.0], "GRU": [0.0, 0.0, 1.0], "MGU": [0.0, 1.0]}[module])
    fill(layer, "bias_ih", *{"RNN": [0.0], "GRU": [HIGH, LOW, 0.0], "MGU": [HIGH, 0.0]}[module])
    x = torch.linspace(0.1, 1.5, T).view(T, 1, 1).expand(T, B, 1)
    y, want = by_direction(layer(x)[0]), by_direction(torch.tanh(x).repeat(1, 1, 80))
    before = torch.cat([torch.zeros_like(y[:1]), y[:-1]])
    kept = (y - want).abs() > 1e-3
    torch.testing.assert_close(y, torch.where(kept, before, want))
    assert_drawn(kept, rate)


@pytest.mark.parametrize("options", [{}, {"coupled_gates": True}, {"layer_norm": True}], ids=str)
def test_zoneout_rate_of_c(options: dict) -> None:
    """c differs at each step without zoneout. h is computed from c before zoneout and changes at each step."""
    T, B, rate = 25, 30, 0.2
    layer = probe("LSTM", bidirectional=True, zoneout_c=rate, return_all_states=True, **options)
    three = bool(options.get("coupled_gates"))
    fill(layer, "weight_ih", *([0.0, 1.0, 0.0] if three else [0.0, 0.0, 1.0, 0.0]))
    fill(layer, "bias_ih", *([HIGH, 0.0, HIGH] if three else [HIGH, LOW, 0.0, HIGH]))
    x = torch.linspace(0.1, 1.5, T).view(T, 1, 1).expand(T, B, 1)
    if options.get("layer_norm"):  # the normalised projection is constant; the bias varies
        fill(layer, "bias_ih", HIGH, LOW, torch.linspace(0.1, 1.5, 40), HIGH)
        fill(layer, "bias_c", 0.5)
        want = torch.tanh(torch.linspace(0.1, 1.5, 40)).repeat(2).expand(T, B, 80)
        y, _, ((_, c),) = layer(x)
        kept = (by_direction(c) - by_direction(want)).abs() > 1e-3
        first = kept[0]  # at later steps, units may be equal without being kept
        assert not by_direction(c)[0][first].any()
        assert_drawn(first, rate)
        torch.testing.assert_close(y, torch.full_like(y, math.tanh(0.5)))
        return
    y, _, ((_, c),) = layer(x)
    c, want = by_direction(c), by_direction(torch.tanh(x).repeat(1, 1, 80))
    kept = (c - want).abs() > 1e-3
    torch.testing.assert_close(c, torch.where(kept, torch.cat([torch.zeros_like(c[:1]), c[:-1]]), want))
    torch.testing.assert_close(by_direction(y), torch.tanh(want))
    assert_drawn(kept, rate)


@pytest.mark.parametrize("module", ["LSTM", "GRU", "MGU"])
def test_recurrent_dropout_rate(module: str) -> None:
    """The state equals the candidate at each step. Each layer and direction has separate masks."""
    T, B, rate = 25, 20, 0.4
    layer = probe(module, num_layers=2, bidirectional=True, recurrent_dropout=rate, return_all_states=True)
    gates = {"LSTM": [HIGH, LOW, 1.0, 0.0], "GRU": [0.0, LOW, 1.0], "MGU": [HIGH, 1.0]}[module]
    fill(layer, "bias_ih", *gates)
    every = torch.stack([of_layer[-1] for of_layer in layer(torch.zeros(T, B, 1))[2]])
    kept = every > 1e-3
    torch.testing.assert_close(every[kept], torch.full_like(every[kept], math.tanh(1) / (1 - rate)))
    assert_drawn(kept.unflatten(-1, (2, -1)), 1 - rate)
    layer.eval()
    torch.testing.assert_close(layer(torch.zeros(T, B, 1))[2][1][-1], torch.full((T, B, 80), math.tanh(1)))


def test_recurrent_dropout_of_a_nested_lstm() -> None:
    """The inner cell exposes the candidate."""
    layer = probe("NestedLSTM", recurrent_dropout=0.4, return_all_states=True)
    fill(layer, "bias_ih", HIGH, LOW, 1.0, 0.0)
    fill(layer, "weight_inner_ih", 0.0, 0.0, torch.eye(40), 0.0)
    fill(layer, "bias_inner_ih", HIGH, LOW, 0.0, 0.0)
    _, _, ((_, _, s),) = layer(torch.zeros(25, 30, 1))
    kept = s > 1e-3
    torch.testing.assert_close(s[kept], torch.full_like(s[kept], math.tanh(math.tanh(1) / 0.6)))
    assert_drawn(kept, 0.6)


def of_form(x: Tensor, form: str) -> tuple[Tensor | PackedSequence, Tensor]:
    """x [T, B, ..], dense or packed with unsorted lengths, and the mask of valid steps."""
    T, B = x.shape[:2]
    if form == "dense":
        return x, torch.ones(T, B, dtype=torch.bool)
    lengths = torch.tensor([2 + (7 * b) % (T - 1) for b in range(B)])
    return pack_padded_sequence(x, lengths, enforce_sorted=False), torch.arange(T).unsqueeze(1) < lengths


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_variational_dropout_draws_one_mask_per_sequence(form: str) -> None:
    """Masks of h: h_t = 1 + m h_(t-1) exposes m at each step except the first."""
    T, B, rate = 6, 40, 0.5
    layer = probe("RNN", nonlinearity="relu", bidirectional=True, variational_dropout=rate)
    fill(layer, "weight_hh", torch.eye(40))
    fill(layer, "bias_ih", 1.0)
    argument, valid = of_form(torch.zeros(T, B, 1), form)
    y = layer(argument)[0]
    y = pad_packed_sequence(y)[0] if form == "packed" else y
    forward, backward = y.unflatten(-1, (2, -1)).unbind(2)
    for h, steps in ((forward, range(1, T)), (backward, range(T - 2, -1, -1))):
        step = 1 if h is forward else -1
        mask = h[1 if step == 1 else 0] - 1  # the second step, whose previous h is 1
        if step == -1:
            last = valid.sum(0) - 1
            mask = h[last - 1, torch.arange(B)] - 1
        for t in steps:
            here = valid[t] & valid[t - step]
            torch.testing.assert_close(h[t][here], (1 + mask * h[t - step])[here])
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        assert_drawn(mask > 0, 1 - rate)


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_variational_dropout_of_the_input(form: str) -> None:
    """One mask per sequence for both directions, and another for the next layer."""
    T, B, rate = 6, 40, 0.25
    layer = probe(
        "RNN", inputs=40, nonlinearity="relu", bidirectional=True, variational_dropout=rate, return_all_states=True
    )
    fill(layer, "weight_ih", torch.eye(40))
    argument, valid = of_form(torch.ones(T, B, 40), form)
    y = layer(argument)[0]
    y = pad_packed_sequence(y)[0] if form == "packed" else y
    mask = y[0, :, :40]
    torch.testing.assert_close(y, mask.repeat(1, 2) * valid.unsqueeze(-1))
    torch.testing.assert_close(mask[mask > 0], torch.full_like(mask[mask > 0], 1 / (1 - rate)))
    assert_drawn(mask > 0, 1 - rate)
    layer.eval()
    torch.testing.assert_close(layer(torch.ones(T, B, 40))[0], torch.ones(T, B, 80))


@pytest.mark.parametrize("batch_sizes", [[3, 3, 2, 1], [1] * 300, [400, 7], []], ids=len)
def test_row_positions_match_the_cpu(batch_sizes: list[int]) -> None:
    """The positions computed for CUDA devices, without a copy to the device."""
    sizes, x = torch.tensor(batch_sizes, dtype=torch.int64), torch.zeros(sum(batch_sizes), 1)
    _, wanted = _recurrent_extras.sequences_of(x, None, sizes)
    found = _recurrent_extras.positions_in_steps(sizes.cumsum(0) - sizes, sizes, len(x), x.device)
    assert torch.equal(found, wanted)
    assert found.tolist() == [j for size in batch_sizes for j in range(size)]


@pytest.mark.parametrize("variant", [variant for variant in FULLEST.values() if variant.random], ids=str)
def test_masks_depend_on_the_seed_and_on_training(variant: Variant) -> None:
    module, x = make(variant, L=2), torch.randn(5, 3, D)

    def output(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return module(x)[0]

    assert torch.equal(output(1), output(1)) and not torch.equal(output(1), output(2))
    module.eval()
    before = torch.get_rng_state()
    assert torch.equal(output(1), output(2)) and torch.equal(module(x)[0], output(1))
    torch.set_rng_state(before)
    module(x)
    assert torch.equal(before, torch.get_rng_state())


# ---- modules: parameters and errors


@pytest.mark.parametrize("value", [1.0, -0.5, 0])
@pytest.mark.parametrize("module, options", [("LSTM", {}), ("LSTM", {"layer_norm": True}), ("NestedLSTM", {})], ids=str)
def test_forget_bias(module: str, options: dict, value: float) -> None:
    """Sets the bias in each layer and direction, also in reset_parameters, and leaves other parameters unchanged."""

    def made(**more) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layer = getattr(seqkernels.nn, module)(D, H, num_layers=2, bidirectional=True, **options, **more)
        layer.reset_parameters()
        return dict(layer.named_parameters())

    plain = made()
    for name, p in made(forget_bias=value).items():
        want = plain[name].detach().clone()
        if name.startswith(("bias_ih", "bias_hh")):
            want[H : 2 * H] = value if name.startswith("bias_ih") else 0.0
        assert torch.equal(p, want), name


@variants
def test_initialization_of_parameters(variant: Variant) -> None:
    """Names and shapes; gains are 1, biases of normalisations are 0, all others are uniform as in torch."""
    module, bound = make(variant, L=2, bidirectional=True), 1 / math.sqrt(H)
    shapes = {}
    for i, suffix in itertools.product((0, 1), ("", "_reverse")):
        width = 2 * (P if variant.projected else H) if i else D
        shapes |= {f"{n}_l{i}{suffix}": s for n, s in variant.weights(width, H, P).items()}
    assert {n: tuple(p.shape) for n, p in module.named_parameters()} == shapes
    assert list(module.state_dict()) == list(shapes)
    for name, p in module.named_parameters():
        if name.startswith(("gain", "norm_weight")):
            assert (p == 1).all(), name
        elif name.startswith(("bias_c", "norm_bias")):
            assert (p == 0).all(), name
        else:
            assert p.abs().max() <= bound and p.std() > 0.3 * bound, name


@pytest.mark.parametrize("form", ["dense", "lengths", "packed", "unbatched"])
@pytest.mark.parametrize("kind", ["lstm", "nested_lstm", "gru", "gru_projected", "mgu", "rnn_tanh"])
def test_learned_initial_state(kind: str, form: str) -> None:
    """Initially zero; used for all sequences if hx is None, with the sum of their gradients."""
    variant, L = FULLEST[kind], 2
    module = make(variant, L=L, bidirectional=True, learn_initial_state=True).eval()
    names = [f"initial_{s}" for s in variant.states]
    initial = [getattr(module, name) for name in names]
    assert set(names) < set(dict(module.named_parameters())) and not any(p.any() for p in initial)
    drawn = [s.squeeze(1) for s in states_for(variant, 1, L, 2, torch.float32)]
    with torch.no_grad():
        for p, s in zip(initial, drawn, strict=True):
            assert p.shape == s.shape
            p.copy_(s)
    x, lengths = torch.randn(5, 3, D), torch.tensor([5, 3, 2])
    B = 1 if form == "unbatched" else 3
    argument = {"packed": pack_padded_sequence(x, lengths), "unbatched": x[:, 0]}.get(form, x)
    keywords = {"lengths": lengths} if form == "lengths" else {}
    hx = [s.unsqueeze(1).repeat(1, B, 1).requires_grad_() for s in drawn]
    got = flat(module(argument, **keywords))
    given = [s.squeeze(1) for s in hx] if form == "unbatched" else hx
    want = flat(module(argument, as_argument(given), **keywords))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    grads, wanted = torch.autograd.grad(weighted(got), initial), torch.autograd.grad(weighted(want), hx)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g, w.sum(1))
        assert g.abs().max() > 0
    unused = torch.autograd.grad(weighted(flat(module(argument, as_argument(given)))), initial, allow_unused=True)
    assert all(g is None for g in unused)


EXCLUDED = [
    ("LSTM", "layer_norm", "peephole", dict(layer_norm=True, peephole=True)),
    ("LSTM", "layer_norm", "coupled_gates", dict(layer_norm=True, coupled_gates=True)),
    ("LSTM", "layer_norm", "proj_size", dict(layer_norm=True, proj_size=2)),
    ("LSTM", "layer_norm", "num_heads", dict(layer_norm=True, num_heads=2)),
    ("GRU", "layer_norm", "proj_size", dict(layer_norm=True, proj_size=2)),
    ("GRU", "layer_norm", "num_heads", dict(layer_norm=True, num_heads=2)),
    ("GRU", "layer_norm", "reset_after", dict(layer_norm=True, reset_after=False)),
    ("LSTM", "proj_size", "zoneout_h", dict(proj_size=2, zoneout_h=0.1)),
    ("GRU", "proj_size", "zoneout_h", dict(proj_size=2, zoneout_h=0.1)),
    ("LSTM", "proj_size", "num_heads", dict(proj_size=2, num_heads=2)),
    ("GRU", "proj_size", "num_heads", dict(proj_size=2, num_heads=2)),
    ("GRU", "proj_size", "reset_after", dict(proj_size=2, reset_after=False)),
    ("LSTM", "forget_bias", "bias", dict(forget_bias=1.0, bias=False)),
    ("NestedLSTM", "forget_bias", "bias", dict(forget_bias=1.0, bias=False)),
    ("LSTM", "forget_bias", "coupled_gates", dict(forget_bias=0.0, coupled_gates=True)),
]


@pytest.mark.parametrize("module, one, other, options", EXCLUDED, ids=lambda a: str(a) if isinstance(a, str) else "")
def test_options_that_exclude_each_other(module: str, one: str, other: str, options: dict) -> None:
    with pytest.raises(ValueError, match=rf"^{module}: {one} excludes {other}.*, got both"):
        getattr(seqkernels.nn, module)(D, H, **options)


WRONG = [
    ("LSTM", dict(num_heads=4), ValueError, "num_heads"),
    ("MGU", dict(num_heads=0), ValueError, "num_heads"),
    ("GRU", dict(zoneout_h=1.0), ValueError, "zoneout_h"),
    ("LSTM", dict(zoneout_c=-0.1), ValueError, "zoneout_c"),
    ("NestedLSTM", dict(recurrent_dropout=1.5), ValueError, "recurrent_dropout"),
    ("RNN", dict(variational_dropout=math.nan), ValueError, "variational_dropout"),
    ("LSTM", dict(cell_clip=0.0), ValueError, "cell_clip"),
    ("GRU", dict(gate_clip=-1.0), ValueError, "gate_clip"),
    ("RNN", dict(peephole=True), TypeError, "peephole"),
    ("RNN", dict(recurrent_dropout=0.1), TypeError, "recurrent_dropout"),
    ("GRU", dict(cell_clip=1.0), TypeError, "cell_clip"),
    ("GRU", dict(zoneout_c=0.1), TypeError, "zoneout_c"),
    ("MGU", dict(layer_norm=True), TypeError, "layer_norm"),
    ("MGU", dict(proj_size=2), (TypeError, ValueError), "proj_size"),
    ("NestedLSTM", dict(gate_clip=1.0), TypeError, "gate_clip"),
    ("NestedLSTM", dict(num_heads=2), TypeError, "num_heads"),
    ("LSTM", dict(reset_after=False), TypeError, "reset_after"),
    ("LSTM", dict(norm_eps=0.1), ValueError, "LSTM: norm_eps must be 1e-05 without layer_norm, got 0.1"),
    ("GRU", dict(layer_norm=True, norm_eps=-0.1), ValueError, "GRU: norm_eps must be finite and at least 0, got -0.1"),
    ("DreamerGRU", dict(norm_eps=math.inf), ValueError, "norm_eps must be finite"),
    ("DreamerGRU", dict(norm_eps="1e-3"), TypeError, "norm_eps"),
    ("DreamerGRU", dict(layer_norm=True), TypeError, "layer_norm"),
    ("DreamerGRU", dict(num_heads=4), ValueError, "num_heads"),
    ("LSTM", dict(peephole=1), TypeError, "peephole"),
]


@pytest.mark.parametrize(
    "module, options, error, named", WRONG, ids=lambda a: str(a) if isinstance(a, (str, dict)) else ""
)
def test_invalid_options(module: str, options: dict, error: type, named: str) -> None:
    with pytest.raises(error, match=named):
        getattr(seqkernels.nn, module)(D, H, **options)


def test_invalid_resets() -> None:
    module, x = seqkernels.nn.LSTM(D, H), torch.randn(4, 3, D)
    good = torch.zeros(4, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"reset.*\[4, 3\].*got.*\[3, 4\]"):
        module(x, reset=good.t())
    with pytest.raises(TypeError, match=r"reset.*bool"):
        module(x, reset=good.float())
    with pytest.raises(TypeError, match=r"reset.*list"):
        module(x, reset=good.tolist())
    with pytest.raises(ValueError, match=r"reset.*\[7\].*got.*\[4, 3\]"):
        module(pack_padded_sequence(x, torch.tensor([4, 2, 1])), reset=good)
    learned = seqkernels.nn.LSTM(D, H, learn_initial_state=True)
    with pytest.raises(ValueError, match="reset excludes learn_initial_state"):
        learned(x, reset=good)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dreamer_gru_matches_linear_and_layer_norm(dtype: torch.dtype) -> None:
    """Against the implementation of world models: torch.nn.LayerNorm of one torch.nn.Linear of input and state."""
    linear, norm = torch.nn.Linear(D + H, 3 * H, dtype=dtype), torch.nn.LayerNorm(3 * H, eps=1e-3, dtype=dtype)
    ours = seqkernels.nn.DreamerGRU(D, H, dtype=dtype)
    with torch.no_grad():
        norm.weight.add_(0.5 * torch.randn(3 * H))
        norm.bias.add_(0.5 * torch.randn(3 * H))
        ours.weight_ih_l0.copy_(linear.weight[:, :D])
        ours.weight_hh_l0.copy_(linear.weight[:, D:])
        ours.bias_ih_l0.copy_(linear.bias)
        ours.bias_hh_l0.zero_()
        ours.norm_weight_l0.copy_(norm.weight)
        ours.norm_bias_l0.copy_(norm.bias)
    x, h0 = torch.randn(6, 3, D, dtype=dtype), torch.randn(1, 3, H, dtype=dtype)
    h, outputs = h0[0], []
    for x_t in x:
        r, n, u = norm(linear(torch.cat((x_t, h), -1))).chunk(3, -1)
        n, u = torch.tanh(torch.sigmoid(r) * n), torch.sigmoid(u - 1)
        h = u * n + (1 - u) * h
        outputs.append(h)
    want, (got, h_n) = torch.stack(outputs), ours(x, h0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(h_n[0], h)
    upstream = torch.randn_like(want)
    theirs = torch.autograd.grad(want, [linear.weight, linear.bias, norm.weight, norm.bias], upstream)
    of_weights = ours.weight_ih_l0, ours.weight_hh_l0, ours.bias_ih_l0, ours.norm_weight_l0, ours.norm_bias_l0
    dw_ih, dw_hh, *others = torch.autograd.grad(got, of_weights, upstream)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else {}
    for mine, other in zip((torch.cat((dw_ih, dw_hh), 1), *others), theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)
