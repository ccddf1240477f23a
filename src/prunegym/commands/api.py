"""The Python face: what the commands do, for any model and any task. Exported by ``prunegym``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prunegym.agents.configuration.config import PruneConfig
from prunegym.agents.configuration.options import LatencyOptions, ProblemOptions, parse_budgets
from prunegym.agents.configuration.width_options import WidthOptions
from prunegym.agents.inspect import Inspection, inspect_network
from prunegym.commands.face_options import TaskLike, as_task, checked_options, data_name, texts_of
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.rewards import profile_named
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.deployment.finetune import FinetuneResult
from prunegym.experiments.prune import PruneResult, carry_out, check_fine_tuning, find_plan
from prunegym.experiments.prune import save as save_pruned
from prunegym.experiments.setup import assemble_problem, build_prunable, given_criteria, latency_cache, network_source
from prunegym.pruning.budget import Budget
from prunegym.pruning.copies import duplicate
from prunegym.pruning.datasets.data import DataSplits
from prunegym.pruning.deployment.saving import load_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.kinds import check_kind
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.task import ClassificationTask, Task
from prunegym.pruning.widths import bound_texts

#: Patterns of module paths, with the least and most that their groups keep.
Bounds: TypeAlias = Mapping[str, str | float | tuple[float, float]]

__all__ = ["inspect", "load", "make_env", "prune", "report", "save"]


def inspect(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    plan: PruningPlan | None = None,
    keep: Sequence[str] = (),
    align: int = 1,
    min_channels: int = 1,
    bounds: Bounds | None = None,
    name: str | None = None,
) -> Inspection:
    """List the channel groups of a model, what ties them together, what is frozen and why, and costs.

    Args:
        model: Any network; it is not changed.
        example_inputs: A tensor with a batch dimension, or a tuple for ``model(*inputs)``.
        plan: A plan of this network, such as that of a :class:`PruneResult`: tell what it keeps and leaves out too.
        keep: Regular expressions of module paths (layers, or modules that hold them) whose channels are not pruned.
        align: See :func:`prune`.
        min_channels: See :func:`prune`.
        bounds: See :func:`prune`.
        name: What the network is called; by default its class.

    Returns:
        The groups; ``to_text()`` for people, ``to_json()`` for programs.

    Raises:
        PruningError: The model does not run on the inputs, nothing in it can be pruned, or a group is left no width.
    """
    options = WidthOptions(align=align, min_channels=min_channels, bound=bound_texts(bounds))
    network = PrunableNetwork(model, example_inputs, name=name or type(model).__name__, keep=texts_of(keep))
    return inspect_network(network, plan=plan, rules=options.width_rules)


def prune(
    model: nn.Module,
    task: Task | DataSplits | str | Path,
    budget: str = "macs:0.5",
    *,
    searcher: str | None = None,
    policy: str | Path | None = None,
    evaluations: int = 100,
    epochs: int = 0,
    learning_rate: float | None = None,
    keep: Sequence[str] = (),
    align: int = 1,
    min_channels: int = 1,
    bounds: Bounds | None = None,
    name: str | None = None,
    source: str | Mapping[str, Any] | None = None,
    latency: bool = False,
    device: str = "auto",
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> PruneResult:
    """Prune a trained model: find a plan, cut, recover and, if asked for, fine-tune.

    Args:
        model: The trained network; it is not changed.
        task: Data, loss and score: an object with the methods of :class:`prunegym.Task`; or data for image
            classification, by name, file or folder.
        budget: What may remain, such as ``macs:0.5``, ``params:0.3``, ``latency:0.7`` or ``latency:12ms``.
        searcher: Who makes the plan: ``policy``, ``knapsack``, ``uniform``, ``random`` or another of
            ``prunegym.agents.searching.searchers.SEARCHERS``; by default the policy if there is one, else
            ``prior``: the best of the knapsack, the uniform allocation and halfway between them (with fewer than 3
            evaluations the knapsack).
        policy: Policy file, for the searcher ``policy`` or the criterion ``encoder_attention``.
        evaluations: Plans that a searcher such as ``random`` may score.
        epochs: Of fine-tuning; 0 leaves it out.
        learning_rate: Of fine-tuning, at its highest; by default 0.01 with SGD and 0.001 with AdamW.
        keep: Regular expressions of module paths (layers, or modules that hold them) whose channels are not pruned.
        align: Widths of pruned layers are multiples of this where possible; a group of fewer channels is not pruned.
        min_channels: Fewest channels that each group keeps.
        bounds: Least and most that some groups keep: a regular expression of module paths, with a pair of shares of
            the channels, as in ``{"layer1.*": (0.5, 1.0)}``, or a text, as in ``{"stem": "16ch.."}``.
        name: What the network is called; by default its class.
        source: How to build the unpruned network, if it comes from :func:`prunegym.build_network`: its name
            there, if the data are given, or ``network``, ``num_classes``, ``in_channels`` and ``image_size``.
            Without it, :func:`load` needs the model.
        latency: Measure latency before and after.
        device: Where to compute; ``auto`` takes a graphics card if there is one.
        seed: Of everything random.
        progress: Show bars on standard error.
        **options: Any other option of ``prunegym prune``, such as ``criterion``, ``recovery`` or ``distill``,
            under the name it has in :class:`prunegym.agents.configuration.config.PruneConfig`. One that is unknown, or
            would change nothing, is refused: ``split_seed`` where the data are read already, ``temperature`` without
            ``distill``.

    Returns:
        The smaller model, its plan, scores on the test split and costs.

    Raises:
        InfeasibleBudgetError: The budget cannot be reached.
        PruningError: Something does not fit or is out of range; the message says what to do.
    """
    wanted = Budget.parse(budget)
    measured = latency or wanted.kind == "latency"
    idle = _idle(options, measured, "latency=True or a latency budget")
    idle["checkpoint_minutes"] = "a checkpoint, which prunegym.finetune writes"
    further = checked_options(prune, PruneConfig, options, task, idle, table=wanted.kind == "latency")
    config = PruneConfig(
        network=name or type(model).__name__,
        budget=budget,
        searcher=searcher,
        policy=None if policy is None else Path(policy),
        evaluations=evaluations,
        epochs=epochs,
        learning_rate=learning_rate,
        keep=texts_of(keep),
        align=align,
        min_channels=min_channels,
        bound=bound_texts(bounds),
        device=device,
        seed=seed,
        **data_name(task),
        **further,
    )
    wanted = Budget("macs", 1.0) if config.plan is not None else wanted
    problem = _problem(model, task, [wanted], config, name=config.network, keep=config.keep, progress=progress)
    check_fine_tuning(problem, config)
    found = find_plan(problem, wanted, config, progress=progress)
    known = completed_source(source, problem.scorer.task)
    return carry_out(problem, found, config, source=known, latency=latency, progress=progress)


def make_env(
    model: nn.Module,
    task: Task | DataSplits | str | Path,
    budget: str | Sequence[str] = "macs:0.5",
    *,
    rounds: int = 1,
    mode: str = "budgeted",
    reward: str | None = None,
    keep: Sequence[str] = (),
    align: int = 1,
    min_channels: int = 1,
    bounds: Bounds | None = None,
    name: str | None = None,
    device: str = "auto",
    seed: int = 0,
    **options: Any,
) -> ChannelPruningEnv:
    """Make the Gymnasium environment ``prunegym/ChannelPruning-v0`` around a model.

    Args:
        model: The trained network; it is not changed.
        task: Data, loss and score, as for :func:`prune`.
        budget: What may remain; of several, ``reset`` draws one.
        rounds: Steps of an episode.
        mode: ``budgeted`` projects every action onto the budget; ``free`` does not.
        reward: Reward profile; by default ``improvement``, or ``tradeoff`` in free mode.
        keep: Regular expressions of module paths (layers, or modules that hold them) whose channels are not pruned.
        align: See :func:`prune`.
        min_channels: See :func:`prune`.
        bounds: See :func:`prune`.
        name: What the network is called; by default its class.
        device: Where to compute.
        seed: Of the recovery steps. The environment itself is seeded by ``reset``.
        **options: Any other option of how plans are scored, such as ``criterion``, ``recovery`` or
            ``reward_examples``, under the name it has in :class:`prunegym.agents.configuration.options.ProblemOptions`.
            One that is unknown, or would change nothing, is refused.

    Raises:
        InfeasibleBudgetError: A budget cannot be reached.
        PruningError: Something does not fit or is out of range; the message says what to do.
    """
    budgets = parse_budgets(texts_of(budget))
    rewarded = profile_named(reward).latency != 0 if reward is not None else mode == "free"
    measured = rewarded or any(one.kind == "latency" for one in budgets)
    idle = _idle(options, measured, "a latency budget, or a reward with a latency term")
    further = checked_options(make_env, ProblemOptions, options, task, idle, table=measured)
    config = ProblemOptions(
        align=align,
        min_channels=min_channels,
        bound=bound_texts(bounds),
        device=device,
        seed=seed,
        **data_name(task),
        **further,
    )
    called = name or type(model).__name__
    problem = _problem(model, task, budgets, config, name=called, keep=texts_of(keep), latency=rewarded)
    return ChannelPruningEnv(problem, rounds=rounds, mode=mode, profile=reward)


def save(result: PruneResult | FinetuneResult, folder: str | Path) -> None:
    """Write a pruned or fine-tuned network, to be read by :func:`load`.

    Args:
        result: What :func:`prune` or :func:`prunegym.finetune` returned.
        folder: Gets ``model.safetensors`` and ``recipe.json``.

    Raises:
        PruningError: The folder cannot be written, or the network would not come back as it is.
    """
    path = Path(folder).expanduser()
    if isinstance(result, FinetuneResult):
        result.save(path)
    else:
        save_pruned(result, path)


def load(folder: str | Path, model: nn.Module | None = None, *, allow_code: bool = False) -> nn.Module:
    """Read a network that :func:`save` or ``prunegym prune`` wrote.

    Args:
        folder: Holds ``model.safetensors`` and ``recipe.json``.
        model: The unpruned network, with any weights, where the recipe does not say how to build it.
        allow_code: Let a recipe that names ``path/file.py:function`` run that file. Leave it at False for
            folders from others.

    Returns:
        The pruned network, in evaluation mode, on the CPU. Nothing is unpickled.

    Raises:
        PruningError: A file is missing, damaged or of another version, or ``model`` is another network.
    """
    return load_network(Path(folder).expanduser(), model=model, allow_code=allow_code)


def report(
    runs: Sequence[str | Path] | str | Path, *, out: str | Path | None = None, pictures: str | Path | None = None
) -> Path:
    """Write one self-contained HTML page about runs: what was asked and reached, rivals, graph, attention, time.

    Args:
        runs: Run folders of any command; a demonstration counts as all of its steps.
        out: The page; by default ``report.html`` in the folder of the only run, or in the working directory if there
            are several.
        pictures: Folder that gets every picture as PNG and SVG too.

    Returns:
        The page's path.

    Raises:
        PruningError: A folder is absent, damaged or of something else, or a file could not be written.
    """
    from prunegym.reporting.report import report as write

    folders = [runs] if isinstance(runs, str | Path) else list(runs)
    return write(
        [Path(one) for one in folders],
        None if out is None else Path(out),
        pictures=None if pictures is None else Path(pictures).expanduser(),
    ).path


def completed_source(source: str | Mapping[str, Any] | None, task: Task) -> Mapping[str, Any] | None:
    """How to build the unpruned network, completed from the data."""
    if not isinstance(source, str):
        return source
    if not isinstance(task, ClassificationTask):
        raise PruningError(
            f"`source` should be a mapping for a task of one's own. Received '{source}'. "
            "Give network, num_classes, in_channels and image_size, or leave it out."
        )
    return network_source(source, task.data)


def _idle(options: Mapping[str, Any], measured: bool, by: str) -> dict[str, str]:
    """Options about latency where none is measured, and about training before a score where there is none."""
    idle = {} if measured else {one.name: by for one in fields(LatencyOptions)}
    if "distill" not in (options.get("recovery"), options.get("scored")):
        trained = "recovery='distill' or scored='distill'"
        idle |= dict.fromkeys(("recovery_steps", "recovery_rate", "recovery_split"), trained)
    return idle


def _problem(
    model: nn.Module,
    task: TaskLike,
    budgets: Sequence[Budget],
    options: ProblemOptions,
    *,
    name: str,
    keep: Sequence[str] = (),
    latency: bool = False,
    progress: bool = False,
) -> PruningProblem:
    """A pruning problem around a copy of the model, which may be moved to another device."""
    known, device = as_task(task, options), options.torch_device
    check_kind(model)
    network = build_prunable(duplicate(model).to("cpu"), known, name=name, keep=keep)
    wanted = latency or any(budget.kind == "latency" for budget in budgets)
    return assemble_problem(
        network,
        known,
        budgets,
        settings=options.scorer_settings,
        latency=options.latency_settings(torch.device(device)) if wanted else None,
        rules=options.width_rules,
        cache=latency_cache(options.data_root),
        given=given_criteria(options, network),
        leave_out=getattr(options, "leave_out", ()),
        device=device,
        progress=progress,
    )
