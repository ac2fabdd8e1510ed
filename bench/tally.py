"""A pytest plugin of gpu.py: what became of each test, written as it happens; and no test that ends the whole run.

A kernel that waits for ever, or that leaves the device unusable for its process, ends the process alone: with
pytest-xdist that is a worker, for which another one starts; without it gpu.py starts pytest again, for the tests that
are left. In the environment: SEQKERNELS_TALLY, the file to write; SEQKERNELS_TALLY_BEFORE, one whose tests are left
out; SEQKERNELS_TALLY_SECONDS, that a test may take, or a tenth of what one marked `slow` may.
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
AGAIN = 87  # exit status of a process that gave up with tests left


@dataclass
class Tally:
    """By the name of a test: its outcome, "" where its process ended in it or it was cut; why it failed."""

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
        except json.JSONDecodeError:  # the process ended while it wrote
            continue
        test = entry["test"]
        if tally.outcomes.get(test) != "failed":  # what setup or teardown spoiled
            tally.outcomes[test] = entry["outcome"]
        if entry["message"]:
            tally.messages.setdefault(test, entry["message"])  # the first: a process that ends says no more of it
    return tally


def _write(test: str, outcome: str, message: str = "") -> None:
    with open(os.environ["SEQKERNELS_TALLY"], "a", encoding="utf-8") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "message": message}) + "\n")


def _in_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


def _end(why: str) -> None:
    os.write(2, f"\n{why}: this process ends, the run goes on\n".encode())
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
    """Looks at it after a test that failed: an error that stays would fail all others."""

    failed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        report = yield
        self.failed |= report.failed
        return report

    @pytest.hookimpl(trylast=True)  # once the reports are out
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
