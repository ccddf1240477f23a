"""What commands do: prune, evaluate, transfer, compare, fine-tune, export."""
