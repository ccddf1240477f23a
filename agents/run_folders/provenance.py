"""Where a run happens: commit, command line, versions and machine, for ``env.json``."""

import os
import platform
import shlex
import subprocess
import sys
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from prunegym.pruning.timing.latency import processor_name

#: Distributions whose version can change a result.
_DISTRIBUTIONS = (
    "prunegym",
    "torchvision",
    "torch-geometric",
    "gymnasium",
    "stable-baselines3",
    "numpy",
    "scipy",
    "scikit-learn",
    "onnxruntime",
    "optuna",
    "cma",
)
#: Seconds; a git that waits (for a lock, a slow disk) must not hold up the run.
_GIT_TIMEOUT = 10.0


def describe_environment(device: str | None = None) -> dict[str, Any]:
    """Describe the program, the libraries and the machine.

    Args:
        device: The torch device of the run; by default the one torch would prefer.

    Returns:
        A dict that JSON can hold; what could not be found out is None.
    """
    name = device or _preferred_device()
    return {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "git": _git_state(Path(__file__).resolve()),
        "versions": _versions(),
        "device": name,
        "device_name": _device_name(name),
        "cpu": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _versions() -> dict[str, str | None]:
    """Versions by distribution name; None for what is not installed."""
    # torch's own string also says which CUDA it was built for
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in _DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _preferred_device() -> str:
    """Name the accelerator that torch found, or ``cpu``."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator is not None else "cpu"


def _device_name(device: str) -> str | None:
    """Name the card behind a CUDA device, e.g. ``NVIDIA A100``."""
    # not asked for other devices: it would initialise CUDA, after which worker processes cannot be forked
    if not device.startswith("cuda") or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device)


def _git_state(source: Path) -> dict[str, str | bool] | None:
    """Commit of the repository that holds ``source``, and whether anything in it differs from that commit.

    None when ``source`` is not tracked: an environment with prunegym installed in it may well lie inside the
    user's own repository, whose commit says nothing about the code that ran.
    """
    if _git(source.parent, "ls-files", "--error-unmatch", "--", source.name) is None:
        return None
    commit = _git(source.parent, "rev-parse", "HEAD")
    changes = _git(source.parent, "status", "--porcelain")
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in a folder, stripped; None if it failed or there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_TIMEOUT,
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
