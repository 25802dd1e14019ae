"""Data sets: where the pictures and labels of a split come from."""
