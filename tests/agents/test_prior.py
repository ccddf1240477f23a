"""What policies start from: tried, and noted with the policy."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SEARCHERS, SearchSettings, own_plan
from prunegym.agents.training.loop import Trainer
from prunegym.agents.training.priors import PRIORS_FILE
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.prior import (
    HALFWAY,
    KNAPSACK,
    PRIORS,
    SHARES,
    TRIALS,
    UNIFORM,
    between,
    choose_prior,
    prior_key,
    take_prior,
)
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer

HALF = Budget.parse("macs:0.5")

CONFIG = TrainConfig(
    network=("digits_resnet",),
    data="digits",
    budget=("macs:0.5",),
    evaluations=14,
    rounds=1,
    update_evaluations=5,
    ppo_epochs=1,
    imitation_steps=2,
    tensorboard=False,
)


@pytest.fixture
def half(problem: PruningProblem) -> PruningProblem:
    """The trained digits network at half its MACs, with a choice of its own."""
    return problem.only(HALF)


def scores_by_share(problem: PruningProblem, monkeypatch: pytest.MonkeyPatch, best: float) -> list[PruningPlan]:
    """Let the allocation of one share score best; the plans that are asked for."""
    wanted = problem.plan(problem.prior_counts(problem.limits[HALF], best))
    asked: list[PruningPlan] = []

    def score(plan: PruningPlan, **_: Any) -> Score:
        asked.append(plan)
        return Score(0.9 if plan == wanted else 0.5, 1.0, 10)

    monkeypatch.setattr(problem.scorer, "score", score)
    return asked


@pytest.mark.parametrize("share", SHARES)
def test_what_scores_best_is_what_policies_start_from(
    half: PruningProblem, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """In every round, and with a correction of zero."""
    asked = scores_by_share(half, monkeypatch, share)

    evaluations = choose_prior(half, HALF)

    assert half.priors == {HALF: share}
    assert evaluations == TRIALS
    assert len(asked) == len(set(asked)) == TRIALS
    for rounds in (1, 3):
        plan = own_plan(None, ChannelPruningEnv(half, rounds=rounds), HALF)
        assert half.limits[HALF].holds(half.scorer.network.counts(plan))
        if rounds == 1:
            assert plan == half.plan(half.prior_counts(half.limits[HALF], share))


@pytest.mark.parametrize("broken", [KNAPSACK, HALFWAY])
def test_what_has_no_score_is_not_taken(half: PruningProblem, monkeypatch: pytest.MonkeyPatch, broken: float) -> None:
    """NaN is not better than anything; of equal scores, chance for all, uniform is taken, by the searcher too."""
    plan_of = half.plan(half.prior_counts(half.limits[HALF], broken))
    monkeypatch.setattr(half.scorer, "score", lambda plan: Score(np.nan if plan == plan_of else 0.1, 2.3, 10))
    choose_prior(half, HALF)
    assert half.priors[HALF] == UNIFORM

    monkeypatch.setattr(half.scorer, "score", lambda plan: Score(0.1, 2.3, 10))
    choose_prior(half, HALF)
    assert half.priors[HALF] == UNIFORM
    found = SEARCHERS["prior"](half, HALF, SearchSettings(evaluations=3))
    assert found.plan == half.plan(half.uniform_counts(half.limits[HALF]))


def test_ends_are_the_two_allocations_and_halfway_is_between() -> None:
    """Straight in logits: 1/5 and 4/5 meet at 1/2; what keeps all or nearly nothing has an end too."""
    sizes = np.array([10, 10, 4])
    uniform, knapsack = np.array([2, 5, 2]), np.array([8, 10, 0])

    assert between(uniform, knapsack, sizes, 0.0) == pytest.approx(uniform / sizes)
    assert between(uniform, knapsack, sizes, 1.0) == pytest.approx(knapsack / sizes, abs=2e-3)
    middle = between(uniform, knapsack, sizes, 0.5)
    assert middle[0] == pytest.approx(0.5)
    assert ((uniform / sizes)[1] < middle[1] < 1, 0 < middle[2] < 0.5) == (True, True)


def test_choice_of_one_problem_is_not_that_of_another(half: PruningProblem, problem: PruningProblem) -> None:
    """Problems that share a scorer choose apart."""
    half.priors[HALF] = UNIFORM

    assert problem.priors == {}
    assert half.only(HALF).priors == half.without(()).priors == {HALF: UNIFORM}


def test_policy_starts_again_from_what_it_was_trained_from(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the policy file, and is not tried again on the same network and budget."""
    choose = scores_by_share(half.only(HALF), monkeypatch, UNIFORM)
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([half], CONFIG, run)
    assert (trainer.notes.evaluations, len(choose)) == (TRIALS, TRIALS)
    monkeypatch.undo()
    result = trainer.run_all(progress=False)
    trainer.close()
    _, metadata = load_policy(result.policy)
    assert metadata[PRIORS] == {prior_key(half, HALF): UNIFORM}

    half.priors.clear()
    found = SEARCHERS["policy"](half, HALF, SearchSettings(policy=result.policy, evaluations=0))

    assert found.evaluations == 0
    assert half.priors == {HALF: UNIFORM}
    assert found.plan == result.own["digits_resnet macs:0.5"]


@pytest.mark.parametrize(
    ("metadata", "share"),
    [
        ({PRIORS: {"KEY": HALFWAY}}, HALFWAY),
        ({"networks": ["digits_resnet"]}, KNAPSACK),  # of a version that knew nothing else
        ({PRIORS: {"KEY2": HALFWAY}, "networks": ["digits_resnet"]}, None),
        ({PRIORS: {}}, None),
        ({"networks": None}, None),
    ],
)
def test_only_what_is_not_known_is_tried(
    half: PruningProblem, monkeypatch: pytest.MonkeyPatch, metadata: dict[str, Any], share: float | None
) -> None:
    """Another network, or another budget, may need another start."""
    asked = scores_by_share(half, monkeypatch, UNIFORM)
    key = prior_key(half, HALF)
    metadata = {
        name: {key + one.removeprefix("KEY"): share for one, share in value.items()} if name == PRIORS else value
        for name, value in metadata.items()
    }

    evaluations = take_prior(half, HALF, metadata)

    assert half.priors[HALF] == (UNIFORM if share is None else share)
    assert (evaluations, len(asked)) == ((TRIALS, TRIALS) if share is None else (0, 0))


@pytest.mark.parametrize("damaged", [[], "x", 7, {"KEY": 1e6}, {"KEY": "knapsack"}, {"KEY": np.nan}])
def test_damaged_metadata_are_refused(half: PruningProblem, damaged: Any) -> None:
    """A policy that starts from anything else was not trained for it."""
    if isinstance(damaged, dict):
        damaged = {prior_key(half, HALF): damaged["KEY"]}

    with pytest.raises(PruningError, match="`--policy` should be a file that tells what the policy starts from"):
        take_prior(half, HALF, {PRIORS: damaged})


def test_policy_that_is_trained_further_keeps_its_start(half: PruningProblem, tmp_path: Path) -> None:
    """Its corrections are of that start; a new one may score better."""
    policies = []
    for name, policy in (("first", None), ("second", "first")):
        run = RunFolder.create(tmp_path / name, network="n", searcher="ppo", budget="b", seed=0, config={})
        config = CONFIG if policy is None else replace(CONFIG, policy=policies[0])
        trainer = Trainer([half], config, run)
        if policy is None:
            half.priors[HALF] = HALFWAY  # whatever was chosen
        assert half.priors[HALF] == HALFWAY
        assert policy is None or trainer.notes.evaluations == 0
        policies.append(trainer.run_all(progress=False).policy)
        trainer.close()


def test_training_of_an_earlier_version_goes_on_from_the_knapsack(half: PruningProblem, tmp_path: Path) -> None:
    """Its checkpoint is there, and nothing says what it started from."""
    for _ in range(2):
        run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
        trainer = Trainer([half], CONFIG, run)
        trainer.run_update()
        trainer.close()
        run.path(PRIORS_FILE).unlink()

    assert half.priors == {HALF: KNAPSACK}


def test_training_with_few_evaluations_tries_nothing(half: PruningProblem, tmp_path: Path) -> None:
    """What was asked for is one update."""
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([half], replace(CONFIG, evaluations=7), run)
    result = trainer.run_all(progress=False)
    trainer.close()

    assert half.priors == {HALF: KNAPSACK}
    assert result.evaluations <= 7


def test_resumed_training_goes_on_from_the_same_start(scorer: Scorer, tmp_path: Path) -> None:
    """Nothing is counted twice."""
    few = Scorer(scorer.network, scorer.task, replace(scorer.settings, examples=30), statistics=scorer.statistics)
    counts = []
    for _ in range(2):
        run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
        trainer = Trainer([PruningProblem(few, (HALF,))], CONFIG, run)
        trainer.run_update()
        trainer.close()
        counts.append(trainer.notes.evaluations)

    assert counts == [TRIALS + 6, TRIALS + 12]


def test_searcher_returns_the_best_of_the_three(half: PruningProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """One evaluation each; two are too few."""
    scores_by_share(half, monkeypatch, HALFWAY)

    found = SEARCHERS["prior"](half, HALF, SearchSettings(evaluations=3))

    assert found.evaluations == 3
    assert found.plan == half.plan(half.prior_counts(half.limits[HALF], HALFWAY))
    with pytest.raises(PruningError, match="at least 3 for searcher prior"):
        SEARCHERS["prior"](half, HALF, SearchSettings(evaluations=2))
