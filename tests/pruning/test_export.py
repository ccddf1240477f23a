"""Networks in the formats of deployment, read back by what reads them there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import prunegym
from prunegym.pruning.deployment import onnx_export
from prunegym.pruning.deployment.export import Exported, check_formats, export_network, in_dtype
from prunegym.pruning.deployment.program import load_program
from prunegym.pruning.deployment.recipe import NO_SOURCE, Blueprint
from prunegym.pruning.deployment.saving import load_network, read_recipe
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan

EVERY = ("onnx", "program", "safetensors")
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
SOURCE = {"network": "digits_vgg", "num_classes": 10, "in_channels": 1}


@pytest.fixture(scope="module")
def network() -> PrunableNetwork:
    """A small network."""
    return PrunableNetwork(build_network("digits_vgg").eval(), IMAGES[:2])


@pytest.fixture(scope="module")
def pruned(network: PrunableNetwork) -> tuple[nn.Module, Blueprint]:
    """It, pruned by half, and what rebuilds it."""
    rng = np.random.default_rng(0)
    counts = np.maximum(1, network.graph.sizes // 2)
    plan = PruningPlan.from_scores(network.graph, counts, rng.random(network.graph.units))
    model = network.pruned(plan)
    return model, Blueprint.of_pruned(network, plan, model, SOURCE)


def expected(model: nn.Module) -> Tensor:
    """What the network says of the images."""
    with torch.no_grad():
        outputs: Tensor = model.eval()(IMAGES)
    return outputs


def onnx_outputs(path: Path) -> Tensor:
    """What ONNX Runtime makes of the images."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})[0])


def written(folder: Path, pruned: tuple[nn.Module, Blueprint], dtype: str, formats: Any = EVERY) -> dict[str, Exported]:
    """Export, by format."""
    model, blueprint = pruned
    done = export_network(model, (IMAGES[:2],), folder, formats, blueprint=blueprint, metadata={"n": 1}, dtype=dtype)
    return {one.format: one for one in done}


@pytest.fixture(scope="module")
def done(pruned: tuple[nn.Module, Blueprint], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """The network in every format."""
    return written(tmp_path_factory.mktemp("done"), pruned, "float32")


def test_every_format_gives_what_the_network_gives(
    pruned: tuple[nn.Module, Blueprint], done: dict[str, Exported]
) -> None:
    """For a batch of a size that none was exported or checked with; sizes are those on disk."""
    wanted = expected(pruned[0])
    folder = done["safetensors"].path.parent

    assert torch.allclose(onnx_outputs(done["onnx"].path), wanted, atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(load_program(done["program"].path)(IMAGES), wanted, atol=1e-5)
        assert torch.equal(load_network(folder)(IMAGES), wanted)
    assert all(one.dynamic_batch and one.difference < 1e-4 and one.from_float32 == 0 for one in done.values())
    assert done["onnx"].bytes == done["onnx"].path.stat().st_size
    sizes = [(folder / name).stat().st_size for name in ("model.safetensors", "recipe.json")]
    assert done["safetensors"].bytes == sum(sizes)
    assert read_recipe(folder)["metadata"] == {"n": 1}


@pytest.mark.parametrize(("dtype", "form", "rounding"), [("float16", "onnx", 1e-2), ("bfloat16", "program", 0.1)])
def test_half_precision_takes_and_gives_float32(
    pruned: tuple[nn.Module, Blueprint], tmp_path: Path, dtype: str, form: str, rounding: float
) -> None:
    """How far it is from float32 is told. Safetensors give a network of that type, half as large."""
    done = written(tmp_path, pruned, dtype, [form, "safetensors"])

    wanted = expected(pruned[0])
    scale = float(wanted.abs().max())
    for one in done.values():
        assert 0 < one.from_float32 < rounding * scale
    with torch.no_grad():
        path = done[form].path
        found = onnx_outputs(path) if form == "onnx" else load_program(path)(IMAGES)
    assert found.dtype == torch.float32
    assert float((found - wanted).abs().max()) < rounding * scale
    assert {str(one.dtype) for one in load_network(tmp_path).parameters()} == {f"torch.{dtype}"}
    written(tmp_path / "whole", pruned, "float32", ["safetensors"])
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path, tmp_path / "whole")]
    assert sizes[0] < 0.6 * sizes[1]


def test_code_that_loads_is_told(
    pruned: tuple[nn.Module, Blueprint], done: dict[str, Exported], tmp_path: Path
) -> None:
    """It runs, and where the reader has to bring something it says so."""
    names: dict[str, Any] = {"prunegym": prunegym, "onnxruntime": onnxruntime}

    for one in done.values():
        assert eval(one.load, names) is not None
    bare = Blueprint.of_unpruned(pruned[0], NO_SOURCE)
    (one,) = export_network(pruned[0], (IMAGES,), tmp_path, ["safetensors"], blueprint=bare)
    assert one.load.endswith(", model=...)")


class FixedBatch(nn.Module):
    """A network whose code fixes the size of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.layer(images.reshape(1, 64))
        return outputs


def test_network_of_fixed_batch_is_exported_for_one_example(tmp_path: Path) -> None:
    """With a warning that says why."""
    model = FixedBatch().eval()
    blueprint = Blueprint.of_unpruned(model, NO_SOURCE)

    done = export_network(model, (IMAGES[:1],), tmp_path, ["onnx", "program"], blueprint=blueprint)

    for one in done:
        assert not one.dynamic_batch
        assert one.warning is not None
        assert "batches of 1 only" in one.warning
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == 1


class Constant(nn.Module):
    """A network that makes a float32 number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.layer(images.flatten(1) @ torch.eye(64))
        return outputs


@pytest.mark.parametrize(
    ("formats", "dtype", "message"),
    [
        ([], "float32", "`format` should be given at least once"),
        (["onx"], "float32", "`format` should be one of .*Received 'onx'. Did you mean 'onnx'"),
        (["program"], "float8", "`dtype` should be one of .*Received 'float8'"),
        (["onnx"], "bfloat16", "`dtype` should be float32 or float16 for ONNX. Received bfloat16.*format program"),
    ],
)
def test_unknown_format_or_type_is_refused(formats: list[str], dtype: str, message: str) -> None:
    """With the nearest name, before anything is computed."""
    with pytest.raises(PruningError, match=message):
        check_formats(formats, dtype)


def test_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other formats do not need it."""
    real: Callable[[str], Any] = onnx_export.import_module

    def absent(name: str) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name)

    monkeypatch.setattr(onnx_export, "import_module", absent)

    check_formats(["program", "safetensors"])
    with pytest.raises(PruningError, match=r"needs the package onnxruntime.*pip install 'prunegym\[onnx\]'"):
        check_formats(["onnx"])


def test_type_that_is_too_small_for_a_number_is_refused() -> None:
    """Before it becomes infinite; bfloat16 has float32's range."""
    model = nn.BatchNorm1d(4)
    assert model.running_var is not None
    model.running_var[2] = 1e6

    with pytest.raises(PruningError, match="whose largest is 65504, and 'running_var' with 1e.06. Choose bfloat16"):
        in_dtype(model, "float16")
    in_dtype(model, "bfloat16")


def test_network_that_does_not_run_in_a_type_is_refused(tmp_path: Path) -> None:
    """What it raised is told."""
    model = Constant().eval()

    with pytest.raises(PruningError, match="`dtype` should be a type that the network can compute in.*RuntimeError"):
        export_network(
            model, (IMAGES,), tmp_path, ["program"], blueprint=Blueprint.of_unpruned(model, NO_SOURCE), dtype="float16"
        )
    assert list(tmp_path.iterdir()) == []
