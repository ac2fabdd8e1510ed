"""examples/transformer.py with small settings."""

from __future__ import annotations

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import seqkernels
from support.examples import ROOT, check_fails, check_resumes, check_trained, check_two_processes, losses, run

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")
SCRIPT, EPOCHS = "transformer", 2
SMALL = ["--limit", "96", "--width", "16", "--heads", "2", "--layers", "1", "--batch", "32", "--evaluate", "10"]
SMALL += ["--beam", "2", "--lr", "0.01"]


@pytest.fixture(scope="module", params=["padded", "packed"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    options = [*SMALL, "--layout", request.param]
    return options, folder, run(SCRIPT, folder, *options, "--epochs", str(EPOCHS))


def test_backends_train_alike(trained) -> None:
    _, folder, result = trained
    check_trained(SCRIPT, folder, result)


def test_resume(trained, tmp_path: Path) -> None:
    options, folder, _ = trained
    check_resumes(SCRIPT, tmp_path, *options, epochs=EPOCHS, want=losses(folder / f"{SCRIPT}.pt"))


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    options, folder, _ = trained
    want = losses(folder / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *options, "--epochs", str(EPOCHS), want=want)


def test_bad_options(tmp_path: Path) -> None:
    message = "--width: must be even and a multiple of --heads 4, got 10"
    check_fails(SCRIPT, tmp_path, "--width", "10", message=message)
    check_fails(SCRIPT, tmp_path, *SMALL, "--longest", "5", message="--longest: must be at least")


@pytest.mark.parametrize("layers", [torch.nn, seqkernels.nn], ids=["torch", "seqkernels"])
def test_steps_of_the_search_have_the_logits_of_training(layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    transformer = importlib.import_module(SCRIPT)
    torch.manual_seed(0)
    language = SimpleNamespace(get_vocab_size=lambda: 11)
    args = Namespace(width=8, heads=2, layers=2, longest=20, dropout=0.0, layout="padded")
    model = transformer.Transformer(layers, SimpleNamespace(source=language, target=language), args).eval()
    source, lengths = torch.randint(1, 11, (2, 6)), torch.tensor([6, 4])
    tokens = torch.randint(1, 11, (6, 5))  # three hypotheses of each sentence
    repeated = lengths.repeat_interleave(3)
    with torch.no_grad():
        memory = model.encode(source, lengths).repeat_interleave(3, 0)
        want = model.output(model.decode(tokens, memory, repeated, torch.full((6,), 5)))
        step, first = model.search(source, lengths)
        state = tuple(x.repeat_interleave(3, 0) for x in first)
        for t in range(5):
            logits, state = step(tokens[:, t], state)
            torch.testing.assert_close(logits, want[:, t], atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_waves_are_the_positional_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import transformer

    encoded = seqkernels.nn.PositionalEncoding(12, max_len=30, batch_first=True)(torch.zeros(1, 30, 12))
    torch.testing.assert_close(transformer.waves(30, 12), encoded[0])
