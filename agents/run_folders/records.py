"""What commands leave in their run folder for the report: channel graphs, plans, and where a policy looked.

They are plain data, so that the report needs neither the network nor its images.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from prunegym.agents.inspect import inspect_network
from prunegym.agents.policies.encoder import GraphAttention
from prunegym.agents.policies.policy import Arrays, PruningPolicy
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.prior import take_prior
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.measuring import evaluate_network
from prunegym.pruning.plan import PruningPlan

NETWORKS = "networks.json"
"""The channel graph of each network of a run, and its scores before pruning."""
ATTENTION = "attention.json"
"""Where the policy looks before its first cut, for each network and budget."""
PLANS = "plan.json"
"""The plans of several searchers: searcher -> ``network budget`` -> plan."""
#: Digits that are kept of a weight; they are shares of 1.
_DIGITS = 4

Record: TypeAlias = dict[str, Any]


def save_networks(problems: Sequence[PruningProblem], run: RunFolder, splits: Sequence[str] = ("selection",)) -> None:
    """Describe the networks of a run in its folder; those that it holds already are left alone.

    Args:
        problems: The networks.
        run: The run folder, gets :data:`NETWORKS`.
        splits: Of these the unpruned networks' scores are kept.

    Raises:
        PruningError: The file could not be written.
    """
    known: list[Record] = run.read_json(NETWORKS) if run.path(NETWORKS).exists() else []
    names = {record["network"] for record in known}
    new = [problem for problem in problems if problem.scorer.network.name not in names]
    if new:
        run.write_json(NETWORKS, [*known, *(_network_record(problem, splits) for problem in new)])


def _network_record(problem: PruningProblem, splits: Sequence[str]) -> Record:
    scorer = problem.scorer
    measured = {
        split: evaluate_network(scorer.network.model, scorer.task, split, device=scorer.device) for split in splits
    }
    return {
        **inspect_network(scorer.network, latency=problem.latency, rules=problem.rules).to_json(),
        "data": scorer.task.name,
        "unpruned": {split: {"score": one.score, "examples": one.examples} for split, one in measured.items()},
    }


def note_plan(run: RunFolder, searcher: str, problem: PruningProblem, budget: Budget, plan: PruningPlan) -> None:
    """Keep a searcher's plan in the run folder, beside those that are there.

    Args:
        run: The run folder, gets :data:`PLANS`.
        searcher: Who made the plan.
        problem: The network.
        budget: What the plan was to keep.
        plan: The plan.

    Raises:
        PruningError: The file could not be written.
    """
    plans: Record = run.read_json(PLANS) if run.path(PLANS).exists() else {}
    plans.setdefault(searcher, {})[problem.key(budget)] = plan.to_json()
    run.write_json(PLANS, plans)


def save_attention(
    policy: PruningPolicy,
    metadata: Mapping[str, Any],
    problems: Iterable[PruningProblem],
    run: RunFolder,
    rounds: int | None = None,
) -> None:
    """Keep where a policy looks, on each network and budget, in the run folder.

    Args:
        policy: The policy.
        metadata: Of its file: rounds, and what it starts from.
        problems: Networks with their budgets.
        run: The run folder, gets :data:`ATTENTION`.
        rounds: Other rounds of pruning than the policy's.

    Raises:
        PruningError: The file could not be written.
    """
    envs = [ChannelPruningEnv(problem, rounds=rounds or int(metadata.get("rounds", 1))) for problem in problems]
    for env in envs:
        for budget in env.problem.budgets:
            take_prior(env.problem, budget, metadata)
    run.write_json(ATTENTION, [record for env in envs for record in attention_records(policy, env)])


def attention_records(policy: PruningPolicy, env: ChannelPruningEnv) -> list[Record]:
    """Where a policy looks in the first round of an environment, by budget.

    Returns:
        For each budget: network, budget, names of the ``groups``; ``between`` ``(1 + G, 1 + G)``, the share of its
        attention that each token of the transformer pays to each other, the first being the global token; ``links``
        ``(G, G)``, for each group the share of what its channels hear along the edges of the graph that comes from
        each other group.
    """
    network = env.problem.scorer.network
    names = [group.name for group in network.graph.groups]
    records = []
    for budget in env.problem.budgets:
        observation, _ = env.reset(options={"budget": budget})
        seen = policy.attention(observation)
        tokens = 1 + len(names)
        between = seen.between[0, :tokens, :tokens].double().cpu().numpy()
        links = _links_between_groups(observation, seen)[: len(names), : len(names)]
        records.append(
            {
                "network": network.name,
                "budget": str(budget),
                "groups": names,
                "between": between.round(_DIGITS).tolist(),
                "links": links.round(_DIGITS).tolist(),
            }
        )
    return records


def _links_between_groups(observation: Arrays, seen: GraphAttention) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Attention along edges, summed from bins to groups ``(groups, groups)``; rows are the groups that listen."""
    groups, bins = observation["node_mask"].shape
    source, target = observation["edges"] // bins  # (edges,)
    weights = seen.edges[0].double().cpu().numpy() * (observation["edge_mask"] > 0)
    table = np.zeros((groups, groups))
    np.add.at(table, (target, source), weights)
    # the edges into a bin sum to 1, so a row sums to the number of its bins that hear anything
    total: np.ndarray[Any, np.dtype[np.float64]] = table / np.maximum(table.sum(axis=1, keepdims=True), 1e-12)
    return total
