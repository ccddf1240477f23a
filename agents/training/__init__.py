"""Training of pruning agents: the loop, what it notes, its checkpoints and its workers."""
