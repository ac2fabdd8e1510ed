"""Operators as modules: those that take the place of torch.nn's, and others."""

from seqkernels.nn.recurrent import GRU, LSTM, MGU, RNN, NestedLSTM
from seqkernels.nn.recurrent_cells import GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "MGU", "RNN", "GRUCell", "LSTMCell", "NestedLSTM", "RNNCell"]
