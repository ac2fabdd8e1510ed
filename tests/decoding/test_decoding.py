"""Decoding: all sequences, a plain implementation for one sentence, states, ties, bits, synchronisation, errors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqkernels import nn
from seqkernels.decoding import Decoded, PerSentence, beam_search, greedy_search, sample
from seqkernels.decoding._top import top
from support.fuzzing import bounded

close = torch.testing.assert_close
f64 = torch.float64
Hypothesis = tuple[float, tuple[int, ...]]


# ---- a model of which all logits are in a table, and its decoders for one sentence


class Markov:
    """Logits by the sentence, the step and the last two tokens, and attention by the sentence and these tokens."""

    def __init__(self, B: int, V: int, S: int = 3, dtype: torch.dtype = f64, scale: float = 2.0, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.table = (scale * torch.randn(B, V, V, V, generator=g, dtype=f64)).to(dtype)
        self.weights = (2 * torch.randn(B, V, V, S, generator=g, dtype=f64)).softmax(-1).to(dtype)
        self.by_step = torch.randn(99, V, generator=g, dtype=f64).to(dtype)
        self.start = torch.randint(V, (B,), generator=g)
        self.calls = 0

    def of(self, sentences: Sequence[int]) -> Markov:
        part = object.__new__(Markov)
        part.table, part.weights = self.table[list(sentences)], self.weights[list(sentences)]
        part.start, part.calls, part.by_step = self.start[list(sentences)], 0, self.by_step
        return part

    @property
    def state(self) -> dict[str, Any]:
        return {"sentence": torch.arange(len(self.start)), "previous": torch.zeros_like(self.start), "t": 0}

    def step(self, tokens: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any], Tensor]:
        self.calls += 1
        at, t = (state["sentence"], state["previous"], tokens), state["t"]
        return self.table[at] + self.by_step[t], {**state, "previous": tokens, "t": t + 1}, self.weights[at]

    def of_prefix(self, b: int, prefix: Sequence[int]) -> tuple[list[float], list[float]]:
        *_, before, last = 0, int(self.start[b]), *prefix
        logits = self.table[b, before, last] + self.by_step[len(prefix)]
        return logits.tolist(), self.weights[b, before, last].tolist()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    why: str
    B: int = 4
    V: int = 6
    T: int = 6
    beam: int = 3
    n_best: int = 2
    eos: tuple[int, ...] = (1,)
    alpha: float = 0.0
    normalization: str = "gnmt"
    beta: float = 0.0
    source_lengths: tuple[int, ...] | None = None
    early: bool = False
    limits: tuple[int, ...] | None = None
    least: int | tuple[int, ...] = 0
    ngram: int = 0
    penalty: float = 1.0

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def of(self, b: int, name: str, default: int) -> int:
        value = getattr(self, name)
        return default if value is None else value if isinstance(value, int) else value[b]

    @property
    def common(self) -> dict[str, Any]:
        return dict(
            max_length=self.T if self.limits is None else torch.tensor(self.limits),
            min_length=self.least,
            eos_token_id=list(self.eos),
            no_repeat_ngram_size=self.ngram,
            repetition_penalty=self.penalty,
        )

    @property
    def options(self) -> dict[str, Any]:
        return self.common | dict(
            beam_size=self.beam,
            n_best=self.n_best,
            length_penalty=self.alpha,
            length_normalization=self.normalization,
            coverage_penalty=self.beta,
            source_lengths=self.source_lengths,
            early_stopping=self.early,
        )


CASES = [
    Case(why="plain"),
    Case(why="one token", V=1, eos=(), T=3),
    Case(why="one token that ends", V=1, eos=(0,), T=3),
    Case(why="one step", T=1),
    Case(why="no end", eos=()),
    Case(why="beam 1", beam=1, n_best=1),
    Case(why="a beam wider than the vocabulary", V=3, beam=7, n_best=7),
    Case(why="a vocabulary of several chunks", V=61, T=8, beam=5, n_best=5, B=3),
    Case(why="a wide beam", V=11, T=7, beam=60, n_best=20, B=2),
    Case(why="length penalty", alpha=0.6, T=9, beam=4),
    Case(why="mean", alpha=1.0, normalization="power", T=9, beam=4),
    Case(why="a penalty of short ones", alpha=2.5, T=9, B=30, n_best=1),
    Case(why="a penalty of long ones", alpha=-1.0, T=9, B=30, n_best=1),
    Case(why="coverage", beta=0.4, T=8),
    Case(why="coverage of sources of several lengths", beta=0.4, alpha=0.6, source_lengths=(3, 1, 0, 2), T=8),
    Case(why="early stopping", early=True, alpha=2.5, T=9, B=30, n_best=1),
    Case(why="several ends", eos=(1, 4, 5), T=7),
    Case(why="all tokens end", V=3, eos=(0, 1, 2), n_best=3),
    Case(why="a minimum length", least=4, alpha=0.6, V=4),
    Case(why="lengths by sentence", limits=(6, 1, 3, 4), least=(2, 1, 3, 0), beta=0.2, alpha=1.0),
    Case(why="no token twice", ngram=1, V=4, eos=(), T=6),
    Case(why="no bigram twice", ngram=2, V=3, T=10, beam=4),
    Case(why="no trigram twice", ngram=3, V=3, T=12, beam=4, eos=()),
    Case(why="repetition penalty", penalty=1.5, T=8),
    Case(why="repetition bonus", penalty=0.7, T=8),
    Case(
        why="all options", alpha=0.8, beta=0.3, least=3, ngram=2, penalty=1.2, T=10, beam=5, n_best=5, V=7, eos=(1, 2)
    ),
]


def plain_log_p(case: Case, logits: list[float], prefix: tuple[int, ...], least: int) -> list[float]:
    logits = list(logits)
    for token in set(prefix):
        logits[token] = logits[token] * case.penalty if logits[token] < 0 else logits[token] / case.penalty
    largest = max(logits)
    normaliser = largest + math.log(sum(math.exp(x - largest) for x in logits))
    log_p = [x - normaliser for x in logits]
    for token in range(len(log_p)):
        y, n = (*prefix, token), case.ngram
        earlier = [y[i : i + n] for i in range(len(y) - n)]
        if (n and len(y) >= n and y[len(y) - n :] in earlier) or (token in case.eos and len(y) < least):
            log_p[token] = -math.inf
    return log_p


def plain_score(case: Case, model: Markov, b: int, log_p: float, y: tuple[int, ...]) -> float:
    n = len(y)
    lp = n**case.alpha if case.normalization == "power" else ((5 + n) / 6) ** case.alpha
    score = log_p / lp
    if case.beta:
        rows = [model.of_prefix(b, y[:i])[1] for i in range(n)]
        for s in range(len(rows[0]) if case.source_lengths is None else case.source_lengths[b]):
            score += case.beta * math.log(min(sum(row[s] for row in rows), 1.0))
    return score


def plain_beam(case: Case, model: Markov, b: int) -> list[Hypothesis]:
    """Finished hypotheses of one sentence. The search runs to max_length, unless it stops early."""
    limit, least = case.of(b, "limits", case.T), case.of(b, "least", 0)
    live: list[Hypothesis] = [(0.0, ())]
    finished: list[Hypothesis] = []
    for n in range(1, limit + 1):
        candidates = []
        for rank, (p, y) in enumerate(live):
            for token, x in enumerate(plain_log_p(case, model.of_prefix(b, y)[0], y, least)):
                if x > -math.inf:
                    candidates.append((-(p + x), rank, token))
        following: list[Hypothesis] = []
        for place, (negative, rank, token) in enumerate(sorted(candidates)):
            extended = -negative, (*live[rank][1], token)
            if token not in case.eos:
                following.append(extended)
            elif place < case.beam:
                finished.append((plain_score(case, model, b, *extended), extended[1]))
        live = following[: case.beam]
        if n == limit:
            finished += [(plain_score(case, model, b, *h), h[1]) for h in live]
        finished = sorted(finished, key=lambda h: -h[0])[: case.beam]
        if case.early and len(finished) == case.beam:
            break
    return finished[: case.n_best]


def all_sequences(case: Case, model: Markov, b: int) -> list[Hypothesis]:
    """All hypotheses of one sentence by score."""
    limit, least = case.of(b, "limits", case.T), case.of(b, "least", 0)
    sequences = set()
    for y in itertools.product(range(case.V), repeat=limit):
        end = next((i + 1 for i, token in enumerate(y) if token in case.eos), limit)
        sequences.add(y[:end])
    scored = []
    for y in sequences:
        p = sum(plain_log_p(case, model.of_prefix(b, y[:i])[0], y[:i], least)[y[i]] for i in range(len(y)))
        if p > -math.inf:
            scored.append((plain_score(case, model, b, p, y), y))
    return sorted(scored, key=lambda h: -h[0])


def check(got: Decoded, want: list[list[Hypothesis]], pad: int, tolerance: float = 1e-9) -> None:
    """Equal hypotheses in the same order; the rest of the result is that of hypotheses that do not exist."""
    for b, hypotheses in enumerate(want):
        for i in range(got.scores.shape[1]):
            score, y = hypotheses[i] if i < len(hypotheses) else (-math.inf, ())
            assert got.lengths[b, i] == len(y)
            assert got.sequences[b, i].tolist() == [*y, *[pad] * (got.sequences.shape[2] - len(y))]
            close(got.scores[b, i].double().item(), score, rtol=0, atol=tolerance)


def model_of(case: Case, dtype: torch.dtype = f64) -> Markov:
    return Markov(case.B, case.V, dtype=dtype)


# ---- beam search


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beam_search_matches_a_plain_implementation(case: Case) -> None:
    model = model_of(case)
    got = beam_search(model.step, model.start, model.state, pad_token_id=77, **case.options)
    assert got.sequences.dtype == got.lengths.dtype == torch.int64 and got.scores.dtype == f64
    check(got, [plain_beam(case, model, b) for b in range(case.B)], 77)
    assert model.calls <= case.T


SMALL = dict(B=2, V=3, T=4, beam=3**4, n_best=3**4)
EXHAUSTIVE = [
    Case(why="plain", **SMALL),
    Case(why="penalties", alpha=0.6, beta=0.5, **SMALL),
    Case(why="a penalty of long ones", alpha=-0.5, **SMALL),
    Case(why="mean, minimum length", alpha=1.0, normalization="power", least=2, **SMALL),
    Case(why="lengths by sentence", limits=(4, 2), least=(3, 2), **SMALL),
    Case(why="no bigram twice", ngram=2, **SMALL),
    Case(why="no end", **(SMALL | dict(eos=()))),
    Case(why="the best one", **(SMALL | dict(n_best=1)), alpha=1.0, beta=0.5),
    Case(why="early stopping has no effect on a full list", early=True, **SMALL),
]


@pytest.mark.parametrize("case", EXHAUSTIVE, ids=str)
def test_wide_beams_find_all_sequences(case: Case) -> None:
    model = model_of(case)
    got = beam_search(model.step, model.start, model.state, **case.options)
    check(got, [all_sequences(case, model, b) for b in range(case.B)], case.eos[0] if case.eos else 0)


def test_the_search_ends_once_the_result_is_certain() -> None:
    """Nearly certain ends: a few steps, and the result of all of them."""
    model = Markov(5, 6)
    model.table[..., 1] += 12
    for options in (dict(), dict(length_penalty=0.6, coverage_penalty=0.1), dict(n_best=2, length_penalty=1.0)):
        model.calls = 0
        got = beam_search(
            model.step, model.start, model.state, beam_size=3, max_length=60, eos_token_id=1, check_every=1, **options
        )
        assert model.calls < 20
        case = Case(
            why="", T=25, n_best=options.get("n_best", 1), alpha=options.get("length_penalty", 0.0),
            beta=options.get("coverage_penalty", 0.0),
        )  # fmt: skip
        check(got, [plain_beam(case, model, b) for b in range(5)], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes_accumulate_in_float32(dtype: torch.dtype) -> None:
    case = Case(why="", T=8, beam=4, n_best=4, alpha=0.6, V=9)
    model = model_of(case, dtype)
    got = beam_search(model.step, model.start, model.state, **case.options)
    assert got.scores.dtype == torch.float32
    check(got, [plain_beam(case, model, b) for b in range(case.B)], 1, tolerance=1e-5)


def test_beam_1_is_greedy_search() -> None:
    model = Markov(6, 9)
    for options in (dict(), dict(min_length=3, no_repeat_ngram_size=2, repetition_penalty=1.3), dict(max_length=3)):
        arguments = model.step, model.start, model.state
        common = dict(max_length=9, eos_token_id=2, return_attention=True) | options
        for got, want in zip(greedy_search(*arguments, **common), beam_search(*arguments, beam_size=1, **common)):
            close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("case", [c for c in CASES if not (c.beta or c.early)], ids=str)
def test_greedy_search_matches_a_plain_implementation(case: Case) -> None:
    model = model_of(case)
    got = greedy_search(model.step, model.start, model.state, **case.common)
    one = dataclasses.replace(case, beam=1, n_best=1, alpha=0.0)
    check(got, [plain_beam(one, model, b) for b in range(case.B)], case.eos[0] if case.eos else 0)


@st.composite
def drawn_cases(draw: st.DrawFn) -> Case:
    B, V, T, beam = (draw(st.integers(1, most)) for most in (4, 9, 7, 5))
    lengths = st.lists(st.integers(1, T), min_size=B, max_size=B).map(tuple)
    limits = draw(st.one_of(st.none(), lengths))
    return Case(
        why="drawn",
        B=B,
        V=V,
        T=T,
        beam=beam,
        n_best=draw(st.integers(1, beam)),
        eos=tuple(draw(st.sets(st.integers(0, V - 1), max_size=3))),
        alpha=draw(st.sampled_from([0.0, 0.6, 1.0, -1.0, 2.5])),
        normalization=draw(st.sampled_from(["gnmt", "power"])),
        beta=draw(st.sampled_from([0.0, 0.3])),
        source_lengths=draw(st.one_of(st.none(), st.lists(st.integers(0, 3), min_size=B, max_size=B).map(tuple))),
        early=draw(st.booleans()),
        limits=limits,
        least=tuple(draw(st.integers(0, n)) for n in (limits or [T] * B)),
        ngram=draw(st.sampled_from([0, 0, 1, 2, 3])),
        penalty=draw(st.sampled_from([1.0, 1.0, 1.5, 0.7])),
    )


@bounded(examples=30)
@given(case=drawn_cases(), seed=st.integers(0, 99), every=st.integers(1, 5))
def test_random_searches_match_a_plain_implementation(case: Case, seed: int, every: int) -> None:
    model = Markov(case.B, case.V, seed=seed)
    arguments = model.step, model.start, model.state
    got = beam_search(*arguments, pad_token_id=77, check_every=every, **case.options)
    check(got, [plain_beam(case, model, b) for b in range(case.B)], 77)
    one = dataclasses.replace(case, beam=1, n_best=1, alpha=0.0, beta=0.0, early=False)
    want = [plain_beam(one, model, b) for b in range(case.B)]
    check(greedy_search(*arguments, pad_token_id=77, check_every=every, **case.common), want, 77)
    # With top_k=1, both samples are the greedy sequence.
    drawn = sample(*arguments, pad_token_id=77, check_every=every, top_k=1, num_samples=2, **case.common)
    check(drawn, [hypotheses * 2 for hypotheses in want], 77)


def test_attention_is_that_of_the_steps() -> None:
    model = Markov(3, 5)
    got = beam_search(
        model.step, model.start, model.state, beam_size=4, n_best=3, max_length=6, eos_token_id=1, return_attention=True
    )
    assert got.attention is not None and got.attention.shape == (3, 3, 6, 3)
    for b, i in itertools.product(range(3), range(3)):
        y = got.sequences[b, i].tolist()
        for t in range(6):
            want = model.of_prefix(b, y[:t])[1] if t < got.lengths[b, i] else [0.0] * 3
            assert got.attention[b, i, t].tolist() == want


# ---- order, bits, batches


@pytest.mark.parametrize("dtype", [torch.float32, f64], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (3, 4, 7), (2, 3, 700), (2, 5, 1009), (1, 600, 3), (2, 1, 4096)], ids=str)
@pytest.mark.parametrize("k", [1, 6, 40])
def test_equal_elements_are_ordered_by_index(shape: tuple[int, int, int], k: int, dtype: torch.dtype) -> None:
    B, K, V = shape
    scores = torch.randint(-6, 1, shape, dtype=dtype) * torch.tensor([1.0, -0.0, 1.0]).to(dtype)[torch.arange(V) % 3]
    scores[torch.rand(shape) < 0.1] = -math.inf
    offset = torch.randint(-2, 1, (B, K), dtype=dtype)
    offset[torch.rand(B, K) < 0.2] = -math.inf
    scores[0, 0] = math.nan
    values, index = top(scores, offset, k)
    for b in range(B):
        total = (offset[b, :, None] + scores[b]).flatten().tolist()
        total = [-math.inf if math.isnan(x) else x for x in total]
        want = sorted(range(K * V), key=lambda i: (-total[i], i))[:k]
        assert values[b].tolist() == [total[i] for i in want]
        assert [i for i, v in zip(index[b].tolist(), values[b]) if v > -math.inf] == [
            i for i in want if total[i] > -math.inf
        ]
        assert all(0 <= i < K * V for i in index[b].tolist())


def test_equal_hypotheses_are_ordered_by_tokens() -> None:
    uniform = lambda tokens, state: (torch.zeros(len(tokens), 5), state)  # noqa: E731
    for eos in (None, 4):  # an end is not among the first three
        got = beam_search(uniform, torch.tensor([3, 0]), beam_size=3, n_best=3, max_length=3, eos_token_id=eos)
        assert got.sequences.tolist() == [[[0, 0, 0], [0, 0, 1], [0, 0, 2]]] * 2
    got = beam_search(uniform, torch.tensor([3]), beam_size=3, n_best=3, max_length=2, eos_token_id=0)
    assert got.sequences.tolist() == [[[0, 0], [1, 0], [1, 1]]]
    assert greedy_search(uniform, torch.tensor([3]), max_length=2).sequences.tolist() == [[[0, 0]]]
    first = sample(uniform, torch.tensor([3]), max_length=4, top_k=1, num_samples=3)
    assert first.sequences.tolist() == [[[0] * 4] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sentence_does_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    case = Case(why="", B=7, V=41, T=9, beam=5, n_best=5, alpha=0.6, beta=0.2, ngram=2, penalty=1.1)
    model = model_of(case, dtype)
    together = beam_search(model.step, model.start, model.state, return_attention=True, **case.options)
    greedy = greedy_search(model.step, model.start, model.state, **case.common)
    for b in range(case.B):
        alone = model.of([b])
        for got, want in zip(
            beam_search(alone.step, alone.start, alone.state, return_attention=True, **case.options), together
        ):
            assert torch.equal(got[0], want[b])
        assert torch.equal(
            greedy_search(alone.step, alone.start, alone.state, **case.common).scores[0], greedy.scores[b]
        )


@pytest.mark.parametrize("search", [beam_search, greedy_search, sample], ids=lambda f: f.__name__)
def test_results_do_not_depend_on_check_every(search: Callable) -> None:
    model, results = Markov(4, 7, scale=4.0), []
    for every in (1, 3, 100, None):
        options: dict[str, Any] = dict(beam_size=3, n_best=3, length_penalty=0.6) if search is beam_search else {}
        if search is sample:
            options = dict(generator=torch.Generator().manual_seed(3), num_samples=4)
        results.append(
            search(model.step, model.start, model.state, max_length=20, eos_token_id=1, check_every=every, **options)
        )
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other[:3], results[0][:3]))


def test_batches_without_sentences_do_not_call_step() -> None:
    def step(tokens: Tensor, state: Any) -> Any:
        raise AssertionError

    start = torch.zeros(0, dtype=torch.int64)
    for got, n in (
        (beam_search(step, start, beam_size=4, n_best=2, max_length=5, return_attention=True, eos_token_id=1), 2),
        (greedy_search(step, start, max_length=torch.zeros(0, dtype=torch.int64), min_length=[]), 1),
        (sample(step, start, max_length=5, num_samples=3), 3),
    ):
        assert got.sequences.shape[:2] == got.scores.shape == got.lengths.shape == (0, n)


@pytest.mark.parametrize("search", [beam_search, greedy_search, sample], ids=lambda f: f.__name__)
@pytest.mark.parametrize("every", [1, 4])
def test_results_do_not_depend_on_dropped_rows(search: Callable, every: int) -> None:
    """Rows are removed, from states, shared tensors and caches; a sentence without an early end stays."""
    B, V, T = 9, 7, 24
    model = Markov(B, V, scale=3.0)
    model.table[:, :, :, 1] += torch.tensor([1.0, 9, 7, -20, 6, 8, 3, 8, 0])[:, None, None]
    options: dict[str, Any] = dict(
        beam_size=3, n_best=3, length_penalty=0.6, coverage_penalty=0.2, source_lengths=[3] * 8 + [2]
    )  # fmt: skip
    options = options if search is beam_search else dict(num_samples=2, top_k=1) if search is sample else {}
    least = torch.tensor([1, 2, 3, 9, 2, 1, 12, 3, 5])
    results, rows = [], []
    for drop in (False, True):
        sizes = []

        def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
            markov, memory, cache, own = state
            assert torch.equal(markov["sentence"], memory.repeat_interleave(len(tokens) // len(memory)))
            assert torch.equal(own.keys[:, 0, 0, 0].long(), memory)
            cache.append(tokens[:, None, None, None].double(), markov["previous"][:, None, None, None].double())
            assert torch.equal(cache.values[:, 0, cache.longest - 1, 0].long(), markov["previous"])
            sizes.append(len(tokens))  # noqa: B023
            logits, markov, attention = model.step(tokens, markov)
            # Tokens of the cache are those of the hypothesis: the one before the last is in the state too.
            assert cache.longest < 2 or torch.equal(cache.keys[:, 0, cache.longest - 1, 0].long(), tokens)
            assert cache.longest < 2 or torch.equal(cache.keys[:, 0, cache.longest - 2, 0].long(), markov["before"])
            markov["before"] = tokens
            return logits, (markov, memory, cache, own), attention

        own = nn.KeyValueCache(B, 1, 1, 1)
        own.append(torch.arange(B)[:, None, None, None].float(), torch.zeros(B, 1, 1, 1))
        state = (
            model.state | {"before": torch.zeros(B, dtype=torch.int64)}, torch.arange(B),
            nn.KeyValueCache(B, T, 1, 1, dtype=f64), own,
        )  # fmt: skip
        got = search(
            step, model.start, state, max_length=T, min_length=least, eos_token_id=1, no_repeat_ngram_size=4,
            repetition_penalty=1.1, return_attention=True, check_every=every, drop_ended=drop,
            state_dims=(0, PerSentence(0), 0, PerSentence()), **options,
        )  # fmt: skip
        results.append(got)
        rows.append(sizes)
    for got, want in zip(*results):
        assert torch.equal(got, want)
    assert len(set(rows[0])) == 1 and len(rows[0]) == len(rows[1])
    assert rows[1] == sorted(rows[1], reverse=True) and len(set(rows[1])) >= (3 if every == 1 else 2)


# ---- sampling


def distribution(log_p: Tensor, **options: Any) -> Tensor:
    """Frequencies of 40000 samples of one step from log_p [V]."""
    got = sample(
        lambda tokens, state: (log_p.expand(len(tokens), -1), state), torch.tensor([0]), max_length=1,
        num_samples=40000, **options,
    )  # fmt: skip
    close(got.scores[0], log_p.log_softmax(0).float()[got.sequences[0, :, 0]])
    return torch.bincount(got.sequences.flatten(), minlength=len(log_p)) / 40000


P = torch.tensor([0.05, 0.4, 0.2, 0.2, 0.1, 0.05])


@pytest.mark.parametrize(
    ("options", "want"),
    [
        (dict(), P),
        (dict(temperature=0.5), P**2 / (P**2).sum()),
        (dict(top_k=2), torch.tensor([0, 2 / 3, 1 / 3, 0, 0, 0])),
        (dict(top_k=100), P),
        (dict(top_p=0.39), torch.tensor([0, 1.0, 0, 0, 0, 0])),
        (dict(top_p=0.5), torch.tensor([0, 2 / 3, 1 / 3, 0, 0, 0])),
        (dict(top_p=0.7), torch.tensor([0, 0.5, 0.25, 0.25, 0, 0])),
        (dict(top_p=1e-9), torch.tensor([0, 1.0, 0, 0, 0, 0])),
        (dict(top_p=1.0), P),
        (dict(top_k=3, top_p=0.6), torch.tensor([0, 2 / 3, 1 / 3, 0, 0, 0])),
        (dict(eos_token_id=1, min_length=1), P),
        (dict(temperature=1e-3), torch.tensor([0, 1.0, 0, 0, 0, 0])),
    ],
    ids=str,
)
def test_samples_have_their_distribution(options: dict[str, Any], want: Tensor) -> None:
    got = distribution(P.log(), **options)
    close(got, want, rtol=0, atol=0.012)  # five standard deviations
    assert torch.equal(got == 0, want == 0)


def test_blocked_tokens_are_not_sampled() -> None:
    model = Markov(4, 5)
    got = sample(
        model.step, model.start, model.state, max_length=5, min_length=4, eos_token_id=1, no_repeat_ngram_size=1,
        num_samples=50,
    )  # fmt: skip
    for y, n in zip(got.sequences.flatten(0, 1).tolist(), got.lengths.flatten().tolist()):
        assert n >= 4 and len(set(y[:n])) == n


def test_scores_of_samples_are_their_log_probabilities() -> None:
    case = Case(why="", T=7, penalty=1.4, ngram=2)
    model = model_of(case)
    got = sample(
        model.step, model.start, model.state, num_samples=5, temperature=1.7, top_k=5, top_p=0.9, return_attention=True,
        generator=torch.Generator().manual_seed(1), **case.common,
    )  # fmt: skip
    assert got.attention is not None and len({tuple(y) for y in got.sequences.flatten(0, 1).tolist()}) > 10
    for b, i in itertools.product(range(case.B), range(5)):
        n = int(got.lengths[b, i])
        y = tuple(got.sequences[b, i].tolist())
        want = sum(plain_log_p(case, model.of_prefix(b, y[:t])[0], y[:t], 0)[y[t]] for t in range(n))
        close(got.scores[b, i].item(), want)
        assert got.attention[b, i, n - 1].tolist() == model.of_prefix(b, y[: n - 1])[1]


def test_samples_repeat_with_a_generator() -> None:
    model = Markov(3, 6)
    runs = [
        sample(
            model.step,
            model.start,
            model.state,
            max_length=6,
            num_samples=4,
            generator=torch.Generator().manual_seed(s),
        ).sequences
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


# ---- states


class Pair(NamedTuple):
    h: Any
    c: Any


@dataclasses.dataclass(frozen=True)
class Cell:
    previous: Any
    name: str = "cell"


@pytest.mark.parametrize("width", ["beam", "samples"])
def test_states_are_any_nest(width: str) -> None:
    model = Markov(3, 6)
    shared, constant = torch.randn(3, 5), object()
    B = len(model.start)
    dims = [{"a": 0, "b": None}, Pair(1, -1), 0, None]
    seen = []

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        nest, pair, cell, passed = state
        assert nest["b"] is shared and passed[0] is constant and cell.name == "cell"
        assert type(pair) is Pair and type(nest) is OrderedDict and type(cell) is Cell and type(state) is list
        assert torch.equal(pair.h[0], nest["a"]) and torch.equal(pair.c[2], nest["a"].half())
        assert nest["number"] == 4 + len(seen) and nest["none"] is None
        seen.append(len(tokens))
        logits = model.table[nest["a"], cell.previous, tokens] + model.by_step[nest["number"] - 4]
        return logits, [OrderedDict(nest, number=nest["number"] + 1), pair, Cell(tokens), passed]

    sentence = torch.arange(B)
    state = [
        OrderedDict(a=sentence, b=shared, number=4, none=None),
        Pair(sentence.expand(2, B), sentence.half().expand(4, B)),
        Cell(torch.zeros(B, dtype=torch.int64)), [constant],
    ]  # fmt: skip
    dims[0] |= {"number": 0, "none": None}
    common = dict(max_length=5, eos_token_id=1)
    if width == "beam":
        got = beam_search(
            step, model.start, state, beam_size=4, n_best=4, length_penalty=0.6, state_dims=dims, **common
        )
        case = Case(why="", T=5, beam=4, n_best=4, alpha=0.6)
        check(got, [plain_beam(case, model, b) for b in range(B)], 1)
    else:
        got = sample(step, model.start, state, num_samples=2, state_dims=dims, **common)
        assert got.sequences.shape == (3, 2, 5)
    assert len(seen) <= 5 and set(seen) == {4 * B if width == "beam" else 2 * B}


def recurrent(kind: str, V: int, H: int) -> tuple[Any, Any, Any, Any]:
    """A decoder of ours for steps, and torch's with the same parameters for whole prefixes."""
    embedding, project = torch.nn.Embedding(V, H), torch.nn.Linear(H, V)
    torch.nn.init.normal_(project.weight)
    ours, theirs = getattr(nn, kind)(H, H, 2, batch_first=True), getattr(torch.nn, kind)(H, H, 2, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return embedding, project, ours, theirs


class Prefixes:
    """A model that computes each prefix from its start, with the methods that plain_beam calls."""

    def __init__(self, start: Tensor, logits: Callable[[int, Tensor], Tensor]) -> None:
        self.start, self.logits = start, logits

    @torch.no_grad()
    def of_prefix(self, b: int, prefix: Sequence[int]) -> tuple[list[float], list[float]]:
        return self.logits(b, torch.tensor([[int(self.start[b]), *prefix]])).tolist(), []


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_states_of_recurrent_layers(kind: str) -> None:
    B, V, H = 3, 8, 6
    embedding, project, ours, theirs = (m.double() for m in recurrent(kind, V, H))
    h0 = torch.randn(2, B, H, dtype=f64)
    hx = (h0, -h0) if kind == "LSTM" else h0

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        output, state = ours(embedding(tokens)[:, None], state)
        return project(output[:, 0]), state

    def logits(b: int, prefix: Tensor) -> Tensor:
        mine = tuple(s[:, b : b + 1].contiguous() for s in hx) if kind == "LSTM" else h0[:, b : b + 1].contiguous()
        return project(theirs(embedding(prefix), mine)[0][0, -1])

    case = Case(why="", B=B, V=V, T=6, beam=4, n_best=4, alpha=0.6)
    start = torch.tensor([2, 0, 5])
    got = beam_search(step, start, hx, state_dims=1, **case.options)
    check(got, [plain_beam(case, Prefixes(start, logits), b) for b in range(B)], 1)  # type: ignore[arg-type]
    assert not got.scores.requires_grad


def test_memory_is_shared_by_the_beams() -> None:
    B, V, H, S, K = 3, 7, 6, 5, 4
    embedding, project, ours, _ = (m.double() for m in recurrent("LSTM", V, H))
    memory, start = torch.randn(B, S, H, dtype=f64), torch.tensor([2, 0, 5])
    h0 = torch.zeros(2, B, H, dtype=f64)

    def folded(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        hx, given = state
        assert given is memory
        output, hx = ours(embedding(tokens)[:, None], hx)
        query = output.view(B, K, H)  # the beams of a sentence are queries of one memory
        weights = (query @ given.transpose(1, 2)).softmax(-1)
        return project((query + weights @ given).view(B * K, H)), (hx, given), weights.view(B * K, S)

    def expanded(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        hx, given = state
        output, hx = ours(embedding(tokens)[:, None], hx)
        weights = (output @ given.transpose(1, 2)).softmax(-1)
        return project((output + weights @ given)[:, 0]), (hx, given), weights[:, 0]

    options = dict(
        beam_size=K, n_best=K, max_length=6, eos_token_id=1, coverage_penalty=0.3, return_attention=True,
        length_penalty=0.5,
    )  # fmt: skip
    one = beam_search(folded, start, ((h0, h0), memory), state_dims=(1, None), **options)
    other = beam_search(expanded, start, ((h0, h0), memory), state_dims=((1, 1), 0), **options)
    for got, want in zip(one, other):
        close(got, want)


def test_keys_of_additive_attention() -> None:
    """Shared by the beams, dropped with their sentence, or copied for each hypothesis: equal results."""
    B, V, H, S, K = 3, 7, 6, 5, 4
    embedding, project, ours, _ = (m.double() for m in recurrent("LSTM", V, H))
    attention = nn.AdditiveAttention(H, H).double()
    memory, h0 = torch.randn(B, S, H, dtype=f64), torch.zeros(2, B, H, dtype=f64)
    lengths = torch.tensor([5, 2, 4])
    with torch.no_grad():
        keys = attention.project(memory)

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        hx, keys, lengths = state
        output, hx = ours(embedding(tokens)[:, None], hx)
        context, weights = attention(output[:, 0], keys, lengths=lengths, need_weights=True)
        logits = project(output[:, 0] + context)
        logits[:, 1] += 1.0  # ends after a few steps
        return logits, (hx, keys, lengths), weights

    state = ((h0, h0), keys, lengths)
    options = dict(
        beam_size=K, n_best=K, max_length=6, eos_token_id=1, coverage_penalty=0.3, source_lengths=lengths,
        length_penalty=0.5,
    )  # fmt: skip
    shared = beam_search(step, torch.tensor([2, 0, 5]), state, state_dims=(1, None, None), **options)
    dims = (1, PerSentence(0), PerSentence(0))
    dropped = beam_search(step, torch.tensor([2, 0, 5]), state, state_dims=dims, drop_ended=True, **options)
    copied = beam_search(step, torch.tensor([2, 0, 5]), state, state_dims=(1, 0, 0), **options)
    for other in (dropped, copied):
        for got, want in zip(other[:3], shared[:3]):
            assert torch.equal(got, want)


@pytest.mark.parametrize("searches", ["greedy", "beam", "samples"])
def test_cached_attention_matches_attention_to_all_steps(searches: str) -> None:
    B, V, E, T, K = 3, 9, 8, 6, 4
    embedding, project = torch.nn.Embedding(V, E).double(), torch.nn.Linear(E, V).double()
    position = torch.nn.Embedding(T, E).double()
    attention = nn.MultiheadAttention(E, 2, batch_first=True, dtype=f64)
    torch.nn.init.normal_(project.weight)

    def cached(tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        x = (embedding(tokens) + position(cache.lengths))[:, None]
        output, _ = attention(x, x, x, need_weights=False, is_causal=True, cache=cache)
        return project(output[:, 0]), cache

    def recomputed(tokens: Tensor, prefix: Tensor) -> tuple[Tensor, Any]:
        prefix = torch.cat((prefix, tokens[:, None]), 1)
        x = embedding(prefix) + position(torch.arange(prefix.shape[1]))
        output, _ = attention(x, x, x, need_weights=False, is_causal=True)
        return project(output[:, -1]), prefix

    def run(step: Any, state: Any) -> Decoded:
        common = dict(max_length=T, eos_token_id=1)
        if searches == "greedy":
            return greedy_search(step, torch.arange(B), state, **common)
        if searches == "samples":
            g = torch.Generator().manual_seed(1)
            return sample(step, torch.arange(B), state, num_samples=K, generator=g, **common)
        return beam_search(step, torch.arange(B), state, beam_size=K, n_best=K, length_penalty=0.6, **common)

    got, want = run(cached, attention.new_cache(B, T)), run(recomputed, torch.zeros(B, 0, dtype=torch.int64))
    assert torch.equal(got.sequences, want.sequences)
    close(got.scores, want.scores)


def test_caches_reorder_in_place() -> None:
    cache = nn.KeyValueCache(3, 8, 2, 4)
    key = torch.randn(3, 2, 5, 4)
    cache.append(key, -key, lengths=[5, 2, 3])
    keys = cache.keys
    cache.reorder(torch.tensor([2, 0, 0]))
    assert cache.keys is keys and torch.equal(cache.keys[:, :, :5], key[[2, 0, 0]])
    assert cache.lengths.tolist() == [3, 5, 5]
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert cache.keys.shape == (6, 2, 8, 4) and cache.values.shape == (6, 2, 8, 4)
    assert torch.equal(cache.values[:, :, :5], -key[[2, 2, 0, 0, 0, 0]]) and not cache.keys[:, :, 5:].any()


@pytest.mark.parametrize("dims", [PerSentence(), None], ids=str)
def test_beams_share_a_cache_of_keys(dims: Any) -> None:
    B, V, E, S, K = 3, 9, 8, 5, 4
    embedding, project = torch.nn.Embedding(V, E).double(), torch.nn.Linear(E, V).double()
    attention = nn.MultiheadAttention(E, 2, batch_first=True, dtype=f64)
    torch.nn.init.normal_(project.weight)
    memory, lengths = torch.randn(B, S, E, dtype=f64), torch.tensor([5, 1, 3])
    cache = attention.new_cache(B, S)
    with torch.no_grad():
        attention(memory[:, :1], memory, memory, cache=cache, lengths=lengths)

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        h, given = state
        assert given is cache
        h = (h + embedding(tokens)).tanh()
        output, _ = attention(h.view(B, -1, E), None, None, cache=given, need_weights=False)
        return project(output.flatten(0, 1)), (h, given)

    def logits(b: int, prefix: Tensor) -> Tensor:
        h, mine = torch.zeros(E, dtype=f64), memory[b : b + 1, : lengths[b]]
        for token in prefix[0]:
            h = (h + embedding(token)).tanh()
        return project(attention(h[None, None], mine, mine, need_weights=False)[0][0, 0])

    case = Case(why="", B=B, V=V, T=5, beam=K, n_best=K, alpha=0.6)
    state, start = (torch.zeros(B, E, dtype=f64), cache), torch.tensor([2, 0, 5])
    got = beam_search(step, start, state, state_dims=(0, dims), **case.options)
    check(got, [plain_beam(case, Prefixes(start, logits), b) for b in range(B)], 1)  # type: ignore[arg-type]


# ---- the device


class NoReads(TorchDispatchMode):
    """Refuses ops whose result depends on the values of tensors on the host."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "aten.equal", "item")
        assert not any(read in name for read in reads), name
        return function(*args, **(kwargs or {}))


class CountReads(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in (
            "item",
            "tolist",
            "__bool__",
            "__int__",
            "__float__",
            "__index__",
            "nonzero",
            "cpu",
            "numpy",
            "equal",
        ):
            self.reads[name] += 1
        return function(*args, **(kwargs or {}))


OPTIONS: dict[Callable, dict[str, Any]] = {
    beam_search: dict(beam_size=3, length_penalty=0.6, coverage_penalty=0.2, early_stopping=True),
    greedy_search: dict(),
    sample: dict(num_samples=2, top_k=4, top_p=0.9, temperature=0.8),
}
EVERY = dict(
    max_length=20, eos_token_id=[1, 2], min_length=2, no_repeat_ngram_size=3, repetition_penalty=1.2,
    return_attention=True,
)  # fmt: skip


@pytest.mark.parametrize("search", OPTIONS, ids=lambda f: f.__name__)
def test_steps_do_not_read_values(search: Callable) -> None:
    model = Markov(4, 6)
    model.table[..., 1:3] = -20  # no early end
    arguments = model.step, model.start, model.state
    with NoReads():
        search(*arguments, **EVERY, **OPTIONS[search])
    for every, reads in ((100, 1), (8, 3), (1, 20)):
        with CountReads() as mode:
            search(*arguments, **EVERY, **OPTIONS[search], check_every=every)
        assert mode.reads == {"tolist": reads, "__int__": 1}  # the check of start_tokens, on a CPU alone


@pytest.mark.parametrize("search", OPTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("V", [6, 600])
def test_searches_run_on_meta(search: Callable, V: int) -> None:
    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert tokens.is_meta and state.shape[1] == len(tokens)
        return torch.empty(len(tokens), V, device="meta"), state, torch.empty(len(tokens), 5, device="meta")

    state = torch.empty(2, 4, 3, device="meta")
    got = search(step, 0, state, state_dims=1, **EVERY, **OPTIONS[search])
    assert got.sequences.is_meta and got.sequences.shape[::2] == (4, 20) and got.attention.shape[2:] == (20, 5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_have_no_gradient(mode: Any) -> None:
    weight = torch.randn(5, 5, requires_grad=True)
    calls = []

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        assert not torch.is_grad_enabled()
        calls.append(0)
        return weight[tokens] + state[:, None], state + 1

    with mode():
        got = beam_search(step, torch.tensor([0, 1]), torch.zeros(2), beam_size=2, max_length=3)
    assert not got.scores.requires_grad and weight.requires_grad and len(calls) == 3
    greedy_search(step, torch.tensor([0, 1]), torch.zeros(2), max_length=3)
    assert torch.is_grad_enabled()


def test_a_compiled_step_is_one_graph() -> None:
    model = Markov(3, 6)
    table = model.table

    def step(tokens: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sentence, previous = state
        return table[sentence, previous, tokens], (sentence, tokens)

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    options = dict(beam_size=3, n_best=2, max_length=6, eos_token_id=1)
    state = model.state["sentence"], model.state["previous"]
    for got, want in zip(
        beam_search(compiled, model.start, state, **options), beam_search(step, model.start, state, **options)
    ):
        assert got is want is None or torch.equal(got, want)
    torch._dynamo.reset()


def test_results_of_step_need_not_be_contiguous() -> None:
    model, case = Markov(3, 47), Case(why="", V=47, beam=3, n_best=3)

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state, _ = model.step(tokens, state)
        return logits.t().contiguous().t(), state | {
            n: state[n].repeat(2, 1).t()[:, 0] for n in ("sentence", "previous")
        }

    got = beam_search(step, model.start.int(), model.state, **case.options)
    check(got, [plain_beam(case, model, b) for b in range(3)], 1)


def test_the_example_of_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "decoding.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], names)
    assert names["best"].sequences.shape == (2, 3, 30) and names["drawn"].sequences.shape == (2, 4, 30)
    of_source = names["best"].attention[1, :, :, 4:]
    assert not of_source.any() and (names["best"].scores.diff(dim=1) <= 0).all()
    step, state, dims = names["step"], names["state"], names["state_dims"]
    dropped = beam_search(step, 1, state, state_dims=dims, beam_size=5, max_length=30, eos_token_id=2, drop_ended=True)
    want = beam_search(step, 1, state, state_dims=dims, beam_size=5, max_length=30, eos_token_id=2)
    assert torch.equal(dropped.sequences, want.sequences)


# ---- dead ends and bad input


def test_sentences_without_a_hypothesis() -> None:
    calls = []

    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(len(tokens))
        return torch.where(state[:, None] == 1, -math.inf, torch.zeros(len(tokens), 5)), state

    state = torch.tensor([0, 1])
    for search, options in ((beam_search, dict(beam_size=2, n_best=2)), (greedy_search, {}), (sample, {})):
        got = search(step, torch.tensor([0, 0]), state, max_length=4, pad_token_id=-1, **options)
        assert (got.lengths[0] == 4).all() and (got.lengths[1] == 0).all()
        assert (got.scores[1] == -math.inf).all() and (got.sequences[1] == -1).all()
        calls.clear()
        search(step, torch.tensor([0, 0]), torch.ones(2), max_length=4, check_every=1, **options)
        assert len(calls) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("search", OPTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("every", [1, 100])
def test_nan_and_infinite_logits(value: float, search: Callable, every: int) -> None:
    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.ones(len(tokens), 6)
        logits[(state[:, 0] == 1) & (state[:, 1] == 2), 4] = value
        return logits, state + torch.tensor([0, 1]), torch.ones(len(tokens), 2)

    state = torch.tensor([[0, 0], [1, 0]])
    text = (
        f"^{search.__name__}: step must return logits, .*without NaN and infinity, got some at step 2 for sentence 1$"
    )
    with pytest.raises(ValueError, match=text):
        search(step, torch.tensor([0, 0]), state, max_length=5, check_every=every, **OPTIONS[search])


def test_nan_after_the_end_of_a_sentence_is_not_read() -> None:
    def step(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.tensor([[0.0, 0.0, 9.0]]).repeat(len(tokens), 1)
        logits[(state[:, 0] == 1) & (state[:, 1] >= 1)] = math.nan
        logits[(state[:, 0] == 0) & (state[:, 1] < 3), 2] = -99
        return logits, state + torch.tensor([0, 1]), logits * 0 + 1

    state = torch.tensor([[0, 0], [1, 0]])
    for search, options in ((beam_search, dict(beam_size=1, coverage_penalty=0.1)), (greedy_search, {})):
        got = search(step, torch.tensor([0, 0]), state, max_length=5, eos_token_id=2, **options)
        assert got.lengths.flatten().tolist() == [4, 1]


def test_nan_attention() -> None:
    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
        return torch.zeros(len(tokens), 3), state, torch.full((len(tokens), 2), math.nan)

    with pytest.raises(ValueError, match=r"attention for coverage_penalty, without NaN .* at step 0 for sentence 0"):
        beam_search(step, torch.tensor([0]), beam_size=2, max_length=2, coverage_penalty=1.0)


def logits_of(value: Any) -> Callable:
    return lambda tokens, state: (value, state)


def good(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    return torch.zeros(len(tokens), 5), state


def attending(tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor]:
    return torch.zeros(len(tokens), 5), state, torch.full((len(tokens), 4), 0.25)


def growing(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(tokens), 5 + int(state[0])), state + 1


def shrinking(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros(len(tokens), 5), state[:-1]


def with_attention(value: Any) -> Callable:
    return lambda tokens, state: (torch.zeros(len(tokens), 5), state, value)


START = torch.tensor([0, 0])
BEAM = "beam_search"
BAD: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    (BEAM, dict(step=3), TypeError, r"step must be a function step\(tokens, state\), got int"),
    (BEAM, dict(step=lambda t, s: torch.zeros(4, 5)), TypeError,
     r"step must return a tuple \(logits, state\) or \(logits, state, attention\), got a tensor of shape \[4, 5\]"),
    (BEAM, dict(step=lambda t, s: (1, 2, 3, 4)), TypeError, r"step must return a tuple .*, got a tuple of \(int"),
    (BEAM, dict(step=logits_of(None)), TypeError, "step must return logits of a floating dtype, got NoneType"),
    (BEAM, dict(step=logits_of(torch.zeros(4, 5, dtype=torch.int64))), TypeError,
     "step must return logits of a floating dtype, got torch.int64"),
    (BEAM, dict(step=logits_of(torch.zeros(2, 5))), ValueError,
     r"step must return logits of shape \[N, V\], N = 4, got \[2, 5\]"),
    (BEAM, dict(step=logits_of(torch.zeros(4, 1, 5))), ValueError, r"logits of shape .*, got \[4, 1, 5\]"),
    (BEAM, dict(step=logits_of(torch.zeros(4, 0))), ValueError, r"logits of shape .*, got \[4, 0\]"),
    (BEAM, dict(step=logits_of(torch.zeros(4, 5, device="meta"))), ValueError,
     "step must return logits on the device of the tokens cpu, got meta"),
    (BEAM, dict(step=growing, state=torch.zeros(2)), ValueError,
     "step must return logits of V = 5 in all steps, got 6"),
    (BEAM, dict(step=shrinking, state=torch.zeros(2)), ValueError,
     r"state must have 4 rows in dimension 0, got \[3\]; state_dims gives the dimension"),
    (BEAM, dict(eos_token_id=5), ValueError, "eos_token_id must be less than V = 5, got 5"),
    (BEAM, dict(eos_token_id=-1), ValueError, "eos_token_id must be at least 0, got -1"),
    (BEAM, dict(eos_token_id=[1.0]), TypeError, r"eos_token_id must be an int or a sequence of int, got \[1.0\]"),
    (BEAM, dict(coverage_penalty=0.1), TypeError,
     r"step must return \(logits, state, attention\) for coverage_penalty, .*, got NoneType"),
    (BEAM, dict(return_attention=True), TypeError, r"step must return .* for return_attention, .*, got NoneType"),
    (BEAM, dict(step=with_attention(torch.zeros(4, 3, dtype=torch.int32)), return_attention=True), TypeError,
     "a floating tensor of attention weights, got torch.int32"),
    (BEAM, dict(step=with_attention(torch.zeros(2, 3)), return_attention=True), ValueError,
     r"step must return attention of shape \[N, S\], N = 4 and S = 3, got \[2, 3\]"),
    (BEAM, dict(step=with_attention(torch.zeros(4)), return_attention=True), ValueError,
     r"step must return attention of shape \[N, S\], N = 4, got \[4\]"),
    (BEAM, dict(beam_size=0), ValueError, "beam_size must be at least 1, got 0"),
    (BEAM, dict(beam_size=2.0), TypeError, "beam_size must be an int, got 2.0"),
    (BEAM, dict(n_best=3), ValueError, "n_best must be at most beam_size = 2, got 3"),
    (BEAM, dict(n_best=0), ValueError, "n_best must be at least 1, got 0"),
    (BEAM, dict(length_penalty=math.inf), ValueError, "length_penalty must be finite, got inf"),
    (BEAM, dict(length_penalty="1"), TypeError, "length_penalty must be a number, got '1'"),
    (BEAM, dict(length_normalization="mean"), ValueError, "length_normalization must be gnmt or power, got 'mean'"),
    (BEAM, dict(coverage_penalty=-1), ValueError, "coverage_penalty must be at least 0, got -1"),
    (BEAM, dict(source_lengths=[1]), ValueError, r"source_lengths must have shape \[B\] = \[2\], got \[1\]"),
    (BEAM, dict(source_lengths=[1, -1]), ValueError, "source_lengths must be at least 0, got -1"),
    (BEAM, dict(max_length=0), ValueError, "max_length must be at least 1, got 0"),
    (BEAM, dict(max_length=torch.tensor([3, 0])), ValueError, "max_length must be at least 1, got 0"),
    (BEAM, dict(max_length=torch.tensor([3.0, 1.0])), TypeError,
     "max_length must be int32 or int64, got torch.float32"),
    (BEAM, dict(max_length=torch.tensor([3])), ValueError, r"max_length must have shape \[B\] = \[2\], got \[1\]"),
    (BEAM, dict(max_length=3.5), TypeError, r"max_length must be an int or \[B\] integers, got float"),
    (BEAM, dict(min_length=-1), ValueError, "min_length must be at least 0, got -1"),
    (BEAM, dict(min_length=4), ValueError, "min_length must be at most max_length = 3, got 4"),
    (BEAM, dict(min_length=[1, 2], max_length=[2, 1]), ValueError, "min_length must be at most max_length = 1, got 2"),
    (BEAM, dict(pad_token_id=0.5), TypeError, "pad_token_id must be an int, got 0.5"),
    (BEAM, dict(no_repeat_ngram_size=-1), ValueError, "no_repeat_ngram_size must be at least 0, got -1"),
    (BEAM, dict(repetition_penalty=0), ValueError, "repetition_penalty must be above 0, got 0"),
    (BEAM, dict(check_every=0), ValueError, "check_every must be at least 1, got 0"),
    (BEAM, dict(start_tokens=[0, 0]), TypeError, r"start_tokens must be a tensor \[B\] or an int, got a list"),
    (BEAM, dict(start_tokens=torch.zeros(2)), TypeError, "start_tokens must be int32 or int64, got torch.float32"),
    (BEAM, dict(start_tokens=START[None]), ValueError, r"start_tokens must have shape \[B\], got \[1, 2\]"),
    (BEAM, dict(start_tokens=torch.tensor([0, -1])), ValueError, "start_tokens must be at least 0, got -1"),
    (BEAM, dict(start_tokens=-2, state=torch.zeros(2)), ValueError, "start_tokens must be at least 0, got -2"),
    (BEAM, dict(drop_ended="x"), TypeError, "drop_ended must be a bool, got 'x'"),
    (BEAM, dict(return_attention=1), TypeError, "return_attention must be a bool, got 1"),
    (BEAM, dict(coverage_penalty=0.5, source_lengths=[3, 6], step=attending), ValueError,
     "source_lengths must be at most 4, the positions of the attention that step returns, got 6"),
    (BEAM, dict(start_tokens=1), ValueError,
     r"start_tokens must be a tensor \[B\] if the state has no tensor .* got 1"),
    (BEAM, dict(state=torch.zeros(3, 2)), ValueError,
     r"state must have 2 rows in dimension 0, got \[3, 2\]; state_dims gives the dimension, or None"),
    (BEAM, dict(state=torch.zeros(3, 2), state_dims=PerSentence(0)), ValueError,
     r"state must have 2 rows in dimension 0, got \[3, 2\]"),
    (BEAM, dict(state=[torch.zeros(2), {"h": torch.zeros(2)}], state_dims=[0, 1]), ValueError,
     r"state\[1\]\['h'\] must have 2 rows in dimension 1, got \[2\]"),
    (BEAM, dict(state=Cell(torch.tensor(1.0))), ValueError,
     r"state.previous must have 2 rows in dimension 0, got \[\]"),
    (BEAM, dict(state=torch.zeros(2), state_dims="0"), ValueError, "state_dims must match state, a tensor .*, got str"),
    (BEAM, dict(state=torch.zeros(2), state_dims=True), TypeError,
     "state_dims must hold int, PerSentence and None, got True"),
    (BEAM, dict(state=(torch.zeros(2),), state_dims=(0, 0)), ValueError,
     r"state_dims must match state, a tuple of \(Tensor\), got a tuple of \(int, int\)"),
    (BEAM, dict(state={"h": torch.zeros(2)}, state_dims={"c": 0}), ValueError,
     "state_dims must match state, dict, got dict"),
    (BEAM, dict(state=[object()]), TypeError,
     r"state\[0\] must be a tensor, a constant, an object with reorder\(index\) or a nest of these, got object; "
     "state_dims of None passes an object on unchanged"),
    ("greedy_search", dict(max_length=0), ValueError, "max_length must be at least 1, got 0"),
    ("greedy_search", dict(step=logits_of(torch.zeros(4, 5))), ValueError, r"N = 2, got \[4, 5\]"),
    ("sample", dict(num_samples=0), ValueError, "num_samples must be at least 1, got 0"),
    ("sample", dict(temperature=0), ValueError, "temperature must be above 0, got 0.0; use greedy_search"),
    ("sample", dict(temperature=math.nan), ValueError, "temperature must be finite, got nan"),
    ("sample", dict(top_k=0), ValueError, "top_k must be at least 1, got 0"),
    ("sample", dict(top_p=0), ValueError, "top_p must be above 0 and at most 1, got 0"),
    ("sample", dict(top_p=1.5), ValueError, "top_p must be above 0 and at most 1, got 1.5"),
    ("sample", dict(generator=3), TypeError, "generator must be a torch.Generator, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("search", "arguments", "error", "text"), BAD, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD)])
def test_bad_input(search: str, arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    given = dict(step=good, start_tokens=START, max_length=3) | ({"beam_size": 2} if search == BEAM else {}) | arguments
    function = {BEAM: beam_search, "greedy_search": greedy_search, "sample": sample}[search]
    with pytest.raises(error, match=f"^{search}: .*{text}"):
        function(**given)


def test_inputs_are_not_changed() -> None:
    logits = torch.randn(8, 5)
    copies, start, state = logits.clone(), torch.tensor([3, 1]), torch.randn(2, 3)
    given = start.clone(), state.clone()
    beam_search(
        lambda tokens, s: (logits, s), start, state, beam_size=4, max_length=4, min_length=3, eos_token_id=1,
        no_repeat_ngram_size=1, repetition_penalty=2.0,
    )  # fmt: skip
    assert torch.equal(logits, copies) and torch.equal(start, given[0]) and torch.equal(state, given[1])
