"""Files that were made to harm: each fault a case of a few lines, each case what must happen."""
