"""Save a training whole, and go on with it."""
