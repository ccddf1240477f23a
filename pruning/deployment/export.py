"""Networks in the formats that deployment asks for, each checked against the network before its file takes its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.copies import duplicate
from prunegym.pruning.deployment.onnx_export import export_onnx, require_onnx, with_batch
from prunegym.pruning.deployment.program import check_exportable, export_program
from prunegym.pruning.deployment.recipe import RECIPE, WEIGHTS, Blueprint
from prunegym.pruning.deployment.saving import write_network
from prunegym.pruning.errors import PruningError, unknown_name

Format: TypeAlias = Literal["onnx", "program", "safetensors"]
DtypeName: TypeAlias = Literal["float32", "bfloat16", "float16"]

ONNX = "model.onnx"
PROGRAM = "model.pt2"
FORMATS: tuple[Format, ...] = ("onnx", "program", "safetensors")
"""Names of the formats."""
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""Types of numbers that networks are exported in."""
#: Largest difference between ONNX Runtime and torch as a share of the largest output: in float16 they round at other
#: places.
_ONNX_TOLERANCE = {"float32": 1e-3, "float16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A network that was written in one format."""

    format: Format
    path: Path
    """The file; of safetensors that with the tensors, beside its recipe."""
    bytes: int
    """Size on disk, of both files where there are two."""
    difference: float
    """Largest absolute difference between its outputs and the network's in torch, in the same type of numbers."""
    from_float32: float
    """Largest absolute difference that this type of numbers makes, in torch; 0 for float32."""
    dynamic_batch: bool
    """Whether it takes batches of any size, or one size only."""
    load: str
    """Code that loads it."""
    warning: str | None = None
    """Why it does not take batches of any size."""


def export_network(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    folder: Path,
    formats: Sequence[str],
    *,
    blueprint: Blueprint,
    metadata: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> list[Exported]:
    """Write a network into a folder, in several formats.

    ONNX files and programs take and give float32 whatever they compute in; a network from safetensors takes the type it
    was saved in.

    Args:
        model: the network; it is not changed.
        example_inputs: inputs for ``model(*inputs)`` with a batch dimension.
        folder: made if need be; files of the same name are replaced.
        formats: of :data:`FORMATS`.
        blueprint: what rebuilds the network around safetensors.
        metadata: what is told in their recipe.
        dtype: of :data:`DTYPES`.

    Raises:
        PruningError: a format or type is unknown or does not suit the network, an extra is missing, or the outputs of a
            file differ. Files that were written before are kept.
    """
    check_formats(formats, dtype)
    model = duplicate(model).cpu().eval()
    inputs: tuple[Any, ...] = tree_map_only(Tensor, Tensor.cpu, example_inputs)
    twin = model if dtype == "float32" else in_dtype(model, dtype)
    rounding = _difference(model, twin, inputs)
    metadata = metadata or {}

    def safetensors() -> dict[str, Any]:
        bare = duplicate(model).to(DTYPES[dtype])
        difference = write_network(folder, blueprint, bare, example_inputs=inputs, metadata=metadata)
        size = sum((folder / name).stat().st_size for name in (WEIGHTS, RECIPE))
        load = f"prunegym.load('{folder}'{_needed(blueprint.source)})"
        return {
            "path": folder / WEIGHTS,
            "bytes": size,
            "difference": difference,
            "dynamic_batch": True,
            "load": load,
        }

    writers: dict[str, Callable[[], dict[str, Any]]] = {
        "onnx": lambda: _onnx(twin, inputs, folder / ONNX, dtype),
        "program": lambda: _program(twin, inputs, folder / PROGRAM),
        "safetensors": safetensors,
    }
    done = []
    for name in dict.fromkeys(formats):
        written = writers[name]()
        size = written.pop("bytes", None) or written["path"].stat().st_size
        done.append(Exported(format=_known(name), bytes=size, from_float32=rounding, **written))
    return done


def check_formats(formats: Sequence[str], dtype: str = "float32") -> None:
    """Make sure that formats can be written here, before work is spent on them.

    Raises:
        PruningError: one is unknown, needs an extra, or has no such numbers.
    """
    if not formats:
        raise PruningError(f"`format` should be given at least once. Received none. Choose from {', '.join(FORMATS)}.")
    for name in formats:
        _known(name)
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if "onnx" in formats:
        require_onnx()
        if dtype not in _ONNX_TOLERANCE:
            raise PruningError(
                f"`dtype` should be float32 or float16 for ONNX. Received {dtype}, in which ONNX Runtime has no "
                "convolutions. Choose one of these, or the format program."
            )


def in_dtype(model: nn.Module, dtype: str) -> nn.Module:
    """A copy that takes and gives float32 and computes in another type.

    Raises:
        PruningError: a tensor of the network does not fit into the type.
    """
    kind = DTYPES[dtype]
    largest = torch.finfo(kind).max
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and bool((tensor.abs() > largest).any() & torch.isfinite(tensor).all()):
            raise PruningError(
                f"`dtype` should be a type that holds the network's numbers. Received {dtype}, whose largest is "
                f"{largest:g}, and '{name}' with {float(tensor.abs().max()):g}. Choose bfloat16 or float32."
            )
    twin = duplicate(model).to(kind)
    twin.register_forward_pre_hook(lambda _, inputs: _cast(inputs, kind))
    twin.register_forward_hook(lambda _, inputs, outputs: _cast(outputs, torch.float32))
    return twin


def check_program(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Make sure that a network can be exported as a program at all, before work is spent on it.

    Raises:
        PruningError: it cannot.
    """
    check_exportable(model, with_batch(example_inputs, 1))


def _known(name: str) -> Format:
    """The format of a name."""
    for known in FORMATS:
        if known == name:
            return known
    raise unknown_name("format", name, FORMATS)


def _onnx(model: nn.Module, inputs: tuple[Any, ...], path: Path, dtype: str) -> dict[str, Any]:
    """Write an ONNX file, with a fixed batch where the network's code fixes it."""
    warning, one = None, with_batch(inputs, 1)
    tolerance = _ONNX_TOLERANCE[dtype]
    try:
        difference = export_onnx(model, one, path, tolerance=tolerance)
    except PruningError as fault:  # whatever it is, a file of fixed size may do without
        difference = export_onnx(model, one, path, tolerance=tolerance, dynamic_batch=False)
        warning = f"The ONNX file takes batches of 1 only: {fault}"
    load = f"onnxruntime.InferenceSession('{path}')"
    return {
        "path": path,
        "difference": difference,
        "dynamic_batch": warning is None,
        "load": load,
        "warning": warning,
    }


def _program(model: nn.Module, inputs: tuple[Any, ...], path: Path) -> dict[str, Any]:
    """Write a program."""
    written = export_program(model, with_batch(inputs, 1), path)
    return {
        "path": path,
        "difference": written.difference,
        "dynamic_batch": written.dynamic_batch,
        "load": f"prunegym.load_program('{path}')",
        "warning": written.warning,
    }


def _needed(source: Mapping[str, Any]) -> str:
    """What the reader of safetensors has to bring, as further arguments of ``load``."""
    name = source.get("network")
    if not isinstance(name, str):
        return ", model=..."
    return ", allow_code=True" if ":" in name else ""


def _cast(values: Any, kind: torch.dtype) -> Any:
    """Floating-point tensors in another type."""
    return tree_map_only(Tensor, lambda one: one.to(kind) if one.is_floating_point() else one, values)


def _difference(model: nn.Module, twin: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Largest absolute difference between the outputs of a network and of its twin in another type of numbers.

    Raises:
        PruningError: The twin does not run, or its outputs are not finite where the network's are.
    """
    if model is twin:
        return 0.0
    with torch.no_grad():
        expected = model(*inputs)
        try:
            found = twin(*inputs)
        except Exception as fault:  # whatever a network may raise
            raise _unsuited(f"which raised {type(fault).__name__}: {fault}") from fault
    gap = gap_between(expected, found)
    if not gap.absolute < float("inf"):
        raise _unsuited("in which its outputs are not finite")
    return gap.absolute


def _unsuited(what: str) -> PruningError:
    return PruningError(
        f"`dtype` should be a type that the network can compute in. Received one {what}. Choose another, or float32."
    )
