"""Criteria that look at data: activations, and changes of the loss when a channel goes."""

from __future__ import annotations

from prunegym.pruning.graph import ChannelGroup
from prunegym.pruning.importance.context import Context, Scores
from prunegym.pruning.importance.group_attention import mean_gates
from prunegym.pruning.importance.weight_changes import WeightChanges, collect_weight_changes


def taylor(group: ChannelGroup, context: Context) -> Scores:
    """Mean absolute first-order change of the loss on removal, by what reads the channel.

    References:
        Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017.
    """
    return context.data("taylor").taylor[group.units].copy()


def taylor_squared(group: ChannelGroup, context: Context) -> Scores:
    """Mean squared first-order change of the loss on removal, by what reads the channel.

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. Half of it is the
        Fisher information of a gate on the channel: Liu et al., "Group Fisher Pruning for Practical Network
        Compression", ICML 2021.
    """
    return context.data("taylor_squared").taylor_squared[group.units].copy()


def residual_taylor(group: ChannelGroup, context: Context) -> Scores:
    """Change of the outputs when what better channels cannot replace is lost, see :mod:`.residuals`."""
    return context.data("residual_taylor").residual_taylor[group.units].copy()


def taylor_weight(group: ChannelGroup, context: Context) -> Scores:
    r"""Mean absolute first-order change of the loss on removal, by the weights that make the channel.

    .. math:: E_b \Big| \sum_{s \in making} g_{bs} w_s \Big|

    The sum, taken before the absolute value, goes over the weights that make the channel, of all producers,
    with batch normalisation folded into them: filters, biases, and shifts less what the running mean takes
    off. For a convolution with batch normalisation this equals gradient times weight of scale plus that of
    shift. Simply adding up all parameters that go with a channel counts its filters twice, as they are and in
    the scale, and the constant that the running mean takes off drowns the rest: on ResNet-20 such scores were
    no better than random ones. For the same reason depthwise filters on the way are not counted.

    The weights that *read* the channel are not added either. Where all between is homogeneous (ReLU, pooling,
    sums), they say the same as those that make it, and this is :func:`taylor` but for the size of the batches
    :math:`b`. Elsewhere (SiLU, squeeze and excitation, sigmoid) the two differ.

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, who square.
    """
    return _changes(context, "taylor_weight").first[group.units].copy()


def taylor_second(group: ChannelGroup, context: Context) -> Scores:
    r"""Change of the loss on removal to second order, by the weights that read the channel.

    .. math:: E_n \Big| \sum_{s \in reading} g_{ns} w_s \Big| + \frac 1 2 \sum_{s \in reading} h_s w_s^2,
        \quad h_s = E_n [ g_{ns}^2 ]

    To set these weights to 0 is what removal does. The first term is :func:`taylor`: with the sign that a
    Taylor series has, what some examples gain and others lose would cancel, and channels that matter would
    look free (networks pruned that way were far worse). The curvature :math:`h` is the diagonal of the
    empirical Fisher information, which is near that of the Hessian where the network fits its data and takes
    no second derivatives. It is estimated from gradients of small batches, see
    :func:`~prunegym.pruning.importance.weight_changes.mean_square`.

    References:
        LeCun et al., "Optimal Brain Damage", NeurIPS 1990; Theis et al., "Faster Gaze Prediction with Dense
        Networks and Fisher Pruning", 2018.
    """
    second = _changes(context, "taylor_second").second[group.units]
    scores: Scores = context.data("taylor_second").taylor[group.units] + second
    return scores


def activation(group: ChannelGroup, context: Context) -> Scores:
    """Mean absolute activation where the channel is read."""
    return context.data("activation").activation_mean[group.units].copy()


def activation_variance(group: ChannelGroup, context: Context) -> Scores:
    """Variance of the activation over examples and positions, where the channel is read.

    A channel that is the same everywhere can be folded into the next layer's bias.
    """
    return context.data("activation_variance").activation_variance[group.units].copy()


def apoz(group: ChannelGroup, context: Context) -> Scores:
    """Share of activations that are not 0 where the channel is read: 1 - APoZ, so that higher = keep.

    It tells channels apart behind ReLU only; other activations are hardly ever exactly 0.

    References:
        Hu et al., "Network Trimming: A Data-Driven Neuron Pruning Approach towards Efficient Deep
        Architectures", 2016.
    """
    scores: Scores = 1 - context.data("apoz").activation_sparsity[group.units]
    return scores


def group_attention(group: ChannelGroup, context: Context) -> Scores:
    """Mean gate that an attention module, trained for a moment beside the frozen network, gives the channel.

    See :mod:`prunegym.pruning.importance.group_attention`.
    """
    calibration = context.examples("group_attention")
    return context.once("group_attention", lambda: mean_gates(context, calibration))[group.units].copy()


def _changes(context: Context, criterion: str) -> WeightChanges:
    calibration = context.examples(criterion)
    return context.once("weight_changes", lambda: collect_weight_changes(context, calibration))
