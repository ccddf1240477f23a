import copy
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.zoo import build_network, load_weights
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import EpochRow, TrainingSettings, evaluate_network, train_network


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    """Digits."""
    return ClassificationTask(load_data("digits"))


@pytest.fixture(scope="module")
def short() -> ClassificationTask:
    """Few digits, for trainings whose result does not matter."""
    return ClassificationTask(load_data("digits", sizes={"train": 64}))


def train(model: nn.Module, task: Any, **options: Any) -> list[EpochRow]:
    """Train, with the settings among the other arguments."""
    names = {one.name for one in fields(TrainingSettings)}
    settings = {name: options.pop(name) for name in list(options) if name in names}
    return train_network(model, task, TrainingSettings(**settings), **options)


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
    train(network, task, epochs=8, batch_size=64)

    assert evaluate_network(network, task, "selection").score > 0.95


def test_same_seed_gives_the_same_weights(short: ClassificationTask) -> None:
    """And another seed other ones; dropout is seeded too; the global generator is left alone."""
    before = torch.get_rng_state()
    results = []
    for seed in (0, 0, 1):
        network = with_dropout()
        train(network, short, epochs=2, batch_size=16, seed=seed)
        results.append(weights(network))

    assert same(results[0], results[1])
    assert not same(results[0], results[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_interrupted_training_ends_in_the_same_weights(short: ClassificationTask, tmp_path: Path) -> None:
    """Interrupted after two of four epochs and continued in a new network: as if nothing had happened."""
    options: dict[str, Any] = {"epochs": 4, "batch_size": 16, "seed": 3}
    whole = with_dropout()
    expected = train(whole, short, **options)

    def interrupt(row: EpochRow) -> None:
        if row.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(with_dropout(), short, **options, checkpoint=tmp_path / "c.pt", on_epoch=interrupt)
    resumed = with_dropout()
    seen: list[int] = []
    rows = train(resumed, short, **options, checkpoint=tmp_path / "c.pt", on_epoch=lambda row: seen.append(row.epoch))

    assert same(weights(whole), weights(resumed))
    assert seen == [3, 4]
    assert [(row.epoch, row.loss, row.score) for row in rows] == [(row.epoch, row.loss, row.score) for row in expected]
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"]


def test_finished_checkpoint_is_loaded_without_training(short: ClassificationTask, tmp_path: Path) -> None:
    """Repeating a finished command costs nothing; the file also serves as weights."""
    options: dict[str, Any] = {"epochs": 1, "batch_size": 16, "checkpoint": tmp_path / "c.pt"}
    trained, again, loaded = (build_network("digits_vgg", seed=seed) for seed in range(3))
    rows = train(trained, short, **options)

    assert train(again, short, **options) == rows
    load_weights(loaded, tmp_path / "c.pt")
    assert same(weights(trained), weights(again))
    assert same(weights(trained), weights(loaded))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 3}, r"differs in epochs \(2 there, 3 now\)"),
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
    train(build_network("digits_vgg"), short, **options)
    network = build_network(change.pop("network", "digits_vgg"))
    task = ClassificationTask(load_data("digits", seed=change.pop("data", 0), sizes={"train": 64}))
    if "teacher" in change:
        change["teacher"] = build_network(change["teacher"])

    with pytest.raises(PruningError, match=f"`checkpoint` should be of the same training.*{message}"):
        train(network, task, **{**options, **change})


def test_file_that_is_no_checkpoint_is_refused(short: ClassificationTask, tmp_path: Path) -> None:
    """Neither weights alone nor rubbish; the file is left as it is."""
    network = build_network("digits_vgg")
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "rubbish.pt").write_bytes(b"rubbish")

    with pytest.raises(PruningError, match="`checkpoint` should be of version 2"):
        train(network, short, epochs=1, checkpoint=tmp_path / "weights.pt")
    with pytest.raises(PruningError, match="`checkpoint` should be an undamaged file"):
        train(network, short, epochs=1, checkpoint=tmp_path / "rubbish.pt")
    assert (tmp_path / "rubbish.pt").read_bytes() == b"rubbish"


def test_loss_that_is_not_finite_stops_the_training(short: ClassificationTask, tmp_path: Path) -> None:
    """The error says what to lower, and the checkpoint of the epoch before is still good."""
    network = build_network("digits_vgg")
    path = tmp_path / "c.pt"

    def poison(row: EpochRow) -> None:
        with torch.no_grad():
            network.classifier.weight.fill_(math.nan)

    with pytest.raises(PruningError, match="`learning_rate` .*nan at step 1 of epoch 2; the checkpoint of epoch 1 is"):
        train(network, short, epochs=3, batch_size=16, checkpoint=path, on_epoch=poison)
    load_weights(build_network("digits_vgg"), path)


def test_one_step_equals_sgd_by_hand(short: ClassificationTask) -> None:
    """Nesterov's first step, with decay of the matrix and none of the bias."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = copy.deepcopy(model)
    train(
        model,
        short,
        epochs=1,
        batch_size=64,
        learning_rate=0.2,
        weight_decay=0.1,
        momentum=0.9,
        warmup=0,
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


class Rows:
    """A task of one's own: 128 rows of noise, always in the same order."""

    name = fingerprint = "rows"

    def batches(self, split: str, *, batch_size: int, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """One part after the other."""
        inputs = torch.randn(128, 6, generator=torch.Generator().manual_seed(0))
        yield from zip(inputs.split(batch_size), (inputs > 0).long().sum(1).split(batch_size), strict=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """1.0 where right."""
        return (outputs.argmax(1) == targets).float()


def test_accumulated_step_equals_one_of_a_larger_batch() -> None:
    """Two batches of 32 make the gradient of one of 64 where nothing depends on the batch; the rates are the same."""
    results, rates = [], []
    for changes in ({"batch_size": 64}, {"batch_size": 32, "accumulate": 2}):
        torch.manual_seed(0)
        model = nn.Linear(6, 7)
        rows = train(model, Rows(), epochs=3, learning_rate=0.3, clip_grad=0.05, **changes)
        results.append(weights(model))
        rates.append([row.learning_rate for row in rows])

    assert rates[0] == rates[1]
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], atol=1e-6), name


def test_clipped_gradient_has_the_norm_asked_for(short: ClassificationTask) -> None:
    """Plain SGD moves by the learning rate times it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = copy.deepcopy(model)
    settings: dict[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}

    train(model, short, epochs=1, batch_size=64, learning_rate=0.5, clip_grad=0.01, **settings)

    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)])
    assert float(moved.detach().norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_result_is_the_average_where_one_is_kept(short: ClassificationTask, tmp_path: Path) -> None:
    """As weights of the network and in the checkpoint; with a decay near 0 it is the last weights."""
    last, averaged, quick = (build_network("digits_vgg") for _ in range(3))
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16}
    train(last, short, **options)
    train(averaged, short, **options, ema=0.9, checkpoint=tmp_path / "c.pt")
    train(quick, short, **options, ema=1e-9)

    loaded = build_network("digits_vgg", seed=3)
    load_weights(loaded, tmp_path / "c.pt")
    assert same(weights(averaged), weights(loaded))
    assert not same(weights(averaged), weights(last))
    assert all(torch.allclose(value, weights(last)[name], atol=1e-5) for name, value in weights(quick).items())


def test_step_of_more_batches_than_there_are_is_refused(short: ClassificationTask) -> None:
    """64 digits are four batches of 16."""
    with pytest.raises(PruningError, match=r"`accumulate` times `devices` should be at most the 4 batches.*Received 5"):
        train(build_network("digits_vgg"), short, epochs=1, batch_size=16, accumulate=5)


def test_student_comes_nearer_to_its_teacher(short: ClassificationTask) -> None:
    """With a weight of 1 only the teacher counts; the teacher is left as it was, in training mode."""
    teacher, student = build_network("digits_vgg", seed=1), build_network("digits_vgg", seed=2)
    teacher.classifier.weight.data *= 5  # opinions strong enough to be imitated
    before = weights(teacher)
    options: dict[str, Any] = {"teacher": teacher, "distillation_weight": 1.0, "temperature": 2.0}

    rows = train(student, short, epochs=6, batch_size=16, **options)

    assert rows[-1].loss < 0.5 * rows[0].loss
    assert same(weights(teacher), before)
    assert all(module.training for module in teacher.modules())


def test_teacher_of_other_classes_is_rejected(short: ClassificationTask) -> None:
    """The shapes of both outputs are named."""
    teacher = build_network("digits_vgg", num_classes=12)

    with pytest.raises(PruningError, match=r"`teacher` should return.*\(64, 12\) for \(64, 10\)"):
        train(build_network("digits_vgg"), short, epochs=1, teacher=teacher)


@pytest.mark.parametrize(
    "change",
    [
        {"learning_rate": 0.01},
        {"batch_size": 32},
        {"weight_decay": 0.1},
        {"momentum": 0.0},
        {"warmup": 0.75},
        {"label_smoothing": 0.2},
        {"optimizer": "adamw", "learning_rate": 1e-3},
        {"schedule": "constant"},
        {"accumulate": 2},
        {"clip_grad": 0.1},
        {"ema": 0.5},
        {"amp": True},
        {"teacher": build_network("digits_vgg", seed=5)},
    ],
)
def test_argument_changes_the_result(short: ClassificationTask, change: dict[str, Any]) -> None:
    """No argument is accepted and ignored."""
    results = []
    for options in ({}, change):
        network = build_network("digits_vgg")
        train(network, short, epochs=2, **{"batch_size": 16, **options})
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
        ("warmup", 1.5),
        ("distillation_weight", 1.5),
        ("temperature", 0.0),
        ("label_smoothing", 1.0),
        ("accumulate", 0),
        ("clip_grad", 0.0),
        ("clip_grad", math.nan),
        ("ema", 1.0),
        ("devices", 0),
    ],
)
def test_argument_out_of_range_is_rejected(short: ClassificationTask, name: str, value: float) -> None:
    """Before anything is computed, by name."""
    with pytest.raises(PruningError, match=f"`{name}` should be .*Received {value}"):
        train(build_network("digits_vgg"), short, **{"epochs": 2, name: value})


def test_frozen_network_is_rejected(short: ClassificationTask) -> None:
    """There would be nothing to train."""
    with pytest.raises(PruningError, match="parameters that require a gradient"):
        train(build_network("digits_vgg").requires_grad_(False), short, epochs=1)


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
    train(model, task, epochs=8, batch_size=50, learning_rate=0.5)

    measured = evaluate_network(model, task, "test", batch_size=50)

    assert measured.score > 0.95
    assert measured.examples == 250
    with pytest.raises(PruningError, match="`label_smoothing` should be 0 for a task of one's own"):
        train(model, task, epochs=1, label_smoothing=0.1)


class TwoOutputs(nn.Module):
    """Returns one thing in training mode and two in evaluation mode, as detectors do."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_network("digits_vgg")

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        raw: Tensor = self.network(images)
        return raw if self.training else (raw.softmax(1), raw)


class ScoresDecoded:
    """Digits; its score knows evaluation mode only."""

    def __init__(self, task: ClassificationTask) -> None:
        self.task, self.name, self.fingerprint, self.batches = task, task.name, task.fingerprint, task.batches

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs[1] if isinstance(outputs, tuple) else outputs, targets)

    def score(self, outputs: Any, targets: Tensor) -> Tensor:
        decoded, _ = outputs
        return (decoded.argmax(1) == targets).float()


def test_what_is_not_scored_in_training_mode_has_no_score_there(short: ClassificationTask, tmp_path: Path) -> None:
    """Training goes on, and through a checkpoint; in evaluation mode the score is there."""
    task, file = ScoresDecoded(short), tmp_path / "c.pt"
    network = TwoOutputs()

    with pytest.warns(UserWarning, match="^epochs have no score: that of 'digits' raised ValueError"):
        rows = train(network, task, epochs=2, checkpoint=file)

    assert [row.score for row in rows] == [None, None]
    assert all(math.isfinite(row.loss) for row in rows)
    assert train(TwoOutputs(), task, epochs=2, checkpoint=file) == rows
    assert 0 <= evaluate_network(network, task, "train").score <= 1
