"""Fine-tuning on its own and export, from the command line and from Python."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunegym
from prunegym.agents.configuration.options import DataOptions
from prunegym.agents.run_folders.reload import largest_difference
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.commands.cli import INTERRUPTED, main
from prunegym.experiments import fitting
from prunegym.experiments.deployment import config as deployment_config
from prunegym.experiments.deployment.commands import example_of
from prunegym.experiments.deployment.origin import data_of, origin_of
from prunegym.pruning.deployment import export
from prunegym.pruning.deployment.recipe import NO_SOURCE
from prunegym.pruning.deployment.saving import read_recipe
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork

FEW = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32", "--device", "cpu"]
#: As few steps as there can be.
QUICK = ["--epochs", "1", "--batch-size", "256", "--device", "cpu"]
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
    """Weights of a network trained for a moment."""
    folder = tmp_path_factory.mktemp("runs") / "base"
    assert main(["pretrain", "--network", "digits_vgg", *QUICK, "--out", str(folder)]) == 0
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def pruned(base: Path) -> Path:
    """Run folder of the network pruned, and not fine-tuned."""
    folder = base.parent.parent / "pruned"
    patch = pytest.MonkeyPatch()
    patch.setattr("prunegym.experiments.prune.measure_speed", lambda *_: [])  # it takes seconds
    flags = ["--network", "digits_vgg", "--weights", str(base), "--epochs", "0", "--split-seed", "3"]
    try:
        assert main(["prune", *flags, *FEW, "--out", str(folder)]) == 0
    finally:
        patch.undo()
    return folder


def tensors(folder: Path) -> bytes:
    """The saved tensors."""
    return (folder / "model.safetensors").read_bytes()


def test_formats_are_those_that_can_be_written() -> None:
    """The configuration lists them without loading PyTorch."""
    assert deployment_config.FORMATS == export.FORMATS


def test_finetune_goes_on_where_pruning_ended(run: Run, pruned: Path, tmp_path: Path) -> None:
    """On the splits of that run; the result is a saved network of the same recipe with a history."""
    content = run("finetune", pruned, *QUICK, "--out", tmp_path / "tuned")

    told = json.loads((pruned / "result.json").read_text())["test_scores"]
    assert content["test_scores"]["before_finetuning"] == told["after_recovery"]
    assert content["network"] == "digits_vgg"
    assert tensors(tmp_path / "tuned") != tensors(pruned)
    recipes = [read_recipe(folder) for folder in (pruned, tmp_path / "tuned")]
    assert recipes[0]["plan"] == recipes[1]["plan"]
    (history,) = recipes[1]["metadata"]["finetuning"]
    assert history["test_scores"] == content["test_scores"]
    assert recipes[1]["metadata"]["budget"] == "macs:0.5"
    splits = [(folder / "splits.npz").read_bytes() for folder in (pruned, tmp_path / "tuned")]
    assert splits[0] == splits[1]
    assert largest_difference(tmp_path / "tuned") == 0.0
    assert run("finetune", pruned, *QUICK, "--out", tmp_path / "tuned") == content


def test_finetune_of_what_was_finetuned_knows_its_data(run: Run, pruned: Path, tmp_path: Path) -> None:
    """Run after run, back to the one that pruned; data that are given come first."""
    run("finetune", pruned, *QUICK, "--out", tmp_path / "a")
    run("finetune", tmp_path / "a", *QUICK, "--out", tmp_path / "b")

    origin = origin_of(tmp_path / "b")
    assert origin["split_seed"] == 3
    assert data_of(DataOptions(data=""), origin) == DataOptions(data="digits", split_seed=3)
    assert data_of(DataOptions(data="", split_seed=5), origin).split_seed == 5
    moved = data_of(DataOptions(data="digits.npz"), origin)
    assert moved == DataOptions(data="digits.npz", split_seed=3)  # else judged on images that the network learned
    assert len(read_recipe(tmp_path / "b")["metadata"]["finetuning"]) == 2


def test_network_that_comes_from_nowhere_needs_data(run: Run, pruned: Path, tmp_path: Path) -> None:
    """Two files copied from a run are enough, if the data are given."""
    for name in ("model.safetensors", "recipe.json"):
        (tmp_path / name).write_bytes((pruned / name).read_bytes())

    with pytest.raises(PruningError, match="`--data` should be given for a saved network whose folder does not say"):
        data_of(DataOptions(data=""), origin_of(tmp_path))
    content = run("finetune", tmp_path, "--data", "digits", *QUICK, "--out", tmp_path / "tuned")
    assert content["epochs"] == 1


def test_finetune_takes_a_network_by_name(run: Run, base: Path, tmp_path: Path) -> None:
    """It is saved in the format of pruned ones, and can be fine-tuned again from there."""
    content = run("finetune", "--network", "digits_vgg", "--weights", base, *QUICK, "--out", tmp_path / "a")

    told = json.loads((base.parent / "result.json").read_text())["test_score"]
    assert content["test_scores"]["before_finetuning"] == told
    assert prunegym.load(tmp_path / "a")(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    again = run("finetune", tmp_path / "a", "--data", "digits", *QUICK, "--out", tmp_path / "b")
    assert again["test_scores"]["before_finetuning"] == content["test_scores"]["after_finetuning"]


def test_saved_networks_are_measured(run: Run, pruned: Path, tmp_path: Path) -> None:
    """Cost and accuracy are those that were said, on the splits of the run; also after fine-tuning."""
    tuned = run("finetune", pruned, *QUICK, "--out", tmp_path / "tuned")
    said = json.loads((pruned / "result.json").read_text())

    first, second = run("measure", pruned, tmp_path / "tuned", "--device", "cpu")["rows"]

    assert (first["network"], second["network"]) == ("digits_vgg", "digits_vgg")
    assert (first["macs"], first["parameters"]) == (said["macs"]["after"], said["parameters"]["after"])
    assert first["test_score"] == first["said_score"] == said["test_scores"]["after_recovery"]
    assert second["test_score"] == second["said_score"] == tuned["test_scores"]["after_finetuning"]
    assert 0 <= first["selection_score"] <= 1


def test_network_whose_data_are_not_known_is_measured_on_those_given(
    run: Run, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a folder holds beside the network says where it comes from."""
    for name in ("model.safetensors", "recipe.json"):
        (tmp_path / name).write_bytes((pruned / name).read_bytes())

    assert main(["measure", str(tmp_path)]) == 2
    assert "`--data` should be given for a saved network" in capsys.readouterr().err
    (row,) = run("measure", tmp_path, "--data", "digits", "--split-seed", "3")["rows"]
    assert row["test_score"] == row["said_score"]


@pytest.fixture
def teachers(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module | None]:
    """The teachers of fine-tunings; nothing is trained."""
    asked: list[nn.Module | None] = []
    monkeypatch.setattr(fitting, "train_network", lambda *_, teacher, **__: asked.append(teacher) or [])
    return asked


def test_teacher_is_the_network_that_was_pruned(
    run: Run, base: Path, pruned: Path, tmp_path: Path, teachers: list[nn.Module]
) -> None:
    """With the weights of that run, or others that are given; none without ``--distill``."""
    other = prunegym.build_network("digits_vgg", seed=9)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    run("finetune", pruned, *QUICK, "--distill", "--out", tmp_path / "a")
    run("finetune", pruned, *QUICK, "--distill", "--teacher", tmp_path / "other.pt", "--out", tmp_path / "b")
    run("finetune", pruned, *QUICK, "--out", tmp_path / "c")

    weights = prunegym.build_network("digits_vgg", weights=base).state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in teachers[0].state_dict().items())
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in teachers[1].state_dict().items())
    assert teachers[2] is None


def test_unknown_teacher_is_refused(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder does not say which weights were pruned."""
    for name in ("model.safetensors", "recipe.json"):
        (tmp_path / name).write_bytes((pruned / name).read_bytes())

    assert main(["finetune", str(tmp_path), "--data", "digits", "--distill", *QUICK]) == 2
    assert "`--teacher` should be given where the saved network's folder does not say" in capsys.readouterr().err


def test_interrupted_finetuning_goes_on_to_the_same_bytes(
    run: Run, pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the second epoch, which is not trained again; the message says how."""
    flags = ["finetune", pruned, *QUICK[2:], "--epochs", "3", "--ema", "0.9", "--optimizer", "adamw"]
    whole = run(*flags, "--out", tmp_path / "whole")
    real, noted = fitting.note_epoch, []

    def interrupt(folder: Any, row: Any, **limit: Any) -> None:
        real(folder, row, **limit)
        noted.append(row.epoch)
        if noted == [1, 2]:
            raise KeyboardInterrupt

    monkeypatch.setattr(fitting, "note_epoch", interrupt)
    assert main([*map(str, flags), "--out", str(tmp_path / "cut")]) == INTERRUPTED
    assert f"--out {tmp_path / 'cut'}" in capsys.readouterr().err

    content = run(*flags, "--out", tmp_path / "cut")

    assert noted == [1, 2, 3]
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "whole")
    assert {**content, "folder": ""} == {**whole, "folder": ""}


@pytest.mark.slow
def test_killed_finetuning_goes_on_to_the_same_bytes(pruned: Path, tmp_path: Path) -> None:
    """SIGKILL at any moment, with checkpoints within epochs."""
    flags = ["--epochs", "8", "--batch-size", "16", "--device", "cpu", "--checkpoint-minutes", "0"]
    command = [sys.executable, "-m", "prunegym", "finetune", str(pruned), *flags]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    assert subprocess.run([*command, "--out", str(tmp_path / "whole")], **quiet).returncode == 0
    checkpoint = tmp_path / "cut" / "checkpoint.pt"
    for wait in (0.2, 0.8):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        with subprocess.Popen([*command, "--out", str(tmp_path / "cut")], **quiet) as process:
            while process.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
                time.sleep(0.01)
            time.sleep(wait)
            process.kill()
    kept = RunFolder(tmp_path / "cut").read_rows("timing.csv")

    assert subprocess.run([*command, "--out", str(tmp_path / "cut")], **quiet).returncode == 0

    assert tensors(tmp_path / "cut") == tensors(tmp_path / "whole")
    # epochs that were trained again would have taken other times
    assert RunFolder(tmp_path / "cut").read_rows("timing.csv")[: len(kept)] == kept


def test_export_writes_and_checks_every_format(run: Run, pruned: Path, tmp_path: Path) -> None:
    """Of a run folder, on its own example; the text tells the code that loads each file."""
    formats = ["--format", "program", "--format", "safetensors", "--format", "program"]
    content = run("export", pruned, *formats, "--out", tmp_path / "a")

    assert [one["format"] for one in content["files"]] == ["program", "safetensors"]
    images, model = torch.randn(5, 1, 8, 8), prunegym.load(pruned)
    with torch.no_grad():
        assert torch.allclose(prunegym.load_program(tmp_path / "a" / "model.pt2")(images), model(images), atol=1e-5)
        assert torch.equal(prunegym.load(tmp_path / "a")(images), model(images))
    assert read_recipe(tmp_path / "a")["metadata"] == read_recipe(pruned)["metadata"]


def test_export_table_tells_sizes_and_code(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per file, in another type of numbers too."""
    flags = ["--format", "safetensors", "--dtype", "float16", "--out", str(tmp_path / "a")]

    assert main(["export", str(pruned), *flags]) == 0

    text = capsys.readouterr().out
    assert "largest difference" in text
    assert "model.safetensors" in text
    assert f"prunegym.load('{tmp_path / 'a'}')" in text
    assert next(prunegym.load(tmp_path / "a").parameters()).dtype == torch.float16


def test_export_takes_a_network_by_name(run: Run, tmp_path: Path) -> None:
    """With the sizes that it is built for, and ONNX unless told otherwise."""
    sizes = ["--num-classes", "7", "--in-channels", "3", "--image-size", "12"]
    content = run("export", "--network", "digits_vgg", *sizes, "--seed", "5", "--out", tmp_path)

    (file,) = content["files"]
    assert (file["format"], file["dynamic_batch"]) == ("onnx", True)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(file["path"], providers=["CPUExecutionProvider"])
    images = torch.randn(4, 3, 12, 12)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        wanted = prunegym.build_network("digits_vgg", num_classes=7, in_channels=3, image_size=12, seed=5).eval()(
            images
        )
    assert torch.allclose(torch.from_numpy(found), wanted, atol=1e-4)


def test_file_of_a_users_network_is_run_only_when_allowed(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A saved network of a stranger must not run code."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes))\n"
    )
    run("finetune", "--network", f"{tmp_path / 'mine.py'}:net", *QUICK, "--out", tmp_path / "a")
    arguments = ["export", str(tmp_path / "a"), "--format", "safetensors", "--out", str(tmp_path / "b")]

    assert main(arguments) == 2
    assert "--allow-code" in capsys.readouterr().err
    (file,) = run(*arguments, "--allow-code")["files"]
    assert file["load"].endswith("allow_code=True)")


def test_damaged_example_is_refused(tmp_path: Path) -> None:
    """And without one, noise of the size that the source tells."""
    assert example_of(tmp_path, {"network": "digits_vgg", "in_channels": 2})[0].shape == (2, 2, 8, 8)
    (tmp_path / "example.safetensors").write_bytes(b"nothing")

    with pytest.raises(PruningError, match="should hold an undamaged example.safetensors, or none"):
        example_of(tmp_path, {"network": "digits_vgg"})
    with pytest.raises(PruningError, match="`example_inputs` should be given for a network whose input is not known"):
        example_of(None, NO_SOURCE)


class Boxes:
    """A task of one's own: two numbers for each image, judged by their distance.

    Args:
        allowed: Losses that may be asked for before an interruption.
    """

    name, fingerprint = "boxes", "boxes-1"

    def __init__(self, allowed: int = 10**9) -> None:
        self.allowed, self.losses = allowed, 0

    def batches(
        self, split: str, *, batch_size: int, limit: int | None = None, **_: Any
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sixty-four bright spots; where they are is what is wanted."""
        generator = torch.Generator().manual_seed(len(split))
        places = torch.randint(1, 7, (64, 2), generator=generator)[: limit or 64]
        images = torch.zeros(len(places), 3, 8, 8)
        images[torch.arange(len(places)), :, places[:, 0], places[:, 1]] = 1
        yield from zip(images.split(batch_size), (places / 8).split(batch_size), strict=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared distance, or an interruption."""
        if self.losses == self.allowed:
            raise KeyboardInterrupt
        self.losses += 1
        return F.mse_loss(outputs.float(), targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Minus the distance."""
        return -(outputs.float() - targets).norm(dim=1)


def finder() -> nn.Module:
    """A network that finds spots."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 12, 3, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(108, 2))


SMALL = {"statistics_examples": 16, "recovery_examples": 16, "reward_examples": 16, "device": "cpu"}
FIT: dict[str, Any] = {"batch_size": 16, "device": "cpu"}


def test_python_face_goes_the_whole_way_for_a_task_of_ones_own(tmp_path: Path) -> None:
    """Prune, fine-tune with the unpruned network as teacher, save, load, fine-tune the folder, export."""
    model, task = finder(), Boxes()
    result = prunegym.prune(model, task, "macs:0.6", **SMALL)
    before = {name: value.clone() for name, value in result.model.state_dict().items()}

    tuned = prunegym.finetune(result, task, epochs=4, distill=True, learning_rate=0.05, ema=0.5, **FIT)
    prunegym.save(tuned, tmp_path / "tuned")
    again = prunegym.finetune(tmp_path / "tuned", task, model=finder(), epochs=1, **FIT)
    files = prunegym.export(again, tmp_path / "files", ["program", "safetensors"])

    assert tuned.scores["after_finetuning"] > tuned.scores["before_finetuning"]
    assert tuned.scores["after_finetuning"] == again.scores["before_finetuning"]
    assert all(torch.equal(value, before[name]) for name, value in result.model.state_dict().items())
    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        wanted = again.model(images)
        assert torch.equal(prunegym.load(tmp_path / "files", model=finder())(images), wanted)
        assert torch.allclose(prunegym.load_program(files[0].path)(images), wanted, atol=1e-5)


def test_python_face_takes_a_model(tmp_path: Path) -> None:
    """As it is; the result can be saved, and loaded into a model of the same kind."""
    tuned = prunegym.finetune(finder(), Boxes(), epochs=1, name="finder", **FIT)
    prunegym.save(tuned, tmp_path)
    (file,) = prunegym.export(
        finder(), tmp_path / "b", "safetensors", example_inputs=torch.rand(2, 3, 8, 8), dtype="bfloat16"
    )

    images = torch.rand(3, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(prunegym.load(tmp_path, model=finder())(images), tuned.model(images))
    assert tuned.to_json()["network"] == "finder"
    assert 0 < file.from_float32 < 0.1


def test_interrupted_finetuning_goes_on_in_python(tmp_path: Path) -> None:
    """With a file to go on from: nothing that it keeps is done again. Other settings are refused."""
    options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_minutes": 0.0, **FIT}
    whole_task, task = Boxes(), Boxes()
    whole = prunegym.finetune(finder(), whole_task, epochs=2, **FIT)
    with pytest.raises(KeyboardInterrupt):
        prunegym.finetune(finder(), Boxes(allowed=5), epochs=2, **options)

    again = prunegym.finetune(finder(), task, epochs=2, **options)

    assert whole_task.losses - task.losses == 5
    assert [row.loss for row in again.epochs] == [row.loss for row in whole.epochs]
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    with pytest.raises(PruningError, match="`checkpoint` should be of the same training.*epochs"):
        prunegym.finetune(finder(), Boxes(), epochs=3, checkpoint=tmp_path / "c.pt", **FIT)


def test_what_is_no_network_is_refused(toys: Callable[[str], PrunableNetwork], tmp_path: Path) -> None:
    """The message names the argument."""
    with pytest.raises(PruningError, match="`network` should be a result of prunegym.prune.*Received a int"):
        prunegym.finetune(3, Boxes())  # type: ignore[arg-type]
    with pytest.raises(PruningError, match="`teacher` should be given where `distill` goes with"):
        prunegym.finetune(finder(), Boxes(), distill=True)
    with pytest.raises(PruningError, match="`example_inputs` should be given"):
        prunegym.export(finder(), tmp_path)
    with pytest.raises(PruningError, match="`source` should be given with a torch.nn.Module as `network`"):
        prunegym.export(tmp_path, tmp_path / "a", source={"network": "digits_vgg"})
    with pytest.raises(PruningError, match="`source` should be a mapping for a task of one's own"):
        prunegym.finetune(finder(), Boxes(), source="digits_vgg")
    with pytest.raises(PruningError, match="Did you mean 'optimizer'"):
        prunegym.finetune(finder(), Boxes(), optimiser="adamw")


class Lacking(Boxes):
    """Boxes without the examples of one split.

    Args:
        split: The one.
    """

    def __init__(self, split: str) -> None:
        super().__init__()
        self.split = split

    def batches(self, split: str, **settings: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """None of that split."""
        return iter(()) if split == self.split else super().batches(split, **settings)


class Averaged(Boxes):
    """Boxes whose score is the mean of a batch."""

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Minus the mean distance."""
        return super().score(outputs, targets).mean()


def too_late(*_: Any, **__: Any) -> None:
    """What should not begin."""
    raise AssertionError("work has been done that is lost")


@pytest.mark.parametrize("split", ["calibration", "reward", "test"])
def test_empty_split_is_refused_before_work_is_done(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first plan that is scored at the latest, and before an epoch of fine-tuning."""
    monkeypatch.setattr("prunegym.commands.api.carry_out", too_late)
    monkeypatch.setattr("prunegym.experiments.deployment.finetune.fit", too_late)
    message = f"`split` should hold examples. Received '{split}' of 'boxes', which is empty"

    with pytest.raises(PruningError, match=message):
        prunegym.prune(finder(), Lacking(split), "macs:0.6", searcher="random", evaluations=2, **SMALL)
    if split != "reward":
        with pytest.raises(PruningError, match=message):
            prunegym.finetune(finder(), Lacking(split), epochs=1, **FIT)


def test_mean_score_is_refused_before_work_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search would end in a mean that cannot be weighted."""
    monkeypatch.setattr("prunegym.commands.api.find_plan", too_late)
    monkeypatch.setattr("prunegym.experiments.deployment.finetune.fit", too_late)

    for work in (
        lambda: prunegym.prune(finder(), Averaged(), "macs:0.6", **SMALL),
        lambda: prunegym.finetune(finder(), Averaged(), epochs=1, **FIT),
    ):
        with pytest.raises(PruningError, match=r"`score` of a task should return one number per example.*shape \(\)"):
            work()
