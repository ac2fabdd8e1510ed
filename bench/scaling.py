"""Each operator at its base sizes (bench/sweeps.py) with 1, 2, 4, 8 and 16 threads, up to the number of processors.

    python -m pytest bench/scaling.py --benchmark-only --budget 0.3 --save-results [-k "LSTM and training"]

The plan that divides work among threads was tuned with two; these rows show what more of them gain. `make gpu` runs
them as its part `cpu` on the processors of the machine with the GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from sweeps import OPERATORS, Point, measure

COUNTS = [count for count in (1, 2, 4, 8, 16) if count <= len(os.sched_getaffinity(0))]
# One operator of each kind first, since the time may end before the last row.
FIRST = ("LSTM", "EmbeddingBag, sum", "attention", "GRU, packed sequences", "CRF, log likelihood", "additive attention")
POINTS = [
    Point(OPERATORS[name], which, dict(OPERATORS[name].base), count)
    for name in sorted(OPERATORS, key=lambda name: FIRST.index(name) if name in FIRST else len(FIRST))
    for which in OPERATORS[name].passes
    for count in COUNTS
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_threads(bench: Any, point: Point) -> None:
    measure(bench, point, ", threads")
