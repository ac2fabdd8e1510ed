"""ctc_loss and CTCLoss: all alignments, torch, the definition; gradients, bits, extremes, errors, tools."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given as drawn
from hypothesis import strategies as st
from torch import Tensor

from seqkernels import explain, nn
from seqkernels.functional import ctc_loss
from seqkernels.reference.ctc import ctc_loss as definition
from support.cases import DTYPES
from support.fuzzing import bounded

ops = torch.ops.seqkernels
close = torch.testing.assert_close
f64 = torch.float64
TOLERANCE = {f64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """steps, labels: lengths of the sequences; T and S by default."""

    why: str
    T: int = 12
    N: int = 3
    C: int = 5
    S: int = 4
    steps: tuple[int, ...] | None = None
    labels: tuple[int, ...] | None = None
    blank: int = 0
    scale: float = 1.0
    concatenated: bool = False
    repeated: bool = False

    def __str__(self) -> str:
        return self.why.replace(" ", "-")


CASES = [
    Case(why="plain"),
    Case(why="one of everything", T=1, N=1, C=2, S=1),
    Case(why="only blanks", S=0),
    Case(why="no sequence", N=0),
    Case(why="lengths", N=4, steps=(12, 5, 9, 0), labels=(4, 0, 3, 0)),
    Case(why="targets one after the other", labels=(4, 1, 2), concatenated=True),
    Case(why="blank in the middle", blank=2),
    Case(why="repeated labels", T=20, S=9, repeated=True),
    Case(why="whole vectors", T=30, S=16, C=16),
    Case(why="many labels", T=130, N=2, S=60, C=40, steps=(130, 125), labels=(60, 57)),
    Case(why="exactly as many steps as needed", T=4, S=4, C=9),
    Case(why="large scores", scale=15.0, T=30),
]


def make(case: Case, dtype: torch.dtype = f64, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    logits = case.scale * torch.randn(case.T, case.N, case.C, generator=g, dtype=f64)
    classes = torch.tensor([c for c in range(case.C) if c != case.blank])
    targets = classes[torch.randint(case.C - 1, (case.N, case.S), generator=g)]
    if case.repeated:
        targets[:, 1::2] = targets[:, :-1:2]
    if case.why.startswith("exactly"):
        targets = classes[: case.S].expand(case.N, -1).contiguous()
    labels = torch.tensor(case.labels if case.labels is not None else [case.S] * case.N, dtype=torch.int64)
    if case.concatenated:
        targets = torch.cat([row[:n] for row, n in zip(targets, labels.tolist())])
    steps = torch.tensor(case.steps if case.steps is not None else [case.T] * case.N, dtype=torch.int64)
    log_probs = logits.to(dtype).float().log_softmax(2) if dtype != f64 else logits.log_softmax(2)
    return dict(log_probs=log_probs.to(dtype), targets=targets, input_lengths=steps, target_lengths=labels)


def run(function: Callable, given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of its weighted sum."""
    leaf = given["log_probs"].detach().requires_grad_()
    loss = function(**(given | dict(log_probs=leaf)), **more)
    weights = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1), dtype=f64).to(loss.dtype)
    return loss.detach(), torch.autograd.grad((loss * weights).sum(), leaf)[0]


def check(case: Case, dtype: torch.dtype, seed: int = 0) -> None:
    """Asserts that losses and gradients match the reference."""
    given = make(case, dtype, seed)
    wide = given | dict(log_probs=given["log_probs"].double())
    got = run(ctc_loss, given, blank=case.blank, reduction="none")
    want = run(definition, wide, blank=case.blank)
    assert got[0].dtype == (f64 if dtype == f64 else torch.float32) and got[1].dtype == dtype
    tolerance = TOLERANCE[f64 if dtype == f64 else torch.float32]
    close(got[0].double(), want[0], rtol=tolerance, atol=tolerance)
    close(got[1].double(), want[1], rtol=0, atol=TOLERANCE[dtype] * max(case.scale / 3, 1))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_losses_and_gradients_match_the_reference(case: Case, dtype: torch.dtype, isa: str) -> None:
    check(case, dtype)


@st.composite
def random_cases(draw: st.DrawFn) -> Case:
    """Sequences with at least two steps per label, so that an alignment exists."""
    N, T, C = draw(st.integers(0, 5)), draw(st.integers(1, 20)), draw(st.sampled_from([2, 3, 8, 17, 33]))
    steps = draw(st.tuples(*[st.integers(0, T)] * N))
    return Case(
        why="random", T=T, N=N, C=C, S=T // 2, steps=steps, blank=draw(st.integers(0, C - 1)),
        labels=tuple(draw(st.integers(0, n // 2)) for n in steps), scale=draw(st.sampled_from([1.0, 15.0])),
        concatenated=draw(st.booleans()) and N > 0, repeated=draw(st.booleans()) and T >= 4,
    )  # fmt: skip


@bounded(examples=40)
@drawn(case=random_cases(), dtype=st.sampled_from([f64, torch.float32]), seed=st.integers(0, 99))
def test_random_targets_match_the_reference(case: Case, dtype: torch.dtype, seed: int) -> None:
    check(case, dtype, seed)


@pytest.mark.parametrize("case", [c for c in CASES if c.N], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [f64, torch.float32], ids=str)
def test_torch(case: Case, reduction: str, dtype: torch.dtype) -> None:
    given = make(case, dtype)
    got, want = (run(f, given, blank=case.blank, reduction=reduction) for f in (ctc_loss, F.ctc_loss))
    assert got[0].dtype == want[0].dtype
    close(got, want, rtol=1e-4, atol=1e-4) if dtype == torch.float32 else close(got, want)  # of torch's error


def test_all_alignments_of_small_cases(isa: str) -> None:
    T, C = 5, 3
    log_probs = torch.randn(T, 1, C, dtype=f64).log_softmax(2)
    sums: dict[tuple[int, ...], Tensor] = {}
    for path in itertools.product(range(C), repeat=T):
        target = tuple(c for c, _ in itertools.groupby(path) if c != 0)
        probability = log_probs[range(T), 0, list(path)].sum().exp()
        sums[target] = sums.get(target, torch.zeros((), dtype=f64)) + probability
    close(torch.stack(list(sums.values())).sum(), torch.ones((), dtype=f64))
    for target, total in sums.items():
        loss = ctc_loss(log_probs, torch.tensor([target], dtype=torch.int64), [T], [len(target)], reduction="none")
        close(loss[0], -total.log())


def test_targets_without_an_alignment(isa: str) -> None:
    log_probs = torch.randn(3, 2, 4).log_softmax(2)
    given = dict(
        log_probs=log_probs, targets=torch.tensor([[1, 1], [2, 3]]), input_lengths=[2, 3], target_lengths=[2, 2]
    )
    loss, grad = run(ctc_loss, given, reduction="none")
    assert loss[0] == torch.inf and loss[1].isfinite()
    theirs = {n: torch.tensor(v) if isinstance(v, list) else v for n, v in given.items()}
    want = run(F.ctc_loss, theirs, reduction="none")
    close((loss, grad), want, equal_nan=True)
    zero = run(ctc_loss, given, reduction="none", zero_infinity=True)
    close(zero, run(F.ctc_loss, theirs, reduction="none", zero_infinity=True))
    assert zero[0][0] == 0 and not zero[1][:, 0].any() and zero[1].isfinite().all()
    empty = ctc_loss(log_probs, torch.zeros(2, 1, dtype=torch.int64), [0, 0], [0, 1], reduction="none")
    assert empty.tolist() == [0, torch.inf]


def test_lengths_of_any_kind() -> None:
    given = make(CASES[4], torch.float32)
    want = ctc_loss(**given)
    for kind in (
        lambda n: n.tolist(),
        lambda n: n.numpy(),
        list,
        lambda n: n.to(torch.uint8),
        lambda n: n.int(),
    ):
        names = ("input_lengths", "target_lengths")
        assert torch.equal(ctc_loss(**(given | {name: kind(given[name]) for name in names})), want)


def test_padding_is_not_read(isa: str) -> None:
    case = CASES[4]
    given = make(case, torch.float32)
    clean = run(ctc_loss, given, reduction="none")
    for b, n in enumerate(case.steps):
        given["log_probs"][n:, b] = torch.nan
        given["targets"][b, case.labels[b] :] = 99
    got = run(ctc_loss, given, reduction="none")
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1], clean[1])
    given["log_probs"][1, 0, 3] = torch.nan
    loss = ctc_loss(**given, reduction="none")
    assert loss[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_batch_padding_or_threads(dtype: torch.dtype, isa: str) -> None:
    case = Case(
        why="company", T=60, N=7, C=11, S=20, steps=(60, 50, 33, 41, 12, 60, 9), labels=(20, 11, 0, 20, 4, 7, 1)
    )
    given, whole = make(case, dtype), {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        whole[threads] = run(lambda **g: ctc_loss(**g, reduction="none").square(), given)
    for threads in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(whole[1], whole[threads]))
    for b, (n, count) in enumerate(zip(case.steps, case.labels)):
        loss = ctc_loss(given["log_probs"][:n, b], given["targets"][b, :count], n, count, reduction="none")
        assert torch.equal(loss.square(), whole[1][0][b])


def test_long_sequences_are_accurate() -> None:
    logits = 3 * torch.randn(20_000, 1, 4, dtype=f64)
    targets = torch.randint(1, 4, (1, 3000))
    wide = ctc_loss(logits.log_softmax(2), targets, [20_000], [3000])
    lengths = torch.tensor([20_000]), torch.tensor([3000])
    got, torchs = (f(logits.log_softmax(2).float(), targets, *lengths).double() for f in (ctc_loss, F.ctc_loss))
    assert (got - wide).abs() <= (torchs - wide).abs()


def test_gradcheck_and_gradgradcheck() -> None:
    for case in (Case(why="plain", T=4, N=2, C=3, S=2, steps=(4, 3), labels=(2, 1)),):
        given = make(case)
        logits = given.pop("log_probs").requires_grad_()

        def loss(logits: Tensor, given: dict[str, Any] = given) -> Tensor:
            return ctc_loss(logits.log_softmax(2), **given, reduction="none")

        assert torch.autograd.gradcheck(loss, logits, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(loss, logits)


def test_opcheck(raw_memory: None) -> None:
    for case in (CASES[4], CASES[5]):
        given = make(case)
        arguments = (*given.values(), case.blank, 1, True)
        given["log_probs"].requires_grad_()
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(ops.ctc_loss_forward.default, arguments, test_utils=checks)
        with torch.no_grad():
            loss, *saved = ops.ctc_loss_forward(*arguments)
        plain = (given["log_probs"].detach(), *arguments[1:])
        upstream = torch.ones_like(loss)
        torch.library.opcheck(ops.ctc_loss_backward.default, (upstream, *plain, *saved), test_utils=checks)


def test_transforms() -> None:
    given = make(Case(why="plain", N=2))
    log_probs, targets = given["log_probs"], given["targets"]

    def loss(log_probs: Tensor, targets: Tensor) -> Tensor:
        return ctc_loss(log_probs.log_softmax(1), targets, 12, 4, reduction="none")

    want = ctc_loss(log_probs.log_softmax(2), targets, [12, 12], [4, 4], reduction="none")
    close(torch.func.vmap(loss, (1, 0))(log_probs, targets), want)
    per_sample = torch.func.vmap(torch.func.grad(loss), (1, 0), 1)(log_probs, targets)
    close(per_sample[:, 1], torch.func.grad(loss)(log_probs[:, 1], targets[1]))


def test_strides() -> None:
    given = make(CASES[0])
    want = ctc_loss(**given)
    for view in (
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
        lambda t: torch.stack([t, t], -1)[..., 1],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        moved = {n: view(t) if t.dim() > 1 else t for n, t in given.items()}
        assert torch.equal(ctc_loss(**moved), want)


def test_compile_export_and_meta() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.loss = torch.nn.Linear(6, 5), nn.CTCLoss()

        def forward(self, x: Tensor, targets: Tensor, steps: Tensor, labels: Tensor) -> Tensor:
            return self.loss(self.linear(x).log_softmax(2), targets, steps, labels)

    model, given = Model(), make(CASES[0], torch.float32)
    inputs = torch.randn(12, 3, 6), *list(given.values())[1:]
    want = model(*inputs)
    want.backward()
    grad = model.linear.weight.grad.clone()
    model.zero_grad()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    got.backward()
    close(got, want)
    close(model.linear.weight.grad, grad)
    close(torch.export.export(model, inputs).module()(*inputs), want)
    flat = inputs[0], inputs[1].flatten(), *inputs[2:]
    close(torch.compile(model, fullgraph=True, backend="aot_eager")(*flat), want)
    for given in (inputs, flat):
        loss = model.to("meta")(*(t.to("meta") for t in given))
        assert loss.shape == () and loss.is_meta


def test_explain() -> None:
    assert explain("ctc_loss", T=5, B=2, K=7)["kernel"] == "cpu"
    with pytest.raises(NotImplementedError, match="no backend supports log_probs"):
        explain("ctc_loss", T=5, B=2, K=7, device="cuda")


def test_module() -> None:
    given = make(CASES[0], torch.float32)
    module = nn.CTCLoss(blank=1, reduction="sum", zero_infinity=True)
    assert isinstance(module, torch.nn.CTCLoss) and repr(module) == repr(torch.nn.CTCLoss(1, "sum", True))
    given["targets"][given["targets"] == 1] = 0
    theirs = torch.nn.CTCLoss(1, "sum", True)
    close(copy.deepcopy(module)(**given), theirs(**given))
    single = given["log_probs"][:, 0], given["targets"][0], torch.tensor(12), torch.tensor(4)
    close(module(*single), theirs(*single))
    assert nn.CTCLoss(reduction="none")(*single).shape == ()
    with pytest.raises(NotImplementedError, match=r"torch\.jit\.script"):
        torch.jit.script(module)


P, Y, N12, L4 = torch.zeros(12, 3, 5), torch.ones(3, 4, dtype=torch.int64), [12] * 3, [4] * 3
LENGTHS = torch.tensor(N12)
# Mistakes for which torch raises RuntimeError raise a RuntimeError here too.
ERRORS: dict[str, tuple[Callable, type[Exception], str]] = {
    "a list": (lambda: ctc_loss([1.0], Y, N12, L4), TypeError, "log_probs must be a tensor, got a list"),
    "targets": (lambda: ctc_loss(P, [1], N12, L4), TypeError, "targets must be a tensor, got a list"),
    "integers": (lambda: ctc_loss(P.int(), Y, N12, L4), NotImplementedError, "no backend supports log_probs"),
    "shape": (lambda: ctc_loss(P[0, 0], Y, N12, L4), RuntimeError, r"log_probs must have shape \[T, N, C\]"),
    "targets' shape": (lambda: ctc_loss(P, Y[None], N12, L4), RuntimeError, r"targets must have shape \[N, S\]"),
    "targets' rows": (lambda: ctc_loss(P, Y[1:], N12, L4), RuntimeError, "targets must have shape"),
    "targets' dtype": (lambda: ctc_loss(P, Y.bool(), N12, L4), TypeError, "targets must be integers, got torch.bool"),
    "too few": (lambda: ctc_loss(P, Y.flatten()[1:], N12, L4), RuntimeError, "target_lengths must be between 0 and"),
    "too many": (lambda: ctc_loss(P, Y.flatten(), N12, [4, 4, 3]), RuntimeError, "targets must have as many labels as"),
    "label": (lambda: ctc_loss(P, Y + 4, N12, L4), ValueError, "targets must be between 0 and 4, got 5 in sequence 0"),
    "steps": (lambda: ctc_loss(P, Y, [12, 13, 1], L4), ValueError, "input_lengths must be between 0 and 12, got 13"),
    "negative": (lambda: ctc_loss(P, Y, [12, -1, 1], L4), ValueError, "input_lengths must be between 0 and 12, got -1"),
    "labels": (lambda: ctc_loss(P, Y, N12, [4, 5, 1]), ValueError, "target_lengths must be between 0 and the columns"),
    "count": (lambda: ctc_loss(P, Y, N12[1:], L4), ValueError, r"input_lengths must have shape \[N\] = \[3\]"),
    "fractions": (lambda: ctc_loss(P, Y, LENGTHS.float(), L4), RuntimeError, "input_lengths must be int32 or int64"),
    "a number": (lambda: ctc_loss(P, Y, N12, 4), TypeError, "target_lengths must be a tensor or a sequence of int"),
    "blank": (lambda: ctc_loss(P, Y, N12, L4, 5), RuntimeError, "blank must be between 0 and 4, got 5"),
    "reduction": (lambda: ctc_loss(P, Y, N12, L4, 0, "max"), ValueError, "reduction must be none, mean or sum"),
    "blank's type": (lambda: ctc_loss(P, Y, N12, L4, None), TypeError, "blank must be an int, got None"),
    "zero_infinity": (lambda: ctc_loss(P, Y, N12, L4, zero_infinity="a"), TypeError, "zero_infinity must be a bool"),
    "no classes": (lambda: ctc_loss(P[:, :, :0], Y, N12, L4), ValueError, "log_probs must have shape"),
    "backend": (lambda: ctc_loss(P, Y, N12, L4, backend="cuda"), ValueError, "backend must be None, cpu, got 'cuda'"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()


def test_op_errors() -> None:
    """The ops check what would be read or written outside memory."""
    labels, alpha = torch.tensor(L4), torch.zeros(3, 12, 9)
    d, f = torch.zeros(3, dtype=f64), torch.zeros(3)
    for call, message in (
        (lambda: ops.ctc_loss_forward(P[0], Y, LENGTHS, labels, 0, 0, False), "log_probs must have 3 dimensions"),
        (lambda: ops.ctc_loss_forward(P, Y.int(), LENGTHS, labels, 0, 0, False), "targets must be int64"),
        (lambda: ops.ctc_loss_forward(P, Y, LENGTHS[1:], labels, 0, 0, False), "input_lengths must have shape"),
        (lambda: ops.ctc_loss_forward(P, Y, LENGTHS, labels + 1, 0, 0, False), "target_lengths must be between"),
        (lambda: ops.ctc_loss_forward(P, Y, LENGTHS, labels, 5, 0, False), "blank must be between"),
        (lambda: ops.ctc_loss_backward(f[1:], P, Y, LENGTHS, labels, 0, 0, False, d, alpha), "dloss must have shape"),
        (lambda: ops.ctc_loss_backward(f, P, Y, LENGTHS, labels, 0, 0, False, d, alpha[1:]), "alpha must have shape"),
        (lambda: ops.ctc_loss_backward(f, P, Y, LENGTHS, labels, 0, 0, False, d[1:], alpha), "losses must have shape"),
        (lambda: ops.ctc_loss_forward(P, Y, LENGTHS, labels, 0, 3, False), "reduction must be 0, 1 or 2, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
