"""A row of checkpoints in one folder: which stay, and which is the best."""
