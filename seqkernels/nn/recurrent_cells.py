"""Recurrent cells in place of torch.nn's, with the same constructors, parameters and state_dict, and options."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter, RNNCellBase, init

from seqkernels.functional import _recurrent_options as families
from seqkernels.functional import recurrent_cells as F
from seqkernels.functional._recurrent_ops import Kind, Weight

# Options of a layer that mean nothing to one step.
_OF_SEQUENCES = ("variational_dropout", "learn_initial_state", "return_all_states", "memory_efficient")


class _Cell(RNNCellBase):
    """What the cells share: states are a tuple here, whatever the user sees."""

    _name: str  # as torch's messages say it
    _family: families.Family
    options: families.Options

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool, device: Any, dtype: Any, given: dict[str, Any]
    ) -> None:
        for name in given:
            if name not in _takes(self._family):
                raise TypeError(f"{self._name}.__init__() got an unexpected keyword argument '{name}'")
        options = families.options_of(self._name, self._family, given)
        families.check_together(self._name, options, hidden_size, bias=bool(bias))
        kind = self._family.kind_of(options)
        super().__init__(input_size, hidden_size, bias, len(kind.gates), device=device, dtype=dtype)
        self.options, self._plain = options, options.plain and kind.name == self._family.kind
        sizes = {"D": input_size, "H": hidden_size, "H/heads": hidden_size // options.num_heads}
        for weight in self._table():
            shape, made = weight.sizes(sizes), getattr(self, weight.name, None)
            if made is None or made.shape != shape:
                setattr(self, weight.name, Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

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
        given = ((name, getattr(self.options, name)) for name in _takes(self._family))
        return "".join([super().extra_repr(), *(f", {n}={value}" for n, value in given if value != of_plain[n])])

    def _run(self, cell: F.Cell, input: Tensor, states0: F.States) -> Any:
        """One step; `cell` is what it takes without options."""
        if self._plain:
            parameters = self._parameters
            try:
                weights: F.Weights = (
                    parameters["weight_ih"],
                    parameters["weight_hh"],
                    parameters["bias_ih"],
                    parameters["bias_hh"],
                )
            except KeyError:  # a parametrization, pruning or the like computes one of them
                weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
            return F.step(self._name, cell, input, states0, weights)
        weights = [getattr(self, weight.name) for weight in self._table()]
        return F.as_layer(self._name, self._kind, input, states0, weights, self.options, self.training)


def _takes(family: families.Family) -> list[str]:
    return [name for name in family.takes if name not in _OF_SEQUENCES]


class LSTMCell(_Cell):
    """Takes the place of torch.nn.LSTMCell: same constructor, parameters, initial values, state_dict and errors.

    One step of a batch [B, D] or of one sequence [D]. It is a torch.nn.RNNCellBase but not a torch.nn.LSTMCell.

    Args: as torch.nn.LSTMCell: input_size, hidden_size, bias=True, device=None, dtype=None.
    Options, by keyword:
        {options}
        layer_norm excludes peephole, coupled_gates and num_heads; forget_bias excludes bias=False and coupled_gates.
    Inputs:
        input: as above.
        hx: (h, c), each [B, hidden_size] or [hidden_size]; zeros if absent.
    Outputs: the new (h, c).
    Raises: as torch.nn.LSTMCell; for options ValueError and TypeError.
    Deterministic: yes, but for what dropout and zoneout draw; on a CPU a loop over cells gives the bits of
        seqkernels.nn.LSTM.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html
    """

    _name, _family = "LSTMCell", families.LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self._run(F.LSTM, input, (None, None) if hx is None else F.pair(self._name, hx))
        return result


class GRUCell(_Cell):
    """Takes the place of torch.nn.GRUCell: same constructor, parameters, initial values, state_dict and errors.

    Inputs and outputs: as seqkernels.nn.LSTMCell, with one state h. It is a torch.nn.RNNCellBase but not a
    torch.nn.GRUCell.

    Options, by keyword:
        {options}
        layer_norm excludes num_heads and reset_after=False.
    Deterministic: yes, but for what dropout and zoneout draw; on a CPU a loop over cells gives the bits of
        seqkernels.nn.GRU.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html
    """

    _name, _family = "GRUCell", families.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        result: Tensor = self._run(F.GRU, input, (hx,))
        return result


class RNNCell(_Cell):
    """Takes the place of torch.nn.RNNCell: same constructor, parameters, initial values, state_dict and errors.

    nonlinearity: 'tanh' or 'relu'. Inputs and outputs: as seqkernels.nn.LSTMCell, with one state h. It is a
    torch.nn.RNNCellBase but not a torch.nn.RNNCell.

    Options, by keyword:
        {options}
    Deterministic: yes, but for what zoneout draws; on a CPU a loop over cells gives the bits of seqkernels.nn.RNN.
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
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, options)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
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


for _module, _of in ((LSTMCell, families.LSTM), (GRUCell, families.GRU), (RNNCell, families.RNN_TANH)):
    if _module.__doc__:  # absent under python -OO
        _module.__doc__ = _module.__doc__.format(options=_of.about(_takes(_of), 8))
