"""Command-line options that several commands share, so that one flag means one thing everywhere.

Each class is a base of the configurations in :mod:`prunegym.agents.configuration.config`; the text under a field is its
help. Heavy libraries are imported where they are used, so that ``prunegym --help`` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prunegym.agents.configuration.option_rules import Names, Options, at_least, only_with, positive, require
from prunegym.agents.configuration.width_options import WidthOptions
from prunegym.pruning.errors import PruningError, unknown_name

if TYPE_CHECKING:
    import torch

    from prunegym.pruning.budget import Budget
    from prunegym.pruning.scoring import Recovery, ScorerSettings
    from prunegym.pruning.timing.latency import LatencySettings

DEFAULT_BUDGET = "macs:0.5"
DEFAULT_EVALUATIONS = 300


def parse_budgets(texts: tuple[str, ...]) -> tuple[Budget, ...]:
    """Read budgets such as ``macs:0.5``.

    Raises:
        PruningError: One of them is none.
    """
    from prunegym.pruning.budget import Budget

    return tuple(dict.fromkeys(Budget.parse(text) for text in texts))


@dataclass(frozen=True, kw_only=True)
class DeviceOption(Options):
    """Where to compute."""

    device: str = "auto"
    """Torch device, such as cpu or cuda:1; auto takes a graphics card if there is one."""

    @property
    def torch_device(self) -> torch.device:
        """The device, chosen if it is ``auto``.

        Raises:
            PruningError: There is no such device here.
        """
        import torch

        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        # AssertionError: torch was built without that kind of device
        except (RuntimeError, AssertionError, NotImplementedError) as fault:
            reason = (str(fault).splitlines() or [type(fault).__name__])[0]
            raise PruningError(
                f"`--device` should be a device that torch can use here. Received '{self.device}' "
                f"({reason}). Write cpu, or leave it out."
            ) from fault
        return device


@dataclass(frozen=True, kw_only=True)
class RunOptions(DeviceOption):
    """Where and how to run."""

    seed: int = 0
    """Seed of everything random except the splits of the data."""
    out: Path | None = None
    """Run folder. By default a new one below runs/; give that of an interrupted run to continue it."""
    json: bool = False
    """Print the result as one JSON object on standard output, and everything else on standard error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Which images."""

    data: str = "digits"
    """Data: digits (embedded, needs no download), a torchvision data set such as cifar10 or imagenet, an
    .npz file with x_train, y_train, x_test and y_test, or a folder of class folders."""
    data_root: Path | None = None
    """Folder of the named data sets and of latency tables; by default $PRUNEGYM_DATA, else
    ~/.cache/prunegym."""
    image_size: int | None = None
    """Side in pixels that images are scaled to. By default small images stay as they are and others become
    224."""
    split_seed: int = 0
    """Chooses the splits. Leave it alone between commands that build on each other: with other splits, plans
    would be judged on images that the network was trained on."""
    reward_split: int | None = None
    """Training images set aside for the reward of searches; by default 15 % of them, at most 5,000. The more there are,
    the less a search that tries many plans overfits them."""
    data_workers: int = 0
    """Processes that read image files; 0 reads them in the main process."""
    download: bool = False
    """Let torchvision download the data set if it is absent."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "split_seed", "data_workers")
        at_least(self, 1, "image_size", "reward_split")


@dataclass(frozen=True, kw_only=True)
class OneNetwork(Options):
    """Which network."""

    network: str
    """Network: a name, such as cifar_resnet20, torchvision's resnet50 or timm/levit_128s, or your own as
    path/file.py:function."""
    weights: str | None = None
    """Weights of the network: a file of torch.save or safetensors, or for torchvision's networks
    `default`."""
    keep: Names = ()
    """Regular expression of module paths (layers, or modules that hold them) whose channels are not pruned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.keep, "keep")


@dataclass(frozen=True, kw_only=True)
class SeveralNetworks(Options):
    """Which networks."""

    network: Names = ()
    """Network: a name, such as cifar_resnet20, torchvision's resnet50 or timm/levit_128s, or your own as
    path/file.py:function."""
    weights: Names = ()
    """Weights of the network: a file of torch.save or safetensors, or for torchvision's networks `default`.
    Once for each network, in the same order."""
    keep: Names = ()
    """Regular expression of module paths (layers, or modules that hold them) whose channels are not pruned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        remedy = "Name a network, for example digits_resnet."
        require(bool(self.network), "network", "given at least once", "none", remedy)
        require(
            not self.weights or len(self.weights) == len(self.network),
            "weights",
            f"given once for each of the {len(self.network)} networks, or not at all",
            f"{len(self.weights)} files",
            "Repeat --weights in the order of --network.",
        )
        check_patterns(self.keep, "keep")

    @property
    def pairs(self) -> tuple[tuple[str, str | None], ...]:
        """Each network with its weights."""
        return tuple(zip(self.network, self.weights or (None,) * len(self.network), strict=True))


@dataclass(frozen=True, kw_only=True)
class BudgetsOptions(Options):
    """Several budgets."""

    budget: Names = ()
    """Cost kept: a share of the unpruned network's MACs, parameters or latency (macs:0.5, params:0.3,
    latency:0.7), or a latency in milliseconds (latency:12ms). By default macs:0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_budgets(self.budget)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets, each once."""
        return parse_budgets(self.budget or (DEFAULT_BUDGET,))


@dataclass(frozen=True, kw_only=True)
class ScoringOptions(Options):
    """How a plan becomes a score: the same for every searcher."""

    criterion: str = "residual_taylor"
    """Which channels of a group stay. By weights: l1, l2, bn_scale, fpgm or cosine. By calibration images: taylor,
    taylor_squared, residual_taylor, taylor_weight, taylor_second, activation, activation_variance, apoz,
    group_attention, or, with --policy, encoder_attention. The control: random."""
    recovery: Literal["auto", "none", "bn", "compensate", "reconstruct", "distill"] = "auto"
    """What follows pruning, without labels. none: nothing. bn: batch normalisation is measured anew. compensate:
    removed channels are folded into kept ones by least squares, then bn. reconstruct: each layer is fitted to what the
    unpruned network computes there. distill: compensate, then training steps towards the unpruned network. auto:
    compensate where fine-tuning follows, and else reconstruct."""
    scored: Literal["auto", "none", "bn", "compensate", "reconstruct", "distill"] = "auto"
    """The recovery that plans get while they are only scored, in a cheap form. auto: that of --recovery; where that is
    auto too, reconstruct, which ranks plans best by what fine-tuning makes of them."""
    statistics_examples: int = 512
    """Calibration images for activations, covariances and Taylor scores."""
    recovery_examples: int = 512
    """Calibration images of the recovery: 512 for all of them; more make reconstruction better, and slower."""
    reward_examples: int = 1000
    """Images of the reward split that a plan is scored on while searching."""
    measure: Literal["task", "loss", "divergence"] = "task"
    """What the score of a plan is. task: that of the task, such as accuracy. loss: exp(-loss). divergence: exp(-d),
    with d the divergence from the outputs of the unpruned network; it needs no labels."""
    recovery_steps: int = 400
    """Training steps of --recovery distill."""
    recovery_rate: float = 0.02
    """Learning rate of the first of those steps."""
    recovery_split: Literal["train", "calibration"] = "train"
    """Images of those steps: the training images, or only the calibration images of the other recoveries."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of scoring; auto takes bfloat16 where the device computes it fast and the network allows
    it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        from prunegym.pruning.importance.criteria import CRITERIA, ENCODER_ATTENTION

        if self.criterion not in CRITERIA:
            raise unknown_name("--criterion", self.criterion, CRITERIA)
        require(
            self.criterion != ENCODER_ATTENTION or getattr(self, "policy", None) is not None,
            "policy",
            f"a policy file with --criterion {ENCODER_ATTENTION}",
            "none",
            "Train one with `prunegym train`, or choose another criterion.",
        )
        at_least(self, 1, "reward_examples", "recovery_steps", "recovery_examples")
        at_least(self, 2, "statistics_examples")
        positive(self, "recovery_rate")
        steps = ("recovery_steps", "recovery_rate", "recovery_split")
        only_with(self, "distill" in (self.recovery, self.scored), "--recovery distill", *steps)

    @property
    def recovery_name(self) -> Recovery:
        """The recovery asked for, or the one that fits what follows."""
        if self.recovery == "auto":
            return "compensate" if getattr(self, "epochs", 0) else "reconstruct"
        return self.recovery

    @property
    def scored_name(self) -> Recovery | None:
        """The recovery of plans that are only scored, if it is not that of the result."""
        if self.scored == "auto":
            return "reconstruct" if self.recovery == "auto" else None
        return self.scored

    @property
    def scorer_settings(self) -> ScorerSettings:
        """The same, as the scorer takes it."""
        from prunegym.pruning.scoring import ScorerSettings

        return ScorerSettings(
            criterion=self.criterion,
            recovery=self.recovery_name,
            scored=self.scored_name,
            statistics_examples=self.statistics_examples,
            recovery_examples=self.recovery_examples,
            examples=self.reward_examples,
            measure=self.measure,
            recovery_steps=self.recovery_steps,
            recovery_rate=self.recovery_rate,
            recovery_split=self.recovery_split,
            precision=self.precision,
        )


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(Options):
    """How latency is measured."""

    latency_batch: int = 1
    """Images per run when latency is measured."""
    latency_threads: int | None = None
    """Threads when latency is measured on a processor; by default as many as torch uses."""
    latency_backend: Literal["torch", "compile", "onnxruntime", "openvino"] = "torch"
    """What runs the network that latency budgets, latency tables and rewards are about: PyTorch as it is,
    torch.compile, ONNX Runtime or OpenVINO."""
    latency_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and images when latency is measured. ONNX Runtime takes float32 on processors, and
    float16 too on graphics cards."""
    latency_device: str | None = None
    """Torch device that latency is measured on, where it is not --device: cpu for a network that is pruned on a
    graphics card and deployed on a processor."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "latency_batch", "latency_threads")
        if self.latency_dtype != "float32" or self.latency_device is not None:
            self.latency_settings(getattr(self, "torch_device", "cpu"))  # refuses what the backend does not take

    def latency_settings(self, device: torch.device | str, backend: str | None = None) -> LatencySettings:
        """The same, as :mod:`prunegym.pruning.timing.latency` takes it.

        Args:
            device: Where to measure if nothing else was asked for, and the backend runs there; else the processor.
            backend: In place of the one asked for.

        Raises:
            PruningError: The backend does not take the data type, or the device asked for.
        """
        from prunegym.pruning.timing.latency import LatencySettings
        from prunegym.pruning.timing.runtimes import RUNTIMES

        backend = backend or self.latency_backend
        if self.latency_device is not None:
            device = self.latency_device
        elif not RUNTIMES[backend].is_there(str(device)):
            device = "cpu"
        return LatencySettings(
            batch_size=self.latency_batch,
            threads=self.latency_threads,
            backend=backend,
            dtype=self.latency_dtype,
            device=str(device),
        )


@dataclass(frozen=True, kw_only=True)
class ProblemOptions(RunOptions, LatencyOptions, ScoringOptions, WidthOptions, DataOptions):
    """Everything that turns a network into a pruning problem."""

    @property
    def scorer_settings(self) -> ScorerSettings:
        """How plans are scored, with the seed of the run."""
        return replace(super().scorer_settings, seed=self.seed)


def check_patterns(patterns: tuple[str, ...], flag: str) -> None:
    """Refuse what is no regular expression."""
    import re

    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as fault:
            raise PruningError(
                f"`--{flag}` should be a regular expression. Received '{pattern}' ({fault}). "
                "Put a backslash before characters that are meant as they are."
            ) from fault
