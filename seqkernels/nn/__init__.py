"""Operators as modules that take the place of torch.nn's."""

from seqkernels.nn.recurrent import LSTM

__all__ = ["LSTM"]
