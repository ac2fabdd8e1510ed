"""Options of the bench, the `compare` fixture that every bench file uses, and the table at the end."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # harness and report, whatever pytest's import mode

import harness
import report
from harness import Contender
from report import Bar, Row, Run

RUN = pytest.StashKey[Run]()
FILE = pytest.StashKey[Path]()
RESULTS = Path(__file__).parent / "results"
Bars = Mapping[str, Bar | float]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("seqkernels bench")
    group.addoption("--threads", type=int, default=2, help="threads for ours and every peer (default 2)")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="which rows: those marked cuda, or not")
    group.addoption("--budget", type=float, default=8.0, metavar="S", help="timing per row (default 8)")
    group.addoption("--quick", action="store_true", help="1 second per row, slow rows left out; not for quoting")
    group.addoption("--wait-quiet", type=float, default=0.0, metavar="S", help="wait up to so long for a quiet machine")
    group.addoption(
        "--save-results",
        nargs="?",
        const="",
        metavar="FILE",
        help="write each row to bench/results/<device>-<date>.json, or to =FILE, whose rows are kept",
    )
    group.addoption("--strict-bars", action="store_true", help="exit with an error if a bar is missed")
    group.addoption("--compile-rnn", action="store_true", help="torch.compile with experimental allow_rnn (minutes)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    ignored = ("ignore::pytest_benchmark.logger.PytestBenchmarkWarning", "ignore::DeprecationWarning:fbgemm_gpu.*")
    for line in ("default", *ignored):
        config.addinivalue_line("filterwarnings", line)  # a warning of a peer is no failure here
    config.option.benchmark_quiet = True  # our table has the ratios; --benchmark-verbose brings theirs back
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


def _say(config: pytest.Config, line: str, **markup: bool) -> None:
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    capture: Any = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.ensure_newline()
        reporter.write_line(line, **markup)


def _save(config: pytest.Config) -> Path | None:
    """The rows so far, if they are wanted: a run that is cut leaves them."""
    given, run = config.getoption("save_results"), config.stash[RUN]
    if given is None:
        return None
    if FILE not in config.stash:
        config.stash[FILE] = Path(given) if given else report.unused(RESULTS, report.stem_of(run))
    report.write(config.stash[FILE], report.to_json(run))
    return config.stash[FILE]


@pytest.fixture(scope="session")
def bench_run(request: pytest.FixtureRequest) -> Run:
    """The run of this session: made when the first row asks for it, after a look at the machine."""
    config = request.config
    load = harness.wait_until_quiet(config.getoption("wait_quiet"), report.NOISY_LOAD)
    if report.noisy(load):
        warning = f"NOISY MACHINE: other processes hold {100 * load:.0f}% of a processor; do not quote these figures"
        _say(config, warning, red=True, bold=True)
    run = Run(
        date=datetime.datetime.now(tz=datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        device=_device(config),
        threads=config.getoption("threads"),
        versions=_versions(),
        roofs={unit: best() for unit, best in harness.ROOFS[config.getoption("device")].items()},
        other_load=load,
        quick=config.getoption("quick"),
    )
    given = config.getoption("save_results")
    if given and Path(given).exists():  # begun in another process
        run.rows += report.from_json(Path(given).read_text(encoding="utf-8")).rows
    config.stash[RUN] = run
    return run


@dataclass
class Bench:
    """What a bench function gets: each call measures one row and puts it into the table."""

    benchmark: Any
    run: Run
    config: pytest.Config

    def add(self, row: Row) -> None:
        self.run.rows.append(row)
        _save(self.config)
        self.benchmark.group = row.group
        self.benchmark.extra_info["label"] = row.label
        for entry in row.entries:
            self.benchmark.extra_info[entry.name] = entry.refused or {"median": entry.median, "ratio": entry.ratio}
        _say(self.config, report.live_line(row))

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
    ) -> None:
        """Time `contenders`, ours first, alternately.

        Parity is checked first: all against the first peer, or the pairs (reference, contender) given. `goals` are
        seconds of one call that ours must not exceed, by name: listed like peers that always take so long.
        """
        refused = {c.name: c.refused for c in contenders if c.refused}
        able = [c for c in contenders if not c.refused]
        if parity is None:
            parity = [(able[1], c) for c in able if c is not able[1]]
        with harness.no_gc():
            known = harness.check_parity(parity, tolerance)
            plan = harness.plan(able, self.config.getoption("budget") if not self.run.quick else 1.0, known)
            values: list[list[float]] = [[] for _ in able]

            def measure(i: int) -> None:
                values[i].append(harness.sample(able[i], plan.numbers[i], plan.warm[i]))

            def peers() -> None:
                # In another order each round: what one leaves behind (threads, caches, clock) meets each in turn.
                others = list(range(1, len(able)))
                first = len(values[0]) % len(others)
                for i in others[first:] + others[:first]:
                    measure(i)

            meter = harness.LoadMeter()
            # pytest-benchmark runs setup before each round: so every round is all peers once, then ours once.
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
        self.add(Row(group, label, entries, "s", work, work_unit, rounds, load))

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
    ) -> None:
        """Peak memory of a step, each in a fresh process; `contenders` maps a name to the factory's arguments."""
        if not Path("/proc/self/clear_refs").exists():
            pytest.skip("peak memory needs Linux's /proc/self/clear_refs")
        harness.check_parity(parity, tolerance)
        values: list[list[float]] = [[] for _ in contenders]

        def measure() -> None:
            for mine, arguments in zip(values, contenders.values()):
                mine.append(harness.peak_memory(factory, arguments, self.run.threads))

        self.benchmark.pedantic(measure, rounds=1 if self.run.quick else 3)
        entries = report.summarise(list(contenders), values, _as_bars(bars), {})
        self.add(Row(group, label, entries, "MiB", rounds=len(values[0])))

    def saved_memory(
        self, group: str, label: str, contenders: Mapping[str, tuple[Callable[[], object], Sequence[torch.Tensor]]]
    ) -> None:
        """What autograd keeps of a forward pass; `contenders` maps a name to the pass and the tensors it was given."""
        values = [[harness.saved_memory(forward, given)] for forward, given in contenders.values()]
        self.benchmark.pedantic(next(iter(contenders.values()))[0], rounds=1)
        self.add(Row(group, label, report.summarise(list(contenders), values, {}, {}), "MiB", rounds=0))


def _as_bars(bars: Bars) -> dict[str, Bar]:
    return {name: bar if isinstance(bar, Bar) else Bar(at_least=bar) for name, bar in bars.items()}


@pytest.fixture
def bench(benchmark: Any, bench_run: Run, request: pytest.FixtureRequest) -> Bench:
    return Bench(benchmark, bench_run, request.config)


def _turn(item: pytest.Item) -> int:
    """When a row comes: @pytest.mark.cuda(turn=1) first, so that a run that is cut has what is least known."""
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
                item.add_marker(pytest.mark.skip(reason="--quick leaves slow rows out"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    run = session.config.stash.get(RUN, None)
    if run is None or not run.rows:
        return
    for unit in {row.work_unit for row in run.rows}:
        again = harness.ROOFS[session.config.getoption("device")][unit]()
        if again.rate > run.roofs[unit].rate:
            run.roofs[unit] = again
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
