"""Bytes on disk: open files, the strict zip directory, staged and atomic replacement."""
