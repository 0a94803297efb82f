"""What load_state_dict would say, and the renames that mend it."""
