"""The section of docs/embedding_bag.md on torchrec: its code blocks run in order, in a process group of one."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

import seqkernels

DOCS = Path(__file__).parents[2] / "docs" / "embedding_bag.md"


def code_blocks() -> list[str]:
    section = DOCS.read_text().split("### Several machines: torchrec\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_the_section_has_the_blocks_that_run() -> None:
    assert [block.split()[0] for block in code_blocks()] == ["for", "tables"]


@pytest.mark.filterwarnings("ignore")
def test_tables_are_exchanged_with_torchrec(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torchrec = pytest.importorskip("torchrec", exc_type=ImportError)
        pytest.importorskip("torchrec.distributed", exc_type=ImportError)

    def tables_of(lib, **options) -> list:
        return [
            lib.EmbeddingBagConfig(num_embeddings=9, embedding_dim=4, name="t1", **{options["features"]: ["a", "b"]}),
            lib.EmbeddingBagConfig(num_embeddings=5, embedding_dim=8, name="t2", **{options["features"]: ["c"]}),
        ]

    ebc = torchrec.EmbeddingBagCollection(tables=tables_of(torchrec, features="feature_names"))
    bags = torchrec.KeyedJaggedTensor(
        keys=["a", "b", "c"],
        values=torch.tensor([1, 2, 3, 4, 0, 1, 2]),
        lengths=torch.tensor([1, 2, 0, 1, 1, 2]),
    )
    replace, load = code_blocks()
    names = {"seqkernels": seqkernels, "torchrec": torchrec, "ebc": ebc}
    want = ebc(bags).values()
    exec(replace, names)
    assert all(type(bag) is seqkernels.nn.EmbeddingBag for bag in ebc.embedding_bags.values())
    torch.testing.assert_close(ebc(bags).values(), want)

    collection = seqkernels.nn.EmbeddingBagCollection(
        tables_of(seqkernels.nn, features="features"), fused_optimizer=seqkernels.nn.FusedAdagrad()
    )
    trained = collection(bags.values(), bags.offsets())
    trained.sum().backward()
    want = collection(bags.values(), bags.offsets()).detach()
    ebc = torchrec.EmbeddingBagCollection(tables=tables_of(torchrec, features="feature_names"))
    where = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=where, rank=0, world_size=1)
    try:
        names |= {"collection": collection, "model_with_ebc": torch.nn.Sequential(ebc), "prefix": "0."}
        exec(load, names)
        found = names["model"](bags)
        torch.testing.assert_close(found.values() if hasattr(found, "values") else found.wait().values(), want)
    finally:
        torch.distributed.destroy_process_group()
