"""Links between two networks: paths, what crosses, and the network that a path makes."""
