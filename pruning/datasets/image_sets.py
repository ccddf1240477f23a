"""Sets of labelled images, batch by batch: held in memory where they fit, read by workers where they do not.

Shapes: ``B`` images, ``C`` channels, ``H``, ``W`` pixels. Images are kept as uint8 and normalised per batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunegym.pruning.errors import PruningError

#: What Pillow raises for a file that is cut off, damaged, not an image, or absurdly large.
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
#: Random resized crops of images that are read file by file: share of the area, and limits of width / height.
_CROP_AREA = (0.35, 1.0)
_CROP_ASPECT = (3 / 4, 4 / 3)
#: Short side before the central crop, as a multiple of the crop: 256 for 224, as torchvision's weights
#: expect.
_RESIZE = 256 / 224


#: Every batch of a pass.
ALL_BATCHES = slice(None)


@dataclass(frozen=True)
class Preparation:
    """How stored pixels become network inputs.

    Args:
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
        crop_padding: Pixels of black border within which training images are shifted; 0 shifts nothing.
        flip: Mirror half of the training images left to right.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int
    flip: bool

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 ``(B, C, H, W)`` into float32 of about zero mean and unit variance."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return images.float().div_(255.0).sub_(mean).div_(std)

    def draw(self, count: int, generator: torch.Generator | None) -> "Changes":
        """Draw how so many training images are changed."""
        shifts = mirrored = None
        if self.crop_padding:
            shifts = torch.randint(0, 2 * self.crop_padding + 1, (2, count), generator=generator)
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
        return Changes(shifts, mirrored)

    def augment(self, images: Tensor, changes: "Changes") -> Tensor:
        """Shift, then mirror, each of the uint8 images ``(B, C, H, W)`` as drawn."""
        if changes.shifts is not None:
            images = shift_images(images, self.crop_padding, changes.shifts)
        if changes.mirrored is not None:
            mirrored = changes.mirrored.to(images.device).view(-1, 1, 1, 1)
            images = torch.where(mirrored, images.flip(3), images)
        return images


@dataclass(frozen=True)
class Changes:
    """How the training images of a batch are changed.

    Args:
        shifts: ``(2, B)``, pixels down and right in the padded image; None shifts nothing.
        mirrored: ``(B,)``, which are mirrored; None mirrors nothing.
    """

    shifts: Tensor | None
    mirrored: Tensor | None


def shift_images(images: Tensor, padding: int, shifts: Tensor) -> Tensor:
    """Crop each image at a place of its own in its zero-padded self.

    Args:
        images: ``(B, C, H, W)``.
        padding: Border added on each side, pixels.
        shifts: ``(2, B)``, pixels down and right, from 0 to ``2 * padding``; ``padding`` leaves an image in place.

    Returns:
        ``(B, C, H, W)``, each image shifted by up to ``padding`` pixels each way.
    """
    height, width = images.shape[2:]
    padded = F.pad(images, (padding, padding, padding, padding))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (B, C, 2p+1, 2p+1, H, W)
    down, right = shifts.to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, down, right]


class ImageSet(Protocol):
    """Labelled images in a fixed order."""

    def __len__(self) -> int:
        """Count the images."""

    def batches(
        self,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        wanted: slice = ALL_BATCHES,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through the images.

        Args:
            batch_size: Images per batch; the last batch may be smaller.
            limit: Only the first so many images. The order is seeded and mixes the classes, so ``limit=1000``
                is always the same mixed thousand.
            shuffle: New random order (of the images within ``limit``).
            augment: Random shifts and mirroring as the data set allows.
            drop_last: Leave out an incomplete last batch, unless it is the only one.
            generator: CPU generator for order and augmentation; None uses torch's global one.
            device: Where to put the batches.
            wanted: Which of the batches to give. The generator goes on as if all had been given, and what is left out
                is not read: a training resumes in the middle of a pass, and devices share one.

        Yields:
            Images ``(B, C, H, W)`` float32, normalised, and classes ``(B,)`` int64.
        """


def _order(
    count: int,
    batch_size: int,
    limit: int | None,
    shuffle: bool,
    drop_last: bool,
    generator: torch.Generator | None,
) -> list[Tensor]:
    """Positions ``(B,)`` of the images of each batch."""
    if batch_size < 1:
        raise PruningError(f"`batch_size` should be at least 1. Received {batch_size}. Use for instance 128.")
    if limit is not None and limit < 1:
        raise PruningError(f"`limit` should be at least 1, or None for all images. Received {limit}.")
    used = count if limit is None else min(count, limit)
    order = torch.randperm(used, generator=generator) if shuffle else torch.arange(used)
    batches = list(order.split(batch_size))
    if drop_last and len(batches) > 1 and len(batches[-1]) < batch_size:
        batches.pop()
    return batches


class MemoryImages:
    """Images held as one uint8 tensor; several sets may share it.

    Args:
        images: uint8 ``(N, C, H, W)``, all images of the data set.
        labels: int64 ``(N,)``.
        indices: Which of them belong to this set, in which order: ``(n,)``.
        preparation: Normalisation and augmentation.
    """

    def __init__(self, images: Tensor, labels: Tensor, indices: NDArray[np.int64], preparation: Preparation) -> None:
        self._images = images
        self._labels = labels
        self._indices = torch.from_numpy(indices)
        self._preparation = preparation

    def __len__(self) -> int:
        """Count the images."""
        return len(self._indices)

    def batches(
        self,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        wanted: slice = ALL_BATCHES,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through the images; see :meth:`ImageSet.batches`."""
        order = _order(len(self), batch_size, limit, shuffle, drop_last, generator)
        given = set(range(len(order))[wanted])
        for number, positions in enumerate(order):
            changes = self._preparation.draw(len(positions), generator) if augment else None
            if number in given:
                chosen = self._indices[positions]
                images = self._images[chosen].to(device)
                images = images if changes is None else self._preparation.augment(images, changes)
                yield self._preparation.normalise(images), self._labels[chosen].to(device)


ImageReader = Callable[[int], Image.Image]
"""Opens image ``i`` of a data set. Workers receive a copy, so it must be picklable."""


def read_pixels(read: ImageReader, index: int, size: int, seed: int | None = None, flip: bool = False) -> Tensor:
    """Read one image and cut it to a square.

    Args:
        read: Opens an image.
        index: Which one.
        size: Side of the result, pixels.
        seed: Cut at random from this seed; None takes the centre.
        flip: Also mirror half of the images that are cut at random.

    Returns:
        uint8 ``(3, size, size)``.

    Raises:
        PruningError: The file cannot be read as an image.
    """
    try:
        picture = read(index).convert("RGB")
    except IMAGE_ERRORS as error:
        raise PruningError(
            f"`--data` should hold readable images. Received image {index}: {error}. Remove or replace that file."
        ) from error
    picture = _central_square(picture, size) if seed is None else _random_square(picture, size, seed, flip)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _central_square(picture: Image.Image, size: int) -> Image.Image:
    """Scale the short side, then cut out the middle. An image that already fits is returned as it is."""
    if picture.size == (size, size):
        return picture
    short = size if min(picture.size) <= size else round(size * _RESIZE)
    scale = short / min(picture.size)
    width, height = (max(size, round(side * scale)) for side in picture.size)
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _random_square(picture: Image.Image, size: int, seed: int, flip: bool) -> Image.Image:
    """Cut out a random part, scale it to the square, and mirror it half of the time if ``flip``."""
    rng = np.random.default_rng(seed)
    area = picture.width * picture.height * rng.uniform(*_CROP_AREA)
    aspect = float(np.exp(rng.uniform(*np.log(_CROP_ASPECT))))
    width = min(picture.width, max(1, round((area * aspect) ** 0.5)))
    height = min(picture.height, max(1, round((area / aspect) ** 0.5)))
    left = int(rng.integers(0, picture.width - width + 1))
    top = int(rng.integers(0, picture.height - height + 1))
    box = (left, top, left + width, top + height)
    cut = picture.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip and rng.random() < 0.5 else cut


@dataclass(frozen=True)
class _Files(Dataset[Tensor | str]):
    """Pixels by (position, seed). A failure comes back as its message: a worker's exceptions get wrapped."""

    read: ImageReader
    size: int
    flip: bool

    def __getitem__(self, key: tuple[int, int | None]) -> Tensor | str:
        try:
            return read_pixels(self.read, key[0], self.size, key[1], self.flip)
        except PruningError as error:
            return str(error)


def _collate(items: list[Tensor | str]) -> Tensor | str:
    """Stack images to ``(B, 3, H, W)``, or pass on the first failure."""
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack([item for item in items if isinstance(item, Tensor)])


class FileImages:
    """Images read from their files for each batch, by worker processes if wanted.

    Each augmented image draws from its own seed, so the result does not depend on the number of workers.

    Args:
        read: Opens image ``i``.
        labels: int64 ``(N,)``.
        indices: Which images belong to this set, in which order: ``(n,)``.
        size: Side of the square images, pixels.
        preparation: Normalisation. (Augmentation is a random resized crop here, mirrored if ``flip``.)
        num_workers: Worker processes; 0 reads in this one.
    """

    def __init__(
        self,
        read: ImageReader,
        labels: Tensor,
        indices: NDArray[np.int64],
        size: int,
        preparation: Preparation,
        num_workers: int,
    ) -> None:
        self._files = _Files(read, size, preparation.flip)
        self._labels = labels
        self._indices = torch.from_numpy(indices)
        self._preparation = preparation
        self._num_workers = num_workers

    def __len__(self) -> int:
        """Count the images."""
        return len(self._indices)

    def batches(
        self,
        batch_size: int,
        *,
        limit: int | None = None,
        shuffle: bool = False,
        augment: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        wanted: slice = ALL_BATCHES,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go once through the images; see :meth:`ImageSet.batches`."""
        order = _order(len(self), batch_size, limit, shuffle, drop_last, generator)
        chosen = [self._indices[positions] for positions in order]
        keys: list[list[tuple[int, int | None]]] = []
        for batch in chosen:  # all of them, for the generator's sake
            draws = torch.randint(0, 2**31, (len(batch),), generator=generator).tolist() if augment else None
            keys.append(list(zip(batch.tolist(), draws or [None] * len(batch), strict=True)))
        chosen = chosen[wanted]
        loader = DataLoader(
            self._files,
            batch_sampler=keys[wanted],
            num_workers=self._num_workers,
            collate_fn=_collate,
            # else the loader would draw its base seed from torch's global generator
            generator=torch.Generator(),
        )
        for batch, images in zip(chosen, _received(loader), strict=True):
            yield self._preparation.normalise(images.to(device)), self._labels[batch].to(device)


def _received(loader: "DataLoader[Tensor | str]") -> Iterator[Tensor]:
    """Batches of pixels, with a worker's failure turned into an error of ours."""
    try:
        for item in loader:
            if isinstance(item, str):
                raise PruningError(item)
            yield item
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise PruningError(
            f"`num_workers` should be workers that live. Received {loader.num_workers}, one of which ended: "
            f"{error}. Use fewer workers or smaller images (memory is the usual cause), or 0 workers."
        ) from error
