import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.data import load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.schedule import learning_rate_at
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import EpochRow, distillation_loss, evaluate_network, train_network
from prunegym.pruning.zoo import build_network, load_weights


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    """Digits."""
    return ClassificationTask(load_data("digits"))


@pytest.fixture(scope="module")
def short() -> ClassificationTask:
    """Few digits, for trainings whose result does not matter."""
    return ClassificationTask(load_data("digits", sizes={"train": 64}))


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether all weights are exactly equal."""
    return all(torch.equal(value, other[key]) for key, value in one.items())


def with_dropout() -> nn.Module:
    """A network that draws from the global generator while it trains."""
    network = build_network("digits_vgg")
    network.classifier = nn.Sequential(nn.Dropout(0.5), network.classifier)
    return network


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vgg", "digits_mobilenet"])
def test_digits_networks_learn_in_seconds(task: ClassificationTask, name: str) -> None:
    """The base networks of the demonstration are worth pruning."""
    network = build_network(name)
    train_network(network, task, epochs=8, batch_size=64)

    assert evaluate_network(network, task, "selection").score > 0.95


def test_same_seed_gives_the_same_weights(short: ClassificationTask) -> None:
    """And another seed other ones; dropout is seeded too; the global generator is left alone."""
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        network = with_dropout()
        train_network(network, short, epochs=2, batch_size=16, seed=seed)
        results.append(weights(network))

    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupted_training_ends_in_the_same_weights(short: ClassificationTask, tmp_path: Path) -> None:
    """Interrupted after two of four epochs and continued in a new network: as if nothing had happened."""
    options: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 3}
    whole = with_dropout()
    expected = train_network(whole, short, **options)

    def interrupt(row: EpochRow) -> None:
        if row.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_network(with_dropout(), short, **options, checkpoint=tmp_path / "c.pt", on_epoch=interrupt)
    resumed = with_dropout()
    seen: list[int] = []
    rows = train_network(
        resumed, short, **options, checkpoint=tmp_path / "c.pt", on_epoch=lambda row: seen.append(row.epoch)
    )

    assert same(weights(whole), weights(resumed))
    assert seen == [3, 4]
    assert [(row.epoch, row.loss, row.score) for row in rows] == [
        (row.epoch, row.loss, row.score) for row in expected
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_finished_checkpoint_is_loaded_without_training(short: ClassificationTask, tmp_path: Path) -> None:
    """Repeating a finished command costs nothing; the file also serves as weights."""
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "checkpoint": tmp_path / "c.pt"}
    trained, again, loaded = (build_network("digits_vgg", seed=seed) for seed in range(3))
    rows = train_network(trained, short, **options)

    assert train_network(again, short, **options) == rows
    load_weights(loaded, tmp_path / "c.pt")
    assert same(weights(trained), weights(again))
    assert same(weights(trained), weights(loaded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, r"differs in epochs, warmup_epochs \(2 there, 3 now\)"),
        ({"seed": 1}, r"differs in seed \(0 there, 1 now\)"),
        ({"network": "digits_resnet"}, "differs in tensors"),
        ({"data": 1}, "differs in data"),
        ({"teacher": "digits_vgg"}, "differs in teacher"),
    ],
)
def test_checkpoint_of_another_training_is_refused(
    short: ClassificationTask, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    """Nothing is silently continued under other settings."""
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "checkpoint": tmp_path / "c.pt"}
    train_network(build_network("digits_vgg"), short, **options)
    network = build_network(change.pop("network", "digits_vgg"))
    task = ClassificationTask(load_data("digits", seed=change.pop("data", 0), sizes={"train": 64}))
    if "teacher" in change:
        change["teacher"] = build_network(change["teacher"])

    with pytest.raises(PruningError, match=f"`checkpoint` should be of the same training.*{message}"):
        train_network(network, task, **{**options, **change})


def test_file_that_is_no_checkpoint_is_refused(short: ClassificationTask, tmp_path: Path) -> None:
    """Neither weights alone nor rubbish; the file is left as it is."""
    network = build_network("digits_vgg")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish")

    with pytest.raises(PruningError, match="`checkpoint` should be of version 1"):
        train_network(network, short, epochs=1, checkpoint=tmp_path / "weights.pt")
    with pytest.raises(PruningError, match="`checkpoint` should be an undamaged file"):
        train_network(network, short, epochs=1, checkpoint=tmp_path / "rubbish.pt")
    assert (tmp_path / "rubbish.pt").read_bytes() == b"rubbish"


def test_loss_that_is_not_finite_stops_the_training(short: ClassificationTask, tmp_path: Path) -> None:
    """The error says what to lower, and the checkpoint of the epoch before is still good."""
    network = build_network("digits_vgg")
    path = tmp_path / "c.pt"

    def poison(row: EpochRow) -> None:
        with torch.no_grad():
            network.classifier.weight.fill_(math.nan)

    with pytest.raises(
        PruningError, match="`learning_rate` .*nan at step 1 of epoch 2; the checkpoint of epoch 1 is"
    ):
        train_network(network, short, epochs=3, batch_size=16, checkpoint=path, on_epoch=poison)
    load_weights(build_network("digits_vgg"), path)


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    """Linear, then half a cosine, without a jump between them."""

    def rate(epoch: float) -> float:
        return learning_rate_at(epoch, epochs=10, warmup_epochs=2, peak=0.4)

    assert [rate(epoch) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    assert rate(1.9999) == pytest.approx(rate(2.0001), rel=1e-3)


def test_one_step_equals_sgd_by_hand(short: ClassificationTask) -> None:
    """Nesterov's first step, with decay of the matrix and none of the bias."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = copy.deepcopy(model)
    train_network(
        model,
        short,
        epochs=1,
        batch_size=64,
        learning_rate=0.2,
        weight_decay=0.1,
        momentum=0.9,
        warmup_epochs=0,
    )

    inputs, targets = next(
        iter(short.batches("train", batch_size=64, train=True, generator=torch.Generator().manual_seed(0)))
    )
    F.cross_entropy(start(inputs), targets).backward()
    rate = 0.2 * 0.5 * (1 + math.cos(math.pi / 2))
    weight, bias = start[1].weight, start[1].bias
    gradient = weight.grad + 0.1 * weight.detach()
    assert torch.allclose(model[1].weight, weight - rate * 1.9 * gradient, atol=1e-6)
    assert torch.allclose(model[1].bias, bias - rate * 1.9 * bias.grad, atol=1e-6)


def test_distillation_loss_is_the_softened_divergence() -> None:
    """Equal to the formula written out, and 0 for the teacher itself."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 10, generator=generator)

    loss = distillation_loss(student, teacher, 4.0)

    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    assert torch.allclose(loss, 16 * (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    assert distillation_loss(teacher, teacher, 4.0) == pytest.approx(0, abs=1e-6)


def test_student_comes_nearer_to_its_teacher(short: ClassificationTask) -> None:
    """With a weight of 1 only the teacher counts; the teacher is left as it was, in training mode."""
    teacher, student = build_network("digits_vgg", seed=1), build_network("digits_vgg", seed=2)
    teacher.classifier.weight.data *= 5  # opinions strong enough to be imitated
    before = weights(teacher)
    options: dict[str, Any] = {"teacher": teacher, "distillation_weight": 1.0, "temperature": 2.0}

    rows = train_network(student, short, epochs=6, batch_size=16, **options)

    assert rows[-1].loss < 0.5 * rows[0].loss
    assert same(weights(teacher), before)
    assert all(module.training for module in teacher.modules())


def test_teacher_of_other_classes_is_rejected(short: ClassificationTask) -> None:
    """The shapes of both outputs are named."""
    teacher = build_network("digits_vgg", num_classes=12)

    with pytest.raises(PruningError, match=r"`teacher` should return.*\(64, 12\) for \(64, 10\)"):
        train_network(build_network("digits_vgg"), short, epochs=1, teacher=teacher)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"batch_size": 32},
        {"weight_decay": 0.1},
        {"momentum": 0.0},
        {"warmup_epochs": 1.5},
        {"label_smoothing": 0.2},
        {"amp": True},
        {"teacher": build_network("digits_vgg", seed=5)},
    ],
)
def test_argument_changes_the_result(short: ClassificationTask, change: dict[str, Any]) -> None:
    """No argument is accepted and ignored."""
    results = []
    for options in ({}, change):
        network = build_network("digits_vgg")
        train_network(network, short, epochs=2, **{"batch_size": 16, **options})
        results.append(weights(network))

    assert not same(*results)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("batch_size", 0),
        ("weight_decay", -1.0),
        ("momentum", 1.0),
        ("warmup_epochs", 9.0),
        ("distillation_weight", 1.5),
        ("temperature", 0.0),
        ("label_smoothing", 1.0),
    ],
)
def test_argument_out_of_range_is_rejected(short: ClassificationTask, name: str, value: float) -> None:
    """Before anything is computed, by name."""
    with pytest.raises(PruningError, match=f"`{name}` should be .*Received {value}"):
        train_network(build_network("digits_vgg"), short, **{"epochs": 2, name: value})


def test_frozen_network_is_rejected(short: ClassificationTask) -> None:
    """There would be nothing to train."""
    with pytest.raises(PruningError, match="parameters that require a gradient"):
        train_network(build_network("digits_vgg").requires_grad_(False), short, epochs=1)


def test_measurement_does_not_depend_on_the_batch_size(task: ClassificationTask) -> None:
    """Means over examples, not over batches; equal to one forward pass."""
    network = build_network("digits_resnet").eval()
    images, labels = next(iter(task.batches("reward", batch_size=1000)))

    measured = evaluate_network(network, task, "reward", batch_size=64)

    with torch.no_grad():
        outputs = network(images)
    assert measured.examples == len(labels)
    assert measured.score == pytest.approx((outputs.argmax(1) == labels).double().mean().item())
    assert measured.loss == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-5)


def test_measuring_leaves_the_network_as_it_was(task: ClassificationTask) -> None:
    """Modes, statistics and layout; a module that was frozen in evaluation mode stays so."""
    network = build_network("digits_resnet").train()
    network.bn1.eval()
    before = weights(network)

    evaluate_network(network, task, "reward", limit=50)

    assert network.layer1.training
    assert not network.bn1.training
    assert same(weights(network), before)
    assert network.conv1.weight.is_contiguous()


def test_limit_restricts_the_measurement(task: ClassificationTask) -> None:
    """The number of examples is reported."""
    assert evaluate_network(build_network("digits_vgg"), task, "reward", limit=30).examples == 30


def test_bfloat16_measurement_is_close(task: ClassificationTask) -> None:
    """Another precision, nearly the same loss."""
    network = build_network("digits_resnet")
    exact, rounded = (evaluate_network(network, task, "reward", amp=amp).loss for amp in (False, True))

    assert exact != rounded
    assert exact == pytest.approx(rounded, rel=0.02)


class TwoInputs:
    """A task of one's own: is the second tensor the larger one?"""

    name = "larger"
    fingerprint = "larger-1"

    def batches(
        self, split: str, *, batch_size: int, limit: int | None = None, train: bool = False, **_: Any
    ) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        """Five batches, the same each time."""
        generator = torch.Generator().manual_seed(0)
        for _batch in range(5):
            first, second = torch.randn(2, batch_size, 1, generator=generator)
            yield (first, second), (second > first).float()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Binary cross-entropy."""
        return F.binary_cross_entropy_with_logits(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1.0 where right."""
        return ((outputs > 0) == (targets > 0)).float()[:, 0]


class Difference(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map two ``(B, 1)`` to ``(B, 1)``."""
        outputs: Tensor = self.linear(torch.cat([first, second], dim=1))
        return outputs


def test_task_of_ones_own_is_trained_and_measured() -> None:
    """Three methods are enough, and the network may take several tensors."""
    torch.manual_seed(0)
    model, task = Difference(), TwoInputs()
    train_network(model, task, epochs=8, batch_size=50, learning_rate=0.5)

    measured = evaluate_network(model, task, "test", batch_size=50)

    assert measured.score > 0.95
    assert measured.examples == 250
    with pytest.raises(PruningError, match="`label_smoothing` should be 0 for a task of one's own"):
        train_network(model, task, epochs=1, label_smoothing=0.1)
