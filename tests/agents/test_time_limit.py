"""The time limit: how it is written, when it stops work, and what it leaves."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from prunegym.agents.configuration.config import PretrainConfig
from prunegym.agents.configuration.time_limit import NO_LIMIT, TIME_UP, TimeLimit, TimeUp, seconds_of
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.commands import cli
from prunegym.commands.cli import main
from prunegym.pruning.errors import PruningError

#: Little of everything: the numbers do not matter.
FEW = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32", "--device", "cpu"]
NETWORK = ["--network", "digits_vgg"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("3600", 3600), ("45s", 45), ("90m", 5400), ("2h", 7200), ("1h30m", 5400), ("1.5H", 5400), ("1d", 86400)],
)
def test_duration_is_read_in_its_units(text: str, seconds: float) -> None:
    """Seconds where there is no unit."""
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "1h30", "2 h", "1m2h", "nan", "inf"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    """With examples of what is one."""
    with pytest.raises(PruningError, match=r"`--time-limit` should be a time above 0, such as 90m"):
        PretrainConfig(network="digits_vgg", time_limit=text)


def test_no_limit_is_never_reached() -> None:
    """Work without the flag goes on."""
    NO_LIMIT.check()

    assert math.isinf(PretrainConfig(network="digits_vgg").limit_seconds)


def test_limit_counts_from_the_start_of_the_program() -> None:
    """Not from when it is first looked at."""
    limit = TimeLimit(10, started=TimeLimit(0).end - 10)

    with pytest.raises(TimeUp):
        limit.check()


class After(TimeLimit):
    """A limit that is reached after so many looks at it."""

    looks: int

    def check(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            raise TimeUp


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """From the call on, commands stop after so many looks at the limit."""

    def stop(looks: int) -> None:
        monkeypatch.setattr(After, "looks", looks, raising=False)
        monkeypatch.setattr(cli, "TimeLimit", After)

    return stop


COMMANDS = {
    "pretrain": [*NETWORK, "--epochs", "2", "--device", "cpu"],
    "train": [*NETWORK, *FEW, "--evaluations", "8", "--update-evaluations", "2", "--imitation-steps", "1"],
    "evaluate": [*NETWORK, *FEW, "--searcher", "random", "--evaluations", "3"],
    "compare": [*NETWORK, *FEW, "--searcher", "random", "--evaluations", "3", "--repeats", "1"],
    "prune": [*NETWORK, *FEW, "--searcher", "random", "--evaluations", "3", "--epochs", "0"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_command_stops_in_time_and_goes_on(
    command: str, stopping: Callable[[int], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the exit code that is documented, the command that goes on, and what was finished on the disk."""
    arguments = [command, *COMMANDS[command], "--time-limit", "5h", "--out", str(tmp_path / "run")]
    stopping(1)

    assert main(arguments) == TIME_UP
    assert f"Continue with: prunegym {command}" in capsys.readouterr().err
    assert not (tmp_path / "run" / "result.json").exists()
    stopping(10**6)
    assert main([*arguments[:-4], *arguments[-2:]]) == 0
    assert RunFolder(tmp_path / "run").read_json("result.json")


@pytest.mark.slow
def test_training_on_several_devices_stops_in_time_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its processes look at the clock of the command."""
    training = ["--epochs", "3", "--device", "cpu", "--devices", "2"]
    arguments = ["pretrain", *NETWORK, *training, "--out", str(tmp_path / "run")]

    assert main([*arguments, "--time-limit", "1"]) == TIME_UP
    assert "Continue with: prunegym pretrain" in capsys.readouterr().err
    assert len(RunFolder(tmp_path / "run").read_rows("metrics.csv")) == 1
    assert main(arguments) == 0
    assert len(RunFolder(tmp_path / "run").read_rows("metrics.csv")) == 3
