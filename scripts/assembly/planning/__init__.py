"""From a config to what planners take, and back to the commands that follow from a plan."""
