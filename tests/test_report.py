"""`make report` and `make bench-gate` without measuring: the page of small results, old files, counts of callgrind."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def module(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        return importlib.import_module(name)


report, page, gate, harness, sweeps = (module(name) for name in ("report", "page", "gate", "harness", "sweeps"))


def row(T: int, ours: float, torch: float, *, threads: int = 2, which: str = "forward", **fields: object):
    """A row of an LSTM with three rounds."""
    values = [[ours * s for s in (0.9, 1.0, 1.2)], [torch * s for s in (0.9, 1.0, 1.2)]]
    entries = report.summarise(["ours", "torch"], values, {}, {})
    sizes = {"T": T, "B": 4}
    given = dict(operator="LSTM", which=which, sizes=sizes, threads=threads, other_load=0.01) | fields
    return report.Row(f"LSTM, {which}", f"T={T} B=4", entries, work=1e6 * T, rounds=3, **given)


def a_run(*rows: object, **fields: object):
    roofs = {"flop": report.Roof(1e11, "torch.mm"), "flop, 1 thread": report.Roof(5e10, "torch.mm")}
    given = dict(date="2026-01-02 03:04 UTC", device="A CPU", threads=2, versions={"torch": "2.13.0"}, roofs=roofs)
    given |= dict(other_load=0.02, commit="0123456789ab", command="make report", rows=list(rows))
    return report.Run(**{**given, **fields})


# ---- results


def test_quartiles_are_values_of_the_rounds() -> None:
    ours, theirs = report.summarise(["ours", "torch"], [[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 4.0, 6.0, 8.0, 20.0]], {}, {})
    assert (ours.median, ours.quartiles) == (3.0, (2.0, 4.0))
    assert (theirs.ratio, theirs.ratio_quartiles) == (2.0, (2.0, 2.0))


def test_results_keep_sizes_threads_and_commit() -> None:
    run = a_run(row(8, 1e-3, 2e-3, threads=1))
    again = report.from_json(report.to_json(run))
    assert report.to_json(again) == report.to_json(run)
    assert (again.rows[0].sizes, again.rows[0].threads) == ({"T": 8, "B": 4}, 1)
    assert "commit 0123456789ab" in report.text(again) and "share with 1 thread: of 50.0 GFLOP/s" in report.text(again)


@pytest.mark.parametrize("file", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_saved_results_load(file: Path) -> None:
    """Files from before rows had sizes, threads and quartiles."""
    (run,) = page.read([str(file)])
    items = page.items_of([run])
    assert len(items) == len(run.rows) > 0
    assert not {item.operator for item in items} & {"other"}
    assert any(item.peers for item in items)


def test_share_is_that_of_the_same_number_of_threads() -> None:
    run = a_run(row(8, 1e-3, 2e-3), row(8, 1e-3, 2e-3, threads=1), row(8, 1e-3, 2e-3, work_unit="byte"))
    two, one, unknown = page.items_of([run])
    assert (two.share, one.share) == pytest.approx((0.08, 0.16))
    assert math.isnan(unknown.share)


# ---- curves


def test_curves_vary_one_size() -> None:
    rows = [row(T, 1e-3 * T, 2e-3 * T) for T in (64, 8, 256)]
    other = row(64, 1e-3, 2e-3, sizes={"T": 64, "B": 16})
    smallest = row(1, 1e-6, 2e-6)
    smallest.group += ", " + page.SMALLEST
    items = page.items_of([a_run(*rows, other, smallest)])
    assert [i.row.sizes["T"] for i in page.curves(items, "T")] == [8, 64, 256]
    assert [i.row.sizes["B"] for i in page.curves(items, "B")] == [4, 16]
    assert page.curves(items[:1], "T") == []


# ---- the page


class Parsed(HTMLParser):
    """Checks that elements are closed, and collects text, sources and identifiers."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.links: set[str] = set()
        self.ids: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.ids |= {of["id"] or ""} if "id" in of else set()
        self.links |= {of["href"] or ""} if "href" in of else set()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Parsed, Path]:
    """The page of a run with a noisy row, a slower one, a refused peer, NaN, one point of a size, and memory."""
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    noisy = row(64, 8e-3, 4e-3, other_load=0.5)
    refused = row(256, 4e-2, 9e-2)
    refused.entries.append(report.Entry("onnxruntime", refused="not installed: <onnx>"))
    nan = row(8, 1e-3, 2e-3, which="training")
    nan.entries[1].ratio = math.nan
    smallest = row(1, 2e-6, 5e-6, threads=1)
    smallest.group += ", " + page.SMALLEST
    memory = row(64, 30.0, 60.0, which="training", unit="MiB")
    memory.work = 0.0
    alone = row(8, 1e-3, 3e-3, operator="beam & search")
    rows = [row(8, 1e-3, 2e-3), noisy, refused, nan, smallest, memory, alone]
    rows += [row(T, 2e-3 * T, 3e-3 * T, threads=1) for T in (8, 64, 256)]
    folder = tmp_path_factory.mktemp("report")
    path = page.write([a_run(*rows)], folder)
    text = path.read_text(encoding="utf-8")
    return text, Parsed(text), folder


def test_page_is_self_contained(made: tuple[str, Parsed, Path]) -> None:
    text, parsed, folder = made
    assert parsed.sources and all(source.startswith("data:image/png;base64,") for source in parsed.sources)
    assert not re.search(r"https?://|<link|@import|url\(", text)
    assert parsed.links <= {f"#{name}" for name in parsed.ids}
    assert {p.name for p in folder.glob("*.png")} == {
        "speedups.png", "shares.png", "threads.png", "overhead.png", "memory.png", "lstm-forward-t.png",
    }  # fmt: skip
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))


def test_page_names_its_conditions(made: tuple[str, Parsed, Path]) -> None:
    words = " ".join(made[1].words)
    for part in ("make report", "A CPU, 2 threads", "2026-01-02 03:04 UTC", "0123456789ab", "torch 2.13.0"):
        assert part in words
    assert (
        "other processes used 2% of a processor before the first row; 1 of 10 rows ran beside busy processes" in words
    )


def test_page_marks_slower_noisy_and_refused_rows(made: tuple[str, Parsed, Path]) -> None:
    text, parsed, _ = made
    assert 'class="slower">0.50x slower<' in text
    assert "noisy, others 50%" in parsed.words
    assert "refused: not installed: <onnx>" in " ".join(parsed.words)
    assert "nan" not in " ".join(parsed.words).lower().split()
    assert "Slower than a peer, or with more memory, in 1 of 9 rows." in parsed.words


def test_noisy_and_quick_runs_have_a_banner(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    text = page.page([a_run(row(8, 1e-3, 2e-3), other_load=0.9, quick=True)], tmp_path)
    assert "Quick run: few rounds" in text and "Noisy machine: other processes used 90%" in text


def test_page_of_several_machines(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
    other = a_run(row(8, 1e-3, 2e-3), device="A GPU", other_load=math.nan)
    parsed = Parsed(page.page([a_run(row(8, 1e-3, 3e-3)), other], tmp_path))
    assert {"lstm-a-cpu", "lstm-a-gpu"} <= parsed.ids
    assert "the load of other processes before the first row is unknown" in parsed.words


def test_summary_counts_slower_rows() -> None:
    items = page.items_of([a_run(row(8, 1.0, 2.0), row(16, 1.0, 0.5), row(32, 1.0, 4.0))])
    spread = page.spreads(items)["LSTM", "forward", "torch"]
    assert (spread.median, spread.least, spread.most, spread.rows, spread.slower) == (2.0, 0.5, 4.0, 3, 1)


def test_our_other_variants_are_no_peers() -> None:
    mine = row(8, 1.0, 2.0)
    mine.entries += [report.Entry(name, 1.0, ratio=1.0) for name in ("(ours, padded)", "seqkernels.nn", "1 µs a step")]
    (item,) = page.items_of([a_run(mine)])
    assert [entry.name for entry in item.peers] == ["torch"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read RESULTS .*: No such file or directory"),
        ("# not JSON", "RESULTS must be a file that make bench or make report saved, got "),
        ("[1]", "RESULTS must be a file that make bench or make report saved, got "),
        ('{"rows": [{}]}', "RESULTS must be a file that make bench or make report saved, got "),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        page.main(["--results", str(path)])


def test_results_without_rows(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    report.write(path, report.to_json(a_run()))
    with pytest.raises(SystemExit, match="has no rows"):
        page.main(["--results", str(path)])


def test_measurement_without_rows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """pytest exits with 5 if no row matches."""
    monkeypatch.setattr(page.sys, "executable", "false")
    assert page.main(["-k", "nothing_of_that_name"]) == 1
    assert "no rows were measured" in capsys.readouterr().err


# ---- the rows of make report


def test_sizes_of_operators_include_their_base() -> None:
    assert len(sweeps.OPERATORS) == 24
    for operator in sweeps.OPERATORS.values():
        assert all(operator.base[name] in values for name, values in operator.along.items()), operator
        points = [tuple(point.items()) for point in operator.points()]
        assert len(points) == len(set(points)) == 1 + sum(len(values) - 1 for values in operator.along.values())


@pytest.mark.filterwarnings("ignore")  # of other libraries
@pytest.mark.parametrize("operator", sweeps.OPERATORS.values(), ids=str)
def test_contenders_of_operators_agree(operator: Any) -> None:
    """At the smallest sizes; with the parity of the rows that are timed."""
    if operator.name.startswith("CRF"):
        pytest.importorskip("torchcrf", reason="pytorch-crf is not installed")
    sizes = dict(operator.smallest or operator.base)
    for which in operator.passes:
        contenders = operator.contenders(sizes, which)
        assert len(contenders) > 1
        seconds = harness.check_parity(operator.parity(contenders, sizes, which), operator.tolerance)
        assert contenders[0].name in seconds
        assert operator.work(sizes, which) > 0


def test_step_of_a_memory_row() -> None:
    case = sweeps.memory_case("EmbeddingBag, sum", 0, {"E": 100, "D": 8, "B": 2, "L": 3})
    case.warm()
    case.step()


# ---- progress


def test_rows_share_the_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    conftest = importlib.util.spec_from_file_location("bench_conftest", ROOT / "bench" / "conftest.py")
    assert conftest is not None and conftest.loader is not None
    found = importlib.util.module_from_spec(conftest)
    monkeypatch.setitem(sys.modules, "bench_conftest", found)
    conftest.loader.exec_module(found)
    now = [0.0]
    monkeypatch.setattr(found.time, "perf_counter", lambda: now[0])
    progress = found.Progress(rows=10, minutes=1.0, started=0.0)
    assert progress.budget() == pytest.approx(6.0 - 0.7)
    progress.done, progress.measured, now[0] = 4, 20.0, 24.0  # a second for each row besides its timing
    assert progress.budget() == pytest.approx(36 / 6 - 1)
    assert str(progress) == "[5/10, about 0:24 left]"
    now[0] = 59.0
    assert progress.budget() == 0.3


# ---- counts


DUMP = """\
# callgrind format
version: 1
desc: Trigger: Client Request: ["LSTM", 2]
positions: line
events: Ir

ob=/usr/lib/libc.so.6
fl=???
fn=memcpy
0 1000

ob=/site/seqkernels/_C.abi3.so
fl=a.cpp
fn=forward
10 30
+1 12
* 8
cob=/usr/lib/libc.so.6
cfn=memcpy
calls=1 0
12 1000
13

ob=/site/torch/_C.abi3.so.other
fn=other
1 7
"""


def test_instructions_of_the_module_alone() -> None:
    """Neither those of other objects, nor those of callees, which follow `calls=`."""
    assert gate.name_of(DUMP) == ("LSTM", 2)
    assert gate.count_in(DUMP) == 50
    assert gate.count_in(DUMP, "libc.so.6") == 1000
    assert gate.name_of("desc: Trigger: Program termination\n") is None


BUILD = {"version": "0.1.0", "torch": "2.13.0", "compiler": "12.2.0", "isa": "avx2", "valgrind": "3.19.0"}
SAVED = {"date": "2026-01-02", "build": BUILD, "counts": {"LSTM": 1000, "CRF": 2000}}


def changes(found: dict[str, int], **build: str) -> dict[str, tuple[bool, str]]:
    return {c.name: (c.fails, str(c)) for c in gate.compare(SAVED, found, BUILD | build)}


def test_counts_within_three_percent_pass() -> None:
    found = changes({"LSTM": 1030, "CRF": 1500})
    assert not found["LSTM"][0] and not found["CRF"][0]
    assert "+3.00%" in found["LSTM"][1] and "--update records it" in found["CRF"][1]


def test_counts_beyond_three_percent_fail() -> None:
    found = changes({"LSTM": 1031, "CRF": 2000})
    assert found["LSTM"][0] and not found["CRF"][0]
    assert re.search(r"LSTM +1,000 +1,031 +\+3\.10%  FAILS", found["LSTM"][1])


def test_new_and_missing_calls_fail() -> None:
    found = changes({"LSTM": 1000, "GRU": 10})
    assert found["GRU"][0] and "not in the table" in found["GRU"][1]
    assert found["CRF"][0] and "no such call" in found["CRF"][1]


def test_counts_of_other_builds_are_not_compared() -> None:
    with pytest.raises(gate.Unusable, match=r"compiler 12\.2\.0 in the table, 13\.1\.0 here.*--update"):
        changes({"LSTM": 1000}, compiler="13.1.0")
    assert changes({"LSTM": 1000, "CRF": 2000}, torch="2.14.0")


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """Simulated counts, and a table in an empty folder."""
    found: dict[str, int] = {"LSTM": 1000, "CRF": 2000}
    monkeypatch.setattr(gate, "TABLE", tmp_path / "gate.json")
    monkeypatch.setattr(gate, "counts", lambda only: ({k: v for k, v in found.items() if only in k}, BUILD))
    return found


def test_update_writes_the_table_that_the_gate_reads(
    counted: dict[str, int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate.main([]) == 2 and "does not exist; write it with" in capsys.readouterr().err
    assert gate.main(["--update"]) == 0 and gate.main([]) == 0
    counted["CRF"] = 2100
    assert gate.main([]) == 1
    assert "1 of 2 calls fail" in capsys.readouterr().out
    assert gate.main(["--only", "LSTM"]) == 0
    assert gate.main(["--only", "LSTM", "--update"]) == 0
    assert json.loads(gate.TABLE.read_text())["counts"] == {"LSTM": 1000, "CRF": 2000}
    assert gate.main(["--only", "nothing"]) == 2


def test_damaged_table(counted: dict[str, int], capsys: pytest.CaptureFixture[str]) -> None:
    gate.TABLE.write_text("{}")
    assert gate.main([]) == 2 and "is not a table of counts" in capsys.readouterr().err


def test_valgrind_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gate.shutil, "which", lambda name: None)
    monkeypatch.setattr(gate, "read", lambda path: SAVED)
    assert gate.main([]) == 2
    assert "valgrind is not installed; install it" in capsys.readouterr().err


def test_committed_table_has_the_calls_of_the_gate() -> None:
    table = gate.read(gate.TABLE)
    text = (ROOT / "bench" / "gate.py").read_text(encoding="utf-8")
    assert all(count > 0 for count in table["counts"].values())
    assert len(table["counts"]) == 15 and text.count("    yield ") == 13  # two of them for sum and max
