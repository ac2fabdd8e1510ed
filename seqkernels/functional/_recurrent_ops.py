"""The ops of recurrent layers: their kinds, fakes, autograd, torch.func.

Every kind of layer has three ops, of the same form: `<kind>` saves nothing, `<kind>_forward` also returns what backward
needs, `<kind>_backward`. They take one layer, both directions.

Dimensions: B sequences, T steps, N packed rows, D input, H hidden, P what is fed back (the projection size, or H).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from seqkernels import _C  # importing it registers the ops
from seqkernels.reference import recurrent as reference

# ---- kinds


class Weight(NamedTuple):
    """A weight of one layer and direction."""

    name: str
    shape: tuple[tuple[int, str], ...]  # ((4, "H"), (1, "D")) is [4H, D]
    start: float | None = None  # its first value; None: drawn as torch draws

    def sizes(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple([count * sizes[letter] for count, letter in self.shape])

    def __str__(self) -> str:
        return f"[{', '.join(f'{count}{letter}' if count > 1 else letter for count, letter in self.shape)}]"


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of layer: what Python has to know of its cell."""

    name: str
    gates: str  # in the order of its weights
    states: str  # h, c, s
    tables: Mapping[tuple[bool, ...], list[Weight]]
    infer: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]

    def weights(self, bias: bool, projected: bool, peephole: bool, heads: bool) -> list[Weight]:
        """One layer and direction's, in the order of the ops."""
        return self.tables[bias, projected, peephole, heads]

    def __reduce__(self) -> tuple[Any, ...]:
        return kind_named, (self.name,)  # copied or pickled, a kind stays the one it is


def kind_named(name: str) -> Kind:
    return KINDS[name]


def _kind(name: str, gates: str, states: str, *own: Weight) -> Kind:
    """`own` are the weights beside those that torch's layers have."""
    # .default: half the cost of a call
    of = (getattr(getattr(torch.ops.seqkernels, name + suffix), "default") for suffix in ("", "_forward", "_backward"))  # noqa: B009
    tables = {with_: _weights(len(gates), own, *with_) for with_ in itertools.product((False, True), repeat=4)}
    return Kind(name, gates, states, tables, *of)


def _weights(
    gates: int, own: Sequence[Weight], bias: bool, projected: bool, peephole: bool, heads: bool
) -> list[Weight]:
    rows, H = (gates, "H"), (1, "H")
    fed_back = (1, "P" if projected else "H/heads" if heads else "H")
    every = [
        (True, Weight("weight_ih", (rows, (1, "D")))),
        (True, Weight("weight_hh", (rows, fed_back))),
        (bias, Weight("bias_ih", (rows,))),
        (bias, Weight("bias_hh", (rows,))),
        (projected, Weight("weight_hr", ((1, "P"), H))),
        (peephole, Weight("weight_ph", ((gates - 1, "H"),))),  # of every gate but g
        *((bias or not w.name.startswith("bias_inner"), w) for w in own),
    ]
    return [w for present, w in every if present]


def _gains(gates: int) -> tuple[Weight, Weight]:
    return Weight("gain_ih", ((gates, "H"),), 1.0), Weight("gain_hh", ((gates, "H"),), 1.0)


_INNER = (
    Weight("weight_inner_ih", ((4, "H"), (1, "H"))),
    Weight("weight_inner_hh", ((4, "H"), (1, "H"))),
    Weight("bias_inner_ih", ((4, "H"),)),
    Weight("bias_inner_hh", ((4, "H"),)),
)
_OF_CELL = (Weight("gain_c", ((1, "H"),), 1.0), Weight("bias_c", ((1, "H"),), 0.0))

KINDS = {
    kind.name: kind
    for kind in (
        _kind("lstm", "ifgo", "hc"),
        _kind("lstm_coupled", "igo", "hc"),
        _kind("lstm_norm", "ifgo", "hc", *_gains(4), *_OF_CELL),
        _kind("lstm_nested", "ifgo", "hcs", *_INNER),
        _kind("gru", "rzn", "h"),
        _kind("gru_before", "rzn", "h"),
        _kind("gru_norm", "rzn", "h", *_gains(3)),
        _kind("gru_projected", "rzn", "hc"),
        _kind("mgu", "fn", "h"),
        _kind("mgu_before", "fn", "h"),
        _kind("rnn_tanh", "n", "h"),
        _kind("rnn_relu", "n", "h"),
    )
}


class Extras(NamedTuple):
    """The ops' last arguments: what a plain layer does without, and leaves out of its calls."""

    peephole: bool = False
    heads: int = 1
    reset: Tensor | None = None  # bool [T, B] or [N]: before such a step the states are zero
    zoneout_h: Tensor | None = None  # uint8 [.., directions * H]: where it is 1, h keeps its old value
    zoneout_c: Tensor | None = None
    candidate: Tensor | None = None  # uint8 [.., directions * H]: where it is 0, the candidate is dropped
    variational: Tensor | None = None  # [directions, B, P] factors of h in the recurrent products
    numbers: Sequence[float] = []  # cell_clip, gate_clip, zoneout_h, zoneout_c, recurrent_dropout


NO_EXTRAS = Extras()


# ---- one layer

_SET_TF32 = getattr(_C, "set_tf32", None)  # of a build with CUDA kernels


def follow_precision(x: Tensor, of: Any) -> None:
    """float32 products on CUDA are made of TF32 where torch makes its own so: `of` is what says that in torch.backends.
    A compiled graph keeps what was last followed.
    """
    if _SET_TF32 is not None and x.is_cuda and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        _SET_TF32(allows_tf32(of))


def allows_tf32(of: Any) -> bool:
    allowed: bool = of.fp32_precision == "tf32"
    return allowed


def layer(
    kind: Kind,
    x: Tensor,
    states0: Sequence[Tensor | None],
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    bidirectional: bool,
    extras: Extras | None = None,
    recompute: bool = False,
    every: bool = False,
) -> tuple[Tensor, ...]:
    """y and the last states; with `every` also c (and s) of every step.

    Saves what backward needs only where a gradient can be asked for; with `recompute` no gates.
    """
    follow_precision(x, torch.backends.cudnn.rnn)
    compiling = torch.compiler.is_compiling()
    transformed = not compiling and (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)
    recorded = torch.is_grad_enabled() and (
        x.requires_grad
        or any(w.requires_grad for w in weights)
        or any(s is not None and s.requires_grad for s in states0)
    )
    if not (transformed or recorded or every):
        result: tuple[Tensor, ...] = kind.infer(
            x, *states0, weights, batch_sizes, lengths, bidirectional, *(extras or ())
        )
        return result
    recompute = recompute or not (recorded or transformed)  # no backward: nothing is kept for it
    call = Call(x, states0, weights, batch_sizes, lengths, bidirectional, extras, recompute)
    if transformed:
        outputs = _Transformed.apply(kind, *call.flat())
    elif recorded and not compiling:
        outputs = _Recorded.apply(kind, *call.flat())
    else:
        outputs = call.forward(kind)
    last = 1 + len(kind.states)
    return (*outputs[:last], *outputs[last + 1 :]) if every else tuple(outputs[:last])


class Call(NamedTuple):
    """What the ops take of one layer."""

    x: Tensor  # [T, B, D], or [N, D] with batch_sizes
    states0: Sequence[Tensor | None]  # each [directions, B, P or H]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    bidirectional: bool
    extras: Extras | None
    recompute: bool

    def flat(self) -> tuple[Any, ...]:
        """As autograd needs it: what is no tensor, then all tensors, of which the first FIXED have no gradient."""
        peephole, heads, *masks, numbers = self.extras or NO_EXTRAS
        scalars = (peephole, heads, numbers) if self.extras else None
        constants = self.bidirectional, scalars, self.recompute
        return constants, self.batch_sizes, self.lengths, *masks, *self.differentiable

    @staticmethod
    def nested(kind: Kind, constants: tuple[Any, ...], *tensors: Any) -> Call:
        """From what `flat` gives."""
        bidirectional, scalars, recompute = constants
        batch_sizes, lengths, *masks = tensors[:FIXED]
        extras = Extras._make((*scalars[:2], *masks, scalars[2])) if scalars else None
        weights = FIXED + 1 + len(kind.states)
        states0 = tensors[FIXED + 1 : weights]
        return Call(
            tensors[FIXED], states0, list(tensors[weights:]), batch_sizes, lengths, bidirectional, extras, recompute
        )

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self.x, *self.states0, *self.weights

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.x, *self.states0, self.weights, self.batch_sizes, self.lengths, self.bidirectional

    def forward(self, kind: Kind) -> tuple[Tensor, ...]:
        """(y, last states, what backward needs, and of that as well every c and s)."""
        last = (*(self.extras or NO_EXTRAS), True) if self.recompute else self.extras or ()
        result: tuple[Tensor, ...] = kind.forward(*self.inputs, *last)
        return result

    def backward(
        self, kind: Kind, upstream: Sequence[Tensor | None], kept: Sequence[Tensor], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Gradients of `differentiable`. Upstream are those of y, the last states, every c and s."""
        if torch.is_grad_enabled():  # create_graph: the fused backward is first order, the definition is of any
            return self.backward_by_definition(kind, upstream, needs)
        follow_precision(self.x, torch.backends.cudnn.rnn)
        states = len(kind.states)
        last: tuple[Any, ...] = self.extras or ()
        if any(g is not None for g in upstream[1 + states :]):
            last = *(self.extras or NO_EXTRAS), *upstream[1 + states :]
        need_weights = any(needs[1 + states :])
        dx, *dstates, dw = kind.backward(
            *upstream[: 1 + states], *self.inputs, *kept, bool(needs[0]), need_weights, *last
        )
        found = dx, *dstates, *(dw or [None] * len(self.weights))
        return [g if need else None for g, need in zip(found, needs)]

    def backward_by_definition(
        self, kind: Kind, upstream: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """By torch.func.vjp: it takes each input for itself (one may come from another) and nests in any transform."""
        wanted = [i for i, needed in enumerate(needs) if needed]
        given = [i for i, g in enumerate(upstream) if g is not None]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if given:
            outputs_of = self.definition(kind, wanted)
            primals = [self.differentiable[i] for i in wanted]
            _, pull, *_ = torch.func.vjp(lambda *p: tuple(outputs_of(*p)[i] for i in given), *primals)
            found = pull(tuple(upstream[i] for i in given))
        return _replaced([None] * len(needs), wanted, found)

    def jvp_by_definition(self, kind: Kind, tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """A vector-Jacobian product is linear in its vector, and its transpose is this."""
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]
        primals = [self.differentiable[i] for i in moving]
        outputs, pull, *_ = torch.func.vjp(self.definition(kind, moving), *primals)
        _, push, *_ = torch.func.vjp(pull, tuple(torch.zeros_like(out) for out in outputs))
        result: tuple[Tensor, ...] = push(tuple(tangents[i] for i in moving))[0]
        return result

    def definition(self, kind: Kind, moving: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
        """The layer as the reference defines it, as a function of some of `differentiable`."""
        states, extras = len(kind.states), (self.extras or NO_EXTRAS)._asdict()

        def outputs_of(*primals: Tensor) -> tuple[Tensor, ...]:
            x, *rest = _replaced(self.differentiable, moving, primals)
            fixed = self.batch_sizes, self.lengths, self.bidirectional
            return reference.layer(kind.name, x, rest[:states], rest[states:], *fixed, **extras)

        return outputs_of


FIXED = 7  # batch_sizes, lengths and the tensors of Extras


def _replaced(values: Sequence[Any], at: Sequence[int], by: Sequence[Any]) -> list[Any]:
    values = list(values)
    for i, value in zip(at, by):
        values[i] = value
    return values


# ---- autograd


def _keep(ctx: Any, kind: Kind, flat: Sequence[Any], outputs: Sequence[Tensor]) -> None:
    ctx.kind, (ctx.constants, *tensors) = kind, flat
    saved = 1 + len(kind.states)
    ctx.save_for_backward(*tensors, outputs[0], *outputs[saved:])
    ctx.mark_non_differentiable(outputs[saved])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    kind, saved = ctx.kind, 1 + len(ctx.kind.states)
    tensors = ctx.saved_tensors  # the last: y, what forward saved, every c and s
    call = Call.nested(kind, ctx.constants, *tensors[:-saved])
    return call.backward(kind, (*grads[:saved], *grads[saved + 1 :]), tensors[-saved:], needs)


class _Recorded(torch.autograd.Function):
    """A layer in eager mode: a third of the time that the ops' own formula takes to record a call."""

    @staticmethod
    def forward(ctx: Any, kind: Kind, *flat: Any) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = Call.nested(kind, *flat).forward(kind)
        _keep(ctx, kind, flat, outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        before = 2 + FIXED
        return *[None] * before, *_backward(ctx, grads, ctx.needs_input_grad[before:])


class _Transformed(torch.autograd.Function):
    """A layer under torch.func's transforms and forward-mode AD, which the ops' own formula does not serve."""

    generate_vmap_rule = True

    @staticmethod
    def forward(kind: Kind, *flat: Any) -> tuple[Tensor, ...]:
        return Call.nested(kind, *flat).forward(kind)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        kind, *flat = inputs
        _keep(ctx, kind, flat, output)
        ctx.save_for_forward(*flat[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _Recorded.backward(ctx, *grads)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        kind, saved = ctx.kind, 1 + len(ctx.kind.states)
        call = Call.nested(kind, ctx.constants, *ctx.saved_tensors)
        result = call.jvp_by_definition(kind, tangents[2 + FIXED :])
        return *result[:saved], None, *result[saved:]


# ---- the ops' fakes, autograd and vmap


def _register(kind: Kind) -> None:
    states = len(kind.states)
    name = f"seqkernels::{kind.name}"

    def fake_infer(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        weights, batch_sizes, _, bidirectional, *extras = args[states:]
        _, heads, *_, variational, _ = Extras(*extras)
        if x.dim() != (3 if batch_sizes is None else 2) or len(weights) < 2 or any(w.dim() != 2 for w in weights[:2]):
            raise ValueError(f"{kind.name}: x or weights must have other dimensions, got {list(x.shape)}")
        given = [s for s in args[:states] if s is not None]
        for t in (*given, *([] if variational is None else [variational])):
            if t.dim() != 3:
                raise ValueError(f"{kind.name}: a state or its mask must have 3 dimensions, got {list(t.shape)}")
        for t in (*given, *weights):
            if t.device != x.device:
                raise ValueError(
                    f"{kind.name}: x, states and weights must be on one device, got {x.device}, {t.device}"
                )
        B: Any
        if batch_sizes is None:
            B = x.shape[1]
        elif given or variational is not None:
            B = (*given, variational)[0].shape[1]
        else:
            B = torch.library.get_ctx().new_dynamic_size()  # batch_sizes[0]: not known while tracing
        directions, H, P = 2 if bidirectional else 1, _hidden(weights), weights[1].shape[1] * heads
        y = x.new_empty(*x.shape[:-1], directions * P)
        return y, *(x.new_empty(directions, B, width) for width in (P, H, H)[:states])

    def fake_forward(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        weights, _, _, bidirectional, *last = args[states:]
        extras, recompute = Extras(*last[: len(NO_EXTRAS)]), len(last) > len(NO_EXTRAS) and last[-1]
        outputs = fake_infer(x, *args[: states + 4], *extras)
        directions, H = 2 if bidirectional else 1, _hidden(weights)
        varied = any(t is not None for t in extras[2:-1]) or len(extras.numbers) > 0 or extras.peephole
        width = 0 if recompute else _C.recurrent_saved(kind.name, H, varied)
        rows = math.prod(x.shape[:-1])
        saved = x.new_empty(directions, rows, width)
        every = (x.new_empty(*x.shape[:-1], directions * H) for _ in kind.states[1:])
        return *outputs, saved, *every

    def _hidden(weights: Sequence[Tensor]) -> int:
        return weights[1].shape[0] // len(kind.gates)

    def fake_backward(*args: Any) -> tuple[Any, ...]:
        x, *states0, weights = args[1 + states : 3 + 2 * states]
        need_dx, need_dw = args[7 + 3 * states : 9 + 3 * states]

        def like(t: Tensor | None) -> Tensor:
            return x.new_empty(t.shape if t is not None else (0,))

        return like(x if need_dx else None), *map(like, states0), [like(w) for w in weights] if need_dw else []

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, *rest = inputs
        weights, batch_sizes, lengths, bidirectional, *extras, recompute = rest[states:]
        call = Call(x, rest[:states], weights, batch_sizes, lengths, bidirectional, Extras(*extras), recompute)
        _keep(ctx, kind, call.flat(), output)

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        need_x, *need_states, need_weights = ctx.needs_input_grad[: 2 + states]
        dx, *rest = _backward(ctx, grads, (need_x, *need_states, *need_weights))
        # As many as the arguments that were given, and where one is a list, a list: torch's wrapper compares.
        others: list[Any] = [[] if isinstance(need, list) else None for need in ctx.needs_input_grad[2 + states :]]
        return dx, *rest[:states], rest[states:], *others

    torch.library.register_fake(name)(fake_infer)
    torch.library.register_fake(name + "_forward")(fake_forward)
    torch.library.register_fake(name + "_backward")(fake_backward)
    torch.library.register_autograd(name + "_forward", backward, setup_context=setup_context)
    for suffix, op in (("", kind.infer), ("_forward", kind.forward), ("_backward", kind.backward)):
        torch.library.register_vmap(name + suffix, _vmap_rule(op))


def _vmap_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """One call per sample: each may have weights of its own, and a weight gradient of its own."""

    def one(value: Any, dim: Any, i: int) -> Any:
        if isinstance(value, (list, tuple)):
            dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(value)
            return [one(v, d, i) for v, d in zip(value, dims)]
        return value if dim is None else value.select(dim, i).contiguous()

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        results = [op(*(one(a, d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)]
        flat = [pytree.tree_flatten(result)[0] for result in results]
        spec = pytree.tree_flatten(results[0])[1]
        stacked = pytree.tree_unflatten([torch.stack(column) for column in zip(*flat)], spec)
        return stacked, pytree.tree_map(lambda _: 0, stacked)

    return rule


for _each in KINDS.values():
    _register(_each)
