"""Moving averages of weights against the recursion written out."""

import torch
from torch import nn

from prunegym.pruning.training.average import WeightAverage

DECAY = 0.3


class Odd(nn.Module):
    """Batch normalisation, an index table and a mask with infinities, as windowed attention has them."""

    index: torch.Tensor
    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("index", torch.arange(7))
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))


def changed(model: Odd, step: int) -> Odd:
    """Other weights and statistics, as after a step."""
    generator = torch.Generator().manual_seed(step)
    for tensor in (model.layer.weight, model.norm.weight, model.norm.running_mean, model.norm.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.5, 1.5, generator=generator)
    return model


def test_average_follows_the_recursion() -> None:
    """Weights and running statistics; the decay grows from a tenth to what was asked for."""
    model = Odd()
    average = WeightAverage(model, DECAY)
    expected: dict[str, torch.Tensor] = {}
    for step in range(6):
        average.update(changed(model, step))
        decay = min(DECAY, (1 + step) / (10 + step))
        for name in ("layer.weight", "norm.running_mean", "norm.running_var"):
            now = model.state_dict()[name]
            expected[name] = decay * expected[name] + (1 - decay) * now if step else now.clone()

    found = average.network.state_dict()

    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6), name


def test_other_buffers_are_those_of_the_network() -> None:
    """Averaged, whole numbers would be rounded down and infinities become NaN."""
    model = Odd()
    average = WeightAverage(model, 0.9)
    for step in range(40):
        average.update(changed(model, step))

    assert torch.equal(average.network.index, model.index)  # type: ignore[arg-type]
    assert torch.equal(average.network.mask, model.mask)  # type: ignore[arg-type]


def test_restored_average_goes_on_to_the_same_weights() -> None:
    """Its count of updates decides the next decay."""
    model = Odd()
    whole, first = WeightAverage(model, 0.9), WeightAverage(model, 0.9)
    for step in range(3):
        whole.update(changed(model, step))
        first.update(model)
    again = WeightAverage(Odd(), 0.9)
    again.load_state_dict(first.state_dict())

    for step in range(3, 6):
        whole.update(changed(model, step))
        again.update(model)

    found = again.network.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in whole.network.state_dict().items())
