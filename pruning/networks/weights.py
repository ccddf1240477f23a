"""Weights from files, without running any code of theirs."""

import re
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError

#: Keys under which checkpoints keep the weights of the network.
_NESTED_KEYS = ("state_dict", "model", "model_state_dict")
#: Prefixes that wrappers put before every name: DataParallel and torch.compile.
_WRAPPERS = ("module.", "_orig_mod.")
#: Missing or unexpected names shown in a message.
_SHOWN = 3


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy weights into a network: all of them, or none if anything is wrong.

    Args:
        model: Changed in place.
        source: A ``.safetensors`` file, a file of ``torch.save`` (read with ``weights_only=True``), or the
            weights by name. The weights may stand under ``state_dict`` or ``model``, and every name may begin
            with ``module.``.

    Raises:
        PruningError: The file is absent, damaged or would have to run code, or its weights are not finite or
            not those of this network.
    """
    where = "the given tensors" if isinstance(source, Mapping) else str(source)
    content = source if isinstance(source, Mapping) else read_weights(Path(source))
    weights = _tensors(where, content)
    _check(where, model, weights)
    # files written before PyTorch 0.4 lack these counters, which only matter without momentum
    missing = {key: value for key, value in model.state_dict().items() if key not in weights}
    model.load_state_dict({**missing, **weights})


def read_weights(path: Path, *, argument: str = "--weights") -> Mapping[str, Any]:
    """Read a weight file as it is, without running any code in it.

    Args:
        path: A ``.safetensors`` file, or one of ``torch.save``.
        argument: The argument that named the file, for the error message.

    Returns:
        What the file holds: tensors and plain values by name, perhaps nested.

    Raises:
        PruningError: The file is absent, damaged, or holds more than tensors and plain values.
    """
    path = path.expanduser()
    if not path.is_file():
        raise PruningError(
            f"`{argument}` should be an existing file. Received {path}, which is not there. Check the path."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    # what torch.load raises for a damaged file depends on which byte is damaged
    except (
        UnpicklingError,
        SafetensorError,
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        UnicodeDecodeError,
    ) as error:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch writes in bold
        first_line = (text.splitlines() or [type(error).__name__])[0]
        raise PruningError(
            f"`{argument}` should be an undamaged file of tensors that can be read without running code in "
            f"it. Received {path} ({first_line}). Save the network's state_dict() again, with torch.save."
        ) from error
    if not isinstance(content, Mapping):
        raise PruningError(
            f"`{argument}` should hold tensors by name. Received {path} with a {type(content).__name__}. "
            "Save the network's state_dict()."
        )
    return content


def _tensors(where: str, content: Mapping[str, object]) -> dict[str, Tensor]:
    """Find the weights in a checkpoint and strip wrapper prefixes from their names."""
    for key in _NESTED_KEYS:
        nested = content.get(key)
        if isinstance(nested, Mapping):
            content = nested
            break
    weights: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            raise PruningError(
                "`--weights` should hold nothing but tensors by name, perhaps under one of "
                f"{', '.join(_NESTED_KEYS)}. Received {where} with '{key}' of type {type(value).__name__}. "
                "Save the network's state_dict()."
            )
        weights[str(key)] = value
    for prefix in _WRAPPERS:
        if weights and all(key.startswith(prefix) for key in weights):
            weights = {key.removeprefix(prefix): value for key, value in weights.items()}
    return weights


def _check(where: str, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights of another network, and weights that are not finite."""
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in weights and not key.endswith("num_batches_tracked")]
    surplus = [key for key in weights if key not in wanted]
    if missing or surplus:
        raise PruningError(
            f"`--weights` should be of the network they are loaded into. Received {where}: "
            f"{len(missing)} tensors missing{_some(missing)}, {len(surplus)} unknown{_some(surplus)}. "
            "Choose the network that the weights were made for."
        )
    head, pruned = _head_names(model), _is_narrower(weights, wanted)
    for key, value in weights.items():
        if value.shape != wanted[key].shape:
            shapes = f"'{key}' is {tuple(value.shape)} and should be {tuple(wanted[key].shape)}"
            remedy = "Choose the network that the weights were made for."
            if key in head and value.ndim and value.shape[1:] == wanted[key].shape[1:]:
                remedy = (
                    f"They were trained on {value.shape[0]} classes and the network has {wanted[key].shape[0]}: "
                    "choose the data they were made for, or train the network on yours."
                )
            elif pruned:
                remedy = (
                    "They may be of this network after pruning: in Python `prunegym.load(FOLDER)` builds it from "
                    "where it was saved; `prunegym measure FOLDER`, `finetune` and `export` take that too."
                )
            raise PruningError(
                f"`--weights` should have the shapes of the network. Received {where}, where {shapes}. {remedy}"
            )
        if value.is_floating_point() and not torch.isfinite(value).all():
            count = int((~torch.isfinite(value)).sum())
            raise PruningError(
                f"`--weights` should be finite. Received {where} with {count} NaN or infinite values in "
                f"'{key}'. Use an earlier checkpoint."
            )


def _is_narrower(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> bool:
    """Whether all shapes that differ are smaller ones."""
    pairs = [(weights[key].shape, wanted[key].shape) for key in weights]
    return all(
        len(mine) == len(whole) and all(one <= other for one, other in zip(mine, whole, strict=True))
        for mine, whole in pairs
    )


def _some(names: list[str]) -> str:
    """Show the first few of some names."""
    if not names:
        return ""
    return f" ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"


def _head_names(model: nn.Module) -> set[str]:
    """Names of the parameters of the last linear or convolutional layer, which gives the classes."""
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return {f"{layers[-1]}.weight", f"{layers[-1]}.bias"} if layers else set()
