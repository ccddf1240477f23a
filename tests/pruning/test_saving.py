"""Networks on disk."""

import errno
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from prunegym.pruning.deployment.recipe import Blueprint
from prunegym.pruning.deployment.saving import load_network, read_network, read_recipe, save_network, write_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network, input_shape_of
from prunegym.pruning.plan import PruningPlan

NO_SOURCE = {"constructor": None}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def half(network: PrunableNetwork) -> PruningPlan:
    """A plan that keeps about half of every group, at random."""
    graph, rng = network.graph, np.random.default_rng(0)
    counts = np.maximum(1, graph.sizes // 2)
    return PruningPlan.from_scores(graph, counts, rng.random(graph.units))


def tuned(model: nn.Module) -> nn.Module:
    """Every parameter and buffer moved a little, as by fine-tuning."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1 + 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
    return model


def outputs(model: nn.Module, network: PrunableNetwork) -> Tensor:
    """Outputs on the example input, in eval mode."""
    with torch.no_grad():
        found: Tensor = model.eval()(*network.example_inputs)
    return found


class Saved:
    """A small network, pruned by half, fine-tuned and saved."""

    def __init__(self, folder: Path, name: str = "digits_resnet", num_classes: int = 10) -> None:
        images = torch.randn(3, *input_shape_of(name), generator=torch.Generator().manual_seed(0))
        self.network = PrunableNetwork(build_network(name, num_classes=num_classes), images, name=name)
        self.plan = half(self.network)
        self.model = tuned(self.network.pruned(self.plan))
        self.source = {"network": name, "num_classes": num_classes}
        self.folder = folder
        save_network(
            folder,
            self.network,
            self.plan,
            self.model,
            source=self.source,
            metadata={"score": 0.9, "seed": 3},
        )

    def edit_recipe(self, edit: Callable[[dict[str, Any]], None]) -> None:
        """Change the recipe on disk."""
        path = self.folder / "recipe.json"
        recipe = json.loads(path.read_text())
        edit(recipe)
        path.write_text(json.dumps(recipe))

    def edit_tensors(self, edit: Callable[[dict[str, Tensor]], object]) -> None:
        """Change the tensors on disk, and the recipe so that it agrees."""
        path = self.folder / "model.safetensors"
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path)
        self.edit_recipe(lambda recipe: recipe.update(sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """The residual network, whose shortcuts pad channels."""
    return Saved(tmp_path / "saved")


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vgg", "digits_mobilenet"])
def test_loaded_network_gives_identical_outputs(name: str, tmp_path: Path) -> None:
    """To the last bit, for padded shortcuts, plain chains, depthwise convolutions and excitation."""
    saved = Saved(tmp_path, name, num_classes=7)

    loaded = load_network(tmp_path)

    assert torch.equal(outputs(loaded, saved.network), outputs(saved.model, saved.network))
    assert type(loaded) is type(saved.model)
    assert not loaded.training
    assert str(loaded) == str(saved.model.eval())  # every size attribute that is printed


def test_loaded_network_gives_identical_outputs_in_a_new_process(saved: Saved, tmp_path: Path) -> None:
    """Nothing is carried over but the folder."""
    torch.save(saved.network.example_inputs[0], tmp_path / "images.pt")
    script = (
        "import sys, torch; from pathlib import Path; from prunegym.pruning.deployment.saving import load_network\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "folder = Path(sys.argv[1]); model = load_network(folder / 'saved')\n"
        "with torch.no_grad(): torch.save(model(torch.load(folder / 'images.pt')), folder / 'outputs.pt')\n"
    )

    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=tmp_path)

    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    assert torch.equal(found, outputs(saved.model, saved.network))


def test_loaded_network_trains(saved: Saved) -> None:
    """It is a network like any other."""
    loaded = load_network(saved.folder).train()

    loaded(saved.network.example_inputs[0]).square().mean().backward()

    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_recipe_holds_plan_source_and_metadata(saved: Saved) -> None:
    """What other commands ask for."""
    recipe = read_recipe(saved.folder)

    assert PruningPlan.from_json(recipe["plan"]) == saved.plan
    assert recipe["source"] == saved.source
    assert recipe["metadata"] == {"score": 0.9, "seed": 3}
    assert set(recipe["versions"]) == {"prunegym", "torch"}
    assert sorted(path.name for path in saved.folder.iterdir()) == ["model.safetensors", "recipe.json"]


def test_metadata_that_is_not_finite_is_still_json(saved: Saved) -> None:
    """JSON has no NaN."""
    saved_again = saved.folder.parent / "again"
    save_network(saved_again, saved.network, saved.plan, saved.model, source=saved.source, metadata={"loss": math.nan})

    assert read_recipe(saved_again)["metadata"] == {"loss": None}


def test_network_that_was_read_is_written_again(saved: Saved) -> None:
    """After fine-tuning, for instance: same recipe, other tensors; the source need not be given again."""
    read = read_network(saved.folder)
    again = saved.folder.parent / "again"
    model = tuned(read.model)

    difference = write_network(
        again, read.blueprint, model, example_inputs=saved.network.example_inputs, metadata={**read.metadata, "n": 1}
    )

    assert difference == 0.0
    assert torch.equal(outputs(load_network(again), saved.network), outputs(model, saved.network))
    recipes = [read_recipe(folder) for folder in (saved.folder, again)]
    assert recipes[1]["metadata"] == {"score": 0.9, "seed": 3, "n": 1}
    for key in ("source", "plan", "attributes", "modules", "unpruned_shapes", "shapes"):
        assert recipes[0][key] == recipes[1][key]


def test_unpruned_network_is_written_in_the_same_format(saved: Saved) -> None:
    """With a plan that cuts nothing."""
    model, folder = tuned(saved.network.model), saved.folder.parent / "whole"
    blueprint = Blueprint.of_unpruned(model, saved.source)

    write_network(folder, blueprint, model, example_inputs=saved.network.example_inputs, metadata={})

    assert torch.equal(outputs(load_network(folder), saved.network), outputs(model, saved.network))
    assert PruningPlan.from_json(read_recipe(folder)["plan"]) == PruningPlan(())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives(saved: Saved, dtype: torch.dtype) -> None:
    """It is checked on inputs of its own type."""
    model, folder = saved.model.to(dtype).eval(), saved.folder.parent / "half"

    write_network(
        folder,
        Blueprint.of_pruned(saved.network, saved.plan, model, saved.source),
        model,
        example_inputs=saved.network.example_inputs,
        metadata={},
    )

    images = saved.network.example_inputs[0].to(dtype)
    with torch.no_grad():
        assert torch.equal(load_network(folder)(images), model(images))


# ---- networks that are not in the zoo -----------------------------------------------------------


class Tied(nn.Module):
    """One layer under two names, a shrinking buffer outside the state dict, and a frozen parameter."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(1, 8, 1, 1), persistent=False)
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.head = nn.Linear(8, 5)
        self.head.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x)) * self.scale
        x = x + torch.relu(self.first(x))
        x = x + torch.relu(self.second(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


def save_own(folder: Path, model: nn.Module, **changes: Any) -> tuple[PrunableNetwork, nn.Module]:
    """Prune and save a network that has no name to build it by."""
    network = PrunableNetwork(model, torch.randn(2, 3, 8, 8, dtype=next(model.parameters()).dtype))
    pruned = tuned(network.pruned(half(network))).to(**changes)
    save_network(folder, network, half(network), pruned, source=NO_SOURCE, metadata={})
    return network, pruned


def test_tied_and_unsaved_tensors_survive(tmp_path: Path) -> None:
    """Ties stay ties; what is frozen stays frozen; infinities that belong there are let through."""
    network, pruned = save_own(tmp_path, Tied())
    template = Tied()
    before = {name: tensor.clone() for name, tensor in template.state_dict().items()}

    loaded = load_network(tmp_path, model=template)

    assert isinstance(loaded, Tied)
    assert torch.equal(outputs(loaded, network), outputs(pruned, network))
    assert loaded.scale.shape[1] < 8
    assert loaded.first.weight is loaded.second.weight
    assert not loaded.head.bias.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in template.state_dict().items())


@pytest.mark.parametrize("changes", [{"memory_format": torch.channels_last}, {}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layout_and_type_survive(dtype: torch.dtype, changes: dict[str, Any], tmp_path: Path) -> None:
    """Both decide how sums are rounded."""
    network, pruned = save_own(tmp_path, Tied().to(dtype), **changes)

    loaded = load_network(tmp_path, model=Tied())

    assert torch.equal(outputs(loaded, network), outputs(pruned, network))
    for mine, theirs in zip(pruned.parameters(), loaded.parameters(), strict=True):
        assert (mine.stride(), mine.dtype) == (theirs.stride(), theirs.dtype)


def test_network_of_a_file_is_built_only_when_allowed(tmp_path: Path) -> None:
    """A recipe from a stranger must not run code."""
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, num_classes, 6), "
        "nn.Flatten())\n"
    )
    source = {"network": f"{file}:make", "num_classes": 4}
    network = PrunableNetwork(build_network(source["network"], num_classes=4), torch.randn(2, 3, 8, 8))  # type: ignore[arg-type]
    pruned = network.pruned(half(network))
    save_network(tmp_path / "saved", network, half(network), pruned, source=source, metadata={})

    with pytest.raises(PruningError, match=r"recipe names a Python file.*own.py:make.*allow_code=True"):
        load_network(tmp_path / "saved")

    loaded = load_network(tmp_path / "saved", allow_code=True)
    assert torch.equal(outputs(loaded, network), outputs(pruned, network))


def test_switch_that_comes_with_published_weights_survives(tmp_path: Path) -> None:
    """GoogLeNet rescales its input only if it was built with torchvision's weights."""

    class Rescaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transform_input = False
            self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 6), nn.Flatten())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layers(x * 2 + 1 if self.transform_input else x)
            return out

    model = Rescaling()
    model.transform_input = True
    network, pruned = save_own(tmp_path, model)

    loaded = load_network(tmp_path, model=Rescaling())

    assert getattr(loaded, "transform_input", None)
    assert torch.equal(outputs(loaded, network), outputs(pruned, network))


# ---- what is refused ----------------------------------------------------------------------------


def test_network_without_a_name_needs_the_model(tmp_path: Path) -> None:
    """There is nothing to build it from."""
    save_own(tmp_path, Tied())

    with pytest.raises(PruningError, match=r"`model` should be given.*load_network\(folder, model=...\)"):
        load_network(tmp_path)


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    """With the path; so is one that holds something else."""
    with pytest.raises(PruningError, match=r"`folder` should hold a saved network.*nowhere', which is no folder"):
        load_network(tmp_path / "nowhere")
    with pytest.raises(PruningError, match=r"which has no recipe.json\. Give the run folder of `prunegym prune`"):
        load_network(tmp_path)


def test_missing_tensors_are_refused(saved: Saved) -> None:
    """Both files belong together."""
    (saved.folder / "model.safetensors").unlink()

    with pytest.raises(PruningError, match=r"should hold model.safetensors beside recipe.json.*Copy both"):
        load_network(saved.folder)


def test_damaged_tensors_are_refused(saved: Saved) -> None:
    """One byte is enough."""
    path = saved.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    with pytest.raises(PruningError, match="SHA-256 is not the one in recipe.json"):
        load_network(saved.folder)


def test_tensor_file_of_another_kind_is_refused(saved: Saved) -> None:
    """Also with the right hash, and nothing in it is unpickled."""
    data = b"not a safetensors file"
    (saved.folder / "model.safetensors").write_bytes(data)
    saved.edit_recipe(lambda recipe: recipe.update(sha256=hashlib.sha256(data).hexdigest()))

    with pytest.raises(PruningError, match="should hold an undamaged model.safetensors"):
        load_network(saved.folder)


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1}'])
def test_other_formats_are_refused(saved: Saved, content: str) -> None:
    """Older and newer ones, and what is no recipe at all."""
    (saved.folder / "recipe.json").write_text(content)

    with pytest.raises(PruningError, match="should hold a network saved in format 2. Received .* with format"):
        load_network(saved.folder)


def test_recipe_that_is_not_json_is_refused(saved: Saved) -> None:
    """Cut off, for example."""
    (saved.folder / "recipe.json").write_text('{"format": 1, ')

    with pytest.raises(PruningError, match="should lead to a readable JSON file.*not JSON"):
        load_network(saved.folder)


@pytest.mark.parametrize("key", ["source", "attributes", "aliases", "channels_last", "sha256", "unpruned_shapes"])
def test_incomplete_recipe_is_refused(saved: Saved, key: str) -> None:
    """Missing and of the wrong type."""
    saved.edit_recipe(lambda recipe: recipe.update({key: 3}))
    with pytest.raises(PruningError, match=f"complete recipe.*`{key}` is not a "):
        load_network(saved.folder)

    saved.edit_recipe(lambda recipe: recipe.pop(key))
    with pytest.raises(PruningError, match=f"complete recipe.*`{key}` is missing"):
        load_network(saved.folder)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"conv1": {"forward": 1}}, "sets `forward` of module 'conv1' to 1"),
        ({"nowhere": {"groups": 1}}, "sets `groups` of module 'nowhere'"),
        ({"conv1": {"groups": -1}}, "sets `groups` of module 'conv1' to -1"),
        ({"conv1": {"groups": "1"}}, "sets `groups` of module 'conv1' to '1'"),
        ({"bn1": {"channel_padding": [1, 1]}}, "sets `channel_padding` of module 'bn1'"),
        ({"conv1": 3}, "of module 'conv1'"),
    ],
)
def test_recipe_may_set_only_what_surgery_sets(saved: Saved, attributes: Any, message: str) -> None:
    """A recipe comes from anywhere."""
    saved.edit_recipe(lambda recipe: recipe.update(attributes=attributes))

    with pytest.raises(PruningError, match=message):
        load_network(saved.folder)


@pytest.mark.parametrize(
    "edit",
    [
        lambda recipe: recipe["source"].update(num_classes=11),
        lambda recipe: recipe["source"].update(network="digits_vgg"),
        lambda recipe: recipe["unpruned_shapes"].pop("linear.bias"),
        lambda recipe: recipe["aliases"].update({"linear.bias": []}),
        lambda recipe: recipe["unpruned_shapes"].update({"linear.bias": [2]}),
    ],
)
def test_tensors_of_another_network_are_refused(saved: Saved, edit: Callable[[dict[str, Any]], None]) -> None:
    """The unpruned network must be the one that was pruned, in every shape."""
    saved.edit_recipe(edit)

    with pytest.raises(PruningError, match="`folder` should hold tensors that fit.*a network that differs in "):
        load_network(saved.folder)


def test_tensors_that_the_recipe_does_not_list_are_refused(saved: Saved) -> None:
    """Shapes included."""
    saved.edit_tensors(lambda tensors: tensors.update({"linear.bias": torch.zeros(3)}))

    with pytest.raises(PruningError, match="other tensors than recipe.json lists"):
        load_network(saved.folder)


@pytest.mark.parametrize("tensor", [torch.zeros(11), torch.zeros(10, 1), torch.zeros(10, dtype=torch.int64)])
def test_tensors_that_pruning_cannot_leave_are_refused(saved: Saved, tensor: Tensor) -> None:
    """Larger than unpruned, of other dimensions, or whole numbers."""
    saved.edit_tensors(lambda tensors: tensors.update({"linear.bias": tensor}))
    saved.edit_recipe(lambda recipe: recipe["shapes"].update({"linear.bias": list(tensor.shape)}))

    with pytest.raises(PruningError, match=r"differs in linear.bias\. Give the network as it was before"):
        load_network(saved.folder)


def test_given_model_of_another_class_is_refused(saved: Saved) -> None:
    """It is the unpruned network that is asked for."""
    with pytest.raises(PruningError, match=r"a network that differs in .* and \d+ more\. Give the network"):
        load_network(saved.folder, model=build_network("digits_vgg"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_tensors_that_are_not_finite_are_refused(saved: Saved, value: float) -> None:
    """Before they are written, and after they are read."""
    saved.edit_tensors(lambda tensors: tensors["conv1.weight"].flatten()[:2].fill_(value))

    with pytest.raises(PruningError, match="`folder` should hold finite.*2 NaN or infinite values in 'conv1.weight'"):
        load_network(saved.folder)


def test_diverged_network_is_not_saved(saved: Saved) -> None:
    """Batch norm statistics count too, and the file that was there stays."""
    saved.model.bn1.running_var[0] = math.inf  # type: ignore[union-attr, operator]

    with pytest.raises(PruningError, match="`model` should hold finite.*1 NaN or infinite values in 'bn1.running_var'"):
        save_network(saved.folder, saved.network, saved.plan, saved.model, source=saved.source, metadata={})
    load_network(saved.folder)


def test_model_of_another_plan_is_not_saved(saved: Saved) -> None:
    """Plan and tensors would contradict each other."""
    unpruned = PruningPlan.unpruned(saved.network.graph)

    with pytest.raises(PruningError, match=r"`model` should be what `plan` makes of `network`.*network.pruned\(plan\)"):
        save_network(saved.folder, saved.network, unpruned, saved.model, source=saved.source, metadata={})


def test_source_that_builds_another_network_is_not_saved(saved: Saved) -> None:
    """It would be noticed when it is too late."""
    source = {"network": "digits_resnet", "num_classes": 11}

    with pytest.raises(PruningError, match="a network that differs in linear.weight, linear.bias"):
        save_network(saved.folder, saved.network, saved.plan, saved.model, source=source, metadata={})


def test_source_that_computes_something_else_is_not_saved(tmp_path: Path) -> None:
    """Same tensors, other activation."""
    file = tmp_path / "own.py"
    file.write_text(
        "from torch import nn\n"
        "def make(last=nn.Tanh):\n"
        "    return nn.Sequential(nn.Linear(3, 8), last(), nn.Linear(8, 2))\n"
    )
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    network = PrunableNetwork(model, torch.randn(4, 3))
    source = {"network": f"{file}:make"}

    with pytest.raises(PruningError, match="`source` should build the network that was pruned.*outputs that differ"):
        save_network(tmp_path, network, half(network), network.pruned(half(network)), source=source, metadata={})


def test_source_with_odd_arguments_is_refused(saved: Saved) -> None:
    """They would reach a constructor."""
    saved.edit_recipe(lambda recipe: recipe["source"].update(num_classes="ten"))

    with pytest.raises(PruningError, match="`source` should give num_classes, .* as whole numbers"):
        load_network(saved.folder)


def test_failed_write_leaves_the_old_network(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk costs nothing that was stored."""
    before = outputs(saved.model, saved.network)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(PruningError, match="`folder` should be a place that can be written to.*Free some space"):
        save_network(saved.folder, saved.network, saved.plan, tuned(saved.model), source=saved.source, metadata={})
    monkeypatch.undo()

    assert torch.equal(outputs(load_network(saved.folder), saved.network), before)
    assert len(list(saved.folder.iterdir())) == 2


def test_unwritable_folder_is_refused(saved: Saved, tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")

    with pytest.raises(PruningError, match="`folder` should be a place that can be written to"):
        save_network(tmp_path / "file", saved.network, saved.plan, saved.model, source=saved.source, metadata={})
