"""Peak activation memory against counting by hand; a number takes 4 bytes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from prunegym.pruning.inference import tensors_of
from prunegym.pruning.memory import peak_memory
from prunegym.pruning.modes import evaluating
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

Toys = Callable[[str], PrunableNetwork]
PIXELS = 8 * 8
IMAGES = torch.zeros(3, 3, 8, 8)


class Shortcut(nn.Module):
    """The stem's output is needed again after the two layers beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.outer = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 10, 1), nn.Conv2d(10, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.outer(F.relu(self.inner(x)))


class Branches(nn.Module):
    """Two layers read the input, and a third both of them side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 10, 1), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


def test_chain_holds_the_input_and_output_of_one_layer() -> None:
    """The wider two at a time: 8 + 20 channels, at the second layer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 20, 1), nn.Conv2d(20, 2, 1))

    peak = peak_memory(model, IMAGES)

    assert peak.bytes == 4 * PIXELS * (8 + 20)
    assert (peak.module, peak.operation) == ("1", "aten.convolution")
    assert peak.mib == peak.bytes / 2**20


def test_shortcut_is_held_until_it_is_added() -> None:
    """4 channels of the shortcut beside 10 before and 10 after the activation."""
    peak = peak_memory(Shortcut(), IMAGES)

    assert peak.bytes == 4 * PIXELS * (4 + 10 + 10)
    assert peak.operation == "aten.relu"


def test_concatenation_holds_both_branches_and_their_copy() -> None:
    """6 + 10 channels and 16 more."""
    peak = peak_memory(Branches(), IMAGES)

    assert peak.bytes == 4 * PIXELS * (6 + 10 + 16)
    assert peak.operation == "aten.cat"


def test_activation_in_place_needs_no_memory() -> None:
    """The peak is the layer's, 3 + 8 channels; out of place it is 8 + 8."""
    inside = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1))
    outside = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    assert peak_memory(inside, IMAGES).bytes == 4 * PIXELS * (3 + 8)
    assert peak_memory(outside, IMAGES).bytes == 4 * PIXELS * (8 + 8)


def test_views_share_the_memory_of_their_base() -> None:
    """Flattening copies nothing, and a slice keeps all that it is cut from."""

    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(4 * PIXELS, 400)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.stem(x)[:, :4].flatten(1))

    # slicing whole channels of one image and flattening is no copy
    assert peak_memory(Views(), IMAGES).bytes == 4 * (8 * PIXELS + 400)


def test_tensor_that_nothing_reads_any_more_is_gone() -> None:
    """Whatever variable still holds it."""

    class Holding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)])

        def forward(self, x: Tensor) -> Tensor:
            everything = [x]
            for layer in self.layers:
                everything.append(layer(everything[-1]))
            return everything[-1]

    assert peak_memory(Holding(), IMAGES).bytes == 4 * PIXELS * (4 + 4)


def test_outputs_live_to_the_end() -> None:
    """Both of them, also the one that is ready first."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(1, 8, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            early = self.first(x)
            return {"early": early, "late": self.third(self.second(x))}

    assert peak_memory(Pair(), IMAGES).bytes == 4 * PIXELS * (6 + 1 + 8)


def test_indices_of_a_pooling_that_nothing_reads_do_not_count() -> None:
    """They are wider than the pooled numbers, and no runtime for inference makes them."""
    peak = peak_memory(nn.MaxPool2d(2), IMAGES)

    assert peak.bytes == 4 * (3 * PIXELS + 3 * PIXELS // 4)


def test_network_without_operations_holds_its_input() -> None:
    """There is nothing to compute, and nowhere to point to."""
    peak = peak_memory(nn.Identity(), IMAGES)

    assert (peak.bytes, peak.module, peak.operation) == (4 * 3 * PIXELS, "", "")


def test_memory_is_of_one_example_and_in_the_own_precision() -> None:
    """Whatever the batch; a double takes twice as much."""
    model = Shortcut()
    one, many = peak_memory(model, IMAGES[:1]), peak_memory(model, IMAGES)

    assert one == many
    assert peak_memory(model.double(), IMAGES.double()).bytes == 2 * one.bytes


def test_network_is_left_as_it_was() -> None:
    """Modes, hooks and PyTorch's own switches."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    before = model[1].running_mean.clone()

    peak_memory(model, IMAGES)

    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model[1].running_mean, before)
    assert torch.backends.mha.get_fastpath_enabled()


class Everything(TorchDispatchMode):
    """Keeps every tensor, so that no address is used twice: what each operation reads and gives, and if in place."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[list[Tensor], list[Tensor], bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((tensors_of((args, kwargs)), tensors_of(result), func._schema.is_mutable))
        return result


def places(tensors: list[Tensor]) -> dict[int, int]:
    """Address and bytes of the memory of tensors."""
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


def brute_force(network: PrunableNetwork, model: nn.Module) -> int:
    """The same from the definition: at each operation, look at all that come after."""
    inputs = [one[:1].clone() for one in network.example_inputs]
    with evaluating(model), torch.no_grad(), Everything() as seen:
        outputs = tensors_of(model(*inputs))
    known = places([*model.parameters(), *model.buffers()])
    sizes = places(inputs)
    steps: list[tuple[set[int], set[int]]] = []  # what is read at an operation, and what has been made by then
    for read, made, in_place in seen.calls:
        new = places(made).keys() - known.keys() - sizes.keys()
        sizes |= {place: size for place, size in places(made).items() if place in new}
        if new or in_place:
            steps.append((set(places(read)), set(sizes)))
    last = set(places(outputs))
    sums = []
    for index, (_, made_by_now) in enumerate(steps):
        needed = last.union(*(read for read, _ in steps[index:]))
        sums.append(sum(sizes[place] for place in made_by_now & needed))
    return max(sums)


def test_every_toy_needs_what_the_definition_says(toy: PrunableNetwork) -> None:
    """By brute force over all operations, before and after pruning."""
    counts = np.maximum(1, toy.graph.sizes // 2)
    plan = PruningPlan.from_scores(toy.graph, counts, np.arange(toy.graph.units, dtype=np.float64))
    smaller = toy.pruned(plan)

    before, after = (peak_memory(model, toy.example_inputs).bytes for model in (toy.model, smaller))

    assert before == brute_force(toy, toy.model)
    assert after == brute_force(toy, smaller)
    assert after <= before


def test_pruned_chain_needs_what_its_channels_take(toys: Toys) -> None:
    """Batch normalisation of the first layer: its channels twice, on all pixels."""
    network = toys("sequential")
    plan = PruningPlan.from_counts(network.graph, np.array([5, 6, 7]))

    assert peak_memory(network.model, network.example_inputs).bytes == 4 * PIXELS * (8 + 8)
    assert peak_memory(network.pruned(plan), network.example_inputs).bytes == 4 * PIXELS * (5 + 5)


def test_attention_is_seen_operation_by_operation() -> None:
    """The fused kernel of PyTorch's encoder layer would hide the widest part: 64 after 64 for 5 tokens."""
    layer = nn.TransformerEncoderLayer(8, 2, 64, batch_first=True)

    peak = peak_memory(layer, torch.zeros(2, 5, 8))

    assert peak.bytes == 4 * 5 * (64 + 64 + 8)
    assert peak.module == ""


@pytest.mark.parametrize("name", ["digits_mobilenet", "digits_resnet"])
def test_pytorch_needs_at_least_as_much(zoo: Toys, name: str) -> None:
    """Against the memory that is alive while PyTorch runs the network; there, variables hold some longer."""
    network = zoo(name)
    alive: list[int] = []

    class Alive(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for one in tensors_of((args, result)):
                reference = StorageWeakRef(one.untyped_storage())
                if reference.cdata not in constants:
                    self.seen[reference.cdata] = reference, one.untyped_storage().nbytes()
            alive.append(sum(size for reference, size in self.seen.values() if not reference.expired()))
            return result

    fixed = [StorageWeakRef(one.untyped_storage()) for one in network.model.state_dict().values()]
    constants = {reference.cdata for reference in fixed}
    inputs = tuple(one[:1].clone() for one in network.example_inputs)
    with evaluating(network.model), torch.no_grad(), Alive():
        network.model(*inputs)

    peak = peak_memory(network.model, network.example_inputs).bytes
    assert 0.7 * max(alive) < peak <= max(alive)
