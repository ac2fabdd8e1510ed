"""Bad options and malformed data of examples/: one sentence on stderr and exit code 2, before any training.

In this process: the import of a script takes longer than its check of the input.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from support.examples import ROOT

pytest.importorskip("tokenizers")
pytest.importorskip("sacrebleu")
pytest.importorskip("sklearn")
pytest.importorskip("gymnasium")
NEWS = "".join(f'"{i % 4 + 1}","Title {i}","a text"\n' for i in range(120))
TEXT = "".join(f"This is the sentence of number {i}.\n" for i in range(400))
SIX = "one 1 2 3 4 5 6\n"
SCRIPTS = [
    "contextual_embeddings", "forecasting", "language_model", "recurrent_ppo", "tagging", "text_classification",
    "transformer", "translation",
]  # fmt: skip


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs a script with options and returns its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def run(script: str, *options: str) -> str:
        monkeypatch.setattr("sys.argv", [script, *options])
        module = importlib.import_module(script)
        with pytest.raises(SystemExit) as end:
            importlib.import_module("common").run(module.main)
        out, err = capsys.readouterr()
        assert end.value.code == 2, out + err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not list(tmp_path.glob("*.pt")), "training has started"
        return err

    return run


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_backend(script: str, fails) -> None:
    assert "argument --backend: invalid choice: 'tpu'" in fails(script, "--backend", "tpu")


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "recurrent_ppo"])
def test_missing_data(script: str, fails) -> None:
    assert ": must be a text file, got: No such file or directory" in fails(script, "--data", "missing")


@pytest.mark.parametrize(
    "script, options, message",
    [
        (
            "contextual_embeddings",
            "--size 8 --hidden 8",
            "--size: must be below --hidden 8, from which the LSTMs project",
        ),
        ("contextual_embeddings", "--sentences 9", "--sentences: must be at least 100, got 9"),
        ("language_model", "--characters 100", "--characters: must be at least 10000, got 100"),
        ("language_model", "--temperature 0", "argument --temperature: must lie in [0.01, 100], got 0"),
        ("language_model", "--top-p 1.5", "argument --top-p: must lie in [0.01, 1], got 1.5"),
        ("language_model", "--dropout x", "argument --dropout: invalid number value: 'x'"),
        ("tagging", "--sentences 3", "--sentences: must be at least 50, got 3"),
        ("text_classification", "--patience -1", "argument --patience: must lie in [0, 1e+09], got -1"),
        ("text_classification", "--clip nan", "argument --clip: must lie in [0, 1e+09], got nan"),
        ("text_classification", "--model lstm-attention --hidden 6", "--hidden: must give a multiple of the 4 heads"),
        ("transformer", "--dropout 2", "argument --dropout: must lie in [0, 1], got 2"),
        ("translation", "--smoothing -0.1", "argument --smoothing: must lie in [0, 1], got -0.1"),
        ("translation", "--limit 36000", "--limit: must be at most 35524 without --data, got 36000"),
        ("translation", "--lr inf", "--lr: must be above 0, got inf"),
    ],
)
def test_options(script: str, options: str, message: str, fails) -> None:
    assert message in fails(script, *options.split())


@pytest.mark.parametrize(
    "script, options, content, message",
    [
        ("text_classification", "", '"1","a\nb","c"\n"5","d","e"\n', 'file: line 3 must be "class 1-4"'),
        ("text_classification", "", '"1","a","b"\n\n', 'file: line 2 must be "class 1-4"'),
        ("text_classification", "", '"1","a","b"\n' * 99, "file: must hold at least 100 texts, got 1"),
        ("text_classification", "", f'"1","a","{200_000 * "b"}"\n', "file: line 1 must be CSV, got: field larger"),
        ("text_classification", "--neighbours zebra", NEWS, "--neighbours, --analogy: zebra must be in the vocabulary"),
        ("contextual_embeddings", "", "two words.\n" * 200, "file: must hold at least 100 sentences of 4 words, got 0"),
        ("language_model", "", "short", "file: must hold at least 10000 characters, got 5"),
        ("language_model", "--batch 9000", TEXT, "--batch: must be at most half of the"),
        ("tagging", "", "a O\n\n" * 3, "file: must hold at least 50 sentences, got 3"),
        ("forecasting", "", "1,2\n3,nan\n", "file: line 2 must hold 2 finite numbers, got '3,nan'"),
        ("forecasting", "", f"1,{'2' * 200_000}\n", "file: line 1 must be CSV, got: field larger"),
        ("forecasting", "", "", "file: must hold at least 1344 rows of hours, got 0"),
    ],
)
def test_data(script: str, options: str, content: str, message: str, fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(content)
    assert message in fails(script, "--data", "file", *options.split())


@pytest.mark.parametrize("script", ["contextual_embeddings", "language_model", "tagging", "text_classification"])
def test_data_of_another_encoding(script: str, fails, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"first\nsecond \xe9\n")
    assert "file: line 2 must be UTF-8, got byte 0xe9" in fails(script, "--data", "file")


@pytest.mark.filterwarnings("ignore:unclosed file")  # gensim reads GloVe twice and closes it once
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("v.txt", SIX + "two 1 2 3 4 5\n", "v.txt: line 2 must be a word and 6 numbers, got 5 after 'two'"),
        ("v.txt", SIX + "two 1 2 3 4 5 six\n", "line 2 must be a word and 6 numbers, got: could not convert string"),
        ("v.vec", "2 6\n" + SIX + "two 1 2\n", "v.vec: line 3 must be a word and 6 numbers, got 2 after 'two'"),
        ("v.bin", "3 6\none 123", "v.bin: must hold vectors of words, got: unexpected end of input"),
        ("v.txt", SIX + "two 1 2 nan 4 5 6\n", "v.txt: the vector of 'two' must be finite"),
        ("v.txt", "", "v.txt: must hold vectors of words"),
        ("missing.bin", None, "missing.bin: must be a file of vectors, got: No such file or directory"),
    ],
)
def test_vectors(name: str, content: str | None, message: str, fails, tmp_path: Path) -> None:
    pytest.importorskip("gensim")
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in fails("text_classification", "--vectors", name)


def write_pairs(folder: Path) -> None:
    for part in ("train", "val", "test_2016_flickr"):
        (folder / f"{part}.de").write_text("Ein Hund läuft.\nZwei Hunde.\n" * 8)
        (folder / f"{part}.en").write_text("A dog runs.\nTwo dogs.\n" * 8)


def test_pairs(fails, tmp_path: Path) -> None:
    write_pairs(tmp_path)
    (tmp_path / "test_2016_flickr.de").write_text("Ein Hund läuft.\nViele Hunde sehen einen Hund.\n" * 8)
    longest = ["--data", ".", "--longest", "12"]
    assert "--longest: must be at least" in fails("transformer", *longest)
    (tmp_path / "val.en").write_bytes(b"A dog runs.\r\n\r\n" * 8)
    assert "val.en: line 2 must hold a sentence, got an empty line" in fails("transformer", *longest)
    (tmp_path / "val.en").write_text("A dog runs.\n")
    assert "val.en: line 2 must be the translation of that of val.de, got no line" in fails("transformer", *longest)
