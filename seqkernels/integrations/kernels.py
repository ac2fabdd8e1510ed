"""Layers for `kernelize` of Hugging Face's `kernels`, which replace the forward methods of torch.nn's modules by name.

    from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping

    replace_kernel_forward_from_hub(torch.nn.LSTM, "LSTM")
    repository = LocalLayerRepository(repo_path=Path("build/hub"), layer_name="LSTM")  # written by `make hub`
    with use_kernel_mapping({"LSTM": {"cpu": repository}}):
        model = kernelize(model, mode=Mode.TRAINING, device="cpu")

As the hub requires, a layer has no state and no constructor: its forward method reads the attributes of the module of
torch.nn. Errors, gradients and numerics are those of the function it calls. With Mode.TORCH_COMPILE, kernelize leaves
RNN, LSTM and GRU as they are: torch.compile refuses these classes of torch.nn whatever their forward method is.
`seqkernels.accelerate` replaces more kinds of modules, supports torch.compile and needs no other package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .. import functional as F

__all__ = ["GRU", "LSTM", "RNN", "Embedding", "EmbeddingBag", "GRUCell", "LSTMCell", "RNNCell"]

States = Tensor | tuple[Tensor, ...]


def _each(hx: States | None, change: Callable[[Tensor], Tensor]) -> Any:
    if hx is None or isinstance(hx, Tensor):
        return None if hx is None else change(hx)
    return tuple(change(state) for state in hx)


def _run(function: Callable[..., Any], layer: Any, input: Tensor | PackedSequence, hx: States | None) -> Any:
    """A recurrent layer of torch.nn, computed by a function of seqkernels."""
    options = dict(
        num_layers=layer.num_layers, bidirectional=layer.bidirectional, dropout=layer.dropout, training=layer.training
    )
    weights = layer._flat_weights
    if isinstance(input, PackedSequence):
        data, batch_sizes, order, back = input
        if order is not None:
            hx = _each(hx, lambda state: state.index_select(1, order))
        output, last = function(data, hx, weights, batch_sizes=batch_sizes, **options)
        if back is not None:
            last = _each(last, lambda state: state.index_select(1, back))
        return PackedSequence(output, batch_sizes, order, back), last
    if input.dim() == 3:
        return function(input, hx, weights, batch_first=layer.batch_first, **options)
    output, last = function(input.unsqueeze(1), _each(hx, lambda state: state.unsqueeze(1)), weights, **options)
    return output.squeeze(1), _each(last, lambda state: state.squeeze(1))


class RNN(torch.nn.Module):
    """The forward method of torch.nn.RNN."""

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Any:
        return _run(F.rnn_tanh if self.nonlinearity == "tanh" else F.rnn_relu, self, input, hx)


class LSTM(torch.nn.Module):
    """The forward method of torch.nn.LSTM."""

    def forward(self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None) -> Any:
        return _run(F.lstm, self, input, hx)


class GRU(torch.nn.Module):
    """The forward method of torch.nn.GRU."""

    def forward(self, input: Tensor | PackedSequence, hx: Tensor | None = None) -> Any:
        return _run(F.gru, self, input, hx)


def _weights(cell: Any) -> tuple[Any, ...]:
    return cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh


class RNNCell(torch.nn.Module):
    """The forward method of torch.nn.RNNCell."""

    can_torch_compile = True

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        function = F.rnn_tanh_cell if self.nonlinearity == "tanh" else F.rnn_relu_cell
        return function(input, hx, *_weights(self))


class LSTMCell(torch.nn.Module):
    """The forward method of torch.nn.LSTMCell."""

    can_torch_compile = True

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return F.lstm_cell(input, hx, *_weights(self))


class GRUCell(torch.nn.Module):
    """The forward method of torch.nn.GRUCell."""

    can_torch_compile = True

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return F.gru_cell(input, hx, *_weights(self))


class Embedding(torch.nn.Module):
    """The forward method of torch.nn.Embedding."""

    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        of: Any = self
        return F.embedding(
            input, of.weight, of.padding_idx, of.max_norm, of.norm_type, of.scale_grad_by_freq, of.sparse
        )  # fmt: skip


class EmbeddingBag(torch.nn.Module):
    """The forward method of torch.nn.EmbeddingBag."""

    can_torch_compile = True

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        of: Any = self
        return F.embedding_bag(
            input, of.weight, offsets, of.max_norm, of.norm_type, of.scale_grad_by_freq, of.mode, of.sparse,
            per_sample_weights, of.include_last_offset, of.padding_idx,
        )  # fmt: skip
