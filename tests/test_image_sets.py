import pytest
import torch

from prunegym.pruning.data import DataSplits, load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.image_sets import Preparation, random_shift


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


def test_random_shift_matches_a_crop_of_each_image() -> None:
    """The vectorised crop does what a loop over images would do."""
    images = torch.randint(0, 256, (9, 3, 6, 5), generator=generator(0), dtype=torch.uint8)

    shifted = random_shift(images, 2, generator(1))

    down, right = torch.randint(0, 5, (2, 9), generator=generator(1)).tolist()
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, expected, y, x in zip(shifted, padded, down, right, strict=True):
        assert torch.equal(image, expected[:, y : y + 6, x : x + 5])


def test_flip_mirrors_about_half_of_the_images() -> None:
    """Each image is either itself or its mirror image."""
    images = torch.arange(4, dtype=torch.uint8).expand(200, 1, 1, 4)
    preparation = Preparation((0.5,), (0.5,), crop_padding=0, flip=True)

    flipped = preparation.augment(images, generator(0))

    mirrored = (flipped == images.flip(3)).all(dim=3)
    assert ((flipped == images).all(dim=3) ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": 4, "limit": 0}])
def test_empty_batches_are_rejected(digits: DataSplits, options: dict[str, int]) -> None:
    """Zero images would silently give no score at all."""
    with pytest.raises(PruningError, match="should be at least 1"):
        next(digits.train.batches(**options))
