import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models

from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks import zoo
from prunegym.pruning.networks.cifar import CIFAR_NETWORKS, ZeroPadShortcut
from prunegym.pruning.networks.digits import DIGITS_NETWORKS
from prunegym.pruning.networks.zoo import build_network, input_shape_of, load_weights, network_names

#: Millions of parameters in He et al. 2016, table 6, and blocks per stage.
PUBLISHED = {
    "cifar_resnet20": (0.27, 3),
    "cifar_resnet32": (0.46, 5),
    "cifar_resnet44": (0.66, 7),
    "cifar_resnet56": (0.85, 9),
    "cifar_resnet110": (1.7, 18),
}


def run(network: nn.Module, shape: tuple[int, int, int]) -> Tensor:
    """Outputs ``(2, classes)`` for two random images."""
    with torch.inference_mode():
        outputs: Tensor = network.eval()(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))
    return outputs


def save(path: Path, content: object) -> str:
    """Write a file of ``torch.save``."""
    torch.save(content, path / "weights.pt")
    return str(path / "weights.pt")


@pytest.fixture
def network() -> nn.Module:
    """A small network."""
    return build_network("digits_resnet")


@pytest.mark.parametrize("name", [*DIGITS_NETWORKS, *CIFAR_NETWORKS])
def test_network_maps_images_to_classes(name: str) -> None:
    """Any number of classes and of input channels."""
    channels, *size = input_shape_of(name, in_channels=2)

    outputs = run(build_network(name, num_classes=7, in_channels=2), (channels, *size))

    assert outputs.shape == (2, 7)
    assert outputs.isfinite().all()


@pytest.mark.parametrize(("name", "millions", "blocks"), [(name, *row) for name, row in PUBLISHED.items()])
def test_resnet_has_the_published_number_of_parameters(name: str, millions: float, blocks: int) -> None:
    """As in the paper, and as counted by hand: kernels, batch norm, head."""
    size = sum(parameter.numel() for parameter in build_network(name).parameters())

    within = 2 * blocks
    kernels = 3 * 16 + within * 16**2 + 16 * 32 + (within - 1) * 32**2 + 32 * 64 + (within - 1) * 64**2
    assert size == 9 * kernels + 2 * (16 + within * (16 + 32 + 64)) + 64 * 10 + 10
    assert size / 1e6 == pytest.approx(millions, rel=0.02)


def test_projection_shortcuts_add_their_parameters() -> None:
    """Two 1x1 convolutions with batch norm: 16 x 32 + 64 and 32 x 64 + 128."""
    padded, projected = (
        sum(parameter.numel() for parameter in build_network(name).parameters())
        for name in ("cifar_resnet20", "cifar_resnet20_conv")
    )

    assert projected - padded == 16 * 32 + 64 + 32 * 64 + 128


def test_zero_pad_shortcut_keeps_every_second_pixel() -> None:
    """The padding is read at each call, because surgery changes it."""
    shortcut = ZeroPadShortcut(2, (1, 2))
    images = torch.arange(32.0).view(1, 2, 4, 4)

    padded = shortcut(images)
    shortcut.channel_padding = (0, 1)

    assert padded.shape == (1, 5, 2, 2)
    assert torch.equal(padded[0, 1:3], images[0, :, ::2, ::2])
    assert not padded[0, [0, 3, 4]].any()
    assert shortcut(images).shape == (1, 3, 2, 2)


def test_seed_decides_the_initial_weights() -> None:
    """Seed 0 is a seed as well, and the global generator is left alone."""
    before = torch.get_rng_state()
    first, again, other = (build_network("digits_vgg", seed=seed).state_dict() for seed in (0, 0, 1))

    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["features.0.weight"], other["features.0.weight"])
    assert torch.equal(torch.get_rng_state(), before)


def test_every_torchvision_classifier_has_a_name() -> None:
    """Under torchvision's own name, and none hides another."""
    names = network_names()

    assert set(models.list_models(models)) <= set(names)
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    "name", ["resnet18", "googlenet", "inception_v3", "squeezenet1_1", "mnasnet0_5", "shufflenet_v2_x0_5"]
)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_torchvision_network_takes_other_sizes(name: str, in_channels: int) -> None:
    """The stem and the head follow the data; no warning, no second output."""
    shape = input_shape_of(name, in_channels, 96)

    assert run(build_network(name, num_classes=5, in_channels=in_channels), shape).shape == (2, 5)


def test_image_size_reaches_networks_that_want_it() -> None:
    """A vision transformer's position embeddings depend on it."""
    network = build_network("vit_b_32", num_classes=3, image_size=64)

    assert run(network, input_shape_of("vit_b_32", image_size=64)).shape == (2, 3)


def test_impossible_image_size_is_rejected() -> None:
    """The objection of torchvision is passed on."""
    with pytest.raises(PruningError, match="`--network` should be a network that can be built as asked.*'maxvit_t'"):
        build_network("maxvit_t", image_size=100)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mobilenet_v3_small", "densenet121"])
def test_pretrained_head_is_replaced_with_a_warning(name: str) -> None:
    """ImageNet's classes are not the user's; a head of random weights must not go unnoticed."""
    network = build_network(name)

    with pytest.warns(UserWarning, match=f"the last layer of '{name}' is new.*data has 6"):
        zoo._replace_head(name, network, 6)
    assert run(network, (3, 64, 64)).shape == (2, 6)


def test_grey_stem_sums_the_colours() -> None:
    """A pretrained network sees a grey image as it saw the grey colour image."""
    network = build_network("resnet18", num_classes=4)
    grey = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).expand(2, 3, 64, 64)
    before = network.eval()(grey)

    zoo._replace_stem(network, 1)

    assert torch.allclose(network(grey[:, :1]), before, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("digits_vgg", (1, 8, 8)),
        ("cifar_vgg16", (3, 32, 32)),
        ("resnet50", (3, 224, 224)),
        ("inception_v3", (3, 299, 299)),
    ],
)
def test_input_shape_is_the_customary_one(name: str, shape: tuple[int, int, int]) -> None:
    """What a network was designed for, unless something else is asked for."""
    assert input_shape_of(name) == shape
    assert input_shape_of(name, 2, 64) == (2, 64, 64)


def test_half_width_network_has_a_quarter_of_the_kernels() -> None:
    """Every convolution but the first loses half its inputs and half its outputs."""
    wide, slim = (build_network(name) for name in ("cifar_vgg16", "cifar_vgg16_half"))

    first, *others = zip(
        (one for one in wide.modules() if isinstance(one, nn.Conv2d)),
        (one for one in slim.modules() if isinstance(one, nn.Conv2d)),
        strict=True,
    )
    assert first[0].weight.numel() == 2 * first[1].weight.numel()
    assert all(one.weight.numel() == 4 * other.weight.numel() for one, other in others)


@pytest.mark.parametrize("function", [build_network, input_shape_of])
def test_unknown_network_suggests_the_nearest_name(function: object) -> None:
    """A typing slip is answered with the right name and the way to give one's own."""
    with pytest.raises(PruningError, match=r"Did you mean 'cifar_resnet20'.*path/file\.py:function"):
        function("cifar_resnet21")  # type: ignore[operator]


def test_unknown_published_weights_name_the_known_ones() -> None:
    """Neither a file nor a name of torchvision's: both ways are offered."""
    with pytest.raises(PruningError, match=r"`--weights` .*'IMAGENET1K_V1'.*existing weight file"):
        build_network("resnet18", weights="IMAGENET1K_V9")


@pytest.mark.parametrize("classes", [0, -1])
def test_no_classes_are_rejected(classes: int) -> None:
    """0 must not mean the default."""
    with pytest.raises(PruningError, match="`num_classes` should be at least 1"):
        build_network("digits_vgg", num_classes=classes)


def test_function_of_a_file_is_called_with_the_sizes_it_takes(tmp_path: Path) -> None:
    """It may import its neighbours, and its networks can be pickled."""
    (tmp_path / "neighbour_of_mine.py").write_text("WIDTH = 12\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "from neighbour_of_mine import WIDTH\n"
        "class Mine(nn.Linear):\n    pass\n"
        "def make(num_classes=3):\n    return Mine(WIDTH, num_classes)\n"
        "def fixed():\n    return Mine(WIDTH, 9)\n"
    )
    made = build_network(f"{tmp_path}/mine.py:make", num_classes=5, in_channels=1)
    fixed = build_network(f"{tmp_path}/mine.py:fixed", num_classes=5)

    assert made.weight.shape == (5, 12)
    assert fixed.weight.shape == (9, 12)
    assert pickle.loads(pickle.dumps(made)).weight.shape == (5, 12)


def test_function_may_import_its_neighbours_when_it_is_called(tmp_path: Path) -> None:
    """Not only its file; afterwards the path is what it was."""
    (tmp_path / "late_neighbour_of_mine.py").write_text("WIDTH = 11\n")
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    from late_neighbour_of_mine import WIDTH\n"
        "    return nn.Linear(WIDTH, 2)\n"
    )
    before = list(sys.path)

    assert build_network(f"{tmp_path}/mine.py:make").weight.shape == (2, 11)
    assert sys.path == before


@pytest.mark.parametrize(
    ("content", "function", "message"),
    [
        (None, "make", "is not there"),
        ("import sys\nsys.exit(3)", "make", "raised SystemExit: 3. Let it do so under `if __name__"),
        ("def make():\n    raise SystemExit(3)", "make", "which raised SystemExit: 3"),
        ("def make(:", "make", "should name a file that can be imported.*SyntaxError"),
        ("import no_such_module_of_mine", "make", "ModuleNotFoundError"),
        ("def make():\n    return None", "make", "returned a NoneType"),
        ("def make():\n    raise KeyError('depth')", "make", "raised KeyError: 'depth'"),
        ("def make(width):\n    return None", "make", "give its other parameters defaults"),
        ("def make():\n    return None", "mak", "Did you mean 'make'"),
    ],
)
def test_faulty_function_is_rejected(tmp_path: Path, content: str | None, function: str, message: str) -> None:
    """Whatever a user's file does, the answer names it and says what happened."""
    if content is not None:
        (tmp_path / "mine.py").write_text(content)

    with pytest.raises(PruningError, match=message):
        build_network(f"{tmp_path}/mine.py:{function}")


@pytest.mark.parametrize("layout", ["plain", "state_dict", "model", "module.", "safetensors", "no counters"])
def test_weights_are_read_in_every_layout(tmp_path: Path, network: nn.Module, layout: str) -> None:
    """Wrappers' prefixes, checkpoints' keys, and files from before batch norm counted its batches."""
    weights = network.state_dict()
    if layout == "safetensors":
        source = str(tmp_path / "weights.safetensors")
        save_file(weights, source)
    elif layout == "module.":
        nested = {f"module.{key}": value for key, value in weights.items()}
        source = save(tmp_path, {"state_dict": nested, "best_prec1": 91.7})
    elif layout == "no counters":
        source = save(tmp_path, {key: value for key, value in weights.items() if "num_batches" not in key})
    else:
        source = save(tmp_path, weights if layout == "plain" else {layout: weights, "epoch": 3})

    loaded = build_network("digits_resnet", weights=source, seed=1)

    assert torch.equal(run(loaded, (1, 8, 8)), run(network, (1, 8, 8)))


class Bomb:
    """Its unpickling would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        """Call `print` when unpickled."""
        return print, ("unpickled",)


def test_unsafe_weights_are_refused(tmp_path: Path, network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    """The code in them is not run."""
    source = save(tmp_path, {"state_dict": network.state_dict(), "extra": Bomb()})

    with pytest.raises(PruningError, match="`--weights` should be an undamaged file.*without running code") as refusal:
        load_weights(network, source)
    assert "\x1b" not in str(refusal.value)
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 3000, -100])
def test_damaged_weights_are_refused(tmp_path: Path, network: nn.Module, name: str, kept: int) -> None:
    """Wherever the file is cut off."""
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(network.state_dict(), path)
    else:
        save_file(network.state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])

    with pytest.raises(PruningError, match="`--weights` should be an undamaged file"):
        load_weights(network, path)


def test_wrong_weights_are_refused_and_change_nothing(tmp_path: Path, network: nn.Module) -> None:
    """Missing, surplus, of another shape, of other classes, no tensors, no file: one error each."""
    before = {key: value.clone() for key, value in network.state_dict().items()}
    weights = dict(before)
    cases: list[tuple[object, str]] = [
        (
            {key: value for key, value in weights.items() if key != "conv1.weight"},
            r"1 tensors missing \(conv1.weight\)",
        ),
        ({**weights, "new": torch.zeros(1)}, r"1 unknown \(new\)"),
        ({**weights, "bn1.weight": torch.zeros(5)}, r"'bn1.weight' is \(5,\) and should be \(16,\)"),
        ({**weights, "linear.weight": torch.zeros(100, 64)}, "trained on 100 classes and the network has 10"),
        ({**weights, "bn1.bias": torch.full((16,), torch.nan)}, "16 NaN or infinite values in 'bn1.bias'"),
        ({**weights, "epoch": 3}, "nothing but tensors.*'epoch' of type int"),
        ([torch.zeros(1)], "tensors by name.*with a list"),
    ]

    for content, message in cases:
        with pytest.raises(PruningError, match=message):
            load_weights(network, save(tmp_path, content))
    with pytest.raises(PruningError, match="`--weights` should be an existing file"):
        load_weights(network, tmp_path / "absent.pt")

    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_timm_network_is_built_as_asked() -> None:
    """Head, input channels and, where positions are embedded, the size of the images."""
    pytest.importorskip("timm")
    network = build_network("timm/test_vit", num_classes=7, in_channels=1, image_size=64)

    assert network(torch.zeros(2, 1, 64, 64)).shape == (2, 7)
    assert input_shape_of("timm/test_vit") == (3, 160, 160)


def test_unknown_timm_network_is_rejected_with_the_nearest() -> None:
    """A slip of the pen."""
    pytest.importorskip("timm")
    with pytest.raises(PruningError, match="timm/resnet18"):
        build_network("timm/resnet_18")


def test_absent_timm_is_told_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra."""
    monkeypatch.setitem(sys.modules, "timm", None)

    with pytest.raises(PruningError, match=r"pip install 'prunegym\[timm\]'"):
        build_network("timm/resnet18")
