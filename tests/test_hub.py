"""The kernel repository of the Hugging Face Hub, written by hub/layout.py and loaded by `kernels`."""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from support.python import output

ROOT = pathlib.Path(__file__).parents[1]
REPOSITORY = ROOT / "build" / "hub"


@functools.cache
def layout() -> Any:
    """hub/layout.py as a module."""
    spec = importlib.util.spec_from_file_location("layout", ROOT / "hub" / "layout.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository() -> pathlib.Path:
    if not (ROOT / "hub").exists():
        pytest.skip("hub/layout.py is not in this copy of the tests")
    pytest.importorskip("kernels")
    current = layout().identifier("seqkernels", "cpu")
    metadata = next(iter(REPOSITORY.glob("build/*/metadata.json")), None)
    if metadata is None or current not in metadata.read_text():
        pytest.skip("build/hub is missing or older than the sources; `make hub` writes it")
    return REPOSITORY


LOAD = """
import pathlib, sys, torch, kernels
repository = pathlib.Path(sys.argv[1])
hub = kernels.get_local_kernel(repository)
"""


def loaded(repository: pathlib.Path, code: str, *arguments: str) -> str:
    return output(LOAD + code, str(repository), *arguments)


def test_kernels_loads_the_repository(repository: pathlib.Path) -> None:
    printed = loaded(
        repository,
        """
x = torch.randn(7, 3, 5, requires_grad=True)
theirs = torch.nn.LSTM(5, 6, 2, bidirectional=True)
ours = hub.nn.LSTM(5, 6, 2, bidirectional=True)
ours.load_state_dict(theirs.state_dict())
torch.testing.assert_close(ours(x), theirs(x))
for name in hub.__all__:
    getattr(hub, name)
assert "layers" in hub.__all__
assert "seqkernels" not in sys.modules
print(hub.__name__, hub.seqkernels._C.namespace)
""",
    )
    name, namespace = printed.split()
    assert name == namespace == layout().identifier("seqkernels", "cpu")


def test_all_modules_of_the_repository_import_relatively(repository: pathlib.Path) -> None:
    printed = loaded(
        repository,
        """
import importlib, pkgutil
import seqkernels  # the installed package, beside the repository
installed = set(sys.modules)
count = 0
for found in pkgutil.walk_packages(hub.seqkernels.__path__, hub.seqkernels.__name__ + "."):
    try:
        importlib.import_module(found.name)
        count += 1
    except ImportError as error:
        assert ".integrations." in found.name or ".triton" in found.name, (found.name, error)
print(count)
print([name for name in set(sys.modules) - installed if name.startswith("seqkernels")])
assert hub.nn.LSTM is not seqkernels.nn.LSTM
x, layer = torch.randn(3, 2, 4), seqkernels.nn.GRU(4, 4)
copy = hub.nn.GRU(4, 4)
copy.load_state_dict(layer.state_dict())
assert torch.equal(layer(x)[0], copy(x)[0])
""",
    )
    count, mixed = printed.splitlines()
    assert int(count) > 50
    assert mixed == "[]"


def test_repository_passes_the_checks_of_the_hub(repository: pathlib.Path) -> None:
    from kernels import _rust

    assert [str(backend).lower() for backend in _rust.Build.open(repository).general.backends] == ["cpu"]
    (variant,) = (repository / "build").iterdir()
    metadata = _rust.Metadata.read_from_file(variant / "metadata.json")
    assert metadata.version == 1 and metadata.license == "BSD-3-Clause"
    digests = metadata.digest.files
    assert len(digests) > 60 and "metadata.json" not in digests
    assert layout().digests_of(variant) == digests


LAYERS = {
    "LSTM": "torch.nn.LSTM(5, 6, 2, bidirectional=True, dropout=0.0)",
    "GRU": "torch.nn.GRU(5, 6, batch_first=True, bias=False)",
    "RNN": "torch.nn.RNN(5, 6, nonlinearity='relu')",
    "LSTMCell": "torch.nn.LSTMCell(5, 6)",
    "GRUCell": "torch.nn.GRUCell(5, 6)",
    "RNNCell": "torch.nn.RNNCell(5, 6)",
    "Embedding": "torch.nn.Embedding(9, 4, padding_idx=2)",
    "EmbeddingBag": "torch.nn.EmbeddingBag(9, 4, mode='max')",
}

KERNELIZE = """
import copy, traceback
from kernels import LocalLayerRepository, Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
from torch.nn.utils.rnn import pack_sequence

def check(name, theirs):
    replace_kernel_forward_from_hub(type(theirs), name)
    mapping = {name: {"cpu": LocalLayerRepository(repo_path=repository, layer_name=name)}}
    torch.manual_seed(0)
    ours = copy.deepcopy(theirs)
    with use_kernel_mapping(mapping):
        mode = Mode.TRAINING if isinstance(theirs, torch.nn.RNNBase) else Mode.TRAINING | Mode.TORCH_COMPILE
        ours = kernelize(ours, mode=mode, device="cpu", use_fallback=False)
    assert ours.forward.__func__ is getattr(hub.layers, name).forward
    inputs = []
    if name.startswith("Embedding"):
        inputs.append((torch.randint(9, (4, 3)),))
    elif name.endswith("Cell"):
        inputs.append((torch.randn(3, 5),))
        state = torch.randn(3, 6)
        inputs.append((torch.randn(3, 5), (state, state) if name == "LSTMCell" else state))
    else:
        inputs.append((torch.randn(4, 3, 5),))
        inputs.append((torch.randn(4, 5),))
        inputs.append((pack_sequence([torch.randn(n, 5) for n in (2, 4, 3)], enforce_sorted=False),))
        layers = theirs.num_layers * (1 + theirs.bidirectional)
        states = tuple(torch.randn(layers, 3, 6) for _ in range(2))
        inputs.append((inputs[-1][0], states if name == "LSTM" else states[0]))
    leaves = torch.utils._pytree.tree_leaves
    for given in inputs:
        wanted, got = theirs(*given), ours(*given)
        assert type(got) is type(wanted)
        tensors = [[t for t in leaves(tuple(of)) if t.is_floating_point()] if isinstance(of, tuple) else [of]
                   for of in (wanted, got)]
        torch.testing.assert_close(tensors[1], tensors[0])
        grads = [torch.autograd.grad(sum(t.square().sum() for t in of), list(module.parameters()))
                 for of, module in zip(tensors, (theirs, ours))]
        torch.testing.assert_close(grads[1], grads[0])
    if Mode.TORCH_COMPILE in mode:
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*inputs[0]), theirs(*inputs[0]))

print("{")
for name, module in eval(sys.argv[2]).items():
    try:
        check(name, eval(module))
        print(f"{name!r}: 'equal',")
    except Exception:
        print(f"{name!r}: {traceback.format_exc()!r},")
print("}")
"""


@pytest.fixture(scope="module")
def kernelized(repository: pathlib.Path) -> dict[str, str]:
    """For each layer, "equal" or a traceback; of one process, since the imports take most of the time."""
    return ast.literal_eval(loaded(repository, KERNELIZE, repr(LAYERS)))


@pytest.mark.parametrize("name", LAYERS)
def test_layers_replace_the_forward_methods_of_torch(kernelized: dict[str, str], name: str) -> None:
    assert kernelized[name] == "equal", kernelized[name]


def test_all_layers_are_tested() -> None:
    from seqkernels.integrations import kernels

    assert set(LAYERS) == set(kernels.__all__)


def test_layout_refuses_folders_that_it_has_not_written(tmp_path: pathlib.Path) -> None:
    if not (ROOT / "hub").exists():
        pytest.skip("hub/layout.py is not in this copy of the tests")
    (tmp_path / "thesis.txt").write_text("precious")
    result = subprocess.run(
        [sys.executable, ROOT / "hub" / "layout.py", tmp_path], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 1
    assert f"{tmp_path} must be a folder that this script has written, or absent" in result.stderr
    assert (tmp_path / "thesis.txt").read_text() == "precious"
