"""Noise and masks that a device lays over what it sends, and what they guarantee."""
