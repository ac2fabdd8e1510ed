"""Linear-chain conditional random fields in Triton: log Z, its gradients, and the best paths.

chain.py: arguments of the kernels, and products with the transitions. forward.py, backward.py, viterbi.py: kernels.
launch.py: launchers. ops.py: implementations of the ops.
"""

from __future__ import annotations

from .launch import Config, config, pairs_config

__all__ = ["Config", "config", "pairs_config"]
