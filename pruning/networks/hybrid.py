"""A small hybrid of convolutions and attention for 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.ops.misc import Conv2dNormActivation


class InvertedResidual(nn.Module):
    """Expand by 4, filter each channel, project; a shortcut where the shape stays (Sandler et al., CVPR 2018).

    Args:
        in_width: input channels.
        width: output channels.
        stride: of the depthwise convolution.
    """

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * in_width
        self.layers = nn.Sequential(
            Conv2dNormActivation(in_width, hidden, 1, activation_layer=nn.SiLU),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden, activation_layer=nn.SiLU),
            Conv2dNormActivation(hidden, width, 1, activation_layer=None),
        )
        self.shortcut = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_width, H, W)`` to ``(B, width, H / stride, W / stride)``."""
        out: Tensor = self.layers(x)
        return x + out if self.shortcut else out


class AttentionBlock(nn.Module):
    """Attention and a perceptron, each after layer normalisation and with a shortcut (Dosovitskiy et al., ICLR 2021).

    Args:
        width: of the embedding.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, N, width)`` to tokens of the same shape."""
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = x + self.perceptron(self.norm2(x))
        return out


class CifarHybrid(nn.Module):
    """Four inverted residual blocks down to 8x8 pixels, then three blocks of attention over them.

    Args:
        num_classes: outputs.
        in_channels: input channels.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self.stem = Conv2dNormActivation(in_channels, 32, 3, activation_layer=nn.SiLU)
        self.convolutions = nn.Sequential(
            InvertedResidual(32, 32, 1),
            InvertedResidual(32, 64, 2),
            InvertedResidual(64, 64, 1),
            InvertedResidual(64, 96, 2),
        )
        self.blocks = nn.Sequential(*(AttentionBlock(96, 4) for _ in range(3)))
        self.norm = nn.LayerNorm(96)
        self.head = nn.Linear(96, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, in_channels, H, W)`` to logits ``(B, num_classes)``."""
        tokens = self.convolutions(self.stem(x)).flatten(2).transpose(1, 2)  # (B, N, width)
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits
