"""EmbeddingBag against torch, FBGEMM, and a gather and reduction under torch.compile.

The bars are the claims of the project; the table reports PASS or MISS for each.

Each step uses the next of SETS sets of random indices, which are the same for all contenders, so that rows are read
from memory as in training, not from the caches filled by the previous call. Backward rows exclude the forward pass,
which runs before each step; "training" rows include it.

Work is the minimum memory traffic in bytes: a forward pass reads each row and writes the output; a backward pass reads
the gradient of the output and writes that of the table, or reads and writes the updated rows. A share of more than 100%
of the best copy means that rows are read from a cache.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Contender, Results, compiled, last_level_cache
from report import Bar
from torch import Tensor

import seqkernels

SETS = 32
ONE_ROW_CALLS = 100
TOLERANCE = 2e-5
BFLOAT16_TOLERANCE = 1e-2  # bfloat16 has 8 significant bits
INT = 8  # bytes of an index and of an offset


def short(number: int) -> str:
    for scale, letter in ((1_000_000, "M"), (1_000, "k")):
        if number % scale == 0:
            return f"{number // scale}{letter}"
    return str(number)


class Shape(NamedTuple):
    E: int
    D: int
    B: int
    L: int

    @property
    def N(self) -> int:
        return self.B * self.L

    def __str__(self) -> str:
        return f"E={short(self.E)} D={self.D} B={short(self.B)} L={self.L}"


def shape_id(value: object) -> str | None:
    return f"E{value.E}-D{value.D}-B{value.B}-L{value.L}" if isinstance(value, Shape) else None


# --- inputs ---


class Lookup(NamedTuple):
    indices: Tensor  # [N]
    offsets: Tensor  # [B]
    bounds: Tensor  # [B + 1], offsets and the end of the last bag
    weights: Tensor | None = None  # [N]
    tables: Sequence[Lookup] = ()  # collections: the lookup of each table


@dataclass
class Lookups:
    sets: list[Lookup]

    def rotation(self) -> Callable[[], Lookup]:
        return itertools.cycle(self.sets).__next__


def drawn(shape: Shape, *, zipf: bool = False, skewed: bool = False, weights: str = "", seed: int = 0) -> Lookups:
    """Bags of L rows each.

    zipf: the k-th row occurs about 1/k as often as the first. skewed: the first bag has half of all indices. weights:
    "plain" or "with gradient" adds per_sample_weights.
    """
    generator = torch.Generator().manual_seed(seed)
    bounds = torch.arange(shape.B + 1) * shape.L
    if skewed:
        bounds[1:] = (shape.N + bounds[1:]) // 2
    places = torch.randperm(shape.E, generator=generator)  # frequent rows have random positions
    sets = []
    for _ in range(SETS):
        indices = torch.randint(shape.E, (shape.N,), generator=generator)
        if zipf:
            draw = torch.rand(shape.N, generator=generator, dtype=torch.float64)
            indices = places[(torch.exp(draw * math.log(shape.E + 1)).long() - 1).clamp_(0, shape.E - 1)]
        w = torch.rand(shape.N, generator=generator) + 0.5 if weights else None
        if w is not None:
            w.requires_grad_(weights == "with gradient")
        sets.append(Lookup(indices, bounds[:-1].clone(), bounds, w))
    return Lookups(sets)


def drawn_for_tables(shapes: Sequence[Shape]) -> Lookups:
    """The bags of all tables, by table."""
    of_tables = zip(*(drawn(shape, seed=i).sets for i, shape in enumerate(shapes)))
    bounds = F.pad(torch.tensor([shape.L for shape in shapes for _ in range(shape.B)]).cumsum(0), (1, 0))
    return Lookups([Lookup(torch.cat([x.indices for x in t]), bounds[:-1], bounds, tables=t) for t in of_tables])


@functools.lru_cache(maxsize=1)  # consecutive rows often share a table; the size limits the cache to one
def table_of(E: int, D: int) -> Tensor:
    return torch.randn(E, D, generator=torch.Generator().manual_seed(1))


def leaf_of(shape: Shape) -> Tensor:
    return table_of(shape.E, shape.D).detach().requires_grad_()


# --- work ---


def forward_bytes(shape: Shape, element: int = 4) -> float:
    return float(shape.N * (shape.D * element + INT) + shape.B * (shape.D * element + INT))


def gradient_bytes(shape: Shape, rows: float, passes: int = 1) -> float:
    """Bytes of backward: `rows` of the table are written (1 pass), or read and written (2)."""
    return 4.0 * shape.D * (shape.B + passes * rows) + INT * (shape.N + shape.B)


def rows_that_occur(lookups: Lookups) -> int:
    return lookups.sets[0].indices.unique().numel()


# --- contenders ---

Call = Callable[[Tensor, Lookup], Tensor]
OURS, TORCH = seqkernels.functional.embedding_bag, F.embedding_bag


def bag(function: Callable[..., Tensor], mode: str, **options: Any) -> Call:
    """A call of embedding_bag of seqkernels or torch, which have the same arguments."""

    def call(table: Tensor, lookup: Lookup) -> Tensor:
        return function(lookup.indices, table, lookup.offsets, mode=mode, per_sample_weights=lookup.weights, **options)

    return call


def forward(name: str, call: Call, table: Tensor, lookups: Lookups, calls: int = 1) -> Contender:
    """Inference, or the forward pass of training if the table requires a gradient."""
    following = lookups.rotation()

    def step() -> None:
        for _ in range(calls):
            call(table, following())

    return Contender(name, step, lambda: {"output": call(table, lookups.sets[0]).detach()}, calls=calls)


def backward(
    name: str,
    call: Call,
    table: Tensor,
    lookups: Lookups,
    *,
    whole: bool = False,
    finish: Callable[[Tensor], Tensor] = lambda gradient: gradient,
) -> Contender:
    """Gradient of the table, or of the weights if the table has none. `whole`: forward and backward."""
    following, output, lookup = lookups.rotation(), torch.empty(0), lookups.sets[0]
    with torch.no_grad():
        upstream = torch.randn(call(table, lookup).shape, generator=torch.Generator().manual_seed(2)).to(table.device)

    def before() -> None:
        nonlocal output, lookup
        lookup = following()
        output = call(table, lookup)

    def gradient() -> Tensor:
        wanted = table if table.requires_grad else lookup.weights
        assert wanted is not None
        return finish(torch.autograd.grad(output, wanted, upstream)[0])

    def both() -> None:
        before()
        gradient()

    def result() -> Results:
        nonlocal output, lookup
        lookup = lookups.sets[0]
        output = call(table, lookup)
        dense = gradient().to_dense()
        picked = dense[lookup.indices.unique()] if table.requires_grad else dense
        return {"output": output.detach(), "gradient": picked, "total": torch.linalg.vector_norm(dense, 1)}

    return Contender(name, both, result) if whole else Contender(name, gradient, result, before)


def optimising(
    name: str,
    call: Callable[[Lookup], Tensor],
    tables: Sequence[Tensor],
    lookups: Lookups,
    step_of_optimizer: Callable[[], object] | None,
    *,
    whole: bool,
) -> Contender:
    """Backward and the optimiser step, which is part of backward if `step_of_optimizer` is None.

    whole: includes the forward pass.
    """
    following, output = lookups.rotation(), torch.empty(0)
    with torch.no_grad():
        shape = call(lookups.sets[0]).shape
    # Multiples of 1/8: their sums are exact in any order, so that division by a root of squares amplifies no rounding.
    upstream = (torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(3)) / 8).to(tables[0].device)

    def look_up(lookup: Lookup) -> None:
        nonlocal output
        for table in tables:
            table.grad = None
        output = call(lookup)

    def update() -> None:
        output.backward(upstream)
        if step_of_optimizer is not None:
            step_of_optimizer()

    def before() -> None:
        look_up(following())

    def both() -> None:
        before()
        update()

    def result() -> Results:
        """Two steps, so that the second has nonzero states."""
        start = [table.detach().clone() for table in tables]
        for lookup in lookups.sets[:2]:
            look_up(lookup)
            update()
        return {"change": torch.cat([(table.detach() - old).flatten() for table, old in zip(tables, start)])}

    return Contender(name, both, result) if whole else Contender(name, update, result, before)


# --- contenders: FBGEMM with all tables in one call ---

FBGEMM = "FBGEMM TBE"


@functools.lru_cache(maxsize=1)
def fbgemm() -> Any:
    """The module, or the reason why it is unavailable."""
    try:
        from fbgemm_gpu import split_table_batched_embeddings_ops_training as module
    except (ImportError, OSError) as error:
        return f"not usable: {str(error).partition(chr(10))[0]}"
    return module


def fbgemm_forward(tables: Sequence[Tensor], lookups: Lookups) -> Contender:
    module = fbgemm()
    if isinstance(module, str):
        return Contender(FBGEMM, refused=module)
    specs = [tuple(table.shape) for table in tables]
    batched = module.DenseTableBatchedEmbeddingBagsCodegen(
        specs, pooling_mode=module.PoolingMode.SUM, use_cpu=True
    ).requires_grad_(False)
    for mine, table in zip(batched.split_embedding_weights(), tables):
        mine.copy_(table)
    return forward(FBGEMM, lambda _, lookup: batched(lookup.indices, lookup.bounds), tables[0], lookups)


def fbgemm_optimising(tables: Sequence[Tensor], lookups: Lookups, optimizer: str, *, whole: bool) -> Contender:
    module = fbgemm()
    if isinstance(module, str):
        return Contender(FBGEMM, refused=module)
    place = (module.EmbeddingLocation.HOST, module.ComputeDevice.CPU)
    batched = module.SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, *place) for table in tables],
        optimizer=getattr(module.OptimType, optimizer),
        learning_rate=LR,
        eps=EPS,
        pooling_mode=module.PoolingMode.SUM,
    )
    mine = batched.split_embedding_weights()
    for copy, table in zip(mine, tables):
        copy.copy_(table)
    return optimising(FBGEMM, lambda x: batched(x.indices, x.bounds), mine, lookups, None, whole=whole)


# --- contenders: optimisers ---


LR, EPS = 0.1, 1e-8


class RowwiseAdagrad:
    """Row-wise Adagrad with the sparse gradient of torch, as implemented without a fused optimiser."""

    def __init__(self, tables: list[Tensor]) -> None:
        self.tables, self.states = tables, [table.new_zeros(len(table)) for table in tables]

    @torch.no_grad()
    def step(self) -> None:
        for table, state in zip(self.tables, self.states):
            assert table.grad is not None
            gradient = table.grad.coalesce()
            rows, values = gradient.indices()[0], gradient.values()
            state[rows] += values.square().mean(1)
            table.index_add_(0, rows, values / (state[rows].sqrt() + EPS)[:, None], alpha=-LR)


class Optimizer(NamedTuple):
    name: str
    ours: Callable[[], Any]
    torch: Callable[[list[Tensor]], Any]
    fbgemm: str = ""  # name in FBGEMM, which has no Adam on a CPU

    def __str__(self) -> str:
        return self.name


SGD = Optimizer("SGD", lambda: seqkernels.nn.FusedSGD(LR), lambda w: torch.optim.SGD(w, LR), "EXACT_SGD")
OPTIMIZERS = [
    SGD,
    Optimizer(
        "Adagrad",
        lambda: seqkernels.nn.FusedAdagrad(LR, eps=EPS),
        lambda w: torch.optim.Adagrad(w, LR, eps=EPS),
        "EXACT_ADAGRAD",
    ),
    Optimizer(
        "row-wise Adagrad",
        lambda: seqkernels.nn.FusedRowwiseAdagrad(LR, eps=EPS),
        RowwiseAdagrad,
        "EXACT_ROWWISE_ADAGRAD",
    ),
    Optimizer("Adam", lambda: seqkernels.nn.FusedAdam(LR, eps=EPS), lambda w: torch.optim.SparseAdam(w, LR, eps=EPS)),
]


def optimised(shape: Shape, lookups: Lookups, optimizer: Optimizer, *, whole: bool) -> list[Contender]:
    """The fused step, torch with sparse gradients, torch's optimiser with gradients of seqkernels, and FBGEMM."""
    table = table_of(shape.E, shape.D)
    module = seqkernels.nn.EmbeddingBag.from_pretrained(
        table.clone(), freeze=False, mode="sum", fused_optimizer=optimizer.ours()
    )
    fused = optimising(
        "ours, fused", lambda x: module(x.indices, x.offsets), [module.weight], lookups, None, whole=whole
    )

    def unfused(name: str, function: Callable[..., Tensor]) -> Contender:
        weight, call = table.clone().requires_grad_(), bag(function, "sum", sparse=True)
        step = optimizer.torch([weight]).step
        return optimising(name, lambda x: call(weight, x), [weight], lookups, step, whole=whole)

    contenders = [fused, unfused("torch", TORCH), unfused("(ours, sparse, optimiser of torch)", OURS)]
    if optimizer.fbgemm:
        contenders.append(fbgemm_optimising([table], lookups, optimizer.fbgemm, whole=whole))
    return contenders


# --- rows: forward ---

FORWARD = [
    Shape(10_000, 32, 4096, 10),
    Shape(10_000, 64, 2048, 20),
    Shape(100_000, 64, 2048, 20),
    Shape(1_000_000, 64, 2048, 20),
    Shape(1_000_000, 64, 8192, 5),
    Shape(1_000_000, 128, 2048, 20),
    Shape(1_000_000, 128, 512, 100),
]
MEMORY_BAR, CACHE_BAR = 1.2, 0.95
MIDDLE, LARGE = Shape(100_000, 64, 2048, 20), Shape(1_000_000, 64, 2048, 20)
PADDING_BAR, PADDING_COST_BAR = 12.0, 0.85
FLOAT64_BAR = 15.0
STRIDED_SHAPE, STRIDED_BAR = Shape(1_000_000, 64, 5, 20), 500.0
ONE_ROW, ONE_ROW_BAR = Shape(1_000_000, 128, 1, 1), 1.5


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("shape", FORWARD, ids=shape_id)
def test_forward(bench: Any, shape: Shape, mode: str) -> None:
    table, lookups = table_of(shape.E, shape.D), drawn(shape)
    beyond = 4 * table.numel() > last_level_cache()
    contenders = [forward("ours", bag(OURS, mode), table, lookups), forward("torch", bag(TORCH, mode), table, lookups)]
    if mode == "sum":
        contenders.append(fbgemm_forward([table], lookups))
    group = f"EmbeddingBag forward, table {'beyond' if beyond else 'within'} the last-level cache"
    bars = {"torch": MEMORY_BAR if beyond else CACHE_BAR}
    bench.time(group, f"{mode}, {shape}", contenders, bars=bars, work=forward_bytes(shape), work_unit="byte")


def plain_row(
    bench: Any, group: str, label: str, table: Tensor, lookups: Lookups, mode: str, work: float, **more: Any
) -> None:
    """seqkernels against torch with the same arguments."""
    contenders = [forward("ours", bag(OURS, mode), table, lookups), forward("torch", bag(TORCH, mode), table, lookups)]
    bars = more.pop("bars", {})
    bench.time(group, label, contenders, bars=bars, work=work, work_unit="byte", **more)


@pytest.mark.parametrize(("shape", "bar"), [(MIDDLE, FLOAT64_BAR), (LARGE, None)], ids=shape_id)
def test_float64(bench: Any, shape: Shape, bar: float | None) -> None:
    table = table_of(shape.E, shape.D).double()
    bars = {} if bar is None else {"torch": bar}
    work = forward_bytes(shape, 8)
    plain_row(bench, "EmbeddingBag forward, float64", f"sum, {shape}", table, drawn(shape), "sum", work, bars=bars)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bfloat16(bench: Any, mode: str) -> None:
    shape, group = MIDDLE, "EmbeddingBag forward, bfloat16"
    table, work = table_of(shape.E, shape.D).bfloat16(), forward_bytes(shape, 2)
    plain_row(bench, group, f"{mode}, {shape}", table, drawn(shape), mode, work, tolerance=BFLOAT16_TOLERANCE)


@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=shape_id)
def test_weighted_sum(bench: Any, shape: Shape) -> None:
    table, lookups, work = table_of(shape.E, shape.D), drawn(shape, weights="plain"), forward_bytes(shape)
    plain_row(bench, "EmbeddingBag forward, per_sample_weights", f"sum, {shape}", table, lookups, "sum", work)


def test_skewed_bags(bench: Any) -> None:
    shape = LARGE
    table, lookups, work = table_of(shape.E, shape.D), drawn(shape, skewed=True), forward_bytes(shape)
    plain_row(bench, "EmbeddingBag forward, one bag has half of the rows", f"sum, {shape}", table, lookups, "sum", work)


@pytest.mark.parametrize(("shape", "bar"), [(MIDDLE, PADDING_BAR), (LARGE, None)], ids=shape_id)
def test_padding(bench: Any, shape: Shape, bar: float | None) -> None:
    """The padding row is as rare as the others, so that skipping it saves no significant work."""
    table, lookups = table_of(shape.E, shape.D), drawn(shape)
    ours, theirs, plain = (
        forward(name, bag(function, "sum", **options), table, lookups)
        for name, function, options in (
            ("ours", OURS, {"padding_idx": 0}),
            ("torch", TORCH, {"padding_idx": 0}),
            ("ours without padding_idx", OURS, {}),
        )
    )
    bars = {plain.name: Bar(at_least=PADDING_COST_BAR)} | ({} if bar is None else {theirs.name: Bar(at_least=bar)})
    bench.time(
        "EmbeddingBag forward, padding_idx",
        f"sum, {shape}",
        [ours, theirs, plain],
        bars=bars,
        work=forward_bytes(shape),
        work_unit="byte",
        parity=[(theirs, ours)],
    )


def test_columns_of_a_wider_table(bench: Any) -> None:
    shape = STRIDED_SHAPE
    table, group = table_of(shape.E, 2 * shape.D)[:, : shape.D], "EmbeddingBag forward, half of a table's columns"
    bars = {"torch": STRIDED_BAR}
    plain_row(bench, group, f"sum, {shape}", table, drawn(shape), "sum", forward_bytes(shape), bars=bars)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_one_row(bench: Any, training: bool, mode: str) -> None:
    """A loop over a cached row, which measures the overhead of the call."""
    shape = ONE_ROW
    table, lookups = table_of(shape.E, shape.D).detach().requires_grad_(training), drawn(shape)
    contenders = [
        forward(name, bag(function, mode), table, lookups, ONE_ROW_CALLS)
        for name, function in (("ours", OURS), ("torch", TORCH))
    ]
    group = f"EmbeddingBag, a call on one row, {'forward of training' if training else 'inference'}"
    bars = {} if training else {"torch": ONE_ROW_BAR}
    bench.time(group, f"{mode}, D={shape.D}", contenders, bars=bars, work=0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=shape_id)
def test_compiled(bench: Any, shape: Shape, mode: str) -> None:
    """torch.compile does not fuse embedding_bag, but fuses a gather and a reduction into one loop."""
    table, lookups = table_of(shape.E, shape.D), drawn(shape)

    def gather(table: Tensor, lookup: Lookup) -> Tensor:
        rows = table[lookup.indices].view(-1, shape.L, shape.D)
        return rows.sum(1) if mode == "sum" else rows.amax(1)

    contenders = [
        forward("ours", bag(OURS, mode), table, lookups),
        forward("torch", bag(TORCH, mode), table, lookups),
        compiled("torch.compile", bag(TORCH, mode), lambda f: forward("torch.compile", f, table, lookups)),
        compiled("torch.compile, gather", gather, lambda f: forward("torch.compile, gather", f, table, lookups)),
    ]
    group = "EmbeddingBag forward, torch.compile"
    bench.time(group, f"{mode}, {shape}", contenders, bars={}, work=forward_bytes(shape), work_unit="byte")


# --- rows: max and min ---

MAX_SHAPES = [Shape(100_000, 64, 10_000, 20), Shape(1_000_000, 128, 20_000, 20)]
MAX_FORWARD_BAR, MAX_SPARSE_BAR = 14.0, 20.0
MAX_DENSE_BARS = dict(zip(MAX_SHAPES, (6.0, 3.0)))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("shape", MAX_SHAPES, ids=shape_id)
def test_max(bench: Any, shape: Shape, training: bool) -> None:
    table, lookups = table_of(shape.E, shape.D).detach().requires_grad_(training), drawn(shape)
    group = f"EmbeddingBag max, {'forward of training, which keeps what won' if training else 'inference'}"
    bars = {"torch": MAX_FORWARD_BAR}
    plain_row(bench, group, str(shape), table, lookups, "max", forward_bytes(shape), bars=bars)


def test_min(bench: Any) -> None:
    """torch has no min; the peer is the negated max of the negated table."""
    shape = MAX_SHAPES[0]
    table, lookups, torch_max = table_of(shape.E, shape.D), drawn(shape), bag(TORCH, "max")
    turned = -table
    contenders = [
        forward("ours", bag(OURS, "min"), table, lookups),
        forward("torch, -max(-table)", lambda _, x: -torch_max(turned, x), table, lookups),
    ]
    group = "EmbeddingBag min, inference"
    bench.time(group, str(shape), contenders, bars={}, work=forward_bytes(shape), work_unit="byte")


@pytest.mark.parametrize("shape", MAX_SHAPES, ids=shape_id)
def test_max_training(bench: Any, shape: Shape) -> None:
    """Forward and backward."""
    table, lookups = leaf_of(shape), drawn(shape)
    contenders = [
        backward("ours", bag(OURS, "max"), table, lookups, whole=True),
        backward("torch", bag(TORCH, "max"), table, lookups, whole=True),
    ]
    work = forward_bytes(shape) + gradient_bytes(shape, shape.E)
    bars, group = {"torch": MAX_DENSE_BARS[shape]}, "EmbeddingBag max, training, dense gradient"
    bench.time(group, str(shape), contenders, bars=bars, work=work, work_unit="byte")


@pytest.mark.parametrize("shape", MAX_SHAPES, ids=shape_id)
def test_max_training_sparse(bench: Any, shape: Shape) -> None:
    """Forward and backward; torch has no sparse gradient of max."""
    table, lookups = leaf_of(shape), drawn(shape)
    contenders = [
        backward("ours, sparse", bag(OURS, "max", sparse=True), table, lookups, whole=True),
        backward("torch, dense", bag(TORCH, "max"), table, lookups, whole=True),
    ]
    work = forward_bytes(shape) + gradient_bytes(shape, rows_that_occur(lookups))
    contenders[1].work = forward_bytes(shape) + gradient_bytes(shape, shape.E)
    bars, group = {"torch, dense": MAX_SPARSE_BAR}, "EmbeddingBag max, training, our sparse gradient"
    bench.time(group, str(shape), contenders, bars=bars, work=work, work_unit="byte")


# --- rows: backward ---

DENSE_BARS = {Shape(10_000, 64, 2000, 20): 4.0, Shape(100_000, 64, 2000, 20): 2.5}
SPARSE = [
    Shape(10_000, 64, 2048, 20),
    Shape(100_000, 64, 2048, 20),
    Shape(1_000_000, 64, 2048, 20),
    Shape(100_000, 128, 512, 100),
]
SPARSE_BAR = 6.0
FUSED_BAR = 5.0


@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("shape", DENSE_BARS, ids=shape_id)
def test_dense_backward(bench: Any, shape: Shape, mode: str, zipf: bool) -> None:
    table, lookups = leaf_of(shape), drawn(shape, zipf=zipf)
    contenders = [backward(n, bag(f, mode), table, lookups) for n, f in (("ours", OURS), ("torch", TORCH))]
    bars = {"torch": DENSE_BARS[shape]} if mode != "max" and not zipf else {}
    group = f"EmbeddingBag backward, dense gradient, {'Zipf' if zipf else 'uniform'} indices"
    work = gradient_bytes(shape, shape.E)
    bench.time(group, f"{mode}, {shape}", contenders, bars=bars, work=work, work_unit="byte")


@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
@pytest.mark.parametrize("shape", SPARSE, ids=shape_id)
def test_sparse_backward(bench: Any, shape: Shape, zipf: bool) -> None:
    """The gradient of seqkernels is coalesced; that of torch has a row per index and requires coalesce()."""
    table, lookups = leaf_of(shape), drawn(shape, zipf=zipf)

    def as_it_comes(gradient: Tensor) -> Tensor:
        assert gradient.is_coalesced()
        return gradient

    contenders = [
        backward("ours", bag(OURS, "sum", sparse=True), table, lookups, finish=as_it_comes),
        backward("torch + coalesce()", bag(TORCH, "sum", sparse=True), table, lookups, finish=Tensor.coalesce),
    ]
    group = f"EmbeddingBag backward, coalesced sparse gradient, {'Zipf' if zipf else 'uniform'} indices"
    bars = {} if zipf else {contenders[1].name: SPARSE_BAR}
    work = gradient_bytes(shape, rows_that_occur(lookups))
    bench.time(group, f"sum, {shape}", contenders, bars=bars, work=work, work_unit="byte")


@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=shape_id)
def test_weights_backward(bench: Any, shape: Shape) -> None:
    table, lookups = table_of(shape.E, shape.D), drawn(shape, weights="with gradient")
    contenders = [backward(n, bag(f, "sum"), table, lookups) for n, f in (("ours", OURS), ("torch", TORCH))]
    group = "EmbeddingBag backward, gradient of per_sample_weights"
    work = forward_bytes(shape) + 4 * shape.N
    bench.time(group, f"sum, {shape}", contenders, bars={}, work=work, work_unit="byte")


@pytest.mark.parametrize("shape", SPARSE[:3], ids=shape_id)
def test_fused_sgd(bench: Any, shape: Shape) -> None:
    """Backward and the optimiser step."""
    lookups = drawn(shape)
    contenders = optimised(shape, lookups, SGD, whole=False)
    group = "EmbeddingBag backward and SGD"
    work, bars = gradient_bytes(shape, rows_that_occur(lookups), 2), {"torch": FUSED_BAR}
    bench.time(group, f"sum, {shape}", contenders, bars=bars, work=work, work_unit="byte")


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_fused_training(bench: Any, optimizer: Optimizer) -> None:
    """Forward, backward and the optimiser step; the work excludes the states of the optimiser."""
    shape, lookups = MIDDLE, drawn(MIDDLE)
    contenders = optimised(shape, lookups, optimizer, whole=True)
    work = forward_bytes(shape) + gradient_bytes(shape, rows_that_occur(lookups), 2)
    group = f"EmbeddingBag training with its optimiser, sum, {shape}"
    bench.time(group, optimizer.name, contenders, bars={}, work=work, work_unit="byte")


# --- rows: Embedding, quantized tables, collections ---


@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=shape_id)
def test_embedding(bench: Any, shape: Shape) -> None:
    table, lookups = table_of(shape.E, shape.D), drawn(shape)
    functions = {"ours": seqkernels.functional.embedding, "torch": F.embedding}
    contenders = [
        forward(name, lambda table, x, f=f: f(x.indices, table), table, lookups) for name, f in functions.items()
    ]
    work = shape.N * (8.0 * shape.D + INT)
    bench.time("Embedding forward", str(shape), contenders, bars={}, work=work, work_unit="byte")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_embedding_backward(bench: Any, sparse: bool) -> None:
    shape = MIDDLE
    table, lookups = leaf_of(shape), drawn(shape)
    functions = {"ours": seqkernels.functional.embedding, "torch": F.embedding}
    finish = Tensor.coalesce if sparse else lambda gradient: gradient
    contenders = [
        backward(name, lambda table, x, f=f: f(x.indices, table, sparse=sparse), table, lookups, finish=finish)
        for name, f in functions.items()
    ]
    work = gradient_bytes(shape._replace(B=shape.N, L=1), rows_that_occur(lookups) if sparse else shape.E)
    group = f"Embedding backward, {'coalesced sparse' if sparse else 'dense'} gradient"
    bench.time(group, str(shape), contenders, bars={}, work=work, work_unit="byte")


FEW_ROWS = [Shape(5000 if n <= 300 else 50_000, D, n, 1) for n in (1, 44, 300, 3000, 30_000) for D in (8, 64, 256)]
FEW_ROWS_BAR = 0.95
EMBEDDING_OPTIONS = [{}, {"padding_idx": 1}, {"sparse": True}]


@pytest.mark.parametrize("options", EMBEDDING_OPTIONS, ids=str)
@pytest.mark.parametrize("direction", ["inference", "forward of training", "training"])
@pytest.mark.parametrize("shape", FEW_ROWS, ids=shape_id)
def test_embedding_of_few_rows(bench: Any, shape: Shape, direction: str, options: dict[str, Any]) -> None:
    """Calls of the modules, whose overhead counts. training: forward and backward.

    The sparse gradient of torch has a row for each index; that of seqkernels is coalesced.
    """
    table, lookups, contenders = leaf_of(shape), drawn(shape), []
    for name, library in (("ours", seqkernels.nn), ("torch", torch.nn)):
        module = library.Embedding.from_pretrained(table.detach(), freeze=direction == "inference", **options)

        def call(_: Tensor, lookup: Lookup, module: torch.nn.Module = module) -> Tensor:
            return module(lookup.indices)

        if direction == "training":
            contenders.append(backward(name, call, module.weight, lookups, whole=True))
        else:
            calls = ONE_ROW_CALLS if shape.N == 1 else 1
            contenders.append(forward(name, call, module.weight, lookups, calls))
    group = f"Embedding of few rows, {direction}"
    label = ", ".join([f"N={short(shape.N)} D={shape.D}", *(f"{name}={value}" for name, value in options.items())])
    bench.time(group, label, contenders, bars={"torch": FEW_ROWS_BAR}, work=0)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("D", [8, 64, 256])
def test_training_with_one_row(bench: Any, D: int, mode: str, sparse: bool) -> None:
    """Forward and backward of one bag with one row."""
    shape = Shape(5000, D, 1, 1)
    table, lookups = leaf_of(shape), drawn(shape)
    contenders = [
        backward(name, bag(function, mode, sparse=sparse), table, lookups, whole=True)
        for name, function in (("ours", OURS), ("torch", TORCH))
    ]
    group = f"EmbeddingBag, training with one row, {'sparse' if sparse else 'dense'} gradient"
    bench.time(group, f"{mode}, D={D}", contenders, bars={"torch": FEW_ROWS_BAR}, work=0)


@pytest.mark.parametrize("shape", [MIDDLE, LARGE], ids=shape_id)
def test_bytes(bench: Any, shape: Shape) -> None:
    """All contenders use rows quantized by torch, except the last, which uses float32."""
    packed, lookups = torch.ops.quantized.embedding_bag_byte_prepack(table_of(shape.E, shape.D)), drawn(shape)
    wide = packed[:, : shape.D].float() * packed[:, shape.D : shape.D + 4].contiguous().view(torch.float32)
    wide += packed[:, shape.D + 4 :].contiguous().view(torch.float32)

    def ours(packed: Tensor, lookup: Lookup) -> Tensor:
        return seqkernels.functional.embedding_bag_bytes(lookup.indices, packed, lookup.offsets, mode="sum")

    def theirs(packed: Tensor, lookup: Lookup) -> Tensor:
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(packed, lookup.indices, lookup.offsets)

    contenders = [
        forward("ours", ours, packed, lookups),
        forward("torch", theirs, packed, lookups),
        forward("(ours, float32)", bag(OURS, "sum"), wide, lookups),
    ]
    work = float(shape.N * (shape.D + 8 + INT) + shape.B * (4 * shape.D + INT))
    contenders[2].work = forward_bytes(shape)
    group = "EmbeddingBag forward, rows of bytes"
    bench.time(group, f"sum, {shape}", contenders, bars={}, work=work, work_unit="byte")


def collection(B: int) -> tuple[str, list[Shape], list[Tensor], Lookups]:
    """26 tables of 1k to 200k rows with one feature each, as in a click model; bags of 1 to 9 rows."""
    shapes = [Shape(round(1000 * 200 ** (i / 25)), (32, 64)[i % 2], B, 1 + i % 9) for i in range(26)]
    tables = [torch.randn(s.E, s.D, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    return f"26 tables, E=1k..200k D=32, 64 B={B} L=1..9", shapes, tables, drawn_for_tables(shapes)


def table_by_table(tables: Sequence[Tensor], lookup: Lookup, **options: Any) -> Tensor:
    return torch.cat([bag(TORCH, "sum", **options)(table, x) for table, x in zip(tables, lookup.tables)], dim=1)


@pytest.mark.parametrize("B", [32, 512])
def test_collection(bench: Any, B: int) -> None:
    label, shapes, tables, lookups = collection(B)

    def ours(_: Tensor, lookup: Lookup) -> Tensor:
        return seqkernels.functional.embedding_bags(lookup.indices, tables, lookup.bounds, mode="sum")

    contenders = [
        forward("ours", ours, tables[0], lookups),
        forward("torch, a loop and cat", lambda _, x: table_by_table(tables, x), tables[0], lookups),
        fbgemm_forward(tables, lookups),
    ]
    work = sum(map(forward_bytes, shapes))
    group = "EmbeddingBagCollection forward, sum"
    bench.time(group, label, contenders, bars={}, work=work, work_unit="byte")


@pytest.mark.parametrize("B", [32, 512])
def test_collection_training(bench: Any, B: int) -> None:
    """Forward, backward and SGD."""
    label, shapes, tables, lookups = collection(B)
    module = seqkernels.nn.EmbeddingBagCollection(
        [seqkernels.nn.EmbeddingBagConfig(s.E, s.D, [f"feature {i}"]) for i, s in enumerate(shapes)],
        fused_optimizer=SGD.ours(),
    )
    mine, theirs = list(module.parameters()), [table.clone().requires_grad_() for table in tables]
    with torch.no_grad():
        for copy, table in zip(mine, tables):
            copy.copy_(table)
    contenders = [
        optimising("ours, fused", lambda x: module(x.indices, x.bounds), mine, lookups, None, whole=True),
        optimising(
            "torch, a loop and cat",
            lambda x: table_by_table(theirs, x, sparse=True),
            theirs,
            lookups,
            SGD.torch(theirs).step,
            whole=True,
        ),
        fbgemm_optimising(tables, lookups, SGD.fbgemm, whole=True),
    ]
    rows = [rows_that_occur(Lookups([x])) for x in lookups.sets[0].tables]
    work = sum(forward_bytes(s) + gradient_bytes(s, r, 2) for s, r in zip(shapes, rows))
    group = "EmbeddingBagCollection training with SGD, sum"
    bench.time(group, label, contenders, bars={}, work=work, work_unit="byte")


# --- rows: on a GPU ---
# The tables exceed the L2 cache, unless a row says otherwise.

ON_CUDA = [
    Shape(10_000_000, 32, 65_536, 20),
    Shape(10_000_000, 64, 65_536, 20),
    Shape(10_000_000, 128, 65_536, 20),
    Shape(4_000_000, 256, 65_536, 20),
    Shape(10_000_000, 128, 262_144, 3),
]
ON_CUDA_SETS = 4  # sets of indices
COPY_BAR, UPDATE_BAR, ON_CUDA_BAR = 0.8, 0.5, 1.5
COPY = "copy of as many bytes"


@functools.lru_cache(maxsize=1)
def table_on_cuda(E: int, D: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(E, D, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(1))


def drawn_on_cuda(shape: Shape, *, zipf: bool = False, weights: bool = False) -> Lookups:
    generator = torch.Generator("cuda").manual_seed(0)
    bounds = torch.arange(shape.B + 1, device="cuda") * shape.L
    sets = []
    for _ in range(ON_CUDA_SETS):
        indices = torch.randint(shape.E, (shape.N,), generator=generator, device="cuda")
        if zipf:
            draw = torch.rand(shape.N, generator=generator, device="cuda", dtype=torch.float64)
            indices = (torch.exp(draw * math.log(shape.E + 1)).long() - 1).clamp_(0, shape.E - 1)
        w = torch.rand(shape.N, generator=generator, device="cuda") + 0.5 if weights else None
        sets.append(Lookup(indices, bounds[:-1].clone(), bounds, w))
    return Lookups(sets)


def copying(work: float) -> Contender:
    """A copy that reads and writes `work` bytes in total, as the reference of bandwidth shares."""
    source = torch.empty(int(work / 2), device="cuda", dtype=torch.uint8).random_(0, 256)
    target = torch.empty_like(source)
    return Contender(COPY, lambda: target.copy_(source), on_cuda=True)


def time_on_cuda(
    bench: Any, group: str, label: str, contenders: list[Contender], work: float, share: float | None, **more: Any
) -> None:
    """Against torch, and against a copy of the minimum number of bytes."""
    for contender in contenders:
        contender.on_cuda = True
    bars = {"torch": Bar(at_least=ON_CUDA_BAR), COPY: Bar(at_least=share)}
    parity = [(contenders[1], contenders[0])]
    contenders = [*contenders, copying(work)]
    bench.time(group, label, contenders, bars=bars, work=work, work_unit="byte", parity=parity, **more)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "mode"), [*((shape, "sum") for shape in ON_CUDA), (ON_CUDA[2], "max")], ids=shape_id)
def test_forward_on_cuda(bench: Any, shape: Shape, mode: str, dtype: torch.dtype) -> None:
    table, lookups = table_on_cuda(shape.E, shape.D, dtype), drawn_on_cuda(shape)
    contenders = [forward(name, bag(f, mode), table, lookups) for name, f in (("ours", OURS), ("torch", TORCH))]
    name, element = str(dtype).removeprefix("torch."), dtype.itemsize
    wide = shape.D * element >= 128  # minimum bytes per row for the bar
    group = f"EmbeddingBag forward, {name}, on CUDA"
    tolerance = TOLERANCE if dtype == torch.float32 else BFLOAT16_TOLERANCE
    work = forward_bytes(shape, element)
    time_on_cuda(bench, group, f"{mode}, {shape}", contenders, work, COPY_BAR if wide else None, tolerance=tolerance)


@pytest.mark.cuda(turn=2)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted"])
@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
def test_dense_backward_on_cuda(bench: Any, zipf: bool, weighted: bool) -> None:
    shape = Shape(1_000_000, 128, 65_536, 20)
    table = table_on_cuda(shape.E, shape.D, torch.float32).detach().requires_grad_()
    lookups = drawn_on_cuda(shape, zipf=zipf, weights=weighted)
    contenders = [backward(n, bag(f, "sum"), table, lookups) for n, f in (("ours", OURS), ("torch", TORCH))]
    group = f"EmbeddingBag backward, dense gradient, {'Zipf' if zipf else 'uniform'} indices, on CUDA"
    label = f"sum{', weights' if weighted else ''}, {shape}"
    time_on_cuda(bench, group, label, contenders, gradient_bytes(shape, shape.E), None, tolerance=1e-4)


@pytest.mark.cuda(turn=2)
@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
@pytest.mark.parametrize("optimizer", [SGD, OPTIMIZERS[2]], ids=str)
def test_fused_on_cuda(bench: Any, optimizer: Optimizer, zipf: bool) -> None:
    """Backward and the optimiser step, including the sort of the indices."""
    shape = Shape(4_000_000, 128, 65_536, 20)
    table, lookups = table_on_cuda(shape.E, shape.D, torch.float32), drawn_on_cuda(shape, zipf=zipf)
    module = seqkernels.nn.EmbeddingBag.from_pretrained(
        table.clone(), freeze=False, mode="sum", fused_optimizer=optimizer.ours()
    )
    weight, call = table.clone().requires_grad_(), bag(TORCH, "sum", sparse=True)
    step = optimizer.torch([weight]).step
    contenders = [
        optimising("ours, fused", lambda x: module(x.indices, x.offsets), [module.weight], lookups, None, whole=False),
        optimising("torch", lambda x: call(weight, x), [weight], lookups, step, whole=False),
    ]
    work = gradient_bytes(shape, rows_that_occur(lookups), 2)
    group = f"EmbeddingBag backward and {optimizer}, {'Zipf' if zipf else 'uniform'} indices, on CUDA"
    time_on_cuda(bench, group, f"sum, {shape}", contenders, work, UPDATE_BAR, tolerance=1e-4)
