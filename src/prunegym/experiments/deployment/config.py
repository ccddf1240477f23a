"""The configurations of ``prunegym finetune`` and ``prunegym export``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from prunegym.agents.configuration.option_rules import Names, Options, at_least, require
from prunegym.agents.configuration.options import DataOptions, DeviceOption, RunOptions
from prunegym.agents.configuration.time_limit import TimeLimitOption
from prunegym.agents.configuration.training_options import DistillationOptions, TrainingOptions
from prunegym.pruning.errors import PruningError, unknown_name

#: Formats of `prunegym export`: written here too, because their module loads PyTorch. A test compares them.
FORMATS = ("onnx", "program", "safetensors")


@dataclass(frozen=True, kw_only=True)
class SavedNetworkOptions(Options):
    """Which network: a saved one, or one by name."""

    run: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = None
    """Folder with a saved network: the run folder of `prunegym prune` or `prunegym finetune`, or what prunegym.save
    wrote."""
    network: str | None = None
    """Network, in place of a saved one: a name, such as cifar_resnet20, torchvision's resnet50 or timm/levit_128s, or
    your own as path/file.py:function."""
    weights: str | None = None
    """Weights of the network by name: a file of torch.save or safetensors, or for torchvision's networks `default`."""
    allow_code: bool = False
    """Let a saved network that was built by path/file.py:function run that file. Leave it out for folders from
    others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        both = self.run is not None and self.network is not None
        received = f"{self.run} and --network {self.network}" if both else "none"
        one = (self.run is None) != (self.network is None)
        require(one, "network", "given, or else the folder of a saved network", received, "Give one of the two.")
        alone = self.weights is None or self.network is not None
        remedy = "A saved network has its own; leave them out."
        require(alone, "weights", "given with --network", self.weights, remedy)


@dataclass(frozen=True, kw_only=True)
class MeasureConfig(DeviceOption, DataOptions):
    """Measure saved networks: MACs, parameters, and accuracy on images, beside what was said of them.

    Nothing is trained, and nothing is written.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Folders with saved networks: run folders of `prunegym prune` or `prunegym finetune`, or what prunegym.save
    wrote."""
    data: str = ""
    """Data (see `prunegym train --help`); by default those of the run that each network comes from, with their
    splits."""
    allow_code: bool = False
    """Let saved networks that were built by path/file.py:function run that file. Leave it out for folders from
    others."""
    json: bool = False
    """Print the result as one JSON object on standard output, and everything else on standard error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise PruningError(
                "`RUN` should be at least one folder with a saved network. Received none. Give the run folder of "
                "`prunegym prune`."
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions, DistillationOptions, TrainingOptions, DataOptions):
    """How a network is fine-tuned, and on what."""

    epochs: int = 10
    """Passes over the training images."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TimeLimitOption, FinetuneOptions, SavedNetworkOptions):
    """Fine-tune a saved pruned network, or one by name, and save it in the same format.

    The run folder gets the network and its accuracy on the test images before and after. Interrupted at any moment, it
    goes on with --out, to the same weights.
    """

    data: str = ""
    """Data (see `prunegym train --help`); by default those of the run that the saved network comes from, with their
    splits, and digits for a network by name."""
    teacher: str | None = None
    """Weights of the unpruned network, which is imitated (--distill); by default those that the run was pruned with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.teacher is None or self.distill, "teacher", "given with --distill", self.teacher)
        known = self.network is None or not self.distill or self.teacher is not None
        remedy = "Give the weights of the network that is to be imitated."
        require(known, "teacher", "given where --distill goes with --network", "none", remedy)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(SavedNetworkOptions):
    """Write a saved network, or one by name, in formats of deployment, each checked against the network.

    onnx: model.onnx, run in ONNX Runtime on several batch sizes. program: model.pt2, a torch.export program, which runs
    without the network's code. safetensors: model.safetensors with recipe.json, for prunegym.load.
    """

    format: Names = ()
    """Format: onnx, program or safetensors; by default onnx."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Numbers to compute in. Inputs and outputs of onnx and program stay float32. ONNX Runtime has no bfloat16."""
    num_classes: int | None = None
    """Outputs of a network by name; by default its own."""
    in_channels: int | None = None
    """Channels of the images of a network by name; by default its own."""
    image_size: int | None = None
    """Side in pixels of the images of a network by name; by default its own."""
    seed: int = 0
    """Seed of everything random except the splits of the data."""
    out: Path | None = None
    """Run folder. By default a new one below runs/; give that of an interrupted run to continue it."""
    json: bool = False
    """Print the result as one JSON object on standard output, and everything else on standard error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.format:
            if name not in FORMATS:
                raise unknown_name("--format", name, FORMATS)
        at_least(self, 1, "num_classes", "in_channels", "image_size")
        at_least(self, 0, "seed")
        for size in ("num_classes", "in_channels", "image_size"):
            alone = self.run is None or getattr(self, size) is None
            remedy = "A saved network has its own; leave it out."
            require(alone, size.replace("_", "-"), "given with --network", getattr(self, size), remedy)

    @property
    def formats(self) -> tuple[str, ...]:
        """The formats, each once."""
        return tuple(dict.fromkeys(self.format or ("onnx",)))
