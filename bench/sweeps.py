"""The rows of `make report`: each operator at sizes that vary one at a time, forward and training, with two threads and
with one, its smallest call, and the peak memory of a training step.

    python -m pytest bench/sweeps.py --benchmark-only --minutes 16 --save-results [-k lstm]

The sizes of an operator are a star: each size varies while the others have their base value, so that the rows which
share all but one size are a curve. The inputs of a row pass parity before they are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import bench_additive_attention as additive
import bench_attention as attention
import bench_crf as crf
import bench_ctc as ctc
import bench_decoding as decoding
import bench_embedding_bag as bags
import bench_inference as prepared
import bench_recurrent as recurrent
import pytest
import torch
import torch.nn.functional as F
from harness import Contender, MemoryCase, Results, of_tensors
from report import counted
from torch import Tensor

import seqkernels

FORWARD, TRAINING = "forward", "training"
THREADS = (2, 1)
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Operator:
    """An operator of the report.

    contenders: of sizes and a pass, seqkernels first. work: of one call, by sizes and pass. smallest: the sizes of the
    call whose overhead is measured. memory: the sizes of a training step whose peak memory is measured.
    """

    name: str
    contenders: Callable[[dict[str, int], str], list[Contender]]
    work: Callable[[dict[str, int], str], float]
    base: Sizes
    along: Mapping[str, tuple[int, ...]]
    passes: tuple[str, ...] = (FORWARD, TRAINING)
    work_unit: str = "flop"
    smallest: Sizes | None = None
    memory: Sizes | None = None
    tolerance: float = 2e-5
    reference: Callable[[dict[str, int], str], Contender] | None = None  # of parity; otherwise the first peer

    def __str__(self) -> str:
        return self.name

    def points(self) -> Iterator[dict[str, int]]:
        yield dict(self.base)
        for dimension, values in self.along.items():
            for value in values:
                if value != self.base[dimension]:
                    yield {**self.base, dimension: value}

    def parity(self, contenders: list[Contender], sizes: dict[str, int], which: str) -> Any:
        if self.reference is not None:
            return [(self.reference(sizes, which), contenders[0])]
        able = [c for c in contenders if not c.refused]
        return [(able[1], c) for c in able if c is not able[1]]


def pair(make: Callable[..., Contender], ours: Any, theirs: Any, *arguments: Any) -> list[Contender]:
    return [make("ours", ours, *arguments), make("torch", theirs, *arguments)]


# ---- recurrent layers and cells


def shape_of(s: dict[str, int]) -> recurrent.Shape:
    return recurrent.Shape(s.get("T", 1), s["B"], s["H"], s["H"])


def layers_of(kind: str, s: dict[str, int]) -> list[torch.nn.Module]:
    torch.manual_seed(1)
    theirs = getattr(torch.nn, kind)(s["H"], s["H"], num_layers=s.get("layers", 1))
    ours = getattr(seqkernels.nn, kind)(s["H"], s["H"], num_layers=s.get("layers", 1))
    ours.load_state_dict(theirs.state_dict())
    return [ours, theirs]


def of_layers(pair_of: Callable[[dict[str, int]], Any], packed: bool = False) -> Callable[..., list[Contender]]:
    def contenders(s: dict[str, int], which: str) -> list[Contender]:
        ours, theirs = pair_of(s)
        shape = shape_of(s)
        batch = recurrent.Batch(shape, recurrent.drawn_lengths(shape) if packed else [shape.T] * shape.B)
        found = []
        for name, layer in (("ours", ours), ("torch", theirs)):
            if which == TRAINING:
                make = recurrent.packed_training if packed else recurrent.dense_training
                found.append(make(name, layer, *([] if packed else [layer]), batch))
            elif packed:
                found.append(packed_inference(name, layer.eval(), batch))
            else:
                found.append(recurrent.dense_inference(name, layer.eval(), batch))
        return found

    return contenders


def packed_inference(name: str, layer: torch.nn.Module, batch: recurrent.Batch) -> Contender:
    packed = batch.pack(batch.x)

    def step() -> Any:
        with torch.no_grad():
            return layer(packed)

    def result() -> Results:
        output, states = step()
        return {"output": output.data} | recurrent.named_states(states)

    return Contender(name, step, result)


def products(gates: int, packed: bool = False) -> Callable[[dict[str, int], str], float]:
    """Operations of the products with both weights, for the real steps."""

    def work(s: dict[str, int], which: str) -> float:
        shape = shape_of(s)
        steps = sum(recurrent.drawn_lengths(shape)) if packed else shape.T * shape.B
        each = 4.0 * gates * s["H"] ** 2 * s.get("layers", 1)
        return each * steps * (recurrent.TRAINING if which == TRAINING else 1)

    return work


def normalised(s: dict[str, int]) -> tuple[Any, Any]:
    ours = recurrent.our_layer(shape_of(s), "LSTM", layer_norm=True)
    return ours, recurrent.NormalisedLSTM(dict(ours.named_parameters()))


def of_cells(name: str) -> Callable[..., list[Contender]]:
    def contenders(s: dict[str, int], which: str) -> list[Contender]:
        torch.manual_seed(1)
        theirs, ours = (getattr(module, name)(s["H"], s["H"]) for module in (torch.nn, seqkernels.nn))
        ours.load_state_dict(theirs.state_dict())
        make = recurrent.cell_inference if which == FORWARD else recurrent.cell_training
        return pair(make, ours, theirs, shape_of(s))

    return contenders


def of_prepared(kind: str, weights: str) -> Callable[..., list[Contender]]:
    def contenders(s: dict[str, int], which: str) -> list[Contender]:
        shape = prepared.Shape(kind, s["T"], s["B"], s["H"], s["H"])
        layer, x = shape.layer(), shape.input()
        found = [
            prepared.of_module(f"ours, {weights}", prepared.prepared(layer, weights), x),
            prepared.of_module("torch", layer, x),
        ]
        if weights == "int8":
            return [*found, prepared.of_module("torch, dynamic int8", prepared.torch_int8(layer), x)]
        return [*found, prepared.onnxruntime("onnxruntime", shape, layer, torch.get_num_threads())]

    return contenders


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
LAYER = {"T": 64, "B": 16, "H": 128}
ALONG = {"T": (4, 16, 64, 256, 1024), "B": (1, 4, 16, 64), "H": (32, 64, 128, 256, 512)}
SMALLEST_LAYER, CELL = {"T": 1, "B": 1, "H": 8}, {"B": 8, "H": 128}
MEMORY = {"T": 400, "B": 16, "H": 256}

RECURRENT = [
    Operator(
        "LSTM",
        of_layers(lambda s: layers_of("LSTM", s)),
        products(4),
        LAYER | {"layers": 1},
        ALONG | {"layers": (1, 2, 4)},
        smallest=SMALLEST_LAYER | {"layers": 1},
        memory=MEMORY | {"layers": 1},
    ),
    *(
        Operator(
            kind,
            of_layers(lambda s, kind=kind: layers_of(kind, s)),
            products(GATES[kind]),
            LAYER,
            ALONG if kind == "GRU" else {"T": (4, 64, 1024), "B": (1, 16, 64), "H": (32, 128, 512)},
            smallest=SMALLEST_LAYER,
            memory=MEMORY,
        )
        for kind in ("GRU", "RNN")
    ),
    *(
        Operator(
            f"{kind}, packed sequences",
            of_layers(lambda s, kind=kind: layers_of(kind, s), packed=True),
            products(GATES[kind], packed=True),
            LAYER,
            {"T": (16, 64, 256, 512)} | ({"B": (4, 16, 64), "H": (64, 128, 256)} if kind == "LSTM" else {}),
            smallest={"T": 2, "B": 2, "H": 8},
            memory=MEMORY | {"T": 256},
        )
        for kind in ("LSTM", "GRU")
    ),
    Operator(
        "LSTM, layer norm",
        of_layers(normalised),
        products(4),
        LAYER | {"T": 32},  # rounding grows with T by the norm
        {"T": (4, 8, 16, 32), "B": (1, 16, 64), "H": (64, 128, 256)},
        memory=MEMORY | {"T": 32},
        tolerance=recurrent.NORMALISED_TOLERANCE,
    ),
    *(
        Operator(
            f"{kind}Cell",
            of_cells(f"{kind}Cell"),
            products(GATES[kind]),
            CELL,
            {"B": (1, 8, 64, 512), "H": (32, 128, 512)},
            smallest={"B": 1, "H": 8},
        )
        for kind in GATES
    ),
]

STREAM = {"T": 20, "B": 1, "H": 256}
PREPARED = [
    Operator(
        f"prepared {kind}, {weights}",
        of_prepared(kind, weights),
        products(GATES[kind]),
        STREAM,
        {"T": (1, 5, 20, 100), "B": (1, 4, 16), "H": (64, 128, 256, 512, 1024)},
        passes=(FORWARD,),
        smallest=SMALLEST_LAYER,
        tolerance=0.1 if weights == "int8" else 2e-5,
    )
    for kind, weights in (("LSTM", "float32"), ("LSTM", "int8"), ("GRU", "int8"))
]


# ---- bags and tables


def bag_shape(s: dict[str, int]) -> bags.Shape:
    return bags.Shape(s["E"], s["D"], s["B"], s["L"])


def of_bags(mode: str) -> Callable[..., list[Contender]]:
    calls = {"ours": bags.bag(bags.OURS, mode), "torch": bags.bag(bags.TORCH, mode)}

    def contenders(s: dict[str, int], which: str) -> list[Contender]:
        shape = bag_shape(s)
        lookups = bags.drawn(shape)
        found = looked_up(calls, shape, lookups, which)
        if mode == "sum" and which == FORWARD:
            found.append(bags.fbgemm_forward([bags.table_of(shape.E, shape.D)], lookups))
        return found

    return contenders


def looked_up(calls: dict[str, bags.Call], shape: bags.Shape, lookups: bags.Lookups, which: str) -> list[Contender]:
    if which == TRAINING:
        table = bags.leaf_of(shape)
        return [bags.backward(name, call, table, lookups, whole=True) for name, call in calls.items()]
    return [bags.forward(name, call, bags.table_of(shape.E, shape.D), lookups) for name, call in calls.items()]


def of_tables(s: dict[str, int], which: str) -> list[Contender]:
    shape = bags.Shape(s["E"], s["D"], s["N"], 1)
    functions = {"ours": seqkernels.functional.embedding, "torch": F.embedding}
    calls: dict[str, bags.Call] = {n: lambda table, x, f=f: f(x.indices, table) for n, f in functions.items()}
    return looked_up(calls, shape, bags.drawn(shape), which)


def traffic(s: dict[str, int], which: str) -> float:
    """Bytes that are read and written at least; a training step writes a dense gradient of the table."""
    shape = bag_shape(s) if "L" in s else bags.Shape(s["E"], s["D"], s["N"], 1)
    forward = bags.forward_bytes(shape)
    return forward if which == FORWARD else forward + bags.gradient_bytes(shape, shape.E)


BAG = {"E": 100_000, "D": 64, "B": 1024, "L": 20}
BAGS = [
    Operator(
        "EmbeddingBag, sum",
        of_bags("sum"),
        traffic,
        BAG,
        {"E": (1000, 10_000, 100_000, 1_000_000), "D": (16, 64, 256), "B": (16, 128, 1024, 8192), "L": (1, 5, 20, 100)},
        work_unit="byte",
        smallest={"E": 1000, "D": 8, "B": 1, "L": 1},
        memory={"E": 1_000_000, "D": 64, "B": 2048, "L": 20},
    ),
    Operator(
        "EmbeddingBag, max",
        of_bags("max"),
        traffic,
        BAG,
        {"D": (16, 64, 256), "B": (16, 128, 1024, 8192), "L": (1, 5, 20, 100)},
        work_unit="byte",
        smallest={"E": 1000, "D": 8, "B": 1, "L": 1},
        memory={"E": 1_000_000, "D": 64, "B": 2048, "L": 20},
    ),
    Operator(
        "Embedding",
        of_tables,
        traffic,
        {"E": 100_000, "D": 64, "N": 4096},
        {"N": (16, 256, 4096, 65_536), "D": (16, 64, 256)},
        work_unit="byte",
        smallest={"E": 1000, "D": 8, "N": 1},
        memory={"E": 1_000_000, "D": 64, "N": 16_384},
    ),
]


# ---- attention


def attention_shape(s: dict[str, int]) -> attention.Shape:
    return attention.Shape(s["B"], s["H"], s["L"], s["D"])


def of_attention(**options: Any) -> Callable[..., list[Contender]]:
    def contenders(s: dict[str, int], which: str) -> list[Contender]:
        tensors = attention.drawn(attention_shape(s))
        return [
            of_tensors(name, lambda *t, f=f: f(*t, **options), tensors, which == TRAINING)
            for name, f in (("ours", attention.OURS), ("torch", attention.TORCH))
        ]

    return contenders


def of_key_lengths(s: dict[str, int], which: str) -> list[Contender]:
    """Lengths from L / B to L; torch masks the other keys."""
    shape = attention_shape(s)
    lengths = torch.linspace(shape.L / shape.B, shape.L, shape.B).long()
    mask = (torch.arange(shape.L) < lengths[:, None])[:, None, None]
    tensors = attention.drawn(shape)
    return [
        of_tensors("ours", lambda *t: attention.OURS(*t, lengths=lengths), tensors, which == TRAINING),
        of_tensors("torch", lambda *t: attention.TORCH(*t, attn_mask=mask), tensors, which == TRAINING),
    ]


def of_multihead(s: dict[str, int], which: str) -> list[Contender]:
    torch.manual_seed(0)
    modules = [m.MultiheadAttention(s["E"], 8, batch_first=True) for m in (seqkernels.nn, torch.nn)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(s["B"], s["T"], s["E"], generator=torch.Generator().manual_seed(1)).requires_grad_()
    found = []
    for name, module in zip(("ours", "torch"), modules):
        module.train(which == TRAINING)

        def call(x: Tensor, *_: Tensor, module: Any = module) -> Tensor:
            return module(x, x, x, need_weights=False)[0]

        found.append(of_tensors(name, call, (x, *module.parameters()), which == TRAINING))
    return found


def of_additive(s: dict[str, int], which: str) -> list[Contender]:
    tensors = additive.drawn(additive.Shape(s["B"], s["Tq"], s["Tk"], s["H"]))
    functions = (("ours", additive.additive_attention), ("torch", additive.eager))
    return [of_tensors(name, f, tensors, which == TRAINING) for name, f in functions]


def attended(fraction: float) -> Callable[[dict[str, int], str], float]:
    def work(s: dict[str, int], which: str) -> float:
        shape = attention_shape(s)
        return (4.0 if which == FORWARD else 14.0) * shape.D * shape.pairs * fraction

    return work


def multihead_work(s: dict[str, int], which: str) -> float:
    tokens = s["B"] * s["T"]
    forward = 8.0 * tokens * s["E"] ** 2 + 4.0 * tokens * s["T"] * s["E"]
    return forward if which == FORWARD else 24.0 * tokens * s["E"] ** 2 + 14.0 * tokens * s["T"] * s["E"]


HEADS = {"B": 4, "H": 8, "L": 256, "D": 64}
SMALLEST_HEADS = {"B": 1, "H": 1, "L": 4, "D": 8}
MEMORY_HEADS = {"B": 4, "H": 8, "L": 1024, "D": 64}
ATTENTION = [
    Operator(
        "attention",
        of_attention(),
        attended(1.0),
        HEADS,
        {"L": (16, 64, 256, 1024), "B": (1, 4, 16), "D": (32, 64, 128)},
        smallest=SMALLEST_HEADS,
        memory=MEMORY_HEADS,
    ),
    Operator(
        "attention, causal",
        of_attention(is_causal=True),
        attended(0.5),
        HEADS,
        {"L": (16, 64, 256, 1024), "B": (1, 4, 16)},
        smallest=SMALLEST_HEADS,
        memory=MEMORY_HEADS,
    ),
    Operator(
        "attention, key lengths",
        of_key_lengths,
        attended(0.625),
        HEADS,
        {"L": (16, 64, 256, 1024)},
        memory=MEMORY_HEADS,
    ),
    Operator(
        "MultiheadAttention",
        of_multihead,
        multihead_work,
        {"T": 64, "B": 4, "E": 256},
        {"T": (16, 64, 256, 1024), "B": (1, 4, 16), "E": (64, 128, 256, 512)},
        smallest={"T": 4, "B": 1, "E": 16},
        memory={"T": 1024, "B": 4, "E": 256},
    ),
    Operator(
        "additive attention",
        of_additive,
        lambda s, which: additive.Shape(s["B"], s["Tq"], s["Tk"], s["H"]).work * (1 if which == FORWARD else 2),
        {"B": 8, "Tq": 50, "Tk": 50, "H": 256},
        {"Tk": (10, 50, 200), "Tq": (1, 10, 50, 200), "B": (1, 8, 32), "H": (64, 256, 512)},
        smallest={"B": 1, "Tq": 1, "Tk": 4, "H": 8},
        memory={"B": 8, "Tq": 200, "Tk": 200, "H": 256},
        tolerance=1e-4,
    ),
]


# ---- structured losses and decoding


def of_crf(path: bool) -> Callable[..., list[Contender]]:
    def contenders(s: dict[str, int], which: str) -> list[Contender]:
        shape = crf.Shape(s["B"], s["T"], s["N"])
        ours, theirs = crf.models(shape, "cpu")
        make = crf.decoding if path else crf.training if which == TRAINING else crf_likelihood
        return [make(name, m, shape, False, "cpu") for name, m in (("ours", ours), (crf.PEER, theirs))]

    return contenders


def crf_likelihood(name: str, model: Any, shape: crf.Shape, lengths: bool, device: str) -> Contender:
    emissions, tags, mask = crf.inputs(shape, lengths, device)

    def step() -> Tensor:
        with torch.no_grad():
            return model(emissions, tags, mask, "mean")

    return Contender(name, step, lambda: {"log likelihood": step()})


def of_ctc(s: dict[str, int], which: str) -> list[Contender]:
    make = ctc.training if which == TRAINING else ctc.inference
    return pair(make, ctc.ctc_loss, F.ctc_loss, ctc.Shape(s["B"], s["T"], s["V"], s["L"]), False)


def ctc_in_float64(s: dict[str, int], which: str) -> Contender:
    """torch's float32 has errors above 1e-3."""
    make = ctc.training if which == TRAINING else ctc.inference
    return make("float64", F.ctc_loss, ctc.Shape(s["B"], s["T"], s["V"], s["L"]), False, torch.float64)


def of_beam_search(s: dict[str, int], which: str) -> list[Contender]:
    shape = decoding.Shape(s["V"], s["H"], s["B"], s["beam"], T=20)
    ours, theirs = decoding.models(shape, ends=False, additive=False)
    found = [decoding.batched(shape, ours), decoding.one_at_a_time(shape, theirs)]
    found[0].name = "ours"
    return found


def beam_work(s: dict[str, int], which: str) -> float:
    return decoding.Shape(s["V"], s["H"], s["B"], s["beam"], T=20).work


TAGS, ALONG_TAGS = {"B": 32, "T": 50, "N": 10}, {"T": (10, 50, 200), "N": (5, 10, 20, 50), "B": (1, 8, 32, 128)}
LOSSES = [
    Operator(
        "CRF, log likelihood",
        of_crf(False),
        lambda s, which: (2.0 if which == FORWARD else 6.0) * crf.Shape(s["B"], s["T"], s["N"]).pairs,
        TAGS,
        ALONG_TAGS,
        smallest={"B": 1, "T": 2, "N": 3},
        memory={"B": 32, "T": 200, "N": 50},
        tolerance=1e-3,
    ),
    Operator(
        "CRF, best path",
        of_crf(True),
        lambda s, which: 2.0 * crf.Shape(s["B"], s["T"], s["N"]).pairs,
        TAGS,
        ALONG_TAGS,
        passes=(FORWARD,),
        smallest={"B": 1, "T": 2, "N": 3},
        tolerance=1e-3,
    ),
    Operator(
        "CTC loss",
        of_ctc,
        lambda s, which: (3.0 if which == FORWARD else 6.0) * s["B"] * s["T"] * (2 * s["L"] + 1),
        {"B": 8, "T": 200, "V": 64, "L": 30},
        {"T": (100, 200, 400, 1600), "B": (1, 8, 32), "V": (32, 64, 1000), "L": (10, 30, 90)},
        smallest={"B": 1, "T": 10, "V": 8, "L": 3},
        memory={"B": 32, "T": 400, "V": 64, "L": 60},
        tolerance=1e-4,
        reference=ctc_in_float64,
    ),
    Operator(
        "beam search",
        of_beam_search,
        beam_work,
        {"B": 8, "beam": 5, "V": 1000, "H": 128},
        {"B": (1, 8, 32), "beam": (2, 5, 10), "V": (1000, 4000, 16_000)},
        passes=(FORWARD,),
        tolerance=1e-4,
    ),
]

OPERATORS = {operator.name: operator for operator in (*RECURRENT, *BAGS, *ATTENTION, *LOSSES, *PREPARED)}


# ---- rows


@dataclass(frozen=True)
class Point:
    operator: Operator
    which: str
    sizes: dict[str, int] = field(hash=False)
    threads: int = 2

    @property
    def label(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.sizes.items())

    def __str__(self) -> str:
        return f"{self.operator}, {self.which}, {self.label}, {self.threads} threads"


# The passes and numbers of threads of a point follow one another, so that they share the state of the machine.
POINTS = [
    Point(operator, which, sizes, threads)
    for operator in OPERATORS.values()
    for sizes in operator.points()
    for which in operator.passes
    for threads in THREADS
]
SMALLEST = [
    Point(operator, which, dict(operator.smallest), 1)
    for operator in OPERATORS.values()
    if operator.smallest is not None
    for which in operator.passes
]
STEPS = [
    Point(operator, TRAINING, dict(operator.memory)) for operator in OPERATORS.values() if operator.memory is not None
]


def measure(bench: Any, point: Point, group: str) -> None:
    torch.set_num_threads(point.threads)
    operator, sizes = point.operator, dict(point.sizes)
    contenders = operator.contenders(sizes, point.which)
    bench.time(
        f"{operator}, {point.which}{group}",
        point.label + ("" if point.threads == 2 else f", {counted(point.threads, 'thread')}"),
        contenders,
        bars={},
        work=operator.work(sizes, point.which),
        work_unit=operator.work_unit,
        parity=operator.parity(contenders, sizes, point.which),
        tolerance=operator.tolerance,
        operator=operator.name,
        which=point.which,
        sizes=point.sizes,
        threads=point.threads,
    )


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_sizes(bench: Any, point: Point) -> None:
    measure(bench, point, "")


@pytest.mark.parametrize("point", SMALLEST, ids=str)
def test_smallest_call(bench: Any, point: Point) -> None:
    """The overhead of a call, with one thread."""
    measure(bench, point, ", smallest call")


def memory_case(operator: str, contender: int, sizes: dict[str, int]) -> MemoryCase:
    """A training step in a separate process; the smallest sizes start threads and load code."""
    of = OPERATORS[operator]
    small = {name: min(value, 4) if name != "E" else value for name, value in sizes.items()}
    warm, measured = (of.contenders(s, TRAINING)[contender] for s in (of.smallest or small, sizes))

    def step() -> None:
        if measured.before is not None:
            measured.before()
        measured.step()

    return MemoryCase(warm.step, step)


@pytest.mark.parametrize("point", STEPS, ids=str)
def test_peak_memory(bench: Any, point: Point) -> None:
    operator, sizes = point.operator, dict(point.sizes)
    contenders = operator.contenders(sizes, TRAINING)
    names = [c.name for c in contenders[:2]]
    bench.memory(
        f"{operator}, training, peak memory",
        point.label,
        "sweeps:memory_case",
        {n: {"operator": operator.name, "contender": i, "sizes": sizes} for i, n in enumerate(names)},
        bars={},
        parity=operator.parity(contenders, sizes, TRAINING),
        tolerance=operator.tolerance,
        processes=1,
        operator=operator.name,
        which=TRAINING,
        sizes=point.sizes,
    )
