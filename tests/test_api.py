from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import prunegym
from prunegym.agents.api import as_task
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork

Toys = Callable[[str], PrunableNetwork]
Tasks = Callable[[PrunableNetwork], Any]
#: Few examples of everything: the numbers do not matter.
FEW = {"statistics_examples": 16, "recalibration_examples": 16, "reward_examples": 16, "device": "cpu"}


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


def test_network_without_source_is_loaded_into_the_model(
    toys: Toys, task_for: Tasks, tmp_path: Path
) -> None:
    """The unpruned model says what the tensors belong to."""
    network = toys("residual")
    result = prunegym.prune(network.model, task_for(network), **FEW)
    prunegym.save(result, tmp_path)

    loaded = prunegym.load(tmp_path, model=network.model)

    inputs = network.example_inputs[0]
    assert torch.equal(loaded(inputs), result.model(inputs))
    with pytest.raises(PruningError, match="`model` should be given for a network that was saved without"):
        prunegym.load(tmp_path)


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
    with pytest.raises(TypeError, match="criterium"):
        prunegym.prune(network.model, task_for(network), criterium="l1", **FEW)


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
        "prunegym.agents.setup.LatencyTable.measure", lambda *args, **kwargs: asked.append(kwargs["cache"])
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
    task = as_task("digits")

    assert isinstance(task, prunegym.ClassificationTask)
    assert as_task(task) is task
    assert as_task(task.data).fingerprint == task.fingerprint
