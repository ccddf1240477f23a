"""LAASP against its definition."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.agents.searching.laasp import LOSS_EXAMPLES, POOL, Walk, laasp
from prunegym.agents.searching.search import SearchSettings
from prunegym.agents.searching.searchers import searcher_named
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer, ScorerSettings


@pytest.fixture(scope="module")
def finetuned_problem(loss_problem: PruningProblem) -> PruningProblem:
    """The toy with two training steps before a score."""
    settings = replace(loss_problem.scorer.settings, recovery="distill", recovery_steps=2, recovery_rate=0.01)
    network, task = loss_problem.scorer.network, loss_problem.scorer.task
    return PruningProblem(Scorer(network, task, settings), loss_problem.budgets)


def test_best_plan_of_the_toy_is_found(loss_problem: PruningProblem) -> None:
    """Of 512 plans, the one that keeps what reaches the output."""
    result = searcher_named("laasp")(loss_problem, loss_problem.budgets[0], SearchSettings(evaluations=40))

    assert loss_problem.scorer.network.counts(result.plan).tolist() == [6, 3, 4]
    assert result.evaluations <= 40


def test_each_step_takes_the_lowest_loss_of_all_groups_and_criteria(loss_problem: PruningProblem) -> None:
    """Step by step as the paper has it, by trying every width of every group with every criterion."""
    problem, scorer = loss_problem, loss_problem.scorer
    graph, budget = scorer.network.graph, Budget("macs", 0.4)
    problem = PruningProblem(scorer, (budget,))
    (limit,) = problem.limits.values()
    result = laasp(problem, budget, SearchSettings(evaluations=400))  # 19 steps, 21 for each

    left, spent = [set(range(8)) for _ in range(3)], 0

    def plan_of(kept: list[set[int]]) -> PruningPlan:
        pairs = zip(graph.groups, kept, strict=True)
        return PruningPlan(tuple((group.name, tuple(sorted(one))) for group, one in pairs))

    def cost(kept: list[set[int]]) -> float:
        return limit.value(np.array([len(one) for one in kept]))

    for steps in range(19, 0, -1):
        if cost(left) <= limit.most:
            break
        target = cost(left) - (cost(left) - limit.most) / steps
        offers: list[list[set[int]]] = []
        for group in range(3):
            fitting = [
                width
                for width in range(1, len(left[group]))
                if cost([*left[:group], set(range(width)), *left[group + 1 :]]) <= target
            ]
            for name in POOL if fitting else ():
                values = scorer.criterion_scores(name)[graph.groups[group].units]
                best = sorted(left[group], key=lambda unit: (-values[unit], unit))[: max(fitting)]
                offer = [*left[:group], set(best), *left[group + 1 :]]
                offers += [offer] if offer not in offers else []
        spent += len(offers)
        left = min(offers, key=lambda one: scorer.score(plan_of(one), split="train", examples=LOSS_EXAMPLES).loss)

    assert result.evaluations == spent + 1
    kept = dict(result.plan.kept)
    for group, expected in zip(graph.groups, left, strict=True):
        assert expected <= set(kept[group.name])  # what the last step took too much may come back


def test_groups_may_follow_different_criteria(digits_problem: PruningProblem) -> None:
    """Every criterion that would take other channels makes a candidate of its own."""
    problem, graph = digits_problem, digits_problem.scorer.network.graph
    walk = Walk(problem, retrains=False)
    offer = problem.sizes.copy()
    offer[1] //= 2
    masks = walk.candidates([offer])

    expected = {problem.plan(offer, problem.scorer.criterion_scores(name)).mask(graph).tobytes() for name in POOL}
    assert {mask.tobytes() for mask in masks} == expected
    assert len(expected) > 1


@pytest.fixture(scope="module")
def digits_problem(scorer: Scorer) -> PruningProblem:
    """The trained residual network."""
    return PruningProblem(scorer, (Budget("macs", 0.5),))


def test_what_went_last_comes_back_first(loss_problem: PruningProblem) -> None:
    """When the last step took too much."""
    walk = Walk(loss_problem, retrains=False)
    for gone in ([7, 6], [2]):
        mask = walk.mask.copy()
        mask[gone] = False
        walk.take(mask)

    order = walk.order[:8]
    assert order[[0, 1, 3, 4, 5]].min() > order[2] > max(order[6], order[7])


def test_retraining_goes_into_the_network_that_is_pruned_further(finetuned_problem: PruningProblem) -> None:
    """Cut again, it is the trained network; channels that went, and the network of the problem, are as they were."""
    walk, model = Walk(finetuned_problem, retrains=True), finetuned_problem.scorer.network.model
    mask = walk.mask.copy()
    mask[[1, 5, 9, 20]] = False
    walk.take(mask)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    loss = walk.loss(mask)
    walk.retrain()
    trained = walk._model.state_dict()

    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    changed = (trained["first.weight"] != before["first.weight"]).flatten(1).any(1)
    assert changed.tolist() == mask[:8].tolist()
    assert walk.loss(mask) < loss


def test_retraining_is_paid_for(finetuned_problem: PruningProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """One evaluation for each step, beside those of its candidates and of the plan."""
    losses, trainings = [], []
    real_loss, real_training = Walk.loss, Walk.retrain
    monkeypatch.setattr(Walk, "loss", lambda self, mask: losses.append(1) or real_loss(self, mask))
    monkeypatch.setattr(Walk, "retrain", lambda self: trainings.append(1) or real_training(self))
    result = laasp(finetuned_problem, finetuned_problem.budgets[0], SearchSettings(evaluations=26))

    assert trainings
    assert result.evaluations == len(losses) + len(trainings) + 1 <= 26


class Hybrid(nn.Module):
    """A mobile stem, depthwise, and attention over its pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.spatial = nn.Conv2d(8, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project, self.token_norm = nn.Conv2d(16, 8, 1), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norm(self.stem(x)))
        x = x + self.project(F.silu(self.spatial(F.silu(self.expand(x)))))
        tokens = x.flatten(2).mT
        seen = self.token_norm(tokens)
        tokens = tokens + self.attention(seen, seen, seen, need_weights=False)[0]
        tokens = tokens + self.down(F.gelu(self.up(tokens)))
        return self.head(tokens.mean(1))


@pytest.mark.parametrize("name", ["laasp", "dcpa", "attention"])
def test_hybrid_network_is_pruned(name: str, task_for: Callable[..., object]) -> None:
    """Convolutional stem and attention alike; the plan computes what its masked twin does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = PrunableNetwork(Hybrid().eval(), torch.randn(2, 3, 8, 8), name="hybrid")
    settings = ScorerSettings(precision="float32", statistics_examples=40, recovery_examples=40, examples=60)
    problem = PruningProblem(Scorer(network, task_for(network), settings), (Budget("macs", 0.6),))
    result = searcher_named(name)(problem, problem.budgets[0], SearchSettings(evaluations=30))

    stem = next(group.name for group in network.graph.groups if "spatial" in group.producers)
    assert problem.limit_of(result.plan, problem.budgets[0]).holds(network.counts(result.plan))
    assert network.check(result.plan) < 1e-4
    assert stem in result.plan.counts()
