"""The live view: one forward of a copied model on meta, and what it tells."""
