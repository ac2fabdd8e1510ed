"""Train an LSTM policy by PPO, with torch and with seqkernels, on CartPole with hidden velocities.

    python examples/recurrent_ppo.py
    python examples/recurrent_ppo.py --backend seqkernels --envs 32 --epochs 60
    python examples/recurrent_ppo.py --resets packed       # another way to reset the states of torch.nn.LSTM
    torchrun --nproc-per-node 2 examples/recurrent_ppo.py  # each process updates on a part of the environments

Each epoch collects a rollout of new episodes with the current policy and updates the policy on it. A row of the rollout
is an environment, where an episode starts when the previous one ends, so the states of the LSTM are reset inside the
sequence: `lstm(x, hx, reset=starts)` in seqkernels. torch.nn.LSTM has no such argument. It is called once per step, as
in CleanRL and sb3-contrib (`--resets loop`), or on packed episodes, as in TorchRL (`--resets packed`). The times in the
table are those of the updates. Collecting takes place in the environments and in single steps of the LSTM.

Source: Schulman et al., "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347
Requires gymnasium, tqdm and matplotlib.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

import common

VISIBLE = [0, 2]  # position and angle of CartPole's observation; 1 and 3 are their velocities
ACTIONS = 2
EPISODE = 500  # steps after which CartPole ends an episode
GAMMA, LAMBDA = 0.99, 0.95  # discount, and the decay of generalized advantage estimation
REWARD_SCALE = 0.1  # keeps the values, and with them the gradient of their loss, near one
CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.2, 0.5, 0.01

States = tuple[Tensor, Tensor]  # h and c, [1, B, H] each


class Policy(nn.Module):
    """A linear layer, an LSTM, and linear layers for the logits of the actions and the value."""

    def __init__(self, layers: Any, args: argparse.Namespace) -> None:
        super().__init__()
        self.encoder = nn.Linear(len(VISIBLE), args.hidden)
        self.lstm = layers.LSTM(args.hidden, args.hidden)
        self.actor = nn.Linear(args.hidden, ACTIONS)
        self.critic = nn.Linear(args.hidden, 1)
        self.resets = "fused" if layers is not nn else args.resets
        nn.init.orthogonal_(self.lstm.weight_hh_l0)
        nn.init.orthogonal_(self.actor.weight, gain=0.01)  # the first policy is nearly uniform

    def forward(
        self, observations: Tensor, starts: Tensor, states: States | None = None
    ) -> tuple[Tensor, Tensor, States | None]:
        """Logits [T, B, A], values [T, B] and the last states, from observations [T, B, 2] and starts [T, B]."""
        x = self.encoder(observations).tanh()
        if self.resets == "fused":
            output, states = self.lstm(x, states, reset=starts)
        elif self.resets == "loop" or len(x) == 1:
            output, states = self.step_by_step(x, starts, states)
        else:
            output = self.packed(x, starts)
        return self.actor(output), self.critic(output).squeeze(-1), states

    def step_by_step(self, x: Tensor, starts: Tensor, states: States | None) -> tuple[Tensor, States]:
        outputs = []
        states = states or (x.new_zeros(1, *x.shape[1:]),) * 2
        for step, start in zip(x.split(1), starts, strict=True):  # [1, B, H], [B]
            keep = (~start)[None, :, None].to(x.dtype)
            output, states = self.lstm(step, (keep * states[0], keep * states[1]))
            outputs.append(output)
        return torch.cat(outputs), states

    def packed(self, x: Tensor, starts: Tensor) -> Tensor:
        """Runs the episodes as sequences of their own. Each row must start with an episode."""
        T, B, _ = x.shape
        first = starts.t().flatten().nonzero().flatten()  # in the order of environments, then steps
        lengths = torch.diff(first, append=first.new_tensor([T * B])).tolist()
        output, _ = self.lstm(pack_sequence(x.transpose(0, 1).flatten(0, 1).split(lengths), enforce_sorted=False))
        return torch.cat(unpack_sequence(output)).view(B, T, -1).transpose(0, 1)


@dataclass
class Rollout:
    """T steps of B environments."""

    observations: Tensor  # [T, B, 2]
    starts: Tensor  # [T, B] bool, whether an episode starts
    actions: Tensor  # [T, B]
    log_probs: Tensor  # [T, B] of the actions, under the policy that chose them
    advantages: Tensor  # [T, B]
    returns: Tensor  # [T, B]

    def of(self, environments: list[int]) -> "Rollout":
        return Rollout(*(value[:, environments] for value in vars(self).values()))


def visible(observations: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(observations[:, VISIBLE], dtype=torch.float32, device=device).unsqueeze(0)  # [1, B, 2]


def environments(count: int) -> SyncVectorEnv:
    make = [lambda: gymnasium.make("CartPole-v1")] * count
    return SyncVectorEnv(make, autoreset_mode=AutoresetMode.SAME_STEP)


@torch.no_grad()
def collect(policy: Policy, count: int, steps: int, seed: int) -> Rollout:
    """Runs the policy from the start of new episodes, so that a checkpoint needs no state of the environments."""
    device = policy.encoder.weight.device
    generator = torch.Generator().manual_seed(seed)
    env = environments(count)
    observation = visible(env.reset(seed=seed)[0], device)
    start, states = torch.ones(1, count, dtype=torch.bool, device=device), None
    kept: dict[str, list[Tensor]] = {"observations": [], "starts": [], "actions": [], "log_probs": [], "values": []}
    rewards, ends = torch.zeros(steps, count), torch.zeros(steps, count)
    for t in range(steps):
        logits, value, states = policy(observation, start, states)
        distribution = Categorical(logits=logits)
        action = torch.multinomial(distribution.probs[0].cpu(), 1, generator=generator).t().to(device)  # [1, B]
        step = (observation, start, action, distribution.log_prob(action), value)
        for values, new in zip(kept.values(), step, strict=True):
            values.append(new)
        after, reward, terminated, truncated, _ = env.step(action[0].cpu().numpy())
        rewards[t], ends[t] = torch.as_tensor(reward * REWARD_SCALE), torch.as_tensor(terminated | truncated)
        observation, start = visible(after, device), torch.as_tensor(terminated | truncated, device=device)[None]
    env.close()
    last = policy(observation, start, states)[1]
    data = {name: torch.cat(values) for name, values in kept.items()}
    values = torch.cat([data.pop("values"), last])
    advantages = estimate_advantages(rewards.to(device), ends.to(device), values)
    normalized = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    return Rollout(**data, advantages=normalized, returns=advantages + values[:-1])


def estimate_advantages(rewards: Tensor, ends: Tensor, values: Tensor) -> Tensor:
    """Generalized advantage estimation, https://arxiv.org/abs/1506.02438; values: [T + 1, B], the others [T, B]."""
    advantages, later = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        going_on = 1 - ends[t]
        error = rewards[t] + GAMMA * going_on * values[t + 1] - values[t]
        later = error + GAMMA * LAMBDA * going_on * later
        advantages[t] = later
    return advantages


def ppo_loss(policy: nn.Module, batch: Rollout) -> tuple[Tensor, float]:
    logits, values, _ = policy(batch.observations, batch.starts)
    distribution = Categorical(logits=logits)
    ratio = (distribution.log_prob(batch.actions) - batch.log_probs).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    of_policy = -torch.min(ratio * batch.advantages, clipped * batch.advantages)
    of_values = (values - batch.returns).square()
    loss = of_policy + VALUE_WEIGHT * of_values - ENTROPY_WEIGHT * distribution.entropy()
    return loss.sum(), float(loss.numel())


@torch.no_grad()
def mean_return(policy: Policy, count: int, seed: int) -> float:
    """The mean length of episodes in which the policy takes its most likely actions."""
    device = policy.encoder.weight.device
    env = environments(count)
    observation = visible(env.reset(seed=seed)[0], device)
    start, states = torch.ones(1, count, dtype=torch.bool, device=device), None
    running, total = np.ones(count, bool), 0
    while running.any():
        logits, _, states = policy(observation, start, states)
        after, _, terminated, truncated, _ = env.step(logits[0].argmax(-1).cpu().numpy())
        total += running.sum()
        running &= ~(terminated | truncated)
        observation, start = visible(after, device), torch.zeros_like(start)
    env.close()
    return total / count


@dataclass
class Learner(common.Run):
    """Collects a rollout with its own policy before the updates of an epoch."""

    HISTORY = (*common.Run.HISTORY, "collect_seconds")

    options: argparse.Namespace | None = None
    collect_seconds: list[float] = field(default_factory=list)  # one per epoch

    def rollout(self, epoch: int) -> Rollout:
        args = self.options
        return collect(self.model, args.envs, args.steps, seed=1000 * args.seed + epoch)

    def warm_up(self, batch: list[int]) -> None:
        super().warm_up(self.rollout(0).of(batch))

    def train_epoch(self, data: list[list[int]], bar: Any) -> None:
        start = time.perf_counter()
        rollout = self.rollout(len(self.loss) + 1)
        self.collect_seconds.append(time.perf_counter() - start)
        super().train_epoch([rollout.of(environments) for environments in data], bar)


def steps(text: str) -> int:
    if not 2 <= int(text) <= EPISODE:
        raise argparse.ArgumentTypeError(f"must lie in [2, {EPISODE}], the longest episode, got {text}")
    return int(text)


def parse_arguments() -> argparse.Namespace:
    parser = common.Parser(__doc__, "recurrent_ppo", epochs=30, batch=4, lr=3e-3)
    option = parser.add_argument
    option("--hidden", type=common.count, default=64, help="hidden size (%(default)s)")
    option("--envs", type=common.count, default=16, help="environments, the rows of a rollout (%(default)s)")
    option("--steps", type=steps, default=128, help="steps of each environment in a rollout (%(default)s)")
    option("--passes", type=common.count, default=4, help="passes over a rollout (%(default)s)")
    option("--resets", choices=["loop", "packed"], default="loop", help="how torch resets states (%(default)s)")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()

    def updates(epoch: int, rows: slice) -> Iterator[list[int]]:
        """The environments of each update."""
        for i in range(args.passes):
            order = common.shuffled(range(args.envs), seed=args.seed + args.passes * epoch + i)
            yield from common.batches_of(order, args.batch, rows)

    task = common.Task(
        name="recurrent_ppo",
        build=lambda layers: Policy(layers, args),
        batches=updates,
        loss=ppo_loss,
        metric=lambda policy: mean_return(policy, count=20, seed=args.seed),
        metric_name="return",
        metric_format=".1f",
    )
    runs = common.train(task, args, lambda *of_run: Learner(*of_run, options=args))

    def draw_returns(axes: Axes) -> None:
        for i, run in enumerate(runs):  # as the losses: narrower than the previous curve
            look = dict(color=common.COLORS[run.name], linewidth=6 / (1 + 2 * i), label=run.name)
            axes.plot(range(1, len(run.metric) + 1), run.metric, **look)
        common.style(axes, "Return of the most likely actions", "epochs", f"steps, at most {EPISODE}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))

    shape = f"hidden {args.hidden}, {args.envs} environments, {args.steps} steps"
    code = common.report(task, runs, args, f"PPO on CartPole without velocities: {shape}", [draw_returns])
    print("Collecting in all: " + ", ".join(f"{run.name} {sum(run.collect_seconds):.1f} s" for run in runs))
    return code


if __name__ == "__main__":
    common.run(main)
