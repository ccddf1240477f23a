"""LAASP: greedy pruning in which the loss chooses the layer and the criterion of every step."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunegym.agents.searching.netadapt import proposals
from prunegym.agents.searching.search import Counts, Search, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.copies import duplicate
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.importance.criteria import Context, Scores, unit_scores
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import recalibrate, train_steps
from prunegym.pruning.scoring import QUICK_STEPS
from prunegym.pruning.surgery import kept_indices, rebuilt, sliced_tensors
from prunegym.pruning.training import evaluate_network

POOL = ("l1", "l2", "fpgm", "taylor")
"""Criteria that a step chooses from."""
DECREMENTS = 20
"""Most steps down to the budget."""
LOSS_EXAMPLES = 500
"""Examples of the train split that a candidate's loss is measured on."""

Mask = NDArray[np.bool_]


def laasp(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Prune in equal steps of cost, each where and how the loss rises least.

    "LAASP", 2023, and its use on hybrid networks of convolutions and attention, ICCAS 2024: after each step the
    criterion, from a pool, and the layer are those whose pruning gives the lowest loss on a small subset of the
    training images; a short retraining follows each fixed decrement of MACs. So the pruning rate of each layer, and by
    which criterion it is pruned, come out of the search and need no setting.

    Our reading of the details: a candidate is one group that gives up a whole step by itself, as many channels as that
    takes, those that one criterion scores lowest; candidates that come to the same channels are one. Its loss is
    measured on the first images of the train split, after the recovery that all plans get. With a recovery that
    trains nothing, plans are scored after it. With `distill` candidates are cut out
    of the network as the step before left it and recalibrated; the one that is taken is trained for as many steps as
    every plan is before its score, and passes its weights on. The plan is scored from the unpruned network, as every
    searcher's.

    How it fits an allowance: each candidate counts as an evaluation, and so does each retraining. There are as many
    steps as the root of the allowance, at most 20, and each takes its share of what is left; where that is less than
    there are pairs of group and criterion, a random part of them is tried. What the last step takes too much is given
    back, those channels first that went last.

    The criteria are those of :data:`POOL`, whatever ``--criterion`` says: to choose among them is the method.
    """
    search = Search("laasp", problem, budget, settings, choosing=False)
    walk = Walk(problem, retrains=problem.scorer.settings.scoring == "distill")
    decrements = min(DECREMENTS, isqrt(search.left - 1))
    for left in range(decrements, 0, -1):
        share = (search.left - 1) // left - walk.retrains
        cost = search.limit.value(walk.counts)
        if share < 1 or search.limit.holds(walk.counts):
            break
        target = cost - (cost - search.limit.most) / left
        masks = walk.candidates(proposals(walk.counts, target, search.limit, problem.widths))
        if not masks:
            break
        if len(masks) > share:
            masks = [masks[index] for index in np.sort(search.rng.choice(len(masks), share, replace=False))]
        losses = []
        for mask in masks:
            search.pay()
            losses.append(walk.loss(mask))
        walk.take(masks[int(np.argmin(losses))])  # of equals the first
        if walk.retrains:
            search.pay()
            walk.retrain()
    search.score(search.project(walk.counts / problem.sizes), walk.order)
    return search.result()


class Walk:
    """What is left of a network on the way down.

    Args:
        problem: the network.
        retrains: whether weights are trained on the way.
    """

    def __init__(self, problem: PruningProblem, *, retrains: bool) -> None:
        self.problem, self.retrains = problem, retrains
        scorer = problem.scorer
        self._scorer, self._graph = scorer, scorer.network.graph
        # bounds on widths may forbid to keep everything
        self.mask: Mask = problem.plan(problem.widths.largest).mask(self._graph)
        """Units that are left ``(units,)``."""
        self._scores: Mapping[str, Scores] = {name: scorer.criterion_scores(name) for name in POOL}
        self._gone = np.zeros(self._graph.units)  # in which step each unit went; later = higher
        self._step = 0
        self._model = duplicate(scorer.network.model) if retrains else scorer.network.model

    @property
    def counts(self) -> Counts:
        """Channels left in each group ``(groups,)``."""
        return np.bincount(self._graph.group_of[self.mask], minlength=len(self._graph.groups))

    @property
    def order(self) -> Scores:
        """What units are kept by ``(units,)``: first those that are left, then those that went last."""
        rank = np.argsort(np.argsort(self._scorer.unit_scores, kind="stable")) / (2 * max(self._graph.units, 1))
        order: Scores = np.where(self.mask, self._step + 1, self._gone) + rank
        return order

    def candidates(self, offers: list[Counts]) -> list[Mask]:
        """What each criterion leaves where one group goes down to an offered count; each mask once.

        Args:
            offers: counts ``(groups,)`` that differ from those that are left in one group.
        """
        masks: dict[bytes, Mask] = {}
        for counts in offers:
            for index in np.flatnonzero(counts != self.counts).tolist():
                units = self._graph.groups[index].units
                for scores in self._scores.values():
                    left = np.where(self.mask[units], scores[units], -np.inf)
                    mask = self.mask.copy()
                    mask[units] = False
                    mask[units.start + np.argsort(-left, kind="stable")[: counts[index]]] = True
                    masks.setdefault(mask.tobytes(), mask)
        return list(masks.values())

    def loss(self, mask: Mask) -> float:
        """Loss of a candidate on training images; infinite where it is not finite."""
        plan = self._plan(mask)
        if self.retrains:
            model = self._cut(plan)
            loss = evaluate_network(
                model, self._scorer.task, "train", limit=LOSS_EXAMPLES, device=self._scorer.device
            ).loss
        else:
            loss = self._scorer.score(plan, split="train", examples=LOSS_EXAMPLES).loss
        return loss if np.isfinite(loss) else np.inf

    def take(self, mask: Mask) -> None:
        """Go down to a candidate."""
        self._step += 1
        self._gone[self.mask & ~mask] = self._step
        self.mask = mask

    def retrain(self) -> None:
        """Train what is left for a moment, and let the steps to come begin there."""
        scorer = self._scorer
        plan = self._plan(self.mask)
        smaller, settings = self._cut(plan), scorer.settings
        train_steps(
            smaller,
            scorer.task,
            steps=min(settings.recovery_steps, QUICK_STEPS),
            learning_rate=settings.recovery_rate,
            seed=settings.seed,
            form=scorer.form,
            device=scorer.device,
        )
        put_back(smaller, self._model, self._graph, self.mask)
        context = Context(self._model, self._graph, scorer.statistics, given=scorer.given, seed=settings.seed)
        # criteria by weights follow the weights; those by data are of the unpruned network throughout
        self._scores = {name: unit_scores(name, context) for name in POOL}

    def _plan(self, mask: Mask) -> PruningPlan:
        return PruningPlan.from_mask(self._graph, mask).without(self.problem.removed)

    def _cut(self, plan: PruningPlan) -> nn.Module:
        """The smaller network with the weights so far, recalibrated."""
        scorer, mask = self._scorer, plan.mask(self._graph)
        tensors = sliced_tensors(self._model, self._graph, mask)
        model = rebuilt(self._model, self._graph, mask, tensors, plan.removed)
        if scorer.settings.scoring != "none":
            examples = scorer.settings.recovery_examples
            batches = scorer.task.batches("calibration", batch_size=128, limit=examples, device=scorer.device)
            recalibrate(model, (inputs for inputs, _ in batches))
        return model


@torch.no_grad()
def put_back(smaller: nn.Module, model: nn.Module, graph: ChannelGraph, mask: Mask) -> None:
    """Write parameters and buffers of a pruned network into the unpruned one it was cut from, where they came from.

    Args:
        smaller: the pruned network; blocks that it lacks stay as they are.
        model: the unpruned network, changed in place.
        graph: its channel graph.
        mask: units that ``smaller`` has ``(units,)``.
    """
    kept = kept_indices(graph, mask)
    targets = dict([*model.named_parameters(), *model.named_buffers()])
    for name, tensor in [*smaller.named_parameters(), *smaller.named_buffers()]:
        target = targets[name]
        every = [np.arange(size) for size in target.shape]
        where = [kept.get((name, dim), every[dim]) for dim in range(target.ndim)]
        if target.ndim == 0:
            target.copy_(tensor)
        else:
            target[torch.meshgrid(*map(torch.from_numpy, where), indexing="ij")] = tensor
