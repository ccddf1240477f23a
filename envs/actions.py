"""From actions to keep ratios and back: pure functions.

An action in ``[-1, 1]`` is a scaled logit of the keep ratio, so that equal steps of the action matter equally
near "keep all" and near "keep nothing"; its ends are exactly 0 and 1.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

REACH = 5.0
"""Logit of the keep ratio at action 1, before the ends are stretched to 0 and 1."""
_LOW = 1 / (1 + np.exp(REACH))


def keep_ratios(action: NDArray[np.floating]) -> NDArray[np.float64]:
    """Keep ratio asked by each component of an action.

    Args:
        action: ``(groups,)``; values outside [-1, 1] are clipped.

    Returns:
        ``(groups,)`` in [0, 1].
    """
    logits = REACH * np.clip(action.astype(np.float64), -1, 1)
    ratios: NDArray[np.float64] = np.clip((1 / (1 + np.exp(-logits)) - _LOW) / (1 - 2 * _LOW), 0, 1)
    return ratios


def pruning_ratios(action: NDArray[np.floating]) -> NDArray[np.float64]:
    """Pruning ratio (removed / all) asked by each component of an action ``(groups,)``."""
    return 1 - keep_ratios(action)


def action_for(keep: NDArray[np.floating]) -> NDArray[np.float32]:
    """The action that asks for given keep ratios ``(groups,)``: the inverse of :func:`keep_ratios`."""
    inner = np.clip(keep.astype(np.float64), 0, 1) * (1 - 2 * _LOW) + _LOW
    action: NDArray[np.float64] = np.clip(np.log(inner / (1 - inner)) / REACH, -1, 1)
    return action.astype(np.float32)
