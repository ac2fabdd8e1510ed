"""Launchers of the attention kernels, with the arguments and results of the ops.

Dimensions: B batch, or sequences of packed rows; H query heads, G query heads per key head, Tq queries, Tk keys, D
columns of q and k, Dv of v. Nq, Nk: packed rows.
"""

from __future__ import annotations

import functools
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from .backward import (
    attention_backward_keys_kernel,
    attention_backward_rows_kernel,
    attention_normaliser_kernel,
)
from .configurations import (
    FORWARD,
    KEYS,
    ROWS,
    TILES,
    Config,
    columns,
    config,
    shared_memory,
)
from .forward import attention_forward_kernel
from .tiles import MaskStrides, Strides
from .weights import attention_mask_gradient_kernel, attention_weights_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FAR = 2**30  # keys of a window without bound
# Target number of programs for the gradient of a mask that scores share. A constant, so that the order of the sums is
# the same on all devices.
PROGRAMS = 512


def unsupported(q: Tensor) -> list[str]:
    """Reasons why these kernels do not support this query; empty if they do."""
    reasons = []
    if q.device.type != "cuda" and not _interpreted():
        reasons.append(f"the query is on {q.device}")
    if q.dtype not in DTYPES:
        reasons.append(f"dtype {q.dtype} is none of {', '.join(str(d) for d in DTYPES)}")
    return reasons


def _interpreted() -> bool:
    return not isinstance(attention_forward_kernel, triton.JITFunction)


def _float64_bits(x: float) -> int:
    """Triton rounds a float argument to float32: the kernels take float64 as an integer of the same bits."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def _with_small_strides(t: Tensor) -> Tensor:
    """The tensor, or a contiguous copy where offsets within a block of 256 rows exceed 32 bits."""
    _, _, rows, columns = t.stride()
    return t if 256 * rows + t.shape[3] * columns < 2**31 else t.contiguous()


def _require(right: bool, argument: str, condition: str, got: Any, error: type[Exception] = ValueError) -> None:
    if not right:
        raise error(f"attention: {argument} must {condition}, got {got}")


def _require_shape(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t is not None:
        _require(tuple(t.shape) == shape, name, f"have shape {list(shape)}", list(t.shape))
        _require(t.dtype == dtype, name, f"be {dtype}", t.dtype, TypeError)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    lengths: dict[str, Tensor | None],
    bounds: dict[str, Tensor | None],
    dropout_p: float,
    seed: Tensor | None,
) -> None:
    """Check devices, shapes and dtypes. The values of lengths and bounds are not read, which would synchronize: the
    kernels clamp them to the rows of the tensors."""
    others = dict(k=k, v=v, attn_mask=attn_mask, alibi_slopes=alibi_slopes, **lengths, **bounds, seed=seed)
    for name, t in others.items():
        _require(t is None or t.device == q.device, name, f"be on {q.device}", t.device if t is not None else None)
    for name, t in (("q", q), ("k", k), ("v", v), ("attn_mask", attn_mask)):
        _require(t is None or t.dim() == 4, name, "have 4 dimensions", list(t.shape) if t is not None else None)
    B, H, T_q, D = q.shape
    _, Hk, T_k, _ = k.shape
    _require_shape("k", k, (B, Hk, T_k, D), q.dtype)
    if v is not None:
        _require_shape("v", v, (B, Hk, T_k, v.shape[3]), q.dtype)
    _require(Hk == H or (Hk > 0 and H % Hk == 0), "q's heads", f"be a multiple of k's, {Hk}", H)
    absent = [bound is None for bound in bounds.values()]
    _require(all(absent) or not any(absent), "cu_q and cu_k", "be given together", "one of them")
    cu = bounds["cu_q"]
    if cu is not None:
        _require(v is not None, "cu_q and cu_k", "be absent where weights are asked for", "both")
        given = [name for name, t in dict(attn_mask=attn_mask, **lengths).items() if t is not None]
        _require(not given, "q_lengths, k_lengths and attn_mask", "be absent where rows are packed", ", ".join(given))
        _require(B == 1, "q", "have shape [1, H, N, D] where rows are packed", list(q.shape))
        _require(cu.dim() == 1 and cu.numel() > 0, "cu_q", "have shape [S + 1]", list(cu.shape))
        B = cu.numel() - 1
    for name, t in (lengths | bounds).items():
        if t is not None:
            _require(t.dtype in (torch.int32, torch.int64), name, "be int32 or int64", t.dtype, TypeError)
            _require_shape(name, t, (B + (name in bounds),), t.dtype)
    if attn_mask is not None:
        _require(
            attn_mask.dtype in (torch.bool, q.dtype), "attn_mask", f"be bool or {q.dtype}", attn_mask.dtype, TypeError
        )
        fits = all(size in (1, full) for size, full in zip(attn_mask.shape, (B, H, T_q, T_k)))
        _require(fits, "attn_mask", f"have shape {[f'{n} or 1' for n in (B, H, T_q, T_k)]}", list(attn_mask.shape))
    if alibi_slopes is not None:
        fits = tuple(alibi_slopes.shape) in ((H,), (B, H))
        _require(fits, "alibi_slopes", f"have shape [H] or [B, H] = [{B}, {H}]", list(alibi_slopes.shape))
    _require(not dropout_p or seed is not None, "seed", "be given with dropout", seed)


class _Call:
    """One call of an op: the arguments that the kernels share, by name, and the launches."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        attn_mask: Tensor | None,
        alibi_slopes: Tensor | None,
        q_lengths: Tensor | None,
        k_lengths: Tensor | None,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
        scale: float,
        causal: int,
        window_left: int,
        window_right: int,
        softcap: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> None:
        if reasons := unsupported(q):
            raise NotImplementedError(f"attention: the Triton kernels do not run: {'; '.join(reasons)}")
        lengths, bounds = dict(q_lengths=q_lengths, k_lengths=k_lengths), dict(cu_q=cu_q, cu_k=cu_k)
        _check(q, k, v, attn_mask, alibi_slopes, lengths, bounds, dropout_p, seed)
        self.negated = scale < 0  # the kernels need scale >= 0: the largest product gives the largest score
        if self.negated:
            q, scale = -q, -scale
        self.q, self.k = _with_small_strides(q), _with_small_strides(k)
        self.v = None if v is None else _with_small_strides(v)
        self.packed = cu_q is not None
        self.H, self.T_q, self.D = q.shape[1:]
        self.T_k = k.shape[2]
        self.Hk = k.shape[1]
        self.DV = self.D if v is None else v.shape[3]
        self.B = q.shape[0]
        self.max_q, self.max_k = self.T_q, self.T_k
        if cu_q is not None:
            self.B, self.max_q, self.max_k = cu_q.numel() - 1, max_q, max_k
        self.mask = (
            attn_mask.view(torch.uint8) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
        )
        self.has_bias = self.mask is not None and self.mask.dtype != torch.uint8
        self.acc = torch.float64 if q.dtype == torch.float64 else torch.float32
        right = window_right if window_right >= 0 else FAR
        right = min(right, 0 if causal else FAR)
        left = min(window_left, FAR) if window_left >= 0 else FAR
        tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
        drop = dropout_p > 0
        self.extra = drop or left < FAR or softcap > 0 or v is None
        self.extra |= attn_mask is not None or alibi_slopes is not None
        self.arguments: dict[str, Any] = dict(
            p_q=self.q,
            p_k=self.k,
            p_v=self.v,
            p_mask=self.mask,
            p_slopes=None if alibi_slopes is None else alibi_slopes.float().contiguous(),
            p_q_lengths=_contiguous(q_lengths),
            p_k_lengths=_contiguous(k_lengths),
            p_cu_q=_contiguous(cu_q),
            p_cu_k=_contiguous(cu_k),
            p_seed=seed if drop else None,
            s_q=_strides(self.q),
            s_k=_strides(self.k),
            s_v=_strides(self.v),
            s_m=_mask_strides(self.mask),
            s_slope=self.H if alibi_slopes is not None and alibi_slopes.dim() == 2 and alibi_slopes.shape[0] > 1 else 0,
            B=self.B,
            H=self.H,
            G=self.H // max(self.Hk, 1),
            T_q=self.T_q,
            T_k=self.T_k,
            T_mq=self.max_q,
            T_mk=self.max_k,
            scale=_float64_bits(scale),
            cap=_float64_bits(softcap),
            left=left,
            right=right,
            lower_right=int(causal == 2),
            threshold=_signed(min(round(dropout_p * 2**32), 2**32 - 1)),
            rescale=_float64_bits(1 / (1 - dropout_p) if dropout_p < 1 else 0.0),
            LEFT=left < FAR,
            RIGHT=right < FAR,
            CAP=softcap > 0,
            PRECISION="tf32" if tf32 else "ieee",
        )
        sizes = columns(FORWARD, q.dtype, self.D, self.DV)
        self.chunks = triton.cdiv(self.D, sizes["BD"]), triton.cdiv(self.DV, sizes["BDV"])

    def choose(self, kernel: str) -> Config:
        extra = self.extra or (kernel == KEYS and self.packed and self.Hk != self.H)
        return config(kernel, self.q.dtype, self.D, self.DV, extra, shared_memory(self.q.device))

    def launch(self, kernel: Any, kind: str, programs: int, chunks: int, **arguments: Any) -> None:
        if programs:
            every = self.arguments | arguments | self.choose(kind)._asdict()
            every |= columns(kind, self.q.dtype, self.D, self.DV)
            names = (*kernel.arg_names, "num_warps", "num_stages")
            with torch.cuda.device_of(self.q):
                kernel[(programs, chunks)](**{name: every[name] for name in names})

    def by_rows(self, BM: int) -> tuple[int, int]:
        """Blocks of queries of a head, and programs."""
        blocks = max(triton.cdiv(self.max_q, BM), 1) if self.T_q else 0
        return blocks, blocks * self.H * (self.B + self.packed)

    def by_keys(self, BN: int) -> tuple[int, int]:
        """Blocks of keys of a head, and programs."""
        blocks = max(triton.cdiv(self.max_k, BN), 1) if self.T_k else 0
        return blocks, blocks * self.Hk * (self.B + self.packed)

    def normaliser(self, lse: Tensor) -> dict[str, Tensor | None]:
        """p_lse and p_rest of the kernels that compute the weights again, see attention_normaliser_kernel."""
        if not self.has_bias:
            return dict(p_lse=lse, p_rest=None)
        base, rest = torch.empty_like(lse), torch.empty_like(lse)
        chosen = self.choose(TILES)
        blocks, _ = self.by_rows(chosen.BM)
        here = dict(p_lse=lse, p_base=base, p_rest=rest, blocks=blocks)
        self.launch(attention_normaliser_kernel, TILES, blocks * self.H * self.B, 1, **here)
        return dict(p_lse=base, p_rest=rest)

    def mask_gradient(
        self, sums: dict[str, Tensor | None], delta: Tensor | None, dout: Tensor | None, dw: Tensor | None
    ) -> Tensor:
        """The gradient of a mask whose elements several scores share; any other comes with dq, from the rows kernel."""
        mask = self.mask
        assert mask is not None
        chosen = self.choose(TILES)
        shape = (self.B, self.H, triton.cdiv(self.max_q, chosen.BM), triton.cdiv(self.max_k, chosen.BN))
        shared = [max(n, 1) if size == 1 else 1 for n, size in zip(shape, mask.shape)]
        tiles = functools.reduce(int.__mul__, (n // s for n, s in zip(shape, shared)))
        work = functools.reduce(int.__mul__, shared)
        if not tiles * work:
            return torch.zeros_like(mask, memory_format=torch.contiguous_format)
        parts = min(work, triton.cdiv(PROGRAMS, tiles))
        part_size = triton.cdiv(work, parts)
        parts = triton.cdiv(work, part_size)
        partial = torch.empty(parts, *mask.shape, dtype=mask.dtype if parts == 1 else self.acc, device=mask.device)
        self.launch(
            attention_mask_gradient_kernel,
            TILES,
            parts * tiles,
            1,
            **sums,
            p_dout=dout,
            s_o=_strides(dout),
            p_delta=delta,
            p_dw=dw,
            p_dmask=partial,
            blocks=shape[3] // shared[3],
            **dict(zip(("n_b", "n_h", "n_q", "n_k"), shared)),
            part_size=part_size,
            tiles=tiles,
            SHARED_Q=mask.shape[2] == 1,
            SHARED_K=mask.shape[3] == 1,
        )
        return partial[0] if parts == 1 else partial.sum(0).to(mask.dtype)

    def backward(
        self,
        dout: Tensor | None,
        dlse: Tensor | None,
        out: Tensor | None,
        lse: Tensor,
        dw: Tensor | None,
        need_dmask: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
        """dq, dk, dv, dlse, dmask. For attention from dout and dlse, for the attention weights, without dv, from dw."""
        q, k, v, mask = self.q, self.k, self.v, self.mask
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk = torch.empty(k.shape, dtype=q.dtype, device=q.device)
        dv = None if v is None else torch.empty(v.shape, dtype=q.dtype, device=q.device)
        delta = None if v is None else torch.empty_like(lse)
        dout = None if dout is None else _with_small_strides(dout)
        if v is None:
            dlse = torch.empty_like(lse)
        elif dlse is not None:
            dlse = dlse.to(lse.dtype).contiguous()
        whole = need_dmask and mask is not None and mask.shape == (self.B, self.H, self.max_q, self.max_k)
        dmask = q.new_empty(0)
        if whole and mask is not None:
            dmask = torch.zeros_like(mask, memory_format=torch.contiguous_format)
        sums = self.normaliser(lse)
        common = dict(**sums, p_dout=dout, s_o=_strides(dout), p_delta=delta, p_dw=dw)
        chosen = self.choose(ROWS)
        blocks, programs = self.by_rows(chosen.BM)
        self.launch(
            attention_backward_rows_kernel,
            ROWS,
            programs,
            self.chunks[0],
            **common,
            p_out=out,
            p_dlse=dlse,
            p_dq=dq,
            p_ds=dmask if whole else None,
            blocks=blocks,
        )
        chosen = self.choose(KEYS)
        blocks, programs = self.by_keys(chosen.BN)
        self.launch(
            attention_backward_keys_kernel,
            KEYS,
            programs,
            max(self.chunks),
            **common,
            p_dk=dk,
            p_dv=dv,
            blocks=blocks,
            GROUPED=self.Hk != self.H,
        )
        if need_dmask and not whole:
            dmask = self.mask_gradient(sums, delta, dout, dw)
        return dq.neg_() if self.negated else dq, dk, dv, dlse, dmask


def _strides(t: Tensor | None) -> Strides:
    return Strides(0, 0, 0, 0) if t is None else Strides(*t.stride())


def _mask_strides(mask: Tensor | None) -> MaskStrides:
    if mask is None:
        return MaskStrides(0, 0, 0, 0)
    return MaskStrides(*(0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride())))


def _contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _signed(x: int) -> int:
    """The int32 of the same bits as a uint32, so that the argument has one type."""
    return x - 2**32 if x >= 2**31 else x


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    keep_low: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op seqkernels::attention_forward. No gradient is recorded.

    Args:
        q: [B, H, Tq, D], with any strides; packed, with cu_q and cu_k: [1, H, Nq, D].
        k: [B, Hk, Tk, D], H a multiple of Hk. v: [B, Hk, Tk, Dv].
        attn_mask: [B or 1, H or 1, Tq or 1, Tk or 1], bool (True: attend) or q's dtype (added to the scores). None for
            packed rows.
        alibi_slopes: float32 [H] or [B, H].
        q_lengths, k_lengths: int32 or int64 [B]; None for packed rows. cu_q, cu_k: int32 or int64 [B + 1]. Clamped to
            the rows of the tensors.
        causal: 0 no, 1 aligned to the upper left corner, 2 to the lower right. window_left, window_right: -1 for none.
        seed: int64 [1], with dropout. keep_low: ignored; the products of backward take half types as they are.
    Returns:
        out: [B, H, Tq, Dv], dtype of q. lse: [B, H, Tq] float32, or float64 for float64. out_low: empty.
    Deterministic: yes.
    """
    call = _Call(
        *(q, k, v, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=call.acc, device=q.device)
    chosen = call.choose(FORWARD)
    blocks, programs = call.by_rows(chosen.BM)
    call.launch(attention_forward_kernel, FORWARD, programs, call.chunks[1], p_out=out, p_lse=lse, blocks=blocks)
    return out, lse, q.new_empty(0)


def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    need_dmask: bool,
    out_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op seqkernels::attention_backward: dq, dk, dv, and dmask, empty if it is not needed.

    Args:
        dout: [B, H, Tq, Dv]. dlse: [B, H, Tq] or None. The others: arguments and results of forward;
            out_low is not read.
    Deterministic: yes.
    """
    call = _Call(
        *(q, k, v, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    _require_shape("dout", dout, (*q.shape[:3], call.DV), q.dtype)
    _require_shape("out", out, (*q.shape[:3], call.DV), q.dtype)
    _require_shape("lse", lse, tuple(q.shape[:3]), call.acc)
    _require_shape("dlse", dlse, tuple(q.shape[:3]), call.acc)
    _require(not need_dmask or call.has_bias, "need_dmask", "be False where there is no float attn_mask", need_dmask)
    dq, dk, dv, _, dmask = call.backward(dout, dlse, out.contiguous(), lse.contiguous(), None, need_dmask)
    assert dv is not None
    return dq, dk, dv, dmask


def attention_weights(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    lse: Tensor,
) -> Tensor:
    """The op seqkernels::attention_weights: [B, H, Tq, Tk], dtype of q. Packed rows are not supported."""
    call = _Call(
        *(q, k, None, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    _require_shape("lse", lse, tuple(q.shape[:3]), call.acc)
    weights = torch.empty(call.B, call.H, call.max_q, call.max_k, dtype=q.dtype, device=q.device)
    chosen = call.choose(TILES)
    blocks = triton.cdiv(call.max_k, chosen.BN)
    programs = call.B * call.H * triton.cdiv(call.max_q, chosen.BM) * blocks
    sums = call.normaliser(lse.contiguous())
    call.launch(attention_weights_kernel, TILES, programs, 1, **sums, p_w=weights, blocks=blocks)
    return weights


def attention_weights_backward(
    dweights: Tensor,
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    q_lengths: Tensor | None,
    k_lengths: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    scale: float,
    causal: int,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    seed: Tensor | None,
    lse: Tensor,
    need_dmask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op seqkernels::attention_weights_backward: dq, dk, dlse, and dmask, empty if it is not needed."""
    call = _Call(
        *(q, k, None, attn_mask, alibi_slopes, q_lengths, k_lengths, cu_q, cu_k, max_q, max_k),
        *(scale, causal, window_left, window_right, softcap, dropout_p, seed),
    )
    _require_shape("dweights", dweights, (*q.shape[:3], k.shape[2]), q.dtype)
    _require_shape("lse", lse, tuple(q.shape[:3]), call.acc)
    _require(not need_dmask or call.has_bias, "need_dmask", "be False where there is no float attn_mask", need_dmask)
    dq, dk, _, dlse, dmask = call.backward(None, None, None, lse.contiguous(), dweights.contiguous(), need_dmask)
    assert dlse is not None
    return dq, dk, dlse, dmask
