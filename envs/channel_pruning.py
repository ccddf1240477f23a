"""``prunegym/ChannelPruning-v0``: prune a trained network, one ratio per channel group."""

from __future__ import annotations

from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from prunegym.envs.actions import action_for, keep_ratios
from prunegym.envs.observation import EpisodeState, Observation, Observer, Padding, observation_space
from prunegym.envs.prior import KNAPSACK
from prunegym.envs.rewards import Outcome, RewardProfile, profile_named, reward
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import KINDS, Budget, Limit
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan

MODES = ("budgeted", "free")


class ChannelPruningEnv(gym.Env[Observation, NDArray[np.float32]]):
    """A trained network is pruned, one ratio per channel group.

    ## Description

    A trained network is pruned to a budget in a few rounds. In each round the agent sees the channel graph
    with fresh data-aware statistics and asks for one ratio per channel group; the ratios are projected onto
    the budget of the round, the least important channels go, and after the last round the recovered network
    is scored.

    ## Action Space

    `Box(-1, 1, (groups,), float32)`: a scaled logit of the share of channels each group keeps. -1 keeps the
    least allowed, 1 keeps all that is; components of padding groups are ignored.

    ## Observation Space

    A `Dict` of padded arrays; sizes are those of `padding`, by default those of this network.

    | Key | Shape | Content | Min | Max |
    |---|---|---|---|---|
    | `nodes` | `(groups, bins, 11)` | features of channels of neighbouring rank | -Inf | Inf |
    | `node_mask` | `(groups, bins)` | 1 for real nodes | 0 | 1 |
    | `edges` | `(2, edges)` | node numbers `group * bins + bin`, source and target | 0 | groups * bins - 1 |
    | `edge_features` | `(edges, 4)` | log strength; forward, backward or similar | -Inf | Inf |
    | `edge_mask` | `(edges,)` | 1 for real edges | 0 | 1 |
    | `groups` | `(groups, 25)` | geometry, cost shares, quantiles of criteria, what is left | -Inf | Inf |
    | `group_mask` | `(groups,)` | 1 for real groups | 0 | 1 |
    | `prior` | `(groups,)` | the action that gives the allocation to start from, by default the knapsack | -1 | 1 |
    | `state` | `(11,)` | budget, round, cost left, score of the unpruned network | -Inf | Inf |

    The features are listed in `prunegym.envs.observation`; `prunegym.envs.prior.choose_prior` tries what to start from.

    ## Rewards

    0 before the last round. Then the weighted terms of a named profile (`prunegym.envs.rewards`): by default
    the score of the recovered network on the reward split minus that of the uniform plan at the same budget.
    `info` carries the reward, every term of it, the score, MACs, parameters and the plan.

    ## Starting State

    The unpruned network. Where several budgets are given, `reset` draws one, or takes
    `options={"budget": "macs:0.5"}`.

    ## Episode End

    `terminated` after the last round; never truncated, because the number of rounds is part of the problem.

    ## Arguments

    - `problem`: network, scorer and budgets (:class:`prunegym.envs.setting.PruningProblem`).
    - `rounds`: steps of an episode; the budget of the rounds falls geometrically to the target.
    - `mode`: `budgeted` projects every action onto the budget; `free` takes it as it is.
    - `profile`: name of the reward profile; `improvement` when budgeted, `tradeoff` when free.
    - `padding`: sizes of the observation, to share it among networks.
    - `round_examples`: calibration examples for the statistics between rounds.

    ## Version History

    - v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(
        self,
        problem: PruningProblem,
        *,
        rounds: int = 1,
        mode: str = "budgeted",
        profile: str | None = None,
        padding: Padding | None = None,
        round_examples: int = 128,
    ) -> None:
        if rounds < 1:
            raise PruningError(f"`rounds` should be at least 1. Received {rounds}.")
        if mode not in MODES:
            raise PruningError(f"`mode` should be budgeted or free. Received {mode!r}.")
        self.problem = problem
        self.rounds = rounds
        self.mode = mode
        self.round_examples = round_examples
        self.profile: RewardProfile = profile_named(profile or ("improvement" if mode == "budgeted" else "tradeoff"))
        self._scorer = problem.scorer
        self._network = problem.scorer.network
        self._observer = Observer(self._network, self._scorer.statistics)
        own = self._observer.padding
        self.padding = own if padding is None else padding
        if own.covering(self.padding) != self.padding:
            raise PruningError(
                f"`padding` should hold {own.groups} groups, {own.edges} edges and {own.bins} bins of "
                f"{self._network.name}. Received {self.padding}. Use Padding.covering over all networks."
            )
        # Gymnasium types the values of a Dict as Any
        self.observation_space = cast("spaces.Space[Observation]", observation_space(self.padding))
        self.action_space = spaces.Box(-1, 1, (self.padding.groups,), np.float32)
        self._first: dict[Budget, Observation] = {}
        self._round_limits: list[Limit] = []

    @property
    def budget(self) -> Budget:
        """The budget of the current episode."""
        return self._budget

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start again from the unpruned network."""
        super().reset(seed=seed)
        asked = (options or {}).get("budget")
        if asked is None:
            self._budget = self.problem.budgets[int(self.np_random.integers(len(self.problem.budgets)))]
        else:
            self._budget = asked if isinstance(asked, Budget) else Budget.parse(asked)
            if self._budget not in self.problem.limits:
                known = ", ".join(map(str, self.problem.budgets))
                raise PruningError(f"`budget` should be one of this environment's: {known}. Received {asked}.")
        self._limit = self.problem.limits[self._budget]
        target = self._limit.most / self._limit.full
        self._round_limits = [self._limit.tightened(target ** ((i + 1) / self.rounds)) for i in range(self.rounds - 1)]
        self._round_limits.append(self._limit)
        self._round = 0
        self._counts = self.problem.sizes.copy()
        self._mask = np.ones(self._network.graph.units, dtype=np.bool_)
        self.plan = PruningPlan.unpruned(self._network.graph)
        self._statistics = self._scorer.statistics
        self._scores = self._scorer.unit_scores
        if self._budget not in self._first:
            self._first[self._budget] = self._observe()
        return {key: value.copy() for key, value in self._first[self._budget].items()}, {"budget": str(self._budget)}

    def step(self, action: NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Prune for one round; after the last, score the plan."""
        observation, done = self.prune(action)
        value, info = self._finish() if done else (0.0, {"counts": self._counts.copy()})
        # truncated is always False: the number of rounds is part of the problem
        return observation, value, done, False, info

    def prune(self, action: NDArray[np.float32]) -> tuple[Observation, bool]:
        """A round without scoring: what a trained policy needs to make its plan.

        Returns:
            The observation after the round, and whether it was the last.
        """
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise PruningError(
                f"`action` should have shape {self.action_space.shape}: one number per group. Received {action.shape}."
            )
        action = action[: len(self._counts)]
        if not np.isfinite(action).all():
            raise PruningError("`action` should be finite. Received NaN or infinity. Check the policy's weights.")
        self._counts = self._decode(keep_ratios(action))
        self.plan = self.problem.plan(self._counts, np.where(self._mask, self._scores, -np.inf))
        self._mask = self.plan.mask(self._network.graph)
        self._round += 1
        done = self._round == self.rounds
        if not done:
            self._look_again()
        return self._observe(done), done

    def _decode(self, keep: NDArray[np.float64]) -> NDArray[np.int64]:
        if self.mode == "budgeted":
            return self.problem.project(keep, self._round_limits[self._round], self._counts)
        return self.problem.widths.within(self._counts).nearest(keep)

    def value(self, examples: int | None = None) -> float:
        """Reward of the plan as it is now, on so many examples of the reward split; by default those of the scorer."""
        return reward(self.profile, self._outcome(examples))[0]

    def _finish(self) -> tuple[float, dict[str, Any]]:
        """Score the plan of the last round."""
        outcome = self._outcome()
        value, terms = reward(self.profile, outcome)
        cost = self.problem.costs.cost(self._counts)
        info = {
            "score": outcome.score,
            "loss": outcome.loss,
            "reward": value,
            "macs": cost.macs,
            "parameters": cost.parameters,
            "cost": outcome.cost,
            "network": self._network.name,
            "recovery": self._scorer.settings.recovery,
            "budget": str(self._budget),
            "counts": self._counts.copy(),
            "plan": self.plan,
            **{f"reward/{name}": term for name, term in terms.items()},
        }
        return value, info

    def _outcome(self, examples: int | None = None) -> Outcome:
        """What the plan costs, and what it scores beside what it is compared with."""
        score = self._scorer.score(self.plan, examples=examples)
        reference = self.problem.uniform_score(self._budget, examples)
        costs, latency = self.problem.costs, self.problem.latency
        return Outcome(
            score=score.score,
            loss=score.loss,
            reference_score=reference.score,
            reference_loss=reference.loss,
            unpruned_score=self._scorer.unpruned(examples=examples).score,
            cost=self._limit.fraction(self._counts),
            budget=self._limit.most / self._limit.full,
            macs=costs.cost(self._counts).macs / costs.full.macs,
            latency=1.0 if latency is None else latency.latency(self._counts) / latency.full,
        )

    def _look_again(self) -> None:
        """Recover the network of this round and measure it afresh."""
        self._statistics, self._scores = self._scorer.look(self.plan, self.round_examples)

    def _observe(self, done: bool = False) -> Observation:
        # the observation after the last round is never acted on: its allocations are those of that round
        limit = self._round_limits[min(self._round, self.rounds - 1)]
        largest = self._counts
        share = self.problem.priors.get(self._budget, KNAPSACK)
        prior = (
            self._counts if done else self.problem.prior_counts(limit, share, self._statistics.residual_taylor, largest)
        )
        uniform = self._counts if done else self.problem.uniform_counts(limit, largest)
        sizes = self.problem.sizes
        return self._observer.observe(
            EpisodeState(
                mask=self._mask,
                counts=self._counts,
                statistics=self._statistics,
                cost_slope=self._cost_slope(),
                prior=action_for(prior / sizes),
                uniform=action_for(uniform / sizes),
                state=self._global_features(limit),
            ),
            self.padding,
        )

    def _cost_slope(self) -> NDArray[np.float64]:
        """Share of the budgeted cost that each group's channels are worth, to first order ``(groups,)``."""
        slope = np.zeros(len(self._counts))
        current = self._limit.value(self._counts)
        for group, count in enumerate(self._counts):
            if count > 1:
                fewer = self._counts.copy()
                fewer[group] -= 1
                slope[group] = (current - self._limit.value(fewer)) / self._limit.full * count
        return slope

    def _global_features(self, limit: Limit) -> NDArray[np.float32]:
        target = self._limit.most / self._limit.full
        return np.array(
            [
                target,
                np.log(target),
                limit.most / limit.full,
                *(float(self._budget.kind == kind) for kind in KINDS),
                self._round / self.rounds,
                self._limit.fraction(self._counts),
                self._scorer.unpruned().score,
                np.log2(len(self._counts)) / 8,
                float(self._scorer.settings.scoring == "distill"),
            ],
            dtype=np.float32,
        )
