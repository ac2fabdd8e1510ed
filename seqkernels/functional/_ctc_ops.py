"""Ops of connectionist temporal classification: calls, fake implementations, autograd, torch.func.

Dimensions: T steps, B sequences, C classes, S states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.ctc import ctc_loss
from ._autograd import (
    NAMESPACE,
    below_autograd,
    jvp_by_definition,
    needs_definition,
    op,
    register_fake,
    transformed,
    vjp_by_definition,
    vmap_rule,
)
from ._values import special

REDUCTIONS = ("none", "mean", "sum")
forward_op, backward_op = op("ctc_loss_forward"), op("ctc_loss_backward")


class Alignment(NamedTuple):
    """Arguments of the ops."""

    log_probs: Tensor  # [T, B, C]
    targets: Tensor  # [B, L] or [sum of target_lengths]
    input_lengths: Tensor  # [B]
    target_lengths: Tensor  # [B]
    blank: int
    reduction: int  # position in REDUCTIONS
    zero_infinity: bool


def reduced_loss(inputs: Alignment) -> Tensor:
    """The loss, [B] or [] by the reduction."""
    found: Tensor
    if not special():
        if inputs[0].requires_grad and torch.is_grad_enabled():
            return _record(*inputs)
        with below_autograd():
            found = forward_op(*inputs)[0]
    elif transformed():
        found = _Forward.apply(*inputs)[0]
    else:
        found = forward_op(*inputs)[0]
    return found


# ---- gradients


def _definition(inputs: Alignment) -> Callable[[Tensor], Tensor]:
    def loss(log_probs: Tensor) -> Tensor:
        found = ctc_loss(log_probs, inputs.targets, inputs.input_lengths, inputs.target_lengths, inputs.blank)
        if inputs.zero_infinity:
            found = torch.where(found == torch.inf, 0, found)
        if REDUCTIONS[inputs.reduction] == "mean":
            found = (found / inputs.target_lengths.clamp(min=1)).mean()
        elif REDUCTIONS[inputs.reduction] == "sum":
            found = found.sum()
        return found.to(torch.promote_types(log_probs.dtype, torch.float32))

    return loss


def _saved(ctx: Any) -> tuple[Alignment, Tensor, Tensor]:
    log_probs, targets, steps, labels, losses, alpha = ctx.saved_tensors
    return Alignment(log_probs, targets, steps, labels, *ctx.numbers), losses, alpha


def _gradient(
    inputs: Alignment, losses: Tensor, alpha: Tensor, dloss: Tensor | None, needed: bool
) -> tuple[Tensor | None, ...]:
    none = [None] * (len(Alignment._fields) - 1)
    if dloss is None or not needed:
        return None, *none
    if transformed() or needs_definition([dloss]):
        return *vjp_by_definition(_definition(inputs), [inputs.log_probs], [dloss], [True]), *none
    return backward_op(dloss, *inputs, losses, alpha), *none


class _Recorded(torch.autograd.Function):
    """A recorded call in eager mode, with a third of the overhead of register_autograd."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        with below_autograd():
            loss, losses, alpha = forward_op(*inputs)
        ctx.numbers = inputs[4:]
        ctx.save_for_backward(*inputs[:4], losses, alpha)
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(*_saved(ctx), dloss, True)


# _Recorded.apply without its search for torch.func wrappers, which doubles the time of the call.
_record: Callable[..., Tensor] = super(torch.autograd.Function, _Recorded).apply


class _Forward(torch.autograd.Function):
    """The op under torch.func transforms and forward-mode AD, which register_autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.numbers = inputs[4:]
        ctx.save_for_backward(*inputs[:4], *output[1:])
        ctx.save_for_forward(*inputs[:4], *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(*_saved(ctx), grads[0], ctx.needs_input_grad[0])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        inputs, *_ = _saved(ctx)
        return *jvp_by_definition(_definition(inputs), [inputs.log_probs], tangents[:1]), None, None


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.numbers = inputs[4:]
    ctx.save_for_backward(*inputs[:4], *output[1:])
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs, losses, alpha = _saved(ctx)
    return _gradient(inputs, losses.detach(), alpha.detach(), grads[0], ctx.needs_input_grad[0])


# ---- registration


def _forward_fake(log_probs: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    T, B, _C = log_probs.shape
    wide = torch.promote_types(log_probs.dtype, torch.float32)
    S: Any
    if targets.dim() == 2:
        S = 2 * targets.shape[1] + 1
    elif targets.is_meta:  # no lengths, and the values of alpha do not exist either
        S = 2 * targets.shape[0] + 1
    else:
        S = torch.library.get_ctx().new_dynamic_size()  # 2 * the longest target + 1
    loss = log_probs.new_empty(() if rest[-2] else (B,), dtype=wide)
    return loss, log_probs.new_empty(B, dtype=torch.float64), log_probs.new_empty(B, T, S, dtype=wide)


def _backward_fake(dloss: Tensor, log_probs: Tensor, *_: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape)


for _name, _fake in (("forward", _forward_fake), ("backward", _backward_fake)):
    register_fake(f"{NAMESPACE}::ctc_loss_{_name}", _fake)
    torch.library.register_vmap(f"{NAMESPACE}::ctc_loss_{_name}", vmap_rule(op(f"ctc_loss_{_name}")))
torch.library.register_autograd(f"{NAMESPACE}::ctc_loss_forward", _backward_of_forward, setup_context=_setup_forward)
