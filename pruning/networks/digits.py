"""Small networks for 8x8 grey images: each trains in seconds, and each couples its channels differently."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

from prunegym.pruning.networks.cifar import Builder, CifarResNet, PlainConvNet


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel, weigh the channels, narrow by a 1x1 convolution.

    Args:
        in_width: Input channels.
        width: Output channels; with ``stride`` 1 and ``in_width`` channels the input is added.
        expansion: Inner channels per input channel.
        stride: Of the depthwise convolution.

    References:
        Sandler et al., "MobileNetV2", CVPR 2018; squeeze and excitation as in Howard et al., "Searching for
        MobileNetV3", ICCV 2019.
    """

    def __init__(self, in_width: int, width: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = in_width * expansion
        self.expand = Conv2dNormActivation(in_width, inner, 1)
        self.depthwise = Conv2dNormActivation(inner, inner, 3, stride, groups=inner)
        self.excite = SqueezeExcitation(inner, max(4, inner // 4))
        self.project = Conv2dNormActivation(inner, width, 1, activation_layer=None)
        self.residual = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        out: Tensor = self.project(self.excite(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


class SmallMobileNet(nn.Module):
    """A stem, five inverted residual blocks with squeeze and excitation, and a linear head.

    Args:
        num_classes: Outputs.
        in_channels: Input channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(in_channels, 16, 3)
        self.blocks = nn.Sequential(
            InvertedResidual(16, 16, 3, 1),
            InvertedResidual(16, 24, 3, 2),
            InvertedResidual(24, 24, 3, 1),
            InvertedResidual(24, 40, 3, 2),
            InvertedResidual(40, 40, 3, 1),
        )
        self.last = Conv2dNormActivation(40, 96, 1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        out = self.last(self.blocks(self.stem(x)))
        logits: Tensor = self.classifier(self.avgpool(out).flatten(1))
        return logits


DIGITS_NETWORKS: Mapping[str, Builder] = {
    "digits_resnet": partial(CifarResNet, 1),
    "digits_vgg": partial(PlainConvNet, (16, 16, "M", 32, 32, "M", 64)),
    "digits_mobilenet": SmallMobileNet,
}
