"""Functional forms of scaled dot-product attention: argument checks and calls of the ops.

Intended differences from torch.nn.functional:
- A NaN in a key or value that a query may not attend to affects neither the output nor the gradients of that query.
- is_causal and attn_mask can be combined. causal_alignment aligns causality and windows with the first or last key.
- Gradients of any order, forward-mode gradients and torch.func transforms are supported. Float masks, the logarithm of
  the softmax denominator and the weights have gradients.
- Dropout draws a seed from torch's generator and uses a counter-based generator. Its mask differs from torch's, and is
  the same for any number of threads, on each device and in backward.

Exceptions: docs/errors.md.

Dimensions: B batch, Hq query heads, Hk key heads (query head h reads key head h // (Hq / Hk)), Tq queries, Tk keys,
D and Dv columns; Nq and Nk: rows of all packed sequences.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backend as backends
from ._attention_ops import AttentionArgs, Inputs, attend, attend_eagerly, decode, weights_of
from ._autograd import autocast, autocast_dtype
from ._checks import TypeRuntimeError, ValueRuntimeError, describe, of_op
from ._nested import jagged_like
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function_variadic,
    refuse_nested,
)
from ._values import eager_on_cpu, in_jit_trace, may_read_values, plain_in

__all__ = ["scaled_dot_product_attention", "varlen_attention"]

ALIGNMENTS = {"upper_left": 1, "lower_right": 2}
Result = Any  # the output, or a tuple of the output and the additional outputs


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    lengths: Tensor | Sequence[int] | tuple[Any, Any] | None = None,
    causal_alignment: str = "upper_left",
    window: int | tuple[int, int] | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    backend: str | None = None,
) -> Result:
    """softmax(query key^T * scale) value, computed only for the keys that the mask includes.

    Args:
        query: [B, Hq, Tq, D] float32, float64, bfloat16 or float16, with any strides; gradient: yes. Also [Tq, D] or
            [B, Tq, D], or further leading dimensions, which broadcast, or a jagged nested tensor [B, Hq, j, D] or
            [B, j, D].
        key: [B, Hk, Tk, D], value: [B, Hk, Tk, Dv], or the corresponding forms. Hk is Hq or 1; with enable_gqa, a
            divisor of Hq, and the number of value heads may be another divisor.
        attn_mask: bool (True: attend), or float32 or of query's dtype (added to the scores; gradient: yes), of at least
            2 dimensions, broadcast to [B, Hq, Tq, Tk]. It is not rounded to query's dtype.
        dropout_p: probability of dropping a weight; the other weights are divided by 1 - dropout_p.
        is_causal: whether a query attends to keys up to its own position only; can be combined with attn_mask.
        scale: factor of the scores; 1 / sqrt(D) if None.
        enable_gqa: whether query head h reads key and value head h // (Hq / Hk).
        lengths: [B] number of keys of each sequence, or a pair (queries, keys), either of which may be None. int32 or
            int64 on query's device, or a sequence of int. Padding is not read, and its output is 0.
        causal_alignment: upper_left: query i has position i; lower_right: i + keys - queries of its sequence. Without
            is_causal, window and alibi_slopes it has no effect.
        window: (left, right) or one number: a query at position p attends to keys p - left to p + right; -1: unbounded.
        softcap: replaces scores by softcap * tanh(score / softcap) before masks are added; 0: disabled.
        alibi_slopes: float32 [Hq] or [B, Hq]; adds -slope * |position - j| to the scores. Gradient: no.
        return_lse, return_weights: return additional outputs.
        backend: cpu, triton, or torch for torch's own function; None selects one, see seqkernels.explain.
    Returns:
        out: [B, Hq, Tq, Dv], dtype of query, computed in float32 or wider; 0 for queries that attend to no key. Jagged
            for a jagged query. Gradient: yes.
        lse, with return_lse: [B, Hq, Tq], float32 or wider, logarithm of the softmax denominator before dropout; -inf
            for queries that attend to no key. Gradient: yes.
        weights, with return_weights: [B, Hq, Tq, Tk], after dropout. Gradient: yes.
    Raises:
        ValueError: invalid shape, length or value. On a GPU, the values of lengths are clamped instead.
        TypeError: invalid type or dtype.
        NotImplementedError: no implementation supports the inputs; the message lists the reasons.
        If torch raises RuntimeError for the same mistake, the exception is also a RuntimeError.
    Equivalent to: torch.nn.functional.scaled_dot_product_attention, except for the differences in docs/attention.md.
    Deterministic: yes; the bits of a query are independent of the number of threads and of the batch.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html;
        Dao et al., FlashAttention, arXiv 2205.14135 and 2307.08691; Press et al., ALiBi, arXiv 2108.12409.
    """
    if (
        (lengths is None and window is None and alibi_slopes is None and backend is None)
        and not (dropout_p or softcap or return_lse or return_weights)
        and causal_alignment in ALIGNMENTS
        and eager_on_cpu()
        and are_inputs_of_op(query, key, value, attn_mask, enable_gqa)
    ):
        scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
        return attend_eagerly(
            query, key, value, attn_mask, None, scale, ALIGNMENTS[causal_alignment] if is_causal else 0
        )  # fmt: skip
    caller = "scaled_dot_product_attention"
    tensors = query, key, value, attn_mask
    if has_torch_function_variadic(*tensors) and dispatches(*tensors):
        return handle_torch_function(
            scaled_dot_product_attention, tensors, *tensors, dropout_p, is_causal, scale, enable_gqa, lengths=lengths,
            causal_alignment=causal_alignment, window=window, softcap=softcap, alibi_slopes=alibi_slopes,
            return_lse=return_lse, return_weights=return_weights, backend=backend,
        )  # fmt: skip
    for name, t in (("query", query), ("key", key), ("value", value)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {describe(t)}")
    if query.is_nested or key.is_nested or value.is_nested:
        if attn_mask is not None or lengths is not None or return_weights:
            raise ValueError(
                f"{caller}: attn_mask, lengths and return_weights must be absent where query, key and value are nested"
            )
        return _nested(
            caller, query, key, value, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap,
            alibi_slopes, return_lse, backend,
        )  # fmt: skip
    if is_causal_bias(attn_mask):
        causal_alignment = _alignment_of(caller, attn_mask, query, key, is_causal)
        bias: Any = attn_mask
        if causal_alignment == "upper_left" or (lengths is None and window is None and alibi_slopes is None):
            attn_mask, is_causal = None, True
        else:  # these options count positions, to which the bias does not refer
            attn_mask, causal_alignment = bias._materialize(query.device), "upper_left"
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    _check_tensors(caller, query, key, value)
    dtype = query.dtype
    wide = isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.float32 and dtype.itemsize == 2
    if wide and backend != "torch":
        # The kernels have one dtype. Half types compute in float32, so that the wider inputs give the same result.
        query, key, value = query.float(), key.float(), value.float()
    args = _args(caller, query, scale, is_causal, causal_alignment, window, softcap, dropout_p, alibi_slopes)

    lead, q, k, v = _four_dimensions(caller, query, key, value, enable_gqa)
    B, Tq, Tk = q.shape[0], q.shape[2], k.shape[2]
    mask = _mask(caller, attn_mask, query, lead, (Tq, Tk), q)
    q_lengths, k_lengths = _lengths(caller, lengths, B, query.device)
    slopes = _slopes(caller, alibi_slopes, q, B)
    inputs = Inputs(mask, slopes, q_lengths, k_lengths)
    chosen = _choose(caller, backend, query, inputs, args, return_lse or return_weights, key, value)
    if chosen == "torch":
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    seed = dropout_seed(dropout_p, query.device)
    try:
        out, lse = attend(q, k, v, inputs, args, seed)
        weights = weights_of(q, k, inputs, args, seed, lse) if return_weights else None
    except RuntimeError as error:
        raise of_op(caller, error) from None
    if wide:
        out, weights = out.to(dtype), None if weights is None else weights.to(dtype)
    results = [_restored(out, lead, q)]
    if return_lse:
        results.append(_restored(lse, lead, q))
    if weights is not None:
        results.append(_restored(weights, lead, q))
    return results[0] if len(results) == 1 else tuple(results)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    causal_alignment: str = "upper_left",
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> Result:
    """scaled_dot_product_attention of packed sequences of any lengths, without padding.

    Args:
        query: [Nq, Hq, D]. key: [Nk, Hk, D]. value: [Nk, Hk, Dv]. As in scaled_dot_product_attention.
        cu_seqlens_q: [S + 1] int32 or int64, start of each sequence in query and end of the last: 0, ..., Nq,
            non-decreasing.
        cu_seqlens_k: [S + 1], the same for key; cu_seqlens_q if None.
        max_seqlen_q, max_seqlen_k: upper bound of the sequence lengths. If None, the maximum is computed, which
            synchronizes with a GPU; while tracing and on meta tensors, Nq and Nk.
        alibi_slopes: [Hq] or [S, Hq].
        Others: as in scaled_dot_product_attention.
    Returns:
        out: [Nq, Hq, Dv]. lse, with return_lse: [Hq, Nq].
    Raises: as scaled_dot_product_attention.
    Equivalent to: scaled_dot_product_attention of each sequence, bit for bit on a CPU.
    Deterministic: yes; the same bits for any number of threads.
    """
    caller = "varlen_attention"
    tensors = query, key, value, cu_seqlens_q
    if has_torch_function_variadic(*tensors) and dispatches(*tensors):
        return handle_torch_function(
            varlen_attention, tensors, *tensors, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=dropout_p,
            is_causal=is_causal, causal_alignment=causal_alignment, window=window, scale=scale, softcap=softcap,
            alibi_slopes=alibi_slopes, enable_gqa=enable_gqa, return_lse=return_lse, backend=backend,
        )  # fmt: skip
    refuse_nested(caller, "use scaled_dot_product_attention instead", query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value), ("cu_seqlens_q", cu_seqlens_q)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {describe(t)}")
    query, key, value, _ = _autocast(query, key, value, None)
    _check_tensors(caller, query, key, value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 3:
            raise ValueError(f"{caller}: {name} must have 3 dimensions, got {list(t.shape)}")
    if cu_seqlens_k is None:
        cu_seqlens_k = cu_seqlens_q
        if key.shape[0] != query.shape[0]:
            raise ValueError(
                f"{caller}: key must have as many rows as query where cu_seqlens_k is absent, {query.shape[0]}, got "
                f"{key.shape[0]}"
            )
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_integers(caller, name, t, query.device)
        if t.dim() != 1 or t.shape[0] < 1:
            raise ValueError(f"{caller}: {name} must have shape [S + 1], got {list(t.shape)}")
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{caller}: cu_seqlens_k must have the shape of cu_seqlens_q, {list(cu_seqlens_q.shape)}, got "
            f"{list(cu_seqlens_k.shape)}"
        )
    max_q = _longest(caller, "max_seqlen_q", max_seqlen_q, cu_seqlens_q, query.shape[0])
    if max_seqlen_k is None and cu_seqlens_k is cu_seqlens_q:
        max_k = max_q
    else:
        max_k = _longest(caller, "max_seqlen_k", max_seqlen_k, cu_seqlens_k, key.shape[0])
    args = _args(
        caller, query, scale, is_causal, causal_alignment, window, softcap, dropout_p, alibi_slopes, max_q, max_k
    )
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    q, k, v = _heads(caller, q, k, v, enable_gqa)
    slopes = _slopes(caller, alibi_slopes, q, cu_seqlens_q.shape[0] - 1)
    inputs = Inputs(None, slopes, None, None, cu_seqlens_q, cu_seqlens_k)
    _choose(caller, backend, query, inputs, args, return_lse, key, value)
    try:
        out, lse = attend(q, k, v, inputs, args, dropout_seed(dropout_p, query.device))
    except RuntimeError as error:
        raise of_op(caller, error) from None
    out = out.squeeze(0).transpose(0, 1)
    return (out, lse.squeeze(0)) if return_lse else out


def attend_to_rows(
    caller: str,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    block_table: Tensor | None,
    attn_mask: Tensor | None,
    lengths: tuple[Tensor | None, Tensor | None],
    longest: int,
    *,
    is_causal: bool,
    causal_alignment: str,
    scale: float | None,
    window: int | tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """Attention on a CPU to keys and values as a KeyValueCache stores them; not differentiable.

    lengths: of queries and keys. longest: the number of columns of a mask.
    """
    args = _args(caller, query, scale, is_causal, causal_alignment, window, softcap, 0.0, alibi_slopes)
    B, Tq = query.shape[0], query.shape[2]
    mask = _mask(caller, attn_mask, query, (B,), (Tq, longest), query)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):  # the kernel computes in float32
        return attend_to_rows(
            caller, query.float(), keys, values, key_scales, value_scales, block_table, mask, lengths, longest,
            is_causal=is_causal, causal_alignment=causal_alignment, scale=args.scale, window=window, softcap=softcap,
            alibi_slopes=alibi_slopes,
        ).to(query.dtype)  # fmt: skip
    q_lengths, k_lengths = _lengths(caller, lengths, B, query.device)
    slopes = _slopes(caller, alibi_slopes, query, B)
    try:
        out: Tensor = decode(
            query, keys, values, key_scales, value_scales, block_table, mask, slopes, q_lengths, k_lengths, args.scale,
            args.causal, args.window_left, args.window_right, args.softcap,
        )  # fmt: skip
    except RuntimeError as error:
        raise of_op(caller, error) from None
    return out


# ---- checks


def are_inputs_of_op(query: Any, key: Any, value: Any, mask: Any, enable_gqa: bool) -> bool:
    """Whether the inputs are valid inputs of the op as they are: with 4 dimensions, on a CPU."""
    dtype = query.dtype if isinstance(query, Tensor) else None
    if dtype not in backends.DTYPES or not plain_in(dtype, query, key, value):
        return False
    shape, of_keys = query.shape, key.shape
    if len(shape) != 4 or len(of_keys) != 4 or shape[0] != of_keys[0] or shape[3] != of_keys[3] or shape[3] == 0:
        return False
    if value is not key and value.shape[:3] != of_keys[:3]:
        return False
    Hq, Hk = shape[1], of_keys[1]
    if Hq == 0 or Hk == 0 or (Hq != Hk and (not enable_gqa or Hq % Hk)):
        return False
    if mask is None:
        return True
    if (
        type(mask) is not Tensor
        or mask.dim() != 4
        or not plain_in(torch.bool if mask.dtype == torch.bool else dtype, mask)
    ):
        return False
    return all(m in (1, n) for m, n in zip(mask.shape, (*shape[:3], of_keys[2])))


def _check_tensors(caller: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    if query.device.type != "meta" or query.dtype not in backends.DTYPES:
        request = backends.Request(query.device, query.dtype)
        backends.choose(caller, backends.ATTENTION, request, None, "a query", query.shape)
    for name, t in (("key", key), ("value", value)):
        if t.dtype != query.dtype:
            raise TypeRuntimeError(f"{caller}: {name} must be of query's dtype {query.dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ValueRuntimeError(f"{caller}: {name} must be on query's device {query.device}, got {t.device}")
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() < 2:
            raise ValueRuntimeError(f"{caller}: {name} must have at least 2 dimensions, got {list(t.shape)}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueRuntimeError(
            f"{caller}: key must have as many columns as query, {query.shape[-1]}, got {key.shape[-1]}"
        )


def _args(
    caller: str,
    query: Tensor,
    scale: float | None,
    is_causal: bool,
    causal_alignment: str,
    window: int | tuple[int, int] | None,
    softcap: float,
    dropout_p: float,
    alibi_slopes: Any = None,
    max_q: Any = 0,
    max_k: Any = 0,
) -> AttentionArgs:
    if causal_alignment not in ALIGNMENTS:
        raise ValueError(f"{caller}: causal_alignment must be upper_left or lower_right, got {causal_alignment!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueRuntimeError(f"{caller}: dropout_p must be between 0 and 1, got {dropout_p}")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{caller}: softcap must be finite and not negative, got {softcap}")
    left, right = (-1, -1) if window is None else _window(caller, window)
    if scale is None:
        D = query.shape[-1]
        scale = 1 / math.sqrt(D) if D > 0 else 1.0
    causal = ALIGNMENTS[causal_alignment] if is_causal else 0
    positions = left >= 0 or right >= 0 or alibi_slopes is not None
    if not is_causal and positions and causal_alignment != "upper_left":
        raise NotImplementedError(
            f"{caller}: causal_alignment must be upper_left with window or alibi_slopes where is_causal is False, got "
            f"{causal_alignment}; use a mask instead"
        )
    return AttentionArgs(max_q, max_k, float(scale), causal, left, right, float(softcap), float(dropout_p))


def is_causal_bias(mask: Any) -> bool:
    """Whether a mask is a CausalBias of torch.nn.attention.bias, a subclass of Tensor without values.

    Only a caller that has imported that module, which imports the compiler of torch, can pass one.
    """
    if mask is None or type(mask) is Tensor:
        return False
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _alignment_of(caller: str, bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """The causal_alignment of a bias of torch.nn.attention.bias."""
    if is_causal:
        raise ValueError(f"{caller}: is_causal must be False with a CausalBias, got True")
    if query.dim() < 2 or key.dim() < 2 or (bias.seq_len_q, bias.seq_len_kv) != (query.shape[-2], key.shape[-2]):
        raise ValueRuntimeError(
            f"{caller}: attn_mask must be a CausalBias of the lengths of query and key, got {bias.seq_len_q} and "
            f"{bias.seq_len_kv} for {list(query.shape)} and {list(key.shape)}"
        )
    square = bias.seq_len_q == bias.seq_len_kv
    return "upper_left" if square or bias.variant.name == "UPPER_LEFT" else "lower_right"


def _window(caller: str, window: int | tuple[int, int]) -> tuple[int, int]:
    pair = (window, window) if isinstance(window, int) else tuple(window)
    if len(pair) != 2 or any(not isinstance(w, int) or w < -1 for w in pair):
        raise ValueError(f"{caller}: window must be one or two numbers of at least -1 (no bound), got {window}")
    return pair[0], pair[1]


def _four_dimensions(
    caller: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[Any, ...], Tensor, Tensor, Tensor]:
    """Leading dimensions of the query, and q, k and v with 4 dimensions.

    The leading dimensions precede [Hq, Tq, D]. They end with None for inputs without heads: [.., Tq, D].
    """
    if value.shape[-2] != key.shape[-2]:
        raise ValueRuntimeError(
            f"{caller}: value must have as many rows as key, {key.shape[-2]}, got {value.shape[-2]}"
        )
    dims = max(t.dim() for t in (query, key, value))
    heads = 1 if dims > 3 or enable_gqa else 0  # without enable_gqa, 3 dimensions are [B, T, D]
    of = [t.shape[: max(t.dim() - 2 - heads, 0)] for t in (query, key, value)]
    try:
        lead = torch.broadcast_shapes(*of)
    except RuntimeError:
        raise ValueRuntimeError(
            f"{caller}: batch dimensions of query, key and value must be equal or 1, got {list(query.shape)}, "
            f"{list(key.shape)} and {list(value.shape)}"
        ) from None
    flat = []
    for t in (query, key, value):
        if t.dim() - 2 < heads:
            t = t.unsqueeze(-3)
        inner = t.shape[t.dim() - 2 - heads :]
        if t.shape[: t.dim() - 2 - heads] != lead:
            t = t.expand(*lead, *inner)
        if not heads:
            t = t.unsqueeze(-3)
        if len(lead) != 1:
            t = t.reshape(math.prod(lead), *t.shape[-3:]) if len(lead) else t.unsqueeze(0)
        flat.append(t)
    q, k, v = _heads(caller, flat[0], flat[1], flat[2], enable_gqa)
    return tuple(lead) if heads else (*lead, None), q, k, v


def _heads(caller: str, q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Broadcasts q, k and v of a single head, and checks the numbers of heads."""
    Hq, Hk, Hv = q.shape[1], k.shape[1], v.shape[1]
    if Hk != Hv:
        if Hk == 1:
            k, Hk = k.expand(-1, Hv, -1, -1), Hv
        elif Hv == 1:
            v = v.expand(-1, Hk, -1, -1)
        elif not enable_gqa:
            raise ValueRuntimeError(f"{caller}: value must have as many heads as key, {Hk}, got {Hv}")
        elif Hk == 0 or Hv == 0 or Hq % Hk or Hq % Hv:
            raise ValueRuntimeError(
                f"{caller}: query's heads must be a multiple of key's and value's with enable_gqa, got {Hq}, {Hk} and "
                f"{Hv}"
            )
        else:  # the least number of heads that both can be repeated to
            both = math.lcm(Hk, Hv)
            k, v, Hk = k.repeat_interleave(both // Hk, 1), v.repeat_interleave(both // Hv, 1), both
    if Hq == Hk or Hk == 1:
        return q, k, v
    if Hq == 1:
        return q.expand(-1, Hk, -1, -1), k, v
    if not enable_gqa:
        raise ValueRuntimeError(
            f"{caller}: key must have as many heads as query, {Hq}, or enable_gqa must be set, got {Hk}"
        )
    if Hk == 0 or Hq % Hk:
        raise ValueRuntimeError(
            f"{caller}: query's heads must be a multiple of key's with enable_gqa, got {Hq} and {Hk}"
        )
    return q, k, v


def _restored(t: Tensor, lead: tuple[Any, ...], q: Tensor) -> Tensor:
    """Reshapes a result [B, Hq, ..] to the leading dimensions of the query."""
    if lead and lead[-1] is None:
        t, lead = t.squeeze(1), lead[:-1]
    return t if len(lead) == 1 else t.reshape(*lead, *t.shape[1:])


def _mask(
    caller: str, mask: Tensor | None, query: Tensor, lead: tuple[Any, ...], last: tuple[Any, Any], q: Tensor
) -> Tensor | None:
    """attn_mask with 4 dimensions [B | 1, Hq | 1, Tq | 1, Tk | 1]."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{caller}: attn_mask must be a tensor, got {describe(mask)}")
    if mask.dtype == torch.float32 and query.dtype == torch.float64:  # as torch
        mask = mask.to(query.dtype)
    if mask.dtype not in (torch.bool, torch.float32, query.dtype):
        also = "float32 or " if query.dtype != torch.float32 else ""
        raise TypeRuntimeError(
            f"{caller}: attn_mask must be bool or {also}of query's dtype {query.dtype}, got {mask.dtype}"
        )
    if mask.device != query.device:
        raise ValueRuntimeError(f"{caller}: attn_mask must be on query's device {query.device}, got {mask.device}")
    headless = bool(lead) and lead[-1] is None
    lead = lead[:-1] if headless else lead
    full = (*lead, *last) if headless else (*lead, q.shape[1], *last)
    if (
        mask.dim() < 2
        or mask.dim() > len(full)
        or any(m != 1 and m != f for m, f in zip(reversed(mask.shape), reversed(full)))
    ):
        raise ValueRuntimeError(
            f"{caller}: attn_mask must have at least 2 dimensions and broadcast to {list(full)}, got {list(mask.shape)}"
        )
    mask = mask[(None,) * (len(full) - mask.dim())]
    if headless:
        mask = mask.unsqueeze(-3)
    if len(lead) == 1:
        return mask
    if all(n == 1 for n in mask.shape[: len(lead)]):
        return mask.reshape(1, *mask.shape[len(lead) :])
    return mask.expand(*lead, *mask.shape[len(lead) :]).reshape(q.shape[0], *mask.shape[len(lead) :])


def _check_integers(caller: str, name: str, t: Any, device: torch.device) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {describe(t)}")
    if t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: {name} must be int32 or int64, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{caller}: {name} must be on query's device {device}, got {t.device}")


def _lengths(caller: str, lengths: Any, B: Any, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
    if lengths is None:
        return None, None
    pair = lengths if isinstance(lengths, tuple) and len(lengths) == 2 and not isinstance(lengths[1], int) else None
    found: list[Tensor | None] = []
    for given in pair if pair is not None else (None, lengths):
        if given is not None and not isinstance(given, Tensor):
            given = torch.tensor(list(given), dtype=torch.int64, device=device)
        if given is not None:
            _check_integers(caller, "lengths", given, device)
            if given.dim() != 1 or given.shape[0] != B:
                raise ValueError(f"{caller}: lengths must have shape [B] = [{B}], got {list(given.shape)}")
        found.append(given)
    return found[0], found[1]


def _slopes(caller: str, slopes: Tensor | None, q: Tensor, B: Any) -> Tensor | None:
    if slopes is None:
        return None
    if not isinstance(slopes, Tensor):
        raise TypeError(f"{caller}: alibi_slopes must be a tensor, got {describe(slopes)}")
    if slopes.dtype != torch.float32:
        raise TypeError(f"{caller}: alibi_slopes must be float32, got {slopes.dtype}")
    if slopes.device != q.device:
        raise ValueError(f"{caller}: alibi_slopes must be on query's device {q.device}, got {slopes.device}")
    Hq = q.shape[1]
    if tuple(slopes.shape) not in ((Hq,), (B, Hq)):
        raise ValueError(
            f"{caller}: alibi_slopes must have shape [Hq] or [B, Hq] = [{B}, {Hq}], got {list(slopes.shape)}"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{caller}: alibi_slopes must not require a gradient; use a float attn_mask instead")
    return slopes


def _longest(caller: str, name: str, longest: int | None, cu: Tensor, N: Any) -> Any:
    if longest is not None:
        if longest < 0:
            raise ValueError(f"{caller}: {name} must not be negative, got {longest}")
        return longest
    if in_jit_trace():
        raise ValueError(f"{caller}: {name} must be given in torch.jit.trace, which would record that of the example")
    if not may_read_values(cu):
        return N
    return int(cu.diff().max()) if cu.shape[0] > 1 else 0


def dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    if dropout_p == 0:
        return None
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    dtype, device = autocast_dtype(query.device), query.device
    if dtype is None:
        return query, key, value, mask

    def cast(t: Tensor) -> Tensor:
        return autocast(t, dtype) if t.device.type == device.type else t

    return cast(query), cast(key), cast(value), None if mask is None else cast(mask)


# ---- backends


def _choose(
    caller: str,
    backend: str | None,
    query: Tensor,
    inputs: Inputs,
    args: AttentionArgs,
    returns_more: bool,
    key: Tensor,
    value: Tensor,
) -> str:
    """Name of the implementation that runs, or meta for meta tensors, where only shapes are computed."""
    extras = [
        name
        for name, given in (
            ("packed rows", inputs.cu_q is not None),
            ("lengths", inputs.q_lengths is not None or inputs.k_lengths is not None),
            ("causal_alignment lower_right", args.causal == 2),
            ("a window", args.window_left >= 0 or args.window_right >= 0),
            ("softcap", args.softcap > 0),
            ("alibi_slopes", inputs.alibi_slopes is not None),
            ("return_lse or return_weights", returns_more),
        )
        if given
    ]
    masked = inputs.attn_mask is not None or args.dropout_p > 0 or key.shape[-1] != value.shape[-1]
    if backend is None and query.is_meta:
        return "meta"
    request = backends.Request(query.device, query.dtype, None, extras, masked)
    return backends.choose(caller, backends.ATTENTION, request, backend, "a query", query.shape)


# ---- nested tensors


def _nested(
    caller: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    causal_alignment: str,
    window: int | tuple[int, int] | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_lse: bool,
    backend: str | None,
) -> Result:
    """Attention of jagged tensors [B, H, j, D] or [B, j, D], whose values are packed sequences."""
    rows, offsets, heads = [], [], []
    for name, given in (("query", query), ("key", key), ("value", value)):
        t: Any = given
        if not t.is_nested or t.layout != torch.jagged:
            raise ValueError(
                f"{caller}: query, key and value must all be jagged nested tensors if one is nested, got {name} of "
                f"layout {t.layout}"
            )
        if t.dim() not in (3, 4) or t._ragged_idx != t.dim() - 2 or t.lengths() is not None:
            raise ValueError(
                f"{caller}: {name} must be jagged without holes of shape [B, H, j, D] or [B, j, D], got {list(t.shape)}"
            )
        values = t.values()
        rows.append(values.unsqueeze(1) if t.dim() == 3 else values.transpose(0, 1))
        offsets.append(t.offsets())
        heads.append(t.dim() == 4)
    if len(set(heads)) != 1:
        raise ValueError(
            f"{caller}: nested query, key and value must have the same number of dimensions, got "
            f"{query.dim()}, {key.dim()} and {value.dim()}"
        )
    if offsets[1] is not offsets[2] and not torch.equal(offsets[1], offsets[2]):
        raise ValueError(f"{caller}: nested key and value must have the same lengths, got different offsets")
    nested: Any = query
    same = offsets[0] is offsets[1]
    out, lse = varlen_attention(
        rows[0],
        rows[1],
        rows[2],
        offsets[0],
        None if same else offsets[1],
        nested._get_max_seqlen() if same else None,
        dropout_p=dropout_p,
        is_causal=is_causal,
        causal_alignment=causal_alignment,
        window=window,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        enable_gqa=enable_gqa,
        return_lse=True,
        backend=backend,
    )
    out = out.transpose(0, 1) if heads[0] else out.squeeze(1)
    result = jagged_like(nested, out, nested._ragged_idx)
    if not return_lse:
        return result
    return result, jagged_like(nested, lse if heads[0] else lse.squeeze(0), nested._ragged_idx)
