"""The scripts in examples/ run, from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ARGUMENTS = {"train_and_transfer.py": ("runs", "12")}


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(script: str, tmp_path: Path) -> None:
    """With fewer evaluations where that is an argument."""
    command = [sys.executable, str(EXAMPLES / script), *ARGUMENTS.get(script, ())]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stderr
    assert done.stdout
