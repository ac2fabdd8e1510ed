"""EmbeddingBag and Embedding: parity with the definition, derivatives, reproducible bits, and memory layouts.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from seqkernels import functional, reference
from support.cases import (
    BAG_CASES,
    BAG_MODES,
    BAG_REALISTIC,
    BAG_TINY,
    DTYPES,
    ERROR_RATIO,
    BagCase,
    BagInputs,
    assert_bag_near,
    assert_same_bits,
    bag_definition,
    bag_lengths,
    make_bag_inputs,
    run_bag,
)

ops = torch.ops.seqkernels
HALVES = (torch.bfloat16, torch.float16)


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=named)
modes = pytest.mark.parametrize("mode", BAG_MODES)
cases = pytest.mark.parametrize("case", BAG_CASES, ids=str)
tiny_cases = pytest.mark.parametrize("case", BAG_TINY, ids=str)
sums = pytest.mark.parametrize("mode", ["sum", "mean"])
extremes = pytest.mark.parametrize("mode", ["max", "min"])

run = functools.partial(run_bag, functional.embedding_bag)


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The default, because parallel loops may stall for milliseconds beside another busy process."""
    torch.set_num_threads(1)


exactly = functools.partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)


def bits(t: Tensor) -> Tensor:
    """The bits as integers, which distinguishes -0 from 0 and compares NaN."""
    return t.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.dtype.itemsize])


def same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert_same_bits({n: bits(t) for n, t in got.items()}, {n: bits(t) for n, t in want.items()})


@functools.cache
def definition(case: BagCase, dtype: torch.dtype, mode: str) -> dict[str, Tensor]:
    return bag_definition(make_bag_inputs(case, dtype, mode))


# ---- parity


@cases
def test_parity(case: BagCase, isa: str) -> None:
    for mode, dtype in itertools.product(BAG_MODES, DTYPES):
        inputs = make_bag_inputs(case, dtype, mode)
        assert_bag_near(run(inputs), definition(case, dtype, mode), inputs)


FORMS = {
    "offsets": dict(lengths=(3, 0, 5, 1, 7)),
    "last": dict(lengths=(3, 0, 5, 1, 7), form="last"),
    "trailing": dict(lengths=(3, 0, 5, 1, 7), form="last", trailing=4),
    "2-D": dict(lengths=(4,) * 5, form="2-D"),
}
INTEGERS = list(itertools.product((torch.int64, torch.int32), repeat=2))
WEIGHTS = {
    "unweighted": {},
    "weights": dict(weights="same"),
    "wide weights": dict(weights="wide"),
    "by weight": dict(weights="same", weight_norm="weight"),
    "by wide weight": dict(weights="wide", weight_norm="weight"),
}


@dtypes
@pytest.mark.parametrize("padding_idx", [None, 0, 12], ids=["no padding", "pad 0", "pad 12"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_combinations_of_options(weights: str, padding_idx: int | None, dtype: torch.dtype, isa: str) -> None:
    """All forms of input match the definition; all pairs of integer types, dense and sparse, give the same bits."""
    for form, mode in itertools.product(FORMS.values(), BAG_MODES):
        case = BagCase(E=13, D=21, **form, **WEIGHTS[weights], padding_idx=padding_idx, why="options")
        first = run(make_bag_inputs(case, dtype, mode))
        assert_bag_near(first, definition(case, dtype, mode), make_bag_inputs(case, dtype, mode))
        for index, offset in INTEGERS[1:]:
            same_bits(run(make_bag_inputs(dataclasses.replace(case, index=index, offset=offset), dtype, mode)), first)
        sparse = run(make_bag_inputs(case, dtype, mode), sparse=True)
        same_bits(densely(sparse), first)


def densely(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.to_dense() if t.is_sparse else t for name, t in results.items()}


@dtypes
@modes
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_scale_grad_by_freq_divides_by_counts(mode: str, dtype: torch.dtype, sparse: bool, isa: str) -> None:
    """Rows that occur once, twice and often, and one that occurs only as padding or beyond the last offset."""
    case = BagCase(
        E=8, D=5, lengths=(4, 0, 9, 3, 2), form="last", trailing=3, padding_idx=5, weights="same",
        scale_grad_by_freq=True, why="unequal counts",
    )  # fmt: skip
    inputs = make_bag_inputs(case, dtype, mode)
    inputs.indices = torch.tensor([0, 1, 1, 5, 2, 2, 2, 2, 7, 2, 5, 2, 2, 3, 7, 2, 4, 1, 6, 0, 2])
    want = bag_definition(inputs)
    got = run(inputs, sparse=sparse)
    assert got["dweight"].is_sparse == sparse
    assert_bag_near(got, want, inputs)
    plain = bag_definition(dataclasses.replace(inputs, case=dataclasses.replace(case, scale_grad_by_freq=False)))
    counts = torch.bincount(inputs.indices[:18], minlength=8).clamp(min=1)[:, None]
    torch.testing.assert_close(want["dweight"], plain["dweight"] / counts)


@cases
def test_sparse_gradient_matches_dense_gradient(case: BagCase) -> None:
    for mode, dtype in itertools.product(BAG_MODES, DTYPES):
        inputs = make_bag_inputs(case, dtype, mode)
        got = run(inputs, sparse=True)
        gradient = got["dweight"]
        assert gradient.is_sparse and gradient.is_coalesced() and gradient.sparse_dim() == 1
        rows = gradient.indices()[0]
        assert rows.dtype == torch.int64 and torch.equal(rows, rows.unique())  # ascending and unique
        assert set(rows.tolist()) <= set(inputs.indices.flatten().tolist())
        same_bits(densely(got), run(inputs))
        torch.sparse_coo_tensor(gradient.indices(), gradient.values(), gradient.shape, check_invariants=True)


def torch_bag(*args, weight_norm: str = "count", **keywords) -> Tensor:
    return torch.nn.functional.embedding_bag(*args, **keywords)


def torch_supports(case: BagCase, mode: str) -> bool:
    """Whether torch supports the case without a known bug; test_torch_bugs.py has the bugs."""
    refused = mode == "min" or (case.weights and mode != "sum")
    return not (refused or case.trailing or case.scale_grad_by_freq or (case.form == "2-D" and not case.N))


@pytest.mark.parametrize(
    "case, mode", [(c, m) for c, m in itertools.product(BAG_CASES, BAG_MODES) if torch_supports(c, m)], ids=str
)
def test_definition_matches_torch(case: BagCase, mode: str) -> None:
    inputs = make_bag_inputs(case, torch.float64, mode)
    if case.N == 0 and case.form != "last":
        inputs.indices = inputs.indices.long()
    assert_bag_near(run_bag(torch_bag, inputs), bag_definition(inputs), inputs, slack=20)


@pytest.mark.parametrize("dtype", ERROR_RATIO, ids=named)
def test_error_does_not_exceed_the_error_of_torch(dtype: torch.dtype) -> None:
    """RMS error of outputs and gradients against float64, over several sizes and seeds.

    The slack of 3 percent covers the different summation order of float32 gradients.
    """
    ours: dict[str, float] = collections.defaultdict(float)
    theirs: dict[str, float] = collections.defaultdict(float)
    options = [("sum", ""), ("sum", "same"), ("mean", ""), ("max", "")]
    for case, seed, (mode, weights) in itertools.product(BAG_REALISTIC, range(2), options):
        inputs = make_bag_inputs(dataclasses.replace(case, weights=weights), dtype, mode, seed=seed)
        want = bag_definition(inputs)
        for total, got in ((ours, run(inputs)), (theirs, run_bag(torch_bag, inputs))):
            for name, w in want.items():
                error = (got[name].double() - w).square().sum() / w.square().mean()
                total[f"{mode}{'-weighted' * bool(weights)} {name}"] += error.item()
    ratios = {name: round((ours[name] / theirs[name]) ** 0.5, 3) for name in ours if theirs[name]}
    assert all(not ours[name] for name in ours if not theirs[name])
    assert max(ratios.values()) <= ERROR_RATIO[dtype] + 0.03, f"ratio of the RMS error to that of torch: {ratios}"


@pytest.mark.parametrize("wanted", ["weight", "weights"])
@modes
def test_gradients_are_independent_of_requires_grad_of_other_inputs(mode: str, wanted: str) -> None:
    case = BagCase(E=9, D=12, lengths=(4, 0, 5), weights="same", padding_idx=2, why="one gradient")
    inputs = make_bag_inputs(case, torch.float32, mode)
    both = run(inputs)
    getattr(inputs, wanted).requires_grad_()
    output = functional.embedding_bag(
        inputs.indices, inputs.weight, per_sample_weights=inputs.weights, **inputs.keywords()
    )
    output.backward(inputs.dout)
    assert torch.equal(getattr(inputs, wanted).grad, both["d" + wanted])
    assert (inputs.weights if wanted == "weight" else inputs.weight).grad is None


# ---- semantics


def bag(rows: list[list[float]], mode: str, dtype: torch.dtype = torch.float32, **more) -> Tensor:
    """The result for one bag of all rows."""
    table = torch.tensor(rows, dtype=dtype)
    return functional.embedding_bag(torch.arange(len(rows))[None], table, mode=mode, **more)[0]


def selected_positions(
    rows: list[list[float]], mode: str, dtype: torch.dtype = torch.float32, weights=None
) -> list[int]:
    table, inputs = torch.tensor(rows, dtype=dtype), torch.arange(len(rows))
    weights = None if weights is None else torch.tensor(weights, dtype=dtype)
    _, arg = ops.embedding_bag_forward(table, inputs, torch.tensor([0]), weights, BAG_MODES.index(mode))
    return arg[0].tolist()


@dtypes
@extremes
def test_first_of_equal_values_is_selected(mode: str, dtype: torch.dtype, isa: str) -> None:
    for D in (1, 5, 16, 40):
        rows = [[0.0] * D, [3.0] * D, [-3.0] * D, [3.0] * D, [-3.0] * D]
        assert selected_positions(rows, mode, dtype) == [1 if mode == "max" else 2] * D
        assert (
            selected_positions([[0.0] * D, [-0.0] * D], mode, dtype)
            == selected_positions([[-0.0] * D, [0.0] * D], mode, dtype)
            == [0] * D
        )
        weighted = selected_positions([[1.0] * D, [2.0] * D, [-2.0] * D], mode, dtype, [2.0, 1.0, -1.0])
        assert weighted == [0] * D


@dtypes
@extremes
def test_first_nan_is_selected(mode: str, dtype: torch.dtype, isa: str) -> None:
    for D, at in itertools.product((1, 7, 33), range(4)):
        table = torch.randn(9, D).to(dtype)
        table[at, ::2] = math.nan
        table[5, ::2] = math.nan
        bags = torch.arange(9), torch.tensor([0, 8]), None, BAG_MODES.index(mode)
        output, arg = ops.embedding_bag_forward(table, *bags)
        assert output[0, ::2].isnan().all() and (arg[0, ::2] == at).all()
        assert output[0, 1::2].isfinite().all() and output[1].isfinite().all()
        amax = torch.amax if mode == "max" else torch.amin
        exactly(output[0], amax(table[:8], 0))


@dtypes
@modes
def test_infinities(mode: str, dtype: torch.dtype, isa: str) -> None:
    inf = math.inf
    for rows in ([[inf, -inf, 1.0], [2.0, 2.0, -inf]], [[-inf, inf, inf]] * 3, [[inf, -inf, inf], [-inf, inf, inf]]):
        table = torch.tensor(rows, dtype=dtype)
        want = {"sum": table.sum(0), "mean": table.mean(0), "max": table.amax(0), "min": table.amin(0)}[mode]
        exactly(bag(rows, mode, dtype), want)
    lowest = -inf if mode == "max" else inf
    assert mode in ("sum", "mean") or selected_positions([[lowest] * 20] * 3, mode, dtype) == [0] * 20


@dtypes
@modes
def test_negative_zero_is_preserved(mode: str, dtype: torch.dtype, isa: str) -> None:
    """A sum starts with its first row, not with zero; an empty bag gives +0."""
    for rows in ([[-0.0] * 19], [[-0.0] * 19] * 3):
        assert bag(rows, mode, dtype).signbit().all()
    empty = functional.embedding_bag(
        torch.zeros(2, 0, dtype=torch.int64), torch.full((3, 19), -1.0).to(dtype), mode=mode
    )
    assert not empty.any() and not empty.signbit().any()


@dtypes
@modes
def test_padding_is_not_read(mode: str, dtype: torch.dtype, isa: str) -> None:
    """Values and weights of padding are NaN; its gradient is zero."""
    case = BagCase(E=6, D=19, lengths=(5, 2, 0, 4), padding_idx=3, weights="same", why="NaN in the padding")
    inputs = make_bag_inputs(case, dtype, mode)
    inputs.indices[[0, 2, 5, 6, 10]] = 3
    want = run(inputs)
    inputs.weight[3] = math.nan
    inputs.weights[inputs.indices == 3] = math.nan
    got = run(inputs)
    same_bits(got, want)
    assert not got["dweight"][3].any() and not got["dweights"][inputs.indices == 3].any()
    assert not got["output"][1].any()  # only padding
    sparse = run(inputs, sparse=True)["dweight"]
    assert 3 not in sparse.indices()


@modes
def test_weights_of_infinite_and_nan_rows_follow_ieee(mode: str) -> None:
    """0 times infinity is NaN; a NaN in rows that do not occur has no effect."""
    table = torch.tensor([[math.inf, 1.0], [2.0, 2.0], [math.nan, math.nan]])
    weights = torch.tensor([[0.0, 1.0]])
    out = functional.embedding_bag(torch.tensor([[0, 1]]), table, mode=mode, per_sample_weights=weights)
    assert out[0, 0].isnan() and out[0, 1].isfinite()


@pytest.mark.parametrize("mode", BAG_MODES)
def test_negative_padding_idx(mode: str) -> None:
    case = BagCase(E=6, D=4, lengths=(5, 2, 0, 4), padding_idx=5, weights="same", why="padding at the end")
    inputs = make_bag_inputs(case, torch.float32, mode)
    inputs.indices[::3] = 5
    same_bits(run(inputs, padding_idx=-1), run(inputs))


@sums
def test_weight_norm_without_weights(mode: str) -> None:
    case = BagCase(E=6, D=4, lengths=(5, 2, 0, 4), why="no weights")
    inputs = make_bag_inputs(case, torch.float64, mode)
    same_bits(run(inputs, weight_norm="weight"), run(inputs))


@pytest.mark.parametrize("dtype", HALVES, ids=named)
@sums
def test_half_types_accumulate_in_float32(mode: str, dtype: torch.dtype, isa: str) -> None:
    """For sums that would overflow or saturate in the half type."""
    if dtype == torch.float16:
        n = 3 if mode == "mean" else 1
        rows = [[60000.0] * 9, [60000.0] * 9, [-60000.0 if mode == "sum" else 60000.0] * 9]
        assert (bag(rows, mode, dtype) == torch.tensor(60000.0 * n / n).to(dtype)).all()
    ones = torch.ones(1, 9, dtype=dtype)
    got = functional.embedding_bag(torch.zeros(1, 20480, dtype=torch.int64), ones, mode=mode)
    assert (got == (20480 if mode == "sum" else 1)).all()  # 20480 = 5 * 2^12 is exact in both types


@dtypes
@pytest.mark.parametrize("hits", [20480, 20001])
@pytest.mark.parametrize("mode", ["sum", "max"])
def test_gradient_of_a_frequent_row_does_not_saturate(mode: str, hits: int, dtype: torch.dtype, isa: str) -> None:
    """torch saturates at 256 in bfloat16. Bags of one index select the row in each mode."""
    E, D = 50, 9
    indices = torch.randint(0, E, (hits + 500,))
    indices[indices == 7] = 8
    indices[torch.randperm(len(indices))[:hits]] = 7
    want = torch.bincount(indices, minlength=E).double().to(dtype)
    for sparse in (False, True):
        table = torch.zeros(E, D, dtype=dtype, requires_grad=True)
        functional.embedding_bag(indices[:, None], table, mode=mode, sparse=sparse).sum().backward()
        assert torch.equal(table.grad.to_dense(), want[:, None].expand(E, D))


@dtypes
@sums
def test_gradient_of_a_frequent_row_is_rounded_once(mode: str, dtype: torch.dtype) -> None:
    """A row with 20,000 occurrences and random gradients, rows with few occurrences, and one without."""
    lengths = (40,) * 525
    case = BagCase(E=6, D=9, lengths=lengths, weights="same", why="a hot row")
    inputs = make_bag_inputs(case, dtype, mode)
    inputs.indices = torch.where(torch.rand(case.N) < 20000 / case.N, 2, inputs.indices.clamp(max=4))
    got, want = run(inputs), bag_definition(inputs)
    assert_bag_near(got, want, inputs, slack=5)
    assert not got["dweight"][5].any()


@dtypes
@modes
def test_one_bag_of_a_hundred_thousand(mode: str, dtype: torch.dtype, isa: str) -> None:
    for weights in ("", "same"):
        inputs, want = of_a_long_bag(mode, dtype, weights)
        assert_bag_near(run(inputs), want, inputs)


@functools.cache
def of_a_long_bag(mode: str, dtype: torch.dtype, weights: str) -> tuple[BagInputs, dict[str, Tensor]]:
    """Inputs of a long bag, and the definition in float64 for one bag."""
    case = BagCase(E=1000, D=9, lengths=(100_000,), weights=weights, padding_idx=3, why="a very long bag")
    inputs = make_bag_inputs(case, dtype, mode)
    wide = inputs.map(lambda t: t.double().detach().requires_grad_())
    keep = inputs.indices != 3
    found = wide.weight[inputs.indices[keep]]
    found = found * wide.weights[keep, None] if weights else found
    if mode in ("sum", "mean"):
        output = found.sum(0, keepdim=True) if mode == "sum" else found.mean(0, keepdim=True)
    else:
        output = found.gather(0, (found.argmax(0) if mode == "max" else found.argmin(0))[None])
        best = output.detach().clone()
        first = (found == best).int().argmax(0)  # argmax of equal integers returns the first
        output = found.gather(0, first[None])
    wanted = {"dweight": wide.weight} | ({"dweights": wide.weights} if weights else {})
    grads = torch.autograd.grad(output, list(wanted.values()), wide.dout.detach())
    return inputs, {"output": output.detach()} | dict(zip(wanted, grads, strict=True))


# ---- Embedding


@dtypes
@pytest.mark.parametrize("padding_idx", [None, 2, -1])
def test_embedding_matches_torch(padding_idx: int | None, dtype: torch.dtype, isa: str) -> None:
    for shape in ((), (5,), (2, 3), (2, 3, 4), (0,), (3, 0), (0, 4)):
        table, indices = torch.randn(7, 21).to(dtype), torch.randint(0, 7, shape)
        got, want = (table.clone().requires_grad_() for _ in "ab")
        for integer in (torch.int64, torch.int32):
            output = functional.embedding(indices.to(integer), got, padding_idx)
            expected = torch.nn.functional.embedding(indices, want, padding_idx)
            assert torch.equal(output, expected) and output.is_contiguous()
            upstream = torch.randn(output.shape).to(dtype)
            (g,) = torch.autograd.grad(output, got, upstream)
            (w,) = torch.autograd.grad(expected.double(), want, upstream.double())
            torch.testing.assert_close(g, w, **dict(rtol=2e-2, atol=2e-2) if dtype in HALVES else {})


@dtypes
@pytest.mark.parametrize("scale_grad_by_freq", [False, True])
def test_gradient_of_embedding_matches_the_definition(scale_grad_by_freq: bool, dtype: torch.dtype, isa: str) -> None:
    table = torch.randn(9, 21).to(dtype).requires_grad_()
    indices = torch.randint(0, 9, (6, 50)).clamp(max=7)
    upstream = torch.randn(6, 50, 21).to(dtype)
    want = torch.zeros(9, 21, dtype=torch.float64)
    want.index_add_(0, indices.flatten(), upstream.double().flatten(0, 1))
    want[3] = 0
    if scale_grad_by_freq:
        want /= torch.bincount(indices.flatten(), minlength=9).clamp(min=1)[:, None]
    inputs = make_bag_inputs(BAG_CASES[0], dtype)
    for sparse in (False, True):
        output = functional.embedding(
            indices, table, padding_idx=3, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
        )
        (got,) = torch.autograd.grad(output, table, upstream)
        assert got.is_sparse == sparse
        assert_bag_near({"dweight": got}, {"dweight": want}, inputs)
        assert torch.equal(output, table[indices])


# ---- max_norm


@dtypes
@pytest.mark.parametrize("name", ["embedding_bag", "embedding"])
def test_max_norm_scales_rows_that_are_looked_up(name: str, dtype: torch.dtype, isa: str) -> None:
    table = (torch.randn(12, 19) * torch.logspace(-2, 1, 12)[:, None]).to(dtype)
    indices = torch.tensor([[1, 5, 5, 0], [11, 5, 10, 1]])
    unused = [i for i in range(12) if i not in indices]
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    near = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=1e-6)
    for norm_type in (2.0, 1.0, 3.0, 0.5, math.inf):
        whole = torch.nn.Parameter(table.clone())
        version = whole._version
        output = getattr(functional, name)(indices, whole, max_norm=1.5, norm_type=norm_type)
        norms = torch.linalg.vector_norm(table.double(), norm_type, dim=1, keepdim=True)
        want = torch.where(norms > 1.5, table.double() * 1.5 / (norms + 1e-7), table.double())
        want[unused] = table[unused].double()
        near(whole.detach().double(), want)
        assert torch.equal(whole[unused].detach(), table[unused]) and whole._version == version + 1
        looked_up = whole.detach()[indices].double()
        near(output.detach().double(), looked_up.mean(1) if name == "embedding_bag" else looked_up)


@pytest.mark.parametrize("name", ["embedding_bag", "embedding"])
def test_max_norm_matches_torch(name: str) -> None:
    for norm_type in (2.0, 1.0, math.inf):
        tables = [torch.randn(9, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for _ in "ab"]
        indices = torch.randint(0, 9, (4, 3))
        outputs = [
            getattr(f, name)(indices, t, max_norm=1.0, norm_type=norm_type)
            for f, t in zip((functional, torch.nn.functional), tables)
        ]
        torch.testing.assert_close(tables[0], tables[1], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-13, atol=1e-13)


def test_max_norm_of_a_view() -> None:
    whole = torch.full((9, 20), 5.0)
    view, before = whole[:, 3:10], whole.clone()
    functional.embedding_bag(torch.tensor([[1, 4]]), view, max_norm=1.0)
    torch.testing.assert_close(view[[1, 4]].norm(dim=1), torch.ones(2))
    view[[1, 4]] = 5.0
    assert torch.equal(whole, before)


# ---- derivatives


def of_tensors(inputs: BagInputs) -> tuple[Callable, list[Tensor]]:
    """embedding_bag as a function of its differentiable inputs, and these inputs."""
    tensors = [inputs.weight] if inputs.weights is None else [inputs.weight, inputs.weights]

    def function(weight: Tensor, *weights: Tensor) -> Tensor:
        more = {"per_sample_weights": weights[0]} if weights else {}
        return functional.embedding_bag(inputs.indices, weight, **inputs.keywords(), **more)

    return function, [t.detach().requires_grad_() for t in tensors]


@modes
@tiny_cases
def test_gradcheck(case: BagCase, mode: str, isa: str) -> None:
    function, tensors = of_tensors(make_bag_inputs(case, torch.float64, mode))
    assert torch.autograd.gradcheck(function, tensors)


@modes
@tiny_cases
def test_gradgradcheck(case: BagCase, mode: str) -> None:
    function, tensors = of_tensors(make_bag_inputs(case, torch.float64, mode))
    assert torch.autograd.gradgradcheck(function, tensors)


@modes
@tiny_cases
def test_gradcheck_forward_mode(case: BagCase, mode: str) -> None:
    function, tensors = of_tensors(make_bag_inputs(case, torch.float64, mode))
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, check_backward_ad=False)


@modes
@pytest.mark.parametrize("case", [c for c in BAG_CASES if c.weights and c.N and c.D], ids=str)
def test_gradient_penalty_matches_the_definition(case: BagCase, mode: str) -> None:
    """The gradient of the norm of the first gradient, for the table, the weights and the upstream gradient."""

    def penalty(embedding_bag: Callable) -> dict[str, Tensor]:
        inputs = make_bag_inputs(case, torch.float64, mode).map(lambda t: t.detach().requires_grad_())
        keywords = inputs.keywords()
        output = embedding_bag(inputs.indices, inputs.weight, per_sample_weights=inputs.weights, **keywords)
        wanted = [inputs.weight, inputs.weights]
        first = torch.autograd.grad(output, wanted, inputs.dout, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        twice = torch.autograd.grad(loss, [*wanted, inputs.dout], allow_unused=True, materialize_grads=True)
        return dict(zip(("weight", "weights", "dout"), twice))

    got, want = penalty(functional.embedding_bag), penalty(reference.embedding_bag)
    for name, w in want.items():
        torch.testing.assert_close(got[name], w, rtol=1e-11, atol=1e-12)


def test_backward_twice_with_retain_graph() -> None:
    inputs = make_bag_inputs(BAG_CASES[0], torch.float32, "max")
    table = inputs.weight.requires_grad_()
    output = functional.embedding_bag(inputs.indices, table, **inputs.keywords())
    (first,) = torch.autograd.grad(output, table, inputs.dout, retain_graph=True)
    (second,) = torch.autograd.grad(output, table, inputs.dout)
    assert torch.equal(first, second)


@modes
def test_in_place_change_of_a_saved_table_raises(mode: str) -> None:
    inputs = make_bag_inputs(BAG_TINY[1], torch.float32, mode).map(lambda t: t.detach().requires_grad_())
    output = functional.embedding_bag(
        inputs.indices, inputs.weight, per_sample_weights=inputs.weights, **inputs.keywords()
    )
    with torch.no_grad():
        inputs.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_table_and_weights_that_are_not_leaves() -> None:
    """A computed table, and weights computed from it."""
    base = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([[0, 1, 4], [2, 2, 3]])

    def loss(embedding_bag: Callable) -> Tensor:
        table = base.sin()
        weights = table[indices].mean(-1)
        return embedding_bag(indices, table, mode="max", per_sample_weights=weights).square().sum()

    got, want = (torch.autograd.grad(loss(f), base)[0] for f in (functional.embedding_bag, reference.embedding_bag))
    torch.testing.assert_close(got, want)


# ---- the ops


def op_inputs(case: BagCase, mode: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Arguments of each op of one table."""
    inputs = make_bag_inputs(case, dtype, mode)
    bags = inputs.op_arguments()
    _, arg = ops.embedding_bag_forward(inputs.weight, *bags)
    back = inputs.dout, arg, case.E, *bags, case.scale_grad_by_freq
    update = inputs.dout, arg, *bags, case.scale_grad_by_freq
    wide = torch.promote_types(dtype, torch.float32)
    state, moment = torch.ones(case.E, dtype=wide), torch.ones(case.E, case.D, dtype=wide)
    found = {
        "embedding_bag": (inputs.weight, *bags),
        "embedding_bag_forward": (inputs.weight, *bags),
        "embedding_bag_backward": back,
        "embedding_bag_backward_sparse": back,
        "embedding_bag_update_": (inputs.weight.clone(), None, None, 0, [0.1], *update),
        "embedding_bag_update_ adagrad": (inputs.weight.clone(), moment.clone(), None, 1, [0.1, 1e-10], *update),
        "embedding_bag_update_ rowwise": (inputs.weight.clone(), state.clone(), None, 2, [0.1, 1e-10], *update),
        "embedding_bag_update_ adam": (
            inputs.weight.clone(), moment.clone(), moment.clone(), 3, [0.1, 0.9, 0.99, 1e-8, 1.0], *update,
        ),
        "embedding_bag_renorm_": (inputs.weight.clone(), inputs.indices, 1.0, 2.0),
        "embedding_bag_pack_bytes": (inputs.weight.float(),),
        "embedding_bag_bytes": (ops.embedding_bag_pack_bytes(inputs.weight.float()), *bags),
    }  # fmt: skip
    if inputs.weights is not None:
        found["embedding_bag_backward_weights"] = inputs.dout, arg, inputs.weight, *bags
    return found


OP_CASES = [
    BagCase(E=7, D=5, lengths=(2, 0, 3, 1), why="offsets"),
    BagCase(E=7, D=5, lengths=(3, 3), form="2-D", weights="same", padding_idx=2, why="2-D"),
    BagCase(E=7, D=5, lengths=(2, 4), form="last", trailing=1, weights="same", scale_grad_by_freq=True, why="last"),
]
OPS = [
    "embedding_bag",
    "embedding_bag_forward",
    "embedding_bag_backward",
    "embedding_bag_backward_sparse",
    "embedding_bag_backward_weights",
    "embedding_bag_update_",
    "embedding_bag_update_ adagrad",
    "embedding_bag_update_ rowwise",
    "embedding_bag_update_ adam",
    "embedding_bag_renorm_",
    "embedding_bag_pack_bytes",
    "embedding_bag_bytes",
]


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("case", OP_CASES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, case: BagCase, mode: str) -> None:
    arguments = op_inputs(case, mode).get(name)
    if arguments is None:
        return  # no weights
    op = getattr(ops, name.split()[0]).default
    if name == "embedding_bag_forward":
        arguments = (arguments[0].requires_grad_(), *arguments[1:])
        torch.library.opcheck(op, arguments)
    else:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@cases
def test_inference_matches_training(case: BagCase, isa: str) -> None:
    for mode, dtype in itertools.product(BAG_MODES, DTYPES):
        inputs = make_bag_inputs(case, dtype, mode)
        arguments = inputs.weight, *inputs.op_arguments()
        output, arg = ops.embedding_bag_forward(*arguments)
        same_bits({"output": ops.embedding_bag(*arguments)}, {"output": output})
        assert arg.dtype == torch.int32
        assert arg.shape == ((case.B, case.D) if mode in ("max", "min") else (0,))


# ---- equal bits

THREADED = [
    BagCase(E=300, D=16, lengths=bag_lengths(300, 30), weights="same", why="many bags"),
    BagCase(E=2000, D=65, lengths=(25,) * 80, form="2-D", padding_idx=7, why="most rows occur once or twice"),
    BagCase(E=50, D=8, lengths=(1, 9000, 0, 3, 2100), weights="same", why="long bags, and each row is frequent"),
    BagCase(E=3, D=300, lengths=bag_lengths(40, 40), weights="same", rows="few", why="three rows"),
    BagCase(E=1000, D=1, lengths=bag_lengths(12000, 6), weights="same", why="one column"),
    BagCase(E=1, D=33, lengths=(9,) * 900, form="2-D", why="one row in all positions"),
]
threaded_cases = pytest.mark.parametrize("case", THREADED, ids=str)
THREADS = (1, 2, 3, 5)


def with_threads(call: Callable[[], dict[str, Tensor]]) -> None:
    """Asserts the same bits for different numbers of threads."""
    results = []
    for n in THREADS:
        torch.set_num_threads(n)
        results.append(call())
    for other in results[1:]:
        same_bits(other, results[0])


def both_gradients(inputs: BagInputs) -> dict[str, Tensor]:
    sparse = run(inputs, sparse=True)["dweight"]
    return run(inputs) | {"rows": sparse.indices(), "values": sparse.values()}


@threaded_cases
def test_bits_are_independent_of_the_number_of_threads(case: BagCase, isa: str) -> None:
    for mode in ("mean", "max"):
        inputs = make_bag_inputs(case, torch.float32, mode)
        with_threads(lambda inputs=inputs: both_gradients(inputs))


@threaded_cases
def test_bits_are_independent_of_the_number_of_threads_in_each_mode_and_dtype(case: BagCase) -> None:
    for mode, dtype in itertools.product(("sum", "min"), (torch.float64, torch.bfloat16, torch.float16)):
        inputs = make_bag_inputs(case, dtype, mode)
        with_threads(lambda inputs=inputs: both_gradients(inputs))


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("case", THREADED[:4], ids=str)
def test_updates_are_independent_of_the_number_of_threads(case: BagCase, mode: str) -> None:
    def steps() -> dict[str, Tensor]:
        found = {}
        for name, arguments in op_inputs(dataclasses.replace(case, scale_grad_by_freq=True), mode).items():
            if name.startswith("embedding_bag_update_"):
                ops.embedding_bag_update_(*arguments)
                found |= {f"{name} {i}": t for i, t in enumerate(arguments[:3]) if t is not None}
        return found

    with_threads(steps)


@dtypes
@modes
def test_bits_of_a_bag_are_independent_of_the_batch(mode: str, dtype: torch.dtype, isa: str) -> None:
    for case in BAG_CASES[:1] + [c for c in BAG_CASES if c.B > 5 and c.form != "2-D"]:
        compare_single_bags_with_batch(
            make_bag_inputs(dataclasses.replace(case, scale_grad_by_freq=False), dtype, mode)
        )


def compare_single_bags_with_batch(inputs: BagInputs) -> None:
    whole = run(inputs)
    for b, (begin, end) in list(enumerate(inputs.bounds()))[:12]:
        weights = None if inputs.weights is None else inputs.weights[begin:end]
        one = dataclasses.replace(
            inputs, case=dataclasses.replace(inputs.case, form="offsets", trailing=0, lengths=(end - begin,)),
            indices=inputs.indices[begin:end], offsets=torch.tensor([0]), weights=weights, dout=inputs.dout[b : b + 1],
        )  # fmt: skip
        alone = run(one)
        here = {"output": whole["output"][b : b + 1]}
        here |= {} if weights is None else {"dweights": whole["dweights"][begin:end]}
        alone.pop("dweight")
        same_bits(alone, here)


@modes
def test_bits_of_a_long_bag_are_independent_of_the_batch(mode: str, isa: str) -> None:
    """The position of the bag in the batch, and the assignment to threads, have no effect."""
    table, rows = torch.randn(500, 24), torch.randint(0, 500, (30000,))
    alone = functional.embedding_bag(rows, table, torch.tensor([0]), mode=mode)[0]
    for before, after in [([3, 0, 7], [2]), ([5000], [9000, 1]), ([1] * 40, [])]:
        lengths = [*before, len(rows), *after]
        other = torch.randint(0, 500, (sum(lengths),))
        other[sum(before) : sum(before) + len(rows)] = rows
        offsets = torch.tensor([0, *itertools.accumulate(lengths[:-1])])
        assert torch.equal(functional.embedding_bag(other, table, offsets, mode=mode)[len(before)], alone)


@dtypes
@modes
def test_bits_are_independent_of_padding(mode: str, dtype: torch.dtype, isa: str) -> None:
    """Bags with and without padding have the same outputs and gradients."""
    for D in (5, 16, 100):
        case = BagCase(E=9, D=D, lengths=(4, 0, 7, 1), weights="same", padding_idx=8, why="without")
        inputs = make_bag_inputs(case, dtype, mode)
        inputs.indices = inputs.indices.clamp(max=7)
        want = run(inputs)
        rows, weights, kept, lengths = [], [], [], []
        for begin, end in inputs.bounds():
            lengths.append(0)
            for k in range(begin, end + 1):
                padding = (3 * k + begin) % 4
                rows += [8] * padding
                weights += [math.nan] * padding
                if k < end:
                    kept.append(len(rows))
                    rows.append(int(inputs.indices[k]))
                    weights.append(float(inputs.weights[k]))
                lengths[-1] += padding + (k < end)
        padded = dataclasses.replace(
            inputs, case=dataclasses.replace(case, lengths=tuple(lengths)), indices=torch.tensor(rows),
            weights=torch.tensor(weights, dtype=dtype), offsets=torch.tensor([0, *itertools.accumulate(lengths[:-1])]),
        )  # fmt: skip
        got = run(padded)
        assert not got["dweights"][[k for k in range(len(rows)) if k not in kept]].any()
        same_bits(got | {"dweights": got["dweights"][kept]}, want)


@dtypes
@modes
def test_all_forms_of_input_have_the_same_bits(mode: str, dtype: torch.dtype, isa: str) -> None:
    for weights in ("", "same"):
        case = BagCase(E=13, D=21, lengths=(6,) * 7, form="2-D", weights=weights, padding_idx=4, why="2-D")
        inputs = make_bag_inputs(case, dtype, mode)
        want = {n: t.flatten() for n, t in run(inputs).items()}
        for form, offsets in (("offsets", torch.arange(0, 42, 6)), ("last", torch.arange(0, 43, 6))):
            flat = dataclasses.replace(
                inputs, case=dataclasses.replace(case, form=form), indices=inputs.indices.flatten(), offsets=offsets,
                weights=None if inputs.weights is None else inputs.weights.flatten(),
            )  # fmt: skip
            same_bits({n: t.flatten() for n, t in run(flat).items()}, want)
        behind = torch.tensor([0, 5, 99])  # indices beyond the last offset are ignored, even if they are out of range
        if not weights:
            longer = dataclasses.replace(flat, indices=torch.cat([flat.indices, behind]))
            same_bits({n: t.flatten() for n, t in run(longer).items()}, want)


@dtypes
def test_a_bag_of_one_index_matches_embedding(dtype: torch.dtype, isa: str) -> None:
    table, rows = torch.randn(9, 37).to(dtype), torch.randint(0, 9, (50,))
    for mode in BAG_MODES:
        assert torch.equal(functional.embedding_bag(rows[:, None], table, mode=mode), table[rows])
    assert torch.equal(functional.embedding(rows, table), table[rows])


@threaded_cases
def test_repeated_runs_have_the_same_bits(case: BagCase) -> None:
    for dtype in DTYPES:
        inputs = make_bag_inputs(case, dtype, "mean")
        first = run(inputs)
        moved = inputs.map(lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape))
        same_bits(run(moved), first)


@dtypes
@modes
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_fused_sgd_matches_a_step_with_the_gradient(sparse: bool, mode: str, dtype: torch.dtype, isa: str) -> None:
    """SGD: table - lr * gradient, rounded once."""
    inputs = make_bag_inputs(BagCase(E=40, D=19, lengths=bag_lengths(30, 9), weights="same", why="step"), dtype, mode)
    want = bag_definition(inputs)["dweight"] * -0.3 + inputs.weight.double()
    stepped = inputs.weight.clone()
    bags = inputs.op_arguments()
    _, arg = ops.embedding_bag_forward(inputs.weight, *bags)
    ops.embedding_bag_update_(stepped, None, None, 0, [0.3], inputs.dout, arg, *bags)
    assert_bag_near({"dweight": stepped}, {"dweight": want}, inputs)
    if dtype in (torch.float32, torch.float64):  # no intermediate rounding
        gradient = run(inputs, sparse=sparse)["dweight"].to_dense()
        ulp = torch.finfo(dtype).eps * inputs.weight.abs()
        assert (
            (stepped - (inputs.weight - 0.3 * gradient)).abs() <= ulp + 0.3 * torch.finfo(dtype).eps * gradient.abs()
        ).all()
    untouched = [e for e in range(40) if e not in inputs.indices]
    assert torch.equal(stepped[untouched], inputs.weight[untouched])


def test_concurrent_calls() -> None:
    every = [make_bag_inputs(c, torch.float32, m, seed=s) for c in THREADED[:3] for m in BAG_MODES for s in range(2)]
    want = [run(inputs) for inputs in every]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got, expected in zip(pool.map(run, every * 2), want * 2, strict=True):
            same_bits(got, expected)


# ---- memory


def spread(t: Tensor) -> Tensor:
    """The same values as a view with stride 2 in each dimension of a tensor filled with NaN."""
    whole = t.new_full([2 * n + 1 for n in t.shape], math.nan if t.is_floating_point() else 2**30)
    view = whole[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def turned(t: Tensor) -> Tensor:
    """The same values with the dimensions in reverse order in memory."""
    return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))


def wider(t: Tensor) -> Tensor:
    """The same values as the first columns of a wider tensor."""
    whole = t.new_full((*t.shape[:-1], t.shape[-1] + 7), math.nan if t.is_floating_point() else 2**30)
    whole[..., : t.shape[-1]] = t
    return whole[..., : t.shape[-1]]


def expanded(t: Tensor) -> Tensor:
    """The first entry of the first dimension, expanded with stride 0."""
    return t[:1].expand_as(t)


def negated(t: Tensor) -> Tensor:
    """The same values with the negative bit (lazy negation) set."""
    return torch._neg_view(-t) if t.is_floating_point() else t


LAYOUTS = [spread, turned, wider, expanded, negated]
LAID_OUT = [
    BagCase(E=12, D=33, lengths=bag_lengths(6, 7), weights="same", padding_idx=4, why="offsets"),
    BagCase(E=12, D=16, lengths=(5,) * 4, form="2-D", weights="same", why="2-D"),
    BagCase(E=12, D=1, lengths=bag_lengths(6, 7), form="last", weights="wide", index=torch.int32, why="one column"),
]


@dtypes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("case", LAID_OUT, ids=str)
def test_strides(case: BagCase, layout: Callable, dtype: torch.dtype, isa: str) -> None:
    """Strides of the table, the weights, the upstream gradient, the indices and the offsets."""
    for mode in BAG_MODES:
        inputs = make_bag_inputs(case, dtype, mode)
        if layout is expanded:
            inputs = inputs.map(lambda t: expanded(t).contiguous())
        strided = inputs.map(layout)
        if layout is not expanded:
            strided.indices = layout(inputs.indices)
            strided.offsets = None if inputs.offsets is None else layout(inputs.offsets)
        want = run(inputs)
        same_bits(run(strided), want)
        same_bits(densely(run(strided, sparse=True)), want)


def test_expanded_upstream_gradient() -> None:
    """.sum().backward() passes a gradient with strides of 0 in both dimensions."""
    for mode in BAG_MODES:
        inputs = make_bag_inputs(LAID_OUT[0], torch.float32, mode)
        inputs.dout = torch.ones(()).expand_as(inputs.dout)
        got = run(inputs)
        inputs.dout = inputs.dout.contiguous()
        same_bits(got, run(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=named)
@modes
@pytest.mark.parametrize("offset", [1, 3])
def test_unaligned_inputs_between_sentinels(offset: int, mode: str, dtype: torch.dtype, isa: str) -> None:
    """Inputs with an unaligned start, surrounded by sentinels, which remain unchanged."""
    inputs = make_bag_inputs(LAID_OUT[0], dtype, mode)
    want = run(inputs)
    kept: list[tuple[Tensor, Tensor]] = []

    def guarded(t: Tensor) -> Tensor:
        whole = torch.full((offset + t.numel() + 64,), 777, dtype=t.dtype)
        view = whole[offset : offset + t.numel()].view(t.shape)
        view.copy_(t)
        kept.append((whole, whole.clone()))
        return view

    inside = inputs.map(guarded)
    inside.indices, inside.offsets = guarded(inputs.indices), guarded(inputs.offsets)
    same_bits(run(inside), want)
    assert len(kept) == 5 and all(torch.equal(now, before) for now, before in kept)


@dtypes
@pytest.mark.parametrize("layout", ["rows", "columns", "offset"])
def test_update_of_a_view(layout: str, dtype: torch.dtype, isa: str) -> None:
    """A strided table surrounded by sentinels: the same step as for a contiguous table, and no other writes."""
    case = BagCase(E=9, D=21, lengths=(4, 0, 7), weights="same", why="update")
    tidy, odd = (op_inputs(case, "sum", dtype) for _ in "ab")
    for name in (n for n in tidy if n.startswith("embedding_bag_update_")):
        whole = torch.full((2 * case.E + 1, case.D + 20) if layout == "rows" else (case.D + 2, 40), 777, dtype=dtype)
        view = {
            "rows": lambda: whole[1::2][: case.E, 5 : 5 + case.D],  # noqa: B023
            "columns": lambda: whole[1:-1, 3 : 3 + 2 * case.E : 2].t(),  # noqa: B023
            "offset": lambda: whole.flatten()[11 : 11 + case.E * case.D].view(case.E, case.D),  # noqa: B023
        }[layout]()
        view.copy_(odd[name][0])
        ops.embedding_bag_update_(*tidy[name])
        ops.embedding_bag_update_(view, *odd[name][1:])
        same_bits({"table": view}, {"table": tidy[name][0]})
        view.fill_(777)
        assert (whole == 777).all()


@cases
def test_inputs_are_not_modified(case: BagCase) -> None:
    for mode in BAG_MODES:
        inputs = make_bag_inputs(case, torch.float32, mode)
        every = [inputs.weight, inputs.indices, inputs.offsets, inputs.weights, inputs.dout]
        before = [(t, t.clone(), t._version) for t in every if t is not None]
        run(inputs)
        run(inputs, sparse=True)
        assert all(torch.equal(t, copy) and t._version == version for t, copy, version in before)


def test_outputs_do_not_alias_inputs() -> None:
    for mode, case in itertools.product(BAG_MODES, (BAG_CASES[0], BAG_CASES[14])):
        inputs = make_bag_inputs(case, torch.float32, mode)
        results = run(inputs, sparse=True)
        results |= {"rows": results["dweight"].indices(), "dweight": results["dweight"].values()}
        every = [*results.values(), inputs.weight, inputs.indices, inputs.offsets, inputs.dout]
        addresses = [t.untyped_storage().data_ptr() for t in every if t is not None and t.numel()]
        assert len(set(addresses)) == len(addresses)


def test_no_memory_leaks() -> None:
    inputs = make_bag_inputs(THREADED[0], torch.float32, "max")

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    run(inputs)
    before = alive()
    for _ in range(3):
        run(inputs)
        run(inputs, sparse=True)
    assert alive() <= before


# ---- sizes beyond 32 bits, of which few pages are touched

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
needs_proc = pytest.mark.skipif(
    not CLEAR.exists(), reason="no /proc/self/clear_refs, which is required to measure peak memory"
)


def peak_of(call: Callable[[], object]) -> int:
    """Maximum increase of the resident memory of this process, in bytes."""

    def field(name: str) -> int:
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    CLEAR.write_text("5")
    before = field("VmRSS")
    call()
    return field("VmHWM") - before


def untouched(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros whose pages the system allocates at the first write."""
    integer = {8: np.int64, 4: np.int32, 2: np.int16, 1: np.uint8}[dtype.itemsize]
    try:
        return torch.from_numpy(np.zeros(shape, integer)).view(dtype)
    except MemoryError:
        pytest.skip(f"the system cannot reserve {math.prod(shape) * dtype.itemsize / 2**30:.1f} GiB")


LIMIT = 200 * 2**20


@needs_proc
@modes
@pytest.mark.parametrize("layout", ["contiguous", "wide rows", "columns"])
def test_a_table_beyond_32_bits(layout: str, mode: str, raw_memory: None) -> None:
    """Forward, sparse gradient and a step, with rows on both sides of 2^31 elements and without a copy of the table."""
    if layout == "columns":
        E, D = 2**27 + 9, 17
        table = untouched(D, E, dtype=torch.float16).t()
    elif layout == "wide rows":
        E, D = 2**20 + 9, 20
        table = untouched(E, 2048 + 5, dtype=torch.float16)[:, 3 : 3 + D]
    else:
        E, D = 2**26 + 9, 33
        table = untouched(E, D, dtype=torch.float16)
    assert (E - 1) * table.stride(0) + (D - 1) * table.stride(1) > 2**31
    rows = torch.tensor([E - 1, 0, E // 2, E - 1, E - 3, 5])
    distinct = rows.unique()
    small = torch.randn(len(distinct), D).half()
    table[distinct] = small
    mapped = torch.searchsorted(distinct, rows)
    offsets = torch.tensor([0, 4])
    results = {}

    def whole() -> None:
        for name, t, indices in (("table", table, rows), ("small", small.clone(), mapped)):
            output, arg = ops.embedding_bag_forward(t, indices, offsets, None, BAG_MODES.index(mode))
            bags = indices, offsets, None, BAG_MODES.index(mode)
            at, values = ops.embedding_bag_backward_sparse(output, arg, len(t), *bags)
            ops.embedding_bag_update_(t, None, None, 0, [0.5], output, arg, *bags)
            results[name] = output, at, values, t[distinct if name == "table" else slice(None)]

    assert peak_of(whole) < LIMIT
    (output, at, values, after), (output_, at_, values_, after_) = results["table"], results["small"]
    assert torch.equal(output, output_) and torch.equal(values, values_) and torch.equal(after, after_)
    assert torch.equal(at, distinct[at_])


@modes
def test_more_rows_than_32_bit_numbers(mode: str) -> None:
    """An expanded row with stride 0; rows that differ only in the upper bits have separate gradients."""
    E, row = 2**33 + 7, torch.randn(1, 5)
    rows = torch.tensor([1, 2**32 + 1, 2**33 + 6, 1, 2**31, 2**32 + 1, 2**33 + 6])
    bags = rows, torch.tensor([0, 2, 5]), None, BAG_MODES.index(mode)
    output, arg = ops.embedding_bag_forward(row.expand(E, 5), *bags)
    at, values = ops.embedding_bag_backward_sparse(torch.ones(3, 5), arg, E, *bags)
    small = torch.searchsorted(rows.unique(), rows)
    bags = small, *bags[1:]
    expected, arg = ops.embedding_bag_forward(row.expand(9, 5), *bags)
    assert torch.equal(output, expected)
    at_, values_ = ops.embedding_bag_backward_sparse(torch.ones(3, 5), arg, 9, *bags)
    assert torch.equal(at, rows.unique()[at_]) and torch.equal(values, values_)
    with pytest.raises(RuntimeError, match=f"must hold indices .* got {E} at position 2"):
        ops.embedding_bag_forward(row.expand(E, 5), rows + 1, *bags[1:])


@needs_proc
def test_quantised_rows_beyond_32_bits(raw_memory: None) -> None:
    E, D = 2**25, 60
    packed = untouched(E, D + 8, dtype=torch.uint8)
    assert packed.numel() > 2**31
    rows = torch.tensor([[E - 1, 0], [E - 2, E - 1]])
    table = torch.randn(3, D)
    packed[[0, E - 2, E - 1]] = ops.embedding_bag_pack_bytes(table)
    found: list[Tensor] = []
    assert peak_of(lambda: found.append(ops.embedding_bag_bytes(packed, rows, None, None, 0))) < LIMIT
    assert torch.equal(
        found[0], ops.embedding_bag_bytes(packed[[0, E - 2, E - 1]], torch.tensor([[2, 0], [1, 2]]), None, None, 0)
    )


@needs_proc
@dtypes
def test_strided_table_is_not_copied(dtype: torch.dtype, raw_memory: None) -> None:
    """A call only allocates its output, also with padding, with weights and in float64."""
    E, D = 2**21, 64
    table = untouched(E, 2 * D, dtype=dtype)[:, :D]
    rows, weights = torch.randint(0, E, (40, 5)), torch.randn(40, 5).to(dtype)

    def forward() -> None:
        for mode in BAG_MODES:
            functional.embedding_bag(rows, table, mode=mode)
            functional.embedding_bag(rows, table, mode=mode, per_sample_weights=weights, padding_idx=3)

    assert table.numel() * dtype.itemsize >= 2**28
    assert peak_of(forward) < 2**26
