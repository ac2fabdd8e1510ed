"""LSTMModule and GRUModule of TorchRL with one call of a fused layer for batches of trajectories. Requires torchrl.

    from seqkernels.integrations.torchrl import accelerate
    accelerate(policy)  # each LSTMModule and GRUModule in it

    from seqkernels.integrations.torchrl import LSTMModule  # or the class itself, with the constructor of TorchRL
    layer = LSTMModule(input_size=4, hidden_size=64, in_key="observation", out_key="features")

In recurrent mode, the modules of TorchRL split rows at `is_init`, pad the trajectories to a larger batch, run the layer
and copy the results back. Here `reset` marks the starts in one call. Outputs, states and gradients agree within
rounding for each `recurrent_backend`. As in TorchRL, the states after the last step of each trajectory are stored at
that step, and zeros elsewhere.

TorchRL's implementation still runs for single steps, for bidirectional layers, for layers with hooks, of other classes
than torch.nn.LSTM and GRU, or with a replaced forward method, and for rows in which a later trajectory
starts with a stored state other than zero or with a state that requires a gradient. While tracing, where values are not
available, such states count as zero.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import Tensor
from torchrl import modules

from .. import functional
from ..functional._values import may_read_values
from ._layers import parameters_of, runs_only_forward

__all__ = ["GRUModule", "LSTMModule", "accelerate"]

Model = TypeVar("Model", bound=torch.nn.Module)


def _run(
    layer: torch.nn.RNNBase, x: Tensor, stored: list[Tensor | None], is_init: Tensor
) -> tuple[Tensor, list[Tensor]] | None:
    """Run a layer over all steps of rows that hold several trajectories.

    Dimensions: B rows, T steps, D features, L layers, H hidden.

    Args:
        x: [B, T, D].
        stored: the states before each step, [B, T, L, H]; zeros if None. The first of each row is used.
        is_init: bool [B, T], True at the first step of a trajectory.
    Returns:
        output [B, T, H] and the states [B, T, L, H] after the last step of each trajectory, zero at other steps; None
        if the states that later trajectories start with are not zero.
    """
    later = is_init[:, 1:]
    several = not may_read_values(is_init) or bool(later.any())
    hx: Any = None
    given = [state for state in stored if state is not None]
    if given:
        if len(given) < len(stored):
            raise RuntimeError(f"{type(layer).__name__}Module: all states must be given, or none")
        if several and any(state.requires_grad for state in given):
            return None
        if several and may_read_values(*given) and any(bool(state[:, 1:][later].any()) for state in given):
            return None
        hx = tuple(state[:, 0].transpose(0, 1) for state in given)
    run: Any = functional.lstm if layer.mode == "LSTM" else functional.gru
    output, last, *every = run(
        x, hx if hx is None or len(hx) > 1 else hx[0], parameters_of(layer), num_layers=layer.num_layers,
        batch_first=True, dropout=layer.dropout, training=layer.training,
        reset=torch.nn.functional.pad(later, (1, 0)) if several else None, return_all_states=several,
    )  # fmt: skip
    if several:  # [B, T, L, H] each, from one tuple of states per layer
        ends = torch.nn.functional.pad(later, (0, 1), value=True)[:, :, None, None]
        states = [torch.where(ends, torch.stack(of_state, 2), 0) for of_state in zip(*every[0], strict=True)]
    else:
        earlier = x.shape[1] - 1
        states = [
            torch.nn.functional.pad(state.transpose(0, 1).unsqueeze(1), (0, 0, 0, 0, earlier, 0))
            for state in (last if isinstance(last, tuple) else (last,))
        ]
    return output, states


def _forward(module: LSTMModule | GRUModule, layer: torch.nn.RNNBase, tensordict: TensorDictBase) -> bool:
    """Write the outputs of a module in recurrent mode; return False for inputs that TorchRL's implementation runs."""
    if not module.recurrent_mode or layer.bidirectional or tensordict.ndim == 0 or not runs_only_forward(layer):
        return False
    *names, marker = module.in_keys
    batch = tensordict.shape
    x, is_init = (tensordict.get(name) for name in (names[0], marker))
    stored = [tensordict.get(name, None) for name in names[1:]]

    def as_rows(t: Tensor) -> Tensor:  # [*batch, ...] -> [B, T, ...]
        return t.reshape(-1, *t.shape[len(batch) - 1 :])

    result = _run(
        layer,
        as_rows(x),
        [None if state is None else as_rows(state) for state in stored],
        as_rows(is_init).squeeze(-1),
    )
    if result is None:
        return False
    for name, value in zip(module.out_keys, [result[0], *result[1]], strict=True):
        tensordict.set(name, value.reshape(*batch, *value.shape[2:]))
    return True


class LSTMModule(modules.LSTMModule):
    """LSTMModule of TorchRL with one call of a fused LSTM for rows of several trajectories."""

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict if _forward(self, self.lstm, tensordict) else super().forward(tensordict)


class GRUModule(modules.GRUModule):
    """GRUModule of TorchRL with one call of a fused GRU for rows of several trajectories."""

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict if _forward(self, self.gru, tensordict) else super().forward(tensordict)


_REPLACED: dict[Any, Any] = {modules.LSTMModule: LSTMModule, modules.GRUModule: GRUModule}


def accelerate(model: Model) -> Model:
    """Replace the class of each LSTMModule and GRUModule in a model by the class of this module.

    Parameters, keys and settings remain. Subclasses of TorchRL's modules are left alone.

    Returns:
        model, changed in place.
    Raises:
        TypeError: model is not a torch.nn.Module.
        ValueError: model contains no LSTMModule or GRUModule.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    found = [module for module in model.modules() if type(module) in {*_REPLACED, *_REPLACED.values()}]
    if not found:
        raise ValueError("accelerate: model must contain an LSTMModule or a GRUModule of TorchRL, got none")
    for module in found:
        module.__class__ = _REPLACED.get(type(module), type(module))
    return model
