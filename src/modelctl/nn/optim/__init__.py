"""Param groups, the depth of layers, schedulers: what an optimizer is built with."""
