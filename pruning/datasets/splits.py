"""Stratified, disjoint splits of a data set's labels. Plain numpy: nothing here knows about images."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.errors import PruningError, unknown_name

SPLITS = ("train", "calibration", "reward", "selection", "test")
"""Train; statistics and BatchNorm; the searcher's reward; choice between plans; the final figure."""

#: Images per split that are enough, as (at most, share of the training set).
_DEFAULT_SIZES = {"calibration": (1024, 0.15), "reward": (5000, 0.15), "selection": (5000, 0.15)}
#: Reward images beyond so many are cut after the selection split, which therefore does not depend on their number.
_FIRST_REWARD = 2000


def stratified_order(labels: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Order examples at random so that every stretch of them holds the classes in proportion.

    Args:
        labels: ``(N,)``.
        rng: Source of the order within each class.

    Returns:
        A permutation ``(N,)``. Of any stretch of ``n``, class ``c`` has ``n * N_c / N`` examples, give or
        take one or two.
    """
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable").astype(np.int64)


def split_indices(
    labels: NDArray[np.int64], seed: int, sizes: Mapping[str, int] | None = None
) -> dict[str, NDArray[np.int64]]:
    """Cut a training set into disjoint, stratified splits.

    Args:
        labels: Of the training set, ``(N,)``.
        seed: Same seed, same splits.
        sizes: As in :func:`load_data`.

    Returns:
        Positions of the images of ``train``, ``calibration``, ``reward`` and ``selection``.
    """
    if seed < 0:
        raise PruningError(f"`seed` should be at least 0. Received {seed}. Use for instance 0.")
    count = len(labels)
    asked = dict(sizes or {})
    for split, size in asked.items():
        if split not in SPLITS[:-1]:
            raise unknown_name("sizes", split, SPLITS[:-1], "The test split is the official one, whole.")
        if size < 1:
            raise PruningError(f"`sizes` should be at least 1 image per split. Received {size} for '{split}'.")
    taken = {split: asked.get(split, min(most, int(count * share))) for split, (most, share) in _DEFAULT_SIZES.items()}
    left = count - sum(taken.values())
    taken["train"] = asked.get("train", left)
    if min(taken.values()) < 1 or taken["train"] > left:
        raise PruningError(
            f"`--data` should have enough training images for four disjoint splits. Received {count} images "
            f"for {', '.join(f'{size} {split}' for split, size in taken.items())}. Ask for smaller splits, "
            "or add images."
        )
    order = stratified_order(labels, np.random.default_rng(seed))
    first = min(taken["reward"], _FIRST_REWARD)
    ends = np.cumsum([taken["calibration"], first, taken["selection"], taken["reward"] - first, taken["train"]])
    calibration, reward, selection, more_reward, train, _ = np.split(order, ends)
    reward = np.concatenate([reward, more_reward])
    return {"calibration": calibration, "reward": reward, "selection": selection, "train": train}
