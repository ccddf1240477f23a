"""Figures in the README and among the results are those of the rows: every table, and what sentences say of them."""

import csv
import importlib
import inspect
import re
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

import pytest

from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.pruning.scoring import QUICK_EXAMPLES, ScorerSettings

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")}
FRONT, RESULTS = (" ".join(page.split()) for page in PAGES.values())


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script that makes the README's tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("tables")


def test_tables_are_those_of_the_rows(tables: ModuleType) -> None:
    """Each is in its place, each has one, and there is no other table with figures."""
    made = {name: table() for name, table in tables.TABLES.items()}
    places = [name for page in PAGES.values() for name in re.findall(tables.PLACE, page)]
    lines = [line for page in PAGES.values() for line in page.splitlines() if re.match(r"\|.*\d", line)]

    assert sorted(places) == sorted(made)
    for page in PAGES.values():
        assert tables.filled(page, made) == page  # else: python benchmarks/tables.py --write
    assert [line for line in lines if not any(line in table for table in made.values())] == []


def test_table_is_put_in_its_place(tables: ModuleType) -> None:
    """Instead of an older one, or where there was none; what stands around it stays."""
    page = "before\n\n<!-- table: a -->\n\n| 1 |\n| 2 |\n\nbetween\n\n<!-- table: b -->\n\nafter\n"

    filled = tables.filled(page, {"a": "| 3 |", "b": "| 4 |\n| 5 |"})

    assert filled == ("before\n\n<!-- table: a -->\n\n| 3 |\n\nbetween\n\n<!-- table: b -->\n\n| 4 |\n| 5 |\n\nafter\n")
    with pytest.raises(KeyError, match="b"):
        tables.filled(page, {"a": "| 3 |"})


def test_speed_is_that_of_the_rows(tables: ModuleType) -> None:
    """What an evaluation, a training and a pass of the policy cost."""
    rows = {(one["what"], one["network"]): one for one in tables.read("speed")}
    two, other = rows["evaluation", "cifar_resnet20"], rows["evaluation", "cifar_resnet20_conv"]
    networks = ("cifar_resnet20", "cifar_resnet56")
    shares = [rows[f"share, {rounds} rounds", name] for name in networks for rounds in (1, 3)]
    one, three, large, largest = (f"{100 * float(row['share']):.0f} %" for row in shares)
    spent = [int(row["evaluations"]) for row in shares]
    passes = [
        f"{1e3 * float(rows['policy', network]['policy_seconds']):.0f} ms and "
        f"{float(rows['policy', network]['memory_mib']):.0f} MiB on {name} ({rows['policy', network]['groups']} groups)"
        for network, name in (("resnet50", "torchvision's ResNet-50"), ("vgg19", "VGG-19"))
    ]

    for sentence in (
        f"costs {100 * float(two['overhead']):.0f} % more than the forward passes alone",
        f"(ResNet-20; {100 * float(other['overhead']):.0f} % with 1×1 shortcuts)",
        f"It is {float(other['times_faster']):.1f} times as fast as a deep copy pruned by torch_pruning",
        f"medians of {two['repeats']} turns side by side",
        f"take {one} of a training run's time on ResNet-20 in one round and {three} in three, {large} on ResNet-56 in "
        f"one and {largest} in three (one run each of {min(spent)} to {max(spent)} evaluations",
        f"takes {', '.join(passes)}",
    ):
        assert sentence in RESULTS


def test_price_of_the_agents_is_that_of_the_rows(tables: ModuleType) -> None:
    """Their evaluations, and what they reach on the reward images."""
    agents = {
        budget: [one for one in tables.read(name) if (one["searcher"], one["budget"]) == ("agent", budget)]
        for name, budget in (("post_training_confirmed", "macs:0.5"), ("post_training", "macs:0.35"))
    }
    (half, third) = (sorted({int(one["evaluations"]) for one in some}) for some in agents.values())
    reward = tables.with_range(float(one["reward_score"]) for one in agents["macs:0.5"])

    spent = f"spent {half[0]} or {half[-1]} evaluations (plans scored) at 50 % and {third[0]} to {third[-1]} at 35 %"
    assert spent in RESULTS
    assert f"the agents at 50 % reach {reward} and the knapsack 77.2" in RESULTS


def test_depth_is_that_of_the_rows(tables: ModuleType) -> None:
    """How many blocks went, and what was left."""
    rows = tables.read("depth")
    found = [one for one in rows if one["searcher"] == "dcpa"]
    gone = [len(one["blocks_left_out"].split()) for one in found]
    scores = [100 * float(one["selection_score"]) for one in found]
    (knapsack,) = {f"{100 * float(one['selection_score']):.1f}" for one in rows if one["searcher"] == "knapsack"}

    assert f"25 blocks at 35 % MACs it leaves out {gone[0]}, {gone[1]} and {gone[2]} (three seeds)" in RESULTS
    assert f"{min(scores):.1f} to {max(scores):.1f} without training, below the knapsack's {knapsack}" in RESULTS


def ends_of(tables: ModuleType, network: str) -> dict[str, list[float]]:
    """What allocations end at, in percent, by name."""
    ends: dict[str, list[float]] = {}
    for one in tables.read("proxy"):
        if (one["network"], one["measure"]) == (network, "finetuned"):
            ends.setdefault(one["allocation"], []).append(100 * float(one["score"]))
    return ends


def test_proxies_of_the_resnet_are_those_of_the_rows(tables: ModuleType) -> None:
    """Spread, noise, and what uniform and the knapsack end at."""
    study, ends = tables.study_of("cifar_resnet20"), ends_of(tables, "cifar_resnet20")
    target = sorted(100 * study.target, reverse=True)
    uniform, knapsack = (fmean(ends[name]) for name in ("uniform", "knapsack"))

    for sentence in (
        f"{len(target)} allocations of ResNet-20 at 35 % MACs",
        f"ResNet-20 ends at {target[-1]:.1f} to {target[0]:.1f} %, with a standard deviation of {stdev(target):.1f}",
        f"between seeds of one allocation it is {100 * study.noise:.1f}. Uniform ends at {uniform:.1f} (mean of "
        f"{len(ends['uniform'])} seeds)",
        f"at {knapsack:.1f}: the best of all, {target[0] - target[1]:.1f} points above the next",
    ):
        assert sentence in RESULTS


def test_proxies_of_the_plain_network_are_those_of_the_rows(tables: ModuleType) -> None:
    """The same, and what training steps add to the rank of a score."""
    study, ends = tables.study_of("cifar_vgg16_half"), ends_of(tables, "cifar_vgg16_half")
    target = sorted(100 * study.target, reverse=True)
    uniform, knapsack = (fmean(ends[name]) for name in ("uniform", "knapsack"))
    taus = {row["proxy"]: row for row in tables.tau_rows(study)}
    gains = [taus[f"accuracy, after {steps} training steps"] for steps in (20, 100)]
    (few, many) = (f"{row['gain']:.2f} ({row['gain_low']:.2f} to {row['gain_high']:.2f}" for row in gains)
    accuracies = [row["top_tau"] for name, row in taus.items() if name.startswith("accuracy") and "right" not in name]
    halfway = {
        one["measure"]: f"{100 * float(one['score']):.1f}"
        for one in tables.read("proxy")
        if (one["network"], one["allocation"]) == ("cifar_vgg16_half", "halfway to the knapsack")
    }

    for sentence in (
        f"and {len(target)} of half-width VGG-16 at 15 %",
        f"VGG-16 ends at {target[-1]:.1f} to {target[0]:.1f} %, with a standard deviation of {stdev(target):.1f}",
        f"between seeds of one allocation it is {100 * study.noise:.1f}. Uniform ends at {uniform:.1f} (mean of "
        f"{len(ends['uniform'])} seeds), {target[0] - uniform:.1f} points below the best of all; the knapsack at "
        f"{knapsack:.1f}",
        f"20 steps add {few.replace(' (', ' to its tau (')}, paired) and 100 add {many})",
        f"has {halfway['compensated']} after recovery, {halfway['steps 20']} after 20 steps, {halfway['finetuned']} in",
        f"which end within {target[0] - target[len(target) // 2 - 1]:.1f} points of each other, no accuracy ranks well "
        f"({min(accuracies):.2f} to {max(accuracies):.2f})",
    ):
        assert sentence in RESULTS


def rows_of(grid: str, file: str = "rows.csv") -> dict[str, list[dict[str, str]]]:
    """Rows of a comparison by searcher, one for each seed."""
    found: dict[str, list[dict[str, str]]] = {}
    with (ROOT / "benchmarks" / "results" / f"compare_{grid}" / file).open(newline="") as lines:
        for row in csv.DictReader(lines):
            found.setdefault(row["searcher"], []).append(row)
    return found


PAIRS = ("resnet20_50", "resnet20_35", "resnet56_35", "vgg16_half_20")


def means_of(grid: str, column: str = "after_recovery_score") -> dict[str, float]:
    """Mean over seeds by searcher, in percent."""
    return {name: fmean(100 * float(one[column]) for one in found) for name, found in rows_of(grid).items()}


def leads(grids: list[dict[str, float]], name: str) -> int:
    """On how many pairs a searcher is first, ablations of the agent apart."""
    return sum(max((one for one in means if ":" not in one), key=lambda one: means[one]) == name for means in grids)


def test_place_of_the_agent_is_that_of_the_rows() -> None:
    """At equal evaluations, on the selection split and on test, and how near CMA-ES comes from the same start."""
    selection = [means_of(grid) for grid in PAIRS]
    test = [means_of(grid, "test_after_recovery_score") for grid in PAIRS]
    behind = [one["agent"] - one["cmaes_prior"] for one in selection]
    gain = [one["agent"] - one["prior"] for one in test]

    off = [abs(one["agent"] - max(one["cmaes"], one["cmaes_prior"])) for one in (*selection, *test)]
    overall = {name: fmean(one[name] for one in test) for name in selection[1]}

    assert f"first on {leads(selection, 'agent')} of the 4, on test" in RESULTS
    nearest = f"is on no pair further than {max(off):.1f} points from the better of the two CMA-ES, on either split"
    assert f"on {leads(test, 'agent')}, and {nearest}" in RESULTS
    best, second = sorted(overall, key=lambda name: -overall[name])[:2]
    lead = f"the agent has the best mean, {overall[best] - overall[second]:.1f} points above the next"
    assert best == "agent"
    assert f"{lead}, and on no pair is it further than {max(off):.1f} points from the better CMA-ES" in FRONT
    assert len(selection[1]) - len({"agent", "shuffled", "mean", "cmaes_prior"}) == 17
    assert f"{fmean(behind):.1f} points behind on average, {behind[1]:.1f} on ResNet-20 at 35 % and less" in RESULTS
    assert max(abs(behind[index]) for index in (0, 2, 3)) < 0.5  # "less than half a point from it elsewhere"
    assert (
        f"on test {gain[0]:.1f} points above `prior` at 50 % and {min(gain[1:]):.1f} to {max(gain[1:]):.1f} at" in FRONT
    )
    less = fmean(one["agent"] - one["cmaes_prior"] for one in test)
    assert f"gets most of that, {less:.1f} points less on average" in FRONT


def test_place_at_equal_seconds_is_that_of_the_rows(tables: ModuleType) -> None:
    """CMA-ES from the agent's start is ahead of it on most pairs."""
    rows = [line.strip("| ").split(" | ") for line in tables.equal_seconds().splitlines()[2:]]
    scores = {name: [float(one.split()[0]) for one in cells] for name, *cells in rows if "no plan yet" not in cells}
    ahead = sum(one > agent for one, agent in zip(scores["cmaes_prior"], scores["**agent**"], strict=True))
    first = sum(max(cells) == cells[0] for cells in zip(scores["cmaes_prior"], *scores.values(), strict=True))

    assert f"ahead at equal seconds on {ahead} of the 4 pairs" in RESULTS
    assert f"At equal seconds *cmaes_prior* leads on {first} of the 4" in FRONT


def test_time_of_the_agent_is_that_of_the_rows() -> None:
    """Seconds of an agent's searches over those of CMA-ES, in the same grid."""
    ratios = []
    for grid in ("resnet56_35", "vgg16_half_20"):
        found = rows_of(grid, "rows_timing.csv")
        agent, cmaes = (sum(float(one["seconds"]) for one in found[name]) for name in ("agent", "cmaes"))
        ratios.append(f"{agent / cmaes:.1f}")

    same = sorted(float(one["seconds"]) for one in rows_of("resnet20_35", "rows_timing.csv")["cmaes"])

    assert f"took {' and '.join(ratios)} times the seconds of CMA-ES" in RESULTS
    assert f"CMA-ES took {same[0]:.0f} to {same[-1]:.0f} s for the same evaluations on ResNet-20 at 35 %" in RESULTS


def test_gain_of_rounds_is_that_of_the_rows(tables: ModuleType) -> None:
    """What rounds give before and after learning, in the table of the agent against its start."""
    means = {
        name: fmean(100 * float(one["selection_score"]) for one in tables.read("post_training")
                    if (one["searcher"], one["budget"]) == (name, "macs:0.35"))
        for name in ("untrained agent", "knapsack", "agent")
    }  # fmt: skip
    before, start, learned = (f"{value:.1f}" for value in means.values())

    assert f"gave {before} where the knapsack has {start}, and learning {learned} (below)" in RESULTS


def test_price_of_looks_is_that_of_the_defaults() -> None:
    """By the images that run, as searches pay for training steps: two forwards for one backwards."""
    settings = ScorerSettings()
    examples = inspect.signature(ChannelPruningEnv).parameters["round_examples"].default
    look, evaluation = QUICK_EXAMPLES + 3 * examples, settings.recovery_examples + settings.examples

    price = f"passes of {look} images each, backward ones counted twice, where an evaluation is {evaluation:,}"
    assert price in RESULTS


def test_luck_with_the_reward_images_is_that_of_the_rows() -> None:
    """How much higher the best come on them than on the selection split."""
    found = rows_of("resnet20_50")
    gaps = {
        name: fmean(100 * (float(one["reward_score"]) - float(one["after_recovery_score"])) for one in found[name])
        for name in ("agent", "cmaes")
    }
    spent = sorted(int(one["evaluations"]) for one in found["agent"])

    assert f"The agent's plan scores {gaps['agent']:.1f} points higher on the 1,000 reward images" in RESULTS
    assert f"(CMA-ES's {gaps['cmaes']:.1f})" in RESULTS
    assert f"Mean of {len(spent)} seeds" in RESULTS
    assert f"the agent {spent[0]} to {spent[-1]};" in RESULTS


def test_worth_of_a_search_with_fine_tuning_is_that_of_the_rows(tables: ModuleType) -> None:
    """What each ends at after fine-tuning, by how many seeds, and what `prior` is."""
    both = ("resnet20_35_finetuned", "vgg16_half_15_finetuned")
    plain, chain = (means_of(grid, "after_finetuning_score") for grid in both)
    seeds = [len(rows_of(grid)["agent"]) for grid in both]
    noise = [100 * tables.study_of(network).noise for network in ("cifar_resnet20", "cifar_vgg16_half")]
    tested = means_of(both[1], "test_after_finetuning_score")
    ends = [{name: f"{value:.1f}" for name, value in means.items()} for means in (plain, chain)]

    assert (plain["prior"], chain["prior"]) == (plain["knapsack"], chain["uniform"])
    for sentence in (
        f"it ends at {ends[0]['prior']} on ResNet-20 at 35 % (there it is the knapsack; uniform {ends[0]['uniform']}, "
        f"an agent {ends[0]['agent']}, CMA-ES {ends[0]['cmaes']}; mean of {seeds[0]} seeds)",
        f"at {ends[1]['prior']} on VGG-16/2 at 15 % (there it is uniform; the knapsack {ends[1]['knapsack']}, an agent "
        f"{ends[1]['agent']}, CMA-ES {ends[1]['cmaes']}; mean of {seeds[1]} seeds)",
        f"the standard deviation is {noise[0]:.1f} and {noise[1]:.1f}",
    ):
        assert sentence in FRONT
    assert max(plain, key=lambda name: plain[name]) in ("knapsack", "prior")
    gain, on_test = chain["agent"] - chain["uniform"], tested["agent"] - tested["uniform"]
    assert f"the agent ends {gain:.1f} above uniform, {on_test:.1f} on test, which is about the noise" in RESULTS


def test_unpruned_networks_are_those_of_the_rows(tables: ModuleType) -> None:
    """What pruning starts from."""
    rows = tables.read("unpruned")
    test, selection = (
        [f"{100 * float(one[split]):.1f}" for one in rows] for split in ("test_score", "selection_score")
    )

    assert "Unpruned they have {}, {} and {} on test".format(*test) in RESULTS
    assert "and {}, {} and {} on the selection split".format(*selection) in RESULTS


def test_latency_of_agents_is_that_of_the_rows(tables: ModuleType) -> None:
    """How far what was asked for was from what was measured in the end."""
    asked, measured = (
        {one["seed"]: one for one in tables.read("latency_agents") if one["agent"] == name}
        for name in ("latency", "macs")
    )
    off = max(
        abs(100 * float(one["asked"].removeprefix("latency:")) - 100 * float(measured[seed]["latency_share"]))
        for seed, one in asked.items()
    )

    assert f"differed from that by up to {off:.1f} points" in RESULTS


def test_front_page_says_what_the_rows_say(tables: ModuleType) -> None:
    """In short what stands among the results."""
    speed = {(one["what"], one["network"]): one for one in tables.read("speed")}
    two, other = speed["evaluation", "cifar_resnet20"], speed["evaluation", "cifar_resnet20_conv"]
    latency = tables.read("latency")
    errors = sorted(f"{100 * float(one['median_error']):.1f}" for one in latency if one["what"] == "table")
    off = max(abs(100 * float(one["off_budget"])) for one in latency if one["what"] == "budget")
    policy, uniform = ({name: 100 * float(value) for name, value in one.items() if name.startswith("after_")}
                       for one in tables.read("finetune"))  # fmt: skip
    agents = tables.read("latency_agents")
    kept = [100 * float(one["latency_share"]) for one in agents if one["agent"] == "macs"]
    gains = [100 * float(one["test_gain"]) for one in agents if one["agent"] == "latency"]

    for sentence in (
        f"costs {100 * float(two['overhead']):.0f} % more than the forward passes alone (ResNet-20), and is "
        f"{float(other['times_faster']):.1f} times as fast as a deep copy pruned by torch_pruning",
        f"not learned from to {' to '.join(errors)} % (median), and exported files keep a budget of half the "
        f"latency to within {off:.0f} %",
        f"{policy['after_recovery'] - uniform['after_recovery']:.1f} points after recovery became "
        f"{policy['after_finetuning'] - uniform['after_finetuning']:.1f} (ResNet-20, 10 epochs, one seed)",
        f"half the MACs leave {min(kept):.0f} to {max(kept):.0f} % of the latency, agents with about that latency as "
        f"their budget are {min(gains):.1f} to {max(gains):.1f} points better on test",
    ):
        assert sentence in FRONT
