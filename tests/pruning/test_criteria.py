"""Criteria against references of a few lines."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from prunegym.pruning.errors import PruningError
from prunegym.pruning.importance import group_attention, weight_changes
from prunegym.pruning.importance.criteria import CRITERIA, Calibration, Context, unit_scores
from prunegym.pruning.importance.group_attention import GateSettings
from prunegym.pruning.importance.statistics import collect_statistics
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.cifar import CifarResNet
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import Task

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Task]
#: Criteria that need no data.
WEIGHTS = ("l1", "l2", "bn_scale", "fpgm", "cosine", "random")
#: All that can be made without a trained policy; that one has its own file of tests.
ALONE = tuple(name for name in CRITERIA if name != "encoder_attention")
EXAMPLES = 10


def score(network: PrunableNetwork, criterion: str, group: str) -> np.ndarray:
    """Scores of one group."""
    return CRITERIA[criterion](network.graph.group(group), Context(network.model, network.graph))


def context_of(network: PrunableNetwork, task: Task, **changes: Any) -> Context:
    """Everything that criteria may look at."""
    arguments: dict[str, Any] = {"model": network.model, "mask": None, **changes}
    statistics = collect_statistics(
        arguments["model"], network.graph, task, mask=arguments["mask"], examples=EXAMPLES, batch_size=4
    )
    calibration = Calibration(task=task, examples=EXAMPLES)
    return Context(graph=network.graph, statistics=statistics, calibration=calibration, **arguments)


def residual_filters(network: PrunableNetwork) -> list[Tensor]:
    """The two layers that make the first group of the residual toy, a row per channel."""
    return [network.model.get_submodule(name).weight.detach().flatten(1) for name in ("stem", "outer")]


def test_l1_sums_absolute_weights_over_all_producers(toys: Toys) -> None:
    """Both ends of the residual sum count."""
    network = toys("residual")

    reference = sum(one.abs().sum(1) for one in residual_filters(network))

    np.testing.assert_allclose(score(network, "l1", "stem"), reference, rtol=1e-5)


def test_l2_is_the_norm_of_all_weights_of_a_channel(toys: Toys) -> None:
    """One norm over the producers together."""
    network = toys("residual")

    reference = torch.cat(residual_filters(network), 1).norm(dim=1)

    np.testing.assert_allclose(score(network, "l2", "stem"), reference, rtol=1e-5)


def test_fpgm_sums_distances_to_all_other_filters(toys: Toys) -> None:
    """Spelled out pair by pair."""
    network = toys("residual")
    rows = torch.cat(residual_filters(network), 1).double().numpy()

    reference = [sum(np.linalg.norm(one - other) for other in rows) for one in rows]

    np.testing.assert_allclose(score(network, "fpgm", "stem"), reference, rtol=1e-9)


def test_fpgm_is_exact_for_filters_that_are_nearly_equal() -> None:
    """What they have in common does not cost digits."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(1e3 + 1e-6 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    network = PrunableNetwork(model, torch.randn(2, 4).double())
    rows = model[0].weight.detach().numpy()

    reference = [sum(np.linalg.norm(one - other) for other in rows) for one in rows]

    np.testing.assert_allclose(score(network, "fpgm", "0"), reference, rtol=1e-9)


def test_fpgm_tells_a_filter_from_its_negative() -> None:
    """Opposite filters are as far apart as can be, not at distance 0."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = -model[0].weight[0]
    network = PrunableNetwork(model, torch.randn(2, 4))

    assert score(network, "fpgm", "0")[0] >= 2 * float(model[0].weight[0].detach().norm()) - 1e-6


def test_cosine_is_one_minus_the_most_alike_of_the_larger(toys: Toys) -> None:
    """Spelled out pair by pair."""
    network = toys("residual")
    rows = torch.cat(residual_filters(network), 1).double().numpy()
    norm = np.linalg.norm(rows, axis=1)
    alike = [[rows[i] @ rows[j] / norm[i] / norm[j] for j in range(8) if norm[j] > norm[i]] or [-1] for i in range(8)]

    np.testing.assert_allclose(score(network, "cosine", "stem"), [1 - max(row) for row in alike], rtol=1e-9)


def test_cosine_sees_direction_only() -> None:
    """A part of another is replaceable, a negative is the opposite, and a filter of zeros is worth nothing."""
    model = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 6.0], [-2.0, -4.0], [0.0, 0.0], [-2.0, -4.0]]))
    network = PrunableNetwork(model, torch.randn(2, 2))

    # the second is the largest; of the two equal ones the first stays
    np.testing.assert_allclose(score(network, "cosine", "0"), [0, 2, 2, 0, 0], atol=1e-12)


def test_bn_scale_sums_the_scales_of_all_norms(toys: Toys) -> None:
    """The norms of the stem and of the block that is added to it."""
    model = toys("residual").model

    reference = model.stem_norm.weight.abs() + model.outer_norm.weight.abs()

    np.testing.assert_allclose(score(toys("residual"), "bn_scale", "stem"), reference.detach(), rtol=1e-6)


def test_bn_scale_follows_concatenation(toys: Toys) -> None:
    """One batch normalisation over two branches: the second branch begins at channel 6."""
    network = toys("concat")

    reference = network.model.norm.weight.detach().abs()[6:]

    np.testing.assert_allclose(score(network, "bn_scale", "right"), reference, rtol=1e-6)


def test_bn_scale_without_norm_is_l2(toys: Toys) -> None:
    """There is nothing else to go by."""
    network = toys("unnormalised")

    assert (score(network, "bn_scale", "0") == score(network, "l2", "0")).all()


def test_grouped_convolution_adds_up_the_filters_of_a_unit(toys: Toys) -> None:
    """A unit is three channels of the stem and two filters of the grouped convolution."""
    network = toys("grouped")
    stem, grouped = (network.model.get_submodule(name).weight.detach() for name in ("stem", "grouped"))

    reference = stem.reshape(4, -1).abs().sum(1) + grouped.reshape(4, -1).abs().sum(1)

    np.testing.assert_allclose(score(network, "l1", "stem"), reference, rtol=1e-5)


def test_layer_used_twice_counts_once(toys: Toys) -> None:
    """It has one set of weights."""
    network = toys("twice")
    stem, again = (network.model.get_submodule(name).weight.detach() for name in ("stem", "again"))

    reference = stem.flatten(1).abs().sum(1) + again.flatten(1).abs().sum(1)

    np.testing.assert_allclose(score(network, "l1", "stem"), reference, rtol=1e-5)


def test_transposed_convolution_has_its_filters_along_the_second_dimension(toys: Toys) -> None:
    """Its weight is ``(C_in, C_out, kH, kW)``."""
    network = toys("transposed")

    reference = network.model.up.weight.detach().abs().sum((0, 2, 3))

    np.testing.assert_allclose(score(network, "l1", "up"), reference, rtol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(8, 16), (16, 8), (8, 8)])
def test_grouped_transposed_convolution_has_its_groups_along_its_inputs(inputs: int, outputs: int) -> None:
    """Its weight is ``(C_in, C_out / groups, kH, kW)``: a unit is one group of it, and the filters that feed it."""
    torch.manual_seed(0)
    first, up = nn.Conv2d(1, inputs, 3), nn.ConvTranspose2d(inputs, outputs, 2, 2, groups=4)
    model = nn.Sequential(first, nn.ReLU(), up, nn.ReLU(), nn.Conv2d(outputs, 2, 1))
    network = PrunableNetwork(model, torch.randn(2, 1, 6, 6))
    units = [
        torch.cat([first.weight[part].flatten(), up.weight[part].flatten()]).detach().double()
        for part in torch.arange(inputs).chunk(4)
    ]
    rows = torch.stack(units)

    assert network.graph.group("0").size == 4
    np.testing.assert_allclose(score(network, "l1", "0"), rows.abs().sum(1), rtol=1e-6)
    np.testing.assert_allclose(score(network, "l2", "0"), rows.norm(dim=1), rtol=1e-6)
    np.testing.assert_allclose(score(network, "fpgm", "0"), torch.cdist(rows, rows).sum(1), rtol=1e-6)


def test_pruned_grouped_transposed_convolution_keeps_its_scores() -> None:
    """Of the groups that are left; fewer outputs than inputs."""
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, 2, groups=4), nn.Conv2d(8, 2, 1))
    network = PrunableNetwork(model, torch.randn(2, 1, 6, 6))
    mask = np.array([True, False, True, True])
    smaller = network.pruned(PruningPlan.from_mask(network.graph, mask))

    scores = unit_scores("l1", Context(smaller, network.graph, mask=mask))

    np.testing.assert_allclose(scores, np.where(mask, score(network, "l1", "0"), 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("criterion", "field"),
    [
        ("taylor", "taylor"),
        ("taylor_squared", "taylor_squared"),
        ("activation", "activation_mean"),
        ("activation_variance", "activation_variance"),
    ],
)
def test_data_aware_criteria_read_the_statistics(toys: Toys, task_for: TaskFor, criterion: str, field: str) -> None:
    """The whole network's scores are the groups' one after another."""
    network = toys("residual")
    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=16)

    scores = unit_scores(criterion, Context(network.model, network.graph, statistics))

    assert (scores == getattr(statistics, field)).all()
    assert not np.shares_memory(scores, getattr(statistics, field))


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in {*WEIGHTS, "encoder_attention"}])
def test_data_aware_criteria_without_data_are_rejected(toys: Toys, criterion: str) -> None:
    """The message names the criterion and those that need none."""
    with pytest.raises(PruningError, match=f"`criterion` {criterion} needs calibration data"):
        score(toys("residual"), criterion, "stem")


def test_unknown_criterion_is_rejected_with_the_nearest(toys: Toys) -> None:
    """A near miss gets a suggestion."""
    network = toys("residual")

    with pytest.raises(PruningError, match="Did you mean 'taylor_squared'"):
        unit_scores("taylor_square", Context(network.model, network.graph))


def test_scores_that_are_not_finite_are_rejected(toys: Toys) -> None:
    """A NaN would silently sort to one end."""
    network = toys("sequential")
    model = nn.Sequential(*network.model)
    broken = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    broken.weight.data[2] = float("nan")
    model[0] = broken

    with pytest.raises(PruningError, match="`criterion` l1 should give finite scores. Received 1 non-finite"):
        unit_scores("l1", Context(model, network.graph))


def test_random_scores_follow_their_generator(toys: Toys) -> None:
    """Same seed, same scores; another seed, others."""
    network = toys("residual")

    def drawn(seed: int) -> list[float]:
        context = Context(network.model, network.graph, rng=np.random.default_rng(seed))
        return unit_scores("random", context).tolist()

    assert drawn(0) == drawn(0) != drawn(1)


def read_by_second(network: PrunableNetwork, task: Task) -> np.ndarray:
    """What the second convolution of the chain reads ``(8, examples * positions)``."""
    (inputs, _), *_ = task.batches("calibration", batch_size=EXAMPLES, limit=EXAMPLES)
    with torch.no_grad():
        return network.model[:4](*inputs).transpose(0, 1).flatten(1).double().numpy()


@pytest.mark.parametrize(
    ("criterion", "reference"),
    [
        ("apoz", lambda rows: 1 - (rows == 0).mean(1)),
        ("activation_variance", lambda rows: rows.var(1)),
        ("activation", lambda rows: np.abs(rows).mean(1)),
    ],
)
def test_activation_criteria_are_those_of_what_is_read(
    toys: Toys, task_for: TaskFor, criterion: str, reference: Callable[[np.ndarray], np.ndarray]
) -> None:
    """Counted on the activations themselves; more is better for each."""
    network = toys("sequential")
    task = task_for(network)

    scores = unit_scores(criterion, context_of(network, task))[network.graph.groups[0].units]

    np.testing.assert_allclose(scores, reference(read_by_second(network, task)), rtol=1e-3)


def test_taylor_weight_is_gradient_times_weight_of_the_folded_network(toys: Toys, task_for: TaskFor) -> None:
    """PyTorch folds; what makes a channel then is one filter and one bias."""
    network = toys("sequential")
    task = task_for(network)
    conv, norm, *others = copy.deepcopy(network.model).eval()
    folded = fuse_conv_bn_eval(conv, norm)
    reference = np.zeros(8)
    for inputs, targets in task.batches("calibration", batch_size=weight_changes.GRADIENT_BATCH, limit=EXAMPLES):
        weight, bias = folded.weight.detach().requires_grad_(), folded.bias.detach().requires_grad_()
        made = F.conv2d(*inputs, weight, bias, padding=1)
        task.loss(nn.Sequential(*others)(made), targets).backward()
        change = (weight * weight.grad).sum((1, 2, 3)) + bias * bias.grad
        reference += change.abs().detach().numpy() * len(targets) / EXAMPLES

    scores = unit_scores("taylor_weight", context_of(network, task))

    np.testing.assert_allclose(scores[network.graph.groups[0].units], reference, rtol=1e-4)


def test_taylor_weight_of_a_normalised_filter_is_that_of_scale_and_shift(toys: Toys, task_for: TaskFor) -> None:
    """The other way to write it: both parameters of the batch normalisation, and nothing of the filter."""
    network = toys("sequential")
    task = task_for(network)
    model = copy.deepcopy(network.model).eval()
    (inputs, targets), *_ = task.batches("calibration", batch_size=8, limit=8)
    task.loss(model(*inputs), targets).backward()
    norm = model[1]

    reference = (norm.weight * norm.weight.grad + norm.bias * norm.bias.grad).abs().detach()
    context = Context(network.model, network.graph, calibration=Calibration(task=task, examples=8))

    scores = unit_scores("taylor_weight", context)[network.graph.groups[0].units]
    np.testing.assert_allclose(scores, reference, rtol=1e-3, atol=1e-6 * float(reference.max()))


@pytest.mark.parametrize(
    "name", ["concat", "flattened", "grouped", "residual", "sequential", "transposed", "twice", "unnormalised"]
)
def test_what_makes_a_channel_is_worth_what_reads_it_behind_relu(
    toys: Toys, task_for: TaskFor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever doubles the one and halves the other changes nothing, so both have one derivative."""
    monkeypatch.setattr(weight_changes, "GRADIENT_BATCH", 1)
    network = toys(name)
    context = context_of(network, task_for(network))

    made, read = unit_scores("taylor_weight", context), unit_scores("taylor", context)

    np.testing.assert_allclose(made, read, rtol=1e-3, atol=1e-4 * read.max())


def test_taylor_second_adds_the_fisher_information_of_what_reads(
    toys: Toys, task_for: TaskFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One example at a time, weight by weight."""
    monkeypatch.setattr(weight_changes, "GRADIENT_BATCH", 1)
    network = toys("residual")
    task = task_for(network)
    model = copy.deepcopy(network.model).eval()
    first, second = np.zeros(6), np.zeros(6)
    for inputs, targets in task.batches("calibration", batch_size=1, limit=EXAMPLES):
        model.zero_grad()
        task.loss(model(*inputs), targets).backward()
        change = model.outer.weight * model.outer.weight.grad
        first += change.sum((0, 2, 3)).abs().detach().numpy() / EXAMPLES
        second += change.square().sum((0, 2, 3)).detach().numpy() / EXAMPLES / 2

    scores = unit_scores("taylor_second", context_of(network, task))[network.graph.group("inner").units]

    np.testing.assert_allclose(scores, first + second, rtol=1e-3)


def state_of(model: nn.Module) -> list[Any]:
    """All that a criterion must leave as it is."""
    tensors = [one.detach().clone() for one in (*model.parameters(), *model.buffers())]
    flags = [(one.requires_grad, one.grad is None) for one in model.parameters()]
    modules = [(one.training, len(one._forward_pre_hooks), len(one._forward_hooks)) for one in model.modules()]
    return [flags, modules, [one.tolist() for one in tensors]]


@pytest.mark.parametrize("criterion", ALONE)
def test_contract_holds(toy: PrunableNetwork, task_for: TaskFor, criterion: str, few_steps: None) -> None:
    """One finite number per unit, the same each time, and a network left as it was, for every way of coupling."""
    task = task_for(toy)
    model = copy.deepcopy(toy.model).train()
    next(model.parameters()).requires_grad_(False)
    before, statistics = state_of(model), collect_statistics(model, toy.graph, task, examples=8)
    drawn = torch.get_rng_state()

    def scores() -> np.ndarray:
        calibration = Calibration(task=task, examples=8)
        return unit_scores(criterion, Context(model, toy.graph, statistics, calibration=calibration))

    first = scores()
    assert first.shape == (toy.graph.units,)
    assert first.dtype == np.float64
    assert np.isfinite(first).all()
    assert (first == scores()).all()
    assert state_of(model) == before
    assert (torch.get_rng_state() == drawn).all()


@pytest.mark.parametrize("name", ["sequential", "residual", "mobile", "grouped", "concat", "flattened", "transposed"])
def test_pruned_network_is_scored_like_one_that_was_always_so_small(
    toys: Toys, task_for: TaskFor, name: str, few_steps: None
) -> None:
    """With the mask, what is left has the scores of a network traced anew, and what is gone has 0."""
    network = toys(name)
    task = task_for(network)
    half = np.concatenate([np.arange(group.size) % 2 == 0 for group in network.graph.groups])
    small = network.pruned(PruningPlan.from_mask(network.graph, half))
    alone = context_of(PrunableNetwork(small, network.example_inputs), task)
    context = context_of(network, task, model=small, mask=half)

    for criterion in ALONE:
        if criterion == "random":
            continue
        scores = unit_scores(criterion, context)
        np.testing.assert_allclose(scores[half], unit_scores(criterion, alone), rtol=1e-4, atol=1e-9, err_msg=criterion)
        assert (scores[~half] == 0).all()


def test_network_without_a_block_is_scored(zoo: Toys, task_for: TaskFor, few_steps: None) -> None:
    """Between rounds, blocks that were left out are gone: what stays is scored, whatever the criterion."""
    network = zoo("digits_resnet")
    graph, block = network.graph, network.blocks[0]
    mask = np.concatenate([np.arange(group.size) % 2 == 0 for group in graph.groups])
    plan = PruningPlan.from_mask(graph, mask).without([block])
    few = ScorerSettings(statistics_examples=4, recovery="none", precision="float32")
    scorer = Scorer(network, task_for(network), few)
    inside = [all(path.startswith(f"{block}.") for path in group.producers) for group in graph.groups]
    left = mask & ~np.array(inside)[graph.group_of]

    for criterion in ALONE:
        scorer.settings = replace(few, criterion=criterion)
        _, scores = scorer.look(plan, examples=4)

        assert np.isfinite(scores).all(), criterion
        assert (scores[~mask] == 0).all(), criterion
        assert scores[left].any(), criterion
    assert any(inside)
    assert left[graph.groups[0].units].any()


def test_filters_of_a_block_that_is_left_out_do_not_count() -> None:
    """The residual sum behind the stem is made by the stem and by two blocks, of which one stays."""
    model = CifarResNet(2, in_channels=1, projection=True)
    network = PrunableNetwork(model, torch.randn(2, 1, 8, 8))
    smaller = network.pruned(PruningPlan.unpruned(network.graph).without(["layer1.0"]))
    context = Context(smaller, network.graph)

    reference = sum(one.weight.detach().flatten(1).abs().sum(1) for one in (model.conv1, model.layer1[1].conv2))

    np.testing.assert_allclose(CRITERIA["l1"](network.graph.group("conv1"), context), reference, rtol=1e-5)
    for criterion in WEIGHTS[:-1]:
        assert not CRITERIA[criterion](network.graph.group("layer1.0.conv1"), context).any()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gates that are hardly trained: here they need not be good."""
    monkeypatch.setattr(group_attention, "GateSettings", partial(GateSettings, steps=2))


@pytest.mark.parametrize(
    "name",
    [
        *("digits_resnet", "digits_vgg", "digits_mobilenet", "cifar_resnet20", "cifar_resnet20_conv"),
        *(
            pytest.param(f"cifar_{name}", marks=pytest.mark.slow)
            for name in ("vgg16", "mobilenet_v2", "efficientnet_b0")
        ),
    ],
)
def test_every_family_of_the_zoo_is_scored(zoo: Toys, task_for: TaskFor, name: str, few_steps: None) -> None:
    """Depthwise convolutions, squeeze and excitation, wide layers: finite, and not all alike."""
    assert_scored(zoo(name), task_for(zoo(name)))


def test_torchvision_network_is_scored(task_for: TaskFor, few_steps: None) -> None:
    """Depthwise convolutions and squeeze and excitation as others build them."""
    network = PrunableNetwork(build_network("mobilenet_v3_small", num_classes=5), torch.randn(2, 3, 32, 32))
    assert_scored(network, task_for(network))


def assert_scored(network: PrunableNetwork, task: Task) -> None:
    """Every criterion tells channels apart; APoZ need not where no activation is ever 0."""
    statistics = collect_statistics(network.model, network.graph, task, examples=4, covariances=False)
    calibration = Calibration(task=task, examples=4)
    context = Context(network.model, network.graph, statistics, calibration=calibration)
    for criterion in ALONE:
        scores = unit_scores(criterion, context)

        assert np.isfinite(scores).all(), criterion
        assert scores.std() > 0 or criterion == "apoz", criterion
