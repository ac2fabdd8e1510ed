"""examples/transformer.py with small settings."""

from __future__ import annotations

import sys
from pathlib import Path

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


@pytest.mark.filterwarnings("ignore")
def test_waves_are_the_positional_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import transformer

    encoded = seqkernels.nn.PositionalEncoding(12, max_len=30, batch_first=True)(torch.zeros(1, 30, 12))
    torch.testing.assert_close(transformer.waves(30, 12), encoded[0])
