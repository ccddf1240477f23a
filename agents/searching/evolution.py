"""Evolutionary search: over the keep ratios themselves, and over what makes filter norms comparable (LeGR)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit

from prunegym.agents.searching.search import LOWEST, Search, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

Floats = NDArray[np.float64]

POPULATION = 100
"""Most individuals of `evolution`; a tenth of an allowance that is below ten times that."""
PARENTS = 0.25
"""Best part of the population that has children."""
MUTATION = 0.1
"""Part of the groups that a mutation changes: in `evolution` on average, in LeGR exactly; in small networks one."""
STEP = 1.0
"""Standard deviation of a mutation of `evolution`, in logits."""
SAFEGUARD = 0.1
"""Part of each group that LeGR always keeps."""
_REDRAWS = 10
"""Times that a child is mutated once more because its plan has been scored."""
_HIGHEST = 0.99
"""Keep ratio whose logit stands for 1."""


def evolution(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Mutation and crossover of the logits of keep ratios.

    As Liu et al., "MetaPruning", ICCV 2019, and Cai et al., "Once-for-All", ICLR 2020, search for widths, with the
    latter's numbers: up to 100 random individuals at first, then generations in which the best quarter stays and has
    children, half of them by mutation (each group with probability 0.1), half by crossover (each group from either
    parent). Like MetaPruning, what has been scored is not scored again: such a child is mutated once more. Ours is that
    a mutation moves a logit by a normal step instead of drawing a width anew, that every child is projected onto the
    budget instead of being drawn until it fits, and that the population is a tenth of a small allowance, for some ten
    generations, but ten at least.
    """
    search = Search("evolution", problem, budget, settings)
    size = int(np.clip(search.left // 10, min(10, search.left), POPULATION))
    first = search.rng.uniform(LOWEST, 1.0, (size, len(problem.sizes)))
    seen: set[bytes] = set()
    population = [_born(search, logit(np.minimum(keep, _HIGHEST)), seen) for keep in first]
    while search.left:
        population.sort(key=lambda one: -one[0])
        parents = [logits for _, logits in population[: max(1, round(PARENTS * size))]]
        children = min(size - len(parents), search.left) or 1
        born = [_child(search, parents, index % 2 == 0, seen) for index in range(children)]
        population = population[: len(parents)] + born
    return search.result()


def _born(search: Search, logits: Floats, seen: set[bytes]) -> tuple[float, Floats]:
    """Score an individual, and remember its plan."""
    counts = search.project(expit(logits))
    seen.add(counts.tobytes())
    return search.score(counts), logits


def _child(search: Search, parents: list[Floats], mutates: bool, seen: set[bytes]) -> tuple[float, Floats]:
    logits = mutated(search.rng, parents) if mutates else crossed(search.rng, parents)
    for _ in range(_REDRAWS):
        if search.project(expit(logits)).tobytes() not in seen:
            break
        logits = mutated(search.rng, [logits])
    return _born(search, logits, seen)


def mutated(rng: np.random.Generator, parents: list[Floats]) -> Floats:
    """A parent with some logits moved by a normal step."""
    parent = parents[int(rng.integers(len(parents)))]
    probability = max(MUTATION, 1 / len(parent))
    moved: Floats = parent + np.where(rng.random(len(parent)) < probability, rng.normal(0, STEP, len(parent)), 0.0)
    return moved


def crossed(rng: np.random.Generator, parents: list[Floats]) -> Floats:
    """Each logit from one of two parents."""
    first, second = (parents[int(index)] for index in rng.choice(len(parents), 2, replace=len(parents) == 1))
    child: Floats = np.where(rng.random(len(first)) < 0.5, first, second)
    return child


@dataclass(frozen=True)
class Transformation:
    """What LeGR learns: a scale and a shift of the squared filter norms of each group ``(groups,)``."""

    scale: Floats
    shift: Floats


def legr(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    r"""Learned global ranking: one threshold on :math:`\alpha_g \lVert \Theta_i \rVert_2^2 + \kappa_g`.

    Chin et al., "Towards Efficient Model Compression via Learned Global Ranking", CVPR 2020. The pair of each group is
    found by regularised evolution (Real et al., AAAI 2019): of a random part of the pool the best is copied with a
    tenth of its groups changed, and the oldest leaves the pool. From the authors' published code: the pool (64 of 400
    evaluations), the part that competes (a quarter of it), the untransformed norms as one of the first members,
    log-normal scales whose deviation falls from 1 to 0.2, shifts as wide as the norms of the group spread, and a tenth
    of each group that always stays. Ours: pool and part are the same shares of any allowance, at least one group
    changes, the untransformed norms come first, the tenth is given up where the budget is out of reach with it, and a
    plan's fitness is its score, after the recovery that all searchers get. Which channels of a group stay is up to the
    scorer's criterion, as everywhere.
    """
    search = Search("legr", problem, budget, settings)
    group_of, groups = problem.scorer.network.graph.group_of, len(problem.sizes)
    energies = np.square(problem.scorer.criterion_scores("l2"))
    spread = np.array([energies[group_of == group].std() for group in range(groups)])
    size = int(np.clip(round(search.allowed * 64 / 400), 2, 64))
    pool: deque[tuple[float, Transformation]] = deque(maxlen=size)  # the oldest falls out
    widths = problem.widths.at_least(np.ceil(SAFEGUARD * problem.sizes).astype(np.int64))
    widths = widths if search.limit.holds(widths.smallest) else problem.widths
    same = Transformation(np.ones(groups), np.zeros(groups))
    for index in range(search.allowed):
        if index == 0:
            child = same
        elif index < size:
            child = _changed(search.rng, same, np.ones(groups, dtype=np.bool_), spread, 1.0)
        else:
            competing = search.rng.choice(len(pool), max(2, size // 4), replace=False)
            winner = max((pool[int(one)] for one in competing), key=lambda one: one[0])[1]
            where = np.zeros(groups, dtype=np.bool_)
            where[search.rng.choice(groups, max(1, int(MUTATION * groups)), replace=False)] = True
            child = _changed(search.rng, winner, where, spread, 1 - index / (1.25 * search.allowed))
        scores = child.scale[group_of] * energies + child.shift[group_of]
        pool.append((search.score(problem.threshold_counts(scores, search.limit, widths)), child))
    return search.result()


def _changed(
    rng: np.random.Generator, parent: Transformation, where: NDArray[np.bool_], spread: Floats, step: float
) -> Transformation:
    """The parent with the groups ``where`` scaled and shifted at random."""
    scale = np.exp(rng.normal(0.0, step, len(spread)))
    shift = rng.normal(0.0, 1.0, len(spread)) * spread
    return Transformation(parent.scale * np.where(where, scale, 1.0), parent.shift + np.where(where, shift, 0.0))
