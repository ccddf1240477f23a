"""What the policy of a training starts from, decided once for the whole run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.training.workers import AgentConfig
from prunegym.envs.prior import PRIORS, TRIALS, take_prior
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

PRIORS_FILE = "priors.json"
"""What the policy starts from, by network and budget, and the evaluations that finding out took."""


def take_priors(
    pairs: Sequence[tuple[PruningProblem, Budget]], config: AgentConfig, run: RunFolder, *, begun: bool
) -> int:
    """Let the problems start from what the run has decided before, or decide it.

    A policy that is trained further keeps its own start. Where the allowance does not hold the trials beside an update,
    a new policy starts from the knapsack, untried.

    Args:
        pairs: Networks and budgets of the training.
        config: Policy to go on with, and the allowance.
        run: The run folder, gets :data:`PRIORS_FILE`.
        begun: Whether the training has been begun: without that file, by an earlier version, from the knapsack.

    Returns:
        The evaluations that this counts for, in the whole run.

    Raises:
        PruningError: The policy file is damaged, or the file could not be written.
    """
    if run.path(PRIORS_FILE).exists():
        kept = run.read_json(PRIORS_FILE)
        for problem, budget in pairs:
            problem.priors[budget] = kept[PRIORS][problem.key(budget)]
        return int(kept["trials"])
    metadata: Mapping[str, Any] = {PRIORS: {}} if config.policy is None else load_policy(config.policy)[1]
    least = config.update_evaluations + len(pairs) * (1 + TRIALS)
    if begun or (config.policy is None and config.evaluations < least):
        metadata = {"networks": [problem.scorer.network.name for problem, _ in pairs]}  # as of an earlier version
    trials = sum(take_prior(problem, budget, metadata) for problem, budget in pairs)
    priors = {problem.key(budget): problem.priors[budget] for problem, budget in pairs}
    run.write_json(PRIORS_FILE, {PRIORS: priors, "trials": trials})
    return trials
