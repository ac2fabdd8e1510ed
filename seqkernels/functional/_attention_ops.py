"""Ops of attention: calls, fake implementations, autograd, torch.func.

Each op has the tensor arguments `Inputs` and the scalar arguments `AttentionArgs`. The backward ops are first order and
read out, lse and, of half types on a CPU, out_low, what rounding took from out; with create_graph, the gradient is
computed through the reference definition.

Dimensions: B batch, Hq query heads, Hk key heads, Tq queries, Tk keys, D and Dv columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.attention import attention as attention_definition
from ..reference.attention import attention_weights as weights_definition
from ._autograd import (
    NAMESPACE,
    below_autograd,
    eager_function,
    jvp_by_definition,
    needs_definition,
    op,
    recorded,
    register_fake,
    transformed,
    vjp_by_definition,
    vmap_rule,
)
from ._checks import ValueRuntimeError
from ._values import dense_on_cpu, eager_on_cpu, in_jit_trace

NAMES = ("attention_forward", "attention_backward", "attention_weights", "attention_weights_backward")


class Ops:
    """The ops of one namespace, by their `.default` overloads."""

    def __init__(self, namespace: str) -> None:
        for name in NAMES:
            setattr(self, name.removeprefix("attention_"), op(name, namespace))

    def __getattr__(self, name: str) -> Any:  # declares the attributes set by __init__ to type checkers
        raise AttributeError(name)


ops = Ops(NAMESPACE)
decode = op("attention_decode")  # keys and values of a cache, of a dtype of their own or in pages; not differentiable
_dense = op("attention_dense")  # attention_forward without options and lse, on a CPU; not differentiable


class Inputs(NamedTuple):
    """Tensor arguments of an op besides q, k and v."""

    attn_mask: Tensor | None = None  # [B | 1, Hq | 1, Tq | 1, Tk | 1]
    alibi_slopes: Tensor | None = None  # [Hq] or [B, Hq]
    q_lengths: Tensor | None = None  # [B]
    k_lengths: Tensor | None = None  # [B]
    cu_q: Tensor | None = None  # [S + 1]
    cu_k: Tensor | None = None  # [S + 1]


class AttentionArgs(NamedTuple):
    """Scalar arguments of an op."""

    max_q: int = 0
    max_k: int = 0
    scale: float = 1.0
    causal: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0


def attend(
    q: Tensor, k: Tensor, v: Tensor, inputs: Inputs, args: AttentionArgs, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Tq, Dv] and lse [B, Hq, Tq], in eager mode, while tracing and under transforms."""
    mask = inputs.attn_mask
    if q.shape[1] == 0:  # no heads
        nothing: tuple[Tensor, Tensor] = _of_attention(args, seed, inputs)(q, k, v, mask)
        return nothing
    if transformed():
        out, lse, _ = _Attention.apply(args, seed, *inputs[1:], q, k, v, mask)
        return out, lse
    # torch.jit.trace records the argument once, and checks the trace without gradients.
    keep_low = recorded(q, k, v, mask) or in_jit_trace()
    if keep_low and eager_on_cpu() and dense_on_cpu(q, k, v, seed, *inputs):
        out, lse, _ = _recorded_attention(q, k, v, *inputs, *args, seed, keep_low)
        return out, lse
    if not torch.compiler.is_compiling() and not keep_low:
        with below_autograd():
            out, lse, _ = ops.forward(q, k, v, *inputs, *args, seed)
            return out, lse
    out, lse, _ = ops.forward(q, k, v, *inputs, *args, seed, keep_low)
    return out, lse


def attend_eagerly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None, scale: float, causal: int
) -> Tensor:
    """`attend` without lse and other options, for valid inputs in eager mode on a CPU. lengths: [B], of the keys."""
    call = _Dense.apply if recorded(q, k, v, mask) else _dense
    out: Tensor = call(q, k, v, mask, lengths, scale, causal)
    return out


def weights_of(q: Tensor, k: Tensor, inputs: Inputs, args: AttentionArgs, seed: Tensor | None, lse: Tensor) -> Tensor:
    """Attention weights [B, Hq, Tq, Tk] after dropout."""
    if q.shape[1] == 0:
        nothing: Tensor = _of_weights(args, seed, inputs)(q, k, inputs.attn_mask, lse)
        return nothing
    if transformed():
        return _Weights.apply(args, seed, *inputs[1:], q, k, inputs.attn_mask, lse)
    if not recorded(q, k, inputs.attn_mask, lse):
        if torch.compiler.is_compiling() or in_jit_trace():
            return ops.weights(q, k, *inputs, *args, seed, lse)
        with below_autograd():
            return ops.weights(q, k, *inputs, *args, seed, lse)
    if eager_on_cpu() and dense_on_cpu(q, k, lse, seed, *inputs):
        return _recorded_weights(q, k, *inputs, *args, seed, lse)
    return ops.weights(q, k, *inputs, *args, seed, lse)


# ---- gradients by the kernels and by the reference definition


def _needs_mask(mask: Tensor | None, needed: bool) -> bool:
    return needed and mask is not None and mask.dtype != torch.bool


def _backward(
    args: AttentionArgs,
    seed: Tensor | None,
    inputs: Inputs,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    saved: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v and the mask, None where `needs` is False."""
    out, lse, out_low = saved
    dout, dlse, *_ = grads
    if dout is None:
        dout = out.new_zeros(()).expand(out.shape)
    of_mask = _needs_mask(inputs.attn_mask, needs[3])
    *found, dmask = ops.backward(dout, dlse, q, k, v, *inputs, *args, seed, out, lse, of_mask, out_low)
    return *(g if need else None for g, need in zip(found, needs)), dmask if of_mask else None


def _weights_backward(
    args: AttentionArgs,
    seed: Tensor | None,
    inputs: Inputs,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    grad: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, the mask and lse, None where `needs` is False."""
    of_mask = _needs_mask(inputs.attn_mask, needs[2])
    dq, dk, dlse, dmask = ops.weights_backward(grad, q, k, *inputs, *args, seed, lse, of_mask)
    return tuple(g if need else None for g, need in zip((dq, dk, dmask if of_mask else None, dlse), needs))


def _of_attention(args: AttentionArgs, seed: Tensor | None, inputs: Inputs) -> Callable[..., Any]:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        given: Any = (*inputs[1:], *args, seed)
        return attention_definition(q, k, v, mask, *given)

    return attention


def _of_weights(args: AttentionArgs, seed: Tensor | None, inputs: Inputs) -> Callable[..., Any]:
    def weights(q: Tensor, k: Tensor, mask: Tensor | None, lse: Tensor) -> Tensor:
        given: Any = (*inputs[1:], *args, seed, lse)
        return weights_definition(q, k, mask, *given)

    return weights


FIRST = 7  # position of the first argument below that has a gradient


class _Dense(torch.autograd.Function):
    """`_recorded_attention` of few arguments and results, which a call with few queries takes long to pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        lengths: Tensor | None,
        scale: float,
        causal: int,
    ) -> Tensor:
        rest = mask, None, None, lengths, None, None, 0, 0, scale, causal, -1, -1, 0.0, 0.0, None
        with below_autograd():
            out, lse, low = ops.forward(q, k, v, *rest, True)
        ctx.save_for_backward(q, k, v, mask, lengths, out, lse, low)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, lengths, *results = ctx.saved_tensors
        inputs = Inputs(attn_mask=mask, k_lengths=lengths)
        args, needs, grads = AttentionArgs(scale=ctx.scale, causal=ctx.causal), ctx.needs_input_grad[:4], (dout, None)
        found: Sequence[Tensor | None]
        if needs_definition(grads):
            found = vjp_by_definition(_of_attention(args, None, inputs), (q, k, v, mask), grads, needs)
        else:
            found = _backward(args, None, inputs, q, k, v, results, grads, needs)
        return *found, None, None, None


class _Attention(torch.autograd.Function):
    """Attention under torch.func transforms and forward-mode AD, which register_autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        args: AttentionArgs,
        seed: Tensor | None,
        alibi_slopes: Tensor | None,
        q_lengths: Tensor | None,
        k_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.forward(q, k, v, mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, *args, seed, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        args, *tensors = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.args = args
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        seed, *rest, q, k, v, mask, out, lse, out_low = ctx.saved_tensors
        needs, inputs = ctx.needs_input_grad[FIRST:], Inputs(mask, *rest)
        if grads[0] is None and grads[1] is None:
            return (None,) * len(ctx.needs_input_grad)
        found: Sequence[Tensor | None]
        if needs_definition(grads):
            found = vjp_by_definition(_of_attention(ctx.args, seed, inputs), (q, k, v, mask), grads[:2], needs)
        else:
            found = _backward(ctx.args, seed, inputs, q, k, v, (out, lse, out_low), grads, needs)
        return *[None] * FIRST, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        seed, *rest, q, k, v, mask = ctx.saved_tensors
        attention = _of_attention(ctx.args, seed, Inputs(mask, *rest))
        return *jvp_by_definition(attention, (q, k, v, mask), tangents[FIRST:]), None


class _Weights(torch.autograd.Function):
    """attention_weights under torch.func transforms and forward-mode AD."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        args: AttentionArgs,
        seed: Tensor | None,
        alibi_slopes: Tensor | None,
        q_lengths: Tensor | None,
        k_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        q: Tensor,
        k: Tensor,
        mask: Tensor | None,
        lse: Tensor,
    ) -> Tensor:
        return ops.weights(q, k, mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, *args, seed, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        args, *tensors = inputs
        ctx.args = args
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        seed, *rest, q, k, mask, lse = ctx.saved_tensors
        needs, inputs = ctx.needs_input_grad[FIRST:], Inputs(mask, *rest)
        found: Sequence[Tensor | None]
        if needs_definition((grad,)):
            found = vjp_by_definition(_of_weights(ctx.args, seed, inputs), (q, k, mask, lse), (grad,), needs)
        else:
            found = _weights_backward(ctx.args, seed, inputs, q, k, lse, grad, needs)
        return *[None] * FIRST, *found

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        seed, *rest, q, k, mask, lse = ctx.saved_tensors
        return jvp_by_definition(_of_weights(ctx.args, seed, Inputs(mask, *rest)), (q, k, mask, lse), tangents[FIRST:])[
            0
        ]


# ---- fake implementations, autograd and vmap


def layout_like(x: Tensor, D: Any) -> Tensor:
    """Uninitialized [B, H, T, D] with the memory layout of x [B, H, T, *]: [B, T, H, D] or [B, H, T, D]."""
    B, H, T, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(B, T, H, D).transpose(1, 2)
    return x.new_empty(B, H, T, D)


def _lse_like(q: Tensor) -> Tensor:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=dtype)


def _check(q: Tensor, k: Tensor, v: Tensor | None, *rest: Any) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t is not None and t.dim() != 4:
            raise ValueError(f"attention: {name} must have 4 dimensions, got {list(t.shape)}")
    for t in (k, v, *rest[: len(Inputs._fields)]):
        if t is not None and t.device != q.device:
            raise ValueRuntimeError(f"attention: all tensors must be on one device, got {q.device} and {t.device}")
    mask, _, *lengths, cu_q, _ = rest[: len(Inputs._fields)]
    if cu_q is not None and any(t is not None for t in (mask, *lengths)):
        raise ValueError("attention: q_lengths, k_lengths and attn_mask must be absent where rows are packed")


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _check(q, k, v, *rest)
    *_, keep_low = rest if len(rest) > len(Inputs._fields) + len(AttentionArgs._fields) + 1 else (False,)
    low = keep_low and q.device.type == "cpu" and q.dtype in (torch.float16, torch.bfloat16)
    return layout_like(q, v.shape[3]), _lse_like(q), layout_like(q, v.shape[3]) if low else q.new_empty(0)


def _dense_fake(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, lengths: Tensor | None, *_: Any) -> Tensor:
    _check(q, k, v, *Inputs(attn_mask=mask, k_lengths=lengths))
    return layout_like(q, v.shape[3])


def _decode_fake(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    for name, t in (("q", q), ("keys", keys), ("values", values)):
        if t.dim() != 4:
            raise ValueError(f"attention_decode: {name} must have 4 dimensions, got {list(t.shape)}")
    return layout_like(q, values.shape[3])


def _dmask_fake(q: Tensor, mask: Tensor | None, needed: bool) -> Tensor:
    return mask.new_empty(mask.shape) if needed and mask is not None else q.new_empty(0)


def _backward_fake(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    _check(q, k, v, *rest)
    need_dmask = rest[len(Inputs._fields) + len(AttentionArgs._fields) + 3]  # after seed, out and lse
    return (*(layout_like(x, x.shape[3]) for x in (q, k, v)), _dmask_fake(q, rest[0], need_dmask))


def _weights_fake(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
    _check(q, k, None, *rest)
    return q.new_empty(*q.shape[:3], k.shape[2])


def _weights_backward_fake(dweights: Tensor, q: Tensor, k: Tensor, *rest: Any) -> Any:
    _check(q, k, None, *rest)
    return (*(layout_like(x, x.shape[3]) for x in (q, k)), _lse_like(q), _dmask_fake(q, rest[0], rest[-1]))


FAKES: dict[str, Callable[..., Any]] = {
    "attention_forward": _forward_fake,
    "attention_backward": _backward_fake,
    "attention_weights": _weights_fake,
    "attention_weights_backward": _weights_backward_fake,
}


def _setup_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, *rest = inputs
    *args, seed, _ = rest[len(Inputs._fields) :]
    ctx.args = AttentionArgs(*args)
    ctx.save_for_backward(q, k, v, *rest[: len(Inputs._fields)], seed, *output)
    ctx.set_materialize_grads(False)


def _attention_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, *tensors, seed, out, lse, out_low = ctx.saved_tensors
    needs, inputs = ctx.needs_input_grad[:4], Inputs(*tensors)
    found: Sequence[Tensor | None] = (None,) * 4
    if grads[0] is not None or grads[1] is not None:
        if needs_definition(grads):
            tensors = (q, k, v, inputs.attn_mask)
            found = vjp_by_definition(_of_attention(ctx.args, seed, inputs), tensors, grads[:2], needs)
        else:
            found = _backward(ctx.args, seed, inputs, q, k, v, (out, lse, out_low), grads, needs)
    return *found, *[None] * (len(ctx.needs_input_grad) - 4)


def _setup_weights(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, *rest, lse = inputs
    *args, seed = rest[len(Inputs._fields) :]
    ctx.args = AttentionArgs(*args)
    ctx.save_for_backward(q, k, *rest[: len(Inputs._fields)], seed, lse)


def _backward_of_weights(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, *tensors, seed, lse = ctx.saved_tensors
    needs, inputs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[-1]), Inputs(*tensors)
    found: Sequence[Tensor | None]
    if needs_definition((grad,)):
        found = vjp_by_definition(_of_weights(ctx.args, seed, inputs), (q, k, inputs.attn_mask, lse), (grad,), needs)
    else:
        found = _weights_backward(ctx.args, seed, inputs, q, k, lse, grad, needs)
    return *found[:3], *[None] * (len(ctx.needs_input_grad) - 4), found[3]


_recorded_attention = eager_function("Attention", ops.forward, _setup_attention, _attention_backward)
_recorded_weights = eager_function("AttentionWeights", ops.weights, _setup_weights, _backward_of_weights)


def register(namespace: str) -> None:
    """Registers the fake implementations, autograd formulas and vmap rules of the ops of a namespace."""
    for name, fake in FAKES.items():
        register_fake(f"{namespace}::{name}", fake)
        overload = op(name, namespace)
        torch.library.register_vmap(f"{namespace}::{name}", vmap_rule(overload))
    torch.library.register_autograd(
        f"{namespace}::attention_forward", _attention_backward, setup_context=_setup_attention
    )
    torch.library.register_autograd(
        f"{namespace}::attention_weights", _backward_of_weights, setup_context=_setup_weights
    )


register(NAMESPACE)
register_fake(f"{NAMESPACE}::attention_decode", _decode_fake)
register_fake(f"{NAMESPACE}::attention_dense", _dense_fake)
torch.library.register_vmap(f"{NAMESPACE}::attention_dense", vmap_rule(_dense))

# ---- CUDA: the Triton kernels

_library = torch.library.Library(NAMESPACE, "IMPL")


def _on_cuda(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from ..triton import attention  # imports Triton, which a CPU installation does not have

        return getattr(attention, name)(*args)

    return run


for _name in NAMES:
    _library.impl(_name, _on_cuda(_name), "CUDA")
