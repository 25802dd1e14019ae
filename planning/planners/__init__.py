"""Where to cut: one planner a file, all with one signature."""
