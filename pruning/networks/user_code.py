"""Code in users' files: other processes cannot import it by name, so it is sent along."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import cloudpickle

USER_MODULES = "prunegym_user_"
"""How the names begin that :mod:`prunegym.pruning.networks.zoo` imports users' files as."""


@contextmanager
def user_code_by_value() -> Iterator[None]:
    """Let cloudpickle send modules of users' files, and of the files beside them, with what is made from them.

    Other processes cannot import them by name.
    """
    modules = list(_user_modules())
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _user_modules() -> Iterator[ModuleType]:
    own = [module for name, module in sys.modules.items() if name.startswith(USER_MODULES)]
    folders = {Path(module.__file__).parent for module in own if module.__file__}
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if isinstance(file, str) and Path(file).parent in folders:
            yield module
