"""The store of evaluations: a search that was killed anywhere is repeated to the same result, at its old price."""

import csv
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit, TimeUp
from prunegym.agents.evaluations import store as stores
from prunegym.agents.evaluations.command import run_evaluations
from prunegym.agents.evaluations.config import EvaluationsConfig
from prunegym.agents.evaluations.store import STORE, Clock, EvaluationStore, read_evaluations, stored
from prunegym.agents.run_folders.running import Reporter
from prunegym.agents.searching.searchers import SEARCHERS, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer

HALF = Budget.parse("macs:0.5")
SCORE = Score(0.5, 1 / 3, 100)


class Killed(TimeLimit):
    """Ends the search after so many scores."""

    def __init__(self, scores: int) -> None:
        super().__init__()
        self.scores = scores

    def check(self) -> None:
        self.scores -= 1
        if self.scores == 0:
            raise TimeUp


class Stopwatch:
    """Seconds that pass only when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(stores.time, "perf_counter", lambda: self.now)


_OPEN: list[EvaluationStore] = []


def opened(path: Path, search: str = "") -> EvaluationStore:
    """A store that is closed after the test."""
    _OPEN.append(EvaluationStore(path, search))
    return _OPEN[-1]


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _OPEN:
        _OPEN.pop().close()


@pytest.fixture
def plan(scorer: Scorer) -> PruningPlan:
    """Any plan."""
    return PruningPlan.unpruned(scorer.network.graph)


def searched(problem: PruningProblem, name: str, path: Path, limit: TimeLimit = NO_LIMIT) -> SearchResult:
    """A search with its scores in a file."""
    problem.scorer.forget()
    with stored([problem.scorer], path, limit=limit) as store:
        allowed = 4 * len(problem.sizes)
        return SEARCHERS[name](problem, HALF, SearchSettings(evaluations=allowed, seed=3, clock=store.clock))


def without_seconds(result: SearchResult) -> Any:
    """All of a result that is the same for the same seed."""
    return replace(result, seconds=0.0, improvements=[one._replace(seconds=0.0) for one in result.improvements])


@pytest.mark.parametrize(
    "name", ["random", "evolution", "cmaes", "cmaes_prior", "tpe", "legr", "netadapt", "amc", "laasp"]
)
def test_killed_search_is_repeated_to_the_same_result(problem: PruningProblem, name: str, tmp_path: Path) -> None:
    """Plan, evaluations, history and trail; what had been scored is not scored again."""
    half = problem.only(HALF)
    whole = searched(half, name, tmp_path / "whole.sqlite")
    before = half.scorer.scored

    with pytest.raises(TimeUp):
        searched(half, name, tmp_path / "cut.sqlite", Killed(4))
    again = searched(half, name, tmp_path / "cut.sqlite")

    assert without_seconds(again) == without_seconds(whole)
    assert half.scorer.scored - before == len(list(read_evaluations(tmp_path / "whole.sqlite")))
    assert half.scorer.store is None


def test_seconds_before_a_kill_count(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that is remembered costs what it cost; what was done after the last score is done again."""
    watch = Stopwatch(monkeypatch)
    first = opened(tmp_path / "j")
    watch.now = 5.0
    first.of(scorer).write(plan, "reward", 10, SCORE)
    watch.now = 1000.0  # killed, and continued later

    second = opened(tmp_path / "j")
    watch.now = 1001.0
    known = second.of(scorer).read(plan, "reward", 10)
    watch.now = 1003.0

    assert known == SCORE
    assert second.clock() == 7.0


def test_clock_never_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the repetition took longer than the search had, the longer time counts."""
    watch = Stopwatch(monkeypatch)
    clock = Clock(2.0)
    watch.now = 3.0

    clock.catch_up(4.0)

    assert clock() == 5.0


@pytest.mark.parametrize(
    ("split", "examples", "removed"), [("train", 10, ()), ("reward", 20, ()), ("reward", 10, ("x",))]
)
def test_scores_of_other_plans_splits_and_examples_are_others(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, split: str, examples: int, removed: tuple[str, ...]
) -> None:
    """Everything that a score depends on is in its key."""
    kept = opened(tmp_path / "j").of(scorer)
    kept.write(plan, "reward", 10, SCORE)

    assert kept.read(plan.without(removed), split, examples) is None


def test_scores_of_another_network_are_not_taken(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, digits: Any, zoo: Any
) -> None:
    """The same name with other weights, as after a weights file was replaced."""
    store = opened(tmp_path / "j")
    store.of(scorer).write(plan, "reward", 10, SCORE)
    network = zoo("digits_resnet")
    assert network.name == scorer.network.name

    assert store.of(Scorer(network, digits, scorer.settings)).read(plan, "reward", 10) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(
    plans=st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True),
    score=st.floats(allow_infinity=False, width=32).map(lambda one: one + 0.0),  # SQLite knows no -0.0
)
def test_what_is_written_is_read(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, plans: list[int], score: float
) -> None:
    """By another process too, NaN included; the plan is there to learn from."""
    (tmp_path / "s").unlink(missing_ok=True)
    for examples in plans:
        with stored([scorer], tmp_path / "s"):
            scorer.store.write(plan, "reward", examples, Score(score, 1.5, 3))
    found = [opened(tmp_path / "s").of(scorer).read(plan, "reward", examples) for examples in plans]
    rows = list(read_evaluations(tmp_path / "s"))

    assert [str(one) for one in found] == [str(Score(score, 1.5, 3))] * len(plans)
    assert [row["examples"] for row in rows] == plans
    assert all(PruningPlan.from_json(row["plan"]) == plan for row in rows)
    assert {row["recovery"] for row in rows} == {scorer.settings.scoring}


def test_searches_pay_for_their_own_scores(scorer: Scorer, plan: PruningPlan, tmp_path: Path) -> None:
    """One file may hold several."""
    opened(tmp_path / "s", "first").of(scorer).write(plan, "reward", 1, SCORE)

    assert opened(tmp_path / "s", "second").of(scorer).read(plan, "reward", 1) is None
    assert opened(tmp_path / "s", "first").of(scorer).read(plan, "reward", 1) == SCORE


_KILLED = """
import os, sqlite3, sys
from pathlib import Path
from prunegym.agents.evaluations import store
database = store.EvaluationStore(Path(sys.argv[1]))._database
database.execute("INSERT INTO contexts (digest, network, weights, data, recovery, settings, version) "
                 "VALUES ('d', 'n', 'w', 'x', 'none', '{}', '0')")
rows = "INSERT INTO evaluations (context, search, split, examples, digest, plan, score, count, seconds) " \
       "VALUES (1, '', 'reward', ?, 'p', '{}', 0.5, 1, 1.0)"
for number in range(3):
    database.execute(rows, [number])
database.execute("PRAGMA cache_size = 1")  # what is not finished goes to the disk
database.execute("BEGIN")
for number in range(3, 2000):
    database.execute(rows, [number])
os.kill(os.getpid(), 9)
"""


def test_write_that_a_kill_interrupts_is_rolled_back(tmp_path: Path) -> None:
    """What was finished is there, what was not is not."""
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "s")], check=False)

    opened(tmp_path / "s")
    assert [row["examples"] for row in read_evaluations(tmp_path / "s")] == [0, 1, 2]


def test_damaged_file_is_refused_with_a_remedy(scorer: Scorer, tmp_path: Path) -> None:
    """It is not overwritten."""
    (tmp_path / "s").write_bytes(b"no database" * 1000)

    with pytest.raises(PruningError, match="file is not a database.*Move it away"):
        opened(tmp_path / "s")
    assert (tmp_path / "s").read_bytes().startswith(b"no database")


def test_file_that_another_process_writes_to_is_no_damage(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedy is to wait, not to throw scores away."""
    monkeypatch.setattr(stores.sqlite3, "connect", partial(stores.sqlite3.connect, timeout=0.0))
    first = opened(tmp_path / "s")
    kept = opened(tmp_path / "s").of(scorer)
    first._database.execute("BEGIN EXCLUSIVE")

    with pytest.raises(PruningError, match="database is locked.*wait until that has ended"):
        kept.write(plan, "reward", 1, SCORE)


def test_store_is_left_when_the_search_fails(scorer: Scorer, tmp_path: Path) -> None:
    """The scorer has its own store again, and the file is let go of."""
    with pytest.raises(ZeroDivisionError), stored([scorer], tmp_path / "s") as store:
        raise ZeroDivisionError

    assert scorer.store is None
    with pytest.raises(PruningError, match="closed"):
        store.of(scorer)


def test_full_disk_keeps_the_scores(scorer: Scorer, plan: PruningPlan, tmp_path: Path) -> None:
    """One error with a remedy."""
    store = opened(tmp_path / "s")
    kept = store.of(scorer)
    kept.write(plan, "reward", 1, SCORE)
    pages = store._database.execute("PRAGMA page_count").fetchone()[0]
    store._database.execute(f"PRAGMA max_page_count = {pages}")

    def fill() -> None:
        for examples in range(2, 100):
            kept.write(plan, "reward", examples, SCORE)

    with pytest.raises(PruningError, match=r"database or disk is full.*Free some space"):
        fill()

    assert opened(tmp_path / "s").of(scorer).read(plan, "reward", 1) == SCORE


def test_command_lists_and_exports(scorer: Scorer, plan: PruningPlan, tmp_path: Path) -> None:
    """Folders in the run folder too."""
    for search in ("a", "b"):
        with stored([scorer], tmp_path / "run" / "searches" / STORE, search):
            scorer.store.write(plan, "reward", 1, SCORE)
    config = EvaluationsConfig(runs=(tmp_path / "run",), csv=tmp_path / "all.csv")

    result = run_evaluations(config, Reporter())

    assert [(row["search"], row["evaluations"], row["best_score"]) for row in result.content["rows"]] == [
        ("a", 1, 0.5),
        ("b", 1, 0.5),
    ]
    rows = list(csv.DictReader((tmp_path / "all.csv").read_text().splitlines()))
    assert [PruningPlan.from_json(json.loads(row["plan"])) for row in rows] == [plan] * 2
    with pytest.raises(PruningError, match=r"has no evaluations\.sqlite"):
        run_evaluations(EvaluationsConfig(runs=(tmp_path / "none",)), Reporter())


def test_worker_gets_no_store(scorer: Scorer, tmp_path: Path) -> None:
    """A store has one writer, and prepared batches are large: neither is sent to other processes."""
    list(scorer.batches("reward", 10))
    with stored([scorer], tmp_path / "j"):
        sent = scorer.__getstate__()

    assert sent["store"] is None
    assert not sent["_prepared"]
    assert scorer._prepared
