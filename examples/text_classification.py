"""Classify texts of different lengths with a layer of torch.nn and with the same layer of seqkernels.nn.

    python examples/text_classification.py                                    # docstrings of Python's library, LSTM
    python examples/text_classification.py --data ag_news.csv                 # AG News, a small LSTM
    python examples/text_classification.py --data ag_news.csv --preset large  # AG News, two layers, both directions
    python examples/text_classification.py --model bag                        # the mean of token vectors, EmbeddingBag
    python examples/text_classification.py --model gru-attention --bidirectional --orthogonal --plateau --patience 3
    python examples/text_classification.py --model bag --vectors glove.6B.100d.txt --analogy read reader write
    torchrun --nproc-per-node 2 examples/text_classification.py

Both models start with the same weights and train on the same batches in the same order, alternating by epoch. The
output is a table, the neighbours of some words, and a plot of losses, times and word vectors. Nothing is downloaded.
Requires tokenizers, tqdm, matplotlib and scikit-learn, and gensim for --vectors.
"""

import argparse
import ast
import html
import re
import statistics
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from platform import python_version
from typing import Any

import torch
from matplotlib.axes import Axes
from sklearn.manifold import TSNE
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.optim.lr_scheduler import ReduceLROnPlateau

import common
import seqkernels

PRESETS = {
    "small": {"embedding": 64, "hidden": 32, "layers": 1, "bidirectional": False, "batch": 16, "epochs": 4},
    "large": {"embedding": 300, "hidden": 256, "layers": 2, "bidirectional": True, "batch": 64, "epochs": 3},
}
PAD, UNKNOWN = 0, 1  # token ids
HEADS = 4  # of self-attention
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
    for path in common.standard_library():
        module = path.relative_to(root).with_suffix("").parts[0]
        if module not in topic_of:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in string literals
            tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if len(text.split()) >= 6:
                    texts.setdefault(text, topic_of[module])
    return names, list(texts.items())


def read_ag_news(path: Path) -> tuple[list[str], Texts]:
    """AG News: rows of "class","title","description", classes 1 to 4."""
    texts: dict[str, int] = {}
    for number, row in common.read_csv(path):
        if number == 1 and row[:1] == ["Class Index"]:  # some copies have a header
            continue
        if len(row) != 3 or row[0] not in {"1", "2", "3", "4"} or not "".join(row[1:]).strip():
            wanted = '"class 1-4","title","description"'
            raise common.ScriptError(f"{path}: line {number} must be {wanted}, got {str(row)[:100]}")
        text = " ".join(row[1:]).replace("\\", " ")  # a backslash replaces a line break,
        text = html.unescape(re.sub(r"(?<!&)#(\d+);", r"&#\1;", text))  # and "#36;" a dollar sign
        texts.setdefault(text, int(row[0]) - 1)
    if len(texts) < 100:
        raise common.ScriptError(f"{path}: must hold at least 100 texts, got {len(texts)}")
    return AG_NEWS, list(texts.items())


def tokenize(train: Texts, valid: Texts, args: argparse.Namespace) -> tuple[list[str], Samples, Samples]:
    """Learns byte pairs, or words for --vectors, from the training texts; returns the tokens and both sets as ids."""
    special = dict(vocab_size=args.vocab, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    if args.vectors:
        model, trainer = models.WordLevel(unk_token="[UNK]"), trainers.WordLevelTrainer(**special)
    else:
        model, trainer = models.BPE(unk_token="[UNK]"), trainers.BpeTrainer(**special)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words and punctuation
    tokenizer.train_from_iterator((text for text, _ in train), trainer)
    tokenizer.enable_truncation(args.max_length)

    def encode(texts: Texts) -> Samples:
        encodings = tokenizer.encode_batch([text for text, _ in texts])
        return [(torch.tensor(e.ids or [UNKNOWN]), label) for e, (_, label) in zip(encodings, texts, strict=True)]

    vocab = tokenizer.get_vocab()
    return sorted(vocab, key=vocab.__getitem__), encode(train), encode(valid)


def read_vectors(path: Path) -> Any:
    """Vectors of words with gensim: GloVe text, word2vec text or binary (.bin), fastText .vec or .bin."""
    try:
        from gensim.models import KeyedVectors
        from gensim.models.fasttext import load_facebook_vectors
    except ImportError as error:
        raise common.ScriptError(f"--vectors: gensim must be installed: {error}") from error
    try:
        with path.open("rb") as file:
            first = file.readline()
        if first[:4] == (793712314).to_bytes(4, "little"):  # fastText's own format, with vectors of character n-grams
            vectors = load_facebook_vectors(str(path))
        else:
            no_header = len(first.split()) != 2  # GloVe
            vectors = KeyedVectors.load_word2vec_format(path, binary=path.suffix == ".bin", no_header=no_header)
    except OSError as error:
        raise common.ScriptError(f"{path}: must be a file of vectors, got: {error.strerror or error}") from error
    except Exception as error:  # gensim's readers raise errors of many classes, without the line
        reason = malformed_line(path) or f"must hold vectors of words, got: {' '.join(str(error).split())}"
        raise common.ScriptError(f"{path}: {reason}") from error
    finite = torch.from_numpy(vectors.vectors).isfinite().all(1)
    if not finite.all():
        word = vectors.index_to_key[int(finite.int().argmin())]
        raise common.ScriptError(f"{path}: the vector of {word!r} must be finite")
    return vectors


def malformed_line(path: Path) -> str:
    """The first line of a text of vectors that is not a word and as many numbers as the first vector has."""
    if path.suffix == ".bin":
        return ""
    width = 0
    for number, line in enumerate(common.read_text(path).removesuffix("\n").split("\n"), start=1):
        word, *values = line.rstrip().split(" ")
        if number == 1 and len(values) == 1:  # the header of word2vec and fastText: words, size
            width = int(values[0]) if values[0].isdecimal() else 0
            continue
        width = width or len(values)
        try:
            list(map(float, values))
        except ValueError as error:
            return f"line {number} must be a word and {width} numbers, got: {error}"
        if len(values) != width:
            return f"line {number} must be a word and {width} numbers, got {len(values)} after {word[:40]!r}"
    return ""


def table_of(vectors: Any, tokens: list[str], seed: int) -> Tensor:
    """[E, D] the vector of each token; without one, noise of the same scale."""
    scale = float(vectors.vectors.std())
    table = scale * torch.randn(len(tokens), vectors.vector_size, generator=torch.Generator().manual_seed(seed))
    found = 0
    for i, token in enumerate(tokens[2:], start=2):
        if token in vectors:
            table[i] = torch.from_numpy(vectors[token].copy())
            found += 1
    print(f"vectors: {found} of {len(tokens)} words")
    table[PAD] = 0
    return table


def collate(samples: Samples, args: argparse.Namespace) -> Batch:
    """A padded batch and its lengths; for bags, the concatenated texts and their offsets."""
    tokens, labels = zip(*samples, strict=True)
    lengths, classes = torch.tensor([len(ids) for ids in tokens]), torch.tensor(labels, device=args.device)
    if args.model == "bag":
        offsets = lengths.cumsum(0) - lengths
        return torch.cat(tokens).to(args.device), offsets.to(args.device), classes
    # Lengths of packed sequences are on the CPU.
    return pad_sequence(list(tokens), batch_first=True, padding_value=PAD).to(args.device), lengths, classes


class RecurrentClassifier(nn.Module):
    """An embedding, a recurrent layer, a reduction over the steps, and a linear layer.

    The reduction is the last hidden state; with pooling, the mean weighted by learned scores; with attention, the mean
    after self-attention.
    """

    def __init__(self, layers: Any, vocab: int, classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        kind, _, self.reduction = args.model.partition("-")
        self.packed, self.directions = args.packed, 2 if args.bidirectional else 1
        width = self.directions * args.hidden
        self.embedding = layers.Embedding(vocab, args.embedding, padding_idx=PAD)
        layer = {"rnn": layers.RNN, "lstm": layers.LSTM, "gru": layers.GRU}[kind]
        self.layer = layer(args.embedding, args.hidden, args.layers, batch_first=True, bidirectional=args.bidirectional)
        if self.reduction == "pooling":
            self.score = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1, bias=False))
        elif self.reduction == "attention":
            self.attention = layers.MultiheadAttention(width, num_heads=HEADS, batch_first=True)
        self.linear = nn.Linear(width, classes)
        if args.orthogonal:
            for name, weight in self.layer.named_parameters():
                if name.startswith("weight_hh"):
                    for gate in weight.data.split(args.hidden):  # [H, H] each
                        nn.init.orthogonal_(gate)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # [B, T], [B] -> [B, classes]
        x = self.embedding(tokens)
        if self.packed:
            output, state = self.layer(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
        else:  # the layer reads the padding as well
            output, state = self.layer(x)
        if not self.reduction:
            h_n = state[0] if isinstance(state, tuple) else state  # [L * directions, B, H], the last layer at the end
            return self.linear(torch.cat(tuple(h_n[-self.directions :]), dim=1))
        if self.packed:
            output, _ = pad_packed_sequence(output, batch_first=True)
        inside = torch.arange(tokens.shape[1], device=tokens.device) < lengths.to(tokens.device)[:, None]  # [B, T]
        if self.reduction == "pooling":
            weights = self.score(output).masked_fill(~inside[:, :, None], -torch.inf).softmax(1)  # [B, T, 1]
        else:
            output, _ = self.attention(output, output, output, key_padding_mask=~inside, need_weights=False)
            weights = (inside / inside.sum(1, keepdim=True))[:, :, None]
        return self.linear((weights * output).sum(1))


class BagClassifier(nn.Module):
    """The mean, sum or maximum of the token vectors, and a linear layer.

    With a mean, it is the classifier of Joulin et al. 2016, https://arxiv.org/abs/1607.01759 (fastText).
    """

    def __init__(self, layers: Any, vocab: int, classes: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = layers.EmbeddingBag(vocab, args.embedding, mode=args.pool)
        self.linear = nn.Linear(args.embedding, classes)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:  # [N], [B] -> [B, classes]
        return self.linear(self.embedding(tokens, offsets))


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    *texts, classes = batch
    return cross_entropy(model(*texts), classes, reduction="sum"), len(classes)


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    right = sum((model(*texts).argmax(1) == classes).sum().item() for *texts, classes in batches)
    return right / sum(len(classes) for *_, classes in batches)


def common_words(samples: Samples, tokens: list[str], classes: int, n: int) -> list[tuple[int, int]]:
    """The n most frequent words of at least 4 letters, each with the class that it marks: pairs of token and class."""
    counts = torch.zeros(len(tokens), classes)
    for ids, label in samples:
        counts[:, label] += torch.bincount(ids, minlength=len(tokens))
    word = torch.tensor([token.isalpha() and len(token) > 3 for token in tokens])
    frequent = counts.sum(1) * word
    shares = counts / counts.sum(0).clamp(min=1)
    order = frequent.argsort(descending=True)[:n].tolist()
    return [(i, shares[i].argmax().item()) for i in order if frequent[i]]


def nearest(table: Tensor, direction: Tensor, tokens: list[str], without: list[str], n: int = 5) -> str:
    """The tokens [E, D] whose vectors have the largest cosines with a direction [D]."""
    order = (normalize(table) @ direction).argsort(descending=True).tolist()
    return ", ".join([tokens[i] for i in order if tokens[i] not in [*without, "[PAD]", "[UNK]"]][:n])


def report_words(runs: list[common.Run], words: list[str], tokens: list[str], args: argparse.Namespace) -> None:
    """Prints the nearest neighbours of words and the analogies a : b = c : ? in the embedding of the last model."""
    table = runs[-1].model.embedding.weight.detach().cpu()
    ids = {token: i for i, token in enumerate(tokens)}
    print("\nNearest vectors:")
    for word in words:
        print(f"  {word}: {nearest(table, table[ids[word]], tokens, [word])}")
    for a, b, c in args.analogy:
        direction = table[ids[b]] - table[ids[a]] + table[ids[c]]
        print(f"  {a} : {b} = {c} : {nearest(table, direction, tokens, [a, b, c])}")


def draw_words(
    axes: Axes, run: common.Run, words: list[tuple[int, int]], tokens: list[str], names: list[str], seed: int
) -> None:
    """Vectors of words in two dimensions by t-SNE; the colour is the class that a word marks."""
    table = normalize(run.model.embedding.weight.detach().cpu()[[i for i, _ in words]])
    perplexity = min(20, (len(words) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(table.numpy())
    for (i, label), (x, y) in zip(words, points.tolist(), strict=True):
        axes.annotate(tokens[i], (x, y), color=f"C{label}", fontsize=7, ha="center")
    for label, name in enumerate(names):
        axes.scatter([], [], color=f"C{label}", label=name)
    axes.update_datalim(points)
    axes.margins(0.04, 0.03)  # for the words at the edges
    axes.autoscale_view()
    axes.set(xticks=[], yticks=[])
    axes.set_title(f"t-SNE of the vectors of frequent words, {run.name}", fontweight="bold", fontsize=11)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="most frequent in")


def parse_arguments() -> argparse.Namespace:
    data = 'a CSV file of "class 1-4","title","description"; without it, docstrings of Python'
    parser = common.Parser(__doc__, "text_classification", epochs=8, batch=16, lr=1e-3, data=data)
    option, flag = parser.add_argument, argparse.BooleanOptionalAction
    presets = "; ".join(f"{name}: {', '.join(f'{k} {v}' for k, v in p.items())}" for name, p in PRESETS.items())
    kinds = ["rnn", "lstm", "gru", "bag", "gru-pooling", "lstm-attention"]
    option("--model", choices=kinds, default="lstm", help="bag ignores the order of the tokens (%(default)s)")
    option("--pool", choices=["mean", "sum", "max"], default="mean", help="reduction of a bag (%(default)s)")
    option("--preset", choices=PRESETS, default="small", help=f"defaults of some options: {presets}")
    option("--embedding", type=common.count, help="size of the token vectors")
    option("--hidden", type=common.count, help="hidden size of the layer")
    option("--layers", type=common.count, help="number of stacked layers")
    option("--bidirectional", action=flag, help="both directions")
    option("--packed", action=flag, default=True, help="packed sequences; without, the layer reads the padding")
    option("--orthogonal", action=flag, default=False, help="orthogonal recurrent weights at the start")
    option("--clip", type=common.within(0, 1e9), default=1.0, help="largest norm of the gradient, 0: any (%(default)s)")
    option("--plateau", action=flag, default=False, help="halve the learning rate when the accuracy does not rise")
    patience = "stop after epochs without a better accuracy, keep the best weights; 0: all epochs"
    option("--patience", type=common.within(0, 1e9, int), default=0, help=patience)
    option("--vocab", type=common.count, default=8000, help="maximum size of the vocabulary (%(default)s)")
    option("--max-length", type=common.count, default=512, help="maximum tokens per text (%(default)s)")
    option("--vectors", type=Path, help="GloVe, word2vec or fastText vectors of words, which sets --embedding")
    option("--neighbours", nargs="*", metavar="WORD", help="print the nearest vectors of these words")
    option("--analogy", nargs=3, action="append", default=[], metavar=("A", "B", "C"), help="A is to B as C is to ?")
    common.FREE_OPTIONS.update({"neighbours", "analogy"})
    parser.set_defaults(**PRESETS[parser.parse_known_args()[0].preset])
    args = parser.parse_args()
    width = args.hidden * (2 if args.bidirectional else 1)
    if args.model == "lstm-attention" and width % HEADS:
        parser.error(f"--hidden: must give a multiple of the {HEADS} heads of attention, got {width} outputs")
    return args


def describe(args: argparse.Namespace) -> str:
    if args.model == "bag":
        layer = f"EmbeddingBag {args.embedding}, {args.pool}"
    else:
        directions = "two directions" if args.bidirectional else "one direction"
        layers = "1 layer" if args.layers == 1 else f"{args.layers} layers"
        padding = "" if args.packed else ", padded"
        layer = f"{args.model}, embedding {args.embedding}, hidden {args.hidden}, {layers}, {directions}{padding}"
    return f"{layer}, batch {args.batch}"


def main() -> int:
    args = parse_arguments()
    vectors = read_vectors(args.vectors) if args.vectors else None
    names, texts = read_ag_news(args.data) if args.data else read_standard_library()
    texts = common.shuffled(texts, args.seed)
    held_out = len(texts) // 5
    tokens, samples, valid = tokenize(texts[held_out:], texts[:held_out], args)
    source = args.data.name if args.data else f"docstrings of Python {python_version()}"
    sizes = Counter(names[label] for _, label in texts)
    lengths = [len(ids) for ids, _ in samples]
    print(f"data: {source}, {len(texts)} texts: {', '.join(f'{name} {sizes[name]}' for name in names)}")
    print(f"largest class: {max(sizes.values()) / len(texts):.1%}; {held_out} texts for validation")
    print(f"tokens per text: median {statistics.median(lengths):.0f}, mean {statistics.mean(lengths):.0f}, ", end="")
    print(f"longest {max(lengths)}; vocabulary {len(tokens)}")
    for word in [*(args.neighbours or []), *(word for triple in args.analogy for word in triple)]:
        if word not in tokens:
            raise common.ScriptError(f"--neighbours, --analogy: {word} must be in the vocabulary")
    table = None
    if vectors is not None:
        args.embedding, table = vectors.vector_size, table_of(vectors, tokens, args.seed)
    print(f"model: {describe(args)}, Adam {args.lr:g}, clip {args.clip:g}, seed {args.seed}")
    print(f"torch {torch.__version__}, seqkernels {seqkernels.__version__}, threads {args.threads}", flush=True)

    def build(layers: Any) -> nn.Module:
        model = (BagClassifier if args.model == "bag" else RecurrentClassifier)(layers, len(tokens), len(names), args)
        if table is not None:
            model.embedding.weight.data.copy_(table)
        return model

    def batches(epoch: int, rows: slice) -> Iterator[Batch]:
        order = common.shuffled(samples, args.seed + epoch)
        return (collate(chunk, args) for chunk in common.batches_of(order, args.batch, rows))

    valid_batches = [collate(chunk, args) for chunk in common.batches_of(valid, args.batch)]
    task = common.Task(
        "text_classification",
        build,
        batches,
        loss,
        metric=lambda model: accuracy(model, valid_batches),
        metric_name="acc",
        clip=args.clip,
        patience=args.patience,
        scheduler=(lambda optimizer: ReduceLROnPlateau(optimizer, "max", 0.5, patience=0)) if args.plateau else None,
    )
    runs = common.train(task, args)
    words = common_words(samples, tokens, len(names), n=120)
    if common.rank() == 0:
        chosen = [tokens[i] for i, _ in words[:: len(words) // 5 or 1]] if args.neighbours is None else args.neighbours
        report_words(runs, chosen, tokens, args)
    panels = [lambda axes: draw_words(axes, runs[-1], words, tokens, names, args.seed)] if len(words) > 4 else []
    return common.report(task, runs, args, f"{source}: {describe(args)}", panels)


if __name__ == "__main__":
    common.run(main)
