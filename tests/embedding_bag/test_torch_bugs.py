"""Wrong results, errors and crashes of EmbeddingBag in torch 2.13, and the results of seqkernels against a definition.

The result of torch is asserted if it is the same on all processors; otherwise a comment describes it.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from seqkernels import functional
from support.cases import BAG_MODES, DTYPES, BagCase, assert_bag_near, bag_definition, make_bag_inputs, run_bag

theirs = torch.nn.functional.embedding_bag
ours = functional.embedding_bag
MEASURED = torch.__version__.startswith("2.13.")  # results of other releases are not asserted
known = pytest.mark.skipif(not MEASURED, reason="the results of torch are only known for 2.13")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", BAG_MODES)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def gradient(function, table: Tensor, *arguments, **keywords) -> Tensor:
    table = table.detach().clone().requires_grad_()
    function(arguments[0], table, *arguments[1:], **keywords).sum().backward()
    return table.grad.to_dense()


# ---- wrong gradients


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq_divides_by_the_count_of_the_row(mode: str) -> None:
    """pytorch#190063: torch divides by the count of another row, whose number is the position in the unique rows."""
    table, rows, offsets = torch.zeros(10, 2, dtype=torch.float64), torch.tensor([7, 3, 7, 7, 9]), torch.tensor([0, 5])
    keywords = dict(mode=mode, scale_grad_by_freq=True)
    want = torch.zeros(10, 2, dtype=torch.float64)
    want[[3, 7, 9]] = 1.0 if mode == "sum" else 0.2
    torch.testing.assert_close(gradient(ours, table, rows, offsets, **keywords), want)
    if MEASURED:
        assert (gradient(theirs, table, rows, offsets, **keywords) - want).abs().max() > 0.1


@dtypes
@modes
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_scale_grad_by_freq_where_torch_raises(sparse: bool, mode: str, dtype: torch.dtype) -> None:
    """pytorch#189720: torch supports neither sparse nor max."""
    case = BagCase(E=9, D=4, lengths=(5, 0, 8), rows="few", scale_grad_by_freq=True, why="unequal counts")
    inputs = make_bag_inputs(case, dtype, mode)
    assert_bag_near(run_bag(ours, inputs, sparse=sparse), bag_definition(inputs), inputs)
    if mode == "max":
        with pytest.raises(ValueError, match="max mode does not support scaling"):
            theirs(inputs.indices, inputs.weight, inputs.offsets, mode="max", scale_grad_by_freq=True)
    elif sparse and mode != "min":
        table = inputs.weight.clone().requires_grad_()
        out = theirs(inputs.indices, table, inputs.offsets, mode=mode, scale_grad_by_freq=True, sparse=True)
        with pytest.raises(RuntimeError, match="not supported with sparse"):
            out.sum().backward()


@halves
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_half_gradients_do_not_saturate(sparse: bool, dtype: torch.dtype) -> None:
    """4096 ones: torch accumulates in the half type, which saturates at 256 in bfloat16 and 2048 in float16."""
    table, rows = torch.zeros(3, 4, dtype=dtype), torch.ones(64, 64, dtype=torch.int64)
    keywords = dict(mode="sum", sparse=sparse)
    assert (gradient(ours, table, rows, **keywords)[1] == 4096).all()
    if MEASURED:
        saturated = 256 if dtype == torch.bfloat16 else 2048
        assert (gradient(theirs, table, rows, **keywords)[1] == saturated).all()


@halves
def test_error_of_a_skewed_half_gradient(dtype: torch.dtype) -> None:
    """Most of 20,000 lookups read one row: torch loses most of its gradient; seqkernels rounds once."""
    case = BagCase(E=400, D=16, lengths=(20,) * 1000, why="skewed")
    inputs = make_bag_inputs(case, dtype, "sum")
    inputs.indices = (400 * torch.rand(case.N).pow(12)).long()
    inputs.dout = (inputs.dout.abs() + 0.5).to(dtype)
    want = bag_definition(inputs)["dweight"]

    def error(gradient: Tensor) -> float:
        return ((gradient.double() - want).norm() / want.norm()).item()

    assert error(run_bag(ours, inputs)["dweight"]) < torch.finfo(dtype).eps
    if MEASURED:

        def torchs(*arguments, weight_norm: str, **keywords) -> Tensor:
            return theirs(*arguments, **keywords)

        assert error(run_bag(torchs, inputs)["dweight"]) > 0.3


# ---- the last offset

LAST = dict(include_last_offset=True)


@dtypes
@modes
def test_indices_beyond_the_last_offset_are_ignored_in_each_mode(mode: str, dtype: torch.dtype) -> None:
    """pytorch#191965: torch excludes trailing indices from a float32 sum, includes them in float64, counts them in
    the divisor of a mean, and includes them in a maximum. For [1, 1, 2], 1 and 3 it returns 4.0, 0.8 and 4.0; correct
    are 4, 4/3 and 2."""
    table = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]], dtype=dtype)
    rows, offsets = torch.tensor([1, 1, 2, 3, 4]), torch.tensor([0, 3])
    want = torch.tensor([[{"sum": 4.0, "mean": 4 / 3, "max": 2.0, "min": 1.0}[mode]]]).to(dtype)
    torch.testing.assert_close(ours(rows, table, offsets, mode=mode, **LAST), want)
    assert not gradient(ours, table, rows, offsets, mode=mode, **LAST)[3:].any()
    if MEASURED and mode in ("mean", "max"):
        assert (theirs(rows, table, offsets, mode=mode, **LAST) - want).abs() > 0.3


def test_sum_of_torch_beyond_the_last_offset_depends_on_the_dtype() -> None:
    case = BagCase(E=11, D=6, lengths=(4, 1, 0, 2), form="last", trailing=3, weights="same", why="trailing")
    for dtype in (torch.float32, torch.float64):
        inputs = make_bag_inputs(case, dtype, "sum")
        got = run_bag(ours, inputs)
        assert_bag_near(got, bag_definition(inputs), inputs)
        assert not got["dweights"][7:].any()  # torch has a gradient for them in float64


@modes
def test_indices_beyond_the_last_offset_without_bags(mode: str) -> None:
    """Offsets [0] and trailing indices: the float64 sum of torch reads out of bounds and crashes."""
    table = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    out = ours(torch.tensor([1, 2, 3]), table, torch.tensor([0]), mode=mode, **LAST)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert not table.grad.any()


@modes
def test_include_last_offset_with_2d_input(mode: str) -> None:
    """pytorch#168159, a bug of earlier releases."""
    table, rows = torch.randn(5, 4), torch.randint(0, 5, (3, 2))
    assert torch.equal(ours(rows, table, mode=mode, **LAST), ours(rows, table, mode=mode))


# ---- invalid offsets and indices


@dtypes
@modes
@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, -1, 3], [0, 3, -2], [0, 4, 2, 4]], ids=str)
def test_decreasing_offsets_raise(offsets: list[int], mode: str, dtype: torch.dtype) -> None:
    """pytorch#175368, #193095: the maximum of torch returns a result for the first, and reads before the buffer for the
    second; other modes read out of bounds or crash."""
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        ours(torch.arange(5), torch.randn(5, 4).to(dtype), torch.tensor(offsets), mode=mode)


@known
def test_maximum_of_torch_accepts_decreasing_offsets() -> None:
    assert theirs(torch.arange(5), torch.ones(5, 4), torch.tensor([0, 5, 3]), mode="max").shape == (3, 4)


@modes
@pytest.mark.parametrize("bad", [-1, 5])
def test_error_names_the_index(bad: int, mode: str) -> None:
    """pytorch#66750, #89362: "Expected i < index_size to be true, but got false"."""
    with pytest.raises((ValueError, RuntimeError), match=f"got.*{bad}"):
        ours(torch.tensor([[0, bad]]), torch.ones(5, 4), mode=mode)


@modes
def test_2d_input_of_empty_bags(mode: str) -> None:
    """torch raises "step must be nonzero"."""
    nothing, table = torch.zeros(3, 0, dtype=torch.int64), torch.randn(5, 4, requires_grad=True)
    out = ours(nothing, table, mode=mode)
    assert out.tolist() == [[0.0] * 4] * 3
    out.sum().backward()
    assert not table.grad.any()
    if mode != "min" and MEASURED:
        with pytest.raises(RuntimeError, match="step must be nonzero"):
            theirs(nothing, table, mode=mode)


@modes
def test_table_without_columns(mode: str) -> None:
    """The float32 sum of torch reports an index out of range."""
    out = ours(torch.tensor([[0, 1]]), torch.ones(3, 0), mode=mode, per_sample_weights=torch.ones(1, 2))
    assert out.shape == (1, 0)


# ---- maxima


@dtypes
@pytest.mark.parametrize("at", range(3))
def test_nan_is_selected_at_any_position(at: int, dtype: torch.dtype) -> None:
    """The maximum of torch returns a NaN only if it is the first; amax returns NaN at any position."""
    values = [1.0, 2.0, 3.0]
    values[at] = math.nan
    table, rows = torch.tensor(values, dtype=dtype)[:, None], torch.tensor([[0, 1, 2]])
    assert ours(rows, table, mode="max").isnan().all() and ours(rows, table, mode="min").isnan().all()
    grad = gradient(ours, table, rows, mode="max")
    assert grad.flatten().tolist() == [float(i == at) for i in range(3)]
    if MEASURED:
        assert theirs(rows, table, mode="max").isnan().all() == (at == 0)


@dtypes
def test_gradient_of_the_maximum_of_repeated_rows(dtype: torch.dtype) -> None:
    """FlagGems#5220: one position of a bag gets the whole gradient of a column."""
    table = torch.tensor([[1.0, 9.0, 2.0], [5.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=dtype)
    rows = torch.tensor([[0, 1, 0, 1], [1, 1, 2, 0]])
    want = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    assert torch.equal(gradient(ours, table, rows, mode="max"), want)


def test_sparse_gradient_of_the_maximum() -> None:
    """torch raises "max mode does not support sparse weights"."""
    table, rows = torch.randn(50, 4), torch.randint(0, 50, (6, 3))
    leaf = table.clone().requires_grad_()
    ours(rows, leaf, mode="max", sparse=True).sum().backward()
    assert leaf.grad.is_sparse and torch.equal(leaf.grad.to_dense(), gradient(theirs, table, rows, mode="max"))
    with pytest.raises(ValueError, match="max mode does not support sparse"):
        theirs(rows, leaf, mode="max", sparse=True)


# ---- weights


@dtypes
@modes
@pytest.mark.parametrize("norm", ["count", "weight"])
def test_weights_in_each_mode(norm: str, mode: str, dtype: torch.dtype) -> None:
    """pytorch#4068: torch supports weights in sums only."""
    case = BagCase(E=9, D=4, lengths=(5, 0, 8), weights="same", weight_norm=norm, padding_idx=2, why="weights")
    inputs = make_bag_inputs(case, dtype, mode)
    assert_bag_near(run_bag(ours, inputs), bag_definition(inputs), inputs)
    if mode in ("mean", "max"):
        with pytest.raises(NotImplementedError, match="only supported for mode='sum'"):
            theirs(inputs.indices, inputs.weight, inputs.offsets, mode=mode, per_sample_weights=inputs.weights)


@halves
@modes
def test_float32_weights_with_a_half_table(mode: str, dtype: torch.dtype) -> None:
    case = BagCase(E=9, D=4, lengths=(5, 0, 8), weights="wide", why="float32 weights")
    inputs = make_bag_inputs(case, dtype, mode)
    got = run_bag(ours, inputs)
    assert got["output"].dtype == got["dweight"].dtype == dtype and got["dweights"].dtype == torch.float32
    assert_bag_near(got, bag_definition(inputs), inputs)
    if mode == "sum":
        with pytest.raises(RuntimeError, match="have the same type"):
            theirs(inputs.indices, inputs.weight, inputs.offsets, mode=mode, per_sample_weights=inputs.weights)


# ---- gradients in other forms


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_sparse_gradient_is_coalesced(mode: str) -> None:
    """The sparse gradient of torch has a row per index and is not coalesced."""
    rows, found = torch.randint(0, 5, (30, 10)), []
    for function in (ours, theirs):
        leaf = torch.randn(5, 4).requires_grad_()
        found += torch.autograd.grad(function(rows, leaf, mode=mode, sparse=True).sum(), leaf)
    assert found[0].is_coalesced() and found[0]._nnz() == 5
    assert not found[1].is_coalesced() and found[1]._nnz() == 300
    torch.testing.assert_close(found[0].to_dense(), found[1].to_dense())


@modes
def test_second_derivatives_and_forward_mode(mode: str) -> None:
    """torch implements neither the derivative of _embedding_bag_backward nor forward AD."""
    rows = torch.tensor([[0, 1, 1], [4, 2, 0]])
    table = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def call(table: Tensor, weights: Tensor) -> Tensor:
        return ours(rows, table, mode=mode, per_sample_weights=weights)

    assert torch.autograd.gradgradcheck(call, (table, weights))
    assert torch.autograd.gradcheck(call, (table, weights), check_forward_ad=True)
    if mode == "sum":
        (first,) = torch.autograd.grad(theirs(rows, table.sin(), mode=mode).square().sum(), table, create_graph=True)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"not implemented|does not require grad"):
            first.square().sum().backward()
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(lambda t: theirs(rows, t, mode=mode), (table.detach(),), (table.detach(),))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@modes
def test_vmap_over_tables(mode: str) -> None:
    """torch falls back to a loop, with a warning."""
    tables, rows = torch.randn(3, 5, 4), torch.randint(0, 5, (2, 6))
    got = torch.vmap(lambda t: ours(rows, t, mode=mode))(tables)
    assert torch.equal(got, torch.stack([ours(rows, t, mode=mode) for t in tables]))


@modes
def test_offsets_and_indices_of_different_dtypes(mode: str) -> None:
    table, rows, offsets = torch.randn(5, 4), torch.tensor([0, 3, 2]), torch.tensor([0, 1])
    want = ours(rows, table, offsets, mode=mode)
    assert torch.equal(ours(rows.int(), table, offsets, mode=mode), want)
    assert torch.equal(ours(rows, table, offsets.int(), mode=mode), want)
