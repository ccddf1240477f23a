"""The networks of the comparisons, with the files that their weights are in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseNetworks:
    """Data and weights."""

    data: str
    """CIFAR-10 as an .npz file."""
    resnet20: str | None = None
    """Weights of cifar_resnet20; without them it is left out, and so on."""
    resnet56: str | None = None
    vgg16_half: str | None = None
    mobilenet_v2: str | None = None
    hybrid: str | None = None

    @property
    def weights(self) -> dict[str, str | None]:
        """File of each network."""
        return {
            "cifar_resnet20": self.resnet20,
            "cifar_resnet56": self.resnet56,
            "cifar_vgg16_half": self.vgg16_half,
            "cifar_hybrid": self.hybrid,
            "cifar_mobilenet_v2": self.mobilenet_v2,
        }
