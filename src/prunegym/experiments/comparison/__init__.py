"""Searchers against one another: the grid, what is measured, statistics, tables and pictures."""
