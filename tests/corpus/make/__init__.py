"""What makes the files: torch, safetensors, and the frameworks that people train with."""

from . import frameworks, modules, state_dicts, training  # noqa: F401 - they register themselves
