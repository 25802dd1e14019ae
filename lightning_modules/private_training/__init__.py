"""Differentially private training: what a step adds of each sample is clipped, and noise is added to the sum."""
