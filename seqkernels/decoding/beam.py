"""Beam search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ._loop import Decoded, PerSentence, Problem, Step, integer, number
from ._top import top

LengthNormalization = Literal["gnmt", "power"]
NORMALIZATIONS = ("gnmt", "power")


@torch.no_grad()
def beam_search(
    step: Step,
    start_tokens: Tensor | int,
    state: Any = None,
    *,
    beam_size: int,
    max_length: PerSentence,
    n_best: int = 1,
    length_penalty: float = 0.0,
    length_normalization: LengthNormalization = "gnmt",
    coverage_penalty: float = 0.0,
    source_lengths: Tensor | Sequence[int] | None = None,
    early_stopping: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    state_dims: Any = 0,
    min_length: PerSentence = 0,
    pad_token_id: int | None = None,
    no_repeat_ngram_size: int = 0,
    repetition_penalty: float = 1.0,
    return_attention: bool = False,
    check_every: int | None = None,
    drop_ended: bool = False,
) -> Decoded:
    """Search the n_best most likely sequences of each sentence with beam_size hypotheses at a time.

    The candidates of a step are all one-token extensions of the live hypotheses of the sentence, ordered by
    log-probability. Those among the first beam_size that end with an end-of-sequence token are finished; the first
    beam_size of the others live on, or are finished if they have max_length tokens. The beam_size finished
    hypotheses of highest score are kept. The score of a hypothesis of n tokens is

        log P / lp(n) + coverage_penalty * sum over s of log(min(sum over its steps of attention[s], 1)),

    where lp(n) is ((5 + n) / 6)^length_penalty, or n^length_penalty with length_normalization="power". The search of a
    sentence ends once log P / lp of the best live hypothesis, with the lp of its future lengths that is best for it,
    does not exceed the n_best-th score of the finished ones: further steps cannot change the result.

    Args:
        step: the step function; see seqkernels.decoding. It is called for N = B * beam_size hypotheses, at most
            max_length times. Rows of hypotheses that do not exist yet, or have ended, hold valid tokens.
        beam_size: number of live hypotheses; may exceed the number of tokens.
        n_best: number of hypotheses to return, at most beam_size.
        length_penalty: exponent of lp; 1 with length_normalization="power" is the mean of the log-probabilities.
        length_normalization: gnmt or power.
        coverage_penalty: weight of the coverage of the source, at least 0; step then has to return its attention.
            Sums are at least the smallest normal number of their dtype.
        source_lengths: [B] number of positions of each source; the sum over s omits others.
        early_stopping: end the search of a sentence as soon as it has beam_size finished hypotheses.
        Others: as in greedy_search.
    Returns:
        Decoded, with n = n_best, in descending order of scores. Hypotheses that do not exist have length 0 and score
        -inf. Log-probabilities are those of greedy_search.
    Raises: as greedy_search.
    Deterministic: yes, if step is. Of equal candidates, the one of the better hypothesis comes first, and of one
        hypothesis the lower token; of equal scores, the one finished first. The result of a sentence does not depend
        on the batch if the logits do not.
    Source: Wu et al., "Google's Neural Machine Translation System", https://arxiv.org/abs/1609.08144, equation 14
    """
    caller = "beam_search"
    width = integer(caller, "beam_size", beam_size, 1)
    if integer(caller, "n_best", n_best, 1) > width:
        raise ValueError(f"{caller}: n_best must be at most beam_size = {width}, got {n_best}")
    alpha, beta = number(caller, "length_penalty", length_penalty), number(caller, "coverage_penalty", coverage_penalty)
    if beta < 0:
        raise ValueError(f"{caller}: coverage_penalty must be at least 0, got {coverage_penalty}")
    if length_normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{caller}: length_normalization must be {' or '.join(NORMALIZATIONS)}, got {length_normalization!r}"
        )
    problem = Problem(
        caller, step, start_tokens, state, state_dims, width=width, max_length=max_length, min_length=min_length,
        eos_token_id=eos_token_id, pad_token_id=pad_token_id, no_repeat_ngram_size=no_repeat_ngram_size,
        repetition_penalty=repetition_penalty, return_attention=return_attention, check_every=check_every,
        drop_ended=drop_ended,
    )  # fmt: skip
    if beta > 0:
        problem.needs_attention = "coverage_penalty"
    of_source = None if source_lengths is None else problem.per_sentence("source_lengths", source_lengths, 0)
    base = [float(max(n, 1)) if length_normalization == "power" else (5 + n) / 6 for n in range(problem.T + 2)]
    try:
        lp = [b**alpha for b in base]
    except OverflowError:
        lp = [math.inf]
    if not 0 < min(lp) <= max(lp) < math.inf:
        raise ValueError(f"{caller}: length_penalty must give finite factors of lengths, got {length_penalty}")
    return _Beams(problem, n_best, lp, beta, of_source, early_stopping).decode()


class _Beams:
    """Live hypotheses of each sentence in descending order of log-probability, and its finished ones by score.

    A live hypothesis that does not exist has a log-probability of -inf, as have all of a sentence whose search has
    ended. Finished ones are stored as (t * K + parent) * V + token: the last step, the live hypothesis before it, and
    the last token.

    Dimensions: K = beam_size.
    """

    def __init__(
        self, problem: Problem, n_best: int, lp: list[float], beta: float,
        of_source: tuple[Tensor, list[int]] | None, early: bool,
    ) -> None:  # fmt: skip
        self.problem, self.n_best, self.beta, self.early = problem, n_best, beta, early
        B, K, device = problem.B, problem.width, problem.device
        self.lp_of = lp  # by length
        self.live = torch.full((B, K), -math.inf, device=device)
        self.live[:, 0] = 0
        self.scores = torch.full((B, K), -math.inf, device=device)
        self.finished = torch.zeros(B, K, dtype=torch.int64, device=device)
        self.first_row = torch.arange(B, device=device)[:, None] * K
        self.candidates = K * (1 + len(problem.eos))  # of which K do not end a sequence
        self.tokens: list[Tensor] = []  # [B, K] of each step
        self.parents: list[Tensor] = []  # [B, K] the live hypothesis before the step
        self.coverage: Tensor | None = None  # [N, S] sums of attention
        self.of_source = of_source

    def alive(self) -> Tensor:
        return self.live.view(-1) > -math.inf

    def advance(self, t: int, log_p: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor | None]:
        problem, K, V = self.problem, self.problem.width, self.problem.vocabulary
        if t == 0:
            self.live, self.scores = self.live.to(log_p.dtype), self.scores.to(log_p.dtype)
            self.lp = log_p.new_tensor(self.lp_of)
            self.lp_at_limit = self.lp[problem.limits][:, None]
        found = top(log_p.unflatten(0, (-1, K)), problem.of_kept(self.live), self.candidates)
        values, index = problem.spread(found[0], -math.inf), problem.spread(found[1], 0)  # [B, candidates]
        ends = problem.end(index % V)
        live, picks = values.masked_fill(ends, -math.inf).sort(dim=1, descending=True, stable=True)
        live, picks = live[:, :K], picks[:, :K]
        penalty = None if self.beta == 0 else self._penalty(attention)
        if problem.eos:
            self._keep(t, torch.where(ends[:, :K], values[:, :K], -math.inf), index[:, :K], penalty)
        last = None
        if t + 1 >= problem.shortest:
            last = (problem.limits <= t + 1)[:, None]
            self._keep(t, torch.where(last, live, -math.inf), index.gather(1, picks), penalty)

        best = live[:, :1] / torch.maximum(self.lp[t + 2], self.lp_at_limit)
        ended = best <= self.scores[:, self.n_best - 1 : self.n_best]
        if self.early:
            ended = ended | (self.scores[:, -1:] > -math.inf)
        if last is not None:
            ended = ended | last
        self.live = live.masked_fill(ended, -math.inf)

        index = index.gather(1, picks)
        tokens, parents = index % V, index // V
        self.tokens.append(tokens)
        self.parents.append(parents)
        if K == 1:
            return tokens.view(-1), None
        rows = (self.first_row + parents).view(-1)
        if self.coverage is not None:
            self.coverage = self.coverage.index_select(0, rows)
        return tokens.view(-1), rows

    def _penalty(self, attention: Tensor | None) -> Tensor:
        """[B, K] penalty of the coverage after this step."""
        assert attention is not None
        S = attention.shape[1]
        if self.of_source is not None and max(self.of_source[1]) > S:
            raise ValueError(
                f"{self.problem.caller}: source_lengths must be at most {S}, the positions of the attention that step "
                f"returns, got {max(self.of_source[1])}"
            )
        attention = self.problem.spread(attention, 0)
        self.coverage = attention.to(self.live.dtype) if self.coverage is None else self.coverage + attention
        covered = self.coverage.unflatten(0, (-1, self.problem.width))
        log = covered.clamp(torch.finfo(covered.dtype).tiny, 1).log()
        if self.of_source is not None:
            inside = torch.arange(covered.shape[2], device=covered.device) < self.of_source[0][:, None, None]
            log = torch.where(inside, log, 0)
        return self.beta * log.sum(2)

    def _keep(self, t: int, log_p: Tensor, index: Tensor, penalty: Tensor | None) -> None:
        """Adds hypotheses of log-probability log_p [B, candidates], -inf for none, to the finished ones."""
        K, V = self.problem.width, self.problem.vocabulary
        scores = log_p / self.lp[t + 1]
        if penalty is not None:
            scores = torch.where(log_p > -math.inf, scores + penalty.gather(1, index // V), -math.inf)
        scores = torch.cat((self.scores, scores), 1)
        finished = torch.cat((self.finished, index + t * K * V), 1)
        scores, picks = scores.sort(dim=1, descending=True, stable=True)
        self.scores, self.finished = scores[:, :K], finished.gather(1, picks[:, :K])

    def decode(self) -> Decoded:
        problem, K, n = self.problem, self.problem.width, self.n_best
        if problem.B:
            problem.run(self)
        V = problem.vocabulary
        scores, finished = self.scores[:, :n], self.finished[:, :n]
        end, slot, last = finished // (K * V), finished // V % K, finished % V
        weights = [w.unflatten(0, (problem.B, K)) for w in problem.attention]
        columns: list[Tensor] = []
        traced: list[Tensor] = []
        for u in reversed(range(len(self.tokens))):
            before = u < end
            columns.append(torch.where(before, self.tokens[u].gather(1, slot), last))
            slot = torch.where(before, self.parents[u].gather(1, slot), slot)
            if weights:
                S = weights[u].shape[2]
                traced.append(weights[u].gather(1, slot[:, :, None].expand(-1, -1, S)))
        lengths = torch.where(scores > -math.inf, end + 1, 0)
        return problem.decoded(columns[::-1], lengths, scores, traced[::-1])
