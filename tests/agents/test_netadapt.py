"""NetAdapt against its definition."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.agents.searching.netadapt import netadapt, proposals
from prunegym.agents.searching.search import SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget, Limit
from prunegym.pruning.errors import PruningError
from prunegym.pruning.widths import Bound, WidthRules, Widths


def chain(counts: np.ndarray) -> float:
    """Cost of three layers in a row."""
    first, second = counts.tolist()
    return float(2 * first + 3 * first * second + second)


#: The counts that a group of ten channels may keep: any, an even number but at most 8, multiples of 4, or all.
ALLOWED = {1: [*range(1, 11)], 2: [2, 4, 6, 8], 4: [4, 8, 10], 10: [10]}


@given(st.data(), st.floats(0, 1))
def test_proposals_are_the_widest_that_one_group_can_offer(data: st.DataObject, share: float) -> None:
    """By trying every width of each group, the other as it is."""
    steps = data.draw(st.tuples(*[st.sampled_from(sorted(ALLOWED))] * 2))
    allowed = [ALLOWED[step] for step in steps]
    counts = np.array([data.draw(st.sampled_from(one)) for one in allowed])
    least, most = (np.array([one[end] for one in allowed]) for end in (0, -1))
    target = chain(least) + share * (chain(counts) - chain(least))
    expected, all_they_have = [], []
    for group in range(2):
        widths = [width for width in reversed(allowed[group]) if width <= counts[group]]
        tried = [np.where(np.arange(2) == group, width, counts) for width in widths]
        fitting = [one for one in tried if chain(one) <= target]
        expected += [fitting[0]] if fitting and len(tried) > 1 else []
        all_they_have += [tried[-1]] if len(tried) > 1 else []
    expected = expected or all_they_have

    limit = Limit(Budget("macs", 0.5), chain, chain(counts), target)
    found = proposals(counts, target, limit, Widths(np.array([10, 10]), least, most, np.array(steps)))

    assert [one.tolist() for one in found] == [one.tolist() for one in expected]


@pytest.mark.parametrize("evaluations", [12, 20, 36])
def test_each_iteration_keeps_the_best_proposal(known_problem: PruningProblem, evaluations: int) -> None:
    """Step by step as the paper has it, by trying every width, and every number of iterations that may be left."""
    scorer, sizes = known_problem.scorer, known_problem.sizes
    (limit,) = known_problem.limits.values()
    found = netadapt(known_problem, known_problem.budgets[0], SearchSettings(evaluations=evaluations))
    asked = [scorer.network.counts(plan).tolist() for plan in scorer.plans]

    def offers_at(target: float) -> list[np.ndarray]:
        offers = []
        for group in range(12):
            tried = [np.where(np.arange(12) == group, width, counts) for width in range(counts[group], 0, -1)]
            offers += [one for one in tried if limit.value(one) <= target][:1]
        return offers or [np.where(np.arange(12) == group, 1, counts) for group in np.flatnonzero(counts > 1)]

    counts, expected, iterations = sizes.copy(), [], 0
    while iterations != 1:
        cost, spare = limit.value(counts), evaluations - len(expected) - 12
        for iterations in range(spare + 1, 0, -1):
            offers = offers_at(cost - (cost - limit.most) / iterations)
            if (iterations - 1) * len(offers) <= spare:
                break
        if iterations == 1:
            offers = [known_problem.project(one / sizes, limit) for one in offers]
        expected += offers
        counts = max(offers, key=lambda one: (scorer.score(known_problem.plan(one)).score, -limit.value(one)))

    assert asked == [one.tolist() for one in expected]
    assert found.plan == known_problem.plan(counts)
    assert found.evaluations == len(asked) <= evaluations


def test_latency_of_the_table_is_what_falls(problem: PruningProblem) -> None:
    """With a latency budget every iteration brings the prediction down by a step."""
    budget = Budget("latency", 0.6)
    limit, latencies = problem.limits[budget], []
    whole = problem.scorer.score

    class Watched:
        """Notes what is asked."""

        def __getattr__(self, name: str) -> object:
            return getattr(problem.scorer, name)

        def score(self, plan: object) -> object:
            latencies.append(limit.fraction(problem.scorer.network.counts(plan)))
            return whole(plan)

    watched = PruningProblem(Watched(), (budget,), problem.latency)
    found = netadapt(watched, budget, SearchSettings(evaluations=18))

    assert 0.6 < latencies[0] <= 1 - 0.4 / 13  # thirteen steps at most, if each takes one evaluation
    assert np.diff(latencies).max() < 0.01  # proposals of one iteration differ by less than a channel costs
    assert 0.59 < limit.fraction(problem.scorer.network.counts(found.plan)) <= 0.6


def test_allowance_without_a_proposal_for_each_group_is_refused(known_problem: PruningProblem) -> None:
    """The message says what it takes."""
    message = r"at least 12 for searcher netadapt \(one for each of the 12 groups that may be pruned\)"
    with pytest.raises(PruningError, match=message):
        netadapt(known_problem, known_problem.budgets[0], SearchSettings(evaluations=11))


def test_groups_that_may_not_be_pruned_cost_no_evaluation(known_problem: PruningProblem) -> None:
    """Nor do they make proposals; the search begins at the widest network that the bounds allow."""
    scorer = known_problem.scorer
    bounds = (Bound.parse(r".*conv2=1"), Bound.parse(r".*\.conv1=..0.8"))
    problem = PruningProblem(scorer, known_problem.budgets, rules=WidthRules(align=4, bounds=bounds))
    fixed = problem.widths.smallest == problem.widths.largest
    assert fixed.sum() == 3  # the widths of the three stages, which residual sums tie together

    found = netadapt(problem, problem.budgets[0], SearchSettings(evaluations=2 * int((~fixed).sum())))

    counts = np.array([scorer.network.counts(plan) for plan in [*scorer.plans, found.plan]])
    assert (counts[:, fixed] == problem.sizes[fixed]).all()
    assert (counts <= problem.widths.largest).all()
