"""Networks of the timm library by name: ``timm/resnet18``, ``timm/levit_128s``, ..."""

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from prunegym.pruning.errors import PruningError, unknown_name

PREFIX = "timm/"


def is_timm(name: str) -> bool:
    """Whether a network's name is one of timm's."""
    return name.startswith(PREFIX)


def timm_input_shape(name: str) -> tuple[int, int, int]:
    """Input ``(channels, height, width)`` that a network is made for.

    Raises:
        PruningError: timm is not installed, or has no such network.
    """
    channels, height, width = _settings(name)["input_size"]
    return int(channels), int(height), int(width)


def timm_network(
    name: str,
    weights: str | Path | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Make one of timm's networks.

    Args:
        name: ``timm/`` and a name that timm knows, with a tag of weights or without.
        weights: ``default`` for timm's own (fetched on first use); anything else is left to the caller.
        num_classes: outputs. None: the network's own.
        in_channels: input channels. None: the network's own.
        image_size: side of the images, pixels; wanted by networks with position embeddings only.

    Raises:
        PruningError: timm is not installed or has no such network, or the network cannot be built as asked.
    """
    timm = _library()
    settings = _settings(name)
    arguments: dict[str, Any] = {}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if in_channels is not None:
        arguments["in_chans"] = in_channels
    if image_size is not None and settings.get("fixed_input_size"):
        arguments["img_size"] = image_size
    try:
        network: nn.Module = timm.create_model(
            name.removeprefix(PREFIX), pretrained=str(weights).lower() == "default", **arguments
        )
    # OSError: the download failed; the others: sizes that the design or its weights exclude
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError) as fault:
        raise PruningError(
            f"`--network` should be a network that can be built as asked. Received '{name}' with "
            f"{', '.join(f'{key}={value}' for key, value in arguments.items()) or 'its own sizes'}: {fault}. "
            "Change the sizes, or give weights that are on disk."
        ) from fault
    return network


def _library() -> ModuleType:
    try:
        import timm
    except ImportError as fault:
        raise PruningError(
            "`--network` should be a network of a library that is installed. Received one of timm. "
            "Install it: pip install 'prunegym[timm]'."
        ) from fault
    return timm


def _settings(name: str) -> dict[str, Any]:
    """What timm notes about a network: input size and the like."""
    timm = _library()
    plain = name.removeprefix(PREFIX)
    if not timm.is_model(plain):
        known = [PREFIX + one for one in timm.list_models()]
        raise unknown_name("--network", name, known, "It should be a name that timm.list_models() gives.")
    found = timm.get_pretrained_cfg(plain)
    return {"input_size": (3, 224, 224)} if found is None else found.to_dict()
