"""Pruned networks on disk, without pickle: tensors, and the recipe that rebuilds the network around them.

A pruned network keeps the class of the unpruned one, so a saved network is the tensors at their new shapes
plus the few attributes that surgery changes. Loading builds the unpruned network, puts the tensors in place
and sets the attributes; nothing is traced and no code from the files runs.
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunegym.pruning.attention import HeadwiseAttention, can_be_headwise, make_headwise
from prunegym.pruning.blocks import in_any, remove_blocks
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain, read_json, replacing
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.onnx_export import export_onnx
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import kept_indices, refresh_sizes
from prunegym.pruning.zoo import build_network

__all__ = ["export_onnx", "load_network", "read_recipe", "save_network"]

FORMAT = 2
WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"

#: What the recipe may hold, with the type of each.
_FIELDS: Mapping[str, type] = {
    "source": dict,
    "plan": dict,
    "attributes": dict,
    "modules": dict,
    "unpruned_shapes": dict,
    "shapes": dict,
    "aliases": dict,
    "channels_last": list,
    "sha256": str,
    "metadata": dict,
}
#: Arguments of `build_network` that decide the shapes of a network.
_SOURCE_KEYS = ("network", "num_classes", "in_channels", "image_size")
#: Attributes of any network that surgery changes, and one that torchvision switches on with its published weights
#: only. Besides these, a recipe may only lower whole numbers that are there: sizes that follow the channels.
_ATTRIBUTES = ("channel_padding", "transform_input")
#: What a recipe may turn a module into.
_HEADWISE, _REMOVED = "headwise", "removed"
#: Largest difference between a network and its saved self, as a share of the largest output; on a CPU it is
#: zero.
_CHECK_TOLERANCE = 1e-4
_SHOWN = 3


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
    """Write a pruned network as ``model.safetensors`` and ``recipe.json``.

    Each file takes its name in one step. Should the machine stop between the two, :func:`load_network`
    refuses the pair.

    Args:
        folder: where the two files belong; made if need be.
        network: the unpruned network.
        plan: the plan that was carried out.
        model: the pruned network, as from ``network.pruned(plan)``, fine-tuned or not.
        source: how to build the unpruned network: ``network``, ``num_classes``, ``in_channels`` and
            ``image_size`` of :func:`~prunegym.pruning.zoo.build_network`; ``{"constructor": None}`` if the
            reader has to bring it.
        metadata: anything worth knowing about the network (accuracies, cost), in what JSON holds.
        check: rebuild the network from what is to be written and compare outputs on the example inputs.

    Raises:
        PruningError: model and plan do not belong together, the tensors are not finite, ``source`` builds
            another network, or the folder cannot be written.
    """
    _check_shapes(network, plan, model)
    tensors, aliases, channels_last = _contents(model)
    _check_finite(tensors, network.model, "model")
    data = serialise_tensors(tensors, {"format": "pt"})
    recipe: dict[str, Any] = {
        "format": FORMAT,
        "source": dict(source),
        "plan": plan.to_json(),
        "attributes": _changed_attributes(network, model),
        "modules": _changed_modules(model, plan),
        "unpruned_shapes": {name: list(tensor.shape) for name, tensor in _named_tensors(network.model)},
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "aliases": aliases,
        "channels_last": channels_last,
        "sha256": hashlib.sha256(data).hexdigest(),
        "versions": {"prunegym": distributions.version("prunegym"), "torch": str(torch.__version__)},
        "metadata": dict(metadata),
    }
    text = json.dumps(plain(recipe), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    if check:
        original = network.model if source.get("network") is None else _original(source, allow_code=True)
        restored = _restored(copy.deepcopy(original), parse_tensors(data), json.loads(text))
        _check_outputs(model, restored, network.example_inputs)
    # left in reverse order: the recipe, which names the other file's hash, is put in place last
    with (
        replacing(folder / RECIPE, argument="folder") as recipe_file,
        replacing(folder / WEIGHTS, argument="folder") as weights_file,
    ):
        weights_file.write_bytes(data)
        recipe_file.write_text(text, encoding="utf-8")


def load_network(folder: Path, *, model: nn.Module | None = None, allow_code: bool = False) -> nn.Module:
    """Rebuild a network that :func:`save_network` wrote.

    Args:
        folder: holds ``model.safetensors`` and ``recipe.json``.
        model: the unpruned network, with any weights; it is not changed. None: built as the recipe says.
        allow_code: let a recipe that names ``path/file.py:function`` run that file. Leave it at False for
            folders from others.

    Returns:
        The pruned network in eval mode, on the CPU.

    Raises:
        PruningError: a file is missing, damaged or of another format version, the tensors are not finite, or
            the unpruned network is not the one that was pruned.
    """
    recipe = read_recipe(folder)
    path = folder / WEIGHTS
    try:
        data = path.read_bytes()
    except OSError as fault:
        raise PruningError(
            f"`folder` should hold {WEIGHTS} beside {RECIPE}. Received '{folder}' ({fault.strerror}). "
            "Copy both files of the saved network."
        ) from fault
    if hashlib.sha256(data).hexdigest() != recipe["sha256"]:
        raise PruningError(
            f"`folder` should hold two files that were written together. Received '{path}', whose SHA-256 "
            f"is not the one in {RECIPE}: one of them is damaged or from another save. Save or copy the "
            "network again."
        )
    try:
        tensors = parse_tensors(data)
    except SafetensorError as fault:
        raise PruningError(
            f"`folder` should hold an undamaged {WEIGHTS}. Received '{path}': {fault}. Save the network "
            "again."
        ) from fault
    original = _original(recipe["source"], allow_code) if model is None else copy.deepcopy(model).cpu()
    return _restored(original, tensors, recipe).eval()


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe of a saved network.

    Returns:
        ``plan`` (for ``PruningPlan.from_json``), ``source``, ``metadata`` and what loading needs.

    Raises:
        PruningError: missing, damaged, or of another format version.
    """
    path = folder / RECIPE
    recipe = read_json(path, argument="folder")
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        found = recipe.get("format") if isinstance(recipe, dict) else None
        raise PruningError(
            f"`folder` should hold a network saved in format {FORMAT}. Received '{path}' with format "
            f"{found!r}. Save it with this version of prunegym, or install the version named in the file."
        )
    for key, kind in _FIELDS.items():
        if not isinstance(recipe.get(key), kind):
            raise PruningError(
                f"`folder` should hold a complete recipe. Received '{path}', where `{key}` is "
                f"{'missing' if key not in recipe else f'not a {kind.__name__}'}. Save the network again."
            )
    return recipe


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have.

    Not ``state_dict``, which leaves out buffers that are not persistent: surgery shrinks those too.
    """
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _contents(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Tensors by first name, first names of tied ones by further name, and names of those channels last."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    channels_last: list[str] = []
    first_name: dict[int, str] = {}
    for name, tensor in _named_tensors(model):
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
    return (
        tensor.ndim == 4
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=torch.channels_last)
    )


def _check_shapes(network: PrunableNetwork, plan: PruningPlan, model: nn.Module) -> None:
    """Refuse a model that is not what the plan makes of the network."""
    wanted = {name: list(tensor.shape) for name, tensor in network.model.named_parameters()}
    wanted |= {name: list(tensor.shape) for name, tensor in network.model.named_buffers()}
    for (name, dim), indices in kept_indices(network.graph, plan.mask(network.graph)).items():
        wanted[name][dim] = len(indices)
    wanted = {name: shape for name, shape in wanted.items() if not in_any(name, plan.removed)}
    found = {name: list(tensor.shape) for name, tensor in _named_tensors(model)}
    whole = {name for name, _ in _named_tensors(network.model) if not in_any(name, plan.removed)}
    for name in sorted(wanted.keys() | whole | found.keys()):
        # tied tensors are sliced once, under their first name
        expected = wanted.get(name, found.get(name))
        if name not in found or expected != found[name]:
            raise PruningError(
                f"`model` should be what `plan` makes of `network`. Received {name} of shape "
                f"{found.get(name)} where the plan leaves {expected}. Give network.pruned(plan), fine-tuned "
                "or not, and that plan."
            )


def _changed_attributes(network: PrunableNetwork, model: nn.Module) -> dict[str, dict[str, Any]]:
    """What surgery set besides tensors, by module path."""
    modules = dict(model.named_modules())
    pairs = [(one.module, "channel_padding") for one in network.graph.paddings]
    pairs += [(one.place.module, one.place.name) for one in network.graph.size_rules]
    pairs += [(path, "transform_input") for path in modules]
    changed: dict[str, dict[str, Any]] = {}
    for path, name in dict.fromkeys(pairs):
        value = getattr(modules.get(path), name, None)
        if value is not None:
            changed.setdefault(path, {})[name] = plain(value)
    return changed


def _changed_modules(model: nn.Module, plan: PruningPlan) -> dict[str, str]:
    """Modules whose class surgery changed."""
    found = {name: _HEADWISE for name, one in model.named_modules() if type(one) is HeadwiseAttention}
    return {**found, **dict.fromkeys(plan.removed, _REMOVED)}


def _change_modules(model: nn.Module, changes: Mapping[str, Any]) -> None:
    """Do to the modules of an unpruned network what surgery did."""
    modules = dict(model.named_modules())
    for path, change in changes.items():
        known = path in modules and (change == _REMOVED or (change == _HEADWISE and can_be_headwise(modules[path])))
        if not known:
            raise _misfit(f"a recipe that makes module '{path}' {change!r}", "Save the network again.")
        if change == _HEADWISE:
            make_headwise(modules[path])
    remove_blocks(model, [path for path, change in changes.items() if change == _REMOVED])


def _original(source: Mapping[str, Any], allow_code: bool) -> nn.Module:
    """Build the unpruned network, with weights that will be overwritten."""
    name = source.get("network")
    if not isinstance(name, str):
        raise PruningError(
            "`model` should be given for a network that was saved without a name to build it by. Received "
            "None. Pass the unpruned network: load_network(folder, model=...)."
        )
    if ":" in name and not allow_code:
        raise PruningError(
            f"`model` should be given where the recipe names a Python file. Received None and '{name}'. "
            "Pass the unpruned network, or allow_code=True if you trust that file."
        )
    arguments = {key: source[key] for key in _SOURCE_KEYS[1:] if source.get(key) is not None}
    if not all(isinstance(value, int) for value in arguments.values()):
        raise PruningError(
            f"`source` should give {', '.join(_SOURCE_KEYS[1:])} as whole numbers. Received {arguments}. "
            "Save the network again."
        )
    return build_network(name, **arguments)


def _restored(model: nn.Module, tensors: Mapping[str, Tensor], recipe: Mapping[str, Any]) -> nn.Module:
    """Put the saved tensors and attributes into ``model``, which is changed and returned."""
    _change_modules(model, recipe["modules"])
    removed = [path for path, change in recipe["modules"].items() if change == _REMOVED]
    unpruned = {name: shape for name, shape in recipe["unpruned_shapes"].items() if not in_any(name, removed)}
    known = dict(_named_tensors(model))
    aliases: dict[str, str] = recipe["aliases"]
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if shapes != recipe["shapes"]:
        raise _misfit(f"{WEIGHTS} with other tensors than {RECIPE} lists", "Save or copy both files again.")
    odd = sorted(known.keys() ^ {*tensors, *aliases, *unpruned})
    odd += [name for name, first in aliases.items() if not isinstance(first, str) or first not in tensors]
    # buffers that a network makes anew for each size of input may have another shape before it has run
    fixed = {name for name, tensor in known.items() if isinstance(tensor, nn.Parameter) or name in model.state_dict()}
    odd += [name for name in known if name in fixed and list(known[name].shape) != unpruned.get(name)]
    odd += [name for name in tensors if not odd and name in fixed and not _fits(tensors[name], known[name])]
    if odd:
        names = ", ".join(odd[:_SHOWN]) + (f" and {len(odd) - _SHOWN} more" if len(odd) > _SHOWN else "")
        raise _misfit(f"a network that differs in {names}", "Give the network that was pruned, unpruned.")
    _check_finite(tensors, model, "folder")
    new: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layout = torch.channels_last if name in recipe["channels_last"] else torch.contiguous_format
        tensor = tensor.contiguous(memory_format=layout)
        old = known[name]
        new[name] = (
            nn.Parameter(tensor, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        )
    for name in known:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, new[aliases.get(name, name)])
    _set_attributes(model, recipe["attributes"])
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


def _misfit(received: str, remedy: str) -> PruningError:
    return PruningError(
        f"`folder` should hold tensors that fit the unpruned network. Received {received}. {remedy}"
    )


def _set_attributes(model: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Set what surgery set besides tensors; nothing that was not there before, and numbers only."""
    modules = dict(model.named_modules())
    for path, values in attributes.items():
        for name, value in values.items() if isinstance(values, dict) else [("", None)]:
            before = getattr(modules.get(path), name, None)
            if not _may_become(name, before, value):
                raise _misfit(
                    f"a recipe that sets `{name}` of module '{path}' to {value!r}", "Save the network again."
                )
            setattr(modules[path], name, tuple(value or ()) if isinstance(before, tuple) else value)


def _may_become(name: str, before: Any, value: Any) -> bool:
    """Whether surgery may have turned an attribute into this."""
    if before is None:
        return False
    several = isinstance(value, list)
    if several != isinstance(before, list | tuple):
        return False
    pairs = list(zip(before, value, strict=False)) if several else [(before, value)]
    if several and len(before) != len(value):
        return False
    if name in _ATTRIBUTES:
        return all(isinstance(new, int) and new >= 0 for _, new in pairs)
    # a list may hold other things beside the number that changed
    return all(new == old or (type(old) is int and type(new) is int and 0 < new < old) for old, new in pairs)


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


def _check_outputs(model: nn.Module, restored: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Compare a network with what would be loaded from its files."""
    inputs = tree_map_only(Tensor, Tensor.cpu, inputs)
    with torch.no_grad():
        pairs = [tree_leaves(one.eval()(*inputs)) for one in (copy.deepcopy(model).cpu(), restored.cpu())]
    for mine, theirs in zip(*pairs, strict=True):
        if not isinstance(mine, Tensor):
            continue
        scale = float(mine.abs().max()) if mine.numel() else 0.0
        if not torch.allclose(mine, theirs, rtol=0.0, atol=_CHECK_TOLERANCE * scale, equal_nan=True):
            raise PruningError(
                "`source` should build the network that was pruned. Received one whose outputs differ after "
                f"its tensors were replaced, by up to {float((mine - theirs).abs().max()):.2g} of "
                f"{scale:.2g}. Correct its arguments, or save with source={{'constructor': None}} and bring "
                "the network when loading."
            )
