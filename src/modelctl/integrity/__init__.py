"""Whether files hold what they should: content hashes, manifests, and what verify looks at."""
