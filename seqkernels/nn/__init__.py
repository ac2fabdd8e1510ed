"""Operators as modules that take the place of torch.nn's."""

from seqkernels.nn.recurrent import GRU, LSTM, RNN

__all__ = ["GRU", "LSTM", "RNN"]
