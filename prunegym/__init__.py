"""Prune channels of PyTorch networks, by hand, by search or with a learned policy.

The names below are loaded on first use, so that ``import prunegym`` stays quick.
"""

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunegym.pruning.errors import InfeasibleBudgetError, PruningError, UnsupportedLayerError

    __version__: str

__all__ = ["InfeasibleBudgetError", "PruningError", "UnsupportedLayerError", "__version__"]

#: Public name -> the module that defines it; the same names as in `__all__` and under TYPE_CHECKING.
_HOME = {
    "InfeasibleBudgetError": "prunegym.pruning.errors",
    "PruningError": "prunegym.pruning.errors",
    "UnsupportedLayerError": "prunegym.pruning.errors",
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
