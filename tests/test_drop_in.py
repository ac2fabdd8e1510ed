"""Drop-in use with tools of torch: traces, hooks, overridden methods, deferred initialisation, meta and fake tensors,
causal biases, jagged tensors, and gradients without shared memory or in batches."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import seqkernels
from seqkernels.functional import scaled_dot_product_attention, varlen_attention
from seqkernels.functional._values import may_read_values
from support.workers import run_workers

B, T, E, H = 3, 6, 8, 2
close = torch.testing.assert_close


# ---- traces


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = seqkernels.nn.MultiheadAttention(E, H, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, x, x, key_padding_mask=padding, need_weights=False)[0]


class Encode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = seqkernels.nn.TransformerEncoderLayer(E, H, 16, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, src_key_padding_mask=padding)


class Decode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = seqkernels.nn.TransformerDecoderLayer(E, H, 16, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, x, memory_key_padding_mask=padding)


class Recur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = seqkernels.nn.GRU(E, 5, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.layer(x, lengths=(~padding).sum(1))[0]


ENDS = torch.arange(T) >= torch.tensor([[6], [2], [4]])
OTHERS = [torch.arange(T) >= torch.tensor([[1], [6], [3]]), torch.zeros(B, T, dtype=torch.bool)]
HOLES = torch.tensor([[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]).bool()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("module", [Attend, Encode, Decode, Recur])
def test_traces_support_other_masks(module: type[nn.Module]) -> None:
    layer, x = module().eval(), torch.randn(B, T, E)
    others = OTHERS if module is Recur else [*OTHERS, HOLES]
    with torch.no_grad():
        traced = torch.jit.trace(layer, (x, ENDS))
        for mask in others:
            close(traced(x, mask), layer(x, mask))
    if module is not Recur:
        added = torch.zeros(B, T).masked_fill(ENDS, -torch.inf)
        with torch.no_grad():
            traced = torch.jit.trace(layer, (x, added))
            other = torch.randn(B, T)
            close(traced(x, other), layer(x, other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_with_a_causal_mask_support_other_masks() -> None:
    """torch.nn.TransformerEncoder derives is_causal from the values of the traced mask."""
    encoder = nn.TransformerEncoder(seqkernels.nn.TransformerEncoderLayer(E, H, 16), 2, enable_nested_tensor=False)
    encoder = encoder.eval()
    x, causal = torch.randn(T, B, E), nn.Transformer.generate_square_subsequent_mask(T)
    other = torch.zeros(T, T).masked_fill(torch.rand(T, T) < 0.4, -torch.inf).fill_diagonal_(0.0)
    with torch.no_grad():
        traced = torch.jit.trace(encoder, (x, causal))
        close(traced(x, causal), encoder(x, causal))
        close(traced(x, other), encoder(x, other))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_of_packed_attention_require_max_seqlen() -> None:
    q, cu = torch.randn(9, H, 4), torch.tensor([0, 2, 3, 9])
    with pytest.raises(ValueError, match=r"max_seqlen_q must be given in torch\.jit\.trace"):
        torch.jit.trace(lambda q, cu: varlen_attention(q, q, q, cu), (q, cu))

    def attend(q: Tensor, cu: Tensor) -> Tensor:
        return varlen_attention(q, q, q, cu, max_seqlen_q=8, is_causal=True)

    with torch.no_grad():
        traced = torch.jit.trace(attend, (q, cu))
        other = torch.tensor([0, 0, 8, 9])
        close(traced(q, other), attend(q, other))
        with pytest.raises(RuntimeError, match="max_q must be at least the longest sequence's length, 9, got 8"):
            traced(q, torch.tensor([0, 9, 9, 9]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "MGU", "LSTMCell", "GRUCell", "RNNCell"])
def test_traces_with_gradients_enabled_can_be_saved(name: str) -> None:
    module = getattr(seqkernels.nn, name)(4, 3).eval()
    x = torch.randn(5, 4) if "Cell" in name else torch.randn(5, 2, 4)
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, x), buffer)
    buffer.seek(0)
    leaves = torch.utils._pytree.tree_leaves
    for got, want in zip(leaves(torch.jit.load(buffer)(x)), leaves(module(x)), strict=True):
        close(got, want)


def test_may_read_values_is_false_while_recording_and_without_values() -> None:
    t = torch.ones(2)
    assert may_read_values(t) and may_read_values(nn.Parameter(t))
    assert not may_read_values(t.to("meta"))
    assert not may_read_values(t.as_subclass(type("Mine", (Tensor,), {})))
    with FakeTensorMode():
        assert not may_read_values(torch.ones(2))
    seen = []

    def look(v: Tensor) -> Tensor:
        seen.append(may_read_values(t))
        return v + t

    torch.vmap(look)(torch.ones(3, 2))
    torch.func.grad(lambda v: look(v).sum())(t)
    torch.fx.experimental.proxy_tensor.make_fx(look)(t)
    torch.jit.trace(look, t, check_trace=False)
    torch.compile(look, backend="eager", fullgraph=False)(t)
    assert not any(seen) and may_read_values(t)


# ---- hooks, overrides and replaced attention


def encoder(**options) -> nn.Module:
    return seqkernels.nn.TransformerEncoderLayer(E, H, 16, **options)


def decoder(**options) -> nn.Module:
    return seqkernels.nn.TransformerDecoderLayer(E, H, 16, **options)


@pytest.mark.parametrize("norm_first", [False, True])
def test_overridden_methods_are_called(norm_first: bool) -> None:
    called = []

    def counted(base: type, *names: str) -> type:
        def method(name: str) -> Callable:
            def run(self, *args, **kwargs):
                called.append((base.__name__, name))
                return getattr(super(cls, self), name)(*args, **kwargs)

            return run

        cls = type("Mine", (base,), {name: method(name) for name in names})
        return cls

    x = torch.randn(T, B, E)
    names = "_sa_block", "_ff_block"
    counted(seqkernels.nn.TransformerEncoderLayer, *names)(E, H, 16, norm_first=norm_first)(x)
    counted(seqkernels.nn.TransformerDecoderLayer, "_sa_block", "_mha_block", "_ff_block")(
        E, H, 16, norm_first=norm_first
    )(x, x)
    assert [name for _, name in called] == [*names, "_sa_block", "_mha_block", "_ff_block"]


def test_layers_support_attention_of_torch() -> None:
    x, mask = torch.randn(T, B, E), nn.Transformer.generate_square_subsequent_mask(T)
    for layer, given in ((encoder(), (x, mask)), (decoder(), (x, x, mask))):
        layer = layer.eval()
        want = layer(*given)
        for name in ("self_attn", "multihead_attn"):
            if hasattr(layer, name):
                theirs = nn.MultiheadAttention(E, H)
                theirs.load_state_dict(getattr(layer, name).state_dict())
                setattr(layer, name, theirs.eval())
        close(layer(*given), want)


def test_pre_hooks_can_request_weights() -> None:
    layer, maps = encoder(), []
    layer.self_attn.register_forward_pre_hook(lambda m, a, k: (a, k | {"need_weights": True}), with_kwargs=True)
    layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    layer(torch.randn(T, B, E))
    assert maps[0].shape == (B, T, T)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("replaced", ["attention", "block"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_replaced_attention_in_an_encoder_that_packs(replaced: str, batch_first: bool) -> None:
    """In evaluation torch.nn.TransformerEncoder converts a padded batch to a nested tensor, if batch_first."""

    class Mine(seqkernels.nn.TransformerEncoderLayer):
        def _sa_block(self, x, attn_mask, key_padding_mask, is_causal=False):  # the signature of torch
            return super()._sa_block(x, attn_mask, key_padding_mask, is_causal)

    layer = (Mine if replaced == "block" else seqkernels.nn.TransformerEncoderLayer)(E, H, 16, batch_first=batch_first)
    if replaced == "attention":
        layer.self_attn = nn.MultiheadAttention(E, H, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(B, T, E) if batch_first else torch.randn(T, B, E)
    want = model(x, src_key_padding_mask=ENDS).detach()
    with torch.no_grad():
        got = model(x, src_key_padding_mask=ENDS)
    valid = ~ENDS if batch_first else ~ENDS.T
    close(got[valid], want[valid])
    with pytest.raises(NotImplementedError, match="lengths, cu_seqlens and cache need a seqkernels"):
        layer(x, lengths=[6, 2, 4])


def test_replaced_attention_in_a_decoder() -> None:
    layer, x = decoder(), torch.randn(T, B, E)
    layer.multihead_attn = nn.MultiheadAttention(E, H)
    assert layer(x, x).shape == x.shape
    with pytest.raises(NotImplementedError, match=r"a seqkernels\.nn\.MultiheadAttention as multihead_attn"):
        layer(x, x, memory_lengths=[6, 2, 4])


# ---- modules without data


MODULES: dict[str, Callable[..., nn.Module]] = {
    "PositionalEncoding": lambda **k: seqkernels.nn.PositionalEncoding(E, **k),
    "MultiheadAttention": lambda **k: seqkernels.nn.MultiheadAttention(E, H, **k),
    "TransformerEncoderLayer": lambda **k: seqkernels.nn.TransformerEncoderLayer(E, H, 16, 0.0, **k),
    "TransformerDecoderLayer": lambda **k: seqkernels.nn.TransformerDecoderLayer(E, H, 16, 0.0, **k),
    "Embedding": lambda **k: seqkernels.nn.Embedding(9, E, padding_idx=1, **k),
    "EmbeddingBag": lambda **k: seqkernels.nn.EmbeddingBag(9, E, mode="max", **k),
    **{
        name: lambda name=name, **k: getattr(seqkernels.nn, name)(E, H, **k)
        for name in ("LSTM", "GRU", "RNN", "MGU", "NestedLSTM", "SLSTM", "LSTMCell", "GRUCell", "RNNCell")
    },
}


def run(name: str, module: nn.Module, device: str = "cpu") -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    x = torch.randn(T, B, E).to(device)
    if "Embedding" in name:
        given: tuple[Tensor, ...] = (torch.randint(9, (B, 4)).to(device),)
    elif name == "MultiheadAttention":
        given = x, x, x
    elif name == "TransformerDecoderLayer":
        given = x, x
    else:
        given = (x[0] if "Cell" in name else x,)
    return tuple(t for t in torch.utils._pytree.tree_leaves(module(*given)) if isinstance(t, Tensor))


@pytest.mark.parametrize("assign", [False, True], ids=["to_empty", "assign"])
@pytest.mark.parametrize("name", MODULES)
def test_modules_from_meta_match_after_loading(name: str, assign: bool) -> None:
    source = MODULES[name]()
    want, state = run(name, source), source.state_dict()
    with torch.device("meta"):
        module = MODULES[name]()
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(copy.deepcopy(state), assign=assign)
    assert all(map(torch.equal, run(name, module), want))


def test_positional_encodings_are_computed_for_a_new_table() -> None:
    want = run("PositionalEncoding", seqkernels.nn.PositionalEncoding(E))[0]
    module = seqkernels.nn.PositionalEncoding(E)
    module.table = torch.full_like(module.table, torch.nan)  # as in deferred initialisation
    assert torch.equal(run("", module)[0], want)
    assert torch.equal(run("", copy.deepcopy(module))[0], want)
    assert module.half().float().table.eq(seqkernels.nn.PositionalEncoding(E).table).all()
    table = module.table
    module.share_memory()
    assert module.table is table
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(run("", module)[0], want)


@pytest.mark.parametrize("name", MODULES)
def test_shapes_match_on_meta_and_fake_tensors(name: str) -> None:
    want = [t.shape for t in run(name, MODULES[name]())]
    assert [t.shape for t in run(name, MODULES[name](device="meta"), "meta")] == want
    with FakeTensorMode():
        assert [t.shape for t in run(name, MODULES[name]())] == want


def test_lengths_are_supported_on_meta_and_fake_tensors() -> None:
    x, lengths = torch.randn(T, B, E), [6, 2, 4]
    assert seqkernels.nn.LSTM(E, H, device="meta")(x.to("meta"), lengths=lengths)[0].shape == (T, B, H)
    packed = nn.utils.rnn.PackedSequence(torch.randn(5, E, device="meta"), torch.tensor([2, 2, 1]))
    for name in ("LSTM", "GRU", "RNN"):
        got = getattr(seqkernels.nn, name)(E, H, device="meta")(packed)
        want = getattr(nn, name)(E, H, device="meta")(packed)
        shapes = [[t.shape for t in torch.utils._pytree.tree_leaves((y.data, states))] for y, states in (got, want)]
        assert shapes[0] == shapes[1]
    with FakeTensorMode():
        y = seqkernels.nn.LSTM(E, H)(torch.randn(T, B, E), lengths=torch.tensor(lengths))[0]
    assert y.shape == (T, B, H)
    module = seqkernels.nn.LSTM(E, H)
    torch.set_default_device("meta")
    try:
        module(x, lengths=lengths)
    finally:
        torch.set_default_device(None)


# ---- attention: causal biases and jagged results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [causal_upper_left, causal_lower_right])
def test_causal_biases_match_is_causal(bias: Callable, dtype: torch.dtype) -> None:
    q, k = torch.randn(B, H, 4, E, dtype=dtype), torch.randn(B, H, 7, E, dtype=dtype)
    got = scaled_dot_product_attention(q, k, k, attn_mask=bias(4, 7))
    alignment = "upper_left" if bias is causal_upper_left else "lower_right"
    assert torch.equal(got, scaled_dot_product_attention(q, k, k, is_causal=True, causal_alignment=alignment))
    if dtype == torch.float32:
        close(got, nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=bias(4, 7)._materialize("cpu")))
    with pytest.raises(ValueError, match="attn_mask must be a CausalBias of the lengths of query and key"):
        scaled_dot_product_attention(q, k, k, attn_mask=bias(4, 6))
    with pytest.raises(ValueError, match="is_causal must be False with a CausalBias"):
        scaled_dot_product_attention(q, k, k, attn_mask=bias(4, 7), is_causal=True)


@pytest.mark.parametrize("options", [{"lengths": [3, 7, 1]}, {"window": 1}, {"alibi_slopes": torch.ones(H)}], ids=str)
def test_causal_biases_are_masks_with_other_options(options: dict) -> None:
    q, k = torch.randn(B, H, 4, E), torch.randn(B, H, 7, E)
    for bias in (causal_upper_left(4, 7), causal_lower_right(4, 7)):
        want = scaled_dot_product_attention(q, k, k, attn_mask=bias._materialize("cpu"), **options)
        close(scaled_dot_product_attention(q, k, k, attn_mask=bias, **options), want)


def test_causal_bias_matches_a_mask_in_multihead_attention() -> None:
    module, x = seqkernels.nn.MultiheadAttention(E, H), torch.randn(T, B, E)
    want = module(x, x, x, attn_mask=torch.ones(T, T).triu(1).bool())[0]
    close(module(x, x, x, attn_mask=causal_upper_left(T, T))[0], want)


def jagged(*lengths: int) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(n, E) for n in lengths], layout=torch.jagged)


def test_jagged_results_keep_their_lengths() -> None:
    x = jagged(3, 5, 2)
    results = {
        "MultiheadAttention": seqkernels.nn.MultiheadAttention(E, H, batch_first=True)(x, x, x)[0],
        "TransformerEncoderLayer": encoder(batch_first=True)(x),
        "TransformerDecoderLayer": decoder(batch_first=True)(x, x),
    }
    heads = x.unflatten(-1, (H, E // H)).transpose(1, 2)
    results["attention"] = scaled_dot_product_attention(heads, heads, heads).transpose(1, 2)
    ids = torch.nested.nested_tensor([torch.randint(9, (n,)) for n in (3, 5, 2)], layout=torch.jagged)
    results["Embedding"] = seqkernels.nn.Embedding(9, E)(ids)
    for name, y in results.items():
        assert (y._get_min_seqlen(), y._get_max_seqlen()) == (2, 5), name
        assert y.to_padded_tensor(0.0).shape[:2] == (3, 5), name


# ---- gradients


@pytest.mark.parametrize("name", [name for name in MODULES if name != "PositionalEncoding"])
def test_gradients_share_no_memory(name: str) -> None:
    module = MODULES[name]()
    outputs = [t for t in run(name, module) if t.requires_grad]
    grads = torch.autograd.grad([t.sum() for t in outputs], list(module.parameters()), allow_unused=True)
    pointers = [g.untyped_storage().data_ptr() for g in grads if g is not None and g.numel()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", [name for name in MODULES if name != "PositionalEncoding"])
def test_batched_gradients_match_a_loop(name: str) -> None:
    module = MODULES[name]()
    wanted = list(module.parameters())
    output = run(name, module)[0]
    upstream = torch.randn(3, *output.shape)
    got = torch.autograd.grad(output, wanted, upstream, is_grads_batched=True, retain_graph=True, allow_unused=True)
    for i, g in enumerate(upstream):
        for batched, want in zip(got, torch.autograd.grad(output, wanted, g, retain_graph=True, allow_unused=True)):
            assert (batched is None) == (want is None)
            if want is not None:
                close(batched[i], want, rtol=1e-4, atol=1e-5)


# ---- class identity and symbolic traces


def test_tables_are_tables_of_torch() -> None:
    assert isinstance(seqkernels.nn.Embedding(3, 2), nn.Embedding)
    assert isinstance(seqkernels.nn.EmbeddingBag(3, 2), nn.EmbeddingBag)


@pytest.mark.parametrize("name", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells_are_cells_of_torch(name: str) -> None:
    module, theirs = getattr(seqkernels.nn, name)(E, H, False), getattr(nn, name)(E, H, False)
    assert isinstance(module, type(theirs))
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(B, E)
    torch._dynamo.reset()
    close(torch.compile(module, backend="eager", fullgraph=True)(x), theirs(x))


class OursAndTorchLSTM(seqkernels.nn.LSTM, nn.LSTM):
    """The documented form of a layer for tools that look for torch.nn.LSTM."""


class OursAndTorchGRU(seqkernels.nn.GRU, nn.GRU):
    pass


class OursAndTorchRNN(seqkernels.nn.RNN, nn.RNN):
    pass


@pytest.mark.parametrize("cls", [OursAndTorchLSTM, OursAndTorchGRU, OursAndTorchRNN])
def test_layers_can_be_layers_of_torch(cls: type[nn.RNNBase]) -> None:
    ours, theirs = cls.__bases__
    given = E, H, 2, *(["relu"] if theirs is nn.RNN else []), True, True, 0.0, True
    module, like = cls(*given), theirs(*given)
    like.load_state_dict(module.state_dict())
    x = torch.randn(B, T, E)
    y = module(x)[0]
    close(y, like(x)[0])
    y.sum().backward()
    like(x)[0].sum().backward()
    for p, q in zip(module.parameters(), like.parameters(), strict=True):
        close(p.grad, q.grad)
    module.flatten_parameters()
    assert [p.shape for p in module._flat_weights] == [p.shape for p in like._flat_weights]
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(module), torch.load(buffer, weights_only=False)):
        assert isinstance(copied, theirs) and torch.equal(copied(x)[0], y)
    module.reset_parameters()
    # torch.compile refuses instances of torch.nn's layers and runs them in eager mode. It compiles ours.
    torch._dynamo.reset()
    close(torch.compile(module, backend="eager")(x)[0], module(x)[0])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN, GRU, or LSTM"):
        torch.compile(module, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    plain = ours(E, H)
    close(torch.compile(plain, backend="eager", fullgraph=True)(x)[0], plain(x)[0])


TABLES = [(name, sparse) for name in ("Embedding", "EmbeddingBag") for sparse in (False, True)]


def _gradients_of_tables(rank: int, folder: str) -> list[Tensor]:
    grads = []
    for name, sparse in TABLES:
        torch.manual_seed(0)
        options = {"mode": "sum"} if name == "EmbeddingBag" else {}
        table = getattr(seqkernels.nn, name)(9, 4, sparse=sparse, **options)
        model = nn.parallel.DistributedDataParallel(nn.Sequential(table, nn.Linear(4, 1)))
        model(torch.tensor([[1, 2 + rank]])).sum().backward()
        grads.append(table.weight.grad.to_dense())
    return grads


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_tables_in_distributed_data_parallel(tmp_path) -> None:
    """Each process has the mean of the gradients of both (pytorch#87497)."""
    for first, second in zip(*run_workers(_gradients_of_tables, tmp_path), strict=True):
        assert torch.equal(first, second) and first[[1, 2, 3]].any(1).all() and not first[[0, 4, 5, 6, 7, 8]].any()
        close(first[2], first[3])


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_leaves_of_symbolic_traces(name: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = MODULES[name]()

        def forward(self, x: Tensor) -> tuple:
            if name == "MultiheadAttention":
                return self.layer(x, x, x, need_weights=False)
            return self.layer(x, x) if name == "TransformerDecoderLayer" else self.layer(x)

    model = Model().eval()
    traced = torch.fx.symbolic_trace(model)
    assert [n.op for n in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    x = torch.randn(T, B, E)
    x = torch.randint(9, (B, 4)) if "Embedding" in name else x[0] if "Cell" in name else x
    leaves = torch.utils._pytree.tree_leaves
    for got, want in zip(leaves(traced(x)), leaves(model(x)), strict=True):
        assert got is want is None or torch.equal(got, want)
