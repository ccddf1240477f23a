"""Memory layout: channels last where the code of a network bears it, and the ordinary one where it does not."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunegym
from prunegym.pruning.inference import InferenceForm
from prunegym.pruning.layout import CHANNELS_LAST, CONTIGUOUS, laid_out, layout_for, layout_on
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import train_steps
from prunegym.pruning.scoring import Recovery, Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import TrainingSettings, check_training, train_network

CLASSES = 4


class Viewing(nn.Module):
    """Flattens images with `view`, as older code does, which channels last makes impossible."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.head = nn.Linear(12 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(x.view(len(x), -1))


class Flattening(Viewing):
    """The same network, in code that bears any layout."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> ClassificationTask:
    """Small images in colour whose class is their brightest quarter."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 1000)
    images = rng.integers(0, 120, (1000, 8, 8, 3))
    for image, label in zip(images, labels, strict=True):
        image[4 * (label // 2) :, 4 * (label % 2) :][:4, :4] += 100
    arrays = {"x_train": images[:800], "y_train": labels[:800], "x_test": images[800:], "y_test": labels[800:]}
    path: Path = tmp_path_factory.mktemp("layout") / "quarters.npz"
    np.savez(path, **{name: value.astype(np.uint8) for name, value in arrays.items()})
    return ClassificationTask(prunegym.load_data(str(path)))


def test_layout_is_what_the_code_of_a_network_bears() -> None:
    """Other inputs than images have one layout only."""
    images = torch.randn(2, 3, 8, 8)

    assert layout_for(Flattening(), images) is CHANNELS_LAST
    assert layout_for(Viewing(), images) is CONTIGUOUS
    assert layout_for(Viewing(), laid_out(images, CHANNELS_LAST)) is CONTIGUOUS
    assert layout_for(nn.Linear(8, 2), torch.randn(2, 8)) is CONTIGUOUS
    assert layout_for(Flattening(), (images, images)) is CONTIGUOUS


class ViewsInTraining(Flattening):
    """Augments its features, in training only, in code that wants the ordinary layout."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + 1).view(len(x), -1).view(x.shape) if self.training else x)


class MergesImages(Flattening):
    """Merges images and channels: with channels last, one image can be seen so, and two cannot."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, 8, 8).view(x.shape))


class Gray(nn.Module):
    """Of one channel, images are the same in either layout; it is the weights that make another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).view(len(x), -1))


@pytest.mark.parametrize(
    ("build", "channels", "evaluates", "trains"),
    [
        (ViewsInTraining, 3, CHANNELS_LAST, CONTIGUOUS),
        (MergesImages, 3, CONTIGUOUS, CONTIGUOUS),
        (Gray, 1, CONTIGUOUS, CONTIGUOUS),
    ],
)
def test_layout_is_that_of_what_will_run(
    build: type[nn.Module], channels: int, evaluates: torch.memory_format, trains: torch.memory_format
) -> None:
    """In the mode asked for, on several images, with weights laid out too."""
    images = torch.randn(4, channels, 8, 8)

    assert layout_for(build(), images) is evaluates
    assert layout_for(build(), images, training=True) is trains


def test_asking_for_the_layout_leaves_network_and_generators_alone(task: ClassificationTask) -> None:
    """Modes, running statistics and what is drawn next."""
    network = Viewing().train()
    before, state = {name: one.clone() for name, one in network.state_dict().items()}, torch.get_rng_state()

    assert layout_on(network, task, "train", "cpu") is CONTIGUOUS

    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, before[name]) for name, one in network.state_dict().items())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("kind", [Viewing, Flattening])
def test_recovery_steps_learn_in_either_layout_and_precision(
    task: ClassificationTask, kind: type[Viewing], half: bool
) -> None:
    """Weights stay in float32 and come back in the ordinary layout."""
    torch.manual_seed(0)
    network = kind()
    form = InferenceForm((), half=half, layout=layout_on(network, task, "train", "cpu"))

    first = train_steps(network, task, steps=1, batch_size=64, form=form)
    last = train_steps(network, task, steps=30, batch_size=64, form=form)

    assert last < 0.6 * first
    assert all(one.dtype == torch.float32 and one.is_contiguous() for one in network.parameters())


def test_recovery_steps_run_in_a_layout_that_training_bears(task: ClassificationTask) -> None:
    """Scores after other recoveries may be of another."""
    prunable = PrunableNetwork(ViewsInTraining(), torch.randn(2, 3, 8, 8))
    recoveries: tuple[Recovery, ...] = ("compensate", "reconstruct", "distill")

    scorers = [
        Scorer(prunable, task, ScorerSettings(recovery=one, recovery_steps=2, examples=50)) for one in recoveries
    ]

    assert [one.form.layout for one in scorers] == [CHANNELS_LAST, CHANNELS_LAST, CONTIGUOUS]
    plan = PruningPlan.from_mask(prunable.graph, np.arange(prunable.graph.units) % 2 == 0)
    assert all(np.isfinite(one.score(plan).loss) for one in scorers)
    either = [{"recovery": "bn", "scored": "distill"}, {"recovery": "distill", "scored": "bn"}]
    for one in either:
        scorer = Scorer(prunable, task, ScorerSettings(recovery_steps=2, examples=50, **one))
        assert scorer.form.layout is CONTIGUOUS
        assert np.isfinite(scorer.score(plan).loss)


def test_network_and_teacher_run_in_a_layout_that_both_bear(task: ClassificationTask) -> None:
    """Whichever of them has code that wants the ordinary one."""
    settings = TrainingSettings(epochs=1)
    for network, teacher in ((Flattening(), Viewing()), (Viewing(), Flattening())):
        check_training(network, task, settings, teacher=teacher)
        (row,) = train_network(network, task, settings, teacher=teacher)
        assert np.isfinite(row.loss)


@pytest.mark.parametrize("recovery", ["compensate", "reconstruct", "distill"])
def test_scores_are_the_same_however_images_are_flattened(task: ClassificationTask, recovery: Recovery) -> None:
    """In float32, before pruning and after each recovery."""
    torch.manual_seed(0)
    networks = [Viewing(), Flattening()]
    networks[1].load_state_dict(networks[0].state_dict())
    scores, plan = [], None
    for network in networks:
        prunable = PrunableNetwork(network, torch.randn(2, 3, 8, 8))
        settings = ScorerSettings(recovery=recovery, precision="float32", recovery_steps=3, examples=100, batch_size=50)
        scorer = Scorer(prunable, task, settings)
        plan = plan or PruningPlan.from_mask(prunable.graph, np.arange(prunable.graph.units) % 2 == 0)
        scores.append((scorer.unpruned().loss, scorer.score(plan).loss))

    assert scores[0][0] == pytest.approx(scores[1][0], rel=1e-5)
    assert scores[0][1] == pytest.approx(scores[1][1], rel=1e-3)


def test_network_that_flattens_with_view_is_pruned_and_fine_tuned(task: ClassificationTask) -> None:
    """The whole way: search with each recovery, training and measuring."""
    torch.manual_seed(0)
    network = Viewing()

    options = {"budget": "macs:0.5", "searcher": "random", "evaluations": 3}

    result = prunegym.prune(network, task.data, **options, epochs=2)
    others = [
        prunegym.prune(network, task.data, **options, epochs=0, recovery="distill", recovery_steps=5),
        prunegym.prune(network, task.data, **options, epochs=0, recovery="reconstruct"),
    ]

    assert [one.recovery for one in (result, *others)] == ["compensate", "distill", "reconstruct"]
    for one in (result, *others):
        assert one.after.macs <= one.before.macs / 2
        assert one.model(torch.randn(2, 3, 8, 8)).shape == (2, CLASSES)
