"""Subclasses with __torch_function__, other objects that have it, TorchFunctionMode, and nested tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import seqkernels
from seqkernels import functional, nn

X, Q, IDS, TABLE = torch.randn(5, 2, 4), torch.randn(1, 2, 3, 4), torch.tensor([[1, 2], [3, 0]]), torch.randn(9, 4)
PACKED = functional.quantize_rows(TABLE)
PAIRS, TAGS = torch.randn(4, 4), torch.tensor([[1, 2, 0], [3, 0, 1]])


def weights(gates: int, bias: bool = True) -> list[Tensor]:
    return [torch.randn(gates * 3, 4), torch.randn(gates * 3, 3), *[torch.randn(gates * 3)] * 2 * bias]


def layer(name: str, gates: int) -> tuple[Callable, Tensor]:
    w = weights(gates)
    return (lambda x, **more: getattr(functional, name)(x, None, w, **more)), X


def cell(name: str, gates: int) -> tuple[Callable, Tensor]:
    w = weights(gates)
    return (lambda x, **more: getattr(functional, name)(x, None, *w, **more)), X[0]


slstm, nested = weights(4), [*weights(4), torch.randn(12, 3), torch.randn(12, 3), torch.randn(12), torch.randn(12)]
dreamer = [*weights(3), torch.ones(9), torch.zeros(9)]
PUBLIC: dict[str, tuple[Callable, Tensor]] = {
    "lstm": layer("lstm", 4),
    "gru": layer("gru", 3),
    "mgu": layer("mgu", 2),
    "rnn_tanh": layer("rnn_tanh", 1),
    "rnn_relu": layer("rnn_relu", 1),
    "slstm": (lambda x, **more: functional.slstm(x, None, slstm, **more), X),
    "nested_lstm": (lambda x, **more: functional.nested_lstm(x, None, nested, **more), X),
    "dreamer_gru": (lambda x, **more: functional.dreamer_gru(x, None, dreamer, **more), X),
    "lstm_cell": cell("lstm_cell", 4),
    "gru_cell": cell("gru_cell", 3),
    "rnn_tanh_cell": cell("rnn_tanh_cell", 1),
    "rnn_relu_cell": cell("rnn_relu_cell", 1),
    "scaled_dot_product_attention": (
        lambda q, **more: functional.scaled_dot_product_attention(q, Q, Q, is_causal=True, **more),
        Q,
    ),
    "varlen_attention": (
        lambda q, **more: functional.varlen_attention(q, Q[0], Q[0], torch.tensor([0, 2]), **more),
        Q[0],
    ),
    "additive_attention": (lambda q, **more: functional.additive_attention(q, Q[0], Q[0], Q[0, 0, 0], **more), Q[0]),
    "ctc_loss": (lambda p, **more: functional.ctc_loss(p, TAGS, [3, 3], [2, 1], **more), Q[0].transpose(0, 1)),
    "embedding": (lambda i, **more: functional.embedding(i, TABLE, 1, **more), IDS),
    "embedding_bag": (lambda i, **more: functional.embedding_bag(i, TABLE, mode="max", **more), IDS),
    "embedding_bags": (
        lambda i, **more: functional.embedding_bags(i, [TABLE], torch.tensor([0, 2]), mode="sum", **more),
        IDS[0],
    ),
    "embedding_bag_bytes": (lambda i, **more: functional.embedding_bag_bytes(i, PACKED, **more), IDS),
    "quantize_rows": (functional.quantize_rows, TABLE),
    "crf_log_likelihood": (lambda e, **more: functional.crf_log_likelihood(e, TAGS, PAIRS, **more), Q[0]),
    **{
        f"crf_{name}": (lambda e, f=f"crf_{name}", **more: getattr(functional, f)(e, PAIRS, **more), Q[0])
        for name in ("log_partition", "marginals", "entropy", "viterbi")
    },
}
public = pytest.mark.parametrize("name", PUBLIC)
leaves = torch.utils._pytree.tree_leaves


def test_every_public_function_is_listed() -> None:
    names = {name for name in functional.__all__ if inspect.isfunction(getattr(functional, name))}
    assert names == set(PUBLIC)


class Logged(Tensor):
    calls: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper:
    """An object with __torch_function__ that is no tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        unwrapped = torch.utils._pytree.tree_map(lambda a: a.tensor if isinstance(a, cls) else a, (args, kwargs or {}))
        return "wrapped", func, func(*unwrapped[0], **unwrapped[1])


@public
def test_functions_are_dispatched_to_torch_function(name: str) -> None:
    function, given = PUBLIC[name]
    want = leaves(function(given, backend="cpu"))
    Logged.calls.clear()
    got = leaves(function(given.as_subclass(Logged), backend="cpu"))
    assert Logged.calls == [getattr(functional, name)]
    for a, b in zip(got, want, strict=True):
        assert type(a) is Logged and torch.equal(a.as_subclass(Tensor), b)
    tag, func, result = function(Wrapper(given), backend="cpu")
    assert tag == "wrapped" and func is getattr(functional, name)
    for a, b in zip(leaves(result), want, strict=True):
        assert torch.equal(a, b)


@public
def test_function_modes_see_the_public_function(name: str) -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    function, given = PUBLIC[name]
    with Mode():
        got = function(given)
    assert getattr(functional, name) in seen
    for a, b in zip(leaves(got), leaves(function(given)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("at", ["weight", "weights", "hx"])
def test_other_arguments_are_dispatched(at: str) -> None:
    Logged.calls.clear()
    if at == "weight":
        y = functional.embedding_bag(IDS, TABLE.as_subclass(Logged))
    elif at == "weights":
        y = functional.gru(X, None, [w.as_subclass(Logged) for w in weights(3)])[0]
    else:
        y = functional.gru(X, torch.randn(1, 2, 3).as_subclass(Logged), weights(3))[0]
    assert type(y) is Logged and len(Logged.calls) == 1


def test_functions_in_symbolic_traces() -> None:
    graph = torch.fx.symbolic_trace(lambda i: functional.embedding_bag(i, TABLE, mode="max"))
    assert torch.equal(graph(IDS), functional.embedding_bag(IDS, TABLE, mode="max"))
    assert functional.embedding_bag in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize(
    "name", ["LSTM", "GRU", "LSTMCell", "MultiheadAttention", "TransformerEncoderLayer", "Embedding"]
)
def test_modules_support_subclasses(name: str) -> None:
    module = getattr(nn, name)(*((4, 2) if "Emb" not in name else (9, 4)))
    given = {"Embedding": IDS, "LSTMCell": X[0]}.get(name, X)
    args = (given,) * 3 if name == "MultiheadAttention" else (given,)
    torch.manual_seed(0)
    want = leaves(module.eval()(*args))
    got = leaves(module(*(a.as_subclass(Logged) for a in args)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.as_subclass(Tensor), b)


@pytest.mark.parametrize("name", ["LSTM", "LSTMCell", "Embedding", "EmbeddingBag", "PositionalEncoding"])
def test_modules_refuse_other_objects_by_name(name: str) -> None:
    module = getattr(nn, name)(*((9, 4) if "Embedding" in name else (4,) if name == "PositionalEncoding" else (4, 3)))
    for value in ([1.0], None):
        with pytest.raises(TypeError, match=r"must be a tensor"):
            module(value)
    for layer in (nn.TransformerEncoderLayer(4, 2, 8), nn.TransformerDecoderLayer(4, 2, 8)):
        with pytest.raises(TypeError, match=f"^{type(layer).__name__}: (src|tgt) must be a tensor, got list"):
            layer(*([[1.0]] * (2 if "Decoder" in type(layer).__name__ else 1)))


# ---- nested tensors


def nested_of(layout: torch.layout, given: Tensor) -> Tensor:
    if given.dtype == torch.int64:
        return torch.nested.nested_tensor([torch.tensor([1, 2]), torch.tensor([3])], layout=layout)
    return torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(2, 4)], layout=layout)


SUPPORTED = {("embedding", torch.jagged), ("embedding_bag", torch.jagged), ("embedding_bag_bytes", torch.jagged)}


@public
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_supported_or_refused_by_name(name: str, layout: torch.layout) -> None:
    function, given = PUBLIC[name]
    if (name, layout) in SUPPORTED:
        function(nested_of(layout, given))
        return
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .* nested tensor"):
        function(nested_of(layout, given))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_recurrent_modules_refuse_nested_tensors(name: str, layout: torch.layout) -> None:
    with pytest.raises(TypeError, match=f"^{name}: input must not be a nested tensor, got one of layout {layout}; use"):
        getattr(nn, name)(4, 3)(nested_of(layout, X))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("batch_first", [True, False])
def test_positional_encodings_of_nested_tensors(batch_first: bool, layout: torch.layout) -> None:
    module, x = nn.PositionalEncoding(4, batch_first=batch_first), nested_of(layout, X)
    for got, row in zip(module(x).unbind(), x.unbind()):
        assert torch.equal(got, module(row))
    offsets = torch.tensor([2, 1])
    for got, row, at in zip(module(x, offsets).unbind(), x.unbind(), offsets.tolist()):
        assert torch.equal(got, module(row, at))
    assert seqkernels.nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)(module(x)).is_nested
