"""Classify texts of different lengths with a layer of torch.nn and with the same layer of seqkernels.nn.

    python examples/text_classification.py                                    # docstrings of Python's library, LSTM
    python examples/text_classification.py --data ag_news.csv                 # AG News, a small LSTM
    python examples/text_classification.py --data ag_news.csv --preset large  # AG News, two layers, both directions
    python examples/text_classification.py --model bag                        # the mean of token vectors, EmbeddingBag

Both models start with the same weights and train on the same batches in the same order, alternating by epoch. The
output is a table, the maximum differences between the two, and a plot of losses and times. Nothing is downloaded.
Requires tokenizers, tqdm and matplotlib.
"""

import argparse
import ast
import copy
import csv
import html
import re
import statistics
import sys
import sysconfig
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from platform import python_version

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence
from tqdm import tqdm

import seqkernels

# "nudged" is torch with weights perturbed by one rounding, which shows the effect of rounding on training.
LAYERS: dict[str, dict[str, type[nn.Module]]] = {
    "lstm": {"torch": nn.LSTM, "seqkernels": seqkernels.nn.LSTM, "nudged": nn.LSTM},
    "bag": {"torch": nn.EmbeddingBag, "seqkernels": seqkernels.nn.EmbeddingBag, "nudged": nn.EmbeddingBag},
}
PRESETS = {
    "small": {"embedding": 64, "hidden": 32, "layers": 1, "bidirectional": False, "batch": 16, "epochs": 8},
    "large": {"embedding": 300, "hidden": 256, "layers": 2, "bidirectional": True, "batch": 64, "epochs": 3},
}
# Limits of rounding differences with equal weights: the loss of a batch, and its gradient relative to its norm.
LOSS_LIMIT, GRADIENT_LIMIT = 1e-5, 1e-4
PAD, UNKNOWN = 0, 1  # token ids

# The topic of a docstring is that of its module or package. Modules that this Python does not have are ignored.
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
Batch = tuple[Tensor, Tensor, Tensor]  # tokens [B, T], lengths [B], classes [B]; for bags, tokens [N], offsets [B]


def read_standard_library() -> tuple[list[str], Texts]:
    """Docstrings of the standard library of this Python, parsed from its source without imports."""
    root = Path(sysconfig.get_path("stdlib"))
    names = list(TOPICS)
    topic_of = {module: names.index(topic) for topic, modules in TOPICS.items() for module in modules.split()}
    texts: dict[str, int] = {}  # by text, so that duplicates are not in both training and validation
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in topic_of or {"test", "tests"} & set(parts):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in string literals
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 6:
                    texts.setdefault(text, topic_of[parts[0]])
    if len(texts) < 1000:
        raise ValueError(f"{root}: must contain the source of the standard library; use --data instead")
    return names, list(texts.items())


def read_ag_news(path: Path) -> tuple[list[str], Texts]:
    """AG News: rows of "class","title","description", classes 1 to 4."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise ValueError(f"{path}: must be a CSV file of AG News, got: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: must be a CSV file in UTF-8, got: {error}") from error
    texts: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        if number == 1 and row[:1] == ["Class Index"]:  # some copies have a header
            continue
        if len(row) != 3 or row[0] not in {"1", "2", "3", "4"} or not "".join(row[1:]).strip():
            raise ValueError(f'{path}: row {number} must be "class 1-4","title","description", got {str(row)[:100]}')
        text = " ".join(row[1:]).replace("\\", " ")  # a backslash replaces a line break,
        text = html.unescape(re.sub(r"(?<!&)#(\d+);", r"&#\1;", text))  # and "#36;" a dollar sign
        texts.setdefault(text, int(row[0]) - 1)
    if len(texts) < 100:
        raise ValueError(f"{path}: must hold at least 100 texts, got {len(texts)}")
    return AG_NEWS, list(texts.items())


def tokenize(train: Texts, valid: Texts, vocab: int, max_length: int) -> tuple[int, Samples, Samples]:
    """Learn byte-pair encoding from the training texts; return the vocabulary size and both sets as token ids."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words and punctuation
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    tokenizer.train_from_iterator((text for text, _ in train), trainer)
    tokenizer.enable_truncation(max_length)

    def encode(texts: Texts) -> Samples:
        encodings = tokenizer.encode_batch([text for text, _ in texts])
        return [(torch.tensor(e.ids or [UNKNOWN]), label) for e, (_, label) in zip(encodings, texts, strict=True)]

    return tokenizer.get_vocab_size(), encode(train), encode(valid)


def shuffled(items: list, seed: int) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()]


def padded_batches(samples: Samples, size: int) -> list[Batch]:
    result = []
    for start in range(0, len(samples), size):
        tokens, labels = zip(*samples[start : start + size], strict=True)
        lengths = torch.tensor([len(ids) for ids in tokens])
        result.append((pad_sequence(list(tokens), batch_first=True, padding_value=PAD), lengths, torch.tensor(labels)))
    return result


def bag_batches(samples: Samples, size: int) -> list[Batch]:
    """Batches of concatenated texts and their offsets, without padding."""
    result = []
    for start in range(0, len(samples), size):
        tokens, labels = zip(*samples[start : start + size], strict=True)
        ends = torch.tensor([len(ids) for ids in tokens]).cumsum(0)
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
        result.append((torch.cat(tokens), offsets, torch.tensor(labels)))
    return result


class LSTMClassifier(nn.Module):
    """An embedding, a packed LSTM, and a linear layer on its last hidden state; only the class of the LSTM differs."""

    def __init__(self, lstm: type[nn.Module], vocab: int, classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.directions = 2 if args.bidirectional else 1
        self.embedding = nn.Embedding(vocab, args.embedding, padding_idx=PAD)
        self.layer = lstm(args.embedding, args.hidden, args.layers, batch_first=True, bidirectional=args.bidirectional)
        self.linear = nn.Linear(self.directions * args.hidden, classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # [B, T], [B] -> [B, classes]
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.layer(packed)  # h_n: [L * directions, B, H], the last layer at the end
        return self.linear(torch.cat(tuple(h_n[-self.directions :]), dim=1))


class BagClassifier(nn.Module):
    """The mean, sum or maximum of the token vectors, and a linear layer; only the class of the bag differs.

    With a mean, it is the classifier of Joulin et al. 2016, https://arxiv.org/abs/1607.01759 (fastText).
    """

    def __init__(self, bag: type[nn.Module], vocab: int, classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.layer = bag(vocab, args.embedding, mode=args.pool)
        self.linear = nn.Linear(args.embedding, classes)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:  # [N], [B] -> [B, classes]
        return self.linear(self.layer(tokens, offsets))


CLASSIFIERS: dict[str, type[nn.Module]] = {"lstm": LSTMClassifier, "bag": BagClassifier}
BATCHES = {"lstm": padded_batches, "bag": bag_batches}


@dataclass
class Run:
    """A model in training and its history."""

    name: str
    model: nn.Module
    lr: float
    clip: float
    step_loss: list[float] = field(default_factory=list)  # one per training step
    step_seconds: list[float] = field(default_factory=list)  # forward, backward and optimizer
    loss: list[float] = field(default_factory=list)  # one per epoch: mean over the training texts
    accuracy: list[float] = field(default_factory=list)  # one per epoch: on the validation texts
    seconds: list[float] = field(default_factory=list)  # one per epoch: the sum of its training steps

    def __post_init__(self) -> None:
        # fused: a single pass over the parameters; otherwise the update of the embeddings takes longer than the layer
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr, fused=True)

    def step(self, batch: Batch) -> float:
        *texts, labels = batch
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(*texts), labels)
        loss.backward()
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
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
        right = sum((self.model(*texts).argmax(1) == labels).sum().item() for *texts, labels in data)
        self.accuracy.append(right / sum(len(labels) for _, _, labels in data))


def start_runs(vocab: int, classes: int, args: argparse.Namespace) -> list[Run]:
    """The models, all with the weights of the first."""
    runs: list[Run] = []
    for name in args.models:
        torch.manual_seed(args.seed)
        model = CLASSIFIERS[args.model](LAYERS[args.model][name], vocab, classes, args)
        if runs:
            model.load_state_dict(runs[0].model.state_dict())  # torch.nn and seqkernels.nn have the same names
        if name == "nudged":
            with torch.no_grad():
                for weight in model.layer.parameters():
                    weight.copy_(torch.nextafter(weight, torch.zeros(())))
        runs.append(Run(name, model, args.lr, args.clip))
    return runs


def difference(first: nn.Module, second: nn.Module, data: list[Batch]) -> list[tuple[float, float]]:
    """Differences in loss and gradient by batch, between the first model and a copy of the second with its weights."""
    second = copy.deepcopy(second)
    second.load_state_dict(first.state_dict())
    result = []
    for *texts, labels in data:
        losses, gradients = [], []
        for model in (first.train(), second.train()):
            loss = cross_entropy(model(*texts), labels)
            losses.append(loss.item())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        gradient = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
        result.append((abs(losses[0] - losses[1]), gradient.item()))
    return result


def train(runs: list[Run], samples: Samples, valid: list[Batch], args: argparse.Namespace) -> list[tuple[float, float]]:
    """Train all models, alternating by epoch; return the difference of torch and seqkernels after each epoch."""
    differences: list[tuple[float, float]] = []
    models = {run.name: run.model for run in runs}
    for run in runs:  # excludes the setup of the first call from the timing
        Run(run.name, copy.deepcopy(run.model), run.lr, run.clip).step(valid[0])
    steps = args.epochs * len(runs) * -(-len(samples) // args.batch)
    with tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None) as bar:
        for epoch in range(1, args.epochs + 1):
            data = BATCHES[args.model](shuffled(samples, args.seed + epoch), args.batch)
            for run in runs:
                bar.set_description(f"epoch {epoch}/{args.epochs} {run.name:>10}")
                run.train_epoch(data, bar)
                run.validate(valid)
                result = f"loss {run.loss[-1]:.4f}  accuracy {run.accuracy[-1]:5.1%}  {run.seconds[-1]:6.2f} s"
                tqdm.write(f"epoch {epoch:2} {run.name:>10}  {result}", file=sys.stderr)
            if {"torch", "seqkernels"} <= set(models):
                differences += difference(models["torch"], models["seqkernels"], valid[:8])
    return differences


def speedups(runs: list[Run]) -> list[float]:
    """Ratio of the times of torch and seqkernels, by epoch."""
    seconds = {run.name: run.seconds for run in runs}
    if not {"torch", "seqkernels"} <= set(seconds):
        return []
    return [theirs / ours for theirs, ours in zip(seconds["torch"], seconds["seqkernels"], strict=True)]


def table(runs: list[Run]) -> str:
    """Markdown table with one row per epoch and the medians in the last row."""
    ratios = speedups(runs)
    header = ["epoch", *(f"{run.name} {what}" for what in ("loss", "acc", "s") for run in runs)]
    rows = [
        [f"{epoch}"]
        + [f"{run.loss[epoch - 1]:.4f}" for run in runs]
        + [f"{run.accuracy[epoch - 1]:.1%}" for run in runs]
        + [f"{run.seconds[epoch - 1]:.2f}" for run in runs]
        for epoch in range(1, len(runs[0].loss) + 1)
    ]
    rows.append(["median", *[""] * 2 * len(runs), *(f"{statistics.median(run.seconds):.2f}" for run in runs)])
    if ratios:
        header.append("ratio")
        for row, ratio in zip(rows, [*ratios, statistics.median(ratios)], strict=True):
            row.append(f"{ratio:.2f}x")
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    return "\n".join(
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [header, rule, *rows]
    )


def compare(runs: list[Run], differences: list[tuple[float, float]]) -> bool:
    """Print the differences between the models; return whether torch and seqkernels are equal within rounding."""
    equal = True
    if differences:
        loss, gradient = np.max(differences, axis=0)  # np.max propagates NaN, which exceeds the limits
        equal = bool(loss <= LOSS_LIMIT and gradient <= GRADIENT_LIMIT)
        print(f"With the same weights, compared after each epoch: {'' if equal else 'NOT '}equal within rounding.")
        print(f"  loss of a batch: differs by at most {loss:.1e} (limit {LOSS_LIMIT:.0e})")
        print(f"  its gradient: by at most {gradient:.1e} of its norm (limit {GRADIENT_LIMIT:.0e})")
    if len(runs) > 1:
        print("Training amplifies rounding differences from step to step. Difference in loss, by epoch:")
    for run in runs[1:]:
        drift = (abs(loss - first) for loss, first in zip(run.loss, runs[0].loss, strict=True))
        print(f"  {run.name} from {runs[0].name}: {' '.join(f'{d:.0e}' for d in drift)}")
    if differences and "nudged" not in {run.name for run in runs}:
        print("  (--models torch seqkernels nudged adds torch with weights perturbed by one rounding.)")
    return equal


def draw(runs: list[Run], title: str, path: Path) -> None:
    """Left: loss by epoch. Middle: loss by time spent in training steps. Right: seconds per epoch."""
    colors = {"torch": "#f0a45d", "seqkernels": "#14507f", "nudged": "#b9c4cc"}
    epochs, steps = len(runs[0].loss), len(runs[0].step_loss)
    window = max(1, min(50, steps // (2 * epochs)))  # number of steps averaged per point
    figure = Figure(figsize=(13.5, 4.6), layout="constrained")
    by_epoch, by_time, bars = figure.subplots(1, 3)
    figure.suptitle(title, fontsize=10, color="#555555")
    for i, run in enumerate(runs):
        color, width = colors[run.name], 0.8 / len(runs)
        loss = np.convolve(run.step_loss, np.full(window, 1 / window), mode="valid")
        step = np.arange(len(loss)) + window // 2
        seconds = np.cumsum(run.step_seconds)[step]
        # Each curve is narrower than the previous one, so that equal curves remain visible.
        by_epoch.plot(step * epochs / steps, loss, color=color, linewidth=6 / (1 + 2 * i), label=run.name)
        by_time.plot(seconds, loss, color=color, linewidth=2, label=f"{run.name}, {sum(run.seconds):.1f} s")
        left = np.arange(1, epochs + 1) + (i - len(runs) / 2) * width
        bars.bar(left, run.seconds, width, align="edge", color=color, label=run.name)
    ratios = speedups(runs)
    faster = f", median ratio {statistics.median(ratios):.1f}" if ratios else ""
    for axes, name, x, y in (
        (by_epoch, "Training loss by epoch", "epochs", f"loss, mean of {window} steps"),
        (by_time, "Training loss by time", "seconds of training steps", f"loss, mean of {window} steps"),
        (bars, f"Seconds per epoch{faster}", "epoch", "seconds"),
    ):
        axes.set_title(name, fontweight="bold", fontsize=11)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e8e8e8")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    by_epoch.set_xlim(left=0)
    by_time.set_xlim(left=0)
    by_epoch.legend(frameon=False)
    by_time.legend(frameon=False)
    bars.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, dpi=130)


def parse_arguments() -> argparse.Namespace:
    def count(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    parser = argparse.ArgumentParser(
        description="Train a text classifier with a layer of torch.nn and with the same layer of seqkernels.nn."
    )
    presets = "; ".join(
        f"{name}: {', '.join(f'{k} {v}' for k, v in preset.items())}" for name, preset in PRESETS.items()
    )
    option = parser.add_argument
    option(
        "--data", type=Path, help='a CSV file of "class 1-4","title","description"; without it, docstrings of Python'
    )
    option("--model", choices=CLASSIFIERS, default="lstm", help="lstm, or bag, which ignores the order (%(default)s)")
    option("--pool", choices=["mean", "sum", "max"], default="mean", help="reduction of a bag (%(default)s)")
    option("--preset", choices=PRESETS, default="small", help=f"defaults of the next six options: {presets}")
    option("--embedding", type=count, help="size of the token vectors")
    option("--hidden", type=count, help="hidden size of the LSTM")
    option("--layers", type=count, help="layers of the LSTM")
    option("--bidirectional", action=argparse.BooleanOptionalAction, help="use a bidirectional LSTM")
    option("--batch", type=count, help="texts per training step")
    option("--epochs", type=count, help="number of epochs")
    option("--lr", type=float, default=1e-3, help="learning rate of Adam (%(default)s)")
    option("--clip", type=float, default=1.0, help="maximum norm of the gradient, 0: unlimited (%(default)s)")
    option("--vocab", type=count, default=8000, help="maximum size of the vocabulary (%(default)s)")
    option("--max-length", type=count, default=512, help="maximum tokens per text (%(default)s)")
    option("--seed", type=int, default=0, help="seed of the split, the weights and the order (%(default)s)")
    option("--threads", type=count, default=torch.get_num_threads(), help="threads of torch (%(default)s)")
    names = list(LAYERS["lstm"])
    option("--models", nargs="+", choices=names, default=names[:2], help="models to train (the first two)")
    option("--output", type=Path, default=Path("text_classification.png"), help="the picture (%(default)s)")
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    args = parser.parse_args()
    if not args.output.parent.is_dir():
        parser.error(f"--output: folder {args.output.parent} must exist")
    return args


def main() -> int:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    try:
        names, texts = read_ag_news(args.data) if args.data else read_standard_library()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    texts = shuffled(texts, args.seed)
    held_out = len(texts) // 5
    vocab, samples, valid = tokenize(texts[held_out:], texts[:held_out], args.vocab, args.max_length)

    source = args.data.name if args.data else f"docstrings of Python {python_version()}"
    sizes = Counter(names[label] for _, label in texts)
    lengths = [len(ids) for ids, _ in samples]
    if args.model == "bag":
        layer = f"EmbeddingBag {args.embedding}, {args.pool}"
    else:
        directions = "two directions" if args.bidirectional else "one direction"
        layers = "1 layer" if args.layers == 1 else f"{args.layers} layers"
        layer = f"embedding {args.embedding}, hidden {args.hidden}, {layers}, {directions}"
    shape = f"{layer}, batch {args.batch}"
    print(f"data: {source}, {len(texts)} texts: {', '.join(f'{name} {sizes[name]}' for name in names)}")
    print(f"largest class: {max(sizes.values()) / len(texts):.1%}; {held_out} texts for validation")
    print(f"tokens per text: median {statistics.median(lengths):.0f}, mean {statistics.mean(lengths):.0f}, ", end="")
    print(f"longest {max(lengths)}; vocabulary {vocab}")
    print(f"model: {shape}, Adam {args.lr:g}, clip {args.clip:g}, seed {args.seed}")
    print(f"torch {torch.__version__}, seqkernels {seqkernels.__version__}, threads {args.threads}", flush=True)

    runs = start_runs(vocab, len(names), args)
    differences = train(runs, samples, BATCHES[args.model](valid, args.batch), args)
    print(f"\n{table(runs)}\n")
    print("Training steps in all: " + ", ".join(f"{run.name} {sum(run.seconds):.1f} s" for run in runs))
    if any(max(run.seconds) > 1.5 * min(run.seconds) for run in runs):
        print("Times of epochs vary considerably: repeat the run when no other process is busy.")
    equal = compare(runs, differences)
    draw(runs, f"{source}: {shape}", args.output)
    print(f"picture: {args.output}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
