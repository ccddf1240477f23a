"""Searchers: one protocol, from network, budget and evaluations to a plan."""
