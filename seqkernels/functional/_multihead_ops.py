"""Multi-head attention with its projections, in plain eager mode on a CPU: the fast path of MultiheadAttention.

One op computes attention from packed projections, without views by head, and one autograd function covers the
projections and the attention. Under torch.compile, transforms and modes, and on other devices, the module calls
torch.nn.functional.linear and scaled_dot_product_attention.

Dimensions: B batch, T queries, S keys, E embed_dim, H heads. The layout of the sequences is [B, T, E] with batch_first,
otherwise [T, B, E].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.attention import attention as attention_definition
from ..reference.attention import attention_weights as weights_definition
from ._attention_ops import AttentionArgs, Inputs
from ._autograd import NAMESPACE, needs_definition, op, recorded, register_fake, vjp_by_definition, vmap_rule

NO_WEIGHTS, MEAN_WEIGHTS, HEAD_WEIGHTS = 0, 1, 2

_forward_op = op("multihead_attention_forward")
_not_a_view = torch.ops.aten._unsafe_view.default
_backward_op = op("multihead_attention_backward")


class Parameters(NamedTuple):
    """The parameters of the projections."""

    in_weight: Tensor  # [3E, E]
    in_bias: Tensor | None  # [3E]
    out_weight: Tensor  # [E, E]
    out_bias: Tensor | None  # [E]


class Options(NamedTuple):
    """Arguments of both ops that are not tensors."""

    heads: int
    batch_first: bool
    scale: float
    causal: int  # 0: none, 1: upper left
    dropout_p: float


DIFFERENTIABLE = 2 + len(Parameters._fields)  # the arguments with a gradient come first


def multihead(
    query: Tensor,
    memory: Tensor | None,
    parameters: Parameters,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    need_weights: int,
) -> tuple[Tensor, Tensor]:
    """The output, shaped as query, and the weights: empty, [B, T, S] or [B, H, T, S].

    Args:
        query: gradient: yes. memory: the sequences of keys and values; query if None; gradient: yes.
        padding: bool [B, S], True: masked. attn_mask: bool (True: attend) or float, [1, 1, T, S]. One or neither.
        seed: of dropout. need_weights: NO_WEIGHTS, MEAN_WEIGHTS or HEAD_WEIGHTS.
    """
    if recorded(query, memory, *parameters):
        found: tuple[Tensor, Tensor] = _Multihead.apply(
            query, memory, *parameters, padding, attn_mask, seed, options, need_weights
        )
        return found
    return _forward(query, memory, *parameters, padding, attn_mask, seed, options, need_weights)[:2]


def _forward(
    query: Tensor,
    memory: Tensor | None,
    in_weight: Tensor,
    in_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    seed: Tensor | None,
    options: Options,
    need_weights: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The output, the weights, and what backward needs: the projections, and out and lse of attention."""
    kv = None
    if memory is None:
        q = F.linear(query, in_weight, in_bias)
    else:
        E = in_weight.shape[1]
        of_q, of_kv = in_weight.split((E, 2 * E))
        bias_q, bias_kv = (None, None) if in_bias is None else in_bias.split((E, 2 * E))
        q, kv = F.linear(query, of_q, bias_q), F.linear(memory, of_kv, bias_kv)
    heads, batch_first, scale, causal, dropout_p = options
    out, lse, weights = _forward_op(
        q, kv, heads, batch_first, padding, attn_mask, scale, causal, dropout_p, seed, need_weights
    )
    return F.linear(out, out_weight, out_bias), weights, q, kv, out, lse


class _Multihead(torch.autograd.Function):
    """Gradients of the first order by the kernels, otherwise and of the weights by the reference definition."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        y, weights, *kept = _forward(*inputs)
        y = _not_a_view(y, y.shape)  # so that it may be changed in place
        *tensors, ctx.options, ctx.need_weights = inputs
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return y, weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *primals, padding, attn_mask, seed, q, kv, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:DIFFERENTIABLE]
        dy, dweights = grads
        found: Sequence[Tensor | None]
        if dy is None and dweights is None:
            found = (None,) * DIFFERENTIABLE
        elif dy is None or dweights is not None or needs_definition(grads):
            definition = _definition(padding, attn_mask, seed, ctx.options, ctx.need_weights)
            found = vjp_by_definition(definition, primals, grads, needs)
        else:
            query, memory, in_weight, _, out_weight, _ = primals
            rows = dy.reshape(-1, dy.shape[2])
            dout_weight = rows.t().mm(out.view(rows.shape)) if needs[4] else None
            dout_bias = rows.sum(0) if needs[5] else None
            of_projections: tuple[Tensor | None, ...] = (None,) * 4
            if any(needs[:4]):
                dout = rows.mm(out_weight).view(out.shape)
                heads, batch_first, *options = ctx.options
                dq, dkv = _backward_op(dout, q, kv, heads, batch_first, padding, attn_mask, *options, seed, out, lse)
                of_projections = _projections_backward(query, memory, in_weight, dq, dkv, needs)
            found = *of_projections, dout_weight, dout_bias
        return *found, *[None] * (len(ctx.needs_input_grad) - DIFFERENTIABLE)


def _projections_backward(
    query: Tensor, memory: Tensor | None, in_weight: Tensor, dq: Tensor, dkv: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of query, memory, in_weight and in_bias, None where `needs` is False."""
    E = in_weight.shape[1]
    given, weights = [(dq, query)], [in_weight]
    if memory is not None:
        given.append((dkv, memory))
        weights = list(in_weight.split((E, 2 * E)))
    rows = [d.view(-1, d.shape[2]) for d, _ in given]
    of_inputs = [
        d.mm(w).view(x.shape) if need else None for d, w, (_, x), need in zip(rows, weights, given, needs)
    ]  # fmt: skip
    dquery, dmemory = of_inputs if memory is not None else (of_inputs[0], None)
    products = [d.t().mm(x.reshape(-1, E)) for d, (_, x) in zip(rows, given)] if needs[2] else [None]
    sums = [d.sum(0) for d in rows] if needs[3] else [None]
    return dquery, dmemory, _joined(products), _joined(sums)


def _joined(parts: list[Any]) -> Tensor | None:
    whole: Tensor | None = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole


def _definition(
    padding: Tensor | None, attn_mask: Tensor | None, seed: Tensor | None, options: Options, need_weights: int
) -> Callable[..., tuple[Tensor, ...]]:
    """The output and the weights, as a function of the differentiable arguments."""
    H, batch_first, scale, causal, dropout_p = options
    mask = attn_mask if padding is None else padding.logical_not().view(padding.shape[0], 1, 1, -1)
    rest: Any = (*Inputs()[1:], *AttentionArgs(scale=scale, causal=causal, dropout_p=dropout_p), seed)

    def by_head(x: Tensor) -> Tensor:  # [B, H, T, D]
        x = x.unflatten(-1, (H, -1))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def function(
        query: Tensor,
        memory: Tensor | None,
        in_weight: Tensor,
        in_bias: Tensor | None,
        out_weight: Tensor,
        out_bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        biases = (None,) * 3 if in_bias is None else in_bias.chunk(3)
        keys = query if memory is None else memory
        q, k, v = (
            by_head(F.linear(x, w, b)) for x, w, b in zip((query, keys, keys), in_weight.chunk(3), biases)
        )  # fmt: skip
        out, lse = attention_definition(q, k, v, mask, *rest)
        out = out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)
        y = F.linear(out.flatten(-2), out_weight, out_bias)
        if need_weights == NO_WEIGHTS:
            return (y,)
        of_weights: Any = (*rest, lse)
        weights = weights_definition(q, k, mask, *of_weights)
        return y, weights.mean(1) if need_weights == MEAN_WEIGHTS else weights

    return function


# ---- fake implementations and vmap


def _forward_fake(q: Tensor, kv: Tensor | None, heads: int, batch_first: bool, *rest: Any) -> Any:
    keys, batch = q if kv is None else kv, 0 if batch_first else 1
    B, T, S, need_weights = q.shape[batch], q.shape[1 - batch], keys.shape[1 - batch], rest[-1]
    E = q.shape[2] if kv is not None else q.shape[2] // 3
    of_weights = {NO_WEIGHTS: (0,), MEAN_WEIGHTS: (B, T, S), HEAD_WEIGHTS: (B, heads, T, S)}[need_weights]
    return q.new_empty(*q.shape[:2], E), q.new_empty(B, heads, T), q.new_empty(of_weights)


def _backward_fake(dout: Tensor, q: Tensor, kv: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if kv is None else kv.new_empty(kv.shape)


for _name, _fake in (("forward", _forward_fake), ("backward", _backward_fake)):
    register_fake(f"{NAMESPACE}::multihead_attention_{_name}", _fake)
    torch.library.register_vmap(
        f"{NAMESPACE}::multihead_attention_{_name}", vmap_rule(op(f"multihead_attention_{_name}"))
    )
