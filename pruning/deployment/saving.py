"""Networks on disk, without pickle: tensors, and the recipe that rebuilds the network around them.

Loading builds the unpruned network, puts the tensors in place and sets what surgery changed; nothing is traced and no
code from the files runs. A network that was not pruned is saved in the same format.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.blocks import in_any
from prunegym.pruning.copies import duplicate
from prunegym.pruning.deployment.recipe import (
    FORMAT,
    RECIPE,
    WEIGHTS,
    Blueprint,
    change_modules,
    misfit,
    named_tensors,
    original_network,
    read_recipe,
    removed_paths,
    set_attributes,
)
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain, replacing
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import refresh_sizes

__all__ = ["SavedNetwork", "load_network", "read_network", "read_recipe", "save_network", "write_network"]

#: Largest difference between a network and its saved self, as a share of the largest output; on a CPU it is
#: zero.
_CHECK_TOLERANCE = 1e-4
_HALF = (torch.float16, torch.bfloat16)
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class SavedNetwork:
    """A network that was read from its folder."""

    model: nn.Module
    """The network in evaluation mode, on the CPU."""
    blueprint: Blueprint
    """What it is rebuilt by, for :func:`write_network`."""
    metadata: Mapping[str, Any]
    """What its writer found worth knowing."""


def save_network(
    folder: Path,
    network: PrunableNetwork,
    plan: PruningPlan,
    model: nn.Module,
    *,
    source: Mapping[str, Any],
    metadata: Mapping[str, Any],
    check: bool = True,
) -> None:
    """Write a pruned network, see :func:`write_network`.

    Args:
        folder: where the two files belong; made if need be.
        network: the unpruned network.
        plan: the plan that was carried out.
        model: the pruned network, as from ``network.pruned(plan)``, fine-tuned or not.
        source: how to build the unpruned network: ``network``, ``num_classes``, ``in_channels`` and
            ``image_size`` of :func:`~prunegym.pruning.networks.zoo.build_network`; ``{"constructor": None}`` if the
            reader has to bring it.
        metadata: anything worth knowing about the network (accuracies, cost), in what JSON holds.
        check: rebuild the network from what is to be written and compare outputs on the example inputs.

    Raises:
        PruningError: model and plan do not belong together, the tensors are not finite, ``source`` builds
            another network, or the folder cannot be written.
    """
    blueprint = Blueprint.of_pruned(network, plan, model, source)
    inputs = network.example_inputs if check else None
    write_network(folder, blueprint, model, example_inputs=inputs, metadata=metadata)


def write_network(
    folder: Path,
    blueprint: Blueprint,
    model: nn.Module,
    *,
    example_inputs: tuple[Any, ...] | None,
    metadata: Mapping[str, Any],
) -> float:
    """Write a network as ``model.safetensors`` and ``recipe.json``.

    Each file takes its name in one step. Should the machine stop between the two, :func:`load_network`
    refuses the pair.

    Args:
        folder: where the two files belong; made if need be.
        blueprint: what rebuilds it.
        model: the network.
        example_inputs: the network is rebuilt from what is to be written, and outputs are compared on these; None
            leaves that out.
        metadata: anything worth knowing about the network (accuracies, cost), in what JSON holds.

    Returns:
        Largest absolute difference between the outputs, NaN where they were not compared or are no numbers.

    Raises:
        PruningError: the tensors are not finite, the source builds another network, or the folder cannot be written.
    """
    tensors, aliases, channels_last = _contents(model)
    original = blueprint.build().cpu()
    _check_finite(tensors, original, "model")
    data = serialise_tensors(tensors, {"format": "pt"})
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "source": dict(blueprint.source),
        "plan": blueprint.plan,
        "attributes": blueprint.attributes,
        "modules": blueprint.modules,
        "unpruned_shapes": blueprint.unpruned_shapes,
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "aliases": aliases,
        "channels_last": channels_last,
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": {"prunegym": distributions.version("prunegym"), "torch": str(torch.__version__)},
        "metadata": dict(metadata),
    }
    text = json.dumps(plain(recipe), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    difference = float("nan")
    if example_inputs is not None:
        restored = _restored(original, parse_tensors(data), json.loads(text))
        difference = _check_outputs(model, restored, example_inputs)
    # left in reverse order: the recipe, which names the other file's hash, is put in place last
    with (
        replacing(folder / RECIPE, argument="folder") as recipe_file,
        replacing(folder / WEIGHTS, argument="folder") as weights_file,
    ):
        weights_file.write_bytes(data)
        recipe_file.write_text(text, encoding="utf-8")
    return difference


def load_network(folder: Path, *, model: nn.Module | None = None, allow_code: bool = False) -> nn.Module:
    """Rebuild a network that was written by :func:`write_network`; see :func:`read_network`."""
    return read_network(folder, model=model, allow_code=allow_code).model


def read_network(folder: Path, *, model: nn.Module | None = None, allow_code: bool = False) -> SavedNetwork:
    """Rebuild a network that was written by :func:`write_network`, with what is known of it.

    Args:
        folder: holds ``model.safetensors`` and ``recipe.json``.
        model: the unpruned network, with any weights; it is not changed. None: built as the recipe says.
        allow_code: let a recipe that names ``path/file.py:function`` run that file. Leave it at False for
            folders from others.

    Raises:
        PruningError: a file is missing, damaged or of another format version, the tensors are not finite, or
            the unpruned network is not the one that was pruned.
    """
    recipe = read_recipe(folder)
    tensors = _read_tensors(folder / WEIGHTS, recipe["sha256"])
    original = original_network(recipe["source"], allow_code) if model is None else duplicate(model).cpu()
    restored = _restored(original, tensors, recipe).eval()
    return SavedNetwork(model=restored, blueprint=Blueprint.of_recipe(recipe, model), metadata=recipe["metadata"])


def _inputs_for(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs on the CPU, in half precision for a network of half precision."""
    kinds = {one.dtype for one in model.parameters() if one.dtype in _HALF}

    def converted(tensor: Tensor) -> Tensor:
        tensor = tensor.cpu()
        return tensor.to(next(iter(kinds))) if kinds and tensor.is_floating_point() else tensor

    prepared: tuple[Any, ...] = tree_map_only(Tensor, converted, inputs)
    return prepared


def _read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """Read the file of tensors that belongs to a recipe."""
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise PruningError(
            f"`folder` should hold {WEIGHTS} beside {RECIPE}. Received '{path.parent}' ({fault.strerror}). "
            "Copy both files of the saved network."
        ) from fault
    if hashlib.sha256(data).hexdigest() != digest:
        raise PruningError(
            f"`folder` should hold two files that were written together. Received '{path}', whose SHA-256 "
            f"is not the one in {RECIPE}: one of them is damaged or from another save. Save or copy the "
            "network again."
        )
    try:
        return parse_tensors(data)
    except SafetensorError as fault:
        raise PruningError(
            f"`folder` should hold an undamaged {WEIGHTS}. Received '{path}': {fault}. Save the network again."
        ) from fault


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Tensors by first name, first names of tied ones by further name, and names of those channels last."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    channels_last: list[str] = []
    first_name: dict[int, str] = {}
    for name, tensor in named_tensors(model):
        known = first_name.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
            continue
        if _is_channels_last(tensor):
            channels_last.append(name)
        # cloned, because safetensors refuses tensors that share memory
        tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tensors, aliases, channels_last


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the layout is one that selects other kernels, whose sums round otherwise."""
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _restored(model: nn.Module, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> nn.Module:
    """Put the saved tensors and attributes into ``model``, which is changed and returned."""
    change_modules(model, recipe["modules"])
    removed = removed_paths(recipe["modules"])
    unpruned = {name: shape for name, shape in recipe["unpruned_shapes"].items() if not in_any(name, removed)}
    known = dict(named_tensors(model))
    aliases: dict[str, str] = recipe["aliases"]
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != recipe["shapes"]:
        raise misfit(f"{WEIGHTS} with other tensors than {RECIPE} lists", "Save or copy both files again.")
    odd = sorted(known.keys() ^ {*tensors, *aliases, *unpruned})
    odd += [name for name, first in aliases.items() if not isinstance(first, str) or first not in tensors]
    # buffers that a network makes anew for each size of input may have another shape before it has run
    fixed = {name for name, tensor in known.items() if isinstance(tensor, nn.Parameter) or name in model.state_dict()}
    odd += [name for name in known if name in fixed and list(known[name].shape) != unpruned.get(name)]
    odd += [name for name in tensors if not odd and name in fixed and not _fits(tensors[name], known[name])]
    if odd:
        names = ", ".join(odd[:_SHOWN]) + (f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else "")
        raise misfit(f"a network that differs in {names}", "Give the network as it was before it was pruned.")
    _check_finite(tensors, model, "folder")
    new: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layout = torch.channels_last if name in recipe["channels_last"] else torch.contiguous_format
        tensor = tensor.contiguous(memory_format=layout)
        old = known[name]
        new[name] = nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
    for name in known:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new[aliases.get(name, name)])
    set_attributes(model, recipe["attributes"])
    for module in model.modules():
        refresh_sizes(module)
    return model


def _fits(tensor: Tensor, unpruned: Tensor) -> bool:
    """Whether a tensor can be what pruning left of another."""
    return (
        tensor.ndim == unpruned.ndim
        and tensor.is_floating_point() == unpruned.is_floating_point()
        and all(0 < new <= old or new == old for new, old in zip(tensor.shape, unpruned.shape, strict=True))
    )


def _check_finite(tensors: Mapping[str, Tensor], unpruned: nn.Module, argument: str) -> None:
    """Refuse NaN and infinity, except in buffers that hold them by design (attention masks)."""
    buffers = dict(unpruned.named_buffers())
    for name, tensor in tensors.items():
        by_design = name in buffers and not bool(torch.isfinite(buffers[name]).all())
        if not by_design and not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise PruningError(
                f"`{argument}` should hold finite tensors. Received {count} NaN or infinite values in "
                f"'{name}'. Fine-tune again with a lower learning rate, or use an earlier checkpoint."
            )


def _check_outputs(model: nn.Module, restored: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Compare a network with what would be loaded from its files; return the largest difference."""
    inputs = _inputs_for(model, inputs)
    with torch.no_grad():
        pairs = [one.eval()(*inputs) for one in (duplicate(model).cpu(), restored.cpu())]
    gap = gap_between(*pairs)
    if not gap.relative <= _CHECK_TOLERANCE:
        raise PruningError(
            f"`source` should build the network that was pruned. Received one with {gap} after its tensors were "
            "replaced. Correct its arguments, or save with source={'constructor': None} and bring the network when "
            "loading."
        )
    return gap.absolute if gap.numbers else float("nan")
