"""Small networks of many families, of random depth and width: what the pretrained policy learns from.

Each is a function of this file by its name, ``FAMILY_NUMBER``: the number is the seed of depth and width.

    prunegym pretrain --network benchmarks/families.py:dense_2 --data cifar10.npz --epochs 5 --amp --out dense_2
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import DenseNet
from torchvision.models.resnet import Bottleneck
from torchvision.models.shufflenetv2 import InvertedResidual as ShuffleBlock
from torchvision.ops import SqueezeExcitation
from torchvision.ops.misc import Conv2dNormActivation

from prunegym.pruning.networks.cifar import CifarBlock, PlainConvNet
from prunegym.pruning.networks.hybrid import AttentionBlock, InvertedResidual

Block = Callable[[int, int, int], nn.Module]
"""Makes a block from its input channels, output channels and stride."""


class Staged(nn.Module):
    """A stem, three stages of blocks, mean over the image and one linear layer.

    Args:
        block: makes a block.
        widths: output channels of the stages.
        depths: blocks of the stages.
        num_classes: outputs.
        in_channels: input channels.
        last: what follows the stages.
    """

    def __init__(
        self,
        block: Block,
        widths: list[int],
        depths: list[int],
        num_classes: int,
        in_channels: int,
        last: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(in_channels, widths[0], 3)
        blocks: list[nn.Module] = []
        width = widths[0]
        for stage, (wide, depth) in enumerate(zip(widths, depths, strict=True)):
            for number in range(depth):
                blocks.append(block(width, wide, 2 if stage and not number else 1))
                width = wide
        self.blocks = nn.Sequential(*blocks)
        self.last = last or nn.Identity()
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))
        return logits


class PreActivation(nn.Module):
    """Normalisation and activation before each convolution (He et al., ECCV 2016)."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(in_width), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride != 1 or in_width != width
        self.shortcut = nn.Conv2d(in_width, width, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        active = F.relu(self.norm1(x))
        shortcut = self.shortcut(active if isinstance(self.shortcut, nn.Conv2d) else x)
        out: Tensor = shortcut + self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out


class Excited(nn.Module):
    """A basic residual block with a gate for each channel (Hu et al., CVPR 2018)."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Conv2dNormActivation(in_width, width, 3, stride),
            Conv2dNormActivation(width, width, 3, activation_layer=None),
            SqueezeExcitation(width, max(4, width // 4)),
        )
        changes = stride != 1 or in_width != width
        projection = Conv2dNormActivation(in_width, width, 1, stride, activation_layer=None)
        self.shortcut = projection if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        return F.relu(self.layers(x) + self.shortcut(x))


class Grouped(nn.Module):
    """A residual block around a convolution in groups (Xie et al., CVPR 2017)."""

    def __init__(self, in_width: int, width: int, stride: int, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            Conv2dNormActivation(in_width, width, 1),
            Conv2dNormActivation(width, width, 3, stride, groups=groups),
            Conv2dNormActivation(width, width, 1, activation_layer=None),
        )
        changes = stride != 1 or in_width != width
        projection = Conv2dNormActivation(in_width, width, 1, stride, activation_layer=None)
        self.shortcut = projection if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        return F.relu(self.layers(x) + self.shortcut(x))


class Attention(nn.Module):
    """Blocks of attention over the pixels of an image."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(AttentionBlock(width, 4) for _ in range(blocks)))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, width, H, W)`` to the same shape."""
        tokens = self.blocks(x.flatten(2).transpose(1, 2))
        return torch.unflatten(tokens.transpose(1, 2), 2, x.shape[2:])


def bottleneck(in_width: int, width: int, stride: int) -> nn.Module:
    """Torchvision's bottleneck block, four times narrower inside."""
    changes = stride != 1 or in_width != width
    projection = Conv2dNormActivation(in_width, width, 1, stride, activation_layer=None) if changes else None
    return Bottleneck(in_width, width // 4, stride, projection)


def _widths(draw: Random, least: int, step: int) -> list[int]:
    """Three widths that about double."""
    width = least + step * draw.randrange(3)
    return [width * draw.choice(halves) // (2 * step) * step for halves in ((2,), (3, 4), (6, 8))]


def _depths(draw: Random, most: int) -> list[int]:
    return [draw.randint(1, most) for _ in range(3)]


def plain(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """A chain of convolutions."""
    chain: list[int | str] = []
    for width, depth in zip(_widths(draw, 12, 4), _depths(draw, 3), strict=True):
        chain += [*[width] * depth, "M"]
    return PlainConvNet(tuple(chain[:-1]), num_classes, in_channels)


def residual(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Basic residual blocks, with either shortcut."""
    block = partial(CifarBlock, projection=draw.random() < 0.5)
    return Staged(block, _widths(draw, 8, 4), _depths(draw, 3), num_classes, in_channels)


def pre_activation(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Residual blocks with normalisation first, and normalisation last."""
    widths = _widths(draw, 8, 4)
    last = nn.Sequential(nn.BatchNorm2d(widths[-1]), nn.ReLU())
    return Staged(PreActivation, widths, _depths(draw, 3), num_classes, in_channels, last)


def bottlenecks(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Bottleneck blocks."""
    return Staged(bottleneck, _widths(draw, 32, 8), _depths(draw, 3), num_classes, in_channels)


def inverted(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Inverted residual blocks with depthwise convolutions."""
    return Staged(InvertedResidual, _widths(draw, 8, 4), _depths(draw, 3), num_classes, in_channels)


def excited(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Residual blocks with squeeze and excitation."""
    return Staged(Excited, _widths(draw, 8, 4), _depths(draw, 3), num_classes, in_channels)


def grouped(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Residual blocks with grouped convolutions."""
    block = partial(Grouped, groups=draw.choice((2, 4)))
    return Staged(block, _widths(draw, 16, 4), _depths(draw, 3), num_classes, in_channels)


def shuffled(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Blocks of ShuffleNet V2: split, depthwise, joined and shuffled."""
    return Staged(_shuffle, _widths(draw, 24, 8), _depths(draw, 3), num_classes, in_channels)


def _shuffle(in_width: int, width: int, stride: int) -> nn.Module:
    return ShuffleBlock(in_width, width, stride)


def dense(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Torchvision's DenseNet with a small stem."""
    growth, layers = draw.choice((8, 12)), tuple(draw.randint(2, 4) for _ in range(3))
    network = DenseNet(growth, layers, num_init_features=2 * growth, num_classes=num_classes)
    network.features.conv0 = nn.Conv2d(in_channels, 2 * growth, 3, padding=1, bias=False)
    network.features.pool0 = nn.Identity()
    return network


def hybrid(draw: Random, num_classes: int, in_channels: int) -> nn.Module:
    """Inverted residual blocks, then attention."""
    widths = _widths(draw, 12, 4)
    last = Attention(widths[-1], draw.randint(1, 2))
    return Staged(InvertedResidual, widths, [1, 1, 1], num_classes, in_channels, last)


FAMILIES: dict[str, Callable[[Random, int, int], nn.Module]] = {
    one.__name__: one
    for one in (
        *(plain, residual, pre_activation, bottlenecks, inverted),
        *(excited, grouped, shuffled, dense, hybrid),
    )
}


def __getattr__(name: str) -> Callable[..., nn.Module]:
    """``FAMILY_NUMBER``: makes that network."""
    family, _, number = name.rpartition("_")
    if family not in FAMILIES or not number.isdigit():
        raise AttributeError(name)

    def make(num_classes: int = 10, in_channels: int = 3) -> nn.Module:
        return FAMILIES[family](Random(name), num_classes, in_channels)

    return make
