"""Checkpoints: reading them, what their configs may build, and the networks that they hold."""
