import ast
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from prunegym.agents.configuration import config as configs
from prunegym.agents.configuration.config import (
    DemoConfig,
    EvaluateConfig,
    InspectConfig,
    PretrainConfig,
    PruneConfig,
    TrainConfig,
    TransferConfig,
)
from prunegym.agents.configuration.options import DataOptions, ProblemOptions
from prunegym.agents.searching.searchers import SEARCHERS, WITHOUT_EVALUATIONS
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.deployment.config import ExportConfig, FinetuneConfig
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.importance.criteria import CRITERIA

ROOT = Path(__file__).resolve().parents[2]
ALL = [*(getattr(configs, name) for name in configs.__all__), CompareConfig, FinetuneConfig, ExportConfig]
#: Commands that prune, or tell what pruning can do.
WIDE = [InspectConfig, TrainConfig, EvaluateConfig, CompareConfig, TransferConfig, PruneConfig]
#: Commands that train networks.
FITTED = [PretrainConfig, CompareConfig, PruneConfig, FinetuneConfig]
#: The least that each command must be told.
NEEDED: dict[type, dict[str, Any]] = {
    InspectConfig: {"network": "digits_vgg"},
    PretrainConfig: {"network": "digits_vgg"},
    TrainConfig: {"network": ("digits_vgg",)},
    EvaluateConfig: {"network": ("digits_vgg",)},
    TransferConfig: {"network": ("digits_vgg",), "policy": Path("policy.safetensors")},
    CompareConfig: {"network": ("digits_vgg",)},
    PruneConfig: {"network": "digits_vgg"},
    FinetuneConfig: {"network": "digits_vgg"},
    ExportConfig: {"network": "digits_vgg"},
    DemoConfig: {},
}


def made(kind: type, **changes: Any) -> Any:
    """A configuration with the least that it needs, and what a test changes."""
    return kind(**{**NEEDED[kind], **changes})


@pytest.mark.parametrize(("options", "rounds"), [({}, 1), ({"budget": ("macs:0.2",)}, 1), ({"rounds": 2}, 2)])
def test_an_episode_is_one_round_where_no_other_number_is_asked_for(options: dict[str, Any], rounds: int) -> None:
    """Whatever the budgets."""
    assert TrainConfig(network=("digits_vgg",), **options).episode_rounds == rounds


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
        (TrainConfig, {"criterion": "encoder_attention"}, "`--policy` should be a policy file with --criterion"),
        (TrainConfig, {"statistics_examples": 1}, "`--statistics-examples` should be at least 2"),
        (TrainConfig, {"recovery_examples": 0}, "`--recovery-examples` should be at least 1. Received 0"),
        (TrainConfig, {"reward_examples": 0}, "`--reward-examples` should be at least 1"),
        (TrainConfig, {"recovery_steps": -1}, "`--recovery-steps` should be at least 1"),
        (
            TrainConfig,
            {"recovery": "distill", "recovery_steps": 0},
            "`--recovery-steps` should be at least 1. Received 0",
        ),
        (TrainConfig, {"recovery_rate": -1.0}, "`--recovery-rate` should be above 0"),
        (TrainConfig, {"latency_batch": 0}, "`--latency-batch` should be at least 1"),
        (TrainConfig, {"latency_threads": 0}, "`--latency-threads` should be at least 1"),
        (TrainConfig, {"seed": -1}, "`--seed` should be at least 0"),
        (TrainConfig, {"split_seed": -1}, "`--split-seed` should be at least 0"),
        (TrainConfig, {"data_workers": -1}, "`--data-workers` should be at least 0"),
        (TrainConfig, {"image_size": 0}, "`--image-size` should be at least 1"),
        (TrainConfig, {"keep": ("layer[",)}, r"`--keep` should be a regular expression. Received 'layer\['"),
        (TrainConfig, {"align": 0}, "`--align` should be at least 1. Received 0"),
        (TrainConfig, {"min_channels": 0}, "`--min-channels` should be at least 1. Received 0"),
        (InspectConfig, {"data": "digits", "in_channels": 1}, "`--in-channels` should be left out with --data"),
        (InspectConfig, {"bound": ("layer1",)}, "`bound` should be PATTERN=LOW..HIGH.*Received 'layer1'"),
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
        (PretrainConfig, {"warmup": 1.5}, r"`--warmup` should be in \[0, 1\], a share of the epochs. Received 1.5"),
        (PretrainConfig, {"accumulate": 0}, "`--accumulate` should be at least 1"),
        (PretrainConfig, {"devices": 0}, "`--devices` should be at least 1"),
        (PretrainConfig, {"clip_grad": 0.0}, "`--clip-grad` should be above 0"),
        (PretrainConfig, {"ema": 1.0}, r"`--ema` should be in \(0, 1\)"),
        (PretrainConfig, {"checkpoint_minutes": -1.0}, "`--checkpoint-minutes` should be at least 0"),
        (PretrainConfig, {"learning_rate": 0.0}, "`--learning-rate` should be above 0"),
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
        (PruneConfig, {"plan": Path("p"), "align": 8}, "`--align` should be left out with --plan. Received 8"),
        (PruneConfig, {"plan": Path("p"), "bound": (".*=0.5",)}, "`--bound` should be left out with --plan"),
        (PruneConfig, {"rounds": 0}, "`--rounds` should be at least 1"),
        (PruneConfig, {"distillation_weight": 1.5}, r"`--distillation-weight` should be in \[0, 1\]"),
        (PruneConfig, {"temperature": 0.0}, "`--temperature` should be above 0"),
        (PruneConfig, {"rounds": 2}, "`--rounds` should be given with --searcher policy or attention. Received 2. L"),
        (PruneConfig, {"temperature": 2.0}, "`--temperature` should be given with --distill. Received 2.0. Leave it"),
        (FinetuneConfig, {"distillation_weight": 0.5}, "`--distillation-weight` should be given with --distill"),
        (PruneConfig, {"epochs": 0, "distill": True}, "`--distill` should be given with --epochs above 0"),
        (PruneConfig, {"epochs": 0, "ema": 0.9}, "`--ema` should be given with --epochs above 0. Received 0.9. Leave"),
        (PruneConfig, {"epochs": 0, "learning_rate": 0.1}, "`--learning-rate` should be given with --epochs above 0"),
        (CompareConfig, {"batch_size": 32}, "`--batch-size` should be given with --epochs above 0. Received 32"),
        (CompareConfig, {"finetune_repeats": 1}, "`--finetune-repeats` should be given with --epochs above 0"),
        (CompareConfig, {"searcher": ("agent bets",)}, "`--searcher` should be .*Did you mean 'agent best'"),
        (CompareConfig, {"searcher": ("policy",)}, "`--policy` should name a policy file .*Train one"),
        (
            CompareConfig,
            {"criterion": "encoder_attention", "policy": Path("p")},
            "`--criterion` should be such that no --policy is needed where agents.*Name searchers without agent, agent",
        ),
        (CompareConfig, {"evaluations": 13}, "`--evaluations` should be at least 14, for one update of the agent"),
        (CompareConfig, {"evaluations": 15, "workers": 4}, "`--evaluations` should be at least 16"),
        (CompareConfig, {"evaluations": 0, "searcher": ("random",)}, "`--evaluations` should be at least 1"),
        (CompareConfig, {"mode": "free"}, "`--mode` should be budgeted in a comparison. Received free. Leave it out"),
        (CompareConfig, {"repeats": 0}, "`--repeats` should be at least 1"),
        (CompareConfig, {"finetune_repeats": 0}, "`--finetune-repeats` should be at least 1"),
        (CompareConfig, {"curve_examples": 0}, "`--curve-examples` should be at least 1"),
        (CompareConfig, {"finetune_rate": 0.0}, "`--finetune-rate` should be above 0"),
        (CompareConfig, {"seconds": (1.0, -1.0)}, "`--seconds` should be above 0 and finite. Received -1.0"),
        (FinetuneConfig, {"epochs": 0}, "`--epochs` should be at least 1"),
        (FinetuneConfig, {"run": Path("r")}, "`--network` should be given, or else the folder.*Received r and"),
        (ExportConfig, {"network": None}, "`--network` should be given, or else the folder of a saved.*Received none"),
        (FinetuneConfig, {"distill": True}, "`--teacher` should be given where --distill goes with --network"),
        (FinetuneConfig, {"teacher": "w.pt"}, "`--teacher` should be given with --distill. Received w.pt"),
        (ExportConfig, {"network": None, "run": Path("r"), "weights": "w"}, "`--weights` should be given with"),
        (ExportConfig, {"network": None, "run": Path("r"), "num_classes": 3}, "`--num-classes` should be given with"),
        (ExportConfig, {"format": ("onx",)}, "`--format` should be one of .*Received 'onx'. Did you mean 'onnx'"),
        (ExportConfig, {"image_size": 0}, "`--image-size` should be at least 1"),
        (ExportConfig, {"seed": -1}, "`--seed` should be at least 0"),
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
    ("kind", "changes", "recovery"),
    [
        (TrainConfig, {}, "reconstruct"),
        (EvaluateConfig, {}, "reconstruct"),
        (TransferConfig, {}, "reconstruct"),
        (CompareConfig, {}, "reconstruct"),
        (CompareConfig, {"epochs": 2}, "compensate"),
        (CompareConfig, {"epochs": 2, "recovery": "reconstruct"}, "reconstruct"),
        (PruneConfig, {"epochs": 0}, "reconstruct"),
        (PruneConfig, {"epochs": 1}, "compensate"),
        (PruneConfig, {"epochs": 1, "recovery": "none"}, "none"),
        (PruneConfig, {"epochs": 0, "recovery": "bn"}, "bn"),
    ],
)
def test_recovery_follows_what_comes_after(kind: type, changes: dict[str, Any], recovery: str) -> None:
    """What fine-tuning makes up for need not be reconstructed; another can be chosen."""
    config = made(kind, **changes)

    assert config.recovery_name == config.scorer_settings.recovery == recovery


@pytest.mark.parametrize(
    ("kind", "changes", "scored"),
    [
        (TrainConfig, {}, "reconstruct"),
        (PruneConfig, {"epochs": 1}, "reconstruct"),
        (PruneConfig, {"epochs": 1, "recovery": "compensate"}, "compensate"),
        (PruneConfig, {"epochs": 0, "recovery": "distill"}, "distill"),
        (PruneConfig, {"epochs": 1, "scored": "bn"}, "bn"),
        (PruneConfig, {"epochs": 0, "recovery": "distill", "scored": "reconstruct"}, "reconstruct"),
        (CompareConfig, {"epochs": 2}, "reconstruct"),
        (CompareConfig, {"epochs": 2, "recovery": "none"}, "none"),
    ],
)
def test_plans_are_scored_after_what_ranks_them_best(kind: type, changes: dict[str, Any], scored: str) -> None:
    """That of the result where one is asked for; and else reconstruction, whatever follows."""
    assert made(kind, **changes).scorer_settings.scoring == scored


def test_steps_of_recovery_are_those_asked_for() -> None:
    """Four hundred by default, of which a score takes some."""
    assert made(TrainConfig, recovery="distill").scorer_settings.recovery_steps == 400
    assert made(TrainConfig, recovery="distill", recovery_steps=7).scorer_settings.recovery_steps == 7


@pytest.mark.parametrize(
    ("option", "value", "nearest"),
    [
        ("recovery", "reconstuct", "reconstruct"),
        ("scored", "compensat", "compensate"),
        ("measure", "divergense", "divergence"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(option: str, value: str, nearest: str) -> None:
    """From Python, where no parser looks at it first."""
    with pytest.raises(PruningError, match=f"`{option}` should be one of .*'{value}'. Did you mean '{nearest}'"):
        _ = made(PruneConfig, **{option: value}).scorer_settings


def test_agents_of_a_comparison_are_scored_as_its_plans() -> None:
    """What follows the searches decides, and no training of an agent is followed by epochs."""
    for changes, recovery, scored in (
        ({}, "reconstruct", "reconstruct"),
        ({"epochs": 1}, "compensate", "reconstruct"),
        ({"epochs": 1, "scored": "none"}, "compensate", "none"),
        ({"recovery": "bn"}, "bn", "bn"),
    ):
        config = made(CompareConfig, **changes)
        training = config.training("name", Budget("macs", 0.25), 4, "structure")

        assert training.recovery_name == training.scorer_settings.recovery == recovery
        assert training.scorer_settings.scoring == config.scorer_settings.scoring == scored


def test_reward_follows_the_mode() -> None:
    """Without projection, costs must count in the reward."""
    assert made(TrainConfig).reward_profile == "improvement"
    assert made(TrainConfig, mode="free").reward_profile == "tradeoff"
    assert made(TrainConfig, mode="free", reward="latency").reward_profile == "latency"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "prior"),
        ({"evaluations": 2}, "knapsack"),
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


def test_compare_puts_a_policy_beside_the_searchers() -> None:
    """Each once, in the order asked for; the agent and its rivals by default."""
    policy = Path("p")

    assert made(CompareConfig).searchers == ("uniform", "knapsack", "random", "agent", "agent best")
    assert made(CompareConfig, searcher=("mean", "mean"), policy=policy).searchers == ("mean", "policy")
    assert made(CompareConfig, searcher=("policy", "uniform"), policy=policy).searchers == ("policy", "uniform")


def test_compare_seeds_follow_the_first() -> None:
    """Those of the fine-tuning too, where there is any."""
    config = made(CompareConfig, seed=5, repeats=2, epochs=1)

    assert config.seeds == (5, 6)
    assert config.finetune_seeds == (5, 6, 7)
    assert made(CompareConfig).finetune_seeds == (None,)


def test_compare_numbers_a_network_that_comes_twice() -> None:
    """With other weights, for instance."""
    assert made(CompareConfig, network=("a", "b", "a", "a")).labels == ("a", "b", "a#2", "a#3")


def test_compare_trains_agents_as_train_would() -> None:
    """Every flag of a training that both commands have is passed on."""
    changes = {"evaluations": 99, "rounds": 2, "elites": 7, "criterion": "l1", "update_evaluations": 5, "std": 0.3}
    config = made(CompareConfig, **changes, policy=Path("p"), out=Path("o"))
    training = config.training("name", Budget("macs", 0.25), 4, "structure")

    assert {name: getattr(training, name) for name in changes} == changes
    assert (training.seed, training.features, training.budgets) == (4, "structure", (Budget("macs", 0.25),))
    assert (training.policy, training.out) == (None, None)  # agents start afresh, in folders of the comparison


@pytest.mark.parametrize(
    "module",
    [
        *(f"agents/configuration/{name}" for name in ("config", "options", "training_options", "width_options")),
        "agents/evaluations/config",
        *(f"src/prunegym/experiments/{name}/config" for name in ("comparison", "deployment")),
    ],
)
def test_every_field_has_its_help(module: str) -> None:
    """The text under a field is what `--help` shows; no flag goes without."""
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    for node in (one for one in ast.walk(tree) if isinstance(one, ast.ClassDef)):
        for one, after in zip(node.body, [*node.body[1:], None], strict=True):
            is_field = isinstance(one, ast.AnnAssign)
            told = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)

            assert not is_field or told, f"{node.name}, line {one.lineno}"


@pytest.mark.parametrize("kind", ["EvaluateConfig", "SearchOptions"])
def test_help_of_the_searcher_flag_lists_every_searcher(kind: str) -> None:
    """Each by its name, among those that need evaluations or those that do not, and no other."""
    tree = ast.parse((ROOT / "agents" / "configuration" / "config.py").read_text(encoding="utf-8"))
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
        ("data", [kind for kind in ALL if kind not in (DemoConfig, ExportConfig)]),
        ("budget", [TrainConfig, EvaluateConfig, CompareConfig, TransferConfig, PruneConfig]),
        ("policy", [TrainConfig, EvaluateConfig, CompareConfig, TransferConfig, PruneConfig]),
        ("searcher", [EvaluateConfig, CompareConfig, PruneConfig]),
        ("criterion", [TrainConfig, EvaluateConfig, CompareConfig, TransferConfig, PruneConfig]),
        ("evaluations", [TrainConfig, EvaluateConfig, CompareConfig, TransferConfig, PruneConfig]),
        *((flag, FITTED) for flag in ("epochs", "optimizer", "ema", "accumulate", "devices")),
        *((flag, [CompareConfig, PruneConfig, FinetuneConfig]) for flag in ("distill", "temperature")),
        ("workers", [TrainConfig, CompareConfig, TransferConfig]),
        *((flag, WIDE) for flag in ("align", "min_channels", "bound")),
        ("seed", ALL),
        ("out", ALL),
        ("json", ALL),
    ],
)
def test_shared_flag_is_on_every_command_it_makes_sense_for(flag: str, commands: list[type]) -> None:
    """One flag, one meaning, and found where one looks for it."""
    having = [kind for kind in ALL if flag in {one.name for one in fields(kind)}]

    assert set(having) == set(commands)


def test_help_names_every_criterion_and_no_other() -> None:
    """Who reads the help knows the pool."""
    lines = (ROOT / "agents" / "configuration" / "options.py").read_text(encoding="utf-8")
    text = re.search(r'criterion: str = "residual_taylor"\n    """(.*?)"""', lines, re.DOTALL)
    assert text is not None
    names = re.findall(r"[a-z0-9]+(?:_[a-z0-9]+)*", text[1])

    assert set(CRITERIA) <= set(names)
    assert {name for name in names if "_" in name} <= set(CRITERIA)


def test_policy_may_stand_beside_a_searcher_as_the_criterion() -> None:
    """It chooses the channels, and the searcher how many."""
    config = PruneConfig(network="n", searcher="uniform", policy=Path("p"), criterion="encoder_attention")

    assert config.searcher_name == "uniform"


@pytest.mark.parametrize("flag", [one.name for one in fields(DataOptions)])
def test_data_flags_have_one_default(flag: str) -> None:
    """Except that `inspect` reads no data unless told to, and `finetune` those of the run before."""
    default: Callable[[type], Any] = lambda kind: getattr(made(kind), flag)  # noqa: E731
    others = {(InspectConfig, "data"), (FinetuneConfig, "data")}
    kinds = [kind for kind in ALL if hasattr(made(kind), flag) and (kind, flag) not in others]

    assert len({default(kind) for kind in kinds}) == 1
