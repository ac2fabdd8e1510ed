"""Recurrent layers, defined in plain torch.

Dimensions: B batch, T time, N packed rows, D input, H hidden, P what is fed back (the projection size, or H), G gates,
L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

States = tuple[Tensor, ...]  # (h,), or (h, c) for LSTM
# One step: from_x [B, G * H] and from_h [B, G * H] are the two products with their biases; returns the new states.
Cell = Callable[[Tensor, Tensor, States], States]


def lstm_cell(from_x: Tensor, from_h: Tensor, states: States) -> States:
    """Source: Hochreiter and Schmidhuber, 1997; forget gate: Gers, Schmidhuber and Cummins, 2000."""
    i, f, g, o = (from_x + from_h).chunk(4, dim=-1)
    c = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru_cell(from_x: Tensor, from_h: Tensor, states: States) -> States:
    """Source: Cho et al., 2014, with the reset gate after the product, as torch.nn.GRU has it."""
    x_r, x_z, x_n = from_x.chunk(3, dim=-1)
    h_r, h_z, h_n = from_h.chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return ((1 - z) * n + z * states[0],)


def rnn_tanh_cell(from_x: Tensor, from_h: Tensor, states: States) -> States:
    """Source: Elman, "Finding Structure in Time", 1990."""
    return (torch.tanh(from_x + from_h),)


def rnn_relu_cell(from_x: Tensor, from_h: Tensor, states: States) -> States:
    """Source: Le, Jaitly and Hinton, 2015."""
    return (torch.relu(from_x + from_h),)


def valid_steps(T: int, B: int, batch_sizes: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor:
    """[T, B] True where sequence b has a step t. Read row by row, the True entries are the packed rows in order."""
    if batch_sizes is not None:
        return torch.arange(B, device=device) < batch_sizes.to(device).unsqueeze(1)
    if lengths is not None:
        return torch.arange(T, device=device).unsqueeze(1) < lengths.to(device)
    return torch.ones(T, B, dtype=torch.bool, device=device)


def layer(
    cell: Cell,
    state_count: int,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    bidirectional: bool = False,
) -> tuple[Tensor, ...]:
    """One layer.

    Args:
        x: [T, B, D], or [N, D] with batch_sizes.
        states0: [directions, B, P] h0 and, in an LSTM, [directions, B, H] c0; None is zeros.
        weights: per direction w_ih [G * H, D], w_hh [G * H, P], b_ih and b_hh [G * H] or absent, w_hr [P, H] or absent.
        batch_sizes: [T] as in torch.nn.utils.rnn.PackedSequence.
        lengths: [B] real steps of each row of a padded batch.
    Returns:
        y [T, B, directions * P] (or [N, ...]), zero beyond each length; then the last states, like states0.
    """
    directions = 2 if bidirectional else 1
    each = len(weights) // directions
    if batch_sizes is not None:
        T, B = batch_sizes.numel(), int(batch_sizes[0]) if batch_sizes.numel() else 0
    else:
        T, B = x.shape[0], x.shape[1]
    valid = valid_steps(T, B, batch_sizes, lengths, x.device)
    if batch_sizes is not None:
        x = x.new_zeros(T, B, x.shape[-1]).index_put((valid,), x)
    else:
        x = torch.where(valid.unsqueeze(-1), x, x.new_zeros(()))

    outputs: list[Tensor] = []
    last: list[States] = []
    for d in range(directions):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        b_ih, b_hh = rest[:2] if each >= 4 else (None, None)
        w_hr = rest[-1] if each in (3, 5) else None
        P = w_hh.shape[1]
        widths = (P, P if w_hr is None else w_hr.shape[1])[:state_count]
        states = tuple(x.new_zeros(B, w) if s is None else s[d] for s, w in zip(states0, widths))
        from_x = F.linear(x, w_ih, b_ih)
        of_step = from_x.unbind(0)  # once: indexing step by step would make backward quadratic in T
        steps: list[Tensor] = [x.new_zeros(B, P)] * T
        for t in range(T) if d == 0 else reversed(range(T)):
            h, *others = cell(of_step[t], F.linear(states[0], w_hh, b_hh), states)
            if w_hr is not None:  # Sak, Senior and Beaufays, 2014
                h = h @ w_hr.T
            alive = valid[t].unsqueeze(-1)
            steps[t] = torch.where(alive, h, h.new_zeros(()))
            states = tuple(torch.where(alive, new, old) for new, old in zip((h, *others), states))
        outputs.append(torch.stack(steps) if steps else from_x[..., :P])
        last.append(states)
    y = torch.cat(outputs, dim=-1)
    return (y[valid] if batch_sizes is not None else y), *(torch.stack(of_state) for of_state in zip(*last))


def stack(
    cell: Cell,
    state_count: int,
    input: Tensor,
    weights: Sequence[Tensor],
    hx: Sequence[Tensor] | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | Sequence[int] | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
) -> tuple[Tensor, ...]:
    directions = 2 if bidirectional else 1
    each = len(weights) // num_layers
    transposed = batch_first and batch_sizes is None
    y = input.transpose(0, 1) if transposed else input
    if lengths is not None:
        lengths = torch.as_tensor(lengths)
    last = []
    for i in range(num_layers):
        at = slice(i * directions, (i + 1) * directions)
        states0 = [None] * state_count if hx is None else [s[at] for s in hx]
        if i:
            y = F.dropout(y, dropout, training)
        of_layer = weights[i * each : (i + 1) * each]
        y, *states = layer(cell, state_count, y, states0, of_layer, batch_sizes, lengths, bidirectional)
        last.append(states)
    return (y.transpose(0, 1) if transposed else y), *(torch.cat(of_state) for of_state in zip(*last))


def lstm(
    input: Tensor,
    weights: Sequence[Tensor],
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | Sequence[int] | None = None,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Defines `seqkernels.functional.lstm`."""
    options = (batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout, training)
    y, h_n, c_n = stack(lstm_cell, 2, input, weights, hx, *options)
    return y, (h_n, c_n)


def _one_state(cell: Cell, doc: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def function(
        input: Tensor,
        weights: Sequence[Tensor],
        hx: Tensor | None = None,
        *,
        batch_sizes: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        num_layers: int = 1,
        bidirectional: bool = False,
        batch_first: bool = False,
        dropout: float = 0.0,
        training: bool = False,
    ) -> tuple[Tensor, Tensor]:
        options = (batch_sizes, lengths, num_layers, bidirectional, batch_first, dropout, training)
        y, h_n = stack(cell, 1, input, weights, None if hx is None else (hx,), *options)
        return y, h_n

    function.__doc__ = doc
    return function


gru = _one_state(gru_cell, "Defines `seqkernels.functional.gru`.")
rnn_tanh = _one_state(rnn_tanh_cell, "Defines `seqkernels.functional.rnn_tanh`.")
rnn_relu = _one_state(rnn_relu_cell, "Defines `seqkernels.functional.rnn_relu`.")
