"""Shared parts of the examples: options, training with several backends, checkpoints, the result table and the plot.

A script describes its model and data in a `Task` and calls:

    parser = common.Parser(__doc__, "tagging", epochs=4, batch=32, lr=2e-3, data="a text file")
    parser.add_argument("--hidden", type=common.count, default=128)
    args = parser.parse_args()                          # also starts the processes of torchrun
    runs = common.train(task, args)                     # torch and seqkernels alternate by epoch
    return common.report(task, runs, args)              # 0, or 1 if the losses differ

and, at its end, `common.run(main)`. All backends start with the same weights and train on the same batches. Under
torchrun, each process trains on a part of each batch (DistributedDataParallel) with the losses of one process.
"""

import argparse
import copy
import csv
import io
import math
import os
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

import seqkernels

# Layers by backend. A script replaces an entry by a namespace of its own for layers that torch.nn does not have.
LAYERS: dict[str, Any] = {"torch": nn, "seqkernels": seqkernels.nn}
COLORS = {"torch": "#f0a45d", "seqkernels": "#14507f"}
LOSS_LIMIT = 1e-3  # largest relative difference of the losses of the first epoch
# Options that may differ when a run is resumed. A script adds those of its own that do not affect training.
FREE_OPTIONS = {"epochs", "output", "checkpoint", "resume", "threads", "device"}
Batch = Any  # what `Task.batches` yields and `Task.loss` takes
Panels = Sequence[Callable[[Axes], None]]  # further plots below those of all examples
T = TypeVar("T")


class ScriptError(Exception):
    """Ends a script with one sentence on stderr and exit code 2."""


@dataclass
class Task:
    """A model and its data.

    The optimizer is Adam. A scheduler of class ReduceLROnPlateau is stepped by epoch with the metric, any other by
    optimizer step.
    """

    name: str
    build: Callable[[Any], nn.Module]  # the model, from a namespace with LSTM, GRU and so on
    batches: Callable[[int, slice], Iterable[Batch]]  # of an epoch (from 1); of each batch, only these rows
    loss: Callable[[nn.Module, Batch], tuple[Tensor, float]]  # sum and count; calls the model once, by forward
    metric: Callable[[nn.Module], float]  # on validation data, after an epoch; the model is in eval mode
    metric_name: str = "accuracy"
    metric_format: str = ".1%"
    higher_is_better: bool = True  # the metric
    clip: float = 1.0  # largest norm of the gradient; 0: unlimited
    accumulate: int = 1  # batches per optimizer step; the gradient is the mean over them
    patience: int = 0  # epochs without a better metric before training stops with the best weights; 0: all epochs
    scheduler: Callable[[torch.optim.Optimizer], Any] | None = None
    layers: Mapping[str, Any] = field(default_factory=lambda: LAYERS)


@dataclass
class Run:
    """A model of one backend in training, and its history."""

    name: str
    model: nn.Module
    task: Task
    lr: float
    step_loss: list[float] = field(default_factory=list)  # one per batch
    step_seconds: list[float] = field(default_factory=list)  # forward, backward and optimizer
    loss: list[float] = field(default_factory=list)  # one per epoch: mean over the training data
    metric: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one per epoch: the sum of its steps
    best: dict[str, Tensor] = field(default_factory=dict)  # weights of the best epoch, with patience

    STATEFUL = ("model", "optimizer", "scheduler")
    HISTORY = ("step_loss", "step_seconds", "loss", "metric", "seconds", "best")

    def __post_init__(self) -> None:
        # fused: a single pass over the parameters; otherwise the update of large embeddings takes longer than a layer
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True)
        self.scheduler = self.task.scheduler(self.optimizer) if self.task.scheduler else None
        self.by_epoch = isinstance(self.scheduler, ReduceLROnPlateau)
        self.wrapped = self.model

    def warm_up(self, batch: Batch) -> None:
        """A step of a copy, which excludes the setup of the first call from the timing."""
        Run(self.name, copy.deepcopy(self.model), self.task, self.lr).step(batch)

    def step(self, batch: Batch, update: bool = True) -> tuple[float, float]:
        """Returns the sum of the losses and their count, over all processes."""
        total, count = self.task.loss(self.wrapped, batch)
        sums = torch.tensor([total.item(), count], dtype=torch.float64, device=total.device)
        if self.wrapped is not self.model:
            dist.all_reduce(sums)
            total = total * world()  # the gradients are averaged over the processes
        all_total, all_count = sums.tolist()
        (total / (all_count * self.task.accumulate)).backward()
        if update:
            if self.task.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.scheduler and not self.by_epoch:
                self.scheduler.step()
        return all_total, all_count

    def train_epoch(self, data: list[Batch], bar: tqdm) -> None:
        self.model.train()
        total, total_count = 0.0, 0.0
        for i, batch in enumerate(data, start=1):
            start = time.perf_counter()
            loss, n = self.step(batch, update=i % self.task.accumulate == 0 or i == len(data))
            self.step_seconds.append(time.perf_counter() - start)
            self.step_loss.append(loss / n)
            total, total_count = total + loss, total_count + n
            bar.update()
        self.loss.append(total / total_count)
        self.seconds.append(sum(self.step_seconds[-len(data) :]))

    @torch.no_grad()
    def validate(self) -> None:
        """The metric of rank 0, for all processes."""
        self.model.eval()
        value = torch.tensor(self.task.metric(self.model) if rank() == 0 else 0.0, dtype=torch.float64)
        if world() > 1:
            value = value.to(next(self.model.parameters()).device)
            dist.broadcast(value, 0)
        self.metric.append(value.item())
        if self.by_epoch:
            self.scheduler.step(self.metric[-1])
        if self.task.patience and self.best_epoch() == len(self.metric):
            self.best = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    def best_epoch(self) -> int:
        return 1 + self.metric.index((max if self.task.higher_is_better else min)(self.metric))

    def exhausted(self) -> bool:
        """Whether the patience has run out."""
        return bool(self.task.patience and self.metric) and len(self.metric) - self.best_epoch() >= self.task.patience

    def state(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in self.STATEFUL}
        history = {name: getattr(self, name) for name in self.HISTORY}
        return {name: part.state_dict() for name, part in parts.items() if part is not None} | history

    def load(self, state: dict[str, Any]) -> None:
        for name in self.STATEFUL:
            if getattr(self, name) is not None:
                getattr(self, name).load_state_dict(state[name])
        for name in self.HISTORY:
            setattr(self, name, state[name])


def count(text: str) -> int:
    """The type of an option that must be a positive integer."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def within(low: float, high: float, kind: type = float) -> Callable[[str], Any]:
    """The type of an option that must be a number of a range."""

    def number(text: str) -> Any:
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"must lie in [{low:g}, {high:g}], got {text}")
        return kind(text)

    return number


share = within(0, 1)


class Parser(argparse.ArgumentParser):
    """The options of all examples; errors are one sentence and exit code 2."""

    def __init__(
        self, description: str, name: str, *, epochs: int, batch: int, lr: float, data: str | None = None
    ) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        option = self.add_argument
        backends = [*LAYERS, "both"]
        option("--backend", choices=backends, default="both", help="whose layers are trained (%(default)s)")
        option("--device", default="cpu", help="cpu, cuda, cuda:1 (%(default)s)")
        if data is not None:
            option("--data", type=Path, help=data)
        option("--epochs", type=count, default=epochs, help="number of epochs (%(default)s)")
        option("--batch", type=count, default=batch, help="rows of a batch, over all processes (%(default)s)")
        option("--lr", type=float, default=lr, help="learning rate of Adam (%(default)s)")
        option("--seed", type=int, default=0, help="seed of data, weights and order (%(default)s)")
        option("--threads", type=count, default=torch.get_num_threads(), help="threads of torch (%(default)s)")
        option("--output", type=Path, default=Path(f"{name}.png"), help="the picture (%(default)s)")
        option("--checkpoint", type=Path, default=Path(f"{name}.pt"), help="written after each epoch (%(default)s)")
        option("--resume", action="store_true", help="continue from the checkpoint")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def parse_args(self, *given: Any) -> argparse.Namespace:
        """Parses, sets the threads, and joins the processes of torchrun; only rank 0 prints to stdout."""
        args = super().parse_args(*given)
        for option in ("output", "checkpoint"):
            if not getattr(args, option).parent.is_dir():
                self.error(f"--{option}: folder {getattr(args, option).parent} must exist")
        if args.output.suffix.lower() not in (".png", ".pdf", ".svg"):
            self.error(f"--output: must end with .png, .pdf or .svg, got {args.output}")
        if args.checkpoint.is_dir():
            self.error(f"--checkpoint: must be a file, got the folder {args.checkpoint}")
        if not 0 < args.lr < float("inf"):
            self.error(f"--lr: must be above 0, got {args.lr}")
        if not 0 <= args.seed < 2**31:
            self.error(f"--seed: must be from 0 to {2**31 - 1}, got {args.seed}")
        on_gpu = args.device.startswith("cuda")
        try:
            if on_gpu and "LOCAL_RANK" in os.environ:
                args.device = f"cuda:{os.environ['LOCAL_RANK']}"
                torch.cuda.set_device(args.device)
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
            self.error(f"--device: {args.device} must be a device of this machine: {str(error).splitlines()[0]}")
        torch.set_num_threads(args.threads)
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group("nccl" if on_gpu else "gloo")
            if rank() > 0:
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # open until the process ends
        return args


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def shuffled(items: Sequence[T], seed: int) -> list[T]:
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()]


def batches_of(items: Sequence[T], size: int, rows: slice = slice(None)) -> Iterator[Sequence[T]]:
    """Splits items into batches whose sizes, at most `size`, differ by at most one; yields these rows of each."""
    n = -(-len(items) // size)
    for i in range(n):
        yield items[i * len(items) // n : (i + 1) * len(items) // n][rows]


def standard_library() -> list[Path]:
    """The source files of the standard library of this Python, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(root.rglob("*.py"))
    left_out = {"test", "tests", "idlelib", "lib2to3", "site-packages", "ensurepip"}
    files = [path for path in files if not left_out & set(path.relative_to(root).parts)]
    if len(files) < 100:
        raise ScriptError(f"{root}: must contain the source of the standard library; use --data instead")
    return files


def read_text(path: Path) -> str:
    """A text file in UTF-8."""
    try:
        content = path.read_bytes()
        return content.decode()
    except OSError as error:
        raise ScriptError(f"{path}: must be a text file, got: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ScriptError(f"{path}: line {line} must be UTF-8, got byte 0x{content[error.start]:02x}") from error


def read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file in UTF-8, each with the number of its last line."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ScriptError(f"{path}: line {reader.line_num} must be CSV, got: {error}") from error


def train(task: Task, args: argparse.Namespace, make_run: Callable[..., Run] = Run) -> list[Run]:
    """Trains a model for each backend, alternating by epoch, and writes a checkpoint after each epoch."""
    runs: list[Run] = []
    for name in LAYERS if args.backend == "both" else [args.backend]:
        torch.manual_seed(args.seed)
        model = task.build(task.layers[name]).to(args.device)
        if runs:
            model.load_state_dict(runs[0].model.state_dict())  # torch.nn and seqkernels.nn have the same names
        runs.append(make_run(name, model, task, args.lr))
    if args.resume:
        load(runs, args)
    elif rank() == 0:
        save(runs, args)  # an interrupt in the first epoch leaves a checkpoint as well
    for run in runs:
        if world() > 1:
            run.wrapped = DistributedDataParallel(run.model)
    saved = len(runs[0].loss)
    try:
        for epoch in train_epochs(runs, task, args):
            saved = epoch
    except KeyboardInterrupt:
        done = f"interrupted after {saved} of {args.epochs} epochs"
        raise ScriptError(f"{done}: the same command with --resume continues from {args.checkpoint}") from None
    for run in runs:
        if run.best:
            run.model.load_state_dict(run.best)
    return runs


def train_epochs(runs: list[Run], task: Task, args: argparse.Namespace) -> Iterator[int]:
    """Yields the number of each epoch once it is in the checkpoint."""
    first = len(runs[0].loss) + 1
    rows = slice(rank(), None, world())
    with tqdm(unit="step", dynamic_ncols=True, disable=True if rank() else None) as bar:
        for epoch in range(first, args.epochs + 1):
            if all(run.exhausted() for run in runs):
                break
            data = list(task.batches(epoch, rows))
            if epoch == first:
                for run in runs:
                    run.warm_up(data[0])
                bar.total = (args.epochs - first + 1) * len(runs) * len(data)
            for run in runs:
                bar.set_description(f"epoch {epoch}/{args.epochs} {run.name:>10}")
                torch.manual_seed(args.seed + epoch)  # equal dropout masks in all backends
                run.train_epoch(data, bar)
                if not math.isfinite(run.loss[-1]):
                    reason = f"the loss of {run.name} must be finite, got {run.loss[-1]}; use a smaller --lr"
                    raise ScriptError(f"epoch {epoch}: {reason}")
                run.validate()
                if rank() == 0:
                    result = f"loss {run.loss[-1]:.4f}  {task.metric_name} {run.metric[-1]:{task.metric_format}}"
                    tqdm.write(f"epoch {epoch:2} {run.name:>10}  {result}  {run.seconds[-1]:6.2f} s", file=sys.stderr)
            if rank() == 0:
                save(runs, args)
            yield epoch


def settings(args: argparse.Namespace) -> dict[str, str]:
    return {name: str(value) for name, value in vars(args).items() if name not in FREE_OPTIONS}


def save(runs: list[Run], args: argparse.Namespace) -> None:
    """Writes a temporary file and renames it, so that an interrupt leaves the previous checkpoint."""
    state = {"settings": settings(args), "runs": {run.name: run.state() for run in runs}}
    temporary = args.checkpoint.with_name(args.checkpoint.name + ".new")
    torch.save(state, temporary)
    temporary.replace(args.checkpoint)


def load(runs: list[Run], args: argparse.Namespace) -> None:
    try:
        state = torch.load(args.checkpoint, map_location=args.device, weights_only=True)
        before, states = state["settings"], state["runs"]
    except OSError as error:
        raise ScriptError(f"--resume: {args.checkpoint} must be a checkpoint, got: {error.strerror}") from error
    except Exception as error:  # torch.load of other files raises errors of many classes
        raise ScriptError(f"--resume: {args.checkpoint} must be a checkpoint of this script") from error
    for name, value in settings(args).items():
        if before.get(name) != value:
            option = f"--{name.replace('_', '-')} is {value}, in the checkpoint {before.get(name)}"
            raise ScriptError(f"--resume: {args.checkpoint} must be a checkpoint of the same options: {option}")
    for run in runs:
        try:
            run.load(states[run.name])
        except (RuntimeError, ValueError, KeyError) as error:  # a line for each tensor of another shape
            reason = str(error).splitlines()[-1].strip()
            raise ScriptError(f"--resume: {args.checkpoint} must hold the model of these data: {reason}") from error


def speedups(runs: list[Run]) -> list[float]:
    """Ratio of the times of torch and seqkernels, by epoch."""
    if len(runs) < 2:
        return []
    return [theirs / ours for theirs, ours in zip(runs[0].seconds, runs[1].seconds, strict=True)]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with right-aligned columns."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, rule, *rows]
    )


def table(task: Task, runs: list[Run]) -> str:
    """One row per epoch, and the median of the times in the last row."""
    header = ["epoch", *(f"{run.name} {what}" for what in ("loss", task.metric_name, "s") for run in runs)]
    rows = [
        [f"{i + 1}"]
        + [f"{run.loss[i]:.4f}" for run in runs]
        + [f"{run.metric[i]:{task.metric_format}}" for run in runs]
        + [f"{run.seconds[i]:.2f}" for run in runs]
        for i in range(len(runs[0].loss))
    ]
    rows.append(["median", *[""] * 2 * len(runs), *(f"{statistics.median(run.seconds):.2f}" for run in runs)])
    ratios = speedups(runs)
    if ratios:
        header.append("torch / seqkernels")
        for row, ratio in zip(rows, [*ratios, statistics.median(ratios)], strict=True):
            row.append(f"{ratio:.2f}x")
    return markdown(header, rows)


def report(task: Task, runs: list[Run], args: argparse.Namespace, title: str = "", panels: Panels = ()) -> int:
    """Prints the table and the difference of the losses, draws the plot, and returns the exit code."""
    if rank() > 0:
        return 0
    print(f"\n{table(task, runs)}\n")
    print("Training steps in all: " + ", ".join(f"{run.name} {sum(run.seconds):.1f} s" for run in runs))
    equal = True
    if len(runs) == 2:
        differences = [abs(a - b) / abs(a) for a, b in zip(runs[0].loss, runs[1].loss, strict=True)]
        equal = differences[0] <= LOSS_LIMIT
        first = f"relative difference {differences[0]:.1e}, limit {LOSS_LIMIT:.0e}"
        print(f"Losses after the first epoch: {'' if equal else 'NOT '}equal, {first}")
        print("By epoch (training amplifies rounding):", " ".join(f"{difference:.0e}" for difference in differences))
    draw(runs, title or task.name, args.output, panels)
    print(f"picture: {args.output}, checkpoint: {args.checkpoint}", flush=True)
    return 0 if equal else 1


def style(axes: Axes, title: str, x: str, y: str) -> None:
    """Call it after all curves and bars: the limits of y are those of the data and 0, with a margin at the data."""
    axes.set_title(title, fontweight="bold", fontsize=11)
    axes.set(xlabel=x, ylabel=y)
    low, high = axes.dataLim.intervaly
    axes.set_ylim(1.08 * min(low, 0), 1.08 * max(high, 0) or 1)
    axes.grid(axis="y", color="#e8e8e8")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw(runs: list[Run], title: str, path: Path, panels: Panels) -> None:
    """Loss by epoch, loss by time spent in training steps, seconds per epoch; below, the panels of the script."""
    epochs, steps = len(runs[0].loss), len(runs[0].step_loss)
    window = max(1, min(50, steps // (2 * epochs)))  # number of steps averaged per point
    figure = Figure(figsize=(13.5, 9.2 if panels else 4.6), layout="constrained")
    figure.suptitle(title, fontsize=10, color="#555555")
    top, *below = figure.subfigures(2 if panels else 1, squeeze=False)[:, 0]
    by_epoch, by_time, bars = top.subplots(1, 3)
    for i, run in enumerate(runs):
        color, width = COLORS[run.name], 0.8 / len(runs)
        loss = np.convolve(run.step_loss, np.full(window, 1 / window), mode="valid")
        step = np.arange(len(loss)) + window // 2
        seconds = np.cumsum(run.step_seconds)[step]
        # Each curve is narrower than the previous one, so that equal curves remain visible.
        by_epoch.plot(step * epochs / steps, loss, color=color, linewidth=6 / (1 + 2 * i), label=run.name)
        by_time.plot(seconds, loss, color=color, linewidth=2, label=f"{run.name}, {sum(run.seconds):.1f} s")
        left = np.arange(1, epochs + 1) + (i - len(runs) / 2) * width
        bars.bar(left, run.seconds, width, align="edge", color=color, label=run.name)
    ratios = speedups(runs)
    faster = f", median ratio {statistics.median(ratios):.1f}" if ratios else ""
    style(by_epoch, "Training loss by epoch", "epochs", f"loss, mean of {window} steps")
    style(by_time, "Training loss by time", "seconds of training steps", f"loss, mean of {window} steps")
    style(bars, f"Seconds per epoch{faster}", "epoch", "seconds")
    for axes in (by_epoch, by_time):
        axes.set_xlim(left=0)
        axes.legend(frameon=False, loc="lower left")
    by_epoch.set_xlim(right=epochs)
    for axes in (by_epoch, bars):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if panels:
        for panel, axes in zip(panels, below[0].subplots(1, len(panels), squeeze=False)[0], strict=True):
            panel(axes)
    figure.savefig(path, dpi=130)


def run(main: Callable[[], int]) -> NoReturn:
    """Runs a script; an error or Ctrl-C is one sentence on stderr and exit code 2."""
    code = 2
    try:
        code = main()
    except (ScriptError, OSError) as error:  # OSError: a full disk, for example
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("error: interrupted outside training", file=sys.stderr)
    with suppress(Exception):
        dist.destroy_process_group()
    sys.exit(code)
