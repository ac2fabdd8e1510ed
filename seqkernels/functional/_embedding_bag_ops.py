"""Ops of embedding bags: calls, fake implementations, autograd, torch.func.

Each op has the arguments `Bags`. `embedding_bag` saves nothing for backward. `embedding_bag_forward` also returns
`arg`: for max and min, the position of the row selected for each column. The `embedding_bags` ops have several tables.

Dimensions: E table rows, D columns, N indices, B bags, U rows that occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.embedding_bag import bags_of
from ..reference.embedding_bag import embedding as embedding_definition
from ..reference.embedding_bag import embedding_bag as embedding_bag_definition
from ..reference.embedding_bag import embedding_bags as embedding_bags_definition
from . import _autograd, _triton_ops
from ._autograd import (
    NAMESPACE,
    below_autograd,
    jvp_by_definition,
    needs_definition,
    op,
    register_fake,
    transformed,
    vjp_by_definition,
    vmap_rule,
)
from ._checks import ValueRuntimeError
from ._values import in_jit_trace

MODES = {"sum": 0, "mean": 1, "max": 2, "min": 3}
NORMS = {"count": 0, "weight": 1}  # divisor of a mean: the number of rows, or the sum of their weights
MODE_NAMES, NORM_NAMES = list(MODES), list(NORMS)
NO_PADDING = -1


class Ops:
    """The ops of one namespace, by their `.default` overloads."""

    def __init__(self, namespace: str, names: Sequence[str]) -> None:
        for name in names:
            setattr(self, name, op(name, namespace))

    def __getattr__(self, name: str) -> Any:  # declares the attributes set by __init__ to type checkers
        raise AttributeError(name)


NAMES = (
    *("embedding_bag", "embedding_bag_forward", "embedding_bag_backward", "embedding_bag_backward_sparse"),
    *("embedding_bag_backward_weights", "embedding_bag_update_", "embedding_bag_renorm_"),
    *("embedding_bag_bytes", "embedding_bag_pack_bytes"),
    *("embedding_bags", "embedding_bags_forward", "embedding_bags_backward", "embedding_bags_backward_sparse"),
    *("embedding_bags_backward_weights", "embedding_bags_update_"),
)

ops = Ops(NAMESPACE, NAMES)

# Ops with Triton kernels -> their function in seqkernels.triton.embedding_bag.ops.
_IN_TRITON = {
    "embedding_bag": "infer_op",
    "embedding_bag_forward": "forward_op",
    "embedding_bag_backward": "backward_op",
    "embedding_bag_backward_sparse": "backward_sparse_op",
    "embedding_bag_backward_weights": "backward_weights_op",
}
for _name, _function in _IN_TRITON.items():
    _triton_ops.define(_name, "embedding_bag.ops", _function)
triton_ops = Ops(_triton_ops.NAMESPACE, tuple(_IN_TRITON))


class Bags(NamedTuple):
    """Arguments that describe the bags and their reduction, in the order of the schemas."""

    indices: Tensor  # [N] with offsets, or [B, L]
    offsets: Tensor | None
    weights: Tensor | None  # per-sample weights, shaped like indices
    mode: int
    padding_idx: int
    include_last_offset: bool
    mean_by: int


class BagArgs(NamedTuple):
    """Scalar arguments of a lookup and of its gradient."""

    mode: int = 0
    padding_idx: int = NO_PADDING
    include_last_offset: bool = False
    mean_by: int = 0
    by_frequency: bool = False  # divides the gradient of a row by its number of occurrences
    sparse: bool = False
    gradient_padding: int = NO_PADDING  # padding_idx of backward; Embedding skips padding in backward only
    features: Sequence[int] = ()  # several tables: number of features of each
    return_arg: bool = False  # whether a recorded lookup also returns `arg`
    triton: bool = False  # whether the Triton kernels run
    leading: Sequence[int] | None = None  # shape of the output of a recorded lookup without D, if not [B]

    @property
    def ops(self) -> Ops:
        return triton_ops if self.triton else ops

    def definition(self, bags: Bags, arg: Tensor | None, derivative: bool = False) -> Callable[..., Tensor]:
        """The reference definition of the lookup, as a function of the per-sample weights and the tables.

        derivative: ignores scale_grad_by_freq and gradient_padding, which change the gradient but not the derivative.
        """
        arg = None if arg is None or arg.dim() < 2 else arg
        by_frequency = self.by_frequency and not derivative
        common: dict[str, Any] = dict(
            mode=MODE_NAMES[self.mode],
            weight_norm=NORM_NAMES[self.mean_by],
            scale_grad_by_freq=by_frequency,
            arg=arg,
        )

        def embedding(_: Tensor | None, table: Tensor) -> Tensor:
            padding = None if derivative else self.gradient_padding
            return embedding_definition(bags.indices[:, 0], table, padding, by_frequency)

        def embedding_bag(weights: Tensor | None, table: Tensor) -> Tensor:
            padding = None if self.padding_idx < 0 else self.padding_idx
            last = self.include_last_offset
            common.update(per_sample_weights=weights, include_last_offset=last, padding_idx=padding)
            return embedding_bag_definition(bags.indices, table, bags.offsets, **common)

        def embedding_bags(weights: Tensor | None, *tables: Tensor) -> Tensor:
            assert bags.offsets is not None
            common["per_sample_weights"] = weights
            return embedding_bags_definition(bags.indices, tables, bags.offsets, self.features, **common)

        if self.features:
            return embedding_bags
        return embedding if self.gradient_padding != self.padding_idx else embedding_bag


Step = Callable[..., None]  # optimiser step on the rows that occur: (tables, grad, arg, bags, by_frequency)


# ---- lookups recorded by autograd


def recorded(tables: Sequence[Tensor], weights: Tensor | None) -> bool:
    """Whether autograd records a lookup."""
    return _autograd.recorded(weights, *tables)


def lookup(
    tables: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    args: BagArgs,
    step: Step | None = None,
) -> Tensor:
    """Output [B, D] of a lookup, in eager mode, while tracing and under transforms."""
    if transformed():
        if step is not None and recorded(tables, weights):
            raise RuntimeError("embedding_bag: fused_optimizer excludes torch.func and forward-mode AD")
        result: Tensor = _Transformed.apply(args, indices, offsets, weights, *tables)[0]
        return result
    in_trace = in_jit_trace()  # which has one graph, with gradients enabled and without; those of tables are dense
    if in_trace and step is not None:
        raise NotImplementedError("embedding_bag: fused_optimizer requires torch.no_grad() in torch.jit.trace")
    if not (recorded(tables, weights) or (in_trace and any(t.requires_grad for t in tables))):
        return _infer(tables, Bags(indices, offsets, weights, *args[:4]), args)
    if not torch.compiler.is_compiling() and not in_trace:
        return record(args, step, indices, offsets, weights, *tables)
    if (args.sparse and not in_trace) or step is not None:  # without fullgraph=True, torch.compile uses eager mode
        what = "a sparse gradient" if step is None else "fused_optimizer"
        raise NotImplementedError(f"embedding_bag: {what} cannot be traced by torch.compile or torch.export")
    bags = Bags(indices, offsets, weights, *args[:4])
    if args.by_frequency or args.gradient_padding != args.padding_idx:
        traced = _traced_several if args.features else _traced_in_triton if args.triton else _traced
        leading = (list(tables), args.features) if args.features else tables
        return traced(*leading, *bags, args.by_frequency, args.gradient_padding)[0]
    return _forward(tables, bags, args)[0]


def lookup_with_arg(
    tables: Sequence[Tensor], weights: Tensor | None, indices: Tensor, offsets: Tensor, args: BagArgs, step: Step | None
) -> tuple[Tensor, Tensor]:
    """Output [B, D] and `arg`, in eager mode; args.return_arg must be set."""
    if recorded(tables, weights):
        return record(args, step, indices, offsets, weights, *tables)  # type: ignore[return-value]
    return _forward(tables, Bags(indices, offsets, weights, *args[:4]), args)


def _infer(tables: Sequence[Tensor], bags: Bags, args: BagArgs) -> Tensor:
    if args.features:
        return args.ops.embedding_bags(list(tables), args.features, *bags)
    return args.ops.embedding_bag(tables[0], *bags)


def _forward(tables: Sequence[Tensor], bags: Bags, args: BagArgs) -> tuple[Tensor, Tensor]:
    if args.features:
        return args.ops.embedding_bags_forward(list(tables), args.features, *bags)
    return args.ops.embedding_bag_forward(tables[0], *bags)


def _backward(
    args: BagArgs,
    grad: Tensor,
    arg: Tensor,
    bags: Bags,
    shapes: Sequence[torch.Size],
    tables: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the per-sample weights and of each table. Only the gradient of the weights reads `tables`."""
    bags = bags._replace(padding_idx=args.gradient_padding)
    several = len(args.features) > 0
    found: list[Any] = [None] * len(needs)
    if needs[0]:
        if several:
            found[0] = args.ops.embedding_bags_backward_weights(grad, arg, list(tables), args.features, *bags)
        else:
            found[0] = args.ops.embedding_bag_backward_weights(grad, arg, tables[0], *bags)
    if True not in needs[1:]:
        return found
    if several:
        E, D = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
        of_all = grad, arg, E, D, args.features, *bags, args.by_frequency
        if args.sparse:
            of_tables = map(_sparse, *args.ops.embedding_bags_backward_sparse(*of_all), shapes)
        else:
            of_tables = args.ops.embedding_bags_backward(*of_all)
        found[1:] = (g if need else None for g, need in zip(of_tables, needs[1:]))
    elif args.sparse:
        rows, values = args.ops.embedding_bag_backward_sparse(grad, arg, shapes[0][0], *bags, args.by_frequency)
        found[1] = _sparse(rows, values, shapes[0])
    else:
        found[1] = args.ops.embedding_bag_backward(grad, arg, shapes[0][0], *bags, args.by_frequency)
    return found


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


def _backward_by_definition(
    args: BagArgs,
    grad: Tensor,
    arg: Tensor,
    bags: Bags,
    shapes: Sequence[torch.Size],
    tables: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`_backward` through the reference definition, which is differentiable.

    A lookup is linear in its tables, so zeros replace the tables that were not saved.
    """
    zero = grad.new_zeros(())
    primals = [bags.weights, *(zero.expand(shape) if t is None else t for t, shape in zip(tables, shapes))]
    found = vjp_by_definition(args.definition(bags, arg), primals, (grad,), needs)
    if args.sparse:
        found[1:] = (None if g is None else _rows_of(g, t, args, bags) for t, g in enumerate(found[1:]))
    return found


def _rows_of(dense: Tensor, table: int, args: BagArgs, bags: Bags) -> Tensor:
    """A dense gradient as a sparse tensor with the rows that occur."""
    offsets, padding = bags.offsets, args.gradient_padding
    if args.features:
        assert offsets is not None
        before, B = sum(args.features[:table]), (offsets.shape[0] - 1) // sum(args.features)
        offsets = offsets[before * B : (before + args.features[table]) * B + 1]
    what = bags_of(bags.indices, offsets, None, args.include_last_offset, None if padding < 0 else padding)
    rows = what.rows[what.counted].unique()
    return _sparse(rows, dense.index_select(0, rows), dense.shape)


class _Recorded(torch.autograd.Function):
    """A recorded lookup in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        args: BagArgs,
        step: Step | None,
        indices: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        *tables: Tensor,
    ) -> Any:
        if torch.compiler.is_compiling():  # the error makes torch.compile run this frame eagerly, as it does `lookup`
            raise NotImplementedError("embedding_bag: this call is not traced")
        with below_autograd():
            if args.features:
                output, arg = args.ops.embedding_bags_forward(
                    tables, args.features, indices, offsets, weights, *args[:4]
                )
            else:
                output, arg = args.ops.embedding_bag_forward(tables[0], indices, offsets, weights, *args[:4])
            if args.leading is not None:  # here it is no view for autograd
                output = output.view(*args.leading, output.shape[1])
        # Only the gradient of the weights reads the tables. Unsaved tables may be modified, for example by max_norm.
        kept = tables if weights is not None and ctx.needs_input_grad[FIRST] else ()
        ctx.save_for_backward(indices, offsets, weights, arg, *kept)
        ctx.args, ctx.step, ctx.shapes = args, step, [t.shape for t in tables]
        if step is not None:
            ctx.tables, ctx.stepped = tables, False
        return (output, arg) if args.return_arg else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None = None) -> tuple[Tensor | None, ...]:
        indices, offsets, weights, arg, *kept = ctx.saved_tensors
        tables = kept or [None] * len(ctx.shapes)
        args, step, needs = ctx.args, ctx.step, ctx.needs_input_grad[FIRST:]
        if args.leading is not None:
            grad = grad.reshape(indices.shape[0], grad.shape[-1])
        bags = Bags(indices, offsets, weights, *args[:4])
        if step is not None and True in needs[1:]:
            found = _Recorded.stepped(ctx, grad, arg, bags, tables, needs)
        else:
            backward = _backward_by_definition if needs_definition((grad,)) else _backward
            found = backward(args, grad, arg, bags, ctx.shapes, tables, needs)
        return *[None] * FIRST, *found

    @staticmethod
    def stepped(
        ctx: Any, grad: Tensor, arg: Tensor, bags: Bags, tables: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Computes the gradient of the weights, then makes the optimiser step instead of gradients of the tables."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "embedding_bag: fused_optimizer excludes create_graph, because autograd does not record its step; "
                "use a separate optimiser to differentiate the gradient"
            )
        if ctx.stepped:
            raise RuntimeError(
                "embedding_bag: fused_optimizer allows one backward pass for each forward call, got a second one; add "
                "the losses and call backward once"
            )
        ctx.stepped = True
        none = [False] * (len(needs) - 1)
        found = _backward(ctx.args, grad, arg, bags, ctx.shapes, tables, (needs[0], *none))
        ctx.step(ctx.tables, grad, arg, bags._replace(padding_idx=ctx.args.gradient_padding), ctx.args.by_frequency)
        ctx.tables = None
        return found


FIRST = 4  # position of the first argument that has a gradient: the weights, followed by the tables

# _Recorded.apply without its search for torch.func wrappers, which doubles the time of the call.
record: Callable[..., Tensor] = super(torch.autograd.Function, _Recorded).apply


class _Sums(torch.autograd.Function):
    """A recorded lookup of sums or means in one table, without weights: `_Recorded` with less overhead.

    If args.leading is given, the bags are the rows at `indices` of that shape.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, indices: Tensor, offsets: Tensor | None, args: BagArgs) -> Tensor:
        if _compiling():  # as in _Recorded
            raise NotImplementedError("embedding_bag: this call is not traced")
        ctx.save_for_backward(indices, offsets)
        ctx.args, ctx.shape = args, table.shape
        if args.leading is not None:
            return rows_at(table, indices)
        mode, padding, last, mean_by, *_ = args
        output: Tensor = ops.embedding_bag(table, indices, offsets, None, mode, padding, last, mean_by)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        indices, offsets = ctx.saved_tensors
        args, shape = ctx.args, ctx.shape
        mode, _, last, mean_by, by_frequency, sparse, padding, _, _, _, leading = args
        if leading is not None:
            indices = indices.reshape(-1, 1)
            if len(leading) != 1:
                grad = grad.reshape(-1, shape[1]) if shape[1] else grad.reshape(indices.shape[0], 0)
        if needs_definition((grad,)):
            bags, arg = Bags(indices, offsets, None, *args[:4]), grad.new_empty(0, dtype=torch.int32)
            table = _backward_by_definition(args, grad, arg, bags, [shape], [None], (False, True))[1]
            return table, None, None, None
        # `indices` takes the place of `arg`, which only max and min read.
        given = grad, indices, shape[0], indices, offsets, None, mode, padding, last, mean_by, by_frequency
        if sparse:
            rows, values = ops.embedding_bag_backward_sparse(*given)
            return _sparse(rows, values, shape), None, None, None
        return ops.embedding_bag_backward(*given), None, None, None


record_sums: Callable[..., Tensor] = super(torch.autograd.Function, _Sums).apply
_compiling = torch.compiler.is_compiling

FEW_ELEMENTS = 1 << 20  # up to here, the copies of torch.embedding take no longer than those of the op


def rows_at(table: Tensor, indices: Tensor) -> Tensor:
    """The rows at indices of any shape, without a gradient."""
    if table.is_cpu and indices.numel() * table.shape[1] <= FEW_ELEMENTS:
        return torch.embedding(table, indices)
    with below_autograd():  # the result is no view for autograd
        output = ops.embedding_bag(table, indices.reshape(-1, 1), None, None, 0)
        return output if indices.dim() == 1 else output.view(*indices.shape, table.shape[1])


class _Transformed(torch.autograd.Function):
    """A lookup under torch.func transforms and forward-mode AD, which register_autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        args: BagArgs, indices: Tensor, offsets: Tensor | None, weights: Tensor | None, *tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward(tables, Bags(indices, offsets, weights, *args[:4]), args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        args, *tensors = inputs
        ctx.args = args
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        indices, offsets, weights, *tables, arg = ctx.saved_tensors
        if ctx.args.sparse:
            raise NotImplementedError("embedding_bag: sparse must be False under torch.func, got True")
        bags = Bags(indices, offsets, weights, *ctx.args[:4])
        backward = _backward_by_definition if torch.is_grad_enabled() else _backward
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *backward(ctx.args, grad, arg, bags, [t.shape for t in tables], tables, needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        indices, offsets, weights, *tables, arg = ctx.saved_tensors
        function = ctx.args.definition(Bags(indices, offsets, weights, *ctx.args[:4]), arg, derivative=True)
        return jvp_by_definition(function, [weights, *tables], tangents[3:])[0], None


# ---- fake implementations, autograd and vmap

_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset, "
    "int mean_by"
)
_GRADIENT = "bool scale_grad_by_freq, int gradient_padding"
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
# Ops traced by torch.compile when scale_grad_by_freq or gradient_padding is in use: their formulas have both arguments.
_library.define(f"embedding_bag_traced(Tensor weight, {_BAGS}, {_GRADIENT}) -> (Tensor output, Tensor arg)")
_library.define(
    f"embedding_bags_traced(Tensor[] weights, int[] features, {_BAGS}, {_GRADIENT}) -> (Tensor output, Tensor arg)"
)
_library.impl("embedding_bag_traced", lambda *args: ops.embedding_bag_forward(*args[:-2]), "CompositeExplicitAutograd")
_library.impl(
    "embedding_bags_traced", lambda *args: ops.embedding_bags_forward(*args[:-2]), "CompositeExplicitAutograd"
)
_triton_ops.LIBRARY.define(f"embedding_bag_traced(Tensor weight, {_BAGS}, {_GRADIENT}) -> (Tensor output, Tensor arg)")
_triton_ops.LIBRARY.impl(
    "embedding_bag_traced", lambda *args: triton_ops.embedding_bag_forward(*args[:-2]), "CompositeExplicitAutograd"
)
_traced = op("embedding_bag_traced")
_traced_in_triton = op("embedding_bag_traced", _triton_ops.NAMESPACE)
_traced_several = op("embedding_bags_traced")

_EXTREMES = (MODES["max"], MODES["min"])


def _bags_fake(tables: Sequence[Tensor], bags: Bags, features: Sequence[int] = (1,)) -> Any:
    """Checks shapes and devices, and returns the number of bags of a feature."""
    indices, offsets, weights = bags[:3]
    for t in tables:
        if t.dim() != 2:
            raise ValueError(f"embedding_bag: weight must have 2 dimensions, got {list(t.shape)}")
    if indices.dim() != (2 if offsets is None else 1) or (offsets is not None and offsets.dim() != 1):
        got = "none" if offsets is None else list(offsets.shape)
        raise ValueError(f"embedding_bag: input must be [N] with offsets, or [B, L], got {list(indices.shape)}, {got}")
    for t in (*tables[1:], *(t for t in bags[:3] if t is not None)):
        if t.device != tables[0].device:
            raise ValueRuntimeError(
                f"embedding_bag: all tensors must be on one device, got {tables[0].device} and {t.device}"
            )
    if weights is not None and weights.dim() != indices.dim():
        raise ValueError(f"embedding_bag: per_sample_weights must have the shape of input, got {list(weights.shape)}")
    if offsets is None:
        return indices.shape[0]
    count = offsets.shape[0] - int(bags.include_last_offset)  # torch 2.11 rejects SymInt - bool
    return count if len(features) == 1 and features[0] == 1 else count // sum(features)


def _output_fake(tables: Sequence[Tensor], bags: Bags, features: Sequence[int]) -> Tensor:
    B = _bags_fake(tables, bags, features)
    return tables[0].new_empty(B, sum(t.shape[1] * count for t, count in zip(tables, features)))


def _forward_fake(tables: Sequence[Tensor], bags: Bags, features: Sequence[int]) -> tuple[Tensor, Tensor]:
    output = _output_fake(tables, bags, features)
    shape = output.shape if bags.mode in _EXTREMES else (0,)
    return output, output.new_empty(shape, dtype=torch.int32)


def _rows_fake(grad: Tensor, D: Any) -> tuple[Tensor, Tensor]:
    U = torch.library.get_ctx().new_dynamic_size()  # depends on the values of the indices
    return grad.new_empty(U, dtype=torch.int64), grad.new_empty(U, D)


ONE = (1,)
_BAGS_END = (NO_PADDING, False, 0)  # defaults of padding_idx, include_last_offset and mean_by


def _bags(args: Sequence[Any]) -> Bags:
    """Bags from the arguments of an op that follow the tables; arguments with a default may be absent."""
    return Bags._make((*args[: len(Bags._fields)], *_BAGS_END[max(len(args) - 4, 0) :]))


FAKES: dict[str, Callable[..., Any]] = {
    "embedding_bag": lambda weight, *bags: _output_fake([weight], _bags(bags), ONE),
    "embedding_bag_forward": lambda weight, *bags: _forward_fake([weight], _bags(bags), ONE),
    "embedding_bag_backward": lambda grad, arg, E, *_: grad.new_empty(E, grad.shape[1]),
    "embedding_bag_backward_sparse": lambda grad, arg, E, *_: _rows_fake(grad, grad.shape[1]),
    "embedding_bag_backward_weights": lambda grad, arg, weight, *bags: bags[2].new_empty(bags[2].shape),
    "embedding_bag_update_": lambda *_: None,
    "embedding_bag_renorm_": lambda *_: None,
    "embedding_bag_pack_bytes": lambda weight: weight.new_empty(
        weight.shape[0], weight.shape[1] + BYTES_PER_ROW, dtype=torch.uint8
    ),
    "embedding_bag_bytes": lambda packed, *bags: packed.new_empty(
        _bags_fake([packed], _bags(bags)), packed.shape[1] - BYTES_PER_ROW, dtype=torch.float32
    ),
    "embedding_bags": lambda weights, features, *bags: _output_fake(weights, _bags(bags), features),
    "embedding_bags_forward": lambda weights, features, *bags: _forward_fake(weights, _bags(bags), features),
    "embedding_bags_backward": lambda grad, arg, rows, dims, *_: [grad.new_empty(*s) for s in zip(rows, dims)],
    "embedding_bags_backward_sparse": lambda grad, arg, rows, dims, *_: tuple(
        map(list, zip(*(_rows_fake(grad, D) for D in dims)))
    ),
    "embedding_bags_backward_weights": lambda grad, arg, weights, features, *bags: bags[2].new_empty(bags[2].shape),
    "embedding_bags_update_": lambda *_: None,
}
BYTES_PER_ROW = 8  # float32 scale and bias


def _register_autograd(name: str, several: bool, triton: bool = False) -> None:
    """Registers the autograd formula of an op that returns (output, arg), for tracing and direct calls."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tables, features, *rest = inputs if several else ([inputs[0]], (), *inputs[1:])
        bags, more = _bags(rest), rest[len(Bags._fields) :]
        by_frequency, padding = more or (False, bags.padding_idx)
        ctx.args = BagArgs(*bags[3:], by_frequency, False, padding, features, triton=triton)
        ctx.tables = len(tables)
        kept = tables if bags.weights is not None else ()
        ctx.shapes = [t.shape for t in tables]
        ctx.save_for_backward(*bags[:3], output[1], *kept)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        *three, arg = ctx.saved_tensors[:4]
        tables = list(ctx.saved_tensors[4:]) or [None] * ctx.tables
        every = ctx.needs_input_grad
        of_tables = list(every[0]) if several else [every[0]]
        others: list[Any] = [[] if isinstance(need, list) else None for need in every]
        if grad is None:
            return tuple(others)
        at = 4 if several else 3  # position of per_sample_weights
        run = _backward_by_definition if torch.is_grad_enabled() else _backward
        found = run(ctx.args, grad, arg, Bags(*three, *ctx.args[:4]), ctx.shapes, tables, (every[at], *of_tables))
        others[at], others[0] = found[0], found[1:] if several else found[1]
        return tuple(others)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def _fold_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """vmap rule that merges samples with a shared table and [B, L] indices into the bags of one call.

    Otherwise the rule calls the op once per sample.
    """
    one_by_one = vmap_rule(op)

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        shared, of_indices, of_offsets, of_weights = in_dims[:4]
        if shared is not None or of_offsets is not None or args[2] is not None:
            return one_by_one(info, in_dims, *args)
        n = info.batch_size

        def folded(t: Tensor | None, dim: int | None) -> Tensor | None:
            if t is None:
                return None
            t = t.unsqueeze(0).expand(n, -1, -1) if dim is None else t.movedim(dim, 0)
            return t.flatten(0, 1)

        results = op(args[0], folded(args[1], of_indices), None, folded(args[3], of_weights), *args[4:])
        several = isinstance(results, tuple)
        each = [
            t.unflatten(0, (n, t.shape[0] // n)) if t.dim() == 2 else t.unsqueeze(0).expand(n, *t.shape)
            for t in (results if several else (results,))
        ]
        return (tuple(each), (0,) * len(each)) if several else (each[0], 0)

    return rule


def register(namespace: str, names: Sequence[str] = NAMES) -> None:
    """Registers the fake implementations, autograd formulas and vmap rules of the ops of a namespace."""
    here = Ops(namespace, names)
    triton = namespace == _triton_ops.NAMESPACE
    for name in names:
        register_fake(f"{namespace}::{name}", FAKES[name])
        if not name.endswith("_"):
            rule = _fold_rule if name in ("embedding_bag", "embedding_bag_forward") else vmap_rule
            torch.library.register_vmap(f"{namespace}::{name}", rule(getattr(here, name)))
    for name, several in (("embedding_bag", False), ("embedding_bags", True)):
        if name + "_forward" in names:
            _register_autograd(f"{namespace}::{name}_forward", several, triton)


register(NAMESPACE)
register(_triton_ops.NAMESPACE, tuple(_IN_TRITON))
for _namespace, _name, _several in (
    (NAMESPACE, "embedding_bag", False),
    (NAMESPACE, "embedding_bags", True),
    (_triton_ops.NAMESPACE, "embedding_bag", False),
):
    register_fake(f"{_namespace}::{_name}_traced", lambda *args, _fake=FAKES[f"{_name}_forward"]: _fake(*args[:-2]))
    _register_autograd(f"{_namespace}::{_name}_traced", _several, _namespace == _triton_ops.NAMESPACE)
