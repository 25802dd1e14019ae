"""Report on a search for a path: a table of all paths, and the papers' plots."""
