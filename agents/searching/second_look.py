"""A second look: the best plans of a search are scored on further images before one is returned.

The best of hundreds of scores is partly luck with the reward images. So the best few plans are scored again on twice as
many images of the reward split, and the best on those is the result. Every searcher that chooses among plans ends so,
and pays for it out of its allowance. Agents look again while they train (:mod:`prunegym.agents.training.settling`).
"""

from __future__ import annotations

from collections.abc import Iterable

from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer

CONFIRMED = 10
"""Plans that are looked at again, at most."""
CONFIRMING = 2
"""Evaluations that a second look counts for: it takes twice the images."""


def confirmed_plans(evaluations: int, least: int = 0) -> int:
    """Plans of each network and budget that a search can afford to look at again: none or several, one is no choice.

    Args:
        evaluations: That the search is allowed.
        least: Of these, what it cannot do without: its own work comes first.
    """
    plans = min(CONFIRMED, evaluations // 30, (evaluations - least) // CONFIRMING)
    return plans if plans > 1 else 0


def has_further_images(scorer: Scorer) -> bool:
    """Whether the scorer's split holds more images than plans are scored on."""
    examples = scorer.settings.examples
    return scorer.unpruned(examples=2 * examples).examples > examples


def best_on_twice(scorer: Scorer, plans: Iterable[PruningPlan]) -> PruningPlan:
    """The best plan on twice the images; of equals the first."""
    return max(plans, key=lambda one: scorer.score(one, examples=2 * scorer.settings.examples).score)
