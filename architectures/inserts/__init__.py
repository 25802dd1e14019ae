"""Modules that are inserted into a backbone: bottlenecks, quantisers, channels and exits' heads."""
