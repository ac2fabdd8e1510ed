"""EmbeddingBag, Embedding and related modules with other parts of torch.

Modules and their files, compile, export, torch.func, autograd.functional, nested tensors, optimisers, collections,
sharding over two processes, quantized tables.

Dimensions: E table rows, D columns, N indices, B bags, L indices of one bag, F features.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools
import math
import pickle
import shutil
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations, parametrize

from seqkernels import functional, nn, reference
from support.cases import BAG_MODES, DTYPES, assert_same_bits
from support.workers import run_workers

# torch.optim warns once per process for sparse gradients.
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")

E, D = 12, 6
modes = pytest.mark.parametrize("mode", BAG_MODES)
torchs_modes = pytest.mark.parametrize("mode", ["sum", "mean", "max"])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-12)
float32 = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)


def lookups(lengths: Iterable[int], rows: int = E, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices and offsets of bags of the given lengths."""
    lengths = list(lengths)
    g = torch.Generator().manual_seed(seed)
    starts = [0, *itertools.accumulate(lengths)][:-1]
    return torch.randint(0, rows, (sum(lengths),), generator=g), torch.tensor(starts, dtype=torch.int64)


def same(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    got, want = dict(enumerate(got)), dict(enumerate(want))
    assert got.keys() == want.keys()
    assert_same_bits(got, want)


def upstream_like(t: Tensor, seed: int = 9) -> Tensor:
    return torch.randn(t.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(t.dtype)


def trained(module: torch.nn.Module, *arguments) -> list[Tensor]:
    """Output and gradients of parameters and floating-point arguments."""
    arguments, wanted = list(arguments), list(module.parameters())
    for i, a in enumerate(arguments):
        if isinstance(a, Tensor) and a.is_floating_point():
            arguments[i] = a.detach().requires_grad_()
            wanted.append(arguments[i])
    output = module(*arguments)
    grads = torch.autograd.grad(output, wanted, upstream_like(output))
    return [output.detach(), *(g.to_dense() if g.is_sparse else g for g in grads)]


@pytest.fixture(autouse=True)
def one_thread(threads: None) -> None:
    """The default, because parallel loops may stall for milliseconds beside another busy process."""
    torch.set_num_threads(1)


# ---- modules

BAGS = [
    dict(),
    dict(mode="sum"),
    dict(mode="max", padding_idx=3),
    dict(mode="sum", include_last_offset=True, padding_idx=-1),
    dict(mode="mean", max_norm=1.0, norm_type=1.0),
    dict(mode="sum", sparse=True, scale_grad_by_freq=False),
    dict(scale_grad_by_freq=True),
]
EMBEDDINGS = [
    dict(),
    dict(padding_idx=2),
    dict(padding_idx=-1, sparse=True),
    dict(max_norm=1.0),
    dict(scale_grad_by_freq=True),
]
MODULES = [("EmbeddingBag", a) for a in BAGS] + [("Embedding", a) for a in EMBEDDINGS]
modules = pytest.mark.parametrize(
    "name, arguments", MODULES, ids=[f"{n}-{'-'.join(f'{k}={v}' for k, v in a.items())}" for n, a in MODULES]
)


def pair(name: str, seed: int = 0, **arguments) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Modules of seqkernels and torch with the same seed."""
    made = []
    for package in (nn, torch.nn):
        torch.manual_seed(seed)
        made.append(getattr(package, name)(E, D, **arguments))
    return made[0], made[1]


@modules
def test_parameters_repr_and_state_dict_match_torch(name: str, arguments: dict) -> None:
    ours, theirs = pair(name, **arguments)
    assert torch.equal(ours.weight, theirs.weight) and repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight"]
    for attribute in type(theirs).__constants__:
        assert getattr(ours, attribute) == getattr(theirs, attribute)
    torch.manual_seed(5)
    ours.reset_parameters()
    torch.manual_seed(5)
    theirs.reset_parameters()
    assert torch.equal(ours.weight, theirs.weight)
    other = pair(name, seed=1, **arguments)
    other[0].load_state_dict(theirs.state_dict())
    other[1].load_state_dict(ours.state_dict())
    assert torch.equal(other[0].weight, other[1].weight)


@pytest.mark.parametrize("name", ["EmbeddingBag", "Embedding"])
def test_signatures_begin_with_the_arguments_of_torch(name: str) -> None:
    for ours, theirs in (
        (getattr(nn, name), getattr(torch.nn, name)),
        (getattr(nn, name).from_pretrained, getattr(torch.nn, name).from_pretrained),
        (getattr(nn, name).forward, getattr(torch.nn, name).forward),
        (functional.embedding_bag, torch.nn.functional.embedding_bag),
        (functional.embedding, torch.nn.functional.embedding),
    ):
        mine, his = (list(inspect.signature(f).parameters.values()) for f in (ours, theirs))
        assert [p.name for p in mine[: len(his)]] == [p.name for p in his]
        assert all(p.default == q.default for p, q in zip(mine, his))
        assert all(p.kind is p.KEYWORD_ONLY for p in mine[len(his) :])


@modules
def test_results_match_torch(name: str, arguments: dict) -> None:
    """Excludes scale_grad_by_freq of bags, which is wrong in torch; see test_torch_bugs.py."""
    ours, theirs = pair(name, **arguments, dtype=torch.float64)
    rows, offsets = lookups([3, 0, 4, 1])
    calls = [(rows.view(4, 2),), (rows.view(4, 2).int(),)]
    if name == "EmbeddingBag":
        offsets = torch.cat([offsets, torch.tensor([8])]) if arguments.get("include_last_offset") else offsets
        calls += [(rows, offsets)]
    if name == "EmbeddingBag" and arguments.get("mode") == "sum":
        weights = torch.randn(8, dtype=torch.float64)
        calls += [(rows, offsets, weights), (rows.view(4, 2), None, weights.view(4, 2))]
    for call in calls:
        got, want = trained(ours, *call), trained(theirs, *call)
        if arguments == dict(scale_grad_by_freq=True) and name == "EmbeddingBag":
            got, want = got[:1], want[:1]
        close(got, want)
        close(ours.weight, theirs.weight)  # max_norm modifies the table


@modules
def test_from_pretrained_matches_torch(name: str, arguments: dict) -> None:
    table = torch.randn(E, D)
    for freeze in (True, False):
        ours, theirs = (getattr(p, name).from_pretrained(table, freeze, **arguments) for p in (nn, torch.nn))
        assert ours.weight.requires_grad == theirs.weight.requires_grad == (not freeze)
        assert ours.weight.data_ptr() == table.data_ptr() and repr(ours) == repr(theirs)
        rows = torch.randint(0, E, (3, 2))
        if "max_norm" not in arguments:
            float32(ours(rows), theirs(rows))


@modules
def test_copies_of_a_module(name: str, arguments: dict, tmp_path: Path) -> None:
    module, _ = pair(name, **arguments)
    rows = torch.randint(0, E, (3, 2))
    torch.save(module, tmp_path / "module.pt")
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    filled, _ = pair(name, seed=1, **arguments)
    filled.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, filled):
        assert repr(other) == repr(module) and other.weight.data_ptr() != module.weight.data_ptr()
        same(trained(other, rows), trained(copy.deepcopy(module), rows))


def test_conversion_of_device_and_dtype() -> None:
    module, rows = nn.EmbeddingBag(E, D, mode="max", padding_idx=1), torch.randint(0, E, (3, 2))
    want = module(rows)
    assert module.bfloat16()(rows).dtype == torch.bfloat16 and module.double()(rows).dtype == torch.float64
    torch.testing.assert_close(module.float()(rows), want, rtol=1e-2, atol=1e-2)
    meta = nn.EmbeddingBag(E, D, device="meta")
    assert meta(rows.to("meta")).shape == (3, D) and meta(rows.to("meta")).device.type == "meta"
    assert nn.Embedding(E, D, device="meta")(rows.to("meta")).shape == (3, 2, D)
    assert nn.EmbeddingBag(E, D, dtype=torch.float16).weight.dtype == torch.float16
    assert not nn.EmbeddingBag(E, D, padding_idx=4).weight[4].any()


@torchs_modes
def test_functional_form_in_torch_module(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.EmbeddingBag with the functional form of seqkernels."""
    module, (rows, offsets) = torch.nn.EmbeddingBag(E, D, mode=mode), lookups([3, 0, 2])
    want = trained(module, rows, offsets)
    called = []

    def ours(*arguments, **keywords) -> Tensor:
        called.append(mode)
        return functional.embedding_bag(*arguments, **keywords)

    monkeypatch.setattr(torch.nn.functional, "embedding_bag", ours)
    float32(trained(module, rows, offsets), want)
    assert called == [mode]


@modes
def test_module_matches_functional(mode: str) -> None:
    rows, offsets = lookups([3, 0, 4, 1])
    weights = torch.rand(8) + 0.1
    for norm, last in itertools.product(("count", "weight"), (False, True)):
        module = nn.EmbeddingBag(E, D, mode=mode, weight_norm=norm, include_last_offset=last, padding_idx=2)
        want = functional.embedding_bag(
            rows, module.weight, offsets, mode=mode, per_sample_weights=weights, weight_norm=norm,
            include_last_offset=last, padding_idx=2,
        )  # fmt: skip
        assert torch.equal(module(rows, offsets, weights), want)


# ---- nested tensors


def jagged(lengths: Iterable[int], make: Callable[[int], Tensor]) -> Tensor:
    return torch.nested.nested_tensor([make(n) for n in lengths], layout=torch.jagged)


@modes
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weights"])
def test_nested_tensor_as_bags(weighted: bool, mode: str) -> None:
    rows = jagged([3, 1, 0, 4], lambda n: torch.randint(0, E, (n,)))
    weights = torch.nested.nested_tensor_from_jagged(torch.randn(8), rows.offsets()) if weighted else None
    module = nn.EmbeddingBag(E, D, mode=mode, padding_idx=2)
    got = module(rows, per_sample_weights=weights)
    flat = functional.embedding_bag(
        rows.values(), module.weight, rows.offsets(), mode=mode, include_last_offset=True, padding_idx=2,
        per_sample_weights=weights.values() if weighted else None,
    )  # fmt: skip
    assert got.shape == (4, D) and torch.equal(got, flat)
    if mode != "min" and not (weighted and mode != "sum"):
        theirs = torch.nn.EmbeddingBag.from_pretrained(module.weight.detach(), mode=mode, padding_idx=2)
        float32(got, theirs(rows, per_sample_weights=weights))
    got.sum().backward()
    assert module.weight.grad.isfinite().all()


def test_nested_embedding() -> None:
    rows = jagged([3, 1, 4], lambda n: torch.randint(0, E, (n,)))
    module = nn.Embedding(E, D)
    got = module(rows)
    assert got.is_nested and torch.equal(got.values(), module.weight[rows.values()])
    assert torch.equal(got.offsets(), rows.offsets())
    got.values().sum().backward()
    assert torch.equal(module.weight.grad[:, 0], torch.bincount(rows.values(), minlength=E).float())


# ---- torch.compile


class Call(torch.nn.Module):
    """A bag as a module, in each form of input: offsets, include_last_offset, 2-D; with and without weights."""

    def __init__(self, form: str, **options) -> None:
        super().__init__()
        self.form, self.bag = form, nn.EmbeddingBag(E, D, include_last_offset=form == "last", **options)

    def forward(self, rows: Tensor, offsets: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        return self.bag(rows, offsets, weights)


FORMS = ("offsets", "last", "2-D")


def call_arguments(form: str, weighted: bool, B: int, L: int) -> tuple[Tensor | None, ...]:
    if form == "2-D":
        rows, offsets = torch.randint(0, E, (B, L)), None
    else:
        rows, offsets = lookups([L + b % 3 for b in range(B)])
        offsets = torch.cat([offsets, torch.tensor([len(rows)])]) if form == "last" else offsets
    return rows, offsets, torch.randn(rows.shape) if weighted else None


def whole(function: Callable, backend: str = "aot_eager") -> Callable:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weights"])
@pytest.mark.parametrize("form", FORMS)
def test_compile_with_dynamic_sizes(form: str, weighted: bool, mode: str) -> None:
    module = Call(form, mode=mode, padding_idx=2)
    compiled = whole(module)
    for B, L in [(3, 4), (5, 2), (9, 7), (2, 3)]:
        arguments = call_arguments(form, weighted, B, L)
        same(trained(compiled, *arguments), trained(module, *arguments))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    with torch.no_grad():
        assert torch.equal(compiled(*arguments), module(*arguments))


def test_compile_with_inductor() -> None:
    if not shutil.which("c++") and not shutil.which("g++"):
        pytest.skip("no C++ compiler: neither c++ nor g++ is on the path")
    module, arguments = Call("offsets", mode="max"), call_arguments("offsets", True, 4, 3)

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *arguments: Tensor) -> Tensor:
            return self.inner(*arguments).relu() * 2

    wrapped = Wrapped()
    float32(trained(whole(wrapped, "inductor"), *arguments), trained(wrapped, *arguments))


@pytest.mark.parametrize("options", [dict(scale_grad_by_freq=True), dict(mode="sum", max_norm=1.0)], ids=str)
def test_compile_with_options(options: dict) -> None:
    module = Call("offsets", **options)
    arguments = call_arguments("offsets", False, 4, 3)
    other = copy.deepcopy(module)
    same(trained(whole(module), *arguments), trained(other, *arguments))
    assert torch.equal(module.bag.weight, other.bag.weight)


def test_compile_embedding() -> None:
    module, rows = nn.Embedding(E, D, padding_idx=1), torch.randint(0, E, (4, 3))
    same(trained(whole(module), rows), trained(module, rows))


# ---- torch.export


@pytest.mark.parametrize("mode", ["mean", "max"])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weights"])
@pytest.mark.parametrize("form", FORMS)
def test_export_with_dynamic_sizes_and_a_file(form: str, weighted: bool, mode: str) -> None:
    module, file = Call(form, mode=mode, padding_idx=2), io.BytesIO()
    N, B, L = (torch.export.Dim(n) for n in "NBL")
    rows = {0: B, 1: L} if form == "2-D" else {0: N}
    starts = {
        0: torch.export.Dim("starts", min=2 + (form == "last"))
    }  # two bags or more, because torch specializes on sizes 0 and 1
    shapes = rows, None if form == "2-D" else starts, dict(rows) if weighted else None
    program = torch.export.export(module, call_arguments(form, weighted, 4, 3), dynamic_shapes=shapes)
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for B, L in [(4, 3), (7, 2), (2, 5)]:
        arguments = call_arguments(form, weighted, B, L)
        same(trained(exported, *arguments), trained(module, *arguments))


def test_export_of_embedding() -> None:
    module = nn.Embedding(E, D)
    shapes = ({0: torch.export.Dim("B"), 1: torch.export.Dim("L")},)
    exported = torch.export.export(module, (torch.randint(0, E, (4, 3)),), dynamic_shapes=shapes).module()
    for shape in ((4, 3), (7, 9)):
        rows = torch.randint(0, E, shape)
        assert torch.equal(exported(rows), module(rows))


# ---- torch.func


def of_tensors(mode: str, rows: Tensor, offsets: Tensor | None = None, **keywords) -> Callable:
    """embedding_bag as a function of the table and, if given, the weights."""

    def call(table: Tensor, weights: Tensor | None = None) -> Tensor:
        return functional.embedding_bag(rows, table, offsets, mode=mode, per_sample_weights=weights, **keywords)

    return call


@modes
def test_vmap_matches_a_loop(mode: str) -> None:
    """vmap over tables, weights, indices, and all of them."""
    tables, weights = torch.randn(3, E, D), torch.randn(3, 4, 2)
    rows = torch.randint(0, E, (3, 4, 2))

    def call(rows: Tensor, table: Tensor, weights: Tensor) -> Tensor:
        return functional.embedding_bag(rows, table, mode=mode, per_sample_weights=weights, padding_idx=1)

    for in_dims in [(None, 0, None), (None, None, 0), (0, None, None), (0, 0, 0), (None, 0, 0)]:
        given = [a if d == 0 else a[0] for a, d in zip((rows, tables, weights), in_dims)]
        got = torch.vmap(call, in_dims=in_dims)(*given)
        loop = [call(*(a[i] if d == 0 else a for a, d in zip(given, in_dims))) for i in range(3)]
        assert torch.equal(got, torch.stack(loop))
    got = torch.vmap(lambda t: functional.embedding(rows[0], t), in_dims=2)(tables.permute(1, 2, 0))
    assert torch.equal(got, tables[:, rows[0]])


@modes
def test_vmap_over_offsets(mode: str) -> None:
    rows, table = torch.randint(0, E, (3, 7)), torch.randn(E, D)
    offsets = torch.tensor([[0, 2, 2], [0, 0, 6], [0, 7, 7]])
    got = torch.vmap(lambda r, o: functional.embedding_bag(r, table, o, mode=mode))(rows, offsets)
    want = [functional.embedding_bag(r, table, o, mode=mode) for r, o in zip(rows, offsets)]
    assert torch.equal(got, torch.stack(want))


@modes
def test_per_sample_gradients_match_a_loop(mode: str) -> None:
    table, weights = torch.randn(E, D, dtype=torch.float64), torch.randn(5, 1, 3, dtype=torch.float64)
    rows = torch.randint(0, E, (5, 1, 3))

    def loss(table: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return functional.embedding_bag(rows, table, mode=mode, per_sample_weights=weights).square().sum()

    got = torch.vmap(torch.func.grad(loss, argnums=(0, 2)), in_dims=(None, 0, 0))(table, rows, weights)
    for i in range(5):
        leaves = [table.clone().requires_grad_(), weights[i].clone().requires_grad_()]
        want = torch.autograd.grad(loss(leaves[0], rows[i], leaves[1]), leaves)
        close((got[0][i], got[1][i]), want)


@modes
@pytest.mark.parametrize("norm", ["count", "weight"])
def test_jvp_is_the_transpose_of_vjp(norm: str, mode: str) -> None:
    rows, offsets = lookups([3, 0, 5, 1])
    call = of_tensors(mode, rows, offsets, weight_norm=norm, padding_idx=4)
    primals = torch.randn(E, D, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.3
    tangents = tuple(map(torch.randn_like, primals))
    output, pushed = torch.func.jvp(call, primals, tangents)
    close(output, call(*primals))
    upstream = torch.randn_like(output)
    _, pull = torch.func.vjp(call, *primals)
    close((upstream * pushed).sum(), sum((a * b).sum() for a, b in zip(pull(upstream), tangents)))


@modes
def test_jacobian_and_hessian_match_the_definition(mode: str) -> None:
    """In reverse mode, forward over reverse, and with autograd.functional."""
    rows, offsets = lookups([2, 0, 3], rows=4)
    tensors = torch.randn(4, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.3

    def defined(table: Tensor, weights: Tensor) -> Tensor:
        return reference.embedding_bag(rows, table, offsets, mode=mode, per_sample_weights=weights)

    call = of_tensors(mode, rows, offsets)
    want = torch.autograd.functional.jacobian(defined, tensors)
    close(torch.autograd.functional.jacobian(call, tensors), want)
    close(torch.func.jacrev(call, argnums=(0, 1))(*tensors), want)
    close(torch.func.jacfwd(call, argnums=(0, 1))(*tensors), want)
    want = torch.autograd.functional.hessian(lambda *t: defined(*t).square().sum(), tensors)

    def loss(*tensors: Tensor) -> Tensor:
        return call(*tensors).square().sum()

    close(torch.autograd.functional.hessian(loss, tensors), want)
    close(torch.func.hessian(loss, argnums=(0, 1))(*tensors), want)
    v = tuple(map(torch.randn_like, tensors))
    expected = torch.autograd.functional.hvp(lambda *t: defined(*t).square().sum(), tensors, v)[1]
    close(torch.autograd.functional.hvp(loss, tensors, v)[1], expected)
    close(torch.autograd.functional.vhp(loss, tensors, v)[1], expected)


def test_ensemble_of_modules() -> None:
    ensemble, rows = [nn.EmbeddingBag(E, D, mode="max") for _ in range(3)], torch.randint(0, E, (4, 2))
    weights = torch.func.stack_module_state(ensemble)[0]
    got = torch.vmap(lambda w: torch.func.functional_call(ensemble[0], w, (rows,)))(weights)
    assert torch.equal(got, torch.stack([m(rows) for m in ensemble]))


@modes
def test_checkpointing_gives_the_same_bits(mode: str) -> None:
    module, (rows, offsets) = nn.EmbeddingBag(E, D, mode=mode), lookups([3, 0, 2])
    want = trained(module, rows, offsets)
    output = torch.utils.checkpoint.checkpoint(module, rows, offsets, use_reentrant=False)
    output.backward(upstream_like(output))
    same([output.detach(), module.weight.grad], want)


@modes
def test_parametrized_and_tied_tables(mode: str) -> None:
    """A table parametrized by weight_norm, and a table tied to the weight of a linear layer."""
    rows = torch.randint(0, E, (4, 3))
    bag, linear = nn.EmbeddingBag(E, D, mode=mode, dtype=torch.float64), torch.nn.Linear(D, E, dtype=torch.float64)
    linear.weight = bag.weight
    (got,) = torch.autograd.grad(linear(bag(rows)).square().sum(), bag.weight)
    table = bag.weight.detach().clone().requires_grad_()
    defined = reference.embedding_bag(rows, table, mode=mode)
    want = torch.nn.functional.linear(defined, table, linear.bias).square().sum()
    close(got, torch.autograd.grad(want, table)[0])
    parametrizations.weight_norm(bag, "weight")
    bag(rows).square().sum().backward()
    assert all(p.grad.any() for p in bag.parameters())
    parametrize.remove_parametrizations(bag, "weight")


# ---- optimisers of torch, and fused optimisers

STEPS = 6


def steps_of(weighted: bool = False) -> list[tuple]:
    """Inputs of each step: repeated rows, different rows, empty bags."""
    found = []
    for i in range(STEPS):
        rows, offsets = lookups([0, 0] if i == 3 else [4, 0, 3, 5, 2], seed=i)
        found.append((rows, offsets, torch.rand(len(rows), dtype=torch.float64) + 0.3 if weighted else None))
    return found


OPTIMIZERS = {
    "SGD": (lambda: nn.FusedSGD(lr=0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "Adagrad": (lambda: nn.FusedAdagrad(lr=0.1), lambda p: torch.optim.Adagrad(p, lr=0.1)),
    "Adagrad with everything": (
        lambda: nn.FusedAdagrad(lr=0.1, lr_decay=0.2, initial_accumulator_value=0.3, eps=1e-3),
        lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.2, initial_accumulator_value=0.3, eps=1e-3),
    ),
    "Adam": (lambda: nn.FusedAdam(lr=0.1), lambda p: torch.optim.SparseAdam(p, lr=0.1)),
    "Adam with everything": (
        lambda: nn.FusedAdam(lr=0.1, betas=(0.8, 0.95), eps=1e-3),
        lambda p: torch.optim.SparseAdam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3),
    ),
}
optimizers = pytest.mark.parametrize("name", OPTIMIZERS)


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, weighted: bool = False) -> Tensor:
    for rows, offsets, weights in steps_of(weighted):
        weights = None if weights is None else weights.to(module.weight.dtype)
        output = module(rows, offsets, weights)
        (output * upstream_like(output)).sum().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        else:
            assert module.weight.grad is None
    return module.weight.detach()


def made(mode: str, dtype: torch.dtype = torch.float64, cls: type = nn.EmbeddingBag, **options) -> torch.nn.Module:
    torch.manual_seed(4)
    return cls(E, D, mode=mode, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@torchs_modes
@optimizers
def test_fused_optimizer_matches_torch(name: str, mode: str, dtype: torch.dtype) -> None:
    """Against torch.nn.EmbeddingBag with torch.optim; for max, torch.optim uses the sparse gradient of seqkernels."""
    fused, plain = OPTIMIZERS[name]
    theirs = made(mode, dtype, cls=nn.EmbeddingBag if mode == "max" else torch.nn.EmbeddingBag, sparse=True)
    want = train(theirs, plain(theirs.parameters()))
    got = train(made(mode, dtype, fused_optimizer=fused()), None)
    (close if dtype == torch.float64 else float32)(got, want)


@modes
@optimizers
def test_fused_optimizer_with_weights_padding_and_counts(name: str, mode: str) -> None:
    options = dict(padding_idx=2, scale_grad_by_freq=True, weight_norm="weight")
    fused, plain = OPTIMIZERS[name]
    theirs = made(mode, **options, sparse=True)
    want = train(theirs, plain(theirs.parameters()), weighted=True)
    got = train(made(mode, **options, fused_optimizer=fused()), None, weighted=True)
    close(got, want)
    assert torch.equal(got[2], made(mode, **options).weight[2])


@modes
def test_rowwise_adagrad_matches_its_definition(mode: str) -> None:
    """torch has no such optimiser: one sum per row, of the mean square of its gradient."""
    module = made(mode, fused_optimizer=nn.FusedRowwiseAdagrad(lr=0.1, initial_accumulator_value=0.2, eps=1e-3))
    table, sums = module.weight.detach().clone(), torch.full((E,), 0.2, dtype=torch.float64)
    for rows, offsets, _ in steps_of():
        leaf = table.clone().requires_grad_()
        output = reference.embedding_bag(rows, leaf, offsets, mode=mode)
        (grad,) = torch.autograd.grad(output, leaf, upstream_like(output))
        for e in rows.unique().tolist():
            sums[e] += grad[e].square().mean()
            table[e] -= 0.1 * grad[e] / (sums[e].sqrt() + 1e-3)
    close(train(module, None), table)
    close(module.fused_state.sum, sums)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["FusedSGD", "FusedAdagrad", "FusedRowwiseAdagrad", "FusedAdam"])
def test_state_of_a_half_table_is_float32(optimizer: str, dtype: torch.dtype) -> None:
    """One step equals that of a float64 table, rounded once."""
    rows, offsets = lookups([4, 0, 3, 5, 2])
    results = []
    for wide in (False, True):
        module = made("sum", dtype, fused_optimizer=getattr(nn, optimizer)(lr=0.01))
        if wide:
            module = made("sum", torch.float64, fused_optimizer=getattr(nn, optimizer)(lr=0.01))
            module.load_state_dict(results[0][1], strict=True)
        before = copy.deepcopy(module.state_dict())
        output = module(rows, offsets)
        output.backward(upstream_like(output).to(dtype).to(output.dtype))
        results.append((module.weight.detach(), before))
        if not wide:
            states = [t for n, t in module.state_dict().items() if n != "weight" and t.is_floating_point()]
            assert all(t.dtype == torch.float32 for t in states)
            assert bool(states) == (optimizer != "FusedSGD")
    (got, _), (want, _) = results
    unit = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert ((got.double() - want).abs() <= unit * want.abs() + 1e-6).all()


@optimizers
def test_state_of_a_fused_optimizer_in_a_file(name: str, tmp_path: Path) -> None:
    fused, _ = OPTIMIZERS[name]
    straight = made("sum", fused_optimizer=fused())
    train(straight, None)
    torch.save(straight.state_dict(), tmp_path / "state.pt")
    other = made("sum", fused_optimizer=fused())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    copies = [copy.deepcopy(straight), pickle.loads(pickle.dumps(straight)), other]
    want = train(straight, None)
    for module in copies:
        assert module.weight.data_ptr() != straight.weight.data_ptr()
        assert torch.equal(train(module, None), want)


def test_learning_rate_changes() -> None:
    module, theirs = made("sum", fused_optimizer=nn.FusedSGD(lr=0.1)), made("sum", sparse=True)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for lr in (0.1, 0.5, 0.0):
        module.fused_optimizer.lr = lr
        optimizer.param_groups[0]["lr"] = lr
        close(train(module, None), train(theirs, optimizer))
    for bad in (-1.0, math.nan, "fast"):
        with pytest.raises((ValueError, TypeError), match="lr"):
            module.fused_optimizer.lr = bad


def test_errors_of_fused_optimizers() -> None:
    module, rows = made("sum", fused_optimizer=nn.FusedSGD(lr=0.1)), torch.tensor([[0, 1]])
    output = module(rows)
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        output.sum().backward()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(module(rows).sum(), module.weight, create_graph=True)

    def loss(table: Tensor) -> Tensor:
        return torch.func.functional_call(module, {"weight": table}, (rows,)).sum()

    with pytest.raises(RuntimeError):
        torch.func.grad(loss)(module.weight.detach())
    with pytest.raises(ValueError, match="sparse"):
        made("sum", sparse=True, fused_optimizer=nn.FusedSGD(lr=0.1))
    for bad in (dict(lr=-1.0), dict(lr=math.inf)):
        with pytest.raises(ValueError, match="lr"):
            nn.FusedSGD(**bad)
    with pytest.raises(ValueError, match="betas"):
        nn.FusedAdam(betas=(1.0, 0.9))
    before = module.weight.detach().clone()
    with torch.no_grad():
        module(rows)
    assert torch.equal(module.weight, before)


def test_gradient_of_weights_with_fused_optimizer() -> None:
    """The gradient uses the table before the step."""
    rows, weights = torch.tensor([[0, 1, 1]]), torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    for mode in BAG_MODES:
        fused, plain = made(mode, fused_optimizer=nn.FusedSGD(lr=0.1)), made(mode)
        (want,) = torch.autograd.grad(plain(rows, None, weights).square().sum(), weights)
        weights.grad = None
        fused(rows, None, weights).square().sum().backward()
        assert torch.equal(weights.grad, want) and not torch.equal(fused.weight, plain.weight)


@pytest.mark.parametrize("mode", BAG_MODES)
def test_sparse_gradients_in_torch_optimizers(mode: str) -> None:
    for make in (
        lambda p: torch.optim.SGD(p, lr=0.1),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        lambda p: torch.optim.SparseAdam(p, lr=0.1),
    ):
        module = made(mode, sparse=True)
        before = module.weight.detach().clone()
        assert not torch.equal(train(module, make(module.parameters())), before)


def test_gradients_of_two_calls_accumulate() -> None:
    module, other = made("sum", sparse=True), made("sum")
    for m in (module, other):
        for rows, offsets, _ in steps_of()[:3]:
            m(rows, offsets).square().sum().backward()
    assert module.weight.grad.is_sparse
    close(module.weight.grad.to_dense(), other.weight.grad)


# ---- collections

TABLES = [(7, 5, ["a", "b"]), (20, 16, ["c"]), (3, 1, ["d", "e", "f"]), (9, 33, ["g"])]
F = sum(len(features) for *_, features in TABLES)


def collection(**options) -> nn.EmbeddingBagCollection:
    torch.manual_seed(0)
    tables = [nn.EmbeddingBagConfig(num_embeddings=e, embedding_dim=d, features=f) for e, d, f in TABLES]
    return nn.EmbeddingBagCollection(tables, **options)


def features_of(B: int, seed: int = 0) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Indices and offsets of the collection, and of each feature."""
    alone = []
    for e, _, features in TABLES:
        for f in range(len(features)):
            lengths = [(3 * b + f + e + seed) % 5 for b in range(B)]
            alone.append(lookups(lengths, rows=e, seed=seed + f))
    lengths = [len(rows) for rows, _ in alone]
    starts = [0, *itertools.accumulate(lengths)]
    offsets = torch.cat([o + s for (_, o), s in zip(alone, starts)] + [torch.tensor([starts[-1]])])
    return torch.cat([rows for rows, _ in alone]), offsets, alone


def tables_of(module: torch.nn.Module) -> list[Tensor]:
    return list(module.parameters())


@dtypes
def test_collection_matches_separate_tables(dtype: torch.dtype, isa: str) -> None:
    """The same bits, including gradients."""
    batches = itertools.cycle([(5, 1), (1, 2), (40, 2), (0, 1), (3, 3)])
    for mode, weighted, sparse in itertools.product(BAG_MODES, (False, True), (False, True)):
        B, threads = next(batches)
        torch.set_num_threads(threads)
        compare_collection_with_tables(B, dict(mode=mode, sparse=sparse, scale_grad_by_freq=B == 5), weighted, dtype)


def compare_collection_with_tables(B: int, options: dict, weighted: bool, dtype: torch.dtype) -> None:
    module, sparse = collection(**options, dtype=dtype), options["sparse"]
    rows, offsets, alone = features_of(B)
    weights = torch.randn(len(rows)).to(dtype).requires_grad_() if weighted else None
    output = module(rows, offsets, weights)
    assert output.shape == (B, sum(d * len(f) for _, d, f in TABLES))
    upstream = upstream_like(output)
    grads = torch.autograd.grad(output, [*tables_of(module), *([weights] if weighted else [])], upstream)
    assert all(g.is_sparse == sparse for g in grads[: len(TABLES)])
    outputs, columns, start, dweights = [], 0, 0, []
    for table, got, (_, d, features) in zip(tables_of(module), grads, TABLES):
        n = len(features)
        mine, first = alone[start : start + n], sum(len(r) for r, _ in alone[:start])
        flat = torch.cat([r for r, _ in mine])
        begins = itertools.accumulate((len(r) for r, _ in mine), initial=0)
        starts = torch.cat([o + s for (_, o), s in zip(mine, begins)])
        leaves = [table.detach().clone().requires_grad_()]
        leaves += [weights[first : first + len(flat)].detach().requires_grad_()] if weighted else []
        w = leaves[1] if weighted else None
        out = functional.embedding_bag(flat, leaves[0], starts, per_sample_weights=w, **options)
        above = upstream[:, columns : columns + n * d].reshape(B, n, d).transpose(0, 1).reshape(n * B, d)
        want = torch.autograd.grad(out, leaves, above)
        assert torch.equal(got.to_dense(), want[0].to_dense()), (options, table.shape)
        dweights += want[1:]
        outputs.append(out.detach().view(n, B, d).transpose(0, 1).reshape(B, n * d))
        start, columns = start + n, columns + n * d
    assert torch.equal(output, torch.cat(outputs, 1)), options
    assert not weighted or torch.equal(grads[-1], torch.cat(dweights)), options


@modes
def test_collection_matches_its_definition(mode: str) -> None:
    rows, offsets, _ = features_of(6)
    tables = [torch.randn(e, d, dtype=torch.float64, requires_grad=True) for e, d, _ in TABLES]
    weights = torch.rand(len(rows), dtype=torch.float64, requires_grad=True)
    counts = [len(f) for *_, f in TABLES]
    found = []
    for function in (functional.embedding_bags, reference.embedding_bags):
        out = function(rows, tables, offsets, counts, mode, weights, weight_norm="weight")
        found.append([out, *torch.autograd.grad(out, [*tables, weights], upstream_like(out))])
    close(*found)


@modes
def test_gradcheck_of_a_collection(mode: str) -> None:
    rows, offsets = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 2, 3, 3, 5])
    tensors = [torch.randn(n, d, dtype=torch.float64, requires_grad=True) for n, d in ((3, 2), (3, 1))]
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)

    def call(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
        return functional.embedding_bags(rows, [a, b], offsets, mode=mode, per_sample_weights=w)

    assert torch.autograd.gradcheck(call, (*tensors, weights))
    assert torch.autograd.gradgradcheck(call, (*tensors, weights))


@modes
def test_collection_with_a_dict(mode: str) -> None:
    module = collection(mode=mode)
    rows, offsets, alone = features_of(4)
    names = [f for *_, features in TABLES for f in features]
    want = module(rows, offsets)
    given = dict(zip(names, alone))
    assert torch.equal(module(given), want)
    assert torch.equal(module(dict(reversed(given.items()))), want)
    parts = module.split(want)
    assert list(parts) == names
    for name, part in parts.items():
        table = next(t for t, (*_, f) in zip(tables_of(module), TABLES) if name in f)
        torch.testing.assert_close(part, functional.embedding_bag(given[name][0], table, given[name][1], mode=mode))
    square = {name: torch.randint(0, 3, (4, 2)) for name in names}
    weighted = {name: (r.flatten(), torch.arange(0, 8, 2), torch.ones(8)) for name, r in square.items()}
    torch.testing.assert_close(module(square), module(weighted))


@optimizers
def test_fused_step_of_a_collection_matches_separate_tables(name: str) -> None:
    fused, plain = OPTIMIZERS[name]
    module, theirs = (
        collection(fused_optimizer=fused(), dtype=torch.float64),
        collection(sparse=True, dtype=torch.float64),
    )
    optimizer = plain(theirs.parameters())
    for seed in range(4):
        rows, offsets, _ = features_of(5, seed)
        for m in (module, theirs):
            output = m(rows, offsets)
            (output * upstream_like(output)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None for p in module.parameters())
    close(tables_of(module), tables_of(theirs))


def test_collection_with_compile_export_and_file(tmp_path: Path) -> None:
    module = collection(mode="max")
    compiled = whole(module)
    for B in (4, 7, 3):
        rows, offsets, _ = features_of(B)
        same(trained(compiled, rows, offsets), trained(module, rows, offsets))
    N, B = torch.export.Dim("N"), torch.export.Dim("B")
    exported = torch.export.export(module, (rows, offsets), dynamic_shapes=({0: N}, {0: F * B + 1})).module()
    rows, offsets, _ = features_of(6)
    same([exported(rows, offsets)], [module(rows, offsets)])
    torch.save(module.state_dict(), tmp_path / "tables.pt")
    other = collection(mode="max")
    other.load_state_dict(torch.load(tmp_path / "tables.pt", weights_only=True))
    same([other(rows, offsets)], [module(rows, offsets)])
    same([copy.deepcopy(module)(rows, offsets)], [pickle.loads(pickle.dumps(module))(rows, offsets)])


# ---- quantized tables


@modes
@pytest.mark.parametrize("norm", ["count", "weight"])
def test_quantized_bag_matches_its_dequantized_table(norm: str, mode: str) -> None:
    bag = nn.EmbeddingBag(E, 19, mode=mode, padding_idx=2, weight_norm=norm)
    packed, (rows, offsets) = nn.QuantizedEmbeddingBag.from_float(bag), lookups([3, 0, 4, 9])
    table = packed.dequantized()
    assert packed.packed.dtype == torch.uint8 and packed.packed.shape == (E, 27) and not list(packed.parameters())
    steps = (bag.weight.amax(1) - bag.weight.amin(1)) / 255
    assert ((table - bag.weight).abs() <= 0.5001 * steps[:, None] + 1e-6).all()
    float32(table, torch.ops.quantized.embedding_bag_byte_unpack(packed.packed))
    for weights in (None, torch.rand(16) + 0.1):
        got = packed(rows, offsets, weights)
        assert got.dtype == torch.float32 and not got.requires_grad
        want = reference.embedding_bag(
            rows, table.double(), offsets, mode=mode, padding_idx=2, weight_norm=norm,
            per_sample_weights=None if weights is None else weights.double(),
        )  # fmt: skip
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    other = pickle.loads(pickle.dumps(packed))
    assert torch.equal(other(rows, offsets), packed(rows, offsets))
    assert list(packed.state_dict()) == ["packed"]


def test_quantized_bag_compiles() -> None:
    packed, (rows, offsets) = nn.QuantizedEmbeddingBag.from_float(nn.EmbeddingBag(E, D)), lookups([3, 0, 4])
    assert torch.equal(whole(packed)(rows, offsets), packed(rows, offsets))


# ---- sharding over two processes

SHARDED = [(mode, options) for mode in BAG_MODES for options in ("plain", "weights", "padding", "last", "2-D")]
SHARDED += [("sum", "by frequency"), ("mean", "FusedSGD"), ("max", "FusedAdam"), ("sum", "odd rows"), ("sum", "empty")]


def sharded_options(option: str) -> dict:
    return {
        "padding": dict(padding_idx=3),
        "last": dict(include_last_offset=True),
        "by frequency": dict(scale_grad_by_freq=True),
        "FusedSGD": dict(fused_optimizer=nn.FusedSGD(lr=0.1)),
        "FusedAdam": dict(fused_optimizer=nn.FusedAdam(lr=0.1)),
    }.get(option, {})


def sharded_input(option: str, rank: int) -> tuple[Tensor | None, ...]:
    """Input of a rank; the ranks have different batch sizes."""
    rows, offsets = lookups([] if option == "empty" and rank == 0 else [3, 0, 4, 2][: 4 - rank], seed=rank, rows=11)
    weights = torch.rand(len(rows), dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) + 0.2
    if option == "2-D":
        return rows[: len(rows) // 2 * 2].view(-1, 2), None, None
    offsets = torch.cat([offsets, torch.tensor([len(rows)])]) if option == "last" else offsets
    return rows, offsets, weights if option == "weights" else None


def sharded_worker(rank: int, folder: str) -> dict[str, object]:
    from torch.distributed.tensor import Shard, distribute_tensor

    found: dict[str, object] = {}
    for mode, option in SHARDED:
        try:
            module = nn.RowShardedEmbeddingBag(11, D, mode=mode, dtype=torch.float64, **sharded_options(option))
            table = torch.load(f"{folder}/table.pt", weights_only=True)
            with torch.no_grad():
                module.weight.copy_(distribute_tensor(table, module.weight.device_mesh, [Shard(0)]))
            rows, offsets, weights = sharded_input(option, rank)
            weights = None if weights is None else weights.requires_grad_()
            output = module(rows, offsets, weights)
            output.backward(upstream_like(output, seed=rank))
            grad = module.weight.grad
            found[f"{mode} {option}"] = [
                output.detach(), module.weight.to_local().shape[0], None if grad is None else grad.to_local(),
                None if weights is None else weights.grad, module.weight.detach().full_tensor(),
            ]  # fmt: skip
        except Exception:  # continue with the other cases
            found[f"{mode} {option}"] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, list[dict[str, list]]]:
    """The table, and for each worker the results of all cases."""
    folder = tmp_path_factory.mktemp("sharded")
    table = torch.randn(11, D, dtype=torch.float64)
    torch.save(table, folder / "table.pt")
    return table, run_workers(sharded_worker, folder)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.parametrize("mode, option", SHARDED, ids=lambda v: str(v))
def test_two_processes_match_one(mode: str, option: str, sharded: tuple) -> None:
    """Against one process with both batches and the whole table."""
    table, by_worker = sharded
    found = [worker[f"{mode} {option}"] for worker in by_worker]
    for result in found:
        assert not isinstance(result, str), result
    options = sharded_options(option)
    fused = options.pop("fused_optimizer", None)
    alone = nn.EmbeddingBag(11, D, mode=mode, dtype=torch.float64, _weight=table.clone(), **options)
    total = torch.zeros_like(table)
    counts = torch.zeros(11)
    for rank, (output, _, _, dweights, _) in enumerate(found):
        rows, offsets, weights = sharded_input(option, rank)
        weights = None if weights is None else weights.requires_grad_()
        want = alone(rows, offsets, weights)
        close(output, want)
        wanted = [alone.weight] if weights is None else [alone.weight, weights]
        grads = torch.autograd.grad(want, wanted, upstream_like(want, rank))
        seen = torch.bincount(rows.flatten(), minlength=11)
        total += grads[0] * (seen[:, None] if options.get("scale_grad_by_freq") else 1)
        counts += seen
        if weights is not None:
            close(dweights, grads[1])
    if options.get("scale_grad_by_freq"):
        total /= counts.clamp(min=1)[:, None]
    assert [rows for _, rows, *_ in found] == [6, 5]
    if fused is None:
        close(torch.cat([grad for _, _, grad, *_ in found]), total)
    else:
        parameter = torch.nn.Parameter(table.clone())
        parameter.grad = total.to_sparse(1)
        make = torch.optim.SGD if isinstance(fused, nn.FusedSGD) else torch.optim.SparseAdam
        make([parameter], lr=0.1).step()
        assert all(grad is None for _, _, grad, *_ in found)
        table = parameter.detach()
    for *_, full in found:
        close(full, table)
