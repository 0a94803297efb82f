"""What differs between two checkpoints: names, shapes, values, and what is no tensor."""
