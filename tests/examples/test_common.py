"""examples/common.py: options, checkpoints and training, on a model of a few weights."""

from __future__ import annotations

import importlib
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from support.examples import ROOT, losses, run, run_and_interrupt

sys.path.insert(0, str(ROOT / "examples"))
common = importlib.import_module("common")
sys.path.pop(0)


class Shifted(nn.Linear):
    """A layer whose results differ from those of nn.Linear."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.5


def rows(n: int = 22) -> list[Tensor]:
    return list(torch.randn(n, 3, generator=torch.Generator().manual_seed(1)))


def task_of(width: int = 4, dropout: float = 0.0, **options: Any) -> Any:
    """Regression to the sum of the inputs."""
    data = rows()

    def build(layers: Any) -> nn.Module:
        return nn.Sequential(layers.Linear(3, width), nn.Dropout(dropout), nn.Linear(width, 1))

    def batches(epoch: int, part: slice) -> list[Tensor]:
        return [torch.stack(list(chunk)) for chunk in common.batches_of(common.shuffled(data, epoch), 4, part)]

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
        return (model(x)[:, 0] - x.sum(1)).square().sum(), len(x)

    def metric(model: nn.Module) -> float:
        total, n = loss(model, torch.stack(data))
        return total.item() / n

    same = SimpleNamespace(Linear=nn.Linear)
    layers = {"torch": same, "seqkernels": same}
    defaults = dict(
        name="toy", build=build, loss=loss, batches=batches, metric=metric, higher_is_better=False, layers=layers
    )
    return common.Task(**{**defaults, **options})


def arguments(folder: Path, *given: str) -> Any:
    parser = common.Parser("A test.", "toy", epochs=4, batch=4, lr=1e-2, data="nothing")
    paths = ["--output", str(folder / "toy.png"), "--checkpoint", str(folder / "toy.pt")]
    return parser.parse_args([*paths, *given])


def history(runs: list[Any]) -> dict[str, Any]:
    return {run.name: (run.loss, run.metric) for run in runs}


@pytest.mark.parametrize(
    "options",
    [
        dict(dropout=0.3),
        dict(scheduler=lambda optimizer: ReduceLROnPlateau(optimizer, "min", patience=0), patience=3),
        dict(scheduler=lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)), accumulate=3, clip=0.0),
    ],
    ids=["dropout", "plateau", "steps"],
)
def test_resume_continues_with_the_losses_of_one_run(options: dict, tmp_path: Path) -> None:
    want = history(common.train(task_of(**options), arguments(tmp_path)))
    common.train(task_of(**options), arguments(tmp_path, "--epochs", "2"))
    got = history(common.train(task_of(**options), arguments(tmp_path, "--resume")))
    assert got == want and len(got["torch"][0]) == 4
    assert not list(tmp_path.glob("*.new"))


def test_accumulated_batches_have_the_step_of_one(tmp_path: Path) -> None:
    """All batches of an epoch in one step; they have equal sizes."""
    data = torch.stack(rows(20))
    found = []
    for parts in (1, 5):
        task = task_of(accumulate=parts, batches=lambda epoch, part, n=parts: list(data.chunk(n)))
        found.append(common.train(task, arguments(tmp_path, "--epochs", "3"))[0].metric)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_early_stopping_returns_the_best_weights(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 1.0, 5.0, 5.0, 0.0])
    weights: list[Tensor] = []

    def metric(model: nn.Module) -> float:
        weights.append(model[0].weight.detach().clone())
        return next(values)

    args = arguments(tmp_path, "--epochs", "9", "--backend", "torch")
    (trained,) = common.train(task_of(metric=metric, patience=2), args)
    assert trained.metric == [3, 2, 1, 5, 5]
    assert torch.equal(trained.model[0].weight, weights[2])


def test_exit_code_for_different_losses(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    args, task = arguments(tmp_path), task_of()
    assert common.report(task, common.train(task, args), args) == 0
    assert "Losses after the first epoch: equal" in capsys.readouterr().out
    task.layers = {**task.layers, "seqkernels": SimpleNamespace(Linear=Shifted)}
    assert common.report(task, common.train(task, args), args) == 1
    assert "Losses after the first epoch: NOT equal" in capsys.readouterr().out


def test_batches_differ_by_at_most_one() -> None:
    sizes = [len(batch) for batch in common.batches_of(range(11), 4)]
    assert sizes == [3, 4, 4]
    parts = [list(common.batches_of(range(11), 4, slice(rank, None, 2))) for rank in range(2)]
    assert sorted(i for part in parts for batch in part for i in batch) == list(range(11))


def write_other(path: Path) -> None:
    path.write_bytes(b"no checkpoint")


@pytest.mark.parametrize(
    "width, given, message",
    [
        (4, ["--checkpoint", "missing.pt"], "missing.pt must be a checkpoint, got: No such file or directory"),
        (4, ["--checkpoint", "other.pt"], "other.pt must be a checkpoint of this script"),
        (4, ["--seed", "7"], "must be a checkpoint of the same options: --seed is 7, in the checkpoint 0"),
        (5, [], "must hold the model of these data: size mismatch for 2.weight"),
    ],
)
def test_resume_from_another_checkpoint(
    width: int, given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_other(tmp_path / "other.pt")
    common.train(task_of(), arguments(tmp_path, "--epochs", "1"))
    with pytest.raises(common.ScriptError) as error:
        common.train(task_of(width), arguments(tmp_path, *given, "--resume"))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--backend", "tpu"], "argument --backend: invalid choice: 'tpu'"),
        (["--epochs", "0"], "argument --epochs: must be at least 1, got 0"),
        (["--device", "cuda:99"], "--device: cuda:99 must be a device of this machine"),
        (["--output", "toy.foo"], "--output: must end with .png, .pdf or .svg, got toy.foo"),
        (["--checkpoint", "."], "--checkpoint: must be a file, got the folder ."),
        (["--lr", "-1"], "--lr: must be above 0, got -1.0"),
        (["--seed", str(2**70)], "--seed: must be from 0 to 2147483647"),
        (["--output", "missing/toy.png"], "--output: folder missing must exist"),
    ],
)
def test_unknown_options(given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        arguments(tmp_path, *given)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_a_loss_that_is_not_finite_ends_training(tmp_path: Path) -> None:
    """The checkpoint is that of the epoch before."""

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
        scale = math.nan if losses(tmp_path / "toy.pt")["torch"] else 1.0
        return scale * model(x).square().sum(), len(x)

    message = "epoch 2: the loss of torch must be finite, got nan; use a smaller --lr"
    with pytest.raises(common.ScriptError, match=message):
        common.train(task_of(loss=loss, metric=lambda model: 0.0), arguments(tmp_path))
    assert len(losses(tmp_path / "toy.pt")["torch"]) == 1


def test_an_interrupt_leaves_a_checkpoint(tmp_path: Path) -> None:
    text = "\n".join(str(random.Random(i).random()) for i in range(600))
    (tmp_path / "text.txt").write_text(text)
    options = ["--data", "text.txt", "--hidden", "8", "--tokens", "chars", "--batch", "4", "--length", "8"]
    result = run_and_interrupt("language_model", tmp_path, *options, "--epochs", "1000")
    assert result.returncode == 2
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "the same command with --resume continues from language_model.pt" in message
    done = len(losses(tmp_path / "language_model.pt")["torch"])
    assert done >= 1 and f"interrupted after {done} of 1000 epochs" in message
    result = run("language_model", tmp_path, *options, "--epochs", str(done + 1), "--resume")
    assert result.returncode == 0, result.stderr
    found = losses(tmp_path / "language_model.pt")
    assert all(len(values) == done + 1 and all(map(math.isfinite, values)) for values in found.values())


@pytest.mark.parametrize("values, limits", [([3.0, 2.9], (0, 3.24)), ([1.0, -2.0], (-2.16, 1.08)), ([0.0], (0, 1))])
def test_limits_of_a_plot_include_zero_and_all_values(values: list[float], limits: tuple[float, float]) -> None:
    axes = Figure().subplots()
    axes.plot(values)
    common.style(axes, "Values", "x", "y")
    assert axes.get_ylim() == pytest.approx(limits)
