"""What runs a network when it is measured, and what is said where it is not there."""

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn

from prunegym.agents.configuration.options import LatencyOptions
from prunegym.pruning.deployment.export import export_network
from prunegym.pruning.deployment.onnx_export import open_session
from prunegym.pruning.deployment.recipe import Blueprint
from prunegym.pruning.errors import PruningError
from prunegym.pruning.timing import runtimes
from prunegym.pruning.timing.latency import Latency, LatencySettings, compare_latency
from prunegym.pruning.timing.runtimes import RUNTIMES, runtime_named

IMAGES = torch.zeros(1, 3, 4, 4)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_network() -> nn.Module:
    """A convolution with what follows it, in training mode."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def measured(network: nn.Module, settings: LatencySettings) -> Latency:
    """A network on one image."""
    return compare_latency({"network": network}, IMAGES, settings)["network"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_runtime_measures_a_network_and_leaves_it_as_it_was(backend: str) -> None:
    """With real time, so only that there is some."""
    pytest.importorskip(backend)
    network = small_network()

    found = measured(network, LatencySettings(backend=backend, threads=1, repeats=5))

    assert 0 < found.median < 10
    assert f"{backend} {runtime_named(backend).version}, 1 thread" in found.conditions
    assert network.training


def test_network_whose_code_casts_is_measured_as_it_is() -> None:
    """In double precision its code gives what its weights would no longer take."""

    class Double(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double())

    assert measured(Double(3, 4, 3).double(), LatencySettings(threads=1, repeats=5)).median > 0
    exact = runtimes.on_device(nn.Linear(4, 2).double(), (torch.randn(1, 4, dtype=torch.float64),), LatencySettings())
    assert exact[0](*exact[1]).dtype == torch.float64


@pytest.mark.slow
def test_compiled_networks_of_one_class_are_each_compiled() -> None:
    """Torch gives up compiling after a few versions of one piece of code; what would be timed then is no longer it."""
    counts: list[int] = []

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, width, 1)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                counts.append(self.conv.out_channels)  # runs as plain Python
            out: Tensor = self.conv(x)
            return out

    networks = {f"width {width}": Layer(width) for width in range(1, 11)}

    found = compare_latency(networks, IMAGES, LatencySettings(backend="compile", threads=1, repeats=5))

    assert not counts
    assert "torch.compile" in found["width 1"].conditions


def test_absent_compiler_is_reported_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile would fail with a page of its own code."""
    monkeypatch.setenv("CXX", "no-such-compiler")

    with pytest.raises(PruningError, match=r"needs a C\+\+ compiler.*without no-such-compiler\. Install one, such as"):
        measured(small_network(), LatencySettings(backend="compile"))


@pytest.mark.parametrize(
    ("backend", "package", "extra"),
    [
        *(("onnxruntime", package, "onnx") for package in ("onnx", "onnxruntime", "onnxscript")),
        ("openvino", "openvino", "openvino"),
        ("openvino", "onnxscript", "onnx"),
    ],
)
def test_absent_runtime_is_reported_with_the_command_that_installs_it(
    backend: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an optional extra."""
    if backend == "openvino" and find_spec("openvino") is None:
        package, extra = "openvino", "openvino"
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(PruningError, match=rf"needs the package {package}\b.*pip install 'prunegym\[{extra}\]'"):
        measured(nn.Conv2d(3, 1, 1), LatencySettings(backend=backend))


def test_data_type_that_the_processor_does_not_compute_in_is_refused() -> None:
    """OpenVINO would quietly take another, and the figure would be of that one."""
    openvino = pytest.importorskip("openvino")
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = LatencySettings(backend="openvino", dtype="float16", threads=1, repeats=5)

    if "FP16" in able:
        assert "float16" in measured(small_network(), settings).conditions
    else:
        with pytest.raises(PruningError, match="`dtype` should be one that this processor computes in.*Use float32"):
            measured(small_network(), settings)


def test_onnx_runtime_with_inputs_bound_to_the_device_gives_the_same_outputs() -> None:
    """As on a graphics card, where copying the images would be timed otherwise; here on the processor."""
    pytest.importorskip("onnxruntime")
    from prunegym.pruning.deployment.onnx_export import onnx_bytes, open_session, session_feeds

    network, images = small_network().eval(), torch.randn(1, 3, 4, 4)
    session = open_session(onnx_bytes(network, (images,)), 1)

    outputs = runtimes._bound(session, session_feeds(session, (images,)), "cpu")()

    assert isinstance(outputs, list)
    assert torch.allclose(torch.from_numpy(outputs[0].numpy()), network(images), atol=1e-5)


def test_graphics_card_that_onnx_runtime_does_not_know_is_refused() -> None:
    """The usual build runs on processors only."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build knows graphics cards")

    with pytest.raises(PruningError, match=r"`device` should be one that this build.*pip install onnxruntime-gpu"):
        measured(small_network(), LatencySettings(backend="onnxruntime", device="cuda"))


def test_backend_is_measured_on_the_device_it_runs_on() -> None:
    """A network pruned on a graphics card is measured on the processor where the runtime knows no other."""
    options = LatencyOptions(latency_backend="openvino")

    assert options.latency_settings("cuda").device == "cpu"
    assert LatencyOptions().latency_settings("cuda").device == "cuda"
    assert LatencyOptions(latency_device="cpu").latency_settings("cuda").device == "cpu"


def test_backends_of_the_command_line_are_the_runtimes() -> None:
    """A runtime that is entered can be asked for."""
    assert get_args(get_type_hints(LatencyOptions)["latency_backend"]) == tuple(RUNTIMES)


def test_version_is_that_of_the_module_whatever_its_distribution_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime for graphics cards is the distribution onnxruntime-gpu; OpenVINO tells its build too."""
    for package, version, told in (("onnxruntime", "1.99.0", "1.99.0"), ("openvino", "2099.1.0-123-abc", "2099.1.0")):
        module = ModuleType(package)
        setattr(module, "__version__", version)  # noqa: B010 (modules have no such attribute for type checkers)
        monkeypatch.setitem(sys.modules, package, module)

        assert runtime_named(package).version == told
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert runtime_named("openvino").version == ""
    assert runtime_named("torch").version == torch.__version__


class BatchInCode(nn.Module):
    """Reads a batch of one only, as some code does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.reshape(1, 48))
        return out


@pytest.mark.parametrize("network", [small_network(), BatchInCode()])
def test_onnx_runtime_measures_the_file_that_is_exported(
    network: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where batches are left open and where they are not: a runtime plans its work by that."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    opened: list[bytes] = []

    def noted(data: bytes, *arguments: Any, **options: Any) -> Any:
        opened.append(data)
        return open_session(data, *arguments, **options)

    monkeypatch.setattr(runtimes, "open_session", noted)
    measured(network, LatencySettings(backend="onnxruntime", threads=1, repeats=5))
    nothing = Blueprint(source={}, plan={}, attributes={}, modules={}, unpruned_shapes={})  # for safetensors only
    (written,) = export_network(network, (IMAGES,), tmp_path, ["onnx"], blueprint=nothing)

    theirs, ours = onnx.load(written.path).graph, onnx.load_from_string(opened[0]).graph
    assert written.dynamic_batch == isinstance(network, nn.Sequential)
    assert ours.input == theirs.input
    assert ours.node == theirs.node
    assert ours.initializer == theirs.initializer
