"""Saved optimizers and schedulers, back onto the live ones."""
