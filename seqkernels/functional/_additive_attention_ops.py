"""Ops of additive attention: calls, fake implementations, autograd, torch.func.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.additive_attention import additive_attention
from . import _triton_ops
from ._autograd import (
    NAMESPACE,
    Function,
    below_autograd,
    eager_function,
    jvp_by_definition,
    needs_definition,
    op,
    recorded,
    register_fake,
    transformed,
    unchanged,
    vjp_by_definition,
    vmap_rule,
)
from ._values import dense_on_cpu, eager_on_cpu

key_exp_op = op("additive_attention_key_exp")


class Ops(NamedTuple):
    """The ops of an implementation."""

    forward: Function
    backward: Function


def _ops_of(namespace: str) -> Ops:
    return Ops(op("additive_attention_forward", namespace), op("additive_attention_backward", namespace))


for _name in Ops._fields:
    _triton_ops.define(f"additive_attention_{_name}", "additive_attention.launch", f"{_name}_op")
OPS = {"cpu": _ops_of(NAMESPACE), "triton": _ops_of(_triton_ops.NAMESPACE)}


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


def attend(inputs: Inputs, ops: Ops) -> tuple[Tensor, Tensor]:
    """The output [B, Tq, Dv] and the weights [B, Tq, Tk]."""
    found: tuple[Tensor, Tensor]
    if transformed():
        found = _Forward.apply(ops, *inputs)
    elif torch.compiler.is_compiling():
        found = ops.forward(*inputs)
    elif recorded(*inputs[:DIFFERENTIABLE]):
        fast = ops is OPS["cpu"] and eager_on_cpu() and dense_on_cpu(*inputs)
        found = _recorded(*inputs) if fast else ops.forward(*inputs)
    else:
        with below_autograd():
            found = ops.forward(*inputs)
    return found


def key_exp(key: Tensor) -> Tensor | None:
    """What the CPU kernels compute of each key alone, to use it for several calls.

    None in torch.func transforms, and on a GPU, where reading it would take longer than computing it.
    """
    if transformed() or key.device.type not in ("cpu", "meta"):
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
    def forward(ops: Ops, *inputs: Any) -> Any:
        return ops.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.ops, *tensors = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        return None, *_backward(ctx.ops, Inputs(*inputs), weights, grads, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, _ops: None, *tangents: Tensor | None) -> Any:
        inputs = Inputs(*ctx.saved_tensors)
        return jvp_by_definition(_definition(inputs), inputs[:DIFFERENTIABLE], tangents[:DIFFERENTIABLE])


def _backward(
    ops: Ops, inputs: Inputs, weights: Tensor, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    if grads[0] is None and grads[1] is None:
        return *[None] * DIFFERENTIABLE, *NO_GRADIENT
    if transformed() or needs_definition(grads):
        found = vjp_by_definition(_definition(inputs), inputs[:DIFFERENTIABLE], grads, needs[:DIFFERENTIABLE])
        return *found, *NO_GRADIENT
    query, key, value, v, _, lengths, exp = inputs
    gradients = ops.backward(*grads, query, key, value, v, lengths, exp, weights)
    return *(g if need else None for g, need in zip(gradients, needs)), *NO_GRADIENT


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, unchanged(output[1]))
    ctx.set_materialize_grads(False)


# ---- registration


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    (B, Tq, _H), Tk = query.shape, key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(B, Tq, value.shape[2]), query.new_empty(B, Tq, Tk, dtype=wide)


def _backward_fake(dout: Any, dweights: Any, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(t.new_empty(t.shape) for t in inputs[:DIFFERENTIABLE])


def _key_exp_fake(key: Tensor) -> Tensor:
    return key.new_empty(key.shape, dtype=torch.promote_types(key.dtype, torch.float32))


def _formula_of(ops: Ops) -> Function:
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, weights = ctx.saved_tensors
        return _backward(ops, Inputs(*inputs), weights.detach(), grads, ctx.needs_input_grad)

    return backward


_recorded = eager_function("AdditiveAttention", OPS["cpu"].forward, _setup_forward, _formula_of(OPS["cpu"]))


def _register(ops: Ops, namespace: str) -> None:
    name = f"{namespace}::additive_attention"
    for way, fake in (("forward", _forward_fake), ("backward", _backward_fake)):
        register_fake(f"{name}_{way}", fake)
        torch.library.register_vmap(f"{name}_{way}", vmap_rule(getattr(ops, way)))
    torch.library.register_autograd(f"{name}_forward", _formula_of(ops), setup_context=_setup_forward)


_register(OPS["cpu"], NAMESPACE)
_register(OPS["triton"], _triton_ops.NAMESPACE)
register_fake(f"{NAMESPACE}::additive_attention_key_exp", _key_exp_fake)
torch.library.register_vmap(f"{NAMESPACE}::additive_attention_key_exp", vmap_rule(key_exp_op))
