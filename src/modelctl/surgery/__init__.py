"""Edits: pure functions from checkpoint to checkpoint, one file a kind of edit."""
