"""The fast path scores what the plain path computes, and the plan that was asked for."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.importance.criteria import Context, unit_scores
from prunegym.pruning.importance.statistics import Statistics, collect_statistics
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import recalibrate
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask, Task, forward

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]
SMALL = {"statistics_examples": 64, "recovery_examples": 128, "examples": 200, "batch_size": 90}


@pytest.fixture(scope="module")
def statistics(trained: PrunableNetwork, digits: ClassificationTask) -> Statistics:
    """Of the trained network."""
    return collect_statistics(trained.model, trained.graph, digits, examples=64)


@pytest.fixture
def scorer(trained: PrunableNetwork, digits: ClassificationTask, statistics: Statistics) -> Scorer:
    """In single precision."""
    return Scorer(trained, digits, ScorerSettings(precision="float32", **SMALL), statistics=statistics)


@pytest.fixture
def half_plan(trained: PrunableNetwork, statistics: Statistics) -> PruningPlan:
    """Half of each group."""
    return PruningPlan.from_scores(trained.graph, trained.graph.sizes // 2, statistics.taylor_squared)


def plain_score(model: nn.Module, task: Task, split: str, examples: int) -> tuple[float, float]:
    """Mean score and loss by running the network as it is."""
    scores, losses, count = 0.0, 0.0, 0
    with torch.no_grad():
        for inputs, targets in task.batches(split, batch_size=64, limit=examples):
            outputs = forward(model.eval(), inputs)
            scores += float(task.score(outputs, targets).sum())
            losses += float(task.loss(outputs, targets)) * len(targets)
            count += len(targets)
    return scores / count, losses / count


def test_folded_score_is_that_of_the_recovered_network(
    scorer: Scorer, digits: ClassificationTask, half_plan: PruningPlan
) -> None:
    """Folding and memory layout change rounding only."""
    score = scorer.score(half_plan)

    accuracy, loss = plain_score(scorer.recovered(half_plan), digits, "reward", 200)
    assert score.loss == pytest.approx(loss, rel=1e-4)
    assert score.score == pytest.approx(accuracy, abs=1 / 200)
    assert score.examples == 200


def test_bfloat16_score_is_close_to_single_precision(
    trained: PrunableNetwork,
    digits: ClassificationTask,
    statistics: Statistics,
    scorer: Scorer,
    half_plan: PruningPlan,
) -> None:
    """Close enough to rank plans."""
    half = Scorer(trained, digits, ScorerSettings(precision="bfloat16", **SMALL), statistics=statistics)

    rough, exact = half.score(half_plan), scorer.score(half_plan)

    assert half.form.half
    assert rough.score == pytest.approx(exact.score, abs=0.03)
    assert rough.loss == pytest.approx(exact.loss, rel=0.05)


def test_unpruned_score_is_that_of_the_network_as_it_is(
    scorer: Scorer, trained: PrunableNetwork, digits: ClassificationTask
) -> None:
    """Neither recalibrated nor compensated."""
    unpruned = scorer.unpruned()

    accuracy, loss = plain_score(trained.model, digits, "reward", 200)
    assert unpruned.score == pytest.approx(accuracy, abs=1e-6)
    assert unpruned.loss == pytest.approx(loss, rel=1e-4)


def test_plan_that_is_scored_is_the_plan_asked_for(
    scorer: Scorer, half_plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caught where it is run: the widths of its layers are the counts of the plan."""
    caught: list[nn.Module] = []
    measure = scorer._measure

    def spy(model: nn.Module, *args: Any) -> Any:
        caught.append(model)
        return measure(model, *args)

    monkeypatch.setattr(scorer, "_measure", spy)
    scorer.score(half_plan)

    counts = half_plan.counts()
    made = {name: one.out_channels for name, one in caught[0].named_modules() if isinstance(one, nn.Conv2d)}
    assert made["conv1"] == counts["conv1"]
    assert made["layer1.0.conv1"] == counts["layer1.0.conv1"]
    assert made["layer3.0.conv1"] == counts["layer3.0.conv1"]


def test_cost_of_the_scored_network_is_the_predicted_one(
    scorer: Scorer, trained: PrunableNetwork, half_plan: PruningPlan
) -> None:
    """A mask is not compression."""
    model = scorer.recovered(half_plan)

    assert sum(one.numel() for one in model.parameters()) == trained.cost(half_plan).parameters


def test_without_recovery_the_kept_filters_are_the_original_ones(
    trained: PrunableNetwork, digits: ClassificationTask, statistics: Statistics, half_plan: PruningPlan
) -> None:
    """Surgery alone: no weight and no running statistic is touched."""
    settings = ScorerSettings(compensate=False, **{**SMALL, "recovery_examples": 0})
    plain = Scorer(trained, digits, settings, statistics=statistics).recovered(half_plan)

    expected = trained.pruned(half_plan)

    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_compensation_lowers_the_loss(
    trained: PrunableNetwork,
    digits: ClassificationTask,
    statistics: Statistics,
    scorer: Scorer,
    half_plan: PruningPlan,
) -> None:
    """What it is for."""
    settings = ScorerSettings(compensate=False, precision="float32", **SMALL)

    without = Scorer(trained, digits, settings, statistics=statistics).score(half_plan)

    assert scorer.score(half_plan).loss < without.loss


def test_recovered_network_is_recalibrated(scorer: Scorer, digits: ClassificationTask, half_plan: PruningPlan) -> None:
    """Its running statistics are those of calibration examples run through it."""
    model = scorer.recovered(half_plan)

    again = copy.deepcopy(model)
    recalibrate(again, [inputs for inputs, _ in digits.batches("calibration", batch_size=90, limit=128)])
    torch.testing.assert_close(again.bn1.running_mean, model.bn1.running_mean)
    torch.testing.assert_close(again.bn1.running_var, model.bn1.running_var)


def test_score_is_computed_once(scorer: Scorer, half_plan: PruningPlan) -> None:
    """Searchers come back to the same plans."""
    first = scorer.score(half_plan)
    again = scorer.score(PruningPlan.from_json(half_plan.to_json()))

    assert again is first
    assert scorer.scored == 1


def test_forgotten_score_is_computed_again(scorer: Scorer, half_plan: PruningPlan) -> None:
    """To the same value: only the memory is gone."""
    first = scorer.score(half_plan)
    scorer.forget()
    again = scorer.score(half_plan)

    assert again == first
    assert scorer.scored == 2


def test_splits_are_cached_apart(scorer: Scorer, half_plan: PruningPlan) -> None:
    """A score on selection images is another score."""
    reward, selection = scorer.score(half_plan), scorer.score(half_plan, split="selection")

    assert scorer.scored == 2
    assert reward.loss != selection.loss


def test_numbers_of_examples_are_cached_apart(scorer: Scorer, half_plan: PruningPlan) -> None:
    """So is a score on fewer images."""
    assert [scorer.score(half_plan, examples=count).examples for count in (200, 50)] == [200, 50]


def test_scoring_leaves_the_network_alone(scorer: Scorer, trained: PrunableNetwork, half_plan: PruningPlan) -> None:
    """Thousands of plans are made from the same tensors."""
    before = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}

    scorer.score(half_plan)
    scorer.unpruned()

    after = trained.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_scores_repeat_in_a_new_scorer(
    trained: PrunableNetwork, digits: ClassificationTask, half_plan: PruningPlan
) -> None:
    """Statistics, recovery and evaluation draw no random numbers of their own."""
    settings = ScorerSettings(precision="float32", recovery_steps=2, **SMALL)

    scores = [Scorer(trained, digits, settings).score(half_plan) for _ in range(2)]

    assert scores[0] == scores[1]


def test_recovery_steps_lower_the_loss(
    trained: PrunableNetwork, digits: ClassificationTask, statistics: Statistics, half_plan: PruningPlan
) -> None:
    """The reward of the fine-tuned regime."""

    def loss(steps: int) -> float:
        settings = ScorerSettings(precision="float32", recovery_steps=steps, **SMALL)
        return Scorer(trained, digits, settings, statistics=statistics).score(half_plan).loss

    assert loss(8) < loss(0)


@pytest.mark.parametrize("name", ["registered", "dict_output", "residual", "mobile", "transposed", "flattened"])
def test_folding_changes_no_toy(toys: Toys, task_for: TaskFor, name: str) -> None:
    """Aliases, norms that also activate, outputs read before the norm: none is folded that should not be."""
    network = toys(name)
    task = task_for(network)
    scorer = Scorer(network, task, ScorerSettings(precision="float32", examples=60))
    plan = PruningPlan.from_scores(network.graph, (network.graph.sizes + 1) // 2, scorer.unit_scores)

    score = scorer.score(plan)

    assert score.loss == pytest.approx(plain_score(scorer.recovered(plan), task, "reward", 60)[1], rel=1e-4)


def test_layers_without_bfloat16_fall_back_to_single_precision(toys: Toys, task_for: TaskFor) -> None:
    """A network may hold parameters that are not converted."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 5)
            self.gain = nn.Parameter(torch.ones(6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.second(self.first(x) * self.gain).relu().mean((2, 3)))

    network = PrunableNetwork(Gain(), torch.randn(2, 3, 8, 8))

    scorer = Scorer(network, task_for(network), ScorerSettings(precision="bfloat16", examples=60))

    assert not scorer.form.half
    assert scorer.score(PruningPlan.unpruned(network.graph)).examples == 60


def test_batches_beyond_memory_are_made_anew(
    scorer: Scorer, half_plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same score, without keeping the images."""
    kept = scorer.score(half_plan)
    scorer._cache.clear()
    scorer._prepared.clear()
    monkeypatch.setattr("prunegym.pruning.scoring.CACHE_LIMIT", 1)

    assert scorer.score(half_plan) == kept
    assert not scorer._prepared


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"precision": "float16"}, "`precision` should be auto, float32 or bfloat16. Received 'float16'"),
        ({"examples": 0}, "`examples` should be at least 1. Received 0"),
        ({"batch_size": 0}, "`batch_size` should be at least 1"),
        ({"statistics_examples": -1}, "`statistics_examples` should be at least 1"),
    ],
)
def test_impossible_settings_are_rejected(setting: dict[str, Any], message: str) -> None:
    """Before anything is measured."""
    with pytest.raises(PruningError, match=message):
        ScorerSettings(**setting)


def test_unknown_criterion_is_rejected(trained: PrunableNetwork, digits: ClassificationTask) -> None:
    """With the nearest name."""
    with pytest.raises(PruningError, match="Did you mean 'taylor'"):
        Scorer(trained, digits, ScorerSettings(criterion="tailor", **SMALL))


def test_next_round_looks_at_the_network_that_is_left(trained: PrunableNetwork, digits: ClassificationTask) -> None:
    """Weights, too, are those of the recovered network: filters are smaller where their inputs are gone."""
    scorer = Scorer(trained, digits, ScorerSettings(criterion="l1", **SMALL))
    half = np.arange(trained.graph.units) % 2 == 0
    plan = PruningPlan.from_mask(trained.graph, half)
    inputs = trained.example_inputs
    alone = PrunableNetwork(scorer.recovered(plan, quick=True), inputs)

    statistics, scores = scorer.look(plan, examples=16)

    expected = unit_scores("l1", Context(alone.model, alone.graph))
    np.testing.assert_allclose(scores[half], expected, rtol=1e-6)
    assert (scores[~half] == 0).all()
    assert (statistics.taylor[half] > 0).any()
    assert (statistics.taylor[~half] == 0).all()


def test_random_criterion_follows_the_seed(
    trained: PrunableNetwork, digits: ClassificationTask, statistics: Statistics
) -> None:
    """Which channels are drawn is repeatable, and not the same in every group."""
    one, same, other = (
        Scorer(trained, digits, ScorerSettings(criterion="random", seed=seed, **SMALL), statistics=statistics)
        for seed in (0, 0, 1)
    )

    assert (one.unit_scores == same.unit_scores).all()
    assert (one.unit_scores != other.unit_scores).all()
    assert len(np.unique(one.unit_scores)) == trained.graph.units


def test_units_are_scored_by_the_chosen_criterion(
    trained: PrunableNetwork, digits: ClassificationTask, statistics: Statistics
) -> None:
    """`criterion` changes which channels stay."""
    settings = ScorerSettings(criterion="activation", **SMALL)

    scorer = Scorer(trained, digits, settings, statistics=statistics)

    np.testing.assert_array_equal(scorer.unit_scores, statistics.activation_mean)


class Detached(nn.Module):
    """No gradient comes back to where the second layer reads the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.last = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``(images, 10)``."""
        pooled: Tensor = self.second(self.first(images).relu()).relu().mean((2, 3)).detach()
        classes: Tensor = self.last(pooled)
        return classes


def test_group_that_no_gradient_reaches_is_told(digits: ClassificationTask) -> None:
    """Its channels score 0, and would be the first to go."""
    inputs, _ = next(iter(digits.batches("calibration", batch_size=2, limit=2)))
    network = PrunableNetwork(Detached().eval(), inputs)

    with pytest.warns(UserWarning, match="no gradient reaches the channel groups first, so that .*'first=1..1'"):
        scorer = Scorer(network, digits, ScorerSettings(**SMALL))

    group = next(one for one in network.graph.groups if one.name == "first")
    assert not scorer.unit_scores[group.units].any()
