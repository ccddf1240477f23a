"""How a saved network is built again around its tensors: what the recipe beside them holds, and carrying it out.

A pruned network keeps the class of the unpruned one, so what surgery did is told by the shapes of the tensors and by a
few attributes and modules. A recipe may come from anywhere: it can only do to a network what surgery does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunegym.pruning.attention import HeadwiseAttention, can_be_headwise, make_headwise
from prunegym.pruning.blocks import in_any, remove_blocks
from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain, read_json
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import kept_indices

FORMAT = 2
WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"
#: The source of a network that the reader has to bring.
NO_SOURCE: Mapping[str, Any] = {"constructor": None}

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


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """Everything that rebuilds a network except its tensors."""

    source: Mapping[str, Any]
    """How to build the unpruned network; ``{"constructor": None}`` if the reader has to bring it."""
    plan: Mapping[str, Any]
    """The plan in what JSON holds; of a network that was not pruned, one without groups."""
    attributes: Mapping[str, Any]
    """Attributes that surgery set, by module path."""
    modules: Mapping[str, Any]
    """Modules that surgery changed or emptied."""
    unpruned_shapes: Mapping[str, list[int]]
    """Shapes of the unpruned network's tensors."""
    template: nn.Module | None = None
    """The unpruned network, with any weights; None: it is built from the source."""

    @classmethod
    def of_pruned(
        cls, network: PrunableNetwork, plan: PruningPlan, model: nn.Module, source: Mapping[str, Any]
    ) -> Blueprint:
        """The blueprint of a network that was pruned.

        Raises:
            PruningError: ``model`` is not what ``plan`` makes of ``network``.
        """
        _check_shapes(network, plan, model)
        return cls(
            source=source,
            plan=plan.to_json(),
            attributes=_changed_attributes(network, model),
            modules=_changed_modules(model, plan),
            unpruned_shapes={name: list(tensor.shape) for name, tensor in named_tensors(network.model)},
            template=network.model if source.get("network") is None else None,
        )

    @classmethod
    def of_unpruned(cls, model: nn.Module, source: Mapping[str, Any]) -> Blueprint:
        """The blueprint of a network as it is."""
        switched = {path: one for path, one in model.named_modules() if hasattr(one, "transform_input")}
        return cls(
            source=source,
            plan=PruningPlan(()).to_json(),
            attributes={path: {"transform_input": plain(one.transform_input)} for path, one in switched.items()},
            modules={},
            unpruned_shapes={name: list(tensor.shape) for name, tensor in named_tensors(model)},
            template=model if source.get("network") is None else None,
        )

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any], template: nn.Module | None) -> Blueprint:
        """The blueprint in a recipe, with the unpruned network where the reader brought it."""
        names = ("source", "plan", "attributes", "modules", "unpruned_shapes")
        return cls(**{name: recipe[name] for name in names}, template=template)

    def build(self) -> nn.Module:
        """A new unpruned network, with any weights."""
        return original_network(self.source, allow_code=True) if self.template is None else duplicate(self.template)


def read_recipe(folder: Path) -> dict[str, Any]:
    """Read the recipe of a saved network.

    Returns:
        ``plan`` (for ``PruningPlan.from_json``), ``source``, ``metadata`` and what loading needs.

    Raises:
        PruningError: missing, damaged, or of another format version.
    """
    path = folder / RECIPE
    if not path.is_file():
        fault = f"which has no {RECIPE}" if folder.is_dir() else "which is no folder"
        raise PruningError(
            f"`folder` should hold a saved network, {RECIPE} beside {WEIGHTS}. Received '{folder}', {fault}. Give the "
            "run folder of `prunegym prune` or `prunegym finetune`, or what prunegym.save wrote."
        )
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


def original_network(source: Mapping[str, Any], allow_code: bool) -> nn.Module:
    """Build the unpruned network of a source, with weights that will be overwritten.

    Raises:
        PruningError: The source names nothing, a file that may not be run, or odd sizes.
    """
    name = source.get("network")
    if not isinstance(name, str):
        raise PruningError(
            "`model` should be given for a network that was saved without a name to build it by. Received "
            "None. Pass the unpruned network: load_network(folder, model=...)."
        )
    if ":" in name and not allow_code:
        raise PruningError(
            f"`model` should be given where the recipe names a Python file. Received None and '{name}'. "
            "Pass the unpruned network, or allow_code=True (--allow-code) if you trust that file."
        )
    return build_from(source)


def build_from(source: Mapping[str, Any], *, weights: str | None = None, seed: int = 0) -> nn.Module:
    """Build the unpruned network of a source that names one.

    Raises:
        PruningError: The sizes are odd, or the weights do not fit.
    """
    sizes = source_sizes(source)
    return build_network(
        source["network"],
        num_classes=sizes.get("num_classes"),
        in_channels=sizes.get("in_channels"),
        image_size=sizes.get("image_size"),
        weights=weights,
        seed=seed,
    )


def source_sizes(source: Mapping[str, Any]) -> dict[str, int]:
    """What a source says about the sizes of its network.

    Raises:
        PruningError: It is no whole number.
    """
    sizes = {key: source[key] for key in _SOURCE_KEYS[1:] if source.get(key) is not None}
    if not all(isinstance(value, int) for value in sizes.values()):
        raise PruningError(
            f"`source` should give {', '.join(_SOURCE_KEYS[1:])} as whole numbers. Received {sizes}. "
            "Save the network again."
        )
    return sizes


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under every name they have.

    Not ``state_dict``, which leaves out buffers that are not persistent: surgery shrinks those too.
    """
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def removed_paths(modules: Mapping[str, Any]) -> list[str]:
    """Paths of the blocks that a recipe empties."""
    return [path for path, change in modules.items() if change == _REMOVED]


def change_modules(model: nn.Module, changes: Mapping[str, Any]) -> None:
    """Do to the modules of an unpruned network what surgery did."""
    modules = dict(model.named_modules())
    for path, change in changes.items():
        known = path in modules and (change == _REMOVED or (change == _HEADWISE and can_be_headwise(modules[path])))
        if not known:
            raise misfit(f"a recipe that makes module '{path}' {change!r}", "Save the network again.")
        if change == _HEADWISE:
            make_headwise(modules[path])
    remove_blocks(model, removed_paths(changes))


def set_attributes(model: nn.Module, attributes: Mapping[str, Any]) -> None:
    """Set what surgery set besides tensors; nothing that was not there before, and numbers only."""
    modules = dict(model.named_modules())
    for path, values in attributes.items():
        for name, value in values.items() if isinstance(values, dict) else [("", None)]:
            before = getattr(modules.get(path), name, None)
            if not _may_become(name, before, value):
                raise misfit(f"a recipe that sets `{name}` of module '{path}' to {value!r}", "Save the network again.")
            setattr(modules[path], name, tuple(value or ()) if isinstance(before, tuple) else value)


def misfit(received: str, remedy: str) -> PruningError:
    """Describe a folder whose parts do not belong together."""
    return PruningError(f"`folder` should hold tensors that fit the unpruned network. Received {received}. {remedy}")


def _check_shapes(network: PrunableNetwork, plan: PruningPlan, model: nn.Module) -> None:
    """Refuse a model that is not what the plan makes of the network."""
    wanted = {name: list(tensor.shape) for name, tensor in network.model.named_parameters()}
    wanted |= {name: list(tensor.shape) for name, tensor in network.model.named_buffers()}
    for (name, dim), indices in kept_indices(network.graph, plan.mask(network.graph)).items():
        wanted[name][dim] = len(indices)
    wanted = {name: shape for name, shape in wanted.items() if not in_any(name, plan.removed)}
    found = {name: list(tensor.shape) for name, tensor in named_tensors(model)}
    whole = {name for name, _ in named_tensors(network.model) if not in_any(name, plan.removed)}
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
