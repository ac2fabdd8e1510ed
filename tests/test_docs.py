"""The code of README and docs runs, and their figures are those of the committed results."""

from __future__ import annotations

import importlib
import importlib.util
import re
import socket
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)")
NEEDS = {
    "docs/onnx.md": ("onnx", "onnxscript"),
    "docs/attention.md": ("transformers",),
    "docs/recurrent.md": ("triton",),
    "docs/reinforcement_learning.md": ("sb3_contrib", "torchrl"),
}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[tuple[int, str]]:
    """The line and the code of each block of Python; blocks of torchrec run in tests/embedding_bag/test_torchrec.py."""
    text = page.read_text(encoding="utf-8")
    start = text.find("### Several machines: torchrec")
    end = text.find("\n## ", start)
    return [(text.count("\n", 0, m.start(1)), m[1]) for m in BLOCK.finditer(text) if not start <= m.start() < end]


def figures() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        return importlib.import_module("figures")


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch):
    """The environment of torchrun with one process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=port).items():
        monkeypatch.setenv(name, str(value))
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=name_of)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None) -> None:
    """The blocks of a page run one after the other, in an empty folder."""
    missing = [name for name in NEEDS.get(name_of(page), ()) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, code in blocks(page):
        exec(compile("\n" * line + code, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links(page: Path) -> None:
    """Links within the repository lead to files, and to headings of pages."""
    for target, heading in LINK.findall(
        re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    ):
        path = page.parent / target if target else page
        assert path.exists(), f"{name_of(page)}: {target}"
        if heading:
            text = path.read_text(encoding="utf-8")
            names = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.M)]
            assert heading in names, f"{name_of(page)}: {target}#{heading}"


# ---- figures


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


def test_figures_of_readme() -> None:
    """Its ratios, in order, are those of the committed results."""
    of = figures()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    expected = [
        of.SPEEDUPS["LSTM, packed, training, T=400"],
        of.SPEEDUPS["LSTM, packed, training, T=1600"],
        of.Figure(
            of.H200, "bfloat16, forward, on CUDA, kernels of a4358e7", "LSTM, B=64 I=H=512 T=256", "cuDNN, bfloat16"
        ),
    ]
    assert re.findall(r"\b\d+(?:\.\d+)?x\b", readme) == [str(figure) for figure in expected]


def rounds_to(value: float, text: str) -> bool:
    unit = 10.0 ** -len(text.partition(".")[2])
    return abs(value - float(text)) <= 0.51 * unit


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_figures_of_performance(name: str) -> None:
    """The ratios of packed training on the page are those of the committed results."""
    of = figures()
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    if name == "LSTM":
        rows = re.findall(r"^\| (B=\d+ I=\S+(?: H=\d+)? T=\d+) \| (.*?) ms \| \d+ \| (\S+)x \| (\S+)x \|$", page, re.M)
        assert len(rows) == 6
        for label, ours, packed, padded in rows:
            row = of.Figure(of.EPYC, f"LSTM {of.PACKED}", label, "torch packed").row
            shown = [row.entries[0].median * 1e3, *(e.ratio for e in row.entries[1:3])]
            for text, value in zip((ours, packed, padded), shown, strict=True):
                assert rounds_to(value, text), label
    else:
        text = re.search(r"GRU training, lengths between T/4 and T.*?\| ([\d.]+)x / ([\d.]+)x / ([\d.]+)x \|", page)
        assert text is not None
        for shown, T in zip(text.groups(), (100, 400, 1600), strict=True):
            ratio = of.Figure(of.XEON, f"GRU {of.PACKED}", f"B=8 I=H=256 T={T}", "torch packed").entry.ratio
            assert rounds_to(ratio, shown)
