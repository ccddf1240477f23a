"""The pruning policy: the graph encoder as an actor-critic policy of stable-baselines3.

The mean action of a group is that of a plain allocation, which comes with the observation as `prior`, plus a
learned correction that starts at zero: an untrained policy is the baseline itself. The letters of shapes are
those of :mod:`prunegym.agents.policies.encoder`.
"""

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.distributions import DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor, nn

from prunegym.agents.policies.encoder import EncoderConfig, GraphAttention, GraphEncoder, Observation
from prunegym.envs.observation import GROUP_DATA_COLUMNS, NODE_DATA_COLUMNS
from prunegym.pruning.errors import PruningError, unknown_name

Features: TypeAlias = Literal["data", "structure", "random"]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]

#: Of the untrained policy: on the scale of actions, where -1 prunes the whole group and 1 nothing.
STANDARD_DEVIATION = 0.15
#: Of the noise that stands in for node features in the ablation `random`.
_NOISE_SEED = 20


class MaskedGaussian(DiagGaussianDistribution):
    """Independent Gaussians, one per group; padding has action 0 and counts in no sum.

    Args:
        mean: ``(B, G)``.
        log_std: Broadcast to ``(B, G)``.
        mask: ``(B, G)`` bool, the real groups.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, mask: Tensor) -> None:
        super().__init__(mean.shape[-1])
        self.mask = mask
        self.proba_distribution(mean, log_std)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Log density of the real groups' actions ``(B,)``, from ``(B, G)``."""
        # cleaned before the formula: behind it, the gradient of a mask times rubbish would still be rubbish
        return self._sum(self.distribution.log_prob(torch.where(self.mask, actions, 0.0)))

    def entropy(self) -> Tensor:
        """Differential entropy in nats ``(B,)``."""
        return self._sum(self.distribution.entropy())

    def sample(self) -> Tensor:
        """Draw actions ``(B, G)`` from torch's global generator, which stable-baselines3 seeds."""
        return self.distribution.rsample() * self.mask

    def _sum(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(dim=-1)


class PruningPolicy(ActorCriticPolicy):
    """One mean per group and one value, for any network.

    To be used as ``PPO(PruningPolicy, env, policy_kwargs={...})``; PPO gives the first three arguments and
    ``use_sde``. The spaces tell the numbers of features; no weight depends on the sizes of a network, so that
    ``policy.load_state_dict(other.state_dict())`` carries a policy to another one.

    Args:
        observation_space: As of ``ChannelPruning-v0``.
        action_space: ``Box(-1, 1, (G,))``.
        lr_schedule: Learning rate from the remaining progress, 1 to 0.
        use_sde: Must be False; there so that PPO can say so.
        width: Size of every embedding.
        heads: Attention heads; divide ``width``.
        gat_layers: Graph attention layers.
        transformer_layers: Transformer layers over the groups.
        features: ``data``; or an ablation: ``structure`` blanks what depends on data in nodes and groups,
            ``random`` blanks it in groups and replaces all node features by noise, always the same. The
            prior, the edges and the state stay.
        log_std_init: Logarithm of the standard deviation that all groups share, at the start.
        correction_scale: Factor on the learned correction of the prior, in units of actions.
        optimizer_class: Optimizer of all parameters.
        optimizer_kwargs: More of its arguments; by default ``eps=1e-5`` for Adam, as usual with PPO.

    Raises:
        PruningError: An argument is out of its range, or the spaces are of another environment.
    """

    def __init__(
        self,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        lr_schedule: Callable[[float], float],
        use_sde: bool = False,
        *,
        width: int = 64,
        heads: int = 4,
        gat_layers: int = 2,
        transformer_layers: int = 2,
        features: Features = "data",
        log_std_init: float = math.log(STANDARD_DEVIATION),
        correction_scale: float = 1.0,
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if use_sde:
            raise PruningError("`use_sde` should be False for a pruning policy. Received True. Leave it out.")
        if features not in get_args(Features):
            raise unknown_name("features", features, get_args(Features))
        if optimizer_kwargs is None:
            optimizer_kwargs = {"eps": 1e-5} if optimizer_class is torch.optim.Adam else {}
        layers = {"gat_layers": gat_layers, "transformer_layers": transformer_layers}
        config = _encoder_config(observation_space, width=width, heads=heads, **layers)
        # What ActorCriticPolicy's own constructor adds, flattened features and MLPs, has no use here.
        super(ActorCriticPolicy, self).__init__(
            observation_space,
            action_space,
            normalize_images=False,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )
        self.features = features
        self.correction_scale = correction_scale
        self.encoder = GraphEncoder(config)
        self.mean_head = _zero_linear(config.width)
        self.value_head = _zero_linear(config.width)
        self.log_std = nn.Parameter(torch.tensor(float(log_std_init)))
        self.make_optimizer(lr_schedule(1.0))

    def make_optimizer(self, learning_rate: float) -> None:
        """Start the optimizer anew, for the parameters as they are now."""
        arguments: dict[str, Any] = {"lr": learning_rate, **self.optimizer_kwargs}
        self.optimizer = self.optimizer_class(self.parameters(), **arguments)

    # stable-baselines3 also allows a bare tensor as observation, in its types; here it is always a Dict.
    def forward(  # type: ignore[override]
        self, obs: Observation, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Act.

        Args:
            obs: Observations, batch first.
            deterministic: Whether to take the mean instead of a sample.

        Returns:
            Actions ``(B, G)``, not clipped; values ``(B, 1)``; log probabilities ``(B,)``.
        """
        distribution, values = self._distribution_and_values(obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values, distribution.log_prob(actions)

    def evaluate_actions(  # type: ignore[override]
        self, obs: Observation, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rate actions that were taken.

        Args:
            obs: Observations, batch first.
            actions: ``(B, G)``, as sampled (not clipped).

        Returns:
            Values ``(B, 1)``; log probabilities ``(B,)``; entropies ``(B,)``.
        """
        distribution, values = self._distribution_and_values(obs)
        return values, distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Observation) -> MaskedGaussian:  # type: ignore[override]
        """Distribution of actions in each observation."""
        return self._distribution_and_values(obs)[0]

    def predict_values(self, obs: Observation) -> Tensor:  # type: ignore[override]
        """Expected return ``(B, 1)`` of each observation."""
        return self._distribution_and_values(obs)[1]

    def predict(  # type: ignore[override]
        self,
        observation: Arrays,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = False,
    ) -> tuple[NDArray[np.float32], tuple[NDArray[Any], ...] | None]:
        """Act on arrays, of any network: the sizes need not be those of the spaces.

        Args:
            observation: One observation, or a batch.
            state: Passed through.
            episode_start: Ignored; there is no memory.
            deterministic: Whether to take the mean instead of a sample.

        Returns:
            Actions in [-1, 1], ``(G,)`` or ``(B, G)``, and ``state``.
        """
        self.set_training_mode(False)
        batched = np.ndim(observation["group_mask"]) == 2
        tensors = {name: torch.as_tensor(value, device=self.device) for name, value in observation.items()}
        if not batched:
            tensors = {name: value[None] for name, value in tensors.items()}
        with torch.no_grad():
            actions = self.get_distribution(tensors).get_actions(deterministic=deterministic).clamp(-1.0, 1.0)
        return (actions if batched else actions[0]).cpu().numpy(), state

    def act(self, observation: Arrays) -> NDArray[np.float32]:
        """The policy's own action, without noise: ``(G,)``, or ``(B, G)`` for a batch, in [-1, 1]."""
        return self.predict(observation, deterministic=True)[0]

    def attention(self, observation: Arrays) -> GraphAttention:
        """Where the encoder looks, in one observation of any network; tensors have a batch of one."""
        self.set_training_mode(False)
        tensors = {name: torch.as_tensor(value, device=self.device)[None] for name, value in observation.items()}
        with torch.no_grad():
            return self.encoder.attention(self._ablate(_typed(tensors)))

    def _distribution_and_values(self, obs: Observation) -> tuple[MaskedGaussian, Tensor]:
        """Encode what differs once; most of a batch is one state with many actions."""
        obs = _typed(obs)
        distinct, row = distinct_rows(obs)
        few = obs if len(distinct) == len(row) else {name: value[distinct] for name, value in obs.items()}
        groups, whole = self.encoder(self._ablate(few))
        mask = few["group_mask"] > 0  # (b, G), b distinct observations
        mean = few["prior"] + self.correction_scale * self.mean_head(groups).squeeze(-1)
        values = self.value_head(whole)  # (b, 1)
        return MaskedGaussian((mean * mask)[row], self.log_std, mask[row]), values[row]

    def _ablate(self, obs: Observation) -> Observation:
        """Take away what the ablation forbids."""
        if self.features == "data":
            return obs
        nodes, groups = obs["nodes"].clone(), obs["groups"].clone()
        groups[..., list(GROUP_DATA_COLUMNS)] = 0
        if self.features == "structure":
            nodes[..., list(NODE_DATA_COLUMNS)] = 0
        else:
            nodes = torch.as_tensor(_noise(*nodes.shape[1:])).to(nodes).expand_as(nodes)
        return {**obs, "nodes": nodes, "groups": groups}

    def _get_constructor_parameters(self) -> dict[str, Any]:
        """Arguments that make the same policy, for stable-baselines3's ``save``."""
        config = self.encoder.config
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "width": config.width,
            "heads": config.heads,
            "gat_layers": config.gat_layers,
            "transformer_layers": config.transformer_layers,
            "features": self.features,
            "correction_scale": self.correction_scale,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }


def _typed(observation: Observation) -> Observation:
    """Integers for node numbers and floats for all else, whatever a buffer has made of them."""
    return {name: value.long() if name == "edges" else value.float() for name, value in observation.items()}


def distinct_rows(observation: Observation) -> tuple[Tensor, Tensor]:
    """Find equal observations in a batch.

    Args:
        observation: Batch first.

    Returns:
        The first row of each kind ``(b,)``, ascending, and for each row which of these it equals ``(B,)``.
    """
    # the smallest parts first: they tell most states apart, and the largest are rarely compared in vain
    parts = sorted((value.flatten(1) for value in observation.values()), key=lambda part: part.shape[1])
    left = torch.arange(len(parts[0]), device=parts[0].device)
    kind = torch.full_like(left, -1)
    first: list[Tensor] = []
    while len(left):
        equal = left
        for part in parts:
            rows = part if len(equal) == len(part) else part[equal]  # mostly the whole batch: no copy
            equal = equal[(rows == part[left[0]]).all(dim=1)]
        # set on its own: a row with a NaN does not equal itself
        kind[left[0]] = kind[equal] = len(first)
        first.append(left[0])
        left = left[kind[left] < 0]
    return torch.stack(first), kind


@lru_cache(maxsize=16)
def _noise(groups: int, bins: int, features: int) -> NDArray[np.float32]:
    """Stand-ins for node features ``(G, K, F_n)``; those of the first groups are the same for any ``G``."""
    noise = np.random.default_rng(_NOISE_SEED).standard_normal((groups, bins, features))
    return noise.astype(np.float32)


def _zero_linear(width: int) -> nn.Linear:
    """A layer ``(..., D) -> (..., 1)`` whose output starts at zero."""
    layer = nn.Linear(width, 1)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _encoder_config(space: spaces.Space[Any], **sizes: int) -> EncoderConfig:
    """Sizes of the encoder from the observation space."""
    parts = {"nodes": "node_features", "edge_features": "edge_features", "groups": "group_features"}
    parts["state"] = "state_features"
    if not isinstance(space, spaces.Dict) or not {*parts, "prior", "group_mask"} <= set(space.spaces):
        raise PruningError(
            "`observation_space` should be that of `ChannelPruning-v0`, a Dict with 'nodes', 'groups' and so "
            f"on. Received {space}. Use that environment."
        )
    features = {size: cast(tuple[int, ...], space[name].shape)[-1] for name, size in parts.items()}
    return EncoderConfig(**features, **sizes)
