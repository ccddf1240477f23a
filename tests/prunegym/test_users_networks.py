"""Networks in the styles in which people write theirs go the whole way: inspected, pruned, trained, saved, loaded."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import prunegym
from prunegym.pruning.importance.statistics import collect_statistics
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.task import ClassificationTask

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
SMALL = {"statistics_examples": 64, "recovery_examples": 64, "reward_examples": 60, "device": "cpu"}

CLASSES = 4


class Convolutions(nn.Module):
    """Two convolutions and a head; subclasses do it in their own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maps(x).mean((2, 3)))


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 16, 3)
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(F.relu(self.fc1(x)), training=self.training)
        return F.log_softmax(self.fc2(x), dim=1)


class FixedReshape(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        return super().maps(x).reshape(-1, 12 * 8 * 8).reshape(-1, 12, 8, 8)


class ListOfLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        widths = (3, 8, 12, 16)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.head = nn.Linear(16, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu_()
        return self.head(x.mean((2, 3)))


class CalledTwice(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(12)

    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return F.relu(self.norm(self.second(F.relu(self.norm(self.second(x))))))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(0.2 * torch.randn(10, 3, 3, 3)), nn.Parameter(torch.zeros(10))
        self.w2, self.head = nn.Parameter(0.1 * torch.randn(12, 10, 3, 3)), nn.Parameter(torch.randn(CLASSES, 12))
        self.register_buffer("mean", torch.zeros(10))
        self.register_buffer("var", torch.ones(10))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(F.conv2d(x, self.w1, self.b1), self.mean, self.var, training=self.training)
        return F.linear(F.relu(F.conv2d(F.relu(x), self.w2)).mean((2, 3)), self.head)


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(0.2 * torch.randn(10, 3, 3, 3)), nn.Parameter(torch.randn(10))
        self.w2, self.b2 = nn.Parameter(0.1 * torch.randn(CLASSES, 10, 6, 6)), nn.Parameter(torch.randn(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(F.conv2d(x, self.w1, self.b1)), weight=self.w2, bias=self.b2).flatten(1)


class ByKeyword(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(input=x, weight=self.w1, bias=self.b1)
        return F.conv2d(input=F.relu(x), weight=self.w2, bias=self.b2).flatten(1)


class AddedProducts(ByHand):
    """Weights of `addmm`, as language models have them, stand the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.w2 = nn.Parameter(self.w2.detach().flatten(1).T.clone())

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.w1, self.b1)).flatten(1)
        return torch.addmm(self.b2, x, self.w2)


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 6 * index, 6, 3, padding=1) for index in range(3))
        self.norm, self.head = nn.BatchNorm2d(26), nn.Linear(26, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for layer in self.layers:
            maps.append(layer(F.relu(torch.cat(maps, 1))))
        return self.head(F.adaptive_avg_pool2d(F.relu(self.norm(torch.cat(maps, 1))), 1).flatten(1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 24, 3), nn.Conv2d(12, 16, 3), nn.Linear(16, CLASSES)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=1)
        x = F.relu(self.second(value * torch.sigmoid(gate)))
        b, c, _, _ = x.size()
        scale = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1).view(b, c)))))
        return self.head((x * scale.view(b, c, 1, 1).expand_as(x)).mean((2, 3)))


class StochasticDepth(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.training and torch.rand(1).item() < 0.5:
            return x
        y = self.second(x)
        y += x
        return F.relu(y)


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 5, 16))
        self.norm1, self.norm2, self.head = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, CLASSES)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.norm, self.wide, self.narrow = nn.LayerNorm(16), nn.Linear(16, 64), nn.Linear(64, 16)
        self.scale, self.head = nn.Parameter(0.1 * torch.ones(16)), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.narrow(F.gelu(self.wide(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean([-2, -1]))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 3, 2, 1), nn.ConvTranspose2d(16, 16, 4, 2, 1)
        self.shuffle, self.last, self.head = nn.PixelShuffle(2), nn.Conv2d(4, 12, 3), nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(F.relu(self.down(x))))
        return self.head(F.relu(self.last(F.interpolate(self.shuffle(x), scale_factor=0.5))).mean((2, 3)))


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv1d(24, 24, 3), nn.BatchNorm1d(24), nn.Conv1d(24, 16, 3)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(x.flatten(1, 2)))))).mean(2))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU] = nn.LSTM) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 3, 2, 1)
        self.rows, self.head = kind(8 * 4, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x))))
        out, _ = self.rows(x.permute(0, 3, 1, 2).flatten(2))
        return self.head(out[:, -1])


def normalised(norm: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    """Layers whose weights are computed from other parameters."""

    def build() -> nn.Module:
        network = Convolutions()
        network.first = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3))
        norm(network.second)
        network(torch.randn(2, 3, 8, 8)).sum().backward()  # as after training: weights are no leaves any more
        return network

    return build


class RemembersFeatures(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        self.features = {"first": [F.relu(self.first(x))]}
        return F.relu(self.second(self.features["first"][0]))


class RemembersConstants(Convolutions):
    scale: Tensor | None = None

    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.scale is None:
            self.scale = torch.linspace(0.5, 1, x.shape[1], device=x.device).view(1, -1, 1, 1)
        return F.relu(self.second(x * self.scale))


class FixedBackbone(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().maps(x)


class InPrecision(Convolutions):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.to(dtype)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.to(self.head.weight.dtype)).float()


class Autocast(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().maps(x).float()


class ViewsImages(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        if self.training:
            x = x * (torch.rand(len(x), 12 * 64) > 0.1).view(len(x), 12, 8, 8)[:, : x.shape[1]]
            x = x.view(len(x), -1).view(x.shape)
        return F.relu(self.second(x)).view(-1, 8, 8).view(len(x), -1, 8, 8)


#: What a style is called, how it is built, and a budget within its reach.
STYLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "view, log_softmax": (LeNet, "macs:0.5"),
    "numbers in reshape": (FixedReshape, "macs:0.5"),
    "lists of layers, no bias": (ListOfLayers, "macs:0.5"),
    "layers called twice": (CalledTwice, "macs:0.5"),
    "functions with parameters": (Functional, "macs:0.5"),
    "cat": (Dense, "macs:0.5"),
    "chunk, gates": (Gated, "macs:0.5"),
    "stochastic depth, +=": (StochasticDepth, "macs:0.5"),
    "attention": (VisionTransformer, "macs:0.6"),
    "permute": (ConvNeXt, "macs:0.5"),
    "transposed, pixel shuffle": (Decoder, "macs:0.5"),
    "one dimension": (Rows, "macs:0.5"),
    "LSTM": (Recurrent, "macs:0.6"),
    "GRU": (lambda: Recurrent(nn.GRU), "macs:0.6"),
    "weight norm": (normalised(parametrizations.weight_norm), "macs:0.8"),
    "weight norm, deprecated": (normalised(nn.utils.weight_norm), "macs:0.8"),
    "spectral norm": (normalised(parametrizations.spectral_norm), "macs:0.8"),
    "spectral norm, deprecated": (normalised(nn.utils.spectral_norm), "macs:0.8"),
    "remembers features": (RemembersFeatures, "macs:0.5"),
    "remembers constants": (RemembersConstants, "macs:0.5"),
    "no_grad": (FixedBackbone, "macs:0.5"),
    "double": (lambda: InPrecision(torch.float64), "macs:0.5"),
    "bfloat16": (lambda: InPrecision(torch.bfloat16), "macs:0.5"),
    "autocast": (Autocast, "macs:0.5"),
    "view in training, of all images": (ViewsImages, "macs:0.5"),
    "DataParallel": (lambda: nn.DataParallel(Convolutions()), "macs:0.5"),
}


def built(build: Callable[[], nn.Module]) -> nn.Module:
    """A network, always with the same weights."""
    torch.manual_seed(0)
    return build()


@pytest.mark.parametrize("style", STYLES)
def test_network_is_pruned_fine_tuned_and_loaded(style: str, random_images: ClassificationTask, tmp_path: Path) -> None:
    """With each recovery: within its budget, equal to its masked twin, and bit by bit what is loaded again."""
    build, budget = STYLES[style]
    images = torch.randn(3, 3, 8, 8)
    options: list[dict[str, Any]] = [
        {"searcher": "knapsack", "epochs": 1},
        {"searcher": "uniform", "recovery": "reconstruct"},
        {"searcher": "random", "evaluations": 2, "criterion": "l1", "recovery": "distill", "recovery_steps": 2},
    ]
    for chosen in options:
        result = prunegym.prune(built(build), random_images, budget, **SMALL, **chosen)
        prunegym.save(result, tmp_path / "saved")
        loaded = prunegym.load(tmp_path / "saved", model=built(build))

        assert result.after.macs <= float(budget.split(":")[1]) * result.before.macs
        assert result.network.check(result.plan) < (1e-2 if style in {"autocast", "bfloat16"} else 1e-4)
        with torch.no_grad():
            assert torch.equal(loaded(images), result.model(images))


def test_channels_computed_under_no_grad_matter_to_the_loss(random_images: ClassificationTask) -> None:
    """As they would if gradients were kept: whether a backbone is trained says nothing of its worth."""
    networks = [PrunableNetwork(built(kind), torch.randn(2, 3, 8, 8)) for kind in (Convolutions, FixedBackbone)]

    usual, fixed = (collect_statistics(one.model, one.graph, random_images, examples=64).taylor for one in networks)

    assert (usual > 0).any()
    np.testing.assert_allclose(fixed, usual, rtol=1e-4)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("kind", [ByHand, ByKeyword, AddedProducts])
def test_channels_that_functions_read_have_statistics(kind: type[ByHand], random_images: ClassificationTask) -> None:
    """The same as those that modules read."""
    layers = [nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Flatten(), nn.Linear(360, 4)]
    if kind is not AddedProducts:
        layers[2:] = [nn.Conv2d(10, 4, 6), nn.Flatten()]
    twin, network = nn.Sequential(*layers), built(kind)
    with torch.no_grad():
        for ours, theirs in zip(twin.parameters(), network.parameters(), strict=True):
            ours.copy_(theirs if theirs.shape == ours.shape else theirs.T)
    both = [PrunableNetwork(one, torch.randn(2, 3, 8, 8)) for one in (twin, network)]

    usual, functional = (collect_statistics(one.model, one.graph, random_images, examples=64) for one in both)

    assert (usual.taylor > 0).any()
    for name in ("taylor", "taylor_squared", "activation_mean", "activation_variance", "activation_sparsity"):
        np.testing.assert_allclose(getattr(functional, name), getattr(usual, name), rtol=1e-4)


def test_casts_of_weights_keep_no_channels() -> None:
    """Autocast reads copies of the weights."""
    network = PrunableNetwork(built(Autocast), torch.randn(2, 3, 8, 8))

    assert [group.name for group in network.graph.groups] == ["first", "second"]


def test_network_that_was_compiled_in_place_is_inspected() -> None:
    """Its hooks would be compiled too; a copy is not."""
    network = built(Convolutions)
    network.compile(backend="eager")

    assert len(prunegym.inspect(network, torch.randn(2, 3, 8, 8)).groups) == 2


def test_groups_of_functions_are_named_after_their_parameters() -> None:
    """There is no layer whose path could be shown, or given to `keep`."""
    network = PrunableNetwork(built(Functional), torch.randn(2, 3, 8, 8))

    assert [group.name for group in network.graph.groups] == ["w1", "w2"]
    assert [group.name for group in network.graph.frozen] == ["head"]
