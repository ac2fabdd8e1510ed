"""The page of measurements, of `make report`: measures bench/sweeps.py and draws tables and pictures of the results.

    python bench/page.py                           # other options are those of pytest: -k lstm, --minutes 5
    python bench/page.py --results FILE [FILE ..]  # saved results, without measuring

Writes build/report/index.html, which has all pictures within and needs no other file, and the pictures as PNG.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import report
from figures import OTHER, OURS, RESULTS, ROOT, TORCH, axes_of
from report import Entry, Row, Run, counted, value_text

MINUTES = 16  # of measurement; the page takes another minute
WAIT_QUIET = 60  # seconds
OUT = ROOT / "build" / "report"
FORWARD, TRAINING = "forward", "training"
SMALLEST = "smallest call"
COLORS = (TORCH, "#8f7fb8", "#79a86b", "#c05b7a", "#5aa7b5", OTHER)  # of peers
SLOWER = "#a03c08"
GRID = "#e4e4e4"
DPI = 150

# Operators of rows that are not of a sweep, by a pattern of their group.
GROUPS = [
    (r"Cell\b|cell variants", "cells"),
    (r"one step of a stream$|weights$|text to speech|sLSTM with", "prepared layers"),
    (r"[Aa]dditive attention", "additive attention"),
    (r"[Aa]ttention|MultiheadAttention|Transformer", "attention"),
    (r"Embedding (forward|backward|of)", "Embedding"),
    (r"EmbeddingBag", "EmbeddingBag"),
    (r"CRF", "CRF"),
    (r"ctc", "CTC loss"),
    (r"beam search", "beam search"),
    (r"latency|epoch", "latency"),
    (r"packed", "recurrent layers, packed sequences"),
    (r"LSTM|GRU|RNN|variants|autocast|bfloat16|float32", "recurrent layers"),
]


# ---- results


@dataclass(frozen=True, eq=False)
class Item:
    """A row with its run."""

    run: Run
    row: Row
    operator: str
    which: str

    @property
    def ours(self) -> Entry:
        return self.row.entries[0]

    @property
    def peers(self) -> list[Entry]:
        """Other libraries that ran; contenders of seqkernels and times that are goals are not peers."""
        found = [e for e in self.row.entries[1:] if not e.refused and not math.isnan(e.ratio)]
        return [e for e in found if not re.match(r"\(?(ours|seqkernels|quiet|plain|\d)", e.name)]

    @property
    def threads(self) -> int:
        return self.run.threads_of(self.row)

    @property
    def smallest(self) -> bool:
        return self.row.group.endswith(SMALLEST)

    @property
    def timed(self) -> bool:
        return self.row.unit == "s"

    @property
    def noisy(self) -> bool:
        return report.noisy(self.row.other_load)

    @property
    def share(self) -> float:
        """Of the best matrix product or copy; NaN if the row has no work."""
        roof = self.run.roof_of(self.row)
        return report.rate_of(self.row, self.ours) / roof.rate if roof is not None and roof.rate else math.nan


def operator_of(row: Row) -> str:
    if row.operator:
        return row.operator
    return next((name for pattern, name in GROUPS if re.search(pattern, row.group)), "other")


def which_of(row: Row) -> str:
    if row.which:
        return row.which
    return TRAINING if re.search(r"training|backward|memory", row.group) else FORWARD


def items_of(runs: Sequence[Run]) -> list[Item]:
    several = len({run.device for run in runs}) > 1
    found = []
    for run in runs:
        for row in run.rows:
            place = f", {run.device}" if several else ""
            found.append(Item(run, row, operator_of(row) + place, which_of(row)))
    return found


def read(paths: Sequence[str]) -> list[Run]:
    runs = []
    for path in paths:
        try:
            run = report.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise SystemExit(f"report: cannot read RESULTS {path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError):
            raise SystemExit(
                f"report: RESULTS must be a file that make bench or make report saved, got {path}"
            ) from None
        if not run.rows:
            raise SystemExit(f"report: {path} has no rows")
        runs.append(run)
    return runs


def by_operator(items: Iterable[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.operator, []).append(item)
    return found


@dataclass(frozen=True)
class Spread:
    """Of the ratios of several rows."""

    median: float
    quartiles: tuple[float, float]
    least: float
    most: float
    rows: int
    slower: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread:
        slower = sum(ratio < 1 for ratio in ratios)
        quartiles = report.quartiles(ratios)
        return cls(statistics.median(ratios), quartiles, min(ratios), max(ratios), len(ratios), slower)


def spreads(items: Iterable[Item]) -> dict[tuple[str, str, str], Spread]:
    """By operator, pass and peer, over all rows that are timed."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for item in items:
        if item.timed:
            for peer in item.peers:
                found.setdefault((item.operator, item.which, peer.name), []).append(peer.ratio)
    return {key: Spread.of(ratios) for key, ratios in found.items()}


def first_spreads(items: Iterable[Item]) -> dict[tuple[str, str], Spread]:
    """By operator and pass, against the first peer of each row."""
    found: dict[tuple[str, str], list[float]] = {}
    for item in items:
        if item.timed and item.peers:
            found.setdefault((item.operator, item.which), []).append(item.peers[0].ratio)
    return {key: Spread.of(ratios) for key, ratios in found.items()}


def curves(items: Sequence[Item], dimension: str) -> list[Item]:
    """The rows of a pass of an operator in which only `dimension` varies, in its order; [] for less than two sizes.

    The other dimensions have their base value, which most rows have.
    """
    rows = [item for item in items if item.row.sizes and item.timed and not item.smallest]
    rows = [item for item in rows if dimension in item.row.sizes]
    if not rows:
        return []
    base = base_of(rows)
    found = [i for i in rows if all(i.row.sizes[name] == base[name] for name in base if name != dimension)]
    found.sort(key=lambda item: item.row.sizes[dimension])
    return found if len({item.row.sizes[dimension] for item in found}) > 1 else []


def base_of(items: Sequence[Item]) -> dict[str, int]:
    names = list(items[0].row.sizes)
    return {name: Counter(item.row.sizes.get(name, 0) for item in items).most_common(1)[0][0] for name in names}


def dimensions(items: Iterable[Item]) -> list[str]:
    return list(dict.fromkeys(name for item in items for name in item.row.sizes))


# ---- pictures


@dataclass
class Pictures:
    """The pictures of a page, by name, with their description."""

    folder: Path
    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, picture: Any) -> str:
        """Saves a picture and returns its name for `tag`."""
        name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        file = io.BytesIO()
        picture.savefig(file, dpi=DPI, format="png")
        self.files[name] = with_few_colors(file.getvalue())
        (self.folder / f"{name}.png").write_bytes(self.files[name])
        return name

    def tag(self, name: str, description: str) -> str:
        data = base64.b64encode(self.files[name]).decode("ascii")
        width = int.from_bytes(self.files[name][16:20], "big")  # of the header
        text = html.escape(description, quote=True)
        return f'<img src="data:image/png;base64,{data}" alt="{text}" width="{width * 2 // 3}" loading="lazy">'


def with_few_colors(png: bytes) -> bytes:
    """A third of the size: lines and text need no more than a palette."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return file.getvalue()


def times(value: float) -> str:
    return f"{value:.0f}x" if value >= 10 else f"{value:.1f}x" if value >= 1 else f"{value:.2f}x"


def seconds(value: float) -> str:
    for scale, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= 0.999 * scale:
            return f"{value / scale:g} {name}"
    return f"{value / 1e-9:g} ns"


def short(value: float) -> str:
    for scale, letter in ((1_000_000, "M"), (1000, "k")):
        if value >= scale and value % scale == 0:
            return f"{value / scale:g}{letter}"
    return f"{value:g}"


def logarithmic(axis: Any, low: float, high: float, text: Any) -> None:
    """Ticks at powers of ten, and between them where there are few of them."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades < 2.2 else (1, 3) if decades < 3.5 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1, 1 if decades < 4.5 else 2)
    ticks = [m * 10.0**e for e in exponents for m in steps if low <= m * 10.0**e <= high]
    axis.set_ticks(ticks, [text(tick) for tick in ticks], fontsize=8)
    axis.set_minor_formatter(lambda *_: "")
    axis.set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def speedups(pictures: Pictures, items: Sequence[Item]) -> str:
    """The picture at the top: the ratios of each operator, the fastest first."""
    of = first_spreads(items)
    peers = {item.operator: item.peers[0].name for item in items if item.peers}
    names = sorted({name for name, _ in of}, key=lambda n: max(s.median for (o, _), s in of.items() if o == n))
    picture, axes = axes_of(5.6, 1.1 + 0.34 * len(names))
    low = min(0.9, *(s.least for s in of.values()))
    high = max(1.2, *(s.most for s in of.values()))
    for y, name in enumerate(names):
        for which, shift, filled in ((FORWARD, 0.16, True), (TRAINING, -0.16, False)):
            spread = of.get((name, which))
            if spread is None:
                continue
            color = OURS if spread.median >= 1 else SLOWER
            axes.plot([spread.least, spread.most], [y + shift] * 2, color="#c4ccd2", linewidth=1, zorder=2)
            axes.plot(spread.quartiles, [y + shift] * 2, color=color, linewidth=3.2, solid_capstyle="butt", zorder=3)
            face = color if filled else "white"
            axes.plot(spread.median, y + shift, "o", color=color, markerfacecolor=face, markersize=5.5, zorder=4)
            axes.text(high * 1.12, y + shift, times(spread.median), fontsize=7, va="center", color=color)
    axes.set_xscale("log")
    axes.set_xlim(low * 0.9, high * 1.75)
    axes.set_ylim(-0.6, len(names) - 0.4)
    labels = [name if peers[name].startswith("torch") else f"{name} ({peers[name]})" for name in names]
    labels = [textwrap.fill(label, 27) for label in labels]
    axes.set_yticks(range(len(names)), labels, fontsize=8)
    logarithmic(axes.xaxis, low * 0.9, high, lambda tick: f"{tick:g}x")
    axes.axvline(1.0, color="#666666", linewidth=1, zorder=1)
    axes.grid(axis="x", color=GRID)
    picture.supxlabel("times faster than the peer (left of 1x: slower)", fontsize=8.5)
    axes.plot([], [], "o", color=OURS, label=FORWARD, markersize=5.5)
    axes.plot([], [], "o", color=OURS, markerfacecolor="white", label=TRAINING, markersize=5.5)
    axes.plot([], [], color=OURS, linewidth=3.2, label="quartiles of the rows")
    axes.plot([], [], color="#c4ccd2", linewidth=1, label="all rows")
    picture.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=7.5, handlelength=1.4, columnspacing=1)
    return pictures.add("speedups", picture)


def dumbbells(
    pictures: Pictures,
    name: str,
    rows: dict[str, dict[str, float]],
    label: str,
    text: Any,
    one: bool = False,
) -> str:
    """Values of contenders for each row of a picture, on a logarithmic axis."""
    picture, axes = axes_of(5.6, 1.0 + 0.27 * len(rows))
    contenders = list(dict.fromkeys(c for values in rows.values() for c in values))
    colors = dict(zip(contenders, (OURS, *COLORS, *COLORS)))
    for y, values in enumerate(reversed(list(rows.values()))):
        axes.plot([min(values.values()), max(values.values())], [y, y], color="#c4ccd2", linewidth=1.5, zorder=2)
        for contender, value in values.items():
            axes.plot(value, y, "o", color=colors[contender], markersize=5.5, zorder=3)
    everything = [value for values in rows.values() for value in values.values()]
    low, high = min(everything) / 1.3, max(everything) * 1.3
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_yticks(range(len(rows)), list(rows)[::-1], fontsize=8)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    logarithmic(axes.xaxis, low, high, text)
    if one and low < 1 < high:
        axes.axvline(1.0, color="#666666", linewidth=1, zorder=1)
    axes.grid(axis="x", color=GRID)
    axes.set_xlabel(label, fontsize=8.5)
    for contender in contenders:
        axes.plot([], [], "o", color=colors[contender], label=contender, markersize=5.5)
    picture.legend(loc="outside upper left", ncols=4, frameon=False, fontsize=7.5, handletextpad=0.2)
    return pictures.add(name, picture)


def kind_of(name: str) -> str:
    """ "ours, int8" and the like are ours; peers keep their names."""
    return "seqkernels" if re.match(r"ours|seqkernels", name) else name


def memory(pictures: Pictures, items: Sequence[Item]) -> str:
    rows = {}
    for item in items:
        if item.row.unit == "MiB" and item.row.sizes:
            values = {kind_of(e.name): max(e.median, 0.1) for e in (item.ours, *item.peers)}
            rows[item.operator] = values
    return (
        ""
        if not rows
        else dumbbells(pictures, "memory", rows, "peak memory of a training step, MiB, without its inputs", short)
    )


def overhead(pictures: Pictures, items: Sequence[Item]) -> str:
    rows = {
        f"{item.operator}, {item.which}": {kind_of(e.name): e.median for e in (item.ours, *item.peers)}
        for item in items
        if item.smallest and item.timed
    }
    return "" if not rows else dumbbells(pictures, "overhead", rows, "time of the smallest call, one thread", seconds)


def threads(pictures: Pictures, items: Sequence[Item]) -> str:
    """The median of time with one thread over time with two, for ours and the first peer."""
    found: dict[tuple[Any, ...], dict[int, Item]] = {}
    for item in items:
        if item.row.sizes and item.timed and not item.smallest:
            key = (id(item.run), item.operator, item.which, *item.row.sizes.items())
            found.setdefault(key, {})[item.threads] = item
    ratios: dict[str, dict[str, list[float]]] = {}
    for (_, operator, which, *_), by_threads in found.items():
        if by_threads.keys() >= {1, 2}:
            of = ratios.setdefault(f"{operator}, {which}", {})
            one, two = by_threads[1], by_threads[2]
            of.setdefault("seqkernels", []).append(one.ours.median / two.ours.median)
            if one.peers and two.peers:
                of.setdefault("its peer", []).append(one.peers[0].median / two.peers[0].median)
    rows = {name: {who: statistics.median(values) for who, values in of.items()} for name, of in ratios.items()}
    label = "time with one thread over time with two, median"
    return "" if not rows else dumbbells(pictures, "threads", rows, label, times, one=True)


def shares(pictures: Pictures, items: Sequence[Item]) -> str:
    found: dict[str, list[float]] = {}
    for item in items:
        if item.timed and not item.smallest and item.share > 0:
            found.setdefault(f"{item.operator}, {item.which}", []).append(100 * item.share)
    rows = {name: {"best row": max(of), "median row": statistics.median(of)} for name, of in found.items()}
    label = "share of the best product, or copy for bags"
    return "" if not rows else dumbbells(pictures, "shares", rows, label, lambda tick: f"{tick:g}%", one=False)


def scaling(pictures: Pictures, items: Sequence[Item], dimension: str) -> str:
    """Time against a dimension, with quartiles; "" if the dimension does not vary."""
    rows = curves(items, dimension)
    if not rows:
        return ""
    base = base_of(rows)
    picture, axes = axes_of(3.5, 3.1)
    names = list(dict.fromkeys(e.name for item in rows for e in (item.ours, *item.peers)))
    colors = dict(zip(names, (OURS, *COLORS, *COLORS)))
    all_threads = sorted({item.threads for item in rows}, reverse=True)
    values = []
    for count in all_threads:
        style = "-" if count == all_threads[0] else "--"
        for name in names:
            points = [(i, e) for i in rows if i.threads == count for e in (i.ours, *i.peers) if e.name == name]
            if not points:
                continue
            x = [item.row.sizes[dimension] for item, _ in points]
            y = [entry.median for _, entry in points]
            low, high = zip(*(e.quartiles if not math.isnan(e.quartiles[0]) else (e.median,) * 2 for _, e in points))
            values += [*low, *high]
            label = kind_of(name) + (f", {counted(count, 'thread')}" if len(all_threads) > 1 else "")
            axes.fill_between(x, low, high, color=colors[name], alpha=0.25, linewidth=0)
            axes.plot(x, y, style, color=colors[name], linewidth=1.6, label=label)
            for i, value in zip(points, y):
                face = "white" if i[0].noisy else colors[name]
                axes.plot(i[0].row.sizes[dimension], value, "o", color=colors[name], markerfacecolor=face, markersize=4)
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = sorted({item.row.sizes[dimension] for item in rows})
    axes.set_xticks(ticks, [short(tick) for tick in ticks], fontsize=8)
    axes.xaxis.set_minor_locator(_no_ticks())
    low, high = min(values) / 1.2, max(values) * 1.2
    axes.set_ylim(low, high)
    logarithmic(axes.yaxis, low, high, seconds)
    axes.grid(color=GRID)
    axes.set_xlabel(dimension, fontsize=8.5)
    others = " ".join(f"{name}={short(value)}" for name, value in base.items() if name != dimension)
    axes.set_title(f"{rows[0].operator}, {rows[0].which}\n{others}", fontsize=8.5, loc="left")
    axes.legend(frameon=False, fontsize=6.5, handlelength=2)
    return pictures.add(f"{rows[0].operator} {rows[0].which} {dimension}", picture)


# ---- HTML

STYLE = """
:root { color-scheme: light dark; --text: #1c2227; --soft: #5b6770; --page: #ffffff; --line: #d9dfe3; --mark: #b3401b;
  --band: #f3f6f8; --link: #14507f; }
@media (prefers-color-scheme: dark) { :root { --text: #e6eaed; --soft: #9aa6ae; --page: #121212; --line: #363c41;
  --mark: #ff9d73; --band: #1c2024; --link: #8cc4f0; }
  img { filter: invert(0.93) hue-rotate(180deg); } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1180px;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; margin: 0.4rem 0; } h2 { font-size: 1.25rem; border-top: 1px solid var(--line);
  padding-top: 1rem; margin-top: 2rem; }
a { color: var(--link); } code { background: var(--band); padding: 0.1em 0.3em; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.15rem 1rem; font-size: 0.9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 0.8rem; }
.wide { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(480px, 100%), 1fr)); gap: 1rem; }
.top { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(480px, 100%), 1fr)); gap: 0 1.5rem; }
figure { margin: 0; } figcaption, .note { color: var(--soft); font-size: 0.88rem; }
.table { overflow-x: auto; max-width: 100%; margin: 0.6rem 0; }
table { border-collapse: collapse; font-size: 0.82rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: 0.2rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { background: var(--band); cursor: pointer; vertical-align: bottom; } td.text, th.text { text-align: left; }
.slower { color: var(--mark); font-weight: 600; } .tag { color: var(--mark); font-size: 0.75rem; }
.banner { border: 2px solid var(--mark); padding: 0.5rem 0.8rem; margin: 0.8rem 0; }
summary { cursor: pointer; margin: 0.6rem 0; } nav { font-size: 0.9rem; line-height: 1.9; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 0.4rem; } }
"""

SCRIPT = """
document.querySelectorAll("th").forEach(head => head.addEventListener("click", () => {
  const body = head.closest("table").tBodies[0], i = head.cellIndex, up = head.dataset.up !== "1";
  head.dataset.up = up ? "1" : "";
  const key = row => { const t = row.cells[i].dataset.key; return t === undefined ? row.cells[i].textContent : +t; };
  [...body.rows].sort((a, b) => { const x = key(a), y = key(b), s = x < y ? -1 : x > y ? 1 : 0; return up ? s : -s; })
    .forEach(row => body.append(row));
}));
"""


@dataclass
class Cell:
    text: str
    key: float | None = None  # value for sorting; cells without are text
    style: str = ""

    def __str__(self) -> str:
        key = "" if self.key is None else f' data-key="{self.key:.6g}"'
        style = "text" if self.key is None and not self.style else self.style
        return f'<td{key} class="{style}">{self.text}</td>' if style else f"<td{key}>{self.text}</td>"


def number(value: float, text: str, style: str = "") -> Cell:
    return Cell("", -1.0) if math.isnan(value) else Cell(html.escape(text), value, style)


def table(titles: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    kinds = ["text" if rows and rows[0][i].key is None else "" for i in range(len(titles))]
    head = "".join(f'<th class="{kind}">{html.escape(title)}</th>' for title, kind in zip(titles, kinds))
    body = "\n".join("<tr>" + "".join(map(str, row)) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def ratio_cells(entry: Entry, unit: str) -> list[Cell]:
    """The ratio, marked where we are slower, and its quartiles."""
    ratio = entry.ratio
    if math.isnan(ratio):
        return [Cell("", -1.0), Cell("", -1.0)]
    slower = ratio < 1
    shown = f"{ratio:.2f}x" + ((" slower" if unit == "s" else " more") if slower else "")
    low, high = entry.ratio_quartiles
    spread = "" if math.isnan(low) else f"{low:.2f} to {high:.2f}"
    return [Cell(shown, ratio, "slower" if slower else ""), Cell(spread, ratio)]


def summary_table(items: Sequence[Item]) -> str:
    rows = []
    for (operator, which, peer), spread in spreads(items).items():
        style = "slower" if spread.median < 1 else ""
        rows.append(
            [
                Cell(f'<a href="#{anchor(operator)}">{html.escape(operator)}</a>'),
                Cell(which),
                Cell(html.escape(peer)),
                Cell(times(spread.median), spread.median, style),
                Cell(f"{times(spread.quartiles[0])} to {times(spread.quartiles[1])}", spread.quartiles[0]),
                Cell(f"{times(spread.least)} to {times(spread.most)}", spread.least),
                Cell(str(spread.rows), spread.rows),
                Cell(str(spread.slower), spread.slower, "slower" if spread.slower else ""),
            ]
        )
    return table(["operator", "pass", "peer", "median", "quartiles", "all rows", "rows", "slower in"], rows)


def anchor(operator: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", operator.lower()).strip("-")


def rows_table(items: Sequence[Item]) -> str:
    """All rows of an operator with each peer."""
    sizes = dimensions(items)
    labelled = any(not item.row.sizes for item in items)
    peers = list(dict.fromkeys(e.name for item in items for e in item.row.entries[1:]))
    several = len({id(item.run) for item in items}) > 1
    titles = [*(["group", "row"] if labelled else ["pass"]), *sizes, "threads", "ours", "quartiles", "share", "rounds"]
    titles += [title for peer in peers for title in (peer, "ratio", "quartiles")]
    titles += ["run"] if several else []
    rows = []
    for item in items:
        row, ours = item.row, item.ours
        noise = f' <span class="tag">noisy, others {report.load_text(row.other_load)}</span>' if item.noisy else ""
        kind = ", smallest call" if item.smallest else ", peak memory" if not item.timed else ""
        if labelled:
            cells = [Cell(html.escape(row.group)), Cell(html.escape(row.label) + noise)]
        else:
            cells = [Cell(html.escape(item.which + kind) + noise)]
        cells += [number(float(row.sizes.get(n, math.nan)), short(row.sizes.get(n, 0))) for n in sizes]
        low, high = ours.quartiles
        cells += [
            number(item.threads, str(item.threads)),
            number(ours.median, value_text(ours.median, row.unit)),
            number(low, f"{value_text(low, row.unit)} to {value_text(high, row.unit)}"),
            number(item.share, f"{100 * item.share:.1f}%" if item.share < 0.1 else f"{100 * item.share:.0f}%"),
            number(row.rounds, str(row.rounds)),
        ]
        of = {e.name: e for e in row.entries[1:]}
        for peer in peers:
            entry = of.get(peer)
            if entry is None:
                cells += [Cell("", -1.0)] * 3
            elif entry.refused:
                cells += [Cell(f"refused: {html.escape(entry.refused[:60])}", -1.0), *[Cell("", -1.0)] * 2]
            else:
                cells.append(number(entry.median, value_text(entry.median, row.unit)))
                cells += ratio_cells(entry, row.unit)
        rows.append(cells + ([Cell(html.escape(f"{item.run.device}, {item.run.date}"))] if several else []))
    return table(titles, rows)


def conditions(run: Run) -> str:
    """The machine and versions of a run."""
    disturbed = sum(report.noisy(row.other_load) for row in run.rows)
    quiet = "the load of other processes before the first row is unknown"
    if not math.isnan(run.other_load):
        quiet = f"other processes used {report.load_text(run.other_load)} of a processor before the first row"
    quiet += f"; {disturbed} of {len(run.rows)} rows ran beside busy processes" if disturbed else ""
    entries = {
        "command": f"<code>{html.escape(run.command or 'make bench')}</code>",
        "machine": html.escape(f"{run.device}, {counted(run.threads, 'thread')}"),
        "date": html.escape(run.date),
        "commit": html.escape(run.commit or "not recorded"),
        "versions": html.escape(", ".join(f"{name} {version}" for name, version in run.versions.items())),
        "noise": html.escape(quiet),
    }
    for key, roof in run.roofs.items():
        unit, _, count = key.partition(", ")
        what = (
            "best matrix product" if unit == "flop" else "best copy"
        ) + f", {count or counted(run.threads, 'thread')}"
        entries[what] = html.escape(f"{roof.rate / 1e9:.1f} {report.WORK_RATES[unit]}, {roof.how}")
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in entries.items()) + "</dl>"


def made_by(runs: Sequence[Run]) -> list[str]:
    """The conditions of one run, or those of several to unfold."""
    if len(runs) == 1:
        return [conditions(runs[0])]
    titles = [html.escape(f"{run.device}, {run.date}, {counted(len(run.rows), 'row')}") for run in runs]
    return [f"<details><summary>{t}</summary>{conditions(run)}</details>" for t, run in zip(titles, runs)]


def banners(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        if run.quick:
            found.append("Quick run: few rounds, not for publication.")
        disturbed = sum(report.noisy(row.other_load) for row in run.rows)
        if report.noisy(run.other_load) or disturbed > len(run.rows) / 4:
            load = report.load_text(run.other_load)
            found.append(
                f"Noisy machine: other processes used {load} of a processor before the first row, and "
                f"{disturbed} of {len(run.rows)} rows ran beside busy processes. Do not publish these figures."
            )
    return [f'<p class="banner">{html.escape(text)}</p>' for text in dict.fromkeys(found)]


def figure(pictures: Pictures, name: str, caption: str) -> str:
    return f"<figure>{pictures.tag(name, caption)}<figcaption>{html.escape(caption)}</figcaption></figure>"


def section(pictures: Pictures, operator: str, items: Sequence[Item]) -> str:
    parts = [f'<h2 id="{anchor(operator)}">{html.escape(operator)}</h2>']
    slower = [i for i in items if any(peer.ratio < 1 for peer in i.peers)]
    if slower:
        parts.append(
            f'<p class="slower">Slower than a peer, or with more memory, in {len(slower)} of {len(items)} rows.</p>'
        )
    panels = []
    for which in (FORWARD, TRAINING):
        of_pass = [item for item in items if item.which == which]
        for dimension in dimensions(of_pass):
            name = scaling(pictures, of_pass, dimension)
            if name:
                panels.append(pictures.tag(name, f"{operator}, {which}: time against {dimension}"))
    if panels:
        parts.append('<div class="panels">' + "\n".join(panels) + "</div>")
    shown = " open" if not panels else ""
    parts.append(f"<details{shown}><summary>All {counted(len(items), 'row')}</summary>{rows_table(items)}</details>")
    return "\n".join(parts)


READ = """
<ul class="note">
<li>A ratio is the time of the peer divided by ours, in the median over rounds in which all contenders run alternately
on the same inputs; their results are compared first. Above 1x we are faster. Rows in which we are slower are
marked.</li>
<li>Quartiles are those of the rounds, or of the rows in summaries. Where they include 1x, the two are equal on this
machine.</li>
<li>A share is the work of a call per second (operations of products, or bytes that must be read and written), divided
by the best matrix product or the best copy that this machine reached in the same run with as many threads. A share
above 100% of a copy is a table in a cache.</li>
<li>Bands in the plots are quartiles; a hollow point is a row during which other processes were busy.</li>
</ul>
"""


def page(runs: Sequence[Run], folder: Path) -> str:
    items = items_of(runs)
    pictures = Pictures(folder)
    sections = by_operator(items)
    parts = ["<h1>seqkernels: measurements</h1>", *banners(runs)]
    if first_spreads(items):
        caption = "The time of the peer over ours, over all sizes of an operator; torch unless the label names another."
        parts += ['<div class="top">', figure(pictures, speedups(pictures, items), caption), "<div>"]
        parts += [*made_by(runs), "</div></div>"]
    else:
        parts += made_by(runs)
    links = [f'<a href="#{anchor(name)}">{html.escape(name)}</a>' for name in sections]
    parts += ["<nav>" + " · ".join(links) + "</nav>", "<h2>How to read it</h2>", READ]
    parts += ["<h2>All operators and peers</h2>", summary_table(items)]
    pictured = [
        (shares, "Share of the ceiling of the machine, over the rows of an operator."),
        (threads, "What the second thread gains."),
        (overhead, "The smallest call, in which nearly all time is overhead."),
        (memory, "Peak memory of a training step in a new process."),
    ]
    drawn = [(draw(pictures, items), caption) for draw, caption in pictured]
    parts.append('<div class="wide">' + "".join(figure(pictures, n, c) for n, c in drawn if n) + "</div>")
    parts += [section(pictures, operator, of) for operator, of in sections.items()]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>seqkernels: measurements</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script></body></html>\n"
    )


def write(runs: Sequence[Run], folder: Path = OUT) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    path = folder / "index.html"
    report.write(path, page(runs, folder))
    return path


# ---- measuring


def measure(arguments: Sequence[str]) -> tuple[Path | None, int]:
    """Runs the sweeps; returns the file of results, which is written row by row, and the exit status of pytest."""
    given = next((a.partition("=")[2] for a in arguments if a.startswith("--save-results=")), "")
    shown = shlex.join(["make", "report", *([f"ARGS={shlex.join(arguments)}"] if arguments else [])])
    command = [
        sys.executable, "-m", "pytest", str(ROOT / "bench" / "sweeps.py"), "-p", "no:cacheprovider", "--benchmark-only",
        "-q", "--no-header", "--wait-quiet", str(WAIT_QUIET), "--save-results", "--command", shown,
        *([] if "--budget" in " ".join(arguments) else ["--minutes", str(MINUTES)]), *arguments,
    ]  # fmt: skip
    before = set(RESULTS.glob("*.json"))
    process = subprocess.Popen(command, cwd=ROOT)
    while True:
        try:
            status = process.wait()
            break
        except KeyboardInterrupt:  # pytest receives it too, and ends with the rows so far
            continue
    found = {Path(given)} if given else set(RESULTS.glob("*.json")) - before
    return next((path for path in found if path.exists()), None), status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", nargs="+", metavar="FILE", help="draw saved results instead of measuring")
    arguments, of_pytest = parser.parse_known_args(argv)
    if arguments.results:
        print(f"written: {write(read(arguments.results))}")
        return 0
    path, status = measure(of_pytest)
    if path is None:
        print("report: no rows were measured", file=sys.stderr)
        return status or 1
    print(f"results: {path}\nwritten: {write(read([str(path)]))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
