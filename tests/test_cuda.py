"""Modules on a GPU with realistic sizes: parity with the definition, CUDA graphs, streams, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels
from seqkernels import reference
from support.cases import TOLERANCE, ragged

pytestmark = pytest.mark.cuda

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
KINDS = pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Disables TF32."""
    before = torch.backends.cudnn.rnn.fp32_precision
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, slack: float = 1.0) -> None:
    assert found.isfinite().all(), what
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp(min=1e-3)
    assert error <= slack * TOLERANCE[dtype], f"{what}: off by {error:.2e}"


# B, T, D, H on both sides of the limits of each tier.
SIZES = [
    (16, 40, 64, 128),
    (70, 20, 100, 256),
    (33, 20, 512, 512),
    (16, 20, 768, 768),
    (3, 12, 1024, 1024),
    (70, 12, 256, 1024),
    (9, 12, 128, 2040),
]


@DTYPES
@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", ["dense", "lengths", "packed"])
def test_layers(kind: str, size: tuple[int, ...], form: str, dtype: torch.dtype) -> None:
    B, T, D, H = size
    layer = getattr(seqkernels.nn, kind)(D, H, bidirectional=True).to("cuda", dtype)
    x = torch.randn(T, B, D).to("cuda", dtype)
    lengths = torch.tensor(ragged(B, T, zeros=form == "lengths", ordered=form == "packed"))
    batch_sizes, many = None, None
    if form == "packed":
        packed = pack_padded_sequence(x, lengths)
        x, batch_sizes = packed.data, packed.batch_sizes
    elif form == "lengths":
        many = lengths.cuda()
    weights = list(layer.parameters())
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    name = "rnn_tanh" if kind == "RNN" else kind.lower()
    function = getattr(seqkernels.functional, name)
    options: dict[str, Any] = {"batch_sizes": batch_sizes, "lengths": many, "bidirectional": True}
    output, states = function(leaves[0], None, leaves[1:], **options)
    wide = [t.detach().double().requires_grad_() for t in (x, *weights)]
    wanted, wanted_states = getattr(reference, name)(wide[0], None, wide[1:], **options)
    upstream = torch.randn_like(output)
    close(output, wanted, dtype, "output")
    for a, b in zip(*([s] if isinstance(s, Tensor) else s for s in (states, wanted_states))):
        close(a, b, dtype, "state")
    found = torch.autograd.grad(output, leaves, upstream)
    expected = torch.autograd.grad(wanted, wide, upstream.double())
    for i, (a, b) in enumerate(zip(found, expected)):
        close(a, b, dtype, f"gradient {i}", 4 if dtype.itemsize == 2 else 2)


@KINDS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_are_independent_of_the_run_and_the_batch(kind: str, size: tuple[int, ...]) -> None:
    B, T, D, H = size
    layer = getattr(seqkernels.nn, kind)(D, H).to("cuda", torch.bfloat16)
    x = torch.randn(T, B, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        output, _ = layer(x)
        return [output, *torch.autograd.grad(output, wanted, torch.ones_like(output))]

    first = run()
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))
    few, _ = layer(x[:, 1:3])
    assert torch.equal(few, first[0][:, 1:3])


# All options of a kind on CUDA, with and without random masks.
DRAWN = dict(zoneout_h=0.1, variational_dropout=0.2, gate_clip=4.0, memory_efficient=True)
OPTIONS: dict[str, dict[str, Any]] = {
    "LSTM": DRAWN | dict(peephole=True, cell_clip=3.0, zoneout_c=0.2, recurrent_dropout=0.1),
    "GRU": DRAWN | dict(recurrent_dropout=0.1),
    "RNN": DRAWN,
}
TIER_CASES = [  # cluster, two kinds of grid, steps
    *((H, torch.bfloat16) for H in (128, 768, 100, 1024)),
    (64, torch.float32),
]


def without_synchronization(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A CUDA graph of a call, and the output tensors of its replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    return graph, captured


@pytest.mark.parametrize("form", ["lengths", "packed"])
@pytest.mark.parametrize("options", ["plain", "options"])
@KINDS
@pytest.mark.parametrize(("H", "dtype"), TIER_CASES, ids=str)
def test_no_synchronization_and_graph_capture(kind: str, H: int, dtype: torch.dtype, options: str, form: str) -> None:
    """A replay and a call with the same seed have the same masks."""
    B, T, D = 5, 9, 64
    given = OPTIONS[kind] if options == "options" else {}
    layer = getattr(seqkernels.nn, kind)(D, H, num_layers=2, **given).to("cuda", dtype).train()
    lengths = torch.tensor([9, 4, 3, 9, 1])
    x = torch.randn(T, B, D, device="cuda", dtype=dtype)
    on_device, packed, reset = lengths.cuda(), None, None
    if form == "packed":
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        x = packed.data.detach()
    if given:
        reset = torch.rand(x.shape[:-1], device="cuda") < 0.2
    x.requires_grad_()
    wanted = [x, *layer.parameters()]

    def run() -> list[Tensor]:
        if packed is None:
            output, states = layer(x, lengths=on_device, reset=reset)
        else:
            sequence, states = layer(PackedSequence(x, *packed[1:]), reset=reset)
            output = sequence.data
        last = states if isinstance(states, tuple) else (states,)
        return [output, *last, *torch.autograd.grad(output.sum(), wanted)]

    without_synchronization(run)
    graph, captured = capture(run)
    with torch.no_grad():
        x.normal_()
        if packed is None:
            on_device.copy_(torch.tensor([1, 9, 9, 0, 5]))
        if reset is not None:
            reset.logical_not_()
    torch.cuda.manual_seed(3)
    graph.replay()
    torch.cuda.manual_seed(3)
    for a, b in zip(captured, run(), strict=True):
        assert torch.equal(a, b)


@KINDS
@pytest.mark.parametrize("as_list", [False, True])
def test_no_synchronization_for_lengths_on_the_host(kind: str, as_list: bool) -> None:
    layer = getattr(seqkernels.nn, kind)(64, 128).to("cuda", torch.bfloat16)
    x = torch.randn(9, 5, 64, device="cuda", dtype=torch.bfloat16)
    lengths = torch.tensor([9, 0, 3, 9, 1])
    (found,) = without_synchronization(lambda: [layer(x, lengths=lengths.tolist() if as_list else lengths)[0]])
    assert torch.equal(found, layer(x, lengths=lengths.cuda())[0])
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, T\] = \[0, 9\], got 10"):
        layer(x, lengths=[9, 10, 0, 0, 0])


def test_layers_without_cuda_kernels_raise() -> None:
    x = torch.randn(9, 5, 64, device="cuda")
    for options in (dict(num_heads=2), dict(proj_size=32), dict(layer_norm=True)):
        with pytest.raises(NotImplementedError, match="no backend supports"):
            seqkernels.nn.LSTM(64, 128, device="cuda", **options)(x)


def test_explain_for_the_current_device() -> None:
    has = torch.cuda.get_device_properties(0)
    described: dict[str, Any] = dict(
        capability=(has.major, has.minor),
        multiprocessors=has.multi_processor_count,
        shared_memory=has.shared_memory_per_block_optin,
    )
    for H in (128, 512, 768, 1024):
        asked: dict[str, Any] = dict(B=16, T=32, D=64, H=H, dtype=torch.bfloat16, device="cuda")
        here, reckoned = seqkernels.explain("lstm", **asked), seqkernels.explain("lstm", **asked, **described)
        for walk in ("forward", "backward"):
            assert here[walk]["tier"] == reckoned[walk]["tier"], (here[walk], reckoned[walk])


CELLS = pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])


@DTYPES
@CELLS
@pytest.mark.parametrize("size", [(1, 32, 32), (70, 100, 257), (512, 512, 1024)], ids=str)
def test_cells(name: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    B, D, H = size
    ours = getattr(seqkernels.nn, name)(D, H).to("cuda", dtype)
    theirs = getattr(nn, name)(D, H).to("cuda", torch.float64)
    theirs.load_state_dict(ours.state_dict())
    states = 2 if name == "LSTMCell" else 1
    drawn = [torch.randn(B, width).to("cuda", dtype) for width in (D, *[H] * states)]
    upstream = [torch.randn(B, H).to("cuda", dtype) for _ in range(states)]
    runs = []
    for cell, kind in ((ours, dtype), (theirs, torch.float64)):
        x, *before = leaves = [t.to(kind).requires_grad_() for t in drawn]
        after = cell(x, tuple(before) if states > 1 else before[0])
        after = after if states > 1 else (after,)
        gradients = torch.autograd.grad(after, [*leaves, *cell.parameters()], [g.to(kind) for g in upstream])
        runs.append((after, gradients))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        close(a, b, dtype, "state")
    for i, (a, b) in enumerate(zip(runs[0][1], runs[1][1], strict=True)):
        close(a, b, dtype, f"gradient {i}", 4 if dtype.itemsize == 2 else 2)


@CELLS
def test_no_synchronization_and_graph_capture_of_cells(name: str) -> None:
    cell = getattr(seqkernels.nn, name)(64, 100).to("cuda", torch.bfloat16)
    x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, *cell.parameters()]

    def run() -> list[Tensor]:
        state = cell(x, cell(x))
        h = state if isinstance(state, Tensor) else state[0]
        return [h, *torch.autograd.grad(h.sum(), wanted)]

    without_synchronization(run)
    graph, captured = capture(run)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for a, b in zip(captured, run()):
        assert torch.equal(a, b)


@CELLS
def test_cell_matches_a_layer_of_one_step(name: str) -> None:
    """Cells use a layer of one step while torch traces or transforms them."""
    cell = getattr(seqkernels.nn, name)(64, 100).to("cuda", torch.bfloat16)
    x = torch.randn(5, 64, device="cuda", dtype=torch.bfloat16)
    plain, compiled = cell(x), torch.compile(cell, fullgraph=True)(x)
    for a, b in zip(*((s,) if isinstance(s, Tensor) else s for s in (plain, compiled)), strict=True):
        assert torch.equal(a, b)


def test_tf32_uses_the_setting_of_cudnn() -> None:
    layer = seqkernels.nn.LSTM(256, 256).cuda()
    x = torch.randn(30, 16, 256, device="cuda")
    errors = {}
    wide_layer = seqkernels.nn.LSTM(256, 256).cuda().double()
    wide_layer.load_state_dict(layer.state_dict())
    wide, _ = wide_layer(x.double())
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        errors[precision] = (layer(x)[0].double() - wide).abs().max().item()
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 5e-3
    cell, wide_cell = (seqkernels.nn.LSTMCell(256, 256).cuda().to(dtype) for dtype in (torch.float32, torch.float64))
    wide_cell.load_state_dict(cell.state_dict())
    for precision in ("ieee", "tf32"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        errors[precision] = (cell(x[0])[0].double() - wide_cell(x[0].double())[0]).abs().max().item()
    assert errors["ieee"] < 1e-5 < errors["tf32"] < 5e-3


@pytest.mark.parametrize("module", ["lstm", "bag"])
def test_compile_fullgraph(module: str) -> None:
    layer: nn.Module
    if module == "lstm":
        layer, x = seqkernels.nn.LSTM(16, 32).cuda(), torch.randn(5, 3, 16, device="cuda")
    else:
        layer, x = seqkernels.nn.EmbeddingBag(50, 32, mode="max").cuda(), torch.randint(0, 50, (7, 3), device="cuda")

    def call(x: Tensor) -> Tensor:
        return layer(x)[0] if module == "lstm" else layer(x)

    wanted = list(layer.parameters())
    plain = call(x)
    fused = torch.compile(call, fullgraph=True)(x)
    assert torch.equal(plain, fused)
    for a, b in zip(torch.autograd.grad(plain.sum(), wanted), torch.autograd.grad(fused.sum(), wanted)):
        assert torch.equal(a, b)


# ---- bags


@pytest.mark.parametrize("D", [16, 64, 128, 260])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@DTYPES
def test_bags(mode: str, D: int, dtype: torch.dtype) -> None:
    """Frequent rows, long bags, empty bags."""
    E = 20_000
    lengths = torch.randint(0, 40, (3000,))
    lengths[::7] = 0
    lengths[5] = 9000
    offsets = (lengths.cumsum(0) - lengths).cuda()
    indices = torch.randint(0, E, (int(lengths.sum()),), device="cuda")
    indices[::3] = 11
    table = torch.randn(E, D).to("cuda", dtype).requires_grad_()
    weights = (torch.rand(len(indices)) + 0.5).to("cuda", dtype).requires_grad_()
    options: dict[str, Any] = dict(mode=mode, padding_idx=5)
    output = seqkernels.functional.embedding_bag(indices, table, offsets, per_sample_weights=weights, **options)
    wide = [t.detach().double().requires_grad_() for t in (table, weights)]
    wanted = reference.embedding_bag(indices, wide[0], offsets, per_sample_weights=wide[1], **options)
    upstream = torch.randn_like(output)
    close(output, wanted, dtype, "output")
    found = torch.autograd.grad(output, (table, weights), upstream)
    expected = torch.autograd.grad(wanted, wide, upstream.double())
    if mode == "max" and dtype.itemsize == 2:
        return  # rounding produces equal values, which select another row
    for a, b in zip(found, expected):
        close(a, b, dtype, "gradient", 4)


def test_no_synchronization_and_graph_capture_of_bags() -> None:
    table = torch.randn(1000, 64, device="cuda", requires_grad=True)
    indices, offsets = torch.randint(0, 1000, (500,), device="cuda"), torch.arange(0, 500, 10, device="cuda")

    def run() -> tuple[Tensor, Tensor]:
        output = seqkernels.functional.embedding_bag(indices, table, offsets, mode="mean")
        return output, torch.autograd.grad(output.sum(), table)[0]

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    indices.copy_(torch.randint(0, 1000, (500,)))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, run()))


@pytest.mark.parametrize("optimizer", ["FusedSGD", "FusedAdagrad", "FusedRowwiseAdagrad", "FusedAdam"])
def test_fused_optimizers_match_the_cpu(optimizer: str) -> None:
    table = torch.randn(300, 64)
    indices = torch.randint(0, 300, (200, 5))
    moved = []
    for device in ("cpu", "cuda"):
        fused = getattr(seqkernels.nn, optimizer)(lr=0.1)
        bag = seqkernels.nn.EmbeddingBag.from_pretrained(table.clone(), freeze=False, mode="sum", fused_optimizer=fused)
        bag = bag.to(device)
        for _ in range(3):
            bag(indices.to(device)).square().sum().backward()
        moved.append(bag.weight.detach().cpu())
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-4, atol=1e-4)


def test_index_out_of_range_is_skipped_on_cuda() -> None:
    """Without SEQKERNELS_CHECKED, calls do not synchronize to raise an error; the index is skipped."""
    table = torch.randn(10, 8, device="cuda")
    indices = torch.tensor([[1, 99, -5]], device="cuda")
    output = seqkernels.functional.embedding_bag(indices, table, mode="sum")
    assert torch.equal(output[0], table[1])
    torch.cuda.synchronize()
