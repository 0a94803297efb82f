"""Pickles as inert trees: the interpreter, the writer, the policy of harmless names."""
