"""Reading from far: servers on loopback."""
