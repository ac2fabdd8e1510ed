"""Replacements of torch.nn's transformer layers, which use the attention of seqkernels, and positional encodings.

The layers have the constructors, parameters and state_dict of torch.nn's layers and work in torch.nn.TransformerEncoder
and TransformerDecoder. An encoder layer in evaluation whose modules are the original ones, without hooks, computes its
formula without calling them.

Dimensions: B batch, T steps, S steps of memory, E d_model, N rows of all packed sequences.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy

from ..functional._values import eager_on_cpu, tracing
from ._hooks import runs_forward_of
from ._symbolic import as_leaf, refuse_scripting
from .attention import MultiheadAttention, check_tensor, of_nested
from .key_value_cache import KeyValueCache

__all__ = ["PositionalEncoding", "TransformerDecoderLayer", "TransformerEncoderLayer"]

Activation = str | Callable[[Tensor], Tensor]


def _take_over(attention: torch.nn.MultiheadAttention) -> None:
    """Converts the attention module created by torch's constructor, and keeps its parameters."""
    attention.__class__ = MultiheadAttention


def _attend(
    attention: torch.nn.Module,
    query: Tensor,
    key: Tensor | None,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    is_causal: bool,
    more: dict[str, Any],
) -> Tensor:
    """Calls an attention module, which users may replace by one with the signature of torch.nn.MultiheadAttention."""
    output: Tensor = attention(
        query, key, key, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal,
        need_weights=False, **more,
    )[0]  # fmt: skip
    return output


def _is_extended(attention: torch.nn.Module, block: Callable[..., Tensor], ours: Callable[..., Tensor]) -> bool:
    """Whether a layer's attention and the method that calls it support inputs beyond torch's, such as lengths."""
    if not isinstance(attention, MultiheadAttention):
        return False
    if getattr(block, "__func__", None) is ours:
        return True
    parameters = inspect.signature(block).parameters.values()
    return any(parameter.kind == inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _needs_extended(caller: str, attention: str, block: str) -> NotImplementedError:
    return NotImplementedError(
        f"{caller}: lengths, cu_seqlens and cache need a seqkernels.nn.MultiheadAttention as {attention} and a {block} "
        "that passes its keyword arguments to it; use a padding mask instead"
    )


def _given(**inputs: Any) -> dict[str, Any]:
    """The inputs that are not None."""
    return {name: value for name, value in inputs.items() if value is not None}


def _of_itself(lengths: Any) -> Any:
    """The pair (queries, keys) of lengths for self-attention."""
    return None if lengths is None else (lengths, lengths)


# The modules of an encoder layer, and the classes whose forward methods make up its formula.
_PARTS: tuple[tuple[str, type[torch.nn.Module]], ...] = (
    ("self_attn", MultiheadAttention),
    ("linear1", torch.nn.Linear),
    ("linear2", torch.nn.Linear),
    ("norm1", torch.nn.LayerNorm),
    ("norm2", torch.nn.LayerNorm),
    ("dropout", torch.nn.Dropout),
    ("dropout1", torch.nn.Dropout),
    ("dropout2", torch.nn.Dropout),
)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Drop-in replacement for torch.nn.TransformerEncoderLayer: same constructor, parameters and state_dict.

    Args: as torch.nn.TransformerEncoderLayer: d_model, nhead, dim_feedforward=2048, dropout=0.1, activation=relu (relu,
        gelu or a function), layer_norm_eps=1e-5, batch_first=False, norm_first=False, bias=True, device=None,
        dtype=None.
    Inputs: src: [T, B, E], or [B, T, E] with batch_first, or [T, E], or nested [B, j, E]; src_mask,
        src_key_padding_mask, is_causal: as attn_mask, key_padding_mask and is_causal of
        seqkernels.nn.MultiheadAttention.
    Keyword-only inputs:
        lengths: [B] number of steps of each sequence; padding is excluded from attention as query and as key.
        cu_seqlens: [S + 1], start of each packed sequence; src then has rows [N, E]. max_seqlen: the maximum length.
        cache: a KeyValueCache of self_attn from `new_cache`; src then has the next steps. Inference only.
    Outputs: as src.
    Raises: as seqkernels.nn.MultiheadAttention.
    Deterministic: attention is; the projections and the linear layers are if torch's matrix products are.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html; Vaswani et al.,
        "Attention is all you need", arXiv 1706.03762; norm_first: Xiong et al., arXiv 2002.04745.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _take_over(self.self_attn)

    def new_cache(
        self, batch_size: int, capacity: int, *, dtype: torch.dtype | None = None, page_size: int | None = None
    ) -> KeyValueCache:
        """Creates an empty cache for `capacity` steps; dtype and page_size as in KeyValueCache."""
        attention: Any = self.self_attn
        cache: KeyValueCache = attention.new_cache(batch_size, capacity, dtype=dtype, page_size=page_size)
        return cache

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        if type(src) is not Tensor and isinstance(src, Proxy):
            arguments = dict(
                src=src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal,
                lengths=lengths, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, cache=cache,
            )  # fmt: skip
            return as_leaf(self, arguments)
        if (
            (lengths is None and cu_seqlens is None and max_seqlen is None and cache is None)
            and type(self) is TransformerEncoderLayer
            and eager_on_cpu()
            and self._evaluates_formula()
        ):
            found = self._fast(src, src_mask, src_key_padding_mask, is_causal)
            if found is not None:
                return found
        caller = "TransformerEncoderLayer"
        check_tensor(caller, "src", src)
        restore = None
        extended = _is_extended(self.self_attn, self._sa_block, TransformerEncoderLayer._sa_block)
        if src.is_nested:
            if cu_seqlens is not None:
                raise ValueError(f"{caller}: cu_seqlens must be None if src is nested")
            src, cu_seqlens, max_seqlen, restore = of_nested(caller, "src", src)
            if not extended:
                return restore(self._padded(src, cu_seqlens, max_seqlen, src_mask, is_causal))

        more = _given(
            lengths=lengths if cache is not None else _of_itself(lengths), cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max_seqlen, cache=cache,
        )  # fmt: skip
        if more and not extended:
            raise _needs_extended(caller, "self_attn", "_sa_block")

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal, **more)

        x = src
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + self._ff_block(x))
        return x if restore is None else restore(x)

    def _evaluates_formula(self) -> bool:
        """Whether a call is the formula of the layer: original modules and methods, no hook, no dropout."""
        if self.training or "_sa_block" in self.__dict__ or "_ff_block" in self.__dict__:
            return False
        modules = self._modules
        for name, kind in _PARTS:
            module: Any = modules[name]
            if not runs_forward_of(module, kind):
                return False
            if kind is torch.nn.Dropout:
                if module.training:
                    return False
            elif kind is not MultiheadAttention and not (
                "weight" in module._parameters and "bias" in module._parameters
            ):
                return False
        return True

    def _fast(self, x: Tensor, src_mask: Tensor | None, padding: Tensor | None, is_causal: bool) -> Tensor | None:
        """The formula of the layer without calls of its modules; None if self_attn has no fast path for them."""
        modules: Any = self._modules

        def normalized(x: Tensor, name: str) -> Tensor:
            norm = modules[name]
            weights = norm._parameters
            return torch.layer_norm(x, norm.normalized_shape, weights["weight"], weights["bias"], norm.eps)

        def linear(x: Tensor, name: str) -> Tensor:
            weights = modules[name]._parameters
            return F.linear(x, weights["weight"], weights["bias"])

        given = normalized(x, "norm1") if self.norm_first else x
        found = modules["self_attn"]._fast(given, given, given, padding, False, src_mask, True, is_causal)
        if found is None:
            return None
        x = x + found[0]
        if self.norm_first:
            return x + linear(self.activation(linear(normalized(x, "norm2"), "linear1")), "linear2")
        x = normalized(x, "norm1")
        return normalized(x + linear(self.activation(linear(x, "linear1")), "linear2"), "norm2")

    def _padded(
        self, rows: Tensor, cu_seqlens: Tensor, longest: int, src_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """The layer on packed rows [N, E] by padding, for attention that supports only the inputs of torch's."""
        valid = torch.arange(longest, device=rows.device) < cu_seqlens.diff().unsqueeze(1)  # [S, T]
        padded = rows.new_zeros(*valid.shape, rows.shape[1])
        padded[valid] = rows
        padded = padded if self.self_attn.batch_first else padded.transpose(0, 1)
        output = self.forward(padded, src_mask, valid.logical_not(), is_causal)
        return (output if self.self_attn.batch_first else output.transpose(0, 1))[valid]

    # Methods of torch's layer, which subclasses may override. `more`: inputs of self_attn that torch does not have.

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False, **more: Any
    ) -> Tensor:
        return self.dropout1(_attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, more))


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Drop-in replacement for torch.nn.TransformerDecoderLayer: same constructor, parameters and state_dict.

    Args: as torch.nn.TransformerDecoderLayer, the same as of TransformerEncoderLayer.
    Inputs: tgt: [T, B, E], or [B, T, E] with batch_first, or [T, E]; memory: [S, B, E] in the corresponding form; or
        both nested [B, j, E]. tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal,
        memory_is_causal: as attn_mask, key_padding_mask and is_causal of seqkernels.nn.MultiheadAttention.
    Keyword-only inputs:
        lengths, memory_lengths: [B] number of steps of each sequence of tgt and memory.
        cu_seqlens, memory_cu_seqlens: [S + 1], start of each packed sequence; tgt and memory then have rows [N, E].
            max_seqlen, memory_max_seqlen: the maximum lengths.
        cache: two KeyValueCaches from `new_cache`, of self_attn and multihead_attn; tgt then has the next steps, causal
            if tgt_is_causal. The first call stores the projected memory in the second cache. Later calls ignore memory,
            which may be None, and memory_lengths. Inference only.
    Outputs: as tgt.
    Raises: as seqkernels.nn.MultiheadAttention.
    Deterministic: attention is; the projections and the linear layers are if torch's matrix products are.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html; Vaswani et al.,
        "Attention is all you need", arXiv 1706.03762.
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: Activation = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
            device, dtype,
        )  # fmt: skip
        _take_over(self.self_attn)
        _take_over(self.multihead_attn)

    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        memory_capacity: int,
        *,
        dtype: torch.dtype | None = None,
        page_size: int | None = None,
    ) -> tuple[KeyValueCache, KeyValueCache]:
        """Creates empty caches for `capacity` steps of tgt and `memory_capacity` steps of memory."""
        own: Any = self.self_attn
        of_memory: Any = self.multihead_attn
        return own.new_cache(batch_size, capacity, dtype=dtype, page_size=page_size), of_memory.new_cache(
            batch_size, memory_capacity, dtype=dtype, page_size=page_size
        )

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor | None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        memory_lengths: Tensor | Sequence[int] | None = None,
        cu_seqlens: Tensor | None = None,
        memory_cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        memory_max_seqlen: int | None = None,
        cache: tuple[KeyValueCache, KeyValueCache] | None = None,
    ) -> Tensor:
        caller = "TransformerDecoderLayer"
        if type(tgt) is not Tensor and isinstance(tgt, Proxy):
            arguments = dict(
                tgt=tgt, memory=memory, tgt_mask=tgt_mask, memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask, memory_key_padding_mask=memory_key_padding_mask,
                tgt_is_causal=tgt_is_causal, memory_is_causal=memory_is_causal, lengths=lengths,
                memory_lengths=memory_lengths, cu_seqlens=cu_seqlens, memory_cu_seqlens=memory_cu_seqlens,
                max_seqlen=max_seqlen, memory_max_seqlen=memory_max_seqlen, cache=cache,
            )  # fmt: skip
            return as_leaf(self, arguments)
        check_tensor(caller, "tgt", tgt)
        restore = None
        if tgt.is_nested:
            if cu_seqlens is not None or memory_cu_seqlens is not None or memory is None or not memory.is_nested:
                raise ValueError(f"{caller}: memory must be nested and cu_seqlens None if tgt is nested")
            tgt, cu_seqlens, max_seqlen, restore = of_nested(caller, "tgt", tgt)
            memory, memory_cu_seqlens, memory_max_seqlen, _ = of_nested(caller, "memory", memory)
        if (cu_seqlens is None) != (memory_cu_seqlens is None):
            raise ValueError(f"{caller}: cu_seqlens and memory_cu_seqlens must both be given, or neither")
        if memory is None and cache is None:
            raise ValueError(f"{caller}: memory must be given without cache")
        own, of_memory = (None, None) if cache is None else cache
        cached = of_memory is not None and of_memory.longest > 0
        if memory is None and not cached:
            raise ValueError(f"{caller}: memory must be given in the first call with cache")
        cross_lengths: Any = memory_lengths
        if cache is None and cu_seqlens is None and lengths is not None:
            cross_lengths = lengths, memory_lengths

        more = _given(
            lengths=lengths if cache is not None else _of_itself(lengths), cu_seqlens_q=cu_seqlens,
            max_seqlen_q=max_seqlen, cache=own,
        )  # fmt: skip
        more_of_memory = _given(
            lengths=None if cached else cross_lengths, cu_seqlens_q=cu_seqlens, cu_seqlens_k=memory_cu_seqlens,
            max_seqlen_q=max_seqlen, max_seqlen_k=memory_max_seqlen, cache=of_memory,
        )  # fmt: skip
        keys = None if cached else memory
        if more and not _is_extended(self.self_attn, self._sa_block, TransformerDecoderLayer._sa_block):
            raise _needs_extended(caller, "self_attn", "_sa_block")
        if more_of_memory and not _is_extended(
            self.multihead_attn, self._mha_block, TransformerDecoderLayer._mha_block
        ):
            raise _needs_extended(caller, "multihead_attn", "_mha_block")

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal, **more)

        def attend_to_memory(x: Tensor) -> Tensor:
            return self._mha_block(x, keys, memory_mask, memory_key_padding_mask, memory_is_causal, **more_of_memory)

        x = tgt
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + attend_to_memory(self.norm2(x))
            x = x + self._ff_block(self.norm3(x))
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + attend_to_memory(x))
            x = self.norm3(x + self._ff_block(x))
        return x if restore is None else restore(x)

    # Methods of torch's layer, which subclasses may override. `more`: inputs of attention that torch does not have.

    def _sa_block(
        self, x: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool = False, **more: Any
    ) -> Tensor:
        return self.dropout1(_attend(self.self_attn, x, x, attn_mask, key_padding_mask, is_causal, more))

    def _mha_block(
        self,
        x: Tensor,
        mem: Tensor | None,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool = False,
        **more: Any,
    ) -> Tensor:
        return self.dropout2(_attend(self.multihead_attn, x, mem, attn_mask, key_padding_mask, is_causal, more))


class PositionalEncoding(torch.nn.Module):
    """Adds sinusoidal positional encodings: sin(p / 10000^(2i / E)) in column 2i, cos in column 2i + 1, at position p.

    Args: d_model: E. dropout: probability, applied to the sum. max_len: positions must be in [0, max_len).
        batch_first: layout of the input.
    Inputs:
        x: [T, B, E], or [B, T, E] with batch_first, or [T, E].
        offsets: position of the first row of each sequence: an int, or int32 or int64 [B], for example the lengths of a
            KeyValueCache.
        cu_seqlens: int32 or int64 [S + 1], start of each packed sequence; x then has rows [N, E], offsets shape [S].
    Outputs: as x.
    Raises: ValueError, TypeError; IndexError if a tensor of offsets results in positions outside of [0, max_len).
    Deterministic: yes; computed in float64 and rounded once.
    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.5.
    """

    table: Tensor
    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        d_model: int,
        dropout: float = 0.0,
        max_len: int = 5000,
        batch_first: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("d_model", d_model), ("max_len", max_len)):
            if size < 1:
                raise ValueError(f"PositionalEncoding: {name} must be at least 1, got {size}")
        self.d_model = d_model
        self.max_len = max_len
        self.batch_first = batch_first
        self.dropout = torch.nn.Dropout(dropout)
        table = torch.empty(max_len, d_model, device=device, dtype=dtype or torch.get_default_dtype())
        self.register_buffer("table", table, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Computes the table of encodings, unless it is a meta tensor."""
        if self.table.is_meta:
            return
        at = torch.arange(self.max_len, dtype=torch.float64, device="cpu").unsqueeze(1)
        columns = torch.arange(0, self.d_model, 2, dtype=torch.float64, device="cpu")
        rate = torch.exp(columns * (-math.log(10000.0) / self.d_model))
        waves = torch.stack((torch.sin(at * rate), torch.cos(at * rate)), -1).flatten(1)[:, : self.d_model]
        with torch.no_grad():
            self.table.copy_(waves)
        self.table.seqkernels_computed = True  # type: ignore[attr-defined]

    # The table is not in the state_dict. to_empty, conversions and deferred initialisation replace it by a tensor
    # without the attribute seqkernels_computed, for which the table is computed again.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionalEncoding:
        super()._apply(fn, recurse)
        self._compute_where_new(self.table)
        return self

    def _compute_where_new(self, x: Tensor) -> None:
        if self.table.is_meta and not x.is_meta:
            self.table = torch.empty_like(self.table, device=x.device)
        if not hasattr(self.table, "seqkernels_computed"):
            self.reset_parameters()

    def forward(self, x: Tensor, offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None) -> Tensor:
        caller = "PositionalEncoding"
        if type(x) is not Tensor and isinstance(x, Proxy):
            return as_leaf(self, dict(x=x, offsets=offsets, cu_seqlens=cu_seqlens))
        check_tensor(caller, "x", x)
        if x.is_nested:
            if cu_seqlens is not None:
                raise ValueError(f"{caller}: cu_seqlens must be None if x is nested")
            rows, starts, _, restore = of_nested(caller, "x", x)
            return restore(self.forward(rows, offsets, starts))
        if not tracing():
            self._compute_where_new(x)
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            raise ValueError(f"{caller}: x must have 2 or 3 dimensions and {self.d_model} columns, got {list(x.shape)}")
        if isinstance(offsets, Tensor) and offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{caller}: offsets must be int32 or int64, got {offsets.dtype}")
        if cu_seqlens is not None:
            waves = self.table[self._of_rows(caller, x, offsets, cu_seqlens)]
        elif isinstance(offsets, Tensor):
            T, B = (x.shape[0], 1) if x.dim() == 2 else (x.shape[0], x.shape[1])
            if x.dim() == 3 and self.batch_first:
                B, T = T, B
            if offsets.shape != (B,):
                raise ValueError(f"{caller}: offsets must have shape [B] = [{B}], got {list(offsets.shape)}")
            steps = torch.arange(T, device=x.device)
            if x.dim() == 2:
                waves = self.table[steps + offsets]
            elif self.batch_first:
                waves = self.table[offsets.unsqueeze(1) + steps]
            else:
                waves = self.table[steps.unsqueeze(1) + offsets]
        else:
            T = x.shape[1] if self.batch_first and x.dim() == 3 else x.shape[0]
            if offsets < 0 or offsets + T > self.max_len:
                raise ValueError(
                    f"{caller}: positions must be in [0, max_len = {self.max_len}), got {offsets} to {offsets + T - 1}"
                )
            waves = self.table[offsets : offsets + T]
            if x.dim() == 3 and not self.batch_first:
                waves = waves.unsqueeze(1)
        return self.dropout(x + waves.to(x.dtype))

    def _of_rows(self, caller: str, x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor) -> Tensor:
        """[N] position of each row in its packed sequence."""
        if x.dim() != 2:
            raise ValueError(f"{caller}: x must have 2 dimensions with cu_seqlens, got {list(x.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{caller}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{caller}: cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
        S = cu_seqlens.shape[0] - 1
        row = torch.arange(x.shape[0], device=x.device)
        of = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
        at = row - cu_seqlens.long()[of]
        if not isinstance(offsets, Tensor):
            return at + offsets
        if offsets.shape != (S,):
            raise ValueError(f"{caller}: offsets must have shape [S] = [{S}], got {list(offsets.shape)}")
        return at + offsets[of]

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, batch_first={self.batch_first}"
