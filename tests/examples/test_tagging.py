"""examples/tagging.py with small settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.examples import check_fails, check_resumes, check_trained, check_two_processes, losses, run

SCRIPT, EPOCHS = "tagging", 2
SMALL = ["--sentences", "80", "--max-length", "20", "--hidden", "8", "--embedding", "8", "--batch", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(SCRIPT)
    return folder, run(SCRIPT, folder, *SMALL, "--epochs", str(EPOCHS))


def test_backends_train_alike_and_report_each_tag(trained) -> None:
    folder, result = trained
    check_trained(SCRIPT, folder, result)
    for tag in ("call", "function", "keyword", "operator", "parameter", "variable", "all"):
        assert f" {tag} |" in result.stdout


def test_resume(trained, tmp_path: Path) -> None:
    check_resumes(SCRIPT, tmp_path, *SMALL, epochs=EPOCHS, want=losses(trained[0] / f"{SCRIPT}.pt"))


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    want = losses(trained[0] / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *SMALL, "--epochs", str(EPOCHS), want=want)


def test_bad_data(tmp_path: Path) -> None:
    (tmp_path / "train.conll").write_text("EU B-ORG\nrejects\n")
    message = "train.conll: line 2 must be \"token tag\", got 'rejects'"
    check_fails(SCRIPT, tmp_path, "--data", "train.conll", message=message)
