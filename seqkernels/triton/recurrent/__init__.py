"""Recurrent layers in Triton.

arithmetic.py, cells.py: activations and cells.
layer.py, layer_forward.py, layer_backward.py: kernels that run all steps of a layer in one launch, where W_hh fits into
shared memory and the cell has no options.
step.py, step_forward.py, step_backward.py: kernels that run one step, used otherwise.
launch.py: which kernels run, the products and the weight gradients. ops.py: the same in the form of the ops.
"""

from __future__ import annotations

from seqkernels.triton.recurrent.launch import GATES, SUPPORTED, Config, config
from seqkernels.triton.recurrent.ops import KINDS, layer, unsupported

__all__ = ["GATES", "KINDS", "SUPPORTED", "Config", "config", "layer", "unsupported"]
