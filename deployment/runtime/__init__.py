"""Pipelines that run a bundle, and how images become their input."""
