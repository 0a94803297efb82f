"""What there is to know of a checkpoint: data out, nothing printed."""
