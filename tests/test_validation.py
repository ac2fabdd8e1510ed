"""Arguments of explain and of the reference definitions."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from seqkernels import explain, reference
from seqkernels.functional import _recurrent_kinds as families

LSTM = dict(T=5, B=2, D=4, H=3)
BAG = dict(E=9, D=4, N=5, B=2)
CHAIN = dict(B=2, T=5, K=4)
ATTENTION = dict(B=2, Hq=4, Tq=5, Tk=6, D=8)


@pytest.mark.parametrize(
    ("op", "sizes", "wrong", "error", "text"),
    [
        ("lstm", LSTM, {"T": -1}, ValueError, "T must be at least 0, got -1"),
        ("lstm", LSTM, {"H": 0}, ValueError, "H must be at least 1, got 0"),
        ("lstm", LSTM, {"B": 2.0}, TypeError, "B must be an integer, got 2.0"),
        ("lstm", LSTM, {"B": True}, TypeError, "B must be an integer, got True"),
        ("lstm", LSTM, {"num_heads": 2}, ValueError, "num_heads must divide H, 3, got 2"),
        ("lstm", LSTM, {"bidirectional": 1}, TypeError, "bidirectional must be a bool, got 1"),
        ("lstm", LSTM, {"lengths": [5]}, ValueError, "lengths must hold B = 2 numbers, got 1"),
        ("lstm", LSTM, {"lengths": [5, 6]}, ValueError, r"lengths must lie in \[0, T\] = \[0, 5\], got 6"),
        ("lstm", LSTM, {"lengths": [5, 1.5]}, TypeError, "lengths must be a sequence of integers"),
        ("lstm", LSTM, {"options": "peephole"}, TypeError, "options must be a sequence of names"),
        ("lstm", LSTM, {"options": ["window"]}, ValueError, "options of lstm must be some of"),
        ("lstm", LSTM, {"capability": 9}, TypeError, "capability must be a pair of integers"),
        ("lstm", LSTM, {"dtype": "float32"}, TypeError, "dtype must be a torch.dtype, got 'float32'"),
        ("lstm", LSTM, {"E": 3}, TypeError, "E must be absent for lstm, got 3"),
        ("embedding_bag", BAG, {"N": -1}, ValueError, "N must be at least 0, got -1"),
        ("embedding_bag", BAG, {"D": "4"}, TypeError, "D must be an integer, got '4'"),
        ("embedding_bag", BAG, {"mode": "median"}, ValueError, "mode must be one of"),
        ("crf_viterbi", CHAIN, {"K": 0}, ValueError, "K must be at least 1, got 0"),
        ("crf_viterbi", CHAIN, {"nbest": 0}, ValueError, "nbest must be at least 1, got 0"),
        ("crf_entropy", CHAIN, {"nbest": 2}, TypeError, "nbest must be absent for crf_entropy, got 2"),
        ("crf_marginals", CHAIN, {"by_step": 1}, TypeError, "by_step must be a bool, got 1"),
        ("crf_log_partition", CHAIN, {"H": 4}, TypeError, "H must be absent for crf_log_partition, got 4"),
        ("scaled_dot_product_attention", ATTENTION, {"Tq": -2}, ValueError, "Tq must be at least 0, got -2"),
        ("scaled_dot_product_attention", ATTENTION, {"Hq": 0}, ValueError, "Hq must be at least 1, got 0"),
        ("scaled_dot_product_attention", ATTENTION, {"Hk": 3}, ValueError, "Hq must be a multiple of Hk, got 4 and 3"),
        ("scaled_dot_product_attention", ATTENTION, {"masked": 1}, TypeError, "masked must be a bool, got 1"),
        ("scaled_dot_product_attention", ATTENTION, {"extras": "lengths"}, TypeError, "extras must be a sequence"),
        ("scaled_dot_product_attention", ATTENTION, {"extras": ["mask"]}, ValueError, "extras of .* must be some of"),
    ],
    ids=str,
)
def test_explain_checks_its_arguments(op: str, sizes: dict, wrong: dict, error: type[Exception], text: str) -> None:
    explain(op, **sizes)
    with pytest.raises(error, match=f"^explain: {text}"):
        explain(op, **(sizes | wrong))


OTHERS: dict[str, Any] = {
    "peephole": True,
    "coupled_gates": True,
    "layer_norm": True,
    "norm_eps": 0.5,
    "reset_after": True,
    "forget_gate": "exp",
    "cell_clip": 1.0,
    "gate_clip": 1.0,
    "zoneout_c": 0.5,
    "recurrent_dropout": 0.5,
    "num_heads": 2,
}


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_definitions_refuse_options_that_a_layer_does_not_have(family: families.Family) -> None:
    """As the functional forms, whose signatures do not have them."""
    function = getattr(reference, family.name)
    options = inspect.signature(function).parameters
    assert set(OTHERS) <= set(options)
    for option, value in OTHERS.items():
        if option not in family.supported:
            with pytest.raises(
                TypeError, match=f"^{family.name}: {option} must be absent, which {family.name} does not"
            ):
                function(torch.randn(3, 2, 4), None, [torch.randn(3, 4)], **{option: value})
        else:
            with pytest.raises(ZeroDivisionError):  # after the check of the options
                function(torch.randn(3, 2, 4), None, [], num_layers=0, **{option: value})
