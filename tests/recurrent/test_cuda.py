"""CUDA kernels of recurrent layers, in the emulation, which checks memory and barriers, and on a GPU if present.

torch.ops.seqkernels_emulated has the ops of torch.ops.seqkernels, implemented by the CUDA launchers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.machinery
import importlib.util
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import cuda_on_cpu
import pytest
import torch
from torch import Tensor

import seqkernels
from seqkernels import backend, reference
from seqkernels.functional._recurrent_kinds import KINDS
from support.cases import TOLERANCE, ragged
from support.on_cuda import ONLY_EMULATED, PLACES, OnCuda, sanitized
from support.recurrent import spread
from support.variants import without_stabiliser


@functools.cache
def module() -> Any:
    """Loads the emulation, which registers the emulated ops."""
    built = sorted(cuda_on_cpu.FOLDER.glob("_emulated*.so"))
    if not built:
        pytest.skip("tests/cuda_on_cpu/_emulated*.so is not built; `make test` builds it")
    loader = importlib.machinery.ExtensionFileLoader("_emulated", str(built[0]))
    spec = importlib.util.spec_from_file_location("_emulated", str(built[0]), loader=loader)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    loader.exec_module(found)
    return found


@pytest.fixture(autouse=True, params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the ops run: in the emulation or on a GPU."""
    monkeypatch.setattr(sys.modules[__name__], "PLACE", request.param)
    return request.param


PLACE = "emulated"


def ops() -> Any:
    if PLACE == "cuda":
        return OnCuda()
    module()
    return torch.ops.seqkernels_emulated


def machine(**settings: int) -> Any:
    """Changes settings of the emulation."""
    module()
    return cuda_on_cpu.settings(cuda_on_cpu.load("_emulated"), **settings)


def built() -> Any:
    """The compiled module whose ops the test runs."""
    return seqkernels._C if PLACE == "cuda" else module()


@contextlib.contextmanager
def tiers(*names: str) -> Iterator[None]:
    """Enables only these tiers."""
    before = built().set_cuda_tiers(names)
    try:
        yield
    finally:
        built().set_cuda_tiers(before)


@contextlib.contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Allows or disallows TF32 in float32 matrix products."""
    before = built().set_tf32(allow)
    try:
        yield
    finally:
        built().set_tf32(before)


GATES = {
    "lstm": 4,
    "lstm_coupled": 3,
    "gru": 3,
    "gru_before": 3,
    "mgu_after": 2,
    "mgu": 2,
    "rnn_tanh": 1,
    "rnn_relu": 1,
    "slstm": 4,
    "slstm_exp": 4,
}
LSTMS = ("lstm", "lstm_coupled")
SLSTMS = ("slstm", "slstm_exp")
PLAIN = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer: dense, padded with lengths, or packed."""

    kind: str = "lstm"
    B: int = 3
    T: int = 4
    D: int = 5
    H: int = 17
    form: str = "dense"
    bidirectional: bool = False
    bias: bool = True
    state: bool = True
    options: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    why: str = ""

    def __str__(self) -> str:
        flags = ["bi"] * self.bidirectional + ["nobias"] * (not self.bias) + ["nostate"] * (not self.state)
        name = str(self.dtype).removeprefix("torch.")
        return "-".join([self.kind, f"B{self.B}T{self.T}D{self.D}H{self.H}", self.form, *flags, *self.options, name])


@dataclasses.dataclass
class Inputs:
    x: Tensor
    states: list[Tensor | None]
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None
    extras: dict[str, Any]

    def flat(self, bidirectional: bool) -> tuple[Any, ...]:
        return self.x, *self.states, self.weights, self.batch_sizes, self.lengths, bidirectional


def inputs_of(layer: Layer) -> Inputs:
    B, T, D, H, G = layer.B, layer.T, layer.D, layer.H, GATES[layer.kind]
    directions = 2 if layer.bidirectional else 1
    has_c = layer.kind in LSTMS
    states_of = KINDS[layer.kind].states
    some = B > 0 and T > 0
    lengths = torch.tensor(
        ragged(B, T, zeros=layer.form == "lengths", ordered=layer.form == "packed") if some else (0,) * B
    )
    batch_sizes = None
    leading: tuple[int, ...] = (T, B)
    if layer.form == "packed":
        batch_sizes = torch.tensor([int((lengths > t).sum()) for t in range(T)])
        leading = (int(lengths.sum()),)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape) * scale).to(layer.dtype)

    weights = []
    for _ in range(directions):
        weights += [draw(G * H, D, scale=D**-0.5), draw(G * H, H, scale=H**-0.5)]
        weights += [draw(G * H, scale=0.3), draw(G * H, scale=0.3)] * layer.bias
        weights += [draw((G - 1) * H, scale=0.5)] * ("peephole" in layer.options)
    x = draw(*leading, D)
    if "strided" in layer.options:  # the strides of batch_first
        x = x.transpose(0, 1).contiguous().transpose(0, 1) if layer.form != "packed" else draw(leading[0], 2 * D)[:, :D]
    states = [draw(directions, B, H) if layer.state else None for _ in states_of]
    if layer.state:  # the normaliser must be positive
        states = [s.abs() + 0.5 if name == "n" else s for name, s in zip(states_of, states)]

    def mask(p: float) -> Tensor:
        return (torch.rand(*leading, directions * H) < p).to(torch.uint8)

    extras: dict[str, Any] = {} if layer.bias else {"bias": False}
    numbers = [float("inf"), float("inf"), 0.0, 0.0, 0.0, 1e-5]
    for option in layer.options:
        if option == "peephole":
            extras["peephole"] = True
        elif option == "reset":
            extras["reset"] = torch.rand(*leading) < 0.3
        elif option == "zoneout":
            extras["zoneout_h"] = mask(0.4)
            numbers[3] = 0.25 * has_c
        elif option == "zoneout_masks":
            extras["zoneout_h"] = mask(0.4)
            if has_c:
                extras["zoneout_c"] = mask(0.4)
        elif option == "dropout":
            extras["candidate"] = mask(0.7)
            numbers[4] = 0.3
        elif option == "variational":
            extras["variational"] = (torch.rand(directions, B, H) < 0.7).to(layer.dtype) / 0.7
        elif option == "clip":
            numbers[1] = 0.5 if layer.kind not in SLSTMS else float("inf")
            if has_c:
                numbers[0] = 0.3
    if any(n not in (0.0, float("inf")) for n in numbers[:5]):
        extras["numbers"] = numbers
    return Inputs(x, states, weights, batch_sizes, None if layer.form != "lengths" else lengths, extras)


def forward(layer: Layer, of: Inputs, **more: Any) -> tuple[Tensor, ...]:
    return getattr(ops(), layer.kind + "_forward")(*of.flat(layer.bidirectional), **of.extras, **more)


def backward(
    layer: Layer, of: Inputs, kept: Sequence[Tensor], upstream: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Gradients of x, states and weights. kept: all results of forward."""
    states = len(of.states)
    memories = kept[2 + states :]
    names = [f"d{name}_steps" for name in KINDS[layer.kind].states[1:]]
    extras = dict(of.extras, **dict(zip(names, upstream[1 + states :])))
    dx, *rest = getattr(ops(), layer.kind + "_backward")(
        *upstream[: 1 + states],
        *of.flat(layer.bidirectional),
        kept[0],
        kept[1 + states],
        *memories,
        True,
        True,
        **extras,
    )
    return dx, *rest[:states], *rest[states]


def expected(layer: Layer, of: Inputs) -> tuple[tuple[Tensor, ...], list[Tensor], list[Tensor]]:
    """Results of the definition in float64: outputs, random upstream gradients, gradients."""

    def leaf(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.double().requires_grad_()

    x, states, weights = leaf(of.x), [leaf(s) for s in of.states], [leaf(w) for w in of.weights]
    extras = dict(of.extras)
    if "variational" in extras:
        extras["variational"] = extras["variational"].double()
    outputs = reference.recurrent.layer(
        layer.kind, x, states, weights, of.batch_sizes, of.lengths, layer.bidirectional, **extras
    )
    upstream = [torch.randn_like(y).to(layer.dtype) for y in outputs]
    if layer.kind in SLSTMS and layer.dtype != torch.float64:
        # The gradients of c, n and m are discontinuous where the maximum of the stabiliser changes; that of h is not.
        upstream = [g if i < 2 else torch.zeros_like(g) for i, g in enumerate(upstream)]
    wanted = [t for t in (x, *states, *weights) if t is not None]
    gradients = torch.autograd.grad(outputs, wanted, [g.double() for g in upstream], allow_unused=True)
    return outputs, upstream, [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients)]


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype, what: str, tolerance: float) -> None:
    assert found.dtype == dtype and found.shape == wanted.shape, what
    if not wanted.numel():
        return
    assert found.isfinite().all(), f"{what} has unwritten values"
    error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
    assert error <= tolerance, f"{what}: off by {error:.2e}"


def check_layer(layer: Layer, tolerance: float | None = None, recompute: bool = False) -> None:
    of = inputs_of(layer)
    tolerance = TOLERANCE[layer.dtype] if tolerance is None else tolerance
    outputs, upstream, gradients = expected(layer, of)
    last = 1 + len(of.states)
    kept = forward(layer, of, **({"recompute": True} if recompute else {}))
    letters = KINDS[layer.kind].states
    names = ["y", *(f"{s}_n" for s in letters), *(f"{s}_steps" for s in letters[1:])]
    got, want = dict(zip(names, (*kept[:last], *kept[last + 1 :]))), dict(zip(names, outputs))
    if layer.dtype != torch.float64:
        got, want = without_stabiliser(letters, got), without_stabiliser(letters, want)
    for name in names:
        check(got[name], want[name], layer.dtype, name, tolerance)
    inferred = getattr(ops(), layer.kind)(*of.flat(layer.bidirectional), **of.extras)
    for name, found, wanted in zip(names, inferred, kept):
        assert torch.equal(found, wanted), f"{name} of inference"
    found_gradients = [g for g in backward(layer, of, kept, upstream) if g is not None and g.shape != (0,)]
    names = ["dx", *[f"d{s}0" for s in letters] * layer.state, *(f"dw[{i}]" for i in range(len(of.weights)))]
    gradients = [g for g in gradients if g.shape != (0,)]
    assert len(found_gradients) == len(gradients)
    for name, found, wanted in zip(names, found_gradients, gradients, strict=True):
        # Half types also store the gradients of the gates in half precision.
        check(found, wanted, layer.dtype, name, tolerance * (2 if layer.dtype.itemsize == 2 else 1))


FORMS = ("dense", "lengths", "packed")

LAYERS = [
    Layer(B=1, T=1, D=1, H=1, why="the smallest"),
    Layer(bidirectional=True, why="both directions"),
    Layer(B=2, T=3, D=8, H=8, why="whole strips"),
    Layer(B=17, T=2, D=3, H=33, form="lengths", why="two tiles of sequences, two blocks of K"),
    Layer(B=70, T=2, D=3, H=5, form="packed", why="two groups of sequences"),
    Layer(B=3, T=5, D=70, H=70, why="several tiles of the products"),
    Layer(B=4, T=3, bias=False, state=False, form="packed", bidirectional=True, why="from nothing"),
    Layer(B=4, T=3, bias=False, state=False, kind="gru", form="lengths", why="from nothing"),
    Layer(B=0, T=3, why="an empty batch"),
    Layer(B=3, T=0, why="no steps"),
    Layer(B=2, T=0, form="lengths", kind="gru", why="no steps, with lengths"),
    Layer(options=("strided",), D=8, why="batch_first"),
    Layer(options=("strided",), D=8, form="packed", why="rows apart"),
]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layer", sanitized(LAYERS, lambda layer: layer.H in (33, 70)), ids=str)
def test_layers(layer: Layer, dtype: torch.dtype) -> None:
    check_layer(dataclasses.replace(layer, dtype=dtype))


OPTIONS = [
    ("reset",),
    ("zoneout",),
    ("zoneout_masks",),
    ("dropout",),
    ("variational",),
    ("clip",),
    ("reset", "zoneout_masks", "dropout", "variational", "clip"),
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", GATES)
def test_kinds(kind: str, form: str, dtype: torch.dtype) -> None:
    check_layer(Layer(kind=kind, form=form, bidirectional=True, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(  # except rnn_relu, whose derivative is discontinuous
    "kind", sanitized([kind for kind in GATES if kind != "rnn_relu"], lambda kind: kind in ("lstm", "gru_before"))
)
def test_kinds_with_one_launch_per_step(kind: str, dtype: torch.dtype) -> None:
    """Half types, for which other tiers are disabled."""
    with tiers("steps"):
        for form, options in zip(FORMS, (("reset",), ("zoneout_masks", "dropout"), ("variational",)), strict=True):
            check_layer(Layer(kind=kind, form=form, bidirectional=True, options=options, dtype=dtype, B=4))


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
@pytest.mark.parametrize("kind", GATES)
def test_options(kind: str, options: tuple[str, ...]) -> None:
    form = FORMS[(list(GATES).index(kind) + OPTIONS.index(options)) % 3]
    check_layer(Layer(kind=kind, form=form, bidirectional=True, options=options, dtype=torch.float64, B=4))


in_any_order = pytest.mark.parametrize("mode", [*cuda_on_cpu.LOCKSTEP, *cuda_on_cpu.SCHEDULES], ids=str)

# Layers that the cluster tier supports in half types.
CLUSTERS = [
    *(Layer(kind=kind, form=form, H=24, T=5, bidirectional=True) for kind, form in itertools.product(PLAIN, FORMS)),
    Layer(B=1, T=2, D=1, H=8, why="one strip"),
    Layer(B=2, T=3, H=72, why="two groups per block, one without units; half a group; a partial block of K"),
    Layer(B=2, T=3, H=72, kind="gru", bias=False, state=False, why="from nothing"),
    Layer(B=17, T=4, H=16, form="lengths", kind="gru", why="tiles of several sequences"),
    Layer(B=18, T=4, H=16, form="packed", kind="rnn_tanh", why="tiles of several sequences"),
    Layer(B=70, T=3, H=16, form="packed", why="tiles of eight sequences"),
    *(
        Layer(kind=kind, form=form, H=16, T=6, bidirectional=True, options=("reset",))
        for kind, form in (("lstm", "lengths"), ("gru", "packed"), ("rnn_relu", "dense"), ("lstm", "packed"))
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layer", sanitized(CLUSTERS, lambda layer: layer.H == 72 or "several" in layer.why), ids=str)
def test_clusters(layer: Layer, dtype: torch.dtype) -> None:
    check_layer(dataclasses.replace(layer, dtype=dtype))


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@ONLY_EMULATED
def test_large_clusters(kind: str) -> None:
    """With more multiprocessors, a layer is split into more blocks."""
    layer = Layer(kind=kind, B=2, T=3, D=4, H=136, form="lengths", bidirectional=True, dtype=torch.bfloat16)
    with machine(multiprocessors=132):
        check_layer(layer)


@pytest.mark.parametrize(
    ("kind", "H", "mode"),
    [("lstm", 520, {}), ("gru", 520, {}), ("rnn_tanh", 520, {}), ("lstm", 768, {}), ("lstm", 520, {"races": 1})],
    ids=str,
)
def test_clusters_of_three_groups(kind: str, H: int, mode: dict[str, int]) -> None:
    layer = Layer(kind=kind, B=2, T=3, D=4, H=H, form="lengths", dtype=torch.bfloat16)
    if PLACE == "cuda":
        if mode:
            pytest.skip("only the emulation detects races")
        check_tier("cluster", layer)
        return
    with machine(multiprocessors=132, **mode), tiers("cluster"):
        check_layer(layer)


@in_any_order
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@ONLY_EMULATED
def test_clusters_in_any_order(kind: str, mode: dict[str, int]) -> None:
    """Double buffering of the exchange between blocks is sufficient for any order of blocks."""
    layer = Layer(kind=kind, B=2, T=7, D=4, H=40, form="lengths", bidirectional=True, dtype=torch.float16)
    with machine(**mode):
        check_layer(layer)


HOPPER = {"major": 9, "multiprocessors": 132, "shared_bytes": 227 * 1024}
AMPERE = {"major": 8}  # no clusters


def plan_of(layer: Layer, settings: dict[str, int]) -> Any:
    """The plan of a layer for a device with these settings."""
    device = HOPPER | {"multiprocessors": 8} | settings
    return module().explain_recurrent_cuda(
        kind=layer.kind,
        dtype=str(layer.dtype).removeprefix("torch."),
        T=layer.T,
        B=layer.B,
        D=layer.D,
        H=layer.H,
        directions=1 + layer.bidirectional,
        options=["zoneout_h"] if {*layer.options} - {"reset", "strided"} else [],
        tf32=layer.dtype == torch.float32,
        **device,
    )


def check_grid(layer: Layer, teams: tuple[int, int] | None = None, recompute: bool = False, **settings: int) -> None:
    """Asserts that the grid tier runs both passes, with (teams, blocks per team), and matches the definition."""
    settings = AMPERE | settings
    with tf32(layer.dtype == torch.float32), machine(**settings):
        device = {key: value for key, value in settings.items() if key in cuda_on_cpu.DEVICE_SETTINGS}
        for found in plan_of(layer, device).values():
            assert found["tier"] == "grid", found["reasons"]
            assert teams is None or (found["teams"], found["cluster"]) == teams
        check_layer(layer, tolerance=4e-3 if layer.dtype == torch.float32 else None, recompute=recompute)


HALF_TYPES_AND_TF32 = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d).removeprefix("torch.")
)
# Layers in the grid tier: multiprocessors, (teams, blocks per team).
GRIDS = [
    *(
        (Layer(kind=kind, form=form, H=24, T=5, bidirectional=True), 8, (2, 2))
        for kind, form in itertools.product(PLAIN, FORMS)
    ),
    *(
        (
            Layer(kind=kind, form=form, B=3, H=24, T=5, bidirectional=True, why="one direction after the other"),
            1,
            (1, 1),
        )
        for kind, form in (("lstm", "dense"), ("gru", "lengths"), ("rnn_tanh", "packed"), ("lstm", "packed"))
    ),
    (Layer(B=21, H=40, T=3, bidirectional=True, why="one after the other, several tiles"), 2, (1, 2)),
    (Layer(B=1, T=2, D=1, H=1, why="the smallest"), 8, (1, 1)),
    (Layer(B=2, T=3, H=72, kind="gru", bias=False, state=False, why="no initial state, a partial pair"), 8, (1, 5)),
    (Layer(B=5, T=4, H=40, why="two pairs per block, one of them without units"), 2, (1, 2)),
    (Layer(B=5, T=3, H=40, kind="gru", form="lengths", bidirectional=True, why="the same"), 4, (1, 2)),
    (Layer(B=18, T=5, H=17, form="lengths", why="a team with three tiles"), 1, (1, 1)),
    (Layer(B=9, T=5, H=16, kind="rnn_tanh", form="packed", why="a team with two tiles"), 1, (1, 1)),
    (Layer(B=21, T=4, H=24, kind="gru", form="packed", why="two pairs per block, for fewer tiles"), 4, (3, 1)),
    (Layer(B=37, T=3, H=33, kind="rnn_relu", form="lengths", why="teams with several tiles"), 6, (2, 3)),
    *(
        (Layer(kind=kind, form=form, H=16, T=6, bidirectional=True, options=("reset",)), 2, (1, 1))
        for kind, form in (("lstm", "lengths"), ("gru", "packed"), ("rnn_relu", "dense"), ("lstm", "packed"))
    ),
]


@HALF_TYPES_AND_TF32
@pytest.mark.parametrize(("layer", "multiprocessors", "teams"), GRIDS, ids=str)
@ONLY_EMULATED
def test_grids(layer: Layer, multiprocessors: int, teams: tuple[int, int], dtype: torch.dtype) -> None:
    check_grid(dataclasses.replace(layer, dtype=dtype), teams, multiprocessors=multiprocessors)


# Each cell with all its options.
PERSISTENT_OPTIONS = [("peephole",), *OPTIONS[1:-1], ("peephole", *OPTIONS[-1])]


def options_of(kind: str, options: tuple[str, ...]) -> tuple[str, ...]:
    return options if kind in LSTMS else tuple(option for option in options if option != "peephole")


def everything(layer: Layer, of: Inputs) -> list[Tensor]:
    """Outputs and gradients, for upstream gradients of 1."""
    kept = forward(layer, of)
    upstream = [torch.ones_like(t) for t in kept[: 1 + len(of.states)]]
    return [t for t in (*kept[: len(upstream)], *backward(layer, of, kept, upstream)) if t is not None]


def check_tier(tier: str, layer: Layer) -> None:
    """Compares a tier with the definition, and with the steps tier, which multiplies the same numbers.

    Cells with a discontinuous derivative (clips, relu) are only compared with the steps tier, because rounding decides
    on which side of the discontinuity a value is.
    """
    wide = layer.dtype == torch.float32
    with tf32(wide):
        of = inputs_of(layer)
        with tiers(tier):
            found = everything(layer, of)
            if "clip" not in layer.options and layer.kind != "rnn_relu":
                check_layer(layer, tolerance=4e-3 if wide else None)
        # Another summation order may change the rounding of a TF32 operand, by 2^-11.
        tolerance = 1e-3 if wide else TOLERANCE[layer.dtype]
        with tiers("steps"):
            for one, other in zip(found, everything(layer, of), strict=True):
                check(one, other.double(), layer.dtype, "of the steps tier", tolerance)


@pytest.mark.parametrize(
    "options", sanitized(PERSISTENT_OPTIONS, lambda options: options == ("peephole",)), ids="-".join
)
@pytest.mark.parametrize("kind", GATES)
def test_clusters_with_options(kind: str, options: tuple[str, ...]) -> None:
    """In one launch for all steps."""
    form = FORMS[([*GATES].index(kind) + PERSISTENT_OPTIONS.index(options)) % 3]
    layer = Layer(kind=kind, form=form, B=5, T=5, H=24, bidirectional=True, options=options_of(kind, options))
    for dtype in (torch.float32, torch.bfloat16)[: 1 if "clip" in options else 2]:
        check_tier("cluster", dataclasses.replace(layer, dtype=dtype))


@pytest.mark.parametrize(
    "options", sanitized(PERSISTENT_OPTIONS, lambda options: options == ("peephole",)), ids="-".join
)
@pytest.mark.parametrize("kind", GATES)
def test_grids_with_options(kind: str, options: tuple[str, ...]) -> None:
    """In the grid tier, with one tile per team and with several."""
    form = FORMS[([*GATES].index(kind) + PERSISTENT_OPTIONS.index(options) + 1) % 3]
    layer = Layer(kind=kind, form=form, T=4, H=17, bidirectional=True, options=options_of(kind, options))
    for dtype in (torch.float32, torch.float16)[: 1 if "clip" in options else 2]:
        for B in (5, 18):
            check_tier("grid", dataclasses.replace(layer, B=B, dtype=dtype))


@pytest.mark.parametrize("tier", ["cluster", "grid"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", GATES)
def test_persistent_kernels_with_recompute(kind: str, form: str, tier: str) -> None:
    options = ("reset", "variational")
    with tiers(tier):
        for more in ((), options):
            layer = Layer(kind=kind, form=form, H=24, bidirectional=True, options=more, dtype=torch.bfloat16)
            check_layer(layer, recompute=True)


@in_any_order
@pytest.mark.parametrize("tier", ["cluster", "grid"])
@ONLY_EMULATED
def test_options_in_any_order(tier: str, mode: dict[str, int]) -> None:
    for kind in ("lstm", "gru_before"):
        options = options_of(kind, ("peephole", *OPTIONS[-1][:-1]))
        layer = Layer(kind=kind, B=5, T=6, H=40, form="lengths", options=options, dtype=torch.float16)
        with machine(**mode), tiers(tier):
            check_layer(layer)


def test_disabled_tiers() -> None:
    of = inputs_of(Layer(H=8))
    with (
        tiers("cluster", "grid"),
        pytest.raises(RuntimeError, match=r"float16 or TF32.*; steps: switched off"),
    ):
        ops().lstm(*of.flat(False))
    with pytest.raises(ValueError, match="names must name some of cell, cluster, grid and steps, got 'gird'"):
        built().set_cuda_tiers(["gird"])


@pytest.mark.parametrize(
    ("layer", "settings"),
    [
        (Layer(B=2, T=3, H=264), {"multiprocessors": 9}),  # weights in shared memory
        (
            Layer(B=2, T=3, H=264),
            {"multiprocessors": 9, "shared_bytes": 150_000},
        ),  # one block of K in shared memory, another streamed
        (Layer(B=3, T=3, H=264, kind="gru", form="lengths"), {"multiprocessors": 9, "shared_bytes": 102_000}),
        (Layer(B=2, T=2, H=392), {"multiprocessors": 13, "shared_bytes": 102_000}),  # streamed in both passes
    ],
    ids=str,
)
@ONLY_EMULATED
def test_weights_that_exceed_registers(layer: Layer, settings: dict[str, int]) -> None:
    check_grid(dataclasses.replace(layer, dtype=torch.float32), **settings)


@in_any_order
@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("multiprocessors", [2, 6])
@ONLY_EMULATED
def test_grids_in_any_order(kind: str, multiprocessors: int, mode: dict[str, int]) -> None:
    """Double buffering of the exchange is sufficient for any order of blocks, with one tile per team and several."""
    layer = Layer(kind=kind, B=18, T=6, D=4, H=40, form="lengths", dtype=torch.float16)
    check_grid(layer, multiprocessors=multiprocessors, **mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", PLAIN)
@ONLY_EMULATED
def test_bits_of_grids(kind: str, dtype: torch.dtype) -> None:
    """Bits are independent of the thread order, the partition and the batch; the steps tier differs by rounding."""
    layer = Layer(kind=kind, B=11, T=4, H=40, form="lengths", dtype=dtype)
    of = inputs_of(layer)
    few = dataclasses.replace(
        of,
        x=of.x[:, 2:5],
        states=[s[:, 2:5] for s in of.states if s is not None],
        lengths=of.lengths[2:5],  # type: ignore[index]
    )

    def run(of: Inputs, **settings: int) -> list[Tensor]:
        with machine(**(AMPERE | settings)):
            return everything(layer, of)

    with tf32(True):
        first = run(of)
        for settings in ({}, {"seed": 5}, {"backward": 1}, {"multiprocessors": 2}, {"multiprocessors": 6}):
            assert all(torch.equal(a, b) for a, b in zip(first, run(of, **settings)))
        assert torch.equal(run(few)[0], first[0][:, 2:5])
        tolerance = TOLERANCE[dtype] if dtype.itemsize == 2 else 4e-3
        with tiers("steps"):
            for one, other in zip(first, run(of)):
                check(one, other.double(), dtype, "of the steps tier", tolerance)
        clipped = dataclasses.replace(of, extras={"numbers": [float("inf"), 1e30, 0.0, 0.0, 0.0, 1e-5]})
        for one, other in zip(first, run(clipped)):
            check(one, other.double(), dtype, "of the kernels with options", tolerance)


@pytest.mark.parametrize("layer", [Layer(kind="gru_before", T=3), Layer(form="packed", T=3, B=18)], ids=str)
@ONLY_EMULATED
def test_steps_without_races(layer: Layer) -> None:
    with machine(races=1, unwritten=1):
        check_layer(dataclasses.replace(layer, bidirectional=True))


@pytest.mark.sanitize
@pytest.mark.parametrize(
    "layer",
    [
        Layer(form="lengths", bidirectional=True, why="one launch per step"),
        Layer(kind="gru", form="packed", H=20, bidirectional=True, why="one launch per step"),
        Layer(H=24, form="lengths", bidirectional=True, why="clusters"),
        Layer(kind="gru", H=24, form="packed", bidirectional=True, why="clusters"),
        Layer(kind="rnn_relu", H=40, why="clusters"),
    ],
    ids=str,
)
def test_tf32(layer: Layer) -> None:
    """float32 on tensor cores: operands of products have 11 significant bits, all else is float32."""
    with tf32(True):
        check_layer(layer, tolerance=4e-3)
        with pytest.raises(AssertionError, match="off by"):
            check_layer(layer, tolerance=1e-6)


@pytest.mark.parametrize(
    ("asked", "forward", "backward", "reason"),
    [
        (dict(dtype="bfloat16", B=16, T=1024, D=256, H=256), ("cluster", 8), ("cluster", 8), None),
        (dict(dtype="bfloat16", B=64, T=100, D=256, H=512), ("cluster", 16), ("cluster", 16), None),
        (dict(dtype="bfloat16", B=16, T=100, D=256, H=768), ("cluster", 16), ("cluster", 16), None),
        (dict(dtype="bfloat16", B=16, T=100, D=256, H=1024), ("grid", 64), ("grid", 64), "at most 768"),
        (dict(dtype="bfloat16", B=64, T=8, D=256, H=1024), ("grid", 64), ("grid", 32), "at most 768"),
        (dict(dtype="bfloat16", B=256, T=8, D=256, H=1024), ("grid", 64), ("grid", 64), "at most 768"),
        (dict(dtype="bfloat16", B=999, T=8, D=256, H=1024), ("steps", 1), ("steps", 1), "tiles of 8 sequences"),
        (
            dict(dtype="bfloat16", B=8, T=8, D=8, H=800, major=8, shared_bytes=8_000),
            ("steps", 1),
            ("steps", 1),
            "need",
        ),
        (dict(dtype="bfloat16", B=64, T=8, D=256, H=2048), ("grid", 128), ("grid", 128), "at most 768"),
        (dict(dtype="bfloat16", B=8, T=8, D=256, H=4096), ("grid", 128), ("grid", 128), "at most 768"),
        (dict(dtype="bfloat16", B=64, T=8, D=256, H=4096), ("steps", 1), ("steps", 1), "one after the other"),
        (dict(dtype="bfloat16", B=8, T=8, D=256, H=8192), ("steps", 1), ("steps", 1), "at most 4224 on 132"),
        (dict(dtype="float32", B=16, T=8, D=64, H=768, tf32=True), ("grid", 48), ("grid", 48), "do not fit"),
        (dict(dtype="float16", B=65536, T=8, D=64, H=256), ("steps", 1), ("steps", 1), "run at once"),
        (dict(dtype="float32", B=16, T=8, D=64, H=256), ("steps", 1), ("steps", 1), "float16 or TF32"),
        (dict(dtype="float32", B=16, T=8, D=64, H=256, tf32=True), ("cluster", 8), ("cluster", 8), None),
        (dict(dtype="float16", B=16, T=8, D=64, H=100), ("grid", 7), ("grid", 7), "multiple of 8"),
        (dict(dtype="float16", B=16, T=8, D=64, H=64, options=["zoneout_c"]), ("cluster", 2), ("cluster", 2), None),
        (
            dict(dtype="float16", B=16, T=8, D=64, H=640, options=["peephole"]),
            ("grid", 40),
            ("grid", 40),
            "512 with options",
        ),
        (dict(dtype="float16", B=16, T=8, D=64, H=64, major=8), ("grid", 4), ("grid", 4), "compute capability"),
        (dict(dtype="float16", B=16, T=8, D=64, H=64, major=7), ("none", 0), ("none", 0), "compute capability"),
        (
            dict(dtype="float16", B=16, T=8, D=64, H=64, kind="lstm_norm"),
            ("none", 0),
            ("none", 0),
            "lstm_norm has no CUDA kernel",
        ),
        (dict(dtype="float16", B=16, T=1, D=64, H=64), ("cell", 1), ("cell", 1), None),
        (dict(dtype="float64", B=16, T=1, D=64, H=64, kind="mgu"), ("cell", 1), ("cell", 1), None),
        (dict(dtype="float16", B=16, T=8, D=64, H=64, kind="mgu_after"), ("cluster", 2), ("cluster", 2), None),
        (dict(dtype="float16", B=16, T=8, D=64, H=64, kind="mgu"), ("cluster", 2), ("cluster", 2), None),
        (
            dict(dtype="float16", B=16, T=8, D=64, H=64, kind="gru_before", major=8),
            ("grid", 4),
            ("grid", 4),
            "capability",
        ),
    ],
)
@ONLY_EMULATED
def test_plan(asked: dict[str, Any], forward: Any, backward: Any, reason: str | None) -> None:
    """The tier that runs, and the reasons against the others."""
    plan = module().explain_recurrent_cuda(**{"kind": "lstm", **HOPPER, **asked})
    for found, wanted in ((plan["forward"], forward), (plan["backward"], backward)):
        assert (found["tier"], found.get("cluster", 0)) == wanted, found["reasons"]
        assert (reason is None) == (not found["reasons"])
        assert reason is None or any(reason in text for text in found["reasons"])


@ONLY_EMULATED
def test_plan_for_the_current_device() -> None:
    """The planner queries the occupancy; a layer that exceeds it is dispatched to the next tier."""
    asked = dict(kind="lstm", dtype="bfloat16", B=16, T=8, D=64, H=512)
    with machine(multiprocessors=131):
        assert module().explain_recurrent_cuda(**asked)["forward"]["tier"] == "cluster"
    with machine(multiprocessors=130, cluster_blocks=8):
        for found in module().explain_recurrent_cuda(**asked).values():
            assert found["tier"] == "grid"
            assert "runs no cluster of 16 blocks with" in found["reasons"][0]


@pytest.mark.parametrize("mode", [{}, {"races": 1}], ids=str)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@ONLY_EMULATED
def test_refused_clusters_are_replaced_by_smaller_ones(kind: str, mode: dict[str, int]) -> None:
    """16 blocks of two groups, or 8 of three."""
    layer = Layer(kind=kind, B=2, T=3, D=4, H=296, form="lengths", dtype=torch.bfloat16)
    asked = dict(kind=kind, dtype="bfloat16", B=2, T=3, D=4, H=296)
    for blocks, wanted in ((16, 16), (8, 8)):  # answers are cached by the number of multiprocessors
        with machine(multiprocessors=120 + blocks, cluster_blocks=blocks, **mode), tiers("cluster"):
            for found in module().explain_recurrent_cuda(**asked).values():
                assert (found["tier"], found["cluster"], found["reasons"]) == ("cluster", wanted, [])
            if blocks == 8:
                check_layer(layer)
    with machine(multiprocessors=124, cluster_blocks=4), tiers("cluster", "steps"):
        for found in module().explain_recurrent_cuda(**asked).values():
            assert found["tier"] == "steps" and "runs no cluster of 16 blocks with" in found["reasons"][0]


DESCRIBED = dict(device="cuda", capability=(9, 0), multiprocessors=132, shared_memory=227 << 10)


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes seqkernels.explain report a build with CUDA kernels on a machine without a GPU."""
    monkeypatch.setattr(importlib.import_module("seqkernels.explain"), "_C", module())
    monkeypatch.setattr(backend, "_CUDA_BUILT", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def precision() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


@ONLY_EMULATED
def test_explain_follows_the_precision_of_cudnn(with_cuda: None, precision: None) -> None:
    asked = dict(B=16, T=8, D=64, H=256, **DESCRIBED)
    torch.backends.cudnn.rnn.fp32_precision = "tf32"
    assert seqkernels.explain("lstm", **asked)["forward"]["tier"] == "cluster"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    answer = seqkernels.explain("lstm", **asked)
    assert answer["kernel"] == "cuda"
    for found in (answer["forward"], answer["backward"]):
        assert found["tier"] == "steps"
        assert any("TF32" in reason for reason in found["reasons"])


@pytest.mark.parametrize(
    ("changed", "tier", "reason"),
    [
        ({}, "cluster", None),
        (dict(options=["reset", "return_all_states", "memory_efficient", "learn_initial_state"]), "cluster", None),
        *((dict(options=[name]), "grid", "512 with options") for name in ("peephole", "zoneout_h", "zoneout_c")),
        *((dict(options=[name]), "grid", "512 with options") for name in ("cell_clip", "gate_clip")),
        *((dict(options=[f"{name}_dropout"]), "grid", "512 with") for name in ("recurrent", "variational")),
        (dict(num_heads=2), "none", "heads must be 1, got 2"),
        (dict(proj_size=64), "none", "a projection must be absent, got one to 64"),
        (dict(proj_size=640), "none", "a projection must be absent, got one to 640"),
        (dict(capability=(8, 6)), "grid", "9.0 or more, got 8.6"),
        (dict(multiprocessors=16), "cluster", None),
        (dict(multiprocessors=15), "steps", "runs no cluster of 16"),
        (dict(shared_memory=50_000), "grid", "the weights of H = 640 do not fit"),
    ],
    ids=str,
)
@ONLY_EMULATED
def test_explain_for_layers_and_devices(
    with_cuda: None, changed: dict[str, Any], tier: str, reason: str | None
) -> None:
    asked = dict(B=2, T=8, D=64, H=640, dtype=torch.bfloat16, **DESCRIBED) | changed
    with machine(multiprocessors=1, cluster_blocks=1, shared_bytes=1 << 10):  # the current device is not queried
        answer = seqkernels.explain("lstm", **asked)
    for found in (answer["forward"], answer["backward"]):
        assert found["tier"] == tier, found["reasons"]
        assert (reason is None) == (not found["reasons"])
        assert reason is None or any(reason in text for text in found["reasons"])


@ONLY_EMULATED
def test_explain_launch_configuration(with_cuda: None) -> None:
    asked = dict(B=40, T=8, D=64, dtype=torch.bfloat16, bidirectional=True, **DESCRIBED)
    for H, tier in ((64, "cluster"), (100, "grid"), (1024, "grid")):
        answer = seqkernels.explain("lstm", H=H, **asked)
        for found in (answer["forward"], answer["backward"]):
            assert found["tier"] == tier
            shared = -(-40 // found["rows"]) if tier == "cluster" else found["teams"]
            assert found["grid"] == (2 * shared * found["cluster"], 1, 1)
            assert found["block"] % 32 == 0
            assert 0 < found["shared_bytes"] <= DESCRIBED["shared_memory"]
    found = seqkernels.explain("gru_before", H=64, **(asked | {"dtype": torch.float64}))["forward"]
    assert (found["tier"], found["grid"][0], found["grid"][2]) == ("steps", 8, 2)


@ONLY_EMULATED
def test_explain_with_recompute(with_cuda: None) -> None:
    asked = dict(B=16, T=8, D=64, H=64, dtype=torch.bfloat16, **DESCRIBED)
    kept = seqkernels.explain("lstm", **asked)
    again = seqkernels.explain("lstm", options=["memory_efficient"], **asked)
    assert kept["forward"] == again["forward"]
    assert kept["backward"]["workspace"] < again["backward"]["workspace"]


@pytest.mark.parametrize(
    ("op", "changed", "error", "text"),
    [
        ("lstm", dict(options=["depth"]), ValueError, "options of lstm must be some of peephole, .*, got 'depth'"),
        ("gru", dict(options=["peephole"]), ValueError, "options of gru must be some of gate_clip, .*got 'peephole'"),
        ("lstm", dict(options=["coupled_gates"]), ValueError, "options of lstm must be some of"),
        ("lstm", dict(options="peephole"), TypeError, "options must be a sequence of names, got 'peephole'"),
        ("lstm", dict(multiprocessors=None), ValueError, r"must be given together, got \(9, 0\), None and 232448"),
        ("lstm", dict(capability=(0, 0)), ValueError, r"must be above 0, got \(0, 0\), 132 and 232448"),
        ("lstm", dict(multiprocessors=0), ValueError, r"must be above 0, got \(9, 0\), 0 and 232448"),
        ("lstm", dict(H=0), ValueError, "H must be at least 1, got 0"),
        ("lstm", dict(num_heads=0), ValueError, "num_heads must be at least 1, got 0"),
        ("lstm", dict(B=-1), ValueError, "B must be at least 0, got -1"),
        ("lstm", dict(device="cpu"), ValueError, "a description must be of a CUDA device, got one for cpu"),
        (
            "lstm",
            dict(capability=None, multiprocessors=None, shared_memory=None),
            ValueError,
            "must be given where there is no CUDA device",
        ),
        ("lstm", dict(dtype=torch.int32), NotImplementedError, "no backend supports a layer, torch.int32, on cuda"),
    ],
    ids=str,
)
@ONLY_EMULATED
def test_explain_errors(with_cuda: None, op: str, changed: dict[str, Any], error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        seqkernels.explain(op, **(dict(B=2, T=8, D=64, H=64, **DESCRIBED) | changed))


@ONLY_EMULATED
def test_python_and_planner_support_the_same_layers() -> None:
    for kind in KINDS:
        for heads, P in ((1, 0), (2, 0), (1, 8)):
            asked = dict(kind=kind, dtype="float32", B=2, T=8, D=8, H=16, heads=heads, P=P)
            found = module().explain_recurrent_cuda(**asked, **HOPPER)["forward"]
            why = backend.unsupported_layer_on_cuda(KINDS[kind], heads, P > 0)
            assert bool(why) == (found["tier"] == "none"), (found["reasons"], why)
            assert all(any(reason in text for text in found["reasons"]) for reason in why)


@ONLY_EMULATED
def test_explain_without_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without Triton."""
    monkeypatch.setattr(backend, "_CUDA_BUILT", False)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        NotImplementedError, match=r"no backend supports a layer.* cuda: this build has no CUDA kernels"
    ):
        seqkernels.explain("lstm", B=2, T=8, D=64, H=64, **DESCRIBED)
    with pytest.raises(
        NotImplementedError, match=r"no backend supports a table.* cuda: this build has no CUDA kernels"
    ):
        seqkernels.explain("embedding_bag", E=10, D=8, N=4, B=2, device="cuda")


def test_errors() -> None:
    of = inputs_of(Layer(H=8))
    weights = [of.weights[0], of.weights[1][:, :4].contiguous(), *of.weights[2:]]
    with pytest.raises(RuntimeError, match="heads must be 1, got 2"):
        ops().lstm(of.x, *of.states, weights, None, None, False, heads=2)
    weights = [*of.weights, torch.eye(8)]  # a projection to H columns is also a projection
    with pytest.raises(RuntimeError, match="a projection must be absent, got one to 8"):
        ops().lstm(of.x, *of.states, weights, None, None, False, projected=True)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", LSTMS)
def test_peephole(kind: str, dtype: torch.dtype) -> None:
    options = ("peephole", "zoneout_masks", "clip") if dtype.itemsize > 2 else ("peephole",)
    check_layer(Layer(kind=kind, form="lengths", bidirectional=True, options=options, dtype=dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", GATES)
def test_recompute(kind: str, form: str) -> None:
    """Backward recomputes the gates that forward did not save."""
    options = ("reset", "variational")
    check_layer(Layer(kind=kind, form=form, bidirectional=True, options=options, dtype=torch.float64), recompute=True)
    check_layer(Layer(kind=kind, form=form, dtype=torch.float64), recompute=True)


def test_many_packed_steps() -> None:
    """More steps than the capacity of a kernel argument."""
    check_layer(Layer(kind="rnn_tanh", B=2, T=460, D=1, H=2, form="packed", bidirectional=True, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["lstm", "gru_before"])
def test_bits_of_a_sequence_are_independent_of_the_batch(kind: str) -> None:
    """A sequence has the same bits alone, padded and packed."""
    layer = Layer(kind=kind, B=5, T=6, D=4, H=9, form="packed", bidirectional=True)
    of = inputs_of(layer)
    packed = forward(layer, of)[0]
    assert of.batch_sizes is not None
    lengths = [int((of.batch_sizes > b).sum()) for b in range(layer.B)]
    offsets = [0, *of.batch_sizes.cumsum(0).tolist()]
    padded = of.x.new_zeros(layer.T, layer.B, layer.D)
    for b, length in enumerate(lengths):
        rows = [offsets[t] + b for t in range(length)]
        padded[:length, b] = of.x[rows]
        alone = dataclasses.replace(
            of,
            x=of.x[rows].unsqueeze(1),
            states=[s[:, b : b + 1] for s in of.states if s is not None],
            batch_sizes=None,
        )
        assert torch.equal(forward(layer, alone)[0][:, 0], packed[rows])
    among = forward(layer, dataclasses.replace(of, x=padded, batch_sizes=None, lengths=torch.tensor(lengths)))[0]
    for b, length in enumerate(lengths):
        assert torch.equal(among[:length, b], packed[[offsets[t] + b for t in range(length)]])
        assert not among[length:, b].any()


@pytest.mark.sanitize
def test_repeated_runs_have_the_same_bits() -> None:
    layer = Layer(kind="gru", B=18, T=3, H=20, form="lengths", bidirectional=True, dtype=torch.bfloat16)
    of = inputs_of(layer)
    runs = []
    for _ in range(2):
        kept = forward(layer, of)
        runs.append([*kept, *backward(layer, of, kept, [torch.ones_like(t) for t in kept[:2]])])
    assert all(torch.equal(a, b) for a, b in zip(*runs) if a is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d).removeprefix("torch."))
@ONLY_EMULATED
def test_bits_are_independent_of_the_tile_size(dtype: torch.dtype) -> None:
    """Matrix products with large tiles, on a small device, and with small tiles; long sums are split."""
    layer = Layer(kind="lstm_coupled", B=330, T=4, D=24, H=8, form="lengths", dtype=dtype)
    of = inputs_of(layer)
    runs = []
    for multiprocessors in (1, 132):
        with machine(major=8, multiprocessors=multiprocessors), tiers("steps"):
            kept = forward(layer, of)
            runs.append([*kept, *backward(layer, of, kept, [torch.ones_like(t) for t in kept[:3]])])
    assert all(torch.equal(a, b) for a, b in zip(*runs) if a is not None)
    with machine(major=8, multiprocessors=1), tiers("steps"):
        check_layer(layer)


# Single steps.
STEPS = [
    Layer(B=2, T=1, D=9, H=3, why="fewer units than a strip"),
    Layer(B=1, T=1, D=1, H=33, why="one column"),
    Layer(B=1, T=1, D=35, H=33, why="one sequence"),
    Layer(B=5, T=1, D=67, H=71, why="several tiles of the products"),
    Layer(B=70, T=1, D=7, H=19, why="two tiles of sequences"),
    Layer(B=5, T=1, D=9, bias=False, why="no bias"),
    Layer(B=5, T=1, D=9, state=False, why="from zeros"),
    Layer(B=5, T=1, D=9, bias=False, state=False, why="from nothing"),
]


def with_row_stride(t: Tensor) -> Tensor:
    """The same values with a larger row stride."""
    return torch.cat([t, torch.full_like(t, torch.nan)], -1)[..., : t.shape[-1]]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layer", sanitized(STEPS, lambda layer: layer.B == 70), ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_cells(kind: str, layer: Layer, dtype: torch.dtype) -> None:
    """Ops of cells against the definition and a layer of one step."""
    layer = dataclasses.replace(layer, kind=kind, dtype=dtype)
    of = inputs_of(layer)
    outputs, upstream, gradients = expected(layer, of)
    states = len(of.states)
    cell = [getattr(ops(), f"{kind}_cell{end}") for end in ("", "_forward", "_backward")]
    inputs = [of.x[0], *(None if s is None else s[0] for s in of.states), *of.weights]
    inputs += [None] * (3 + states + 2 - len(inputs))
    # In a layer of one step, y equals h, and cells equals c.
    into = [upstream[i][0] + upstream[i + 1][0] for i in range(0, 2 * states, 2)]
    runs = []
    for form in (lambda t: t, spread, with_row_stride):
        given = [None if t is None else form(t) for t in inputs]
        *found, saved = cell[1](*given)
        inferred = cell[0](*given)
        for now, again in zip(found, [inferred] if states == 1 else inferred, strict=True):
            assert torch.equal(now, again)
        dx, *rest = cell[2](*map(form, into), *given, *found, saved, True, True, True)
        runs.append([*found, dx, *rest])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True) if a is not None), "strides matter"
    for name, now, wanted in zip(("h", "c"), found, outputs[1:]):
        check(now, wanted[0], dtype, name, TOLERANCE[dtype])
    tolerance = TOLERANCE[dtype] * (2 if dtype.itemsize == 2 else 1)
    given_states = states * layer.state
    assert all(g is None for g in rest[given_states:states]) and len(rest) == states + 3 + (kind == "gru")
    rest = [*rest[:given_states], *(g for g in rest[states:] if g is not None)]
    wanted = [g[0] if i <= given_states else g for i, g in enumerate(gradients)]
    assert len(rest) + 1 == len(wanted) - (
        layer.bias and kind != "gru"
    )  # both biases have the same gradient, except for gru
    for i, (one, other) in enumerate(zip([dx, *rest], wanted)):
        check(one, other, dtype, f"gradient {i}", tolerance)

    kept = forward(layer, of)
    h_n, *c_n = kept[1 : 1 + states]
    of_layer = backward(layer, of, kept, [None, *(g.unsqueeze(0) for g in into)])
    of_layer = [g for g in of_layer if g is not None and g.shape != (0,)]
    for i, (one, other) in enumerate(zip([*found, dx, *rest], [h_n, *c_n, *of_layer])):
        assert torch.equal(one, other.view(one.shape)), f"{i}: differs from a layer of one step"


@pytest.mark.parametrize("need", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
@pytest.mark.parametrize("kind", PLAIN)
def test_requested_gradients_of_cells(kind: str, need: tuple[bool, ...]) -> None:
    of = inputs_of(Layer(kind=kind, T=1))
    inputs = [of.x[0], *(s[0] for s in of.states if s is not None), *of.weights]
    kept = getattr(ops(), kind + "_cell_forward")(*inputs)
    into = [torch.ones_like(t) for t in kept[:-1]]
    run = getattr(ops(), kind + "_cell_backward")
    every = run(*into, *inputs, *kept, True, True, True)
    some = run(*into, *inputs, *kept, *need)
    asked = [need[0], *[need[1]] * len(into), *[need[2]] * (len(every) - 1 - len(into))]
    for found, wanted, wants in zip(some, every, asked, strict=True):
        assert torch.equal(found, wanted) if wants else found is None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("layer", STEPS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in GATES if kind not in PLAIN])
def test_one_step(kind: str, layer: Layer, dtype: torch.dtype) -> None:
    """A layer of one step runs in the cell tier, also for kinds whose cells have no ops."""
    with tiers("cell"):
        check_layer(dataclasses.replace(layer, kind=kind, dtype=dtype))


STEP_OPTIONS = [("peephole",), *OPTIONS[1:-1], ("peephole", *OPTIONS[-1][1:])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("options", STEP_OPTIONS, ids="-".join)
@pytest.mark.parametrize("kind", GATES)
def test_options_of_one_step(kind: str, options: tuple[str, ...], dtype: torch.dtype) -> None:
    layer = Layer(kind=kind, B=5, T=1, D=9, dtype=dtype, options=options_of(kind, options))
    with tiers("cell"):
        check_layer(layer)
        check_layer(dataclasses.replace(layer, bias=False, state=False))
        check_layer(dataclasses.replace(layer, form="packed", bidirectional=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "rnn_relu"])  # its derivative is discontinuous
def test_options_of_one_step_in_half_types(kind: str, dtype: torch.dtype) -> None:
    options = options_of(kind, ("peephole", "zoneout_masks", "dropout", "variational"))
    with tiers("cell"):
        check_layer(Layer(kind=kind, B=5, T=1, D=9, dtype=dtype, options=options))


@pytest.mark.parametrize("kind", PLAIN)
def test_one_step_in_tf32(kind: str) -> None:
    layer = Layer(kind=kind, B=5, T=1, D=67, H=71, state=True)
    of = inputs_of(layer)
    exact = everything(layer, of)
    with tf32(True), tiers("cell"):
        check_layer(layer, tolerance=4e-3)
        assert not any(torch.equal(a, b) for a, b in zip(exact, everything(layer, of), strict=True) if a.dim() > 1)


@in_any_order
@pytest.mark.parametrize("kind", ["lstm_coupled", "gru", "mgu"])
@ONLY_EMULATED
def test_one_step_in_any_order(kind: str, mode: dict[str, int]) -> None:
    options = options_of(kind, STEP_OPTIONS[-1])
    with machine(**mode), tiers("cell"):
        check_layer(Layer(kind=kind, B=17, T=1, D=9, options=options, dtype=torch.float64))


@pytest.mark.parametrize(
    ("kind", "launches"),
    [("lstm", (3, 6)), ("lstm_coupled", (3, 6)), ("rnn_tanh", (3, 6)), ("gru", (3, 8)), ("mgu_after", (3, 8)),
     ("gru_before", (5, 10)), ("mgu", (5, 10))],
)  # fmt: skip
@ONLY_EMULATED
def test_launches_of_one_step(kind: str, launches: tuple[int, int]) -> None:
    """Forward: two products and the cell. Backward: the cell, four products and the bias gradients."""
    layer = Layer(kind=kind, B=70, T=1, D=9)
    of = inputs_of(layer)
    library = cuda_on_cpu.load("_emulated")
    start = cuda_on_cpu.counted(library, "launches")
    kept = forward(layer, of)
    middle = cuda_on_cpu.counted(library, "launches")
    backward(layer, of, kept, [torch.ones_like(t) for t in kept[: 1 + len(of.states)]])
    assert (middle - start, cuda_on_cpu.counted(library, "launches") - middle) == launches


@pytest.mark.parametrize(("form", "options"), [("lengths", ()), ("dense", ("reset",))])
def test_single_steps_that_the_cell_tier_does_not_support(form: str, options: tuple[str, ...]) -> None:
    layer = Layer(T=1, form=form, options=options)
    with tiers("cell"), pytest.raises(RuntimeError, match=f"cell: {(*options, form)[0]} must be absent"):
        forward(layer, inputs_of(layer))
    check_layer(layer)


@pytest.mark.parametrize("kind", ["lstm", "gru_before"])
def test_one_step_with_recompute(kind: str) -> None:
    layer = Layer(kind=kind, T=1, dtype=torch.float64)
    check_layer(layer, recompute=True)
    of = inputs_of(layer)
    with tiers("cell"):
        kept = forward(layer, of, recompute=True)
        with pytest.raises(RuntimeError, match="cell: what backward needs must have been saved"):
            backward(layer, of, kept, [torch.ones_like(t) for t in kept[: 1 + len(of.states)]])
