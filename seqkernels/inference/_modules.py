"""Prepared modules: recurrent layers and cells for inference on a CPU, with packed weights.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P size of h (the projection size, or H), L layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..functional import _recurrent_kinds as families
from ..functional import recurrent as F
from ..functional._checks import describe
from ..functional._overrides import refuse_nested
from ..functional._recurrent_extras import batch_of
from ..functional._recurrent_kinds import KINDS, Kind
from ..functional._recurrent_options import Options
from ..functional._values import tracing
from . import _ops

States = tuple[Tensor, ...]
_INFINITY = float("inf")


def _extent(t: Tensor) -> tuple[int, int]:
    """Addresses of the memory between the first and the last element."""
    if not t.numel():
        return 0, 0
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride()))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


class _Prepared(nn.Module):
    """Base class: packed weights as buffers, sizes, checks that layers and cells share."""

    def __init__(
        self, name: str, source: Any, kind: Kind, options: Options, weights: str, sizes: dict[str, Any]
    ) -> None:
        super().__init__()
        self.name, self.weights = name, weights  # for messages: "LSTM"; "float32", "bfloat16", "float16" or "int8"
        self.input_size: int = source.input_size
        self.hidden_size: int = source.hidden_size
        self.bias = bool(source.bias)
        self.dtype: torch.dtype = source.weight_ih_l0.dtype if hasattr(source, "num_layers") else source.weight_ih.dtype
        self._kind, self._options = kind, options
        numbers = [
            _INFINITY if options.cell_clip is None else options.cell_clip,
            _INFINITY if options.gate_clip is None else options.gate_clip,
            options.zoneout_h,
            options.zoneout_c,
            options.norm_eps,
        ]
        self._shape = _ops.Shape(
            list(_ops.PRECISIONS).index(weights),
            self.hidden_size,
            sizes.get("proj_size", 0),
            sizes.get("num_layers", 1),
            sizes.get("bidirectional", False),
            options.num_heads,
            options.peephole,
            [] if numbers == [_INFINITY, _INFINITY, 0.0, 0.0, 1e-5] else numbers,
        )
        self.source_bytes = 0
        self._names: list[str] = []
        self.training = False

    def _take(self, source: nn.Module, suffix: str) -> None:
        """Packs the weights of one layer and direction into buffers."""
        kind, shape = self._kind, self._shape
        table = kind.weights(self.bias, shape.proj_size > 0, shape.peephole, shape.heads > 1)
        given = {w.name: getattr(source, w.name + suffix).detach() for w in table}
        self.source_bytes += sum(w.numel() * w.element_size() for w in given.values())
        values = {name: w.to(torch.float32, copy=True).contiguous() for name, w in given.items()}
        matrices = [name for name in values if name.startswith("weight") and name != "weight_ph"]
        for name in matrices:
            packed, scales = _ops.pack(values.pop(name), _ops.packing(kind, name, shape.heads, self.weights))
            self._hold(name.replace("weight", "packed") + suffix, packed)
            if self.weights == "int8":
                self._hold(name.replace("weight", "scale") + suffix, scales)
        G = len(kind.gates) * self.hidden_size
        if not self.bias:
            values["bias_ih"] = values["bias_hh"] = torch.zeros(G)
        b_ih, b_hh = values.pop("bias_ih"), values.pop("bias_hh")
        if _ops.TWO_BIASES[kind.name]:
            self._hold(f"bias_ih{suffix}", b_ih)
            self._hold(f"bias_hh{suffix}", b_hh.clone() if b_hh is b_ih else b_hh)
        else:
            self._hold(f"bias_sum{suffix}", b_ih + b_hh)
        if any(name.startswith("weight_inner") for name in matrices):
            inner = [values.pop(f"bias_inner_{of}", torch.zeros(4 * self.hidden_size)) for of in ("ih", "hh")]
            values["bias_inner"] = inner[0] + inner[1]
        for name, value in values.items():
            self._hold(name + suffix, value)

    def _hold(self, name: str, value: Tensor) -> None:
        self._names.append(name)
        self.register_buffer(name, value)

    def _all_weights(self) -> list[Tensor]:
        buffers = self._buffers
        return [buffers[name] for name in self._names]  # type: ignore[misc]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for dtype in {buffer.dtype for buffer in self._buffers.values() if buffer is not None}:
            if fn(torch.empty(0, dtype=dtype)).dtype != dtype:  # before any buffer is converted
                raise TypeError(
                    f"{self.name}: the dtype of packed weights cannot be changed; prepare the original module with "
                    "another `weights`"
                )
        return super()._apply(fn, recurse)

    def _check(self, input: Any) -> None:
        if self.training:
            raise RuntimeError(f"{self.name}: a prepared module must be in eval mode, got training mode")
        if not isinstance(input, Tensor):
            raise TypeError(f"{self.name}: input must be a tensor or PackedSequence, got {type(input).__name__}")
        if input.is_nested:
            refuse_nested(self.name, "use lengths or a PackedSequence", input=input)
        if input.dtype != self.dtype and not torch.is_autocast_enabled(input.device.type):
            raise TypeError(f"{self.name}: input must be {self.dtype}, got {input.dtype}")
        if input.shape[-1:] != (self.input_size,):
            raise RuntimeError(
                f"{self.name}: input.size(-1) must be input_size = {self.input_size}, got shape {list(input.shape)}"
            )
        buffer = self._buffers[self._names[0]]
        if not (input.is_cpu and buffer.is_cpu) and not (input.is_meta and buffer.is_meta):  # type: ignore[union-attr]
            raise NotImplementedError(
                f"{self.name}: prepared modules run on the CPU; input is on {input.device}, the weights on "
                f"{buffer.device}"  # type: ignore[union-attr]
            )

    def _check_states(self, states: States | None, shapes: list[tuple[int, ...]], input: Tensor, name: str) -> None:
        for letter, state, shape in zip(self._kind.states, states or (), shapes):
            if state.shape != shape:
                raise RuntimeError(
                    f"{self.name}: {letter} of {name} must have shape {list(shape)}, got {list(state.shape)}"
                )
            if state.dtype != input.dtype:
                raise TypeError(f"{self.name}: {letter} of {name} must be {input.dtype}, got {state.dtype}")
            if state.device != input.device:
                raise RuntimeError(
                    f"{self.name}: {letter} of {name} must be on the device of input, {input.device}, got "
                    f"{state.device}"
                )
        if torch.is_grad_enabled() and (input.requires_grad or any(s.requires_grad for s in states or ())):
            raise RuntimeError(
                f"{self.name}: a prepared module computes no gradients, but input or {name} requires one; call it "
                "under torch.no_grad(), or train the original module"
            )

    def _check_apart(self, out_state: States | None, input: Tensor) -> None:
        """out_state must not overlap in memory: with each other, with themselves, or with the input."""
        if out_state is None or tracing():
            return
        taken = [("input", *_extent(input))]
        for letter, state in zip(self._kind.states, out_state):
            begin, end = _extent(state)
            if end - begin < state.numel() * state.element_size():
                raise ValueError(f"{self.name}: {letter} of out_state must not be an expanded tensor")
            for other, low, high in taken:
                if begin < high and low < end:
                    raise ValueError(f"{self.name}: {letter} of out_state must not share memory with {other}")
            taken.append((f"{letter} of out_state", begin, end))

    def _call(
        self,
        x: Tensor,
        hx: States | None,
        out_state: States | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
        weights: list[Tensor] | None = None,
        shape: _ops.Shape | None = None,
        ranges: Tensor | None = None,
    ) -> tuple[Tensor, States]:
        """Runs the op in float32; states have its shapes. With out_state, these are overwritten and returned."""
        if weights is None:
            weights, shape, ranges = self._all_weights(), self._shape, self._buffers.get("ranges")
        dtype, given = x.dtype, hx
        if dtype != torch.float32:
            x = x.float()
            hx = None if hx is None else tuple(s.float() for s in hx)
        rest = weights, *shape, ranges, batch_sizes, lengths, reset  # type: ignore[misc]
        name = self._kind.name
        same = given is None or out_state is None or all(of is s for of, s in zip(out_state, given))
        if out_state is None or not same or dtype != torch.float32 or not all(s.is_contiguous() for s in out_state):
            y, *states = _ops.INFER[name](x, *(hx or (None,) * len(self._kind.states)), *rest)
            if dtype != torch.float32:
                y, states = y.to(dtype), [s.to(dtype) for s in states]
            if out_state is None:
                return y, tuple(states)
            for of, state in zip(out_state, states):
                of.copy_(state)
            return y, out_state
        if given is None:
            for of in out_state:
                of.zero_()
        return _ops.UPDATE[name](x, out_state, *rest), out_state

    def extra_repr(self) -> str:
        shape = self._shape
        more = f", num_layers={shape.num_layers}" * (shape.num_layers > 1)
        more += ", bidirectional=True" * shape.bidirectional + f", proj_size={shape.proj_size}" * (shape.proj_size > 0)
        return f"{self.name}({self.input_size}, {self.hidden_size}{more}), weights={self.weights!r}"

    @property
    def prepared_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values() if b is not None)


def _like_batch(hx: States | None, into: States | None, batched: States | None, dim: int) -> States | None:
    """hx with a batch dimension: the tensors of `batched` where hx is `into`."""
    if hx is None:
        return None
    if into is not None and batched is not None and all(a is b for a, b in zip(hx, into)):
        return batched
    return tuple(s.unsqueeze(dim) for s in hx)


class PreparedRecurrent(_Prepared):
    """A recurrent layer for inference on a CPU: all layers and directions in one call, weights packed once.

    Made by seqkernels.inference.prepare from a module of torch.nn (RNN, LSTM, GRU) or of seqkernels.nn. The packed
    weights are its buffers; there are no others. A call that requires a gradient raises.

    Inputs: as the original module (batch, unbatched sequence or PackedSequence, hx, lengths, reset), and
        out_state: tensors with the form of hx. They are overwritten with the last states and returned as such: a stream
            keeps its state without an allocation. `module(x, state, out_state=state)` updates in place; other hx are
            read first. They must not share memory with each other or with the input.
    Outputs: as the original module.
    Numerics: float32 weights give the bits of seqkernels.nn; other weights are rounded once, and all else is computed
        in float32. int8: weights are symmetric with one scale per row; input and h are quantized per row and step, or
        with the ranges of calibrate. Sums of int8 are exact. A row with NaN or infinity gives NaN. Modules of half
        types round their states at the end of a call.
    Deterministic: yes. A sequence has the same bits for any batch, padding and number of threads.
    """

    def __init__(self, name: str, source: Any, kind: Kind, options: Options, weights: str) -> None:
        sizes = dict(proj_size=source.proj_size, num_layers=source.num_layers, bidirectional=source.bidirectional)
        super().__init__(name, source, kind, options, weights, sizes)
        self.batch_first: bool = source.batch_first
        self.num_layers: int = source.num_layers
        self.bidirectional: bool = source.bidirectional
        self.proj_size: int = source.proj_size
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[: self._shape.directions]:
                self._take(source, f"_l{layer}{suffix}")
        self._initial: list[str] = []
        if options.learn_initial_state:
            for state in kind.states:
                self._initial.append(f"initial_{state}")
                self.register_buffer(self._initial[-1], getattr(source, self._initial[-1]).detach().float().clone())
        if weights == "int8":  # of the input and of h of each direction; 0: that of each row and step
            self.register_buffer("ranges", torch.zeros(self.num_layers, 1 + self._shape.directions))
        self._observed: Tensor | None = None

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | States | None = None,
        *,
        lengths: F.Lengths = None,
        reset: Tensor | None = None,
        out_state: Tensor | States | None = None,
    ) -> tuple[Any, Any]:
        states0 = F.states_of(self.name, self._kind, hx)
        into = F.states_of(self.name, self._kind, out_state, "out_state")
        if isinstance(input, PackedSequence):
            if lengths is not None:
                raise ValueError(f"{self.name}: lengths must be None with a PackedSequence, got {describe(lengths)}")
            packed, states = self._run_packed(input, states0, reset, into)
            return packed, states if len(states) > 1 else states[0]
        output, states = self._run(input, states0, lengths, reset, into)
        return output, states if len(states) > 1 else states[0]

    def _shapes(self, B: int) -> list[tuple[int, ...]]:
        rows, H = self._shape.num_layers * self._shape.directions, self.hidden_size
        return [(rows, B, self.proj_size or H), *[(rows, B, H)] * (len(self._kind.states) - 1)]

    def _run(
        self, input: Tensor, hx: States | None, lengths: F.Lengths, reset: Tensor | None, into: States | None
    ) -> tuple[Tensor, States]:
        self._check(input)
        if input.dim() not in (2, 3):
            raise ValueError(f"{self.name}: input must be [T, B, D] or [T, D], got {list(input.shape)}")
        batched, of_batch = input.dim() == 3, 0 if self.batch_first else 1
        if reset is not None:
            F.check_reset(self.name, reset, input)
        if not batched:
            if lengths is not None:
                raise ValueError(f"{self.name}: lengths must be None for an unbatched input, got {describe(lengths)}")
            for which, states in (("hx", hx), ("out_state", into)):
                if states is not None and any(s.dim() != 2 for s in states):
                    raise RuntimeError(f"{self.name}: {which} must be 2-D for an unbatched input")
            input = input.unsqueeze(of_batch)
            reset = None if reset is None else reset.unsqueeze(of_batch)
            into_3d = None if into is None else tuple(s.unsqueeze(1) for s in into)
            hx = _like_batch(hx, into, into_3d, 1)
        else:
            into_3d = into
        if self.batch_first:
            input = input.transpose(0, 1)
            reset = None if reset is None else reset.transpose(0, 1)
        B = input.shape[1]
        if hx is None and self._initial:
            hx = self._initial_states(B, input)
        shapes = self._shapes(B)
        self._check_states(hx, shapes, input, "hx")
        self._check_states(into_3d, shapes, input, "out_state")
        self._check_apart(into_3d, input)
        if lengths is not None:
            lengths = F._check_lengths(self.name, lengths, input)
        output, states = self._layers(input, hx, into_3d, None, lengths, reset)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output = output.squeeze(of_batch)
            states = tuple(s.squeeze(1) for s in states) if into is None else into
        return output, states

    def _run_packed(
        self, packed: PackedSequence, hx: States | None, reset: Tensor | None, into: States | None
    ) -> tuple[PackedSequence, States]:
        data, batch_sizes, sorted_indices, unsorted_indices = packed
        self._check(data)
        if reset is not None:
            F.check_reset(self.name, reset, data)
        B = batch_of(data, batch_sizes)
        shapes = self._shapes(B)
        self._check_states(hx, shapes, data, "hx")
        self._check_states(into, shapes, data, "out_state")
        self._check_apart(into, data)
        if hx is None and self._initial:
            hx = self._initial_states(B, data)
        elif hx is not None and sorted_indices is not None:
            hx = tuple(s.index_select(1, sorted_indices) for s in hx)
        direct = into if unsorted_indices is None else None
        output, states = self._layers(data, hx, direct, batch_sizes, None, reset)
        if unsorted_indices is not None:
            states = tuple(s.index_select(1, unsorted_indices) for s in states)
            if into is not None:
                for of, state in zip(into, states):
                    of.copy_(state)
                states = into
        return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), states

    def _initial_states(self, B: int, input: Tensor) -> States:
        buffers = self._buffers
        return tuple(
            buffers[name].to(input.dtype).unsqueeze(1).expand(-1, B, -1)  # type: ignore[union-attr]
            for name in self._initial
        )

    def _layers(
        self,
        x: Tensor,
        hx: States | None,
        into: States | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, States]:
        if self._observed is None:
            return self._call(x, hx, into, batch_sizes, lengths, reset)
        return self._observe(x, hx, batch_sizes, lengths, reset)

    # ---- calibration

    def _observe(
        self,
        x: Tensor,
        hx: States | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        reset: Tensor | None,
    ) -> tuple[Tensor, States]:
        """Runs layer by layer and records the largest |value| of the inputs and of h."""
        shape, D, weights, last = self._shape, self._shape.directions, self._all_weights(), []
        each = len(weights) // shape.num_layers
        observed: Tensor = self._observed  # type: ignore[assignment]
        P = self.proj_size or self.hidden_size
        for i in range(shape.num_layers):
            valid = x.float()
            if lengths is not None:
                beyond = torch.arange(x.shape[0]).unsqueeze(1) >= lengths.cpu()
                valid = valid.masked_fill(beyond.unsqueeze(-1), 0)
            of_layer = None if hx is None else tuple(s[i * D : (i + 1) * D] for s in hx)
            one = shape._replace(num_layers=1)
            x, states = self._call(
                x, of_layer, None, batch_sizes, lengths, reset, weights[i * each : (i + 1) * each], one, None
            )
            last.append(states)
            y = x.float().unflatten(-1, (D, P)).abs()
            largest = [valid.abs().amax() if valid.numel() else valid.new_zeros(())]
            for d in range(D):
                most = y.select(-2, d).amax() if y.numel() else y.new_zeros(())
                if of_layer is not None and of_layer[0].numel():
                    most = torch.maximum(most, of_layer[0][d].float().abs().amax())
                largest.append(most)
            found = torch.stack(largest)
            if not bool(torch.isfinite(found).all()):
                raise ValueError(f"calibrate: data must be finite, got NaN or infinity in {self.name}")
            observed[i] = torch.maximum(observed[i], found)
        return x, tuple(torch.cat(of_state) for of_state in zip(*last))

    def _begin_observing(self) -> None:
        self._observed = torch.zeros(self._shape.num_layers, 1 + self._shape.directions)

    def _end_observing(self) -> Tensor | None:
        """What was observed; None if there was no data."""
        observed, self._observed = self._observed, None
        return observed if observed is not None and bool((observed[:, 0] > 0).any()) else None


class PreparedCell(_Prepared):
    """One step of a recurrent cell for inference on a CPU, weights packed once.

    Made by seqkernels.inference.prepare from a cell of torch.nn or of seqkernels.nn. Inputs and outputs as the original
    cell, and out_state: tensors with the form of hx, overwritten with the new states and returned. Numerics: as
    PreparedRecurrent.
    Deterministic: yes; see PreparedRecurrent.
    """

    def __init__(self, name: str, source: Any, kind: Kind, options: Options, weights: str) -> None:
        super().__init__(name, source, kind, options, weights, {})
        self._take(source, "")

    def forward(
        self,
        input: Tensor,
        hx: Tensor | States | None = None,
        *,
        out_state: Tensor | States | None = None,
    ) -> Any:
        states0 = F.states_of(self.name, self._kind, hx)
        into = F.states_of(self.name, self._kind, out_state, "out_state")
        self._check(input)
        if input.dim() not in (1, 2):
            raise ValueError(f"{self.name}: input must be [B, D] or [D], got {list(input.shape)}")
        shapes = [(*input.shape[:-1], self.hidden_size)] * len(self._kind.states)
        self._check_states(states0, shapes, input, "hx")
        self._check_states(into, shapes, input, "out_state")
        self._check_apart(into, input)
        if input.dim() == 2:
            _, states = self._call(input, states0, into, None, None, None)
        else:
            into_2d = None if into is None else tuple(s.unsqueeze(0) for s in into)
            hx_2d = _like_batch(states0, into, into_2d, 0)
            _, states = self._call(input.unsqueeze(0), hx_2d, into_2d, None, None, None)
            states = tuple(s.squeeze(0) for s in states) if into is None else into
        return states if len(states) > 1 else states[0]


def family_and_options(module: nn.Module) -> tuple[families.Family, Options, Kind]:
    """Of a recurrent layer or cell of torch.nn or seqkernels.nn."""
    projected = getattr(module, "proj_size", 0) > 0
    options = getattr(module, "options", None)
    if options is not None:
        family: families.Family = module._family  # type: ignore[assignment]
    else:
        if isinstance(module, (nn.LSTM, nn.LSTMCell)):
            family = families.LSTM
        elif isinstance(module, (nn.GRU, nn.GRUCell)):
            family = families.GRU
        else:
            family = families.RNN_RELU if module.nonlinearity == "relu" else families.RNN_TANH
        options = family.plain
    return family, options, KINDS[family.kind_of(options, projected).name]
