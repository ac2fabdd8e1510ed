"""Modules: drop-in replacements for torch.nn, and others."""

from seqkernels.nn.additive_attention import AdditiveAttention, LuongAttention
from seqkernels.nn.attention import MultiheadAttention
from seqkernels.nn.crf import CRF
from seqkernels.nn.ctc import CTCLoss
from seqkernels.nn.embedding_bag import (
    Embedding,
    EmbeddingBag,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    QuantizedEmbeddingBag,
)
from seqkernels.nn.embedding_bag_sharded import RowShardedEmbeddingBag
from seqkernels.nn.fused_optimizer import FusedAdagrad, FusedAdam, FusedRowwiseAdagrad, FusedSGD
from seqkernels.nn.key_value_cache import KeyValueCache
from seqkernels.nn.recurrent import GRU, LSTM, MGU, RNN, SLSTM, DreamerGRU, NestedLSTM
from seqkernels.nn.recurrent_cells import DreamerGRUCell, GRUCell, LSTMCell, RNNCell
from seqkernels.nn.transformer import PositionalEncoding, TransformerDecoderLayer, TransformerEncoderLayer

__all__ = [
    "CRF",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "AdditiveAttention",
    "CTCLoss",
    "DreamerGRU",
    "DreamerGRUCell",
    "Embedding",
    "EmbeddingBag",
    "EmbeddingBagCollection",
    "EmbeddingBagConfig",
    "FusedAdagrad",
    "FusedAdam",
    "FusedRowwiseAdagrad",
    "FusedSGD",
    "GRUCell",
    "KeyValueCache",
    "LSTMCell",
    "LuongAttention",
    "MultiheadAttention",
    "NestedLSTM",
    "PositionalEncoding",
    "QuantizedEmbeddingBag",
    "RNNCell",
    "RowShardedEmbeddingBag",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
]
