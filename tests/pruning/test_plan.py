"""Plans name what stays, survive a file, and refuse the wrong network."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

Toys = Callable[[str], PrunableNetwork]


def test_best_scores_are_kept(toys: Toys, rng: np.random.Generator) -> None:
    """As many as asked for in each group, against sorting."""
    graph = toys("residual").graph
    counts, scores = np.array([3, 6, 1, 2]), rng.random(graph.units)

    plan = PruningPlan.from_scores(graph, counts, scores)

    for (name, kept), group, count in zip(plan.kept, graph.groups, counts, strict=True):
        best = sorted(range(group.size), key=lambda k, own=scores[group.units]: -own[k])[:count]
        assert (name, kept) == (group.name, tuple(sorted(best)))


def test_ties_keep_the_lower_index(toys: Toys) -> None:
    """Equal scores must not depend on the sorting algorithm."""
    graph = toys("residual").graph

    plan = PruningPlan.from_counts(graph, np.array([2, 1, 3, 1]))

    assert [kept for _, kept in plan.kept] == [(0, 1), (0,), (0, 1, 2), (0,)]


def test_mask_and_plan_are_inverse(toys: Toys, random_plan: Callable[..., PruningPlan]) -> None:
    """From plan to mask and back."""
    network = toys("mobile")
    plan = random_plan(network, np.random.default_rng(0))

    assert PruningPlan.from_mask(network.graph, plan.mask(network.graph)) == plan


def test_equal_plans_hash_alike(toys: Toys) -> None:
    """Scores are cached by plan."""
    graph = toys("mobile").graph

    assert len({PruningPlan.unpruned(graph), PruningPlan.unpruned(graph)}) == 1


def test_plan_survives_a_file(toys: Toys, tmp_path: Path, random_plan: Callable[..., PruningPlan]) -> None:
    """Written and read."""
    plan = random_plan(toys("mobile"), np.random.default_rng(0))

    plan.save(tmp_path / "plan.json")

    assert PruningPlan.load(tmp_path / "plan.json") == plan


def test_file_is_written_to_a_folder_that_is_missing(toys: Toys, tmp_path: Path) -> None:
    """As for everything else that is written."""
    PruningPlan.unpruned(toys("mobile").graph).save(tmp_path / "new" / "plan.json")

    assert (tmp_path / "new" / "plan.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "`plan` should be a readable JSON file"),
        ("[1]", "`plan` should be a JSON object. Received a list"),
        ("{}", "`plan` should be a plan of format 1. Received format None"),
        ('{"format": 2, "kept": {}}', "Received format 2"),
        ('{"format": 1, "kept": [1]}', "`plan` should be a plan of format 1"),
        ('{"format": 1, "kept": {"conv": 3}}', "kept channel numbers of group conv. Received 3"),
        ('{"format": 1, "kept": {"conv": ["a"]}}', "kept channel numbers of group conv"),
        ('{"format": 1, "kept": {"conv": [1.5]}}', "kept channel numbers of group conv"),
    ],
)
def test_damaged_file_is_rejected(tmp_path: Path, content: str, message: str) -> None:
    """Plans come from strangers too."""
    (tmp_path / "plan.json").write_text(content)

    with pytest.raises(PruningError, match=message):
        PruningPlan.load(tmp_path / "plan.json")


def test_missing_file_is_rejected(tmp_path: Path) -> None:
    """The message names it."""
    with pytest.raises(PruningError, match=r"`plan` should be a readable JSON file. Received .*absent\.json"):
        PruningPlan.load(tmp_path / "absent.json")


@pytest.mark.parametrize("indices", [[], [8], [-1]])
def test_channels_that_are_not_there_are_rejected(toys: Toys, indices: list[int]) -> None:
    """None kept, or more than the group has."""
    graph = toys("residual").graph
    content = PruningPlan.unpruned(graph).to_json()
    content["kept"]["stem"] = indices

    with pytest.raises(PruningError, match="`plan` should keep between 1 and 8 channels of group stem"):
        PruningPlan.from_json(content).mask(graph)


def test_plan_for_another_network_is_rejected(toys: Toys) -> None:
    """The names differ."""
    with pytest.raises(PruningError, match="`plan` should name exactly the network's 3 prunable groups"):
        PruningPlan.unpruned(toys("residual").graph).mask(toys("mobile").graph)


def test_order_of_groups_in_a_file_does_not_matter(toys: Toys) -> None:
    """JSON objects have no order."""
    graph = toys("residual").graph
    content = PruningPlan.unpruned(graph).to_json()
    content["kept"] = dict(reversed(content["kept"].items()))

    assert PruningPlan.from_json(json.loads(json.dumps(content))).mask(graph).all()
