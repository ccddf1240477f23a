"""The Gymnasium environment: observation, action, reward."""
