"""FSDP2, tensor parallelism and checkpoints of torch.distributed on all modules, in two processes."""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqkernels
from seqkernels.functional import (
    embedding,
    embedding_bag,
    embedding_bag_bytes,
    embedding_bags,
    quantize_rows,
    scaled_dot_product_attention,
    varlen_attention,
)
from support.workers import run_workers

B, T, E, H, V = 3, 6, 8, 2, 11
close = torch.testing.assert_close
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

ours = seqkernels.nn
MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: ours.LSTM(E, H, 2, bidirectional=True),
    "LSTM with options": lambda: ours.LSTM(E, H, peephole=True, learn_initial_state=True),
    "GRU": lambda: ours.GRU(E, H),
    "RNN": lambda: ours.RNN(E, H),
    "MGU": lambda: ours.MGU(E, H),
    "SLSTM": lambda: ours.SLSTM(E, H),
    "NestedLSTM": lambda: ours.NestedLSTM(E, H),
    "DreamerGRU": lambda: ours.DreamerGRU(E, H),
    "LSTMCell": lambda: ours.LSTMCell(E, H),
    "GRUCell": lambda: ours.GRUCell(E, H),
    "RNNCell": lambda: ours.RNNCell(E, H),
    "MultiheadAttention": lambda: ours.MultiheadAttention(E, H),
    "TransformerEncoderLayer": lambda: ours.TransformerEncoderLayer(E, H, 16, 0.0),
    "TransformerDecoderLayer": lambda: ours.TransformerDecoderLayer(E, H, 16, 0.0),
    "Embedding": lambda: ours.Embedding(V, E, padding_idx=1),
    "EmbeddingBag": lambda: ours.EmbeddingBag(V, E),
    "EmbeddingBag of maxima": lambda: ours.EmbeddingBag(V, E, mode="max"),
    "EmbeddingBagCollection": lambda: ours.EmbeddingBagCollection(
        [ours.EmbeddingBagConfig(V, E, ["a", "b"]), ours.EmbeddingBagConfig(5, 4, ["c"])]
    ),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def loss_of(name: str, module: nn.Module, rank: int) -> Tensor:
    torch.manual_seed(10 + rank)
    x, indices = torch.randn(T, B, E), torch.randint(5, (B, 4))
    if name == "EmbeddingBagCollection":
        given: tuple = ({"a": indices, "b": indices + 1, "c": indices},)
    elif name.startswith("Embedding"):
        given = (indices,)
    elif name == "MultiheadAttention":
        given = x, x, x
    else:
        given = (x, x) if name == "TransformerDecoderLayer" else (x[0] if "Cell" in name else x,)
    outputs = [t for t in torch.utils._pytree.tree_leaves(module(*given)) if isinstance(t, Tensor)]
    return sum(t.square().sum() for t in outputs if t.requires_grad)


def full(t: Tensor | None) -> Tensor | None:
    return t.full_tensor() if isinstance(t, dist.tensor.DTensor) else t


# ---- what the processes do


def fully_sharded(name: str, rank: int) -> list[Tensor]:
    from torch.distributed.fsdp import fully_shard

    module = made(name)
    model = nn.Sequential(module)
    fully_shard(module)
    fully_shard(model)
    loss_of(name, module, rank).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    return [full(p.grad) for p in module.parameters()] + [full(p.detach()) for p in module.parameters()]


def refused_by_fully_shard(options: dict) -> str:
    from torch.distributed.fsdp import fully_shard

    module = ours.EmbeddingBag(V, E, **options)
    fully_shard(module)
    try:
        module(torch.tensor([[1, 2]]))
    except NotImplementedError as error:
        return str(error)
    return "works"


def ignored_by_fully_shard() -> list[Tensor]:
    """A fused table beside a sharded layer."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(ours.EmbeddingBag(V, E, mode="sum", fused_optimizer=ours.FusedSGD(0.1)), nn.Linear(E, 1))
    fully_shard(model, ignored_params={model[0].weight})
    model(torch.tensor([[1, 2]])).sum().backward()
    return [model[0].weight.detach(), full(model[1].weight.grad)]


def tensor_parallel(name: str, rank: int) -> list[Tensor]:
    """The feed-forward block and the output projections of attention."""
    from torch.distributed.tensor import Replicate, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module, mesh = made(name), init_device_mesh("cpu", (2,))
    if name == "Embedding":
        plans: list[dict] = [
            {"": RowwiseParallel(input_layouts=Replicate())},
            {"": ColwiseParallel(output_layouts=Replicate())},
        ]
    else:
        plans = [{"linear1": ColwiseParallel(), "linear2": RowwiseParallel()}]
        plans += [{n: RowwiseParallel(input_layouts=Replicate())} for n, _ in module.named_modules() if "out_proj" in n]
    found: list[Tensor] = []
    for plan in plans:
        model = copy.deepcopy(module)
        if list(plan) == [""]:
            parallelize_module(model, mesh, plan[""])
        else:
            parallelize_module(model, mesh, plan)
        loss_of(name, model, 0).backward()
        found += [full(p.grad) for p in model.parameters()]
    return found


def fused_tensor_parallel() -> list[Tensor]:
    """Tables after a step of a fused optimiser, by rows and by columns."""
    from torch.distributed.tensor import Replicate, init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh, found = init_device_mesh("cpu", (2,)), []
    for style in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
        torch.manual_seed(0)
        module = parallelize_module(ours.Embedding(V, E, fused_optimizer=ours.FusedAdagrad(0.1)), mesh, style)
        loss_of("Embedding", module, 0).backward()
        found.append(module.weight.detach().full_tensor())
    return found


def refusals() -> dict[str, str]:
    """Messages of functions without a sharding rule, for DTensors and for a mixture with plain tensors."""
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))

    def spread(t: Tensor) -> Tensor:
        return distribute_tensor(t, mesh, [Replicate()])

    x, table, indices = torch.randn(T, B, E), torch.randn(V, E), torch.tensor([[1, 2]])
    q = torch.randn(1, 2, 4, E)
    packed = torch.randn(4, 2, E)
    calls: dict[str, Callable[[], object]] = {}
    for name in ("LSTM", "GRU", "RNN", "MGU", "SLSTM", "NestedLSTM", "DreamerGRU", "LSTMCell", "GRUCell", "RNNCell"):
        given = x[0] if "Cell" in name else x
        module = distribute_module(made(name), mesh)
        calls |= {name: lambda m=module, g=given: m(spread(g)), f"{name}, mixed": lambda m=module, g=given: m(g)}
    calls |= {
        "LSTM, mixed hx": lambda: made("LSTM")(x, tuple(spread(torch.zeros(4, B, H)) for _ in range(2))),
        "scaled_dot_product_attention": lambda: scaled_dot_product_attention(*[spread(q)] * 3),
        "scaled_dot_product_attention, mixed": lambda: scaled_dot_product_attention(q, spread(q), q),
        "scaled_dot_product_attention, mixed mask": lambda: scaled_dot_product_attention(
            q, q, q, spread(torch.ones(4, 4).bool())
        ),
        "varlen_attention": lambda: varlen_attention(*[spread(packed)] * 3, spread(torch.tensor([0, 4]))),
        "varlen_attention, mixed": lambda: varlen_attention(*[spread(packed)] * 3, torch.tensor([0, 4])),
        "embedding, mixed": lambda: embedding(indices, spread(table)),
        "embedding, mixed table": lambda: embedding(spread(indices), table),
        "embedding_bag, mixed": lambda: embedding_bag(indices, spread(table)),
        "embedding_bag, mixed table": lambda: embedding_bag(spread(indices), table),
        "embedding_bag, mixed offsets": lambda: embedding_bag(
            spread(indices[0]), spread(table), torch.tensor([0]), mode="sum"
        ),
        "embedding_bags": lambda: embedding_bags(spread(indices[0]), [spread(table)], spread(torch.tensor([0, 2]))),
        "embedding_bag_bytes": lambda: embedding_bag_bytes(spread(indices), spread(quantize_rows(table))),
        "quantize_rows": lambda: quantize_rows(spread(table)),
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = f"returned {type(call()).__name__}"
        except NotImplementedError as error:
            found[name] = str(error)
        except Exception:
            found[name] = traceback.format_exc()
    return found


def checkpoints(folder: str) -> list[Tensor]:
    """Saves a table sharded by rows with the state of its optimiser, and loads it by columns, and without shards."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (2,))

    def sharded(dim: int) -> nn.Module:
        def partition(name: str, module: nn.Module, mesh) -> None:
            for key, p in list(module._parameters.items()):
                module.register_parameter(key, nn.Parameter(distribute_tensor(p, mesh, [Shard(dim)])))

        module = ours.EmbeddingBag(V, E, mode="sum", fused_optimizer=ours.FusedAdam(lr=0.1))
        return distribute_module(module, mesh, partition)

    def step(module: nn.Module) -> Tensor:
        indices = distribute_tensor(torch.tensor([[1, 2, 9], [9, 9, 10]]), mesh, [Replicate()])
        module(indices).full_tensor().square().sum().backward()
        return module.weight.detach().full_tensor()

    torch.manual_seed(0)
    first = sharded(0)
    step(first)
    dcp.save(first.state_dict(), checkpoint_id=f"{folder}/tables")
    second = sharded(1)
    state = second.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/tables")
    second.load_state_dict(state)
    rows = ours.RowShardedEmbeddingBag(V, E, mode="sum", fused_optimizer=ours.FusedAdam(lr=0.1))
    state = rows.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/tables")
    rows.load_state_dict(state)
    plain = ours.EmbeddingBag(V, E, mode="sum", fused_optimizer=ours.FusedAdam(lr=0.1))
    state = plain.state_dict()
    dcp.load(state, checkpoint_id=f"{folder}/tables")
    plain.load_state_dict(state)
    before = [full(t.detach()).clone() for m in (first, second, rows, plain) for t in m.state_dict().values()]
    return [*before, step(first), step(second)]


def data_parallel(name: str, options: dict, rank: int) -> list[Tensor] | str:
    """Two steps in DistributedDataParallel."""
    torch.manual_seed(0)
    model = nn.Sequential(getattr(ours, name)(V, E, **options), nn.Linear(E, 1))
    model = nn.parallel.DistributedDataParallel(model)
    try:
        for _ in range(2):
            model(torch.tensor([[1, 2 + rank]])).sum().backward()
    except RuntimeError as error:
        return str(error)
    return [p.grad.to_dense() for p in model.parameters()]


def work(rank: int, folder: str) -> dict[str, object]:
    warnings.simplefilter("ignore")
    jobs: dict[str, Callable[[], object]] = {
        **{f"fsdp {name}": lambda name=name: fully_sharded(name, rank) for name in MODULES},
        "fsdp fused": lambda: refused_by_fully_shard(dict(fused_optimizer=ours.FusedSGD(0.1))),
        "fsdp max_norm": lambda: refused_by_fully_shard(dict(max_norm=1.0)),
        "fsdp sparse": lambda: refused_by_fully_shard(dict(sparse=True)),
        "ddp fused": lambda: data_parallel("EmbeddingBag", dict(fused_optimizer=ours.FusedSGD(0.1)), rank),
        "fsdp ignored": ignored_by_fully_shard,
        **{f"tp {name}": lambda name=name: tensor_parallel(name, rank) for name in PARALLEL},
        "tp fused": fused_tensor_parallel,
        "refusals": refusals,
        "checkpoints": lambda: checkpoints(folder),
    }
    found: dict[str, object] = {}
    for name, job in jobs.items():
        try:
            found[name] = job()
        except Exception:  # continue with the other jobs
            found[name] = traceback.format_exc()
    return found


PARALLEL = "TransformerEncoderLayer", "TransformerDecoderLayer", "Embedding"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """The results of both processes, by job."""
    return run_workers(work, tmp_path_factory.mktemp("distributed"))


def of_both(found: list[dict], job: str) -> list:
    for worker in found:
        assert "Traceback" not in worker[job], worker[job]
    return [worker[job] for worker in found]


# ---- what they must have found


@pytest.mark.parametrize("name", MODULES)
def test_fully_shard_matches_one_process(name: str, found: list[dict]) -> None:
    """The gradients are means over the processes; the parameters are those after a step."""
    alone = made(name)
    (sum(loss_of(name, alone, rank) for rank in range(2)) / 2).backward()
    grads = [p.grad for p in alone.parameters()]
    torch.optim.SGD(alone.parameters(), 0.1).step()
    for results in of_both(found, f"fsdp {name}"):
        for got, want in zip(results, [*grads, *alone.parameters()], strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                close(got, want.detach())


def test_fully_shard_refuses_writes_into_tables_and_sparse_gradients(found: list[dict]) -> None:
    """Writes would be lost with the gathered table."""
    wanted = {"fused": "fused_optimizer must be None", "max_norm": "max_norm must be None", "sparse": "must be False"}
    for job, option in wanted.items():
        for message in of_both(found, f"fsdp {job}"):
            assert f"{option} with fully_shard" in message, message


def test_data_parallel_refuses_fused_tables(found: list[dict]) -> None:
    """Each process would update its own copy of the table."""
    for message in of_both(found, "ddp fused"):
        assert message.startswith("EmbeddingBag: fused_optimizer must be None in DistributedDataParallel"), message


def test_fused_tables_beside_fully_sharded_layers(found: list[dict]) -> None:
    torch.manual_seed(0)
    table, linear = ours.EmbeddingBag(V, E), nn.Linear(E, 1)
    rows = table.weight[1] + table.weight[2]
    want = table.weight.detach().clone()
    want[[1, 2]] -= 0.1 * linear.weight.detach()
    for got, grad in of_both(found, "fsdp ignored"):
        close(got, want)
        close(grad, rows.detach().unsqueeze(0))


@pytest.mark.parametrize("name", PARALLEL)
def test_tensor_parallel_matches_one_process(name: str, found: list[dict]) -> None:
    alone = made(name)
    loss_of(name, alone, 0).backward()
    grads = [p.grad for p in alone.parameters()]
    for results in of_both(found, f"tp {name}"):
        plans = len(results) // len(grads)
        assert plans == {"TransformerEncoderLayer": 2, "TransformerDecoderLayer": 3, "Embedding": 2}[name]
        for got, want in zip(results, grads * plans, strict=True):
            close(got, want)


def test_fused_tables_in_tensor_parallel(found: list[dict]) -> None:
    torch.manual_seed(0)
    alone = ours.Embedding(V, E, fused_optimizer=ours.FusedAdagrad(0.1))
    loss_of("Embedding", alone, 0).backward()
    for tables in of_both(found, "tp fused"):
        for got in tables:
            close(got, alone.weight.detach())


def test_dtensors_without_a_sharding_rule_are_refused_by_name(found: list[dict]) -> None:
    for messages in of_both(found, "refusals"):
        for name, message in messages.items():
            assert message.startswith(f"{name.split(',')[0]}: "), message
            assert "DTensor" in message and "Traceback" not in message, message


def test_checkpoints_of_sharded_tables(found: list[dict]) -> None:
    """weight, exp_avg, exp_avg_sq and step of four modules, and the tables after another step."""
    for results in of_both(found, "checkpoints"):
        *states, first, second = results
        assert len(states) == 16 and states[3] == 1
        for i in range(4):
            assert all(torch.equal(states[i], states[j + i]) for j in (4, 8, 12))
        close(first, second)
        assert not torch.equal(first, states[0])
