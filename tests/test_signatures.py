"""Public signatures: explicit, and those of torch for replacements of torch."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import seqkernels
from seqkernels import decoding, functional, nn, reference

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY
COMMON = dict(num_layers=1, bias=True, batch_first=False, dropout=0.0, bidirectional=False)


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """(name, default, kind) of each parameter that is not keyword-only, without self."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.kind) for p in found if p.kind is not KEYWORD_ONLY and p.name != "self"]


# ---- signatures of torch

SAME = {
    **{f"nn.{name}": (getattr(nn, name), getattr(torch.nn, name)) for name in (
        "LSTMCell", "GRUCell", "RNNCell", "Embedding", "EmbeddingBag", "MultiheadAttention",
        "TransformerEncoderLayer", "TransformerDecoderLayer",
    )},
    "nn.Embedding.from_pretrained": (nn.Embedding.from_pretrained, torch.nn.Embedding.from_pretrained),
    "nn.EmbeddingBag.from_pretrained": (nn.EmbeddingBag.from_pretrained, torch.nn.EmbeddingBag.from_pretrained),
    **{f"functional.{name}": (getattr(functional, name), getattr(F, name)) for name in ("embedding", "embedding_bag")},
    **{f"nn.{name}.forward": (getattr(nn, name).forward, getattr(torch.nn, name).forward) for name in (
        "LSTMCell", "GRUCell", "RNNCell", "Embedding", "EmbeddingBag", "MultiheadAttention",
        "TransformerEncoderLayer", "TransformerDecoderLayer", "LSTM", "GRU", "RNN",
    )},
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_signatures_begin_with_the_parameters_of_torch(name: str) -> None:
    ours, theirs = SAME[name]
    assert parameters(ours) == parameters(theirs)


# The constructors of torch are (*args, **kwargs) at run time; their documented signatures are `overload`s. Those of GRU
# and RNN omit proj_size, which has the same position as in LSTM; tests/recurrent/test_kinds.py tests it.
SIZES = ["input_size", "hidden_size"]
LAYERS = {
    "LSTM": [*SIZES, *COMMON, "proj_size", "device", "dtype"],
    "GRU": [*SIZES, *COMMON, "proj_size", "device", "dtype"],
    "RNN": [*SIZES, "num_layers", "nonlinearity", *list(COMMON)[1:], "proj_size", "device", "dtype"],
}


@pytest.mark.parametrize("name", LAYERS)
def test_constructors_of_layers(name: str) -> None:
    ours = parameters(getattr(nn, name))
    assert [n for n, *_ in ours] == LAYERS[name]
    defaults = COMMON | dict(nonlinearity="tanh", proj_size=0, device=None, dtype=None)
    assert all(default == defaults.get(n, inspect.Parameter.empty) for n, default, _ in ours)


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="typing.get_overloads: from Python 3.11 on")
@pytest.mark.parametrize("name", LAYERS)
def test_constructors_of_layers_match_the_overloads_of_torch(name: str) -> None:
    overloads = typing.get_overloads(getattr(torch.nn, name).__init__)
    theirs = next(o for o in overloads if "input_size" in inspect.signature(o).parameters)
    expected = [(n, default) for n, default, _ in parameters(theirs)]
    ours = [(n, default) for n, default, _ in parameters(getattr(nn, name))]
    if name != "LSTM":
        ours.remove(("proj_size", 0))
    assert ours == expected


# Documented signatures of functions that torch implements in C++, which have no signature in Python.
BUILTIN = {
    "scaled_dot_product_attention": "query key value attn_mask=None dropout_p=0.0 is_causal=False scale=None "
    "enable_gqa=False",
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), "input hx w_ih w_hh b_ih=None b_hh=None"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILTIN)
def test_functions_implemented_in_cpp_by_torch(name: str) -> None:
    shown = [n if d is inspect.Parameter.empty else f"{n}={d}" for n, d, _ in parameters(getattr(functional, name))]
    assert " ".join(shown) == BUILTIN[name]


@pytest.mark.parametrize("name", ["lstm", "gru", "dreamer_gru", "mgu", "nested_lstm", "rnn_tanh", "rnn_relu", "slstm"])
@pytest.mark.parametrize("of", [functional, reference], ids=["functional", "reference"])
def test_layers_have_input_hx_and_weights(of: Any, name: str) -> None:
    assert [n for n, *_ in parameters(getattr(of, name))] == ["input", "hx", "weights"]


# ---- every public callable


def public() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {
        f"seqkernels.{n}": getattr(seqkernels, n) for n in ("explain", "build_info")
    }
    for module in (decoding, functional, nn, reference):
        for name in module.__all__:
            value = getattr(module, name)
            found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                methods = inspect.getmembers(value, inspect.isroutine)
                own = (m for m in methods if str(getattr(m[1], "__module__", None)).startswith("seqkernels"))
                found |= {f"{module.__name__}.{name}.{m}": f for m, f in own if not m.startswith("_")}
    return found


PUBLIC = public()
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_callables_are_not_variadic(name: str) -> None:
    if name == "seqkernels.nn.MultiheadAttention":
        assert "__init__" not in vars(nn.MultiheadAttention)  # inherited from torch
    assert not [p.name for p in inspect.signature(PUBLIC[name]).parameters.values() if p.kind in VARIADIC]


@pytest.mark.parametrize("name", [n for n in functional.__all__ if inspect.isfunction(getattr(functional, n))])
def test_functional_forms_have_a_backend(name: str) -> None:
    parameter = inspect.signature(getattr(functional, name)).parameters["backend"]
    assert parameter.kind is KEYWORD_ONLY and parameter.default is None


@pytest.mark.parametrize("name", PUBLIC)
def test_public_callables_have_annotations(name: str) -> None:
    value = PUBLIC[name]
    function = value.__init__ if inspect.isclass(value) else value
    if not str(getattr(function, "__module__", None)).startswith("seqkernels"):
        return
    for p in inspect.signature(function).parameters.values():
        assert p.name in ("self", "cls") or p.annotation is not inspect.Parameter.empty, p.name


def test_default_modes_are_equal() -> None:
    modes = {
        n: inspect.signature(getattr(functional, n)).parameters["mode"].default
        for n in functional.__all__
        if "bag" in n
    }
    assert set(modes.values()) == {"mean"}
