"""Checkpoints that ranks write together, each its own part."""
