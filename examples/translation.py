"""Translate with an encoder-decoder LSTM and attention, with layers of torch.nn and with those of seqkernels.nn.

    python examples/translation.py                         # written dates to ISO dates, attention of Luong
    python examples/translation.py --attention additive    # attention of Bahdanau, which feeds the next step
    python examples/translation.py --sampling 0.25         # scheduled sampling
    python examples/translation.py --data multi30k         # German to English; a larger model by default
    torchrun --nproc-per-node 2 examples/translation.py    # each process trains on a part of each batch

The encoder is a bidirectional LSTM over sequences of different lengths, which are packed for torch and padded, with
`lengths`, for seqkernels. The decoder has one of two forms:

- luong: the LSTM reads the target alone, so that all steps run in one call, and so does their attention.
- additive: the context of a step is an input of that step, so that an LSTMCell and the attention run step by step.

With scheduled sampling, some inputs are predictions of the model: with luong from a first pass over the targets.

Sources: Bahdanau et al., https://arxiv.org/abs/1409.0473; Luong et al., https://arxiv.org/abs/1508.04025; Bengio et al.
(scheduled sampling), https://arxiv.org/abs/1506.03099; Mihaylova and Martins (in two passes),
https://arxiv.org/abs/1906.07651
Requires sacrebleu, tokenizers, tqdm and matplotlib.
"""

import argparse
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import parallel_text
import torch
from parallel_text import PAD, Batch, Corpus
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import common
import seqkernels

SAMPLING_STEP = 0.05  # by which the share of predictions among the inputs grows with each epoch

Keys = tuple[Tensor, Tensor]  # projected keys [B, S, H] and values [B, S, D]
States = tuple[Tensor, Tensor]  # h and c [B, H]


# ---- attention in torch, with the names and parameters of seqkernels.nn


def attend(scores: Tensor, values: Tensor, mask: Tensor, need_weights: bool) -> Any:
    """Context [B, T, D], and weights on request, of scores [B, T, S], values [B, S, D] and mask [B, S]."""
    weights = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    context = weights @ values
    return (context, weights) if need_weights else context


class AdditiveAttention(nn.Module):
    """The score of a query and a key is v . tanh(W1 query + W2 key + b)."""

    def __init__(self, query_dim: int, key_dim: int) -> None:
        super().__init__()
        self.query_projection = nn.Linear(query_dim, query_dim)
        self.key_projection = nn.Linear(key_dim, query_dim, bias=False)
        self.v = nn.Parameter(torch.empty(query_dim).uniform_(-(query_dim**-0.5), query_dim**-0.5))

    def project(self, keys: Tensor) -> Keys:
        return self.key_projection(keys), keys

    def forward(self, query: Tensor, keys: Keys, *, mask: Tensor, need_weights: bool = False) -> Any:
        hidden = self.query_projection(query).unsqueeze(2) + keys[0].unsqueeze(1)  # [B, T, S, H]
        return attend(hidden.tanh() @ self.v, keys[1], mask, need_weights)


class LuongAttention(nn.Module):
    """The score of a query and a key is query . W key."""

    def __init__(self, query_dim: int, key_dim: int) -> None:
        super().__init__()
        self.attn = nn.Linear(key_dim, query_dim, bias=False)

    def project(self, keys: Tensor) -> Keys:
        return self.attn(keys), keys

    def forward(self, query: Tensor, keys: Keys, *, mask: Tensor, need_weights: bool = False) -> Any:
        return attend(query @ keys[0].transpose(1, 2), keys[1], mask, need_weights)


TORCH = SimpleNamespace(
    LSTM=nn.LSTM, LSTMCell=nn.LSTMCell, AdditiveAttention=AdditiveAttention, LuongAttention=LuongAttention
)


class Translator(nn.Module):
    """Dimensions: B sentences, S source tokens, T target tokens, E embedding, H hidden, V target vocabulary."""

    def __init__(self, layers: Any, corpus: Corpus, args: argparse.Namespace) -> None:
        super().__init__()
        E, H, V = args.embedding, args.hidden, corpus.target.get_vocab_size()
        self.fused = layers is seqkernels.nn
        self.feeds_context = args.attention == "additive"
        self.source_embedding = nn.Embedding(corpus.source.get_vocab_size(), E, padding_idx=PAD)
        self.target_embedding = nn.Embedding(V, E, padding_idx=PAD)
        self.encoder = layers.LSTM(E, H, batch_first=True, bidirectional=True)
        self.bridge = nn.ModuleList([nn.Linear(2 * H, H) for _ in range(2)])  # from the states of both directions
        if self.feeds_context:
            self.decoder = layers.LSTMCell(E + 2 * H, H)
            self.attention = layers.AdditiveAttention(H, 2 * H)
        else:
            self.decoder = layers.LSTM(E, H, batch_first=True)
            self.attention = layers.LuongAttention(H, 2 * H)
        self.combine = nn.Linear(3 * H, H)
        self.output = nn.Linear(H, V)
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, batch: Batch) -> Tensor:  # logits [N, V] of the real tokens
        source = self.encode(batch.source, batch.source_lengths)
        inputs = batch.inputs
        if self.feeds_context:
            context, output = self.step_by_step(inputs, batch.own, *source)
        else:
            if batch.own is not None:
                with torch.no_grad():
                    predicted = self.logits(*self.all_steps(inputs, *source)).argmax(-1)  # [B, T], of the next inputs
                inputs = torch.where(batch.own, predicted.roll(1, dims=1), inputs)
            context, output = self.all_steps(inputs, *source)
        return self.logits(*(x.flatten(0, 1).index_select(0, batch.real) for x in (context, output)))

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[Any, dict[str, Tensor], States]:
        """Keys of the source, which of them are valid, and the first states of the decoder."""
        x = self.dropout(self.source_embedding(source))
        if self.fused:
            memory, states = self.encoder(x, lengths=lengths)  # [B, S, 2H]
            valid = {"lengths": lengths}
        else:
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            output, states = self.encoder(packed)
            memory, _ = pad_packed_sequence(output, batch_first=True)
            valid = {"mask": torch.arange(source.shape[1], device=x.device) < lengths[:, None].to(x.device)}
        h, c = (bridge(torch.cat(tuple(s), 1)).tanh() for bridge, s in zip(self.bridge, states, strict=True))
        return self.attention.project(memory), valid, (h, c)

    def all_steps(
        self, inputs: Tensor, keys: Any, valid: dict[str, Tensor], states: States
    ) -> tuple[Tensor, Tensor]:  # contexts [B, T, 2H], outputs [B, T, H]
        h0, c0 = (s.unsqueeze(0) for s in states)
        output, _ = self.decoder(self.dropout(self.target_embedding(inputs)), (h0, c0))  # [B, T, H]
        return self.attention(output, keys, **valid), output

    def step_by_step(
        self, inputs: Tensor, own: Tensor | None, keys: Any, valid: dict[str, Tensor], states: States
    ) -> tuple[Tensor, Tensor]:  # as all_steps
        x = self.dropout(self.target_embedding(inputs))
        contexts, outputs = [], []
        for t in range(inputs.shape[1]):
            x_t = x[:, t]
            if own is not None and t > 0:
                with torch.no_grad():
                    predicted = self.logits(contexts[-1], outputs[-1]).argmax(-1)
                x_t = torch.where(own[:, t, None], self.target_embedding(predicted), x_t)
            context = self.attention(states[0].unsqueeze(1), keys, **valid).squeeze(1)  # [B, 2H]
            states = self.decoder(torch.cat((x_t, context), 1), states)
            contexts.append(context)
            outputs.append(states[0])
        return torch.stack(contexts, 1), torch.stack(outputs, 1)

    def logits(self, context: Tensor, output: Tensor) -> Tensor:  # [..., 2H], [..., H] -> [..., V]
        return self.output(self.dropout(self.combine(torch.cat((context, output), -1)).tanh()))

    def search(self, source: Tensor, lengths: Tensor) -> tuple[Callable[..., Any], States]:
        """The step function of seqkernels.decoding for N hypotheses, and its first state."""
        keys, valid, first = self.encode(source, lengths)

        def attend_to_source(h: Tensor) -> tuple[Tensor, Tensor]:  # the hypotheses of a sentence share its keys
            query = h.view(len(source), -1, h.shape[1])  # [B, N / B, H]
            context, weights = self.attention(query, keys, **valid, need_weights=True)
            return context.flatten(0, 1), weights.flatten(0, 1)

        def step(tokens: Tensor, states: States) -> tuple[Tensor, States, Tensor]:
            x = self.target_embedding(tokens)  # [N, E]
            if self.feeds_context:
                context, weights = attend_to_source(states[0])
                states = self.decoder(torch.cat((x, context), 1), states)
            else:
                _, (h, c) = self.decoder(x.unsqueeze(1), (states[0].unsqueeze(0), states[1].unsqueeze(0)))
                states = h[0], c[0]
                context, weights = attend_to_source(states[0])
            return self.logits(context, states[0]), states, weights

        return step, first


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser(
        __doc__, "translation", epochs=4, batch=64, lr=2e-3, data="a folder with Multi30k; without it, dates"
    )
    option = parser.add_argument
    option(
        "--attention", choices=["luong", "additive"], default="luong", help="and the form of the decoder (%(default)s)"
    )
    option("--embedding", type=common.count, default=32, help="size of token vectors (%(default)s)")
    option("--hidden", type=common.count, default=128, help="hidden size (%(default)s)")
    option("--sampling", type=common.share, default=0.0, help="largest share of predictions among inputs (%(default)s)")
    parallel_text.add_options(parser, with_data=dict(lr=1e-3, embedding=256, hidden=256, dropout=0.2))
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    corpus = parallel_text.load(args)

    def batches(epoch: int, rows: slice) -> Iterator[Batch]:
        sampling = min(args.sampling, SAMPLING_STEP * (epoch - 1))
        return parallel_text.batches(corpus, epoch, rows, args, sampling)

    task = common.Task(
        name="translation",
        build=lambda layers: Translator(layers, corpus, args),
        batches=batches,
        loss=lambda model, batch: parallel_text.token_loss(model(batch), batch, args),
        **parallel_text.metric(corpus, args),
        accumulate=args.accumulate,
        layers={"torch": TORCH, "seqkernels": seqkernels.nn},
    )
    runs = common.train(task, args)
    title = f"{corpus.name}, {args.attention} attention, embedding {args.embedding}, hidden {args.hidden}"
    code = common.report(task, runs, args, title, [parallel_text.heatmap(runs[-1], corpus, args)])
    if common.rank() == 0:
        parallel_text.print_test(runs, corpus, args)
    return code


if __name__ == "__main__":
    common.run(main)
