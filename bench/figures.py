"""The pictures of README and docs, drawn from committed results, and their figures.

    python bench/figures.py    # writes docs/images/*.png

Each figure names its results file, group, row and contender, so that tests compare the text of README and docs with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from report import Entry, Row, Run, from_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"
EPYC, XEON = "amd-epyc-2-threads-2026-11-22", "intel-r-xeon-r-processor-2-threads-2026-11-23"
OPERATORS, H200 = "amd-epyc-2-threads-2026-11-28", "nvidia-h200-2-threads-2026-11-26-2"
PACKED = "packed training, lengths drawn between T/4 and T"
OURS, TORCH, OTHER = "#14507f", "#f0a45d", "#b9c4cc"


@dataclass(frozen=True)
class Figure:
    """One contender of one row of a results file."""

    file: str
    group: str
    label: str
    peer: str = "torch"

    @property
    def row(self) -> Row:
        return next(r for r in run(self.file).rows if r.group == self.group and r.label == self.label)

    @property
    def entry(self) -> Entry:
        return next(e for e in self.row.entries if e.name == self.peer)

    def __str__(self) -> str:
        """The ratio as README and docs write it."""
        ratio = self.entry.ratio
        return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


@cache
def run(name: str) -> Run:
    return from_json((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# The bars of the first page, and the table of README: what is timed -> where its ratio is.
SPEEDUPS = {
    "LSTM, packed, training, T=1600": Figure(EPYC, f"LSTM {PACKED}", "B=8 I=H=256 T=1600", "torch packed"),
    "LSTM, packed, training, T=400": Figure(EPYC, f"LSTM {PACKED}", "B=8 I=H=256 T=400", "torch packed"),
    "GRU, packed, training, T=400": Figure(XEON, f"GRU {PACKED}", "B=8 I=H=256 T=400", "torch packed"),
    "LSTM, one step of a stream, H=128": Figure(EPYC, "LSTM, one step of a stream under no_grad", "B=1 I=H=128 T=1"),
    "attention, packed, training": Figure(
        OPERATORS,
        "Attention forward+backward, packed",
        "lengths uniform in 32..512, B=16 H=8 D=64",
        "torch, padded, bool mask",
    ),
    "attention, causal, training, L=512": Figure(OPERATORS, "Attention forward+backward, causal", "B=4 H=8 L=512 D=64"),
    "EmbeddingBag, max, training, E=100k": Figure(
        OPERATORS, "EmbeddingBag max, training, dense gradient", "E=100k D=64 B=10k L=20"
    ),
    "EmbeddingBag, sum, E=1M": Figure(
        OPERATORS, "EmbeddingBag forward, table beyond the last-level cache", "sum, E=1M D=64 B=2048 L=20"
    ),
}
GPU_LSTM = Figure(H200, "bfloat16, forward, on CUDA, kernels of a4358e7", "LSTM, B=64 I=H=512 T=256", "cuDNN, bfloat16")


def axes_of(width: float, height: float, count: int = 1) -> tuple[Any, Any]:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(width, height), layout="constrained")
    axes = picture.subplots(1, count)
    for one in [axes] if count == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
        one.set_axisbelow(True)
    return picture, axes


def bars(title: str, ratios: dict[str, float], path: Path, peers: str) -> None:
    """Horizontal bars of ratios on a logarithmic axis, from 1 to the right, or to the left where the peer is faster."""
    picture, axes = axes_of(8, 0.8 + 0.36 * len(ratios))
    names = list(ratios)[::-1]
    values = [ratios[name] for name in names]
    least = 0.8 * min(1.25, *values)
    axes.barh(names, [v - 1 for v in values], left=1, color=[OURS if v >= 1 else TORCH for v in values])
    for i, value in enumerate(values):
        text = f"{value:.0f}x" if value >= 10 else f"{value:.1f}x"
        axes.text(max(value, 1) * 1.04, i, text, va="center", fontsize=10)
    axes.set_xscale("log")
    axes.set_xlim(least, max(values) * 1.5)
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if least <= t <= max(values)]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.axvline(1.0, color="#888888", linewidth=1)
    axes.grid(axis="x", color="#e8e8e8")
    axes.set_xlabel(f"time of {peers} over the time of seqkernels")
    axes.set_title(title, fontsize=11, loc="left")
    picture.savefig(path, dpi=130)


def conditions(name: str) -> str:
    of = run(name)
    return f"{of.device}, {of.threads} threads, {of.date[:10]}"


def time_against_length(path: Path) -> None:
    """Time of a training step on packed sequences against T, ours and torch's, on logarithmic axes."""
    picture, axes = axes_of(9, 3.8, 2)
    for one, kind, file in zip(axes, ("LSTM", "GRU"), (EPYC, XEON)):
        rows = [r for r in run(file).rows if r.group == f"{kind} {PACKED}" and r.label.startswith("B=8 I=H=256")]
        lengths = [int(r.label.rpartition("=")[2]) for r in rows]
        names = [e.name for e in rows[0].entries if not e.name.startswith("(") and not e.refused]
        for name, color in zip(names, (OURS, TORCH, OTHER)):
            times = [1e3 * next(e.median for e in r.entries if e.name == name) for r in rows]
            label = name.replace("ours", "seqkernels")
            one.plot(lengths, times, color=color, marker="o", linewidth=2, label=label)
        one.set_xscale("log")
        one.set_yscale("log")
        one.set_xticks(lengths, [str(t) for t in lengths])
        one.minorticks_off()
        one.grid(color="#e8e8e8")
        one.legend(frameon=False, fontsize=9)
        one.set_xlabel("T, the longest sequence")
        one.set_ylabel("ms for a training step")
        one.set_title(f"{kind}, B=8 I=H=256\n{conditions(file)}", fontsize=10, loc="left")
    picture.savefig(path, dpi=130)


def peak_memory(path: Path) -> None:
    """Peak memory of a training step, ours and torch's."""
    rows = [r for r in run(EPYC).rows if r.group == "LSTM peak memory of a dense training step"]
    picture, axes = axes_of(8, 3)
    for i, (name, color) in enumerate(zip([e.name for e in rows[0].entries], (OURS, TORCH))):
        values = [next(e.median for e in r.entries if e.name == name) for r in rows]
        bars_of = axes.bar([j + 0.4 * i - 0.2 for j in range(len(rows))], values, 0.38, color=color, label=name)
        axes.bar_label(bars_of, fmt="%.0f", fontsize=9)
    axes.set_xticks(range(len(rows)), [r.label for r in rows])
    axes.set_ylabel("MiB")
    axes.legend(frameon=False)
    axes.set_title(f"LSTM, peak memory of a training step, {conditions(EPYC)}", fontsize=10, loc="left")
    picture.savefig(path, dpi=130)


def ratios_of(file: str, groups: str, peer: str = "torch") -> dict[str, float]:
    return {
        r.label: e.ratio
        for r in run(file).rows
        if r.group == groups
        for e in r.entries
        if e.name == peer and not e.refused
    }


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    shown = {name: figure.entry.ratio for name, figure in SPEEDUPS.items()}
    bars("Times faster than torch on a CPU with two threads", shown, IMAGES / "speedups.png", "torch")
    time_against_length(IMAGES / "time_against_length.png")
    peak_memory(IMAGES / "peak_memory.png")
    for file, group, name in (
        (EPYC, "LSTM dense training", "lstm_dense_training"),
        (XEON, "GRU dense training", "gru_dense_training"),
        (EPYC, "LSTM dense inference", "lstm_dense_inference"),
    ):
        bars(f"{group}, {conditions(file)}", ratios_of(file, group), IMAGES / f"{name}.png", "torch")
    gpu = {
        r.label + e.name.removeprefix("cuDNN").replace(", bfloat16", ""): e.ratio
        for r in run(H200).rows
        if r.group.startswith("bfloat16, forward")
        for e in r.entries[1:]
        if not e.refused
    }
    bars(f"bfloat16, forward, {conditions(H200)}", gpu, IMAGES / "gpu_forward.png", "cuDNN, in bfloat16 or as named,")


if __name__ == "__main__":
    main()
