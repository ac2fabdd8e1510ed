"""Triton kernels of conditional random fields: the tests of the CPU kernels, bits, gradients, tools, errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import seqkernels
from crf import test_crf
from crf.test_crf import (
    CASES,
    SCORES,
    SMALL,
    TOLERANCE,
    Case,
    close,
    definition,
    f64,
    four,
    make,
    ours,
    run,
    tags_of,
)
from seqkernels import backend, functional
from support.cases import DTYPES
from support.triton_on_cpu import DEVICE, load

load("crf")
launch = load("crf.launch")
ops = torch.ops.seqkernels_triton
FUNCTIONS = ("crf_entropy", "crf_log_likelihood", "crf_log_partition", "crf_marginals", "crf_viterbi")
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy warns of log 0 and 0 / 0
    *([pytest.mark.cuda] if DEVICE == "cuda" else []),
]


def in_triton(name: str) -> Callable:
    """A public function with the Triton kernels, on tensors of a CPU."""
    function = getattr(functional, name)

    def move(values: Any, device: str) -> Any:
        return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, values)

    def call(*args: Any, **options: Any) -> Any:
        return move(function(*move(args, DEVICE), **move(options, DEVICE), backend="triton"), "cpu")

    return call


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FUNCTIONS:
        monkeypatch.setattr(test_crf, name, in_triton(name))


AGAIN = [
    *(("all_paths_of_small_cases", case, "") for case in SMALL),
    *(("constraints_by_large_numbers", number, "") for number in (-1e4, -1e9, -torch.inf)),
    ("all_paths_forbidden",),
    ("nan_spreads_within_its_sequence_only", ""),
    ("strides_and_offsets",),
    ("equal_paths_prefer_small_tags",),
    ("lengths_of_any_kind_match_a_mask",),
]


@pytest.mark.parametrize("test", AGAIN, ids=lambda test: "-".join(map(str, test)))
def test_of_the_cpu(test: tuple[Any, ...]) -> None:
    getattr(test_crf, f"test_{test[0]}")(*test[1:])


def test_probabilities_of_pairs_add_up_under_large_scores() -> None:
    test_crf.check_pairs(3)


# ---- results and gradients

SMALLER = ("tails of vectors", "whole vectors", "many tags", "a mask", "large scores", "forbidden pairs")
SMALLER += ("more sequences than chunks", "many steps")
BLOCKS = Case(why="blocks of columns", B=2, T=4, K=37)
TRITON_CASES = [
    *(case for case in CASES if case.why not in SMALLER),
    Case(why="padding of vectors", B=2, K=37, T=4),
    Case(why="whole vectors", B=1, K=16, T=5),
    Case(why="a mask", B=4, T=7, mask=True),
    Case(why="more sequences than chunks", B=7, T=3, lengths=(3, 0, 1, 2, 3, 1, 2)),
    Case(why="more steps than a tile", B=1, T=20, K=3),
    Case(why="large scores", B=2, T=8, K=9, scale=30.0),
    Case(why="forbidden pairs", B=2, T=6, K=9, forbidden=0.5),
    BLOCKS,
]


@pytest.mark.parametrize("case", TRITON_CASES, ids=str)
def test_results_and_gradients_match_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case in one dtype; the paths are those of the CPU kernels."""
    monkeypatch.setattr(launch, "CHUNKS", 4)
    monkeypatch.setattr(launch, "SCORES", 16)
    if case == BLOCKS:
        monkeypatch.setattr(launch, "MOST_WARPS", 1)
    dtype = DTYPES[TRITON_CASES.index(case) % len(DTYPES)]
    given = make(case, dtype)
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
    for nbest in (None, 2):
        for a, b in zip(in_triton("crf_viterbi")(**given, nbest=nbest), functional.crf_viterbi(**given, nbest=nbest)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("number", [-1e4, -torch.inf])
def test_constraints_in_float64_and_by_step(number: float) -> None:
    """Forbidden columns do not select log space, and other columns that underflow do."""
    pairs = torch.full((4, 4), number, dtype=f64)
    pairs[range(4), [1, 2, 3, 0]] = 0.5
    pairs[:, 2] = -torch.inf
    pairs[1, 2] = -1e6
    e = torch.randn(2, 5, 4, dtype=f64)
    want = log_partition(e, pairs)
    close(in_triton("crf_log_partition")(e, pairs), want)
    close(in_triton("crf_log_partition")(e, pairs.expand(5, 4, 4).contiguous()), want)


def log_partition(e: Tensor, pairs: Tensor) -> Tensor:
    return test_crf.log_partition_and_score(e, four(pairs))[0]


@pytest.mark.parametrize("at", [0, 1])
def test_nan_at_any_step(at: int) -> None:
    """The sums after the step are NaN for all tags, and the padding of the vector is not."""
    e, pairs = torch.randn(1, 3, 4), torch.randn(4, 4)
    e[0, at, 2] = torch.nan
    e.requires_grad_()
    log_z = in_triton("crf_log_partition")(e, pairs)
    assert log_z.isnan().all()
    assert torch.autograd.grad(log_z.sum(), e)[0].isnan().all()
    pairs[0, 1], start = torch.inf, torch.tensor([-torch.inf, 0, 0, 0])  # from a tag that no path reaches
    for scores in ((e, torch.zeros(4, 4)), (torch.zeros(1, 2, 4), pairs, start)):
        assert all(in_triton("crf_viterbi")(*scores, nbest=nbest)[1].isnan().all() for nbest in (None, 2))


@pytest.mark.parametrize("pairs", ["", "BT"])
def test_bits_do_not_depend_on_batch_and_padding(pairs: str) -> None:
    case, n = Case(why="company", B=2, T=5, K=5, lengths=(5, 3), pairs=pairs), 3
    given = make(case, torch.float32)
    tags, weights = tags_of(case, given["transitions"]), torch.ones(2, 2, dtype=f64)
    whole, best = run(ours(tags), given, weights), in_triton("crf_viterbi")
    alone = given | dict(emissions=given["emissions"][1:, :n], lengths=None)
    if pairs:
        alone["transitions"] = given["transitions"][1:, :n]
    found = run(ours(tags[1:, :n]), alone, weights[:, 1:])
    for name in ("result 0", "result 1"):
        assert torch.equal(found[name][0], whole[name][1])
    for name in ("demissions", *["dtransitions"] * bool(pairs)):
        assert torch.equal(found[name][0], whole[name][1, :n])
    for nbest in (None, 2):
        for a, b in zip(best(**alone, nbest=nbest), best(**given, nbest=nbest)):
            assert torch.equal(a[0], b[1][..., :n] if b.dtype == torch.int64 else b[1])  # tags, scores


# ---- gradients and tools

TINY = Case(why="tiny", B=1, T=2, K=2)


def test_gradcheck_and_gradgradcheck() -> None:
    given = make(TINY)
    scores = [given.pop(n).requires_grad_() for n in SCORES]
    tags = tags_of(TINY, scores[1])

    def likelihood(*scores: Tensor) -> Tensor:
        return in_triton("crf_log_likelihood")(scores[0], tags, *scores[1:], reduction="none")

    def marginals(*scores: Tensor) -> tuple[Tensor, ...]:
        return in_triton("crf_marginals")(*scores)

    assert torch.autograd.gradcheck(likelihood, scores, check_forward_ad=True)
    assert torch.autograd.gradcheck(marginals, scores)
    assert torch.autograd.gradgradcheck(likelihood, scores)


def test_opcheck(raw_memory: None) -> None:
    given = make(dataclasses.replace(TINY, T=3, mask=True))
    tensors = [four(t) if n == "transitions" else t for n, t in given.items()]
    tensors = [None if t is None else t.to(DEVICE) for t in tensors]
    tags = torch.ones(1, 3, dtype=torch.int64, device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.crf_viterbi.default, (*tensors, 2), test_utils=checks[:2])
    log_z, score, alpha = ops.crf_forward(*tensors, tags)
    upstream = torch.randn_like(log_z), torch.randn_like(score)
    torch.library.opcheck(ops.crf_backward.default, (*upstream, *tensors, tags, alpha), test_utils=checks)
    tensors = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in tensors]
    torch.library.opcheck(ops.crf_forward.default, (*tensors, tags), test_utils=checks)


def test_transforms_and_compile() -> None:
    e, pairs = torch.randn(2, 2, 3, device=DEVICE), torch.randn(3, 3, device=DEVICE)

    def log_z(e: Tensor) -> Tensor:
        return functional.crf_log_partition(e, pairs, backend="triton").sum()

    want = torch.autograd.functional.jacobian(log_z, e)
    close(torch.vmap(torch.func.grad(log_z))(e), want)
    close(torch.vmap(log_z)(e).sum(), log_z(e))
    e.requires_grad_()
    compiled = torch.compile(log_z, fullgraph=True, backend="aot_eager")(e)
    close(torch.autograd.grad(compiled, e)[0], want)


# ---- dispatch and errors

E, M = torch.zeros(2, 3, 4), torch.zeros(4, 4)
Y = torch.zeros(2, 3, dtype=torch.int64)
ERRORS: dict[str, tuple[Callable, type[Exception], str]] = {
    "too long": (lambda f: f("partition")(E, M, lengths=[3, 4]), ValueError, "lengths must be between 0 and 3, got 4"),
    "negative": (lambda f: f("partition")(E, M, lengths=[3, -1]), ValueError, "lengths must be between 0 and 3"),
    "tag": (lambda f: f("likelihood")(E, Y + 4, M), ValueError, "tags must be between 0 and 3, got 4 at step 0"),
    "dtype": (lambda f: f("partition")(E.int(), M), NotImplementedError, "backend triton cannot run this call: dtype"),
    "tags": (
        lambda f: f("partition")(torch.zeros(1, 1, 5000), torch.zeros(1).expand(5000, 5000)),
        NotImplementedError,
        "support from 1 to 4096 tags, got 5000",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU, values raise with SEQKERNELS_CHECKED only")
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call(lambda name: in_triton(f"crf_log_{name}"))


def test_op_errors() -> None:
    """The ops check what would be read or written outside memory."""
    e, m, y, v = E.to(DEVICE), M[None, None].to(DEVICE), Y.to(DEVICE), torch.zeros(4, device=DEVICE)
    for call, message in (
        (lambda: ops.crf_forward(e[0], m, *[None] * 5), "emissions must have 3 dimensions"),
        (lambda: ops.crf_forward(e.int(), m, *[None] * 5), "emissions must be torch.float64, torch.float32"),
        (lambda: ops.crf_forward(e, m[0], *[None] * 5), r"transitions must have shape \[2 or 1, 3 or 1, 4, 4\]"),
        (lambda: ops.crf_forward(e, m.double(), *[None] * 5), "transitions must be float32"),
        (lambda: ops.crf_forward(e, m, v[1:], *[None] * 4), "start_transitions must have shape"),
        (lambda: ops.crf_forward(e, m, None, None, y[:, 0], y.bool(), None), "must not be given together"),
        (lambda: ops.crf_forward(e, m, *[None] * 4, y[1:]), "tags must have shape"),
        (lambda: ops.crf_backward(v[:2].double(), v[:2], e, m, *[None] * 5, e), "dscore must be float64"),
        (lambda: ops.crf_backward(v[:2].double(), v[:2].double(), e, m, *[None] * 5, e[1:]), "alpha must have shape"),
        (lambda: ops.crf_viterbi(e, m, *[None] * 4, 0), "paths must be at least 1"),
        (lambda: ops.crf_viterbi(e, m, *[None] * 4, 1 << 40), "paths must be fewer"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_values_out_of_range_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without checks, lengths are clamped, and nothing is read or written for a tag out of range."""
    monkeypatch.setattr(launch.Call, "_check_values", lambda *_: None)
    e, pairs, tags = torch.randn(2, 3, 4), torch.randn(4, 4), torch.tensor([[0, 1, 2], [0, 2**40, -7]])
    likelihood, log_z = in_triton("crf_log_likelihood"), in_triton("crf_log_partition")
    found = likelihood(e, tags, pairs, reduction="none")
    assert found[0].isfinite() and found[1].isnan()
    assert torch.equal(log_z(e, pairs, lengths=[9, -9])[:1], log_z(e[:1], pairs))
    e.requires_grad_()
    likelihood(e, tags, pairs).backward()
    assert e.grad.isfinite().all()


def test_triton_is_selected_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    request = backend.Request(torch.device("cuda"), torch.float32)
    assert backend.choose("it", backend.CRF, request) == "triton"
    assert backend.choose("it", backend.CRF, request._replace(device=torch.device("cpu"))) == "cpu"
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"cpu: the tensors are on cuda\. triton: triton is not installed"):
        backend.choose("it", backend.CRF, request)


def test_explain() -> None:
    found = seqkernels.explain("crf_log_partition", B=3, T=8, K=20, device="cuda")
    assert found == dict(
        op="crf_log_partition", kernel="triton", grid=(3,), warps=1, tile=(32, 32), resident=True,
        unsupported={"cpu": ["the tensors are on cuda"]},
    )  # fmt: skip
    wide = seqkernels.explain("crf_log_likelihood", B=3, T=8, K=300, device="cuda")
    assert wide["tile"] == (512, 32) and not wide["resident"]
    by_step = seqkernels.explain("crf_viterbi", B=3, T=8, K=20, by_step=True, device="cuda")
    assert by_step["tile"] == (32, 32) and not by_step["resident"]
    several = seqkernels.explain("crf_viterbi", B=3, T=8, K=20, nbest=2, device="cuda")
    assert several["warps"] == 4 and not several["resident"]
    entropy = seqkernels.explain("crf_entropy", B=3, T=8, K=32, dtype=torch.float16, device="cuda")
    assert entropy["warps"] == 4  # in float64
    on_cpu = seqkernels.explain("crf_log_partition", B=3, T=8, K=20)
    assert on_cpu["kernel"] == "cpu" and on_cpu["isa"] == seqkernels.build_info()["isa"]
    assert on_cpu["unsupported"] == {"triton": ["the tensors are on cpu"]}
