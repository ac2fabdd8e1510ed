"""Runs the scripts of examples/ with small settings.

Each run is a new process, forked from a server that has imported torch and matplotlib, which takes longer than a run.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--nproc-per-node"]
MODULES = ["torch", "torch._dynamo", "torch.distributed", "seqkernels", "matplotlib.backends.backend_agg", "tqdm"]
LIMIT = 300.0  # seconds of a run


@dataclasses.dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def server() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    return context


def _main(script: Path, options: list[str], folder: Path, streams: tuple[Path, Path], environment: dict) -> None:
    """In the new process: what `python script options` does."""
    os.chdir(folder)
    os.environ.update(environment)
    for stream, path in zip((sys.stdout, sys.stderr), streams):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start commands in the background with it ignored
    sys.argv, sys.path[0] = [str(script), *options], str(script.parent)
    runpy.run_path(str(script), run_name="__main__")


def _run(script: str, folder: Path, options: tuple[str, ...], processes: int, watch: Callable | None = None) -> Result:
    streams = folder / "stdout.txt", folder / "stderr.txt"
    for path in streams:
        path.write_text("")
    environments: list[dict[str, str]] = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        common["WORLD_SIZE"] = common["LOCAL_WORLD_SIZE"] = str(processes)
        environments = [common | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]
    path = ROOT / "examples" / f"{script}.py"
    context, end = server(), time.monotonic() + LIMIT
    started = [
        context.Process(target=_main, args=(path, list(options), folder, streams, environment))
        for environment in environments
    ]
    try:
        for process in started:
            process.start()
        while any(process.is_alive() for process in started):
            assert time.monotonic() < end, f"{script} takes more than {LIMIT:g} s"
            if watch is not None and watch(streams[1].read_text()):
                os.kill(started[0].pid, signal.SIGINT)
                watch = None
            started[0].join(0.02)
            for process in started[1:]:
                process.join(0.02)
    finally:
        for process in started:
            process.kill()
    code = next((p.exitcode for p in started if p.exitcode), 0)
    return Result(code, *(stream.read_text() for stream in streams))


def run(script: str, folder: Path, *options: str, processes: int = 1) -> Result:
    """Runs a script in a folder, which gets its picture and checkpoint; in several processes, as torchrun does."""
    return _run(script, folder, options, processes)


def run_with_torchrun(script: str, folder: Path, *options: str, processes: int) -> Result:
    paths = [str(ROOT), *(path for path in sys.path if path and Path(path) != ROOT / "tests")]
    result = subprocess.run(
        [sys.executable, *TORCHRUN, str(processes), str(ROOT / "examples" / f"{script}.py"), *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    return Result(result.returncode, result.stdout, result.stderr)


def run_and_interrupt(script: str, folder: Path, *options: str) -> Result:
    """Interrupts the script, as Ctrl-C does, in its second epoch: the checkpoint of the first is complete."""
    return _run(script, folder, options, 1, lambda stderr: any(x.startswith("epoch  2 ") for x in stderr.splitlines()))


def losses(checkpoint: Path) -> dict[str, list[float]]:
    """The loss of each epoch, by backend."""
    runs = torch.load(checkpoint, weights_only=True)["runs"]
    return {name: state["loss"] for name, state in runs.items()}


def check_trained(script: str, folder: Path, result: Result) -> None:
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


def check_two_processes(
    script: str, folder: Path, *options: str, want: dict[str, list[float]], start: Callable[..., Result] = run
) -> None:
    """Two processes have the losses of one, and print one table."""
    result = start(script, folder, *options, processes=2)
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
