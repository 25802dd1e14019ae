"""Seconds of every node on a machine, and the link between two."""
