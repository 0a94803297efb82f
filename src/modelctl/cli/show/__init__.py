"""Reports on a screen."""
