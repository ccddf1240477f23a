"""Policies on disk: one safetensors file, whose header says in JSON what the weights belong to.

Nothing is unpickled, so a policy of a stranger can be loaded. The header holds::

    format            version of this layout
    observation       version of the features that the policy reads, OBSERVATION_VERSION
    prunegym          version of the package that wrote it, for people
    encoder           the fields of EncoderConfig
    features          data, structure or random
    correction_scale  factor on the learned correction
    log_std           of the exploration noise, for people; the weights hold it too
    metadata          what the caller adds: networks and budgets trained on, statistics used, results
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunegym.agents.policies.encoder import EncoderConfig
from prunegym.agents.policies.policy import PruningPolicy
from prunegym.envs.observation import OBSERVATION_VERSION, Padding, observation_space
from prunegym.envs.prior import PRIORS
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain, replacing

FORMAT_VERSION = 1
"""Raised whenever the layout of the file changes."""

#: Name of our entry in the header; safetensors keeps strings only.
_ENTRY = "prunegym"
_FIELDS = {"format", "observation", "encoder", "features", "correction_scale", "metadata"}
#: Far above what is of use; keeps a forged header from costing memory or time.
_LARGEST = {"width": 4096, "heads": 4096, "gat_layers": 64, "transformer_layers": 64}
#: How files begin that ``torch.save`` and ``pickle`` write.
_PICKLES = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


def save_policy(path: Path, policy: PruningPolicy, *, metadata: Mapping[str, Any]) -> None:
    """Write a policy, replacing the file in one step.

    Args:
        path: The file, by custom ``policy.safetensors``.
        policy: The policy.
        metadata: What a user should know of it, in terms of :func:`prunegym.pruning.files.plain`.

    Raises:
        PruningError: A weight is not finite, or the file cannot be written; an earlier file is still there.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in policy.state_dict().items()}
    spoilt = _not_finite(tensors)
    if spoilt:
        raise PruningError(
            f"`policy` should have finite weights. Received NaN or infinity in '{spoilt}'. The training "
            "diverged: repeat it with a lower learning rate. An earlier file has been kept."
        )
    header = {
        "format": FORMAT_VERSION,
        "observation": OBSERVATION_VERSION,
        "prunegym": version("prunegym"),
        "encoder": asdict(policy.encoder.config),
        "features": policy.features,
        "correction_scale": policy.correction_scale,
        "log_std": policy.log_std.item(),
        "metadata": metadata,
    }
    text = json.dumps(plain(header), allow_nan=False)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={_ENTRY: text})


def load_policy(path: Path, *, device: torch.device | str = "cpu") -> tuple[PruningPolicy, dict[str, Any]]:
    """Read a policy; no environment is needed.

    The policy is in evaluation mode and acts on observations of any network (``act``, ``predict``). To train
    it further, give its ``state_dict()`` to the policy of a new PPO. Random generators are left alone.

    Args:
        path: The file.
        device: Where to put the weights.

    Returns:
        The policy and its metadata.

    Raises:
        PruningError: The file is missing, damaged, of another kind or of another version.
    """
    entry, tensors = _read(path)
    header = _parse_header(path, entry)
    _check_versions(path, header)
    policy = _build(path, header)
    _check_tensors(path, tensors, policy.state_dict())
    # without `assign` the values would be copied into tensors that have no memory
    policy.load_state_dict({name: value.to(device) for name, value in tensors.items()}, assign=True)
    policy.make_optimizer(0.0)  # the first one has the tensors without memory
    policy.set_training_mode(False)
    return policy, header["metadata"]


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """Our entry of the header, and the tensors."""
    try:
        with path.open("rb") as file:
            beginning = file.read(4)
        with safe_open(path, framework="pt") as content:
            entry = (content.metadata() or {}).get(_ENTRY)
            # cloned: these tensors are views of the file, which may be replaced
            tensors = {name: content.get_tensor(name).clone() for name in content.keys()}  # noqa: SIM118
    except OSError as error:
        raise _refusal(path, error.strerror or str(error), "Check the path.") from error
    except SafetensorError as error:
        if beginning.startswith(_PICKLES):
            raise _refusal(
                path,
                "a pickle or zip file, unsafe to open as it can run any code",
                "Ask for the policy as `policy.safetensors`.",
            ) from error
        raise _refusal(path, f"not a whole safetensors file: {error}", "Copy or train it again.") from error
    if entry is None:
        raise _refusal(path, "a safetensors file without a prunegym policy", "Choose `policy.safetensors`.")
    return entry, tensors


def _parse_header(path: Path, entry: str) -> dict[str, Any]:
    """The header as a dict with all its fields."""
    try:
        header = json.loads(entry)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"its header is not JSON: {error}", "Copy or train it again.") from error
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise _refusal(path, "its header has no format version", "Copy or train it again.")
    return header


def _check_versions(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse what another version of prunegym has written, then what nobody should have written."""
    wrote = f"written by prunegym {header.get('prunegym', 'unknown')}"
    remedy = f"Install the prunegym that wrote it, or train again with {version('prunegym')}."
    if header["format"] != FORMAT_VERSION:
        raise _refusal(path, f"format {header['format']} instead of {FORMAT_VERSION}, {wrote}", remedy)
    missing = sorted(_FIELDS - set(header))
    if missing:
        raise _refusal(path, f"its header lacks '{missing[0]}'", "Copy or train it again.")
    if header["observation"] != OBSERVATION_VERSION:
        read = f"made for observations of version {header['observation']} instead of {OBSERVATION_VERSION}"
        raise _refusal(path, f"{read}, {wrote}", remedy)
    if not isinstance(header["metadata"], dict):
        raise _refusal(path, "its metadata is not a table", "Copy or train it again.")
    _check_kinds(path, header)


def _check_kinds(path: Path, header: Mapping[str, Any]) -> None:
    """Refuse values of the wrong kind where something is made of them."""
    metadata = header["metadata"]
    rounds, names, priors = metadata.get("rounds", 1), metadata.get("networks") or [], metadata.get(PRIORS)
    sound = {
        "features": isinstance(header["features"], str),
        "rounds": isinstance(rounds, int) and not isinstance(rounds, bool) and rounds >= 1,
        "networks": isinstance(names, list) and all(isinstance(one, str) for one in names),
        PRIORS: priors is None or isinstance(priors, dict | int | float),
    }
    wrong = next((name for name, fits in sound.items() if not fits), None)
    if wrong is not None:
        value = header.get(wrong, metadata.get(wrong))
        raise _refusal(path, f"its entry '{wrong}' makes no sense: {value!r:.60}", "Copy or train it again.")


def _build(path: Path, header: Mapping[str, Any]) -> PruningPolicy:
    """A policy of the header's sizes, whose tensors have shapes but no memory yet."""
    scale = header["correction_scale"]
    try:
        sizes = {name: header["encoder"][name] for name in _LARGEST}
        if any(sizes[name] > most for name, most in _LARGEST.items()) or not math.isfinite(scale):
            raise ValueError(f"sizes {sizes}, correction scale {scale}")
        expected = EncoderConfig(**header["encoder"])
        with torch.device("meta"):
            policy = PruningPolicy(
                # of no consequence but for the numbers of features
                observation_space(Padding(groups=1, edges=1, bins=1)),
                spaces.Box(-1.0, 1.0, (1,), np.float32),
                lambda _: 0.0,
                features=header["features"],
                correction_scale=scale,
                **sizes,
            )
        if policy.encoder.config != expected:
            raise ValueError(f"features of other observations: {header['encoder']}")
    except (LookupError, TypeError, ValueError) as error:  # PruningError is a ValueError
        raise _refusal(path, f"its header makes no sense: {error}", "Copy or train it again.") from error
    return policy


def _check_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Refuse missing, strange, misshapen and non-finite weights."""
    remedy = "Copy or train it again."
    missing = sorted(set(expected) - set(tensors))
    strange = sorted(set(tensors) - set(expected))
    if missing:
        raise _refusal(path, f"without the weights '{missing[0]}'", remedy)
    if strange:
        raise _refusal(path, f"with unknown weights '{strange[0]}'", remedy)
    for name, value in expected.items():
        here, there = tensors[name], f"{tuple(value.shape)} of {value.dtype}"
        if here.shape != value.shape or here.dtype != value.dtype:
            found = f"{tuple(here.shape)} of {here.dtype}"
            raise _refusal(path, f"weights '{name}' are {found} instead of {there}", remedy)
    spoilt = _not_finite(tensors)
    if spoilt:
        raise _refusal(path, f"weights '{spoilt}' with NaN or infinity", "Train it again.")


def _not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity."""
    return next((name for name, value in tensors.items() if not bool(value.isfinite().all())), None)


def _refusal(path: Path, reason: str, remedy: str) -> PruningError:
    """The error for a file that is no policy of ours."""
    return PruningError(f"`--policy` should be a prunegym policy file. Received '{path}' ({reason}). {remedy}")
