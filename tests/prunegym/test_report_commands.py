"""Run folders of every command on the page: finished or not, with what each came to."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegym.agents.run_folders.finished_rows import ROWS
from prunegym.agents.run_folders.running import RESULT
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.commands.cli import main
from prunegym.reporting.gather import Run, gather
from prunegym.reporting.report import build_page
from prunegym.reporting.scores import collect
from prunegym.reporting.svg import Gallery
from prunegym.reporting.words import suggest

COMMANDS = ("inspect", "pretrain", "train", "evaluate", "transfer", "compare", "prune", "finetune", "export", "demo")


@pytest.fixture(scope="module")
def folders(pruning_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run folder of every command."""
    made = tmp_path_factory.mktemp("commands")
    few = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32"]
    policy = str(pruning_runs["train"] / "policy.safetensors")
    arguments = {
        "inspect": ["--network", "digits_vgg"],
        "pretrain": ["--network", "digits_vgg", "--epochs", "1"],
        "transfer": ["--network", "digits_vgg", "--policy", policy, "--evaluations", "0", *few],
        "finetune": [str(pruning_runs["prune"]), "--epochs", "1"],
        "export": [str(pruning_runs["prune"]), "--format", "safetensors"],
    }
    for command, more in arguments.items():
        assert main([command, *more, "--out", str(made / command)]) == 0
    asked = {"network": ["a", "b"], "searcher": "demo", "budget": "macs:0.5", "seed": 0, "config": {}}
    RunFolder.create(made / "demo", command="demo", **asked).write_json(RESULT, {})
    return {**pruning_runs, **{name: made / name for name in COMMANDS if name not in pruning_runs}}


@pytest.fixture
def unfinished(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies the folder of a command as it is the moment before it ends."""

    def copy(command: str) -> Path:
        folder = shutil.copytree(folders[command], tmp_path / command)
        (folder / RESULT).unlink()
        return folder

    return copy


def page_of(*folders: Path) -> str:
    """The page of run folders."""
    return build_page(gather(folders), Gallery()).render()


@pytest.mark.parametrize("command", COMMANDS)
def test_run_is_finished_once_it_has_a_result(
    command: str, folders: dict[str, Path], unfinished: Callable[[str], Path]
) -> None:
    """Whatever else its folder holds by then; the table and the verdict agree."""
    html, without = page_of(folders[command]), page_of(unfinished(command))

    assert ">finished</td>" in html
    assert "Not finished" not in html
    assert ">not finished</td>" in without
    assert f"Not finished: {command}." in without


def test_comparison_that_is_extended_is_not_finished_until_it_is_done(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its result of fewer rows is no longer its result."""
    folder = shutil.copytree(folders["compare"], tmp_path / "compare")
    config = RunFolder(folder).read_json("config.json")["config"]
    options = {"network": "digits_resnet", "budget": "macs:0.5", "repeats": "2", "rounds": "1"}
    for name in ("evaluations", "update_evaluations", "imitation_steps", "ppo_epochs", "statistics_examples"):
        options[name] = str(config[name])
    for name in ("recovery_examples", "reward_examples"):
        options[name] = str(config[name])
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    searchers = [part for name in (*config["searcher"], "knapsack") for part in ("--searcher", name)]
    stopped = RuntimeError("stopped")

    def stop(*_: object, **__: object) -> None:
        raise stopped

    monkeypatch.setattr("prunegym.experiments.comparison.rows.compute_row", stop)
    with pytest.raises(RuntimeError, match="stopped"):
        main(["compare", *flags, *searchers, "--latency", "--device", "cpu", "--out", str(folder)])

    assert not gather([folder])[0].is_finished


@pytest.mark.parametrize("command", ["train", "evaluate", "transfer"])
def test_rows_of_a_run_under_way_are_shown(command: str, unfinished: Callable[[str], Path]) -> None:
    """As far as it went: they stand in a table before they stand in the result."""
    folder = unfinished(command)
    rows = RunFolder(folder).read_rows(ROWS)

    found = collect(gather([folder])).rows
    assert rows
    assert [(one.searcher, one.score) for one in found] == [(row["searcher"], row["selection_score"]) for row in rows]


def test_fine_tuning_is_told_with_its_gain(folders: dict[str, Path]) -> None:
    """Before and after, on the test images, under the name of the network and not of its folder."""
    scores = RunFolder(folders["finetune"]).read_json(RESULT)["test_scores"]
    before, after = (f"{100 * scores[name]:.1f} %" for name in ("before_finetuning", "after_finetuning"))

    (run,) = gather([folders["finetune"]])
    page = build_page([run], Gallery())
    assert run.network_names == ["digits_resnet"]
    assert page.sentences[0].about == "digits_resnet, fine-tuned for 1 epoch, test images"
    assert f"{before} before, {after} after" in page.sentences[0].text
    assert "noise ±" in page.sentences[0].text
    assert page.headlines[0].cards[0].value == after
    assert page.render().count(f">{after}</td>") == 1


def test_exported_files_are_told_with_their_difference(folders: dict[str, Path]) -> None:
    """How far from the network, how large, how to read them."""
    (file,) = RunFolder(folders["export"]).read_json(RESULT)["files"]

    html = page_of(folders["export"]).replace("<wbr>", "")
    for cell in (Path(file["path"]).name, f"{file['difference']:.1e}", f"{file['bytes'] / 2**20:.3g} MiB"):
        assert f">{cell}</td>" in html
    assert "digits_resnet as safetensors" in html


def test_network_that_was_fine_tuned_and_exported_stands_beside_its_pruning(folders: dict[str, Path]) -> None:
    """One table for both networks, one for the files."""
    html = page_of(*(folders[name] for name in ("prune", "finetune", "export")))

    assert html.index("accuracy, right after pruning") < html.index("accuracy, before fine-tuning")
    assert "No network was pruned for good" not in html


@pytest.mark.parametrize("command", ["finetune", "export"])
def test_command_that_is_suggested_has_no_empty_options(command: str, folders: dict[str, Path]) -> None:
    """A saved network is given by its folder: a word stands for its name, unless another run has it."""
    alone, beside = gather([folders[command]]), gather([folders[command], folders["prune"]])

    assert suggest(alone, "train") == "prunegym train --network NETWORK --data DATA"
    assert suggest(beside, "prune") == "prunegym prune --network digits_resnet --data digits --budget macs:0.5"


def test_empty_option_is_left_out_of_a_suggestion() -> None:
    """An empty text is none."""
    asked = {"command": "finetune", "config": {"network": "net", "data": "", "weights": None}}
    run = Run(folder=Path("r"), name="r", command="finetune", asked=asked)

    assert suggest([run], "prune") == "prunegym prune --network net"


def test_commands_are_all_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    """One that is added is tried here too, unless it leaves no folder."""
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    first = capsys.readouterr().out.splitlines()[0]

    assert sorted(first[first.index("{") + 1 : first.index("}")].split(",")) == sorted(
        (*COMMANDS, "measure", "report", "evaluations")
    )


def test_report_of_a_saved_network_is_written(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """By the command."""
    assert main(["report", str(folders["finetune"]), "--json"]) == 0
    assert "fine-tuned" in json.loads(capsys.readouterr().out)["verdict"][0]["about"]
