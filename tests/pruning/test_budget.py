"""Budgets are read, applied, and refused with the reachable minimum."""

from collections.abc import Callable

import numpy as np
import pytest

from prunegym.pruning.budget import Budget, apply_budget
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.widths import Widths

Toys = Callable[[str], PrunableNetwork]


class Linear:
    """A latency of 10 ms that falls to 4 ms with the channels."""

    full = 0.010

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def latency(self, counts: np.ndarray) -> float:
        """Seconds."""
        return 0.004 + 0.006 * float(counts.sum()) / self.channels


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("macs:0.5", Budget("macs", 0.5)),
        ("params:1", Budget("params", 1.0)),
        ("latency:0.7", Budget("latency", 0.7)),
        ("latency:12ms", Budget("latency", 0.012, absolute=True)),
    ],
)
def test_budget_is_read_and_written(text: str, budget: Budget) -> None:
    """And comes back as the same text."""
    assert Budget.parse(text) == budget
    assert str(budget) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5", r"`budget` should be one of .*'macs'.* Received '0.5'"),
        ("mac:0.5", "Did you mean 'macs'"),
        (0.5, "`budget` should be a text, KIND:NUMBER. Received 0.5"),
        ("macs", "`budget` should be KIND:NUMBER"),
        ("macs:half", "`budget` should be KIND:NUMBER. Received 'macs:half'"),
        ("macs:0", r"`budget` should be a fraction in \(0, 1\]"),
        ("macs:1.1", r"`budget` should be a fraction in \(0, 1\]. Received 'macs:1.1'"),
        ("macs:nan", r"`budget` should be a fraction in \(0, 1\]"),
        ("macs:12ms", "`budget` in milliseconds should be a latency"),
        ("latency:-3ms", "`budget` should be a positive time"),
        ("latency:infms", "`budget` should be a positive time"),
    ],
)
def test_text_that_is_no_budget_is_rejected(text: str, message: str) -> None:
    """With an example of what to write."""
    with pytest.raises(PruningError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(("kind", "field"), [("macs", "macs"), ("params", "parameters")])
def test_fraction_is_of_the_unpruned_cost(toys: Toys, kind: str, field: str) -> None:
    """Half the MACs, or half the parameters."""
    network = toys("residual")
    costs = network.costs

    limit = apply_budget(Budget(kind, 0.5), costs, Widths.free(network.graph.sizes))

    assert (limit.full, limit.most) == (getattr(costs.full, field), getattr(costs.full, field) / 2)


def test_limit_holds_up_to_the_last_unit_of_cost(toys: Toys) -> None:
    """Equal is within the budget."""
    network = toys("sequential")
    costs = network.costs
    counts = np.array([4, 6, 5])
    budget = Budget("macs", costs.macs(counts) / costs.full.macs)

    limit = apply_budget(budget, costs, Widths.free(network.graph.sizes))

    assert limit.holds(counts)
    assert not limit.holds(counts + np.array([1, 0, 0]))


def test_absolute_latency_is_in_seconds(toys: Toys) -> None:
    """12 ms of 10 ms prunes nothing; 7 ms does."""
    network = toys("sequential")
    latency = Linear(int(network.graph.sizes.sum()))

    limit = apply_budget(Budget.parse("latency:7ms"), network.costs, Widths.free(network.graph.sizes), latency)

    assert limit.most == pytest.approx(0.007)
    assert limit.fraction(network.graph.sizes) == pytest.approx(1.0)
    assert not limit.holds(network.graph.sizes)


def test_tightened_limit_is_a_share_of_the_unpruned_cost(toys: Toys) -> None:
    """The budget of a round."""
    network = toys("sequential")
    costs = network.costs
    limit = apply_budget(Budget("macs", 0.25), costs, Widths.free(network.graph.sizes))

    assert limit.tightened(0.5).most == costs.full.macs / 2


def test_latency_budget_without_table_is_rejected(toys: Toys) -> None:
    """It cannot be predicted from counts alone."""
    network = toys("sequential")
    costs = network.costs

    with pytest.raises(PruningError, match="`budget` latency:0.5 needs a latency table"):
        apply_budget(Budget("latency", 0.5), costs, Widths.free(network.graph.sizes))


@pytest.mark.parametrize("text", ["macs:0.001", "params:0.01", "latency:0.1", "latency:1ms"])
def test_advice_for_an_impossible_budget_is_reachable(toys: Toys, text: str) -> None:
    """The error carries the minimum, and what its message says to ask for is accepted."""
    network = toys("residual")
    latency, widths = Linear(int(network.graph.sizes.sum())), Widths.free(network.graph.sizes)

    with pytest.raises(InfeasibleBudgetError, match=f"Received {text}, but with every group") as caught:
        apply_budget(Budget.parse(text), network.costs, widths, latency)

    advised = str(caught.value).rpartition("Ask for ")[2].removesuffix(" or more.")
    limit = apply_budget(Budget.parse(advised), network.costs, widths, latency)
    assert limit.holds(widths.smallest)
    reachable = limit.value(widths.smallest) if limit.budget.absolute else limit.fraction(widths.smallest)
    assert caught.value.reachable == pytest.approx(reachable)
