"""Progressive pruning by the attention of a graph network and a transformer, without reinforcement learning."""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from prunegym.agents.policies.encoder import EncoderConfig, GraphEncoder
from prunegym.agents.policies.encoder_attention import with_ties_broken
from prunegym.agents.searching.dcpa import BATCH, supernet
from prunegym.agents.searching.search import Search, SearchResult, SearchSettings, evaluations_per_step
from prunegym.envs.observation import (
    EDGE_FEATURES,
    GROUP_FEATURES,
    NODE_FEATURES,
    STATE_FEATURES,
    EpisodeState,
    Observation,
    Observer,
)
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.importance.criteria import Scores
from prunegym.pruning.recovery import training_batches

ROUNDS = 3
ROUND_EXAMPLES = 128
"""Calibration examples for the statistics between rounds."""
WIDTH, HEADS = 32, 4
LEARNING_RATE = 0.01
STEEPNESS = 2.0
"""How soon a channel is open: to ``1 - exp(-STEEPNESS)`` where it gets as much attention as the average one."""


def attention(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Prune in rounds what a graph network and a transformer attend to least.

    "GAT TransPruning", PeerJ Computer Science 2024: graph attention and a transformer's attention give the relations
    of channels, by which a network is pruned progressively; no reinforcement learning.

    The rest is our reading. The encoder is that of the agents
    (:class:`~prunegym.agents.policies.encoder.GraphEncoder`), trained anew for each network and budget by the loss of
    the task: the attention that a channel gets, as the transformer attends to its group and the pooling over the graph
    network's nodes to its node, opens a soft mask on it. Attention sums to 1, so channels compete for it, and need no
    penalty. Each of three rounds (``--rounds``) trains the encoder further on what is left of the network, with the
    weights frozen; asks for as much of each group as is open; projects that onto the budget of the round, which falls
    geometrically; takes the channels that get least attention (of one node, those with the lowest Taylor score); and
    measures the recovered network afresh. So it chooses channels itself, whatever ``--criterion`` says. With the
    criterion `encoder_attention` it is the attention of a trained policy that chooses channels; here nothing is trained
    by reward.

    Training steps are paid for in evaluations (:func:`~prunegym.agents.searching.search.evaluations_per_step`), as many
    as the allowance holds beside the evaluation of the plan. With an allowance of 1 nothing is learned: all channels
    are as open, and the plan is nearly uniform.
    """
    search = Search("attention", problem, budget, settings, choosing=False)
    scorer, graph, limit = problem.scorer, problem.scorer.network.graph, search.limit
    price, rounds = evaluations_per_step(scorer.settings, BATCH), settings.rounds or ROUNDS
    steps = int((search.left - 1) / price)
    gates = AttentionGates(problem, settings.seed)
    mask, statistics = problem.plan(problem.widths.largest).mask(graph), scorer.statistics
    order = np.zeros(graph.units)
    for number in range(1, rounds + 1):
        gates.look(EpisodeState.bare(graph, statistics, mask))
        steps_now = steps * number // rounds - steps * (number - 1) // rounds
        gates.train(steps_now, progress=settings.progress)
        scores = gates.scores()
        order = np.where(mask, number + scores / (1 + scores), order)  # those that went last come before those before
        counts = np.bincount(graph.group_of[mask], minlength=len(graph.groups))
        within = limit if number == rounds else limit.tightened((limit.most / limit.full) ** (number / rounds))
        counts = problem.project(gates.keep_ratios(), within, counts)
        plan = problem.plan(counts, order)
        mask = plan.mask(graph)
        if number < rounds:
            statistics, _ = scorer.look(plan, ROUND_EXAMPLES)
    search.pay(min(search.left - 1, int(np.ceil(steps * price))))
    search.score(search.project(counts / problem.sizes), order)  # fills what the rounds left of the budget
    return search.result()


class AttentionGates:
    """An encoder whose attention opens channels.

    Args:
        problem: the network.
        seed: of first weights and batches.
    """

    def __init__(self, problem: PruningProblem, seed: int) -> None:
        self._problem = problem
        scorer, graph = problem.scorer, problem.scorer.network.graph
        self._observer = Observer(scorer.network, scorer.statistics)
        config = EncoderConfig(
            len(NODE_FEATURES), len(EDGE_FEATURES), len(GROUP_FEATURES), len(STATE_FEATURES), width=WIDTH, heads=HEADS
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._encoder = GraphEncoder(config)
        torch.nn.init.zeros_(self._encoder.pooling.score.weight)  # at first the channels of a group are equal
        self._optimiser = torch.optim.Adam(self._encoder.parameters(), lr=LEARNING_RATE)
        self._batches = iter(training_batches(scorer.task, BATCH, seed, scorer.device))
        self._bin_of = torch.from_numpy(self._observer.bin_of)
        self._group_of = torch.from_numpy(graph.group_of)

    def look(self, episode: EpisodeState) -> None:
        """Let the encoder see a state of the network."""
        observation: Observation = self._observer.observe(episode, self._observer.padding)
        self._seen = {name: torch.as_tensor(value)[None] for name, value in observation.items()}
        self._episode, self._left = episode, torch.from_numpy(episode.mask)

    def attention(self) -> Tensor:
        """Attention of each unit, relative to the mean of those that are left ``(units,)``; 0 for the others."""
        looked = self._encoder.attention(self._seen)
        left = self._left.float()
        in_bin = torch.zeros(looked.bins[0].numel()).index_add(0, self._bin_of, left).clamp(min=1)
        of_bin = (looked.bins[0].flatten() / in_bin)[self._bin_of] * left
        groups = len(self._episode.counts)
        # nodes without channels that are left attract attention in vain
        total = torch.zeros(groups).index_add(0, self._group_of, of_bin).clamp(min=1e-12)
        sizes = torch.from_numpy(self._episode.counts).float()
        share = looked.groups[0, :groups]
        of_group = share / share.mean().clamp(min=1e-12) * sizes / total
        return of_bin * of_group[self._group_of]

    def opened(self) -> Tensor:
        """Factor of each unit in [0, 1) ``(units,)``."""
        return 1 - torch.exp(-STEEPNESS * self.attention())

    def train(self, steps: int, *, progress: bool = False) -> None:
        """Let attention go where the task needs it."""
        if not steps:
            return
        scorer = self._problem.scorer
        task, form, device = scorer.task, scorer.form, scorer.device
        with supernet(self._problem, frozen=True) as (model, masks):
            batches = islice(self._batches, steps)
            for inputs, targets in tqdm(batches, total=steps, desc="attention", unit="step", disable=not progress):
                masks.units = torch.cat([self.opened(), torch.ones(1)]).to(device)
                loss = task.loss(form.run(model, inputs), targets)
                # scaled, because losses of other tasks may be far from 1, where the optimiser sees nothing
                loss = loss / loss.detach().abs().clamp(min=1e-12)
                self._optimiser.zero_grad(set_to_none=True)
                loss.backward()
                self._optimiser.step()

    @torch.no_grad()
    def scores(self) -> Scores:
        """What units are kept by ``(units,)``: attention, then the Taylor score; 0 for those that are gone."""
        graph, taylor = self._problem.scorer.network.graph, self._episode.statistics.taylor
        attention = self.attention().double().numpy()
        scores = np.zeros(graph.units)
        for group in graph.groups:
            scores[group.units] = with_ties_broken(attention[group.units], taylor[group.units])
        return np.where(self._episode.mask, scores, 0.0)

    @torch.no_grad()
    def keep_ratios(self) -> Scores:
        """Share of each group that is open ``(groups,)``."""
        opened = self.opened().double().numpy()
        graph = self._problem.scorer.network.graph
        ratios: Scores = np.bincount(graph.group_of, weights=opened, minlength=len(graph.groups)) / graph.sizes
        return ratios.clip(0, 1)
