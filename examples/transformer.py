"""Translate with an encoder-decoder Transformer, with layers of torch.nn and with those of seqkernels.nn.

    python examples/transformer.py                       # written dates to ISO dates
    python examples/transformer.py --layout packed       # seqkernels without padding
    python examples/transformer.py --data multi30k       # German to English; a larger model by default
    torchrun --nproc-per-node 2 examples/transformer.py  # each process trains on a part of each batch

A batch has sentences of different lengths. In the padded layout, torch masks the padding and the later tokens of the
target; seqkernels takes the lengths, and skips the masked scores. In the packed layout, seqkernels runs the tokens of
all sentences as rows without padding, in the linear layers as well; cu_seqlens are the bounds of the sentences. The
layers of torch.nn have no such form for training and remain padded. Both have the same parameters and results.

Sources: Vaswani et al., https://arxiv.org/abs/1706.03762; Xiong et al. (normalisation before each block),
https://arxiv.org/abs/2002.04745
Requires sacrebleu, tokenizers, tqdm and matplotlib.
"""

import argparse
import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import parallel_text
import torch
from parallel_text import PAD, Batch, Corpus
from torch import Tensor, nn

import common
import seqkernels


def waves(length: int, width: int) -> Tensor:
    """Positional encoding [length, width]: sines and cosines of wavelengths from 2 pi to 20000 pi."""
    angles = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    return torch.stack((angles.sin(), angles.cos()), 2).flatten(1)


class Rows:
    """The rows of the tokens of a padded batch, without padding."""

    def __init__(self, lengths: Tensor, longest: int, device: torch.device) -> None:
        steps = torch.arange(longest)
        valid = steps < lengths[:, None]  # [B, T]
        self.index = valid.flatten().nonzero().flatten().to(device)  # [N], in the order of sentences
        self.positions = steps.expand(len(lengths), -1)[valid].to(device)  # [N]
        self.bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).to(device)  # [B + 1]
        self.longest = int(lengths.max())

    def pack(self, padded: Tensor) -> Tensor:  # [B, T] -> [N]
        return padded.flatten()[self.index]


class Transformer(nn.Module):
    """Dimensions: B sentences, S source tokens, T target tokens, N tokens of all sentences, E width, V vocabulary."""

    def __init__(self, layers: Any, corpus: Corpus, args: argparse.Namespace) -> None:
        super().__init__()
        E, V = args.width, corpus.target.get_vocab_size()
        self.fused = layers is seqkernels.nn
        self.packed = self.fused and args.layout == "packed"
        self.source_embedding = nn.Embedding(corpus.source.get_vocab_size(), E, padding_idx=PAD)
        self.target_embedding = nn.Embedding(V, E, padding_idx=PAD)
        # No dropout inside the layers, whose masks differ between torch and seqkernels.
        options = dict(dim_feedforward=4 * E, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.ModuleList(
            [layers.TransformerEncoderLayer(E, args.heads, **options) for _ in range(args.layers)]
        )
        self.decoder = nn.ModuleList(
            [layers.TransformerDecoderLayer(E, args.heads, **options) for _ in range(args.layers)]
        )
        self.encoder_norm, self.decoder_norm = nn.LayerNorm(E), nn.LayerNorm(E)
        self.output = nn.Linear(E, V)
        self.dropout = nn.Dropout(args.dropout)
        self.register_buffer("waves", waves(args.longest, E), persistent=False)
        for embedding in (self.source_embedding, self.target_embedding):
            nn.init.normal_(embedding.weight, std=E**-0.5)

    def forward(self, batch: Batch) -> Tensor:  # logits [N, V] of the real tokens
        if self.packed:
            return self.output(self.packed_features(batch))
        memory = self.encode(batch.source, batch.source_lengths)
        features = self.decode(batch.inputs, memory, batch.source_lengths, batch.lengths)
        return self.output(features.flatten(0, 1).index_select(0, batch.real))

    def embed(self, embedding: nn.Embedding, tokens: Tensor, positions: Tensor | slice) -> Tensor:
        return self.dropout(embedding(tokens) * math.sqrt(embedding.embedding_dim) + self.waves[positions])

    def encode(self, source: Tensor, lengths: Tensor) -> Tensor:  # [B, S] -> [B, S, E]
        x = self.embed(self.source_embedding, source, slice(source.shape[1]))
        if self.fused:
            options = {"lengths": lengths}
        else:
            options = {"src_key_padding_mask": padding(lengths, source.shape[1], x.device)}
        for layer in self.encoder:
            x = layer(x, **options)
        return self.encoder_norm(x)

    def decode(self, inputs: Tensor, memory: Tensor, source_lengths: Tensor, lengths: Tensor) -> Tensor:
        """Features [B, T, E] of the next tokens, from inputs [B, T] and memory [B, S, E]."""
        T = inputs.shape[1]
        x = self.embed(self.target_embedding, inputs, slice(T))
        if self.fused:
            options: dict[str, Any] = {"lengths": lengths, "memory_lengths": source_lengths}
        else:  # padding of the target follows its tokens, so that the causal mask hides it
            options = {
                "tgt_mask": torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1),
                "memory_key_padding_mask": padding(source_lengths, memory.shape[1], x.device),
            }
        for layer in self.decoder:
            x = layer(x, memory, tgt_is_causal=True, **options)
        return self.decoder_norm(x)

    def packed_features(self, batch: Batch) -> Tensor:  # [N, E]
        source = Rows(batch.source_lengths, batch.source.shape[1], batch.source.device)
        target = Rows(batch.lengths, batch.inputs.shape[1], batch.inputs.device)
        memory = self.embed(self.source_embedding, source.pack(batch.source), source.positions)  # [N, E]
        for layer in self.encoder:
            memory = layer(memory, cu_seqlens=source.bounds, max_seqlen=source.longest)
        memory = self.encoder_norm(memory)
        x = self.embed(self.target_embedding, target.pack(batch.inputs), target.positions)
        for layer in self.decoder:
            x = layer(
                x, memory, tgt_is_causal=True, cu_seqlens=target.bounds, max_seqlen=target.longest,
                memory_cu_seqlens=source.bounds, memory_max_seqlen=source.longest,
            )  # fmt: skip
        return self.decoder_norm(x)

    def search(self, source: Tensor, lengths: Tensor) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The step function of seqkernels.decoding for N hypotheses, and its first state.

        The state has the keys of the self-attention of each layer before their projection, [N, t, E].
        """
        memory = self.encode(source, lengths)
        hidden = padding(lengths, memory.shape[1], memory.device)

        def step(tokens: Tensor, before: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
            t = before[0].shape[1]
            x = self.embed(self.target_embedding, tokens.unsqueeze(1), slice(t, t + 1))  # [N, 1, E]
            state = []
            for layer, earlier in zip(self.decoder, before, strict=True):
                keys = torch.cat((earlier, layer.norm1(x)), 1)
                state.append(keys)
                x = x + layer.self_attn(keys[:, -1:], keys, keys, need_weights=False)[0]
                query = layer.norm2(x).reshape(len(source), -1, x.shape[2])  # hypotheses of a sentence share its memory
                found, _ = layer.multihead_attn(query, memory, memory, key_padding_mask=hidden, need_weights=False)
                x = x + found.reshape(x.shape)
                x = x + layer.linear2(layer.linear1(layer.norm3(x)).relu())
            return self.output(self.decoder_norm(x[:, 0])), tuple(state)

        return step, (memory.new_zeros(len(source), 0, memory.shape[2]),) * len(self.decoder)


def padding(lengths: Tensor, longest: int, device: torch.device) -> Tensor:
    """Mask [B, longest] of padding, as torch.nn takes it: True where a token is hidden."""
    return (torch.arange(longest) >= lengths[:, None]).to(device)


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser(
        __doc__, "transformer", epochs=4, batch=64, lr=1e-3, data="a folder with Multi30k; without it, dates"
    )
    option = parser.add_argument
    option("--layout", choices=["padded", "packed"], default="padded", help="of seqkernels (%(default)s)")
    option("--width", type=common.count, default=64, help="size of token vectors (%(default)s)")
    option("--heads", type=common.count, default=4, help="heads of attention (%(default)s)")
    option("--layers", type=common.count, default=2, help="layers of encoder and decoder (%(default)s)")
    option("--longest", type=common.count, default=512, help="tokens of the longest sentence (%(default)s)")
    parallel_text.add_options(parser, with_data=dict(lr=5e-4, width=256, layers=3, dropout=0.1))
    args = parser.parse_args()
    if args.width % args.heads or args.width % 2:
        parser.error(f"--width: must be even and a multiple of --heads {args.heads}, got {args.width}")
    return args


def main() -> int:
    args = parse_arguments()
    corpus = parallel_text.load(args)
    sources = (corpus.source.encode(text).ids for text, _ in corpus.valid + corpus.test)
    longest = max(map(len, chain(*corpus.train, sources)))
    if longest > args.longest:
        raise common.ScriptError(f"--longest: must be at least {longest}, the tokens of a sentence, got {args.longest}")

    task = common.Task(
        name="transformer",
        build=lambda layers: Transformer(layers, corpus, args),
        batches=lambda epoch, rows: parallel_text.batches(corpus, epoch, rows, args),
        loss=lambda model, batch: parallel_text.token_loss(model(batch), batch, args),
        **parallel_text.metric(corpus, args),
        accumulate=args.accumulate,
    )
    runs = common.train(task, args)
    shape = f"width {args.width}, {args.heads} heads, {args.layers} + {args.layers} layers"
    code = common.report(task, runs, args, f"{corpus.name}, Transformer of {shape}, {args.layout}")
    if common.rank() == 0:
        parallel_text.print_test(runs, corpus, args)
    return code


if __name__ == "__main__":
    common.run(main)
