"""The searches of a comparison, each made once and kept: plan, price and trail.

Below the run folder, ``searches/`` holds one folder per network, budget, searcher and seed, and ``trainings/`` one per
agent, from whose training several of the searchers come.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.evaluations.store import STORE, stored
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.runs import RunFolder, slug
from prunegym.agents.searching.latency_budget import within_measured_budget
from prunegym.agents.searching.searchers import WITHOUT_SEED, SearchResult, SearchSettings, searcher_named
from prunegym.agents.searching.second_look import has_further_images
from prunegym.agents.searching.stored_search import load_search, save_search
from prunegym.agents.searching.trail import Improvement
from prunegym.agents.training.loop import CHECKPOINT, POLICY_FILE, train
from prunegym.agents.training.result import TrainResult
from prunegym.envs.prior import take_prior
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.config import AGENTS, CompareConfig
from prunegym.experiments.comparison.controls import CONTROLS
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError

SEARCHES, TRAININGS = "searches", "trainings"
TRAINING = "training.json"


@dataclass(frozen=True)
class Found:
    """What a searcher came to, and where it is kept."""

    result: SearchResult
    folder: RunFolder

    @property
    def trail(self) -> list[Improvement]:
        """What the search would have returned from when on; ends with its plan."""
        result = self.result
        trail = list(result.improvements)
        if not trail or trail[-1].plan != result.plan:
            trail.append(Improvement(result.evaluations, result.seconds, result.plan))
        return trail


class Searches:
    """Finds plans, or reads them if they were found before.

    Args:
        config: Allowance, agents and seeds.
        run: The run folder.
        progress: Show bars.
        limit: When to stop.
    """

    def __init__(
        self, config: CompareConfig, run: RunFolder, *, progress: bool = False, limit: TimeLimit = NO_LIMIT
    ) -> None:
        self.config = config
        self.run = run
        self.progress = progress
        self.limit = limit
        self._warm: set[int] = set()

    def find(self, problem: PruningProblem, budget: Budget, searcher: str, seed: int) -> Found:
        """The plan of a searcher for one network and budget.

        Every search begins without remembered scores and pays for each of its own in seconds; what all share, the
        statistics of the unpruned network and the prepared images, is there before.

        Raises:
            PruningError: The plan breaks the budget, or the searcher lacks something.
        """
        network = problem.scorer.network.name
        before = self._stored(problem, budget, searcher, self.config.seeds[0])
        if before is not None and searcher in WITHOUT_SEED:
            return before
        before = self._stored(problem, budget, searcher, seed)
        if before is not None:
            return before
        result = self._agent(problem, budget, searcher, seed) if searcher in AGENTS else None
        result = result or self._search(problem, budget, searcher, seed)
        limit, counts = problem.limit_of(result.plan, budget), problem.scorer.network.counts(result.plan)
        if not limit.holds(counts):
            raise PruningError(
                f"`--searcher` {searcher} should keep the budget {budget}. Received a plan of "
                f"{limit.fraction(counts):.4f} on {network}. "
                "Please report this; until then leave the searcher out."
            )
        result = within_measured_budget(problem, budget, result)
        folder = self._folder(SEARCHES, searcher, network, budget, seed)
        save_search(result, folder)
        return Found(result, folder)

    def _search(self, problem: PruningProblem, budget: Budget, searcher: str, seed: int) -> SearchResult:
        """Let a searcher of the registry search, or repeat from its evaluations what it had searched before."""
        self._start_afresh(problem, budget)
        folder = self._folder(SEARCHES, searcher, problem.scorer.network.name, budget, seed)
        with stored([problem.scorer], folder.path(STORE), limit=self.limit) as store:
            settings = SearchSettings(
                evaluations=self.config.evaluations,
                seed=seed,
                policy=self.config.policy,
                progress=self.progress,
                clock=store.clock,
            )
            return searcher_named(searcher)(problem, budget, settings)

    def _agent(self, problem: PruningProblem, budget: Budget, searcher: str, seed: int) -> SearchResult:
        """What comes out of the training of an agent."""
        trained, folder = self.trained(problem, budget, seed, AGENTS[searcher])
        key = problem.key(budget)
        plan, trail = trained.own[key], trained.own_trail[key]
        if searcher == "agent best":
            plan, trail = trained.best[key], trained.best_trail[key]
        elif searcher in CONTROLS:
            policy, metadata = load_policy(folder.path(POLICY_FILE), device=problem.scorer.device)
            take_prior(problem, budget, metadata)
            plan, trail = CONTROLS[searcher](policy, problem, budget, int(metadata["rounds"]), seed), []
        return SearchResult(plan=plan, evaluations=trained.evaluations, seconds=trained.seconds, improvements=trail)

    def trained(
        self, problem: PruningProblem, budget: Budget, seed: int, features: str
    ) -> tuple[TrainResult, RunFolder]:
        """Train an agent on one network and budget, or go on with its training, or read what it came to."""
        network = problem.scorer.network.name
        folder = self._folder(TRAININGS, features, network, budget, seed)
        if not folder.path(TRAINING).exists():
            self._start_afresh(problem, budget)
            config = self.config.training(network, budget, seed, features)
            trained = train([problem.only(budget)], config, folder, progress=self.progress, limit=self.limit)
            folder.write_json(TRAINING, trained.to_json())
        folder.path(CHECKPOINT).unlink(missing_ok=True)  # megabytes, and of no more use
        return TrainResult.from_json(folder.read_json(TRAINING), folder.path(POLICY_FILE)), folder

    def _start_afresh(self, problem: PruningProblem, budget: Budget) -> None:
        """Forget all scores of plans, once the images have been prepared and the unpruned network has been scored."""
        if id(problem) not in self._warm:
            problem.uniform_score(budget)
            problem.scorer.unpruned()
            has_further_images(problem.scorer)
            self._warm.add(id(problem))
        problem.scorer.forget()

    def _folder(self, kind: str, name: str, network: str, budget: Budget, seed: int) -> RunFolder:
        return self.run.subfolder(kind).subfolder(folder_name(name, network, str(budget), seed))

    def _stored(self, problem: PruningProblem, budget: Budget, searcher: str, seed: int) -> Found | None:
        """A search that was finished before."""
        folder = self._folder(SEARCHES, searcher, problem.scorer.network.name, budget, seed)
        result = load_search(folder, problem.scorer.network.graph)
        return None if result is None else Found(result, folder)


def folder_name(name: str, network: str, budget: str, seed: int) -> str:
    """Name of the folder of a search, or of a training by what its policy sees."""
    # the names of searchers and budgets stay distinct without colons and blanks; those of networks may not
    parts = (re.sub("[: ]", "-", name), network, budget.replace(":", ""))
    return f"{'__'.join(map(slug, parts))}__s{seed}"
