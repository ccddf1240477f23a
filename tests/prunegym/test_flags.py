"""A flag has a test that it changes something: here it is followed to where it is used."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from prunegym.agents.configuration import config as configs
from prunegym.agents.configuration.config import InspectConfig, PretrainConfig, PruneConfig, TrainConfig
from prunegym.agents.configuration.options import DataOptions, ProblemOptions
from prunegym.agents.policies.policy_file import save_policy
from prunegym.agents.run_folders.running import Reporter
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SearchResult
from prunegym.agents.training import workers
from prunegym.agents.training.loop import Trainer
from prunegym.commands import network_commands
from prunegym.envs.setting import PruningProblem
from prunegym.experiments import fitting, pretrain, prune, setup
from prunegym.experiments.comparison import command as comparison
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.deployment.config import ExportConfig, FinetuneConfig
from prunegym.experiments.setup import build_problem, build_problems, build_task, seed_everything
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.training import TrainingSettings
from prunegym.reporting.config import ReportConfig

#: Few images of everything: the numbers do not matter.
FEW = {"statistics_examples": 16, "recovery_examples": 16, "reward_examples": 16, "device": "cpu"}

SCORING = {
    "criterion": "l1",
    "recovery": "distill",
    "scored": "bn",
    "statistics_examples": 8,
    "recovery_examples": 8,
    "reward_examples": 8,
    "recovery_steps": 3,
    "recovery_rate": 0.5,
    "recovery_split": "calibration",
    "measure": "divergence",
    "precision": "float32",
    "seed": 3,
}
LATENCY = {
    "latency_batch": 2,
    "latency_threads": 1,
    "latency_backend": "onnxruntime",
    "latency_dtype": "bfloat16",
    "latency_device": "cuda:1",
}
DATA = {
    "data": "cifar10",
    "data_root": Path("elsewhere"),
    "image_size": 16,
    "split_seed": 3,
    "reward_split": 50,
    "data_workers": 2,
    "download": True,
}
FITTING = {
    "epochs": 3,
    "learning_rate": 0.5,
    "batch_size": 7,
    "weight_decay": 0.5,
    "label_smoothing": 0.5,
    "amp": True,
    "optimizer": "adamw",
    "schedule": "constant",
    "warmup": 0.5,
    "accumulate": 2,
    "clip_grad": 0.5,
    "ema": 0.5,
    "devices": 2,
    "checkpoint_minutes": 3.0,
}
DISTILLATION = {"distill": True, "distillation_weight": 0.5, "temperature": 2.0}
AGENT = {
    "rounds": 2,
    "workers": 2,
    "reward": "smooth",
    "mode": "free",
    "update_evaluations": 4,
    "learning_rate": 0.5,
    "ppo_epochs": 3,
    "elites": 3,
    "imitation_steps": 3,
    "imitation_rate": 0.5,
    "std": 0.5,
    "min_std": 0.01,
    "tensorboard": False,
    "features": "structure",
    "seed": 3,
}
WIDTHS = {"align": 8, "min_channels": 12, "bound": ("features.0=0.2..0.6",)}
SEARCH = {"evaluations": 3, "rounds": 2, "seed": 3}
#: Flags that are followed in another test of this file, or in the file named.
ELSEWHERE = {
    "network": "test_cli.py",
    "weights": "test_cli.py",
    "budget": "test_cli.py",
    "policy": "",
    "plan": "",
    "searcher": "",
    "keep": "",
    "leave_out": "test_blocks.py",
    "device": "",
    "onnx": "test_cli.py",
    "program": "test_cli.py",
    "out": "test_cli.py",
    "json": "test_cli.py",
    "latency": "test_cli.py",
    "latency_plans": "test_cli.py",
    "test": "test_cli.py",
    "quick": "test_demo.py",
    "repeats": "test_compare.py",
    "finetune_repeats": "test_compare.py",
    "finetune_rate": "",
    "seconds": "test_cli.py",
    "curve_examples": "test_compare.py",
    "html": "test_report.py",
    "runs": "test_report.py",
    "pictures": "test_report.py",
    "time_limit": "test_time_limit.py",
    "ray": "test_vector.py",
    "run": "test_deployment.py",
    "teacher": "test_deployment.py",
    "allow_code": "test_deployment.py",
    "format": "test_deployment.py",
    "dtype": "test_deployment.py",
    "num_classes": "test_deployment.py",
    "in_channels": "test_deployment.py",
}


def test_every_flag_is_followed() -> None:
    """A new flag needs an entry above."""
    followed = {*SCORING, *LATENCY, *DATA, *FITTING, *DISTILLATION, *AGENT, *WIDTHS, *SEARCH, *ELSEWHERE}

    kinds = [
        *(getattr(configs, name) for name in configs.__all__),
        *(CompareConfig, ReportConfig, FinetuneConfig, ExportConfig),
    ]
    assert {one.name for kind in kinds for one in fields(kind)} == followed


@pytest.mark.parametrize("flag", SCORING)
def test_scoring_flag_reaches_the_scorer(flag: str) -> None:
    """The scorer's settings are another."""
    before = {"recovery": "distill"} if flag != "recovery" and flag.startswith("recovery_") else {}
    changed = ProblemOptions(**before, **{flag: SCORING[flag]}).scorer_settings

    assert changed != ProblemOptions(**before).scorer_settings


@pytest.mark.parametrize("flag", LATENCY)
def test_latency_flag_reaches_the_measurement(flag: str) -> None:
    """The settings of the measurement are another."""
    device = torch.device("cpu")
    changed = ProblemOptions(**{flag: LATENCY[flag]}).latency_settings(device)

    assert changed != ProblemOptions().latency_settings(device)


@pytest.mark.parametrize("flag", DATA)
def test_data_flag_reaches_the_reader(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are read in another way."""
    asked: list[Any] = []
    data = build_task(DataOptions()).data
    monkeypatch.setattr(setup, "load_data", lambda *args, **kwargs: asked.append((args, kwargs)) or data)

    build_task(DataOptions())
    build_task(DataOptions(**{flag: DATA[flag]}))

    assert asked[0] != asked[1]


@pytest.mark.parametrize("flag", WIDTHS)
def test_width_flag_reaches_the_plan(flag: str, problem: PruningProblem) -> None:
    """The same budget leaves other widths."""
    budget = Budget("macs", 0.5)
    options = ProblemOptions(**FEW, **{flag: WIDTHS[flag]})
    changed = build_problem("digits_vgg", None, options, [budget])

    before, after = (one.uniform_counts(one.limits[budget]) for one in (problem, changed))
    assert (before != after).any()


@pytest.mark.parametrize("flag", WIDTHS)
def test_width_flag_reaches_the_inspection(flag: str) -> None:
    """Other budgets are within reach."""
    contents = [
        network_commands.run_inspect(InspectConfig(network="digits_vgg", **changes), Reporter()).content
        for changes in ({}, {flag: WIDTHS[flag]})
    ]

    assert contents[0]["reachable"] != contents[1]["reachable"]


def test_bound_flag_has_to_match_one_of_several_networks() -> None:
    """Not each of them: they need not have the same layers."""
    networks = [("digits_vgg", None), ("digits_resnet", None)]
    budgets = [Budget("macs", 0.9)]

    problems = build_problems(networks, ProblemOptions(**FEW, bound=("features.0=0.75..",)), budgets)

    assert (problems[0].widths.smallest > 1).sum() == 1
    assert (problems[1].widths.smallest == 1).all()
    with pytest.raises(PruningError, match="`bound` should match the path of a layer .*matches none"):
        build_problems(networks, ProblemOptions(**FEW, bound=("featurs.0=0.75..",)), budgets)


def test_device_flag_chooses_the_device() -> None:
    """Whatever torch knows."""
    assert ProblemOptions(device="meta").torch_device == torch.device("meta")
    assert ProblemOptions(device="cpu").torch_device == torch.device("cpu")


def test_seed_flag_reaches_the_global_generators() -> None:
    """Code that is not ours draws from them."""
    numbers = []
    for seed in (0, 0, 1):
        seed_everything(seed)
        numbers.append(float(torch.rand(())))

    assert numbers[0] == numbers[1] != numbers[2]


@pytest.fixture(scope="module")
def problem() -> PruningProblem:
    """A network with random weights, and few images."""
    options = ProblemOptions(**FEW)
    return build_problem("digits_vgg", None, options, [Budget("macs", 0.5)])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """How networks were asked to be trained; none is."""
    asked: list[dict[str, Any]] = []

    def note(_model: Any, _task: Any, settings: TrainingSettings, **options: Any) -> list[Any]:
        minutes, teacher = options["checkpoint_minutes"], options.get("teacher")
        asked.append({**vars(settings), "checkpoint_minutes": minutes, "teacher": teacher is not None})
        return []

    monkeypatch.setattr(fitting, "train_network", note)
    return asked


@pytest.mark.parametrize("flag", FITTING)
def test_training_flag_reaches_pretraining(
    flag: str, trained: list[dict[str, Any]], problem: PruningProblem, tmp_path: Path
) -> None:
    """The network is trained in another way."""
    task, model, run = problem.scorer.task, problem.scorer.network.model, RunFolder(tmp_path)
    for changes in ({}, {flag: FITTING[flag]}):
        pretrain.pretrain(model, task, PretrainConfig(network="digits_vgg", **changes), run, progress=False)

    assert trained[0] != trained[1]


def changed(flag: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options without a flag of training and with it, where it has an effect."""
    needed = {"distill": True} if flag in DISTILLATION and flag != "distill" else {}
    return needed, {**needed, flag: {**FITTING, **DISTILLATION, "finetune_rate": 0.5}[flag]}


@pytest.mark.parametrize("flag", [*FITTING, *DISTILLATION])
def test_training_flag_reaches_fine_tuning(flag: str, trained: list[dict[str, Any]], problem: PruningProblem) -> None:
    """The pruned network is trained in another way."""
    for changes in changed(flag):
        prune.fine_tune(problem.scorer.network.model, problem, PruneConfig(network="digits_vgg", **FEW, **changes))

    assert trained[0] != trained[1]


@pytest.mark.parametrize("flag", [*(one for one in FITTING if one != "learning_rate"), *DISTILLATION, "finetune_rate"])
def test_training_flag_of_a_comparison_reaches_its_fine_tuning(flag: str) -> None:
    """Plans are fine-tuned in another way; from there on the flags are those of `prune`."""
    without, given = changed(flag)
    before, after = (
        CompareConfig(network=("n",), **{"epochs": 1, **one}).finetuning("n", 0) for one in (without, given)
    )

    assert before != after
    assert getattr(after, "learning_rate" if flag == "finetune_rate" else flag) == given[flag]


@pytest.mark.parametrize(
    ("kind", "changes", "rate", "decay"),
    [
        (PretrainConfig, {}, 0.1, 5e-4),
        (PruneConfig, {}, 0.01, 5e-4),
        (PruneConfig, {"optimizer": "adamw"}, 1e-3, 1e-2),
        (PretrainConfig, {"optimizer": "adamw", "weight_decay": 0.0}, 1e-3, 0.0),
        (PruneConfig, {"learning_rate": 0.3, "weight_decay": 0.1}, 0.3, 0.1),
    ],
)
def test_rate_and_decay_follow_the_optimizer(kind: Any, changes: dict[str, Any], rate: float, decay: float) -> None:
    """What suits SGD would be far too much for AdamW."""
    settings = kind(network="digits_vgg", **changes).training_settings(7)

    assert (settings.learning_rate, settings.weight_decay, settings.seed) == (rate, decay, 7)


def agent_state(problem: PruningProblem, folder: Path, **changes: Any) -> dict[str, Any]:
    """What a training of an agent is about to do."""
    settings: dict[str, Any] = {"network": ("digits_vgg",), **FEW, **changes}
    trainer = Trainer([problem], TrainConfig(**settings), RunFolder(folder))
    model = trainer.model
    env = workers.make_env(problem, trainer.config, trainer.padding)
    try:
        return {
            "rounds": env.rounds,
            "mode": env.mode,
            "profile": env.profile,
            "workers": trainer.envs.num_envs,
            "episodes": trainer.episodes,
            "model": (
                model.n_epochs,
                model.learning_rate,
                model.elites,
                model.imitation_steps,
                model.imitation_rate,
                model.min_std,
                model.seed,
            ),
            "std": float(model.policy.log_std.detach()),
            "features": model.policy.features,
            "weights": float(sum(one.detach().sum() for one in model.policy.encoder.parameters())),
            "tensorboard": any((folder / "tensorboard").glob("events*")),
        }
    finally:
        trainer.close()


@pytest.mark.parametrize("flag", AGENT)
def test_agent_flag_reaches_the_training(
    flag: str, problem: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent is trained in another way."""
    monkeypatch.setattr(workers, "ProcessVecEnv", workers.DummyVecEnv)  # processes take seconds to start
    for name in "ab":
        (tmp_path / name).mkdir()

    before = agent_state(problem, tmp_path / "a")
    after = agent_state(problem, tmp_path / "b", **{flag: AGENT[flag]})

    assert before != after


def test_policy_flag_is_what_training_starts_from(problem: PruningProblem, tmp_path: Path) -> None:
    """The weights of the file, and not new ones."""
    run = RunFolder(tmp_path)
    config = TrainConfig(network=("digits_vgg",), seed=1, tensorboard=False, **FEW)
    first = Trainer([problem], config, run)
    path = tmp_path / "policy.safetensors"
    save_policy(path, first.model.policy, metadata={})
    first.close()

    states = [
        agent_state(problem, tmp_path, tensorboard=False),
        agent_state(problem, tmp_path, tensorboard=False, policy=path),
    ]

    assert states[0]["weights"] != states[1]["weights"]
    assert states[1]["weights"] == float(sum(one.detach().sum() for one in first.model.policy.encoder.parameters()))


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, problem: PruningProblem) -> list[Any]:
    """Who was asked for a plan, and with what settings."""
    asked: list[Any] = []
    plan = PruningPlan.unpruned(problem.scorer.network.graph)

    def searcher_named(name: str) -> Any:
        def search(_: Any, budget: Budget, settings: Any) -> SearchResult:
            asked.append((name, str(budget), settings))
            return SearchResult(plan=plan, evaluations=0, seconds=0.0)

        return search

    monkeypatch.setattr(prune, "searcher_named", searcher_named)
    return asked


@pytest.mark.parametrize(("flag", "value"), [*SEARCH.items(), ("searcher", "uniform"), ("policy", Path("p"))])
def test_search_flag_reaches_the_searcher(flag: str, value: Any, searches: list[Any], problem: PruningProblem) -> None:
    """The plan is asked for in another way."""
    needed = {"searcher": "attention"} if flag == "rounds" else {}
    for changes in (needed, {**needed, flag: value}):
        prune.find_plan(problem, Budget("macs", 0.5), PruneConfig(network="digits_vgg", **changes))

    assert searches[0] != searches[1]


def test_plan_flag_takes_the_place_of_the_search(searches: list[Any], problem: PruningProblem, tmp_path: Path) -> None:
    """The plan of the file is carried out."""
    plan = problem.plan(problem.uniform_counts(problem.limits[Budget("macs", 0.5)]))
    plan.save(tmp_path / "plan.json")

    found = prune.find_plan(
        problem, Budget("macs", 0.5), PruneConfig(network="digits_vgg", plan=tmp_path / "plan.json")
    )

    assert found.plan == plan
    assert not searches


def test_keep_flag_has_to_match_one_of_several_networks() -> None:
    """Not each of them, as with bounds."""
    networks = [("digits_vgg", None), ("digits_resnet", None)]
    options, budgets = ProblemOptions(**FEW), [Budget("macs", 0.9)]

    problems = build_problems(networks, options, budgets, keep=["features.0"])

    assert [len(problem.scorer.network.keep) for problem in problems] == [1, 1]
    assert "features.0" not in [group.name for group in problems[0].scorer.network.graph.groups]
    with pytest.raises(PruningError, match="`keep` should match .*'featurs.0', which matches none"):
        build_problems(networks, options, budgets, keep=["featurs.0"])


def test_keep_flag_of_a_comparison_has_to_match_one_of_its_networks() -> None:
    """A pattern is refused before anything is searched; one that matches either of them is not."""
    options = {**FEW, "network": ("digits_vgg", "digits_resnet"), "budget": ("macs:0.9",), "searcher": ("uniform",)}

    problems = comparison._problems(CompareConfig(**options, keep=("features.0",)), Reporter(progress=False))

    assert [len(one.scorer.network.keep) for one in problems] == [1, 1]
    with pytest.raises(PruningError, match="`keep` should match .*'featurs.0', which matches none"):
        comparison._problems(CompareConfig(**options, keep=("featurs.0",)), Reporter(progress=False))


def test_keep_flag_freezes_groups(problem: PruningProblem) -> None:
    """In every command the network is made here."""
    options = ProblemOptions(**FEW)
    kept = build_problem("digits_vgg", None, options, [Budget("macs", 0.9)], keep=["features.0"])

    assert {group.name for group in problem.scorer.network.graph.groups} - {
        group.name for group in kept.scorer.network.graph.groups
    } == {"features.0"}
    assert network_commands.build_problem is build_problem
