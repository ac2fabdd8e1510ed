"""Attention on the CPU against the reference and torch, in other batches and layouts, and invalid input."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import seqkernels
from seqkernels import backend, reference
from seqkernels.functional import scaled_dot_product_attention, varlen_attention
from seqkernels.functional._attention_ops import AttentionArgs, Inputs
from seqkernels.reference.attention import dropout_keep
from support.cases import (
    ATTENTION_CASES,
    ATTENTION_ERROR_RATIO,
    DTYPES,
    AttentionCase,
    assert_attention_near,
    assert_same_bits,
    attention_definition,
    make_attention_inputs,
    run_attention,
)

ops = torch.ops.seqkernels
sdpa = scaled_dot_product_attention
cases = pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
R = torch.randn


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [R(shape, dtype=dtype).requires_grad_() for shape in shapes]


def qkv(B: int = 2, H: int = 2, Tq: int = 6, Tk: int = 7, D: int = 8, **more: Any) -> list[Tensor]:
    return leaves((B, H, Tq, D), (B, H, Tk, D), (B, H, Tk, D), **more)


def gradients(function: Callable[..., Any], *tensors: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Results of a function, and gradients of the tensors for random upstream gradients."""
    tensors = tuple(t.detach().clone().requires_grad_() for t in tensors)
    results = function(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(r.shape, generator=generator, dtype=torch.float64).to(r.dtype) for r in results]
    found = torch.autograd.grad(results, tensors, upstream, allow_unused=True)
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | {
        f"gradient {i}": g for i, g in enumerate(found) if g is not None
    }


# ---- against the reference


@functools.cache
def definition(case: AttentionCase, dtype: torch.dtype) -> dict[str, Tensor]:
    return attention_definition(make_attention_inputs(case, dtype))


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_match_the_reference(case: AttentionCase, dtype: torch.dtype, isa: str) -> None:
    assert_attention_near(run_attention(make_attention_inputs(case, dtype)), definition(case, dtype), dtype)


def strided(t: Tensor) -> Tensor:
    """The same values as every other column of a larger tensor, with an offset."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), math.nan)
    wide[..., 1::2] = t
    return wide[..., 1::2]


def by_time(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("case", [ATTENTION_CASES[i] for i in (1, 15, 17)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [strided, by_time])
def test_strides(case: AttentionCase, dtype: torch.dtype, layout: Callable, isa: str) -> None:
    inputs = make_attention_inputs(case, dtype)
    other = dataclasses.replace(inputs, tensors={n: layout(t) for n, t in inputs.tensors.items()})
    if inputs.bool_mask is not None:
        other.bool_mask = layout(inputs.bool_mask.float()).bool()
    assert_same_bits(run_attention(other), run_attention(inputs))


def test_expanded_tensors_and_gradients() -> None:
    q, k = R(1, 2, 5, 8).expand(3, -1, -1, -1), R(1, 1, 9, 8).expand(3, 2, -1, -1)
    args = (None,) * 6 + (0, 0, 0.3, 0, -1, -1, 0.0, 0.0, None)
    out, lse, _ = ops.attention_forward(q, k, k, *args)
    dout = R(1).expand(out.shape)
    got = ops.attention_backward(dout, None, q, k, k, *args, out, lse, False)
    want = ops.attention_backward(dout.contiguous(), None, *(t.contiguous() for t in (q, k, k)), *args, out, lse, False)
    assert_same_bits(dict(enumerate(got)), dict(enumerate(want)))


# ---- against torch: error, semantics

ERROR_SHAPES = [(2, 2, 100, 100, 64), (1, 2, 300, 300, 32), (1, 2, 30, 600, 128), (2, 2, 17, 19, 8)]


@pytest.mark.parametrize("dtype", ATTENTION_ERROR_RATIO, ids=str)
def test_error_does_not_exceed_the_error_of_torch(dtype: torch.dtype) -> None:
    """Over all inputs and results, on the best instruction set, which torch also uses."""
    ours, theirs = [], []
    for (B, H, Tq, Tk, D), causal, seed in itertools.product(ERROR_SHAPES, (False, True), range(2)):
        torch.manual_seed(seed)
        tensors = [R(B, H, T, D).to(dtype) for T in (Tq, Tk, Tk)]
        function = functools.partial(F.scaled_dot_product_attention, is_causal=causal)
        want = gradients(function, *(t.double() for t in tensors))
        dout = gradients(function, *tensors)
        got = gradients(functools.partial(sdpa, is_causal=causal), *tensors)
        for name, w in want.items():
            for found, errors in ((got, ours), (dout, theirs)):
                errors.append(((found[name].double() - w).square().mean() / w.square().mean()).item())
    ratio = math.sqrt(sum(o / t for o, t in zip(ours, theirs)) / len(ours))
    assert ratio <= ATTENTION_ERROR_RATIO[dtype], ratio


PEAKED: dict[str, tuple[list[tuple[int, ...]], dict]] = {
    "4-D": ([(3, 2, 40, 16), (3, 2, 50, 16), (3, 2, 50, 24)], {}),
    "causal": ([(3, 2, 40, 16), (3, 2, 40, 16), (3, 2, 40, 16)], {"is_causal": True}),
    "3-D": ([(6, 32, 16), (6, 32, 16), (6, 32, 16)], {}),
    "broadcast": ([(2, 3, 32, 16), (1, 1, 32, 16), (1, 1, 32, 16)], {}),
    "a mask with a gradient": ([(2, 2, 32, 16), (2, 2, 40, 16), (2, 2, 40, 16), (2, 2, 32, 40)], {}),
    "one query": ([(2, 2, 1, 16), (2, 2, 700, 16), (2, 2, 700, 16)], {}),
    "shared heads": ([(2, 4, 32, 16), (2, 2, 32, 16), (2, 2, 32, 16)], {"enable_gqa": True}),
}


@pytest.mark.parametrize("path", PEAKED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_half_gradients_of_peaked_scores_are_rounded_once(dtype: torch.dtype, path: str, compiled: bool) -> None:
    """At most twice the error of torch, where torch computes in float32 and rounds once, too."""
    shapes, options = PEAKED[path]
    tensors = [3 * R(*shape).to(dtype) for shape in shapes]

    def grads(function: Callable, inputs: list[Tensor]) -> list[Tensor]:
        inputs = [t.detach().requires_grad_() for t in inputs]
        out = function(*inputs[:3], attn_mask=inputs[3] if len(inputs) > 3 else None, **options)
        dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        return [g.double() for g in torch.autograd.grad(out, inputs, dout.to(out.dtype))]

    torch._dynamo.reset()
    want = grads(F.scaled_dot_product_attention, [t.double() for t in tensors])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = grads(F.scaled_dot_product_attention, tensors)
    ours = grads(torch.compile(sdpa, fullgraph=True, backend="aot_eager") if compiled else sdpa, tensors)
    for name, w, got, other in zip(("dq", "dk", "dv", "dmask"), want, ours, theirs):
        assert (got - w).norm() <= 2 * (other - w).norm(), name


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_gradients_have_the_error_of_one_rounding(case: AttentionCase, dtype: torch.dtype, isa: str) -> None:
    """With every option; a rounding has a mean error of about 0.2 eps."""
    inputs = make_attention_inputs(case, dtype)
    for name in "qk":
        inputs.tensors[name].mul_(3)
    want, got = attention_definition(inputs, weights=False), run_attention(inputs, weights=False)
    for name, w in want.items():
        if name not in ("out", "lse") and w.isfinite().all():
            error = (got[name].double() - w).norm()
            assert error <= 0.3 * torch.finfo(dtype).eps * w.norm() + 1e-6, name


SEMANTICS = {
    "2-D": ([(3, 4), (5, 4), (5, 6)], None, {}),
    "3-D": ([(2, 3, 4), (2, 5, 4), (2, 5, 6)], (2, 3, 5), {}),
    "3-D, a mask of keys": ([(2, 3, 4), (2, 5, 4), (2, 5, 6)], (1, 5), {}),
    "4-D, a mask of 3": ([(2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6)], (4, 3, 5), {}),
    "4-D, a mask of 2": ([(2, 4, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6)], (3, 5), {}),
    "5-D": ([(2, 3, 2, 3, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 6)], (3, 1, 3, 5), {}),
    "5-D, a mask of sequences": ([(2, 3, 2, 3, 4), (2, 3, 2, 5, 4), (2, 3, 2, 5, 6)], (2, 1, 2, 1, 5), {}),
    "one sequence of keys": ([(2, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6)], None, {}),
    "one head of keys": ([(2, 4, 3, 4), (2, 1, 5, 4), (2, 1, 5, 6)], None, {}),
    "one head of queries": ([(2, 1, 3, 4), (2, 4, 5, 4), (2, 4, 5, 6)], None, {}),
    "grouped heads": ([(2, 4, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)], (2, 1, 3, 5), {"enable_gqa": True}),
    "grouped heads, 3-D": ([(4, 3, 4), (2, 5, 4), (2, 5, 6)], None, {"enable_gqa": True}),
    "causal, Tq < Tk": ([(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)], None, {"is_causal": True}),
    "causal, Tq > Tk": ([(2, 2, 7, 4), (2, 2, 5, 4), (2, 2, 5, 4)], None, {"is_causal": True}),
    "scale": ([(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)], None, {"scale": -0.7}),
    "no keys": ([(2, 2, 3, 4), (2, 2, 0, 4), (2, 2, 0, 4)], None, {}),
}


@pytest.mark.parametrize("kind", ["float", "bool"])
@pytest.mark.parametrize("name", SEMANTICS)
def test_drop_in_replacement_for_torch(name: str, kind: str) -> None:
    shapes, mask_shape, keywords = SEMANTICS[name]
    tensors = [R(shape, dtype=torch.float64) for shape in shapes]
    if mask_shape is not None:
        mask = R(mask_shape, dtype=torch.float64)
        keywords = {**keywords, "attn_mask": mask if kind == "float" else mask > -0.5}
    elif kind == "bool":
        return
    want = gradients(functools.partial(F.scaled_dot_product_attention, **keywords), *tensors)
    for key, g in gradients(functools.partial(sdpa, **keywords), *tensors).items():
        torch.testing.assert_close(g, want[key], rtol=1e-12, atol=1e-13)


def test_queries_without_keys_give_zeros_and_no_gradient() -> None:
    tensors = qkv()
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[2] = False
    out, lse, weights = sdpa(*tensors, attn_mask=mask, return_lse=True, return_weights=True)
    assert (out[:, :, 2] == 0).all() and (weights[:, :, 2] == 0).all() and (lse[:, :, 2] == -math.inf).all()
    grads = torch.autograd.grad(out[:, :, 2].sum() + weights[:, :, 2].sum(), tensors)
    assert all((g == 0).all() for g in grads)


def test_a_mask_of_the_lowest_number_gives_uniform_weights(isa: str) -> None:
    """The gradients are those of uniform weights, although lse rounds to the number."""
    tensors = [t.detach() for t in qkv()]
    mask = torch.zeros(6, 7)
    mask[2] = torch.finfo(torch.float32).min
    torch.testing.assert_close(sdpa(*tensors, attn_mask=mask)[:, :, 2], tensors[2].mean(2))
    got = gradients(functools.partial(sdpa, attn_mask=mask), *tensors)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = gradients(functools.partial(F.scaled_dot_product_attention, attn_mask=mask), *tensors)
    for key, w in want.items():
        torch.testing.assert_close(got[key], w)
    _, weights = sdpa(*tensors, attn_mask=mask, return_weights=True)
    torch.testing.assert_close(weights[:, :, 2], torch.full((2, 2, 7), 1 / 7))


HUGE = [(d, torch.finfo(d).min) for d in DTYPES]
HUGE += [(torch.float32, -1e9), (torch.bfloat16, -1e30), (torch.float32, 3e9)]


@pytest.mark.parametrize(("dtype", "number"), HUGE, ids=str)
@pytest.mark.parametrize("mask_of", ["ij", "bhij"])
def test_gradients_under_a_huge_bias_match_the_reference(
    dtype: torch.dtype, number: float, mask_of: str, isa: str
) -> None:
    """As with masks of Hugging Face. The reference uses float32, in which the scores also round to the number."""
    case = AttentionCase(Tq=60, Tk=70, causal=1, mask="float", mask_of=mask_of, k_lengths=(70, 33), why="huge")
    inputs = make_attention_inputs(case, dtype)
    mask = inputs.tensors["mask"].fill_(0)
    mask[..., 3, :] = mask[..., 4, 2:] = mask[..., 20:, :] = number
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = attention_definition(inputs, dtype=wide)
    assert_attention_near(run_attention(inputs), want, dtype)


def test_lengths_match_masks() -> None:
    tensors = [t.detach() for t in qkv(B=3, Tq=70, Tk=90, dtype=torch.float64)]
    of_q, of_k = torch.tensor([70, 3, 65]), torch.tensor([1, 90, 64])
    mask = (torch.arange(90) < of_k[:, None])[:, None, None] & (torch.arange(70) < of_q[:, None])[:, None, :, None]
    want = gradients(functools.partial(sdpa, attn_mask=mask), *tensors)
    for lengths in ((of_q, of_k), (of_q.tolist(), of_k.int())):
        got = gradients(functools.partial(sdpa, lengths=lengths), *tensors)
        for key, w in want.items():
            torch.testing.assert_close(got[key], w, rtol=1e-12, atol=1e-13)
    only_keys = gradients(functools.partial(sdpa, lengths=of_k), *tensors)["result 0"]
    torch.testing.assert_close(only_keys[1], want["result 0"][1].where(mask[1, :, :, :1], only_keys[1]))


def test_windows_and_alignment_match_masks() -> None:
    tensors = [t.detach() for t in qkv(Tq=70, Tk=90, dtype=torch.float64)]
    at, j = torch.arange(70)[:, None] + 20, torch.arange(90)
    for keywords, mask in (
        (dict(is_causal=True, causal_alignment="lower_right"), j <= at),
        (dict(window=3), (j - at + 20).abs() <= 3),
        (dict(window=(5, -1)), j >= at - 20 - 5),
        (dict(is_causal=True, causal_alignment="lower_right", window=(5, 0)), (j <= at) & (j >= at - 5)),
    ):
        got = gradients(functools.partial(sdpa, **keywords), *tensors)
        want = gradients(functools.partial(F.scaled_dot_product_attention, attn_mask=mask), *tensors)
        for key, w in want.items():
            torch.testing.assert_close(got[key], w, rtol=1e-12, atol=1e-13)


# ---- equal bits


def rows_of(results: dict[str, Tensor], case: AttentionCase) -> dict[str, list[Tensor]]:
    """Results and gradients by sequence, without padding."""
    q_lengths = case.q_lengths or (case.Tq,) * case.B
    k_lengths = case.k_lengths or (case.Tk,) * case.B
    found: dict[str, list[Tensor]] = {}
    for name in ("out", "lse", "dq", "dk", "dv"):
        lengths = k_lengths if name in ("dk", "dv") else q_lengths
        t = results[name]
        if case.packed:
            found[name] = [t[0, :, sum(lengths[:b]) : sum(lengths[: b + 1])] for b in range(case.B)]
        else:
            found[name] = [t[b, :, : lengths[b]] for b in range(case.B)]
    return found


COMPANY = [
    AttentionCase(B=3, Hq=4, q_lengths=(100, 3, 49), k_lengths=(90, 600, 64), causal=2, why="all kinds of blocks"),
    AttentionCase(B=3, q_lengths=(100, 1, 49), k_lengths=(90, 70, 5), window=(20, 10), softcap=2.0, why="a window"),
]


@pytest.mark.parametrize("case", COMPANY, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_padded_and_single_sequences_have_the_same_bits(
    case: AttentionCase, dtype: torch.dtype, isa: str
) -> None:
    packed = dataclasses.replace(case, packed=True)
    inputs = make_attention_inputs(packed, dtype)
    both = run_attention(inputs, weights=False)
    upstream = [
        torch.randn(both[n].shape, generator=torch.Generator().manual_seed(1 + i), dtype=torch.float64).to(
            both[n].dtype
        )
        for i, n in enumerate(("out", "lse"))
    ]
    assert case.q_lengths is not None and case.k_lengths is not None
    scale_to_end = inputs.scalars[2:]

    def parts(t: Tensor, lengths: tuple[int, ...]) -> list[Tensor]:
        return list(t.split(lengths, 2))

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, *lengths: Tensor | None) -> dict[str, Tensor]:
        args = (None, None, *lengths, *((None,) * (4 - len(lengths))))
        args = (*args, *((100, 600) if len(lengths) == 4 else (0, 0)), *scale_to_end, None)
        out, lse, _ = ops.attention_forward(q, k, v, *args)
        dq, dk, dv, _ = ops.attention_backward(dout, dlse, q, k, v, *args, out, lse, False)
        return dict(out=out, lse=lse, dq=dq, dk=dk, dv=dv)

    q, k, v = (inputs.tensors[n] for n in "qkv")
    whole = rows_of(run(q, k, v, *upstream, None, None, *inputs.more[3:]), packed)
    qs, ks, vs = parts(q, case.q_lengths), parts(k, case.k_lengths), parts(v, case.k_lengths)
    douts, dlses = parts(upstream[0], case.q_lengths), parts(upstream[1], case.q_lengths)
    for b in range(case.B):
        alone = run(qs[b], ks[b], vs[b], douts[b], dlses[b])
        for name, of_all in whole.items():
            assert torch.equal(of_all[b], alone[name][0]), f"{name} of sequence {b}"

    def padded(tensors: list[Tensor]) -> Tensor:
        longest = max(t.shape[2] for t in tensors)
        fill = [t.new_full((1, t.shape[1], longest - t.shape[2], *t.shape[3:]), math.nan) for t in tensors]
        return torch.cat([torch.cat(pair, 2) for pair in zip(tensors, fill)])

    batch = run(
        *(padded(t) for t in (qs, ks, vs, douts, dlses)), torch.tensor(case.q_lengths), torch.tensor(case.k_lengths)
    )
    for name, of_all in rows_of(batch, case).items():
        assert all(torch.equal(g, w) for g, w in zip(of_all, whole[name])), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_single_queries_have_the_bits_of_one_call(dtype: torch.dtype, isa: str) -> None:
    q, k, v = R(1, 4, 60, 20).to(dtype), R(1, 2, 1100, 20).to(dtype), R(1, 2, 1100, 7).to(dtype)
    keywords = dict(causal_alignment="lower_right", is_causal=True, enable_gqa=True, return_lse=True)
    with torch.no_grad():
        out, lse = sdpa(q, k, v, **keywords)
        for i in (0, 1, 47, 48, 59):
            end = 1100 - 59 + i
            one, one_lse = sdpa(q[:, :, i : i + 1], k[:, :, :end], v[:, :, :end], **keywords)
            assert torch.equal(one[:, :, 0], out[:, :, i]) and torch.equal(one_lse[:, :, 0], lse[:, :, i]), i


THREADED = [
    AttentionCase(B=1, Hq=2, Hk=1, Tq=200, Tk=300, causal=1, dropout_p=0.1, why="one group of heads"),
    AttentionCase(B=1, Hq=3, Hk=3, Tq=2, Tk=1300, why="decoding"),
    AttentionCase(B=5, Hq=4, Hk=4, Tq=60, Tk=70, k_lengths=(1, 70, 3, 64, 65), why="many groups"),
    AttentionCase(B=2, Hq=2, Tq=100, Tk=130, mask="float", mask_of="hij", why="a bias shared by sequences"),
    AttentionCase(B=2, Hq=2, Tq=100, Tk=130, mask="float", mask_of="ij", why="a bias shared by sequences and heads"),
    AttentionCase(B=2, Hq=2, Tq=100, Tk=130, mask="float", mask_of="j", why="a bias of keys"),
    AttentionCase(B=2, Hq=2, Tq=100, Tk=130, mask="float", mask_of="i", why="a bias of queries"),
    AttentionCase(B=2, Hq=2, Tq=100, Tk=130, mask="float", mask_of="b", why="a mask of one value per sequence"),
    AttentionCase(
        B=3, q_lengths=(160, 1, 40), k_lengths=(30, 1100, 40), packed=True, why="packed, including decoding"
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", THREADED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_are_independent_of_the_number_of_threads(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs, results = make_attention_inputs(case, dtype), []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run_attention(inputs))
    for other in results[1:]:
        assert_same_bits(other, results[0])


def test_two_threads_run_in_parallel() -> None:
    torch.set_num_threads(2)
    assert seqkernels.explain("scaled_dot_product_attention", B=1, Hq=8, Tq=128, Tk=128, D=64)["threads"] == 2


# ---- masked keys

HIDDEN: dict[str, dict[str, Any]] = {
    "causal": dict(is_causal=True),
    "lower right": dict(is_causal=True, causal_alignment="lower_right"),
    "window": dict(window=(5, 3)),
    "bool mask": dict(attn_mask="bool"),
    "float mask": dict(attn_mask="float"),
    "dropout": dict(is_causal=True, dropout_p=0.4),
}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", HIDDEN)
def test_nan_in_masked_keys_does_not_affect_a_query(name: str, threads: int, bad: float, isa: str) -> None:
    torch.set_num_threads(threads)
    Tq, Tk = 60, 70
    tensors = [t.detach() for t in qkv(B=1, H=1, Tq=Tq, Tk=Tk)]
    keywords = dict(HIDDEN[name])
    if "attn_mask" in keywords:
        mask = torch.rand(Tq, Tk) < 0.5
        keywords["attn_mask"] = (
            mask if keywords["attn_mask"] == "bool" else torch.zeros(Tq, Tk).masked_fill(~mask, -math.inf)
        )
    args = {k: v for k, v in keywords.items() if k != "dropout_p"}
    seen = sdpa(*tensors, **args, return_weights=True)[1][0, 0] > 0

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return sdpa(*tensors, **keywords, return_lse=True)

    clean = gradients(run, *tensors)
    for which, j in ((1, 40), (2, 40), (1, 3), (2, 3)):
        with_nan_and_infinities = [t.clone() for t in tensors]
        with_nan_and_infinities[which][0, 0, j, 2] = bad
        got = gradients(run, *with_nan_and_infinities)
        rows = ~seen[:, j]
        for key in ("result 0", "result 1", "gradient 0"):
            assert torch.equal(got[key][0, 0][rows], clean[key][0, 0][rows]), f"{key} with {bad} in {which} at {j}"
    i = 30
    with_nan_and_infinities = [t.clone() for t in tensors]
    with_nan_and_infinities[0][0, 0, i, 2] = bad
    got = gradients(run, *with_nan_and_infinities)
    for key in ("gradient 1", "gradient 2"):
        assert torch.equal(got[key][0, 0][~seen[i]], clean[key][0, 0][~seen[i]]), f"{key} with {bad} in query {i}"


@pytest.mark.parametrize("seed", range(60))
def test_infinities_match_torch(seed: int, isa: str) -> None:
    """The math path of torch: a weight of 0 times an infinite value is NaN; a score of -inf masks the key."""
    draw = random.Random(seed)
    tensors = [R(1, 2, T, 5) for T in (9, 70, 70)]
    mask = torch.where(torch.rand(9, 70) < 0.2, -300.0, R(9, 70)) if seed % 3 == 0 else None
    for _ in range(draw.randint(1, 3)):
        t = draw.choice(tensors)
        t[0, draw.randrange(2), draw.randrange(9), draw.randrange(5)] = draw.choice([math.inf, -math.inf, math.nan])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        want = F.scaled_dot_product_attention(*tensors, attn_mask=mask)
    torch.testing.assert_close(sdpa(*tensors, attn_mask=mask), want, equal_nan=True, rtol=1e-5, atol=1e-5)
    whole = None if mask is None else mask[None, None]
    by_definition, _ = reference.attention(*tensors, whole, scale=5**-0.5)
    torch.testing.assert_close(by_definition, want, equal_nan=True, rtol=1e-5, atol=1e-5)
    args = (whole, *(None,) * 5, 0, 0, 5**-0.5, 1, -1, -1, 0.0, 0.3, torch.tensor([seed]))
    torch.testing.assert_close(
        ops.attention_forward(*tensors, *args)[:2],
        reference.attention(*tensors, *args),
        equal_nan=True,
        rtol=1e-5,
        atol=1e-5,
    )


# ---- dropout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_mask_matches_the_reference(dtype: torch.dtype, isa: str) -> None:
    B, H, Tq, Tk, p = 2, 3, 50, 131, 0.37
    q, k = torch.zeros(B, H, Tq, 4, dtype=dtype), torch.zeros(B, H, Tk, 4, dtype=dtype)
    for seed in (0, -1, 2**40 + 5, -(2**63)):
        seeds = torch.tensor([seed])
        args = (None,) * 6 + (0, 0, 1.0, 0, -1, -1, 0.0, p, seeds)
        _, lse, _ = ops.attention_forward(q, k, k, *args)
        weights = ops.attention_weights(q, k, *args, lse)
        assert torch.equal(weights > 0, dropout_keep(B, H, Tq, Tk, p, seeds)), seed


def test_dropout_depends_on_the_generator_and_the_probability() -> None:
    q = torch.ones(4, 8, 100, 4)
    torch.manual_seed(3)
    _, first = sdpa(q, q, q, dropout_p=0.25, return_weights=True)
    _, second = sdpa(q, q, q, dropout_p=0.25, return_weights=True)
    torch.manual_seed(3)
    _, again = sdpa(q, q, q, dropout_p=0.25, return_weights=True)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert abs((first > 0).double().mean().item() - 0.75) < 0.005
    torch.testing.assert_close(first[first > 0], torch.full([int((first > 0).sum())], 0.01 / 0.75))
    assert (sdpa(q, q, q, dropout_p=1.0) == 0).all()


# ---- derivatives

DERIVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal, lse, weights": dict(is_causal=True, return_lse=True, return_weights=True, softcap=2.0),
    "lengths, window": dict(lengths=([2], [3]), window=(2, 1), return_lse=True),
    "dropout": dict(dropout_p=0.3),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.2]), return_weights=True),
}


@pytest.mark.parametrize("name", DERIVED)
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    tensors = qkv(B=1, Tq=2, Tk=3, D=2, dtype=torch.float64)
    mask = R(1, 1, 2, 3, dtype=torch.float64).requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Any:
        torch.manual_seed(0)
        results = sdpa(q, k, v, attn_mask=mask, **DERIVED[name])
        results = results if isinstance(results, tuple) else (results,)
        return tuple(torch.where(r.isfinite(), r, 0) for r in results)

    assert torch.autograd.gradcheck(function, (*tensors, mask), check_forward_ad=True, fast_mode=name != "plain")
    assert torch.autograd.gradgradcheck(function, (*tensors, mask), fast_mode=True)


def test_varlen_gradcheck_and_gradgradcheck() -> None:
    tensors = leaves((3, 2, 1), (4, 1, 1), (4, 1, 2), dtype=torch.float64)
    bounds = torch.tensor([0, 2, 2, 3]), torch.tensor([0, 2, 3, 4])

    def function(*tensors: Tensor) -> Any:
        out, lse = varlen_attention(*tensors, *bounds, is_causal=True, enable_gqa=True, return_lse=True)
        return out, torch.where(lse.isfinite(), lse, 0)

    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


def test_functional_transforms() -> None:
    q, k, v = (R(3, 2, 2, 5, 4, dtype=torch.float64) for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True).square().sum()

    assert torch.equal(torch.vmap(sdpa)(q, k, v), torch.stack([sdpa(*t) for t in zip(q, k, v)]))
    mapped = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    for i in range(3):
        one = torch.func.grad(loss, argnums=(0, 1, 2))(q[i], k[i], v[i])
        assert all(torch.equal(m[i], o) for m, o in zip(mapped, one))
    tangents = tuple(torch.randn_like(t) for t in (q[0], k[0], v[0]))
    got = torch.func.jvp(functools.partial(sdpa, is_causal=True, return_lse=True), (q[0], k[0], v[0]), tangents)
    scale = 4**-0.5
    want = torch.func.jvp(lambda *t: reference.attention(*t, scale=scale, causal=1), (q[0], k[0], v[0]), tangents)
    torch.testing.assert_close(got, want)
    hessian = torch.func.hessian(loss)(q[0, :1, :1], k[0, :1, :1], v[0, :1, :1])
    assert hessian.isfinite().all()


def test_only_the_mask_has_a_gradient() -> None:
    q, k, v = (t.detach() for t in qkv())
    bias = R(1, 2, 6, 7).requires_grad_()
    (got,) = torch.autograd.grad(sdpa(q, k, v, attn_mask=bias).square().sum(), bias)
    (want,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).square().sum(), bias)
    torch.testing.assert_close(got, want)


def test_gradient_of_lse_only() -> None:
    q, k, v = qkv()
    _, lse = sdpa(q, k, v, return_lse=True)
    got = torch.autograd.grad(lse.square().sum(), (q, k, v), allow_unused=True)
    want = torch.autograd.grad((q @ k.transpose(-1, -2) / 8**0.5).logsumexp(-1).square().sum(), (q, k))
    torch.testing.assert_close(got[:2], want)
    assert (got[2] == 0).all()


OPCHECK = [ATTENTION_CASES[i] for i in (1, 17, 22, 12)] + [ATTENTION_CASES[-1]]


@pytest.mark.parametrize("case", OPCHECK, ids=str)
def test_opcheck(case: AttentionCase, raw_memory: None) -> None:
    inputs = make_attention_inputs(case, torch.float32)
    q, k, v = (inputs.tensors[n].nan_to_num().requires_grad_() for n in "qkv")
    rest = inputs.arguments()
    need = "mask" in inputs.tensors
    if need:
        rest[0].requires_grad_()
    torch.library.opcheck(ops.attention_forward.default, (q, k, v, *rest))
    checks = ("test_schema", "test_faketensor")
    out, lse, _ = (t.detach() for t in ops.attention_forward(q, k, v, *rest))
    q, k, v = (t.detach() for t in (q, k, v))
    rest = tuple(r.detach() if isinstance(r, Tensor) else r for r in rest)
    backward = (torch.randn_like(out), torch.randn_like(lse), q, k, v, *rest, out, lse, need)
    torch.library.opcheck(ops.attention_backward.default, backward, test_utils=checks)
    half = (*(t.bfloat16() for t in (q, k, v)), *(t.bfloat16() if t is rest[0] and need else t for t in rest))
    torch.library.opcheck(ops.attention_forward.default, (*half, True), test_utils=checks)
    out, lse, out_low = ops.attention_forward(*half, True)
    torch.library.opcheck(
        ops.attention_backward.default, (out, None, *half, out, lse, need, out_low), test_utils=checks
    )
    if not case.packed:
        torch.library.opcheck(ops.attention_weights.default, (q.requires_grad_(), k, *rest, lse))
        weights = R(*q.shape[:3], k.shape[2])
        arguments = (weights, q.detach(), k, *rest, lse, need)
        torch.library.opcheck(ops.attention_weights_backward.default, arguments, test_utils=checks)


# ---- compilers, autocast, nested tensors


def test_compile() -> None:
    bias = R(2, 1, 6, 7).requires_grad_()
    lengths = torch.tensor([3, 7])

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Any:
        return sdpa(
            q, k, v, attn_mask=bias, is_causal=True, lengths=lengths, softcap=5.0, return_lse=True, return_weights=True
        )

    tensors = [t.detach() for t in (*qkv(), bias)]
    got = gradients(torch.compile(function, fullgraph=True), *tensors)
    assert_same_bits(got, gradients(function, *tensors))

    def packed(rows: Tensor, cu: Tensor) -> Tensor:
        return varlen_attention(rows, rows, rows, cu, dropout_p=0.0, window=(3, 0))

    rows, cu = R(10, 2, 8), torch.tensor([0, 4, 4, 10])
    assert torch.equal(torch.compile(packed, fullgraph=True)(rows, cu), packed(rows, cu))
    dropped = torch.compile(lambda q: sdpa(q, q, q, dropout_p=0.5, return_weights=True)[1], fullgraph=True)(
        R(1, 2, 40, 8)
    )
    assert 0.4 < (dropped > 0).double().mean() < 0.6


def test_export() -> None:
    class Module(torch.nn.Module):
        def forward(self, q: Tensor, lengths: Tensor) -> Tensor:
            return sdpa(q, q, q, lengths=lengths, is_causal=True)

    q, lengths = R(2, 2, 6, 4), torch.tensor([3, 6])
    program = torch.export.export(Module(), (q, lengths), dynamic_shapes=({2: torch.export.Dim("T", min=2)}, None))
    q = R(2, 2, 60, 4)
    assert torch.equal(program.module()(q, lengths), Module()(q, lengths))


def test_autocast() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = sdpa(q, k, v, attn_mask=R(6, 7))
        rows = varlen_attention(R(5, 2, 8), R(5, 2, 8), R(5, 2, 8), torch.tensor([0, 2, 5]))
    assert out.dtype == rows.dtype == torch.bfloat16
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.float().sum(), (q, k, v)))


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("autocast", [False, True])
def test_tensors_without_data(where: str, autocast: bool) -> None:
    """Shapes and dtypes are those of tensors with data; autocast has none for meta tensors."""
    device = "meta" if where == "meta" else "cpu"
    with contextlib.ExitStack() as stack:
        if where == "fake":
            stack.enter_context(FakeTensorMode())
        if autocast:
            stack.enter_context(torch.autocast("cpu", torch.bfloat16))
        q, k = (torch.empty(2, H, T, 8, device=device).requires_grad_() for H, T in ((4, 6), (2, 7)))
        mask, lengths = torch.empty(6, 7, device=device), torch.empty(2, dtype=torch.int64, device=device)
        out, lse, weights = sdpa(
            q, k, k, attn_mask=mask, lengths=lengths, dropout_p=0.1, enable_gqa=True, return_lse=True,
            return_weights=True,
        )  # fmt: skip
        (out.sum() + weights.sum()).backward()
        rows, cu = torch.empty(10, 4, 8, device=device), torch.empty(4, dtype=torch.int32, device=device)
        packed = varlen_attention(rows, rows, rows, cu, is_causal=True)
    dtype = torch.bfloat16 if autocast and where == "fake" else torch.float32
    assert out.dtype == weights.dtype == packed.dtype == dtype and lse.dtype == q.grad.dtype == torch.float32
    assert (out.shape, lse.shape, weights.shape, packed.shape) == ((2, 4, 6, 8), (2, 4, 6), (2, 4, 6, 7), (10, 4, 8))
    assert q.grad.shape == q.shape and k.grad.shape == k.shape and out.device.type == device


@pytest.mark.parametrize("heads", [True, False])
def test_nested_tensors(heads: bool) -> None:
    parts = [R(n, 2, 4) if heads else R(n, 4) for n in (3, 5, 0, 2)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    rows = nested.transpose(1, 2) if heads else nested
    out, lse = sdpa(rows, rows, rows, is_causal=True, return_lse=True)
    assert out.shape == rows.shape and lse.shape == rows.shape[:-1]
    (grad,) = torch.autograd.grad(out.values().square().sum(), nested)
    for part, one, g in zip(parts, out.unbind(), grad.unbind()):
        if part.shape[0] == 0:
            continue
        part = part.detach().requires_grad_()
        row = part.transpose(0, 1) if heads else part
        want = sdpa(row, row, row, is_causal=True)
        assert torch.equal(one, want)
        assert torch.equal(g, torch.autograd.grad(want.square().sum(), part)[0])


def test_varlen_supports_the_options_of_dense() -> None:
    q, k, v = leaves((10, 4, 8), (12, 2, 8), (12, 2, 3))
    of_q, of_k = torch.tensor([0, 4, 4, 10]), torch.tensor([0, 5, 6, 12], dtype=torch.int32)
    slopes = torch.rand(3, 4)
    keywords: dict[str, Any] = dict(
        is_causal=True, causal_alignment="lower_right", window=(4, -1), softcap=3.0, enable_gqa=True, return_lse=True
    )
    out, lse = varlen_attention(q, k, v, of_q, of_k, alibi_slopes=slopes, **keywords)
    assert out.shape == (10, 4, 3) and out.is_contiguous() and lse.shape == (4, 10)
    for s in range(3):
        i, j = slice(of_q[s], of_q[s + 1]), slice(of_k[s], of_k[s + 1])
        dense = (t.transpose(0, 1).unsqueeze(0) for t in (q[i], k[j], v[j]))
        want, want_lse = sdpa(*dense, alibi_slopes=slopes[s], **keywords)
        assert torch.equal(out[i].transpose(0, 1), want[0]) and torch.equal(lse[:, i], want_lse[0])


def test_memory_is_not_quadratic() -> None:
    """Two tensors of scores would require 4 GB."""
    resource = pytest.importorskip("resource")
    q = R(1, 1, 20000, 8, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sdpa(q, q, q, window=64).sum().backward()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10


# ---- errors

Q, K = R(2, 4, 6, 8), R(2, 2, 7, 8)


def form(argument: str, condition: str = ".+", got: str = ".+", op: str = r"\w*attention\w*") -> str:
    return rf"{op}: {argument} must {condition}.*, got {got}"


GOOD: dict[str, Any] = dict(query=Q, key=K, value=K, enable_gqa=True)
ERRORS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "query a list": (dict(query=[1.0]), TypeError, form("query", "be a tensor", "a list")),
    "query of integers": (dict(query=Q.long()), NotImplementedError, "no backend supports a query .*int64"),
    "query 1-D": (dict(query=R(8)), ValueError, form("query", "have at least 2 dimensions")),
    "key of another dtype": (dict(key=K.double()), TypeError, form("key", "be of query's dtype")),
    "key on another device": (dict(key=K.to("meta")), ValueError, form("key", "be on query's device")),
    "key of other columns": (dict(key=R(2, 2, 7, 9)), ValueError, form("key", "have as many columns")),
    "value of other rows": (dict(value=R(2, 2, 6, 8)), ValueError, form("value", "have as many rows")),
    "other batches": (dict(key=R(3, 2, 7, 8), value=R(3, 2, 7, 8)), ValueError, form("batch dimensions.*", "be equal")),
    "other heads": (dict(enable_gqa=False), ValueError, form("key", "have as many heads")),
    "heads that do not divide": (dict(key=R(2, 3, 7, 8), value=R(2, 3, 7, 8)), ValueError, form("query's heads")),
    "heads of values": (dict(value=R(2, 3, 7, 8)), ValueError, form("query's heads")),
    "mask a list": (dict(attn_mask=[True]), TypeError, form("attn_mask", "be a tensor")),
    "mask of another dtype": (dict(attn_mask=R(6, 7).double()), TypeError, form("attn_mask", "be bool or")),
    "mask of integers": (dict(attn_mask=torch.ones(6, 7).long()), TypeError, form("attn_mask", "be bool or")),
    "mask of another shape": (dict(attn_mask=R(6, 8)), ValueError, form("attn_mask", ".*broadcast")),
    "mask 1-D": (dict(attn_mask=R(7)), ValueError, form("attn_mask", "have at least 2 dimensions")),
    "mask 5-D": (dict(attn_mask=R(1, 1, 1, 6, 7)), ValueError, form("attn_mask")),
    "dropout of 2": (dict(dropout_p=2.0), ValueError, form("dropout_p", "be between 0 and 1")),
    "dropout of NaN": (dict(dropout_p=math.nan), ValueError, form("dropout_p")),
    "lengths of another shape": (dict(lengths=torch.tensor([1])), ValueError, form("lengths", "have shape")),
    "lengths float": (dict(lengths=torch.tensor([1.0, 2.0])), TypeError, form("lengths", "be int32 or int64")),
    "lengths too long": (dict(lengths=[8, 1]), RuntimeError, form("k_lengths", "be between 0 and 7", "8")),
    "lengths negative": (dict(lengths=([-1, 1], None)), RuntimeError, form("q_lengths", "be between 0 and 6", "-1")),
    "alignment": (dict(causal_alignment="left"), ValueError, form("causal_alignment")),
    "window of -2": (dict(window=(-2, 1)), ValueError, form("window")),
    "window of three": (dict(window=(1, 2, 3)), ValueError, form("window")),
    "softcap negative": (dict(softcap=-1.0), ValueError, form("softcap")),
    "softcap infinite": (dict(softcap=math.inf), ValueError, form("softcap")),
    "slopes double": (dict(alibi_slopes=torch.ones(4).double()), TypeError, form("alibi_slopes", "be float32")),
    "slopes of another shape": (dict(alibi_slopes=torch.ones(3)), ValueError, form("alibi_slopes", "have shape")),
    "slopes with gradient": (dict(alibi_slopes=R(4, requires_grad=True)), NotImplementedError, "alibi_slopes must not"),
    "backend unknown": (dict(backend="cuda"), ValueError, form("backend")),
    "backend triton": (dict(backend="triton"), NotImplementedError, "backend triton cannot run .* on cpu"),
    "backend torch with softcap": (dict(backend="torch", softcap=1.0), NotImplementedError, "it has no softcap"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    wrong, error, message = ERRORS[name]
    with pytest.raises(error, match=message):
        sdpa(**{**GOOD, **wrong})


ROWS: dict[str, Any] = dict(query=R(6, 2, 8), key=R(7, 2, 8), value=R(7, 2, 8))
OF_Q, OF_K = torch.tensor([0, 2, 6]), torch.tensor([0, 4, 7])
VARLEN_ERRORS: dict[str, tuple[dict[str, Any], Any, str]] = {
    "query 4-D": (dict(query=R(1, 6, 2, 8)), ValueError, form("query", "have 3 dimensions")),
    "bounds a list": (dict(cu_seqlens_q=[0, 6]), TypeError, form("cu_seqlens_q", "be a tensor")),
    "bounds float": (dict(cu_seqlens_q=OF_Q.float()), TypeError, form("cu_seqlens_q", "be int32 or int64")),
    "bounds 2-D": (dict(cu_seqlens_q=OF_Q[None]), ValueError, form("cu_seqlens_q", "have shape")),
    "bounds of another number": (dict(cu_seqlens_k=OF_K[:2]), ValueError, form("cu_seqlens_k", "have the shape")),
    "bounds absent": (dict(cu_seqlens_k=None), ValueError, form("key", "have as many rows")),
    "bounds that end early": (dict(cu_seqlens_q=torch.tensor([0, 2, 5])), RuntimeError, form("cu_q", "begin with 0")),
    "bounds that begin late": (dict(cu_seqlens_q=torch.tensor([1, 2, 6])), RuntimeError, form("cu_q", "begin with 0")),
    "bounds that fall": (
        dict(cu_seqlens_q=torch.tensor([0, 8, 6]), max_seqlen_q=9), RuntimeError, form("cu_q", "not decrease")
    ),
    "longest too short": (dict(max_seqlen_q=3), RuntimeError, form("max_q", "be at least")),
    "longest negative": (dict(max_seqlen_q=-1), ValueError, form("max_seqlen_q", "not be negative")),
    "backend torch": (dict(backend="torch"), NotImplementedError, "it has no packed rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", VARLEN_ERRORS)
def test_varlen_errors(name: str) -> None:
    wrong, error, message = VARLEN_ERRORS[name]
    with pytest.raises(error, match=message):
        varlen_attention(**{**ROWS, "cu_seqlens_q": OF_Q, "cu_seqlens_k": OF_K, **wrong})


def test_nested_errors() -> None:
    nested = torch.nested.nested_tensor([R(3, 4), R(2, 4)], layout=torch.jagged)
    with pytest.raises(ValueError, match=r"must be absent where .* nested"):
        sdpa(nested, nested, nested, lengths=[1, 2])
    with pytest.raises(ValueError, match="must all be jagged"):
        sdpa(nested, R(2, 3, 4), R(2, 3, 4))


NOTHING = (None,) * 6 + (0, 0, 1.0, 0, -1, -1, 0.0, 0.0, None)


def changed(**at: Any) -> tuple:
    names = Inputs._fields + AttentionArgs._fields + ("seed",)
    return tuple({**dict(zip(names, NOTHING)), **at}.values())


def forward(*tensors: Tensor, **more: Any) -> Callable[[], Any]:
    return lambda: ops.attention_forward(*tensors, *changed(**more))


def backward(dout: Tensor, lse: Tensor, need_dmask: bool = False) -> Callable[[], Any]:
    return lambda: ops.attention_backward(dout, None, Q, K, K, *NOTHING, Q, lse, need_dmask)


OP_ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "q 3-D": (forward(Q[0], K, K), form("q", "have 4 dimensions")),
    "k of another dtype": (forward(Q, K.double(), K), form("k", "be float32")),
    "k of other columns": (forward(Q, R(2, 2, 7, 9), K), form("k", "have shape")),
    "v of other rows": (forward(Q, K, R(2, 2, 6, 8)), form("v", "have shape")),
    "mask 2-D": (forward(Q, K, K, attn_mask=R(6, 7)), form("attn_mask", "have shape")),
    "mask double": (forward(Q, K, K, attn_mask=R(1, 1, 6, 7).double()), form("attn_mask", "be float32")),
    "causal of 3": (forward(Q, K, K, causal=3), form("causal")),
    "no seed": (forward(Q, K, K, dropout_p=0.5), form("seed", "be given")),
    "half the bounds": (forward(Q, K, K, cu_q=OF_Q), "cu_q and cu_k must be given"),
    "packed and a mask": (
        forward(Q[:1], K[:1], K[:1], cu_q=OF_Q, cu_k=OF_K, max_q=9, max_k=9, attn_mask=torch.ones(1, 1, 6, 7) > 0),
        "q_lengths, k_lengths and attn_mask must be absent where rows are packed",
    ),
    "two of packed": (forward(Q, K, K, cu_q=OF_Q, cu_k=OF_K, max_q=9, max_k=9), form("q", "have shape")),
    "slopes of another shape": (forward(Q, K, K, alibi_slopes=torch.ones(2)), form("alibi_slopes", "have shape")),
    "dout of another shape": (backward(R(2, 4, 6, 9), Q[..., 0]), form("dout", "have shape")),
    "lse of another dtype": (backward(Q, Q[..., 0].double()), form("lse", "be float32")),
    "a mask's gradient without one": (backward(Q, Q[..., 0], True), form("need_dmask", "be False.*")),
}


@pytest.mark.parametrize("name", OP_ERRORS)
def test_op_errors(name: str) -> None:
    call, message = OP_ERRORS[name]
    with pytest.raises(RuntimeError, match=message):
        call()


def test_packed_sequences_reject_masks() -> None:
    """The fake implementation and the definition; test_op_errors has the op, tests/attention/test_triton.py Triton."""
    mask, message = torch.ones(1, 1, 6, 7) > 0, "attn_mask must be absent where rows are packed"
    more = changed(cu_q=OF_Q, cu_k=OF_K, max_q=9, max_k=9, attn_mask=mask)
    with pytest.raises(ValueError, match=message):
        reference.attention(Q[:1], K[:1], K[:1], *more)
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        ops.attention_forward(
            *(t.to("meta") for t in (Q[:1], K[:1], K[:1])),
            *(t.to("meta") if isinstance(t, Tensor) else t for t in more),
        )


# ---- backends


def test_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    assert torch.equal(sdpa(q, k, v, backend="cpu"), sdpa(q, k, v))
    assert torch.equal(sdpa(q, k, v, backend="torch"), F.scaled_dot_product_attention(q, k, v))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())  # as if Triton is installed

    def choose(dtype: torch.dtype, extras: list[str], masked: bool) -> str:
        request = backend.Request(torch.device("cuda"), dtype, None, extras, masked)
        return backend.choose("attention", backend.ATTENTION, request)

    assert choose(torch.bfloat16, [], False) == "torch"
    assert choose(torch.bfloat16, [], True) == choose(torch.float32, [], False) == "triton"
    assert choose(torch.float16, ["lengths"], False) == "triton"


def test_explain(isa: str) -> None:
    explain = functools.partial(seqkernels.explain, "scaled_dot_product_attention")
    answer = explain(B=4, Hq=8, Tq=512, Tk=512, D=64, extras=["lengths"])
    assert answer["kernel"] == "cpu" and answer["isa"] == isa
    assert answer["unsupported"]["torch"] == ["it has no lengths"]
    torch.set_num_threads(4)
    assert explain(B=1, Hq=1, Tq=1, Tk=4096, D=64)["tasks"] == "chunks of 512 keys"
    assert explain(B=1, Hq=1, Tq=400, Tk=4096, D=64)["tasks"] == "blocks of 48 queries"
    with pytest.raises(NotImplementedError, match="it has no softcap"):
        explain(B=1, Hq=1, Tq=1, Tk=1, D=1, extras=["softcap"], backend="torch")
