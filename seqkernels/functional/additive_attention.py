"""Functional form of additive (Bahdanau) attention: argument checks and calls of the ops.

Dimensions: B batch, Tq queries, Tk keys, H hidden units, Dv columns of the values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .. import backend as backends
from ._additive_attention_ops import OPS, Inputs, attend, key_exp
from ._autograd import NAMESPACE, autocast, autocast_dtype
from ._checks import Lengths, describe, lengths_tensor, of_op
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function_variadic,
    refuse_nested,
)
from ._values import dense_on_cpu, eager_on_cpu, plain_in, tracing

__all__ = ["AdditiveKeys", "additive_attention"]


class AdditiveKeys:
    """Projected keys of additive attention with e^(2 key), which is computed once for any number of calls.

    A decoder that calls additive_attention at each step makes them once per input sequence. The beams of a sentence
    share them: see `query` of additive_attention. After a change of key or value in place, calls raise, except in
    compiled graphs and for inference tensors, which do not count changes.

    Args:
        key: [B, Tk, H] projected keys; gradient: yes.
        value: [B, Tk, Dv], for calls without a value.

    Registered with torch.utils._pytree: a function of the tensors of a nest applies to key, value and exp.
    """

    __slots__ = ("_versions", "exp", "key", "value")

    def __init__(self, key: Tensor, value: Tensor | None = None, *, exp: Tensor | None = None) -> None:
        if exp is None:
            _check_key("AdditiveKeys", key)
            exp = key_exp(key)
        self._set((key, value, exp))

    def _set(self, parts: Any) -> None:
        self.key, self.value, self.exp = parts
        self._versions = _version(self.key), _version(self.value)

    def check(self, caller: str) -> None:
        """Raises if the keys or values have been changed in place."""
        for name, before, after in zip(("key", "value"), self._versions, (_version(self.key), _version(self.value))):
            if before is not None and after is not None and before != after:
                raise ValueError(
                    f"{caller}: {name} must not change after AdditiveKeys was made from it, got a changed tensor"
                )

    def __getstate__(self) -> Any:
        self.check("AdditiveKeys")
        return self.key, self.value, self.exp

    def __setstate__(self, state: Any) -> None:
        self._set(state)

    def __repr__(self) -> str:
        value = None if self.value is None else list(self.value.shape)
        return f"AdditiveKeys(key={list(self.key.shape)}, value={value}, {self.key.dtype}, {self.key.device})"


def _version(t: Any) -> int | None:
    """Number of in-place changes; None while tracing, and for inference tensors, which do not count them."""
    return None if type(t) not in (Tensor, torch.nn.Parameter) or tracing() or t.is_inference() else t._version


def _flatten(keys: AdditiveKeys) -> tuple[list[Any], None]:
    return [keys.key, keys.value, keys.exp], None


def _flatten_with_keys(keys: AdditiveKeys) -> tuple[list[tuple[Any, Any]], None]:
    return [(pytree.GetAttrKey(name), getattr(keys, name)) for name in ("key", "value", "exp")], None


def _unflatten(parts: Any, _context: Any) -> AdditiveKeys:
    keys = AdditiveKeys.__new__(AdditiveKeys)
    keys._set(parts)
    return keys


pytree.register_pytree_node(
    AdditiveKeys,
    _flatten,
    _unflatten,
    serialized_type_name=f"{NAMESPACE}.functional.AdditiveKeys",
    flatten_with_keys_fn=_flatten_with_keys,
)


def additive_attention(
    query: Tensor,
    key: Tensor | AdditiveKeys,
    value: Tensor | None,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    lengths: Lengths | None = None,
    return_weights: bool = False,
    backend: str | None = None,
) -> Any:
    """softmax_j(v . tanh(query_i + key_j + bias)) value, without the [B, Tq, Tk, H] sums of queries and keys.

    Args:
        query: [B, Tq, H] projected queries, float32, float64, bfloat16 or float16; gradient: yes. Also [B, H], one
            query per sequence. The batch may be a multiple R B of that of the keys, as in beam search: rows i R to
            i R + R - 1 attend to the keys of sequence i, which are not copied.
        key: [B, Tk, H] projected keys; gradient: yes. Or AdditiveKeys, to reuse what depends on the keys alone.
        value: [B, Tk, Dv]; gradient: yes. None with AdditiveKeys that have values.
        v: [H]; gradient: yes.
        bias: [H], added to the queries; gradient: yes.
        mask: bool (True: attend) or uint8, [B, Tk], [B, 1, Tk] or [B, Tq, Tk], with the batch of query or of key.
        lengths: [B] number of keys of each sequence, from 0: int32 or int64, or a sequence of int. Padding is not read.
            Can be combined with mask.
        return_weights: also return the weights.
        backend: cpu or triton; None selects one, see seqkernels.explain.
    Returns:
        out: [B, Tq, Dv] or [B, Dv], dtype of query, computed in float32 or wider; 0 for a query that attends to no key.
        weights, with return_weights: [B, Tq, Tk] or [B, Tk], dtype of query; gradient: yes.
        tanh has an absolute error of about 1e-7 in float32, as it is computed from e^(2 query) and e^(2 key); beyond
        an absolute value of 21 (float64: 175) of a query or key, from tanh itself.
    Raises:
        ValueError: invalid shape, length or value. On a GPU, the values of lengths are clamped instead.
        TypeError: invalid type or dtype.
        NotImplementedError: no implementation supports the inputs.
    Equivalent to: seqkernels.reference.additive_attention. Gradients of any order; those beyond the first are computed
        through it.
    Deterministic: yes; the bits of a query do not depend on the batch, padding or threads.
    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        https://arxiv.org/abs/1409.0473
    """
    if bias is mask is None and backend is None and eager_on_cpu():
        found = of_common_inputs(query, key, value, v, lengths, return_weights)
        if found is not None:
            return found
    caller = "additive_attention"
    keys = key if isinstance(key, AdditiveKeys) else None
    tensors = query, keys.key if keys is not None else key, value, v
    if has_torch_function_variadic(*tensors) and dispatches(*tensors):
        return handle_torch_function(
            additive_attention, tensors, query, key, value, v, bias=bias, mask=mask, lengths=lengths,
            return_weights=return_weights, backend=backend,
        )  # fmt: skip
    exp = None
    if keys is not None:
        keys.check(caller)
        key, exp = keys.key, keys.exp
        value = keys.value if value is None else value
    single = isinstance(query, Tensor) and query.dim() == 2
    if single:
        query = query.unsqueeze(1)
    query, key, value, v, bias = _checked(caller, query, key, value, v, bias)
    chosen = _choose(caller, query, backend)
    if exp is not None and (keys is None or key.dtype != keys.key.dtype):  # autocast has changed the keys
        exp = None
    if bias is not None:
        query = query + bias
    (N, Tq, _), (B, Tk) = query.shape, key.shape[:2]
    fold = N != B
    query = fold_beams(caller, query, B)
    mask = beam_mask(caller, mask, (N, Tq, Tk), B, query.device)
    if lengths is not None:
        lengths = lengths_tensor(caller, lengths, B, query.device)
    try:
        out, weights = attend(Inputs(query, key, value, v, mask, lengths, exp), OPS[chosen])
    except RuntimeError as error:
        raise of_op(caller, error) from None
    results = []
    for t in (out, weights.to(out.dtype)) if return_weights else (out,):
        t = t.reshape(N, Tq, t.shape[2]) if fold else t
        results.append(t.squeeze(1) if single else t)
    return tuple(results) if return_weights else results[0]


def of_common_inputs(query: Any, key: Any, value: Any, v: Any, lengths: Any, return_weights: bool) -> Any:
    """The result of a call with valid tensors on a CPU, one query sequence for each key sequence; None for others."""
    exp = None
    if type(key) is AdditiveKeys:
        keys = key
        key, exp = keys.key, keys.exp
        value = keys.value if value is None else value
        if exp is not None and keys._versions != (_version(key), _version(keys.value)):
            return None
    dtype = query.dtype if isinstance(query, Tensor) else None
    if dtype not in backends.DTYPES or not plain_in(dtype, query, key, value, v) or not dense_on_cpu(exp):
        return None
    shape, of_keys = query.shape, key.shape
    if not 2 <= len(shape) <= 3 or len(of_keys) != 3 or shape[0] != of_keys[0] or shape[-1] != of_keys[2]:
        return None
    if value.dim() != 3 or value.shape[:2] != of_keys[:2] or v.shape != of_keys[2:]:
        return None
    if lengths is not None and not (plain_in(torch.int64, lengths) and lengths.shape == of_keys[:1]):
        return None
    single = len(shape) == 2
    try:
        out, weights = attend(Inputs(query.unsqueeze(1) if single else query, key, value, v, None, lengths, exp), _CPU)
    except RuntimeError:  # of invalid lengths, which the other path describes
        return None
    out = out.squeeze(1) if single else out
    if not return_weights:
        return out
    weights = weights if weights.dtype is out.dtype else weights.to(out.dtype)
    return out, weights.squeeze(1) if single else weights


_CPU = OPS["cpu"]


def fold_beams(caller: str, query: Tensor, keys: int) -> Tensor:
    """The queries [R B, Tq, D] of the beams of a sentence as those of one sequence, [B, R Tq, D]."""
    N, Tq, D = query.shape
    if keys == N:
        return query
    if keys == 0 or N % keys:
        raise ValueError(f"{caller}: query must have the batch of key, {keys}, or a multiple of it, got {N}")
    return query.reshape(keys, N // keys * Tq, D)


# ---- checks


def _check_key(caller: str, key: Any) -> None:
    if not isinstance(key, Tensor):
        raise TypeError(f"{caller}: key must be a tensor, got {describe(key)}")
    if key.dtype not in backends.DTYPES:
        raise TypeError(f"{caller}: key must be {', '.join(str(d) for d in backends.DTYPES)}, got {key.dtype}")
    if key.dim() != 3:
        raise ValueError(f"{caller}: key must have shape [B, Tk, H], got {list(key.shape)}")


def _checked(
    caller: str, query: Any, key: Any, value: Any, v: Any, bias: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    tensors = {"query": query, "key": key, "value": value, "v": v, "bias": bias}
    for name, t in tensors.items():
        if not isinstance(t, Tensor) and not (name == "bias" and t is None):
            also = ", or None with AdditiveKeys that have values" if name == "value" else ""
            raise TypeError(f"{caller}: {name} must be a tensor{also}, got {describe(t)}")
    refuse_nested(caller, "pad it, and pass lengths", query=query, key=key, value=value)
    dtype = autocast_dtype(query.device)
    if dtype is not None:
        tensors = {name: None if t is None else autocast(t, dtype) for name, t in tensors.items()}
        query, key, value, v, bias = tensors.values()
    if query.dtype not in backends.DTYPES:
        _choose(caller, query, None)
    for name, t in tensors.items():
        if t is None:
            continue
        if t.dtype != query.dtype:
            raise TypeError(f"{caller}: {name} must be of query's dtype {query.dtype}, got {t.dtype}")
        if t.device != query.device:
            raise ValueError(f"{caller}: {name} must be on query's device {query.device}, got {t.device}")
    if query.dim() != 3:
        raise ValueError(f"{caller}: query must have shape [B, Tq, H] or [B, H], got {list(query.shape)}")
    H = query.shape[2]
    if key.dim() != 3 or key.shape[2] != H:
        raise ValueError(f"{caller}: key must have shape [B, Tk, H], of H = {H}, got {list(key.shape)}")
    if value.dim() != 3 or value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{caller}: value must have shape [B, Tk, Dv], of B = {key.shape[0]} and Tk = {key.shape[1]}, got "
            f"{list(value.shape)}"
        )
    for name, t in (("v", v), ("bias", bias)):
        if t is not None and tuple(t.shape) != (H,):
            raise ValueError(f"{caller}: {name} must have shape [H] = [{H}], got {list(t.shape)}")
    return query, key, value, v, bias


def _choose(caller: str, query: Tensor, backend: str | None) -> str:
    if query.is_meta and backend is None and query.dtype in backends.DTYPES:
        return "cpu"  # only shapes are computed
    request = backends.Request(query.device, query.dtype)
    return backends.choose(caller, backends.ADDITIVE_ATTENTION, request, backend, "a query", query.shape)


def beam_mask(caller: str, mask: Any, shape: tuple[int, int, int], B: int, device: torch.device) -> Tensor | None:
    """mask as [B | 1, Tq | 1, Tk], of the folded queries."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{caller}: mask must be a tensor, got {describe(mask)}")
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{caller}: mask must be bool or uint8, got {mask.dtype}")
    if mask.device != device:
        raise ValueError(f"{caller}: mask must be on query's device {device}, got {mask.device}")
    N, Tq, Tk = shape
    given = mask.bool() if mask.dim() != 2 else mask.bool().unsqueeze(1)
    if given.dim() != 3 or given.shape[0] not in (N, B, 1) or given.shape[1] not in (Tq, 1) or given.shape[2] != Tk:
        batch = f"{B}" if N == B else f"{N} or {B}"
        raise ValueError(
            f"{caller}: mask must have shape [B, Tk], [B, 1, Tk] or [B, Tq, Tk], of B = {batch}, Tq = {Tq} and "
            f"Tk = {Tk}, got {list(mask.shape)}"
        )
    if N == B or (given.shape[0] in (B, 1) and given.shape[1] == 1):
        return given
    if given.shape[0] == N:
        return given.expand(N, Tq, Tk).reshape(B, N // B * Tq, Tk)
    return given.unsqueeze(1).expand(-1, N // B, Tq, Tk).flatten(1, 2)
