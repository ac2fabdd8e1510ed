"""Access to the recurrent layers of torch for integrations."""

from __future__ import annotations

from torch import Tensor
from torch.nn import GRU, LSTM, RNN, RNNBase

from ..nn._hooks import runs_forward_of


def parameters_of(layer: RNNBase) -> list[Tensor]:
    """The parameters in the order of seqkernels.functional, read by name so that parametrizations take effect."""
    return [getattr(layer, name) for of_layer in layer._all_weights for name in of_layer]


def runs_only_forward(layer: RNNBase) -> bool:
    """Whether a call of a layer of torch runs its forward method alone: no subclass, hook or replaced method."""
    return any(runs_forward_of(layer, kind) for kind in (LSTM, GRU, RNN))
