import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.agents.configuration.config import PruneConfig
from prunegym.agents.configuration.options import LatencyOptions
from prunegym.agents.run_folders.reload import largest_difference, main, same_in_new_process, save_example
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SearchResult
from prunegym.envs.setting import PruningProblem
from prunegym.experiments import fitting, prune
from prunegym.experiments.plan_checks import check_cost, check_outputs, count_macs, macs_of_run
from prunegym.experiments.prune import STAGES, PruneResult, carry_out, describe, find_plan
from prunegym.experiments.setup import assemble_problem, build_task
from prunegym.pruning import measuring
from prunegym.pruning.budget import Budget
from prunegym.pruning.cost import Cost
from prunegym.pruning.deployment.saving import load_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain
from prunegym.pruning.measuring import compare_networks, evaluate_network
from prunegym.pruning.memory import peak_memory
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import RECOVERIES, Recovery, Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask

HALF = Budget("macs", 0.5)
SOURCE = {"network": "digits_vgg", "num_classes": 10, "in_channels": 1, "image_size": 8}
SETTINGS = ScorerSettings(statistics_examples=64, recovery_examples=64, examples=64, precision="float32")


def config(**changes: Any) -> PruneConfig:
    """A configuration with little fine-tuning."""
    return PruneConfig(**{"network": "digits_vgg", "device": "cpu", "epochs": 1, "batch_size": 256, **changes})


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    """Digits."""
    return build_task(config())


@pytest.fixture(scope="module")
def problem(task: ClassificationTask) -> PruningProblem:
    """A network with random weights."""
    inputs, _ = next(iter(task.batches("calibration", batch_size=2)))
    network = PrunableNetwork(build_network("digits_vgg"), inputs, name="digits_vgg")
    return assemble_problem(network, task, [HALF], settings=SETTINGS)


@pytest.fixture(scope="module")
def result(problem: PruningProblem) -> PruneResult:
    """The network at half its MACs, fine-tuned for one epoch."""
    found = find_plan(problem, HALF, config())
    return carry_out(problem, found, config(), source=SOURCE, latency=False)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that networks are measured on, in order."""
    splits: list[str] = []
    real = measuring.evaluate_network

    def note(model: Any, task: Any, split: str, **settings: Any) -> Any:
        splits.append(split)
        return real(model, task, split, **settings)

    monkeypatch.setattr(measuring, "evaluate_network", note)
    return splits


def test_three_accuracies_and_the_unpruned_one_are_told(result: PruneResult) -> None:
    """Right after pruning, after recovery, after fine-tuning."""
    assert list(result.scores) == list(STAGES)
    assert all(0 <= score <= 1 for score in result.scores.values())


def test_first_accuracy_is_of_surgery_alone(problem: PruningProblem, result: PruneResult) -> None:
    """No compensation, no recalibration: what cutting does by itself."""
    bare = problem.scorer.network.pruned(result.plan)

    assert evaluate_network(bare, problem.scorer.task, "test").score == result.scores["after_pruning"]


def test_pruned_network_is_smaller_and_of_the_same_class(result: PruneResult) -> None:
    """A mask is not compression: the rebuilt network is counted."""
    assert type(result.model) is type(result.network.model)
    assert count_macs(result.network, result.model) == result.after.macs <= 0.5 * result.before.macs
    assert sum(one.numel() for one in result.model.parameters()) == result.after.parameters


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_second_accuracy_is_of_the_recovery_that_was_asked_for(
    problem: PruningProblem, result: PruneResult, recovery: Recovery
) -> None:
    """Its full form, which is what is given back; and the result says which it was."""
    settings = replace(SETTINGS, recovery=recovery, recovery_steps=3)
    scorer = Scorer(problem.scorer.network, problem.scorer.task, settings)
    found = SearchResult(plan=result.plan, evaluations=0, seconds=0.0)
    outcome = carry_out(PruningProblem(scorer, (HALF,)), found, config(epochs=0, batch_size=128), latency=False)

    expected = scorer.recovered(result.plan)
    assert outcome.recovery == outcome.to_json()["recovery"] == recovery
    assert outcome.scores["after_recovery"] == evaluate_network(expected, scorer.task, "test").score
    assert all(map(torch.equal, outcome.model.state_dict().values(), expected.state_dict().values()))


def test_layers_that_are_not_reconstructed_are_told(
    problem: PruningProblem, result: PruneResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reason, in the result and its text; results of earlier versions know of none."""
    monkeypatch.setattr("prunegym.pruning.recovery.targets.MAX_UNKNOWNS", 9)
    scorer = Scorer(problem.scorer.network, problem.scorer.task, SETTINGS)
    found = SearchResult(plan=result.plan, evaluations=0, seconds=0.0)
    outcome = carry_out(PruningProblem(scorer, (HALF,)), found, config(epochs=0, batch_size=128), latency=False)
    content = plain(outcome.to_json())

    told = content["layers_not_reconstructed"]
    assert "features.0.weight" not in told  # of one input channel
    assert "more than 9" in told["features.3.weight"]
    assert f"compensated, not reconstructed: features.3.weight ({told['features.3.weight']})" in describe(content)
    assert plain(result.to_json())["layers_not_reconstructed"] == {}
    assert "not reconstructed" not in describe(plain(result.to_json()))
    del content["layers_not_reconstructed"]
    assert "not reconstructed" not in describe(content)


def test_peak_memory_is_measured_before_and_after(result: PruneResult) -> None:
    """Of the networks themselves, in MiB for one example."""
    inputs = result.network.example_inputs
    before, after = (peak_memory(model, inputs) for model in (result.network.model, result.model))

    assert result.memory == (before, after)
    assert after.bytes < before.bytes
    assert result.to_json()["memory"] == {"before": before.mib, "after": after.mib, "unit": "MiB per example"}


def test_result_without_memory_is_still_described(result: PruneResult) -> None:
    """Of a run that was finished by an earlier version."""
    content = plain(result.to_json())
    del content["memory"]

    assert "peak MiB" not in describe(content)


def test_epochs_of_zero_leave_fine_tuning_out(problem: PruningProblem, counted: list[str]) -> None:
    """What is given back is the recovered network; only the test split is read."""
    found = find_plan(problem, HALF, config())
    outcome = carry_out(problem, found, config(epochs=0, batch_size=128), latency=False)

    assert "after_finetuning" not in outcome.scores
    assert outcome.epochs == ()
    assert set(counted) == {"test"}


def test_distillation_changes_what_is_learned(problem: PruningProblem, result: PruneResult) -> None:
    """The unpruned network is imitated."""
    found = SearchResult(plan=result.plan, evaluations=0, seconds=0.0)
    taught = carry_out(problem, found, config(distill=True), latency=False)

    assert taught.epochs[0].loss != result.epochs[0].loss


def test_unpruned_network_is_left_as_it_was(problem: PruningProblem, result: PruneResult) -> None:
    """Fine-tuning must not reach into it."""
    fresh = build_network("digits_vgg").state_dict()

    state = problem.scorer.network.model.state_dict()
    assert all(torch.equal(state[name], fresh[name]) for name in fresh)
    assert result.model is not problem.scorer.network.model


@pytest.mark.parametrize("wrong", [Cost(1, 0), Cost(0, 1)])
def test_network_that_does_not_cost_what_was_promised_is_refused(result: PruneResult, wrong: Cost) -> None:
    """MACs and parameters are both counted anew."""
    expected = Cost(result.after.macs + wrong.macs, result.after.parameters + wrong.parameters)

    with pytest.raises(PruningError, match="`plan` should cost what it promises"):
        check_cost(result.network, result.model, expected)


def test_costs_of_every_network_are_counted_alike(
    zoo_member: PrunableNetwork, random_plan: Callable[..., Any], rng: np.random.Generator
) -> None:
    """PyTorch's counter and ours, before and after pruning."""
    plan = random_plan(zoo_member, rng)
    smaller = zoo_member.pruned(plan)

    assert count_macs(zoo_member, zoo_member.model) == zoo_member.full_cost.macs
    assert count_macs(zoo_member, smaller) == zoo_member.cost(plan).macs


class Encoder(nn.Module):
    """Attention that PyTorch runs in one fused kernel, if it may."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 5)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)
        self.mix = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(x)).mean(1))


class Attending(Encoder):
    """``nn.MultiheadAttention`` without its weights: scaled dot product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))


class ByHand(Encoder):
    """Scaled dot product attention called by the network's own code."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.mix = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = (one(x).unflatten(-1, (2, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(F.relu(self.mix(mixed)).mean(1))


class LearnedQueries(Encoder):
    """A view of a parameter goes into a module, as in DETR."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.mix = nn.Parameter(torch.randn(1, 4, 10)), nn.Linear(10, 16)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.mix(self.queries.expand(len(x), -1, -1))
        return self.head((queries * F.relu(self.embed(x)).mean(1, keepdim=True)).sum(1))


@pytest.mark.parametrize("kind", [Encoder, Attending, ByHand])
def test_attention_is_counted(kind: type[nn.Module], random_plan: Callable[..., Any], rng: np.random.Generator) -> None:
    """By both, as much as it costs, so that what is pruned can be compared."""
    network = PrunableNetwork(kind(), torch.randn(2, 7, 6), name="attention")
    plan = random_plan(network, rng)

    assert count_macs(network, network.model) == network.full_cost.macs
    assert count_macs(network, network.pruned(plan)) == network.cost(plan).macs < network.full_cost.macs
    assert torch.backends.mha.get_fastpath_enabled()


def test_view_of_a_parameter_may_go_into_a_module() -> None:
    """Where PyTorch's counter would look for a gradient; parameters have theirs again afterwards."""
    model = LearnedQueries()

    assert macs_of_run(model, torch.randn(1, 7, 6)) == 7 * 6 * 16 + 4 * 10 * 16 + 16 * 5
    assert all(one.requires_grad for one in model.parameters())


def test_plan_of_another_network_is_refused(
    problem: PruningProblem, toys: Callable[[str], PrunableNetwork], tmp_path: Path
) -> None:
    """Before anything is cut."""
    PruningPlan.unpruned(toys("residual").graph).save(tmp_path / "plan.json")

    with pytest.raises(PruningError, match="`plan` should name exactly the network's"):
        find_plan(problem, HALF, config(plan=tmp_path / "plan.json"))


def test_interrupted_fine_tuning_goes_on_to_the_same_network(
    problem: PruningProblem, result: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the checkpoint in the run folder."""
    found = SearchResult(plan=result.plan, evaluations=0, seconds=0.0)
    longer = config(epochs=2)
    whole = carry_out(problem, found, longer, latency=False)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            carry_out(problem, found, longer, run=RunFolder(tmp_path), latency=False)

    done: list[int] = []
    monkeypatch.setattr(fitting, "note_epoch", lambda run, row, **_: done.append(row.epoch))
    again = carry_out(problem, found, longer, run=RunFolder(tmp_path), latency=False)

    assert done == [2]
    state = again.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    assert again.scores == whole.scores


def test_saved_network_comes_back_the_same_here_and_in_a_new_process(
    result: PruneResult, task: ClassificationTask, tmp_path: Path
) -> None:
    """Bit for bit."""
    inputs, _ = next(iter(task.batches("test", batch_size=8)))
    prune.save(result, tmp_path)
    save_example(tmp_path / "example.safetensors", result.model, inputs)

    assert torch.equal(load_network(tmp_path)(inputs), result.model(inputs))
    assert largest_difference(tmp_path) == 0.0
    assert same_in_new_process(tmp_path)


def test_other_outputs_are_noticed(result: PruneResult, task: ClassificationTask, tmp_path: Path) -> None:
    """The check of a reloaded network is worth what it catches."""
    inputs, _ = next(iter(task.batches("test", batch_size=8)))
    prune.save(result, tmp_path)
    other = result.network.pruned(result.plan)
    save_example(tmp_path / "example.safetensors", other, inputs)

    assert largest_difference(tmp_path) > 0
    assert main([str(tmp_path), str(torch.get_num_threads())]) == 1
    (tmp_path / "recipe.json").unlink()
    assert main([str(tmp_path), "1"]) == 3


def test_latency_is_measured_before_and_after_in_every_runtime(result: PruneResult) -> None:
    """Side by side, with a sentence that says what can be said."""
    rows = prune.measure_speed(result.network, result.model, LatencyOptions(), torch.device("cpu"))

    assert [row["backend"] for row in rows] == ["torch", "onnxruntime"]
    assert all({"before", "after", "speed_up", "sentence"} <= row.keys() for row in rows)


def test_missing_runtime_is_told_and_no_failure(result: PruneResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime is an optional extra; but where it was asked for, its absence is an error."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)

    rows = prune.measure_speed(result.network, result.model, LatencyOptions(), torch.device("cpu"))
    asked = LatencyOptions(latency_backend="onnxruntime")

    assert "pip install" in rows[1]["sentence"]
    with pytest.raises(PruningError, match="needs the package onnxruntime"):
        prune.measure_speed(result.network, result.model, asked, torch.device("cpu"))


def test_blocks_left_out_are_told(result: PruneResult) -> None:
    """In the result and its text, where there are any; results of earlier versions know of none."""
    content = plain(result.to_json())
    assert content["blocks_left_out"] == []
    assert "blocks left out" not in describe(content)
    shallow = replace(result, plan=result.plan.without(["layer2.1", "layer3.0"]))
    assert "blocks left out: layer2.1, layer3.0" in describe(plain(shallow.to_json()))
    del content["blocks_left_out"]

    assert "blocks left out" not in describe(content)


def test_text_names_every_stage(result: PruneResult) -> None:
    """With scores as percentages and costs beside them."""
    content = plain(result.to_json())
    content["latency"] = [{"backend": "torch", "sentence": "No measurable speed-up."}]

    text = describe(content)

    for words in ("unpruned", "after pruning", "after recovery", "after fine-tuning", "No measurable speed-up"):
        assert words in text
    assert f"{result.after.macs:,}" in text
    assert f"{result.memory[1].mib:.4g}" in text
    assert content["channels"]["features.0"]["before"] == 16


def test_nan_is_no_score(task: ClassificationTask, result: PruneResult) -> None:
    """An accuracy could be made of it: it is refused, or told where it may be."""
    sound, broken = build_network("digits_vgg"), build_network("digits_vgg")
    broken.classifier.bias.data[3] = float("nan")
    assert evaluate_network(broken, task, "test").score > 0

    scores = compare_networks({"unpruned": sound, "after_pruning": broken}, task, may_fail={"after_pruning"})

    assert np.isfinite(scores["unpruned"])
    assert np.isnan(scores["after_pruning"])
    content = plain(replace(result, scores={**result.scores, **scores}).to_json())
    assert content["test_scores"]["after_pruning"] is None
    assert "no number" in describe(content)
    with pytest.raises(PruningError, match="Received NaN on the test split of 'digits' for the network after recovery"):
        compare_networks({"unpruned": sound, "after_recovery": broken}, task, may_fail={"after_pruning"})


def test_network_that_depends_silently_on_its_widths_is_refused() -> None:
    """What the check on tracing missed is found before anything is trained or saved."""
    network = PrunableNetwork(Silent().eval(), torch.randn(2, 3, 4, 4), check=False)
    mask = np.ones(network.graph.units, dtype=bool)
    mask[0] = False

    with pytest.raises(PruningError, match="outputs differ by .* --keep"):
        check_outputs(network, PruningPlan.from_mask(network.graph, mask))


class Silent(nn.Module):
    """Scales by its number of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.head(x * x.shape[1]).mean((2, 3))
