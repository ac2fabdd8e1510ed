"""What a recurrent layer can have beyond torch's: which option belongs to which layer, their checks, their masks.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P what is fed back (the projection size, or H).
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqkernels.functional._recurrent_ops import KINDS, Extras, Kind


@dataclasses.dataclass(frozen=True)
class Options:
    """As the user gives them; the defaults are torch's layers."""

    peephole: bool = False
    coupled_gates: bool = False
    layer_norm: bool = False
    reset_after: bool = True
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
    asked: frozenset[str] = dataclasses.field(init=False, repr=False, compare=False)  # those not as torch has them
    plain: bool = dataclasses.field(init=False, repr=False, compare=False)  # the ops need no word of any

    def __post_init__(self) -> None:
        asked = frozenset(name for name, neutral in _NEUTRAL.items() if getattr(self, name) != neutral)
        object.__setattr__(self, "asked", asked)
        object.__setattr__(self, "plain", asked <= _IN_WEIGHTS)


_NEUTRAL = {field.name: field.default for field in dataclasses.fields(Options) if field.init}
_IN_WEIGHTS = {"coupled_gates", "layer_norm", "reset_after", "forget_bias", "learn_initial_state"}
FUNCTIONAL = _NEUTRAL.keys() - {"forget_bias", "learn_initial_state"}
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
    "reset_after": "the gate that resets h acts after the product with weight_hh, as in torch.nn.GRU, or before it. "
    "Source: Cho et al., arXiv 1406.1078 (before); Zhou et al., arXiv 1603.09420 (MGU, before).",
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


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A layer as the user knows it: one function or module, and a kind for each combination of options."""

    name: str
    kind: str
    takes: tuple[str, ...]  # names of Options; a function takes those of FUNCTIONAL alone
    variants: tuple[tuple[str, Any, str], ...] = ()  # where the option has the value, it is this kind
    projections: tuple[bool, ...] = (False,)
    plain: Options = Options()

    def kind_of(self, options: Options, projected: bool = False) -> Kind:
        for name, value, kind in self.variants:
            if (projected if name == "proj_size" else getattr(options, name)) == value:
                return KINDS[kind]
        return KINDS[self.kind]

    def about(self, names: Iterable[str], indent: int = 8) -> str:
        """The options' part of a docstring, a line for each."""
        return ("\n" + " " * indent).join(f"{name}={getattr(self.plain, name)}: {ABOUT[name]}" for name in names)


def wrapped(doc: str) -> str:
    """Each line within 120 columns; what does not fit goes on four columns further in."""
    lines: list[str] = []
    for line in doc.splitlines():
        further = " " * (4 + len(line) - len(line.lstrip()))
        lines += textwrap.wrap(line, 120, subsequent_indent=further) or [""]
    return "\n".join(lines) + "\n    "


def _family(name: str, kind: str, takes: str, *variants: tuple[str, Any, str], **more: Any) -> Family:
    every = f"{takes} learn_initial_state return_all_states memory_efficient"
    return Family(name, kind, tuple(every.split()), variants, **more)


_DROPOUTS = "recurrent_dropout variational_dropout"
LSTM = _family(
    "lstm",
    "lstm",
    f"peephole coupled_gates layer_norm forget_bias cell_clip gate_clip zoneout_h zoneout_c {_DROPOUTS} num_heads",
    ("layer_norm", True, "lstm_norm"),
    ("coupled_gates", True, "lstm_coupled"),
    projections=(False, True),
)
NESTED_LSTM = _family("nested_lstm", "lstm_nested", f"forget_bias zoneout_h {_DROPOUTS}")
GRU = _family(
    "gru",
    "gru",
    f"reset_after layer_norm gate_clip zoneout_h {_DROPOUTS} num_heads",
    ("layer_norm", True, "gru_norm"),
    ("reset_after", False, "gru_before"),
    ("proj_size", True, "gru_projected"),
    projections=(False, True),
)
MGU = _family(
    "mgu",
    "mgu",
    f"reset_after gate_clip zoneout_h {_DROPOUTS} num_heads",
    ("reset_after", False, "mgu_before"),
    plain=Options(reset_after=False),
)
_RNN = "gate_clip zoneout_h variational_dropout num_heads"
RNN_TANH = _family("rnn_tanh", "rnn_tanh", _RNN)
RNN_RELU = _family("rnn_relu", "rnn_relu", _RNN)


# ---- checks


def options_of(who: str, family: Family, given: dict[str, Any]) -> Options:
    """The options given to `who`, each checked for itself."""
    for name, value in given.items():
        if name in _RATES:
            _check_number(who, name, value, "lie in [0, 1)", lambda v: 0 <= v < 1)
        elif name in _CLIPS and value is not None:
            _check_number(who, name, value, "be None or above 0", lambda v: v > 0)
        elif name == "forget_bias" and value is not None:
            _check_number(who, name, value, "be None or finite", math.isfinite)
        elif name == "num_heads":
            _check_number(who, name, value, "be an integer above 0", lambda v: v > 0, numbers.Integral)
        elif isinstance(_NEUTRAL[name], bool) and not isinstance(value, bool):
            raise TypeError(f"{who}: {name} must be a bool, got {type(value).__name__}")
    return dataclasses.replace(family.plain, **given)


# Said by the kind of a layer, or by a number.
_IN_KIND = {"coupled_gates", "layer_norm", "reset_after", "num_heads"}


def check_named(who: str, kind: str, names: Sequence[str]) -> None:
    """Options by their names, of a layer of this kind."""
    if isinstance(names, str):
        raise TypeError(f"{who}: options must be a sequence of names, got {names!r}")
    families = (LSTM, NESTED_LSTM, GRU, MGU, RNN_TANH, RNN_RELU)
    family = next(f for f in families if kind in (f.kind, *(variant for *_, variant in f.variants)))
    known = [*(name for name in family.takes if name not in _IN_KIND), "reset"]
    for name in names:
        if name not in known:
            raise ValueError(f"{who}: options of {kind} must be some of {', '.join(known)}, got {name!r}")


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


# ---- what the ops are given


def extras_of(
    kind: Kind,
    options: Options,
    training: bool,
    x: Tensor,
    weights: Sequence[Tensor],
    bidirectional: bool = False,
    reset: Tensor | None = None,
    packed: tuple[int, Tensor] | None = None,
) -> tuple[Tensor, Extras | None]:
    """One layer's input, which variational dropout masks, and what its op needs beyond a plain layer: here the masks
    are drawn. `packed` is what `sequences_of` says of a packed input, wanted for variational dropout alone.
    """
    directions, heads = 2 if bidirectional else 1, options.num_heads
    H, P = weights[1].shape[0] // len(kind.gates), weights[1].shape[1] * heads
    drop = options.recurrent_dropout if training else 0.0
    zones = options.zoneout_h, options.zoneout_c
    rates = (*zones, 1 - drop) if training else (0.0, 0.0, 1.0)
    masks = [_mask((*x.shape[:-1], directions * H), rate, x) if 0 < rate < 1 else None for rate in rates]
    variational = None
    if training and options.variational_dropout:
        keep, B = 1 - options.variational_dropout, x.shape[1] if packed is None else packed[0]
        of_input = _mask((B, x.shape[-1]), keep, x).to(x.dtype) / keep
        variational = _mask((directions, B, P), keep, x).to(x.dtype) / keep
        x = x * (of_input if packed is None else of_input.index_select(0, packed[1]))
    limits = (math.inf if limit is None else float(limit) for limit in (options.cell_clip, options.gate_clip))
    values = [*limits, *map(float, zones), float(drop)]
    scalars = values if values != [math.inf, math.inf, 0.0, 0.0, 0.0] else []
    extras = Extras._make((options.peephole, heads, reset, *masks, variational, scalars))
    needed = options.peephole or heads > 1 or scalars or any(t is not None for t in extras[2:-1])
    return x, extras if needed else None


def _mask(shape: Sequence[int], p: float, like: Tensor) -> Tensor:
    """uint8 of the shape, on the device of like: each is 1 with probability p, else 0."""
    return (torch.rand(shape, device=like.device) < p).to(torch.uint8)


def batch_of(x: Tensor, batch_sizes: Tensor | None) -> int:
    """B of a time-major or packed input. Once a call: a compiler would not know that two are the same."""
    if batch_sizes is None or not batch_sizes.shape[0]:
        return x.shape[1] if batch_sizes is None else 0
    B: Any = batch_sizes[0].item()  # int() could not be traced
    return B


def sequences_of(x: Tensor, hx: Sequence[Tensor] | None, batch_sizes: Tensor) -> tuple[int, Tensor]:
    """B of a packed input, and [N] the sequence, by its place in the batch, that each row belongs to."""
    N, first = x.shape[0], batch_sizes.cumsum(0) - batch_sizes  # [T] the first row of each step
    if x.is_cuda and not torch.compiler.is_compiling():
        of_row = places_in_steps(first, batch_sizes, N, x.device)
    else:
        of_row = torch.arange(N) - first.repeat_interleave(batch_sizes, output_size=N)
        of_row = of_row.to(x.device)
    return batch_of(x, batch_sizes) if hx is None else hx[0].shape[1], of_row


def places_in_steps(first: Tensor, batch_sizes: Tensor, N: int, device: torch.device) -> Tensor:
    """[N] how far behind the first row of its step each row is, on the device. The numbers of the steps go there as
    arguments of kernels, of some hundred steps each, and not by a copy from the host, which would be waited for and has
    no place in a CUDA graph.
    """
    rows = torch.arange(N, device=device)
    if N:
        torch._foreach_sub_(rows.split(batch_sizes.tolist()), first.tolist())
    return rows
