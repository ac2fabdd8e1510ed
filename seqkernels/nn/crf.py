"""The linear-chain conditional random field of pytorch-crf, with fused kernels.

Intended differences from torchcrf.CRF: lengths, masks with excluded steps anywhere, the first included, forbidden
transitions, nbest and tensor results, marginals and entropy; tags out of range raise.

Dimensions: B sequences, T steps, K tags.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn import Module, Parameter, init

from ..functional._checks import Lengths, describe
from ..functional.crf import (
    REDUCTIONS,
    Reduction,
    crf_entropy,
    crf_log_likelihood,
    crf_marginals,
    crf_viterbi,
)
from ._symbolic import as_leaf, refuse_scripting


class CRF(Module):
    """Conditional random field over sequences of tags, as in BiLSTM-CRF taggers.

    Args:
        num_tags: number of tags, K.
        batch_first: whether emissions are [B, T, K] and tags and masks [B, T], instead of [T, B, K] and [T, B].
        forbidden: pairs (from, to) of tags that cannot follow each other; "start" and "end" are allowed in place of the
            first and the second. Their scores are -inf in every call and their parameters have no gradient.
        device, dtype: of the parameters.

    Emissions and parameters are promoted to their common dtype, as in torchcrf: half emissions of an autocast region
    meet float32 parameters in float32.

    Parameters: start_transitions [K], end_transitions [K], transitions [K, K] (from, to).

    Equivalent to: torchcrf.CRF(num_tags, batch_first) of pytorch-crf, with equal state_dict.
    Deterministic: yes; the bits of a sequence do not depend on the batch, padding or threads.
    Source: Lample et al., "Neural Architectures for Named Entity Recognition", https://arxiv.org/abs/1603.01360
    """

    __prepare_scriptable__ = refuse_scripting

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        *,
        forbidden: Iterable[tuple[int | str, int | str]] = (),
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(num_tags, int):
            raise TypeError(f"CRF: num_tags must be an int, got {describe(num_tags)}")
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.start_transitions = Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.end_transitions = Parameter(torch.empty(num_tags, device=device, dtype=dtype))
        self.transitions = Parameter(torch.empty(num_tags, num_tags, device=device, dtype=dtype))
        if not isinstance(forbidden, Iterable):
            raise TypeError(f"CRF: forbidden must be pairs of tags, got {describe(forbidden)}")
        self.forbidden = tuple(forbidden)
        for pair in self.forbidden:
            self._check_pair(pair)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all scores from U(-0.1, 0.1)."""
        for scores in (self.start_transitions, self.end_transitions, self.transitions):
            init.uniform_(scores, -0.1, 0.1)

    def extra_repr(self) -> str:
        rest = ", batch_first=True" if self.batch_first else ""
        return f"num_tags={self.num_tags}{rest}" + (f", forbidden={list(self.forbidden)}" if self.forbidden else "")

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: Reduction = "sum",
        *,
        lengths: Lengths | None = None,
    ) -> Tensor:
        """Log likelihood of tags.

        Args:
            emissions: [T, B, K], or [B, T, K] with batch_first. tags: [T, B] or [B, T], integers.
            mask: bool or uint8, of the shape of tags: the steps of each sequence.
            reduction: none, sum, mean (over sequences) or token_mean.
            lengths: [B] number of steps of each sequence, in place of mask.
        Returns:
            [B] with reduction="none", else [].
        """
        if isinstance(emissions, Proxy):
            return as_leaf(self, dict(emissions=emissions, tags=tags, mask=mask, reduction=reduction, lengths=lengths))
        if reduction not in REDUCTIONS:
            raise ValueError(f"invalid reduction: {reduction}")
        self._check(emissions, tags, mask)
        emissions, *scores = self._scores(emissions)
        return crf_log_likelihood(
            emissions,
            self._by_sequence(tags),
            *scores,
            lengths=lengths,
            mask=self._by_sequence(mask),
            reduction=reduction,
        )

    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        nbest: int | None = None,
        pad_tag: int | None = None,
        *,
        lengths: Lengths | None = None,
        return_tensors: bool = False,
    ) -> Any:
        """The most likely tags.

        Args:
            nbest: number of paths of each sequence; None for one.
            pad_tag: with a value, lists of lists have T tags each, padded with it.
            return_tensors: return (tags, scores) as `functional.crf_viterbi` instead of lists, without waiting for the
                device; with batch_first=False, tags are [T, B] or [nbest, T, B].
            Others: as in forward.
        Returns:
            A list of B lists of tags; with nbest, a list of nbest such lists, in descending order of scores.
        """
        self._check(emissions, None, mask)
        steps = self._by_sequence(mask)
        tags, scores = crf_viterbi(*self._scores(emissions), lengths=lengths, mask=steps, nbest=nbest)
        if return_tensors:
            if pad_tag is not None:
                tags = torch.where(tags < 0, pad_tag, tags)
            return (tags if self.batch_first else tags.movedim(0, -1)), scores
        paths = tags[:, None] if nbest is None else tags
        lists = [[self._list(path, pad_tag) for path in best] for best in paths.transpose(0, 1).tolist()]
        return lists[0] if nbest is None else lists

    def marginals(self, emissions: Tensor, mask: Tensor | None = None, *, lengths: Lengths | None = None) -> Tensor:
        """Probability of each tag at each step: [T, B, K], or [B, T, K] with batch_first. Differentiable."""
        self._check(emissions, None, mask)
        of_tags, _ = crf_marginals(*self._scores(emissions), lengths=lengths, mask=self._by_sequence(mask))
        return of_tags if self.batch_first else of_tags.transpose(0, 1)

    def entropy(self, emissions: Tensor, mask: Tensor | None = None, *, lengths: Lengths | None = None) -> Tensor:
        """[B] entropy of the distribution over paths, in nats. Differentiable."""
        self._check(emissions, None, mask)
        return crf_entropy(*self._scores(emissions), lengths=lengths, mask=self._by_sequence(mask))

    # ---- arguments

    def _by_sequence(self, t: Any) -> Any:
        return t if t is None or self.batch_first else t.transpose(0, 1)

    def _scores(self, emissions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Emissions [B, T, K], and transitions, start and end with -inf where forbidden, of their common dtype."""
        pairs: Tensor = self.transitions
        start: Tensor = self.start_transitions
        end: Tensor = self.end_transitions
        if self.forbidden:
            device, K = pairs.device, self.num_tags
            blocked = torch.zeros(K + 1, K + 1, dtype=torch.bool)
            for i, j in self.forbidden:
                blocked[K if isinstance(i, str) else i, K if isinstance(j, str) else j] = True
            blocked = blocked.to(device)
            pairs = pairs.masked_fill(blocked[:K, :K], -torch.inf)
            start = start.masked_fill(blocked[K, :K], -torch.inf)
            end = end.masked_fill(blocked[:K, K], -torch.inf)
        dtype = torch.promote_types(emissions.dtype, pairs.dtype)
        return self._by_sequence(emissions).to(dtype), pairs.to(dtype), start.to(dtype), end.to(dtype)

    def _check_pair(self, pair: Sequence[Any]) -> None:
        good = isinstance(pair, Sequence) and len(pair) == 2 and tuple(pair) != ("start", "end")
        if not good or not all(
            (isinstance(tag, int) and 0 <= tag < self.num_tags) or tag == name
            for tag, name in zip(pair, ("start", "end"))
        ):
            raise ValueError(
                f"CRF: forbidden must hold pairs of tags from 0 to {self.num_tags - 1}, or 'start' first, or 'end' "
                f"second, got {pair!r}"
            )

    def _check(self, emissions: Tensor, tags: Tensor | None, mask: Tensor | None) -> None:
        for name, t in (("emissions", emissions), ("tags", tags), ("mask", mask)):
            if not isinstance(t, Tensor) and (t is not None or name == "emissions"):
                raise TypeError(f"CRF: {name} must be a tensor, got {describe(t)}")
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        if emissions.shape[2] != self.num_tags:
            raise ValueError(f"expected last dimension of emissions is {self.num_tags}, got {emissions.shape[2]}")
        for name, t in (("tags", tags), ("mask", mask)):
            if t is not None and t.shape != emissions.shape[:2]:
                raise ValueError(
                    f"the first two dimensions of emissions and {name} must match, got {tuple(emissions.shape[:2])} "
                    f"and {tuple(t.shape)}"
                )

    def _list(self, path: list[int], pad_tag: int | None) -> list[int]:
        if pad_tag is None:
            return [tag for tag in path if tag >= 0]
        return [pad_tag if tag < 0 else tag for tag in path]
