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

LSTMState = tuple[Tensor, Tensor]


class LSTM(RNNBase):
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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "mode" in kwargs:
            raise TypeError("LSTM.__init__() got an unexpected keyword argument 'mode'")
        super().__init__("LSTM", *args, **kwargs)

    def flatten_parameters(self) -> None:
        """Nothing to do: parameters are read where they are."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: LSTMState | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor | PackedSequence, LSTMState]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError("LSTM: lengths must be absent where input is a PackedSequence, which has its own")
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(f"LSTM: Expected input to be 2D or 3D, got {input.dim()}D instead")
        batched = input.dim() == 3
        if hx is not None:
            if hx[0].dim() != input.dim() or hx[1].dim() != input.dim():
                kind, dims = ("batched 3-D", 3) if batched else ("unbatched 2-D", 2)
                raise RuntimeError(
                    f"For {kind} input, hx and cx should also be {dims}-D but got "
                    f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
                )
            if not batched:
                hx = (hx[0].unsqueeze(1), hx[1].unsqueeze(1))
        if not batched:
            if lengths is not None:
                raise ValueError("LSTM: lengths must be absent where input is one sequence [T, D]")
            input = input.unsqueeze(0 if self.batch_first else 1)
        self._check_input(input, hx, None)
        output, states = self._run(input.transpose(0, 1) if self.batch_first else input, hx, None, lengths)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            states = states[0].squeeze(1), states[1].squeeze(1)
        return output, states

    def _forward_packed(self, packed: PackedSequence, hx: LSTMState | None) -> tuple[PackedSequence, LSTMState]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None and sorted_indices is not None:
            hx = (hx[0].index_select(1, sorted_indices), hx[1].index_select(1, sorted_indices))
        self._check_input(data, hx, batch_sizes)
        output, (h_n, c_n) = self._run(data, hx, batch_sizes, None)
        if unsorted_indices is not None:
            h_n, c_n = h_n.index_select(1, unsorted_indices), c_n.index_select(1, unsorted_indices)
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), (h_n, c_n)

    def _run(
        self, x: Tensor, hx: LSTMState | None, batch_sizes: Tensor | None, lengths: Tensor | Sequence[int] | None
    ) -> tuple[Tensor, LSTMState]:
        backend.require("lstm", x)
        parameters = self._parameters
        weights = []
        for name in self._flat_weights_names:
            weight = parameters.get(name)  # absent where a parametrization, pruning or the like computes it
            weights.append(getattr(self, name) if weight is None else weight)
        dropout = self.dropout if self.training else 0.0
        return F.lstm_stack(x, weights, hx, batch_sizes, lengths, self.num_layers, self.bidirectional, dropout)

    def _check_input(self, input: Tensor, hx: LSTMState | None, batch_sizes: Tensor | None) -> None:
        """torch.nn.LSTM's own checks, whose messages its users know."""
        self.check_input(input, batch_sizes)
        if hx is None:
            return
        states = self.num_layers * (2 if self.bidirectional else 1)
        if batch_sizes is not None:
            batch = hx[0].shape[1] if torch.compiler.is_compiling() else int(batch_sizes[0])
        else:
            batch = input.shape[0 if self.batch_first else 1]
        self.check_hidden_size(
            hx[0], (states, batch, self.proj_size or self.hidden_size), "Expected hidden[0] size {}, got {}"
        )
        self.check_hidden_size(hx[1], (states, batch, self.hidden_size), "Expected hidden[1] size {}, got {}")
