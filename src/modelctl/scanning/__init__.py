"""What the pickles in files would run, wherever in them they lie."""
