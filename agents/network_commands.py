"""The commands about one network: inspect, pretrain, prune. They return results and print nothing."""

from __future__ import annotations

from prunegym.agents.config import InspectConfig, PretrainConfig, PruneConfig
from prunegym.agents.inspect import inspect_network
from prunegym.agents.policy_file import load_policy
from prunegym.agents.pretrain import pretrain
from prunegym.agents.prune import carry_out, describe, find_plan, save
from prunegym.agents.reload import EXAMPLE, save_example
from prunegym.agents.running import RESULT, SPLITS, Launch, Reporter, Result, save_splits
from prunegym.agents.runs import RunFolder
from prunegym.agents.searchers import SearchResult
from prunegym.agents.setup import (
    bare_network,
    build_model,
    build_problem,
    build_prunable,
    build_task,
    latency_cache,
    network_source,
    seed_everything,
)
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.export import export_onnx
from prunegym.pruning.files import plain
from prunegym.pruning.latency_table import LatencyTable
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.onnx_export import require_onnx, with_batch
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.program import check_exportable, export_program

PLAN = "plan.json"
SEARCH = "search.json"
"""What the search for the plan took."""
ONNX = "model.onnx"
PROGRAM = "model.pt2"
#: Images whose outputs are kept with a pruned network, so that whoever loads it can compare.
_EXAMPLES = 16


def run_inspect(config: InspectConfig, reporter: Reporter) -> Result:
    """List channel groups, costs and reachable budgets; only ``--out`` makes a folder of it."""
    network = _network_to_inspect(config)
    table = None
    if config.latency:
        settings, cache = config.latency_settings(config.torch_device), latency_cache(config.data_root)
        table = LatencyTable.measure(
            network, settings, progress=reporter.progress, cache=cache, held_out=config.latency_plans
        )
    error = None if table is None or not config.latency_plans else table.error
    inspection = inspect_network(network, latency=table, latency_error=error, rules=config.width_rules)
    content = inspection.to_json()
    if config.out is not None:
        run = Launch(config, reporter, config.network, "inspect", "none").open()
        run.write_json(RESULT, content)
    return Result(content, inspection.to_text())


def run_pretrain(config: PretrainConfig, reporter: Reporter) -> Result:
    """Train a base network."""
    seed_everything(config.seed)
    launch = Launch(config, reporter, config.network, "pretrain", "none")
    content = launch.finished()
    if content is None:
        device = config.torch_device
        task = build_task(config)
        model = build_model(config.network, config.weights, task.data, config.seed)
        run = launch.open()
        task.data.save_indices(run.path(SPLITS))
        trained = pretrain(
            model, task, config, run, seed=config.seed, device=device, progress=reporter.progress
        )
        content = {"folder": str(run.folder), "network": config.network, **plain(trained)}
        run.write_json(RESULT, content)
    score = f"{content['test_score']:.2%} of the test images after {content['epochs']} epochs"
    return Result(content, f"{content['network']}: {score}\nuse it with --weights {content['weights']}")


def run_prune(config: PruneConfig, reporter: Reporter) -> Result:
    """Prune a network for good."""
    seed_everything(config.seed)
    name = "none" if config.plan is not None else config.budget
    launch = Launch(config, reporter, config.network, config.searcher_name, name)
    content = launch.finished()
    if content is None:
        # what would fail at the end had better fail now
        if config.policy is not None:
            load_policy(config.policy)
        if config.onnx:
            require_onnx()
        # a given plan is carried out whatever it costs
        budget = Budget("macs", 1.0) if config.plan is not None else Budget.parse(config.budget)
        task = build_task(config)
        keep, progress = config.keep, reporter.progress
        problem = build_problem(
            config.network, config.weights, config, (budget,), keep=keep, task=task, progress=progress
        )
        if config.plan is not None:
            find_plan(problem, budget, config)
        if config.program:
            network = problem.scorer.network
            check_exportable(network.model, with_batch(network.example_inputs, 1))
        run = launch.open()
        save_splits([problem], run)
        found = _find_plan_once(problem, budget, config, run, progress)
        source = network_source(config.network, task.data)
        result = carry_out(problem, found, config, run=run, source=source, progress=progress)
        save(result, run.folder)
        inputs, _ = next(iter(task.batches("calibration", batch_size=_EXAMPLES, limit=_EXAMPLES)))
        save_example(run.path(EXAMPLE), result.model, inputs)
        content = {"folder": str(run.folder), **plain(result.to_json())}
        example = with_batch(result.network.example_inputs, 1)
        if config.onnx:
            content["onnx_difference"] = export_onnx(result.model, example, run.path(ONNX))
        if config.program:
            content["program"] = plain(export_program(result.model, example, run.path(PROGRAM)))
        run.write_json(RESULT, content)
    lines = [describe(content), f"load it with prunegym.load('{content['folder']}')"]
    if program := content.get("program"):
        lines.append(f"or without its code with prunegym.load_program('{program['path']}')")
        lines += [program["warning"]] if program["warning"] else []
    return Result(content, "\n".join(lines))


def _find_plan_once(
    problem: PruningProblem, budget: Budget, config: PruneConfig, run: RunFolder, progress: bool
) -> SearchResult:
    """Search, unless the run has its plan already."""
    if run.path(PLAN).exists() and run.path(SEARCH).exists():
        plan = PruningPlan.load(run.path(PLAN))
        plan.mask(problem.scorer.network.graph)  # refuses a plan that was edited
        spent = run.read_json(SEARCH)
        return SearchResult(
            plan=plan, evaluations=spent["evaluations"], seconds=spent["seconds"], latency=spent.get("latency")
        )
    found = find_plan(problem, budget, config, progress=progress)
    spent = {
        "evaluations": found.evaluations,
        "seconds": found.seconds,
        "history": found.history,
        "latency": found.latency,
    }
    run.write_json(SEARCH, spent)
    run.write_json(PLAN, found.plan.to_json())
    return found


def _network_to_inspect(config: InspectConfig) -> PrunableNetwork:
    """The network on its own kind of input, or on that of given data."""
    if not config.data:
        return bare_network(config.network, config.weights, config.image_size, config.seed, config.keep)
    task = build_task(config)
    model = build_model(config.network, config.weights, task.data, config.seed)
    return build_prunable(model, task, name=config.network, keep=config.keep)
