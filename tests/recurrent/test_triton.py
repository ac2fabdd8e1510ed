"""Triton kernels of recurrent layers against their definition in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import backend, functional
from seqkernels.functional._recurrent_extras import Extras
from seqkernels.functional._recurrent_kinds import kind_named
from seqkernels.reference import recurrent as definition
from support.cases import assert_near, assert_same_bits, batch_sizes_of
from support.triton_on_cpu import DEVICE, load, on_hardware

recurrent = load("recurrent")
launch = load("recurrent.launch")
KINDS = recurrent.SUPPORTED
WHOLE = tuple(recurrent.GATES)  # kinds with kernels that run all steps
HALF = (torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    B: int = 3
    T: int = 3
    D: int = 2
    H: int = 3
    lengths: tuple[int, ...] | None = None
    packed: bool = False
    bidirectional: bool = True
    bias: bool = True
    state: bool = True

    def __str__(self) -> str:
        return (
            "-".join(f"{k}={v}" for k, v in dataclasses.asdict(self).items() if v != getattr(Case, k, None)) or "dense"
        )

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def rows(self) -> tuple[int, ...]:
        assert not self.packed or self.lengths is not None
        return (sum(self.lengths or ()),) if self.packed else (self.T, self.B)


DENSE = Case()
PADDED = Case(lengths=(2, 3, 0))
PACKED = Case(lengths=(3, 2, 2), packed=True)


def layer_of(kind: str, case: Case, dtype: torch.dtype, peephole: bool = False) -> tuple[list[Tensor], dict]:
    """The differentiable arguments (x, states, weights), and the others. Padding of x is NaN."""
    G, states = definition.KINDS[kind].gates, definition.KINDS[kind].states

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).mul(0.6).to(dtype)

    x = normal(*case.rows, case.D)
    arguments: dict = dict(bidirectional=case.bidirectional, bias=case.bias, projected=False)
    if case.packed:
        arguments["batch_sizes"] = batch_sizes_of(case.lengths)
    elif case.lengths is not None:
        arguments["lengths"] = torch.tensor(case.lengths)
        x[torch.arange(case.T).unsqueeze(1) >= arguments["lengths"]] = math.nan
    given = [normal(case.directions, case.B, case.H) for _ in range(states)] if case.state else [None] * states
    weights = []
    for _ in range(case.directions):
        weights += [normal(G * case.H, case.D), normal(G * case.H, case.H)]
        weights += [normal(G * case.H) for _ in range(2 * case.bias)]
        weights += [normal((G - 1) * case.H)] * peephole
    return [x, *given, *weights], arguments


def options_of(kind: str, case: Case, *names: str) -> dict:
    """Random masks, and numbers."""

    def mask(p: float) -> Tensor:
        return (torch.rand(*case.rows, case.directions * case.H) < p).to(torch.uint8)

    lstm, rnn = kind.startswith("lstm"), kind.startswith("rnn")
    every: dict = dict(
        reset=torch.rand(case.rows) < 0.4,
        zoneout_h=mask(0.3),
        variational=2 * torch.rand(case.directions, case.B, case.H, dtype=torch.float64),
        numbers=[0.5 if lstm else math.inf, 0.6, 0.0, 0.0, 0.0 if rnn else 0.3, 1e-5],
    )
    if not rnn:
        every["candidate"] = mask(0.7)
    if lstm:
        every |= dict(zoneout_c=mask(0.3), peephole=True)
    return {name: value for name, value in every.items() if name in names or not names}


def results(run, kind: str, given: list[Tensor], arguments: dict, dtype: torch.dtype, every: bool) -> dict[str, Tensor]:
    """Outputs and gradients by name; all outputs have upstream gradients."""
    states = definition.KINDS[kind].states
    leaves = [None if t is None else t.detach().to(dtype).requires_grad_() for t in given]
    outputs = run(kind, leaves[0], leaves[1 : 1 + states], leaves[1 + states :], **arguments)
    outputs = outputs if every else outputs[: 1 + states]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    real = [t for t in leaves if t is not None]
    found = torch.autograd.grad(outputs, real, upstream, allow_unused=True, materialize_grads=True)
    return {f"output {i}": o.detach().cpu() for i, o in enumerate(outputs)} | {
        f"gradient {i}": g.cpu() for i, g in enumerate(found)
    }


def defined(kind: str, given: list[Tensor], arguments: dict, options: dict, every: bool) -> dict[str, Tensor]:
    """Replaces padding by 0, because the matrix products of the definition would propagate NaN."""
    given = [given[0].nan_to_num(0.0), *given[1:]]
    return results(definition.layer, kind, given, arguments | options, torch.float64, every)


def ours(
    kind: str, given: list[Tensor], arguments: dict, options: dict, dtype: torch.dtype, every: bool = False, **more
) -> dict[str, Tensor]:
    options = {k: v.to(dtype) if k == "variational" else v for k, v in options.items()}
    on_cpu = ("batch_sizes",)
    arguments = {k: v.to(DEVICE) if isinstance(v, Tensor) and k not in on_cpu else v for k, v in arguments.items()}
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    given = [None if t is None else t.to(DEVICE) for t in given]
    flags = {name: arguments.pop(name) for name in ("bias", "projected")}
    extras = Extras(**flags, **options) if options or not flags["bias"] else None
    return results(recurrent.layer, kind, given, arguments | dict(extras=extras, every=every) | more, dtype, every)


def check(kind: str, case: Case, dtype: torch.dtype = torch.float64, *names: str, every: bool = False, **more) -> None:
    options = options_of(kind, case, *names) if names else {}
    given, arguments = layer_of(kind, case, dtype, peephole=bool(options.get("peephole")))
    want = defined(kind, given, arguments, options, every)
    got = ours(kind, given, arguments, options, dtype, every, **more)
    if case.lengths is not None and not case.packed:
        beyond = torch.arange(case.T).unsqueeze(1) >= arguments["lengths"]
        assert got["output 0"][beyond].eq(0).all() and got["gradient 0"][beyond].eq(0).all()
    assert_near(got, want, dtype)


@pytest.fixture
def step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Selects the steps tier, as if W_hh exceeds shared memory."""
    monkeypatch.setattr(launch, "shared_memory", lambda device, dtype: 0)


# ---- parity


@on_hardware
@pytest.mark.parametrize("case", [DENSE, PADDED, PACKED], ids=["dense", "padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_layers(kind: str, case: Case):
    check(kind, case)


@pytest.mark.parametrize("case", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_resets(kind: str, case: Case):
    check(kind, case, torch.float64, "reset")


@on_hardware
@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.usefixtures("step_by_step")
def test_step_by_step(kind: str):
    check(kind, PADDED)
    check(kind, PACKED, torch.float64, "reset")


@pytest.mark.parametrize("kind", WHOLE)
def test_sizes(kind: str):
    """More sequences than a program and more units than the smallest tile; one direction, no biases, no state."""
    check(kind, Case(B=18, T=2, H=20, bidirectional=False, bias=False, state=False))


@pytest.mark.parametrize("kind", KINDS)
def test_all_options(kind: str):
    check(kind, PADDED, torch.float64, *options_of(kind, PADDED), every=kind.startswith("lstm"))


@pytest.mark.parametrize("kind", KINDS)
def test_all_options_packed(kind: str):
    check(kind, dataclasses.replace(PACKED, bidirectional=False), torch.float64, *options_of(kind, PACKED))


@pytest.mark.parametrize("kind", KINDS)
def test_zoneout_constants(kind: str):
    """Zoneout constants without clips, as in evaluation."""
    numbers = [math.inf, math.inf, 0.2, 0.3 if kind.startswith("lstm") else 0.0, 0.0, 1e-5]
    case = Case(T=2, bidirectional=False)
    given, arguments = layer_of(kind, case, torch.float64)
    options = dict(numbers=numbers)
    want = defined(kind, given, arguments, options, every=False)
    assert_near(ours(kind, given, arguments, options, torch.float64), want, torch.float64)


@on_hardware
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype):
    check(kind, Case(T=4, lengths=(3, 4, 1), bidirectional=False), dtype)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_all_states_and_recomputed_gates(kind: str):
    check(kind, PADDED, torch.float64, every=kind == "lstm")
    check(kind, PADDED, torch.float64, recompute=True)


@on_hardware
def test_accuracy_of_activations():
    """Relative accuracy of tanh and sigmoid near 0, where the quotient cancels, and far from 0."""
    x = torch.tensor([[[1e-4, 1e-2, 0.3, 0.62, 0.63, 3.0, 30.0, 1e4]]], device=DEVICE)
    for dtype in (torch.float32, torch.float64):
        H = x.shape[-1]
        weights = [torch.eye(H, dtype=dtype, device=DEVICE), torch.zeros(H, H, dtype=dtype, device=DEVICE)]
        for sign in (1, -1):
            y, _ = recurrent.layer("rnn_tanh", sign * x.to(dtype), [None], weights, extras=Extras(bias=False))
            want = torch.tanh(sign * x.to(dtype).double()).to(dtype)
            torch.testing.assert_close(y, want, rtol=8 * torch.finfo(dtype).eps, atol=0)


@on_hardware
@pytest.mark.parametrize("kind", ["lstm", "gru_before"])
def test_repeated_runs_have_the_same_bits(kind: str):
    given, arguments = layer_of(kind, PADDED, torch.float32)
    first = ours(kind, given, arguments, {}, torch.float32)
    assert_same_bits(ours(kind, given, arguments, {}, torch.float32), first)


# ---- other properties


def test_second_derivatives_match_the_definition():
    given, _ = layer_of("gru", DENSE, torch.float64)

    def second(layer) -> list[Tensor]:
        x, h0, *weights = (t.to(DEVICE).requires_grad_() for t in given)
        y, _ = layer("gru", x, [h0], weights, bidirectional=True)
        first = torch.autograd.grad(y.square().sum(), (x, *weights), create_graph=True)
        return list(torch.autograd.grad(sum(g.square().sum() for g in first), (x, h0, *weights)))

    for got, want in zip(second(recurrent.layer), second(definition.layer)):
        torch.testing.assert_close(got, want)


@on_hardware
def test_invalid_lengths_do_not_read_out_of_bounds():
    given, _ = layer_of("lstm", Case(bidirectional=True), torch.float32)
    x, h0, c0, *weights = (t.to(DEVICE) for t in given)
    held = torch.full((9, *x.shape[1:]), math.nan, device=DEVICE)
    held[3:6] = x
    with torch.no_grad():
        y, *last = recurrent.layer(
            "lstm", held[3:6], [h0, c0], weights, lengths=torch.tensor([7, -2, 3], device=DEVICE), bidirectional=True
        )
        want, *_ = recurrent.layer("lstm", x, [h0, c0], weights, bidirectional=True)
    assert torch.equal(y[:, [0, 2]], want[:, [0, 2]]) and y[:, 1].eq(0).all()
    assert all(s.isfinite().all() for s in last)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_empty_inputs(kind: str):
    for case in (Case(T=0), Case(B=0), Case(lengths=(0, 0, 0))):
        given, arguments = layer_of(kind, case, torch.float64)
        want = defined(kind, given, arguments, {}, every=False)
        assert_near(ours(kind, given, arguments, {}, torch.float64), want, torch.float64)


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("lstm_norm", {}, "lstm_norm is none of lstm, lstm_coupled, gru"),
        ("lstm", dict(extras=Extras(heads=3)), "heads must be 1, got 3"),
        ("lstm", dict(extras=Extras(projected=True)), "a projection must be absent"),
        ("lstm", dict(dtype=torch.int32), "dtype torch.int32 is none of"),
    ],
)
def test_unsupported(kind: str, change: dict, message: str):
    given, _ = layer_of("lstm", Case(bidirectional=False), torch.float64)
    x, h0, c0, *weights = (t.to(DEVICE) for t in given)
    if change.get("extras", Extras()).projected:
        weights.append(torch.ones(2, 3, dtype=torch.float64, device=DEVICE))
    dtype = change.pop("dtype", torch.float64)
    with pytest.raises(NotImplementedError, match=re.escape(message)), torch.no_grad():
        recurrent.layer(kind, x.to(dtype), [h0, c0], [w.to(dtype) for w in weights], **change)


def test_shared_memory_limits():
    """For the shared memory of an A100, an H100 and a small consumer GPU."""
    for dtype, kind in itertools.product((torch.float32, *HALF), WHOLE):
        fits = {
            H: [recurrent.config(kind, dtype, H, kib << 10) is not None for kib in (163, 227, 99)]
            for H in (16, 64, 128, 129)
        }
        assert fits[16] == [True, True, True] and fits[129] == [False, False, False]
        assert fits[64][:2] == [True, True]
        assert fits[128][:2] == [dtype in HALF or kind.startswith("rnn")] * 2


# ---- public functions and dispatch

FUNCTIONS = {
    "lstm": {},
    "lstm_coupled": dict(coupled_gates=True),
    "gru": {},
    "gru_before": dict(reset_after=False),
    "mgu": {},
    "mgu_after": dict(reset_after=True),
    "rnn_tanh": {},
    "rnn_relu": {},
}


def test_backend_lists_all_kinds():
    """seqkernels.backend has a separate list of kinds, because it does not import Triton."""
    assert set(backend.TRITON_KINDS) == set(KINDS) == set(FUNCTIONS)


def functional_results(
    kind: str, which: str | None, case: Case, dtype: torch.dtype, device: str, num_layers: int = 2, **more
) -> dict:
    """Outputs and all gradients of the public function for one or two layers, for values rounded to dtype.

    On the CPU, the computation is in float64.
    """
    torch.manual_seed(2)
    given, arguments = layer_of(kind, case, torch.float64)
    states = definition.KINDS[kind].states
    x, weights = given[0].nan_to_num(0.0), [*given[1 + states :]]
    hx = given[1 : 1 + states]
    if num_layers == 2:
        deeper, _ = layer_of(kind, dataclasses.replace(case, D=case.directions * case.H), torch.float64)
        weights += deeper[1 + states :]
        hx = [torch.cat([a, b]) for a, b in zip(hx, deeper[1 : 1 + states])]
    computed = torch.float64 if which == "cpu" else dtype
    leaves = [t.to(dtype).to(device, computed).requires_grad_() for t in (x, *hx, *weights)]
    arguments = {k: v.to(device) if isinstance(v, Tensor) and k == "lengths" else v for k, v in arguments.items()}
    for of_ops in ("bias", "projected"):  # functions have these from the number of weights
        arguments.pop(of_ops)
    if "reset" in more:
        more["reset"] = more["reset"].to(device)
    function = getattr(functional, {"lstm_coupled": "lstm", "gru_before": "gru", "mgu_after": "mgu"}.get(kind, kind))
    y, last = function(
        leaves[0],
        leaves[1] if states == 1 else tuple(leaves[1 : 1 + states]),
        leaves[1 + states :],
        num_layers=num_layers,
        backend=which,
        **arguments,
        **FUNCTIONS[kind],
        **more,
    )
    outputs = (y, *(last if isinstance(last, tuple) else (last,)))
    generator = torch.Generator().manual_seed(3)
    upstream = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(dtype).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, leaves, upstream)
    return {f"output {i}": o.detach().cpu() for i, o in enumerate(outputs)} | {
        f"gradient {i}": g.cpu() for i, g in enumerate(grads)
    }


@on_hardware
@pytest.mark.parametrize("case", [DENSE, PADDED, PACKED], ids=["dense", "padded", "packed"])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functional(kind: str, case: Case):
    """Against the CPU kernels in float64, which other tests compare with the definition."""
    got = functional_results(kind, "triton", case, torch.float64, DEVICE)
    assert_near(got, functional_results(kind, "cpu", case, torch.float64, "cpu"), torch.float64)


@on_hardware
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functional_dtypes(kind: str, dtype: torch.dtype):
    case = dataclasses.replace(PADDED, bidirectional=False)
    got = functional_results(kind, "triton", case, dtype, DEVICE, num_layers=1)
    assert_near(got, functional_results(kind, "cpu", case, dtype, "cpu", num_layers=1), dtype)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_functional_with_resets_and_saved_memory(kind: str):
    reset = torch.tensor([[True, False, False], [False, True, True], [False, False, True]])
    more = dict(reset=reset, memory_efficient=True)
    got = functional_results(kind, "triton", PADDED, torch.float64, DEVICE, **more)
    assert_near(got, functional_results(kind, "cpu", PADDED, torch.float64, "cpu", **more), torch.float64)


@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh", "rnn_relu"])
def test_functional_cells(kind: str):
    """One step, forward and backward, batched and not."""
    states = definition.KINDS[kind].states
    given, _ = layer_of(kind, Case(T=1, bidirectional=False), torch.float64)
    for select in (lambda t: t[0], lambda t: t[0, 0]):
        results = []
        for which, device in (("triton", DEVICE), ("cpu", "cpu")):
            leaves = [
                t.detach().to(device).requires_grad_()
                for t in (*map(select, given[: 1 + states]), *given[1 + states :])
            ]
            hx = leaves[1] if states == 1 else tuple(leaves[1 : 1 + states])
            out = getattr(functional, f"{kind}_cell")(leaves[0], hx, *leaves[1 + states :], backend=which)
            outputs = out if isinstance(out, tuple) else (out,)
            grads = torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)
            results.append({f"{i}": t.detach().cpu() for i, t in enumerate((*outputs, *grads))})
        assert_near(*results, torch.float64)


def test_functional_compiled():
    """One graph with the Triton ops."""
    given, _ = layer_of("gru", Case(bidirectional=False), torch.float32)
    x, h0, *weights = (t.to(DEVICE).requires_grad_() for t in given)

    def run(x, h0, *weights):
        return functional.gru(x, h0, list(weights), backend="triton")[0]

    want, got = run(x, h0, *weights), torch.compile(run, fullgraph=True, backend="aot_eager")(x, h0, *weights)
    assert torch.equal(got, want)
    results = [torch.autograd.grad(out.square().sum(), (x, h0, *weights)) for out in (got, want)]
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("kind", KINDS)
def test_fakes_match_ops(kind: str):
    """The saved tensor has the shape of the fake implementation, with and without options."""
    for options in ({}, dict(numbers=[math.inf, 0.6, 0.0, 0.0, 0.0, 1e-5])):
        given, _ = layer_of(kind, Case(bidirectional=False), torch.float64)
        states = definition.KINDS[kind].states
        x, *rest = (t.to(DEVICE) for t in given)
        extras = Extras(**options) if options else ()
        inputs = (x, *rest[:states], rest[states:], None, None, False, *extras)
        op = getattr(torch.ops.seqkernels_triton, f"{kind}_forward").default
        torch.library.opcheck(op, inputs, test_utils=("test_schema", "test_faketensor"))


def request(device: str, kind: str = "lstm", heads: int = 1, projected: bool = False, **more) -> backend.Request:
    return backend.Request(torch.device(device), torch.float32, (kind_named(kind), heads, projected), **more)


@pytest.fixture
def no_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without CUDA kernels."""
    monkeypatch.setattr(backend, "_CUDA_BUILT", False)


@pytest.mark.usefixtures("no_gpu_kernels")
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_selected_without_cuda_kernels(kind: str):
    chosen = backend.choose("it", backend.RECURRENT, request("cuda", kind))
    assert chosen == "triton" and not backend.cuda_runs_on(torch.device("cuda"))
    assert backend.choose("it", backend.RECURRENT, request("cpu", kind)) == "cpu"
    assert backend.choose("it", backend.EMBEDDING_BAG, backend.Request(torch.device("cuda"), torch.half)) == "triton"


@pytest.mark.parametrize(
    ("built", "capability", "chosen"),
    [
        ([80, 90, 100], (8, 0), "cuda"),
        ([80, 90, 100], (8, 9), "cuda"),
        ([80, 90, 100], (12, 0), "cuda"),  # compiled from PTX
        ([90], (8, 0), "triton"),
        ([80, 90], (10, 0), "triton"),
        ([90], (9, 0), "cuda"),
    ],
)
def test_triton_is_selected_for_unsupported_devices(
    built: list[int], capability: tuple[int, int], chosen: str, monkeypatch: pytest.MonkeyPatch
):
    info = {"cuda": True, "cuda_architectures": built}
    monkeypatch.setattr(backend, "_CUDA_BUILT", True)
    monkeypatch.setattr(backend._C, "build_info", lambda: info)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for cached in (backend._too_old, backend._not_built_for):
        cached.cache_clear()
    try:
        assert backend.choose("it", backend.RECURRENT, request("cuda:0")) == chosen
        assert backend.cuda_runs_on(torch.device("cuda:0")) == (chosen == "cuda")
        if chosen == "triton":
            reasons = backend.unsupported(backend.RECURRENT, request("cuda:0"))["cuda"]
            assert reasons == [
                f"this build is for compute capability {', '.join(f'{b // 10}.{b % 10}' for b in built)}, "
                f"got {capability[0]}.{capability[1]}"
            ]
    finally:
        for cached in (backend._too_old, backend._not_built_for):
            cached.cache_clear()


@pytest.mark.usefixtures("no_gpu_kernels")
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (dict(kind="lstm_norm"), "lstm_norm has no Triton kernel"),
        (dict(heads=2), "heads must be 1, got 2"),
        (dict(projected=True), "a projection must be absent"),
    ],
)
def test_reasons_against_triton(case: dict, reason: str):
    with pytest.raises(NotImplementedError, match=f"triton: {reason}"):
        backend.choose("it", backend.RECURRENT, request("cuda", **case))
    with pytest.raises(NotImplementedError, match=f"backend triton cannot run this call: {reason}"):
        backend.choose("it", backend.RECURRENT, request("cuda", **case), "triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.unsupported(backend.RECURRENT, request("cuda"))["triton"] == ["triton is not installed"]
    assert backend.unsupported(backend.RECURRENT, request("cpu"))["triton"] == ["the tensors are on cpu"]


@pytest.mark.usefixtures("no_gpu_kernels")
def test_explain_tier():
    h100 = dict(capability=(9, 0), multiprocessors=132, shared_memory=232448)
    sizes = dict(T=10, B=40, D=64, H=64, device="cuda", **h100)
    found = seqkernels.explain("lstm", bidirectional=True, **sizes)
    assert found["kernel"] == "triton" and found["forward"]["tier"] == "layer"
    assert found["forward"]["grid"] == (3, 2) and found["forward"]["rows"] == 16
    for change, kind, why in (
        (dict(H=129), "lstm", "H must be at most 128, got 129"),
        (dict(H=128), "lstm", "W_hh needs 569344 bytes of shared memory, a program has 232448"),
        (dict(options=["zoneout_h"]), "lstm", "the kernels for all steps do not support zoneout_h"),
        (dict(dtype=torch.float64), "lstm", "Triton cannot compile chains of float64 products"),
        ({}, "mgu", "mgu has no kernel for all steps"),
    ):
        plan = seqkernels.explain(kind, **(sizes | change))["backward"]
        assert plan["tier"] == "steps" and plan["reasons"]["layer"][0].startswith(why)
    with pytest.raises(ValueError, match="must be given together"):
        seqkernels.explain("lstm", **{k: v for k, v in sizes.items() if k != "capability"})
