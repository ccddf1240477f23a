"""What a search came to, in a folder: its plan, what it took and its trail."""

from __future__ import annotations

from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.search import SearchResult
from prunegym.agents.searching.trail import Improvement
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.plan import PruningPlan

PLAN = "plan.json"
SEARCH = "search.json"
"""What the search for the plan took; a folder that has it has the plan too."""


def save_search(result: SearchResult, run: RunFolder) -> None:
    """Keep the result of a search.

    Raises:
        PruningError: A file could not be written.
    """
    run.write_json(PLAN, result.plan.to_json())
    content = {
        "evaluations": result.evaluations,
        "seconds": result.seconds,
        "history": result.history,
        "improvements": [one.to_json() for one in result.improvements],
        "latency": result.latency,
    }
    run.write_json(SEARCH, content)  # last: it says that the search is finished


def load_search(run: RunFolder, graph: ChannelGraph) -> SearchResult | None:
    """The result of a search that was finished before; None if there is none.

    Args:
        run: The folder.
        graph: Of the network that the plan is for.

    Raises:
        PruningError: A file is damaged, or the plan is that of another network.
    """
    if not (run.path(PLAN).exists() and run.path(SEARCH).exists()):
        return None
    content, plan = run.read_json(SEARCH), PruningPlan.load(run.path(PLAN))
    plan.mask(graph)  # refuses the plan of another network
    return SearchResult(
        plan=plan,
        evaluations=content["evaluations"],
        seconds=content["seconds"],
        history=[(evaluations, score) for evaluations, score in content["history"]],
        improvements=[Improvement.from_json(one) for one in content["improvements"]],
        latency=content["latency"],
    )
