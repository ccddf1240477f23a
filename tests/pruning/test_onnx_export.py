"""ONNX files against torch."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.deployment.onnx_export import export_onnx, onnx_bytes, open_session, session_feeds, with_batch
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_with_batch_repeats_and_cuts_every_tensor_of_the_batch() -> None:
    """Tensors of another first dimension, and what is no tensor, stay."""
    inputs = (torch.arange(2.0), {"scale": torch.ones(5), "pair": torch.arange(4.0).reshape(2, 2)}, 7)

    images, others, number = with_batch(inputs, 3)
    (cut,) = with_batch(torch.arange(4.0), 1)

    assert images.tolist() == [0.0, 1.0, 0.0]
    assert others["pair"].tolist() == [[0.0, 1.0], [2.0, 3.0], [0.0, 1.0]]
    assert others["scale"].shape == (5,)
    assert number == 7
    assert cut.tolist() == [0.0]


def test_onnx_file_takes_any_batch(tmp_path: Path) -> None:
    """And gives what torch gives, for a pruned network with padded shortcuts."""
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(5, 1, 8, 8)
    network = PrunableNetwork(build_network("digits_resnet"), images[:1])
    counts = np.maximum(1, network.graph.sizes // 2)
    plan = PruningPlan.from_scores(network.graph, counts, np.random.default_rng(0).random(network.graph.units))
    model = network.pruned(plan).train()

    difference = export_onnx(model, network.example_inputs, tmp_path / "model.onnx")

    assert 0 <= difference < 1e-4
    assert model.training
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), model.eval()(images), atol=1e-4)


def test_onnx_file_is_not_run_without_check(tmp_path: Path) -> None:
    """The difference is then unknown. One layer with a fixed batch takes no exporter."""
    pytest.importorskip("onnxruntime")
    arguments = (nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "model.onnx")

    unknown = export_onnx(*arguments, check=False, dynamic_batch=False)
    known = export_onnx(*arguments, dynamic_batch=False)

    assert math.isnan(unknown)
    assert 0 <= known < 1e-5


def test_network_that_cannot_be_exported_is_refused(tmp_path: Path) -> None:
    """Control flow that depends on values, for example; no file is left."""
    pytest.importorskip("onnxruntime")

    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(
        PruningError, match="should be a network that torch.onnx.export can export. Received a Branching"
    ):
        export_onnx(Branching(), torch.randn(2, 3), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_onnx_outputs_that_differ_are_refused(tmp_path: Path) -> None:
    """Also when there is nothing to compare with; no file is left."""
    pytest.importorskip("onnxruntime")
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, math.nan)

    with pytest.raises(
        PruningError, match="should give the same outputs in ONNX Runtime as in torch.*no numbers .NaN."
    ):
        export_onnx(layer, torch.randn(2, 3), tmp_path / "model.onnx", dynamic_batch=False)
    assert not list(tmp_path.iterdir())


def test_onnx_file_that_the_runtime_refuses_is_reported(tmp_path: Path) -> None:
    """What is exported need not be supported."""
    pytest.importorskip("onnxruntime")
    layer, images = nn.Conv2d(3, 2, 1).double(), torch.randn(2, 3, 4, 4).double()  # it convolves in float32 only

    with pytest.raises(PruningError, match="`model` should export to a file that ONNX Runtime runs"):
        export_onnx(layer, images, tmp_path / "model.onnx", dynamic_batch=False)


def test_onnx_into_an_unwritable_place_is_refused(tmp_path: Path) -> None:
    """With the path."""
    pytest.importorskip("onnxruntime")
    (tmp_path / "file").write_text("")

    with pytest.raises(PruningError, match="`path` should be a place that can be written to.*file/model.onnx"):
        export_onnx(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "file" / "model.onnx", dynamic_batch=False)


def test_absent_onnx_is_reported_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is an optional extra."""
    monkeypatch.setitem(sys.modules, "onnx", None)

    with pytest.raises(PruningError, match=r"needs the package onnx\b.*pip install 'prunegym\[onnx\]'"):
        export_onnx(nn.Linear(3, 2), torch.randn(2, 3), tmp_path / "model.onnx")


@pytest.mark.parametrize("quick", [True, False])
def test_quick_exports_compute_the_same(quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where this torch no longer has the older exporter: then it is not so quick."""
    pytest.importorskip("onnxruntime")
    if not quick:
        export = torch.onnx.export

        def newer(*arguments: Any, dynamo: bool = True, **options: Any) -> Any:
            if not dynamo:
                raise TypeError("export() got an unexpected keyword argument 'dynamo'")
            return export(*arguments, dynamo=True, **options)

        monkeypatch.setattr(torch.onnx, "export", newer)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Hardswish(), nn.Flatten(), nn.Linear(16, 2))
    network.eval()
    images = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    session = open_session(onnx_bytes(network, (images,), quick=True), 1)
    (found,) = session.run(None, session_feeds(session, (images,)))

    assert torch.allclose(torch.from_numpy(found), network(images), atol=1e-5)


def test_inputs_that_the_exported_network_does_not_take_are_refused() -> None:
    """The exporter drops inputs that nothing reads."""

    class Session:
        def get_inputs(self) -> list[Any]:
            return []

    with pytest.raises(PruningError, match="Received 1 tensors, of which the exported network takes 0"):
        session_feeds(Session(), (torch.zeros(1),))
