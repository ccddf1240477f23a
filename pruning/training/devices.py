"""Where a training runs: one device, or several side by side, through Lightning Fabric.

Every training goes through Fabric: precision, scaled losses, backward passes and clipping are written once. Importing
it loads ``torch._dynamo``, as making one of PyTorch's optimisers does: this module is imported where a training starts.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import pickle
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeVar

import cloudpickle
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.strategies.single_device import SingleDeviceStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException

from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.user_code import user_code_by_value

Job = TypeVar("Job")


class Autocast(MixedPrecision):
    """Autocast, and nothing else: inputs and outputs stay as they are.

    Fabric's own plugin rounds inputs to half precision before the network sees them, also those of layers that autocast
    would run in float32.
    """

    def convert_input(self, data: Any) -> Any:
        """Leave inputs as they are."""
        return data

    def convert_output(self, data: Any) -> Any:
        """Leave outputs as they are: losses are computed in float32 where they need it."""
        return data


def precision_for(device: torch.device, amp: bool) -> Precision:
    """How a device computes: float32, or mixed with bfloat16, or with float16 where a graphics card has no other."""
    if not amp:
        return Precision()
    # where bfloat16 is emulated, there is nothing to be gained by it
    old = device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    return Autocast("16-mixed" if old else "bf16-mixed", device.type)


def one_device(device: torch.device, amp: bool) -> Fabric:
    """Fabric on one device, of any kind that torch knows: it is never asked to move anything there, nor launched."""
    strategy = SingleDeviceStrategy(device, precision=precision_for(device, amp))
    return Fabric(accelerator="cpu", devices=1, strategy=strategy, plugins=[LightningEnvironment()])


def several_devices(device: torch.device, count: int, amp: bool) -> Fabric:
    """Fabric on several devices of a kind, with a process for each; on a processor the processes share its cores."""
    # parameters that a loss does not reach (auxiliary heads) would stop the training without the search for them
    strategy = DDPStrategy(start_method="spawn", find_unused_parameters=True, precision=precision_for(device, amp))
    return Fabric(accelerator=device.type, devices=count, strategy=strategy, plugins=[LightningEnvironment()])


def launch(fabric: Fabric, work: Callable[[Fabric, Job], object], job: Job) -> None:
    """Let each process of Fabric do a piece of work; an error of one of them ends all and is raised here.

    Args:
        fabric: From :func:`several_devices`.
        work: A function of a module.
        job: Its second argument, which has to be picklable.

    Raises:
        PruningError: The job is not picklable, or a process raised this or was ended.
    """
    with TemporaryDirectory() as folder, _leaving_nothing_behind():
        complaint = Path(folder) / "error"
        try:
            fabric.launch(partial(_work, work=work, parcel=Parcel(job), complaint=complaint))
        except (pickle.PicklingError, AttributeError, TypeError) as fault:
            raise PruningError(
                f"`devices` should be 1 for what cannot be sent to other processes. Received {fabric.world_size} with "
                f"something that Python cannot pickle ({fault}). Leave out of network, task and callbacks what belongs "
                "to one process: open files, locks, connections."
            ) from fault
        except (ProcessRaisedException, ProcessExitedException) as fault:
            if complaint.is_file():
                raise PruningError(complaint.read_text(encoding="utf-8")) from None
            raise PruningError(
                f"`devices` should be processes that live. Received {fabric.world_size}, one of which ended: "
                f"{str(fault).strip().splitlines()[-1]}. Memory may have run out: use a smaller batch, or fewer "
                "devices. What the last checkpoint holds is kept."
            ) from fault


class _SharingPickler(cloudpickle.Pickler):  # type: ignore[misc]  # it publishes no types
    """Sends tensors in shared memory, as processes of one machine can."""

    #: What Python's own pickler for processes knows, to which torch adds tensors.
    dispatch_table: ClassVar[Any] = ChainMap(
        ForkingPickler._extra_reducers,  # type: ignore[attr-defined]
        cloudpickle.Pickler.dispatch_table,
    )


class Parcel:
    """Something for another process, together with the user's code that it is made of.

    Args:
        content: What is sent.
    """

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        file = io.BytesIO()
        with user_code_by_value():
            _SharingPickler(file).dump(self.content)
        return _unpack, (file.getvalue(),)


def _unpack(data: bytes) -> Parcel:
    """Open it. This is the first that a process does; what follows should not greet the user once per device."""
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    return Parcel(pickle.loads(data))  # from our own parent process


def _work(fabric: Fabric, work: Callable[[Fabric, Any], object], parcel: Parcel, complaint: Path) -> None:
    """What a process does; the first error of ours is left in a file, because the launcher only passes on text."""
    warnings.simplefilter("ignore")
    try:
        work(fabric, parcel.content)
    except PruningError as fault:
        complaint.write_text(str(fault), encoding="utf-8")
        raise


@contextmanager
def _leaving_nothing_behind() -> Iterator[None]:
    """End the processes that were started, whatever happens, and put the environment back that they got."""
    before, environment = set(multiprocessing.active_children()), dict(os.environ)
    # else each process would say once that it found no unused parameters
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        for name in ("MASTER_PORT", "TORCH_CPP_LOG_LEVEL"):
            if name in environment:
                os.environ[name] = environment[name]
            else:
                os.environ.pop(name, None)
