"""One state_dict in several files, the Hugging Face way."""
