"""examples/forecasting.py with small settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.examples import check_fails, check_resumes, check_trained, check_two_processes, losses, run

SCRIPT, EPOCHS = "forecasting", 2
SMALL = ["--series", "2", "--horizon", "4", "--steps", "48", "--hidden", "8", "--batch", "16"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(SCRIPT)
    return folder, run(SCRIPT, folder, *SMALL, "--epochs", str(EPOCHS))


def test_backends_train_alike_and_are_served(trained) -> None:
    folder, result = trained
    check_trained(SCRIPT, folder, result)
    rows = [line.split("|") for line in result.stdout.splitlines() if "trained |" in line or "prepared in" in line]
    errors = {row[1].strip(): float(row[3]) for row in rows}
    assert errors.keys() == {
        "torch, trained",
        "seqkernels, trained",
        "seqkernels, prepared in float32",
        "seqkernels, prepared in int8",
    }
    assert errors.pop("seqkernels, prepared in int8") < 0.05
    assert all(error < 1e-5 for error in errors.values())


def test_resume(trained, tmp_path: Path) -> None:
    check_resumes(SCRIPT, tmp_path, *SMALL, epochs=EPOCHS, want=losses(trained[0] / f"{SCRIPT}.pt"))


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    want = losses(trained[0] / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *SMALL, "--epochs", str(EPOCHS), want=want)


def test_bad_data(tmp_path: Path) -> None:
    (tmp_path / "load.csv").write_text("a,b\n1,2\n3\n")
    message = "load.csv: line 3 must hold 2 finite numbers, got '3'"
    check_fails(SCRIPT, tmp_path, "--data", "load.csv", message=message)
