"""Which bits are guaranteed: each operator against the table of docs/numerics.md.

A sequence (bag, query row) is computed alone, in batches of other composition and order, with other padding, with 1 to
4 threads and repeatedly. Operator.each and Operator.shared say what must have the same bits; where nothing is promised,
nothing is compared.

Dimensions: T steps, D input, H hidden, E table rows, K tags.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from seqkernels import decoding, functional, inference, nn
from support.variants import FULLEST

LENGTHS = (5, 3, 7, 1)  # of the sequences 0 to 3
D, H, E, K = 40, 48, 11, 40
ALL = frozenset({"repeat", "threads", "batch", "padding"})
REPEAT, THREADS = frozenset({"repeat"}), frozenset({"repeat", "threads"})

Results = tuple[list[list[Tensor]], list[Tensor]]  # of each sequence: results and gradients; gradients of all


@dataclasses.dataclass(frozen=True)
class Operator:
    """run(sequences, padding): the given sequences as one batch, with `padding` further steps."""

    run: Callable[[Sequence[int], int], Results]
    each: frozenset[str] = ALL  # what the bits of the results of a sequence do not depend on
    shared: frozenset[str] = REPEAT  # and of the gradients of weights


def rows(of: Sequence[int], steps: int, *shape: int, seed: int = 0, fill: float = float("nan")) -> Tensor:
    """[B, steps, *shape] of which each sequence has its own values; padding is `fill`, which must not be read."""
    found = torch.full((len(of), steps, *shape), fill)
    for b, i in enumerate(of):
        g = torch.Generator().manual_seed(100 * seed + i)
        found[b, : LENGTHS[i]] = torch.randn(LENGTHS[i], *shape, generator=g)
    return found


def lengths_of(of: Sequence[int]) -> Tensor:
    return torch.tensor([LENGTHS[i] for i in of])


def steps(of: Sequence[int], padding: int) -> int:
    return max(LENGTHS[i] for i in of) + padding


def seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(0)
    return make()


def gradients(
    of: Sequence[int], output: Tensor, x: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Of output [B, steps, *], with upstream gradients that each sequence has of its own."""
    upstream = rows(of, output.shape[1], *output.shape[2:], seed=9, fill=0.0)
    found = torch.autograd.grad(output, [*x, *weights], upstream)
    return list(found[: len(x)]), list(found[len(x) :])


def of_each(of: Sequence[int], batched: Sequence[Tensor], whole: Sequence[Tensor] = ()) -> list[list[Tensor]]:
    """Rows of each sequence: of tensors [B, steps, *] up to its length, and of tensors [B, *]."""
    return [
        [t[b, : LENGTHS[i]].detach() for t in batched] + [t[b].detach() for t in whole] for b, i in enumerate(of)
    ]  # fmt: skip


# ---- operators


def layer(kind: str) -> Operator:
    variant = FULLEST[kind]
    options = {n: v for n, v in variant.options.items() if "dropout" not in n and "zoneout" not in n}
    options = {n: 24 if v is True and n == "proj_size" else v for n, v in options.items()}
    module = seeded(lambda: getattr(nn, variant.module)(D, H, bidirectional=True, batch_first=True, **options))

    def run(of: Sequence[int], padding: int) -> Results:
        x = rows(of, steps(of, padding), D).requires_grad_()
        output, states = module(x, lengths=lengths_of(of))
        states = states if isinstance(states, tuple) else (states,)
        dx, dw = gradients(of, output, [x], list(module.parameters()))
        return of_each(of, [output, *dx], [s.transpose(0, 1) for s in states]), dw

    return Operator(run)


def packed(kind: str) -> Operator:
    """The same results as with padding: rows of a packed sequence."""
    module = seeded(lambda: getattr(nn, FULLEST[kind].module)(D, H))

    def run(of: Sequence[int], padding: int) -> Results:
        x = rows(of, steps(of, 0), D).requires_grad_()
        given = torch.nn.utils.rnn.pack_padded_sequence(x, lengths_of(of), batch_first=True, enforce_sorted=False)
        output = torch.nn.utils.rnn.pad_packed_sequence(module(given)[0], batch_first=True)[0]
        dx, dw = gradients(of, output, [x], list(module.parameters()))
        return of_each(of, [output, *dx]), dw

    return Operator(run)


def cell(name: str) -> Operator:
    module = seeded(lambda: getattr(nn, name)(512, 256))

    def run(of: Sequence[int], padding: int) -> Results:
        x = rows(of, 7, 512, fill=1.0)[:, 0].requires_grad_()
        result = module(x)
        h = result[0] if isinstance(result, tuple) else result
        dx, *dw = torch.autograd.grad(h, [x, *module.parameters()], rows(of, 7, 256, seed=9, fill=0.0)[:, 0])
        return [[h[b].detach(), dx[b]] for b in range(len(of))], dw

    return Operator(run)


def prepared(precision: str) -> Operator:
    module = inference.prepare(seeded(lambda: nn.LSTM(D, H, batch_first=True).eval()), precision)[0]

    def run(of: Sequence[int], padding: int) -> Results:
        output, states = module(rows(of, steps(of, padding), D), lengths=lengths_of(of))
        return of_each(of, [output], [s.transpose(0, 1) for s in states]), []

    return Operator(run)


def bags(mode: str, several: bool = False, sparse: bool = False, packed: bool = False) -> Operator:
    g = torch.Generator().manual_seed(0)
    columns = 4096
    table = torch.randn(E, columns, generator=g)
    quantized = functional.quantize_rows(table)

    def run(of: Sequence[int], padding: int) -> Results:
        bag = [torch.randint(E, (LENGTHS[i],), generator=torch.Generator().manual_seed(i)) for i in of]
        input, ends = torch.cat(bag), torch.cat([torch.zeros(1, dtype=torch.int64), lengths_of(of).cumsum(0)])
        weight = table.clone().requires_grad_()
        if packed:
            return [[row] for row in functional.embedding_bag_bytes(input, quantized, ends[:-1], mode)], []
        if several:
            output = functional.embedding_bags(input, [weight], ends, mode=mode, sparse=sparse)
        else:
            output = functional.embedding_bag(input, weight, ends[:-1], mode=mode, sparse=sparse)
        upstream = rows(of, 7, columns, seed=9, fill=0.0)[:, 0]
        (dw,) = torch.autograd.grad(output, weight, upstream)
        return [[row] for row in output.detach()], [dw.to_dense()]

    return Operator(run, shared=THREADS)


def fused(optimizer: str) -> Operator:
    """The table after a step of a fused optimiser."""

    def run(of: Sequence[int], padding: int) -> Results:
        module = seeded(lambda: nn.EmbeddingBag(E, 4096, mode="sum", fused_optimizer=getattr(nn, optimizer)(lr=0.1)))
        bag = [torch.randint(E, (LENGTHS[i],), generator=torch.Generator().manual_seed(i)) for i in of]
        output = module(torch.cat(bag), lengths_of(of).cumsum(0) - lengths_of(of))
        output.backward(rows(of, 7, 4096, seed=9, fill=0.0)[:, 0])
        return [[row] for row in output.detach()], [module.weight.detach().clone()]

    return Operator(run, shared=THREADS)


def embedding() -> Operator:
    table = torch.randn(E, 4096, generator=torch.Generator().manual_seed(0))

    def run(of: Sequence[int], padding: int) -> Results:
        input = torch.zeros(len(of), steps(of, padding), dtype=torch.int64)
        for b, i in enumerate(of):
            input[b, : LENGTHS[i]] = torch.randint(E, (LENGTHS[i],), generator=torch.Generator().manual_seed(i))
        weight = table.clone().requires_grad_()
        output = functional.embedding(input, weight)
        upstream = rows(of, output.shape[1], 4096, seed=9, fill=0.0)
        return of_each(of, [output]), list(torch.autograd.grad(output, weight, upstream))

    return Operator(run, shared=THREADS)


def attention(packed: bool = False, **options: Any) -> Operator:
    heads, columns = 2, 64

    def run(of: Sequence[int], padding: int) -> Results:
        T = steps(of, padding)
        q, k, v = (rows(of, T, heads, columns, seed=s).requires_grad_() for s in (1, 2, 3))
        if packed:
            kept = [torch.cat([t[b, : LENGTHS[i]] for b, i in enumerate(of)]) for t in (q, k, v)]
            cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_of(of).cumsum(0)])
            flat = functional.varlen_attention(*kept, cu, **options)
            parts = flat.split([LENGTHS[i] for i in of])
            output = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        else:
            output = functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), lengths=(lengths_of(of), lengths_of(of)), **options
            ).transpose(1, 2)
        grads, _ = gradients(of, output, [q, k, v], [])
        return of_each(of, [output, *grads]), []

    return Operator(run)


def cache(**options: Any) -> Operator:
    def run(of: Sequence[int], padding: int) -> Results:
        T = steps(of, padding)
        k, v = (rows(of, T, 2, 64, seed=s, fill=3.0).transpose(1, 2) for s in (2, 3))
        kept = nn.KeyValueCache(len(of), T, 2, 64, **options)
        kept.append(k, v, lengths_of(of))
        query = rows(of, 7, 2, 64, seed=1, fill=1.0)[:, :1].transpose(1, 2)
        return of_each(of, [], [kept.attend(query)]), []

    return Operator(run)


def additive() -> Operator:
    g = torch.Generator().manual_seed(0)
    u = torch.randn(H, generator=g)

    def run(of: Sequence[int], padding: int) -> Results:
        T = steps(of, padding)
        q, k = (rows(of, T, H, seed=s, fill=0.5).requires_grad_() for s in (1, 2))
        value, v = rows(of, T, D, seed=3, fill=0.5).requires_grad_(), u.clone().requires_grad_()
        output = functional.additive_attention(q, k, value, v, lengths=lengths_of(of))
        grads, dv = gradients(of, output, [q, k, value], [v])
        return of_each(of, [output, *grads]), dv

    return Operator(run)


def module_of_attention(make: Callable[[], torch.nn.Module], call: Callable[..., Tensor]) -> Operator:
    """Modules with projections, which are products of torch: only repeated calls have the same bits."""
    module = seeded(make)

    def run(of: Sequence[int], padding: int) -> Results:
        x = rows(of, steps(of, padding), D, fill=0.5).requires_grad_()
        output = call(module, x, lengths_of(of))
        dx, dw = gradients(of, output, [x], list(module.parameters()))
        return of_each(of, [output, *dx]), dw

    return Operator(run, each=REPEAT)


def chain(function: Callable[..., Any], *, tags: bool = False, differentiable: bool = True) -> Operator:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(K, K, generator=g), torch.randn(K, generator=g), torch.randn(K, generator=g)

    def run(of: Sequence[int], padding: int) -> Results:
        T = steps(of, padding)
        emissions = rows(of, T, K).requires_grad_(differentiable)
        given = [s.clone().requires_grad_(differentiable) for s in scores]
        leading = [(rows(of, T, 1, seed=2, fill=0.0)[..., 0].abs() * 7).long() % K] if tags else []
        more = dict(reduction="none") if tags else {}
        result = function(emissions, *leading, *given, lengths=lengths_of(of), **more)
        results = list(result) if isinstance(result, tuple) else [result]
        if not differentiable:
            batched = [t for t in results if t.dim() > 1]
            return of_each(of, batched, [t for t in results if t.dim() == 1]), []
        upstream = torch.tensor([1.0 + i for i in of], dtype=results[0].dtype)
        demissions, *dscores = torch.autograd.grad(results[0], [emissions, *given], upstream)
        return of_each(of, [demissions], results), dscores

    return Operator(run)


def marginals() -> Operator:
    def run(of: Sequence[int], padding: int) -> Results:
        transitions = torch.randn(K, K, generator=torch.Generator().manual_seed(0))
        tags, pairs = functional.crf_marginals(rows(of, steps(of, padding), K), transitions, lengths=lengths_of(of))
        return of_each(of, [tags]), [pairs]

    return Operator(run)


def ctc() -> Operator:
    def run(of: Sequence[int], padding: int) -> Results:
        T = steps(of, padding)
        log_probs = rows(of, T, 64).log_softmax(2).detach().requires_grad_()
        labels = lengths_of(of) // 2
        targets = (rows(of, T, 1, seed=2, fill=0.0)[..., 0].abs() * 9).long() % 63 + 1
        losses = functional.ctc_loss(
            log_probs.transpose(0, 1), targets, lengths_of(of), labels, reduction="none", zero_infinity=True
        )
        (d,) = torch.autograd.grad(losses, log_probs, torch.tensor([1.0 + i for i in of]))
        return of_each(of, [d], [losses]), []

    return Operator(run)


def search(function: Callable[..., Any], each: frozenset[str] = ALL, **options: Any) -> Operator:
    """With a step whose logits do not depend on the batch."""
    logits = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))

    def run(of: Sequence[int], padding: int) -> Results:
        if function is decoding.sample:
            options["generator"] = torch.Generator().manual_seed(1)
        found = function(
            lambda tokens, state: (logits[tokens], state), torch.tensor([1 + i for i in of]), None,
            max_length=[LENGTHS[i] for i in of], eos_token_id=0, **options,
        )  # fmt: skip
        return [[found.scores[b], found.lengths[b], found.sequences[b, :, : LENGTHS[i]]] for b, i in enumerate(of)], []

    return Operator(run, each=each)


FUSED = ("FusedSGD", "FusedAdagrad", "FusedRowwiseAdagrad", "FusedAdam")
OPERATORS: dict[str, Callable[[], Operator]] = {
    **{f"layer {kind}": functools.partial(layer, kind) for kind in FULLEST},
    **{f"packed {kind}": functools.partial(packed, kind) for kind in ("lstm", "gru", "slstm")},
    **{name: functools.partial(cell, name) for name in ("LSTMCell", "GRUCell", "RNNCell", "DreamerGRUCell")},
    **{f"prepared {p}": functools.partial(prepared, p) for p in ("float32", "bfloat16", "float16", "int8")},
    **{f"embedding_bag {mode}": functools.partial(bags, mode) for mode in ("sum", "mean", "max", "min")},
    "embedding_bag sparse": functools.partial(bags, "mean", sparse=True),
    "embedding_bags": functools.partial(bags, "sum", several=True),
    "embedding_bag_bytes": functools.partial(bags, "sum", packed=True),
    **{name: functools.partial(fused, name) for name in FUSED},
    "embedding": embedding,
    "attention": attention,
    "attention causal": functools.partial(attention, is_causal=True),
    "attention options": functools.partial(
        attention, window=(2, 1), softcap=3.0, alibi_slopes=torch.tensor([0.5, 0.1])
    ),
    "varlen_attention": functools.partial(attention, packed=True),
    "KeyValueCache": cache,
    "KeyValueCache int8": functools.partial(cache, dtype=torch.int8),
    "KeyValueCache pages": functools.partial(cache, page_size=3),
    "additive_attention": additive,
    "AdditiveAttention": lambda: module_of_attention(
        lambda: nn.AdditiveAttention(D, D, H), lambda m, x, n: m(x, x, lengths=n)
    ),
    "LuongAttention": lambda: module_of_attention(
        lambda: nn.LuongAttention(D, D, method="concat"), lambda m, x, n: m(x, x, lengths=n)
    ),
    "MultiheadAttention": lambda: module_of_attention(
        lambda: nn.MultiheadAttention(D, 2, batch_first=True),
        lambda m, x, n: m(x, x, x, lengths=n, need_weights=False)[0],
    ),
    "TransformerEncoderLayer": lambda: module_of_attention(
        lambda: nn.TransformerEncoderLayer(D, 2, 64, 0.0, batch_first=True), lambda m, x, n: m(x, lengths=n)
    ),
    "TransformerDecoderLayer": lambda: module_of_attention(
        lambda: nn.TransformerDecoderLayer(D, 2, 64, 0.0, batch_first=True),
        lambda m, x, n: m(x, x, lengths=n, memory_lengths=n),
    ),
    "crf_log_partition": lambda: chain(functional.crf_log_partition),
    "crf_log_likelihood": lambda: chain(functional.crf_log_likelihood, tags=True),
    "crf_entropy": lambda: chain(functional.crf_entropy),
    "crf_viterbi": lambda: chain(functional.crf_viterbi, differentiable=False),
    "crf_marginals": marginals,
    "ctc_loss": ctc,
    "greedy_search": lambda: search(decoding.greedy_search),
    "beam_search": lambda: search(decoding.beam_search, beam_size=3),
    "sample": lambda: search(decoding.sample, each=THREADS, num_samples=2),  # samples depend on the batch
}  # fmt: skip

SEQUENCES = (0, 1, 2, 3)
PROPERTIES: dict[str, list[tuple[Sequence[int], int, int]]] = {  # sequences, padding, threads
    "repeat": [(SEQUENCES, 0, 2)] * 2,
    "threads": [(SEQUENCES, 0, n) for n in (1, 3, 4)],
    "batch": [((2,), 0, 2), ((3, 1, 0), 0, 2), ((1, 2, 2, 0, 3, 1, 0, 3, 2), 0, 2)],
    "padding": [(SEQUENCES, 1, 2), (SEQUENCES, 10, 2)],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_bits(name: str) -> None:
    operator = OPERATORS[name]()
    torch.set_num_threads(2)
    each, shared = operator.run(SEQUENCES, 0)
    assert each[0]
    for promise, runs in PROPERTIES.items():
        for of, padding, threads in runs:
            if promise not in operator.each:
                continue
            torch.set_num_threads(threads)
            got, got_shared = operator.run(of, padding)
            for b, i in enumerate(of):
                for place, (a, want) in enumerate(zip(got[b], each[i], strict=True)):
                    assert torch.equal(a, want), f"{promise}: result {place} of sequence {i} in {of}, {threads} threads"
            if promise in operator.shared:
                for place, (a, want) in enumerate(zip(got_shared, shared, strict=True)):
                    assert torch.equal(a, want), f"{promise}: gradient {place} of weights, {threads} threads"


UNSTATED = {
    "AdditiveKeys",
    "EmbeddingBagConfig",
    "Report",
    "calibrate",
    "Decoded",
    "PerSentence",
}  # hold or collect values


@pytest.mark.parametrize("module", [functional, nn, inference, decoding], ids=lambda m: m.__name__)
def test_every_operator_states_whether_it_is_deterministic(module: Any) -> None:
    missing = {n for n in module.__all__ if "Deterministic:" not in (getattr(module, n).__doc__ or "")}
    assert missing <= UNSTATED


def test_every_function_has_a_row() -> None:
    rows_of = {
        "scaled_dot_product_attention": "attention",
        "quantize_rows": "embedding_bag_bytes",
        "AdditiveKeys": "additive_attention",
        "lstm_cell": "LSTMCell",
        "gru_cell": "GRUCell",
        "rnn_tanh_cell": "RNNCell",
        "rnn_relu_cell": "RNNCell",
    }
    assert {rows_of.get(name, name) for name in functional.__all__} <= set(" ".join(OPERATORS).split())
