"""The store of evaluations: every plan that a run scored, in one SQLite file of its folder.

Searches are deterministic, so what they do is decided by the scores they get. Each score is written when it has been
measured, with the plan and the seconds that the search had taken by then. A search that was killed is repeated: it asks
for the same plans, gets the same scores without measuring them, and goes on from where it was. Evaluations count as
before, and so do seconds. The plans are also what an agent can learn from.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer
from prunegym.pruning.training import weights_digest

STORE = "evaluations.sqlite"
"""The file of a run folder."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS contexts (
    context INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    network TEXT NOT NULL,
    weights TEXT NOT NULL,
    data TEXT NOT NULL,
    recovery TEXT NOT NULL,
    settings TEXT NOT NULL,
    version TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS evaluations (
    evaluation INTEGER PRIMARY KEY,
    context INTEGER NOT NULL REFERENCES contexts,
    search TEXT NOT NULL,
    split TEXT NOT NULL,
    examples INTEGER NOT NULL,
    digest TEXT NOT NULL,
    plan TEXT NOT NULL,
    score REAL,
    loss REAL,
    count INTEGER NOT NULL,
    seconds REAL NOT NULL,
    UNIQUE (context, search, split, examples, digest)
);
"""
_ROWS = """
SELECT evaluation, network, weights, data, recovery, settings, version, search, split, examples, plan, score, loss,
    count, seconds
FROM evaluations JOIN contexts USING (context) ORDER BY evaluation
"""
_REMEDIES = {
    "full": "Free some space and repeat the command: it goes on from here.",
    "locked": "Another process writes to it: wait until that has ended, and repeat the command.",
    "unable to open": "Choose a folder that you may write to.",
    "readonly": "Choose a folder that you may write to.",
}
"""What to do, by what SQLite says."""
_DAMAGED = "Move it away and repeat the command: plans are then scored anew."


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


class EvaluationStore:
    """The evaluations of one search in a file. One process writes; others may read.

    Args:
        path: The file; made if it is not there. A write that a kill interrupted is rolled back by SQLite.
        search: Names the search; each pays for its own scores. Empty where a run folder holds one.
        limit: Looked at after each new score.

    Raises:
        PruningError: The file cannot be read or written.
    """

    def __init__(self, path: Path, search: str = "", limit: TimeLimit = NO_LIMIT) -> None:
        self.path = path
        self.search = search
        self.clock = Clock()
        self._limit = limit
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, isolation_level=None)
            # a kill loses nothing; a power cut may take the last scores, not the file
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def of(self, scorer: Scorer) -> ScoresOf:
        """The scores of one network, scored in one way."""
        content = _context(scorer)
        names, marks = ", ".join(content), ", ".join("?" * len(content))
        with self._explained():
            self._database.execute(f"INSERT OR IGNORE INTO contexts ({names}) VALUES ({marks})", [*content.values()])
            found = self._database.execute("SELECT context FROM contexts WHERE digest = ?", [content["digest"]])
            return ScoresOf(self, int(found.fetchone()[0]))

    def read(self, context: int, plan: PruningPlan, split: str, examples: int) -> Score | None:
        """A score that was written before; the clock goes on from when it was."""
        where = "context = ? AND search = ? AND split = ? AND examples = ? AND digest = ?"
        key = [context, self.search, split, examples, _digest(plan)]
        with self._explained():
            query = f"SELECT score, loss, count, seconds FROM evaluations WHERE {where}"
            found = self._database.execute(query, key).fetchone()
        if found is None:
            return None
        *values, count, seconds = found
        self.clock.catch_up(seconds)
        score, loss = (float("nan") if one is None else one for one in values)  # NaN is NULL in SQLite
        return Score(score, loss, count)

    def write(self, context: int, plan: PruningPlan, split: str, examples: int, score: Score) -> None:
        """Keep a score.

        Raises:
            PruningError: It could not be written; those before are kept.
            TimeUp: The time limit is reached; the score is written.
        """
        key = [context, self.search, split, examples, _digest(plan)]
        values = [json.dumps(plan.to_json()), score.score, score.loss, score.examples, self.clock()]
        names = "context, search, split, examples, digest, plan, score, loss, count, seconds"
        with self._explained():
            self._database.execute(
                f"INSERT OR REPLACE INTO evaluations ({names}) VALUES ({', '.join('?' * 10)})", key + values
            )
        self._limit.check()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as fault:
            raise unusable(self.path, fault) from fault


class ScoresOf:
    """The part of a store that belongs to one scorer: what :attr:`.Scorer.store` takes.

    Args:
        store: The file.
        context: Tells networks and ways of scoring apart.
    """

    def __init__(self, store: EvaluationStore, context: int) -> None:
        self._store = store
        self._context = context

    def read(self, plan: PruningPlan, split: str, examples: int) -> Score | None:
        """The score that was written for a plan; None if there is none."""
        return self._store.read(self._context, plan, split, examples)

    def write(self, plan: PruningPlan, split: str, examples: int, score: Score) -> None:
        """Keep a score."""
        self._store.write(self._context, plan, split, examples, score)


@contextmanager
def stored(
    scorers: Sequence[Scorer], path: Path, search: str = "", limit: TimeLimit = NO_LIMIT
) -> Iterator[EvaluationStore]:
    """Keep the scores of a search in a file while it runs.

    Args:
        scorers: That the search asks.
        path: The file.
        search: Its name in the file.
        limit: Looked at after each score.

    Yields:
        The store, whose clock the search should use.
    """
    before = [scorer.store for scorer in scorers]
    with closing(EvaluationStore(path, search, limit)) as store:
        try:
            for scorer in scorers:
                scorer.store = store.of(scorer)
            yield store
        finally:
            for scorer, one in zip(scorers, before, strict=True):
                scorer.store = one


def read_evaluations(path: Path) -> Iterator[dict[str, Any]]:
    """Every evaluation of a file, first to last: network, fingerprints, split, plan, score and seconds.

    Args:
        path: The file.

    Raises:
        PruningError: There is none, or it is damaged.
    """
    if not path.is_file():
        raise PruningError(
            f"`runs` should be run folders with evaluations. {path.parent} has no {path.name}. "
            "Name a folder that prune, train, evaluate or compare wrote."
        )
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as database:
            database.row_factory = sqlite3.Row
            for row in database.execute(_ROWS):
                found = dict(row)
                yield {**found, "settings": json.loads(found["settings"]), "plan": json.loads(found["plan"])}
    except sqlite3.Error as fault:
        raise unusable(path, fault, "runs") from fault


def unusable(path: Path, fault: Exception, argument: str = "--out") -> PruningError:
    """What to do about a store that cannot be used."""
    remedy = next((one for sign, one in _REMEDIES.items() if sign in str(fault)), _DAMAGED)
    return PruningError(f"`{argument}` should hold a store of evaluations that works. {path}: {fault}. {remedy}")


def scorer_identity(scorer: Scorer) -> str:
    """A digest of all that a plan's score depends on: network, weights, data, settings and version."""
    return str(_context(scorer)["digest"])


def _context(scorer: Scorer) -> dict[str, str]:
    """What the scores of a scorer depend on, by column."""
    content = {
        "network": scorer.network.name,
        "weights": weights_digest(scorer.network.model)[:32],
        "data": scorer.task.fingerprint,
        "recovery": scorer.settings.scoring,
        "settings": json.dumps(vars(scorer.settings), default=str, sort_keys=True),
        "version": metadata.version("prunegym"),
    }
    return {"digest": hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32], **content}


def _digest(plan: PruningPlan) -> str:
    return hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest()[:32]
