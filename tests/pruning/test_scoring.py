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
from prunegym.pruning.scoring import RECOVERIES, Recovery, Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask, Task, forward

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]
SMALL = {"statistics_examples": 64, "recovery_examples": 128, "examples": 200, "batch_size": 90}


@pytest.fixture(scope="module")
def statistics(trained: PrunableNetwork, digits: ClassificationTask) -> Statistics:
    """Of the trained network."""
    return collect_statistics(trained.model, trained.graph, digits, examples=64)


Make = Callable[..., Scorer]


@pytest.fixture
def make(trained: PrunableNetwork, digits: ClassificationTask, statistics: Statistics) -> Make:
    """Scorers with some settings, in single precision."""

    def scorer(**settings: Any) -> Scorer:
        wanted = ScorerSettings(**{"precision": "float32", **SMALL, **settings})
        return Scorer(trained, digits, wanted, statistics=statistics)

    return scorer


@pytest.fixture
def scorer(make: Make) -> Scorer:
    """With the recovery that is the default."""
    return make()


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


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_folded_score_is_that_of_the_recovered_network(
    make: Make, digits: ClassificationTask, half_plan: PruningPlan, recovery: Recovery
) -> None:
    """Folding and memory layout change rounding only; a score reconstructs in the cheap form."""
    scorer = make(recovery=recovery, recovery_steps=4)
    score = scorer.score(half_plan)

    model = scorer.recovered(half_plan, quick=recovery == "reconstruct")
    accuracy, loss = plain_score(model, digits, "reward", 200)
    assert score.loss == pytest.approx(loss, rel=1e-4)
    assert score.score == pytest.approx(accuracy, abs=1 / 200)
    assert score.examples == 200


def test_second_look_is_at_the_network_that_the_user_gets(
    make: Make, digits: ClassificationTask, half_plan: PruningPlan
) -> None:
    """On more reward images than searches score on, layers are reconstructed in the full form."""
    scorer = make(recovery="reconstruct", recovery_examples=256)
    cheap, full = (
        plain_score(scorer.recovered(half_plan, quick=quick), digits, "reward", 250)[1] for quick in (True, False)
    )

    assert scorer.score(half_plan, examples=250).loss == pytest.approx(full, rel=1e-4)
    assert cheap != pytest.approx(full, rel=1e-3)
    fewer = plain_score(scorer.recovered(half_plan, quick=True), digits, "reward", 100)[1]
    assert scorer.score(half_plan, examples=100).loss == pytest.approx(fewer, rel=1e-4)
    selection = plain_score(scorer.recovered(half_plan, quick=True), digits, "selection", 250)[1]
    assert scorer.score(half_plan, split="selection", examples=250).loss == pytest.approx(selection, rel=1e-4)


def test_scores_take_few_steps_of_distillation(
    make: Make, digits: ClassificationTask, half_plan: PruningPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user gets takes all, a look between rounds none."""
    monkeypatch.setattr("prunegym.pruning.scoring.QUICK_STEPS", 3)
    scores = [make(recovery="distill", recovery_steps=steps).score(half_plan) for steps in (3, 6)]
    short, long = (make(recovery="distill", recovery_steps=steps) for steps in (3, 6))

    assert scores[0] == scores[1]
    losses = [plain_score(one.recovered(half_plan), digits, "reward", 200)[1] for one in (short, long)]
    assert scores[0].loss == pytest.approx(losses[0], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
    look, compensated = long.recovered(half_plan, quick=True), make(recovery="compensate").recovered(half_plan)
    assert all(map(torch.equal, look.state_dict().values(), compensated.state_dict().values()))


@pytest.mark.parametrize("scored", RECOVERIES)
@pytest.mark.parametrize("recovery", RECOVERIES)
def test_plans_are_scored_after_another_recovery_where_asked_for(
    make: Make, half_plan: PruningPlan, recovery: Recovery, scored: Recovery
) -> None:
    """As if it were that of the result, which stays what it is."""
    steps = {"recovery_steps": 2}
    both, searched, given = (
        make(**steps, **one)
        for one in ({"recovery": recovery, "scored": scored}, {"recovery": scored}, {"recovery": recovery})
    )

    assert both.score(half_plan) == searched.score(half_plan)
    found, expected = (one.recovered(half_plan).state_dict().values() for one in (both, given))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("recovery", ["compensate", "reconstruct", "distill"])
def test_bfloat16_score_is_close_to_single_precision(make: Make, half_plan: PruningPlan, recovery: Recovery) -> None:
    """Close enough to rank plans."""
    half, whole = (make(recovery=recovery, recovery_steps=4, precision=one) for one in ("bfloat16", "float32"))

    rough, exact = half.score(half_plan), whole.score(half_plan)

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
    trained: PrunableNetwork, make: Make, half_plan: PruningPlan
) -> None:
    """Surgery alone: no weight and no running statistic is touched."""
    plain = make(recovery="none").recovered(half_plan)

    expected = trained.pruned(half_plan)

    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_recalibration_leaves_the_kept_filters_alone(
    trained: PrunableNetwork, make: Make, half_plan: PruningPlan
) -> None:
    """Only running statistics are others."""
    model, expected = make(recovery="bn").recovered(half_plan), trained.pruned(half_plan)

    assert all(map(torch.equal, model.parameters(), expected.parameters()))
    assert not torch.equal(model.bn1.running_mean, expected.bn1.running_mean)


def test_each_recovery_lowers_the_loss_of_the_one_before(make: Make, half_plan: PruningPlan) -> None:
    """What it is for."""
    losses = [make(recovery=one).score(half_plan).loss for one in ("none", "bn", "compensate", "reconstruct")]

    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 4


@pytest.mark.parametrize("recovery", ["bn", "compensate"])
def test_recovered_network_is_recalibrated(
    make: Make, digits: ClassificationTask, half_plan: PruningPlan, recovery: Recovery
) -> None:
    """Its running statistics are those of calibration examples run through it."""
    model = make(recovery=recovery).recovered(half_plan)

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


@pytest.mark.parametrize("recovery", ["compensate", "reconstruct", "distill"])
def test_scores_repeat_in_a_new_scorer(
    trained: PrunableNetwork, digits: ClassificationTask, half_plan: PruningPlan, recovery: Recovery
) -> None:
    """Statistics, recovery and evaluation draw no random numbers of their own."""
    settings = ScorerSettings(precision="float32", recovery=recovery, recovery_steps=2, **SMALL)

    scores = [Scorer(trained, digits, settings).score(half_plan) for _ in range(2)]

    assert scores[0] == scores[1]


def test_recovery_steps_lower_the_loss(make: Make, half_plan: PruningPlan) -> None:
    """Beyond what compensation does, and the more the longer."""
    before, after, long = (
        make(recovery=one, recovery_steps=steps).score(half_plan).loss
        for one, steps in (("compensate", 1), ("distill", 8), ("distill", 20))
    )

    assert long < after < before


@pytest.mark.parametrize(
    ("recovery", "changes"),
    [
        ("bn", {"recovery_examples": 32}),
        ("compensate", {"recovery_examples": 32}),
        ("reconstruct", {"recovery_examples": 32}),
        ("distill", {"recovery_examples": 32}),
        ("distill", {"recovery_steps": 2}),
        ("distill", {"recovery_rate": 0.005}),
        ("distill", {"recovery_split": "calibration"}),
        ("distill", {"seed": 1}),
    ],
)
def test_every_setting_of_recovery_changes_the_network(
    make: Make, half_plan: PruningPlan, recovery: Recovery, changes: dict[str, Any]
) -> None:
    """And with it what is scored."""
    same = {"recovery": recovery, "recovery_steps": 3}
    before, after = (make(**{**same, **one}) for one in ({}, changes))

    assert before.score(half_plan).loss != pytest.approx(after.score(half_plan).loss, rel=1e-5)
    pairs = zip(*(one.recovered(half_plan).state_dict().values() for one in (before, after)), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)


class Mislabelled:
    """A task whose labels are all the same."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def batches(self, split: str, **options: Any) -> Any:
        for inputs, labels in self.task.batches(split, **options):
            yield inputs, torch.zeros_like(labels)


def test_distillation_on_calibration_examples_sees_no_training_images(make: Make, half_plan: PruningPlan) -> None:
    """And only as many as were asked for."""
    scorer = make(recovery="distill", recovery_steps=2, recovery_split="calibration", recovery_examples=40)
    asked: list[tuple[str, int | None]] = []

    class Noted(Mislabelled):
        def batches(self, split: str, **options: Any) -> Any:
            asked.append((split, options["limit"]))
            return super().batches(split, **options)

    scorer.task = Noted(scorer.task)
    scorer.recovered(half_plan)

    assert asked
    assert set(asked) == {("calibration", 40)}


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_recovery_does_not_look_at_labels(make: Make, half_plan: PruningPlan, recovery: Recovery) -> None:
    """Statistics aside, the network that comes out is the same whatever they are."""
    plain, wrong = (make(recovery=recovery, recovery_steps=3) for _ in range(2))
    wrong.task = Mislabelled(wrong.task)

    first, second = (one.recovered(half_plan).state_dict().values() for one in (plain, wrong))
    assert all(map(torch.equal, first, second))


def test_divergence_is_that_of_the_outputs_from_the_unpruned_ones(
    trained: PrunableNetwork, make: Make, digits: ClassificationTask, half_plan: PruningPlan
) -> None:
    """By hand: the Kullback-Leibler divergence in nats, its mean over the examples, and its exponential."""
    scorer = make(recovery="compensate", measure="divergence")
    score = scorer.score(half_plan)

    images = torch.cat([inputs for inputs, _ in digits.batches("reward", batch_size=100, limit=200)])
    with torch.no_grad():
        wanted, present = (one.eval()(images).log_softmax(1) for one in (trained.model, scorer.recovered(half_plan)))
    expected = float((wanted.exp() * (wanted - present)).sum(1).mean())
    assert score.loss == pytest.approx(expected, rel=1e-4)
    assert score.score == pytest.approx(np.exp(-expected), rel=1e-4)
    assert score.examples == 200
    assert expected > 1e-3


def test_score_by_the_loss_falls_with_it(make: Make, half_plan: PruningPlan) -> None:
    """Losses and examples are those of a score by the task."""
    by_task, by_loss = (make(measure=measure).score(half_plan) for measure in ("task", "loss"))

    assert by_loss.score == pytest.approx(np.exp(-by_task.loss), rel=1e-6)
    assert (by_loss.loss, by_loss.examples) == (by_task.loss, by_task.examples)


def test_divergence_needs_no_labels(make: Make, half_plan: PruningPlan) -> None:
    """The score is the same whatever they are."""
    plain, wrong = (make(measure="divergence") for _ in range(2))
    wrong.task = Mislabelled(wrong.task)

    assert plain.score(half_plan) == wrong.score(half_plan)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_unpruned_network_does_not_diverge_from_itself(trained: PrunableNetwork, make: Make, precision: str) -> None:
    """It scores 1, asked for as it is or as a plan; folding changes rounding only."""
    scorer = make(measure="divergence", recovery="none", precision=precision)

    assert scorer.unpruned().score == pytest.approx(1.0, abs=1e-3)
    assert scorer.score(PruningPlan.unpruned(trained.graph)).score == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize(
    "name",
    [
        *("registered", "dict_output", "residual", "mobile", "transposed", "flattened"),
        *("grouped", "concat", "twice", "two_inputs"),
    ],
)
def test_folding_changes_no_toy(toys: Toys, task_for: TaskFor, name: str, recovery: Recovery) -> None:
    """Aliases, norms that also activate, outputs read before the norm: none is folded that should not be."""
    network = toys(name)
    task = task_for(network)
    settings = ScorerSettings(recovery=recovery, recovery_steps=2, precision="float32", examples=60)
    scorer = Scorer(network, task, settings)
    plan = PruningPlan.from_scores(network.graph, (network.graph.sizes + 1) // 2, scorer.unit_scores)

    score = scorer.score(plan)

    model = scorer.recovered(plan, quick=recovery == "reconstruct")
    assert score.loss == pytest.approx(plain_score(model, task, "reward", 60)[1], rel=1e-4)


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
        ({"recovery_examples": 0}, "`recovery_examples` should be at least 1. Received 0"),
        ({"recovery": "distill", "recovery_steps": 0}, "`recovery_steps` should be at least 1. Received 0"),
        ({"recovery": "compensat"}, "`recovery` should be one of .*Received 'compensat'. Did you mean 'compensate'"),
        ({"scored": "distil"}, "`scored` should be one of .*Received 'distil'. Did you mean 'distill'"),
        ({"measure": "divergense"}, "`measure` should be one of .*Received 'divergense'. Did you mean 'divergence'"),
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
