"""A small model of the time of recurrent layers on a Hopper GPU, compared with measurements: no GPU is needed.

    python bench/model_gpu.py [FILE] [--set NAME=VALUE]

The model describes the kernels of commit a4358e7, which FILE (by default the recurrent rows of 2026-11-26, NVIDIA H200)
measured: layers in bfloat16 in the tiers cluster (all steps in one launch) and steps (a launch per step). It divides a
call into terms. Of each step: issued instructions, recurrent products, reads of weights from shared memory or L2, the
exchange of h (backward: of the gradients of the gates) between blocks, the sum over warps and a remainder. Around the
loop: the other products, memory traffic and a cost per call.

PUBLISHED has constants with their sources. FITTED names the constants that are adjusted to the measurements, by least
squares of relative errors; each serves all rows. The errors of fits without a row, and without both rows of a layer,
are printed too. GPC_SIZES is an assumption, which the output compares with another. It and the choice of the terms were
made with these rows in sight, so only new measurements can confirm the model.

--set replaces a published constant, to see what depends on it: with --set instructions=0, the fitted remainder accounts
for the issue of instructions.

Prints measured and predicted times, the terms of a step, and changes ranked by their predicted gain on the rows that
miss their goals.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent / "results" / "nvidia-h200-2-threads-2026-11-26-2.json"
TOLERANCE = 0.25


class Constant(NamedTuple):
    """A number with its unit and source."""

    value: float
    unit: str
    source: str


LUO = "Luo et al. 2024, arXiv:2402.13499, H800 PCIe"  # 114 multiprocessors, up to 1.755 GHz
PUBLISHED = {
    "clock": Constant(1.98e9, "Hz", "highest clock of H100 SXM and H200, NVIDIA; the measurement did not record it"),
    "multiprocessors": Constant(132, "", "NVIDIA H200 datasheet"),
    "shared_bytes": Constant(227 * 1024, "byte", "CUDA C++ Programming Guide, compute capability 9.0, per block"),
    "instructions": Constant(150, "per gate", "of a warp and step forward: 600 of an LSTM, counted in commit da9daf0"),
    "tensor_rate": Constant(512, "FMA/clk", "989 TFLOP/s dense bfloat16 / 132 / 1.83 GHz, for each of 4 schedulers"),
    "mma_share": Constant(0.629, "", f"mean share of the peak that mma.sync reaches, {LUO}"),
    "mma_latency": Constant(
        33, "clk", "about that of m16n8k16 with float32 sums on A100, Sun et al., arXiv:2206.02874"
    ),
    "shared_rate": Constant(128, "byte/clk", f"of a multiprocessor, {LUO}"),
    "shared_latency": Constant(29, "clk", LUO),
    "barrier": Constant(30, "clk", "assumed: barrier of a block, about one access to shared memory"),
    "dsmem_latency": Constant(180, "clk", f"from one multiprocessor to another, {LUO}"),
    "dsmem_rate": Constant(13.2, "byte/clk", f"of a multiprocessor: 2.65 TB/s, clusters of 4, {LUO}"),
    "l2_latency": Constant(
        336, "clk", "mean of near and far partition, 258 and 414, Luo et al. 2025, arXiv:2501.12084"
    ),
    "l2_rate": Constant(3942, "byte/clk", f"of the device, {LUO}"),
}
# Multiprocessors in each graphics processing cluster (GPC), which no thread block cluster exceeds: an assumption, since
# NVIDIA publishes the sum only. What matters is that seven clusters of 16 blocks run at once. The second division has
# eight, with which the errors of the rows with H=512 and H=768 are larger.
GPC_SIZES = (18, 18, 18, 16, 16, 16, 16, 14)
EIGHT_CLUSTERS = (18, 18, 16, 16, 16, 16, 16, 16)

FITTED = {
    "call": "per pass and layer: the call from Python and the small kernels around the loop",
    "forward": "per step of the cluster tier, forward: what the other terms leave, such as latencies of instructions",
    "backward": "the same backward, where saved values are read without a prefetch",
    "product": "per floating-point operation of the products around the loop",
    "launch": "per step of the steps tier: launch, latencies and the cell",
}


def published(name: str) -> float:
    return PUBLISHED[name].value


def seconds(cycles: float) -> float:
    return cycles / published("clock")


# ---- measured rows ----


@dataclass(frozen=True)
class Layer:
    """A dense layer with D = H (I of the rows' names) in bfloat16."""

    cell: str
    B: int
    H: int
    T: int
    training: bool = False
    layers: int = 1
    directions: int = 1

    @property
    def gates(self) -> int:
        return {"LSTM": 4, "GRU": 3}[self.cell]

    def __str__(self) -> str:
        extra = f" {self.layers} layers" if self.layers > 1 else " bidirectional" if self.directions > 1 else ""
        return f"{self.cell}{extra} B={self.B} H={self.H} T={self.T} {'training' if self.training else 'forward'}"


class Measured(NamedTuple):
    layer: Layer
    seconds: float
    peer: float  # of cuDNN, NaN if it was not measured


NAME = re.compile(r"(LSTM|GRU)(?:, (\d) layers)?(, bidirectional)?, B=(\d+) I=H=(\d+) T=(\d+)")


def read_rows(file: Path = RESULTS) -> tuple[list[Measured], Machine]:
    """The recurrent rows of a result, and the machine of its run."""
    if not file.is_file():
        raise FileNotFoundError(f"model_gpu: file must be a saved result of bench/gpu.py, got {file}, which is missing")
    run = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for row in run["rows"]:
        found = NAME.fullmatch(row["label"])
        if found is None or not row["group"].startswith("bfloat16, "):
            continue
        cell, layers, both, B, H, T = found.groups()
        layer = Layer(cell, int(B), int(H), int(T), "training" in row["group"], int(layers or 1), 2 if both else 1)
        times = {entry["name"].partition(",")[0]: entry["median"] for entry in row["entries"]}
        rows.append(Measured(layer, times["ours"], times.get("cuDNN", math.nan)))
    if not rows:
        raise ValueError(f"model_gpu: file must have recurrent rows in bfloat16, got none in {file}")
    return rows, Machine(run["roofs"]["byte"]["rate"])


# ---- the plan of the kernels: plan_cluster and the constants of the kernels at a4358e7 ----


@dataclass(frozen=True)
class Plan:
    tier: str  # cluster, grid or steps
    blocks: int = 1  # per cluster, or per team of the grid tier
    groups: int = 1  # of four warps, per block
    rows: int = 1  # sequences per tile
    clusters: int = 1
    at_once: int = 1
    weights: int = 0  # bytes of weights per block in shared memory

    @property
    def waves(self) -> int:
        return ceil(self.clusters, self.at_once)

    def __str__(self) -> str:
        if self.tier == "steps":
            return "steps"
        return f"{self.tier} {self.blocks}x{self.groups} rows {self.rows} waves {self.waves}"


def ceil(a: float, b: float) -> int:
    return math.ceil(a / b)


def memory_of_block(layer: Layer, backward: bool, groups: int, rows: int, element: int) -> tuple[int, int]:
    """Bytes of shared memory of a block, and those of its weights: ClusterMemory."""
    summed, pushed = (1, layer.gates) if backward else (layer.gates, 1)
    kernel_groups = max(groups, 2)  # kernels are compiled for up to two groups and for three
    pieces = (24 if summed > 1 else 20) if kernel_groups > 2 else 32  # of weights in the registers of a lane
    blocks_of_k = pushed * ceil(layer.H * element, 64)
    rest = max(ceil(blocks_of_k, 4) - pieces // (2 * summed), 0)  # blocks of K of a warp that are not in registers
    weights = 4 * kernel_groups * rest * summed * 2 * 512
    slots = 2 * blocks_of_k * 4 * (rows * 16 + (32 if rows >= 4 else 0))
    ring = 0 if backward else 3 * layer.gates * 128 * kernel_groups * 4
    partial, stage = kernel_groups * 4 * summed * 512, kernel_groups * 4 * pushed * 32 * element
    return slots + weights + ring + partial + stage + 16, weights


def plan(
    layer: Layer,
    backward: bool,
    *,
    blocks: int = 0,
    most_groups: int = 3,
    element: int = 2,
    gpcs: Sequence[int] | None = None,
) -> Plan:
    """Tier and division of a pass: ClusterShape and plan_cluster.

    blocks: of a cluster; 0: the planner's choice. element: bytes of a weight. gpcs: sizes of the GPCs.
    """
    pairs = ceil(layer.H, 16)
    if blocks == 0:
        blocks = 1
        while blocks < 16 and pairs > 2 * blocks:
            blocks *= 2
    groups = ceil(pairs, blocks)
    best = Plan("steps")
    if groups > most_groups:
        return best
    at_once = sum(gpc // blocks for gpc in (GPC_SIZES if gpcs is None else gpcs))
    for rows in (1, 2, 4, 8):
        needed, weights = memory_of_block(layer, backward, groups, rows, element)
        if needed > published("shared_bytes"):
            break
        clusters = ceil(layer.B, rows) * layer.directions
        best = Plan("cluster", blocks, groups, rows, clusters, at_once, weights)
        if clusters <= at_once:
            break
    return best if best.clusters <= 16 * at_once else Plan("steps")


# ---- terms ----

# A term is known seconds, or an amount of a fitted constant.
Terms = dict[str, tuple[float, str]]  # name: (seconds, "") or (amount, key of FITTED)


def step_terms(layer: Layer, backward: bool, of: Plan, element: int = 2) -> Terms:
    """Terms of a step: of one wave of clusters, or of a launch of the steps tier."""
    G, H = layer.gates, layer.H
    of_k = G if backward else 1  # gates along K, whose values are exchanged
    if of.tier == "steps":  # blocks of 8 units and up to 64 sequences; each reads all values that are exchanged
        operand = of_k * 16 * ceil(layer.B, 16) * H * element * ceil(H, 8) * layer.directions
        weights = G * H * H * element * layer.directions * ceil(layer.B, 64)
        return {
            "weights from L2": (seconds(weights / published("l2_rate")), ""),
            "operand from L2": (seconds(operand / published("l2_rate")), ""),
            "remainder": (1, "launch"),
        }
    # A warp multiplies its quarter of K with the 16 units of its group. One warp of each group is on each scheduler.
    k_of_warp, tiles, chains = ceil(of_k * ceil(H * element, 64), 4), 1 if backward else G, 4 if backward else 1
    issue = of.groups * 2 * k_of_warp * tiles * 2048 / published("tensor_rate") / published("mma_share")
    chain = 2 * k_of_warp / chains * published("mma_latency")
    # Shared memory: operands of all warps, partial sums written and read.
    moved = 4 * of.groups * (k_of_warp * of.rows * 64 + 2 * tiles * 512)
    latency = 3 * published("shared_latency") + published("barrier")
    exchanged = H * of.rows * element * of_k if of.blocks > 1 else 0
    return {
        "instructions": (0 if backward else seconds(published("instructions") * G * of.groups), ""),
        "products": (seconds(max(issue, chain)), ""),
        "weights from shared memory": (seconds(of.weights / published("shared_rate")), ""),
        "operand, sum over warps": (seconds(moved / published("shared_rate") + latency), ""),
        "exchange, latency": (seconds(published("dsmem_latency")) if of.blocks > 1 else 0, ""),
        "exchange, bytes": (seconds(exchanged / published("dsmem_rate")), ""),
        "remainder": (1, "backward" if backward else "forward"),
    }


def pass_terms(layer: Layer, backward: bool, copy_rate: float, of: Plan, step: Terms) -> Terms:
    """Terms of all steps of a pass, and of what surrounds them."""
    times = layer.T * layer.layers * of.waves
    terms = {name: (amount * times, key) for name, (amount, key) in step.items()}
    tokens, width = layer.T * layer.B, layer.directions * layer.gates * layer.H
    flop, moved = 0.0, 0.0
    for i in range(layer.layers):
        D = layer.H * (layer.directions if i else 1)
        if backward:  # dx, dW_ih and dW_hh; saved gates, and their gradients: written once, read by products and sums
            flop += 2 * tokens * width * (2 * D + layer.H)
            moved += tokens * width * 2 * (1 + 1 + 4)
        else:  # pre-activations in float32, written and read; saved gates
            flop += 2 * tokens * width * D
            moved += tokens * width * (4 + 4 + (2 if layer.training else 0))
    terms["products around the loop"] = (flop, "product")
    terms["memory around the loop"] = (moved / copy_rate, "")
    terms["call"] = (layer.layers, "call")
    return terms


class Machine(NamedTuple):
    copy_rate: float  # bytes per second that a copy moves
    gpcs: Sequence[int] = GPC_SIZES


def call_terms(layer: Layer, machine: Machine) -> list[Terms]:
    """Terms of a call: of the forward pass, and of the backward pass of a training step."""
    passes = []
    for backward in (False, True) if layer.training else (False,):
        of = plan(layer, backward, gpcs=machine.gpcs)
        passes.append(pass_terms(layer, backward, machine.copy_rate, of, step_terms(layer, backward, of)))
    return passes


Fit = dict[str, float]  # of FITTED


def evaluate(terms: Terms, fit: Fit) -> float:
    return sum(amount * fit[key] if key else amount for amount, key in terms.values())


def predict(layer: Layer, fit: Fit, machine: Machine) -> float:
    return sum(evaluate(terms, fit) for terms in call_terms(layer, machine))


# ---- least squares ----


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Solution of a system of linear equations by Gaussian elimination with pivoting."""
    n = len(right)
    rows = [[*line, value] for line, value in zip(matrix, right)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(n):
            if k != i and rows[i][i]:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [a - factor * b for a, b in zip(rows[k], rows[i])]
    return [row[n] / row[i] for i, row in enumerate(rows)]


def fit_constants(rows: Sequence[Measured], machine: Machine) -> Fit:
    """Constants that minimise the sum of squared relative errors; none is negative."""
    equations = []
    for row in rows:
        amounts, known = dict.fromkeys(FITTED, 0.0), 0.0
        for terms in call_terms(row.layer, machine):
            for amount, key in terms.values():
                if key:
                    amounts[key] += amount
                else:
                    known += amount
        equations.append(([amounts[key] / row.seconds for key in FITTED], 1 - known / row.seconds))
    keys = list(FITTED)
    free = [i for i in range(len(keys)) if any(a[i] for a, _ in equations)]
    while True:
        scale = {i: math.sqrt(sum(a[i] ** 2 for a, _ in equations)) for i in free}
        matrix = [[sum(a[i] * a[j] for a, _ in equations) / scale[i] / scale[j] for j in free] for i in free]
        right = [sum(a[i] * b for a, b in equations) / scale[i] for i in free]
        values = {i: value / scale[i] for i, value in zip(free, solve(matrix, right))}
        if min(values.values()) >= 0:
            return {key: values.get(i, 0.0) for i, key in enumerate(keys)}
        free.remove(min(free, key=lambda i: values[i] * scale[i]))  # held at zero


class Checked(NamedTuple):
    row: Measured
    predicted: float
    error: float
    left_out: float  # error of a fit without the row
    layer_out: float  # error of a fit without both rows of its layer, forward and training


def check(rows: Sequence[Measured], machine: Machine) -> tuple[Fit, list[Checked]]:
    fit = fit_constants(rows, machine)

    def error(row: Measured, fit: Fit) -> float:
        return predict(row.layer, fit, machine) / row.seconds - 1

    def without(row: Measured, left: Callable[[Measured], bool]) -> float:
        return error(row, fit_constants([each for each in rows if not left(each)], machine))

    checked = []
    for row in rows:
        forward = replace(row.layer, training=False)
        left_out = without(row, lambda each, row=row: each.layer == row.layer)  # type: ignore[misc]
        layer_out = without(row, lambda each, of=forward: replace(each.layer, training=False) == of)  # type: ignore[misc]
        checked.append(Checked(row, predict(row.layer, fit, machine), error(row, fit), left_out, layer_out))
    return fit, checked


# ---- changes ----

# Plan and terms of a step after a change, or None where it does not apply.
Changed = tuple[Plan, Terms] | None


def unchanged(layer: Layer, backward: bool) -> tuple[Plan, Terms]:
    of = plan(layer, backward)
    return of, step_terms(layer, backward, of)


def by_grid(layer: Layer, backward: bool, trips: int = 4) -> Changed:
    """The grid tier: a pair of strips (16 units) per block of 8 warps, and exchange by flags in L2.

    trips: to L2 per step, one each for the values, the flag, its observation and the load of the values.
    """
    G, team = layer.gates, ceil(layer.H, 16)
    teams = int(published("multiprocessors")) // (layer.directions * team)
    if teams == 0:
        return None
    rows = next((rows for rows in (1, 2, 4) if ceil(layer.B, rows) <= teams), 8)
    of_k, tiles, chains = (G, 1, 2) if backward else (1, G, 1)
    k_of_warp = ceil(of_k * ceil(layer.H * 2, 64), 8)
    issue = 2 * 2 * k_of_warp * tiles * 2048 / published("tensor_rate") / published("mma_share")
    chain = 2 * k_of_warp / chains * published("mma_latency")
    weights = max(k_of_warp - 32 // (2 * tiles), 0) * tiles * 2 * 512 * 8  # beyond the registers
    latency = 3 * published("shared_latency") + published("barrier")
    read = of_k * layer.H * rows * 2 * team * min(teams, ceil(layer.B, rows)) * layer.directions
    of = Plan("grid", team, 2, rows, ceil(layer.B, rows), teams, weights)
    return of, {
        "instructions": (0 if backward else seconds(published("instructions") * G * 2), ""),
        "products": (seconds(max(issue, chain)), ""),
        "weights from shared memory": (seconds(weights / published("shared_rate")), ""),
        "operand, sum over warps": (seconds(8 * 2 * tiles * 512 / published("shared_rate") + latency), ""),
        "exchange, latency": (seconds(trips * published("l2_latency")), ""),
        "exchange, bytes": (seconds(read / published("l2_rate")), ""),
        "remainder": (1, "backward" if backward else "forward"),
    }


def by_grid_without_flags(layer: Layer, backward: bool) -> Changed:
    """Two trips: blocks poll the values themselves, which carry the number of their step."""
    return by_grid(layer, backward, trips=2)


def by_grid_with_prefetch(layer: Layer, backward: bool) -> Changed:
    found = by_grid(layer, backward)
    if found is None or not backward:
        return found
    instructions = seconds(published("instructions") * layer.gates * found[0].groups)
    return found[0], found[1] | {"remainder": (1, "forward"), "instructions": (instructions, "")}


def with_prefetch(layer: Layer, backward: bool) -> Changed:
    of, terms = unchanged(layer, backward)
    if not backward or of.tier != "cluster":
        return None
    forward = seconds(published("instructions") * layer.gates * of.groups)
    return of, terms | {"remainder": (1, "forward"), "instructions": (forward, "")}


def with_plan(layer: Layer, backward: bool, of: Plan, element: int = 2) -> Changed:
    before = plan(layer, backward)
    if of.tier != "cluster" or before.tier != "cluster" or (of == before and element == 2):
        return None
    return of, step_terms(layer, backward, of, element)


def with_one_group(layer: Layer, backward: bool) -> Changed:
    blocks = 1
    while blocks < min(16, ceil(layer.H, 16)):
        blocks *= 2
    return with_plan(layer, backward, plan(layer, backward, blocks=blocks))


def with_half_clusters(layer: Layer, backward: bool) -> Changed:
    blocks = plan(layer, backward).blocks // 2
    return with_plan(layer, backward, plan(layer, backward, blocks=blocks, most_groups=6)) if blocks else None


def with_fp8(layer: Layer, backward: bool) -> Changed:
    return with_plan(layer, backward, plan(layer, backward, element=1), element=1)


def with_one_wave(layer: Layer, backward: bool) -> Changed:
    of = plan(layer, backward)
    rows = of.rows
    while rows < 8 and ceil(layer.B, rows) * layer.directions > of.at_once:
        rows *= 2
    clusters = ceil(layer.B, rows) * layer.directions
    return with_plan(layer, backward, replace(of, rows=rows, clusters=clusters))


def with_registers(layer: Layer, backward: bool) -> Changed:
    of = plan(layer, backward)
    return with_plan(layer, backward, replace(of, weights=0))


def with_overlap(layer: Layer, backward: bool) -> Changed:
    of, terms = unchanged(layer, backward)
    if of.tier != "cluster":
        return None
    exchange = ("exchange, latency", "exchange, bytes")
    hidden = min(sum(terms[name][0] for name in exchange), terms["products"][0])
    return of, terms | {"overlap": (-hidden, "")}


def with_fewer_instructions(layer: Layer, backward: bool) -> Changed:
    of, terms = unchanged(layer, backward)
    if backward or of.tier != "cluster":
        return None
    return of, terms | {"instructions": (terms["instructions"][0] / 2, "")}


class Change(NamedTuple):
    """kind: change; later, which builds on a change; precision, which also changes results; bound, the most that a kind
    of work could save.
    """

    name: str
    kind: str
    apply: Callable[[Layer, bool], Changed]


CHANGES = (
    Change("one group of four warps per block, clusters of up to 16", "change", with_one_group),
    Change("grid tier instead: 16 units per block, the whole device", "change", by_grid),
    Change("tiles of as many rows as one wave needs, if they fit", "change", with_one_wave),
    Change("saved values prefetched in backward", "change", with_prefetch),
    Change("clusters of half as many blocks", "change", with_half_clusters),
    Change("grid tier without flags: values carry their step", "later", by_grid_without_flags),
    Change("grid tier, saved values prefetched in backward", "later", by_grid_with_prefetch),
    Change("fp8 weights and h (by wgmma: mma.sync has no fast path)", "precision", with_fp8),
    Change("half as many instructions in a forward step", "bound", with_fewer_instructions),
    Change("exchange hidden behind products", "bound", with_overlap),
    Change("all weights in registers", "bound", with_registers),
)


def changed_time(layer: Layer, fit: Fit, machine: Machine, changes: Sequence[Change]) -> float:
    """Predicted seconds of a call if each pass takes the fastest of the changes, or none."""
    total = 0.0
    for backward in (False, True) if layer.training else (False,):
        found = [unchanged(layer, backward), *(change.apply(layer, backward) for change in changes)]
        passes = [pass_terms(layer, backward, machine.copy_rate, *each) for each in found if each is not None]
        total += min(evaluate(terms, fit) for terms in passes)
    return total


GOAL_RATIO = 1.3  # of cuDNN's persistent float16 kernel, LSTM B=16 H=768 T=1024
GOAL_STEP = 0.9e-6  # s, a forward step with H=256


def goals(rows: Sequence[Measured]) -> list[tuple[Measured, float]]:
    """The rows behind their goals, with the seconds that each should take."""
    found = []
    for row in rows:
        layer = row.layer
        goal = math.inf
        if (layer.H, layer.T) == (768, 1024):
            goal = row.peer / GOAL_RATIO
        elif (layer.H, layer.T, layer.training) == (256, 1024, False):
            goal = GOAL_STEP * layer.T
        if row.seconds > goal:
            found.append((row, goal))
    return found


class Ranked(NamedTuple):
    name: str
    kind: str
    gain: float  # geometric mean over the rows behind their goals
    times: list[float]  # measured seconds times the predicted ratio


def effect(name: str, kind: str, changes: Sequence[Change], rows: Sequence[Measured], fit: Fit, on: Machine) -> Ranked:
    """Predicted effect of changes on rows."""
    ratios = [changed_time(row.layer, fit, on, changes) / predict(row.layer, fit, on) for row in rows]
    gain = math.exp(-sum(map(math.log, ratios)) / len(ratios))
    return Ranked(name, kind, gain, [row.seconds * ratio for row, ratio in zip(rows, ratios)])


def rank(rows: Sequence[Measured], fit: Fit, machine: Machine) -> list[Ranked]:
    """Changes by their gain on the rows behind their goals; the other kinds follow."""
    behind = [row for row, _ in goals(rows)]
    ranked = [effect(change.name, change.kind, [change], behind, fit, machine) for change in CHANGES]
    return sorted(ranked, key=lambda each: (each.kind != "change", -each.gain))


# ---- output ----


def root_mean_square(errors: Sequence[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors))


def table_of_rows(checked: Sequence[Checked]) -> list[str]:
    lines = [
        f"{'bfloat16, D = H':43} {'forward / backward':34} {'measured':>9} {'predicted':>9} error  left out: row, layer"
    ]
    for row, predicted, error, left_out, layer_out in checked:
        of = plan(row.layer, row.layer.training)
        outside = "  OUTSIDE" if abs(error) > TOLERANCE else ""
        lines.append(
            f"{row.layer!s:43} {of!s:34} {row.seconds * 1e3:6.3f} ms {predicted * 1e3:6.3f} ms {error:+5.0%}  "
            f"{left_out:+5.0%} {layer_out:+5.0%}{outside}"
        )
    return lines


def table_of_terms(layers: Sequence[Layer], fit: Fit) -> list[str]:
    lines = []
    for layer in layers:
        for backward in (False, True):
            of, terms = unchanged(layer, backward)
            step = evaluate(terms, fit)
            shape = f"{layer.cell} B={layer.B} H={layer.H}"
            waves = f", times {of.waves} waves" if of.waves > 1 else ""
            lines.append(f"{shape} {'backward' if backward else 'forward'}, {of}: {step * 1e6:.2f} us{waves}")
            for name, (amount, key) in terms.items():
                time = amount * fit[key] if key else amount
                if time:
                    lines.append(f"    {name:28} {time * 1e6:6.2f} us {time / step:4.0%}{'  fitted' if key else ''}")
    return lines


def constants(given: Sequence[str]) -> dict[str, Constant]:
    """Published constants replaced by NAME=VALUE."""
    found = dict(PUBLISHED)
    for each in given:
        name, _, value = each.partition("=")
        try:
            found[name] = PUBLISHED[name]._replace(value=float(value), source="--set")
        except (KeyError, ValueError):
            raise ValueError(f"--set takes NAME=VALUE with a name of {', '.join(PUBLISHED)}; got {each}") from None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="saved result with recurrent rows")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="replaces a published constant"
    )
    options = parser.parse_args(arguments)
    before = dict(PUBLISHED)
    try:
        PUBLISHED.update(constants(options.set))
        show(*read_rows(options.file))
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        PUBLISHED.update(before)
    return 0


def show(rows: Sequence[Measured], machine: Machine) -> None:
    """Prints the comparison, the terms and the ranking."""
    fit, checked = check(rows, machine)
    print(*table_of_rows(checked), sep="\n")
    errors = [c.error for c in checked]
    within = sum(abs(error) <= TOLERANCE for error in errors)
    print(f"\n{within} of {len(errors)} rows within {TOLERANCE:.0%}; root mean square {root_mean_square(errors):.1%},")
    for name, left in (("row", [c.left_out for c in checked]), ("layer", [c.layer_out for c in checked])):
        print(f"without the {name}: {root_mean_square(left):.1%}, at most {max(map(abs, left)):.0%}")
    _, other = check(rows, machine._replace(gpcs=EIGHT_CLUSTERS))
    missed = sum(abs(c.error) > TOLERANCE for c in other)
    print(f"if eight clusters of 16 blocks ran at once: {root_mean_square([c.error for c in other]):.1%}, ", end="")
    print(f"{missed} rows outside")

    print("\nfitted constants")
    for key, value in fit.items():
        shown = f"{1e-12 / value:.0f} TFLOP/s" if key == "product" and value else f"{value * 1e6:.2f} us"
        print(f"    {key:10} {shown:>12}  {FITTED[key]}")
    print("published constants")
    for name, constant in PUBLISHED.items():
        print(f"    {name:16} {constant.value:>10.6g} {constant.unit:10} {constant.source}")

    print("\nterms of a step")
    behind = goals(rows)
    shapes = dict.fromkeys(replace(row.layer, training=False) for row, _ in behind)
    print(*table_of_terms([*shapes, Layer("LSTM", 64, 1024, 256)], fit), sep="\n")

    print("\nrows behind their goals, and each after a change: measured time, times the predicted ratio")
    for i, (row, goal) in enumerate(behind, 1):
        print(f"    {i}: {row.layer}, {row.seconds * 1e3:.2f} ms, goal {goal * 1e3:.2f} ms")
    numbers = "".join(f"{i:>8}" for i in range(1, len(behind) + 1))
    print(f"{'change':58} {'kind':9} {'gain':>6} {numbers}   ms; * reaches the goal")
    ranked, slow = rank(rows, fit, machine), [row for row, _ in behind]
    first = [change for each in ranked[:2] for change in CHANGES if change.name == each.name]
    both = effect("the first two, each where it is faster", "", first, slow, fit, machine)
    for each in [*ranked, both]:
        cells = "".join(f"{t * 1e3:7.2f}{'*' if t <= goal else ' '}" for t, (_, goal) in zip(each.times, behind))
        print(f"{each.name:58} {each.kind:9} {each.gain:5.2f}x {cells}")


if __name__ == "__main__":
    sys.exit(main())
