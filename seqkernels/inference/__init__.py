"""Inference on a CPU: recurrent layers and cells whose weights are packed once.

`prepare` replaces the recurrent modules of a model; `calibrate` collects static ranges for int8.
"""

from ._modules import PreparedCell, PreparedRecurrent
from ._prepare import Report, calibrate, prepare

__all__ = ["PreparedCell", "PreparedRecurrent", "Report", "calibrate", "prepare"]
