"""The store of evaluations: every plan that was scored, and what it scored."""
