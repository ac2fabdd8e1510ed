"""The definition of every operator, in plain torch: slow, readable, differentiable to any order."""

from seqkernels.reference.recurrent import lstm, lstm_layer

__all__ = ["lstm", "lstm_layer"]
