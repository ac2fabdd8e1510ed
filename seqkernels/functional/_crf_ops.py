"""Ops of conditional random fields: calls, fake implementations, autograd, torch.func.

crf_forward computes log Z and the score of tags in float64; crf_backward computes their gradients, which are the
marginal probabilities, and has a gradient itself, through the reference definition.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.crf import log_partition_and_score
from . import _triton_ops
from ._autograd import (
    NAMESPACE,
    Function,
    below_autograd,
    jvp_by_definition,
    needs_definition,
    op,
    recorded,
    register_fake,
    transformed,
    vjp_by_definition,
    vmap_rule,
)
from ._values import special

NAMES = ("crf_forward", "crf_backward", "crf_viterbi")
for _name in NAMES:
    _triton_ops.define(_name, "crf.ops", _name.removeprefix("crf_") + "_op")


class Ops(NamedTuple):
    """The ops of one implementation."""

    forward: Function
    backward: Function
    viterbi: Function


OPS = {
    "cpu": Ops(*(op(name) for name in NAMES)),
    "triton": Ops(*(op(name, _triton_ops.NAMESPACE) for name in NAMES)),
}


class Chain(NamedTuple):
    """Tensor arguments of the ops."""

    emissions: Tensor  # [B, T, K]
    transitions: Tensor  # [B | 1, T | 1, K, K]
    start: Tensor | None  # [K]
    end: Tensor | None  # [K]
    lengths: Tensor | None  # [B]
    mask: Tensor | None  # [B, T] bool
    tags: Tensor | None = None  # [B, T]


SCORES = 4  # the arguments with a gradient come first


def log_partition(ops: Ops, chain: Chain) -> tuple[Tensor, Tensor]:
    """log Z and the score of the tags, [B] float64."""
    if not special():
        if recorded(*chain[:SCORES]):
            return _record(ops, *chain)
        with below_autograd():
            return ops.forward(*chain)[:2]
    if transformed():
        return _Forward.apply(ops, *chain)[:2]
    return ops.forward(*chain)[:2]


def marginals(ops: Ops, chain: Chain) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of log Z: the marginal probabilities, and their sums over the steps that share a score."""
    B = chain.emissions.shape[0]
    one = chain.emissions.new_ones(B, dtype=torch.float64)
    if transformed():
        return _gradients(one, torch.zeros_like(one), *chain)
    _, _, alpha = ops.forward(*(None if t is None else t.detach() for t in chain))
    return _optional(chain, ops.backward(one, torch.zeros_like(one), *chain, alpha))


def _optional(chain: Chain, found: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    demissions, dtransitions, dstart, dend = found
    return demissions, dtransitions, None if chain.start is None else dstart, None if chain.end is None else dend


# ---- gradients


def _definition(chain: Chain) -> Callable[..., tuple[Tensor, Tensor]]:
    def log_z_and_score(*scores: Tensor) -> tuple[Tensor, Tensor]:
        return log_partition_and_score(*scores, *chain[SCORES:])

    return log_z_and_score


def _gradients(dlog_z: Tensor, dscore: Tensor, *inputs: Any) -> Any:
    """The definition of crf_backward: gradients of the scores, None for absent ones."""
    chain = Chain(*inputs)
    needs = [t is not None for t in chain[:SCORES]]
    return tuple(vjp_by_definition(_definition(chain), chain[:SCORES], (dlog_z, dscore), needs))


def _first_order(ops: Ops, chain: Chain, alpha: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    dlog_z, dscore = grads[:2]
    if dlog_z is None or dscore is None:
        zero = alpha.new_zeros(alpha.shape[0], dtype=torch.float64)
        dlog_z, dscore = (zero if g is None else g for g in grads[:2])
    if special():
        return _optional(chain, ops.backward(dlog_z, dscore, *chain, alpha))
    with below_autograd():
        return _optional(chain, ops.backward(dlog_z, dscore, *chain, alpha))


class _Recorded(torch.autograd.Function):
    """A recorded log Z in eager mode, with a third of the overhead of register_autograd."""

    @staticmethod
    def forward(ctx: Any, ops: Ops, *chain: Any) -> tuple[Tensor, Tensor]:
        with below_autograd():
            log_z, score, alpha = ops.forward(*chain)
        ctx.ops = ops
        ctx.save_for_backward(*chain, alpha)
        ctx.set_materialize_grads(False)
        return log_z, score

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Forward.backward(ctx, *grads)


# _Recorded.apply without its search for torch.func wrappers, which doubles the time of the call.
_record: Callable[..., tuple[Tensor, Tensor]] = super(torch.autograd.Function, _Recorded).apply


class _Forward(torch.autograd.Function):
    """log Z under torch.func transforms and forward-mode AD, which register_autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(ops: Ops, *chain: Any) -> Any:
        return ops.forward(*chain)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.ops, *chain = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*chain, output[2])
        ctx.save_for_forward(*chain)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, alpha = ctx.saved_tensors
        return None, *_backward(ctx.ops, Chain(*inputs), alpha, grads, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        chain = Chain(*ctx.saved_tensors)
        return *jvp_by_definition(_definition(chain), chain[:SCORES], tangents[:SCORES]), None


def _backward(
    ops: Ops, chain: Chain, alpha: Tensor, grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    rest = [None] * (len(Chain._fields) - SCORES)
    if grads[0] is None and grads[1] is None:
        return *[None] * SCORES, *rest
    if transformed() or needs_definition(grads):
        found = vjp_by_definition(_definition(chain), chain[:SCORES], grads[:2], needs[:SCORES])
        return *found, *rest
    found = list(_first_order(ops, chain, alpha, grads))
    return *(g if need else None for g, need in zip(found, needs)), *rest


def _setup_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(False)


def _backward_of_forward(ops: Ops, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, alpha = ctx.saved_tensors
    return _backward(ops, Chain(*inputs), alpha.detach(), grads, ctx.needs_input_grad)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs[:-1])
    ctx.set_materialize_grads(False)


def _backward_of_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dlog_z, dscore, *inputs = ctx.saved_tensors
    chain, needs = Chain(*inputs), ctx.needs_input_grad[: 2 + SCORES]
    wanted = [i for i, t in enumerate(chain[:SCORES]) if t is not None]

    def gradients(dlog_z: Tensor, dscore: Tensor, *scores: Tensor | None) -> tuple[Tensor, ...]:
        found = _gradients(dlog_z, dscore, *scores, *chain[SCORES:])
        return tuple(found[i] for i in wanted)

    found = vjp_by_definition(gradients, (dlog_z, dscore, *chain[:SCORES]), [grads[i] for i in wanted], needs)
    return *found, *[None] * (len(Chain._fields) - SCORES + 1)


# ---- registration


def _forward_fake(emissions: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, T, K = emissions.shape
    wide = torch.float64 if emissions.dtype == torch.float64 else torch.float32
    log_z = emissions.new_empty(B, dtype=torch.float64)
    return log_z, torch.empty_like(log_z), emissions.new_empty(B, T, K, dtype=wide)


def _backward_fake(dlog_z: Tensor, dscore: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    chain = Chain(*inputs[:-1])
    K = chain.emissions.shape[2]
    ends = (chain.emissions.new_empty(0 if t is None else K) for t in (chain.start, chain.end))
    return chain.emissions.new_empty(chain.emissions.shape), chain.emissions.new_empty(chain.transitions.shape), *ends


def _viterbi_fake(emissions: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, T, _ = emissions.shape
    tags = emissions.new_empty(B, rest[-1], T, dtype=torch.int64)
    return tags, emissions.new_empty(B, rest[-1], dtype=torch.float64)


_FAKES: tuple[Function, ...] = (_forward_fake, _backward_fake, _viterbi_fake)
for _backend, _namespace in (("cpu", NAMESPACE), ("triton", _triton_ops.NAMESPACE)):
    _ops = OPS[_backend]
    for _name, _fake, _op in zip(NAMES, _FAKES, _ops):
        register_fake(f"{_namespace}::{_name}", _fake)
        torch.library.register_vmap(f"{_namespace}::{_name}", vmap_rule(_op))
    torch.library.register_autograd(
        f"{_namespace}::crf_forward", functools.partial(_backward_of_forward, _ops), setup_context=_setup_forward
    )
    torch.library.register_autograd(f"{_namespace}::crf_backward", _backward_of_backward, setup_context=_setup_backward)
