"""The command ``prunegym compare``. It returns its result and prints nothing."""

from __future__ import annotations

from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.records import save_networks
from prunegym.agents.run_folders.running import RESULT, Launch, Reporter, Result, joined, save_splits
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.envs.rewards import PROFILES
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.conditions import check_folder, identity
from prunegym.experiments.comparison.config import EXTENDABLE, CompareConfig
from prunegym.experiments.comparison.grid import compare, finished, unfinished
from prunegym.experiments.comparison.report import report, terminal_text
from prunegym.experiments.prune import check_fine_tuning
from prunegym.experiments.setup import build_problem, build_task, check_patterns_match, seed_everything
from prunegym.pruning.training import check_devices


def run_compare(config: CompareConfig, reporter: Reporter) -> Result:
    """Compare searchers; rows that the folder holds are not computed again, the report is."""
    seed_everything(config.seed)
    launch = Launch(config, reporter, config.network, "compare", joined(config.budgets), EXTENDABLE)
    if config.policy is not None:
        load_policy(config.policy)  # refused before anything is computed
    check_devices(config.torch_device, config.devices)
    problems = _problems(config, reporter)
    for problem in problems:
        check_fine_tuning(problem, config.finetuning(problem.scorer.network.name, config.seed))
    if config.out is not None:
        # before config.json is written anew
        check_folder(RunFolder(config.out.expanduser()), [identity(problem, config) for problem in problems])
    run = launch.open()
    if problems:
        run.path(RESULT).unlink(missing_ok=True)  # of fewer rows: the folder is not finished until all are there
        save_splits(problems, run)
        save_networks(problems, run, ("selection", "test") if config.test else ("selection",))
        rows = compare(problems, config, run, progress=reporter.progress, limit=reporter.limit)
    else:
        reporter.say("all rows are there: nothing is computed again")
        rows = finished(config, run)
    content = report(rows, config, run)
    run.write_json(RESULT, content)
    return Result(content, terminal_text(content))


def _problems(config: CompareConfig, reporter: Reporter) -> list[PruningProblem]:
    """The networks that rows are missing of, on the same data."""
    # without --out there is no folder yet, and every row is missing
    missing = set(config.labels)
    if config.out is not None:
        missing = {network for network, *_ in unfinished(config, RunFolder(config.out.expanduser()))}
    if not missing:
        return []
    task = build_task(config)
    rewarded = PROFILES[config.reward_profile].latency != 0
    problems = [
        build_problem(
            name,
            weights,
            config,
            config.budgets,
            keep=config.keep,
            task=task,
            label=label,
            latency=rewarded,
            progress=reporter.progress,
            strict=len(config.labels) == 1,
        )
        for label, (name, weights) in zip(config.labels, config.pairs, strict=True)
        if label in missing
    ]
    if len(problems) == len(config.labels):  # else a pattern may be about a network that is finished
        check_patterns_match(config.keep, config.width_rules, problems)
    return problems
