"""Pictures of the report: what they show, and that they can live on one page."""

import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from prunegym.agents.inspect import inspect_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.reporting import charts, graph_chart, network_charts
from prunegym.reporting.charts import Marks, pareto_front
from prunegym.reporting.graph_chart import Column, layers_between
from prunegym.reporting.network_charts import short_names, shorten
from prunegym.reporting.pictures import COLOURS, INK, new_figure, one_look
from prunegym.reporting.svg import Gallery, inline_svg

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    """All text of a picture, which also has to be well-formed."""
    root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1))
    return ["".join(one.itertext()) for one in root.iter(f"{SVG}text")]


def drawn(draw: Callable[[], Figure]) -> list[str]:
    """Text of a figure."""
    return texts(Gallery().add("picture", draw, "A picture.").svg)


def line(label: str) -> Figure:
    """A line with a legend."""
    figure = new_figure(3, 2)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=COLOURS[0], label=label, marker="o")
    axes.legend()
    return figure


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_front_holds_what_no_other_beats(points: list[tuple[float, float]]) -> None:
    """Against brute force."""
    expected = {
        (cost, score)
        for cost, score in points
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    }

    assert pareto_front(points) == sorted(expected)


def test_layers_between_groups_are_those_that_read_one_and_make_another(
    toys: Callable[[str], PrunableNetwork],
) -> None:
    """By hand: what a layer of the network with three shortcuts reads and makes."""
    groups = inspect_network(toys("residual")).to_json()["groups"]
    names = [group["name"] for group in groups]

    found = {(names[a], names[b]): layers for (a, b), layers in layers_between(groups).items()}
    assert found[("stem", "inner")] == ["inner"]
    assert found[("inner", "stem")] == ["outer"]
    assert set(found[("stem", "down")]) == {"down", "project"}


def test_layer_that_keeps_its_channels_is_no_edge(toys: Callable[[str], PrunableNetwork]) -> None:
    """A depthwise convolution reads and makes one group."""
    edges = layers_between(inspect_network(toys("mobile")).to_json()["groups"])

    assert edges
    assert all("depthwise" not in layers for layers in edges.values())
    assert all(a != b for a, b in edges)


def test_text_stays_text_and_is_escaped() -> None:
    """It can be searched and copied, and says what it said."""
    label = 'a$b_c$ <b> & "d"'

    assert label in drawn(lambda: line(label))


def test_pictures_of_one_page_share_no_identifier() -> None:
    """A clip path or a marker of one must not be taken for that of another; references lead to what is there."""
    gallery = Gallery()
    first, second = (gallery.add("same", lambda: line("x"), "The same.").svg for _ in range(2))

    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', first)) <= {
        pair for one in ids[0] for pair in ((one, ""), ("", one))
    }


def test_names_of_pictures_are_numbered() -> None:
    """They are names of files too."""
    gallery = Gallery()
    for _ in range(3):
        gallery.add("net/macs:0.5", lambda: line("x"), "")

    assert [one.name for one in gallery.pictures] == ["net-macs-0.5", "net-macs-0.5-2", "net-macs-0.5-3"]


def test_colours_are_those_of_the_page() -> None:
    """So that a dark page has light text; nothing is loaded, and no style leaks."""
    svg = Gallery().add("picture", lambda: line("x"), 'a "picture" <of> & more').svg

    assert "var(--ink)" in svg
    assert "var(--series-0)" in svg
    assert INK not in svg.lower()
    assert "<style" not in svg
    assert "http" not in svg
    assert 'aria-label="a &quot;picture&quot; &lt;of> &amp; more"' in svg


def test_pictures_are_saved_as_png_and_svg(tmp_path: Path) -> None:
    """With their own colours: a file has no page around it."""
    Gallery(tmp_path / "pictures").add("net macs:0.5", lambda: line("x"), "A line.")

    assert (tmp_path / "pictures" / "net-macs-0.5.png").read_bytes().startswith(b"\x89PNG")
    saved = (tmp_path / "pictures" / "net-macs-0.5.svg").read_text()
    assert COLOURS[0].lower() in saved.lower()
    assert "var(" not in saved


def test_folder_of_pictures_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Before anything is drawn."""
    (tmp_path / "file").write_text("")

    with pytest.raises(PruningError, match="`--pictures` should be a place that can be written to"):
        Gallery(tmp_path / "file")


def test_prefix_that_is_no_name_is_refused() -> None:
    """It becomes part of identifiers."""
    with one_look(), pytest.raises(PruningError, match="`prefix` should be letters"):
        inline_svg(line("x"), '"', "")


def test_searchers_keep_their_mark_and_share_it_with_nobody() -> None:
    """In all charts of a page, whatever the order."""
    names = ["uniform", "policy", "tpe", "random", "knapsack", "agent", "best sampled", "cmaes", "amc", "legr"]
    marks, again = Marks(names), Marks(names[::-1])

    assert len({(marks.colour(name), marks.marker(name)) for name in names}) == len(names)
    assert all(marks.colour(name) == again.colour(name) for name in names)


def test_kept_channels_are_told_in_numbers() -> None:
    """Of the plan that is named first."""
    plans = {"policy": {"conv": 3, "fc": 7}, "uniform": {"conv": 4, "fc": 5}}

    found = drawn(lambda: network_charts.kept_channels({"conv": 8, "fc": 10}, plans, Marks(list(plans))))
    assert {"3 of 8", "7 of 10", "conv", "fc", "policy", "uniform"} <= set(found)


def test_graph_names_every_group_and_its_figures() -> None:
    """With attention on both sides."""
    even = np.full((2, 2), 0.5)
    columns = [Column("kept", [0.5, 1.0], ["4 of 8", "8 of 8"])]

    found = drawn(lambda: graph_chart.channel_graph(["a", "b"], {(0, 1): ["x"]}, columns, links=even, between=even))
    assert {"a", "b", "4 of 8", "8 of 8", "kept", "looks at", "layers between"} <= set(found)


def test_graph_of_one_group_can_be_drawn() -> None:
    """Nothing is between it and others."""
    one = np.ones((1, 1))

    assert "only" in drawn(lambda: graph_chart.channel_graph(["only"], {}, [], links=one, between=one))


def test_attention_matrix_names_all_tokens() -> None:
    """The network as a whole is one of them."""
    found = drawn(lambda: graph_chart.attention_matrix(["a", "b"], np.full((3, 3), 1 / 3)))

    assert [f"{graph_chart.GLOBAL}  0", "a  1", "b  2"] == [one for one in found if re.search(r"  \d$", one)]


def test_times_are_summed_over_kinds() -> None:
    """The rest of many kinds is one."""
    kinds = {f"kind {index}": 0.001 for index in range(8)}
    profile = {"kinds": kinds, "modules": []}

    found = drawn(lambda: network_charts.time_by_kind(profile, profile))
    assert "other" in found
    assert sum("8 ms" in one for one in found) == 2


def test_slowest_modules_come_first() -> None:
    """By what they took before; what is gone takes nothing."""
    before = [{"module": "fast", "seconds": 1e-3}, {"module": "slow", "seconds": 2e-3}]

    found = drawn(lambda: network_charts.slowest_layers({"modules": before}, {"modules": before[:1]}))
    assert found.index("slow") < found.index("fast")


def test_learning_curve_shows_both_plans_and_references() -> None:
    """Seeds lie over each other under one label."""
    rows = [{"evaluations": n, "score_mean": 0.4, "best": 0.6, "own": 0.5} for n in (10, 20)]
    trainings = [charts.Training(network="n", budget="b", seed=seed, metrics=rows) for seed in range(2)]

    found = drawn(lambda: charts.learning_curve(trainings, {"uniform": 0.3}))
    assert found.count("the policy's own plan") == found.count("best sampled plan") == found.count("uniform") == 1


def test_long_names_are_shortened_in_the_middle() -> None:
    """Beginning and end tell module paths apart."""
    assert shorten("layer1.0.conv1") == "layer1.0.conv1"
    assert shorten("features.denseblock1.denselayer12.conv2", 20) == "featur…layer12.conv2"
    assert len(shorten("x" * 100)) == network_charts.LONGEST_NAME


def test_long_names_lose_the_path_they_have_in_common() -> None:
    """Short ones stay whole."""
    names = ["encoder.layers.block_0.attention.projection", "encoder.layers.block_1.mlp.linear.weights", "head"]

    assert short_names(names) == ["…block_0.attention.projection", "…block_1.mlp.linear.weights", "head"]
