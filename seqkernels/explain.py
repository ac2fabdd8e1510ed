"""`explain`: the kernel that runs an operator and its work partition. All numbers come from seqkernels._C, or from the
launchers of Triton kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _C
from .backend import (
    ADDITIVE_ATTENTION,
    ATTENTION,
    CRF,
    CTC,
    EMBEDDING_BAG,
    RECURRENT,
    Implementations,
    Request,
    choose,
    unsupported,
)
from .functional._autograd import allows_tf32
from .functional._recurrent_kinds import ALIASES, KINDS, Kind, family_of

_BAG, _ATTENTION = "embedding_bag", "scaled_dot_product_attention"
_ADDITIVE, _CTC = "additive_attention", "ctc_loss"
_MODES = ("sum", "mean", "max", "min")
_CRF = tuple(f"crf_{name}" for name in ("log_partition", "log_likelihood", "marginals", "entropy", "viterbi"))


def explain(
    op: str,
    *,
    B: int | None = None,
    T: int | None = None,
    D: int | None = None,
    H: int | None = None,
    proj_size: int | None = None,
    num_heads: int | None = None,
    bidirectional: bool | None = None,
    lengths: Sequence[int] | None = None,
    options: Sequence[str] | None = None,
    capability: tuple[int, int] | None = None,
    multiprocessors: int | None = None,
    shared_memory: int | None = None,
    E: int | None = None,
    N: int | None = None,
    mode: str | None = None,
    Hq: int | None = None,
    Hk: int | None = None,
    Tq: int | None = None,
    Tk: int | None = None,
    Dv: int | None = None,
    is_causal: bool | None = None,
    masked: bool | None = None,
    extras: Sequence[str] | None = None,
    K: int | None = None,
    by_step: bool | None = None,
    nbest: int | None = None,
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Reports the kernel that runs an operator for given sizes, and its work partition.

    Args:
        op: a recurrent layer: lstm, lstm_coupled, lstm_norm, nested_lstm, slstm, slstm_exp, gru, gru_before, gru_norm,
            gru_projected, dreamer_gru, mgu, mgu_after, rnn_tanh or rnn_relu; or embedding_bag; or
            scaled_dot_product_attention or additive_attention; or crf_log_partition, crf_log_likelihood, crf_marginals,
            crf_entropy or crf_viterbi; or ctc_loss. The name of a module selects the kind of its default options; rnn
            is rnn_tanh.
        dtype, device: of the input.
    Args of recurrent layers:
        T, B, D, H: steps, sequences, input size, hidden size.
        proj_size=0, num_heads=1, bidirectional=False: as in the modules.
        lengths: [B] valid steps of each sequence; T by default. Only the CPU plan depends on them.
        options: names of the options in use, such as "peephole", "zoneout_h", "reset" or "memory_efficient". Dropout
            counts in training only. Options that select a kind, such as layer_norm, are part of `op`.
        capability=(9, 0), multiprocessors=132, shared_memory=232448: describe a CUDA device, which need not be
            present; shared_memory is the maximum in bytes per block. Default: the current device.
    Args of embedding_bag:
        E, D, N, B: table rows, columns, indices, bags.
        mode="mean": sum, mean, max or min.
    Args of scaled_dot_product_attention:
        B, Hq, Tq, Tk, D, Hk=Hq, Dv=D, is_causal=False, backend: as in the function.
        masked=False: whether the call has a mask or dropout.
        extras: names of other arguments in use: lengths, causal_alignment, window, softcap, alibi_slopes, return_lse,
            return_weights, cu_seqlens.
    Args of additive_attention:
        B, Tq, Tk, H, backend.
    Args of ctc_loss:
        T, B, K, backend: steps, sequences, classes.
    Args of conditional random fields:
        T, B, K: steps, sequences, tags.
        by_step=False: whether each step has its own transitions.
        nbest, backend: as in the functions.
    Returns:
        kernel: the implementation that runs: cpu, cuda or triton; for attention cpu, triton or torch.
        unsupported: for each other implementation, the reasons why it does not run.
        On a CPU: isa, the instruction set, and threads, the number of threads in use.
            Layers: row_groups (groups of independent sequences) x unit_groups (groups of hidden units, with a barrier
            at each step) x directions.
            Attention: tasks, the work items distributed over threads; block, the queries and keys of a tile.
        Layers on CUDA: forward and backward, each with
            tier: cluster or grid, one launch for all steps; steps, one launch per step; none.
            reasons: why the preceding tiers do not run.
            grid, block, shared_bytes: of the launch.
            cluster: blocks per cluster, or per team in the grid tier, where `teams` teams share a direction.
            rows: sequences per cluster or team.
            workspace: bytes.
        Layers in Triton: forward and backward, each with
            tier: layer, one launch for all steps; steps, one launch per step.
            reasons, grid: as on CUDA.
            rows: sequences per program. warps: warps per program.
        Additive attention in Triton: warps; tile, the queries, keys and hidden units of a program.
        Conditional random fields in Triton: grid, one program per sequence; warps; tile, the rows and columns of
            transitions per tile; resident, whether the transitions stay in registers for all steps.
    Raises:
        ValueError: unknown op, option or mode; a size out of range; an incomplete or missing description of a device.
        TypeError: a required size is missing, an argument does not apply to the op, or has another type.
        NotImplementedError: no implementation supports the inputs.
    """
    given: dict[str, Any] = {
        name: value
        for name, value in dict(
            B=B, T=T, D=D, H=H, proj_size=proj_size, num_heads=num_heads, bidirectional=bidirectional, lengths=lengths,
            options=options, capability=capability, multiprocessors=multiprocessors, shared_memory=shared_memory, E=E,
            N=N, mode=mode, Hq=Hq, Hk=Hk, Tq=Tq, Tk=Tk, Dv=Dv, is_causal=is_causal, masked=masked, extras=extras,
            K=K, by_step=by_step, nbest=nbest, backend=backend,
        ).items()
        if value is not None
    }  # fmt: skip
    kind = KINDS.get(ALIASES.get(op, op))
    if kind is None and op not in _SIZES:
        names = ", ".join((*KINDS, *ALIASES, *_SIZES))
        raise ValueError(f"explain: op must be one of {names}, got {op!r}")
    needed, optional = _SIZES.get(op, _OF_LAYERS)
    for name in needed:
        if name not in given:
            raise TypeError(f"explain: {name} must be given for {op}, got {', '.join(given) or 'none'}")
    for name in given:
        if name not in needed and name not in optional:
            raise TypeError(f"explain: {name} must be absent for {op}, got {given[name]!r}")
    _check_values(op, given, dtype)
    where = torch.device(device)
    if kind is not None:
        return {"op": kind.name, **_explain_recurrent(kind, dtype=dtype, device=where, **given)}
    if op == _BAG:
        return {"op": op, **_explain_embedding_bag(dtype=dtype, device=where, **given)}
    if op == _ADDITIVE:
        return {"op": op, **_explain_additive_attention(dtype=dtype, device=where, **given)}
    if op == _CTC:
        return {"op": op, **_explain_ctc(dtype=dtype, device=where, **given)}
    if op in _CRF:
        return {"op": op, **_explain_crf(op, dtype=dtype, device=where, **given)}
    return {"op": op, **_explain_attention(dtype=dtype, device=where, **given)}


_OF_LAYERS = (
    ("T", "B", "D", "H"),
    (
        *("proj_size", "num_heads", "bidirectional", "lengths", "options"),
        *("capability", "multiprocessors", "shared_memory"),
    ),
)
_SIZES = {
    _BAG: (("E", "D", "N", "B"), ("mode",)),
    _ATTENTION: (("B", "Hq", "Tq", "Tk", "D"), ("Hk", "Dv", "is_causal", "masked", "extras", "backend")),
    _ADDITIVE: (("B", "Tq", "Tk", "H"), ("backend",)),
    _CTC: (("T", "B", "K"), ("backend",)),
    **dict.fromkeys(_CRF, (("B", "T", "K"), ("by_step", "backend"))),
    "crf_viterbi": (("B", "T", "K"), ("by_step", "nbest", "backend")),
}


_LEAST = {"H": 1, "num_heads": 1, "Hq": 1, "Hk": 1, "K": 1, "nbest": 1}  # of sizes; 0 for the others
_INTEGERS = (
    *("T", "B", "D", "H", "E", "N", "K", "proj_size", "num_heads", "Hq", "Hk", "Tq", "Tk", "Dv", "nbest"),
    *("multiprocessors", "shared_memory"),
)
_EXTRAS = (
    "lengths",
    "causal_alignment",
    "window",
    "softcap",
    "alibi_slopes",
    "return_lse",
    "return_weights",
    "cu_seqlens",
)


def _check_values(op: str, given: dict[str, Any], dtype: Any) -> None:
    """Checks the types of all arguments, and the range of sizes."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"explain: dtype must be a torch.dtype, got {dtype!r}")
    for name, value in given.items():
        if name in _INTEGERS:
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"explain: {name} must be an integer, got {value!r}")
            if value < _LEAST.get(name, 0):
                raise ValueError(f"explain: {name} must be at least {_LEAST.get(name, 0)}, got {value}")
        elif name in ("bidirectional", "is_causal", "masked", "by_step") and not isinstance(value, bool):
            raise TypeError(f"explain: {name} must be a bool, got {value!r}")
        elif name == "lengths":
            if not isinstance(value, (list, tuple)) or not all(isinstance(n, int) for n in value):
                raise TypeError(f"explain: lengths must be a sequence of integers, got {value!r}")
            wrong = [n for n in value if not 0 <= n <= given["T"]]
            if wrong:
                raise ValueError(f"explain: lengths must lie in [0, T] = [0, {given['T']}], got {wrong[0]}")
        elif name == "capability" and not (
            isinstance(value, tuple) and len(value) == 2 and all(isinstance(n, int) for n in value)
        ):
            raise TypeError(f"explain: capability must be a pair of integers, such as (9, 0), got {value!r}")
        elif name == "extras":
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"explain: extras must be a sequence of names, got {value!r}")
            for extra in value:
                if extra not in _EXTRAS:
                    raise ValueError(f"explain: extras of {op} must be some of {', '.join(_EXTRAS)}, got {extra!r}")


def _answer(implementations: Implementations, request: Request, kernel: str, plan: Any) -> dict[str, Any]:
    reasons = unsupported(implementations, request)
    return {"kernel": kernel, **plan, "unsupported": {name: why for name, why in reasons.items() if name != kernel}}


# ---- recurrent layers

_CHOOSE_THE_KIND = ("coupled_gates", "layer_norm", "norm_eps", "reset_after", "num_heads")


def _check_options(kind: Kind, names: Sequence[str]) -> None:
    if isinstance(names, str):
        raise TypeError(f"explain: options must be a sequence of names, got {names!r}")
    known = [*(name for name in family_of(kind).supported if name not in _CHOOSE_THE_KIND), "reset"]
    for name in names:
        if name not in known:
            raise ValueError(f"explain: options of {kind.name} must be some of {', '.join(known)}, got {name!r}")


def _explain_recurrent(
    kind: Kind,
    *,
    T: int,
    B: int,
    D: int,
    H: int,
    dtype: torch.dtype,
    device: torch.device,
    proj_size: int = 0,
    num_heads: int = 1,
    bidirectional: bool = False,
    lengths: Sequence[int] | None = None,
    options: Sequence[str] = (),
    capability: tuple[int, int] | None = None,
    multiprocessors: int | None = None,
    shared_memory: int | None = None,
) -> dict[str, Any]:
    _check_options(kind, options)
    if H % num_heads:
        raise ValueError(f"explain: num_heads must divide H, {H}, got {num_heads}")
    if lengths is not None and len(lengths) != B:
        raise ValueError(f"explain: lengths must hold B = {B} numbers, got {len(lengths)}")
    request = Request(device, dtype)
    kernel = choose(f"explain: {kind.name}", RECURRENT, request, what="a layer")
    if kernel == "triton":  # the plan of the CUDA kernels has their reasons; those of the CPU support every layer
        request = Request(device, dtype, (kind, num_heads, proj_size > 0))
        kernel = choose(f"explain: {kind.name}", RECURRENT, request, what="a layer")
        if capability is not None and capability < (8, 0):
            raise NotImplementedError(f"explain: {kind.name}: compute capability must be 8.0 or more, got {capability}")
    described = capability, multiprocessors, shared_memory
    directions = 2 if bidirectional else 1
    if kernel == "cpu":
        if described != (None, None, None):
            raise ValueError(f"explain: a description must be of a CUDA device, got one for {device}")
        tokens = T * B if lengths is None else sum(lengths)
        plan = _C.explain_recurrent(
            kind=kind.name, T=T, B=B, N=tokens, D=D, H=H, P=proj_size or H, directions=directions,
            heads=num_heads, float64=dtype == torch.float64,
        )  # fmt: skip
        return _answer(RECURRENT, request, kernel, plan)
    if kernel == "triton":
        shared = _described_memory(described, device, dtype)
        plan = _explain_in_triton(kind, dtype, B, H, directions, options, shared)
        return _answer(RECURRENT, request, kernel, plan)
    wanted: dict[str, Any] = dict(kind=kind.name, dtype=str(dtype).removeprefix("torch."), T=T, B=B, D=D, H=H)
    wanted.update(P=proj_size, directions=directions, heads=num_heads, options=list(options))
    wanted["tf32"] = dtype == torch.float32 and allows_tf32(torch.backends.cudnn.rnn)
    if capability is not None and multiprocessors is not None and shared_memory is not None:
        major, minor = capability
        if min(major, multiprocessors, shared_memory) < 1:
            raise ValueError(
                "explain: capability, multiprocessors and shared_memory must be above 0, got "
                f"{capability}, {multiprocessors} and {shared_memory}"
            )
        wanted.update(major=major, minor=minor, multiprocessors=multiprocessors, shared_bytes=shared_memory)
        return _answer(RECURRENT, request, kernel, _C.explain_recurrent_cuda(**wanted))
    if described != (None, None, None) or not torch.cuda.is_available():
        why = "together" if described != (None, None, None) else "where there is no CUDA device"
        raise ValueError(
            f"explain: capability, multiprocessors and shared_memory must be given {why}, got "
            f"{capability}, {multiprocessors} and {shared_memory}"
        )
    with torch.cuda.device(device):
        return _answer(RECURRENT, request, kernel, _C.explain_recurrent_cuda(**wanted))


def _described_memory(described: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> int:
    """Shared memory in bytes per Triton program on the described or the current device; 0 for float64, as in launch."""
    if None not in described:
        return 0 if dtype == torch.float64 else int(described[2])
    if described != (None, None, None) or not torch.cuda.is_available():
        why = "together" if described != (None, None, None) else "where there is no CUDA device"
        raise ValueError(
            f"explain: capability, multiprocessors and shared_memory must be given {why}, got "
            f"{described[0]}, {described[1]} and {described[2]}"
        )
    from .triton.recurrent import launch  # imports Triton

    return launch.shared_memory(device, dtype)


def _explain_in_triton(
    kind: Kind, dtype: torch.dtype, B: int, H: int, directions: int, options: Sequence[str], shared: int
) -> dict[str, Any]:
    from .triton.recurrent import launch  # imports Triton

    tier, reasons, chosen = launch.tier(kind.name, dtype, H, options, shared)
    plan: dict[str, Any] = {"tier": tier, "reasons": {} if tier == "layer" else {"layer": reasons}}
    if chosen is None:
        plan["grid"] = (B, -(-H // launch.BU))
    else:
        plan |= {"grid": (-(-B // chosen.BB), directions), "rows": chosen.BB, "warps": chosen.num_warps}
    return {"forward": plan, "backward": plan}


# ---- other operators


def _explain_embedding_bag(
    *, E: int, D: int, N: int, B: int, dtype: torch.dtype, device: torch.device, mode: str = "mean"
) -> dict[str, Any]:
    if mode not in _MODES:
        raise ValueError(f"explain: mode must be one of {', '.join(_MODES)}, got {mode!r}")
    request = Request(device, dtype)
    kernel = choose(f"explain: {_BAG}", EMBEDDING_BAG, request, what="a table")
    plan = _C.explain_embedding_bag(N=N, B=B, D=D, element_size=dtype.itemsize) if kernel == "cpu" else {}
    return _answer(EMBEDDING_BAG, request, kernel, plan)


def _explain_attention(
    *,
    B: int,
    Hq: int,
    Tq: int,
    Tk: int,
    D: int,
    dtype: torch.dtype,
    device: torch.device,
    Hk: int | None = None,
    Dv: int | None = None,
    is_causal: bool = False,
    masked: bool = False,
    extras: Sequence[str] = (),
    backend: str | None = None,
) -> dict[str, Any]:
    request = Request(device, dtype, None, extras, masked or Dv not in (None, D))
    Hk = Hq if Hk is None else Hk
    if Hk < 1 or Hq % Hk:
        raise ValueError(f"explain: Hq must be a multiple of Hk, got {Hq} and {Hk}")
    kernel = choose(f"explain: {_ATTENTION}", ATTENTION, request, backend, "a query")
    plan: dict[str, Any] = {}
    if kernel == "cpu":
        found = _C.explain_attention(B=B, Hq=Hq, Hk=Hk, Tq=Tq, Tk=Tk, D=D, Dv=D if Dv is None else Dv)
        plan = {name: found[name] for name in ("isa", "block", "keys", "threads")} | {"tasks": found["unit"]}
    elif kernel == "torch" and device.type == "cuda" and backend is None:
        plan = {"why": "dense inputs of a half type: torch's cuDNN or flash kernels; backend='triton' selects ours"}
    return _answer(ATTENTION, request, kernel, plan)


def _explain_crf(
    op: str,
    *,
    B: int,
    T: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    by_step: bool = False,
    nbest: int = 1,
    backend: str | None = None,
) -> dict[str, Any]:
    request = Request(device, dtype)
    kernel = choose(f"explain: {op}", CRF, request, backend, "emissions")
    plan: dict[str, Any] = {"isa": _C.build_info()["isa"]}
    if kernel == "triton":
        from .triton.crf import config  # imports Triton

        chosen = config(K, dtype == torch.float64 or op == "crf_entropy", nbest > 1)
        resident = chosen.whole and not by_step and nbest == 1
        plan = dict(grid=(B,), warps=chosen.num_warps, tile=(chosen.BK, chosen.BJ), resident=resident)
    return _answer(CRF, request, kernel, plan)


def _explain_additive_attention(
    *, B: int, Tq: int, Tk: int, H: int, dtype: torch.dtype, device: torch.device, backend: str | None = None
) -> dict[str, Any]:
    request = Request(device, dtype)
    kernel = choose(f"explain: {_ADDITIVE}", ADDITIVE_ATTENTION, request, backend, "a query")
    plan: dict[str, Any] = {"isa": _C.build_info()["isa"]}
    if kernel == "triton":
        from .triton.additive_attention import launch  # imports Triton

        plan = {"warps": launch.WARPS, "tile": tuple(launch.pair_tile(Tq, dtype == torch.float64))}
    return _answer(ADDITIVE_ATTENTION, request, kernel, plan)


def _explain_ctc(
    *, T: int, B: int, K: int, dtype: torch.dtype, device: torch.device, backend: str | None = None
) -> dict[str, Any]:
    request = Request(device, dtype)
    kernel = choose(f"explain: {_CTC}", CTC, request, backend, "log_probs")
    return _answer(CTC, request, kernel, {"isa": _C.build_info()["isa"]})
