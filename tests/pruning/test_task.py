from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.task import ClassificationTask, first_batch, forward, scores_of


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    """Digits."""
    return ClassificationTask(load_data("digits"))


def test_score_is_one_where_the_class_is_right(task: ClassificationTask) -> None:
    """One score per example, so that scores of plans can be compared example by example."""
    outputs = torch.eye(10)[[3, 4, 5]]

    assert task.score(outputs, torch.tensor([3, 0, 5])).tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_is_the_smoothed_cross_entropy(task: ClassificationTask, smoothing: float) -> None:
    """Equal to the formula written out."""
    outputs = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)

    loss = ClassificationTask(task.data, label_smoothing=smoothing).loss(outputs, targets)

    log_probability = outputs.log_softmax(1)
    wanted = torch.full((5, 10), smoothing / 10) + torch.eye(10)[targets] * (1 - smoothing)
    assert torch.allclose(loss, -(wanted * log_probability).sum(1).mean())


def test_loss_is_float32_for_bfloat16_outputs(task: ClassificationTask) -> None:
    """Half precision would round the mean over a batch."""
    loss = task.loss(torch.zeros(4, 10, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64))

    assert loss.dtype == torch.float32


@pytest.mark.parametrize("outputs", [torch.zeros(4, 100), torch.zeros(4, 10, 2), [torch.zeros(4, 10)]])
@pytest.mark.parametrize("method", ["loss", "score"])
def test_head_of_other_classes_is_rejected(task: ClassificationTask, method: str, outputs: torch.Tensor) -> None:
    """A network for 100 classes would score 10 classes without complaint."""
    with pytest.raises(PruningError, match=r"`--network` should give one output per class: \(B, 10\)"):
        getattr(task, method)(outputs, torch.zeros(4, dtype=torch.int64))


def test_training_batches_are_shuffled_and_full(task: ClassificationTask) -> None:
    """Measuring keeps the order and every image; training shuffles and drops the incomplete batch."""
    generator = torch.Generator().manual_seed(0)
    trained = [y for _, y in task.batches("train", batch_size=64, train=True, generator=generator)]
    measured = [y for _, y in task.batches("train", batch_size=64)]

    assert {len(y) for y in trained} == {64}
    assert sum(len(y) for y in measured) == len(task.data.train)
    assert not torch.equal(trained[0], measured[0])


@pytest.mark.parametrize("smoothing", [-0.1, 1.0])
def test_label_smoothing_outside_its_interval_is_rejected(task: ClassificationTask, smoothing: float) -> None:
    """At 1 the labels would say nothing."""
    with pytest.raises(PruningError, match=r"`label_smoothing` should be in \[0, 1\)"):
        ClassificationTask(task.data, label_smoothing=smoothing)


def test_tuple_of_inputs_becomes_arguments() -> None:
    """A user's network may take several tensors."""
    model = nn.Bilinear(2, 3, 4)

    assert forward(model, (torch.zeros(5, 2), torch.zeros(5, 3))).shape == (5, 4)


class Constant:
    """A task whose score is always the same, and whose only batch is of no images."""

    name, fingerprint = "constant", "constant-1"

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def batches(self, split: str, **_: Any) -> list[tuple[Tensor, Tensor]]:
        return [(torch.zeros(0, 1, 8, 8), torch.zeros(0))]

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return torch.tensor(0.0)

    def score(self, outputs: Any, targets: Any) -> Any:
        return self.scores


@pytest.mark.parametrize(
    ("scores", "received"),
    [(0.5, "a float"), (torch.tensor(0.5), r"a tensor of shape \(\)"), (torch.zeros(2, 3), r"shape \(2, 3\)")],
)
def test_score_that_is_not_one_number_per_example_is_refused(scores: Any, received: str) -> None:
    """Such as the mean of a batch."""
    with pytest.raises(PruningError, match=rf"`score` of a task should return one number per .*{received} from .*'con"):
        scores_of(Constant(scores), None, None)


def test_split_without_examples_is_refused() -> None:
    """Also where a batch comes, in which there are none."""
    with pytest.raises(PruningError, match="`split` should hold examples. Received 'reward' of 'constant'"):
        first_batch(Constant(0), "reward", 2)
