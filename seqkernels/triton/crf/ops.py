"""Implementations of the ops seqkernels_triton::crf_forward, crf_backward and crf_viterbi."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .launch import Call, backward, forward, viterbi


def forward_op(*chain: Any) -> tuple[Tensor, Tensor, Tensor]:
    return forward(Call("crf_forward", *chain))


def backward_op(dlog_z: Tensor, dscore: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *chain, alpha = rest
    return backward(Call("crf_backward", *chain), dlog_z, dscore, alpha)


def viterbi_op(*rest: Any) -> tuple[Tensor, Tensor]:
    *chain, paths = rest
    return viterbi(Call("crf_viterbi", *chain), paths)
