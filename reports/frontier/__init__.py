"""Accuracy against what an adversary rebuilds, over points of a grid: choices, tables and plots."""
