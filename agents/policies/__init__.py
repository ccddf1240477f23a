"""The agent: encoder, policy, PPO, and policies on disk."""
