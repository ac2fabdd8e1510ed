"""The table of exceptions, docs/errors.md: operator x mistake -> type and message.

`rule` is the type in the general table. For replacements of torch, the exception must also have the type that torch
raises for the same call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import seqkernels
from seqkernels import functional, nn

T, B, D, H, E = 4, 3, 5, 6, 7


class Row(NamedTuple):
    call: Callable[..., Any]  # called with the callable of seqkernels and, if there is one, that of torch
    ours: Any
    theirs: Any
    rule: type[Exception]
    message: str


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def integers(*values: int) -> Tensor:
    return torch.tensor(values)


ROWS: dict[str, Row] = {}


def rows(
    operator: str, ours: Any, theirs: Any, mistakes: dict[str, tuple[Callable[..., Any], type[Exception], str]]
) -> None:
    for mistake, (call, rule, message) in mistakes.items():
        ROWS[f"{operator}: {mistake}"] = Row(call, ours, theirs, rule, message)


def changed(good: dict[str, Any], **change: Any) -> Callable[..., Any]:
    return lambda f: f(**good | change)


def _double(hx: Any) -> Any:
    return tuple(s.double() for s in hx) if isinstance(hx, tuple) else hx.double()


# ---- recurrent modules

STATES = {"LSTM": 2, "GRU": 1, "RNN": 1}
for _name, _states in STATES.items():

    def _hx(*shape: int, states: int = _states, **options: Any) -> Any:
        return (zeros(*shape, **options),) * 2 if states == 2 else zeros(*shape, **options)

    rows(
        f"nn.{_name}",
        getattr(nn, _name),
        getattr(torch.nn, _name),
        {
            "hidden_size": (lambda m: m(D, 0), ValueError, "hidden_size must be greater than zero"),
            "hidden_size of a wrong type": (lambda m: m(D, 6.0), TypeError, "hidden_size should be of type int"),
            "dropout": (lambda m: m(D, H, 2, dropout=2.0), ValueError, "dropout should be a number in range"),
            "unknown argument": (lambda m: m(D, H, depth=2), TypeError, "depth"),
            "input dimensions": (lambda m: m(D, H)(zeros(D)), ValueError, f"{_name}: Expected input to be 2D or 3D"),
            "input size": (lambda m: m(D, H)(zeros(T, B, D + 1)), RuntimeError, "must be equal to input_size"),
            "input dtype": (lambda m: m(D, H)(zeros(T, B, D).double()), ValueError, "RNN input dtype"),
            "packed input dtype": (
                lambda m: m(D, H)(PackedSequence(zeros(7, D).double(), integers(3, 2, 1, 1))),
                ValueError,
                "RNN input dtype",
            ),
            "input a list": (lambda m: m(D, H)([0.0]), TypeError, f"{_name}: input must be a tensor"),
            "input device": (
                lambda m: m(D, H)(zeros(T, B, D, device="meta")),
                ValueError,
                f"{_name}: input must be on the device of the parameters, cpu, got meta",
            ),
            "hx dimensions": (
                lambda m, hx=_hx: m(D, H)(zeros(T, B, D), hx(1, H)),
                RuntimeError,
                "For batched 3-D input",
            ),
            "hx size": (lambda m, hx=_hx: m(D, H)(zeros(T, B, D), hx(1, B, H + 1)), RuntimeError, "Expected hidden"),
            "hx batch": (lambda m, hx=_hx: m(D, H)(zeros(T, B, D), hx(1, B + 1, H)), RuntimeError, "Expected hidden"),
            "hx dtype": (
                lambda m, hx=_hx: m(D, H)(zeros(T, B, D), _double(hx(1, B, H))),
                TypeError,
                f"{_name}: h0 must be float32",
            ),
            "hx device": (
                lambda m, hx=_hx: m(D, H)(zeros(T, B, D), hx(1, B, H, device="meta")),
                ValueError,
                f"{_name}: h0 must be on the device",
            ),
            "hx of a wrong type": (lambda m: m(D, H)(zeros(T, B, D), "h0"), TypeError, f"{_name}: hx must be"),
            "batch_sizes": (
                lambda m: m(D, H)(PackedSequence(zeros(7, D), integers(1, 2, 4))),
                ValueError,
                f"{_name}: batch_sizes must",
            ),
        },
    )
    rows(
        f"nn.{_name}",
        getattr(nn, _name),
        None,
        {
            "lengths": (
                lambda m: m(D, H)(zeros(T, B, D), lengths=[T + 1, 1, 1]),
                ValueError,
                f"{_name}: lengths must lie in",
            ),
            "lengths shape": (
                lambda m: m(D, H)(zeros(T, B, D), lengths=[1]),
                ValueError,
                f"{_name}: lengths must have shape",
            ),
            "lengths dtype": (
                lambda m: m(D, H)(zeros(T, B, D), lengths=[1.0, 1.0, 1.0]),
                TypeError,
                f"{_name}: lengths must be",
            ),
            "reset dtype": (
                lambda m: m(D, H)(zeros(T, B, D), reset=zeros(T, B)),
                TypeError,
                f"{_name}: reset must be a bool",
            ),
            "reset shape": (
                lambda m: m(D, H)(zeros(T, B, D), reset=zeros(T, 1).bool()),
                ValueError,
                f"{_name}: reset must have",
            ),
            "option value": (lambda m: m(D, H, zoneout_h=1.0), ValueError, f"{_name}: zoneout_h must lie in"),
            "option type": (lambda m: m(D, H, zoneout_h="a"), TypeError, f"{_name}: zoneout_h must"),
        },
    )


# ---- recurrent functions; torch has no equivalents

for _name, _gates in {"lstm": 4, "gru": 3, "mgu": 2, "rnn_tanh": 1, "nested_lstm": 4}.items():
    _weights = [zeros(_gates * H, D), zeros(_gates * H, H)]
    if _name == "nested_lstm":
        _weights += [zeros(4 * H, H), zeros(4 * H, H)]
    GOOD = dict(input=zeros(T, B, D), hx=None, weights=_weights)
    _count = {"lstm": 2, "nested_lstm": 3}.get(_name, 1)
    _h0 = zeros(1, B, H + 1) if _count == 1 else (zeros(1, B, H + 1),) * _count
    rows(
        f"functional.{_name}",
        getattr(functional, _name),
        None,
        {
            "input a list": (changed(GOOD, input=[0.0]), TypeError, f"{_name}: input must be a tensor"),
            "input dimensions": (changed(GOOD, input=zeros(T, D)), ValueError, f"{_name}: input must have shape"),
            "input dtype": (changed(GOOD, input=zeros(T, B, D).int()), NotImplementedError, f"{_name}: no backend"),
            "number of weights": (changed(GOOD, weights=_weights[:1]), ValueError, f"{_name}: weights must hold"),
            "weight shape": (
                changed(GOOD, weights=[zeros(1, D), *_weights[1:]]),
                ValueError,
                f"{_name}: weight_ih must have",
            ),
            "weight dtype": (
                changed(GOOD, weights=[w.double() for w in _weights]),
                TypeError,
                f"{_name}: weights must have",
            ),
            "weight a list": (
                changed(GOOD, weights=[[0.0], *_weights[1:]]),
                TypeError,
                f"{_name}: weights must be tensors",
            ),
            "hx of a wrong type": (changed(GOOD, hx="h0"), TypeError, f"{_name}: hx must be"),
            "hx shape": (changed(GOOD, hx=_h0), ValueError, f"{_name}: h0 must have shape"),
            "lengths": (changed(GOOD, lengths=[9, 1, 1]), ValueError, f"{_name}: lengths must lie in"),
            "batch_sizes": (
                changed(GOOD, input=zeros(7, D), batch_sizes=integers(1, 2, 4)),
                ValueError,
                f"{_name}: batch_sizes must",
            ),
            "batch_sizes dtype": (
                changed(GOOD, input=zeros(7, D), batch_sizes=zeros(4)),
                TypeError,
                f"{_name}: batch_sizes must",
            ),
            "dropout": (changed(GOOD, dropout=2.0), ValueError, f"{_name}: dropout must lie in"),
            "unknown argument": (changed(GOOD, depth=2), TypeError, "depth"),
            "backend without a name": (
                changed(GOOD, backend="gpu"),
                ValueError,
                f"{_name}: backend must be None, cpu, cuda",
            ),
            "backend that cannot run": (
                changed(GOOD, backend="cuda"),
                NotImplementedError,
                f"{_name}: backend cuda cannot run",
            ),
        },
    )

# ---- cells

for _name, _gates in {"lstm_cell": 4, "gru_cell": 3, "rnn_tanh_cell": 1, "rnn_relu_cell": 1}.items():
    _state: Any = (zeros(B, H),) * 2 if _gates == 4 else zeros(B, H)
    _wide: Any = (zeros(B, H + 1),) * 2 if _gates == 4 else zeros(B, H + 1)
    _many: Any = (zeros(B + 1, H),) * 2 if _gates == 4 else zeros(B + 1, H)
    GOOD = dict(input=zeros(B, D), hx=_state, w_ih=zeros(_gates * H, D), w_hh=zeros(_gates * H, H))
    GOOD |= dict(b_ih=zeros(_gates * H), b_hh=zeros(_gates * H))
    rows(
        f"functional.{_name}",
        getattr(functional, _name),
        getattr(torch, _name),
        {
            "input a list": (changed(GOOD, input=[0.0]), TypeError, f"{_name}: input must be a tensor"),
            "input size": (changed(GOOD, input=zeros(B, D + 1)), RuntimeError, "input has inconsistent input_size"),
            "input dtype": (
                changed(GOOD, input=zeros(B, D).double()),
                TypeError,
                f"{_name}: weights must have the dtype",
            ),
            "hx size": (changed(GOOD, hx=_wide), RuntimeError, "hidden0 has inconsistent hidden_size"),
            "hx batch": (changed(GOOD, hx=_many), RuntimeError, "Input batch size 3 doesn't match"),
            "hx dtype": (changed(GOOD, hx=_double(_state)), TypeError, f"{_name}: h0 must have the dtype"),
            "hx of a wrong type": (changed(GOOD, hx="h"), TypeError, f"{_name}: hx must be"),
            "weight a list": (changed(GOOD, w_ih=[0.0]), TypeError, f"{_name}: weights must be tensors"),
            "weight dtype": (
                changed(GOOD, w_ih=zeros(_gates * H, D).double()),
                TypeError,
                f"{_name}: weights must have",
            ),
            "weight shape": (
                changed(GOOD, w_ih=zeros(_gates * H + 1, D)),
                ValueError,
                f"{_name}: weight_ih must have shape",
            ),
            "bias shape": (changed(GOOD, b_ih=zeros(2)), ValueError, f"{_name}: bias_ih must have shape"),
        },
    )
    rows(
        f"functional.{_name}",
        getattr(functional, _name),
        None,
        {
            "backend without a name": (
                changed(GOOD, backend="gpu"),
                ValueError,
                f"{_name}: backend must be None, cpu, cuda",
            ),
            "backend that cannot run": (
                changed(GOOD, backend="cuda"),
                NotImplementedError,
                f"{_name}: backend cuda cannot run",
            ),
        },
    )

rows(
    "nn.LSTMCell",
    nn.LSTMCell,
    torch.nn.LSTMCell,
    {
        "input dimensions": (lambda m: m(D, H)(zeros(1, B, D)), ValueError, "LSTMCell: Expected input to be 1D or 2D"),
        "hx a tensor": (lambda m: m(D, H)(zeros(B, D), zeros(B, H)), TypeError, "LSTMCell: hx must be a pair"),
        "hx of three": (lambda m: m(D, H)(zeros(B, D), (zeros(B, H),) * 3), TypeError, "LSTMCell: hx must be a pair"),
        "input dtype": (lambda m: m(D, H)(zeros(B, D).double()), TypeError, "LSTMCell: weights must have the dtype"),
    },
)
rows(
    "nn.RNNCell",
    nn.RNNCell,
    torch.nn.RNNCell,
    {
        "nonlinearity": (lambda m: m(D, H, nonlinearity="selu")(zeros(B, D)), RuntimeError, "Unknown nonlinearity"),
    },
)

# ---- embedding bags

TABLE, INDICES, OFFSETS = zeros(E, D), integers(0, 5, 2, 2), integers(0, 2)
GOOD = dict(input=INDICES, weight=TABLE, offsets=OFFSETS)
ROWED = dict(input=INDICES.view(2, 2), weight=TABLE)
rows(
    "functional.embedding_bag",
    functional.embedding_bag,
    F.embedding_bag,
    {
        "input a list": (changed(GOOD, input=[0]), TypeError, "embedding_bag: input must be a tensor"),
        "input dtype": (changed(GOOD, input=zeros(4)), TypeError, "embedding_bag: input must be int64 or int32"),
        "input dimensions": (changed(GOOD, input=integers(1)[0]), ValueError, "embedding_bag: input must be"),
        "offsets absent": (changed(GOOD, offsets=None), ValueError, "embedding_bag: offsets must be a 1-D tensor"),
        "offsets beside 2-D input": (
            changed(ROWED, offsets=OFFSETS),
            ValueError,
            "embedding_bag: offsets must be None",
        ),
        "offsets dtype": (changed(GOOD, offsets=zeros(2)), TypeError, "embedding_bag: offsets must be int64 or int32"),
        "offsets dimensions": (changed(GOOD, offsets=OFFSETS[None]), ValueError, "embedding_bag: offsets must have 1"),
        "offsets[0]": (changed(GOOD, offsets=integers(1, 2)), ValueError, "embedding_bag: offsets"),
        "offsets beyond input": (changed(GOOD, offsets=integers(0, 9)), ValueError, "embedding_bag: offsets"),
        "weight a list": (changed(GOOD, weight=[[0.0]]), TypeError, "embedding_bag: weight must be a tensor"),
        "weight dimensions": (changed(GOOD, weight=zeros(E)), ValueError, "embedding_bag: weight must have shape"),
        "weight dtype": (changed(GOOD, weight=TABLE.long()), NotImplementedError, "embedding_bag: no backend"),
        "mode": (changed(GOOD, mode="prod"), ValueError, "embedding_bag: mode must be one of"),
        "padding_idx": (changed(GOOD, padding_idx=E), ValueError, "embedding_bag: padding_idx must be within"),
        "padding_idx of a wrong type": (
            changed(GOOD, padding_idx=1.0),
            TypeError,
            "embedding_bag: padding_idx must be",
        ),
        "per_sample_weights shape": (
            changed(GOOD, mode="sum", per_sample_weights=zeros(3)),
            ValueError,
            "embedding_bag: per_sample_weights must have",
        ),
        "per_sample_weights dtype": (
            changed(GOOD, mode="sum", per_sample_weights=zeros(4).double()),
            TypeError,
            "embedding_bag: per_sample_weights must",
        ),
        "index too large": (
            changed(GOOD, input=integers(0, E, 1, 1)),
            IndexError,
            "embedding_bag: input must hold indices",
        ),
        "index negative": (
            changed(GOOD, input=integers(0, -1, 1, 1)),
            IndexError,
            "embedding_bag: input must hold indices",
        ),
    },
)
LOOKUP = dict(input=INDICES, weight=TABLE)
rows(
    "functional.embedding",
    functional.embedding,
    F.embedding,
    {
        "input a list": (changed(LOOKUP, input=[0]), TypeError, "embedding: input must be a tensor"),
        "input dtype": (changed(LOOKUP, input=zeros(4)), TypeError, "embedding: input must be int64 or int32"),
        "weight dimensions": (changed(LOOKUP, weight=zeros(E)), ValueError, "embedding: weight must have shape"),
        "weight a list": (changed(LOOKUP, weight=[0.0]), TypeError, "embedding: weight must be a tensor"),
        "padding_idx": (changed(LOOKUP, padding_idx=E), ValueError, "embedding: padding_idx must be within"),
        "padding_idx of a wrong type": (changed(LOOKUP, padding_idx=1.5), TypeError, "embedding: padding_idx must be"),
        "index too large": (changed(LOOKUP, input=integers(E)), IndexError, "embedding: input must hold indices"),
        "index negative": (changed(LOOKUP, input=integers(-1)), IndexError, "embedding: input must hold indices"),
    },
)
for _name in ("Embedding", "EmbeddingBag"):
    rows(
        f"nn.{_name}",
        getattr(nn, _name),
        getattr(torch.nn, _name),
        {
            "num_embeddings": (lambda m: m(-1, D), ValueError, f"{_name}: num_embeddings must be at least 0"),
            "padding_idx": (lambda m: m(E, D, padding_idx=E), ValueError, f"{_name}: padding_idx must be within"),
            "_weight": (lambda m: m(E, D, _weight=zeros(E, 1)), ValueError, f"{_name}: _weight must have shape"),
            "embeddings": (lambda m: m.from_pretrained(zeros(3)), ValueError, f"{_name}: embeddings must be"),
        },
    )
for _name, _tables in {
    "embedding_bag": TABLE,
    "embedding": TABLE,
    "embedding_bags": [TABLE],
    "quantize_rows": TABLE,
}.items():
    GIVEN: dict[str, Any] = {
        "embedding_bag": GOOD,
        "embedding": LOOKUP,
        "quantize_rows": dict(weight=TABLE),
        "embedding_bags": dict(input=INDICES, weights=[TABLE], offsets=integers(0, 2, 4)),
    }[_name]
    rows(
        f"functional.{_name}",
        getattr(functional, _name),
        None,
        {
            "backend without a name": (
                changed(GIVEN, backend="gpu"),
                ValueError,
                f"{_name}: backend must be None, cpu, cuda",
            ),
            "backend that cannot run": (
                changed(GIVEN, backend="cuda"),
                NotImplementedError,
                f"{_name}: backend cuda cannot run",
            ),
        },
    )
SEVERAL = dict(input=INDICES, weights=[TABLE], offsets=integers(0, 2, 4))
rows(
    "functional.embedding_bags",
    functional.embedding_bags,
    None,
    {
        "no table": (changed(SEVERAL, weights=[]), ValueError, "embedding_bags: weights must hold at least one table"),
        "index too large": (
            changed(SEVERAL, input=integers(0, E, 1, 1)),
            IndexError,
            "embedding_bags: input must hold indices",
        ),
        "offsets": (changed(SEVERAL, offsets=integers(0, 9, 4)), ValueError, "embedding_bags: offsets"),
        "mode": (changed(SEVERAL, mode="prod"), ValueError, "embedding_bags: mode must be one of"),
    },
)
PACKED = functional.quantize_rows(TABLE)
BYTES = dict(input=INDICES, packed=PACKED, offsets=OFFSETS)
rows(
    "functional.embedding_bag_bytes",
    functional.embedding_bag_bytes,
    None,
    {
        "packed dtype": (changed(BYTES, packed=TABLE), TypeError, "embedding_bag_bytes: packed must be a uint8"),
        "index too large": (
            changed(BYTES, input=integers(0, E, 1, 1)),
            IndexError,
            "embedding_bag_bytes: input must hold",
        ),
        "backend without a name": (
            changed(BYTES, backend="gpu"),
            ValueError,
            "embedding_bag_bytes: backend must be None",
        ),
        "backend that cannot run": (
            changed(BYTES, backend="cuda"),
            NotImplementedError,
            "embedding_bag_bytes: backend cuda",
        ),
    },
)

# ---- attention

Q, K = zeros(2, 4, 6, 8), zeros(2, 4, 7, 8)
GOOD = dict(query=Q, key=K, value=K)
NAME = "scaled_dot_product_attention"
rows(
    f"functional.{NAME}",
    functional.scaled_dot_product_attention,
    F.scaled_dot_product_attention,
    {
        "query a list": (changed(GOOD, query=[0.0]), TypeError, f"{NAME}: query must be a tensor"),
        "dtype": (
            changed(GOOD, query=Q.long(), key=K.long(), value=K.long()),
            NotImplementedError,
            f"{NAME}: no backend",
        ),
        "query dimensions": (changed(GOOD, query=zeros(8)), ValueError, f"{NAME}: query must have at least 2"),
        "key dtype": (changed(GOOD, key=K.double()), TypeError, f"{NAME}: key must be of query's dtype"),
        "key device": (changed(GOOD, key=K.to("meta")), ValueError, f"{NAME}: key must be on query's device"),
        "key columns": (changed(GOOD, key=zeros(2, 4, 7, 9)), ValueError, f"{NAME}: key must have as many columns"),
        "batch": (
            changed(GOOD, key=zeros(3, 4, 7, 8), value=zeros(3, 4, 7, 8)),
            ValueError,
            f"{NAME}: batch dimensions",
        ),
        "heads": (
            changed(GOOD, key=zeros(2, 2, 7, 8), value=zeros(2, 2, 7, 8)),
            ValueError,
            f"{NAME}: key must have as many",
        ),
        "grouped heads": (
            changed(GOOD, key=zeros(2, 3, 7, 8), value=zeros(2, 3, 7, 8), enable_gqa=True),
            ValueError,
            f"{NAME}: query's heads",
        ),
        "value heads": (changed(GOOD, value=zeros(2, 2, 7, 8)), ValueError, f"{NAME}: value must have as many heads"),
        "attn_mask a list": (changed(GOOD, attn_mask=[True]), TypeError, f"{NAME}: attn_mask must be a tensor"),
        "attn_mask dtype": (
            changed(GOOD, attn_mask=zeros(6, 7).double()),
            TypeError,
            f"{NAME}: attn_mask must be bool",
        ),
        "attn_mask shape": (changed(GOOD, attn_mask=zeros(6, 8)), ValueError, f"{NAME}: attn_mask must have"),
        "dropout_p": (changed(GOOD, dropout_p=2.0), ValueError, f"{NAME}: dropout_p must be between"),
    },
)
rows(
    f"functional.{NAME}",
    functional.scaled_dot_product_attention,
    None,
    {
        "lengths": (changed(GOOD, lengths=[8, 1]), ValueError, f"{NAME}: k_lengths must be between"),
        "lengths dtype": (changed(GOOD, lengths=zeros(2)), TypeError, f"{NAME}: lengths must be int32 or int64"),
        "window": (changed(GOOD, window=-2), ValueError, f"{NAME}: window must be"),
        "backend without a name": (changed(GOOD, backend="gpu"), ValueError, f"{NAME}: backend must be None, cpu"),
        "backend that cannot run": (
            changed(GOOD, backend="triton"),
            NotImplementedError,
            f"{NAME}: backend triton cannot run",
        ),
    },
)
VARLEN = dict(query=zeros(6, 2, 8), key=zeros(6, 2, 8), value=zeros(6, 2, 8), cu_seqlens_q=integers(0, 2, 6))
rows(
    "functional.varlen_attention",
    functional.varlen_attention,
    None,
    {
        "cu_seqlens dtype": (
            changed(VARLEN, cu_seqlens_q=zeros(3)),
            TypeError,
            "varlen_attention: cu_seqlens_q must be int32",
        ),
        "cu_seqlens": (changed(VARLEN, cu_seqlens_q=integers(0, 2, 5)), ValueError, "varlen_attention: cu_q must"),
        "longest": (changed(VARLEN, max_seqlen_q=3), ValueError, "varlen_attention: max_q must"),
    },
)

X = zeros(T, B, 8)
NAME = "MultiheadAttention"
rows(
    f"nn.{NAME}",
    nn.MultiheadAttention,
    torch.nn.MultiheadAttention,
    {
        "num_heads": (lambda m: m(8, 3), AssertionError, "embed_dim must be divisible by num_heads"),
        "query a list": (lambda m: m(8, 2)([0.0], X, X), TypeError, f"{NAME}: query must be a tensor"),
        "query dimensions": (lambda m: m(8, 2)(zeros(8), X, X), ValueError, f"{NAME}: query must have 2 or 3"),
        "query columns": (lambda m: m(8, 2)(zeros(T, B, 9), X, X), ValueError, f"{NAME}: query must have 8 columns"),
        "key columns": (
            lambda m: m(8, 2)(X, zeros(T, B, 9), zeros(T, B, 9)),
            ValueError,
            f"{NAME}: key must have 8 columns",
        ),
        "value rows": (
            lambda m: m(8, 2)(X, X, zeros(T + 1, B, 8)),
            ValueError,
            f"{NAME}: value must have as many rows",
        ),
        "batch": (
            lambda m: m(8, 2)(X, zeros(T, B + 1, 8), zeros(T, B + 1, 8)),
            ValueError,
            f"{NAME}: key must have as many",
        ),
        "attn_mask shape": (
            lambda m: m(8, 2)(X, X, X, attn_mask=zeros(T, T + 1)),
            ValueError,
            f"{NAME}: attn_mask must have",
        ),
        "attn_mask dimensions": (
            lambda m: m(8, 2)(X, X, X, attn_mask=zeros(1, 1, T, T)),
            ValueError,
            f"{NAME}: attn_mask must have shape",
        ),
        "attn_mask dtype": (
            lambda m: m(8, 2)(X, X, X, attn_mask=zeros(T, T).long()),
            TypeError,
            f"{NAME}: attn_mask must be",
        ),
        "key_padding_mask shape": (
            lambda m: m(8, 2)(X, X, X, zeros(B, T + 1).bool()),
            ValueError,
            f"{NAME}: key_padding_mask must have shape",
        ),
        "key_padding_mask dtype": (
            lambda m: m(8, 2)(X, X, X, zeros(B, T).long()),
            TypeError,
            f"{NAME}: key_padding_mask must be bool",
        ),
    },
)

# ---- explain

rows(
    "explain",
    seqkernels.explain,
    None,
    {
        "op": (lambda f: f("attention"), ValueError, "explain: op must be one of"),
        "size absent": (lambda f: f("lstm", T=1, B=1, D=1), TypeError, "explain: H must be given for lstm"),
        "size of another op": (
            lambda f: f("lstm", T=1, B=1, D=1, H=1, E=1),
            TypeError,
            "explain: E must be absent for lstm",
        ),
        "size": (lambda f: f("lstm", T=1, B=-1, D=1, H=1), ValueError, "explain: B must be at least 0"),
        "dtype": (
            lambda f: f("lstm", T=1, B=1, D=1, H=1, dtype=torch.int8),
            NotImplementedError,
            "no backend supports a layer",
        ),
    },
)


GOOD = dict(
    log_probs=zeros(5, 2, 4), targets=integers(1, 2, 3).expand(2, 3), input_lengths=integers(5, 5),
    target_lengths=integers(2, 3),
)  # fmt: skip
rows(
    "functional.ctc_loss",
    functional.ctc_loss,
    F.ctc_loss,
    {
        "blank": (changed(GOOD, blank=4), ValueError, "ctc_loss: blank must be between 0 and 3, got 4"),
        "blank of a wrong type": (changed(GOOD, blank=None), TypeError, "ctc_loss: blank must be an int"),
        "input_lengths dtype": (
            changed(GOOD, input_lengths=zeros(2)),
            TypeError,
            "ctc_loss: input_lengths must be int",
        ),
        "input_lengths": (changed(GOOD, input_lengths=integers(5, 6)), ValueError, "input_lengths must be between"),
        "number of input_lengths": (
            changed(GOOD, input_lengths=integers(5)),
            ValueError,
            "input_lengths must have shape",
        ),
        "target_lengths": (changed(GOOD, target_lengths=integers(2, 4)), ValueError, "target_lengths must be between"),
        "number of labels": (changed(GOOD, targets=integers(1, 2, 3)), ValueError, "target_lengths must be between"),
        "reduction": (changed(GOOD, reduction="max"), ValueError, "ctc_loss: reduction must be none, mean or sum"),
        "log_probs a list": (changed(GOOD, log_probs=[0.0]), TypeError, "ctc_loss: log_probs must be a tensor"),
    },
)


def raised(call: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011
        call()
    return info.value


# Accidental exceptions of torch, which does not check these types; seqkernels raises TypeError.
ACCIDENTS = (AttributeError, IndexError)


@pytest.mark.filterwarnings("ignore")  # torch warns before some errors
@pytest.mark.parametrize("name", ROWS)
def test_exception(name: str) -> None:
    call, ours, theirs, rule, message = ROWS[name]
    found = raised(lambda: call(ours))
    assert isinstance(found, rule), (type(found), found)
    assert message in str(found)
    if theirs is None:
        return
    expected = type(raised(lambda: call(theirs)))
    assert isinstance(found, expected) or (expected in ACCIDENTS and rule is TypeError), (type(found), expected)
