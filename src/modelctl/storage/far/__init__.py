"""Reading from far: over http(s), from the Hugging Face hub, from whatever fsspec knows."""
