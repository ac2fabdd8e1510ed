"""Attention of Hugging Face Transformers models. Importing this module registers attn_implementation="seqkernels".

    import seqkernels.integrations.transformers
    model = AutoModel.from_pretrained(name, attn_implementation="seqkernels")

It computes the results of "eager" with these differences: a query that attends to no key, such as padding, gives zeros;
dropout uses another generator; attention weights are returned only if the call sets output_attentions=True, because
Transformers reserves the setting in the config for "eager".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask
from transformers.utils import logging

from ..functional import scaled_dot_product_attention, varlen_attention
from ..functional._attention_ops import attend_eagerly
from ..functional._values import eager_on_cpu, may_read_values
from ..functional.attention import are_inputs_of_op

__all__ = ["attention_forward", "attention_mask"]

NAME = "seqkernels"
_logger = logging.get_logger(__name__)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """bool mask [B, 1, q_length, kv_length], or None if is_causal describes it.

    If the mask consists of causality and lengths, it stores them as attributes, so that the kernels skip masked blocks
    and do not read the steps of a static cache that are still empty.
    """
    mask: Tensor | None = sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, local_size, **kwargs
    )
    causal = mask_function is causal_mask_function
    offset = q_offset
    if isinstance(offset, Tensor) and offset.numel() == 1 and offset.device.type == "cpu" and may_read_values(offset):
        offset = int(offset)  # a static cache counts its steps in a tensor
    if (
        mask is None
        or not may_read_values(mask if attention_mask is None else attention_mask)
        or kwargs.get("use_vmap")
        or not (causal or mask_function is bidirectional_mask_function)
        or (causal and (not isinstance(offset, int) or kv_offset != 0 or offset + q_length > kv_length))
        or (causal and offset + q_length < kv_length and mask.device.type != "cpu")
    ):
        return mask
    keys = offset + q_length if causal else kv_length  # those that the mask does not exclude for all queries
    lengths = None
    if attention_mask is not None and keys == kv_length:
        if attention_mask.shape != (batch_size, kv_length) or kv_offset != 0:
            return mask
        lengths = attention_mask.sum(1)
        if not torch.equal(attention_mask.bool(), torch.arange(kv_length, device=mask.device) < lengths.unsqueeze(1)):
            lengths = None
    if lengths is not None or causal:
        parts = _Parts(causal, lengths, keys, attention_mask is None, _version(mask))
        mask.seqkernels_parts = parts  # type: ignore[attr-defined]
    return mask


class _Parts(NamedTuple):
    """What a mask consists of."""

    causal: bool  # aligned with the last of `keys`
    lengths: Tensor | None  # [B] of the keys
    keys: int  # the number of keys; later columns are False
    only: bool  # whether nothing else masks keys
    version: int


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: Any = None,
    max_length_k: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function in the interface of Transformers.

    Args:
        query: [B, Hq, Tq, D]. key: [B, Hk, Tk, D]. value: [B, Hk, Tk, Dv].
        attention_mask: [B, 1 | Hq, Tq, Tk], bool (True: attend) or added to the scores.
        position_bias: [1 | B, Hq, Tq, Tk], added to the scores.
        s_aux: [Hq] logits of attention sinks.
        cu_seq_lens_q, cu_seq_lens_k: [S + 1], as collators for flash attention provide them: the single row of the
            batch consists of packed sequences, and only causality and sliding_window mask keys.
    Returns:
        output [B, Tq, Hq, Dv]; weights [B, Hq, Tq, Tk] or None.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    T, S = query.shape[2], key.shape[2]
    parts = getattr(attention_mask, "seqkernels_parts", None)
    if attention_mask is not None and parts is not None:
        empty = parts.keys < S  # steps of a static cache, which have weights too
        stale = parts.version != _version(attention_mask) or attention_mask.shape[2:] != (T, S)
        if stale or (empty and kwargs.get("output_attentions")):
            parts = None
        elif empty:
            S = parts.keys
            key, value, attention_mask = key[:, :, :S], value[:, :, :S], attention_mask[..., :S]
            position_bias = None if position_bias is None else position_bias[..., :S]
            if parts.only and T == 1:  # which attends to all keys
                attention_mask = parts = None
    if (
        attention_mask is position_bias is s_aux is cu_seq_lens_q is None
        and not (dropout or softcap or kwargs.get("output_attentions"))
        and (T == 1 or T == S or not causal)
        and eager_on_cpu()
        and are_inputs_of_op(query, key, value, None, True)
    ):
        scale = 1 / math.sqrt(query.shape[3]) if scaling is None else float(scaling)
        out = attend_eagerly(query, key, value, None, None, scale, 1 if causal and T > 1 else 0)
        return out.transpose(1, 2).contiguous(), None
    if (
        cu_seq_lens_q is not None
        and cu_seq_lens_k is not None
        and query.shape[0] == 1
        and position_bias is None
        and (causal or sliding_window is None)
        and getattr(module.config, "attention_chunk_size", None) is None
    ):
        result = varlen_attention(
            query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), cu_seq_lens_q, cu_seq_lens_k,
            None if max_length_q is None else int(max_length_q), None if max_length_k is None else int(max_length_k),
            dropout_p=dropout, is_causal=causal, causal_alignment="lower_right" if causal else "upper_left",
            window=None if sliding_window is None else (sliding_window - 1, -1),
            scale=scaling, softcap=softcap or 0.0, enable_gqa=True, return_lse=s_aux is not None,
        )  # fmt: skip
        if s_aux is not None:
            out, lse = result
            result = out * _share(lse, s_aux.view(-1, 1)).transpose(0, 1).unsqueeze(-1).to(out.dtype)
        return result.unsqueeze(0), None

    aligned, lengths, mask = "upper_left", None, attention_mask
    if mask is None:
        # A single query has the last position. T > 1 queries have the first T positions; a static cache may be longer.
        causal = causal and T > 1
        if causal and S > T:
            key, value, S = key[:, :, :T], value[:, :, :T], T
            position_bias = None if position_bias is None else position_bias[..., :T]
    else:
        causal = False
        if parts is not None:
            causal, lengths = parts.causal, parts.lengths
            if lengths is not None and (not causal or T == S):
                mask = None
            else:  # the last query has the position of the last key
                aligned, lengths = "lower_right", None
        elif mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
    if position_bias is not None:
        bias = position_bias.to(query.dtype)
        if mask is None:
            mask = bias
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, bias, -math.inf)
        else:
            mask = mask + bias
    need_weights = bool(kwargs.get("output_attentions", False))
    result = scaled_dot_product_attention(
        query, key, value, mask, dropout, causal, scaling, True, lengths=lengths, causal_alignment=aligned,
        softcap=softcap or 0.0, return_lse=s_aux is not None, return_weights=need_weights,
    )  # fmt: skip
    out, *more = result if isinstance(result, tuple) else (result,)
    weights = more[-1] if need_weights else None
    if s_aux is not None:
        share = _share(more[0], s_aux.view(1, -1, 1)).unsqueeze(-1)
        out = out * share.to(out.dtype)
        weights = None if weights is None else weights * share.to(weights.dtype)
    return out.transpose(1, 2).contiguous(), weights


def _version(mask: Tensor) -> int:
    """Version counter of the mask, which detects in-place changes; 0 in inference mode, which has no counter."""
    return 0 if mask.is_inference() else mask._version


def _share(lse: Tensor, sink: Tensor) -> Tensor:
    """Sum of the weights of the keys, given the logit of a sink."""
    return torch.sigmoid(lse - sink.to(lse.dtype))


def _supports_interface(model: type[PreTrainedModel]) -> bool:
    """Whether a model class computes attention through Transformers' attention interface, with its standard arguments.

    Other models take their mask from the registered mask function and add it to the scores, which a bool mask does not
    support, or select their modules by the name of the implementation, or pass arguments that change the result.
    """
    declared = model._supports_attention_backend or model._supports_sdpa
    return bool(declared and model._can_set_attn_implementation())


_get_correct_attn_implementation = PreTrainedModel.get_correct_attn_implementation


@functools.wraps(_get_correct_attn_implementation)
def get_correct_attn_implementation(
    self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
) -> str:
    """Falls back to "eager", with a warning, for models without the attention interface."""
    if requested_attention == NAME and not _supports_interface(type(self)):
        _logger.warning_once(
            f"{type(self).__name__} does not support Transformers' attention interface: it runs its own attention, as "
            f'with attn_implementation="eager", instead of {NAME}.'
        )
        requested_attention = "eager"
    implementation: str = _get_correct_attn_implementation(self, requested_attention, *args, **kwargs)
    return implementation


PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
