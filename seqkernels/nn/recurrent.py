"""Recurrent layers in place of torch.nn's: the same constructors, parameters and state_dict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import RNNBase
from torch.nn.utils.rnn import PackedSequence

from seqkernels import backend
from seqkernels.functional import recurrent as F

States = tuple[Tensor, ...]
Lengths = Tensor | Sequence[int] | None


class _Recurrent(RNNBase):
    """What the layers share: states are a tuple here, whatever the user sees."""

    _name: str  # as torch's messages say it
    _kind: F.Kind

    def flatten_parameters(self) -> None:
        """Nothing to do: parameters are read where they are."""

    def _run(
        self, input: Tensor | PackedSequence, hx: States | None, lengths: Lengths
    ) -> tuple[Tensor | PackedSequence, States]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{self._name}: lengths must be absent beside a PackedSequence, got {lengths}")
            return self._run_packed(input, hx)
        if not isinstance(input, Tensor):
            raise TypeError(f"{self._name}: input must be a tensor or PackedSequence, got {type(input).__name__}")
        if input.dim() not in (2, 3):
            what = "D tensor" if self._name == "RNN" else "D"  # torch's words
            raise ValueError(f"{self._name}: Expected input to be 2D or 3D, got {input.dim()}{what} instead")
        batched, batch_first = input.dim() == 3, self.batch_first
        if hx is not None:
            if any(s.dim() != input.dim() for s in hx):
                raise RuntimeError(self._wrong_dimensions("batched 3-D" if batched else "unbatched 2-D", hx, input))
            if not batched:
                hx = tuple(s.unsqueeze(1) for s in hx)
        if not batched:
            if lengths is not None:
                raise ValueError(f"{self._name}: lengths must be absent where input is one sequence, got {lengths}")
            input = input.unsqueeze(0 if batch_first else 1)
        self._check(input, hx, None)
        output, states = self._stack(input.transpose(0, 1) if batch_first else input, hx, None, lengths)
        if batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output, states = output.squeeze(0 if batch_first else 1), tuple(s.squeeze(1) for s in states)
        return output, states

    def _run_packed(self, packed: PackedSequence, hx: States | None) -> tuple[PackedSequence, States]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None and sorted_indices is not None:
            hx = tuple(s.index_select(1, sorted_indices) for s in hx)
        self._check(data, hx, batch_sizes)
        output, states = self._stack(data, hx, batch_sizes, None)
        if unsorted_indices is not None:
            states = tuple(s.index_select(1, unsorted_indices) for s in states)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states

    def _stack(
        self, x: Tensor, hx: States | None, batch_sizes: Tensor | None, lengths: Lengths
    ) -> tuple[Tensor, States]:
        backend.require(self._kind.name, x)
        parameters = self._parameters
        weights = []
        for name in self._flat_weights_names:
            weight = parameters.get(name)  # absent where a parametrization, pruning or the like computes it
            weights.append(getattr(self, name) if weight is None else weight)
        dropout = self.dropout if self.training else 0.0
        return F.stack(self._kind, x, weights, hx, batch_sizes, lengths, self.num_layers, self.bidirectional, dropout)

    def _wrong_dimensions(self, kind: str, hx: States, input: Tensor) -> str:
        return f"For {kind} input, hx should also be {input.dim()}-D but got {hx[0].dim()}-D tensor"

    def _check(self, input: Tensor, hx: States | None, batch_sizes: Tensor | None) -> None:
        """torch's own checks, whose messages its users know."""
        self.check_input(input, batch_sizes)
        if hx is None:
            return
        if batch_sizes is not None:
            batch = hx[0].shape[1] if torch.compiler.is_compiling() else int(batch_sizes[0])
        else:
            batch = input.shape[0 if self.batch_first else 1]
        self._check_states(hx, self.num_layers * (2 if self.bidirectional else 1), batch)
        for name, state in zip(self._kind.state_names, hx):
            if state.device != input.device:
                raise ValueError(
                    f"{self._name}: {name} must be on the device of input, {input.device}, got {state.device}"
                )

    def _check_states(self, hx: States, states: int, batch: int) -> None:
        self.check_hidden_size(hx[0], (states, batch, self.hidden_size))


class LSTM(_Recurrent):
    """Takes the place of torch.nn.LSTM: same constructor, parameters, initial values, state_dict and errors.

    Like torch.nn.LSTM it takes a batch [T, B, D] ([B, T, D] with batch_first), one sequence [T, D], or a
    torch.nn.utils.rnn.PackedSequence. Beyond it: `lstm(x, lengths=lengths)` for a padded batch, sequences of length
    zero, T = 0, one fused backward, and gradients of any order.

    It is a torch.nn.RNNBase but not a torch.nn.LSTM, which torch.compile refuses together with its subclasses.

    Args: as torch.nn.LSTM: input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
        bidirectional=False, proj_size=0, device=None, dtype=None.
    Inputs:
        input: as above.
        hx: (h_0, c_0), [num_layers * directions, B, proj_size or hidden_size] and [..., hidden_size]; zeros if absent.
        lengths: [B] integers in [0, T], in any order, on any device; only with a padded batch.
    Outputs: output (laid out like input; zero beyond each length), (h_n, c_n) at the last step of each sequence.
    Raises: as torch.nn.LSTM; for lengths as seqkernels.functional.lstm.
    Deterministic: yes, see seqkernels.functional.lstm.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    _name, _kind = "LSTM", F.LSTM

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "mode" in kwargs:
            raise TypeError("LSTM.__init__() got an unexpected keyword argument 'mode'")
        super().__init__("LSTM", *args, **kwargs)

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        output, (h_n, c_n) = self._run(input, F.states_of(self._kind, hx), lengths)
        return output, (h_n, c_n)

    def _wrong_dimensions(self, kind: str, hx: States, input: Tensor) -> str:
        got = f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
        return f"For {kind} input, hx and cx should also be {input.dim()}-D but got {got}"

    def _check_states(self, hx: States, states: int, batch: int) -> None:
        h_shape = (states, batch, self.proj_size or self.hidden_size)
        self.check_hidden_size(hx[0], h_shape, "Expected hidden[0] size {}, got {}")
        self.check_hidden_size(hx[1], (states, batch, self.hidden_size), "Expected hidden[1] size {}, got {}")


class _OneState(_Recurrent):
    """GRU and RNN: one state, and no projection."""

    def __init__(self, mode: str, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        super().__init__(mode, *args, **kwargs)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, lengths: Lengths = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        output, (h_n,) = self._run(input, F.states_of(self._kind, hx), lengths)
        return output, h_n


class GRU(_OneState):
    """Takes the place of torch.nn.GRU: same constructor, parameters, initial values, state_dict and errors.

    Inputs, outputs and what goes beyond torch: as seqkernels.nn.LSTM, with one state h [num_layers * directions, B,
    hidden_size]. It is a torch.nn.RNNBase but not a torch.nn.GRU, which torch.compile refuses.
    Deterministic: yes, see seqkernels.functional.gru.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    _name, _kind = "GRU", F.GRU

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("GRU", *args, **kwargs)


class RNN(_OneState):
    """Takes the place of torch.nn.RNN: same constructor, parameters, initial values, state_dict and errors.

    nonlinearity: 'tanh' or 'relu'. Inputs, outputs and what goes beyond torch: as seqkernels.nn.LSTM, with one state
    h [num_layers * directions, B, hidden_size]. It is a torch.nn.RNNBase but not a torch.nn.RNN, which torch.compile
    refuses.
    Deterministic: yes, see seqkernels.functional.rnn_tanh.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    _name = "RNN"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if len(args) > 3:  # torch's order: nonlinearity is the fourth
            nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(f"RNN_{nonlinearity.upper()}", *args, **kwargs)

    @property
    def _kind(self) -> F.Kind:  # type: ignore[override]
        return F.RNN_TANH if self.mode == "RNN_TANH" else F.RNN_RELU
