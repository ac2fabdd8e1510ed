"""Ops of additive attention: calls, fake implementations, autograd, torch.func.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels.functional._autograd import (
    below_autograd,
    jvp_by_definition,
    needs_definition,
    op,
    recorded,
    transformed,
    unchanged,
    vjp_by_definition,
    vmap_rule,
)
from seqkernels.reference.additive_attention import additive_attention

forward_op, backward_op = op("additive_attention_forward"), op("additive_attention_backward")
key_exp_op = op("additive_attention_key_exp")


class Inputs(NamedTuple):
    """Tensor arguments of the ops."""

    query: Tensor  # [B, Tq, H]
    key: Tensor  # [B, Tk, H]
    value: Tensor  # [B, Tk, Dv]
    v: Tensor  # [H]
    mask: Tensor | None  # bool [B | 1, Tq | 1, Tk]
    lengths: Tensor | None  # [B]
    key_exp: Tensor | None  # [B, Tk, H], a function of the key


DIFFERENTIABLE = 4  # the arguments with a gradient come first
NO_GRADIENT = [None] * (len(Inputs._fields) - DIFFERENTIABLE)


def attend(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The output [B, Tq, Dv] and the weights [B, Tq, Tk]."""
    if transformed():
        found: tuple[Tensor, Tensor] = _Forward.apply(*inputs)
        return found
    if not torch.compiler.is_compiling() and not recorded(*inputs[:DIFFERENTIABLE]):
        with below_autograd():
            return forward_op(*inputs)
    return forward_op(*inputs)


def key_exp(key: Tensor) -> Tensor | None:
    """What the kernels compute of each key alone, to use it for several calls; None in torch.func transforms."""
    if transformed():
        return None
    with torch.no_grad():
        return key_exp_op(key.detach())


# ---- gradients


def _definition(inputs: Inputs) -> Callable[..., tuple[Tensor, Tensor]]:
    def attended(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return additive_attention(query, key, value, v, inputs.mask, inputs.lengths)

    return attended


class _Forward(torch.autograd.Function):
    """The op under torch.func transforms and forward-mode AD, which register_autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        return forward_op(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        return _backward(Inputs(*inputs), weights, grads, ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        inputs = Inputs(*ctx.saved_tensors)
        return jvp_by_definition(_definition(inputs), inputs[:DIFFERENTIABLE], tangents[:DIFFERENTIABLE])


def _backward(
    inputs: Inputs, weights: Tensor, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    if grads[0] is None and grads[1] is None:
        return *[None] * DIFFERENTIABLE, *NO_GRADIENT
    if transformed() or needs_definition(grads):
        found = vjp_by_definition(_definition(inputs), inputs[:DIFFERENTIABLE], grads, needs[:DIFFERENTIABLE])
        return *found, *NO_GRADIENT
    query, key, value, v, _, lengths, exp = inputs
    gradients = backward_op(*grads, query, key, value, v, lengths, exp, weights)
    return *(g if need else None for g, need in zip(gradients, needs)), *NO_GRADIENT


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, unchanged(output[1]))
    ctx.set_materialize_grads(False)


def _backward_of_forward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, weights = ctx.saved_tensors
    return _backward(Inputs(*inputs), weights.detach(), grads, ctx.needs_input_grad)


# ---- registration


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    (B, Tq, _H), Tk = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(B, Tq, value.shape[2]), query.new_empty(B, Tq, Tk, dtype=wide)


def _backward_fake(dout: Any, dweights: Any, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:DIFFERENTIABLE])


def _key_exp_fake(key: Tensor) -> Tensor:
    return key.new_empty(key.shape, dtype=torch.promote_types(key.dtype, torch.float32))


for _name, _fake in (("forward", _forward_fake), ("backward", _backward_fake), ("key_exp", _key_exp_fake)):
    torch.library.register_fake(f"seqkernels::additive_attention_{_name}")(_fake)
    torch.library.register_vmap(f"seqkernels::additive_attention_{_name}", vmap_rule(op(f"additive_attention_{_name}")))
torch.library.register_autograd(
    "seqkernels::additive_attention_forward", _backward_of_forward, setup_context=_setup_forward
)
