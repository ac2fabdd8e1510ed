"""CUDA kernels of embedding bags, in the emulation, which checks memory and barriers, and on a GPU if present.

torch.ops.seqkernels_emulated has the ops of torch.ops.seqkernels, implemented by the CUDA launchers. The tests replace
the CPU ops by them, so that the public functions call them.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

from seqkernels import functional, reference
from seqkernels.functional import _embedding_bag_ops
from support.cases import (
    BAG_CASES,
    BAG_MODES,
    BAG_TINY,
    DTYPES,
    BagCase,
    BagInputs,
    assert_bag_near,
    assert_same_bits,
    bag_definition,
    bag_lengths,
    make_bag_inputs,
    run_bag,
)
from support.on_cuda import ONLY_EMULATED, PLACES, OnCuda, sanitized

cpu = torch.ops.seqkernels
HALVES = (torch.bfloat16, torch.float16)

# Chunks of long bags have 128 indices, chunks of frequent rows 32; a block merges chains of more than 16 chunks.
CUDA_CASES = [
    BagCase(E=30, D=8, lengths=(128, 129, 0, 256, 257, 1), weights="same", why="edges of pieces"),
    BagCase(E=30, D=12, lengths=(3, 2500, 2, 700), weights="same", padding_idx=3, why="more than 16 chunks"),
    BagCase(E=9, D=130, lengths=(5, 2200), weights="wide", why="two tiles of columns, a long bag"),
    BagCase(E=40, D=4, lengths=(2300,), form="2-D", why="one long bag, one lane"),
    BagCase(E=30, D=64, lengths=(700, 3), weights="same", weight_norm="weight", padding_idx=1, why="long, by weight"),
    BagCase(E=30, D=16, lengths=bag_lengths(80, 40), rows="one", why="one row in all positions"),
    BagCase(E=300, D=6, lengths=bag_lengths(80, 40), rows="few", scale_grad_by_freq=True, why="frequent rows, counts"),
    BagCase(E=31, D=5, lengths=(1,) * 32, rows="one", why="a row that ends with a group"),
    BagCase(E=31, D=5, lengths=(1,) * 33, rows="one", form="last", trailing=40, why="and trailing indices"),
    BagCase(E=5000, D=260, lengths=bag_lengths(20, 9), why="three tiles of float32, two of half types"),
    BagCase(E=70000, D=4, lengths=(600,) * 9, form="2-D", index=torch.int32, why="three digits of keys, two tiles"),
]

cases = pytest.mark.parametrize(
    "case", sanitized(BAG_CASES + CUDA_CASES, lambda case: case.why == "more than 16 chunks"), ids=str
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
modes = pytest.mark.parametrize("mode", BAG_MODES)
run = functools.partial(run_bag, functional.embedding_bag)


def emulated_ops() -> _embedding_bag_ops.Ops:
    if not hasattr(torch.ops.seqkernels_emulated, "embedding_bag"):
        built = sorted(cuda_on_cpu.FOLDER.glob("_emulated*.so"))
        if not built:
            pytest.skip("tests/cuda_on_cpu/_emulated is not built; `make test` builds it")
        torch.ops.load_library(str(built[0]))
    return _embedding_bag_ops.Ops("seqkernels_emulated", _embedding_bag_ops.NAMES)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> str:
    """Where the ops run: in the emulation or on a GPU."""
    return request.param


@pytest.fixture(autouse=True)
def ops(place: str, monkeypatch: pytest.MonkeyPatch) -> _embedding_bag_ops.Ops | OnCuda:
    """The emulated ops or those of a GPU, which the public functions also use."""
    found = OnCuda() if place == "cuda" else emulated_ops()
    monkeypatch.setattr(_embedding_bag_ops, "ops", found)
    return found


@contextlib.contextmanager
def machine(**values: int) -> Iterator[None]:
    """Changes settings of the emulation: races=1, multiprocessors=1, ..."""
    with cuda_on_cpu.settings(cuda_on_cpu.load("_emulated"), **values):
        yield


# ---- against the definition


@cases
@modes
@dtypes
def test_parity(case: BagCase, mode: str, dtype: torch.dtype) -> None:
    inputs = make_bag_inputs(case, dtype, mode)
    assert_bag_near(run(inputs), bag_definition(inputs), inputs)


@cases
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sparse_gradient(case: BagCase, mode: str, dtype: torch.dtype) -> None:
    inputs = make_bag_inputs(case, dtype, mode)
    got = run(inputs, sparse=True)
    assert_bag_near(got, bag_definition(inputs), inputs)
    gradient = got["dweight"]
    assert gradient.is_sparse and gradient.is_coalesced()
    rows = gradient.indices()[0]
    assert (rows[1:] > rows[:-1]).all()
    counted = inputs.indices.flatten()[: case.N - case.trailing]
    if case.padding_idx is not None:
        counted = counted[counted != case.padding_idx]
    assert_same_bits({"rows": rows}, {"rows": counted.long().unique()}, ["rows"])


@cases
@pytest.mark.parametrize("mode", ["max", "min"])
def test_selected_positions_match_the_cpu(case: BagCase, mode: str, ops: _embedding_bag_ops.Ops) -> None:
    inputs = make_bag_inputs(case, torch.float32, mode)
    # Few distinct values, to get equal values in columns; some NaN and signed zeros.
    weight = inputs.weight.mul(2).round().div(2)
    if weight.numel() > 20:
        weight.view(-1)[::17] = math.nan
    arguments = weight, *op_arguments_of(inputs)
    got, want = ops.embedding_bag_forward(*arguments), cpu.embedding_bag_forward(*arguments)
    assert torch.equal(got[1], want[1])
    assert torch.equal(got[0].nan_to_num(7e7).view(torch.int32), want[0].nan_to_num(7e7).view(torch.int32))


def op_arguments_of(inputs: BagInputs) -> tuple[object, ...]:
    c = inputs.case
    padding = -1 if c.padding_idx is None else c.padding_idx
    mode, mean_by = _embedding_bag_ops.MODES[inputs.mode], _embedding_bag_ops.NORMS[c.weight_norm]
    return inputs.indices, inputs.offsets, inputs.weights, mode, padding, c.form == "last", mean_by


@pytest.mark.parametrize("case", BAG_TINY, ids=str)
@modes
def test_gradcheck(case: BagCase, mode: str) -> None:
    inputs = make_bag_inputs(case, torch.float64, mode)

    def f(weight: Tensor, weights: Tensor | None) -> Tensor:
        return functional.embedding_bag(inputs.indices, weight, per_sample_weights=weights, **inputs.keywords())

    inputs = inputs.map(lambda t: t.requires_grad_())
    if case.scale_grad_by_freq:
        return
    assert torch.autograd.gradcheck(f, (inputs.weight, inputs.weights))


# ---- memory: strides, alignment


def strided(t: Tensor, how: str) -> Tensor:
    """The same values in another memory layout, surrounded by NaN."""
    rows, columns = t.shape
    if how == "part of wider rows":
        around = t.new_full((rows, columns + 8), math.nan)
        around[:, 4 : 4 + columns] = t
        return around[:, 4 : 4 + columns]
    if how == "one element off":
        around = t.new_full((rows * columns + 1,), math.nan)
        around[1:] = t.flatten()
        return around[1:].view(rows, columns)
    if how == "columns apart":
        around = t.new_full((rows, columns, 3), math.nan)
        around[:, :, 1] = t
        return around[:, :, 1]
    assert how == "transposed"
    return t.t().contiguous().t()


@pytest.mark.parametrize("how", ["part of wider rows", "one element off", "columns apart", "transposed"])
@pytest.mark.parametrize("D", [8, 10, 136])
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(how: str, D: int, mode: str, dtype: torch.dtype) -> None:
    inputs = make_bag_inputs(BagCase(E=12, D=D, lengths=(3, 0, 5, 1), weights="same", why="strides"), dtype, mode)
    want = bag_definition(inputs)
    moved = dataclasses.replace(inputs, weight=strided(inputs.weight, how), dout=strided(inputs.dout, how))
    arguments = moved.keywords() | {"per_sample_weights": moved.weights.requires_grad_()}
    table = moved.weight.requires_grad_()
    output = functional.embedding_bag(moved.indices, table, **arguments)
    dweight, dweights = torch.autograd.grad(output, (table, arguments["per_sample_weights"]), moved.dout)
    assert_bag_near({"output": output.detach(), "dweight": dweight, "dweights": dweights}, want, inputs)


def test_expanded_gradient() -> None:
    inputs = make_bag_inputs(BagCase(E=12, D=8, lengths=(3, 0, 5, 1), why="one row for all bags"), torch.float32)
    inputs = dataclasses.replace(inputs, dout=inputs.dout[:1].expand_as(inputs.dout))
    assert_bag_near(run(inputs), bag_definition(inputs), inputs)


@pytest.mark.parametrize("mode", ["sum", "max"])
@ONLY_EMULATED
def test_bits_are_independent_of_the_number_of_multiprocessors(mode: str, ops: _embedding_bag_ops.Ops) -> None:
    """With few multiprocessors, a group has several short bags; with many, one."""
    case = BagCase(
        E=50, D=20, lengths=(*bag_lengths(900, 3), 300, 0, 0, 200), weights="same", why="short bags and two long ones"
    )
    inputs = make_bag_inputs(case, torch.float32, mode)
    arguments = inputs.weight, *op_arguments_of(inputs)
    with machine(multiprocessors=1):
        few = ops.embedding_bag_forward(*arguments)
    with machine(multiprocessors=1000):
        many = ops.embedding_bag_forward(*arguments)
    assert torch.equal(few[0], many[0]) and torch.equal(few[1], many[1])
    assert_bag_near(run(inputs), bag_definition(inputs), inputs)


@pytest.mark.parametrize("order", [*cuda_on_cpu.LOCKSTEP, *cuda_on_cpu.SCHEDULES], ids=str)
@pytest.mark.parametrize("mode", ["mean", "max"])
@ONLY_EMULATED
def test_no_races_and_bits_are_independent_of_the_order(order: dict[str, int], mode: str) -> None:
    case = BagCase(
        E=40, D=20, lengths=(300, 2, 0, *bag_lengths(30, 20), 2200), rows="few", weights="same", why="all kinds"
    )
    inputs = make_bag_inputs(case, torch.float32, mode)
    want = run(inputs)
    with machine(**({"races": 1, "unwritten": 1} | order)):
        got = run(inputs)
        sparse = run(inputs, sparse=True)
    assert_same_bits(got, want, list(want))
    assert torch.equal(sparse["dweight"].to_dense(), want["dweight"])


def test_gradients_of_half_types_do_not_saturate() -> None:
    for dtype in HALVES:
        table = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
        indices = torch.zeros(4096, 1, dtype=torch.int64)
        functional.embedding_bag(indices, table, mode="sum").sum().backward()
        assert table.grad[0].tolist() == [4096.0] * 3 and table.grad[1].tolist() == [0.0] * 3


def test_negative_zero_is_preserved() -> None:
    table = torch.tensor([[-0.0], [0.0]])
    output = functional.embedding_bag(torch.tensor([[0, 0], [0, 1]]), table, mode="sum")
    assert torch.signbit(output).flatten().tolist() == [True, False]


# ---- optimiser steps

STEPS: dict[str, tuple[int, list[float], int]] = {
    "sgd": (0, [0.1], 0),
    "adagrad": (1, [0.1, 1e-3], 1),
    "rowwise_adagrad": (2, [0.1, 1e-3], 1),
    "adam": (3, [0.1, 0.8, 0.9, 1e-3, 3.0], 2),
}


def reference_step(name: str, table: Tensor, states: Sequence[Tensor], gradient: Tensor) -> list[Tensor]:
    """Table and states after a step of the definition, in float64; `gradient` is sparse."""
    gradient = gradient.coalesce()
    _, numbers, _ = STEPS[name]
    step = getattr(reference, f"{name}_step")
    wide = [t.double() for t in (table, *states)]
    made = step(*wide, gradient.indices()[0], gradient.values().double(), *numbers)
    return [made] if isinstance(made, Tensor) else list(made)


def states_of(name: str, table: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(table.dtype, torch.float32)
    shape = table.shape[:1] if name == "rowwise_adagrad" else table.shape
    return [torch.rand(shape, dtype=torch.float64).to(dtype) for _ in range(STEPS[name][2])]


def assert_near(got: Tensor, want: Tensor, names: str) -> None:
    rounding = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-5, torch.float64: 1e-13}[got.dtype]
    assert got.isfinite().all()
    assert ((got.double() - want).abs() <= rounding * (want.abs() + want.abs().max() / 8)).all(), names


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("D", [1, 8, 70, 132, 300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps(name: str, mode: str, D: int, dtype: torch.dtype, ops: _embedding_bag_ops.Ops) -> None:
    case = BagCase(
        E=25, D=D, lengths=(*bag_lengths(12, 30), 90), padding_idx=2, weights="same", why="frequent and rare rows"
    )
    inputs = make_bag_inputs(case, dtype, mode)
    bags = op_arguments_of(inputs)
    _, arg = ops.embedding_bag_forward(inputs.weight, *bags)
    gradient = run(inputs.map(Tensor.double), sparse=True)["dweight"]
    states = states_of(name, inputs.weight)
    want = reference_step(name, inputs.weight, states, gradient)
    number, numbers, _ = STEPS[name]
    got = [inputs.weight.clone(), *(t.clone() for t in states)]
    ops.embedding_bag_update_(*[*got, None, None][:3], number, numbers, inputs.dout, arg, *bags)
    for g, w, what in zip(got, want, ("table", "state1", "state2"), strict=False):
        assert_near(g, w, what)


# A group has 32 positions of the sorted rows, and continues to the end of its last row.
RUNS = (1, 30, 1, 31, 32, 33, 1, 1, 62, 63, 64, 65, 3, 66, 20, 96, 97, 2, 5, 130, 700, 1)


@pytest.mark.parametrize("before", sanitized([0, 1, 17, 31, 32, 33], lambda before: before == 31))
@pytest.mark.parametrize("D", [7, 8])
@pytest.mark.parametrize("weights", [False, True], ids=["", "weighted"])
def test_rows_at_the_bounds_of_groups(before: int, D: int, weights: bool, ops: _embedding_bag_ops.Ops) -> None:
    """Gradients and a step for rows that end at or beside the bound of a group, for one table and for two."""
    runs = torch.tensor((before, *RUNS))
    rows = torch.repeat_interleave(torch.arange(len(runs)), runs)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(before))]
    dout = torch.randn(len(rows), D, dtype=torch.float64).float()
    w = torch.rand(len(rows)) + 0.5 if weights else None
    want = torch.zeros(len(runs), D, dtype=torch.float64)
    want.index_add_(0, rows, dout.double() * (1 if w is None else w.double()[:, None]))
    bags = rows[:, None].contiguous(), None, None if w is None else w[:, None], 0, -1, False, 0
    none = torch.empty(0, dtype=torch.int32)
    assert_near(ops.embedding_bag_backward(dout, none, len(runs), *bags), want, "dense")
    found, values = ops.embedding_bag_backward_sparse(dout, none, len(runs), *bags)
    assert torch.equal(found, runs.nonzero()[:, 0])
    assert_near(values, want[found], "sparse")
    for name in STEPS:
        table = torch.randn(len(runs), D)
        states = states_of(name, table)
        gradient = torch.sparse_coo_tensor(found[None], want[found], want.shape, check_invariants=True)
        steps = reference_step(name, table, states, gradient)
        got = [table.clone(), *(t.clone() for t in states)]
        number, numbers, _ = STEPS[name]
        ops.embedding_bag_update_(*[*got, None, None][:3], number, numbers, dout, none, *bags)
        for g, wanted in zip(got, steps, strict=False):
            assert_near(g, wanted, name)

    tables = [9, len(runs) - 9]
    first = rows < tables[0]
    order = torch.cat([first.nonzero()[:, 0], (~first).nonzero()[:, 0]])
    indices = torch.cat([rows[first], rows[~first] - tables[0]])
    # Both tables have the same number of bags: the shorter one is padded with empty bags.
    B = max(int(first.sum()), int((~first).sum()))
    lengths = torch.zeros(2, B, dtype=torch.long)
    lengths[0, : int(first.sum())] = 1
    lengths[1, : int((~first).sum())] = 1
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.flatten().cumsum(0)])
    wide = torch.zeros(B, 2 * D)
    wide[: int(first.sum()), :D] = dout[order][: int(first.sum())]
    wide[: int((~first).sum()), D:] = dout[order][int(first.sum()) :]
    given = indices, bounds, None if w is None else w[order], 0, -1, True, 0
    parts = ops.embedding_bags_backward(wide, none, tables, [D, D], [1, 1], *given)
    assert_near(torch.cat(list(parts)), want, "two tables")


@ONLY_EMULATED
def test_steps_with_little_shared_memory(ops: _embedding_bag_ops.Ops) -> None:
    """Data that does not fit in shared memory is read from global memory."""
    with machine(shared_bytes=99 * 1024):
        test_steps("adam", "mean", 132, torch.bfloat16, ops)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("how", ["part of wider rows", "one element off", "transposed"])
def test_steps_of_strided_tables(name: str, how: str, ops: _embedding_bag_ops.Ops) -> None:
    inputs = make_bag_inputs(BagCase(E=25, D=12, lengths=bag_lengths(12, 30), why="strides"), torch.float32)
    bags = op_arguments_of(inputs)
    states = states_of(name, inputs.weight)
    number, numbers, _ = STEPS[name]
    none = torch.empty(0, dtype=torch.int32)
    made = []
    for table in (inputs.weight.clone(), strided(inputs.weight, how)):
        copies = [t.clone() for t in states]
        ops.embedding_bag_update_(table, *[*copies, None, None][:2], number, numbers, inputs.dout, none, *bags)
        made.append([table, *copies])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # another summation order of squares


# ---- several tables


def collection(
    dtype: torch.dtype, *, wide: bool = False
) -> tuple[list[Tensor], list[int], int, Tensor, Tensor, Tensor]:
    shapes, features, B = [(7, 5), (300, 16), (1, 1), (40, 136)], [2, 1, 1, 3], 6
    if wide:
        shapes = [(7, 8), (300, 16), (1, 8), (40, 136)]
    tables = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]
    indices, lengths = [], []
    for (E, _), n in zip(shapes, features, strict=True):
        of_table = [0, 150, 1, *torch.randint(0, 9, (n * B - 3,)).tolist()]
        lengths += of_table
        indices.append(torch.randint(0, E, (sum(of_table),)))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    every = torch.cat(indices)
    return tables, features, B, every, offsets, torch.rand(len(every), dtype=torch.float64).to(dtype) + 0.5


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_collection(mode: str, wide: bool, weighted: bool, dtype: torch.dtype) -> None:
    tables, features, _, indices, offsets, weights = collection(dtype, wide=wide)

    def grads(
        f: Callable[..., Tensor], tables: Sequence[Tensor], weights: Tensor, dout: Tensor | None, **more: object
    ) -> tuple[Tensor, dict[str, Tensor]]:
        tables = [t.detach().requires_grad_() for t in tables]
        weights = weights.detach().requires_grad_() if weighted else None
        output = f(indices, tables, offsets, features, mode=mode, per_sample_weights=weights, **more)
        dout = torch.randn(output.shape, dtype=torch.float64).to(dtype) if dout is None else dout
        leaves = [*tables, weights] if weighted else tables
        found = torch.autograd.grad(output, leaves, dout.to(output.dtype))
        return dout, {"output": output.detach()} | {f"d{i}": t for i, t in enumerate(found)}

    dout, got = grads(functional.embedding_bags, tables, weights, None)
    _, sparse = grads(functional.embedding_bags, tables, weights, dout, sparse=True)
    _, want = grads(reference.embedding_bags, [t.double() for t in tables], weights.double(), dout)
    for name, w in want.items():
        assert got[name].dtype == dtype
        assert_near(got[name], w, name)
        assert torch.equal(sparse[name].to_dense() if sparse[name].is_sparse else sparse[name], got[name]), name


def test_a_table_without_occurrences() -> None:
    tables = [torch.randn(5, 4, requires_grad=True), torch.randn(6, 3, requires_grad=True)]
    indices, offsets = torch.tensor([3, 3, 1]), torch.tensor([0, 0, 0, 2, 3])
    for sparse in (False, True):
        output = functional.embedding_bags(indices, tables, offsets, [1, 1], mode="sum", sparse=sparse)
        none, some = (t.to_dense() for t in torch.autograd.grad(output.sum(), tables))
        assert none.abs().sum() == 0
        assert some[:, 0].tolist() == [0.0, 1.0, 0.0, 2.0, 0.0, 0.0]


@pytest.mark.sanitize
@pytest.mark.parametrize("name", STEPS)
def test_steps_of_a_collection(name: str, ops: _embedding_bag_ops.Ops) -> None:
    tables, features, B, indices, offsets, _ = collection(torch.float32)
    bags = indices, offsets, None, 1, -1, True, 0
    number, numbers, count = STEPS[name]
    dout = torch.randn(B, sum(t.shape[1] * n for t, n in zip(tables, features, strict=True)))
    none = torch.empty(0, dtype=torch.int32)
    states = [states_of(name, t) for t in tables]
    made = []
    for which in (ops, _embedding_bag_ops.Ops("seqkernels", _embedding_bag_ops.NAMES)):
        moved, s = [t.clone() for t in tables], [[t.clone() for t in of] for of in states]
        state1, state2 = ([of[k] for of in s] if k < count else [] for k in range(2))
        which.embedding_bags_update_(moved, state1, state2, number, numbers, dout, none, features, *bags)
        made.append([*moved, *state1, *state2])
    for a, b in zip(*made, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- quantized tables, max_norm


@pytest.mark.parametrize("D", sanitized([1, 4, 7, 64, 140], lambda D: D == 7))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_bytes_match_the_cpu(D: int, dtype: torch.dtype, ops: _embedding_bag_ops.Ops) -> None:
    table = torch.randn(9, D, dtype=torch.float64).to(dtype)
    table[3] = 2.5
    assert torch.equal(ops.embedding_bag_pack_bytes(table), cpu.embedding_bag_pack_bytes(table))
    assert torch.equal(ops.embedding_bag_pack_bytes(table.t()), cpu.embedding_bag_pack_bytes(table.t()))


@pytest.mark.parametrize("D", [1, 4, 7, 64, 140])
@modes
@pytest.mark.parametrize("weights", [None, torch.float32])
def test_quantized_tables(D: int, mode: str, weights: torch.dtype | None, ops: _embedding_bag_ops.Ops) -> None:
    case = BagCase(E=30, D=D, lengths=(3, 0, 400, 1), padding_idx=4, weights="same" if weights else "", why="bytes")
    inputs = make_bag_inputs(case, torch.float32, mode)
    packed = cpu.embedding_bag_pack_bytes(inputs.weight)
    bags = op_arguments_of(inputs)
    torch.testing.assert_close(
        ops.embedding_bag_bytes(packed, *bags),
        cpu.embedding_bag_bytes(packed, *bags),
        rtol=1e-5,
        atol=1e-3 if mode == "sum" else 1e-5,
    )


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.0, math.inf, -math.inf])
@pytest.mark.parametrize("D", [1, 5, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_renorm(p: float, D: int, dtype: torch.dtype, ops: _embedding_bag_ops.Ops) -> None:
    table = torch.randn(40, D, dtype=torch.float64).to(dtype)
    rows = torch.randint(0, 30, (70,))
    want = reference.renorm(table.double(), rows, 0.7, p)
    ops.embedding_bag_renorm_(table, rows, 0.7, p)
    assert_near(table, want, "table")


# ---- invalid indices and offsets


def bad(**changes: object) -> BagInputs:
    inputs = make_bag_inputs(BagCase(E=6, D=4, lengths=(2, 3), form="last", why="errors"), torch.float32)
    return dataclasses.replace(inputs, **changes)


@pytest.mark.parametrize("index", [6, -1, 2**40, -(2**40)])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_indices_out_of_range(index: int, kind: torch.dtype, ops: _embedding_bag_ops.Ops) -> None:
    if kind == torch.int32 and abs(index) > 2**31:
        index //= 2**20
    inputs = bad(indices=torch.tensor([0, 1, 5, index, 2], dtype=kind))
    bags = op_arguments_of(inputs)
    message = rf"indices in \[0, 6\), got {index} at position 3"
    none = torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=message):
        run(inputs)
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_bag_backward(inputs.dout, none, 6, *bags)
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_bag_backward_sparse(inputs.dout, none, 6, *bags)
    table = inputs.weight.clone()
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_bag_update_(table, None, None, 0, [0.1], inputs.dout, none, *bags)
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_bag_renorm_(table, inputs.indices, 1.0, 2.0)
    assert torch.equal(table, inputs.weight)


@pytest.mark.parametrize(
    ("offsets", "where"),
    [([0, 5, 3], 2), ([0, -1, 5], 1), ([0, 2, 6], 2), ([0, 2**40, 5], 1), ([0, 4, -(2**50)], 2)],
)
def test_offsets_out_of_order(offsets: list[int], where: int, ops: _embedding_bag_ops.Ops) -> None:
    inputs = bad(offsets=torch.tensor(offsets))
    bags = op_arguments_of(inputs)
    message = f"offsets must not decrease nor exceed .*, 5, got {offsets[where]} at position {where}"
    with pytest.raises(RuntimeError, match=message):
        run(inputs)
    with pytest.raises(RuntimeError, match=message):
        ops.embedding_bag_backward(inputs.dout, torch.empty(0, dtype=torch.int32), 6, *bags)
