"""New memory holds NaN, every test starts from one seed, and leaves threads and instruction set as they were."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util

import pytest
import torch

import seqkernels

ISAS = tuple(seqkernels.build_info()["isas"])


def pytest_configure() -> None:
    """Imports Triton with TRITON_INTERPRET set, for support.triton_on_cpu.

    Triton chooses between interpreted and compiled functions when it is first imported.
    """
    if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            importlib.import_module("triton.experimental.gluon")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--memory",
        choices=("nan", "raw"),
        default="nan",
        help="what new memory holds: NaN (default), or whatever was there",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and seqkernels.build_info()["cuda"]:
        return
    needless = [item for item in items if item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=needless)
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]


def fill_memory(nan: bool) -> None:
    """With NaN, reading what was never written shows. It reaches what C++ allocates through torch as well."""
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
    """Threads that wait for each other for ever end the run, and say where."""
    faulthandler.dump_traceback_later(600, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def threads():
    """As many threads as torch chose, again after each test."""
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    """Each instruction set that was compiled and that this processor has, in turn."""
    previous = seqkernels._C.set_isa(request.param)
    yield request.param
    seqkernels._C.set_isa(previous)
