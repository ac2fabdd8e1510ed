"""Classify texts of very different lengths, once with torch.nn.LSTM and once with seqkernels.nn.LSTM.

    python examples/text_classification.py                                    # docstrings of Python's own library
    python examples/text_classification.py --data ag_news.csv                 # AG News, a small model
    python examples/text_classification.py --data ag_news.csv --preset large  # AG News, two layers, both directions

Both models start from the same weights and see the same batches in the same order, taking turns epoch by epoch.
At the end come a table, the largest difference between their losses, and a picture of losses and times.
Nothing is downloaded.
"""

import argparse
import ast
import copy
import csv
import html
import os
import sys
import sysconfig
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

import seqkernels.nn

LSTMS = {"torch": torch.nn.LSTM, "seqkernels": seqkernels.nn.LSTM}
COLORS = {"torch": "#e0873a", "seqkernels": "#1f5fa8"}
PRESETS = {
    "small": {"embedding": 64, "hidden": 32, "layers": 1, "bidirectional": False, "batch": 16},
    "large": {"embedding": 300, "hidden": 256, "layers": 2, "bidirectional": True, "batch": 64},
}
PAD, UNKNOWN = 0, 1  # token ids

# The topic of a docstring is that of the module or package it stands in. A name that this Python lacks does no harm.
TOPICS = {
    "networking": """cgi ftplib http imaplib ipaddress nntplib poplib smtpd smtplib socket socketserver ssl telnetlib
        urllib webbrowser wsgiref xmlrpc""",
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "graphics": "colorsys curses tkinter turtle turtledemo",
    "text": """base64 codecs configparser csv difflib email encodings gettext html json locale plistlib pprint quopri
        re shlex string textwrap tomllib xml""",
    "testing": """bdb cProfile cmd code doctest faulthandler logging pdb profile pstats timeit trace traceback
        tracemalloc unittest warnings""",
    "files": """_compression _pyio bz2 compression dbm filecmp fileinput fnmatch genericpath glob gzip lzma mailbox
        ntpath os pathlib posixpath shelve shutil stat tarfile tempfile zipfile zipimport""",
}
AG_NEWS = ["world", "sports", "business", "science"]

Texts = list[tuple[str, int]]  # text, index of its class
Samples = list[tuple[Tensor, int]]  # token ids [T], index of the class
Batch = tuple[Tensor, Tensor, Tensor]  # tokens [B, T], lengths [B], classes [B]


def read_standard_library() -> tuple[list[str], Texts]:
    """The docstrings of the running Python's standard library; its source is parsed, nothing is imported."""
    root = Path(sysconfig.get_path("stdlib"))
    names = list(TOPICS)
    topic_of = {module: names.index(topic) for topic, modules in TOPICS.items() for module in modules.split()}
    texts: dict[str, int] = {}  # by text: one that occurs twice must not be in both training and validation
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in topic_of or {"test", "tests"} & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in somebody else's string literals
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 6:
                    texts.setdefault(text, topic_of[parts[0]])
    if len(set(texts.values())) < len(names):
        raise ValueError(f"no Python source of the standard library under {root}; give texts with --data")
    return names, list(texts.items())


def read_ag_news(path: Path) -> tuple[list[str], Texts]:
    """AG News: rows of "class","title","description", classes 1 to 4."""
    texts: dict[str, int] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if number == 1 and row[:1] == ["Class Index"]:  # some copies have a header
                continue
            if len(row) != 3 or row[0] not in {"1", "2", "3", "4"} or not "".join(row[1:]).strip():
                raise ValueError(f'{path}: row {number} must be "class 1-4","title","description", got {row}')
            text = " ".join(row[1:]).replace("\\", " ").replace(" #", " &#")  # line breaks and entities, both broken
            texts.setdefault(html.unescape(text), int(row[0]) - 1)
    if len(texts) < 100:
        raise ValueError(f"{path}: at least 100 texts are needed, got {len(texts)}")
    return AG_NEWS, list(texts.items())


def prepare(args: argparse.Namespace) -> tuple[list[str], int, Samples, Samples]:
    """Read, split by seed, and turn into token ids: names of the classes, vocabulary size, training, validation."""
    names, texts = read_ag_news(args.data) if args.data else read_standard_library()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(args.seed)).tolist()
    texts = [texts[i] for i in order]
    held_out = len(texts) // 5
    train, valid = texts[held_out:], texts[:held_out]

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words and punctuation
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator((text for text, _ in train), trainer)
    tokenizer.enable_truncation(args.max_length)

    def encode(texts: Texts) -> Samples:
        encodings = tokenizer.encode_batch([text for text, _ in texts])
        return [(torch.tensor(e.ids or [UNKNOWN]), label) for e, (_, label) in zip(encodings, texts, strict=True)]

    return names, tokenizer.get_vocab_size(), encode(train), encode(valid)


def batches(samples: Samples, size: int, seed: int | None = None) -> list[Batch]:
    """Padded batches, in an order drawn from the seed; without a seed in the order given."""
    order = list(range(len(samples)))
    if seed is not None:
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed)).tolist()
    result = []
    for start in range(0, len(order), size):
        tokens, labels = zip(*(samples[i] for i in order[start : start + size]), strict=True)
        lengths = torch.tensor([len(t) for t in tokens])
        result.append((pad_sequence(tokens, batch_first=True, padding_value=PAD), lengths, torch.tensor(labels)))
    return result


class Classifier(nn.Module):
    """An embedding, a packed LSTM, and a linear layer on its last hidden state; only the class of the LSTM differs."""

    def __init__(self, lstm: Callable[..., nn.RNNBase], vocab: int, classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.directions = 2 if args.bidirectional else 1
        self.embedding = nn.Embedding(vocab, args.embedding, padding_idx=PAD)
        self.lstm = lstm(args.embedding, args.hidden, args.layers, batch_first=True, bidirectional=args.bidirectional)
        self.linear = nn.Linear(self.directions * args.hidden, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # [B, T], [B] -> [B, classes]
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)  # h_n: [layers * directions, B, H], the last layer at the end
        return self.linear(torch.cat(tuple(h_n[-self.directions :]), dim=1))


@dataclass
class Run:
    """One of the two models, and what it has done so far."""

    name: str
    model: Classifier
    optimizer: torch.optim.Optimizer
    step_loss: list[float] = field(default_factory=list)  # one per training step
    step_seconds: list[float] = field(default_factory=list)  # forward, backward and optimizer
    loss: list[float] = field(default_factory=list)  # one per epoch: mean over the training texts
    accuracy: list[float] = field(default_factory=list)  # on the validation texts
    seconds: list[float] = field(default_factory=list)  # sum of the training steps

    def step(self, batch: Batch) -> float:
        tokens, lengths, labels = batch
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(tokens, lengths), labels)
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def train_epoch(self, data: list[Batch], bar: tqdm) -> None:
        self.model.train()
        total = 0.0
        for batch in data:
            start = time.perf_counter()
            loss = self.step(batch)
            self.step_seconds.append(time.perf_counter() - start)
            self.step_loss.append(loss)
            total += loss * len(batch[2])
            bar.update()
        self.loss.append(total / sum(len(labels) for _, _, labels in data))
        self.seconds.append(sum(self.step_seconds[-len(data) :]))

    @torch.no_grad()
    def validate(self, data: list[Batch]) -> None:
        self.model.eval()
        right = sum((self.model(tokens, lengths).argmax(1) == labels).sum().item() for tokens, lengths, labels in data)
        self.accuracy.append(right / sum(len(labels) for _, _, labels in data))


def start_runs(vocab: int, classes: int, args: argparse.Namespace) -> list[Run]:
    """One run per LSTM, all from the same weights."""
    runs: list[Run] = []
    for name in [args.lstm_only] if args.lstm_only else LSTMS:
        torch.manual_seed(args.seed)
        model = Classifier(LSTMS[name], vocab, classes, args)
        if runs:
            model.load_state_dict(runs[0].model.state_dict())  # the names and shapes are those of torch.nn.LSTM
        # fused: one pass over the parameters, so that updating the table of embeddings does not fill the time
        runs.append(Run(name, model, torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)))
    return runs


def train(runs: list[Run], train_samples: Samples, valid_samples: Samples, args: argparse.Namespace) -> None:
    valid = batches(valid_samples, args.batch)
    for run in runs:  # what the first call sets up is not part of any epoch
        model = copy.deepcopy(run.model)
        Run(run.name, model, torch.optim.Adam(model.parameters(), fused=True)).step(valid[0])
    steps = args.epochs * len(runs) * -(-len(train_samples) // args.batch)
    with tqdm(total=steps, unit="step", dynamic_ncols=True) as bar:
        for epoch in range(args.epochs):
            data = batches(train_samples, args.batch, seed=args.seed + 1 + epoch)
            for run in runs:
                bar.set_description(f"epoch {epoch + 1}/{args.epochs} {run.name:>10}")
                run.train_epoch(data, bar)
                run.validate(valid)
                bar.write(
                    f"epoch {epoch + 1:2} {run.name:>10}: loss {run.loss[-1]:.4f}, "
                    f"accuracy {run.accuracy[-1]:.1%}, {run.seconds[-1]:.2f} s",
                    file=sys.stderr,
                )


def table(runs: list[Run]) -> str:
    """Markdown: one row per epoch, one for the whole training."""
    columns = [f"{run.name} {what}" for what in ("loss", "acc", "s") for run in runs]
    compare = len(runs) == 2
    rows = [["epoch", *columns] + ["ratio"] * compare]
    for i in range(len(runs[0].loss)):
        row = [str(i + 1)] + [f"{run.loss[i]:.4f}" for run in runs] + [f"{run.accuracy[i]:.1%}" for run in runs]
        row += [f"{run.seconds[i]:.2f}" for run in runs]
        rows.append(row + [f"{runs[0].seconds[i] / runs[1].seconds[i]:.2f}x"] * compare)
    totals = [sum(run.seconds) for run in runs]
    row = ["all"] + [""] * 2 * len(runs) + [f"{total:.2f}" for total in totals]
    rows.append(row + [f"{totals[0] / totals[-1]:.2f}x"] * compare)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|")
    return "\n".join(lines)
