"""Projection and knapsack on problems small enough to try everything."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prunegym.pruning.allocation import knapsack, project, threshold, uniform
from prunegym.pruning.budget import Budget, Limit, apply_budget
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.widths import WidthRules, Widths

Counts = NDArray[np.int64]
Toys = Callable[[str], PrunableNetwork]


@dataclass(frozen=True)
class Small:
    """A chain of layers with few channels, and what is asked of it."""

    widths: Widths
    keep: NDArray[np.float64]
    limit: Limit

    @property
    def sizes(self) -> Counts:
        """Channels of each group."""
        return self.widths.sizes

    @property
    def allowed(self) -> list[list[int]]:
        """The counts of each group: multiples of the step, and the largest."""
        return [
            [count for count in range(low, high + 1) if count % step == 0 or count == high]
            for low, high, step in zip(self.widths.smallest, self.widths.largest, self.widths.step, strict=True)
        ]

    def allocations(self) -> list[Counts]:
        """Every allocation there is."""
        return [np.array(counts) for counts in product(*self.allowed)]

    def maximal(self, counts: Counts) -> bool:
        """No group can take one more step."""
        grown = []
        for group, allowed in enumerate(self.allowed):
            for larger in [count for count in allowed if count > counts[group]][:1]:
                one = counts.copy()
                one[group] = larger
                grown.append(one)
        return not any(self.limit.holds(one) for one in grown)

    def allows(self, counts: Counts) -> bool:
        """Every count is an allowed one."""
        return all(count in allowed for count, allowed in zip(counts.tolist(), self.allowed, strict=True))


def chain_cost(weights: list[int]) -> Callable[[Counts], float]:
    """Cost of a chain: each layer is an input width times an output width times a constant."""

    def cost(counts: Counts) -> float:
        widths = [2, *counts.tolist(), 3]
        return float(sum(w * a * b for w, a, b in zip(weights, widths[:-1], widths[1:], strict=True)))

    return cost


@st.composite
def problems(draw: st.DrawFn) -> Small:
    """Up to four groups of up to nine channels, some pruned before, cut by single channels or in steps."""
    groups = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 9), min_size=groups, max_size=groups))
    ranges = []
    for size in sizes:
        step = draw(st.sampled_from([1, 1, 2, 3, 4]))
        allowed = [*range(step, size, step), size]
        largest = draw(st.sampled_from(allowed))
        ranges.append((draw(st.sampled_from([one for one in allowed if one <= largest])), largest, step))
    widths = Widths(np.array(sizes), *np.array(ranges).T)
    keep = np.array(draw(st.lists(st.floats(0, 1), min_size=groups, max_size=groups)))
    cost = chain_cost(draw(st.lists(st.integers(1, 5), min_size=groups + 1, max_size=groups + 1)))
    least, full = cost(widths.smallest), cost(widths.sizes)
    most = least + draw(st.floats(0, 1)) * (full - least)
    return Small(widths, keep, Limit(Budget("macs", 0.5), cost, full, most))


def projected(problem: Small, keep: NDArray[np.float64] | None = None, limit: Limit | None = None) -> Counts:
    """The projection of the library."""
    return project(problem.keep if keep is None else keep, limit or problem.limit, problem.widths)


@given(problems())
def test_projection_never_exceeds_the_budget(problem: Small) -> None:
    """Whatever the policy asks for."""
    counts = projected(problem)

    assert problem.limit.holds(counts)
    assert problem.allows(counts)


@given(problems())
def test_projection_is_maximal(problem: Small) -> None:
    """What the budget allows is spent, to within one step."""
    assert problem.maximal(projected(problem))


@given(problems())
def test_projection_is_idempotent(problem: Small) -> None:
    """Asking for what came out gives it again."""
    counts = projected(problem)

    assert (projected(problem, counts / problem.sizes) == counts).all()


@given(problems())
def test_maximal_plan_within_the_budget_is_returned_unchanged(problem: Small) -> None:
    """Each of them: so every sensible plan can be asked for, and the agent can reach all."""
    for counts in problem.allocations():
        if problem.limit.holds(counts) and problem.maximal(counts):
            assert (projected(problem, counts / problem.sizes) == counts).all()


@given(problems())
def test_projection_shifts_all_logits_alike(problem: Small) -> None:
    """Against a walk: steps are taken one by one in the order in which a growing shift reaches them."""
    logits = np.clip(problem.keep, 1e-4, 1 - 1e-4)
    logits = np.log(logits / (1 - logits))
    reached = []
    for group, (allowed, size) in enumerate(zip(problem.allowed, problem.sizes.tolist(), strict=True)):
        for count, larger in pairwise(allowed):
            middle = (count + larger) / 2
            reached.append((np.log(middle / (size - middle)) - logits[group], group, larger))
    reached.sort()
    shifts = [shift for shift, _, _ in reached]
    assume(not shifts or np.diff(shifts).min(initial=1) > 1e-9)  # no ties, which may go either way
    counts, closed = problem.widths.smallest.copy(), set()
    for _, group, larger in reached:
        if group not in closed:
            before, counts[group] = counts[group], larger
            if not problem.limit.holds(counts):
                counts[group] = before
                closed.add(group)

    assert (projected(problem) == counts).all()


@given(problems(), st.floats(0, 1))
def test_larger_budget_is_spent(problem: Small, share: float) -> None:
    """The cost of the projection grows with the budget."""
    limit = problem.limit
    larger = Limit(limit.budget, limit.value, limit.full, limit.most + share * (limit.full - limit.most))

    assert limit.value(projected(problem, limit=larger)) >= limit.value(projected(problem))


@given(problems(), st.data())
def test_asking_more_for_a_group_never_gives_it_less(problem: Small, data: st.DataObject) -> None:
    """The gradient of an action component points the right way."""
    group = data.draw(st.integers(0, len(problem.sizes) - 1))
    more = problem.keep.copy()
    more[group] = data.draw(st.floats(float(more[group]), 1))

    assert projected(problem, more)[group] >= projected(problem)[group]


@given(problems())
def test_uniform_allocation_asks_the_same_of_every_group(problem: Small) -> None:
    """It does not matter which ratio is asked: one shift serves all."""
    counts = uniform(problem.limit, problem.widths)

    assert problem.limit.holds(counts)
    assert problem.maximal(counts)
    equal = np.full(len(counts), 0.3)
    shifts_tie = len(set(problem.sizes.tolist())) < len(counts)
    assert shifts_tie or (projected(problem, equal) == counts).all()


def test_uniform_keep_ratios_are_equal_on_a_real_network(zoo: Toys) -> None:
    """To within the rounding of the narrowest group."""
    network = zoo("cifar_vgg16")
    widths = Widths.free(network.graph.sizes)
    limit = apply_budget(Budget("macs", 0.5), network.costs, widths)

    keep = uniform(limit, widths) / network.graph.sizes

    assert keep.max() - keep.min() <= 1 / network.graph.sizes.min()


@st.composite
def linear_problems(
    draw: st.DrawFn, steps: tuple[int, ...] = (1,)
) -> tuple[Small, NDArray[np.float64], NDArray[np.int64]]:
    """Costs that do not depend on the other groups, with importances: the textbook knapsack."""
    groups = draw(st.integers(1, 3))
    sizes = np.array(draw(st.lists(st.integers(1, 5), min_size=groups, max_size=groups)))
    prices = np.array(draw(st.lists(st.integers(1, 5), min_size=groups, max_size=groups)))
    units = int(sizes.sum())
    scores = np.array(draw(st.lists(st.integers(0, 100), min_size=units, max_size=units)), dtype=np.float64)
    step = np.array([draw(st.sampled_from(steps)) for _ in range(groups)])
    widths = Widths(sizes, np.minimum(step, sizes), sizes, step)

    def cost(counts: Counts) -> float:
        return float(prices @ counts)

    least = cost(widths.smallest)
    limit = Limit(Budget("macs", 0.5), cost, cost(sizes), least + draw(st.floats(0, 1)) * (cost(sizes) - least))
    return Small(widths, np.ones(groups), limit), scores, np.repeat(np.arange(groups), sizes)


def worth(counts: Counts, scores: NDArray[np.float64], group_of: NDArray[np.int64]) -> float:
    """Importance kept when each group keeps its best channels."""
    return float(sum(np.sort(scores[group_of == g])[::-1][:count].sum() for g, count in enumerate(counts)))


@given(linear_problems(steps=(1, 1, 2, 3)))
def test_knapsack_is_within_one_step_of_the_best_allocation(
    case: tuple[Small, NDArray[np.float64], NDArray[np.int64]],
) -> None:
    """Against all allocations; the bound is the textbook's for the greedy solution."""
    problem, scores, group_of = case
    best = max(worth(one, scores, group_of) for one in problem.allocations() if problem.limit.holds(one))

    counts = knapsack(scores, group_of, problem.limit, problem.widths)

    assert problem.limit.holds(counts)
    assert problem.allows(counts)
    assert worth(counts, scores, group_of) >= best - scores.max() * problem.widths.step.max()


@given(linear_problems())
def test_knapsack_is_the_best_allocation_where_all_channels_cost_the_same(
    case: tuple[Small, NDArray[np.float64], NDArray[np.int64]],
) -> None:
    """Then taking the best channels first is exact."""
    problem, scores, group_of = case
    limit = Limit(problem.limit.budget, lambda counts: float(counts.sum()), 1.0, 0.6 * len(scores))
    assume(limit.holds(problem.widths.smallest))

    counts = knapsack(scores, group_of, limit, problem.widths)

    best = max(worth(one, scores, group_of) for one in problem.allocations() if limit.holds(one))
    assert worth(counts, scores, group_of) == pytest.approx(best)


@given(problems(), st.integers(0, 1000))
def test_knapsack_on_a_chain_is_maximal_and_within_the_budget(problem: Small, seed: int) -> None:
    """Also where costs are products, and where earlier rounds have pruned."""
    rng = np.random.default_rng(seed)
    group_of = np.repeat(np.arange(len(problem.sizes)), problem.sizes)
    scores = rng.random(len(group_of))

    counts = knapsack(scores, group_of, problem.limit, problem.widths)

    assert problem.limit.holds(counts)
    assert problem.maximal(counts)
    assert problem.allows(counts)


def test_knapsack_keeps_the_important_and_the_cheap() -> None:
    """Two groups of equal worth: the dear one loses; of equal price: the unimportant one."""
    widths, group_of = Widths.free(np.array([8, 8])), np.repeat([0, 1], 8)

    def allocated(prices: list[float], scores: list[float]) -> list[int]:
        limit = Limit(Budget("macs", 0.5), lambda counts: float(np.array(prices) @ counts), 1.0, 4 * sum(prices))
        return knapsack(np.repeat(scores, 8), group_of, limit, widths).tolist()

    dear, cheap = allocated([3.0, 1.0], [1.0, 1.0])
    important, unimportant = allocated([1.0, 1.0], [5.0, 1.0])
    assert dear < cheap
    assert important > unimportant


def test_knapsack_with_everything_allowed_prunes_nothing(zoo: Toys, rng: np.random.Generator) -> None:
    """A budget of 1."""
    network = zoo("digits_resnet")
    graph, widths = network.graph, Widths.free(network.graph.sizes)
    limit = apply_budget(Budget("macs", 1.0), network.costs, widths)

    counts = knapsack(rng.random(graph.units), graph.group_of, limit, widths)

    assert (counts == graph.sizes).all()


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 1000),
    share=st.floats(0.1, 0.9),
    kind=st.sampled_from(["macs", "params"]),
    align=st.sampled_from([1, 4, 8]),
)
def test_projection_on_a_real_network_holds_and_is_maximal(
    zoo: Toys, seed: int, share: float, kind: str, align: int
) -> None:
    """Residual, projected, pruned before and aligned."""
    network = zoo("cifar_resnet20")
    rng = np.random.default_rng(seed)
    widths = WidthRules(align).apply(network.graph)
    assume(widths.rules == "" or share > 0.3)
    limit = apply_budget(Budget(kind, share), network.costs, widths)
    sizes = network.graph.sizes
    problem = Small(widths.within(rng.integers(sizes // 2, sizes + 1)), rng.random(len(sizes)), limit)

    counts = projected(problem)

    assert limit.holds(counts)
    assert problem.allows(counts)
    assert problem.maximal(counts)


@given(problems(), st.data())
def test_threshold_is_one_for_all_groups(problem: Small, data: st.DataObject) -> None:
    """What stays: the least of each group; then, from the best step down, what fits until a group meets the budget."""
    units = int(problem.sizes.sum())
    group_of = np.repeat(np.arange(len(problem.sizes)), problem.sizes)
    scores = np.array(data.draw(st.permutations(range(units))), dtype=np.float64)
    steps = []
    for group, allowed in enumerate(problem.allowed):
        ranked = sorted(scores[group_of == group], reverse=True)
        steps += [(float(np.mean(ranked[low:high])), group, high) for low, high in pairwise(allowed)]
    means = [mean for mean, _, _ in steps]
    assume(len(set(means)) == len(means))  # no ties, which another test is about
    expected, closed = problem.widths.smallest.copy(), set()
    for _, group, count in sorted(steps, reverse=True):
        more = np.where(np.arange(len(expected)) == group, count, expected)
        if group not in closed and problem.limit.holds(more):
            expected = more
        else:
            closed.add(group)

    counts = threshold(scores, group_of, problem.limit, problem.widths)

    assert counts.tolist() == expected.tolist()


@given(problems(), st.integers(0, 1000))
def test_threshold_is_maximal_and_within_the_budget(problem: Small, seed: int) -> None:
    """In steps and within bounds, whatever the scores are, equal ones among them."""
    group_of = np.repeat(np.arange(len(problem.sizes)), problem.sizes)
    scores = np.random.default_rng(seed).integers(0, 4, len(group_of)).astype(np.float64)

    counts = threshold(scores, group_of, problem.limit, problem.widths)

    assert problem.limit.holds(counts)
    assert problem.maximal(counts)
    assert problem.allows(counts)


@given(problems())
def test_threshold_on_equal_scores_prefers_earlier_groups(problem: Small) -> None:
    """So the result does not depend on how a library sorts."""
    group_of = np.repeat(np.arange(len(problem.sizes)), problem.sizes)
    falling = -np.arange(len(group_of), dtype=np.float64)

    equal = threshold(np.zeros(len(group_of)), group_of, problem.limit, problem.widths)

    assert (equal == threshold(falling, group_of, problem.limit, problem.widths)).all()


#: Two groups of 24 channels on a device whose latency falls in stairs of 8 channels, the second in dearer ones.
STAIRS = (1.0, 3.0)


def stairs(counts: Counts) -> float:
    """Latency of the two groups."""
    return float(sum(height * np.ceil(count / 8) for height, count in zip(STAIRS, counts, strict=True)))


def kept_worth(scores: NDArray[np.float64], counts: Counts) -> float:
    """Importance that is left in groups of equal size."""
    own = np.sort(scores.reshape(len(counts), -1), axis=1)[:, ::-1]
    return float(sum(row[:count].sum() for row, count in zip(own, counts, strict=True)))


@given(st.lists(st.floats(0.01, 10), min_size=48, max_size=48), st.integers(5, 11), st.sampled_from([1, 2, 4]))
def test_knapsack_keeps_what_latency_gives_for_nothing(scores: list[float], most: int, step: int) -> None:
    """Nothing is gained by ending between two stairs; and the worth lost against trying all is less than one stair."""
    values, sizes = np.array(scores), np.array([24, 24])
    widths = Widths(sizes, np.full(2, step), sizes, np.full(2, step))
    limit = Limit(Budget("latency", 0.5), stairs, stairs(sizes), float(most))

    counts = knapsack(values, np.repeat([0, 1], 24), limit, widths)

    tried = [np.array(one) for one in product((8, 16, 24), repeat=2) if stairs(np.array(one)) <= most]
    best = max(kept_worth(values, one) for one in tried)
    assert (counts % 8 == 0).all()
    assert limit.holds(counts)
    assert kept_worth(values, counts) >= best - max(np.sort(row)[-8:].sum() for row in values.reshape(2, 24))


def test_knapsack_gives_up_a_level_part_as_a_whole() -> None:
    """A group whose next channels save nothing by themselves is still the cheapest if a few more do."""
    scores = np.concatenate([np.full(24, 0.001), np.full(24, 1.0)])
    limit = Limit(Budget("latency", 0.5), lambda counts: stairs(counts) + 0.05 * counts[1], 12.0, 11.9)

    counts = knapsack(scores, np.repeat([0, 1], 24), limit, Widths.free(np.array([24, 24])))

    assert counts.tolist() == [8, 24]  # two stairs of the first, worth 0.016


def test_knapsack_takes_level_parts_in_steps_down_to_a_bound() -> None:
    """Steps of 3 channels on stairs of 8; the first group may not give up all of its second stair."""
    scores = np.concatenate([np.full(24, 0.001), np.full(24, 1.0)])
    limit = Limit(Budget("latency", 0.5), stairs, 12.0, 8.5)
    widths = Widths(np.array([24, 24]), np.array([9, 3]), np.array([24, 24]), np.array([3, 3]))

    counts = knapsack(scores, np.repeat([0, 1], 24), limit, widths)

    assert counts.tolist() == [15, 15]  # one stair of each: at most 16 channels, in steps of 3


def test_knapsack_strips_no_group_where_a_bounded_latency_saves_nothing(rng: np.random.Generator) -> None:
    """A table never predicts more than the unpruned network took: at first no single step may save anything."""
    scores = np.concatenate([rng.uniform(1, 2, 24), rng.uniform(0.1, 2, 24), rng.uniform(0.1, 2, 24)])
    limit = Limit(Budget("latency", 0.9), lambda counts: min(65.0, float(counts.sum())), 65.0, 58.0)

    counts = knapsack(scores, np.repeat([0, 1, 2], 24), limit, Widths.free(np.array([24, 24, 24])))

    assert counts.sum() == 58
    assert kept_worth(scores, counts) == pytest.approx(np.sort(scores)[-58:].sum())
