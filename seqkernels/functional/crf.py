"""Linear-chain conditional random fields: log Z, likelihood, marginals, entropy and the best paths.

All functions take the same scores: emissions [B, T, K], transitions, and optionally start_transitions and
end_transitions. The score of a path y of a sequence of n steps is

    start[y_0] + sum_t emissions[t, y_t] + sum_{t > 0} transitions[y_t-1, y_t] + end[y_n-1],

and the probability of a path is e^score / Z. Scores of -inf forbid a tag or a pair of tags.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .. import backend as backends
from ..reference.crf import steps_of
from ._checks import Lengths, describe, lengths_tensor, of_op
from ._crf_ops import OPS, Chain, Ops, log_partition
from ._crf_ops import marginals as _marginals
from ._overrides import (
    dispatches,
    handle_torch_function,
    has_torch_function_variadic,
    refuse_nested,
)

Reduction = Literal["none", "sum", "mean", "token_mean"]
REDUCTIONS = ("none", "sum", "mean", "token_mean")


def crf_log_partition(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """log Z of each sequence: the logarithm of the sum of e^score over all paths.

    Args:
        emissions: [B, T, K] float32, float64, bfloat16 or float16; gradient: yes. Also [T, K].
        transitions: [K, K] from and to; or [T, K, K] or [B, T, K, K], whose row t is for the step into t (row 0 is
            unused). Gradient: yes.
        start_transitions, end_transitions: [K] scores of the first and the last tag. Gradient: yes.
        lengths: [B] number of steps of each sequence, in any order, from 0: a tensor of integers or a sequence of int.
        mask: [B, T] bool or uint8, the steps of each sequence; excluded steps are skipped wherever they are, and their
            emissions are not read. At most one of lengths and mask.
        backend: "cpu" or "triton"; None selects one, see seqkernels.explain.
    Returns:
        [B] of the dtype of emissions, float32 for half types; [] for emissions [T, K]. 0 for a sequence without steps;
        -inf, with a zero gradient, where every path is forbidden. The sum over the steps is in float64.
    Raises:
        ValueError: invalid shape, length or value.
        TypeError: invalid type or dtype.
        NotImplementedError: no implementation supports the inputs; the message lists the reasons.
    On a GPU, values of lengths and tags are not read before the launch: lengths are clamped to [0, T], and a tag out of
        range makes the likelihood NaN. With the environment variable SEQKERNELS_CHECKED they raise.
    Deterministic: yes; the bits of a sequence do not depend on the batch, padding or threads.
    Source: Lafferty, McCallum and Pereira, "Conditional Random Fields", 2001.
    """
    caller = "crf_log_partition"
    scores = emissions, transitions, start_transitions, end_transitions
    if has_torch_function_variadic(*scores) and dispatches(*scores):
        return handle_torch_function(crf_log_partition, scores, *scores, lengths=lengths, mask=mask, backend=backend)
    ops, chain, single = _chain(
        caller, emissions, transitions, start_transitions, end_transitions, lengths, mask, None, backend
    )
    return _restored(_scores(caller, ops, chain)[0], chain, single)


def crf_log_likelihood(
    emissions: Tensor,
    tags: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "sum",
    backend: str | None = None,
) -> Tensor:
    """Log probability of given tags.

    Args:
        tags: [B, T] int64, from 0 to K - 1 at the steps of a sequence; other values are not read.
        reduction: none, sum, mean over sequences, or token_mean, the sum divided by the number of steps.
        Others: as in crf_log_partition.
    Returns:
        [B] with reduction="none", else []; dtype as in crf_log_partition. The difference of the score and log Z is
        taken in float64; NaN where every path is forbidden.
    Raises: as crf_log_partition; ValueError for a tag out of range.
    Deterministic: yes.
    """
    caller = "crf_log_likelihood"
    scores = emissions, tags, transitions, start_transitions, end_transitions
    if has_torch_function_variadic(*scores) and dispatches(*scores):
        return handle_torch_function(
            crf_log_likelihood, scores, *scores, lengths=lengths, mask=mask, reduction=reduction, backend=backend
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"{caller}: reduction must be {', '.join(REDUCTIONS)}, got {reduction!r}")
    if not isinstance(tags, Tensor):
        raise TypeError(f"{caller}: tags must be a tensor, got {describe(tags)}")
    ops, chain, single = _chain(
        caller, emissions, transitions, start_transitions, end_transitions, lengths, mask, tags, backend
    )
    log_z, score = _scores(caller, ops, chain)
    likelihood = score - log_z
    if reduction == "none":
        return _restored(likelihood, chain, single)
    total = likelihood.mean() if reduction == "mean" else likelihood.sum()
    if reduction == "token_mean":
        total = total / _steps(chain)
    return _restored(total, chain, False)


def crf_marginals(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Probability of each tag at each step, and the expected number of each transition.

    Args: as in crf_log_partition. Gradients are computed through the reference definition.
    Returns:
        A tuple of two tensors.
        tags: [B, T, K], dtype of emissions, or [T, K]; zeros at excluded steps.
        transitions: of the shape of transitions: sums of the probabilities of pairs of tags over the sequences and
            steps that share a score.
    Raises: as crf_log_partition.
    Deterministic: yes; the sums are taken in an order that depends on B alone.
    """
    caller = "crf_marginals"
    scores = emissions, transitions, start_transitions, end_transitions
    if has_torch_function_variadic(*scores) and dispatches(*scores):
        return handle_torch_function(crf_marginals, scores, *scores, lengths=lengths, mask=mask, backend=backend)
    ops, chain, single = _chain(
        caller, emissions, transitions, start_transitions, end_transitions, lengths, mask, None, backend
    )
    try:
        of_tags, of_pairs, *_ = _marginals(ops, chain)
    except RuntimeError as error:
        raise of_op(caller, error) from None
    return of_tags.squeeze(0) if single else of_tags, of_pairs.reshape(transitions.shape)


def crf_entropy(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy of the distribution over paths of each sequence, in nats.

    Args, Raises: as in crf_log_partition.
    Returns:
        [B], dtype as in crf_log_partition; log Z less the expected score. NaN where every path is forbidden.
    Deterministic: yes.
    """
    caller = "crf_entropy"
    scores = emissions, transitions, start_transitions, end_transitions
    if has_torch_function_variadic(*scores) and dispatches(*scores):
        return handle_torch_function(crf_entropy, scores, *scores, lengths=lengths, mask=mask, backend=backend)
    ops, given, single = _chain(
        caller, emissions, transitions, start_transitions, end_transitions, lengths, mask, None, backend
    )
    B = given.emissions.shape[0]
    # In float64, because log Z and the expected score may be large and close. Each sequence has its own copy of the
    # scores, whose expectations are so not summed over the batch.
    chain = given._replace(
        emissions=given.emissions.double(),
        transitions=given.transitions.double().expand(B, *given.transitions.shape[1:]).contiguous(),
        start=None if given.start is None else given.start.double(),
        end=None if given.end is None else given.end.double(),
    )
    log_z, _ = _scores(caller, ops, chain)
    of_tags, of_pairs, _, _ = _marginals(ops, chain)
    expected = _expectation(of_tags, chain.emissions, (1, 2)) + _expectation(of_pairs, chain.transitions, (1, 2, 3))
    visible = _visible(chain)
    order = visible.cumsum(1)
    ends = (visible & (order == 1), visible & (order == order[:, -1:]))
    for at, of_end in zip(ends, (chain.start, chain.end)):
        if of_end is not None:
            expected = expected + _expectation(torch.where(at[:, :, None], of_tags, 0), of_end, (1, 2))
    entropy = torch.where(log_z == -torch.inf, torch.nan, log_z - expected)
    return _restored(entropy, given, single)


def crf_viterbi(
    emissions: Tensor,
    transitions: Tensor,
    start_transitions: Tensor | None = None,
    end_transitions: Tensor | None = None,
    *,
    lengths: Lengths | None = None,
    mask: Tensor | None = None,
    nbest: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The best paths of each sequence.

    Args:
        nbest: number of paths, in descending order of scores; None for the best one, without a dimension of its own.
            The time grows with its square.
        Others: as in crf_log_partition.
    Returns:
        tags: [B, T] int64, or [B, nbest, T]; -1 at excluded steps and in paths that do not exist.
        scores: [B] or [B, nbest], dtype as in crf_log_partition; -inf for paths that do not exist, and NaN, without
            tags, for a sequence with a score of NaN or infinity. Gradient: no.
    Raises: as crf_log_partition.
    Deterministic: yes; of equal paths, the one with the smaller tag at the last step where they differ comes first.
    Source: Viterbi, "Error Bounds for Convolutional Codes", 1967; Soong and Huang, "A Tree-Trellis Based Fast Search",
        1991.
    """
    caller = "crf_viterbi"
    scores = emissions, transitions, start_transitions, end_transitions
    if has_torch_function_variadic(*scores) and dispatches(*scores):
        return handle_torch_function(
            crf_viterbi, scores, *scores, lengths=lengths, mask=mask, nbest=nbest, backend=backend
        )
    if nbest is not None and (not isinstance(nbest, int) or not 1 <= nbest < 2**31):
        raise ValueError(f"{caller}: nbest must be an int from 1 to 2^31 - 1, got {nbest!r}")
    ops, chain, single = _chain(
        caller, emissions, transitions, start_transitions, end_transitions, lengths, mask, None, backend
    )
    plain = (None if t is None else t.detach() for t in chain[:-1])
    try:
        tags, scores = ops.viterbi(*plain, 1 if nbest is None else nbest)
    except RuntimeError as error:
        raise of_op(caller, error) from None
    scores = scores.to(_result_dtype(chain))
    if nbest is None:
        tags, scores = tags.squeeze(1), scores.squeeze(1)
    return (tags.squeeze(0), scores.squeeze(0)) if single else (tags, scores)


# ---- arguments and results


def _chain(
    caller: str,
    emissions: Tensor,
    transitions: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    lengths: Lengths | None,
    mask: Tensor | None,
    tags: Tensor | None,
    backend: str | None,
) -> tuple[Ops, Chain, bool]:
    """The ops that run the call, their checked arguments, and whether emissions have no dimension of sequences."""
    if not isinstance(emissions, Tensor):
        raise TypeError(f"{caller}: emissions must be a tensor, got {describe(emissions)}")
    refuse_nested(caller, "pad it, and pass lengths", emissions=emissions)
    request, ops = backends.Request(emissions.device, emissions.dtype), OPS["cpu"]
    if emissions.device.type != "meta" or backend is not None or emissions.dtype not in backends.DTYPES:
        ops = OPS[backends.choose(caller, backends.CRF, request, backend, "emissions", emissions.shape)]
    single = emissions.dim() == 2
    if single:
        emissions = emissions.unsqueeze(0)
        tags = None if tags is None else tags.unsqueeze(0)
        mask = mask.unsqueeze(0) if isinstance(mask, Tensor) and mask.dim() == 1 else mask
    if emissions.dim() != 3 or emissions.shape[2] < 1:
        raise ValueError(f"{caller}: emissions must have shape [B, T, K] or [T, K], got {list(emissions.shape)}")
    B, T, K = emissions.shape
    for name, t in (
        ("transitions", transitions),
        ("start_transitions", start),
        ("end_transitions", end),
    ):
        if t is None and name != "transitions":
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{caller}: {name} must be a tensor, got {describe(t)}")
        if t.dtype != emissions.dtype:
            raise TypeError(f"{caller}: {name} must be of the dtype of emissions {emissions.dtype}, got {t.dtype}")
        if t.device != emissions.device:
            raise ValueError(f"{caller}: {name} must be on the device of emissions {emissions.device}, got {t.device}")
        if name != "transitions" and tuple(t.shape) != (K,):
            raise ValueError(f"{caller}: {name} must have shape [K] = [{K}], got {list(t.shape)}")
    shape = tuple(transitions.shape)
    if shape not in ((K, K), (T, K, K), (B, T, K, K)):
        raise ValueError(
            f"{caller}: transitions must have shape [K, K], [T, K, K] or [B, T, K, K], of B = {B}, T = {T} and "
            f"K = {K}, got {list(shape)}"
        )
    pairs = transitions.reshape(*(1,) * (4 - len(shape)), *shape)
    if lengths is not None and mask is not None:
        raise ValueError(f"{caller}: lengths and mask must not be given together")
    if lengths is not None:
        lengths = lengths_tensor(caller, lengths, B, emissions.device)
    if mask is not None:
        mask = _mask(caller, mask, (B, T), emissions.device)
    if tags is not None:
        if tags.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise TypeError(f"{caller}: tags must be int64 or another integer type, got {tags.dtype}")
        if tuple(tags.shape) != (B, T):
            raise ValueError(f"{caller}: tags must have shape [B, T] = [{B}, {T}], got {list(tags.shape)}")
        if tags.device != emissions.device:
            raise ValueError(f"{caller}: tags must be on the device of emissions {emissions.device}, got {tags.device}")
        tags = tags.long()
    return ops, Chain(emissions, pairs, start, end, lengths, mask, tags), single


def _mask(caller: str, mask: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{caller}: mask must be a tensor, got {describe(mask)}")
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{caller}: mask must be bool or uint8, got {mask.dtype}")
    if tuple(mask.shape) != shape:
        raise ValueError(f"{caller}: mask must have shape [B, T] = {list(shape)}, got {list(mask.shape)}")
    if mask.device != device:
        raise ValueError(f"{caller}: mask must be on the device of emissions {device}, got {mask.device}")
    return mask.bool()


def _scores(caller: str, ops: Ops, chain: Chain) -> tuple[Tensor, Tensor]:
    try:
        return log_partition(ops, chain)
    except RuntimeError as error:
        raise of_op(caller, error) from None


def _result_dtype(chain: Chain) -> torch.dtype:
    return torch.float64 if chain.emissions.dtype == torch.float64 else torch.float32


def _restored(result: Tensor, chain: Chain, single: bool) -> Tensor:
    result = result.to(_result_dtype(chain))
    return result.squeeze(0) if single else result


def _visible(chain: Chain) -> Tensor:
    return steps_of(chain.emissions, chain.lengths, chain.mask)


def _steps(chain: Chain) -> Tensor | int:
    """Number of steps of all sequences."""
    if chain.mask is not None:
        return chain.mask.sum()
    if chain.lengths is not None:
        return chain.lengths.sum()
    return chain.emissions.shape[0] * chain.emissions.shape[1]


def _expectation(probabilities: Tensor, scores: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Sum of the products in float64; a forbidden score has probability 0 and adds nothing."""
    product = probabilities.double() * torch.where(probabilities == 0, 0, scores.double())
    return product.sum(dims)
