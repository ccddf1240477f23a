"""Networks as ``torch.export`` programs (``.pt2``): files that run without the code that built them.

A program is the list of operations that a network runs, with its weights. Source lines, paths and example inputs,
which PyTorch would write along, are left out.
"""

from __future__ import annotations

import io
import json
import logging
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import TreeSpec, tree_leaves, tree_map_only

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.copies import duplicate
from prunegym.pruning.deployment.onnx_export import batch_shapes, with_batch
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing

#: Largest difference between a program and its network, as a share of the largest output.
_TOLERANCE = 1e-4
#: Sizes of the batches on which a program with open batch size is checked: the smallest, and two that the exporter
#: never saw.
_CHECKED_BATCHES = (1, 3, 8)
#: What torch's archives of programs hold. Not here, and refused: compiled libraries, and formats of old versions.
_PARTS = (
    *("models/", "data/weights/", "data/constants/", "data/sample_inputs/", "extra/", ".data/"),
    *("archive_format", "archive_version", "byteorder"),
)
#: Containers that inputs and outputs may come in: any other needs its class wherever the program is read.
_CONTAINERS = (tuple, list, dict)


@dataclass(frozen=True, kw_only=True)
class ProgramExport:
    """A program that was written."""

    path: Path
    difference: float
    """Largest absolute difference from the network's outputs."""
    dynamic_batch: bool
    """Whether it takes batches of any size, or that of the example only."""
    warning: str | None = None
    """Why it does not take batches of any size, where that was wanted."""


class Program(nn.Module):
    """A network read from a program file. It is in evaluation mode, always.

    Args:
        program: what was read.
    """

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.graph = program.module()
        self.training = False

    def forward(self, *inputs: Any) -> Any:
        """Run the program on inputs as the network took them."""
        return self.graph(*inputs)

    def train(self, mode: bool = True) -> Program:
        """Stay in evaluation mode: the operations of training were not recorded."""
        return self


def export_program(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    path: str | Path,
    *,
    dynamic_batch: bool = True,
) -> ProgramExport:
    """Write a network as a program, in evaluation mode and on the CPU, and check it.

    The file is read back and compared with the network, on batches of 1, 3 and 8 where its batch size is open, before
    it takes its name. Where the network's code fixes the batch size, the program takes batches of the example's size
    and the result carries a warning.

    Args:
        model: the network; it is not changed.
        example_inputs: a tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``.
        path: the file, ending in ``.pt2``; replaced if it exists.
        dynamic_batch: take batches of any size, where the network allows it.

    Raises:
        PruningError: torch cannot export the network, the program's outputs differ, or the file cannot be written.
            What was at ``path`` before is still there.
    """
    path = Path(path).expanduser()
    if path.suffix != ".pt2":
        raise PruningError(f"`path` should end in .pt2. Received '{path}'. Write for example '{path.stem}.pt2'.")
    twin, inputs = _on_cpu(model, example_inputs)
    data, warning = None, None
    if dynamic_batch:
        try:
            data, difference = _checked(twin, inputs, dynamic=True)
        except PruningError as fault:  # whatever it is, a program of fixed size may do without
            warning = f"The program takes batches of {_batch_of(inputs)} only: {_why(fault.__cause__ or fault)}"
    if data is None:
        data, difference = _checked(twin, inputs, dynamic=False)
    with replacing(path, argument="path") as temporary:
        temporary.write_bytes(data)
    is_open = dynamic_batch and warning is None
    return ProgramExport(path=path, difference=difference, dynamic_batch=is_open, warning=warning)


def check_exportable(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> None:
    """Make sure that a network can be exported at all, before work is spent on it.

    Raises:
        PruningError: it cannot.
    """
    _export(*_on_cpu(model, example_inputs), dynamic=False)


def load_program(path: str | Path) -> Program:
    """Read a network that :func:`export_program` wrote. The code that built it is not needed.

    Archives with pickled or compiled parts are refused. A program is code all the same, and torch evaluates the sizes
    and conditions in it: open only files from people you trust.

    Args:
        path: the file.

    Returns:
        The network, in evaluation mode and on the CPU; ``to`` moves it.

    Raises:
        PruningError: the file is missing, damaged, of another version or kind, or holds pickled parts.
    """
    path = Path(path).expanduser()
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise PruningError(
            f"`path` should be a readable program file. Received '{path}' ({fault.strerror}). Check the path."
        ) from fault
    return Program(_read(data, str(path)))


def _on_cpu(model: nn.Module, example_inputs: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    """A copy of a network in evaluation mode, and inputs for it."""
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return duplicate(model).cpu().eval(), tree_map_only(Tensor, Tensor.cpu, inputs)


def _checked(model: nn.Module, inputs: tuple[Any, ...], *, dynamic: bool) -> tuple[bytes, float]:
    """A program as it is written to a file, and how far its outputs are from the network's."""
    program = _export(model, inputs, dynamic=dynamic)
    buffer = io.BytesIO()
    try:
        with _quiet():
            torch.export.save(program, buffer)
    except Exception as fault:
        raise _refused(model, fault) from fault
    data = buffer.getvalue()
    found = Program(_read(data, "what was just exported"))
    batches = [with_batch(inputs, size) for size in _CHECKED_BATCHES] if dynamic else [inputs]
    return data, max(_difference(model, found, batch) for batch in batches)


def _export(model: nn.Module, inputs: tuple[Any, ...], *, dynamic: bool) -> ExportedProgram:
    """Record a network that is on the CPU and in evaluation mode, without what is its user's own business."""
    if dynamic:
        inputs = with_batch(inputs, 2)  # torch.export would take a batch of one for a constant
    program = _record(model, inputs, batch_shapes(inputs) if dynamic else None)
    for spec in (program.call_spec.in_spec, program.call_spec.out_spec):
        for kind in _containers(spec):
            raise PruningError(
                "`model` should take and return tensors in tuples, lists and dictionaries. Received a "
                f"{type(model).__name__} with a {kind.__name__}, which a reader of the program need not have. "
                "Wrap the network in one that unpacks it."
            )
    program.example_inputs = None  # images of the user's
    for part in program.graph_module.modules():
        if isinstance(part, torch.fx.GraphModule):
            for node in part.graph.nodes:
                node.meta.pop("stack_trace", None)  # source lines and paths of the user's
    return program


def _record(model: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> ExportedProgram:
    """Record a network by running it or, where that fails, by reading its code too.

    The second understands a batch size that was taken with ``len`` and some use of numpy, the first everything else.
    """
    first: Exception | None = None
    for strict in (False, True):
        try:
            with _quiet(), torch.no_grad():
                return torch.export.export(model, inputs, dynamic_shapes=shapes, strict=strict)
        except Exception as fault:  # whatever the model and the exporter may raise
            first = first or fault
    assert first is not None
    raise _refused(model, first) from first


def _containers(spec: TreeSpec) -> Iterator[type]:
    """Types in a nest of inputs or outputs that are not plain containers."""
    if spec.type is not None and spec.type not in _CONTAINERS:
        yield spec.type
    for child in spec.children():
        yield from _containers(child)


def _read(data: bytes, place: str) -> ExportedProgram:
    """Read a program from the content of a file."""
    try:
        _screen(data, place)
        with _quiet():
            return torch.export.load(io.BytesIO(data))
    except PruningError:
        raise
    except Exception as fault:  # torch's reader has no error class of its own
        reason = (str(fault).splitlines() or [type(fault).__name__])[0]
        raise PruningError(
            f"`path` should be a program that this version of torch ({torch.__version__}) can read. Received "
            f"'{place}' ({reason}). Export the network again, or import the library whose operations it uses."
        ) from fault


def _screen(data: bytes, place: str) -> None:
    """Refuse archives whose reading would unpickle objects or load compiled libraries."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        parts = {name: name.partition("/")[2] for name in names}
        odd = [name for name, part in parts.items() if not part.startswith(_PARTS)]
        for name, part in parts.items():
            if part.startswith(("data/weights/", "data/constants/")):
                pickled = part.endswith(".json") and _mentions_pickle(json.loads(archive.read(name)))
                odd += [name] if pickled or part.endswith(".pt") else []
            elif part.startswith("data/sample_inputs/") and archive.getinfo(name).file_size:
                odd += [] if _loads_without_pickle(archive.read(name)) else [name]
    if odd:
        raise PruningError(
            "`path` should be a program of weights and operations alone. Received "
            f"'{place}' with {', '.join(odd[:3])}, which could run code of its own when read. Export the network "
            "with prunegym.export_program."
        )


def _mentions_pickle(config: dict[str, Any]) -> bool:
    return any(payload.get("use_pickle", True) for payload in config.get("config", {}).values())


def _loads_without_pickle(data: bytes) -> bool:
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except Exception:  # the unpickler may raise anything
        return False
    return True


def _difference(model: nn.Module, program: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Largest absolute difference between the outputs of a network and of its program."""
    with torch.no_grad():
        expected = model(*inputs)
        try:
            found = program(*inputs)
        except Exception as fault:
            raise _refused(model, fault) from fault
    gap = gap_between(expected, found)
    if not gap.within(_TOLERANCE):
        raise PruningError(
            f"`model` should give the same outputs as the program made of it. Received {gap}. Export a network with "
            "finite outputs that do not depend on chance."
        )
    return gap.absolute


def _refused(model: nn.Module, fault: Exception) -> PruningError:
    return PruningError(
        f"`model` should be a network that torch.export can export. Received a {type(model).__name__}, which raised "
        f"{_why(fault)} Rewrite what it names, or keep the network's code and save it with `prunegym.save`."
    )


def _why(fault: BaseException) -> str:
    """What the exporter did not take, and the line of the network that it was about."""
    if isinstance(fault, PruningError):
        return str(fault)
    if "specialized it to be a constant" in str(fault):
        return "the network's code fixes it. A reshape with -1 for the batch, and no condition on it, leave it open."
    torch_folder = str(Path(torch.__file__).parent)
    frames = [one for one in traceback.extract_tb(fault.__traceback__) if not one.filename.startswith(torch_folder)]
    frames = [one for one in frames if one.filename != __file__]
    place = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    reason = (str(fault).splitlines() or [""])[0].strip().removesuffix(".")
    return f"{type(fault).__name__}{place}: {reason}."


def _batch_of(inputs: tuple[Any, ...]) -> int:
    return next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.ndim), 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter tells its own programmers; errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx.experimental.symbolic_shapes")]
    levels = [one.level for one in loggers]
    # it prints the graph when it gives up
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for one in loggers:
                one.setLevel(logging.CRITICAL)
            yield
        finally:
            for one, before in zip(loggers, levels, strict=True):
                one.setLevel(before)
