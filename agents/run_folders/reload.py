"""How a saved network is loaded, and a check in a new process that it gives what it gave before it was saved.

The example file holds inputs and the outputs of the network before it was saved, computed on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.copies import duplicate
from prunegym.pruning.deployment.saving import load_network
from prunegym.pruning.files import replacing

EXAMPLE = "example.safetensors"


def loading(folder: str, own_code: bool) -> str:
    """The line of Python that loads a saved network; one that a file of the user's builds has to be trusted."""
    return f"prunegym.load('{folder}'{', allow_code=True' if own_code else ''})"


def save_example(path: Path, model: nn.Module, inputs: Tensor) -> None:
    """Write inputs ``(B, ...)`` and what the model makes of them.

    Raises:
        PruningError: The file could not be written.
    """
    outputs = _outputs(duplicate(model).cpu(), inputs.cpu())
    with replacing(path) as temporary:
        save_file({"inputs": inputs.cpu().contiguous(), "outputs": outputs.contiguous()}, temporary)


def largest_difference(folder: Path) -> float:
    """Load the network of a folder and compare it with the example there: 0.0 if bit-identical."""
    example = load_file(folder / EXAMPLE)
    outputs = _outputs(load_network(folder), example["inputs"])
    if torch.equal(outputs, example["outputs"]):
        return 0.0
    return gap_between(example["outputs"], outputs).absolute


def same_in_new_process(folder: Path) -> bool:
    """Whether a new Python process gets bit-identical outputs from the folder.

    Raises:
        RuntimeError: The process failed.
    """
    command = [sys.executable, "-m", "prunegym.agents.run_folders.reload", str(folder), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"a new process could not load {folder}: {done.stderr.strip()}")
    return done.returncode == 0


def main(arguments: Sequence[str]) -> int:
    """Compare; the exit code is 0 if the outputs are bit-identical and 1 if not.

    Args:
        arguments: The folder, and the number of threads the example was computed with: sums of floating-point
            numbers depend on how they are divided.
    """
    folder, threads = arguments
    torch.set_num_threads(int(threads))
    try:
        return int(largest_difference(Path(folder)) != 0.0)
    # a crash must not look like the answer 1, with which Python ends after an exception
    except Exception as fault:
        sys.stderr.write(f"{type(fault).__name__}: {fault}\n")
        return 3


def _outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs of a model on the CPU in evaluation mode."""
    with torch.no_grad():
        outputs: Tensor = model.eval()(inputs)
    return outputs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
