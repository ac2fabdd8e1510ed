"""Random changes of valid arguments: each op and each public function returns or raises, and leaves its inputs alone.

The ops are those of the schemas that are registered, and their valid arguments are recorded from calls of the public
functions (support/calls.py).
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from support import calls
from support.fuzzing import EXCEPTIONS, bounded, changed, tried

# MemoryError: sizes of expanded tensors that fit into no memory.
ALLOWED = (*EXCEPTIONS, IndexError, MemoryError)
OPS = calls.registered_ops()
GROUPS: dict[str, list[str]] = {}
for _name in calls.calls():
    GROUPS.setdefault(re.split(r"[-,]", _name)[0], []).append(_name)


def test_all_ops_are_called() -> None:
    assert set(calls.calls_of_ops()) == set(OPS)


R = torch.randn
OVERFLOWS = {  # products and sums of numbers that wrap to ones that fit
    "recurrent_pack": (
        (R(24, 5), 4, 4, 2**62, 0),
        r"recurrent_pack: gates \* heads must divide the rows of weight, 24",
    ),
    "embedding_bags": (
        ([R(7, 5)] * 3, [2**63 - 1, 2**63 - 1, 4], torch.arange(6), torch.arange(7), None, 0, -1, True, 0),
        "embedding_bags: features must be at most 2147483648 for each table, got 9223372036854775807",
    ),
    "embedding_bags_backward": (
        (
            R(1, 8),
            torch.zeros(0, dtype=torch.int32),
            [7, 2**63 - 1],
            [5, 3],
            [1, 1],
            torch.tensor([1, 2]),
            torch.tensor([0, 1, 2]),
            None,
            0,
            -1,
            True,
            0,
            False,
        ),
        rf"embedding_bags_backward: a table must have at most {2**59} elements, got shape \[9223372036854775807, 3\]",
    ),
    "crf_viterbi": (
        (R(3, 4, 4), R(1, 1, 4, 4), None, None, None, None, 2**62),
        "crf_viterbi: paths must be fewer, got 4611686018427387904 of 4 tags",
    ),
    "multihead_attention_forward": (
        (R(2, 3, 24), None, (2**64 + 2) // 3, True, None, None, 0.3, 0, 0.0, None, 0),
        "multihead_attention_forward: heads must be at most 2147483648, got 6148914691236517206",
    ),
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_numbers_that_overflow(name: str) -> None:
    arguments, text = OVERFLOWS[name]
    with pytest.raises(RuntimeError, match=text):
        getattr(torch.ops.seqkernels, name)(*arguments)


def test_sizes_whose_products_overflow() -> None:
    op = torch.ops.seqkernels.gru_projected_prepared.default
    at = [a.name for a in op._schema.arguments].index("proj_size")
    arguments = list(calls.cloned(calls.calls_of_ops()["gru_projected_prepared"][0]))
    arguments[at] = 2**61
    with pytest.raises(RuntimeError, match=f"proj_size must be at most {2**40}, got {2**61}"):
        op(*arguments)


def test_packed_sequences_without_sizes() -> None:
    for invalid in (None, R(3), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"packed_sequences: batch_sizes must be int64 \[T\] with T > 0, got "):
            torch.ops.seqkernels.packed_sequences(invalid)


@pytest.mark.parametrize("name", OPS)
def test_none_for_a_tensor(name: str) -> None:
    """The dispatcher passes None on: the kernel raises, and so does the fake if a tensor is on the meta device."""
    op = getattr(torch.ops.seqkernels, name).default
    valid = calls.cloned(calls.calls_of_ops()[name][0])
    for at, argument in enumerate(op._schema.arguments):
        if isinstance(argument.type, torch.TensorType) and argument.name != "arg":  # of max and min, unread otherwise
            given = [*valid[:at], None, *valid[at + 1 :]]
            with pytest.raises((RuntimeError, ValueError)):
                op(*given)
            if calls.tensors_of(given) and name != "packed_sequences":
                text = f"{name}: {argument.name} must be a Tensor, got None"
                with pytest.raises(TypeError, match=text):
                    op(*pytree.tree_map(lambda x: x.to("meta") if isinstance(x, Tensor) else x, given))


def contents(values: Any) -> list[tuple[Tensor, bytes]]:
    """The tensors of a nest that have few elements, with their contents."""
    plain = [t for t in calls.tensors_of(values) if t.layout == torch.strided and not t.is_meta and t.numel() < 10**6]
    return [(t, stored(t)) for t in plain]


def stored(t: Tensor) -> bytes:
    if t.numel() == 0:
        return b""
    dense = torch.empty(t.numel(), dtype=t.dtype)  # of stride 1, which other tensors of one element may not have
    return bytes(dense.copy_(t.detach().reshape(-1)).view(torch.uint8).tolist())


def assert_unchanged(before: list[tuple[Tensor, bytes]]) -> None:
    for t, content in before:
        assert stored(t) == content


@pytest.mark.parametrize("name", OPS)
@bounded(examples=12)
@given(data=st.data())
def test_ops_with_changed_arguments(name: str, data: st.DataObject) -> None:
    op = getattr(torch.ops.seqkernels, name).default
    valid = calls.calls_of_ops()[name]
    arguments = list(calls.cloned(data.draw(st.sampled_from(valid))))
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(arguments) - 1))
        arguments[at] = data.draw(changed(arguments[at]), label=op._schema.arguments[at].name)
    written = [a.alias_info is not None for a in op._schema.arguments]
    before = contents([a for a, changes in zip(arguments, written) if not changes])
    tried(op, ALLOWED, *arguments)
    assert_unchanged(before)


@pytest.mark.parametrize("name", [n for n in GROUPS if not n.startswith("ops.")])
@bounded(examples=10)
@given(data=st.data())
def test_public_functions_with_changed_arguments(name: str, data: st.DataObject) -> None:
    call = calls.calls()[data.draw(st.sampled_from(GROUPS[name]))]
    arguments = dict(pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, call.arguments))
    for argument in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        if argument not in ("model", "step"):
            arguments[argument] = data.draw(changed(arguments[argument]), label=argument)
    grads = data.draw(st.booleans()) and call.with_gradients
    before = [] if "stream" in call.name or "max_norm" in call.name else contents(arguments)
    with torch.set_grad_enabled(grads):
        result = tried(call.function, ALLOWED, **arguments)
        differentiable = [r for r in calls.tensors_of(result) if r.requires_grad]
        if differentiable:
            total = sum(r.abs().sum() for r in differentiable)
            tried(total.backward, ALLOWED)
    assert_unchanged(before)
