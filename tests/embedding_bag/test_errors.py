"""Invalid input of EmbeddingBag and Embedding: an error that names the argument, or the defined result.

Errors occur before memory is read out of bounds or written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqkernels import functional, nn
from support.cases import BAG_MODES, BagCase, assert_same_bits, make_bag_inputs, run_bag

ops = torch.ops.seqkernels

E, D = 6, 5
modes = pytest.mark.parametrize("mode", BAG_MODES)
VALUES = (
    ValueError,
    RuntimeError,
    IndexError,
)  # errors that depend on the values of indices and offsets, raised by the op
ROWS = "(input|indices)"


def form(argument: str, condition: str = ".+", got: str = ".+", op: str = r"(Embedding\w*|embedding\w*)") -> str:
    """Pattern of the form of all error messages."""
    return rf"{op}: {argument} must {condition}, got {got}"


def integers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GOOD = dict(input=integers(0, 5, 2, 2), weight=torch.ones(E, D), offsets=integers(0, 2))
TWO_D = dict(input=integers(0, 5, 2, 2).view(2, 2), weight=torch.ones(E, D))
TYPES = (TypeError, NotImplementedError)


# ---- the functional form

FUNCTIONAL = {
    "input a list": (GOOD, {"input": [0, 1, 2, 3]}, TypeError, form("input")),
    "input float": (GOOD, {"input": torch.zeros(4)}, TypeError, form(ROWS, got=".*float32")),
    "input bool": (GOOD, {"input": torch.zeros(4, dtype=torch.bool)}, TypeError, form(ROWS, got=".*bool")),
    "input 0-D": (GOOD, {"input": torch.tensor(3)}, ValueError, form(ROWS)),
    "input 3-D": (TWO_D, {"input": torch.zeros(1, 2, 2).long()}, ValueError, form(ROWS)),
    "input 2-D with offsets": (GOOD, {"input": torch.zeros(2, 2).long()}, ValueError, form("offsets")),
    "input 1-D without offsets": (GOOD, {"offsets": None}, ValueError, form("offsets")),
    "offsets a list": (GOOD, {"offsets": [0, 2]}, TypeError, form("offsets")),
    "offsets float": (GOOD, {"offsets": torch.zeros(2)}, TypeError, form("offsets", got=".*float32")),
    "offsets bool": (GOOD, {"offsets": torch.zeros(2, dtype=torch.bool)}, TypeError, form("offsets")),
    "offsets 2-D": (GOOD, {"offsets": torch.zeros(1, 2).long()}, ValueError, form("offsets")),
    "offsets 0-D": (GOOD, {"offsets": torch.tensor(0)}, ValueError, form("offsets")),
    "no last offset": (GOOD, {"offsets": integers(), "include_last_offset": True}, VALUES, form("offsets")),
    "weight a list": (GOOD, {"weight": [[1.0]]}, TypeError, form("weight")),
    "weight 1-D": (GOOD, {"weight": torch.ones(E)}, ValueError, form("weight")),
    "weight 3-D": (GOOD, {"weight": torch.ones(E, D, 1)}, ValueError, form("weight")),
    "weight integer": (GOOD, {"weight": torch.ones(E, D).long()}, TYPES, "int64"),
    "weight bytes": (GOOD, {"weight": torch.ones(E, D, dtype=torch.uint8)}, TYPES, "uint8"),
    "weight complex": (GOOD, {"weight": torch.ones(E, D) * 1j}, TYPES, "complex64"),
    "weight float8": (GOOD, {"weight": torch.ones(E, D).to(torch.float8_e4m3fn)}, TYPES, "float8"),
    "weights a list": (GOOD, {"per_sample_weights": [1.0] * 4}, TypeError, form("per_sample_weights")),
    "weights too few": (GOOD, {"per_sample_weights": torch.ones(3)}, ValueError, form("per_sample_weights")),
    "weights too many": (GOOD, {"per_sample_weights": torch.ones(5)}, ValueError, form("per_sample_weights")),
    "weights 2-D": (GOOD, {"per_sample_weights": torch.ones(2, 2)}, ValueError, form("per_sample_weights")),
    "weights 1-D": (TWO_D, {"per_sample_weights": torch.ones(4)}, ValueError, form("per_sample_weights")),
    "weights turned": (
        TWO_D | {"input": torch.zeros(2, 3).long()},
        {"per_sample_weights": torch.ones(3, 2)},
        ValueError,
        form("per_sample_weights"),
    ),
    "weights double": (GOOD, {"per_sample_weights": torch.ones(4).double()}, TypeError, form("per_sample_weights")),
    "weights half": (GOOD, {"per_sample_weights": torch.ones(4).half()}, TypeError, form("per_sample_weights")),
    "weights integer": (GOOD, {"per_sample_weights": integers(1, 1, 1, 1)}, TypeError, form("per_sample_weights")),
    "weights of another half": (
        GOOD | {"weight": torch.ones(E, D).half()},
        {"per_sample_weights": torch.ones(4).bfloat16()},
        TypeError,
        form("per_sample_weights"),
    ),
    "mode unknown": (GOOD, {"mode": "prod"}, ValueError, form("mode", got=".*prod.*")),
    "mode upper case": (GOOD, {"mode": "SUM"}, ValueError, form("mode")),
    "mode a number": (GOOD, {"mode": 0}, (ValueError, TypeError), form("mode")),
    "mode None": (GOOD, {"mode": None}, (ValueError, TypeError), form("mode")),
    "weight_norm unknown": (GOOD, {"weight_norm": "sum"}, ValueError, form("weight_norm", got=".*sum.*")),
    "padding_idx E": (GOOD, {"padding_idx": E}, ValueError, form("padding_idx", got="6")),
    "padding_idx below -E": (GOOD, {"padding_idx": -E - 1}, ValueError, form("padding_idx", got="-7")),
    "padding_idx float": (GOOD, {"padding_idx": 1.0}, TypeError, form("padding_idx")),
    "input elsewhere": (GOOD, {"input": integers(0, 1, 2, 3).to("meta")}, (*VALUES, *TYPES), "meta"),
    "weight elsewhere": (GOOD, {"weight": torch.ones(E, D, device="meta")}, (*VALUES, *TYPES), "meta"),
    "offsets elsewhere": (GOOD, {"offsets": integers(0, 2).to("meta")}, (*VALUES, *TYPES), "meta"),
    "weights elsewhere": (GOOD, {"per_sample_weights": torch.ones(4, device="meta")}, (*VALUES, *TYPES), "meta"),
    "max_norm negative": (GOOD, {"max_norm": -1.0}, ValueError, form("max_norm")),
}  # fmt: skip


@pytest.mark.parametrize(("good", "change", "error", "text"), FUNCTIONAL.values(), ids=FUNCTIONAL)
def test_functional_errors(good: dict, change: dict, error, text: str) -> None:
    functional.embedding_bag(**good)
    with pytest.raises(error, match=text):
        functional.embedding_bag(**good | change)


@pytest.mark.parametrize("change", [c for c in FUNCTIONAL if FUNCTIONAL[c][0] is GOOD and "offset" not in c])
def test_functional_errors_while_training(change: str) -> None:
    good, wrong, error, text = FUNCTIONAL[change]
    table = wrong.get("weight", good["weight"])
    if isinstance(table, Tensor) and table.is_floating_point():
        wrong = wrong | {"weight": table.clone().requires_grad_()}
    with pytest.raises(error, match=text):
        functional.embedding_bag(**good | wrong)


LOOKUP = dict(input=integers(0, 5, 2), weight=torch.ones(E, D))

EMBEDDING = {
    "input a list": ({"input": [0, 1]}, TypeError, form("input")),
    "input float": ({"input": torch.zeros(4)}, (TypeError, RuntimeError), form(ROWS, got=".*float32")),
    "weight 1-D": ({"weight": torch.ones(E)}, ValueError, form("weight")),
    "padding_idx E": ({"padding_idx": E}, ValueError, form("padding_idx", got="6")),
    "padding_idx below -E": ({"padding_idx": -E - 1}, ValueError, form("padding_idx", got="-7")),
    "index E": ({"input": integers(0, E)}, VALUES, form(ROWS, got=".*6")),
    "index -1": ({"input": integers(0, -1)}, VALUES, form(ROWS, got=".*-1")),
    "index -1 in int32": ({"input": integers(0, -1, dtype=torch.int32)}, VALUES, form(ROWS, got=".*-1")),
    "index 3-D": ({"input": torch.full((1, 2, 3), E)}, VALUES, form(ROWS, got=".*6")),
    "index elsewhere": ({"input": integers(0, 1).to("meta")}, (*VALUES, *TYPES), "meta"),
}


@pytest.mark.parametrize(("change", "error", "text"), EMBEDDING.values(), ids=EMBEDDING)
def test_embedding_errors(change: dict, error, text: str) -> None:
    functional.embedding(**LOOKUP)
    with pytest.raises(error, match=text):
        functional.embedding(**LOOKUP | change)


# ---- indices out of range

BEYOND = [E, E + 1, 2**20, 2**31 - 1, -1, -E, -(2**31)]
FAR = [2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**32), -(2**63)]  # the lower 32 bits of some are in range


@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=["int64", "int32"])
@modes
def test_index_out_of_range_raises(mode: str, integer: torch.dtype, isa: str) -> None:
    """At each position, with and without weights and padding, in both forms of input, with and without gradients."""
    table, lengths = torch.ones(E, 19), (3, 0, 4)
    for bad in BEYOND + FAR * (integer == torch.int64):
        for at in range(7):
            rows = torch.arange(7).remainder(E).to(integer)
            rows[at] = bad
            for more in ({}, {"per_sample_weights": torch.ones(7)}, {"padding_idx": 1}):
                with pytest.raises(VALUES, match=form(ROWS, got=f".*{bad}")):
                    functional.embedding_bag(rows, table, integers(0, 3, 3), mode=mode, **more)
            with pytest.raises(VALUES, match=form(ROWS, got=f".*{bad}")):
                functional.embedding_bag(rows[None], table.clone().requires_grad_(), mode=mode)
    assert sum(lengths) == 7


@modes
@pytest.mark.parametrize("at", [0, 77, 49_999])
def test_index_out_of_range_in_a_large_input_raises(at: int, mode: str, isa: str) -> None:
    """Detected by one of several threads, in one long bag and in many short ones."""
    table, rows = torch.ones(100, 24), torch.randint(0, 100, (50_000,))
    rows[at] = 100
    for threads in (1, 3):
        torch.set_num_threads(threads)
        for offsets in (integers(0), torch.arange(0, 50_000, 10)):
            with pytest.raises(VALUES, match=form(ROWS, got=".*100")):
                functional.embedding_bag(rows, table, offsets, mode=mode)
    rows[at] = 99
    assert torch.equal(
        functional.embedding_bag(rows, table, torch.arange(0, 50_000, 10), mode="mean"), torch.ones(5000, 24)
    )


@modes
def test_index_of_a_table_without_rows_raises(mode: str) -> None:
    with pytest.raises(VALUES, match=form(ROWS)):
        functional.embedding_bag(integers(0), torch.ones(0, 4), integers(0), mode=mode)
    with pytest.raises(VALUES, match=form(ROWS)):
        functional.embedding(integers(0), torch.ones(0, 4))


# ---- invalid offsets

OFFSETS = {
    "first not 0": [1, 2],
    "first negative": [-1, 2],
    "decreasing": [0, 3, 2],
    "negative": [0, -1, 3],
    "beyond the end": [0, 5],
    "beyond the end, then back": [0, 5, 3],
    "far beyond": [0, 2**31 - 1],
    "the lowest": [0, -(2**31)],
}
FAR_OFFSETS = {
    "beyond 32 bits": [0, 2**32 + 2],
    "beyond all": [0, 2**63 - 1],
    "the lowest of 64 bits": [0, -(2**63)],
    "first beyond 32 bits": [2**32, 2**32 + 2],
    "a sum that overflows": [0, 2**62, -(2**62), 2],
}


@pytest.mark.parametrize("last", [False, True], ids=["open", "last"])
@pytest.mark.parametrize("integer", [torch.int64, torch.int32], ids=["int64", "int32"])
@modes
def test_invalid_offsets_raise(mode: str, integer: torch.dtype, last: bool, isa: str) -> None:
    for offsets in [*OFFSETS.values(), *(FAR_OFFSETS.values() if integer == torch.int64 else [])]:
        for index in (torch.int64, torch.int32):
            keywords = dict(offsets=integers(*offsets, dtype=integer), mode=mode, include_last_offset=last)
            for table in (torch.ones(E, D), torch.ones(E, D, requires_grad=True)):
                with pytest.raises(VALUES, match=form(r"offsets.*")):
                    functional.embedding_bag(integers(0, 1, 2, 3, dtype=index), table, **keywords)


@modes
def test_offsets_without_indices(mode: str) -> None:
    nothing = integers()
    table = torch.ones(E, D)
    assert functional.embedding_bag(nothing, table, integers(0, 0), mode=mode).tolist() == [[0.0] * D] * 2
    assert functional.embedding_bag(nothing, table, integers(), mode=mode).shape == (0, D)
    assert functional.embedding_bag(nothing, table, integers(0), mode=mode, include_last_offset=True).shape == (0, D)
    for bad in ([1], [0, 1], [-1]):
        with pytest.raises(VALUES, match=form("offsets.*")):
            functional.embedding_bag(nothing, table, integers(*bad), mode=mode)


@modes
def test_indices_without_bags(mode: str) -> None:
    """Empty offsets have no bags, so that all indices are ignored."""
    for rows in (integers(1, 2), integers(99)):
        out = functional.embedding_bag(rows, torch.ones(E, D), integers(), mode=mode)
        assert out.shape == (0, D)
        out = functional.embedding_bag(rows, torch.ones(E, D), integers(0), mode=mode, include_last_offset=True)
        assert out.shape == (0, D)  # torch crashes


@modes
def test_indices_beyond_the_last_offset_are_ignored(mode: str, isa: str) -> None:
    """Also if they are out of range and their weights are NaN. The gradient of these weights is zero."""
    table = torch.randn(E, D, requires_grad=True)
    weights = torch.tensor([1.0, 2.0, float("nan"), float("nan")], requires_grad=True)
    out = functional.embedding_bag(
        integers(1, 2, E, -5), table, integers(0, 2), mode=mode, per_sample_weights=weights, include_last_offset=True
    )
    out.sum().backward()
    assert out.shape == (1, D) and out.isfinite().all() and table.grad.isfinite().all()
    assert not table.grad[[0, 3, 4, 5]].any() and weights.grad[2:].tolist() == [0.0, 0.0]


# ---- errors occur before writes


@modes
@pytest.mark.parametrize("optimizer", range(4), ids=["SGD", "Adagrad", "row-wise Adagrad", "Adam"])
def test_a_step_that_raises_does_not_modify_the_table(optimizer: int, mode: str) -> None:
    numbers = [[0.1], [0.1, 1e-10], [0.1, 1e-10], [0.1, 0.9, 0.99, 1e-8, 1.0]][optimizer]
    state = [None, torch.ones(E, D), torch.ones(E), torch.ones(E, D)][optimizer]
    moment = torch.ones(E, D) if optimizer == 3 else None
    table = torch.randn(E, D)
    written = [t for t in (table, state, moment) if t is not None]
    before = [t.clone() for t in written]
    arg = torch.zeros((2, D) if mode in ("max", "min") else 0, dtype=torch.int32)
    number = BAG_MODES.index(mode)
    for rows, offsets in [((0, 1, 2, E), (0, 2)), ((-1, 1, 2, 3), (0, 2)), ((0, 1, 2, 3), (0, 5)), ((0,), (0, -1))]:
        with pytest.raises(VALUES, match="must"):
            ops.embedding_bag_update_(
                table, state, moment, optimizer, numbers, torch.ones(2, D), arg, integers(*rows), integers(*offsets),
                None, number,
            )  # fmt: skip
        assert all(torch.equal(t, b) for t, b in zip(written, before, strict=True))


def test_a_renorm_that_raises_does_not_modify_the_table() -> None:
    table = torch.full((E, D), 5.0)
    for rows in (integers(0, 1, E), integers(0, -1), integers(2**32)):
        with pytest.raises(VALUES, match="must"):
            ops.embedding_bag_renorm_(table, rows, 1.0, 2.0)
        with pytest.raises(VALUES, match="must"):
            functional.embedding_bag(rows[None], table, max_norm=1.0)
        with pytest.raises(VALUES, match="must"):
            functional.embedding(rows, table, max_norm=1.0)
    assert (table == 5).all()


# ---- the ops, called directly

CASE = BagCase(E=E, D=D, lengths=(2, 0, 3), weights="same", why="good")
NARROW, WIDE = torch.float16, torch.float64


def op_arguments(op: str, mode: str) -> list:
    inputs = make_bag_inputs(CASE, torch.float32, mode)
    bags = list(inputs.op_arguments())
    _, arg = ops.embedding_bag_forward(inputs.weight, *bags)
    if op in ("embedding_bag", "embedding_bag_forward"):
        return [inputs.weight, *bags]
    if op == "embedding_bag_bytes":
        return [ops.embedding_bag_pack_bytes(inputs.weight), *bags]
    if op in ("embedding_bag_backward", "embedding_bag_backward_sparse"):
        return [inputs.dout, arg, E, *bags]
    if op == "embedding_bag_backward_weights":
        return [inputs.dout, arg, inputs.weight, *bags]
    assert op == "embedding_bag_update_"
    return [inputs.weight, torch.ones(E, D), None, 1, [0.1, 1e-10], inputs.dout, arg, *bags]


OPS = {
    "embedding_bag": 1,
    "embedding_bag_forward": 1,
    "embedding_bag_bytes": 1,
    "embedding_bag_backward": 3,
    "embedding_bag_backward_sparse": 3,
    "embedding_bag_backward_weights": 3,
    "embedding_bag_update_": 7,
}  # op -> position of its bags: indices, offsets, weights, mode, padding_idx, include_last_offset, mean_by

BAD_BAGS = {
    "index E": (0, integers(0, 1, 2, 3, E)),
    "index -1": (0, integers(-1, 1, 2, 3, 4)),
    "index far": (0, integers(0, 1, 2, 3, 2**32)),
    "indices float": (0, torch.zeros(5)),
    "indices 0-D": (0, torch.tensor(1)),
    "indices 3-D": (0, torch.zeros(1, 1, 5).long()),
    "indices 2-D with offsets": (0, torch.zeros(1, 5).long()),
    "indices too few": (0, integers(0)),
    "offsets absent": (1, None),
    "offsets float": (1, torch.zeros(3)),
    "offsets 2-D": (1, integers(0, 2, 2)[None]),
    "offsets decreasing": (1, integers(0, 3, 2)),
    "offsets negative": (1, integers(0, -1, 2)),
    "offsets first": (1, integers(1, 2, 2)),
    "offsets beyond": (1, integers(0, 2, 6)),
    "weights too few": (2, torch.ones(4)),
    "weights 2-D": (2, torch.ones(1, 5)),
    "weights double": (2, torch.ones(5).double()),
    "weights integer": (2, torch.ones(5).long()),
    "mode 4": (3, 4),
    "mode -1": (3, -1),
    "padding_idx E": (4, E),
    "mean_by 2": (6, 2),
    "mean_by -1": (6, -1),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bad", BAD_BAGS)
def test_ops_raise_for_invalid_bags(op: str, bad: str) -> None:
    for mode in BAG_MODES:
        arguments = op_arguments(op, mode)
        getattr(ops, op)(*arguments)
        at, value = BAD_BAGS[bad]
        arguments[OPS[op] + at] = value
        if bad == "padding_idx E":
            succeeds_or_raises(op, arguments)
            continue
        with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag\w*: .* must"):
            getattr(ops, op)(*arguments)


def succeeds_or_raises(op: str, arguments: list) -> None:
    """A padding_idx outside of the table may be accepted or raise."""
    try:
        getattr(ops, op)(*arguments)
    except VALUES as error:
        assert "must" in str(error)


GRADS = {
    "rows": torch.ones(2, D),
    "columns": torch.ones(3, D + 1),
    "1-D": torch.ones(3 * D),
    "dtype": torch.ones(3, D).double(),
    "integer": torch.ones(3, D).long(),
    "none": torch.ones(0),
}
ARGS = {
    "rows": torch.zeros(2, D, dtype=torch.int32),
    "columns": torch.zeros(3, D - 1, dtype=torch.int32),
    "1-D": torch.zeros(3 * D, dtype=torch.int32),
    "dtype": torch.zeros(3, D, dtype=torch.int64),
    "float": torch.zeros(3, D),
    "none": torch.zeros(0, dtype=torch.int32),
}
BACKWARD = [op for op in OPS if OPS[op] > 1]


@pytest.mark.parametrize("op", BACKWARD)
def test_ops_raise_for_invalid_gradients_and_positions(op: str) -> None:
    for mode in BAG_MODES:
        first = OPS[op] - 2 if op == "embedding_bag_update_" else 0
        for kind, grad in GRADS.items():
            arguments = op_arguments(op, mode)
            if kind == "columns" and op in ("embedding_bag_backward", "embedding_bag_backward_sparse"):
                grad = torch.ones(4, D)  # the op takes D from the gradient
            arguments[first] = grad
            with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag\w*: .* must"):
                getattr(ops, op)(*arguments)
        if mode in ("max", "min"):
            for arg in ARGS.values():
                arguments = op_arguments(op, mode)
                arguments[first + 1] = arg
                with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag\w*: .* must"):
                    getattr(ops, op)(*arguments)


@pytest.mark.parametrize("op", BACKWARD)
@pytest.mark.parametrize("position", [3, 2**20, 2**31 - 1, -2, -(2**31)])
def test_positions_outside_of_the_bag_are_not_read(op: str, position: int) -> None:
    """They raise, or give a zero gradient."""
    for mode in ("max", "min"):
        arguments = op_arguments(op, mode)
        arguments[OPS[op] - 2 if op == "embedding_bag_update_" else 1] = torch.full((3, D), position, dtype=torch.int32)
        try:
            result = getattr(ops, op)(*arguments)
        except VALUES as error:
            assert "must" in str(error)
            continue
        for t in result if isinstance(result, (tuple, list)) else [result]:
            assert t is None or not t.is_floating_point() or not t.any()


@pytest.mark.parametrize("number", [-1, 0, 1, E - 1])
def test_gradient_of_too_few_rows_raises(number: int) -> None:
    for op in ("embedding_bag_backward", "embedding_bag_backward_sparse"):
        for mode in BAG_MODES:
            arguments = op_arguments(op, mode)
            arguments[3] = integers(0, 5, 1, 2, 5)
            arguments[2] = number
            with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag\w*: .* must"):
                getattr(ops, op)(*arguments)


UPDATES = {
    "optimizer 4": (3, 4),
    "optimizer -1": (3, -1),
    "no numbers": (4, []),
    "too few numbers": (4, [0.1]),
    "too many numbers": (4, [0.1, 0.2, 0.3, 0.4]),
    "no state": (1, None),
    "state of other rows": (1, torch.ones(E - 1, D)),
    "state of other columns": (1, torch.ones(E, D + 1)),
    "state 1-D": (1, torch.ones(E)),
    "state dtype": (1, torch.ones(E, D).double()),
    "state half": (1, torch.ones(E, D).half()),
    "table 1-D": (0, torch.ones(E)),
    "table dtype": (0, torch.ones(E, D).long()),
    "table expanded": (0, torch.ones(1, D).expand(E, D)),
}


@pytest.mark.parametrize("bad", UPDATES)
def test_update_raises_for_invalid_arguments(bad: str) -> None:
    arguments = op_arguments("embedding_bag_update_", "sum")
    at, value = UPDATES[bad]
    arguments[at] = value
    with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag_update_: .* must"):
        ops.embedding_bag_update_(*arguments)


def test_invalid_quantized_tables_raise() -> None:
    rows = integers(0, 1)[None]
    for packed in (torch.zeros(4, 8, dtype=torch.uint8)[:, :7], torch.zeros(4, 20), torch.zeros(20, dtype=torch.uint8)):
        with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag_bytes: .* must"):
            ops.embedding_bag_bytes(packed, rows, None, None, 0)
    for table in (torch.ones(4), torch.ones(4, 4).long()):
        with pytest.raises((*VALUES, *TYPES), match=r"embedding_bag_pack_bytes: .* must"):
            ops.embedding_bag_pack_bytes(table)


def bags_arguments(op: str) -> list:
    """Two tables, 6 x 5 with two features and 4 x 3 with one, and two samples: six bags."""
    weights, features = [torch.ones(6, 5), torch.ones(4, 3)], [2, 1]
    bags = [integers(0, 5, 1, 2, 3, 3), integers(0, 1, 2, 3, 4, 5, 6), None, 0, -1, True]
    grad, arg = torch.ones(2, 13), torch.zeros(0, dtype=torch.int32)
    return {
        "embedding_bags": [weights, features, *bags],
        "embedding_bags_forward": [weights, features, *bags],
        "embedding_bags_backward": [grad, arg, [6, 4], [5, 3], features, *bags],
        "embedding_bags_backward_sparse": [grad, arg, [6, 4], [5, 3], features, *bags],
        "embedding_bags_backward_weights": [grad, arg, weights, features, *bags[:2], torch.ones(6), *bags[3:]],
        "embedding_bags_update_": [weights, [], [], 0, [0.1], grad, arg, features, *bags],
    }[op]


COLLECTIONS = {op: bags_arguments(op) for op in (
    "embedding_bags", "embedding_bags_forward", "embedding_bags_backward", "embedding_bags_backward_sparse",
    "embedding_bags_backward_weights", "embedding_bags_update_",
)}  # fmt: skip


@pytest.mark.parametrize("op", COLLECTIONS)
def test_collections_raise_for_invalid_arguments(op: str) -> None:
    good = bags_arguments(op)
    getattr(ops, op)(*good)
    features = {
        "embedding_bags": 1,
        "embedding_bags_forward": 1,
        "embedding_bags_backward_weights": 3,
        "embedding_bags_update_": 7,
    }.get(op, 4)
    changes = [
        (features, [2]),
        (features, [2, 1, 1]),
        (features, [2, -1]),
        (features, [0, 3]),
        (features, [2, 2]),
        (features + 1, integers(0, 5, 1, 2, 4, 3)),  # in range in the first table, not in the second
        (features + 1, integers(6, 5, 1, 2, 3, 3)),
        (features + 1, integers(0, 5, 1, -1, 3, 3)),
        (features + 2, None),
        (features + 2, integers(0, 1, 2, 3, 4, 5)),
        (features + 2, integers(0, 1, 2, 3, 4, 5, 7)),
        (features + 2, integers(0, 1, 3, 2, 4, 5, 6)),
        (features + 2, integers(1, 1, 2, 3, 4, 5, 6)),
        (features + 5, False),
        (features + 3, torch.ones(5)),
        (features + 4, 4),
    ]
    if "forward" in op or op == "embedding_bags":
        changes += [(0, []), (0, [torch.ones(6, 5)]), (0, [torch.ones(6, 5), torch.ones(4, 3).double()])]
    if "backward" in op or "update" in op:
        grad = features - 2 if "update" in op else 0
        changes += [(grad, torch.ones(2, 12)), (grad, torch.ones(3, 13))]
    if op in ("embedding_bags_backward_weights", "embedding_bags_update_"):
        changes += [(grad, torch.ones(2, 13).double())]
    for at, value in changes:
        arguments = bags_arguments(op)
        arguments[at] = value
        with pytest.raises((*VALUES, *TYPES), match=r"embedding_bags\w*: .* must"):
            getattr(ops, op)(*arguments)


# ---- the module

CONSTRUCTORS = {
    "padding_idx E": (dict(num_embeddings=4, embedding_dim=3, padding_idx=4), form("padding_idx", got="4")),
    "padding_idx below -E": (dict(num_embeddings=4, embedding_dim=3, padding_idx=-5), form("padding_idx", got="-5")),
    "_weight of another shape": (
        dict(num_embeddings=4, embedding_dim=3, _weight=torch.ones(4, 4)),
        form("_weight", got=r".*\[4, 4\]"),
    ),
    "num_embeddings negative": (dict(num_embeddings=-1, embedding_dim=3), form("num_embeddings", got="-1")),
    "embedding_dim negative": (dict(num_embeddings=4, embedding_dim=-3), form("embedding_dim", got="-3")),
}


@pytest.mark.parametrize("cls", [nn.EmbeddingBag, nn.Embedding], ids=["EmbeddingBag", "Embedding"])
@pytest.mark.parametrize(("arguments", "text"), CONSTRUCTORS.values(), ids=CONSTRUCTORS)
def test_constructor_errors(arguments: dict, text: str, cls: type) -> None:
    with pytest.raises((ValueError, RuntimeError), match=text):
        cls(**arguments)


def test_module_errors() -> None:
    for make, error, text in (
        (lambda: nn.EmbeddingBag(4, 3, mode="prod")(torch.zeros(1, 1).long()), ValueError, form("mode")),
        (lambda: nn.EmbeddingBag(4, 3, weight_norm="none")(torch.zeros(1, 1).long()), ValueError, form("weight_norm")),
        (lambda: nn.EmbeddingBag(4, 3, fused_optimizer="SGD"), TypeError, form("fused_optimizer")),
        (lambda: nn.EmbeddingBag.from_pretrained(torch.ones(4)), (ValueError, AssertionError), form("embeddings")),
        (lambda: nn.Embedding.from_pretrained(torch.ones(4)), (ValueError, AssertionError), form("embeddings")),
    ):
        with pytest.raises(error, match=text):
            make()


# ---- exceptions of torch


def test_exception_types_match_torch() -> None:
    """Except for cases that torch does not support: mixed integer dtypes, weights in each mode, sparse max."""
    differs = {"weights double", "weights half", "weights integer", "weights of another half"}  # RuntimeError there
    for name, (good, change, error, _) in FUNCTIONAL.items():
        arguments = good | change
        if "weight_norm" in arguments or name in differs or "elsewhere" in name:
            continue
        try:
            torch.nn.functional.embedding_bag(**arguments)
        except (ValueError, NotImplementedError) as theirs:
            kinds = error if isinstance(error, tuple) else (error,)
            assert issubclass(type(theirs), kinds) or (isinstance(theirs, ValueError) and ValueError in kinds), name
        except Exception:  # AssertionError or RuntimeError in torch, and a subclass of it in seqkernels
            continue


def test_calls_after_an_error() -> None:
    inputs = make_bag_inputs(CASE, torch.float32, "max")
    want = run_bag(functional.embedding_bag, inputs)
    for _ in range(3):
        bad = dataclasses.replace(inputs, indices=inputs.indices + E)
        with pytest.raises(VALUES):
            run_bag(functional.embedding_bag, bad)
        assert_same_bits(run_bag(functional.embedding_bag, inputs), want)


CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
}


@pytest.mark.parametrize("layout", CALLS)
def test_tables_that_are_not_strided_raise(layout: str) -> None:
    if layout == "mkldnn" and not torch.backends.mkldnn.is_available():
        pytest.skip("torch was built without oneDNN")
    with pytest.raises((TypeError, ValueError, NotImplementedError, RuntimeError)):
        functional.embedding_bag(integers(0, 1)[None], CALLS[layout](torch.ones(E, D)))
