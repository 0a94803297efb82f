"""What a checkpoint is: no I/O, no format, no torch."""
