"""Command-line assembly on Hydra: train, evaluate, export, infer, cut_points."""
