"""Times each tier of recurrent layers that supports a shape, and compares the planner's choice with the best tier.

    python bench/tune.py [--device cuda] [--save FILE] [-k "LSTM H=1024"]

The table marks choices that take over 5 % more than the best tier, for which the thresholds in csrc/recurrent
(plan_cluster, plan_grid, plan_recurrent_cuda) should be changed. --save writes after each shape. --resume continues
such a file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import harness
import report
import torch
from harness import Contender

import seqkernels

TIERS = ("cluster", "grid", "steps")
PASSES = {"forward": ("forward",), "step": ("forward", "backward")}  # "step": a training step
LOSS = 0.05
DTYPE = torch.bfloat16
STEPS = 64  # steps of a layer, for a typical share of launches and of loading the weights
SAMPLES, SAMPLE_S = 5, 2e-3


class Layer(NamedTuple):
    kind: str
    B: int
    H: int
    T: int = STEPS

    def __str__(self) -> str:
        return f"{self.kind} B={self.B} H={self.H} T={self.T}"


def layers(words: str = "") -> list[Layer]:
    """Layers whose name contains all words, ordered by relevance for the planner."""
    sizes = itertools.product((768, 1024, 512, 640, 384, 256, 1536, 128), ("LSTM", "GRU"), (64, 16, 256, 1))
    every = [Layer(kind, B, H) for H, kind, B in sizes]
    return [layer for layer in every if all(word in str(layer).split() for word in words.split())]


@dataclass
class Timing:
    """Seconds by tier of one layer, forward or a training step."""

    layer: str
    what: str
    planned: str  # tiers selected by the planner for its passes
    planned_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)  # reasons why a tier does not support it

    @property
    def best(self) -> str:
        return min(self.seconds, key=self.seconds.__getitem__)

    @property
    def loss(self) -> float:
        """Relative additional time of the planner's choice over the best tier; 0 if it is the best."""
        return max(0.0, self.planned_seconds / self.seconds[self.best] - 1)

    @staticmethod
    def of_json(row: dict[str, Any]) -> Timing:
        return Timing(**{field.name: row[field.name] for field in dataclasses.fields(Timing)})

    def as_json(self) -> dict[str, Any]:
        seconds = {tier: float(f"{value:.4g}") for tier, value in self.seconds.items()}
        rounded = {"planned_seconds": float(f"{self.planned_seconds:.4g}"), "seconds": seconds}
        return dataclasses.asdict(self) | rounded | {"best": self.best, "loss": round(self.loss, 3)}


class Device(Protocol):
    def plan(self, layer: Layer, tiers: Sequence[str]) -> dict[str, dict[str, Any]]:
        """For each pass: the tier among these, or "none", and the reasons against the others."""

    def seconds(self, layer: Layer, what: str, tiers: Sequence[str]) -> float: ...


def measured(layer: Layer, device: Device) -> list[Timing]:
    timings = []
    for what, passes in PASSES.items():
        plan = device.plan(layer, TIERS)
        chosen = list(dict.fromkeys(plan[each]["tier"] for each in passes))
        timing = Timing(str(layer), what, "+".join(chosen), math.nan)
        for tier in TIERS:
            alone = device.plan(layer, [tier])
            if all(alone[each]["tier"] == tier for each in passes):
                timing.seconds[tier] = device.seconds(layer, what, [tier])
            else:
                reasons = [reason for each in passes for reason in alone[each]["reasons"]]
                timing.reasons[tier] = list(dict.fromkeys(r for r in reasons if r.startswith(tier)))
        if not timing.seconds:
            continue
        alone_seconds = timing.seconds.get(timing.planned)
        timing.planned_seconds = device.seconds(layer, what, TIERS) if alone_seconds is None else alone_seconds
        timings.append(timing)
    return timings


def table(timings: Sequence[Timing]) -> str:
    titles = ["layer", "pass", *TIERS, "planner", ""]
    lines = [titles]
    for timing in timings:
        times = [f"{1e6 * timing.seconds[tier]:.0f} µs" if tier in timing.seconds else "-" for tier in TIERS]
        mark = f"<- {100 * timing.loss:.0f} % more than {timing.best}" if timing.loss > LOSS else ""
        lines.append([timing.layer, timing.what, *times, timing.planned, mark])
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]
    right = range(2, 2 + len(TIERS))
    text = [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    ]
    lost = sum(timing.loss > LOSS for timing in timings)
    return "\n".join([*text, "", f"{lost} of {len(timings)} choices lose more than {100 * LOSS:.0f} %"])


# ---- on a device


@contextlib.contextmanager
def only(tiers: Sequence[str]) -> Iterator[None]:
    before = seqkernels._C.set_cuda_tiers(list(tiers))
    try:
        yield
    finally:
        seqkernels._C.set_cuda_tiers(before)


class Cuda:
    """A device of torch. Caches the module of the last layer."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.made: tuple[Layer, torch.nn.Module, torch.Tensor] | None = None

    def plan(self, layer: Layer, tiers: Sequence[str]) -> dict[str, dict[str, Any]]:
        sizes = dict(T=layer.T, B=layer.B, D=layer.H, H=layer.H)
        with only(tiers):
            return seqkernels.explain(layer.kind.lower(), **sizes, dtype=DTYPE, device=self.device)

    def seconds(self, layer: Layer, what: str, tiers: Sequence[str]) -> float:
        if self.made is None or self.made[0] != layer:
            module = getattr(seqkernels.nn, layer.kind)(layer.H, layer.H).to(self.device, DTYPE)
            x = torch.randn(layer.T, layer.B, layer.H, device=self.device, dtype=DTYPE)
            self.made = layer, module, x
        _, module, x = self.made

        @torch.no_grad()
        def forward() -> None:
            module(x)

        x.requires_grad_(what == "step")
        wanted, upstream = [x, *module.parameters()], torch.ones_like(x)

        def step() -> None:
            torch.autograd.grad(module(x)[0], wanted, upstream)

        contender = Contender(what, step if what == "step" else forward, on_cuda=True)
        with only(tiers):
            rough = min(harness.sample_on_cuda(contender, 1, warm=i == 0) for i in range(2))
            number = max(1, math.ceil(SAMPLE_S / rough))
            return statistics.median(harness.sample_on_cuda(contender, number, warm=False) for _ in range(SAMPLES))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda",), default="cuda", help="the current one")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write what was timed, as JSON")
    parser.add_argument("--resume", action="store_true", help="skip the layers that --save has written earlier")
    parser.add_argument(
        "-k", dest="words", default="", help="layers whose name contains all these words, such as H=1024"
    )
    options = parser.parse_args(arguments)
    if not (seqkernels.build_info()["cuda"] and torch.cuda.is_available()):
        raise SystemExit(
            "tune: CUDA kernels must be built and a CUDA device present; seqkernels.build_info() says more"
        )
    device, timings = Cuda(options.device), list[Timing]()
    about = {
        "device": torch.cuda.get_device_name(device.device),
        "date": datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"torch": torch.__version__, "CUDA": torch.version.cuda, "seqkernels": seqkernels.__version__},
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    if options.resume and options.save is not None and options.save.exists():
        timings = [Timing.of_json(row) for row in json.loads(options.save.read_text(encoding="utf-8"))["rows"]]
    known = {timing.layer for timing in timings}
    with contextlib.suppress(KeyboardInterrupt):  # print the rows so far
        for layer in layers(options.words):
            if str(layer) in known:
                continue
            timings += measured(layer, device)
            print(f"{layer}: {len(timings)} timed", flush=True)
            if options.save is not None:
                rows = {"rows": [timing.as_json() for timing in timings]}
                report.write(options.save, json.dumps(about | rows, indent=1) + "\n")
    print(table(timings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
