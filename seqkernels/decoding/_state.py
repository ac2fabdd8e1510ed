"""Expansion and reordering of the states of step functions."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..functional._checks import describe


@dataclasses.dataclass(frozen=True)
class PerSentence:
    """In state_dims: the dimension of the sentences in a tensor that all hypotheses of a sentence share.

    The tensor is neither expanded nor reordered; with drop_ended, the rows of ended sentences are removed.
    """

    dim: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.dim, int):
            raise TypeError(f"PerSentence: dim must be an int, got {self.dim!r}")


CONSTANT = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
OfLeaf = Callable[[Any, "int | PerSentence", str], Any]


def reorder(
    caller: str, state: Any, dims: Any, index: Tensor, rows: int, sentences: Tensor | None = None, count: int = 0
) -> Any:
    """The state with row index[i] in place of row i, and sentence sentences[i] in place of sentence i.

    rows, count: the numbers of rows and of sentences that it must have.
    """

    def of_leaf(leaf: Any, dim: int | PerSentence, at: str) -> Any:
        shared = isinstance(dim, PerSentence)
        by = sentences if shared else index
        if by is None:
            return leaf
        if not isinstance(leaf, Tensor):
            leaf.reorder(by)
            return leaf
        return leaf.index_select(_checked(caller, leaf, dim, at, count if shared else rows), by)

    return _map(caller, of_leaf, state, dims)


def check(caller: str, state: Any, dims: Any, rows: int) -> None:
    def of_leaf(leaf: Any, dim: int | PerSentence, at: str) -> Any:
        if isinstance(leaf, Tensor):
            _checked(caller, leaf, dim, at, rows)
        return leaf

    _map(caller, of_leaf, state, dims)


def first_tensor(caller: str, state: Any, dims: Any) -> tuple[Tensor, int] | None:
    """The first tensor of the state with a dimension of rows, and their number."""
    found: list[tuple[Tensor, int]] = []

    def of_leaf(leaf: Any, dim: int | PerSentence, at: str) -> Any:
        d = dim.dim if isinstance(dim, PerSentence) else dim
        if isinstance(leaf, Tensor) and -leaf.dim() <= d < leaf.dim():
            found.append((leaf, leaf.shape[d]))
        return leaf

    _map(caller, of_leaf, state, dims)
    return found[0] if found else None


def _checked(caller: str, leaf: Tensor, dim: int | PerSentence, at: str, rows: int) -> int:
    """The dimension, if the tensor has that number of rows in it."""
    d = dim.dim if isinstance(dim, PerSentence) else dim
    if not -leaf.dim() <= d < leaf.dim() or leaf.shape[d] != rows:
        raise ValueError(
            f"{caller}: {at} must have {rows} rows in dimension {d}, got {list(leaf.shape)}; state_dims gives the "
            "dimension, or None for a tensor without rows of hypotheses"
        )
    return d


def _map(caller: str, of_leaf: OfLeaf, node: Any, dims: Any, at: str = "state") -> Any:
    """The state with of_leaf(leaf, dim, name) in place of each leaf whose dim is not None.

    Leaves are tensors, and objects with reorder(index): for index [N], it replaces row i by row index[i] in place,
    after which the object has N rows, as seqkernels.nn.KeyValueCache.

    dims: a nest whose leaves are int, PerSentence or None, each for the whole of the state at its place.
    """
    if dims is None:
        return node
    if isinstance(dims, bool):
        raise TypeError(f"{caller}: state_dims must hold int, PerSentence and None, got {dims}")
    is_leaf = isinstance(node, Tensor) or callable(getattr(node, "reorder", None))
    if is_leaf and isinstance(dims, (int, PerSentence)):
        return of_leaf(node, dims, at)
    parts = None if is_leaf else _parts(node)
    if parts is None:
        if isinstance(node, CONSTANT) and isinstance(dims, (int, PerSentence)):
            return node
        if isinstance(dims, (int, PerSentence)):
            raise TypeError(
                f"{caller}: {at} must be a tensor, a constant, an object with reorder(index) or a nest of these, got "
                f"{describe(node)}; state_dims of None passes an object on unchanged"
            )
        raise ValueError(f"{caller}: state_dims must match {at}, {describe(node)}, got {describe(dims)}")
    children, rebuild = parts
    if isinstance(dims, (int, PerSentence)):
        of_children: dict[str, Any] = dict.fromkeys(children, dims)
    else:
        of_children = (_parts(dims) or ({}, None))[0]
        if of_children.keys() != children.keys():
            raise ValueError(f"{caller}: state_dims must match {at}, {describe(node)}, got {describe(dims)}")
    return rebuild(_map(caller, of_leaf, child, of_children[key], at + key) for key, child in children.items())


def _parts(node: Any) -> tuple[dict[str, Any], Callable[[Iterator[Any]], Any]] | None:
    """The children of a container by their names, and its constructor; None for other objects."""
    kind = type(node)
    if kind is tuple or kind is list:
        return {f"[{i}]": child for i, child in enumerate(node)}, kind
    if kind is dict:
        return {f"[{key!r}]": child for key, child in node.items()}, lambda values: dict(zip(node, values))
    children, spec = tree_flatten(node, is_leaf=lambda child: child is not node)
    if not (len(children) == 1 and children[0] is node):
        keys = list(node) if isinstance(node, dict) and len(node) == len(children) else list(range(len(children)))
        return {f"[{key!r}]": child for key, child in zip(keys, children)}, lambda values: tree_unflatten(values, spec)
    if not dataclasses.is_dataclass(node) or isinstance(node, type):
        return None
    names = [field.name for field in dataclasses.fields(node)]

    def rebuild(values: Iterator[Any]) -> Any:
        new = copy.copy(node)
        for name, value in zip(names, values):
            object.__setattr__(new, name, value)  # also for frozen classes
        return new

    return {f".{name}": getattr(node, name) for name in names}, rebuild
