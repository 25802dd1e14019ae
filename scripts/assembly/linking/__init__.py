"""Paths through two networks, from their config."""
