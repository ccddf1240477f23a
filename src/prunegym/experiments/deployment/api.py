"""The Python face of fine-tuning and export, for any model and any task. Exported by ``prunegym``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor, nn

from prunegym.commands.api import completed_source
from prunegym.commands.face_options import as_task, checked_options, data_name
from prunegym.experiments.deployment.commands import example_of
from prunegym.experiments.deployment.config import FinetuneOptions
from prunegym.experiments.deployment.finetune import FinetuneResult, finetune_network
from prunegym.experiments.prune import PruneResult
from prunegym.pruning.datasets.data import DataSplits
from prunegym.pruning.deployment.export import Exported, export_network
from prunegym.pruning.deployment.recipe import NO_SOURCE, Blueprint
from prunegym.pruning.deployment.saving import read_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.task import Task

Network: TypeAlias = PruneResult | FinetuneResult | nn.Module | str | Path
"""A network: what was pruned or fine-tuned, a model, or the folder of a saved one."""


def finetune(
    network: Network,
    task: Task | DataSplits | str | Path,
    *,
    epochs: int = 10,
    learning_rate: float | None = None,
    distill: bool = False,
    teacher: nn.Module | None = None,
    model: nn.Module | None = None,
    name: str | None = None,
    source: str | Mapping[str, Any] | None = None,
    allow_code: bool = False,
    checkpoint: str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> FinetuneResult:
    """Fine-tune a pruned network, or any other.

    Args:
        network: What :func:`prunegym.prune` or this function returned, a folder that :func:`prunegym.save` or
            ``prunegym prune`` wrote, or a model. It is not changed.
        task: Data, loss and score: an object with the methods of :class:`prunegym.Task`; or data for image
            classification, by name, file or folder.
        epochs: Passes over the training examples.
        learning_rate: At its highest; by default 0.01 with SGD and 0.001 with AdamW.
        distill: Imitate a teacher: ``teacher``, or for what :func:`prunegym.prune` returned the unpruned network.
        teacher: Network to imitate, with outputs of the same shape.
        model: The unpruned network, with any weights, for a folder that does not say how to build it.
        name: What a model is called; by default its class.
        source: How to build a model, as in :func:`prunegym.prune`, so that it can be loaded without it.
        allow_code: As in :func:`prunegym.load`, for a folder.
        checkpoint: File from which an interrupted fine-tuning goes on.
        device: Where to train; ``auto`` takes a graphics card if there is one.
        seed: Of the order of the examples, their augmentation and dropout.
        progress: Show a bar on standard error.
        **options: Any other option of ``prunegym finetune``, such as ``optimizer``, ``ema``, ``accumulate`` or
            ``devices``, under the name it has in :class:`~prunegym.experiments.deployment.config.FinetuneOptions`. One
            that is unknown, or would change nothing, is refused: ``split_seed`` where the data are read already,
            ``checkpoint_minutes`` without ``checkpoint``.

    Returns:
        The fine-tuned model, which :func:`prunegym.save` and :func:`prunegym.export` take, and its scores on the test
        split before and after.

    Raises:
        PruningError: Something does not fit or is out of range; the message says what to do.
    """
    idle = {} if checkpoint is not None else {"checkpoint_minutes": "`checkpoint`"}
    config = FinetuneOptions(
        epochs=epochs,
        learning_rate=learning_rate,
        distill=distill,
        device=device,
        seed=seed,
        **data_name(task),
        **checked_options(finetune, FinetuneOptions, options, task, idle),
    )
    known = as_task(task, config)
    found = _opened(network, model=model, name=name, source=completed_source(source, known), allow_code=allow_code)
    if teacher is not None and not distill:
        raise PruningError(
            f"`teacher` should be given with distill=True. Received a {type(teacher).__name__} without. Leave it out, "
            "or imitate it."
        )
    if distill and teacher is None:
        teacher = found.unpruned
        if teacher is None:
            raise PruningError(
                "`teacher` should be given where `distill` goes with anything but a result of prunegym.prune. Received "
                "None. Give the unpruned network, with its weights."
            )
    return finetune_network(
        found.model,
        known,
        config.training_settings(seed),
        blueprint=found.blueprint,
        name=found.name,
        metadata=found.metadata,
        teacher=teacher,
        device=config.torch_device,
        checkpoint=None if checkpoint is None else Path(checkpoint).expanduser(),
        checkpoint_minutes=config.checkpoint_minutes,
        progress=progress,
    )


def export(
    network: Network,
    folder: str | Path,
    formats: str | Sequence[str] = "onnx",
    *,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    dtype: str = "float32",
    model: nn.Module | None = None,
    source: Mapping[str, Any] | None = None,
    allow_code: bool = False,
) -> list[Exported]:
    """Write a network in formats of deployment, each checked against the network.

    Args:
        network: What :func:`prunegym.prune` or :func:`prunegym.finetune` returned, the folder of a saved network, or a
            model. It is not changed.
        folder: Gets ``model.onnx``, ``model.pt2``, or ``model.safetensors`` with ``recipe.json``; files of these names
            are replaced.
        formats: ``onnx``, ``program`` or ``safetensors``, or several.
        example_inputs: A tensor with a batch dimension, or a tuple for ``model(*inputs)``; needed for a model, and for
            folders without an example or a name to build the network by.
        dtype: ``float32``, ``float16`` or ``bfloat16``. ONNX files and programs take and give float32 all the same.
        model: The unpruned network, with any weights, for a folder that does not say how to build it.
        source: How to build a model, as in :func:`prunegym.prune`, for safetensors that load without it.
        allow_code: As in :func:`prunegym.load`, for a folder.

    Returns:
        For each format the file, its size, the largest difference from the network, and the code that loads it.

    Raises:
        PruningError: A format is unknown or does not suit the network, an extra is missing, or outputs differ.
    """
    found = _opened(network, model=model, name=None, source=source, allow_code=allow_code)
    inputs = example_inputs if example_inputs is not None else found.example_inputs
    if inputs is None:
        saved = Path(network) if isinstance(network, str | Path) else None
        inputs = example_of(saved, found.blueprint.source)
    return export_network(
        found.model,
        inputs if isinstance(inputs, tuple) else (inputs,),
        Path(folder).expanduser(),
        (formats,) if isinstance(formats, str) else tuple(formats),
        blueprint=found.blueprint,
        metadata=found.metadata,
        dtype=dtype,
    )


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A network, however it was given."""

    model: nn.Module
    blueprint: Blueprint
    name: str
    metadata: Mapping[str, Any]
    example_inputs: tuple[Any, ...] | None = None
    unpruned: nn.Module | None = None


def _opened(
    network: Network,
    *,
    model: nn.Module | None,
    name: str | None,
    source: Mapping[str, Any] | None,
    allow_code: bool,
) -> _Opened:
    """Find out what a network is and how it is rebuilt.

    Raises:
        PruningError: It is none, its folder cannot be read, or an argument is meant for another kind of network.
    """
    _check_used(network, model=model, source=source, allow_code=allow_code)
    if isinstance(network, PruneResult):
        return _Opened(
            model=network.model,
            blueprint=network.blueprint,
            name=name or network.network.name,
            metadata=network.to_json(),
            example_inputs=network.network.example_inputs,
            unpruned=network.network.model,
        )
    if isinstance(network, FinetuneResult):
        return _Opened(
            model=network.model,
            blueprint=network.blueprint,
            name=name or network.name,
            metadata=network.full_metadata,
            example_inputs=network.example_inputs,
        )
    if isinstance(network, nn.Module):
        called = name or type(network).__name__
        blueprint = Blueprint.of_unpruned(network, source or NO_SOURCE)
        return _Opened(model=network, blueprint=blueprint, name=called, metadata={"network": called})
    if isinstance(network, str | Path):
        saved = read_network(Path(network).expanduser(), model=model, allow_code=allow_code)
        called = name or str(saved.metadata.get("network", "network"))
        return _Opened(model=saved.model, blueprint=saved.blueprint, name=called, metadata=saved.metadata)
    raise PruningError(
        "`network` should be a result of prunegym.prune or prunegym.finetune, a torch.nn.Module, or the folder of a "
        f"saved network. Received a {type(network).__name__}. Give one of these."
    )


def _check_used(network: Network, *, model: object, source: object, allow_code: bool) -> None:
    """Refuse arguments that this kind of network has no use for."""
    is_folder, is_model = isinstance(network, str | Path), isinstance(network, nn.Module)
    rules = {
        "model": (model is None or is_folder, "the folder of a saved network", type(model).__name__),
        "allow_code": (not allow_code or is_folder, "the folder of a saved network", allow_code),
        "source": (source is None or is_model, "a torch.nn.Module", source),
    }
    for name, (holds, rule, value) in rules.items():
        if not holds:
            raise PruningError(
                f"`{name}` should be given with {rule} as `network`. Received {value} with a {type(network).__name__}. "
                "Leave it out: this network says how it is built."
            )
