"""Small valid calls of each public operator, and the calls of ops (torch.ops.seqkernels) that they make.

Dimensions: B sequences, T steps, D input, H hidden, E table rows, K tags.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from seqkernels import decoding, functional, inference, nn
from seqkernels.reference.attention import quantize_rows as quantize_keys
from support.variants import FULLEST, VARIANTS, Variant

ops = torch.ops.seqkernels
B, T, D, H, E, K = 3, 4, 5, 6, 7, 4


@dataclasses.dataclass(frozen=True)
class Call:
    """function(**arguments). with_gradients: whether floating-point arguments and parameters get gradients."""

    name: str
    function: Callable[..., Any]
    arguments: dict[str, Any]
    with_gradients: bool = True

    def __str__(self) -> str:
        return self.name


def tensors_of(values: Any) -> list[Tensor]:
    """All tensors of a nest."""
    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def run(call: Call, gradients: bool = True) -> list[Tensor]:
    """Results, and gradients of the sum of the squares of the differentiable ones."""
    arguments = copy.deepcopy(call.arguments)
    differentiable_arguments = [value for name, value in arguments.items() if name != "alibi_slopes"]
    leaves = [t for t in tensors_of(differentiable_arguments) if t.is_floating_point()]
    with torch.set_grad_enabled(gradients and call.with_gradients):
        if torch.is_grad_enabled():
            if isinstance(call.function, torch.nn.Module):
                leaves += list(call.function.parameters())
            leaves = [t.requires_grad_() for t in leaves]
        results = tensors_of(call.function(**arguments))
        differentiable = [r for r in results if r.requires_grad]
        found: tuple[Tensor | None, ...] = ()
        if differentiable:
            total = sum(torch.where(r.isfinite(), r, 0).square().sum() for r in differentiable)
            found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [t.detach() for t in [*results, *found] if t is not None]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


# ---- the table


def _module(variant: Variant, **options: Any) -> torch.nn.Module:
    own = {name: 4 if name == "proj_size" else value for name, value in variant.options.items()}
    return getattr(nn, variant.module)(D, H, **own, **options)


def _layers() -> Iterator[Call]:
    plainest = {v.kind: v for v in sorted(VARIANTS, key=lambda v: -len(v.options))}
    for variant in dict.fromkeys([*plainest.values(), *FULLEST.values()]):
        module = _module(variant, bidirectional=True)
        x, lengths = normal(T, B, D), torch.tensor([4, 0, 2])
        yield Call(f"nn.{variant}", module, dict(input=x, lengths=lengths))
        if variant is FULLEST[variant.kind]:
            reset = torch.tensor([[0, 1, 0]] * T, dtype=torch.bool)
            yield Call(f"nn.{variant}, reset", module, dict(input=x, reset=reset))
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 2, 1]))
            yield Call(f"nn.{variant}, packed", module, dict(input=packed))
    for name, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        hx: Any = normal(2, B, H)
        weights = [normal(gates * H, D), normal(gates * H, H), normal(gates * H), normal(gates * H)] * 2
        arguments = dict(
            input=normal(T, B, D),
            hx=(hx, normal(2, B, H)) if name == "lstm" else hx,
            weights=weights,
            bidirectional=True,
        )
        yield Call(f"functional.{name}", getattr(functional, name), arguments)
        h = normal(B, H)
        cell = dict(zip(("w_ih", "w_hh", "b_ih", "b_hh"), weights))
        cell |= dict(input=normal(B, D), hx=(h, normal(B, H)) if name == "lstm" else h)
        yield Call(f"functional.{name}_cell", getattr(functional, f"{name}_cell"), cell)
    for cell_name in ("LSTMCell", "GRUCell", "RNNCell", "DreamerGRUCell"):
        yield Call(f"nn.{cell_name}", getattr(nn, cell_name)(D, H), dict(input=normal(B, D)))
    for name in ("mgu", "dreamer_gru", "nested_lstm", "slstm"):
        title = {"mgu": "MGU", "dreamer_gru": "DreamerGRU", "nested_lstm": "NestedLSTM", "slstm": "SLSTM"}[name]
        module = getattr(nn, title)(D, H)
        weights = [p.detach().clone() for p in module.parameters()]
        yield Call(
            f"functional.{name}", getattr(functional, name), dict(input=normal(T, B, D), hx=None, weights=weights)
        )


def _prepared() -> Iterator[Call]:
    for kind, variant in FULLEST.items():
        module = _module(variant).eval()
        for precision in ("float32", "int8") if kind in ("lstm", "gru") else ("bfloat16",):
            prepared = inference.prepare(module, precision)[0]
            x = normal(T, B, D)
            state = prepared(x)[1]
            arguments = dict(input=x, hx=state, lengths=torch.tensor([4, 0, 2]))
            yield Call(f"prepared {kind}, {precision}", prepared, arguments, with_gradients=False)
            yield Call(
                f"prepared {kind}, {precision}, stream", _streamed(prepared), dict(input=x, state=state),
                with_gradients=False,
            )  # fmt: skip
    batch_sizes = torch.tensor([3, 2, 2, 1])
    yield Call("ops.packed_sequences", ops.packed_sequences.default, dict(batch_sizes=batch_sizes), False)
    cell = inference.prepare(nn.LSTMCell(D, H).eval())[0]
    yield Call("prepared cell", cell, dict(input=normal(B, D)), with_gradients=False)
    yield Call("inference.prepare", _prepare, dict(model=nn.LSTM(D, H).eval(), weights="int8"), with_gradients=False)


def _streamed(module: torch.nn.Module) -> Callable[..., Any]:
    def step(input: Tensor, state: Any) -> Any:
        return module(input, state, out_state=state)

    return step


def _prepare(model: torch.nn.Module, weights: str) -> list[Tensor]:
    """The packed buffers, and the weights that they stand for."""
    module = inference.prepare(model, weights)[0]
    packed, scales = ops.recurrent_pack(normal(4 * H, D), 4, 4, 1, 3)
    return [*module.buffers(), ops.recurrent_unpack(packed, scales, 4 * H, D, 4, 4, 1, 3)]


def _bags() -> Iterator[Call]:
    table, rows = normal(E, D), torch.tensor([1, 0, 6, 6, 2, 3])
    offsets, weights = torch.tensor([0, 3, 3]), torch.rand(6) + 0.1
    bags: dict[str, Any] = dict(input=rows, weight=table, offsets=offsets)
    for mode in ("sum", "mean", "max", "min"):
        yield Call(f"functional.embedding_bag, {mode}", functional.embedding_bag, bags | dict(mode=mode))
        more = dict(mode=mode, sparse=True, scale_grad_by_freq=True, padding_idx=6)
        yield Call(f"functional.embedding_bag, {mode}, sparse", functional.embedding_bag, bags | more)
    yield Call(
        "functional.embedding_bag, weights", functional.embedding_bag,
        bags | dict(mode="mean", per_sample_weights=weights, weight_norm="weight"),
    )  # fmt: skip
    yield Call("functional.embedding_bag, 2-D", functional.embedding_bag, dict(input=rows.view(3, 2), weight=table))
    yield Call("functional.embedding_bag, max_norm", functional.embedding_bag, bags | dict(max_norm=0.5), False)
    yield Call("functional.embedding", functional.embedding, dict(input=rows.view(2, 3), weight=table, padding_idx=1))
    several = dict(input=rows, weights=[table, normal(E, 3)], offsets=torch.tensor([0, 2, 3, 3, 6]))
    for mode in ("mean", "max"):
        yield Call(f"functional.embedding_bags, {mode}", functional.embedding_bags, several | dict(mode=mode))
        yield Call(
            f"functional.embedding_bags, {mode}, sparse", functional.embedding_bags,
            several | dict(mode=mode, sparse=True),
        )  # fmt: skip
    yield Call(
        "functional.embedding_bags, weights", functional.embedding_bags,
        several | dict(mode="sum", per_sample_weights=weights),
    )  # fmt: skip
    yield Call("functional.quantize_rows", functional.quantize_rows, dict(weight=table), False)
    packed = functional.quantize_rows(table)
    yield Call(
        "functional.embedding_bag_bytes", functional.embedding_bag_bytes,
        dict(input=rows, packed=packed, offsets=offsets, per_sample_weights=weights, mode="sum"), False,
    )  # fmt: skip
    yield Call("nn.Embedding", nn.Embedding(E, D), dict(input=rows))
    yield Call("nn.EmbeddingBag", nn.EmbeddingBag(E, D, mode="max"), dict(input=rows, offsets=offsets))
    yield Call("nn.QuantizedEmbeddingBag", nn.QuantizedEmbeddingBag(E, D), dict(input=rows, offsets=offsets), False)
    config = [nn.EmbeddingBagConfig(E, D, ["a"]), nn.EmbeddingBagConfig(E, 3, ["b"])]
    yield Call("nn.EmbeddingBagCollection", nn.EmbeddingBagCollection(config), dict(
        input=rows, offsets=torch.tensor([0, 2, 3, 3, 6]),
    ))  # fmt: skip
    for optimizer in (
        nn.FusedSGD(lr=0.1), nn.FusedAdagrad(lr=0.1), nn.FusedRowwiseAdagrad(lr=0.1), nn.FusedAdam(lr=0.1),
    ):  # fmt: skip
        of, name = dict(fused_optimizer=optimizer), type(optimizer).__name__
        yield Call(f"nn.{name}", _trained(nn.EmbeddingBag(E, D, **of)), dict(input=rows, offsets=offsets))
        collection = nn.EmbeddingBagCollection(config, **of)
        of_both = torch.tensor([0, 2, 3, 3, 6])
        yield Call(f"nn.{name}, collection", _trained(collection), dict(input=rows, offsets=of_both))
    bags_of_op = rows, offsets, None, 0
    yield Call("ops.embedding_bag_traced", _positional(ops.embedding_bag_traced.default), dict(arguments=[
        table, *bags_of_op, -1, False, 0, True, -1,
    ]), False)  # fmt: skip
    yield Call("ops.embedding_bags_traced", _positional(ops.embedding_bags_traced.default), dict(arguments=[
        [table, table], [1, 1], rows, torch.tensor([0, 2, 3, 3, 6]), None, 0, -1, True, 0, True, -1,
    ]), False)  # fmt: skip
    yield Call("ops.embedding_bag", _positional(ops.embedding_bag.default), dict(arguments=[table, *bags_of_op]), False)


def _positional(op: Callable[..., Any]) -> Callable[..., Any]:
    def call(arguments: list) -> Any:
        return op(*arguments)

    return call


def _trained(module: torch.nn.Module) -> Callable[..., Any]:
    """A step of the fused optimiser, which changes the table."""

    def step(input: Tensor, offsets: Tensor) -> Tensor:
        output = module(input, offsets)
        if output.requires_grad:
            output.square().sum().backward()
        return output.detach()

    return step


def _attention() -> Iterator[Call]:
    q, k, v = normal(B, 2, T, 8), normal(B, 2, 5, 8), normal(B, 2, 5, 6)
    lengths = torch.tensor([4, 0, 1]), torch.tensor([5, 2, 0])
    plain = dict(query=q, key=k, value=v)
    sdpa = functional.scaled_dot_product_attention
    yield Call("functional.scaled_dot_product_attention", sdpa, plain)
    yield Call(
        "functional.scaled_dot_product_attention, mask", sdpa, plain | dict(attn_mask=normal(T, 5), is_causal=True)
    )
    yield Call("functional.scaled_dot_product_attention, lengths", sdpa, plain | dict(
        lengths=lengths, is_causal=True, causal_alignment="lower_right", window=(2, 1), softcap=2.0, dropout_p=0.3,
        alibi_slopes=torch.rand(2), return_lse=True,
    ))  # fmt: skip
    yield Call("functional.scaled_dot_product_attention, weights", sdpa, plain | dict(return_weights=True))
    packed = dict(query=normal(6, 2, 8), key=normal(7, 2, 8), value=normal(7, 2, 6))
    yield Call("functional.varlen_attention", functional.varlen_attention, packed | dict(
        cu_seqlens_q=torch.tensor([0, 4, 4, 6]), cu_seqlens_k=torch.tensor([0, 1, 5, 7]), max_seqlen_q=4,
        max_seqlen_k=4,
    ))  # fmt: skip
    module = nn.MultiheadAttention(8, 2, batch_first=True)
    x = normal(B, T, 8)
    yield Call("nn.MultiheadAttention", module, dict(query=x, key=x, value=x))
    yield Call("nn.MultiheadAttention, lengths", module, dict(
        query=x, key=x, value=x, lengths=torch.tensor([4, 1, 0]), need_weights=False
    ))  # fmt: skip
    for need in (0, 2):
        yield Call(f"ops.multihead_attention, {need}", _multihead, dict(
            q=normal(B, T, 24), kv=None, padding=torch.zeros(B, T, dtype=torch.bool), need_weights=need,
        ), False)  # fmt: skip
    yield Call("nn.TransformerEncoderLayer", nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), dict(src=x))
    decoder = nn.TransformerDecoderLayer(8, 2, 8, 0.0, batch_first=True)
    yield Call("nn.TransformerDecoderLayer", decoder, dict(tgt=x, memory=normal(B, 3, 8)))
    yield Call("nn.PositionalEncoding", nn.PositionalEncoding(8, batch_first=True), dict(x=x))
    for dtype in (torch.float32, torch.int8):
        cache = dict(query=normal(B, 4, 2, 8), key=normal(B, 2, 2, 8), value=normal(B, 2, 2, 8), dtype=dtype)
        yield Call(f"nn.KeyValueCache, {dtype}", _cached, cache, False)
    keys, key_scales = quantize_keys(normal(4, 2, 3, 8))
    values, value_scales = quantize_keys(normal(4, 2, 3, 8))
    yield Call("ops.attention_decode", ops.attention_decode.default, dict(
        q=normal(B, 4, 1, 8), keys=keys, values=values, key_scales=key_scales, value_scales=value_scales,
        block_table=torch.tensor([[0, 3], [1, 0], [2, 2]], dtype=torch.int32), attn_mask=None, alibi_slopes=None,
        q_lengths=torch.tensor([1, 1, 0]), k_lengths=torch.tensor([5, 0, 3]), scale=0.3, causal=2, window_left=-1,
        window_right=-1, softcap=0.0,
    ), False)  # fmt: skip
    yield Call("ops.attention_dense", ops.attention_dense.default, dict(
        q=q, k=k, v=v, attn_mask=normal(1, 1, T, 5), k_lengths=lengths[1], scale=0.3, causal=1
    ), False)  # fmt: skip
    query, key, value, u = normal(B, T, H), normal(B, 5, H), normal(B, 5, D), normal(H)
    additive = dict(query=query, key=key, value=value, v=u, lengths=torch.tensor([5, 0, 2]), return_weights=True)
    yield Call("functional.additive_attention", functional.additive_attention, additive)
    mask = torch.ones(B, T, 5, dtype=torch.bool)
    yield Call("functional.additive_attention, mask", functional.additive_attention, additive | dict(mask=mask))
    yield Call("functional.AdditiveKeys", _kept_keys, dict(query=query, key=key, value=value, v=u), False)
    of_modules = dict(query=normal(B, T, D), keys=normal(B, 5, D), lengths=torch.tensor([5, 0, 2]))
    yield Call("nn.AdditiveAttention", nn.AdditiveAttention(D, D, H), of_modules)
    for method in ("dot", "general", "concat"):
        yield Call(f"nn.LuongAttention, {method}", nn.LuongAttention(D, D, method=method), of_modules)


def _multihead(q: Tensor, kv: Tensor | None, padding: Tensor, need_weights: int) -> Any:
    options = 2, True, padding, None, 0.35, 0, 0.0, None
    out, lse, weights = ops.multihead_attention_forward(q, kv, *options, need_weights)
    return out, lse, weights, ops.multihead_attention_backward(torch.ones_like(out), q, kv, *options, out, lse)


def _cached(query: Tensor, key: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    cache = nn.KeyValueCache(B, 4, 2, 8, dtype=dtype)
    cache.append(key, value, torch.tensor([2, 0, 1]))
    cache.append(key, value)
    cache.reorder(torch.tensor([1, 1, 0]))
    return cache.attend(query, is_causal=True)


def _kept_keys(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> Tensor:
    return functional.additive_attention(query, functional.AdditiveKeys(key, value), None, v)


def _chains() -> Iterator[Call]:
    chain = dict(
        emissions=normal(B, T, K), transitions=normal(K, K), start_transitions=normal(K), end_transitions=normal(K),
        lengths=torch.tensor([4, 0, 2]),
    )  # fmt: skip
    tags = torch.tensor([[0, 3, 1, 2]] * B)
    for name in ("log_partition", "marginals", "entropy", "viterbi"):
        yield Call(f"functional.crf_{name}", getattr(functional, f"crf_{name}"), chain)
    mask = torch.tensor([[1, 0, 1, 1]] * B, dtype=torch.bool)
    masked = {n: v for n, v in chain.items() if n != "lengths"} | dict(mask=mask)
    yield Call("functional.crf_log_likelihood", functional.crf_log_likelihood, chain | dict(tags=tags))
    yield Call("functional.crf_log_likelihood, mask", functional.crf_log_likelihood, masked | dict(tags=tags))
    yield Call("functional.crf_viterbi, nbest", functional.crf_viterbi, chain | dict(nbest=3))
    yield Call("nn.CRF", nn.CRF(K, batch_first=True), dict(emissions=normal(B, T, K), tags=tags))
    ctc = dict(
        log_probs=normal(T, B, K).log_softmax(2), targets=torch.tensor([[1, 2], [3, 3], [1, 0]]),
        input_lengths=torch.tensor([4, 3, 0]), target_lengths=torch.tensor([2, 2, 0]), zero_infinity=True,
    )  # fmt: skip
    yield Call("functional.ctc_loss", functional.ctc_loss, ctc)
    yield Call("functional.ctc_loss, none", functional.ctc_loss, ctc | dict(reduction="none", blank=0))
    yield Call("nn.CTCLoss", nn.CTCLoss(zero_infinity=True), {n: v for n, v in ctc.items() if n != "zero_infinity"})


def _decoding() -> Iterator[Call]:
    logits = normal(9, 9)

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if state.numel() and not -1000 < state.min() <= state.max() < 50:  # as with NaN
            raise RuntimeError("stops a search whose max_length is huge")
        return logits[tokens] + state, state + 0.1

    given = dict(step=step, start_tokens=torch.tensor([1, 2, 3]), state=torch.zeros(3, 9), max_length=5, eos_token_id=0)
    yield Call("decoding.greedy_search", decoding.greedy_search, given, False)
    yield Call("decoding.beam_search", decoding.beam_search, given | dict(beam_size=3, n_best=2), False)
    yield Call("decoding.sample", _sampled, given | dict(num_samples=2, top_k=4, top_p=0.9), False)


def _sampled(**arguments: Any) -> Any:
    return decoding.sample(**arguments, generator=torch.Generator().manual_seed(1))


@functools.cache
def calls() -> dict[str, Call]:
    """All calls by name, with the same values in each process."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        found = [
            c for part in (_layers, _prepared, _bags, _attention, _chains, _decoding) for c in part()
        ]  # fmt: skip
    table = {call.name: call for call in found}
    assert len(table) == len(found)
    return table


# ---- ops


class _Recorder(TorchDispatchMode):
    """Keeps the arguments of the first calls of each op."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.calls = most, dict[str, list[tuple[Any, ...]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "seqkernels":
            names = [a.name for a in func._schema.arguments]
            found = self.calls.setdefault(func._schema.name.partition("::")[2], [])
            if len(found) < self.most:
                with_defaults = {
                    a.name: a.default_value for a in func._schema.arguments if a.has_default_value()
                }  # fmt: skip
                given = with_defaults | dict(zip(names, args)) | kwargs
                found.append(tuple(cloned(given[n]) for n in names))
        return func(*args, **kwargs)


def cloned(value: Any) -> Any:
    """A copy of a nest of arguments, whose tensors keep their strides and need no gradient."""
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)


@functools.cache
def calls_of_ops(most: int = 4) -> dict[str, list[tuple[Any, ...]]]:
    """Valid positional arguments of each op, from the calls of the table."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        with _Recorder(most) as recorder:
            for call in calls().values():
                run(call)
                run(call, gradients=False)
    return recorder.calls


def registered_ops() -> list[str]:
    """Names of all ops of the library."""
    return sorted(
        s.name.partition("::")[2] for s in torch._C._jit_get_all_schemas() if s.name.startswith("seqkernels::")
    )
