"""examples/recurrent_ppo.py with small settings: its losses, the ways to reset states, and its advantages."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import seqkernels
from support.examples import ROOT, check_fails, check_resumes, check_two_processes, losses, run

pytest.importorskip("gymnasium")
SCRIPT, EPOCHS = "recurrent_ppo", 2
SMALL = ["--envs", "4", "--steps", "40", "--batch", "2", "--passes", "1", "--hidden", "8"]
close = torch.testing.assert_close


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(SCRIPT)
    return folder, run(SCRIPT, folder, *SMALL, "--epochs", str(EPOCHS))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    import recurrent_ppo

    return recurrent_ppo


def test_backends_train_alike(trained) -> None:
    folder, result = trained
    assert result.returncode == 0, result.stderr
    assert "| epoch | torch loss | seqkernels loss |" in " ".join(result.stdout.split())
    assert "Losses after the first epoch: equal" in result.stdout and "Collecting in all: torch" in result.stdout
    assert (folder / f"{SCRIPT}.png").read_bytes().startswith(b"\x89PNG")
    theirs, ours = losses(folder / f"{SCRIPT}.pt").values()
    assert theirs[0] == pytest.approx(ours[0], rel=1e-4)


def test_resume(trained, tmp_path: Path) -> None:
    check_resumes(SCRIPT, tmp_path, *SMALL, epochs=EPOCHS, want=losses(trained[0] / f"{SCRIPT}.pt"))


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    want = losses(trained[0] / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *SMALL, "--epochs", str(EPOCHS), want=want)


def test_bad_options(trained) -> None:
    check_fails(SCRIPT, trained[0], "--steps", "501", message="must lie in [2, 500], the longest episode, got 501")
    changed = [*SMALL, "--resume", "--hidden", "9"]
    check_fails(SCRIPT, trained[0], *changed, message="--hidden is 9, in the checkpoint 8")


@pytest.mark.filterwarnings("ignore")
def test_ways_to_reset_states_agree(script: ModuleType) -> None:
    """Outputs and gradients of the fused reset, the loop and the packed episodes."""
    starts = torch.rand(11, 3) < 0.3
    starts[0] = True
    observations = torch.randn(11, 3, 2)
    found = []
    for layers, resets in ((seqkernels.nn, ""), (torch.nn, "loop"), (torch.nn, "packed")):
        torch.manual_seed(0)
        policy = script.Policy(layers, Namespace(hidden=5, resets=resets))
        logits, values, _ = policy(observations, starts)
        (logits.square().sum() + values.square().sum()).backward()
        found.append([logits, values, *(p.grad for p in policy.parameters())])
    for others in found[1:]:
        for a, b in zip(found[0], others, strict=True):
            close(a, b)


@pytest.mark.filterwarnings("ignore")
def test_advantages_end_with_the_episode(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without discount and decay, advantage plus value is the sum of the rewards up to the end of the episode."""
    monkeypatch.setattr(script, "GAMMA", 1.0)
    monkeypatch.setattr(script, "LAMBDA", 1.0)
    rewards, ends = torch.tensor([[1.0], [2.0], [4.0], [8.0]]), torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    values = torch.tensor([[0.5], [0.25], [3.0], [1.0], [16.0]])
    returns = script.estimate_advantages(rewards, ends, values) + values[:-1]
    close(returns, torch.tensor([[3.0], [2.0], [28.0], [24.0]]))
