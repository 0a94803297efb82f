"""One change of names, carried through every section of a checkpoint."""
