"""Data sets: where images come from, and the splits they are cut into."""
