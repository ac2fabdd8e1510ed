"""Triton kernels of EmbeddingBag against a float64 definition."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from seqkernels import functional, reference
from support.cases import (
    BAG_CASES,
    BAG_MODES,
    BagCase,
    BagInputs,
    assert_bag_near,
    bag_definition,
    make_bag_inputs,
    run_bag,
)
from support.triton_on_cpu import DEVICE, load, on_hardware

bags = load("embedding_bag")
SUM, MEAN, MAX, MIN = range(4)
MODES = dict(sum=SUM, mean=MEAN, max=MAX, min=MIN)


@dataclasses.dataclass(frozen=True)
class Case:
    why: str
    lengths: tuple[int, ...]
    E: int = 13
    D: int = 5

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = [
    Case("short and empty bags", (3, 0, 1, 2, 0, 4, 1, 3, 2), D=20),
    Case("one bag", (1,)),
    Case("long bags, several rounds of rows", (300, 0, 7, 130), D=16),
    Case("mean length just above short", (9, 11, 10), D=33),
    Case("columns in several programs", (2, 3), D=300),
    Case("only empty bags", (0, 0, 0)),
    Case("one column", (2, 5), D=1),
]


def inputs(case: Case, dtype: torch.dtype, weights: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Values of few bits, so that equal values occur; their sums still require rounding."""
    N = sum(case.lengths)
    table = (torch.randn(case.E, case.D) * 8).round().div(8).mul(1.1).to(dtype)
    indices = torch.randint(case.E, (N,))
    offsets = torch.tensor([0, *itertools.accumulate(case.lengths)][:-1])
    w = torch.randn(N).to(dtype) if weights else None
    return *(t.to(DEVICE) for t in (table, indices, offsets)), None if w is None else w.to(DEVICE)


def defined(
    table: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor | None = None,
    mode: int = SUM,
    padding_idx: int = -1,
    include_last_offset: bool = False,
    mean_by: int = 0,
) -> tuple[Tensor, Tensor]:
    """Results in float64; the products of max and min are rounded as in the kernel."""
    table, indices = table.cpu(), indices.cpu()
    weights = None if weights is None else weights.cpu().flatten()
    if offsets is None:
        ends = [indices.shape[1] * b for b in range(indices.shape[0] + 1)]
        indices = indices.flatten()
    else:
        ends = offsets.tolist() + ([] if include_last_offset else [indices.numel()])
    acc = torch.float64 if table.dtype == torch.float64 else torch.float32
    out = torch.zeros(len(ends) - 1, table.shape[1], dtype=torch.float64)
    arg = torch.full(out.shape, -1, dtype=torch.int32)
    for b, (begin, end) in enumerate(itertools.pairwise(ends)):
        at = [n for n in range(begin, end) if indices[n] != padding_idx]
        if not at:
            continue
        rows = table[indices[at]].to(acc if mode in (MAX, MIN) else torch.float64)
        w = None if weights is None else weights[at].to(rows.dtype)
        rows = rows if w is None else rows * w.unsqueeze(1)
        if mode in (SUM, MEAN):
            out[b] = rows.sum(0)
            if mode == MEAN:
                out[b] /= w.sum() if mean_by and w is not None else len(at)
            continue
        for d in range(rows.shape[1]):
            column = rows[:, d].tolist()
            order = sorted(range(len(column)), key=lambda i: -column[i] if mode == MAX else column[i])
            best = next((i for i, v in enumerate(column) if math.isnan(v)), order[0])
            out[b, d], arg[b, d] = rows[best, d].double(), at[best] - begin
    return out, arg if mode in (MAX, MIN) else torch.empty(0, dtype=torch.int32)


def check(*args, **options) -> None:
    table, mode = args[0], options.get("mode", SUM)
    out, arg = bags.embedding_bag(*args, **options)
    expected, expected_arg = defined(*args, **options)
    assert out.dtype == table.dtype and arg.dtype == torch.int32
    assert torch.equal(arg.cpu(), expected_arg)
    if mode in (MAX, MIN):
        assert out.cpu().tolist() == expected.to(table.dtype).tolist()
        return
    # Rounding of the result, and of a sum of 300 terms in the type of accumulation.
    acc = torch.float64 if table.dtype == torch.float64 else torch.float32
    scale = table.abs().max().double().item() + 1
    slack = 300 * scale * torch.finfo(acc).eps
    torch.testing.assert_close(out.cpu().double(), expected, rtol=torch.finfo(table.dtype).eps / 2, atol=slack)


@pytest.mark.parametrize("mode", BAG_MODES)
@pytest.mark.parametrize("case", BAG_CASES, ids=str)
def test_shared_cases(case: BagCase, mode: str):
    dtype = (torch.float32, torch.float64, torch.bfloat16, torch.float16)[BAG_CASES.index(case) % 4]
    if case.weights == "wide" and dtype == torch.float64:
        dtype = torch.bfloat16
    given = make_bag_inputs(case, dtype, mode)
    wide = given.map(Tensor.double)
    keywords = {k: v for k, v in wide.keywords().items() if k != "scale_grad_by_freq"}
    want = reference.embedding_bag(wide.indices, wide.weight, per_sample_weights=wide.weights, **keywords)
    arguments = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in (given.weight, *given.op_arguments())]
    out, arg = bags.embedding_bag(*arguments)
    assert_bag_near({"output": out.cpu()}, {"output": want}, given)
    assert arg.shape == (out.shape if mode in ("max", "min") else (0,))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case: Case, mode: str, weighted: bool):
    table, indices, offsets, w = inputs(case, torch.float32, weighted)
    check(table, indices, offsets, w, mode=MODES[mode])


@on_hardware
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_dtypes(mode: str, dtype: torch.dtype):
    table, indices, offsets, w = inputs(CASES[0], dtype, weights=True)
    check(table, indices, offsets, mode=MODES[mode])
    check(table, indices, offsets, w, mode=MODES[mode])
    if dtype.itemsize == 2:
        check(table, indices, offsets, torch.randn(indices.numel(), device=DEVICE), mode=MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_padding(mode: str):
    table, indices, offsets, w = inputs(CASES[0], torch.float32, weights=True)
    indices[:3] = 4  # a bag of padding
    indices[5] = 4
    check(table, indices, offsets, mode=MODES[mode], padding_idx=4)
    check(table, indices, offsets, w, mode=MODES[mode], padding_idx=4)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_one_length(mode: str):
    table, *_ = inputs(CASES[0], torch.float32)
    indices = torch.randint(table.shape[0], (7, 3), device=DEVICE)
    check(table, indices, None, mode=MODES[mode])
    check(table, indices.T.contiguous().T, None, torch.randn(3, 7, device=DEVICE).T, mode=MODES[mode])


@pytest.mark.parametrize("mode", MODES)
def test_last_offset_and_trailing_indices(mode: str):
    table, indices, offsets, _ = inputs(CASES[0], torch.float32)
    check(table, indices, offsets, mode=MODES[mode], include_last_offset=True)


@on_hardware
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offset", [torch.int32, torch.int64], ids=str)
def test_index_types(index: torch.dtype, offset: torch.dtype):
    table, indices, offsets, _ = inputs(CASES[0], torch.float32)
    check(table, indices.to(index), offsets.to(offset), mode=MAX)


def test_mean_by_weight():
    table, indices, offsets, w = inputs(CASES[0], torch.float32, weights=True)
    indices[:3] = 4
    check(table, indices, offsets, w.abs(), mode=MEAN, mean_by=1, padding_idx=4)
    check(table, indices, offsets, mode=MEAN, mean_by=1)  # without weights, each row has weight 1


@pytest.mark.parametrize("mode", MODES)
def test_strided_tables(mode: str):
    table, indices, offsets, _ = inputs(CASES[0], torch.float32)
    wide = torch.full((table.shape[0], 3 * table.shape[1]), math.nan, device=DEVICE)
    for view in (wide[:, : table.shape[1]], wide[:, ::3], wide.T[: table.shape[0] * 0 + table.shape[1]].T):
        view.copy_(table)
        check(view, indices, offsets, mode=MODES[mode])
    by_column = table.T.contiguous().T
    check(by_column, indices, offsets, mode=MODES[mode])
    check(table[:1].expand(13, -1), indices, offsets, mode=MODES[mode])


@on_hardware
def test_selection_of_nan_and_of_the_first_of_equal_values():
    nan, inf = math.nan, math.inf
    table = torch.tensor([[1.0, nan, -inf, 0.0], [1.0, 2.0, -inf, -0.0], [0.0, nan, -inf, -1.0]], device=DEVICE)
    indices, offsets = torch.tensor([2, 0, 1, 1, 1, 0, 0], device=DEVICE), torch.tensor([0, 3, 4], device=DEVICE)
    for mode in (MAX, MIN):
        out, arg = bags.embedding_bag(table, indices, offsets, mode=mode)
        expected, expected_arg = defined(table, indices, offsets, mode=mode)
        assert torch.equal(arg.cpu(), expected_arg)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(out[:, 2:].cpu().signbit(), expected[:, 2:].signbit())  # includes zeros


def test_sum_of_negative_zeros():
    table = torch.full((2, 4), -0.0, device=DEVICE)
    for indices in ([[0]], [[0, 1, 0, 1, 0]]):
        out, _ = bags.embedding_bag(table, torch.tensor(indices, device=DEVICE))
        assert out.signbit().all()
    out, _ = bags.embedding_bag(
        table, torch.tensor([], dtype=torch.int64, device=DEVICE), torch.tensor([0], device=DEVICE)
    )
    assert not out.signbit().any()  # an empty bag gives +0


@on_hardware
@pytest.mark.parametrize("mode", MODES)
def test_faults_are_skipped_and_reported(mode: str):
    """An invalid index is skipped, and a bag with invalid offsets is empty, without reads out of bounds."""
    table, indices, offsets, w = inputs(CASES[0], torch.float32, weights=True)
    indices[indices == 12] = 0
    bad = indices.clone()
    bad[[4, 8]] = torch.tensor([13, -1], device=DEVICE)
    fault = torch.empty(2, dtype=torch.int64, device=DEVICE)
    out, arg = bags.embedding_bag(table, bad, offsets, w, MODES[mode], fault=fault)
    assert fault.tolist() == [4, bags.NO_FAULT]
    indices[[4, 8]] = 12  # padding is skipped as well
    expected = bags.embedding_bag(table, indices, offsets, w, MODES[mode], padding_idx=12)
    assert torch.equal(out, expected[0]) and torch.equal(arg, expected[1])
    for wrong, at in (
        ([1, 3, 3], 0),
        ([0, 5, 3], 1),
        ([0, 3, 17], 1),
        ([0, 17, 20], 0),
        ([0, -2, 3], 0),
        ([0, 3, 2**40], 1),
    ):
        out, _ = bags.embedding_bag(table, indices, torch.tensor(wrong, device=DEVICE), mode=MODES[mode], fault=fault)
        assert fault.tolist() == [bags.NO_FAULT, at]
        assert out[at].eq(0).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(indices=torch.tensor([0, 13])), IndexError, "indices must lie in [0, 13), got 13 at position 1"),
        (dict(indices=torch.tensor([-1, 13])), IndexError, "indices must lie in [0, 13), got -1 at position 0"),
        (dict(offsets=torch.tensor([1])), ValueError, "offsets must begin at 0, not decrease and end at 3 at most"),
        (dict(offsets=torch.tensor([0, 2, 1])), ValueError, "got 2 and then 1 at bag 1"),
        (dict(offsets=torch.tensor([0.0])), TypeError, "offsets must be int32 or int64, got torch.float32"),
        (dict(offsets=None), ValueError, "indices must have shape [B, L] without offsets, got [3]"),
        (dict(offsets=torch.zeros(1, 1, dtype=torch.int64)), ValueError, "offsets must have one dimension"),
        (dict(mode=4), ValueError, "mode must be 0 (sum), 1 (mean), 2 (max) or 3 (min), got 4"),
        (dict(mean_by=2), ValueError, "mean_by must be 0 (count) or 1 (weight), got 2"),
        (dict(per_sample_weights=torch.ones(2)), ValueError, "must have the shape of indices, [3], got [2]"),
        (dict(per_sample_weights=torch.ones(3).double()), TypeError, "must have weight's dtype, torch.float32, or"),
        (dict(weight=torch.ones(13, 2, dtype=torch.int32)), NotImplementedError, "dtype torch.int32 is none of"),
        (dict(weight=torch.ones(13)), ValueError, "weight must have shape [E, D], got [13]"),
        (dict(fault=torch.zeros(1)), ValueError, "fault must be int64 [2]"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(change: dict, error: type, message: str):
    args = dict(weight=torch.ones(13, 2), indices=torch.tensor([0, 1, 2]), offsets=torch.tensor([0]))
    args = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in (args | change).items()}
    with pytest.raises(error, match=re.escape(message)):
        bags.embedding_bag(**args)


def test_empty_inputs():
    table = torch.ones(13, 2, device=DEVICE)
    none = torch.tensor([], dtype=torch.int64, device=DEVICE)
    for mode in (SUM, MAX):
        out, arg = bags.embedding_bag(table, none, none, mode=mode)
        assert out.shape == (0, 2) and arg.shape == ((0, 2) if mode == MAX else (0,))
        out, _ = bags.embedding_bag(table[:, :0], none, none.new_zeros(3), mode=mode)
        assert out.shape == (3, 0)
        out, _ = bags.embedding_bag(table[:0], none, none.new_zeros(3), mode=mode)
        assert out.eq(0).all() and out.shape == (3, 2)


@on_hardware
def test_bits_of_a_bag_with_the_same_config():
    """The configuration depends on the mean length; with the same configuration, the bits are equal."""
    table, indices, offsets, _ = inputs(Case("two long bags", (300, 290), D=16), torch.float32)
    out, _ = bags.embedding_bag(table, indices, offsets)
    alone, _ = bags.embedding_bag(table, indices[:300], offsets[:1])
    assert torch.equal(out[:1], alone)
    again, _ = bags.embedding_bag(table, indices, offsets)
    assert torch.equal(out, again)


def test_configs_lists_each_config():
    """bench/check_triton.py compiles the listed ones."""
    for float64, extreme in itertools.product((False, True), repeat=2):
        listed = bags.configs(float64, extreme)
        for D, L in itertools.product((1, 16, 17, 64, 100, 256, 1000), (0.0, 1.0, 8.0, 9.0, 40.0, 200.0, 1e6)):
            assert bags.config(D, L, float64, extreme) in listed


# ---- the public functions, forward and backward


def placed(given: BagInputs) -> BagInputs:
    """Copies the inputs and the upstream gradient to the device."""
    moved = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    return dataclasses.replace(given, **{k: v.to(DEVICE) for k, v in moved.items() if isinstance(v, Tensor)})


def check_bag(case: BagCase, mode: str, dtype: torch.dtype, **options) -> None:
    """Output and all gradients of functional.embedding_bag."""
    given = make_bag_inputs(case, dtype, mode)
    got = run_bag(functools.partial(functional.embedding_bag, backend="triton", **options), placed(given))
    want = bag_definition(given)
    if mode in ("max", "min"):  # rounding to dtype gives equal values that differ in float64
        arg = reference.embedding_bag_winners(
            given.indices, given.weight, per_sample_weights=given.weights, **options_of_winners(given)
        )
        want = bag_definition(given, arg=arg)
    assert_bag_near({name: t.cpu() for name, t in got.items()}, want, given)


def options_of_winners(given: BagInputs) -> dict:
    return {k: v for k, v in given.keywords().items() if k not in ("scale_grad_by_freq", "weight_norm")}


@pytest.mark.parametrize("mode", BAG_MODES)
@pytest.mark.parametrize("case", BAG_CASES, ids=str)
def test_functional_gradients(case: BagCase, mode: str):
    dtype = (torch.float64, torch.float32, torch.float16, torch.bfloat16)[BAG_CASES.index(case) % 4]
    if case.weights == "wide" and dtype == torch.float64:
        dtype = torch.bfloat16
    check_bag(case, mode, dtype)


@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
@pytest.mark.parametrize("mode", BAG_MODES)
def test_functional_sparse_gradients(mode: str, scale_grad_by_freq: bool):
    """The coalesced rows equal the dense gradient."""
    case = BagCase(
        E=50, D=20, lengths=(3, 0, 7, 12), why="rows that repeat",
        rows="few", padding_idx=1, scale_grad_by_freq=scale_grad_by_freq,
    )  # fmt: skip
    given = placed(make_bag_inputs(case, torch.float32, mode))
    run = functools.partial(functional.embedding_bag, backend="triton")
    dense, sparse = (run_bag(run, given, sparse=flag)["dweight"] for flag in (False, True))
    assert sparse.is_sparse and sparse.is_coalesced()
    assert torch.equal(sparse.to_dense(), dense)


def test_functional_embedding():
    """The padding row is returned and has no gradient."""
    table = torch.randn(9, 5, device=DEVICE, dtype=torch.float64)
    indices = torch.tensor([[1, 3, 3], [8, 0, 1]], device=DEVICE)
    results = []
    for function in (functools.partial(functional.embedding, backend="triton"), reference.embedding):
        for by_frequency in (False, True):
            leaf = table.clone().requires_grad_()
            out = function(indices, leaf, padding_idx=3, scale_grad_by_freq=by_frequency)
            results.append((out.detach(), *torch.autograd.grad(out.square().sum(), leaf)))
    for got, want in zip(results[:2], results[2:]):
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_functional_compiled():
    """One graph with the Triton ops; scale_grad_by_freq uses a separate op."""
    table = torch.randn(9, 5, device=DEVICE, requires_grad=True)
    indices, offsets = torch.tensor([1, 3, 3, 8], device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    for by_frequency in (False, True):

        def bag(table, by_frequency=by_frequency):
            return functional.embedding_bag(indices, table, offsets, scale_grad_by_freq=by_frequency, backend="triton")

        want, got = bag(table), torch.compile(bag, fullgraph=True, backend="aot_eager")(table)
        assert torch.equal(got, want)
        (d_got,), (d_want,) = (torch.autograd.grad(out.square().sum(), table) for out in (got, want))
        assert torch.equal(d_got, d_want)


def test_functional_second_derivatives():
    weights = torch.randn(4, device=DEVICE, dtype=torch.float64, requires_grad=True)
    table = torch.randn(9, 5, device=DEVICE, dtype=torch.float64, requires_grad=True)
    indices, offsets = torch.tensor([1, 3, 3, 8], device=DEVICE), torch.tensor([0, 3], device=DEVICE)

    def bag(table, weights):
        return functional.embedding_bag(
            indices, table, offsets, mode="sum", per_sample_weights=weights, backend="triton"
        )

    if DEVICE == "cpu":
        assert torch.autograd.gradgradcheck(bag, (table, weights))


@pytest.mark.parametrize(
    "call, missing",
    [
        (lambda table, indices: functional.embedding_bag(indices, table, max_norm=1.0, backend="triton"), "max_norm"),
        (lambda table, indices: functional.embedding(indices, table, max_norm=1.0, backend="triton"), "max_norm"),
        (
            lambda table, indices: functional.embedding_bags(
                indices.flatten(), [table], indices.new_tensor([0, 4]), backend="triton"
            ),
            "a lookup in several tables",
        ),
        (lambda table, _: functional.quantize_rows(table, backend="triton"), "quantize_rows"),
        (
            lambda table, indices: functional.embedding_bag_bytes(indices, table.byte(), backend="triton"),
            "a table of bytes",
        ),
    ],
    ids=["max_norm", "max_norm of embedding", "several tables", "quantize_rows", "bytes"],
)  # fmt: skip
def test_unsupported_options(call, missing: str):
    table, indices = torch.ones(5, 3, device=DEVICE), torch.tensor([[0, 1], [2, 3]], device=DEVICE)
    with pytest.raises(NotImplementedError, match=f"backend triton cannot run this call: .*{missing} has no Triton"):
        call(table, indices)


def test_bad_indices_raise():
    table = torch.ones(5, 3, device=DEVICE)
    with pytest.raises(IndexError, match=re.escape("indices must lie in [0, 5), got 5 at position 1")):
        functional.embedding_bag(torch.tensor([[0, 5]], device=DEVICE), table, backend="triton")


def test_import_without_triton():
    """`import seqkernels` does not import Triton; `import seqkernels.triton` without it names the missing package."""
    code = """
import sys
import seqkernels
assert not [name for name in sys.modules if name == "triton" or name.startswith("seqkernels.triton")]
sys.modules["triton"] = None
try:
    import seqkernels.triton
except ImportError as error:
    assert "Triton could not be imported" in str(error) and isinstance(error.__cause__, ImportError), error
else:
    raise AssertionError("imported")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
