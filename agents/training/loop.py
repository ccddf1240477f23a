"""Train a pruning agent on one network or several, on one or more workers.

An update collects ``update_evaluations`` episodes, each of which scores one plan, then learns from them and from the
best plans so far. Every update starts from seeds derived from the run's seed and its own number, and ends with a
checkpoint; the scores of an update that was interrupted are in the store of evaluations. So a run that was stopped at
any moment goes on to the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.evaluations.store import STORE, Clock, scorer_identity, stored
from prunegym.agents.policies.policy_file import save_policy
from prunegym.agents.policies.ppo import Episode
from prunegym.agents.run_folders.records import ATTENTION, attention_records
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import own_plan
from prunegym.agents.training.agent import make_agent
from prunegym.agents.training.checkpoint import load_checkpoint, save_checkpoint
from prunegym.agents.training.collector import Collector
from prunegym.agents.training.notes import Notes
from prunegym.agents.training.priors import take_priors
from prunegym.agents.training.result import TrainResult
from prunegym.agents.training.settling import FEWEST, SETTLING, SecondLooks, Start
from prunegym.agents.training.workers import AgentConfig, make_env, make_envs, shared_padding
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.prior import PRIORS, prior_key
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan

POLICY_FILE = "policy.safetensors"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
TIMING = "timing.csv"
"""Seconds stand apart from the metrics, which are the same for the same seed."""


def train(
    problems: Sequence[PruningProblem],
    config: AgentConfig,
    run: RunFolder,
    *,
    progress: bool = True,
    limit: TimeLimit = NO_LIMIT,
) -> TrainResult:
    """Train a policy on all problems at once.

    Args:
        problems: networks with their budgets.
        config: evaluations, rounds, workers, seed and the settings of PPO.
        run: where metrics, checkpoint, plans and policy go; a run folder with a checkpoint is resumed.
        progress: show a progress bar on standard error.
        limit: when to stop: after the evaluation under way, or with several workers or on a cluster after the update.

    Raises:
        PruningError: a worker died, or a loss became non-finite; what was learned is in the run folder.
        TimeUp: the limit is reached.
    """
    scorers = [problem.scorer for problem in problems]
    # scores of other processes are in no store: to stop within an update would lose those of that update
    per_score = limit if config.workers == 1 and config.ray is None else NO_LIMIT
    with stored(scorers, run.path(STORE), limit=per_score) as store:
        trainer = Trainer(problems, config, run, clock=store.clock, limit=limit)
        try:
            return trainer.run_all(progress)
        finally:
            trainer.close()


class Trainer:
    """A training run: environments, agent, metrics and checkpoints."""

    def __init__(
        self,
        problems: Sequence[PruningProblem],
        config: AgentConfig,
        run: RunFolder,
        *,
        clock: Clock | None = None,
        limit: TimeLimit = NO_LIMIT,
    ) -> None:
        self.problems = list(problems)
        self.pairs = [(problem, budget) for problem in self.problems for budget in problem.budgets]
        self.config = config
        self.folder = run
        self.limit = limit
        self.padding = shared_padding(self.problems)
        # before environments are made, which start from them
        trials = take_priors(self.pairs, config, run, begun=run.path(CHECKPOINT).exists())
        self.envs = make_envs(self.problems, config, self.padding)
        # rounded up: every worker plays the same number of whole episodes
        self.episodes = -(-config.update_evaluations // self.envs.num_envs) * self.envs.num_envs
        self.model = make_agent(config, self.envs, self.episodes, run.path("tensorboard"))
        self.update = 0
        self.clock = clock or Clock()
        self.notes = Notes(self.clock)
        self.notes.evaluations = self.trials = trials
        self.tick: Callable[[int], object] = lambda evaluations: None
        """Told of evaluations as they are made."""
        self._own_envs: dict[int, ChannelPruningEnv] = {}
        self._plan_updates()
        if run.path(CHECKPOINT).exists():
            self._resume()
        # a row whose checkpoint was never finished, be it the first, is written again
        for name in (METRICS, TIMING):
            run.truncate_rows(name, self.update)

    def _plan_updates(self) -> None:
        """Decide how far the evaluations go, and whether they last for second looks."""
        pairs = len(self.pairs)
        # an update scores its episodes and the policy's own plan for every network and budget
        self.per_update = self.episodes + pairs
        """Evaluations of an update, at most."""
        self.room = self.config.evaluations
        """Evaluations when the last update has ended, at most."""
        self.looks: SecondLooks | None = None
        self._looked = 0
        room = self.room - self.trials
        # where they cannot last, nothing is run to learn how many further images there are
        if self.config.imitation_steps and room // (self.per_update + 1) >= FEWEST:
            starts = [Start(self._env_of(problem), budget) for problem, budget in self.pairs]
            looks = SecondLooks(starts, self.model.memory, self.notes, self.episodes)
            with_looks = self.per_update + looks.count * looks.price
            turns = FEWEST * -(-pairs // max(looks.count, 1))
            if looks.count and (room - looks.kept) // with_looks >= turns:
                self.looks, self.per_update, self.room = looks, with_looks, self.room - looks.kept
                self.model.before_imitation = self._look_again

    @property
    def goes_on(self) -> bool:
        """Whether there are evaluations for another update; one there is always."""
        return self.update == 0 or self.notes.evaluations + self.per_update <= self.room

    def close(self) -> None:
        """End workers."""
        self.envs.close()

    def run_all(self, progress: bool) -> TrainResult:
        """Update until the evaluations are spent."""
        total, done = self.config.evaluations, self.notes.evaluations
        with tqdm(total=total, initial=done, desc="train", unit="plan", disable=not progress) as bar:
            self.tick = bar.update
            if not self.notes.own_trail:
                self._note_start()
            while self.goes_on:
                row = self.run_update()
                bar.set_postfix(best=f"{row['best']:.3f}", own=f"{row['own']:.3f}")
                self.limit.check()
            self._settle()
        return self._finish()

    def _note_start(self) -> None:
        """Note the plans that the policy makes before it has learned anything: they need no evaluation."""
        for problem, budget in self.pairs:
            self.notes.note_own(problem.key(budget), self._own_plan(problem, budget))

    def run_update(self) -> dict[str, Any]:
        """One PPO update, its row of metrics, and the checkpoint."""
        self._seed_update()
        self.model._last_obs = None  # begin with a reset, from the seeds just set
        self.model.progress = self._progress()
        self._looked = 0
        collector = Collector(self.model, self.tick)
        self.model.learn(
            self.episodes * self.config.episode_rounds, callback=collector, reset_num_timesteps=False, log_interval=1
        )
        self.notes.note_best(collector.infos)
        self.notes.evaluations += self.episodes
        self._spend(self._looked)
        own = self._score_own()
        self.update += 1
        row = {
            "update": self.update,
            "evaluations": self.notes.evaluations,
            "reward_mean": float(np.mean(collector.returns)),
            "reward_best": float(np.max(collector.returns)),
            "score_mean": float(np.mean([info["score"] for info in collector.infos])),
            "best": float(np.mean([one.score for one in self.notes.best.values()])),
            "own": own,
            "std": float(self.model.policy.log_std.detach().exp()),
        }
        if not np.isfinite(row["std"]):
            raise PruningError(
                f"`--learning-rate` should keep the policy finite. Received {self.config.learning_rate}, and its "
                f"weights became non-finite in update {self.update}. Lower it; the last checkpoint is kept."
            )
        seconds, updating = round(self.clock(), 3), round(self.model.policy_seconds, 3)
        self.folder.append_row(METRICS, row)
        self.folder.append_row(TIMING, {"update": self.update, "seconds": seconds, "update_seconds": updating})
        self.checkpoint()
        return row

    def _progress(self) -> float:
        """Share of the training that is done after this update: 1 in the last."""
        spent = self.notes.evaluations - self.trials + self.per_update
        room = self.room - self.trials
        whole = max(room // self.per_update, 1) * self.per_update
        return 1.0 if spent + self.per_update > room else min(spent / whole, 1.0)

    def _look_again(self) -> None:
        """Value what is about to be imitated on more images."""
        assert self.looks is not None
        self._looked += self.looks.take(self.update, self.model.elites_now)

    def _spend(self, evaluations: int) -> None:
        """Count evaluations."""
        self.notes.evaluations += evaluations
        self.tick(evaluations)

    def _settle(self) -> None:
        """Draw the policy to the plan that stood up best at a second look, or else scored best, until it makes it."""
        if not self.model.imitation_steps:
            return  # plain PPO was asked for
        self.model.progress = 1.0
        if self.looks is not None:
            self._spend(self.looks.at_the_end())
            for key, found in self.looks.chosen():
                self.notes.settle(key, found)
        for _ in range(SETTLING):
            self.limit.check()
            if self._makes_its_best():
                break
            self.model.imitate()
        save_policy(self.folder.path(POLICY_FILE), self.model.policy, metadata=self._metadata())

    def _seed_update(self) -> None:
        """Seeds of one update follow from the run's seed and the update's number alone: resuming needs no state."""
        sequence = np.random.SeedSequence([self.config.seed, self.update])
        streams = sequence.generate_state(self.envs.num_envs + 1)
        self.model.set_random_seed(int(streams[0]) % 2**31)
        # one seed per worker (SB3 would give them consecutive ones)
        self.envs._seeds = [int(value) % 2**31 for value in streams[1:]]

    def _makes_its_best(self) -> bool:
        """Note the policy's own plans, and tell whether they are its best ones; nothing needs to be scored for that."""
        same = True
        for problem, budget in self.pairs:
            key, plan = problem.key(budget), self._own_plan(problem, budget)
            best = self.notes.best[key]
            self.notes.note_own(key, plan, best.score if plan == best.plan else None)
            same = same and plan == best.plan
        return same

    def _score_own(self) -> float:
        """Score the policy's own plans on the reward split; they are evaluations too, and are remembered."""
        scores = []
        for problem, budget in self.pairs:
            episode, info = self._own_episode(problem, budget)
            self.notes.note_best([info])
            self.model.memory.add(episode)
            self._spend(1)
            scores.append(float(info["score"]))
        return float(np.mean(scores))

    def _own_episode(self, problem: PruningProblem, budget: Budget) -> tuple[Episode, dict[str, Any]]:
        env = self._env_of(problem)
        observation, _ = env.reset(options={"budget": budget})
        observations, actions, done = [], [], False
        value = 0.0
        info: dict[str, Any] = {}
        while not done:
            observations.append(observation)
            actions.append(self.model.policy.act(observation))
            observation, value, done, _, info = env.step(actions[-1])
        self.notes.note_own(problem.key(budget), info["plan"], float(info["score"]), self.notes.evaluations + 1)
        return Episode(observations, np.stack(actions), value), info

    def _env_of(self, problem: PruningProblem) -> ChannelPruningEnv:
        """The environment in which the policy plays without noise, made once."""
        key = id(problem)
        if key not in self._own_envs:
            self._own_envs[key] = make_env(problem, self.config, self.padding)
        return self._own_envs[key]

    def _own_plan(self, problem: PruningProblem, budget: Budget) -> PruningPlan:
        return own_plan(self.model.policy, self._env_of(problem), budget)

    def checkpoint(self) -> None:
        """Save policy and state, atomically."""
        save_policy(self.folder.path(POLICY_FILE), self.model.policy, metadata=self._metadata())
        state = {"update": self.update, "seconds": self.clock(), "identities": self._identities()}
        save_checkpoint(self.folder.path(CHECKPOINT), self.model, {**state, **self.notes.to_json()})

    def _resume(self) -> None:
        path = self.folder.path(CHECKPOINT)
        state = load_checkpoint(path, self.model)
        mine = self._identities()
        if state.get("identities", mine) != mine:  # checkpoints of earlier versions do not say
            raise PruningError(
                f"`--out` should hold a training of the same networks, weights and data. Received {path}, which is of "
                "others. Bring these back, or choose another folder."
            )
        self.update = int(state["update"])
        self.clock.catch_up(float(state["seconds"]))
        self.notes.restore(state)

    def _identities(self) -> list[str]:
        """What tells the networks, their data and how they are scored from others."""
        return [scorer_identity(problem.scorer) for problem in self.problems]

    def _metadata(self) -> dict[str, Any]:
        return {
            "networks": [problem.scorer.network.name for problem in self.problems],
            PRIORS: {prior_key(problem, budget): problem.priors[budget] for problem, budget in self.pairs},
            "budgets": sorted({str(budget) for problem in self.problems for budget in problem.budgets}),
            "rounds": self.config.episode_rounds,
            "recovery": self.config.recovery_name,
            "criterion": self.config.criterion,
            "evaluations": self.notes.evaluations,
            "seed": self.config.seed,
        }

    def _finish(self) -> TrainResult:
        notes = self.notes
        own = {problem.key(budget): self._own_plan(problem, budget) for problem, budget in self.pairs}
        for key, plan in own.items():
            notes.note_own(key, plan)
        best = {key: one.plan for key, one in notes.best.items()}
        plans = {"own": own, "best": best}
        content = {kind: {key: plan.to_json() for key, plan in found.items()} for kind, found in plans.items()}
        self.folder.write_json("plan.json", content)
        looked = [attention_records(self.model.policy, self._env_of(problem)) for problem in self.problems]
        self.folder.write_json(ATTENTION, [record for records in looked for record in records])
        return TrainResult(
            policy=self.folder.path(POLICY_FILE),
            evaluations=notes.evaluations,
            seconds=self.clock(),
            own=own,
            best=best,
            own_trail=notes.own_trail,
            best_trail=notes.best_trail,
        )
