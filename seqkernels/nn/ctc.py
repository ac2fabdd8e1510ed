"""torch.nn.CTCLoss with fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Proxy

from ..functional._checks import Lengths
from ..functional.ctc import ctc_loss
from ._symbolic import as_leaf, refuse_scripting


class CTCLoss(torch.nn.CTCLoss):
    """torch.nn.CTCLoss(blank=0, reduction="mean", zero_infinity=False), on CPUs.

    Shapes, dtypes, errors and differences from torch: see seqkernels.functional.ctc_loss.
    Deterministic: yes; see seqkernels.functional.ctc_loss.
    """

    __prepare_scriptable__ = refuse_scripting

    def forward(
        self,
        log_probs: Tensor,
        targets: Tensor,
        input_lengths: Lengths | int,
        target_lengths: Lengths | int,
    ) -> Tensor:
        """Loss of log_probs [T, N, C] or [T, C]."""
        given = dict(log_probs=log_probs, targets=targets, input_lengths=input_lengths, target_lengths=target_lengths)
        if any(isinstance(value, Proxy) for value in given.values()):
            return as_leaf(self, given)
        return ctc_loss(
            log_probs, targets, input_lengths, target_lengths, self.blank, self.reduction, self.zero_infinity
        )
