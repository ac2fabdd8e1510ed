"""Fixtures for all tests: fill new memory with NaN, fix the seed, restore the thread count and the instruction set."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util

import pytest
import torch

import seqkernels
from support import fuzzing, selection

ISAS = tuple(seqkernels.build_info()["isas"])


def pytest_configure(config: pytest.Config) -> None:
    """Imports Triton with TRITON_INTERPRET set, for support.triton_on_cpu.

    Triton chooses between interpreted and compiled functions when it is first imported.
    """
    fuzzing.configure(config)
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("triton.experimental.gluon")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--memory",
        choices=("nan", "raw"),
        default="nan",
        help="contents of new memory: NaN (default), or uninitialized",
    )
    parser.addoption(
        "--cases",
        choices=("all", "quick"),
        default="all",
        help="of tests with parameters: all combinations (default), or each value of each parameter at least once",
    )
    fuzzing.add_options(parser)


def pytest_report_header() -> str | None:
    return fuzzing.header()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """With --fuzz-seconds, repeats a fuzz test until its share of the time has passed."""
    if not fuzzing.Plan.seconds:
        return None
    fuzzing.run_rounds(pyfuncitem, len(pyfuncitem.session.items))
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = set(items)
    if fuzzing.Plan.seconds:
        kept = {item for item in kept if fuzzing.is_fuzz(item)}
    if not (torch.cuda.is_available() and seqkernels.build_info()["cuda"]):
        kept = {item for item in kept if not item.get_closest_marker("cuda")}
    if config.getoption("--cases") == "quick":
        kept = selection.quick(item for item in items if item in kept)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def fill_memory(nan: bool) -> None:
    """Fills new tensors with NaN, including allocations by C++ through torch. It exposes unwritten memory."""
    torch.use_deterministic_algorithms(nan)
    torch.utils.deterministic.fill_uninitialized_memory = nan


@pytest.fixture(autouse=True)
def nan_memory(request: pytest.FixtureRequest):
    fill_memory(request.config.getoption("--memory") == "nan")
    yield
    fill_memory(False)


@pytest.fixture
def raw_memory(nan_memory):
    fill_memory(False)


@pytest.fixture(autouse=True)
def watchdog():
    """Ends the run with a traceback if a test takes 10 minutes, as in a deadlock."""
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """Runs the test with all threads, even in the first calls and beside other processes; restores their number."""
    n = torch.get_num_threads()
    seqkernels._C.set_always_parallel(True)
    yield
    seqkernels._C.set_always_parallel(False)
    torch.set_num_threads(n)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Runs the test with each instruction set that is built and supported by the processor."""
    previous = seqkernels._C.set_isa(request.param)
    yield request.param
    seqkernels._C.set_isa(previous)
