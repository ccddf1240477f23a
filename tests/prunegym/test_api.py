from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import prunegym
from prunegym.agents.configuration.config import PruneConfig
from prunegym.agents.configuration.options import DataOptions, ProblemOptions
from prunegym.commands.face_options import as_task
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.experiments.deployment.config import FinetuneOptions
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.task import ClassificationTask

Toys = Callable[[str], PrunableNetwork]
Tasks = Callable[[PrunableNetwork], Any]
#: Few examples of everything: the numbers do not matter.
FEW = {"statistics_examples": 16, "recovery_examples": 16, "reward_examples": 16, "device": "cpu"}


@pytest.fixture(params=["residual", "two_inputs", "dict_output"])
def toy(request: pytest.FixtureRequest, toys: Toys) -> PrunableNetwork:
    """A user's own networks: several inputs, outputs that are no tensor."""
    return toys(request.param)


def test_inspect_lists_groups_of_any_model(toy: PrunableNetwork) -> None:
    """The class names the network unless it is given a name."""
    inspection = prunegym.inspect(toy.model, toy.example_inputs)

    assert {row.name for row in inspection.groups} == {group.name for group in toy.graph.groups}
    assert inspection.network == type(toy.model).__name__
    assert prunegym.inspect(toy.model, toy.example_inputs, name="mine").network == "mine"


def test_inspect_keeps_what_it_is_told_to(toys: Toys) -> None:
    """By regular expression."""
    network = toys("sequential")

    kept = prunegym.inspect(network.model, network.example_inputs, keep=["0"])

    assert "0" in {row.name for row in kept.frozen}


def test_prune_takes_a_task_of_ones_own(toy: PrunableNetwork, task_for: Tasks) -> None:
    """Batches, a loss and a score are all it takes; the given model stays as it is."""
    before = {name: value.clone() for name, value in toy.model.state_dict().items()}

    result = prunegym.prune(toy.model, task_for(toy), "macs:0.6", epochs=1, batch_size=32, **FEW)

    assert result.after.macs <= 0.6 * result.before.macs
    assert set(result.scores) == {"unpruned", "after_pruning", "after_recovery", "after_finetuning"}
    assert type(result.model) is type(toy.model)
    assert all(torch.equal(value, before[name]) for name, value in toy.model.state_dict().items())


def test_widths_are_those_asked_for(toys: Toys, task_for: Tasks) -> None:
    """Alignment, fewest channels and bounds, in every function that has to do with them."""
    network = toys("sequential")
    asked: Any = {"align": 2, "min_channels": 4, "bounds": {"4": (0.5, 0.75), "9": "..6ch"}}

    result = prunegym.prune(network.model, task_for(network), "macs:0.5", **asked, **FEW)
    env = prunegym.make_env(network.model, task_for(network), "macs:0.5", **asked, **FEW)
    inspection = prunegym.inspect(network.model, network.example_inputs, **asked)

    counts = result.plan.counts()
    assert counts["0"] in (4, 6, 8)
    assert counts["4"] in (6, 8)
    assert counts["9"] in (4, 6)
    widths = env.problem.widths
    assert widths.smallest.tolist() == [row.smallest for row in inspection.groups] == [4, 6, 4]
    assert widths.largest.tolist() == [row.largest for row in inspection.groups] == [8, 8, 6]


def test_widths_that_leave_nothing_to_prune_make_budgets_impossible(toys: Toys, task_for: Tasks) -> None:
    """The error says what is within reach, and under which rules."""
    network = toys("sequential")

    with pytest.raises(
        InfeasibleBudgetError, match=r"\(align 64\).*still has 100.0%.*macs:1 or more, or loosen these rules"
    ):
        prunegym.prune(network.model, task_for(network), "macs:0.5", align=64, **FEW)


def test_prune_takes_data_by_name(tmp_path: Path) -> None:
    """Classification is built in; what is saved can be loaded without the model if its source is told."""
    model = prunegym.build_network("digits_vgg", num_classes=10, in_channels=1)

    result = prunegym.prune(model, "digits", "params:0.5", searcher="uniform", source="digits_vgg", **FEW)
    prunegym.save(result, tmp_path)

    images = torch.randn(3, 1, 8, 8)
    assert result.after.parameters <= 0.5 * result.before.parameters
    assert torch.equal(prunegym.load(tmp_path)(images), result.model(images))


def test_network_without_source_is_loaded_into_the_model(toys: Toys, task_for: Tasks, tmp_path: Path) -> None:
    """The unpruned model says what the tensors belong to."""
    network = toys("residual")
    result = prunegym.prune(network.model, task_for(network), **FEW)
    prunegym.save(result, tmp_path)

    loaded = prunegym.load(tmp_path, model=network.model)

    inputs = network.example_inputs[0]
    assert torch.equal(loaded(inputs), result.model(inputs))
    with pytest.raises(PruningError, match="`model` should be given for a network that was saved without"):
        prunegym.load(tmp_path)


def test_network_is_pruned_again(toys: Toys, task_for: Tasks, tmp_path: Path) -> None:
    """In stages, each saved: the second loads into what the first loads to, and not into the unpruned network."""
    toy = toys("residual")
    task = task_for(toy)
    first = prunegym.prune(toy.model, task, **{**FEW, "budget": "macs:0.7"})
    prunegym.save(first, tmp_path / "first")
    second = prunegym.prune(first.model, task, **{**FEW, "budget": "macs:0.5"})
    prunegym.save(second, tmp_path / "second")

    between = prunegym.load(tmp_path / "first", model=toys("residual").model)
    again = prunegym.load(tmp_path / "second", model=between)

    assert second.after.macs <= 0.5 * second.before.macs < second.before.macs == first.after.macs
    inputs = toy.example_inputs[0]
    with torch.no_grad():
        assert torch.equal(again.eval()(inputs), second.model.eval()(inputs))
    with pytest.raises(PruningError, match="Give the network as it was before it was pruned"):
        prunegym.load(tmp_path / "second", model=toys("residual").model)


def test_name_as_source_needs_data(toys: Toys, task_for: Tasks) -> None:
    """A task of one's own does not say how many classes there are."""
    network = toys("residual")

    with pytest.raises(PruningError, match="`source` should be a mapping for a task of one's own"):
        prunegym.prune(network.model, task_for(network), source="digits_vgg", **FEW)


def test_searcher_with_evaluations_uses_them(toys: Toys, task_for: Tasks) -> None:
    """And its seed: the same gives the same plan."""
    network = toys("residual")
    task = task_for(network)

    plans = [
        prunegym.prune(network.model, task, searcher="random", evaluations=3, seed=seed, **FEW).plan
        for seed in (0, 0, 1)
    ]

    assert plans[0] == plans[1] != plans[2]


def test_unreachable_budget_is_refused_with_the_reachable_one(toys: Toys, task_for: Tasks) -> None:
    """The message says what to ask for instead."""
    network = toys("residual")

    with pytest.raises(InfeasibleBudgetError, match=r"`budget` should be reachable .*Ask for macs:0\.\d+"):
        prunegym.prune(network.model, task_for(network), "macs:0.001", **FEW)


def test_other_options_are_those_of_the_command(toys: Toys, task_for: Tasks) -> None:
    """The same names, checked in the same way."""
    network = toys("residual")

    with pytest.raises(PruningError, match="Did you mean 'l1'"):
        prunegym.prune(network.model, task_for(network), criterion="l11", **FEW)


#: What an option of each function is refused for, where ``task`` is a task of one's own.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("any", {"batch_sise": 3}, "`options` should be one of .*'batch_size'.*Received 'batch_sise'. Did you mean"),
    ("env", {"criterium": "l1"}, "`options` should be one of .*Received 'criterium'. Did you mean 'criterion'"),
    ("any", {"split_seed": 0}, "`split_seed` should be given with data by name.*Received 0, which would change"),
    ("env", {"reward_split": 9}, "`reward_split` should be given with data by name"),
    ("all", {"data_root": "x"}, "`data_root` should be given with data by name"),
    ("all", {"data": "digits"}, "`data` should be left out: only the command line has it.*as `task`"),
    ("all", {"out": "x"}, "`out` should be left out: .*Received 'x'. Write what is returned with prunegym.save"),
    ("all", {"json": True}, "`json` should be left out: .*to_json"),
    ("prune", {"onnx": True}, "`onnx` should be left out: .*prunegym.export"),
    ("prune", {"network": "n"}, "`network` should be left out: .*Give the network itself"),
    ("prune", {"weights": "w"}, "`weights` should be left out: .*Load them"),
    ("env", {"bound": "a=1.."}, "`bound` should be left out: .*Give `bounds`"),
    ("env", {"latency_batch": 1}, "`latency_batch` should be given with a latency budget, or a reward"),
    ("prune", {"latency_batch": 1}, "`latency_batch` should be given with latency=True or a latency budget"),
    ("prune", {"recovery_rate": 0.1}, "`recovery_rate` should be given with recovery='distill' or scored='distill'. R"),
    ("env", {"recovery_rate": 0.1, "recovery": "compensate"}, "`recovery_rate` should be given with recovery='d"),
    ("prune", {"recovery_steps": 9, "recovery": "none"}, "`recovery_steps` should be given with recovery='distill'"),
    ("env", {"recovery_steps": 9}, "`recovery_steps` should be given with recovery='distill' .*Received 9, which"),
    ("prune", {"recovery_split": "train"}, "`recovery_split` should be given with recovery='distill'"),
    ("env", {"recovery_split": "calibration", "recovery": "reconstruct"}, "`recovery_split` should be given with rec"),
    ("prune", {"recovery": "reconstuct"}, "`recovery` should be one of .*'reconstuct'. Did you mean 'reconstruct'"),
    ("env", {"recovery": "destill"}, "`recovery` should be one of .*Received 'destill'. Did you mean 'distill'"),
    ("env", {"scored": "destill"}, "`scored` should be one of .*Received 'destill'. Did you mean 'distill'"),
    ("env", {"measure": "divergense"}, "`measure` should be one of .*'divergense'. Did you mean 'divergence'"),
    ("prune", {"recovery": "distill", "recovery_steps": 0}, "`--recovery-steps` should be at least 1. Received 0"),
    ("env", {"recovery_examples": 0}, "`--recovery-examples` should be at least 1. Received 0"),
    ("prune", {"regime": "finetuned"}, "`options` should be one of .*Received 'regime'"),
    ("any", {"checkpoint_minutes": 1.0}, "`checkpoint_minutes` should be given with "),
    ("any", {"temperature": 2.0, "epochs": 1}, "`--temperature` should be given with --distill"),
    ("prune", {"batch_size": 16}, "`--batch-size` should be given with --epochs above 0"),
    ("prune", {"rounds": 2}, "`--rounds` should be given with --searcher policy or attention"),
    ("prune", {"plan": "plan.json", "leave_out": "a"}, "`--leave-out` should be left out with --plan"),
    ("finetune", {"allow_code": True}, "`allow_code` should be given with the folder of a saved network"),
    ("finetune", {"teacher": torch.nn.Linear(1, 1)}, "`teacher` should be given with distill=True"),
    ("finetune", {"model": torch.nn.Linear(1, 1)}, "`model` should be given with the folder of a saved network"),
]
FACES: dict[str, Callable[..., Any]] = {
    "prune": prunegym.prune,
    "finetune": prunegym.finetune,
    "env": prunegym.make_env,
}


@pytest.mark.parametrize(("faces", "options", "message"), REFUSED)
def test_option_takes_effect_or_is_refused(
    faces: str, options: dict[str, Any], message: str, toys: Toys, task_for: Tasks
) -> None:
    """Before anything is computed, with what to do instead."""
    network = toys("residual")
    wanted = {"all": list(FACES), "any": ["prune", "finetune"]}.get(faces, [faces])

    for name in wanted:
        with pytest.raises(PruningError, match=message):
            FACES[name](network.model, task_for(network), **options)


@pytest.mark.parametrize("options", [{"recovery": "distill"}, {"recovery": "bn", "scored": "distill"}])
def test_options_of_training_steps_go_with_what_takes_some(
    options: dict[str, Any], toys: Toys, task_for: Tasks
) -> None:
    """Of the recovery, or of what plans are scored after."""
    network = toys("residual")
    steps: dict[str, Any] = {"recovery_steps": 2, "recovery_rate": 0.01, "recovery_split": "calibration"}

    env = prunegym.make_env(network.model, task_for(network), **{**FEW, **options, **steps})

    settings = env.problem.scorer.settings
    assert {name: getattr(settings, name) for name in {**options, **steps}} == {**options, **steps}


#: Of data that are read, as the functions call them.
READ: dict[str, Any] = {
    "data_root": "elsewhere",
    "image_size": 16,
    "split_seed": 3,
    "reward_split": 50,
    "data_workers": 2,
    "download": True,
}


@pytest.mark.parametrize(
    ("name", "kind"), [("prune", PruneConfig), ("finetune", FinetuneOptions), ("env", ProblemOptions)]
)
def test_every_option_about_data_reaches_the_reader(name: str, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of data by name; what happens to them then is no matter here."""
    asked: list[Any] = []

    def build_task(options: Any) -> Any:
        asked.append(options)
        raise PruningError("that is all")

    monkeypatch.setattr("prunegym.commands.face_options.build_task", build_task)
    with pytest.raises(PruningError, match="that is all"):
        FACES[name](torch.nn.Linear(1, 1), Path("images"), **READ)

    assert READ.keys() == {one.name for one in fields(DataOptions)} - {"data"}
    (options,) = asked
    assert isinstance(options, kind)
    expected = {**READ, "data": "images", "data_root": Path("elsewhere")}
    assert {one: getattr(options, one) for one in expected} == expected


def test_splits_are_those_asked_for() -> None:
    """Data by name are cut as the options say, and fine-tuned on as they were pruned on."""
    model = prunegym.build_network("digits_vgg", num_classes=10, in_channels=1)
    asked: dict[str, Any] = {"split_seed": 3, "reward_split": 40}

    env = prunegym.make_env(model, "digits", **asked, **FEW)

    expected = ClassificationTask(prunegym.load_data("digits", seed=3, sizes={"reward": 40}))
    assert env.problem.scorer.task.fingerprint == expected.fingerprint
    assert expected.fingerprint != as_task("digits", DataOptions()).fingerprint


def test_one_text_is_one_pattern(toys: Toys, task_for: Tasks) -> None:
    """Not one for each of its letters."""
    network = toys("sequential")

    kept = prunegym.inspect(network.model, network.example_inputs, keep="4")
    env = prunegym.make_env(network.model, task_for(network), keep="4", **FEW)

    names = {group.name for group in env.problem.scorer.network.graph.groups}
    assert names == {row.name for row in kept.groups} - {row.name for row in kept.frozen} == {"0", "9"}


def test_head_of_other_classes_is_refused() -> None:
    """Before anything is computed."""
    model = prunegym.build_network("digits_vgg", num_classes=7)

    with pytest.raises(PruningError, match=r"one output per class: \(B, 10\).*Received \(2, 7\)"):
        prunegym.prune(model, "digits", **FEW)


@pytest.mark.filterwarnings("ignore:.*WARN.*infinity:UserWarning")
def test_environment_is_one_of_gymnasium(toys: Toys, task_for: Tasks) -> None:
    """It passes Gymnasium's own check, and its budget holds."""
    network = toys("residual")
    env = prunegym.make_env(network.model, task_for(network), ["macs:0.5", "params:0.6"], rounds=2, **FEW)

    check_env(env, skip_render_check=True)
    env.reset(options={"budget": "macs:0.5"})
    env.step(np.ones(env.action_space.shape, dtype=np.float32))
    *_, info = env.step(np.ones(env.action_space.shape, dtype=np.float32))

    assert isinstance(env, ChannelPruningEnv)
    assert info["macs"] <= 0.5 * network.full_cost.macs


def test_environment_in_free_mode_knows_latency(
    toys: Toys, task_for: Tasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reward has a latency term, so a table is measured."""
    asked = []
    monkeypatch.setattr(
        "prunegym.experiments.setup.LatencyTable.measure", lambda *args, **kwargs: asked.append(kwargs["cache"])
    )
    network = toys("residual")

    env = prunegym.make_env(network.model, task_for(network), mode="free", data_root=tmp_path, **FEW)

    assert env.mode == "free"
    assert asked == [tmp_path / "latency"]


def test_unknown_reward_is_refused(toys: Toys, task_for: Tasks) -> None:
    """With the nearest name."""
    network = toys("residual")

    with pytest.raises(PruningError, match="Did you mean 'smooth'"):
        prunegym.make_env(network.model, task_for(network), reward="smoth", **FEW)


def test_data_become_a_classification_task() -> None:
    """By name, or read already; a task stays itself."""
    options = DataOptions()
    task = as_task("digits", options)

    assert isinstance(task, prunegym.ClassificationTask)
    assert as_task(task, options) is task
    assert as_task(task.data, options).fingerprint == task.fingerprint


def test_what_is_no_task_is_refused() -> None:
    """With what it lacks."""
    with pytest.raises(PruningError, match="`task` should be an object with the methods of prunegym.Task.*a int wi"):
        prunegym.prune(torch.nn.Linear(1, 1), 3)  # type: ignore[arg-type]
