"""Scaled-dot-product attention in Triton, forward and backward. Needs torch and Triton alone.

tiles.py: functions and groups of arguments that the kernels share. forward.py, backward.py, weights.py: the kernels.
configurations.py: block sizes. launch.py: the launchers, with the arguments and results of the ops.

A program computes a block of queries against all blocks of keys, or a block of keys against all blocks of queries. It
visits three ranges of blocks: a border on the left, blocks in which every query attends to every key, and a border on
the right. The window is applied in the borders alone, and blocks without visible keys are skipped. Backward computes
the scores twice, by queries for dq and by keys for dk and dv, so that it needs no atomics.

Heads with more columns than configurations.LARGEST are wide: a score is a sum over chunks of columns, which are read
again for every block, and a program computes one chunk of columns of its result.

Source: https://arxiv.org/abs/2205.14135, https://arxiv.org/abs/2307.08691
"""

from __future__ import annotations

from .configurations import Config, columns, config, is_wide, needed
from .launch import (
    DTYPES,
    attention_backward,
    attention_forward,
    attention_weights,
    attention_weights_backward,
    unsupported,
)

__all__ = [
    "DTYPES",
    "Config",
    "attention_backward",
    "attention_forward",
    "attention_weights",
    "attention_weights_backward",
    "columns",
    "config",
    "is_wide",
    "needed",
    "unsupported",
]
