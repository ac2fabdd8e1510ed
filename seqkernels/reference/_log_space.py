"""Sums of exponentials of logarithms."""

from __future__ import annotations

import torch
from torch import Tensor


def log_sum(x: Tensor, dim: int) -> Tensor:
    """logsumexp whose gradient is 0 where all terms are -inf."""
    most = x.detach().amax(dim, keepdim=True)
    most = torch.where(most == -torch.inf, 0, most)
    total = (x - most).exp().sum(dim)
    none = total == 0
    return torch.where(none, -torch.inf, torch.where(none, 1, total).log() + most.squeeze(dim))
