"""Where images come from: embedded digits, ``.npz`` files, folders of images, torchvision's data sets.

Each reader returns a :class:`Source`: all images of the official training and test sets, checked, but neither
split nor normalised.
"""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from prunegym.pruning.datasets.image_sets import ImageReader
from prunegym.pruning.datasets.splits import stratified_order
from prunegym.pruning.errors import PruningError

#: Endings that count as images in a folder.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
#: Names under which a folder may hold its test images.
_TEST_FOLDERS = ("test", "val", "valid", "validation")
#: Share of a data set without an official test set that becomes one, and the seed by which it is chosen:
#: always the same, whatever seed the splits are drawn with, so that no run trains on another run's test
#: images.
_TEST_SHARE = 0.2
TEST_SEED = 20_000
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Source:
    """All images of a data set, training images first.

    Args:
        images: uint8 ``(N, C, H, W)``, or a reader of one image by its number where they are on disk.
        labels: int64 ``(N,)``, unchecked.
        train_count: The first so many images are the official training set, the others the official test set;
            None where the data set has no official division.
        flip: Whether a mirrored image is still of its class (not so for digits).
        class_names: In label order, if known.
    """

    images: Tensor | ImageReader
    labels: NDArray[np.int64]
    train_count: int | None
    flip: bool
    class_names: tuple[str, ...] | None = None


def read_digits() -> Source:
    """Read scikit-learn's embedded handwritten digits: 1797 scans, 8x8, grey, 10 classes."""
    from sklearn.datasets import load_digits  # half a second to import, and only this data set wants it

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels to 256
    return Source(torch.from_numpy(pixels)[:, None], digits.target.astype(np.int64), None, flip=False)


def read_npz(path: Path) -> Source:
    """Read arrays ``x_train``, ``y_train``, ``x_test``, ``y_test`` (and, if there, ``class_names``).

    Images may be ``(N, H, W, C)``, ``(N, C, H, W)`` or ``(N, H, W)``, uint8 or float in [0, 1] (rounded to
    256 levels). Nothing is unpickled.

    Raises:
        PruningError: The file is absent, damaged or incomplete, or its arrays do not fit together.
    """
    arrays = _npz_arrays(path)
    images = {key: _as_images(path, key, arrays[key]) for key in ("x_train", "x_test")}
    labels = {key: as_labels(f"{path}: {key}", arrays[key]) for key in ("y_train", "y_test")}
    for part in ("train", "test"):
        count, wanted = len(labels[f"y_{part}"]), len(images[f"x_{part}"])
        if count != wanted:
            raise PruningError(
                f"`--data` should have one label per image. Received {path} with {wanted} images in x_{part} "
                f"and {count} labels in y_{part}. Write the file again."
            )
    if images["x_train"].shape[1:] != images["x_test"].shape[1:]:
        raise PruningError(
            f"`--data` should have training and test images of one shape. Received {path} with "
            f"{tuple(images['x_train'].shape[1:])} and {tuple(images['x_test'].shape[1:])} (channels, "
            "height, width). Resize one of them."
        )
    names = arrays.get("class_names")
    return Source(
        torch.cat([images["x_train"], images["x_test"]]),
        np.concatenate([labels["y_train"], labels["y_test"]]),
        len(images["x_train"]),
        flip=images["x_train"].shape[1] == 3,
        class_names=None if names is None else tuple(str(name) for name in names),
    )


def _npz_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Load the arrays of a file, refusing pickled ones."""
    if not path.is_file():
        raise PruningError(f"`--data` should be an existing file. Received {path}, which is not there. Check the path.")
    try:
        # opened here, because numpy leaves a damaged file open
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in _NPZ_KEYS if key not in archive.files]
            if missing:
                raise PruningError(
                    f"`--data` should hold the arrays {', '.join(_NPZ_KEYS)}. Received {path} without "
                    f"{', '.join(missing)} (it has: {', '.join(archive.files) or 'nothing'}). Add them."
                )
            return {key: archive[key] for key in (*_NPZ_KEYS, "class_names") if key in archive.files}
    except PruningError:
        raise
    # AttributeError: a bare .npy array has no `files`, nor a `with` block
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise PruningError(
            f"`--data` should be a readable .npz of plain arrays. Received {path}: {error}. "
            "The file is damaged or holds pickled objects: write it again with numpy.savez."
        ) from error


def _as_images(path: Path, key: str, array: NDArray[np.generic]) -> Tensor:
    """Check an array of images and lay it out as uint8 ``(N, C, H, W)``."""
    received = f"Received {path} with {key} of shape {array.shape} and type {array.dtype}"
    where = f"`--data` should hold images. {received}"
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[3] in (1, 3):
        array = array.transpose(0, 3, 1, 2)
    if array.ndim != 4 or array.shape[1] not in (1, 3) or 0 in array.shape:
        raise PruningError(
            f"{where}. Give at least one, as (N, H, W, C), (N, C, H, W) or (N, H, W) with 1 or 3 channels."
        )
    if np.issubdtype(array.dtype, np.floating):
        array = _float_to_bytes(where, np.asarray(array, dtype=np.float32))
    if array.dtype != np.uint8:
        raise PruningError(f"{where}. Store them as uint8, or as floats in [0, 1].")
    return torch.from_numpy(np.ascontiguousarray(array))


def _float_to_bytes(where: str, array: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Turn floats in [0, 1] into 256 levels."""
    if not np.isfinite(array).all():
        raise PruningError(
            f"{where}, {np.count_nonzero(~np.isfinite(array))} values of which are not finite. Repair them."
        )
    low, high = float(array.min()), float(array.max())
    if low < 0 or high > 1:
        raise PruningError(
            f"{where} and values in [{low:g}, {high:g}]. Floats should be in [0, 1]: rescale, or store uint8."
        )
    return np.round(array * 255).astype(np.uint8)


def as_labels(where: str, array: NDArray[np.generic]) -> NDArray[np.int64]:
    """Check the form of labels: integers, ``(N,)`` or ``(N, 1)``.

    Args:
        where: Named in the error.
        array: What was read.

    Returns:
        int64 ``(N,)``.
    """
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]  # as Keras stores CIFAR
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise PruningError(
            f"`--data` should have one integer label per image. Received {where} of shape {array.shape} and "
            f"type {array.dtype}. Store class numbers 0, 1, 2, ... as integers of shape (N,)."
        )
    return array.astype(np.int64)


@dataclass(frozen=True)
class _PathReader:
    """Opens the image files of a folder."""

    paths: tuple[Path, ...]

    def __call__(self, index: int) -> Image.Image:
        path = self.paths[index]
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except OSError as error:
            # a damaged file's own message does not name it
            raise OSError(f"{path}: {error}") from error


def read_folder(path: Path) -> Source:
    """Read a folder of class folders, or one with ``train`` and ``test`` (or ``val``) folders of those.

    Raises:
        PruningError: There are no classes or no images, or the test classes are not among the training
            classes.
    """
    train = path / "train"
    if not train.is_dir():
        classes, paths, labels = _class_folders(path, None)
        return Source(_PathReader(paths), labels, None, flip=True, class_names=classes)
    test = next((path / name for name in _TEST_FOLDERS if (path / name).is_dir()), None)
    if test is None:
        raise PruningError(
            f"`--data` should have a folder 'test' or 'val' beside 'train'. Received {path} without one. "
            f"Add it, or pass {train}, of which a fifth then becomes the test set."
        )
    classes, paths, labels = _class_folders(train, None)
    _, test_paths, test_labels = _class_folders(test, classes)
    every_label = np.concatenate([labels, test_labels])
    return Source(_PathReader(paths + test_paths), every_label, len(paths), flip=True, class_names=classes)


def _class_folders(
    path: Path, classes: tuple[str, ...] | None
) -> tuple[tuple[str, ...], tuple[Path, ...], NDArray[np.int64]]:
    """List the images of a folder of class folders, with their labels; ``classes`` fixes the label order."""
    found = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")))
    strangers = [] if classes is None else sorted(set(found) - set(classes))
    if strangers:
        raise PruningError(
            f"`--data` should have the same classes for training and test. Received {path} with "
            f"'{strangers[0]}', which has no training images. Remove it, or add them."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(found if classes is None else classes):
        files = sorted(file for file in (path / name).rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
        if not files and classes is None:
            raise PruningError(
                f"`--data` should have images in every class folder. Received {path / name} without one "
                f"({', '.join(IMAGE_ENDINGS)}). Add some, or remove the folder."
            )
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise PruningError(
            f"`--data` should be a folder with one sub-folder of images per class. Received {path}, which "
            "has none. Check the path."
        )
    return classes or found, tuple(paths), np.array(labels, dtype=np.int64)


def resize_all(images: Tensor, size: int) -> Tensor:
    """Scale uint8 ``(N, C, H, W)`` to ``(N, C, size, size)``, a thousand at a time to save memory."""
    if tuple(images.shape[2:]) == (size, size):
        return images
    parts = []
    for part in images.split(1000):
        scaled = F.interpolate(part.float(), size=(size, size), mode="bilinear", antialias=True)
        parts.append(scaled.round_().clamp_(0, 255).to(torch.uint8))
    return torch.cat(parts)


def with_test_set(source: Source) -> Source:
    """Give a data set without an official test set a stratified one, always the same, at its end."""
    if source.train_count is not None:
        return source
    order = stratified_order(source.labels, np.random.default_rng(TEST_SEED))
    test_count = max(1, round(len(order) * _TEST_SHARE))
    order = np.concatenate([np.sort(order[test_count:]), np.sort(order[:test_count])])
    images = source.images
    reordered = images[torch.from_numpy(order)] if isinstance(images, Tensor) else _Reordered(images, order)
    return replace(source, images=reordered, labels=source.labels[order], train_count=len(order) - test_count)


@dataclass(frozen=True)
class _Reordered:
    """Opens image ``order[i]`` of another reader."""

    read: ImageReader
    order: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        return self.read(int(self.order[index]))


def check_labels(name: str, source: Source) -> int:
    """Check that training labels are 0 to K - 1 without gaps and test labels among them; return K."""
    count = source.train_count or 0
    train, test = source.labels[:count], source.labels[count:]
    if not len(train) or not len(test):
        raise PruningError(
            f"`--data` should have training and test images. Received {name} with {len(train)} and "
            f"{len(test)}. Add some."
        )
    lowest, highest = int(source.labels.min()), int(train.max())
    if lowest < 0:
        raise PruningError(
            f"`--data` should have labels from 0 up. Received {name} with label {lowest}. Renumber them."
        )
    absent = np.setdiff1d(np.arange(highest + 1), train) if highest < len(train) else np.array([-1])
    if len(absent):
        raise PruningError(
            "`--data` should have training images of every class from 0 to the highest label. Received "
            f"{name} with labels up to {highest} but {len(np.unique(train))} classes in {len(train)} images. "
            "Renumber the labels without gaps."
        )
    if highest < 1:
        raise PruningError(
            f"`--data` should have at least 2 classes. Received {name} with 1. Add images of another class."
        )
    if int(test.max()) > highest:
        raise PruningError(
            f"`--data` should have test labels that occur in training. Received {name} with test label "
            f"{int(test.max())} and training labels up to {highest}. Remove those test images, or add "
            "training images."
        )
    return highest + 1
