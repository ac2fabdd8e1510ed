"""What torch 2.13 gets wrong, refuses or ends the process at in EmbeddingBag, each against a definition in float64.

Torch's own result is asserted only where it is the same on every processor; elsewhere a comment says what it was.
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
MEASURED = torch.__version__.startswith("2.13.")  # of other releases torch's own results are not asserted
known = pytest.mark.skipif(not MEASURED, reason="what torch does is known of 2.13 alone")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", BAG_MODES)
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


def gradient(function, table: Tensor, *arguments, **keywords) -> Tensor:
    table = table.detach().clone().requires_grad_()
    function(arguments[0], table, *arguments[1:], **keywords).sum().backward()
    return table.grad.to_dense()


# ---- wrong gradients


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_scale_grad_by_freq_divides_by_the_rows_own_count(mode: str) -> None:
    """pytorch#190063: torch divides by the count of the row whose number is the place among the unique rows."""
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
def test_scale_grad_by_freq_where_torch_refuses(sparse: bool, mode: str, dtype: torch.dtype) -> None:
    """pytorch#189720: not with sparse, not with max."""
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
def test_half_gradients_do_not_stop_growing(sparse: bool, dtype: torch.dtype) -> None:
    """4096 ones: torch adds in the type itself, and stops at 256 in bfloat16, at 2048 in float16."""
    table, rows = torch.zeros(3, 4, dtype=dtype), torch.ones(64, 64, dtype=torch.int64)
    keywords = dict(mode="sum", sparse=sparse)
    assert (gradient(ours, table, rows, **keywords)[1] == 4096).all()
    if MEASURED:
        saturated = 256 if dtype == torch.bfloat16 else 2048
        assert (gradient(theirs, table, rows, **keywords)[1] == saturated).all()


@halves
def test_a_skewed_half_gradient_is_as_good_as_its_type(dtype: torch.dtype) -> None:
    """Most of 20,000 lookups meet one row: torch's gradient is off by most of its size, ours by a rounding."""
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
def test_one_meaning_of_what_lies_behind_the_last_offset(mode: str, dtype: torch.dtype) -> None:
    """pytorch#191965: of [1, 1, 2], 1 and 3 torch excludes the rest in a float32 sum, includes it in a float64 one,
    counts it in a mean's divisor, and includes it in a maximum: 4.0, 0.8 and 4.0 where 4, 4/3 and 2 are right."""
    table = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]], dtype=dtype)
    rows, offsets = torch.tensor([1, 1, 2, 3, 4]), torch.tensor([0, 3])
    want = torch.tensor([[{"sum": 4.0, "mean": 4 / 3, "max": 2.0, "min": 1.0}[mode]]]).to(dtype)
    torch.testing.assert_close(ours(rows, table, offsets, mode=mode, **LAST), want)
    assert not gradient(ours, table, rows, offsets, mode=mode, **LAST)[3:].any()
    if MEASURED and mode in ("mean", "max"):
        assert (theirs(rows, table, offsets, mode=mode, **LAST) - want).abs() > 0.3


def test_torchs_sum_depends_on_the_dtype_behind_the_last_offset() -> None:
    case = BagCase(E=11, D=6, lengths=(4, 1, 0, 2), form="last", trailing=3, weights="same", why="trailing")
    for dtype in (torch.float32, torch.float64):
        inputs = make_bag_inputs(case, dtype, "sum")
        got = run_bag(ours, inputs)
        assert_bag_near(got, bag_definition(inputs), inputs)
        assert not got["dweights"][7:].any()  # in float64 torch has a gradient for them


@modes
def test_no_bags_but_indices_behind_the_last_offset(mode: str) -> None:
    """Offsets [0] and indices behind: torch's float64 sum reads outside memory and ends the process."""
    table = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    out = ours(torch.tensor([1, 2, 3]), table, torch.tensor([0]), mode=mode, **LAST)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert not table.grad.any()


@modes
def test_two_dimensions_with_the_last_offset_lose_no_bag(mode: str) -> None:
    """pytorch#168159, of earlier releases."""
    table, rows = torch.randn(5, 4), torch.randint(0, 5, (3, 2))
    assert torch.equal(ours(rows, table, mode=mode, **LAST), ours(rows, table, mode=mode))


# ---- offsets and indices that make no sense


@dtypes
@modes
@pytest.mark.parametrize("offsets", [[0, 5, 3], [0, -1, 3], [0, 3, -2], [0, 4, 2, 4]], ids=str)
def test_offsets_that_go_back_are_refused(offsets: list[int], mode: str, dtype: torch.dtype) -> None:
    """pytorch#175368, #193095: torch's maximum returns something for the first, and reads in front of the buffer for
    the second; other modes read outside as well, or end the process."""
    with pytest.raises((ValueError, RuntimeError), match="offsets"):
        ours(torch.arange(5), torch.randn(5, 4).to(dtype), torch.tensor(offsets), mode=mode)


@known
def test_torchs_maximum_takes_offsets_that_go_back() -> None:
    assert theirs(torch.arange(5), torch.ones(5, 4), torch.tensor([0, 5, 3]), mode="max").shape == (3, 4)


@modes
@pytest.mark.parametrize("bad", [-1, 5])
def test_a_bad_index_is_named(bad: int, mode: str) -> None:
    """pytorch#66750, #89362: "Expected i < index_size to be true, but got false"."""
    with pytest.raises((ValueError, RuntimeError), match=f"got.*{bad}"):
        ours(torch.tensor([[0, bad]]), torch.ones(5, 4), mode=mode)


@modes
def test_bags_of_no_indices_in_two_dimensions(mode: str) -> None:
    """Torch: "step must be nonzero"."""
    nothing, table = torch.zeros(3, 0, dtype=torch.int64), torch.randn(5, 4, requires_grad=True)
    out = ours(nothing, table, mode=mode)
    assert out.tolist() == [[0.0] * 4] * 3
    out.sum().backward()
    assert not table.grad.any()
    if mode != "min" and MEASURED:
        with pytest.raises(RuntimeError, match="step must be nonzero"):
            theirs(nothing, table, mode=mode)


@modes
def test_a_table_without_columns_with_weights(mode: str) -> None:
    """Torch's float32 sum says that an index is out of range."""
    out = ours(torch.tensor([[0, 1]]), torch.ones(3, 0), mode=mode, per_sample_weights=torch.ones(1, 2))
    assert out.shape == (1, 0)


# ---- maxima


@dtypes
@pytest.mark.parametrize("at", range(3))
def test_a_nan_wins_wherever_it_stands(at: int, dtype: torch.dtype) -> None:
    """Torch's maximum keeps a NaN only if it comes first; amax keeps each."""
    values = [1.0, 2.0, 3.0]
    values[at] = math.nan
    table, rows = torch.tensor(values, dtype=dtype)[:, None], torch.tensor([[0, 1, 2]])
    assert ours(rows, table, mode="max").isnan().all() and ours(rows, table, mode="min").isnan().all()
    grad = gradient(ours, table, rows, mode="max")
    assert grad.flatten().tolist() == [float(i == at) for i in range(3)]
    if MEASURED:
        assert theirs(rows, table, mode="max").isnan().all() == (at == 0)


@dtypes
def test_a_repeated_rows_maximum_has_its_own_gradient(dtype: torch.dtype) -> None:
    """FlagGems#5220: not the mean's, and a tie's not shared: one place of a bag wins each column."""
    table = torch.tensor([[1.0, 9.0, 2.0], [5.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=dtype)
    rows = torch.tensor([[0, 1, 0, 1], [1, 1, 2, 0]])
    want = torch.tensor([[0.0, 2.0, 1.0], [2.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=dtype)
    assert torch.equal(gradient(ours, table, rows, mode="max"), want)


def test_a_sparse_gradient_of_a_maximum() -> None:
    """Torch: "max mode does not support sparse weights"."""
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
def test_weights_in_every_mode(norm: str, mode: str, dtype: torch.dtype) -> None:
    """pytorch#4068; torch takes them in sums alone."""
    case = BagCase(E=9, D=4, lengths=(5, 0, 8), weights="same", weight_norm=norm, padding_idx=2, why="weights")
    inputs = make_bag_inputs(case, dtype, mode)
    assert_bag_near(run_bag(ours, inputs), bag_definition(inputs), inputs)
    if mode in ("mean", "max"):
        with pytest.raises(NotImplementedError, match="only supported for mode='sum'"):
            theirs(inputs.indices, inputs.weight, inputs.offsets, mode=mode, per_sample_weights=inputs.weights)


@halves
@modes
def test_float32_weights_over_a_half_table(mode: str, dtype: torch.dtype) -> None:
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
def test_a_sparse_gradient_holds_each_row_once(mode: str) -> None:
    """Torch's holds each lookup, and says itself that it is not coalesced."""
    rows, found = torch.randint(0, 5, (30, 10)), []
    for function in (ours, theirs):
        leaf = torch.randn(5, 4).requires_grad_()
        found += torch.autograd.grad(function(rows, leaf, mode=mode, sparse=True).sum(), leaf)
    assert found[0].is_coalesced() and found[0]._nnz() == 5
    assert not found[1].is_coalesced() and found[1]._nnz() == 300
    torch.testing.assert_close(found[0].to_dense(), found[1].to_dense())


@modes
def test_second_derivatives_and_forward_mode(mode: str) -> None:
    """Torch: derivative for _embedding_bag_backward is not implemented; forward AD neither."""
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
    """Torch falls back to a loop that it warns of."""
    tables, rows = torch.randn(3, 5, 4), torch.randint(0, 5, (2, 6))
    got = torch.vmap(lambda t: ours(rows, t, mode=mode))(tables)
    assert torch.equal(got, torch.stack([ours(rows, t, mode=mode) for t in tables]))


@modes
def test_offsets_in_another_integer_type_than_indices(mode: str) -> None:
    table, rows, offsets = torch.randn(5, 4), torch.tensor([0, 3, 2]), torch.tensor([0, 1])
    want = ours(rows, table, offsets, mode=mode)
    assert torch.equal(ours(rows.int(), table, offsets, mode=mode), want)
    assert torch.equal(ours(rows, table, offsets.int(), mode=mode), want)
