"""What cannot be done as asked is refused in one line that names argument, rule, value and remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prunegym.commands.cli import main
from prunegym.envs.observation import OBSERVATION_VERSION
from prunegym.pruning.networks.zoo import build_network

#: Few images of everything: the numbers do not matter.
FEW = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32"]
NETWORK = ["--network", "digits_vgg"]


def weights_file(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Weights of the network with something wrong."""
    state = build_network("digits_vgg").state_dict()
    change(state)
    torch.save(state, path)
    return path


def data_file(path: Path, **changes: Any) -> Path:
    """Data with something wrong."""
    images, labels = np.zeros((120, 8, 8), dtype=np.uint8), np.arange(120) % 10
    arrays = {"x_train": images, "y_train": labels, "x_test": images[:40], "y_test": labels[:40], **changes}
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


def with_bytes(path: Path, data: bytes) -> Path:
    """A file of these bytes."""
    path.write_bytes(data)
    return path


def policy_of_version(path: Path, version: int) -> Path:
    """A policy file with another format version."""
    header = {"format": version, "observation": OBSERVATION_VERSION, "encoder": {}, "features": "data"}
    header |= {"correction_scale": 1.0, "metadata": {}}
    save_file({"x": torch.zeros(1)}, path, {"prunegym": json.dumps(header)})
    return path


def user_network(folder: Path, classes: int) -> Path:
    """A file with a network of so many classes, whatever the data."""
    path = folder / "mine.py"
    path.write_text(
        "from torch import nn\n"
        "def net():\n"
        f"    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, {classes}))\n"
    )
    return path


#: Images of another size.
SMALL = {name: np.zeros((120 if name == "x_train" else 40, 6, 6), dtype=np.uint8) for name in ("x_train", "x_test")}


#: What is typed, for a folder to put files in, and what must be said.
BAD: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "network": (
        lambda _: ["prune", "--network", "cifar_resnet2o"],
        r"`--network` should be .*Received 'cifar_resnet2o'\. Did you mean 'cifar_resnet20'",
    ),
    "network file": (
        lambda f: ["prune", "--network", f"{f}/none.py:net"],
        "`--network` should be .*which is not there. Check the path",
    ),
    "network file elsewhere": (
        lambda _: ["prune", "--network", "none.py:net"],
        "`--network` should be .*Received file none.py, which is not there. The path begins at .*go there",
    ),
    "data": (lambda _: ["prune", *NETWORK, "--data", "cifar1O"], r"`--data` should be .*Did you mean 'cifar10'"),
    "absent data": (
        lambda f: ["prune", *NETWORK, "--data", "cifar100", "--data-root", f],
        "`--data` should .*cifar100.*",
    ),
    "budget": (lambda _: ["prune", *NETWORK, "--budget", "mac:0.5"], "`budget` should be .*Did you mean 'macs'"),
    "unreachable budget": (
        lambda _: ["prune", *NETWORK, *FEW, "--budget", "macs:0.001"],
        r"`budget` should be reachable .*Received macs:0\.001.*Ask for macs:0\.\d+ or more",
    ),
    "criterion": (
        lambda _: ["train", *NETWORK, "--criterion", "taylr"],
        "`--criterion` should be .*Received 'taylr'. Did you mean 'taylor'",
    ),
    "searcher": (
        lambda _: ["prune", *NETWORK, "--searcher", "knapsak"],
        "`--searcher` should be .*Did you mean 'knapsack'",
    ),
    "device": (lambda _: ["evaluate", *NETWORK, "--device", "gpu"], "`--device` should be .*Write cpu"),
    "devices": (
        lambda _: ["prune", *NETWORK, "--device", "meta", "--devices", "2"],
        "`devices` should be 1 with device meta. Received 2. Lower it",
    ),
    "keep everything": (
        lambda _: ["inspect", *NETWORK, "--keep", ".*"],
        "`network` should have at least one channel group",
    ),
    "keep nothing": (
        lambda _: ["inspect", *NETWORK, "--keep", "featurs.*"],
        r"`keep` should match .*Received 'featurs\.\*', which matches none \(features\.0, .*`prunegym inspect` lists",
    ),
    "absent weights": (
        lambda f: ["evaluate", *NETWORK, "--weights", f / "none.pt"],
        "`--weights` should be an existing file",
    ),
    "weights of another shape": (
        lambda f: [
            *("evaluate", *NETWORK, "--weights"),
            weights_file(f / "w.pt", lambda state: state.update({"features.0.weight": torch.zeros(4, 1, 3, 3)})),
        ],
        r"`--weights` should have the shapes of the network.*\(4, 1, 3, 3\)",
    ),
    "weights of a pruned network": (
        lambda f: [
            *("evaluate", *NETWORK, "--weights"),
            weights_file(f / "w.pt", lambda state: state.update({"features.0.weight": torch.zeros(3, 1, 3, 3)})),
        ],
        r"`--weights` should have the shapes.*\(3, 1, 3, 3\).*after pruning.*`prunegym measure FOLDER`",
    ),
    "weights that are not finite": (
        lambda f: [
            *("evaluate", *NETWORK, "--weights"),
            weights_file(f / "w.pt", lambda state: state["features.0.weight"].fill_(float("nan"))),
        ],
        "`--weights` should be finite",
    ),
    "weights for other classes": (
        lambda f: [*("evaluate", "--network", f"{user_network(f, 7)}:net")],
        r"one output per class: \(B, 10\).*Received \(2, 7\)",
    ),
    "damaged data": (
        lambda f: ["pretrain", *NETWORK, "--data", with_bytes(f / "d.npz", b"PK\x03\x04 not really")],
        "`--data` should .*",
    ),
    "empty data": (
        lambda f: ["pretrain", *NETWORK, "--data", with_bytes(f / "d.npz", b"")],
        "`--data` should .*",
    ),
    "data without test images": (
        lambda f: ["pretrain", *NETWORK, "--data", data_file(f / "d.npz", x_test=None)],
        "`--data` should .*x_test",
    ),
    "data that are not finite": (
        lambda f: ["pretrain", *NETWORK, "--data", data_file(f / "d.npz", x_train=np.full((120, 8, 8), np.nan))],
        "`--data` should .*finite",
    ),
    "absent policy": (
        lambda f: ["evaluate", *NETWORK, "--policy", f / "none.safetensors"],
        "polic.* should .*",
    ),
    "policy of another version": (
        lambda f: ["transfer", *NETWORK, "--policy", policy_of_version(f / "p.safetensors", 99)],
        "should .*format.*99",
    ),
    "policy with an unsafe payload": (
        lambda f: ["prune", *NETWORK, "--policy", weights_file(f / "p.safetensors", lambda _: None)],
        "unsafe",
    ),
    "damaged plan": (
        lambda f: ["prune", *NETWORK, *FEW, "--plan", with_bytes(f / "plan.json", b"{")],
        "`plan` should be a readable JSON file",
    ),
    "unwritable run folder": (
        lambda f: ["pretrain", *NETWORK, "--out", with_bytes(f / "file", b"") / "run"],
        "`--out` should be a place that can be written to.*Choose a folder",
    ),
    "run folder with other files": (
        lambda f: ["pretrain", *NETWORK, "--out", with_bytes(f / "thesis.tex", b"").parent],
        r"`--out` should be a new or empty folder.*holds 'thesis\.tex'",
    ),
    "no saved network": (
        lambda f: ["finetune", f],
        r"`folder` should hold a saved network.*which has no recipe.json. Give the run folder of `prunegym prune`",
    ),
    "saved network of another format": (
        lambda f: ["export", with_bytes(f / "recipe.json", b'{"format": 99}').parent],
        "`folder` should hold a network saved in format 2.*with format 99",
    ),
    "damaged recipe": (
        lambda f: ["export", with_bytes(f / "recipe.json", b"{").parent],
        "`folder` should lead to a readable JSON file.*not JSON",
    ),
    "export format": (
        lambda _: ["export", *NETWORK, "--format", "onnxx"],
        "`--format` should be one of .*Received 'onnxx'. Did you mean 'onnx'",
    ),
    "export type": (
        lambda _: ["export", *NETWORK, "--dtype", "bfloat16"],
        "`dtype` should be float32 or float16 for ONNX. Received bfloat16",
    ),
    "export of images that do not fit": (
        lambda _: ["export", *NETWORK, "--format", "program", "--in-channels", "3", "--image-size", "1"],
        r"`--image-size` and `--in-channels` should be those of the network. Received images of shape \(3, 1, 1\)",
    ),
    "nothing to measure": (lambda _: ["measure"], "`RUN` should be at least one folder .* Give the run folder"),
    "neither network nor run": (lambda _: ["export"], "`--network` should be given, or else the folder"),
    "fine-tuning on other data": (
        lambda f: ["finetune", "--network", f"{user_network(f, 10)}:net", "--data", data_file(f / "d.npz", **SMALL)],
        "`--data` should be what the network takes.*for which the network raised RuntimeError",
    ),
    "no steps of recovery": (
        lambda _: ["train", *NETWORK, "--recovery", "distill", "--recovery-steps", "0"],
        r"`--recovery-steps` should be at least 1\. Received 0",
    ),
    "no examples of recovery": (
        lambda _: ["prune", *NETWORK, "--recovery-examples", "0"],
        r"`--recovery-examples` should be at least 1\. Received 0",
    ),
    "rate of recovery": (
        lambda _: ["evaluate", *NETWORK, "--recovery", "distill", "--recovery-rate", "0"],
        "`--recovery-rate` should be above 0",
    ),
    "steps of a recovery without steps": (
        lambda _: ["prune", *NETWORK, "--recovery-steps", "10"],
        "`--recovery-steps` should be given with --recovery distill. Received 10. Leave it out",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Argument, rule, value and remedy on standard error; exit code 2; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    typed, message = BAD[case]
    (tmp_path / "files").mkdir()

    code = main([str(argument) for argument in typed(tmp_path / "files")])

    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("prunegym: error: ")]
    assert code == 2
    assert out == ""
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert "Received" in lines[0]
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()
