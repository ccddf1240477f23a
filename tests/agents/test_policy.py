"""The policy starts as the baseline, ignores padding, and encodes equal observations once."""

import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3 import PPO
from torch import Tensor

from prunegym.agents.policies.policy import MaskedGaussian, PruningPolicy, distinct_rows
from prunegym.envs.observation import GROUP_DATA_COLUMNS, NODE_DATA_COLUMNS, Padding, observation_space
from prunegym.pruning.errors import PruningError

REAL, GROUPS = 3, 5
PADDING = Padding(groups=GROUPS, edges=60, bins=4)
SMALL: dict[str, Any] = {"width": 16, "heads": 2, "gat_layers": 1, "transformer_layers": 1}
Arrays = dict[str, NDArray[Any]]


def observe(seed: int = 0, padding: Padding = PADDING, real: int = REAL) -> Arrays:
    """A random observation whose last groups are padding."""
    space = observation_space(padding)
    space.seed(seed)
    observation = space.sample()
    observation["group_mask"][:] = np.arange(padding.groups) < real
    observation["node_mask"][:] = observation["group_mask"][:, None]
    observation["edge_mask"][:] = 1
    observation["prior"] *= observation["group_mask"]
    return observation


def batch_of(*observations: Arrays) -> dict[str, Tensor]:
    """A batch as stable-baselines3 makes it."""
    return {name: torch.as_tensor(np.stack([one[name] for one in observations])) for name in observations[0]}


def make_policy(padding: Padding = PADDING, *, trained: bool = False, **arguments: Any) -> PruningPolicy:
    """A small policy; `trained` gives it heads that say something."""
    torch.manual_seed(0)
    action_space = spaces.Box(-1.0, 1.0, (padding.groups,), np.float32)
    policy = PruningPolicy(observation_space(padding), action_space, lambda _: 1e-3, **{**SMALL, **arguments})
    if trained:
        for head in (policy.mean_head, policy.value_head):
            torch.nn.init.normal_(head.weight, std=0.3)
    return policy


class ShiftedPrior(gymnasium.Env[Arrays, NDArray[np.float32]]):
    """One step; the best action is the prior plus a constant."""

    shift = 0.3

    def __init__(self) -> None:
        self.observation_space = observation_space(PADDING)
        self.action_space = spaces.Box(-1.0, 1.0, (GROUPS,), np.float32)
        self.seen = observe()
        self.seen["prior"] *= 0.5

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Arrays, dict[str, Any]]:
        super().reset(seed=seed)
        return self.seen, {}

    def step(self, action: NDArray[np.float32]) -> tuple[Arrays, float, bool, bool, dict[str, Any]]:
        assert np.abs(action).max() <= 1
        miss = (action - self.seen["prior"] - self.shift)[:REAL]
        return self.seen, -float(np.square(miss).sum()), True, False, {}


def make_ppo(**arguments: Any) -> PPO:
    """PPO on the toy environment."""
    arguments = {"n_steps": 64, "batch_size": 64, "n_epochs": 4, "seed": 0, "device": "cpu", **arguments}
    return PPO(PruningPolicy, ShiftedPrior(), policy_kwargs=SMALL, **arguments)


def test_untrained_policy_is_the_prior_bit_for_bit() -> None:
    """Whatever the agent gains, it gains over the knapsack allocation."""
    observation = observe()

    action = make_policy().act(observation)

    assert np.array_equal(action, observation["prior"])


def test_untrained_policy_expects_nothing() -> None:
    """Values start at zero, the noise at its documented size."""
    policy = make_policy()

    assert policy.predict_values(batch_of(observe())).item() == 0
    assert policy.log_std.exp().item() == pytest.approx(0.15)


def test_log_probability_and_entropy_count_real_groups_only() -> None:
    """Compared with the formulas, with rubbish in the padding."""
    policy = make_policy(trained=True)
    observation = batch_of(observe())
    action = torch.full((1, GROUPS), 0.2)
    action[:, REAL:] = torch.nan

    _, log_prob, entropy = policy.evaluate_actions(observation, action)

    mean = policy.get_distribution(observation).mode()[0, :REAL].double()
    scaled = (0.2 - mean) / 0.15
    expected = (-0.5 * scaled.square() - math.log(0.15) - 0.5 * math.log(2 * math.pi)).sum()
    assert log_prob.item() == pytest.approx(expected.item(), rel=1e-5)
    assert entropy.item() == pytest.approx(REAL * (0.5 + 0.5 * math.log(2 * math.pi) + math.log(0.15)), rel=1e-5)


def test_samples_have_the_shared_deviation_and_leave_padding_alone() -> None:
    """Many actions for one state, in one batch."""
    policy = make_policy()
    policy.log_std.data.fill_(math.log(0.3))
    torch.manual_seed(1)

    actions, _, log_prob = policy(batch_of(*[observe()] * 2000))

    assert (actions[:, REAL:] == 0).all()
    assert actions[:, :REAL].std(dim=0).tolist() == pytest.approx([0.3] * REAL, rel=0.1)
    again = policy.evaluate_actions(batch_of(*[observe()] * 2000), actions)[1]
    torch.testing.assert_close(again, log_prob)


def test_gradients_pass_through_padding_that_is_not_a_number() -> None:
    """Zero times NaN is NaN, also on the way back."""
    mean = torch.zeros(1, 2, requires_grad=True)
    distribution = MaskedGaussian(mean, torch.tensor(0.0), torch.tensor([[True, False]]))

    distribution.log_prob(torch.tensor([[0.5, math.nan]])).sum().backward()

    assert mean.grad is not None
    assert mean.grad.tolist() == [[0.5, 0.0]]


def test_equal_observations_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Same results as one by one, for a fraction of the work."""
    policy = make_policy(trained=True)
    kinds = [observe(seed) for seed in range(3)]
    order = [2, 0, 2, 1, 0, 2]
    actions = torch.linspace(-1, 1, len(order) * GROUPS).view(len(order), GROUPS)
    alone = [policy.evaluate_actions(batch_of(kinds[kind]), actions[[i]]) for i, kind in enumerate(order)]
    encoded = []
    encode = policy.encoder.forward
    monkeypatch.setattr(policy.encoder, "forward", lambda few: encoded.append(len(few["nodes"])) or encode(few))

    together = policy.evaluate_actions(batch_of(*[kinds[kind] for kind in order]), actions)

    assert encoded == [3]
    for part, result in enumerate(together):
        torch.testing.assert_close(result, torch.cat([one[part] for one in alone]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["forward", "get_distribution", "predict_values"])
def test_every_entry_encodes_equal_observations_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts and updates alike."""
    policy = make_policy()
    encoded = []
    encode = policy.encoder.forward
    monkeypatch.setattr(policy.encoder, "forward", lambda few: encoded.append(len(few["nodes"])) or encode(few))

    getattr(policy, method)(batch_of(*[observe()] * 7))

    assert encoded == [1]


def test_gradients_of_equal_observations_add_up() -> None:
    """Sharing the work must not lose a row's share of the gradient."""
    policy = make_policy(trained=True)
    observation, action = batch_of(observe()), torch.zeros(1, GROUPS)
    three = {name: value.expand(3, *value.shape[1:]) for name, value in observation.items()}

    policy.evaluate_actions(observation, action)[1].sum().backward()
    alone = [value.grad.clone() for value in policy.encoder.parameters()]
    policy.zero_grad()
    policy.evaluate_actions(three, action.expand(3, -1))[1].sum().backward()

    for value, one in zip(policy.encoder.parameters(), alone, strict=True):
        torch.testing.assert_close(value.grad, 3 * one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("rows", "first", "kind"),
    [
        ([[1, 2]], [0], [0]),
        ([[1, 2], [1, 2], [1, 2]], [0], [0, 0, 0]),
        ([[3, 4], [1, 2], [3, 4], [2, 1]], [0, 1, 3], [0, 1, 0, 2]),
        ([[math.nan, 1], [math.nan, 1], [1, 1], [1, 1]], [0, 1, 2], [0, 1, 2, 2]),
    ],
)
def test_distinct_rows(rows: list[list[float]], first: list[int], kind: list[int]) -> None:
    """Rows are equal when all their parts are; a NaN equals nothing."""
    values = torch.tensor(rows)

    found = distinct_rows({"small": values[:, :1], "large": values[:, None, :].expand(-1, 3, -1)})

    assert [part.tolist() for part in found] == [first, kind]


def test_policy_acts_on_a_network_of_another_size() -> None:
    """No weight depends on the sizes: transfer needs nothing else."""
    policy = make_policy(trained=True)
    other = Padding(groups=11, edges=40, bins=6)
    there = make_policy(other)
    there.load_state_dict(policy.state_dict())

    action = policy.act(observe(3, other, real=11))

    assert action.shape == (11,)
    assert np.array_equal(there.act(observe(3, other, real=11)), action)


def test_actions_are_clipped_and_keep_their_shape() -> None:
    """One observation or a batch; a mean may lie outside."""
    policy = make_policy()
    policy.mean_head.bias.data.fill_(7.0)

    one = policy.act(observe())
    many, state = policy.predict(
        {name: value.numpy() for name, value in batch_of(observe(), observe(1)).items()}, deterministic=True
    )

    assert one.tolist() == [1, 1, 1, 0, 0]
    assert many.shape == (2, GROUPS)
    assert state is None


def test_prediction_switches_to_evaluation() -> None:
    """As stable-baselines3 promises."""
    policy = make_policy()
    policy.set_training_mode(True)

    policy.act(observe())

    assert not policy.encoder.training


@pytest.mark.parametrize("features", ["structure", "random"])
def test_ablations_do_not_see_data(features: str) -> None:
    """What depends on data may change as it likes."""
    policy = make_policy(trained=True, features=features)
    observation = observe()
    changed = {name: value.copy() for name, value in observation.items()}
    changed["nodes"][..., list(NODE_DATA_COLUMNS)] += 1
    changed["groups"][..., list(GROUP_DATA_COLUMNS)] += 1

    assert np.array_equal(policy.act(changed), policy.act(observation))
    assert not np.array_equal(make_policy(trained=True).act(changed), policy.act(observation))


@pytest.mark.parametrize(("features", "sees"), [("data", True), ("structure", True), ("random", False)])
def test_only_random_features_hide_the_structure_of_nodes(features: str, sees: bool) -> None:
    """The column after the data, the similarity of filters, is a matter of weights alone."""
    policy = make_policy(trained=True, features=features)
    observation = observe()
    changed = {**observation, "nodes": observation["nodes"].copy()}
    changed["nodes"][..., max(NODE_DATA_COLUMNS) + 1] += 1

    assert np.array_equal(policy.act(changed), policy.act(observation)) is not sees


def test_random_features_do_not_depend_on_padding() -> None:
    """A group keeps its noise in a larger observation."""
    policy = make_policy(trained=True, features="random")
    small = observe(0, Padding(groups=3, edges=60, bins=4))
    large = observe(0)
    for name, value in small.items():
        large[name][tuple(slice(size) for size in value.shape)] = value

    np.testing.assert_allclose(policy.act(large)[:3], policy.act(small), atol=1e-6)


def test_ppo_learns_the_toy_task() -> None:
    """The mean moves from the prior to where the reward is."""
    ppo = make_ppo(learning_rate=1e-3, n_epochs=10)

    ppo.learn(512)

    seen = ShiftedPrior().seen
    learned = (ppo.policy.act(seen) - seen["prior"])[:REAL]
    assert learned.tolist() == pytest.approx([ShiftedPrior.shift] * REAL, abs=0.1)


def test_ppo_trains_every_parameter_and_repeats_itself() -> None:
    """Two runs with one seed give the same weights; nothing is left at its start."""
    weights, again = (make_ppo().learn(128).policy.state_dict() for _ in range(2))
    untrained = make_ppo().policy.state_dict()
    same = [name for name, value in untrained.items() if torch.equal(value, weights[name])]

    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert same == []


def test_ppo_and_policy_survive_stable_baselines_own_files(tmp_path: Path) -> None:
    """Checkpoints of our own are made with PPO's `save`."""
    ppo = make_ppo()
    ppo.policy.mean_head.bias.data.fill_(0.1)
    ppo.save(tmp_path / "ppo")
    ppo.policy.save(str(tmp_path / "policy"))

    for policy in (
        PPO.load(tmp_path / "ppo", device="cpu").policy,
        PruningPolicy.load(str(tmp_path / "policy"), device="cpu"),
    ):
        assert np.array_equal(policy.act(observe()), ppo.policy.act(observe()))


def test_learning_rate_and_optimizer_arguments_arrive() -> None:
    """A flag has a test that it changes something."""
    default = make_policy().optimizer
    asked = make_policy(optimizer_class=torch.optim.SGD, optimizer_kwargs={"momentum": 0.5}).optimizer

    assert isinstance(default, torch.optim.Adam)
    assert (default.param_groups[0]["lr"], default.param_groups[0]["eps"]) == (1e-3, 1e-5)
    assert asked.param_groups[0]["momentum"] == 0.5


def test_correction_scale_multiplies_what_is_learned() -> None:
    """Half the scale, half the way from the prior."""
    observation = batch_of(observe())
    whole, half = make_policy(trained=True), make_policy(trained=True, correction_scale=0.5)

    corrections = [policy.get_distribution(observation).mode() - observation["prior"] for policy in (whole, half)]

    torch.testing.assert_close(corrections[0], 2 * corrections[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_sde": True}, "`use_sde` should be False"),
        ({"features": "structur"}, "`features` should be one of.*Did you mean 'structure'"),
        ({"width": 15}, "`width` should be a multiple of `heads`"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Argument, rule, value, remedy."""
    with pytest.raises(PruningError, match=message):
        make_policy(**arguments)


def test_spaces_of_other_environments_are_refused() -> None:
    """CartPole has no channel groups."""
    box = spaces.Box(-1.0, 1.0, (4,))

    with pytest.raises(PruningError, match="`observation_space` should be that of `ChannelPruning-v0`"):
        PruningPolicy(box, box, lambda _: 1e-3)
