"""Operators as functions."""

from seqkernels.functional.recurrent import gru, lstm, rnn_relu, rnn_tanh

__all__ = ["gru", "lstm", "rnn_relu", "rnn_tanh"]
