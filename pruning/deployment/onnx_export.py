"""ONNX files and ONNX Runtime sessions; both are an optional extra."""

import io
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing
from prunegym.pruning.nests import tensors_in

#: Opset of quick exports: the newest that torch's older exporter knows well.
_OPSET = 18
#: Largest difference between ONNX Runtime and torch, as a share of the largest output.
_TOLERANCE = 1e-3
#: Sizes of the batches on which an exported file is checked: the smallest, and two that the exporter never saw.
_CHECKED_BATCHES = (1, 3, 8)
#: One of them.
_UNSEEN_BATCH = 3


def require_onnx() -> None:
    """Make sure that the optional extra is there.

    Raises:
        PruningError: it is not.
    """
    for module in ("onnx", "onnxruntime", "onnxscript"):
        try:
            import_module(module)
        except ImportError as fault:
            raise PruningError(
                f"`backend` ONNX needs the package {module}. Received an environment without it ({fault}). "
                "Run: pip install 'prunegym[onnx]'"
            ) from fault


def with_batch(example_inputs: Tensor | tuple[Any, ...], batch_size: int) -> tuple[Any, ...]:
    """Repeat or cut example inputs to a batch size.

    Args:
        example_inputs: a tensor, or a tuple of inputs for ``model(*inputs)``. The first dimension of the
            first tensor is the batch; every tensor whose first dimension has the same size shares it.
        batch_size: examples wanted.
    """
    inputs = _as_tuple(example_inputs)
    before = _batch_of(inputs)
    rows = torch.arange(batch_size) % before if before else None

    def resize(tensor: Tensor) -> Tensor:
        shared = rows is not None and tensor.ndim > 0 and tensor.shape[0] == before
        return tensor[rows.to(tensor.device)] if shared and rows is not None else tensor

    resized: tuple[Any, ...] = tree_map_only(Tensor, resize, inputs)
    return resized


def _batch_of(inputs: tuple[Any, ...]) -> int | None:
    """Size of the batch; None where the first tensor has none."""
    first = next((leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)), None)
    return None if first is None or first.ndim == 0 or first.shape[0] == 0 else first.shape[0]


def batch_shapes(inputs: tuple[Any, ...]) -> Any:
    """Which dimensions of inputs are the batch, as ``torch.export`` takes it; None where there is no batch."""
    batch = _batch_of(inputs)
    symbol = torch.export.Dim("batch")

    def sizes(leaf: Any) -> dict[int, Any] | None:
        return {0: symbol} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None

    return tree_map(sizes, inputs) if batch else None


def export_onnx(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    path: Path,
    *,
    check: bool = True,
    dynamic_batch: bool = True,
    tolerance: float = _TOLERANCE,
) -> float:
    """Write a network as an ONNX file, in eval mode.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``.
        path: the file; replaced if it exists.
        check: run the file in ONNX Runtime on batches of 1, 3 and 8 and compare with torch, before it takes its
            name.
        dynamic_batch: take batches of any size, instead of the size of the example only.
        tolerance: largest difference from torch, as a share of the largest output.

    Returns:
        Largest absolute difference from torch's outputs, or NaN without ``check``.

    Raises:
        PruningError: the optional extra is absent, the network cannot be exported, the outputs differ, or the
            file cannot be written.
    """
    require_onnx()
    twin = duplicate(model).cpu().eval()
    inputs = tree_map_only(Tensor, Tensor.cpu, _as_tuple(example_inputs))
    data = onnx_bytes(twin, inputs, dynamic_batch=dynamic_batch)
    difference = float("nan")
    if check:
        batches = [with_batch(inputs, size) for size in _CHECKED_BATCHES] if dynamic_batch else [inputs]
        difference = max(_difference(twin, data, batch, tolerance) for batch in batches)
    with replacing(path, argument="path") as temporary:
        temporary.write_bytes(data)
    return difference


def _as_tuple(inputs: Tensor | tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _quick_bytes(model: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """The file that torch's older exporter writes, or nothing if there is none."""
    buffer: Any = io.BytesIO()  # torch's types know of files only
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # that it is the older one
            torch.onnx.export(model, inputs, buffer, dynamo=False, opset_version=_OPSET)
    except Exception:  # it, and the versions of torch that no longer have it, may raise anything
        return b""
    return bytes(buffer.getvalue())


def on_cpu(model: nn.Module, inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of a network in evaluation mode, and inputs for it, both on the CPU in one data type."""

    def place(leaf: Tensor) -> Tensor:
        return leaf.cpu().to(dtype) if leaf.is_floating_point() else leaf.cpu()

    placed: tuple[Any, ...] = tree_map_only(Tensor, place, inputs)
    return duplicate(model).to(dtype).cpu().eval(), placed


def onnx_bytes(model: nn.Module, inputs: tuple[Any, ...], *, dynamic_batch: bool = False, quick: bool = False) -> bytes:
    """Serialise a network that is on the CPU and in eval mode.

    Args:
        model: the network.
        inputs: example inputs; without ``dynamic_batch`` the file takes these sizes only.
        dynamic_batch: leave the batch size open.
        quick: use torch's older exporter where it is there and takes the network: for files that are run and thrown
            away, of which a latency table needs many.

    Raises:
        PruningError: torch cannot export the network.
    """
    if quick and (quickly := _quick_bytes(model, inputs)):
        return quickly
    # torch.export would take a batch of one for a constant
    inputs = with_batch(inputs, 2) if dynamic_batch else inputs
    shapes = batch_shapes(inputs) if dynamic_batch else None
    try:
        # what the exporter's libraries deprecate among themselves is no concern of the caller
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
            assert program is not None
            data: bytes = program.model_proto.SerializeToString()
    except Exception as fault:  # whatever the model and the exporter may raise
        reason = (str(fault).splitlines() or [""])[0]
        raise PruningError(
            "`model` should be a network that torch.onnx.export can export. Received a "
            f"{type(model).__name__}, which raised {type(fault).__name__}: {reason} Use the torch backend or the "
            "format program, or rewrite what the message names."
        ) from fault
    return data


def deployed_bytes(model: nn.Module, inputs: tuple[Any, ...]) -> bytes:
    """The file that ``prunegym export`` writes: for batches of any size, or of one where the network's code fixes it.

    The outputs are not compared with torch's, as they are there: this is for files that are timed.

    Args:
        model: a network that is on the CPU and in eval mode.
        inputs: whose batch a file for one size takes.

    Raises:
        PruningError: torch cannot export the network.
    """
    try:
        data = onnx_bytes(model, inputs, dynamic_batch=True)
        _outputs(open_session(data, torch.get_num_threads()), with_batch(inputs, _UNSEEN_BATCH))
    except PruningError:
        return onnx_bytes(model, inputs)
    return data


def open_session(data: bytes, threads: int, *, device: str = "cpu", profile: Path | None = None) -> Any:
    """An ONNX Runtime session.

    Args:
        data: a serialised ONNX model.
        threads: threads that work on one operation; operations run one after another.
        device: ``cpu``, or ``cuda`` with or without a number.
        profile: beginning of the path of a file that gets the time of every operation, when the session is told to
            end profiling.

    Raises:
        PruningError: this build of ONNX Runtime does not know the device, or does not take the file.
    """
    import onnxruntime

    check_provider(device)
    kind, _, index = device.partition(":")
    provider = f"{kind.upper()}ExecutionProvider"
    options = onnxruntime.SessionOptions()
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # below errors there is only talk of thread affinity in containers
    # threads that wait in a busy loop after one session's run would slow the next session's
    options.add_session_config_entry("session.force_spinning_stop", "1")
    choices = {} if kind == "cpu" else {"device_id": int(index or 0)}
    try:
        return onnxruntime.InferenceSession(data, options, providers=[(provider, choices)])
    except Exception as fault:  # ONNX Runtime's exceptions have no common class
        raise _does_not_run(fault) from fault


def has_provider(kind: str) -> bool:
    """True if ONNX Runtime is there and runs on this kind of device, such as ``cpu`` or ``cuda``."""
    try:
        import onnxruntime
    except ImportError:
        return False
    return f"{kind.upper()}ExecutionProvider" in onnxruntime.get_available_providers()


def check_provider(device: str) -> None:
    """Make sure that ONNX Runtime runs on a device.

    Raises:
        PruningError: this build of it does not.
    """
    if not has_provider(device.partition(":")[0]):
        from onnxruntime import get_available_providers

        raise PruningError(
            f"`device` should be one that this build of ONNX Runtime knows. Received {device}, where there are only "
            f"{', '.join(get_available_providers())}. Run: pip install onnxruntime-gpu, or measure on cpu."
        )


def session_feeds(session: Any, inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Arrays by the input names of a session."""
    return feeds_for([one.name for one in session.get_inputs()], inputs)


def feeds_for(names: Sequence[str], inputs: tuple[Any, ...]) -> dict[str, Any]:
    """Arrays by the names of an exported network's inputs.

    Raises:
        PruningError: the network reads fewer tensors than there are.
    """
    leaves = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    if len(names) != len(leaves):
        raise PruningError(
            f"`example_inputs` should be tensors that the network reads. Received {len(leaves)} tensors, of "
            f"which the exported network takes {len(names)} ({', '.join(names)}). Leave out the others."
        )
    return {name: np.ascontiguousarray(leaf.numpy()) for name, leaf in zip(names, leaves, strict=True)}


def _outputs(session: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """What a session makes of inputs.

    Raises:
        PruningError: it does not run them.
    """
    try:
        outputs: list[Any] = session.run(None, session_feeds(session, inputs))
    except PruningError:
        raise
    except Exception as fault:  # ONNX Runtime's exceptions have no common class
        raise _does_not_run(fault) from fault
    return outputs


def _does_not_run(fault: Exception) -> PruningError:
    return PruningError(
        f"`model` should export to a file that ONNX Runtime runs. Received {type(fault).__name__}: "
        f"{(str(fault).splitlines() or [''])[0]} Use float32, or the torch backend."
    )


def _difference(model: nn.Module, data: bytes, inputs: tuple[Any, ...], tolerance: float) -> float:
    """Largest absolute difference between torch and ONNX Runtime.

    Raises:
        PruningError: ONNX Runtime does not run the file, or the outputs differ too much.
    """
    with torch.no_grad():
        expected = tensors_in(model(*inputs))
    found = _outputs(open_session(data, torch.get_num_threads()), inputs)
    gap = gap_between(expected, [torch.from_numpy(one) for one in found])
    if not gap.within(tolerance):
        raise PruningError(
            f"`model` should give the same outputs in ONNX Runtime as in torch. Received {gap}. Export a network with "
            "finite outputs, or report this network."
        )
    return gap.absolute
