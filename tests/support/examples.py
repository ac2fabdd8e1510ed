"""Runs the scripts of examples/ in new processes, with small settings."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node"]


def start(script: str, folder: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    """Starts a script in a folder, which gets its picture and checkpoint; with torchrun for several processes."""
    paths = [str(ROOT), *(path for path in sys.path if path and Path(path) != ROOT / "tests")]
    torchrun = [*TORCHRUN, str(processes)] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *torchrun, str(ROOT / "examples" / f"{script}.py"), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=not_ignoring_interrupts,
    )


def not_ignoring_interrupts() -> None:
    """Shells start commands in the background with SIGINT ignored, which new processes inherit."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(script: str, folder: Path, *options: str, processes: int = 1) -> subprocess.CompletedProcess:
    process = start(script, folder, *options, processes=processes)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_and_interrupt(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Interrupts the script, as Ctrl-C does, in its second epoch: the checkpoint of the first is complete."""
    process = start(script, folder, *options)
    try:
        for line in process.stderr:
            if line.startswith("epoch  2 "):
                process.send_signal(signal.SIGINT)
                break
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def losses(checkpoint: Path) -> dict[str, list[float]]:
    """The loss of each epoch, by backend."""
    runs = torch.load(checkpoint, weights_only=True)["runs"]
    return {name: state["loss"] for name, state in runs.items()}


def check_trained(script: str, folder: Path, result: subprocess.CompletedProcess) -> None:
    """Both backends have equal losses, the table is printed, and the picture is drawn."""
    assert result.returncode == 0, result.stderr
    assert "| epoch | torch loss | seqkernels loss |" in " ".join(result.stdout.split())
    assert "Losses after the first epoch: equal" in result.stdout
    assert (folder / f"{script}.png").read_bytes().startswith(b"\x89PNG")
    theirs, ours = losses(folder / f"{script}.pt").values()
    assert theirs[0] == pytest.approx(ours[0], rel=1e-4)
    assert theirs[-1] < theirs[0]


def check_resumes(script: str, folder: Path, *options: str, epochs: int, want: dict[str, list[float]]) -> None:
    """One epoch, and then the others after --resume, have the losses of one run."""
    for given in (["--epochs", "1"], ["--epochs", str(epochs), "--resume"]):
        result = run(script, folder, *options, *given)
        assert result.returncode == 0, result.stderr
    assert losses(folder / f"{script}.pt") == want


def check_two_processes(script: str, folder: Path, *options: str, want: dict[str, list[float]]) -> None:
    """Two processes have the losses of one, and print one table."""
    result = run(script, folder, *options, processes=2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("| median |") == 1
    for name, found in losses(folder / f"{script}.pt").items():
        assert found == pytest.approx(want[name], rel=1e-4)


def check_fails(script: str, folder: Path, *options: str, message: str) -> None:
    """The script ends with one sentence on stderr and exit code 2."""
    result = run(script, folder, *options)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
