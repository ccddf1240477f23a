"""A journal of scores: a search that was killed is repeated from it, at once and to the same result.

Searches are deterministic, so what they do is decided by the scores they get. Each score is written down when it has
been measured, with the seconds that the search had taken by then. Repeated with the journal, a search asks for the same
plans, is told the same scores without measuring them, and goes on from where it was; evaluations count as before, and
so do seconds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.pruning.files import append, write_failure
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer
from prunegym.pruning.training import weights_digest

JOURNAL = "scores.jsonl"
"""One line for each score that was measured: plan (digest), split, examples, score, loss, seconds."""


class Clock:
    """Seconds of work, those of interrupted processes included.

    Args:
        seconds: Spent before.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._started = time.perf_counter()

    def __call__(self) -> float:
        """Seconds so far."""
        return self._before + time.perf_counter() - self._started

    def catch_up(self, seconds: float) -> None:
        """Go on from so many seconds, unless more have been spent already."""
        self._before += max(0.0, seconds - self())


class ScoreJournal:
    """Scores of one search in a file.

    Args:
        path: The file, of JSON lines; read if it is there, and extended. A line that a kill left unfinished is cut off.
        limit: Looked at after each new score.

    Raises:
        PruningError: The file cannot be read.
    """

    def __init__(self, path: Path, limit: TimeLimit = NO_LIMIT) -> None:
        self.path = path
        self.clock = Clock()
        self._limit = limit
        self._known, self._size = _read(path)

    def of(self, scorer: Scorer) -> ScoresOf:
        """The scores of one network, scored in one way."""
        return ScoresOf(self, scorer_identity(scorer))

    def look_up(self, key: str) -> Score | None:
        """A score that was written before; the clock goes on from when it was."""
        found = self._known.get(key)
        if found is None:
            return None
        self.clock.catch_up(found["seconds"])
        return Score(found["score"], found["loss"], found["count"])

    def note(self, key: str, score: Score, **more: Any) -> None:
        """Write a score.

        Raises:
            PruningError: It could not be written; those before are kept.
            TimeUp: The time limit is reached; the score is written.
        """
        line = {
            "plan": key,
            **more,
            "score": score.score,
            "loss": score.loss,
            "count": score.examples,
            "seconds": self.clock(),
        }
        data = (json.dumps(line) + "\n").encode()
        try:
            append(self.path, self._size, data, sync=False)
        except OSError as fault:
            raise write_failure(self.path, fault) from fault
        self._size += len(data)
        self._known[key] = line
        self._limit.check()


class ScoresOf:
    """The part of a journal that belongs to one scorer: what :attr:`.Scorer.journal` takes.

    Args:
        journal: The file.
        owner: Tells networks and ways of scoring apart.
    """

    def __init__(self, journal: ScoreJournal, owner: str) -> None:
        self._journal = journal
        self._owner = owner

    def read(self, plan: PruningPlan, split: str, examples: int) -> Score | None:
        """The score that was written for a plan; None if there is none."""
        return self._journal.look_up(self._key(plan, split, examples))

    def write(self, plan: PruningPlan, split: str, examples: int, score: Score) -> None:
        """Keep a score."""
        self._journal.note(self._key(plan, split, examples), score, split=split, examples=examples)

    def _key(self, plan: PruningPlan, split: str, examples: int) -> str:
        content = json.dumps([self._owner, split, examples, plan.to_json()])
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@contextmanager
def journaled(scorers: Sequence[Scorer], path: Path, limit: TimeLimit = NO_LIMIT) -> Iterator[ScoreJournal]:
    """Keep the scores of a search in a file while it runs.

    Args:
        scorers: That the search asks.
        path: The file.
        limit: Looked at after each score.

    Yields:
        The journal, whose clock the search should use.
    """
    journal = ScoreJournal(path, limit)
    before = [scorer.journal for scorer in scorers]
    for scorer in scorers:
        scorer.journal = journal.of(scorer)
    try:
        yield journal
    finally:
        for scorer, one in zip(scorers, before, strict=True):
            scorer.journal = one


def scorer_identity(scorer: Scorer) -> str:
    """A digest of all that a plan's score depends on: network, weights, data and settings."""
    network = scorer.network
    content = [network.name, weights_digest(network.model), scorer.task.fingerprint, str(scorer.settings)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Scores of a journal by key, and how many bytes of it are whole lines."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, 0
    except OSError as fault:
        raise write_failure(path, fault) from fault
    known: dict[str, dict[str, Any]] = {}
    size = 0
    for line in data.splitlines(keepends=True):
        # what follows a damaged line is dropped with it: it is measured again
        try:
            content = json.loads(line)
            known[content["plan"]] = {name: content[name] for name in ("score", "loss", "count", "seconds")}
        except (ValueError, KeyError, TypeError):
            break
        if not line.endswith(b"\n"):
            break
        size += len(line)
    return known, size
