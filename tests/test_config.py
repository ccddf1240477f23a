import ast
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from prunegym.agents import config as configs
from prunegym.agents.config import (
    DemoConfig,
    EvaluateConfig,
    InspectConfig,
    PretrainConfig,
    PruneConfig,
    TrainConfig,
    TransferConfig,
)
from prunegym.agents.options import DataOptions, ProblemOptions
from prunegym.agents.searchers import SEARCHERS, WITHOUT_EVALUATIONS
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError

ROOT = Path(__file__).resolve().parent.parent
ALL = [getattr(configs, name) for name in configs.__all__]
#: The least that each command must be told.
NEEDED: dict[type, dict[str, Any]] = {
    InspectConfig: {"network": "digits_vgg"},
    PretrainConfig: {"network": "digits_vgg"},
    TrainConfig: {"network": ("digits_vgg",)},
    EvaluateConfig: {"network": ("digits_vgg",)},
    TransferConfig: {"network": ("digits_vgg",), "policy": Path("policy.safetensors")},
    PruneConfig: {"network": "digits_vgg"},
    DemoConfig: {},
}


def made(kind: type, **changes: Any) -> Any:
    """A configuration with the least that it needs, and what a test changes."""
    return kind(**{**NEEDED[kind], **changes})


@pytest.mark.parametrize("kind", ALL)
def test_defaults_keep_their_own_rules(kind: type) -> None:
    """A command with nothing but what it needs is in order."""
    assert made(kind)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (TrainConfig, {"network": ()}, "`--network` should be given at least once. Received none. Name"),
        (TrainConfig, {"weights": ("a", "b")}, r"`--weights` should be given once for each of the 1 networks"),
        (TrainConfig, {"budget": ("mac:0.5",)}, "`budget` should be one of .*Did you mean 'macs'"),
        (TrainConfig, {"budget": ("macs:1.5",)}, r"`budget` should be a fraction in \(0, 1\]"),
        (TrainConfig, {"evaluations": 0}, "`--evaluations` should be at least 1. Received 0"),
        (TrainConfig, {"rounds": 0}, "`--rounds` should be at least 1"),
        (TrainConfig, {"workers": 0}, "`--workers` should be at least 1"),
        (TrainConfig, {"reward": "improvment"}, "Did you mean 'improvement'"),
        (TrainConfig, {"update_evaluations": 0}, "`--update-evaluations` should be at least 1"),
        (TrainConfig, {"ppo_epochs": 0}, "`--ppo-epochs` should be at least 1"),
        (TrainConfig, {"elites": 0}, "`--elites` should be at least 1"),
        (TrainConfig, {"imitation_steps": -1}, "`--imitation-steps` should be at least 0"),
        (TrainConfig, {"imitation_rate": 0.0}, "`--imitation-rate` should be above 0"),
        (TrainConfig, {"learning_rate": float("nan")}, "`--learning-rate` should be above 0 and finite"),
        (TrainConfig, {"std": float("inf")}, "`--std` should be above 0 and finite"),
        (TrainConfig, {"std": 0.1, "min_std": 0.2}, "`--min-std` should be at most --std, 0.1"),
        (TrainConfig, {"criterion": "taylor_sqared"}, "Did you mean 'taylor_squared'"),
        (TrainConfig, {"statistics_examples": 1}, "`--statistics-examples` should be at least 2"),
        (TrainConfig, {"recalibration_examples": -1}, "`--recalibration-examples` should be at least 0"),
        (TrainConfig, {"reward_examples": 0}, "`--reward-examples` should be at least 1"),
        (TrainConfig, {"recovery_steps": -1}, "`--recovery-steps` should be at least 0"),
        (
            TrainConfig,
            {"regime": "finetuned", "recovery_steps": 0},
            "`--recovery-steps` should be at least 1 in the finetuned regime",
        ),
        (TrainConfig, {"recovery_rate": -1.0}, "`--recovery-rate` should be above 0"),
        (TrainConfig, {"latency_batch": 0}, "`--latency-batch` should be at least 1"),
        (TrainConfig, {"latency_threads": 0}, "`--latency-threads` should be at least 1"),
        (TrainConfig, {"seed": -1}, "`--seed` should be at least 0"),
        (TrainConfig, {"split_seed": -1}, "`--split-seed` should be at least 0"),
        (TrainConfig, {"data_workers": -1}, "`--data-workers` should be at least 0"),
        (TrainConfig, {"image_size": 0}, "`--image-size` should be at least 1"),
        (TrainConfig, {"keep": ("layer[",)}, r"`--keep` should be a regular expression. Received 'layer\['"),
        (EvaluateConfig, {"searcher": ("knapsac",)}, "Did you mean 'knapsack'"),
        (EvaluateConfig, {"searcher": ("policy",)}, "`--policy` should name a policy file .*Train one"),
        (
            EvaluateConfig,
            {"searcher": ("random",), "evaluations": 0},
            "`--evaluations` should be at least 1 with searcher random",
        ),
        (PruneConfig, {"searcher": "netadapt", "evaluations": 0}, "at least 1 with searcher netadapt"),
        (EvaluateConfig, {"evaluations": -1}, "`--evaluations` should be at least 0"),
        (TransferConfig, {"evaluations": -1}, "`--evaluations` should be at least 0"),
        (PretrainConfig, {"epochs": 0}, "`--epochs` should be at least 1"),
        (PretrainConfig, {"batch_size": 0}, "`--batch-size` should be at least 1"),
        (PretrainConfig, {"weight_decay": -0.1}, "`--weight-decay` should be at least 0"),
        (PretrainConfig, {"label_smoothing": 1.0}, r"`--label-smoothing` should be in \[0, 1\)"),
        (PruneConfig, {"epochs": -1}, "`--epochs` should be at least 0"),
        (PruneConfig, {"budget": "latency:fast"}, "`budget` should be KIND:NUMBER"),
        (PruneConfig, {"searcher": "policy"}, "`--policy` should name a policy file"),
        (
            PruneConfig,
            {"searcher": "uniform", "policy": Path("p")},
            "`--policy` should be left out with --searcher uniform",
        ),
        (
            PruneConfig,
            {"plan": Path("plan.json"), "searcher": "uniform"},
            "`--plan` should be given without --policy and --searcher",
        ),
        (PruneConfig, {"rounds": 0}, "`--rounds` should be at least 1"),
        (PruneConfig, {"distillation_weight": 1.5}, r"`--distillation-weight` should be in \[0, 1\]"),
        (PruneConfig, {"temperature": 0.0}, "`--temperature` should be above 0"),
        (DemoConfig, {"seed": -1}, "`--seed` should be at least 0"),
    ],
)
def test_value_against_its_rule_is_refused(kind: type, changes: dict[str, Any], message: str) -> None:
    """The message names the flag, the rule and the value, before anything is computed."""
    with pytest.raises(PruningError, match=message):
        made(kind, **changes)


def test_unknown_device_is_refused() -> None:
    """Asked for when it is needed: the configuration itself does not load PyTorch."""
    with pytest.raises(PruningError, match="`--device` should be a device that torch can use here"):
        _ = ProblemOptions(device="gpu").torch_device


def test_budget_is_half_the_macs_by_default_and_counted_once() -> None:
    """Repeating the flag adds to nothing but itself."""
    assert made(TrainConfig).budgets == (Budget("macs", 0.5),)
    assert made(TrainConfig, budget=("macs:0.3", "macs:0.30")).budgets == (Budget("macs", 0.3),)


def test_networks_are_paired_with_their_weights() -> None:
    """In the order of the command line; no weights at all is fine."""
    assert made(TrainConfig, network=("a", "b"), weights=("x", "y")).pairs == (("a", "x"), ("b", "y"))
    assert made(TrainConfig, network=("a", "b")).pairs == (("a", None), ("b", None))


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 0),
        ({"regime": "finetuned"}, 50),
        ({"regime": "finetuned", "recovery_steps": 7}, 7),
        ({"recovery_steps": 3}, 3),
    ],
)
def test_recovery_steps_follow_the_regime(changes: dict[str, Any], steps: int) -> None:
    """Two regimes, each with its own reward; the number can be chosen."""
    assert made(TrainConfig, **changes).steps == steps


def test_reward_follows_the_mode() -> None:
    """Without projection, costs must count in the reward."""
    assert made(TrainConfig).reward_profile == "improvement"
    assert made(TrainConfig, mode="free").reward_profile == "tradeoff"
    assert made(TrainConfig, mode="free", reward="latency").reward_profile == "latency"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "knapsack"),
        ({"policy": Path("p")}, "policy"),
        ({"searcher": "uniform"}, "uniform"),
        ({"plan": Path("plan.json")}, "plan"),
    ],
)
def test_prune_lets_the_policy_plan_if_there_is_one(changes: dict[str, Any], expected: str) -> None:
    """What is given decides who plans."""
    assert made(PruneConfig, **changes).searcher_name == expected


def test_evaluate_without_policy_searcher_and_budget_measures_the_unpruned_network() -> None:
    """Any of the three asks for plans."""
    assert made(EvaluateConfig).measures_unpruned
    for changes in ({"policy": Path("p")}, {"budget": ("macs:0.5",)}, {"searcher": ("uniform",)}):
        assert not made(EvaluateConfig, **changes).measures_unpruned


def test_evaluate_puts_the_policy_beside_uniform_and_knapsack() -> None:
    """The baselines are there unless others are named."""
    policy = Path("p")

    assert made(EvaluateConfig, policy=policy).searchers == ("uniform", "knapsack", "policy")
    assert made(EvaluateConfig, policy=policy, searcher=("random",)).searchers == ("random", "policy")


@pytest.mark.parametrize("module", ["options", "config"])
def test_every_field_has_its_help(module: str) -> None:
    """The text under a field is what `--help` shows; no flag goes without."""
    tree = ast.parse((ROOT / "agents" / f"{module}.py").read_text(encoding="utf-8"))
    for node in (one for one in ast.walk(tree) if isinstance(one, ast.ClassDef)):
        for one, after in zip(node.body, [*node.body[1:], None], strict=True):
            is_field = isinstance(one, ast.AnnAssign)
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)

            assert not is_field or told, f"{node.name}, line {one.lineno}"


@pytest.mark.parametrize("kind", ["EvaluateConfig", "SearchOptions"])
def test_help_of_the_searcher_flag_lists_every_searcher(kind: str) -> None:
    """Each by its name, among those that need evaluations or those that do not, and no other."""
    tree = ast.parse((ROOT / "agents" / "config.py").read_text(encoding="utf-8"))
    node = next(one for one in ast.walk(tree) if isinstance(one, ast.ClassDef) and one.name == kind)
    fields_ = [getattr(getattr(one, "target", None), "id", None) for one in node.body]
    text = ast.literal_eval(node.body[fields_.index("searcher") + 1].value)
    without, needing = re.search(r"Without evaluations: ([\w,\s]+)\. With: ([\w,\s]+)\.", text).groups()
    listed = {*re.findall(r"\w+", without)}, {*re.findall(r"\w+", needing)}

    assert listed[0] | {"policy"} == WITHOUT_EVALUATIONS
    assert listed[1] == set(SEARCHERS) - WITHOUT_EVALUATIONS


@pytest.mark.parametrize(
    ("flag", "commands"),
    [
        ("network", [kind for kind in ALL if kind is not DemoConfig]),
        ("data", [kind for kind in ALL if kind is not DemoConfig]),
        ("budget", [TrainConfig, EvaluateConfig, TransferConfig, PruneConfig]),
        ("policy", [TrainConfig, EvaluateConfig, TransferConfig, PruneConfig]),
        ("searcher", [EvaluateConfig, PruneConfig]),
        ("criterion", [TrainConfig, EvaluateConfig, TransferConfig, PruneConfig]),
        ("evaluations", [TrainConfig, EvaluateConfig, TransferConfig, PruneConfig]),
        ("epochs", [PretrainConfig, PruneConfig]),
        ("workers", [TrainConfig, TransferConfig]),
        ("seed", ALL),
        ("out", ALL),
        ("json", ALL),
    ],
)
def test_shared_flag_is_on_every_command_it_makes_sense_for(flag: str, commands: list[type]) -> None:
    """One flag, one meaning, and found where one looks for it."""
    having = [kind for kind in ALL if flag in {one.name for one in fields(kind)}]

    assert set(having) == set(commands)


@pytest.mark.parametrize("flag", [one.name for one in fields(DataOptions)])
def test_data_flags_have_one_default(flag: str) -> None:
    """Except that `inspect` reads no data unless told to."""
    default: Callable[[type], Any] = lambda kind: getattr(made(kind), flag)  # noqa: E731
    kinds = [kind for kind in ALL if hasattr(made(kind), flag) and (kind, flag) != (InspectConfig, "data")]

    assert len({default(kind) for kind in kinds}) == 1
