"""Triton kernels of attention against the float64 reference: interpreted, or on a GPU if there is one."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as given_drawn
from hypothesis import strategies as st
from torch import Tensor

from support.triton_on_cpu import DEVICE, load, on_hardware

attention = load("attention")
configurations = load("attention.configurations")
reference = importlib.import_module("seqkernels.reference.attention")  # the package exports a function of the same name
# The interpreter uses numpy, which warns about overflow and NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Tolerance relative to the largest element, for sums of some hundred terms and exponentials of scores up to 10.
SLACK = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclasses.dataclass(frozen=True)
class Case:
    why: str
    B: int = 2
    H: int = 1
    G: int = 1
    Tq: int = 20
    Tk: int = 40
    D: int = 16
    Dv: int = 16
    q_lengths: tuple[int, ...] | None = None  # [B] lengths of sequences, also if packed
    k_lengths: tuple[int, ...] | None = None
    packed: bool = False
    mask: str = ""  # bool or float, followed by its full dimensions: "float bhqk"
    slopes: str = ""  # h or bh
    scale: float = 0.3
    causal: int = 0
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0

    def __str__(self) -> str:
        return re.sub(r"\W+", "-", self.why)


CASES = [
    Case("plain"),
    Case("one row", Tq=1, Tk=5, D=8, Dv=8),
    Case("a tail in each dimension", Tq=67, Tk=35, D=20, Dv=9),
    Case("several blocks of each", B=1, Tq=130, Tk=130),
    Case("grouped heads", B=1, H=6, G=3),
    Case("causal", B=1, Tq=100, Tk=100, causal=1),
    Case("causal, fewer rows than keys", causal=1),
    Case("causal, more rows than keys", Tq=72, Tk=33, causal=1),
    Case("lower right, fewer rows", causal=2),
    Case("lower right, more rows, some without keys", B=1, Tq=90, Tk=40, causal=2),
    Case("window", B=1, Tq=130, Tk=130, window_left=40, window_right=3),
    Case("window on the left only", B=1, Tq=90, Tk=110, window_left=10),
    Case("causal window, lower right", B=1, Tq=80, Tk=120, causal=2, window_left=33),
    Case("causal and a window on the right", B=1, Tq=70, Tk=70, causal=1, window_right=7, window_left=0),
    Case("window before the last rows", B=1, Tq=90, Tk=20, window_left=3),
    Case("lengths", B=4, q_lengths=(20, 0, 17, 3), k_lengths=(40, 5, 0, 33)),
    Case("lengths, lower right, grouped", B=3, H=2, G=2, q_lengths=(20, 13, 8), k_lengths=(40, 5, 20), causal=2),
    Case("lengths of keys", B=3, k_lengths=(40, 1, 32), D=32),
    Case("packed", B=4, q_lengths=(3, 0, 66, 9), k_lengths=(5, 4, 36, 0), packed=True, D=24),
    Case("packed, causal, grouped", B=3, H=2, G=2, q_lengths=(70, 1, 33), k_lengths=(70, 1, 33), packed=True, causal=1),
    Case("packed, window", q_lengths=(9, 70), k_lengths=(40, 71), packed=True, causal=2, window_left=20),
    Case("bool mask", mask="bool bhqk", H=2),
    Case("bool mask of keys", mask="bool bk", B=3),
    Case("float mask", mask="float bhqk", B=1, H=2, Tq=67),
    Case("float mask of all samples", mask="float hqk", H=2),
    Case("float mask of all heads", mask="float bqk", H=2),
    Case("float mask of keys", mask="float bk", Tq=40),
    Case("float mask of rows", mask="float hq", causal=1),
    Case("float mask of one number", mask="float "),
    Case("float mask, causal, lengths", mask="float qk", causal=1, k_lengths=(37, 9), Tq=39),
    Case("softcap", softcap=0.7),
    Case("softcap with a mask", softcap=5.0, mask="float qk", scale=3.0),
    Case("alibi", slopes="h", H=2, causal=1),
    Case("alibi of every sample", slopes="bh", causal=2, H=2, G=2),
    Case("dropout", dropout_p=0.3),
    Case("dropout of most", dropout_p=0.9, Tq=40, causal=1),
    Case("dropout, packed, grouped", H=2, G=2, q_lengths=(30, 3), k_lengths=(20, 33), packed=True, dropout_p=0.2),
    Case("dropout of all", dropout_p=1.0, Tq=3, Tk=7),
    Case("all at once", mask="float hqk", H=2, G=2, slopes="h", softcap=2.0, dropout_p=0.25, causal=2, window_left=30),
    Case("negative scale", scale=-0.4, causal=1),
    Case("scale 0", scale=0.0, causal=1),
    Case("no keys", Tk=0),
    Case("no rows", Tq=0),
    Case("wide values", B=1, Dv=70),
    Case("wide keys", B=1, D=70),
]
SOME = [case for case in CASES if case.why in ("a tail in each dimension", "packed, causal, grouped", "all at once")]
# Heads that are read in chunks of columns, with a limit of 16 columns for whole heads.
CHUNKED = [
    Case("wide", Tq=70, D=40, Dv=50),
    Case("wide keys only, causal", B=1, Tq=35, Tk=35, D=50, Dv=9, causal=1),
    Case("wide values only, window", B=1, H=2, G=2, D=8, Dv=33, causal=2, window_left=5),
    Case("wide, lengths", q_lengths=(20, 3), k_lengths=(33, 40), D=48, Dv=17),
    Case("wide, packed", H=2, G=2, q_lengths=(9, 35), k_lengths=(9, 35), packed=True, causal=1, D=33, Dv=33),
    Case("wide, a bias", B=1, H=2, mask="float bhqk", D=35, Dv=39, slopes="h", softcap=3.0),
    Case("wide, a bias of keys", mask="float bk", D=35, Dv=16, dropout_p=0.3),
    Case("wide, a bool mask", mask="bool bqk", D=16, Dv=35, dropout_p=0.3),
    Case("wide, a negative scale", B=1, D=64, Dv=64, scale=-0.1),
]
# Wide heads in float32 and half types; the limit is lower in float64.
WIDE = [
    Case("520 columns", B=1, Tq=9, Tk=17, D=520, Dv=520, scale=0.04),
    Case("600 columns of keys", B=1, Tq=9, Tk=17, D=600, Dv=8, scale=0.04, causal=2, mask="float qk"),
    Case("530 columns of values", B=1, H=2, G=2, Tq=9, Tk=17, D=8, Dv=530, q_lengths=(7,), k_lengths=(12,)),
]
# For a GPU only: all tile sizes, and wide heads.
LARGE = [
    Case("blocks of D 64", H=4, Tq=300, Tk=500, D=64, Dv=64),
    Case("causal, D 128", H=2, Tq=512, Tk=512, D=128, Dv=128, causal=1),
    Case("causal, grouped, D 64", H=8, G=4, Tq=384, Tk=384, D=64, Dv=64, causal=1),
    Case("lower right, D 128", H=2, Tq=130, Tk=700, D=128, Dv=128, causal=2),
    Case("window, D 128", H=2, Tq=600, Tk=600, D=128, Dv=128, causal=1, window_left=100),
    Case("lengths, D 64", B=3, H=2, Tq=400, Tk=400, D=64, Dv=64, q_lengths=(400, 77, 0), k_lengths=(400, 77, 5)),
    Case("packed, D 128", B=3, H=4, G=2, D=128, Dv=128, q_lengths=(300, 1, 150), k_lengths=(300, 1, 150), packed=True),
    Case("float mask, D 64", H=2, Tq=300, Tk=300, D=64, Dv=64, mask="float bhqk"),
    Case("float mask of all samples, D 128", H=2, Tq=300, Tk=300, D=128, Dv=128, mask="float hqk", causal=1),
    Case("float mask of keys, D 64", H=2, Tq=300, Tk=300, D=64, Dv=64, mask="float bk"),
    Case("dropout, D 128", H=2, Tq=300, Tk=300, D=128, Dv=128, dropout_p=0.1, causal=1),
    Case("dropout, D 64", H=2, Tq=300, Tk=300, D=64, Dv=64, dropout_p=0.1),
    Case("alibi and softcap, D 128", H=2, Tq=300, Tk=300, D=128, Dv=128, slopes="h", softcap=3.0, causal=1),
    Case("odd sizes", H=3, Tq=257, Tk=259, D=80, Dv=96, causal=1),
    Case("D 256", H=2, Tq=200, Tk=300, D=256, Dv=256, causal=1, scale=0.06),
    Case("different head sizes", H=2, Tq=200, Tk=300, D=192, Dv=128, scale=0.07),
    Case("one row", H=8, G=8, Tq=1, Tk=1000, D=128, Dv=128),
]


@dataclasses.dataclass
class CaseInputs:
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    slopes: Tensor | None
    q_lengths: Tensor | None
    k_lengths: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    case: Case

    def rest(self) -> tuple[Any, ...]:
        """Arguments of the ops after q, k and v."""
        c = self.case
        longest = (max(c.q_lengths or (0,)), max(c.k_lengths or (0,))) if c.packed else (c.Tq, c.Tk)
        tensors = (self.mask, self.slopes, self.q_lengths, self.k_lengths, self.cu_q, self.cu_k)
        numbers = (c.scale, c.causal, c.window_left, c.window_right, c.softcap, c.dropout_p)
        return *tensors, *longest, *numbers, self.seed

    def wide(self) -> CaseInputs:
        """Copies on the CPU in float64; q, k, v and a float mask are leaves."""
        changed = {}
        for field in dataclasses.fields(self):
            t = getattr(self, field.name)
            if isinstance(t, Tensor):
                t = t.detach().cpu()
                grad = t.is_floating_point() and field.name != "slopes"
                changed[field.name] = t.double().requires_grad_() if grad else t
        return dataclasses.replace(self, **changed)

    def leaves(self) -> dict[str, Tensor]:
        mask = {} if self.mask is None or self.mask.dtype == torch.bool else {"mask": self.mask}
        return {"q": self.q, "k": self.k, "v": self.v} | mask


def make(c: Case, dtype: torch.dtype) -> CaseInputs:
    B, Tq, Tk = (1, sum(c.q_lengths), sum(c.k_lengths)) if c.packed else (c.B, c.Tq, c.Tk)
    lengths = [None if n is None else torch.tensor(n) for n in (c.q_lengths, c.k_lengths)]
    starts = [None, None]
    if c.packed:
        starts = [torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32) for n in (c.q_lengths, c.k_lengths)]
        lengths = [None, None]
    mask = None
    if c.mask:
        kind, _, full = c.mask.partition(" ")
        mask = torch.randn([n if name in full else 1 for name, n in zip("bhqk", (c.B, c.H, Tq, Tk))])
        mask = mask > -0.3 if kind == "bool" else mask.where((mask > -1) | (mask.numel() == 1), -math.inf).to(dtype)
    slopes = torch.rand((c.B, c.H) if "b" in c.slopes else (c.H,)) / 8 if c.slopes else None
    given = CaseInputs(
        *(torch.randn(B, *s).to(dtype) for s in ((c.H, Tq, c.D), (c.H // c.G, Tk, c.D), (c.H // c.G, Tk, c.Dv))),
        mask,
        slopes,
        *lengths,
        *starts,
        torch.tensor([-0x1234_5678_9ABC_DEF1]) if c.dropout_p else None,
        c,
    )
    tensors = {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    return dataclasses.replace(given, **{n: t.to(DEVICE) for n, t in tensors.items() if isinstance(t, Tensor)})


def near(got: Tensor, want: Tensor, dtype: torch.dtype, what: str) -> None:
    got, want = got.cpu().double(), want.double()
    largest = want[want.isfinite()].abs().max().item() if want.isfinite().any() else 0.0
    slack = SLACK[dtype]
    torch.testing.assert_close(
        got, want, rtol=slack, atol=slack * (largest + 0.01), equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def check(c: Case, dtype: torch.dtype) -> None:
    given = make(c, dtype)
    wide = given.wide()
    leaves = wide.leaves()
    want = reference.attention(*(wide.q, wide.k, wide.v), *wide.rest())
    got = attention.attention_forward(*(given.q, given.k, given.v), *given.rest())
    assert got[0].dtype == dtype and got[1].dtype == torch.promote_types(dtype, torch.float32)
    near(got[0], want[0], dtype, "out")
    near(got[1], want[1], dtype, "lse")

    dout, dlse = torch.randn(want[0].shape).to(dtype), torch.randn(want[1].shape).to(got[1].dtype)
    lse = want[1].where(want[1].isfinite(), 0)
    loss = (want[0] * dout).sum() + (lse * dlse).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True, allow_unused=True)
    found = attention.attention_backward(
        *(dout.to(DEVICE), dlse.to(DEVICE), given.q, given.k, given.v), *given.rest(), *got[:2], "mask" in leaves
    )
    for name, x, y in zip(("q", "k", "v", "mask"), found, gradients):
        assert x.dtype == dtype
        near(x, y, dtype, f"d{name}")
    if "mask" not in leaves:
        assert found[3].numel() == 0


def check_weights(c: Case, dtype: torch.dtype) -> None:
    given = make(c, dtype)
    wide = given.wide()
    leaves = {name: t for name, t in wide.leaves().items() if name != "v"}
    lse = reference.attention(*(wide.q, wide.k, wide.v), *wide.rest())[1].detach().requires_grad_()
    narrow = lse.detach().to(torch.promote_types(dtype, torch.float32)).to(DEVICE)
    want = reference.attention_weights(wide.q, wide.k, *wide.rest(), lse)
    got = attention.attention_weights(given.q, given.k, *given.rest(), narrow)
    assert got.dtype == dtype
    near(got, want, dtype, "weights")

    dw = torch.randn(want.shape).to(dtype)
    *gradients, dlse = torch.autograd.grad((want * dw).sum(), [*leaves.values(), lse], materialize_grads=True)
    found = attention.attention_weights_backward(
        dw.to(DEVICE), given.q, given.k, *given.rest(), narrow, "mask" in leaves
    )
    for name, x, y in zip(leaves, (found[0], found[1], found[3]), gradients):
        near(x, y, dtype, f"d{name}")
    near(found[2], dlse, dtype, "dlse")


@pytest.mark.parametrize("c", CASES, ids=str)
def test_cases(c: Case):
    check(c, torch.float32)


@on_hardware
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("c", SOME, ids=str)
def test_dtypes(c: Case, dtype: torch.dtype):
    check(c, dtype)


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch):
    for name in ("LARGEST", "CHUNK"):
        monkeypatch.setattr(configurations, name, dict.fromkeys((2, 4, 8), 16))
    configurations.config.cache_clear()
    yield
    configurations.config.cache_clear()


@on_hardware
@pytest.mark.parametrize("c", CHUNKED, ids=str)
def test_heads_in_chunks(c: Case, chunked: None):
    assert attention.is_wide(torch.float32, c.D, c.Dv)
    check(c, torch.float32)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float32], ids=str)
@pytest.mark.parametrize("c", [CHUNKED[1], CHUNKED[3]], ids=str)
def test_dtypes_of_heads_in_chunks(c: Case, dtype: torch.dtype, chunked: None):
    check(c, dtype)


@pytest.mark.parametrize("c", [c for c in CHUNKED if not c.packed], ids=str)
def test_weights_of_heads_in_chunks(c: Case, chunked: None):
    check_weights(c, torch.float32)


@on_hardware
@pytest.mark.parametrize("c", WIDE, ids=str)
def test_wide_heads(c: Case):
    check(c, torch.float32)


@on_hardware
def test_wide_heads_of_other_dtypes():
    check(WIDE[1], torch.bfloat16)
    check(Case("257 columns", B=1, Tq=9, Tk=17, D=257, Dv=300, scale=0.06, causal=1), torch.float64)
    assert attention.is_wide(torch.float64, 129, 8) and not attention.is_wide(torch.float64, 128, 128)
    check_weights(WIDE[1], torch.float16)


@st.composite
def drawn(draw: st.DrawFn) -> Case:
    """All combinations of options, except masks with packed sequences."""
    form = draw(st.sampled_from(["dense", "lengths", "packed"]))
    B, H = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    Tq, Tk = draw(st.integers(0, 35)), draw(st.integers(0, 35))
    lengths = [tuple(draw(st.lists(st.integers(0, T), min_size=B, max_size=B))) for T in (Tq, Tk)]
    kind = "" if form == "packed" else draw(st.sampled_from(["", "bool", "float"]))
    bound = st.one_of(st.just(-1), st.integers(0, 20))
    return Case(
        "drawn",
        B=B,
        H=2 * H,
        G=draw(st.integers(1, 2)),
        Tq=Tq,
        Tk=Tk,
        D=draw(st.integers(1, 33)),
        Dv=draw(st.integers(1, 33)),
        q_lengths=None if form == "dense" else lengths[0],
        k_lengths=None if form == "dense" else lengths[1],
        packed=form == "packed",
        mask=kind and f"{kind} {''.join(draw(st.sets(st.sampled_from('bhqk'))))}",
        slopes=draw(st.sampled_from(["", "h", "bh"])),
        scale=draw(st.sampled_from([0.2, -0.1])),
        causal=draw(st.integers(0, 2)),
        window_left=draw(bound),
        window_right=draw(bound),
        softcap=draw(st.sampled_from([0.0, 2.0])),
        dropout_p=draw(st.sampled_from([0.0, 0.3])),
    )


@settings(
    max_examples=15,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given_drawn(c=drawn())
def test_drawn_cases(c: Case):
    check(c, torch.float32)
    if not c.packed:
        check_weights(c, torch.float32)


@pytest.mark.parametrize("programs", [1, 5])
def test_gradient_of_a_mask_for_other_partitions(monkeypatch: pytest.MonkeyPatch, programs: int):
    monkeypatch.setattr(load("attention.launch"), "PROGRAMS", programs)
    check(Case("parts", B=3, mask="float hk", Tq=40, q_lengths=(40, 0, 33)), torch.float16)


WEIGHTS = ("lengths", "bool mask of keys", "float mask of all samples", "all at once", "grouped heads", "no keys")


@on_hardware
@pytest.mark.parametrize("c", [c for c in CASES if c.why in WEIGHTS], ids=str)
def test_weights(c: Case):
    check_weights(c, torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=str)
@pytest.mark.parametrize("c", LARGE, ids=str)
def test_large(c: Case, dtype: torch.dtype):
    check(c, dtype)


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="no CUDA device")
@pytest.mark.parametrize("c", [c for c in LARGE if not c.packed], ids=str)
def test_large_weights(c: Case):
    check_weights(c, torch.bfloat16)


def with_nan_beyond(c: Case, forward: bool = True) -> tuple[CaseInputs, CaseInputs]:
    """Inputs, and the same with NaN and Inf in keys and values that at most the last row attends to."""
    given = make(c, torch.float32)
    k, v = given.k.clone(), given.v.clone()
    last = c.Tk - 1 if c.k_lengths is None else c.k_lengths[0] - 1
    k[0, :, last], v[0, :, last] = math.nan, math.inf
    if c.k_lengths is not None:
        k[0, :, last + 1 :], v[0, :, last + 1 :] = math.nan, math.nan
    return given, dataclasses.replace(given, k=k, v=v)


@pytest.mark.parametrize(
    "c",
    [
        Case("causal", B=1, Tq=40, Tk=40, causal=1),
        Case("window", B=1, Tq=40, Tk=40, window_left=3, window_right=3),
        Case("lengths, lower right", B=2, Tq=30, Tk=50, q_lengths=(30, 7), k_lengths=(34, 40), causal=2),
        Case("causal with dropout", B=1, Tq=40, Tk=40, causal=1, dropout_p=0.2),
    ],
    ids=str,
)
def test_nan_and_infinities_only_affect_queries_that_attend_to_them(c: Case):
    given, bad = with_nan_beyond(c)
    blind = slice(0, 30 if c.Tq == 40 else 29)
    results = []
    for inputs in (given, bad):
        arguments = (inputs.q, inputs.k, inputs.v)
        out, lse, _ = attention.attention_forward(*arguments, *inputs.rest())
        dout = torch.ones_like(out)
        dq, *_ = attention.attention_backward(dout, None, *arguments, *inputs.rest(), out, lse, False)
        results.append((out, lse, dq))
    for x, y in zip(*results):
        torch.testing.assert_close(x[0, :, blind], y[0, :, blind])
        assert y[0, :, blind].isfinite().all()
        assert y[1:].isnan().sum() == 0
    seeing = results[1][1][0, :, (c.q_lengths or (40,))[0] - 1]
    assert seeing.isnan().all()


@on_hardware
def test_masked_keys_have_no_effect():
    for kind in ("bool bhqk", "float bk"):
        given = make(Case("masked", B=1, mask=kind), torch.float32)
        given.mask[..., 5] = False if kind.startswith("bool") else -math.inf
        given.mask[..., 0] = True if kind.startswith("bool") else 0.5
        bad = dataclasses.replace(given, k=given.k.clone(), v=given.v.clone())
        bad.k[:, :, 5], bad.v[:, :, 5] = math.inf, math.nan
        results = []
        for inputs in (given, bad):
            arguments = (inputs.q, inputs.k, inputs.v)
            out, lse, _ = attention.attention_forward(*arguments, *inputs.rest())
            dout = torch.ones_like(out)
            found = attention.attention_backward(
                dout, None, *arguments, *inputs.rest(), out, lse, kind.startswith("float")
            )
            results.append((out, lse, *found))
        for x, y in zip(*results):
            assert y.isfinite().all()
            torch.testing.assert_close(x, y)


def test_nan_and_infinite_values():
    """The output is that of a sum: infinities of one sign, or NaN."""
    given = make(Case("values", B=1, Tq=8, Tk=8, causal=1), torch.float32)
    v = given.v.clone()
    v[0, 0, 1, 0], v[0, 0, 2, 1], v[0, 0, 3, 2] = math.inf, -math.inf, math.nan
    v[0, 0, 4, 0] = -math.inf
    out, *_ = attention.attention_forward(given.q, given.k, v, *given.rest())
    out = out[0, 0].cpu()
    assert out[:1, 0].isfinite().all() and out[1:4, 0].eq(math.inf).all() and out[4:, 0].isnan().all()
    assert out[:2, 1].isfinite().all() and out[2:, 1].eq(-math.inf).all()
    assert out[:3, 2].isfinite().all() and out[3:, 2].isnan().all()
    assert out[:, 3:].isfinite().all()


def with_nan_and_infinities(t: Tensor, generator: torch.Generator) -> Tensor:
    """A copy with a few NaN and infinities."""
    t = t.clone()
    at = torch.randint(t.numel(), (3,), generator=generator).to(t.device)
    t.view(-1)[at] = torch.tensor([math.inf, -math.inf, math.nan], device=t.device).to(t.dtype)
    return t


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize(
    "c",
    [
        Case("dense", H=3, Tq=9, Tk=20),
        Case("causal", H=3, Tq=18, Tk=20, causal=1),
        Case("dropped", H=3, Tq=18, Tk=20, causal=1, dropout_p=0.3),
        Case("bool", H=3, Tq=9, Tk=20, mask="bool bhqk"),
        Case("far", H=3, Tq=9, Tk=20, mask="float bhqk"),
        Case("softcap", H=3, Tq=9, Tk=20, softcap=2.0, k_lengths=(20, 7)),
    ],
    ids=str,
)
@pytest.mark.parametrize("columns", [16, 40])
def test_infinities_match_the_reference(c: Case, which: str, columns: int, request: pytest.FixtureRequest):
    if columns > 16:
        request.getfixturevalue("chunked")
        c = dataclasses.replace(c, D=columns, Dv=columns)
    given, generator = make(c, torch.float32), torch.Generator().manual_seed(5)
    if c.why == "far":
        given.mask[..., 4] = -300  # a weight of 0 for a key that is not masked
    given = dataclasses.replace(given, **{which: with_nan_and_infinities(getattr(given, which), generator)})
    got = attention.attention_forward(given.q, given.k, given.v, *given.rest())
    wide = given.wide()
    narrow = [t.detach().float() for t in (wide.q, wide.k, wide.v)]
    mask = None if wide.mask is None else wide.mask.detach() if c.mask[0] == "b" else wide.mask.detach().float()
    want = reference.attention(*narrow, mask, *wide.rest()[1:])
    assert not want[0].isfinite().all()
    near(got[0], want[0], torch.float32, "out")
    near(got[1], want[1], torch.float32, "lse")


HUGE = [(d, torch.finfo(d).min) for d in DTYPES]
HUGE += [(torch.float32, -1e9), (torch.bfloat16, -1e30), (torch.float32, 3e9)]


@pytest.mark.parametrize(("dtype", "number"), HUGE, ids=str)
@pytest.mark.parametrize("full", ["qk", "bhqk"])
def test_a_huge_mask_gives_uniform_weights(dtype: torch.dtype, number: float, full: str):
    """As in torch with a mask of torch.finfo(dtype).min, including gradients, although lse rounds to that number."""
    c = Case("lowest", B=2, H=2, mask=f"float {full}", causal=1, k_lengths=(40, 33), Tq=40)
    given = make(c, dtype)
    given.mask.fill_(0)
    given.mask[..., 3, :] = number
    given.mask[..., 4, 2:] = number
    given.mask[..., 20:, :] = number
    arguments = (given.q, given.k, given.v)
    out, lse, _ = attention.attention_forward(*arguments, *given.rest())
    if dtype != torch.float16:  # scores still affect sums with finfo.min of float16
        torch.testing.assert_close(out[:, :, 3].double(), given.v[:, :, :4].double().mean(2), rtol=2e-2, atol=2e-3)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = attention.attention_backward(dout, dlse, *arguments, *given.rest(), out, lse, True)
    weights = attention.attention_weights(given.q, given.k, *given.rest(), lse)
    of_weights = attention.attention_weights_backward(
        torch.ones_like(weights).cumsum(-1), given.q, given.k, *given.rest(), lse, True
    )

    # The reference uses at most float32, in which the scores also round to the number.
    wide = dataclasses.replace(
        given.wide(), **{n: t.detach().to(lse.dtype).cpu().requires_grad_() for n, t in given.leaves().items()}
    )
    want = reference.attention(*(wide.q, wide.k, wide.v), *wide.rest())
    scores = reference.attention_weights(wide.q, wide.k, *wide.rest(), want[1])
    leaves = list(wide.leaves().values())
    gradients = torch.autograd.grad(want, leaves, (dout.to(lse.dtype).cpu(), dlse.cpu()), retain_graph=True)
    near(out, want[0].detach(), dtype, "out")
    near(lse, want[1].detach(), dtype, "lse")
    near(weights, scores.detach(), dtype, "weights")
    for name, x, y in zip(("q", "k", "v", "mask"), found, gradients):
        near(x, y, dtype, f"d{name}")
    lse = want[1].detach().requires_grad_()
    scores = reference.attention_weights(wide.q, wide.k, *wide.rest(), lse)
    of_both = torch.autograd.grad(scores, (wide.q, wide.k, lse, wide.mask), torch.ones_like(scores).cumsum(-1))
    for name, x, y in zip(("q", "k", "lse", "mask"), of_weights, of_both):
        near(x, y, dtype, f"d{name} of weights")


@on_hardware
@pytest.mark.parametrize("causal", [0, 2])
def test_packed_padded_and_single_sequences_match(causal: int):
    rows, keys, H = (20, 0, 33), (9, 4, 40), 2
    packed = make(
        Case("p", B=3, H=H, q_lengths=rows, k_lengths=keys, packed=True, causal=causal, dropout_p=0.2), torch.float32
    )
    dout = torch.randn_like(packed.q)
    ends_q, ends_k = itertools.accumulate(rows), itertools.accumulate(keys)
    places = [(slice(a - n, a), slice(b - m, b)) for a, b, n, m in zip(ends_q, ends_k, rows, keys)]

    def run(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        out, lse, _ = attention.attention_forward(q, k, v, *rest)
        found = attention.attention_backward(dout, None, q, k, v, *rest, out, lse, False)
        return out, lse.unsqueeze(-1), *found[:3]

    numbers = packed.rest()[8:]
    got = run(packed.q, packed.k, packed.v, dout, *packed.rest())

    def pad(x: Tensor, which: int) -> Tensor:
        padded = torch.full((3, H, 45, 16), math.nan, device=DEVICE)  # padding is not read
        for s, place in enumerate(places):
            part = x[0, :, place[which]]
            padded[s, :, : part.shape[1]] = part
        return padded

    lengths = (torch.tensor(rows, device=DEVICE), torch.tensor(keys, device=DEVICE))
    q, k, v = pad(packed.q, 0), pad(packed.k, 1), pad(packed.v, 1)
    padded = run(q, k, v, pad(dout, 0), None, None, *lengths, None, None, 45, 45, *numbers)
    for x, y, which in zip(got, padded, (0, 0, 0, 1, 1)):
        for s, place in enumerate(places):
            n = (rows, keys)[which][s]
            assert torch.equal(x[0, :, place[which]], y[s, :, :n])
            beyond = y[s, :, n:]
            assert beyond.eq(-math.inf if x is got[1] else 0).all()

    # The dropout counter includes the index of the sequence, which is 0 for a single sequence.
    one = [t[:, :, p] for t, p in zip((packed.q, packed.k, packed.v, dout), (*places[0], places[0][1], places[0][0]))]
    alone = run(*one, None, None, None, None, None, None, rows[0], keys[0], *numbers)
    for x, y, which in zip(got, alone, (0, 0, 0, 1, 1)):
        assert torch.equal(x[:, :, places[0][which]], y)


def test_rows_outside_of_sequences_are_zero():
    given = make(Case("p", q_lengths=(20, 3), k_lengths=(9, 4), packed=True), torch.float32)
    q, k, v = (torch.nn.functional.pad(t, (0, 0, 0, 70), value=math.nan) for t in (given.q, given.k, given.v))
    out, lse, _ = attention.attention_forward(q, k, v, *given.rest())
    dq, dk, dv, _ = attention.attention_backward(torch.ones_like(out), None, q, k, v, *given.rest(), out, lse, False)
    assert lse[:, :, 23:].eq(-math.inf).all()
    assert all(x[:, :, n:].eq(0).all() for x, n in ((out, 23), (dq, 23), (dk, 13), (dv, 13)))
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("p", [0.3, 0.75])
def test_dropout_matches_the_reference(p: float):
    c = Case("dropout", H=2, Tq=9, Tk=39, dropout_p=p)
    given = make(c, torch.float32)
    _, lse, _ = attention.attention_forward(given.q, given.k, given.v, *given.rest())
    weights = attention.attention_weights(given.q, given.k, *given.rest(), lse)
    keep = reference.dropout_keep(c.B, c.H, c.Tq, c.Tk, p, given.seed.cpu())
    assert torch.equal((weights != 0).cpu(), keep)
    # With values of 1 and one key at a time, all results of forward and of both backward kernels expose the mask.
    out, lse, _ = attention.attention_forward(given.q, given.k, torch.ones_like(given.v), *given.rest())
    torch.testing.assert_close(out[..., 0], weights.sum(-1))
    dv = attention.attention_backward(
        torch.ones_like(out), None, given.q, given.k, torch.ones_like(given.v), *given.rest(), out, lse, False
    )[2]
    torch.testing.assert_close(dv[..., 0], weights.sum(-2))


@on_hardware
def test_bits_are_independent_of_the_run_and_the_batch():
    c = Case("again", B=2, H=1, Tq=20, Tk=40, mask="float hq", causal=2)
    given = make(c, torch.float32)
    dout = torch.randn_like(given.q)
    runs = []
    for batch in (slice(0, 2), slice(0, 2), slice(1, 2)):
        arguments = tuple(t[batch] for t in (given.q, given.k, given.v))
        out, lse, _ = attention.attention_forward(*arguments, *given.rest())
        found = attention.attention_backward(dout[batch], None, *arguments, *given.rest(), out, lse, True)
        runs.append((out, lse, *found))
    assert all(torch.equal(x, y) for x, y in zip(runs[0], runs[1]))
    assert all(torch.equal(x[1:], y) for x, y in zip(runs[0][:5], runs[2][:5]))


def test_any_strides():
    c = Case("strides", H=2, mask="float bhqk")
    given = make(c, torch.float32)

    def scattered(t: Tensor) -> Tensor:
        """The same values with permuted dimensions and every second element of memory."""
        memory = torch.full((t.shape[3], t.shape[2], t.shape[0], 2 * t.shape[1]), math.nan, device=t.device)
        view = memory[..., ::2].permute(2, 3, 1, 0)
        return view.copy_(t)

    dout = torch.randn_like(given.q)
    apart = dataclasses.replace(given, **{n: scattered(getattr(given, n)) for n in ("q", "k", "v", "mask")})
    results = []
    for inputs, gradient in ((given, dout), (apart, scattered(dout))):
        arguments = (inputs.q, inputs.k, inputs.v)
        out, lse, _ = attention.attention_forward(*arguments, *inputs.rest())
        results.append((out, *attention.attention_backward(gradient, None, *arguments, *inputs.rest(), out, lse, True)))
    for x, y in zip(*results):
        assert torch.equal(x, y) and y.is_contiguous()


def test_unsupported():
    given = make(Case("plain"), torch.float32)
    with pytest.raises(NotImplementedError, match=r"dtype torch\.int32 is none of torch\.bfloat16"):
        attention.attention_forward(given.q.int(), given.k, given.v, *given.rest())
    assert attention.unsupported(given.q) == []


PACKED = dict(cu_q=torch.tensor([0, 5, 20]), cu_k=torch.tensor([0, 5, 40]))
ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q 3-D": (dict(q=torch.ones(2, 20, 16)), ValueError, "q must have 4 dimensions, got [2, 20, 16]"),
    "k of another dtype": (dict(k=torch.ones(2, 1, 40, 16).half()), TypeError, "k must be torch.float32, got"),
    "k of other columns": (dict(k=torch.ones(2, 1, 40, 8)), ValueError, "k must have shape [2, 1, 40, 16], got"),
    "v of other rows": (dict(v=torch.ones(2, 1, 4, 16)), ValueError, "v must have shape [2, 1, 40, 16], got"),
    "heads": (
        dict(k=torch.ones(2, 2, 40, 16), v=torch.ones(2, 2, 40, 16)),
        ValueError,
        "q's heads must be a multiple of k's, 2, got 1",
    ),
    "mask 2-D": (dict(mask=torch.ones(20, 40)), ValueError, "attn_mask must have 4 dimensions, got [20, 40]"),
    "mask of other rows": (dict(mask=torch.ones(1, 1, 2, 40)), ValueError, "attn_mask must have shape"),
    "mask of another dtype": (dict(mask=torch.ones(1, 1, 1, 1).half()), TypeError, "attn_mask must be bool or"),
    "slopes": (dict(slopes=torch.ones(2)), ValueError, "alibi_slopes must have shape [H] or [B, H] = [2, 1], got [2]"),
    "lengths": (dict(k_lengths=torch.ones(3).long()), ValueError, "k_lengths must have shape [2], got [3]"),
    "lengths float": (dict(q_lengths=torch.ones(2)), TypeError, "q_lengths must be int32 or int64, got"),
    "half the bounds": (dict(cu_q=PACKED["cu_q"]), ValueError, "cu_q and cu_k must be given together"),
    "packed batch": (PACKED, ValueError, "q must have shape [1, H, N, D] where rows are packed, got [2, 1, 20, 16]"),
    "packed and a mask": (
        dict(**PACKED, mask=torch.ones(1, 1, 1, 40) > 0),
        ValueError,
        "q_lengths, k_lengths and attn_mask must be absent where rows are packed, got attn_mask",
    ),
    "packed and lengths": (dict(**PACKED, k_lengths=torch.ones(2).long()), ValueError, "absent where rows are packed"),
    "no seed": (dict(case=Case("dropped", dropout_p=0.5)), ValueError, "seed must be given with dropout"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str):
    change, error, message = ERRORS[name]
    here = {n: t.to(DEVICE) if isinstance(t, Tensor) else t for n, t in change.items()}
    bad = dataclasses.replace(make(Case("plain"), torch.float32), **here)
    with pytest.raises(error, match=re.escape(message)):
        attention.attention_forward(bad.q, bad.k, bad.v, *bad.rest())


def test_errors_of_backward_and_of_weights():
    given = make(Case("plain"), torch.float32)
    tensors, rest = (given.q, given.k, given.v), given.rest()
    out, lse, _ = attention.attention_forward(*tensors, *rest)
    for dout, dlse, found, need, message in (
        (out[..., :3], None, (out, lse), False, "dout must have shape [2, 1, 20, 16], got [2, 1, 20, 3]"),
        (out, lse[:1], (out, lse), False, "dlse must have shape [2, 1, 20], got [1, 1, 20]"),
        (out, None, (out, lse[:1]), False, "lse must have shape [2, 1, 20], got [1, 1, 20]"),
        (out, None, (out, lse), True, "need_dmask must be False where there is no float attn_mask, got True"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            attention.attention_backward(dout, dlse, *tensors, *rest, *found, need)
    packed = make(Case("p", q_lengths=(9, 3), k_lengths=(4, 5), packed=True), torch.float32)
    with pytest.raises(ValueError, match="must be absent where weights are asked for"):
        attention.attention_weights(packed.q, packed.k, *packed.rest(), lse)


def test_configurations_fit():
    for shared, kernel, dtype in itertools.product((99, 163, 227), ("forward", "rows", "keys", "tiles"), DTYPES):
        for D, Dv, extra in itertools.product((16, 64, 128, 256), (64, 128, 256), (False, True)):
            if attention.is_wide(dtype, D, Dv):
                continue
            chosen = attention.config(kernel, dtype, D, Dv, extra, shared << 10)
            found = attention.columns(kernel, dtype, D, Dv)
            sizes = (dtype, found["BD"], found["BDV"])
            assert attention.needed(kernel, *sizes, chosen, extra) <= shared << 10
            assert min(chosen.BM, chosen.BN) >= 16
