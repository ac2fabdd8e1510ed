"""Results of a benchmark run: rows, verdicts, table, JSON.

Pure functions without measurements. As a script, it prints a saved run:

    python bench/report.py bench/results/<device>-<date>.json [--markdown]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NOISY_LOAD = 0.15  # processors used by others; with more, two-thread calls stall for milliseconds
WORK_RATES = {"flop": "GFLOP/s", "byte": "GB/s"}


@dataclass(frozen=True)
class Bar:
    """The minimum ratio of a claim.

    mean_at_least: minimum of the geometric mean over all `mean_rows` rows of a group with this bar.
    """

    at_least: float | None = None
    at_most: float | None = None
    mean_at_least: float | None = None
    mean_rows: int = 0

    def verdict(self, ratio: float) -> str:
        # The order of the comparison makes NaN a miss.
        reached = (self.at_least is None or ratio >= self.at_least) and (self.at_most is None or ratio <= self.at_most)
        return "PASS" if reached else "MISS"

    def __str__(self) -> str:
        parts = [] if self.at_least is None else [f">= {self.at_least:.2f}"]
        parts += [] if self.at_most is None else [f"<= {self.at_most:.2f}"]
        return " ".join(parts)


@dataclass
class Entry:
    """A contender of a row. `ratio`: median over the rounds of its value divided by that of seqkernels.

    `quartiles`: of its values; NaN in results before they were recorded.
    """

    name: str
    median: float = math.nan
    minimum: float = math.nan
    quartiles: tuple[float, float] = (math.nan, math.nan)
    ratio: float = math.nan
    ratio_quartiles: tuple[float, float] = (math.nan, math.nan)
    bar: Bar | None = None
    refused: str = ""
    work: float = 0.0  # work of one call, if it differs from that of the row

    @property
    def verdict(self) -> str:
        return "" if self.bar is None else self.bar.verdict(self.ratio)


@dataclass
class Row:
    """One set of inputs; the first entry is seqkernels, the others are the peers.

    Rows of a sweep have an operator, a pass (forward or training) and sizes. `threads`: 0 for those of the run.
    """

    group: str
    label: str
    entries: list[Entry]
    unit: str = "s"  # unit of median and minimum: "s" or "MiB"
    work: float = 0.0  # useful floating-point operations, or bytes, of one call
    work_unit: str = "flop"
    rounds: int = 1  # 0 if the figure is counted, not measured
    other_load: float = math.nan  # processors used by other processes during the row
    operator: str = ""
    which: str = ""
    sizes: dict[str, int] = field(default_factory=dict)  # by dimension, as T, B and H
    threads: int = 0


@dataclass
class Roof:
    """The best rate of the machine in this run, and how it was reached."""

    rate: float  # work units per second
    how: str


@dataclass
class Run:
    date: str
    device: str
    threads: int
    versions: dict[str, str]
    roofs: dict[str, Roof] = field(default_factory=dict)
    other_load: float = math.nan  # before the first row
    quick: bool = False
    rows: list[Row] = field(default_factory=list)
    commit: str = ""  # with "+changes" if files differ from it
    command: str = ""
    # `roofs` has the unit of work as key, followed by threads_key for other numbers of threads than those of the run.

    def roof_of(self, row: Row) -> Roof | None:
        return self.roofs.get(row.work_unit + threads_key(row.threads, self))

    def threads_of(self, row: Row) -> int:
        return row.threads or self.threads


def threads_key(threads: int, run: Run) -> str:
    return "" if threads in (0, run.threads) else f", {counted(threads, 'thread')}"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def summarise(
    names: Sequence[str], values: Sequence[Sequence[float]], bars: dict[str, Bar], refused: dict[str, str]
) -> list[Entry]:
    """Entries from one list of values per contender, seqkernels first; ratios are computed for each round."""
    ours = values[0]
    entries: list[Entry] = []
    for name, theirs in zip(names, values):
        entry = Entry(name, statistics.median(theirs), min(theirs), quartiles(theirs), bar=bars.get(name))
        if entries:
            ratios = [b / a for a, b in zip(ours, theirs)]
            entry.ratio, entry.ratio_quartiles = statistics.median(ratios), quartiles(ratios)
        entries.append(entry)
    return entries + [Entry(name, refused=reason) for name, reason in refused.items()]


def quartiles(values: Iterable[float]) -> tuple[float, float]:
    """The first and the third quartile, each one of the values."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return ordered[round(last / 4)], ordered[round(last * 3 / 4)]


def means(rows: Iterable[Row]) -> list[tuple[str, str, float, int, Bar]]:
    """Geometric means required by the bars: (group, peer, ratio, number of rows, bar)."""
    ratios: dict[tuple[str, str, Bar], list[float]] = {}
    for row in rows:
        for entry in row.entries:
            bar = entry.bar
            if bar is not None and bar.mean_at_least is not None:
                mean_bar = Bar(at_least=bar.mean_at_least, mean_rows=bar.mean_rows)
                ratios.setdefault((row.group, entry.name, mean_bar), []).append(entry.ratio)
    return [(group, peer, statistics.geometric_mean(r), len(r), bar) for (group, peer, bar), r in ratios.items()]


def noisy(load: float) -> bool:
    return load > NOISY_LOAD


# --- text ---


def value_text(value: float, unit: str) -> str:
    if unit != "s":
        return f"{value:.1f} {unit}"
    for scale, name in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.4g} {name}"
    return f"{value / 1e-6:.4g} µs"


def load_text(load: float) -> str:
    return "unknown" if math.isnan(load) else f"{100 * load:.0f}%"


def _conditions(row: Row) -> str:
    if row.unit == "s":
        return f"{row.rounds} rounds, others {load_text(row.other_load)}"
    return f"{row.rounds} new process{'es' if row.rounds > 1 else ''} each" if row.rounds else "counted"


def rate_of(row: Row, entry: Entry) -> float:
    """Work per second; NaN if the row counts none."""
    return (entry.work or row.work) / entry.median if row.work and row.unit == "s" else math.nan


def _cells(row: Row, entry: Entry, run: Run) -> list[str]:
    ours = entry is row.entries[0]
    label = row.label if ours else ""
    if entry.refused:
        return [label, entry.name, "refused", *[""] * 7]
    rate, roof = rate_of(row, entry), run.roof_of(row)
    verdict = entry.verdict
    if verdict and noisy(row.other_load):
        verdict += " (noisy)"
    low, high = entry.ratio_quartiles
    return [
        label,
        entry.name,
        value_text(entry.median, row.unit),
        value_text(entry.minimum, row.unit),
        "" if math.isnan(rate) else f"{rate / 1e9:.1f}",
        "" if math.isnan(rate) or roof is None else f"{100 * rate / roof.rate:.0f}%",
        "" if ours else f"{entry.ratio:.2f}",
        "" if ours else f"{low:.2f} .. {high:.2f}",
        "" if entry.bar is None else str(entry.bar),
        _conditions(row) if ours else verdict,
    ]


def _group_headings(rows: list[Row]) -> list[str]:
    work_unit = next((row.work_unit for row in rows if row.work), "")
    unit = "memory" if rows[0].unit == "MiB" else "median"
    rate, share = (WORK_RATES[work_unit], "share") if work_unit else ("", "")
    return ["row", "contender", unit, "min", rate, share, "ratio", "quartiles", "bar", "verdict"]


def _groups(run: Run) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in run.rows:
        groups.setdefault(row.group, []).append(row)
    return groups


def heading(run: Run) -> list[str]:
    """The conditions of the measurements, as lines of text."""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    lines = [f"{run.device}, {counted(run.threads, 'thread')}, {run.date}", versions]
    lines += [f"commit {run.commit}"] if run.commit else []
    for key, roof in run.roofs.items():
        unit, _, threads = key.partition(", ")
        where = f" with {threads}" if threads else ""
        lines.append(f"share{where}: of {roof.rate / 1e9:.1f} {WORK_RATES[unit]}, {roof.how}")
    lines.append("ratio: median over the rounds of the contender's figure over ours; padding does not count as work")
    if run.quick:
        lines.append("QUICK RUN: few rounds, without slow rows; not for publication")
    if noisy(run.other_load):
        lines.append(
            f"NOISY MACHINE: other processes used {load_text(run.other_load)} of a processor before the first row"
        )
    return lines


def closing(run: Run) -> list[str]:
    """Geometric means, unsupported rows, and numbers of bars met and missed."""
    lines, verdicts = [], []
    for group, peer, ratio, count, bar in means(run.rows):
        verdict = bar.verdict(ratio) if count == bar.mean_rows else f"no verdict: {count} of {bar.mean_rows} rows"
        lines.append(f"{group}, geometric mean against {peer} over {count} rows: {ratio:.2f}, bar {bar}: {verdict}")
        verdicts.append((verdict, f"{group}, geometric mean against {peer}"))
    refusals: dict[tuple[str, str, str], int] = {}
    for row in run.rows:
        for entry in row.entries:
            if entry.refused:
                key = (row.group, entry.name, entry.refused)
                refusals[key] = refusals.get(key, 0) + 1
            elif entry.verdict:
                verdicts.append((entry.verdict, f"{row.group}, {row.label}, {entry.name}: {entry.ratio:.2f}"))
    for (group, name, reason), count in refusals.items():
        lines.append(f"{group}, {name}: not supported on {count} rows: {reason}")
    missed = [what for verdict, what in verdicts if verdict == "MISS"]
    disturbed = sum(noisy(row.other_load) for row in run.rows)
    if disturbed:
        lines.append(f"{disturbed} of {len(run.rows)} rows ran beside other busy processes (marked noisy)")
    lines.append(f"bars met: {sum(v == 'PASS' for v, _ in verdicts)}, missed: {len(missed)}")
    return lines + [f"  missed: {what}" for what in missed]


def missed_bars(run: Run) -> int:
    """Number of missed bars."""
    rows = sum(entry.verdict == "MISS" for row in run.rows for entry in row.entries)
    return rows + sum(count == bar.mean_rows and bar.verdict(r) == "MISS" for _, _, r, count, bar in means(run.rows))


def text(run: Run) -> str:
    """The run as one table for a terminal."""
    groups = _groups(run)
    tables = {g: [_cells(row, e, run) for row in rows for e in row.entries] for g, rows in groups.items()}
    titles = {g: _group_headings(rows) for g, rows in groups.items()}
    everything = [line for g in groups for line in (titles[g], *tables[g])]
    widths = [max((len(line[i]) for line in everything), default=0) for i in range(10)]

    def line_of(cells: list[str]) -> str:
        padded = [c.ljust(w) if i in (0, 1, 9) else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
        return "  ".join(padded).rstrip()

    lines = heading(run)
    for group in groups:
        lines += ["", group, line_of(titles[group]), *map(line_of, tables[group])]
    return "\n".join([*lines, "", *closing(run)])


def markdown(run: Run) -> str:
    """The run as Markdown, one table per group."""
    lines = [f"- {line}" for line in heading(run)]
    for group, rows in _groups(run).items():
        titles = _group_headings(rows)
        lines += ["", f"**{group}**", "", "| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        lines += ["| " + " | ".join(_cells(row, e, run)) + " |" for row in rows for e in row.entries]
    return "\n".join([*lines, "", *(f"- {line.strip()}" for line in closing(run))])


def live_line(row: Row) -> str:
    """One row in one line, to show progress during a run."""
    ours = row.entries[0]
    parts = [f"{ours.name} {value_text(ours.median, row.unit)}"]
    for entry in row.entries[1:]:
        parts.append(f"{entry.name} refused" if entry.refused else f"{entry.name} {entry.ratio:.2f} {entry.verdict}")
    return f"{row.group}, {row.label}: " + "; ".join(part.rstrip() for part in parts)


# --- JSON ---


def to_json(run: Run) -> str:
    """The run with one row per line."""

    def without_nan(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without_nan(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [without_nan(v) for v in value]
        if isinstance(value, float):
            return None if math.isnan(value) else float(f"{value:.6g}")
        return value

    data = without_nan(dataclasses.asdict(run))
    rows = ",\n".join("  " + json.dumps(row) for row in data.pop("rows"))
    return json.dumps(data, indent=1).removesuffix("\n}") + f',\n "rows": [\n{rows}\n ]\n}}\n'


def from_json(document: str) -> Run:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    data = json.loads(document)
    rows = []
    for row in data.pop("rows"):
        entries = []
        for entry in row.pop("entries"):
            bar = entry.pop("bar")
            entry |= {key: number(entry[key]) for key in ("median", "minimum", "ratio")}
            for key in ("ratio_quartiles", "quartiles"):
                low, high = entry.get(key, (None, None))
                entry[key] = (number(low), number(high))
            entries.append(Entry(**{**entry, "bar": Bar(**bar) if bar else None}))
        rows.append(Row(**{**row, "entries": entries, "other_load": number(row["other_load"])}))
    roofs = {unit: Roof(**roof) for unit, roof in data.pop("roofs").items()}
    return Run(**{**data, "roofs": roofs, "rows": rows, "other_load": number(data["other_load"])})


def stem_of(run: Run) -> str:
    """<device>-<date>"""
    device = re.sub(r"[^a-z0-9]+", "-", f"{run.device} {counted(run.threads, 'thread')}".lower()).strip("-")
    return f"{device}-{run.date[:10]}"


def unused(folder: Path, stem: str) -> Path:
    """<folder>/<stem>.json, or with a number if the file exists."""
    path, count = folder / f"{stem}.json", 1
    while path.exists():
        count += 1
        path = folder / f"{stem}-{count}.json"
    return path


def write(path: Path, text: str) -> None:
    """Writes atomically, so that an interrupted process leaves a complete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print a saved benchmark run.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--markdown", action="store_true")
    arguments = parser.parse_args()
    saved = from_json(arguments.file.read_text(encoding="utf-8"))
    print(markdown(saved) if arguments.markdown else text(saved))
