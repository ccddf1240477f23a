"""The page and the pictures of a comparison that was made."""

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from prunegym.agents.run_folders.runs import RunFolder
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison import pictures as compare_pictures
from prunegym.experiments.comparison import report as compare_report
from prunegym.experiments.comparison.bootstrap import performance_profiles
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.comparison.grid import compare
from prunegym.experiments.comparison.report import report, terminal_text
from prunegym.experiments.comparison.rows import curve_rows
from prunegym.experiments.comparison.summary import Table, summarise
from prunegym.pruning.budget import Budget
from prunegym.reporting.pictures import new_figure

BUDGETS = ("macs:0.5", "params:0.3")
CONFIG = CompareConfig(
    network=("digits_resnet",),
    budget=BUDGETS,
    searcher=("uniform", "random"),
    evaluations=3,
    repeats=2,
    device="cpu",
)
Compared = tuple[list[dict[str, Any]], RunFolder]


@pytest.fixture(scope="module")
def compared(problem: PruningProblem, tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two budgets, two searchers, two seeds."""
    folder = tmp_path_factory.mktemp("report") / "run"
    run = RunFolder.create(folder, network="n", searcher="s", budget="b", seed=0, config=CONFIG)
    both = PruningProblem(problem.scorer, tuple(map(Budget.parse, BUDGETS)))
    return compare([both], CONFIG, run, progress=False), run


@pytest.fixture(scope="module")
def content(compared: Compared) -> dict[str, Any]:
    """The report on it."""
    return report(compared[0], CONFIG, compared[1])


@pytest.fixture
def page(content: dict[str, Any]) -> str:
    """The Markdown."""
    return (Path(content["folder"]) / "table.md").read_text()


def test_page_says_what_the_figures_are_of(page: str) -> None:
    """Recovery, data, split, what the intervals are over, and that few pairs make them too narrow."""
    for words in (
        "Recovery: reconstruct",
        "digits (split seed 0)",
        "selection split",
        "over 2 (network, budget) pairs, each the mean of 2 search seeds",
        "too narrow",
        "## At 3 evaluations",
        "## At the seconds of the fastest search",
        "minus uniform",
    ):
        assert words in page


def test_page_has_the_mean_of_every_pair(page: str, compared: Compared) -> None:
    """In percent."""
    rows, _ = compared

    for budget in BUDGETS:
        scores = [r["after_recovery_score"] for r in rows if (r["budget"], r["searcher"]) == (budget, "random")]
        line = next(line for line in page.splitlines() if line.startswith(f"| digits_resnet | {budget} |"))
        assert f"{100 * np.mean(scores):.2f}" in line


def test_search_that_overspends_is_told(compared: Compared) -> None:
    """The table would not be one at equal evaluations."""
    summary = summarise(Table(compared[0], curve_rows(*compared), CONFIG.searchers))

    assert compare_report._overspent(summary, CONFIG) == []
    less = replace(CONFIG, evaluations=2)
    assert compare_report._overspent(summary, less)[0].startswith("**Not matched**: random spent more")


def test_curves_are_kept_as_a_table(content: dict[str, Any], compared: Compared) -> None:
    """One tidy row per change of a plan."""
    with (Path(content["folder"]) / "curves.csv").open(newline="") as file:
        kept = list(csv.DictReader(file))

    expected = curve_rows(*compared)
    assert [{key: str(value or "") for key, value in row.items() if value != 0} for row in expected] == [
        {key: value for key, value in row.items() if value not in ("0", "0.0")} for row in kept
    ]


def test_text_for_the_terminal_names_everyone(content: dict[str, Any]) -> None:
    """And where there is more."""
    text = terminal_text(content)

    assert all(name in text for name in ("uniform", "random", "minus uniform", "table.md"))


def test_pictures_are_pictures(content: dict[str, Any]) -> None:
    """Not blank, and SVG that an XML parser reads."""
    for path in map(Path, content["files"]):
        if path.suffix == ".png":
            pixels = np.asarray(Image.open(path).convert("L"))
            assert pixels.std() > 5
            assert min(pixels.shape) > 300
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_steps_follow_the_plan_in_force() -> None:
    """Nothing before the first plan; afterwards the last one by then."""
    points = [{"seconds": 1.0, "after_recovery_score": 0.4}, {"seconds": 3.0, "after_recovery_score": 0.6}]
    found = compare_pictures._steps(points, "seconds", np.array([0.5, 1.0, 2.9, 3.0, 9.0]))

    assert np.isnan(found[0])
    assert found[1:].tolist() == [0.4, 0.4, 0.6, 0.6]
    assert compare_pictures._steps(points, None, np.array([0.0, 1.0])).tolist() == [0.6, 0.6]


def test_many_searchers_are_told_apart() -> None:
    """By colour, dashes and marks together."""
    styles = [tuple(compare_pictures._style(index).items()) for index in range(18)]

    assert len(set(styles)) == 18


def test_profiles_are_drawn_for_one_run_each(tmp_path: Path) -> None:
    """There is no band to draw, and nothing to warn about."""
    profiles = performance_profiles({"a": [[0.5]], "b": [[0.5]]})
    compare_pictures.draw_profiles(tmp_path / "profiles", profiles, title="t")

    assert (tmp_path / "profiles.png").stat().st_size > 0


def test_table_of_the_rows_has_all_pairs_and_seeds(compared: Compared) -> None:
    """As in the grid."""
    table = Table(compared[0], curve_rows(*compared), CONFIG.searchers)

    assert table.pairs == [("digits_resnet", budget) for budget in BUDGETS]
    assert table.seeds == [0, 1]


def test_curves_far_below_the_best_are_named_and_leave_the_others_their_room(tmp_path: Path) -> None:
    """Of one pair the legend is ranked."""
    shared = {"network": "n", "budget": "macs:0.5", "seed": 0, "seconds": 1.0, "evaluations": 3}
    ends = {"poor": 0.15, "good": 0.7, "best": 0.8}
    curves = [{**shared, "searcher": name, "after_recovery_score": score} for name, score in ends.items()]
    table = Table([{**one, "plan": one["searcher"]} for one in curves], curves, tuple(ends))
    axes = new_figure(4, 3).subplots()
    compare_pictures.draw_searches(axes, table, ("n", "macs:0.5"), "evaluations")

    axes.set_ylim(*compare_pictures._shown_scores(axes))

    assert axes.get_ylim()[0] == pytest.approx(50)
    assert compare_pictures._ranked(axes)[1] == ["best", "good", "poor (below)"]
