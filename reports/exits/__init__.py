"""Figures of a network with early exits, and the report on them."""
