"""Networks, channel graphs, costs, criteria and surgery: no reinforcement learning here."""
