"""What an adversary rebuilds inputs with."""
