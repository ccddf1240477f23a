"""Toy networks, tasks and scorers whose right answers are known."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.importance.criteria import Context, unit_scores
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.cifar import ZeroPadShortcut
from prunegym.pruning.networks.zoo import build_network, input_shape_of
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, ScorerSettings

CLASSES = 5


class Residual(nn.Module):
    """Identity, projection and zero-padding shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.outer, self.outer_norm = nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.down_norm = nn.Conv2d(8, 12, 3, 2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.project, self.project_norm = nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12)
        self.wide, self.wide_norm = nn.Conv2d(12, 16, 3, 2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.shortcut = ZeroPadShortcut(2, (2, 2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem_norm(self.stem(x)))
        x = F.relu(x + self.outer_norm(self.outer(F.relu(self.inner_norm(self.inner(x))))))
        x = F.relu(self.down_norm(self.down(x)) + self.project_norm(self.project(x)))
        x = F.relu(self.wide_norm(self.wide(x)) + self.shortcut(x))
        return self.head(x.mean((2, 3)))


class MobileBlock(nn.Module):
    """Depthwise convolution with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.expand_norm = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.project_norm = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.expand_norm(self.expand(x)))
        x = F.silu(self.depthwise_norm(self.depthwise(x)))
        x = x * self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
        return self.head(F.hardswish(self.project_norm(self.project(x))).mean((2, 3)))


class Concat(nn.Module):
    """Two branches side by side, and a batch normalisation over both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 10, 1)
        self.norm = nn.BatchNorm2d(16)
        self.join = nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        right = self.right(x)
        both = F.relu(self.norm(torch.cat([self.left(x), right], 1)))
        joined = torch.cat([F.relu(self.join(both)), F.relu(right)], 1)
        return self.head(joined.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution: its groups are the units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 8, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.grouped(F.relu(self.stem(x)))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Transposed(nn.Module):
    """Down and up again by a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 2, 2)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.last = nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.down(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Twice(nn.Module):
    """One layer used two times in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.again(F.relu(self.again(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class HardCoded(nn.Module):
    """A reshape that knows how many channels there are, and a layer after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fixed, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.fixed(F.relu(self.stem(x))))
        x = x.reshape(len(x), 8, x.shape[2], x.shape[3])
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class TwoInputs(nn.Module):
    """Two images, each through layers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.left_last = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.right, self.right_last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        x = self.left_last(F.relu(self.left(left))) + self.right_last(F.relu(self.right(right)))
        return self.head(F.relu(x).mean((2, 3)))


class DictOutput(nn.Module):
    """Logits and features: the features may not be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.features = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.norm = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 7, 1)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.features(F.relu(self.stem(x)))
        x = F.relu(self.last(F.relu(self.norm(features))))
        return {"logits": self.head(x.mean((2, 3))), "features": features}


class ActivatedNorm(nn.BatchNorm2d):
    """Batch normalisation and activation in one module, as timm has it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class Registered(nn.Module):
    """The same modules under two names, and a batch normalisation that also activates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body = nn.Sequential(self.conv, self.norm, nn.ReLU(), nn.Conv2d(8, 6, 1), ActivatedNorm(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def _sequential() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, CLASSES)),
    )


def _flattened() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()),
        *(nn.Linear(24, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, CLASSES)),
    )


def _unnormalised() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 10, 3, 2), nn.LeakyReLU()),
        *(nn.Conv2d(10, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)),
    )


TOYS: dict[str, Callable[[], nn.Module]] = {
    "concat": Concat,
    "dict_output": DictOutput,
    "flattened": _flattened,
    "grouped": Grouped,
    "hard_coded": HardCoded,
    "mobile": MobileBlock,
    "registered": Registered,
    "residual": Residual,
    "sequential": _sequential,
    "transposed": Transposed,
    "twice": Twice,
    "two_inputs": TwoInputs,
    "unnormalised": _unnormalised,
}


ZOO = (
    "digits_resnet",
    "digits_vgg",
    "digits_mobilenet",
    "cifar_resnet20",
    "cifar_resnet20_conv",
    "cifar_vgg16",
    "cifar_mobilenet_v2",
    "cifar_efficientnet_b0",
    "cifar_hybrid",
)


def enlivened(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give batch normalisation statistics and scales that differ between channels; in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 1.5),
            ):
                tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """The same weights each time, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return enlivened(build())


@cache
def toy_network(name: str) -> PrunableNetwork:
    """One of the toys, made ready for pruning."""
    generator = torch.Generator().manual_seed(1)
    inputs: tuple[Tensor, ...] = (torch.randn(2, 3, 8, 8, generator=generator),)
    if name == "two_inputs":
        inputs = (*inputs, torch.randn(2, 1, 8, 8, generator=generator))
    return PrunableNetwork(made(TOYS[name]), inputs, name=name)


@cache
def zoo_network(name: str) -> PrunableNetwork:
    """One of the zoo with random weights, made ready for pruning."""
    inputs = torch.randn(2, *input_shape_of(name), generator=torch.Generator().manual_seed(1))
    return PrunableNetwork(made(lambda: build_network(name)), inputs, name=name)


@dataclass
class RandomTask:
    """Classes and noise: enough to measure with, nothing to learn.

    Args:
        shapes: of one example of each input.
        classes: of the targets.
        sizes: examples of each split.
    """

    shapes: tuple[tuple[int, ...], ...]
    classes: int = CLASSES
    sizes: dict[str, int] = field(
        default_factory=lambda: {"train": 64, "calibration": 40, "reward": 60, "selection": 60, "test": 60}
    )
    name: str = "noise"
    fingerprint: str = "noise"

    def batches(
        self, split: str, *, batch_size: int, limit: int | None = None, **_: Any
    ) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        generator = torch.Generator().manual_seed(sorted(self.sizes).index(split))
        count = self.sizes[split]
        inputs = [torch.randn(count, *shape, generator=generator) for shape in self.shapes]
        targets = torch.randint(self.classes, (count,), generator=generator)
        end = count if limit is None else min(limit, count)
        for start in range(0, end, batch_size):
            span = slice(start, min(start + batch_size, end))
            yield tuple(one[span] for one in inputs), targets[span]

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(_logits(outputs).float(), targets)

    def score(self, outputs: Any, targets: Tensor) -> Tensor:
        return (_logits(outputs).argmax(1) == targets).float()


def _logits(outputs: Any) -> Tensor:
    logits: Tensor = outputs["logits"] if isinstance(outputs, dict) else outputs
    return logits


def random_task_for(network: PrunableNetwork) -> RandomTask:
    """Noise of the shapes that a network takes."""
    with torch.no_grad():
        classes = _logits(network.model(*network.example_inputs)).shape[1]
    return RandomTask(tuple(tuple(one.shape[1:]) for one in network.example_inputs), classes)


class Stopwatch:
    """A latency that falls with the channels, faster for later groups.

    Args:
        sizes: channels of each group of the unpruned network.
    """

    full = 0.010

    def __init__(self, sizes: NDArray[np.int64]) -> None:
        self.weights = np.arange(1, len(sizes) + 1) / (np.arange(1, len(sizes) + 1) @ sizes)

    def latency(self, counts: NDArray[np.int64]) -> float:
        """Seconds."""
        return 0.002 + 0.008 * float(self.weights @ counts)


#: Channels of the three groups of :class:`Live` that reach the output.
LIVE = (6, 3, 4)


class Live(nn.Module):
    """Three layers of eight channels, of which some are read by nobody: what should be kept is known."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8))
        self.head = nn.Linear(8, CLASSES)
        readers = (self.second, self.third, self.head)
        with torch.no_grad():
            for layer, reader, live in zip((self.first, self.second, self.third), readers, LIVE, strict=True):
                dead = torch.arange(8) >= live
                reader.weight[:, dead] = 0.0
                layer.weight[dead] *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.second, self.third):
            x = F.relu(layer(x))
        return self.head(x.mean((2, 3)))


class ImitationTask(RandomTask):
    """To give the outputs of a network: 1 if a copy of it gives the same, less the more it differs.

    Args:
        network: what is to be imitated.
    """

    def __init__(self, network: PrunableNetwork) -> None:
        super().__init__(((1, 4, 4),), name="imitation", fingerprint="imitation")
        with torch.no_grad():
            self.targets = {
                split: network.model(next(super(ImitationTask, self).batches(split, batch_size=100))[0][0])
                for split in self.sizes
            }

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_: Any) -> Iterator[Any]:
        start = 0
        for inputs, labels in super().batches(split, batch_size=batch_size, limit=limit):
            yield inputs, self.targets[split][start : start + len(labels)]
            start += len(labels)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        # off by one, because the slope would be zero where nothing is pruned
        return (outputs + 1 - targets).square().mean()

    def score(self, outputs: Any, targets: Tensor) -> Tensor:
        return 1 / (1 + 1000 * (outputs - targets).norm(dim=1))


class PlainImitationTask(ImitationTask):
    """The same with a loss that is least where the score is greatest, for searchers that learn from losses."""

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()


class KnownScorer:
    """A known objective in place of a scorer: how near a plan comes to the best one, which scores 1.

    Args:
        network: whose plans are scored.
        best: channels that each group should keep ``(groups,)``.
    """

    def __init__(self, network: PrunableNetwork, best: NDArray[np.int64]) -> None:
        self.network, self.best = network, best
        self.settings = ScorerSettings(criterion="l2")
        self.unit_scores = self.criterion_scores("l2")
        self.statistics = SimpleNamespace(residual_taylor=np.square(self.unit_scores))  # for the knapsack
        self.plans: list[PruningPlan] = []

    def criterion_scores(self, criterion: str) -> NDArray[np.float64]:
        by_weights = "l2" if criterion in {"taylor", "residual_taylor"} else criterion  # there are no data
        return unit_scores(by_weights, Context(self.network.model, self.network.graph))

    def score(self, plan: PruningPlan, **_: Any) -> Score:
        self.plans.append(plan)
        difference = (self.network.counts(plan) - self.best) / self.network.graph.sizes
        distance = float(np.abs(difference).mean())
        return Score(1 - distance, distance, 1)

    def unpruned(self, **_: Any) -> Score:
        return Score(0.0, 1.0, 1)  # of one example: there are no others for a second look
