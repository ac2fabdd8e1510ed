"""Recurrent layers, defined in plain torch.

Dimensions: B batch, T time, N packed rows, D input, H hidden, P what is fed back (the projection size, or H), L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LSTMState = tuple[Tensor, Tensor]


def lstm_cell(x_gates: Tensor, h: Tensor, c: Tensor, w_hh: Tensor, w_hr: Tensor | None) -> LSTMState:
    """One step. x_gates [B, 4H] is the input's share of the gates, biases included; h [B, P]; c [B, H].

    Source: Gers, Schmidhuber and Cummins, "Learning to Forget", 2000; projection: Sak, Senior and Beaufays, 2014.
    """
    i, f, g, o = (x_gates + h @ w_hh.T).chunk(4, dim=-1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return (h if w_hr is None else h @ w_hr.T), c


def valid_steps(T: int, B: int, batch_sizes: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[T, B] True where sequence b has a step t. Read row by row, the True entries are the packed rows in order."""
    if batch_sizes is not None:
        return torch.arange(B, device=device) < batch_sizes.to(device).unsqueeze(1)
    if lengths is not None:
        return torch.arange(T, device=device).unsqueeze(1) < lengths.to(device)
    return torch.ones(T, B, dtype=torch.bool, device=device)


def split_weights(
    weights: Sequence[Tensor], directions: int
) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """The flat list of one layer as (w_ih, w_hh, bias, w_hr) per direction; bias is b_ih + b_hh."""
    each = len(weights) // directions
    result = []
    for d in range(directions):
        w = weights[d * each : (d + 1) * each]
        result.append((w[0], w[1], w[2] + w[3] if each >= 4 else None, w[-1] if each in (3, 5) else None))
    return result


def lstm_layer(
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, the same arguments as the op `seqkernels::lstm`.

    Args:
        x: [T, B, D], or [N, D] with batch_sizes.
        h0, c0: [directions, B, P] and [directions, B, H]; None is zeros.
        weights: per direction w_ih [4H, D], w_hh [4H, P], b_ih and b_hh [4H] or absent, w_hr [P, H] or absent.
        batch_sizes: [T] as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] real steps of each row of a padded batch.
    Returns:
        y [T, B, directions * P] (or [N, ...]), zero beyond each length; h_n and c_n like h0 and c0.
    """
    directions = 2 if bidirectional else 1
    layers = split_weights(weights, directions)
    packed = batch_sizes is not None
    if batch_sizes is not None:
        T, B = batch_sizes.numel(), int(batch_sizes[0]) if batch_sizes.numel() else 0
    else:
        T, B = x.shape[0], x.shape[1]
    valid = valid_steps(T, B, batch_sizes, lengths, x.device)
    if packed:
        x = x.new_zeros(T, B, x.shape[-1]).index_put((valid,), x)
    else:
        x = torch.where(valid.unsqueeze(-1), x, x.new_zeros(()))

    outputs, h_n, c_n = [], [], []
    for d, (w_ih, w_hh, bias, w_hr) in enumerate(layers):
        H, P = w_hh.shape[0] // 4, w_hh.shape[1]
        h = h0[d] if h0 is not None else x.new_zeros(B, P)
        c = c0[d] if c0 is not None else x.new_zeros(B, H)
        x_gates = F.linear(x, w_ih, bias)
        steps: list[Tensor] = [x.new_zeros(B, P)] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            alive = valid[t].unsqueeze(-1)
            h_t, c_t = lstm_cell(x_gates[t], h, c, w_hh, w_hr)
            steps[t] = torch.where(alive, h_t, h_t.new_zeros(()))
            h, c = torch.where(alive, h_t, h), torch.where(alive, c_t, c)
        outputs.append(torch.stack(steps) if steps else x_gates[..., :P])
        h_n.append(h)
        c_n.append(c)
    y = torch.cat(outputs, dim=-1)
    return (y[valid] if packed else y), torch.stack(h_n), torch.stack(c_n)


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: LSTMState | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, LSTMState]:
    """Stacked layers: see `seqkernels.functional.lstm`, which this defines."""
    directions = 2 if bidirectional else 1
    each = len(weights) // num_layers
    transposed = batch_first and batch_sizes is None
    y = input.transpose(0, 1) if transposed else input
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
    h_n, c_n = [], []
    for layer in range(num_layers):
        states = slice(layer * directions, (layer + 1) * directions)
        h0, c0 = (hx[0][states], hx[1][states]) if hx is not None else (None, None)
        if layer:
            y = F.dropout(y, dropout, training)
        y, h, c = lstm_layer(y, h0, c0, weights[layer * each : (layer + 1) * each], batch_sizes, lengths, bidirectional)
        h_n.append(h)
        c_n.append(c)
    return (y.transpose(0, 1) if transposed else y), (torch.cat(h_n), torch.cat(c_n))
