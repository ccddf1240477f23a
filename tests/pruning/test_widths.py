"""Counts that groups may keep, against trying every count."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from prunegym.pruning.allocation import uniform
from prunegym.pruning.budget import Budget, apply_budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.widths import Bound, WidthRules, Widths, bound_texts, unit_widths

Toys = Callable[[str], PrunableNetwork]
TOYS = ("sequential", "flattened", "grouped", "mobile", "residual")


def allowed(widths: Widths) -> list[list[int]]:
    """The counts of each group, one by one, from the smallest upwards."""
    counts, found = widths.smallest, [[int(one)] for one in widths.smallest]
    while (counts < widths.largest).any():
        counts = widths.up(counts)
        for mine, count in zip(found, counts.tolist(), strict=True):
            if count > mine[-1]:
                mine.append(count)
    return found


@st.composite
def rules(draw: st.DrawFn) -> WidthRules:
    """Alignment, fewest channels, and bounds on all groups."""
    low = draw(st.sampled_from([None, 0.0, 0.25, 0.5, 0.8, 1, 3, 6]))
    high = draw(st.sampled_from([None, 0.5, 0.7, 1.0, 4, 8]))
    comparable = low is not None and high is not None and type(low) is type(high)
    bounds = () if (low, high) == (None, None) or (comparable and low > high) else (Bound(".*", low, high),)
    return WidthRules(draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.sampled_from([1, 2, 5])), bounds)


def counts_by_trying(rules: WidthRules, size: int, channels: tuple[int, ...]) -> list[int]:
    """Every count that breaks no rule; ``channels`` are those of one unit in each of its layers."""

    def fits(count: int) -> bool:
        widths = [count * one for one in channels]
        whole = count == size
        for bound in rules.bounds:
            low, high = (
                end / min(channels) if isinstance(end, int) else end and end * size for end in (bound.low, bound.high)
            )
            # what a group does not have cannot be asked of it
            if (low and count < low - 1e-9 and not whole) or (high is not None and count > high + 1e-9):
                return False
        return whole or (all(one % rules.align == 0 for one in widths) and min(widths) >= rules.min_channels)

    return [count for count in range(1, size + 1) if fits(count)]


@given(rules=rules(), name=st.sampled_from(TOYS))
def test_allowed_counts_are_those_that_break_no_rule(toys: Toys, rules: WidthRules, name: str) -> None:
    """Against all counts; where there are none for a group, the rules are refused."""
    graph = toys(name).graph
    expected = [
        counts_by_trying(rules, group.size, channels)
        for group, channels in zip(graph.groups, unit_widths(graph), strict=True)
    ]

    if all(expected):
        assert allowed(rules.apply(graph)) == expected
    else:
        with pytest.raises(PruningError, match="`bound` should leave group .* a width"):
            rules.apply(graph)


@given(rules=rules(), name=st.sampled_from(TOYS), data=st.data())
def test_rounding_finds_the_nearest_allowed_counts(
    toys: Toys, rules: WidthRules, name: str, data: st.DataObject
) -> None:
    """Downwards to the next, and to the nearest with halves upwards."""
    graph = toys(name).graph
    try:
        widths = rules.apply(graph)
    except PruningError:
        return
    keep = np.array(data.draw(st.lists(st.floats(0, 1), min_size=len(graph.groups), max_size=len(graph.groups))))
    counts = np.array([data.draw(st.integers(1, group.size)) for group in graph.groups])

    nearest, below = widths.nearest(keep), widths.floor(counts)
    for group, choices in enumerate(allowed(widths)):
        asked = float(keep[group] * graph.sizes[group])
        assert nearest[group] == min(choices, key=lambda count: (abs(count - asked), -count))
        assert below[group] == max([count for count in choices if count <= counts[group]], default=choices[0])


@given(rules=rules(), name=st.sampled_from(TOYS), seed=st.integers(0, 100))
def test_earlier_rounds_leave_allowed_counts_only(toys: Toys, rules: WidthRules, name: str, seed: int) -> None:
    """Those up to what was kept."""
    graph = toys(name).graph
    try:
        widths = rules.apply(graph)
    except PruningError:
        return
    rng = np.random.default_rng(seed)
    kept = np.array([rng.choice(choices) for choices in allowed(widths)])

    left = allowed(widths.within(kept))
    assert left == [
        [count for count in choices if count <= most] for choices, most in zip(allowed(widths), kept, strict=True)
    ]


@given(rules=rules(), name=st.sampled_from(TOYS), seed=st.integers(0, 100))
def test_floor_of_a_searcher_leaves_allowed_counts_only(toys: Toys, rules: WidthRules, name: str, seed: int) -> None:
    """Those from the floor on, or the largest where the floor is above it."""
    graph = toys(name).graph
    try:
        widths = rules.apply(graph)
    except PruningError:
        return
    least = np.random.default_rng(seed).integers(0, graph.sizes + 1)

    assert allowed(widths.at_least(least)) == [
        [count for count in choices if count >= low] or choices[-1:]
        for choices, low in zip(allowed(widths), least, strict=True)
    ]


@given(rules=rules(), name=st.sampled_from(TOYS))
def test_choices_are_the_counts_that_are_allowed(toys: Toys, rules: WidthRules, name: str) -> None:
    """All of them, rising; every other count is refused."""
    graph = toys(name).graph
    try:
        widths = rules.apply(graph)
    except PruningError:
        return
    counts = allowed(widths)

    assert [one.tolist() for one in widths.choices()] == counts
    for count in range(int(graph.sizes.max()) + 2):
        everywhere = np.full(len(graph.groups), count)
        assert widths.allow(everywhere).tolist() == [count in one for one in counts]


def test_units_of_a_grouped_convolution_are_several_channels(toys: Toys) -> None:
    """Its groups are the units: 3 channels of its input, 2 of its output; other layers have one each."""
    graph = toys("grouped").graph
    channels = dict(zip([group.name for group in graph.groups], unit_widths(graph), strict=True))

    assert channels == {"stem": (2, 3), "last": (1,)}
    assert WidthRules(align=4).apply(graph).step.tolist() == [4, 4]
    assert WidthRules(align=6).apply(graph).step.tolist() == [6, 6]
    assert WidthRules(min_channels=3).apply(graph).smallest.tolist() == [2, 3]


@pytest.mark.parametrize("align", [4, 8])
def test_layers_of_an_aligned_network_have_aligned_widths(zoo: Toys, align: int, rng: np.random.Generator) -> None:
    """Of the rebuilt network, whose device sees them: multiples, or the width they had."""
    network = zoo("cifar_mobilenet_v2")
    widths = WidthRules(align).apply(network.graph)
    counts = uniform(apply_budget(Budget("macs", 0.5), network.costs, widths), widths)

    smaller = network.pruned(PruningPlan.from_scores(network.graph, counts, rng.random(network.graph.units)))
    cut = 0
    for layer, before in zip(smaller.modules(), network.model.modules(), strict=True):
        if isinstance(layer, nn.Conv2d) and isinstance(before, nn.Conv2d):
            for width, full in (
                (layer.out_channels, before.out_channels),
                (layer.in_channels, before.in_channels),
            ):
                cut += width < full
                assert width % align == 0 or width == full
    assert cut > 20


def test_alignment_wider_than_a_group_leaves_it_alone(toys: Toys) -> None:
    """It keeps everything; the other groups are pruned."""
    graph = toys("sequential").graph

    widths = WidthRules(align=10).apply(graph)

    assert graph.sizes.tolist() == [8, 12, 10]
    assert allowed(widths) == [[8], [10, 12], [10]]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("layer1.*=0.5..1", 0.5, 1.0),
        ("stem=16ch..", 16, None),
        ("stem=..0.75", None, 0.75),
        ("a=b|c=.5..0.75", 0.5, 0.75),
        ("stem=4ch..0.5", 4, 0.5),
        ("head.*=0.5", 0.5, 0.5),
        ("head.*=8ch", 8, 8),
    ],
)
def test_bound_is_read(text: str, low: float | None, high: float | None) -> None:
    """Shares of the channels or channels, both ends, one, or a single value."""
    bound = Bound.parse(text)

    assert (bound.low, bound.high) == (low, high)
    assert type(bound.low) is type(low)
    assert Bound.parse(str(bound)) == bound


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layer1", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=..", "`bound` should be PATTERN=LOW..HIGH"),
        ("=0.5..1", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=0.5..2", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=-0.5..1", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=nan..1", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=0ch..", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=1.5ch..", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=half", "`bound` should be PATTERN=LOW..HIGH"),
        ("layer1=0.8..0.5", "`bound` should have its lower end first"),
        ("layer[=0.5..1", "`bound` should begin with a regular expression"),
    ],
)
def test_text_that_is_no_bound_is_refused(text: str, message: str) -> None:
    """With examples of what to write."""
    with pytest.raises(PruningError, match=message):
        Bound.parse(text)


def test_bounds_of_python_are_those_of_the_command_line() -> None:
    """A text, a pair of shares, or one share."""
    texts = bound_texts({"stem": "16ch..", "layer1.*": (0.5, 1), "head": 0.5})

    assert texts == ("stem=16ch..", "layer1.*=0.5..1", "head=0.5")
    assert bound_texts(None) == ()


def test_bound_is_about_coupled_layers_too(toys: Toys) -> None:
    """A group goes by the path of any layer that makes its channels, as with `keep`."""
    graph = toys("residual").graph
    index = [group.name for group in graph.groups].index("stem")

    widths = WidthRules(bounds=(Bound.parse("outer=0.5..0.75"), Bound.parse("stem=5ch.."))).apply(graph)

    assert (widths.smallest[index], widths.largest[index]) == (5, 6)
    assert widths.largest.sum() == graph.sizes.sum() - 2


@pytest.mark.parametrize(
    ("bound", "message"),
    [("stm=0.5..1", "matches none of 3 groups"), ("11=0.5", r"matches only what is frozen \(11: .*output")],
)
def test_bound_that_matches_no_group_is_refused(toys: Toys, bound: str, message: str) -> None:
    """A typing error must not go unnoticed; `inspect` lists the names."""
    graph = toys("sequential").graph
    asked = WidthRules(bounds=(Bound.parse(bound),))

    with pytest.raises(PruningError, match=f"{message}.*prunegym inspect"):
        asked.apply(graph)
    assert (asked.apply(graph, strict=False).smallest == 1).all()


def test_rules_that_leave_no_width_are_refused_with_the_widths_there_are(toys: Toys) -> None:
    """Between 5 and 7 of 8 there is no multiple of 4."""
    graph = toys("sequential").graph

    with pytest.raises(
        PruningError,
        match=r"leave group 0 a width. Received align 4, bound '0=5ch..7ch', where 4, 8 of 8 channels can be kept",
    ):
        WidthRules(align=4, bounds=(Bound.parse("0=5ch..7ch"),)).apply(graph)


@pytest.mark.parametrize("name", ["align", "min_channels"])
def test_number_below_one_is_refused(name: str) -> None:
    """There is no such alignment, and no empty group."""
    with pytest.raises(PruningError, match=f"`{name}` should be at least 1. Received 0"):
        WidthRules(**{name: 0})
