"""What the benchmarks keep of a comparison: a grid begun on one machine is ended on another."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prunegym.agents.run_folders.runs import RunFolder
from prunegym.experiments.comparison import measure, search
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.pruning.errors import PruningError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TEXTS = (".json", ".jsonl", ".csv", ".md")


def module(name: str) -> ModuleType:
    """A script of the benchmarks, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    """The script of the grids."""
    return module("compare")


def config(runs: Path, repeats: int = 1) -> CompareConfig:
    """A grid of two searchers, fine-tuned for a moment."""
    few = {"statistics_examples": 16, "recovery_examples": 16, "reward_examples": 32, "evaluations": 4}
    tuned = {"epochs": 1, "finetune_repeats": 1}
    grid = {"network": ("digits_vgg",), "budget": ("macs:0.5",), "searcher": ("uniform", "random")}
    return CompareConfig(**grid, **few, **tuned, repeats=repeats, device="cpu", out=runs / "compare_tiny")


@pytest.fixture(scope="module")
def begun(compare: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A grid with one of its seeds: the run folder, and what is kept of it."""
    folder = tmp_path_factory.mktemp("one machine")
    compare.one_grid(config(folder / "runs"), folder / "kept")
    return folder / "runs" / "compare_tiny", folder / "kept"


@pytest.fixture
def kept(begun: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy of what is kept, as on another machine."""
    return shutil.copytree(begun[1], tmp_path / "kept")


def test_grid_goes_on_from_what_is_kept(
    compare: ModuleType, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the rows that it would have had; nothing that was finished is done again."""
    searched: list[tuple[str, int]] = []
    tuned: list[int] = []
    named, tune = search.searcher_named, measure.fine_tune

    def noted(name: str) -> Any:
        return lambda *given: searched.append((name, given[-1].seed)) or named(name)(*given)

    monkeypatch.setattr(search, "searcher_named", noted)
    monkeypatch.setattr(measure, "fine_tune", lambda *a, **k: tuned.append(1) or tune(*a, **k))
    compare.one_grid(config(tmp_path / "runs", repeats=2), kept)
    assert searched == [("random", 1)]
    assert len(tuned) == 1
    monkeypatch.undo()

    compare.one_grid(config(tmp_path / "whole", repeats=2), tmp_path / "kept whole")
    rows = (tmp_path / "kept whole" / "rows.csv").read_text().splitlines()
    assert sorted((kept / "rows.csv").read_text().splitlines()) == sorted(rows)
    assert len(rows) == 5


def test_interrupted_grid_is_kept(compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it went, and it goes on from there elsewhere."""
    append = RunFolder.append_row

    def stop(self: RunFolder, name: str, row: Any) -> None:
        append(self, name, row)
        if name == "rows.csv":
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append_row", stop)
    with pytest.raises(KeyboardInterrupt):
        compare.one_grid(config(tmp_path / "runs"), tmp_path / "kept")
    monkeypatch.undo()

    assert module("kept").restore(tmp_path / "kept", tmp_path / "elsewhere", config(tmp_path))
    assert len(RunFolder(tmp_path / "elsewhere").read_rows("rows.csv")) == 1
    assert len(list((tmp_path / "elsewhere").glob("searches/*/plan.json"))) == 1


def test_restored_folder_is_the_run_without_its_trails(begun: tuple[Path, Path], tmp_path: Path) -> None:
    """Everything else that a comparison reads is the same."""
    run, kept = begun
    again = tmp_path / "again"
    assert module("kept").restore(kept, again, config(again.parent))

    names = {path.relative_to(again).as_posix() for path in again.rglob("*") if path.is_file()}
    assert {name.split("/")[-1] for name in names} >= {"plan.json", "search.json", "curve.json", "scores.json"}
    for name in names - {"config.json", "env.json"}:
        same = (run / name).read_bytes() == (again / name).read_bytes()
        assert same != (name.endswith("search.json") and "random" in name), name
    assert not list(again.rglob("*.jsonl"))
    assert not list(again.rglob("*.pt"))


def test_only_trails_that_are_drawn_are_left_out(begun: tuple[Path, Path], tmp_path: Path) -> None:
    """A search without its curve still needs them."""
    run = shutil.copytree(begun[0], tmp_path / "run")
    (path,) = run.glob("searches/random*/search.json")
    (path.parent / "curve.json").unlink()
    module("kept").keep(run, tmp_path / "kept")

    lines = [json.loads(line) for line in (tmp_path / "kept" / "files.jsonl").read_text().splitlines()]
    stored = {one["file"]: one["content"] for one in lines}
    assert stored[path.relative_to(run).as_posix()] == json.loads(path.read_text())


def test_no_path_of_the_machine_is_kept(begun: tuple[Path, Path]) -> None:
    """Neither in the configuration nor in the command that was typed."""
    run, kept = begun
    environment = json.loads((run / "env.json").read_text())
    environment["command"] = "compare.py --data=/data/x/cifar10.npz --resnet20 '~/w/r20.th' --network timm/n --runs a/b"
    (run / "env.json").write_text(json.dumps(environment))
    module("kept").keep(run, kept)

    assert json.loads((kept / "env.json").read_text())["command"] == (
        "compare.py --data=cifar10.npz --resnet20 'r20.th' --network timm/n --runs a/b"
    )
    texts = [path.read_text() for path in kept.iterdir() if path.suffix in TEXTS]
    assert len(texts) == 7
    assert not [text for text in texts if str(run.parent.parent) in text]


def test_run_folder_that_is_there_is_left_alone(begun: tuple[Path, Path]) -> None:
    """It may be further than what is kept."""
    run, kept = begun
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}

    assert not module("kept").restore(kept, run, config(run.parent))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.parametrize("missing", ["files.jsonl", None])
def test_rows_that_would_be_lost_are_refused(kept: Path, tmp_path: Path, missing: str | None) -> None:
    """Kept without what it takes to go on, as by earlier versions; or a run folder that is behind."""
    run = tmp_path / "run"
    if missing is not None:
        (kept / missing).unlink()
    else:
        run.mkdir()
    remedy = "Move those rows away" if missing else "Move that run away: it is made anew"

    with pytest.raises(PruningError, match=f"`--runs` should lead to the run .*lacks 2 of its rows. {remedy}"):
        module("kept").restore(kept, run, config(tmp_path))


def test_file_outside_of_the_run_folder_is_refused(kept: Path, tmp_path: Path) -> None:
    """What is kept may come from someone else."""
    with (kept / "files.jsonl").open("a") as file:
        file.write('{"file": "../../outside.json", "content": 1}\n')

    with pytest.raises(PruningError, match="should name files of a run folder"):
        module("kept").restore(kept, tmp_path / "runs" / "run", config(tmp_path))
    assert not list(tmp_path.rglob("outside.json"))
    assert not (tmp_path / "runs" / "run").exists()
