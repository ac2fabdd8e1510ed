"""Operators as functions."""

from . import _flops  # noqa: F401  (registers the formulas of FlopCounterMode)
from .additive_attention import AdditiveKeys, additive_attention
from .attention import scaled_dot_product_attention, varlen_attention
from .crf import (
    crf_entropy,
    crf_log_likelihood,
    crf_log_partition,
    crf_marginals,
    crf_viterbi,
)
from .ctc import ctc_loss
from .embedding_bag import (
    embedding,
    embedding_bag,
    embedding_bag_bytes,
    embedding_bags,
    quantize_rows,
)
from .recurrent import dreamer_gru, gru, lstm, mgu, nested_lstm, rnn_relu, rnn_tanh, slstm
from .recurrent_cells import gru_cell, lstm_cell, rnn_relu_cell, rnn_tanh_cell

__all__ = [
    "AdditiveKeys",
    "additive_attention",
    "crf_entropy",
    "crf_log_likelihood",
    "crf_log_partition",
    "crf_marginals",
    "crf_viterbi",
    "ctc_loss",
    "dreamer_gru",
    "embedding",
    "embedding_bag",
    "embedding_bag_bytes",
    "embedding_bags",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "mgu",
    "nested_lstm",
    "quantize_rows",
    "rnn_relu",
    "rnn_relu_cell",
    "rnn_tanh",
    "rnn_tanh_cell",
    "scaled_dot_product_attention",
    "slstm",
    "varlen_attention",
]
