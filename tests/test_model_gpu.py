"""bench/model_gpu.py: the model of the recurrent CUDA kernels against the measured rows, without a GPU."""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


def module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return importlib.import_module(name)


model = module("model_gpu")
OUTSIDE: set[str] = set()  # names of rows that the model misses by more than 25 %


@pytest.fixture(scope="module")
def checked():
    rows, machine = model.read_rows()
    return machine, *model.check(rows, machine)


def test_each_measured_row_is_predicted_within_a_quarter(checked):
    _, _, rows = checked
    assert len(rows) == 34
    assert {str(c.row.layer) for c in rows if not abs(c.error) <= model.TOLERANCE} == OUTSIDE


def test_no_row_determines_a_constant(checked):
    """Far fewer constants than rows, and predictions of rows that the fit has not seen are nearly as good."""
    _, fit, rows = checked
    assert len(fit) == len(model.FITTED) == 5
    assert all(math.isfinite(value) and value >= 0 for value in fit.values())
    for errors in ([c.left_out for c in rows], [c.layer_out for c in rows]):
        assert model.root_mean_square(errors) < 0.09
        assert max(map(abs, errors)) < 0.25


@pytest.mark.parametrize("training", [False, True], ids=["forward", "training"])
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_more_steps_and_more_units_are_never_faster(checked, cell, training):
    machine, fit, _ = checked
    for B in (1, 16, 64, 512):
        of_h = [model.Layer(cell, B, H, 256, training) for H in (64, 128, 256, 384, 512, 640, 768, 1024, 1536, 2048)]
        of_t = [model.Layer(cell, B, 256, T, training) for T in (2, 64, 256, 1024, 4096)]
        for layers in (of_h, of_t):
            times = [model.predict(layer, fit, machine) for layer in layers]
            assert times == sorted(times)
            assert all(time > 0 for time in times)


def test_a_call_is_the_sum_of_its_terms(checked):
    machine, fit, _ = checked
    layer = model.Layer("LSTM", 16, 768, 1024, training=True)
    total = 0.0
    for terms in model.call_terms(layer, machine):
        total += sum(amount * (fit[key] if key else 1) for amount, key in terms.values())
    assert model.predict(layer, fit, machine) == pytest.approx(total)
    assert model.predict(replace(layer, training=False), fit, machine) < total


@pytest.mark.parametrize(
    "layer, backward, plan",
    [
        (("LSTM", 16, 256, 1024), False, "cluster 8x2 rows 2 waves 1"),
        (("LSTM", 16, 768, 1024), False, "cluster 16x3 rows 4 waves 1"),
        (("LSTM", 16, 768, 1024), True, "cluster 16x3 rows 2 waves 2"),  # four rows exceed the shared memory
        (("LSTM", 64, 512, 256), False, "cluster 16x2 rows 8 waves 2"),
        (("GRU", 1, 1024, 256), True, "steps"),
    ],
)
def test_plan_of_a_layer(layer, backward, plan):
    assert str(model.plan(model.Layer(*layer), backward)) == plan


def test_least_squares_recover_known_constants(checked):
    machine, fit, rows = checked
    exact = [c.row._replace(seconds=c.predicted) for c in rows]
    again = model.fit_constants(exact, machine)
    assert again == pytest.approx(fit, rel=1e-6)


def test_changes_are_ranked_and_never_slower(checked):
    machine, fit, rows = checked
    ranked = model.rank([c.row for c in rows], fit, machine)
    assert len(ranked) == len(model.CHANGES)
    assert all(each.gain >= 1 for each in ranked)
    assert [each.kind == "change" for each in ranked] == sorted((e.kind == "change" for e in ranked), reverse=True)
    for _, group in itertools.groupby(ranked, key=lambda each: each.kind == "change"):
        gains = [each.gain for each in group]
        assert gains == sorted(gains, reverse=True)


def test_output_has_every_row_and_change(checked, capsys):
    _, _, rows = checked
    assert model.main([]) == 0
    text = capsys.readouterr().out
    assert "34 of 34 rows within 25%" in text
    for name in [*(str(c.row.layer) for c in rows), *(change.name for change in model.CHANGES), *model.PUBLISHED]:
        assert name in text


def test_set_replaces_a_constant_for_one_run(capsys):
    before = dict(model.PUBLISHED)
    assert model.main(["--set", "clock=1.755e9"]) == 0
    assert "1.755e+09" in capsys.readouterr().out
    assert before == model.PUBLISHED
    assert model.main(["--set", "speed=1"]) == 1
    assert "--set takes NAME=VALUE with a name of clock, " in capsys.readouterr().err


def test_missing_file_and_file_without_rows(tmp_path, capsys):
    missing = tmp_path / "missing.json"
    with pytest.raises(FileNotFoundError, match=r"file must be a saved result of bench/gpu.py, got .*missing.json"):
        model.read_rows(missing)
    assert model.main([str(missing)]) == 1
    assert "which is missing" in capsys.readouterr().err
    with pytest.raises(ValueError, match="file must have recurrent rows in bfloat16, got none"):
        model.read_rows(BENCH / "results" / "nvidia-h200-2-threads-2026-11-26.json")
