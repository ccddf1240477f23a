"""Data sets by name, file or folder, cut into the five splits of an honest evaluation.

``train``, ``calibration``, ``reward`` and ``selection`` are disjoint, stratified parts of the official
training set; ``test`` is the official test set, to be read once, at the end.
"""

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from prunegym.pruning.datasets.image_sets import (
    IMAGE_ERRORS,
    FileImages,
    ImageReader,
    ImageSet,
    MemoryImages,
    Preparation,
    read_pixels,
)
from prunegym.pruning.datasets.sources import (
    TEST_SEED,
    Source,
    check_labels,
    read_digits,
    read_folder,
    read_npz,
    resize_all,
    with_test_set,
)
from prunegym.pruning.datasets.splits import SPLITS, split_indices, stratified_order
from prunegym.pruning.datasets.torchvision_sets import TORCHVISION_SETS, read_torchvision
from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.files import replacing

__all__ = ["SPLITS", "DataSplits", "ImageSet", "data_names", "default_data_root", "load_data"]

#: What public pretrained weights were trained with; also customary for CIFAR-sized networks.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
#: Side of images read from files when none is asked for, pixels.
_DEFAULT_IMAGE_SIZE = 224
#: Files up to this side are taken to be of the size that was meant, pixels.
_SMALL_IMAGE = 64
#: Images that enter the fingerprint by content.
_FINGERPRINT_IMAGES = 32


@dataclass(frozen=True)
class DataSplits:
    """A data set in five parts.

    Args:
        name: Name of the data set.
        num_classes: Labels are 0 to ``num_classes - 1``.
        input_shape: Of one image: (channels, height, width).
        preparation: Normalisation and augmentation.
        class_names: In label order, if known.
        train: Images to train and fine-tune on.
        calibration: Images for activation statistics, BatchNorm and compensation.
        reward: Images that score a searcher's plans.
        selection: Images that choose between finished plans.
        test: The official test images.
        indices: Positions ``(n,)`` of each split's images in the official training set (test: in the test
            set).
        fingerprint: sha256 over the indices, the labels and a sample of the images.
    """

    name: str
    num_classes: int
    input_shape: tuple[int, int, int]
    preparation: Preparation
    class_names: tuple[str, ...] | None
    train: ImageSet
    calibration: ImageSet
    reward: ImageSet
    selection: ImageSet
    test: ImageSet
    indices: dict[str, NDArray[np.int64]]
    fingerprint: str

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean per channel that is subtracted, of pixels in [0, 1]."""
        return self.preparation.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel that is divided by, of pixels in [0, 1]."""
        return self.preparation.std

    def __getitem__(self, split: str) -> ImageSet:
        """Return a split by name."""
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        images: ImageSet = getattr(self, split)
        return images

    def save_indices(self, path: Path, *, argument: str = "path") -> None:
        """Write which images are in which split to an ``.npz`` file, replacing it in one step."""
        with replacing(path, argument=argument) as temporary:
            np.savez_compressed(temporary, allow_pickle=False, **self.indices)


def data_names() -> list[str]:
    """List the data sets that have a name (any ``.npz`` file or folder of images will do as well)."""
    return sorted(["digits", *TORCHVISION_SETS])


def default_data_root() -> Path:
    """Return the folder of named data sets: ``$PRUNEGYM_DATA``, else ``~/.cache/prunegym``."""
    return Path(os.environ.get("PRUNEGYM_DATA") or "~/.cache/prunegym").expanduser()


def load_data(
    name: str,
    *,
    data_root: Path | None = None,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    image_size: int | None = None,
    num_workers: int = 0,
    memory_limit: int = 2 << 30,
    download: bool = False,
) -> DataSplits:
    """Read a data set and cut it into five splits.

    Args:
        name: ``digits`` (embedded), a name of :func:`data_names`, an ``.npz`` file with ``x_train``,
            ``y_train``, ``x_test``, ``y_test``, or a folder: either of class folders, or with ``train`` and
            ``test`` (or ``val``).
        data_root: Where named data sets are: ``NAME.npz``, or torchvision's own layout. None takes
            :func:`default_data_root`.
        seed: Chooses the splits. The test set does not depend on it.
        sizes: Images in ``calibration``, ``reward``, ``selection`` and, to train on fewer, ``train``. By
            default at most 1024, 5000 and 5000, each at most 15 % of the training set, and the rest for
            ``train``.
        image_size: Side of the square images, pixels. None keeps arrays as they are, and files at most 64
            pixels large; larger files become 224.
        num_workers: Worker processes (threads while filling memory) that read image files.
        memory_limit: Bytes that decoded image files may take; beyond, they are read for each batch.
        download: Let torchvision fetch what is absent, as ``PRUNEGYM_DOWNLOAD=1`` does.

    Raises:
        PruningError: The data is unknown, absent, damaged, inconsistent or too small.
    """
    if image_size is not None and image_size < 1:
        raise PruningError(
            f"`image_size` should be at least 1 pixel. Received {image_size}. Leave it out to keep small images as "
            "they are."
        )
    source = with_test_set(_read_source(name, data_root or default_data_root(), download))
    num_classes = check_labels(name, source)
    count, labels = source.train_count or 0, torch.from_numpy(source.labels)
    indices = split_indices(source.labels[:count], seed, sizes)
    indices["test"] = stratified_order(source.labels[count:], np.random.default_rng(TEST_SEED))
    size = image_size or _natural_size(source)
    images = _fill_memory(name, source, size, num_workers, memory_limit)
    channels, height, width = images.shape[1:] if isinstance(images, Tensor) else (3, size, size)
    preparation = Preparation(
        _IMAGENET_MEAN if channels == 3 else (0.5,),
        _IMAGENET_STD if channels == 3 else (0.5,),
        crop_padding=height // 8,  # the customary 4 pixels of 32
        flip=source.flip,
    )
    sets: dict[str, ImageSet] = {}
    for split in SPLITS:
        chosen = indices[split] + (count if split == "test" else 0)
        if isinstance(images, Tensor):
            sets[split] = MemoryImages(images, labels, chosen, preparation)
        else:
            sets[split] = FileImages(images, labels, chosen, size, preparation, num_workers)
    known = name in data_names()
    return DataSplits(
        name=name if known else Path(name).resolve().stem,
        num_classes=num_classes,
        input_shape=(channels, height, width),
        preparation=preparation,
        class_names=source.class_names,
        indices=indices,
        fingerprint=_fingerprint(source, images, indices, preparation, height),
        **sets,
    )


def _read_source(name: str, root: Path, download: bool) -> Source:
    """Find out what ``name`` means and read it."""
    if name == "digits":
        return read_digits()
    if name in TORCHVISION_SETS:
        prepared = root / f"{name}.npz"
        if prepared.is_file():
            return replace(read_npz(prepared), flip=TORCHVISION_SETS[name].flip)
        return read_torchvision(name, root, download or os.environ.get("PRUNEGYM_DOWNLOAD") == "1")
    path = Path(name).expanduser()
    if path.is_dir():
        return read_folder(path)
    if path.suffix == ".npz":
        return read_npz(path)
    raise unknown_name("--data", name, data_names(), "Or give an existing .npz file or folder of images.")


def _natural_size(source: Source) -> int:
    """Side, in pixels, of the images when none is asked for; 0 leaves an array as it is."""
    if isinstance(source.images, Tensor):
        return 0
    try:
        width, height = source.images(0).size
    except IMAGE_ERRORS:
        return _DEFAULT_IMAGE_SIZE  # reading it again for its pixels reports the damage
    return width if width == height <= _SMALL_IMAGE else _DEFAULT_IMAGE_SIZE


def _fill_memory(name: str, source: Source, size: int, num_workers: int, memory_limit: int) -> Tensor | ImageReader:
    """Bring all images into memory at their final size, or return their reader if they do not fit."""
    reader = source.images
    if isinstance(reader, Tensor):
        return resize_all(reader, size) if size else reader
    count = len(source.labels)
    if count * 3 * size * size > memory_limit:
        return reader
    images = torch.empty((count, 3, size, size), dtype=torch.uint8)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        pixels = pool.map(lambda index: read_pixels(reader, index, size), range(count))
        # `disable=None` shows the bar on a terminal only
        for index, image in enumerate(tqdm(pixels, total=count, desc=f"reading {name}", disable=None)):
            images[index] = image
    return images


def _fingerprint(
    source: Source,
    images: Tensor | ImageReader,
    indices: Mapping[str, NDArray[np.int64]],
    preparation: Preparation,
    size: int,
) -> str:
    """Hash what decides the batches: splits, labels, preparation, and a sample of the images."""
    digest = hashlib.sha256(repr((preparation, size, source.train_count)).encode())
    for split in SPLITS:
        digest.update(indices[split].tobytes())
    digest.update(source.labels.tobytes())
    for index in np.linspace(0, len(source.labels) - 1, _FINGERPRINT_IMAGES).astype(int).tolist():
        pixels = images[index] if isinstance(images, Tensor) else read_pixels(images, index, size)
        digest.update(pixels.contiguous().numpy().tobytes())
    return digest.hexdigest()
