"""Tables that are DTensors, sharded by rows or columns over two processes, against the whole table in one process."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import Tensor

from seqkernels import nn
from seqkernels.functional import embedding, embedding_bag
from support.workers import run_workers

E, D, B, L = 11, 6, 4, 5
close = torch.testing.assert_close
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")

OPTIONS = {
    "plain": {},
    "weights": {},
    "weight norm": dict(weight_norm="weight"),
    "padding": dict(padding_idx=-3),
    "frequency": dict(scale_grad_by_freq=True),
    "max_norm": dict(max_norm=1.5),
    "FusedSGD": dict(fused_optimizer=nn.FusedSGD(lr=0.1)),
    "FusedAdagrad": dict(fused_optimizer=nn.FusedAdagrad(lr=0.1, lr_decay=0.1)),
    "FusedRowwiseAdagrad": dict(fused_optimizer=nn.FusedRowwiseAdagrad(lr=0.1)),
    "FusedAdam": dict(fused_optimizer=nn.FusedAdam(lr=0.1)),
}
PLACEMENTS = "rows", "columns", "batch"
BY_ROWS_ONLY = "max_norm", "FusedRowwiseAdagrad"  # they need whole rows
CASES = [
    (mode, option, placement)
    for mode in ("embedding", "sum", "mean", "max", "min")
    for option in OPTIONS
    for placement in PLACEMENTS
    if not (mode == "embedding" and "weight" in option)
    and not (placement == "columns" and option in BY_ROWS_ONLY)
    and not (mode == "min" and option != "weights")  # as max
]


def made(mode: str, option: str) -> torch.nn.Module:
    options = dict(OPTIONS[option], dtype=torch.float64)
    torch.manual_seed(1)
    module = nn.Embedding(E, D, **options) if mode == "embedding" else nn.EmbeddingBag(E, D, mode=mode, **options)
    with torch.no_grad():
        module.weight[9] = module.weight[2]  # equal maxima in two blocks
    return module


def given(mode: str, option: str, step: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Indices [B, L] with repeated and equal rows, weights, and the gradient of the output."""
    g = torch.Generator().manual_seed(step)
    indices = torch.randint(E, (B, L), generator=g)
    indices[0] = 8  # a bag within one block
    indices[1] = torch.tensor([9, 2, 9, 2, 9])
    indices[2, :2] = torch.tensor([2, 9])
    weights = torch.rand(B, L, dtype=torch.float64, generator=g) + 0.1 if "weight" in option else None
    shape = (B, L, D) if mode == "embedding" else (B, D)
    return indices, weights, torch.randn(shape, dtype=torch.float64, generator=g)


def trained(module: torch.nn.Module, mode: str, option: str, mesh=None, batch: bool = False) -> list[Tensor | None]:
    """Two steps: outputs, gradients of weights, gradient of the table, table and states."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    def spread(t: Tensor | None) -> Tensor | None:
        if t is None or mesh is None:
            return t
        return distribute_tensor(t, mesh, [Shard(0) if batch else Replicate()])

    def whole(t: Tensor | None) -> Tensor | None:
        return t.full_tensor() if isinstance(t, DTensor) else t

    found: list[Tensor | None] = []
    for step in range(2):
        indices, weights, upstream = given(mode, option, step)
        weights = None if weights is None else spread(weights).requires_grad_()
        output = module(spread(indices)) if weights is None else module(spread(indices), None, weights)
        whole_output = whole(output)
        whole_output.backward(upstream)
        found += [whole_output.detach(), whole(None if weights is None else weights.grad)]
    grad = module.weight.grad
    return [*found, whole(grad), *(whole(t.detach()) for t in (module.weight, *module.buffers()))]


def rows_or_columns(dim: int | None):
    """A partition function of distribute_module."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def partition(name: str, module: torch.nn.Module, mesh) -> None:
        for of_module, weight in list(module._parameters.items()):
            placement = Replicate() if dim is None else Shard(dim)
            module.register_parameter(of_module, torch.nn.Parameter(distribute_tensor(weight, mesh, [placement])))

    return partition


def two_dimensions(rank: int) -> list[Tensor]:
    """Rows over one dimension of a mesh, and the batch or columns over the other, of size 1."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    table, indices = torch.randn(E, D), torch.randint(E, (B, L))
    found = []
    for sizes, of_table, of_input in (
        ((2, 1), [Shard(0), Shard(1)], [Replicate(), Replicate()]),
        ((1, 2), [Replicate(), Shard(0)], [Shard(0), Replicate()]),
        ((2, 1), [Shard(0), Shard(0)], [Shard(0), Replicate()]),
    ):
        mesh = init_device_mesh("cpu", sizes)
        weight = distribute_tensor(table, mesh, of_table).requires_grad_()
        output = embedding_bag(distribute_tensor(indices, mesh, of_input), weight, mode="sum").full_tensor()
        output.square().sum().backward()
        found += [output.detach(), weight.grad.full_tensor()]
    return found


def bags_with_offsets() -> list[Tensor]:
    """1-D indices with int32 offsets, an empty bag and indices beyond the last bag, in bfloat16."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    mesh, found = init_device_mesh("cpu", (2,)), []
    table, indices = torch.randn(E, D, dtype=torch.bfloat16), torch.randint(E, (9,), dtype=torch.int32)
    for dim in (0, 1):
        weight = distribute_tensor(table, mesh, [Shard(dim)])
        spread = [distribute_tensor(t, mesh, [Replicate()]) for t in (indices, torch.tensor([0, 3, 3, 8]).int())]
        found.append(embedding_bag(spread[0], weight, spread[1], mode="max", include_last_offset=True).full_tensor())
    return found


def bits_by_threads() -> dict[str, list[list[Tensor]]]:
    """Outputs and gradients of wide tables: several calls, each with another number of threads."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.manual_seed(0)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    table, indices = torch.randn(E, 4096), torch.randint(E, (40, L))
    for mode in ("sum", "mean", "max"):
        for name, dim in (("rows", 0), ("columns", 1)):
            runs = found[f"{mode} {name}"] = []
            for threads in (1, 1, 2, 3, 4):
                torch.set_num_threads(threads)
                weight = distribute_tensor(table, mesh, [Shard(dim)]).requires_grad_()
                spread = distribute_tensor(indices, mesh, [Replicate()])
                output = embedding_bag(spread, weight, mode=mode).full_tensor()
                output.sin().sum().backward()
                runs.append([output.detach(), weight.grad.full_tensor()])
    torch.set_num_threads(1)
    return found


def errors(rank: int) -> dict[str, str]:
    from torch.distributed.tensor import (
        DTensor,
        Partial,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2,))
    table = torch.randn(E, D)
    rows, columns = (distribute_tensor(table, mesh, [Shard(dim)]).requires_grad_() for dim in (0, 1))
    partial = DTensor.from_local(table, mesh, [Partial()])

    def spread(values: object) -> Tensor:
        return distribute_tensor(torch.tensor(values), mesh, [Replicate()])

    def stepped() -> None:
        module = nn.EmbeddingBag(E, D, fused_optimizer=nn.FusedRowwiseAdagrad())
        distribute_module(module, mesh, rows_or_columns(1))(spread([[1]]))

    def in_one_process() -> None:
        module = nn.RowShardedEmbeddingBag(E, D)
        module(torch.tensor([[1, E if rank == 1 else 0]]))

    calls = {
        "sparse": lambda: embedding_bag(spread([[1]]), rows, sparse=True),
        "max_norm": lambda: embedding_bag(spread([[1]]), columns, max_norm=1.0),
        "max_norm of embedding": lambda: embedding(spread([1]), columns, max_norm=1.0),
        "partial": lambda: embedding(spread([1]), partial),
        "range": lambda: embedding(spread([1, E]), rows),
        "range of bags": lambda: embedding_bag(spread([[1, -1]]), rows),
        "offsets": lambda: embedding_bag(spread([1, 2]), rows, spread([0, 2, 1])),
        "weights": lambda: embedding_bag(spread([[1]]), rows, per_sample_weights=torch.ones(1, 1), mode="sum"),
        "stepped": stepped,
        "sparse rows": lambda: nn.RowShardedEmbeddingBag(E, D, sparse=True),
        "one process": in_one_process,
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
            found[name] = "no error"
        except (NotImplementedError, ValueError, IndexError, RuntimeError) as error:
            found[name] = f"{type(error).__name__} {error}"
    return found


def sharding_worker(rank: int, folder: str) -> dict[str, object]:
    from torch.distributed.tensor import distribute_module, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, object] = {
        "errors": errors(rank), "two dimensions": two_dimensions(rank), "offsets": bags_with_offsets(),
        "bits": bits_by_threads(),
    }  # fmt: skip
    for mode, option, placement in CASES:
        try:
            dim = {"rows": 0, "columns": 1, "batch": None}[placement]
            module = distribute_module(made(mode, option), mesh, rows_or_columns(dim))
            found[f"{mode} {option} {placement}"] = trained(module, mode, option, mesh, placement == "batch")
        except Exception:  # continue with the other cases
            found[f"{mode} {option} {placement}"] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    return run_workers(sharding_worker, tmp_path_factory.mktemp("sharded"))


@pytest.mark.parametrize("mode, option, placement", CASES, ids=lambda v: v)
def test_sharded_tables_match_one_process(mode: str, option: str, placement: str, sharded: list) -> None:
    alone = trained(made(mode, option), mode, option)
    for worker in sharded:
        results = worker[f"{mode} {option} {placement}"]
        assert not isinstance(results, str), results
        for got, want in zip(results, alone, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                close(got, want)


def test_meshes_of_two_dimensions(sharded: list) -> None:
    torch.manual_seed(0)
    table, indices = torch.randn(E, D).requires_grad_(), torch.randint(E, (B, L))
    output = embedding_bag(indices, table, mode="sum")
    output.square().sum().backward()
    for worker in sharded:
        for got, want in zip(worker["two dimensions"], [output.detach(), table.grad] * 3, strict=True):
            close(got, want)


def test_sharded_tables_with_offsets(sharded: list) -> None:
    torch.manual_seed(0)
    table, indices = torch.randn(E, D, dtype=torch.bfloat16), torch.randint(E, (9,), dtype=torch.int32)
    want = embedding_bag(indices, table, torch.tensor([0, 3, 3, 8]), mode="max", include_last_offset=True)
    for worker in sharded:
        for got in worker["offsets"]:
            assert torch.equal(got, want)


def test_bits_are_independent_of_threads(sharded: list) -> None:
    for worker in sharded:
        for name, (first, *others) in worker["bits"].items():
            for other in others:
                assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), name
            assert all(torch.equal(a, b) for a, b in zip(first, sharded[0]["bits"][name][0])), name


ERRORS = {
    "sparse": "NotImplementedError embedding_bag: sparse must be False where weight is a DTensor",
    "max_norm": "NotImplementedError embedding_bag: max_norm must be None where the columns of weight are sharded",
    "max_norm of embedding": "NotImplementedError embedding: max_norm must be None where the columns of weight are",
    "partial": "NotImplementedError embedding: weight must be replicated or sharded, got the placement P",
    "range": "IndexRuntimeError embedding: input must hold indices in [0, 11), got 11 at position 1",
    "range of bags": "IndexRuntimeError embedding_bag: input must hold indices in [0, 11), got -1 at position 1",
    "offsets": "ValueRuntimeError embedding_bag: offsets must begin with 0 and neither decrease nor exceed",
    "weights": "NotImplementedError embedding_bag: per_sample_weights must be a DTensor where weight is one, got",
    "stepped": "NotImplementedError EmbeddingBag: FusedRowwiseAdagrad must have whole rows, got columns sharded",
    "sparse rows": "NotImplementedError RowShardedEmbeddingBag: sparse must be False",
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_sharded_tables(name: str, sharded: list) -> None:
    for worker in sharded:
        assert worker["errors"][name].startswith(ERRORS[name])


def test_an_error_in_one_process_is_raised_in_all(sharded: list) -> None:
    first, second = (worker["errors"]["one process"] for worker in sharded)
    wanted = "RowShardedEmbeddingBag: the arguments must fit in every process, got an error in process 1"
    assert first == f"RuntimeError {wanted}"
    assert second.startswith("IndexRuntimeError RowShardedEmbeddingBag: input must hold indices in [0, 11), got 11")
