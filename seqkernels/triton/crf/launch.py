"""Launchers of the kernels of conditional random fields.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .backward import crf_backward_kernel, crf_pairs_kernel
from .chain import Scores, Steps
from .forward import crf_forward_kernel
from .viterbi import crf_several_kernel, crf_viterbi_kernel

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MOST_TAGS = 4096
MOST_WARPS = 16
CHUNKS = 64  # of sequences that share transitions, in which the gradient is summed
PATHS = 32  # paths that crf_several_kernel follows at once
SCORES = 256  # steps per tile of the score of tags


class Config(NamedTuple):
    """Launch configuration of the kernels that walk the steps of a sequence."""

    BK: int  # tags, padded
    BJ: int  # columns of transitions per tile
    num_warps: int
    maxnreg: int
    num_stages: int = 1  # no prefetch, which could move loads before the stores that they read

    @property
    def whole(self) -> bool:
        """Whether a matrix of transitions is one tile."""
        return self.BJ == self.BK


def config(K: int, float64: bool, several: bool = False) -> Config:
    """Tiles of 32 elements per thread, a quarter of the registers of 512 threads; 8 in crf_several_kernel, which has
    five tiles. A quarter of that in float64, whose exponentials need more registers.
    """
    per_warp = 32 * (8 if several else 32) // (4 if float64 else 1)
    BK = padded(K)
    num_warps = min(max(BK * BK // per_warp, 1), MOST_WARPS)
    return Config(BK, max(min(BK, num_warps * per_warp // BK), 1), num_warps, registers(num_warps))


def pairs_config(K: int, float64: bool, by_step: bool) -> dict[str, int]:
    """Configuration of crf_pairs_kernel."""
    tile = 1024 if float64 else 2048
    BK = padded(K)
    BI = max(min(BK, tile // BK), 1)
    BS = 1 if by_step else max(tile // (BI * BK), 1)
    return dict(BS=BS, BI=BI, BK=BK, num_warps=4, maxnreg=registers(4), num_stages=1)


def padded(K: int) -> int:
    return max(triton.next_power_of_2(K), 16)


def registers(num_warps: int) -> int:
    """Maximum per thread. Without the limit, ptxas spills registers to raise the occupancy."""
    return min(65536 // (32 * num_warps), 255)


def interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when the kernels were imported, so that they run on the CPU in numpy."""
    return not isinstance(crf_forward_kernel, triton.JITFunction)


class Call:
    """The checked inputs of an op."""

    def __init__(
        self,
        op: str,
        emissions: Tensor,
        transitions: Tensor,
        start: Tensor | None,
        end: Tensor | None,
        lengths: Tensor | None,
        mask: Tensor | None,
        tags: Tensor | None = None,
    ) -> None:
        self.op, self.emissions = op, emissions
        if emissions.device.type != "cuda" and not interpreted():
            raise NotImplementedError(f"{op}: the Triton kernels do not run: the tensors are on {emissions.device}")
        if emissions.dtype not in DTYPES:
            raise RuntimeError(f"{op}: emissions must be {', '.join(str(d) for d in DTYPES)}, got {emissions.dtype}")
        if emissions.dim() != 3:
            raise RuntimeError(f"{op}: emissions must have 3 dimensions, got {list(emissions.shape)}")
        self.B, self.T, self.K = B, T, K = emissions.shape
        if not 1 <= K <= MOST_TAGS:
            raise NotImplementedError(f"{op}: the Triton kernels support from 1 to {MOST_TAGS} tags, got {K}")
        shape = transitions.shape
        if len(shape) != 4 or shape[0] not in (1, B) or shape[1] not in (1, T) or tuple(shape[2:]) != (K, K):
            raise RuntimeError(
                f"{op}: transitions must have shape [{B} or 1, {T} or 1, {K}, {K}], got {list(transitions.shape)}"
            )
        if lengths is not None and mask is not None:
            raise RuntimeError(f"{op}: lengths and mask must not be given together")
        self.by_sequence, self.by_step = shape[0] > 1, shape[1] > 1
        self.compute = torch.float64 if emissions.dtype == torch.float64 else torch.float32
        pairs = self.checked("transitions", transitions, emissions.dtype, shape)
        e = emissions if K == 1 or emissions.stride(2) == 1 else emissions.contiguous()
        start, end = (
            None if t is None else self.checked(name, t, emissions.dtype, (K,))
            for name, t in (("start_transitions", start), ("end_transitions", end))
        )
        self.scores = Scores(e, pairs, start, end)
        self.steps = self._steps(lengths, mask, tags)
        self.rows = dict(s_b=e.stride(0), s_t=e.stride(1))
        self.sizes = dict(T=T, K=K, s_pairs_b=shape[1] * self.by_sequence, s_pairs_t=int(self.by_step))
        chosen = config(K, self.compute == torch.float64)
        self.walk = dict(**self.rows, **chosen._asdict(), RESIDENT=chosen.whole and not self.by_step)

    def checked(self, name: str, t: Tensor, dtype: torch.dtype, shape: Any) -> Tensor:
        """The tensor as kernels read it."""
        if t.device != self.emissions.device:
            raise RuntimeError(f"{self.op}: {name} must be on the device of emissions, got {t.device}")
        if t.dtype != dtype:
            raise RuntimeError(f"{self.op}: {name} must be {str(dtype).removeprefix('torch.')}, got {t.dtype}")
        if tuple(t.shape) != tuple(shape):
            raise RuntimeError(f"{self.op}: {name} must have shape {list(shape)}, got {list(t.shape)}")
        t = t.contiguous()
        return t if t.data_ptr() % 16 == 0 else t.clone()  # the layout of a tile depends on the alignment

    def _steps(self, lengths: Tensor | None, mask: Tensor | None, tags: Tensor | None) -> Steps:
        B, T = self.B, self.T
        counts = lengths if lengths is None else self.checked("lengths", lengths, torch.int64, (B,))
        steps = before = None
        if mask is not None:
            mask = self.checked("mask", mask, torch.bool, (B, T))
            counts = mask.sum(1)
            steps = torch.argsort(mask.logical_not().byte(), dim=1, stable=True)
            seen = torch.where(mask, torch.arange(T, device=mask.device), -1)
            if T:
                seen = seen.cummax(1).values
            before = torch.where(mask, torch.nn.functional.pad(seen, (1, 0), value=-1)[:, :T], -1)
        if tags is not None:
            tags = self.checked("tags", tags, torch.int64, (B, T))
        if interpreted() or "SEQKERNELS_CHECKED" in os.environ:
            self._check_values(lengths, mask, tags)
        return Steps(counts, steps, before, tags)

    def _check_values(self, lengths: Tensor | None, mask: Tensor | None, tags: Tensor | None) -> None:
        """Reads the values of lengths and tags, which synchronizes on a GPU."""
        T, K = self.T, self.K
        if lengths is not None:
            for n in lengths[(lengths < 0) | (lengths > T)].tolist():
                raise RuntimeError(f"{self.op}: lengths must be between 0 and {T}, got {n}")
        if tags is not None:
            wrong = (tags < 0) | (tags >= K)
            if mask is not None:
                wrong &= mask
            if lengths is not None:
                wrong &= torch.arange(T, device=tags.device) < lengths[:, None]
            for b, t in wrong.nonzero().tolist():
                raise RuntimeError(
                    f"{self.op}: tags must be between 0 and {K - 1}, got {int(tags[b, t])} at step {t} of sequence {b}"
                )

    def by_steps(self, dtype: torch.dtype) -> Tensor:
        """A new tensor [B, T, K] for the included steps; zeros where kernels do not write."""
        new = self.emissions.new_empty if self.steps.p_counts is None else self.emissions.new_zeros
        return new(self.B, self.T, self.K, dtype=dtype)


def forward(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """The op crf_forward: log_z and score [B] float64, alpha [B, T, K]."""
    log_z, score = (call.emissions.new_empty(call.B, dtype=torch.float64) for _ in range(2))
    alpha = call.by_steps(call.compute)
    if call.B:
        crf_forward_kernel[(call.B,)](
            call.scores, call.steps, alpha, log_z, score, **call.sizes, **call.walk, BS=SCORES
        )  # fmt: skip
    return log_z, score, alpha


def backward(call: Call, dlog_z: Tensor, dscore: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op crf_backward: gradients of emissions, transitions, start and end."""
    B, T, K, dtype = call.B, call.T, call.K, call.emissions.dtype
    alpha = call.checked("alpha", alpha, call.compute, (B, T, K))
    dlog_z = call.checked("dlog_z", dlog_z, torch.float64, (B,))
    dscore = call.checked("dscore", dscore, torch.float64, (B,))
    demissions = call.by_steps(dtype)
    gamma, marginals = torch.empty_like(alpha), torch.empty_like(alpha)
    ends = alpha.new_zeros(2, B, K, dtype=torch.float64)
    if B:
        crf_backward_kernel[(B,)](
            call.scores, call.steps, alpha, dlog_z, dscore, gamma, marginals, demissions, *ends.unbind(0),
            **call.sizes, **call.walk,
        )  # fmt: skip
    dstart, dend = (
        demissions.new_empty(0) if given is None else of_end.sum(0).to(dtype)
        for given, of_end in zip((call.scores.p_start, call.scores.p_end), ends.unbind(0))
    )
    shared = not (call.by_sequence or call.by_step)
    chunk = triton.cdiv(B, CHUNKS) if shared else B
    groups = (B if call.by_sequence else 1) * (T if call.by_step else 1)
    if shared:
        groups = triton.cdiv(B, chunk) if B else 0
    out = alpha.new_empty(groups, K, K, dtype=torch.float64 if shared else dtype)
    if groups:
        tile = pairs_config(K, dtype == torch.float64, call.by_step)
        crf_pairs_kernel[(groups * triton.cdiv(K, tile["BI"]),)](
            call.scores, call.steps, gamma, marginals, dscore, out, B=B, chunk=chunk, **call.sizes,
            BY_SEQUENCE=call.by_sequence, BY_STEP=call.by_step, **tile,
        )  # fmt: skip
    if shared:
        out = out.sum(0).to(dtype)
    return demissions, out.view(*(B if call.by_sequence else 1, T if call.by_step else 1), K, K), dstart, dend


def viterbi(call: Call, paths: int) -> tuple[Tensor, Tensor]:
    """The op crf_viterbi: tags [B, paths, T], -1 where there is no path, and scores [B, paths] float64."""
    B, T, K, device = call.B, call.T, call.K, call.emissions.device
    if paths < 1:
        raise RuntimeError(f"{call.op}: paths must be at least 1, got {paths}")
    if paths * K >= 2**31:
        raise RuntimeError(f"{call.op}: paths must be fewer, got {paths} of {K} tags")
    tags = torch.full((B, paths, T), -1, dtype=torch.int64, device=device)
    scores = torch.empty(B, paths, dtype=torch.float64, device=device)
    if not B:
        return tags, scores
    back = torch.empty(B, T, K, paths, dtype=torch.int32, device=device)
    if paths == 1:
        rows = torch.empty(B, K, dtype=call.compute, device=device)
        crf_viterbi_kernel[(B,)](call.scores, call.steps, rows, back, tags, scores, **call.sizes, **call.walk)
    else:
        lists = torch.empty(B, 2, K, paths, dtype=call.compute, device=device)
        last = torch.empty(B, paths, dtype=torch.int32, device=device)
        crf_several_kernel[(B,)](
            call.scores, call.steps, lists, back, last, tags, scores, **call.sizes, **call.rows, N=paths, BN=PATHS,
            **config(K, call.compute == torch.float64, several=True)._asdict(),
        )  # fmt: skip
    return tags, scores
