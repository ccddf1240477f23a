"""Programs against the networks they were made of, also where these are not known."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.commands.cli import main
from prunegym.pruning.deployment.program import check_exportable, export_program, load_program
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

Toys = Callable[[str], PrunableNetwork]
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))

USER_CODE = """
import torch
from torch import nn

class Secret(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, images):
        return {"logits": self.head(self.norm(self.body(images)).relu().mean((2, 3)))}
"""
READER = """
import sys
import torch
import prunegym
from prunegym.pruning.deployment.program import load_program

folder = sys.argv[1]
try:
    import secret_module
except ImportError:
    pass
else:
    raise SystemExit("the user's code is there")
program = load_program(f"{folder}/model.pt2")
example = torch.load(f"{folder}/example.pt", weights_only=True)
with torch.no_grad():
    found = program(example["images"])
assert torch.allclose(found["logits"], example["logits"], atol=1e-5), "other outputs"
assert "secret_module" not in sys.modules
print("the same")
"""

BRANCHING_CODE = """
import torch
from torch import nn

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = x if float(x.sum()) > 0 else -x
        return self.head(self.body(x).relu().mean((2, 3)))

def build(num_classes, in_channels, image_size):
    return Branching()
"""


class Layer(nn.Module):
    """One linear layer, around which networks differ in what they do with the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class FixedBatch(Layer):
    """A reshape that knows how many examples there are."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(4, 6))


class Measured(Layer):
    """The batch size taken with `len`, which running the code alone would take for a constant."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(len(x), 2, 3)


class Branching(Layer):
    """A condition on values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 1000 else x


class Chance(Layer):
    """Noise, also in evaluation mode."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand_like(x)


def test_program_runs_where_the_code_of_the_network_is_not(tmp_path: Path) -> None:
    """In a new process, on a batch of another size, after the user's module is gone."""
    space: dict[str, Any] = {"__name__": "secret_module"}
    exec(compile(USER_CODE, str(tmp_path / "secret_module.py"), "exec"), space)
    model = space["Secret"]().eval()
    images = torch.randn(5, 3, 8, 8)
    with torch.no_grad():
        torch.save({"images": images, **model(images)}, tmp_path / "example.pt")
    export_program(model, images[:2], tmp_path / "model.pt2")

    done = subprocess.run([sys.executable, "-c", READER, str(tmp_path)], capture_output=True, text=True)

    assert done.stdout == "the same\n", done.stderr


@pytest.mark.parametrize("name", ["residual", "grouped", "two_inputs", "dict_output"])
def test_pruned_network_is_the_same_as_a_program(toys: Toys, tmp_path: Path, name: str) -> None:
    """With shortcuts, grouped convolutions, several inputs and outputs; on batches of any size."""
    network = toys(name)
    counts = np.maximum(1, network.graph.sizes // 2)
    plan = PruningPlan.from_scores(network.graph, counts, np.arange(network.graph.units, dtype=np.float64))
    model = network.pruned(plan).train()
    modes = [module.training for module in model.modules()]

    written = export_program(model, network.example_inputs, tmp_path / "model.pt2")

    assert written.dynamic_batch
    assert written.warning is None
    assert 0 <= written.difference < 1e-5
    assert [module.training for module in model.modules()] == modes
    program = load_program(tmp_path / "model.pt2")
    inputs = tuple(torch.randn(7, *one.shape[1:]) for one in network.example_inputs)
    with torch.no_grad():
        torch.testing.assert_close(program(*inputs), model.eval()(*inputs))


def test_program_stays_in_evaluation_mode(tmp_path: Path) -> None:
    """Its switches can be thrown, as those of any network, and change nothing."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    export_program(model, ROWS, tmp_path / "model.pt2")
    program = load_program(tmp_path / "model.pt2")

    assert torch.equal(program.train()(ROWS), program.eval()(ROWS))
    assert not program.training


def test_network_that_fixes_the_batch_keeps_it_with_a_warning(tmp_path: Path) -> None:
    """The program takes batches of the example's size, and refuses others."""
    model = FixedBatch()

    written = export_program(model, ROWS, tmp_path / "model.pt2")

    assert not written.dynamic_batch
    assert written.warning is not None
    assert "takes batches of 4 only: RuntimeError at" in written.warning
    assert "self.layer(x.reshape(4, 6))" in written.warning
    program = load_program(tmp_path / "model.pt2")
    assert torch.allclose(program(ROWS), model(ROWS))
    with pytest.raises(RuntimeError, match="Expected input"):
        program(ROWS[:2])


def test_fixed_batch_that_was_asked_for_is_no_warning(tmp_path: Path) -> None:
    """Some runtimes want it."""
    written = export_program(Layer(), ROWS, tmp_path / "model.pt2", dynamic_batch=False)

    assert (written.dynamic_batch, written.warning) == (False, None)


def test_batch_size_taken_with_len_stays_open(tmp_path: Path) -> None:
    """The exporter has to read the code for that."""
    model = Measured()

    assert export_program(model, ROWS, tmp_path / "model.pt2").dynamic_batch
    assert torch.allclose(load_program(tmp_path / "model.pt2")(ROWS[:3]), model(ROWS[:3]))


def test_network_that_cannot_be_exported_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    """With the line that is to blame and what to do; the file that was there is still there."""
    path = tmp_path / "model.pt2"
    path.write_bytes(b"before")

    with pytest.raises(
        PruningError,
        match=r"torch.export can export. Received a Branching, which raised \w+ at .*test_program.py:\d+ "
        r"\(return self.layer.*\): .*Rewrite what it names, or keep the network's code and save it",
    ):
        export_program(Branching(), ROWS, path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(PruningError, match="torch.export can export"):
        check_exportable(Branching(), ROWS)


def test_exporter_is_quiet(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """What it prints for its own programmers is not for users."""
    with pytest.raises(PruningError):
        export_program(Branching(), ROWS, tmp_path / "model.pt2")
    export_program(FixedBatch(), ROWS, tmp_path / "model.pt2")

    assert capfd.readouterr() == ("", "")


def test_outputs_that_differ_are_refused(tmp_path: Path) -> None:
    """A network with noise in it is another one each time."""
    with pytest.raises(PruningError, match="`model` should give the same outputs as the program made of it"):
        export_program(Chance(), ROWS, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_containers_of_ones_own_are_refused(tmp_path: Path) -> None:
    """A reader would need their class."""

    class Pair:
        def __init__(self, one: Tensor, two: Tensor) -> None:
            self.one, self.two = one, two

    class Paired(Layer):
        def forward(self, x: Tensor) -> Any:
            return Pair(x, self.layer(x))

    torch.utils._pytree.register_pytree_node(
        Pair,
        lambda pair: ([pair.one, pair.two], None),
        lambda values, _: Pair(*values),
        serialized_type_name="tests.Pair",
    )

    with pytest.raises(PruningError, match="in tuples, lists and dictionaries. Received a Paired with a Pair"):
        export_program(Paired(), ROWS, tmp_path / "model.pt2")


def test_path_of_another_kind_is_refused(tmp_path: Path) -> None:
    """The ending is how others know what the file is."""
    with pytest.raises(PruningError, match="`path` should end in .pt2. Received .*Write for example 'model.pt2'"):
        export_program(Layer(), ROWS, tmp_path / "model.bin")


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program's file."""
    path = tmp_path_factory.mktemp("program") / "model.pt2"
    export_program(Layer(), ROWS, path)
    return path.read_bytes()


def test_file_tells_nothing_of_its_user(archive: bytes) -> None:
    """No source lines, no paths, no examples."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        content = {name: file.read(name) for name in file.namelist()}

    assert not any(b"test_program.py" in one or b"self.layer(x)" in one for one in content.values())
    assert [len(one) for name, one in content.items() if "sample_inputs" in name] == [0]


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("part", ["data/sample_inputs/model.pt", "data/weights/model_weights_config.json", "library"])
def test_pickled_and_compiled_parts_are_refused_unread(archive: bytes, tmp_path: Path, part: str) -> None:
    """Reading them would run code of the file's author."""
    path, sprung = tmp_path / "model.pt2", tmp_path / "sprung"
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith(part) and part.endswith(".pt"):
                data = pickle.dumps(Trap(sprung))
            elif name.endswith(part):
                config = json.loads(data)
                weight = next(iter(config["config"].values()))
                weight["use_pickle"] = True
                data = json.dumps(config).encode()
            elif name.endswith("weight_0") and "weights_config" in part:
                data = pickle.dumps(Trap(sprung))
            new.writestr(name, data)
        if part == "library":
            new.writestr("archive/data/aotinductor/model/model.so", b"")

    with pytest.raises(PruningError, match="should be a program of weights and operations alone"):
        load_program(path)
    assert not sprung.exists()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "other"])
def test_file_that_is_no_program_is_refused(archive: bytes, tmp_path: Path, damage: str) -> None:
    """With the path and the reason."""
    path = tmp_path / "model.pt2"
    if damage == "other":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage != "missing":
        path.write_bytes(b"" if damage == "empty" else archive[: len(archive) // 2])

    with pytest.raises(PruningError, match="`path` should be a (readable )?program.*model.pt2"):
        load_program(path)


def test_network_that_is_no_program_is_refused_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the line that torch.export does not take; no run folder is made."""
    (tmp_path / "mine.py").write_text(BRANCHING_CODE)
    network = ["--network", f"{tmp_path}/mine.py:build"]

    few = ["--reward-examples", "16", "--device", "cpu", "--epochs", "0"]
    code = main(["prune", *network, *few, "--program", "--out", str(tmp_path / "run")])

    assert code == 2
    error = capsys.readouterr().err
    assert "should be a network that torch.export can export. Received a Branching" in error
    assert "mine.py:11 (x = x if float(x.sum()) > 0 else -x)" in error
    assert not (tmp_path / "run").exists()
