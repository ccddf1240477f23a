"""Training: what an untrained agent is, what a trained one learns, and that interruptions change nothing."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import DummyVecEnv

from prunegym.agents.configuration.config import TrainConfig, TransferConfig
from prunegym.agents.configuration.time_limit import TimeLimit, TimeUp
from prunegym.agents.policies.policy_file import load_policy, save_policy
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SEARCHERS, SearchSettings, own_plan
from prunegym.agents.training import loop, workers
from prunegym.agents.training.loop import METRICS, Trainer, train
from prunegym.agents.training.result import TrainResult
from prunegym.agents.training.workers import make_envs
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.prior import KNAPSACK, TRIALS
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.evaluate import plan_row
from prunegym.experiments.transfer import transfer
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer

HALF = Budget.parse("macs:0.5")
CONFIG = TrainConfig(
    network=("digits_resnet",),
    data="digits",
    budget=("macs:0.5",),
    evaluations=23,
    rounds=1,
    update_evaluations=5,
    ppo_epochs=1,
    imitation_steps=2,
    tensorboard=False,
)


def go(problems: list[PruningProblem], folder: Path, config: TrainConfig = CONFIG) -> TrainResult:
    """Train quietly in a folder."""
    run = RunFolder.create(folder, network="n", searcher="ppo", budget="b", seed=0, config={"for": "a test"})
    return train(problems, config, run, progress=False)


@pytest.fixture
def half(problem: PruningProblem) -> PruningProblem:
    """The trained digits network at half its MACs."""
    return problem.only(HALF)


def test_update_may_be_of_one_evaluation(half: PruningProblem, tmp_path: Path) -> None:
    """In one round that is a single transition."""
    result = go([half], tmp_path / "r", replace(CONFIG, update_evaluations=1, evaluations=7))

    assert 0 < result.evaluations <= 7


def test_policy_that_is_continued_keeps_its_rounds(half: PruningProblem, tmp_path: Path) -> None:
    """Whatever would suit the new budget."""
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    policy = tmp_path / "policy.safetensors"
    save_policy(policy, Trainer([half], CONFIG, run).model.policy, metadata={"rounds": 2})

    assert replace(CONFIG, rounds=None, policy=policy).episode_rounds == 2
    assert replace(CONFIG, rounds=None).episode_rounds == 1
    assert replace(CONFIG, rounds=3, policy=policy).episode_rounds == 3


@pytest.mark.parametrize("budget", ["macs:0.5", "params:0.3"])
def test_untrained_policy_makes_exactly_the_knapsack_plan(problem: PruningProblem, budget: str, tmp_path: Path) -> None:
    """A correction of zero changes nothing: learning is judged by what it adds."""
    one = problem.only(Budget.parse(budget))
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([one], CONFIG, run)
    one.priors[one.budgets[0]] = KNAPSACK

    plan = own_plan(trainer.model.policy, ChannelPruningEnv(one, rounds=1), one.budgets[0])

    assert plan == SEARCHERS["knapsack"](one, one.budgets[0], SearchSettings()).plan


def test_untrained_policy_in_rounds_applies_the_knapsack_in_rounds(half: PruningProblem, tmp_path: Path) -> None:
    """The same holds for progressive pruning."""
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([half], replace(CONFIG, rounds=3), run)

    env = ChannelPruningEnv(half, rounds=3)

    assert own_plan(trainer.model.policy, env, HALF) == own_plan(None, env, HALF)


def test_free_training_ends_with_plans_that_were_made_freely(half: PruningProblem, tmp_path: Path) -> None:
    """Its own plan is not projected onto the budget, and the best one has the highest reward, not accuracy."""
    key = f"{half.scorer.network.name} {HALF}"
    run = RunFolder.create(tmp_path / "run", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([half], replace(CONFIG, mode="free", rounds=2, std=0.3), run)
    seen: list[dict[str, Any]] = []
    note = trainer.notes.note_best
    trainer.notes.note_best = lambda infos: note(seen.extend(infos) or infos)  # type: ignore[method-assign]

    result = trainer.run_all(progress=False)

    policy, _ = load_policy(result.policy)
    free, budgeted = (ChannelPruningEnv(half, rounds=2, mode=mode) for mode in ("free", "budgeted"))
    assert result.own[key] == own_plan(policy, free, HALF) != own_plan(policy, budgeted, HALF)
    assert result.own_trail[key][0].plan == own_plan(None, free, HALF)
    assert result.best[key] == max(seen, key=lambda info: float(info["reward"]))["plan"]
    assert result.best[key] != max(seen, key=lambda info: float(info["score"]))["plan"]


def test_training_spends_no_more_evaluations_than_allowed(half: PruningProblem, tmp_path: Path) -> None:
    """What was asked for is an upper bound, the settling at the end included."""
    result = go([half], tmp_path / "run")

    assert CONFIG.evaluations - CONFIG.update_evaluations - TRIALS <= result.evaluations <= CONFIG.evaluations


@pytest.mark.parametrize(
    ("evaluations", "update_evaluations", "imitation_steps", "examples", "updates", "looks"),
    [
        (38, 4, 1, 30, 4, 1),  # of 5 + 3 for a look
        (29, 4, 1, 150, 5, 0),  # they would leave fewer than 4 updates, at this price
        (22, 4, 1, 30, 3, 0),  # fewer than 4 updates with looks
        (10, 9, 1, 30, 1, 0),  # one update there is always
        (23, 4, 0, 30, 4, 0),  # plain PPO keeps nothing for the end
    ],
)
def test_training_spends_its_allowance_on_updates_looks_and_the_end(
    scorer: Scorer,
    tmp_path: Path,
    evaluations: int,
    update_evaluations: int,
    imitation_steps: int,
    examples: int,
    updates: int,
    looks: int,
) -> None:
    """Second looks are left out rather than paid for with what is not there."""
    few = Scorer(scorer.network, scorer.task, replace(scorer.settings, examples=examples), statistics=scorer.statistics)
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    size = {"update_evaluations": update_evaluations, "imitation_steps": imitation_steps}

    trainer = Trainer([PruningProblem(few, (HALF,))], replace(CONFIG, evaluations=evaluations, **size), run)
    result = trainer.run_all(progress=False)

    assert (0 if trainer.looks is None else trainer.looks.count) == looks
    assert trainer.update >= updates
    assert result.evaluations <= max(evaluations, update_evaluations + 1 + TRIALS)
    assert trainer.model.progress == 1.0


def test_every_budget_settles_on_a_plan_that_was_looked_at(scorer: Scorer, tmp_path: Path) -> None:
    """Updates have fewer looks than there are budgets: what leads in the end is looked at, within the allowance."""
    few = Scorer(scorer.network, scorer.task, replace(scorer.settings, examples=30), statistics=scorer.statistics)
    problem = PruningProblem(few, (HALF, Budget.parse("macs:0.7")))
    run = RunFolder.create(tmp_path / "r", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([problem], replace(CONFIG, evaluations=100, update_evaluations=4, imitation_steps=1), run)

    result = trainer.run_all(progress=False)

    assert trainer.looks is not None
    assert trainer.looks.kept > 0
    assert result.evaluations <= 100
    for key, plan in result.best.items():
        looked = trainer.notes.looked[key]
        assert looked[plan] == max(looked.values())


@pytest.mark.parametrize(("ray", "rows"), [(None, 0), ("auto", 1)])
def test_time_limit_waits_for_updates_whose_scores_are_in_no_store(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray: str | None, rows: int
) -> None:
    """On a cluster, with one worker too; here it stops after the evaluation under way."""
    if ray is not None:
        pytest.importorskip("ray")
        monkeypatch.setattr(loop, "make_envs", lambda problems, config, padding: make_envs(problems, CONFIG, padding))
    run = RunFolder.create(tmp_path / "run", network="n", searcher="ppo", budget="b", seed=0, config={})
    half.scorer.forget()  # what is remembered is not scored

    with pytest.raises(TimeUp):
        train([half], replace(CONFIG, ray=ray), run, progress=False, limit=TimeLimit(0))

    assert len(run.read_rows(METRICS)) == rows


def test_training_resumes_from_its_checkpoint(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed between two updates goes on to the same rows and plans."""
    go([half], tmp_path / "whole")
    update = Trainer.run_update

    def killed(self: Trainer) -> dict[str, Any]:
        if self.update == 1:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_update", killed)
        with pytest.raises(KeyboardInterrupt):
            go([half], tmp_path / "run")
    go([half], tmp_path / "run")

    for name in (METRICS, "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_training_goes_on_in_its_second_look(scorer: Scorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when one plan has been looked at: that is not done again, and the same one is chosen in the end."""
    config = replace(CONFIG, evaluations=64, update_evaluations=10)

    def fresh() -> PruningProblem:
        few = replace(scorer.settings, examples=30)
        return PruningProblem(Scorer(scorer.network, scorer.task, few, statistics=scorer.statistics), (HALF,))

    looked: list[PruningPlan] = []
    run = Scorer.run

    def counted(self: Scorer, plan: PruningPlan, split: str, examples: int) -> Score:
        if examples == 150:
            looked.append(plan)
        return run(self, plan, split, examples)

    def killed(self: Scorer, plan: PruningPlan, split: str, examples: int) -> Score:
        if len(looked) == 2:
            raise KeyboardInterrupt
        return counted(self, plan, split, examples)

    go([fresh()], tmp_path / "whole", config)
    monkeypatch.setattr(Scorer, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        go([fresh()], tmp_path / "run", config)
    monkeypatch.setattr(Scorer, "run", counted)
    go([fresh()], tmp_path / "run", config)

    assert len(looked) == len(set(looked)) > 2  # plans, and the uniform one that all are compared with
    for name in (METRICS, "plan.json", "policy.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_training_leaves_the_trail_of_its_plans(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluations, seconds and scores rise along it, it ends with the plans returned; a kill cuts no hole into it."""
    key = f"{half.scorer.network.name} {HALF}"
    whole = go([half], tmp_path / "whole")
    checkpoint = Trainer.checkpoint

    def killed(self: Trainer) -> None:
        checkpoint(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            go([half], tmp_path / "run")
    result = go([half], tmp_path / "run")

    assert [one[::2] for one in result.own_trail[key]] == [one[::2] for one in whole.own_trail[key]]
    assert [one[::2] for one in result.best_trail[key]] == [one[::2] for one in whole.best_trail[key]]
    assert result.own_trail[key][0].plan == own_plan(None, ChannelPruningEnv(half, rounds=CONFIG.rounds), HALF)
    best = result.best_trail[key]
    assert [one.score for one in best] == sorted({one.score for one in best})
    for trail, plan in ((best, result.best[key]), (result.own_trail[key], result.own[key])):
        assert trail[-1].plan == plan
        assert [one.evaluations for one in trail] == sorted(one.evaluations for one in trail)
        assert [one.seconds for one in trail] == sorted(one.seconds for one in trail)
        assert trail[-1].evaluations <= result.evaluations
        assert 0 < trail[-1].seconds <= result.seconds


def test_row_without_checkpoint_is_written_again(half: PruningProblem, tmp_path: Path) -> None:
    """Killed after the row and before the checkpoint: the row does not come twice."""
    go([half], tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    rows = run.read_rows(METRICS)
    run.append_row(METRICS, rows[-1])

    go([half], tmp_path / "run")

    assert run.read_rows(METRICS) == rows


def test_first_row_without_checkpoint_is_written_again(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, or out of disk, between the first row and the first checkpoint."""

    def killed(self: Trainer) -> None:
        raise KeyboardInterrupt

    go([half], tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            go([half], tmp_path / "run")
    go([half], tmp_path / "run")

    assert (tmp_path / "run" / METRICS).read_bytes() == (tmp_path / "whole" / METRICS).read_bytes()


def test_training_of_other_weights_is_not_gone_on_with(
    half: PruningProblem, digits: Any, zoo: Any, tmp_path: Path
) -> None:
    """The file behind a path may have changed, which the configuration does not show."""
    go([half], tmp_path / "run")
    other = PruningProblem(Scorer(zoo("digits_resnet"), digits, half.scorer.settings), (HALF,))

    with pytest.raises(PruningError, match=r"`--out` should hold a training of the same networks, weights and data"):
        go([other], tmp_path / "run")


@pytest.mark.slow
def test_worker_that_is_killed_ends_the_training_with_one_error(half: PruningProblem, tmp_path: Path) -> None:
    """What had been learned is on the disk, and the message says how to go on."""
    run = RunFolder.create(tmp_path / "run", network="n", searcher="ppo", budget="b", seed=0, config={})
    trainer = Trainer([half], replace(CONFIG, workers=2), run)
    os.kill(trainer.envs.processes[1].pid, signal.SIGKILL)

    with pytest.raises(PruningError, match=r"`--workers` should be processes that live .*exit code -9"):
        trainer.run_all(progress=False)
    trainer.close()


def test_two_workers_learn_what_one_process_learns(
    half: PruningProblem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two environments in processes of their own and in this one: metrics, plans and policy, byte by byte."""
    two = replace(CONFIG, workers=2, evaluations=18)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as the workers have
    try:
        result = go([half], tmp_path / "two", two)
        monkeypatch.setattr(workers, "ProcessVecEnv", DummyVecEnv)
        monkeypatch.setattr(workers.signal, "signal", lambda *_: None)  # Ctrl-C is still for the tests
        go([half], tmp_path / "one", two)
    finally:
        torch.set_num_threads(threads)

    assert result.evaluations > 6
    for name in (METRICS, "plan.json", "policy.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_one_policy_learns_on_two_networks_at_once(half: PruningProblem, digits: Any, zoo: Any, tmp_path: Path) -> None:
    """Networks of different sizes share padded observations."""
    other = PruningProblem(Scorer(zoo("digits_vgg"), digits, half.scorer.settings), (HALF,))

    result = go([half, other], tmp_path / "run", replace(CONFIG, evaluations=20))

    names = {problem.scorer.network.name for problem in (half, other)}
    assert {key.split()[0] for key in result.own} == names


class Rigged:
    """A scorer whose best plan is known: the score falls with the distance of the counts from a secret."""

    def __init__(self, scorer: Scorer, secret: NDArray[np.int64]) -> None:
        self.__dict__.update(scorer.__dict__)
        self.secret = secret

    def score(self, plan: PruningPlan, **_options: Any) -> Score:
        counts = self.network.counts(plan)  # type: ignore[attr-defined]
        distance = np.abs(np.log(counts / self.secret)).mean()
        return Score(float(1 - distance), float(distance), 1)

    def unpruned(self, **_options: Any) -> Score:
        return Score(1.0, 0.0, 1)


def test_agent_learns_where_a_better_plan_is_known(trained: PrunableNetwork, scorer: Scorer, tmp_path: Path) -> None:
    """On a made-up score the agent's own plan comes closer to the best than its start, by most of the way."""
    base = PruningProblem(scorer, (HALF,))
    start = base.knapsack_counts(base.limits[HALF])
    rng = np.random.default_rng(0)
    secret = base.project(np.clip(start / base.sizes + rng.uniform(-0.3, 0.3, len(start)), 0.1, 1), base.limits[HALF])
    rigged = PruningProblem(Rigged(scorer, secret), (HALF,))  # type: ignore[arg-type]
    before = rigged.scorer.score(base.plan(start)).score
    config = replace(CONFIG, evaluations=300, update_evaluations=10, ppo_epochs=5, imitation_steps=30)

    result = go([rigged], tmp_path / "run", config)
    after = rigged.scorer.score(result.own[f"{trained.name} macs:0.5"]).score

    assert 1 - after < 0.7 * (1 - before)


def test_policy_of_one_network_prunes_another(half: PruningProblem, digits: Any, zoo: Any, tmp_path: Path) -> None:
    """Zero-shot and few-shot rows stand beside uniform and knapsack, all within the budget."""
    policy = go([half], tmp_path / "source").policy
    other = PruningProblem(Scorer(zoo("digits_vgg"), digits, half.scorer.settings), (HALF,))
    config = TransferConfig(
        network=("digits_vgg",),
        data="digits",
        budget=("macs:0.5",),
        policy=policy,
        evaluations=12,
        update_evaluations=5,
        imitation_steps=2,
        tensorboard=False,
    )
    run = RunFolder.create(tmp_path / "target", network="n", searcher="ppo", budget="b", seed=0, config={})

    rows = transfer([other], config, run, progress=False)

    assert [row["searcher"] for row in rows] == ["uniform", "knapsack", "zero-shot", "few-shot", "few-shot best"]
    assert all(row["cost"] <= 0.5 for row in rows)


def test_saved_policy_makes_the_plan_of_the_training(half: PruningProblem, tmp_path: Path) -> None:
    """The file is the policy."""
    result = go([half], tmp_path / "run")

    agent, metadata = load_policy(result.policy)

    env = ChannelPruningEnv(half, rounds=int(metadata["rounds"]))
    assert own_plan(agent, env, HALF) == result.own["digits_resnet macs:0.5"]


def test_row_counts_the_cost_of_the_plan(half: PruningProblem) -> None:
    """Realised cost, not what was asked."""
    found = SEARCHERS["uniform"](half, HALF, SearchSettings())

    row = plan_row(half, HALF, "uniform", found)

    rebuilt = half.scorer.network.pruned(found.plan)
    assert row["parameters"] == sum(one.numel() for one in rebuilt.parameters())


def test_random_search_keeps_its_best_plan(half: PruningProblem) -> None:
    """The best score never falls with more evaluations."""
    found = SEARCHERS["random"](half, HALF, SearchSettings(evaluations=4, seed=1))

    best = [score for _, score in found.history]
    assert best == sorted(best)
    assert half.scorer.score(found.plan).score == best[-1]
