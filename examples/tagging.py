"""Tag the tokens of Python functions, or of a CoNLL file, with a bidirectional LSTM and a conditional random field.

    python examples/tagging.py                                # functions of the standard library
    python examples/tagging.py --data train.conll --epochs 10 # lines of "token tag", a blank line after each sentence
    torchrun --nproc-per-node 2 examples/tagging.py

Python's tokenizer and parser give the tags: a name is a function, a class, a parameter (also where it is used), a
keyword argument, a variable, or part of a dotted call, attribute or module: os . path . join has the tags B-call,
I-call and so on. The torch side is a packed torch.nn.LSTM and a CRF in plain torch over the whole batch; the
seqkernels side is seqkernels.nn.LSTM and seqkernels.nn.CRF.
"""

import argparse
import ast
import io
import keyword
import re
import statistics
import time
import tokenize
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import common
import seqkernels

FEWEST = 50  # sentences
Sentence = list[tuple[str, str]]  # token, tag
Sample = tuple[Tensor, Tensor]  # token ids [T], tag ids [T]
Batch = tuple[Tensor, Tensor, Tensor]  # token ids [B, T], tag ids [B, T], lengths [B] on the CPU
# Tokens outside the vocabulary are replaced by the first of these patterns that they match.
SHAPES = [r"#.*", r"[bruf]*[\"'].*", r"\d.*", r"__\w+__", r"_\w*", r"[A-Z][A-Z0-9_]*", r"[A-Z]\w*", r"[a-z]\w*", r".*"]


class CRF(nn.Module):
    """A linear-chain CRF in plain torch, as in pytorch-crf; the parameters are those of seqkernels.nn.CRF."""

    def __init__(self, num_tags: int, batch_first: bool) -> None:
        super().__init__()
        self.start_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.end_transitions = nn.Parameter(torch.empty(num_tags).uniform_(-0.1, 0.1))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags).uniform_(-0.1, 0.1))  # from, to

    def forward(self, emissions: Tensor, tags: Tensor, *, lengths: Tensor) -> Tensor:
        """The sum of the log likelihoods of tags [B, T] under emissions [B, T, K]."""
        mask = torch.arange(emissions.shape[1], device=tags.device) < lengths.to(tags.device)[:, None]  # [B, T]
        last = tags.gather(1, lengths.to(tags.device)[:, None] - 1)[:, 0]
        score = self.start_transitions[tags[:, 0]] + self.end_transitions[last]
        score = score + (emissions.gather(2, tags[:, :, None])[:, :, 0] * mask).sum(1)
        score = score + (self.transitions[tags[:, :-1], tags[:, 1:]] * mask[:, 1:]).sum(1)
        alpha = self.start_transitions + emissions[:, 0]  # [B, K] log of the sum over all paths to a tag
        for t in range(1, emissions.shape[1]):
            extended = torch.logsumexp(alpha[:, :, None] + self.transitions, dim=1) + emissions[:, t]
            alpha = torch.where(mask[:, t, None], extended, alpha)
        return (score - torch.logsumexp(alpha + self.end_transitions, dim=1)).sum()

    def decode(self, emissions: Tensor, *, lengths: Tensor, return_tensors: bool) -> tuple[Tensor, Tensor]:
        """Viterbi: the best tags [B, T], -1 beyond each length, and their scores [B]."""
        T = emissions.shape[1]
        mask = torch.arange(T, device=emissions.device) < lengths.to(emissions.device)[:, None]
        best = self.start_transitions + emissions[:, 0]  # [B, K] score of the best path to a tag
        previous = []
        for t in range(1, T):
            extended, origin = (best[:, :, None] + self.transitions).max(dim=1)
            best = torch.where(mask[:, t, None], extended + emissions[:, t], best)
            stay = torch.arange(best.shape[1], device=best.device)
            previous.append(torch.where(mask[:, t, None], origin, stay))
        score, tag = (best + self.end_transitions).max(dim=1)
        path = [tag]
        for origin in reversed(previous):
            tag = origin.gather(1, tag[:, None])[:, 0]
            path.append(tag)
        return torch.stack(path[::-1], dim=1).masked_fill(~mask, -1), score


LAYERS = {"torch": SimpleNamespace(Embedding=nn.Embedding, LSTM=nn.LSTM, CRF=CRF), "seqkernels": seqkernels.nn}


class Tagger(nn.Module):
    """An embedding, a packed bidirectional LSTM, a linear layer, and a CRF."""

    def __init__(self, layers: Any, vocab: int, tags: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.embedding = layers.Embedding(vocab, args.embedding, padding_idx=0)
        self.lstm = layers.LSTM(args.embedding, args.hidden, args.layers, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(2 * args.hidden, tags)
        self.crf = layers.CRF(tags, batch_first=True)

    def emissions(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # [B, T], [B] -> [B, T, K]
        packed = pack_padded_sequence(self.embedding(tokens), lengths, batch_first=True, enforce_sorted=False)
        output, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.linear(output)

    def forward(self, tokens: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        return -self.crf(self.emissions(tokens, lengths), tags, lengths=lengths)

    def decode(self, tokens: Tensor, lengths: Tensor) -> Tensor:  # [B, T] tags, -1 beyond each length
        return self.crf.decode(self.emissions(tokens, lengths), lengths=lengths, return_tensors=True)[0]


def read_conll(path: Path) -> list[Sentence]:
    """Lines of a token and its tag; a blank line ends a sentence."""
    sentences: list[Sentence] = [[]]
    for number, line in enumerate(common.read_text(path).split("\n"), start=1):
        parts = line.split()
        if not parts:
            sentences.append([])
        elif len(parts) < 2:
            raise common.ScriptError(f'{path}: line {number} must be "token tag", got {line[:60]!r}')
        else:
            sentences[-1].append((parts[0], parts[-1]))
    sentences = [sentence for sentence in sentences if sentence]
    if len(sentences) < FEWEST:
        raise common.ScriptError(f"{path}: must hold at least {FEWEST} sentences, got {len(sentences)}")
    return sentences


def outside_strings(node: ast.AST) -> Iterator[ast.AST]:
    """The node and its descendants, outer nodes first, without those within f-strings."""
    queue = [node]
    for node in queue:
        yield node
        queue += [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.JoinedStr)]


def tag_function(function: ast.AST, tokens: list[tokenize.TokenInfo]) -> Sentence:
    """Tags of a function's tokens, from their types and the syntax tree."""
    starts = [token.start for token in tokens]  # (line, column)
    tags: list[str | None] = [None] * len(tokens)

    def span(tag: str, start: tuple[int, int], end: tuple[int, int]) -> None:
        first, last = bisect_left(starts, start), bisect_left(starts, end)
        if tags[first:last] == [None] * (last - first):  # an inner node is part of a tagged chain
            dotted = tag in ("call", "attribute", "module")
            for i in range(first, last):
                tags[i] = ("B-" if i == first else "I-") + tag if dotted else tag

    def chain(tag: str, node: ast.expr) -> None:
        """A name, a dotted name, or an attribute of another expression, of which only the last name is tagged."""
        base, end = node, (node.end_lineno, node.end_col_offset)
        while isinstance(base, ast.Attribute):
            base = base.value
        if isinstance(base, ast.Name):
            span(tag, (node.lineno, node.col_offset), end)
        elif isinstance(node, ast.Attribute):
            span(tag, (end[0], end[1] - len(node.attr)), end)

    parameters = {node.arg for node in outside_strings(function) if isinstance(node, ast.arg)}
    for node in outside_strings(function):
        if isinstance(node, ast.Call):
            chain("call", node.func)
        elif isinstance(node, ast.Attribute):
            chain("attribute", node)
        elif isinstance(node, ast.Name):
            chain("parameter" if node.id in parameters else "variable", node)
        elif isinstance(node, ast.arg):
            start = node.lineno, node.col_offset
            span("parameter", start, (start[0], start[1] + len(node.arg)))
        elif isinstance(node, ast.keyword) and node.arg:
            span("argument", (node.lineno, node.col_offset), (node.lineno, node.col_offset + len(node.arg)))
        elif isinstance(node, ast.alias):
            span("module", (node.lineno, node.col_offset), (node.lineno, node.col_offset + len(node.name)))
    defined = {"def": "function", "class": "class"}
    by_type = {tokenize.NUMBER: "number", tokenize.COMMENT: "comment", tokenize.OP: "operator"}
    for i, token in enumerate(tokens):
        if token.type == tokenize.NAME and keyword.iskeyword(token.string):
            tags[i] = "keyword"
        elif token.type == tokenize.NAME:
            tags[i] = defined.get(tokens[i - 1].string if i else "") or tags[i] or "variable"
        else:
            tags[i] = tags[i] or by_type.get(token.type, "string")
    return [(token.string, tag) for token, tag in zip(tokens, tags, strict=True) if tag]


def read_functions(limit: int) -> list[Sentence]:
    """Functions and methods of the standard library."""
    names = "ENCODING", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"
    layout = {getattr(tokenize, name) for name in names}
    sentences: list[Sentence] = []
    for path in common.shuffled(common.standard_library(), seed=0):
        text = path.read_bytes()
        if not text.isascii():  # columns of the syntax tree are bytes, those of tokens are characters
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in string literals
            tree = ast.parse(text)
        tokens = [token for token in tokenize.tokenize(io.BytesIO(text).readline) if token.type not in layout]
        starts = [token.start for token in tokens]
        within = (0, 0)  # the end of the last function: nested functions are part of it
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), key=lambda n: n.lineno):
            start, end = (node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset)
            if start >= within:
                sentences.append(tag_function(node, tokens[bisect_left(starts, start) : bisect_left(starts, end)]))
                within = end
        if len(sentences) >= limit:
            break
    return sentences[:limit]


def encode(sentences: list[Sentence], held_out: int, max_length: int) -> tuple[list[Sample], int, list[str]]:
    """Ids of tokens and tags, the size of the vocabulary and the names of the tags."""
    counts = Counter(token for sentence in sentences[held_out:] for token, _ in sentence)
    known = [token for token, n in counts.most_common() if n > 2]
    ids = {token: 1 + len(SHAPES) + i for i, token in enumerate(known)}  # 0 is padding
    tags = sorted({tag for sentence in sentences for _, tag in sentence})
    patterns = [re.compile(shape, re.DOTALL) for shape in SHAPES]

    def id_of(token: str) -> int:
        return ids.get(token) or next(i for i, pattern in enumerate(patterns, start=1) if pattern.fullmatch(token))

    samples = [
        (torch.tensor([id_of(token) for token, _ in cut]), torch.tensor([tags.index(tag) for _, tag in cut]))
        for cut in (sentence[:max_length] for sentence in sentences)
    ]
    return samples, 1 + len(SHAPES) + len(known), tags


def collate(samples: list[Sample], device: str) -> Batch:
    tokens, tags = (pad_sequence(list(ids), batch_first=True).to(device) for ids in zip(*samples, strict=True))
    return tokens, tags, torch.tensor([len(ids) for ids, _ in samples])


def spans(tags: list[str]) -> set[tuple[str, int, int]]:
    """Type, start and end of each tagged part: B-x and the I-x that follow, or one token of another tag but O."""
    found, start = set(), 0
    for i, tag in enumerate(tags):
        kind = tag.removeprefix("B-").removeprefix("I-")
        if not (tag.startswith("I-") and i and tags[i - 1] in (f"B-{kind}", tag)):
            start = i
        if tag != "O" and (i + 1 == len(tags) or tags[i + 1] != f"I-{kind}"):
            found.add((kind, start, i + 1))
    return found


class Scores:
    """Counts of true, predicted and matching spans by type."""

    def __init__(self, model: Tagger, batches: list[Batch], names: list[str]) -> None:
        self.true, self.predicted, self.right = Counter(), Counter(), Counter()
        self.seconds = 0.0  # of decoding
        for tokens, tags, lengths in batches:
            start = time.perf_counter()
            paths = model.decode(tokens, lengths).tolist()
            self.seconds += time.perf_counter() - start
            for path, truth, length in zip(paths, tags.tolist(), lengths.tolist(), strict=True):
                got, want = (spans([names[tag] for tag in ids[:length]]) for ids in (path, truth))
                for counter, found in ((self.true, want), (self.predicted, got), (self.right, got & want)):
                    counter.update(kind for kind, _, _ in found)

    def of(self, kind: str = "") -> tuple[float, float, float]:
        """Precision, recall and F1 of a type, or of all spans."""
        right, predicted, true = (c[kind] if kind else c.total() for c in (self.right, self.predicted, self.true))
        return right / max(predicted, 1), right / max(true, 1), 2 * right / max(predicted + true, 1)


def report_tags(scores: dict[str, Scores]) -> None:
    """Markdown table of precision, recall and F1 of each type and backend."""
    true = next(iter(scores.values())).true  # equal for all
    header = ["tag", "spans", *(f"{name} {what}" for name in scores for what in ("precision", "recall", "F1"))]
    rows = [
        [kind or "all", f"{true[kind] if kind else true.total()}"]
        + [f"{value:.1%}" for score in scores.values() for value in score.of(kind)]
        for kind in [*sorted(true), ""]
    ]
    print(f"\n{common.markdown(header, rows)}\n")
    print("Decoding of the validation data: " + ", ".join(f"{name} {s.seconds:.2f} s" for name, s in scores.items()))


def draw_f1(axes: Axes, scores: dict[str, Scores]) -> None:
    kinds = sorted(next(iter(scores.values())).true)
    for i, (name, score) in enumerate(scores.items()):
        left = [j + 0.4 * i for j in range(len(kinds))]
        axes.bar(left, [score.of(kind)[2] for kind in kinds], 0.4, align="edge", color=common.COLORS[name], label=name)
    common.style(axes, "F1 of each tag on validation data", "", "F1")
    axes.set_xticks([j + 0.4 for j in range(len(kinds))], kinds, rotation=30)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def main() -> int:
    data = 'a file with lines "token tag" and blank lines between sentences; without it, functions of Python'
    parser = common.Parser(__doc__, "tagging", epochs=4, batch=32, lr=3e-3, data=data)
    parser.add_argument("--sentences", type=common.count, default=2500, help="functions that are read (%(default)s)")
    parser.add_argument("--max-length", type=common.count, default=128, help="tokens of a sentence (%(default)s)")
    parser.add_argument("--embedding", type=common.count, default=64, help="size of token vectors (%(default)s)")
    parser.add_argument("--hidden", type=common.count, default=64, help="hidden size per direction (%(default)s)")
    parser.add_argument("--layers", type=common.count, default=1, help="layers of the LSTM (%(default)s)")
    args = parser.parse_args()
    if args.sentences < FEWEST:
        parser.error(f"--sentences: must be at least {FEWEST}, got {args.sentences}")
    sentences = read_conll(args.data) if args.data else read_functions(args.sentences)
    sentences = common.shuffled(sentences, args.seed)
    held_out = len(sentences) // 5
    samples, vocab, tags = encode(sentences, held_out, args.max_length)
    valid = [collate(chunk, args.device) for chunk in common.batches_of(samples[:held_out], args.batch)]
    training = samples[held_out:]

    def batches(epoch: int, rows: slice) -> Iterator[Batch]:
        order = common.shuffled(training, args.seed + epoch)
        return (collate(chunk, args.device) for chunk in common.batches_of(order, args.batch, rows))

    task = common.Task(
        "tagging",
        build=lambda layers: Tagger(layers, vocab, len(tags), args),
        batches=batches,
        loss=lambda model, batch: (model(*batch), batch[2].sum().item()),
        metric=lambda model: Scores(model, valid, tags).of()[2],
        metric_name="F1",
        layers=LAYERS,
    )
    source = args.data.name if args.data else "functions of Python's standard library"
    lengths = [len(ids) for ids, _ in training]
    shape = f"BiLSTM {args.hidden}, layers {args.layers}, CRF of {len(tags)} tags, batch {args.batch}"
    print(f"data: {source}, {len(training)} for training, {held_out} for validation; vocabulary {vocab}")
    print(f"tokens: median {statistics.median(lengths):.0f}, mean {statistics.mean(lengths):.0f}, most {max(lengths)}")
    print(f"model: {shape}, Adam {args.lr:g}, threads {args.threads}", flush=True)
    runs = common.train(task, args)
    with torch.no_grad():
        scores = {run.name: Scores(run.model.eval(), valid, tags) for run in runs}
    report_tags(scores)
    return common.report(task, runs, args, f"{source}: {shape}", [lambda axes: draw_f1(axes, scores)])


if __name__ == "__main__":
    common.run(main)
