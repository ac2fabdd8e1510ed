"""Connectionist temporal classification: argument checks and calls of the ops.

Intended differences from torch.nn.functional.ctc_loss:
- Half types are supported, with a float32 loss.
- Targets out of range raise.
- Gradients of any order, forward-mode gradients and torch.func transforms are supported.
- input_lengths and target_lengths may be any mix of tensors and sequences of int.

Dimensions: T steps, N sequences, C classes, S labels of the longest target.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from ._checks import (
    Lengths,
    TypeRuntimeError,
    ValueRuntimeError,
    describe,
    lengths_tensor,
    of_op,
)
from ._ctc_ops import REDUCTIONS, Alignment, reduced_loss
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function,
    refuse_nested,
)
from ._values import PLAIN, moded

__all__ = ["ctc_loss"]


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Lengths | int,
    target_lengths: Lengths | int,
    blank: int = 0,
    reduction: str = "mean",
    zero_infinity: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """Negative log probability of targets, over all their alignments with blanks and repetitions.

    Args:
        log_probs: [T, N, C] or [T, C] logarithms of probabilities, of any supported dtype; gradient: yes.
            Steps beyond the length of a sequence are not read.
        targets: [N, S] integers from 0 to C - 1, or [sum of target_lengths], the targets one after the other.
        input_lengths, target_lengths: [N] number of steps and of labels of each sequence, from 0: integer
            tensors on any device, or sequences of int. [] or int for log_probs [T, C].
        blank: class of the blank.
        reduction: none, sum, or mean: the mean over the sequences of the loss divided by the length of the target.
        zero_infinity: whether infinite losses, of targets without an alignment, and their gradients are zero.
        backend: cpu, or None.
    Returns:
        [N], or [] with reduction="mean" or "sum" or for log_probs [T, C]; dtype of log_probs, float32 for half types.
        The sum over the steps is in float64.
    Raises:
        ValueError, TypeError: invalid shape, length, value or dtype; also RuntimeError where torch raises it.
        NotImplementedError: no implementation supports the inputs; on a GPU, use torch's.
    Equivalent to: torch.nn.functional.ctc_loss. As there, the gradient of log_probs is that of the logits before
        log_softmax, which gives the same gradients to a model.
    Deterministic: yes; the bits of a sequence do not depend on the batch, padding or threads.
    Source: Graves et al., "Connectionist Temporal Classification", 2006.
    """
    caller = "ctc_loss"
    if type(log_probs) in PLAIN and type(targets) is Tensor and backend is None and not moded():
        try:
            steps, labels = _plain_lengths(input_lengths), _plain_lengths(target_lengths)
            if _is_plain(log_probs, targets, steps, labels, blank, zero_infinity):
                number = REDUCTIONS.index(reduction)
                return reduced_loss(Alignment(log_probs, targets, steps, labels, blank, number, zero_infinity))
        except (RuntimeError, TypeError, ValueError):  # the code below raises the error of this function
            pass
    given = log_probs, targets, input_lengths, target_lengths
    if has_torch_function(given) and dispatches(*given):
        return handle_torch_function(ctc_loss, given, *given, blank, reduction, zero_infinity, backend=backend)
    for name, t in (("log_probs", log_probs), ("targets", targets)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {describe(t)}")
    refuse_nested(caller, "pad it", log_probs=log_probs, targets=targets)
    if not isinstance(blank, int) or not isinstance(zero_infinity, (bool, int)):
        wrong = ("zero_infinity", "a bool") if isinstance(blank, int) else ("blank", "an int")
        raise TypeError(
            f"{caller}: {wrong[0]} must be {wrong[1]}, got {zero_infinity if wrong[0] != 'blank' else blank!r}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{caller}: reduction must be none, mean or sum, got {reduction!r}")
    if log_probs.device.type != "meta" or backend is not None or log_probs.dtype not in backends.DTYPES:
        request = backends.Request(log_probs.device, log_probs.dtype)
        backends.choose(caller, backends.CTC, request, backend, "log_probs", log_probs.shape)
    single = log_probs.dim() == 2
    if single:
        log_probs = log_probs.unsqueeze(1)
        input_lengths, target_lengths = (_one(n) for n in (input_lengths, target_lengths))
    if log_probs.dim() != 3 or log_probs.shape[2] < 1:
        raise ValueRuntimeError(f"{caller}: log_probs must have shape [T, N, C] or [T, C], got {list(log_probs.shape)}")
    N, device = log_probs.shape[1], log_probs.device
    input_lengths, target_lengths = (_widened(n) for n in (input_lengths, target_lengths))
    steps = lengths_tensor(caller, input_lengths, N, device, "input_lengths", "N")  # type: ignore[arg-type]
    labels = lengths_tensor(caller, target_lengths, N, device, "target_lengths", "N")  # type: ignore[arg-type]
    if targets.dim() not in (1, 2):
        raise ValueRuntimeError(
            f"{caller}: targets must have shape [N, S] or [sum of target_lengths], got {list(targets.shape)}"
        )
    if targets.is_complex() or targets.dtype == torch.bool:
        raise TypeRuntimeError(f"{caller}: targets must be integers, got {targets.dtype}")
    targets = targets.to(device, torch.int64)
    try:
        loss = reduced_loss(
            Alignment(log_probs, targets, steps, labels, blank, REDUCTIONS.index(reduction), bool(zero_infinity))
        )
    except RuntimeError as error:
        raise of_op(caller, error) from None
    return loss.squeeze(0) if single and loss.dim() else loss


def _plain_lengths(n: Any) -> Any:
    """Lengths as a tensor, if they are a list or a tuple of integers."""
    return torch.tensor([operator.index(i) for i in n], device="cpu") if type(n) in (list, tuple) else n


def _is_plain(log_probs: Tensor, targets: Tensor, steps: Any, labels: Any, blank: Any, zero_infinity: Any) -> bool:
    """Whether the op checks the rest: the arguments have its types, and the tensors are plain ones on the CPU."""
    return (
        log_probs.dim() == 3
        and type(steps) is type(labels) is Tensor
        and targets.dtype is steps.dtype is labels.dtype is torch.int64
        and log_probs.is_cpu
        and targets.is_cpu
        and steps.is_cpu
        and labels.is_cpu
        and type(blank) is int
        and type(zero_infinity) is bool
    )


def _widened(n: Any) -> Any:
    """Integers of any width as int64."""
    small = isinstance(n, Tensor) and n.dtype in (torch.uint8, torch.int8, torch.int16)
    return n.long() if small else n


def _one(n: Any) -> Any:
    """Length of the only sequence as a batch."""
    if isinstance(n, Tensor):
        return n.reshape(1) if n.numel() == 1 else n
    return [n] if isinstance(n, int) else n
