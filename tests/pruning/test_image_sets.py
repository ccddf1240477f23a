from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prunegym.pruning.datasets.data import DataSplits, load_data
from prunegym.pruning.datasets.image_sets import Changes, FileImages, Preparation, shift_images
from prunegym.pruning.errors import PruningError


@pytest.fixture(scope="module")
def digits() -> DataSplits:
    """The embedded data set."""
    return load_data("digits")


def generator(seed: int) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def test_limit_is_a_fixed_mixed_prefix(digits: DataSplits) -> None:
    """The same images each time, also when shuffled, with all classes among them."""
    first = list(digits.reward.batches(16, limit=40))
    shuffled = digits.reward.batches(40, limit=40, shuffle=True, generator=generator(3))

    labels = torch.cat([labels for _, labels in first])
    assert [len(labels) for _, labels in first] == [16, 16, 8]
    assert labels.bincount().tolist() == [4] * 10
    assert torch.equal(next(shuffled)[1].sort().values, labels.sort().values)


def test_incomplete_batch_is_dropped_only_if_another_is_left(digits: DataSplits) -> None:
    """Batch norm cannot train on a last batch of one image."""
    assert [len(y) for _, y in digits.reward.batches(20, limit=41, drop_last=True)] == [20, 20]
    assert [len(y) for _, y in digits.reward.batches(20, limit=7, drop_last=True)] == [7]


def test_augmentation_follows_the_generator(digits: DataSplits) -> None:
    """Same generator, same images; another one, others; none without augmentation."""

    def draw(seed: int) -> torch.Tensor:
        return torch.cat([x for x, _ in digits.reward.batches(16, augment=True, generator=generator(seed))])

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert not torch.equal(draw(0), torch.cat([x for x, _ in digits.reward.batches(16)]))


def test_shift_matches_a_crop_of_each_image() -> None:
    """The vectorised crop does what a loop over images would do."""
    images = torch.randint(0, 256, (9, 3, 6, 5), generator=generator(0), dtype=torch.uint8)

    shifts = torch.randint(0, 5, (2, 9), generator=generator(1))

    shifted = shift_images(images, 2, shifts)

    down, right = shifts.tolist()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, expected, y, x in zip(shifted, padded, down, right, strict=True):
        assert torch.equal(image, expected[:, y : y + 6, x : x + 5])


def test_flip_mirrors_about_half_of_the_images() -> None:
    """Each image is either itself or its mirror image."""
    images = torch.arange(4, dtype=torch.uint8).expand(200, 1, 1, 4)
    preparation = Preparation((0.5,), (0.5,), crop_padding=0, flip=True)

    flipped = preparation.augment(images, preparation.draw(200, generator(0)))

    mirrored = (flipped == images.flip(3)).all(dim=3)
    assert ((flipped == images).all(dim=3) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_changes_are_drawn_in_the_range_of_the_border() -> None:
    """Each image may stay in place, and none leaves its border; what is not asked for is not drawn."""
    changes = Preparation((0.5,), (0.5,), crop_padding=1, flip=False).draw(200, generator(0))

    assert changes.shifts is not None
    assert changes.shifts.unique().tolist() == [0, 1, 2]
    assert changes.mirrored is None
    assert Preparation((0.5,), (0.5,), crop_padding=0, flip=False).draw(3, None) == Changes(None, None)


@pytest.mark.parametrize("wanted", [slice(2, None), slice(0, 4, 2), slice(1, 4, 2), slice(9, None)])
@pytest.mark.parametrize("kind", ["memory", "files"])
def test_wanted_batches_are_those_of_a_whole_pass(digits: DataSplits, kind: str, wanted: slice, tmp_path: Path) -> None:
    """Order and augmentation included, and the generator ends where it would have ended."""
    images = digits.train if kind == "memory" else file_images(tmp_path)
    options: Any = {"limit": 40, "shuffle": True, "augment": True, "drop_last": True}
    whole, part = generator(3), generator(3)

    everything = list(images.batches(8, generator=whole, **options))
    some = list(images.batches(8, generator=part, wanted=wanted, **options))

    expected = everything[wanted]
    assert len(some) == len(expected)
    for (x, y), (a, b) in zip(some, expected, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)
    assert torch.equal(whole.get_state(), part.get_state())


def file_images(folder: Path) -> FileImages:
    """Forty images of noise on disk."""
    rng = np.random.default_rng(0)
    for index in range(40):
        Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    preparation = Preparation((0.5,) * 3, (0.5,) * 3, crop_padding=1, flip=True)
    return FileImages(
        lambda index: Image.open(folder / f"{index}.png"),
        torch.arange(40),
        np.arange(40),
        size=8,
        preparation=preparation,
        num_workers=0,
    )


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "limit": 0}])
def test_empty_batches_are_rejected(digits: DataSplits, options: dict[str, int]) -> None:
    """Zero images would silently give no score at all."""
    with pytest.raises(PruningError, match="should be at least 1"):
        next(digits.train.batches(**options))
