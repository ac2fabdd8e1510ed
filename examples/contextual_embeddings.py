"""Learn vectors of words in their context, with torch and with seqkernels.

    python examples/contextual_embeddings.py               # docstrings of Python's library, LSTMs of both directions
    python examples/contextual_embeddings.py --model bert  # a small BERT of Transformers
    python examples/contextual_embeddings.py --data text.txt --word time
    torchrun --nproc-per-node 2 examples/contextual_embeddings.py

The bidirectional language model (ELMo) has two stacks of LSTMs with projections. One reads the words before a position
and predicts the next word, the other reads the words after it and predicts the previous one; the vector of a word in
its sentence has the outputs of both. BERT predicts masked words. After training, the words whose vectors are nearest to
that of `--word` in a few sentences are printed, and the picture shows the vectors of frequent words, one point for each
occurrence.

Source: Peters et al., "Deep contextualized word representations", https://arxiv.org/abs/1802.05365; Devlin et al.,
"BERT", https://arxiv.org/abs/1810.04805
Requires tqdm and matplotlib; BERT also transformers.
"""

import argparse
import ast
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence, pad_sequence

import common

SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]", "[MASK]"]
PAD, UNKNOWN, BOS, EOS, MASK = range(5)
MASKED = 0.15  # share of the words that BERT predicts
FEWEST = 100  # sentences
IGNORED = -100  # target of other words
Batch = tuple[Tensor, Tensor, Tensor]  # tokens [B, T] with BOS and EOS, lengths [B], targets of BERT [B, T]


def read(data: Path | None) -> list[list[str]]:
    """Sentences as lists of lower-case words, from a text with one paragraph per line, or from docstrings."""
    paragraphs: list[str] = []
    if data:
        paragraphs = common.read_text(data).splitlines()
    else:
        for path in common.standard_library():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in string literals
                tree = ast.parse(path.read_bytes())
            nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module))
            paragraphs += [" ".join(p.split()) for node in nodes for p in (ast.get_docstring(node) or "").split("\n\n")]
    sentences = dict.fromkeys(s for p in paragraphs for s in re.split(r"(?<=[.!?])\s+", p.lower()))
    words = [re.findall(r"[^\W\d_]+|\d+|[^\w\s]", sentence) for sentence in sentences]
    found = [sentence[:40] for sentence in words if len(sentence) >= 4]
    if len(found) < FEWEST:
        raise common.ScriptError(f"{data}: must hold at least {FEWEST} sentences of 4 words, got {len(found)}")
    return found


class BidirectionalLanguageModel(nn.Module):
    """ELMo: stacks of LSTMs with projections for both directions, which share the embedding and the output layer."""

    def __init__(self, layers: Any, vocab: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = layers.Embedding(vocab, args.size, padding_idx=PAD)
        self.directions = nn.ModuleList(
            nn.ModuleList(layers.LSTM(args.size, args.hidden, proj_size=args.size) for _ in range(args.layers))
            for _ in range(2)
        )
        self.linear = nn.Linear(args.size, vocab)

    def run(self, tokens: Tensor, lengths: Tensor, direction: int) -> PackedSequence:
        """Outputs [N, E] at the tokens but the last, in the order of the direction."""
        packed = pack_padded_sequence(tokens.t(), lengths.cpu() - 1, enforce_sorted=False)
        packed = packed._replace(data=self.embedding(packed.data))
        for layer in self.directions[direction]:
            packed = packed._replace(data=packed.data + layer(packed)[0].data)
        return packed

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of the next words and of the previous words, and their number."""
        total = torch.zeros((), device=tokens.device)
        for direction, read in enumerate((tokens, backwards(tokens, lengths))):
            output = self.run(read, lengths, direction)
            wanted = pack_padded_sequence(read.t()[1:], lengths.cpu() - 1, enforce_sorted=False).data
            total = total + cross_entropy(self.linear(output.data), wanted, reduction="sum")
        return total, 2 * (lengths - 1).sum()

    def vectors(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, 2E]: the outputs of both directions after they have read the word."""
        first, _ = pad_packed_sequence(self.run(tokens, lengths, 0), total_length=tokens.shape[1])
        second, _ = pad_packed_sequence(self.run(backwards(tokens, lengths), lengths, 1), total_length=tokens.shape[1])
        return torch.cat([first.transpose(0, 1), backwards(second.transpose(0, 1), lengths)], dim=2)


def backwards(x: Tensor, lengths: Tensor) -> Tensor:
    """[B, T, ...] with the steps of each sequence in reverse order; padding stays."""
    step = torch.arange(x.shape[1], device=x.device)
    last = lengths.to(x.device)[:, None] - 1
    index = torch.where(step <= last, last - step, step)  # [B, T]
    return torch.take_along_dim(x, index.view(*index.shape, *(1,) * (x.dim() - 2)), 1)


class Bert(nn.Module):
    """A small BERT of Transformers with the attention of torch or of seqkernels."""

    def __init__(self, layers: Any, vocab: int, args: argparse.Namespace) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertForMaskedLM
        except ImportError as error:
            raise common.ScriptError(f"--model bert: transformers must be installed: {error}") from error
        if layers is not nn:
            import seqkernels.integrations.transformers  # noqa: F401  (registers its attention)
        config = BertConfig(
            vocab_size=vocab, hidden_size=args.size, intermediate_size=4 * args.size, pad_token_id=PAD,
            num_hidden_layers=args.layers, num_attention_heads=4, max_position_embeddings=64,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="sdpa" if layers is nn else "seqkernels",
        )  # fmt: skip
        self.bert = BertForMaskedLM(config)

    def forward(self, tokens: Tensor, lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the losses of the masked words, and their number."""
        masked = torch.where(targets == IGNORED, tokens, MASK)
        logits = self.bert(input_ids=masked, attention_mask=tokens != PAD).logits
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED)
        return total, (targets != IGNORED).sum()

    def vectors(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """[B, T, E]: the output of the last layer."""
        return self.bert.bert(input_ids=tokens, attention_mask=tokens != PAD).last_hidden_state


MODELS: dict[str, type[nn.Module]] = {"elmo": BidirectionalLanguageModel, "bert": Bert}


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    total, count = model(*batch)
    return total, float(count)


def batches(sentences: list[Tensor], args: argparse.Namespace, seed: int, rows: slice = slice(None)) -> Iterator[Batch]:
    """Padded sentences. BERT's targets are some of their words, drawn for the whole batch so that ranks agree."""
    generator = torch.Generator().manual_seed(seed)
    for chunk in common.batches_of(sentences, args.batch):
        tokens = pad_sequence(list(chunk), batch_first=True, padding_value=PAD)
        chosen = (torch.rand(tokens.shape, generator=generator) < MASKED) & (tokens > MASK)
        chosen[:, 1] |= tokens[:, 1] > MASK  # at least one word of most sentences
        targets = tokens.masked_fill(~chosen, IGNORED)
        lengths = (tokens != PAD).sum(1)
        yield tuple(t[rows].to(args.device) for t in (tokens, lengths, targets))


@torch.no_grad()
def contexts(model: nn.Module, sentences: list[Tensor], args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Of each word in each sentence: its vector of length 1 [N, E], the sentence [N], the position [N]."""
    model.eval()
    vectors, where, at = [], [], []
    for first in range(0, len(sentences), args.batch):
        chunk = sentences[first : first + args.batch]
        tokens = pad_sequence(chunk, batch_first=True, padding_value=PAD)
        found = model.vectors(tokens.to(args.device), (tokens != PAD).sum(1).to(args.device)).cpu()
        sentence, position = (tokens > MASK).nonzero(as_tuple=True)
        vectors.append(found[sentence, position])
        where.append(sentence + first)
        at.append(position)
    return normalize(torch.cat(vectors), dim=1), torch.cat(where), torch.cat(at)


def text_of(sentence: list[str], position: int) -> str:
    """A few words around a position, which is that of the word plus one for BOS."""
    i = position - 1
    return " ".join([*sentence[max(0, i - 5) : i], f"[{sentence[i]}]", *sentence[i + 1 : i + 6]])


def print_neighbours(model: nn.Module, words: list[list[str]], ids: list[Tensor], args: argparse.Namespace) -> None:
    """For occurrences of a word in different sentences, the nearest words in other sentences."""
    vectors, where, at = contexts(model, ids, args)
    spelled = [words[s][p - 1] for s, p in zip(where.tolist(), at.tolist(), strict=True)]
    found = [i for i, word in enumerate(spelled) if word == args.word]
    if not found:
        print(f"\n{args.word!r} does not occur in the validation sentences")
        return
    print(f"\nNearest in context to {args.word!r}:")
    for i in found[:: max(1, len(found) // 3)][:3]:
        similarity = vectors @ vectors[i]
        similarity[where == where[i]] = -1
        print(f"  {text_of(words[where[i]], int(at[i]))}")
        for value, j in zip(*(t.tolist() for t in similarity.topk(3)), strict=True):
            print(f"    {value:.2f}  {text_of(words[where[j]], int(at[j]))}")


def draw_vectors(run: common.Run, words: list[list[str]], ids: list[Tensor], args: argparse.Namespace) -> list[Any]:
    """A panel with the vectors of frequent words in their two main components; none if there are fewer than two."""
    vectors, where, at = contexts(run.model, ids, args)
    spelled = [words[s][p - 1] for s, p in zip(where.tolist(), at.tolist(), strict=True)]
    shown = [word for word, _ in Counter(w for w in spelled if len(w) > 3).most_common(8)]
    chosen = torch.tensor([i for i, word in enumerate(spelled) if word in shown])
    if len(chosen) < 2:
        return []

    def panel(axes: Axes) -> None:
        points = vectors[chosen] - vectors[chosen].mean(0)
        _, _, components = torch.linalg.svd(points, full_matrices=False)
        points = points @ components[:2].T
        names = [spelled[i] for i in chosen.tolist()]
        for word in shown:
            of_word = points[torch.tensor([name == word for name in names])]
            axes.scatter(*of_word.T.tolist(), s=8, label=word)
        axes.set_title(f"Words in their sentences, two main components, {run.name}", fontweight="bold", fontsize=11)
        axes.legend(frameon=False, fontsize=8, ncols=2)
        axes.spines[["top", "right"]].set_visible(False)

    return [panel]


def perplexity(model: nn.Module, data: list[Batch]) -> float:
    sums, counts = zip(*(loss(model, batch) for batch in data), strict=True)
    return math.exp(sum(s.item() for s in sums) / sum(counts))


def parse_arguments() -> argparse.Namespace:
    description = "a text file in UTF-8, one paragraph per line"
    parser = common.Parser(__doc__, "contextual_embeddings", epochs=3, batch=32, lr=2e-3, data=description)
    option = parser.add_argument
    option("--model", choices=MODELS, default="elmo", help="elmo: LSTMs of both directions; bert (%(default)s)")
    option("--size", type=common.count, default=64, help="size of the vectors (%(default)s)")
    option("--hidden", type=common.count, default=128, help="hidden size of the LSTMs (%(default)s)")
    option("--layers", type=common.count, default=2, help="number of layers (%(default)s)")
    option("--vocab", type=common.count, default=2000, help="number of words (%(default)s)")
    option("--sentences", type=common.count, default=2000, help="sentences that are read (%(default)s)")
    option("--word", default="file", help="the word whose neighbours are printed (%(default)s)")
    common.FREE_OPTIONS.add("word")
    args = parser.parse_args()
    if args.model == "bert" and args.size % 4:
        parser.error(f"--size: must be a multiple of the 4 heads of BERT, got {args.size}")
    if args.model == "elmo" and args.size >= args.hidden:
        parser.error(f"--size: must be below --hidden {args.hidden}, from which the LSTMs project, got {args.size}")
    if args.sentences < FEWEST:
        parser.error(f"--sentences: must be at least {FEWEST}, got {args.sentences}")
    return args


def main() -> int:
    args = parse_arguments()
    sentences = common.shuffled(read(args.data), args.seed)[: args.sentences]
    held_out = len(sentences) // 10
    words, valid_words = sentences[held_out:], sentences[:held_out]
    frequent = Counter(word for sentence in words for word in sentence).most_common(args.vocab)
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *(word for word, _ in frequent)])}
    ids, valid_ids = (
        [torch.tensor([BOS, *(vocabulary.get(word, UNKNOWN) for word in s), EOS]) for s in part]
        for part in (words, valid_words)
    )
    valid = list(batches(valid_ids, args, seed=0))
    task = common.Task(
        "contextual_embeddings",
        build=lambda layers: MODELS[args.model](layers, len(vocabulary), args),
        batches=lambda epoch, rows: batches(common.shuffled(ids, args.seed + epoch), args, epoch, rows),
        loss=loss,
        metric=lambda model: perplexity(model, valid),
        metric_name="perplexity",
        metric_format=".1f",
        higher_is_better=False,
    )
    source = args.data.name if args.data else "docstrings of Python's standard library"
    shape = f"{args.model}, vectors {args.size}, layers {args.layers}, batch {args.batch}"
    print(f"data: {source}, {len(sentences)} sentences, vocabulary {len(vocabulary)}; {held_out} sentences to validate")
    print(f"model: {shape}, Adam {args.lr:g}, threads {args.threads}", flush=True)
    runs = common.train(task, args)
    panels = []
    for run in runs if common.rank() == 0 else []:
        panels += draw_vectors(run, valid_words, valid_ids, args)
    code = common.report(task, runs, args, title=f"{source}: {shape}", panels=panels)
    if common.rank() == 0:
        print_neighbours(runs[-1].model, valid_words, valid_ids, args)
    return code


if __name__ == "__main__":
    common.run(main)
