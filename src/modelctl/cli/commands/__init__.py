"""The commands: thin, a few lines each."""
