"""A policy comes back from its file as it was, and no other file gets in."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.policies.policy_file import load_policy, save_policy
from prunegym.envs.observation import Padding, observation_space
from prunegym.pruning.errors import PruningError

PADDING = Padding(groups=4, edges=9, bins=3)
METADATA = {"networks": ["digits_resnet"], "budgets": [0.5, 0.3], "reward_deviation": np.float32(0.25)}


@pytest.fixture
def policy() -> PruningPolicy:
    """A small one whose heads say something."""
    torch.manual_seed(0)
    action_space = spaces.Box(-1.0, 1.0, (PADDING.groups,), np.float32)
    made = PruningPolicy(
        observation_space(PADDING),
        action_space,
        lambda _: 1e-3,
        width=16,
        heads=2,
        gat_layers=1,
        transformer_layers=1,
        features="structure",
        correction_scale=0.5,
        log_std_init=-1.5,
    )
    for head in (made.mean_head, made.value_head):
        torch.nn.init.normal_(head.weight, std=0.3)
    return made


@pytest.fixture
def path(policy: PruningPolicy, tmp_path: Path) -> Path:
    """The file of that policy."""
    file = tmp_path / "policy.safetensors"
    save_policy(file, policy, metadata=METADATA)
    return file


def observe(padding: Padding = PADDING) -> dict[str, np.ndarray[Any, Any]]:
    """A random observation without padding."""
    space = observation_space(padding)
    space.seed(1)
    observation: dict[str, np.ndarray[Any, Any]] = space.sample()
    for name in ("node_mask", "edge_mask", "group_mask"):
        observation[name][:] = 1
    return observation


def rewrite(path: Path, *, header: Any = None, **tensors: torch.Tensor | None) -> None:
    """Write the file again with fields of its header and tensors changed; None takes one away."""
    with safe_open(path, framework="pt") as content:
        fields = json.loads(content.metadata()["prunegym"])
    changed = {**fields, **(header or {})} if isinstance(header, dict | None) else header
    if isinstance(changed, dict):
        changed = {name: value for name, value in changed.items() if value is not None}
    weights = {**load_file(path), **{name.replace("__", "."): value for name, value in tensors.items()}}
    kept = {name: value for name, value in weights.items() if value is not None}
    save_file(kept, path, metadata={"prunegym": json.dumps(changed)})


def test_policy_comes_back_as_it_was(policy: PruningPolicy, path: Path) -> None:
    """Weights, noise, ablation, scale and metadata, without an environment."""
    loaded, metadata = load_policy(path)

    assert metadata == {"networks": ["digits_resnet"], "budgets": [0.5, 0.3], "reward_deviation": 0.25}
    assert (loaded.features, loaded.correction_scale) == ("structure", 0.5)
    assert loaded.encoder.config == policy.encoder.config
    assert loaded.log_std.item() == -1.5
    assert np.array_equal(loaded.act(observe()), policy.act(observe()))
    assert not loaded.training


def test_loaded_policy_acts_on_any_network(path: Path) -> None:
    """The file knows no sizes of networks."""
    loaded, _ = load_policy(path)

    assert loaded.act(observe(Padding(groups=9, edges=30, bins=5))).shape == (9,)


def test_loaded_policy_can_be_trained(policy: PruningPolicy, path: Path) -> None:
    """Its optimizer holds the weights that were read, and its state fits a new policy."""
    loaded, _ = load_policy(path)

    held = {id(value) for group in loaded.optimizer.param_groups for value in group["params"]}
    assert held == {id(value) for value in loaded.parameters()}
    assert all(value.requires_grad for value in loaded.parameters())
    policy.load_state_dict(loaded.state_dict())


def test_loading_leaves_random_numbers_alone(path: Path) -> None:
    """Whether a policy is loaded must not change the rest of a run."""
    before = torch.get_rng_state()

    load_policy(path)

    assert torch.equal(torch.get_rng_state(), before)


def test_same_policy_gives_the_same_file(policy: PruningPolicy, path: Path, tmp_path: Path) -> None:
    """Files can be compared by their hash."""
    save_policy(tmp_path / "again.safetensors", policy, metadata=METADATA)

    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_loaded_weights_outlive_the_file(path: Path) -> None:
    """A file that is damaged later must not reach into a policy at work."""
    loaded, _ = load_policy(path)
    before = loaded.act(observe())
    with path.open("rb+") as file:
        file.seek(-4000, 2)
        file.write(b"\xff" * 4000)

    assert np.array_equal(loaded.act(observe()), before)


def test_diverged_policy_does_not_replace_a_good_one(policy: PruningPolicy, path: Path) -> None:
    """What was learned before stays on the disk."""
    before = path.read_bytes()
    policy.value_head.bias.data.fill_(torch.nan)

    with pytest.raises(PruningError, match=r"finite weights.*value_head.bias.*lower learning rate"):
        save_policy(path, policy, metadata={})
    assert path.read_bytes() == before


class Bomb:
    """What a stranger's pickle may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the pickle was opened",)


@pytest.mark.parametrize("writer", ["pickle", "zip"])
def test_pickles_are_refused_unopened(writer: str, tmp_path: Path) -> None:
    """They can run any code."""
    path = tmp_path / "policy.safetensors"
    if writer == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    else:
        torch.save({"policy": Bomb()}, path)

    with pytest.raises(PruningError, match=r"`--policy` should be.*unsafe.*policy\.safetensors"):
        load_policy(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, "cut"])
def test_damaged_files_are_refused(content: bytes | str, path: Path) -> None:
    """Half a download, or something else entirely."""
    path.write_bytes(path.read_bytes()[:-10] if isinstance(content, str) else content)

    with pytest.raises(PruningError, match=r"not a whole safetensors file.*Copy or train it again"):
        load_policy(path)


@pytest.mark.parametrize(("name", "reason"), [("missing.safetensors", "No such file"), (".", "directory")])
def test_unreadable_paths_are_refused(name: str, reason: str, tmp_path: Path) -> None:
    """The path is named."""
    with pytest.raises(PruningError, match=f"{reason}.*Check the path"):
        load_policy(tmp_path / name)


def test_other_safetensors_files_are_refused(tmp_path: Path) -> None:
    """Weights of a network are no policy."""
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")

    with pytest.raises(PruningError, match="a safetensors file without a prunegym policy"):
        load_policy(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": 99}, "format 99 instead of 1, written by prunegym 0.*Install the prunegym that wrote it"),
        ({"observation": 0}, "observations of version 0 instead of .*train again"),
        ([1, 2], "no format version"),
        ({"format": None}, "no format version"),
        ({"encoder": None}, "its header lacks 'encoder'"),
        ({"metadata": "text"}, "metadata is not a table"),
        ({"features": 5}, "'features' makes no sense: 5"),
        ({"metadata": {"rounds": "x"}}, "'rounds' makes no sense: 'x'"),
        ({"metadata": {"rounds": 0}}, "'rounds' makes no sense: 0"),
        ({"metadata": {"networks": [5]}}, "'networks' makes no sense"),
        ({"metadata": {"priors": ["knapsack"]}}, "'priors' makes no sense"),
        ({"features": "nonsense"}, "makes no sense: `features` should be one of"),
        ({"correction_scale": "1"}, "makes no sense"),
        ({"correction_scale": float("inf")}, "makes no sense"),
        ({"encoder": {"width": 16}}, "makes no sense"),
        ({"encoder": 7}, "makes no sense"),
    ],
)
def test_headers_that_do_not_fit_are_refused(header: Any, message: str, path: Path) -> None:
    """Other versions say so; the rest is damaged or forged."""
    rewrite(path, header=header)

    with pytest.raises(PruningError, match=message):
        load_policy(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("width", 10**9), ("width", 15), ("gat_layers", 10**6), ("node_features", 3), ("layers", 1)],
)
def test_forged_sizes_cost_nothing(name: str, value: int, policy: PruningPolicy, path: Path) -> None:
    """A header is checked before anything of its size is made."""
    sizes = dict(vars(policy.encoder.config))
    rewrite(path, header={"encoder": {**sizes, name: value}})

    with pytest.raises(PruningError, match="makes no sense"):
        load_policy(path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"log_std": None}, "without the weights 'log_std'"),
        ({"encoder__spare": torch.zeros(2)}, "with unknown weights 'encoder.spare'"),
        (
            {"mean_head__bias": torch.zeros(2)},
            r"'mean_head.bias' are \(2,\) of torch.float32 instead of \(1,\)",
        ),
        ({"mean_head__bias": torch.zeros(1).half()}, "of torch.float16 instead of"),
        ({"mean_head__bias": torch.tensor([torch.nan])}, "'mean_head.bias' with NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tensors: dict[str, torch.Tensor | None], message: str, path: Path) -> None:
    """Each refusal names the weights."""
    rewrite(path, **tensors)

    with pytest.raises(PruningError, match=message):
        load_policy(path)


def test_header_can_be_read_without_prunegym(path: Path) -> None:
    """What people want to know of a file: who wrote it, for what."""
    with safe_open(path, framework="pt") as content:
        header = json.loads(content.metadata()["prunegym"])

    assert header["metadata"]["networks"] == ["digits_resnet"]
    assert header["log_std"] == -1.5
    assert header["encoder"]["width"] == 16
