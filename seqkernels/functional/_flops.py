"""Floating-point operations of the ops, for torch.utils.flop_counter.FlopCounterMode.

As in torch, a multiply-add counts as two operations, only matrix products count, and lookups in tables count nothing.
Causality, windows and masks do not reduce the count; lengths and packed sequences do, except on meta and fake tensors.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _triton_ops
from ._autograd import NAMESPACE
from ._recurrent_extras import NO_EXTRAS, Extras
from ._recurrent_kinds import KINDS, PLAIN_CELLS, Kind

Formula = Callable[..., int]


# ---- recurrent layers and cells


def _products(weights: Sequence[Tensor | None]) -> int:
    """Operations of one row of input: each matrix is multiplied by one vector."""
    return sum(2 * w.numel() for w in weights if w is not None and w.dim() == 2)


def _values(lengths: Tensor) -> list[int] | None:
    """Values of a tensor, or None for meta and fake tensors, which have none."""
    return lengths.tolist() if type(lengths) is Tensor and not lengths.is_meta else None


def _rows(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> int:
    """Rows that a layer computes."""
    if batch_sizes is not None:
        return x.shape[0]
    known = None if lengths is None else _values(lengths)
    return x.shape[0] * x.shape[1] if known is None else sum(known)


def _sequences(x: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None) -> int:
    if batch_sizes is not None:
        known = _values(batch_sizes)
        return known[0] if known else 0
    known = None if lengths is None else _values(lengths)
    return x.shape[1] if known is None else sum(n > 0 for n in known)


def _layer(kind: Kind) -> Formula:
    states = len(kind.states)

    def forward(x: Tensor, *args: Any, out_val: Any = None) -> int:
        weights, batch_sizes, lengths = args[states : states + 3]
        return _rows(x, batch_sizes, lengths) * _products(weights)

    return forward


def _layer_backward(kind: Kind) -> Formula:
    states = len(kind.states)

    def backward(*args: Any, out_val: Any = None) -> int:
        x, *states0, weights, batch_sizes, lengths, bidirectional = args[1 + states : 6 + 2 * states]
        saved, (need_dx, need_dw) = args[7 + 2 * states], args[7 + 3 * states : 9 + 3 * states]
        rows, each = _rows(x, batch_sizes, lengths), len(weights) // (2 if bidirectional else 1)
        inputs = _products([weights[at] for at in range(0, len(weights), each)])
        every = _products(weights)
        steps = rows - (0 if states0[0] is not None else _sequences(x, batch_sizes, lengths))
        hidden = _products([weights[at + 1] for at in range(0, len(weights), each)])
        total = rows * (every - inputs - hidden) + steps * hidden  # dh: the first step has no predecessor without h0
        total += rows * inputs if need_dx else 0
        total += rows * every if need_dw else 0
        options, H = Extras(*args[9 + 3 * states : 9 + 3 * states + len(NO_EXTRAS)]), weights[1].shape[0]
        width = _C.recurrent_saved(kind.name, H // len(kind.gates), options.any_option)
        recomputed = width > 0 and saved.shape[-1] == 0  # memory_efficient
        return total + (rows * every if recomputed else 0)

    return backward


def _cell(kind: Kind) -> Formula:
    states = len(kind.states)

    def forward(x: Tensor, *args: Any, out_val: Any = None) -> int:
        return (x.shape[0] if x.dim() == 2 else 1) * _products(args[states : states + 2])

    return forward


def _cell_backward(kind: Kind) -> Formula:
    states = len(kind.states)

    def backward(*args: Any, out_val: Any = None) -> int:
        x, w_ih, w_hh = args[states], *args[1 + 2 * states : 3 + 2 * states]
        need_dx, need_states, need_dw = args[-3:]
        products = (need_dx + need_dw) * _products([w_ih]) + (need_states + need_dw) * _products([w_hh])
        return (x.shape[0] if x.dim() == 2 else 1) * products

    return backward


# ---- attention


def _pairs(q: Tensor, k: Tensor, inputs: Sequence[Any]) -> int:
    """Pairs of a query and a key, over all heads."""
    _, _, q_lengths, k_lengths, cu_q, cu_k = inputs
    B, H, Tq, Tk = *q.shape[:3], k.shape[2]
    if cu_q is not None:
        queries, keys = _values(cu_q.diff()), _values(cu_k.diff())
    else:
        queries = [Tq] * B if q_lengths is None else _values(q_lengths)
        keys = [Tk] * B if k_lengths is None else _values(k_lengths)
    if queries is None or keys is None:
        return B * H * Tq * Tk
    return H * sum(a * b for a, b in zip(queries, keys))


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None) -> int:
    return 2 * _pairs(q, k, args[:6]) * (q.shape[-1] + v.shape[-1])


def _attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *args: Any, out_val: Any = None
) -> int:
    """As torch's: the scores, computed again; the gradients of the weights and of v, q and k."""
    return 2 * _pairs(q, k, args[:6]) * (3 * q.shape[-1] + 2 * v.shape[-1])


def _weights(q: Tensor, k: Tensor, *args: Any, out_val: Any = None) -> int:
    """The weights are part of attention, whose products `_attention` counts."""
    return 0


def _weights_backward(dweights: Tensor, q: Tensor, k: Tensor, *args: Any, out_val: Any = None) -> int:
    """The scores, computed again; the gradients of q and k."""
    return 2 * _pairs(q, k, args[:6]) * 3 * q.shape[-1]


def _dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, k_lengths: Tensor | None, *_: Any, out_val: Any = None
) -> int:
    return _attention(q, k, v, mask, None, None, k_lengths, None, None)


def _decode(q: Tensor, keys: Tensor, values: Tensor, *args: Any, out_val: Any = None) -> int:
    _, _, table, mask, slopes, q_lengths, k_lengths = args[:7]
    if table is not None:  # pages; lengths are given
        keys = keys.new_empty(0).expand(q.shape[0], keys.shape[1], table.shape[1] * keys.shape[2], 0)
    pairs = _pairs(q, keys, (mask, slopes, q_lengths, k_lengths, None, None))
    return 2 * pairs * (q.shape[-1] + values.shape[-1])


def _multihead(q: Tensor, kv: Tensor | None, heads: int, batch_first: bool, *args: Any, out_val: Any = None) -> int:
    """4 products of D columns for each pair of a query and a key of a head: the scores and the output."""
    batch = 0 if batch_first else 1
    E = q.shape[2] // 3 if kv is None else q.shape[2]
    T, S = q.shape[1 - batch], (q if kv is None else kv).shape[1 - batch]
    return 4 * q.shape[batch] * T * S * E


def _multihead_backward(dout: Tensor, *args: Any, out_val: Any = None) -> int:
    return _multihead(*args) // 2 * 5


# ---- registration

FORMULAS: dict[str, Formula] = {
    "attention_forward": _attention,
    "attention_backward": _attention_backward,
    "attention_decode": _decode,
    "attention_dense": _dense_attention,
    "attention_weights": _weights,
    "attention_weights_backward": _weights_backward,
    "multihead_attention_forward": _multihead,
    "multihead_attention_backward": _multihead_backward,
}
for _kind in KINDS.values():
    FORMULAS |= {_kind.name: _layer(_kind), f"{_kind.name}_forward": _layer(_kind)}
    FORMULAS[f"{_kind.name}_backward"] = _layer_backward(_kind)
for _name in PLAIN_CELLS:
    FORMULAS |= {f"{_name}_cell{end}": _cell(KINDS[_name]) for end in ("", "_forward")}
    FORMULAS[f"{_name}_cell_backward"] = _cell_backward(KINDS[_name])

_MODULE = "torch.utils.flop_counter"


def register(flop_counter: ModuleType) -> None:
    """Registers the formulas of all ops."""
    for name, formula in FORMULAS.items():
        for namespace in (NAMESPACE, _triton_ops.NAMESPACE):
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is not None and packet not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(packet, get_raw=True)(formula)


class _AfterImport(MetaPathFinder):
    """Registers the formulas when torch.utils.flop_counter is imported, and not before: it imports Triton."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        if name != _MODULE or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        assert module.__spec__ is not None
        module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        register(module)


def register_on_import() -> None:
    """Registers the formulas now if torch.utils.flop_counter is imported, otherwise when it is."""
    if _MODULE in sys.modules:
        register(sys.modules[_MODULE])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


register_on_import()
