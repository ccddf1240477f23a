"""Distillation without labels: where stages end, which channels are compared, and what steps towards them give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import Teacher, divergence, train_steps
from prunegym.pruning.recovery.features import StageFeatures, find_stages
from prunegym.pruning.surgery import masked_network


class Images:
    """A task of noise whose labels must not be looked at."""

    name = fingerprint = "noise"

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_options: Any) -> Any:
        generator = torch.Generator().manual_seed(len(split))
        for _ in range(max(1, (limit or 64) // batch_size)):
            yield torch.randn(batch_size, 3, 16, 16, generator=generator), None

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        raise AssertionError("distillation looked at labels")

    def score(self, outputs: Any, targets: Any) -> Tensor:
        raise AssertionError("distillation looked at labels")


class Stages(nn.Module):
    """Three stages: one ends at a stride, one at a pooling, one at the average over all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, padding=1)
        self.squeeze, self.expand = nn.Linear(12, 6), nn.Linear(6, 12)
        self.third, self.norm = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.second(x))
        x = x * torch.sigmoid(self.expand(F.relu(self.squeeze(x.mean((2, 3))))))[:, :, None, None]
        x = F.relu(self.norm(self.third(F.max_pool2d(x, 2))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network() -> PrunableNetwork:
    """Three stages, traced."""
    torch.manual_seed(0)
    model = Stages()
    with torch.no_grad():
        model.head.weight.mul_(10)  # outputs that tell inputs apart
        for _ in range(40):
            model(torch.randn(64, 3, 16, 16))  # running statistics are those of the data
    return PrunableNetwork(model.eval(), torch.randn(2, 3, 16, 16))


@pytest.fixture
def mask(network: PrunableNetwork) -> np.ndarray:
    """Keep some six in ten units."""
    rng = np.random.default_rng(0)
    found = rng.random(network.graph.units) < 0.6
    for group in network.graph.groups:
        found[group.start] = True
    return found


def test_stages_end_where_positions_fall(network: PrunableNetwork, mask: np.ndarray) -> None:
    """At the stride, the pooling and the mean over all positions; not where a gate averages."""
    stages = find_stages(network.model, network.graph, mask, torch.randn(2, 3, 16, 16))

    assert [stage.func.__name__ for stage in stages.values()] == ["conv2d", "max_pool2d", "mean"]


def test_stages_of_a_residual_network_are_its_three(mask: np.ndarray) -> None:
    """Shortcuts that skip every second pixel end no further ones."""
    network = PrunableNetwork(build_network("cifar_resnet20").eval(), torch.randn(2, 3, 32, 32))
    whole = np.ones(network.graph.units, dtype=np.bool_)

    stages = find_stages(network.model, network.graph, whole, torch.randn(2, 3, 32, 32))

    assert [place[0] for place in stages] == ["layer2.0.conv1", "layer3.0.conv1", ""]


def test_features_are_compared_channel_by_channel(network: PrunableNetwork, mask: np.ndarray) -> None:
    """Those of the pruned network are those of the masked one at the channels that are kept."""
    images = torch.randn(4, 3, 16, 16)
    stages = find_stages(network.model, network.graph, mask, images)
    masked, pruned = (
        masked_network(network.model, network.graph, mask),
        network.pruned(PruningPlan.from_mask(network.graph, mask)),
    )
    found = []
    for model in (masked, pruned):
        watch = StageFeatures(model.eval(), stages)
        with torch.no_grad(), watch.attached():
            watch.forward(images)
        found.append(watch.features)

    assert len(found[0]) == len(found[1]) == 3
    for place, stage in stages.items():
        assert float(stage.error(found[1][place], found[0][place])) < 1e-8


def test_steps_bring_outputs_nearer_without_labels(network: PrunableNetwork, mask: np.ndarray) -> None:
    """To those of the unpruned network."""
    model = network.pruned(PruningPlan.from_mask(network.graph, mask))
    images = torch.randn(64, 3, 16, 16)

    def gap() -> float:
        with torch.no_grad():
            return float(divergence(model.eval()(images), network.model(images)))

    before = gap()
    teacher = Teacher(network.model, network.graph, mask, features=1)
    train_steps(model, Images(), steps=40, learning_rate=0.01, batch_size=32, teacher=teacher)

    assert gap() < 0.6 * before
    assert not network.model.training


def test_divergence_is_that_of_distributions() -> None:
    """Against a sum over classes written out, and 0 for the same logits."""
    outputs, wanted = torch.randn(6, 4), torch.randn(6, 4)
    p, q = wanted.double().softmax(1).numpy(), outputs.double().softmax(1).numpy()

    assert float(divergence(outputs, wanted)) == pytest.approx((p * np.log(p / q)).sum(1).mean(), rel=1e-5)
    assert float(divergence(wanted, wanted)) == pytest.approx(0, abs=1e-6)


def test_divergence_of_several_outputs_is_relative_error() -> None:
    """Each counts alike, whatever its scale."""
    wanted = {"boxes": 100 * torch.randn(5, 3), "depth": torch.randn(5)}
    outputs = {"boxes": wanted["boxes"] + 10, "depth": wanted["depth"]}
    expected = 100 / float(wanted["boxes"].var(correction=0)) / 2

    assert float(divergence(outputs, wanted)) == pytest.approx(expected, rel=1e-4)


def test_divergence_from_other_shapes_is_refused() -> None:
    """It would compare what does not belong together."""
    with pytest.raises(PruningError, match="what the unpruned network returns"):
        divergence(torch.randn(2, 3), torch.randn(2, 4))
