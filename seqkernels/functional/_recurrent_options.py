"""Options of recurrent layers that torch does not have: values, descriptions, checks.

_recurrent_kinds.py has the options of each layer and the kinds that they select.

Dimensions: D input, H hidden, P size of h (the projection size, or H), L layers.
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
    """Options of a layer; the defaults are the behaviour of torch's layers."""

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
    enabled: frozenset[str] = dataclasses.field(
        init=False, repr=False, compare=False
    )  # names of options that differ from the defaults
    plain: bool = dataclasses.field(
        init=False, repr=False, compare=False
    )  # whether the ops require no arguments for the options

    def __post_init__(self) -> None:
        enabled = frozenset(name for name, neutral in _NEUTRAL.items() if getattr(self, name) != neutral)
        object.__setattr__(self, "enabled", enabled)
        object.__setattr__(self, "plain", enabled <= _IN_WEIGHTS)


_NEUTRAL = {field.name: field.default for field in dataclasses.fields(Options) if field.init}
_IN_WEIGHTS = {"coupled_gates", "layer_norm", "reset_after", "forget_gate", "forget_bias", "learn_initial_state"}
OF_MODULES = ("forget_bias", "learn_initial_state")  # options of modules only
OF_SEQUENCES = (
    "variational_dropout",
    "learn_initial_state",
    "return_all_states",
    "memory_efficient",
)  # options of layers only
_RATES = ("zoneout_h", "zoneout_c", "recurrent_dropout", "variational_dropout")
_CLIPS = ("cell_clip", "gate_clip")

ABOUT = {
    "peephole": "the gates also depend on the cell: i and f on c, o on the new c. Weight: weight_ph [3H] of i, f, o "
    '([2H] of i, o with coupled_gates). Source: Gers and Schmidhuber, "Recurrent nets that time and count", 2000.',
    "coupled_gates": "the forget gate is 1 - i (CIFG): three gates i, g, o instead of four. Source: Greff et al., "
    '"LSTM: A Search Space Odyssey", arXiv 1503.04069.',
    "layer_norm": "normalises the input and the recurrent projection over the hidden units, and in an LSTM also c in "
    "the computation of h. Weights: gain_ih and gain_hh, in an LSTM also gain_c and bias_c; the biases are those of "
    "the normalised projections. Source: Ba, Kiros and Hinton, "
    '"Layer Normalization", arXiv 1607.06450.',
    "norm_eps": "term added to the variance in layer normalisation.",
    "reset_after": "whether the reset gate multiplies the product with weight_hh, as in torch.nn.GRU, or h before it. "
    "Source: Cho et al., arXiv 1406.1078 (before); Zhou et al., arXiv 1603.09420 (MGU, before).",
    "forget_gate": "activation of the forget gate, sigmoid or exp.",
    "forget_bias": "initial value of bias_ih of the forget gate; that of bias_hh is zero. Source: "
    'Jozefowicz, Zaremba and Sutskever, "An Empirical Exploration of Recurrent Network Architectures", 2015.',
    "cell_clip": "clips c to [-cell_clip, cell_clip]. Source: Sak, Senior and Beaufays, arXiv 1402.1128.",
    "gate_clip": "clips the pre-activations to [-gate_clip, gate_clip], as `clip` of ONNX's LSTM.",
    "zoneout_h": "in training, the probability that a unit of h keeps its previous value; in evaluation, the weight "
    'of the previous value. Source: Krueger et al., "Zoneout", arXiv 1606.01305.',
    "zoneout_c": "the same for c; h is computed from c before zoneout.",
    "recurrent_dropout": "in training, the probability of zeroing an element of the candidate at a step. Source: "
    'Semeniuta, Severyn and Barth, "Recurrent Dropout without Memory Loss", arXiv 1603.05118.',
    "variational_dropout": "in training, the probability of zeroing an element of the input of each layer and of h in "
    'the projections, with one mask for all steps of a sequence. Source: Gal and Ghahramani, "A Theoretically Grounded '
    'Application of Dropout in Recurrent Neural Networks", arXiv 1512.05287.',
    "num_heads": "number of equal groups of hidden units; weight_hh [.., H / num_heads] is block-diagonal: the "
    "pre-activations of a unit depend on the h of its own group (the normalisation of DreamerGRU covers all groups). "
    'Source: Poeppel, Beck and Hochreiter, "FlashRNN", arXiv 2412.07752.',
    "learn_initial_state": "adds parameters initial_h and initial_<state> for each other state, [L * directions, P or "
    "H], initially zero, which are the initial state if hx is None.",
    "return_all_states": "adds a third output: for each layer a tuple of its states, h first, at all steps, each in "
    "the layout of output. Gradient: yes.",
    "memory_efficient": "recomputes the gates in backward instead of saving them: the same bits, less memory, slower.",
}


def about(plain: Options, names: tuple[str, ...], indent: int = 8) -> str:
    """The lines of a docstring that describe the options."""
    return ("\n" + " " * indent).join(f"{name}={getattr(plain, name)}: {ABOUT[name]}" for name in names)


def wrapped(doc: str) -> str:
    """Wraps a docstring at 120 columns, with four columns more for continued lines."""
    lines: list[str] = []
    for line in doc.splitlines():
        further = " " * (4 + len(line) - len(line.lstrip()))
        lines += textwrap.wrap(line, 120, subsequent_indent=further) or [""]
    return "\n".join(lines) + "\n    "


# ---- checks


def options_of(caller: str, plain: Options, given: Mapping[str, Any]) -> Options:
    """`plain` with the given options, after a check of each value."""
    defaults = vars(plain)
    for name, value in given.items():
        default = defaults[name]
        if value is not default and (type(value) is not type(default) or value != default):
            break
    else:
        return plain
    for name, value in given.items():
        if name in _RATES:
            _check_number(caller, name, value, "lie in [0, 1)", lambda v: 0 <= v < 1)
        elif name in _CLIPS and value is not None:
            _check_number(caller, name, value, "be None or above 0", lambda v: v > 0)
        elif name == "forget_bias" and value is not None:
            _check_number(caller, name, value, "be None or finite", math.isfinite)
        elif name == "norm_eps":
            _check_number(caller, name, value, "be finite and at least 0", lambda v: 0 <= v < math.inf)
        elif name == "forget_gate":
            if value not in ("sigmoid", "exp"):
                raise ValueError(f"{caller}: forget_gate must be sigmoid or exp, got {value!r}")
        elif name == "num_heads":
            _check_number(caller, name, value, "be an integer above 0", lambda v: v > 0, numbers.Integral)
        elif isinstance(_NEUTRAL[name], bool) and not isinstance(value, bool):
            raise TypeError(f"{caller}: {name} must be a bool, got {type(value).__name__}")
    if given.get("layer_norm") is False and given["norm_eps"] != plain.norm_eps:
        raise ValueError(f"{caller}: norm_eps must be {plain.norm_eps} without layer_norm, got {given['norm_eps']}")
    return dataclasses.replace(plain, **given)


def _check_number(
    caller: str, name: str, value: Any, wanted: str, holds: Callable[[Any], bool], type_: type = numbers.Real
) -> None:
    if not isinstance(value, type_) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must {wanted}, got {value!r}")
    if not holds(value):
        raise ValueError(f"{caller}: {name} must {wanted}, got {value}")


_EXCLUDES = {
    "layer_norm": ("peephole", "coupled_gates", "proj_size", "num_heads", "reset_after"),
    "proj_size": ("zoneout_h", "num_heads", "reset_after"),
    "forget_bias": ("bias", "coupled_gates"),
}
_SHOWN = {"num_heads": "num_heads > 1", "reset_after": "reset_after=False", "bias": "bias=False"}


def check_together(
    caller: str, options: Options, hidden_size: int = 0, *, bias: bool = True, proj_size: int = 0
) -> None:
    """Raises for combinations of options that exclude each other."""
    if not options.enabled:
        return
    enabled = {*options.enabled, *["bias"] * (not bias), *["proj_size"] * (proj_size > 0)}
    for one, others in _EXCLUDES.items():
        for other in others:
            if one in enabled and other in enabled:
                raise ValueError(f"{caller}: {one} excludes {_SHOWN.get(other, other)}, got both")
    if hidden_size % options.num_heads:
        raise ValueError(f"{caller}: num_heads must divide hidden_size, {hidden_size}, got {options.num_heads}")
