"""Train the networks that the pretrained policy learns from: families, widths and depths, on three data sets.

    python benchmarks/training_networks.py --data cifar10.npz cifar100.npz digits --out networks

Each network is a run folder of `prunegym pretrain`, ``out/NETWORK__DATA``. A script that was stopped goes on where it
was; an unfinished network, from its last epoch. Held out of this list are the families `dense` and `hybrid`: they are
for the measurement of transfer.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tyro
from families import FAMILIES
from tqdm import tqdm

HELD_OUT = ("dense", "hybrid")
"""Families that nothing is learned from."""
EPOCHS = {"digits": 20}
"""Epochs on data sets that are not CIFAR."""
SGD = ("--learning-rate", "0.1")
OPTIMIZER = {"hybrid": ("--optimizer", "adamw", "--learning-rate", "0.002", "--weight-decay", "0.05")}
"""What families other than those of convolutions are trained with."""


@dataclass(frozen=True)
class Arguments:
    """What to train."""

    data: tuple[str, ...]
    """Data sets: `.npz` files, or digits. Network number n of a family is trained on data set n, in turn."""
    out: Path
    """Folder of the run folders."""
    each: int = 4
    """Networks of each family."""
    epochs: int = 4
    """Passes over CIFAR."""
    held_out: bool = False
    """Train the families that are held out instead."""


def networks(arguments: Arguments) -> list[tuple[str, str]]:
    """Networks with their data, every family once before any comes again."""
    families = [one for one in FAMILIES if (one in HELD_OUT) == arguments.held_out]
    pairs = product(range(arguments.each), enumerate(families))
    # shifted by the family: the first round already has all data sets
    data = [(f"{family}_{number}", (number + shift) % len(arguments.data)) for number, (shift, family) in pairs]
    return [(network, arguments.data[index]) for network, index in data]


def folder_of(arguments: Arguments, network: str, data: str) -> Path:
    """The run folder of a network."""
    return arguments.out / f"{network}__{Path(data).stem}"


def main(arguments: Arguments) -> None:
    """Train what is not finished."""
    for network, data in tqdm(networks(arguments), unit="network"):
        folder = folder_of(arguments, network, data)
        if (folder / "result.json").exists():
            continue
        file, epochs = Path(__file__).parent / "families.py", EPOCHS.get(data, arguments.epochs)
        command = [sys.executable, "-m", "prunegym", "pretrain", "--network", f"{file}:{network}", "--data", data]
        command += ["--epochs", str(epochs), "--amp", *OPTIMIZER.get(network.rpartition("_")[0], SGD)]
        subprocess.run([*command, "--out", str(folder)], check=True)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
