"""Second looks of a training: what the policy is drawn to is valued on more images than it was found with.

The best of hundreds of rewards are partly luck with the reward images, and a policy that imitates them learns that
luck. So before the best episodes are imitated, those that lead and have not been looked at are valued again, on up to
five times the images, and take the place in the memory that this gives them. The plan that stands up best is what the
policy settles on in the end. Other searchers look again once, when they are done
(:mod:`prunegym.agents.searching.second_look`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prunegym.agents.policies.ppo import Episode, EpisodeMemory
from prunegym.agents.searching.search import evaluations_on
from prunegym.agents.training.notes import Best, Notes
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan

SETTLING = 10
"""How many times the policy is drawn to its best plan in the end, at most, until it makes it."""
MORE = 5
"""How many times the reward images a second look takes, if the split has so many."""
SHARE = 2
"""Second looks of an update count for at most one in so many evaluations of its episodes, but there is one at least."""
FEWEST = 4
"""Updates in which each starting state has its turn that there must be, else there are no second looks."""


@dataclass(frozen=True)
class Start:
    """A starting state: a network and a budget."""

    env: ChannelPruningEnv
    """Plays remembered episodes again, and says what their plans are worth."""
    budget: Budget

    @property
    def key(self) -> str:
        """By which plans are noted."""
        return self.env.problem.key(self.budget)

    def remembered(self, memory: EpisodeMemory) -> list[Episode]:
        """Episodes that start here, best first."""
        first, _ = self.env.reset(options={"budget": self.budget})
        return memory.episodes.get(EpisodeMemory.key(first), [])

    def replay(self, episode: Episode) -> PruningPlan:
        """Make the plan that an episode's actions make."""
        self.env.reset(options={"budget": self.budget})
        for action in episode.actions:
            self.env.prune(action)
        return self.env.plan


class SecondLooks:
    """Looks again at what is about to be imitated.

    Args:
        starts: Networks with budgets.
        memory: Remembered episodes; those that are looked at get the value that they have then.
        notes: Keeps what plans were worth.
        episodes: Of an update.
    """

    def __init__(self, starts: Sequence[Start], memory: EpisodeMemory, notes: Notes, episodes: int) -> None:
        self.starts, self.memory, self.notes = list(starts), memory, notes
        self.examples = {one.key: _examples(one) for one in self.starts}
        """Reward images of a second look."""
        settings = [one.env.problem.scorer.settings for one in self.starts]
        further = all(self.examples[one.key] > kind.examples for one, kind in zip(self.starts, settings, strict=True))
        self.price = max(
            evaluations_on(kind, self.examples[one.key]) for one, kind in zip(self.starts, settings, strict=True)
        )
        """Evaluations that a second look counts for."""
        self.count = max(1, episodes // (SHARE * self.price)) if further else 0
        """Looks per update, at most; 0 where the reward split has no further images."""

    def take(self, update: int, leading: int) -> int:
        """Look at the leading episodes of the starting states that have not been looked at, the states in turn.

        Args:
            update: Number of the update, which says whose turn is first.
            leading: Episodes of each starting state that are about to be imitated.

        Returns:
            The evaluations that this counts for.
        """
        turns = [self.starts[(update + place) % len(self.starts)] for place in range(len(self.starts))]
        left, before = self.count, -1
        while left != before:  # one look for each in turn, then a second one
            before = left
            for start in turns:
                left -= self._look_at_first(start, leading) if left else 0
        return (self.count - left) * self.price

    def at_the_end(self) -> int:
        """Look at what leads each starting state now, where updates have not had a look for every one.

        Returns:
            The evaluations that this counts for, at most :attr:`kept`.
        """
        return sum(self._look_at_first(start, 1) for start in self.starts if self.kept) * self.price

    @property
    def kept(self) -> int:
        """Evaluations to keep for the end."""
        return self.price * len(self.starts) if 0 < self.count < len(self.starts) else 0

    def _look_at_first(self, start: Start, leading: int) -> int:
        """Value the first of the leading episodes whose plan has not been looked at; how many looks that took."""
        while (episode := _unlooked(start.remembered(self.memory)[:leading])) is not None:
            if self._look(start, episode):
                return 1
        return 0

    def _look(self, start: Start, episode: Episode) -> int:
        """Value an episode on more images; how many looks that took: none if its plan has been looked at before."""
        plan, known = start.replay(episode), self.notes.looked.setdefault(start.key, {})
        new = plan not in known
        if new:
            known[plan] = start.env.value(self.examples[start.key])
        self.memory.replace(episode, replace(episode, value=known[plan], looked=True))
        return int(new)

    def chosen(self) -> Iterator[tuple[str, Best]]:
        """Of each starting state where something was looked at, by its key, the plan that stood up best."""
        for start in self.starts:
            found = self.choose(start)
            if found is not None:
                yield start.key, found

    def choose(self, start: Start) -> Best | None:
        """The plan that stood up best, which then leads the memory; None if nothing was looked at.

        Its score and reward are those on the images of the search.
        """
        episodes = start.remembered(self.memory)
        chosen = next((one for one in episodes if one.looked), None)
        if chosen is None:
            return None
        leading = episodes[0].value + float(np.finfo(np.float32).eps)
        self.memory.replace(chosen, replace(chosen, value=leading))
        plan = start.replay(chosen)
        return Best(start.env.problem.scorer.score(plan).score, plan, start.env.value())


def _examples(start: Start) -> int:
    """Reward images of a second look: as many more as there are."""
    scorer = start.env.problem.scorer
    return scorer.unpruned(examples=MORE * scorer.settings.examples).examples


def _unlooked(episodes: Sequence[Episode]) -> Episode | None:
    return next((one for one in episodes if not one.looked), None)
