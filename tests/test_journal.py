"""The journal of scores: a search that was killed anywhere is repeated to the same result, at its old price."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit, TimeUp
from prunegym.agents.run_folders import journal as journals
from prunegym.agents.run_folders.journal import Clock, ScoreJournal, journaled
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
        monkeypatch.setattr(journals.time, "perf_counter", lambda: self.now)


@pytest.fixture
def plan(scorer: Scorer) -> PruningPlan:
    """Any plan."""
    return PruningPlan.unpruned(scorer.network.graph)


def searched(problem: PruningProblem, name: str, path: Path, limit: TimeLimit = NO_LIMIT) -> SearchResult:
    """A search with its scores in a journal."""
    problem.scorer.forget()
    with journaled([problem.scorer], path, limit) as journal:
        allowed = 4 * len(problem.sizes)
        return SEARCHERS[name](
            problem, HALF, SearchSettings(evaluations=allowed, seed=3, clock=journal.clock)
        )


def without_seconds(result: SearchResult) -> Any:
    """All of a result that is the same for the same seed."""
    return replace(result, seconds=0.0, improvements=[one._replace(seconds=0.0) for one in result.improvements])


@pytest.mark.parametrize(
    "name", ["random", "evolution", "cmaes", "cmaes_prior", "tpe", "legr", "netadapt", "amc", "laasp"]
)
def test_killed_search_is_repeated_to_the_same_result(problem: PruningProblem, name: str, tmp_path: Path) -> None:
    """Plan, evaluations, history and trail; what had been scored is not scored again."""
    half = problem.only(HALF)
    whole = searched(half, name, tmp_path / "whole.jsonl")
    before = half.scorer.scored

    with pytest.raises(TimeUp):
        searched(half, name, tmp_path / "cut.jsonl", Killed(4))
    again = searched(half, name, tmp_path / "cut.jsonl")

    assert without_seconds(again) == without_seconds(whole)
    assert half.scorer.scored - before == len((tmp_path / "whole.jsonl").read_text().splitlines())
    assert half.scorer.journal is None


def test_seconds_before_a_kill_count(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A score that is remembered costs what it cost; what was done after the last score is done again."""
    watch = Stopwatch(monkeypatch)
    first = ScoreJournal(tmp_path / "j")
    watch.now = 5.0
    first.of(scorer).write(plan, "reward", 10, SCORE)
    watch.now = 1000.0  # killed, and continued later

    second = ScoreJournal(tmp_path / "j")
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
    kept = ScoreJournal(tmp_path / "j").of(scorer)
    kept.write(plan, "reward", 10, SCORE)

    assert kept.read(plan.without(removed), split, examples) is None


def test_scores_of_another_network_are_not_taken(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, digits: Any, zoo: Any
) -> None:
    """The same name with other weights, as after a weights file was replaced."""
    journal = ScoreJournal(tmp_path / "j")
    journal.of(scorer).write(plan, "reward", 10, SCORE)
    network = zoo("digits_resnet")
    assert network.name == scorer.network.name

    assert journal.of(Scorer(network, digits, scorer.settings)).read(plan, "reward", 10) is None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(cut=st.integers(0, 400), rubbish=st.sampled_from([b"", b"\0\0\0", b'{"plan"', b"[]\n", b"\xff\n"]))
def test_journal_cut_anywhere_is_continued(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, cut: int, rubbish: bytes
) -> None:
    """Whole lines stay, the rest is measured and written again: the file ends as without the cut."""
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    for examples in (1, 2, 3):
        ScoreJournal(path).of(scorer).write(plan, "reward", examples, SCORE)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut] + rubbish)

    journal = ScoreJournal(path)
    kept = journal.of(scorer)
    known = [kept.read(plan, "reward", examples) for examples in (1, 2, 3)]
    for examples, one in zip((1, 2, 3), known, strict=True):
        if one is None:
            kept.write(plan, "reward", examples, SCORE)

    assert sum(one is not None for one in known) == whole[:cut].count(b"\n")
    again = ScoreJournal(path).of(scorer)
    assert [again.read(plan, "reward", examples) for examples in (1, 2, 3)] == [SCORE] * 3
    assert len(path.read_bytes().splitlines()) == 3


def test_full_disk_keeps_the_scores(
    scorer: Scorer, plan: PruningPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error with a remedy, no half line."""
    kept = ScoreJournal(tmp_path / "j").of(scorer)
    kept.write(plan, "reward", 1, SCORE)
    before = (tmp_path / "j").read_bytes()

    def full(path: Path, size: int, data: bytes, **_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journals, "append", full)
    with pytest.raises(PruningError, match=r"No space left on device.*Free some space"):
        kept.write(plan, "reward", 2, SCORE)

    assert (tmp_path / "j").read_bytes() == before


def test_worker_gets_no_journal(scorer: Scorer, tmp_path: Path) -> None:
    """A journal has one writer, and prepared batches are large: neither is sent to other processes."""
    list(scorer.batches("reward", 10))
    with journaled([scorer], tmp_path / "j"):
        sent = scorer.__getstate__()

    assert sent["journal"] is None
    assert not sent["_prepared"]
    assert scorer._prepared
