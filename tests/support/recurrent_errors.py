"""Invalid arguments of recurrent layers for which torch.nn also raises, and the form of error messages."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

T, B, D, H = 4, 3, 5, 6  # sizes of the calls below


def form(argument: str, condition: str = ".+", got: str = ".+", op: str = r"(LSTM|lstm\w*)") -> str:
    """Pattern of the form of all error messages."""
    return rf"{op}: {argument} must {condition}, got {got}"


def zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


CONSTRUCTORS = {
    "input_size 0": dict(input_size=0, hidden_size=3),
    "input_size float": dict(input_size=2.0, hidden_size=3),
    "hidden_size 0": dict(input_size=2, hidden_size=0),
    "hidden_size negative": dict(input_size=2, hidden_size=-3),
    "hidden_size string": dict(input_size=2, hidden_size="3"),
    "num_layers 0": dict(input_size=2, hidden_size=3, num_layers=0),
    "bias int": dict(input_size=2, hidden_size=3, bias=1),
    "batch_first int": dict(input_size=2, hidden_size=3, batch_first=1),
    "dropout above 1": dict(input_size=2, hidden_size=3, num_layers=2, dropout=1.5),
    "dropout bool": dict(input_size=2, hidden_size=3, num_layers=2, dropout=True),
    "dropout negative": dict(input_size=2, hidden_size=3, num_layers=2, dropout=-0.1),
    "proj_size negative": dict(input_size=2, hidden_size=3, proj_size=-1),
    "proj_size as large as hidden_size": dict(input_size=2, hidden_size=3, proj_size=3),
    "integer dtype": dict(input_size=2, hidden_size=3, dtype=torch.int64),
    "unknown argument": dict(input_size=2, hidden_size=3, hidden=4),
    "missing argument": dict(input_size=2),
}


def raised(call: Callable[[], object]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as info:  # noqa: PT011
        call()
    return info.type, str(info.value)


def packed_of(features: int, **options) -> PackedSequence:
    return pack_sequence([torch.zeros(n, features, **options) for n in (4, 2, 1)])


CALLS = {
    "1-D input": ({}, lambda: (zeros(D),)),
    "4-D input": ({}, lambda: (zeros(T, B, D, 1),)),
    "input size": ({}, lambda: (zeros(T, B, D + 1),)),
    "input size, unbatched": ({}, lambda: (zeros(T, D - 1),)),
    "input dtype": ({}, lambda: (zeros(T, B, D, dtype=torch.float64),)),
    "integer input": ({}, lambda: (zeros(T, B, D, dtype=torch.int64),)),
    "3-D state, 2-D input": ({}, lambda: (zeros(T, D), (zeros(1, B, H), zeros(1, B, H)))),
    "2-D state, 3-D input": ({}, lambda: (zeros(T, B, D), (zeros(1, H), zeros(1, H)))),
    "2-D cell, 3-D input": ({}, lambda: (zeros(T, B, D), (zeros(1, B, H), zeros(1, H)))),
    "h0 of another batch": ({}, lambda: (zeros(T, B, D), (zeros(1, B + 1, H), zeros(1, B, H)))),
    "c0 of another batch": ({}, lambda: (zeros(T, B, D), (zeros(1, B, H), zeros(1, B + 1, H)))),
    "h0 of another size": ({}, lambda: (zeros(T, B, D), (zeros(1, B, H + 1), zeros(1, B, H)))),
    "c0 of another size": ({}, lambda: (zeros(T, B, D), (zeros(1, B, H), zeros(1, B, H - 1)))),
    "h0 of other layers": ({"num_layers": 2}, lambda: (zeros(T, B, D), (zeros(1, B, H), zeros(1, B, H)))),
    "h0 of one direction": ({"bidirectional": True}, lambda: (zeros(T, B, D), (zeros(1, B, H), zeros(2, B, H)))),
    "h0 not projected": ({"proj_size": 2}, lambda: (zeros(T, B, D), (zeros(1, B, H), zeros(1, B, H)))),
    "batch first, state": ({"batch_first": True}, lambda: (zeros(B, T, D), (zeros(1, T, H), zeros(1, T, H)))),
    "unbatched state": ({}, lambda: (zeros(T, D), (zeros(2, H), zeros(1, H)))),
}
