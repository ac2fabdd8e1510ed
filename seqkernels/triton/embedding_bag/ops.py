"""Implementations of the ops seqkernels_triton::embedding_bag, embedding_bag_forward and embedding_bag_backward*."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .launch import Call, forward, interpreted, table_gradient, weights_gradient


def infer_op(weight: Tensor, *bags: Any) -> Tensor:
    return forward_op(weight, *bags)[0]


def forward_op(weight: Tensor, *bags: Any) -> tuple[Tensor, Tensor]:
    """Skips invalid indices and offsets.

    They raise on the CPU, and on a GPU if the environment variable SEQKERNELS_CHECKED is set, which synchronizes.
    """
    checked = interpreted() or "SEQKERNELS_CHECKED" in os.environ
    fault = None if checked else torch.empty(2, dtype=torch.int64, device=weight.device)
    return forward(weight, *bags, fault=fault)


def _call(indices: Tensor, offsets: Tensor | None, weights: Tensor | None, mode: int, *rest: Any) -> tuple[Call, bool]:
    """The bags, and the last argument, scale_grad_by_freq."""
    fields = len(Call._fields) - 4
    return Call(indices, offsets, weights, mode, *rest[:fields]), bool(rest[fields]) if len(rest) > fields else False


def backward_op(grad: Tensor, arg: Tensor, num_embeddings: int, *bags: Any) -> Tensor:
    call, by_frequency = _call(*bags)
    return table_gradient(grad, arg, num_embeddings, call, by_frequency, sparse=False)[0]


def backward_sparse_op(grad: Tensor, arg: Tensor, num_embeddings: int, *bags: Any) -> tuple[Tensor, Tensor]:
    call, by_frequency = _call(*bags)
    values, rows = table_gradient(grad, arg, num_embeddings, call, by_frequency, sparse=True)
    assert rows is not None
    return rows, values


def backward_weights_op(grad: Tensor, arg: Tensor, weight: Tensor, *bags: Any) -> Tensor:
    return weights_gradient(grad, arg, weight, _call(*bags)[0])
