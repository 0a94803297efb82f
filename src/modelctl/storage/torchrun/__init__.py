"""Several processes that ``torchrun`` started of one command: they share out its work."""
