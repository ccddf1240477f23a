"""Does it work on my network? One row for each classification network of torchvision and a choice of timm's.

Random weights; constants among them (zero-initialised scales) are replaced by numbers, so that they hide no fault. Each
network is traced and checked, pruned to 50 % of its MACs with equal keep ratios (or as far as it goes), compared with
its masked twin, trained for one step, saved, and loaded into a newly built network. torch_pruning is asked for the same
in the same run. What fails is a row too, with its reason.

    python benchmarks/coverage.py                      # all; finished rows are skipped
    python benchmarks/coverage.py --only resnet18 --again
"""

from __future__ import annotations

import contextlib
import copy
import gc
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torchvision
import tyro
from rows import RESULTS, Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from prunegym.pruning.allocation import uniform
from prunegym.pruning.budget import Budget, apply_budget
from prunegym.pruning.deployment.saving import load_network, save_network
from prunegym.pruning.importance.criteria import Context, unit_scores
from prunegym.pruning.network import PrunableNetwork, without_constants
from prunegym.pruning.networks.zoo import build_network, input_shape_of
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.tracing.trace import trace
from prunegym.pruning.widths import WidthRules

TIMM_LIST = Path(__file__).parent / "coverage_timm.txt"
CLASSES = 10
LARGEST_INPUT = 256
SLOW_SECONDS = 1.0
SMALLER = (64, 96, 128, 192, 224, 256)
TORCH_PRUNING_SECONDS = 30


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    only: tuple[str, ...] = ()
    """Names of networks; all by default."""
    name: str = "coverage"
    """Name of the table in benchmarks/results."""
    torch_pruning: bool = True
    """Ask torch_pruning too."""
    summary: bool = False
    """Only print what the table says."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(RESULTS / f"{arguments.name}.csv", ("library", "network"))
    done = {(row["library"], row["network"]) for row in table.rows}
    wanted = [one for one in networks() if not arguments.only or one[1] in arguments.only]
    left = [] if arguments.summary else [one for one in wanted if one not in done]
    for library, name in tqdm(left, desc="networks", unit="network"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row = one_network(library, name, arguments)
        table.append(row)
        gc.collect()
    summarise(table)


def networks() -> list[tuple[str, str]]:
    """All networks, torchvision's first."""
    torchvision_names = torchvision.models.list_models(torchvision.models)
    timm_names = [line.split()[0] for line in TIMM_LIST.read_text().splitlines() if line and line[0] != "#"]
    return [("torchvision", name) for name in torchvision_names] + [("timm", name) for name in timm_names]


def build(library: str, name: str) -> tuple[nn.Module, int]:
    """A network with random weights, and the side of its default input."""
    torch.manual_seed(0)
    if library == "torchvision":
        return build_network(name, num_classes=CLASSES).eval(), input_shape_of(name)[-1]
    import timm

    model = timm.create_model(name, num_classes=CLASSES)
    return model.eval(), int(model.default_cfg["input_size"][-1])


def example(model: nn.Module, side: int) -> Tensor:
    """Two images of the default size, or of the smallest that the network takes if those are slow or very large."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 3, side, side, generator=generator)
    with torch.no_grad():
        if side <= LARGEST_INPUT and seconds(lambda: model(inputs)) < SLOW_SECONDS:
            return inputs
        for smaller in SMALLER:
            with contextlib.suppress(Exception):
                few = torch.randn(2, 3, smaller, smaller, generator=generator)
                model(few)
                return few
    return inputs


def one_network(library: str, name: str, arguments: Arguments) -> dict[str, Any]:
    """Everything about one network. A step that fails ends its row with the reason."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"library": library, "network": name}
    step = "build"
    try:
        model, side = build(library, name)
        inputs = example(model, side)
        row["input"] = inputs.shape[-1]
        work = Work(library, name, model, inputs)
        for name_of_step, run in STEPS:
            step = name_of_step
            row |= run(work)
    except Exception as fault:
        row["failed"] = step
        row["reason"] = f"{type(fault).__name__}: {fault}".replace("\n", " ")[:300]
    if arguments.torch_pruning and step != "build":
        row |= ask_torch_pruning(model, inputs)
    return row


@dataclass
class Work:
    """A network on its way; the second step traces it and makes the plan that the next ones carry out."""

    library: str
    name: str
    model: nn.Module
    inputs: Tensor
    network: PrunableNetwork | None = None
    plan: PruningPlan | None = None


COLUMNS = (
    *("library", "network", "input", "parameters", "macs", "forward_seconds", "trace_seconds", "passes"),
    *("check_seconds", "groups", "frozen", "reasons", "share", "least", "reached", "difference", "trained"),
    *("reloaded", "failed", "reason", "tp_seconds", "tp_reached", "tp_error"),
)


def step_trace(work: Work) -> dict[str, Any]:
    """Seconds of one forward pass and of the observed one."""
    with torch.no_grad():
        work.model(work.inputs)
        forward = min(seconds(lambda: work.model(work.inputs)) for _ in range(2))
    observed = seconds(lambda: trace(work.model, (work.inputs,)))
    parameters = sum(one.numel() for one in work.model.parameters())
    return {
        "parameters": parameters,
        "forward_seconds": round(forward, 4),
        "trace_seconds": round(observed, 4),
        "passes": round(observed / forward, 2),
    }


def step_prune(work: Work) -> dict[str, Any]:
    """Channel groups, and the plan with 50 % of the MACs or the least that can be reached."""
    started = time.perf_counter()
    network = PrunableNetwork(without_constants(work.model), work.inputs, name=work.name)
    graph, costs = network.graph, network.costs
    checked = time.perf_counter() - started
    widths = WidthRules().apply(graph)
    least = costs.macs(widths.smallest) / costs.full.macs
    limit = apply_budget(Budget("macs", max(0.5, min(1.0, least * 1.001))), costs, widths)
    counts = uniform(limit, widths)
    plan = PruningPlan.from_scores(graph, counts, unit_scores("l1", Context(network.model, graph)))
    work.network, work.plan = network, plan
    touched = np.array([touches(one) for one in graph.operations])
    macs = costs.operation_macs(graph.sizes)
    kinds = Counter(str(group.frozen).split(" in ")[0][:60] for group in graph.frozen)
    return {
        "macs": costs.full.macs,
        "check_seconds": round(checked, 3),
        "groups": len(graph.groups),
        "frozen": len(graph.frozen),
        "reasons": "; ".join(f"{count} {why}" for why, count in kinds.most_common()),
        "share": round(float(macs[touched].sum() / macs.sum()), 4),
        "least": round(least, 4),
        "reached": round(limit.fraction(counts), 4),
    }


def touches(operation: Any) -> bool:
    """Whether an operation gets cheaper when some prunable group loses channels."""
    return any((units >= 0).any() for units in (operation.inputs, operation.outputs, *operation.batch))


def step_agree(work: Work) -> dict[str, Any]:
    """The rebuilt network against its masked twin, and its parameters against those promised."""
    network, plan = work.network, work.plan
    difference = network.check(plan)
    if not difference < 1e-3:
        raise AssertionError(f"outputs differ from the masked twin's by {difference:.2g}")
    smaller = network.pruned(plan)
    found = sum(one.numel() for one in smaller.parameters())
    if found != network.cost(plan).parameters:
        raise AssertionError(f"{found} parameters where {network.cost(plan).parameters} were promised")
    return {"difference": difference}


def step_train(work: Work) -> dict[str, Any]:
    """One step of gradient descent on the smaller network."""
    model = work.network.pruned(work.plan).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)
    outputs = [leaf for leaf in tree_leaves(model(work.inputs)) if isinstance(leaf, Tensor)]
    loss = torch.stack([leaf.float().square().mean() for leaf in outputs]).sum()
    loss.backward()
    optimiser.step()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    if not gradients or not all(bool(torch.isfinite(one).all()) for one in gradients):
        raise AssertionError("gradients are missing or not finite")
    return {"trained": True}


def step_reload(work: Work) -> dict[str, Any]:
    """Save, load into a newly built network, compare outputs."""
    network, plan = work.network, work.plan
    model = network.pruned(plan).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_network(Path(folder), network, plan, model, source={"constructor": None}, metadata={}, check=False)
        restored = load_network(Path(folder), model=build(work.library, work.name)[0])
    with torch.no_grad():
        pairs = zip(tree_leaves(model(work.inputs)), tree_leaves(restored(work.inputs)), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            raise AssertionError("the loaded network gives other outputs")
    return {"reloaded": True}


STEPS: tuple[tuple[str, Callable[[Work], dict[str, Any]]], ...] = (
    ("trace", step_trace),
    ("prune", step_prune),
    ("agree", step_agree),
    ("train", step_train),
    ("reload", step_reload),
)


def ask_torch_pruning(model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    """Uniform magnitude pruning of every width to the square root of 50 %, as torch_pruning's examples do."""
    import torch_pruning

    twin = copy.deepcopy(model).eval()
    heads = [one for one in twin.modules() if isinstance(one, nn.Linear) and one.out_features == CLASSES]
    try:
        with time_limit(TORCH_PRUNING_SECONDS):
            started = time.perf_counter()
            before, _ = torch_pruning.utils.count_ops_and_params(twin, inputs)
            pruner = torch_pruning.pruner.MetaPruner(
                twin,
                inputs,
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=1 - 0.5**0.5,
                ignored_layers=heads,
            )
            pruner.step()
            with torch.no_grad():
                twin(inputs)
            after, _ = torch_pruning.utils.count_ops_and_params(twin, inputs)
        return {"tp_seconds": round(time.perf_counter() - started, 3), "tp_reached": round(after / before, 4)}
    except Exception as fault:
        return {"tp_error": f"{type(fault).__name__}: {fault}".replace("\n", " ")[:160]}


@contextlib.contextmanager
def time_limit(limit: int) -> Iterator[None]:
    """Raise TimeoutError in this thread after so many seconds."""

    def ring(*_: object) -> None:
        raise TimeoutError(f"took more than {limit} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def summarise(table: Table) -> None:
    """Print what README.md and docs/results.md say."""
    for library in ("torchvision", "timm"):
        rows = [row for row in table.rows if row["library"] == library]
        if not rows:
            continue
        whole = [row for row in rows if not row["failed"]]
        half = [row for row in whole if float(row["reached"]) <= 0.5]
        passes = [float(row["passes"]) for row in rows if row["passes"]]
        slowest = max(float(row["trace_seconds"]) for row in rows if row["trace_seconds"])
        others = [row for row in rows if row["tp_reached"] and float(row["tp_reached"]) < 0.95]
        print(f"{library}: {len(whole)} of {len(rows)} do everything, {len(half)} reach 50 % of their MACs")
        print(f"  trace: median {median(passes):.2f} forward passes, slowest {slowest:.2f} s")
        print(f"  torch_pruning prunes {len(others)} of {len(rows)}")
        for row in rows:
            if row["failed"]:
                print(f"  {row['network']}: {row['failed']}: {row['reason']}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
