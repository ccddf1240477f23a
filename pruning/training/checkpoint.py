"""Files from which an interrupted training goes on: tensors and plain values, written in one step, never unpickled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing
from prunegym.pruning.networks.weights import read_weights

#: Files of another version are refused.
_VERSION = 2
#: Parts of an identity that are too long to be shown.
_NOT_SHOWN = ("data", "tensors", "teacher")


@dataclass(frozen=True)
class Checkpoint:
    """The state of one training on disk.

    Args:
        path: The file.
        identity: What the training is of: settings, data, teacher, shapes. Another training's file is refused.
    """

    path: Path
    identity: Mapping[str, Any]

    def write(self, state: Mapping[str, Any]) -> None:
        """Replace the file in one step.

        Raises:
            PruningError: It could not be written; the earlier one is still there.
        """
        content = {"version": _VERSION, "identity": dict(self.identity), **state}
        with replacing(self.path, argument="checkpoint") as temporary:
            torch.save(content, temporary)

    def read(self) -> Mapping[str, Any] | None:
        """The state of the file, on the CPU; None if there is no file.

        Raises:
            PruningError: The file is damaged, of another version, or of another training.
        """
        if not self.path.exists():
            return None
        state = read_weights(self.path, argument="checkpoint")
        if state.get("version") != _VERSION:
            raise PruningError(
                f"`checkpoint` should be of version {_VERSION}. Received {self.path} of version "
                f"{state.get('version')}. Delete it to start afresh, or choose another file."
            )
        then = state["identity"]
        differing = [name for name, value in self.identity.items() if value != then.get(name)]
        if differing:
            name = differing[0]
            shown = name not in _NOT_SHOWN
            values = f" ({then.get(name)} there, {self.identity[name]} now)" if shown else ""
            raise PruningError(
                f"`checkpoint` should be of the same training. Received {self.path}, which differs in "
                f"{', '.join(differing)}{values}. Delete it to start afresh, or choose another file."
            )
        return state


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's tensors by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def weights_digest(model: nn.Module) -> str:
    """Hash a network's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators that a training on a device draws from: dropout knows no others."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_generator_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Put the global generators back into earlier states."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
