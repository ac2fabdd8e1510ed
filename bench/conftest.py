"""Options of the benchmarks, the `bench` fixture, and the table at the end."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # harness and report, for any import mode of pytest

import harness
import report
from harness import Contender
from report import Bar, Row, Run

RUN = pytest.StashKey[Run]()
FILE = pytest.StashKey[Path]()
PROGRESS = pytest.StashKey["Progress"]()
RESULTS = Path(__file__).parent / "results"
Bars = Mapping[str, Bar | float]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seqkernels bench")
    group.addoption("--threads", type=int, default=2, help="threads for seqkernels and all peers (default 2)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="run the rows marked cuda, or the others")
    group.addoption("--budget", type=float, default=8.0, metavar="S", help="timing per row (default 8)")
    group.addoption("--minutes", type=float, metavar="M", help="share M minutes among all rows, instead of --budget")
    group.addoption("--quick", action="store_true", help="1 second per row, without slow rows; not for publication")
    group.addoption("--wait-quiet", type=float, default=0.0, metavar="S", help="maximum wait for an idle machine")
    group.addoption(
        "--save-results",
        nargs="?",
        const="",
        metavar="FILE",
        help="write each row to bench/results/<device>-<date>.json, or append to =FILE",
    )
    group.addoption("--command", metavar="TEXT", help="the command that the results name; otherwise that of pytest")
    group.addoption("--strict-bars", action="store_true", help="exit with an error if a bar is missed")
    group.addoption("--compile-rnn", action="store_true", help="torch.compile with experimental allow_rnn (minutes)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    ignored = ("ignore::pytest_benchmark.logger.PytestBenchmarkWarning", "ignore::DeprecationWarning:fbgemm_gpu.*")
    for line in ("default", *ignored):
        config.addinivalue_line("filterwarnings", line)  # warnings of peers do not fail
    config.option.benchmark_quiet = True  # replaced by the table with ratios; --benchmark-verbose shows it
    torch.set_num_threads(config.getoption("threads"))


def _device(config: pytest.Config) -> str:
    if config.getoption("device") == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    import seqkernels

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for peer in ("onnxruntime", "fbgemm-gpu-cpu", "triton", "flashrnn"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[peer] = importlib.metadata.version(peer)
    if torch.version.cuda is not None and torch.cuda.is_available():
        versions |= {"CUDA": torch.version.cuda, "cuDNN": str(torch.backends.cudnn.version())}
    versions["torch ISA"] = torch.backends.cpu.get_cpu_capability()
    build = seqkernels.build_info()
    versions |= {"seqkernels": build["version"], "seqkernels ISA": build["isa"], "compiler": build["compiler"]}
    return versions | {"last-level cache": f"{harness.last_level_cache() >> 20} MiB"}


def _commit() -> str:
    """The commit of the checkout; "" outside of one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


@dataclass
class Progress:
    """Benchmark functions that are done, most of which have one row, and the time for the others."""

    rows: int
    minutes: float | None
    started: float = field(default_factory=time.perf_counter)
    done: int = 0
    measured: float = 0.0  # seconds of timing in the rows so far, as budgeted

    def budget(self) -> float:
        """Seconds of timing for the next row: its share of the remaining time, less what a row takes besides."""
        assert self.minutes is not None
        passed = time.perf_counter() - self.started
        besides = (passed - self.measured) / self.done if self.done else 0.7
        share = (60 * self.minutes - passed) / max(1, self.rows - self.done) - besides
        return min(8.0, max(0.3, share))

    def __str__(self) -> str:
        passed = time.perf_counter() - self.started
        done = self.done + 1  # the row that is shown
        left = round(passed / done * (self.rows - done))
        return f"[{done}/{self.rows}, about {left // 60}:{left % 60:02} left]"


def _say(config: pytest.Config, line: str, **markup: bool) -> None:
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.ensure_newline()
        reporter.write_line(line, **markup)


def _save(config: pytest.Config) -> Path | None:
    """Saves the rows so far, if requested, so that an interrupted run keeps them."""
    given, run = config.getoption("save_results"), config.stash[RUN]
    if given is None:
        return None
    if FILE not in config.stash:
        config.stash[FILE] = Path(given) if given else report.unused(RESULTS, report.stem_of(run))
    report.write(config.stash[FILE], report.to_json(run))
    return config.stash[FILE]


@pytest.fixture(scope="session")
def bench_run(request: pytest.FixtureRequest) -> Run:
    """The run of this session, created for the first row after the load of the machine is measured."""
    config = request.config
    waits = config.getoption("wait_quiet")
    load = harness.wait_until_quiet(0.0, report.NOISY_LOAD)
    if report.noisy(load) and waits:
        _say(config, f"other processes use {100 * load:.0f}% of a processor; waits up to {waits:.0f} s until they end")
        load = harness.wait_until_quiet(waits, report.NOISY_LOAD)
    if report.noisy(load):
        warning = f"NOISY MACHINE: other processes use {100 * load:.0f}% of a processor; do not publish these figures"
        _say(config, warning, red=True, bold=True)
    else:
        _say(config, f"quiet machine: other processes use {100 * load:.0f}% of a processor")
    run = Run(
        date=datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        device=_device(config),
        threads=config.getoption("threads"),
        versions=_versions(),
        roofs={unit: best() for unit, best in harness.ROOFS[config.getoption("device")].items()},
        other_load=load,
        quick=config.getoption("quick"),
        commit=_commit(),
        command=config.getoption("command") or shlex.join(["python", "-m", "pytest", *config.invocation_params.args]),
    )
    given = config.getoption("save_results")
    if given and Path(given).exists():  # started by another process
        run.rows += report.from_json(Path(given).read_text(encoding="utf-8")).rows
    config.stash[RUN] = run
    return run


@dataclass
class Bench:
    """The fixture of benchmark functions. Each call measures one row and adds it to the table."""

    benchmark: Any
    run: Run
    config: pytest.Config

    def add(self, row: Row) -> None:
        self.run.rows.append(row)
        if row.work:
            _measure_roof(self.run, row.work_unit, row.threads, self.config.getoption("device"))
        _save(self.config)
        self.benchmark.group = row.group
        self.benchmark.extra_info["label"] = row.label
        for entry in row.entries:
            self.benchmark.extra_info[entry.name] = entry.refused or {"median": entry.median, "ratio": entry.ratio}
        _say(self.config, f"{self.config.stash[PROGRESS]} {report.live_line(row)}")

    def budget(self) -> float:
        if self.run.quick:
            return 1.0
        progress = self.config.stash[PROGRESS]
        if progress.minutes is None:
            return self.config.getoption("budget")
        seconds = progress.budget()
        progress.measured += seconds
        return seconds

    def time(
        self,
        group: str,
        label: str,
        contenders: Sequence[Contender],
        *,
        bars: Bars,
        work: float,
        work_unit: str = "flop",
        parity: Sequence[tuple[Contender, Contender]] | None = None,
        tolerance: float = 2e-5,
        goals: Mapping[str, float] | None = None,
        **of_sweep: Any,
    ) -> None:
        """Time `contenders` alternately; the first is seqkernels. `of_sweep`: fields of Row for rows of sweeps.

        Parity is checked first: all against the first peer, or the given pairs (reference, contender). `goals` are
        maximum seconds of one call, by name, and are listed like peers with this time.
        """
        refused = {c.name: c.refused for c in contenders if c.refused}
        able = [c for c in contenders if not c.refused]
        if parity is None:
            parity = [(able[1], c) for c in able if c is not able[1]]
        with harness.no_gc():
            known = harness.check_parity(parity, tolerance)
            plan = harness.plan(able, self.budget(), known)
            values: list[list[float]] = [[] for _ in able]

            def measure(i: int) -> None:
                values[i].append(harness.sample(able[i], plan.numbers[i], plan.warm[i]))

            def peers() -> None:
                # The order changes each round, so that the effects of a contender (threads, caches, clock) on the next
                # are distributed.
                others = list(range(1, len(able)))
                first = len(values[0]) % len(others)
                for i in others[first:] + others[:first]:
                    measure(i)

            meter = harness.LoadMeter()
            # pytest-benchmark runs setup before each round, so each round measures all peers, then seqkernels.
            self.benchmark.pedantic(measure, args=(0,), setup=peers, rounds=plan.rounds)
            load = meter.others()
        goals = goals or {}
        rounds = len(values[0])
        names = [*(c.name for c in able), *goals]
        bars = {**bars, **dict.fromkeys(goals, 1.0)}
        values += [[seconds] * rounds for seconds in goals.values()]
        entries = report.summarise(names, values, _as_bars(bars), refused)
        for entry, contender in zip(entries, able):
            entry.work = contender.work
        self.add(Row(group, label, entries, "s", work, work_unit, rounds, load, **of_sweep))

    def memory(
        self,
        group: str,
        label: str,
        factory: str,
        contenders: Mapping[str, dict[str, object]],
        *,
        bars: Bars,
        parity: Sequence[tuple[Contender, Contender]],
        tolerance: float = 2e-5,
        processes: int = 3,
        **of_sweep: Any,
    ) -> None:
        """Peak memory of a step, in new processes; `contenders` maps a name to the arguments of the factory."""
        if not Path("/proc/self/clear_refs").exists():
            pytest.skip("peak memory requires /proc/self/clear_refs of Linux")
        harness.check_parity(parity, tolerance)
        values: list[list[float]] = [[] for _ in contenders]

        def measure() -> None:
            for mine, arguments in zip(values, contenders.values()):
                mine.append(harness.peak_memory(factory, arguments, self.run.threads))

        self.benchmark.pedantic(measure, rounds=1 if self.run.quick else processes)
        entries = report.summarise(list(contenders), values, _as_bars(bars), {})
        self.add(Row(group, label, entries, "MiB", rounds=len(values[0]), **of_sweep))

    def saved_memory(
        self, group: str, label: str, contenders: Mapping[str, tuple[Callable[[], object], Sequence[torch.Tensor]]]
    ) -> None:
        """Memory saved by autograd in a forward pass; `contenders` maps a name to the pass and its input tensors."""
        values = [[harness.saved_memory(forward, given)] for forward, given in contenders.values()]
        self.benchmark.pedantic(next(iter(contenders.values()))[0], rounds=1)
        self.add(Row(group, label, report.summarise(list(contenders), values, {}, {}), "MiB", rounds=0))

    def compare(
        self,
        group: str,
        label: str,
        values: Mapping[str, Sequence[float]],
        *,
        bars: Bars,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        """Add a row of seconds that were measured elsewhere, one value per round; the first contender is seqkernels."""
        entries = report.summarise(list(values), list(values.values()), _as_bars(bars), dict(refused or {}))
        self.add(Row(group, label, entries, "s", rounds=len(next(iter(values.values())))))


def _measure_roof(run: Run, unit: str, threads: int, device: str, again: bool = False) -> None:
    """The best rate with a number of threads, measured at its first row, and again at the end of the run."""
    key = unit + report.threads_key(threads, run)
    if key in run.roofs and not again:
        return
    torch.set_num_threads(threads or run.threads)
    found = harness.ROOFS[device][unit]()
    if key not in run.roofs or found.rate > run.roofs[key].rate:
        run.roofs[key] = found


def _as_bars(bars: Bars) -> dict[str, Bar]:
    return {name: bar if isinstance(bar, Bar) else Bar(at_least=bar) for name, bar in bars.items()}


@pytest.fixture
def bench(benchmark: Any, bench_run: Run, request: pytest.FixtureRequest) -> Bench:
    return Bench(benchmark, bench_run, request.config)


def _turn(item: pytest.Item) -> int:
    """Position of a row: @pytest.mark.cuda(turn=1) runs first, so interrupted runs have the least measured rows."""
    return min(mark.kwargs.get("turn", 5) for mark in item.iter_markers("cuda"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("device") == "cuda"
    left_out = [item for item in items if bool(item.get_closest_marker("cuda")) != wanted]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    if wanted:
        items.sort(key=_turn)
    if config.getoption("quick"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="--quick skips slow rows"))


def pytest_collection_finish(session: pytest.Session) -> None:
    session.config.stash[PROGRESS] = Progress(len(session.items), session.config.getoption("minutes"))


def pytest_runtest_teardown(item: pytest.Item) -> None:
    item.config.stash[PROGRESS].done += 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(RUN, None)
    if run is None or not run.rows:
        return
    for unit, threads in sorted({(row.work_unit, row.threads) for row in run.rows}):
        _measure_roof(run, unit, threads, session.config.getoption("device"), again=True)
    if session.config.getoption("strict_bars") and report.missed_bars(run) and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    run = config.stash.get(RUN, None)
    if run is None or not run.rows:
        return
    terminalreporter.section("bench")
    terminalreporter.write_line(report.text(run))
    if (path := _save(config)) is not None:
        terminalreporter.write_line(f"written: {path}")
