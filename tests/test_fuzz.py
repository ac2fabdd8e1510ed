"""Random inputs: valid ones match the definition, invalid ones raise, and none crashes.

Add each failing example to CASES, BAG_CASES or ATTENTION_CASES in tests/support/cases.py, or to the tables of the error
tests.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import seqkernels
from seqkernels import functional, reference
from seqkernels.nn import LSTM
from support import variants
from support.cases import (
    BAG_MODES,
    DTYPES,
    AttentionCase,
    BagCase,
    Case,
    assert_attention_near,
    assert_bag_near,
    assert_near,
    assert_same_bits,
    attention_definition,
    bag_definition,
    defined,
    make_attention_inputs,
    make_bag_inputs,
    make_inputs,
    module_of,
    run,
    run_attention,
    run_bag,
)
from support.fuzzing import EXCEPTIONS, NUMBERS, bounded, integers, nonsense, odd_tensors, restrided, strides, tried

ops = torch.ops.seqkernels

sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 130]))


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    B, T = draw(st.one_of(st.integers(0, 7), st.sampled_from([16, 17, 33]))), draw(st.integers(0, 9))
    H = draw(sizes)
    form = draw(st.sampled_from(["dense", "lengths", "packed"]))
    lengths = None
    if form == "packed":
        B, T = max(B, 1), max(T, 1)
        lengths = draw(st.lists(st.integers(1, T), min_size=B - 1, max_size=B - 1))
        lengths = tuple(sorted([T, *lengths], reverse=True))
    elif form == "lengths":
        lengths = tuple(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))
    return Case(
        B=B,
        T=T,
        D=draw(sizes),
        H=H,
        P=draw(st.integers(1, H - 1)) if H > 1 and draw(st.booleans()) else 0,
        L=draw(st.integers(1, 2)),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        batch_first=form != "packed" and draw(st.booleans()),
        lengths=lengths,
        packed=form == "packed",
        state=draw(st.booleans()),
        why="drawn",
    )


@bounded
@given(
    case=drawn_cases(),
    dtype=st.sampled_from(DTYPES),
    kinds=st.lists(strides, min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_valid_input_matches_the_definition(case: Case, dtype: torch.dtype, kinds: list[str], seed: int) -> None:
    if case.h_size < 4 and dtype.itemsize == 2:
        dtype = (
            torch.float32
        )  # a sum that cancels has no larger one beside it: its error, like torch's, is that of its terms
    inputs = make_inputs(case, dtype, seed=seed)
    want = defined(inputs)
    turn = iter(kinds * 100)
    got = run(functional.lstm, inputs.map(lambda t: restrided(t, next(turn))))
    assert_near(got, want, dtype)


@bounded
@given(case=drawn_cases(), seed=st.integers(0, 9), threads=st.integers(1, 4))
def test_random_threads_and_instruction_sets(case: Case, seed: int, threads: int) -> None:
    inputs = make_inputs(case, torch.float32, seed=seed)
    torch.set_num_threads(1)
    want = run(functional.lstm, inputs)
    torch.set_num_threads(threads)
    got = run(functional.lstm, inputs)
    assert all(torch.equal(got[n], want[n]) for n in want)


# ---- invalid input


@bounded
@given(
    case=drawn_cases(), wrong=st.dictionaries(st.sampled_from(range(7)), nonsense, min_size=1, max_size=2),
    op=st.sampled_from(["lstm", "lstm_forward"]),
)  # fmt: skip
def test_forward_ops_with_invalid_arguments(case: Case, wrong: dict, op: str) -> None:
    inputs = make_inputs(case, torch.float32)
    weights = inputs.weights[: len(inputs.weights) // case.L]
    h0, c0 = (h[: case.directions] for h in inputs.hx) if inputs.hx else (None, None)
    of_weights = case.bidirectional, case.bias, case.P > 0
    arguments = [inputs.x, h0, c0, weights, inputs.batch_sizes, inputs.lengths, *of_weights]
    for index, value in wrong.items():
        arguments[index] = value
    tried(getattr(ops, op), EXCEPTIONS, *arguments)


@bounded
@given(case=drawn_cases(), data=st.data())
def test_forward_ops_with_an_invalid_weight(case: Case, data: st.DataObject) -> None:
    inputs = make_inputs(case, torch.float32)
    weights = list(inputs.weights)
    for _ in range(data.draw(st.integers(1, 2))):
        i = data.draw(st.integers(0, len(weights) - 1))
        weights[i] = data.draw(odd_tensors())
    tried(functional.lstm, EXCEPTIONS, inputs.x, inputs.hx, weights, **inputs.keywords())
    weights = weights[: len(weights) // case.L]
    h0, c0 = (h[: case.directions] for h in inputs.hx) if inputs.hx else (None, None)
    for op in (ops.lstm, ops.lstm_forward):
        of_weights = case.bidirectional, case.bias, case.P > 0
        tried(op, EXCEPTIONS, inputs.x, h0, c0, weights, inputs.batch_sizes, inputs.lengths, *of_weights)


@bounded
@given(
    case=drawn_cases().filter(lambda c: c.L == 1 and not c.batch_first),
    wrong=st.dictionaries(st.sampled_from(range(13)), nonsense, min_size=1, max_size=2),
    flags=st.tuples(st.booleans(), st.booleans()),
)
def test_backward_op_with_invalid_arguments(case: Case, wrong: dict, flags: tuple[bool, bool]) -> None:
    inputs = make_inputs(case, torch.float32)
    h0, c0 = inputs.hx or (None, None)
    forward = [inputs.x, h0, c0, inputs.weights, inputs.batch_sizes, inputs.lengths, case.bidirectional]
    of_weights = case.bias, case.P > 0
    y, _, _, gates, cells = ops.lstm_forward(*forward, *of_weights)
    arguments = [inputs.dy, inputs.dh_n, inputs.dc_n, *forward, y, gates, cells, *flags, *of_weights]
    for index, value in wrong.items():
        arguments[index] = value
    tried(ops.lstm_backward, EXCEPTIONS, *arguments)


@bounded
@given(lengths=st.one_of(st.lists(NUMBERS, max_size=6), integers, odd_tensors()), batch_first=st.booleans())
def test_lengths_are_valid_or_raise(lengths, batch_first: bool) -> None:
    B, T = 3, 4
    module, x = LSTM(2, 5, batch_first=batch_first), torch.randn((B, T, 2) if batch_first else (T, B, 2))
    values = (
        lengths.tolist()
        if isinstance(lengths, Tensor) and lengths.layout == torch.strided and not lengths.is_meta
        else lengths
    )
    right = isinstance(values, list) and len(values) == B and all(type(n) is int and 0 <= n <= T for n in values)
    if right and isinstance(lengths, Tensor) and lengths.is_inference():
        lengths = lengths.clone()  # autograd saves no tensor of inference mode
    if right:
        assert module(x, lengths=lengths)[0].isfinite().all()
    else:
        with pytest.raises(EXCEPTIONS, match="lengths"):
            module(x, lengths=lengths)


@bounded
@given(batch_sizes=st.lists(NUMBERS, max_size=5), N=st.integers(0, 9))
def test_batch_sizes_are_valid_or_raise(batch_sizes: list[int], N: int) -> None:
    right = sum(batch_sizes) == N and batch_sizes == sorted(batch_sizes, reverse=True)
    right = right and all(n > 0 for n in batch_sizes)
    packed = torch.randn(N, 2), torch.tensor(batch_sizes, dtype=torch.int64)
    weights = list(LSTM(2, 5).parameters())
    for call in (
        lambda: LSTM(2, 5)(PackedSequence(*packed)),
        lambda: functional.lstm(packed[0], None, weights, batch_sizes=packed[1]),
        lambda: ops.lstm(packed[0], None, None, weights, packed[1], None, False),
        lambda: ops.lstm_forward(packed[0], None, None, weights, packed[1], None, False),
    ):
        if right and batch_sizes:
            call()
        elif not right:
            with pytest.raises((ValueError, RuntimeError), match="batch_sizes"):
                call()
        else:
            tried(call, EXCEPTIONS)


@bounded
@given(case=drawn_cases(), x=nonsense, hx=st.one_of(nonsense, st.tuples(nonsense, nonsense)), lengths=nonsense)
def test_module_with_invalid_arguments(case: Case, x, hx, lengths) -> None:
    inputs = make_inputs(case, torch.float32)
    module = module_of(LSTM, inputs)
    right = PackedSequence(inputs.x, inputs.batch_sizes) if case.packed else inputs.x
    allowed = (*EXCEPTIONS, AttributeError)
    tried(module, EXCEPTIONS, x)
    tried(module, EXCEPTIONS, right, hx)
    tried(module, EXCEPTIONS, right, None, lengths=lengths)
    tried(module, allowed, x, hx, lengths=lengths)


# ---- variants


@st.composite
def drawn_variant_cases(draw: st.DrawFn) -> variants.Case:
    """Short float64 cases; H is at least 16, because a norm over few units is ill-conditioned."""
    form = draw(st.sampled_from(["dense", "lengths", "packed"]))
    B, T = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    lengths = None
    if form == "packed":
        lengths = (T, *sorted(draw(st.lists(st.integers(1, T), min_size=B - 1, max_size=B - 1)), reverse=True))
    elif form == "lengths":
        lengths = tuple(draw(st.lists(st.integers(0, T), min_size=B, max_size=B)))
    H = 6 * draw(st.one_of(st.integers(3, 12), st.sampled_from([16, 22, 33])))
    return variants.Case(
        B=B,
        T=T,
        D=draw(st.integers(16, 40)),
        H=H,
        P=draw(st.integers(1, H)),
        lengths=lengths,
        packed=form == "packed",
        bidirectional=draw(st.booleans()),
        drawn=draw(st.booleans()),
        reset=draw(st.booleans()),
        state=draw(st.booleans()),
        why="drawn",
    )


@bounded
@given(
    variant=st.sampled_from(variants.VARIANTS),
    case=drawn_variant_cases(),
    threads=st.integers(1, 3),
    recompute=st.booleans(),
)
def test_random_variants_match_the_definition(
    variant: variants.Variant, case: variants.Case, threads: int, recompute: bool, isa: str
) -> None:
    call = variants.make_call.__wrapped__(variant, case, torch.float64)
    want = variants.run(call, variants.by_definition)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = variants.run(call, lambda c: variants.by_op(c, recompute))
    finally:
        torch.set_num_threads(before)
    assert_near(got, want, torch.float64)


# ---- embedding bags


@st.composite
def drawn_bags(draw: st.DrawFn) -> BagCase:
    form = draw(st.sampled_from(["offsets", "last", "2-D"]))
    lengths = st.one_of(st.integers(0, 6), st.sampled_from([0, 1, 7, 8, 9, 33]))
    B = draw(st.one_of(st.integers(0, 6), st.sampled_from([16, 40])))
    bags = (draw(lengths),) * B if form == "2-D" else tuple(draw(st.lists(lengths, min_size=B, max_size=B)))
    E = draw(st.one_of(st.integers(1, 5), st.sampled_from([9, 40, 300])))
    integers = st.sampled_from([torch.int64, torch.int32])
    return BagCase(
        E=E,
        D=draw(st.one_of(st.integers(0, 9), sizes)),
        lengths=bags,
        form=form,
        trailing=draw(st.integers(0, 4)) if form == "last" else 0,
        padding_idx=draw(st.one_of(st.none(), st.integers(0, E - 1))),
        weights=draw(st.sampled_from(["", "same", "wide"])),
        weight_norm=draw(st.sampled_from(["count", "weight"])),
        scale_grad_by_freq=draw(st.booleans()),
        rows=draw(st.sampled_from(["any", "few", "one"])),
        index=draw(integers),
        offset=draw(integers),
        why="drawn",
    )


@bounded
@given(
    case=drawn_bags(), mode=st.sampled_from(BAG_MODES), dtype=st.sampled_from(DTYPES), sparse=st.booleans(),
    kinds=st.lists(strides, min_size=1, max_size=5), seed=st.integers(0, 9), threads=st.integers(1, 3),
    isa=st.sampled_from(seqkernels.build_info()["isas"]),
)  # fmt: skip
def test_random_bags_match_the_definition(
    case: BagCase, mode: str, dtype: torch.dtype, sparse: bool, kinds: list[str], seed: int, threads: int, isa: str
) -> None:
    """With any strides, sparse and dense; the bits are independent of the number of threads."""
    inputs, turn = make_bag_inputs(case, dtype, mode, seed=seed), iter(kinds * 100)
    odd = inputs.map(lambda t: restrided(t, next(turn)))
    previous = seqkernels._C.set_isa(isa)
    try:
        torch.set_num_threads(threads)
        got = run_bag(functional.embedding_bag, odd, sparse=sparse)
        torch.set_num_threads(1)
        other = run_bag(functional.embedding_bag, inputs, sparse=not sparse)
    finally:
        seqkernels._C.set_isa(previous)
    assert_bag_near(got, bag_definition(inputs), inputs)
    for name in got:
        a, b = (t.to_dense() if t.is_sparse else t for t in (got[name], other[name]))
        assert torch.equal(a, b), name


BAG_NUMBERS = st.one_of(st.integers(-2, 8), st.sampled_from([2**31 - 1, -(2**31)]))
WIDE_NUMBERS = st.one_of(BAG_NUMBERS, st.sampled_from([2**31, 2**32, 2**32 + 1, 2**62, 2**63 - 1, -(2**63)]))


@bounded
@given(data=st.data(), mode=st.sampled_from(BAG_MODES), last=st.booleans(), weighted=st.booleans())
def test_indices_and_offsets_are_valid_or_raise(data: st.DataObject, mode: str, last: bool, weighted: bool) -> None:
    """The test decides which are valid, for training, inference, sparse gradients and steps of SGD."""
    E, D = 5, 3
    wide = data.draw(st.booleans())
    numbers, integer = (WIDE_NUMBERS, torch.int64) if wide else (BAG_NUMBERS, torch.int32)
    some = st.one_of(st.integers(0, E - 1), st.integers(0, E - 1), st.integers(0, E - 1), numbers)
    rows = data.draw(st.lists(some, max_size=6))
    if data.draw(st.booleans()):
        offsets = [0, *sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))]
    else:
        offsets = data.draw(st.lists(numbers, max_size=6))
    ends = offsets if last else [*offsets, len(rows)]
    right = len(ends) >= 1 and all(a <= b for a, b in itertools.pairwise(ends))
    right = right and (not ends or (ends[0] == 0 and ends[-1] <= len(rows)) or not offsets)
    right = right and all(0 <= row < E for row in rows[: max(ends[-1], 0) if offsets else 0])
    table = torch.randn(E, D)
    weights = torch.randn(len(rows)) if weighted else None
    indices, begins = torch.tensor(rows, dtype=integer), torch.tensor(offsets, dtype=integer)
    keywords = dict(mode=mode, per_sample_weights=weights, include_last_offset=last)
    bags = indices, begins, weights, BAG_MODES.index(mode), -1, last
    B, before = len(offsets) - last, table.clone()
    arg = torch.zeros((max(B, 0), D) if mode in ("max", "min") else 0, dtype=torch.int32)
    calls = {
        "inference": lambda: functional.embedding_bag(indices, table, begins, **keywords),
        "training": lambda: functional.embedding_bag(indices, table.clone().requires_grad_(), begins, **keywords),
        "step": lambda: ops.embedding_bag_update_(
            table, None, None, 0, [0.0], torch.ones(max(B, 0), D), arg.fill_(-1), *bags
        ),
        "dense": lambda: ops.embedding_bag_backward(torch.ones(max(B, 0), D), arg, E, *bags),
        "sparse": lambda: ops.embedding_bag_backward_sparse(torch.ones(max(B, 0), D), arg, E, *bags),
    }
    for name, call in calls.items():
        if right:
            result = call()
            if name in ("inference", "training"):
                torch.testing.assert_close(result, reference.embedding_bag(indices, table, begins, **keywords))
        else:
            with pytest.raises((ValueError, RuntimeError, IndexError), match="must"):
                call()
        assert torch.equal(table, before)


@bounded
@given(
    case=drawn_bags(), mode=st.sampled_from(BAG_MODES), last=st.booleans(),
    wrong=st.dictionaries(st.integers(0, 7), nonsense, min_size=1, max_size=2),
)  # fmt: skip
def test_bag_ops_with_invalid_arguments(case: BagCase, mode: str, wrong: dict, last: bool) -> None:
    inputs = make_bag_inputs(case, torch.float32, mode)
    for op in (ops.embedding_bag, ops.embedding_bag_forward):
        arguments = [inputs.weight, *inputs.op_arguments()]
        for index, value in wrong.items():
            arguments[index] = value
        tried(op, EXCEPTIONS, *arguments)
    arguments = [inputs.indices, inputs.weight, inputs.offsets, None, 2.0, False, mode, False, inputs.weights, last]
    for index, value in wrong.items():
        arguments[index] = value
    tried(functional.embedding_bag, (*EXCEPTIONS, IndexError, AttributeError), *arguments)


@bounded
@given(
    case=drawn_bags(), mode=st.sampled_from(BAG_MODES), op=st.integers(0, 3),
    wrong=st.dictionaries(st.integers(0, 13), nonsense, min_size=1, max_size=2),
)  # fmt: skip
def test_backward_bag_ops_with_invalid_arguments(case: BagCase, mode: str, op: int, wrong: dict) -> None:
    inputs = make_bag_inputs(case, torch.float32, mode)
    bags = inputs.op_arguments()
    _, arg = ops.embedding_bag_forward(inputs.weight, *bags)
    name, arguments = [
        ("backward", [inputs.dout, arg, case.E, *bags, case.scale_grad_by_freq]),
        ("backward_sparse", [inputs.dout, arg, case.E, *bags, case.scale_grad_by_freq]),
        ("backward_weights", [inputs.dout, arg, inputs.weight, *bags]),
        ("update_", [inputs.weight, None, None, 0, [0.1], inputs.dout, arg, *bags, case.scale_grad_by_freq]),
    ][op]
    for index, value in wrong.items():
        if index < len(arguments):
            arguments[index] = value
    if name == "backward" and isinstance(arguments[2], int) and arguments[2] > 2**20:
        return  # the number of rows determines the size of the gradient
    tried(getattr(ops, f"embedding_bag_{name}"), EXCEPTIONS, *arguments)


# ---- attention

steps = st.one_of(st.integers(0, 9), st.sampled_from([15, 16, 17, 47, 48, 49, 64, 65, 130]))
columns = st.one_of(st.integers(0, 9), st.sampled_from([16, 17, 31, 33, 64]))


@st.composite
def drawn_attention(draw: st.DrawFn) -> AttentionCase:
    """All combinations of options, except masks with packed sequences."""
    form = draw(st.sampled_from(["dense", "lengths", "lengths of keys", "packed"]))
    B, Hk = draw(st.integers(1 if form == "packed" else 0, 3)), draw(st.integers(1, 2))
    Tq, Tk = draw(steps), draw(steps)
    lengths = [tuple(draw(st.lists(st.integers(0, T), min_size=B, max_size=B))) for T in (Tq, Tk)]
    mask = "" if form == "packed" else draw(st.sampled_from(["", "bool", "float"]))
    bound = st.one_of(st.just(-1), st.integers(0, 70))
    return AttentionCase(
        B=B,
        Hq=Hk * draw(st.integers(1, 3)),
        Hk=Hk,
        Tq=Tq,
        Tk=Tk,
        D=draw(columns),
        Dv=draw(columns),
        mask=mask,
        mask_of="".join(draw(st.sets(st.sampled_from("bhij")))),
        q_lengths=lengths[0] if form in ("lengths", "packed") else None,
        k_lengths=lengths[1] if form != "dense" else None,
        packed=form == "packed",
        causal=draw(st.integers(0, 2)),
        window=(draw(bound), draw(bound)),
        softcap=draw(st.sampled_from([0.0, 0.0, 2.0])),
        slopes=draw(st.sampled_from(["", "", "h", "bh"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        scale=draw(st.sampled_from([0.2, 0.2, -0.1, 0.0])),
        why="drawn",
    )


@bounded
@given(
    case=drawn_attention(), dtype=st.sampled_from(DTYPES), kinds=st.lists(strides, min_size=1, max_size=5),
    seed=st.integers(0, 9), threads=st.integers(2, 4), isa=st.sampled_from(seqkernels.build_info()["isas"]),
)  # fmt: skip
def test_random_attention_matches_the_definition(
    case: AttentionCase, dtype: torch.dtype, kinds: list[str], seed: int, threads: int, isa: str
) -> None:
    """With any strides; the bits are independent of the number of threads."""
    inputs, turn = make_attention_inputs(case, dtype, seed=seed), iter(kinds * 100)
    odd = dataclasses.replace(inputs, tensors={n: restrided(t, next(turn)) for n, t in inputs.tensors.items()})
    if inputs.bool_mask is not None:
        odd.bool_mask = restrided(inputs.bool_mask.float(), next(turn)).bool()
    previous = seqkernels._C.set_isa(isa)
    try:
        torch.set_num_threads(threads)
        got = run_attention(odd)
        torch.set_num_threads(1)
        other = run_attention(inputs)
    finally:
        seqkernels._C.set_isa(previous)
    # Upstream gradients have size 1. If they cancel, as for a query with one key or a mask of one value, the result is
    # their accumulated rounding error.
    assert_attention_near(got, attention_definition(inputs), dtype, least=4.0)
    assert_same_bits(got, other)


@bounded
@given(
    lengths=st.tuples(*(st.one_of(st.none(), st.lists(NUMBERS, max_size=3), integers, odd_tensors()) for _ in range(2)))
)
def test_lengths_of_attention_are_valid_or_raise(lengths: tuple) -> None:
    B, T = 2, (3, 4)
    q, k = torch.randn(B, 1, T[0], 2), torch.randn(B, 1, T[1], 2)

    def fits(given, T: int) -> bool:
        if isinstance(given, Tensor):
            if given.dtype not in (torch.int32, torch.int64) or given.is_meta or given.layout != torch.strided:
                return False
            given = given.tolist() if given.dim() == 1 else []
        return given is None or (len(given) == B and all(0 <= n <= T for n in given))

    if all(fits(n, t) for n, t in zip(lengths, T)):
        assert functional.scaled_dot_product_attention(q, k, k, lengths=lengths).isfinite().all()
    else:
        with pytest.raises(EXCEPTIONS, match="lengths must"):
            functional.scaled_dot_product_attention(q, k, k, lengths=lengths)


@bounded
@given(cu=st.tuples(st.lists(NUMBERS, max_size=4), st.lists(NUMBERS, max_size=4)), longest=st.integers(0, 9))
def test_cu_seqlens_of_attention_are_valid_or_raise(cu: tuple[list[int], list[int]], longest: int) -> None:
    N = (4, 5)
    q, k = torch.randn(N[0], 1, 2), torch.randn(N[1], 1, 2)
    right = len(cu[0]) == len(cu[1])
    for bounds, rows in zip(cu, N):
        right = right and len(bounds) > 0 and bounds[0] == 0 and bounds[-1] == rows
        right = right and all(0 <= b - a <= longest for a, b in itertools.pairwise(bounds))
    given = *(torch.tensor(c, dtype=torch.int64) for c in cu), longest, longest
    if right:
        assert functional.varlen_attention(q, k, k, *given).isfinite().all()
    else:
        with pytest.raises(EXCEPTIONS, match="must"):
            functional.varlen_attention(q, k, k, *given)


@bounded
@given(
    case=drawn_attention(), wrong=st.dictionaries(st.integers(0, 17), nonsense, min_size=1, max_size=2),
    backward=st.dictionaries(st.integers(0, 23), nonsense, min_size=1, max_size=2),
)  # fmt: skip
def test_attention_ops_with_invalid_arguments(case: AttentionCase, wrong: dict, backward: dict) -> None:
    inputs = make_attention_inputs(case, torch.float32)
    q, k, v = (inputs.tensors[n] for n in "qkv")
    right = [q, k, v, *inputs.arguments()]
    out, lse, _ = ops.attention_forward(*right)

    def changed(arguments: list, wrong: dict) -> list:
        return [wrong.get(i, a) for i, a in enumerate(arguments)]

    tried(ops.attention_forward, EXCEPTIONS, *changed(right, wrong))
    of_weights = {i - (i > 2): x for i, x in wrong.items() if i != 2}
    tried(ops.attention_weights, EXCEPTIONS, *changed([*right[:2], *right[3:], lse], of_weights))
    arguments = [torch.ones_like(out), lse, *right, out, lse, "mask" in inputs.tensors, None]
    tried(ops.attention_backward, EXCEPTIONS, *changed(arguments, backward))
    tried(
        functional.scaled_dot_product_attention, (*EXCEPTIONS, IndexError, AttributeError),
        *changed([q, k, v, inputs.mask, 0.0, True, 1.0, True], wrong),
    )  # fmt: skip
