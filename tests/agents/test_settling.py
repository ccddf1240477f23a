"""Second looks of a training, and the choice among the best plans."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from prunegym.agents.policies.ppo import Episode, EpisodeMemory
from prunegym.agents.searching.second_look import CONFIRMED, confirmed_plans
from prunegym.agents.training.notes import Notes
from prunegym.agents.training.settling import SecondLooks, Start
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.scoring import Scorer

BUDGET, OTHER = Budget("macs", 0.4), Budget("macs", 0.6)


@pytest.fixture
def small(scorer: Scorer) -> PruningProblem:
    """The trained network scored on so few images that luck matters: 30, and 150 at a second look."""
    settings = scorer.settings.__class__(**{**vars(scorer.settings), "examples": 30})
    own = Scorer(scorer.network, scorer.task, settings, statistics=scorer.statistics)
    return PruningProblem(own, (BUDGET, OTHER))


def remembered(
    problem: PruningProblem,
    rng: np.random.Generator,
    count: int,
    *,
    mode: str = "budgeted",
    highest: float = 0.5,
    budgets: Sequence[Budget] = (BUDGET,),
    episodes: int = 10,
) -> SecondLooks:
    """Looks at random episodes of two rounds, so many for each budget, that have the rewards they got."""
    env, memory = ChannelPruningEnv(problem, rounds=2, mode=mode), EpisodeMemory()
    for budget in [one for one in budgets for _ in range(count)]:
        observation, _ = env.reset(options={"budget": budget})
        observations, actions, done, value = [], [], False, 0.0
        while not done:
            actions.append(rng.uniform(-0.5, highest, env.action_space.shape).astype(np.float32))
            observations.append(observation)
            observation, value, done, _, _ = env.step(actions[-1])
        memory.add(Episode(observations, np.stack(actions), value))
    starts = [Start(env, budget) for budget in budgets]
    return SecondLooks(starts, memory, Notes(lambda: 0.0), episodes)


def test_leading_episodes_are_valued_on_more_images(small: PruningProblem, rng: np.random.Generator) -> None:
    """One in an update, until those that are imitated have all been looked at; against replaying them by hand."""
    looks = remembered(small, rng, 8)
    (start,), memory = looks.starts, looks.memory
    best = start.remembered(memory)[0]
    plan = start.replay(best)
    worth = start.env.value(150)

    assert (looks.count, looks.price) == (1, 3)  # 64 images of recovery and 150 are 2.3 times 64 and 30
    assert looks.take(0, leading=4) == 3

    (seen,) = [one for one in start.remembered(memory) if one.looked]
    assert start.replay(seen) == plan
    assert seen.value == worth
    assert seen.actions is best.actions
    values = [one.value for one in start.remembered(memory)]
    assert values == sorted(values, reverse=True)
    for update in range(1, 20):
        looks.take(update, leading=4)
    assert all(one.looked for one in start.remembered(memory)[:4])
    assert looks.take(20, leading=4) == 0


def test_plan_chosen_stood_up_best_and_leads_the_memory(small: PruningProblem, rng: np.random.Generator) -> None:
    """Whatever others scored that have not been looked at."""
    looks = remembered(small, rng, 12)
    (start,) = looks.starts
    for update in range(3):
        looks.take(update, leading=1)
    worth = {start.replay(one): one.value for one in start.remembered(looks.memory) if one.looked}

    found = looks.choose(start)
    (elite,), _ = looks.memory.elites(1)

    assert found is not None
    assert worth[found.plan] == max(worth.values())
    assert start.replay(elite) == found.plan
    assert found.score == small.scorer.score(found.plan).score
    assert found.reward == start.env.value()


def test_plan_is_looked_at_once(small: PruningProblem, rng: np.random.Generator) -> None:
    """Another episode that makes the same plan takes its value, and costs nothing; so it is after a resumption."""
    looks = remembered(small, rng, 1)
    (start,) = looks.starts
    (episode,) = start.remembered(looks.memory)
    assert looks.take(0, leading=2) == 3
    looks.memory.add(replace(episode, value=episode.value + 1))
    resumed = Notes(lambda: 0.0)
    resumed.restore(json.loads(json.dumps(looks.notes.to_json())))

    assert SecondLooks([start], looks.memory, resumed, 10).take(1, leading=2) == 0

    first, second = start.remembered(looks.memory)
    assert first.value == second.value
    assert first.looked
    assert second.looked


def test_starting_states_are_looked_at_in_turn(small: PruningProblem, rng: np.random.Generator) -> None:
    """Where an update has fewer looks than there are networks and budgets."""
    looks = remembered(small, rng, 4, budgets=(BUDGET, OTHER))

    for update in range(3):
        looks.take(update, leading=4)

    seen = [sum(one.looked for one in start.remembered(looks.memory)) for start in looks.starts]
    assert looks.count == 1
    assert seen == [2, 1]


def test_what_leads_in_the_end_is_looked_at(small: PruningProblem, rng: np.random.Generator) -> None:
    """Where updates have no look for every starting state; else that is done, and nothing is kept for it."""
    looks = remembered(small, rng, 6, budgets=(BUDGET, OTHER))
    looks.take(0, leading=1)
    plans = [start.replay(start.remembered(looks.memory)[0]) for start in looks.starts]

    spent = looks.at_the_end()

    assert looks.kept == 2 * looks.price
    assert 0 < spent <= looks.kept
    for start, plan in zip(looks.starts, plans, strict=True):
        assert plan in looks.notes.looked[start.key]
    assert remembered(small, rng, 1, budgets=(BUDGET, OTHER), episodes=20).kept == 0
    assert remembered(small, rng, 1).kept == 0


def test_looks_have_a_share_of_an_update(small: PruningProblem, rng: np.random.Generator) -> None:
    """Half its evaluations, but one at least."""
    assert [remembered(small, rng, 1, episodes=count).count for count in (1, 12, 30)] == [1, 2, 5]


def test_plans_are_valued_by_the_reward_that_was_asked_for(small: PruningProblem, rng: np.random.Generator) -> None:
    """Of free plans, one that costs less may be worth more than the most accurate."""
    own = small.scorer
    # after reconstruction the most accurate of these is worth most too
    settings = own.settings.__class__(**{**vars(own.settings), "recovery": "compensate"})
    plain = PruningProblem(Scorer(own.network, own.task, settings, statistics=own.statistics), small.budgets)
    looks = remembered(plain, rng, 8, mode="free", highest=1.0, episodes=60)
    (start,) = looks.starts
    values = {start.replay(one): start.env.value(150) for one in start.remembered(looks.memory)}
    accurate = max(values, key=lambda plan: plain.scorer.score(plan, examples=150).score)

    looks.take(0, leading=8)
    found = looks.choose(start)

    assert found is not None
    assert found.plan == max(values, key=lambda plan: values[plan]) != accurate


def test_nothing_is_looked_at_without_further_images(small: PruningProblem, rng: np.random.Generator) -> None:
    """The first scores are all there is."""
    object.__setattr__(small.scorer.settings, "examples", 10_000)
    looks = remembered(small, rng, 3)

    assert looks.take(0, leading=3) == 0
    assert looks.choose(looks.starts[0]) is None


def test_plans_that_are_looked_at_again_grow_with_the_allowance() -> None:
    """Few-shot transfer looks at nothing again, and nobody at one plan alone."""
    assert [confirmed_plans(count) for count in (10, 30, 100, 300, 1000)] == [0, 0, 3, 10, CONFIRMED]


def test_second_look_leaves_a_search_what_it_needs() -> None:
    """Its own work comes first."""
    assert [confirmed_plans(100, least) for least in (94, 95, 96, 97, 101)] == [3, 2, 2, 0, 0]
