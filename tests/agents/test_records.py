"""What commands keep for the report."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.run_folders.records import (
    ATTENTION,
    NETWORKS,
    PLANS,
    attention_records,
    note_plan,
    save_attention,
    save_networks,
)
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.prior import PRIORS
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.measuring import evaluate_network
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan


@pytest.fixture(scope="module")
def env(problem: PruningProblem) -> ChannelPruningEnv:
    """The environment of the trained digits network, in one round."""
    return ChannelPruningEnv(problem, rounds=1)


@pytest.fixture(scope="module")
def policy(env: ChannelPruningEnv) -> PruningPolicy:
    """A policy that has learned nothing, but looks somewhere."""
    torch.manual_seed(0)
    return PruningPolicy(env.observation_space, env.action_space, lambda _: 1e-3)


def test_attention_is_that_of_the_policy(policy: PruningPolicy, env: ChannelPruningEnv) -> None:
    """Between tokens as the encoder says; along edges summed from nodes to groups, here one edge after the other."""
    records = attention_records(policy, env)
    observation, _ = env.reset(options={"budget": str(env.problem.budgets[0])})
    seen = policy.attention(observation)
    count, bins = len(env.problem.sizes), observation["nodes"].shape[1]
    heard = np.zeros((count, count))
    for edge in range(int(observation["edge_mask"].sum())):
        source, target = observation["edges"][:, edge] // bins
        heard[target, source] += float(seen.edges[0, edge])

    assert [record["budget"] for record in records] == [str(budget) for budget in env.problem.budgets]
    np.testing.assert_allclose(records[0]["between"], seen.between[0], atol=1e-4)
    np.testing.assert_allclose(records[0]["links"], heard / heard.sum(axis=1, keepdims=True), atol=1e-4)
    assert records[0]["groups"] == [group.name for group in env.problem.scorer.network.graph.groups]


def test_shares_of_attention_sum_to_one(policy: PruningPolicy, problem: PruningProblem, tmp_path: Path) -> None:
    """As they are kept, rounded."""
    run = RunFolder(tmp_path)
    save_attention(policy, {PRIORS: {}, "rounds": 1}, [problem], run)

    for record in run.read_json(ATTENTION):
        for name in ("between", "links"):
            np.testing.assert_allclose(np.sum(record[name], axis=1), 1.0, atol=1e-2)


def test_networks_are_described_with_their_scores(problem: PruningProblem, tmp_path: Path) -> None:
    """Graph, cost, and what the unpruned network scores on how many images."""
    run, scorer = RunFolder(tmp_path), problem.scorer
    save_networks([problem], run)

    (record,) = run.read_json(NETWORKS)
    measured = evaluate_network(scorer.network.model, scorer.task, "selection")
    assert record["network"] == scorer.network.name
    assert record["macs"] == scorer.network.full_cost.macs
    assert [group["name"] for group in record["groups"]] == [group.name for group in scorer.network.graph.groups]
    assert record["unpruned"] == {"selection": {"score": measured.score, "examples": measured.examples}}


def test_networks_that_are_there_are_left_alone(problem: PruningProblem, tmp_path: Path) -> None:
    """A comparison that is continued with another network keeps what it has."""
    run = RunFolder(tmp_path)
    run.write_json(NETWORKS, [{"network": "another"}])
    save_networks([problem], run, ())
    save_networks([problem], run, ("selection",))

    names = [record["network"] for record in run.read_json(NETWORKS)]
    assert names == ["another", problem.scorer.network.name]
    assert run.read_json(NETWORKS)[1]["unpruned"] == {}


def test_plans_of_several_searchers_are_kept_side_by_side(
    problem: PruningProblem, random_plan: Callable[[PrunableNetwork, np.random.Generator], PruningPlan], tmp_path: Path
) -> None:
    """By searcher, network and budget; a later plan of the same takes the place of the earlier."""
    run, rng, budget = RunFolder(tmp_path), np.random.default_rng(0), problem.budgets[0]
    plans = [random_plan(problem.scorer.network, rng) for _ in range(3)]
    for searcher, plan in zip(("uniform", "policy", "uniform"), plans, strict=True):
        note_plan(run, searcher, problem, budget, plan)

    key = problem.key(budget)
    content = run.read_json(PLANS)
    assert {name: PruningPlan.from_json(one[key]) for name, one in content.items()} == {
        "uniform": plans[2],
        "policy": plans[1],
    }


def test_commands_keep_what_the_report_needs(pruning_runs: dict[str, Path]) -> None:
    """Channel graph and plans everywhere, attention where there is a policy, times of modules where it is measured."""
    for command, folder in pruning_runs.items():
        assert (folder / NETWORKS).is_file(), command
    for command in ("train", "evaluate", "prune"):
        assert (pruning_runs[command] / ATTENTION).is_file(), command
    assert set(RunFolder(pruning_runs["evaluate"]).read_json(PLANS)) == {"uniform", "knapsack", "policy"}
    times = RunFolder(pruning_runs["prune"]).read_json("result.json")["module_times"]
    assert times["after"]["kinds"]["convolution"] > 0
    assert any((pruning_runs["compare"] / "trainings").glob(f"*/{ATTENTION}"))
