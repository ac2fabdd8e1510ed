"""Recurrent layers in Triton.

arithmetic.py, cells.py: activations and cells.
layer.py, layer_forward.py, layer_backward.py: kernels that run all steps of a layer in one launch, for cells without
options whose W_hh fits in shared memory.
step.py, step_forward.py, step_backward.py: kernels that run one step, for all other layers.
launch.py: selection of the kernels, matrix products and weight gradients. ops.py: implementations of the ops.
"""

from __future__ import annotations

from .launch import GATES, SUPPORTED, Config, config
from .ops import KINDS, layer, unsupported

__all__ = ["GATES", "KINDS", "SUPPORTED", "Config", "config", "layer", "unsupported"]
