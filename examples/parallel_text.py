"""Data of translation.py and transformer.py: pairs of sentences, their tokens, batches, search and scores.

Without --data, the task is to translate written dates to ISO 8601: "the 5th of March, 1998" to "1998-03-05". --data is
a folder with Multi30k (https://github.com/multi30k/dataset): train, val and test_2016_flickr in .de and .en.
"""

import argparse
import datetime
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from matplotlib.axes import Axes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

import common
from common import ScriptError
from seqkernels.decoding import Decoded, beam_search

SPECIAL = ["[PAD]", "[UNK]", "[BOS]", "[EOS]"]
PAD, UNKNOWN, BOS, EOS = range(4)
PARTS = "train", "val", "test_2016_flickr"
SOURCE, TARGET = ".de", ".en"
MULTI30K = dict(epochs=8, limit=29_000, vocab=4000, bucket=20)  # defaults of options
FORMATS = [
    "{d} {B} {Y}", "{B} {d}, {Y}", "{A}, {d} {B} {Y}", "the {d}{th} of {B}, {Y}", "{A} the {d}{th} of {B} {Y}",
    "{a} {d} {b} '{y}", "{b} {d}, '{y}", "{d:02}.{m:02}.{Y}", "{m}/{d}/{Y}",
]  # fmt: skip

Pair = tuple[Tensor, Tensor]  # token ids of the source [S]; of the target with BOS and EOS [T + 2]
Texts = list[tuple[str, str]]


@dataclass
class Corpus:
    """Pairs of sentences, and the tokenizers of both languages."""

    name: str
    source: Tokenizer
    target: Tokenizer
    train: list[Pair]
    valid: Texts
    test: Texts
    exact: bool  # whether a translation is right only if it equals the reference


@dataclass
class Batch:
    source: Tensor  # [B, S]
    source_lengths: Tensor  # [B], on the CPU
    inputs: Tensor  # [B, T]: BOS and the target
    lengths: Tensor  # [B] of inputs, on the CPU
    real: Tensor  # [N]: where the real tokens of inputs are in [B * T], in the order of sentences
    targets: Tensor  # [N]: the next token of each of them, at last EOS
    own: Tensor | None  # [B, T] bool: where the model reads its own prediction (scheduled sampling)


def add_options(parser: common.Parser, with_data: dict[str, Any]) -> None:
    """The options of both scripts; with_data: defaults of any options for Multi30k. To be called last."""
    option = parser.add_argument
    option("--limit", type=common.count, default=6400, help="pairs for training (%(default)s)")
    option("--vocab", type=common.count, default=6000, help="tokens of a language in --data (%(default)s)")
    option("--smoothing", type=common.share, default=0.1, help="label smoothing (%(default)s)")
    option("--accumulate", type=common.count, default=1, help="batches per optimizer step (%(default)s)")
    option("--bucket", type=common.count, default=1, help="batches that are sorted by length together (%(default)s)")
    option("--dropout", type=common.share, default=0.0, help="dropout of embeddings and outputs (%(default)s)")
    option("--beam", type=common.count, default=4, help="hypotheses of beam search (%(default)s)")
    option("--length-penalty", type=common.within(0, 9), default=0.6, help="exponent of its penalty (%(default)s)")
    option("--evaluate", type=common.count, default=200, help="validation sentences for the metric (%(default)s)")
    if parser.parse_known_args()[0].data is not None:
        parser.set_defaults(**MULTI30K, **with_data)


# ---- texts


def written_dates(count: int, seed: int) -> Texts:
    """Distinct dates of 100 years, so that two digits of the year suffice, in formats without ambiguity."""
    rng = random.Random(seed)
    first = datetime.date(1950, 1, 1).toordinal()
    days = rng.sample(range(first, datetime.date(2050, 1, 1).toordinal()), count)
    pairs = []
    for day in map(datetime.date.fromordinal, days):
        th = "th" if 11 <= day.day <= 13 else {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
        text = rng.choice(FORMATS).format(
            d=day.day, m=day.month, Y=day.year, y=f"{day.year % 100:02}", th=th,
            a=f"{day:%a}", A=f"{day:%A}", b=f"{day:%b}", B=f"{day:%B}",
        )  # fmt: skip
        pairs.append((text, day.isoformat()))
    return pairs


def read_pairs(folder: Path, part: str) -> Texts:
    """The lines of two files; line n of one is the translation of line n of the other."""
    paths = [folder / f"{part}{language}" for language in (SOURCE, TARGET)]
    texts = [common.read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n") for path in paths]
    shorter, longer = sorted(range(2), key=lambda i: len(texts[i]))
    if len(texts[0]) != len(texts[1]):
        line = len(texts[shorter]) + 1
        raise ScriptError(
            f"{paths[shorter]}: line {line} must be the translation of that of {paths[longer].name}, got no line"
        )
    for path, lines in zip(paths, texts, strict=True):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ScriptError(f"{path}: line {number} must hold a sentence, got an empty line")
    return list(zip(*texts, strict=True))


def tokenizer_of(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-pair encoding; characters if the vocabulary has no room for pairs."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    words = pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Punctuation()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(words))
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load(args: argparse.Namespace) -> Corpus:
    if args.data is None:
        held_out, days = 500, 36524
        if args.limit > days - 2 * held_out:
            raise ScriptError(f"--limit: must be at most {days - 2 * held_out} without --data, got {args.limit}")
        texts = written_dates(args.limit + 2 * held_out, args.seed)
        train, valid, test = texts[2 * held_out :], texts[:held_out], texts[held_out : 2 * held_out]
        name, vocab = "written dates", 1
    else:
        train, valid, test = (read_pairs(args.data, part) for part in PARTS)
        train = common.shuffled(train, args.seed)[: args.limit]
        name, vocab = args.data.name, args.vocab
    source, target = (tokenizer_of([pair[i] for pair in train], vocab) for i in range(2))
    ids = [(source.encode(a).ids, [BOS, *target.encode(b).ids, EOS]) for a, b in train]
    pairs = [(torch.tensor(a), torch.tensor(b)) for a, b in ids]
    return Corpus(name, source, target, pairs, valid, test, exact=args.data is None)


# ---- batches


def padded(sequences: list[Tensor], device: str) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(ids) for ids in sequences])
    return pad_sequence(sequences, batch_first=True, padding_value=PAD).to(device), lengths


def batches(
    corpus: Corpus, epoch: int, rows: slice, args: argparse.Namespace, sampling: float = 0.0
) -> Iterator[Batch]:
    """The batches of an epoch. sampling: the share of inputs that are predictions of the model."""
    generator = torch.Generator().manual_seed(args.seed + epoch)
    draws = torch.rand(len(corpus.train), max(len(target) for _, target in corpus.train), generator=generator)
    for chosen in batches_of_indices(corpus, epoch, args):
        chosen = chosen[rows]
        sources, targets = zip(*(corpus.train[i] for i in chosen), strict=True)
        source, source_lengths = padded(list(sources), args.device)
        target, lengths = padded(list(targets), args.device)
        own = None
        if sampling > 0:
            own = draws[chosen, : target.shape[1] - 1].to(args.device) < sampling
            own[:, 0] = False  # BOS
        inputs, lengths = target[:, :-1], lengths - 1
        real = (torch.arange(inputs.shape[1]) < lengths[:, None]).flatten().nonzero()[:, 0].to(args.device)
        targets = target[:, 1:].flatten()[real]
        yield Batch(source, source_lengths, inputs, lengths, real, targets, own)


def batches_of_indices(corpus: Corpus, epoch: int, args: argparse.Namespace) -> list[Sequence[int]]:
    """The pairs of each batch, in random order. Each --bucket batches together are sorted by length."""
    order = common.shuffled(range(len(corpus.train)), args.seed + epoch)
    if args.bucket == 1:
        return list(common.batches_of(order, args.batch))
    result: list[Sequence[int]] = []
    for some in common.batches_of(order, args.bucket * args.batch):
        by_length = sorted(some, key=lambda i: [len(ids) for ids in corpus.train[i]])
        result += common.batches_of(by_length, args.batch)
    return common.shuffled(result, args.seed + epoch)


def token_loss(logits: Tensor, batch: Batch, args: argparse.Namespace) -> tuple[Tensor, float]:
    """Sum over the tokens, and their number. logits: [N, V]."""
    loss = cross_entropy(logits, batch.targets, label_smoothing=args.smoothing, reduction="sum")
    return loss, float(len(batch.targets))


# ---- search and scores


def search(model: nn.Module, corpus: Corpus, texts: list[str], args: argparse.Namespace, **options: Any) -> Decoded:
    """Beam search with the step function that model.search returns."""
    ids = [torch.tensor(corpus.source.encode(text).ids or [UNKNOWN]) for text in texts]
    source, lengths = padded(ids, args.device)
    step, state = model.search(source, lengths)
    longest = max(len(target) for _, target in corpus.train)
    return beam_search(
        step, torch.full((len(texts),), BOS, device=args.device), state, beam_size=args.beam, max_length=longest,
        eos_token_id=EOS, length_penalty=args.length_penalty, **options,
    )  # fmt: skip


@torch.no_grad()
def translate(model: nn.Module, corpus: Corpus, texts: list[str], args: argparse.Namespace) -> list[str]:
    result = []
    for some in common.batches_of(texts, 50):
        best = search(model, corpus, list(some), args)
        result += [corpus.target.decode(ids[:n]) for ids, n in zip(best.sequences[:, 0].tolist(), best.lengths[:, 0])]
    return result


def bleu(found: list[str], references: list[str], corpus: Corpus) -> float:
    tokenize = "char" if corpus.exact else "13a"
    # force: no warning that the text is in tokens, as the files of Multi30k are
    return sacrebleu.corpus_bleu(found, [references], tokenize=tokenize, force=True).score


def accuracy(found: list[str], references: list[str]) -> float:
    return sum(a == b for a, b in zip(found, references, strict=True)) / len(references)


def metric(corpus: Corpus, args: argparse.Namespace) -> dict[str, Any]:
    """The metric of a `common.Task`: exact translations, or BLEU."""
    sources, references = zip(*corpus.valid[: args.evaluate], strict=True)

    def score(model: nn.Module) -> float:
        found = translate(model, corpus, list(sources), args)
        return accuracy(found, list(references)) if corpus.exact else bleu(found, list(references), corpus)

    shown = ("exact", ".1%") if corpus.exact else ("BLEU", ".2f")
    return {"metric": score, "metric_name": shown[0], "metric_format": shown[1]}


@torch.no_grad()
def print_test(runs: list[common.Run], corpus: Corpus, args: argparse.Namespace) -> None:
    """Scores of the test set, and translations of its first sentences."""
    sources, references = map(list, zip(*corpus.test, strict=True))
    for run in runs:
        found = translate(run.model.eval(), corpus, sources, args)
        exact = f"{accuracy(found, references):.1%} exact" if corpus.exact else f"{len(references)} sentences"
        print(f"test, {run.name}: BLEU {bleu(found, references, corpus):.2f}, {exact}")
    for source, reference, translation in zip(sources[:3], references, found, strict=False):
        print(f"  {source}\n    reference   {reference}\n    translation {translation}")


def heatmap(run: common.Run, corpus: Corpus, args: argparse.Namespace) -> Callable[[Axes], None]:
    """A plot of the attention weights in the translation of a test sentence."""

    def panel(axes: Axes) -> None:
        text = corpus.test[0][0]
        best = search(run.model.eval(), corpus, [text], args, return_attention=True)
        count = int(best.lengths[0, 0])
        axes.imshow(best.attention[0, 0, :count].cpu(), cmap="Blues", aspect="auto", vmin=0, vmax=1)
        tokens = (
            corpus.source.encode(text).tokens,
            [corpus.target.id_to_token(i) for i in best.sequences[0, 0, :count].tolist()],
        )
        slanted = {} if corpus.exact else dict(rotation=40, ha="right", rotation_mode="anchor")
        axes.set_xticks(range(len(tokens[0])), tokens[0], **slanted)
        axes.set_yticks(range(count), tokens[1])
        axes.set(xlabel="source", ylabel="translation")
        axes.set_title(f"Attention weights, {run.name}", fontweight="bold", fontsize=11)

    return panel
