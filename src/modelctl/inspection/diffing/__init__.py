"""What differs between two checkpoints: names, bytes, values."""
