"""What is done with a network after it was pruned: fine-tuning on its own, and export."""
