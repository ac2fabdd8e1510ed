"""Reference definitions of the operators in plain torch: readable and differentiable to any order, but slow."""

from .additive_attention import additive_attention
from .attention import attention, attention_weights
from .embedding_bag import (
    adagrad_step,
    adam_step,
    embedding,
    embedding_bag,
    embedding_bag_winners,
    embedding_bags,
    renorm,
    rowwise_adagrad_step,
    sgd_step,
)
from .recurrent import dreamer_gru, gru, lstm, mgu, nested_lstm, rnn_relu, rnn_tanh, slstm

__all__ = [
    "adagrad_step",
    "adam_step",
    "additive_attention",
    "attention",
    "attention_weights",
    "dreamer_gru",
    "embedding",
    "embedding_bag",
    "embedding_bag_winners",
    "embedding_bags",
    "gru",
    "lstm",
    "mgu",
    "nested_lstm",
    "renorm",
    "rnn_relu",
    "rnn_tanh",
    "rowwise_adagrad_step",
    "sgd_step",
    "slstm",
]
