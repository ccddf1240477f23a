"""Exponential moving averages of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

#: In the beginning an average would mostly be of the first weights: after ``n`` updates its decay is at most
#: ``(1 + n) / (10 + n)``, as in TensorFlow's ExponentialMovingAverage.
_SOONEST, _LATEST = 1, 10


class WeightAverage:
    r"""Exponential moving average of the weights of a network, and of its batch normalisation statistics.

    .. math:: \bar w_{n+1} = d_n \bar w_n + (1 - d_n) w_{n+1}, \quad d_n = \min(d, (1 + n) / (10 + n))

    PyTorch's ``use_buffers=True`` is not used: it would average every buffer, which rounds whole numbers down (index
    tables of windowed attention) and makes NaN of infinities (attention masks). Here running means and variances are
    averaged like weights, and all other buffers are those of the network.

    Args:
        model: The network; it is copied.
        decay: :math:`d`, in (0, 1).

    References:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._average = AveragedModel(model, multi_avg_fn=self._blend)
        self._statistics = [
            buffer
            for module in self.network.modules()
            if isinstance(module, _BatchNorm) and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self._average.module

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take the weights of the network after a step into account; the first time they are taken over."""
        before = [buffer.clone() for buffer in self._statistics]
        self._average.update_parameters(model)  # buffers too, as they are
        if before and self.updates:
            torch._foreach_lerp_(self._statistics, before, self._decay)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that :meth:`load_state_dict` needs: tensors and numbers."""
        return {"updates": self.updates, "network": self.network.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another average was."""
        self.updates = state["updates"]
        self._average.n_averaged.fill_(self.updates)
        self.network.load_state_dict(state["network"])

    @property
    def _decay(self) -> float:
        """Decay of the next update."""
        return min(self.decay, (_SOONEST + self.updates) / (_LATEST + self.updates))

    def _blend(self, averages: Any, current: Any, _: Tensor | int) -> None:
        """Move averages of parameters towards the parameters."""
        get_ema_multi_avg_fn(self._decay)(averages, current, self.updates)
