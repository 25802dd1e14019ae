"""Tasks, one for each method."""
