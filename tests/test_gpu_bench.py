"""The parts of `make gpu` without a GPU: time limits of processes, tests that crash, partial results, selection of
shapes, and the table of tuning."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import shutil
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ENOUGH = 240.0  # seconds for processes that end by themselves, even beside other busy processes
BENCH = Path(__file__).resolve().parents[1] / "bench"


def module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module(name)


report, tally, gpu, tune = (module(name) for name in ("report", "tally", "gpu", "tune"))


@pytest.fixture(autouse=True)
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate tree in which the parts run."""
    folder = tmp_path / "site"
    (folder / "tests").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("[tool.pytest.ini_options]\nmarkers = ['cuda', 'sanitize']\n")
    monkeypatch.setattr(gpu, "SITE", folder)
    monkeypatch.setattr(gpu, "GRACE", 2.0)
    monkeypatch.setattr(gpu, "STOP", threading.Event())
    monkeypatch.setattr(gpu, "workers", list)  # one process, even where pytest-xdist is installed
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)  # of the process that runs this test
    return folder


def script(source: str) -> list[object]:
    return [sys.executable, "-c", textwrap.dedent(source)]


def run(source: str, log: Path, seconds: float = 60.0) -> Any:
    return gpu.run(script(source), time.monotonic() + seconds, log)


def gone(pid: int) -> bool:
    """Whether the process ends within two seconds; a zombie has ended."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


# ---- processes


def test_output_is_shown_when_it_is_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Output with pauses, one of them within a UTF-8 character."""
    ended = run(
        """
        import os, time
        os.write(1, b"first\\n")
        time.sleep(0.5)
        os.write(1, "µ".encode()[:1])
        time.sleep(0.3)
        os.write(2, "µ".encode()[1:] + b" last")
        """,
        tmp_path / "log",
    )
    assert ended == ("passed", "first\nµ last", 0)
    assert (tmp_path / "log").read_text(encoding="utf-8") == ended.output
    assert ended.output in capfd.readouterr().out


def test_failing_command(tmp_path: Path) -> None:
    ended = run("print('so'); raise SystemExit(3)", tmp_path / "log")
    assert (ended.status, ended.output, ended.code) == ("failed", "so\n", 3)


def test_output_of_a_command_that_is_interrupted(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = run(
        """
        import time
        try:
            print("begun", flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            print("kept", flush=True)
        """,
        tmp_path / "log",
        seconds=4.0,
    )
    assert (ended.status, ended.output) == ("cut", "begun\nkept\n")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("parent", ["ends", "waits", "is deaf"])
def test_children_are_terminated(tmp_path: Path, parent: str) -> None:
    """Children that keep the pipe open and ignore interrupts."""
    ended = run(
        f"""
        import signal, subprocess, sys, time
        deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", deaf])
        print(child.pid, flush=True)
        time.sleep(1)
        if {parent!r} == "is deaf":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if {parent!r} != "ends":
            time.sleep(60)
        """,
        tmp_path / "log",
        seconds=60.0 if parent == "ends" else 2.0,
    )
    assert ended.status == ("passed" if parent == "ends" else "cut")
    assert gone(int(ended.output.split()[0]))


def test_termination_interrupts_the_part(tmp_path: Path) -> None:
    threading.Timer(0.5, gpu.STOP.set).start()
    assert run("import time; time.sleep(60)", tmp_path / "log").status == "cut"


# ---- time


def test_parts_share_the_time() -> None:
    ends = gpu.deadlines(list(gpu.PARTS), 100.0, 530.0)
    assert list(ends) == list(gpu.SHARES) and ends["cpu"] == pytest.approx(630)
    assert ends["tests"] - ends["build"] == pytest.approx(530 * gpu.SHARES["tests"] / sum(gpu.SHARES.values()))
    assert gpu.deadlines(["bench"], 0.0, 60.0) == {"bench": 60.0}


def test_selections() -> None:
    assert gpu.selections(["bench=lstm and not packed", "tests=a=b"]) == {
        "bench": "lstm and not packed",
        "tests": "a=b",
    }
    for wrong in (["bench"], ["bank=lstm"], ["bench="]):
        with pytest.raises(SystemExit, match="--select takes part=expression"):
            gpu.selections(wrong)


# ---- all parts


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, site: Path) -> dict[str, Any]:
    """Parts that pass immediately, for a simulated GPU."""
    found: dict[str, Any] = {name: lambda part: {"status": "passed"} for name in gpu.PARTS}
    monkeypatch.setattr(gpu, "PARTS", found)
    monkeypatch.setattr(gpu, "stage", lambda: None)
    monkeypatch.setattr(gpu, "machine", lambda: {"device": "NVIDIA H0", "date": "2026-01-01"})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return found


def checks_in(folder: Path) -> dict[str, str]:
    checks = json.loads((folder / "nvidia-h0-2026-01-01-checks.json").read_text())
    return {name: part["status"] for name, part in checks["parts"].items()}


def test_status_of_each_part(fakes: dict[str, Any], tmp_path: Path) -> None:
    given = []

    def bench(part: Any) -> dict[str, Any]:
        given.append((part.select, checks_in(tmp_path)))
        return {"status": "cut"}

    fakes["bench"] = bench
    assert gpu.main(["--out", str(tmp_path), "--only", "bench,tests", "--select", "bench=packed"]) == 1
    assert given == [("packed", {"tests": "passed"})]
    assert gpu.main(["--out", str(tmp_path), "--only", "tune"]) == 0
    assert checks_in(tmp_path) == {"tests": "passed", "bench": "cut", "tune": "passed"}


def test_no_parts_run_after_a_failed_build_or_a_termination(fakes: dict[str, Any], tmp_path: Path) -> None:
    def stopped(part: Any) -> dict[str, Any]:
        gpu.STOP.set()
        return {"status": "cut"}

    fakes["tests"] = stopped
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert checks_in(tmp_path) == {"build": "passed", "tests": "cut"}
    gpu.STOP.clear()
    fakes["build"] = lambda part: {"status": "failed"}
    assert gpu.main(["--out", str(tmp_path / "again")]) == 1
    assert checks_in(tmp_path / "again") == {"build": "failed"}


def test_resume_runs_what_is_not_complete(
    fakes: dict[str, Any], tmp_path: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, Any]] = []

    def made(name: str, status: str) -> Any:
        def run_part(part: Any) -> dict[str, Any]:
            ran.append((name, part.earlier and part.earlier.get("file")))
            return {"status": status, "file": f"{name}.json"}

        return run_part

    statuses = dict.fromkeys(fakes, "passed") | {"tests": "failed", "bench": "cut"}
    fakes.update({name: made(name, status) for name, status in statuses.items()})
    arguments = ["--out", str(tmp_path), "--resume"]
    gpu.main(arguments)
    assert [name for name, _ in ran] == list(statuses)
    for select, again in ((None, ["tests", "bench"]), ("cpu=LSTM", ["tests", "bench", "cpu"])):
        ran.clear()
        gpu.main([*arguments, *(["--select", select] if select else [])])
        assert ran == [(name, None if name == "cpu" else f"{name}.json") for name in again]
    ran.clear()
    gpu.main(["--out", str(tmp_path)])
    assert ran == [(name, None) for name in statuses]
    ran.clear()
    monkeypatch.setattr(gpu, "sources", lambda: "other")
    gpu.main(arguments)
    assert ran == [(name, None) for name in statuses]
    shutil.rmtree(site)
    ran.clear()
    gpu.main([*arguments, "--only", "build,cpu"])
    assert [name for name, _ in ran] == ["build"]


# ---- tests as a part


def part(site: Path, seconds: float, select: str = "", name: str = "tests") -> Any:
    return gpu.Part(name, time.monotonic() + seconds, select, site, site, "a-gpu-2026-01-01")


def write_tests(site: Path, source: str) -> None:
    text = "import os, sys, time\nimport pytest\npytestmark = pytest.mark.cuda\n" + textwrap.dedent(source)
    (site / "tests" / "test_it.py").write_text(text)
    (site / "bench").mkdir(exist_ok=True)
    shutil.copy2(BENCH / "tally.py", site / "bench")


COUNTS = ("tests", "passed", "failed", "skipped", "unfinished")


def counts(found: dict[str, Any]) -> tuple[int, ...]:
    return tuple(found[key] for key in COUNTS)


def test_counts_of_tests(site: Path) -> None:
    write_tests(
        site,
        """
        def test_good(): pass
        def test_bad(): assert "this" == "that"
        def test_none(): pytest.skip("for a reason")
        def test_other(): pass
        @pytest.fixture
        def broken(): raise ValueError("in setup")
        def test_setup(broken): pass
        @pytest.fixture
        def late():
            yield
            raise ValueError("in teardown")
        def test_teardown(late): pass
        """,
    )
    found = gpu.run_tests(part(site, ENOUGH, "not other"))
    assert found["status"] == "failed" and counts(found) == (5, 1, 3, 1, 0)
    assert "this" in found["failures"]["tests/test_it.py::test_bad"]
    assert gpu.run_tests(part(site, ENOUGH, "nothing_of_that_name"))["status"] == "nothing to run"
    assert gpu.run_tests(part(site, ENOUGH, "good or none"))["status"] == "passed"


def test_counts_of_interrupted_tests(site: Path) -> None:
    """For a test that handles interrupts, and one that ignores them, as in a kernel that does not end."""
    for deaf in ("", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"):
        write_tests(
            site, f"def test_good(): pass\ndef test_long():\n    {deaf}\n    time.sleep(60)\ndef test_last(): pass"
        )
        found = gpu.run_tests(part(site, 15))
        assert found["status"] == "cut" and found["passed"] == 1, found
        assert not deaf or found["unfinished tests"] == ["tests/test_it.py::test_long"]


def test_resumed_tests(site: Path) -> None:
    """Tests that passed do not run again; those that failed and those that were interrupted do."""
    source = """
        {}
        def test_good(): open("good", "a").write("x")
        def test_bad(): assert {}
        def test_long(): time.sleep({})
        """
    write_tests(site, source.format("", "False", 60))
    first = gpu.run_tests(part(site, 12))
    assert first["status"] == "cut" and first["passed"] == first["failed"] == 1
    write_tests(site, source.format("", "True", 0))
    again = dataclasses.replace(part(site, ENOUGH), earlier=first)
    assert counts(gpu.run_tests(again)) == (3, 3, 0, 0, 0)
    assert counts(gpu.run_tests(again)) == (3, 3, 0, 0, 0)
    assert (site / "good").read_text() == "x"


def test_tests_that_crash_their_process(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "TEST_S", 1.0)
    write_tests(
        site,
        """
        def test_first(): pass
        def test_hangs(): time.sleep(60)
        def test_crashes(): os._exit(139)
        def test_bad(): assert False
        def test_last(): pass
        """,
    )
    found = gpu.run_tests(part(site, ENOUGH))
    assert found["status"] == "failed" and counts(found) == (5, 2, 1, 0, 2)
    assert found["unfinished tests"] == [f"tests/test_it.py::{name}" for name in ("test_hangs", "test_crashes")]


def test_device_error_starts_a_new_process(site: Path) -> None:
    write_tests(
        site,
        """
        import tally
        lost = []
        tally.sticky_error = lambda: "".join(lost)
        def test_good(): pass
        def test_bad():
            lost.append("an illegal memory access")
            raise RuntimeError("CUDA error")
        def test_after(): assert not lost
        """,
    )
    found = gpu.run_tests(part(site, ENOUGH))
    assert found["status"] == "failed" and counts(found) == (3, 2, 1, 0, 0)
    assert "an illegal memory access" in (site / "tests.log").read_text()


def test_error_of_a_part_that_cannot_start(site: Path) -> None:
    write_tests(site, "import nothing_of_that_name")
    found = gpu.run_tests(part(site, ENOUGH))
    assert found["status"] == "failed" and "nothing_of_that_name" in found["output"]


def test_reports_of_a_sanitizer() -> None:
    text = """========= COMPUTE-SANITIZER
..F
========= Invalid __global__ read of size 4 bytes
=========     at kernel(float *)+0x90
========= ERROR SUMMARY: 1 error
"""
    assert gpu.sanitizer_reports(text) == {
        "summaries": ["ERROR SUMMARY: 1 error"],
        "reports": ["Invalid __global__ read of size 4 bytes", "at kernel(float *)+0x90"],
    }


@pytest.mark.parametrize(
    ("summary", "status"),
    [
        ("ERROR SUMMARY: 0 errors", "passed"),
        ("ERROR SUMMARY: 2 errors", "failed"),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", "failed"),
    ],
)
def test_sanitizer_errors_fail_the_part(site: Path, monkeypatch: pytest.MonkeyPatch, summary: str, status: str) -> None:
    """Although all tests pass. A script simulates compute-sanitizer and runs its arguments."""
    write_tests(site, "@pytest.mark.sanitize\ndef test_good(): pass\ndef test_other(): assert False")
    program = site / "compute-sanitizer"
    good = status == "passed"
    program.write_text(f'#!/bin/sh\nshift 3\n"$@"\necho "========= {summary}"\nexit {0 if good else 86}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{site}:{os.environ['PATH']}")
    found = gpu.sanitizer(part(site, ENOUGH, name="memcheck"))
    assert (found["status"], counts(found)) == (status, (1, 1, 0, 0, 0))
    assert found["sanitizer"]["summaries"] == [summary] * (1 if good else 2)


# ---- results


def test_rows_are_saved_individually(site: Path) -> None:
    """A row that crashes the process loses only its own result."""
    pytest.importorskip("pytest_benchmark")
    (site / "bench").mkdir()
    for name in ("conftest.py", "harness.py", "report.py", "tally.py"):
        shutil.copy2(BENCH / name, site / "bench")
    (site / "bench" / "bench_it.py").write_text(
        textwrap.dedent(
            """
            import os
            import pytest
            import torch
            import harness
            from harness import Contender, Roof

            harness.ROOFS["cuda"] = {"flop": lambda: Roof(1.0, "none")}
            harness.other_load = lambda: 0.0
            torch.cuda.get_device_name = lambda: "a GPU"

            @pytest.mark.parametrize("i", [pytest.param(i, marks=pytest.mark.cuda(turn=i)) for i in (3, 1, 2, 0)])
            def test_row(bench, i):
                if i == 2:
                    os._exit(139)
                contenders = [Contender(name, lambda: sum(range(9)), lambda: {}) for name in ("ours", "theirs")]
                bench.time("group", f"row {i}", contenders, bars={}, work=1.0, parity=[], goals={"goal": 1.0})
            """
        )
    )
    found = gpu.bench(part(site, ENOUGH, name="bench"))
    assert (found["status"], found["rows"], counts(found)) == ("failed", 3, (4, 3, 0, 0, 1)), found
    saved = report.from_json((site / found["file"]).read_text(encoding="utf-8"))
    assert [row.label for row in saved.rows] == ["row 0", "row 1", "row 3"]
    assert all(row.entries[2].verdict == "PASS" for row in saved.rows)
    path = site / "bench" / "bench_it.py"
    path.write_text(path.read_text().replace("os._exit(139)", "pass"))
    again = gpu.bench(dataclasses.replace(part(site, ENOUGH, name="bench"), earlier=found))
    assert (again["status"], again["rows"], again["file"]) == ("passed", 4, found["file"])
    saved = report.from_json((site / found["file"]).read_text(encoding="utf-8"))
    assert [row.label for row in saved.rows] == ["row 0", "row 1", "row 3", "row 2"]


def test_files_are_written_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.unused(tmp_path / "results", "a-gpu-2026-01-01")
    report.write(path, "first")
    assert report.unused(path.parent, "a-gpu-2026-01-01").name == "a-gpu-2026-01-01-2.json"
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(OSError, match="cut"):
        report.write(path, "second")
    assert path.read_text() == "first"


def test_summary_names_failures() -> None:
    checks = {
        "tests": dict(status="failed", seconds=3.0, tests=3, passed=1, failed=1, skipped=0, unfinished=1)
        | {"failures": {"tests/a.py::b": "why"}, "unfinished tests": ["tests/a.py::c"]},
        "memcheck": dict(
            status="passed", seconds=2.0, sanitizer=dict(summaries=["ERROR SUMMARY: 0 errors"], reports=[])
        ),
    }
    assert gpu.summary(checks).splitlines() == [
        "tests      failed              3.0 s  3 tests, 1 passed, 1 failed, 0 skipped, 1 unfinished",
        "             tests/a.py::b",
        "             tests/a.py::c",
        "memcheck   passed              2.0 s  ERROR SUMMARY: 0 errors",
    ]


# ---- tuning


class Planned:
    """A simulated device. Clusters support H up to 768, except for backward of 768; grids do not support B=1."""

    def __init__(self, **speed: float) -> None:
        self.speed = {"cluster": 10.0, "grid": 20.0, "steps": 40.0} | speed
        self.timed: list[tuple[str, str, tuple[str, ...]]] = []

    def plan(self, layer: Any, tiers: Any) -> dict[str, dict[str, Any]]:
        def of(each: str) -> dict[str, Any]:
            takes = {
                "cluster": layer.H < 768 or (layer.H == 768 and each == "forward"),
                "grid": layer.B > 1,
                "steps": True,
            }
            able = [tier for tier in tune.TIERS if tier in tiers and takes[tier]]
            reasons = [f"{tier}: too large" if tier in tiers else f"{tier}: switched off" for tier in tune.TIERS]
            return {"tier": able[0] if able else "none", "reasons": reasons if not able else []}

        return {each: of(each) for each in ("forward", "backward")}

    def seconds(self, layer: Any, what: str, tiers: Any) -> float:
        self.timed.append((str(layer), what, tuple(tiers)))
        return 1e-6 * sum(self.speed[tier] for tier in tiers)


def test_layers_to_tune() -> None:
    every = tune.layers()
    assert {layer.kind for layer in every} == {"LSTM", "GRU"} and len(set(every)) == len(every) == 64
    assert {layer.H for layer in every} == {128, 256, 384, 512, 640, 768, 1024, 1536}
    assert {layer.B for layer in every} == {1, 16, 64, 256}
    assert [str(layer) for layer in tune.layers("GRU H=128 B=1")] == ["GRU B=1 H=128 T=64"]


def test_supported_tiers_are_timed() -> None:
    forward, step = tune.measured(tune.Layer("LSTM", 16, 512), Planned())
    assert forward.seconds == pytest.approx({"cluster": 10e-6, "grid": 20e-6, "steps": 40e-6})
    assert (step.planned, step.best, step.loss) == ("cluster", "cluster", 0.0)
    (forward, _) = tune.measured(tune.Layer("LSTM", 1, 1024), Planned())
    assert list(forward.seconds) == ["steps"]
    assert forward.reasons == {"cluster": ["cluster: too large"], "grid": ["grid: too large"]}


def test_plan_with_two_tiers_is_timed() -> None:
    device = Planned()
    forward, step = tune.measured(tune.Layer("GRU", 16, 768), device)
    assert (forward.planned, step.planned) == ("cluster", "cluster+grid")
    assert device.timed[-1] == ("GRU B=16 H=768 T=64", "step", tune.TIERS)
    assert step.planned_seconds == pytest.approx(70e-6) and step.loss == pytest.approx(2.5)


def test_table_marks_losses_of_the_planner() -> None:
    timings = tune.measured(tune.Layer("LSTM", 16, 512), Planned(grid=8.0))[:1]
    timings += tune.measured(tune.Layer("LSTM", 16, 512), Planned(grid=9.6))[1:]
    timings += tune.measured(tune.Layer("LSTM", 1, 768), Planned())[:1]
    assert tune.table(timings).splitlines() == [
        "layer                 pass     cluster   grid  steps  planner",
        "LSTM B=16 H=512 T=64  forward    10 µs   8 µs  40 µs  cluster  <- 25 % more than grid",
        "LSTM B=16 H=512 T=64  step       10 µs  10 µs  40 µs  cluster",
        "LSTM B=1 H=768 T=64   forward    10 µs      -  40 µs  cluster",
        "",
        "1 of 3 choices lose more than 5 %",
    ]
    assert timings[0].as_json()["best"] == "grid"


def test_tuning_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device, file = Planned(), tmp_path / "tuning.json"
    monkeypatch.setattr(tune, "Cuda", lambda name: device)
    monkeypatch.setattr(tune.seqkernels, "build_info", lambda: {"cuda": True})
    monkeypatch.setattr(tune.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune.torch.cuda, "get_device_name", lambda _: "NVIDIA H0")
    device.device = "cuda"
    arguments = ["--save", str(file), "--resume", "-k"]
    tune.main([*arguments, "GRU H=128"])
    timed = len(device.timed)
    before = json.loads(file.read_text())["rows"]
    tune.main([*arguments, "GRU H=128"])
    assert len(device.timed) == timed and json.loads(file.read_text())["rows"] == before
    tune.main([*arguments, "H=128"])
    rows = json.loads(file.read_text())["rows"]
    assert rows[: len(before)] == before and len(rows) == 2 * len(before)


def test_layer_runs_with_the_selected_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with a simulated clock."""
    tiers, asked = [["cluster", "grid", "steps"]], []

    def set_tiers(names: list[str]) -> list[str]:
        tiers.append(names)
        return tiers[-2]

    def sample(contender: Any, number: int, warm: bool) -> float:
        contender.step()
        asked.append((contender.name, tiers[-1]))
        return 1e-3

    monkeypatch.setattr(tune.seqkernels._C, "set_cuda_tiers", set_tiers, raising=False)
    monkeypatch.setattr(tune.harness, "sample_on_cuda", sample)
    device = tune.Cuda("cpu")
    for what in ("step", "forward"):
        assert device.seconds(tune.Layer("GRU", 2, 8, 3), what, ["grid"]) == 1e-3
    assert {name for name, _ in asked} == {"step", "forward"} and all(names == ["grid"] for _, names in asked)
    assert tiers[-1] == tiers[0]
