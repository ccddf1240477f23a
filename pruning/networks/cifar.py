"""Networks for 32x32 images.

The slim residual networks of He et al. 2016 (``cifar_resnet20`` to ``cifar_resnet110``), and the ImageNet
designs with strides that suit small images. Option-A shortcuts have no parameters: every second pixel, and
channels of zeros.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import EfficientNet, MobileNetV2, ResNet
from torchvision.models.efficientnet import MBConvConfig
from torchvision.models.resnet import BasicBlock, Bottleneck

from prunegym.pruning.networks.hybrid import CifarHybrid

Builder = Callable[..., nn.Module]
"""Makes a network from the keyword arguments ``num_classes`` and ``in_channels``."""

#: Channels after each convolution of VGG; "M" halves the image.
_VGG16: tuple[int | str, ...] = (
    64,
    64,
    "M",
    128,
    128,
    "M",
    256,
    256,
    256,
    "M",
    512,
    512,
    512,
    "M",
    512,
    512,
    512,
    "M",
)
#: Half as wide: 78.7 of 313.2 million MACs at 32x32, 3.68 of 14.72 million parameters.
_VGG16_HALF: tuple[int | str, ...] = tuple(width if isinstance(width, str) else width // 2 for width in _VGG16)
_VGG19: tuple[int | str, ...] = (
    64,
    64,
    "M",
    128,
    128,
    "M",
    *[256] * 4,
    "M",
    *[512] * 4,
    "M",
    *[512] * 4,
    "M",
)


class ZeroPadShortcut(nn.Module):
    """Parameter-free shortcut ("option A"): every ``stride``-th pixel, with channels of zeros around.

    Args:
        stride: Step in pixels.
        channel_padding: Channels of zeros before and after those of the input. Surgery changes this attribute
            when some of the channels it pads are pruned.
    """

    def __init__(self, stride: int, channel_padding: tuple[int, int]) -> None:
        super().__init__()
        self.stride = stride
        self.channel_padding = channel_padding

    def forward(self, x: Tensor) -> Tensor:
        """Shrink and pad ``(B, C, H, W)`` to ``(B, before + C + after, H / stride, W / stride)``."""
        before, after = self.channel_padding
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, after))

    def extra_repr(self) -> str:
        """Show the settings when the network is printed."""
        return f"stride={self.stride}, channel_padding={self.channel_padding}"


class CifarBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        in_width: Input channels.
        width: Output channels.
        stride: Of the first convolution.
        projection: Change size by a 1x1 convolution instead of zero padding.
    """

    def __init__(self, in_width: int, width: int, stride: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_width != width:
            if projection:
                conv = nn.Conv2d(in_width, width, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
            else:
                before = (width - in_width) // 2
                self.shortcut = ZeroPadShortcut(stride, (before, width - in_width - before))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Slim residual network: a 3x3 stem, three stages of 16, 32 and 64 channels, and a linear head.

    Args:
        blocks: Blocks per stage; the depth of the network is ``6 * blocks + 2``.
        num_classes: Outputs.
        in_channels: Input channels.
        projection: 1x1 convolutions as shortcuts where the size changes, instead of zero padding.

    References:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3, projection: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, blocks, projection)
        self.layer2 = _stage(16, 32, 2, blocks, projection)
        self.layer3 = _stage(32, 64, 2, blocks, projection)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def _stage(in_width: int, width: int, stride: int, blocks: int, projection: bool) -> nn.Sequential:
    """Make a stage, whose first block changes width and size."""
    first = CifarBlock(in_width, width, stride, projection)
    return nn.Sequential(first, *(CifarBlock(width, width, 1, projection) for _ in range(blocks - 1)))


class PlainConvNet(nn.Module):
    """A chain of convolutions with batch norm, as in VGG, then one linear layer.

    Args:
        widths: Channels of each 3x3 convolution, or "M" for 2x2 max pooling.
        num_classes: Outputs.
        in_channels: Input channels.

    References:
        Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR 2015; batch norm and the single
        linear layer as is customary on CIFAR.
    """

    def __init__(self, widths: tuple[int | str, ...], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = in_channels
        for width in widths:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [nn.Conv2d(last, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            last = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _wide_resnet(
    block: type[BasicBlock | Bottleneck], blocks: list[int], num_classes: int = 10, in_channels: int = 3
) -> ResNet:
    """Make torchvision's residual network with a 3x3 stem that keeps the image size."""
    network = ResNet(block, blocks, num_classes=num_classes)
    network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def _mobilenet_v2(num_classes: int = 10, in_channels: int = 3) -> MobileNetV2:
    """Make torchvision's MobileNetV2 with strides for 32x32: 4x4 pixels are left, not 1x1."""
    settings = [  # expansion, channels, blocks, stride
        [1, 16, 1, 1],
        [6, 24, 2, 1],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    network = MobileNetV2(num_classes=num_classes, inverted_residual_setting=settings)
    network.features[0][0] = _small_stem(in_channels, 32)
    return network


def _efficientnet_b0(num_classes: int = 10, in_channels: int = 3) -> EfficientNet:
    """Make torchvision's EfficientNet-B0 with strides for 32x32: 4x4 pixels are left, not 1x1."""
    settings = [  # expansion, kernel, stride, input channels, channels, blocks
        MBConvConfig(1, 3, 1, 32, 16, 1),
        MBConvConfig(6, 3, 1, 16, 24, 2),
        MBConvConfig(6, 5, 2, 24, 40, 2),
        MBConvConfig(6, 3, 2, 40, 80, 3),
        MBConvConfig(6, 5, 1, 80, 112, 3),
        MBConvConfig(6, 5, 2, 112, 192, 4),
        MBConvConfig(6, 3, 1, 192, 320, 1),
    ]
    network = EfficientNet(settings, dropout=0.2, num_classes=num_classes)
    network.features[0][0] = _small_stem(in_channels, 32)
    return network


def _small_stem(in_channels: int, width: int) -> nn.Conv2d:
    """Make a first convolution that keeps the image size."""
    conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


CIFAR_NETWORKS: Mapping[str, Builder] = {
    **{f"cifar_resnet{6 * n + 2}": partial(CifarResNet, n) for n in (3, 5, 7, 9, 18)},
    **{f"cifar_resnet{6 * n + 2}_conv": partial(CifarResNet, n, projection=True) for n in (3, 5, 7, 9, 18)},
    "cifar_resnet18": partial(_wide_resnet, BasicBlock, [2, 2, 2, 2]),
    "cifar_resnet34": partial(_wide_resnet, BasicBlock, [3, 4, 6, 3]),
    "cifar_resnet50": partial(_wide_resnet, Bottleneck, [3, 4, 6, 3]),
    "cifar_vgg16": partial(PlainConvNet, _VGG16),
    "cifar_vgg16_half": partial(PlainConvNet, _VGG16_HALF),
    "cifar_vgg19": partial(PlainConvNet, _VGG19),
    "cifar_mobilenet_v2": _mobilenet_v2,
    "cifar_efficientnet_b0": _efficientnet_b0,
    "cifar_hybrid": CifarHybrid,
}
