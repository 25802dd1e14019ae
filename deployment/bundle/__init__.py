"""Bundles: what ships a network, how it is written, checked and loaded."""
