"""Modules: drop-in replacements for torch.nn, and others."""

from .additive_attention import AdditiveAttention, LuongAttention
from .attention import MultiheadAttention
from .crf import CRF
from .ctc import CTCLoss
from .embedding_bag import (
    Embedding,
    EmbeddingBag,
    EmbeddingBagCollection,
    EmbeddingBagConfig,
    QuantizedEmbeddingBag,
)
from .embedding_bag_sharded import RowShardedEmbeddingBag
from .fused_optimizer import FusedAdagrad, FusedAdam, FusedRowwiseAdagrad, FusedSGD
from .key_value_cache import KeyValueCache
from .recurrent import GRU, LSTM, MGU, RNN, SLSTM, DreamerGRU, NestedLSTM
from .recurrent_cells import DreamerGRUCell, GRUCell, LSTMCell, RNNCell
from .transformer import PositionalEncoding, TransformerDecoderLayer, TransformerEncoderLayer

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
