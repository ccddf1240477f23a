"""A Ray cluster: connecting to it, and sending networks and data there once.

Ray is optional and is imported where it is used.
"""

from __future__ import annotations

import importlib.util
import io
import logging
import os
import pickle
import socket
import sys
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.user_code import user_code_by_value

_PATIENCE = 10.0  # seconds for an address to answer

SHARED_BYTES = 1 << 20
"""Images of so many bytes stay in the node's object store, where all workers of the node read them."""


def require_ray() -> Any:
    """The package, imported.

    Raises:
        PruningError: It is not installed.
    """
    check_ray()
    import ray

    return ray


def check_ray() -> None:
    """Make sure, without importing it, that Ray is there.

    Raises:
        PruningError: It is not.
    """
    # a module that is None there is one that may not be imported
    absent = sys.modules["ray"] is None if "ray" in sys.modules else importlib.util.find_spec("ray") is None
    if absent:
        raise PruningError(
            "`--ray` needs the package ray. Received an environment without it. Run: pip install 'prunegym[ray]'"
        )


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Be connected to a cluster; a connection that is there already is used and left open.

    Args:
        address: What ``ray.init`` takes: ``auto`` for the cluster that this machine belongs to, ``HOST:PORT``,
            ``ray://HOST:PORT``, or ``local`` for one on this machine alone, started for the occasion.

    Yields:
        The package ``ray``.

    Raises:
        PruningError: Ray is not installed, or there is no such cluster.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        _knock(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
        # what workers print would come between our lines; their errors come back as errors
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    # Ray raises ConnectionError, ValueError or RuntimeError, by the form of the address
    except Exception as fault:
        raise PruningError(
            f"`--ray` should be the address of a running cluster. Received '{address}' ({reason_of(fault)}). Start one "
            "with `ray start --head` on this machine, join others with `ray start --address=HOST:PORT`, and write --ray"
            " auto."
        ) from fault
    try:
        yield ray
    finally:
        ray.shutdown()


def _knock(address: str) -> None:
    """See whether somebody listens at ``HOST:PORT``: Ray would try for minutes.

    Raises:
        OSError: Nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()


def cause_of(fault: Any) -> BaseException:
    """What a worker raised, without the report that Ray wraps it into; the error is returned, not raised."""
    cause = getattr(fault, "cause", None)
    return cause if isinstance(cause, BaseException) else fault


def reason_of(fault: Exception) -> str:
    """What Ray says of a failure, on one line that is not endless."""
    return textwrap.shorten(str(fault) or type(fault).__name__, 300, placeholder=" ...")


@dataclass(frozen=True)
class Packed:
    """An object on its way: what each worker gets a copy of, and what all of a node share."""

    content: NDArray[np.uint8]
    """Pickled; as an array, because Ray copies bytes."""
    shared: list[NDArray[np.uint8]]


def pack(value: Any) -> Packed:
    """Make an object ready for the object store.

    Images (large uint8 tensors and arrays) are kept apart: Ray maps them into the workers' memory, to be read only.
    Everything else, which may be written to, is copied. Code of a user's ``path/file.py`` goes along.
    """
    shared: list[NDArray[np.uint8]] = []

    def copied(buffer: pickle.PickleBuffer) -> bool:
        view = memoryview(buffer)
        if view.format != "B" or view.nbytes < SHARED_BYTES:
            return True
        shared.append(np.frombuffer(buffer.raw(), np.uint8))
        return False

    file = io.BytesIO()
    with user_code_by_value():
        _Pickler(file, protocol=5, buffer_callback=copied).dump(value)
    return Packed(np.frombuffer(file.getvalue(), np.uint8), shared)


def unpack(packed: Packed) -> Any:
    """The object again."""
    return pickle.loads(packed.content.data, buffers=packed.shared)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it publishes no types
    """Gives images as arrays, which pickle can leave where they are; it would copy tensors."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.dtype == torch.uint8 and obj.device.type == "cpu" and obj.is_contiguous():
            return _as_tensor, (obj.numpy(),)
        return super().reducer_override(obj)


def _as_tensor(array: NDArray[np.uint8]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it may not be written to: nobody writes to images
        return torch.from_numpy(array)
