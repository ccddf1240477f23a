"""Commands that are killed, or run out of disk, go on to the same bytes as without it.

The processes are real and so are the signals. They are forked from one that has imported everything, because importing
takes longer than these runs.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from prunegym.agents.configuration.time_limit import TIME_UP
from prunegym.agents.evaluations.store import STORE, read_evaluations
from prunegym.commands.cli import REFUSED

#: Runs a command for each line of arguments it reads, in a process of its own, and says how it ended.
NURSERY = """
import json, os, resource, signal, sys, time
from prunegym.commands import agent_commands, cli, network_commands
from prunegym.experiments.comparison import command
from prunegym.experiments.deployment import commands
import torch
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    arguments, kill_after, largest_file, log = json.loads(line)
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if largest_file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        code = 1
        try:
            code = cli.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended = 0
    while not ended:
        # time on the processor, which does not depend on what else the machine does
        with open(f"/proc/{child}/stat") as file:
            used = sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        if kill_after is not None and used > kill_after:
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    print(os.waitstatus_to_exitcode(status), used, flush=True)
"""

#: Little of everything: the numbers do not matter.
FEW = ["--statistics-examples", "32", "--recovery-examples", "32", "--reward-examples", "64", "--device", "cpu"]
AGENT = ["--update-evaluations", "4", "--imitation-steps", "4", "--ppo-epochs", "2", "--rounds", "2"]
NETWORK = ["--network", "digits_vgg"]
COMMANDS = {
    "train": ["train", *NETWORK, *FEW, *AGENT, "--evaluations", "64"],  # enough for a second look
    "compare": [
        *("compare", *NETWORK, *FEW, *AGENT, "--evaluations", "20", "--repeats", "2", "--finetune-repeats", "1"),
        *("--searcher", "uniform", "--searcher", "evolution", "--searcher", "agent", "--epochs", "2"),
    ],
    "prune": ["prune", *NETWORK, *FEW, "--searcher", "evolution", "--evaluations", "40", "--epochs", "6"],
    "evaluate": ["evaluate", *NETWORK, *FEW, "--searcher", "random", "--searcher", "evolution", "--evaluations", "30"],
    "pretrain": ["pretrain", *NETWORK, "--epochs", "8", "--device", "cpu"],
    "finetune": ["finetune", *NETWORK, "--epochs", "8", "--device", "cpu"],
}
#: What is the same for the same seed: metrics, rows, plans, policies and networks.
SAME = ("metrics.csv", "rows.csv", "plan*.json", "attention.json", "scores.json", "*.safetensors")


class Nursery:
    """Starts commands quickly."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.seconds = 0.0
        """Of the last command, on the processor, without those of its workers."""
        one_thread = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
        self.process = subprocess.Popen(
            [sys.executable, "-Wignore", "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **one_thread},
        )

    def run(self, arguments: Sequence[str], *, kill_after: float | None = None, largest_file: int = 0) -> int:
        """Run a command to its end.

        Args:
            arguments: Of the command.
            kill_after: Seconds on the processor until it gets SIGKILL.
            largest_file: Bytes that a file may have; 0 for any.

        Returns:
            Its exit code, or minus the signal that ended it.
        """
        assert self.process.stdin is not None
        line = json.dumps([list(arguments), kill_after, largest_file, str(self.log)])
        print(line, file=self.process.stdin, flush=True)
        code, seconds = self.read_line().split()
        self.seconds = float(seconds)
        return int(code)

    def read_line(self) -> str:
        """What the process says next."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """One for all tests of this file."""
    started = Nursery(tmp_path_factory.mktemp("log") / "output.txt")
    assert started.read_line() == "ready\n"
    yield started
    started.close()


def same_files(folder: Path) -> dict[str, bytes]:
    """What should not differ between two runs."""
    found = {path.relative_to(folder).as_posix(): path for pattern in SAME for path in folder.rglob(pattern)}
    return {name: path.read_bytes() for name, path in sorted(found.items())}


def moments(seconds: float, count: int) -> list[float]:
    """Random moments spread over a run, one in each part of it."""
    parts = np.random.default_rng(0).random(count) + np.arange(count)
    return (parts / count * seconds).tolist()


def uninterrupted(nursery: Nursery, command: str, folder: Path, *more: str) -> tuple[dict[str, bytes], float]:
    """What a run leaves that nobody disturbs, and its seconds on the processor."""
    assert nursery.run([*COMMANDS[command], *more, "--out", str(folder)]) == 0, nursery.log.read_text()
    return same_files(folder), nursery.seconds


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_command_killed_at_five_moments_ends_as_if_it_had_not_been(
    nursery: Nursery, command: str, tmp_path: Path
) -> None:
    """Metrics, rows, plans, policies and networks, byte by byte; each run is killed once and continued."""
    whole, seconds = uninterrupted(nursery, command, tmp_path / "whole")
    assert any(name.endswith(("metrics.csv", "rows.csv")) for name in whole)
    if command == "train":
        rows = read_evaluations(tmp_path / "whole" / STORE)
        assert 128 in {row["examples"] for row in rows}  # it looks again
    killed = 0
    for number, moment in enumerate(moments(seconds, 5)):
        arguments = [*COMMANDS[command], "--out", str(tmp_path / str(number))]
        killed += nursery.run(arguments, kill_after=moment) == -signal.SIGKILL

        assert nursery.run(arguments) == 0, nursery.log.read_text()
        assert same_files(tmp_path / str(number)) == whole
        assert not list((tmp_path / str(number)).rglob(".*"))
    assert killed >= 4  # the last moment may come too late


@pytest.mark.slow
def test_training_on_two_workers_that_is_killed_goes_on_to_the_same_bytes(nursery: Nursery, tmp_path: Path) -> None:
    """At two moments; scores of worker processes are in no store, so an update that was cut is made again."""
    more = ["--workers", "2", "--evaluations", "30"]
    whole, seconds = uninterrupted(nursery, "train", tmp_path / "whole", *more)

    for number, moment in enumerate(moments(seconds, 2)):
        arguments = [*COMMANDS["train"], *more, "--out", str(tmp_path / str(number))]
        assert nursery.run(arguments, kill_after=moment) == -signal.SIGKILL
        assert nursery.run(arguments) == 0, nursery.log.read_text()
        assert same_files(tmp_path / str(number)) == whole


@pytest.mark.slow
def test_transfer_that_is_killed_goes_on_to_the_same_bytes(nursery: Nursery, tmp_path: Path) -> None:
    """At three moments: rows and adapted policies."""
    uninterrupted(nursery, "train", tmp_path / "source")
    policy = ["--policy", str(tmp_path / "source" / "policy.safetensors")]
    arguments = ["transfer", *NETWORK, *FEW, *AGENT[:-2], *policy, "--evaluations", "20", "--out"]
    assert nursery.run([*arguments, str(tmp_path / "whole")]) == 0, nursery.log.read_text()
    seconds = nursery.seconds

    for number, moment in enumerate(moments(seconds, 3)):
        nursery.run([*arguments, str(tmp_path / str(number))], kill_after=moment)
        assert nursery.run([*arguments, str(tmp_path / str(number))]) == 0, nursery.log.read_text()
        assert same_files(tmp_path / str(number)) == same_files(tmp_path / "whole")


@pytest.mark.slow
def test_demo_that_is_killed_again_and_again_ends_as_if_it_had_not_been(nursery: Nursery, tmp_path: Path) -> None:
    """Networks, agents, rows and plans of all of its steps."""
    arguments = ["demo", "--quick", "--out"]
    assert nursery.run([*arguments, str(tmp_path / "whole")]) == 0, nursery.log.read_text()
    seconds = nursery.seconds
    for _ in range(3):
        nursery.run([*arguments, str(tmp_path / "run")], kill_after=seconds / 4)

    assert nursery.run([*arguments, str(tmp_path / "run")]) == 0, nursery.log.read_text()
    assert same_files(tmp_path / "run") == same_files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "compare", "prune"])
def test_command_killed_again_and_again_ends_as_if_it_had_not_been(
    nursery: Nursery, command: str, tmp_path: Path
) -> None:
    """One run, killed a moment later each time until it comes through."""
    whole, seconds = uninterrupted(nursery, command, tmp_path / "whole")
    arguments = [*COMMANDS[command], "--out", str(tmp_path / "run")]
    patience = [seconds / 3, seconds / 4, seconds / 3, seconds / 4, seconds / 2]

    codes = [nursery.run(arguments, kill_after=moment) for moment in patience]

    assert codes[0] == -signal.SIGKILL
    assert nursery.run(arguments) == 0, nursery.log.read_text()
    assert same_files(tmp_path / "run") == whole


def test_training_that_is_killed_goes_on_to_the_same_bytes(nursery: Nursery, tmp_path: Path) -> None:
    """Half-way, with SIGKILL."""
    few = ["--evaluations", "24"]
    whole, seconds = uninterrupted(nursery, "train", tmp_path / "whole", *few)
    arguments = [*COMMANDS["train"], *few, "--out", str(tmp_path / "run")]

    assert nursery.run(arguments, kill_after=seconds / 2) == -signal.SIGKILL
    assert nursery.run(arguments) == 0, nursery.log.read_text()
    assert same_files(tmp_path / "run") == whole


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "compare", "prune"])
def test_time_limit_again_and_again_ends_as_if_there_had_been_none(
    nursery: Nursery, command: str, tmp_path: Path
) -> None:
    """Every attempt gets further, because nothing that was finished is lost."""
    started = time.monotonic()
    whole, _ = uninterrupted(nursery, command, tmp_path / "whole")
    seconds = time.monotonic() - started
    codes, share = [0], 4
    while codes == [0]:  # what comes after the last moment to stop, such as the check of what was saved, may be long
        folder, limit = tmp_path / str(share), max(0.05, seconds / share)
        arguments = [*COMMANDS[command], "--out", str(folder), "--time-limit", f"{limit:.2f}"]
        codes = [nursery.run(arguments)]
        share *= 2
        assert share < 1000
    while codes[-1] == TIME_UP:
        codes.append(nursery.run(arguments))
        assert len(codes) < 100

    assert set(codes[:-1]) == {TIME_UP}
    assert codes[-1] == 0, nursery.log.read_text()
    assert same_files(folder) == whole


@pytest.mark.parametrize("largest_file", [1_500, 500_000])
def test_file_that_cannot_be_written_ends_a_command_with_one_error(
    nursery: Nursery, largest_file: int, tmp_path: Path
) -> None:
    """Where the limit of a file's size stands for a full disk: no traceback, and the run goes on without the limit."""
    arguments = [*COMMANDS["train"], "--out", str(tmp_path / "run")]
    nursery.log.write_text("")

    assert nursery.run(arguments, largest_file=largest_file) == REFUSED
    said = nursery.log.read_text()
    assert said.count("prunegym: error: `--out` should be a place that can be written to.") == 1
    assert "Traceback" not in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 5 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "compare", "prune"])
def test_command_goes_on_when_a_full_disk_has_space_again(
    nursery: Nursery, command: str, small_disk: Path, tmp_path: Path
) -> None:
    """One error that says what to do; then the same bytes as with space from the start."""
    whole, _ = uninterrupted(nursery, command, tmp_path / "whole")
    used = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    filler = small_disk / "filler"
    filler.write_bytes(bytes(5 * 2**20 - used // 2))
    arguments = [*COMMANDS[command], "--out", str(small_disk / "run")]
    nursery.log.write_text("")

    code = nursery.run(arguments)
    said = nursery.log.read_text()
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)

    assert code == REFUSED, said
    assert said.count("Free some space there and repeat the command") == 1
    assert "Traceback" not in said
    assert nursery.run(arguments) == 0, nursery.log.read_text()
    assert same_files(small_disk / "run") == whole
