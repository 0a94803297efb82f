"""A file's tensors and values as live ones, and into a model."""
