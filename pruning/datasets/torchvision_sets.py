"""torchvision's classification data sets by name, as sources of images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prunegym.pruning.datasets.sources import Source
from prunegym.pruning.errors import PruningError


@dataclass(frozen=True)
class _Entry:
    """How to ask torchvision for a data set: class, arguments of its parts (None: no official test set)."""

    cls: str
    train: Mapping[str, Any]
    test: Mapping[str, Any] | None
    flip: bool = True
    downloads: bool = True


_BY_FLAG: tuple[dict[str, Any], dict[str, Any]] = ({"train": True}, {"train": False})
_BY_SPLIT: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "test"})
_BY_VAL: tuple[dict[str, Any], dict[str, Any]] = ({"split": "train"}, {"split": "val"})

TORCHVISION_SETS: Mapping[str, _Entry] = {
    "cifar10": _Entry("CIFAR10", *_BY_FLAG),
    "cifar100": _Entry("CIFAR100", *_BY_FLAG),
    "country211": _Entry("Country211", *_BY_SPLIT),
    "dtd": _Entry("DTD", *_BY_SPLIT),
    "eurosat": _Entry("EuroSAT", {}, None),
    "fashion-mnist": _Entry("FashionMNIST", *_BY_FLAG, flip=False),
    "fgvc-aircraft": _Entry("FGVCAircraft", {"split": "trainval"}, {"split": "test"}),
    "flowers102": _Entry("Flowers102", *_BY_SPLIT),
    "food101": _Entry("Food101", *_BY_SPLIT),
    "gtsrb": _Entry("GTSRB", *_BY_SPLIT, flip=False),  # arrows point somewhere
    "imagenet": _Entry("ImageNet", *_BY_VAL, downloads=False),
    "imagenette": _Entry("Imagenette", *_BY_VAL),
    "kmnist": _Entry("KMNIST", *_BY_FLAG, flip=False),
    "mnist": _Entry("MNIST", *_BY_FLAG, flip=False),
    "oxford-iiit-pet": _Entry("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "pcam": _Entry("PCAM", *_BY_SPLIT),
    "stanford-cars": _Entry("StanfordCars", *_BY_SPLIT, downloads=False),
    "stl10": _Entry("STL10", *_BY_SPLIT),
    "sun397": _Entry("SUN397", {}, None),
    "svhn": _Entry("SVHN", *_BY_SPLIT, flip=False),
    "usps": _Entry("USPS", *_BY_FLAG, flip=False),
}


def read_torchvision(name: str, root: Path, download: bool) -> Source:
    """Read a data set of torchvision from ``root``.

    Args:
        name: A key of :data:`TORCHVISION_SETS`.
        root: Folder in torchvision's own layout.
        download: Fetch the data first if it is absent.

    Raises:
        PruningError: The data is absent, damaged, or cannot be fetched.
    """
    entry = TORCHVISION_SETS[name]
    wanted = [entry.train] if entry.test is None else [entry.train, entry.test]
    parts = [_open(name, entry, arguments, root, download) for arguments in wanted]
    labels = [_labels_of(part) for part in parts]
    arrays = [_array_of(part) for part in parts]
    in_memory = [array for array in arrays if array is not None]
    classes = getattr(parts[0], "classes", None)
    return Source(
        torch.cat(in_memory) if len(in_memory) == len(parts) else _PartsReader(tuple(parts)),
        np.concatenate(labels),
        len(labels[0]) if entry.test is not None else None,
        entry.flip,
        None if classes is None else tuple(_plain_name(item) for item in classes),
    )


def _plain_name(item: object) -> str:
    """Class name; ImageNet gives tuples of synonyms."""
    return str(item[0]) if isinstance(item, tuple) and item else str(item)


def _open(name: str, entry: _Entry, arguments: Mapping[str, Any], root: Path, download: bool) -> Any:
    """Make torchvision's object for one part of a data set."""
    from torchvision import datasets  # here: it takes seconds, and workers that only score plans need none of it

    fetch = {"download": True} if download and entry.downloads else {}
    try:
        return getattr(datasets, entry.cls)(str(root), **arguments, **fetch)
    # torchvision, its archives and its optional readers raise what they like for absent or damaged files
    except Exception as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        remedy = (
            "Set PRUNEGYM_DOWNLOAD=1 (or pass download=True) to fetch it once"
            if entry.downloads and not download
            else f"Put the files there as torchvision's {entry.cls} documents"
        )
        raise PruningError(
            f"`--data` should be on disk. Received '{name}', which could not be read from {root} "
            f"({first_line}). {remedy}, or point `--data-root` at the folder that has it (or at one with a "
            f"{name}.npz)."
        ) from error


def _labels_of(part: Any) -> NDArray[np.int64]:
    """Labels of all images without reading the images; torchvision has no common name for them."""
    for attribute in ("targets", "labels", "_labels", "y"):
        values = getattr(part, attribute, None)
        if values is not None:
            break
    else:
        samples = getattr(part, "_samples", None) or getattr(part, "samples", None)
        # the last resort decodes every image (PCAM keeps its labels in a file of their own)
        values = [sample[-1] for sample in samples] if samples else [part[i][1] for i in range(len(part))]
    return np.asarray(values).astype(np.int64).reshape(-1)


def _array_of(part: Any) -> Tensor | None:
    """uint8 ``(N, C, H, W)`` of a data set that is one array, else None."""
    data = getattr(part, "data", None)
    if not isinstance(data, np.ndarray | Tensor):
        return None
    images = torch.as_tensor(data)
    if images.dtype != torch.uint8 or images.ndim not in (3, 4):
        return None
    if images.ndim == 3:
        return images[:, None]
    return images.permute(0, 3, 1, 2).contiguous() if images.shape[3] in (1, 3) else images


@dataclass(frozen=True)
class _PartsReader:
    """Opens the images of a training and a test set under one numbering."""

    parts: tuple[Any, ...]

    def __call__(self, index: int) -> Image.Image:
        for part in self.parts:
            if index < len(part):
                picture: Image.Image = part[index][0]
                return picture
            index -= len(part)
        raise OSError("no such image")
