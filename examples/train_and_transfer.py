"""Train an agent on one network, then let its policy prune another one that it has never seen.

    python examples/train_and_transfer.py

The same as the commands `prunegym pretrain`, `train` and `transfer`, here in one script.
"""

import sys
from pathlib import Path

from prunegym.commands.cli import main

runs = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/train_and_transfer")
evaluations = sys.argv[2] if len(sys.argv) > 2 else "100"


def prunegym(*arguments: object) -> None:
    """Run a command, and stop if it fails."""
    code = main([str(one) for one in arguments])
    if code:
        sys.exit(code)


# two trained networks; the agent sees the first
for network in ("digits_resnet", "digits_vgg"):
    prunegym("pretrain", "--network", network, "--data", "digits", "--epochs", 8, "--out", runs / network)

known, new = (runs / network / "model.safetensors" for network in ("digits_resnet", "digits_vgg"))
prunegym(
    *("train", "--network", "digits_resnet", "--weights", known, "--data", "digits", "--budget", "macs:0.3"),
    *("--evaluations", evaluations, "--out", runs / "agent"),
)

# its policy on the second network, frozen, beside the allocations that it starts from
prunegym(
    *("transfer", "--policy", runs / "agent" / "policy.safetensors", "--network", "digits_vgg", "--weights", new),
    *("--data", "digits", "--budget", "macs:0.3", "--out", runs / "transferred"),
)
