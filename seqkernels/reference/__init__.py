"""The definition of every operator, in plain torch: slow, readable, differentiable to any order."""

from seqkernels.reference.recurrent import gru, lstm, mgu, nested_lstm, rnn_relu, rnn_tanh

__all__ = ["gru", "lstm", "mgu", "nested_lstm", "rnn_relu", "rnn_tanh"]
