"""The grid of a comparison: every row once, measured independently, and never beside strangers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from prunegym.agents.configuration.time_limit import TimeLimit, TimeUp
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.finished_rows import ROWS, FinishedRows
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SEARCHERS, WITHOUT_EVALUATIONS, SearchResult, SearchSettings, own_plan
from prunegym.agents.training.loop import Trainer
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison import measure as compare_measure
from prunegym.experiments.comparison import search as compare_search
from prunegym.experiments.comparison.conditions import identity
from prunegym.experiments.comparison.config import EXTENDABLE, CompareConfig
from prunegym.experiments.comparison.grid import compare, unfinished
from prunegym.experiments.comparison.measure import Judge
from prunegym.experiments.comparison.rows import CURVE, CURVE_SCORES, KEY, TIMED, curve_rows
from prunegym.experiments.evaluate import recovered_scores
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import read_json
from prunegym.pruning.modes import evaluating
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer
from prunegym.pruning.training import evaluate_network

HALF = Budget.parse("macs:0.5")
#: The least that an agent learns in: one update.
QUICK = {"evaluations": 8, "update_evaluations": 2, "imitation_steps": 1, "ppo_epochs": 1, "rounds": 1}
SEARCHERS_COMPARED = ("uniform", "random", "agent", "agent best", "shuffled", "mean")


def config(**changes: Any) -> CompareConfig:
    """One network and budget, two seeds, allocators and random search."""
    kept = {"network": ("digits_resnet",), "budget": ("macs:0.5",), "searcher": ("uniform", "random"), "repeats": 2}
    return CompareConfig(**{**kept, **QUICK, "device": "cpu", **changes})


def go(problem: PruningProblem, folder: Path, settings: CompareConfig) -> tuple[list[dict[str, Any]], RunFolder]:
    """Compare quietly in a folder."""
    run = RunFolder.create(
        folder, network="n", searcher="s", budget="b", seed=0, config=settings, extendable=EXTENDABLE
    )
    return compare([problem], settings, run, progress=False), run


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are on any machine."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def half(scorer: Scorer) -> PruningProblem:
    """The trained digits network at half its MACs, with a memory of its own."""
    own = Scorer(scorer.network, scorer.task, scorer.settings, statistics=scorer.statistics)
    return PruningProblem(own, (HALF,))


@pytest.fixture(scope="module")
def compared(half: PruningProblem, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], RunFolder]:
    """A comparison with an agent and its controls."""
    return go(half, tmp_path_factory.mktemp("compare") / "run", config(searcher=SEARCHERS_COMPARED))


def plan_of(row: dict[str, Any], run: RunFolder) -> PruningPlan:
    """The plan of a row, from its file."""
    return PruningPlan.load(run.path(row["plan"]))


def test_every_searcher_has_a_row_for_every_seed(compared: Any) -> None:
    """In the order of the grid, within the budget."""
    rows, _ = compared

    assert [(row["searcher"], row["seed"]) for row in rows] == [(n, s) for n in SEARCHERS_COMPARED for s in (0, 1)]
    assert all(row["cost"] <= 0.5 for row in rows)


def test_costs_are_those_of_the_rebuilt_network(compared: Any, half: PruningProblem) -> None:
    """Counted anew from the plan file."""
    rows, run = compared

    for row in rows:
        model = half.scorer.network.pruned(plan_of(row, run))
        image = half.scorer.network.example_inputs[0][:1]
        with evaluating(model), FlopCounterMode(display=False) as counter:
            model(image)
        assert row["macs"] == row["counted_macs"] == counter.get_total_flops() // 2
        assert row["parameters"] == sum(one.numel() for one in model.parameters())


def test_scores_are_those_of_the_plan(compared: Any, half: PruningProblem) -> None:
    """On the reward split as the search saw it, and after recovery on the selection split."""
    rows, run = compared

    for row in rows[::2]:
        plan = plan_of(row, run)
        assert row["reward_score"] == half.scorer.score(plan).score
        assert row["after_recovery_score"] == recovered_scores(half, plan, ("selection",))["selection_score"]


def test_rows_of_an_agent_come_from_one_training(compared: Any, half: PruningProblem) -> None:
    """Its own plan is that of its policy file; the best it sampled scores no less where it was sampled."""
    rows, run = compared
    own, best = ({row["seed"]: row for row in rows if row["searcher"] == name} for name in ("agent", "agent best"))
    folders = sorted(run.path("trainings").iterdir())

    assert len(folders) == 2
    for seed, folder in enumerate(folders):
        policy, _ = load_policy(folder / "policy.safetensors")
        assert plan_of(own[seed], run) == own_plan(policy, ChannelPruningEnv(half, rounds=1), HALF)
        assert best[seed]["reward_score"] >= own[seed]["reward_score"]
        assert best[seed]["evaluations"] == own[seed]["evaluations"] <= QUICK["evaluations"]


def test_curve_ends_where_the_row_is(compared: Any) -> None:
    """Its last plan is the plan returned, and what is spent only grows."""
    rows, run = compared
    curves = curve_rows(rows, run)

    for row in rows:
        points = [one for one in curves if (one["searcher"], one["seed"]) == (row["searcher"], row["seed"])]
        assert points[-1]["after_recovery_score"] == row["after_recovery_score"]
        for price in ("evaluations", "seconds"):
            spent = [one[price] for one in points]
            assert spent == sorted(spent)
            assert spent[-1] <= row[price]


def test_curve_that_was_stopped_in_time_goes_on(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the plan under way; no plan is scored twice."""
    settings = config(searcher=("random",), repeats=1, evaluations=20, seed=1)
    _, whole = go(half, tmp_path / "whole", settings)
    run = RunFolder.create(tmp_path / "run", network="n", searcher="s", budget="b", seed=0, config=settings)
    limit, scored = TimeLimit(), []
    score = Judge.after_recovery

    def stop(self: Judge, plan: PruningPlan) -> float:
        scored.append(plan)
        limit.end = 0.0
        return score(self, plan)

    monkeypatch.setattr(Judge, "after_recovery", stop)
    with pytest.raises(TimeUp):
        compare([half], settings, run, progress=False, limit=limit)
    assert len(scored) == 1
    compare([half], settings, run, progress=False)

    (expected,), (curve,) = (list(one.path("searches").rglob(CURVE)) for one in (whole, run))
    points, again = ([{**one, "seconds": 0} for one in read_json(path)] for path in (expected, curve))
    assert again == points
    assert len(scored) == len(points) >= 2
    assert not list(run.path("searches").rglob(CURVE_SCORES))


def test_curves_can_be_scored_on_fewer_images(half: PruningProblem, tmp_path: Path) -> None:
    """The first so many of the selection split; the row itself is of all."""
    settings = config(searcher=("uniform",), repeats=1, curve_examples=7)
    rows, run = go(half, tmp_path / "run", settings)

    scorer, plan = half.scorer, plan_of(rows[0], run)
    (point,) = curve_rows(rows, run)
    few = evaluate_network(scorer.recovered(plan), scorer.task, "selection", limit=7)
    assert point["after_recovery_score"] == few.score
    assert rows[0]["after_recovery_score"] == recovered_scores(half, plan, ("selection",))["selection_score"]


def test_allocator_is_asked_once_for_all_seeds(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no use for a seed; a search has."""
    asked: list[tuple[str, int]] = []

    def counted(name: str) -> Callable[..., SearchResult]:
        def search(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
            asked.append((name, settings.seed))
            return SEARCHERS[name](problem, budget, settings)

        return search

    monkeypatch.setattr(compare_search, "searcher_named", counted)
    rows, _ = go(half, tmp_path / "run", config())

    assert asked == [("uniform", 0), ("random", 0), ("random", 1)]
    assert rows[0]["plan"] == rows[1]["plan"]
    assert rows[2]["plan"] != rows[3]["plan"]


def test_search_that_draws_nothing_is_made_once_for_all_seeds(half: PruningProblem, tmp_path: Path) -> None:
    """It would be the same again, at the same price."""
    rows, run = go(half, tmp_path / "run", config(searcher=("sensitivity", "netadapt")))

    assert [row["searcher"] for row in rows] == ["sensitivity"] * 2 + ["netadapt"] * 2
    assert rows[0]["plan"] == rows[1]["plan"] != rows[2]["plan"] == rows[3]["plan"]
    assert len(list(run.path("searches").iterdir())) == 2


@pytest.mark.parametrize("name", sorted(set(SEARCHERS) - WITHOUT_EVALUATIONS))
def test_search_has_a_curve_of_what_it_improved_to(half: PruningProblem, tmp_path: Path, name: str) -> None:
    """Whoever searches: with its price in evaluations and in seconds, up to the plan of the row."""
    rows, run = go(half, tmp_path / "run", config(searcher=(name,), repeats=1))
    points = curve_rows(rows, run)

    scores, spent = ([one[key] for one in points] for key in ("reward_score", "evaluations"))
    assert scores == sorted(set(scores))
    assert spent == sorted(set(spent))
    assert scores[-1] == rows[0]["reward_score"]
    assert 0 < points[0]["seconds"] <= points[-1]["seconds"] <= rows[0]["seconds"]


@pytest.mark.parametrize("name", ["sensitivity", "netadapt"])
def test_allowance_that_one_searcher_cannot_do_with_is_refused_at_once(
    half: PruningProblem, tmp_path: Path, name: str
) -> None:
    """Before the searches that come first in the grid."""
    with pytest.raises(PruningError, match=f"`--evaluations` should be at least [68] for searcher {name}"):
        go(half, tmp_path / "run", config(searcher=("random", name), evaluations=5))
    assert not (tmp_path / "run" / "searches").exists()


def test_searches_do_not_profit_from_each_other(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that another search has scored is scored anew: otherwise the seconds of the second would be too few."""
    before = half.scorer.scored
    go(half, tmp_path / "a", config(searcher=("random",), repeats=1))
    first = half.scorer.scored - before
    go(half, tmp_path / "b", config(searcher=("random",), repeats=1))

    assert half.scorer.scored - before - first >= QUICK["evaluations"]


@pytest.mark.parametrize("rows_written", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_interrupted_comparison_goes_on_to_the_same_rows(
    rows_written: int, half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was stopped; a search that was finished is not repeated."""
    whole, _ = go(half, tmp_path / "whole", config())
    append = RunFolder.append_row

    def killed(self: RunFolder, name: str, row: Any) -> None:
        if name == ROWS and len(self.read_rows(name)) == rows_written:
            raise KeyboardInterrupt
        append(self, name, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_row", killed)
        with pytest.raises(KeyboardInterrupt):
            go(half, tmp_path / "run", config())
    kept = FinishedRows(RunFolder(tmp_path / "run"), KEY, TIMED).read()
    searched: list[int] = []
    real = compare_search.searcher_named
    monkeypatch.setattr(compare_search, "searcher_named", lambda name: searched.append(1) or real(name))
    rows, _ = go(half, tmp_path / "run", config())

    assert len(kept) == rows_written
    assert rows[:rows_written] == kept
    assert without_times(rows) == without_times(whole)
    # of the three searches those that had been stored are read: one of the row that was cut off, and those before
    assert len(searched) == {0: 2, 1: 2, 3: 0}[rows_written]


def test_interrupted_training_goes_on_from_its_checkpoint(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first update is not made twice."""
    settings = config(searcher=("agent",), repeats=1, evaluations=9)
    whole, _ = go(half, tmp_path / "whole", settings)
    update = Trainer.run_update
    made: list[str] = []
    monkeypatch.setattr(Trainer, "run_update", _killed_at(1, update))
    with pytest.raises(KeyboardInterrupt):
        go(half, tmp_path / "run", settings)
    monkeypatch.setattr(Trainer, "run_update", _noted(made, update))
    rows, _ = go(half, tmp_path / "run", settings)

    assert made == ["1"]
    assert without_times(rows) == without_times(whole)


def _killed_at(number: int, update: Any) -> Any:
    """An update that is interrupted before it begins, if it has this number."""

    def run_update(self: Trainer) -> dict[str, Any]:
        if self.update == number:
            raise KeyboardInterrupt
        return update(self)

    return run_update


def _noted(made: list[str], update: Any) -> Any:
    """An update that leaves its number."""

    def run_update(self: Trainer) -> dict[str, Any]:
        made.append(str(self.update))
        return update(self)

    return run_update


def test_finished_comparison_can_be_extended(half: PruningProblem, tmp_path: Path) -> None:
    """By a searcher and a seed; the rows that are there stay as they are."""
    before, _ = go(half, tmp_path / "run", config(searcher=("uniform",), repeats=1))
    after, run = go(half, tmp_path / "run", config(searcher=("uniform", "knapsack"), repeats=2))

    assert len(after) == 4
    assert after[0] == before[0]
    assert read_json(run.path("config.json"))["config"]["repeats"] == 2


def test_finished_rows_need_no_network(half: PruningProblem, tmp_path: Path) -> None:
    """Nothing is missing, so nothing has to be built."""
    _, run = go(half, tmp_path / "run", config())

    assert unfinished(config(), run) == []
    assert len(compare([], config(), run, progress=False)) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "l1"}, "whose criterion is residual_taylor; now it is l1"),
        ({"examples": 60}, "whose reward examples is 150; now it is 60"),
        (
            {"recovery": "distill", "recovery_steps": 1},
            r"whose recovery is reconstruct; now it is distill \(differing: recovery, scored, recovery steps\)",
        ),
        ({"scored": "bn"}, "whose scored is reconstruct; now it is bn"),
        ({"recovery_examples": 32}, "whose recovery examples is 64; now it is 32"),
        ({"recovery_rate": 0.5}, "whose recovery rate is 0.02; now it is 0.5"),
        ({"recovery_split": "calibration"}, "whose recovery split is train; now it is calibration"),
        ({"measure": "divergence"}, "whose measure is task; now it is divergence"),
    ],
)
def test_rows_of_other_settings_are_refused(
    changes: dict[str, Any], message: str, half: PruningProblem, tmp_path: Path
) -> None:
    """They are not mixed in, and nothing is written."""
    settings = config(searcher=("uniform",), repeats=1)
    _, run = go(half, tmp_path / "run", settings)
    scorer = half.scorer
    other = Scorer(scorer.network, scorer.task, replace(scorer.settings, **changes), statistics=scorer.statistics)
    before = run.path(ROWS).read_bytes()

    with pytest.raises(PruningError, match=f"`--out` should hold what .*{message}.*Choose another folder"):
        compare([PruningProblem(other, (HALF,))], replace(settings, repeats=2), run, progress=False)

    assert run.path(ROWS).read_bytes() == before


def test_rows_of_other_weights_are_refused(half: PruningProblem, zoo: Any, tmp_path: Path) -> None:
    """A network of the same name that was trained again is another network."""
    settings = config(searcher=("uniform",), repeats=1)
    _, run = go(half, tmp_path / "run", settings)
    other = zoo("digits_resnet")
    other = PrunableNetwork(other.model, other.example_inputs, name=half.scorer.network.name)

    problem = PruningProblem(Scorer(other, half.scorer.task, half.scorer.settings), (HALF,))

    with pytest.raises(PruningError, match="whose network fingerprint is"):
        compare([problem], replace(settings, repeats=2), run, progress=False)


def test_searches_of_other_weights_are_refused_before_there_is_a_row(
    half: PruningProblem, zoo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that was stored is found by the name of its network alone."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_row", killed)
        with pytest.raises(KeyboardInterrupt):
            go(half, tmp_path / "run", config())
    run = RunFolder(tmp_path / "run")
    assert list(run.path("searches").rglob("plan.json"))
    assert not run.read_rows(ROWS)
    other = PruningProblem(Scorer(zoo("digits_resnet"), half.scorer.task, half.scorer.settings), (HALF,))
    assert other.scorer.network.name == half.scorer.network.name

    with pytest.raises(PruningError, match="Received rows or searches of digits_resnet whose network fingerprint is"):
        compare([other], config(), run, progress=False)


def test_rows_of_other_splits_are_refused(half: PruningProblem, tmp_path: Path) -> None:
    """Selection images of one are reward images of the other."""

    class Renamed:
        """The same task with another fingerprint."""

        fingerprint = "another"

        def __getattr__(self, name: str) -> Any:
            return getattr(half.scorer.task, name)

    settings = config(searcher=("uniform",), repeats=1)
    _, run = go(half, tmp_path / "run", settings)
    scorer = Scorer(half.scorer.network, Renamed(), half.scorer.settings, statistics=half.scorer.statistics)

    with pytest.raises(PruningError, match="whose data fingerprint is .*; now it is another"):
        compare([PruningProblem(scorer, (HALF,))], replace(settings, repeats=2), run, progress=False)


def test_another_policy_of_the_same_path_is_refused(compared: Any, half: PruningProblem, tmp_path: Path) -> None:
    """The file was overwritten meanwhile; rows of other searchers do not mind."""
    _, trained = compared
    first, second = (folder / "policy.safetensors" for folder in sorted(trained.path("trainings").iterdir()))
    path = tmp_path / "policy.safetensors"
    path.write_bytes(first.read_bytes())
    settings = config(searcher=("uniform", "policy"), policy=path, repeats=1)
    go(half, tmp_path / "run", settings)
    path.write_bytes(second.read_bytes())

    with pytest.raises(PruningError, match="whose policy fingerprint is"):
        go(half, tmp_path / "run", replace(settings, repeats=2))
    rows, _ = go(half, tmp_path / "other", config(searcher=("uniform",), repeats=1))
    assert identity(half, settings)["policy_fingerprint"] != rows[0]["policy_fingerprint"] is None


def test_plan_that_breaks_its_budget_is_refused(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would not be compared at equal cost."""
    plan = PruningPlan.unpruned(half.scorer.network.graph)
    found = SearchResult(plan=plan, evaluations=0, seconds=0.0)
    monkeypatch.setattr(compare_search, "searcher_named", lambda _: lambda *_: found)

    with pytest.raises(PruningError, match=r"`--searcher` uniform should keep the budget macs:0\.5.*1\.0000"):
        go(half, tmp_path / "run", config(searcher=("uniform",)))


def test_fine_tuning_has_a_row_for_each_of_its_seeds(half: PruningProblem, tmp_path: Path) -> None:
    """The plan and its earlier scores are the same; the order of the images is not."""
    settings = config(searcher=("uniform",), repeats=1, epochs=1, finetune_repeats=3)
    rows, run = go(half, tmp_path / "run", settings)

    assert [row["finetune_seed"] for row in rows] == [0, 1, 2]
    assert len({row["after_recovery_score"] for row in rows}) == 1
    assert len({row["after_finetuning_score"] for row in rows}) > 1  # two of them may be right about as many images
    assert not list(run.folder.rglob("checkpoint.pt"))


def test_the_same_plan_is_fine_tuned_once(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever found it, for whichever seed."""
    tuned: list[int] = []
    real = compare_measure.fine_tune
    monkeypatch.setattr(compare_measure, "fine_tune", lambda *a, **k: tuned.append(1) or real(*a, **k))
    same = SEARCHERS["uniform"](half, HALF, SearchSettings())
    monkeypatch.setattr(compare_search, "searcher_named", lambda _: lambda *_: same)
    rows, _ = go(half, tmp_path / "run", config(searcher=("uniform", "knapsack"), epochs=1, finetune_repeats=1))

    assert len(tuned) == 1
    assert len({row["after_finetuning_score"] for row in rows}) == 1


@pytest.mark.parametrize("test", [False, True])
def test_test_images_are_read_only_if_asked_for(
    test: bool, half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for the end."""
    read: set[str] = set()
    real = compare_measure.evaluate_network
    monkeypatch.setattr(compare_measure, "evaluate_network", lambda m, t, s, **k: read.add(s) or real(m, t, s, **k))
    rows, _ = go(half, tmp_path / "run", config(searcher=("uniform",), repeats=1, test=test))

    assert ("test" in read) is test
    assert (rows[0]["test_after_recovery_score"] is not None) is test


def test_latency_is_measured_if_asked_for(half: PruningProblem, tmp_path: Path) -> None:
    """As a share of the unpruned network's, with a sentence that says what it is of."""
    settings = config(searcher=("uniform",), repeats=1, latency=True, latency_threads=1)
    rows, _ = go(half, tmp_path / "run", settings)

    assert 0 < rows[0]["latency_ratio"] < 5
    assert "1 thread" in rows[0]["latency"]


def test_ablated_agents_are_trained_apart(half: PruningProblem, tmp_path: Path) -> None:
    """What their policies see is in the policy file."""
    _, run = go(half, tmp_path / "run", config(searcher=("agent:structure", "agent:random"), repeats=1))

    seen = {load_policy(folder / "policy.safetensors")[0].features for folder in run.path("trainings").iterdir()}
    assert seen == {"structure", "random"}


def test_networks_are_told_apart(half: PruningProblem, zoo: Any, tmp_path: Path) -> None:
    """Each has rows and files of its own."""
    other = PruningProblem(Scorer(zoo("digits_vgg"), half.scorer.task, half.scorer.settings), (HALF,))
    settings = config(network=("digits_resnet", "digits_vgg"), searcher=("uniform",), repeats=1)
    run = RunFolder.create(tmp_path / "r", network="n", searcher="s", budget="b", seed=0, config=settings)
    rows = compare([half, other], settings, run, progress=False)

    assert [row["network"] for row in rows] == ["digits_resnet", "digits_vgg"]
    assert len({row["network_fingerprint"] for row in rows}) == 2
    assert all((run.path(row["plan"]).parent / CURVE).exists() for row in rows)


def test_controls_are_other_allocations_at_the_same_price(compared: Any) -> None:
    """Shuffled ratios are not the agent's; the mean is uniform, as the agent may be too where it starts from that."""
    rows, run = compared
    plans = {(row["searcher"], row["seed"]): plan_of(row, run) for row in rows}
    spent = {row["evaluations"] for row in rows if row["searcher"] in ("agent", "shuffled", "mean") if not row["seed"]}

    assert any(plans["shuffled", seed] != plans["agent", seed] for seed in (0, 1))
    assert len(spent) == 1
    sizes = np.array([len(kept) for _, kept in plans["mean", 0].kept])
    uniform = np.array([len(kept) for _, kept in plans["uniform", 0].kept])
    assert np.abs(sizes - uniform).max() <= 1
