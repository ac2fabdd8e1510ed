"""Drop-in replacements for the recurrent cells of torch.nn, with additional options."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter, RNNCellBase, init

from ..functional import _recurrent_kinds as families
from ..functional import recurrent_cells as F
from ..functional._recurrent_kinds import Kind, Weight
from ..functional._recurrent_options import (
    OF_SEQUENCES,
    Options,
    about,
    check_together,
    options_of,
    wrapped,
)
from ._symbolic import as_leaf, qconfig, refuse_scripting

Device = torch.device | str | int | None


class _Cell(RNNCellBase):
    """Base class of the cells. Internally, states are a tuple, even if the public form is a tensor."""

    _name: str  # name in error messages
    _family: families.Family
    options: Options
    __prepare_scriptable__ = refuse_scripting
    qconfig = qconfig

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool,
        device: Device,
        dtype: torch.dtype | None,
        given: Mapping[str, Any],
    ) -> None:
        options = options_of(self._name, self._family.plain, given)
        check_together(self._name, options, hidden_size, bias=bool(bias))
        kind = self._family.kind_of(options)
        # Not super(): the constructors of torch.nn.LSTMCell, GRUCell and RNNCell have other arguments.
        RNNCellBase.__init__(self, input_size, hidden_size, bias, len(kind.gates), device=device, dtype=dtype)
        self.options, self._plain = options, options.plain and kind.name in families.PLAIN_CELLS
        sizes = {"D": input_size, "H": hidden_size, "H/heads": hidden_size // options.num_heads}
        for weight in self._table():
            shape, existing = weight.sizes(sizes), getattr(self, weight.name, None)
            if existing is None or existing.shape != shape:
                setattr(self, weight.name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "options" not in state:  # a pickle of torch's module, for which this class stands in
            self._set_plain()

    def _set_plain(self) -> None:
        """Sets the attributes that a module of torch does not have."""
        self.options, self._plain = self._family.plain, True

    @property
    def _kind(self) -> Kind:
        return self._family.kind_of(self.options)

    def _table(self) -> list[Weight]:
        return self._kind.weights(bool(self.bias), False, self.options.peephole, self.options.num_heads > 1)

    def reset_parameters(self) -> None:
        if "options" not in self.__dict__:  # called by torch's constructor
            return
        super().reset_parameters()
        H, bias = self.hidden_size, self.options.forget_bias
        for weight in self._table():
            if weight.start is not None:
                init.constant_(getattr(self, weight.name), weight.start)
            elif bias is not None and weight.name in ("bias_ih", "bias_hh"):
                f = self._kind.gates.index("f")
                init.constant_(getattr(self, weight.name)[f * H : (f + 1) * H], bias if weight.name == "bias_ih" else 0)

    def extra_repr(self) -> str:
        of_plain = vars(self._family.plain)
        given = ((name, getattr(self.options, name)) for name in _supported(self._family))
        return "".join([super().extra_repr(), *(f", {n}={value}" for n, value in given if value != of_plain[n])])

    def _run(self, cell: F.Cell | None, input: Tensor, states0: F.States) -> Any:
        """Runs one step. `cell`: the ops without options, or None if the kind has none."""
        if self._plain and cell is not None:
            parameters = self._parameters
            try:
                weights: F.Weights = (
                    parameters["weight_ih"],
                    parameters["weight_hh"],
                    parameters["bias_ih"],
                    parameters["bias_hh"],
                )
            except KeyError:  # a parametrization or pruning computes one of the weights
                weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
            return F.step(self._name, cell, input, states0, weights)
        weights = [getattr(self, weight.name) for weight in self._table()]
        return F.as_layer(self._name, self._kind, input, states0, weights, bool(self.bias), self.options, self.training)


for _option in dataclasses.fields(Options):
    if _option.init and _option.name not in OF_SEQUENCES:  # module.peephole and so on
        setattr(_Cell, _option.name, property(operator.attrgetter(f"options.{_option.name}")))


def _supported(family: families.Family) -> tuple[str, ...]:
    return tuple(name for name in family.supported if name not in OF_SEQUENCES)


class LSTMCell(_Cell, torch.nn.LSTMCell):
    """Drop-in replacement for torch.nn.LSTMCell: same constructor, parameters, initialization, state_dict and errors.

    Computes one step of a batch [B, D] or a sequence [D]. A subclass of torch.nn.LSTMCell.

    Args: as torch.nn.LSTMCell: input_size, hidden_size, bias=True, device=None, dtype=None.
    Keyword-only options:
        {options}
        layer_norm excludes peephole, coupled_gates and num_heads; forget_bias excludes bias=False and coupled_gates.
    Inputs:
        input: as above.
        hx: (h, c), each [B, hidden_size] or [hidden_size]; zeros if None.
    Outputs: the new (h, c).
    Raises: as torch.nn.LSTMCell; for options ValueError and TypeError.
    Deterministic: yes, except for the masks of dropout and zoneout; on a CPU, a loop over cells has the bits of
        seqkernels.nn.LSTM.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    _name, _family = "LSTMCell", families.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        peephole: bool = False,
        coupled_gates: bool = False,
        layer_norm: bool = False,
        norm_eps: float = 1e-5,
        forget_bias: float | None = None,
        cell_clip: float | None = None,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        options = dict(
            peephole=peephole,
            coupled_gates=coupled_gates,
            layer_norm=layer_norm,
            norm_eps=norm_eps,
            forget_bias=forget_bias,
            cell_clip=cell_clip,
            gate_clip=gate_clip,
            zoneout_h=zoneout_h,
            zoneout_c=zoneout_c,
            recurrent_dropout=recurrent_dropout,
            num_heads=num_heads,
        )
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return as_leaf(self, dict(input=input, hx=hx))
        result: tuple[Tensor, Tensor] = self._run(
            F.LSTM, input, (None, None) if hx is None else F.states_of(self._name, F.LSTM.kind, hx)
        )
        return result


class GRUCell(_Cell, torch.nn.GRUCell):
    """Drop-in replacement for torch.nn.GRUCell: same constructor, parameters, initialization, state_dict and errors.

    Inputs and outputs: as seqkernels.nn.LSTMCell, with one state h. A subclass of torch.nn.GRUCell.

    Keyword-only options:
        {options}
        layer_norm excludes num_heads and reset_after=False.
    Deterministic: yes, except for the masks of dropout and zoneout; on a CPU, a loop over cells has the bits of
        seqkernels.nn.GRU.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    _name, _family = "GRUCell", families.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        norm_eps: float = 1e-5,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        options = dict(
            reset_after=reset_after,
            layer_norm=layer_norm,
            norm_eps=norm_eps,
            gate_clip=gate_clip,
            zoneout_h=zoneout_h,
            recurrent_dropout=recurrent_dropout,
            num_heads=num_heads,
        )
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return as_leaf(self, dict(input=input, hx=hx))
        result: Tensor = self._run(F.GRU, input, (hx,))
        return result


class DreamerGRUCell(_Cell):
    """GRU cell of the world models of Dreamer: one step of seqkernels.nn.DreamerGRU.

    Inputs and outputs: as seqkernels.nn.GRUCell. Parameters: those of torch.nn.GRUCell with gates r, n, u, and
    norm_weight and norm_bias [3 * hidden_size].

    Keyword-only options:
        {options}
    Deterministic: yes, except for the masks of dropout and zoneout; on a CPU, a loop over cells has the bits of
        seqkernels.nn.DreamerGRU.
    Source: Hafner et al., arXiv 2010.02193 and arXiv 2301.04104.
    """

    _name, _family = "DreamerGRUCell", families.DREAMER_GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        norm_eps: float = 1e-3,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        options = dict(
            norm_eps=norm_eps,
            gate_clip=gate_clip,
            zoneout_h=zoneout_h,
            recurrent_dropout=recurrent_dropout,
            num_heads=num_heads,
        )
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return as_leaf(self, dict(input=input, hx=hx))
        result: Tensor = self._run(None, input, (hx,))
        return result


class RNNCell(_Cell, torch.nn.RNNCell):
    """Drop-in replacement for torch.nn.RNNCell: same constructor, parameters, initialization, state_dict and errors.

    nonlinearity: 'tanh' or 'relu'. Inputs and outputs: as seqkernels.nn.LSTMCell, with one state h. A subclass of
    torch.nn.RNNCell.

    Keyword-only options:
        {options}
    Deterministic: yes, except for the masks of zoneout; on a CPU, a loop over cells has the bits of seqkernels.nn.RNN.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html
    """

    __constants__ = [*RNNCellBase.__constants__, "nonlinearity"]  # noqa: RUF012  (as torch's)
    _name = "RNNCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        num_heads: int = 1,
    ) -> None:
        self.nonlinearity = nonlinearity
        options = dict(
            gate_clip=gate_clip,
            zoneout_h=zoneout_h,
            num_heads=num_heads,
        )
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, Proxy):
            return as_leaf(self, dict(input=input, hx=hx))
        if self.nonlinearity == "tanh":
            cell = F.RNN_TANH
        elif self.nonlinearity == "relu":
            cell = F.RNN_RELU
        else:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        result: Tensor = self._run(cell, input, (hx,))
        return result

    @property
    def _family(self) -> families.Family:  # type: ignore[override]
        return families.RNN_RELU if self.nonlinearity == "relu" else families.RNN_TANH


for _module, _of in (
    (LSTMCell, families.LSTM),
    (GRUCell, families.GRU),
    (DreamerGRUCell, families.DREAMER_GRU),
    (RNNCell, families.RNN_TANH),
):
    if _module.__doc__:  # None with python -OO
        _module.__doc__ = wrapped(_module.__doc__.format(options=about(_of.plain, _supported(_of))))
