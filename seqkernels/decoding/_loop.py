"""What greedy search, beam search and sampling share: arguments, log-probabilities and the loop over steps.

Tensors stay on the device of the tokens. The host reads values every `check_every` steps and after the last one, never
to decide a result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from ..functional._checks import describe
from ..functional._values import may_read_values
from . import _state

Step: TypeAlias = Callable[[Tensor, Any], tuple[Tensor, Any] | tuple[Tensor, Any, Tensor]]
PerSentence: TypeAlias = int | Tensor | Sequence[int]

DROPPED = 0.25  # share of ended sentences from which on their rows are removed
STEPS_BETWEEN_CHECKS = 16  # of devices that run ahead of the host, which a check makes it wait for


class Decoded(NamedTuple):
    """Hypotheses of B sentences, n each.

    Fields:
        sequences: [B, n, T] int64, T = max_length, with the end-of-sequence token, and pad_token_id beyond the length.
        lengths: [B, n] int64, with the end-of-sequence token; 0 for a hypothesis that does not exist.
        scores: [B, n] float32, or float64 for float64 logits; -inf for a hypothesis that does not exist.
        attention: [B, n, T, S] weights of the steps, zero beyond the length, if return_attention, else None.
    """

    sequences: Tensor
    lengths: Tensor
    scores: Tensor
    attention: Tensor | None


class Search(Protocol):
    """One way to choose the tokens of a step."""

    def advance(self, t: int, log_p: Tensor, attention: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Chooses from log-probabilities [N', V] of the rows of Problem.rows.

        Returns the tokens [N], and the row [N] that each continues, or None if each continues its own.
        """

    def alive(self) -> Tensor:
        """[N] whether a hypothesis may still get a token that matters."""


class Problem:
    """Checked arguments.

    Attributes:
        B: sentences. width: hypotheses of each. N: B * width. T: maximum of the limits.
        limits: [B] maximum length of each sentence. shortest: the minimum of them.
        kept: [B'] the sentences that step computes; None for all. rows: [N'] their hypotheses.
    """

    def __init__(
        self,
        caller: str,
        step: Step,
        start_tokens: Tensor | int,
        state: Any,
        state_dims: Any,
        *,
        width: int,
        max_length: PerSentence,
        min_length: PerSentence,
        eos_token_id: int | Sequence[int] | None,
        pad_token_id: int | None,
        no_repeat_ngram_size: int,
        repetition_penalty: float,
        return_attention: bool,
        check_every: int | None,
        drop_ended: bool,
    ) -> None:
        self.caller, self.step, self.width, self.state_dims = caller, step, width, state_dims
        if not callable(step):
            raise TypeError(f"{caller}: step must be a function step(tokens, state), got {describe(step)}")
        self.start, self.state = self._start(start_tokens, state), state
        self.device, self.B = self.start.device, self.start.shape[0]
        self.N = self.B * width
        self.drop_ended = flag(caller, "drop_ended", drop_ended)
        self.kept: Tensor | None = None
        self.rows: Tensor | None = None
        self.limits, limits = self.per_sentence("max_length", max_length, 1)
        self.least, least = self.per_sentence("min_length", min_length, 0)
        self.shortest, self.T, self.longest_least = min(limits), max(limits), max(least)
        for low, high in zip(*((n * self.B if len(n) == 1 else n) for n in (least, limits))):
            if low > high:
                raise ValueError(f"{caller}: min_length must be at most max_length = {high}, got {low}")
        self.eos = self._eos(eos_token_id)
        if pad_token_id is None:
            pad_token_id = self.eos[0] if self.eos else 0
        self.pad = integer(caller, "pad_token_id", pad_token_id, None)
        self.ngram = integer(caller, "no_repeat_ngram_size", no_repeat_ngram_size, 0)
        self.penalty = number(caller, "repetition_penalty", repetition_penalty)
        if self.penalty <= 0:
            raise ValueError(f"{caller}: repetition_penalty must be above 0, got {repetition_penalty}")
        self.return_attention = flag(caller, "return_attention", return_attention)
        self.needs_attention = "return_attention" if return_attention else ""
        every = 1 if self.device.type == "cpu" else STEPS_BETWEEN_CHECKS
        self.check_every = every if check_every is None else integer(caller, "check_every", check_every, 1)
        self.vocabulary = self.source = -1  # of the first step
        self.attention: list[Tensor] = []  # [N, S] of each step, if it is returned
        self.dtype = torch.float32
        _state.check(caller, state, state_dims, self.B)

    # ---- arguments

    def per_sentence(self, name: str, value: Any, lowest: int) -> tuple[Tensor, list[int]]:
        """An argument that is an int, or one for each sentence: as a tensor [B], and as a list of one or B."""
        if isinstance(value, int) and not isinstance(value, bool):
            integer(self.caller, name, value, lowest)
            return torch.full((self.B,), value, dtype=torch.int64, device=self.device), [value]
        if not isinstance(value, Tensor):
            if not isinstance(value, Sequence) or any(type(n) is not int for n in value):
                raise TypeError(f"{self.caller}: {name} must be an int or [B] integers, got {describe(value)}")
            value = torch.tensor(list(value), dtype=torch.int64)
        if value.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{self.caller}: {name} must be int32 or int64, got {value.dtype}")
        if tuple(value.shape) != (self.B,):
            raise ValueError(f"{self.caller}: {name} must have shape [B] = [{self.B}], got {list(value.shape)}")
        values: list[int] = value.tolist() or [lowest]
        if min(values) < lowest:
            raise ValueError(f"{self.caller}: {name} must be at least {lowest}, got {min(values)}")
        return value.to(self.device, torch.int64), values

    def _start(self, tokens: Any, state: Any) -> Tensor:
        caller = self.caller
        if isinstance(tokens, int) and not isinstance(tokens, bool):
            found = _state.first_tensor(caller, state, self.state_dims)
            if found is None:
                raise ValueError(
                    f"{caller}: start_tokens must be a tensor [B] if the state has no tensor with a dimension of rows, "
                    f"got {tokens}"
                )
            token = integer(caller, "start_tokens", tokens, 0)
            return torch.full((found[1],), token, dtype=torch.int64, device=found[0].device)
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{caller}: start_tokens must be a tensor [B] or an int, got {describe(tokens)}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{caller}: start_tokens must be int32 or int64, got {tokens.dtype}")
        if tokens.dim() != 1:
            raise ValueError(f"{caller}: start_tokens must have shape [B], got {list(tokens.shape)}")
        if tokens.is_cpu and tokens.numel() and may_read_values(tokens) and int(tokens.min()) < 0:
            raise ValueError(f"{caller}: start_tokens must be at least 0, got {int(tokens.min())}")
        return tokens.long()

    def _eos(self, given: Any) -> tuple[int, ...]:
        tokens = () if given is None else (given,) if isinstance(given, int) else given
        if not isinstance(tokens, Sequence) or any(type(token) is not int for token in tokens):
            raise TypeError(f"{self.caller}: eos_token_id must be an int or a sequence of int, got {given!r}")
        if any(token < 0 for token in tokens):
            raise ValueError(f"{self.caller}: eos_token_id must be at least 0, got {given!r}")
        return tuple(dict.fromkeys(tokens))

    # ---- the loop

    def run(self, search: Search) -> None:
        """Calls step until no hypothesis is alive, at most max_length times."""
        tokens, state = self.start, self.state
        if self.width > 1:
            rows = torch.arange(self.N, device=self.device) // self.width
            tokens, state = tokens[rows], _state.reorder(self.caller, state, self.state_dims, rows, self.B)
        history = None
        if self.ngram or self.penalty != 1:
            history = torch.zeros(self.N, self.T, dtype=torch.int64, device=self.device)
        wrong: list[Tensor] = []  # [N] whether a hypothesis had NaN or infinity, of the steps since the last check
        for t in range(self.T):
            logits, state, attention = self._call(tokens, state)
            log_p = self._log_p(logits, history, t)
            invalid = log_p[:, 0].isnan() & (logits.amax(1) != -math.inf)
            if self.needs_attention == "coverage_penalty" and attention is not None:
                invalid = invalid | attention.isnan().any(1)
            wrong.append(self.spread(invalid, False) & search.alive())
            self._block(log_p, history, t)
            tokens, parents = search.advance(t, log_p, attention)
            last = t + 1 == self.T
            kept = None
            if last or (t + 1) % self.check_every == 0:
                alive = search.alive().view(self.B, self.width).any(1)
                count = self._count(t, alive, wrong)
                wrong.clear()
                if last or count == 0:
                    return
                computed = self.B if self.kept is None else self.kept.shape[0]
                if self.drop_ended and count <= (1 - DROPPED) * computed:
                    kept = alive.nonzero()[:, 0]
            if history is not None:
                history = history if parents is None else history.index_select(0, parents)
                history[:, t] = tokens
            state = self._reorder(state, parents, kept)
            tokens = self.of_rows(tokens)

    def _reorder(self, state: Any, parents: Tensor | None, kept: Tensor | None) -> Any:
        """The state after a step. kept: the sentences that the next step computes, if their number changes."""
        if parents is None and kept is None:
            return state
        before, sentences = self.kept, None
        computed = self.B if before is None else before.shape[0]
        position = torch.arange(self.B, device=self.device)  # of each sentence in the state
        if before is not None:
            position = position.index_copy(0, before, position[:computed])
        if kept is not None:
            self.kept, sentences = kept, position[kept]
            self.rows = (kept[:, None] * self.width + torch.arange(self.width, device=self.device)).flatten()
        index = self.rows if parents is None else self.of_rows(parents)
        if self.kept is not None and index is not None:
            index = position[index // self.width] * self.width + index % self.width
        assert index is not None
        return _state.reorder(self.caller, state, self.state_dims, index, computed * self.width, sentences, computed)

    def of_rows(self, t: Tensor) -> Tensor:
        """The rows [N', ...] that step computes of a tensor [N, ...]."""
        return t if self.rows is None else t.index_select(0, self.rows)

    def of_kept(self, t: Tensor) -> Tensor:
        """The sentences [B', ...] that step computes of a tensor [B, ...]."""
        return t if self.kept is None else t.index_select(0, self.kept)

    def spread(self, t: Tensor, fill: float) -> Tensor:
        """The inverse of of_rows, or of of_kept, with `fill` elsewhere."""
        if self.kept is None or self.rows is None:
            return t
        index, size = (self.rows, self.N) if t.shape[0] == self.rows.shape[0] else (self.kept, self.B)
        return t.new_full((size, *t.shape[1:]), fill).index_copy_(0, index, t)

    def _call(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any, Tensor | None]:
        caller, N = self.caller, tokens.shape[0]
        result = self.step(tokens, state)
        if not isinstance(result, tuple) or len(result) not in (2, 3):
            raise TypeError(
                f"{caller}: step must return a tuple (logits, state) or (logits, state, attention), got "
                f"{describe(result)}"
            )
        logits, state, attention = result if len(result) == 3 else (*result, None)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise TypeError(f"{caller}: step must return logits of a floating dtype, got {_dtype(logits)}")
        if logits.dim() != 2 or logits.shape[0] != N or logits.shape[1] < 1:
            raise ValueError(f"{caller}: step must return logits of shape [N, V], N = {N}, got {list(logits.shape)}")
        if logits.device != self.device:
            raise ValueError(
                f"{caller}: step must return logits on the device of the tokens {self.device}, got {logits.device}"
            )
        V = logits.shape[1]
        if self.vocabulary == -1:
            self.vocabulary, self.dtype = V, _wide(logits.dtype)
            if self.eos and max(self.eos) >= V:
                raise ValueError(f"{caller}: eos_token_id must be less than V = {V}, got {max(self.eos)}")
        if self.vocabulary != V:
            raise ValueError(f"{caller}: step must return logits of V = {self.vocabulary} in all steps, got {V}")
        if not self.needs_attention:
            return logits, state, None
        if not isinstance(attention, Tensor) or not attention.is_floating_point():
            raise TypeError(
                f"{caller}: step must return (logits, state, attention) for {self.needs_attention}, with a floating "
                f"tensor of attention weights, got {_dtype(attention)}"
            )
        self.source = attention.shape[1] if attention.dim() == 2 and self.source == -1 else self.source
        if tuple(attention.shape) != (N, self.source):
            S = "" if self.source == -1 else f" and S = {self.source}"
            raise ValueError(
                f"{caller}: step must return attention of shape [N, S], N = {N}{S}, got {list(attention.shape)}"
            )
        if self.return_attention:
            self.attention.append(self.spread(attention, 0))
        return logits, state, attention

    def _log_p(self, logits: Tensor, history: Tensor | None, t: int) -> Tensor:
        if history is not None and self.penalty != 1 and t > 0:
            previous = self.of_rows(history)[:, :t]
            logits = logits.to(self.dtype)
            found = logits.gather(1, previous)
            found = torch.where(found < 0, found * self.penalty, found / self.penalty)
            logits = logits.scatter(1, previous, found)
        return torch.log_softmax(logits, 1, dtype=self.dtype)

    def _block(self, log_p: Tensor, history: Tensor | None, t: int) -> None:
        """Writes -inf to tokens that must not follow."""
        if t + 1 < self.longest_least:
            short = self.of_kept(self.least > t + 1).repeat_interleave(self.width)
            for token in self.eos:
                log_p[:, token].masked_fill_(short, -math.inf)
        n = self.ngram
        if history is not None and 0 < n <= t:
            history = self.of_rows(history)
            ngrams = history[:, :t].unfold(1, n, 1)  # [N, t - n + 1, n]
            repeated = (ngrams[:, :, :-1] == history[:, None, t - n + 1 : t]).all(2)
            # A minimum, whose result does not depend on the order of several writes to one token.
            bound = torch.where(repeated, -math.inf, math.inf).to(log_p.dtype)
            log_p.scatter_reduce_(1, ngrams[:, :, -1], bound, "amin")

    def _count(self, t: int, alive: Tensor, wrong: list[Tensor]) -> int:
        """Number of sentences whose search goes on; B if values may not be read. Raises if logits were invalid."""
        if not may_read_values(alive):
            return self.B
        steps = torch.stack(wrong)
        count, some_wrong = torch.stack((alive.sum(), steps.any())).tolist()
        if some_wrong:
            step, row = steps.nonzero()[0].tolist()
            raise ValueError(
                f"{self.caller}: step must return logits, and attention for coverage_penalty, without NaN and "
                f"infinity, got some at step {t + 1 - len(wrong) + step} for sentence {row // self.width}"
            )
        return int(count)

    def end(self, tokens: Tensor) -> Tensor:
        """Whether tokens end a sequence."""
        if not self.eos:
            return torch.zeros_like(tokens, dtype=torch.bool)
        return functools.reduce(torch.bitwise_or, (tokens == token for token in self.eos))

    def decoded(self, columns: list[Tensor], lengths: Tensor, scores: Tensor, weights: list[Tensor]) -> Decoded:
        """The result of tokens [B, n] and, for return_attention, weights [B, n, S] of each step made."""
        B, n = lengths.shape
        sequences = torch.full((B, n, self.T), self.pad, dtype=torch.int64, device=self.device)
        inside = torch.arange(self.T, device=self.device) < lengths[:, :, None]
        steps = len(columns)
        if steps:
            sequences[:, :, :steps] = torch.where(inside[:, :, :steps], torch.stack(columns, 2), self.pad)
        if not self.return_attention:
            return Decoded(sequences, lengths, scores, None)
        first = weights[0] if weights else scores[:, :, None]
        attention = first.new_zeros(B, n, self.T, first.shape[2])
        if steps:
            made = torch.stack(weights, 2)
            attention[:, :, :steps] = torch.where(inside[:, :, :steps, None], made, made.new_zeros(()))
        return Decoded(sequences, lengths, scores, attention)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _dtype(value: Any) -> str:
    return str(value.dtype) if isinstance(value, Tensor) else describe(value)


# ---- checks of numbers


def integer(caller: str, name: str, value: Any, lowest: int | None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be an int, got {value!r}")
    if lowest is not None and value < lowest:
        raise ValueError(f"{caller}: {name} must be at least {lowest}, got {value}")
    return value


def flag(caller: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be a bool, got {value!r}")
    return value


def number(caller: str, name: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{caller}: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{caller}: {name} must be finite, got {value}")
    return float(value)
