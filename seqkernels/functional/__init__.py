"""Operators as functions."""

from seqkernels.functional.recurrent import gru, lstm, mgu, nested_lstm, rnn_relu, rnn_tanh

__all__ = ["gru", "lstm", "mgu", "nested_lstm", "rnn_relu", "rnn_tanh"]
