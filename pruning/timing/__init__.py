"""Latency: measured, compared, and predicted by tables."""
