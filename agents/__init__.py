"""Encoder, policy, training, evaluation, transfer, baselines, reports and the command line."""
