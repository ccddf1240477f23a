"""Which channels go together: against couplings written down by hand, and against torch_pruning."""

import re
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.network import PrunableNetwork

Toys = Callable[[str], PrunableNetwork]

COUPLINGS: dict[str, dict[str, tuple[int, set[str], set[str]]]] = {
    "sequential": {"0": (8, {"0"}, {"4"}), "4": (12, {"4"}, {"9"}), "9": (10, {"9"}, {"11"})},
    "residual": {
        "stem": (8, {"stem", "outer"}, {"inner", "down", "project"}),
        "inner": (6, {"inner"}, {"outer"}),
        # the zero-padding shortcut carries these twelve on into the last stage ...
        "down": (12, {"down", "project", "wide"}, {"wide", "head"}),
        # ... where four more stand beside them
        "wide": (4, {"wide"}, {"head"}),
    },
    "mobile": {
        "expand": (12, {"expand", "depthwise", "excite"}, {"depthwise", "squeeze", "project"}),
        "squeeze": (4, {"squeeze"}, {"excite"}),
        "project": (8, {"project"}, {"head"}),
    },
    "concat": {
        "left": (6, {"left"}, {"join"}),
        "right": (10, {"right"}, {"join", "head"}),
        "join": (8, {"join"}, {"head"}),
    },
    # four groups of three inputs and two outputs
    "grouped": {
        "stem": (4, {"stem", "grouped"}, {"grouped", "last"}),
        "last": (6, {"last"}, {"head"}),
    },
    "flattened": {"0": (6, {"0"}, {"4"}), "4": (10, {"4"}, {"7"})},
    "transposed": {
        "down": (8, {"down"}, {"up"}),
        "up": (6, {"up"}, {"last"}),
        "last": (4, {"last"}, {"head"}),
    },
    "twice": {"stem": (8, {"stem", "again"}, {"again", "last"}), "last": (6, {"last"}, {"head"})},
    "hard_coded": {"stem": (6, {"stem"}, {"fixed"}), "last": (6, {"last"}, {"head"})},
    "two_inputs": {
        "left": (6, {"left"}, {"left_last"}),
        "right": (4, {"right"}, {"right_last"}),
        "left_last": (8, {"left_last", "right_last"}, {"head"}),
    },
    "dict_output": {"stem": (8, {"stem"}, {"features"}), "last": (7, {"last"}, {"head"})},
}


@pytest.mark.parametrize("name", COUPLINGS)
def test_groups_are_those_written_down_by_hand(toys: Toys, name: str) -> None:
    """Size, producers and consumers of every group that may be pruned."""
    graph = toys(name).graph

    found = {one.name: (one.size, set(one.producers), set(one.consumers)) for one in graph.groups}

    assert found == COUPLINGS[name]


ORACLE = (
    *("sequential", "mobile", "concat", "flattened", "unnormalised", "twice", "transposed", "two_inputs"),
    *("registered", "digits_vgg", "digits_mobilenet", "cifar_resnet20_conv", "cifar_vgg16"),
)


@pytest.mark.parametrize("name", ORACLE)
def test_slices_of_a_channel_agree_with_torch_pruning(toys: Toys, zoo: Toys, name: str) -> None:
    """Removing one channel of each group takes the same slices of the same weights."""
    pytest.importorskip("torch_pruning")
    network = zoo(name) if "_" in name and name.split("_")[0] in {"digits", "cifar"} else toys(name)

    for group in network.graph.groups:
        unit = group.start + group.size // 2

        assert our_slices(network.graph, unit) == their_slices(network, group.producers[0], unit), group.name


def our_slices(graph: ChannelGraph, unit: int) -> set[tuple[str, int, int]]:
    """Layer, dimension of its weight and index, of everything that goes with a unit."""
    return {
        (name.removesuffix(".weight"), dim, int(index))
        for (name, dim), units in graph.axes.items()
        if name.endswith(".weight")
        for index in np.flatnonzero(units == unit)
    }


def their_slices(network: PrunableNetwork, producer: str, unit: int) -> set[tuple[str, int, int]]:
    """The same from torch_pruning's dependency graph."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning

        inputs = network.example_inputs if len(network.example_inputs) > 1 else network.example_inputs[0]
        dependencies = torch_pruning.DependencyGraph().build_dependency(network.model, inputs)
        operation = next(one for one in network.graph.operations if one.module == producer)
        layer = network.model.get_submodule(producer)
        remove = dependencies.get_pruner_of_module(layer).prune_out_channels
        index = int(np.flatnonzero(operation.outputs == unit)[0])
        coupled = dependencies.get_pruning_group(layer, remove, idxs=[index])
    names = {module: name for name, module in network.model.named_modules()}
    found = set()
    for dependency, indices in coupled:
        module = dependency.target.module
        if module in names and isinstance(getattr(module, "weight", None), torch.Tensor):
            out = dependencies.is_out_channel_pruning_fn(dependency.handler)
            dim = weight_dimension(module, out)
            found |= {(names[module], dim, int(one)) for one in indices}
    return found


def weight_dimension(module: nn.Module, out: bool) -> int:
    """Dimension of a weight that output (or input) channels lie along."""
    if isinstance(module, nn.ConvTranspose2d):
        return 1 if out else 0
    depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
    return 0 if out or depthwise or isinstance(module, nn.modules.batchnorm._BatchNorm) else 1


def test_units_of_a_group_occur_equally_often(toy: PrunableNetwork) -> None:
    """The cost of a plan depends on counts alone: all units of a group must cost the same."""
    graph = toy.graph
    for group in graph.groups:
        places = [
            Counter({axis: int((units == unit).sum()) for axis, units in graph.axes.items()})
            for unit in range(group.start, group.start + group.size)
        ]

        assert all(place == places[0] for place in places)


def test_units_are_numbered_group_after_group(zoo_member: PrunableNetwork) -> None:
    """``group_of``, ``sizes`` and the slices of the groups tell the same."""
    graph = zoo_member.graph

    assert np.concatenate([np.full(one.size, k) for k, one in enumerate(graph.groups)]).tolist() == (
        graph.group_of.tolist()
    )
    assert all((graph.group_of[one.units] == k).all() for k, one in enumerate(graph.groups))
    assert graph.units == graph.sizes.sum()


def test_names_of_groups_are_unique(zoo_member: PrunableNetwork) -> None:
    """Plans are written by name."""
    graph = zoo_member.graph

    assert len({one.name for one in (*graph.groups, *graph.frozen)}) == len(graph.groups) + len(graph.frozen)


def test_outputs_are_frozen(toy: PrunableNetwork) -> None:
    """The last layer's width is the number of classes."""
    reasons = {name: one.frozen for one in toy.graph.frozen for name in one.producers}

    assert "network output" in reasons.values()
    assert all(name not in reasons or reasons[name] == "network output" for name in ("head", "features"))


def test_padding_is_booked_with_the_group_it_extends(toys: Toys) -> None:
    """Both ends of the zero-padding shortcut belong to the group of its four padded channels."""
    graph = toys("residual").graph

    (padding,) = graph.paddings

    assert padding.module == "shortcut"
    assert {graph.groups[graph.group_of[unit]].name for unit in (*padding.before, *padding.after)} == {"wide"}


@pytest.mark.parametrize(("keep", "left"), [("outer", {"inner", "down", "wide"}), ("(inner|wide)", {"stem"})])
def test_kept_layers_freeze_their_groups(toys: Toys, keep: str, left: set[str]) -> None:
    """A layer is named by its path; every group that it helps to make is kept."""
    network = toys("residual")

    graph = PrunableNetwork(network.model, network.example_inputs, keep=[keep]).graph

    assert {one.name for one in graph.groups} == left
    assert f"kept by request ({keep})" in {one.frozen for one in graph.frozen}


@pytest.mark.parametrize("pattern", ["ste", "stem.", "bakbone.*"])
def test_pattern_that_keeps_nothing_is_refused(toys: Toys, pattern: str) -> None:
    """Part of a path does not match, and what was meant would be pruned."""
    network = toys("residual")

    with pytest.raises(PruningError, match=rf"`keep` should match .* Received '{re.escape(pattern)}', .* none \(stem"):
        PrunableNetwork(network.model, network.example_inputs, keep=[pattern])

    lenient = PrunableNetwork(network.model, network.example_inputs, keep=[pattern], strict=False)
    assert len(lenient.graph.groups) == len(network.graph.groups)


def test_module_is_kept_with_all_its_layers() -> None:
    """Its path is enough; that of another that begins with the same letters is another."""
    body, head = (nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(2))
    model = nn.Sequential(OrderedDict([("body", body), ("body2", head), ("out", nn.Conv2d(4, 2, 1))]))

    graph = PrunableNetwork(model, torch.randn(2, 4, 4, 4), keep=["body"]).graph

    assert [group.name for group in graph.groups] == ["body2.0", "body2.2"]
    assert {group.frozen for group in graph.frozen if group.name.startswith("body.")} == {"kept by request (body)"}


def test_pattern_is_checked_though_everything_is_frozen_anyway() -> None:
    """It is wrong whether or not it would be used."""
    with pytest.raises(PruningError, match=r"`keep` should be regular expressions. Received '\*'"):
        PrunableNetwork(nn.Linear(3, 4), torch.randn(2, 3), keep=["*"])


def test_norm_is_kept_with_the_channels_that_it_carries() -> None:
    """Its path stands for them, though another layer makes them; a layer that only reads them is about its own."""
    layers = [("conv", nn.Conv2d(3, 6, 1)), ("norm", nn.BatchNorm2d(6)), ("next", nn.Conv2d(6, 4, 1))]
    model = nn.Sequential(OrderedDict([*layers, ("out", nn.Conv2d(4, 2, 1))])).eval()

    kept = {name: PrunableNetwork(model, torch.randn(2, 3, 4, 4), keep=[name]).graph for name in ("norm", "next")}

    assert [group.name for group in kept["norm"].groups] == ["next"]
    assert [group.name for group in kept["next"].groups] == ["conv"]


def test_pattern_may_be_about_a_module_that_is_never_pruned() -> None:
    """It is kept, as was asked."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 6)
            self.lstm, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.head(self.lstm(self.second(self.first(x).relu()))[0])
            return result

    graph = PrunableNetwork(Recurrent().eval(), torch.randn(2, 3, 4), keep=["lstm"]).graph

    assert "first" in [group.name for group in graph.groups]


def test_pattern_may_be_about_what_cannot_be_pruned(toys: Toys) -> None:
    """To keep the head is no mistake."""
    network = toys("residual")
    (output,) = [group for group in network.graph.frozen if "output" in str(group.frozen)]

    kept = PrunableNetwork(network.model, network.example_inputs, keep=[output.producers[0]])

    assert kept.graph.groups == network.graph.groups


def test_pattern_that_is_no_regular_expression_is_rejected(toys: Toys) -> None:
    """A star alone is a frequent slip."""
    network = toys("residual")

    with pytest.raises(PruningError, match=r"`keep` should be regular expressions. Received '\*stem'"):
        PrunableNetwork(network.model, network.example_inputs, keep=["*stem"])


def test_group_is_found_by_name(toys: Toys) -> None:
    """And a wrong name is a KeyError, as of any mapping."""
    graph = toys("residual").graph

    assert graph.group("inner").size == 6
