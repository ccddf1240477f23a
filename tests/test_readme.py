"""The README is true: its Python runs, its tables are the rows', its commands and options exist as on every page."""

import csv
import importlib
import re
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType

import pytest

from prunegym.agents.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FLOWING = " ".join(README.split())
COMMAND = r"(?<![\w./`-])prunegym +([a-z]+) ([^#\n]*)"


def typed(page: str) -> list[tuple[str, str]]:
    """Commands that a page shows in blocks of code, with their arguments."""
    shown = "\n".join(re.findall(r"```(?:bash|console)\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", " ")
    return re.findall(COMMAND, shown)


FILES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in FILES}
SHOWING = sorted(name for name, text in PAGES.items() if typed(text))


def test_python_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader would paste gives a smaller network that loads again."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}

    exec(code, names)

    sizes = [sum(one.numel() for one in names[name].parameters()) for name in ("model", "smaller")]  # type: ignore[attr-defined]
    assert sizes[1] < sizes[0]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script that makes the README's tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("tables")


def test_tables_are_those_of_the_rows(tables: ModuleType) -> None:
    """Line by line, and there is no other table with figures."""
    made = [table() for table in tables.TABLES.values()]

    for table in made:
        assert table in README
    lines = [line for line in README.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert [line for line in lines if not any(line in table for table in made)] == []


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
        assert sentence in FLOWING


def test_price_of_the_agents_is_that_of_the_rows(tables: ModuleType) -> None:
    """Their evaluations, and what they reach on the reward images."""
    agents = {
        budget: [one for one in tables.read(name) if (one["searcher"], one["budget"]) == ("agent", budget)]
        for name, budget in (("post_training_confirmed", "macs:0.5"), ("post_training", "macs:0.35"))
    }
    (half, third) = (sorted({int(one["evaluations"]) for one in some}) for some in agents.values())
    reward = tables.with_range(float(one["reward_score"]) for one in agents["macs:0.5"])

    spent = f"spent {half[0]} or {half[-1]} evaluations (plans scored) at 50 % and {third[0]} to {third[-1]} at 35 %"
    assert spent in FLOWING
    assert f"the agents at 50 % reach {reward} and the knapsack 77.2" in FLOWING


def test_depth_is_that_of_the_rows(tables: ModuleType) -> None:
    """How many blocks went, and what was left."""
    rows = tables.read("depth")
    found = [one for one in rows if one["searcher"] == "dcpa"]
    gone = [len(one["blocks_left_out"].split()) for one in found]
    scores = [100 * float(one["selection_score"]) for one in found]
    (knapsack,) = {f"{100 * float(one['selection_score']):.1f}" for one in rows if one["searcher"] == "knapsack"}

    assert f"25 blocks at 35 % MACs it leaves out {gone[0]}, {gone[1]} and {gone[2]} (three seeds)" in FLOWING
    assert f"{min(scores):.1f} to {max(scores):.1f} without training, below the knapsack's {knapsack}" in FLOWING


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
        assert sentence in FLOWING


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
        assert sentence in FLOWING


def test_time_of_the_agent_is_that_of_the_rows() -> None:
    """Seconds of an agent's search over those of CMA-ES, in the same grid."""
    ratios = []
    for grid in ("resnet56_35", "vgg16_half_20"):
        with (ROOT / "benchmarks" / "results" / f"compare_{grid}" / "rows_timing.csv").open(newline="") as file:
            seconds = {one["searcher"]: float(one["seconds"]) for one in csv.DictReader(file) if one["seed"] == "0"}
        ratios.append(f"{seconds['agent'] / seconds['cmaes']:.1f}")

    assert f"took {' and '.join(ratios)} times the seconds of CMA-ES" in FLOWING


def test_worth_of_a_search_with_fine_tuning_is_that_of_the_rows() -> None:
    """What each ends at after fine-tuning, and what it was allowed."""
    folder = ROOT / "benchmarks" / "results" / "compare_resnet20_35_finetuned"
    with (folder / "rows.csv").open(newline="") as file:
        rows = {one["searcher"]: one for one in csv.DictReader(file)}
    ends = {name: f"{100 * float(one['after_finetuning_score']):.1f}" for name, one in rows.items()}
    spent = {name: one["evaluations"] for name, one in rows.items()}

    assert {one["seed"] for one in rows.values()} == {"0"}  # the README says one seed
    assert (
        f"uniform ends at {ends['uniform']}, the knapsack, which needs none, at {ends['knapsack']}, an agent after "
        f"{spent['agent']} evaluations at {ends['agent']} and CMA-ES after {spent['cmaes']} at "
        f"{ends['cmaes']} (one seed"
    ) in FLOWING


def test_pages_that_show_commands_are_known() -> None:
    """The test below is worth what it sees; a command is seen in a variable and behind a prompt too."""
    assert {"README.md", "docs/tutorial.md", "docs/long_work.md"} <= set(SHOWING)
    assert {command for command, _ in typed(PAGES["README.md"])} >= {"inspect", "train", "compare", "export", "report"}
    assert len(typed(PAGES["docs/long_work.md"])) == 3


@pytest.mark.parametrize("page", SHOWING)
def test_every_flag_that_is_shown_is_a_flag(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No option is shown that the command does not take, nor one that is cut short."""
    unknown = []
    for command, rest in typed(PAGES[page]):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
        unknown += [f"{command} {flag}" for flag in re.findall(r"--[\w-]+", rest) if flag not in flags]

    assert unknown == []
