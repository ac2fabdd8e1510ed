"""The cases of `--cases=quick`: each value of each parameter of a test at least once.

A test over kinds, shapes, dtypes and instruction sets has thousands of combinations, which differ little in what
they can find. The quick selection is the same on every machine and in every run; `--cases=all` runs everything.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import pytest


def quick(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """The selected items: of each test as many cases as cover its parameters, or as its mark `sample` tells."""
    tests: dict[tuple[object, ...], list[pytest.Item]] = {}
    for item in items:
        tests.setdefault((item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name)), []).append(
            item
        )
    return {item for cases in tests.values() for item in selected(cases)}


def selected(cases: list[pytest.Item]) -> list[pytest.Item]:
    """The selected cases of one test."""
    mark = cases[0].get_closest_marker("sample")
    # In the order of a checksum, the combinations of values are mixed.
    mixed = sorted(cases, key=lambda case: zlib.crc32(case.name.encode()))
    if mark is not None:
        return mixed[: mark.args[0]]
    covered: set[tuple[str, int]] = set()
    kept = []
    for case in mixed:
        values = values_of(case)
        if not values or not values <= covered:
            covered |= values
            kept.append(case)
    return kept


def values_of(case: pytest.Item) -> set[tuple[str, int]]:
    """The values of the parameters by identity, since not all can be hashed; equal small ones are one object."""
    callspec = getattr(case, "callspec", None)
    return set() if callspec is None else {(name, id(value)) for name, value in callspec.params.items()}
