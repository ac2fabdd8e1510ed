"""Recurrent kinds: properties of the cells, and the mapping of options to kinds.

A kind is one cell, one set of ops and one name in seqkernels.explain. A family is a public layer (a function and a
module), whose options select the kind. The name of a family is the kind of its default options.

Dimensions: D input, H hidden, P size of h (the projection size, or H), G gates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .. import _C
from ._autograd import op
from ._recurrent_options import Options


class Weight(NamedTuple):
    """A weight of one layer and direction."""

    name: str
    shape: tuple[tuple[int, str], ...]  # ((4, "H"), (1, "D")) is [4H, D]
    start: float | None = None  # initial value; None: uniform, as in torch

    def sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple([count * sizes[letter] for count, letter in self.shape])

    def __str__(self) -> str:
        return f"[{', '.join(f'{count}{letter}' if count > 1 else letter for count, letter in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Kind:
    """A recurrent cell and the ops of its layers, of one or two directions."""

    name: str
    gates: str  # one letter each, in the order of the weights
    states: str  # one letter each, h first: "hc" has the initial states h0, c0 and the last states h_n, c_n
    cuda: bool  # whether it has CUDA kernels
    one_bias_gradient: bool  # whether the gradients of bias_ih and bias_hh are equal
    tables: Mapping[tuple[bool, ...], list[Weight]]
    infer: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def weights(self, bias: bool, projected: bool, peephole: bool, heads: bool) -> list[Weight]:
        """The weights of one layer and direction, in the order of the ops."""
        return self.tables[bias, projected, peephole, heads]

    @property
    def initial_states(self) -> tuple[str, ...]:
        """Names of the states in hx: h0, c0 and so on."""
        return tuple(f"{state}0" for state in self.states)

    def __reduce__(self) -> tuple[Any, ...]:
        return kind_named, (self.name,)  # copies and unpickled kinds are the objects of this module


def size_of_state(state: str) -> str:
    """Letter of the size of a state: h has P columns, all other states have H."""
    return "P" if state == "h" else "H"


def kind_named(name: str) -> Kind:
    return KINDS[name]


def _kind(cell: Mapping[str, Any]) -> Kind:
    """A kind from the properties of its cell in the kernels."""
    gates = len(cell["gates"])
    own: list[Weight] = []  # weights that layers of torch do not have
    if cell["joint_norm"]:
        own += [Weight("norm_weight", ((gates, "H"),), 1.0), Weight("norm_bias", ((gates, "H"),), 0.0)]
    elif cell["norm_groups"]:
        own += [Weight(name, ((gates, "H"),), 1.0) for name in ("gain_ih", "gain_hh")]
    if cell["norm_c"]:
        own += [Weight("gain_c", ((1, "H"),), 1.0), Weight("bias_c", ((1, "H"),), 0.0)]
    if inner := cell["inner_gates"]:
        own += [Weight(f"weight_inner_{of}", ((inner, "H"), (1, "H"))) for of in ("ih", "hh")]
        own += [Weight(f"bias_inner_{of}", ((inner, "H"),)) for of in ("ih", "hh")]
    tables = {
        with_: _weights(gates, cell["peepholes"], own, *with_) for with_ in itertools.product((False, True), repeat=4)
    }
    ops = (op(cell["name"] + suffix) for suffix in ("", "_forward", "_backward"))
    return Kind(cell["name"], cell["gates"], cell["states"], cell["cuda"], cell["one_bias_gradient"], tables, *ops)


def _weights(
    gates: int, peepholes: int, own: Sequence[Weight], bias: bool, projected: bool, peephole: bool, heads: bool
) -> list[Weight]:
    rows, H = (gates, "H"), (1, "H")
    columns_hh = (1, "P" if projected else "H/heads" if heads else "H")
    every = [
        (True, Weight("weight_ih", (rows, (1, "D")))),
        (True, Weight("weight_hh", (rows, columns_hh))),
        (bias, Weight("bias_ih", (rows,))),
        (bias, Weight("bias_hh", (rows,))),
        (projected, Weight("weight_hr", ((1, "P"), H))),
        (peephole, Weight("weight_ph", ((peepholes, "H"),))),
        *((bias or not w.name.startswith("bias_inner"), w) for w in own),
    ]
    return [w for present, w in every if present]


_CELLS = _C.recurrent_kinds()
KINDS = {cell["name"]: _kind(cell) for cell in _CELLS}
# Kinds with the ops <kind>_cell for one step without options.
PLAIN_CELLS = tuple(cell["name"] for cell in _CELLS if cell["step"])


# ---- families: public layers


@dataclass(frozen=True, eq=False)
class Family:
    """A public layer: one function and one module, and a kind for each combination of options."""

    name: str
    kind: str  # kind of the default options
    supported: tuple[str, ...]  # names of the options
    variants: tuple[tuple[str, Any, str], ...] = ()  # (option, value, kind selected by this value); the first match
    projections: tuple[bool, ...] = (False,)  # whether the layer works without, and with a projection
    plain: Options = field(default_factory=Options)  # default options

    def kind_of(self, options: Options, projected: bool = False) -> Kind:
        for name, value, kind in self.variants:
            if (projected if name == "proj_size" else getattr(options, name)) == value:
                return KINDS[kind]
        return KINDS[self.kind]

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.kind, *(kind for *_, kind in self.variants)


def _family(name: str, kind: str, supported: str, *variants: tuple[str, Any, str], **more: Any) -> Family:
    every = f"{supported} learn_initial_state return_all_states memory_efficient"
    return Family(name, kind, tuple(every.split()), variants, **more)


_DROPOUTS = "recurrent_dropout variational_dropout"
LSTM = _family(
    "lstm",
    "lstm",
    f"peephole coupled_gates layer_norm norm_eps forget_bias cell_clip gate_clip zoneout_h zoneout_c {_DROPOUTS} "
    "num_heads",
    ("layer_norm", True, "lstm_norm"),
    ("coupled_gates", True, "lstm_coupled"),
    projections=(False, True),
)
NESTED_LSTM = _family("nested_lstm", "nested_lstm", f"forget_bias zoneout_h {_DROPOUTS}")
GRU = _family(
    "gru",
    "gru",
    f"reset_after layer_norm norm_eps gate_clip zoneout_h {_DROPOUTS} num_heads",
    ("layer_norm", True, "gru_norm"),
    ("reset_after", False, "gru_before"),
    ("proj_size", True, "gru_projected"),
    projections=(False, True),
)
DREAMER_GRU = _family(
    "dreamer_gru",
    "dreamer_gru",
    f"norm_eps gate_clip zoneout_h {_DROPOUTS} num_heads",
    plain=Options(norm_eps=1e-3),
)
MGU = _family(
    "mgu",
    "mgu",
    f"reset_after gate_clip zoneout_h {_DROPOUTS} num_heads",
    ("reset_after", True, "mgu_after"),
    plain=Options(reset_after=False),
)
SLSTM = _family(
    "slstm",
    "slstm",
    f"forget_gate forget_bias zoneout_h {_DROPOUTS} num_heads",
    ("forget_gate", "exp", "slstm_exp"),
)
_RNN = "gate_clip zoneout_h variational_dropout num_heads"
RNN_TANH = _family("rnn_tanh", "rnn_tanh", _RNN)
RNN_RELU = _family("rnn_relu", "rnn_relu", _RNN)
FAMILIES = (LSTM, NESTED_LSTM, SLSTM, GRU, DREAMER_GRU, MGU, RNN_TANH, RNN_RELU)

# Public names that are not kinds -> the kind of their default options.
ALIASES = {"rnn": "rnn_tanh"}


def family_of(kind: Kind) -> Family:
    return next(family for family in FAMILIES if kind.name in family.kinds)
