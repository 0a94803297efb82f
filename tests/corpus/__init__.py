"""Checkpoints as they are met: made by the real libraries here, found by others in ``shared``."""
