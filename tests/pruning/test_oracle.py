"""torchvision's networks against torch_pruning, an independent account of which weights go together."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from prunegym.pruning.graph import ChannelGraph, ChannelGroup
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network

Slices = set[tuple[str, int, int]]

#: Where both handle every group, and agree on all of them.
AGREED = ("resnet18", "mobilenet_v2", "mobilenet_v3_small", "squeezenet1_1", "googlenet", "mnasnet0_5", "alexnet")
GROUPED = ("regnet_", "resnext")
#: Where torch_pruning stops, or has another notion of what attention may lose; see the tests below.
APART = ("shufflenet", "vit_", "swin", "maxvit", *GROUPED)


class Oracle:
    """A torchvision network seen by both."""

    def __init__(self, name: str) -> None:
        torch_pruning = pytest.importorskip("torch_pruning")
        model = build_network(name, num_classes=10).eval()
        side = 299 if name.startswith("inception") else 224 if name.startswith("vit") else 64
        inputs = torch.randn(2, 3, side, side)
        self.model, self.network = model, PrunableNetwork(model, inputs, name=name, check=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.theirs: Any = torch_pruning.DependencyGraph().build_dependency(model, inputs)
        self.paths = {module: path for path, module in model.named_modules()}

    def slices(self, group: ChannelGroup) -> tuple[Slices, Slices]:
        """What goes with the middle unit of a group: ours, theirs."""
        unit = group.start + group.size // 2
        operations = self.network.graph.operations
        maker = next(one for one in operations if one.module == group.producers[0] and (one.outputs == unit).any())
        layer = self.model.get_submodule(maker.module)
        remove = self.theirs.get_pruner_of_module(layer).prune_out_channels
        coupled = self.theirs.get_pruning_group(layer, remove, idxs=np.flatnonzero(maker.outputs == unit).tolist())
        theirs: Slices = set()
        for dependency, indices in coupled:
            module = dependency.target.module
            out = self.theirs.is_out_channel_pruning_fn(dependency.handler)
            grouped = isinstance(module, nn.Conv2d) and module.groups > 1
            dim = 0 if out or grouped or isinstance(module, nn.modules.batchnorm._BatchNorm) else 1
            if module in self.paths and isinstance(getattr(module, "weight", None), torch.Tensor):
                theirs |= {(self.paths[module], dim, int(one)) for one in indices}
        return ours(self.network.graph, unit), theirs


def ours(graph: ChannelGraph, unit: int) -> Slices:
    """Layer, dimension of its weight and index, of everything that goes with a unit."""
    return {
        (name.removesuffix(".weight"), dim, int(index))
        for (name, dim), units in graph.axes.items()
        if name.endswith(".weight")
        for index in np.flatnonzero(units == unit)
    }


def check_agreement(name: str) -> None:
    """Every group of a network."""
    oracle = Oracle(name)
    for group in oracle.network.graph.groups:
        mine, theirs = oracle.slices(group)

        assert mine == theirs, group.name


@pytest.mark.parametrize("name", AGREED)
def test_couplings_of_torchvision_networks_agree(name: str) -> None:
    """The same slices of the same weights."""
    check_agreement(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name
        for name in torchvision.models.list_models(torchvision.models)
        if name not in AGREED and not name.startswith(APART)
    ],
)
def test_couplings_of_all_other_torchvision_networks_agree(name: str) -> None:
    """Wherever torch_pruning handles the network."""
    check_agreement(name)


@pytest.mark.parametrize("name", ["regnet_x_400mf"])
def test_grouped_convolutions_lose_whole_groups_here(name: str) -> None:
    """torch_pruning keeps the number of groups and says only what reads the channel; a whole group takes that and more.

    The outputs of a group of a grouped convolution depend on all its inputs, so here they are one unit with them.
    """
    oracle = Oracle(name)
    pairs = [oracle.slices(group) for group in oracle.network.graph.groups]

    assert all(mine >= theirs for mine, theirs in pairs)
    assert any(mine > theirs for mine, theirs in pairs)


@pytest.mark.slow
def test_attention_loses_heads_here_and_embedding_there() -> None:
    """torch_pruning prunes the width under layer normalisation, which changes what the other channels become."""
    oracle = Oracle("vit_b_32")
    heads = [group for group in oracle.network.graph.groups if group.name.endswith("self_attention")]

    assert [group.size for group in heads] == [12] * 12
    mine, theirs = oracle.slices(heads[0])
    width = 768 // 12
    assert {dim for path, dim, _ in mine if path.endswith("out_proj")} == {1}
    assert len([1 for path, _, _ in mine if path.endswith("out_proj")]) == width
    assert any(path == "conv_proj" for path, _, _ in theirs)
    assert not any(path == "conv_proj" for path, _, _ in mine)
