"""What surrounds a command: how it starts, what it logs, how it is swept over, and how it ends."""
