"""Segmentation and detection: backbones prune, and the whole network computes what its masked twin does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision.models.detection as detection
import torchvision.models.segmentation as segmentation
from torch import Tensor, nn

from prunegym.pruning.network import PrunableNetwork, without_constants
from prunegym.pruning.plan import PruningPlan

UNTRAINED = {"weights": None, "weights_backbone": None}


def half(network: PrunableNetwork) -> PruningPlan:
    """Keep a random half of each group."""
    rng = np.random.default_rng(0)
    mask = np.zeros(network.graph.units, dtype=bool)
    for group in network.graph.groups:
        mask[group.start + rng.permutation(group.size)[: max(1, group.size // 2)]] = True
    return PruningPlan.from_mask(network.graph, mask)


SEGMENTATION: dict[str, Callable[[], nn.Module]] = {
    "lraspp_mobilenet_v3_large": lambda: segmentation.lraspp_mobilenet_v3_large(**UNTRAINED, num_classes=3),
    "deeplabv3_mobilenet_v3_large": lambda: segmentation.deeplabv3_mobilenet_v3_large(**UNTRAINED, num_classes=3),
    "fcn_resnet50": lambda: segmentation.fcn_resnet50(**UNTRAINED, num_classes=3),
    "deeplabv3_resnet50": lambda: segmentation.deeplabv3_resnet50(**UNTRAINED, num_classes=3),
}
SLOW = {"fcn_resnet50", "deeplabv3_resnet50"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SEGMENTATION]
)
def test_segmentation_network_prunes_and_agrees(name: str) -> None:
    """Returns a dict of maps; most of its cost can be pruned."""
    model = without_constants(SEGMENTATION[name]().eval())
    network = PrunableNetwork(model, torch.randn(2, 3, 64, 64), name=name)
    plan = half(network)

    assert network.check(plan) < 1e-4
    assert network.cost(plan).macs < 0.5 * network.full_cost.macs


class Backbone(nn.Module):
    """What a detector computes before it looks for boxes: feature maps of several sizes."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone

    def forward(self, x: Tensor) -> list[Tensor]:
        return list(self.backbone(x).values())


DETECTION: dict[str, Callable[[], nn.Module]] = {
    "ssdlite320_mobilenet_v3_large": lambda: detection.ssdlite320_mobilenet_v3_large(**UNTRAINED, num_classes=3),
    "retinanet_resnet50_fpn": lambda: detection.retinanet_resnet50_fpn(**UNTRAINED, num_classes=3),
    "fasterrcnn_resnet50_fpn": lambda: detection.fasterrcnn_resnet50_fpn(**UNTRAINED, num_classes=3),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("fpn" in name)) for name in DETECTION])
def test_backbone_of_a_detector_prunes_and_agrees(name: str) -> None:
    """Its feature maps are outputs and stay; what lies behind them goes."""
    model = without_constants(Backbone(DETECTION[name]()).eval())
    network = PrunableNetwork(model, torch.randn(2, 3, 128, 128), name=name)
    plan = half(network)

    assert network.check(plan) < 1e-4
    assert network.cost(plan).macs < 0.6 * network.full_cost.macs


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTION)
def test_detector_with_a_pruned_backbone_still_finds_and_learns(name: str) -> None:
    """The smaller backbone put back where it came from: boxes come out, and a step of training goes through."""
    detector = DETECTION[name]().eval()
    network = PrunableNetwork(Backbone(detector).eval(), torch.randn(2, 3, 128, 128), name=name)
    detector.backbone = network.pruned(half(network)).backbone

    found = detector([torch.rand(3, 96, 128)])
    losses = detector.train()(
        [torch.rand(3, 96, 128)] * 2,
        [{"boxes": torch.tensor([[5.0, 5.0, 60.0, 60.0]]), "labels": torch.tensor([1])}] * 2,
    )
    sum(losses.values()).backward()

    assert set(found[0]) >= {"boxes", "labels", "scores"}
    assert all(bool(torch.isfinite(one)) for one in losses.values())
