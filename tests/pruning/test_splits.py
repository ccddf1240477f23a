import numpy as np
import pytest

from prunegym.pruning.datasets.splits import split_indices, stratified_order


def test_default_sizes_when_the_set_is_large() -> None:
    """The caps hold, and train gets the rest."""
    sizes = {split: len(indices) for split, indices in split_indices(np.arange(50_000) % 10, seed=0).items()}

    assert sizes == {"calibration": 1024, "reward": 5000, "selection": 5000, "train": 38_976}


def test_selection_split_does_not_depend_on_the_number_of_reward_images() -> None:
    """Searches with more reward images are still compared on the same selection images."""
    labels = np.arange(50_000) % 10

    few, many = (split_indices(labels, seed=0, sizes={"reward": size}) for size in (2000, 6000))

    assert np.array_equal(few["selection"], many["selection"])
    assert np.array_equal(few["reward"], many["reward"][:2000])
    assert len(np.intersect1d(many["reward"], np.concatenate([many["selection"], many["train"]]))) == 0


@pytest.mark.parametrize("stretch", [slice(0, 100), slice(137, 237)])
def test_stratified_order_mixes_the_classes_in_every_stretch(stretch: slice) -> None:
    """A prefix is as good a sample as the whole, also of unequal classes."""
    labels = np.repeat([0, 1, 2], [600, 300, 100])

    order = stratified_order(labels, np.random.default_rng(0))

    assert np.array_equal(np.sort(order), np.arange(1000))
    assert np.abs(np.bincount(labels[order[stretch]]) - [60, 30, 10]).max() <= 2
