"""Access to the recurrent layers of torch for integrations."""

from __future__ import annotations

from torch import Tensor
from torch.nn import RNNBase


def parameters_of(layer: RNNBase) -> list[Tensor]:
    """The parameters in the order of seqkernels.functional, read by name so that parametrizations take effect."""
    return [getattr(layer, name) for of_layer in layer._all_weights for name in of_layer]
