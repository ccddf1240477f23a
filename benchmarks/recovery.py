"""What each recovery gives: test accuracy, seconds and memory of every network, budget, allocation and recovery.

    python benchmarks/recovery.py --data cifar10.npz --resnet20 cifar10_resnet20.th --resnet56 cifar10_resnet56.th \
        --vgg16-half vgg/model.safetensors --mobilenet-v2 mobilenet/model.safetensors --hybrid hybrid/model.safetensors

Three kinds of rows: the ladder of recoveries, ablations of reconstruction and distillation, and what torch_pruning
leaves with its own ratios and recalibrated normalisation, where it can prune the network. Each finished piece is a row
of results/recovery.csv; a script that was stopped goes on where it was. No labels are used by any recovery. Settings
are chosen by `selection_score`; `test_score` is what is told.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from base_networks import BaseNetworks
from rows import RESULTS, Table
from torch import nn
from tqdm import tqdm

from prunegym.agents.configuration.options import DataOptions
from prunegym.envs.prior import KNAPSACK, NAMES, UNIFORM, choose_prior
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.setup import assemble_problem, build_model, build_prunable, build_task
from prunegym.pruning.budget import Budget
from prunegym.pruning.cost import CostModel
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import Fitting, Teacher, observe_targets, recalibrate, reconstruct, train_steps
from prunegym.pruning.scoring import Scorer
from prunegym.pruning.training import evaluate_network

KEYS = ("network", "budget", "allocation", "recovery")
BUDGETS = ("macs:0.5", "macs:0.35", "macs:0.2")
ABLATED = ("cifar_resnet20", "cifar_resnet56")
TUNED = ("cifar_resnet20", "cifar_vgg16_half", "cifar_hybrid")
"""Networks on which the weight of the features and the ridge are compared."""
MEASURED = ("selection_score", "test_score", "seconds", "processor_seconds", "peak_mib", "macs")
EXAMPLES = 512
RIDGES = (1e-2, 5e-2, 0.1, 0.2, 0.5)
WEIGHTS = (1, 3, 10, 30)


@dataclass(frozen=True)
class Arguments(BaseNetworks):
    """What to run: the networks whose weights are given."""

    budgets: tuple[str, ...] = BUDGETS
    only: tuple[str, ...] = ()
    """Recoveries to run, by the names that rows have; by default all."""
    steps: int = 390
    """Steps of distillation on training images: one pass over 50,000."""
    few_steps: int = 200
    """Steps of distillation on the calibration images."""
    results: Path = RESULTS


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(arguments.results / "recovery.csv", KEYS)
    for name, file in arguments.weights.items():
        if file is not None:
            Recoveries(arguments, table, name, file).run()
    for row in table.rows:
        print(*(row[key] for key in KEYS), f"{float(row['test_score']):.2%}", f"{row['seconds']} s")


class Recoveries:
    """The measurements of one network.

    Args:
        arguments: what to run.
        table: takes a row per finished piece.
        name: of the network.
        weights: its file.
    """

    def __init__(self, arguments: Arguments, table: Table, name: str, weights: str) -> None:
        self.arguments, self.table, self.name = arguments, table, name
        task = build_task(DataOptions(data=arguments.data))
        network = build_prunable(build_model(name, weights, task.data, 0), task, name=name)
        budgets = [Budget.parse(text) for text in arguments.budgets]
        self.problem: PruningProblem = assemble_problem(network, task, budgets)
        self.scorer: Scorer = self.problem.scorer

    def run(self) -> None:
        """Every piece that is missing."""
        work = list(self._pieces())
        for budget, allocation, recovery, make in tqdm(work, desc=self.name, unit="piece"):
            key = {"network": self.name, "budget": budget, "allocation": allocation, "recovery": recovery}
            wanted = not self.arguments.only or recovery in self.arguments.only
            if wanted and not self.table.has(**key):
                prior = NAMES[self.problem.priors[Budget.parse(budget)]] if allocation == "prior" else ""
                self.table.append({**key, "prior": prior, **self._measured(make)})

    def _pieces(self) -> Iterator[tuple[str, str, str, Callable[[], nn.Module | None]]]:
        yield "none", "unpruned", "unpruned", lambda: self.scorer.network.model
        for budget in self.problem.budgets:
            plans = self._plans(budget)
            for allocation, plan in plans.items():
                for recovery, settings in self._ladder().items():
                    scorer = self._scorer(settings)
                    yield str(budget), allocation, recovery, lambda s=scorer, p=plan: s.recovered(p)  # type: ignore[misc]
            if self.name in ABLATED and str(budget) == "macs:0.35":
                for label, make in self._ablations(plans["prior"]).items():
                    yield str(budget), "prior", label, make
            if self.name in TUNED and str(budget) == "macs:0.35":
                for label, make in self._tuned(plans["prior"]).items():
                    yield str(budget), "prior", label, make
            if self.name not in ABLATED:  # it refuses parameter-free shortcuts
                for importance in ("magnitude", "taylor"):
                    yield (
                        str(budget),
                        f"torch_pruning {importance}",
                        "bn",
                        lambda b=budget, i=importance: self._torch_pruning(b, i),  # type: ignore[misc]
                    )

    def _plans(self, budget: Budget) -> dict[str, PruningPlan]:
        limit = self.problem.limits[budget]
        if budget not in self.problem.priors:
            choose_prior(self.problem, budget)
        shares = {"uniform": UNIFORM, "prior": self.problem.priors[budget]}
        if shares["prior"] != KNAPSACK and self.name in ABLATED:
            shares["knapsack"] = KNAPSACK
        return {name: self.problem.plan(self.problem.prior_counts(limit, share)) for name, share in shares.items()}

    def _ladder(self) -> dict[str, dict[str, Any]]:
        calibration = {"recovery_split": "calibration", "recovery_steps": self.arguments.few_steps}
        return {
            "none": {"recovery": "none"},
            "bn": {"recovery": "bn"},
            "compensate": {"recovery": "compensate"},
            "reconstruct": {"recovery": "reconstruct"},
            "distill, calibration images": {"recovery": "distill", **calibration},
            "distill, training images": {"recovery": "distill", "recovery_steps": self.arguments.steps},
        }

    def _scorer(self, settings: dict[str, Any]) -> Scorer:
        first = self.scorer
        changed = replace(first.settings, **settings)
        return Scorer(first.network, first.task, changed, statistics=first.statistics, device=first.device)

    def _fitted(
        self,
        plan: PruningPlan,
        fitting: Fitting | None = None,
        *,
        model: nn.Module | None = None,
        sweeps: int = 1,
        examples: int = EXAMPLES,
        batches: int = 1,
        **observed: Any,
    ) -> nn.Module:
        """Reconstruction by hand, in float32."""
        network, mask = self.scorer.network, plan.mask(self.scorer.network.graph)
        fitting = fitting or Fitting()
        inputs = next(iter(self.scorer.task.batches("calibration", batch_size=examples, limit=examples)))[0]
        targets = [observe_targets(network.model, part, fitting, **observed) for part in inputs.chunk(batches)]
        model = self.scorer.pruned(plan) if model is None else model
        for _ in range(sweeps):
            reconstruct(model, network.graph, mask, targets, fitting)
        return model

    def _tuned(self, plan: PruningPlan) -> dict[str, Callable[[], nn.Module]]:
        """What the two settings that were chosen are worth elsewhere."""
        network, mask = self.scorer.network, plan.mask(self.scorer.network.graph)

        def distilled(weight: float, split: str) -> nn.Module:
            model = self.scorer.pruned(plan)
            few = split == "calibration"
            train_steps(
                model,
                self.scorer.task,
                steps=self.arguments.few_steps if few else self.arguments.steps,
                learning_rate=self.scorer.settings.recovery_rate,
                seed=self.scorer.settings.seed,
                form=self.scorer.form,
                teacher=Teacher(network.model, network.graph, mask, features=weight),
                split=split,
                limit=EXAMPLES if few else None,
            )
            return model

        ridges = {f"ridge {ridge}": _late(self._fitted, plan, Fitting(ridge=ridge)) for ridge in RIDGES}
        weights = {
            f"distill, {split} images, features {weight}": _late(distilled, weight, split)
            for split in ("calibration", "train")
            for weight in WEIGHTS
        }
        return {**ridges, **weights}

    def _ablations(self, plan: PruningPlan) -> dict[str, Callable[[], nn.Module]]:
        """Reconstruction with one thing changed."""
        network, mask = self.scorer.network, plan.mask(self.scorer.network.graph)

        def fitted(fitting: Fitting | None = None, **changed: Any) -> nn.Module:
            return self._fitted(plan, fitting, **changed)

        def recalibrated(model: nn.Module) -> nn.Module:
            recalibrate(model, [next(iter(self.scorer.task.batches("calibration", batch_size=EXAMPLES)))[0]])
            return model

        def one_by_one() -> nn.Module:
            """Only the affine parameters of normalisation are fitted after the layers."""
            return _affine_fitted(fitted(), network.model, mask, self.scorer, EXAMPLES)

        def head_as_compensated() -> nn.Module:
            """What it is worth to fit the head against the logits."""
            model = fitted()
            name, head = [one for one in model.named_modules() if isinstance(one[1], nn.Linear)][-1]
            head.load_state_dict(self.scorer.pruned(plan).get_submodule(name).state_dict())
            return model

        return {
            "reconstruct, float32": fitted,
            "head as compensated": head_as_compensated,
            "not following": lambda: fitted(Fitting(follow=False), sums=False),
            "without sums": lambda: fitted(sums=False),
            "then bn": lambda: recalibrated(fitted()),
            "from recalibrated": lambda: fitted(model=recalibrated(self.scorer.pruned(plan))),
            "from pruned, not compensated": lambda: fitted(model=network.pruned(plan)),
            "then affine": one_by_one,
            "two sweeps": lambda: fitted(sweeps=2),
            "2048 images": lambda: fitted(examples=2048),
            "128 images, 8 positions": lambda: fitted(Fitting(per_unknown=8), examples=128),
            **{f"{count} positions": _late(fitted, Fitting(per_unknown=count)) for count in (8, 40, 80)},
            **{f"seed {seed}": (lambda s=seed: fitted(seed=s)) for seed in (1, 2)},  # type: ignore[misc]
            "4 batches, 20 positions of each": lambda: fitted(batches=4),
            "4 batches, 5 positions of each": lambda: fitted(Fitting(per_unknown=5), batches=4),
        }

    def _torch_pruning(self, budget: Budget, importance: str) -> nn.Module | None:
        """Global ranking under its own importance, by bisection of the ratio to the budget; None where it fails."""
        import torch_pruning

        model, example = self.scorer.network.model, self.scorer.network.example_inputs[0]
        inputs, targets = next(iter(self.scorer.task.batches("calibration", batch_size=EXAMPLES, limit=EXAMPLES)))
        full = CostModel(self.scorer.network.graph, model).full.macs

        def pruned(ratio: float) -> nn.Module:
            smaller = copy.deepcopy(model).eval()
            outputs = [one for one in smaller.modules() if isinstance(one, nn.Linear) and one.out_features == 10]
            score = (
                torch_pruning.importance.GroupMagnitudeImportance(p=2)
                if importance == "magnitude"
                else torch_pruning.importance.GroupTaylorImportance()
            )
            heads = {one: one.num_heads for one in smaller.modules() if isinstance(one, nn.MultiheadAttention)}
            pruner = torch_pruning.pruner.BasePruner(
                smaller,
                example,
                importance=score,
                global_pruning=True,
                pruning_ratio=ratio,
                max_pruning_ratio=0.95,
                ignored_layers=[*outputs, *heads],
            )
            if importance == "taylor":
                F.cross_entropy(smaller(inputs), targets).backward()
            pruner.step()
            return smaller

        try:
            low, high = 0.0, 0.95
            for _ in range(7):
                middle = (low + high) / 2
                fits = _macs(pruned(middle), example) <= float(budget.value) * full
                low, high = (low, middle) if fits else (middle, high)
            smaller = pruned(high)
            if _macs(smaller, example) > float(budget.value) * full:
                return None
        except Exception as fault:  # whatever it raises on a network that it cannot prune
            print(f"torch_pruning, {self.name}: {type(fault).__name__}: {fault}")
            return None
        recalibrate(smaller, [inputs])
        return smaller

    def _measured(self, make: Callable[[], nn.Module | None]) -> dict[str, Any]:
        started = time.perf_counter(), time.process_time()
        with peak_memory() as peak:
            model = make()
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        if model is None:
            return {**dict.fromkeys(MEASURED, ""), "test_score": float("nan")}
        task = self.scorer.task
        return {
            "selection_score": evaluate_network(model, task, "selection").score,
            "test_score": evaluate_network(model, task, "test").score,
            "seconds": round(seconds[0], 2),
            "processor_seconds": round(seconds[1], 2),
            "peak_mib": round(peak[0]),
            "macs": _macs(model, self.scorer.network.example_inputs[0]),
        }


def _late(function: Callable[..., nn.Module], *arguments: Any) -> Callable[[], nn.Module]:
    return lambda: function(*arguments)


def _affine_fitted(model: nn.Module, unpruned: nn.Module, mask: Any, scorer: Scorer, examples: int) -> nn.Module:
    """Refit scale and shift of each batch normalisation to what the unpruned network has after it, in order."""
    inputs = next(iter(scorer.task.batches("calibration", batch_size=examples, limit=examples)))[0]
    kept = {name: scorer.network.graph.axes.get((f"{name}.weight", 0)) for name, _ in unpruned.named_modules()}
    layers = dict(model.named_modules())
    wanted: dict[str, torch.Tensor] = {}
    hooks = []
    for name, module in unpruned.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            keep = torch.ones(module.num_features, dtype=torch.bool)
            if kept[name] is not None:
                keep = torch.from_numpy((kept[name] < 0) | mask[kept[name]])
            hooks.append(
                module.register_forward_hook(lambda _m, _i, out, n=name, k=keep: wanted.update({n: out[:, k]}))
            )
    with torch.no_grad():
        unpruned.eval()(inputs)
        for hook in hooks:
            hook.remove()

        def fit(module: nn.Module, _args: Any, out: torch.Tensor, name: str = "") -> torch.Tensor:
            target = wanted.pop(name)
            dims = (0, 2, 3)
            mean, other = out.mean(dims, keepdim=True), target.mean(dims, keepdim=True)
            variance = (out - mean).square().mean(dims, keepdim=True)
            slope = ((out - mean) * (target - other)).mean(dims, keepdim=True) / variance.clamp(min=1e-6)
            module.weight.mul_(slope.flatten())  # type: ignore[operator]
            module.bias.sub_(mean.flatten()).mul_(slope.flatten()).add_(other.flatten())  # type: ignore[operator]
            return (out - mean) * slope + other

        hooks = [layers[name].register_forward_hook(lambda m, a, o, n=name: fit(m, a, o, n)) for name in list(wanted)]
        model.eval()(inputs)
        for hook in hooks:
            hook.remove()
    return model


def _macs(model: nn.Module, example: torch.Tensor) -> int:
    """Multiply-accumulates for one example, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(example)
    return int(counter.get_total_flops() // 2 // len(example))


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Most memory that the process holds inside, beyond what it held before, MiB: looked at every 5 ms."""
    page, peak, done = 4096, [0.0], threading.Event()

    def held() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page / 2**20

    start = held()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], held() - start)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    main(tyro.cli(Arguments))
