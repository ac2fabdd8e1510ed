"""Attention of few queries, and KeyValueCache: dtypes, pages, bits, against the reference and the dense kernels."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import seqkernels
from seqkernels.functional import scaled_dot_product_attention as sdpa
from seqkernels.nn import KeyValueCache, MultiheadAttention, TransformerDecoderLayer, TransformerEncoderLayer
from seqkernels.reference.attention import attention, quantize_rows
from support.fuzzing import bounded

ops = torch.ops.seqkernels
R = torch.randn
STORED = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
QUERIES = [torch.float32, torch.bfloat16, torch.float16]
# Largest error relative to the largest value: a rounding of the output, and sums in float32.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def widened(rows: Tensor, scales: Tensor | None) -> Tensor:
    return rows.double() if scales is None else rows.double() * scales.double().unsqueeze(-1)


def stored(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return quantize_rows(x) if dtype == torch.int8 else (x.to(dtype), None)


def decode(q: Tensor, keys: Any, values: Any, table: Tensor | None = None, lengths: Any = None, **more: Any) -> Tensor:
    """attention_decode of (rows, scales)."""
    k_lengths = None if lengths is None else torch.tensor(lengths)
    options = dict(
        attn_mask=None, alibi_slopes=None, q_lengths=None, scale=1 / math.sqrt(q.shape[-1]), causal=0, window_left=-1,
        window_right=-1, softcap=0.0,
    ) | more  # fmt: skip
    return ops.attention_decode(
        q, keys[0], values[0], keys[1], values[1], table, k_lengths=k_lengths, **options
    )  # fmt: skip


def into_pages(x: Tensor | None, size: int, order: Tensor) -> Tensor | None:
    """Pages of rows [B, H, T, ..]: page order[b * n + i] holds rows from i * size of sequence b; others hold NaN."""
    if x is None:
        return None
    B, H, T = x.shape[:3]
    n = -(-T // size)
    fill = math.nan if x.is_floating_point() else 77
    rows = x.new_full((B, H, n * size, *x.shape[3:]), fill)
    rows[:, :, :T] = x
    pages = x.new_full((B * n + 3, H, size, *x.shape[3:]), fill)
    pages[order] = rows.unflatten(2, (n, size)).transpose(1, 2).flatten(0, 1)
    return pages


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "lower right": dict(causal=2),
    "a window": dict(causal=2, window_left=70),
    "softcap": dict(softcap=2.0),
    "slopes": dict(causal=2, alibi_slopes=torch.tensor([0.5, 0.25, 0.1, 0.05])),
    "bool mask": dict(attn_mask=torch.arange(650) % 3 != 1),
    "float mask": dict(attn_mask=torch.linspace(-3, 3, 650).masked_fill(torch.arange(650) % 5 == 2, -math.inf)),
    "a mask of many blocks": dict(attn_mask=(torch.arange(650) // 64 % 2 == 1)),
}


@pytest.mark.parametrize("page", [None, 1, 5, 64], ids=lambda n: f"page {n}")
@pytest.mark.parametrize("cache", [*STORED, torch.float64], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_decode_matches_the_reference(option: str, cache: torch.dtype, page: int | None, isa: str) -> None:
    generator = torch.Generator().manual_seed(5)
    B, Hq, H, T, Tk, D, Dv = 3, 4, 2, 3, 650, 41, 20
    lengths = [650, 0, 133]
    for dtype in [torch.float64] if cache == torch.float64 else QUERIES:
        q = torch.randn(B, Hq, T, D, generator=generator).to(dtype)
        k, v = (stored(torch.randn(B, H, Tk, n, generator=generator), cache) for n in (D, Dv))
        more = dict(OPTIONS[option])
        if "attn_mask" in more:
            mask = more["attn_mask"].view(1, 1, 1, Tk)
            more["attn_mask"] = mask if mask.dtype == torch.bool else mask.to(dtype)
        table, keys, values = None, k, v
        if page is not None:
            n = -(-Tk // page)
            order = torch.randperm(B * n, generator=generator) + 2
            table = order.view(B, n).int()
            keys, values = (tuple(into_pages(x, page, order) for x in pair) for pair in (k, v))
        got = decode(q, keys, values, table, lengths, **more)
        wide = {n: x.double() if n == "attn_mask" and x.dtype != torch.bool else x for n, x in more.items()}
        want, _ = attention(
            q.double(), widened(*k), widened(*v), k_lengths=torch.tensor(lengths), scale=D**-0.5, **wide
        )
        assert got.dtype == dtype and not got.isnan().any() and (got[1] == 0).all()
        error = (got.double() - want).abs().max() / want.abs().max()
        assert error <= TOLERANCE[dtype], f"{dtype}: {error:.3g}"


@pytest.mark.parametrize("cache", [*STORED, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 64, 64), (3, 3, 128, 40), (8, 1, 200, 7)], ids=str)
def test_decode_has_the_bits_of_the_dense_kernels(
    shape: tuple[int, int, int, int], cache: torch.dtype, isa: str
) -> None:
    """Any number of queries, alone or in a batch, dense or in pages: the bits of widened rows in the dense kernels."""
    Hq, H, D, Dv = shape
    wide = torch.float64 if cache == torch.float64 else torch.float32
    B, Tk, lengths = 2, 1300, [1300, 577]
    k, v = (stored(R(B, H, Tk, n), cache) for n in (D, Dv))
    dense = [x[0] if x[1] is None else x[0].float() * x[1].unsqueeze(-1) for x in (k, v)]
    order = torch.randperm(B * 82)
    pages = [tuple(into_pages(x, 16, order) for x in pair) for pair in (k, v)]
    for dtype in [wide] if cache == torch.float64 else QUERIES:
        q = R(B, Hq, 60, D).to(dtype)
        of = dict(enable_gqa=True, is_causal=True, causal_alignment="lower_right")
        want = sdpa(q.to(wide), dense[0].to(wide), dense[1].to(wide), lengths=lengths, **of).to(dtype)
        for n in (60, 2, 1):
            last = q[:, :, 60 - n :]
            assert torch.equal(decode(last, k, v, None, lengths, causal=2), want[:, :, 60 - n :]), n
            table = order.view(B, 82).int()
            assert torch.equal(decode(last, *pages, table, lengths, causal=2), want[:, :, 60 - n :]), n
            for b in range(B):
                alone = [tuple(None if x is None else x[b : b + 1, :, : lengths[b]] for x in pair) for pair in (k, v)]
                assert torch.equal(decode(last[b : b + 1], *alone, causal=2), want[b : b + 1, :, 60 - n :]), n


@pytest.mark.parametrize("cache", [torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize("B", [1, 5])
def test_bits_are_independent_of_the_number_of_threads(B: int, cache: torch.dtype) -> None:
    k, v = (stored(R(B, 2, 5000, 64), cache) for _ in range(2))
    q, lengths, results = R(B, 8, 1, 64), [5000, 0, 700, 4999, 64][:B], []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(decode(q, k, v, None, lengths))
    assert all(torch.equal(r, results[0]) for r in results)


def test_strides_of_keys_and_padding(isa: str) -> None:
    """Rows are read with their strides, and rows past the length are not read."""
    q, lengths = R(2, 4, 1, 33), [70, 129]
    k, v = R(2, 150, 2, 33).transpose(1, 2), R(2, 150, 2, 2, 9)[:, :, :, 1].transpose(1, 2)
    want = sdpa(q, k.contiguous(), v.contiguous(), enable_gqa=True, lengths=lengths)
    assert torch.equal(sdpa(q, k, v, enable_gqa=True, lengths=lengths), want)
    assert torch.equal(decode(q, (k, None), (v, None), None, lengths), want)
    k, v = k.clone(), v.clone()
    for b, n in enumerate(lengths):
        k[b, :, n:] = v[b, :, n:] = math.nan
    assert torch.equal(sdpa(q, k, v, enable_gqa=True, lengths=lengths), want)
    spread = R(2, 2, 150, 66)[..., ::2]  # columns that are not contiguous: packed
    assert torch.equal(sdpa(q, spread, spread, enable_gqa=True), sdpa(q, *[spread.contiguous()] * 2, enable_gqa=True))
    expanded = k[:1].expand(2, -1, -1, -1)
    assert torch.equal(
        sdpa(q, expanded, expanded, enable_gqa=True, lengths=[70, 70]),
        sdpa(q, expanded.contiguous(), expanded.contiguous(), enable_gqa=True, lengths=[70, 70]),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_reaches_only_queries_that_attend_to_it(bad: float, isa: str) -> None:
    q, k, v = R(1, 2, 2, 16), R(1, 2, 130, 16), R(1, 2, 130, 16)
    mask = torch.ones(1, 1, 2, 130, dtype=torch.bool)
    mask[..., 0, 128:] = False
    clean = sdpa(q, k, v, mask)
    k[0, 0, 129, 3] = v[0, 1, 128, 5] = bad
    got = sdpa(q, k, v, mask)
    assert torch.equal(got[:, :, 0], clean[:, :, 0]) and not torch.isfinite(got[:, :, 1]).all()
    rows = tuple(quantize_rows(x) for x in (k, v))
    got = decode(q, *rows, attn_mask=mask)
    assert torch.isfinite(got[:, :, 0]).all() and got[0, 0, 1].isnan().all() and got[0, 1, 1].isnan().all()


@pytest.mark.parametrize("Tk", [1, 40 * 512 + 3])
def test_huge_and_tiny_caches(Tk: int, isa: str) -> None:
    q, k, v = R(1, 2, 1, 8, dtype=torch.float64), *R(2, 1, 1, Tk, 8, dtype=torch.float64)
    torch.set_num_threads(2)
    want, _ = attention(q, k, v, scale=8**-0.5)
    for dtype in (torch.float32, torch.float64):
        got = sdpa(q.to(dtype), k.to(dtype), v.to(dtype), enable_gqa=True)
        torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype])


# ---- quantisation


def test_quantisation_bit_for_bit() -> None:
    x = R(40, 33) * torch.logspace(-30, 30, 40).unsqueeze(1)
    x[3] = 0
    x[4], x[4, 0] = 0, 1e-44
    x[5] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5] + [0.0] * 27)  # ties
    x[6, 7], x[7, 7], x[8, 7] = math.nan, math.inf, -math.inf
    rows, scales = quantize_rows(x)
    for r, row in enumerate(x.numpy()):
        if not np.isfinite(row).all():
            assert not math.isfinite(scales[r]) and (rows[r] == 0).all()
            continue
        scale = np.float32(np.abs(row).max()) / np.float32(127)
        assert scale == scales[r].item()
        if scale == 0:
            assert (rows[r] == 0).all()
            continue
        want = [max(-127, min(127, round(float(np.float32(number) / scale)))) for number in row]  # ties to even
        assert rows[r].tolist() == want
    assert rows[5, :6].tolist() == [127, 0, 2, 2, 0, -2]
    half = quantize_rows(x[:3].bfloat16())
    assert torch.equal(half[0], quantize_rows(x[:3].bfloat16().float())[0])


# ---- the cache


def fill(cache: KeyValueCache, steps: list[Any], dtype: torch.dtype = torch.float32, seed: int = 3) -> None:
    """Appends steps: T for all sequences, or the lengths of each."""
    generator = torch.Generator().manual_seed(seed)
    for T in steps:
        lengths = T if isinstance(T, list) else None
        n = max(T) if lengths is not None else T
        shape = cache.batch_size, cache.keys.shape[1], n
        key, value = (
            torch.randn(*shape, x.shape[3], generator=generator).to(dtype) for x in (cache.keys, cache.values)
        )
        cache.append(key, value, lengths)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("steps", [[5, 1, 1, 30], [[9, 0, 4], 1, [1, 3, 0], 2]], ids=["equal", "ragged"])
def test_pages_hold_the_rows_of_a_contiguous_cache(steps: list[Any], dtype: torch.dtype) -> None:
    plain, paged = (KeyValueCache(3, 40, 2, 16, 8, dtype=dtype, page_size=size) for size in (None, 4))
    q = R(3, 4, 2, 16)
    for cache in (plain, paged):
        fill(cache, steps)
    assert torch.equal(plain.lengths, paged.lengths) and plain.longest == paged.longest
    for a, b in zip(plain.gathered(), paged.gathered()):
        for row, n in enumerate(plain.lengths.tolist()):
            assert torch.equal(a[row, :, :n], b[row, :, :n])
    for causal in (False, True):
        assert torch.equal(plain.attend(q, is_causal=causal), paged.attend(q, is_causal=causal))
    mask = torch.arange(plain.longest) % 2 == 0
    assert torch.equal(plain.attend(q, mask.view(1, -1)), paged.attend(q, mask.view(1, -1)))
    bias = R(4, 2, plain.longest)
    for half in (q, q.bfloat16()):
        assert torch.equal(plain.attend(half, bias), paged.attend(half, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_reorder_shares_pages_and_copies_before_writing(dtype: torch.dtype) -> None:
    plain, paged = (KeyValueCache(3, 20, 2, 8, dtype=dtype, page_size=size) for size in (None, 4))
    index = torch.tensor([2, 2, 0])
    q = R(3, 2, 1, 8)
    for cache in (plain, paged):
        fill(cache, [[6, 3, 8]], seed=1)
        cache.reorder(index)
        assert cache.lengths.tolist() == [8, 8, 6]
    rows = paged.keys.clone()
    assert paged.block_table is not None
    assert torch.equal(paged.block_table[0, :2], paged.block_table[1, :2])
    assert torch.equal(plain.attend(q), paged.attend(q))
    for at, more in enumerate([1, [1, 3, 2], 1]):
        for cache in (plain, paged):
            fill(cache, [more], seed=10 + at)
            cache.reorder(torch.tensor([1, 0, 1]))
        assert torch.equal(plain.attend(q), paged.attend(q)), at
        assert torch.equal(plain.attend(q, is_causal=True), paged.attend(q, is_causal=True)), at
    assert torch.equal(rows[paged.block_table[0, 0]], paged.keys[paged.block_table[0, 0]])
    for cache in (plain, paged):
        cache.reorder(torch.tensor([0]))
        assert cache.batch_size == 1
    assert torch.equal(plain.attend(q[:1]), paged.attend(q[:1]))
    for cache in (plain, paged):
        cache.reset()
        assert cache.longest == 0 and cache.lengths.tolist() == [0]
        fill(cache, [20])
    assert torch.equal(plain.attend(q[:1]), paged.attend(q[:1]))


@bounded
@given(
    B=st.integers(1, 4), H=st.integers(1, 2), groups=st.integers(1, 3), D=st.integers(1, 40), Dv=st.integers(1, 40),
    dtype=st.sampled_from(STORED), page=st.one_of(st.none(), st.integers(1, 9)), queries=st.sampled_from(QUERIES),
    causal=st.booleans(), threads=st.integers(1, 3), data=st.data(),
)  # fmt: skip
def test_random_steps_match_attention_to_all_rows(
    B: int, H: int, groups: int, D: int, Dv: int, dtype: torch.dtype, page: int | None, queries: torch.dtype,
    causal: bool, threads: int, data: st.DataObject,
) -> None:  # fmt: skip
    """Appends and reorders, beside lists of the rows of each sequence."""
    cache = KeyValueCache(B, 60, H, D, Dv, dtype=dtype, page_size=page, pages=None if page is None else 4 * 60 + 4)
    rows: list[list[Tensor]] = [[torch.zeros(H, 0, D), torch.zeros(H, 0, Dv)] for _ in range(B)]
    torch.set_num_threads(threads)
    for _ in range(data.draw(st.integers(1, 5))):
        n = len(rows)
        if data.draw(st.booleans()):
            index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n))
            cache.reorder(torch.tensor(index))
            rows = [list(rows[i]) for i in index]
            n = len(rows)
        T = data.draw(st.integers(1, 9))
        counts = data.draw(st.one_of(st.none(), st.lists(st.integers(0, T), min_size=n, max_size=n)))
        key, value = R(n, H, T, D), R(n, H, T, Dv)
        for b, count in enumerate(counts or []):
            key[b, :, count:] = value[b, :, count:] = math.nan  # not read
        cache.append(key.to(queries), value.to(queries), counts)
        for b, each in enumerate(rows):
            count = T if counts is None else counts[b]
            for i, x in enumerate((key, value)):
                new = stored(x[b, :, :count].to(queries).float(), dtype)
                each[i] = torch.cat([each[i], widened(*new).float()], 1)
    lengths = [each[0].shape[1] for each in rows]
    assert cache.lengths.tolist() == lengths and cache.longest == max(lengths)
    Tq = data.draw(st.integers(1, 4))
    q = R(len(rows), groups * H, Tq, D).to(queries)
    got = cache.attend(q, is_causal=causal)
    for b, (key, value) in enumerate(rows):
        want, _ = attention(
            q[b : b + 1].double(), key[None].double(), value[None].double(), scale=D**-0.5, causal=2 if causal else 0
        )
        error = (got[b].double() - want[0]).abs().max()
        assert got.dtype == queries and error <= TOLERANCE[queries] * max(want.abs().max().item(), 1.0)


@pytest.mark.parametrize("page", [None, 4])
def test_reorder_without_the_longest_sequence(page: int | None) -> None:
    cache = KeyValueCache(2, 8, 1, 4, page_size=page)
    fill(cache, [[7, 2]])
    cache.reorder(torch.tensor([1, 1]))
    assert cache.longest == 2 and cache.lengths.tolist() == [2, 2]
    fill(cache, [6])
    assert cache.longest == 8


def test_pages_run_out_without_a_change() -> None:
    cache = KeyValueCache(2, 16, 1, 4, page_size=4, pages=3)
    fill(cache, [4])
    before = cache.attend(R(2, 1, 1, 4) * 0)
    with pytest.raises(ValueError, match=r"pages must suffice for all sequences, 2 more are needed, got 1 free of 3"):
        fill(cache, [1])
    assert cache.longest == 4 and torch.equal(cache.attend(R(2, 1, 1, 4) * 0), before)
    fill(cache, [[3, 0]])
    assert cache.lengths.tolist() == [7, 4]
    cache.reorder(torch.tensor([0, 0]))  # frees the page of sequence 1
    fill(cache, [1])  # one of both copies the shared page
    assert cache.lengths.tolist() == [8, 8]
    with pytest.raises(ValueError, match="steps must fit the capacity of 16, got 9 after 8 cached steps"):
        fill(cache, [9])


@pytest.mark.parametrize("page", [None, 8])
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("model", QUERIES, ids=str)
def test_multihead_attention_decodes_with_every_cache(model: torch.dtype, dtype: torch.dtype, page: int | None) -> None:
    E, H, B, T = 32, 4, 3, 20
    layer = MultiheadAttention(E, H, batch_first=True, dtype=model).eval()
    x = R(B, T, E).to(model)
    exact, cache = layer.new_cache(B, T), layer.new_cache(B, T, dtype=dtype, page_size=page)
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.int8: 3e-2}
    least = tolerance[model] + tolerance[dtype]
    with torch.no_grad():
        for n in (7, 1, 1, 4):
            at = exact.longest
            now = x[:, at : at + n]
            _, want_weights = layer(now, now, now, is_causal=True, cache=exact)
            k, v = exact.gathered()
            cache.append(k[:, :, at:], v[:, :, at:])
            got, got_weights = layer(now, None, None, cache=cache)  # not causal: the queries attend to all steps
            want_all, _ = layer(now, None, None, need_weights=False, cache=exact)
            only, nothing = layer(now, None, None, need_weights=False, cache=cache)
            assert nothing is None and got.dtype == only.dtype == model
            torch.testing.assert_close(only, want_all, rtol=0, atol=least)
            torch.testing.assert_close(got, only, rtol=0, atol=least)
            assert got_weights.dtype == model and got_weights.shape == want_weights.shape
        lengths = [2, 0, 1]
        prompt = x[:, 13:15]
        for c in (exact, cache):
            layer(prompt, prompt, prompt, need_weights=False, is_causal=True, cache=c, lengths=lengths)
            assert c.lengths.tolist() == [15, 13, 14]
        now = x[:, 15:16]
        steps = [layer(now, now, now, need_weights=False, is_causal=True, cache=c)[0] for c in (exact, cache)]
        torch.testing.assert_close(steps[1], steps[0], rtol=0, atol=least)
    if dtype == model:
        assert torch.equal(steps[0], steps[1])


def test_layers_make_caches_of_a_dtype_and_pages() -> None:
    encoder, decoder = TransformerEncoderLayer(16, 2).eval(), TransformerDecoderLayer(16, 2).eval()
    cache = encoder.new_cache(2, 8, dtype=torch.int8, page_size=4)
    own, memory = decoder.new_cache(2, 8, 6, dtype=torch.bfloat16, page_size=4)
    assert cache.keys.dtype == torch.int8 and own.keys.dtype == memory.keys.dtype == torch.bfloat16
    x, of = R(5, 2, 16), R(6, 2, 16)
    with torch.no_grad():
        want, want_decoder = encoder(x, is_causal=True), decoder(x, of, tgt_is_causal=True)
        for t in range(5):
            got = encoder(x[t : t + 1], is_causal=True, cache=cache)
            torch.testing.assert_close(got[0], want[t], rtol=0, atol=0.05)
            got = decoder(x[t : t + 1], of if t == 0 else None, tgt_is_causal=True, cache=(own, memory))
            torch.testing.assert_close(got[0], want_decoder[t], rtol=0, atol=0.05)


def test_compile_of_steps_with_a_quantised_cache() -> None:
    layer = MultiheadAttention(16, 2, batch_first=True).eval()
    caches = [layer.new_cache(2, 6, dtype=torch.int8) for _ in range(2)]
    x = R(2, 6, 16)
    torch.compiler.reset()

    def step(x: Tensor, cache: KeyValueCache) -> Tensor:
        out: Tensor = layer(x, x, x, need_weights=False, is_causal=True, cache=cache)[0]
        return out

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for t in range(4):
            now = x[:, t : t + 1]
            torch.testing.assert_close(compiled(now, caches[0]), step(now, caches[1]))
    paged = layer.new_cache(2, 6, page_size=2)
    with torch.no_grad(), pytest.raises(Exception, match="page_size needs eager mode"):
        compiled(x[:, :1], paged)


def test_opcheck_and_tensors_without_data(raw_memory: None) -> None:
    k, v = (stored(R(2, 2, 8, n), torch.int8) for n in (16, 8))
    args: tuple[Any, ...] = (
        R(2, 4, 1, 16), k[0], v[0], k[1], v[1], torch.tensor([[0], [1]]).int(), None, None, None, torch.tensor([8, 3]),
        0.25, 2, -1, -1, 0.0,
    )  # fmt: skip
    torch.library.opcheck(ops.attention_decode.default, args, test_utils=("test_schema", "test_faketensor"))
    with FakeTensorMode():
        assert ops.attention_decode(
            torch.empty(2, 4, 1, 16), *(torch.empty(2, 2, 8, n, dtype=torch.int8) for n in (16, 8)), None, None, None,
            None, None, None, None, 0.25, 0, -1, -1, 0.0,
        ).shape == (2, 4, 1, 8)  # fmt: skip


def test_explain_names_the_path(isa: str) -> None:
    def keys(**shape: int) -> Any:
        return seqkernels.explain("scaled_dot_product_attention", **shape)["keys"]

    assert keys(B=1, Hq=32, Hk=8, Tq=1, Tk=512, D=64) == keys(B=1, Hq=8, Tq=16, Tk=512, D=64) == "read in place"
    assert keys(B=1, Hq=32, Hk=8, Tq=5, Tk=512, D=64) == "packed"


# ---- errors

Q, K = R(2, 4, 1, 8), R(2, 2, 6, 8)
Q8, S8 = quantize_rows(K)
TABLE = torch.zeros(2, 3, dtype=torch.int32)
PAGES = R(5, 2, 4, 8)


def table(*at: int) -> Tensor:
    return torch.tensor([at, at], dtype=torch.int32)


OP_ERRORS: dict[str, tuple[Any, str]] = {
    "q 3-D": (lambda: decode(Q[0], (K, None), (K, None)), "q must have 4 dimensions"),
    "a double q": (lambda: decode(Q.double(), (K, None), (K, None)), "keys must be float64 where q is float64"),
    "double keys": (lambda: decode(Q, (K.double(), None), (K, None)), "keys must not be float64 where q is float32"),
    "integer keys": (lambda: decode(Q, (K.int(), None), (K, None)), "keys must be float32, float64, bfloat16"),
    "values of another dtype": (lambda: decode(Q, (K, None), (K.half(), None)), "values must be float32, got float16"),
    "columns with a stride": (
        lambda: decode(Q, (R(2, 2, 6, 16)[..., ::2], None), (K, None)), "keys must have contiguous columns"),
    "another batch": (lambda: decode(Q, (K[:1], None), (K[:1], None)), r"keys must have shape \[B, Hk, Tk, D\]"),
    "heads": (lambda: decode(Q, (R(2, 3, 6, 8), None), (K, None)), r"a divisor of 4"),
    "values of other rows": (lambda: decode(Q, (K, None), (K[:, :, 1:], None)), "values must have as many rows"),
    "no columns": (lambda: decode(Q, (K, None), (K[..., :0], None)), "q and values must have columns"),
    "int8 without scales": (lambda: decode(Q, (Q8, None), (Q8, None)), "key_scales must be given with int8 keys"),
    "scales without int8": (lambda: decode(Q, (K, None), (K, S8)), "value_scales must be absent without int8 keys"),
    "scales of another shape": (lambda: decode(Q, (Q8, S8[:, :, 1:]), (Q8, S8)), "key_scales must have shape"),
    "scales of another dtype": (lambda: decode(Q, (Q8, S8.double()), (Q8, S8)), "key_scales must be float32"),
    "a length too many": (lambda: decode(Q, (K, None), (K, None), None, [7, 1]), "k_lengths must be between 0 and 6"),
    "pages without lengths": (lambda: decode(Q, (PAGES, None), (PAGES, None), TABLE), "k_lengths must be given"),
    "a long table": (
        lambda: decode(Q, (PAGES, None), (PAGES, None), TABLE.long(), [1, 1]), "block_table must be int32"),
    "a table of another batch": (
        lambda: decode(Q, (PAGES, None), (PAGES, None), TABLE[:1], [1, 1]), "block_table must have shape"),
    "a length past the table": (
        lambda: decode(Q, (PAGES, None), (PAGES, None), TABLE, [13, 1]), "k_lengths must be between 0 and 12"),
    "a page too many": (
        lambda: decode(Q, (PAGES, None), (PAGES, None), table(0, 5, 0), [5, 5]), "block_table must be .* got 5"),
    "a negative page": (
        lambda: decode(Q, (PAGES, None), (PAGES, None), table(-1, 0, 0), [1, 1]), "block_table must be .* got -1"),
    "empty pages": (
        lambda: decode(Q, (PAGES[:, :, :0], None), (PAGES[:, :, :0], None), TABLE, [0, 0]), "rows in a page"),
}  # fmt: skip


@pytest.mark.parametrize("name", OP_ERRORS)
def test_op_errors(name: str) -> None:
    call, message = OP_ERRORS[name]
    with pytest.raises(RuntimeError, match=f"attention_decode: .*{message}"):
        call()


def test_pages_that_no_length_reaches_are_not_read() -> None:
    got = decode(Q, (PAGES, None), (PAGES, None), table(1, 1000, -7), [4, 2])
    assert torch.equal(got, sdpa(Q, PAGES[[1, 1]], PAGES[[1, 1]], enable_gqa=True, lengths=[4, 2]))


CACHE_ERRORS: dict[str, tuple[type[Exception], str, Any]] = {
    "int8 on a GPU": (NotImplementedError, "dtype torch.int8 is supported on a CPU, got device cuda",
                      lambda: KeyValueCache(1, 1, 1, 1, device="cuda", dtype=torch.int8)),
    "pages on a GPU": (NotImplementedError, "page_size is supported on a CPU, got device cuda",
                       lambda: KeyValueCache(1, 1, 1, 1, device="cuda", page_size=4)),
    "a page of nothing": (ValueError, "page_size must be at least 1, got 0",
                          lambda: KeyValueCache(1, 1, 1, 1, page_size=0)),
    "pages alone": (ValueError, "pages must be None without page_size", lambda: KeyValueCache(1, 1, 1, 1, pages=3)),
    "a negative capacity": (ValueError, "capacity must be at least 0, got -1", lambda: KeyValueCache(1, -1, 1, 1)),
    "a capacity of another type": (TypeError, "capacity must be an int, got 2.5", lambda: KeyValueCache(1, 2.5, 1, 1)),
    "no heads": (ValueError, "num_heads must be at least 1, got 0", lambda: KeyValueCache(1, 1, 0, 1)),
    "an order as a list": (TypeError, "index must be a tensor, got a list of",
                           lambda: KeyValueCache(2, 4, 2, 8).reorder([0, 1])),
    "an order of floats": (ValueError, "index must be int64 of one dimension",
                           lambda: KeyValueCache(2, 4, 2, 8).reorder(torch.zeros(2))),
    "an order out of range": (IndexError, r"index must be in \[0, 2\), got \[0, -1\]",
                              lambda: KeyValueCache(2, 4, 2, 8, page_size=2).reorder(torch.tensor([0, -1]))),
    "negative pages": (ValueError, "pages must be at least 0, got -3",
                       lambda: KeyValueCache(1, 1, 1, 1, page_size=1, pages=-3)),
    "an integer dtype": (TypeError, "dtype must be float32, float64, bfloat16, float16 or int8, got torch.int32",
                         lambda: KeyValueCache(1, 1, 1, 1, dtype=torch.int32)),
    "query of other heads": (ValueError, r"query must have shape \[2, a multiple of 2, Tq, 8\]",
                             lambda: KeyValueCache(2, 4, 2, 8).attend(R(2, 3, 1, 8))),
    "a query as a list": (TypeError, "query must be a tensor, got a list",
                          lambda: KeyValueCache(2, 4, 2, 8).attend([])),
    "no key": (TypeError, "key must be a tensor, got None", lambda: KeyValueCache(2, 4, 2, 8).append(None, K)),
    "a number for a value": (TypeError, "value must be a tensor, got int",
                             lambda: KeyValueCache(2, 4, 2, 8).append(K, 3)),
    "a double query": (TypeError, "query must be of the cache's dtype torch.int8, got torch.float64",
                       lambda: KeyValueCache(2, 4, 2, 8, dtype=torch.int8).attend(Q.double())),
    "a gradient": (RuntimeError, "query must not require a gradient",
                   lambda: KeyValueCache(2, 4, 2, 8, dtype=torch.int8).attend(Q.clone().requires_grad_())),
    "a mask of other keys": (ValueError, "attn_mask must have at least 2 dimensions",
                             lambda: KeyValueCache(2, 4, 2, 8, dtype=torch.int8).attend(Q, R(1, 3))),
    "key of another dtype": (TypeError, "key must be float32, bfloat16 or float16, got torch.float64",
                             lambda: KeyValueCache(2, 4, 2, 8, dtype=torch.int8).append(K.double(), K.double())),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE_ERRORS)
def test_cache_errors(name: str) -> None:
    error, message, call = CACHE_ERRORS[name]
    with pytest.raises(error, match=f"KeyValueCache: .*{message}"):
        call()


def test_empty_caches_give_zeros() -> None:
    for dtype, page in itertools.product(STORED, (None, 4)):
        cache = KeyValueCache(2, 8, 2, 8, dtype=dtype, page_size=page)
        assert (cache.attend(Q) == 0).all()
