"""The fast paths of plain eager mode on a CPU against the other paths: results, gradients, transforms, errors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import seqkernels
from seqkernels.functional import _multihead_ops, attention, scaled_dot_product_attention
from seqkernels.nn import AdditiveAttention, LuongAttention, MultiheadAttention, TransformerEncoderLayer

ops: Any = torch.ops.seqkernels
B, T, S, E, H = 3, 5, 7, 8, 2


class PassThrough(TorchDispatchMode):
    """A mode without effect, in which the fast paths are not taken."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> Iterator[list[int]]:
    """Counts the calls of a function of a module."""
    calls, function = [0], getattr(module, name)

    def count(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return function(*args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(module, name, count)
        yield calls


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def module_of(**options: Any) -> MultiheadAttention:
    torch.manual_seed(0)
    module = MultiheadAttention(E, H, dtype=options.pop("dtype", torch.float64), **options)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return module


MASKS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "none": lambda t, s: {},
    "lengths": lambda t, s: {"key_padding_mask": torch.arange(s) >= torch.tensor([[s], [2], [0]])},
    "holes": lambda t, s: {"key_padding_mask": drawn(B, s, seed=3) > 0.3},
    "bool": lambda t, s: {"attn_mask": drawn(t, s, seed=4) > 0},
    "float": lambda t, s: {"attn_mask": drawn(t, s, seed=5)},
    "causal": lambda t, s: {"attn_mask": torch.ones(t, s).triu(1).bool(), "is_causal": True},
    "causal lengths": lambda t, s: {
        "attn_mask": torch.ones(t, s).triu(1).bool(),
        "is_causal": True,
        "key_padding_mask": torch.arange(s) >= torch.tensor([[s], [2], [0]]),
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first, bias", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("weights", ["none", "mean", "heads"])
@pytest.mark.parametrize("own", [True, False], ids=["self", "cross"])
def test_multihead_equals_the_other_path(
    monkeypatch: pytest.MonkeyPatch, masks: str, batch_first: bool, bias: bool, weights: str, own: bool
) -> None:
    module = module_of(batch_first=batch_first, bias=bias)
    query, memory = drawn(B, T, E), drawn(B, S, E, seed=1)
    if not batch_first:
        query, memory = query.transpose(0, 1), memory.transpose(0, 1)
    given = MASKS[masks](T, T if own else S)
    options = dict(need_weights=weights != "none", average_attn_weights=weights == "mean", **given)
    results = []
    for fast in (True, False):
        x, m = query.detach().clone().requires_grad_(), memory.detach().clone().requires_grad_()
        keys = x if own else m
        module.zero_grad()
        with counted(monkeypatch, seqkernels.nn.attention, "multihead") as calls:
            if fast:
                y, w = module(x, keys, keys, **options)
            else:
                with PassThrough():
                    y, w = module(x, keys, keys, **options)
        assert calls[0] == fast
        loss = (y * drawn(*y.shape, seed=6)).sum()
        if w is not None:
            loss = loss + (w * drawn(*w.shape, seed=7)).sum()
        loss.backward()
        results.append([y, w, x.grad, None if own else m.grad, *(p.grad for p in module.parameters())])
        with torch.no_grad():
            torch.testing.assert_close(module(x, keys, keys, **options)[0], y)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", "query"])
def test_multihead_with_frozen_inputs(frozen: str) -> None:
    module = module_of(batch_first=True)
    x, m = drawn(B, T, E).requires_grad_(frozen != "query"), drawn(B, S, E, seed=1).requires_grad_()
    for name, p in module.named_parameters():
        p.requires_grad_(name != frozen)
    module(x, m, m, need_weights=False)[0].sin().sum().backward()
    found = {name: p.grad for name, p in module.named_parameters()} | {"query": x.grad, "memory": m.grad}
    module.zero_grad()
    x.grad = m.grad = None
    with PassThrough():
        y = module(x, m, m, need_weights=False)[0]
    y.sin().sum().backward()
    wanted = {name: p.grad for name, p in module.named_parameters()} | {"query": x.grad, "memory": m.grad}
    assert found[frozen] is None and wanted[frozen] is None
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("weights", [False, True])
def test_multihead_gradients_of_second_order(weights: bool) -> None:
    module = module_of(batch_first=True)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    padding = torch.arange(T) >= torch.tensor([[T], [2], [0]])

    def function(x: Tensor, *values: Tensor) -> Any:
        arguments = (x, x, x), {"need_weights": weights, "key_padding_mask": padding}
        found = torch.func.functional_call(module, dict(zip(parameters, values)), *arguments)
        return found if weights else found[0]

    inputs = drawn(B, T, E).requires_grad_(), *parameters.values()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_multihead_in_hooks_of_saved_tensors_and_checkpoints() -> None:
    module = module_of(batch_first=True)
    x = drawn(B, T, E).requires_grad_()

    def call(x: Tensor) -> Tensor:
        output: Tensor = module(x, x, x, need_weights=False)[0]
        return output

    (wanted,) = torch.autograd.grad(call(x).sin().sum(), x)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = call(x)
    assert packed
    torch.testing.assert_close(torch.autograd.grad(y.sin().sum(), x)[0], wanted)
    for reentrant in (False, True):
        x.grad = None
        checkpoint(call, x, use_reentrant=reentrant).sin().sum().backward()
        torch.testing.assert_close(x.grad, wanted)


def test_multihead_refuses_changed_inputs() -> None:
    module = module_of(batch_first=True)
    x, padding = drawn(B, T, E).requires_grad_(), torch.zeros(B, T, dtype=torch.bool)
    y, _ = module(x, x, x, need_weights=False, key_padding_mask=padding)
    padding[0, 0] = True
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_multihead_under_compile_transforms_and_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_of(batch_first=True)
    x = drawn(B, T, E)
    wanted = module(x, x, x, need_weights=False)[0]

    def call(x: Tensor) -> Tensor:
        output: Tensor = module(x, x, x, need_weights=False)[0]
        return output

    class Call(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = module

        def forward(self, x: Tensor) -> Tensor:
            return call(x)

    with counted(monkeypatch, seqkernels.nn.attention, "multihead") as calls:
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), wanted)
        torch.testing.assert_close(torch.func.vmap(lambda one: call(one[None])[0])(x), wanted)
        tangent = torch.func.jvp(call, (x,), (x,))[1]
        assert tangent.shape == x.shape
        torch.testing.assert_close(torch.jit.trace(Call(), x, check_trace=False)(x), wanted)
    assert calls[0] == 0


def test_hooks_and_patches_of_out_proj_run() -> None:
    module = module_of(batch_first=True)
    x = drawn(B, T, E)
    plain = module(x, x, x)[0]
    seen: list[Tensor] = []
    handle = module.out_proj.register_forward_hook(lambda _m, _i, output: seen.append(output) or output + 1)
    torch.testing.assert_close(module(x, x, x)[0], plain + 1)
    handle.remove()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda m, _i, output: output + 2 if m is module.out_proj else None
    )
    torch.testing.assert_close(module(x, x, x)[0], plain + 2)
    handle.remove()
    original = module.out_proj.forward
    module.out_proj.forward = lambda t: original(t) + 3  # type: ignore[method-assign]
    torch.testing.assert_close(module(x, x, x)[0], plain + 3)
    assert len(seen) == 1


@pytest.mark.parametrize("name", ["in_proj_bias", "in_proj_weight", "out_proj.bias"])
def test_parameters_replaced_by_attributes(name: str) -> None:
    module, x = module_of(batch_first=True), drawn(B, T, E)
    owner: Any = module.out_proj if name.startswith("out") else module
    name = name.rpartition(".")[2]
    value = getattr(owner, name).detach() * 2
    delattr(owner, name)
    setattr(owner, name, value)
    found = module(x, x, x)[0]
    with PassThrough():
        torch.testing.assert_close(found, module(x, x, x)[0])


def test_encoder_layer_with_parameters_replaced_by_attributes() -> None:
    layer, x = TransformerEncoderLayer(E, H, 16, batch_first=True).eval(), torch.randn(B, T, E)
    wanted = layer(x)
    for owner, name in ((layer.linear1, "weight"), (layer.norm2, "bias"), (layer.self_attn, "in_proj_bias")):
        value = getattr(owner, name).detach()
        delattr(owner, name)
        setattr(owner, name, value)
        torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("sizes", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_multihead_without_rows(sizes: tuple[int, int, int]) -> None:
    b, t, s = sizes
    module = module_of(batch_first=True)
    results = []
    for fast in (True, False):
        x, m = drawn(b, t, E).requires_grad_(), drawn(b, s, E, seed=1).requires_grad_()
        if fast:
            y, w = module(x, m, m)
        else:
            with PassThrough():
                y, w = module(x, m, m)
        results.append((y, w, *torch.autograd.grad(y.sum(), (x, m, *module.parameters()))))
    for a, c in zip(*results):
        torch.testing.assert_close(a, c)


def test_multihead_with_batched_gradients() -> None:
    module, x = module_of(batch_first=True), drawn(1, 3, E).requires_grad_()
    y = module(x, x, x, need_weights=False)[0]
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)
    (batched,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in basis]
    torch.testing.assert_close(batched, torch.stack(single))


def test_dropout_of_the_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = module_of(batch_first=True, dropout=0.4), drawn(B, T, E).requires_grad_()
    found = []
    for need_weights, average in itertools.product((False, True), repeat=2):
        for fast in (True, False):
            torch.manual_seed(1)
            with counted(monkeypatch, seqkernels.nn.attention, "multihead") as calls:
                if fast:
                    y, w = module(x, x, x, need_weights=need_weights, average_attn_weights=average)
                else:
                    with PassThrough():
                        y, w = module(x, x, x, need_weights=need_weights, average_attn_weights=average)
            assert calls[0] == fast
            (dx,) = torch.autograd.grad(y.sin().sum(), x)
            found.append((y, w, dx))
        torch.testing.assert_close(found[-2], found[-1])


@pytest.mark.parametrize(
    "arguments, error, text",
    [
        ({"key": "x"}, TypeError, "key must be a tensor"),
        ({"query": drawn(B, T, E + 1)}, AssertionError, "query must have 8 columns"),
        (
            {"key_padding_mask": torch.zeros(B, T + 1, dtype=torch.bool)},
            AssertionError,
            "key_padding_mask must have shape",
        ),
        ({"key_padding_mask": torch.zeros(B, T, dtype=torch.int64)}, TypeError, "key_padding_mask must be bool"),
        ({"attn_mask": torch.zeros(T, T + 1, dtype=torch.bool)}, RuntimeError, "attn_mask must have shape"),
        ({"lengths": torch.tensor([9, 1, 1])}, ValueError, "lengths must be between 0 and 5"),
    ],
)
def test_errors_are_those_of_the_checks(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    x = drawn(B, T, E)
    given = {"query": x, "key": x, "value": x} | arguments
    if arguments.get("key"):
        given["value"] = arguments["key"]
    with pytest.raises(error, match=text):
        module_of(batch_first=True)(**given)


def test_ops_of_multihead_pass_opcheck() -> None:
    checks = ("test_schema", "test_faketensor")
    q, kv = drawn(B, T, 3 * E), drawn(B, S, 2 * E)
    padding = drawn(B, S, seed=2) > 0
    for arguments in (
        (q, None, H, True, None, None, 0.5, 1, 0.0, None),
        (q[..., :E], kv, H, True, padding, None, 0.5, 0, 0.0, None),
        (q.transpose(0, 1), None, H, False, None, drawn(1, 1, T, T), 0.5, 0, 0.25, torch.tensor([3])),
    ):
        for need_weights in range(3):
            torch.library.opcheck(
                ops.multihead_attention_forward.default, (*arguments, need_weights), test_utils=checks
            )
        out, lse, _ = ops.multihead_attention_forward(*arguments, 0)
        torch.library.opcheck(
            ops.multihead_attention_backward.default, (out, *arguments, out, lse), test_utils=checks
        )  # fmt: skip
    q4, lengths = drawn(B, H, T, 4), torch.tensor([5, 0, 2])
    for mask, of in ((None, None), (drawn(1, 1, T, T) > 0, None), (None, lengths)):
        torch.library.opcheck(ops.attention_dense.default, (q4, q4, q4, mask, of, 0.5, 1), test_utils=checks)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(q=drawn(B, T, 7)), "q must have 3 dimensions and a multiple of 6 columns"),
        (dict(kv=drawn(B, S, E)), "q must have the batch|kv must have the batch of q, 3, and 48 columns"),
        (dict(padding=torch.zeros(B, S + 9, dtype=torch.bool)), "padding must have shape"),
        (dict(padding=torch.zeros(B, T)), "padding must be bool"),
        (dict(padding=torch.zeros(B, T, dtype=torch.bool), mask=drawn(1, 1, T, T)), "attn_mask must be absent"),
        (dict(need_weights=3), "need_weights must be 0"),
        (dict(heads=0), "q must have 3 dimensions"),
        (dict(q=drawn(B, T, 3 * E).bfloat16()), "q must be float32 or float64, got bfloat16"),
    ],
)
def test_ops_of_multihead_check_their_arguments(change: dict[str, Any], text: str) -> None:
    given = dict(q=drawn(B, T, 3 * E), kv=None, heads=H, padding=None, mask=None, need_weights=0) | change
    arguments = given["q"], given["kv"], given["heads"], True, given["padding"], given["mask"], 0.5, 0, 0.0, None
    with pytest.raises(RuntimeError, match=text):
        ops.multihead_attention_forward(*arguments, given["need_weights"])


@pytest.mark.parametrize("sizes", [(1, 1, 100, 50), (2, 3, 60, 64), (1, 1, 40, 64), (2, 2, 50, 70), (1, 1, 100, 200)])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["none", "lengths", "holes", "causal", "dropout"])
def test_weights_of_one_and_of_more_blocks_of_keys(
    sizes: tuple[int, int, int, int], threads: int, dtype: torch.dtype, kind: str, isa: str
) -> None:
    b, h, t, s = sizes
    q, kv = drawn(b, t, h * 8, dtype=dtype), drawn(b, s, 2 * h * 8, dtype=dtype, seed=1)
    lengths = torch.linspace(0, s // 2, b).long() if b > 1 else torch.tensor([s // 3])
    padding = {
        "lengths": torch.arange(s) >= lengths[:, None],
        "holes": (drawn(b, s, seed=2) > 0) | (torch.arange(b) == 1).view(-1, 1),
    }.get(kind)
    dropout_p, seed = (0.3, torch.tensor([5])) if kind == "dropout" else (0.0, None)
    causal = int(kind == "causal")
    by_head = [x.unflatten(-1, (h, 8)).transpose(1, 2) for x in (q, *kv.chunk(2, -1))]
    mask = None if padding is None else padding.logical_not().view(b, 1, 1, s)
    rest = (mask, None, None, None, None, None, 0, 0, 0.4, causal, -1, -1, 0.0, dropout_p, seed)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out, lse, _ = ops.attention_forward(*by_head, *rest)
        weights = ops.attention_weights(*by_head[:2], *rest, lse)
        for need_weights, wanted in ((0, None), (1, weights.mean(1)), (2, weights)):
            found = ops.multihead_attention_forward(
                q, kv, h, True, padding, None, 0.4, causal, dropout_p, seed, need_weights
            )
            torch.testing.assert_close(found[0], out.transpose(1, 2).flatten(2))
            torch.testing.assert_close(found[1], lse)
            if wanted is not None:
                torch.testing.assert_close(found[2], wanted)
    finally:
        torch.set_num_threads(before)


def test_backward_of_the_fast_path_in_a_flop_counter() -> None:
    module, x = module_of(batch_first=True), drawn(B, T, E).requires_grad_()
    y = module(x, x, x, need_weights=False)[0]
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    products = 2 * B * T * E * (E + 3 * E)  # of the projections, twice: gradients of inputs and of weights
    assert counter.get_total_flops() == 2 * products + 2 * B * T * T * E * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("Hk", [4, 2])
def test_dense_equals_the_other_path(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_causal: bool, mask: str | None, Hk: int
) -> None:
    q, k, v = drawn(2, 4, T, E, dtype=dtype), drawn(2, Hk, S, E, dtype=dtype), drawn(2, Hk, S, 3, dtype=dtype)
    m = None if mask is None else drawn(1, 4, T, S, dtype=dtype, seed=9)
    if mask == "bool" and m is not None:
        m = m > 0
    for needs in (False, True):
        results = []
        for fast in (True, False):
            inputs = [t.detach().clone().requires_grad_(needs) for t in (q, k, v)]
            with counted(monkeypatch, attention, "attend_eagerly") as calls:
                options: Any = dict(attn_mask=m, is_causal=is_causal, enable_gqa=True)
                if fast:
                    out = scaled_dot_product_attention(*inputs, **options)
                else:
                    with PassThrough():
                        out = scaled_dot_product_attention(*inputs, **options)
            assert calls[0] == fast
            grads = torch.autograd.grad(out.sin().sum(), inputs) if needs else ()
            results.append((out, *grads))
        for a, b in zip(*results):
            assert torch.equal(a, b)


def test_dense_gradients_of_second_order_and_batched_gradients() -> None:
    inputs = [drawn(1, 2, 3, 4, seed=i).requires_grad_() for i in range(3)]
    assert torch.autograd.gradgradcheck(scaled_dot_product_attention, inputs)
    out = scaled_dot_product_attention(*inputs)
    basis = torch.eye(out.numel(), dtype=out.dtype).view(-1, *out.shape)
    batched = torch.autograd.grad(out, inputs, basis, is_grads_batched=True, retain_graph=True)
    single = [torch.autograd.grad(out, inputs, one, retain_graph=True) for one in basis]
    for i, found in enumerate(batched):
        torch.testing.assert_close(found, torch.stack([one[i] for one in single]))


@pytest.mark.parametrize("method", ["dot", "general"])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 0, 3])])
@pytest.mark.parametrize("need_weights", [False, True])
def test_luong_equals_the_other_path(method: Any, single: bool, lengths: Any, need_weights: bool) -> None:
    torch.manual_seed(0)
    module = LuongAttention(E, method=method, scale=0.7, dtype=torch.float64)
    results = []
    for fast in (True, False):
        query = (drawn(B, E) if single else drawn(B, T, E)).requires_grad_()
        keys = drawn(B, S, E, seed=1).requires_grad_()
        if fast:
            found = module(query, keys, lengths=lengths, need_weights=need_weights)
        else:
            with PassThrough():
                found = module(query, keys, lengths=lengths, need_weights=need_weights)
        found = found if need_weights else (found,)
        loss = sum((t * drawn(*t.shape, seed=5)).sum() for t in found)
        results.append((*found, *torch.autograd.grad(loss, (query, keys))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 0, 3])])
@pytest.mark.parametrize("need_weights", [False, True])
def test_additive_equals_the_other_path(kept: bool, single: bool, lengths: Any, need_weights: bool) -> None:
    torch.manual_seed(0)
    module = AdditiveAttention(E, E, 6, dtype=torch.float64)
    results = []
    for fast in (True, False):
        query = (drawn(B, E) if single else drawn(B, T, E)).requires_grad_()
        keys = drawn(B, S, E, seed=1).requires_grad_()
        given = module.project(keys) if kept else keys
        options: Any = dict(lengths=lengths, need_weights=need_weights)
        if fast:
            assert module._fast(query, given, None, lengths, need_weights) is not None
            found = module(query, given, **options)
        else:
            with PassThrough():
                found = module(query, given, **options)
        found = found if need_weights else (found,)
        loss = sum((t * drawn(*t.shape, seed=5)).sum() for t in found)
        results.append((*found, *torch.autograd.grad(loss, (query, keys, *module.parameters()))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_additive_calls_hooks_and_reports_invalid_lengths() -> None:
    module, query, keys = AdditiveAttention(E, E), torch.randn(B, E), torch.randn(B, S, E)
    wanted = module(query, keys)
    handle = module.key_projection.register_forward_hook(lambda _m, _i, output: output * 0)
    assert not torch.allclose(module(query, keys), wanted)
    handle.remove()
    with pytest.raises(ValueError, match="lengths must be between 0 and 7, got 8"):
        module(query, keys, lengths=torch.tensor([8, 1, 1]))
    changed = module.project(keys)
    keys.add_(1)
    with pytest.raises(ValueError, match="must not change after AdditiveKeys"):
        module(query, changed)


def test_luong_reports_invalid_lengths() -> None:
    module = LuongAttention(E, method="dot")
    with pytest.raises(ValueError, match="LuongAttention: lengths must be between 0 and 7, got 8"):
        module(torch.randn(B, E), torch.randn(B, S, E), lengths=torch.tensor([8, 1, 1]))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", ["none", "lengths", "causal lengths"])
def test_encoder_layer_equals_its_modules(norm_first: bool, masks: str) -> None:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(E, H, 16, norm_first=norm_first, batch_first=True, dtype=torch.float64).eval()
    given = MASKS[masks](T, T)
    options = dict(src_mask=given.get("attn_mask"), src_key_padding_mask=given.get("key_padding_mask"))
    options["is_causal"] = given.get("is_causal", False)
    x = drawn(B, T, E).requires_grad_()
    assert layer._evaluates_formula()
    fast = layer(x, **options)
    handle = layer.linear2.register_forward_hook(lambda *_: None)
    assert not layer._evaluates_formula()
    slow = layer(x, **options)
    handle.remove()
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(fast.sin().sum(), x), torch.autograd.grad(slow.sin().sum(), x)):
        torch.testing.assert_close(a, b)


def test_encoder_layer_calls_replaced_methods_and_dropout() -> None:
    layer, x = TransformerEncoderLayer(E, H, 16, batch_first=True).eval(), torch.randn(B, T, E)
    layer._ff_block = lambda t: t * 0  # type: ignore[method-assign]
    torch.testing.assert_close(layer(x), F.layer_norm(layer.norm1(x + layer._sa_block(x, None, None)), (E,)))
    del layer._ff_block
    layer.dropout1.train()
    assert not layer._evaluates_formula()


def test_definition_of_the_module_is_its_reference() -> None:
    """The definition that second derivatives use, against the ops."""
    module, x = module_of(batch_first=True), drawn(B, T, E)
    parameters = module.in_proj_weight, module.in_proj_bias, module.out_proj.weight, module.out_proj.bias
    options = _multihead_ops.Options(H, True, 0.5, 0, 0.0)
    found = _multihead_ops.multihead(
        x, None, _multihead_ops.Parameters(*parameters), None, None, None, options, _multihead_ops.MEAN_WEIGHTS
    )
    wanted = _multihead_ops._definition(None, None, None, options, _multihead_ops.MEAN_WEIGHTS)(x, None, *parameters)
    torch.testing.assert_close(tuple(found), tuple(wanted))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_output_may_be_changed_in_place(bias: bool, batch_first: bool, need_weights: bool) -> None:
    ours = seqkernels.nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, 8)
    found = []
    for module in (ours, theirs):
        input = x.clone().requires_grad_()
        y = module(input, input, input, need_weights=need_weights)[0]
        y.mul_(2)
        y[0] += 1
        y.square().sum().backward()
        found.append([y.detach(), input.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
