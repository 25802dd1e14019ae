"""Layer graphs: what a planner divides."""
