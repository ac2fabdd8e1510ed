"""examples/language_model.py with small settings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from support.examples import check_fails, check_resumes, check_trained, check_two_processes, losses, run

pytest.importorskip("tokenizers")
SCRIPT, EPOCHS = "language_model", 2
SMALL = ["--data", "text.txt", "--hidden", "8", "--steps", "16", "--vocab", "300", "--batch", "4", "--length", "8"]


def write_text(folder: Path) -> None:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    draw = random.Random(0)
    text = "\n".join(" ".join(draw.choices(words, k=8)) for _ in range(300))
    (folder / "text.txt").write_text(text)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(SCRIPT)
    write_text(folder)
    return folder, run(SCRIPT, folder, *SMALL, "--epochs", str(EPOCHS))


def test_backends_train_alike_and_continue_the_prompt(trained) -> None:
    folder, result = trained
    check_trained(SCRIPT, folder, result)
    assert "perplexity" in result.stdout
    drawn = result.stdout.split("8 tokens of ")
    assert len(drawn) == 3 and all("\n\ndef " in text for text in drawn[1:])


def test_resume_of_a_gru_of_characters(tmp_path: Path) -> None:
    write_text(tmp_path)
    options = [*SMALL, "--model", "gru", "--tokens", "chars", "--no-tie", "--dropout", "0.1", "--backend", "seqkernels"]
    result = run(SCRIPT, tmp_path, *options, "--epochs", str(EPOCHS))
    assert result.returncode == 0, result.stderr
    want = losses(tmp_path / f"{SCRIPT}.pt")
    check_resumes(SCRIPT, tmp_path, *options, epochs=EPOCHS, want=want)


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    write_text(tmp_path)
    want = losses(trained[0] / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *SMALL, "--epochs", str(EPOCHS), want=want)


def test_bad_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"first\nsecond \xff\n")
    message = "text.txt: line 2 must be UTF-8, got byte 0xff"
    check_fails(SCRIPT, tmp_path, "--data", "text.txt", message=message)
