"""The Gymnasium environment: observation, action, reward."""

import gymnasium

ENVIRONMENT = "prunegym/ChannelPruning-v0"

if ENVIRONMENT not in gymnasium.registry:
    gymnasium.register(ENVIRONMENT, entry_point="prunegym.envs.channel_pruning:ChannelPruningEnv")
