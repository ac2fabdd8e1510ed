"""pytest plugin of gpu.py: writes the outcome of each test immediately, and ends only the process of a test that hangs.

A kernel that hangs, or that leaves the device unusable for its process, ends its process: with pytest-xdist a worker,
which is replaced; without it, gpu.py restarts pytest for the remaining tests. Environment variables: SEQKERNELS_TALLY,
the file to write; SEQKERNELS_TALLY_BEFORE, a file whose tests are skipped; SEQKERNELS_TALLY_SECONDS, the time limit of
a test, ten times that for tests marked `slow`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = ("passed", "failed", "skipped")
AGAIN = 87  # exit status of a process that ends before its last test


@dataclass
class Tally:
    """Outcomes and failure messages by test; the outcome is "" if the process ended during the test."""

    outcomes: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        found = list(self.outcomes.values())
        return {"tests": len(found)} | {name: found.count(name) for name in OUTCOMES} | {"unfinished": found.count("")}

    def unfinished(self) -> list[str]:
        return [test for test, outcome in self.outcomes.items() if not outcome]


def read(path: Path) -> Tally:
    tally = Tally()
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # the process ended during the write
            continue
        test = entry["test"]
        if tally.outcomes.get(test) != "failed":  # setup or teardown may have failed
            tally.outcomes[test] = entry["outcome"]
        if entry["message"]:
            tally.messages.setdefault(test, entry["message"])  # keeps the first message
    return tally


def _write(test: str, outcome: str, message: str = "") -> None:
    with open(os.environ["SEQKERNELS_TALLY"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "message": message}) + "\n")


def _in_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def _end(why: str) -> None:
    os.write(2, f"\n{why}: this process ends, the run continues\n".encode())
    os._exit(AGAIN)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known = read(Path(os.environ["SEQKERNELS_TALLY_BEFORE"])).outcomes
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    if not _in_worker():
        _write(nodeid, "")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if not _in_worker() and (report.when == "call" or not report.passed):
        _write(report.nodeid, report.outcome, report.longreprtext[-2000:] if report.failed else "")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    seconds = float(os.environ["SEQKERNELS_TALLY_SECONDS"]) * (10 if item.get_closest_marker("slow") else 1)

    def give_up() -> None:
        faulthandler.dump_traceback(all_threads=True)
        _end(f"{item.nodeid} took more than {seconds:.0f} seconds")

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        return (yield)
    finally:
        timer.cancel()


class Device:
    """Checks the device after a failed test, because a sticky error would fail all following tests."""

    failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        self.failed |= report.failed
        return report

    @pytest.hookimpl(trylast=True)  # after the reports are written
    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        failed, self.failed = self.failed, False
        if failed and (error := sticky_error()):
            _end(f"{nodeid} left the device unusable ({error})")


def sticky_error() -> str:
    import torch

    if not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Device(), "seqkernels-device")
