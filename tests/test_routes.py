"""Ways out of Python: traces with gradients enabled, scripts, quantization, and packed sequences in torch.compile."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import seqkernels

X, IDS = torch.randn(5, 2, 4), torch.tensor([[1, 2, 1], [0, 1, 3]])
close = torch.testing.assert_close
leaves = torch.utils._pytree.tree_leaves
library = seqkernels.nn


def collection() -> nn.Module:
    return library.EmbeddingBagCollection([library.EmbeddingBagConfig(9, 4, ["a"])])


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...]]] = {
    **{name: (lambda name=name: getattr(library, name)(4, 3), (X,)) for name in ("LSTM", "GRU", "RNN", "MGU", "SLSTM")},
    "LSTM, options": (lambda: library.LSTM(4, 3, 2, bidirectional=True, peephole=True, return_all_states=True), (X,)),
    **{name: (lambda name=name: getattr(library, name)(4, 3), (X[0],)) for name in ("LSTMCell", "GRUCell", "RNNCell")},
    "Embedding": (lambda: library.Embedding(9, 4, padding_idx=1), (IDS,)),
    "Embedding, sparse": (lambda: library.Embedding(9, 4, sparse=True), (IDS,)),
    "EmbeddingBag": (lambda: library.EmbeddingBag(9, 4), (IDS,)),
    "EmbeddingBag, options": (
        lambda: library.EmbeddingBag(9, 4, mode="max", padding_idx=1, scale_grad_by_freq=True),
        (IDS,),
    ),
    "EmbeddingBagCollection": (collection, (IDS[0], torch.tensor([0, 1, 3]))),
    "MultiheadAttention": (lambda: library.MultiheadAttention(4, 2), (X, X, X)),
    "TransformerEncoderLayer": (lambda: library.TransformerEncoderLayer(4, 2, 8, 0.0), (X,)),
    "TransformerDecoderLayer": (lambda: library.TransformerDecoderLayer(4, 2, 8, 0.0), (X, X)),
    "PositionalEncoding": (lambda: library.PositionalEncoding(4), (X,)),
    "QuantizedEmbeddingBag": (lambda: library.QuantizedEmbeddingBag(9, 4), (IDS,)),
}
modules = pytest.mark.parametrize("name", MODULES)


# ---- torch.jit


@modules
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_traces_pass_the_check_of_torch(name: str, grad: bool) -> None:
    """The check records again without gradients, and compares the graphs."""
    make, inputs = MODULES[name]
    module, buffer = make(), io.BytesIO()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(module, inputs)
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    for got, want in zip(leaves(torch.jit.load(buffer)(*inputs)), leaves(module(*inputs)), strict=True):
        close(got, want)
    parameters = list(module.parameters())
    if parameters:

        def gradients(outputs: Any) -> list[Tensor | None]:
            total = sum(t.square().sum() for t in leaves(outputs) if t is not None and t.requires_grad)
            return [g if g is None else g.to_dense() for g in torch.autograd.grad(total, parameters, allow_unused=True)]

        for got, want in zip(gradients(traced(*inputs)), gradients(module(*inputs))):
            assert (got is None) == (want is None)
            if got is not None:
                close(got, want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_of_fused_optimizers_require_no_grad() -> None:
    bag = library.EmbeddingBag(9, 4, fused_optimizer=library.FusedSGD(lr=0.1))
    with pytest.raises(NotImplementedError, match=r"fused_optimizer requires torch\.no_grad\(\) in torch\.jit\.trace"):
        torch.jit.trace(bag, (IDS,))
    with torch.no_grad():
        assert torch.equal(torch.jit.trace(bag, (IDS,))(IDS.flip(0)), bag(IDS.flip(0)))


@modules
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("nested", [True, False])
def test_scripts_are_refused_with_another_route(name: str, nested: bool) -> None:
    module = MODULES[name][0]()
    text = rf"^{name.split(',')[0]}: torch\.jit\.script, .* is not supported; use torch\.export and AOTInductor"
    with pytest.raises(NotImplementedError, match=text):
        torch.jit.script(nn.Sequential(nn.Linear(2, 2), module) if nested else module)


# ---- quantization


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell", "Embedding", "EmbeddingBag"])
def test_quantization_warns_about_modules_that_it_skips(name: str) -> None:
    make, inputs = MODULES[name]
    model = nn.ModuleList([make(), nn.Linear(4, 2)])
    with pytest.warns(
        UserWarning, match=rf"^seqkernels\.nn\.{name} keeps its dtype in torch\.ao\.quantization; .* use "
    ):
        quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]) is type(model[0]) and type(quantized[1]) is not nn.Linear
    for got, want in zip(leaves(quantized[0](*inputs)), leaves(model[0](*inputs)), strict=True):
        assert torch.equal(got, want)
    module = make()
    assert not hasattr(module, "qconfig")
    with pytest.warns(UserWarning, match="keeps its dtype"):
        module.qconfig = None
    assert module.qconfig is None and "qconfig" in vars(module)
    del module.qconfig
    assert not hasattr(module, "qconfig")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_quantization_of_the_suggested_modules() -> None:
    ours, theirs = library.LSTM(4, 3), nn.LSTM(4, 3)
    theirs.load_state_dict(ours.state_dict())
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(theirs))
    close(quantized(X)[0], ours(X)[0], rtol=0.1, atol=0.05)
    bag = library.EmbeddingBag(9, 4)
    close(library.QuantizedEmbeddingBag.from_float(bag)(IDS), bag(IDS), rtol=0.1, atol=0.05)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
def test_linear_layers_of_transformer_layers_are_quantized() -> None:
    layer = library.TransformerEncoderLayer(4, 2, 8, 0.0)
    quantized = torch.ao.quantization.quantize_dynamic(layer)
    assert type(quantized.linear1) is not nn.Linear
    close(quantized(X), layer(X), rtol=0.1, atol=0.1)


# ---- packed sequences in torch.compile


def sequences(B: int, width: int = 4) -> Any:
    return pack_sequence([torch.randn(7 - i, width) for i in range(B)], enforce_sorted=B % 2 == 0)


class Packed(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = library.LSTM(4, 3, **options)
        self.second = library.GRU(3 * (1 + self.first.bidirectional), 3)

    def forward(self, packed: Any) -> tuple[Any, ...]:
        output, states = self.first(packed)
        return (*self.second(output), *states)


OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"learn_initial_state": True}, {"variational_dropout": 0.5}]


@pytest.mark.parametrize("sizes", [(2, 4, 6), (3, 5)], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_layers_compile_to_one_graph_without_fullgraph(options: dict, sizes: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, counter = Packed(**options), torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter)
    for B in sizes:
        packed = sequences(B)
        got = compiled(packed)
        if "variational_dropout" in options:
            continue
        want = module(packed)
        for a, b in zip(leaves(got), leaves(want), strict=True):
            assert a is b is None or torch.equal(a, b)  # the indices of sorted sequences are None
        grads = [torch.autograd.grad(o[0].data.sum() + o[2].sum(), list(module.parameters())) for o in (got, want)]
        for a, b in zip(*grads):
            close(a, b)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert counter.frame_count == 2  # one graph for the first size, one for all others
    assert torch._dynamo.explain(module)(sequences(sizes[0])).graph_count == 1


@pytest.mark.slow
def test_packed_layers_compile_with_inductor() -> None:
    torch._dynamo.reset()
    module = Packed(num_layers=2, bidirectional=True)
    compiled = torch.compile(module)
    for B in (2, 4, 3):
        packed = sequences(B)
        for a, b in zip(leaves(compiled(packed)), leaves(module(packed)), strict=True):
            assert a is b is None or close(a, b) is None


def test_import_does_not_import_the_compiler() -> None:
    code = "import sys, seqkernels; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
