"""EmbeddingBag in Triton, forward and backward.

bags.py: arguments of the kernels. forward.py, backward.py: kernels. launch.py: launchers, and the sort of positions by
row for backward. ops.py: implementations of the ops.
"""

from __future__ import annotations

from .bags import MAX, MEAN, MIN, NO_FAULT, SUM
from .launch import Config, config, configs, unsupported
from .launch import forward as embedding_bag

__all__ = ["MAX", "MEAN", "MIN", "NO_FAULT", "SUM", "Config", "config", "configs", "embedding_bag", "unsupported"]
