"""One observed forward pass: what is labelled, what is frozen, and that nothing is left behind."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph, build_graph
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.tracing.trace import trace


class Chain(nn.Module):
    """Two convolutions with a function between them, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.between(self.first(x)))).mean((2, 3)))


def graph_of(model: nn.Module, *shapes: tuple[int, ...]) -> ChannelGraph:
    """The graph as the rules alone see it, before any check by surgery."""
    inputs = tuple(torch.randn(shape) for shape in shapes or [(2, 3, 8, 8)])
    return build_graph(trace(model.eval(), inputs))


def frozen(graph: ChannelGraph) -> dict[str, str]:
    """Reason of each frozen group."""
    return {group.name: str(group.frozen) for group in graph.frozen}


@torch.library.custom_op("prunegym_tests::twisted", mutates_args=())
def twisted(x: Tensor) -> Tensor:
    """An operation that nobody has a rule for."""
    return x.flip(1).clone()


PASSED_ON: dict[str, Callable[[Tensor], Tensor]] = {
    "activation": F.gelu,
    "in-place activation": lambda x: F.relu_(x),
    "in-place arithmetic": lambda x: x.mul_(2).add_(1),
    "untagged activation": lambda x: F.hardswish(F.mish(F.hardsigmoid(x))),
    "pooling": lambda x: F.avg_pool2d(F.max_pool2d(x, 2), 2),
    "interpolation": lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    "permutation there and back": lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "flattening there and back": lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (6, 6)),
    "spatial slice": lambda x: x[:, :, ::2, 1:],
    "spatial padding": lambda x: F.pad(x, (1, 1, 1, 1)),
    "spatial norm": lambda x: x / x.norm(dim=(2, 3), keepdim=True),
    "spatial softmax": lambda x: x.flatten(2).softmax(2).view_as(x),
    "spatial softmax of attention": lambda x: torch._safe_softmax(x.flatten(2), 2).view_as(x),
    "spatial mean subtracted": lambda x: x - x.mean((2, 3), keepdim=True),
    "gate": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "sum with itself": lambda x: x + 2 * x,
    "dropout": lambda x: F.dropout(x, training=False),
    "transposition in place": lambda x: x.mul(2).transpose_(1, 2).transpose_(2, 1),
    "cast": lambda x: x.double().float(),
    "condition": lambda x: torch.where(x > 0, x, 0.1 * x),
}


@pytest.mark.parametrize("name", PASSED_ON)
def test_channels_pass_through(name: str) -> None:
    """Operations that treat each channel alone leave it prunable."""
    graph = graph_of(Chain(PASSED_ON[name]))

    assert [group.name for group in graph.groups] == ["first", "second"]
    assert not graph.unknown_operations


STOPPED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "norm over channels": (lambda x: x / x.norm(dim=1, keepdim=True), "linalg_vector_norm .* reduces over"),
    "norm of other order": (lambda x: x / x.norm(p=1.0, dim=1, keepdim=True), "reduces over channels"),
    "mean over channels": (lambda x: x - x.mean(1, keepdim=True), "mean .* reduces over channels"),
    "softmax over channels": (lambda x: x.softmax(1), "_softmax .* normalises across channels"),
    "attention over channels": (lambda x: torch._safe_softmax(x, 1), "_safe_softmax .* normalises across channels"),
    "channel slice": (lambda x: torch.cat([x[:, :3], x[:, 3:]], 1), "slice .* takes part of the channels"),
    "channel picked": (lambda x: x + x[:, 2:3].mean(1, keepdim=True), "slice .* takes part of the channels"),
    "channels indexed": (lambda x: x[:, [1, 0, 2, 3, 4, 5, 7, 6]], "index .* picks channels"),
    "channels rolled": (lambda x: x.roll(1, 1), "roll .* picks channels"),
    "restriding": (lambda x: x.as_strided(x.shape, (1, 2, 3, 4)), "no rule for as_strided"),
    "reshaping in place": (lambda x: x.mul(2).unsqueeze_(0).squeeze_(0), "the rule for unsqueeze_ .* failed"),
    "fixed tensor": (lambda x: x + torch.arange(8.0).view(1, 8, 1, 1), "size is fixed"),
    "cropped padding": (lambda x: F.pad(F.pad(x, (0,) * 5 + (1,)), (0,) * 5 + (-1,)), "crops"),
    "norm of all channels": (lambda x: F.group_norm(x, 1), "native_group_norm .* normalises across channels"),
    "Gram matrix": (
        lambda x: (x.flatten(2) @ x.flatten(2).mT @ x.flatten(2)).view_as(x),
        "multiplies two activations",
    ),
    "unknown operation": (
        lambda x: torch.ops.prunegym_tests.twisted(x),
        "no rule for prunegym_tests::twisted",
    ),
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_cannot_be_followed_is_frozen_with_its_reason(name: str) -> None:
    """The channels concerned are kept, and the report says why."""
    between, reason = STOPPED[name]

    reasons = frozen(graph_of(Chain(between)))

    assert re.search(reason, reasons["first"]), reasons


@pytest.mark.parametrize("name", STOPPED)
def test_the_rest_of_the_network_stays_prunable(name: str) -> None:
    """One layer that is not understood does not spoil the others."""
    graph = graph_of(Chain(STOPPED[name][0]))

    assert "second" in [group.name for group in graph.groups]


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_memory_format_does_not_matter(zoo: Callable[[str], PrunableNetwork], name: str) -> None:
    """Training leaves networks in channels-last layout, where PyTorch takes other ways through pooling."""
    network = zoo(name)
    model = copy.deepcopy(network.model).to(memory_format=torch.channels_last)
    inputs = tuple(one.to(memory_format=torch.channels_last) for one in network.example_inputs)

    graph = build_graph(trace(model, inputs))

    assert not graph.unknown_operations
    assert graph.groups == network.graph.groups
    assert graph.folds == network.graph.folds


def test_unknown_operations_are_listed_with_their_place() -> None:
    """`prunegym inspect` shows them."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Chain(torch.ops.prunegym_tests.twisted))
    model[1].first = nn.Conv2d(8, 8, 1)

    assert graph_of(model).unknown_operations == {"prunegym_tests::twisted": "1"}


def test_every_parameter_and_buffer_in_use_is_seen(zoo_member: PrunableNetwork) -> None:
    """A tensor that was missed would keep its size when its channels go."""
    model = zoo_member.model
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    counters = {name for name in names if name.endswith("num_batches_tracked")}

    assert set(zoo_member._trace.tensors) == names - counters


def test_network_is_left_as_it_was_found() -> None:
    """No hooks, no changed modes, no changed weights, no random numbers drawn."""
    model = Chain(F.relu).train()
    model.second.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()

    trace(model, (torch.zeros(2, 3, 8, 8),))

    assert [module.training for module in (model, model.first, model.second)] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_hooks_are_removed_when_the_network_fails() -> None:
    """A failed attempt must not slow the network down for ever."""
    model = Chain(F.relu)

    with pytest.raises(RuntimeError, match="expected input"):
        trace(model, (torch.zeros(2, 4, 8, 8),))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Folding(nn.Module):
    """A convolution and batch normalisation, and something else about them."""

    def __init__(self, twist: str) -> None:
        super().__init__()
        self.conv, self.norm, self.twist = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), twist
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        weight = self.conv.weight
        if self.twist == "standardised":
            out = F.conv2d(x, weight - weight.mean((1, 2, 3), keepdim=True), self.conv.bias)
        else:
            out = self.conv(x)
        normed = self.norm(out)
        if self.twist == "read twice":
            normed = normed + out
        if self.twist == "normalised twice":
            normed = self.norm(normed)
        if self.twist == "run twice":
            normed = normed + self.norm(self.conv(x * 2))
        logits = self.head(normed.mean((2, 3)))
        return (logits, out) if self.twist == "returned" else logits


@pytest.mark.parametrize("twist", ["standardised", "read twice", "normalised twice", "run twice", "returned", "none"])
def test_fold_is_offered_only_where_it_changes_nothing(twist: str) -> None:
    """Batch normalisation must be all that reads the convolution, and both must run once."""
    folds = graph_of(Folding(twist)).folds

    assert folds == ((("conv", "norm"),) if twist == "none" else ())


class Silent(nn.Module):
    """Returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> float:
        return float(self.first(x).mean())


def test_network_that_returns_no_tensor_is_refused() -> None:
    """Nothing would tell which channels it gives away, and a comparison would pass."""
    with pytest.raises(PruningError, match="`network` should return tensors.*Silent, which returned float without"):
        PrunableNetwork(Silent().eval(), torch.zeros(2, 3, 8, 8))


def test_inputs_may_be_integers() -> None:
    """An embedding is frozen; layers after it are not."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.first, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, words: Tensor) -> Tensor:
            return self.head(F.relu(self.first(self.table(words).mean(1))))

    graph = build_graph(trace(Words(), (torch.zeros(2, 5, dtype=torch.int64),)))

    assert [group.name for group in graph.groups] == ["first"]
