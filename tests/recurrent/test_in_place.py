"""In-place operations on outputs, which torch's layers on a CPU support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import seqkernels

close = torch.testing.assert_close


def first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output.data if isinstance(output, PackedSequence) else output[0]
    return output


LAYERS: dict[str, tuple[str, dict]] = {
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {}),
    "LSTM, bidirectional": ("LSTM", {"bidirectional": True}),
    "GRU, two layers": ("GRU", {"num_layers": 2, "batch_first": True}),
    "LSTM, packed": ("LSTM", {}),
    "GRU, packed": ("GRU", {"bidirectional": True}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


@pytest.mark.parametrize("case", LAYERS)
def test_outputs_changed_in_place_have_the_gradients_of_torch(case: str) -> None:
    name, options = LAYERS[case]
    theirs = getattr(nn, name)(4, 3, **options)
    ours = getattr(seqkernels.nn, name)(4, 3, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 4) if "Cell" in name else torch.randn(5, 2, 4)
    for module in (theirs, ours):
        given = pack_padded_sequence(x, torch.tensor([5, 3])) if "packed" in case else x
        first(module(given)).relu_().square().sum().backward()
    for p, q in zip(theirs.parameters(), ours.parameters()):
        close(q.grad, p.grad)


@pytest.mark.parametrize("change", ["output", "view", "states", "returned"])
@pytest.mark.parametrize("name", ["LSTM", "RNN", "MGU", "SLSTM", "DreamerGRU", "RNNCell"])
def test_all_outputs_may_change_in_place(name: str, change: str) -> None:
    module = getattr(seqkernels.nn, name)(4, 3)
    x = torch.randn(5, 4) if "Cell" in name else torch.randn(5, 2, 4)
    grads = []
    for in_place in (False, True):
        outputs = module(x)
        y = first(outputs)
        if change == "states" and not isinstance(outputs, Tensor):
            y = first(outputs[1])
        total = y.relu_() if in_place and change != "view" else y.relu()
        if in_place and change == "view":
            y[1:].relu_()
            total = y.relu()
        grads.append(torch.autograd.grad(total.square().sum(), list(module.parameters())))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_outputs_share_their_memory_as_usual() -> None:
    """Memory is copied only when it is written while backward still needs it."""
    module, x = seqkernels.nn.GRU(4, 3), torch.randn(5, 2, 4)
    y = module(x)[0]
    before = y.detach().clone()
    array = y.detach().numpy()
    y.detach().add_(1.0)
    assert np.shares_memory(array, y.detach().numpy()) and torch.equal(torch.from_numpy(array), before + 1)
    y.sum().backward()
    with torch.no_grad():
        z = module(x)[0]
    assert not torch._C._is_cow_tensor(z)


@pytest.mark.parametrize("wrap", ["checkpoint", "save_on_cpu", "create_graph"])
def test_in_place_with_other_ways_to_save(wrap: str) -> None:
    module, x = seqkernels.nn.GRU(4, 3), torch.randn(5, 2, 4, requires_grad=True)
    want = torch.autograd.grad(module(x)[0].relu().square().sum(), x)[0]

    def run(x: Tensor) -> Tensor:
        return module(x)[0].relu_().square().sum()

    if wrap == "checkpoint":
        got = torch.autograd.grad(checkpoint(run, x, use_reentrant=False), x)[0]
    elif wrap == "save_on_cpu":
        with torch.autograd.graph.save_on_cpu():
            got = torch.autograd.grad(run(x), x)[0]
    else:
        got = torch.autograd.grad(run(x), x, create_graph=True)[0]
        got.sum().backward()
        got = got.detach()
    close(got, want)


INPUTS: dict[str, Callable[[], nn.Module]] = {
    "GRU": lambda: seqkernels.nn.GRU(4, 3, batch_first=True),
    "LSTM": lambda: seqkernels.nn.LSTM(4, 3, batch_first=True),
    "LSTMCell": lambda: seqkernels.nn.LSTMCell(4, 3),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_changed_in_place_raise(name: str) -> None:
    """Differs from torch with batch_first, which copies the input."""
    x = torch.randn(2, 4) if "Cell" in name else torch.randn(2, 5, 4)
    x = x.requires_grad_() * 1
    y = first(INPUTS[name]()(x))
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
