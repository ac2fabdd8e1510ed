"""Conditional random fields: the definition, all paths, pytorch-crf; gradients, bits, extremes, errors, tools."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from seqkernels import functional, nn
from seqkernels.functional import crf_entropy, crf_log_likelihood, crf_log_partition, crf_marginals, crf_viterbi
from seqkernels.reference.crf import log_partition_and_score
from support.cases import DTYPES
from support.fuzzing import bounded

ops = torch.ops.seqkernels
close = torch.testing.assert_close
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
f64 = torch.float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """pairs: dimensions of the transitions besides K, K."""

    why: str
    B: int = 3
    T: int = 6
    K: int = 5
    pairs: str = ""
    lengths: tuple[int, ...] | None = None
    mask: bool = False
    ends: bool = True
    scale: float = 1.0
    forbidden: float = 0.0  # share of forbidden pairs

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = [
    Case(why="plain"),
    Case(why="one tag", K=1),
    Case(why="one step", T=1),
    Case(why="no step", T=0),
    Case(why="no sequence", B=0),
    Case(why="no ends", ends=False),
    Case(why="tails of vectors", K=37, T=9),
    Case(why="whole vectors", K=16, T=9),
    Case(why="many tags", B=2, K=130, T=5),
    Case(why="lengths", B=4, T=8, lengths=(8, 1, 0, 5)),
    Case(why="a mask", B=5, T=9, mask=True),
    Case(why="more sequences than chunks", B=35, T=7, lengths=tuple(i % 8 for i in range(35))),
    Case(why="many steps", B=2, T=600, K=4, lengths=(600, 300)),
    Case(why="transitions by step", pairs="T", B=3, lengths=(6, 2, 4)),
    Case(why="transitions by sequence and step", pairs="BT", mask=True),
    Case(why="large scores", scale=30.0, T=20, K=9),
    Case(why="forbidden pairs", forbidden=0.5, T=12, K=9),
]


def make(case: Case, dtype: torch.dtype = f64, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    shape = {"": (), "T": (case.T,), "BT": (case.B, case.T)}[case.pairs]

    def scores(*size: int) -> Tensor:
        return (case.scale * torch.randn(size, generator=g, dtype=f64)).to(dtype)

    pairs = scores(*shape, case.K, case.K)
    if case.forbidden:
        pairs[torch.rand(pairs.shape, generator=g) < case.forbidden] = -torch.inf
        pairs[range(case.K), range(case.K)] = 0.5
    visible = torch.rand(case.B, case.T, generator=g) < 0.6
    return dict(
        emissions=scores(case.B, case.T, case.K),
        transitions=pairs,
        start_transitions=scores(case.K) if case.ends else None,
        end_transitions=scores(case.K) if case.ends else None,
        lengths=None if case.lengths is None else torch.tensor(case.lengths, dtype=torch.int64),
        mask=visible if case.mask else None,
    )


SCORES = ("emissions", "transitions", "start_transitions", "end_transitions")


def tags_of(case: Case, pairs: Tensor) -> Tensor:
    """Random tags; where pairs are forbidden, one tag, which may follow itself."""
    if case.forbidden:
        return torch.arange(case.B)[:, None].remainder(case.K).expand(case.B, case.T).contiguous()
    return torch.randint(case.K, (case.B, case.T), generator=torch.Generator().manual_seed(1))


def run(function: Callable, given: dict[str, Any], weights: Tensor) -> dict[str, Tensor]:
    """Results, and gradients of their weighted sum."""
    leaves = {n: given[n].detach().requires_grad_() for n in SCORES if given[n] is not None}
    results = function(**(given | leaves))
    loss = sum((r * w).sum() for r, w in zip(results, weights))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {f"result {i}": r.detach() for i, r in enumerate(results)} | {f"d{n}": g for n, g in zip(leaves, grads)}


def four(pairs: Tensor) -> Tensor:
    return pairs.reshape(*(1,) * (4 - pairs.dim()), *pairs.shape)


def ours(tags: Tensor) -> Callable:
    def function(**given: Any) -> tuple[Tensor, Tensor]:
        pairs = given["transitions"]
        likelihood = crf_log_likelihood(
            given["emissions"], tags, pairs, *(given[n] for n in SCORES[2:]), lengths=given["lengths"],
            mask=given["mask"], reduction="none",
        )  # fmt: skip
        return crf_log_partition(**given), likelihood

    return function


def definition(tags: Tensor) -> Callable:
    def function(**given: Any) -> tuple[Tensor, Tensor]:
        e, pairs, *rest = given.values()
        log_z, score = log_partition_and_score(e, four(pairs), *rest, tags)
        return log_z, score - log_z

    return function


def check(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    """Asserts that results and gradients match the reference."""
    given = make(case, dtype, seed)
    wide = {n: t.double() if n in SCORES and t is not None else t for n, t in given.items()}
    tags = tags_of(case, given["transitions"])
    weights = torch.randn(2, case.B, dtype=f64, generator=torch.Generator().manual_seed(2))
    got, want = run(ours(tags), given, weights), run(definition(tags), wide, weights)
    for name, w in want.items():
        assert got[name].shape == w.shape, name
        assert not got[name].isnan().any(), name
        largest = max(w.abs().max().item() if w.numel() else 0, 1.0)
        tolerance = TOLERANCE[torch.float32 if "result" in name and dtype != f64 else dtype] * largest
        close(got[name].double(), w, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_and_gradients_match_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    B, T = draw(st.integers(0, 5)), draw(st.integers(1, 9))
    return Case(
        why="random", B=B, T=T, K=draw(st.sampled_from([1, 2, 3, 8, 9, 17, 33])), ends=draw(st.booleans()),
        pairs=draw(st.sampled_from(["", "T", "BT"])), scale=draw(st.sampled_from([1.0, 30.0])),
        mask=draw(st.booleans()), lengths=draw(st.none() | st.tuples(*[st.integers(0, T)] * B)),
    )  # fmt: skip


@bounded(examples=40)
@drawn(case=random_cases(), dtype=st.sampled_from([f64, torch.float32]), seed=st.integers(0, 99))
def test_random_chains_match_the_reference(case: Case, dtype: torch.dtype, seed: int) -> None:
    check(dataclasses.replace(case, lengths=None) if case.mask else case, dtype, seed)


def paths_of(given: dict[str, Any], b: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """All paths of a sequence and their scores."""
    e, pairs, start, end = (given[n] for n in SCORES)
    B, T, K = e.shape
    steps = range(T) if given["lengths"] is None else range(int(given["lengths"][b]))
    if given["mask"] is not None:
        steps = [t for t in range(T) if given["mask"][b, t]]
    m = four(pairs).expand(B, T, K, K)[b]
    paths = list(itertools.product(range(K), repeat=len(steps)))
    scores = []
    for y in paths:
        score = sum((e[b, t, k] for t, k in zip(steps, y)), torch.zeros((), dtype=f64))
        score = score + sum(m[t, y[s], y[s + 1]] for s, t in enumerate(steps[1:]))
        if y and start is not None:
            score = score + start[y[0]] + end[y[-1]]
        scores.append(score)
    return paths, torch.stack(scores)


SMALL = [
    Case(why="plain", B=2, T=4, K=3),
    Case(why="lengths", B=4, T=4, K=3, lengths=(4, 0, 1, 3)),
    Case(why="a mask", B=3, T=5, K=2, mask=True),
    Case(why="by step", B=2, T=4, K=3, pairs="BT"),
    Case(why="forbidden", B=2, T=4, K=3, forbidden=0.4),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_all_paths_of_small_cases(case: Case, isa: str) -> None:
    given = make(case)
    log_z, entropy = crf_log_partition(**given), crf_entropy(**given)
    marginals = crf_marginals(**given)[0]
    best, best_score = crf_viterbi(**given)
    several, scores = crf_viterbi(**given, nbest=7)
    for b in range(case.B):
        paths, of_paths = paths_of(given, b)
        close(log_z[b], of_paths.logsumexp(0))
        p = of_paths.softmax(0)
        close(entropy[b], -(p * p.clamp(min=1e-300).log()).sum())
        order = of_paths.argsort(descending=True, stable=True)
        visible = best[b] >= 0
        assert best[b][visible].tolist() == list(paths[order[0]])
        close(best_score[b], of_paths[order[0]])
        want = torch.full((7,), -torch.inf, dtype=f64)
        count = min(7, len(paths))
        want[:count] = of_paths[order[:count]]
        close(scores[b], want)
        for r in range(7):
            path = several[b, r][several[b, r] >= 0].tolist()
            assert path == (list(paths[order[r]]) if want[r] > -torch.inf else [])
        of_tags = torch.zeros(int(visible.sum()), case.K, dtype=f64)
        for y, weight in zip(paths, p):
            for s, k in enumerate(y):
                of_tags[s, k] += weight
        close(marginals[b][visible], of_tags)
        assert not marginals[b][~visible].any()


@pytest.mark.filterwarnings("ignore:where received a uint8 condition")
@pytest.mark.parametrize("B, T, K", [(5, 7, 9), (3, 20, 20), (4, 60, 45)])
def test_module_matches_pytorch_crf(B: int, T: int, K: int) -> None:
    torchcrf = pytest.importorskip("torchcrf")
    theirs, module = torchcrf.CRF(K), nn.CRF(K)
    module.load_state_dict(theirs.state_dict())
    e, tags = torch.randn(T, B, K), torch.randint(K, (T, B))
    mask = torch.arange(T)[:, None] < torch.tensor([T, *torch.randint(1, T + 1, (B - 1,)).tolist()])
    for reduction in ("none", "sum", "mean", "token_mean"):
        results = []
        for crf in (theirs, module):
            crf.zero_grad()
            x = e.clone().requires_grad_()
            likelihood = crf(x, tags, mask, reduction)
            likelihood.sum().backward()
            results.append([likelihood.detach(), x.grad, *(p.grad for p in crf.parameters())])
        for got, want in zip(results[1], results[0]):
            close(got, want, rtol=1e-4, atol=2e-5)
    assert module.decode(e, mask) == theirs.decode(e, mask)
    assert module.decode(e) == theirs.decode(e)
    for arguments, message in (
        ((e[0], tags), "emissions must have dimension of 3, got 2"),
        ((e[..., 1:], tags), "expected last dimension of emissions is"),
        ((e, tags[1:]), "the first two dimensions of emissions and tags must match"),
        ((e, tags, mask[1:]), "the first two dimensions of emissions and mask must match"),
        ((e, tags, mask, "median"), "invalid reduction: median"),
    ):
        for crf in (theirs, module):
            with pytest.raises(ValueError, match=message):
                crf(*arguments)


def test_module() -> None:
    module = nn.CRF(4, batch_first=True)
    e, lengths = torch.randn(3, 5, 4), [5, 0, 2]
    lists = module.decode(e, lengths=lengths)
    assert [len(path) for path in lists] == lengths
    tags, scores = module.decode(e, lengths=lengths, return_tensors=True)
    assert [path[path >= 0].tolist() for path in tags] == lists and scores.shape == (3,)
    several = module.decode(e, lengths=lengths, nbest=2)
    assert several[0] == lists and len(several) == 2
    assert [len(path) for path in module.decode(e, lengths=lengths, pad_tag=9)] == [5, 5, 5]
    assert module.marginals(e, lengths=lengths).shape == e.shape and module.entropy(e).shape == (3,)
    by_time = nn.CRF(4)
    by_time.load_state_dict(module.state_dict())
    x = e.transpose(0, 1)
    assert by_time.decode(x, lengths=lengths) == lists
    assert torch.equal(by_time.decode(x, lengths=lengths, return_tensors=True)[0], tags.T)
    assert torch.equal(by_time.marginals(x, lengths=lengths).transpose(0, 1), module.marginals(e, lengths=lengths))
    assert "num_tags=4, batch_first=True" in repr(module)


def test_forbidden_pairs() -> None:
    module = nn.CRF(3, batch_first=True, forbidden=[(0, 1), ("start", 2), (1, "end")])
    e = torch.zeros(50, 6, 3)
    e[:, :, 1] = 3
    e[:, 0, 2] = 50
    paths = module.decode(e + 0.1 * torch.randn_like(e))
    for path in paths:
        assert path[0] != 2 and path[-1] != 1
        assert all(pair != (0, 1) for pair in itertools.pairwise(path))
    module(e, torch.tensor(paths)).backward()
    assert module.transitions.grad[0, 1] == 0 and module.transitions.grad.isfinite().all()
    assert module.start_transitions.grad[2] == 0 and module.end_transitions.grad[1] == 0
    assert module(e[:1], torch.tensor([[1, 0, 1, 0, 0, 0]])) == -torch.inf
    for bad in ((0, 3), ("end", 1), (1,), (0, "start"), ("start", "end"), 1):
        with pytest.raises(ValueError, match="forbidden must hold pairs"):
            nn.CRF(3, forbidden=[bad])
    with pytest.raises(TypeError, match="forbidden must be pairs of tags, got int"):
        nn.CRF(3, forbidden=3)
    with pytest.raises(ValueError, match="invalid number of tags: 0"):
        nn.CRF(0)


# ---- gradients


@pytest.mark.parametrize("case", SMALL[:4], ids=str)
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    given = make(case)
    scores = [given.pop(n).requires_grad_() for n in SCORES]
    tags = tags_of(case, scores[1])

    def likelihood(e: Tensor, *rest: Tensor) -> Tensor:
        return crf_log_likelihood(e, tags, *rest, **given, reduction="none")

    def marginals(*scores: Tensor) -> tuple[Tensor, ...]:
        return crf_marginals(*scores, **given)

    for function in (likelihood, marginals, lambda *scores: crf_entropy(*scores, **given)):
        assert torch.autograd.gradcheck(function, scores, check_forward_ad=function is likelihood)
    assert torch.autograd.gradgradcheck(likelihood, scores)


@pytest.mark.parametrize("case", [CASES[i] for i in (0, 9, 10, 13, 14, 5)], ids=str)
def test_opcheck(case: Case, raw_memory: None) -> None:
    given = make(case)
    tensors = [four(t) if n == "transitions" else t for n, t in given.items()]
    tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    tags = tags_of(case, given["transitions"])
    torch.library.opcheck(ops.crf_forward.default, (*tensors, tags))
    torch.library.opcheck(ops.crf_viterbi.default, (*tensors, 2), test_utils=("test_schema", "test_faketensor"))
    tensors = [None if t is None else t.detach() for t in tensors]
    log_z, score, alpha = ops.crf_forward(*tensors, tags)
    upstream = torch.randn_like(log_z), torch.randn_like(score)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.crf_backward.default, (*upstream, *tensors, tags, alpha), test_utils=checks)


def test_transforms() -> None:
    given = make(SMALL[0])
    e, *rest = (given[n] for n in SCORES)
    tags = torch.randint(3, (2, 4))

    def likelihood(e: Tensor, tags: Tensor) -> Tensor:
        return crf_log_likelihood(e, tags, *rest)

    want = torch.stack([likelihood(e[b : b + 1], tags[b : b + 1]) for b in range(2)])
    close(torch.func.vmap(likelihood)(e[:, None], tags[:, None]), want)
    per_sample = torch.func.vmap(torch.func.grad(likelihood))(e[:, None], tags[:, None])
    close(per_sample[:, 0], torch.func.grad(likelihood)(e, tags))
    hessian = torch.func.hessian(likelihood)(e, tags)
    close(hessian, torch.autograd.functional.hessian(lambda e: likelihood(e, tags), e))


# ---- numerics and bits


def test_long_sequences_are_accurate(isa: str) -> None:
    """Against the kernels in float64."""
    case = Case(why="long", B=2, T=1000, K=85)
    given = make(case, torch.float32)
    wide = {n: None if t is None else t.double() for n, t in given.items()}
    tags = tags_of(case, given["transitions"])
    want = run(ours(tags), wide, torch.ones(2, 2))
    got = run(ours(tags), given, torch.ones(2, 2))
    assert want["result 0"].min() > 4000
    assert (got["result 0"] - want["result 0"]).abs().max() < 1e-3
    marginals = crf_marginals(**given)[0]
    close(marginals.sum(2), torch.ones(2, 1000), rtol=0, atol=1e-5)
    assert (got["demissions"] - want["demissions"]).abs().max() < 2e-4


def test_a_hundred_thousand_steps() -> None:
    e, pairs = torch.randn(1, 100_000, 3), torch.randn(3, 3)
    log_z = crf_log_partition(e, pairs)
    wide = crf_log_partition(e.double(), pairs.double())
    close(log_z.double(), wide, rtol=3e-7, atol=0)
    assert crf_viterbi(e, pairs)[0].tolist() == crf_viterbi(e.double(), pairs.double())[0].tolist()


@pytest.mark.parametrize("number", [-1e4, -1e9, -torch.inf])
def test_constraints_by_large_numbers(number: float, isa: str) -> None:
    """Scores that leave paths which underflow as probabilities: the only path must still have its score."""
    K, T = 6, 9
    pairs = torch.full((K, K), number)
    pairs[range(K - 1), range(1, K)] = 0.25
    pairs[K - 1, 0] = 0.25
    e = torch.full((2, T, K), number)
    for t in range(T):
        e[0, t, t % K] = 1.0
    e[1] = torch.randn(T, K)
    e.requires_grad_()
    pairs.requires_grad_()
    log_z = crf_log_partition(e, pairs)
    wide = log_partition_and_score(e.double(), four(pairs).double())[0]
    close(log_z.double(), wide.detach(), rtol=1e-6, atol=1e-5)
    got = torch.autograd.grad(log_z.sum(), (e, pairs))
    want = torch.autograd.grad(wide.sum(), (e, pairs))
    for g, w in zip(got, want):
        close(g, w, rtol=1e-4, atol=1e-5)


def test_all_paths_forbidden() -> None:
    e = torch.randn(2, 4, 3)
    e[0, 2] = -torch.inf
    e.requires_grad_()
    pairs = torch.randn(3, 3, requires_grad=True)
    log_z = crf_log_partition(e, pairs)
    assert log_z[0] == -torch.inf and log_z[1].isfinite()
    log_z.sum().backward()
    assert not e.grad[0].any() and e.grad[1].any() and pairs.grad.isfinite().all()
    for nbest in (None, 1, 2):
        tags, scores = crf_viterbi(e, pairs, nbest=nbest)
        assert (scores[0] == -torch.inf).all() and scores[1].isfinite().all()
        assert (tags[0] == -1).all() and (tags[1] >= 0).all()
    assert crf_entropy(e, pairs)[0].isnan() and crf_entropy(e, pairs)[1].isfinite()
    assert crf_log_likelihood(e, torch.zeros(2, 4).long(), pairs, reduction="none")[0].isnan()


def test_nan_spreads_within_its_sequence_only(isa: str) -> None:
    e, pairs, lengths = torch.randn(3, 5, 4), torch.randn(4, 4), torch.tensor([5, 3, 5])
    clean = crf_log_partition(e, pairs, lengths=lengths)
    e[1, 3:] = torch.nan
    e[2, 4, 1] = torch.nan
    e.requires_grad_()
    log_z = crf_log_partition(e, pairs, lengths=lengths)
    assert torch.equal(log_z[:2], clean[:2]) and log_z[2].isnan()
    (grad,) = torch.autograd.grad(log_z.sum(), e)
    assert grad[:2].isfinite().all() and not grad[1, 3:].any() and grad[2].isnan().all()
    for bad in (torch.nan, torch.inf):
        e = torch.where(e.isnan(), bad, e.detach())
        for nbest in (None, 2):
            tags, scores = crf_viterbi(e, pairs, lengths=lengths, nbest=nbest)
            assert scores[2].isnan().all() and (tags[2] == -1).all()
            assert scores[:2].isfinite().all() and (tags[0] >= 0).all()


def test_probabilities_of_pairs_add_up_under_large_scores(isa: str) -> None:
    check_pairs(50)


def check_pairs(B: int) -> None:
    e, pairs = 20 * torch.randn(B, 4, 3), 4000 * torch.randn(3, 3)
    for m in (pairs, pairs.expand(B, 4, 3, 3)):
        _, of_pairs = crf_marginals(e, m)
        close(of_pairs.sum(), torch.tensor(3.0 * B), rtol=1e-6, atol=0)
    assert crf_entropy(e, pairs).min() >= 0
    half = e.bfloat16(), (pairs / 1000).bfloat16()
    close(crf_entropy(*half), crf_entropy(*(t.float() for t in half)), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_batch_padding_or_threads(dtype: torch.dtype, isa: str) -> None:
    case = Case(why="company", B=20, T=40, K=19, lengths=tuple(range(21, 41)))
    given = make(case, dtype)
    tags = tags_of(case, given["transitions"])
    weights = torch.ones(2, case.B, dtype=f64)
    whole = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        whole[threads] = run(ours(tags), given, weights) | {"best": crf_viterbi(**given)[0]}
    for threads in (2, 3):
        assert all(torch.equal(whole[1][n], t) for n, t in whole[threads].items())
    for b in (0, 7, 19):
        n = int(given["lengths"][b])
        alone = given | dict(emissions=given["emissions"][b : b + 1, :n], lengths=None)
        found = run(ours(tags[b : b + 1, :n]), alone, weights[:, :1])
        for name in ("result 0", "result 1"):
            assert torch.equal(found[name][0], whole[1][name][b])
        assert torch.equal(found["demissions"][0], whole[1]["demissions"][b, :n])
        assert torch.equal(crf_viterbi(**alone)[0][0], whole[1]["best"][b, :n])


def test_strides_and_offsets() -> None:
    given = make(CASES[0])
    want = crf_log_partition(**given)
    for view in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    ):
        moved = {n: view(t) if n in SCORES else t for n, t in given.items()}
        assert torch.equal(crf_log_partition(**moved), want)
    by_time = given["emissions"].transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(crf_log_partition(**given | dict(emissions=by_time)), want)


def test_equal_paths_prefer_small_tags() -> None:
    tags, scores = crf_viterbi(torch.zeros(1, 3, 2), torch.zeros(2, 2), nbest=3)
    assert tags[0].tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0]] and not scores.any()
    assert crf_viterbi(torch.zeros(1, 3, 2), torch.zeros(2, 2))[0].tolist() == [[0, 0, 0]]


# ---- tools


def test_compile_export_and_meta() -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.crf = nn.CRF(5, batch_first=True)

        def forward(self, e: Tensor, tags: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            return self.crf(e, tags, lengths=lengths), self.crf.decode(e, lengths=lengths, return_tensors=True)[0]

    tagger = Tagger()
    inputs = (torch.randn(3, 6, 5), torch.randint(5, (3, 6)), torch.tensor([6, 2, 4]))
    want = tagger(*inputs)
    want[0].backward()
    grad = tagger.crf.transitions.grad.clone()
    tagger.zero_grad()
    compiled = torch.compile(tagger, fullgraph=True, backend="aot_eager")
    got = compiled(*inputs)
    got[0].backward()
    close(got, want)
    close(tagger.crf.transitions.grad, grad)
    exported = torch.export.export(tagger, inputs).module()
    close(exported(*inputs), want)
    meta = (t.to("meta") for t in inputs)
    assert tagger.to("meta")(*meta)[1].shape == (3, 6)


def test_emissions_and_parameters_are_promoted() -> None:
    module, e, tags = nn.CRF(4, batch_first=True), torch.randn(2, 5, 4), torch.randint(4, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(e, tags), nn.CRF.forward(module, e, tags))
        half = module(e.bfloat16(), tags)
    assert torch.equal(half, module(e.bfloat16().float(), tags))
    assert module.decode(e.bfloat16()) == module.decode(e.bfloat16().float())
    wide = nn.CRF(4, batch_first=True, dtype=f64)
    wide.load_state_dict(module.state_dict())
    assert wide(e, tags).dtype == f64 and torch.equal(wide(e, tags), wide(e.double(), tags))
    halves = nn.CRF(4, dtype=torch.float16)
    assert halves(e.half().transpose(0, 1), tags.T).dtype == torch.float32


# ---- errors

E, M = torch.zeros(2, 3, 4), torch.zeros(4, 4)
Y = torch.zeros(2, 3, dtype=torch.int64)
V = torch.zeros(4)
ERRORS: dict[str, tuple[Callable, type[Exception], str]] = {
    "emissions": (lambda: crf_log_partition(torch.zeros(3), M), ValueError, r"emissions must have shape \[B, T, K\]"),
    "no tags": (lambda: crf_log_partition(torch.zeros(2, 3, 0), M), ValueError, "emissions must have shape"),
    "a list": (lambda: crf_log_partition([1.0], M), TypeError, "emissions must be a tensor, got a list"),
    "integers": (lambda: crf_log_partition(E.int(), M), NotImplementedError, "no backend supports emissions"),
    "transitions": (lambda: crf_log_partition(E, M[1:]), ValueError, r"transitions must have shape \[K, K\]"),
    "by step": (lambda: crf_log_partition(E, M.expand(2, 4, 4)), ValueError, r"got \[2, 4, 4\]"),
    "dtype": (lambda: crf_log_partition(E, M.double()), TypeError, "transitions must be of the dtype of emissions"),
    "start": (lambda: crf_log_partition(E, M, V[1:]), ValueError, r"start_transitions must have shape \[K\] = \[4\]"),
    "end": (lambda: crf_log_partition(E, M, None, V.double()), TypeError, "end_transitions must be of the dtype"),
    "a number": (lambda: crf_log_partition(E, M, 1.0), TypeError, "start_transitions must be a tensor, got float"),
    "both": (lambda: crf_log_partition(E, M, lengths=[3, 1], mask=Y.bool()), ValueError, "must not be given together"),
    "too long": (lambda: crf_log_partition(E, M, lengths=[3, 4]), ValueError, "lengths must be between 0 and 3, got 4"),
    "negative": (lambda: crf_log_partition(E, M, lengths=[3, -1]), ValueError, "lengths must be between 0 and 3"),
    "count": (lambda: crf_log_partition(E, M, lengths=[3]), ValueError, r"lengths must have shape \[B\] = \[2\]"),
    "real": (lambda: crf_log_partition(E, M, lengths=V[:2]), TypeError, "lengths must be int32 or int64"),
    "mask": (lambda: crf_log_partition(E, M, mask=Y.bool().T), ValueError, r"mask must have shape \[B, T\] = \[2, 3\]"),
    "mask dtype": (lambda: crf_log_partition(E, M, mask=Y.float()), TypeError, "mask must be bool or uint8"),
    "tag": (lambda: crf_log_likelihood(E, Y + 4, M), ValueError, "tags must be between 0 and 3, got 4 at step 0"),
    "tags": (lambda: crf_log_likelihood(E, Y.T, M), ValueError, r"tags must have shape \[B, T\] = \[2, 3\]"),
    "tags dtype": (lambda: crf_log_likelihood(E, Y.float(), M), TypeError, "tags must be int64"),
    "tags list": (lambda: crf_log_likelihood(E, [1], M), TypeError, "tags must be a tensor, got a list"),
    "reduction": (lambda: crf_log_likelihood(E, Y, M, reduction="max"), ValueError, "reduction must be none, sum"),
    "nbest": (lambda: crf_viterbi(E, M, nbest=0), ValueError, "nbest must be an int from 1"),
    "nbest too large": (lambda: crf_viterbi(E, M, nbest=2**63), ValueError, "nbest must be an int from 1"),
    "fractions": (lambda: crf_log_partition(E, M, lengths=[2.7, 2]), TypeError, "lengths must be a tensor or a"),
    "a length": (lambda: crf_log_partition(E, M, lengths=3), TypeError, "lengths must be a tensor or a"),
    "module, emissions": (lambda: nn.CRF(4)(None, Y), TypeError, "CRF: emissions must be a tensor, got NoneType"),
    "module, tags": (lambda: nn.CRF(4)(E, [[0]]), TypeError, "CRF: tags must be a tensor, got a list"),
    "module, mask": (lambda: nn.CRF(4).decode(E, [[1]]), TypeError, "CRF: mask must be a tensor, got a list"),
    "module, size": (lambda: nn.CRF("3"), TypeError, "num_tags must be an int, got str"),
    "backend": (lambda: crf_viterbi(E, M, backend="cuda"), ValueError, "backend must be None, cpu, triton, got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_op_errors() -> None:
    """The ops check what would be read or written outside memory."""
    m = M[None, None]
    for call, message in (
        (lambda: ops.crf_forward(E[0], m, None, None, None, None, None), "emissions must have 3 dimensions"),
        (lambda: ops.crf_forward(E, M, None, None, None, None, None), "transitions must have shape"),
        (lambda: ops.crf_forward(E, m, V[1:], None, None, None, None), "start_transitions must have shape"),
        (lambda: ops.crf_forward(E, m, None, None, Y[:, 0] + 9, None, None), "lengths must be between"),
        (lambda: ops.crf_forward(E, m, None, None, None, None, Y - 1), "tags must be between"),
        (lambda: ops.crf_backward(V[:2].double(), V[:2], E, m, *[None] * 5, E), "dscore must be float64"),
        (lambda: ops.crf_backward(V[:2].double(), V[:2].double(), E, m, *[None] * 5, E[1:]), "alpha must have shape"),
        (lambda: ops.crf_viterbi(E, m, None, None, None, None, 0), "paths must be at least 1"),
        (lambda: ops.crf_viterbi(E, m, None, None, None, None, 1 << 40), "paths must be fewer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_lengths_of_any_kind_match_a_mask() -> None:
    given = make(Case(why="lengths", B=3, T=5, lengths=(2, 5, 0)))
    want = crf_log_partition(**given)
    lengths = given.pop("lengths")
    for more in (dict(lengths=lengths.tolist()), dict(lengths=lengths.int())):
        assert torch.equal(crf_log_partition(**given | more), want)
    mask = torch.arange(5) < lengths[:, None]
    assert torch.equal(crf_log_partition(**given | dict(mask=mask)), want)
    assert torch.equal(crf_log_partition(**given | dict(mask=mask.byte())), want)
    single = given | dict(emissions=given["emissions"][1])
    assert torch.equal(crf_log_partition(**single), want[1])
    assert crf_viterbi(**single)[0].shape == (5,) and crf_marginals(**single)[0].shape == (5, 5)
    assert math.isfinite(crf_entropy(**single)) and functional.crf_log_likelihood(
        single["emissions"], torch.zeros(5, dtype=torch.int64), single["transitions"], reduction="none"
    ).shape == ()  # fmt: skip
