"""Attention of recurrent encoder-decoder models: additive (Bahdanau) and multiplicative (Luong).

Dimensions: B batch, Tq queries, Tk keys, Dq, Dk, Dv columns of queries, keys and values, H hidden units.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Linear, Module, Parameter, init
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..backend import DTYPES
from ..functional._attention_ops import AttentionArgs, Inputs, attend, attend_eagerly, weights_of
from ..functional._autograd import autocast_dtype
from ..functional._checks import Lengths, TypeRuntimeError, describe, lengths_tensor
from ..functional._values import eager_on_cpu, plain_in
from ..functional.additive_attention import (
    AdditiveKeys,
    additive_attention,
    beam_mask,
    fold_beams,
    of_common_inputs,
)
from ..functional.attention import scaled_dot_product_attention
from ._hooks import runs_forward_of
from ._symbolic import as_leaf, refuse_scripting

# Names of the projections of queries and of keys and of v in published implementations, each a Linear layer.
_LAYOUTS = (
    ("W1", "W2", "V"),
    ("Wa", "Ua", "Va"),
    ("W_a", "U_a", "v_a"),
    ("W_q", "W_k", "w_v"),
    ("query_layer", "key_layer", "energy_layer"),
    ("linear_query", "linear_context", "v"),
    ("query_layer", "memory_layer", "v"),
)


class AdditiveAttention(Module):
    """Attention with scores v . tanh(W1 query + W2 key + b), as of Bahdanau et al.

    Args:
        query_dim, key_dim: columns of queries (decoder states) and keys (encoder outputs), Dq and Dk.
        hidden_dim: columns of their projections, H; query_dim if None.
        bias: whether the scores have the bias b.
        device, dtype: of the parameters.

    Parameters: query_projection.weight [H, Dq], query_projection.bias [H], key_projection.weight [H, Dk], v [H].

    load_state_dict also accepts the layouts of published implementations: two layers and a vector (W1, W2, V; Wa, Ua,
    Va; W_q, W_k, w_v; ...), or one layer `attn` [H, Dq + Dk] over the query followed by the key, and `v`. Biases of the
    key's layer are added to b; a bias of v has no effect on the weights and is dropped.

    Deterministic: attention is; the projections are if torch's matrix products are.
    Source: Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate",
        https://arxiv.org/abs/1409.0473
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int | None = None,
        *,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden_dim = query_dim if hidden_dim is None else hidden_dim
        _check_sizes("AdditiveAttention", query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        self.query_dim, self.key_dim, self.hidden_dim = query_dim, key_dim, hidden_dim
        self.query_projection = Linear(query_dim, hidden_dim, bias=bias, device=device, dtype=dtype)
        self.key_projection = Linear(key_dim, hidden_dim, bias=False, device=device, dtype=dtype)
        self.v = Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        _reset_v(self.v)

    def reset_parameters(self) -> None:
        """Draws the projections as torch.nn.Linear does, and v from U(-1 / sqrt(H), 1 / sqrt(H))."""
        self.query_projection.reset_parameters()
        self.key_projection.reset_parameters()
        _reset_v(self.v)

    def extra_repr(self) -> str:
        return f"query_dim={self.query_dim}, key_dim={self.key_dim}, hidden_dim={self.hidden_dim}"

    def project(self, keys: Tensor, values: Tensor | None = None) -> AdditiveKeys:
        """Projects the keys once for all steps of a decoder.

        Args:
            keys: [B, Tk, Dk] encoder outputs. values: [B, Tk, Dv]; the keys if None.
        Returns:
            What forward accepts in place of keys.
        """
        _check_rows("AdditiveAttention", "keys", keys, self.key_dim)
        return AdditiveKeys(self.key_projection(keys), keys if values is None else values)

    def forward(
        self,
        query: Tensor,
        keys: Tensor | AdditiveKeys,
        values: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Lengths | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Context of each query.

        Args:
            query: [B, Tq, Dq] or [B, Dq]; its batch may be a multiple of that of the keys, for beams.
            keys: [B, Tk, Dk], or what project returns.
            values: [B, Tk, Dv]; the keys (before their projection) if None.
            mask: bool (True: attend), [B, Tk], [B, 1, Tk] or [B, Tq, Tk]. lengths: [B] number of keys.
            need_weights: also return the weights.
        Returns:
            context: [B, Tq, Dv] or [B, Dv]; weights, with need_weights: [B, Tq, Tk] or [B, Tk].
        """
        if isinstance(query, Proxy) or isinstance(keys, Proxy):
            arguments = dict(query=query, keys=keys, values=values, mask=mask, lengths=lengths)
            return as_leaf(self, {**arguments, "need_weights": need_weights})
        if mask is None and eager_on_cpu():
            found = self._fast(query, keys, values, lengths, need_weights)
            if found is not None:
                return found
        _check_rows("AdditiveAttention", "query", query, self.query_dim, single=True)
        _check_dtype("AdditiveAttention", "query", query, "the parameters", self.v)
        if not isinstance(keys, AdditiveKeys):
            _check_rows("AdditiveAttention", "keys", keys, self.key_dim)
            _check_dtype("AdditiveAttention", "keys", keys, "the parameters", self.v)
            values = keys if values is None else values
            keys = self.key_projection(keys)
        return additive_attention(
            self.query_projection(query), keys, values, self.v, mask=mask, lengths=lengths, return_weights=need_weights
        )

    def _fast(self, query: Any, keys: Any, values: Any, lengths: Any, need_weights: bool) -> Any:
        """The result for valid inputs on a CPU and projections without hooks; None for other calls."""
        of_query: Any = self._modules["query_projection"]
        of_keys: Any = self._modules["key_projection"]
        if not (runs_forward_of(of_query, Linear) and runs_forward_of(of_keys, Linear)):
            return None
        left, right, v = of_query._parameters, of_keys._parameters, self._parameters.get("v")
        if v is None or not ("bias" in left and plain_in(v.dtype, query, left.get("weight"), right.get("weight"))):
            return None
        if not 2 <= query.dim() <= 3 or query.shape[-1] != self.query_dim or right.get("bias") is not None:
            return None
        projected = keys
        if type(keys) is not AdditiveKeys:
            if not plain_in(v.dtype, keys) or keys.dim() != 3 or keys.shape[2] != self.key_dim:
                return None
            values = keys if values is None else values
            projected = F.linear(keys, right["weight"])
        return of_common_inputs(
            F.linear(query, left["weight"], left["bias"]), projected, values, v, lengths, need_weights
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self._translate(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _translate(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Renames the parameters of another layout in place."""

        def take(name: str) -> Tensor | None:
            return state_dict.pop(prefix + name, None)

        def put(name: str, t: Tensor | None) -> None:
            if t is not None:
                state_dict[prefix + name] = t

        joint = take("attn.weight")
        if joint is not None:
            of_query, of_keys = joint.split([self.query_dim, joint.shape[1] - self.query_dim], 1)
            put("query_projection.weight", of_query)
            put("key_projection.weight", of_keys)
            put("query_projection.bias", take("attn.bias"))
            names: tuple[str, ...] = ("v",)
        else:
            found = [names for names in _LAYOUTS if all(f"{prefix}{n}.weight" in state_dict for n in names[:2])]
            if not found:
                return
            names = found[0]
            put("query_projection.weight", take(f"{names[0]}.weight"))
            put("key_projection.weight", take(f"{names[1]}.weight"))
            biases = [b for b in (take(f"{n}.bias") for n in names[:2]) if b is not None]
            put("query_projection.bias", sum(biases) if biases else None)  # type: ignore[arg-type]
        v = take(f"{names[-1]}.weight")
        take(f"{names[-1]}.bias")
        if v is None:
            v = take(names[-1])
        put("v", None if v is None else v.reshape(-1))
        if self.query_projection.bias is not None and f"{prefix}query_projection.bias" not in state_dict:
            put("query_projection.bias", torch.zeros_like(self.query_projection.bias))


class LuongAttention(Module):
    """Attention with the scores of Luong et al.: query . key, query . W key, or v . tanh(W [query, key]).

    Args:
        query_dim, key_dim: columns of queries (decoder states) and keys (encoder outputs), Dq and Dk; key_dim is
            query_dim if None.
        method: dot (Dq = Dk), general, or concat.
        hidden_dim: with concat, columns of the hidden layer, H; query_dim if None.
        bias: with concat, whether the hidden layer has a bias.
        scale: factor of the scores of dot and general.
        device, dtype: of the parameters.

    Parameters: general: attn.weight [Dq, Dk]. concat: attn.weight [H, Dq + Dk], attn.bias [H], v [H].

    dot and general call scaled_dot_product_attention, concat additive_attention. A bias of `attn` in a state_dict for
    general has no effect on the weights and is dropped. concat reads attn.weight: another layer in the place of attn,
    and hooks, are refused.

    Deterministic: attention is; the projections are if torch's matrix products are.
    Source: Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation",
        https://arxiv.org/abs/1508.04025
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        query_dim: int,
        key_dim: int | None = None,
        method: Literal["dot", "general", "concat"] = "general",
        *,
        hidden_dim: int | None = None,
        bias: bool = True,
        scale: float = 1.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_dim = query_dim if key_dim is None else key_dim
        if method not in ("dot", "general", "concat"):
            raise ValueError(f"LuongAttention: method must be dot, general or concat, got {method!r}")
        if hidden_dim is not None and method != "concat":
            raise ValueError(f"LuongAttention: hidden_dim must be None with method {method}, got {hidden_dim}")
        if scale != 1.0 and method == "concat":
            raise ValueError(f"LuongAttention: scale must be 1 with method concat, got {scale}")
        hidden_dim = query_dim if hidden_dim is None else hidden_dim
        _check_sizes("LuongAttention", query_dim=query_dim, key_dim=key_dim, hidden_dim=hidden_dim)
        if method == "dot" and key_dim != query_dim:
            raise ValueError(f"LuongAttention: key_dim must be query_dim with method dot, {query_dim}, got {key_dim}")
        self.query_dim, self.key_dim, self.method, self.scale = query_dim, key_dim, method, float(scale)
        self.attn: Linear | None = None
        if method == "general":
            self.attn = Linear(key_dim, query_dim, bias=False, device=device, dtype=dtype)
        elif method == "concat":
            # quantize_dynamic converts exact classes; the weight is read in two parts.
            self.attn = NonDynamicallyQuantizableLinear(
                query_dim + key_dim, hidden_dim, bias=bias, device=device, dtype=dtype
            )
            self.v = Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
            _reset_v(self.v)

    def reset_parameters(self) -> None:
        """Draws the layer as torch.nn.Linear does, and v from U(-1 / sqrt(H), 1 / sqrt(H))."""
        if self.attn is not None:
            self.attn.reset_parameters()
        if self.method == "concat":
            _reset_v(self.v)

    def extra_repr(self) -> str:
        scale = "" if self.scale == 1.0 else f", scale={self.scale}"
        return f"query_dim={self.query_dim}, key_dim={self.key_dim}, method={self.method!r}{scale}"

    def project(self, keys: Tensor, values: Tensor | None = None) -> AdditiveKeys | tuple[Tensor, Tensor]:
        """Computes once what depends on the keys alone, for all steps of a decoder.

        Args:
            keys: [B, Tk, Dk] encoder outputs. values: [B, Tk, Dv]; the keys if None.
        Returns:
            What forward accepts in place of keys.
        """
        _check_rows("LuongAttention", "keys", keys, self.key_dim)
        values = keys if values is None else values
        if self.method == "concat":
            return AdditiveKeys(F.linear(keys, self._weight()[:, self.query_dim :]), values)
        return keys if self.attn is None else self.attn(keys), values

    def forward(
        self,
        query: Tensor,
        keys: Tensor | AdditiveKeys | tuple[Tensor, Tensor],
        values: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        lengths: Lengths | None = None,
        need_weights: bool = False,
    ) -> Any:
        """Context of each query. Arguments and results: as in AdditiveAttention.forward."""
        if isinstance(query, Proxy) or isinstance(keys, Proxy):
            arguments = dict(query=query, keys=keys, values=values, mask=mask, lengths=lengths)
            return as_leaf(self, {**arguments, "need_weights": need_weights})
        if mask is None and self.method != "concat" and eager_on_cpu():
            found = self._fast(query, keys, values, lengths, need_weights)
            if found is not None:
                return found
        _check_rows("LuongAttention", "query", query, self.query_dim, single=True)
        if isinstance(keys, Tensor):
            _check_dtype("LuongAttention", "keys", keys, "query", query)
        projected: Any = keys if isinstance(keys, (AdditiveKeys, tuple)) else self.project(keys, values)
        if isinstance(projected, AdditiveKeys) != (self.method == "concat"):
            raise TypeError(
                f"LuongAttention: keys must be what project of this module returns, got {describe(keys)} for method "
                f"{self.method}"
            )
        if self.method == "concat":
            assert self.attn is not None
            of_query = F.linear(query, self._weight()[:, : self.query_dim])
            return additive_attention(
                of_query, projected, values, self.v, bias=self.attn.bias, mask=mask, lengths=lengths,
                return_weights=need_weights,
            )  # fmt: skip
        return self._dot(query, projected[0], projected[1] if values is None else values, mask, lengths, need_weights)

    def _fast(self, query: Any, keys: Any, values: Any, lengths: Any, need_weights: bool) -> Any:
        """The result of dot and general for valid inputs on a CPU; None for other calls.

        Valid inputs: tensors of one dtype, with one sequence of queries for each sequence of keys.
        """
        projected = isinstance(keys, tuple)
        if projected and len(keys) == 2:
            values = keys[1] if values is None else values
            keys = keys[0]
        dtype = query.dtype if isinstance(query, Tensor) else None
        if dtype not in DTYPES or not plain_in(dtype, query, keys, keys if values is None else values):
            return None
        shape, of_keys = query.shape, keys.shape
        if (
            not 2 <= len(shape) <= 3
            or len(of_keys) != 3
            or shape[0] != of_keys[0]
            or shape[-1] != self.query_dim
            or of_keys[2] != (self.query_dim if projected else self.key_dim)
        ):
            return None
        values = keys if values is None else values
        if values.dim() != 3 or values.shape[:2] != of_keys[:2]:
            return None
        if lengths is not None and not (plain_in(torch.int64, lengths) and lengths.shape == of_keys[:1]):
            return None
        if not projected and self.attn is not None:
            keys = self.attn(keys)
            if not plain_in(dtype, keys) or keys.shape != (*of_keys[:2], self.query_dim):
                return None
        q = query.unsqueeze(1) if len(shape) == 3 else query.view(shape[0], 1, 1, shape[1])
        k, v = keys.unsqueeze(1), values.unsqueeze(1)
        try:
            if not need_weights:
                out = attend_eagerly(q, k, v, None, lengths, self.scale, 0)
                return out.squeeze(1) if len(shape) == 3 else out.view(shape[0], -1)
            inputs, args = Inputs(k_lengths=lengths), AttentionArgs(scale=self.scale)
            out, lse = attend(q, k, v, inputs, args, None)
        except RuntimeError:  # of invalid lengths, which the other path describes
            return None
        weights = weights_of(q, k, inputs, args, None, lse)
        return tuple(t.squeeze(1) if len(shape) == 3 else t.view(shape[0], -1) for t in (out, weights))

    def _weight(self) -> Tensor:
        attn: Any = self.attn
        if getattr(type(attn), "forward", None) is not Linear.forward:
            raise TypeError(f"LuongAttention: attn must be its own layer with method concat, got {describe(attn)}")
        if attn._forward_hooks or attn._forward_pre_hooks:
            raise TypeError(
                "LuongAttention: attn must have no hooks with method concat, which reads its weight in two parts, got "
                f"{len(attn._forward_hooks) + len(attn._forward_pre_hooks)}"
            )
        weight: Tensor = attn.weight
        return weight

    def _dot(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        lengths: Lengths | None,
        need_weights: bool,
    ) -> Any:
        single = query.dim() == 2
        if single:
            query = query.unsqueeze(1)
        N, Tq, _ = query.shape
        if mask is not None:
            mask = beam_mask("LuongAttention", mask, (N, Tq, keys.shape[1]), keys.shape[0], query.device)
        query = fold_beams("LuongAttention", query, keys.shape[0])
        if not isinstance(values, Tensor) or values.dim() != 3 or values.shape[:2] != keys.shape[:2]:
            raise ValueError(
                f"LuongAttention: values must have shape [B, Tk, Dv], of B = {keys.shape[0]} and Tk = {keys.shape[1]}, "
                f"got {describe(values)}"
            )
        if lengths is not None:
            lengths = lengths_tensor("LuongAttention", lengths, keys.shape[0], keys.device)
        try:
            found = scaled_dot_product_attention(
                query, keys, values, mask, scale=self.scale, lengths=lengths, return_weights=need_weights
            )
        except ValueError as error:
            _, _, reason = str(error).replace("k_lengths", "lengths").partition(": ")
            raise type(error)(f"LuongAttention: {reason}") from None
        results = []
        for t in found if need_weights else (found,):
            t = t.reshape(N, Tq, t.shape[-1])
            results.append(t.squeeze(1) if single else t)
        return tuple(results) if need_weights else results[0]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if self.method == "general":
            state_dict.pop(f"{prefix}attn.bias", None)
        if self.method == "concat":
            v = state_dict.pop(f"{prefix}v.weight", None)
            state_dict.pop(f"{prefix}v.bias", None)
            v = state_dict.get(f"{prefix}v") if v is None else v
            if v is not None:
                state_dict[f"{prefix}v"] = v.reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _reset_v(v: Tensor) -> None:
    init.uniform_(v, -1 / math.sqrt(v.shape[0]), 1 / math.sqrt(v.shape[0]))


def _check_sizes(caller: str, **sizes: Any) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{caller}: {name} must be an int, got {describe(size)}")
        if size < 1:
            raise ValueError(f"{caller}: {name} must be at least 1, got {size}")


def _check_rows(caller: str, name: str, x: Any, columns: int, *, single: bool = False) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{caller}: {name} must be a tensor, got {describe(x)}")
    if x.dim() not in ((2, 3) if single else (3,)) or x.shape[-1] != columns:
        shape = f"[B, T, {columns}]" + (f" or [B, {columns}]" if single else "")
        raise ValueError(f"{caller}: {name} must have shape {shape}, got {list(x.shape)}")


def _check_dtype(caller: str, name: str, x: Tensor, of: str, like: Tensor) -> None:
    if x.dtype != like.dtype and autocast_dtype(x.device) is None:
        raise TypeRuntimeError(f"{caller}: {name} must be of the dtype of {of}, {like.dtype}, got {x.dtype}")
