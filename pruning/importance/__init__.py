"""What each channel is worth: the pool of criteria, and the statistics they look at."""
