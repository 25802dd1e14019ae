"""Training of links between two networks: in one process, and as the two parties would do it."""
