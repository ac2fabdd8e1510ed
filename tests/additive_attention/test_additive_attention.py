"""Additive and Luong attention: the definition, gradients, bits, extremes, beams, layouts, errors, tools."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from additive_attention.cases import CASES, NAMES, TOLERANCE, Case, assert_near, make, ours, run
from seqkernels import build_info, explain, nn, reference
from seqkernels.functional import AdditiveKeys, additive_attention
from support.cases import DTYPES
from support.fuzzing import bounded

ops = torch.ops.seqkernels
close = torch.testing.assert_close
f64 = torch.float64


def check(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    """Asserts that results and gradients match the reference."""
    given = make(case, dtype, seed)
    wide = {n: t.double() if n in NAMES else t for n, t in given.items()}
    got, want = run(ours, given), run(reference.additive_attention, wide)
    assert got["result 0"].dtype == dtype and got["result 1"].dtype == dtype
    assert_near(got, want, TOLERANCE[dtype] * max(case.scale, 1.0))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_match_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    B, Tk = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    return Case(
        why="random", B=B, Tq=draw(st.integers(0, 9)), Tk=Tk, H=draw(st.integers(1, 70)), Dv=draw(st.integers(0, 40)),
        lengths=draw(st.none() | st.tuples(*[st.integers(0, Tk)] * B)),
        mask=draw(st.sampled_from(["", "BQK", "BK", "1QK", "B1K"])), scale=draw(st.sampled_from([1.0, 6.0])),
    )  # fmt: skip


@bounded(examples=40)
@drawn(case=random_cases(), dtype=st.sampled_from([f64, torch.float32]), seed=st.integers(0, 99))
def test_random_sizes_match_the_reference(case: Case, dtype: torch.dtype, seed: int) -> None:
    check(case, dtype, seed)


@pytest.mark.parametrize("case", [CASES[0], CASES[15], CASES[17]], ids=str)
def test_errors_are_those_of_torch(case: Case, isa: str) -> None:
    """Against float64, at most twice the error of the same formula in torch."""
    given = make(dataclasses.replace(case, B=4, Tq=40, Tk=50, H=256, Dv=64, lengths=None, mask=""), torch.float32)
    wide = {n: None if t is None else t.double() for n, t in given.items()}
    got, torchs, want = (
        run(ours, given),
        run(reference.additive_attention, given),
        run(reference.additive_attention, wide),
    )
    for name, w in want.items():
        mine, theirs = ((r[name].double() - w).square().mean().sqrt().item() for r in (got, torchs))
        assert mine <= 2 * theirs + 1e-8 * w.abs().max().item(), f"{name}: {mine} against {theirs}"


SMALL = [
    Case(why="plain", B=2, Tq=2, Tk=3, H=4, Dv=2),
    Case(why="lengths", B=3, Tq=2, Tk=3, H=3, Dv=2, lengths=(3, 0, 1)),
    Case(why="a mask", B=2, Tq=2, Tk=3, H=3, Dv=2, mask="BQK"),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    given = make(case)
    leaves = [given.pop(n).requires_grad_() for n in NAMES]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return ours(*tensors, **given)

    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 8, 9, 11, 14)], ids=str)
def test_opcheck(case: Case, raw_memory: None) -> None:
    given = make(case)
    leaves = [given[n].requires_grad_() for n in NAMES]
    torch.library.opcheck(ops.additive_attention_forward.default, (*leaves, given["mask"], given["lengths"], None))
    torch.library.opcheck(ops.additive_attention_key_exp.default, (given["key"].detach(),))
    plain = [t.detach() for t in leaves]
    exp = ops.additive_attention_key_exp(plain[1])
    out, weights = ops.additive_attention_forward(*plain, given["mask"], given["lengths"], exp)
    upstream = torch.randn_like(out), torch.randn_like(weights)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = (*upstream, *plain, given["lengths"], exp, weights)
    torch.library.opcheck(ops.additive_attention_backward.default, arguments, test_utils=checks)


def test_transforms() -> None:
    given = make(Case(why="plain", B=2, Tq=3, Tk=4, H=5, Dv=2))
    query, key, value, v = (given[n] for n in NAMES)

    def total(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return additive_attention(query, AdditiveKeys(key, value), None, v).square().sum()

    one = [t.unsqueeze(1) for t in (query, key, value)]
    want = torch.stack([total(*(t[b] for t in one)) for b in range(2)])
    close(torch.func.vmap(total)(*one), want)
    per_sample = torch.func.vmap(torch.func.grad(total, (0, 1, 2)))(*one)
    for got, w in zip(per_sample, torch.func.grad(total, (0, 1, 2))(query, key, value)):
        close(got[:, 0], w)
    hessian = torch.func.hessian(total)(query, key, value)
    close(hessian, torch.autograd.functional.hessian(lambda q: total(q, key, value), query))


# ---- bits and extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_batch_padding_or_threads(dtype: torch.dtype, isa: str) -> None:
    case = Case(why="company", B=5, Tq=37, Tk=40, H=70, Dv=24, lengths=(40, 31, 8, 1, 17), large=25.0)
    given = make(case, dtype)
    whole = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        whole[threads] = run(ours, given)
    for threads in (2, 3):
        assert all(torch.equal(whole[1][n], t) for n, t in whole[threads].items())
    for b, n in enumerate(case.lengths):
        alone = {k: t[b : b + 1] for k, t in given.items() if k in NAMES[:3]} | dict(v=given["v"])
        alone |= {k: alone[k][:, :n] for k in ("key", "value")}
        found = ours(**alone)
        assert torch.equal(found[0][0], whole[1]["result 0"][b])
        assert torch.equal(found[1][0], whole[1]["result 1"][b, :, :n])
        for i in (0, 1, 2, 36):
            row = ours(**(alone | dict(query=alone["query"][:, i : i + 1])))
            assert torch.equal(row[0][0, 0], whole[1]["result 0"][b, i])


def test_nan_in_padding_and_hidden_keys_reaches_nothing(isa: str) -> None:
    given = make(Case(why="hidden", B=3, lengths=(5, 3, 0), mask="B1K"), torch.float32)
    given["mask"][:, :, 0] = False
    clean = run(ours, given)
    for b, n in enumerate(given["lengths"].tolist()):
        for name in ("key", "value"):
            given[name][b, n:] = torch.nan
            given[name][b, 0] = torch.nan
    for bad in (torch.nan, torch.inf):
        given |= {n: torch.where(given[n].isfinite(), given[n], bad) for n in ("key", "value")}
        got = run(ours, given)
        for name, want in clean.items():
            close(got[name], want, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert not got["result 0"][2].any() and not got["result 1"][2].any()
    given["value"][0, 1] = torch.nan
    assert given["mask"][0, 0, 1] or given["mask"][0, 0, 2]
    seen = bool(given["mask"][0, 0, 1])
    assert ours(**given)[0][0].isnan().all() == seen


def test_nan_spreads_as_in_the_reference() -> None:
    given = make(CASES[0], torch.float32)
    given["query"][0, 1, 2] = torch.nan
    given["key"][1, 2, 3] = torch.nan
    given["value"][2, 3, 4] = torch.nan
    got, want = run(ours, given), run(reference.additive_attention, given)
    for name, w in want.items():
        if name != "dvalue":  # 0 * NaN
            assert torch.equal(got[name].isnan(), w.isnan()), name


def test_opposite_extremes_are_exact(isa: str) -> None:
    """e^(2 q) e^(2 k) overflows, although tanh(q + k) is moderate."""
    for dtype, large in ((torch.float32, 22.0), (torch.float32, 90.0), (f64, 400.0)):
        query = torch.tensor([[[large, 0.1]]], dtype=dtype)
        key = torch.tensor([[[0.3 - large, 0.2], [-large, 0.1], [large, -0.3]]], dtype=dtype)
        value, v = torch.eye(3, dtype=dtype)[None], torch.tensor([1.0, 0.5], dtype=dtype)
        got = additive_attention(query, key, value, v)[0, 0]
        want = (torch.tanh(query + key) @ v).softmax(-1)[0]
        close(got, want)


def test_strides_and_offsets() -> None:
    given = make(CASES[15])
    want = ours(**given)
    for view in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    ):
        moved = {n: view(t) if t is not None else t for n, t in given.items()}
        assert all(torch.equal(a, b) for a, b in zip(ours(**moved), want))


# ---- keys that are used again, beams


def test_keys_are_used_again() -> None:
    for dtype in DTYPES:
        given = make(Case(why="beyond the bound", large=30.0), dtype)
        key, value = given.pop("key"), given.pop("value")
        keys = AdditiveKeys(key, value)
        got = ours(given["query"], keys, None, given["v"])
        want = ours(given["query"], key, value, given["v"])
        assert all(torch.equal(a, b) for a, b in zip(got, want))
    leaf = key.detach().requires_grad_()
    grads = []
    for keys in (AdditiveKeys(leaf, value), leaf):
        out = additive_attention(given["query"], keys, value, given["v"])
        grads.append(torch.autograd.grad(out.sum(), leaf)[0])
    assert torch.equal(*grads)
    keys = AdditiveKeys(key, value)
    key.mul_(2)
    with pytest.raises(ValueError, match="key must not change after AdditiveKeys was made from it"):
        additive_attention(given["query"], keys, None, given["v"])
    keys = AdditiveKeys(key, value)
    for other in (copy.deepcopy(keys), pickle.loads(pickle.dumps(keys))):
        got = additive_attention(given["query"], other, None, given["v"])
        assert torch.equal(got, additive_attention(given["query"], keys, None, given["v"]))
    value.zero_()
    for call in (lambda: additive_attention(given["query"], keys, None, given["v"]), lambda: copy.deepcopy(keys)):
        with pytest.raises(ValueError, match="value must not change after AdditiveKeys was made from it"):
            call()
    with pytest.raises(TypeError, match="value must be a tensor, or None with AdditiveKeys that have values"):
        additive_attention(given["query"], AdditiveKeys(key), None, given["v"])
    assert "AdditiveKeys(key=[3, 7, 13], value=[3, 7, 11]" in repr(AdditiveKeys(key, value))


def test_keys_are_a_pytree() -> None:
    given = make(CASES[0])
    keys = AdditiveKeys(given["key"], given["value"])
    index = torch.tensor([2, 0])
    taken = pytree.tree_map(lambda t: t.index_select(0, index), keys)
    got = additive_attention(given["query"][index], taken, None, given["v"])
    assert torch.equal(got, additive_attention(given["query"], keys, None, given["v"])[index])


@pytest.mark.parametrize("mask", ["", "sentences", "beams", "queries of beams"])
def test_beams_share_the_keys_of_their_sentence(mask: str) -> None:
    B, R, Tq, Tk, H = 3, 4, 2, 6, 9
    query, key, value, v = torch.randn(B * R, Tq, H), torch.randn(B, Tk, H), torch.randn(B, Tk, 5), torch.randn(H)
    shape = {"sentences": (B, 1, Tk), "beams": (B * R, Tk), "queries of beams": (B * R, Tq, Tk)}.get(mask)
    visible = None if shape is None else torch.rand(shape) < 0.7
    many = visible.repeat_interleave(R, 0) if mask == "sentences" else visible
    lengths = torch.tensor([6, 0, 3])
    got = ours(query, key, value, v, lengths=lengths, mask=visible)
    copies = [t.repeat_interleave(R, 0) for t in (key, value)]
    want = ours(query, *copies, v, lengths=lengths.repeat_interleave(R), mask=many)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    first = many[:, :1] if many is not None and many.dim() == 3 else many
    single = ours(query[:, 0], key, value, v, lengths=lengths, mask=first)
    assert torch.equal(single[0], got[0][:, 0]) and single[1].shape == (B * R, Tk)


# ---- modules


def eager(module: nn.AdditiveAttention, query: Tensor, keys: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    pairs = module.query_projection(query)[:, :, None] + module.key_projection(keys)[:, None]
    scores = torch.tanh(pairs) @ module.v
    seen = torch.arange(keys.shape[1]) < lengths[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return weights @ keys, weights


def test_additive_module() -> None:
    module = nn.AdditiveAttention(6, 10, 8)
    query, keys, lengths = torch.randn(3, 2, 6), torch.randn(3, 5, 10), torch.tensor([5, 1, 3])
    got, want = module(query, keys, lengths=lengths, need_weights=True), eager(module, query, keys, lengths)
    close(got, want)
    projected = module.project(keys)
    assert torch.equal(module(query, projected, lengths=lengths), got[0])
    one = module(query[:, 0], projected, lengths=lengths, need_weights=True)
    assert torch.equal(one[0], got[0][:, 0]) and torch.equal(one[1], got[1][:, 0])
    values = torch.randn(3, 5, 4)
    assert module(query, keys, values).shape == (3, 2, 4)
    assert torch.equal(module(query, keys, values), module(query, module.project(keys, values)))
    assert "query_dim=6, key_dim=10, hidden_dim=8" in repr(module)
    again = pickle.loads(pickle.dumps(copy.deepcopy(module)))
    assert torch.equal(again(query, keys, lengths=lengths), got[0])
    again.load_state_dict(module.state_dict())
    before = module.v.clone()
    module.reset_parameters()
    assert not torch.equal(module.v, before)
    assert nn.AdditiveAttention(6, 10, bias=False).query_projection.bias is None


@pytest.mark.parametrize("names", [("W1", "W2", "V"), ("Wa", "Ua", "Va"), ("W_q", "W_k", "w_v"), ("attn", "v")])
def test_published_layouts_load(names: tuple[str, ...]) -> None:
    Dq, Dk, H = 6, 10, 8

    class Published(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if len(names) == 2:
                self.attn, self.v = torch.nn.Linear(Dq + Dk, H), torch.nn.Linear(H, 1, bias=False)
            else:
                for name, layer in zip(names, (torch.nn.Linear(Dq, H), torch.nn.Linear(Dk, H), torch.nn.Linear(H, 1))):
                    setattr(self, name, layer)

        def forward(self, query: Tensor, keys: Tensor) -> Tensor:
            pair = query[:, :, None].expand(-1, -1, keys.shape[1], -1), keys[:, None].expand(-1, query.shape[1], -1, -1)
            if len(names) == 2:
                scores = self.v(torch.tanh(self.attn(torch.cat(pair, -1))))
            else:
                of_query, of_keys, v = (getattr(self, name) for name in names)
                scores = v(torch.tanh(of_query(pair[0]) + of_keys(pair[1])))
            return scores[..., 0].softmax(-1) @ keys

    theirs, module = Published(), nn.AdditiveAttention(Dq, Dk, H)
    module.load_state_dict(theirs.state_dict())
    query, keys = torch.randn(2, 3, Dq), torch.randn(2, 5, Dk)
    close(module(query, keys), theirs(query, keys))
    outer = torch.nn.ModuleDict({"attention": module})
    outer.load_state_dict({f"attention.{name}": t for name, t in theirs.state_dict().items()})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict(theirs.state_dict() | {"other": torch.zeros(1)})


@pytest.mark.parametrize("method", ["dot", "general", "concat"])
def test_luong_module(method: str) -> None:
    Dq, Dk = 6, 6 if method == "dot" else 10
    module = nn.LuongAttention(Dq, Dk, method)
    query, keys, lengths = torch.randn(4, 3, Dq), torch.randn(4, 5, Dk), torch.tensor([5, 1, 3, 0])

    def scores(q: Tensor, k: Tensor) -> Tensor:
        if method == "dot":
            return q @ k.transpose(1, 2)
        if method == "general":
            return torch.einsum("bqi,bki->bqk", q, module.attn(k))
        pairs = torch.cat((q[:, :, None].expand(-1, -1, 5, -1), k[:, None].expand(-1, q.shape[1], -1, -1)), -1)
        return torch.tanh(module.attn(pairs)) @ module.v

    seen = torch.arange(5) < lengths[:, None, None]
    weights = scores(query, keys).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    got = module(query, keys, lengths=lengths, need_weights=True)
    close(got, (weights @ keys, weights))
    assert torch.equal(module(query, module.project(keys), lengths=lengths), got[0])
    values = torch.randn(4, 5, 2)
    close(module(query, keys, values, lengths=lengths), weights @ values)
    beams = query.repeat_interleave(3, 0)
    of_beams = module(beams, keys, lengths=lengths, need_weights=True, mask=seen)
    close(of_beams[0], got[0].repeat_interleave(3, 0))
    assert module(query[:, 0], keys, lengths=lengths).shape == (4, Dk)
    out = module(query, keys, lengths=lengths).sum()
    grads = torch.autograd.grad(out, list(module.parameters())) if method != "dot" else ()
    assert all(g.isfinite().all() for g in grads)
    again = nn.LuongAttention(Dq, Dk, method)
    state = module.state_dict()
    if method == "general":
        state |= {"attn.bias": torch.randn(Dq)}
    if method == "concat":
        state |= {"v": module.v.detach()[None]}
    again.load_state_dict(state)
    assert torch.equal(again(query, keys), module(query, keys))
    assert f"method='{method}'" in repr(module)


# ---- tools


@pytest.mark.parametrize("kind", ["additive", "general", "concat"])
def test_compile_export_and_meta(kind: str) -> None:
    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.AdditiveAttention(6, 6) if kind == "additive" else nn.LuongAttention(6, 6, kind)

        def forward(self, query: Tensor, memory: Tensor, lengths: Tensor) -> Tensor:
            keys = self.attention.project(memory)
            first = self.attention(query[:, 0], keys, lengths=lengths)
            return self.attention(query[:, 1] + first, keys, lengths=lengths)

    model = Decoder()
    inputs = torch.randn(3, 2, 6), torch.randn(3, 5, 6), torch.tensor([5, 2, 4])
    want = model(*inputs)
    want.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    got.sum().backward()
    close(got, want)
    close([p.grad for p in model.parameters()], grads)
    exported = torch.export.export(model, inputs, dynamic_shapes=({0: torch.export.Dim.AUTO},) * 3).module()
    close(exported(*(t[:2] for t in inputs)), model(*(t[:2] for t in inputs)))
    assert model.to("meta")(*(t.to("meta") for t in inputs)).shape == (3, 6)


def test_layers_may_be_replaced() -> None:
    """Adapters and quantization replace the linear layers."""
    query, memory = torch.randn(3, 2, 6), torch.randn(3, 5, 6)
    for module in (nn.AdditiveAttention(6, 6), nn.LuongAttention(6), nn.LuongAttention(6, 6, "concat")):
        want = module(query, memory)
        for name, layer in list(module.named_children()):
            setattr(module, name, torch.nn.Sequential(layer, torch.nn.Identity()))
        if getattr(module, "method", "") == "concat":
            with pytest.raises(TypeError, match="attn must be its own layer with method concat, got Sequential"):
                module(query, memory)
            module = nn.LuongAttention(6, 6, "concat")
            module.attn.register_forward_hook(lambda *_: None)
            with pytest.raises(TypeError, match="attn must have no hooks with method concat"):
                module(query, memory)
        else:
            assert torch.equal(module(query, memory), want)


def test_autocast() -> None:
    module = nn.AdditiveAttention(6, 10, 8)
    query, memory = torch.randn(3, 2, 6), torch.randn(3, 5, 10)
    keys = module.project(memory)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = module(query, memory, need_weights=True)
        assert out.dtype == weights.dtype == torch.bfloat16
        again = module(query, keys)
    close(again, out, rtol=0, atol=3e-2)
    close(out.float(), module(query, memory), rtol=0, atol=3e-2)
    half = nn.AdditiveAttention(6, 10, 8, dtype=torch.float16)
    assert half(query.half(), memory.half()).dtype == torch.float16


def test_no_cube_is_kept_or_made() -> None:
    """Memory of training: nothing of the size of [B, Tq, Tk, H] is allocated or saved."""
    B, T, H = 2, 60, 128
    leaves = [torch.randn(B, T, H, requires_grad=True) for _ in range(3)] + [torch.randn(H, requires_grad=True)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.autograd.grad(additive_attention(*leaves).sum(), leaves)
    assert max(e.self_cpu_memory_usage for e in profile.events()) < B * T * T * H * 4 / 10


def test_explain() -> None:
    found = explain("additive_attention", B=2, Tq=3, Tk=5, H=8)
    assert found["kernel"] == "cpu" and found["isa"] == build_info()["isa"] and "triton" in found["unsupported"]
    found = explain("additive_attention", B=2, Tq=3, Tk=5, H=8, device="cuda")
    assert found["kernel"] == "triton" and found["tile"] == (4, 32, 32)
    with pytest.raises(TypeError, match="explain: H must be given for additive_attention"):
        explain("additive_attention", B=2, Tq=3, Tk=5)


# ---- errors

Q, K, V, W = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6), torch.zeros(4)
M = torch.ones(2, 3, 5, dtype=torch.bool)
ERRORS: dict[str, tuple[Callable, type[Exception], str]] = {
    "a list": (lambda: additive_attention([1.0], K, V, W), TypeError, "query must be a tensor, got a list"),
    "no value": (lambda: additive_attention(Q, K, None, W), TypeError, "value must be a tensor, or None"),
    "integers": (lambda: additive_attention(Q.int(), K, V, W), NotImplementedError, "no backend supports a query"),
    "query": (lambda: additive_attention(Q[0, 0], K, V, W), ValueError, r"query must have shape \[B, Tq, H\]"),
    "key": (lambda: additive_attention(Q, K[:, :, 1:], V, W), ValueError, r"key must have shape \[B, Tk, H\], of H"),
    "value": (lambda: additive_attention(Q, K, V[:, 1:], W), ValueError, r"value must have shape \[B, Tk, Dv\]"),
    "v": (lambda: additive_attention(Q, K, V, W[1:]), ValueError, r"v must have shape \[H\] = \[4\], got \[3\]"),
    "bias": (lambda: additive_attention(Q, K, V, W, bias=W[1:]), ValueError, r"bias must have shape \[H\] = \[4\]"),
    "dtype": (lambda: additive_attention(Q, K.double(), V, W), TypeError, "key must be of query's dtype"),
    "device": (lambda: additive_attention(Q, K, V.to("meta"), W), ValueError, "value must be on query's device cpu"),
    "batch": (lambda: additive_attention(Q[:1], K, V, W), ValueError, "query must have the batch of key, 2, or a mult"),
    "mask": (lambda: additive_attention(Q, K, V, W, mask=M[:, :2]), ValueError, r"mask must have shape \[B, Tk\], \[B"),
    "mask dtype": (lambda: additive_attention(Q, K, V, W, mask=M.float()), TypeError, "mask must be bool or uint8"),
    "mask list": (lambda: additive_attention(Q, K, V, W, mask=[True]), TypeError, "mask must be a tensor, got a list"),
    "too long": (lambda: additive_attention(Q, K, V, W, lengths=[5, 6]), ValueError, "lengths must be between 0"),
    "count": (lambda: additive_attention(Q, K, V, W, lengths=[5]), ValueError, r"lengths must have shape \[B\] = "),
    "real": (lambda: additive_attention(Q, K, V, W, lengths=W[:2]), TypeError, "lengths must be int32 or int64"),
    "backend": (lambda: additive_attention(Q, K, V, W, backend="mps"), ValueError, "backend must be None, cpu"),
    "keys": (lambda: AdditiveKeys([1.0]), TypeError, "AdditiveKeys: key must be a tensor, got a list"),
    "keys' shape": (lambda: AdditiveKeys(W), ValueError, r"AdditiveKeys: key must have shape \[B, Tk, H\]"),
    "keys' dtype": (lambda: AdditiveKeys(K.int()), TypeError, "AdditiveKeys: key must be torch.float32"),
    "module": (lambda: nn.AdditiveAttention(4, 0), ValueError, "AdditiveAttention: key_dim must be at least 1, got 0"),
    "module size": (lambda: nn.AdditiveAttention("4", 1), TypeError, "query_dim must be an int, got str"),
    "module query": (lambda: nn.AdditiveAttention(3, 4)(Q, K), ValueError, r"query must have shape \[B, T, 3\] or"),
    "module keys": (lambda: nn.AdditiveAttention(4, 3)(Q, K), ValueError, r"keys must have shape \[B, T, 3\], got"),
    "method": (lambda: nn.LuongAttention(4, 4, "sum"), ValueError, "method must be dot, general or concat, got 'sum'"),
    "dot": (lambda: nn.LuongAttention(4, 5, "dot"), ValueError, "key_dim must be query_dim with method dot, 4, got 5"),
    "hidden": (lambda: nn.LuongAttention(4, hidden_dim=5), ValueError, "hidden_dim must be None with method general"),
    "scale": (lambda: nn.LuongAttention(4, 4, "concat", scale=2.0), ValueError, "scale must be 1 with method concat"),
    "luong keys": (lambda: nn.LuongAttention(4, 3, "concat")(Q, K), ValueError, "LuongAttention: keys must have"),
    "luong projected": (
        lambda: nn.LuongAttention(4, 4)(Q, nn.LuongAttention(4, 4, "concat").project(K)),
        TypeError,
        "keys must be what project of this module returns, got AdditiveKeys for method general",
    ),
    "luong lengths": (
        lambda: nn.LuongAttention(4)(Q, K, lengths=[9, 1]),
        ValueError,
        "^LuongAttention: lengths must be between 0 and 5",
    ),
    "luong values": (lambda: nn.LuongAttention(4)(Q, K, V[:, 1:]), ValueError, r"values must have shape \[B, Tk, Dv\]"),
    "luong dtype": (lambda: nn.LuongAttention(4)(Q.double(), K), TypeError, "keys must be of the dtype of query"),
    "module dtype": (lambda: nn.AdditiveAttention(4, 4)(Q.double(), K), TypeError, "query must be of the dtype of the"),
    "module keys' dtype": (lambda: nn.AdditiveAttention(4, 4)(Q, K.half()), TypeError, "keys must be of the dtype of"),
    "luong batch": (lambda: nn.LuongAttention(4)(Q[:1], K), ValueError, "query must have the batch of key, 2, or a"),
    "scripting": (lambda: torch.jit.script(nn.AdditiveAttention(4, 4)), NotImplementedError, "torch.jit.script"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_op_errors() -> None:
    """The ops check what would be read or written outside memory."""
    forward, backward = ops.additive_attention_forward, ops.additive_attention_backward
    lengths, out, weights = torch.tensor([5, 9]), torch.zeros(2, 3, 6), torch.zeros(2, 3, 5)
    for call, message in (
        (lambda: forward(Q[0], K, V, W, None, None, None), "query must have 3 dimensions"),
        (lambda: forward(Q, K[:1], V, W, None, None, None), "key must have shape"),
        (lambda: forward(Q, K, V[:, 1:], W, None, None, None), "value must have shape"),
        (lambda: forward(Q, K, V, W[1:], None, None, None), "v must have shape"),
        (lambda: forward(Q, K, V, W.double(), None, None, None), "v must be float32"),
        (lambda: forward(Q, K, V, W, M[:, :2], None, None), "mask must have shape"),
        (lambda: forward(Q, K, V, W, M.byte(), None, None), "mask must be bool"),
        (lambda: forward(Q, K, V, W, None, lengths, None), "lengths must be between 0 and 5, got 9"),
        (lambda: forward(Q, K, V, W, None, None, K[:1]), "key_exp must have shape"),
        (lambda: backward(out[1:], None, Q, K, V, W, None, None, weights), "dout must have shape"),
        (lambda: backward(None, weights[1:], Q, K, V, W, None, None, weights), "dweights must have shape"),
        (lambda: backward(out, None, Q, K, V, W, None, None, weights[1:]), "weights must have shape"),
        (lambda: backward(out, None, Q, K, V, W, lengths, None, weights), "lengths must be between"),
        (lambda: ops.additive_attention_key_exp(W), "key must have 3 dimensions"),
        (lambda: ops.additive_attention_key_exp(K.int()), "key must be float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
