"""The attention of a policy as a criterion: that of the environment's observations, spread over channels."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

import prunegym
from prunegym.agents.policies.encoder_attention import EncoderAttention, with_ties_broken
from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.policies.policy_file import save_policy
from prunegym.commands.cli import main
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.observation import Observer, Padding, observation_space
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.importance.criteria import Context, unit_scores
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask

NAME = "encoder_attention"
FEW: dict[str, Any] = {"statistics_examples": 32, "recovery_examples": 32, "examples": 32, "precision": "float32"}


@pytest.fixture(scope="module")
def agent() -> PruningPolicy:
    """A small policy that attends unevenly."""
    torch.manual_seed(0)
    space, actions = observation_space(Padding(1, 1, 1)), spaces.Box(-1.0, 1.0, (1,), np.float32)
    policy = PruningPolicy(space, actions, lambda _: 0.0, width=16, heads=2, gat_layers=1, transformer_layers=1)
    torch.nn.init.normal_(policy.encoder.pooling.score.weight, std=2.0)
    return policy


@pytest.fixture(scope="module")
def policy_file(agent: PruningPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on disk, trained in two rounds."""
    path = tmp_path_factory.mktemp("policy") / "policy.safetensors"
    save_policy(path, agent, metadata={"rounds": 2})
    return path


@pytest.fixture(scope="module")
def problem(trained: PrunableNetwork, digits: ClassificationTask, agent: PruningPolicy) -> PruningProblem:
    """Whose channels are chosen by the attention of the agent."""
    given = {NAME: EncoderAttention(agent, trained)}
    scorer = Scorer(trained, digits, ScorerSettings(criterion=NAME, **FEW), given=given)
    return PruningProblem(scorer, (Budget.parse("macs:0.5"), Budget.parse("params:0.3")))


def node_attention(env: ChannelPruningEnv, agent: PruningPolicy, observation: Any) -> np.ndarray:
    """Attention of the node of each unit, from an observation of the environment ``(units,)``."""
    bin_of = Observer(env.problem.scorer.network, env.problem.scorer.statistics).bin_of
    return agent.attention(observation).bins[0].numpy().ravel()[bin_of]


def test_scores_are_ordered_by_the_attention_of_the_environments_nodes(
    problem: PruningProblem, agent: PruningPolicy
) -> None:
    """At the start and between rounds, whatever the budget: only channels of one node may be apart by less."""
    for budget in ("macs:0.5", "params:0.3"):
        env = ChannelPruningEnv(problem, rounds=2)
        observation, _ = env.reset(options={"budget": budget})
        for _ in range(2):
            attention = node_attention(env, agent, observation)
            for group in problem.scorer.network.graph.groups:
                left = env._mask[group.units]
                seen, scores = attention[group.units], env._scores[group.units]
                step = np.diff(np.unique(seen)).min()

                assert seen.std() > 0
                np.testing.assert_allclose(scores[left], seen[left], rtol=0, atol=step)
                assert (np.diff(seen[left][np.argsort(scores[left])]) >= 0).all()
            observation, _ = env.prune(observation["prior"])


def test_between_rounds_attention_is_that_of_the_pruned_network(problem: PruningProblem) -> None:
    """The encoder looks again; what is gone has nothing."""
    env = ChannelPruningEnv(problem, rounds=2)
    observation, _ = env.reset(options={"budget": "macs:0.5"})
    env.prune(observation["prior"])

    assert (env._scores != problem.scorer.unit_scores)[env._mask].any()
    assert (env._scores[~env._mask] == 0).all()


def test_equal_attention_is_decided_by_taylor() -> None:
    """And no other order is changed."""
    values, by = np.array([0.2, 0.5, 0.2, 0.2]), np.array([3.0, 0.0, 1.0, 2.0])

    scores = with_ties_broken(values, by)

    assert scores.argsort().tolist() == [2, 3, 0, 1]
    np.testing.assert_allclose(scores, values, atol=0.15)


def test_channels_of_one_node_are_ranked_by_taylor(trained: PrunableNetwork, problem: PruningProblem) -> None:
    """A group of 64 channels has 16 nodes."""
    scorer = problem.scorer
    bin_of = Observer(trained, scorer.statistics).bin_of
    shared = [np.flatnonzero(bin_of == node) for node in np.unique(bin_of)]

    assert any(len(units) > 1 for units in shared)
    for units in shared:
        assert (scorer.unit_scores[units].argsort() == scorer.statistics.taylor[units].argsort()).all()


def test_policy_is_asked_for(trained: PrunableNetwork, scorer: Scorer) -> None:
    """The message says where policies come from."""
    with pytest.raises(PruningError, match="needs a trained policy. Received none. .*`prunegym train`"):
        unit_scores(NAME, Context(trained.model, trained.graph, scorer.statistics))


def test_worker_processes_can_have_it(problem: PruningProblem, trained: PrunableNetwork) -> None:
    """It survives the way to another process."""
    scorer = problem.scorer
    criterion = pickle.loads(pickle.dumps(scorer.given[NAME]))

    context = Context(trained.model, trained.graph, scorer.statistics, given={NAME: criterion})

    assert (unit_scores(NAME, context) == scorer.unit_scores).all()


FLAGS = ["--network", "digits_vgg", "--criterion", NAME, "--device", "cpu", "--json"]
IMAGES = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32"]


def test_prune_takes_the_criterion_with_another_searcher(
    policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many channels stay as with Taylor scores, but not the same ones."""
    monkeypatch.setattr("prunegym.experiments.prune.measure_speed", lambda *_: [])
    kept = []
    for name, flags in (("a", ["--policy", str(policy_file)]), ("b", ["--criterion", "taylor"])):
        out = tmp_path / name
        arguments = [*FLAGS, *flags, *IMAGES, "--searcher", "knapsack", "--epochs", "0", "--out", str(out)]
        assert main(["prune", *arguments]) == 0, capsys.readouterr().err
        kept.append(json.loads((out / "plan.json").read_text())["kept"])

    assert [len(one) for one in kept[0].values()] == [len(one) for one in kept[1].values()]
    assert kept[0] != kept[1]


def test_evaluate_takes_the_criterion(policy_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For all searchers that are compared."""
    assert main(["evaluate", *FLAGS, *IMAGES, "--policy", str(policy_file), "--out", str(tmp_path)]) == 0

    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["searcher"] for row in rows] == ["uniform", "knapsack", "policy"]


@pytest.mark.parametrize("command", ["train", "evaluate", "prune"])
def test_criterion_without_policy_is_refused(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is computed, and the message says where to get one."""
    assert main([command, *FLAGS[:-1]]) == 2

    assert "`--policy` should be a policy file with --criterion encoder_attention" in capsys.readouterr().err


def test_python_face_takes_the_criterion(
    policy_file: Path, task_for: Callable[..., Any], toys: Callable[[str], PrunableNetwork]
) -> None:
    """With the policy that it is given."""
    network = toys("residual")
    few = {"statistics_examples": 16, "recovery_examples": 16, "reward_examples": 16, "device": "cpu"}

    result = prunegym.prune(
        network.model, task_for(network), searcher="uniform", policy=policy_file, criterion=NAME, **few
    )

    assert result.after.macs <= result.before.macs / 2
