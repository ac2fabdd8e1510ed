"""Reference definition of connectionist temporal classification in plain torch, one step at a time, in float64.

Dimensions: T steps, B sequences, C classes, S states.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._log_space import log_sum


def ctc_loss(
    log_probs: Tensor, targets: Tensor, input_lengths: Tensor, target_lengths: Tensor, blank: int = 0
) -> Tensor:
    """Negative log probability of a target, over all its alignments with blanks and repetitions.

    The first derivative with respect to log_probs is that with respect to the logits before log_softmax, as in
    torch.nn.functional.ctc_loss: e^log_probs, less the probability of a class at a step. Both give the same gradients
    to a model whose log_probs are normalised.

    Args:
        log_probs: [T, B, C] logarithms of probabilities.
        targets: [B, L] labels, or [sum of target_lengths].
        input_lengths, target_lengths: [B] number of steps and of labels.
        blank: class of the blank.
    Returns:
        [B] float64; infinity if no alignment exists.
    Source: Graves et al., "Connectionist Temporal Classification", 2006.
    """
    T, B, _ = log_probs.shape
    device = log_probs.device
    L = int(target_lengths.max()) if B else 0
    if targets.dim() == 1:
        starts = target_lengths.cumsum(0) - target_lengths
        at = starts[:, None] + torch.arange(L, device=device)
        targets = targets[at.clamp(max=max(targets.shape[0] - 1, 0))] if targets.numel() else targets.new_zeros(B, L)
    S = 2 * L + 1
    state = torch.arange(S, device=device)
    blanks = torch.full((B, L), blank, device=device)
    labels = torch.nn.functional.pad(torch.stack((blanks, targets[:, :L]), 2).flatten(1), (0, 1), value=blank)
    exists = state < 2 * target_lengths[:, None] + 1
    labels = torch.where(exists, labels, blank)
    two_before = torch.nn.functional.pad(labels, (2, 0), value=blank)[:, :S]
    skips = (state % 2 == 1) & (state > 1) & (labels != two_before)
    within = torch.arange(T, device=device)[:, None] < input_lengths  # [T, B]
    wide = torch.where(within[:, :, None], log_probs.double(), 0)
    alpha = torch.where(state < 1, 0.0, wide.new_full((B, S), -torch.inf))  # before the first step
    for t in range(T):
        emitted = wide[t].gather(1, labels)
        if t == 0:
            entered = torch.where(state < 2, 0.0, torch.full_like(alpha, -torch.inf))
        else:
            before = torch.nn.functional.pad(alpha, (2, 0), value=-torch.inf)
            skipped = torch.where(skips, before[:, :S], -torch.inf)
            entered = log_sum(torch.stack((alpha, before[:, 1 : S + 1], skipped)), 0)
        alpha = torch.where(within[t][:, None], torch.where(exists, entered + emitted, -torch.inf), alpha)
    end = 2 * target_lengths[:, None]
    loss = -log_sum(torch.where((state == end) | (state == end - 1), alpha, -torch.inf), 1)
    sums = (wide.exp() * within[:, :, None]).sum((0, 2))  # contributes to the derivative alone
    return loss + (sums - sums.detach())
