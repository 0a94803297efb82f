"""Which is which: by names and shapes, by order, by what an optimizer keeps; and maps of names."""
