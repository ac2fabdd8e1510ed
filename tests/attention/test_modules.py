"""MultiheadAttention, transformer layers, positions and the cache, against torch.nn's and against themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from seqkernels import nn

B, T, S, E, H = 3, 5, 7, 12, 3


@pytest.fixture(autouse=True)
def one_thread(threads):
    """Shapes here are too small for two."""
    torch.set_num_threads(1)


NESTED = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def pair_of(ours: type, theirs: type, *args, **kwargs):
    """Two modules of equal parameters, none of them 0, in float64."""
    torch.manual_seed(1)
    a = ours(*args, dtype=torch.float64, **kwargs)
    torch.manual_seed(1)
    b = theirs(*args, dtype=torch.float64, **kwargs)
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(p, q, rtol=0, atol=0)  # initial values are torch's
    with torch.no_grad():
        for p in b.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    a.load_state_dict(b.state_dict())
    return a, b


def attention_pair(*args, **kwargs):
    return pair_of(nn.MultiheadAttention, torch.nn.MultiheadAttention, *args, **kwargs)


def rand(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def grads_of(outputs, inputs, seed=3):
    """Gradients by random upstream ones, of every output that has one."""
    torch.manual_seed(seed)
    loss = sum((o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs if o is not None)
    return torch.autograd.grad(loss, inputs)


def check_same(ours, theirs, inputs, call, tol=1e-10):
    """call(module) gives outputs: they, and gradients of inputs and parameters, are equal."""
    got, want = call(ours), call(theirs)
    got, want = (o if isinstance(o, tuple) else (o,) for o in (got, want))
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert (g is None) == (w is None)
        if g is not None:
            assert g.shape == w.shape and g.dtype == w.dtype
            torch.testing.assert_close(g, w, rtol=tol, atol=tol)
    of = [
        grads_of(o, [*(i for i in inputs if i.requires_grad), *m.parameters()])
        for o, m in ((got, ours), (want, theirs))
    ]
    for g, w in zip(*of, strict=True):
        torch.testing.assert_close(g, w, rtol=tol, atol=tol)


# ---- MultiheadAttention against torch's

KINDS = {
    "plain": dict(),
    "batch first": dict(batch_first=True),
    "no bias": dict(bias=False),
    "kdim and vdim": dict(kdim=5, vdim=4),
    "bias_kv": dict(add_bias_kv=True),
    "zero_attn": dict(add_zero_attn=True, batch_first=True),
    "both": dict(add_bias_kv=True, add_zero_attn=True, kdim=5, bias=False),
}
MASKS = (
    "none", "padding", "padding with holes", "float padding", "bool", "float", "bool by head", "float by head",
    "bool and padding", "float and holes", "is_causal",
)  # fmt: skip


def masks_of(kind: str, batched: bool = True):
    padding = torch.arange(S) >= torch.tensor([S, 4, 1]).view(-1, 1)
    holes = torch.zeros(B, S, dtype=torch.bool)
    holes[0, 0] = holes[1, 2] = holes[2, 3:5] = True
    some = torch.rand(T, S) < 0.4
    some[:, 0] = False
    by_head = torch.rand(B * H if batched else H, T, S) < 0.4
    by_head[..., 0] = False
    if not batched:
        padding, holes = padding[1], holes[1]
    return {
        "none": {},
        "padding": dict(key_padding_mask=padding),
        "padding with holes": dict(key_padding_mask=holes),
        "float padding": dict(key_padding_mask=rand(*padding.shape)),
        "bool": dict(attn_mask=some),
        "float": dict(attn_mask=rand(T, S)),
        "bool by head": dict(attn_mask=by_head),
        "float by head": dict(attn_mask=rand(*by_head.shape)),
        "bool and padding": dict(attn_mask=some, key_padding_mask=padding),
        "float and holes": dict(
            attn_mask=rand(T, S),
            key_padding_mask=torch.zeros(holes.shape, dtype=torch.float64).masked_fill(holes, -math.inf),
        ),
        "is_causal": dict(attn_mask=torch.ones(T, S, dtype=torch.bool).triu(1), is_causal=True),
    }[kind]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_as_torch(kind, mask):
    options = KINDS[kind]
    ours, theirs = attention_pair(E, H, **options)
    first = options.get("batch_first", False)
    sizes = {"query": (T, E), "key": (S, options.get("kdim", E)), "value": (S, options.get("vdim", E))}
    inputs = [rand(B, t, e) if first else rand(t, B, e) for t, e in sizes.values()]
    masks = masks_of(mask)
    moving = inputs + [m for m in masks.values() if isinstance(m, torch.Tensor) and m.requires_grad]
    for more in (dict(), dict(average_attn_weights=False), dict(need_weights=False)):
        if mask == "is_causal" and "need_weights" in more and options.get("add_bias_kv", options.get("add_zero_attn")):
            continue  # torch's hides the added keys there
        check_same(ours, theirs, moving, lambda m, more=more: m(*inputs, **masks, **more))


@pytest.mark.parametrize("mask", MASKS)
def test_unbatched_as_torch(mask):
    ours, theirs = attention_pair(E, H, batch_first=True)
    inputs = [rand(T, E), rand(S, E), rand(S, E)]
    masks = masks_of(mask, batched=False)
    moving = inputs + [m for m in masks.values() if isinstance(m, torch.Tensor) and m.requires_grad]
    for more in (dict(), dict(average_attn_weights=False), dict(need_weights=False)):
        check_same(ours, theirs, moving, lambda m, more=more: m(*inputs, **masks, **more))


@pytest.mark.parametrize("first", [False, True])
def test_attention_to_itself_and_to_one_memory(first):
    ours, theirs = attention_pair(E, H, batch_first=first)
    x, memory = rand(B, B, E), rand(S, B, E)
    if first:
        memory = rand(B, S, E)
    check_same(ours, theirs, [x], lambda m: m(x, x, x))
    check_same(ours, theirs, [x, memory], lambda m: m(x, memory, memory, need_weights=False))


def test_nothing_to_attend_to_as_torch():
    ours, theirs = attention_pair(E, H)
    for b, t, s in ((0, T, S), (B, 0, S), (B, T, 0), (0, 0, 0)):
        q, k = rand(t, b, E), rand(s, b, E)
        for need_weights in (True, False):
            got, want = (m(q, k, k, need_weights=need_weights) for m in (ours, theirs))
            for g, w in zip(got, want):
                assert (g is None) == (w is None)
                assert g is None or torch.equal(g, w)
            assert all(g.isfinite().all() for g in torch.autograd.grad(got[0].sum(), [q, k, *ours.parameters()]))


def test_state_dict_both_ways_and_old_checkpoints():
    for options in KINDS.values():
        ours, theirs = attention_pair(E, H, **options)
        theirs.load_state_dict(ours.state_dict())
        assert list(ours.state_dict()) == list(theirs.state_dict())
    copied = copy.deepcopy(ours)
    for p, q in zip(copied.parameters(), ours.parameters()):
        assert torch.equal(p, q) and p is not q


def test_constructor_errors_as_torch():
    for kwargs in (dict(embed_dim=0, num_heads=1), dict(embed_dim=4, num_heads=0), dict(embed_dim=5, num_heads=2)):
        with pytest.raises((ValueError, AssertionError)) as theirs:
            torch.nn.MultiheadAttention(**kwargs)
        with pytest.raises(theirs.type) as ours:
            nn.MultiheadAttention(**kwargs)
        assert str(ours.value) == str(theirs.value)


def test_evaluation_is_as_torch():
    """Torch goes another way there."""
    ours, theirs = attention_pair(E, 2, batch_first=True)
    ours.eval(), theirs.eval()
    x = rand(B, S, E, grad=False)
    padding = masks_of("padding")["key_padding_mask"]
    with torch.no_grad():
        for masks in (dict(), dict(key_padding_mask=padding)):
            for got, want in zip(ours(x, x, x, **masks), theirs(x, x, x, **masks)):
                torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# ---- where it is not torch's


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_sample_of_padding_alone_gives_zeros(training, need_weights):
    ours, _ = attention_pair(E, H, batch_first=True)
    ours.train(training)
    torch.nn.init.zeros_(ours.out_proj.bias)
    x = rand(B, S, E)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1] = True
    for mask in (padding, torch.zeros(B, S, dtype=torch.float64).masked_fill(padding, -math.inf)):
        out, weights = ours(x, x, x, key_padding_mask=mask, need_weights=need_weights)
        assert out[1].abs().max() == 0 and out[0].abs().min() > 0
        assert weights is None or weights[1].abs().max() == 0
        for grad in torch.autograd.grad(out.sum(), [x, *ours.parameters()]):
            assert grad.isfinite().all()
    x2 = x.detach().clone()
    x2[1] = math.nan  # nor does what is padding reach another sample
    out, _ = ours(x.detach(), x2, x2, key_padding_mask=padding, need_weights=need_weights)
    assert out.isfinite().all()


def test_is_causal_alone_and_with_another_mask():
    ours, theirs = attention_pair(E, H)
    q, k = rand(T, B, E), rand(S, B, E)
    causal = torch.ones(T, S, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(q, k, k, is_causal=True), theirs(q, k, k, attn_mask=causal))
    bias = rand(B * H, T, S)
    want = theirs(q, k, k, attn_mask=bias.masked_fill(causal, -math.inf))
    torch.testing.assert_close(ours(q, k, k, attn_mask=bias, is_causal=True), want)
    extra, theirs = attention_pair(E, H, add_bias_kv=True)
    want = theirs(q, k, k, attn_mask=causal, need_weights=False)[0]
    got = extra(q, k, k, is_causal=True)[0]
    torch.testing.assert_close(got, theirs(q, k, k, attn_mask=causal)[0])
    torch.testing.assert_close(got, want)


def test_masks_of_different_types():
    ours, theirs = attention_pair(E, H)
    q, k = rand(T, B, E), rand(S, B, E)
    padding, bias = masks_of("padding with holes")["key_padding_mask"], rand(T, S)
    written = torch.zeros(B, S, dtype=torch.float64).masked_fill(padding, -math.inf)
    want = theirs(q, k, k, attn_mask=bias, key_padding_mask=written)
    torch.testing.assert_close(ours(q, k, k, attn_mask=bias, key_padding_mask=padding), want)
    torch.testing.assert_close(ours(q, k, k, attn_mask=bias.float().double(), key_padding_mask=written.float()),
                               theirs(q, k, k, attn_mask=bias.float().double(), key_padding_mask=written))  # fmt: skip


@pytest.mark.parametrize("options", [dict(), dict(add_bias_kv=True, add_zero_attn=True)])
def test_lengths_are_a_padding_mask(options):
    ours, _ = attention_pair(E, H, batch_first=True, **options)
    q, k = rand(B, T, E), rand(B, S, E)
    lengths = torch.tensor([S, 0, 2])
    padding = torch.arange(S) >= lengths.view(-1, 1)
    holes = masks_of("padding with holes")["key_padding_mask"]
    want = ours(q, k, k, key_padding_mask=padding)
    torch.testing.assert_close(ours(q, k, k, lengths=lengths), want)
    torch.testing.assert_close(ours(q, k, k, lengths=[S, 0, 2]), want)
    want = ours(q, k, k, key_padding_mask=padding | holes, is_causal=True)
    torch.testing.assert_close(ours(q, k, k, lengths=lengths, key_padding_mask=holes, is_causal=True), want)
    want = ours(q, k, k, key_padding_mask=padding)
    got = ours(q, k, k, lengths=lengths, key_padding_mask=torch.zeros(B, S, dtype=torch.bool))
    torch.testing.assert_close(got, want)


def test_dropout_is_of_weights():
    ours, _ = attention_pair(E, H, batch_first=True, dropout=0.4)
    x = rand(2, 20, E)
    out, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.25 < (weights == 0).double().mean() < 0.55
    v = F.linear(x, ours.in_proj_weight[2 * E :], ours.in_proj_bias[2 * E :]).unflatten(-1, (H, -1)).transpose(1, 2)
    torch.testing.assert_close(out, ours.out_proj((weights @ v).transpose(1, 2).flatten(2)))
    ours.eval()
    assert torch.equal(ours(x, x, x)[0], ours(x, x, x)[0])


# ---- packed and nested

LENGTHS = (4, 0, 7, 1)


def packed_of(padded: torch.Tensor, lengths=LENGTHS) -> torch.Tensor:
    return torch.cat([row[:n] for row, n in zip(padded, lengths)])


def cu_of(lengths=LENGTHS) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)])


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_is_padded(is_causal):
    ours, _ = attention_pair(E, H, batch_first=True)
    x, memory = rand(4, 7, E), rand(4, S, E)
    of_memory = (2, 3, 7, 0)
    lengths, cu = torch.tensor(LENGTHS), cu_of()
    rows, memory_rows = packed_of(x), packed_of(memory, of_memory)
    want = packed_of(ours(x, x, x, lengths=lengths, is_causal=is_causal)[0])
    got, weights = ours(rows, rows, rows, cu_seqlens_q=cu, is_causal=is_causal)
    assert weights is None
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(ours(rows, rows, rows, cu_seqlens_q=cu, max_seqlen_q=7, is_causal=is_causal)[0], want)
    for g, w in zip(grads_of([got], [x, *ours.parameters()]), grads_of([want], [x, *ours.parameters()])):
        torch.testing.assert_close(g, w)
    want = packed_of(ours(x, memory, memory, lengths=torch.tensor(of_memory), is_causal=is_causal)[0])
    got, _ = ours(rows, memory_rows, memory_rows, cu_seqlens_q=cu, cu_seqlens_k=cu_of(of_memory), is_causal=is_causal)
    torch.testing.assert_close(got, want)


@NESTED
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested(layout):
    ours, _ = attention_pair(E, H)
    lengths = (4, 1, 7)
    parts = [rand(n, E, grad=False) for n in lengths]
    memory = [rand(n + 1, E, grad=False) for n in lengths]
    nested, other = (torch.nested.nested_tensor(p, layout=layout) for p in (parts, memory))
    with torch.no_grad():
        for got, keys in ((ours(nested, nested, nested), parts), (ours(nested, other, other), memory)):
            assert got[0].is_nested and got[1] is None
            for row, part, key in zip(got[0].unbind(), parts, keys):
                torch.testing.assert_close(row, ours(part, key, key)[0])


# ---- the cache


@pytest.mark.parametrize("first", [False, True])
def test_one_step_at_a_time_is_all_at_once(first):
    ours, _ = attention_pair(E, H, batch_first=first)
    steps = [1, 1, 3, 1]
    x = rand(B, sum(steps), E, grad=False)
    given = x if first else x.transpose(0, 1)
    want, weights = ours(given, given, given, is_causal=True)
    cache = ours.new_cache(B, sum(steps))
    at = 0
    with torch.no_grad():
        for n in steps:
            now = given.narrow(1 if first else 0, at, n)
            out, w = ours(now, now, now, is_causal=True, cache=cache)
            torch.testing.assert_close(out, want.narrow(1 if first else 0, at, n))
            at += n
            torch.testing.assert_close(w, weights[:, at - n : at, :at])
            assert cache.longest == at and cache.lengths.tolist() == [at] * B
        with pytest.raises(ValueError, match=r"KeyValueCache: steps must fit the capacity of 6, got 1 after 6"):
            ours(now[:1] if not first else now[:, :1], *[now[:1] if not first else now[:, :1]] * 2, cache=cache)
    cache.reset()
    assert cache.longest == 0 and cache.lengths.tolist() == [0] * B


def test_prompts_of_different_lengths_then_steps():
    ours, _ = attention_pair(E, H, batch_first=True)
    lengths = [4, 2, 5]
    x = rand(B, 8, E, grad=False)
    cache = ours.new_cache(B, 8)
    with torch.no_grad():
        prompt = x[:, :5].clone()
        for b, n in enumerate(lengths):
            prompt[b, n:] = math.nan
        out, _ = ours(prompt, prompt, prompt, need_weights=False, is_causal=True, cache=cache, lengths=lengths)
        for b, n in enumerate(lengths):
            want = ours(*[x[b : b + 1, :n]] * 3, is_causal=True)[0][0]
            torch.testing.assert_close(out[b, :n], want)
        for step in range(3):
            now = torch.stack([x[b, n + step] for b, n in enumerate(lengths)]).unsqueeze(1)
            out, _ = ours(now, now, now, need_weights=False, is_causal=True, cache=cache)
            for b, n in enumerate(lengths):
                want = ours(*[x[b : b + 1, : n + step + 1]] * 3, is_causal=True)[0][0, -1]
                torch.testing.assert_close(out[b, 0], want)
        assert cache.lengths.tolist() == [7, 5, 8]


def test_cache_is_reordered():
    ours, _ = attention_pair(E, H, batch_first=True)
    x, index = rand(B, 4, E, grad=False), torch.tensor([2, 0, 0])
    cache = ours.new_cache(B, 4)
    with torch.no_grad():
        ours(*[x[:, :3]] * 3, cache=cache)
        cache.reorder(index)
        out, _ = ours(*[x[:, 3:]] * 3, cache=cache)
        both = torch.cat((x[index, :3], x[:, 3:]), 1)
        torch.testing.assert_close(out, ours(both, both, both)[0][:, 3:])


# ---- layers against torch's

LAYERS = {
    "post-norm": dict(),
    "pre-norm": dict(norm_first=True, batch_first=True),
    "gelu": dict(activation="gelu", batch_first=True, layer_norm_eps=1e-3),
    "a function": dict(activation=torch.tanh, bias=False),
}


def encoder_pair(**options):
    ours, theirs = pair_of(
        nn.TransformerEncoderLayer, torch.nn.TransformerEncoderLayer, E, H, 16, dropout=0.0, **options
    )
    assert type(ours.self_attn) is nn.MultiheadAttention
    return ours, theirs


def decoder_pair(**options):
    return pair_of(nn.TransformerDecoderLayer, torch.nn.TransformerDecoderLayer, E, H, 16, dropout=0.0, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_encoder_layer_as_torch(kind):
    options = LAYERS[kind]
    ours, theirs = encoder_pair(**options)
    x = rand(B, T, E) if options.get("batch_first") else rand(T, B, E)
    padding = torch.arange(T) >= torch.tensor([T, 2, 1]).view(-1, 1)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    for masks in (
        dict(),
        dict(src_key_padding_mask=padding),
        dict(src_mask=causal),
        dict(src_mask=causal, is_causal=True),
        dict(src_mask=causal, src_key_padding_mask=padding, is_causal=True),
    ):
        check_same(ours, theirs, [x], lambda m, masks=masks: m(x, **masks))
    check_same(ours, theirs, [x], lambda m: m(x[:, 0]))
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_decoder_layer_as_torch(kind):
    options = LAYERS[kind]
    ours, theirs = decoder_pair(**options)
    first = options.get("batch_first", False)
    x, memory = (rand(B, n, E) if first else rand(n, B, E) for n in (T, S))
    padding = torch.arange(T) >= torch.tensor([T, 2, 1]).view(-1, 1)
    of_memory = torch.arange(S) >= torch.tensor([S, 2, 4]).view(-1, 1)
    causal = torch.ones(T, T, dtype=torch.bool).triu(1)
    for masks in (
        dict(),
        dict(tgt_mask=causal, tgt_is_causal=True, memory_key_padding_mask=of_memory),
        dict(tgt_key_padding_mask=padding, memory_mask=rand(T, S, grad=False)),
    ):
        check_same(ours, theirs, [x, memory], lambda m, masks=masks: m(x, memory, **masks))
    theirs.load_state_dict(ours.state_dict())


@NESTED
@pytest.mark.parametrize("training", [True, False])
def test_in_a_torch_stack(training):
    """In evaluation torch makes a nested tensor of a padded batch."""
    options = dict(d_model=E, nhead=2, dim_feedforward=16, dropout=0.0, batch_first=True, dtype=torch.float64)
    stacks = []
    for layers in (nn, torch.nn):
        torch.manual_seed(5)
        encoder = torch.nn.TransformerEncoder(layers.TransformerEncoderLayer(**options), 2)
        decoder = torch.nn.TransformerDecoder(layers.TransformerDecoderLayer(**options), 2)
        stacks.append(torch.nn.ModuleList((encoder, decoder)).train(training))
    x, memory = rand(B, T, E, grad=False), rand(B, S, E, grad=False)
    padding = torch.arange(S) >= torch.tensor([S, 2, 4]).view(-1, 1)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)

    def run(stack):
        encoder, decoder = stack
        seen = encoder(memory, src_key_padding_mask=padding)
        return seen, decoder(x, seen, tgt_mask=causal, memory_key_padding_mask=padding)

    with torch.set_grad_enabled(training):
        for got, want in zip(run(stacks[0]), run(stacks[1])):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    model = torch.nn.Transformer(
        E, 2, custom_encoder=stacks[0][0], custom_decoder=stacks[0][1], batch_first=True, dtype=torch.float64
    )
    assert model(memory, x, tgt_mask=causal).shape == x.shape


@NESTED
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer_packed_nested_and_lengths(norm_first):
    ours, _ = encoder_pair(norm_first=norm_first, batch_first=True)
    x, lengths = rand(4, 7, E), torch.tensor(LENGTHS)
    padding = torch.arange(7) >= lengths.view(-1, 1)
    rows = packed_of(x)
    for causal in (False, True):
        want = packed_of(ours(x, src_key_padding_mask=padding, is_causal=causal))
        torch.testing.assert_close(packed_of(ours(x, lengths=lengths, is_causal=causal)), want)
        got = ours(rows, cu_seqlens=cu_of(), is_causal=causal)
        torch.testing.assert_close(got, want)
        for g, w in zip(grads_of([got], [x, *ours.parameters()]), grads_of([want], [x, *ours.parameters()])):
            torch.testing.assert_close(g, w)
    jagged = torch.nested.nested_tensor_from_jagged(rows, cu_of())
    torch.testing.assert_close(ours(jagged, is_causal=True).values(), want)


def test_decoder_layer_packed_nested_and_lengths():
    ours, _ = decoder_pair(batch_first=True)
    x, memory = rand(4, 7, E), rand(4, S, E)
    of_memory = (2, 3, 7, 0)
    rows, memory_rows = packed_of(x), packed_of(memory, of_memory)
    padding = torch.arange(S) >= torch.tensor(of_memory).view(-1, 1)
    want = packed_of(ours(x, memory, tgt_is_causal=True, memory_key_padding_mask=padding))
    lengths = dict(lengths=torch.tensor(LENGTHS), memory_lengths=torch.tensor(of_memory))
    torch.testing.assert_close(packed_of(ours(x, memory, tgt_is_causal=True, **lengths)), want)
    cu = dict(cu_seqlens=cu_of(), memory_cu_seqlens=cu_of(of_memory))
    torch.testing.assert_close(ours(rows, memory_rows, tgt_is_causal=True, **cu), want)
    jagged, other = (torch.nested.nested_tensor_from_jagged(*of) for of in zip((rows, memory_rows), cu.values()))
    torch.testing.assert_close(ours(jagged, other, tgt_is_causal=True).values(), want)


def test_layers_with_a_cache():
    encoder, _ = encoder_pair(batch_first=True, norm_first=True)
    decoder, _ = decoder_pair(batch_first=True)
    x, memory = rand(B, T, E, grad=False), rand(B, S, E, grad=False)
    of_memory = torch.tensor([S, 2, 4])
    with torch.no_grad():
        want = encoder(x, is_causal=True)
        want_decoded = decoder(x, memory, tgt_is_causal=True, memory_lengths=of_memory)
        cache, caches = encoder.new_cache(B, T), decoder.new_cache(B, T, S)
        for t in range(T):
            now = x[:, t : t + 1]
            torch.testing.assert_close(encoder(now, is_causal=True, cache=cache), want[:, t : t + 1])
            more = dict(memory_lengths=of_memory) if t == 0 else dict()
            out = decoder(now, memory if t == 0 else None, tgt_is_causal=True, cache=caches, **more)
            torch.testing.assert_close(out, want_decoded[:, t : t + 1])


def test_dropout_in_layers():
    """All of it falls out in training: what stays is the norm of what came in."""
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=1.0, dtype=torch.float64)
    x = rand(T, B, E)
    torch.testing.assert_close(layer(x), layer.norm2(layer.norm1(x)))
    layer.eval()
    assert not torch.allclose(layer(x), layer.norm2(layer.norm1(x)))


# ---- positions


def test_positions():
    for width in (E, 5, 1):
        table = nn.PositionalEncoding(width, max_len=50, dtype=torch.float64).table
        for p in (0, 1, 7, 49):
            for c in range(width):
                angle = p / 10000 ** (c // 2 * 2 / width)
                assert table[p, c].item() == pytest.approx(math.cos(angle) if c % 2 else math.sin(angle), abs=1e-12)
    encode, first = nn.PositionalEncoding(E, max_len=50), nn.PositionalEncoding(E, max_len=50, batch_first=True)
    x = torch.randn(B, T, E)
    want = x + encode.table[:T]
    assert not encode.state_dict()
    assert torch.equal(first(x), want)
    assert torch.equal(encode(x.transpose(0, 1)), want.transpose(0, 1))
    assert torch.equal(encode(x[0]), want[0])
    assert torch.equal(first(x[:, 3:], 3), want[:, 3:])
    offsets = torch.tensor([0, 4, 45])
    want = torch.stack([x[b] + encode.table[o : o + T] for b, o in enumerate(offsets)])
    assert torch.equal(first(x, offsets), want)
    assert torch.equal(encode(x.transpose(0, 1), offsets.int()), want.transpose(0, 1))
    assert torch.equal(first(x[1], offsets[1:2]), want[1])
    assert first(x.bfloat16()).dtype == torch.bfloat16


def test_positions_of_packed_rows():
    encode = nn.PositionalEncoding(E, max_len=50)
    x = torch.randn(4, 7, E)
    rows, cu = packed_of(x), cu_of()
    assert torch.equal(encode(rows, cu_seqlens=cu), packed_of(x + encode.table[:7]))
    offsets = torch.tensor([1, 2, 3, 4])
    want = packed_of(torch.stack([x[s] + encode.table[o : o + 7] for s, o in enumerate(offsets)]))
    assert torch.equal(encode(rows, offsets, cu.int()), want)
    assert torch.equal(encode(rows, 2, cu), packed_of(x + encode.table[2:9]))


def test_dropout_of_positions():
    encode = nn.PositionalEncoding(E, dropout=0.5)
    x = torch.ones(T, B, E)
    assert (encode(x) == 0).float().mean() > 0.2
    assert (encode.eval()(x) == 0).float().mean() < 0.1


# ---- torch's machinery


def test_autocast():
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True)
    x = torch.randn(B, T, E)
    want = layer(x, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x, is_causal=True)
        assert layer.self_attn(x, x, x)[0].dtype == torch.bfloat16
        bias = torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
        torch.testing.assert_close(layer(x, bias), got)
    torch.testing.assert_close(got.float(), want, rtol=0.05, atol=0.05)
    got.float().sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    ours, _ = attention_pair(E, H, batch_first=True)
    x, bias = rand(B, T, E, grad=False), rand(T, T, grad=False)
    want = ours(x, x, x, attn_mask=bias)
    ours = ours.to(dtype)
    got = ours(*[x.to(dtype)] * 3, attn_mask=bias.float())  # a mask of another dtype is converted
    assert got[0].dtype == got[1].dtype == dtype
    tol = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close([g.double() for g in got], list(want), rtol=tol, atol=tol)


def test_second_derivatives():
    ours, theirs = attention_pair(4, 2)
    x, bias = rand(3, 2, 4), rand(3, 3)

    def of(module, x, bias):
        out, weights = module(x, x, x, attn_mask=bias)
        return out.sin().sum() + weights.square().sum()

    results = []
    for module in (ours, theirs):
        first = torch.autograd.grad(of(module, x, bias), [x, bias, module.in_proj_weight], create_graph=True)
        loss = sum(g.square().sum() for g in first)
        results.append(torch.autograd.grad(loss, [x, bias, module.in_proj_weight]))
    torch.testing.assert_close(*results)
    assert torch.autograd.gradcheck(lambda x: ours(x, x, x)[0], x)


def test_checkpointing_and_forward_mode():
    layer, x = nn.TransformerEncoderLayer(E, H, 16, dropout=0.3, dtype=torch.float64), rand(T, B, E)
    grads = []
    for run in (layer, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(0)
        grads += torch.autograd.grad(run(x).square().sum(), x)
    assert torch.equal(*grads)
    layer.eval()
    tangent = rand(T, B, E, grad=False)
    with torch.autograd.forward_ad.dual_level():
        out = layer(torch.autograd.forward_ad.make_dual(x.detach(), tangent))
        got = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(got, torch.autograd.functional.jvp(layer, x, tangent)[1])


def test_vmap_and_functional_call():
    ours, _ = attention_pair(E, H)
    x = rand(4, T, B, E, grad=False)
    got = torch.vmap(lambda x: ours(x, x, x, need_weights=False)[0])(x)
    torch.testing.assert_close(got, torch.stack([ours(y, y, y)[0] for y in x]))
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(ours, parameters, (x, x, x))[0].square().sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for b in range(4):
        want = torch.func.grad(loss)(parameters, x[b])
        torch.testing.assert_close(each["in_proj_weight"][b], want["in_proj_weight"])


def test_compile_fullgraph():
    torch._dynamo.reset()
    layer, x = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), torch.randn(B, T, E)
    padding = torch.arange(T) >= torch.tensor([T, 2, 0]).view(-1, 1)

    def step(x, padding):
        return layer(x, src_key_padding_mask=padding, is_causal=True)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = compiled(x, padding), step(x, padding)
    torch.testing.assert_close(got, want)
    for g, w in zip(grads_of([got], list(layer.parameters())), grads_of([want], list(layer.parameters()))):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)

    decoder, rows = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0), torch.randn(12, E)
    encode = nn.PositionalEncoding(E)

    def packed(rows, cu):
        rows = encode(rows, cu_seqlens=cu)
        return decoder(rows, rows, cu_seqlens=cu, memory_cu_seqlens=cu, tgt_is_causal=True)

    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(rows, cu_of()), packed(rows, cu_of()))


def test_compile_decoding():
    torch._dynamo.reset()
    ours, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, T, E)
    cache = ours.new_cache(B, T)

    def step(x, cache):
        return ours(x, x, x, need_weights=False, is_causal=True, cache=cache)[0]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    with torch.no_grad():
        want = ours(x, x, x, need_weights=False, is_causal=True)[0]
        for t in range(T):
            torch.testing.assert_close(compiled(x[:, t : t + 1], cache), want[:, t : t + 1])


def test_export():
    layer, x = nn.TransformerEncoderLayer(E, H, 16, batch_first=True).eval(), torch.randn(B, T, E)
    padding = torch.arange(T) >= torch.tensor([T, 2, 0]).view(-1, 1)
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (x, None, padding), dynamic_shapes=(dims, None, dims))
    torch.testing.assert_close(program.module()(x, None, padding), layer(x, None, padding))
    x, padding = torch.randn(4, 9, E), torch.arange(9) >= torch.tensor([9, 2, 0, 4]).view(-1, 1)
    torch.testing.assert_close(program.module()(x, None, padding), layer(x, None, padding))


# ---- errors


def test_errors():
    ours = nn.MultiheadAttention(E, H)
    first = nn.MultiheadAttention(E, H, batch_first=True)
    x, cu = torch.randn(T, B, E), torch.tensor([0, 2, T])
    rows = torch.randn(T, E)
    cache = first.new_cache(B, 4)
    y = torch.randn(B, 2, E)
    extra = nn.MultiheadAttention(E, H, add_zero_attn=True)
    padding = torch.zeros(B, T, dtype=torch.bool)
    for error, text, call in (
        (TypeError, "query must be a tensor, got list", lambda: ours([1], x, x)),
        (TypeError, "key must be a tensor, got NoneType", lambda: ours(x, None, None)),
        (ValueError, r"query must have 2 or 3 dimensions, got \[12\]", lambda: ours(x[0, 0], x, x)),
        (ValueError, r"key must have as many dimensions as query, 3, got \[5, 12\]", lambda: ours(x, rows, rows)),
        (ValueError, "value must have 12 columns, got 6", lambda: ours(x, x, x[..., :6])),
        (ValueError, r"value must have as many rows as key, \[5, 3\], got \[4, 3\]", lambda: ours(x, x, x[1:])),
        (ValueError, r"key must have as many sequences as query, 3, got 2 \(batch_first is False\)",
         lambda: ours(x, x[:, 1:], x[:, 1:])),
        (TypeError, "attn_mask must be bool or floating, got torch.int64",
         lambda: ours(x, x, x, attn_mask=torch.zeros(T, T).long())),
        (ValueError, r"attn_mask must have shape \[5, 5\] or \[9, 5, 5\], got \[5, 4\]",
         lambda: ours(x, x, x, attn_mask=torch.zeros(T, 4))),
        (ValueError, r"attn_mask must have shape \[5, 5\], got \[5, 4\]",
         lambda: ours(x, x, x, attn_mask=torch.zeros(T, 4), is_causal=True)),
        (TypeError, "key_padding_mask must be a tensor, got list", lambda: ours(x, x, x, [True])),
        (ValueError, r"key_padding_mask must have shape \[3, 5\], got \[5, 3\]", lambda: ours(x, x, x, padding.T)),
        (ValueError, r"key_padding_mask must have shape \[5\], got \[1, 5\]",
         lambda: ours(rows, rows, rows, padding[:1])),
        (ValueError, "max_seqlen_q must be None without cu_seqlens_q", lambda: ours(x, x, x, max_seqlen_q=3)),
        (ValueError, "attn_mask must be None for packed sequences",
         lambda: ours(rows, rows, rows, cu_seqlens_q=cu, attn_mask=torch.zeros(T, T))),
        (ValueError, "query must have 2 dimensions with cu_seqlens_q", lambda: ours(x, x, x, cu_seqlens_q=cu)),
        (NotImplementedError, "add_bias_kv and add_zero_attn must be False for packed sequences",
         lambda: extra(rows, rows, rows, cu_seqlens_q=cu)),
        (NotImplementedError, "add_bias_kv and add_zero_attn must be False for cached sequences",
         lambda: extra(x, x, x, cache=cache)),
        (NotImplementedError, "lengths must be those of keys only with add_bias_kv or add_zero_attn",
         lambda: extra(x, x, x, lengths=(cu, cu))),
        (ValueError, "query must have 3 dimensions with cache", lambda: first(rows, rows, rows, cache=cache)),
        (ValueError, "key_padding_mask must be None with cache", lambda: first(y, y, y, padding, cache=cache)),
        (ValueError, "key and value must both be None, or neither", lambda: first(y, y, None, cache=cache)),
        (ValueError, "is_causal must be False without key and value",
         lambda: first(y, None, None, is_causal=True, cache=cache)),
        (ValueError, "lengths must be None without key and value",
         lambda: first(y, None, None, lengths=[1, 1, 1], cache=cache)),
        (ValueError, "query must have as many sequences as the cache, 3, got 2",
         lambda: first(y[1:], None, None, cache=cache)),
    ):  # fmt: skip
        with pytest.raises(error, match=f"MultiheadAttention: {text}"):
            call()
    with pytest.raises(RuntimeError, match="KeyValueCache: key must not require a gradient; decode under"):
        first(y, y, y, cache=cache)
    k = torch.randn(B, H, 2, E // H)
    for error, text, call in (
        (ValueError, r"key must have shape \[3, 3, T, 4\], got \[3, 2, 4\]", lambda: cache.append(k[:, 0], k)),
        (ValueError, r"value must have shape \[3, 3, T, 4\], got \[3, 3, 2, 3\]", lambda: cache.append(k, k[..., 1:])),
        (ValueError, "value must have as many steps as key, 2, got 1", lambda: cache.append(k, k[:, :, 1:])),
        (TypeError, "key must be of the cache's dtype torch.float32, got torch.float64",
         lambda: cache.append(k.double(), k)),
        (ValueError, "steps must fit the capacity of 4, got 6 after 0",
         lambda: cache.append(*[k.repeat(1, 1, 3, 1)] * 2)),
        (ValueError, r"lengths must have shape \[B\] = \[3\], got \[2\]", lambda: cache.append(k, k, [1, 2])),
        (TypeError, "lengths must be int32 or int64, got torch.float32",
         lambda: cache.append(k, k, torch.ones(3))),
        (ValueError, r"lengths must be between 0 and the 2 steps, got \[1, 3, 0\]",
         lambda: cache.append(k, k, [1, 3, 0])),
    ):  # fmt: skip
        with pytest.raises(error, match=f"KeyValueCache: {text}"):
            call()
    assert cache.longest == 0


def test_errors_of_layers_and_positions():
    decoder, x = nn.TransformerDecoderLayer(E, H, 16), torch.randn(T, B, E)
    cu, rows = torch.tensor([0, 2, T]), torch.randn(T, E)
    jagged = torch.nested.nested_tensor_from_jagged(rows, cu)
    for text, call in (
        ("memory must be given without cache", lambda: decoder(x, None)),
        ("memory must be given in the first call", lambda: decoder(x, None, cache=decoder.new_cache(B, 5, 5))),
        ("cu_seqlens and memory_cu_seqlens must both be given", lambda: decoder(rows, rows, cu_seqlens=cu)),
        ("memory must be nested and cu_seqlens None", lambda: decoder(jagged, rows)),
    ):
        with pytest.raises(ValueError, match=f"TransformerDecoderLayer: {text}"):
            call()
    with pytest.raises(ValueError, match="TransformerEncoderLayer: cu_seqlens must be None if src is nested"):
        nn.TransformerEncoderLayer(E, H, 16)(jagged, cu_seqlens=cu)
    with pytest.raises(RuntimeError, match="activation should be relu/gelu, not swish"):
        nn.TransformerEncoderLayer(E, H, 16, activation="swish")
    encode = nn.PositionalEncoding(E, max_len=8)
    for error, text, call in (
        (ValueError, "d_model must be at least 1, got 0", lambda: nn.PositionalEncoding(0)),
        (ValueError, "max_len must be at least 1, got 0", lambda: nn.PositionalEncoding(4, max_len=0)),
        (ValueError, r"x must have 2 or 3 dimensions and 12 columns, got \[5, 3, 6\]", lambda: encode(x[..., :6])),
        (ValueError, r"positions must be in \[0, max_len = 8\), got 4 to 8", lambda: encode(x, 4)),
        (ValueError, r"positions must be in \[0, max_len = 8\), got -1 to 3", lambda: encode(x, -1)),
        (TypeError, "offsets must be int32 or int64, got torch.float32", lambda: encode(x, torch.ones(B))),
        (ValueError, r"offsets must have shape \[B\] = \[3\], got \[5\]", lambda: encode(x, torch.arange(5))),
        (ValueError, r"x must have 2 dimensions with cu_seqlens, got \[5, 3, 12\]", lambda: encode(x, 0, cu)),
        (TypeError, "cu_seqlens must be int32 or int64, got torch.float32", lambda: encode(rows, 0, cu.float())),
        (ValueError, r"cu_seqlens must have shape \[S \+ 1\], got \[\]", lambda: encode(rows, 0, cu[0])),
        (ValueError, r"offsets must have shape \[S\] = \[2\], got \[3\]", lambda: encode(rows, cu, cu)),
    ):
        with pytest.raises(error, match=f"PositionalEncoding: {text}"):
            call()
    with pytest.raises(IndexError):
        encode(rows, torch.tensor([7]))
