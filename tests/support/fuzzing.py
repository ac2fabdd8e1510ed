"""Random arguments for the fuzz tests, and how long these run.

By default, each test runs a few examples, the same in each run. With --fuzz-seconds=N, all tests together run for N
seconds with random examples, in rounds that are seeded by --fuzz-seed, the number of the round and nothing else. Before
each call of an op or function, its name and arguments are written to --fuzz-log, so that a crash of the process leaves
the call that caused it.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from support.cases import DTYPES


class Plan:
    """The options of the command line."""

    seconds = 0.0
    seed = 0
    log: int | None = None  # file descriptor


def add_options(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-seconds", type=float, default=0.0, help="run the fuzz tests, and no others, for this time")
    parser.addoption("--fuzz-seed", type=int, default=None, help="of --fuzz-seconds; random if absent")
    parser.addoption("--fuzz-log", default="fuzz.log", help="file for the last call, with --fuzz-seconds")


def configure(config: pytest.Config) -> None:
    Plan.seconds = config.getoption("--fuzz-seconds")
    if Plan.seconds:
        seed = config.getoption("--fuzz-seed")
        Plan.seed = random.SystemRandom().randrange(2**32) if seed is None else seed
        Plan.log = os.open(config.getoption("--fuzz-log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)


def header() -> str | None:
    return f"fuzz: {Plan.seconds:g} s, --fuzz-seed={Plan.seed}" if Plan.seconds else None


def is_fuzz(item: pytest.Item) -> bool:
    return getattr(getattr(item, "obj", None), "is_hypothesis_test", False)


def run_rounds(item: pytest.Function, items: int) -> None:
    """The share of a test in --fuzz-seconds: rounds of its examples, each with a seed of its own."""
    deadline, number = time.monotonic() + Plan.seconds / items, 0
    given = {name: item.funcargs[name] for name in item._fixtureinfo.argnames}
    while time.monotonic() < deadline:
        seed = Plan.seed + number
        log(f"{item.nodeid}, round {number}, seed {seed}")
        hypothesis.seed(seed)(item.obj)(**given)
        number += 1


def log(text: str) -> None:
    """Replaces the contents of the log."""
    if Plan.log is not None:
        content = text.encode()
        os.pwrite(Plan.log, content, 0)
        os.ftruncate(Plan.log, len(content))


class bounded:
    """Settings of a fuzz test, with this number of examples; @bounded or @bounded(examples=20)."""

    def __new__(cls, test: Callable | None = None, *, examples: int = 100) -> Any:
        # A round of --fuzz-seconds is short, and reports its first failure as it is: shrinking has no limit of time.
        of_all = settings(
            max_examples=min(examples, 25) if Plan.seconds else examples,
            phases=[Phase.explicit, Phase.generate] if Plan.seconds else list(Phase),
            derandomize=not Plan.seconds,
            deadline=None,
            database=None,
            suppress_health_check=[
                HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large,
            ],
        )  # fmt: skip
        return of_all if test is None else of_all(test)


# ---- values

NUMBERS = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**62, 2**63 - 1, -(2**63)]))
# Sizes that no machine has memory for. AddressSanitizer ends the process where `new` throws std::bad_alloc: with it,
# only sizes that fail earlier.
HUGE = [2**61] if "asan" in os.environ.get("LD_PRELOAD", "") else [2**45, 2**61]
# Numbers of rows or columns: none that a machine could allocate and that takes long.
COUNTS = st.one_of(st.integers(-3, 12), st.sampled_from([HUGE[0], 2**62, 2**63 - 1, -(2**63)]))
FLOATS = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-30, 1e30, -1e300, float("inf"), -float("inf"), float("nan")])
SHAPES = st.lists(st.integers(0, 9), max_size=4).map(tuple)
ALL_DTYPES = st.sampled_from(
    [*DTYPES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
)


@st.composite
def odd_tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SHAPES), draw(ALL_DTYPES)
    kind = draw(st.sampled_from(["plain", "plain", "expanded", "meta", "sparse", "negated", "inference", "parameter"]))
    t = torch.ones(shape).to(dtype)
    if kind == "expanded":
        t = torch.ones(()).to(dtype).expand(shape)
    elif kind == "meta":
        t = t.to("meta")
    elif kind == "sparse" and dtype == torch.float32:
        t = t.to_sparse()
    elif kind == "negated" and dtype == torch.float32:
        t = torch._neg_view(t)
    elif kind == "inference":
        with torch.inference_mode():
            t = torch.ones(shape).to(dtype)
    elif kind == "parameter" and dtype == torch.float32:
        t = torch.nn.Parameter(t)
    return t


integers = st.lists(NUMBERS, max_size=6).map(lambda n: torch.tensor(n, dtype=torch.int64))
nonsense = st.one_of(
    st.none(), odd_tensors(), integers, NUMBERS, st.text(max_size=3), st.lists(odd_tensors(), max_size=3)
)


def restrided(t: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "reversed dimensions":
        return t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim())))
    if kind == "every second":
        whole = t.new_full([2 * n for n in t.shape], float("nan"))
        view = whole[tuple(slice(0, None, 2) for _ in t.shape)]
        return view.copy_(t)
    if kind == "offset":
        return torch.cat([t.new_full((3,), float("nan")), t.flatten()])[3:].view(t.shape)
    return t


strides = st.sampled_from(["contiguous", "reversed dimensions", "every second", "offset"])


@st.composite
def changed_tensors(draw: st.DrawFn, t: Tensor) -> Any:
    """Something close to a valid tensor: other values, sizes, strides, dtype or device, or none of these."""
    if t.layout != torch.strided or t.is_meta or t.numel() > 10**6 or t.dtype == torch.float8_e4m3fn:
        return draw(nonsense)  # it was changed before
    kind = draw(st.sampled_from(["values", "values", "values", "size", "rank", "strides", "dtype", "huge", "other"]))
    if kind == "values" and t.numel():
        t = t.detach().clone()
        flat = t.reshape(-1)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.integers(0, t.numel() - 1))
            if t.dtype == torch.bool:
                flat[at] = not flat[at]
            elif t.is_floating_point():
                flat[at] = torch.tensor(draw(FLOATS), dtype=torch.float64).to(t.dtype)
            elif not t.is_complex():
                limits = torch.iinfo(t.dtype)
                n = draw(st.one_of(NUMBERS, st.sampled_from([limits.min, limits.max])))
                flat[at] = max(limits.min, min(n, limits.max))
        return flat.view(t.shape)
    if kind == "size" and t.dim():
        dim = draw(st.integers(0, t.dim() - 1))
        new = draw(st.integers(0, t.shape[dim] + 2))
        size = list(t.shape)
        size[dim] = new - min(new, size[dim])
        return torch.cat([t.narrow(dim, 0, min(new, t.shape[dim])), torch.ones(size).to(t.dtype)], dim)
    if kind == "rank":
        other = t.transpose(0, -1) if t.dim() else t
        return draw(st.sampled_from([t.unsqueeze(0), t.unsqueeze(-1), t.flatten(), t.new_zeros(()), other]))
    if kind == "strides" and t.dim() and t.is_floating_point():
        return restrided(t, draw(strides))
    if kind == "dtype":
        return (t.real if t.is_complex() else t).to(draw(ALL_DTYPES))
    if kind == "huge":  # of one element in memory
        dim = draw(st.integers(0, max(t.dim() - 1, 0)))
        size = [1] * t.dim()
        size[dim : dim + 1] = [draw(st.sampled_from(HUGE))]
        return torch.zeros([1] * max(t.dim(), 1)).to(t.dtype).expand(size)
    return draw(nonsense)


def changed(value: Any) -> st.SearchStrategy:
    """Values in place of a valid argument."""
    if isinstance(value, Tensor):
        return changed_tensors(value)
    if isinstance(value, bool):
        return st.one_of(st.just(not value), nonsense)
    if isinstance(value, int):
        return st.one_of(COUNTS, COUNTS, st.none(), odd_tensors(), st.text(max_size=2))
    if isinstance(value, float):
        return st.one_of(FLOATS, nonsense)
    if isinstance(value, (list, tuple)) and value:
        return changed_lists(value)
    if value is None:
        return st.one_of(odd_tensors(), integers, nonsense)
    return nonsense


@st.composite
def changed_lists(draw: st.DrawFn, values: Any) -> Any:
    items, kind = list(values), draw(st.sampled_from(["item", "item", "item", "shorter", "longer", "empty", "other"]))
    at = draw(st.integers(0, len(items) - 1))
    if kind == "item":
        items[at] = draw(changed(items[at]))
    elif kind == "shorter":
        del items[at]
    elif kind == "longer":
        items.insert(at, items[at])
    elif kind == "empty":
        items = []
    else:
        return draw(nonsense)
    return type(values)(items) if type(values) in (list, tuple) else items


EXCEPTIONS = (ValueError, TypeError, RuntimeError, NotImplementedError)


def tried(call: Callable, allowed: tuple[type[Exception], ...], *arguments: Any, **keywords: Any) -> Any:
    """Calls a function, which must return or raise one of the allowed exceptions with a message."""
    if Plan.log is not None:
        log(f"{call}\n{arguments!r}\n{keywords!r}")
    try:
        return call(*arguments, **keywords)
    except allowed as error:
        assert str(error)
    return None
