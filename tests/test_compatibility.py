"""docs/compatibility.md: each cell of its table 'What works with what' is one of these tests or of those it names."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import seqkernels
from support.workers import run_workers

ROOT = Path(__file__).parents[1]
close = torch.testing.assert_close
leaves = torch.utils._pytree.tree_leaves
library = seqkernels.nn
X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))  # the same in all processes
IDS = torch.tensor([[1, 2, 1, 0], [0, 1, 3, 4], [8, 8, 2, 2]])


class Tables(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.rows, self.bag = library.Embedding(9, 8, **options), library.EmbeddingBag(9, 8, mode="max", **options)

    def forward(self, ids: Tensor) -> Tensor:
        return self.rows(ids).sum(1) + self.bag(ids)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = library.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Cells(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm, self.gru = library.LSTMCell(8, 8, **options), library.GRUCell(8, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])


class Recurrent(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.lstm = library.LSTM(8, 8, batch_first=True, bidirectional=True, **options)
        self.gru = library.GRU(16, 8, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Transformer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = library.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, **options)
        self.decoder = library.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, self.encoder(x))


class Tagger(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.crf = library.CRF(8, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.crf(x, x.argmax(-1), reduction="none")


class Decoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.additive = library.AdditiveAttention(8, 8, **options)
        self.luong = library.LuongAttention(8, 8, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.luong(self.additive(x, x), x)


class Recognizer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, **options)
        self.loss = library.CTCLoss(reduction="none")

    def forward(self, x: Tensor) -> Tensor:
        log_probs = self.linear(x).log_softmax(-1).transpose(0, 1)
        lengths = torch.full((x.shape[0],), 5, device=x.device)
        return self.loss(log_probs, x[:, :2].argmax(-1), lengths, lengths - 3)


COLUMNS: dict[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "recurrent layers": (Recurrent, X),
    "cells": (Cells, X[:, 0].contiguous()),
    "Embedding, EmbeddingBag": (Tables, IDS),
    "attention": (Attention, X),
    "Transformer layers": (Transformer, X),
    "additive and Luong attention": (Decoder, X),
    "CRF": (Tagger, X),
    "CTC loss": (Recognizer, X),
}
columns = pytest.mark.parametrize("column", COLUMNS)


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(model.parameters())))


# ---- the page


def test_the_page_names_existing_tests() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    defined = {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`tests/" in line]
    assert len(rows) >= 14
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        assert len(cells) == 2 + len(COLUMNS) and all(cells), row
        named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", cells[-1])
        assert named and set(named) <= defined, row
    header = next(line for line in page.splitlines() if line.startswith("| route"))
    assert [cell.strip() for cell in header.strip("|").split("|")][1:-1] == list(COLUMNS)


# ---- compilers and export


@columns
def test_compile(column: str) -> None:
    torch._dynamo.reset()
    make, given = COLUMNS[column]
    model = make()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    got, want = compiled(given), model(given)
    close(got, want)
    for a, b in zip(gradients(model, got), gradients(model, want)):
        close(a, b)


@columns
def test_export(column: str, tmp_path: Path) -> None:
    make, given = COLUMNS[column]
    model, batch = make().eval(), torch.export.Dim("B", min=2, max=64)
    exported = torch.export.export(model, (given,), dynamic_shapes=({0: batch},))
    torch.export.save(exported, tmp_path / "model.pt2")
    loaded, other = torch.export.load(tmp_path / "model.pt2").module(), torch.cat([given, given])
    close(loaded(other), model(other))


class Every(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.models = nn.ModuleList(make() for make, _ in COLUMNS.values())

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model, x in zip(self.models, given))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_aotinductor(tmp_path: Path) -> None:
    """All columns in one package, because the compiler takes most of a minute."""
    model, batch = Every().eval(), torch.export.Dim("B", min=2, max=64)
    given = tuple(given for _, given in COLUMNS.values())
    with torch.no_grad():
        exported = torch.export.export(model, given, dynamic_shapes=(tuple({0: batch} for _ in given),))
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        other = tuple(torch.cat([x, x]) for x in given)
        close(tuple(torch._inductor.aoti_load_package(path)(*other)), model(*other))


@columns
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(column: str) -> None:
    make, given = COLUMNS[column]
    model, buffer = make(), io.BytesIO()
    torch.jit.save(torch.jit.trace(model, (given,)), buffer)
    buffer.seek(0)
    close(torch.jit.load(buffer)(given), model(given))


@columns
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_refused(column: str) -> None:
    with pytest.raises(NotImplementedError, match=r"use torch\.export and AOTInductor, or torch\.jit\.trace"):
        torch.jit.script(COLUMNS[column][0]())


@columns
def test_symbolic_trace(column: str) -> None:
    make, given = COLUMNS[column]
    model = make()
    close(torch.fx.symbolic_trace(model)(given), model(given))


@columns
@pytest.mark.filterwarnings("ignore")
def test_onnx_is_refused(column: str) -> None:
    make, given = COLUMNS[column]
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="seqkernels::"):
        torch.onnx.export(make().eval(), (given,), io.BytesIO(), dynamo=False)


# ---- processes


def _steps_in_two_processes(rank: int, folder: str) -> list[Tensor]:
    found = []
    for make, given in COLUMNS.values():
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(make())
        model(given[rank : rank + 1]).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return found


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    first, second = run_workers(_steps_in_two_processes, tmp_path)
    for (make, given), a, b in zip(COLUMNS.values(), first, second, strict=True):
        torch.manual_seed(0)
        model = make()
        each = [torch.cat([g.flatten() for g in gradients(model, model(given[i : i + 1]))]) for i in range(2)]
        assert torch.equal(a, b)
        close(a, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-5)


# ---- torch.func


@columns
def test_functorch(column: str) -> None:
    """vmap, jvp and gradients of samples."""
    make, given = COLUMNS[column]
    model = make()
    parameters = dict(model.named_parameters())

    def run(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (sample.unsqueeze(0),)).squeeze(0)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return run(parameters, sample).square().sum()

    close(torch.vmap(run, (None, 0))(parameters, given), model(given), rtol=1e-4, atol=1e-5)
    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, given)
    for total, grad in zip(gradients(model, model(given)), (each[name] for name in parameters)):
        close(grad.sum(0), total, rtol=1e-4, atol=1e-5)
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, tangent = torch.func.jvp(lambda p: loss(p, given[0]), (parameters,), (tangents,))
    want = sum((g * tangents[name]).sum() for name, g in torch.func.grad(loss)(parameters, given[0]).items())
    close(tangent, want, rtol=1e-3, atol=1e-4)


@columns
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_batched_gradients(column: str) -> None:
    make, given = COLUMNS[column]
    model = make()
    output, wanted = model(given), list(model.parameters())
    upstream = torch.randn(2, *output.shape)
    batched = torch.autograd.grad(output, wanted, upstream, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(upstream):
        for a, b in zip(batched, torch.autograd.grad(output, wanted, g, retain_graph=True)):
            close(a[i], b, rtol=1e-4, atol=1e-5)


# ---- counters, quantization, tensors without data, copies


@columns
def test_flop_counter(column: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    make, given = COLUMNS[column]
    model = make()
    with FlopCounterMode(display=False) as counter:
        model(given).sum().backward()
    assert (counter.get_total_flops() > 0) == (column not in ("Embedding, EmbeddingBag", "CRF"))


@columns
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantize_dynamic(column: str) -> None:
    make, given = COLUMNS[column]
    model = make()
    if column not in (
        "recurrent layers",
        "cells",
        "Embedding, EmbeddingBag",
    ):  # as in torch, only linear layers are quantized
        quantized = torch.ao.quantization.quantize_dynamic(model)
        close(quantized(given), model(given), rtol=0.2, atol=0.2)
        return
    with pytest.warns(UserWarning, match=r"keeps its dtype in torch\.ao\.quantization"):
        quantized = torch.ao.quantization.quantize_dynamic(model)
    close(quantized(given), model(given))


@columns
def test_meta_and_fake_tensors(column: str) -> None:
    make, given = COLUMNS[column]
    want = make()(given).shape
    assert make(device="meta")(given.to("meta")).shape == want
    with FakeTensorMode() as mode:
        assert make()(mode.from_tensor(given)).shape == want


@columns
def test_copies_and_files(column: str, tmp_path: Path) -> None:
    """deepcopy, pickle, and a state_dict loaded with weights_only."""
    make, given = COLUMNS[column]
    model = make()
    want = model(given)
    torch.save(model, tmp_path / "module.pt")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for restored in (copy.deepcopy(model), torch.load(tmp_path / "module.pt", weights_only=False), other):
        assert torch.equal(restored(given), want)
