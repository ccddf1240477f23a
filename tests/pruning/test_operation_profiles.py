"""Where the time of a network goes, told by each runtime; with real time, so only what must hold on a busy machine."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.deployment.onnx_export import onnx_bytes, open_session
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing import operation_profiles, runtimes
from prunegym.pruning.timing.latency import LatencySettings, ready_to_measure
from prunegym.pruning.timing.onnx_names import named_after_operations, operation_of
from prunegym.pruning.timing.operation_profiles import Probe, Widths, make_probe


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Mixed(nn.Module):
    """Operations of every kind; the second convolution has nearly all of the work."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.heavy = nn.Conv2d(16, 64, 5, padding=2)
        self.depthwise = nn.Conv2d(64, 64, 3, padding=1, groups=64, stride=2)
        self.up = nn.ConvTranspose2d(64, 8, 2, stride=2)
        self.query, self.key, self.value = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.depthwise(self.heavy(torch.relu(self.norm(self.stem(x)))))))
        x = x.flatten(2).transpose(1, 2)
        x = x + torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1) @ self.value(x)
        out: Tensor = self.head(x.mean(dim=1))
        return out


IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def network() -> PrunableNetwork:
    """The mixed network, traced."""
    return PrunableNetwork(Mixed(), IMAGES, name="mixed")


def probe_of(network: PrunableNetwork, counts: Any, images: Tensor = IMAGES, **settings: Any) -> Probe:
    """The pruned network, ready."""
    plan = PruningPlan.from_counts(network.graph, counts)
    inputs, outputs = (np.rint(one).astype(np.int64) for one in network.costs.widths(counts))
    with ready_to_measure(LatencySettings(threads=1, **settings)) as known:
        model = network.pruned(plan)
        return make_probe(model, network.graph.operations, Widths(inputs, outputs), (images,), known)


def module_of(network: PrunableNetwork) -> list[str]:
    """Where each operation runs."""
    return [one.module for one in network.graph.operations]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_every_operation_is_found_and_more_work_takes_longer(network: PrunableNetwork, backend: str) -> None:
    """At full width and pruned.

    What a runtime drops the name of (OpenVINO that of a transposed convolution), and products of activations that no
    module holds, count with what precedes them. OpenVINO does not tell of what takes less than a microsecond.
    """
    pytest.importorskip("torch" if backend == "torch" else backend)
    rng = np.random.default_rng(0)
    for counts in (network.graph.sizes, rng.integers(network.graph.sizes // 2, network.graph.sizes, endpoint=True)):
        profile = probe_of(network, counts, IMAGES.repeat(8, 1, 1, 1), backend=backend).profile(20)
        found = dict(zip(module_of(network), profile.seconds.tolist(), strict=True))

        assert found["heavy"] > max(found["stem"], found["query"], found["head"])
        named = {"stem", "heavy", "depthwise", "query", "key", "value"} | ({"head"} if backend != "openvino" else set())
        assert all(profile.events[number] for number, path in enumerate(module_of(network)) if path in named)


def test_module_that_runs_twice_begins_both_of_its_operations() -> None:
    """Shared layers are operations of their own each time."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.shared(self.shared(self.first(x)))
            return out

    network = PrunableNetwork(nn.Sequential(Twice(), nn.Flatten(), nn.Linear(8 * 256, 4)), IMAGES)

    profile = probe_of(network, network.graph.sizes).profile(3)

    assert len(profile.events) == 4
    assert profile.events.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("quick", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nodes_are_named_after_the_operation_that_they_belong_to_or_follow(
    network: PrunableNetwork, quick: bool
) -> None:
    """Whatever exporter wrote them, and the network computes the same."""
    onnx = pytest.importorskip("onnx")
    ort = pytest.importorskip("onnxruntime")
    model = network.model.eval()
    inputs, outputs = (np.rint(one).astype(np.int64) for one in network.costs.widths(network.graph.sizes))
    data = named_after_operations(onnx_bytes(model, (IMAGES,), quick=quick), network.graph.operations, inputs, outputs)
    nodes = onnx.load_from_string(data).graph.node

    kinds = {"Conv", "ConvTranspose", "Gemm", "MatMul"}
    begun = [operation_of(node.name) for node in nodes if node.op_type in kinds]
    numbers = [operation_of(node.name) for node in nodes]
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})

    assert begun == list(range(len(network.graph.operations)))
    assert numbers == sorted(number for number in numbers if number is not None)
    assert torch.allclose(torch.from_numpy(found), model(IMAGES), atol=1e-4)


def test_names_survive_what_runtimes_do_to_them() -> None:
    """The last operation in a name is the one that reads."""
    assert operation_of("op12!/layer1/Relu_output_0_nchwc") == 12
    assert operation_of("op3!x_abcd_acdb_op14!conv/WithoutBiases") == 14
    assert operation_of("ReorderOutput_token_7") is None


@pytest.mark.parametrize(
    ("backend", "starts", "watches"),
    [
        ("onnxruntime", "open_session", "open_session"),
        ("openvino", "compile_openvino", "compile_openvino"),
        ("torch", "on_device", "_marks"),
    ],
)
def test_what_a_runtime_raises_is_told_as_an_error_with_a_remedy(
    network: PrunableNetwork, backend: str, starts: str, watches: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the network runs, and while it is watched."""
    pytest.importorskip("torch" if backend == "torch" else backend)
    message = rf"`models` should run.*on cpu in {backend}. Received network, which raised RuntimeError: no such kernel"

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no such kernel")

    probe = probe_of(network, network.graph.sizes, backend=backend)
    monkeypatch.setattr(operation_profiles, starts, fail)
    monkeypatch.setattr(operation_profiles, watches, fail)

    with pytest.raises(PruningError, match=message):
        probe_of(network, network.graph.sizes, backend=backend)
    with pytest.raises(PruningError, match=message):
        probe.profile(1)


def test_inputs_are_on_the_graphics_card_before_a_run_of_onnx_runtime_is_timed(
    network: PrunableNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Watched or not; here the card is the processor."""
    pytest.importorskip("onnxruntime")
    devices: list[str] = []
    bound = runtimes._bound

    def noted(session: Any, feeds: Any, device: str) -> Any:
        devices.append(device)
        return bound(session, feeds, "cpu")

    monkeypatch.setattr(runtimes, "_bound", noted)
    monkeypatch.setattr(operation_profiles, "open_session", lambda *args, device, **more: open_session(*args, **more))

    probe = probe_of(network, network.graph.sizes, backend="onnxruntime", device="cuda:1")

    assert probe.profile(3).seconds.sum() > 0
    assert devices == ["cuda:1", "cuda:1"]
