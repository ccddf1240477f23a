"""What runs a network when its latency is measured: torch, torch.compile, ONNX Runtime, OpenVINO.

A runtime is one function: it takes a network, inputs and settings, and returns a function that loads the network. What
that returns runs it once and waits until it is done. To add a runtime, write such a function and enter it in
:data:`RUNTIMES`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegym.pruning.copies import duplicate
from prunegym.pruning.deployment.onnx_export import (
    check_provider,
    deployed_bytes,
    feeds_for,
    has_provider,
    on_cpu,
    onnx_bytes,
    open_session,
    require_onnx,
    session_feeds,
)
from prunegym.pruning.errors import PruningError, unknown_name

Run = Callable[[], object]
"""Runs a network once, and returns when its outputs are there."""
Opener = Callable[[], Run]
"""Loads a network that has been prepared, and gives a run of it. Each call loads it afresh, where that is cheap."""

DTYPES = ("float32", "bfloat16", "float16")
#: Stands for every kind of device that is not listed.
_ANY = "*"


class RunSettings(Protocol):
    """What a runtime has to know."""

    @property
    def device(self) -> str:
        """A torch device."""

    @property
    def dtype(self) -> str:
        """Of weights and inputs."""

    @property
    def threads(self) -> int | None:
        """Threads that work on one operation; None leaves torch's number."""


@dataclass(frozen=True)
class Runtime:
    """One way to run a network."""

    prepare: Callable[[nn.Module, tuple[Any, ...], RunSettings], Opener]
    """Makes ready a copy of a network in evaluation mode, and inputs that have the batch size wanted."""
    dtypes: Mapping[str, tuple[str, ...]]
    """Data types that it takes, by kind of device; it runs on no other device."""
    package: str = "torch"
    """What is imported, and tells the version of the runtime."""
    require: Callable[[], None] = lambda: None
    """Raises a PruningError with the command that installs it, where it is not there."""
    has_device: Callable[[str], bool] = lambda kind: True
    """Whether the build that is installed knows a kind of device besides the processor."""

    def accepts(self, device: str, dtype: str) -> bool:
        """True if it can run networks of this type on this device."""
        return dtype in self.dtypes.get(device.partition(":")[0], self.dtypes.get(_ANY, ()))

    def is_there(self, device: str) -> bool:
        """True if the build that is installed runs on this kind of device."""
        kind = device.partition(":")[0]
        return any(self.accepts(kind, dtype) for dtype in DTYPES) and (kind == "cpu" or self.has_device(kind))

    @property
    def version(self) -> str:
        """The version that is installed, whatever its distribution is called; empty if there is none."""
        try:
            version = str(import_module(self.package).__version__)
        except ImportError:
            return ""
        return version.partition("-")[0]  # OpenVINO goes on with the number of its build


def runtime_named(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
        PruningError: there is none.
    """
    if name not in RUNTIMES:
        raise unknown_name("backend", name, RUNTIMES)
    return RUNTIMES[name]


# ---- torch


def _eager(model: nn.Module, inputs: tuple[Any, ...], settings: RunSettings) -> Opener:
    def open_copy() -> Run:
        twin, moved = on_device(model, inputs, settings)
        return _waiting(lambda: twin(*moved), settings.device)

    return open_copy


def _compiled(model: nn.Module, inputs: tuple[Any, ...], settings: RunSettings) -> Opener:
    if settings.device.startswith("cpu"):
        _require_compiler()
    twin, moved = on_device(model, inputs, settings)

    def call(*arguments: Any) -> Any:
        return twin(*arguments)

    # torch keeps compiled code with the code object it came from, a few versions of each, and then stops compiling:
    # networks of one class, which pruned ones are, need code objects of their own
    call.__code__ = call.__code__.replace()
    compiled = torch.compile(call, dynamic=False)
    run = _waiting(lambda: compiled(*moved), settings.device)
    return lambda: run  # to compile again would take longer than all turns


def on_device(model: nn.Module, inputs: tuple[Any, ...], settings: RunSettings) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of a network and its inputs on the device, in the data type asked for; ``float32`` leaves them alone.

    They are float32 then, or of another precision in which the network runs.
    """
    device = torch.device(settings.device)
    dtype: torch.dtype | None = getattr(torch, settings.dtype)
    dtype = None if dtype == torch.float32 else dtype
    twin = duplicate(model).to(device=device, dtype=dtype).eval()
    moved: tuple[Any, ...] = tree_map_only(
        Tensor, lambda leaf: leaf.to(device, dtype if dtype and leaf.is_floating_point() else leaf.dtype), inputs
    )
    return twin, moved


def _waiting(run: Run, device: str) -> Run:
    """A run that returns when the device is done: all but processors work on after the call has come back."""
    if device.startswith("cpu"):
        return run

    def run_and_wait() -> None:
        run()
        wait_for(device)

    return run_and_wait


def wait_for(device: str) -> None:
    """Return when a device has done what it was asked."""
    if not device.startswith("cpu"):
        torch.accelerator.synchronize(torch.device(device))


def _require_compiler() -> None:
    """torch.compile turns a network into C++ for processors.

    Raises:
        PruningError: there is no compiler.
    """
    default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    wanted = os.environ.get("CXX", default)
    if shutil.which(wanted) is None:
        raise PruningError(
            f"`backend` compile needs a C++ compiler on processors. Received an environment without {wanted}. "
            "Install one, such as: apt-get install g++; or name another in the environment variable CXX."
        )


# ---- ONNX Runtime


def _onnxruntime(model: nn.Module, inputs: tuple[Any, ...], settings: RunSettings) -> Opener:
    check_provider(settings.device)  # before an export that takes seconds
    dtype = torch.float16 if settings.dtype == "float16" else torch.float32
    twin, placed = on_cpu(model, inputs, dtype)
    return session_opener(deployed_bytes(twin, placed), placed, settings)


def session_opener(data: bytes, inputs: tuple[Any, ...], settings: RunSettings) -> Opener:
    """Sessions of ONNX Runtime for a serialised model and inputs on the CPU."""

    def open_one() -> Run:
        session = open_session(data, settings.threads or torch.get_num_threads(), device=settings.device)
        return session_run(session, inputs, settings.device)

    return open_one


def session_run(session: Any, inputs: tuple[Any, ...], device: str) -> Run:
    """A run of a session of ONNX Runtime, with its inputs on the device beforehand.

    Args:
        session: from :func:`.open_session`.
        inputs: on the CPU.
        device: that the session runs on.

    Raises:
        PruningError: the network reads fewer tensors than there are.
    """
    feeds = session_feeds(session, inputs)
    if device.startswith("cpu"):
        return lambda: session.run(None, feeds)
    return _bound(session, feeds, device)


def _bound(session: Any, feeds: Mapping[str, Any], device: str) -> Run:
    """A run whose inputs and outputs stay on the device, as those of the other runtimes do."""
    from onnxruntime import OrtValue

    kind, _, index = device.partition(":")
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, kind, int(index or 0)))
    for output in session.get_outputs():
        binding.bind_output(output.name, kind, int(index or 0))

    def run() -> object:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()

    return run


# ---- OpenVINO

#: What OpenVINO calls data types.
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _openvino(model: nn.Module, inputs: tuple[Any, ...], settings: RunSettings) -> Opener:
    twin, placed = on_cpu(model, inputs, torch.float32)
    data = onnx_bytes(twin, placed)
    return lambda: compile_openvino(data, placed, settings)[0]


def compile_openvino(
    data: bytes, inputs: tuple[Any, ...], settings: RunSettings, *, watched: bool = False
) -> tuple[Run, Any]:
    """Make an ONNX file ready to run in OpenVINO.

    Args:
        data: a serialised ONNX model.
        inputs: on the CPU.
        settings: data type and threads.
        watched: keep the time of every node, in the ``profiling_info`` of the request.

    Returns:
        A function that runs it, and OpenVINO's request that does so.

    Raises:
        PruningError: the processor does not compute in the data type.
    """
    import openvino

    wanted = _PRECISIONS[settings.dtype]
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(settings.threads or torch.get_num_threads()),
        "INFERENCE_PRECISION_HINT": wanted,  # else it takes what it deems fastest
        "PERF_COUNT": "YES" if watched else "NO",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model=data), "CPU", options)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if used != wanted:
        raise PruningError(
            f"`dtype` should be one that this processor computes in. Received {settings.dtype}, for which OpenVINO "
            f"takes {used}. Use float32."
        )
    request = compiled.create_infer_request()
    feeds = feeds_for([one.any_name for one in compiled.inputs], inputs)
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True), request


def _require_openvino() -> None:
    try:
        import openvino  # noqa: F401
    except ImportError as fault:
        raise PruningError(
            f"`backend` openvino needs the package openvino. Received an environment without it ({fault}). "
            "Run: pip install 'prunegym[openvino]'"
        ) from fault
    require_onnx()


RUNTIMES: Mapping[str, Runtime] = {
    "torch": Runtime(_eager, {_ANY: DTYPES}),
    "compile": Runtime(_compiled, {_ANY: DTYPES}),
    "onnxruntime": Runtime(
        _onnxruntime,
        {"cpu": ("float32",), "cuda": ("float32", "float16")},
        package="onnxruntime",
        require=require_onnx,
        has_device=has_provider,
    ),
    "openvino": Runtime(_openvino, {"cpu": DTYPES}, package="openvino", require=_require_openvino),
}
"""All runtimes, by name; the first is the default."""
