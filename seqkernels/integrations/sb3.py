"""RecurrentPPO of sb3-contrib with one call of a fused layer for all steps of a batch. Requires sb3-contrib.

    from seqkernels.integrations.sb3 import accelerate
    model = accelerate(RecurrentPPO("MlpLstmPolicy", env))  # a model, or its policy

    from seqkernels.integrations.sb3 import MlpLstmPolicy
    model = RecurrentPPO(MlpLstmPolicy, env)  # the same; also after RecurrentPPO.load

If an episode starts anywhere in a batch, as in nearly all batches of an update, the policy of sb3-contrib calls
torch.nn.LSTM once per step, to set the states of single sequences to zero in between. Here `reset` marks these steps in
one call. Outputs, states and gradients agree within rounding. The layers remain those of torch with their parameters:
optimizers, checkpoints and code that looks for torch.nn.LSTM are unaffected.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from sb3_contrib.common.recurrent.policies import (
    RecurrentActorCriticCnnPolicy,
    RecurrentActorCriticPolicy,
    RecurrentMultiInputActorCriticPolicy,
)
from sb3_contrib.ppo_recurrent import RecurrentPPO
from torch import Tensor

from ..functional import lstm, rnn_relu, rnn_tanh
from ._layers import parameters_of, runs_only_forward

__all__ = ["CnnLstmPolicy", "MlpLstmPolicy", "MultiInputLstmPolicy", "accelerate", "process_sequence"]

States = Tensor | tuple[Tensor, Tensor]
_FUNCTIONS: dict[str, Any] = {"LSTM": lstm, "RNN_TANH": rnn_tanh, "RNN_RELU": rnn_relu}
T = TypeVar("T")


def process_sequence(
    features: Tensor, lstm_states: States, episode_starts: Tensor, lstm: torch.nn.RNNBase
) -> tuple[Tensor, States]:
    """Replacement for RecurrentActorCriticPolicy._process_sequence, with its arguments.

    Dimensions: B sequences, T steps, D features, L layers, H hidden.

    Args:
        features: [B * T, D], the steps of a sequence in consecutive rows.
        lstm_states: h and c of a torch.nn.LSTM, or h of a torch.nn.RNN, [L, B, H] each.
        episode_starts: [B * T], not zero at the first step of an episode.
        lstm: the layer whose parameters are used.
    Returns:
        output [B * T, H]; the states after the last step.
    """
    B = (lstm_states if isinstance(lstm_states, Tensor) else lstm_states[0]).shape[1]
    output, states = _FUNCTIONS[lstm.mode](
        features.reshape(B, -1, lstm.input_size), lstm_states, parameters_of(lstm), num_layers=lstm.num_layers,
        batch_first=True, dropout=lstm.dropout, training=lstm.training, reset=episode_starts.reshape(B, -1) != 0,
    )  # fmt: skip
    return output.flatten(0, 1), states


class MlpLstmPolicy(RecurrentActorCriticPolicy):
    """MlpLstmPolicy of sb3-contrib with one call of the LSTM for all steps."""

    _process_sequence = staticmethod(process_sequence)


class CnnLstmPolicy(RecurrentActorCriticCnnPolicy):
    """CnnLstmPolicy of sb3-contrib with one call of the LSTM for all steps."""

    _process_sequence = staticmethod(process_sequence)


class MultiInputLstmPolicy(RecurrentMultiInputActorCriticPolicy):
    """MultiInputLstmPolicy of sb3-contrib with one call of the LSTM for all steps."""

    _process_sequence = staticmethod(process_sequence)


def accelerate(model: T) -> T:
    """Replace the loop over steps in a RecurrentPPO model, or in its policy, by one call of a fused layer.

    The change lasts for this object and its copies. Saved models do not contain it: call accelerate after
    RecurrentPPO.load, or use the policies of this module.

    Returns:
        model, changed in place.
    Raises:
        TypeError: model is neither a RecurrentPPO nor a recurrent policy of sb3-contrib.
        ValueError: the policy has its own _process_sequence, or a layer that is not exactly torch.nn.LSTM or RNN, or a
            layer with hooks or a replaced forward method, which one call for all steps would skip.
    """
    policy = model.policy if isinstance(model, RecurrentPPO) else model
    if not isinstance(policy, RecurrentActorCriticPolicy):
        raise TypeError(
            "accelerate: model must be a RecurrentPPO or a recurrent policy of sb3-contrib, got " + type(model).__name__
        )
    current = type(policy)._process_sequence
    if current not in (RecurrentActorCriticPolicy._process_sequence, process_sequence):
        raise ValueError(
            f"accelerate: the policy must use the _process_sequence of sb3-contrib, {type(policy).__name__} has its own"
        )
    for name in ("lstm_actor", "lstm_critic"):
        layer = getattr(policy, name)
        if layer is None:
            continue
        if type(layer) not in (torch.nn.LSTM, torch.nn.RNN):
            of = f"{type(layer).__module__}.{type(layer).__name__}"
            raise ValueError(
                f"accelerate: {name} must be a torch.nn.LSTM or RNN, got {of}; call seqkernels.restore first if "
                "seqkernels.accelerate has replaced it"
            )
        if not runs_only_forward(layer):
            raise ValueError(
                f"accelerate: {name} must have no hooks and no replaced forward: one call for all steps would skip them"
            )
    policy._process_sequence = process_sequence
    return model
