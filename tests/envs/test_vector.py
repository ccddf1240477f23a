"""Environments on a Ray cluster: the same as here, also when actors and nodes die."""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.training.workers import check_device
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.cluster import connected, pack, unpack
from prunegym.envs.setting import PruningProblem
from prunegym.envs.worker import Worker
from prunegym.pruning.budget import Budget
from prunegym.pruning.datasets.image_sets import MemoryImages, Preparation
from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.user_code import user_code_by_value
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.scoring import Scorer

# Ray leaves sockets and log files to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore")

BUDGETS = tuple(map(Budget.parse, ("macs:0.5", "macs:0.3")))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the actors have: sums of more threads are rounded differently."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def both(scorer: Scorer) -> PruningProblem:
    """The trained digits network at two budgets, of which `reset` draws one."""
    return PruningProblem(scorer, BUDGETS)


def play(env: VecEnv, steps: int, during: Callable[[int], None] = lambda step: None) -> list[Any]:
    """Observations and results of some steps with random actions; ``during`` is called while they are computed."""
    rng = np.random.default_rng(0)
    env._seeds = list(range(5, 5 + env.num_envs))
    seen: list[Any] = [env.reset()]
    for step in range(steps):
        env.step_async(rng.uniform(-1, 1, (env.num_envs, *env.action_space.shape)).astype(np.float32))
        during(step)
        observations, rewards, dones, infos = env.step_wait()
        kept = [(one.get("score"), one.get("plan"), one.get("budget")) for one in infos]
        seen += [observations, rewards.tolist(), dones.tolist(), kept]
    return seen


def assert_same(one: list[Any], other: list[Any]) -> None:
    """Bit by bit."""
    for left, right in zip(one, other, strict=True):
        if isinstance(left, dict):
            assert left.keys() == right.keys()
            assert all(np.array_equal(left[name], right[name]) for name in left)
        else:
            assert left == right


def test_worker_does_again_what_another_did(both: PruningProblem) -> None:
    """From the start and the actions of an episode that began without a seed."""
    rng = np.random.default_rng(0)
    make = partial(ChannelPruningEnv, rounds=2)
    first, second = (Worker(pack(both), pack(make), torch.get_num_threads()) for _ in range(2))
    first.reset(3, {})
    actions = [rng.uniform(-1, 1, first.env.action_space.shape).astype(np.float32) for _ in range(4)]
    *_, begun = [first.step(action) for action in actions[:2]][-1]
    _, start = begun

    results = [first.step(action) for action in actions[2:]]
    again = second.replay(start, actions[2:])

    assert start[0] is None
    assert again[1:3] == results[-1][1:3]
    assert again[3]["plan"] == results[-1][3]["plan"]
    assert np.array_equal(again[0]["nodes"], results[-1][0]["nodes"])
    assert again[4][1] == results[-1][4][1]  # and the next episode begins alike


def test_packed_problem_scores_the_same(both: PruningProblem) -> None:
    """What arrives on a node is what was sent."""
    plan = both.plan(both.uniform_counts(both.limits[BUDGETS[0]]))

    assert unpack(pack(both)).scorer.run(plan) == both.scorer.run(plan)


def images(count: int) -> MemoryImages:
    """Random images of 1 KiB."""
    pixels = torch.randint(0, 255, (count, 1, 32, 32), dtype=torch.uint8)
    return MemoryImages(pixels, torch.zeros(count), np.arange(count), Preparation((0.5,), (0.5,), 0, False))


def test_images_are_shared_and_not_copied() -> None:
    """They are kept apart, where Ray maps them into memory; batches are the same."""
    sent = images(1100)
    packed = pack([sent, sent])

    arrived = unpack(packed)

    assert [one.nbytes for one in packed.shared] == [1100 * 1024]
    assert packed.content.nbytes < 100_000
    assert np.shares_memory(arrived[0]._images.numpy(), packed.shared[0])
    assert arrived[0] is arrived[1]
    assert torch.equal(next(arrived[0].batches(20))[0], next(sent.batches(20))[0])


def test_what_may_be_written_to_is_copied() -> None:
    """Weights, statistics and small arrays."""
    value = {"few": images(10)._images, "weights": torch.zeros(10**6), "array": np.zeros(10**6)}
    packed = pack(value)

    arrived = unpack(packed)
    arrived["weights"] += 1
    arrived["array"] += 1

    assert not packed.shared
    assert value["weights"].sum() == value["array"].sum() == 0


def test_network_of_a_users_file_goes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else can import it, nor what stands beside it."""
    (tmp_path / "beside_it.py").write_text("from torch import nn\nclass Layer(nn.Linear):\n    pass\n")
    (tmp_path / "mine.py").write_text(
        "from beside_it import Layer\nfrom torch import nn\n"
        "class Mine(nn.Sequential):\n    pass\n"
        "def build():\n    return Mine(nn.Flatten(), Layer(4, 3))\n"
    )
    model = build_network(f"{tmp_path / 'mine.py'}:build")
    packed = pack(model)
    for name in [name for name in sys.modules if name == "beside_it" or name.startswith("prunegym_user_mine")]:
        monkeypatch.delitem(sys.modules, name)

    arrived = unpack(packed)

    assert torch.equal(arrived(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_modules_are_sent_by_name_afterwards(tmp_path: Path) -> None:
    """The exception is for what is packed, not for good."""
    import cloudpickle

    before = cloudpickle.list_registry_pickle_by_value()
    with user_code_by_value():
        pass

    assert cloudpickle.list_registry_pickle_by_value() == before


def test_missing_ray_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is computed."""
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(PruningError, match=r"Run: pip install 'prunegym\[ray\]'"):
        TrainConfig(network=("digits_vgg",), ray="auto")


def test_graphics_cards_are_refused_with_a_remedy() -> None:
    """They would have to be shared out among the workers."""
    with pytest.raises(PruningError, match=r"`--device` should be cpu with --ray.*Write --device cpu"):
        check_device(torch.device("cuda"))


class Failing(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Breaks in its first step."""

    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, _part: object) -> None:
        super().__init__()

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: NDArray[np.float32]) -> Any:
        raise PruningError("`action` should be another. Received this one. Give another.")


@pytest.fixture
def ray_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray on this machine alone, as small as it gets."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # else actors wait for whatever a busy machine does
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield ray
    ray.shutdown()


def test_actor_that_is_killed_is_replaced_without_a_trace(both: PruningProblem, ray_here: Any) -> None:
    """In the middle of an episode that began without a seed: observations, rewards and plans are those of here."""
    from prunegym.envs.vector import RayVecEnv

    make = partial(ChannelPruningEnv, rounds=2)
    env = RayVecEnv([both], make)

    seen = play(env, 5, lambda step: ray_here.kill(env._actors[0]) if step == 3 else None)

    assert env.replaced == 1
    assert_same(seen, play(DummyVecEnv([partial(make, both)]), 5))
    assert env.get_attr("rounds") == [2]
    env.close()


def test_actor_that_gets_no_processor_of_its_own_shares_one(
    both: PruningProblem, ray_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that others took after it was counted as free: nobody waits for it for ever."""
    from prunegym.envs import vector

    other = ray_here.remote(num_cpus=1)(vector.Worker).remote(None, None, 1)
    monkeypatch.setattr(vector, "_free_processors", lambda ray: 1)
    monkeypatch.setattr(vector, "PATIENCE", 1.0)

    env = vector.RayVecEnv([both], partial(ChannelPruningEnv, rounds=2))

    assert env.get_attr("rounds") == [2]
    assert env.replaced == 0
    env.close()
    ray_here.kill(other)


@pytest.mark.slow
def test_actor_and_node_that_are_killed_cost_no_evaluation(
    both: PruningProblem, ray_cluster: Callable[[], Any]
) -> None:
    """Three environments on two nodes: the same as here, in whatever step they die."""
    from prunegym.envs.vector import RayVecEnv

    make = partial(ChannelPruningEnv, rounds=2)
    nodes = ray_cluster()
    env = RayVecEnv([both] * 3, make, address=nodes.address)

    def during(step: int) -> None:
        if step == 1:  # the step in which plans are scored
            env._ray.kill(env._actors[1])
        if step == 4:
            nodes.remove_node(nodes.second, allow_graceful=False)

    seen = play(env, 6, during)
    env.close()

    assert env.replaced >= 2
    assert_same(seen, play(DummyVecEnv([partial(make, both)] * 3), 6))


@pytest.mark.slow
def test_error_of_an_environment_comes_back_as_it_is(ray_cluster: Callable[[], Any]) -> None:
    """Without the report of the node, and without being tried again."""
    from prunegym.envs.vector import RayVecEnv

    env = RayVecEnv([None], Failing, address=ray_cluster().address)
    env.reset()

    with pytest.raises(PruningError, match="`action` should be another"):
        env.step(np.zeros((1, 1), np.float32))
    assert env.replaced == 0
    env.close()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_cluster_that_is_not_there_is_refused_with_a_remedy(address: str) -> None:
    """One error that says how to start one."""
    pytest.importorskip("ray")
    with (
        pytest.raises(PruningError, match=r"`--ray` should be the address of a running cluster.*`ray start --head`"),
        connected(address),
    ):
        pass
