"""What detectors are built from, as users of other libraries report it breaking: it prunes and agrees here."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan


def conv(inputs: int, outputs: int, size: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation with statistics of its own, activation."""
    norm = nn.BatchNorm2d(outputs)
    with torch.no_grad():
        for values in (norm.weight, norm.running_var):
            values.uniform_(0.5, 1.5)
        for values in (norm.bias, norm.running_mean):
            values.normal_()
    return nn.Sequential(nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), norm, nn.SiLU())


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(width, width, 3), conv(width, width, 3))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class Halves(nn.Module):
    """Half of the channels goes past the bottlenecks; all that came on the way is concatenated (YOLOv8)."""

    def __init__(self, inputs: int, outputs: int, *, by_chunk: bool, count: int = 2) -> None:
        super().__init__()
        self.half, self.by_chunk = outputs // 2, by_chunk
        self.first = conv(inputs, outputs)
        self.inner = nn.ModuleList(Bottleneck(self.half) for _ in range(count))
        self.last = conv((2 + count) * self.half, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        parts = list(x.chunk(2, 1) if self.by_chunk else x.split((self.half, self.half), 1))
        for one in self.inner:
            parts.append(one(parts[-1]))
        result: Tensor = self.last(torch.cat(parts, 1))
        return result


class Pyramid(nn.Module):
    """The same features pooled once, twice and three times, side by side."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = conv(inputs, inputs // 2), conv(2 * inputs, outputs)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        result: Tensor = self.last(torch.cat(parts, 1))
        return result


class Focus(nn.Module):
    """Every second pixel becomes channels (YOLOv5)."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = conv(12, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        result: Tensor = self.conv(torch.cat(parts, 1))
        return result


class Yolo(nn.Module):
    """Backbone, a way up and down again, boxes decoded on a grid in evaluation mode."""

    def __init__(self, *, by_chunk: bool = True, anchors: int = 1) -> None:
        super().__init__()
        self.anchors = anchors
        self.stem, self.down = Focus(8), conv(8, 16, 3, 2)
        self.fine = Halves(16, 16, by_chunk=by_chunk)
        self.coarse = nn.Sequential(conv(16, 24, 3, 2), Halves(24, 24, by_chunk=by_chunk), Pyramid(24, 24))
        self.up = nn.Upsample(scale_factor=2)
        self.neck = Halves(40, 16, by_chunk=by_chunk)
        self.boxes, self.classes = nn.Conv2d(16, 5 * anchors, 1), nn.Sequential(conv(16, 16, 3), nn.Conv2d(16, 3, 1))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        fine = self.fine(self.down(self.stem(x)))
        neck = self.neck(torch.cat([self.up(self.coarse(fine)), fine], 1))
        raw, classes = self.boxes(neck), self.classes(neck)
        if self.training:
            return torch.cat([raw, classes], 1)
        batch, _, rows, columns = raw.shape
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        maps = raw.view(batch, self.anchors, 5, rows, columns).permute(0, 1, 3, 4, 2)
        centre, extent, found = maps.split((2, 2, 1), 4)
        boxes = torch.cat([centre.sigmoid() + torch.stack([x, y], 2), extent.exp(), found.sigmoid()], 4)
        return boxes.reshape(batch, -1, 5), classes.flatten(2)


class Routes(nn.Module):
    """A list of layers, and by their place in it what is concatenated (YOLOv3)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [conv(3, 8, 3), conv(8, 16, 3, 2), conv(16, 12), nn.Upsample(None, 2), nn.Identity(), conv(20, 10, 3)]
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for index, one in enumerate(self.layers):
            x = torch.cat([outputs[-1], outputs[0]], 1) if index == 4 else one(x)
            outputs.append(x)
        return x.mean((2, 3))


class Twice(nn.Module):
    """A tensor is concatenated with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = conv(3, 12), conv(24, 10), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        result: Tensor = self.head(self.second(torch.cat([x, x], 1)))
        return result


class OneChannel(nn.Module):
    """Convolutions with a single channel in the middle, as a mask over others, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.narrow, self.wide = nn.Conv2d(3, 12, 3, 1, 1), nn.Conv2d(12, 1, 1), nn.Conv2d(1, 8, 3, 1, 1)
        self.mask, self.last = nn.Conv2d(12, 1, 1), nn.Conv2d(20, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        wide = F.relu(self.wide(torch.sigmoid(self.narrow(x))))
        result: Tensor = self.last(torch.cat([x * torch.sigmoid(self.mask(x)), wide], 1))
        return result


class Queries(nn.Module):
    """Learned queries attend to the features of a convolutional backbone (DETR)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv(3, 12, 3, 2), conv(12, 20, 3, 2))
        self.project = nn.Conv2d(20, width, 1)
        self.transformer = nn.Transformer(width, 4, 1, 1, 24, batch_first=True, dropout=0.0)
        self.queries = nn.Parameter(torch.rand(5, width))
        self.classes, self.boxes = nn.Linear(width, 3), nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.project(self.backbone(x)).flatten(2).permute(0, 2, 1)
        found = self.transformer(features, self.queries.unsqueeze(0).repeat(len(x), 1, 1))
        return {"classes": self.classes(found), "boxes": self.boxes(found).sigmoid()}


#: Networks, and the groups that can be pruned at least.
DETECTORS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "halves by chunk": (Yolo, 14),
    "halves by split": (lambda: Yolo(by_chunk=False), 14),
    "anchors": (lambda: Yolo(anchors=3), 14),
    "routes": (Routes, 3),
    "concatenated with itself": (Twice, 2),
    "one channel": (OneChannel, 2),
    "queries": (Queries, 3),
}


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_prunes_and_agrees(name: str) -> None:
    """At random halves of its groups, and at the smallest plan."""
    torch.manual_seed(0)
    build, least = DETECTORS[name]
    network = PrunableNetwork(build().eval(), torch.randn(2, 3, 32, 32), name=name)
    graph, rng = network.graph, np.random.default_rng(0)
    half, smallest = np.zeros(graph.units, dtype=bool), np.zeros(graph.units, dtype=bool)
    for group in graph.groups:
        half[group.start + rng.permutation(group.size)[: max(1, group.size // 2)]] = True
        smallest[group.start] = True

    assert len(graph.groups) >= least, [f"{one.name}: {one.frozen}" for one in graph.frozen]
    for mask in (half, smallest):
        plan = PruningPlan.from_mask(graph, mask)
        assert network.check(plan) < 1e-4
        assert network.cost(plan).macs < 0.6 * network.full_cost.macs
