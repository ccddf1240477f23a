"""Gates multiply what is read, learn what the task needs, and leave everything else alone."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.importance.criteria import Calibration, Context
from prunegym.pruning.importance.group_attention import GateSettings, _Gate, _GatedReads, mean_gates
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.task import Task

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]


def gated(network: PrunableNetwork, *, excited: bool) -> _GatedReads:
    """Gates that differ from channel to channel, and if `excited` from example to example."""
    gates = _GatedReads(Context(network.model, network.graph), GateSettings(), "cpu")
    generator = torch.Generator().manual_seed(2)
    for gate in gates._gates.values():
        gate.offset.data.normal_(generator=generator)
        if excited:
            gate.excite.data.normal_(generator=generator)
    return gates


def outputs(network: PrunableNetwork, gates: _GatedReads, inputs: tuple[Tensor, ...]) -> Tensor:
    """Of the gated network."""
    with gates.attached(), torch.no_grad():
        result = gates.run(network.model, inputs)
    return result["logits"] if isinstance(result, dict) else result


def test_gate_that_knows_no_example_scales_the_weights_that_read(toy: PrunableNetwork) -> None:
    """The same by other means, for every way of coupling: one factor per channel, at all its reads."""
    gates = gated(toy, excited=False)
    factors = torch.ones(toy.graph.units + 1)
    for group, units in gates._members.items():
        factors[units] = gates._gates[group].offset.detach().sigmoid()
    twin = copy.deepcopy(toy.model)
    for operation in {one.weight: one for one in toy.graph.operations if one.mixes}.values():
        weight = twin.get_parameter(str(operation.weight)).data.movedim(operation.reads, -1)
        weight *= factors[torch.from_numpy(operation.inputs)]

    with torch.no_grad():
        expected = twin(*toy.example_inputs)
    expected = expected["logits"] if isinstance(expected, dict) else expected
    torch.testing.assert_close(outputs(toy, gates, toy.example_inputs), expected, rtol=1e-4, atol=1e-5)


class Windows(nn.Module):
    """Reads four windows of each image, stacked along the batch, as window attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        rows = x.flatten(2).transpose(1, 2).unflatten(1, (4, -1)).flatten(0, 1)  # (B * 4, positions, C)
        return self.head(torch.relu(self.second(rows)).mean(1).unflatten(0, (-1, 4)).mean(1))


@pytest.fixture(scope="module")
def windows() -> PrunableNetwork:
    """Made ready for pruning."""
    torch.manual_seed(0)
    return PrunableNetwork(Windows(), torch.randn(2, 3, 8, 8))


def test_gates_of_an_example_do_not_depend_on_the_others(toys: Toys, windows: PrunableNetwork) -> None:
    """Two examples together and each alone, also where several rows belong to one example."""
    assert windows.graph.groups
    for network in (windows, *map(toys, ("residual", "mobile", "flattened", "concat"))):
        gates = gated(network, excited=True)
        together = outputs(network, gates, network.example_inputs)
        alone = [outputs(network, gates, tuple(one[[i]] for one in network.example_inputs)) for i in range(2)]

        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(gates.open[0], torch.ones_like(gates.open[0]))


def test_gate_is_shared_by_attention_groups() -> None:
    """Chunk by chunk through the same two matrices; the last chunk is filled up with zeros."""
    gate = _Gate(10, GateSettings(channels=4, hidden=3), torch.Generator().manual_seed(0))
    gate.excite.data.normal_(generator=torch.Generator().manual_seed(1))
    pooled = torch.randn(1, 10, generator=torch.Generator().manual_seed(2))
    carried = ((pooled - pooled.mean()) / (pooled.var(correction=0) + 1e-5).sqrt())[0]
    chunks = [carried[:4], carried[4:8], torch.cat([carried[8:], torch.zeros(2)])]

    excited = torch.cat([(chunk @ gate.squeeze + gate.bias).relu() @ gate.excite for chunk in chunks])[:10]

    torch.testing.assert_close(gate(pooled)[0], (excited + gate.offset).sigmoid())


class Tokens(nn.Module):
    """A mixer over 16 patches; the batch is first or second, the weights are the same."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).permute((0, 2, 1) if self.batch_first else (2, 0, 1))
        x = x + self.narrow(torch.relu(self.wide(x)))
        return self.head(x.mean(1 if self.batch_first else 0))


def test_gates_do_not_depend_on_where_the_batch_is(task_for: TaskFor) -> None:
    """Batches of 32 and 8: the 16 tokens are no multiple of the one, and a multiple of the other."""
    torch.manual_seed(0)
    models = [Tokens(batch_first=batch_first) for batch_first in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    networks = [PrunableNetwork(model, torch.randn(2, 3, 8, 8)) for model in models]

    first, second = (
        mean_gates(Context(one.model, one.graph), Calibration(task=task_for(one), examples=40), GateSettings(steps=3))
        for one in networks
    )

    assert len(networks[0].graph.groups) == 2
    assert first.std() > 0
    np.testing.assert_allclose(second, first, rtol=1e-4)


class Heads(nn.Module):
    """Attention of which only heads can be pruned: the norm holds all other channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.Linear(8, 5)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        return self.head((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def test_heads_of_attention_are_gated(task_for: TaskFor) -> None:
    """Where they are read: torch's own form does not call the layer that reads them."""
    torch.manual_seed(0)
    network = PrunableNetwork(Heads(), torch.randn(2, 3, 8, 8))
    calibration = Calibration(task=task_for(network), examples=16)

    scores = mean_gates(Context(network.model, network.graph), calibration, GateSettings(steps=4))

    assert [group.size for group in network.graph.groups] == [4]
    assert ((scores > 0) & (scores < 1)).all()
    assert len(np.unique(scores)) == 4
    assert type(network.model.attention) is nn.MultiheadAttention


def test_gates_that_nothing_passes_stay_open() -> None:
    """The layer that reads the channels is used in the trace, and on these inputs it is not."""

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(2, 4), nn.Linear(4, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x if len(x) > 2 else x + self.second(torch.relu(self.first(x))))

    network = PrunableNetwork(Skips(), torch.randn(2, 2))

    scores = mean_gates(Context(network.model, network.graph), Calibration(task=Sides(), examples=16))

    assert (scores == 1).all()


def test_untrained_gates_are_all_equally_open(toys: Toys, task_for: TaskFor) -> None:
    """Nothing is preferred to begin with."""
    network = toys("residual")
    calibration = Calibration(task=task_for(network), examples=8)

    scores = mean_gates(Context(network.model, network.graph), calibration, GateSettings(steps=0, start=1.5))

    np.testing.assert_allclose(scores, 1 / (1 + np.exp(-1.5)), rtol=1e-6)


class Sides:
    """Which of two numbers is larger."""

    name = fingerprint = "sides"

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_: Any) -> Any:
        x = torch.randn(limit or 64, 2, generator=torch.Generator().manual_seed(0))
        for rows in x.split(batch_size):
            yield rows, rows.argmax(1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).float()


def test_gates_of_channels_that_the_task_needs_stay_open() -> None:
    """Channels 0 and 1 decide; 2 and 3 are as strong and read to no effect; the penalty closes them."""
    model = nn.Sequential(nn.Linear(2, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, -4.0], [-4.0, 4.0], [4.0, 4.0], [-4.0, -4.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, 1.0, 1.0]]))
    network = PrunableNetwork(model, torch.randn(2, 2))

    scores = mean_gates(Context(model, network.graph), Calibration(task=Sides(), examples=64))

    assert scores[:2].min() > scores[2:].max() + 0.1


def test_networks_of_any_precision_are_gated() -> None:
    """Gates compute in single precision, whatever the network does."""
    model = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    model.register_forward_pre_hook(lambda _, args: tuple(one.double() for one in args))
    network = PrunableNetwork(model, torch.randn(2, 2))

    scores = mean_gates(Context(model, network.graph), Calibration(task=Sides(), examples=16))

    assert ((scores > 0) & (scores < 1)).all()


def test_same_seed_trains_the_same_gates(toys: Toys, task_for: TaskFor) -> None:
    """And another seed others; nothing is drawn from torch's global generator."""
    network = toys("residual")
    task: Task = task_for(network)
    before = torch.get_rng_state()

    first, second, other = (
        mean_gates(Context(network.model, network.graph, seed=seed), Calibration(task=task, examples=8))
        for seed in (0, 0, 1)
    )

    assert (first == second).all()
    assert (first != other).any()
    assert (torch.get_rng_state() == before).all()
