"""Train a pruning agent on one network or several, on one or more worker processes.

An update collects ``update_evaluations`` episodes, each of which scores one plan, then learns from them and from the
best plans so far. Every update starts from seeds derived from the run's seed and its own number, and ends with a
checkpoint: a run that was interrupted goes on to the same result.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from tqdm import tqdm

from prunegym.agents.checkpoint import load_checkpoint, save_checkpoint
from prunegym.agents.config import TrainConfig, TransferConfig
from prunegym.agents.policy import PruningPolicy
from prunegym.agents.policy_file import load_policy, save_policy
from prunegym.agents.ppo import Episode, PruningPPO
from prunegym.agents.records import ATTENTION, attention_records
from prunegym.agents.runs import RunFolder
from prunegym.agents.searchers import own_plan
from prunegym.agents.second_look import confirmed_plans
from prunegym.agents.settling import SETTLING, confirm, reserved
from prunegym.agents.trail import Improvement
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.observation import Observer, Padding
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan

AgentConfig: TypeAlias = TrainConfig | TransferConfig

POLICY_FILE = "policy.safetensors"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
TIMING = "timing.csv"
"""Seconds stand apart from the metrics, which are the same for the same seed."""


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What training left behind."""

    policy: Path
    evaluations: int
    seconds: float
    own: dict[str, PruningPlan] = field(default_factory=dict)
    """The policy's own plan, by ``network budget``."""
    best: dict[str, PruningPlan] = field(default_factory=dict)
    """The best plan that was sampled, by ``network budget``: a different result, reported apart."""
    own_trail: dict[str, list[Improvement]] = field(default_factory=dict)
    """The policy's own plan before the first update, and after each update that changed it."""
    best_trail: dict[str, list[Improvement]] = field(default_factory=dict)
    """The best sampled plan whenever that changed; those of one update all carry the seconds of its end."""


def train(
    problems: Sequence[PruningProblem], config: AgentConfig, run: RunFolder, *, progress: bool = True
) -> TrainResult:
    """Train a policy on all problems at once.

    Args:
        problems: networks with their budgets.
        config: evaluations, rounds, workers, seed and the settings of PPO.
        run: where metrics, checkpoint, plans and policy go; a run folder with a checkpoint is resumed.
        progress: show a progress bar on standard error.

    Raises:
        PruningError: a worker died, or a loss became non-finite; what was learned is in the run folder.
    """
    trainer = Trainer(problems, config, run)
    try:
        return trainer.run_all(progress)
    finally:
        trainer.close()


class Trainer:
    """A training run: environments, agent, metrics and checkpoints."""

    def __init__(self, problems: Sequence[PruningProblem], config: AgentConfig, run: RunFolder) -> None:
        self.problems = list(problems)
        self.config = config
        self.folder = run
        self.padding = shared_padding(self.problems)
        self.envs = make_envs(self.problems, config, self.padding)
        # rounded up: every worker plays the same number of whole episodes
        self.episodes = -(-config.update_evaluations // self.envs.num_envs) * self.envs.num_envs
        self.model = self._model()
        pairs = sum(len(problem.budgets) for problem in self.problems)
        # an update scores its episodes and the policy's own plan for every network and budget
        per_pair = config.evaluations // pairs
        self.updates = max(1, (config.evaluations - reserved(per_pair) * pairs) // (self.episodes + pairs))
        self.update = 0
        self.evaluations = 0
        self.seconds = 0.0
        self.best: dict[str, tuple[float, PruningPlan]] = {}
        self._own_envs: dict[int, ChannelPruningEnv] = {}
        self.own_trail: dict[str, list[Improvement]] = {}
        self.best_trail: dict[str, list[Improvement]] = {}
        self._resumed_at = time.perf_counter()
        if run.path(CHECKPOINT).exists():
            self._resume()

    def close(self) -> None:
        """End worker processes."""
        self.envs.close()

    def _model(self) -> PruningPPO:
        config = self.config
        start = None if config.policy is None else load_policy(config.policy, device=config.torch_device)[0]
        # a policy that is continued keeps what it was made to see
        features = start.features if start is not None else getattr(config, "features", "data")
        steps = self.episodes // self.envs.num_envs * config.rounds
        model = PruningPPO(
            PruningPolicy,
            self.envs,
            n_steps=steps,
            batch_size=steps * self.envs.num_envs,
            n_epochs=config.ppo_epochs,
            learning_rate=config.learning_rate,
            # an episode is a few rounds towards one score: nothing is discounted
            gamma=1.0,
            gae_lambda=1.0,
            seed=config.seed,
            device=config.torch_device,
            elites=config.elites,
            imitation_steps=config.imitation_steps,
            imitation_rate=config.imitation_rate,
            min_std=config.min_std,
            policy_kwargs={"features": features, "log_std_init": float(np.log(config.std))},
        )
        if start is not None:
            model.policy.load_state_dict(start.state_dict())
            with torch.no_grad():
                model.policy.log_std.fill_(float(np.log(config.std)))
        formats = ["tensorboard"] if config.tensorboard else []
        model.set_logger(configure(str(self.folder.path("tensorboard")), formats))
        return model

    def run_all(self, progress: bool) -> TrainResult:
        """Update until the evaluations are spent."""
        bar = tqdm(
            total=self.config.evaluations,
            initial=self.evaluations,
            desc="train",
            unit="plan",
            disable=not progress,
        )
        with bar:
            if not self.own_trail:
                self._note_start()
            while self.update < self.updates:
                before = self.evaluations
                row = self.run_update()
                bar.update(self.evaluations - before)
                bar.set_postfix(best=f"{row['best']:.3f}", own=f"{row['own']:.3f}")
            before = self.evaluations
            self._settle()
            bar.update(self.evaluations - before)
        return self._finish()

    def _note_start(self) -> None:
        """Note the plans that the policy makes before it has learned anything: they need no evaluation."""
        self._resumed_at = time.perf_counter()
        for problem in self.problems:
            for budget in problem.budgets:
                plan = own_plan(self.model.policy, problem, budget, self.config.rounds)
                key = f"{problem.scorer.network.name} {budget}"
                self.own_trail[key] = [Improvement(0, self._elapsed(), plan)]
        self.seconds = self._elapsed()

    def run_update(self) -> dict[str, Any]:
        """One PPO update, its row of metrics, and the checkpoint."""
        self._resumed_at = time.perf_counter()
        self._seed_update()
        self.model._last_obs = None  # begin with a reset, from the seeds just set
        self.model.progress = (self.update + 1) / self.updates
        collector = _Collector(self.model)
        self.model.learn(
            self.episodes * self.config.rounds, callback=collector, reset_num_timesteps=False, log_interval=1
        )
        self._note_best(collector.infos)
        self.evaluations += self.episodes
        own = self._score_own()
        self.update += 1
        self.seconds = self._elapsed()
        row = {
            "update": self.update,
            "evaluations": self.evaluations,
            "reward_mean": float(np.mean(collector.returns)),
            "reward_best": float(np.max(collector.returns)),
            "score_mean": float(np.mean([info["score"] for info in collector.infos])),
            "best": float(np.mean([score for score, _ in self.best.values()])),
            "own": own,
            "std": float(self.model.policy.log_std.detach().exp()),
        }
        if not np.isfinite(row["std"]):
            raise PruningError(
                f"`--learning-rate` should keep the policy finite. Received {self.config.learning_rate}, and its "
                f"weights became non-finite in update {self.update}. Lower it; the last checkpoint is kept."
            )
        self.folder.append_row(METRICS, row)
        self.folder.append_row(
            TIMING,
            {
                "update": self.update,
                "seconds": round(self.seconds, 3),
                "update_seconds": round(self.model.policy_seconds, 3),
            },
        )
        self.checkpoint()
        return row

    def _settle(self) -> None:
        """Look at the best plans again, and draw the policy to the one that stands up until it makes it."""
        if not self.model.imitation_steps:
            return  # plain PPO was asked for
        self._resumed_at = time.perf_counter()
        self.model.progress = 1.0
        self._confirm()
        for _ in range(SETTLING):
            self._score_own(remember=False)  # what has been chosen stays chosen
            if all(self.own_trail[key][-1].plan == plan for key, (_, plan) in self.best.items()):
                break
            self.model.imitate()
        self.seconds = self._elapsed()
        save_policy(self.folder.path(POLICY_FILE), self.model.policy, metadata=self._metadata())

    def _confirm(self) -> None:
        """Choose among the best plans of each network and budget on more images than the search has seen."""
        pairs = [(problem, budget) for problem in self.problems for budget in problem.budgets]
        count = confirmed_plans(self.config.evaluations // len(pairs))
        for problem, budget in pairs:
            env = self._env_of(problem)
            found = confirm(problem, budget, env, self.model.memory, count)
            if found is not None:
                self.evaluations += found.evaluations
                key = f"{problem.scorer.network.name} {budget}"
                self.best[key] = (found.score, found.plan)
                last = Improvement(self.evaluations, self._elapsed(), found.plan, found.score)
                _append_changed(self.best_trail.setdefault(key, []), last)

    def _elapsed(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return self.seconds + time.perf_counter() - self._resumed_at

    def _seed_update(self) -> None:
        """Seeds of one update follow from the run's seed and the update's number alone: resuming needs no state."""
        sequence = np.random.SeedSequence([self.config.seed, self.update])
        streams = sequence.generate_state(self.envs.num_envs + 1)
        self.model.set_random_seed(int(streams[0]) % 2**31)
        # one seed per worker (SB3 would give them consecutive ones)
        self.envs._seeds = [int(value) % 2**31 for value in streams[1:]]

    def _note_best(self, infos: list[dict[str, Any]]) -> None:
        for evaluations, info in enumerate(infos, start=self.evaluations + 1):
            key = f"{info['network']} {info['budget']}"
            if key not in self.best or info["score"] > self.best[key][0]:
                self.best[key] = (info["score"], info["plan"])
                found = Improvement(evaluations, self._elapsed(), info["plan"], float(info["score"]))
                self.best_trail.setdefault(key, []).append(found)

    def _score_own(self, remember: bool = True) -> float:
        """Score the policy's own plans on the reward split; they are evaluations too, and are remembered."""
        scores = []
        for problem in self.problems:
            for budget in problem.budgets:
                episode, info = self._own_episode(problem, budget)
                if remember:
                    self._note_best([info])
                    self.model.memory.add(episode)
                self.evaluations += 1
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
        found = Improvement(self.evaluations + 1, self._elapsed(), info["plan"], float(info["score"]))
        _append_changed(self.own_trail.setdefault(f"{info['network']} {info['budget']}", []), found)
        return Episode(observations, np.stack(actions), value), info

    def _env_of(self, problem: PruningProblem) -> ChannelPruningEnv:
        """The environment in which the policy plays without noise, made once."""
        key = id(problem)
        if key not in self._own_envs:
            self._own_envs[key] = make_env(problem, self.config, self.padding)
        return self._own_envs[key]

    def checkpoint(self) -> None:
        """Save policy and state, atomically."""
        save_policy(self.folder.path(POLICY_FILE), self.model.policy, metadata=self._metadata())
        save_checkpoint(
            self.folder.path(CHECKPOINT),
            self.model,
            {
                "update": self.update,
                "evaluations": self.evaluations,
                "seconds": self.seconds,
                "best": {key: [score, plan.to_json()] for key, (score, plan) in self.best.items()},
                "own_trail": _trail_to_json(self.own_trail),
                "best_trail": _trail_to_json(self.best_trail),
            },
        )

    def _resume(self) -> None:
        state = load_checkpoint(self.folder.path(CHECKPOINT), self.model)
        self.update = int(state["update"])
        self.evaluations = int(state["evaluations"])
        self.seconds = float(state["seconds"])
        self.best = {
            key: (float(score), PruningPlan.from_json(content)) for key, (score, content) in state["best"].items()
        }
        for name, trail in (("own_trail", self.own_trail), ("best_trail", self.best_trail)):
            for key, kept in state.get(name, {}).items():
                trail[key] = [Improvement.from_json(one) for one in kept]
        # a row whose checkpoint was never finished is written again
        for name in (METRICS, TIMING):
            self.folder.truncate_rows(name, self.update)

    def _metadata(self) -> dict[str, Any]:
        return {
            "networks": [problem.scorer.network.name for problem in self.problems],
            "budgets": sorted({str(budget) for problem in self.problems for budget in problem.budgets}),
            "rounds": self.config.rounds,
            "regime": self.config.regime,
            "criterion": self.config.criterion,
            "evaluations": self.evaluations,
            "seed": self.config.seed,
        }

    def _finish(self) -> TrainResult:
        own = {}
        for problem in self.problems:
            for budget in problem.budgets:
                key = f"{problem.scorer.network.name} {budget}"
                own[key] = own_plan(self.model.policy, problem, budget, self.config.rounds)
                last = Improvement(self.evaluations, self.seconds, own[key])
                _append_changed(self.own_trail.setdefault(key, []), last)
        plans = {
            "own": {key: plan.to_json() for key, plan in own.items()},
            "best": {key: plan.to_json() for key, (_, plan) in self.best.items()},
        }
        self.folder.write_json("plan.json", plans)
        looked = [attention_records(self.model.policy, self._env_of(problem)) for problem in self.problems]
        self.folder.write_json(ATTENTION, [record for records in looked for record in records])
        return TrainResult(
            policy=self.folder.path(POLICY_FILE),
            evaluations=self.evaluations,
            seconds=self.seconds,
            own=own,
            best={key: plan for key, (_, plan) in self.best.items()},
            own_trail=self.own_trail,
            best_trail=self.best_trail,
        )


class _Collector:
    """Keeps the infos of finished episodes and the returns of the rollout."""

    def __init__(self, model: PruningPPO) -> None:
        self.model = model
        self.infos: list[dict[str, Any]] = []

    def __call__(self, variables: dict[str, Any], _globals: dict[str, Any]) -> bool:
        """SB3 calls this after every step of the environments."""
        for info, done in zip(variables["infos"], variables["dones"], strict=True):
            if done:
                self.infos.append(info)
        return True

    @property
    def returns(self) -> list[float]:
        """Return of each episode of the last rollout."""
        return [episode.value for episode in self.model.last_episodes]


def _append_changed(trail: list[Improvement], found: Improvement) -> None:
    """Note the plan in force, if it is another than before."""
    if not trail or trail[-1].plan != found.plan:
        trail.append(found)


def _trail_to_json(trail: dict[str, list[Improvement]]) -> dict[str, Any]:
    return {key: [one.to_json() for one in kept] for key, kept in trail.items()}


def shared_padding(problems: Sequence[PruningProblem]) -> Padding:
    """Sizes of an observation that holds every problem's network."""
    paddings = [Observer(problem.scorer.network, problem.scorer.statistics).padding for problem in problems]
    result = paddings[0]
    for padding in paddings[1:]:
        result = result.covering(padding)
    return result


def make_env(problem: PruningProblem, config: AgentConfig, padding: Padding) -> ChannelPruningEnv:
    """The environment of one problem as the configuration asks."""
    return ChannelPruningEnv(
        problem, rounds=config.rounds, mode=config.mode, profile=config.reward, padding=padding
    )


def make_envs(problems: Sequence[PruningProblem], config: AgentConfig, padding: Padding) -> VecEnv:
    """Environments of all problems side by side: in this process, or in one process each for several workers."""
    copies = -(-config.workers // len(problems))
    chosen = [problem for problem in problems for _ in range(copies)]
    threads = max(1, torch.get_num_threads() // len(chosen)) if config.workers > 1 else None

    def factory(problem: PruningProblem) -> Callable[[], ChannelPruningEnv]:
        def make() -> ChannelPruningEnv:
            if threads is not None:
                torch.set_num_threads(threads)
            return make_env(problem, config, padding)

        return make

    factories: list[Callable[[], Any]] = [factory(problem) for problem in chosen]
    return DummyVecEnv(factories) if config.workers == 1 else SubprocVecEnv(factories)
