"""Replacement of torch.nn.MultiheadAttention.

Intended differences from torch:
- All modes use one implementation: a query that attends to no key gives zeros before the output projection, and zero
  weights, never NaN.
- is_causal works without attn_mask. With a 2-D mask that requires no gradient, is_causal declares, as in torch, that
  the mask is causal, and the mask is not read. With any other mask, both apply.
- key_padding_mask and attn_mask may have different dtypes. Float masks have gradients.

Exceptions: docs/errors.md.

Dimensions: B batch, T queries, S keys, E embed_dim, H heads, D = E / H; Nq and Nk: rows of all packed sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..functional import scaled_dot_product_attention, varlen_attention
from ..functional._autograd import recorded
from ..functional._checks import TypeAssertionError, ValueAssertionError, ValueRuntimeError
from ..functional._multihead_ops import HEAD_WEIGHTS, MEAN_WEIGHTS, NO_WEIGHTS, Options, multihead
from ..functional._nested import jagged_like
from ..functional._values import eager_on_cpu, in_jit_trace, may_read_values, plain_in
from ..functional.attention import dropout_seed, is_causal_bias
from ._hooks import runs_forward_of
from ._symbolic import as_leaf, refuse_scripting
from .key_value_cache import KeyValueCache

__all__ = ["KeyValueCache", "MultiheadAttention"]


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in replacement for torch.nn.MultiheadAttention: same constructor, parameters, initialization and state_dict.

    Args: as torch.nn.MultiheadAttention: embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False,
        add_zero_attn=False, kdim=None, vdim=None, batch_first=False, device=None, dtype=None.
    Inputs:
        query: [T, B, E], or [B, T, E] with batch_first, or [T, E]. key, value: [S, B, kdim | vdim], or the
            corresponding form. Or all three jagged nested tensors [B, j, E].
        key_padding_mask: [B, S] or [S], bool (True: masked) or float (added to the scores).
        need_weights: whether to return attention weights, which requires storing them.
        attn_mask: [T, S] or [B * H, T, S], bool (True: masked) or float (added to the scores).
        average_attn_weights: whether to average the returned weights over heads.
        is_causal: whether a query attends to keys up to its own position only.
    Keyword-only inputs:
        lengths: [B] number of keys of each sequence, or a pair (queries, keys), as in
            seqkernels.functional.scaled_dot_product_attention. Padding is not computed.
        cu_seqlens_q: int32 or int64 [S + 1], start of each packed sequence: query then has rows [Nq, E], key and value
            [Nk, kdim | vdim]. cu_seqlens_k, max_seqlen_q, max_seqlen_k: as in seqkernels.functional.varlen_attention.
        cache: a KeyValueCache from `new_cache`. The new keys and values are appended, then the queries attend to the
            whole cache. The last query has the position of the last key. lengths is the number of new steps of each
            sequence, and of its queries if query is key or is_causal is set. If key and value are None, nothing is
            appended.
    Outputs:
        output: shaped like query, [..., E].
        weights: with need_weights, [B, T, S] or [B, H, T, S] after dropout, otherwise None; None for packed and nested
        sequences.
    Raises: ValueError, TypeError; NotImplementedError for add_bias_kv and add_zero_attn of packed or cached sequences.
    Deterministic: attention is; the projections are if torch's matrix products are.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.MultiheadAttention.html; Vaswani et al., "Attention
        is all you need", arXiv 1706.03762.
    """

    __prepare_scriptable__ = refuse_scripting

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        dtype: torch.dtype | None = None,
        page_size: int | None = None,
        pages: int | None = None,
    ) -> KeyValueCache:
        """Creates an empty KeyValueCache for `capacity` steps; the default dtype is that of the parameters."""
        of = self.out_proj.weight
        return KeyValueCache(
            batch_size, capacity, self.num_heads, self.head_dim, device=of.device, dtype=dtype or of.dtype,
            page_size=page_size, pages=pages,
        )  # fmt: skip

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        lengths: Any = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        caller = "MultiheadAttention"
        if type(query) is not Tensor and isinstance(query, Proxy):
            arguments = dict(
                query=query, key=key, value=value, key_padding_mask=key_padding_mask, need_weights=need_weights,
                attn_mask=attn_mask, average_attn_weights=average_attn_weights, is_causal=is_causal, lengths=lengths,
                cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                max_seqlen_k=max_seqlen_k, cache=cache,
            )  # fmt: skip
            return as_leaf(self, arguments)
        sequences = lengths is None and cu_seqlens_q is None and cu_seqlens_k is None and cache is None
        if sequences and max_seqlen_q is None and max_seqlen_k is None and eager_on_cpu():
            found = self._fast(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
            if found is not None:
                return found
        for name, t in (("query", query), ("key", key), ("value", value)):
            if not isinstance(t, Tensor) and not (t is None and cache is not None and name != "query"):
                raise TypeError(f"{caller}: {name} must be a tensor, got {type(t).__name__}")
        nested = query.is_nested
        if nested or cu_seqlens_q is not None:
            for name, given in (
                ("key_padding_mask", key_padding_mask),
                ("attn_mask", attn_mask),
                ("lengths", lengths),
                ("cache", cache),
                ("cu_seqlens_q", cu_seqlens_q if nested else None),
            ):
                if given is not None:
                    raise ValueError(f"{caller}: {name} must be None for {'nested' if nested else 'packed'} sequences")
            assert key is not None and value is not None
            if nested:
                return self._nested(query, key, value, is_causal), None
            return self._packed(
                query, key, value, is_causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
            ), None
        for name, given in (
            ("cu_seqlens_k", cu_seqlens_k),
            ("max_seqlen_q", max_seqlen_q),
            ("max_seqlen_k", max_seqlen_k),
        ):
            if given is not None:
                raise ValueError(f"{caller}: {name} must be None without cu_seqlens_q")
        self._check(caller, query, key, value, 2 if query.dim() == 2 else 3)
        if is_causal_bias(attn_mask):
            bias: Any = attn_mask
            attn_mask = bias._materialize(query.device).logical_not()
        dropout_p = self.dropout if self.training else 0.0
        if cache is not None:
            return self._cached(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal, lengths,
                cache, dropout_p,
            )  # fmt: skip
        assert key is not None and value is not None
        q, k, v = (self._by_head(t) for t in self._project(query, key, value))
        B, H, T, _ = q.shape
        S = k.shape[2]
        if is_causal and attn_mask is not None and attn_mask.dim() == 2 and not attn_mask.requires_grad:
            _check_mask(caller, "attn_mask", attn_mask, ([T, S],))
            if in_jit_trace():  # is_causal may result from the values of this mask
                is_causal = False
            else:
                attn_mask = None
        extra = (self.bias_k is not None) + bool(self.add_zero_attn)
        mask, of_padding = _merged(caller, key_padding_mask, attn_mask, B, H, T, S, query.dim(), q.dtype, extra == 0)
        if of_padding is not None:
            if lengths is None:
                lengths = of_padding
            else:
                mask = _both(mask, _before(of_padding, S), q.dtype)
        if extra:  # appended keys that every query attends to
            if lengths is not None or is_causal:
                mask, lengths, is_causal = _written(caller, mask, lengths, is_causal, B, T, S, q), None, False
            k, v = self._with_extra(k, v)
            mask = None if mask is None else F.pad(mask, (0, extra), value=1.0 if mask.dtype == torch.bool else 0.0)
        result = scaled_dot_product_attention(
            q, k, v, mask, dropout_p, is_causal, lengths=lengths, return_weights=need_weights
        )
        return self._finish(result, need_weights, average_attn_weights, query.dim() == 3)

    def _fast(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        padding: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None] | None:
        """The result of a call with common inputs on a CPU in eager mode, by one op; None for other calls.

        Common inputs: batches in float32 or float64 whose key is value; one mask, bool or of the dtype of query,
        without gradient; all valid, so that an error is raised by the checks of other calls.
        """
        out_proj: Any = self._modules["out_proj"]
        if (
            key is not value
            or not isinstance(key, Tensor)
            or not isinstance(query, Tensor)
            or self.__dict__.get("bias_k", self) is not None  # None is an attribute of its own, not a parameter
            or self.add_zero_attn
            or not runs_forward_of(out_proj, NonDynamicallyQuantizableLinear)
        ):
            return None
        own, outer = self._parameters, out_proj._parameters
        if "in_proj_bias" not in own or "bias" not in outer:  # replaced by an attribute, as pruning does
            return None
        parameters: Any = own.get("in_proj_weight"), own.get("in_proj_bias"), outer.get("weight"), outer.get("bias")
        dtype = query.dtype
        if dtype not in (torch.float32, torch.float64) or not plain_in(dtype, query, parameters[0], parameters[2]):
            return None
        for t in (parameters[1], parameters[3], None if key is query else key):
            if t is not None and not plain_in(dtype, t):
                return None
        E, H, of = self.embed_dim, self.num_heads, 0 if self.batch_first else 1
        shape = query.shape
        if len(shape) != 3 or shape[2] != E:
            return None
        S = T = shape[1 - of]
        if key is not query:
            if key.dim() != 3 or key.shape[of] != shape[of] or key.shape[2] != E:
                return None
            S = key.shape[1 - of]
        if padding is not None and not (plain_in(torch.bool, padding) and padding.shape == (shape[of], S)):
            return None
        if attn_mask is not None:
            if (
                type(attn_mask) is not Tensor
                or not plain_in(torch.bool if attn_mask.dtype == torch.bool else dtype, attn_mask)
                or attn_mask.requires_grad
                or attn_mask.shape != (T, S)
            ):
                return None
            if is_causal:
                attn_mask = None
            elif padding is not None:
                return None
            else:
                attn_mask = (attn_mask.logical_not() if attn_mask.dtype == torch.bool else attn_mask).view(1, 1, T, S)
        dropout_p = self.dropout if self.training else 0.0
        if not 0.0 <= dropout_p <= 1.0:
            return None
        kind = (MEAN_WEIGHTS if average else HEAD_WEIGHTS) if need_weights else NO_WEIGHTS
        options = Options(H, self.batch_first, 1 / math.sqrt(E // H), 1 if is_causal else 0, dropout_p)
        memory, seed = None if key is query else key, dropout_seed(dropout_p, query.device)
        output, weights = multihead(query, memory, parameters, padding, attn_mask, seed, options, kind)
        return output, weights if need_weights else None

    # ---- projections

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> tuple[Tensor, ...]:
        """Projects query, key and value to [..., H, D], or query alone if key is None.

        Inputs that are the same tensor share one matrix product.
        """
        E, H = self.embed_dim, self.num_heads
        bias: Tensor | None = self.in_proj_bias
        weight: Tensor | None = self.in_proj_weight
        if bias is not None:
            bias = bias.to(query.dtype)  # no effect, unless the bias has a dtype of its own
        if weight is not None and query is key and key is value:
            return F.linear(query, weight, bias).unflatten(-1, (3, H, E // H)).unbind(-3)
        of = (None,) * 3 if bias is None else bias.chunk(3)
        if weight is not None:
            weights: Sequence[Tensor] = weight.chunk(3)
        else:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        q = F.linear(query, weights[0], of[0]).unflatten(-1, (H, E // H))
        if key is None or value is None:
            return (q,)
        if weight is not None and key is value:
            both = F.linear(key, weight[E:], None if bias is None else bias[E:])
            return (q, *both.unflatten(-1, (2, H, E // H)).unbind(-3))
        k, v = (F.linear(x, w, b).unflatten(-1, (H, E // H)) for x, w, b in zip((key, value), weights[1:], of[1:]))
        return q, k, v

    def _by_head(self, x: Tensor) -> Tensor:
        """Permutes [..., H, D] to [B, H, T, D]."""
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _with_extra(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends bias_k and bias_v, then zeros, to the keys and values of each sequence."""
        B, H, _, D = k.shape
        more_k, more_v = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            more_k.append(self.bias_k.view(1, H, 1, D).to(k.dtype).expand(B, -1, -1, -1))
            more_v.append(self.bias_v.view(1, H, 1, D).to(v.dtype).expand(B, -1, -1, -1))
        if self.add_zero_attn:
            more_k.append(k.new_zeros(B, H, 1, D))
            more_v.append(v.new_zeros(B, H, 1, D))
        return torch.cat(more_k, 2), torch.cat(more_v, 2)

    def _finish(self, result: Any, need_weights: bool, average: bool, batched: bool) -> tuple[Tensor, Tensor | None]:
        out, weights = result if need_weights else (result, None)
        if not batched:
            out = out.squeeze(0).transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        out = self.out_proj(out.flatten(-2))
        if weights is not None:
            weights = weights.mean(1) if average else weights
            weights = weights if batched else weights.squeeze(0)
        return out, weights

    # ---- packed, nested and cached sequences

    def _packed(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool,
        cu_seqlens_q: Any,
        cu_seqlens_k: Any,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
    ) -> Tensor:
        """Attention of packed sequences; returns [Nq, E]."""
        caller = "MultiheadAttention"
        self._plain_keys(caller, "packed")
        self._check(caller, query, key, value, 2)
        q, k, v = self._project(query, key, value)
        out = varlen_attention(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal,
        )  # fmt: skip
        return self.out_proj(out.flatten(-2))

    def _nested(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        rows, cu_q, longest, restore = of_nested("MultiheadAttention", "query", query)
        if key is query and value is query:
            return restore(self._packed(rows, rows, rows, is_causal, cu_q, None, longest, None))
        for name, t in (("key", key), ("value", value)):
            if not t.is_nested:
                raise ValueError(f"MultiheadAttention: {name} must be nested if query is nested")
        k_rows, cu_k, longest_k, _ = of_nested("MultiheadAttention", "key", key)
        v_rows = k_rows if value is key else of_nested("MultiheadAttention", "value", value)[0]
        return restore(self._packed(rows, k_rows, v_rows, is_causal, cu_q, cu_k, longest, longest_k))

    def _cached(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average: bool,
        is_causal: bool,
        lengths: Any,
        cache: KeyValueCache,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor | None]:
        caller = "MultiheadAttention"
        self._plain_keys(caller, "cached")
        if query.dim() != 3:
            raise ValueError(f"{caller}: query must have 3 dimensions with cache, got {list(query.shape)}")
        if key_padding_mask is not None:
            raise ValueError(f"{caller}: key_padding_mask must be None with cache; use lengths instead")
        if key is None and is_causal:
            raise ValueError(f"{caller}: is_causal must be False without key and value")
        q, *new = (self._by_head(t) for t in self._project(query, key, value))
        if q.shape[0] != cache.batch_size:
            raise ValueError(
                f"{caller}: query must have as many sequences as the cache, {cache.batch_size}, got {q.shape[0]}"
            )
        if new:
            cache.append(new[0], new[1], lengths)
        elif lengths is not None:
            raise ValueError(f"{caller}: lengths must be None without key and value")
        S = cache.longest
        if is_causal and attn_mask is not None and attn_mask.dim() == 2 and not attn_mask.requires_grad:
            attn_mask = None
        mask, _ = _merged(caller, None, attn_mask, q.shape[0], q.shape[1], q.shape[2], S, 3, q.dtype, False)
        of_q = None
        if new and lengths is not None and (is_causal or query is key):
            of_q = torch.as_tensor(lengths, device=q.device)
        if not need_weights and dropout_p == 0 and not recorded(q, mask):
            return self._finish(cache.attend(q, mask, is_causal, lengths=of_q), False, average, True)
        of: Any = cache.lengths if cache.ragged else None
        of = of if of_q is None else (of_q, cache.lengths)
        keys, values = (
            (x[:, :, :S] for x in (cache.keys, cache.values)) if cache.is_plain(q.dtype) else cache.gathered()
        )
        wide = q if cache.is_plain(q.dtype) else q.to(torch.promote_types(q.dtype, torch.float32))
        result = scaled_dot_product_attention(
            wide, keys.to(wide.dtype), values.to(wide.dtype), mask, dropout_p, is_causal, lengths=of,
            causal_alignment="lower_right" if is_causal else "upper_left", return_weights=need_weights,
        )  # fmt: skip
        if need_weights:
            result = tuple(x.to(q.dtype) for x in result)
        else:
            result = result.to(q.dtype)
        return self._finish(result, need_weights, average, True)

    # ---- checks

    def _plain_keys(self, caller: str, what: str) -> None:
        if self.bias_k is not None or self.add_zero_attn:
            raise NotImplementedError(f"{caller}: add_bias_kv and add_zero_attn must be False for {what} sequences")

    def _check(self, caller: str, query: Tensor, key: Tensor | None, value: Tensor | None, dims: int) -> None:
        if query.dim() != dims:
            wanted = "2 or 3 dimensions" if dims == 3 else "2 dimensions with cu_seqlens_q"
            raise ValueAssertionError(f"{caller}: query must have {wanted}, got {list(query.shape)}")
        if (key is None) != (value is None):
            raise ValueError(f"{caller}: key and value must both be None, or neither")
        separate = not self._qkv_same_embed_dim
        given = [("query", query, self.embed_dim)]
        if key is not None and value is not None:
            given += [("key", key, self.kdim), ("value", value, self.vdim)]
        for name, t, size in given:
            if t.dim() != dims:
                raise ValueAssertionError(
                    f"{caller}: {name} must have as many dimensions as query, {dims}, got {list(t.shape)}"
                )
            if t.shape[-1] != size:
                equal = key is None or value is None or key.shape == value.shape
                error = ValueRuntimeError if name != "query" and equal and not separate else ValueAssertionError
                raise error(f"{caller}: {name} must have {size} columns, got {t.shape[-1]}")
        if key is None or value is None:
            return
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueAssertionError(
                f"{caller}: value must have as many rows as key, {list(key.shape[:-1])}, got {list(value.shape[:-1])}"
            )
        of = 0 if self.batch_first else 1
        if dims == 3 and key.shape[of] != query.shape[of]:
            raise ValueRuntimeError(
                f"{caller}: key must have as many sequences as query, {query.shape[of]}, got {key.shape[of]} "
                f"(batch_first is {self.batch_first})"
            )


def check_tensor(caller: str, name: str, t: Any) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(t).__name__}")


# ---- masks


def _check_mask(caller: str, name: str, mask: Any, shapes: Sequence[list[Any]]) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeAssertionError(f"{caller}: {name} must be bool or floating, got {mask.dtype}")
    if list(mask.shape) not in list(shapes):
        wanted = " or ".join(str(shape) for shape in shapes)
        of_rank = len(mask.shape) in [len(shape) for shape in shapes] and name == "attn_mask"
        error = ValueRuntimeError if of_rank else ValueAssertionError  # the types of torch
        raise error(f"{caller}: {name} must have shape {wanted}, got {list(mask.shape)}")


def _merged(
    caller: str,
    padding: Tensor | None,
    attn_mask: Tensor | None,
    B: Any,
    H: int,
    T: Any,
    S: Any,
    dims: int,
    dtype: torch.dtype,
    as_lengths: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Converts both masks to a mask for scaled_dot_product_attention, and lengths [B] if they can replace the padding.

    as_lengths: whether to try to convert the padding mask to lengths.
    """
    mask = lengths = None
    if attn_mask is not None:
        _check_mask(caller, "attn_mask", attn_mask, ([T, S], [B * H, T, S]))
        mask = attn_mask.logical_not() if attn_mask.dtype == torch.bool else _unrounded(attn_mask, dtype)
        mask = mask.view(1, 1, T, S) if mask.dim() == 2 else mask.view(B, H, T, S)
    if padding is not None:
        _check_mask(caller, "key_padding_mask", padding, ([B, S] if dims == 3 else [S],))
        seen = padding.logical_not() if padding.dtype == torch.bool else _unrounded(padding, dtype)
        seen = seen.view(B, S)
        lengths = _lengths_of(seen) if as_lengths else None
        if lengths is None:
            mask = _both(mask, seen.view(B, 1, 1, S), dtype)
    return mask, lengths


def _unrounded(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask in a dtype that scaled_dot_product_attention supports beside a query of `dtype`."""
    return mask.to(dtype if mask.dtype == dtype or dtype.itemsize > 2 else torch.float32)


def _lengths_of(seen: Tensor) -> Tensor | None:
    """Lengths [B] that are equivalent to a mask [B, S], or None.

    Only plain CPU tensors in eager mode are inspected, where reading the values requires no synchronization.
    """
    if seen.device.type != "cpu" or seen.requires_grad or not may_read_values(seen):
        return None
    if seen.dtype != torch.bool:
        kept = seen == 0
        if not torch.equal(kept, seen != -math.inf):
            return None
        seen = kept
    lengths = seen.sum(1)
    return lengths if torch.equal(seen, _before(lengths, seen.shape[1]).view(seen.shape)) else None


def _before(lengths: Tensor, S: Any) -> Tensor:
    """[B, 1, 1, S] whether a position is less than the length."""
    return torch.arange(S, device=lengths.device) < lengths.view(-1, 1, 1, 1)


def _both(mask: Tensor | None, other: Tensor, dtype: torch.dtype) -> Tensor:
    """Combines two masks: the conjunction of bool masks, otherwise the sum of float masks."""
    if mask is None:
        return other
    if mask.dtype == torch.bool and other.dtype == torch.bool:
        return mask & other
    return _added(mask, dtype) + _added(other, dtype)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a bool mask to a float mask."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask.logical_not(), -math.inf)


def _written(
    caller: str, mask: Tensor | None, lengths: Any, is_causal: bool, B: Any, T: Any, S: Any, q: Tensor
) -> Tensor | None:
    """Merges lengths and causality into the mask."""
    if lengths is not None:
        if isinstance(lengths, tuple) and not isinstance(lengths[0], int):
            raise NotImplementedError(f"{caller}: lengths must be those of keys only with add_bias_kv or add_zero_attn")
        mask = _both(mask, _before(torch.as_tensor(lengths, device=q.device), S), q.dtype)
    if is_causal:
        i, j = torch.arange(T, device=q.device), torch.arange(S, device=q.device)
        mask = _both(mask, (j <= i.unsqueeze(1)).view(1, 1, T, S), q.dtype)
    return mask


# ---- nested tensors


def of_nested(caller: str, name: str, t: Tensor) -> tuple[Tensor, Tensor, Any, Callable[[Tensor], Tensor]]:
    """Rows [N, E], offsets [B + 1], maximum length, and a function that restores the nested form of rows [N, E]."""
    if t.dim() != 3:
        raise ValueError(f"{caller}: {name} must be nested of shape [B, j, E], got {t.dim()} dimensions")
    if t.layout == torch.jagged:
        if t._ragged_idx != 1 or t.lengths() is not None:  # type: ignore[attr-defined]
            raise ValueError(f"{caller}: {name} must be jagged without holes of shape [B, j, E], got {list(t.shape)}")
        offsets = t.offsets()  # type: ignore[attr-defined]
        longest = t._get_max_seqlen()  # type: ignore[attr-defined]
        return t.values(), offsets, longest, lambda rows: jagged_like(t, rows)
    # The strided layout, to which torch.nn.TransformerEncoder converts padded batches.
    t = t.contiguous()
    sizes = t._nested_tensor_size()
    lengths, E = sizes[:, 0], int(sizes[0, 1]) if sizes.shape[0] else 0
    cu = F.pad(lengths.cumsum(0), (1, 0)).to(t.device)

    def restore(rows: Tensor) -> Tensor:
        strides, at = t._nested_tensor_strides(), t._nested_tensor_storage_offsets()
        return torch._nested_view_from_buffer(rows.contiguous().view(-1), sizes, strides, at)

    return t.values().view(-1, E), cu, int(lengths.max()) if sizes.shape[0] else 0, restore
