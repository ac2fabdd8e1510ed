"""Beam search in batches against one sentence at a time in plain torch, with an LSTM decoder with attention, by dot
products or additive.

The peer decodes the beams of a sentence as one batch and keeps its hypotheses in lists, as tutorials of sequence models
do; both end the search of a sentence by the same rule. The bar is the claim of the project. Work counts the products of
the decoder for all hypotheses of max_length steps, and exceeds what both compute.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from harness import Contender, Results
from torch import Tensor

from seqkernels import nn
from seqkernels.decoding import PerSentence, beam_search


class Shape(NamedTuple):
    V: int
    H: int
    B: int = 32
    beam: int = 5
    S: int = 20
    T: int = 40

    def __str__(self) -> str:
        return f"B={self.B} beam={self.beam} V={self.V} H={self.H} S={self.S}"

    @property
    def work(self) -> float:
        return 2.0 * self.B * self.beam * self.T * self.H * (8 * self.H + 2 * self.H + 2 * self.S + self.V)


SHAPES = [Shape(1000, 128), Shape(4000, 256), Shape(8000, 512)]
BAR = 10.0
PEER = "one sentence at a time, torch"
BOS, EOS, ALPHA = 0, 1, 0.6


class Decoder(torch.nn.Module):
    """An LSTM whose output attends to a memory [B, S, H]; the logits of EOS grow with each step, or exclude it."""

    def __init__(self, shape: Shape, ours: bool, ends: bool, additive: bool) -> None:
        super().__init__()
        layer = nn.LSTM if ours else torch.nn.LSTM
        self.ours = ours
        self.attention = nn.AdditiveAttention(shape.H, shape.H) if additive else None
        self.embedding = torch.nn.Embedding(shape.V, shape.H)
        self.lstm = layer(shape.H, shape.H, batch_first=True)
        self.merge = torch.nn.Linear(2 * shape.H, shape.H)
        self.project = torch.nn.Linear(shape.H, shape.V)
        self.ends = ends
        torch.nn.init.normal_(self.project.weight, std=0.5)

    def keys(self, memory: Tensor) -> Any:
        """What attention reads of a memory [B, S, H], computed once."""
        if self.attention is None:
            return memory
        return self.attention.project(memory) if self.ours else (memory, self.attention.key_projection(memory))

    def context(self, query: Tensor, keys: Any) -> Tensor:
        """Attention of queries [N, H] of B sentences, N / B hypotheses each: [N, H]."""
        if self.attention is not None and self.ours:
            return self.attention(query, keys)
        memory, projected = keys if self.attention is not None else (keys, None)
        query = query.view(memory.shape[0], -1, memory.shape[2])
        if self.attention is None:
            scores = query @ memory.transpose(1, 2)
        else:
            pairs = self.attention.query_projection(query)[:, :, None] + projected[:, None]
            scores = torch.tanh(pairs) @ self.attention.v
        return (scores.softmax(-1) @ memory).flatten(0, 1)

    def forward(self, tokens: Tensor, hx: tuple[Tensor, Tensor], keys: Any, t: int) -> tuple[Tensor, Any]:
        """tokens [N]: logits [N, V] and hx."""
        output, hx = self.lstm(self.embedding(tokens)[:, None], hx)
        query = output[:, 0]
        merged = torch.cat((query, self.context(query, keys)), -1)
        logits = self.project(self.merge(merged).tanh())
        logits[:, EOS] += 0.5 * t if self.ends else -torch.inf
        return logits, hx


def models(shape: Shape, ends: bool, additive: bool) -> tuple[Decoder, Decoder]:
    torch.manual_seed(0)
    ours, theirs = (Decoder(shape, mine, ends, additive).eval() for mine in (True, False))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def inputs(shape: Shape) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    memory, h0 = torch.randn(shape.B, shape.S, shape.H, generator=g), torch.randn(1, shape.B, shape.H, generator=g)
    return memory, (h0.tanh(), torch.zeros_like(h0))


def batched(shape: Shape, model: Decoder) -> Contender:
    memory, hx = inputs(shape)

    def decode(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        hx, keys, t = state
        logits, hx = model(tokens, hx, keys, t)
        return logits, (hx, keys, t + 1)

    @torch.no_grad()
    def step() -> Any:
        return beam_search(
            decode, BOS, (hx, model.keys(memory), 0), state_dims=(1, PerSentence(0), None), drop_ended=True,
            beam_size=shape.beam, max_length=shape.T, eos_token_id=EOS, length_penalty=ALPHA,
        )  # fmt: skip

    def result() -> Results:
        got = step()
        return {"scores": got.scores[:, 0], "lengths": got.lengths[:, 0].double()}

    return Contender("seqkernels", step, result)


def one_at_a_time(shape: Shape, model: Decoder) -> Contender:
    memory, hx = inputs(shape)

    def lp(n: int) -> float:
        return ((5 + n) / 6) ** ALPHA

    def decode(b: int) -> tuple[float, list[int]]:
        mine, state = model.keys(memory[b : b + 1]), tuple(s[:, b : b + 1] for s in hx)
        tokens, log_p, paths = torch.tensor([BOS]), torch.zeros(1), [[]]
        finished: list[tuple[float, list[int]]] = []
        for t in range(shape.T):
            logits, state = model(tokens, state, mine, t)
            scores = log_p[:, None] + logits.log_softmax(-1)
            values, index = scores.view(-1).topk(2 * shape.beam)
            live: list[tuple[float, int, int]] = []
            for place, (value, i) in enumerate(zip(values.tolist(), index.tolist())):
                parent, token = divmod(i, shape.V)
                if token != EOS:
                    live.append((value, parent, token))
                elif place < shape.beam:
                    finished.append((value / lp(t + 1), [*paths[parent], token]))
            live = live[: shape.beam]
            if finished and live[0][0] / lp(shape.T) <= max(finished)[0]:
                break
            parents = torch.tensor([parent for _, parent, _ in live])
            tokens, log_p = torch.tensor([token for *_, token in live]), torch.tensor([value for value, *_ in live])
            paths = [[*paths[parent], token] for _, parent, token in live]
            state = tuple(s[:, parents] for s in state)
        else:
            finished += [(value / lp(shape.T), path) for (value, *_), path in zip(live, paths)]
        return max(finished)

    @torch.no_grad()
    def step() -> list[tuple[float, list[int]]]:
        return [decode(b) for b in range(shape.B)]

    def result() -> Results:
        best = step()
        return {
            "scores": torch.tensor([score for score, _ in best]),
            "lengths": torch.tensor([float(len(path)) for _, path in best]).double(),
        }

    return Contender(PEER, step, result)


@pytest.mark.parametrize("ends", [False, True], ids=["all steps", "ends"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("additive", [True, False], ids=["additive", "dot"])
def test_beam_search(bench: Any, shape: Shape, ends: bool, additive: bool) -> None:
    ours, theirs = models(shape, ends, additive)
    contenders = [batched(shape, ours), one_at_a_time(shape, theirs)]
    label = f"{shape}, {'ends at several lengths' if ends else f'{shape.T} steps'}"
    group = f"beam search, {'additive' if additive else 'dot-product'} attention"
    bench.time(group, label, contenders, bars={PEER: BAR}, work=shape.work, tolerance=1e-4)
