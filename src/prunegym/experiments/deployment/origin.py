"""Where a saved network comes from: the configuration of the run that pruned it, if its folder is a run folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from prunegym.agents.configuration.options import DataOptions
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import read_json

#: Commands whose run folders hold a saved network.
_COMMANDS = ("prune", "finetune")
#: Options that decide which images are in which split, and how large they are.
_CUTTING = ("image_size", "split_seed", "reward_split")
#: Fine-tunings of fine-tunings that are followed back.
_DEPTH = 100


def origin_of(folder: Path) -> Mapping[str, Any]:
    """The configuration of `prunegym prune` that a saved network goes back to; empty if it is not known.

    Raises:
        PruningError: A configuration on the way is damaged.
    """
    for _ in range(_DEPTH):
        path = folder.expanduser() / "config.json"
        stored = read_json(path) if path.is_file() else None
        if not isinstance(stored, dict) or stored.get("command") not in _COMMANDS:
            return {}
        config = stored.get("config")
        if not isinstance(config, dict):
            return {}
        if not isinstance(config.get("run"), str):
            return config
        folder = Path(config["run"])
    return {}


def data_of(asked: DataOptions, origin: Mapping[str, Any]) -> DataOptions:
    """Data options completed by those of the run that a network goes back to.

    Args:
        asked: As the user gave them, with an empty ``data`` for those of the run. Where they name data, these may be
            the same at another place: how they are split and scaled stays that of the run.
        origin: From :func:`origin_of`.

    Raises:
        PruningError: Neither names data.
    """
    defaults = {one.name: one.default for one in fields(DataOptions)}
    given = {name: getattr(asked, name) for name in defaults}
    taken = _CUTTING if given["data"] else tuple(defaults)
    known = {name: origin[name] for name in taken if origin.get(name) is not None}
    own = {name: value for name, value in given.items() if value and value != defaults[name]}
    if "data" not in known and not given["data"]:
        raise PruningError(
            "`--data` should be given for a saved network whose folder does not say what it was pruned on. "
            "Received none. Give the data that it was pruned on."
        )
    if "data_root" in known:
        known["data_root"] = Path(known["data_root"])
    return DataOptions(**{"data": given["data"], **known, **own})
