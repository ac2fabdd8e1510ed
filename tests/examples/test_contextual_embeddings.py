"""examples/contextual_embeddings.py with small settings."""

from __future__ import annotations

import importlib
import random
from pathlib import Path

import pytest
import torch

from support.examples import ROOT, check_fails, check_resumes, check_trained, check_two_processes, losses, run

SCRIPT, EPOCHS = "contextual_embeddings", 2
SMALL = ["--data", "text.txt", "--size", "8", "--hidden", "12", "--layers", "1", "--batch", "8", "--word", "cat"]


def write_text(folder: Path) -> None:
    words = ["the", "cat", "dog", "sees", "big", "small", "old", "bird", "runs"]
    draw = random.Random(0)
    sentences = [f"{' '.join(draw.choices(words, k=draw.randint(5, 9)))} {i}." for i in range(150)]
    (folder / "text.txt").write_text("\n".join(sentences))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(SCRIPT)
    write_text(folder)
    return folder, run(SCRIPT, folder, *SMALL, "--epochs", str(EPOCHS))


def test_backends_train_alike_and_print_neighbours(trained) -> None:
    folder, result = trained
    check_trained(SCRIPT, folder, result)
    shown = result.stdout.partition("Nearest in context to 'cat':")[2].splitlines()[1:]
    assert len(shown) == 12 and all("[cat]" in line for line in shown[::4])


def test_resume(trained, tmp_path: Path) -> None:
    write_text(tmp_path)
    check_resumes(SCRIPT, tmp_path, *SMALL, epochs=EPOCHS, want=losses(trained[0] / f"{SCRIPT}.pt"))


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    write_text(tmp_path)
    want = losses(trained[0] / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *SMALL, "--epochs", str(EPOCHS), want=want)


def test_bert(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    write_text(tmp_path)
    result = run(SCRIPT, tmp_path, *SMALL, "--model", "bert", "--epochs", str(EPOCHS))
    check_trained(SCRIPT, tmp_path, result)


def test_sequences_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    backwards = importlib.import_module(SCRIPT).backwards
    x = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    lengths = torch.tensor([3, 4])
    assert backwards(x, lengths).tolist() == [[3, 2, 1, 0], [7, 6, 5, 4]]
    assert torch.equal(backwards(backwards(x[..., None], lengths), lengths), x[..., None])


def test_bad_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one two three four\n")
    message = "text.txt: must hold at least 100 sentences of 4 words, got 1"
    check_fails(SCRIPT, tmp_path, "--data", "text.txt", message=message)
    check_fails(SCRIPT, tmp_path, "--model", "bert", "--size", "6", message="--size: must be a multiple of the 4 heads")


def test_a_text_of_short_words_has_no_picture_of_vectors(tmp_path: Path) -> None:
    draw = random.Random(0)
    sentences = [f"{' '.join(draw.choices(['a', 'an', 'on', 'at'], k=6))} {i}." for i in range(150)]
    (tmp_path / "text.txt").write_text("\n".join(sentences))
    check_trained(SCRIPT, tmp_path, run(SCRIPT, tmp_path, *SMALL, "--epochs", "2"))
