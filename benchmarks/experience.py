"""Score plans of the training networks at many budgets: the experience that the pretrained policy learns from.

    python benchmarks/experience.py --data cifar10.npz cifar100.npz digits --out networks

Plans come from the three allocations that policies start from, from CMA-ES from the best of them, and at random. They
are kept, with their scores in the cheap form of the recovery, in the store of evaluations of each network's run folder;
`prunegym evaluations networks --csv experience.csv` exports them. A script that was stopped goes on where it was; one
that is run again with more networks or budgets adds to what is there. What a plan costs is in the seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import tyro
from tqdm import tqdm
from training_networks import Arguments as Networks
from training_networks import folder_of, networks

from prunegym.agents.configuration.options import DataOptions, ProblemOptions
from prunegym.agents.evaluations.store import STORE, read_evaluations, stored
from prunegym.agents.searching.searchers import SearchSettings, searcher_named
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.setup import build_problem, build_task
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import InfeasibleBudgetError
from prunegym.pruning.task import ClassificationTask

KINDS = ("macs", "macs", "params")
"""Two budgets of three are of MACs."""


@dataclass(frozen=True)
class Arguments(Networks):
    """What to score."""

    budgets: int = 10
    """Budgets of each network, drawn between 0.2 and 0.8 of its cost."""
    guided: int = 27
    """Evaluations of CMA-ES from the prior, the three allocations that it may start from among them."""
    random: int = 13
    """Evaluations of plans at random."""
    reward_examples: int = 1000
    """Images of a score."""


def main(arguments: Arguments) -> None:
    """Score what is not in the stores yet."""
    tasks: dict[str, ClassificationTask] = {}
    work = [(network, data) for network, data in networks(arguments) if finished(arguments, network, data)]
    with tqdm(work, unit="network") as bar:
        for network, data in bar:
            bar.set_postfix_str(f"{network} {Path(data).stem}")
            if data not in tasks:
                tasks[data] = build_task(DataOptions(data=data))
            gather(arguments, network, data, tasks[data])
    print(f"{sum(len(list(read_evaluations(folder_of(arguments, *one) / STORE))) for one in work)} evaluations")


def finished(arguments: Arguments, network: str, data: str) -> bool:
    """Whether a network has been trained."""
    return (folder_of(arguments, network, data) / "result.json").exists()


def drawn_budgets(network: str, count: int) -> list[Budget]:
    """Budgets of a network: the same each time, and the first of more are those of fewer."""
    draw = Random(network)
    return [Budget.parse(f"{draw.choice(KINDS)}:{draw.uniform(0.2, 0.8):.3f}") for _ in range(count)]


def gather(arguments: Arguments, network: str, data: str, task: ClassificationTask) -> None:
    """Search one network at its budgets, each search once."""
    folder = folder_of(arguments, network, data)
    work = [
        (budget, searcher, evaluations)
        for budget in drawn_budgets(network, arguments.budgets)
        for searcher, evaluations in (("cmaes_prior", arguments.guided), ("random", arguments.random))
    ]
    done = {row["search"] for row in read_evaluations(folder / STORE)} if (folder / STORE).exists() else set()
    last = latest(folder) if done else ""  # it may be unfinished: a search that is repeated reads what it had
    missing = [one for one in work if named(*one) not in done or named(*one) == last]
    if not missing:
        return
    options = ProblemOptions(data=data, reward_examples=arguments.reward_examples)
    file, weights = Path(__file__).parent / "families.py", str(folder / "model.safetensors")
    whole = build_problem(f"{file}:{network}", weights, options, [Budget.parse("macs:1")], task=task, label=network)
    for budget, searcher, evaluations in missing:
        try:
            problem = PruningProblem(whole.scorer, (budget,))
        except InfeasibleBudgetError:  # some networks are mostly what may not be pruned
            continue
        with stored([problem.scorer], folder / STORE, named(budget, searcher, evaluations)) as store:
            searcher_named(searcher)(problem, budget, SearchSettings(evaluations=evaluations, clock=store.clock))
        problem.scorer.forget()


def named(budget: Budget, searcher: str, evaluations: int) -> str:
    """What a search is called in the store."""
    return f"{budget} {searcher} {evaluations}"


def latest(folder: Path) -> str:
    """The search that wrote last."""
    return max(((row["evaluation"], row["search"]) for row in read_evaluations(folder / STORE)), default=(0, ""))[1]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
