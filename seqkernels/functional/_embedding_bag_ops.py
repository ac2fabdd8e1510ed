"""The ops of embedding bags: calls, fakes, autograd, torch.func.

Every op takes its bags as `Bags` lists them. `embedding_bag` saves nothing; `embedding_bag_forward` also returns `arg`,
the position of the row that won each column, which is all that backward needs. The ops named `embedding_bags` take
several tables.

Dimensions: E table rows, D columns, N indices, B bags, U rows that occur.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqkernels.functional import _autograd, _triton_ops
from seqkernels.functional._autograd import (
    below_autograd,
    jvp_by_definition,
    op,
    transformed,
    vjp_by_definition,
    vmap_rule,
)
from seqkernels.reference.embedding_bag import bags_of
from seqkernels.reference.embedding_bag import embedding as embedding_definition
from seqkernels.reference.embedding_bag import embedding_bag as embedding_bag_definition
from seqkernels.reference.embedding_bag import embedding_bags as embedding_bags_definition

MODES = {"sum": 0, "mean": 1, "max": 2, "min": 3}
NORMS = {"count": 0, "weight": 1}  # what a mean divides by
MODE_NAMES, NORM_NAMES = list(MODES), list(NORMS)
NO_PADDING = -1


class Ops:
    """The ops of one namespace, by their `.default` overloads."""

    def __init__(self, namespace: str, names: Sequence[str]) -> None:
        for name in names:
            setattr(self, name, op(name, namespace))

    def __getattr__(self, name: str) -> Any:  # what __init__ sets
        raise AttributeError(name)


NAMES = (
    *("embedding_bag", "embedding_bag_forward", "embedding_bag_backward", "embedding_bag_backward_sparse"),
    *("embedding_bag_backward_weights", "embedding_bag_update_", "embedding_bag_renorm_"),
    *("embedding_bag_bytes", "embedding_bag_pack_bytes"),
    *("embedding_bags", "embedding_bags_forward", "embedding_bags_backward", "embedding_bags_backward_sparse"),
    *("embedding_bags_backward_weights", "embedding_bags_update_"),
)

ops = Ops("seqkernels", NAMES)

# Ops that have Triton kernels, and the function of seqkernels.triton.embedding_bag.ops that each calls.
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
    """What is looked up and how it is reduced, as ops take it."""

    indices: Tensor  # [N] with offsets, or [B, L]
    offsets: Tensor | None
    weights: Tensor | None  # per sample, shaped like indices
    mode: int
    padding_idx: int
    include_last_offset: bool
    mean_by: int


class How(NamedTuple):
    """How a lookup is done and differentiated: what is no tensor."""

    mode: int = 0
    padding_idx: int = NO_PADDING
    include_last_offset: bool = False
    mean_by: int = 0
    by_frequency: bool = False  # a row's gradient is divided by how often it occurs
    sparse: bool = False
    gradient_padding: int = NO_PADDING  # an embedding's padding is left out of backward only
    features: Sequence[int] = ()  # of each table, where there are several
    winners: bool = False  # whether a recorded lookup also gives `arg`
    triton: bool = False  # whether the Triton kernels run

    @property
    def ops(self) -> Ops:
        return triton_ops if self.triton else ops

    def definition(self, bags: Bags, arg: Tensor | None, derivative: bool = False) -> Callable[..., Tensor]:
        """The lookup as the reference defines it, as a function of the tables, behind the weights. `derivative`:
        without what makes a gradient another than the derivative.
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


Step = Callable[..., None]  # (tables, grad, arg, bags, by_frequency): an optimiser's step on the rows that occur


# ---- a lookup whose gradient is recorded


def recorded(tables: Sequence[Tensor], weights: Tensor | None) -> bool:
    """Whether autograd records a lookup."""
    return _autograd.recorded(weights, *tables)


def lookup(
    tables: Sequence[Tensor],
    weights: Tensor | None,
    indices: Tensor,
    offsets: Tensor | None,
    how: How,
    step: Step | None = None,
) -> Tensor:
    """[B, D], however it is traced, transformed or recorded."""
    if transformed():
        if step is not None and recorded(tables, weights):
            raise RuntimeError("embedding_bag: fused_optimizer excludes torch.func and forward-mode AD")
        result: Tensor = _Transformed.apply(how, indices, offsets, weights, *tables)[0]
        return result
    if not recorded(tables, weights):
        return _infer(tables, Bags(indices, offsets, weights, *how[:4]), how)
    if not torch.compiler.is_compiling():
        return record(how, step, indices, offsets, weights, *tables)
    if how.sparse or step is not None:  # outside of a compiler's graph, without fullgraph=True, the same call runs
        what = "a sparse gradient" if step is None else "fused_optimizer"
        raise NotImplementedError(f"embedding_bag: {what} cannot be traced by torch.compile or torch.export")
    bags = Bags(indices, offsets, weights, *how[:4])
    if how.by_frequency or how.gradient_padding != how.padding_idx:
        many = _traced_several if how.features else _traced_in_triton if how.triton else _traced
        args = (list(tables), how.features) if how.features else tables
        return many(*args, *bags, how.by_frequency, how.gradient_padding)[0]
    return _forward(tables, bags, how)[0]


def lookup_winners(
    tables: Sequence[Tensor], weights: Tensor | None, indices: Tensor, offsets: Tensor, how: How, step: Step | None
) -> tuple[Tensor, Tensor]:
    """[B, D], and who won each column, in eager mode. how.winners is on."""
    if recorded(tables, weights):
        return record(how, step, indices, offsets, weights, *tables)  # type: ignore[return-value]
    return _forward(tables, Bags(indices, offsets, weights, *how[:4]), how)


def _infer(tables: Sequence[Tensor], bags: Bags, how: How) -> Tensor:
    if how.features:
        return how.ops.embedding_bags(list(tables), how.features, *bags)
    return how.ops.embedding_bag(tables[0], *bags)


def _forward(tables: Sequence[Tensor], bags: Bags, how: How) -> tuple[Tensor, Tensor]:
    if how.features:
        return how.ops.embedding_bags_forward(list(tables), how.features, *bags)
    return how.ops.embedding_bag_forward(tables[0], *bags)


def _backward(
    how: How,
    grad: Tensor,
    arg: Tensor,
    bags: Bags,
    shapes: Sequence[torch.Size],
    tables: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the weights and of each table. tables: needed where that of weights is."""
    bags = bags._replace(padding_idx=how.gradient_padding)
    several = len(how.features) > 0
    found: list[Any] = [None] * len(needs)
    if needs[0]:
        if several:
            found[0] = how.ops.embedding_bags_backward_weights(grad, arg, list(tables), how.features, *bags)
        else:
            found[0] = how.ops.embedding_bag_backward_weights(grad, arg, tables[0], *bags)
    if True not in needs[1:]:
        return found
    if several:
        E, D = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
        of_all = grad, arg, E, D, how.features, *bags, how.by_frequency
        if how.sparse:
            of_tables = map(_sparse, *how.ops.embedding_bags_backward_sparse(*of_all), shapes)
        else:
            of_tables = how.ops.embedding_bags_backward(*of_all)
        found[1:] = (g if need else None for g, need in zip(of_tables, needs[1:]))
    elif how.sparse:
        rows, values = how.ops.embedding_bag_backward_sparse(grad, arg, shapes[0][0], *bags, how.by_frequency)
        found[1] = _sparse(rows, values, shapes[0])
    else:
        found[1] = how.ops.embedding_bag_backward(grad, arg, shapes[0][0], *bags, how.by_frequency)
    return found


def _sparse(rows: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(rows.unsqueeze(0), values, shape, is_coalesced=True, check_invariants=False)


def _backward_by_definition(
    how: How,
    grad: Tensor,
    arg: Tensor,
    bags: Bags,
    shapes: Sequence[torch.Size],
    tables: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """`_backward`, itself differentiable. Values of tables that were not saved are not needed: a lookup is linear."""
    zero = grad.new_zeros(())
    primals = [bags.weights, *(zero.expand(shape) if t is None else t for t, shape in zip(tables, shapes))]
    found = vjp_by_definition(how.definition(bags, arg), primals, (grad,), needs)
    if how.sparse:
        found[1:] = (None if g is None else _rows_of(g, t, how, bags) for t, g in enumerate(found[1:]))
    return found


def _rows_of(dense: Tensor, table: int, how: How, bags: Bags) -> Tensor:
    """A gradient as a sparse tensor of the rows that occur."""
    offsets, padding = bags.offsets, how.gradient_padding
    if how.features:
        assert offsets is not None
        before, B = sum(how.features[:table]), (offsets.shape[0] - 1) // sum(how.features)
        offsets = offsets[before * B : (before + how.features[table]) * B + 1]
    what = bags_of(bags.indices, offsets, None, how.include_last_offset, None if padding < 0 else padding)
    rows = what.rows[what.counted].unique()
    return _sparse(rows, dense.index_select(0, rows), dense.shape)


class _Recorded(torch.autograd.Function):
    """A lookup in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        how: How,
        step: Step | None,
        indices: Tensor,
        offsets: Tensor | None,
        weights: Tensor | None,
        *tables: Tensor,
    ) -> Any:
        if torch.compiler.is_compiling():  # one that has left `lookup` to eager mode leaves this frame too, silently
            raise NotImplementedError("embedding_bag: this call is not traced")
        with below_autograd():
            if how.features:
                output, arg = how.ops.embedding_bags_forward(tables, how.features, indices, offsets, weights, *how[:4])
            else:
                output, arg = how.ops.embedding_bag_forward(tables[0], indices, offsets, weights, *how[:4])
        # Tables are kept only where the weights' gradient reads them: they may change otherwise, as with max_norm.
        kept = tables if weights is not None and ctx.needs_input_grad[FIRST] else ()
        ctx.save_for_backward(indices, offsets, weights, arg, *kept)
        ctx.how, ctx.step, ctx.shapes = how, step, [t.shape for t in tables]
        if step is not None:
            ctx.tables, ctx.stepped = tables, False
        return (output, arg) if how.winners else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None = None) -> tuple[Tensor | None, ...]:
        indices, offsets, weights, arg, *kept = ctx.saved_tensors
        tables = kept or [None] * len(ctx.shapes)
        how, step, needs = ctx.how, ctx.step, ctx.needs_input_grad[FIRST:]
        bags = Bags(indices, offsets, weights, *how[:4])
        if step is not None and True in needs[1:]:
            found = _Recorded.stepped(ctx, grad, arg, bags, tables, needs)
        else:
            # create_graph: the fused backward is first order, the definition is of any order
            backward = _backward_by_definition if torch.is_grad_enabled() else _backward
            found = backward(how, grad, arg, bags, ctx.shapes, tables, needs)
        return *[None] * FIRST, *found

    @staticmethod
    def stepped(
        ctx: Any, grad: Tensor, arg: Tensor, bags: Bags, tables: Sequence[Tensor | None], needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradient of weights, and then a step instead of the tables' gradients."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "embedding_bag: fused_optimizer excludes create_graph: its step is no part of a graph; without it the "
                "gradient can be differentiated"
            )
        if ctx.stepped:
            raise RuntimeError(
                "embedding_bag: with fused_optimizer a call can be sent back through once, and has been: add the "
                "losses before backward"
            )
        ctx.stepped = True
        none = [False] * (len(needs) - 1)
        found = _backward(ctx.how, grad, arg, bags, ctx.shapes, tables, (needs[0], *none))
        ctx.step(ctx.tables, grad, arg, bags._replace(padding_idx=ctx.how.gradient_padding), ctx.how.by_frequency)
        ctx.tables = None
        return found


FIRST = 4  # of the arguments that have a gradient: weights, then tables

# _Recorded.apply first looks for wrappers of torch.func, which doubles the time of the call.
record: Callable[..., Tensor] = super(torch.autograd.Function, _Recorded).apply


class _Transformed(torch.autograd.Function):
    """A lookup under torch.func's transforms and forward-mode AD, which the registered autograd does not support."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        how: How, indices: Tensor, offsets: Tensor | None, weights: Tensor | None, *tables: Tensor
    ) -> tuple[Tensor, Tensor]:
        return _forward(tables, Bags(indices, offsets, weights, *how[:4]), how)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        how, *tensors = inputs
        ctx.how = how
        ctx.save_for_backward(*tensors, output[1])
        ctx.save_for_forward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        indices, offsets, weights, *tables, arg = ctx.saved_tensors
        if ctx.how.sparse:
            raise NotImplementedError("embedding_bag: sparse must be False under torch.func, got True")
        bags = Bags(indices, offsets, weights, *ctx.how[:4])
        backward = _backward_by_definition if torch.is_grad_enabled() else _backward
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *backward(ctx.how, grad, arg, bags, [t.shape for t in tables], tables, needs)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, None]:
        indices, offsets, weights, *tables, arg = ctx.saved_tensors
        function = ctx.how.definition(Bags(indices, offsets, weights, *ctx.how[:4]), arg, derivative=True)
        return jvp_by_definition(function, [weights, *tables], tangents[3:])[0], None


# ---- the ops' fakes, autograd and vmap

_BAGS = (
    "Tensor indices, Tensor? offsets, Tensor? per_sample_weights, int mode, int padding_idx, bool include_last_offset, "
    "int mean_by"
)
_GRADIENT = "bool scale_grad_by_freq, int gradient_padding"
_library = torch.library.Library("seqkernels", "FRAGMENT")
# What a compiler records where the gradient is another than the ops' own formula gives.
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
_traced = torch.ops.seqkernels.embedding_bag_traced.default
_traced_in_triton = op("embedding_bag_traced", _triton_ops.NAMESPACE)
_traced_several = torch.ops.seqkernels.embedding_bags_traced.default

_EXTREMES = (MODES["max"], MODES["min"])


def _bags_fake(tables: Sequence[Tensor], bags: Bags, features: Sequence[int] = (1,)) -> Any:
    """How many bags a feature has, once what has no values has been checked."""
    indices, offsets, weights = bags[:3]
    for t in tables:
        if t.dim() != 2:
            raise ValueError(f"embedding_bag: weight must have 2 dimensions, got {list(t.shape)}")
    if indices.dim() != (2 if offsets is None else 1) or (offsets is not None and offsets.dim() != 1):
        got = "none" if offsets is None else list(offsets.shape)
        raise ValueError(f"embedding_bag: input must be [N] with offsets, or [B, L], got {list(indices.shape)}, {got}")
    for t in (*tables[1:], *(t for t in bags[:3] if t is not None)):
        if t.device != tables[0].device:
            raise ValueError(f"embedding_bag: all must be on one device, got {tables[0].device} and {t.device}")
    if weights is not None and weights.dim() != indices.dim():
        raise ValueError(f"embedding_bag: per_sample_weights must have the shape of input, got {list(weights.shape)}")
    if offsets is None:
        return indices.shape[0]
    count = offsets.shape[0] - int(bags.include_last_offset)  # torch 2.11 takes no bool from a symbol
    return count if len(features) == 1 and features[0] == 1 else count // sum(features)


def _output_fake(tables: Sequence[Tensor], bags: Bags, features: Sequence[int]) -> Tensor:
    B = _bags_fake(tables, bags, features)
    return tables[0].new_empty(B, sum(t.shape[1] * count for t, count in zip(tables, features)))


def _forward_fake(tables: Sequence[Tensor], bags: Bags, features: Sequence[int]) -> tuple[Tensor, Tensor]:
    output = _output_fake(tables, bags, features)
    shape = output.shape if bags.mode in _EXTREMES else (0,)
    return output, output.new_empty(shape, dtype=torch.int32)


def _rows_fake(grad: Tensor, D: Any) -> tuple[Tensor, Tensor]:
    U = torch.library.get_ctx().new_dynamic_size()  # not known while tracing
    return grad.new_empty(U, dtype=torch.int64), grad.new_empty(U, D)


ONE = (1,)
_BAGS_END = (NO_PADDING, False, 0)  # what an op's last arguments are where they are absent


def _bags(args: Sequence[Any]) -> Bags:
    """From the first arguments of an op that are bags, the last of which may be absent."""
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
    """The formula of an op that returns (output, arg), for tracing and for those who call it themselves."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tables, features, *rest = inputs if several else ([inputs[0]], (), *inputs[1:])
        bags, more = _bags(rest), rest[len(Bags._fields) :]
        by_frequency, padding = more or (False, bags.padding_idx)
        ctx.how = How(*bags[3:], by_frequency, False, padding, features, triton=triton)
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
        at = 4 if several else 3  # of per_sample_weights
        run = _backward_by_definition if torch.is_grad_enabled() else _backward
        found = run(ctx.how, grad, arg, Bags(*three, *ctx.how[:4]), ctx.shapes, tables, (every[at], *of_tables))
        others[at], others[0] = found[0], found[1:] if several else found[1]
        return tuple(others)

    torch.library.register_autograd(name, backward, setup_context=setup_context)


def _fold_rule(op: Callable[..., Any]) -> Callable[..., Any]:
    """Samples that share a table become more bags of one call, where each has [B, L] indices; else one call each."""
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
    """Fakes, autograd and vmap rules of a namespace's ops."""
    here = Ops(namespace, names)
    triton = namespace == _triton_ops.NAMESPACE
    for name in names:
        torch.library.register_fake(f"{namespace}::{name}")(FAKES[name])
        if not name.endswith("_"):
            rule = _fold_rule if name in ("embedding_bag", "embedding_bag_forward") else vmap_rule
            torch.library.register_vmap(f"{namespace}::{name}", rule(getattr(here, name)))
    for name, several in (("embedding_bag", False), ("embedding_bags", True)):
        if name + "_forward" in names:
            _register_autograd(f"{namespace}::{name}_forward", several, triton)


register("seqkernels")
register(_triton_ops.NAMESPACE, tuple(_IN_TRITON))
for _namespace, _name, _several in (
    ("seqkernels", "embedding_bag", False),
    ("seqkernels", "embedding_bags", True),
    (_triton_ops.NAMESPACE, "embedding_bag", False),
):
    torch.library.register_fake(f"{_namespace}::{_name}_traced")(
        lambda *args, _fake=FAKES[f"{_name}_forward"]: _fake(*args[:-2])
    )
    _register_autograd(f"{_namespace}::{_name}_traced", _several, _namespace == _triton_ops.NAMESPACE)
