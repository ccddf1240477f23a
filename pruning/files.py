"""Files that are either whole or not there: atomic replacement, JSON in and out.

Whatever may be killed while it writes (checkpoints, plans, results) goes through here: the new content is
written beside the old and takes its name in one step, so no reader ever sees half of it and a full disk costs
nothing that was already stored.
"""

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from prunegym.pruning.errors import PruningError

#: What writers raise on a full disk: Python and numpy OSError, torch.save RuntimeError, safetensors its own.
_WRITE_FAILURES = (OSError, RuntimeError, SafetensorError)
#: What the system says of a disk, or a share of it, that is full.
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
#: Bytes; a disk with less is full, as far as our files are concerned.
_NEXT_TO_NOTHING = 1 << 20
#: Names that :func:`replacing` gives to what is not finished; the number is that of the process.
_TEMPORARY = re.compile(r"\..*\.(\d+)(?:\.\w+)?")
#: Names that safetensors gives to what it has not finished.
_OF_SAFETENSORS = re.compile(r"\.tmp\w{6}")


@contextmanager
def replacing(path: Path, *, argument: str = "--out") -> Iterator[Path]:
    """Give a temporary path to write to; it becomes ``path`` if the block succeeds and is deleted if not.

    The temporary file lies in the same folder (renaming across devices is not atomic) and keeps the suffix,
    which numpy and others look at. The folder is made if need be.

    Args:
        path: Where the finished file belongs.
        argument: The argument that chose the place, for the error message.

    Yields:
        The path to write to.

    Raises:
        PruningError: The file could not be written; what was at ``path`` before is still there.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        # without this a power cut can leave the new name on an empty file
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except _WRITE_FAILURES as error:
        raise write_failure(path, error, argument) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk: a new name may otherwise be lost in a power cut."""
    if os.name != "posix":
        return  # elsewhere folders cannot be opened
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(path: Path, size: int, data: bytes) -> None:
    """Put data after the first ``size`` bytes of a file, all of it or nothing.

    Args:
        path: The file; made if it is not there.
        size: Bytes to keep; what a kill left after them is dropped.
        data: To add.

    Raises:
        OSError: It could not be written; the first ``size`` bytes are still there.
    """
    new = not size
    # unbuffered: after a failed write nothing may wait in a buffer that close() would write after all
    with path.open("ab", buffering=0) as file:
        try:
            file.truncate(size)
            rest = memoryview(data)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise
    if new:
        sync_folder(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Delete unfinished files of killed processes, in a folder to which nobody else writes."""
    for path in folder.rglob(".*"):
        ours = _TEMPORARY.fullmatch(path.name)
        left = not _is_running(int(ours[1])) if ours else _OF_SAFETENSORS.fullmatch(path.name)
        if left and path.is_file():
            with suppress(OSError):
                path.unlink()


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # there, but not ours
        return True
    return True


def write_failure(path: Path, error: Exception, argument: str = "--out") -> PruningError:
    """Describe a failed write: the place, what the system said, and what to do.

    Args:
        path: The file or folder that could not be written.
        error: What was raised.
        argument: The argument that chose the place.

    Returns:
        The error to raise.
    """
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
        full = error.errno in DISK_FULL
    else:  # what torch says of a full disk is not helpful, and looks the same for other causes
        full = _free_space(path) < _NEXT_TO_NOTHING
        reason = os.strerror(errno.ENOSPC) if full else str(error).partition("\n")[0]
    remedy = "Free some space there" if full else "Choose a folder that you may write to"
    return PruningError(
        f"`{argument}` should be a place that can be written to. Received '{path}' ({reason}). "
        f"{remedy} and repeat the command; what was written before is kept."
    )


def _free_space(path: Path) -> float:
    """Bytes that are left where a file should go; infinity if that cannot be found out."""
    try:
        return shutil.disk_usage(path.parent).free
    except OSError:
        return math.inf


def write_json(path: Path, value: Any, *, argument: str = "--out") -> None:
    """Write a value as indented JSON, atomically.

    Args:
        path: The file; replaced if it exists.
        value: Anything that :func:`plain` understands.
        argument: The argument that chose the place, for the error message.

    Raises:
        PruningError: The file could not be written.
        TypeError: The value holds something that JSON cannot.
    """
    text = json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    with replacing(path, argument=argument) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path, *, argument: str = "--out") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        argument: The argument that chose the place, for the error message.

    Returns:
        The value, made of dicts, lists, strings, numbers, booleans and None.

    Raises:
        PruningError: The file is missing, cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason, remedy = error.strerror or str(error), "Check the path."
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        reason, remedy = f"not JSON: {error}", "It is damaged or of another kind; choose another."
    raise PruningError(f"`{argument}` should lead to a readable JSON file. Received '{path}' ({reason}). {remedy}")


def plain(value: Any) -> Any:
    """Turn a value into what JSON holds.

    Dataclasses and mappings become dicts, sequences and arrays lists, sets sorted lists, numpy and torch
    scalars numbers, paths and torch devices strings, enum members their values. Numbers that are not finite
    become None, because JSON has no word for them.

    Args:
        value: The value.

    Returns:
        The same in dicts, lists, strings, finite numbers, booleans and None.

    Raises:
        TypeError: There is no sensible JSON for the value.
    """
    if value is None or (isinstance(value, bool | str) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Set):
        return sorted(plain(item) for item in value)
    if hasattr(value, "tolist"):  # numpy and torch arrays and scalars
        return plain(value.tolist())
    if isinstance(value, os.PathLike) or type(value).__module__ == "torch":  # a device, a dtype
        return str(value)
    raise TypeError(f"`value` should hold what JSON can. Received a {type(value).__name__}: {value!r}")
