"""What a network is for: batches, a loss and a score.

Image classification is built in (:class:`ClassificationTask`). Detection, segmentation or anything else is a
small object with the methods of :class:`Task`; everything in the library takes either.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prunegym.pruning.datasets.data import DataSplits
from prunegym.pruning.datasets.image_sets import ALL_BATCHES
from prunegym.pruning.errors import PruningError

Inputs = Tensor | tuple[Tensor, ...]
"""What a network is called with: one tensor, or a tuple that becomes its positional arguments."""


class Task(Protocol):
    """Data, loss and score of a network. ``Any`` is whatever a network returns, or is compared with."""

    @property
    def name(self) -> str:
        """Short name for tables and run folders."""

    @property
    def fingerprint(self) -> str:
        """Text that differs whenever data or metric differ: the key under which scores are cached."""

    def batches(
        self,
        split: str,
        *,
        batch_size: int,
        limit: int | None = None,
        train: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterable[tuple[Inputs, Any]]:
        """Go once through a split.

        Args:
            split: One of ``prunegym.pruning.datasets.data.SPLITS``.
            batch_size: Examples per batch.
            limit: Only the first so many examples of the split, always the same ones. None takes all.
            train: Shuffle and augment; an incomplete last batch may then be left out.
            generator: Source of the shuffling and augmentation.
            device: Where the tensors should be.

        Returns:
            Pairs of inputs and targets.
        """

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean loss of a batch: a scalar that can be differentiated.

        Args:
            outputs: What the network gives, in training mode and in evaluation mode.
            targets: Of the same batch.
        """

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """Score ``(B,)`` of each example, higher is better; for classification 1.0 if the class is right.

        Args:
            outputs: What the network gives in evaluation mode. While it trains, what it gives in training mode too: if
                that raises, epochs have no score.
            targets: Of the same batch.
        """


def forward(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a network with the inputs of a task: ``model(x)``, or ``model(*inputs)`` for a tuple."""
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def first_batch(task: Task, split: str, batch_size: int, device: torch.device | str = "cpu") -> tuple[Inputs, Any]:
    """The first examples of a split: inputs and targets.

    Raises:
        PruningError: There are none.
    """
    batch = next(iter(task.batches(split, batch_size=batch_size, limit=batch_size, device=device)), None)
    if batch is None or _is_empty(batch[0]):
        raise empty_split(task, split)
    return batch


def _is_empty(inputs: Inputs) -> bool:
    """Whether inputs are of no example: the first dimension of the first tensor is the batch."""
    first = inputs[0] if isinstance(inputs, tuple) else inputs
    return isinstance(first, Tensor) and first.ndim > 0 and len(first) == 0


def empty_split(task: Task, split: str) -> PruningError:
    """Describe a split without examples; the error is returned, not raised."""
    return PruningError(
        f"`split` should hold examples. Received '{split}' of '{task.name}', which is empty. Let the task give some "
        "for it."
    )


def scores_of(task: Task, outputs: Any, targets: Any) -> Tensor:
    """Score ``(B,)`` of each example of a batch, as the task gives it.

    Raises:
        PruningError: It gives something else, such as the mean of a batch.
    """
    scores: Any = task.score(outputs, targets)
    if isinstance(scores, Tensor) and scores.ndim == 1:
        return scores
    kind = f"a tensor of shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
    raise PruningError(
        f"`score` of a task should return one number per example, a tensor of shape (B,). Received {kind} from that "
        f"of '{task.name}'. Do not average over the batch: the mean over a split is taken here."
    )


@contextmanager
def running(what: str, task: Task, batch_size: int) -> Iterator[None]:
    """Tell of whatever a network or a task raises while the one runs on a batch of the other.

    Args:
        what: What the network should do there, for the message.
        task: Where the batch comes from.
        batch_size: Examples in it.

    Raises:
        PruningError: One of them raised something.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as fault:
        raise PruningError(
            f"`network` should {what}. Received '{task.name}' in batches of {batch_size}, with which it raised "
            f"{type(fault).__name__}: {fault}. Correct what the message names; if training alone raises "
            "it, choose another batch_size, or do without (epochs=0, another recovery than distill)."
        ) from fault


@dataclass(frozen=True)
class ClassificationTask:
    """Image classification on five splits: cross-entropy, and 1.0 per image whose class is right.

    Args:
        data: The splits, from :func:`prunegym.pruning.datasets.data.load_data`.
        label_smoothing: Share of the target spread evenly over all classes, in [0, 1). Training only wants
            it: measure with a task whose smoothing is 0.
    """

    data: DataSplits
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise PruningError(
                f"`label_smoothing` should be in [0, 1). Received {self.label_smoothing}. 0 turns it off."
            )

    @property
    def name(self) -> str:
        """Name of the data set."""
        return self.data.name

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the splits: the metric is always top-1 accuracy."""
        return self.data.fingerprint

    def batches(
        self,
        split: str,
        *,
        batch_size: int,
        limit: int | None = None,
        train: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        wanted: slice = ALL_BATCHES,
    ) -> Iterable[tuple[Tensor, Tensor]]:
        """Go once through a split: normalised images ``(B, C, H, W)`` float32, classes ``(B,)`` int64.

        ``wanted`` is not part of a :class:`Task`: only some of the batches are given, see
        :meth:`~prunegym.pruning.datasets.image_sets.ImageSet.batches`.
        """
        return self.data[split].batches(
            batch_size,
            limit=limit,
            shuffle=train,
            augment=train,
            drop_last=train,
            generator=generator,
            device=device,
            wanted=wanted,
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of logits ``(B, classes)`` in nats, computed in float32."""
        self._check_shape(outputs)
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self.label_smoothing)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1.0 where the largest of the logits ``(B, classes)`` is at the right class, else 0.0: ``(B,)``."""
        self._check_shape(outputs)
        return (outputs.argmax(dim=1) == targets).float()

    def _check_shape(self, outputs: Tensor) -> None:
        """Refuse a network whose head belongs to other classes, or that gives more than logits."""
        classes = self.data.num_classes
        rule = f"`--network` should give one output per class: (B, {classes}) for data '{self.data.name}'."
        if not isinstance(outputs, Tensor):
            raise PruningError(
                f"{rule} Received {type(outputs).__name__}, perhaps in training mode only. Wrap the network in one "
                "that gives the logits alone, or pass a task of your own (docs/segmentation.md) whose loss and score "
                "take what it gives."
            )
        if outputs.ndim != 2 or outputs.shape[1] != classes:
            raise PruningError(
                f"{rule} Received {tuple(outputs.shape)}. Choose the data that the network was made for, or build it "
                f"with num_classes={classes}."
            )
