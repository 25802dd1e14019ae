"""Assembly: from configs and checkpoints to what a command works with."""
