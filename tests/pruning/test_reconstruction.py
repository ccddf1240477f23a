"""Reconstruction against explicit least squares, on each kind of layer and on odd networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import Fitting, Reconstruction, observe_targets, reconstruct
from prunegym.pruning.recovery.reads import count_positions, read_of, sampled
from prunegym.pruning.recovery.targets import MAX_UNKNOWNS, Targets
from prunegym.pruning.scoring import ACTIVATION_LIMIT, Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask

ALL = Fitting(per_unknown=1e6, ridge=1e-2)
"""Every position."""


class MatrixProduct(nn.Module):
    """A linear layer that holds its weight as ``(in, out)``."""

    def __init__(self, inputs: int, outputs: int, biased: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) * 0.3)
        self.bias = nn.Parameter(torch.randn(outputs)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class Toy(nn.Module):
    """Makes channels that can go, reads them with one layer, and reads that."""

    def __init__(self, maker: nn.Module, reader: nn.Module, last: bool, outputs: int) -> None:
        super().__init__()
        self.maker, self.reader, self.last = maker, reader, last
        self.head = nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.reader(F.relu(self.maker(x)))
        return self.head(F.relu(out).flatten(1) if self.last else F.relu(out).flatten(2).mean(2))


def conv_toy(reader: nn.Module, outputs: int) -> Toy:
    """One whose maker is a convolution."""
    return Toy(nn.Conv2d(3, 8, 3, padding=1), reader, False, outputs)


READERS: dict[str, Callable[[], tuple[Toy, tuple[int, ...]]]] = {
    "convolution": lambda: (conv_toy(nn.Conv2d(8, 6, 3, padding=1), 6), (3, 7, 6)),
    "stride, dilation": lambda: (conv_toy(nn.Conv2d(8, 6, (3, 2), (2, 1), (2, 0), (2, 1)), 6), (3, 9, 8)),
    "padding same": lambda: (conv_toy(nn.Conv2d(8, 6, 4, padding="same", dilation=2), 6), (3, 7, 7)),
    "padding by reflection": lambda: (conv_toy(nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), 6), (3, 6, 6)),
    "groups": lambda: (conv_toy(nn.Conv2d(8, 12, 3, groups=4), 12), (3, 6, 7)),
    "depthwise": lambda: (conv_toy(nn.Conv2d(8, 8, 3, padding=1, groups=8), 8), (3, 6, 7)),
    "transposed": lambda: (conv_toy(nn.ConvTranspose2d(8, 6, 3, 2, 1, 1), 6), (3, 5, 6)),
    "transposed in groups": lambda: (conv_toy(nn.ConvTranspose2d(8, 12, 3, 2, groups=4, dilation=2), 12), (3, 5, 4)),
    "one dimension": lambda: (Toy(nn.Conv1d(3, 8, 3), nn.Conv1d(8, 6, 3, 2), False, 6), (3, 17)),
    "three dimensions": lambda: (Toy(nn.Conv3d(3, 8, 1), nn.Conv3d(8, 6, (1, 2, 3)), False, 6), (3, 4, 5, 6)),
    "linear": lambda: (Toy(nn.Linear(5, 8), nn.Linear(8, 6), True, 6), (5,)),
    "linear without bias": lambda: (Toy(nn.Linear(5, 8), nn.Linear(8, 6, bias=False), True, 6), (5,)),
    "matrix product": lambda: (Toy(nn.Linear(5, 8), MatrixProduct(8, 6, False), True, 6), (5,)),
    "matrix product and bias": lambda: (Toy(nn.Linear(5, 8), MatrixProduct(8, 6, True), True, 6), (5,)),
}


def network_of(model: nn.Module, *shapes: tuple[int, ...]) -> PrunableNetwork:
    """The network, traced on noise."""
    return PrunableNetwork(model.eval(), tuple(torch.randn(2, *shape) for shape in shapes))


def pruned_mask(network: PrunableNetwork, share: float = 0.6, seed: int = 0) -> NDArray[np.bool_]:
    """Keep a random share of each group."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(network.graph.units, dtype=np.bool_)
    for group in network.graph.groups:
        count = max(1, int(group.size * share))
        mask[group.start + rng.permutation(group.size)[:count]] = True
    return mask


def run_reconstruction(
    network: PrunableNetwork,
    mask: NDArray[np.bool_],
    inputs: Any,
    fitting: Fitting = ALL,
    **observed: Any,
) -> tuple[nn.Module, Reconstruction]:
    """The pruned network after reconstruction on some inputs, from plain surgery."""
    model = network.pruned(PruningPlan.from_mask(network.graph, mask))
    targets = observe_targets(network.model, inputs, fitting, **observed)
    return model, reconstruct(model, network.graph, mask, [targets], fitting)


@pytest.mark.parametrize("examples", [40, 2, 1])
@pytest.mark.parametrize("kind", READERS)
def test_layer_is_the_ridge_fit(kind: str, examples: int) -> None:
    """The reader's weights solve the normal equations of columns that are made by running it with unit weights.

    With few examples there are fewer rows than unknowns, and the dual equations are solved.
    """
    torch.manual_seed(0)
    toy, shape = READERS[kind]()
    network = network_of(toy, shape)
    mask = pruned_mask(network)
    readers = {group.name for group in network.graph.groups if group.name.startswith("reader")}
    for group in network.graph.groups:
        if group.name in readers:
            mask[group.units] = True
    images = torch.randn(examples, *shape)

    model, _ = run_reconstruction(network, mask, images)

    with torch.no_grad():
        start = network.pruned(PruningPlan.from_mask(network.graph, mask)).reader
        source = F.relu(model.maker(images))
        wanted = toy.reader(F.relu(toy.maker(images)))
        kept = start(source).shape[1]
        if wanted.shape[1] != kept:  # a depthwise layer, or one in groups, loses its outputs with its inputs
            units = next(one.outputs for one in network.graph.operations if one.module == "reader")
            wanted = wanted[:, torch.from_numpy(np.append(mask, True)[units])]
        expected = _explicit_fit(start, source, wanted, ALL.ridge)
    assert model.reader.weight.detach().double().numpy() == pytest.approx(expected[0], abs=2e-4)
    if expected[1] is not None:
        assert model.reader.bias.detach().double().numpy() == pytest.approx(expected[1], abs=2e-4)


def _explicit_fit(
    layer: nn.Module, source: Tensor, wanted: Tensor, ridge: float
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Ridge least squares for each output channel by ``numpy.linalg.lstsq``, whatever the layer is."""
    weight, bias = layer.weight.detach().double(), None if layer.bias is None else layer.bias.detach().double()
    result, shifts = weight.numpy().copy(), None if bias is None else bias.numpy().copy()
    probe = layer.double()
    gap = (wanted.double() - probe(source.double())).movedim(1, -1).reshape(-1, wanted.shape[1]).numpy()
    columns: dict[int, list[tuple[tuple[int, ...], NDArray[np.float64]]]] = {}
    if probe.bias is not None:
        probe.bias.zero_()
    for place in np.ndindex(*weight.shape):
        probe.weight.zero_()
        probe.weight[place] = 1.0
        outputs = probe(source.double()).movedim(1, -1).reshape(-1, wanted.shape[1]).numpy()
        reached = probe(torch.ones_like(source).double()).movedim(1, -1).reshape(-1, wanted.shape[1])
        channel = int(reached.abs().sum(0).argmax())  # also of an input that is 0 everywhere
        columns.setdefault(channel, []).append((place, outputs[:, channel]))
    for channel, found in columns.items():
        design = np.stack([column for _, column in found], axis=1)
        target = gap[:, channel]
        means = design.mean(0) if bias is not None else np.zeros(design.shape[1])
        middle = target.mean() if bias is not None else 0.0
        centred = design - means
        rows = len(centred)
        # shrinkage is shared by the channels of a group, whose inputs are the same
        shrinkage = (
            np.sqrt(ridge * centred.var(0).mean() * rows)
            if bias is not None
            else np.sqrt(ridge * np.square(design).mean(0).mean() * rows)
        )
        stacked = np.concatenate([centred, shrinkage * np.eye(centred.shape[1])])
        change = np.linalg.lstsq(stacked, np.append(target - middle, np.zeros(centred.shape[1])), rcond=None)[0]
        for (place, _), step in zip(found, change, strict=True):
            result[place] += step
        if shifts is not None:
            shifts[channel] += middle - means @ change
    return result, shifts


@given(data=st.data())
def test_rows_give_what_the_call_gives(data: st.DataObject) -> None:
    """A convolution of any geometry, transposed or not, is the product of its rows and its matrix."""
    draw = data.draw
    spatial = draw(st.integers(1, 3))
    sizes = [draw(st.integers(3, 6)) for _ in range(spatial)]
    kernel = [draw(st.integers(1, 3)) for _ in range(spatial)]
    stride = [draw(st.integers(1, 3)) for _ in range(spatial)]
    dilation = [draw(st.integers(1, 2)) for _ in range(spatial)]
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    padding = [draw(st.integers(max(0, (gap - size + 2) // 2), 2)) for gap, size in zip(reach, sizes, strict=True)]
    groups, transposed = draw(st.sampled_from((1, 2))), draw(st.booleans())
    functions = {
        False: (torch.conv1d, torch.conv2d, torch.conv3d),
        True: (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    }
    if transposed:
        padding = [min(pad, gap) // 2 for pad, gap in zip(padding, reach, strict=True)]
    function = functions[transposed][spatial - 1]
    source = torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(0))
    shape = (4, 6 // groups) if transposed else (6, 4 // groups)
    weight = torch.randn(*shape, *kernel, generator=torch.Generator().manual_seed(1))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

    output = function(source, weight, **options)
    read = read_of(function, (source, weight), options)
    assert read is not None
    positions = torch.randperm(count_positions(tuple(output.shape), False))
    rows = read.rows(tuple(output.shape[2:]), positions)
    product = (rows @ read.matrix(weight).mT).transpose(0, 1).flatten(1)

    assert torch.allclose(product, sampled(output, positions, False), atol=1e-4)
    assert torch.equal(read.weight_of(read.matrix(weight)), weight)


class Residual(nn.Module):
    """Two blocks: one whose shortcut is made first, one whose shortcut is made last."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.second, self.last_norm = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.projection = nn.Conv2d(8, 8, 1) if late else nn.Identity()
        self.head, self.end = nn.Linear(8, 3), nn.Identity()
        for norm in (self.norm, self.last_norm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.last_norm(self.second(F.relu(self.norm(self.first(x)))))
        out += self.projection(x)
        return self.head(F.relu(self.end(out)).mean((2, 3)))


class Scaled(nn.Module):
    """A block as in ConvNeXt: channels last, a scale for each channel, and back before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.expand, self.shrink = nn.Linear(6, 12), nn.Linear(12, 6)
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.head, self.end = nn.Linear(6, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.shrink(F.gelu(self.expand(self.mix(x).permute(0, 2, 3, 1))))
        x = self.end(x + (self.scale[None, None, None] * out).permute(0, 3, 1, 2))
        return self.head(F.relu(x).mean((2, 3)))


class Attention(nn.Module):
    """Attention and a perceptron with shortcuts, as in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.expand, self.shrink = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head, self.end = nn.Linear(8, 3), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        x = self.end(x + F.dropout(self.shrink(F.gelu(self.expand(self.norm2(x)))), 0.1, self.training))
        return self.head(x.mean(1))


class Dense(nn.Module):
    """A layer whose output is added and joined: nothing may be asked of it for the sum alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        out = self.layer(x)
        return self.head(torch.cat([x + out, out], 1).mean((2, 3)))


SUMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], set[str]]] = {
    "shortcut first": (Residual, (3, 6, 6), {"second.weight"}),
    "shortcut last": (lambda: Residual(late=True), (3, 6, 6), {"projection.weight"}),
    "scaled and reordered": (Scaled, (3, 6, 6), {"shrink.weight"}),
    "transformer": (Attention, (4, 5), {"attention.out_proj.weight", "shrink.weight"}),
    "joined too": (Dense, (3, 6, 6), set()),
}


@pytest.mark.parametrize("kind", SUMS)
def test_layers_that_end_in_a_sum_are_found(kind: str) -> None:
    """By following tensors, not by names of classes."""
    torch.manual_seed(0)
    build, shape, expected = SUMS[kind]
    targets = observe_targets(build().eval(), torch.randn(4, *shape))

    assert {one.part.name for one in targets.layers.values() if one.sum is not None} == expected


@pytest.mark.parametrize("kind", [one for one in SUMS if one != "joined too"])
def test_layer_makes_the_sum_right_not_its_own_output(kind: str) -> None:
    """The squared error of the sum, not that of the branch, has no gradient in the layer's weights any more."""
    torch.manual_seed(0)
    build, shape, names = SUMS[kind]
    network = network_of(build(), shape)
    mask, images = pruned_mask(network), torch.randn(64, *shape)
    name = max(names)  # of two, the last
    plain = network.pruned(PruningPlan.from_mask(network.graph, mask))
    fitted, _ = run_reconstruction(network, mask, images, Fitting(per_unknown=1e6, ridge=1e-7))

    before, after = (_gradient_of_sum(one, network, mask, images, name) for one in (plain, fitted))

    assert float(after.norm()) < 2e-3 * float(before.norm())


def _gradient_of_sum(
    model: nn.Module, network: PrunableNetwork, mask: NDArray[np.bool_], images: Tensor, name: str
) -> Tensor:
    sums: list[Tensor] = []
    for one in (network.model, model):
        with torch.enable_grad():
            handle = one.end.register_forward_hook(lambda _m, _a, out: sums.append(out))
            one.eval()(images)
            handle.remove()
    wanted, present = sums
    if present.shape != wanted.shape:
        units = next(one.inputs for one in network.graph.operations if one.module == "head")
        wanted = wanted[:, torch.from_numpy(np.append(mask, True)[units])]
    gradient: Tensor = torch.autograd.grad((present - wanted.detach()).square().mean(), model.get_parameter(name))[0]
    return gradient


@pytest.mark.parametrize("kind", SUMS)
def test_pass_computes_what_the_network_then_computes(kind: str) -> None:
    """Layers that run at their sum, and means that take an intercept, give in the pass what they give afterwards."""
    torch.manual_seed(0)
    build, shape, _ = SUMS[kind]
    network = network_of(build(), shape)
    mask, images = pruned_mask(network), torch.randn(64, *shape)
    model, first = run_reconstruction(network, mask, images)
    targets = observe_targets(network.model, images, ALL)

    again = reconstruct(model, network.graph, mask, [targets], ALL)

    # the shrinkage starts anew, so that layers change a little once more, and those behind them see it
    name = next(iter(first.errors))
    assert again.errors[name][0] == pytest.approx(first.errors[name][1], rel=1e-3, abs=1e-6)
    for name, (_, after) in first.errors.items():
        assert again.errors[name][0] == pytest.approx(after, rel=0.1, abs=1e-4)


@pytest.mark.parametrize("kind", [*READERS, *SUMS])
def test_no_layer_is_worse_after_than_before(kind: str) -> None:
    """On the positions that it is fitted on, with any number of channels gone."""
    torch.manual_seed(1)
    model, shape = READERS[kind]() if kind in READERS else (SUMS[kind][0](), SUMS[kind][1])
    network = network_of(model, shape)
    for share in (0.3, 0.9):
        mask = pruned_mask(network, share)
        _, found = run_reconstruction(network, mask, torch.randn(32, *shape), Fitting(per_unknown=5, fewest=1))

        assert found.errors
        assert all(after <= before + 1e-9 for before, after in found.errors.values())


@pytest.mark.parametrize("kind", [*READERS, *SUMS])
def test_unpruned_network_comes_back(kind: str) -> None:
    """From a plan that keeps all channels."""
    torch.manual_seed(2)
    model, shape = READERS[kind]() if kind in READERS else (SUMS[kind][0](), SUMS[kind][1])
    network = network_of(model, shape)
    images = torch.randn(32, *shape)
    same, _ = run_reconstruction(network, np.ones(network.graph.units, dtype=np.bool_), images, Fitting())

    with torch.no_grad():
        assert torch.allclose(same.eval()(images), model(images), atol=1e-5)


def test_same_seed_gives_the_same_weights() -> None:
    """Positions are drawn by a generator of their own."""
    torch.manual_seed(0)
    network = network_of(Residual(), (3, 12, 12))
    mask, images = pruned_mask(network), torch.randn(32, 3, 12, 12)
    few = Fitting(per_unknown=5, fewest=1)
    models = [run_reconstruction(network, mask, images, few, seed=seed)[0] for seed in (0, 0, 1)]
    weights = [torch.cat([one.flatten() for one in model.parameters()]) for model in models]

    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(("kind", "examples"), [("convolution", 40), ("convolution", 2), ("linear", 4), ("linear", 2)])
def test_two_batches_are_one_fit_where_inputs_are_exact(kind: str, examples: int) -> None:
    """A first reader gets what the unpruned network gives, so its equations add up over batches, held or summed."""
    torch.manual_seed(0)
    toy, shape = READERS[kind]()
    network = network_of(toy, shape)
    mask, images = pruned_mask(network), torch.randn(examples, *shape)
    whole, _ = run_reconstruction(network, mask, images)
    model = network.pruned(PruningPlan.from_mask(network.graph, mask))
    parts = [observe_targets(toy, part, ALL) for part in images.chunk(2)]

    reconstruct(model, network.graph, mask, parts, ALL)

    assert torch.allclose(model.reader.weight, whole.reader.weight, atol=1e-5)


class SharedLayer(nn.Module):
    """One layer, read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.shared(F.relu(self.shared(F.relu(self.stem(x)))))))


class Wide(nn.Module):
    """A layer with more unknowns than are solved for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Linear(5, MAX_UNKNOWNS + 1), nn.Linear(MAX_UNKNOWNS + 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(F.relu(self.stem(x)))


@pytest.mark.parametrize(
    ("build", "name", "reason"),
    [(SharedLayer, "shared.weight", "read more than once"), (Wide, "wide.weight", "unknowns for an output channel")],
)
def test_layer_without_a_rule_keeps_its_weights_and_says_why(
    build: Callable[[], nn.Module], name: str, reason: str
) -> None:
    """Whatever compensation had made of them."""
    torch.manual_seed(0)
    network = network_of(build(), (5,))
    mask = pruned_mask(network)
    model, found = run_reconstruction(network, mask, torch.randn(16, 5), Fitting())
    plain = network.pruned(PruningPlan.from_mask(network.graph, mask))

    assert reason in found.skipped[name]
    assert torch.equal(model.get_parameter(name), plain.get_parameter(name))


class TwoInputs(nn.Module):
    """Reads a map and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.vector = nn.Conv2d(3, 8, 3), nn.Linear(4, 8)
        self.joint, self.head = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        parts = [F.relu(self.image(image)).mean((2, 3)), F.relu(self.vector(vector))]
        return self.head(F.relu(self.joint(torch.cat(parts, 1))))


def test_network_of_two_inputs_is_reconstructed() -> None:
    """Inputs are a tuple."""
    torch.manual_seed(0)
    network = network_of(TwoInputs(), (3, 6, 6), (4,))
    inputs = (torch.randn(64, 3, 6, 6), torch.randn(64, 4))
    mask = pruned_mask(network)
    plain = network.pruned(PruningPlan.from_mask(network.graph, mask))
    model, found = run_reconstruction(network, mask, inputs)

    with torch.no_grad():
        before, after = ((one.eval()(*inputs) - network.model(*inputs)).square().mean() for one in (plain, model))
    assert not found.skipped
    assert after < before / 2


def test_weights_in_bfloat16_are_fitted_and_stay_in_bfloat16() -> None:
    """Equations are solved in higher precision, and the solution is rounded."""
    torch.manual_seed(0)
    toy, shape = READERS["convolution"]()
    network = PrunableNetwork(toy.bfloat16().eval(), torch.randn(2, *shape).bfloat16())
    images, mask = torch.randn(64, *shape).bfloat16(), pruned_mask(network)
    plain = network.pruned(PruningPlan.from_mask(network.graph, mask))
    model, _ = run_reconstruction(network, mask, images)

    with torch.no_grad():
        before, after = ((one.eval()(images) - toy(images)).float().square().mean() for one in (plain, model))
    assert model.reader.weight.dtype == torch.bfloat16
    assert after < before


def test_block_that_is_left_out_does_not_disturb_the_others() -> None:
    """Places are counted for each module, so that those of the rest stay what they are."""
    torch.manual_seed(0)

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.second(F.relu(self.first(x))) + x)

    network = network_of(Blocks(), (3, 8, 8))
    assert network.blocks == ("blocks.0", "blocks.1")
    mask, images = pruned_mask(network), torch.randn(64, 3, 8, 8)
    plan = PruningPlan.from_mask(network.graph, mask).without(["blocks.0"])
    model, plain = network.pruned(plan), network.pruned(plan)
    found = reconstruct(model, network.graph, mask, [observe_targets(network.model, images)])

    with torch.no_grad():
        before, after = ((one.eval()(images) - network.model(images)).square().mean() for one in (plain, model))
    assert {name.split(".weight")[0] for name in found.skipped} == {"blocks.0.first", "blocks.0.second"}
    assert after < before


def test_positions_are_sampled_not_kept() -> None:
    """What is held of the unpruned network does not grow with the images."""
    torch.manual_seed(0)
    toy, _ = READERS["convolution"]()
    few = Fitting(per_unknown=2, fewest=1)
    small, large = (observe_targets(toy.eval(), torch.randn(8, 3, side, side), few) for side in (16, 64))

    assert _numbers(large) == _numbers(small)


def _numbers(targets: Targets) -> int:
    return sum(one.values.numel() for one in targets.layers.values() if one.part.name == "reader.weight")


@pytest.fixture(scope="module")
def reconstructing(trained: PrunableNetwork, digits: ClassificationTask) -> Scorer:
    """Scores plans of the trained network after reconstruction, in single precision."""
    settings = ScorerSettings(
        precision="float32", statistics_examples=128, recovery_examples=128, examples=100, batch_size=100
    )
    return Scorer(trained, digits, settings)


@pytest.fixture(scope="module")
def half(reconstructing: Scorer) -> PruningPlan:
    """Keeps half of the channels of each group."""
    graph = reconstructing.network.graph
    return PruningPlan.from_scores(graph, np.maximum(graph.sizes // 2, 1), reconstructing.unit_scores)


def test_reconstruction_is_nearer_than_compensation(reconstructing: Scorer, half: PruningPlan) -> None:
    """To the outputs of the unpruned network, on images that nothing was fitted to."""
    scores = {}
    for recovery in ("compensate", "reconstruct"):
        settings = replace(reconstructing.settings, recovery=recovery, measure="divergence")
        scorer = Scorer(reconstructing.network, reconstructing.task, settings, statistics=reconstructing.statistics)
        scores[recovery] = scorer.score(half).score

    assert scores["compensate"] < scores["reconstruct"] < 1


def test_more_images_than_a_search_scores_get_the_full_form(reconstructing: Scorer, half: PruningPlan) -> None:
    """So that candidates for the result are compared as they will be."""
    _, quick = reconstructing.candidate(half)
    _, full = reconstructing.candidate(half, quick=False)
    expected = [reconstructing._measure(model, "reward", 150) for model in (quick, full)]

    assert reconstructing.run(half, examples=150) == expected[1]
    assert expected[0] != expected[1]


def test_images_that_do_not_fit_into_memory_are_several_batches(
    trained: PrunableNetwork, digits: ClassificationTask, half: PruningPlan
) -> None:
    """Nothing of one batch is remembered for the next, and the network is as good."""
    settings = ScorerSettings(precision="float32", statistics_examples=128, recovery_examples=128, measure="divergence")
    whole, parts = (Scorer(trained, digits, settings) for _ in range(2))
    parts.__dict__["_activations"] = ACTIVATION_LIMIT // 32  # bytes of one example: 32 fit

    scores = [scorer._measure(scorer.recovered(half), "selection", 200).score for scorer in (whole, parts)]

    assert parts._targets == {}
    assert scores[1] > scores[0] - 0.05


def test_divergence_is_scored_without_labels(reconstructing: Scorer, half: PruningPlan) -> None:
    """exp(-d), with d the mean Kullback-Leibler divergence from the unpruned network's outputs."""
    settings = replace(reconstructing.settings, measure="divergence")
    scorer = Scorer(reconstructing.network, reconstructing.task, settings, statistics=reconstructing.statistics)
    _, model = scorer.candidate(half)
    inputs, _ = next(iter(scorer.task.batches("reward", batch_size=100, limit=100)))
    with torch.no_grad():
        wanted = scorer.network.model.eval()(inputs).double().softmax(1)
        found = model.eval()(inputs).double().softmax(1)
    expected = float((wanted * (wanted / found).log()).sum(1).mean())

    score = scorer.score(half)

    assert score.loss == pytest.approx(expected, rel=1e-3)
    assert score.score == pytest.approx(np.exp(-expected), rel=1e-3)
    assert scorer.unpruned().score == pytest.approx(1, abs=1e-5)


def test_prune_says_which_layers_were_not_reconstructed(reconstructing: Scorer) -> None:
    """With the reason, beside the network."""
    torch.manual_seed(0)
    network = PrunableNetwork(nn.Sequential(nn.Flatten(), SharedLayer64()).eval(), torch.randn(2, 1, 8, 8))
    scorer = Scorer(network, reconstructing.task, reconstructing.settings)
    plan = PruningPlan.from_counts(network.graph, np.maximum(network.graph.sizes // 2, 1))

    model, skipped = scorer.recover(plan)

    assert skipped == {"1.shared.weight": "its weight is read more than once"}
    assert isinstance(model, nn.Sequential)


class SharedLayer64(nn.Module):
    """Reads images of 64 pixels; its layers inside are one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.between, self.shared = nn.Linear(64, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.between(F.relu(self.stem(x))))
        return self.head(F.relu(self.shared(F.relu(self.shared(x)))))
