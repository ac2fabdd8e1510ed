"""examples/translation.py with small settings, and the data that it shares with examples/transformer.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.examples import check_fails, check_resumes, check_trained, check_two_processes, losses, run

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")
SCRIPT, EPOCHS = "translation", 2
SMALL = ["--limit", "96", "--embedding", "8", "--hidden", "8", "--batch", "32", "--evaluate", "10", "--beam", "2"]
SMALL += ["--lr", "0.01"]
OPTIONS = {
    "luong": ["--sampling", "0.5", "--accumulate", "2"],
    "additive": ["--attention", "additive", "--sampling", "0.5"],
}


@pytest.fixture(scope="module", params=OPTIONS)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(request.param)
    options = [*SMALL, *OPTIONS[request.param]]
    return options, folder, run(SCRIPT, folder, *options, "--epochs", str(EPOCHS))


def test_backends_train_alike(trained) -> None:
    _, folder, result = trained
    check_trained(SCRIPT, folder, result)
    assert "test, torch: BLEU" in result.stdout and "test, seqkernels: BLEU" in result.stdout


def test_resume(trained, tmp_path: Path) -> None:
    options, folder, _ = trained
    check_resumes(SCRIPT, tmp_path, *options, epochs=EPOCHS, want=losses(folder / f"{SCRIPT}.pt"))


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    options, folder, _ = trained
    want = losses(folder / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *options, "--epochs", str(EPOCHS), want=want)


def write_pairs(folder: Path) -> None:
    for part in ("train", "val", "test_2016_flickr"):
        (folder / f"{part}.de").write_text("Ein Hund läuft.\nZwei Hunde.\n" * 8)
        (folder / f"{part}.en").write_text("A dog runs.\nTwo dogs.\n" * 8)


def test_multi30k(tmp_path: Path) -> None:
    write_pairs(tmp_path)
    result = run(SCRIPT, tmp_path, "--data", ".", "--epochs", "2", *SMALL)
    check_trained(SCRIPT, tmp_path, result)
    assert "seqkernels BLEU" in result.stdout and "16 sentences" in result.stdout


def test_bad_data(tmp_path: Path) -> None:
    check_fails(SCRIPT, tmp_path, "--data", "none", message="none/train.de: must be a text file, got: No such file")
    write_pairs(tmp_path)
    (tmp_path / "val.en").write_text("A dog runs.\n")
    message = "val.en: line 2 must be the translation of that of val.de, got no line"
    check_fails(SCRIPT, tmp_path, "--data", ".", message=message)
    (tmp_path / "train.en").write_text("A dog runs.\n\n" * 8)
    check_fails(SCRIPT, tmp_path, "--data", ".", message="train.en: line 2 must hold a sentence, got an empty line")
