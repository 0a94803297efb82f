"""How pages look: what only matters on a screen."""
