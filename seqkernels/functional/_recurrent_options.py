"""The options that recurrent layers have beyond torch's: values, descriptions, checks.

Which layer takes which option, and which kind an option chooses: _recurrent_kinds.py.

Dimensions: D input, H hidden, P fed-back size (the projection size, or H), L layers.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import textwrap
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a layer; the defaults are those of torch's layers."""

    peephole: bool = False
    coupled_gates: bool = False
    layer_norm: bool = False
    norm_eps: float = 1e-5
    reset_after: bool = True
    forget_gate: str = "sigmoid"
    forget_bias: float | None = None
    cell_clip: float | None = None
    gate_clip: float | None = None
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    recurrent_dropout: float = 0.0
    variational_dropout: float = 0.0
    num_heads: int = 1
    learn_initial_state: bool = False
    return_all_states: bool = False
    memory_efficient: bool = False
    asked: frozenset[str] = dataclasses.field(
        init=False, repr=False, compare=False
    )  # names of those that differ from the defaults
    plain: bool = dataclasses.field(init=False, repr=False, compare=False)  # the ops need no argument for them

    def __post_init__(self) -> None:
        asked = frozenset(name for name, neutral in _NEUTRAL.items() if getattr(self, name) != neutral)
        object.__setattr__(self, "asked", asked)
        object.__setattr__(self, "plain", asked <= _IN_WEIGHTS)


_NEUTRAL = {field.name: field.default for field in dataclasses.fields(Options) if field.init}
_IN_WEIGHTS = {"coupled_gates", "layer_norm", "reset_after", "forget_gate", "forget_bias", "learn_initial_state"}
OF_MODULES = ("forget_bias", "learn_initial_state")  # functions do not take them
OF_SEQUENCES = ("variational_dropout", "learn_initial_state", "return_all_states", "memory_efficient")  # not of cells
_RATES = ("zoneout_h", "zoneout_c", "recurrent_dropout", "variational_dropout")
_CLIPS = ("cell_clip", "gate_clip")

ABOUT = {
    "peephole": "the gates also see the cell: i and f the old one, o the new one. Weight: weight_ph [3H] of i, f, o "
    '([2H] of i, o with coupled_gates). Source: Gers and Schmidhuber, "Recurrent nets that time and count", 2000.',
    "coupled_gates": "the forget gate is 1 - i (CIFG): three gates i, g, o instead of four. Source: Greff et al., "
    '"LSTM: A Search Space Odyssey", arXiv 1503.04069.',
    "layer_norm": "both products are normalised over the hidden units, and an LSTM's cell where it makes h. Weights: "
    "gain_ih and gain_hh, an LSTM's gain_c and bias_c; b_ih and b_hh are the shifts. Source: Ba, Kiros and Hinton, "
    '"Layer Normalization", arXiv 1607.06450.',
    "norm_eps": "what layer normalisation adds to the variance.",
    "reset_after": "the gate that resets h acts after the product with weight_hh, as in torch.nn.GRU, or before it. "
    "Source: Cho et al., arXiv 1406.1078 (before); Zhou et al., arXiv 1603.09420 (MGU, before).",
    "forget_gate": "sigmoid or exp: the activation of the forget gate.",
    "forget_bias": "after initialisation the forget gate's part of bias_ih is this, that of bias_hh zero. Source: "
    'Jozefowicz, Zaremba and Sutskever, "An Empirical Exploration of Recurrent Network Architectures", 2015.',
    "cell_clip": "the cell stays in [-cell_clip, cell_clip]. Source: Sak, Senior and Beaufays, arXiv 1402.1128.",
    "gate_clip": "what enters a gate or a candidate stays in [-gate_clip, gate_clip], as with `clip` of ONNX's LSTM.",
    "zoneout_h": "while training, the probability with which a unit of h keeps its old value; else the share "
    'of the old value in the new. Source: Krueger et al., "Zoneout", arXiv 1606.01305.',
    "zoneout_c": "the same for the cell; h is made of the cell before it.",
    "recurrent_dropout": "while training, the probability of zeroing an element of the candidate at a step. Source: "
    'Semeniuta, Severyn and Barth, "Recurrent Dropout without Memory Loss", arXiv 1603.05118.',
    "variational_dropout": "while training, the probability of zeroing an element of each layer's input and of h in "
    'the products, one draw for all steps of a sequence. Source: Gal and Ghahramani, "A Theoretically Grounded '
    'Application of Dropout in Recurrent Neural Networks", arXiv 1512.05287.',
    "num_heads": "the hidden units fall into so many equal groups, and weight_hh [.., H / num_heads] joins a unit to "
    'its own group only. Source: Poeppel, Beck and Hochreiter, "FlashRNN", arXiv 2412.07752.',
    "learn_initial_state": "parameters initial_h (initial_c, initial_s) [L * directions, P or H], zero at first, are "
    "the initial state where hx is absent.",
    "return_all_states": "a third output: for each layer a tuple of its states (h, c, s as it has them) at every step, "
    "each laid out like output. Gradient: yes.",
    "memory_efficient": "no gates are saved for backward, which computes them again: the same bits, later.",
}


def about(plain: Options, names: tuple[str, ...], indent: int = 8) -> str:
    """The options' part of a docstring, one line each."""
    return ("\n" + " " * indent).join(f"{name}={getattr(plain, name)}: {ABOUT[name]}" for name in names)


def wrapped(doc: str) -> str:
    """doc with lines of at most 120 columns; a continued line is indented by four more."""
    lines: list[str] = []
    for line in doc.splitlines():
        further = " " * (4 + len(line) - len(line.lstrip()))
        lines += textwrap.wrap(line, 120, subsequent_indent=further) or [""]
    return "\n".join(lines) + "\n    "


# ---- checks


def options_of(who: str, plain: Options, given: Mapping[str, Any]) -> Options:
    """`plain` with the given options, each checked on its own."""
    defaults = vars(plain)
    for name, value in given.items():
        default = defaults[name]
        if value is not default and (type(value) is not type(default) or value != default):
            break
    else:
        return plain
    for name, value in given.items():
        if name in _RATES:
            _check_number(who, name, value, "lie in [0, 1)", lambda v: 0 <= v < 1)
        elif name in _CLIPS and value is not None:
            _check_number(who, name, value, "be None or above 0", lambda v: v > 0)
        elif name == "forget_bias" and value is not None:
            _check_number(who, name, value, "be None or finite", math.isfinite)
        elif name == "norm_eps":
            _check_number(who, name, value, "be finite and at least 0", lambda v: 0 <= v < math.inf)
        elif name == "forget_gate":
            if value not in ("sigmoid", "exp"):
                raise ValueError(f"{who}: forget_gate must be sigmoid or exp, got {value!r}")
        elif name == "num_heads":
            _check_number(who, name, value, "be an integer above 0", lambda v: v > 0, numbers.Integral)
        elif isinstance(_NEUTRAL[name], bool) and not isinstance(value, bool):
            raise TypeError(f"{who}: {name} must be a bool, got {type(value).__name__}")
    if given.get("layer_norm") is False and given["norm_eps"] != plain.norm_eps:
        raise ValueError(f"{who}: norm_eps must be {plain.norm_eps} without layer_norm, got {given['norm_eps']}")
    return dataclasses.replace(plain, **given)


def _check_number(
    who: str, name: str, value: Any, wanted: str, holds: Callable[[Any], bool], type_: type = numbers.Real
) -> None:
    if not isinstance(value, type_) or isinstance(value, bool):
        raise TypeError(f"{who}: {name} must {wanted}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{who}: {name} must {wanted}, got {value}")


_EXCLUDES = {
    "layer_norm": ("peephole", "coupled_gates", "proj_size", "num_heads", "reset_after"),
    "proj_size": ("zoneout_h", "num_heads", "reset_after"),
    "forget_bias": ("bias", "coupled_gates"),
}
_SAID = {"num_heads": "num_heads > 1", "reset_after": "reset_after=False", "bias": "bias=False"}


def check_together(who: str, options: Options, hidden_size: int = 0, *, bias: bool = True, proj_size: int = 0) -> None:
    if not options.asked:
        return
    asked = {*options.asked, *["bias"] * (not bias), *["proj_size"] * (proj_size > 0)}
    for one, others in _EXCLUDES.items():
        for other in others:
            if one in asked and other in asked:
                raise ValueError(f"{who}: {one} excludes {_SAID.get(other, other)}, got both")
    if hidden_size % options.num_heads:
        raise ValueError(f"{who}: num_heads must divide hidden_size, {hidden_size}, got {options.num_heads}")
