"""What keeps a representation from giving its input away: terms beside the objective."""
