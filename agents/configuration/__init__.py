"""Configurations of the commands, from groups of options."""
