"""examples/text_classification.py with small settings."""

from __future__ import annotations

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest
import torch

from support.examples import (
    ROOT,
    Result,
    check_fails,
    check_resumes,
    check_trained,
    check_two_processes,
    losses,
    run,
    run_with_torchrun,
)

pytest.importorskip("tokenizers")
pytest.importorskip("sklearn")
SCRIPT, EPOCHS = "text_classification", 2
SMALL = ["--data", "news.csv", "--hidden", "8", "--embedding", "8", "--batch", "16", "--lr", "0.01"]
TOPICS = [
    ["country", "president", "border", "treaty"],
    ["team", "match", "goal", "season"],
    ["market", "stock", "price", "company"],
    ["planet", "cell", "theory", "energy"],
]


def write_news(folder: Path) -> None:
    draw = random.Random(0)
    lines = []
    for i in range(160):
        words = draw.choices([*TOPICS[i % 4], "with", "about", "after"], k=draw.randrange(3, 12))
        lines.append(f'"{i % 4 + 1}","Title {i}","{" ".join(words)}"')
    (folder / "news.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp(SCRIPT)
    write_news(folder)
    return folder, run(SCRIPT, folder, *SMALL, "--epochs", str(EPOCHS), "--neighbours", "team")


def test_backends_train_alike(trained) -> None:
    folder, result = trained
    check_trained(SCRIPT, folder, result)
    assert "largest class: 25.0%" in result.stdout and "  team: " in result.stdout


def test_two_processes_have_the_losses_of_one(trained, tmp_path: Path) -> None:
    write_news(tmp_path)
    want = losses(trained[0] / f"{SCRIPT}.pt")
    check_two_processes(SCRIPT, tmp_path, *SMALL, "--epochs", str(EPOCHS), want=want, start=run_with_torchrun)


def test_resume_of_a_bag_with_vectors(tmp_path: Path) -> None:
    """GloVe text: a word and its vector on each line."""
    pytest.importorskip("gensim")
    write_news(tmp_path)
    draw = random.Random(1)
    words = sorted(word for topic in TOPICS for word in topic)
    vectors = "\n".join(f"{word} {' '.join(f'{draw.gauss(0, 1):.3f}' for _ in range(6))}" for word in words)
    (tmp_path / "glove.txt").write_text(vectors + "\n")
    options = [*SMALL, "--model", "bag", "--vectors", "glove.txt", "--analogy", "team", "goal", "market", "--plateau"]
    result = run(SCRIPT, tmp_path, *options, "--epochs", str(EPOCHS))
    check_trained(SCRIPT, tmp_path, result)
    assert f"vectors: {len(words)} of" in result.stdout and "  team : goal = market : " in result.stdout
    want = losses(tmp_path / f"{SCRIPT}.pt")
    check_resumes(SCRIPT, tmp_path, *options, epochs=EPOCHS, want=want)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(SCRIPT)


@pytest.mark.filterwarnings("ignore:unclosed file")  # gensim reads GloVe twice and closes it once
@pytest.mark.parametrize("name", ["glove.txt", "word2vec.txt", "word2vec.bin", "fasttext.vec", "fasttext.bin"])
def test_formats_of_vectors(name: str, script: ModuleType, tmp_path: Path) -> None:
    """The vectors of known words, and for those of character n-grams also of others."""
    pytest.importorskip("gensim")
    from gensim.models import FastText, KeyedVectors
    from gensim.models.fasttext import save_facebook_model

    words = [f"{word}{i}" for i in range(4) for word in ("team", "goal")]
    if name == "fasttext.bin":
        model = FastText([words], vector_size=6, min_count=1, epochs=1, bucket=50, workers=1)
        save_facebook_model(model, str(tmp_path / name))
        vectors = model.wv
    else:
        vectors = KeyedVectors(6)
        vectors.add_vectors(words, torch.randn(len(words), 6).numpy())
        binary, header = name.endswith(".bin"), name != "glove.txt"
        vectors.save_word2vec_format(str(tmp_path / name), binary=binary, write_header=header)
    tokens = ["[PAD]", "[UNK]", *words, "unknown"]
    table = script.table_of(script.read_vectors(tmp_path / name), tokens, seed=0)
    assert table.shape == (len(tokens), 6) and not table[0].any()
    known = tokens[2:] if name == "fasttext.bin" else words
    for i, word in enumerate(known, start=2):
        torch.testing.assert_close(table[i], torch.from_numpy(vectors[word].copy()))


@pytest.mark.parametrize(
    "model",
    [
        ["rnn", "--no-packed"],
        ["gru-pooling", "--bidirectional", "--layers", "2", "--orthogonal"],
        ["lstm-attention", "--patience", "1"],
    ],
    ids=lambda model: model[0],
)
def test_models(
    model: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """In this process: a new one takes longer to import than to train."""
    write_news(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr("sys.argv", [SCRIPT, *SMALL, "--epochs", "2", "--model", *model])
    code = importlib.import_module(SCRIPT).main()
    check_trained(SCRIPT, tmp_path, Result(code, *capsys.readouterr()))


def test_bad_data(tmp_path: Path) -> None:
    (tmp_path / "news.csv").write_text('"1","title","text"\n"5","title","text"\n')
    message = 'news.csv: line 2 must be "class 1-4","title","description"'
    check_fails(SCRIPT, tmp_path, *SMALL, message=message)
