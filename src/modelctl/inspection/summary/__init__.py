"""What is in a checkpoint, at a glance."""
