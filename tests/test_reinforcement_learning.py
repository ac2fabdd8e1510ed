"""Adapters of recurrent policies of sb3-contrib and TorchRL: numbers of the originals, with one call for all steps."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

B, T, D, H = 3, 11, 4, 8
close = torch.testing.assert_close
pytestmark = pytest.mark.filterwarnings("ignore")


def imported(name: str) -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name)


def test_import_of_seqkernels_imports_no_library() -> None:
    code = "import sys, seqkernels; print([m for m in ('sb3_contrib', 'torchrl', 'tensordict') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- sb3-contrib


@pytest.fixture(scope="module")
def sb3() -> ModuleType:
    imported("sb3_contrib")
    return imported("seqkernels.integrations.sb3")


def ppo(policy: Any = "MlpLstmPolicy", **policy_kwargs: Any) -> Any:
    """RecurrentPPO on CartPole, whose episodes of random actions end within the 32 steps of a rollout."""
    make_vec_env = imported("stable_baselines3.common.env_util").make_vec_env
    RecurrentPPO = imported("sb3_contrib").RecurrentPPO
    env = make_vec_env("CartPole-v1", n_envs=2, seed=0)
    kwargs = {"lstm_hidden_size": H, "net_arch": [8]} | policy_kwargs
    return RecurrentPPO(
        policy, env, n_steps=32, batch_size=32, n_epochs=2, learning_rate=1e-3, seed=0, device="cpu",
        policy_kwargs=kwargs,
    )  # fmt: skip


VARIANTS = {
    "own LSTM of the critic": {},
    "shared LSTM": dict(shared_lstm=True, enable_critic_lstm=False),
    "no LSTM of the critic": dict(enable_critic_lstm=False),
    "two layers without biases": dict(n_lstm_layers=2, lstm_kwargs=dict(bias=False)),
}


def states_of(policy: Any) -> Any:
    layers = policy.lstm_actor.num_layers
    pair = tuple(torch.randn(layers, B, H) for _ in range(2)), tuple(torch.randn(layers, B, H) for _ in range(2))
    return imported("sb3_contrib.common.recurrent.type_aliases").RNNStates(*pair)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("starts", ["none", "first", "inside"])
def test_sb3_policy_matches_the_original(sb3: ModuleType, variant: dict[str, Any], starts: str) -> None:
    """Actions, values, log-probabilities, states and gradients of all methods that run the LSTM."""
    original = ppo(**variant).policy
    policy = sb3.accelerate(copy.deepcopy(original))
    states = states_of(policy)
    start = torch.zeros(B, T)
    if starts != "none":
        start[1, 0] = 1
    if starts == "inside":
        start[0, 4] = start[2, 4] = start[2, 9] = 1
    obs, actions, start = torch.randn(B * T, D), torch.randint(2, (B * T,)), start.flatten()
    results = []
    for each in (original, policy):
        torch.manual_seed(0)
        values, log_prob, entropy = each.evaluate_actions(obs, actions, states, start)
        (values.square().mean() + log_prob.mean() + entropy.mean()).backward()
        *outputs, after = each(obs, states, start, deterministic=True)
        _, of_actor = each.get_distribution(obs, states.pi, start)
        value = each.predict_values(obs, states.vf, start)
        one, next_state = each.predict(obs[:B].numpy(), None, start[:B].numpy() != 0, deterministic=True)
        tensors = [values, log_prob, entropy, *outputs, *after.pi, *after.vf, *of_actor, value]
        results.append([*tensors, *map(torch.as_tensor, (one, *next_state)), *(p.grad for p in each.parameters())])
    assert len(results[0]) == len(results[1])
    for theirs, ours in zip(*results, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_sb3_training_gives_equal_losses(sb3: ModuleType, variant: dict[str, Any]) -> None:
    losses = []
    for accelerate in (lambda model: model, sb3.accelerate):
        model = accelerate(ppo(**variant))
        model.learn(256, log_interval=None)
        values = model.logger.name_to_value
        losses.append(torch.tensor([float(values[f"train/{name}"]) for name in ("loss", "value_loss", "entropy_loss")]))
    close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


def test_sb3_runs_one_call_for_all_steps(sb3: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, calls = sb3.accelerate(ppo()).policy, []
    monkeypatch.setattr(nn.LSTM, "forward", lambda *_, **__: pytest.fail("torch.nn.LSTM was called"))
    run = sb3._FUNCTIONS["LSTM"]
    monkeypatch.setitem(sb3._FUNCTIONS, "LSTM", lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    start = torch.zeros(B * T)
    start[5] = 1
    policy.evaluate_actions(torch.randn(B * T, D), torch.zeros(B * T), states_of(policy), start)
    assert len(calls) == 2  # of the actor and of the critic


def test_sb3_models_are_saved_and_loaded(sb3: ModuleType, tmp_path: Path) -> None:
    """A saved model loads as the original; a model with the policy of the adapter loads with that policy."""
    RecurrentPPO = imported("sb3_contrib").RecurrentPPO
    obs = torch.randn(2, D).numpy()
    for model in (sb3.accelerate(ppo()), ppo(sb3.MlpLstmPolicy)):
        model.learn(64)
        model.save(tmp_path / "model")
        loaded = RecurrentPPO.load(tmp_path / "model", env=model.env, device="cpu")
        assert type(loaded.policy) is type(model.policy)
        sb3.accelerate(loaded)
        for theirs, ours in zip(model.policy.parameters(), loaded.policy.parameters(), strict=True):
            assert torch.equal(theirs, ours)
        assert (model.predict(obs, deterministic=True)[0] == loaded.predict(obs, deterministic=True)[0]).all()
        loaded.learn(64)
        assert pickle.loads(pickle.dumps(model.policy))._process_sequence is sb3.process_sequence


def test_sb3_states_its_errors(sb3: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"model must be a RecurrentPPO or a recurrent policy .*, got Linear"):
        sb3.accelerate(nn.Linear(2, 2))
    policy = ppo().policy
    handle = policy.lstm_critic.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lstm_critic must have no hooks"):
        sb3.accelerate(policy)
    handle.remove()
    policy.lstm_critic.forward = lambda *given: given
    with pytest.raises(ValueError, match="lstm_critic must have no hooks and no replaced forward"):
        sb3.accelerate(policy)
    policy.lstm_actor = nn.GRU(D, H)
    with pytest.raises(ValueError, match=r"lstm_actor must be .* RNN, got torch.nn.modules.rnn.GRU; call"):
        sb3.accelerate(policy)

    class Own(imported("sb3_contrib.ppo_recurrent").MlpLstmPolicy):
        @staticmethod
        def _process_sequence(*args: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ValueError, match="must use the _process_sequence of sb3-contrib, Own has its own"):
        sb3.accelerate(ppo(Own))


# ---- TorchRL


@pytest.fixture(scope="module")
def torchrl() -> ModuleType:
    imported("torchrl")
    return imported("seqkernels.integrations.torchrl")


def module_of(kind: str, **options: Any) -> Any:
    modules = imported("torchrl.modules")
    states = {"LSTM": ["h", "c"], "GRU": ["h"]}[kind]
    return getattr(modules, f"{kind}Module")(
        input_size=D, hidden_size=H, in_keys=["x", *states], out_keys=["y", *(("next", s) for s in states)],
        default_recurrent_mode=True, **options,
    )  # fmt: skip


def rollout(kind: str, shape: tuple[int, ...], layers: int, starts: str, states: bool) -> Any:
    """Rows of trajectories; the stored states are zero where a later trajectory starts, as in a rollout."""
    TensorDict = imported("tensordict").TensorDict
    is_init = torch.zeros(*shape, 1, dtype=torch.bool)
    if starts != "none":
        is_init[..., 0, :] = torch.rand(*shape[:-1], 1) < 0.5
    if starts == "inside":
        is_init[..., 1:, :] = torch.rand(*shape[:-1], shape[-1] - 1, 1) < 0.3
        is_init[..., 3, :] = True
    data = {"x": torch.randn(*shape, D), "is_init": is_init}
    if states:
        for name in {"LSTM": ["h", "c"], "GRU": ["h"]}[kind]:
            state = torch.randn(*shape, layers, H)
            state[..., 1:, :, :] *= ~is_init[..., 1:, :, None]
            data[name] = state
    return TensorDict(data, shape)


def results_of(module: Any, data: Any) -> list[Tensor]:
    """Outputs, states and gradients, for random upstream gradients of all outputs."""
    data = data.clone()
    data["x"].requires_grad_()
    x = data["x"]
    data = module(data)
    outputs = [data[key] for key in module.out_keys]
    torch.manual_seed(1)
    sum((output * torch.randn(output.shape)).sum() for output in outputs).backward()
    found = [*outputs, x.grad, *(p.grad for p in module.parameters())]
    module.zero_grad()
    return found


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("starts", ["none", "first", "inside"])
@pytest.mark.parametrize("states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize(
    "shape, options",
    [((T,), {}), ((B, T), {"num_layers": 2, "bias": False}), ((2, B, T), {"python_based": True})],
    ids=str,
)
def test_torchrl_module_matches_the_original(
    torchrl: ModuleType, kind: str, starts: str, states: bool, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    original = module_of(kind, **options)
    module = torchrl.accelerate(copy.deepcopy(original))
    assert type(module) is getattr(torchrl, f"{kind}Module")
    data = rollout(kind, shape, options.get("num_layers", 1), starts, states)
    for theirs, ours in zip(results_of(original, data), results_of(module, data), strict=True):
        close(ours, theirs)


def double(layer: nn.Module, given: Any, result: Any) -> Any:
    output, states = result
    return (2 * output if isinstance(output, Tensor) else output._replace(data=2 * output.data)), states


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("case", ["states inside", "gradient of states", "bidirectional", "single steps", "hooks"])
def test_torchrl_implementation_runs_what_reset_does_not_express(torchrl: ModuleType, kind: str, case: str) -> None:
    original = module_of(kind, bidirectional=case == "bidirectional")
    if case == "hooks":
        getattr(original, kind.lower()).register_forward_hook(double)
    module = torchrl.accelerate(copy.deepcopy(original))
    data = rollout(kind, (B, T), 2 if case == "bidirectional" else 1, "inside", True)
    if case == "states inside":
        data["h"][0, 3] = 1.0
    if case == "gradient of states":
        data["h"].requires_grad_()
    if case == "single steps":
        data = data.reshape(-1)
        original._recurrent_mode = module._recurrent_mode = False
    for theirs, ours in zip(results_of(original, data), results_of(module, data), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_torchrl_training_gives_equal_losses(torchrl: ModuleType, kind: str) -> None:
    losses = []
    for accelerate in (lambda module: module, torchrl.accelerate):
        torch.manual_seed(0)
        model = nn.ModuleList([accelerate(module_of(kind)), nn.Linear(H, 1)])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(100):
            data = rollout(kind, (B, T), 1, "inside", False)
            target = data["x"].cumsum(1)[..., :1].tanh()
            loss = (model[1](model[0](data)["y"]) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.detach())
    close(losses[1], losses[0], rtol=1e-3, atol=1e-5)


def test_torchrl_finds_the_modules_of_a_model(torchrl: ModuleType) -> None:
    model = nn.Sequential(nn.ModuleList([module_of("LSTM"), module_of("GRU")]), nn.Linear(2, 2))
    names = list(model.state_dict())
    assert torchrl.accelerate(torchrl.accelerate(model)) is model
    assert [type(m) for m in model[0]] == [torchrl.LSTMModule, torchrl.GRUModule]
    assert list(model.state_dict()) == names
    assert [type(m) for m in pickle.loads(pickle.dumps(model))[0]] == [torchrl.LSTMModule, torchrl.GRUModule]
    built = torchrl.LSTMModule(input_size=D, hidden_size=H, in_key="x", out_key="y", default_recurrent_mode=True)
    x, none, is_init = torch.randn(B, T, D), torch.zeros(B, T, 1, H), torch.zeros(B, T, 1, dtype=torch.bool)
    y, h, _ = built(x, none, none, is_init)  # tensors instead of a TensorDict
    close(y, built.lstm(x)[0])
    close(h[:, -1], y[:, -1:])


def test_torchrl_states_its_errors(torchrl: ModuleType) -> None:
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch.nn.Module, got str"):
        torchrl.accelerate("model")
    with pytest.raises(ValueError, match="must contain an LSTMModule or a GRUModule of TorchRL, got none"):
        torchrl.accelerate(nn.Linear(2, 2))
    data = rollout("LSTM", (B, T), 1, "inside", True)
    del data["c"]
    with pytest.raises(RuntimeError, match="LSTMModule: all states must be given, or none"):
        torchrl.accelerate(module_of("LSTM"))(data)
