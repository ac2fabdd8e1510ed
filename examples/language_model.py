"""Train a language model on Python source, or any text, with an LSTM or GRU of torch.nn and of seqkernels.nn.

    python examples/language_model.py                                # byte pairs of the standard library, LSTM
    python examples/language_model.py --model gru --tokens chars     # characters, GRU
    python examples/language_model.py --data book.txt --epochs 10 --prompt "It was"
    torchrun --nproc-per-node 2 examples/language_model.py

The text is cut into parallel streams. Each step trains on the next tokens of all streams; the state is carried to the
next step without its gradient (truncated backpropagation through time). The output layer shares its weight with the
embedding. After training, each model continues a prompt by sampling.
"""

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import common
from seqkernels.decoding import sample

VALID_STREAMS = 8
SHORTEST = 10_000  # characters of a text
Batch = tuple[Tensor, Tensor, bool]  # tokens and next tokens [B, T], whether the streams start


def read(args: argparse.Namespace) -> tuple[str, str]:
    """The text for training and for validation."""
    if args.data:
        text = common.read_text(args.data)
        if len(text) < SHORTEST:
            raise common.ScriptError(f"{args.data}: must hold at least {SHORTEST} characters, got {len(text)}")
    else:
        files = common.shuffled(common.standard_library(), seed=0)
        text = "\n".join(common.read_text(path) for path in files[:200] if path.stat().st_size < 20_000)
    text = text[: args.characters]
    held_out = len(text) // 10
    return text[:-held_out], text[-held_out:]


def learn_tokenizer(text: str, args: argparse.Namespace) -> Tokenizer:
    """Byte pairs, or characters; a text that the tokenizer has not seen is encoded as well."""
    if args.tokens == "byte-pairs":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.train_from_iterator(
            text.splitlines(keepends=True),
            trainers.BpeTrainer(vocab_size=args.vocab, initial_alphabet=alphabet, show_progress=False),
        )
        return tokenizer
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["[UNK]", *sorted(set(text))])}, merges=[]))
    tokenizer.model.unk_token = "[UNK]"
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def streams(ids: list[int], n: int) -> Tensor:
    """[N] -> [n, N // n]: consecutive parts of the text in parallel."""
    return torch.tensor(ids[: len(ids) // n * n]).view(n, -1)


def windows(data: Tensor, steps: int) -> Iterator[Batch]:
    """The next `steps` tokens of all streams, from their start to their end."""
    length = data.shape[1] - 1
    for start in range(0, length, steps):
        end = min(start + steps, length)
        yield data[:, start:end], data[:, start + 1 : end + 1], start == 0


class LanguageModel(nn.Module):
    """An embedding, a recurrent layer, and a linear layer with the weight of the embedding."""

    def __init__(self, layers: Any, vocab: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = layers.Embedding(vocab, args.hidden)
        self.dropout = nn.Dropout(args.dropout)
        layer = {"lstm": layers.LSTM, "gru": layers.GRU}[args.model]
        self.recurrent = layer(args.hidden, args.hidden, args.layers, batch_first=True)
        self.linear = nn.Linear(args.hidden, vocab)
        nn.init.normal_(self.embedding.weight, std=args.hidden**-0.5)
        if args.tie:
            self.linear.weight = self.embedding.weight
        self.state: Any = None  # of the recurrent layer after the previous window

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:  # [B, T] -> [B, T, V]
        output, state = self.recurrent(self.dropout(self.embedding(tokens)), state)
        return self.linear(self.dropout(output)), state

    def forward(self, tokens: Tensor, first: bool) -> Tensor:
        logits, state = self.step(tokens, None if first else self.state)
        self.state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        return logits


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    tokens, targets, first = batch
    logits = model(tokens, first)
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def perplexity(model: nn.Module, data: Tensor, steps: int) -> float:
    """e to the mean loss of a token."""
    sums, counts = zip(*(loss(model, window) for window in windows(data, steps)), strict=True)
    return math.exp(sum(s.item() for s in sums) / sum(counts))


@torch.no_grad()
def generate(model: LanguageModel, tokenizer: Tokenizer, args: argparse.Namespace) -> str:
    """Continues the prompt: reads it but for its last token, which sampling starts with."""
    model.eval()
    *read, last = tokenizer.encode(args.prompt).ids
    state = None

    def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:  # [N] -> [N, V]
        logits, state = model.step(tokens[:, None], state)
        return logits[:, 0], state

    if read:
        _, state = model.step(torch.tensor([read], device=args.device), None)
    else:
        h = torch.zeros(args.layers, 1, args.hidden, device=args.device)
        state = (h, h.clone()) if args.model == "lstm" else h
    drawn = sample(
        step,
        torch.tensor([last], device=args.device),
        state,
        state_dims=1,  # the states are [L, B, H]
        max_length=args.length,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        generator=torch.Generator(args.device).manual_seed(args.seed),
    )
    return tokenizer.decode([*read, last, *drawn.sequences[0, 0].tolist()])


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser(__doc__, "language_model", epochs=3, batch=16, lr=3e-3, data="a text file in UTF-8")
    option = parser.add_argument
    option("--model", choices=["lstm", "gru"], default="lstm", help="the recurrent layer (%(default)s)")
    option("--tokens", choices=["byte-pairs", "chars"], default="byte-pairs", help="the tokens (%(default)s)")
    option("--characters", type=common.count, default=600_000, help="characters that are read (%(default)s)")
    option("--vocab", type=common.count, default=1000, help="number of byte pairs (%(default)s)")
    option("--hidden", type=common.count, default=128, help="size of embedding and layer (%(default)s)")
    option("--layers", type=common.count, default=2, help="number of layers (%(default)s)")
    option("--steps", type=common.count, default=64, help="steps of truncated backpropagation (%(default)s)")
    option("--dropout", type=common.share, default=0.0, help="before and after the layers (%(default)s)")
    option("--tie", action=argparse.BooleanOptionalAction, default=True, help="one weight for embedding and output")
    sampling = parser.add_argument_group("sampling")
    option = sampling.add_argument
    option("--prompt", default="def ", help="the text to continue (%(default)r)")
    option("--length", type=common.count, default=100, help="tokens to generate (%(default)s)")
    option("--temperature", type=common.within(0.01, 100), default=0.8, help="divides the logits (%(default)s)")
    option("--top-k", type=common.count, help="draw from the k most likely tokens")
    top_p = "draw from the most likely tokens of this probability in all (%(default)s)"
    option("--top-p", type=common.within(0.01, 1), default=0.95, help=top_p)
    common.FREE_OPTIONS.update({"prompt", "length", "temperature", "top_k", "top_p"})
    args = parser.parse_args()
    if not args.prompt:
        parser.error("--prompt: must have at least one character")
    if args.characters < SHORTEST:
        parser.error(f"--characters: must be at least {SHORTEST}, got {args.characters}")
    return args


def main() -> int:
    args = parse_arguments()
    train_text, valid_text = read(args)
    tokenizer = learn_tokenizer(train_text, args)
    vocab = tokenizer.get_vocab_size()
    train_ids, valid_ids = (tokenizer.encode(text).ids for text in (train_text, valid_text))
    if len(train_ids) < 2 * args.batch:
        raise common.ScriptError(f"--batch: must be at most half of the {len(train_ids)} tokens, got {args.batch}")
    data = streams(train_ids, args.batch).to(args.device)
    valid = streams(valid_ids, VALID_STREAMS).to(args.device)
    task = common.Task(
        "language_model",
        build=lambda layers: LanguageModel(layers, vocab, args),
        batches=lambda epoch, rows: windows(data[rows], args.steps),
        loss=loss,
        metric=lambda model: perplexity(model, valid, args.steps),
        metric_name="perplexity",
        metric_format=".1f",
        higher_is_better=False,
    )
    source = args.data.name if args.data else "Python's standard library"
    layer = f"{args.model.upper()} {args.hidden}, layers {args.layers}, batch {args.batch}, {args.steps} steps"
    print(f"data: {source}, {len(train_ids)} tokens ({args.tokens}), vocabulary {vocab}, {len(valid_ids)} to validate")
    print(f"model: {layer}, Adam {args.lr:g}, threads {args.threads}", flush=True)
    runs = common.train(task, args)
    code = common.report(task, runs, args, title=f"{source}: {layer}")
    for run in runs if common.rank() == 0 else []:
        start = time.perf_counter()
        text = generate(run.model, tokenizer, args)
        print(f"\n{args.length} tokens of {run.name} in {time.perf_counter() - start:.2f} s:\n\n{text}")
    return code


if __name__ == "__main__":
    common.run(main)
