"""DCP-A: widths and depth by gradient descent, guided by attention over layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from prunegym.agents.searching.layer_attention import (
    LayerAttention,
    candidate_counts,
    gumbel_softmax,
    layer_tokens,
    width_masks,
)
from prunegym.agents.searching.search import Counts, Search, SearchResult, SearchSettings, evaluations_per_step
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.blocks import inside, remove_blocks
from prunegym.pruning.budget import Budget, Limit
from prunegym.pruning.copies import duplicate
from prunegym.pruning.layout import lay_out
from prunegym.pruning.modes import differentiating, evaluating
from prunegym.pruning.recovery import training_batches
from prunegym.pruning.soft_masks import SoftMasks

BATCH = 64
HOT, COLD = 1.0, 0.1
"""Temperature of the first and the last step; it falls geometrically."""
TRAVEL = 15.0
"""How far the logit that a group or block has of its own can go over all steps: their number times the learning rate,
which is within RATES."""
RATES = 0.02, 0.3
ATTENTION = 0.02
"""Learning rate of the attention network, as a share of that."""
LIGHT, HEAVY = 0.01, 30.0
"""Factor on the excess over the budget, in logs, in the first step and, were it to rise in all, in the last; it rises
geometrically while the budget is exceeded, so that what the loss misses least goes first. The unit of the loss is what
all channels together are worth: by how much it rises when all masks are shut."""


def dcpa(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Learn how wide each group and how deep the network should be, both at once.

    "DCP-A", Complex & Intelligent Systems 2023: a differentiable search for width and depth by Gumbel-softmax, guided
    by attention over layers, in two stages, the search and the training of what it found.

    Everything else is our reading. Each group chooses among a few widths, each residual block with an identity
    shortcut whether it stays. A small attention network over groups and blocks gives the logits
    (:class:`~prunegym.agents.searching.layer_attention.LayerAttention`). In each step a soft draw masks the unpruned
    network; loss of the task plus the excess of the expected cost over the budget are minimised. The weight of the
    excess rises while there is one, and the temperature falls until draws are nearly hard. MACs are differentiated
    through their exact formula at expected widths; parameters and latency, which come in steps, by their slope. Batch
    normalisation takes the statistics of the batch, as recalibration will, unless the recovery is `none`.
    The weights are frozen; where the recovery is `distill` they are trained along with the masks from those inherited,
    and then dropped: as for every searcher, the plan is scored from the inherited weights after recovery.
    Blocks that are more likely to go than to stay are left out, and expected widths are projected onto the budget.
    Which channels stay is up to the scorer's criterion. The second stage is ordinary fine-tuning (``prunegym prune
    --epochs``).

    Training steps are paid for in evaluations (:func:`~prunegym.agents.searching.search.evaluations_per_step`); there
    are as many as the allowance holds beside the evaluation of the plan. With an allowance of 1 nothing is learned.
    Latency tables know nothing of blocks that are gone: with one, all blocks stay.
    """
    search = Search("dcpa", problem, budget, settings, choosing=False)
    price = evaluations_per_step(problem.scorer.settings, BATCH)
    steps = int((search.left - 1) / price)
    choice = SoftChoice(problem, search.limit, settings.seed)
    if steps:
        train(choice, steps, progress=settings.progress)
        search.pay(min(search.left - 1, int(np.ceil(steps * price))))
    search.leave_out(choice.skipped())
    search.ask(choice.keep_ratios())
    return search.result()


class SoftChoice:
    """Widths and blocks as soft draws, and what they cost.

    Args:
        problem: network, criterion and the counts that groups may keep.
        limit: the budget.
        seed: of first weights and draws.
    """

    def __init__(self, problem: PruningProblem, limit: Limit, seed: int) -> None:
        self.problem, self.limit, self.seed = problem, limit, seed
        network, candidates = problem.scorer.network, candidate_counts(problem)
        self.blocks: tuple[str, ...] = ()
        if problem.latency is None:
            self.blocks = tuple(path for path in network.blocks if path not in problem.removed)
        self.counts = torch.zeros(len(candidates), max(map(len, candidates)), dtype=torch.float64)
        for row, one in zip(self.counts, candidates, strict=True):
            row[: len(one)] = torch.from_numpy(one)
        self._kept = width_masks(problem, candidates)
        self._group_of = torch.from_numpy(network.graph.group_of)
        modules = [one.module for one in network.graph.operations]
        self._block_of = torch.tensor(  # (operations,), the number of blocks where there is none
            [next((i for i, path in enumerate(self.blocks) if inside(one, path)), len(self.blocks)) for one in modules]
        )
        self.generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokens, sizes = layer_tokens(problem, self.blocks), torch.from_numpy(problem.sizes)
            self.network = LayerAttention(tokens, self.counts, sizes)

    def draw(self, temperature: float) -> tuple[Tensor, Tensor]:
        """How much of each candidate is taken ``(G, K)``, and of each block ``(B,)``."""
        widths, blocks = self.network()
        two = torch.stack([blocks, torch.zeros_like(blocks)], dim=-1)
        taken = gumbel_softmax(widths, temperature, self.generator)
        return taken, gumbel_softmax(two, temperature, self.generator)[:, 0]

    def expected(self) -> tuple[Tensor, Tensor]:
        """The same without noise, at the last temperature."""
        widths, blocks = self.network()
        return (widths / COLD).softmax(dim=-1), (blocks / COLD).sigmoid()

    def masks(self, taken: Tensor) -> Tensor:
        """Factor of each unit ``(units + 1,)``: the share of the draw that is wide enough to keep it."""
        return torch.cat([(self._kept * taken[self._group_of]).sum(1), taken.new_ones(1)])

    def cost(self, taken: Tensor, there: Tensor) -> Tensor:
        """What the draw costs as a share of the limit, at its expected widths."""
        counts, there = (self.counts * taken).sum(1), there.double()
        if self.limit.budget.kind == "macs":
            left = torch.cat([there, there.new_ones(1)])[self._block_of]
            return self.problem.costs.soft_macs(counts, left) / self.limit.most
        return _linear_cost(self.problem, self.limit, self.blocks, counts, there) / self.limit.most

    @torch.no_grad()
    def keep_ratios(self) -> NDArray[np.float64]:
        """Expected keep ratio of each group ``(G,)``."""
        counts = (self.counts * self.expected()[0]).sum(1).numpy()
        ratios: NDArray[np.float64] = (counts / self.problem.sizes).clip(0, 1)
        return ratios

    @torch.no_grad()
    def skipped(self) -> list[str]:
        """Blocks that are more likely to go than to stay."""
        return [path for path, there in zip(self.blocks, self.expected()[1].tolist(), strict=True) if there < 0.5]


def _linear_cost(
    problem: PruningProblem, limit: Limit, blocks: tuple[str, ...], counts: Tensor, there: Tensor
) -> Tensor:
    """A cost that comes in steps, by its slope around expected widths and blocks: from what one step up or down saves.

    Args:
        problem: knows the counts that groups may keep.
        limit: measures the cost.
        blocks: that may go.
        counts: expected widths ``(groups,)`` float64.
        there: how much of each block is there ``(blocks,)`` float64.
    """
    widths = problem.widths
    base: Counts = widths.nearest(counts.detach().numpy() / problem.sizes)
    cost, up = limit.value(base), widths.up(base)
    slope = np.zeros(len(base))
    for group in range(len(base)):
        other = base.copy()
        down = widths.floor(np.maximum(base - 1, widths.smallest))
        other[group] = up[group] if up[group] > base[group] else down[group]
        if other[group] != base[group]:
            slope[group] = (limit.value(other) - cost) / (other[group] - base[group])
    total = cost + torch.from_numpy(slope) @ (counts - torch.from_numpy(base))
    if blocks:  # there is no latency table
        saved = [cost - problem.without([path]).limits[limit.budget].value(base) for path in blocks]
        total = total - torch.tensor(saved, dtype=torch.float64) @ (1 - there)
    return total


def train(choice: SoftChoice, steps: int, *, progress: bool = False) -> None:
    """Minimise loss and excess over the budget, in a copy of the network."""
    scorer, network = choice.problem.scorer, choice.network
    own = [network.own_widths, network.own_depth]
    others = [one for one in network.parameters() if all(one is not mine for mine in own)]
    rate = float(np.clip(TRAVEL / steps, *RATES))
    rates: list[dict[str, object]] = [{"params": own}, {"params": others, "lr": ATTENTION * rate}]
    optimiser = torch.optim.Adam(rates, lr=rate)
    batches = training_batches(scorer.task, BATCH, choice.seed, scorer.device)
    with supernet(choice.problem, choice.blocks) as (model, masks):
        weights = [one for one in model.parameters() if one.requires_grad]
        tuning = torch.optim.SGD(weights, lr=scorer.settings.recovery_rate, momentum=0.9) if weights else None
        worth, weight = 1.0, LIGHT
        bar = tqdm(islice(batches, steps), total=steps, desc="dcpa", unit="step", disable=not progress)
        for step, (inputs, targets) in enumerate(bar):

            def loss_of(units: Tensor, there: Tensor) -> Tensor:
                masks.units = units.to(scorer.device)
                masks.blocks.update(zip(choice.blocks, there, strict=True))
                return scorer.task.loss(scorer.form.run(model, inputs), targets)  # noqa: B023 (called at once)

            if step == 0:
                worth = _worth(choice, loss_of)
            done = step / max(steps - 1, 1)
            taken, there = choice.draw(HOT * (COLD / HOT) ** done)
            excess = choice.cost(taken, there).clamp(min=1.0).log()
            weight *= (HEAVY / LIGHT) ** (float(excess.detach() > 0) / steps)
            loss = loss_of(choice.masks(taken), there).cpu() / worth + weight * excess
            for one in (optimiser, tuning):
                if one is not None:
                    one.zero_grad(set_to_none=True)
            loss.backward()
            for one in (optimiser, tuning):
                if one is not None:
                    one.step()


@torch.no_grad()
def _worth(choice: SoftChoice, loss_of: Callable[[Tensor, Tensor], Tensor]) -> float:
    """By how much the loss rises when every channel is masked; next to nothing if it does not."""
    there = torch.ones(len(choice.blocks))
    units = torch.zeros(len(choice._group_of) + 1)
    units[-1] = 1.0
    return max(float(loss_of(units, there)) - float(loss_of(torch.ones_like(units), there)), 1e-9)


@contextmanager
def supernet(
    problem: PruningProblem, blocks: Collection[str] = (), *, frozen: bool = False
) -> Iterator[tuple[nn.Module, SoftMasks]]:
    """A masked copy of the unpruned network, with batch normalisation by batch where there will be recalibration."""
    scorer = problem.scorer
    model = duplicate(scorer.network.model)
    lay_out(model, scorer.form.layout)
    remove_blocks(model, problem.removed)
    masks = SoftMasks(model, scorer.network.graph, blocks)
    joint = scorer.settings.scoring == "distill" and not frozen
    trained = [name for name, _ in model.named_parameters()] if joint else []
    with evaluating(model), differentiating(model, trained), masks.attached(), torch.enable_grad():
        if scorer.settings.scoring != "none":
            for layer in model.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.track_running_stats:
                    layer.train()
        yield model, masks
