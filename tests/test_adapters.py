"""Tools that wrap or replace modules by their class: adapters of PEFT, and the validator of Opacus."""

from __future__ import annotations

import copy
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import seqkernels

B, T, E, H = 3, 6, 8, 2
close = torch.testing.assert_close


class Model(nn.Module):
    """All kinds of modules. The batch is the first dimension of attention, or the second."""

    def __init__(self, lib: ModuleType = seqkernels.nn, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embedding = lib.Embedding(9, E)
        self.attention = lib.MultiheadAttention(E, H, batch_first=batch_first)
        self.encoder = lib.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=batch_first)
        self.decoder = lib.TransformerDecoderLayer(E, H, 16, 0.0, batch_first=batch_first)
        self.layer = lib.LSTM(E, E, batch_first=True)
        self.cell = lib.GRUCell(E, E)
        self.bag = lib.EmbeddingBag(9, E)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.embedding(indices)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.attention(x, x, x, need_weights=False)[0]
        x = self.encoder(x)
        x = self.decoder(x, x)
        x = x if self.batch_first else x.transpose(0, 1)
        return self.layer(x)[0] + (self.cell(x[:, 0]) + self.bag(indices)).unsqueeze(1)


def imported(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


# ---- PEFT


TARGETS = {
    "Embedding": ["embedding"],
    "MultiheadAttention": ["attention"],
    "Linears of Transformer layers": ["linear1", "linear2"],
    "attention of Transformer layers": ["self_attn", "multihead_attn"],
    "output projections": ["out_proj"],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_lora_matches_its_merged_model(targets: list[str]) -> None:
    """The output with adapters is that of the merged weights, and all adapters get a gradient."""
    peft = imported("peft")
    model, indices = Model().eval(), torch.randint(9, (B, T))
    without = model(indices).detach()
    config = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    output = adapted(indices)
    output.square().sum().backward()
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert adapters and all("lora_" in name and p.grad.abs().max() > 0 for name, p in adapters.items())
    assert not torch.allclose(output, without, atol=1e-3)
    merged = adapted.merge_and_unload()
    close(merged(indices), output)
    assert type(merged.embedding) is seqkernels.nn.Embedding
    assert type(merged.attention) is seqkernels.nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["layer", "cell", "bag"])
def test_lora_refuses_what_it_refuses_of_torch(target: str) -> None:
    peft = imported("peft")
    for lib in (seqkernels.nn, nn):
        with pytest.raises(ValueError, match=r"Target module .* is not supported"):
            peft.get_peft_model(Model(lib), peft.LoraConfig(r=4, target_modules=[target]))


# ---- Opacus


@pytest.fixture
def validator() -> type:
    imported("opacus")
    return imported("seqkernels.integrations.opacus").ModuleValidator


ACCEPTED = {
    "Embedding": lambda: seqkernels.nn.Embedding(9, E),
    "EmbeddingBag": lambda: seqkernels.nn.EmbeddingBag(9, E, mode="max"),
    "GRUCell": lambda: seqkernels.nn.GRUCell(E, H),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ACCEPTED)
def test_opacus_computes_gradients_of_each_sample(name: str, validator: type) -> None:
    opacus = imported("opacus")
    module = ACCEPTED[name]()
    assert validator.validate(module) == []
    alone, wrapped = copy.deepcopy(module), opacus.GradSampleModule(module)
    x = torch.randint(9, (B, T)) if "Embedding" in name else torch.randn(B, E)
    wrapped(x).square().sum(1).mean().backward()
    for i in range(B):
        alone.zero_grad()
        alone(x[i : i + 1]).square().sum(1).mean().backward()
        for p, q in zip(module.parameters(), alone.parameters(), strict=True):
            close(p.grad_sample[i], q.grad)


@pytest.mark.filterwarnings("ignore")
def test_opacus_replaces_layers_and_attention(validator: type) -> None:
    opacus = imported("opacus")
    model, indices = Model(batch_first=False), torch.randint(9, (B, T))
    errors = [str(error) for error in validator.validate(model)]
    wanted = {"LSTM": "DPLSTM", "MultiheadAttention": "DPMultiheadAttention"}
    for name, by in wanted.items():
        assert f"{name}: Opacus has no per-sample gradients; ModuleValidator.fix replaces it by {by}" in errors
    assert len(errors) == 5  # LSTM, and attention four times
    fixed = validator.fix(model)
    close(fixed(indices), model(indices))
    assert validator.validate(fixed) == []
    wrapped = opacus.GradSampleModule(fixed)
    wrapped(indices).square().mean(dim=(1, 2)).mean().backward()
    samples = {name: p.grad_sample for name, p in fixed.named_parameters()}
    for i in range(B):
        model.zero_grad()
        model(indices[i : i + 1]).square().mean().backward()
        for name in ("embedding.weight", "cell.weight_hh", "bag.weight", "layer.weight_hh_l0"):
            close(samples[name][i], model.get_parameter(name).grad)


REFUSED = {
    "RNN: Opacus has no per-sample gradients; use opacus.layers.DPRNN": lambda: seqkernels.nn.RNN(E, H),
    "MGU: Opacus has no per-sample gradients; use LSTM or GRU": lambda: seqkernels.nn.MGU(E, H),
    "LSTM: Opacus has no per-sample gradients with options of LSTM": lambda: seqkernels.nn.LSTM(E, H, peephole=True),
    "LSTM: Opacus has no per-sample gradients with proj_size": lambda: seqkernels.nn.LSTM(E, 4, proj_size=2),
    "MultiheadAttention: Opacus has no per-sample gradients with batch_first=True": lambda: (
        seqkernels.nn.MultiheadAttention(E, H, batch_first=True)
    ),
    "EmbeddingBag: fused_optimizer must be None": lambda: seqkernels.nn.EmbeddingBag(
        9, E, fused_optimizer=seqkernels.nn.FusedSGD()
    ),
    "Embedding: max_norm must be None": lambda: seqkernels.nn.Embedding(9, E, max_norm=1.0),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("message", REFUSED)
def test_opacus_refuses_the_rest(message: str, validator: type) -> None:
    (error,) = validator.validate(REFUSED[message]())
    assert str(error).startswith(message)
    assert len(validator.validate(validator.fix(REFUSED[message]()))) == 1
