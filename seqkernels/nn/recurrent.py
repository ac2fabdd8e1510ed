"""Drop-in replacements for the recurrent layers of torch.nn, with additional options, and other recurrent layers."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Parameter, RNNBase, init
from torch.nn.utils.rnn import PackedSequence

from ..functional import _recurrent_kinds as families
from ..functional import recurrent as F
from ..functional._checks import ValueRuntimeError, describe
from ..functional._overrides import refuse_nested
from ..functional._recurrent_extras import batch_of
from ..functional._recurrent_kinds import Kind, Weight, size_of_state
from ..functional._recurrent_options import Options, about, check_together, options_of, wrapped
from ..functional._values import may_read_values
from ._symbolic import as_leaf, qconfig, refuse_scripting

States = tuple[Tensor, ...]
Lengths = Tensor | Sequence[int] | None
Device = torch.device | str | int | None


class _Recurrent(RNNBase):
    """Base class of the layers. Internally, states are a tuple, even if the public form is a tensor."""

    _name: str  # name in error messages
    _family: families.Family
    _kind: Kind
    options: Options
    __prepare_scriptable__ = refuse_scripting
    qconfig = qconfig

    def __init__(
        self,
        mode: str,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        device: Device,
        dtype: torch.dtype | None,
        given: Mapping[str, Any],
    ) -> None:
        # torch's constructor checks the arguments; the parameters that it creates are replaced below. Not super(): a
        # subclass may also inherit from torch.nn.LSTM, GRU or RNN, whose constructors have other arguments.
        RNNBase.__init__(
            self, mode, input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype,
        )  # fmt: skip
        self.options = options_of(self._name, self._family.plain, given)
        check_together(self._name, self.options, self.hidden_size, bias=self.bias, proj_size=self.proj_size)
        self._kind = self._family.kind_of(self.options, self.proj_size > 0)
        self._make_parameters()
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "options" not in state:  # a pickle of torch's module, for which this class stands in
            self._set_plain()

    def _set_plain(self) -> None:
        """Sets the attributes that a module of torch does not have."""
        self.options = self._family.plain
        self._kind = self._family.kind_of(self.options, self.proj_size > 0)

    # ---- parameters

    def _table(self) -> list[list[tuple[str, Weight]]]:
        """For each layer and direction, names and weights of its parameters."""
        weights = self._kind.weights(self.bias, self.proj_size > 0, self.options.peephole, self.options.num_heads > 1)
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        return [[(f"{w.name}_l{i}{s}", w) for w in weights] for i in range(self.num_layers) for s in suffixes]

    def _make_parameters(self) -> None:
        table, directions = self._table(), 2 if self.bidirectional else 1
        H, P = self.hidden_size, self.proj_size or self.hidden_size
        sizes = {"H": H, "P": P, "H/heads": H // self.options.num_heads}
        shapes: dict[str, tuple[int, ...]] = {}
        for i, of_one in enumerate(table):
            sizes["D"] = self.input_size if i < directions else directions * P
            shapes |= {name: weight.sizes(sizes) for name, weight in of_one}
        if self.options.learn_initial_state:
            shapes |= {f"initial_{s}": (len(table), sizes[size_of_state(s)]) for s in self._kind.states}
        like: Any = self.weight_ih_l0
        self._flat_weights_names = []
        self._parameters.clear()
        for name, shape in shapes.items():
            self.register_parameter(name, Parameter(torch.empty(shape, device=like.device, dtype=like.dtype)))
        self._all_weights = [[name for name, _ in of_one] for of_one in table]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()

    def reset_parameters(self) -> None:
        if not hasattr(self, "_kind"):  # called by torch's constructor
            return
        super().reset_parameters()
        H, bias = self.hidden_size, self.options.forget_bias
        for name, weight in (pair for of_one in self._table() for pair in of_one):
            if weight.start is not None:
                init.constant_(getattr(self, name), weight.start)
            elif bias is not None and weight.name in ("bias_ih", "bias_hh"):
                f = self._kind.gates.index("f")
                init.constant_(getattr(self, name)[f * H : (f + 1) * H], bias if weight.name == "bias_ih" else 0.0)
        if self.options.learn_initial_state:
            for state in self._kind.states:
                init.zeros_(getattr(self, f"initial_{state}"))

    def flatten_parameters(self) -> None:
        """No effect: the kernels read the parameters in place."""

    def extra_repr(self) -> str:
        of_plain = vars(self._family.plain)
        given = ((name, getattr(self.options, name)) for name in self._family.supported)
        return "".join([super().extra_repr(), *(f", {n}={value}" for n, value in given if value != of_plain[n])])

    # ---- forward

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | States | None = None,
        *,
        lengths: Lengths = None,
        reset: Tensor | None = None,
    ) -> F.Output:
        if type(input) is not Tensor and isinstance(input, Proxy):
            leaf: F.Output = as_leaf(self, dict(input=input, hx=hx, lengths=lengths, reset=reset))
            return leaf
        output, states, every = self._run(input, F.states_of(self._name, self._kind, hx), lengths, reset)
        last = states if len(states) > 1 else states[0]
        return (output, last, every) if every else (output, last)

    def _run(
        self, input: Tensor | PackedSequence, hx: States | None, lengths: Lengths, reset: Tensor | None
    ) -> tuple[Any, States, Any]:
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{self._name}: lengths must be None with a PackedSequence, got {describe(lengths)}")
            return self._run_packed(input, hx, reset)
        if not isinstance(input, Tensor):
            raise TypeError(f"{self._name}: input must be a tensor or PackedSequence, got {type(input).__name__}")
        if input.is_nested:
            refuse_nested(self._name, "use lengths or a PackedSequence", input=input)
        if input.dim() not in (2, 3):
            what = "D tensor" if self._name == "RNN" else "D"  # text of torch
            raise ValueError(f"{self._name}: Expected input to be 2D or 3D, got {input.dim()}{what} instead")
        batched, batch_first = input.dim() == 3, self.batch_first
        if reset is not None:
            F.check_reset(self._name, reset, input)
        if hx is not None and any(s.dim() != input.dim() for s in hx):
            raise RuntimeError(_wrong_dimensions(self._kind, "batched 3-D" if batched else "unbatched 2-D", hx, input))
        if not batched:
            if lengths is not None:
                raise ValueError(f"{self._name}: lengths must be None for an unbatched input, got {describe(lengths)}")
            of_batch = 0 if batch_first else 1
            input = input.unsqueeze(of_batch)
            hx = None if hx is None else tuple(s.unsqueeze(1) for s in hx)
            reset = None if reset is None else reset.unsqueeze(of_batch)
        self._check(input, hx, None)
        if batch_first:
            input = input.transpose(0, 1)
            reset = None if reset is None else reset.transpose(0, 1)
        output, states, every = self._stack(input, hx, None, lengths, reset)
        if batch_first:
            output, every = output.transpose(0, 1), _each(every, lambda s: s.transpose(0, 1))
        if not batched:
            output, every = output.squeeze(of_batch), _each(every, lambda s: s.squeeze(of_batch))
            states = tuple(s.squeeze(1) for s in states)
        return output, states, every

    def _run_packed(
        self, packed: PackedSequence, hx: States | None, reset: Tensor | None
    ) -> tuple[PackedSequence, States, Any]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        if hx is not None and sorted_indices is not None:
            hx = tuple(s.index_select(1, sorted_indices) for s in hx)
        if reset is not None:
            F.check_reset(self._name, reset, data)
        self._check(data, hx, batch_sizes)
        output, states, every = self._stack(data, hx, batch_sizes, None, reset)
        if unsorted_indices is not None:
            states = tuple(s.index_select(1, unsorted_indices) for s in states)

        def like_input(t: Tensor) -> PackedSequence:
            return PackedSequence(t, batch_sizes, sorted_indices, unsorted_indices)

        return like_input(output), states, _each(every, like_input)

    def _stack(
        self,
        x: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        lengths: Lengths,
        reset: Tensor | None,
    ) -> tuple[Tensor, States, tuple[States, ...]]:
        kind, options, parameters = self._kind, self.options, self._parameters
        kind = F.chosen(self._name, kind, x, options.num_heads, self.proj_size > 0)
        weights = []
        for name in self._flat_weights_names:
            weight = parameters.get(name)  # None if a parametrization or pruning computes it
            weights.append(getattr(self, name) if weight is None else weight)
        if x.is_meta and not weights[0].is_meta:
            raise ValueRuntimeError(
                f"{self._name}: input must be on the device of the parameters, {weights[0].device}, got meta"
            )
        if options.learn_initial_state:
            if reset is not None:
                raise ValueError(f"{self._name}: reset excludes learn_initial_state, got both")
            if hx is None:
                B = batch_of(x, batch_sizes)
                hx = tuple(getattr(self, f"initial_{s}").unsqueeze(1).expand(-1, B, -1) for s in kind.states)
        training = self.training
        dropout = self.dropout if training else 0.0
        L, bidirectional = self.num_layers, self.bidirectional
        return F.stack(
            self._name, kind, x, weights, self.bias, self.proj_size > 0, hx, batch_sizes, lengths, L, bidirectional,
            dropout, options, training, reset,
        )  # fmt: skip

    # ---- checks of torch, with the same messages

    def _check(self, input: Tensor, hx: States | None, batch_sizes: Tensor | None) -> None:
        try:
            self.check_input(input, batch_sizes)
        except ValueError as error:
            if batch_sizes is None:
                raise
            raise ValueRuntimeError(str(error)) from None  # torch raises RuntimeError for a packed input
        if hx is None:
            return
        if batch_sizes is not None:
            batch = int(batch_sizes[0]) if may_read_values(batch_sizes) else hx[0].shape[1]
        else:
            batch = input.shape[0 if self.batch_first else 1]
        count, H = self.num_layers * (2 if self.bidirectional else 1), self.hidden_size
        sizes = {"P": self.proj_size or H, "H": H}
        for i, (name, state) in enumerate(zip(self._kind.states, hx)):
            which = f"hidden[{i}]" if len(hx) > 1 else "hidden"
            wanted = count, batch, sizes[size_of_state(name)]
            self.check_hidden_size(state, wanted, f"Expected {which} size {{}}, got {{}}")
        for name, state in zip(self._kind.states, hx):
            if state.device != input.device:
                raise ValueRuntimeError(
                    f"{self._name}: {name}0 must be on the device of input, {input.device}, got {state.device}"
                )


def _wrong_dimensions(kind: Kind, form: str, hx: States, input: Tensor) -> str:
    wanted = f"{input.dim()}-D but got"
    if len(hx) == 1:
        return f"For {form} input, hx should also be {wanted} {hx[0].dim()}-D tensor"
    names = " and ".join("hx" if state == "h" else f"{state}x" for state in kind.states)
    return f"For {form} input, {names} should also be {wanted} ({', '.join(f'{s.dim()}-D' for s in hx)}) tensors"


def _each(every: tuple[States, ...], function: Callable[[Tensor], Any]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(function(state) for state in of_layer) for of_layer in every)


for _option in dataclasses.fields(Options):
    if _option.init:  # module.peephole and so on
        setattr(_Recurrent, _option.name, property(operator.attrgetter(f"options.{_option.name}")))


class LSTM(_Recurrent):
    """Drop-in replacement for torch.nn.LSTM: same constructor, parameters, initialization, state_dict and errors.

    As in torch.nn.LSTM, the input is a batch [T, B, D] ([B, T, D] with batch_first), a sequence [T, D], or a
    torch.nn.utils.rnn.PackedSequence. Extensions: `lstm(x, lengths=lengths)` for a padded batch, sequences of length
    zero, T = 0, a fused backward, gradients of any order, and options.

    A subclass of torch.nn.RNNBase, not of torch.nn.LSTM, because torch.compile rejects subclasses of torch.nn.LSTM. For
    tools that look for torch.nn.LSTM, define `class LSTM(seqkernels.nn.LSTM, torch.nn.LSTM): pass`.

    Args: as torch.nn.LSTM: input_size, hidden_size, num_layers=1, bias=True, batch_first=False, dropout=0.0,
        bidirectional=False, proj_size=0, device=None, dtype=None.
    Keyword-only options, for all layers and directions:
        {options}
        layer_norm excludes peephole, coupled_gates, proj_size and num_heads; proj_size excludes zoneout_h and
        num_heads; forget_bias excludes bias=False and coupled_gates.
    Inputs:
        input: as above.
        hx: (h_0, c_0), [num_layers * directions, B, proj_size or hidden_size] and [..., hidden_size]; zeros if None.
        lengths: [B] integers in [0, T], in any order, on any device; for padded batches only.
        reset: bool, with the shape of input without its last dimension, or [N] for a PackedSequence. True sets the
            states to zero before the step, where a new sequence starts; in the reverse direction, the sequence ends
            there. Excludes learn_initial_state.
    Outputs: output in the layout of input, zero beyond each length; (h_n, c_n) at the last step of each sequence; with
        return_all_states, the states at all steps, which are PackedSequences for a PackedSequence.
    Raises: as torch.nn.LSTM; for options ValueError and TypeError; for lengths and reset as seqkernels.functional.lstm.
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.lstm.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html
    """

    _name, _family = "LSTM", families.LSTM
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
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
        variational_dropout: float = 0.0,
        num_heads: int = 1,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype,
            dict(
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
                variational_dropout=variational_dropout,
                num_heads=num_heads,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip


class GRU(_Recurrent):
    """Drop-in replacement for torch.nn.GRU: same constructor, parameters, initialization, state_dict and errors.

    Inputs, outputs and extensions: as seqkernels.nn.LSTM, with one state h [num_layers * directions, B, hidden_size]. A
    subclass of torch.nn.RNNBase, not of torch.nn.GRU, as LSTM.

    proj_size > 0, which torch.nn.GRU does not support, projects the state c of the GRU: h = weight_hr c is the output
    and the input of the recurrent projection. hx is then (h_0 [.., proj_size], c_0 [.., hidden_size]), and the module
    returns (h_n, c_n).

    Keyword-only options, for all layers and directions:
        {options}
        layer_norm excludes proj_size, num_heads and reset_after=False; proj_size excludes zoneout_h, num_heads and
        reset_after=False.
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.gru.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html
    """

    _name, _family = "GRU", families.GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = True,
        layer_norm: bool = False,
        norm_eps: float = 1e-5,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        num_heads: int = 1,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size,
            device, dtype,
            dict(
                reset_after=reset_after,
                layer_norm=layer_norm,
                norm_eps=norm_eps,
                gate_clip=gate_clip,
                zoneout_h=zoneout_h,
                recurrent_dropout=recurrent_dropout,
                variational_dropout=variational_dropout,
                num_heads=num_heads,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip


class DreamerGRU(_Recurrent):
    """GRU of the world models of Dreamer: one layer normalisation of the sum of both projections.

        r~, n~, u~ = norm(weight_ih x + bias_ih + weight_hh h + bias_hh) norm_weight + norm_bias
        r = sigmoid(r~), n = tanh(r n~), u = sigmoid(u~ - 1)
        h' = u n + (1 - u) h

    norm uses the mean and variance of all 3 * hidden_size values of a step. Constructor, inputs and outputs: as
    seqkernels.nn.GRU without proj_size. Parameters: those of torch.nn.GRU with gates r, n, u, and for each layer and
    direction norm_weight and norm_bias [3 * hidden_size]. num_heads makes weight_hh block-diagonal.

    Other implementations have one matrix, the concatenation of weight_ih and weight_hh, and at most one bias. Copy that
    bias to bias_ih and set bias_hh to zero, or construct the module with bias=False.

    Keyword-only options, for all layers and directions:
        {options}
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.dreamer_gru.
    Source: Hafner et al., "Mastering Atari with Discrete World Models", arXiv 2010.02193, and "Mastering Diverse
        Domains through World Models", arXiv 2301.04104 (num_heads).
    """

    _name, _family = "DreamerGRU", families.DREAMER_GRU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        norm_eps: float = 1e-3,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        num_heads: int = 1,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            dict(
                norm_eps=norm_eps,
                gate_clip=gate_clip,
                zoneout_h=zoneout_h,
                recurrent_dropout=recurrent_dropout,
                variational_dropout=variational_dropout,
                num_heads=num_heads,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip


class SLSTM(_Recurrent):
    """sLSTM, the scalar LSTM of xLSTM: exponential gates, a normaliser n and a stabiliser m.

        z = tanh(z~), o = sigmoid(o~), log f = log sigmoid(f~), or f~ with forget_gate="exp"
        m' = max(log f + m, i~), or i~ where n = 0
        i = exp(i~ - m'), f = exp(log f + m - m'), at most 1 where n = 0
        c' = f c + i z, n' = f n + i, h' = o c' / n'

    Constructor, parameters, inputs and outputs: as seqkernels.nn.LSTM without proj_size, with gates i, f, z, o. hx is
    (h_0, c_0, n_0, m_0), zeros if None, and the module returns (h_n, c_n, n_n, m_n). num_heads makes weight_hh
    block-diagonal. The cells of the packages xlstm and flashrnn have one bias, which corresponds to bias_ih with a
    bias_hh of zero.

    Keyword-only options, for all layers and directions:
        {options}
        forget_bias excludes bias=False.
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.slstm.
    Source: Beck et al., "xLSTM", arXiv 2405.04517; Poeppel, Beck and Hochreiter, "FlashRNN", arXiv 2412.07752.
    """

    _name, _family = "SLSTM", families.SLSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        forget_gate: str = "sigmoid",
        forget_bias: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        num_heads: int = 1,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0, device, dtype,
            dict(
                forget_gate=forget_gate,
                forget_bias=forget_bias,
                zoneout_h=zoneout_h,
                recurrent_dropout=recurrent_dropout,
                variational_dropout=variational_dropout,
                num_heads=num_heads,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip


class MGU(_Recurrent):
    """Minimal gated unit: a GRU with a single gate f for update and reset.

    Constructor, parameters, inputs and outputs: as seqkernels.nn.GRU without proj_size, with gates f, n: weight_ih is
    [2 * hidden_size, D].

    Keyword-only options, for all layers and directions:
        {options}
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.mgu.
    Source: Zhou, Wu, Zhang and Zhou, "Minimal Gated Unit for Recurrent Neural Networks", arXiv 1603.09420.
    """

    _name, _family = "MGU", families.MGU

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        reset_after: bool = False,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        num_heads: int = 1,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            device, dtype,
            dict(
                reset_after=reset_after,
                gate_clip=gate_clip,
                zoneout_h=zoneout_h,
                recurrent_dropout=recurrent_dropout,
                variational_dropout=variational_dropout,
                num_heads=num_heads,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip
        self.mode = "MGU"


class NestedLSTM(_Recurrent):
    """Nested LSTM: its cell c is the output of an inner LSTM with cell s.

    Constructor, inputs and outputs: as seqkernels.nn.LSTM without proj_size, with states (h, c, s), each [num_layers *
    directions, B, hidden_size]. Parameters: those of LSTM, and for each layer and direction weight_inner_ih and
    weight_inner_hh [4 * hidden_size, hidden_size], bias_inner_ih and bias_inner_hh [4 * hidden_size].

    Keyword-only options, for all layers and directions:
        {options}
        forget_bias excludes bias=False, and applies to the outer forget gate.
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.nested_lstm.
    Source: Moniz and Krueger, "Nested LSTMs", arXiv 1801.10308.
    """

    _name, _family = "NestedLSTM", families.NESTED_LSTM

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        forget_bias: float | None = None,
        zoneout_h: float = 0.0,
        recurrent_dropout: float = 0.0,
        variational_dropout: float = 0.0,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, 0,
            device, dtype,
            dict(
                forget_bias=forget_bias,
                zoneout_h=zoneout_h,
                recurrent_dropout=recurrent_dropout,
                variational_dropout=variational_dropout,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip
        self.mode = "NestedLSTM"


class RNN(_Recurrent):
    """Drop-in replacement for torch.nn.RNN: same constructor, parameters, initialization, state_dict and errors.

    nonlinearity: 'tanh' or 'relu'. Inputs, outputs and extensions: as seqkernels.nn.LSTM, with one state
    h [num_layers * directions, B, hidden_size]. A subclass of torch.nn.RNNBase, not of torch.nn.RNN, as
    LSTM.

    Keyword-only options, for all layers and directions:
        {options}
    proj_size has the same position as in torch.nn.RNN and must be 0.
    Deterministic: yes, except for the masks of dropout and zoneout; see seqkernels.functional.rnn_tanh.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html
    """

    _name = "RNN"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        gate_clip: float | None = None,
        zoneout_h: float = 0.0,
        variational_dropout: float = 0.0,
        num_heads: int = 1,
        learn_initial_state: bool = False,
        return_all_states: bool = False,
        memory_efficient: bool = False,
    ) -> None:
        if proj_size != 0:  # text of torch
            raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}", input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, device, dtype,
            dict(
                gate_clip=gate_clip,
                zoneout_h=zoneout_h,
                variational_dropout=variational_dropout,
                num_heads=num_heads,
                learn_initial_state=learn_initial_state,
                return_all_states=return_all_states,
                memory_efficient=memory_efficient,
            ),
        )  # fmt: skip

    @property
    def _family(self) -> families.Family:  # type: ignore[override]
        return families.RNN_TANH if self.nonlinearity == "tanh" else families.RNN_RELU


for _module, _of in (
    (LSTM, families.LSTM),
    (GRU, families.GRU),
    (DreamerGRU, families.DREAMER_GRU),
    (MGU, families.MGU),
    (NestedLSTM, families.NESTED_LSTM),
    (SLSTM, families.SLSTM),
    (RNN, families.RNN_TANH),
):
    if _module.__doc__:  # None with python -OO
        _module.__doc__ = wrapped(_module.__doc__.format(options=about(_of.plain, _of.supported)))
