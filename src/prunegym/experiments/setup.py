"""From options to the objects that work: data, networks and pruning problems."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from prunegym.agents.configuration.options import DataOptions, ProblemOptions, ScoringOptions
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.datasets.data import DataSplits, default_data_root, load_data
from prunegym.pruning.importance.criteria import ENCODER_ATTENTION, Criterion
from prunegym.pruning.modes import evaluating
from prunegym.pruning.network import PrunableNetwork, check_keep
from prunegym.pruning.networks.zoo import build_network, input_shape_of, sizes_by_default
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask, Task, first_batch, forward, scores_of
from prunegym.pruning.timing.latency import LatencySettings
from prunegym.pruning.timing.latency_table import LatencyTable
from prunegym.pruning.widths import WidthRules

#: Examples that a network is traced on: two, so that a batch of one is not taken for a broadcast dimension.
TRACED_EXAMPLES = 2


def seed_everything(seed: int) -> None:
    """Seed the global generators, for code that is not ours; our own takes generators as arguments."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def build_task(options: DataOptions) -> ClassificationTask:
    """Read the data and cut them into splits.

    Raises:
        PruningError: The data are unknown, absent, damaged or too small.
    """
    return ClassificationTask(
        load_data(
            options.data,
            data_root=options.data_root,
            seed=options.split_seed,
            sizes=None if options.reward_split is None else {"reward": options.reward_split},
            image_size=options.image_size,
            num_workers=options.data_workers,
            download=options.download,
        )
    )


def network_source(name: str, data: DataSplits) -> dict[str, Any]:
    """How to build a network for data: the arguments of :func:`~prunegym.pruning.networks.zoo.build_network`."""
    channels, height, _ = data.input_shape
    return {"network": name, "num_classes": data.num_classes, "in_channels": channels, "image_size": height}


def build_model(name: str, weights: str | None, data: DataSplits, seed: int) -> torch.nn.Module:
    """Make a network whose input and head fit the data.

    Raises:
        PruningError: The network is unknown or fails, or the weights do not fit.
    """
    source = network_source(name, data)
    return build_network(
        name,
        num_classes=source["num_classes"],
        in_channels=source["in_channels"],
        image_size=source["image_size"],
        weights=weights,
        seed=seed,
    )


def example_inputs(task: Task) -> tuple[Any, ...]:
    """Inputs that a network of the task is traced on, on the CPU."""
    inputs, _ = first_batch(task, "calibration", TRACED_EXAMPLES)
    return inputs if isinstance(inputs, tuple) else (inputs,)


def build_prunable(
    model: torch.nn.Module, task: Task, *, name: str, keep: Sequence[str] = (), strict: bool = True
) -> PrunableNetwork:
    """Trace a network on examples of its task, and check that its outputs are those the task is about.

    Raises:
        PruningError: The network does not run, its head does not fit the task, the task gives no examples or no score
            for each, or nothing can be pruned.
    """
    network = PrunableNetwork(model, example_inputs(task), name=name, keep=keep, strict=strict)
    inputs, targets = first_batch(task, "calibration", TRACED_EXAMPLES)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    inputs, targets = tree_map_only(torch.Tensor, lambda leaf: leaf.to(device), (inputs, targets))
    with evaluating(model), torch.no_grad():
        scores_of(task, forward(model, inputs), targets)
    return network


def assemble_problem(
    network: PrunableNetwork,
    task: Task,
    budgets: Sequence[Budget],
    *,
    settings: ScorerSettings | None = None,
    latency: LatencySettings | None = None,
    rules: WidthRules | None = None,
    strict: bool = True,
    cache: Path | None = None,
    given: Mapping[str, Criterion] | None = None,
    leave_out: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> PruningProblem:
    """Join a network, a task and budgets.

    Args:
        network: The network.
        task: Data, loss and score.
        budgets: What may remain.
        settings: How plans are scored.
        latency: How latency is measured, where it is needed: a table is measured, or read if there is one.
        rules: How wide pruned layers may be; by default any width.
        strict: Refuse bounds on widths that match no group of this network.
        cache: Folder of latency tables.
        given: Criteria that :func:`given_criteria` made.
        leave_out: Regular expressions of residual blocks that every plan leaves out.
        device: Where to score.
        progress: Show a bar while a latency table is measured.

    Raises:
        InfeasibleBudgetError: A budget cannot be reached.
        PruningError: Network and task do not belong together, a criterion has no finite scores, or the rules leave
            a group no width.
    """
    if rules is not None:
        rules.apply(network.graph, strict=strict)  # what is refused should be before anything is measured
    table = None
    if latency is not None:
        table = LatencyTable.measure(network, latency, progress=progress, cache=cache)
    removed = network.blocks_matching(leave_out)
    scorer = Scorer(network, task, settings, given=given, device=device)
    return PruningProblem(scorer, tuple(budgets), table, rules, removed)


def given_criteria(options: ScoringOptions, network: PrunableNetwork) -> dict[str, Criterion]:
    """The criterion asked for, if it is one that needs a trained policy.

    Raises:
        PruningError: The policy file is missing, damaged or of another version.
    """
    policy: Path | None = getattr(options, "policy", None)
    if options.criterion != ENCODER_ATTENTION or policy is None:
        return {}
    from prunegym.agents.policies.encoder_attention import EncoderAttention
    from prunegym.agents.policies.policy_file import load_policy

    agent, _ = load_policy(policy)
    return {ENCODER_ATTENTION: EncoderAttention(agent, network)}


def build_problem(
    name: str,
    weights: str | None,
    options: ProblemOptions,
    budgets: Sequence[Budget],
    *,
    keep: Sequence[str] = (),
    task: ClassificationTask | None = None,
    label: str | None = None,
    latency: bool = False,
    progress: bool = False,
    strict: bool = True,
) -> PruningProblem:
    """Make everything that pruning a network takes.

    Args:
        name: The network.
        weights: Its weights.
        options: Data, scoring, device, seed.
        budgets: What may remain.
        keep: Regular expressions of module paths that are not pruned.
        task: The data, if they have been read already.
        label: What the network is called in tables; its name by default.
        latency: Measure a latency table even if no budget asks for it, for a reward that does.
        progress: Show a bar while a latency table is measured.
        strict: Refuse patterns of ``keep`` and bounds on widths that match no group of this network.

    Raises:
        InfeasibleBudgetError: A budget cannot be reached.
        PruningError: Network, weights and data do not fit, or are not there, or a bound does not fit the network.
    """
    task = build_task(options) if task is None else task
    model = build_model(name, weights, task.data, options.seed)
    network = build_prunable(model, task, name=label or name, keep=keep, strict=strict)
    device = options.torch_device
    wanted = latency or any(budget.kind == "latency" for budget in budgets)
    return assemble_problem(
        network,
        task,
        budgets,
        settings=options.scorer_settings,
        latency=options.latency_settings(device) if wanted else None,
        rules=options.width_rules,
        strict=strict,
        cache=latency_cache(options.data_root),
        given=given_criteria(options, network),
        leave_out=getattr(options, "leave_out", ()),
        device=device,
        progress=progress,
    )


def build_problems(
    pairs: Sequence[tuple[str, str | None]],
    options: ProblemOptions,
    budgets: Sequence[Budget],
    *,
    keep: Sequence[str] = (),
    task: ClassificationTask | None = None,
    latency: bool = False,
    progress: bool = False,
) -> list[PruningProblem]:
    """Make the problems of several networks on the same data; a network that comes twice is numbered.

    A bound on widths, and a pattern of what is kept, has to match a group of one of them.
    """
    task = build_task(options) if task is None else task
    names = [name for name, _ in pairs]
    problems = []
    for index, (name, weights) in enumerate(pairs):
        before = names[:index].count(name)
        problems.append(
            build_problem(
                name,
                weights,
                options,
                budgets,
                keep=keep,
                task=task,
                label=f"{name}#{before + 1}" if before else name,
                latency=latency,
                progress=progress,
                strict=len(pairs) == 1,
            )
        )
    check_patterns_match(keep, options.width_rules, problems)
    return problems


def check_patterns_match(keep: Sequence[str], rules: WidthRules, problems: Sequence[PruningProblem]) -> None:
    """Make sure that each pattern of what is kept, and of each bound, is about something in one of several networks.

    Raises:
        PruningError: One is not.
    """
    networks = [problem.scorer.network for problem in problems]
    check_keep(keep, networks)
    rules.check_matches([network.graph for network in networks])


def latency_cache(data_root: Path | None) -> Path:
    """Folder of latency tables."""
    return (data_root or default_data_root()).expanduser() / "latency"


def bare_network(
    name: str, weights: str | None, sizes: Mapping[str, int | None], seed: int, keep: Sequence[str] = ()
) -> PrunableNetwork:
    """A network without data, traced on noise of the size that it is made for.

    Args:
        name: As in :func:`~prunegym.pruning.networks.zoo.build_network`.
        weights: A weight file or the name of published weights, or None.
        sizes: ``num_classes``, ``in_channels`` and ``image_size``, where they are not to be the network's own.
        seed: Of the weights and the noise.
        keep: Patterns of what is not pruned.

    Raises:
        PruningError: The network is unknown or does not run, or nothing in it can be pruned.
    """
    asked = {key: value for key, value in sizes.items() if value is not None}
    model = build_network(name, weights=weights, seed=seed, **asked)
    known = {**sizes_by_default(name), **asked}
    shape = input_shape_of(name, known.get("in_channels"), known.get("image_size"))
    noise = torch.randn(TRACED_EXAMPLES, *shape, generator=torch.Generator().manual_seed(seed))
    return PrunableNetwork(model, noise, name=name, keep=keep)
