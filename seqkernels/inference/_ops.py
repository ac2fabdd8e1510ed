"""Ops of prepared recurrent modules: precisions, packing, fake implementations.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P size of h (the projection size, or H), L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..functional._autograd import NAMESPACE, op, register_fake
from ..functional._recurrent_extras import new_size
from ..functional._recurrent_kinds import KINDS, Kind, size_of_state

# Names of the precisions of weights, with the dtype of the packed tensor.
PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
_NUMBER = {name: number for number, name in enumerate(PRECISIONS)}
_FIRST: dict[str, int] = {cell["name"]: cell["first"] for cell in _C.recurrent_kinds()}
_INNER: dict[str, int] = {cell["name"]: cell["inner_gates"] for cell in _C.recurrent_kinds()}
TWO_BIASES: dict[str, bool] = {
    cell["name"]: not cell["one_bias_gradient"] or (cell["norm_groups"] > 0 and not cell["joint_norm"])
    for cell in _C.recurrent_kinds()
}


class Shape(NamedTuple):
    """Sizes and options of a prepared module, in the order of the ops."""

    precision: int
    hidden_size: int
    proj_size: int
    num_layers: int
    bidirectional: bool
    heads: int
    peephole: bool
    numbers: list[float]  # empty, or cell_clip, gate_clip, zoneout_h, zoneout_c, norm_eps

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


class Packing(NamedTuple):
    """How a weight is packed: its gates, those of the first stage of the cell, its heads, the precision."""

    gates: int
    first: int
    heads: int
    precision: int


def packing(kind: Kind, weight: str, heads: int, precision: str) -> Packing:
    """weight: its name without layer and direction."""
    number, gates = _NUMBER[precision], len(kind.gates)
    if weight == "weight_hr":
        return Packing(1, 1, 1, number)
    if weight.startswith("weight_inner"):
        return Packing(_INNER[kind.name], _INNER[kind.name], 1, number)
    return Packing(gates, _FIRST[kind.name], heads, number)


_pack, _unpack = op("recurrent_pack"), op("recurrent_unpack")


def pack(weight: Tensor, how: Packing) -> tuple[Tensor, Tensor]:
    """The packed form of a float32 weight [rows, columns], and the scales [rows] of int8."""
    result: tuple[Tensor, Tensor] = _pack(weight, *how)
    return result


def unpack(packed: Tensor, scales: Tensor, rows: int, columns: int, how: Packing) -> Tensor:
    """The weight [rows, columns] in float32 that a packed form stands for."""
    result: Tensor = _unpack(packed, scales, rows, columns, *how)
    return result


INFER: dict[str, Callable[..., Any]] = {name: op(f"{name}_prepared") for name in KINDS}
UPDATE: dict[str, Callable[..., Any]] = {name: op(f"{name}_prepared_") for name in KINDS}


def _register(kind: Kind) -> None:
    def outputs(x: Tensor, states: Sequence[Tensor], arguments: Sequence[Any], update: bool) -> Any:
        _, _, hidden, proj, layers, bidirectional, *_, batch_sizes, _, _ = arguments
        name = f"{kind.name}_prepared" + "_" * update
        if x.dim() not in (2, 3):
            raise RuntimeError(f"{name}: x must have 2 or 3 dimensions, got {list(x.shape)}")
        if x.dtype != torch.float32:
            raise RuntimeError(f"{name}: x must be float32, got {x.dtype}")
        step, directions = x.dim() == 2 and batch_sizes is None, 2 if bidirectional else 1
        sizes = {"P": proj or hidden, "H": hidden}
        y = x.new_empty(*x.shape[:-1], directions * sizes["P"])
        if update:
            return y
        if step:
            return [y, *(x.new_empty(x.shape[0], sizes[size_of_state(s)]) for s in kind.states)]
        B: Any
        if batch_sizes is None:
            B = x.shape[1]
        elif states:
            B = states[0].shape[1]
        else:
            B = new_size()
        return [y, *(x.new_empty(layers * directions, B, sizes[size_of_state(s)]) for s in kind.states)]

    def fake(x: Tensor, *arguments: Any) -> Any:
        count = len(kind.states)
        given = [s for s in arguments[:count] if s is not None]
        return outputs(x, given, arguments[count:], update=False)

    def fake_update(x: Tensor, states: Sequence[Tensor], *arguments: Any) -> Any:
        return outputs(x, states, arguments, update=True)

    register_fake(f"{NAMESPACE}::{kind.name}_prepared", fake)
    register_fake(f"{NAMESPACE}::{kind.name}_prepared_", fake_update)


for _kind in KINDS.values():
    _register(_kind)


def _fake_pack(weight: Tensor, gates: int, first: int, heads: int, precision: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    dtype = list(PRECISIONS.values())[precision]
    together = {torch.int8: 4, torch.bfloat16: 2}.get(dtype, 1)
    padded, H, size = -(-columns // together) * together, rows // gates // heads, 0
    for of_stage in (first, gates - first):
        if of_stage:
            units = 4 // of_stage
            panels = -(-H // (8 * units))
            size += panels * of_stage * units * 8 * (padded + (8 if dtype is torch.int8 else 0))
    return weight.new_empty(heads * size, dtype=dtype), weight.new_empty(rows if dtype is torch.int8 else 0)


register_fake(f"{NAMESPACE}::recurrent_pack", _fake_pack)
register_fake(
    f"{NAMESPACE}::recurrent_unpack",
    lambda packed, scales, rows, columns, *_: packed.new_empty(rows, columns, dtype=torch.float32),
)
