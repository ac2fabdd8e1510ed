"""Recurrent layers with export, compile, autocast, torch.func, copies, parametrizations and DDP.

Covers the variants; other files have tests of LSTM, GRU and RNN.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import pickle
import platform
import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqkernels
from support.python import output as python_output
from support.recurrent import directions_like, weighted
from support.workers import WORKERS, run_workers

D, H = 6, 8
RATE = 0.3


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A module of seqkernels.nn with options. `reset`: whether it is called with a reset mask."""

    name: str
    options: dict = dataclasses.field(default_factory=dict)
    reset: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items()), *["reset"] * self.reset])

    def make(self, **arguments) -> torch.nn.Module:
        arguments = {"input_size": D, "hidden_size": H} | arguments
        return getattr(seqkernels.nn, self.name)(**arguments, **self.options)

    def torch_module(self, **arguments) -> torch.nn.Module:
        arguments = {"input_size": D, "hidden_size": H} | arguments
        return getattr(torch.nn, self.name)(**arguments, **self.options)

    @property
    def random(self) -> bool:
        """Whether the module draws random masks in training."""
        return any(re.search("zoneout|dropout", option) for option in self.options)

    @property
    def h_size(self) -> int:
        return self.options.get("proj_size", H)


LSTM, GRU, RNN = Layer("LSTM"), Layer("GRU"), Layer("RNN")
PLAIN = [LSTM, Layer("LSTM", {"proj_size": 4}), GRU, RNN, Layer("RNN", {"nonlinearity": "relu"})]
CELLS = [
    Layer("LSTM", {"peephole": True}),
    Layer("LSTM", {"coupled_gates": True}),
    Layer("LSTM", {"layer_norm": True}),
    Layer("NestedLSTM"),
    Layer("SLSTM"),
    Layer("GRU", {"reset_after": False}),
    Layer("GRU", {"layer_norm": True}),
    Layer("GRU", {"proj_size": 4}),
    Layer("DreamerGRU", {"num_heads": 2}),
    Layer("MGU"),
    Layer("MGU", {"reset_after": True}),
]
OPTIONS = [
    Layer("LSTM", {"cell_clip": 0.2, "gate_clip": 1.5, "forget_bias": 1.0}),
    Layer("LSTM", {"zoneout_h": RATE, "zoneout_c": RATE}),
    Layer("LSTM", {"recurrent_dropout": RATE}),
    Layer("GRU", {"variational_dropout": RATE}),
    Layer("RNN", {"num_heads": 4}),
    Layer("LSTM", {"learn_initial_state": True}),
    Layer("LSTM", {"return_all_states": True}),
    Layer("GRU", {"memory_efficient": True}),
    Layer("LSTM", reset=True),
    Layer("LSTM", {"peephole": True, "proj_size": 4, "zoneout_c": RATE, "cell_clip": 0.5, "return_all_states": True}),
]
VARIANTS = CELLS + OPTIONS

plain = pytest.mark.parametrize("layer", PLAIN, ids=str)
variants = pytest.mark.parametrize("layer", VARIANTS, ids=str)
layers = pytest.mark.parametrize("layer", PLAIN + VARIANTS, ids=str)
FORMS = ("dense", "lengths", "packed")
forms = pytest.mark.parametrize("form", FORMS)
# Tracing is slow: each option is tested packed, where B is dynamic, and in one other form.
IN_FORMS = [(layer, form) for layer in PLAIN + CELLS for form in FORMS]
IN_FORMS += [(layer, form) for i, layer in enumerate(OPTIONS) for form in ("packed", FORMS[i % 2])]
in_forms = pytest.mark.parametrize(("layer", "form"), IN_FORMS, ids=str)
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def leaves(results: object) -> tuple[Tensor, ...]:
    """All tensors of the results of a layer; the data of a PackedSequence."""
    if isinstance(results, Tensor):
        return (results,)
    if isinstance(results, PackedSequence):
        return (results.data,)
    flat: tuple[Tensor, ...] = ()
    for result in results:
        flat += leaves(result)
    return flat


class Flat(torch.nn.Module):
    """A layer as a function from tensors to tensors. `which`: the lengths or the batch sizes."""

    def __init__(self, layer: torch.nn.Module, form: str = "dense") -> None:
        super().__init__()
        self.layer, self.form = layer, form

    def forward(self, x: Tensor, which: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, ...]:
        keywords = {} if reset is None else {"reset": reset}
        if self.form == "lengths":
            keywords["lengths"] = which
        return leaves(self.layer(PackedSequence(x, which) if self.form == "packed" else x, **keywords))


def arguments_of(layer: Layer, form: str, T: int, B: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Arguments of Flat. Lengths decrease from T by two per sequence; in a padded batch, to a minimum of 0."""
    lengths = [max(T - 2 * b, 0 if form == "lengths" else 1) for b in range(B)]
    x = torch.randn(T, B, D, dtype=dtype)
    reset = (torch.arange(T)[:, None] + 2 * torch.arange(B)) % 4 == 3
    which: tuple[Tensor, ...] = ()
    if form == "packed":
        x, batch_sizes, *_ = pack_padded_sequence(x, torch.tensor(lengths))
        reset, which = pack_padded_sequence(reset, torch.tensor(lengths)).data, (batch_sizes,)
    elif form == "lengths":
        which = (torch.tensor(lengths),)
    return (x, *which, reset) if layer.reset and which else (x, None, reset) if layer.reset else (x, *which)


def gradients(module: torch.nn.Module, *arguments, seed: int = 3) -> tuple[Tensor, ...]:
    """Outputs and gradients of input and parameters. `seed` determines the masks."""
    x = arguments[0].detach().requires_grad_()
    torch.manual_seed(seed)
    outputs = module(x, *arguments[1:])
    wanted = [x, *module.parameters()]
    return *(o.detach() for o in outputs), *torch.autograd.grad(weighted(outputs), wanted)


def same(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert torch.equal(g, w), f"{(g != w).sum()} of {g.numel()} values differ, by {(g - w).abs().max()}"


# ---- torch.export

SIZES = [(7, 3), (4, 2), (30, 5), (1, 1)]  # T, B; the first pair is traced


def dynamic(layer: Layer, form: str) -> tuple:
    """Dynamic sizes of each argument of Flat."""
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    if form == "packed":
        N = torch.export.Dim("N")
        return ({0: N}, {0: T}, {0: N}) if layer.reset else ({0: N}, {0: T})
    which = {0: B} if form == "lengths" else None
    if layer.reset:
        return {0: T, 1: B}, which, {0: T, 1: B}
    return ({0: T, 1: B},) if which is None else ({0: T, 1: B}, which)


@pytest.mark.sample(12)
@in_forms
def test_export_with_dynamic_sizes(layer: Layer, form: str) -> None:
    module = Flat(layer.make(), form).eval()
    with torch.no_grad():
        program = torch.export.export(module, arguments_of(layer, form, *SIZES[0]), dynamic_shapes=dynamic(layer, form))
        exported = program.module()
        for T, B in SIZES:
            arguments = arguments_of(layer, form, T, B)
            same(exported(*arguments), module(*arguments))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("layer", [LSTM, GRU, RNN], ids=str)
def test_exported_layer_in_training_and_in_a_file(layer: Layer, strict: bool) -> None:
    module, file = Flat(layer.make(num_layers=2, bidirectional=True), "packed"), io.BytesIO()
    arguments = arguments_of(layer, "packed", 7, 3)
    shapes = dynamic(layer, "packed")
    torch.export.save(torch.export.export(module, arguments, dynamic_shapes=shapes, strict=strict), file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for T, B in SIZES:
        arguments = arguments_of(layer, "packed", T, B)
        same(gradients(exported, *arguments), gradients(module, *arguments))


@pytest.mark.filterwarnings("ignore")
def test_torch_cannot_export_these_cases() -> None:
    """Packed batches and dynamic lengths; the tests above export them with seqkernels."""
    for layer in (LSTM, GRU, RNN):
        for form, error in (("packed", "data-dependent"), ("dense", "specialized it to be a constant")):
            module, arguments = Flat(layer.torch_module(), form).eval(), arguments_of(layer, form, 7, 3)
            with pytest.raises(Exception, match=error):
                torch.export.export(module, arguments, dynamic_shapes=dynamic(layer, form))


# ---- torch.compile


@pytest.mark.sample(10)
@in_forms
def test_compile_with_dynamic_sizes(layer: Layer, form: str) -> None:
    """One graph for the first sizes and one for all others; outputs and gradients equal those of eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = Flat(layer.make(), form)
    whole = torch.compile(module, fullgraph=True, backend="aot_eager")
    for T, B in [(4, 3), (7, 2), (12, 5), (30, 4)]:
        arguments = arguments_of(layer, form, T, B)
        same(gradients(whole, *arguments), gradients(module, *arguments))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_torch_cannot_compile_these_cases() -> None:
    for layer in (LSTM, GRU, RNN):
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN, GRU, or LSTM"):
            torch.compile(layer.torch_module(), fullgraph=True, backend="eager")(torch.randn(4, 3, D))


# ---- autocast


@forms
@variants
def test_autocast_computes_in_bfloat16(layer: Layer, form: str) -> None:
    module = Flat(layer.make(), form).eval()
    arguments = arguments_of(layer, form, 7, 4)
    want = module(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(*arguments)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == torch.bfloat16 and w.dtype == torch.float32
        torch.testing.assert_close(g.float(), w, rtol=4e-2, atol=4e-2)
    parameters = list(module.parameters())
    losses = (sum(o.float().square().sum() for o in outputs) for outputs in (got, want))
    for g, w in zip(*(torch.autograd.grad(loss, parameters) for loss in losses), strict=True):
        assert g.dtype == torch.float32
        assert (g - w).abs().max() <= 0.1 * w.abs().max()


def test_autocast_of_torch_stays_in_float32() -> None:
    for layer, form in ((LSTM, "packed"), (GRU, "packed"), (GRU, "dense")):
        arguments = arguments_of(layer, form, 7, 3)
        with torch.autocast("cpu", torch.bfloat16):
            assert all(o.dtype == torch.float32 for o in Flat(layer.torch_module(), form)(*arguments))
            assert all(o.dtype == torch.bfloat16 for o in Flat(layer.make(), form)(*arguments))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no x86-64 processor")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_autocast_of_lstm_of_torch_raises() -> None:
    """oneDNN has no bfloat16 LSTM for processors without bfloat16, which an environment variable simulates."""
    code = """
        import torch, seqkernels
        x = torch.randn(4, 3, 5)
        with torch.autocast("cpu", torch.bfloat16):
            y, _ = seqkernels.nn.LSTM(5, 6)(x)
            y.float().sum().backward()
            print(y.dtype)
            try:
                torch.nn.LSTM(5, 6)(x)
            except RuntimeError as error:
                print(error)
        """
    ours, torchs = python_output(code, ONEDNN_MAX_CPU_ISA="AVX2").split("\n", 1)
    assert ours == "torch.bfloat16"
    assert torchs.startswith("could not create a primitive descriptor for the LSTM forward propagation primitive")


# ---- torch.func


def function_of(module: torch.nn.Module, *more) -> Callable:
    """The outputs of the module as a function of (weights, x)."""
    return lambda weights, x: torch.func.functional_call(module, weights, (x, *more))


def weights_of(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


@variants
def test_vmap_matches_a_loop(layer: Layer) -> None:
    """vmap over the input, and over the weights of an ensemble."""
    ensemble = [Flat(layer.make()).eval() for _ in range(3)]
    x, *more = arguments_of(layer, "dense", 5, 2)
    xs = torch.stack([x, x.flip(0), -x])
    call, weights = function_of(ensemble[0], *more), torch.func.stack_module_state(ensemble)[0]
    for in_dims, loop in (
        ((None, 0), [ensemble[0](x, *more) for x in xs]),
        ((0, None), [m(x, *more) for m in ensemble]),
        ((0, 0), [m(x, *more) for m, x in zip(ensemble, xs)]),
    ):
        first = weights_of(ensemble[0]) if in_dims[0] is None else weights
        got = torch.vmap(call, in_dims=in_dims)(first, x if in_dims[1] is None else xs)
        same(got, map(torch.stack, zip(*loop)))


@pytest.mark.parametrize("layer", [layer for layer in VARIANTS if layer.random], ids=str)
def test_vmap_randomness_of_masks(layer: Layer) -> None:
    module = Flat(layer.make())
    x, *more = arguments_of(layer, "dense", 9, 4)
    xs = x.expand(2, *x.shape)

    def first(x: Tensor) -> Tensor:
        return module(x, *more)[0]

    one, two = torch.vmap(first, randomness="different")(xs)
    assert not torch.equal(one, two)
    one, two = torch.vmap(first, randomness="same")(xs)
    assert torch.equal(one, two)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(first)(xs)


@pytest.mark.sample(10)
@variants
def test_per_sample_gradients_match_a_loop(layer: Layer) -> None:
    module = Flat(layer.make(num_layers=2, dtype=torch.float64)).eval()
    x, *more = arguments_of(layer, "dense", 5, 2, torch.float64)
    xs, call = torch.stack([x, -x, 2 * x]), function_of(module, *more)
    gradient = torch.func.grad(lambda weights, x: weighted(call(weights, x)))
    got = torch.vmap(gradient, in_dims=(None, 0))(weights_of(module), xs)
    for i, x in enumerate(xs):
        close(tuple(g[i] for g in got.values()), torch.autograd.grad(weighted(module(x, *more)), module.parameters()))


@layers
def test_vmap_over_lengths(layer: Layer) -> None:
    """vmap over sequences and lengths: outputs, and per-sample gradients of a batch with lengths."""
    module = Flat(layer.make(dtype=torch.float64), "lengths").eval()
    x, lengths, *reset = arguments_of(layer, "lengths", 5, 4, torch.float64)
    samples = [x.transpose(0, 1)[:, :, None], lengths[:, None], *(r.transpose(0, 1)[:, :, None] for r in reset)]
    for got, want in zip(torch.vmap(module)(*samples), module(x, lengths, *reset), strict=True):
        same([got.squeeze(2)], [want.transpose(0, 1)])

    def loss(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return weighted(torch.func.functional_call(module, weights, sample))

    in_dims = (None, *[0] * len(samples))
    got = torch.vmap(torch.func.grad(loss), in_dims=in_dims)(weights_of(module), *samples)
    for i, sample in enumerate(zip(*samples, strict=True)):
        close(tuple(g[i] for g in got.values()), torch.autograd.grad(weighted(module(*sample)), module.parameters()))


@pytest.mark.sample(12)
@forms
@variants
def test_jvp_is_the_transpose_of_vjp(layer: Layer, form: str) -> None:
    """<u, J v> = <J^T u, v> for random u and v: forward mode uses the definition, reverse mode the kernels."""
    module = Flat(layer.make(dtype=torch.float64), form).eval()
    x, *more = arguments_of(layer, form, 5, 3, torch.float64)
    names, tensors = list(weights_of(module)), (x, *weights_of(module).values())

    def call(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return function_of(module, *more)(dict(zip(names, weights, strict=True)), x)

    tangents = directions_like(tensors)
    outputs, pushed = torch.func.jvp(call, tensors, tangents)
    close(outputs, module(x, *more))
    upstream = directions_like(outputs, seed=2)
    inputs = [x.requires_grad_(), *module.parameters()]
    pulled = torch.autograd.grad(module(x, *more), inputs, upstream)
    close(*(sum((a * b).sum() for a, b in pairs) for pairs in (zip(upstream, pushed), zip(pulled, tangents))))


@pytest.mark.parametrize("layer", [LSTM, GRU, RNN], ids=str)
def test_torch_does_not_support_these_transforms(layer: Layer) -> None:
    ours, theirs = Flat(layer.make()), Flat(layer.torch_module())
    theirs.load_state_dict(ours.state_dict())
    xs = torch.randn(2, 5, 3, D)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.vmap(theirs)(xs)
    for got, want in zip(torch.vmap(ours)(xs), zip(*map(theirs, xs)), strict=True):
        torch.testing.assert_close(got, torch.stack(want))
    if layer is LSTM:
        with pytest.raises(NotImplementedError, match="forward AD with mkldnn_rnn_layer"):
            torch.func.jvp(theirs, (xs[0],), (xs[1],))
        want = torch.autograd.functional.jvp(theirs, xs[0], xs[1])  # double backward
        torch.testing.assert_close(torch.func.jvp(ours, (xs[0],), (xs[1],)), want)


# ---- autograd


def along(f: Callable[[], Tensor], tensors: list[Tensor], directions: Iterable[Tensor], step: float = 1e-6) -> Tensor:
    """Finite difference of f, which reads the tensors, along the directions."""
    at, moved = [t.detach().clone() for t in tensors], []
    for sign in (1, -1):
        with torch.no_grad():
            for t, a, d in zip(tensors, at, directions, strict=True):
                t.copy_(a + sign * step * d)
        moved.append(f().detach())
    with torch.no_grad():
        for t, a in zip(tensors, at, strict=True):
            t.copy_(a)
    return (moved[0] - moved[1]) / (2 * step)


@forms
@layers
def test_backward_in_eval_mode(layer: Layer, form: str) -> None:
    """Against finite differences. Without random masks, the gradients have the bits of training mode."""
    module = Flat(layer.make(num_layers=2, dropout=RATE, bidirectional=True, dtype=torch.float64), form).eval()
    arguments = arguments_of(layer, form, 6, 3, torch.float64)
    x = arguments[0].requires_grad_()
    tensors = [x, *module.parameters()]
    directions = directions_like(tuple(tensors))
    grads = torch.autograd.grad(weighted(module(*arguments)), tensors)
    want = along(lambda: weighted(module(*arguments)), tensors, directions)
    torch.testing.assert_close(sum((g * d).sum() for g, d in zip(grads, directions)), want, rtol=1e-6, atol=1e-8)
    if not layer.random:
        module.layer.dropout = 0.0
        same(torch.autograd.grad(weighted(module.train()(*arguments)), tensors), grads)


@pytest.mark.sample(12)
@variants
def test_double_backward(layer: Layer) -> None:
    """Hessian-vector product of the definition against finite differences of the gradient of the kernels."""
    module = Flat(layer.make(dtype=torch.float64), "lengths").eval()
    arguments = arguments_of(layer, "lengths", 5, 3, torch.float64)
    tensors = [arguments[0].requires_grad_(), *module.parameters()]
    v, w = directions_like(tuple(tensors)), directions_like(tuple(tensors), seed=2)

    def slope(create_graph: bool) -> Tensor:
        grads = torch.autograd.grad(weighted(module(*arguments)), tensors, create_graph=create_graph)
        return sum((g * d).sum() for g, d in zip(grads, v))

    twice = torch.autograd.grad(slope(create_graph=True), tensors)
    got = sum((g * d).sum() for g, d in zip(twice, w))
    torch.testing.assert_close(got, along(lambda: slope(create_graph=False), tensors, w), rtol=1e-6, atol=1e-7)


# ---- copies


@variants
def test_copies_of_a_layer(layer: Layer, tmp_path: Path) -> None:
    module = layer.make(num_layers=2, bidirectional=True)
    arguments = arguments_of(layer, "dense", 6, 4)
    torch.save(module, tmp_path / "module.pt")
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    filled = layer.make(num_layers=2, bidirectional=True)
    assert not torch.equal(filled.weight_hh_l0, module.weight_hh_l0)
    filled.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded, filled):
        assert repr(other) == repr(module)
        assert other.weight_hh_l0.data_ptr() != module.weight_hh_l0.data_ptr()
        same(gradients(Flat(other), *arguments), gradients(Flat(module), *arguments))


# ---- parametrizations and tied weights

PARAMETRIZATIONS = [parametrizations.weight_norm, parametrizations.spectral_norm]
parametrized = pytest.mark.parametrize("parametrize", PARAMETRIZATIONS, ids=lambda f: f.__name__)


@parametrized
@plain
def test_parametrized_weight_matches_torch(layer: Layer, parametrize: Callable) -> None:
    """In eval mode; in training, torch reads a weight four times per call, and spectral_norm iterates each time."""
    ours, theirs = (make(num_layers=2, dtype=torch.float64).eval() for make in (layer.make, layer.torch_module))
    for module in (ours, theirs):
        parametrize(module, "weight_hh_l0")
        parametrize(module, "weight_ih_l1")
    ours.load_state_dict(theirs.state_dict())
    arguments = arguments_of(layer, "dense", 6, 4, torch.float64)
    close(*(gradients(Flat(module), *arguments) for module in (ours, theirs)))


@parametrized
@variants
def test_gradient_through_a_parametrization(layer: Layer, parametrize: Callable) -> None:
    """The gradient equals that of the weight, propagated through the parametrization."""
    module = Flat(layer.make(dtype=torch.float64)).eval()
    arguments = arguments_of(layer, "dense", 6, 3, torch.float64)
    parametrize(module.layer, "weight_hh_l0")
    made = module.layer.weight_hh_l0
    sources = list(module.layer.parametrizations["weight_hh_l0"].parameters())
    got = torch.autograd.grad(weighted(module(*arguments)), sources)
    bare = Flat(layer.make(dtype=torch.float64)).eval()
    with torch.no_grad():
        for name, p in bare.layer.named_parameters():
            p.copy_(getattr(module.layer, name))
    (dw,) = torch.autograd.grad(weighted(bare(*arguments)), bare.layer.weight_hh_l0)
    close(got, torch.autograd.grad(made, sources, dw))


@layers
def test_gradients_of_tied_weights(layer: Layer) -> None:
    """Weights tied between two layers and between two modules, against separate weights with the same values."""

    def two() -> list[Flat]:
        torch.manual_seed(0)
        return [Flat(layer.make(input_size=layer.h_size, num_layers=2, dtype=torch.float64)).eval() for _ in "ab"]

    tied, untied = two(), two()
    own = [getattr(m.layer, f"weight_hh_l{i}") for m in untied for i in range(2)]
    for module in tied:
        for i in range(2):
            setattr(module.layer, f"weight_hh_l{i}", tied[0].layer.weight_hh_l0)
    with torch.no_grad():
        for w in own:
            w.copy_(tied[0].layer.weight_hh_l0)
    x, *more = arguments_of(layer, "dense", 5, 3, torch.float64)
    x = x[..., : layer.h_size] if layer.h_size <= D else torch.cat([x, x], -1)[..., : layer.h_size]
    losses = [sum(weighted(module(x, *more)) for module in modules) for modules in (tied, untied)]
    (got,) = torch.autograd.grad(losses[0], tied[0].layer.weight_hh_l0)
    close(losses[0], losses[1])
    close(got, sum(torch.autograd.grad(losses[1], own)))


# ---- DistributedDataParallel


def of_a_batch(layer: Layer, rows: slice, wrap: Callable = lambda module: module) -> tuple[Tensor, ...]:
    """Gradients of a two-layer network for some rows of a batch; in eval mode for layers with random masks."""
    torch.manual_seed(0)
    module = layer.make(num_layers=2, bidirectional=True, dtype=torch.float64)
    module = wrap(Flat(module, "lengths").train(not layer.random))
    x, lengths, *reset = arguments_of(layer, "lengths", 7, 6, torch.float64)
    y, *_ = module(x[:, rows], lengths[rows], *(r[:, rows] for r in reset))
    (y * torch.linspace(-1, 1, y[:, 0].numel(), dtype=torch.float64).view_as(y[:, :1])).square().sum().backward()
    return tuple(p.grad for p in module.parameters())


def distributed_worker(rank: int, folder: str) -> dict[str, object]:
    rows = slice(rank, None, WORKERS)
    wrap = torch.nn.parallel.DistributedDataParallel
    found: dict[str, object] = {}
    for layer in PLAIN + VARIANTS:
        try:
            found[str(layer)] = of_a_batch(layer, rows, wrap)
        except Exception:  # continue with the other layers
            found[str(layer)] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def distributed_gradients(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """For each worker, .grad after DistributedDataParallel; two processes train all layers in turn."""
    return run_workers(distributed_worker, tmp_path_factory.mktemp("distributed"))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
@layers
def test_gradients_of_two_workers_match_one(layer: Layer, distributed_gradients: list) -> None:
    """Each worker has every second sequence. Twice the averaged gradients equal those of the whole batch."""
    want = of_a_batch(layer, slice(None))
    for found in distributed_gradients:
        assert not isinstance(found[str(layer)], str), found[str(layer)]
        close(tuple(WORKERS * g for g in found[str(layer)]), want)


# ---- no steps, and sequences of length zero


@layers
def test_no_steps_where_torch_raises(layer: Layer) -> None:
    module = Flat(layer.make())
    outputs = module(*arguments_of(layer, "dense", 0, 3))
    assert outputs[0].shape == (0, 3, layer.h_size)
    sum(o.sum() for o in outputs).backward()
    if layer in PLAIN:
        with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
            layer.torch_module()(torch.zeros(0, 3, D))


@layers
def test_zero_lengths_where_torch_raises(layer: Layer) -> None:
    """The results of the other sequences are unchanged."""
    module = Flat(layer.make(dtype=torch.float64), "lengths").eval()
    x, lengths, *reset = arguments_of(layer, "lengths", 5, 4, torch.float64)
    assert lengths.tolist() == [5, 3, 1, 0]
    got = module(x, lengths, *reset)
    want = module(x[:, :3], lengths[:3], *(r[:, :3] for r in reset))
    same((g[:, :3] for g in got), want)
    assert not any(g[:, 3].any() for g in got) or "learn_initial_state" in layer.options
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack_padded_sequence(x, lengths)
