"""DCP-A: what it finds where the best is known, what it pays, and that it leaves the network alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.agents.searching.dcpa import BATCH, SoftChoice, dcpa, train
from prunegym.agents.searching.layer_attention import candidate_counts, gumbel_softmax
from prunegym.agents.searching.search import SearchSettings, evaluations_per_step
from prunegym.agents.searching.searchers import searcher_named
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.scoring import Recovery, Scorer, ScorerSettings
from prunegym.pruning.widths import Bound, WidthRules

BEST = [6, 3, 4]


@pytest.mark.parametrize("seed", [0, 2])
def test_best_plan_of_the_toy_is_found(loss_problem: PruningProblem, seed: int) -> None:
    """Of 512 plans, the one that keeps what reaches the output; not every seed finds it in so few steps."""
    problem = loss_problem
    settings = replace(problem.scorer.settings, examples=1000)
    scorer = Scorer(problem.scorer.network, problem.scorer.task, settings)
    result = searcher_named("dcpa")(
        PruningProblem(scorer, problem.budgets), problem.budgets[0], SearchSettings(evaluations=40, seed=seed)
    )

    assert problem.scorer.network.counts(result.plan).tolist() == BEST
    assert result.evaluations == 40


@pytest.mark.parametrize("kind", ["params", "latency"])
def test_costs_in_steps_are_learned_by_their_slope(loss_problem: PruningProblem, kind: str) -> None:
    """A latency that is the MACs, and parameters, lead to a plan within the budget that beats the uniform one."""

    class Proportional:
        """Seconds as MACs."""

        full = float(loss_problem.scorer.network.full_cost.macs)

        def latency(self, counts: np.ndarray) -> float:
            return float(loss_problem.costs.macs(counts))

    budget = Budget(kind, 0.35)
    problem = PruningProblem(loss_problem.scorer, (budget,), Proportional() if kind == "latency" else None)
    result = searcher_named("dcpa")(problem, budget, SearchSettings(evaluations=300))

    score = problem.scorer.score(result.plan).score
    assert problem.limits[budget].holds(problem.scorer.network.counts(result.plan))
    assert score > problem.uniform_score(budget).score


@pytest.mark.parametrize(
    "rules",
    [
        WidthRules(align=4),
        WidthRules(min_channels=3),
        WidthRules(bounds=(Bound.parse("first=..0.5"), Bound.parse("third=0.5"))),
        WidthRules(align=2, bounds=(Bound.parse(".*=0.25..0.75"),)),
    ],
)
def test_rules_of_widths_hold(loss_problem: PruningProblem, rules: WidthRules) -> None:
    """Also of the candidates that groups choose from."""
    budget = Budget("macs", 0.5)
    problem = PruningProblem(loss_problem.scorer, (budget,), rules=rules)
    result = searcher_named("dcpa")(problem, budget, SearchSettings(evaluations=12))

    counts = problem.scorer.network.counts(result.plan)
    assert problem.widths.allow(counts).all()
    assert problem.limits[budget].holds(counts)
    for choices, candidates in zip(problem.widths.choices(), candidate_counts(problem), strict=True):
        assert set(candidates.tolist()) <= set(choices.tolist())
        assert candidates[[0, -1]].tolist() == choices[[0, -1]].tolist()


class Block(nn.Module):
    """An identity shortcut around two layers."""

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.inner, self.outer = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        with torch.no_grad():
            self.outer.weight *= strength
            self.outer.bias *= strength

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.outer(F.relu(self.inner(x))))


class Deep(nn.Module):
    """Three blocks, of which the second does next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 5)
        self.blocks = nn.Sequential(Block(3.0), Block(0.001), Block(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def deep_problem(loss_problem: PruningProblem) -> PruningProblem:
    """A budget that the network without its idle block costs exactly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Deep().eval()
    network = PrunableNetwork(model, torch.randn(2, 1, 4, 4), name="deep")
    assert network.blocks == ("blocks.0", "blocks.1", "blocks.2")
    task = type(loss_problem.scorer.task)(network)
    settings = replace(loss_problem.scorer.settings, examples=1000)
    share = network.costs_without(["blocks.1"]).macs(network.graph.sizes) / network.full_cost.macs
    return PruningProblem(Scorer(network, task, settings), (Budget("macs", share + 1e-4),))


def test_block_that_does_nothing_is_left_out(deep_problem: PruningProblem) -> None:
    """And the budget lets everything else stay; any narrower network of full depth scores less."""
    problem, budget = deep_problem, deep_problem.budgets[0]
    result = searcher_named("dcpa")(problem, budget, SearchSettings(evaluations=40))

    assert result.plan.removed == ("blocks.1",)
    assert (problem.scorer.network.counts(result.plan) == problem.sizes).all()
    assert problem.scorer.score(result.plan).score > problem.uniform_score(budget).score
    assert problem.limit_of(result.plan, budget).holds(problem.sizes)
    assert not problem.limits[budget].holds(problem.sizes)


def test_blocks_that_are_out_stay_out(deep_problem: PruningProblem) -> None:
    """Those of --leave-out, whatever else goes."""
    problem = deep_problem.without(["blocks.0"])
    result = searcher_named("dcpa")(problem, problem.budgets[0], SearchSettings(evaluations=3))

    assert "blocks.0" in result.plan.removed


def test_all_blocks_stay_with_a_latency_table(problem: PruningProblem) -> None:
    """Which knows nothing of networks without them."""
    assert problem.scorer.network.blocks
    assert SoftChoice(problem, problem.limits[problem.budgets[0]], 0).blocks == ()


def test_searcher_may_not_leave_out_blocks_that_a_latency_table_does_not_know(problem: PruningProblem) -> None:
    """Nor lose one that the user took out."""
    from prunegym.agents.searching.search import check_result
    from prunegym.agents.searching.searchers import uniform

    settings, budget = SearchSettings(), problem.budgets[0]
    result = uniform(problem, budget, settings)
    block = problem.scorer.network.blocks[0]
    with pytest.raises(PruningError, match="leave out the blocks .*no others"):
        check_result("mine", replace(result, plan=result.plan.without([block])), problem, budget, settings)
    shallow = PruningProblem(problem.scorer, (budget,)).without([block])
    with pytest.raises(PruningError, match=rf"leave out the blocks \['{block}'\].*Received \[\]"):
        check_result("mine", result, shallow, budget, settings)


def test_price_of_a_step_is_that_of_its_images() -> None:
    """By hand: 64 images forwards and backwards, against the images of a score and 128 in each step before it."""
    plain = ScorerSettings(recovery="compensate", recovery_examples=512, examples=1000)
    images: dict[Recovery, int] = {"none": 1000, "bn": 1512, "compensate": 1512, "reconstruct": 1128}

    for recovery, count in images.items():
        assert evaluations_per_step(replace(plain, recovery=recovery), 64) == pytest.approx(192 / count)
        scored = replace(plain, recovery="distill", scored=recovery)  # what the result gets costs no evaluation
        assert evaluations_per_step(scored, 64) == pytest.approx(192 / count)
    few = replace(plain, recovery="reconstruct", recovery_examples=40)
    assert evaluations_per_step(few, 64) == pytest.approx(192 / 1040)
    for steps, run in ((5, 5), (20, 20), (400, 20)):  # a score takes 20 of them at most
        tuned = replace(plain, recovery="distill", recovery_steps=steps)
        assert evaluations_per_step(tuned, 64) == pytest.approx(192 / (1512 + 3 * 128 * run))


@pytest.mark.parametrize("allowed", [1, 2, 7, 20])
def test_steps_are_those_that_the_allowance_pays_for(
    loss_problem: PruningProblem, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the evaluation of the plan."""
    taken: list[int] = []
    monkeypatch.setattr("prunegym.agents.searching.dcpa.train", lambda choice, steps, progress: taken.append(steps))
    result = dcpa(loss_problem, loss_problem.budgets[0], SearchSettings(evaluations=allowed))

    price = 3 * BATCH / 60  # the toy is scored on 60 examples and not recalibrated
    assert sum(taken) == int((allowed - 1) / price)
    assert sum(taken) * price + 1 <= allowed
    assert result.evaluations <= allowed


@pytest.mark.parametrize("recovery", ["reconstruct", "distill"])
def test_network_is_left_as_it_was_and_the_seed_decides(digits_problem: PruningProblem, recovery: Recovery) -> None:
    """Whether weights are trained along or not; training of weights happens in a copy."""
    problem = digits_problem
    scorer = Scorer(
        problem.scorer.network,
        problem.scorer.task,
        replace(problem.scorer.settings, recovery=recovery, recovery_steps=3),
    )
    problem = PruningProblem(scorer, problem.budgets)
    before = {name: value.clone() for name, value in scorer.network.model.state_dict().items()}
    ends = []
    for seed in (0, 0, 1):
        choice = SoftChoice(problem, problem.limits[problem.budgets[0]], seed)
        train(choice, 3)
        ends.append(choice.network.own_widths.detach())

    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])
    assert all(torch.equal(value, before[name]) for name, value in scorer.network.model.state_dict().items())


@pytest.fixture(scope="module")
def digits_problem(scorer: Scorer) -> PruningProblem:
    """The trained residual network, without a latency table."""
    return PruningProblem(scorer, (Budget("macs", 0.5),))


def test_masks_are_those_of_the_draw(loss_problem: PruningProblem) -> None:
    """A hard draw keeps as many channels as its width, those the criterion likes best."""
    choice = SoftChoice(loss_problem, loss_problem.limits[loss_problem.budgets[0]], 0)
    taken = torch.zeros(3, 8)
    taken[[0, 1, 2], [5, 2, 3]] = 1.0  # of 1 to 8 channels

    expected = loss_problem.plan(np.array(BEST)).mask(loss_problem.scorer.network.graph)
    assert choice.masks(taken)[:-1].bool().tolist() == expected.tolist()
    assert float(choice.cost(taken, torch.ones(0))) == pytest.approx(1.0, abs=1e-3)


def test_draws_follow_their_logits_and_are_hard_when_cold(rng: np.random.Generator) -> None:
    """By the frequency of 4,000 draws."""
    logits = torch.tensor([0.0, 1.0, -1.0, -torch.inf])
    draws = gumbel_softmax(logits.expand(4000, 4), 0.01, torch.Generator().manual_seed(0))

    assert (draws.max(1).values > 0.99).float().mean() > 0.95
    torch.testing.assert_close(draws.mean(0), logits.softmax(0), atol=0.03, rtol=0)
