"""Networks by name: ours for digits and CIFAR, all of torchvision's and timm's, and functions in a user's file."""

import hashlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchvision.models
from torch import nn

from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.networks.cifar import CIFAR_NETWORKS
from prunegym.pruning.networks.digits import DIGITS_NETWORKS
from prunegym.pruning.networks.timm_networks import is_timm, timm_input_shape, timm_network
from prunegym.pruning.networks.user_code import USER_MODULES
from prunegym.pruning.networks.weights import load_weights

__all__ = ["build_network", "input_shape_of", "load_weights", "network_names"]

_OWN_NETWORKS = {**DIGITS_NETWORKS, **CIFAR_NETWORKS}
_OWN_CLASSES = 10
_IMAGENET_CLASSES = 1000
SIZES = ("num_classes", "in_channels", "image_size")
#: Arguments of single torchvision networks: the auxiliary heads only help the first training, and the slow
#: initialisation that goes with them is being retired (torchvision warns if it is not turned off).
_TORCHVISION_ARGUMENTS = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
}


@cache
def _torchvision_names() -> tuple[str, ...]:
    """Names of torchvision's classification networks."""
    return tuple(torchvision.models.list_models(torchvision.models))


def network_names() -> list[str]:
    """List the networks that have a name (``timm/NAME`` and ``path/file.py:function`` will do as well)."""
    return [*_OWN_NETWORKS, *_torchvision_names()]


def input_shape_of(name: str, in_channels: int | None = None, image_size: int | None = None) -> tuple[int, int, int]:
    """Return the input that a network is made for.

    Args:
        name: A name that :func:`build_network` knows.
        in_channels: Takes the place of the network's own number of channels.
        image_size: Takes the place of the network's own side, pixels.

    Returns:
        (channels, height, width). A user's own function is taken to want (3, 224, 224).
    """
    if name in DIGITS_NETWORKS:
        channels, size = 1, 8
    elif name in CIFAR_NETWORKS:
        channels, size = 3, 32
    elif name in _torchvision_names() or ":" in name:
        channels, size = 3, 299 if name == "inception_v3" else 224
    elif is_timm(name):
        channels, size, _ = timm_input_shape(name)
    else:
        raise _unknown_network(name)
    channels = channels if in_channels is None else in_channels
    size = size if image_size is None else image_size
    return channels, size, size


def sizes_by_default(name: str) -> dict[str, int]:
    """Sizes that a user's function has defaults for; it is not called, but its file is run.

    Args:
        name: ``path/file.py:function``; other names have none.

    Returns:
        Those of ``num_classes``, ``in_channels`` and ``image_size`` that are parameters with a whole number.

    Raises:
        PruningError: The file or the function is not there, or the file fails.
    """
    if ":" not in name:
        return {}
    parameters = inspect.signature(_user_function(name)).parameters
    defaults = {key: parameters[key].default for key in SIZES if key in parameters}
    return {key: value for key, value in defaults.items() if type(value) is int}


def build_network(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    image_size: int | None = None,
    weights: str | Path | None = None,
    seed: int = 0,
) -> nn.Module:
    """Make a network.

    Args:
        name: One of :func:`network_names`, ``timm/NAME``, or ``path/file.py:function``. The function is called
            with those of ``num_classes``, ``in_channels`` and ``image_size`` that it has parameters for and that
            are given here.
        num_classes: Outputs. None: 10, or 1000 for torchvision's.
        in_channels: Input channels. None: those of :func:`input_shape_of`.
        image_size: Side of the images, pixels: wanted by networks with position embeddings, ignored by the
            others.
        weights: A weight file, or for torchvision's networks ``default`` or the name of published weights,
            such as ``IMAGENET1K_V2`` (fetched on first use; if ``num_classes`` is not theirs, the head starts
            afresh).
        seed: Initial weights. The global generator is left as it was.

    Returns:
        The network, in training mode.

    Raises:
        PruningError: The name is unknown, the user's function fails, or the weights do not fit.
    """
    if num_classes is not None and num_classes < 1:
        raise PruningError(
            f"`num_classes` should be at least 1. Received {num_classes}. Leave it out for the network's own."
        )
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if name in _OWN_NETWORKS:
            channels = input_shape_of(name, in_channels)[0]
            network = _OWN_NETWORKS[name](num_classes=num_classes or _OWN_CLASSES, in_channels=channels)
        elif name in _torchvision_names():
            published = _published_weights(name, weights)
            network = _torchvision_network(name, published, num_classes, in_channels, image_size)
            weights = None if published is not None else weights
        elif is_timm(name):
            network = timm_network(name, weights, num_classes, in_channels, image_size)
            weights = None if str(weights).lower() == "default" else weights
        elif ":" in name:
            network = _user_network(name, {key: value for key, value in sizes.items() if value is not None})
        else:
            raise _unknown_network(name)
    if weights is not None:
        load_weights(network, weights)
    return network


def _unknown_network(name: str) -> PruningError:
    """Describe a name that is not known."""
    return unknown_name("--network", name, network_names(), "Or timm/NAME, or your own as path/file.py:function.")


def _published_weights(name: str, weights: str | Path | None) -> Any | None:
    """Find torchvision's own weights by name; None if ``weights`` is a file or nothing."""
    if weights is None or Path(weights).expanduser().is_file():
        return None
    choices = torchvision.models.get_model_weights(name)
    if str(weights).lower() == "default":
        return choices.DEFAULT
    found = next((choice for choice in choices if choice.name.lower() == str(weights).lower()), None)
    if found is None:
        names = ["default", *(choice.name for choice in choices)]
        raise unknown_name("--weights", str(weights), names, "Or give an existing weight file.")
    return found


def _torchvision_network(
    name: str, published: Any | None, num_classes: int | None, in_channels: int | None, image_size: int | None
) -> nn.Module:
    """Make one of torchvision's networks, with its published weights, head and input as asked."""
    arguments: dict[str, Any] = dict(_TORCHVISION_ARGUMENTS.get(name, {}))
    if published is not None:
        arguments["weights"] = published
        arguments.pop("init_weights", None)
    else:
        arguments["num_classes"] = num_classes or _IMAGENET_CLASSES
    if image_size is not None and name.startswith("vit_"):
        arguments["image_size"] = image_size
    elif image_size is not None and name.startswith("maxvit_"):
        arguments["input_size"] = (image_size, image_size)
    try:
        network: nn.Module = torchvision.models.get_model(name, **arguments)
    # ValueError: sizes that the design or its weights exclude. OSError: the download failed (URLError is
    # one). RuntimeError: the downloaded file has a wrong hash.
    except (ValueError, OSError, RuntimeError) as error:
        raise PruningError(
            f"`--network` should be a network that can be built as asked. Received '{name}' with "
            f"{', '.join(f'{key}={value}' for key, value in arguments.items())}: {error}. "
            "Change the sizes, or give weights that are on disk."
        ) from error
    if num_classes is not None and published is not None and num_classes != _IMAGENET_CLASSES:
        _replace_head(name, network, num_classes)
    if in_channels is not None and in_channels != 3:
        _replace_stem(network, in_channels)
    return network


def _replace_head(name: str, network: nn.Module, num_classes: int) -> None:
    """Give a pretrained network a new last layer, for other classes."""
    layer = [
        path
        for path, module in network.named_modules()
        if getattr(module, "out_features", None) == _IMAGENET_CLASSES
        or (isinstance(module, nn.Conv2d) and module.out_channels == _IMAGENET_CLASSES)
    ][-1]
    old = network.get_submodule(layer)
    if isinstance(old, nn.Conv2d):  # SqueezeNet
        network.set_submodule(layer, nn.Conv2d(old.in_channels, num_classes, old.kernel_size))  # type: ignore[arg-type]
    elif isinstance(old, nn.Linear):
        network.set_submodule(layer, nn.Linear(old.in_features, num_classes, old.bias is not None))
    warnings.warn(
        f"the last layer of '{name}' is new, because its weights are for {_IMAGENET_CLASSES} classes and the "
        f"data has {num_classes}: train the network before it is measured or pruned",
        stacklevel=4,
    )


def _replace_stem(network: nn.Module, in_channels: int) -> None:
    """Give a network made for RGB another number of input channels; their sum keeps its size."""
    path, old = next((path, module) for path, module in network.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    with torch.no_grad():
        new.weight.copy_(old.weight.mean(dim=1, keepdim=True) * (3 / in_channels))
        if old.bias is not None and new.bias is not None:
            new.bias.copy_(old.bias)
    network.set_submodule(path, new)
    if hasattr(network, "transform_input"):  # GoogLeNet and Inception rescale red, green and blue
        setattr(network, "transform_input", False)  # noqa: B010 (a module's attributes are typed as tensors)


def _user_function(name: str) -> Callable[..., object]:
    """Find a function of a user's file."""
    file, function_name = name.rsplit(":", 1)
    module = import_file(Path(file).expanduser())
    function: Callable[..., object] | None = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if inspect.isroutine(value) or inspect.isclass(value)]
        raise unknown_name("--network", function_name, functions, f"It should be a function in {file}.")
    return function


def _user_network(name: str, sizes: Mapping[str, int]) -> nn.Module:
    """Call a function of a user's file with the sizes it has parameters for."""
    function = _user_function(name)
    parameters = inspect.signature(function).parameters
    folder = Path(name.rsplit(":", 1)[0]).expanduser().resolve().parent
    try:
        with _neighbours_importable(folder):  # it may import them only now
            network = function(**{key: value for key, value in sizes.items() if key in parameters})
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and calls sys.exit()
        raise PruningError(
            f"`--network` should be a function that returns a network. Received {name}, which raised "
            f"{type(error).__name__}: {error}. Correct it, or give its other parameters defaults."
        ) from error
    if not isinstance(network, nn.Module):
        raise PruningError(
            f"`--network` should be a function that returns a torch.nn.Module. Received {name}, which "
            f"returned a {type(network).__name__}. Let it return the network."
        )
    return network


def import_file(path: Path) -> ModuleType:
    """Run a user's Python file as a module; an unchanged file is run once.

    Raises:
        PruningError: The file is not there, or cannot be imported.
    """
    if not path.is_file():
        remedy = "Check the path."
        if not path.is_absolute():
            remedy = f"The path begins at {Path.cwd()}; that of a saved network where it was pruned: go there."
        raise PruningError(
            f"`--network` should be a name, or an existing file and function. Received file {path}, which is "
            f"not there. {remedy}"
        )
    path = path.resolve()
    # Registered under a name of its own, so that its networks can be copied and pickled. It changes with
    # the content, so that an unchanged file is run once and an edited one again.
    digest = hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()
    key = f"{USER_MODULES}{path.stem}_{digest[:12]}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, path)
    if spec is None or spec.loader is None:
        raise PruningError(f"`--network` should name a Python file. Received {path}. Its name should end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        with _neighbours_importable(path.parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and scripts call sys.exit()
        del sys.modules[key]
        remedy = "Correct it, or install what it needs."
        if isinstance(error, SystemExit):
            remedy = "Let it do so under `if __name__ == '__main__':` only."
        raise PruningError(
            f"`--network` should name a file that can be imported. Received {path}, which raised "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error
    return module


@contextmanager
def _neighbours_importable(folder: Path) -> Iterator[None]:
    """Let a user's file import the files beside it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
