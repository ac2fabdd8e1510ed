"""Trains a small tagger of Python source, character by character, and compiles it for a program without Python.

    python export_tagger.py tagger.pt2

The tagger is an embedding, a bidirectional LSTM and a linear layer. It is prepared with int8 weights, exported by
torch.export with a dynamic number of characters, and compiled by AOTInductor.
"""

from __future__ import annotations

import argparse
import inspect
import io
import keyword
import random
import time
import tokenize

import torch
from torch import Tensor, nn

import seqkernels
from seqkernels import inference

TAGS = ("space", "name", "keyword", "number", "string", "operator", "comment")
CHARACTERS = 128  # ASCII; others are 0


class Tagger(nn.Module):
    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(CHARACTERS, 32)
        self.encode = seqkernels.nn.LSTM(32, size, bidirectional=True)
        self.out = nn.Linear(2 * size, len(TAGS))

    def forward(self, characters: Tensor) -> Tensor:
        """[T, B] int64 characters to [T, B, 7] scores of the tags."""
        encoded, _ = self.encode(self.embed(characters))
        scores: Tensor = self.out(encoded)
        return scores


def encode(text: str) -> Tensor:
    return torch.tensor([ord(c) if ord(c) < CHARACTERS else 0 for c in text])


def labelled_source() -> tuple[Tensor, Tensor]:
    """Source of the standard library, and the tag of each character by its own tokenizer."""
    characters, tags = [], []
    for module in (argparse, inspect, io, random, tokenize):
        text = inspect.getsource(module)
        starts = [0]
        for line in text.splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        of = torch.zeros(len(text), dtype=torch.int64)
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            tag = {tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.OP: 5, tokenize.COMMENT: 6}.get(token.type)
            if token.type == tokenize.NAME:
                tag = 2 if keyword.iskeyword(token.string) else 1
            if tag is not None:
                begin, end = (starts[line - 1] + column for line, column in (token.start, token.end))
                of[begin:end] = tag
        characters.append(encode(text))
        tags.append(of)
    return torch.cat(characters), torch.cat(tags)


def train(model: Tagger, steps: int) -> float:
    """Returns the accuracy of the last batches."""
    characters, tags = labelled_source()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    right, started = 0.0, time.perf_counter()
    for step in range(steps):
        at = torch.randint(len(characters) - 100, (32,))
        batch = at + torch.arange(100).unsqueeze(1)  # [T, B]
        scores = model(characters[batch])
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), tags[batch].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right = 0.9 * right + 0.1 * (scores.argmax(-1) == tags[batch]).float().mean().item()
        if step % 20 == 19 or step == steps - 1:
            done = (step + 1) / steps
            bar = "#" * round(30 * done)
            seconds = time.perf_counter() - started
            print(f"\r[{bar:<30}] {100 * done:3.0f} %  loss {loss.item():.3f}  {seconds:.0f} s", end="", flush=True)
    print()
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", help="file to write")
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--weights", default="int8", choices=("float32", "bfloat16", "float16", "int8"))
    parser.add_argument("--text", default="for i in range(10): x = 'a'  # done", help="text to tag after training")
    given = parser.parse_args()
    torch.manual_seed(0)
    model = Tagger()
    print(f"accuracy {train(model, given.steps):.3f}")
    prepared, report = inference.prepare(model.eval(), given.weights)
    print(report)
    example = encode(given.text).unsqueeze(1)
    with torch.no_grad():
        exported = torch.export.export(prepared, (example,), dynamic_shapes=({0: torch.export.Dim("T", min=1)},))
        torch._inductor.aoti_compile_and_package(exported, package_path=given.package)
        print(" ".join(TAGS[t] for t in prepared(example).argmax(-1).flatten().tolist()))


if __name__ == "__main__":
    main()
