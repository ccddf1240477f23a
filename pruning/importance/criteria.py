"""The pool of importance criteria: a score for each channel of a group, higher = keep.

Every criterion keeps one contract, :data:`~prunegym.pruning.importance.context.Criterion`: it is given a prunable group
and a :class:`~prunegym.pruning.importance.context.Context` and returns a float array ``(group.size,)``. Scores are
comparable within a group. Those of the Taylor family are changes of the loss and comparable across groups too, which is
why the allocators use one of them.

=====================  ================================================================  ==========================
Criterion              Keeps the channel whose ...                                       Needs
=====================  ================================================================  ==========================
`l1`, `l2`             filters are large                                                 weights
`bn_scale`             batch normalisation scale is large                                weights
`fpgm`                 filters are far from all others                                   weights
`cosine`               filters point elsewhere than the most similar larger one          weights
`taylor`               reads change the loss, mean absolute                              statistics
`taylor_squared`       reads change the loss, mean square                                statistics
`residual_taylor`      residual on better channels changes the outputs, mean square      statistics
`taylor_weight`        making weights change the loss, mean square                       gradients of weights
`taylor_second`        making weights change the loss, to second order                   gradients of weights
`activation`           activation is large, mean absolute                                statistics
`activation_variance`  activation varies                                                 statistics
`apoz`                 activation is rarely zero                                         statistics
`group_attention`      gate stays open when gates are trained beside the frozen network  some training steps
`encoder_attention`    node the encoder of a trained policy attends to                   a policy file
`random`               number is large: the control                                      nothing
=====================  ================================================================  ==========================
"""

from __future__ import annotations

import numpy as np

from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.graph import ChannelGroup
from prunegym.pruning.importance.context import Calibration, Context, Criterion, Scores
from prunegym.pruning.importance.data_criteria import (
    activation,
    activation_variance,
    apoz,
    group_attention,
    residual_taylor,
    taylor,
    taylor_second,
    taylor_squared,
    taylor_weight,
)
from prunegym.pruning.importance.weight_criteria import bn_scale, cosine, filters, fpgm, l1, l2

__all__ = [
    "CRITERIA",
    "ENCODER_ATTENTION",
    "Calibration",
    "Context",
    "Criterion",
    "Scores",
    "filters",
    "unit_scores",
]

ENCODER_ATTENTION = "encoder_attention"


def encoder_attention(group: ChannelGroup, context: Context) -> Scores:
    """Where the encoder of a trained policy looks; the agent that looks is given with the context."""
    if ENCODER_ATTENTION not in context.given:
        raise PruningError(
            f"`criterion` {ENCODER_ATTENTION} needs a trained policy. Received none. Give --policy a file that "
            "`prunegym train` wrote (in Python, `policy` of prunegym.prune), or choose another criterion."
        )
    return context.given[ENCODER_ATTENTION](group, context)


def random(group: ChannelGroup, context: Context) -> Scores:
    """Random scores: the control that every criterion must beat."""
    rng = context.rng if context.rng is not None else np.random.default_rng([context.seed, group.start])
    return rng.random(group.size)


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "cosine": cosine,
    "taylor": taylor,
    "taylor_squared": taylor_squared,
    "residual_taylor": residual_taylor,
    "taylor_weight": taylor_weight,
    "taylor_second": taylor_second,
    "activation": activation,
    "activation_variance": activation_variance,
    "apoz": apoz,
    "group_attention": group_attention,
    ENCODER_ATTENTION: encoder_attention,
    "random": random,
}


def unit_scores(criterion: str, context: Context) -> Scores:
    """Scores of all units of a network ``(units,)``; units that are gone have 0.

    Raises:
        PruningError: no such criterion, it needs what is not there, or a score is not finite.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    groups = context.graph.groups
    scores = np.concatenate([np.empty(0), *(CRITERIA[criterion](group, context) for group in groups)])
    if not np.isfinite(scores).all():
        raise PruningError(
            f"`criterion` {criterion} should give finite scores. Received "
            f"{int((~np.isfinite(scores)).sum())} non-finite ones. Check the weights and the calibration "
            "data for NaN or infinity."
        )
    return scores if context.mask is None else np.where(context.mask, scores, 0.0)
