"""The architectures that are known by name, and which of them a file is."""
