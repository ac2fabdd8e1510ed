"""Layers of a transformer in place of torch.nn's, on seqkernels' attention, and sinusoidal positions.

They have the constructors, parameters and state_dict of torch.nn's and stand in torch.nn.TransformerEncoder and
TransformerDecoder as well. There is one way through them, in training and in evaluation, with and without gradients.

Dimensions: B batch, T steps, S steps of memory, E d_model, N rows of all sequences one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqkernels.nn.attention import KeyValueCache, MultiheadAttention, of_nested

__all__ = ["PositionalEncoding", "TransformerDecoderLayer", "TransformerEncoderLayer"]

Activation = str | Callable[[Tensor], Tensor]


def _take_over(attention: torch.nn.MultiheadAttention) -> None:
    """What torch's constructor made, parameters and all, becomes seqkernels'."""
    attention.__class__ = MultiheadAttention


def _of_itself(lengths: Any) -> Any:
    """Lengths of queries and keys."""
    return None if lengths is None else (lengths, lengths)


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """Takes the place of torch.nn.TransformerEncoderLayer: same constructor, parameters, initial values, state_dict.

    Args: as torch.nn.TransformerEncoderLayer: d_model, nhead, dim_feedforward=2048, dropout=0.1, activation=relu (relu,
        gelu or a function), layer_norm_eps=1e-5, batch_first=False, norm_first=False, bias=True, device=None,
        dtype=None.
    Inputs: src: [T, B, E], or [B, T, E] with batch_first, or [T, E], or nested [B, j, E]; src_mask,
        src_key_padding_mask, is_causal: as attn_mask, key_padding_mask and is_causal of
        seqkernels.nn.MultiheadAttention.
    By keyword:
        lengths: [B] how many steps each sequence has; what is behind attends to nothing and is not attended to.
        cu_seqlens: [S + 1] where each sequence begins: src is then rows [N, E]. max_seqlen: the longest one's length.
        cache: a KeyValueCache of self_attn (`new_cache` makes one): src are the next steps. Inference only.
    Outputs: as src.
    Raises: as seqkernels.nn.MultiheadAttention.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerEncoderLayer.html; Vaswani et al.,
        "Attention is all you need", arXiv 1706.03762; norm_first: Xiong et al., arXiv 2002.04745.
    """

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

    def new_cache(self, batch_size: int, capacity: int, *, dtype: torch.dtype | None = None) -> KeyValueCache:
        """An empty cache for `capacity` steps."""
        return self.self_attn.new_cache(batch_size, capacity, dtype=dtype)  # type: ignore[operator]

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
        restore = None
        if src.is_nested:
            if cu_seqlens is not None:
                raise ValueError("TransformerEncoderLayer: cu_seqlens must be None where src is nested")
            src, cu_seqlens, max_seqlen, restore = of_nested("TransformerEncoderLayer", "src", src)

        def attend(x: Tensor) -> Tensor:
            out = self.self_attn(
                x, x, x, src_key_padding_mask, False, src_mask, is_causal=is_causal,
                lengths=lengths if cache is not None else _of_itself(lengths), cu_seqlens_q=cu_seqlens,
                max_seqlen_q=max_seqlen, cache=cache,
            )[0]  # fmt: skip
            return self.dropout1(out)

        x = src
        if self.norm_first:
            x = x + attend(self.norm1(x))
            x = x + self._ff_block(self.norm2(x))
        else:
            x = self.norm1(x + attend(x))
            x = self.norm2(x + self._ff_block(x))
        return x if restore is None else restore(x)


class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """Takes the place of torch.nn.TransformerDecoderLayer: same constructor, parameters, initial values, state_dict.

    Args: as torch.nn.TransformerDecoderLayer, which are those of TransformerEncoderLayer.
    Inputs: tgt: [T, B, E] and so on; memory: [S, B, E] and so on; both nested [B, j, E], or neither; tgt_mask,
        memory_mask, tgt_key_padding_mask, memory_key_padding_mask, tgt_is_causal, memory_is_causal: as attn_mask,
        key_padding_mask and is_causal of seqkernels.nn.MultiheadAttention.
    By keyword:
        lengths, memory_lengths: [B] how many steps each sequence has, of tgt and of memory.
        cu_seqlens, memory_cu_seqlens: [S + 1] where each sequence begins: tgt and memory are then rows [N, E].
            max_seqlen, memory_max_seqlen: the longest one's length.
        cache: two KeyValueCaches (`new_cache` makes them), of self_attn and of multihead_attn: tgt are the next steps,
            causal if tgt_is_causal. The second takes memory in at the first call, and memory (which may be None) and
            memory_lengths are not looked at again. Inference only.
    Outputs: as tgt.
    Raises: as seqkernels.nn.MultiheadAttention.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.TransformerDecoderLayer.html; Vaswani et al.,
        "Attention is all you need", arXiv 1706.03762.
    """

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
        self, batch_size: int, capacity: int, memory_capacity: int, *, dtype: torch.dtype | None = None
    ) -> tuple[KeyValueCache, KeyValueCache]:
        """Empty caches for `capacity` steps of tgt and `memory_capacity` of memory."""
        own: Any = self.self_attn
        of_memory: Any = self.multihead_attn
        return own.new_cache(batch_size, capacity, dtype=dtype), of_memory.new_cache(
            batch_size, memory_capacity, dtype=dtype
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
        who = "TransformerDecoderLayer"
        restore = None
        if tgt.is_nested:
            if cu_seqlens is not None or memory_cu_seqlens is not None or memory is None or not memory.is_nested:
                raise ValueError(f"{who}: memory must be nested and cu_seqlens None where tgt is nested")
            tgt, cu_seqlens, max_seqlen, restore = of_nested(who, "tgt", tgt)
            memory, memory_cu_seqlens, memory_max_seqlen, _ = of_nested(who, "memory", memory)
        if (cu_seqlens is None) != (memory_cu_seqlens is None):
            raise ValueError(f"{who}: cu_seqlens and memory_cu_seqlens must both be given, or neither")
        if memory is None and cache is None:
            raise ValueError(f"{who}: memory must be given without cache")
        own, of_memory = (None, None) if cache is None else cache
        known = of_memory is not None and of_memory.longest > 0
        if memory is None and not known:
            raise ValueError(f"{who}: memory must be given where the cache holds none yet")
        seen: Any = memory_lengths  # by the rows of tgt that exist
        if cache is None and cu_seqlens is None and lengths is not None:
            seen = lengths, memory_lengths

        def attend(x: Tensor) -> Tensor:
            out = self.self_attn(
                x, x, x, tgt_key_padding_mask, False, tgt_mask, is_causal=tgt_is_causal,
                lengths=lengths if cache is not None else _of_itself(lengths), cu_seqlens_q=cu_seqlens,
                max_seqlen_q=max_seqlen, cache=own,
            )[0]  # fmt: skip
            return self.dropout1(out)

        def attend_to_memory(x: Tensor) -> Tensor:
            keys = None if known else memory
            out = self.multihead_attn(
                x, keys, keys, memory_key_padding_mask, False, memory_mask, is_causal=memory_is_causal,
                lengths=None if known else seen, cu_seqlens_q=cu_seqlens, cu_seqlens_k=memory_cu_seqlens,
                max_seqlen_q=max_seqlen, max_seqlen_k=memory_max_seqlen, cache=of_memory,
            )[0]  # fmt: skip
            return self.dropout2(out)

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


class PositionalEncoding(torch.nn.Module):
    """Adds to a row at position p: sin(p / 10000^(2i / E)) in column 2i, cos of the same in column 2i + 1.

    Args: d_model: E. dropout: of the sum. max_len: positions are in [0, max_len). batch_first: of inputs.
    Inputs:
        x: [T, B, E], or [B, T, E] with batch_first, or [T, E].
        offsets: the position of the first row: an int, or int32 or int64 [B], one for each sequence; a KeyValueCache's
            lengths, say.
        cu_seqlens: int32 or int64 [S + 1], where each sequence begins: x is then rows [N, E]; offsets [S].
    Outputs: as x.
    Raises: ValueError, TypeError; IndexError where offsets in a tensor lead out of [0, max_len).
    Deterministic: yes; computed in float64 and rounded once.
    Source: Vaswani et al., "Attention is all you need", arXiv 1706.03762, section 3.5.
    """

    table: Tensor

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
        at = torch.arange(max_len, dtype=torch.float64).unsqueeze(1)
        rate = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
        waves = torch.stack((torch.sin(at * rate), torch.cos(at * rate)), -1).flatten(1)[:, :d_model]
        table = waves.to(device=device, dtype=dtype or torch.get_default_dtype()).contiguous()
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: Tensor, offsets: int | Tensor = 0, cu_seqlens: Tensor | None = None) -> Tensor:
        who = "PositionalEncoding"
        if x.dim() not in (2, 3) or x.shape[-1] != self.d_model:
            raise ValueError(f"{who}: x must have 2 or 3 dimensions and {self.d_model} columns, got {list(x.shape)}")
        if isinstance(offsets, Tensor) and offsets.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{who}: offsets must be int32 or int64, got {offsets.dtype}")
        if cu_seqlens is not None:
            waves = self.table[self._of_rows(who, x, offsets, cu_seqlens)]
        elif isinstance(offsets, Tensor):
            T, B = (x.shape[0], 1) if x.dim() == 2 else (x.shape[0], x.shape[1])
            if x.dim() == 3 and self.batch_first:
                B, T = T, B
            if offsets.shape != (B,):
                raise ValueError(f"{who}: offsets must have shape [B] = [{B}], got {list(offsets.shape)}")
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
                    f"{who}: positions must be in [0, max_len = {self.max_len}), got {offsets} to {offsets + T - 1}"
                )
            waves = self.table[offsets : offsets + T]
            if x.dim() == 3 and not self.batch_first:
                waves = waves.unsqueeze(1)
        return self.dropout(x + waves.to(x.dtype))

    def _of_rows(self, who: str, x: Tensor, offsets: int | Tensor, cu_seqlens: Tensor) -> Tensor:
        """[N] the position of each row in its sequence."""
        if x.dim() != 2:
            raise ValueError(f"{who}: x must have 2 dimensions with cu_seqlens, got {list(x.shape)}")
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{who}: cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"{who}: cu_seqlens must have shape [S + 1], got {list(cu_seqlens.shape)}")
        S = cu_seqlens.shape[0] - 1
        row = torch.arange(x.shape[0], device=x.device)
        of = torch.searchsorted(cu_seqlens.long(), row, right=True) - 1
        at = row - cu_seqlens.long()[of]
        if not isinstance(offsets, Tensor):
            return at + offsets
        if offsets.shape != (S,):
            raise ValueError(f"{who}: offsets must have shape [S] = [{S}], got {list(offsets.shape)}")
        return at + offsets[of]

    def extra_repr(self) -> str:
        return f"{self.d_model}, max_len={self.max_len}, batch_first={self.batch_first}"
