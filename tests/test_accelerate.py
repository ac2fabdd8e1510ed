"""accelerate and restore: the modules of torch.nn in a model, replaced in place and back."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations, prune

import seqkernels
from seqkernels.accelerate import Report, accelerate, restore
from support.workers import run_workers

B, T, D, H, V = 3, 6, 8, 4, 11
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore:.*nested tensors.*")

MODULES: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: nn.LSTM(D, H, 2, bidirectional=True),
    "LSTM with projection": lambda: nn.LSTM(D, H, 2, batch_first=True, bidirectional=True, proj_size=3),
    "LSTM without bias": lambda: nn.LSTM(D, H, bias=False),
    "GRU": lambda: nn.GRU(D, H, 2),
    "RNN": lambda: nn.RNN(D, H),
    "RNN of relu": lambda: nn.RNN(D, H, nonlinearity="relu"),
    "LSTMCell": lambda: nn.LSTMCell(D, H),
    "GRUCell": lambda: nn.GRUCell(D, H, bias=False),
    "RNNCell": lambda: nn.RNNCell(D, H, nonlinearity="relu"),
    "Embedding": lambda: nn.Embedding(V, D, padding_idx=1),
    "Embedding with max_norm": lambda: nn.Embedding(V, D, max_norm=0.5),
    "EmbeddingBag": lambda: nn.EmbeddingBag(V, D, mode="max"),
    "MultiheadAttention": lambda: nn.MultiheadAttention(D, 2),
    "MultiheadAttention with bias_kv": lambda: nn.MultiheadAttention(D, 2, add_bias_kv=True, kdim=D, vdim=D),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(D, 2, 16, 0.0, norm_first=True),
    "TransformerDecoderLayer": lambda: nn.TransformerDecoderLayer(D, 2, 16, 0.0, activation="gelu"),
    "Transformer": lambda: nn.Transformer(D, 2, 2, 2, 16, 0.0, batch_first=True),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def inputs(name: str, seed: int = 1) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    x, indices = torch.randn(T, B, D), torch.randint(V, (B, T))
    if name.startswith("Embedding"):
        return (indices,)
    if "Cell" in name:
        return (x[0],)
    if name.startswith("MultiheadAttention"):
        return x, x, x
    return (x, x) if name in ("TransformerDecoderLayer", "Transformer") else (x,)


def outputs(module: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # projections without oneDNN
        return [t for t in torch.utils._pytree.tree_leaves(module(*given)) if isinstance(t, Tensor)]


def trained(module: nn.Module, name: str, steps: range, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = sum(t.square().sum() for t in outputs(module, inputs(name, step)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.rnn = nn.LSTM(D, H, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(2 * H, 2, batch_first=True)
        self.head = nn.Linear(2 * H, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.rnn(self.embedding(tokens))[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0])


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- results


@pytest.mark.parametrize("name", MODULES)
def test_results_and_training(name: str) -> None:
    """Parameters are the same objects, so that an optimizer continues; restore undoes all of it."""
    expected, model = made(name), made(name)
    optimizers = [torch.optim.Adam(m.parameters(), 1e-2) for m in (expected, model)]
    attributes, parameters = copy.copy(vars(model)), list(model.parameters())
    theirs = trained(expected, name, range(2), optimizers[0])
    ours = trained(model, name, range(2), optimizers[1])
    report = accelerate(model)
    assert "" in report.replaced or name == "Transformer"
    assert not report.left
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert type(model).__module__.startswith("seqkernels.") or name == "Transformer"
    theirs += trained(expected, name, range(2, 4), optimizers[0])
    ours += trained(model, name, range(2, 4), optimizers[1])
    undone = restore(model)
    assert undone.replaced.keys() == report.replaced.keys()
    assert type(model) is type(expected)
    assert vars(model).keys() == attributes.keys()
    theirs += trained(expected, name, range(4, 6), optimizers[0])
    ours += trained(model, name, range(4, 6), optimizers[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("to_ours", [True, False])
def test_checkpoints_pass_both_ways(name: str, to_ours: bool) -> None:
    saved, loaded = made(name), MODULES[name]()
    accelerate(loaded if to_ours else saved)
    assert list(saved.state_dict()) == list(loaded.state_dict())
    loaded.load_state_dict(saved.state_dict())
    for a, b in zip(outputs(saved.eval(), inputs(name)), outputs(loaded.eval(), inputs(name)), strict=True):
        close(a, b)


@pytest.mark.parametrize("nested", [True, False])
def test_encoders_in_evaluation(nested: bool) -> None:
    """torch.nn.TransformerEncoder passes nested tensors to its layers for a padding mask."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 16, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    x, padding = torch.randn(B, T, D), torch.arange(T) >= torch.tensor([[T], [2], [4]])
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        accelerate(encoder)
        found = encoder(x, src_key_padding_mask=padding)
    assert found.shape == expected.shape
    close(found[~padding], expected[~padding])


def test_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    expected = model(tokens()).last_hidden_state
    report = accelerate(model)
    assert report.replaced["embeddings.word_embeddings"] == ("torch.nn.Embedding", "seqkernels.nn.Embedding")
    close(model(tokens()).last_hidden_state, expected)


def test_crf_of_pytorch_crf() -> None:
    torchcrf = pytest.importorskip("torchcrf")
    torch.manual_seed(0)
    model = nn.ModuleDict({"crf": torchcrf.CRF(5, batch_first=True)})
    emissions, tags = torch.randn(B, T, 5), torch.randint(5, (B, T))
    mask = torch.ones(B, T, dtype=torch.bool)
    expected, path = model["crf"](emissions, tags, mask), model["crf"].decode(emissions, mask)
    report = accelerate(model)
    assert report.replaced["crf"] == ("torchcrf.CRF", "seqkernels.nn.CRF")
    close(model["crf"](emissions, tags, mask), expected)
    assert model["crf"].decode(emissions) == path
    restore(model)
    assert type(model["crf"]) is torchcrf.CRF
    close(model["crf"](emissions, tags, mask), expected)


# ---- what a module keeps


def test_hooks_flags_and_requires_grad_are_kept() -> None:
    model = tagger().eval()
    model.embedding.weight.requires_grad_(False)
    calls: list[str] = []
    model.rnn.register_forward_hook(lambda module, given, result: calls.append(type(module).__module__))
    accelerate(model)
    model(tokens())
    assert calls == ["seqkernels.nn.recurrent"]
    assert not any(m.training for m in model.modules())
    assert not model.embedding.weight.requires_grad
    assert model.rnn.weight_ih_l0.requires_grad


def test_second_call_and_shared_modules() -> None:
    """A module under two names is replaced once, and a second call replaces nothing."""
    model = tagger()
    model.again = model.rnn
    assert list(accelerate(model).replaced) == ["embedding", "rnn", "attention"]
    assert model.again is model.rnn
    assert not accelerate(model).replaced
    assert list(restore(model).replaced) == ["embedding", "rnn", "attention"]
    assert not restore(model).replaced


def test_modules_of_seqkernels_are_not_restored() -> None:
    model = nn.ModuleList([seqkernels.nn.LSTM(D, H), nn.LSTM(D, H)])
    assert list(accelerate(model).replaced) == ["1"]
    restore(model)
    assert [type(m) for m in model] == [seqkernels.nn.LSTM, nn.LSTM]


@pytest.mark.parametrize("keep", [False, True])
def test_copies_and_pickles(keep: bool) -> None:
    model = tagger()
    expected = model(tokens())
    accelerate(model, keep_isinstance=keep)
    for made_again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(made_again(tokens()), expected)
        assert list(restore(made_again).replaced) == ["embedding", "rnn", "attention"]
        assert type(made_again.rnn) is nn.LSTM
        close(made_again(tokens()), expected)


def test_meta_devices() -> None:
    with torch.device("meta"):
        model = Tagger()
    accelerate(model)
    model = model.to_empty(device="cpu")
    expected = tagger()
    model.load_state_dict(expected.state_dict())
    close(model(tokens()), expected(tokens()))


# ---- classes


class Renamed(nn.LSTM):
    """Overrides nothing."""


class Doubled(nn.LSTM):
    def forward(self, *given: Any) -> Any:  # type: ignore[override]
        output, states = super().forward(*given)
        return 2 * output, states


class Blocked(nn.TransformerEncoderLayer):
    def _ff_block(self, x: Tensor) -> Tensor:
        return x


def test_subclasses() -> None:
    model = nn.ModuleDict({"same": Renamed(D, H), "other": Doubled(D, H), "block": Blocked(D, 2, 16, 0.0)})
    x = torch.randn(T, B, D)
    expected = model["other"](x)[0], model["block"](x)
    report = accelerate(model)
    assert list(report.replaced) == ["same", "block.self_attn"]
    assert report.left == {
        "other": (f"{__name__}.Doubled", "its class adds or overrides forward"),
        "block": (f"{__name__}.Blocked", "its class adds or overrides _ff_block"),
    }
    close((model["other"](x)[0], model["block"](x)), expected)
    restore(model)
    assert type(model["same"]) is Renamed


class Scale:
    def forward(self, *given: Any) -> Any:
        return 10 * super().forward(*given)  # type: ignore[misc]


class Scaled(Scale, nn.Embedding):
    pass


class Greeting:
    def hello(self) -> str:
        return "hello"


class Mixed(nn.LSTM, Greeting):
    pass


@pytest.mark.parametrize(("make", "name"), [(lambda: Scaled(V, D), "forward"), (lambda: Mixed(D, H), "hello")])
def test_mixins_are_left(make: Callable[[], nn.Module], name: str) -> None:
    module = make()
    assert accelerate(module).left == {
        "": (f"{__name__}.{type(module).__name__}", f"its class adds or overrides {name}")
    }


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.LSTM(D, H), "options"),
        (lambda: nn.GRU(D, H), "num_heads"),
        (lambda: nn.LSTMCell(D, H), "_family"),
        (lambda: nn.Embedding(V, D), "fused_optimizer"),
        (lambda: nn.EmbeddingBag(V, D), "fused_state"),
    ],
)
def test_attributes_with_names_of_the_replacement(make: Callable[[], nn.Module], name: str) -> None:
    """The module is left, and the others are replaced."""
    model = nn.ModuleList([nn.RNN(D, H), make()])
    setattr(model[1], name, "mine")
    report = accelerate(model)
    assert list(report.replaced) == ["0"]
    assert report.left["1"][1] == f"its attributes {name} have names of attributes of the replacement"
    assert getattr(model[1], name) == "mine"


def test_restore_keeps_attributes_of_others() -> None:
    module = nn.LSTM(D, H)
    accelerate(module)
    module.forbidden = 3
    restore(module)
    assert module.forbidden == 3


def test_methods_of_torch_are_kept() -> None:
    for name in MODULES:
        module = made(name)
        before = {n for n in dir(module) if not n.startswith("_")}
        accelerate(module)
        assert before <= set(dir(module)), before - set(dir(module))


@pytest.mark.parametrize("keep", [False, True])
def test_other_form_of_replaced_layers(keep: bool) -> None:
    model = tagger()
    accelerate(model, keep_isinstance=keep)
    report = accelerate(model, keep_isinstance=not keep)
    assert report.notes == [f"rnn: already replaced, with keep_isinstance={keep}; call restore first to change it."]
    assert isinstance(model.rnn, nn.LSTM) == keep


def test_names_of_classes() -> None:
    report = accelerate(torch.ao.nn.quantizable.MultiheadAttention(D, 2))
    assert report.left[""][0] == "torch.ao.nn.quantizable.modules.activation.MultiheadAttention"


def test_replaced_forward_methods_are_left() -> None:
    model = tagger()
    original = model.rnn.forward
    model.rnn.forward = lambda *given: original(*given)
    assert accelerate(model).left == {"rnn": ("torch.nn.LSTM", "its forward method was replaced")}


def test_sparse_embeddings_are_left() -> None:
    report = accelerate(nn.Embedding(V, D, sparse=True))
    assert report.left == {"": ("torch.nn.Embedding", "sparse=True: torch's kernels are faster")}
    assert accelerate(nn.EmbeddingBag(V, D, sparse=True)).replaced


def test_dtypes_without_kernels_are_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # complex modules are new in torch
        report = accelerate(nn.LSTM(D, H).to(torch.complex64))
    assert report.left[""][1].startswith("cpu: dtype torch.complex64 is none of")
    assert "cuda" not in report.left[""][1]


def test_devices_without_kernels_are_left() -> None:
    """A projection has no kernel on CUDA; the tensors of the test are fake."""
    model = nn.LSTM(D, H, proj_size=2)
    with FakeTensorMode():
        for name, parameter in list(model.named_parameters()):
            setattr(model, name, nn.Parameter(torch.empty(parameter.shape, device="cuda")))
        report = accelerate(model)
    assert "a projection must be absent" in report.left[""][1]


@pytest.mark.parametrize("how", ["parametrization", "pruning"])
def test_computed_weights(how: str) -> None:
    """Parametrized modules have a generated class, whose base class is replaced."""
    model = tagger()
    if how == "parametrization":
        parametrizations.weight_norm(model.rnn, "weight_hh_l0")
        parametrizations.weight_norm(model.embedding)
    else:
        prune.random_unstructured(model.rnn, "weight_hh_l0", 0.5)
    expected = model(tokens())
    report = accelerate(model)
    assert report.replaced["rnn"] == ("torch.nn.LSTM", "seqkernels.nn.LSTM")
    assert isinstance(model.rnn, seqkernels.nn.LSTM)
    close(model(tokens()), expected)
    if how == "parametrization":
        torch.nn.utils.parametrize.remove_parametrizations(model.rnn, "weight_hh_l0")
        assert type(model.rnn) is seqkernels.nn.LSTM
        close(model(tokens()), expected)
    restore(model)
    assert isinstance(model.rnn, nn.LSTM)
    assert isinstance(model.embedding, nn.Embedding)
    assert not isinstance(model.embedding, seqkernels.nn.Embedding)
    close(model(tokens()), expected)


def test_parametrization_after_replacement() -> None:
    model = tagger()
    accelerate(model)
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    expected = model(tokens())
    restore(model)
    assert isinstance(model.rnn, nn.LSTM)
    close(model(tokens()), expected)


# ---- torch.compile


def test_isinstance_and_compile() -> None:
    """By default torch.compile captures the layers; with keep_isinstance it refuses them, as it refuses torch's."""
    plain, kept = tagger(), tagger()
    expected = plain(tokens())
    accelerate(plain)
    report = accelerate(kept, keep_isinstance=True)
    assert not isinstance(plain.rnn, nn.LSTM)
    assert isinstance(kept.rnn, nn.LSTM)
    assert isinstance(kept.rnn, seqkernels.nn.LSTM)
    assert report.notes == [
        "LSTM: instances of the classes of torch.nn, which torch.compile runs in eager mode, and refuses with "
        "fullgraph=True."
    ]
    close(torch.compile(plain, backend="aot_eager", fullgraph=True)(tokens()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile looks at .grad of the input of the layer
        close(torch.compile(kept, backend="aot_eager")(tokens()), expected)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(kept, backend="aot_eager", fullgraph=True)(tokens())
    close(kept(tokens()), expected)


def test_compiled_models() -> None:
    """A compiled model is recompiled after its modules are replaced."""
    model = tagger()
    compiled = torch.compile(model, backend="aot_eager")
    expected = compiled(tokens())
    report = accelerate(compiled)
    assert list(report.replaced) == ["_orig_mod.embedding", "_orig_mod.rnn", "_orig_mod.attention"]
    calls = []
    model.rnn.register_forward_hook(lambda *_: calls.append(0))
    torch._dynamo.reset()
    close(compiled(tokens()), expected)
    close(torch.compile(model, backend="aot_eager", fullgraph=True)(tokens()), expected)
    assert calls


def test_export() -> None:
    model = tagger()
    expected = model(tokens())
    accelerate(model)
    close(torch.export.export(model, (tokens(),)).module()(tokens()), expected)


# ---- torch.distributed


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int) -> None:
    optimizer.zero_grad()
    model(tokens(10 + rank)).square().sum().backward()
    optimizer.step()


def train_in_two_processes(rank: int, folder: str) -> dict[str, list[Tensor]]:
    results = {}
    for wrap in ("ddp", "fsdp2"):
        for order in ("never", "before", "after", "restored"):
            model = tagger()
            if order in ("before", "restored"):
                accelerate(model)
            if wrap == "ddp":
                wrapped: nn.Module = nn.parallel.DistributedDataParallel(model)
            else:
                for part in (model.embedding, model.rnn, model.attention):
                    dist.fsdp.fully_shard(part)
                wrapped = dist.fsdp.fully_shard(model)
            if order == "after":
                report = accelerate(wrapped)
                assert [n.removeprefix("module.") for n in report.replaced] == ["embedding", "rnn", "attention"]
            if order == "restored":
                assert len(restore(wrapped).replaced) == 3
            assert isinstance(model.rnn, seqkernels.nn.LSTM) == (order in ("before", "after"))
            assert isinstance(model.rnn, nn.LSTM) == (order in ("never", "restored"))
            optimizer = torch.optim.SGD(wrapped.parameters(), 1e-2)
            for _ in range(3):
                step_of(wrapped, optimizer, rank)
            results[f"{wrap} {order}"] = [
                (p.full_tensor() if isinstance(p, dist.tensor.DTensor) else p).detach().clone()
                for p in model.parameters()
            ]
            del wrapped, model, optimizer
    return results


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_data_parallel_models(tmp_path: Path) -> None:
    """DistributedDataParallel and fully_shard, around replaced modules and replaced within."""
    for results in run_workers(train_in_two_processes, tmp_path):
        for wrap in ("ddp", "fsdp2"):
            for order in ("before", "after", "restored"):
                close(results[f"{wrap} {order}"], results["ddp never"], msg=lambda m, w=wrap, o=order: f"{w} {o}: {m}")


# ---- reports and errors


def test_report() -> None:
    model = tagger()
    model.other = Doubled(D, H)
    assert str(accelerate(model)).splitlines() == [
        "module     class                        replaced by",
        "embedding  torch.nn.Embedding           seqkernels.nn.Embedding",
        "rnn        torch.nn.LSTM                seqkernels.nn.LSTM",
        "attention  torch.nn.MultiheadAttention  seqkernels.nn.MultiheadAttention",
        f"left: other ({__name__}.Doubled): its class adds or overrides forward",
    ]
    assert str(restore(model)).splitlines()[2] == "rnn        seqkernels.nn.LSTM                torch.nn.LSTM"


def test_models_with_nothing_to_replace() -> None:
    report = seqkernels.accelerate(nn.Linear(2, 3))
    assert isinstance(report, Report)
    assert str(report) == "Nothing was replaced."
    assert str(seqkernels.restore(nn.Linear(2, 3))) == "Nothing was replaced."


@pytest.mark.parametrize("function", [accelerate, restore])
def test_models_of_other_types(function: Callable[[Any], Report]) -> None:
    with pytest.raises(TypeError, match=f"{function.__name__}: model must be a torch.nn.Module, got dict"):
        function({})
