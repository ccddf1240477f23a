import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import prunegym
from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.searching.search import Search
from prunegym.commands import cli, network_commands
from prunegym.commands.cli import main, parse
from prunegym.experiments.prune import describe

#: Few images of everything: the numbers do not matter.
FEW = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32", "--device", "cpu"]
NETWORK = ["--network", "digits_vgg"]
Run = Callable[..., Any]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command with ``--json`` and read what it prints."""

    def command(*arguments: object) -> Any:
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out)

    return command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a network trained for a moment."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    assert main(["pretrain", *NETWORK, "--epochs", "1", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def weights(base: Path) -> list[str]:
    """The network and its weights, as flags."""
    return [*NETWORK, "--weights", str(base / "model.safetensors")]


@pytest.fixture(scope="module")
def agent(weights: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an agent trained for a moment."""
    folder = tmp_path_factory.mktemp("runs") / "agent"
    size = ["--evaluations", "2", "--update-evaluations", "2", "--imitation-steps", "1"]
    assert main(["train", *weights, *FEW, *size, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def policy(agent: Path) -> list[str]:
    """The agent's policy, as a flag."""
    return ["--policy", str(agent / "policy.safetensors")]


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """One line."""
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"prunegym {prunegym.__version__}\n"


COMMANDS = ("inspect", "pretrain", "train", "evaluate", "compare", "transfer", "prune", "measure", "report", "demo")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_printed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """For the program and for each command, on standard output."""
    with pytest.raises(SystemExit) as end:
        main([*([command] if command else []), "--help"])

    assert end.value.code == 0
    assert f"usage: prunegym {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_pytorch() -> None:
    """It is asked for often."""
    code = "import sys, prunegym.commands.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.stdout.strip() == "False"


def test_unknown_flag_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    """The flag that was meant is named."""
    with pytest.raises(SystemExit) as end:
        main(["train", "--netwrk", "digits_vgg"])

    assert end.value.code == 2
    assert "--network" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "transfer", "compare", "prune"])
@pytest.mark.parametrize(
    ("flag", "typed", "nearest"),
    [
        ("--recovery", "reconstuct", "reconstruct"),
        ("--recovery", "destil", "distill"),
        ("--measure", "divergense", "divergence"),
        ("--recovery-split", "calibraton", "calibration"),
    ],
)
def test_unknown_name_is_refused_with_those_there_are(
    command: str, flag: str, typed: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is computed."""
    with pytest.raises(SystemExit) as end:
        main([command, *NETWORK, flag, typed])

    assert end.value.code == 2
    told = re.sub(r"[│\s]+", " ", capsys.readouterr().err)
    assert f"invalid choice '{typed}' for argument '{flag}'" in told
    assert f"'{nearest}'" in told.partition("Expected one of")[2]


@pytest.mark.parametrize("flag", ["--regime", "--no-compensate", "--recalibration-examples"])
def test_flag_of_an_earlier_version_is_refused(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Rather than left without effect."""
    with pytest.raises(SystemExit) as end:
        main(["prune", *NETWORK, flag])

    assert end.value.code == 2
    assert flag in capsys.readouterr().err


def test_recovery_of_nothing_is_not_the_default() -> None:
    """`none` is a name like the others."""
    typed = [parse(["prune", *NETWORK, *more]) for more in ([], ["--recovery", "none"], ["--recovery", "distill"])]

    assert [one.recovery for one in typed] == ["auto", "none", "distill"]
    assert [one.recovery_name for one in typed][1:] == ["none", "distill"]


@pytest.mark.parametrize(
    ("asked", "recovery"),
    [
        (["--epochs", "0"], "reconstruct"),
        (["--epochs", "1"], "compensate"),
        (["--epochs", "0", "--recovery", "none"], "none"),
        (["--epochs", "0", "--recovery", "distill", "--recovery-steps", "2"], "distill"),
    ],
)
def test_prune_recovers_as_asked_for(
    run: Run, weights: list[str], asked: list[str], recovery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by default as suits what follows."""
    monkeypatch.setattr("prunegym.experiments.prune.MEASURED_IN", ("torch",))  # exports take seconds
    content = run("prune", *weights, *FEW, "--searcher", "uniform", *asked)

    assert content["recovery"] == recovery


def test_repeated_flags_add_up() -> None:
    """Networks, weights and budgets."""
    config = parse(["train", *NETWORK, "--network", "digits_resnet", "--budget", "macs:0.5", "--budget", "macs:0.3"])

    assert isinstance(config, TrainConfig)
    assert config.network == ("digits_vgg", "digits_resnet")
    assert config.budget == ("macs:0.5", "macs:0.3")


def test_inspect_lists_groups(run: Run, tmp_path: Path) -> None:
    """Without data; a folder only if asked for."""
    content = run("inspect", *NETWORK, "--out", tmp_path / "run")

    assert content["macs"] > 0
    assert {"name", "channels", "made_by", "read_by"} <= content["groups"][0].keys()
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == content


def test_inspect_measures_latency_when_asked(run: Run, tmp_path: Path) -> None:
    """The table is kept below the data root, with its error on other plans."""
    flags = ["--latency", "--latency-threads", "1", "--data-root", tmp_path, "--device", "cpu", "--latency-plans", "2"]
    content = run("inspect", *NETWORK, *flags)

    assert 0 < content["reachable"]["latency"] <= 1
    assert content["latency_seconds"] > 0
    assert len(content["latency_error"]["errors"]) == 2
    (table,) = (tmp_path / "latency").glob("*.json")
    assert json.loads(table.read_text())["error"] == content["latency_error"]
    assert run("inspect", *NETWORK, *flags[:-1], "0")["latency_error"] is None
    assert run("inspect", *NETWORK)["latency_seconds"] is None


def test_inspect_fits_the_network_to_data_when_given(run: Run, tmp_path: Path) -> None:
    """Classes and image size are those of the data."""
    images = np.zeros((120, 12, 12), dtype=np.uint8)
    labels = np.arange(120) % 3
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images[:30], y_test=labels[:30])

    content = run("inspect", *NETWORK, "--data", tmp_path / "d.npz")

    assert content["frozen"][0]["channels"] == 3
    assert content["macs"] > run("inspect", *NETWORK)["macs"]


def test_pretrain_leaves_weights_and_test_accuracy(base: Path) -> None:
    """And which images were in which split."""
    result = json.loads((base / "result.json").read_text())

    assert 0 < result["test_score"] < 1
    assert Path(result["weights"]).is_file()
    assert set(np.load(base / "splits.npz")) == {"train", "calibration", "reward", "selection", "test"}


def test_finished_run_is_not_computed_again(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command with the same folder prints the same result."""
    monkeypatch.setattr(network_commands, "pretrain", pytest.fail)

    code = main(["pretrain", *NETWORK, "--epochs", "1", "--device", "cpu", "--out", str(base), "--json"])

    out, err = capsys.readouterr()
    assert code == 0
    assert json.loads(out) == json.loads((base / "result.json").read_text())
    assert "finished already" in err


def test_folder_of_another_run_is_refused(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The differing field is named."""
    assert main(["pretrain", *NETWORK, "--epochs", "2", "--device", "cpu", "--out", str(base)]) == 2
    assert "config.epochs was 1 and is 2" in capsys.readouterr().err


def test_train_leaves_policy_curve_and_plans(agent: Path) -> None:
    """The policy's own plan and the best that was sampled are different results."""
    result = json.loads((agent / "result.json").read_text())

    assert [row["searcher"] for row in result["rows"]] == ["uniform", "knapsack", "policy", "best sampled"]
    assert set(result["priors"].values()) <= {"knapsack", "uniform", "halfway from uniform to the knapsack"}
    assert all(row["cost"] <= 0.5 for row in result["rows"])
    assert result["evaluations"] >= 2
    assert (agent / "policy.safetensors").is_file()
    assert (agent / "metrics.csv").is_file()
    assert any((agent / "tensorboard").iterdir())
    assert len(list(agent.glob("plan_*.json"))) == 2


def test_evaluate_measures_the_unpruned_network(run: Run, weights: list[str], base: Path, tmp_path: Path) -> None:
    """Neither policy nor budget: the accuracy that training told; without weights another."""
    content = run("evaluate", *weights, "--device", "cpu", "--out", tmp_path / "a")
    untrained = run("evaluate", *NETWORK, "--device", "cpu", "--out", tmp_path / "b")

    told = json.loads((base / "result.json").read_text())["test_score"]
    assert content["rows"][0]["test_score"] == told != untrained["rows"][0]["test_score"]


def test_evaluate_puts_a_policy_beside_the_baselines(
    run: Run, weights: list[str], policy: list[str], tmp_path: Path
) -> None:
    """On every budget; the test images only if asked."""
    budgets = ["--budget", "macs:0.5", "--budget", "params:0.6"]
    rows = run("evaluate", *weights, *FEW, *policy, *budgets, "--out", tmp_path / "a")["rows"]
    tested = run("evaluate", *weights, *FEW, "--searcher", "uniform", "--test", "--out", tmp_path / "b")["rows"]

    assert [row["searcher"] for row in rows] == ["uniform", "knapsack", "policy"] * 2
    assert [row["budget"] for row in rows] == ["macs:0.5"] * 3 + ["params:0.6"] * 3
    assert "test_score" not in rows[0]
    assert [row["searcher"] for row in tested] == ["uniform"]
    assert "test_score" in tested[0]


def test_compare_leaves_rows_table_and_pictures(
    run: Run, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given its folder again, it computes nothing and prints the same."""
    size = ["--evaluations", "8", "--update-evaluations", "2", "--imitation-steps", "1", "--rounds", "1"]
    searchers = ["--searcher", "uniform", "--searcher", "agent", "--searcher", "agent best"]
    command = ["compare", *weights, *FEW, *size, *searchers, "--repeats", "2", "--seconds", "1000"]
    content = run(*command, "--out", tmp_path)
    again = run(*command, "--out", tmp_path)

    assert again == content == json.loads((tmp_path / "result.json").read_text())
    assert len(content["rows"]) == 6
    assert [one["searcher"] for one in content["summary"]] == ["uniform", "agent", "agent best"]
    assert list(content["at_seconds"]) == ["1000 s"]
    assert all(Path(file).stat().st_size > 0 for file in content["files"])
    for name in ("rows.csv", "curves.csv", "table.md", "anytime.svg", "profiles.png", "splits.npz"):
        assert (tmp_path / name).is_file()
    capsys.readouterr()
    assert main([*command, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "minus agent" in out
    assert "nothing is computed again" in err


def test_compare_refuses_other_weights_and_leaves_the_folder_alone(
    run: Run, weights: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder may be extended, but not by rows of a network that was trained otherwise."""
    flags = [*FEW, "--searcher", "uniform", "--out", str(tmp_path)]
    run("compare", *weights, *flags, "--repeats", "1")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    assert main(["compare", *NETWORK, *flags, "--repeats", "2"]) == 2

    assert "whose network fingerprint is" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.slow
def test_compare_survives_being_killed(weights: list[str], tmp_path: Path) -> None:
    """SIGKILL after the first rows: the rest is added to them."""
    size = ["--evaluations", "40", "--repeats", "3", "--searcher", "uniform", "--searcher", "random"]
    command = [sys.executable, "-m", "prunegym", "compare", *weights, *FEW, *size, "--out", str(tmp_path / "run")]
    rows = tmp_path / "run" / "rows.csv"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (rows.exists() and rows.read_text().count("\n") > 3):
            time.sleep(0.01)
        process.kill()
    before = rows.read_text()
    before = before[: before.rfind("\n") + 1]

    assert subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120).returncode == 0

    after = rows.read_text()
    assert 3 < before.count("\n") < 7
    assert after.startswith(before)
    assert after.count("\n") == 7


def test_transfer_is_zero_shot_and_few_shot(run: Run, policy: list[str], tmp_path: Path) -> None:
    """On a network the policy has not seen."""
    other = ["transfer", "--network", "digits_resnet", *policy, *FEW]
    zero = run(*other, "--out", tmp_path / "a")["rows"]
    size = ["--evaluations", "2", "--update-evaluations", "2", "--imitation-steps", "1"]
    few = run(*other, *size, "--test", "--out", tmp_path / "b")["rows"]

    assert [row["searcher"] for row in zero] == ["uniform", "knapsack", "zero-shot"]
    assert [row["searcher"] for row in few][3:] == ["few-shot", "few-shot best"]
    assert "test_score" in few[0]
    assert "test_score" not in zero[0]


def test_prune_saves_a_smaller_network(run: Run, weights: list[str], policy: list[str], tmp_path: Path) -> None:
    """By the policy; it can be loaded, and in ONNX Runtime and as a program it gives the same."""
    flags = ["--epochs", "1", "--onnx", "--program", "--out", tmp_path]
    content = run("prune", *weights, *FEW, *policy, *flags)

    model = prunegym.load(tmp_path)
    assert model(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert content["macs"]["after"] <= 0.5 * content["macs"]["before"]
    assert None not in content["test_scores"].values()
    assert [row["backend"] for row in content["latency"]] == ["torch", "onnxruntime"]
    assert [one["format"] for one in content["exports"]] == ["onnx", "program"]
    assert all(one["difference"] < 1e-3 and one["dynamic_batch"] for one in content["exports"])
    for name in ("plan.json", "result.json", "model.onnx", "metrics.csv", "splits.npz"):
        assert (tmp_path / name).is_file()
    images = torch.randn(5, 1, 8, 8)
    assert torch.allclose(prunegym.load_program(tmp_path / "model.pt2")(images), model(images), atol=1e-5)


@pytest.fixture
def no_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes seconds."""
    monkeypatch.setattr("prunegym.experiments.prune.measure_speed", lambda *_: [])


@pytest.mark.usefixtures("no_latency")
def test_prune_to_a_latency_tells_what_was_measured_and_does_not_measure_again(
    run: Run, weights: list[str], tmp_path: Path
) -> None:
    """Not even when it was interrupted after the search: a clock never says the same twice."""
    flags = [*FEW, "--budget", "latency:0.9", "--latency-threads", "1", "--data-root", tmp_path / "root"]
    flags += ["--searcher", "uniform", "--epochs", "0", "--out", tmp_path / "run"]

    kept = run("prune", *weights, *flags)["latency_budget"]
    (tmp_path / "run" / "result.json").unlink()
    again = run("prune", *weights, *flags)

    assert kept["asked"] == 0.9
    assert kept["interval"][0] <= kept["measured"] <= kept["interval"][1]
    assert again["latency_budget"] == kept
    assert kept["sentence"] in describe(again)


@pytest.mark.usefixtures("no_latency")
def test_prune_carries_out_a_plan_of_another_run(run: Run, weights: list[str], agent: Path, tmp_path: Path) -> None:
    """The best plan that a training sampled, for instance."""
    plan = next(agent.glob("plan_best*.json"))

    content = run("prune", *weights, *FEW, "--plan", plan, "--epochs", "0", "--out", tmp_path)

    kept = {name: len(indices) for name, indices in json.loads(plan.read_text())["kept"].items()}
    assert {name: one["after"] for name, one in content["channels"].items()} == kept
    assert content["searcher"] == "plan"
    assert content["test_scores"]["after_finetuning"] is None


@pytest.mark.usefixtures("no_latency")
def test_interrupted_pruning_keeps_its_plan(
    run: Run, weights: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search is not paid for twice."""
    arguments = ["prune", *weights, *FEW, "--searcher", "random", "--evaluations", "2", "--epochs", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(network_commands, "carry_out", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main([*arguments, "--out", str(tmp_path)]) == cli.INTERRUPTED
    plan = (tmp_path / "plan.json").read_bytes()
    monkeypatch.setattr(network_commands, "find_plan", pytest.fail)

    content = run(*arguments, "--out", tmp_path)

    assert content["search"]["evaluations"] == 2
    assert (tmp_path / "plan.json").read_bytes() == plan


def test_user_network_goes_the_whole_way(
    run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path, no_latency: None
) -> None:
    """A function in a file, with weights of its own."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),\n"
        "        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))\n"
    )

    arguments = ["prune", "--network", f"{file}:net", *FEW, "--epochs", "0", "--out", str(tmp_path / "run")]
    content = run(*arguments)

    assert main(arguments) == 0
    assert f"load it with prunegym.load('{tmp_path / 'run'}', allow_code=True)" in capsys.readouterr().out
    assert content["macs"]["after"] < content["macs"]["before"]
    assert prunegym.load(tmp_path / "run", allow_code=True)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_interruption_tells_how_to_continue(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 130, and the command with its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network_commands, "pretrain", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))

    assert main(["pretrain", *NETWORK, "--device", "cpu"]) == 130

    folder = next((tmp_path / "runs").iterdir())
    said = capsys.readouterr().err
    assert f"Continue with: prunegym pretrain --network digits_vgg --device cpu --out runs/{folder.name}" in said


def test_command_that_goes_on_is_the_last_line(
    capsys: pytest.CaptureFixture[str], weights: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below the bar of the search that was interrupted, which ends before."""
    monkeypatch.setattr(Search, "score", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    assert main(["prune", *weights, *FEW, "--searcher", "random", "--out", str(tmp_path)]) == cli.INTERRUPTED

    gc.collect()
    said = capsys.readouterr().err
    assert "random:   0%" in said
    assert said.splitlines()[-1].startswith("prunegym: interrupted. Continue with: prunegym prune")


def test_network_of_ones_own_is_inspected_at_its_own_size(run: Run, tmp_path: Path) -> None:
    """Which its defaults tell, or flags where there are none."""
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n"
        "def net(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),\n"
        "        nn.Linear(8, num_classes))\n"
        "def grey(num_classes=5, in_channels=1):\n"
        "    return net(num_classes, in_channels)\n"
    )

    grey = run("inspect", "--network", f"{file}:grey", "--image-size", 8)
    asked = run("inspect", "--network", f"{file}:net", "--image-size", 8, "--num-classes", 5, "--in-channels", 1)

    assert grey["macs"] == asked["macs"] == 6 * 6 * 8 * 9 + 8 * 5


def test_interruption_before_anything_was_computed_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no folder to continue from."""
    monkeypatch.setattr(network_commands, "build_task", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))

    assert main(["pretrain", *NETWORK]) == 130
    assert "Nothing had been computed yet" in capsys.readouterr().err


def test_seed_changes_a_network_that_is_trained(tmp_path: Path) -> None:
    """And the same seed gives the same weights."""
    files = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        folder = tmp_path / name
        flags = ["--epochs", "1", "--seed", seed, "--device", "cpu", "--out", str(folder)]
        assert main(["pretrain", *NETWORK, *flags]) == 0
        files.append((folder / "model.safetensors").read_bytes())

    assert files[0] == files[1] != files[2]


def test_bad_input_ends_the_process_with_code_2(tmp_path: Path) -> None:
    """As the shell sees it."""
    command = [sys.executable, "-m", "prunegym", "inspect", "--network", "digits_vg"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    assert done.returncode == 2
    assert done.stderr.strip().endswith("Or timm/NAME, or your own as path/file.py:function.")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_earlier_results_survive_a_later_refusal(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing already written is lost."""
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.name != "env.json"}

    assert main(["pretrain", *NETWORK, "--seed", "5", "--device", "cpu", "--out", str(base)]) == 2
    assert "`--out` should be" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.iterdir() if path.name != "env.json"} == before
