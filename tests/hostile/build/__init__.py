"""Bytes by hand: pickles opcode by opcode, and containers of which every field can lie."""
