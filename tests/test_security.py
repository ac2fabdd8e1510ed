"""SECURITY.md: numbers out of range for each row of its table, the files that it names, and pickles."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_on_cpu import load
from torch import Tensor

ROOT = pathlib.Path(__file__).parents[1]
R, I = torch.randn, torch.tensor
H, D, K = 3, 4, 5
WEIGHTS = [R(4 * H, D), R(4 * H, H), R(4 * H), R(4 * H)]
ANY = 2**62, 2**63 - 1, -(2**63), -1


def table() -> list[list[str]]:
    """Cells of the rows of the table of checks."""
    text = (ROOT / "SECURITY.md").read_text().partition("## Checks of numbers")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


# (op, argument): a call with a number n in the place of a valid one, and one more value that is just out of range.
Call = Callable[[Any, int], Any]


def lstm(ops: Any, **given: Tensor | None) -> Any:
    x = R(6, D) if "batch_sizes" in given else R(3, 2, D)
    return ops.lstm_forward(x, None, None, WEIGHTS, given.get("batch_sizes"), given.get("lengths"), False)


def prepared(ops: Any, batch_sizes: Tensor | None, lengths: Tensor | None) -> Any:
    packed = [ops.recurrent_pack(w, 4, 4, 1, 0)[0] for w in WEIGHTS[:2]]
    x = R(3, 2, D) if batch_sizes is None else R(6, D)
    weights = [*packed, (WEIGHTS[2] + WEIGHTS[3])]
    return ops.lstm_prepared(x, None, None, weights, 0, H, 0, 1, False, 1, False, [], None, batch_sizes, lengths, None)


def bag(ops: Any, indices: Tensor, offsets: Tensor) -> Any:
    return ops.embedding_bag_forward(R(5, D), indices, offsets, None, 0)


def bags_backward(ops: Any, rows: int) -> Any:
    none, bounds = torch.zeros(0, dtype=torch.int32), I([0, 1, 2])
    return ops.embedding_bags_backward(
        R(1, 8), none, [7, rows], [5, 3], [1, 1], I([1, 2]), bounds, None, 0, -1, True, 0, False
    )


def attend(ops: Any, q_lengths: Tensor | None = None, cu: Tensor | None = None) -> Any:
    q = R(1 if cu is not None else 2, 2, 6, 8)
    longest = 6 if cu is not None else 0
    return ops.attention_forward(
        q, q, q, None, None, q_lengths, q_lengths, cu, cu, longest, longest, 0.3, 0, -1, -1, 0.0, 0.0, None
    )


def decode(ops: Any, page: int = 0, length: int = 3) -> Any:
    keys, blocks = R(4, 2, 3, 8), I([[0, page], [1, 0]]).clamp(-(2**31), 2**31 - 1).int()
    return ops.attention_decode(
        R(2, 2, 1, 8), keys, keys, None, None, blocks, None, None, None, I([4, length]), 0.3, 0, -1, -1, 0.0
    )


def chain(ops: Any, lengths: Tensor, tags: Tensor | None = None) -> Any:
    return ops.crf_forward(R(2, 3, K), R(K, K), None, None, lengths, None, tags)


def ctc(ops: Any, steps: int = 6, labels: int = 2, label: int = 1) -> Any:
    targets = I([[1, 2], [label, 3]])
    return ops.ctc_loss_forward(R(6, 2, K).log_softmax(2), targets, I([6, steps]), I([2, labels]), 0, 0, False)


CASES: dict[tuple[str, str], tuple[Call, int]] = {
    ("recurrent layers", "lengths"): (lambda ops, n: lstm(ops, lengths=I([3, n])), 4),
    ("recurrent layers", "batch_sizes"): (lambda ops, n: lstm(ops, batch_sizes=I([3, n, 1])), 3),
    ("prepared layers", "lengths"): (lambda ops, n: prepared(ops, None, I([3, n])), 4),
    ("prepared layers", "batch_sizes"): (lambda ops, n: prepared(ops, I([3, n, 1]), None), 3),
    ("recurrent_pack", "heads"): (lambda ops, n: ops.recurrent_pack(R(12, D), 4, 4, n, 0), 4),
    ("embedding_bag", "indices"): (lambda ops, n: bag(ops, I([1, n, 2]), I([0, 1])), 5),
    ("embedding_bag", "offsets"): (lambda ops, n: bag(ops, I([1, 0, 2]), I([0, n])), 4),
    ("embedding_bag_bytes", "indices"): (
        lambda ops, n: ops.embedding_bag_bytes(ops.embedding_bag_pack_bytes(R(5, D)), I([1, n]), I([0]), None, 0), 5,
    ),
    ("embedding_bags", "features"): (
        lambda ops, n: ops.embedding_bags([R(5, D)] * 2, [n, 1], I([1, 2, 3]), I([0, 1, 2]), None, 0, -1, True), 2,
    ),
    ("embedding_bags", "num_embeddings of backward"): (lambda ops, n: bags_backward(ops, n), 2**59),
    ("attention", "lengths"): (lambda ops, n: attend(ops, q_lengths=I([6, n])), 7),
    ("attention", "cu_seqlens"): (lambda ops, n: attend(ops, cu=I([0, n, 6])), 7),
    ("attention_decode", "block_table"): (lambda ops, n: decode(ops, page=n), 4),
    ("attention_decode", "lengths"): (lambda ops, n: decode(ops, length=n), 7),
    ("multihead_attention", "heads"): (
        lambda ops, n: ops.multihead_attention_forward(R(2, 3, 24), None, n, True, None, None, 0.3, 0, 0.0, None, 0), 3,
    ),
    ("additive_attention", "lengths"): (
        lambda ops, n: ops.additive_attention_forward(R(2, 3, H), R(2, 4, H), R(2, 4, D), R(H), None, I([4, n]), None),
        5,
    ),
    ("crf", "lengths"): (lambda ops, n: chain(ops, I([3, n])), 4),
    ("crf", "tags"): (lambda ops, n: chain(ops, I([3, 3]), I([[0, 1, 2], [0, n, 1]])), K),
    ("crf_viterbi", "paths"): (lambda ops, n: ops.crf_viterbi(R(2, 3, K), R(K, K), None, None, None, None, n), 2**31),
    ("ctc_loss", "input_lengths"): (lambda ops, n: ctc(ops, steps=n), 7),
    ("ctc_loss", "target_lengths"): (lambda ops, n: ctc(ops, labels=n), 3),
    ("ctc_loss", "targets"): (lambda ops, n: ctc(ops, label=n), K),
}  # fmt: skip


def test_the_table_has_a_test_of_each_row() -> None:
    assert [(op, argument) for op, argument, *_ in table()] == list(CASES)


def test_the_named_files_exist() -> None:
    named = [part for part in (ROOT / "SECURITY.md").read_text().split("`")[1::2] if "/" in part]
    assert len(named) > 20
    for path in named:
        assert list(ROOT.glob(path.rstrip("/"))), path


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_numbers_out_of_range_raise_on_a_cpu(case: tuple[str, str]) -> None:
    call, above = CASES[case]
    for n in (above, *ANY):
        with pytest.raises((RuntimeError, IndexError), match="must"):
            call(torch.ops.seqkernels, n)


EMULATED = [(op, argument) for op, argument, _, gpu in table() if ".cu" in gpu or "as above" in gpu]


@pytest.mark.parametrize("reports", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("case", EMULATED, ids=" ".join)
def test_numbers_out_of_range_in_cuda_kernels(
    case: tuple[str, str], reports: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels skip or clamp: the emulation, which checks each access, reports none out of bounds.

    Unchecked, as on a GPU without SEQKERNELS_CHECKED, kernels of bags have no word in which to report an index.
    """
    if not reports:
        monkeypatch.setenv("SEQKERNELS_UNCHECKED", "1")
    load("_emulated")
    call, above = CASES[case]
    on_the_host = case[1] in ("features", "batch_sizes")
    for n in (above, *ANY):
        try:
            call(torch.ops.seqkernels_emulated, n)
        except (RuntimeError, IndexError) as error:
            assert reports or on_the_host, error
            assert "must" in str(error) and "out of bounds" not in str(error), error


LOADERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def test_no_pickles_are_loaded() -> None:
    found = 0
    for folder in ("seqkernels", "examples", "bench", "hub"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    modules = {a.name.partition(".")[0] for a in node.names}
                    modules |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
                    assert not modules & LOADERS, f"{path}:{node.lineno}"
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    found += 1
                    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                    assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
    assert found
