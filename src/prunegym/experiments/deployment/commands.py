"""The commands ``finetune`` and ``export``. They return results and print nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from prunegym.agents.configuration.options import DataOptions
from prunegym.agents.run_folders.reload import EXAMPLE, loading, save_example
from prunegym.agents.run_folders.running import RESULT, SPLITS, Launch, Reporter, Result
from prunegym.agents.tables import format_table
from prunegym.experiments.deployment.config import ExportConfig, FinetuneConfig, SavedNetworkOptions
from prunegym.experiments.deployment.finetune import check_fits, describe, finetune_network
from prunegym.experiments.deployment.origin import data_of, origin_of
from prunegym.experiments.setup import TRACED_EXAMPLES, build_task, network_source, seed_everything
from prunegym.pruning.deployment.export import check_formats, export_network
from prunegym.pruning.deployment.recipe import Blueprint, build_from, source_sizes
from prunegym.pruning.deployment.saving import read_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain
from prunegym.pruning.networks.zoo import input_shape_of
from prunegym.pruning.training import check_training

#: Images whose outputs are kept with a network, so that whoever loads it can compare.
_EXAMPLES = 16


@dataclass(frozen=True, kw_only=True)
class _Given:
    """The network that a command is about."""

    model: nn.Module
    blueprint: Blueprint
    name: str
    metadata: Mapping[str, Any]


def run_finetune(config: FinetuneConfig, reporter: Reporter) -> Result:
    """Fine-tune a network and save it."""
    seed_everything(config.seed)
    launch = Launch(config, reporter, _name(config), "finetune", "none")
    content = launch.finished()
    if content is None:
        given = _saved(config)
        origin = {} if config.run is None else origin_of(config.run)
        task = build_task(_data(config, origin))
        if given is None:
            given = _named(config, network_source(str(config.network), task.data), config.seed)
        check_fits(given.model, task)
        teacher = _teacher(config, given, origin) if config.distill else None
        settings, device = config.training_settings(config.seed), config.torch_device
        check_training(given.model, task, settings, teacher=teacher, device=device)
        run = launch.open()
        task.data.save_indices(run.path(SPLITS))
        result = finetune_network(
            given.model,
            task,
            settings,
            blueprint=given.blueprint,
            name=given.name,
            metadata=given.metadata,
            teacher=teacher,
            device=device,
            checkpoint_minutes=config.checkpoint_minutes,
            run=run,
            progress=reporter.progress,
            limit=reporter.limit,
        )
        result.save(run.folder)
        inputs, _ = next(iter(task.batches("calibration", batch_size=_EXAMPLES, limit=_EXAMPLES)))
        save_example(run.path(EXAMPLE), result.model, inputs)
        content = {"folder": str(run.folder), **plain(result.to_json())}
        run.write_json(RESULT, content)
    folder = content["folder"]
    own = config.allow_code or ":" in (config.network or "")
    deploy = f"prunegym export {folder} --format onnx{' --allow-code' if own else ''}"
    load = f"load it with {loading(folder, own)}, deploy it with: {deploy}"
    return Result(content, f"{describe(content)}\n\n{load}")


def run_export(config: ExportConfig, reporter: Reporter) -> Result:
    """Write a network in formats of deployment."""
    launch = Launch(config, reporter, _name(config), "export", "none")
    content = launch.finished()
    if content is None:
        check_formats(config.formats, config.dtype)
        given = _saved(config)
        if given is None:
            sizes = {name: getattr(config, name) for name in ("num_classes", "in_channels", "image_size")}
            given = _named(config, {"network": config.network, **sizes}, config.seed)
        inputs = example_of(config.run, given.blueprint.source, config.seed)
        _check_runs(given.model, inputs)
        run = launch.open()
        written = export_network(
            given.model,
            inputs,
            run.folder,
            config.formats,
            blueprint=given.blueprint,
            metadata=given.metadata,
            dtype=config.dtype,
        )
        content = {"folder": str(run.folder), "network": given.name, "dtype": config.dtype, "files": plain(written)}
        run.write_json(RESULT, content)
    return Result(content, describe_files(content["files"]))


def example_of(folder: Path | None, source: Mapping[str, Any], seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Inputs to check a network on: the example beside a saved network, else noise of the size its source tells.

    Raises:
        PruningError: There is neither, or the example is damaged.
    """
    path = None if folder is None else folder.expanduser() / EXAMPLE
    if path is not None and path.is_file():
        try:
            return (load_file(path)["inputs"],)
        except (SafetensorError, KeyError, OSError) as fault:
            raise PruningError(
                f"`folder` should hold an undamaged {EXAMPLE}, or none. Received '{path}' ({fault}). Delete it: noise "
                "will do."
            ) from fault
    name = source.get("network")
    if not isinstance(name, str):
        raise PruningError(
            "`example_inputs` should be given for a network whose input is not known. Received none. Give a tensor "
            "with a batch dimension, or a tuple of inputs."
        )
    sizes = source_sizes(source)
    shape = input_shape_of(name, sizes.get("in_channels"), sizes.get("image_size"))
    return (torch.randn(TRACED_EXAMPLES, *shape, generator=torch.Generator().manual_seed(seed)),)


def describe_files(files: Sequence[Mapping[str, Any]]) -> str:
    """What was exported, as of :class:`~prunegym.pruning.deployment.export.Exported`, for a terminal."""
    rows = [
        {
            "file": Path(one["path"]).name,
            "KiB": round(one["bytes"] / 1024),
            "batch": "any" if one["dynamic_batch"] else "fixed",
            "largest difference": one["difference"],
            "from float32": one["from_float32"],
        }
        for one in files
    ]
    lines = [format_table(rows), ""]
    for one in files:
        lines += [f"{one['format']}: {one['load']}", *([one["warning"]] if one["warning"] else [])]
    return "\n".join(lines)


def _name(config: SavedNetworkOptions) -> str:
    """What a network is called in the name of a run folder."""
    return config.network or (config.run or Path()).resolve().name


def _saved(config: SavedNetworkOptions) -> _Given | None:
    """Read the saved network, if it is one."""
    if config.run is None:
        return None
    saved = read_network(config.run.expanduser(), allow_code=config.allow_code)
    name = str(saved.metadata.get("network") or saved.blueprint.source.get("network"))
    return _Given(model=saved.model, blueprint=saved.blueprint, name=name, metadata=saved.metadata)


def _named(config: SavedNetworkOptions, source: Mapping[str, Any], seed: int) -> _Given:
    """Build the network of a name."""
    known = {key: value for key, value in source.items() if value is not None}
    name, model = str(config.network), build_from(known, weights=config.weights, seed=seed)
    return _Given(model=model, blueprint=Blueprint.of_unpruned(model, known), name=name, metadata={"network": name})


def _data(config: FinetuneConfig, origin: Mapping[str, Any]) -> DataOptions:
    """The data to fine-tune on."""
    if config.run is None and not config.data:
        origin = {"data": DataOptions().data}
    asked = {one.name: getattr(config, one.name) for one in fields(DataOptions)}
    return data_of(DataOptions(**asked), origin)


def _teacher(config: FinetuneConfig, given: _Given, origin: Mapping[str, Any]) -> nn.Module:
    """The unpruned network with the weights that are to be imitated.

    Raises:
        PruningError: There are none.
    """
    weights = config.teacher or origin.get("weights")
    if weights is None:
        raise PruningError(
            "`--teacher` should be given where the saved network's folder does not say which weights it was pruned "
            "with. Received none. Give the weights of the unpruned network."
        )
    return build_from(given.blueprint.source, weights=weights)


def _check_runs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    """Refuse a network that does not run on its example."""
    try:
        with torch.no_grad():
            model.eval()(*inputs)
    except Exception as fault:  # whatever a network may raise
        raise PruningError(
            f"`--image-size` and `--in-channels` should be those of the network. Received images of shape "
            f"{tuple(inputs[0].shape[1:])}, on which the network raised {type(fault).__name__}: {fault}. Correct them."
        ) from fault
