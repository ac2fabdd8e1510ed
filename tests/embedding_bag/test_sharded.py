"""Tables that are DTensors, sharded by rows or columns over two processes, against the whole table in one process."""

from __future__ import annotations

import traceback

import pytest
import torch
from torch import Tensor

from seqkernels import nn
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
    return nn.Embedding(E, D, **options) if mode == "embedding" else nn.EmbeddingBag(E, D, mode=mode, **options)


def given(mode: str, option: str, step: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """Indices [B, L] with repeated and equal rows, weights, and the gradient of the output."""
    g = torch.Generator().manual_seed(step)
    indices = torch.randint(E, (B, L), generator=g)
    indices[0] = 8  # a bag within one block, and a maximum of equal values
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


def sharding_worker(rank: int, folder: str) -> dict[str, object]:
    from torch.distributed.tensor import distribute_module, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, object] = {}
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
