"""Forecast quantiles of hourly series with a GRU of torch.nn and of seqkernels.nn, then serve the model step by step.

    python examples/forecasting.py                               # generated series with daily and weekly seasons
    python examples/forecasting.py --data load.csv --epochs 10   # one row per hour, one column per series
    torchrun --nproc-per-node 2 examples/forecasting.py

At each hour the model reads the value and the time of day and week, and forecasts quantiles of the next hours. The loss
is the pinball loss. After training, seqkernels.inference.prepare packs the weights in float32 and in int8, and one
series is served as a stream, one hour per call: the script reports the time of a step and the error of each.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

import common
import seqkernels

QUANTILES = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
DAY, WEEK = 24, 168  # hours
HELD_OUT = 4 * WEEK  # the end of each series is for validation
Batch = tuple[Tensor, Tensor]  # features [B, T, D], values of the hours after each [B, T, horizon]


def generate(series: int, hours: int) -> Tensor:
    """[hours, series]: a trend, a day and a week of different shapes, and noise that grows with the level."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: float, high: float) -> Tensor:  # [series]
        return low + (high - low) * torch.rand(series, generator=generator)

    t = torch.arange(hours)[:, None]
    day, week = 2 * math.pi * t / DAY, 2 * math.pi * t / WEEK
    level = draw(10, 100) * (1 + draw(-0.2, 0.4) * t / hours)
    season = draw(0.2, 0.5) * torch.sin(day - draw(0, 6)) + draw(0.05, 0.2) * torch.sin(2 * day - draw(0, 6))
    season = season + draw(0.1, 0.3) * torch.sin(week - draw(0, 6))
    noise = torch.randn(hours, series, generator=generator)
    for i in range(1, hours):  # disturbances last for some hours
        noise[i] += 0.7 * noise[i - 1]
    return level * (1 + season) * (1 + 0.06 * noise)


def read_csv(path: Path) -> Tensor:
    """[hours, series] of a CSV file of numbers; a first row of names is skipped."""
    rows: list[list[float]] = []
    for number, row in common.read_csv(path):
        try:
            cells = [float(cell) for cell in row]
        except ValueError:
            cells = []
        if number == 1 and not cells:
            continue
        width = len(rows[0]) if rows else max(len(row), 1)
        if len(cells) != width or not all(map(math.isfinite, cells)):
            found = ",".join(row)[:60]
            raise common.ScriptError(f"{path}: line {number} must hold {width} finite numbers, got {found!r}")
        rows.append(cells)
    if len(rows) < 2 * HELD_OUT:
        raise common.ScriptError(f"{path}: must hold at least {2 * HELD_OUT} rows of hours, got {len(rows)}")
    return torch.tensor(rows)


def features(values: Tensor) -> Tensor:
    """[series, hours] -> [series, hours, 5]: the value, and the time of day and week as points on circles."""
    t = torch.arange(values.shape[1])
    circles = [f(2 * math.pi * t / period) for period in (DAY, WEEK) for f in (torch.sin, torch.cos)]
    return torch.stack([values, *(circle.expand_as(values) for circle in circles)], dim=2)


class Forecaster(nn.Module):
    """A GRU, and a linear layer that gives the quantiles of the next hours as differences from the present value."""

    def __init__(self, layers: Any, args: argparse.Namespace) -> None:
        super().__init__()
        self.horizon = args.horizon
        self.gru = layers.GRU(5, args.hidden, args.layers, batch_first=True)
        self.linear = nn.Linear(args.hidden, args.horizon * len(QUANTILES))

    def quantiles(self, output: Tensor, x: Tensor) -> Tensor:  # [B, T, H], [B, T, 5] -> [B, T, horizon, quantiles]
        return x[:, :, :1, None] + self.linear(output).unflatten(2, (self.horizon, len(QUANTILES)))

    def forward(self, x: Tensor) -> Tensor:
        return self.quantiles(self.gru(x)[0], x)


def pinball(forecast: Tensor, target: Tensor) -> Tensor:
    """The sum of q * e for e >= 0 and (q - 1) * e otherwise, with e = target - forecast, over all quantiles q."""
    error = target[..., None] - forecast
    q = QUANTILES.to(error.device)
    return torch.maximum(q * error, (q - 1) * error).sum()


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    x, target = batch
    return pinball(model(x), target), target.numel() * len(QUANTILES)


def windows(values: Tensor, steps: int, horizon: int) -> tuple[Tensor, Tensor]:
    """[series, hours] -> features [series, steps, 5] and targets [series, steps, horizon] of the last steps."""
    x = features(values)[:, -steps - horizon : -horizon]
    return x, values[:, -steps - horizon + 1 :].unfold(1, horizon, 1)


@torch.inference_mode()
def serve(model: Forecaster, x: Tensor, in_place: bool) -> tuple[Tensor, float]:
    """One series [1, T, 5], one hour per call: the forecasts [T, horizon, quantiles] and the median seconds of a call.

    Prepared layers update the state in place.
    """
    state = torch.zeros(model.gru.num_layers, 1, model.gru.hidden_size, dtype=x.dtype)
    forecasts, seconds = [], []
    for hour in x.split(1, dim=1):
        start = time.perf_counter()
        if in_place:
            output, state = model.gru(hour, state, out_state=state)
        else:
            output, state = model.gru(hour, state)
        seconds.append(time.perf_counter() - start)
        forecasts.append(model.quantiles(output, hour)[0, 0])
    return torch.stack(forecasts), statistics.median(seconds)


def serve_all(runs: list[common.Run], x: Tensor, target: Tensor) -> dict[str, float]:
    """Prints a table of the trained and the prepared layers, and returns microseconds of a step by layer."""
    model = copy.deepcopy(runs[-1].model).cpu().eval()
    exact, _ = serve(copy.deepcopy(model).double(), x.double(), in_place=False)
    served: dict[str, tuple[nn.Module, bool]] = {}
    for run in runs:
        layer = copy.deepcopy(run.model).cpu().eval()
        layer.load_state_dict(model.state_dict())  # equal weights, so that the errors compare
        served[f"{run.name}, trained"] = layer, False
    for weights in ("float32", "int8"):
        served[f"seqkernels, prepared in {weights}"] = seqkernels.inference.prepare(model, weights=weights)[0], True
    rows, times = [], {}
    for name, (layer, in_place) in served.items():
        forecast, seconds = serve(layer, x, in_place)
        times[name] = seconds * 1e6
        error = (forecast - exact).abs().max() / exact.abs().max()
        score = pinball(forecast, target) / (target.numel() * len(QUANTILES))
        rows.append([name, f"{times[name]:.1f}", f"{error:.1e}", f"{score:.4f}"])
    header = ["GRU", "µs per step", "largest error / largest forecast", "quantile loss"]
    print(f"\nServing one series, one hour per call, one thread:\n\n{common.markdown(header, rows)}")
    return times


def draw_forecast(axes: Axes, model: Forecaster, x: Tensor, target: Tensor, at: int) -> None:
    """The last days of a series [1, T, 5] before hour `at`, and the bands of the forecast there."""
    with torch.no_grad():
        bands = model(x[:, : at + 1])[0, -1].cpu()  # [horizon, quantiles]
    past = x[0, at - 4 * DAY : at + 1, 0].cpu()
    ahead = torch.arange(1, len(bands) + 1)
    axes.plot(torch.arange(1 - len(past), 1), past, color="#555555", linewidth=1)
    axes.plot(ahead, target[0, at].cpu(), color="#555555", linewidth=1, linestyle=":", label="observed")
    axes.fill_between(ahead, bands[:, 0], bands[:, 4], color=common.COLORS["seqkernels"], alpha=0.2, label="5% to 95%")
    axes.fill_between(ahead, bands[:, 1], bands[:, 3], color=common.COLORS["seqkernels"], alpha=0.4, label="25% to 75%")
    axes.plot(ahead, bands[:, 2], color=common.COLORS["seqkernels"], label="median")
    axes.set_title("Forecast on validation data", fontweight="bold", fontsize=11)
    axes.set(xlabel="hours from now", ylabel="standardised value")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=8)


def draw_times(axes: Axes, times: dict[str, float]) -> None:
    axes.barh(list(times), list(times.values()), color=[common.COLORS[name.split(",")[0]] for name in times])
    axes.invert_yaxis()
    axes.set_title("Serving: time of a step of the GRU", fontweight="bold", fontsize=11)
    axes.set_xlabel("µs")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> int:
    data = "a CSV file, one row per hour and one column per series; without it, series are generated"
    parser = common.Parser(__doc__, "forecasting", epochs=8, batch=32, lr=3e-3, data=data)
    parser.add_argument("--series", type=common.count, default=40, help="series to generate (%(default)s)")
    parser.add_argument("--horizon", type=common.count, default=DAY, help="hours to forecast (%(default)s)")
    parser.add_argument("--steps", type=common.count, default=WEEK, help="hours of a training row (%(default)s)")
    parser.add_argument("--hidden", type=common.count, default=96, help="hidden size (%(default)s)")
    parser.add_argument("--layers", type=common.count, default=1, help="layers of the GRU (%(default)s)")
    args = parser.parse_args()
    hours = read_csv(args.data) if args.data else generate(args.series, 12 * WEEK)  # [hours, series]
    train_hours = len(hours) - HELD_OUT
    row = args.steps + args.horizon
    if row > min(train_hours, HELD_OUT):
        parser.error(f"--steps + --horizon: must be at most {min(train_hours, HELD_OUT)} hours, got {row}")
    spread, mean = torch.std_mean(hours[:train_hours], dim=0)
    values = ((hours - mean) / spread.clamp(min=1e-6)).T.contiguous().to(args.device)  # [series, hours]
    starts = [(i, start) for i in range(len(values)) for start in range(0, train_hours - row, args.steps // 4 or 1)]
    x, target = windows(values, HELD_OUT - args.horizon, args.horizon)

    def batches(epoch: int, rows: slice) -> Iterator[Batch]:
        inputs = features(values.cpu()).to(args.device)
        for chunk in common.batches_of(common.shuffled(starts, args.seed + epoch), args.batch, rows):
            future = torch.stack([values[i, start + 1 : start + row] for i, start in chunk])
            yield (
                torch.stack([inputs[i, start : start + args.steps] for i, start in chunk]),
                future.unfold(1, args.horizon, 1),
            )

    def metric(model: nn.Module) -> float:
        total, n = loss(model, (x, target))
        return total.item() / n

    task = common.Task(
        "forecasting",
        build=lambda layers: Forecaster(layers, args),
        batches=batches,
        loss=loss,
        metric=metric,
        metric_name="quantile loss",
        metric_format=".4f",
        higher_is_better=False,
    )
    source = args.data.name if args.data else "generated series"
    shape = f"GRU {args.hidden}, layers {args.layers}, {args.steps} hours, batch {args.batch}"
    print(f"data: {source}, {len(values)} of {len(hours)} hours, {len(starts)} rows for training")
    print(f"model: {shape}, Adam {args.lr:g}, threads {args.threads}", flush=True)
    runs = common.train(task, args)
    panels: list[Callable[[Axes], None]] = []
    if common.rank() == 0:
        model = runs[-1].model.eval()
        with torch.no_grad():
            forecast = model(x)
        inside = ((target >= forecast[..., 0]) & (target <= forecast[..., 4])).float().mean().item()
        print(f"\n{inside:.1%} of the validation hours are between the quantiles 5% and 95%.")
        torch.set_num_threads(1)
        times = serve_all(runs, x[:1].cpu(), target[0].cpu())
        torch.set_num_threads(args.threads)
        panels = [
            lambda axes: draw_forecast(axes, model, x[:1], target[:1], at=x.shape[1] - 2 * DAY),
            lambda axes: draw_forecast(axes, model, x[-1:], target[-1:], at=x.shape[1] - 3 * DAY),
            lambda axes: draw_times(axes, times),
        ]
    return common.report(task, runs, args, f"{source}: {shape}", panels)


if __name__ == "__main__":
    common.run(main)
