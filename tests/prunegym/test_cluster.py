"""Trainings and comparisons on a Ray cluster: what comes out is what comes out here."""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.configuration.time_limit import TimeLimit, TimeUp
from prunegym.agents.run_folders.finished_rows import ROWS
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.training.loop import METRICS, Trainer, train
from prunegym.envs.cluster import pack
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.cluster import compute, pieces, read_files, take
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.comparison.grid import _grid, compare
from prunegym.experiments.comparison.measure import Judge
from prunegym.experiments.comparison.rows import Key, compute_row
from prunegym.experiments.comparison.search import Searches
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.scoring import Scorer

# Ray leaves sockets and log files to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore")

HALF = Budget.parse("macs:0.5")
AGENT = {"update_evaluations": 4, "imitation_steps": 2, "ppo_epochs": 1, "device": "cpu", "tensorboard": False}
TRAINING = TrainConfig(network=("digits_resnet",), budget=("macs:0.5",), evaluations=40, rounds=2, workers=3, **AGENT)
COMPARISON = CompareConfig(
    network=("digits_resnet",),
    budget=("macs:0.5",),
    searcher=("uniform", "random", "evolution", "agent", "agent best", "mean"),
    repeats=2,
    evaluations=12,
    rounds=1,
    epochs=1,
    finetune_repeats=1,
    **AGENT,
)


@pytest.fixture
def half(scorer: Scorer) -> PruningProblem:
    """The trained digits network at half its MACs, ready to be sent."""
    return PruningProblem(scorer, (HALF,))


def folder(path: Path, config: Any) -> RunFolder:
    """A new run folder, or the one that is there."""
    return RunFolder.create(path, network="n", searcher="s", budget="b", seed=0, config=config)


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they are on any machine."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_rows_that_share_a_search_are_one_piece() -> None:
    """Those of one training, and all seeds of a searcher that has no use for them."""
    found = pieces(list(_grid(replace(COMPARISON, epochs=0, finetune_repeats=3))))

    named = [sorted({(key[2], key[3]) for key in keys}) for keys in found]
    assert sum(map(len, found)) == 12
    assert [("uniform", 0), ("uniform", 1)] in named
    assert [("agent", 1), ("agent best", 1), ("mean", 1)] in named
    assert [("random", 0)] in named
    assert len(named) == 1 + 2 + 2 + 2


def rows_here(half: PruningProblem, run: RunFolder, config: CompareConfig, keys: list[Key]) -> list[dict[str, Any]]:
    """Rows that are computed in the run folder itself."""
    searches, judge = Searches(config, run), Judge(half, config, run)
    return [compute_row(key, half, searches, judge) for key in keys]


def test_task_gives_rows_and_files_of_the_run_folder(half: PruningProblem, tmp_path: Path) -> None:
    """What a node sends back is what the driver would have written; with it, nothing is computed again."""
    config = replace(COMPARISON, searcher=("random",), repeats=1, epochs=1)
    keys = list(_grid(config))
    here = RunFolder(tmp_path / "here")
    there = RunFolder(tmp_path / "there")
    for run in (here, there):
        run.folder.mkdir()
    expected = rows_here(half, here, config, keys)
    threads = torch.get_num_threads()
    try:
        outcome = compute(pack(half), config, keys, {}, math.inf)
        take(outcome, there)
        stale = next(there.path("finetuning").iterdir()) / "checkpoint.pt"
        stale.write_bytes(b"of an earlier task that was stopped half-way")
        again = compute(pack(half), config, keys, read_files(there, list(there.folder.iterdir())), math.inf)
    finally:
        torch.set_num_threads(threads)

    assert outcome.finished
    assert without_times(outcome.rows) == without_times(expected) == without_times(again.rows)
    names = {path.relative_to(here.folder).as_posix() for path in here.folder.rglob("*") if path.is_file()}
    assert outcome.files.keys() == names
    assert [row["seconds"] for row in again.rows] == [row["seconds"] for row in outcome.rows]
    take(again, there)
    assert not stale.exists()


def test_task_that_comes_too_late_does_nothing(half: PruningProblem) -> None:
    """The time limit is that of the command, however long a task has waited."""
    outcome = compute(pack(half), COMPARISON, list(_grid(COMPARISON)), {}, time.time() - 1)

    assert not outcome.finished
    assert not outcome.rows


def test_latency_is_refused_beside_other_work() -> None:
    """It would not be that of the network."""
    pytest.importorskip("ray")
    with pytest.raises(PruningError, match="`--latency` should be left out with --ray"):
        replace(COMPARISON, latency=True, ray="auto")


def test_several_devices_are_refused_beside_other_work() -> None:
    """Tasks reserve a processor each."""
    pytest.importorskip("ray")
    with pytest.raises(PruningError, match=r"`--devices` should be 1 with --ray. Received 2"):
        replace(COMPARISON, devices=2, ray="auto")


@pytest.mark.slow
def test_training_on_a_cluster_is_that_of_local_workers(
    half: PruningProblem, ray_cluster: Callable[[], Any], tmp_path: Path
) -> None:
    """Metrics, plans and policy, byte by byte, though an actor and then a node are killed on the way."""
    here = folder(tmp_path / "here", TRAINING)
    train([half], TRAINING, here, progress=False)
    nodes = ray_cluster()
    config = replace(TRAINING, ray=nodes.address)
    there = folder(tmp_path / "there", TRAINING)
    trainer = Trainer([half], config, there)
    made = 0

    def tick(_: int) -> None:
        nonlocal made
        made += 1
        if made == 6:
            trainer.envs._ray.kill(trainer.envs._actors[0])
        if made == 12:
            nodes.remove_node(nodes.second, allow_graceful=False)

    learn = trainer.run_update

    def run_update() -> dict[str, Any]:
        bar, trainer.tick = trainer.tick, tick
        row = learn()
        trainer.tick = bar
        return row

    trainer.run_update = run_update  # type: ignore[method-assign]
    trainer.run_all(progress=False)
    trainer.close()

    assert trainer.envs.replaced >= 2
    for name in (METRICS, "plan.json", "policy.safetensors"):
        assert there.path(name).read_bytes() == here.path(name).read_bytes()


@pytest.mark.slow
def test_comparison_on_a_cluster_is_that_of_this_machine(
    half: PruningProblem, ray_cluster: Callable[[], Any], tmp_path: Path
) -> None:
    """All rows, though a process and then a node are killed on the way; the folder can be gone on with here."""
    here = folder(tmp_path / "here", COMPARISON)
    expected = compare([half], COMPARISON, here, progress=False)
    nodes = ray_cluster()
    there = folder(tmp_path / "there", COMPARISON)
    rows = there.path(ROWS)

    def disturb() -> None:
        while not rows.exists() or rows.read_bytes().count(b"\n") < 3:
            time.sleep(0.1)
        nodes.remove_node(nodes.second, allow_graceful=False)

    threading.Thread(target=disturb, daemon=True).start()
    found = compare([half], replace(COMPARISON, ray=nodes.address), there, progress=False)

    assert without_times(found) == without_times(expected)
    assert sorted(rows.read_text().splitlines()) == sorted(here.path(ROWS).read_text().splitlines())
    assert compare([], COMPARISON, there, progress=False) == found


@pytest.mark.slow
def test_comparison_on_a_cluster_stops_in_time_and_goes_on_here(
    half: PruningProblem, ray_cluster: Callable[[], Any], tmp_path: Path
) -> None:
    """Tasks that were stopped half-way send what they have; the rest is computed without a cluster."""
    here = folder(tmp_path / "here", COMPARISON)
    expected = compare([half], COMPARISON, here, progress=False)
    there = folder(tmp_path / "there", COMPARISON)
    config = replace(COMPARISON, ray=ray_cluster().address)

    with pytest.raises(TimeUp):
        compare([half], config, there, progress=False, limit=TimeLimit(12))
    before = there.read_rows(ROWS)
    found = compare([half], COMPARISON, there, progress=False)

    assert len(before) < len(found)
    assert without_times(found) == without_times(expected)
