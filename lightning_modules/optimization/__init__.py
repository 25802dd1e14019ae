"""How weights are learned: optimizers, their groups of parameters, and schedules."""
