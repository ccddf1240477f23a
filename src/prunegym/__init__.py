"""Prune channels of PyTorch networks, by hand, by search or with a learned policy.

The names below are loaded on first use, so that ``import prunegym`` stays quick.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunegym.commands.api import inspect, load, make_env, prune, report, save
    from prunegym.experiments.deployment.api import export, finetune
    from prunegym.experiments.deployment.finetune import FinetuneResult
    from prunegym.experiments.prune import PruneResult
    from prunegym.pruning.datasets.data import load_data
    from prunegym.pruning.deployment.export import Exported
    from prunegym.pruning.deployment.program import export_program, load_program
    from prunegym.pruning.errors import InfeasibleBudgetError, PruningError, UnsupportedLayerError
    from prunegym.pruning.networks.zoo import build_network
    from prunegym.pruning.plan import PruningPlan
    from prunegym.pruning.task import ClassificationTask, Task

    __version__: str

__all__ = [
    "ClassificationTask",
    "Exported",
    "FinetuneResult",
    "InfeasibleBudgetError",
    "PruneResult",
    "PruningError",
    "PruningPlan",
    "Task",
    "UnsupportedLayerError",
    "__version__",
    "build_network",
    "export",
    "export_program",
    "finetune",
    "inspect",
    "load",
    "load_data",
    "load_program",
    "make_env",
    "prune",
    "report",
    "save",
]

#: Public name -> the module that defines it; the same names as in `__all__` and under TYPE_CHECKING.
_HOME = {
    "ClassificationTask": "prunegym.pruning.task",
    "Exported": "prunegym.pruning.deployment.export",
    "FinetuneResult": "prunegym.experiments.deployment.finetune",
    "InfeasibleBudgetError": "prunegym.pruning.errors",
    "PruneResult": "prunegym.experiments.prune",
    "PruningError": "prunegym.pruning.errors",
    "PruningPlan": "prunegym.pruning.plan",
    "Task": "prunegym.pruning.task",
    "UnsupportedLayerError": "prunegym.pruning.errors",
    "build_network": "prunegym.pruning.networks.zoo",
    "export": "prunegym.experiments.deployment.api",
    "export_program": "prunegym.pruning.deployment.program",
    "finetune": "prunegym.experiments.deployment.api",
    "inspect": "prunegym.commands.api",
    "load": "prunegym.commands.api",
    "load_data": "prunegym.pruning.datasets.data",
    "load_program": "prunegym.pruning.deployment.program",
    "make_env": "prunegym.commands.api",
    "prune": "prunegym.commands.api",
    "report": "prunegym.commands.api",
    "save": "prunegym.commands.api",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        # pyproject.toml is the only place where the version is written
        return metadata.version("prunegym")
    if name not in _HOME:
        raise AttributeError(f"module 'prunegym' has no attribute '{name}'")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names too, loaded or not."""
    return sorted({*globals(), *__all__})
