"""Networks by name or from users' files, and their weights."""
