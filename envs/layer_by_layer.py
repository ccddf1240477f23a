"""The episode of AMC: groups are pruned one after another, and the budget is kept by bounding each action."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget, Limit
from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph, ChannelGroup
from prunegym.pruning.widths import Widths

Counts: TypeAlias = NDArray[np.int64]
Scored: TypeAlias = Callable[[Counts], float]

FEATURES = (
    "index",  # t: position among the groups
    "outputs",  # n: channels of the group
    "inputs",  # c: channels that the layer which makes them reads
    "height",  # h and w: of that layer's input
    "width",
    "stride",
    "kernel",  # k
    "cost",  # FLOPs[t]: what the group alone can save, as a share of the unpruned cost
    "reduced",  # cost saved by the groups before, as a share
    "rest",  # what the groups after can save, as a share of what all can
    "last_action",  # a_{t-1}: pruning ratio of the group before, as carried out
)
MOST_PRUNED = 0.8
"""Highest pruning ratio of a group (AMC's bound for convolutions), unless the budget cannot be reached with it."""


class LayerByLayerEnv(gym.Env[NDArray[np.float32], NDArray[np.float32]]):
    """A trained network is pruned, one channel group per step.

    ## Description

    The environment of He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018,
    with its resource-constrained search. The groups are visited in the order in which the network makes them. Each
    action is bounded from above so that the budget stays within reach if all later groups are pruned as far as they
    may be (Algorithm 1 of the paper), and from below by a highest pruning ratio of 0.8. After the last group the plan
    is scored.

    From the paper: the order, the eleven features, the bounds, and a score of the pruned network without fine-tuning
    as the only reward. Our reading: what the paper does to layers is done to channel groups, whose geometry is that of
    the first layer that makes them; FLOPs are the budgeted resource, so that parameters and latency work alike; the
    highest pruning ratio gives way to the fewest channels a group may keep where the budget is out of reach otherwise;
    ratios are rounded to counts that a group may keep; and a plan that ends below its budget is projected onto it, as
    those of all searchers are.

    ## Action Space

    `Box(-1, 1, (1,), float32)`: the pruning ratio of the group, from 0 at -1 to 1 at 1.

    ## Observation Space

    `Box(0, 1, (11,), float32)`. The first eight are constants of the group, scaled by their least and greatest value
    in the network.

    | Index | Feature | Content | Min | Max |
    |---|---|---|---|---|
    | 0 | `index` | position among the groups | 0 | 1 |
    | 1 | `outputs` | channels of the group | 0 | 1 |
    | 2 | `inputs` | channels read by the layer that makes them | 0 | 1 |
    | 3 | `height` | of that layer's input | 0 | 1 |
    | 4 | `width` | of that layer's input | 0 | 1 |
    | 5 | `stride` | of that layer | 0 | 1 |
    | 6 | `kernel` | of that layer | 0 | 1 |
    | 7 | `cost` | what the group alone can save | 0 | 1 |
    | 8 | `reduced` | saved by the groups before, as a share of the unpruned cost | 0 | 1 |
    | 9 | `rest` | what the groups after can save, as a share of what all can | 0 | 1 |
    | 10 | `last_action` | pruning ratio of the group before, as carried out | 0 | 1 |

    ## Rewards

    0 before the last group, then the score of the recovered network on the reward split. `info` of the last step
    carries the score, the share of the cost kept, the counts and the plan.

    ## Starting State

    The unpruned network, or the widest one that bounds on widths allow, at its first group: always the same.

    ## Episode End

    `terminated` after the last group; never truncated, because the number of groups is part of the problem.

    ## Arguments

    - `problem`: network, scorer and budgets (:class:`prunegym.envs.setting.PruningProblem`).
    - `budget`: one of the problem's; by default the first.
    - `score`: scores counts `(groups,)` at the end; by default the problem's scorer does. For searchers that count.

    ## Version History

    - v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 (as Gymnasium declares it)

    def __init__(self, problem: PruningProblem, budget: Budget | None = None, *, score: Scored | None = None) -> None:
        budget = problem.budgets[0] if budget is None else budget
        if budget not in problem.limits:
            known = ", ".join(map(str, problem.budgets))
            raise PruningError(f"`budget` should be one of the problem's: {known}. Received {budget}.")
        self.problem = problem
        self.limit: Limit = problem.limits[budget]
        self._score = score or (lambda counts: problem.scorer.score(problem.plan(counts)).score)
        self.widths = self._widths()
        """Counts that each group may be pruned to."""
        self._choices = self.widths.choices()
        self._savings = self._own_savings()
        self._constants = self._scaled_constants()
        self.observation_space = spaces.Box(0, 1, (len(FEATURES),), np.float32)
        self.action_space = spaces.Box(-1, 1, (1,), np.float32)
        self._begin()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start again from the unpruned network, or the widest one allowed."""
        super().reset(seed=seed)
        self._begin()
        return self._observe(), {}

    def step(self, action: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Prune one group; after the last, score the plan."""
        action = np.asarray(action)
        if action.shape != (1,) or not np.isfinite(action).all():
            raise PruningError(f"`action` should be one finite number, of shape (1,). Received {action}.")
        keep = self.counts / self.problem.sizes
        keep[self._group] = 1 - (float(np.clip(action[0], -1, 1)) + 1) / 2
        asked = int(self.widths.nearest(keep)[self._group])
        self.counts[self._group] = min(asked, self.widest())
        self._last = 1 - float(self.counts[self._group] / self.problem.sizes[self._group])
        self._group += 1
        done = self._group == len(self.counts)
        reward, info = self._finish() if done else (0.0, {})
        # truncated is always False: the number of groups is part of the problem
        return self._observe(), reward, done, False, info

    def widest(self) -> int:
        """Most channels that the current group may keep, if all later ones are pruned as far as they may be."""
        counts = np.concatenate([self.counts[: self._group + 1], self.widths.smallest[self._group + 1 :]])
        allowed = self._choices[self._group]
        low, high = 0, len(allowed)
        while high - low > 1:
            middle = (low + high) // 2
            counts[self._group] = allowed[middle]
            low, high = (middle, high) if self.limit.holds(counts) else (low, middle)
        return int(allowed[low])

    def _begin(self) -> None:
        self.counts: Counts = self.widths.largest.copy()
        self._group = 0
        self._last = 0.0

    def _finish(self) -> tuple[float, dict[str, Any]]:
        counts = self.problem.project(self.counts / self.problem.sizes, self.limit)
        score = self._score(counts)
        cost = self.limit.fraction(counts)
        return score, {"score": score, "cost": cost, "counts": counts, "plan": self.problem.plan(counts)}

    def _observe(self) -> NDArray[np.float32]:
        # the observation after the last group is never acted on: it stays at that group
        group = min(self._group, len(self.counts) - 1)
        reduced = self.limit.fraction(self.widths.largest) - self.limit.fraction(self.counts)
        rest = self._savings[group + 1 :].sum() / max(self._savings.sum(), 1e-12)
        state = np.array([*self._constants[group], reduced, rest, self._last])
        clipped: NDArray[np.float32] = np.clip(state, 0, 1).astype(np.float32)
        return clipped

    def _widths(self) -> Widths:
        """The problem's, from what the highest pruning ratio leaves on, unless the budget is out of reach so."""
        least = np.ceil((1 - MOST_PRUNED) * self.problem.sizes - 1e-9).astype(np.int64)
        widths = self.problem.widths.at_least(least)
        return widths if self.limit.holds(widths.smallest) else self.problem.widths

    def _own_savings(self) -> NDArray[np.float64]:
        """What each group alone can save, as a share of the unpruned cost ``(groups,)``."""
        savings = np.zeros(len(self.problem.sizes))
        start = self.limit.fraction(self.widths.largest)
        for group, count in enumerate(self.widths.smallest):
            counts = self.widths.largest.copy()
            counts[group] = count
            savings[group] = start - self.limit.fraction(counts)
        return savings

    def _scaled_constants(self) -> NDArray[np.float64]:
        """The features that pruning does not change ``(groups, 8)``, scaled to [0, 1] over the groups."""
        graph = self.problem.scorer.network.graph
        rows = [[index, *_geometry(group, graph)] for index, group in enumerate(graph.groups)]
        table = np.column_stack([np.array(rows, dtype=np.float64), self._savings])
        low, high = table.min(axis=0), table.max(axis=0)
        scaled: NDArray[np.float64] = (table - low) / np.where(high > low, high - low, 1.0)
        return scaled


def _geometry(group: ChannelGroup, graph: ChannelGraph) -> list[int]:
    """Outputs, inputs, height, width, stride and kernel of the first layer that makes a group."""
    maker = next((one for one in graph.operations if one.module in group.producers), None)
    if maker is None:
        return [group.size, 0, 0, 0, 0, 0]
    picture = maker.input_shape[2:] if maker.kernel else ()
    height, width = (picture[0], picture[-1]) if picture else (1, 1)
    return [group.size, len(maker.inputs), height, width, max(maker.stride, default=1), max(maker.kernel, default=1)]
