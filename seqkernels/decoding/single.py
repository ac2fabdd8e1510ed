"""Greedy search and sampling: each hypothesis is extended by one token, independently of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..functional._checks import describe
from ._loop import Decoded, PerSentence, Problem, Step, integer, number
from ._top import top


@torch.no_grad()
def greedy_search(
    step: Step,
    start_tokens: Tensor | int,
    state: Any = None,
    *,
    max_length: PerSentence,
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
    """Extend each sentence by its most likely token until the end of the sequence.

    Args:
        step: the step function; see seqkernels.decoding. It is called for N = B hypotheses, at most max_length times.
        start_tokens: [B] int64 or int32, the tokens of the first call; or one for all, if the state has a tensor with
            a dimension of rows.
        state: the state of the first call, of B rows: any nest of tuples, lists, dicts, dataclasses and nodes
            registered with torch.utils._pytree. Its leaves are tensors, constants and objects with a method
            reorder(index) that changes them in place, such as seqkernels.nn.KeyValueCache.
        max_length: number of tokens after which a hypothesis ends without an end-of-sequence token, at least 1; an
            int or one for each sentence.
        eos_token_id: the token, or tokens, that end a sequence; None for sequences of max_length tokens.
        state_dims: the dimension of the rows in the tensors of the state: an int for all, or a nest of int and None
            like the state, or like its upper levels. [L, B, H] states of recurrent layers have 1. None passes that
            part of the state on unchanged: constants, and tensors that all hypotheses of a sentence share. The latter
            have PerSentence(dim) for drop_ended.
        min_length: number of tokens, with the end-of-sequence token, before which a sequence does not end.
        pad_token_id: token beyond the end; by default the first of eos_token_id, or 0.
        no_repeat_ngram_size: n > 0 blocks tokens that would repeat n tokens of the same hypothesis.
        repetition_penalty: divides positive logits of the tokens of the hypothesis, and multiplies negative ones.
        return_attention: return the attention weights of step, which then has to return them.
        check_every: number of steps between checks of whether all sentences have ended; by default 1 on a CPU and 16
            on other devices, where a check waits for the device. It does not affect the results.
        drop_ended: remove the rows of ended sentences, once they are a quarter of the rows, at the checks. step is then
            called with fewer rows, and all tensors that it reads and that have rows must be in the state, with their
            dimension.
    Returns:
        Decoded, with n = 1. scores: the sum of the log-probabilities of the tokens. These are the log_softmax, in
        float32 or wider, of the logits after repetition_penalty; blocked tokens have -inf, and the others keep theirs.
        A sentence of which all tokens are blocked at a step has no hypothesis: length 0 and score -inf.
    Raises:
        ValueError: invalid shape or value; NaN or infinity among the logits, found at the checks.
        TypeError: invalid type or dtype.
    Deterministic: yes, if step is; of equal tokens the lowest is chosen. Equal to beam_search with beam_size=1.
    Source: repetition_penalty: Keskar et al., "CTRL", https://arxiv.org/abs/1909.05858
    """
    problem = Problem(
        "greedy_search", step, start_tokens, state, state_dims, width=1, max_length=max_length, min_length=min_length,
        eos_token_id=eos_token_id, pad_token_id=pad_token_id, no_repeat_ngram_size=no_repeat_ngram_size,
        repetition_penalty=repetition_penalty, return_attention=return_attention, check_every=check_every,
        drop_ended=drop_ended,
    )  # fmt: skip
    return _Rows(problem, lambda log_p: log_p.argmax(1)).decode()


@torch.no_grad()
def sample(
    step: Step,
    start_tokens: Tensor | int,
    state: Any = None,
    *,
    max_length: PerSentence,
    num_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
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
    """Draw each token from the distribution of the step.

    Args:
        step: the step function; see seqkernels.decoding. It is called for N = B * num_samples hypotheses.
        num_samples: number of samples of each sentence.
        temperature: divides the log-probabilities; above 0.
        top_k: draw from the top_k most likely tokens; of equal ones, the lower.
        top_p: draw from the smallest set of most likely tokens whose probability reaches top_p, of at least one token.
            The probabilities are those after temperature and top_k.
        generator: of the random numbers, on the device of the tokens; the default one if None.
        Others: as in greedy_search.
    Returns:
        Decoded, with n = num_samples, in the order in which they were drawn. scores: the log-probability of each
        sample, as in greedy_search: without temperature, top_k and top_p.
    Raises: as greedy_search.
    Deterministic: for a given state of the generator. The samples of a sentence depend on the batch.
    Source: top_p: Holtzman et al., "The Curious Case of Neural Text Degeneration", https://arxiv.org/abs/1904.09751
    """
    caller = "sample"
    width = integer(caller, "num_samples", num_samples, 1)
    temperature = number(caller, "temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"{caller}: temperature must be above 0, got {temperature}; use greedy_search for the limit 0")
    if top_k is not None:
        integer(caller, "top_k", top_k, 1)
    if top_p is not None and not 0 < number(caller, "top_p", top_p) <= 1:
        raise ValueError(f"{caller}: top_p must be above 0 and at most 1, got {top_p}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{caller}: generator must be a torch.Generator, got {describe(generator)}")
    problem = Problem(
        caller, step, start_tokens, state, state_dims, width=width, max_length=max_length, min_length=min_length,
        eos_token_id=eos_token_id, pad_token_id=pad_token_id, no_repeat_ngram_size=no_repeat_ngram_size,
        repetition_penalty=repetition_penalty, return_attention=return_attention, check_every=check_every,
        drop_ended=drop_ended,
    )  # fmt: skip
    if generator is not None and generator.device.type != problem.device.type:
        raise ValueError(
            f"{caller}: generator must be on the device of the tokens {problem.device}, got {generator.device}"
        )
    return _Rows(problem, lambda log_p: _drawn(log_p, temperature, top_k, top_p, generator)).decode()


def _drawn(
    log_p: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """A token [N] of each row."""
    tokens = None
    if top_k is not None and top_k < log_p.shape[1]:
        log_p, tokens = top(log_p[:, None], log_p.new_zeros(log_p.shape[0], 1), top_k)
    scores = log_p / temperature
    if top_p is not None and top_p < 1:
        if tokens is None:  # else they are in this order
            scores, tokens = scores.sort(dim=1, descending=True, stable=True)
        before = scores.softmax(1).cumsum(1)[:, :-1]  # probability of the tokens before the second, the third ...
        scores[:, 1:].masked_fill_(before >= top_p, -math.inf)
    # The maximum of scores with Gumbel noise has their distribution; -inf stays -inf.
    exponential = torch.empty_like(scores).exponential_(generator=generator).clamp_min_(torch.finfo(scores.dtype).tiny)
    drawn = (scores - exponential.log()).argmax(1)
    return drawn if tokens is None else tokens.gather(1, drawn[:, None])[:, 0]


class _Rows:
    """Hypotheses that do not depend on each other; `choose` maps log-probabilities [N, V] to tokens [N]."""

    def __init__(self, problem: Problem, choose: Callable[[Tensor], Tensor]) -> None:
        self.problem, self.choose = problem, choose
        N, device = problem.N, problem.device
        self.limits = problem.limits.repeat_interleave(problem.width)
        self.active = torch.ones(N, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(N, dtype=torch.int64, device=device)
        self.scores = torch.zeros(N, device=device)
        self.tokens: list[Tensor] = []

    def alive(self) -> Tensor:
        return self.active

    def advance(self, t: int, log_p: Tensor, attention: Tensor | None) -> tuple[Tensor, None]:
        tokens = self.choose(log_p)
        score = log_p.gather(1, tokens[:, None])[:, 0]
        tokens, score = self.problem.spread(tokens, 0), self.problem.spread(score, 0)
        self.scores = self.scores.to(score.dtype) + torch.where(self.active, score, 0)
        self.lengths += self.active
        self.active = self.active & (self.scores > -math.inf)
        if self.problem.eos:
            self.active = self.active & ~self.problem.end(tokens)
        if t + 1 >= self.problem.shortest:
            self.active = self.active & (self.limits > t + 1)
        self.tokens.append(tokens)
        return tokens, None

    def decode(self) -> Decoded:
        problem = self.problem
        if problem.B:
            problem.run(self)
        shape = problem.B, problem.width
        exists = self.scores > -math.inf  # also false for NaN, after all tokens were blocked
        lengths, scores = self.lengths.where(exists, 0), self.scores.where(exists, -math.inf)
        weights = [w.unflatten(0, shape) for w in problem.attention]
        tokens = [column.view(shape) for column in self.tokens]
        return problem.decoded(tokens, lengths.view(shape), scores.view(shape), weights)
