"""The commands about one network: inspect, pretrain, prune. They return results and print nothing."""

from __future__ import annotations

from prunegym.agents.configuration.config import InspectConfig, PretrainConfig, PruneConfig
from prunegym.agents.configuration.time_limit import TimeLimit
from prunegym.agents.evaluations.store import STORE, stored
from prunegym.agents.inspect import inspect_network
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.records import save_attention, save_networks
from prunegym.agents.run_folders.reload import EXAMPLE, loading, save_example
from prunegym.agents.run_folders.running import RESULT, SPLITS, Launch, Reporter, Result, save_splits
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SearchResult, check_evaluations
from prunegym.agents.searching.stored_search import load_search, save_search
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.pretrain import pretrain
from prunegym.experiments.prune import carry_out, check_fine_tuning, describe, find_plan, save
from prunegym.experiments.setup import (
    bare_network,
    build_model,
    build_problem,
    build_prunable,
    build_task,
    latency_cache,
    network_source,
    seed_everything,
)
from prunegym.pruning.budget import Budget
from prunegym.pruning.deployment.export import check_formats, check_program, export_network
from prunegym.pruning.files import plain
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import SIZES
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency_table import LatencyTable
from prunegym.pruning.training import check_devices, check_training

#: Images whose outputs are kept with a pruned network, so that whoever loads it can compare.
_EXAMPLES = 16


def run_inspect(config: InspectConfig, reporter: Reporter) -> Result:
    """List channel groups, costs and reachable budgets; only ``--out`` makes a folder of it."""
    network = _network_to_inspect(config)
    plan = None if config.plan is None else PruningPlan.load(config.plan)
    table = None
    if config.latency:
        settings, cache = config.latency_settings(config.torch_device), latency_cache(config.data_root)
        table = LatencyTable.measure(
            network, settings, progress=reporter.progress, cache=cache, held_out=config.latency_plans
        )
    error = None if table is None or not config.latency_plans else table.error
    inspection = inspect_network(network, plan=plan, latency=table, latency_error=error, rules=config.width_rules)
    content = inspection.to_json()
    if config.out is not None:
        run = Launch(config, reporter, config.network, "inspect", "none").open()
        run.write_json(RESULT, content)
    if config.html is not None:
        from prunegym.reporting.inspection import inspection_page
        from prunegym.reporting.report import write_page

        write_page(config.html, inspection_page(content).render(), argument="--html")
        reporter.say(f"page: {config.html}")
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
        check_training(model, task, config.training_settings(config.seed), device=device)
        run = launch.open()
        task.data.save_indices(run.path(SPLITS), argument="--out")
        trained = pretrain(
            model,
            task,
            config,
            run,
            seed=config.seed,
            device=device,
            progress=reporter.progress,
            limit=reporter.limit,
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
        check_devices(config.torch_device, config.devices)
        formats = [name for name, wanted in (("onnx", config.onnx), ("program", config.program)) if wanted]
        if formats:
            check_formats(formats)
        # a given plan is carried out whatever it costs
        budget = Budget("macs", 1.0) if config.plan is not None else Budget.parse(config.budget)
        task = build_task(config)
        keep, progress = config.keep, reporter.progress
        problem = build_problem(
            config.network, config.weights, config, (budget,), keep=keep, task=task, progress=progress
        )
        check_fine_tuning(problem, config)
        if config.plan is not None:
            find_plan(problem, budget, config)
        else:
            check_evaluations(config.searcher_name, problem, config.evaluations)
        if config.program:
            check_program(problem.scorer.network.model, problem.scorer.network.example_inputs)
        run = launch.open()
        save_splits([problem], run)
        save_networks([problem], run, splits=())
        found = _find_plan_once(problem, budget, config, run, progress, reporter.limit)
        if config.searcher_name == "policy" and config.policy is not None:
            # after the search, which pays for the plans that a start is chosen from
            policy, metadata = load_policy(config.policy, device=config.torch_device)
            save_attention(policy, metadata, [problem], run, config.rounds)
        source = network_source(config.network, task.data)
        limit = reporter.limit
        result = carry_out(problem, found, config, run=run, source=source, progress=progress, limit=limit)
        save(result, run.folder)
        inputs, _ = next(iter(task.batches("calibration", batch_size=_EXAMPLES, limit=_EXAMPLES)))
        save_example(run.path(EXAMPLE), result.model, inputs)
        content = {"folder": str(run.folder), **plain(result.to_json())}
        if formats:
            written = export_network(
                result.model,
                result.network.example_inputs,
                run.folder,
                formats,
                blueprint=result.blueprint,
            )
            content["exports"] = plain(written)
        run.write_json(RESULT, content)
    lines = [describe(content), f"load it with {loading(content['folder'], ':' in config.network)}"]
    for one in content.get("exports", []):
        lines += [f"or with {one['load']}", *([one["warning"]] if one["warning"] else [])]
    return Result(content, "\n".join(lines))


def _find_plan_once(
    problem: PruningProblem, budget: Budget, config: PruneConfig, run: RunFolder, progress: bool, limit: TimeLimit
) -> SearchResult:
    """Search, unless the run has its plan already; an interrupted search is repeated from its evaluations."""
    found = load_search(run, problem.scorer.network.graph)
    if found is not None:
        return found
    with stored([problem.scorer], run.path(STORE), limit=limit) as store:
        found = find_plan(problem, budget, config, progress=progress, clock=store.clock)
    save_search(found, run)
    return found


def _network_to_inspect(config: InspectConfig) -> PrunableNetwork:
    """The network on its own kind of input, or on that of given data."""
    if not config.data:
        sizes = {key: getattr(config, key) for key in SIZES}
        return bare_network(config.network, config.weights, sizes, config.seed, config.keep)
    task = build_task(config)
    model = build_model(config.network, config.weights, task.data, config.seed)
    return build_prunable(model, task, name=config.network, keep=config.keep)
