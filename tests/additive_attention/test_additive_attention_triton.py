"""Triton kernels of additive attention against the float64 reference: interpreted, or on a GPU if there is one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from additive_attention.cases import CASES, NAMES, TOLERANCE, Case, assert_near, make, ours, run
from seqkernels import reference
from support.triton_on_cpu import DEVICE, load, on_hardware

launch = load("additive_attention.launch")
ops = torch.ops.seqkernels_triton
# The interpreter uses numpy, which warns about overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def on_device(given: dict[str, Any]) -> dict[str, Any]:
    return {n: t if t is None else t.to(DEVICE) for n, t in given.items()} | dict(backend="triton")


@on_hardware
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_results_and_gradients_match_the_reference(case: Case, dtype: torch.dtype) -> None:
    if DEVICE == "cpu" and case.Tk > 100:  # the interpreter takes seconds
        case = dataclasses.replace(case, B=1, Tq=2, Tk=130)
    if DEVICE == "cpu" and case.Tq > 50:
        case = dataclasses.replace(case, Tq=18)
    given = make(case, dtype)
    wide = {n: t.double() if n in NAMES else t for n, t in given.items()}
    got = {n: t.cpu() for n, t in run(ours, on_device(given)).items()}
    assert got["result 0"].dtype == dtype
    assert_near(got, run(reference.additive_attention, wide), TOLERANCE[dtype] * max(case.scale, 1.0))


@on_hardware
def test_bits_do_not_depend_on_the_batch_or_padding() -> None:
    case = Case(why="company", B=3, Tq=9, Tk=20, H=34, Dv=24, lengths=(20, 8, 1), large=25.0)
    given = on_device(make(case, torch.float32))
    whole = run(ours, given)
    for b, n in enumerate(case.lengths):
        alone = {k: t[b : b + 1] for k, t in given.items() if k in NAMES[:3]} | dict(v=given["v"], backend="triton")
        alone |= {k: alone[k][:, :n] for k in ("key", "value")}
        out, weights = ours(**alone)
        assert torch.equal(out[0], whole["result 0"][b])
        assert torch.equal(weights[0], whole["result 1"][b, :, :n])


@on_hardware
def test_nan_in_padding_and_hidden_keys_reaches_nothing() -> None:
    given = on_device(make(Case(why="hidden", B=3, lengths=(5, 3, 0), mask="B1K"), torch.float32))
    given["mask"][:, :, 0] = False
    clean = run(ours, given)
    for b, n in enumerate(given["lengths"].tolist()):
        for name in ("key", "value"):
            given[name][b, n:] = torch.nan
            given[name][b, 0] = torch.nan
    got = run(ours, given)
    for name, want in clean.items():
        torch.testing.assert_close(got[name], want, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


@on_hardware
def test_second_derivatives_and_tools() -> None:
    given = on_device(make(Case(why="plain", B=1, Tq=2, Tk=2, H=2, Dv=1)))
    leaves = [given.pop(n).requires_grad_() for n in NAMES]

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ours(*tensors, **given)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
    plain = [t.detach() for t in leaves]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.additive_attention_forward.default, (*leaves, None, None, None), test_utils=checks)
    out, weights = ops.additive_attention_forward(*plain, None, None, None)
    arguments = (torch.ones_like(out), None, *plain, None, None, weights)
    torch.library.opcheck(ops.additive_attention_backward.default, arguments, test_utils=checks)


def test_tiles() -> None:
    for rows in (0, 1, 2, 5, 8, 100):
        for float64 in (False, True):
            tile = launch.pair_tile(rows, float64)
            assert tile.BM * tile.BN * tile.columns == (2048 if float64 else 4096) and tile.BM <= 8
