"""torch.utils.flop_counter.FlopCounterMode counts our ops as those of torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import seqkernels
from seqkernels.functional import scaled_dot_product_attention, varlen_attention

D, H = 5, 7
LENGTHS = (6, 4, 2)


def counted(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def of_step(module: nn.Module, *inputs: Any, train: bool) -> tuple[int, int]:
    """Operations of forward and of backward."""
    with torch.set_grad_enabled(train), FlopCounterMode(display=False) as counter:
        outputs = module(*inputs)
    forward = counter.get_total_flops()
    if not train:
        return forward, 0
    leaves = [t for t in torch.utils._pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    return forward, counted(lambda: sum(t.sum() for t in leaves).backward())


# torch's own layers in float64, which have no kernel of oneDNN, are products of linear layers.


@pytest.mark.parametrize("state", ["none", "given", "differentiable"])
@pytest.mark.parametrize("form", ["dense", "packed"])
@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"num_layers": 2, "bidirectional": True}),
        ("LSTM", {"proj_size": 3}),
        ("GRU", {"bidirectional": True}),
        ("RNN", {"num_layers": 2}),
    ],
    ids=str,
)
def test_layers_count_as_torch(name: str, options: dict, needs_dx: bool, form: str, state: str) -> None:
    found = []
    for library in (nn, seqkernels.nn):
        module = getattr(library, name)(D, H, dtype=torch.float64, **options)
        sequences = [torch.randn(n, D, dtype=torch.float64) for n in LENGTHS]
        x: Any = pack_sequence(sequences) if form == "packed" else torch.randn(6, 3, D, dtype=torch.float64)
        (x.data if form == "packed" else x).requires_grad_(needs_dx)
        count = module.num_layers * (2 if module.bidirectional else 1)
        hx: Any = torch.randn(count, 3, options.get("proj_size") or H, dtype=torch.float64)
        hx.requires_grad_(state == "differentiable")
        if name == "LSTM":
            hx = hx, torch.randn(count, 3, H, dtype=torch.float64)
        found.append([of_step(module, x, None if state == "none" else hx, train=train) for train in (True, False)])
    theirs, ours = found
    product = (
        2 * H * (options.get("proj_size") or H) * {"LSTM": 4, "GRU": 3, "RNN": 1}[name]
    )  # of a state and weight_hh
    if state == "given":  # our backward also computes the gradient of a state that requires none
        theirs[0] = theirs[0][0], theirs[0][1] + 3 * product * count
    if state != "differentiable" and form == "packed" and module.bidirectional:
        # torch's reverse direction also computes the gradient of the states with which the shorter sequences begin
        theirs[0] = theirs[0][0], theirs[0][1] - 2 * product * count // 2
    assert ours == theirs


def test_lengths_count_as_packed() -> None:
    module, x = seqkernels.nn.LSTM(D, H), torch.randn(6, 3, D)
    packed = pack_sequence([x[:n, i] for i, n in enumerate(LENGTHS)])
    want = of_step(module, packed, train=True)
    of_lengths = counted(lambda: module(x, lengths=torch.tensor(LENGTHS)))
    assert of_lengths == want[0] == 2 * sum(LENGTHS) * 4 * H * (D + H)
    assert counted(lambda: module(x, lengths=LENGTHS)[0].sum().backward()) == sum(want)


def test_recomputation_and_options_count() -> None:
    x = torch.randn(6, 3, D, requires_grad=True)
    plain, again = (of_step(seqkernels.nn.LSTM(D, H, memory_efficient=m), x, train=True) for m in (False, True))
    assert again == (plain[0], plain[1] + plain[0])
    products = 2 * 18 * 4 * H * (D + H)
    assert counted(lambda: seqkernels.nn.LSTM(D, H, layer_norm=True, zoneout_h=0.1)(x)) == products
    nested = seqkernels.nn.NestedLSTM(D, H)
    assert counted(lambda: nested(x)) == 2 * 18 * sum(p.numel() for p in nested.parameters() if p.dim() == 2)
    heads = seqkernels.nn.GRU(D, 8, num_heads=2)
    assert counted(lambda: heads(x)) == 2 * 18 * 3 * 8 * (D + 4)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_count_as_torch(name: str, train: bool) -> None:
    found = []
    for library in (nn, seqkernels.nn):
        states = torch.randn(2, 3, H, requires_grad=True)
        hx: Any = tuple(states) if name == "LSTMCell" else states[0]
        found.append(of_step(getattr(library, name)(D, H), torch.randn(3, D, requires_grad=True), hx, train=train))
    assert found[0] == found[1] and found[0][0] > 0


def test_multihead_attention_counts_as_torch() -> None:
    """torch counts products of attention only with need_weights: its kernel for CPUs has no formula."""
    x = torch.randn(6, 3, 8)
    ours, theirs = seqkernels.nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2)
    with torch.no_grad():
        want = counted(lambda: theirs(x, x, x))
        for need_weights in (True, False):
            assert counted(lambda need=need_weights: ours(x, x, x, need_weights=need)) == want


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)], ids=str)
def test_attention_counts_as_torch(heads: tuple[int, int]) -> None:
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    leaves = [torch.randn(2, n, t, d, requires_grad=True) for n, t, d in zip((*heads, heads[1]), (5, 7, 7), (8, 8, 6))]
    shapes = [t.shape for t in leaves]
    out: list[Tensor] = []
    forward = counted(lambda: out.append(scaled_dot_product_attention(*leaves, enable_gqa=True)))
    assert forward == sdpa_flop_count(*shapes)
    assert counted(lambda: out[0].sum().backward()) == sdpa_backward_flop_count((2, heads[0], 5, 6), *shapes)


def test_packed_attention_and_lengths_count_each_sequence() -> None:
    q, k = torch.randn(9, 2, 8), torch.randn(12, 2, 8)
    cu_q, cu_k = torch.tensor([0, 4, 9]), torch.tensor([0, 5, 12])
    want = 2 * 2 * (4 * 5 + 5 * 7) * (8 + 8)
    assert counted(lambda: varlen_attention(q, k, k, cu_q, cu_k)) == want
    q, k = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 8, 8)
    assert counted(lambda: scaled_dot_product_attention(q, k, k, lengths=([4, 5], [5, 7]))) == want


def test_lookups_count_nothing() -> None:
    """As those of torch."""
    ids = torch.tensor([[1, 2], [3, 4]])
    for library in (nn, seqkernels.nn):
        assert counted(lambda library=library: library.Embedding(9, 4)(ids).sum().backward()) == 0
        assert counted(lambda library=library: library.EmbeddingBag(9, 4)(ids).sum().backward()) == 0


def test_shapes_suffice_on_meta() -> None:
    module = seqkernels.nn.LSTM(D, H, device="meta")
    x = torch.randn(6, 3, D, device="meta")
    assert counted(lambda: module(x, lengths=LENGTHS)) == 2 * 18 * 4 * H * (D + H)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["seqkernels", "torch.utils.flop_counter"])
def test_import_order(first: str) -> None:
    """Importing seqkernels does not import the counter, which imports Triton."""
    code = f"""
import sys
import {first}
import seqkernels, torch
if "{first}" == "seqkernels":
    assert "torch.utils.flop_counter" not in sys.modules
from torch.utils.flop_counter import FlopCounterMode
x = torch.randn(5, 2, 4)
with FlopCounterMode(display=False) as counter:
    seqkernels.nn.LSTM(4, 3)(x)
assert counter.get_total_flops() == 2 * 10 * 12 * 7
assert torch.ops.seqkernels.lstm_forward in torch.utils.flop_counter.flop_registry
assert type(torch.utils.flop_counter.__loader__).__name__ == "SourceFileLoader"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
