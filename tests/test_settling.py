"""The end of a training: second looks, and the choice among the best plans."""

import numpy as np
import pytest

from prunegym.agents.policies.ppo import Episode, EpisodeMemory
from prunegym.agents.searching.second_look import CONFIRMED, CONFIRMING, confirmed_plans
from prunegym.agents.training.settling import confirm, replayed
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.scoring import Scorer

BUDGET = Budget("macs", 0.4)


@pytest.fixture
def small(scorer: Scorer) -> PruningProblem:
    """The trained network scored on so few images that luck matters."""
    settings = scorer.settings.__class__(**{**vars(scorer.settings), "examples": 30})
    own = Scorer(scorer.network, scorer.task, settings, statistics=scorer.statistics)
    return PruningProblem(own, (BUDGET,))


def remembered(
    problem: PruningProblem, rng: np.random.Generator, count: int, mode: str = "budgeted", highest: float = 0.5
) -> tuple[ChannelPruningEnv, EpisodeMemory]:
    """Random episodes of two rounds, with the rewards they got."""
    env, memory = ChannelPruningEnv(problem, rounds=2, mode=mode), EpisodeMemory()
    for _ in range(count):
        observation, _ = env.reset(options={"budget": BUDGET})
        observations, actions, done, value = [], [], False, 0.0
        while not done:
            actions.append(rng.uniform(-0.5, highest, env.action_space.shape).astype(np.float32))
            observations.append(observation)
            observation, value, done, _, _ = env.step(actions[-1])
        memory.add(Episode(observations, np.stack(actions), value))
    return env, memory


def test_plan_chosen_is_the_best_on_twice_the_images(small: PruningProblem, rng: np.random.Generator) -> None:
    """Against scoring all candidates by hand."""
    env, memory = remembered(small, rng, 8)
    (episodes,) = memory.episodes.values()
    plans = [replayed(env, BUDGET, one) for one in episodes[:5]]
    best = max(plans, key=lambda plan: small.scorer.score(plan, examples=60).score)

    found = confirm(env, BUDGET, memory, 5)

    assert found is not None
    assert small.scorer.score(found.best.plan, examples=60).score == small.scorer.score(best, examples=60).score
    assert found.best.score == small.scorer.score(found.best.plan).score
    assert found.evaluations == CONFIRMING * len(set(plans))


def test_plan_chosen_is_what_the_policy_imitates(small: PruningProblem, rng: np.random.Generator) -> None:
    """It leads the memory, whatever its first score was."""
    env, memory = remembered(small, rng, 8)

    found = confirm(env, BUDGET, memory, 8)
    (elite,), _ = memory.elites(1)

    assert found is not None
    assert replayed(env, BUDGET, elite) == found.best.plan


def test_plan_chosen_has_the_best_reward_that_was_asked_for(small: PruningProblem, rng: np.random.Generator) -> None:
    """Of free plans, one that costs less may be worth more than the most accurate."""
    env, memory = remembered(small, rng, 8, mode="free", highest=1.0)
    (episodes,) = memory.episodes.values()
    values = {replayed(env, BUDGET, one): env.value(60) for one in episodes}
    accurate = max(values, key=lambda plan: small.scorer.score(plan, examples=60).score)

    found = confirm(env, BUDGET, memory, 8)

    assert found is not None
    assert found.best.plan == max(values, key=lambda plan: values[plan]) != accurate
    replayed(env, BUDGET, memory.elites(1)[0][0])
    assert found.best.reward == pytest.approx(env.value())


def test_nothing_is_chosen_where_there_are_no_further_images(small: PruningProblem, rng: np.random.Generator) -> None:
    """The first scores are all there is."""
    env, memory = remembered(small, rng, 3)
    object.__setattr__(small.scorer.settings, "examples", 10_000)

    assert confirm(env, BUDGET, memory, 3) is None


def test_plans_that_are_looked_at_again_grow_with_the_allowance() -> None:
    """Few-shot transfer looks at nothing again, and nobody at one plan alone."""
    assert [confirmed_plans(count) for count in (10, 30, 100, 300, 1000)] == [0, 0, 3, 10, CONFIRMED]


def test_second_look_leaves_a_search_what_it_needs() -> None:
    """Its own work comes first."""
    assert [confirmed_plans(100, least) for least in (94, 95, 96, 97, 101)] == [3, 2, 2, 0, 0]
