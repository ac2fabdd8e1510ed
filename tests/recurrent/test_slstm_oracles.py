"""sLSTM against the plain-torch steps of the packages xlstm and flashrnn, if they are installed.

The tests load only the files of the steps, because the packages have further dependencies. The clamps of the packages
have no effect with zero initial states: exp(i - m) to at most 1, and in flashrnn n to at least 1.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import seqkernels

B, T, D, H = 3, 9, 5, 12
STEPS = {
    "xlstm": ("blocks/slstm/src/vanilla/slstm.py", "slstm_forward_pointwise", 0),
    "flashrnn": ("flashrnn/vanilla/slstm.py", "flashrnn_forward_pointwise", 1),
}


def step_of(package: str) -> tuple[Callable[..., tuple[Tensor, Tensor]], int]:
    """The function of one step, and the dimension of h, c, n and m in `states`."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed; it computes the expected results")
    path, name, dim = STEPS[package]
    of_file = importlib.util.spec_from_file_location(f"{package}_step", Path(spec.submodule_search_locations[0]) / path)
    assert of_file is not None and of_file.loader is not None
    module = importlib.util.module_from_spec(of_file)
    of_file.loader.exec_module(module)
    return getattr(module, name), dim


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("package", STEPS)
def test_layer_matches_the_steps_of_the_package(package: str, heads: int) -> None:
    """Output, last states and all gradients, from zero states."""
    step, dim = step_of(package)
    torch.manual_seed(0)
    layer = seqkernels.nn.SLSTM(D, H, num_heads=heads, dtype=torch.float64)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(3.0)
        layer.bias_hh_l0.zero_()
    x = torch.randn(T, B, D, dtype=torch.float64, requires_grad=True)
    recurrent = torch.cat([torch.block_diag(*gate.chunk(heads)) for gate in layer.weight_hh_l0.chunk(4)])
    states, outputs = x.new_zeros(4, B, H), []
    for x_t in x:
        products = x_t @ layer.weight_ih_l0.T, states[0] @ recurrent.T, layer.bias_ih_l0.unsqueeze(0)
        if dim == 0:
            states = step(*products, states, {})[0]
        else:
            gates = (v.unflatten(-1, (4, H)) for v in products)
            states = step(*gates, states.transpose(0, 1), {})[0].transpose(0, 1)
        outputs.append(states[0])
    want, (got, last) = torch.stack(outputs), layer(x)
    torch.testing.assert_close(got, want)
    for mine, theirs in zip(last, states, strict=True):
        torch.testing.assert_close(mine[0], theirs)
    upstream = torch.randn_like(got)
    wanted = [x, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0]
    for mine, theirs in zip(
        torch.autograd.grad(got, wanted, upstream), torch.autograd.grad(want, wanted, upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
