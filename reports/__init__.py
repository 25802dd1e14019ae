"""Reports: what was measured, as tables, plots and files."""
