"""Inputs, dtypes, sizes and pickles that torch supports, with torch as the oracle."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqkernels
from seqkernels.functional import (
    embedding,
    embedding_bag,
    embedding_bags,
    scaled_dot_product_attention,
    varlen_attention,
)

close = torch.testing.assert_close

# ---- recurrent cells of hidden size 0


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell", "DreamerGRUCell"])
def test_cells_without_hidden_units(name: str, batched: bool) -> None:
    cell = getattr(seqkernels.nn, name)(4, 0)
    x = torch.randn(*[2] * batched, 4, requires_grad=True)
    states = cell(x)
    states = states if isinstance(states, tuple) else (states,)
    assert [s.shape for s in states] == [torch.Size([*[2] * batched, 0])] * (2 if name == "LSTMCell" else 1)
    assert all(s.dtype == x.dtype for s in states)
    states[0].sum().backward()
    assert x.grad is None or not x.grad.any()
    again = cell(x, states if len(states) > 1 else states[0])
    assert (again[0] if isinstance(again, tuple) else again).shape == states[0].shape
    wrong = x.new_zeros(*[2] * batched, 3)
    with pytest.raises((ValueError, RuntimeError), match=r"hidden|h0"):
        cell(x, (wrong, wrong) if len(states) > 1 else wrong)


def test_layers_require_hidden_units() -> None:
    for module in (nn.LSTM, seqkernels.nn.LSTM):
        with pytest.raises(ValueError, match="hidden_size must be greater than zero"):
            module(4, 0)


# ---- attention: float32 masks beside half and double queries, numbers of heads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["batch", "heads", "lengths"])
def test_float32_masks_are_not_rounded(dtype: torch.dtype, form: str) -> None:
    q, k, v = (torch.randn(2, 3, 5, 8).to(dtype) for _ in range(3))
    mask = torch.randn(5, 5) + 300.0  # bfloat16 would round it to a multiple of 2
    leaves = [t.clone().requires_grad_() for t in (q, k, v, mask)]
    options = {"lengths": [5, 5]} if form == "lengths" else {}
    if form == "heads":
        leaves[3] = torch.randn(2, 1, 1, 5, requires_grad=True)
    out, lse, weights = scaled_dot_product_attention(
        *leaves[:3], attn_mask=leaves[3], return_lse=True, return_weights=True, **options
    )
    assert (out.dtype, weights.dtype) == (dtype, dtype) and lse.dtype in (torch.float32, torch.float64)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = F.scaled_dot_product_attention(*exact[:3], attn_mask=exact[3])
    tolerance = {torch.float64: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    close(out.double(), want, rtol=tolerance, atol=tolerance)
    g = torch.randn_like(out)
    out.backward(g)
    want.backward(g.double())
    for ours, theirs in zip(leaves, exact):
        assert ours.grad.dtype == ours.dtype
        close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=3 * tolerance)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=leaves[3].detach())
    close(out.detach(), theirs, rtol=tolerance, atol=tolerance)


def test_masks_of_other_dtypes_raise() -> None:
    q = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    for dtype in (torch.float16, torch.float64, torch.int64):
        for attend in (F.scaled_dot_product_attention, scaled_dot_product_attention):
            with pytest.raises(RuntimeError, match="bool"):
                attend(q, q, q, attn_mask=torch.zeros(5, 5, dtype=dtype))


def test_multihead_attention_does_not_round_float32_masks() -> None:
    module = seqkernels.nn.MultiheadAttention(8, 2).bfloat16()
    x, mask = torch.randn(5, 3, 8).bfloat16(), torch.randn(5, 5) + 300.0
    theirs = nn.MultiheadAttention(8, 2).double()
    theirs.load_state_dict(module.state_dict())
    want = theirs(x.double(), x.double(), x.double(), attn_mask=mask.double())[0]
    close(module(x, x, x, attn_mask=mask)[0].double(), want, rtol=3e-2, atol=2e-2)


@pytest.mark.parametrize(
    "heads", [(4, 2, 4), (4, 4, 2), (4, 2, 1), (4, 1, 2), (6, 2, 3), (6, 3, 2), (12, 4, 6)], ids=str
)
def test_value_heads_other_than_key_heads(heads: tuple[int, int, int]) -> None:
    leaves = [torch.randn(2, n, t, 8, requires_grad=True) for n, t in zip(heads, (5, 7, 7))]
    out = scaled_dot_product_attention(*leaves, enable_gqa=True)
    want = F.scaled_dot_product_attention(*leaves, enable_gqa=True)
    close(out, want)
    g = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(want, leaves, g)):
        close(ours, theirs)
    rows = [t[0].transpose(0, 1) for t in leaves]
    packed = varlen_attention(*rows, torch.tensor([0, 5]), torch.tensor([0, 7]), enable_gqa=True)
    close(packed.transpose(0, 1), want[0])


@pytest.mark.parametrize("heads", [(4, 3, 2), (2, 3, 4), (2, 0, 2), (2, 2, 0), (2, 0, 0)], ids=str)
def test_heads_that_do_not_divide_raise(heads: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match=r"^scaled_dot_product_attention: .*heads"):
        scaled_dot_product_attention(*(torch.randn(2, n, 5, 8) for n in heads), enable_gqa=True)


@pytest.mark.parametrize("heads", [(0, 0, 0), (0, 1, 1)], ids=str)
def test_attention_without_heads(heads: tuple[int, int, int]) -> None:
    leaves = [torch.randn(2, n, t, 8, requires_grad=True) for n, t in zip(heads, (5, 7, 7))]
    out, lse, weights = scaled_dot_product_attention(*leaves, return_lse=True, return_weights=True)
    assert out.shape == F.scaled_dot_product_attention(*leaves).shape == (2, 0, 5, 8)
    assert lse.shape == (2, 0, 5) and weights.shape == (2, 0, 5, 7)
    for leaf, grad in zip(leaves, torch.autograd.grad(out.sum() + lse.sum() + weights.sum(), leaves)):
        assert torch.equal(grad, torch.zeros_like(leaf))


def test_causal_alignment_without_causality() -> None:
    q, k = torch.randn(2, 2, 3, 8), torch.randn(2, 2, 5, 8)
    want = scaled_dot_product_attention(q, k, k)
    assert torch.equal(scaled_dot_product_attention(q, k, k, causal_alignment="lower_right"), want)
    with pytest.raises(NotImplementedError, match="causal_alignment must be upper_left with window or alibi_slopes"):
        scaled_dot_product_attention(q, k, k, causal_alignment="lower_right", window=1)
    with pytest.raises(ValueError, match="causal_alignment must be upper_left or lower_right, got 'left'"):
        scaled_dot_product_attention(q, k, k, causal_alignment="left")


# ---- MultiheadAttention: a bias of another dtype, columns of keys and values


@pytest.mark.parametrize("kdim", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_in_proj_bias_of_another_dtype(dtype: torch.dtype, kdim: int | None) -> None:
    theirs = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, vdim=kdim)
    nn.init.normal_(theirs.in_proj_bias)
    theirs.in_proj_bias = nn.Parameter(theirs.in_proj_bias.detach().to(dtype))
    for batch_first in (True, False):
        ours = seqkernels.nn.MultiheadAttention(8, 2, batch_first=batch_first, kdim=kdim, vdim=kdim)
        ours.load_state_dict(theirs.state_dict())
        ours.in_proj_bias = nn.Parameter(theirs.in_proj_bias.detach().clone())
        x, k = torch.randn(3, 5, 8), torch.randn(3, 4, kdim or 8)
        given = (x, k, k) if batch_first else tuple(t.transpose(0, 1) for t in (x, k, k))
        got, want = ours(*given)[0], theirs(x, k, k)[0]
        close(got if batch_first else got.transpose(0, 1), want)
        got.square().sum().backward()
        theirs.zero_grad()
        want.square().sum().backward()
        assert ours.in_proj_bias.grad.dtype == dtype
        close(ours.in_proj_bias.grad, theirs.in_proj_bias.grad, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dims", [{}, {"kdim": 6, "vdim": 5}], ids=str)
@pytest.mark.parametrize("columns", list(itertools.product((5, 6, 7, 8), repeat=2)), ids=str)
def test_columns_of_keys_and_values_raise_as_in_torch(columns: tuple[int, int], dims: dict) -> None:
    raised = []
    for library in (nn, seqkernels.nn):
        module, x, key = library.MultiheadAttention(8, 2, **dims), torch.randn(3, 2, 8), torch.randn(4, 2, columns[0])
        value = key if columns[0] == columns[1] else torch.randn(4, 2, columns[1])
        try:
            module(x, key, value)
            raised.append(None)
        except (AssertionError, RuntimeError) as error:
            raised.append(error)
    theirs, ours = raised
    assert (ours is None) == (theirs is None)
    if theirs is not None:
        assert isinstance(ours, type(theirs)) and isinstance(ours, ValueError)
        assert str(ours).startswith("MultiheadAttention: ")


# ---- tables and indices of other dtypes


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn],
    ids=str,
)
def test_tables_without_gradient_of_other_dtypes(dtype: torch.dtype) -> None:
    table, index = (torch.randn(5, 3) * 5).to(dtype), torch.tensor([[4, 0], [2, 2]])

    def bits(t: Tensor) -> Tensor:
        return t.view(torch.uint8) if dtype == torch.float8_e4m3fn else t

    want = bits(F.embedding(index, table))
    assert torch.equal(bits(embedding(index, table)), want)
    assert torch.equal(bits(seqkernels.nn.Embedding.from_pretrained(table)(index)), want)
    assert torch.equal(bits(embedding(index.int(), table, padding_idx=-1)), want)
    with pytest.raises(IndexError, match=r"^embedding: input must hold indices in \[0, E\) = \[0, 5\)"):
        embedding(torch.tensor([5]), table)
    with pytest.raises(TypeError, match=r"^embedding: weight must be .* with max_norm"):
        embedding(index, table, max_norm=1.0)
    with pytest.raises(TypeError, match=r"^embedding: input must be int64 or int32"):
        embedding(index.float(), table)
    with pytest.raises(RuntimeError, match=r"^embedding: weight must have shape \[E, D\]"):
        embedding(index, table[0])
    with pytest.raises(NotImplementedError, match=f"{dtype}"):
        embedding_bag(index, table)
    with pytest.raises(NotImplementedError, match=f"{dtype}"):
        embedding(index, table, backend="cpu")


def test_complex_tables_with_gradient_raise() -> None:
    table = torch.randn(5, 3, dtype=torch.complex64, requires_grad=True)
    for lookup in (F.embedding, embedding):
        with pytest.raises(RuntimeError, match="embedding"):
            lookup(torch.tensor([1]), table)
    with torch.no_grad():
        assert torch.equal(embedding(torch.tensor([1]), table), table[[1]])


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.uint8], ids=str)
def test_narrow_indices_and_offsets_of_bags(dtype: torch.dtype) -> None:
    table = torch.randn(7, 3, requires_grad=True)
    index, offsets = torch.tensor([6, 0, 3, 3, 1]), torch.tensor([0, 2])
    for i, o in ((index.to(dtype), offsets), (index, offsets.to(dtype)), (index.to(dtype), offsets.to(dtype))):
        got, want = embedding_bag(i, table, o), F.embedding_bag(index, table, offsets)
        close(got, want)
        close(torch.autograd.grad(got.sum(), table), torch.autograd.grad(want.sum(), table))
        assert torch.equal(seqkernels.nn.EmbeddingBag.from_pretrained(table.detach())(i, o), got)
    square = index[:4].view(2, 2)
    assert torch.equal(embedding_bag(square.to(dtype), table), embedding_bag(square, table))
    ends = torch.tensor([0, 2, 5])
    assert torch.equal(embedding_bags(index.to(dtype), [table], ends.to(dtype)), embedding_bags(index, [table], ends))
    packed = seqkernels.functional.quantize_rows(table)
    of_bytes = seqkernels.functional.embedding_bag_bytes
    assert torch.equal(of_bytes(index.to(dtype), packed, offsets.to(dtype)), of_bytes(index, packed, offsets))
    with pytest.raises(IndexError, match=r"^embedding_bag: "):
        embedding_bag(torch.tensor([7]).to(dtype), table, offsets[:1])
    with torch.no_grad():
        compiled = torch.compile(lambda i, o: embedding_bag(i, table, o), backend="eager", fullgraph=True)
        assert torch.equal(compiled(index.to(dtype), offsets), embedding_bag(index, table, offsets))


# ---- errors: tables of the wrong rank, negative sizes, names of modules


@pytest.mark.parametrize("shape", [(), (5,), (5, 3, 2)], ids=str)
@pytest.mark.parametrize("lookup", [embedding, embedding_bag, F.embedding], ids=lambda f: f.__module__ + f.__name__)
def test_tables_of_the_wrong_rank_raise(lookup: Callable, shape: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match="weight"):
        lookup(torch.tensor([[1, 2]]), torch.randn(shape))


@pytest.mark.parametrize("sizes", [(-1, 3), (3, -1)], ids=str)
@pytest.mark.parametrize("name", ["Embedding", "EmbeddingBag", "LSTMCell", "GRUCell", "RNNCell"])
def test_negative_sizes_raise_as_in_torch(name: str, sizes: tuple[int, int]) -> None:
    for library in (nn, seqkernels.nn):
        with pytest.raises(RuntimeError, match=r"negative dimension|must be at least 0"):
            getattr(library, name)(*sizes)


def test_negative_sizes_name_the_public_module() -> None:
    config = seqkernels.nn.EmbeddingBagConfig(-1, 3, ["a"])
    with pytest.raises(RuntimeError, match=r"^EmbeddingBagCollection: num_embeddings must be at least 0, got -1"):
        seqkernels.nn.EmbeddingBagCollection([config])
    with pytest.raises(RuntimeError, match=r"^QuantizedEmbeddingBag: embedding_dim must be at least 1, got -3"):
        seqkernels.nn.QuantizedEmbeddingBag(4, -3)


# ---- pickles of whole modules of torch


PICKLED: dict[str, tuple[tuple, dict, Callable[[], tuple[Tensor, ...]]]] = {
    "LSTM": ((4, 3, 2), {"bidirectional": True, "proj_size": 2}, lambda: (torch.randn(5, 2, 4),)),
    "GRU": ((4, 3, 2), {"batch_first": True, "bias": False}, lambda: (torch.randn(5, 2, 4),)),
    "RNN": ((4, 3), {"nonlinearity": "relu"}, lambda: (torch.randn(5, 2, 4),)),
    "LSTMCell": ((4, 3), {}, lambda: (torch.randn(2, 4),)),
    "GRUCell": ((4, 3), {"bias": False}, lambda: (torch.randn(2, 4),)),
    "RNNCell": ((4, 3), {"nonlinearity": "relu"}, lambda: (torch.randn(2, 4),)),
    "Embedding": ((9, 4), {"padding_idx": 1}, lambda: (torch.tensor([[1, 2]]),)),
    "EmbeddingBag": ((9, 4), {"mode": "max"}, lambda: (torch.tensor([[1, 2]]),)),
    "MultiheadAttention": ((8, 2), {"add_bias_kv": True}, lambda: (torch.randn(5, 2, 8),) * 3),
    "TransformerEncoderLayer": ((8, 2, 16, 0.0), {}, lambda: (torch.randn(5, 2, 8),)),
    "TransformerDecoderLayer": ((8, 2, 16, 0.0), {}, lambda: (torch.randn(5, 2, 8),) * 2),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickles_of_modules_of_torch_load_into_ours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file saved with torch.nn.LSTM loads where seqkernels.nn.LSTM stands in its place."""
    args, options, inputs = PICKLED[name]
    theirs, buffer, given = getattr(nn, name)(*args, **options), io.BytesIO(), inputs()
    torch.save(theirs, buffer)
    ours = getattr(seqkernels.nn, name)
    buffer.seek(0)
    with monkeypatch.context() as patch:
        patch.setattr(f"{type(theirs).__module__}.{name}", ours)
        loaded = torch.load(buffer, weights_only=False)
    assert type(loaded) is ours and loaded.state_dict().keys() == theirs.state_dict().keys()
    leaves = torch.utils._pytree.tree_leaves
    for got, want in zip(leaves(loaded(*given)), leaves(theirs(*given)), strict=True):
        close(got, want)
    assert repr(loaded).split("\n")[0] == repr(theirs).split("\n")[0]
    again = io.BytesIO()
    torch.save(loaded, again)
    again.seek(0)
    assert type(torch.load(again, weights_only=False)) is ours
